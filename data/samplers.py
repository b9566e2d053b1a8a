"""Batch samplers as pure functions of (seed, step): no state to save, the same samples for any number of ranks."""
from typing import Iterator

import numpy as np


class StepSampler:
    """Yields, for step = start..steps-1, this rank's list of (index, draw), `draw` counting samples over all ranks.

    One pass over the n samples after another, each in its own order. With the same global batch (batch * world), 1 rank
    and 8 ranks see the same samples in the same step.
    """

    def __init__(self, n: int, batch: int, steps: int, seed: int, start: int = 0, rank: int = 0, world: int = 1):
        self.n, self.batch, self.steps, self.seed = n, batch, steps, seed
        self.start, self.rank, self.world = start, rank, world

    def __len__(self):
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        for step in range(self.start, self.steps):
            first = (step * self.world + self.rank) * self.batch
            batch = []
            for draw in range(first, first + self.batch):
                if draw // self.n != epoch:
                    epoch = draw // self.n
                    order = np.random.default_rng((1, self.seed, epoch)).permutation(self.n)
                batch.append((int(order[draw % self.n]), draw))
            yield batch
