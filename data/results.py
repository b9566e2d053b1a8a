"""The files that predict.py leaves: masks and maps of any size, what is finished, areas, a style.

    check_outputs(written, images, ends_of, values)   before any work: what may not be overwritten
    writers = open_writers(scene, "predictions/a", ends, labels, raw=False, info={}, mark=mark)
    finished = Finished("predictions")
    finished.add("a", mark, {"a.tif": sha256, ...}, dict(pixels=[...]))
    finished.find("a", mark)                 what add() was given, if the files are still the same
    area_summary(facts, names)               pixels, m2 and hectares of every class
    qml(names, values, colors)               text of NAME.qml

A mark stands for all that a result depends on: weights, settings, input. `raw` masks hold the ids
or colours of the training masks, others the train ids 0..K-1.
"""
import contextlib
import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
from PIL import Image

from .common import IGNORE, BadInput, Written, add_row, file_sha256, read_json, read_rows
from .files import with_companions
from .io import Labels, color_text, id_image
from .strips import Strips
from .tiff import Georef, Tiff, TiffWriter, world_files

HECTARE = 10_000  # m2


# ---- before any work

def class_values(labels: Labels, raw: bool) -> list[dict]:
    """The content of classes.json: what every value of a mask means."""
    values = []
    for i, c in enumerate(labels.classes):
        value = i
        if raw:
            value = c["color"] if labels.by_color else int(labels.raw[i])
        values.append(dict(value=value, train_id=i, **c))
    return values


def check_outputs(written: Written, images: dict[Path, str], ends_of: dict[Path, list[str]],
                  values: list[dict]) -> None:
    """BadInput where a result would overwrite anything but results of the same classes.

    images: {file: NAME}. ends_of: {file: what is written of it, such as "_color.png"}. values: the
    content of classes.json.
    """
    out = written.folder
    for name, n in Counter(images.values()).items():
        if n > 1:
            a, b, *_ = [file for file in images if images[file] == name]
            raise BadInput(f"{a} and {b}: the results of both would be called {name}; predict them "
                           "into two folders")
    names = ["summary.json"]
    for file, name in images.items():
        names += [f"{name}{end}" for end in ends_of[file]]
    outputs = [(out / name).resolve() for name in names]
    inputs = {file.resolve() for file in images}
    overwritten = inputs & set(outputs)
    if overwritten:
        raise BadInput(f"{out}: results would overwrite {min(overwritten)}; name another --out, or "
                       "the images without earlier results")
    # The images a and a_color both have a result a_color.png.
    twice = [file for file, n in Counter(outputs).items() if n > 1]
    if twice:
        raise BadInput(f"{out}: results would overwrite each other ({twice[0].name}); name another "
                       "--out, or the images without earlier results")
    listing = out / "classes.json"
    if listing.exists() and not written.overwrite and not holds(listing, values):
        raise BadInput(f"{listing}: of other classes or --label-out than this run's, or not of "
                       "predict.py; name another --out, or type --overwrite to replace it")
    written.check(names)


def holds(file: Path, values: list) -> bool:
    """Is this the list in a JSON file? One that cannot be read holds another."""
    try:
        return read_json(file, list) == values
    except BadInput:
        return False


# ---- masks and maps

def mask_image(ids: np.ndarray, labels: Labels, raw: bool) -> Image.Image:
    """Class ids (H, W) -> palette image of ids, or RGB image of the masks' own colours."""
    if not raw:
        return id_image(ids, labels.colors)
    values = labels.decode(ids)
    # Colours are RGB. A palette has 256 entries: ids above 255 are an image without one.
    if values.ndim == 3 or values.dtype != np.uint8:
        return Image.fromarray(values)
    return id_image(values, raw_palette(labels))


def raw_palette(labels: Labels) -> np.ndarray:
    """(256, 3) colours of the ids that the training masks hold."""
    colors = np.zeros((256, 3), np.uint8)
    colors[labels.raw] = labels.colors
    return colors


class InMemory:
    """The pixels of an image that is written whole, taken as TiffWriter takes them."""

    begun_again = False

    def __init__(self, shape: tuple[int, ...]):
        self.pixels = np.empty(shape, np.uint8)

    def done(self, left: int, width: int) -> int:
        return 0  # rows of an earlier call

    def start(self, left: int, width: int, top: int = 0) -> None:
        self.columns = slice(left, left + width)
        self.top = top

    def append(self, pixels: np.ndarray) -> None:
        """The next rows (h, w) or (h, w, bands)."""
        self.pixels[self.top:self.top + len(pixels), self.columns] = pixels
        self.top += len(pixels)

    def discard(self) -> None:
        """Nothing is kept elsewhere."""


def open_writers(scene: Strips, place: Path, ends: list[str], labels: Labels, raw: bool,
                 info: dict[str, str], mark: str) -> dict[str, InMemory | TiffWriter]:
    """{"ids", "confidence", "probabilities": what takes the pixels of an image}.

    place: the path of its results without their `ends`. info: of the network, into the TIFFs. TIFFs
    go on with the tiles that a killed call of the same mark has left.
    """
    H, W = scene.shape
    how = dict(info=info, georef=scene.georef, resume=mark)
    writers = {}
    if ".png" in ends:
        writers["ids"] = InMemory((H, W))
    else:
        writers["ids"] = mask_writer(f"{place}.tif", (H, W), labels, raw, **how)
    if "_confidence.png" in ends:
        writers["confidence"] = InMemory((H, W))
    if "_confidence.tif" in ends:
        # Of K classes the winner has at least 1 / K: 0 is free for nodata.
        file = f"{place}_confidence.tif"
        writers["confidence"] = TiffWriter(file, (H, W, 1), nodata=0, **how)
    if "_probabilities.tif" in ends:
        file = f"{place}_probabilities.tif"
        shape = H, W, len(labels.names)
        writers["probabilities"] = TiffWriter(file, shape, bands=labels.names, **how)
    return writers


def mask_writer(path: str, size: tuple[int, int], labels: Labels, raw: bool, **how) -> TiffWriter:
    """The TIFF of a mask (H, W); how: info, georef and resume of TiffWriter."""
    H, W = size
    if not raw:
        return TiffWriter(path, (H, W, 1), labels.colors, IGNORE, **how)
    pixel = labels.decode(np.zeros((1, 1), np.uint8))  # one, as it will be stored
    if pixel.size > 1:  # the bands of a colour
        return TiffWriter(path, (H, W, pixel.size), dtype=pixel.dtype, **how)
    palette = raw_palette(labels) if pixel.dtype == np.uint8 else None
    return TiffWriter(path, (H, W, 1), palette, labels.void, dtype=pixel.dtype, **how)


def read_back(file: Path, labels: Labels, raw: bool, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A mask's TIFF -> pixels of every id, (256,), and the ids of every n-th row and column."""
    tiff = Tiff(file)
    H, W = tiff.shape[:2]
    rows = tiff.block[0]
    counts = np.zeros(256, np.int64)
    parts = []
    for top in range(0, H, rows):
        pixels = tiff.read((top, 0, min(rows, H - top), W))
        ids = labels.encode(pixels) if raw else pixels[..., 0]
        for row in ids:  # bincount makes eight bytes of each
            counts += np.bincount(row, minlength=256)
        first = -top % n  # the first row of this strip that the thinned mask has
        parts.append(ids[first::n, ::n].copy())  # a view would keep the whole strip in memory
    return counts, np.concatenate(parts)


# ---- what is finished

class Finished:
    """The images below a folder that are finished, in a hidden list of its own; ranks share it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.list = self.folder / ".finished.jsonl"
        self.rows = {}
        self.read = 0  # bytes of the list
        self.update()

    def update(self) -> None:
        """Reads what other processes have added since."""
        start = self.read
        if self.list.exists():
            self.read = os.path.getsize(self.list)
        if self.read == start:
            return
        fields = dict(image=str, mark=str, files=dict[str, str], facts=dict)
        for row in read_rows(self.list, start, **fields):
            self.rows[row["image"]] = row

    def find(self, image: str, mark: str) -> dict | None:
        """The facts of an image, if its files of this mark are there and unchanged."""
        self.update()
        row = self.rows.get(image)
        if row is None or row["mark"] != mark:
            return None
        for name, digest in row["files"].items():
            file = self.folder / name
            if not file.is_file() or file_sha256(file) != digest:
                return None
        return row["facts"]

    def others(self, image: str, ends: list[str]) -> list[str]:
        """Files that an earlier call wrote of an image, and that are none of these endings."""
        if image not in self.rows:
            return []
        new = {f"{image}{end}" for end in ends}
        return [name for name in self.rows[image]["files"]
                if name not in new and (self.folder / name).exists()]

    def add(self, image: str, mark: str, files: dict[str, str], facts: dict) -> None:
        """All files of an image are written: {name: sha256}."""
        add_row(self.list, dict(image=image, mark=mark, files=files, facts=facts))
        self.update()


def found_masks(folder: Path, asked: dict[str, str], about: dict) -> tuple[dict, int, int]:
    """-> facts of the masks in a folder, how many are of earlier calls, and of those of other weights.

    asked: {image: mark} of this call. Others count as long as their values mean the same as in
    `about` (values, weights) and nobody has changed them.
    """
    finished = Finished(folder)
    facts, seen = {}, set()
    new = set(finished.rows)
    while new:  # another process may finish images while the files of others are hashed
        for name in new:
            row = finished.rows[name]
            if name in asked:
                # This call, or a rank of it, has looked at its files or written them.
                counts = row["mark"] == asked[name]
            else:
                same = row["facts"].get("values") == about["values"]
                counts = same and finished.find(name, row["mark"]) is not None
            if counts:
                facts[name] = row["facts"]
        seen |= new
        finished.update()
        new = finished.rows.keys() - seen
    facts = dict(sorted(facts.items()))
    earlier = facts.keys() - asked.keys()
    others = [name for name in earlier if facts[name]["weights"] != about["weights"]]
    return facts, len(earlier), len(others)


def mark_of(settings: dict, file: Path) -> str:
    """Changes with the settings, the image, and the files beside it: its mask, its place."""
    state = []
    for path in map(Path, (*with_companions([file]), *world_files(file))):
        with contextlib.suppress(OSError):
            found = os.stat(path)
            state.append([path.name, found.st_size, found.st_mtime_ns])
    text = json.dumps([settings, state], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# ---- areas

def areas(counts: np.ndarray, georef: Georef | None) -> dict:
    """(256,) pixels of every id -> facts of an image: these, m2 of a pixel or why it is unknown."""
    m2, why = georef.pixel_area() if georef else (None, "no georeference")
    return dict(pixels=counts.tolist(), pixel_m2=m2, unknown=why)


def area_summary(facts: dict[str, dict], names: list[str]) -> dict:
    """{image: areas()} -> the same by names of classes, and their sums over all images."""
    images = {}
    pixels = np.zeros(256, np.int64)
    m2 = np.zeros(256)
    unknown = {}  # {why the area is not known: the first image of which it is not}
    for image, f in facts.items():
        counts = np.array(f["pixels"])
        images[image] = area_table(counts, f["pixel_m2"], f["unknown"], names)
        pixels += counts
        if f["pixel_m2"] is None:
            unknown.setdefault(f["unknown"], image)
        else:
            m2 += counts * f["pixel_m2"]

    total = pixel_table(pixels, names)
    if unknown or not facts:
        why, image = next(iter(unknown.items()), ("no image", ""))
        total["area"] = f"not known: {image}: {why}"
    else:
        total |= areas_by_class(m2, names)
    return dict(images=images, total=total)


def area_table(pixels: np.ndarray, pixel_m2: float | None, unknown: str, names: list[str]) -> dict:
    """Pixels of every class and without one; m2 and hectares, or why they are not known."""
    table = pixel_table(pixels, names)
    if pixel_m2 is None:
        return table | dict(area=f"not known: {unknown}")
    # A pixel of 0.1 x 0.1 m has 0.010000000000000002 m2 in binary numbers.
    shown = float(f"{pixel_m2:.12g}")
    return table | dict(pixel_m2=shown) | areas_by_class(pixels * pixel_m2, names)


def pixel_table(pixels: np.ndarray, names: list[str]) -> dict:
    """(256,) pixels of every id -> by names of classes, and how many have none."""
    k = len(names)
    by_name = dict(zip(names, pixels[:k].tolist()))
    return dict(pixels=by_name, without_class=int(pixels[k:].sum()))


def areas_by_class(m2: np.ndarray, names: list[str]) -> dict:
    """Square metres of every id -> m2 and hectares by names of classes."""
    # To a square centimetre, and to a hundred of them: further digits are noise of binary numbers.
    hectares = (m2 / HECTARE).round(6).tolist()
    return dict(m2=dict(zip(names, m2.round(4).tolist())), hectares=dict(zip(names, hectares)))


# ---- QGIS

def qml(names: list[str], values: list[int], colors: np.ndarray) -> str:
    """A style that QGIS takes with NAME.tif by itself: the values' names and colours."""
    entries = []
    for name, value, color in zip(names, values, colors):
        code = color_text(color)
        entries.append(f'     <paletteEntry value="{value}" color="{code}" alpha="255" '
                       f"label={quoteattr(name)}/>\n")
    return ("<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
            '<qgis version="3.16" styleCategories="Symbology">\n <pipe>\n'
            '  <rasterrenderer type="paletted" band="1" opacity="1" alphaBand="-1" '
            'nodataColor="">\n   <colorPalette>\n' + "".join(entries) + "   </colorPalette>\n"
            "  </rasterrenderer>\n </pipe>\n</qgis>\n")
