"""Random and strategic crops: scale first, then crop, but only the pixels of the crop are ever resized."""
import math
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .common import IGNORE

GRID = 2**17  # pixels of a mask that are searched for a rare class


def crop(image: np.ndarray, mask: np.ndarray, size: int, scale: float, centre: tuple[float, float]) -> tuple:
    """The size x size window of the scaled pair whose middle is at `centre` (y, x in unscaled pixels, moved inside).

    image (H, W, 3) uint8, mask (H, W) uint8 -> (size, size, 3), (size, size). Where the scaled image is smaller than
    the window it is padded at the right and bottom: image 0, mask IGNORE.
    """
    (top, left, h, w), (out_h, out_w) = window(*mask.shape, size, scale, centre)
    part = image[top:top + h, left:left + w].copy()  # of a tile that may be mapped from the disk, and large
    part = torch.from_numpy(part)[None].permute(0, 3, 1, 2)  # Pillow's resize gives the same in four times the time
    part = F.interpolate(part, (out_h, out_w), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    ids = Image.fromarray(mask[top:top + h, left:left + w]).resize((out_w, out_h), Image.NEAREST)  # invents no classes
    x, y = np.zeros((size, size, 3), np.uint8), np.full((size, size), IGNORE, np.uint8)
    x[:out_h, :out_w], y[:out_h, :out_w] = part, ids
    return x, y


def window(H: int, W: int, size: int, scale: float, centre: tuple[float, float]) -> tuple:
    """The part (top, left, h, w) of an H x W image that crop() takes, and its size (h, w) in the crop."""
    (top, h), (left, w) = (fit(c, size / scale, n) for c, n in zip(centre, (H, W)))
    return (top, left, h, w), tuple(min(size, max(1, round(n * scale))) for n in (H, W))


def fit(centre: float, span: float, n: int) -> tuple[int, int]:  # -> start and length of the window inside 0..n
    span = max(1, round(min(span, n)))
    return min(max(round(centre - span / 2), 0), n - span), span


def random_crop(image: np.ndarray, mask: np.ndarray, size: int, scales: tuple[float, float], rng: np.random.Generator,
                focus: list[int] = (), focus_p: float = 0.0) -> tuple:
    """A crop at a log-uniform scale; with probability `focus_p` around a random pixel of the classes in `focus`.

    The pixel is looked for in every n-th row and column from a random one on: n = 1 up to 700 x 700, where none is
    missed; 16 at 6000 x 6000. Without such a pixel the crop is an ordinary random one.
    """
    def pixel():
        n = max(1, math.isqrt(mask.size // GRID))
        first = rng.integers(min(n, *mask.shape), size=2)
        grid = mask[first[0]::n, first[1]::n]
        hits = np.flatnonzero(np.isin(np.arange(256), focus)[grid])  # by table: np.isin(grid, focus) takes far longer
        return first + n * np.array(divmod(hits[rng.integers(len(hits))], grid.shape[1])) if len(hits) else None

    return crop(image, mask, size, *random_place(*mask.shape, size, scales, rng, pixel, focus_p))


def random_place(H: int, W: int, size: int, scales: tuple[float, float], rng: np.random.Generator,
                 pixel: Callable = lambda: None, focus_p: float = 0.0) -> tuple[float, tuple[float, float]]:
    """Log-uniform scale and centre (y, x) of a crop; with probability `focus_p` around pixel() (y, x), if not None.

    The pixel is chosen first and the window laid around it, so the pixel is inside at every scale.
    """
    scale = float(np.exp(rng.uniform(*np.log(scales))))
    span = size / scale
    if focus_p and rng.random() < focus_p:
        chosen = pixel()
        if chosen is not None:
            return scale, around(chosen, span, rng)
    return scale, tuple(rng.uniform(min(span, n) / 2, n - min(span, n) / 2) for n in (H, W))


def around(pixel: np.ndarray, span: float, rng: np.random.Generator) -> np.ndarray:
    """Centre of a window of `span` unscaled pixels that holds `pixel` (y, x): a jitter of up to 3/8 of its size."""
    return pixel + 0.5 + rng.uniform(-0.375, 0.375, 2) * span
