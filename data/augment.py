"""Augmentations: flips, turns and colour on uint8 arrays, MixUp and CutMix on batches.

    image, mask = dihedral(image, mask, rng)
    image = color(image, rng, 0.2)
    x, targets = mix(x, y, rng, 0.5, 0.2)    then sum share * loss(net(x), y) over the targets

Every draw comes from `rng`, a np.random.Generator.
"""
import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

# What a batch is trained on: the sum of share * loss(logits, y), the shares add up to 1.
Targets = list[tuple[float, Tensor]]


def dihedral(image: np.ndarray, mask: np.ndarray, rng: Generator) -> tuple:
    """One of the 8 symmetries of the square, all alike likely, for image and mask."""
    # Seen from above no direction is special.
    turns = rng.integers(4)
    flip = rng.integers(2)
    image = np.rot90(image, turns)
    mask = np.rot90(mask, turns)
    if flip:
        image = image[:, ::-1]
        mask = mask[:, ::-1]
    return image, mask


def color(image: np.ndarray, rng: Generator, strength: float) -> np.ndarray:
    """(H, W, 3) uint8 -> the same with another brightness, contrast, saturation and white balance.

    `strength` 0..1: how much they change at most; the white balance by a quarter of it.
    """
    if strength == 0:
        return image
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    # Haze and season shift the white balance little.
    tint = rng.uniform(1 - strength / 4, 1 + strength / 4, 3)

    # All of it is one 3 x 3 matrix and one shift: that takes a fifth of the time.
    matrix = saturation * np.eye(3) + (1 - saturation) / 3
    matrix = contrast * matrix * brightness * tint
    shift = (1 - contrast) * image.mean() * brightness * tint
    x = image.reshape(-1, 3).astype(np.float32)
    x = x @ matrix.astype(np.float32)
    x += shift.astype(np.float32)
    # A cut-off at 0 and 255, as a camera has it.
    x = x.clip(0, 255).astype(np.uint8)
    return x.reshape(image.shape)


def mix(x: Tensor, y: Tensor, rng: Generator, cutmix_p: float,
        mixup_p: float) -> tuple[Tensor, Targets]:
    """Batch -> (x, targets [(share, y), ...]): CutMix and MixUp, each by its probability."""
    # MixUp may come on top of CutMix.
    if rng.random() < cutmix_p:
        x, y = cutmix(x, y, rng)
    # Labels cannot be mixed as colours can: the loss is, with the same shares.
    targets = [(1.0, y)]
    if rng.random() < mixup_p:
        x, y, other, share = mixup(x, y, rng)
        targets = [(share, y), (1 - share, other)]
    return x, targets


def mixup(x: Tensor, y: Tensor, rng: Generator, alpha: float = 0.2) -> tuple:
    """Batch -> (mixed x, y, y2, share): train on share * loss(y) + (1 - share) * loss(y2).

    Zhang et al. 2018, https://arxiv.org/abs/1710.09412
    """
    # Beta(0.2, 0.2): most images stay nearly what they are.
    share = float(rng.beta(alpha, alpha))
    other = partners(x, rng)
    mixed = share * x + (1 - share) * x[other]
    return mixed, y, y[other], share


def cutmix(x: Tensor, y: Tensor, rng: Generator) -> tuple[Tensor, Tensor]:
    """Batch -> (x, y) with one box per batch taken from another image, labels (B, H, W) too.

    Yun et al. 2019, https://arxiv.org/abs/1905.04899
    """
    H, W = x.shape[-2:]
    # The share of the area is uniform in 0..1; the box has at least one pixel.
    side = (1 - rng.uniform(0, 1)) ** 0.5
    h = max(1, round(H * side))
    w = max(1, round(W * side))
    box = random_box(H, W, h, w, rng)
    other = partners(x, rng)
    # The caller's batch stays as it is.
    x, y = x.clone(), y.clone()
    x[box] = x[other][box]
    y[box] = y[other][box]
    return x, y


def cutmix_scenes(x: Tensor, y: Tensor, rng: Generator) -> tuple:
    """CutMix for one label per image, y (B,): batch -> (x, y, y2, share), as from mixup()."""
    H, W = x.shape[-2:]
    # The share of the area is uniform in 0..1; an empty box leaves the images as they are.
    side = rng.uniform() ** 0.5
    h = round(H * side)
    w = round(W * side)
    box = random_box(H, W, h, w, rng)
    other = partners(x, rng)
    x = x.clone()
    x[box] = x[other][box]
    share = 1 - h * w / (H * W)
    return x, y, y[other], share


def random_box(H: int, W: int, h: int, w: int, rng: Generator) -> tuple:
    """Index (..., rows, columns) of an h x w box anywhere in H x W."""
    top = rng.integers(H - h + 1)
    left = rng.integers(W - w + 1)
    rows = slice(top, top + h)
    columns = slice(left, left + w)
    return ..., rows, columns


def partners(x: Tensor, rng: Generator) -> Tensor:
    """(B,) indices: for every image another one of the batch, or itself."""
    order = rng.permutation(len(x))
    return torch.from_numpy(order).to(x.device, non_blocking=True)
