"""Muon: each step of a weight matrix is made orthogonal, so that all its directions learn alike.

    opt = optimizer("muon", nets.param_groups(...), lr=3e-3)          or "adamw"
    loss.backward(); opt.step()

Keller Jordan 2024 (kellerjordan.github.io/posts/muon), scaled as in Moonlight (arXiv 2502.16982) to
the size of AdamW's steps: rate and weight decay mean what they mean there. It is for what starts
from random weights, be it a head alone. torch.optim.Muon takes no convolutions.
"""
import torch
from torch import Tensor
from torch.optim.adamw import adamw

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
    """(n, A, B) -> the same with all singular values near 1 (.7 to 1.2), by Newton-Schulz iterations."""
    tall = x.shape[1] > x.shape[2]
    if tall:  # the smaller product costs less
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    # A polynomial of fifth degree whose slope at 0 is as large as possible.
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(iterations):
        square = x @ x.mT
        square = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, square, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices (is_matrix), AdamW for biases, norms, tokens and narrow matrices.

    groups: as nets.param_groups() makes them; one without "layers" has norms, biases and tokens.
    Matrices of a loaded backbone ("trained") are AdamW's, too.
    """

    def __init__(self, groups: list[dict], lr: float):
        super().__init__(groups, dict(lr=lr))
        self.matrices = set()
        for group in groups:
            if group["layers"] and not group["trained"]:
                self.matrices.update(p for p in group["params"] if is_matrix(p))

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but numbers of steps go to the GPU, too: torch leaves them where the file was read."""
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            if "step" in state:
                state["step"] = state["step"].to(p.device)

    @torch.no_grad()
    def step(self) -> None:
        """One step down the gradients of the parameters that have one."""
        for group in self.param_groups:
            others, by_size = [], {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p in self.matrices:
                    by_size.setdefault((len(p), p.numel()), []).append(p)
                else:
                    others.append(p)
            self.adam(others, group)
            for same in by_size.values():
                self.muon(same, group)

    def muon(self, params: list[Tensor], group: dict) -> None:
        """Moves matrices of one size all at once: one by one they are too small for a GPU."""
        gradients, averages = [], []
        for p in params:
            state = self.state[p]
            if not state:
                state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg"].lerp_(p.grad, 1 - MOMENTUM)
            gradients.append(p.grad.flatten(1))
            averages.append(state["exp_avg"].flatten(1))
        # Nesterov's momentum: the average as it would be after one more such gradient.
        x = torch.stack(gradients)
        x = x.lerp(torch.stack(averages), MOMENTUM)
        x = orthogonal(x)
        # An orthogonal (A, B) has a root mean square of 1 / sqrt(max(A, B)).
        size = RMS * max(x.shape[1:]) ** 0.5
        for p, change in zip(params, x):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(change.view_as(p), alpha=group["lr"] * size)

    def adam(self, params: list[Tensor], group: dict) -> None:
        """Moves all others as torch.optim.AdamW does, with its names and types of state."""
        states = []
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), device=p.device)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            states.append(state)
        adamw(
            params,
            [p.grad for p in params],
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=1e-8,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
        )
