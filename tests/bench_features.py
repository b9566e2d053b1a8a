"""What --cache-features costs and brings: time of an epoch, bytes, and accuracy by the number of views.

    python tests/bench_features.py                    32 images, ViT-B/14 at 518 and ViT-S/16 at 512, random weights
    python tests/bench_features.py --weights runs/eurosat-finetune      train_seg.py on the demo, that ViT frozen
    python tests/bench_features.py --weights RUN --out DIR --root D --flags --crop 192 --scale 0.4 1.2     on other data

An epoch takes every image once, forward and backward. "fp32" computes the features as the reports did,
in torch's default precision; "own" in the precision of a run here. Ratios are of one process, rounds in turns.
The stand-in for DINO: python train_cls.py --root EuroSAT --mode finetune --arch nano16 --epochs 2
"""
import argparse
import json
import os
import resource
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
EPOCH, BATCH = 32, 4  # images of an epoch and of a step


def seconds(net, data, draws, amp):
    """Of training steps, an image."""
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    device = next(net.parameters()).device
    # On a CPU the process's own time, which others do not slow.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    batches = iter(DataLoader(data, batch_sampler=draws))
    began = clock()
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
    return (clock() - began) / images


def speed(folder, arch, crop, rounds, images):
    """Prints a row for each head: seconds of an epoch and their ratios."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    root = make(folder / "demo", scenes=(images, 1, 1), size=512)
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
            text, = features.keep_all(net, kept, None, BATCH, amp, 0, reads=100 * images, validations=0)
            print(f"{arch} at {crop}, {images} images\n{text}")
            print(f"         filled in {time.perf_counter() - began:.1f} s", flush=True)
        best = {}
        for _ in range(rounds):  # in turns: a busy machine slows all
            for how in ("fp32", "own", "kept"):
                steps = images // BATCH if how == "kept" else 1
                draws = StepSampler(images, BATCH, steps, seed=0)
                before = torch.get_float32_matmul_precision()
                if how == "fp32":
                    torch.set_float32_matmul_precision("highest")
                took = seconds(net, kept if how == "kept" else views, draws, amp and how != "fp32")
                torch.set_float32_matmul_precision(before)
                best[how] = min(took, best.get(how, took))
        epoch = {how: s * EPOCH for how, s in best.items()}
        text = "  ".join(f"{how} {s:7.2f} s" for how, s in epoch.items())
        print(f"  {name:7} epoch: {text}  x{best['fp32'] / best['kept']:.0f}, x{best['own'] / best['kept']:.0f}",
              flush=True)


def trained(out, flags):
    """Runs train_seg.py on one thread, unless it has -> CPU seconds, {step: val mIoU}, test mIoU."""
    cpu = out / "cpu.json"
    if not cpu.exists():
        shutil.rmtree(out, ignore_errors=True)  # of a run that was killed
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = [sys.executable, ROOT / "train_seg.py", "--workers", "0", "--out", out, *flags]
        subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        cpu.write_text(json.dumps(took))
    rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    scores = {row["step"]: row["val_miou"] for row in rows if "val_miou" in row}
    return json.loads(cpu.read_text()), scores, json.loads((out / "results.json").read_text())["miou"]


def by_views(folder, weights, head, steps, cached_steps, seeds, views, root, more):
    """Prints a row for each number of views: scores, CPU time and bytes, and what fresh crops reach."""
    where = ["--root", root] if root else []
    print(f"train_seg.py on {root or 'the demo'}, {weights} frozen, {head}, {steps} steps, {' '.join(more)}\n"
          "seed  views   test mIoU  val mIoU  CPU s  MB on disk  steps to the fresh run's val mIoU")
    for seed in seeds:
        goal = None
        for n in ["fresh", *views]:
            own = steps if n == "fresh" else cached_steps
            flags = [*where, "--weights", weights, "--head", head, "--batch-size", 8, "--steps", own, "--seed", seed,
                     "--eval-every", steps // 8, "--log-every", own]
            kept = folder / f"features-{seed}-{n}"
            if n != "fresh":
                flags += ["--views", n, "--cache-features", kept]
            took, scores, test = trained(folder / f"run-{seed}-{n}", [*flags, *more])
            goal = goal or scores[steps]
            reached = [step for step, miou in scores.items() if miou >= goal]
            size = sum(file.stat().st_size for file in kept.rglob("*.raw")) / 1e6
            print(f"{seed:4}  {n!s:>5}  {test:10.4f}  {scores[own]:8.4f}  {took:5.0f}  {size:10.0f}  "
                  f"{reached[0] if reached else 'not'}", flush=True)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--arch", nargs="+", default=list(SIZES), choices=list(SIZES))
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--images", type=int, default=EPOCH, help="fewer on a busy machine: times are scaled to 32")
    p.add_argument("--weights", help="a file or run whose ViT is frozen: accuracy by views in place of speed")
    p.add_argument("--head", default="linear", choices=sorted(HEADS))
    p.add_argument("--steps", type=int, default=400)
    p.add_argument("--cached-steps", type=int, help="of runs on kept features (--steps): they cost little")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--views", type=int, nargs="+", default=[1, 2, 4, 8])
    p.add_argument("--root", help="data to train on (the demo)")
    p.add_argument("--out", type=Path, help="folder for runs and features; what is there is not run again")
    p.add_argument("--flags", nargs=argparse.REMAINDER, default=["--crop", "128"], help="of train_seg.py, last")
    args = p.parse_args()
    run.start(0)
    with tempfile.TemporaryDirectory() as folder:
        if args.weights:
            folder = (args.out or Path(folder)).absolute()
            by_views(folder, Path(args.weights).resolve(), args.head, args.steps, args.cached_steps or args.steps,
                     args.seeds, args.views, args.root, args.flags)
            return
        for arch in args.arch:
            speed(Path(folder), arch, SIZES[arch], args.rounds, args.images)


if __name__ == "__main__":
    main()
