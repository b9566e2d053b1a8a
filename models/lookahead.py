"""Lookahead (Zhang et al. 2019, arXiv 1907.08610) beside any optimiser, and warm restarts that end where a cycle ends.

    look = Lookahead(params, every=5)
    opt.step(); look.update(step)        step counted from 0; evaluate after a multiple of `every` steps
"""
import math

import torch

from data.common import BadInput


class Lookahead:
    """Every `every` steps the weights go back to slow + alpha * (fast - slow), and the slow ones go there too."""

    def __init__(self, params: list[torch.Tensor], every: int = 5, alpha: float = 0.5):
        self.fast, self.every, self.alpha = params, every, alpha
        self.slow = [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step 0, 1, ..., also after one that was skipped: a bad step does not move the meetings."""
        if (step + 1) % self.every:
            return
        for slow, fast in zip(self.slow, self.fast):
            slow.lerp_(fast, self.alpha)
            fast.copy_(slow)

    def load(self, slow: list[torch.Tensor]) -> None:
        """Takes .slow from last.pt; of another network it is a BadInput."""
        try:
            fits = [t.shape for t in slow] == [p.shape for p in self.fast]
            fits = fits and all(t.is_floating_point() and t.isfinite().all() for t in slow)
        except (TypeError, AttributeError):  # no list of tensors
            fits = False
        if not fits:
            raise BadInput("last.pt: slow weights of another network, or with NaN or infinity; "
                           "start a new run")
        self.slow = [t.to(p, copy=True) for t, p in zip(slow, self.fast)]


def cycle_ends(first: int, mult: int, steps: int) -> list[int]:
    """Steps at which cycles of first, first * mult, ... steps end, up to `steps`: 15, 2, 105 -> 15, 45, 105."""
    if first > steps:
        raise BadInput(f"--restarts {first} {mult} with --steps {steps}: no cycle would end; type "
                       "more steps or a shorter cycle")
    ends, length = [first], first
    while ends[-1] + length * mult <= steps:
        length *= mult
        ends.append(ends[-1] + length)
    return ends


def end_step(steps: int | None, eval_every: int | None, restarts: list[int] | None,
             every: int | None) -> int | None:
    """The step at which a run ends: that of --restarts' last cycle, with the lowest rate. None: not known yet.

    A run that ends or is validated where Lookahead's weights do not meet is a BadInput.
    """
    if steps and restarts:
        steps = cycle_ends(*restarts, steps)[-1]
    if every and steps and eval_every and (steps % every or eval_every % every):
        cause = "the cycles of --restarts" if restarts else "--steps"
        raise BadInput(f"--lookahead {every}: the run ends at step {steps} and is validated every "
                       f"{eval_every}; choose {cause} and --eval-every so that both are multiples "
                       f"of {every}, where fast and slow weights meet")
    return steps


def warm_restarts(step: int, first: int, mult: int) -> float:
    """Share of the rate at `step` (from 0): a half cosine from 1 to 0 in each cycle (SGDR, arXiv 1608.03983).

    Train to one of cycle_ends(): elsewhere the run stops at a high rate, just after a restart at worst.
    """
    length = first
    while step >= length:
        step -= length
        length *= mult
    return 0.5 * (1 + math.cos(math.pi * step / length))
