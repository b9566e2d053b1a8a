"""Augmentations: flips, turns and colour on uint8 arrays, MixUp and CutMix on batches. Every draw comes from `rng`."""
import numpy as np
import torch


def dihedral(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple:
    """One of the 8 symmetries of the square, all alike likely: seen from above no direction is special."""
    turns, flip = rng.integers(4), rng.integers(2)
    image, mask = np.rot90(image, turns), np.rot90(mask, turns)
    return (image[:, ::-1], mask[:, ::-1]) if flip else (image, mask)


def color(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """(H, W, 3) uint8 -> the same, brightness, contrast, saturation and white balance changed by up to `strength`."""
    if strength == 0:
        return image
    gain = rng.uniform(1 - strength, 1 + strength, 3)  # brightness, contrast, saturation
    tint = rng.uniform(1 - strength / 4, 1 + strength / 4, 3)  # per channel: haze and season shift white balance little
    mix = gain[1] * (gain[2] * np.eye(3) + (1 - gain[2]) / 3) * gain[0] * tint  # all of it is one 3 x 3 matrix ...
    shift = (1 - gain[1]) * image.mean() * gain[0] * tint
    x = image.reshape(-1, 3).astype(np.float32) @ mix.astype(np.float32)  # ... in a fifth of the time
    x += shift.astype(np.float32)
    return x.clip(0, 255).astype(np.uint8).reshape(image.shape)


def mixup(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, alpha: float = 0.2) -> tuple:
    """Batch -> (mixed x, y, y2, share): train on share * loss(y) + (1 - share) * loss(y2). Zhang et al. 2018."""
    share = float(rng.beta(alpha, alpha))
    other = torch.from_numpy(rng.permutation(len(x))).to(x.device)
    return share * x + (1 - share) * x[other], y, y[other], share


def cutmix(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator) -> tuple:
    """Batch -> (x, y) with one box per batch taken from another image, labels (B, H, W) too. Yun et al. 2019."""
    H, W = x.shape[-2:]
    side = (1 - rng.uniform(0, 1)) ** 0.5  # area share uniform in 0..1
    h, w = max(1, round(H * side)), max(1, round(W * side))
    top, left = rng.integers(H - h + 1), rng.integers(W - w + 1)
    other = torch.from_numpy(rng.permutation(len(x))).to(x.device)
    box = (..., slice(top, top + h), slice(left, left + w))
    x, y = x.clone(), y.clone()
    x[box], y[box] = x[other][box], y[other][box]
    return x, y


def cutmix_scenes(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator) -> tuple:
    """cutmix for one label per image, y (B,): batch -> (x, y, y2, share), to be trained on like mixup."""
    H, W = x.shape[-2:]
    side = rng.uniform() ** 0.5  # area share uniform in 0..1
    h, w = round(H * side), round(W * side)
    top, left = rng.integers(H - h + 1), rng.integers(W - w + 1)
    other = torch.from_numpy(rng.permutation(len(x))).to(x.device)
    x = x.clone()
    x[..., top:top + h, left:left + w] = x[other][..., top:top + h, left:left + w]
    return x, y, y[other], 1 - h * w / (H * W)
