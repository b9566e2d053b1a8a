"""Scores of the borders between classes, and labels without the pixels next to a border.

    counts += boundary_counts(pred, true, k)      (k, 7) int64, over all images
    boundary_iou(counts), boundary_f1(counts)     (k,) each
    true = ignore_borders(true, 3)                IGNORE within 3 pixels of another label

Masks are (H, W) uint8 class ids with IGNORE. Ignored pixels are taken out of truth and prediction
first, so that a perfect prediction scores 1 beside them, and nothing is counted there.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import IGNORE

DILATION = 0.02  # of the image's diagonal: Cheng et al., "Boundary IoU", CVPR 2021
TOLERANCE = 3  # pixels by which a border may be off in boundary F1: the radius of ISPRS' erosion


# ---- neighbourhoods: `take` is torch.minimum, torch.maximum or torch.bitwise_or

def slide_along(x: Tensor, size: int, take: Callable) -> Tensor:
    """take over every `size` neighbours along the last axis: (..., n) -> (..., n - size + 1)."""
    # What covers n neighbours covers up to 2 n when taken twice: few steps for large sizes.
    covered = 1
    while covered < size:
        step = min(covered, size - covered)
        x = take(x[..., :-step], x[..., step:])
        covered += step
    return x


# A square takes two passes, one along each axis; a disk one along each of its rows.

def in_square(x: Tensor, radius: int, take: Callable, outside: int) -> Tensor:
    """take over the pixels at most `radius` rows and columns away, (H, W) -> (H, W)."""
    x = F.pad(x, (radius,) * 4, value=outside)
    for _ in range(2):  # along rows, then along columns
        x = slide_along(x, 2 * radius + 1, take).mT
    return x


def in_disk(x: Tensor, radius: int, take: Callable, outside: int) -> Tensor:
    """take over the pixels at a distance of at most `radius`, (H, W) -> (H, W)."""
    H, W = x.shape
    x = F.pad(x, (radius,) * 4, value=outside)
    found = None
    for dy in range(-radius, radius + 1):
        # Half the width of the disk in this row.
        reach = math.isqrt(radius ** 2 - dy ** 2)
        rows = x[radius + dy:radius + dy + H, radius - reach:radius + W + reach]
        part = slide_along(rows, 2 * reach + 1, take)
        found = part if found is None else take(found, part)
    return found


def border_band(ids: Tensor, width: int) -> Tensor:
    """(H, W) bool: each class minus itself eroded `width` times by 3 x 3, the outside being 0.

    An eroded class lacks the pixels that have another id, or the outside, so many rows and columns
    away; so one look at all ids does for every class.
    """
    low = in_square(ids, width, torch.minimum, IGNORE)
    high = in_square(ids, width, torch.maximum, IGNORE)
    return low != high


def border_line(ids: Tensor) -> Tensor:
    """(H, W) bool: another id among the eight neighbours. The rim of an image is no border."""
    low = in_square(ids, 1, torch.minimum, 255)
    high = in_square(ids, 1, torch.maximum, 0)
    return low != high


def ignore_borders(true: Tensor, radius: int) -> Tensor:
    """The labels with IGNORE where another label is at most `radius` pixels away, as ISPRS erodes.

    What is not labelled is no other label.
    """
    low = in_disk(true, radius, torch.minimum, IGNORE)
    high = in_disk(true.masked_fill(true == IGNORE, 0), radius, torch.maximum, 0)
    return true.masked_fill(low < high, IGNORE)


# ---- counts and scores

def boundary_counts(pred: Tensor, true: Tensor, k: int) -> Tensor:
    """(k, 7) int64 per class: pixels of the band in truth, in the prediction, in both; pixels of
    the true line, those of it that were found; of the predicted line, those of it that are true.
    """
    pred = pred.masked_fill(true == IGNORE, IGNORE)
    width = max(1, round(DILATION * math.hypot(*true.shape)))
    true_band = border_band(true, width)
    pred_band = border_band(pred, width)
    true_line = border_line(true)
    pred_line = border_line(pred)
    columns = [
        count(true, true_band, k),
        count(pred, pred_band, k),
        count(true, true_band & pred_band & (pred == true), k),
        count(true, true_line, k),
        count(true, true_line & near(true, pred, pred_line, k), k),
        count(pred, pred_line, k),
        count(pred, pred_line & near(pred, true, true_line, k), k),
    ]
    return torch.stack(columns, dim=1)


def count(ids: Tensor, where: Tensor, k: int) -> Tensor:
    """(k,) pixels of each class among those of `where`."""
    # Not ids[where]: a selection takes five times as long.
    kept = ids.masked_fill(~where, IGNORE).flatten()
    return torch.bincount(kept, minlength=256)[:k]


def near(ids: Tensor, others: Tensor, line: Tensor, k: int) -> Tensor:
    """(H, W) bool: has `line` a pixel within TOLERANCE whose id in `others` is the one here?"""
    found = torch.zeros_like(line)
    # Eight classes at once, a bit each.
    for first in range(0, k, 8):
        last = min(first + 8, k)
        bits = ids.new_zeros(256)
        bits[first:last] = 2 ** torch.arange(last - first, device=ids.device)
        around = look_up(bits, others).masked_fill(~line, 0)
        around = in_disk(around, TOLERANCE, torch.bitwise_or, 0)
        found |= (around & look_up(bits, ids)) > 0
    return found


def look_up(table: Tensor, ids: Tensor) -> Tensor:
    """table[ids], at half the time."""
    return table.index_select(0, ids.flatten().int()).view(ids.shape)


def boundary_iou(counts: Tensor) -> Tensor:
    """(k,) float64; NaN for a class in neither truth nor prediction."""
    true, pred, both = counts[:, :3].double().unbind(1)
    return both / (true + pred - both)


def boundary_f1(counts: Tensor) -> Tensor:
    """(k,) float64, of lines within TOLERANCE pixels of each other; NaN for a class without one."""
    true, found, pred, right = counts[:, 3:].double().unbind(1)
    # A border that only one of the two has is worth 0.
    recall = (found / true).nan_to_num(0.0)
    precision = (right / pred).nan_to_num(0.0)
    score = (2 * precision * recall / (precision + recall)).nan_to_num(0.0)
    return score.masked_fill(true + pred == 0, torch.nan)
