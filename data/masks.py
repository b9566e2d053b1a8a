"""Masks that any program has made of the images of a split: found by name, read as class ids.

    files = find_masks("predictions", names)              {image name: mask file}
    table = mask_table("train", d.labels)                 what their values mean
    for name, y, ids in read_masks(files, table, data, rank, world): ...
"""
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .common import IGNORE, BadInput, nfc, progress
from .datasets import SegDataset
from .files import check_folder, image_name, walk
from .io import Labels, color_text, is_id
from .raster import open_raster

LOSSLESS = (".png", ".tif", ".tiff", ".bmp")  # a JPEG does not keep ids
BLACK = "#000000"  # no class, in masks of colours


def find_masks(folder: str | Path, names: list[str]) -> dict[str, Path]:
    """{image name: mask below the folder}, or a BadInput for the first image without one.

    predict.py names masks below the folder that it was given: all may lack the same number of
    leading folders.
    """
    check_folder(folder)
    # An image may have several files there: only those that are asked for must be one each.
    there = defaultdict(list)
    for file in walk(folder):
        if file.suffix.lower() in LOSSLESS:
            there[nfc(image_name(file.relative_to(folder)))].append(file)
    depth = max(name.count("/") for name in names)
    for cut in range(depth + 1):
        wanted = {name: without_folders(name, cut) for name in names}
        missing = [name for name in names if wanted[name] not in there]
        if not missing:
            break
    if missing:
        raise BadInput(f"{folder}: no {wanted[missing[0]]}.png (or .tif) there, and no "
                       f"{missing[0]}.png; expected a mask for every image of the split")
    if len(set(wanted.values())) < len(wanted):
        raise BadInput(f"{folder}: images of one name in several folders, and only one mask for "
                       f"them; name the masks like {names[0]}.png")
    for key in wanted.values():
        if len(there[key]) > 1:
            first, second, *_ = there[key]
            raise BadInput(f"{first} and {second}: two masks of one image; take one away")
    return {name: there[key][0] for name, key in wanted.items()}


def without_folders(name: str, cut: int) -> str:
    """"a/b/c" without so many of its leading folders."""
    parts = name.split("/")
    return nfc("/".join(parts[min(cut, len(parts) - 1):]))


def mask_table(values: str, labels: Labels) -> Labels:
    """train: ids 0..K-1; color: the colours of `labels`; raw: values as in the data set's masks."""
    if values == "raw":
        return labels
    ignored = [IGNORE]
    classes = [dict(name=name, id=i) for i, name in enumerate(labels.names)]
    if values == "color":
        colors = [color_text(color) for color in labels.colors]
        classes = [dict(name=name, color=color) for name, color in zip(labels.names, colors)]
        ignored = [] if BLACK in colors else [BLACK]
    return Labels(classes, ignored)


def load_answer(file: Path, table: Labels) -> np.ndarray:
    """A mask to be scored -> (H, W) uint8 ids; messages name --mask-ids, not the data set's own table."""
    nodata = open_raster(file).nodata
    if not table.by_color and type(nodata) in (int, float) and is_id(nodata):
        # What the file itself calls nodata is no class, unless the table has it.
        if nodata not in (*table.raw, *table.ignore):
            table = Labels(table.classes, [*table.ignore, int(nodata)], table.threshold)
    try:
        return table.load(file)
    except BadInput as e:
        found, _, advice = str(e).partition("; ")
        if "dataset.json" in advice:
            advice = ("type --mask-ids train for ids 0..K-1, raw for values as in the data set's own "
                      "masks, or color for the classes' colours")
        raise BadInput(f"{found}; {advice}") from None


def read_masks(files: dict[str, Path], table: Labels, data: SegDataset, rank: int,
               world: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, true ids, ids of the mask) of this rank's images, (H, W) uint8 both.

    A labelled pixel without a class in the mask is a BadInput.
    """
    k = len(data.labels.names)
    for i in progress(range(rank, len(data), world), "masks"):
        name = data.names[i]
        y = data.read(i)[1]
        ids = load_answer(files[name], table)
        if ids.shape != y.shape:
            raise BadInput(f"{files[name]}: {ids.shape[0]} x {ids.shape[1]} pixels (H x W); "
                           f"expected {y.shape[0]} x {y.shape[1]}, as the image's own mask has")
        # Not counted, and without a class where the image is transparent.
        ids[(y == IGNORE) & (ids >= k)] = 0
        missing = np.count_nonzero(ids >= k)
        if missing:
            raise BadInput(f"{files[name]}: no class (255, transparent or nodata) on {missing} "
                           "labelled pixels; give them one, or ignore these pixels in the data "
                           "set's own masks")
        yield name, y, ids
