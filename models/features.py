"""What a backbone says of images: a vector each while a network predicts, or maps that are kept.

    features = MeanFeatures(net)
    logits = slide(net, x, **window)          however many windows the image has
    vector = features.take()                  (C,) float64, the mean over their pixels

    kept, kept_val = open_kept("features", net, sha256, amp, source, Views(train, 4), drawn, val,
                               crop=512, overlap=0.25)
    for text in keep_all(net, kept, kept_val, 16, amp, workers=2, reads=64_000, validations=20):
        print(text)                           what it takes, and does it pay, before it is computed
"""
import math
import os
import shlex
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from data.common import BadInput, minutes, progress
from data.datasets import SegDataset, normalise
from data.source import Source
from data.views import Kept, Views, Windows, make_folders, size_text

from .deeplab import DeepLabV3
from .efficientnet_unet import EfficientNetUnet
from .heads import Segmenter
from .infer import windows
from .run import from_rank_0, keep_signals_from_worker, rank_and_world, wait

VIEWS = 4  # of an image, where a run keeps features and names no other number

# Kept maps may differ by so much from computed ones, as a share of their mean: bf16 on another
# device gives about 0.01, other weights or pixels 0.5 and more.
TOLERANCE = 0.1


# ---- one vector per image

def last_map(net: nn.Module) -> nn.Module:
    """The part of a segmentation network whose output is, or ends with, its backbone's last map."""
    if isinstance(net, DeepLabV3):
        return net.backbone.layer4
    if isinstance(net, EfficientNetUnet):
        return net.encoder[-1]
    return net.backbone  # of a ViT (maps, cls), of the UNetFormers the maps


class MeanFeatures:
    """Mean of a backbone's last map, of a ViT its patch tokens, over all windows since take()."""

    def __init__(self, net: nn.Module):
        self.total = 0.0
        self.windows = 0
        last_map(net).register_forward_hook(self.add)

    def add(self, module: nn.Module, inputs: tuple, found: torch.Tensor | tuple | list) -> None:
        """Called by torch with what the backbone returns for a batch of windows."""
        if isinstance(found, tuple):
            found = found[0]
        if isinstance(found, list):
            found = found[-1]
        means = found.double().mean((2, 3))  # (B, C)
        self.total = self.total + means.sum(0)
        self.windows += len(means)

    def take(self) -> torch.Tensor:
        """(C,) float64, and a fresh start for the next image."""
        vector = self.total / self.windows
        self.total = 0.0
        self.windows = 0
        return vector


# ---- kept maps of fixed views

def open_kept(folder: str, net: Segmenter, weights: str, amp: bool, source: Source, views: Views,
              drawn: dict, val: SegDataset | None, crop: int,
              overlap: float) -> tuple[Kept, Kept | None]:
    """Files for the maps that net's head reads: of fixed views of train, of val's windows or None.

    weights: sha256 of the backbone. drawn: all that decides the views' pixels and masks, beside
    the crop. Nothing is made or computed yet.
    """
    shapes = partial(map_shapes, net.backbone.patch, net.backbone.dim, len(net.taps))
    # Not what the head, the loss or the rate is: runs that differ in these alone share the files.
    about = dict(weights=weights, taps=net.taps, feat_norm=net.feat_norm, amp=amp, crop=crop,
                 norm=views.data.norm, reading=source.reading)
    about_train = dict(split="train", files=source.hashes("train"))
    kept = Kept(folder, views, about | drawn | about_train, shapes)
    if val is None:
        return kept, None
    boxes = [windows(*source.size(*pair), crop, overlap) for pair in val.files]
    about_val = dict(split=source.picks, files=source.hashes(source.picks), overlap=overlap)
    return kept, Kept(folder, Windows(val, boxes), about | about_val, shapes)


def map_shapes(patch: int, dim: int, taps: int, size: tuple[int, int]) -> list[tuple]:
    """(C, h, w) of each tap for an image (H, W), which is padded to whole patches."""
    h, w = (-(-n // patch) for n in size)
    return [(dim, h, w)] * taps


@torch.inference_mode()
def compute_maps(net: Segmenter, images: list[np.ndarray], norm: str,
                 amp: bool) -> list[torch.Tensor]:
    """Images (H, W, 3) uint8 of one size -> the maps of net's taps, each (B, C, h, w) bf16, CPU."""
    device = next(net.parameters()).device
    x = torch.stack([normalise(image, norm) for image in images]).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        maps, _ = net.backbone(x, net.taps, net.feat_norm)
    return [t.to(torch.bfloat16).cpu() for t in maps]


def keep(net: Segmenter, kept: Kept, views: list[tuple], amp: bool) -> None:
    """Computes and writes views [(k, what sample(k) gave), ...], those of one size at once."""
    # Windows of small images are as small as these.
    by_size = {}
    for k, arrays in views:
        by_size.setdefault(arrays[0].shape, []).append((k, arrays))
    for group in by_size.values():
        maps = compute_maps(net, [arrays[0] for _, arrays in group], kept.views.data.norm, amp)
        for (k, arrays), *own in zip(group, *maps):
            kept.write(k, arrays, own)


def check_kept(net: Segmenter, kept: Kept, k: int, amp: bool) -> None:
    """BadInput where view k is not what is drawn and computed now by the same flags."""
    # Other pixels of the image show in its maps.
    (_, *kept_masks), kept_maps = kept.read(k)
    image, *masks = kept.views.sample(k)
    maps = compute_maps(net, [image], kept.views.data.norm, amp)
    same = all(map(np.array_equal, kept_masks, masks))
    for was, (now,) in zip(kept_maps, maps):
        off = (was.float() - now.float()).abs().mean() / now.float().abs().mean()
        same = same and bool(off <= TOLERANCE)
    if not same:
        raise BadInput(f"{kept.file(k)}: not what is drawn and computed now, so another version of "
                       f"this code has made it; type rm -r {shlex.quote(str(kept.folder))}, then "
                       "the same command")


def keep_all(net: Segmenter, kept: Kept, kept_val: Kept | None, batch: int, amp: bool, workers: int,
             reads: int, validations: int) -> Iterator[str]:
    """Computes all missing maps of both; before each, lines of text: what it takes, does it pay.

    reads: how often the run takes a view of train, over all ranks; validations: all windows of val.
    A disk too small for both is a BadInput.
    """
    parts = [(kept, reads)]
    if kept_val is not None:
        parts.append((kept_val, validations * kept_val.number))
    missing = from_rank_0(partial(make_folders, [part for part, _ in parts]))
    for (part, times), views in zip(parts, missing):
        yield first_batch(net, part, views, batch, amp, times)
        keep_missing(net, part, views, batch, amp, workers)


def first_batch(net: Segmenter, kept: Kept, missing: list[int], batch: int, amp: bool,
                reads: int) -> str:
    """Checks a view that is there, computes a first batch of the missing ones -> lines of text."""
    rank, world = rank_and_world()
    number, size = kept.number, sum(kept.sizes)
    folder = shlex.quote(str(kept.folder))
    text = f"features {number} views, {size_text(size)}, in {folder} (rm -r removes them)"
    other = kept.differs()
    if other:
        text += f"\n         {other}"
    if len(missing) < number:
        there = set(range(number)) - set(missing)
        check_kept(net, kept, min(there), amp)
        text += f"\n         {len(there)} are there, one compared with the backbone"
    mine = missing[rank::world][:batch]
    if not mine:
        return text

    # Measured on what has to be computed anyway: the estimate costs nothing.
    views = [(k, kept.views.sample(k)) for k in mine]
    # The first image alone: a first call takes longer.
    keep(net, kept, views[:1], amp)
    began = time.perf_counter()
    timed = views[1:] or views
    keep(net, kept, timed, amp)
    computing = (time.perf_counter() - began) / len(timed)
    reading = reading_time(kept, [k for k, _ in timed])

    # Seconds: all ranks compute and read at the same time.
    filling = len(missing) * computing / world
    without = reads * computing / world
    pays = filling + reads * reading / world < without
    text += (f"\n         computing one takes {computing:.4f} s, reading {reading:.4f} s; filling "
             f"takes {minutes(filling)}, without it this run computes {reads} in "
             f"{minutes(without)}")
    if not pays:
        text += "\n         WARNING it does not pay in this run alone"
    return text


def reading_time(kept: Kept, views: list[int]) -> float:
    """Seconds to read a view: from the disk, if memory is too small to hold all views."""
    if not hasattr(os, "posix_fadvise"):  # macOS, Windows: how they read from memory
        memory = math.inf
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if sum(kept.sizes) > memory / 2:
        for k in views:
            forget(kept.file(k))
    began = time.perf_counter()
    for k in views:
        kept.read(k)
    return (time.perf_counter() - began) / len(views)


def forget(file: Path) -> None:
    """Lets the system drop a file from memory."""
    with open(file, "rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def keep_missing(net: Segmenter, kept: Kept, missing: list[int], batch: int, amp: bool,
                 workers: int) -> None:
    """Computes the missing views, each rank its share, with progress and ETA; waits for all ranks.

    Killed, the same command goes on where it was.
    """
    rank, world = rank_and_world()
    # The first batch, or another run, has computed some meanwhile.
    still = set(kept.missing())
    mine = [k for k in missing[rank::world] if k in still]
    loader = DataLoader(Numbered(kept.views), batch_size=batch, sampler=mine, num_workers=workers,
                        collate_fn=list, worker_init_fn=keep_signals_from_worker)
    for views in progress(loader, "batches of features"):
        keep(net, kept, views, amp)
    wait()


class Numbered(torch.utils.data.Dataset):
    """k -> (k, what sample(k) gives): the file of a view is named by its number."""

    def __init__(self, views: Views | Windows):
        self.views = views

    def __getitem__(self, k):
        return k, self.views.sample(k)

