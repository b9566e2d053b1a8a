"""A part of a mask as numbers, for JSON files and for the page of review.py.

    runs = to_runs(inside)              (h, w) bool -> [3, 2, 10, ...]
    inside = from_runs(runs, (h, w))

Row by row, as if the rows stood behind each other: so many pixels outside, so many inside, ...
"""
import reprlib
from pathlib import Path

import numpy as np

from ..common import BadInput, fits

FIELDS = {"id": int, "image": str, "box": list[int], "runs": list[int], "label": str}


def check_region(row: dict, where: str | Path, **more: type) -> None:
    """BadInput unless a file's entry for a region has all FIELDS, and `more` of them."""
    fields = FIELDS | more
    if type(row) is not dict:
        raise BadInput(f"{where}: a region is {reprlib.repr(row)}; expected {', '.join(fields)}")
    for key, kind in fields.items():
        value = row.get(key)
        # These numbers index arrays later: a box is (top, left, height, width).
        if not fits(value, kind) or key == "box" and (len(value) != 4 or min(value) < 0):
            raise BadInput(f"{where}: {key!r} of a region is {reprlib.repr(value)}; expected a "
                           "file that suspects, or the page of review, has written")


def to_runs(inside: np.ndarray) -> list[int]:
    """(h, w) bool -> lengths of its runs, the first one of pixels outside, which may be 0."""
    # A region of a thousand pixels is some dozen numbers so, instead of a picture.
    flat = inside.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = [0, *changes.tolist(), flat.size]
    if flat[0]:  # the first run is of pixels outside
        edges.insert(0, 0)
    return np.diff(edges).tolist()


def from_runs(runs: list[int], size: tuple[int, int]) -> np.ndarray:
    """Lengths of runs -> (h, w) bool. Lengths that are not of such a region are a BadInput."""
    h, w = size
    # bool is an int in Python, but no length.
    whole = all(type(n) is int and n >= 0 for n in runs)
    if not whole or sum(runs) != h * w:
        raise BadInput(f"a region of {h} x {w} pixels with runs of {sum(runs)}; expected {h * w}")
    # Every second run is inside.
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(h, w)


def part(box: list[int]) -> tuple[slice, slice]:
    """A box (top, left, h, w) as an index of an array (H, W)."""
    top, left, h, w = box
    return slice(top, top + h), slice(left, left + w)
