"""Sliding windows over images of any size, blended without seams, and the score of a whole split.

    window = dict(crop=512, overlap=0.25, batch=8, amp=False)
    logits = slide(net, x, **window)          image (3, H, W) -> logits (K, H, W) fp32
    for rows, logits in slide_down(net, x, **window):    the same, some rows after the other
    cm = evaluate(net, dataset, window)       (K, K) int64 confusion matrix
    for rows in slide_rows(net, scene.read, scene.shape, "imagenet", **window):
        ids = rows.ids()                      an image of any size, from top to bottom

A crop that begins where windows do gets the classes of its place in the image, away from the rim by
a window. Of any other crop 88 % of those pixels do without overlap, 90 % with .25, 92 % with .5 and
93 % with .75 (tests/bench_predict.py --crops --seams 640, a demo run of 1,200 steps).
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from data import metrics
from data.common import IGNORE, BadInput, even_sample, progress
from data.datasets import normalise, normalised
from data.tiff import TILE
from data.views import Kept

from . import calibrate
from .run import keep_signals_from_worker, over_ranks, rank_and_world, to_device

ONE_PIECE = 2**22  # pixels: up to so many an image is blended at once
LOGITS = 200_000_000  # bytes: at most so many for the logits of one row of windows
CACHED_ROWS = 4  # whose classes are found at a time
FEW_ROWS = 64  # of which probabilities are computed at a time


# ---- windows

def starts(n: int, size: int, overlap: float) -> list[int]:
    """Where windows of `size` begin along n pixels; the last one is shifted inwards."""
    if n <= size:
        return [0]
    # 20 * (1 - 0.9) is a little below 2 in binary numbers: without round() the step would be 1.
    step = max(1, int(round(size * (1 - overlap), 6)))
    return [*range(0, n - size, step), n - size]


def windows(H: int, W: int, size: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """(top, left, h, w) of the windows that cover H x W, row by row."""
    h, w = min(size, H), min(size, W)
    boxes = []
    for top in starts(H, size, overlap):
        boxes += [(top, left, h, w) for left in starts(W, size, overlap)]
    return boxes


def with_data(boxes: list[tuple], valid: np.ndarray | None) -> list[tuple]:
    """The boxes in which a pixel is valid, (H, W) bool; all where that is None."""
    if valid is None:
        return boxes
    return [(t, l, h, w) for t, l, h, w in boxes if valid[t:t + h, l:l + w].any()]


def hann(n: int) -> torch.Tensor:
    """(n,) Hann weights without the zeros at both ends: the edge of a window still counts."""
    return torch.hann_window(n + 2, periodic=False)[1:-1].clamp(min=1e-3)


def total_hann(n: int, size: int, overlap: float) -> torch.Tensor:
    """(n,) sum of the Hann weights of all windows along n pixels."""
    total = torch.zeros(n)
    for start in starts(n, size, overlap):
        total[start:start + size] += hann(min(size, n))
    return total


def blend_weight(h: int, w: int) -> torch.Tensor:
    """(h, w) weights of a window's pixels: its middle counts most."""
    return hann(h)[:, None] * hann(w)


def window_logits(net: nn.Module, x: torch.Tensor, boxes: list[tuple], batch: int, amp: bool,
                  norm: str | None = None,
                  maps: Callable | None = None) -> Iterator[tuple[tuple, torch.Tensor]]:
    """The boxes (top, left, h, w) of an image (3, H, W), each with its logits (K, h, w) fp32.

    The logits lie on net's device; x may lie on the CPU: only windows are moved. norm: of an x in
    uint8, to be normalised by this name of NORMS. maps(i, j) -> what the backbone gives for boxes
    i..j, where that is known.
    """
    device = next(net.parameters()).device
    for i in range(0, len(boxes), batch):
        group = boxes[i:i + batch]
        tiles = torch.stack([x[:, t:t + h, l:l + w] for t, l, h, w in group])
        tiles = to_device(tiles.contiguous(), device)
        if norm is not None:
            tiles = normalised(tiles, norm)
        known = maps(i, i + len(group)) if maps else ()
        known = [to_device(t, device) for t in known]
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = net(tiles, *known).float()
        yield from zip(group, logits)


def slide(net: nn.Module, x: torch.Tensor, crop: int, overlap: float, batch: int,
          amp: bool, valid: np.ndarray | None = None) -> torch.Tensor:
    """Image (3, H, W) -> logits (K, H, W) fp32 on net's device, from blended windows.

    batch: windows that are computed at once. valid: (H, W) bool, True somewhere; windows without a
    valid pixel are not computed: 0.
    """
    _, logits = next(slide_down(net, x, crop, overlap, batch, amp, valid, whole=True))
    return logits


@torch.inference_mode()
def slide_down(net: nn.Module, x: torch.Tensor, crop: int, overlap: float, batch: int, amp: bool,
               valid: np.ndarray | None = None, whole: bool = False,
               norm: str | None = None,
               maps: Callable | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
    """As slide(), but (rows, logits (K, n, W)) of some rows after the other, from top to bottom.

    Memory depends on the width of the image, not on its height. The logits are good until the next
    ones are asked for. whole: all rows at once; needed for `valid`. norm, maps: of window_logits().
    """
    H, W = x.shape[-2:]
    boxes = with_data(windows(H, W, crop, overlap), valid)
    # All windows are of one size, and so have the same weights.
    h, w = boxes[0][2:]
    device = next(net.parameters()).device
    weight = blend_weight(h, w).to(device)
    # Rows top..top + height are held: no window that is still to come reaches those above.
    top, height = 0, H if whole else h
    total = None  # (K, height, W), made when the network has told K
    total_weight = torch.zeros(height, W, device=device)

    def blended(n):  # the first n of the rows that are held
        share = total_weight[:n]
        share[share == 0] = 1  # Where no window was computed the logits stay 0.
        return total[:, :n].div_(share)

    for (t, l, _, _), logits in window_logits(net, x, boxes, batch, amp, norm, maps):
        # One window is the whole image: nothing to blend.
        if (h, w) == (H, W):
            yield slice(0, H), logits
            return
        if total is None:
            total = torch.zeros(len(logits), height, W, device=device)
        n = t - top
        if n > 0 and not whole:
            yield slice(top, t), blended(n)
            # The other rows move up.
            for sums in (total, total_weight):
                kept = sums[..., n:, :].clone()
                sums.zero_()
                sums[..., :height - n, :] = kept
            top = t
        rows = slice(t - top, t - top + h)
        total[:, rows, l:l + w] += logits * weight
        total_weight[rows, l:l + w] += weight
    yield slice(top, H), blended(H - top)


def best_class(logits: torch.Tensor) -> torch.Tensor:
    """(K, ...) -> (...) uint8, the class of the highest one; ten times faster than argmax on a CPU."""
    return logits.max(0).indices.byte()


def class_ids(logits: torch.Tensor) -> np.ndarray:
    """(K, h, w) -> (h, w) uint8: the class of the highest one, of equal ones the first."""
    if logits.device.type != "cpu":
        return best_class(logits).cpu().numpy()
    # torch's max finds indices of eight bytes. With bytes, and rows that stay in the CPU's cache,
    # this takes a quarter of its time.
    all_scores = logits.numpy()
    ids = np.zeros(all_scores.shape[1:], np.uint8)
    for i in range(0, len(ids), CACHED_ROWS):
        rows = slice(i, i + CACHED_ROWS)
        best = all_scores[0, rows].copy()
        for k in range(1, len(all_scores)):
            scores = all_scores[k, rows]
            # k is larger than what is in ids: the maximum puts it where this class is better.
            better = (scores > best).view(np.uint8)
            np.maximum(ids[rows], better * np.uint8(k), out=ids[rows])
            np.maximum(best, scores, out=best)
    return ids


# ---- images of any size

@dataclass
class FinishedRows:
    """Rows of an image for which all windows have been computed; good until the next ones are."""
    top: int  # number of the first row
    logits: torch.Tensor | None  # (K, n, W), times `weight`; None where no pixel is valid
    weight: torch.Tensor  # (n, W), sum of the weights of the windows
    valid: np.ndarray | None  # (n, W) bool, None where all are

    def ids(self) -> np.ndarray:
        """(n, W) uint8 classes, IGNORE where not valid."""
        if self.logits is None:
            return np.full(self.valid.shape, IGNORE, np.uint8)
        # No division: at a pixel all classes have the same sum of weights.
        ids = class_ids(self.logits)
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
            p = calibrate.probabilities(self.logits[:, rows], self.weight[rows] * temperature)
            if self.valid is not None:
                p = p * self.valid[rows, :, None]
            yield p


def panels(W: int, crop: int, overlap: float, classes: int) -> list[tuple[int, int, int, int]]:
    """(left, width, first, wide): an image in columns, so that rows of logits fit into memory.

    The windows that touch the columns left..left + width span first..first + wide. Multiples of
    512, the tiles of the result. Windows at the border between two panels are computed twice.
    """
    # A column of a row of windows takes 4 bytes for each class and row. Panels are at least four
    # windows wide, or too many windows would be computed twice.
    widest = max(LOGITS // (4 * classes * crop), 4 * crop)
    number = -(-W // widest)
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
               skip_empty: bool = True) -> Iterator[FinishedRows]:
    """An image of any size (H, W) -> its rows from `first` on, as they are finished.

    read(top, h) -> rows of it (h, W, 3) uint8, and (h, W) bool or None: what of them is data. Above
    `whole` pixels (ONE_PIECE) only the logits of one row of windows are held, not the image's.
    skip_empty: windows without data are not computed.
    """
    # Not slide_down(), which has the image in memory and divides every pixel by its weight: here
    # rows are read when they are needed, and classes need no division.
    H, W = size
    if first >= H:
        return
    device = next(net.parameters()).device
    if H * W <= (ONE_PIECE if whole is None else whole):
        image, valid = read(0, H)
        seen = valid if skip_empty else None
        logits = None
        if seen is None or seen.any():
            x = normalise(image, norm).to(device)
            logits = slide(net, x, crop, overlap, batch, amp, seen)[:, first:]
        weight = torch.ones(H, W, device=device)
        yield FinishedRows(first, logits, weight[first:], None if valid is None else valid[first:])
        return

    height = min(crop, H)  # rows that are computed at once
    row = windows(height, W, crop, overlap)
    weight = blend_weight(height, min(crop, W)).to(device)
    # A window's weight is row times column. The sum over all windows is, too: of rows by columns.
    down = total_hann(H, crop, overlap).to(device)[:, None]
    across = total_hann(W, crop, overlap).to(device)
    total = None  # (K, height, W): weighted logits of the windows so far; None: no pixel is data
    tops = starts(H, crop, overlap)
    for top, next_top in zip(tops, [*tops[1:], H]):
        if top + height <= first:
            continue
        image, valid = read(top, height)
        boxes = with_data(row, valid if skip_empty else None)
        if not boxes:
            total = None  # nobody asks for the logits of these rows
        else:
            x = normalise(image, norm).to(device)
            for (_, l, _, w), logits in window_logits(net, x, boxes, batch, amp):
                if total is None:
                    total = torch.zeros(len(logits), height, W, device=device)
                # In one pass: what blending costs is memory that is read and written.
                total[:, :, l:l + w].addcmul_(logits, weight)

        # No further window reaches the rows above the next one's top.
        done = next_top - top
        final = slice(max(first - top, 0), done)
        if final.start < final.stop:
            begin = top + final.start
            rows = FinishedRows(begin, None, down[begin:next_top] * across, None)
            if total is not None:
                rows.logits = total[:, final]
            if valid is not None:
                rows.valid = valid[final]
            yield rows
        # The next row of windows goes on with the rest.
        if total is not None:
            rest = total[:, done:].clone()
            total.zero_()[:, :height - done] = rest


# ---- a whole split

def ids_of(strips: Iterator[tuple[slice, torch.Tensor]]) -> torch.Tensor:
    """What slide_down() yields -> (H, W) uint8 classes."""
    return torch.cat([best_class(logits) for _, logits in strips])


def examples(net: nn.Module, data: Dataset, window: dict, n: int) -> list[tuple]:
    """(image, true ids, predicted ids, name) of n images spread over the data."""
    net.eval()
    rows = []
    for i in even_sample(range(len(data)), n):
        image, mask = data.read(i)
        strips = slide_down(net, as_tensor(image.copy()), **window, norm=data.norm)
        rows.append((image, mask, ids_of(strips).cpu().numpy(), data.names[i]))
    return rows


def as_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W), the same bytes."""
    return torch.from_numpy(image).permute(2, 0, 1)


class Bytes(Dataset):
    """Images (3, H, W) and labels (H, W) of a data set, both uint8, and their names.

    A fifth of what data[i] takes, which matters for scenes that several processes read.
    """

    def __init__(self, data: Dataset):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        image, mask = self.data.sample(i)
        # The cache's are read-only, which torch does not know.
        return as_tensor(np.array(image)), torch.from_numpy(np.array(mask)), self.data.names[i]


def predictions(net: nn.Module, data: Dataset, window: dict, workers: int = 0,
                what: str = "images",
                kept: Kept | None = None) -> Iterator[tuple[str, torch.Tensor, Iterator]]:
    """(name, labels (H, W) uint8, strips of slide_down()) of this rank's images of the data.

    All lies on net's device. window: crop, overlap, batch and amp of slide_down(). kept: the
    backbone's maps of all windows.
    """
    rank, world = rank_and_world()
    device = next(net.parameters()).device
    mine = range(rank, len(data), world)  # unpadded: no image is counted twice
    loader = DataLoader(Bytes(data), batch_size=None, sampler=mine, num_workers=workers,
                        prefetch_factor=1 if workers else None,
                        worker_init_fn=keep_signals_from_worker)
    for (x, y, name), i in zip(progress(loader, what), mine):
        maps = partial(kept.maps_of, i) if kept else None
        yield name, y.to(device), slide_down(net, x, **window, norm=data.norm, maps=maps)


def count_strips(cm: torch.Tensor, y: torch.Tensor, strips: Iterator) -> None:
    """Add the counts of an image, labels (H, W) and what slide_down() yields, to cm (k, k)."""
    for rows, logits in strips:
        cm += metrics.confusion(best_class(logits), y[rows], len(cm))


def rehearse(net: nn.Module, sizes: list[tuple[int, int]], window: dict, classes: int) -> None:
    """Two rows of windows of the widest of images of these sizes (H, W), as evaluate() takes them.

    What a GPU's memory is too small for fails now. No random number is drawn.
    """
    H, W = max(sizes, key=lambda size: size[1])
    device = next(net.parameters()).device
    was_training = net.training
    net.eval()
    x = torch.zeros(3, min(H, 2 * window["crop"]), W, dtype=torch.uint8)
    y = torch.zeros(H, W, dtype=torch.uint8, device=device)
    cm = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    count_strips(cm, y, slide_down(net, x, **window, norm="imagenet"))
    net.train(was_training)


def evaluate(net: nn.Module, data: Dataset, window: dict, workers: int = 0,
             classes: int | None = None, what: str = "validation",
             kept: Kept | None = None) -> torch.Tensor:
    """(k, k) int64 confusion matrix, rows true, of the whole data set, on every rank's CPU.

    classes: k, where the network's are not the data's. kept: the backbone's maps of all windows.
    Leaves net's mode as it was.
    """
    was_training = net.training
    net.eval()
    if dist.is_initialized():
        # BatchNorm's statistics differ between ranks until DDP's next forward.
        for statistics in net.buffers():
            dist.broadcast(statistics, 0)
    k = classes or len(data.labels.names)
    cm = torch.zeros(k, k, dtype=torch.int64, device=next(net.parameters()).device)
    for _, y, strips in predictions(net, data, window, workers, what, kept):
        count_strips(cm, y, strips)
    over_ranks(cm)  # not in the loop: ranks may have unequal numbers of images
    if not cm.any():
        raise BadInput(f"{data.names[0]} and {len(data) - 1} more: every pixel is ignored; correct "
                       '"ignore" in dataset.json')
    net.train(was_training)
    return cm.cpu()
