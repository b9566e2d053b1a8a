"""What --cache-features costs and brings: time of an epoch, bytes, and accuracy by the number of views.

    python tests/bench_features.py                    32 images, ViT-B/14 at 518 and ViT-S/16 at 512, random weights
    python tests/bench_features.py --views-of runs/eurosat-finetune     train_seg.py on the demo, that ViT frozen

An epoch takes every image once, forward and backward. "fp32" computes the features as the reports did,
in torch's default precision; "own" in the precision of a run here. Ratios are of one process, rounds in turns.
"""
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from data import augment
from data.crops import random_crop
from data.demo import make
from data.samplers import StepSampler
from data.source import Source
from data.views import Views
from models import features, run
from models.heads import HEADS, Segmenter
from models.losses import ce
from models.vit import PRESETS, ViT, spread_taps

SIZES = {"dinov2_vitb14": 518, "dinov3_vits16": 512}
IMAGES, BATCH, RECOMPUTED = 32, 4, 4  # images of an epoch, of a step, and how many of them are recomputed to time it


def seconds(net, data, draws, amp):
    """Of training steps, an image."""
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    device = next(net.parameters()).device
    batches = iter(DataLoader(data, batch_sampler=draws))
    began = time.perf_counter()
    images = 0
    for x, y, names, *maps in batches:
        inputs = [t.to(device) for t in (x, *maps)]
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = net(*inputs)
        opt.zero_grad()
        ce(logits, y.to(device)).backward()
        opt.step()
        images += len(names)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / images


def speed(folder, arch, crop, rounds):
    """Prints a row for each head: seconds of an epoch and their ratios."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    root = make(folder / "demo", scenes=(IMAGES, 1, 1), size=512)
    d = Source(root=root, cache=folder / "images")

    def crop_of(image, mask, rng):
        image, mask = random_crop(image, mask, crop, (0.75, 1.5), rng)
        image, mask = augment.dihedral(image, mask, rng)
        return augment.color(image, rng, 0.2), mask

    views = Views(d.part("train", "imagenet", crop_of), 1)
    vit = ViT(**PRESETS[arch]).to(device)
    taps = spread_taps(vit.depth)
    amp = run.fast_bf16(device)
    kept = None
    for name in ("linear", "fpn"):
        net = Segmenter(vit, HEADS[name](vit.dim, len(taps), len(d.names), vit.patch), taps).to(device)
        net.unfreeze(0)
        net.train()
        if kept is None:
            kept, _ = features.open_kept(folder, net, arch, amp, d, views, {}, None, crop, 0.25)
            began = time.perf_counter()
            for _, missing, told in features.first_batches(net, kept, None, BATCH, amp, IMAGES * 100, 0):
                features.fill(net, kept, missing, BATCH, amp, 0)
            print(f"{arch} at {crop}\n{told}\n         filled in {time.perf_counter() - began:.1f} s", flush=True)
        best = {}
        for _ in range(rounds):  # in turns: a busy machine slows all
            for how in ("fp32", "own", "kept"):
                n = IMAGES if how == "kept" else RECOMPUTED
                draws = StepSampler(IMAGES, min(n, BATCH), n // BATCH, seed=0)
                before = torch.get_float32_matmul_precision()
                if how == "fp32":
                    torch.set_float32_matmul_precision("highest")
                took = seconds(net, kept if how == "kept" else views, draws, amp and how != "fp32")
                torch.set_float32_matmul_precision(before)
                best[how] = min(took, best.get(how, took))
        epoch = {how: s * IMAGES for how, s in best.items()}
        text = "  ".join(f"{how} {s:7.2f} s" for how, s in epoch.items())
        print(f"  {name:7} epoch: {text}  x{best['fp32'] / best['kept']:.0f}, x{best['own'] / best['kept']:.0f}",
              flush=True)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--arch", nargs="+", default=list(SIZES), choices=list(SIZES))
    p.add_argument("--rounds", type=int, default=2)
    args = p.parse_args()
    run.start(0)
    with tempfile.TemporaryDirectory() as folder:
        for arch in args.arch:
            speed(Path(folder), arch, SIZES[arch], args.rounds)


if __name__ == "__main__":
    main()
