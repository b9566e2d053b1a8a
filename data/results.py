"""What predict.py leaves beside the pixels: which images are finished, areas, a style for QGIS.

    finished = Finished("predictions")
    finished.add("a", mark, ["a.tif", "a.qml"], dict(pixels=[...]))
    finished.find("a", mark)                 what add() was given, if the files are still the same
    summary(rows, names)                     pixels, m2 and hectares of every class
    qml(names, values, colors)               text of NAME.qml

A mark stands for all that a result depends on: weights, settings, input.
"""
import contextlib
import hashlib
import json
import os
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np

from .common import file_sha256
from .files import with_companions
from .tiff import Georef, world_files

HECTARE = 10_000  # m2


# ---- what is finished

class Finished:
    """The images below a folder that are finished, in a hidden list of its own; ranks share it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.list = self.folder / ".finished.jsonl"
        self.rows = {}
        lines = self.list.read_bytes().splitlines() if self.list.exists() else []
        for line in lines:
            # A killed process or a full disk leaves half a line.
            with contextlib.suppress(ValueError, LookupError, TypeError):
                row = json.loads(line)
                self.rows[row["image"]] = {key: row[key] for key in ("mark", "files", "facts")}

    def find(self, image: str, mark: str) -> dict | None:
        """The facts of an image, if its files of this mark are there and unchanged."""
        row = self.rows.get(image)
        if row is None or row["mark"] != mark:
            return None
        for name, digest in row["files"].items():
            file = self.folder / name
            if not file.is_file() or file_sha256(file) != digest:
                return None
        return row["facts"]

    def add(self, image: str, mark: str, names: list[str], facts: dict) -> None:
        """All files of an image are written."""
        digests = {name: file_sha256(self.folder / name) for name in names}
        row = dict(mark=mark, files=digests, facts=facts)
        # One short write to the end, so that processes do not mix lines.
        with open(self.list, "ab", buffering=0) as f:
            f.write(b"\n" + json.dumps(dict(image=image, **row)).encode())
        self.rows[image] = row


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


def summary(facts: dict[str, dict], names: list[str]) -> dict:
    """{image: areas()} -> the same by names of classes, and their sums over all images."""
    images = {image: area_table(np.array(f["pixels"]), f["pixel_m2"], f["unknown"], names)
              for image, f in facts.items()}
    pixels = np.zeros(256, np.int64)
    m2 = np.zeros(256)
    unknown = {}
    for image, f in facts.items():
        pixels += f["pixels"]
        if f["pixel_m2"] is None:
            unknown.setdefault(f["unknown"], image)
        else:
            m2 += np.array(f["pixels"]) * f["pixel_m2"]
    total = area_table(pixels, None, "", names)
    if unknown or not facts:
        why, image = next(iter(unknown.items()), ("no image", ""))
        total["area"] = f"not known: {image}: {why}"
    else:
        total |= by_class(m2, names)
    return dict(images=images, total=total)


def area_table(pixels: np.ndarray, pixel_m2: float | None, unknown: str, names: list[str]) -> dict:
    """Pixels of every class and without one; m2 and hectares, or why they are not known."""
    table = dict(pixels=dict(zip(names, pixels[:len(names)].tolist())),
                 without_class=int(pixels[len(names):].sum()))
    if pixel_m2 is None:
        return table | dict(area=f"not known: {unknown}")
    return table | dict(pixel_m2=pixel_m2) | by_class(pixels * pixel_m2, names)


def by_class(m2: np.ndarray, names: list[str]) -> dict:
    """Square metres of every id -> m2 and hectares by names of classes."""
    hectares = (m2 / HECTARE).tolist()
    return dict(m2=dict(zip(names, m2.tolist())), hectares=dict(zip(names, hectares)))


# ---- QGIS

def qml(names: list[str], values: list[int], colors: np.ndarray) -> str:
    """A style that QGIS takes with NAME.tif by itself: the values' names and colours."""
    entries = []
    for name, value, color in zip(names, values, colors.tolist()):
        code = "#" + bytes(color).hex()
        entries.append(f'     <paletteEntry value="{value}" color="{code}" alpha="255" '
                       f"label={quoteattr(name)}/>\n")
    return ("<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
            '<qgis version="3.16" styleCategories="Symbology">\n <pipe>\n'
            '  <rasterrenderer type="paletted" band="1" opacity="1" alphaBand="-1" '
            'nodataColor="">\n   <colorPalette>\n' + "".join(entries) + "   </colorPalette>\n"
            "  </rasterrenderer>\n </pipe>\n</qgis>\n")


class InMemory:
    """The pixels of an image that is written whole, taken as TiffWriter takes them."""

    def __init__(self, shape: tuple[int, ...]):
        self.pixels = np.empty(shape, np.uint8)

    def done(self, left: int, width: int) -> int:
        return 0

    def start(self, left: int, width: int, top: int = 0) -> None:
        self.columns = slice(left, left + width)
        self.top = top

    def append(self, pixels: np.ndarray) -> None:
        """The next rows (h, w) or (h, w, bands)."""
        self.pixels[self.top:self.top + len(pixels), self.columns] = pixels
        self.top += len(pixels)

    def discard(self) -> None:
        """Nothing is kept elsewhere."""
