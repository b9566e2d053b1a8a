"""Parameters, GFLOP and time of each head on the maps of a ViT-B/14 at 518 x 518, one image, 8 classes.

    python tests/bench_heads.py                     also what the backbone itself needs, forward only
"""
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from models.heads import HEADS
from models.run import tune_cpu
from models.vit import PRESETS, ViT


def gflop(work):
    with FlopCounterMode(display=False) as counter:  # a multiply-add counts as 2
        work()
    return counter.get_total_flops() / 1e9


def main(repeat=7):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        tune_cpu()  # as the scripts do
    maps, heads = [torch.randn(1, 768, 37, 37, device=device) for _ in range(4)], {}
    image = torch.randn(1, 3, 518, 518, device=device)
    for name, head in HEADS.items():
        heads[name] = head(768, 4, 8, 14).to(device)
    best = dict.fromkeys(heads, float("inf"))
    for _ in range(repeat):  # in turns: a busy machine slows all
        for name, head in heads.items():
            start = time.perf_counter()
            head(maps, image).square().mean().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - start)
    print(f"{device}, {torch.get_num_threads()} threads\nhead     M parameters   GFLOP forward   ms forward + backward")
    for name, head in heads.items():
        size = sum(p.numel() for p in head.parameters()) / 1e6
        print(f"{name:8} {size:12.2f} {gflop(lambda: head(maps, image)):15.1f} {best[name] * 1e3:23.1f}")
    vit = ViT(**PRESETS["dinov2_vitb14"]).to(device).eval().requires_grad_(False)
    print(f"ViT-B/14 {sum(p.numel() for p in vit.parameters()) / 1e6:12.2f}"
          f"{gflop(lambda: vit(torch.randn(1, 3, 518, 518, device=device))):16.1f}")


if __name__ == "__main__":
    main()
