"""Batch samplers as pure functions of (seed, step): no state to save, the same samples for any number of ranks.

    StepSampler(len(train), 8, 900, seed=0)                                              every image equally often
    StepSampler(len(train), 8, 900, seed=0, weights=difficulty_weights(hard_classes(cms)))     hard images more often
    StepSampler(len(train), 8, 900, seed=0, weights=balanced_weights(counts))            every class equally often
    StepSampler(len(train), 8, 900, seed=0, items=replicated(train.names, listed))       listed images once more

Weights and lists go by image, never by file copies: whatever is drawn again is the same entry of the training list.
"""
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .common import BadInput, read_json


class StepSampler:
    """Yields, for step = start..steps-1, this rank's list of (index, draw), `draw` counting samples over all ranks.

    One pass over the n samples after another, each in its own order. With the same global batch (batch * world), 1 rank
    and 8 ranks see the same samples in the same step, and each of them in one rank only.

    items: the indices that a pass goes over, with repetitions; None = 0..n-1.
    weights: (n,) per sample; draws are then with replacement, len(items) of them in a pass too.
    """

    def __init__(self, n: int, batch: int, steps: int, seed: int, start: int = 0, rank: int = 0, world: int = 1,
                 items: Sequence[int] | None = None, weights: np.ndarray | None = None):
        self.items = np.arange(n) if items is None else np.asarray(items)
        self.share = None if weights is None else np.asarray(weights, np.float64)[self.items]
        if self.share is not None:
            if not (np.isfinite(self.share).all() and (self.share >= 0).all() and self.share.sum() > 0):
                raise BadInput(f"sampling weights from {self.share.min()} to {self.share.max()}; expected finite ones "
                               "from 0, not all 0")
            self.share = self.share / self.share.sum()
        self.batch, self.steps, self.seed = batch, steps, seed
        self.start, self.rank, self.world = start, rank, world

    def __len__(self):
        return self.steps - self.start

    def order(self, epoch: int) -> np.ndarray:
        """The samples of one pass, len(items) of them."""
        rng, n = np.random.default_rng((1, self.seed, epoch)), len(self.items)
        return self.items[rng.permutation(n) if self.share is None else rng.choice(n, n, p=self.share)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        for step in range(self.start, self.steps):
            first = (step * self.world + self.rank) * self.batch
            batch = []
            for draw in range(first, first + self.batch):
                if draw // len(self.items) != epoch:
                    epoch = draw // len(self.items)
                    order = self.order(epoch)
                batch.append((int(order[draw % len(self.items)]), draw))
            yield batch


def hard_classes(matrices: np.ndarray, below: float = 0.5) -> np.ndarray:
    """Confusion matrices (N, K, K) of single images, rows true -> (N,) int: classes in the image with IoU < `below`.

    A class without a true pixel in an image is not one of its classes, whatever was predicted there.
    """
    m = np.asarray(matrices, np.float64)
    tp, true, pred = np.einsum("nkk->nk", m), m.sum(2), m.sum(1)
    return ((true > 0) & (tp < below * (true + pred - tp))).sum(1)


def difficulty_weights(hard: np.ndarray, limits: Sequence[int] = (0, 2, 4),
                       weights: Sequence[float] = (1, 2, 4, 6)) -> np.ndarray:
    """Hard classes per image (N,) -> weight (N,): 1 up to 0 of them, 2 up to 2, 4 up to 4, 6 above (the KD report)."""
    if len(weights) != len(limits) + 1 or list(limits) != sorted(set(limits)):
        raise BadInput(f"difficulty limits {list(limits)} with weights {list(weights)}; expected rising limits and one "
                       "weight more than limits")
    return np.asarray(weights, np.float64)[np.searchsorted(limits, hard)]


def balanced_weights(counts: np.ndarray) -> np.ndarray:
    """Pixels per image and class (N, K) -> weight (N,) of choosing a class, then one of the images that have it."""
    has = np.asarray(counts) > 0
    images = has.sum(0)  # with the class
    weights = (has[:, images > 0] / images[images > 0]).sum(1)
    if not weights.any():
        raise BadInput("no labelled pixel in any training mask; nothing to balance")
    return weights


def rich(counts: np.ndarray, classes: Sequence[int], share: float) -> np.ndarray:
    """Indices of the images (N, K) where one of `classes` has at least `share` of the labelled pixels."""
    counts = np.asarray(counts, np.float64)
    part = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return np.flatnonzero((part[:, list(classes)] >= share).any(1))


def replicated(names: Sequence[str], listed: Sequence[str]) -> np.ndarray:
    """Training names, names to repeat (one listed twice: two more times) -> indices 0..n-1, then the repeated."""
    at = {name: i for i, name in enumerate(names)}
    for name in listed:
        if name not in at:
            raise BadInput(f"{name!r} is to be repeated but is no training image; names look like {names[0]!r}")
    return np.array([*range(len(names)), *(at[name] for name in listed)])


# ---- what users give

def share_of(text: str | None) -> float | None:
    """--replicate: "5%" -> 0.05; None for a file, or for nothing. A share outside 0..100 % is a BadInput."""
    if not text or not text.endswith("%"):
        return None
    try:
        share = float(text[:-1]) / 100
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise BadInput(f"--replicate {text}: expected a share above 0% and up to 100%, or a file of "
                       "image names")
    return share


def read_difficulty(path: str | Path, names: Sequence[str]) -> dict[str, int]:
    """difficulty.json of eval.py -> {name: number of hard classes} of these training images."""
    advice = "make the file with python eval.py RUN --split train --difficulty, of a run on these images"
    hard = read_json(path)
    if not isinstance(hard, dict):
        raise BadInput(f"{path}: no {{name: number}} in it; {advice}")
    for name in names:
        if type(hard.get(name)) is not int or hard[name] < 0:
            raise BadInput(f"{path}: no number for {name!r}; {advice}")
    return {name: hard[name] for name in names}
