"""How sure a network really is: the temperature that its logits are divided by before the softmax.

    temperature = read_temperature(Path("runs/a"), sha256(Path("runs/a/best.safetensors")))
    sample.add(logits, y, sample.keys(y, i))  a fair sample of the pixels of a split, image by image
    temperature = fit_temperature(*sample.pixels())

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. One number for all pixels: the
winner stays the winner.
"""
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.common import IGNORE, BadInput, read_json

from .checkpoint import weights_file
from .run import from_all_ranks

PIXELS = 2**18  # of a split that the temperature is fitted on
LOWEST, HIGHEST = 0.02, 50  # temperatures beyond are a matter of a few pixels


def read_temperature(run: Path, sha256: str) -> float | None:
    """Of RUN/calibration.json; None without one, or where it is of weights of another sha256."""
    folder = weights_file(run).parent
    file = folder / "calibration.json"
    if not file.exists():
        return None
    found = read_json(file)
    if found.get("weights") != sha256:
        return None
    temperature = found.get("temperature")
    if type(temperature) not in (int, float) or not 0 < temperature < float("inf"):
        raise BadInput(f"{file}: the temperature {temperature!r}; expected a number above 0: take "
                       f"the file away, or type python eval.py {run} --split val --calibrate")
    return float(temperature)


class PixelSample:
    """`n` labelled pixels of a split, each as likely as any other, the same over any ranks."""

    def __init__(self, n: int = PIXELS):
        self.n = n
        self.parts = []  # (keys (m,), logits (m, K), labels (m,)) of images
        self.held = 0

    def keys(self, y: Tensor, image: int) -> Tensor:
        """A random number for each pixel that may be of the sample: (H, W) float64 on the CPU.

        y: labels (H, W) with IGNORE of an image. image: its number in the split. Infinity where a
        pixel has no label, or n others of its image have lower numbers.
        """
        labelled = (y != IGNORE).cpu()
        # The 10 keeps these draws apart from all others. A pixel's key depends on nothing but its
        # image, and the pixels with the n lowest keys of all are the sample.
        drawn = np.random.default_rng((10, image)).random(int(labelled.sum()))
        if len(drawn) > self.n:
            drawn[drawn > np.partition(drawn, self.n - 1)[self.n - 1]] = np.inf
        keys = torch.full(y.shape, torch.inf, dtype=torch.float64)
        keys[labelled] = torch.from_numpy(drawn)
        return keys

    def add(self, logits: Tensor, y: Tensor, keys: Tensor) -> None:
        """Logits (K, H, W), labels (H, W) and their keys(), of an image or of some of its rows."""
        keys = keys.flatten()
        where = keys.isfinite().nonzero()[:, 0]
        here = where.to(logits.device)
        z = logits.flatten(1)[:, here].T.float().cpu()
        self.parts.append((keys[where], z, y.flatten()[here].long().cpu()))
        self.held += len(where)
        if self.held > 2 * self.n:
            self.parts = [self.lowest(self.parts)]
            self.held = len(self.parts[0][0])

    def lowest(self, parts: list[tuple]) -> tuple[Tensor, Tensor, Tensor]:
        """The pixels with the n lowest keys, in the order of their keys."""
        keys, z, y = (torch.cat(part) for part in zip(*parts))
        order = keys.argsort(stable=True)[:self.n]
        return keys[order], z[order], y[order]

    def pixels(self) -> tuple[Tensor, Tensor]:
        """Logits (m, K) and labels (m,) of the sample of all ranks, the same on every one."""
        parts = [self.lowest(self.parts)] if self.parts else []
        _, z, y = self.lowest(from_all_ranks(parts))
        return z, y


def fit_temperature(logits: Tensor, y: Tensor) -> float:
    """The temperature with the lowest negative log-likelihood of labels (n,) for logits (n, K)."""
    z = logits.double()
    z = z - z.gather(1, y[:, None])  # so that the likelihood of the label is 1 / sum(exp(z))

    # In 1 / temperature the loss is convex, so its slope rises: halve the range where it changes
    # its sign. Forty times give eleven digits.
    low, high = np.log(1 / HIGHEST), np.log(1 / LOWEST)
    for _ in range(40):
        middle = (low + high) / 2
        p = (np.exp(middle) * z).softmax(1)
        if (p * z).sum(1).mean() > 0:
            high = middle
        else:
            low = middle
    return float(np.exp(-(low + high) / 2))


def log_loss(logits: Tensor, y: Tensor, temperature: float) -> float:
    """Mean negative log-likelihood per pixel."""
    return torch.nn.functional.cross_entropy(logits.double() / temperature, y).item()


def confidence(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits (K, ...) -> the probability of the winner (...), float32."""
    # The winner's exponential is 1: no division of the whole softmax.
    z = logits - logits.amax(0)
    if temperature != 1:
        z /= temperature
    return z.exp_().sum(0).reciprocal()


def probabilities(logits: Tensor, temperature: float | Tensor = 1.0) -> np.ndarray:
    """Logits (K, H, W) -> (H, W, K) uint8, 255 times the probabilities.

    temperature: one for all pixels, or one for each, (H, W).
    """
    p = (logits / temperature).softmax(0)
    return p.mul_(255).round_().byte().permute(1, 2, 0).cpu().numpy()
