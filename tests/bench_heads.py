"""Parameters, GFLOP and time of each head on the maps of a ViT-B/14 at 518 x 518, one image, 8 classes.

    python tests/bench_heads.py                     also what the backbone itself needs, forward only
    python tests/bench_heads.py --weights RUN       test mIoU of each head on the demo: on that ViT frozen, on a random
                                                    one frozen, from scratch, tuned; mean +/- sd over --seeds
The stand-in for DINO: python train_cls.py --root EuroSAT --mode finetune --arch nano16 --epochs 2
"""
import argparse
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from bench_features import trained
from models.heads import HEADS
from models.run import tune_cpu
from models.vit import PRESETS, ViT


def gflop(work):
    with FlopCounterMode(display=False) as counter:  # a multiply-add counts as 2
        work()
    return counter.get_total_flops() / 1e9


# How the backbones are trained. The random frozen one has the recipe of frozen ones, too.
FROZEN = "--weight-decay 0.01 --dropout 0.1".split()
BACKBONES = {"frozen": ["--weights", "RUN"], "random, frozen": ["--unfreeze", "0", *FROZEN], "from scratch": [],
             "tuned": ["--weights", "RUN", "--unfreeze", "all"]}


def trainings(weights, out, root, seeds, heads, names, flags):
    """Prints a row for each head: test mIoU on each backbone, of equally many steps, and CPU seconds of a run."""
    kinds = {name: [str(weights) if word == "RUN" else word for word in BACKBONES[name]] for name in names}
    print("| head | " + " | ".join(f"{kind} | CPU s" for kind in kinds) + " |\n" + "|---" * (2 * len(kinds) + 1) + "|")
    where = ["--root", root] if root else []
    for head in heads:
        cells = []
        for kind, chosen in kinds.items():
            found = []
            for seed in seeds:
                run = out / f"{head}-{kind.replace(', ', '-').replace(' ', '-')}-{seed}"
                found.append(trained(run, [*where, "--head", head, "--seed", seed, *flags, *chosen]))
            scores = torch.tensor([miou for _, _, miou in found])
            spread = f" +/- {scores.std():.3f}" if len(seeds) > 1 else ""
            cells.append(f"{scores.mean():.3f}{spread} | {sum(took for took, _, _ in found) / len(found):.0f}")
        print(f"| {head} | " + " | ".join(cells) + " |", flush=True)


def costs(repeat=7):
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


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", help="run whose ViT is frozen: accuracy in place of costs")
    p.add_argument("--out", type=Path, default=Path("runs/bench_heads"), help="what is there is not run again")
    p.add_argument("--root", help="data to train on (the demo)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    p.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    p.add_argument("--flags", nargs=argparse.REMAINDER, help="of train_seg.py for all, last",
                   default="--steps 300 --crop 128 --scale 0.75 1.5 --batch-size 8 --eval-every 300".split())
    args = p.parse_args()
    if args.weights:
        weights = Path(args.weights).resolve()
        trainings(weights, args.out.absolute(), args.root, args.seeds, args.heads, args.backbones, args.flags)
    else:
        costs()


if __name__ == "__main__":
    main()
