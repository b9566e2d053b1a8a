"""Point labels: read, check and write them, draw them from masks, follow them through a crop.

    points = read_points("points.csv", files, names)    {image: (n, 3) int64 rows x, y, class id}
    points = simulate(files, labels, "class-balanced", 5, seed=0)
    mark(mask, points[name], *crop_window(H, W, size, scale, centre))

x is the column and y the row of a pixel, counted from 0 at the top left. A file of points is a CSV
with the columns image, x, y, class, or a GeoJSON of Point features [x, y] with the properties image
and class; pixel coordinates in both, and fractions belong to the pixel they lie in. Coordinates of
a map (a "crs", or columns such as lon and lat, or easting and northing, which are in the image's
own system) become pixels where the image's georeference is in the same system, else they are
refused. `image` is the name in the data set (path without suffix) or
what else data/files.py's Names takes for it; `class` is the class's name.
"""
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shlex
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from .common import (
    IGNORE, SHORT, BadInput, as_bytes, csv_text, nfc, number, read_json, read_text, write)
from .crops import nearest
from .datasets import SegDataset, match_pairs
from .files import Names, about_encoding
from .io import Labels, read_mask, read_valid, size_of
from .raster import open_raster
from .source import Source

Box = tuple[int, int, int, int]  # top, left, h, w
Points = dict[str, np.ndarray]  # {image: (n, 3) int64 rows x, y, class id}

# In the image but no point: nothing to learn from, unless a teacher is sure of it.
UNLABELLED = 254
PATTERNS = {
    "class-balanced": "n pixels of every class in the image",
    "random": "as many pixels as class-balanced takes, anywhere in the image",
    "one-per-instance": "a random pixel of n instances of every class",
    "clicked-centre": "the innermost pixel of the n largest instances of every class",
}
FEW = 5  # points per class and image that are drawn, unless told
COLUMNS = ("image", "x", "y", "class")
# How tables call the coordinates of a map.
EAST = ("lon", "lng", "long", "longitude", "easting")
NORTH = ("lat", "latitude", "northing")
METRES = ("easting", "northing")  # of the system in which the image itself lies
WGS84 = 4326  # EPSG's number of longitude and latitude
GEOJSON = (".geojson", ".json")


class System(NamedTuple):
    """The system of coordinates of a file of points, where they are a map's."""
    words: str  # how a message calls it
    epsg: int | None  # its code, None where the file does not give it
    columns: tuple[str, str] | None = None  # of a table: those of the coordinates
    own: bool = False  # that of the image itself


# ---- files

def read_points(path: str | Path, files: dict[str, tuple], names: list[str]) -> Points:
    """{image: points} of a .csv or .geojson; a row that cannot be used is an error that names it.

    files {name: (image, mask)} or {name: (image, mask, (top, left, h, w))} as data/datasets.py has
    them: a point counts from the corner of its box. `names`: the classes.
    """
    path = Path(path)
    known = Names(files)
    class_of = {nfc(name): c for c, name in enumerate(names)}
    # An image's header is read once, however many points it has.
    sizes = {}
    found = {}  # {name: {(x, y): class id}}
    rows, system = read_rows(path)
    if system is None and within_a_pixel(rows):
        columns = None if path.suffix.lower() in GEOJSON else ("x", "y")
        system = System("degrees, it seems: all points of an image lie within one pixel", WGS84,
                        columns)
    for row, image, x, y, label in rows:
        where = f"{path} {row}"
        name = known.find(image)
        if system:
            x, y = on_image(as_number(x, where), as_number(y, where), system, files.get(name), path)
        if name is None:
            like = next(iter(files))
            raise BadInput(f"{where}: {SHORT.repr(image)} is no image of the data set, or several; "
                           f"names look like {like!r}{about_encoding(image)}")
        c = class_of.get(nfc(label))
        if c is None:
            raise BadInput(f"{where}: unknown class {SHORT.repr(label)}; "
                           f"expected one of: {', '.join(names)}{about_encoding(label)}")
        if name not in sizes:
            # Of a broken image nothing is used: opening the data set has stopped at it, or left
            # it out.
            sizes[name] = None
            with contextlib.suppress(BadInput):
                sizes[name] = size_in(files[name])
        if sizes[name] is None:
            continue
        pixel = pixel_of(x, y, sizes[name], files[name], name, where)
        # The same point twice is one; a pixel has one class.
        marked = found.setdefault(name, {})
        earlier = marked.setdefault(pixel, c)
        if earlier != c:
            raise BadInput(f"{where}: the pixel {pixel} of {name} is {names[earlier]!r} in an "
                           f"earlier row and {label!r} here; leave one of them")
    if not found:
        raise BadInput(f"{path}: no points; expected rows of image, x, y, class")
    points = {}
    for name, marked in found.items():
        rows = [(x, y, c) for (x, y), c in marked.items()]
        points[name] = np.array(rows, np.int64)
    return points


def on_image(x: float, y: float, system: System, file: tuple | None,
             path: Path) -> tuple[float, float]:
    """Coordinates of a map -> column and row of an image, or of its box, by its georeference.

    An image without one, or with one in another system, is a BadInput.
    """
    image, _, *box = file or ("the image", None)
    place = georef_of(image) if file else None
    same = system.own or system.epsg is not None and place and place.epsg == system.epsg
    if place is None or not same:
        lies = "has no georeference"
        advice = "expected pixels: x, the column, and y, the row, from 0 at the top left"
        if place is not None:
            lies = f"lies in EPSG:{place.epsg}" if place.epsg else "does not name its system"
        if place is not None and place.epsg:
            advice += f", or convert them: {conversion(system, place.epsg, path)}"
        raise BadInput(f"{path}: coordinates in {system.words}, but {image} {lies}; {advice}")
    # The inverse of x = a column + b row + c, y = d column + e row + f.
    a, b, c, d, e, f = place.transform
    x, y = x - c, y - f
    area = a * e - b * d
    column, row = (e * x - b * y) / area, (a * y - d * x) / area
    top, left = box[0][:2] if box else (0, 0)
    return column - left, row - top


def conversion(system: System, epsg: int, path: Path) -> str:
    """The command that writes the points as a GeoJSON in the system of the images."""
    words = ["ogr2ogr"]
    if system.columns:  # a table does not say which system it is in, nor where
        east, north = system.columns
        words += ["-s_srs", f"EPSG:{system.epsg}", "-oo", f"X_POSSIBLE_NAMES={east}",
                  "-oo", f"Y_POSSIBLE_NAMES={north}"]
    new = path.with_name(f"{path.stem}_{epsg}.geojson")
    words += ["-t_srs", f"EPSG:{epsg}", "-lco", "RFC7946=NO", str(new), str(path)]
    return shlex.join(words)


@lru_cache(64)
def georef_of(image: Path):
    """Where an image lies, read once for all of its points."""
    return open_raster(image).georef


def epsg_of(system: str) -> int | None:
    """The number in the name of a system of coordinates; None where it names none."""
    if "CRS84" in system:
        return WGS84
    code = re.search(r"EPSG\D+(\d{1,9})(?!\d)", system)
    return int(code[1]) if code else None


def size_in(file: tuple) -> tuple[int, int]:
    """(H, W) of an image or of the box of it that counts."""
    image, _, *box = file
    if box:
        _, _, h, w = box[0]
        return h, w
    return size_of(image)


def pixel_of(x, y, size: tuple[int, int], file: tuple, name: str, where: str) -> tuple[int, int]:
    """(x, y) of the pixel in which two coordinates of a file lie."""
    x = as_number(x, where)
    y = as_number(y, where)
    if inside_size(x, y, size):
        return int(x), int(y)
    hint = ""
    if inside_size(y, x, size):
        hint = "; are x and y exchanged?"
    elif georef_of(file[0]):
        # Perhaps they are a map's, and nothing in the file says so.
        place = on_image(x, y, System("", None, own=True), file, Path(where))
        if inside_size(*place, size):
            epsg = georef_of(file[0]).epsg or "CODE"
            hint = ("; it lies in it as coordinates of its own map: call the columns easting and "
                    f'northing, or give the GeoJSON its "crs": {{"type": "name", "properties": '
                    f'{{"name": "EPSG:{epsg}"}}}}')
    H, W = size
    raise BadInput(f"{where}: x {x:g}, y {y:g} is outside {name} of {W} x {H} (W x H); "
                   f"expected pixels from 0 at the top left{hint}")


def inside_size(x: float, y: float, size: tuple[int, int]) -> bool:
    """Is the point in an image of the size (H, W)? NaN is not."""
    return 0 <= x < size[1] and 0 <= y < size[0]


def as_number(value, where: str) -> float:
    """A coordinate as it stands in a CSV (text) or in JSON; `where` it stands begins the BadInput."""
    try:
        if isinstance(value, str):
            return number(value)
        if type(value) in (int, float):  # not isinstance: True is an int, too
            return float(value)
        raise ValueError
    except (ValueError, OverflowError):
        hint = ", with a decimal point" if "," in str(value) else ""
        raise BadInput(f"{where}: {SHORT.repr(value)} is no number; "
                       f"expected x and y in pixels{hint}") from None


def within_a_pixel(rows: list[tuple]) -> bool:
    """Do all points of an image lie within one pixel, three or more in the file? No clicks do."""
    places = defaultdict(set)
    for _, image, x, y, _ in rows:
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            places[image].add((float(x), float(y)))
    every = set().union(*places.values())
    several = [found for found in places.values() if len(found) > 1]
    # Where no image has several points, those of all images are compared.
    for found in several or [every]:
        if found and max(np.ptp(list(found), axis=0)) >= 1:
            return False
    return len(every) >= 3


def read_rows(path: Path) -> tuple[list[tuple], System | None]:
    """Rows (what errors call it, image, x, y, class) of a file of points, x and y as they stand.

    And the system of coordinates that the file names; None for pixels.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file; expected a .csv or .geojson of points, or one of "
                       f"{', '.join(PATTERNS)}")
    if path.suffix.lower() in GEOJSON:
        return read_features(path)
    return read_table(path)


def read_features(path: Path) -> tuple[list[tuple], System | None]:
    """The rows of a GeoJSON, and its "crs", which GIS programs write."""
    found = read_json(path, dict, "of a FeatureCollection")
    features = found.get("features")
    system = found.get("crs")
    if isinstance(system, dict) and isinstance(system.get("properties"), dict):
        system = system["properties"].get("name", "another system")
    if system is not None:
        system = System(f'{str(system)[:60]}, as "crs" says', epsg_of(str(system)))
    if not isinstance(features, list):
        raise BadInput(f"{path}: no GeoJSON FeatureCollection; expected Point features")
    rows = []
    for i, feature in enumerate(features, 1):
        try:
            geometry = feature["geometry"]
            at = geometry["coordinates"]
            x, y, *_ = at
            image = str(feature["properties"]["image"])
            label = str(feature["properties"]["class"])
            # A text can be unpacked, too, but is no list of coordinates.
            is_point = geometry["type"] == "Point" and isinstance(at, list)
        except (LookupError, TypeError, ValueError):
            is_point = False
        if not is_point:
            raise BadInput(f"{path} feature {i}: expected a Point [x, y] with the properties image "
                           "and class")
        rows.append((f"feature {i}", image, x, y, label))
    return rows, system


def read_table(path: Path) -> tuple[list[tuple], System | None]:
    """The rows of a CSV, whose delimiter is what its header has most of; its columns of a map."""
    text = read_text(path, "surrogateescape")
    # Spreadsheets write commas, semicolons or tabs, by language.
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    lines = io.StringIO(text, newline=None)
    table = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True)
    rows = []
    try:
        there = table.fieldnames or []
        twice = [column for column in COLUMNS if there.count(column) > 1]
        if twice:
            raise BadInput(f"{path} line 1: the column {twice[0]!r} stands twice; take one out")
        columns, system = columns_of(path, there)
        for row in table:
            if None in row:  # where csv puts what lies behind the last column
                raise BadInput(f"{path} line {table.line_num}: more fields than the header has; put "
                               "a name that holds the delimiter in double quotes")
            image, x, y, label = (row[column] for column in columns)
            rows.append((f"line {table.line_num}", str(image), x, y, str(label)))
    except csv.Error as e:
        # A field is longer than csv allows: mostly it runs to the end of the file.
        line = table.line_num + 1
        raise BadInput(f"{path} line {line}: {e}; is a quote left open?") from None
    return rows, system


def columns_of(path: Path, there: list[str]) -> tuple[list[str], System | None]:
    """The columns of a table with image, x, y and class; the system if x and y are a map's."""
    # Spreadsheets are given capital letters, and blanks before a comma.
    small = {str(column).strip().lower(): column for column in there}
    columns, system = list(COLUMNS), None
    east = [word for word in EAST if word in small]
    north = [word for word in NORTH if word in small]
    if east and north and not {"x", "y"} <= set(small):
        columns[1:3] = east[0], north[0]
        pair = small[east[0]].strip(), small[north[0]].strip()
        own = tuple(columns[1:3]) == METRES
        system = System(f"the columns {', '.join(pair)}", None if own else WGS84, pair, own)
    for column in columns:
        if column not in small:
            shown = SHORT.repr(", ".join(there)) if there else "an empty file"
            raise BadInput(f"{path} line 1: no column {column!r} in {shown}; "
                           "expected a header with image,x,y,class")
    return [small[column] for column in columns], system


def write_points(path: str | Path, points: Points, names: list[str]) -> None:
    """The file that read_points reads, .csv or .geojson."""
    rows = []
    for image, drawn in points.items():
        rows += [(image, int(x), int(y), names[c]) for x, y, c in drawn]
    if Path(path).suffix.lower() not in GEOJSON:
        write(path, csv_text([COLUMNS, *rows]))
        return
    features = []
    for image, x, y, label in rows:
        geometry = {"type": "Point", "coordinates": [x, y]}
        properties = {"image": image, "class": label}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    # On one line: write() would indent every coordinate.
    text = json.dumps({"type": "FeatureCollection", "features": features})
    write(path, text + "\n")


# ---- simulation

def simulate(files: dict[str, tuple], labels: Labels, pattern: str, n: int | None, seed: int,
             instances: dict[str, Path] = {}, **reading) -> Points:
    """{image: points} drawn from masks, see PATTERNS.

    An image's points are a function of seed, name and mask. files: as for read_points. instances
    {name: mask of instance numbers or colours, 0 = none}; without them, and where they are 0, an
    instance is a connected region of one class. Transparent pixels, as read_valid(**reading) has
    them, get none.
    """
    # Keep the last masks: the tiles of a file follow each other.
    load = lru_cache(8)(labels.load)

    def draw_from(name):
        image, mask, *box = files[name]
        ids = load(mask)
        valid = read_valid(image, **reading)[1]
        if valid is not None:
            ids = np.where(valid, ids, IGNORE)
        numbers = None
        if name in instances:
            numbers = read_instances(instances[name])
            if numbers.shape != ids.shape:
                raise BadInput(f"{instances[name]}: {numbers.shape} for a mask of "
                               f"{ids.shape} (H x W)")
        # A tile of a larger file has its own points, counted from its corner.
        if box:
            top, left, h, w = box[0]
            tile = np.s_[top:top + h, left:left + w]
            ids = ids[tile]
            numbers = None if numbers is None else numbers[tile]
        return draw(ids, pattern, n, seed, name, numbers)

    # Pillow decodes without holding the GIL.
    with ThreadPoolExecutor(min(4, os.cpu_count())) as pool:
        return dict(zip(files, pool.map(draw_from, files)))


def draw(mask: np.ndarray, pattern: str, n: int | None, seed: int, name: str,
         instances: np.ndarray | None = None) -> np.ndarray:
    """Points of one mask (H, W) uint8 with IGNORE; those for n are among those for n + 1.

    A class with fewer than n pixels or instances gives what it has; so does every class where n is
    None.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern {pattern!r}; expected one of {', '.join(PATTERNS)}")
    classes = [c for c in np.unique(mask).tolist() if c != IGNORE]
    if not classes:
        return np.zeros((0, 3), np.int64)
    # Python's own hash() differs from run to run.
    digest = hashlib.sha256(as_bytes(name)).digest()
    key = int.from_bytes(digest[:8], "big")

    # The 5 keeps these draws apart from all others of the same seed. Each class has its own: its
    # points do not depend on other classes.
    def stream(c):
        return np.random.default_rng((5, seed, key, c))

    # Pixels are flat numbers here: y * W + x.
    flat = mask.ravel()
    if pattern == "random":
        total = None if n is None else n * len(classes)
        chosen = [sample(np.flatnonzero(flat != IGNORE), total, stream(IGNORE))]
    elif pattern == "class-balanced":
        chosen = [sample(np.flatnonzero(flat == c), n, stream(c)) for c in classes]
    elif pattern == "one-per-instance":
        regions = Regions(mask, instances)
        chosen = [regions.any_pixels(c, n, stream(c)) for c in classes]
    else:
        regions = Regions(mask, instances)
        depth = to_edge(regions.parts)
        chosen = [regions.centres(c, n, depth) for c in classes]
    at = np.concatenate(chosen).astype(np.int64)
    y, x = np.divmod(at, mask.shape[1])
    return np.stack([x, y, flat[at]], axis=1).astype(np.int64)


def sample(items: np.ndarray, n: int | None, rng: Generator) -> np.ndarray:
    """n of the items without repeats, those of a smaller n first; all of them without an n."""
    if n is None or n >= len(items):
        return items
    # The first n swaps of a shuffle: a permutation of all pixels of a large tile costs a second.
    moved = {}
    out = []
    for i, j in enumerate(rng.integers(np.arange(n), len(items)).tolist()):
        out.append(items[moved.get(j, j)])
        moved[j] = moved.get(i, i)
    return np.array(out)


class Regions:
    """The instances of a mask (H, W). A pixel is its flat number, y * W + x."""

    def __init__(self, mask: np.ndarray, instances: np.ndarray | None):
        self.parts = components(mask, instances)
        parts = self.parts.ravel()
        # The pixels of part p are order[start[p]:start[p + 1]].
        self.order = np.argsort(parts, kind="stable")
        self.start = np.concatenate([[0], np.bincount(parts).cumsum()])
        self.ids = mask.ravel()[self.order[self.start[:-1]]]

    def any_pixels(self, c: int, n: int | None, rng: Generator) -> list:
        """A random pixel of each of n random instances of class c."""
        # Of a permutation, so that those for n are among those for n + 1.
        picked = rng.permutation(np.flatnonzero(self.ids == c))
        out = []
        for p in picked[:n]:
            at = rng.integers(self.start[p], self.start[p + 1])
            out.append(self.order[at])
        return out

    def centres(self, c: int, n: int | None, depth: np.ndarray) -> list:
        """The innermost pixel of each of the n largest instances of class c; depth from to_edge."""
        picked = np.flatnonzero(self.ids == c)
        size = self.start[picked + 1] - self.start[picked]
        picked = picked[np.argsort(-size, kind="stable")]
        out = []
        for p in picked[:n]:
            part = self.order[self.start[p]:self.start[p + 1]]
            out.append(innermost(part, depth))
        return out


def innermost(part: np.ndarray, depth: np.ndarray) -> int:
    """Of the pixels farthest from their region's edge, the one nearest to its centre of mass."""
    y, x = np.divmod(part, depth.shape[1])
    # The last key of lexsort counts first: depth, then nearness.
    dy = y - y.mean()
    dx = x - x.mean()
    off = dy ** 2 + dx ** 2
    best = np.lexsort((off, -depth.ravel()[part]))
    return part[best[0]]


def components(ids: np.ndarray, instances: np.ndarray | None = None) -> np.ndarray:
    """(H, W) int64 numbers from 0 of the regions of equal id that touch by pixel edges.

    Where `instances` (H, W) is not 0, all pixels of one (id, instance) are one region, touching or
    not.
    """
    # Equal keys belong together: the id, and where there is one the instance.
    key = ids.astype(np.int64)
    if instances is not None:
        given = instances != 0
        number = np.unique(instances, return_inverse=True)[1].reshape(ids.shape)
        key = key + 256 * number * given

    # Number the runs of equal pixels in the rows.
    first = np.ones(key.shape, bool)
    first[:, 1:] = key[:, 1:] != key[:, :-1]
    run = first.cumsum().reshape(key.shape) - 1

    # Runs a and b of one region, one above the other.
    touch = key[1:] == key[:-1]
    above = run[:-1][touch]
    below = run[1:][touch]
    a, b = once(above, below)
    if instances is not None:
        # Tie the first run of an instance to all its others.
        _, leader, member = np.unique(key[first], return_index=True, return_inverse=True)
        tied = np.flatnonzero(given[first])
        a = np.concatenate([a, leader[member[tied]]])
        b = np.concatenate([b, tied])
    root = smallest_of_each(first.sum(), a, b)
    return np.unique(root, return_inverse=True)[1][run]


def once(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs without the repeats that follow each other: two runs meet once a pixel of contact."""
    new = np.ones(len(a), bool)
    other_a = a[1:] != a[:-1]
    other_b = b[1:] != b[:-1]
    new[1:] = other_a | other_b
    return a[new], b[new]


def smallest_of_each(n: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) for every item the smallest one of its group; pairs a, b of items make the groups."""
    # Every item points to a smaller one of its group or to itself, in the end to the smallest.
    root = np.arange(n)
    while (root[a] != root[b]).any():
        low = np.minimum(root[a], root[b])
        np.minimum.at(root, root[a], low)
        np.minimum.at(root, root[b], low)
        # Follow the pointers to their ends.
        while (root[root] != root).any():
            root = root[root]
    return root


def to_edge(parts: np.ndarray) -> np.ndarray:
    """(H, W) city-block distance of a pixel to the edge of its region or image; edges have 0."""
    H, W = parts.shape
    # Farther than any pixel can be.
    d = np.full((H, W), H + W)
    framed = np.pad(parts, 1, constant_values=-1)
    for top, left in ((0, 1), (2, 1), (1, 0), (1, 2)):
        neighbour = framed[top:top + H, left:left + W]
        d[neighbour != parts] = 0
    # |y - y'| + |x - x'| is least axis by axis: from the top or left, then from the other side.
    for axis, i in enumerate((np.arange(H)[:, None], np.arange(W))):
        ahead = np.minimum.accumulate(d - i, axis) + i
        back = np.minimum.accumulate(np.flip(d + i, axis), axis)
        d = np.minimum(ahead, np.flip(back, axis) - i)
    return d


def read_instances(path: str | Path) -> np.ndarray:
    """(H, W) int64 instance numbers; the colours of an RGB mask become numbers, black is 0."""
    values = read_mask(path).astype(np.int64)
    if values.ndim == 2:
        return values
    return values @ np.array([1 << 16, 1 << 8, 1])


# ---- on the way to the network

def inside(points: np.ndarray, part: Box) -> np.ndarray:
    """The points within `part` (top, left, h, w)."""
    top, left, h, w = part
    x, y = points.T[:2]
    in_columns = (x >= left) & (x < left + w)
    in_rows = (y >= top) & (y < top + h)
    return points[in_columns & in_rows]


def mark(mask: np.ndarray, points: np.ndarray, part: Box, size: tuple[int, int]) -> None:
    """Write into a crop's mask, in place, the points inside `part`, scaled to `size` (h, w).

    A point stays one pixel at any scale, which resizing a mask cannot promise. Where two share a
    pixel the one nearer to its middle is kept, as nearest-neighbour resizing does.
    """
    top, left, h, w = part
    out_h, out_w = size
    points = inside(points, part)
    # The middle of a point's pixel, in pixels of the crop.
    u = (points[:, 0] - left + 0.5) * (out_w / w)
    v = (points[:, 1] - top + 0.5) * (out_h / h)
    column = np.minimum(u.astype(int), out_w - 1)
    row = np.minimum(v.astype(int), out_h - 1)
    # Of equal indices numpy keeps the last: first the far ones, then those that a resized mask has.
    du = u - column - 0.5
    dv = v - row - 0.5
    kept_column = nearest(out_w, w)[column] == points[:, 0] - left
    kept_row = nearest(out_h, h)[row] == points[:, 1] - top
    order = np.lexsort((-(du ** 2 + dv ** 2), kept_column & kept_row))
    mask[row[order], column[order]] = points[order, 2]


# ---- as a data set

class PointSet(SegDataset):
    """A SegDataset that opens no mask: labels are points {name: (n, 3) x, y, class}, all else is UNLABELLED.

    augment(image, mask, rng, points) -> image, mask; the mask comes in without the points.
    """

    def __init__(self, files: dict[str, tuple], points: dict[str, np.ndarray], *args, **kw):
        images = {name: (image, image, *box) for name, (image, _, *box) in files.items()}
        super().__init__(images, *args, **kw)
        none = np.zeros((0, 3), np.int64)
        self.points = [points.get(name, none) for name in self.names]
        self.tag = f"{self.tag} points"

    def decode(self, image_path: Path, _) -> tuple[np.ndarray, np.ndarray]:
        """The image, and a mask of UNLABELLED, with IGNORE where the image is no data."""
        image, valid = read_valid(image_path, self.bands, self.input_range)
        mask = np.full(image.shape[:2], UNLABELLED, np.uint8)
        if valid is not None:
            mask[~valid] = IGNORE
        return image, mask

    def sample(self, i: int, draw: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, 3) uint8 image, (H, W) uint8 labels of a draw."""
        image, mask = self.read_lazily(i)
        return self.augment(image, mask, self.rng(draw), self.points[i])


def open_points(d: Source, wanted: str, few: int | None, seed: int) -> tuple[Points, str]:
    """Point labels from a file, or drawn by a name of PATTERNS, and a line that says which.

    few: points per class and image; None: FEW, or all instances.
    """
    if wanted not in PATTERNS:
        given = read_points(wanted, d.pairs, d.names)
        return given, f"{wanted}, {sum(map(len, given.values()))} in all"

    instances = {}
    if "instances" in d.description:  # a pattern beside "masks": which pixels are one object
        pairs, _ = match_pairs(d.root, d.description | {"masks": d.description["instances"]})
        instances = {name: file for name, (_, file) in pairs.items() if file}
    if few is None and wanted in ("class-balanced", "random"):
        few = FEW
    given = simulate(d.files("train"), d.labels, wanted, few, seed, instances, **d.reading)
    return given, f"drawn from the masks: {PATTERNS[wanted]}, n = {few or 'all'}"


def open_split(d: Source, split: str, norm: str, given: Points) -> SegDataset:
    """What a split is scored on: full masks, or its points where no image of it has a mask."""
    files = d.files(split)
    bare = [name for name, (_, mask, *_) in files.items() if mask is None]
    if not bare:
        return d.part(split, norm)
    marked = {name: file for name, file in files.items() if name in given}
    if len(bare) < len(files) or not marked:
        what = f"{len(bare)} of {len(files)} without a mask"
        if not marked:
            what = "without a mask, and no point in that split"
        raise BadInput(f"{files[bare[0]][0]}: in {split}, {what}; add them, or take it out of the "
                       "splits")
    return PointSet(marked, given, d.labels, norm, at_points, **d.cache, **d.reading)


def at_points(image: np.ndarray, mask: np.ndarray, rng: Generator, ps: np.ndarray) -> tuple:
    """The whole image, to be scored where it has points."""
    mask = np.full(mask.shape, IGNORE, np.uint8)
    mask[ps[:, 1], ps[:, 0]] = ps[:, 2]
    return image, mask
