"""Time of a training step: what its parts take, and images/s beside a plain loop on timm's ViT.

    python tests/bench_train.py --profile            train_seg.py's default, by part and by operator
    python tests/bench_train.py --arch dinov3_vitl16 --crop 512 --batch-size 16 --frozen
    python tests/bench_train.py --arch dinov3_vits16 --crop 224 --batch-size 2 --tuned --cpu

On a GPU if there is one; on a CPU the process's own time counts. The two loops take turns. With 8 classes a linear head
is no matrix for Muon, so AdamW moves all of ours, too.
"""
import argparse
import copy
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import train_seg
from bench_heads import gflop
from bench_vit import timm_name
from data.common import IGNORE
from data.source import Source, rare_classes
from models import nets, recipes, run
from models.losses import parse_loss, weighted_sum
from models.muon import optimizer
from models.vit import PRESETS

PARTS = ("data", "forward", "loss", "backward", "clip", "optimiser")
CLASSES = 8
ARCHS = [f"{family}_vit{size}{patch}" for family, patch in (("dinov3", 16), ("dinov2", 14)) for size in "sbl"]


class Clock:
    """Seconds by part: a call closes the part that has run since the last one."""

    def __init__(self, device):
        self.device = device
        # On a CPU the process's own time, which others do not slow.
        self.now = time.perf_counter if device.type == "cuda" else time.process_time
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.last = self.now()

    def __call__(self, part):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = self.now()
        self.seconds[part] += now - self.last
        self.last = now


def step(net, opt, terms, amp, x, y, close=lambda part: None):
    """One of train_seg.py's, without its log and its random numbers."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        logits = net(x)
    close("forward")
    loss = weighted_sum(terms, logits, y, count=(y != IGNORE).sum())
    close("loss")
    opt.zero_grad(set_to_none=True)
    loss.backward()
    close("backward")
    params = [p for p in net.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(params, train_seg.CLIP).item()
    close("clip")
    opt.step()
    close("optimiser")


def network(arch, head, recipe):
    """As train_seg.py makes it -> net, its optimiser."""
    how = recipes.RECIPES[recipe]
    net = nets.make("vit", CLASSES, arch=arch, head=head)[0]
    nets.unfreeze(net, "0" if recipe == "frozen" else "all")
    net.dropout.p = how["dropout"]
    net = net.to(DEVICE).train()
    groups = nets.param_groups(net, how["lr"], how["backbone_lr"], how["layer_decay"], how["weight_decay"],
                               trained=recipe != "scratch")
    return net, optimizer(how["optimizer"], groups, how["lr"])


# ---- the default, by part

def parts(rounds, profile):
    args = train_seg.parse_args([])
    data = Source(cache=args.cache)
    vars(args).update(recipes.fill("scratch", vars(args), data.sizes_of("train"), 16, quick=True))
    rare = rare_classes(data.count(None)[:, :-1])
    train = data.part("train", "imagenet", partial(train_seg.transform, args=args, rare=rare), 0)
    net, opt = network(args.arch, args.head, "scratch")
    terms = parse_loss(args.loss)
    amp = DEVICE.type == "cuda" and run.fast_bf16(DEVICE)  # as train_seg.py

    def work(draw):
        clock = Clock(DEVICE)
        samples = [train[i % len(train), i] for i in range(draw * args.batch_size, (draw + 1) * args.batch_size)]
        x, y, _ = torch.utils.data.default_collate(samples)
        x, y = x.to(DEVICE), y.to(DEVICE)
        clock("data")
        step(net, opt, terms, amp, x, y, clock)
        return list(clock.seconds.values())

    for _ in range(3):  # warm up
        work(0)
    times = torch.tensor([work(1 + i) for i in range(rounds)])
    median = times.median(0).values
    print(f"{args.arch} + {args.head}, batch {args.batch_size}, crop {args.crop}, {args.optimizer}, "
          f"{run.precision(amp, DEVICE)}: a step takes "
          f"{1e3 * median.sum():.0f} ms, data read in this process\n"
          f"| part | ms, median of {rounds} | share |\n|---|---|---|")
    for part, t in zip(PARTS, median):
        print(f"| {part} | {1e3 * t:.1f} | {t / median.sum():.0%} |")
    if profile:
        with torch.profiler.profile() as found:
            work(rounds + 1)
        by = f"self_{DEVICE.type}_time_total"
        print(found.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=45))


# ---- beside a plain loop

class Plain(nn.Module):
    """timm's ViT and a copy of our head."""

    def __init__(self, arch, crop, net, frozen):
        super().__init__()
        import timm
        size = dict(img_size=crop) if PRESETS[arch]["family"] == "dinov2" else {}
        self.backbone = timm.create_model(timm_name(arch), num_classes=0, **size).requires_grad_(not frozen)
        self.head = copy.deepcopy(net.head)
        self.taps = net.taps

    def forward(self, x):
        maps = self.backbone.forward_intermediates(x, indices=self.taps, norm=True, intermediates_only=True)
        return F.interpolate(self.head(maps, x).float(), x.shape[-2:], mode="bilinear")


def plain_step(net, opt, amp, x, y):
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        logits = net(x)
    loss = F.cross_entropy(logits, y, ignore_index=IGNORE)
    opt.zero_grad()
    loss.backward()
    opt.step()


def beside_timm(arch, crop, batch, recipe, rounds, compiles):
    net, opt = network(arch, "linear", recipe)
    frozen = recipe == "frozen"
    plain = Plain(arch, crop, net, frozen).to(DEVICE)
    plain_opt = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], fused=True)
    amp = run.fast_bf16(DEVICE) and (frozen or DEVICE.type == "cuda")  # as train_seg.py
    x = torch.randn(batch, 3, crop, crop, device=DEVICE)
    y = torch.randint(CLASSES, (batch, crop, crop), device=DEVICE)
    steps = {"ours": partial(step, net, opt, parse_loss("ce"), amp, x, y),
             "timm": partial(plain_step, plain, plain_opt, amp, x, y)}
    work = gflop(steps["ours"])  # and warms up
    if compiles:
        steps["ours, compiled"] = partial(step, torch.compile(net), opt, parse_loss("ce"), amp, x, y)
    for _ in range(2):
        for once in steps.values():
            once()
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, once in steps.items():
            clock = Clock(DEVICE)
            once()
            clock("forward")  # the whole step
            times[name].append(clock.seconds["forward"])
    ratios = torch.tensor(times["ours"]) / torch.tensor(times["timm"])
    print(f"{arch} at {crop}, batch {batch}, {recipe}, linear head, {run.precision(amp, DEVICE)}; "
          f"{work:.3g} GFLOP a step\n| | ms a step, best of {rounds} | images/s | TFLOP/s |\n|---|---|---|---|")
    for name, found in times.items():
        best = min(found)
        rate = "" if name == "timm" else f"{work / best / 1e3:.2f}"
        print(f"| {name} | {1e3 * best:.1f} | {batch / best:.1f} | {rate} |")
    print(f"ours / timm: {ratios.median():.2f}, rounds {ratios.min():.2f} to {ratios.max():.2f}")
    if DEVICE.type == "cuda":
        print(f"a large matrix product reaches {peak():.0f} TFLOP/s")


def peak(side=8192):
    """TFLOP/s of the card in a bf16 product."""
    a = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(10):
        clock = Clock(DEVICE)
        a @ a
        clock("forward")
        best = min(best, clock.seconds["forward"])
    return 2 * side ** 3 / best / 1e12


def main(argv=None):
    global DEVICE
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arch", choices=ARCHS, help="beside timm's, in place of the parts of the default")
    p.add_argument("--crop", type=int, default=512, help="with --arch, like the four below")
    p.add_argument("--batch-size", type=int, default=16)
    which = p.add_mutually_exclusive_group()
    which.add_argument("--frozen", dest="recipe", action="store_const", const="frozen", default="frozen")
    which.add_argument("--tuned", dest="recipe", action="store_const", const="tuned")
    p.add_argument("--compile", action="store_true", help="a row for train_seg.py --compile")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--profile", action="store_true", help="the default's operators that take longest")
    p.add_argument("--cpu", action="store_true", help="although there is a GPU")
    args = p.parse_args(argv)
    if args.compile and not args.arch:
        p.error("--compile goes with --arch")
    if args.profile and args.arch:
        p.error("--profile is of the default, without --arch")
    _, _, DEVICE = run.start(0, "cpu" if args.cpu else "auto")
    if args.arch:
        beside_timm(args.arch, args.crop, args.batch_size, args.recipe, args.rounds, args.compile)
    else:
        parts(args.rounds, args.profile)


if __name__ == "__main__":
    main()
