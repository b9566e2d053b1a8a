"""Big scenes cut into overlapping tiles: a data set in which every tile knows where it is from.

    check_sides(source)                    BadInput if overlapping tiles would be in two splits
    for tile in tiles_of_scene(source, "images/area_1", side=512, overlap=64): ...
    description = description_of(source, places)          its dataset.json

Tiles are GeoTIFFs images/SCENE/NAME/TOP_LEFT.tif and masks/...; masks hold ids 0, 1, ... and 255.
"""
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..check.ground import footprint, overlaps
from ..common import IGNORE, BadInput, csv_text
from ..datasets import scenes_of
from ..io import color_text, stored_colours
from ..raster import open_raster, part_of
from ..source import Source
from ..tiff import MODEL_TAGS, Georef, Window, write_tiff

KEPT = ("bands", "input_range", "unlabelled", "report", "warning")  # of dataset.json


class Tile(NamedTuple):
    """A part of an image: (h, w, bands) as stored, (h, w) ids or None, and where it lies."""
    window: Window
    pixels: np.ndarray
    ids: np.ndarray | None
    georef: Georef | None


# ---- splits

def homes_of(source: Source) -> dict[Path, dict[str, str]]:
    """{image file: {split: a name in it}}; with "tiles" in dataset.json it has many names."""
    # An image may be in several splits by its parts, which check_sides() refuses.
    homes = defaultdict(dict)
    for split, names in source.splits.items():
        for name in names:
            homes[source.pairs[name][0]].setdefault(split, name)
    return dict(homes)


def check_sides(source: Source) -> None:
    """BadInput where pixels, or ground, of one split would be in a tile of another one."""
    homes = homes_of(source)
    systems = defaultdict(list)  # coordinates compare within one system only
    for image, splits in homes.items():
        if len(splits) > 1:
            raise BadInput(f"{image}: parts of it are in {' and '.join(splits)}, so tiles that "
                           "overlap would be on both sides; put whole images into each split, in "
                           '"splits" of dataset.json')
        # Two files may show one place, as neighbouring sheets of a survey do.
        place = footprint(image)
        if place:
            system, *box = place
            systems[system].append((str(image), box, *splits))
    for places in systems.values():
        names, boxes, splits = zip(*places)
        shared = overlaps(list(names), np.array(boxes), np.array(splits))
        if shared:
            part, a, b = max(shared)
            raise BadInput(f"{a} and {b}: the same ground ({part:.0%} of the smaller) in different "
                           "splits, so tiles that overlap would be on both sides; put both into "
                           'one split, in "splits" of dataset.json')


def folders_of(source: Source) -> dict[Path, str]:
    """{image file: SCENE/NAME}, the folder of its tiles: what shows one scene stays together."""
    names = {}
    for split_names in source.splits.values():
        for name in split_names:
            names.setdefault(source.pairs[name][0], name)
    scenes = scenes_of(list(names.values()), source.description.get("scene"))
    folders = {}
    # "a/b" and "a-b" would become one folder.
    taken = {}
    for image, name in names.items():
        stem = image.relative_to(source.root).with_suffix("").as_posix()
        scene = scenes[name] if source.description.get("scene") else stem
        folder = f"{flat(scene)}/{flat(stem)}"
        for key, value in ((flat(scene), scene), (folder, image)):
            if taken.setdefault(key, value) != value:
                raise BadInput(f"{image}: its tiles would be in the folder {key}, as those of "
                               f"{taken[key]}; rename one")
        folders[image] = folder
    return folders


def flat(name: str) -> str:
    """A path as the name of one folder."""
    return name.replace("/", "-").strip(".") or "scene"


# ---- pixels

def starts(length: int, side: int, overlap: int) -> list[int]:
    """Where tiles begin: the last one ends at the border, so that all are whole."""
    # An image smaller than a tile is one tile of its own size.
    last = max(0, length - side)
    return sorted({*range(0, last, side - overlap), last})


def moved(georef: Georef | None, top: int, left: int) -> Georef | None:
    """Where the part of an image lies that begins at this row and column."""
    if georef is None or georef.transform is None:
        return None
    # Affine: x = a * column + b * row + c, y = d * column + e * row + f.
    a, b, c, d, e, f = georef.transform
    # The tags that place the whole scene would count before the transform.
    keys = {tag: values for tag, values in georef.keys.items() if tag not in MODEL_TAGS}
    place = a, b, c + a * left + b * top, d, e, f + d * left + e * top
    return Georef(place, georef.epsg, keys)


def tiles_of_scene(source: Source, image: Path, mask: Path | None, side: int, overlap: int
                   ) -> Iterator[Tile]:
    """All tiles of an image; of those with a mask only ones where something is labelled."""
    raster = open_raster(image)
    H, W, bands = raster.shape
    if raster.indexed or raster.dtype not in (np.uint8, np.uint16):
        kind = "a palette" if raster.indexed else raster.dtype
        raise BadInput(f"{image}: {kind}; tiles are written of uint8 and uint16 bands; convert it")
    # All bands go along, so that others can be chosen later.
    asked = source.reading["bands"] or []
    wanted = [*range(1, bands + 1)]
    if raster.alpha == bands and bands not in asked:
        wanted.pop()  # what it hides is not labelled
    labels = None if mask is None else source.labels.load(mask)
    if labels is not None and labels.shape != (H, W):
        raise BadInput(f"{mask}: mask of {labels.shape} for an image of {(H, W)} (H, W); export it "
                       "at the image's size")
    # A row of tiles at once: some formats are decoded whole for every window.
    for top in starts(H, side, overlap):
        strip = top, 0, min(side, H), W
        pixels = raster.read(strip, wanted)
        ids = None
        if labels is not None:
            ids = part_of(labels, strip).copy()
            # Where the image has no data the tile must not have a label.
            _, valid = stored_colours(image, source.reading["bands"], strip)
            if valid is not None:
                ids[~valid] = IGNORE
        for left in starts(W, side, overlap):
            columns = slice(left, left + min(side, W))
            own = None if ids is None else ids[:, columns]
            # Nothing can be learned from it.
            if own is not None and (own == IGNORE).all():
                continue
            window = top, left, strip[2], columns.stop - left
            yield Tile(window, pixels[:, columns], own, moved(raster.georef, top, left))


# ---- files

def save_image(path: str, tile: Tile, info: dict[str, str]) -> None:
    """For Written.replace(): the image of a tile."""
    write_tiff(path, np.ascontiguousarray(tile.pixels), info=info, georef=tile.georef)


def save_mask(path: str, tile: Tile, colors: np.ndarray, info: dict[str, str]) -> None:
    """For Written.replace(): the mask of a tile, in the colours of the classes."""
    write_tiff(path, np.ascontiguousarray(tile.ids), palette=colors, info=info, georef=tile.georef)


def tile_table(rows: list[tuple]) -> str:
    """tiles.csv: where each tile is from; rows of (tile, split, image, window)."""
    table = [["tile", "split", "image", "top", "left", "height", "width"]]
    for name, split, image, window in rows:
        table.append([name, split, image, *window])
    return csv_text(table)


def description_of(source: Source, splits: list[str]) -> dict:
    """dataset.json of the tiles, whose splits are listed in SPLIT.txt."""
    classes = []
    for i, c in enumerate(source.labels.classes):
        classes.append(dict(name=c["name"], id=i, color=color_text(source.labels.colors[i])))
    kept = {key: source.description[key] for key in KEPT if key in source.description}
    return {"name": f"{source.name}-tiles", "images": "images/**/*.tif", "masks": "masks/**/*.tif",
            "classes": classes, "ignore": [IGNORE], "scene": "images/([^/]*)/",
            "splits": {split: f"{split}.txt" for split in splits}, **kept}
