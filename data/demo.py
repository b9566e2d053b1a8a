"""The demo data set: procedural aerial scenes at about 0.5 m a pixel, made on first use, nothing to download.

As in real imagery, colour alone does not tell the classes apart: crops have the greens of grassland, ploughed soil the
browns of dirt roads and roofs, ponds the dark green of woods, and a roof can be as turquoise as a pool. Texture, shape
and context do. Lengths are in pixels, colours in 0..255, points and directions complex numbers x + iy.
"""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from .common import BadInput

VERSION = 1  # raise it with every change that alters a pixel: older folders are then refused, not mixed in
CLASSES = {"field": "#e6c86e", "grassland": "#a3d977", "forest": "#1e7b3c", "water": "#2f6fd0", "road": "#8f8f8f",
           "building": "#d1483d", "car": "#b23af0", "pool": "#35e0e0"}
FIELD, GRASS, FOREST, WATER, ROAD, BUILDING, CAR, POOL = range(len(CLASSES))

GREENS = np.array([(66, 86, 48), (84, 106, 56), (104, 122, 66), (128, 132, 82), (150, 144, 98)])  # lush .. dry
SOILS = np.array([(92, 78, 66), (122, 100, 80), (140, 126, 110), (166, 142, 110), (188, 168, 118)])  # ploughed .. ripe
WOODS = np.array([(50, 72, 42), (64, 86, 48), (46, 66, 48), (84, 90, 52)])
WATERS = np.array([(38, 62, 78), (50, 72, 58), (60, 78, 50), (100, 96, 76)])
ASPHALTS = np.array([(102, 101, 102), (126, 124, 122), (148, 144, 138)])
ROOFS = np.array([(156, 86, 66), (150, 96, 76), (122, 96, 80), (118, 118, 121), (86, 86, 90), (206, 204, 198),
                  (170, 150, 122), (92, 160, 166), (84, 118, 158)])
CARS = np.array([(226, 226, 226), (176, 178, 182), (44, 44, 48), (160, 44, 40), (48, 74, 132), (150, 138, 112)])
POOLS = np.array([(84, 178, 196), (112, 198, 202), (74, 150, 178)])


class Land(NamedTuple):
    """What the painters share: colour (H, W, 3), class ids (H, W) and height (H, W), which casts the shadows."""
    rgb: np.ndarray
    ids: np.ndarray
    height: np.ndarray


def noise(rng: np.random.Generator, size: int, cell: float, octaves: int = 1) -> np.ndarray:
    """Smooth noise (size, size), deviation near 1, detail about `cell` pixels; an octave is half as big and strong."""
    total = np.zeros((size, size), np.float32)
    for k in range(octaves):
        n = size * 2 ** k / cell
        grid = Image.fromarray(rng.standard_normal((int(n) + 4, int(n) + 4), dtype=np.float32))
        total += np.asarray(grid.resize((size, size), Image.BICUBIC, box=(1, 1, 1 + n, 1 + n))) / 2 ** k
    return total * 1.3


def pick(rng: np.random.Generator, table: np.ndarray, n: int = 1) -> np.ndarray:
    """Colours (n, 3), each a mixture of two random rows of a table, mostly one of them, and a little off."""
    a, b = table[rng.integers(0, len(table), (2, n))]
    mix = rng.beta(0.5, 0.5, (n, 1))
    return (a * mix + b * (1 - mix) + rng.normal(0, 6, (n, 1)) + rng.normal(0, 2, (n, 3))).astype(np.float32)


def box(land: Land, at: complex, axis: complex, long: float, wide: float) -> tuple:
    """A rectangle by half lengths: window, coordinates along and across, signed distance, is it all open land."""
    reach = abs(complex(long, wide)) + 4
    top, bottom, left, right = (max(int(c + r), 0) for c in (at.imag, at.real) for r in (-reach, reach))
    ids = land.ids[top:bottom, left:right]
    y, x = np.arange(top, top + ids.shape[0])[:, None], np.arange(left, left + ids.shape[1])
    local = (x + 1j * y - at) * axis.conjugate()
    d = np.maximum(np.abs(local.real) - long, np.abs(local.imag) - wide)
    return np.s_[top:bottom, left:right], local.real, local.imag, d, not (ids[d < 3] > GRASS).any()


def paint(land: Land, where, d: np.ndarray, color, label: int | None = None, height: np.ndarray | float = 0.0) -> None:
    """Colour the inside (d < 0) of a signed distance, with a soft edge; without a label, class and height stay."""
    rgb = land.rgb[where]
    rgb += np.clip(0.5 - d, 0, 1)[..., None] * (color - rgb)
    if label is not None:
        land.ids[where][d < 0] = label
        land.height[where] = np.where(d < 0, height, land.height[where])


def cut(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, pieces: int) -> tuple[np.ndarray, list]:
    """Halve the biggest parcel until enough: parcel numbers (H, W); per cut (inside, across, along, runs along u)."""
    parcel, cuts = np.zeros(u.shape, np.int64), []
    for new in range(1, pieces):
        inside = parcel == np.bincount(parcel.ravel()).argmax()
        along_u = np.ptp(v[inside]) > np.ptp(u[inside])
        across, along = (v, u) if along_u else (u, v)
        across = across - np.quantile(across[inside][::17], rng.uniform(0.35, 0.65)).astype(np.float32)
        parcel[inside & (across > 0)] = new
        cuts.append((inside, across, along, along_u))  # it ends at older cuts: as roads they meet in junctions
    return parcel, cuts


def open_land(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, parcel: np.ndarray, town: np.ndarray) -> Land:
    """Fields with rows and tramlines, grassland with patches; a town is grass before its houses come."""
    size, n = len(u), len(town)
    crop = (rng.random(n) < rng.uniform(0.75, 1)) & ~town
    base = np.where(crop[:, None] & (rng.random((n, 1)) < 0.5), pick(rng, SOILS, n), pick(rng, GREENS, n))[parcel]
    turn, period, tram, depth = (rng.uniform(low, high, n).astype(np.float32)[parcel]
                                 for low, high in ((-0.2, 0.2), (3.5, 8), (26, 44), (4, 16)))
    rows = np.where((rng.random(n) < 0.5)[parcel], u + turn * v, v - turn * u)
    stripes = depth * np.sin(2 * np.pi / period * rows) * np.clip(1 + 0.5 * noise(rng, size, 60), 0.3, 2)
    stripes -= 14 * (np.abs(np.abs(rows % tram - 6) - 2.5) < 0.8)  # the tractor's two wheels
    texture = np.where(crop[parcel], stripes + 5 * noise(rng, size, 70, 3), 9 * noise(rng, size, 28, 4))
    rgb = base + texture[..., None] * np.array((1, 0.95, 0.75), np.float32)
    rgb += noise(rng, size, 90, 2)[..., None] * np.array((7, 2, 1), np.float32)  # drier and wetter patches
    return Land(rgb, np.where(crop, FIELD, GRASS).astype(np.uint8)[parcel], np.zeros((size, size), np.float32))


def water(rng: np.random.Generator, land: Land, u: np.ndarray, to_road: np.ndarray) -> np.ndarray:
    """A river across everything, to be bridged by the roads, or ponds away from them; distance to the shore."""
    size = len(u)
    if rng.random() < 0.35:
        d = np.abs(u - rng.choice(u.ravel()) + 22 * noise(rng, size, 110)) - rng.uniform(8, 24)
    else:
        d = 18 * (noise(rng, size, 80, 3) + 3 * np.exp(-to_road / 12))
        d -= np.quantile(d[::4, ::4], rng.uniform(0.02, 0.25))
    paint(land, np.s_[:], d - 2.5, pick(rng, SOILS)[0] * 0.8)  # bank
    deep = 2 * noise(rng, size, 60, 2) - 0.4 * np.clip(-d, 0, 20)
    paint(land, np.s_[:], d, pick(rng, WATERS)[0] + deep[..., None], WATER)
    return d


def trees(rng: np.random.Generator, land: Land, wood: np.ndarray, density: np.ndarray) -> None:
    """Shaded ground where wood > 0, and round crowns on a jittered grid, one standing where density > U(0, 1)."""
    size, cell = len(wood), int(rng.integers(8, 13))
    n = size // cell + 3  # with one ring of cells outside the image
    cy, cx = (np.stack(np.mgrid[:n, :n]) + rng.random((2, n, n))).astype(np.float32) * cell
    iy, ix = (np.clip(c - cell, 0, size - 1).astype(int) for c in (cy, cx))
    radius = np.where(density[iy, ix] > rng.random((n, n)), cell * rng.uniform(0.55, 0.85, (n, n)), 1e-3)
    radius, pixel = radius.astype(np.float32), np.arange(cell, (n - 1) * cell, dtype=np.float32).reshape(n - 2, cell)
    dome, owner = np.zeros((n - 2, cell) * 2, np.float32), np.zeros((n - 2, cell) * 2, np.int64)
    for k in range(9):  # a crown reaches no further than the next cell
        near = np.s_[k // 3:k // 3 + n - 2, None, k % 3:k % 3 + n - 2, None]
        rise = 1 - ((pixel[..., None, None] - cy[near]) ** 2 + (pixel - cx[near]) ** 2) / radius[near] ** 2
        owner = np.where(rise > dome, np.arange(n * n).reshape(n, n)[near], owner)
        dome = np.maximum(dome, rise)
    dome, owner = (a.reshape((n - 2) * cell, -1)[:size, :size] for a in (dome, owner))
    leaf = pick(rng, WOODS)[0] + rng.normal(0, 6, (n * n, 1)) + rng.normal(0, 3, (n * n, 3))  # no two trees are alike
    shade = 0.75 + 0.3 * dome + 0.04 * noise(rng, size, 3)
    paint(land, np.s_[:], 1 - 9 * wood, pick(rng, WOODS)[0] * 0.6, FOREST)
    paint(land, np.s_[:], 0.1 - 9 * dome, leaf[owner] * shade[..., None], FOREST, rng.uniform(9, 16) * np.sqrt(dome))


def car(rng: np.random.Generator, land: Land, at: complex, axis: complex) -> None:
    """About 4.2 x 1.9 m, with dark glass at the front and the back."""
    where, along, _, d, _ = box(land, at, axis, rng.uniform(3.8, 4.6), 1.9)
    body = pick(rng, CARS)[0]
    paint(land, where, d, body, CAR, 2.5)
    paint(land, where, np.maximum(d, np.abs(np.abs(along + 0.5) - 2) - 0.7), body * 0.5)


def house(rng: np.random.Generator, land: Land, at: complex, axis: complex, long: float, wide: float) -> None:
    """A gabled, hipped or, if large, flat roof, then a pool or a car park beside it; nothing where there is no room."""
    where, along, across, d, free = box(land, at, axis, long, wide)
    if not free:
        return
    flat = wide > 11
    roof = 0 if flat else 0.6 * np.minimum(wide - np.abs(across), long - np.abs(along) + rng.choice((0, 99)))
    color = pick(rng, ROOFS)[0] + 3 * np.sin(along * rng.uniform(1, 2))[..., None]
    paint(land, where, d, color, BUILDING, rng.uniform(8, 14) + roof)
    for _ in range(rng.integers(4, 9) if flat else 1):  # roof lights, or a chimney
        p, q = rng.uniform(-0.8, 0.8, 2) * (long, wide)
        paint(land, where, np.maximum(np.abs(along - p), np.abs(across - q)) - rng.uniform(1, 2), rng.uniform(60, 220))

    size = (24, 13) if flat else (rng.uniform(5.5, 8.5), rng.uniform(3, 4.5))
    at += axis * complex(rng.uniform(-5, 5), rng.choice((-1, 1)) * (wide + size[1] + 4))
    where, along, across, d, free = box(land, at, axis, *size)
    if free and flat:
        paint(land, where, d, pick(rng, ASPHALTS)[0], ROAD)
        paint(land, where, np.maximum(d + 1, np.maximum(np.abs(along % 6 - 3) - 0.4, 4.5 - np.abs(across))), 205)
        for k in np.flatnonzero(rng.random(14) < 0.3):  # two rows of slots 3 m wide
            car(rng, land, at + axis * complex(6 * (k // 2) - 18, 17 * (k % 2) - 8.5), axis * 1j)
    elif free:
        if rng.random() < 0.4:
            d = (np.hypot(along / size[0], across / size[1]) - 1) * size[1]
        paint(land, where, d - 1.5, 196)  # paving
        paint(land, where, d, pick(rng, POOLS)[0], POOL)


def photograph(rng: np.random.Generator, land: Land) -> np.ndarray:
    """Sunlit slopes, cast shadows, exposure, white balance, haze, the camera's blur and noise: (H, W, 3) uint8."""
    height, size = land.height, len(land.height)
    sun, drop = complex(np.exp(2j * np.pi * rng.random())), rng.uniform(0.7, 1.4)
    gy, gx = np.gradient(height)
    light, depth = 1 - 0.25 * np.clip(gy * sun.imag + gx * sun.real, -1, 1), np.zeros_like(height)
    for k in range(1, int(height.max() / drop) + 2):  # march towards the sun on rays that rise by `drop` a pixel
        dy, dx = round(k * sun.imag), round(k * sun.real)
        here = np.s_[max(-dy, 0):size - max(dy, 0), max(-dx, 0):size - max(dx, 0)]
        there = np.s_[max(dy, 0):size - max(-dy, 0), max(dx, 0):size - max(-dx, 0)]
        depth[here] = np.maximum(depth[here], height[there] - k * drop - height[here])
    shadow = np.clip(depth, 0, 1)[..., None] * (0.6, 0.55, 0.45)  # the sky's blue light is left
    rgb = land.rgb * light[..., None] * (1 - shadow) * rng.uniform(1, 1.45) * rng.normal(1, 0.025, 3)
    rgb += rng.uniform(0, 0.25) * (np.array((176, 188, 200)) - rgb)
    sharp = Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))
    blurred = sharp.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 0.8)))
    grain = rng.uniform(1.5, 4) * rng.standard_normal(rgb.shape, dtype=np.float32)
    return np.clip(np.asarray(blurred) + grain, 0, 255).astype(np.uint8)


def scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One aerial photograph (H, W, 3) uint8 and its class ids (H, W) uint8."""
    area, bend = (size / 256) ** 2, rng.uniform(0, 9)
    x, y = np.meshgrid(*[np.arange(size)] * 2)
    turned = (x + 1j * y) * np.exp(2j * np.pi * rng.random())
    u, v = (a.astype(np.float32) + bend * noise(rng, size, 150) for a in (turned.real, turned.imag))  # the land's axes
    gy, gx = np.gradient(v)
    axes = (gy - 1j * gx) / np.hypot(gx, gy)  # direction of constant v, that is along u, at each pixel
    parcel, cuts = cut(rng, u, v, max(4, round(area * rng.uniform(7, 15))))
    town = rng.random(parcel.max() + 1) < rng.uniform(0, 0.7)
    town[parcel[size // 2, size // 2]] = True
    land = open_land(rng, u, v, parcel, town)
    in_town = town[parcel]

    roads = [(float(rng.choice((4.5, 6, 8))), *c) for c in cuts[:rng.integers(2, 5)]]  # the first cuts are the longest
    to_road = np.min([np.where(inside, np.abs(s) - w, np.float32(size)) for w, inside, s, *_ in roads], 0)
    to_edge = np.min([np.where(inside, np.abs(s), np.float32(size)) for inside, s, *_ in cuts], 0)
    to_water = water(rng, land, u, to_road)

    wood = noise(rng, size, 70, 3)  # above 0 is woodland: not in town, on roads or in water
    wood -= np.quantile(wood[::4, ::4], rng.uniform(0.6, 0.95)) + in_town
    wood = np.minimum(wood, np.minimum(to_water, to_road - 5) / 5)
    hedge = (to_edge < 4) & (rng.random(len(town)) < 0.3)[parcel]
    density = np.where(wood > 0, 1, np.where(hedge, 0.8, np.where(in_town, 0.03, 0.004)))
    trees(rng, land, wood, density * (to_water > 4) * (to_road > 5))

    grit = 3 * noise(rng, size, 20, 3)[..., None]
    for w, inside, s, t, _ in roads:  # w is half the width
        dirt = w < 5  # the colour of soil, grass between the wheels; the widest have a dashed white line
        color = pick(rng, SOILS[1:4] if dirt else ASPHALTS)[0] + grit
        middle = np.where(inside & (dirt | (w > 7) & (t % 24 < 12)), np.abs(s) - 0.7, 1)
        paint(land, np.s_[:], np.where(inside, np.abs(s) - w, 1), color, ROAD)
        paint(land, np.s_[:], middle, pick(rng, GREENS)[0] if dirt else 200)

    # large buildings first while there is room, then houses from the roads outwards, so that they line up
    spots = np.argwhere(in_town & (to_road > 11))
    spots = spots[rng.permutation(len(spots))[:int(400 * area)]]
    along_roads = spots[np.argsort(to_road[tuple(spots.T)] // 12, kind="stable")]
    large = spots[:int(rng.integers(0, 60) * area)]  # most tries fail
    for k, (y, x) in enumerate((*large, *along_roads)):
        if land.ids[y, x] <= GRASS:
            long, wide = rng.uniform((20, 12), (34, 20)) if k < len(large) else rng.uniform((10, 7), (17, 10.5))
            house(rng, land, complex(x, y), axes[y, x] * 1j ** rng.integers(0, 4), long, wide)
    for w, inside, s, _, along_u in roads:
        lane = np.argwhere(inside & (np.abs(np.abs(s) - w / 2) < 1) & (land.ids == ROAD))
        for y, x in lane[rng.permutation(len(lane))[:rng.integers(1, 4)]]:
            car(rng, land, complex(x, y), axes[y, x] * (1 if along_u else 1j))
    return photograph(rng, land), land.ids


def is_made(root: Path, made_by: dict) -> bool:
    """Whether the folder holds this very data set; another content than this or nothing is an error."""
    if not root.exists() or root.is_dir() and not any(root.iterdir()):
        return False
    try:
        found = json.loads((root / "dataset.json").read_text())["made_by"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found != made_by:
        raise BadInput(f"{root}: wanted {made_by}, found {found or 'other files'}; name another folder")
    return True


def make(root: str | Path, seed: int = 0, scenes: tuple[int, int, int] = (96, 16, 24), size: int = 256) -> Path:
    """Make the data set in `root` unless it is there; it appears whole or not at all, however many start this."""
    root = Path(root)
    made_by = {"generator": "nanoRS demo", "version": VERSION, "seed": seed, "scenes": list(scenes), "size": size}
    if is_made(root, made_by):
        return root
    palette = b"".join(bytes.fromhex(color[1:]) for color in CLASSES.values())
    part = root.absolute().with_name(f".{root.name}-{uuid.uuid4().hex}.tmp")
    try:
        for number, (split, count) in enumerate(zip(("train", "val", "test"), scenes)):
            for kind in ("images", "masks"):
                (part / split / kind).mkdir(parents=True)
            for i in range(count):
                image, mask = (Image.fromarray(a) for a in scene(np.random.default_rng((seed, number, i)), size))
                mask.putpalette(palette)  # ids stay what they are, and any viewer shows them in colour
                image.save(part / split / "images" / f"scene_{i:03d}.png", compress_level=3)
                mask.save(part / split / "masks" / f"scene_{i:03d}.png")
        classes = [{"name": name, "id": i, "color": color} for i, (name, color) in enumerate(CLASSES.items())]
        info = {"name": "demo", "images": "*/images/*.png", "masks": "*/masks/*.png", "classes": classes, "ignore": [],
                "splits": {split: f"{split}/*" for split in ("train", "val", "test")}, "made_by": made_by}
        (part / "dataset.json").write_text(json.dumps(info, indent=1) + "\n")
        os.rename(part, root)
    except OSError:
        if not is_made(root, made_by):  # else another process was first, and rename refuses a filled folder
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return root
