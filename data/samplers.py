"""Batch samplers as pure functions of (seed, step): no state, the same samples for any world size.

    StepSampler(n, 8, 900, seed=0)                     900 batches of 8, images equally often
    StepSampler(n, 8, 900, seed=0, weights=weights)    hard images more often, or rare classes
    StepSampler(n, 8, 900, seed=0, items=items)        listed images once more

    weights = difficulty_weights(hard_classes(matrices))    or balanced_weights(counts)
    items = replicated(names, listed)

Weights and lists go by image, never by file copies: whatever is drawn again is the same entry of
the training list.
"""
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .common import BadInput, number, read_json

# The KD report's rule: images with up to 0, 2, 4 and with more hard classes have these weights.
LIMITS = (0, 2, 4)
WEIGHTS = (1, 2, 4, 6)


class StepSampler:
    """Yields for every step this rank's list of (index, draw).

    `draw` counts samples over all ranks. One pass over the n samples follows another, each in its
    own order. With the same global batch (batch * world), 1 rank and 8 ranks see the same samples
    in the same step, each sample in one rank only.

    start: the first step, for a resumed run.
    items: the indices that a pass goes over, with repetitions; None = 0..n-1.
    weights: (n,) per sample; draws are then with replacement, len(items) of them in a pass too.
    """

    def __init__(self, n: int, batch: int, steps: int, seed: int, start: int = 0,
                 rank: int = 0, world: int = 1, items: Sequence[int] | None = None,
                 weights: np.ndarray | None = None):
        # The weights go by sample; a repeated item has its weight each time.
        self.items = np.arange(n) if items is None else np.asarray(items)
        self.share = None
        if weights is not None:
            self.share = shares(np.asarray(weights, np.float64)[self.items])
        self.batch = batch
        self.steps = steps
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world = world

    def __len__(self):
        return self.steps - self.start

    def order(self, epoch: int) -> np.ndarray:
        """The samples of one pass, len(items) of them."""
        # The 1 keeps these draws apart from all others of the same seed.
        rng = np.random.default_rng((1, self.seed, epoch))
        n = len(self.items)
        if self.share is None:
            return self.items[rng.permutation(n)]
        # With replacement: a heavy sample comes several times in a pass, a light one perhaps never.
        return self.items[rng.choice(n, n, p=self.share)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        n = len(self.items)
        epoch = -1
        order = None
        for step in range(self.start, self.steps):
            # Ranks take turns: step 0 of rank 0, of rank 1, ..., step 1 of rank 0.
            first = (step * self.world + self.rank) * self.batch
            batch = []
            for draw in range(first, first + self.batch):
                # A batch may reach into the next pass.
                if draw // n != epoch:
                    epoch = draw // n
                    order = self.order(epoch)
                index = int(order[draw % n])
                batch.append((index, draw))
            yield batch


def shares(weights: np.ndarray) -> np.ndarray:
    """Weights that sum to 1."""
    usable = np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0
    if not usable:
        raise BadInput(f"sampling weights from {weights.min()} to {weights.max()}; "
                       "expected finite ones from 0, not all 0")
    return weights / weights.sum()


def hard_classes(matrices: np.ndarray, below: float = 0.5) -> np.ndarray:
    """Confusion matrices (N, K, K) of single images, rows true -> (N,): classes of IoU < `below`.

    A class without a true pixel in an image is none of its classes, whatever was predicted there.
    """
    # IoU < below, written without a division: a class in the image has a union above 0.
    matrices = np.asarray(matrices, np.float64)
    tp = np.einsum("nkk->nk", matrices)
    true = matrices.sum(2)
    union = true + matrices.sum(1) - tp
    hard = (true > 0) & (tp < below * union)
    return hard.sum(1)


def difficulty_weights(hard: np.ndarray, limits: Sequence[int] = LIMITS,
                       weights: Sequence[float] = WEIGHTS) -> np.ndarray:
    """Hard classes per image (N,) -> weight (N,): the first weight up to the first limit, ..."""
    rising = list(limits) == sorted(set(limits))
    if not rising or len(weights) != len(limits) + 1:
        raise BadInput(f"difficulty limits {list(limits)} with weights {list(weights)}; "
                       "expected rising limits and one weight more than limits")
    # The number of limits below a count is the place of its weight.
    weights = np.asarray(weights, np.float64)
    return weights[np.searchsorted(limits, hard)]


def balanced_weights(counts: np.ndarray) -> np.ndarray:
    """Pixels per image and class (N, K) -> weight (N,): every class is drawn equally often."""
    # A class is chosen, and one of the images that have it, all alike likely.
    has = np.asarray(counts) > 0
    images = has.sum(0)  # with the class
    # A class that no image has is never chosen.
    used = images > 0
    weights = (has[:, used] / images[used]).sum(1)
    if not weights.any():
        # All masks hold nothing but ignored pixels.
        raise BadInput("no labelled pixel in any training mask; nothing to balance")
    return weights


def rich(counts: np.ndarray, classes: Sequence[int], share: float) -> np.ndarray:
    """Images (N, K) in which one of `classes` has at least `share` of the labels -> indices."""
    counts = np.asarray(counts, np.float64)
    # At least 1 pixel: an image without labels has share 0 of everything.
    labelled = np.maximum(counts.sum(1, keepdims=True), 1)
    enough = counts[:, list(classes)] / labelled >= share
    return np.flatnonzero(enough.any(1))


def replicated(names: Sequence[str], listed: Sequence[str]) -> np.ndarray:
    """Training names, names to repeat -> indices 0..n-1, then those of the repeated.

    A name that is listed twice is repeated twice.
    """
    # Every image once, so that a pass leaves none out, then the listed ones.
    index = {name: i for i, name in enumerate(names)}
    repeated = []
    for name in listed:
        if name not in index:
            raise BadInput(f"{name!r} is to be repeated but is no training image; "
                           f"names look like {names[0]!r}")
        repeated.append(index[name])
    return np.array([*range(len(names)), *repeated])


def check_repeated(names: Sequence[str], listed: Sequence[str]) -> None:
    """BadInput where repeating these of the names would change nothing."""
    if not listed:
        raise BadInput("--replicate: no training image is so full of a rare class; type a lower share")
    often = Counter(listed)
    if len({often[name] for name in names}) == 1:
        raise BadInput("--replicate: repeats all training images alike, which changes nothing; type a "
                       "higher share, or list fewer")


# ---- what users give

def share_of(text: str | None) -> float | None:
    """--replicate: "5%" -> 0.05; None for a file, or for nothing. A share outside 0..100 % is a BadInput."""
    if not text or not text.endswith("%"):
        return None
    try:
        share = number(text[:-1]) / 100
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise BadInput(f"--replicate {text}: expected a share above 0% and up to 100%, or a file of "
                       "image names")
    return share


def read_difficulty(path: str | Path, names: Sequence[str]) -> dict[str, int]:
    """difficulty.json of eval.py -> {name: number of hard classes} of these training images."""
    advice = "make the file with python eval.py RUN --split train --difficulty, of a run on these images"
    hard = read_json(path, dict[str, int], f"{{name: number}}; {advice}")
    for name in [*names, *hard]:
        if hard.get(name, -1) < 0:
            raise BadInput(f"{path}: no number for {name!r}; {advice}")
    return {name: hard[name] for name in names}
