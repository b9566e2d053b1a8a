"""Lookahead (Zhang et al. 2019) around any optimiser, and a warm-restart schedule that ends where a cycle ends."""
import math

import torch


class Lookahead:
    """Every `k` steps the weights go back to slow + alpha * (fast - slow), and the slow ones go there too.

    opt = Lookahead(AdamW(...)): step, zero_grad, param_groups as before; state_dict() holds the slow weights as well.
    Evaluate after a multiple of k steps, where fast and slow weights are the same.
    """

    def __init__(self, inner: torch.optim.Optimizer, k: int = 5, alpha: float = 0.5):
        if k < 1 or not 0 < alpha <= 1:
            raise ValueError(f"Lookahead with k = {k}, alpha = {alpha}; expected k from 1, alpha in 0..1")
        self.inner, self.k, self.alpha, self.count = inner, k, alpha, 0
        self.slow = [p.detach().clone() for p in self.fast()]

    def fast(self):  # parameters in the optimiser's own order, the one that its state dict numbers
        return [p for group in self.inner.param_groups for p in group["params"]]

    @property
    def param_groups(self):
        return self.inner.param_groups

    def zero_grad(self, set_to_none: bool = True):
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, skip: bool = False):
        """`skip` counts the step without taking it, so that a bad one does not move the synchronisation."""
        if not skip:
            self.inner.step()
        self.count += 1
        if self.count % self.k == 0:
            for slow, fast in zip(self.slow, self.fast()):
                slow.lerp_(fast, self.alpha)
                fast.copy_(slow)

    def state_dict(self) -> dict:
        """Tensors and plain values, as torch.load(weights_only=True) wants them."""
        return dict(inner=self.inner.state_dict(), slow=self.slow, count=self.count)

    def load_state_dict(self, state: dict) -> None:
        """Of the same network; a state without slow weights is refused, not restarted."""
        shapes = [p.shape for p in self.fast()]
        if "slow" not in state or [t.shape for t in state["slow"]] != shapes:
            raise ValueError("a state without Lookahead's slow weights, or of another network")
        self.inner.load_state_dict(state["inner"])
        self.slow = [t.to(p, copy=True) for t, p in zip(state["slow"], self.fast())]
        self.count = state["count"]


def cycle_ends(first: int, mult: int, steps: int) -> list[int]:
    """Steps at which cycles of first, first * mult, ... steps end, up to `steps`: 15, 2, 105 -> 15, 45, 105."""
    ends, length = [first], first
    while ends[-1] + length * mult <= steps:
        length *= mult
        ends.append(ends[-1] + length)
    return ends


def warm_restarts(step: int, first: int, mult: int) -> float:
    """Share of the rate at `step` (from 0): a half cosine from 1 to 0 in each cycle (SGDR, Loshchilov & Hutter 2017).

    Train to one of cycle_ends(): elsewhere the run stops at a high rate, just after a restart at worst.
    """
    length = first
    while step >= length:
        step, length = step - length, length * mult
    return 0.5 * (1 + math.cos(math.pi * step / length))
