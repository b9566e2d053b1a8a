"""Which values of the files become 0 and 255: numbers, or percentiles of the training images.

    "input_range": [0, 3000]                          in dataset.json: of all three bands
    "input_range": [[0, 3000], [0, 2800], [0, 2500]]  a pair for each of them
    "input_range": "p2-98"                            the percentiles 2 and 98 of each

    wanted = parse_range(["p2-98"])                   the same as words behind --input-range
    pairs, notes = percentile_range("p2-98", [(image, mask)], bands=[4, 1, 2])

Percentiles are measured once, before training; a run keeps the numbers, and so do its weights.
"""
import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .common import BadInput, even_sample, number, progress, read_json
from .io import is_mask_band, stored_colours
from .raster import open_raster, part_of
from .tiff import Tiff, Window

# What percentiles are measured on: all pixels of small images, of large ones a grid of windows.
IMAGES = 64
GRID = 3  # windows along each side
SIDE = 128  # of a window, in pixels
PERCENTILES = re.compile(r"p(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", re.ASCII)
RANGES = ("the lower number first, a pair of numbers for each of three bands, or percentiles such "
          "as p2-98")

Pairs = list[list[float]]  # [[low, high], ...] of three bands


# ---- what may be written

def band_numbers(text: str) -> list[int]:
    """What stands behind --bands: "4,1,2" -> [4, 1, 2]."""
    words = text.split(",")
    try:
        numbers = [number(word, int) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or min(numbers) < 1:
        raise BadInput(f"{text}: expected three numbers from 1, such as 4,1,2")
    return numbers


def parse_range(words: list[str]) -> list | str:
    """Words behind --input-range -> "p2-98", [low, high] or three such pairs."""
    text = " ".join(words)
    value = text
    if not PERCENTILES.fullmatch(text):
        try:
            numbers = [number(word) for word in words]
        except ValueError:
            numbers = []
        value = numbers
        if len(numbers) == 6:
            value = [numbers[i:i + 2] for i in (0, 2, 4)]
    if not is_range(value):
        raise BadInput(f"--input-range {text}: expected {RANGES}")
    return value


def reading_flags(bands: list[int] | None, input_range: list | str | None) -> list[str]:
    """What to type so that images are read in this way."""
    flags = []
    if bands:
        flags += ["--bands", ",".join(map(str, bands))]
    if isinstance(input_range, str):
        flags += ["--input-range", input_range]
    elif input_range:
        flags += ["--input-range", *map(str, np.array(input_range).ravel().tolist())]
    return flags


def is_range(value) -> bool:
    """Two finite numbers, the lower one first; a pair of such for each of three bands; or "p2-98"."""
    if isinstance(value, str):
        found = PERCENTILES.fullmatch(value)
        return bool(found) and float(found[1]) < float(found[2]) <= 100
    if len(value) == 3:
        return all(isinstance(pair, list) and is_pair(pair) for pair in value)
    return is_pair(value)


def is_pair(value) -> bool:
    """Two finite numbers, the lower one first."""
    low, high = value if len(value) == 2 else (0, 0)
    numbers = all(type(v) in (int, float) for v in (low, high))
    return numbers and -math.inf < low < high < math.inf


# ---- percentiles

def percentile_range(word: str, files: Iterable[tuple],
                     bands: list[int] | None) -> tuple[Pairs, list[str]]:
    """The percentiles of each band over the valid pixels of images, or of a box in each; and notes.

    files: (image, mask) or (image, mask, box), as data/datasets.py has them. An even sample is
    read. An image that cannot be read is for others to complain of.
    """
    images = {}  # {(image, box): None}, each once
    for image, _, *box in files:
        images[image, box[0] if box else None] = None
    images = list(images)
    parts, faults = [], []
    for image, box in progress(even_sample(images, IMAGES), "input range"):
        try:
            parts.append(some_pixels(image, box, bands))
        except BadInput as e:
            faults.append(e)
    if not parts and faults:
        raise faults[0]
    pixels = np.concatenate(parts) if parts else np.zeros((0, 3))
    if not len(pixels):
        raise BadInput(f"--input-range {word}: no pixel in the {len(images)} training images is "
                       "data; type numbers: --input-range LOW HIGH")
    low, high = map(float, PERCENTILES.fullmatch(word).groups())
    pairs = np.percentile(pixels, [low, high], axis=0).T.tolist()

    # A band of one value would be divided by zero.
    numbers = bands or [1, 2, 3]
    notes = []
    for i, (low, high) in enumerate(pairs):
        if low == high:
            pairs[i] = widened(low, pixels.dtype)
            notes.append(f"input range {word}: band {numbers[i]} is {low:g} at both percentiles; "
                         "{:g} to {:g} is taken".format(*pairs[i]))
    of_bands = zip(numbers, pairs)
    listed = ", ".join(f"band {n} {low:g} to {high:g}" for n, (low, high) in of_bands)
    count = len(parts)
    return pairs, [f"input range {word} of {count} training images: {listed}", *notes]


def widened(value: float, dtype: np.dtype) -> list[float]:
    """[value, value + 1], or what is next to it in large floats; the highest 8-bit value ends it."""
    step = max(1.0, float(np.spacing(np.float32(abs(value)))))
    if dtype == np.uint8 and value + step > 255:
        return [value - step, value]
    return [value, value + step]


def some_pixels(image: Path, box: Window | None, bands: list[int] | None) -> np.ndarray:
    """(n, 3) valid pixels of an image, or of a box in it: of all, or of windows evenly spread."""
    raster = open_raster(image)
    windows = spread_windows(box or (0, 0, *raster.shape[:2]))
    if isinstance(raster, Tiff):
        is_mask = None
        if raster.alpha:  # a window of an infrared band may hold nothing but 0 and 255
            is_mask = all(is_mask_band(raster.read(window, [raster.alpha])) for window in windows)
        parts = [stored_colours(image, bands, window, is_mask) for window in windows]
    else:  # Pillow decodes whole files
        a, valid = stored_colours(image, bands)
        parts = []
        for window in windows:
            seen = None if valid is None else part_of(valid, window)
            parts.append((part_of(a, window), seen))
    return np.concatenate([a.reshape(-1, 3) if valid is None else a[valid] for a, valid in parts])


def spread_windows(box: Window) -> list[Window]:
    """The box itself, or a grid of windows in it, evenly spread, where they are fewer pixels."""
    top, left, h, w = box
    if h * w <= (GRID * SIDE) ** 2:
        return [box]
    side_y, side_x = min(SIDE, h), min(SIDE, w)
    middles = (np.arange(GRID) + 0.5) / GRID  # of the cells of a grid
    rows = (top + middles * h - side_y / 2).clip(top, top + h - side_y).astype(int).tolist()
    columns = (left + middles * w - side_x / 2).clip(left, left + w - side_x).astype(int).tolist()
    windows = {}  # each once: a narrow image has one row of them
    for y in rows:
        for x in columns:
            windows[y, x, side_y, side_x] = True
    return list(windows)


def range_of_run(run: str | Path) -> list:
    """The numbers with which a run reads its images."""
    path = Path(run) / "protocol.json"
    reading = read_json(path).get("reading")
    limits = reading.get("input_range") if isinstance(reading, dict) else None
    if not isinstance(limits, list) or not is_range(limits):
        raise BadInput(f"{path}: no input range in its \"reading\"; start a new run")
    return limits
