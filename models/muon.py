"""Muon: each step of a weight matrix is made orthogonal, so that all its directions learn alike.

    opt = optimizer("muon", nets.param_groups(...), lr=3e-3)          or "adamw"
    loss.backward(); opt.step()

Keller Jordan 2024 (kellerjordan.github.io/posts/muon), scaled as in Moonlight (arXiv 2502.16982) to
the size of AdamW's steps: rate and weight decay mean what they mean there. It is for what starts
from random weights, be it a head alone. torch.optim.Muon takes no convolutions.
"""
import torch
from torch import Tensor

OPTIMIZERS = "adamw", "muon"  # what --optimizer may name
BETAS = 0.9, 0.999  # of AdamW
MOMENTUM = 0.95  # of Muon
# A matrix with a shorter side is no hidden layer: it gives classes, or filters each channel alone.
NARROW = 16
RMS = 0.2  # of the values of AdamW's steps, as Moonlight measured it


def optimizer(name: str, groups: list[dict], lr: float) -> torch.optim.Optimizer:
    """"adamw" or "muon", of groups as nets.param_groups() makes them."""
    if name == "muon":
        return Muon(groups, lr)
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)


def is_matrix(p: Tensor) -> bool:
    """Linear layers, and convolutions seen as (outputs, inputs x height x width)."""
    return p.ndim > 1 and min(p.flatten(1).shape) >= NARROW


def orthogonal(x: Tensor, iterations: int = 5) -> Tensor:
    """(A, B) -> (A, B) with all singular values near 1 (.7 to 1.2), by Newton-Schulz iterations."""
    tall = x.shape[0] > x.shape[1]
    if tall:  # the smaller product costs less
        x = x.T
    x = x / (x.norm() + 1e-7)
    # A polynomial of fifth degree whose slope at 0 is as large as possible.
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(iterations):
        square = x @ x.T
        x = torch.addmm(x, b * square + c * square @ square, x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices (is_matrix), AdamW for biases, norms, tokens and narrow matrices.

    groups: as nets.param_groups() makes them, whose "layers" says where matrices may be. Those of
    a loaded backbone ("trained") are AdamW's, too.
    """

    def __init__(self, groups: list[dict], lr: float):
        super().__init__(groups, dict(lr=lr))
        self.matrices = set()
        for group in groups:
            if group["layers"] and not group["trained"]:
                self.matrices.update(p for p in group["params"] if is_matrix(p))

    @torch.no_grad()
    def step(self) -> None:
        """One step down the gradients of the parameters that have one."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                change = self.muon(p) if p in self.matrices else self.adam(p)
                p.sub_(change, alpha=group["lr"])

    def muon(self, p: Tensor) -> Tensor:
        """The next change of a matrix, of root mean square RMS."""
        state = self.state[p]
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        state["exp_avg"].lerp_(p.grad, 1 - MOMENTUM)
        # Nesterov's momentum: the average as it would be after one more such gradient.
        x = p.grad.lerp(state["exp_avg"], MOMENTUM).flatten(1)
        # An orthogonal (A, B) has a root mean square of 1 / sqrt(max(A, B)).
        return RMS * max(x.shape) ** 0.5 * orthogonal(x).view_as(p)

    def adam(self, p: Tensor) -> Tensor:
        """The next change by AdamW; its state has the names and types of torch.optim.AdamW's."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        state["step"] += 1
        state["exp_avg"].lerp_(p.grad, 1 - BETAS[0])
        state["exp_avg_sq"].lerp_(p.grad.square(), 1 - BETAS[1])
        # Both averages began with 0: what that still takes away is put back.
        mean = state["exp_avg"] / (1 - BETAS[0] ** state["step"])
        square = state["exp_avg_sq"] / (1 - BETAS[1] ** state["step"])
        return mean / (square.sqrt() + 1e-8)
