"""A network compiled for a long prediction on a CPU: operations joined, weights packed once.

    net, note = compiled(net, crop=512)        about a minute; `note` says what it brings
    logits = slide(net, x, crop=512, ...)      as before

Whether it pays depends on CPU and network (tests/bench_vit.py): with AVX512 a ViT-B/14 took .83 to
.94 times as long in bf16, a ViT-S/16 1.23 times, both 1.00 in fp32; with AMX .84 and 1.13 in bf16.
It needs a C++ compiler. Without one the network comes back as it was, and the note says so.
"""
import time

import torch
from torch import Tensor, nn

from data.common import minutes

ROUNDS = 3  # windows that are timed, with and without


class Compiled(nn.Module):
    """A network in eval mode whose windows (B, 3, crop, crop) go through a compiled program.

    Other sizes, training and gradients go through the network itself.
    """

    def __init__(self, net: nn.Module, crop: int):
        super().__init__()
        self.net = net
        self.crop = crop
        # One program for one size. Frozen weights are constants of the program: they are packed
        # for the matrix products, and cast to bf16, once.
        self.program = torch.compile(net, dynamic=False, options={"freezing": True})
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.crop, self.crop) or self.training or torch.is_grad_enabled():
            return self.net(x)
        # One by one: a last, smaller batch needs no program of its own, and on a CPU a larger
        # batch is no faster. clone(), because a tensor made outside of inference_mode() would need
        # a program of its own too.
        with torch.inference_mode():
            found = [self.program(window.clone()) for window in x.split(1)]
        return torch.cat(found)


@torch.inference_mode()
def seconds(net: nn.Module, x: Tensor, amp: bool) -> float:
    """Wall time of one forward pass of windows (B, 3, H, W) on the CPU."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        net(x)
    return time.perf_counter() - start


def compiled(net: nn.Module, crop: int, amp: bool = False) -> tuple[nn.Module, str]:
    """Network in eval mode -> itself or a Compiled one, and a line that says which and why.

    amp: bf16, as it will be called. What is computed differs by rounding, so one image should go
    through one of the two alone.
    """
    device = next(net.parameters()).device
    if device.type != "cpu":
        return net, f"not compiled: this is for CPUs, and the network is on {device}"
    program = Compiled(net, crop)
    window = torch.zeros(1, 3, crop, crop)
    start = time.perf_counter()
    try:
        seconds(program, window, amp)
    except Exception as e:  # of any kind: a compiler is a program of others
        said = str(e).split("\n")[0]
        return net, (f"not compiled, goes on without: {said}; it needs a C++ compiler: install "
                     "g++, or name yours with CXX=FILE")
    took = time.perf_counter() - start
    before, after = [], []
    for _ in range(ROUNDS):  # in turns: what else the machine does slows both
        before.append(seconds(net, window, amp))
        after.append(seconds(program, window, amp))
    saved = min(before) - min(after)
    note = (f"compiled in {minutes(took)}: a window takes {min(after):.3f} s "
            f"instead of {min(before):.3f}")
    # Slow or not, it is used: a choice by the clock would change the bits of a resumed prediction.
    if saved <= 0:
        return program, f"{note}: no faster here"
    return program, f"{note}: pays from {took / saved:.0f} windows on"
