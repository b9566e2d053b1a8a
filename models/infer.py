"""Sliding windows over images of any size, blended without seams, and the confusion matrix of a whole split.

    logits = slide(net, x, crop=512, overlap=0.25, batch=8, amp=False)     (3, H, W) -> (K, H, W) fp32
    cm = evaluate(net, dataset, dict(crop=512, overlap=0.25, batch=8, amp=False))      (K, K) int64
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from data import metrics
from data.common import IGNORE, BadInput, even_sample, progress
from data.datasets import normalise
from data.tiff import TILE

from .run import keep_signals_from_worker, over_ranks

ONE_PIECE = 2**22  # pixels up to which an image is blended at once
LOGITS = 200_000_000  # bytes of the logits of one row of windows
FEW_ROWS = 64  # whose probabilities are computed at a time


# ---- windows

def starts(n: int, size: int, overlap: float) -> list[int]:
    """Where windows of `size` begin along n pixels; the last one is shifted inwards."""
    if n <= size:
        return [0]
    step = max(1, int(round(size * (1 - overlap), 6)))  # 20 * (1 - 0.9) is a little below 2
    return [*range(0, n - size, step), n - size]


def windows(H: int, W: int, size: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """(top, left, h, w) of the windows that cover H x W, row by row."""
    h, w = min(size, H), min(size, W)
    boxes = []
    for top in starts(H, size, overlap):
        boxes += [(top, left, h, w) for left in starts(W, size, overlap)]
    return boxes


def hann(n: int) -> torch.Tensor:
    """(n,) Hann weights without the zeros at both ends: the edge of a window still counts."""
    return torch.hann_window(n + 2, periodic=False)[1:-1].clamp(min=1e-3)


def blend_weight(h: int, w: int) -> torch.Tensor:
    """(h, w) weights of a window's pixels: its middle counts most."""
    return hann(h)[:, None] * hann(w)


def slide(net: nn.Module, x: torch.Tensor, crop: int, overlap: float, batch: int,
          amp: bool, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Image (3, H, W) -> logits (K, H, W) fp32 on x's device, from blended windows, `batch` at a time.

    valid: (H, W) bool, True somewhere. Windows without a valid pixel are not computed: 0.
    """
    H, W = x.shape[-2:]
    boxes = windows(H, W, crop, overlap)
    if valid is not None:
        boxes = [(t, l, h, w) for t, l, h, w in boxes if valid[t:t + h, l:l + w].any()]
    device = next(net.parameters()).device
    weight = blend_weight(*boxes[0][2:]).to(x.device)
    total = torch.zeros(H, W, device=x.device)
    out = None
    for i in range(0, len(boxes), batch):
        some = boxes[i:i + batch]
        tiles = torch.stack([x[:, t:t + h, l:l + w] for t, l, h, w in some])
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = net(tiles.to(device)).float().to(x.device)
        if weight.shape == (H, W):  # one window is all
            return logits[0]
        if out is None:
            out = torch.zeros(logits.shape[1], H, W, device=x.device)
        for (t, l, h, w), z in zip(some, logits):
            out[:, t:t + h, l:l + w] += z * weight
            total[t:t + h, l:l + w] += weight
    if valid is not None:
        total[total == 0] = 1
    return out.div_(total)


# ---- images of any size

@dataclass
class Strip:
    """Rows of an image for which all windows have been computed; good until the next ones are."""
    top: int
    logits: torch.Tensor | None  # (K, n, W), times `weight`; None where no pixel is valid
    weight: torch.Tensor  # (n, 1), sum of the weights of the windows
    valid: np.ndarray | None  # (n, W) bool, None where all are

    def ids(self) -> np.ndarray:
        """(n, W) uint8 classes, IGNORE where not valid."""
        if self.logits is None:
            return np.full(self.valid.shape, IGNORE, np.uint8)
        # No division: at a pixel all classes have the same sum of weights.
        ids = self.logits.max(0).indices.byte().cpu().numpy()
        if self.valid is not None:
            ids[~self.valid] = IGNORE
        return ids

    def probabilities(self, classes: int, temperature: float = 1.0) -> Iterator[np.ndarray]:
        """(m, W, K) uint8, 255 times the probability, a few rows at a time; 0 where not valid."""
        for i in range(0, len(self.weight), FEW_ROWS):
            rows = slice(i, i + FEW_ROWS)
            if self.logits is None:
                yield np.zeros((*self.valid[rows].shape, classes), np.uint8)
                continue
            z = self.logits[:, rows] / (self.weight[rows] * temperature)
            p = z.softmax(0).mul_(255).round_().byte().movedim(0, -1).cpu().numpy()
            if self.valid is not None:
                p = p * self.valid[rows, :, None]
            yield p


def panels(W: int, crop: int, overlap: float, classes: int) -> list[tuple[int, int, int, int]]:
    """(left, width, first, wide): an image in columns, so that rows of logits fit into memory.

    The windows that touch the columns left..left + width span first..first + wide. Multiples of
    512, the tiles of the result. Windows at the border between two panels are computed twice.
    """
    most = max(LOGITS // (4 * classes * crop), 4 * crop)
    number = -(-W // most)
    width = -(-W // number // TILE) * TILE
    found = []
    for left in range(0, W, width):
        right = min(left + width, W)
        touching = [l for l in starts(W, crop, overlap) if l < right and l + crop > left]
        end = min(touching[-1] + crop, W)
        found.append((left, right - left, touching[0], end - touching[0]))
    return found


@torch.inference_mode()
def slide_rows(net: nn.Module, read: Callable, size: tuple[int, int], norm: str, crop: int,
               overlap: float, batch: int, amp: bool, whole: int | None = None, first: int = 0,
               skip_empty: bool = True) -> Iterator[Strip]:
    """An image of any size (H, W) -> its rows from `first` on, as they are finished.

    read(top, h) -> rows of it (h, W, 3) uint8, and (h, W) bool or None: what of them is data. Above
    `whole` pixels (ONE_PIECE) only the logits of one row of windows are held, not the image's.
    skip_empty: windows without data are not computed.
    """
    H, W = size
    device = next(net.parameters()).device
    one_piece = H * W <= (ONE_PIECE if whole is None else whole)
    n = H if one_piece else min(crop, H)  # rows that are computed at once
    tops = [0] if one_piece else starts(H, crop, overlap)
    held = held_weight = None  # logits below the finished rows, already weighted, and their weight
    for top, below in zip(tops, [*tops[1:], H]):
        if top + n <= first:
            continue
        image, valid = read(top, n)
        # A window's weight is row times column, so weighted rows of windows add up to the image's.
        weight = (torch.ones(n) if one_piece else hann(n)).to(device)[:, None]
        z = None
        seen = torch.from_numpy(valid) if skip_empty and valid is not None else None
        if seen is None or seen.any():
            x = normalise(image, norm).to(device)
            z = slide(net, x, crop, overlap, batch, amp, seen)
        if z is not None and not one_piece:
            z.mul_(weight)
        if z is not None and held is not None:
            z[:, :held.shape[1]] += held
        if held_weight is not None:
            weight[:len(held_weight)] += held_weight

        rows = slice(max(first - top, 0), below - top)  # final from here on
        if rows.start < rows.stop:
            strip = Strip(top + rows.start, None if z is None else z[:, rows], weight[rows],
                          None if valid is None else valid[rows])
            yield strip
            strip.logits = None  # or two rows of windows would be in memory
        # Where no pixel is valid, nothing is held, and nobody asks for it.
        held = None if z is None else z[:, rows.stop:].clone()
        held_weight = weight[rows.stop:]
        z = x = None


# ---- a whole split

@torch.inference_mode()
def examples(net: nn.Module, data: Dataset, window: dict, n: int) -> list[tuple]:
    """(image, true ids, predicted ids, name) of n images spread over the data, as plots.samples draws them."""
    net.eval()
    device = next(net.parameters()).device
    rows = []
    for i in even_sample(range(len(data)), n):
        image, mask = data.read(i)
        logits = slide(net, normalise(image, data.norm).to(device), **window)
        ids = logits.max(0).indices.byte().cpu().numpy()
        rows.append((image, mask, ids, data.names[i]))
    return rows


@torch.inference_mode()
def predictions(net: nn.Module, data: Dataset, window: dict, workers: int = 0,
                what: str = "images") -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, y (H, W), logits (K, H, W)) of every image of this rank's part of the data, on net's device.

    window: crop, overlap, batch and amp of slide().
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(net.parameters()).device
    mine = range(rank, len(data), world)  # unpadded: no image is counted twice
    loader = DataLoader(data, batch_size=None, sampler=mine, num_workers=workers,
                        prefetch_factor=1 if workers else None,
                        worker_init_fn=keep_signals_from_worker)
    for x, y, name in progress(loader, what):
        yield name, y.to(device), slide(net, x.to(device), **window)


@torch.inference_mode()
def matrices(net: nn.Module, data: Dataset, window: dict, workers: int = 0,
             classes: int | None = None, what: str = "images") -> Iterator[tuple[str, torch.Tensor]]:
    """(name, (k, k) int64 confusion matrix, rows true) of every image of this rank's part of the data.

    classes: k, where the network's are not the data's.
    """
    k = classes or len(data.labels.names)
    for name, y, logits in predictions(net, data, window, workers, what):
        pred = logits.max(0).indices  # ten times faster than argmax on a CPU
        yield name, metrics.confusion(pred, y, k)


def evaluate(net: nn.Module, data: Dataset, window: dict, workers: int = 0,
             classes: int | None = None, what: str = "validation") -> torch.Tensor:
    """(k, k) int64 confusion matrix of the whole data set on the CPU of every rank; leaves net's mode as it was."""
    was_training = net.training
    net.eval()
    if dist.is_initialized():
        for statistics in net.buffers():  # BatchNorm's differ between ranks until DDP's next forward
            dist.broadcast(statistics, 0)
    k = classes or len(data.labels.names)
    cm = torch.zeros(k, k, dtype=torch.int64, device=next(net.parameters()).device)
    for _, one in matrices(net, data, window, workers, classes, what):
        cm += one
    over_ranks(cm)  # not in the loop: ranks may have unequal numbers of images
    if not cm.any():
        raise BadInput(f"{data.names[0]} and {len(data) - 1} more: every pixel is ignored; correct "
                       '"ignore" in dataset.json')
    net.train(was_training)
    return cm.cpu()
