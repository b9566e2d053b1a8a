"""Random crops: scale first, then crop, but only the pixels of the crop are ever resized.

    x, y = random_crop(image, mask, 512, (0.5, 2), rng)                anywhere, at scale 0.5 to 2
    x, y = random_crop(image, mask, 512, (0.5, 2), rng, [6, 7], 0.3)   30 % around classes 6 and 7

Every draw comes from `rng`, a np.random.Generator.
"""
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator

from .common import IGNORE

Pair = tuple[np.ndarray, np.ndarray]  # image (H, W, 3) uint8, mask (H, W) uint8

# So many pixels of a mask are searched for a rare class; a larger mask is thinned out.
SEARCHED = 2**17

# A chosen pixel is at most this share of the window's size away from the window's middle.
JITTER = 0.375


def crop(image: np.ndarray, mask: np.ndarray, size: int, scale: float,
         centre: tuple[float, float]) -> Pair:
    """The size x size window of the scaled pair around `centre` (y, x in unscaled pixels).

    The window is moved inside. A scaled image smaller than it is padded at the right and bottom:
    image 0, mask IGNORE.
    """
    H, W = mask.shape
    if image.dtype != np.uint8 or mask.dtype != np.uint8 or image.shape != (H, W, 3):
        raise ValueError(f"image {image.shape} {image.dtype}, mask {mask.shape} {mask.dtype}; "
                         "expected (H, W, 3) uint8 and (H, W) uint8")
    part, (out_h, out_w) = crop_window(H, W, size, scale, centre)
    top, left, h, w = part
    rows = slice(top, top + h)
    columns = slice(left, left + w)

    # Copy the part: its tile may be large and mapped from the disk.
    # Pillow's resize would give the same in four times the time.
    pixels = torch.from_numpy(image[rows, columns].copy())
    pixels = pixels[None].permute(0, 3, 1, 2)  # (1, 3, h, w)
    pixels = F.interpolate(pixels, (out_h, out_w), mode="bilinear", antialias=True)
    x = np.zeros((size, size, 3), np.uint8)
    x[:out_h, :out_w] = pixels[0].permute(1, 2, 0)

    # The nearest pixels of the mask: resizing it would invent classes.
    y = np.full((size, size), IGNORE, np.uint8)
    part = mask[rows, columns]
    y[:out_h, :out_w] = part[nearest(out_h, h)][:, nearest(out_w, w)]
    return x, y


def nearest(n: int, source: int) -> np.ndarray:
    """The `source` pixels under the middles of n pixels of the same extent, (n,) int.

    Where a middle lies between two, as at half the size, it is the lower and the upper one in turn:
    always the upper one would move the mask off its image.
    """
    i = np.arange(n)
    # The middle of pixel i lies at (2 i + 1) * source / (2 n).
    index, rest = np.divmod((2 * i + 1) * source, 2 * n)
    between = rest == 0
    return index - (between & (i % 2 == 0))


def crop_window(H: int, W: int, size: int, scale: float, centre: tuple[float, float]) -> tuple:
    """The part (top, left, h, w) of an H x W image that crop() takes, its (h, w) in the crop."""
    span = size / scale
    top, h = fit_span(centre[0], span, H)
    left, w = fit_span(centre[1], span, W)
    # A thin image keeps at least one row or column.
    out_h = max(1, round(H * scale))
    out_w = max(1, round(W * scale))
    part = (top, left, h, w)
    return part, (min(size, out_h), min(size, out_w))


def fit_span(centre: float, span: float, n: int) -> tuple[int, int]:
    """Start and length of a window of `span` pixels around `centre`, moved inside 0..n."""
    length = max(1, round(min(span, n)))
    start = max(round(centre - length / 2), 0)
    return min(start, n - length), length


def random_crop(image: np.ndarray, mask: np.ndarray, size: int, scales: tuple[float, float],
                rng: Generator, focus: Sequence[int] = (), focus_p: float = 0.0) -> Pair:
    """A crop at a log-uniform scale; with probability `focus_p` around a pixel of classes `focus`.

    Without such a pixel the crop is an ordinary random one.
    """
    def pixel():  # only looked for where the dice say so
        return random_pixel(mask, focus, rng)

    H, W = mask.shape
    scale, centre = random_place(H, W, size, scales, rng, pixel, focus_p)
    return crop(image, mask, size, scale, centre)


def random_pixel(mask: np.ndarray, classes: Sequence[int], rng: Generator) -> np.ndarray | None:
    """(y, x) of a random pixel of some classes, or None where none was found.

    Every n-th row and column is searched: all of them up to 700 x 700 pixels, where no pixel is
    missed, every 16th of 6000 x 6000.
    """
    n = max(1, math.isqrt(mask.size // SEARCHED))
    # From a random one on, so that no row or column is always left out.
    y, x = rng.integers(min(n, *mask.shape), size=2)
    grid = mask[y::n, x::n]
    # A table of all ids, because np.isin(grid, classes) takes far longer.
    wanted = np.isin(np.arange(256), classes)
    hits = np.flatnonzero(wanted[grid])
    if not len(hits):
        return None
    hit = hits[rng.integers(len(hits))]
    row, column = divmod(hit, grid.shape[1])
    return np.array([y + n * row, x + n * column])


def random_place(H: int, W: int, size: int, scales: tuple[float, float], rng: Generator,
                 pixel: Callable | None = None, focus_p: float = 0.0) -> tuple:
    """Log-uniform scale and centre (y, x) of a crop; with probability `focus_p` around pixel().

    pixel() -> (y, x) or None. It is chosen first and the window laid around it: so it is inside at
    every scale.
    """
    # Half and double size are equally far from 1.
    low, high = np.log(scales)
    scale = float(np.exp(rng.uniform(low, high)))
    span = size / scale
    if focus_p and rng.random() < focus_p:
        chosen = pixel() if pixel else None
        if chosen is not None:
            return scale, around(chosen, span, rng)
    y = random_middle(span, H, rng)
    x = random_middle(span, W, rng)
    return scale, (y, x)


def random_middle(span: float, n: int, rng: Generator) -> float:
    """Middle of a window of `span` pixels inside 0..n: all windows alike likely, those at the rims too."""
    _, length = fit_span(0, span, n)
    # Whole starts: a rounded uniform number would draw the first and the last half as often.
    start = rng.integers(n - length + 1)
    return start + length / 2


def around(pixel: np.ndarray, span: float, rng: Generator) -> np.ndarray:
    """Centre (y, x) of a window of `span` unscaled pixels that holds `pixel` (y, x)."""
    # Not always in the middle, or a network could learn the place.
    shift = rng.uniform(-JITTER, JITTER, 2) * span
    return pixel + 0.5 + shift
