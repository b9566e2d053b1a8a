"""The demo data set: procedural aerial scenes at about 0.5 m a pixel, nothing to download.

    root = make("runs/data/demo")                          96 train, 16 val and 24 test scenes
    root = make("d", seed=1, scenes=(6, 2, 3), size=96)    a small one of 96 x 96 pixels

As in real imagery, colour alone does not tell the classes apart: crops have the greens of
grassland, ploughed soil the browns of dirt roads and roofs, ponds the dark green of woods, and a
roof can be as turquoise as a pool. Texture, shape and context do.

Lengths are in pixels, colours in 0..255, points and directions complex numbers x + iy. A signed
distance d is negative inside a shape. The order of the random draws is part of the data set: with
another one the scenes are others.
"""
import os
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter

from .common import BadInput, read_json, write

# Raise it with every change that alters a pixel: older folders are then refused, not mixed in.
VERSION = 1

CLASSES = {
    "field": "#e6c86e",
    "grassland": "#a3d977",
    "forest": "#1e7b3c",
    "water": "#2f6fd0",
    "road": "#8f8f8f",
    "building": "#d1483d",
    "car": "#b23af0",
    "pool": "#35e0e0",
}
FIELD, GRASS, FOREST, WATER, ROAD, BUILDING, CAR, POOL = range(len(CLASSES))

Map = np.ndarray  # (H, W), one value a pixel


def table(colors: str) -> np.ndarray:
    """Colours as in CSS -> (n, 3) int."""
    rows = [bytes.fromhex(color[1:]) for color in colors.split()]
    return np.array([list(row) for row in rows])


# What is painted is a mixture of two colours of a table.
GREENS = table("#425630 #546a38 #687a42 #808452 #969062")  # from lush to dry
SOILS = table("#5c4e42 #7a6450 #8c7e6e #a68e6e #bca876")  # from ploughed to ripe
WOODS = table("#32482a #405630 #2e4230 #545a34")
WATERS = table("#263e4e #32483a #3c4e32 #64604c")
ASPHALTS = table("#666566 #7e7c7a #94908a")
ROOFS = table("#9c5642 #96604c #7a6050 #767679 #56565a #ceccc6 #aa967a #5ca0a6 #54769e")
CARS = table("#e2e2e2 #b0b2b6 #2c2c30 #a02c28 #304a84 #968a70")
POOLS = table("#54b2c4 #70c6ca #4a96b2")

ALL = np.s_[:]  # paints everywhere


class Land(NamedTuple):
    """What the painters share."""
    rgb: np.ndarray  # (H, W, 3) float
    ids: Map  # class ids
    height: Map  # it casts the shadows


class Cut(NamedTuple):
    """The line that halved a parcel; some of these lines become roads."""
    inside: Map  # bool: the parcel that it halved
    across: Map  # signed distance to the line
    along: Map  # coordinate along the line
    along_u: bool  # does it run along u, not v?

    @property
    def distance(self) -> Map:
        return np.abs(self.across)


class Road(NamedTuple):
    """A road follows a cut."""
    half_width: float
    cut: Cut


class Layout(NamedTuple):
    """The plan of a scene."""
    size: int
    axes: Map  # complex: direction of constant v, that is along u
    parcel: Map  # parcel numbers
    town: np.ndarray  # (parcels,) bool
    roads: list[Road]
    to_road: Map  # signed distance to the nearest road
    to_edge: Map  # distance to the nearest cut

    @property
    def in_town(self) -> Map:
        return self.town[self.parcel]


class Rectangle(NamedTuple):
    """A rectangle on the land, seen through a window (h, w) that is a little larger."""
    window: tuple[slice, slice]
    along: Map  # coordinate along the axis, 0 in the middle
    across: Map
    d: Map  # signed distance
    free: bool  # only field and grassland inside and 3 pixels around


# ---- tools

def noise(rng: Generator, size: int, cell: float, octaves: int = 1) -> Map:
    """Smooth noise (size, size) of deviation near 1 and detail of about `cell` pixels.

    Every further octave is half as big and half as strong.
    """
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        cells = size * 2 ** octave / cell
        # One cell more on each side: bicubic interpolation looks that far.
        n = int(cells) + 4
        grid = Image.fromarray(rng.standard_normal((n, n), dtype=np.float32))
        inner = (1, 1, 1 + cells, 1 + cells)
        smooth = grid.resize((size, size), Image.BICUBIC, box=inner)
        total += np.asarray(smooth) / 2 ** octave
    return total * 1.3


def pick_colors(rng: Generator, table: np.ndarray, n: int) -> np.ndarray:
    """Colours (n, 3), each a mixture of two random rows of a table, mostly one, a little off."""
    rows = rng.integers(0, len(table), (2, n))
    first, second = table[rows]
    share = rng.beta(0.5, 0.5, (n, 1))
    color = first * share + second * (1 - share)
    color = color + rng.normal(0, 6, (n, 1))  # brightness
    color = color + rng.normal(0, 2, (n, 3))  # tint
    return color.astype(np.float32)


def pick_color(rng: Generator, table: np.ndarray) -> np.ndarray:
    return pick_colors(rng, table, 1)[0]


def paint(land: Land, where, d: Map, color, label: int | None = None, height=0.0) -> None:
    """Colour the inside (d < 0) of a signed distance, with a soft edge, in the window `where`.

    Without a label, class and height stay.
    """
    rgb = land.rgb[where]
    cover = np.clip(0.5 - d, 0, 1)[..., None]
    rgb += cover * (color - rgb)
    if label is not None:
        inside = d < 0
        land.ids[where][inside] = label
        land.height[where] = np.where(inside, height, land.height[where])


def rectangle(land: Land, at: complex, axis: complex, long: float, wide: float) -> Rectangle:
    """A rectangle by its centre, the direction of its long side and its half lengths."""
    reach = abs(complex(long, wide)) + 4
    top = max(int(at.imag - reach), 0)
    bottom = max(int(at.imag + reach), 0)
    left = max(int(at.real - reach), 0)
    right = max(int(at.real + reach), 0)

    # The window ends at the image's edge, too.
    ids = land.ids[top:bottom, left:right]
    h, w = ids.shape
    y = np.arange(top, top + h)[:, None]
    x = np.arange(left, left + w)
    local = (x + 1j * y - at) * axis.conjugate()
    along = local.real
    across = local.imag
    d = np.maximum(np.abs(along) - long, np.abs(across) - wide)
    taken = (ids[d < 3] > GRASS).any()
    window = np.s_[top:bottom, left:right]
    return Rectangle(window, along, across, d, not taken)


# ---- the land

def divide(rng: Generator, u: Map, v: Map, pieces: int) -> tuple[Map, list[Cut]]:
    """Halve the biggest parcel until there are enough: parcel numbers (H, W) and the cuts.

    A cut ends at older cuts: as roads they meet in junctions.
    """
    parcel = np.zeros(u.shape, np.int64)
    cuts = []
    for new in range(1, pieces):
        biggest = np.bincount(parcel.ravel()).argmax()
        inside = parcel == biggest
        along_u = np.ptp(v[inside]) > np.ptp(u[inside])
        across, along = (v, u) if along_u else (u, v)
        # The cut lies near the middle; every 17th pixel is enough to find it.
        some = across[inside][::17]
        middle = np.quantile(some, rng.uniform(0.35, 0.65))
        across = across - middle.astype(np.float32)
        parcel[inside & (across > 0)] = new
        cuts.append(Cut(inside, across, along, along_u))
    return parcel, cuts


def open_land(rng: Generator, u: Map, v: Map, parcel: Map, town: np.ndarray) -> Land:
    """Fields with rows and tramlines, grassland with patches.

    A town (parcels,) is grass before its houses come.
    """
    size = len(u)
    n = len(town)
    is_crop = rng.random(n) < rng.uniform(0.75, 1)
    is_crop = is_crop & ~town
    is_soil = rng.random((n, 1)) < 0.5
    is_soil = is_soil & is_crop[:, None]
    soils = pick_colors(rng, SOILS, n)
    greens = pick_colors(rng, GREENS, n)
    base = np.where(is_soil, soils, greens)[parcel]  # (H, W, 3)

    def uniform(low, high):  # (H, W), one number a parcel
        return rng.uniform(low, high, n).astype(np.float32)[parcel]

    # Rows of plants run along one axis of the land, turned a little.
    turn = uniform(-0.2, 0.2)
    period = uniform(3.5, 8)
    tram = uniform(26, 44)
    depth = uniform(4, 16)
    along_v = (rng.random(n) < 0.5)[parcel]
    rows = np.where(along_v, u + turn * v, v - turn * u)
    vigour = np.clip(1 + 0.5 * noise(rng, size, 60), 0.3, 2)
    stripes = depth * np.sin(2 * np.pi / period * rows) * vigour
    # Every `tram` pixels a tractor has left the two tracks of its wheels.
    from_middle = np.abs(rows % tram - 6)
    stripes -= 14 * (np.abs(from_middle - 2.5) < 0.8)

    # Plants vary least in blue.
    on_crop = stripes + 5 * noise(rng, size, 70, 3)
    on_grass = 9 * noise(rng, size, 28, 4)
    texture = np.where(is_crop[parcel], on_crop, on_grass)
    plants = np.array((1, 0.95, 0.75), np.float32)
    rgb = base + texture[..., None] * plants
    # Drier patches are more red, wetter ones less.
    dry = np.array((7, 2, 1), np.float32)
    rgb += noise(rng, size, 90, 2)[..., None] * dry
    ids = np.where(is_crop, FIELD, GRASS).astype(np.uint8)
    height = np.zeros((size, size), np.float32)
    return Land(rgb, ids[parcel], height)


def add_water(rng: Generator, land: Land, u: Map, to_road: Map) -> Map:
    """A river across everything, to be bridged by the roads, or ponds away from them.

    Returns the signed distance to the shore.
    """
    size = len(u)
    if rng.random() < 0.35:
        # A river along v through a random pixel, with bends.
        course = u - rng.choice(u.ravel()) + 22 * noise(rng, size, 110)
        half_width = rng.uniform(8, 24)
        d = np.abs(course) - half_width
    else:
        # Ponds fill the lowest share of the land; roads lie high.
        bottom = noise(rng, size, 80, 3)
        d = 18 * (bottom + 3 * np.exp(-to_road / 12))
        share = rng.uniform(0.02, 0.25)
        d -= np.quantile(d[::4, ::4], share)

    bank = pick_color(rng, SOILS) * 0.8
    paint(land, ALL, d - 2.5, bank)
    # The deeper the darker.
    shade = 2 * noise(rng, size, 60, 2)
    shade = shade - 0.4 * np.clip(-d, 0, 20)
    color = pick_color(rng, WATERS) + shade[..., None]
    paint(land, ALL, d, color, WATER)
    return d


def where_trees_stand(rng: Generator, layout: Layout, to_water: Map) -> tuple[Map, Map]:
    """Woodland, above 0 inside, and the density of trees from 0 to 1."""
    # Woodland is not in town, on roads or in water.
    wood = noise(rng, layout.size, 70, 3)
    level = np.quantile(wood[::4, ::4], rng.uniform(0.6, 0.95))
    wood -= level + layout.in_town
    room = np.minimum(to_water, layout.to_road - 5)
    wood = np.minimum(wood, room / 5)

    # Some parcels have hedges around them.
    hedged = rng.random(len(layout.town)) < 0.3
    hedge = (layout.to_edge < 4) & hedged[layout.parcel]
    density = np.where(layout.in_town, 0.03, 0.004)
    density = np.where(hedge, 0.8, density)
    density = np.where(wood > 0, 1, density)
    return wood, density * (to_water > 4) * (layout.to_road > 5)


def add_trees(rng: Generator, land: Land, wood: Map, density: Map) -> None:
    """Shaded ground where wood > 0, and round crowns on a jittered grid.

    A tree stands where the density is above a number from U(0, 1).
    """
    # n x n cells with one tree each; one ring of cells lies outside the image.
    size = len(wood)
    cell = int(rng.integers(8, 13))
    n = size // cell + 3
    corners = np.stack(np.mgrid[:n, :n])
    centres = corners + rng.random((2, n, n))
    cy, cx = centres.astype(np.float32) * cell
    iy = np.clip(cy - cell, 0, size - 1).astype(int)
    ix = np.clip(cx - cell, 0, size - 1).astype(int)
    # Without a tree the radius is next to nothing, so that one formula serves all cells.
    stands = density[iy, ix] > rng.random((n, n))
    radius = cell * rng.uniform(0.55, 0.85, (n, n))
    radius = np.where(stands, radius, 1e-3).astype(np.float32)

    # Pixels as (cells, cell, cells, cell), so that each meets the nine trees of its own cell and
    # those around it: a crown reaches no further. `dome` is the highest crown, `owner` its tree.
    inner = n - 2
    shape = (inner, cell, inner, cell)
    pixel = np.arange(cell, (n - 1) * cell, dtype=np.float32)
    pixel = pixel.reshape(inner, cell)
    number = np.arange(n * n).reshape(n, n)
    dome = np.zeros(shape, np.float32)
    owner = np.zeros(shape, np.int64)
    for down in range(3):
        for right in range(3):
            near = np.s_[down:down + inner, None, right:right + inner, None]
            dy2 = (pixel[..., None, None] - cy[near]) ** 2
            dx2 = (pixel - cx[near]) ** 2
            rise = 1 - (dy2 + dx2) / radius[near] ** 2
            owner = np.where(rise > dome, number[near], owner)
            dome = np.maximum(dome, rise)
    dome = dome.reshape(inner * cell, -1)[:size, :size]
    owner = owner.reshape(inner * cell, -1)[:size, :size]

    # No two trees are alike.
    leaf = pick_color(rng, WOODS) + rng.normal(0, 6, (n * n, 1))
    leaf = leaf + rng.normal(0, 3, (n * n, 3))
    shade = 0.75 + 0.3 * dome + 0.04 * noise(rng, size, 3)
    ground = pick_color(rng, WOODS) * 0.6
    paint(land, ALL, 1 - 9 * wood, ground, FOREST)
    height = rng.uniform(9, 16) * np.sqrt(dome)
    color = leaf[owner] * shade[..., None]
    paint(land, ALL, 0.1 - 9 * dome, color, FOREST, height)


# ---- roads, buildings, cars

def add_roads(rng: Generator, land: Land, roads: list[Road]) -> None:
    """Narrow roads are dirt with grass between the wheels; the widest have a dashed white line."""
    grit = 3 * noise(rng, len(land.ids), 20, 3)[..., None]
    for road in roads:
        inside = road.cut.inside
        is_dirt = road.half_width < 5
        color = pick_color(rng, SOILS[1:4] if is_dirt else ASPHALTS) + grit
        dashed = (road.half_width > 7) & (road.cut.along % 24 < 12)
        middle = np.where(inside & (is_dirt | dashed), road.cut.distance - 0.7, 1)
        d = np.where(inside, road.cut.distance - road.half_width, 1)
        paint(land, ALL, d, color, ROAD)
        line = pick_color(rng, GREENS) if is_dirt else 200
        paint(land, ALL, middle, line)


def add_car(rng: Generator, land: Land, at: complex, axis: complex) -> None:
    """About 4.2 x 1.9 m, with dark glass at the front and the back."""
    half_length = rng.uniform(3.8, 4.6)
    car = rectangle(land, at, axis, half_length, 1.9)
    color = pick_color(rng, CARS)
    paint(land, car.window, car.d, color, CAR, 2.5)
    from_middle = np.abs(car.along + 0.5)
    panes = np.abs(from_middle - 2) - 0.7
    glass = np.maximum(car.d, panes)
    paint(land, car.window, glass, color * 0.5)


def add_house(rng: Generator, land: Land, at: complex, axis: complex,
              long: float, wide: float) -> None:
    """A gabled, hipped or, if large, flat roof, then a pool or a car park beside it.

    Nothing where there is no room.
    """
    house = rectangle(land, at, axis, long, wide)
    if not house.free:
        return
    is_flat = wide > 11
    slope = 0
    if not is_flat:
        # A gabled roof does not slope towards its ends: they are put far away.
        beyond = rng.choice((0, 99))
        ends = long - np.abs(house.along) + beyond
        slope = 0.6 * np.minimum(wide - np.abs(house.across), ends)
    tiles = pick_color(rng, ROOFS)
    rows = np.sin(house.along * rng.uniform(1, 2))
    color = tiles + 3 * rows[..., None]
    height = rng.uniform(8, 14) + slope
    paint(land, house.window, house.d, color, BUILDING, height)

    # Roof lights, or a chimney.
    for _ in range(rng.integers(4, 9) if is_flat else 1):
        p, q = rng.uniform(-0.8, 0.8, 2) * (long, wide)
        along = np.abs(house.along - p)
        across = np.abs(house.across - q)
        d = np.maximum(along, across) - rng.uniform(1, 2)
        paint(land, house.window, d, rng.uniform(60, 220))

    if is_flat:
        at = at + beside(rng, axis, wide, 13)
        add_car_park(rng, land, at, axis)
    else:
        half = (rng.uniform(5.5, 8.5), rng.uniform(3, 4.5))
        at = at + beside(rng, axis, wide, half[1])
        add_pool(rng, land, rectangle(land, at, axis, *half), half)


def beside(rng: Generator, axis: complex, wide: float, other: float) -> complex:
    """The way to the middle of what lies 4 pixels beside a house, by the half widths of both."""
    shift = rng.uniform(-5, 5)
    side = rng.choice((-1, 1))
    across = side * (wide + other + 4)
    return axis * complex(shift, across)


def add_car_park(rng: Generator, land: Land, at: complex, axis: complex) -> None:
    """Two rows of slots 3 m wide, some of them taken."""
    park = rectangle(land, at, axis, 24, 13)
    if not park.free:
        return
    paint(land, park.window, park.d, pick_color(rng, ASPHALTS), ROAD)
    # White lines between the slots, which leave the lane in the middle free.
    line = np.abs(park.along % 6 - 3) - 0.4
    lane = 4.5 - np.abs(park.across)
    lines = np.maximum(park.d + 1, np.maximum(line, lane))
    paint(land, park.window, lines, 205)
    for slot in np.flatnonzero(rng.random(14) < 0.3):
        along = 6 * (slot // 2) - 18
        across = 17 * (slot % 2) - 8.5
        place = at + axis * complex(along, across)
        add_car(rng, land, place, axis * 1j)


def add_pool(rng: Generator, land: Land, place: Rectangle, half: tuple[float, float]) -> None:
    """A rectangle or an ellipse of water with paving around it."""
    if not place.free:
        return
    d = place.d
    if rng.random() < 0.4:
        long, wide = half
        d = (np.hypot(place.along / long, place.across / wide) - 1) * wide
    paint(land, place.window, d - 1.5, 196)
    paint(land, place.window, d, pick_color(rng, POOLS), POOL)


def add_buildings(rng: Generator, land: Land, layout: Layout) -> None:
    """Large buildings while there is room, then houses from the roads outwards: they line up."""
    area = (layout.size / 256) ** 2
    # Random places in town, not too near to a road.
    spots = np.argwhere(layout.in_town & (layout.to_road > 11))
    order = rng.permutation(len(spots))
    spots = spots[order[:int(400 * area)]]
    # Rows of houses 12 pixels deep.
    rank = layout.to_road[tuple(spots.T)] // 12
    along_roads = spots[np.argsort(rank, kind="stable")]
    # Most of these tries fail.
    tries = int(rng.integers(0, 60) * area)
    large = spots[:tries]
    for k, (y, x) in enumerate((*large, *along_roads)):
        if land.ids[y, x] > GRASS:
            continue
        if k < len(large):
            long, wide = rng.uniform((20, 12), (34, 20))
        else:
            long, wide = rng.uniform((10, 7), (17, 10.5))
        # The ridge runs along or across the street.
        quarters = rng.integers(0, 4)
        axis = layout.axes[y, x] * 1j ** quarters
        add_house(rng, land, complex(x, y), axis, long, wide)


def add_traffic(rng: Generator, land: Land, layout: Layout) -> None:
    """One to three cars on every road, in the middle of a lane."""
    for road in layout.roads:
        off = np.abs(road.cut.distance - road.half_width / 2)
        middle = road.cut.inside & (off < 1)
        spots = np.argwhere(middle & (land.ids == ROAD))
        order = rng.permutation(len(spots))
        count = rng.integers(1, 4)
        # Cars stand along their road.
        turn = 1 if road.cut.along_u else 1j
        for y, x in spots[order[:count]]:
            axis = layout.axes[y, x] * turn
            add_car(rng, land, complex(x, y), axis)


# ---- the whole scene

def landing(step: int, size: int) -> slice:
    """Where the pixels 0..size are after a step, without those that left the image."""
    first = max(step, 0)
    last = size - max(-step, 0)
    return slice(first, last)


def photograph(rng: Generator, land: Land) -> np.ndarray:
    """(H, W, 3) uint8 with light, shadows, exposure, white balance, haze, blur and grain."""
    height = land.height
    size = len(height)
    sun = complex(np.exp(2j * np.pi * rng.random()))
    drop = rng.uniform(0.7, 1.4)
    # Slopes towards the sun are brighter.
    gy, gx = np.gradient(height)
    slope = gy * sun.imag + gx * sun.real
    light = 1 - 0.25 * np.clip(slope, -1, 1)

    # March towards the sun on rays that rise by `drop` a pixel; what is above a ray casts a shadow.
    depth = np.zeros_like(height)
    for k in range(1, int(height.max() / drop) + 2):
        dy = round(k * sun.imag)
        dx = round(k * sun.real)
        here = landing(-dy, size), landing(-dx, size)
        there = landing(dy, size), landing(dx, size)
        above = height[there] - k * drop - height[here]
        depth[here] = np.maximum(depth[here], above)
    # The sky's blue light is left.
    shadow = np.clip(depth, 0, 1)[..., None]
    shadow = shadow * (0.6, 0.55, 0.45)

    exposure = rng.uniform(1, 1.45)
    balance = rng.normal(1, 0.025, 3)
    rgb = land.rgb * light[..., None]
    rgb = rgb * (1 - shadow) * exposure * balance
    haze = np.array((176, 188, 200))
    rgb += rng.uniform(0, 0.25) * (haze - rgb)

    # The lens blurs, the sensor adds its noise.
    sharp = np.clip(rgb, 0, 255).astype(np.uint8)
    blur = ImageFilter.GaussianBlur(rng.uniform(0.4, 0.8))
    blurred = np.asarray(Image.fromarray(sharp).filter(blur))
    strength = rng.uniform(1.5, 4)
    grain = strength * rng.standard_normal(rgb.shape, dtype=np.float32)
    return np.clip(blurred + grain, 0, 255).astype(np.uint8)


def scene(rng: Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One aerial photograph (H, W, 3) uint8 and its class ids (H, W) uint8."""
    # The land's axes u and v: a turned and bent grid.
    area = (size / 256) ** 2
    bend = rng.uniform(0, 9)
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    angle = np.exp(2j * np.pi * rng.random())
    turned = (x + 1j * y) * angle
    u = turned.real.astype(np.float32) + bend * noise(rng, size, 150)
    v = turned.imag.astype(np.float32) + bend * noise(rng, size, 150)
    gy, gx = np.gradient(v)
    axes = (gy - 1j * gx) / np.hypot(gx, gy)

    # Parcels, some of them town; the one in the middle of the scene always is.
    pieces = round(area * rng.uniform(7, 15))
    parcel, cuts = divide(rng, u, v, max(4, pieces))
    town = rng.random(parcel.max() + 1) < rng.uniform(0, 0.7)
    town[parcel[size // 2, size // 2]] = True
    land = open_land(rng, u, v, parcel, town)

    # The first cuts are the longest: they become roads.
    roads = []
    for cut in cuts[:rng.integers(2, 5)]:
        half_width = float(rng.choice((4.5, 6, 8)))
        roads.append(Road(half_width, cut))
    far = np.float32(size)
    kerbs = [np.where(r.cut.inside, r.cut.distance - r.half_width, far) for r in roads]
    edges = [np.where(cut.inside, cut.distance, far) for cut in cuts]
    to_road = np.min(kerbs, 0)
    to_edge = np.min(edges, 0)
    layout = Layout(size, axes, parcel, town, roads, to_road, to_edge)

    # Each of these sees what the ones before have painted.
    to_water = add_water(rng, land, u, to_road)
    wood, density = where_trees_stand(rng, layout, to_water)
    add_trees(rng, land, wood, density)
    add_roads(rng, land, roads)
    add_buildings(rng, land, layout)
    add_traffic(rng, land, layout)
    return photograph(rng, land), land.ids


# ---- files

def is_made(root: Path, made_by: dict) -> bool:
    """Whether the folder holds this very data set; any other content is an error."""
    if not root.exists():
        return False
    if root.is_dir() and not any(root.iterdir()):
        return False
    try:
        found = read_json(root / "dataset.json")["made_by"]
    except (BadInput, LookupError):
        found = None
    if found != made_by:
        found = found or "other files"
        raise BadInput(f"{root}: wanted {made_by}, found {found}; name another folder")
    return True


def make(root: str | Path, seed: int = 0, scenes: tuple[int, int, int] = (96, 16, 24),
         size: int = 256) -> Path:
    """Make the data set in `root` unless it is there: `scenes` for train, val and test.

    It appears whole or not at all, however many processes start this.
    """
    root = Path(root)
    made_by = {
        "generator": "nanoRS demo",
        "version": VERSION,
        "seed": seed,
        "scenes": list(scenes),
        "size": size,
    }
    if is_made(root, made_by):
        return root
    part = root.absolute().with_name(f".{root.name}-{uuid.uuid4().hex}.tmp")
    try:
        fill(part, seed, scenes, size, made_by)
        os.rename(part, root)
    except OSError:
        # Rename refuses a filled folder: perhaps another process was first.
        if not is_made(root, made_by):
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return root


def fill(folder: Path, seed: int, scenes: tuple, size: int, made_by: dict) -> None:
    """All scenes as split/images/*.png and split/masks/*.png, then dataset.json."""
    splits = ("train", "val", "test")
    palette = b"".join(bytes.fromhex(color[1:]) for color in CLASSES.values())
    for number, (split, count) in enumerate(zip(splits, scenes)):
        images = folder / split / "images"
        masks = folder / split / "masks"
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for i in range(count):
            # A scene depends on seed, split and number only.
            pixels, ids = scene(np.random.default_rng((seed, number, i)), size)
            Image.fromarray(pixels).save(images / f"scene_{i:03d}.png", compress_level=3)
            # The ids stay what they are, and any viewer shows them in colour.
            mask = Image.fromarray(ids)
            mask.putpalette(palette)
            mask.save(masks / f"scene_{i:03d}.png")
    classes = []
    for i, (name, color) in enumerate(CLASSES.items()):
        classes.append({"name": name, "id": i, "color": color})
    info = {
        "name": "demo",
        "images": "*/images/*.png",
        "masks": "*/masks/*.png",
        "classes": classes,
        "ignore": [],
        "splits": {split: f"{split}/*" for split in splits},
        "made_by": made_by,
    }
    write(folder / "dataset.json", info)
