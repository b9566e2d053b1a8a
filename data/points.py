"""Point labels: read, check and write them, simulate them from masks, follow them through a scaled crop.

The points of an image are an (n, 3) int64 array of rows x, y, class id; x is the column and y the row of a pixel,
counted from 0 at the top left. A file of points is a CSV with the columns image, x, y, class, or a GeoJSON of Point
features [x, y] with the properties image and class; pixel coordinates in both, fractions belong to the pixel they lie
in. `image` is the name in the data set (path without suffix), with or without suffix, or the bare file name where only
one image has it; `class` is the class's name.
"""
import csv
import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from .common import IGNORE, BadInput, write
from .datasets import SegDataset, normalise
from .io import Labels, by_stem, open_image, pixels, read_valid

UNLABELLED = 254  # in the image but no point: nothing to learn from, unless a teacher is sure of it
PATTERNS = {
    "class-balanced": "n pixels of every class in the image",
    "random": "as many pixels as class-balanced takes, anywhere in the image",
    "one-per-instance": "a random pixel of n instances of every class",
    "clicked-centre": "the innermost pixel of the n largest instances of every class",
}


# ---- files

def read_points(path: str | Path, files: dict[str, tuple], names: list[str]) -> dict[str, np.ndarray]:
    """{image: points} of a .csv or .geojson; a row that cannot be used is an error that names it.

    files {name: (image, mask)} or {name: (image, mask, (top, left, h, w))} as data/datasets.py has them: a point counts
    from the corner of its box. `names`: the classes.
    """
    known, sizes, found = by_stem(files), {}, {}
    for row, image, x, y, label in read_rows(Path(path)):
        def bad(what):
            return BadInput(f"{path} {row}: {what}")

        name = known.get(image) or known.get(os.path.splitext(image)[0])
        if name is None:
            raise bad(f"{image!r} is no image of the data set, or several; names look like {next(iter(files))!r}")
        if label not in names:
            raise bad(f"unknown class {label!r}; expected one of: {', '.join(names)}")
        if name not in sizes:
            file, _, *box = files[name]
            sizes[name] = box[0][2:] if box else open_image(file, deep=True).size[::-1]
        (H, W), at = sizes[name], []
        for value in (x, y):
            try:
                at.append(float(value))
            except (TypeError, ValueError):
                raise bad(f"{value!r} is no number; expected x and y in pixels") from None
        x, y = at
        if not (0 <= x < W and 0 <= y < H):
            hint = "; are x and y exchanged?" if 0 <= y < W and 0 <= x < H else ""
            raise bad(f"x {x:g}, y {y:g} is outside {name} of {W} x {H} (W x H); expected pixels from 0 at the top "
                      f"left{hint}")
        pixel, c = (int(x), int(y)), names.index(label)
        if found.setdefault(name, {}).setdefault(pixel, c) != c:
            raise bad(f"the pixel {pixel} of {name} is {names[found[name][pixel]]!r} in an earlier row and {label!r} "
                      "here; leave one of them")
    if not found:
        raise BadInput(f"{path}: no points; expected rows of image, x, y, class")
    return {name: np.array([(*at, c) for at, c in rows.items()], np.int64) for name, rows in found.items()}


def read_rows(path: Path) -> list[tuple]:  # -> (what an error calls the row, image, x, y, class)
    try:
        text = path.read_bytes().decode("utf-8-sig")  # Excel begins its CSV with a byte order mark
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}; expected a .csv or .geojson of points") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not UTF-8 text; expected a .csv or .geojson of points") from None
    if path.suffix.lower() in (".geojson", ".json"):
        try:
            features, rows = json.loads(text)["features"], []
            assert isinstance(features, list)
        except (ValueError, LookupError, TypeError, AssertionError):
            raise BadInput(f"{path}: no GeoJSON FeatureCollection; expected Point features") from None
        for i, feature in enumerate(features, 1):
            try:
                properties, (x, y, *_) = feature["properties"], feature["geometry"]["coordinates"]
                rows.append((f"feature {i}", str(properties["image"]), x, y, str(properties["class"])))
                assert feature["geometry"]["type"] == "Point" and isinstance(feature["geometry"]["coordinates"], list)
            except (LookupError, TypeError, ValueError, AssertionError):
                raise BadInput(f"{path} feature {i}: expected a Point [x, y] with the properties image and "
                               "class") from None
        return rows
    delimiter = max(",;\t", key=text.split("\n", 1)[0].count)
    table = csv.DictReader(io.StringIO(text, newline=None), delimiter=delimiter, skipinitialspace=True)
    try:
        rows = [(f"line {table.line_num}", *(r.get(c) for c in ("image", "x", "y", "class"))) for r in table]
    except csv.Error as e:
        raise BadInput(f"{path} line {table.line_num + 1}: {e}; is a quote left open?") from None
    absent = [c for c in ("image", "x", "y", "class") if c not in (table.fieldnames or ())]
    if absent:
        raise BadInput(f"{path} line 1: no column {absent[0]!r} in {', '.join(table.fieldnames or ['an empty file'])}; "
                       "expected a header with image,x,y,class")
    return [(line, str(image), x, y, str(label)) for line, image, x, y, label in rows]


def write_points(path: str | Path, points: dict[str, np.ndarray], names: list[str]) -> None:
    """The file that read_points reads, .csv or .geojson."""
    rows = [(image, int(x), int(y), names[c]) for image, ps in points.items() for x, y, c in ps]
    if Path(path).suffix.lower() in (".geojson", ".json"):
        features = [{"type": "Feature", "geometry": {"type": "Point", "coordinates": [x, y]},
                     "properties": {"image": image, "class": label}} for image, x, y, label in rows]
        write(path, json.dumps({"type": "FeatureCollection", "features": features}) + "\n")
        return
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("image", "x", "y", "class"), *rows])
    write(path, text.getvalue())


# ---- simulation

def simulate(files: dict[str, tuple], labels: Labels, pattern: str, n: int | None, seed: int,
             instances: dict[str, Path] = {}, **reading) -> dict[str, np.ndarray]:
    """{image: points} drawn from masks, see PATTERNS; each image's own are a function of (seed, name, mask).

    files: as for read_points. instances {name: mask of instance numbers or colours, 0 = none}; else, and where that is
    0, an instance is a connected region of one class. Transparent pixels, as read_valid(**reading) has them, get none.
    """
    load = lru_cache(8)(labels.load)  # the tiles of a file follow each other

    def one(name):
        image, mask, *box = files[name]
        ids, parts = load(mask), None
        if open_image(image, deep=True).mode in ("RGBA", "LA"):
            valid = read_valid(image, **reading)[1]
            ids = ids if valid is None else np.where(valid, ids, IGNORE)
        if name in instances:
            parts = read_instances(instances[name])
            if parts.shape != ids.shape:
                raise BadInput(f"{instances[name]}: {parts.shape} for a mask of {ids.shape} (H x W)")
        top, left, h, w = box[0] if box else (0, 0, *ids.shape)
        cut = np.s_[top:top + h, left:left + w]
        return draw(ids[cut], pattern, n, seed, name, None if parts is None else parts[cut])

    with ThreadPoolExecutor(min(4, os.cpu_count())) as pool:  # Pillow decodes without holding the GIL
        return dict(zip(files, pool.map(one, files)))


def draw(mask: np.ndarray, pattern: str, n: int | None, seed: int, name: str,
         instances: np.ndarray | None = None) -> np.ndarray:
    """Points of one mask (H, W) uint8 with IGNORE; those for n are among those for n + 1.

    A class with fewer than n pixels or instances gives what it has, and so does every class where n is None.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern {pattern!r}; expected one of {', '.join(PATTERNS)}")
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    classes, chosen, flat = [c for c in np.unique(mask).tolist() if c != IGNORE], [], mask.ravel()
    by_instance = pattern in ("one-per-instance", "clicked-centre")
    if by_instance and classes:
        parts = components(mask, instances).ravel()
        order = np.argsort(parts, kind="stable")  # the pixels of part p: order[start[p]:start[p + 1]]
        start = np.concatenate([[0], np.bincount(parts).cumsum()])
        of_class = flat[order[start[:-1]]]
        depth = to_edge(parts.reshape(mask.shape)).ravel() if pattern == "clicked-centre" else None
    for c in classes if pattern != "random" else [IGNORE] * bool(classes):
        rng = np.random.default_rng((5, seed, key, c))  # 5: a stream of its own; a class's points know no other class
        if pattern == "random":
            chosen.append(some(np.flatnonzero(flat != IGNORE), n and n * len(classes), rng))
        elif pattern == "class-balanced":
            chosen.append(some(np.flatnonzero(flat == c), n, rng))
        elif pattern == "one-per-instance":
            picked = rng.permutation(np.flatnonzero(of_class == c))[:n]
            chosen.append([order[rng.integers(start[p], start[p + 1])] for p in picked])
        else:
            picked = np.flatnonzero(of_class == c)
            picked = picked[np.argsort(start[picked] - start[picked + 1], kind="stable")][:n]
            chosen.append([innermost(order[start[p]:start[p + 1]], depth, mask.shape[1]) for p in picked])
    at = np.concatenate(chosen).astype(np.int64) if chosen else np.zeros(0, np.int64)
    y, x = np.divmod(at, mask.shape[1])
    return np.stack([x, y, flat[at]], axis=1).astype(np.int64)


def some(items: np.ndarray, n: int | None, rng: np.random.Generator) -> np.ndarray:
    """n of the items without repeats, those of a smaller n first; all where n is None or too large."""
    if n is None or n >= len(items):
        return items
    moved, out = {}, []  # the first n swaps of a shuffle: a permutation of all pixels of a large tile costs a second
    for i, j in enumerate(rng.integers(np.arange(n), len(items)).tolist()):
        out.append(items[moved.get(j, j)])
        moved[j] = moved.get(i, i)
    return np.array(out)


def innermost(part: np.ndarray, depth: np.ndarray, W: int) -> int:
    """Of the pixels (flat numbers) farthest from their region's edge, the one nearest to its centre of mass."""
    y, x = np.divmod(part, W)
    off = (y - y.mean()) ** 2 + (x - x.mean()) ** 2
    return part[np.lexsort((off, -depth[part]))[0]]


def components(ids: np.ndarray, instances: np.ndarray | None = None) -> np.ndarray:
    """(H, W) int64 numbers from 0 of the regions of equal id that touch by pixel edges.

    Where `instances` (H, W) is not 0, all pixels of one (id, instance) are one region, touching or not.
    """
    key = ids.astype(np.int64)
    if instances is not None:
        key = key + 256 * np.unique(instances, return_inverse=True)[1].reshape(ids.shape) * (instances != 0)
    first = np.ones(key.shape, bool)  # of a run of equal pixels in a row
    first[:, 1:] = key[:, 1:] != key[:, :-1]
    run = first.cumsum().reshape(key.shape) - 1
    touch = key[1:] == key[:-1]
    a, b = run[:-1][touch], run[1:][touch]  # runs that meet, once per pixel of contact
    once = np.ones(len(a), bool)
    once[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    a, b = a[once], b[once]
    if instances is not None:  # ties the first run of an instance to all others
        of_run, given = key[first], (instances != 0)[first]
        _, leader, member = np.unique(of_run, return_index=True, return_inverse=True)
        runs = np.flatnonzero(given)
        a, b = np.concatenate([a, leader[member[runs]]]), np.concatenate([b, runs])
    root = np.arange(first.sum())  # every run points to the smallest known run of its region
    while (root[a] != root[b]).any():
        low = np.minimum(root[a], root[b])
        np.minimum.at(root, root[a], low), np.minimum.at(root, root[b], low)
        while (root[root] != root).any():
            root = root[root]
    return np.unique(root, return_inverse=True)[1][run]


def to_edge(parts: np.ndarray) -> np.ndarray:
    """(H, W) city-block distance of a pixel to the nearest one at its region's or the image's edge, which has 0."""
    framed = np.pad(parts, 1, constant_values=-1)
    inner, d = framed[1:-1, 1:-1], np.full(parts.shape, sum(parts.shape))
    for near in (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:]):
        d[near != inner] = 0
    for axis, n in enumerate(parts.shape):  # |y - y'| + |x - x'| is least axis by axis
        i = np.arange(n).reshape((-1, 1) if axis == 0 else (1, -1))
        down = np.minimum.accumulate(d - i, axis) + i
        d = np.minimum(down, np.flip(np.minimum.accumulate(np.flip(d + i, axis), axis), axis) - i)
    return d


def read_instances(path: str | Path) -> np.ndarray:
    """(H, W) int64 instance numbers; the colours of an RGB mask become one number each, black is 0."""
    a = pixels(open_image(path), path).astype(np.int64)
    return a if a.ndim == 2 else a[..., :3] @ np.array([1 << 16, 1 << 8, 1])


# ---- on the way to the network

def inside(points: np.ndarray, part: tuple[int, int, int, int]) -> np.ndarray:
    """The points within `part` (top, left, h, w)."""
    (x, y), (top, left, h, w) = points.T[:2], part
    return points[(x >= left) & (x < left + w) & (y >= top) & (y < top + h)]


def paint(mask: np.ndarray, points: np.ndarray, part: tuple[int, int, int, int], size: tuple[int, int]) -> None:
    """Write into a crop's mask, in place, the points inside `part` (top, left, h, w), scaled to `size` (h, w).

    A point stays one pixel at any scale, which resizing a mask cannot promise. Where two share a pixel the one nearer
    to its middle is kept, as nearest-neighbour resizing does.
    """
    (top, left, h, w), ps = part, inside(points, part)
    u, v = (ps[:, 0] - left + 0.5) * (size[1] / w), (ps[:, 1] - top + 0.5) * (size[0] / h)
    col, row = np.minimum(u.astype(int), size[1] - 1), np.minimum(v.astype(int), size[0] - 1)
    order = np.argsort(-((u - col - 0.5) ** 2 + (v - row - 0.5) ** 2), kind="stable")
    mask[row[order], col[order]] = ps[order, 2]  # numpy keeps the last of equal indices


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

    def __getitem__(self, key):
        i, draw = key if isinstance(key, tuple) else (key, 0)
        image, mask = self.read(i)
        rng = np.random.default_rng((2, self.seed, draw))  # as SegDataset draws
        image, mask = self.augment(image, mask, rng, self.points[i])
        y = torch.from_numpy(mask.astype(np.int64))
        return normalise(image, self.norm), y, self.names[i]
