"""Sliding windows over images of any size, blended without seams, and the confusion matrix of a whole split.

    logits = slide(net, x, crop=512, overlap=0.25, batch=8, amp=False)     (3, H, W) -> (K, H, W) fp32
    cm = evaluate(net, dataset, dict(crop=512, overlap=0.25, batch=8, amp=False))      (K, K) int64
"""
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from data import metrics
from data.common import BadInput, even_sample, progress
from data.datasets import normalise

from .run import keep_signals_from_worker, over_ranks

ONE_PIECE = 2**22  # pixels up to which an image is blended at once


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
          amp: bool) -> torch.Tensor:
    """Image (3, H, W) -> logits (K, H, W) fp32 on x's device, from blended windows, `batch` at a time."""
    H, W = x.shape[-2:]
    boxes = windows(H, W, crop, overlap)
    device = next(net.parameters()).device
    weight = blend_weight(*boxes[0][2:]).to(x.device)
    total = torch.zeros(H, W, device=x.device)
    out = None
    for i in range(0, len(boxes), batch):
        some = boxes[i:i + batch]
        tiles = torch.stack([x[:, t:t + h, l:l + w] for t, l, h, w in some])
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = net(tiles.to(device)).float().to(x.device)
        if len(boxes) == 1:
            return logits[0]
        if out is None:
            out = torch.zeros(logits.shape[1], H, W, device=x.device)
        for (t, l, h, w), z in zip(some, logits):
            out[:, t:t + h, l:l + w] += z * weight
            total[t:t + h, l:l + w] += weight
    return out.div_(total)


@torch.inference_mode()
def slide_rows(net: nn.Module, image: np.ndarray, norm: str, crop: int, overlap: float, batch: int,
               amp: bool, whole: int = ONE_PIECE) -> Iterator[tuple[np.ndarray, int]]:
    """Image (H, W, 3) uint8 -> class ids (H, W) uint8 that are final down to row n, and n, as rows are finished.

    Above `whole` pixels only the logits of one row of windows are held, not those of the image.
    """
    H, W = image.shape[:2]
    if H * W <= whole:
        logits = slide(net, normalise(image, norm), crop, overlap, batch, amp)
        yield logits.max(0).indices.byte().numpy(), H
        return
    tops = starts(H, crop, overlap)
    ids = np.empty((H, W), np.uint8)
    held = None  # logits below the finished rows, already weighted
    for top, below in zip(tops, [*tops[1:], H]):
        z = slide(net, normalise(image[top:top + crop], norm), crop, overlap, batch, amp)
        # A window's weight is row times column, so weighted rows of windows add up to the image's.
        z.mul_(hann(z.shape[1])[:, None])
        if held is not None:
            z[:, :held.shape[1]] += held
        done = below - top
        # argmax needs no division: at a pixel all classes have the same sum of weights.
        ids[top:below] = z[:, :done].max(0).indices.byte().numpy()
        held = z[:, done:]
        yield ids, below


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
