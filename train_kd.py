"""Train a network on masks and on a trained network's probabilities: knowledge distillation (KD).

    python train_kd.py --teacher runs/demo --arch nano16       a smaller student of the demo run
    python train_kd.py --teacher runs/large --map map.json --root D    teacher of other classes
    python train_kd.py --teacher runs/large --map measured --root D    map from its predictions
    python train_kd.py --alpha 0 --sampler class-balanced --replicate 5% --focus 0.7    without KD
    python train_kd.py --resume runs/demo-kd                   go on after a kill

The loss is alpha T^2 KL(teacher, student) + (1 - alpha) hard: the KL summed over classes and averaged
over valid pixels and the classes that the teacher knows, hard = --loss. This is train_seg.py with a
teacher and sampling of images, under banners of their own, Lookahead and warm restarts; --alpha 0
gives train_seg.py's weights bit for bit.
What the KD report got wrong and this does: classes meet by name, not by position; the KL is not
averaged over classes and has its T^2; difficulty is scored on whole images without augmentation, by
name; repeated images are entries of a list, not files; slow weights are in last.pt.
"""
import os
import shlex
import time
from contextlib import nullcontext
from functools import partial
from math import cos, isfinite, pi
from types import SimpleNamespace

# Read when torch loads: threads that spin while they wait cost sixfold on a shared CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch.utils.data import DataLoader

from data import augment, classmap, metrics, plots, public, samplers
from data.common import IGNORE, BadInput, even_sample, json_lines, minutes, without_nan, write
from data.crops import random_crop
from data.datasets import NORMS, renormalise
from data.ranges import reading_flags
from data.samplers import StepSampler
from data.source import Source, rare_classes
from models import checkpoint, nets, recipes, run
from models.heads import HEADS
from models.infer import evaluate, examples, rehearse
from models.lookahead import Lookahead, cycle_ends, end_step, warm_restarts
from models.losses import LOSSES, class_weights, kl, parse_loss, translate, uses, weighted_sum
from models.muon import OPTIMIZERS, optimizer
from models.nets import as_tuple
from models.run import COUNT, RATE, SHARE, WHOLE, between
from models.vit import PRESETS
from models.weights import sha256

LEAST = 0.05  # a measured share below this is dropped as stray pixels
AUX = 0.4  # weight of an auxiliary head's cross-entropy, as UNetFormer was published
CLIP = 1.0  # limit of the gradient's norm
OVERLAP = 0.25  # of evaluation windows, as a part of --crop
# Masks per split that are read before training. Class weights need those of train all.
CHECKED = 64

# Flags that may differ on resume: paths, speed and printing, nothing that changes the result.
MOVABLE = ("log_every", "root", "weights", "cache", "workers", "teacher", "difficulty", "amp",
           "device")


def parse_args(argv=None):
    p = run.Parser(__doc__)

    kd = p.add_argument_group("distillation")
    kd.add_argument("--teacher", help="run folder of a trained network, or its best.safetensors")
    kd.add_argument("--map", default="names", help="of classes: names, measured, or a JSON file")
    kd.add_argument("--within", default="student", choices=["student", "shares"],
                    help="who divides a teacher class that goes to several")
    kd.add_argument("--alpha", type=SHARE, default=0.7, help="weight of the KL term")
    kd.add_argument("--temperature", type=between(0.1, 100), default=2.0, help="T of the softmaxes")

    draw = p.add_argument_group("sampling")
    draw.add_argument("--sampler", choices=["uniform", "weighted", "class-balanced"],
                      default="uniform", help="which images are drawn more often")
    draw.add_argument("--difficulty", help="for weighted: the file of eval.py --difficulty")
    draw.add_argument("--replicate", metavar="FILE",
                      help="training images to repeat; 5%%: those that a rare class covers so far")

    data = p.add_argument_group("data")
    data.add_argument("--dataset", choices=["demo", "folder", *public.SETS],
                      help="(demo without --root, folder with it)")
    data.add_argument("--root", help="folder with images, masks and dataset.json")
    data.add_argument("--variant", help="form of a public set that has several: rgb,eroded")
    data.add_argument("--bands", type=run.bands, help="three of images with more, from 1: 4,1,2")
    data.add_argument("--input-range", action=run.InputRange, nargs="+", metavar=("LOW", "HIGH"),
                      help="values that become 0 and 255: two numbers, six for three bands, or "
                           "percentiles of the training images such as p2-98")
    data.add_argument("--split-file", help="JSON {split: [names]}, such as a run's split.json")
    data.add_argument("--val-frac", type=SHARE, help="part of train that chooses weights, if no val")
    data.add_argument("--final", action="store_true", help="do not validate; keep the last weights")
    data.add_argument("--skip-bad", action="store_true", help="list bad images, leave them out")
    data.add_argument("--crop", type=between(recipes.LEAST_CROP, 2**15, int),
                      help="side in pixels (recipe)")
    data.add_argument("--scale", type=between(0.05, 20), nargs=2,
                      help="range of random scales (recipe)")
    data.add_argument("--color", type=SHARE, default=0.2, help="strength of colour changes")
    data.add_argument("--focus", type=SHARE, default=0.3,
                      help="share of crops laid around a pixel of a rare class")
    data.add_argument("--cache", help="folder for decoded images, or off (~/.cache/nanors)")
    data.add_argument("--workers", type=between(0, 64, int), default=min(4, os.cpu_count() - 1),
                      help="reading processes")

    model = p.add_argument_group("model")
    model.add_argument("--model", default="vit", choices=["vit", *nets.NETS],
                       help="vit with a --head, or a whole network")
    model.add_argument("--weights", default="none", help="DINO (or CNN) file, folder or URL")
    model.add_argument("--arch", default="nano16", choices=sorted(PRESETS),
                       help="backbone without --weights; no small one was better at equal time")
    model.add_argument("--head", default="fpn", choices=sorted(HEADS), help="decoder of a vit")
    model.add_argument("--dropout", type=between(0, 0.9),
                       help="of the channels that the head reads (recipe)")
    model.add_argument("--unfreeze", type=run.blocks,
                       help="last K blocks, or all (0 with --weights, else all)")
    model.add_argument("--norm", default="auto", choices=["auto", *NORMS],
                       help="mean and std of pixels; auto: as the weights were trained")

    opt = p.add_argument_group("optimiser", "(recipe): from scratch, frozen or tuned; the run prints it")
    opt.add_argument("--quick", action="store_true",
                     help=f"{recipes.QUICK['steps']} steps, a trial; the demo is always so")
    opt.add_argument("--optimizer", choices=OPTIMIZERS, help="muon is for random weights (recipe)")
    opt.add_argument("--steps", type=COUNT, help="optimiser steps (recipe)")
    opt.add_argument("--batch-size", type=COUNT, help="per process and micro-batch (recipe)")
    opt.add_argument("--accum", type=COUNT, default=1, help="micro-batches per step")
    opt.add_argument("--lr", type=between(1e-9, 10), help="learning rate of the head (recipe)")
    opt.add_argument("--backbone-lr", type=RATE, help="of the backbone (recipe)")
    opt.add_argument("--layer-decay", type=RATE,
                     help="factor on the rate per block below the last (recipe)")
    opt.add_argument("--weight-decay", type=RATE, help="of layers (recipe)")
    opt.add_argument("--warmup", type=WHOLE, help="steps of rising rate (recipe)")
    opt.add_argument("--schedule", default="cosine", choices=["cosine", "poly"], help="of the rate")
    opt.add_argument("--restarts", type=COUNT, nargs=2, metavar=("STEPS", "MULT"),
                     help="warm restarts: steps of the first cycle, factor of each next one")
    opt.add_argument("--lookahead", type=COUNT, metavar="STEPS",
                     help="steps between synchronisations with slow weights, 5 as published")
    opt.add_argument("--loss", default="ce+dice",
                     help=f"sum of {', '.join(LOSSES)}, such as ce+0.5*dice")
    opt.add_argument("--class-weights", choices=["none", "inverse", "sqrt", "median", "effective"],
                     help="for ce and focal (none; sqrt for the demo)")
    opt.add_argument("--label-smoothing", type=between(0, 0.9), default=0.0, help="of ce")
    opt.add_argument("--ema", type=between(0, 0.99999),
                     help="decay of averaged weights, which are kept; 0 = off (recipe)")
    opt.add_argument("--amp", default="auto", choices=["auto", "bf16", "off"],
                     help="auto: bf16 where it is fast; off: fp32, without TF32")

    r = p.add_argument_group("run")
    r.add_argument("--out", help="run folder (runs/<dataset>-kd, numbered when taken)")
    r.add_argument("--resume", metavar="RUN", help="go on with a run, with its flags")
    r.add_argument("--seed", type=WHOLE, default=0, help="of weights, crops and order")
    r.add_argument("--eval-every", type=COUNT,
                   help="steps between validations, where last.pt is written (recipe)")
    r.add_argument("--log-every", type=COUNT, default=50, help="steps between log lines")
    r.add_argument("--device", type=run.device_name, default="auto",
                   help="cpu, cuda or cuda:1; auto: a GPU if there is one")

    args = run.parse(p, argv, MOVABLE)
    run.check_rising(p, args, "scale")
    run.only_with(p, args, "model", "vit", "arch", "head", "unfreeze",
                  "layer_decay", "dropout")
    run.only_with(p, args, "weights", "none", "arch")
    run.fill_unfreeze(p, args)
    run.check_loss(p, args)
    if args.alpha == 0:
        # "above 0" is no value of --alpha: it completes the message.
        run.only_with(p, args, "alpha", "above 0", "teacher", "map", "within", "temperature")
    elif args.alpha == 1:
        run.only_with(p, args, "alpha", "below 1", "loss", "class_weights", "label_smoothing")
    if args.alpha and not args.teacher:
        p.error("--teacher is missing; name the run folder of a trained network, or type --alpha 0")
    files = {"teacher": args.teacher}
    if args.map not in ("names", "measured"):
        files["map"] = args.map
    if args.replicate and not args.replicate.endswith("%"):
        files["replicate"] = args.replicate
    for name, file in files.items():
        # A run that goes on has what it needs of them.
        if file and not args.resume and not os.path.exists(file):
            p.error(f"--{name} {file}: no such file or folder")
    run.only_with(p, args, "sampler", "weighted", "difficulty")
    if args.sampler == "weighted" and not args.difficulty:
        p.error("--sampler weighted without --difficulty; make the file with python eval.py RUN "
                "--split train --difficulty")
    if args.restarts and args.schedule != "cosine" and not args.resume:
        p.error("--restarts has cosines of its own; leave --schedule out")
    # Here what was typed, in main() what the recipe has chosen.
    end_step(args.steps, args.eval_every, args.restarts, args.lookahead)
    return args


def lr_at(step, args):
    # A pure function of the step: a resumed run has no scheduler to restore.
    rise = (step + 1) / max(1, args.warmup)
    done = max(0.0, (step - args.warmup) / max(1, args.steps - args.warmup))
    if args.restarts:
        fall = warm_restarts(step, *args.restarts)
    elif args.schedule == "cosine":
        fall = 0.5 * (1 + cos(pi * done))
    else:
        fall = (1 - done) ** 0.9  # as DeepLab was published
    return args.lr * min(rise, fall)


def transform(image, mask, rng, args, rare):
    # (H, W, 3), (H, W) uint8 -> a crop of both; all randomness comes from rng
    image, mask = random_crop(image, mask, args.crop, args.scale, rng, rare, args.focus)
    image, mask = augment.dihedral(image, mask, rng)
    return augment.color(image, rng, args.color), mask


# ---- KD

def load_teacher(args, d, device):
    # -> network in eval mode, where it stays, and what its run says of it
    teacher, theirs = nets.load_run(args.teacher)
    # Both see the same pixels: of equal percentiles those of the teacher's training images.
    if d.percentiles and theirs.get("percentiles") == d.percentiles:
        d.reading["input_range"] = theirs["reading"]["input_range"]
    if theirs["reading"] != d.reading:
        flags = shlex.join(reading_flags(**theirs["reading"])) or "neither"
        raise BadInput(f"{args.teacher}: reads images with {theirs['reading']}, this run with "
                       f"{d.reading}; type the same --bands and --input-range: {flags}, and take "
                       "what else says so out of dataset.json")
    d.check_kinds("train", theirs, run="--teacher")
    return teacher.to(device).requires_grad_(False), theirs


def map_classes(args, d, teacher, theirs, amp):
    # -> (teacher's classes, K) shares of sum 1 or 0, and the table that shows them
    names = [c["name"] for c in theirs["classes"]]
    if args.resume:
        shares = classmap.read_map(f"{args.resume}/map.json", names, d.names)
        return shares, classmap.table(names, d.names, **{"map in use": shares})

    # Rows teacher, columns masks: pixels of some training images. It is the map, or a check of it.
    some = even_sample(d.splits["train"], CHECKED)
    seen = d.part("train", theirs["norm"], names=some)
    window = dict(crop=theirs["crop"], overlap=theirs["overlap"], batch=args.batch_size, amp=amp)
    k = max(len(names), len(d.names))
    cm = evaluate(teacher, seen, window, args.workers, classes=k, what="teacher").T
    least = LEAST if args.map == "measured" and args.within == "student" else 0.0
    measured = classmap.measured(cm[:len(names), :len(d.names)].numpy(), least)

    if args.map == "measured":
        shares = measured
    elif args.map == "names":
        shares = classmap.same_names(names, d.names)
    else:
        shares = classmap.read_map(args.map, names, d.names)
    columns = {"map in use": shares, f"measured on {len(some)} images": measured}
    text = classmap.table(names, d.names, **columns)
    if odd := classmap.contradicted(names, shares, measured):
        text += f"\nWARNING what the teacher calls {', '.join(odd)} is mostly something else here"
    if not shares.any():
        raise BadInput(f"{args.map}: all of the teacher's classes go nowhere; correct the map")
    return shares, text


@torch.no_grad()
def soft_targets(teacher, x, change, temperature, amp):
    # (B, 3, H, W), the student's own pixels -> (B, teacher's classes, H, W) fp32
    if change is not None:
        x = x * change[0] + change[1]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        logits = teacher(x)
    return (logits.float() / temperature).softmax(1)


def main(args):
    rank, world, device = run.start(args.seed, args.device)
    say = print if rank == 0 else lambda *words, **how: None
    terms = parse_loss(args.loss)  # [(1.0, "ce"), (1.0, "dice")]

    # ---- data
    d = Source(args.dataset, args.root, variant=args.variant, split_file=args.split_file,
               val_frac=args.val_frac, final=args.final, bands=args.bands,
               input_range=args.input_range, cache=args.cache, resume=args.resume,
               skip_bad=args.skip_bad)
    K = len(d.names)
    out = run.folder(args.out, f"runs/{d.name}-kd", args.resume)
    say(d.headline())

    if args.class_weights is None:
        args.class_weights = "sqrt" if d.kind == "demo" else "none"
    weighted = args.class_weights != "none" and uses(terms, "class_weights")
    # Pixels per class of the training masks that are read, (N, K + 1), ignored ones last.
    counts = d.count(limit=None if weighted else CHECKED)
    percents = zip([*d.names, "ignored"], counts.sum(0) / counts.sum())
    percents = "  ".join(f"{name} {percent:.2%}" for name, percent in percents)
    say(f"        in {len(counts)} training masks: {percents}")
    absent = [name for name, n in zip(d.names, counts.sum(0)) if n == 0]
    if absent:
        say(f"        WARNING: no pixel of {', '.join(absent)} in them")
    rare = rare_classes(counts[:, :K]) if args.focus else []
    if rare:
        names = ", ".join(d.names[c] for c in rare)
        say(f"        {args.focus:.0%} of the crops lie around {names} (--focus)")

    # ---- network
    scratch, vit = args.weights == "none", args.model == "vit"
    # spec: all that builds the network again; info: what is known of --weights (line, norm, ...).
    net, spec, info = nets.make(args.model, K, args.weights, args.arch, args.head)
    norm = nets.choose_norm(args.norm, info)

    frozen = nets.unfreeze(net, args.unfreeze)

    # What was not typed is the recipe's: models/recipes.py has one for training from scratch, one
    # for a frozen backbone and one for a tuned one.
    recipe = recipes.name_of(args.weights, frozen)
    sizes = d.sizes_of("train")
    crops = args.accum * world  # of a step, times the batch size
    chosen = recipes.fill(recipe, vars(args), sizes, net.backbone.patch if vit else None, crops,
                          quick=args.quick or d.kind == "demo")
    typed_warmup = args.warmup
    for flag, value in chosen.items():
        setattr(args, flag, value)
    if vit:
        net.dropout.p = args.dropout
    asked = args.steps
    args.steps = end_step(asked, args.eval_every, args.restarts, args.lookahead)
    if args.restarts and typed_warmup is None:  # The first cycle, which is the shortest, reaches its rate.
        args.warmup = min(args.warmup, args.restarts[0] // 2)
    elif args.restarts and not args.resume:
        recipes.check_schedule(args.restarts[0], args.warmup, args.eval_every,
                               longer="a longer first cycle of --restarts")
    net = run.synchronise_norms(net, device).to(device).train()
    amp = args.amp == "bf16"
    if args.amp == "auto":  # on a CPU only under a frozen backbone
        amp = run.fast_bf16(device) and (frozen or device.type == "cuda")
    say(f"model   {nets.name_of(spec)}, {info['line']}")
    say(f"        {nets.size_line(net, scratch)}, normalisation {norm}, "
        f"{run.precision(amp, device)}")
    say(recipes.text(recipe, vars(args), sizes, crops))
    if not scratch and info["norm"] not in (None, norm):
        say(f"        WARNING --norm {norm}, but these weights were trained with {info['norm']}")
    bn_frozen = nets.freeze_bn(net) if args.batch_size == 1 else False
    if bn_frozen:
        say("        BatchNorm keeps its statistics: it cannot learn from batches of one")

    # ---- KD, after the student: with --alpha 0 the same random numbers as in train_seg.py
    teacher, kd_about = None, {}
    if args.alpha > 0:
        teacher, theirs = load_teacher(args, d, device)
        say(f"teacher {args.teacher}: {nets.name_of(theirs['model'])}, {len(theirs['classes'])} "
            f"classes, normalisation {theirs['norm']}, trained at {theirs['crop']} px")
        shares, text = map_classes(args, d, teacher, theirs, amp)
        say("        " + text.replace("\n", "\n        "))
        class_map = classmap.rows([c["name"] for c in theirs["classes"]], d.names, shares)
        kd_about = dict(teacher=args.teacher, alpha=args.alpha, temperature=args.temperature,
                        within=args.within, map=class_map,
                        sha256=sha256(checkpoint.weights_file(args.teacher)))
        several = (shares > 0).sum(1) > 1
        by_student = args.within == "student" and several.any()
        known = None  # all classes, or the numbers of those that the teacher speaks of
        if not shares.any(0).all():
            known = torch.tensor(np.flatnonzero(shares.any(0)), device=device)
        shares = torch.tensor(shares, dtype=torch.float32, device=device)
        change = renormalise(norm, theirs["norm"], device)

    # ---- sampling
    plain = d.part("train", norm)
    plain.read(0)  # Images that need --bands or --input-range stop a run that has written nothing.
    items = image_weights = listed = difficulty = None
    if args.replicate:
        listed = d.names_to_repeat(args.replicate, args.resume)
        items = samplers.replicated(plain.names, listed)
        say(f"        {len(listed)} entries repeat training images: {len(items)} instead of "
            f"{len(plain)} (--replicate)")
    if args.sampler == "class-balanced":
        image_weights = samplers.balanced_weights(d.count_as_read("train"))
    if args.sampler == "weighted":
        file = out / "difficulty.json" if args.resume else args.difficulty
        difficulty = samplers.read_difficulty(file, plain.names)  # {name: hard classes}
        image_weights = samplers.difficulty_weights(list(difficulty.values()))
        found = zip(*np.unique(list(difficulty.values()), return_counts=True))
        say("        hard classes: " + ", ".join(f"{h} in {n} images" for h, n in found))

    # ---- optimiser
    # Groups of parameters: group["scale"] is their learning rate as a share of the head's; norms,
    # biases and tokens have no weight decay.
    groups = nets.param_groups(net, args.lr, args.backbone_lr, args.layer_decay, args.weight_decay,
                               trained=not scratch)
    opt = optimizer(args.optimizer, groups, args.lr)
    params = [p for p in net.parameters() if p.requires_grad]
    weights = None  # (K,) of the classes
    if weighted:
        weights = class_weights(torch.tensor(counts[:, :K]), args.class_weights).to(device)
        pairs = zip(d.names, weights.tolist())
        say("        class weights " + "  ".join(f"{name} {w:.2f}" for name, w in pairs))
    ema = run.Ema(net, args.ema) if args.ema else None
    judged = ema.net if ema else net  # what is evaluated and kept
    model = run.parallel(net, device)  # the same network, whose gradients are averaged over ranks
    look = Lookahead(params, args.lookahead) if args.lookahead else None
    if args.restarts:
        ends = cycle_ends(*args.restarts, args.steps)
        say(f"        warm restarts: {args.steps} of {asked} steps, cycles end at "
            f"{', '.join(map(str, ends))}")

    # ---- start or resume
    facts = run.facts(device, world)
    # All that a run remembers beside its weights, stored whole in last.pt. bad: non-finite
    # gradients in a row; scored: is the validation of this step done?
    s = SimpleNamespace(step=0, best=-1.0, bad=0, scored=True, seconds=0.0, history=[],
                        command=facts["command"])
    # What must be equal on resume, or it would be another run.
    same = dict(world=world, weights=info["sha256"], amp=amp,
                labels=d.labels.parts, reading=d.reading,
                teacher=kd_about.get("sha256"))
    # Random numbers have no state to restore: each is drawn from the number of its step or sample.
    if args.resume:
        last = checkpoint.load_state(out / "last.pt")
        run.check_same(out, last, same)
        checkpoint.restore(net, last["net"])
        if ema:
            checkpoint.restore(ema.net, last["ema"])
        checkpoint.restore_optimizer(opt, last["opt"])
        if look:
            look.load(last["slow"])
        checkpoint.take_up(s, last["state"])
        say(f"resume  {out} at step {s.step} of {args.steps}, best val {run.score('mIoU', s.best)}"
            + run.device_change(last, device))
        if args.steps > last["args"]["steps"]:
            s.command += f" && {facts['command']}"
            say(f"        {args.steps} steps instead of {last['args']['steps']}: the rate follows "
                "the longer schedule from here on")
        del last

    train = d.part("train", norm, partial(transform, args=args, rare=rare), args.seed)
    val = d.part(d.picks, norm) if d.picks else None
    out = run.claim(out, args.out, args.resume)
    meta = d.about() | nets.about(info) | dict(
        model=spec, norm=norm, crop=args.crop, overlap=OVERLAP, amp="bf16" if amp else "off",
        saved="all")
    if rank == 0:
        write(out / "split.json", d.splits)
        write(out / "files.json", d.fingerprint())
        selection = f"best {d.picks} mIoU" if d.picks else "last step"
        write(out / "protocol.json", meta | facts | dict(
            command=s.command, flags=vars(args), selection=selection, tta="none",
            absent_class="NaN, not in the mean", distillation=kd_about))
        if teacher:
            classes = [c["name"] for c in theirs["classes"]]
            write(out / "map.json", dict(teacher=classes, student=d.names, map=class_map))
        if listed is not None:
            write(out / "replicated.txt", "".join(f"{name}\n" for name in listed))
        if difficulty is not None:
            write(out / "difficulty.json", difficulty)

    def save_last():
        if rank == 0 and s.scored:  # log and curves wait for the validation
            write(out / "log.jsonl", json_lines(s.history))
            write(out / "curves.png", plots.curves(s.history, f"{out.name}: {nets.name_of(spec)}"))
        if rank == 0:
            checkpoint.save_state(
                out / "last.pt", net=checkpoint.learned(net), opt=opt.state_dict(), state=vars(s),
                ema=checkpoint.learned(ema.net) if ema else None,
                slow=look.slow if look else None, args=vars(args),
                device=device.type, **same)

    def save_best(miou):
        if rank == 0:
            more = dict(step=s.step, val_miou=miou)
            checkpoint.save_weights(out / "best.safetensors", judged.state_dict(), meta | more)

    window = dict(crop=args.crop, overlap=OVERLAP, batch=args.batch_size, amp=amp)

    def validate():
        cm = evaluate(judged, val, window, args.workers)
        miou, oa = metrics.iou(cm).nanmean().item(), metrics.oa(cm)
        s.history.append(dict(step=s.step, val_miou=miou, val_oa=oa))
        say(f"step {s.step:5d}  {d.picks} mIoU {miou:.4f}  OA {oa:.4f}", flush=True)
        if (cm.sum(0) > 0).sum() == 1:
            say("        WARNING: one class everywhere")
        if miou > s.best:
            s.best = miou
            save_best(miou)
        s.scored = True

    # ---- loop
    # Draws are numbered over the whole run and by micro-batches, so that a resumed run sees the
    # images that come next.
    micro_steps = args.steps * args.accum
    done = s.step * args.accum
    draws = StepSampler(len(train), args.batch_size, micro_steps, args.seed, done, rank, world,
                        items, image_weights)
    batches = iter(DataLoader(train, batch_sampler=draws, num_workers=args.workers,
                              pin_memory=device.type == "cuda",
                              worker_init_fn=run.keep_signals_from_worker))
    if image_weights is not None:
        drawn = micro_steps * args.batch_size * world
        times = drawn * draws.share
        say(f"        {drawn} crops drawn with replacement, an image {times.min():.1f} to "
            f"{times.max():.1f} times (--sampler {args.sampler})")
    if val and device.type == "cuda":  # Too little memory shall show now, not at step 1,000.
        rehearse(judged, d.sizes_of(d.picks), window, K)
    stop = run.Stop()
    began = time.time() - s.seconds
    if s.step == 0:
        save_last()  # what is killed before its first validation can be resumed, too
    if not s.scored:
        validate()
        save_last()
    while s.step < args.steps:
        # A stream of random numbers of its own for dropout, another one on each rank.
        step = s.step
        run.seed_torch(4, args.seed, step, rank)

        # The micro-batches, and over all ranks: how many pixels count, was any rank told to stop?
        micro, valid = [], 0
        for _ in range(args.accum):
            x, y, names = next(batches)  # (B, 3, H, W), (B, H, W); 255 = ignore
            micro.append((x, y))
            valid += (y != IGNORE).sum()
        numbers = torch.tensor([valid, stop.signal]).to(device, non_blocking=True)
        valid, stopping = run.over_ranks(numbers)

        # forward and backward
        for group in opt.param_groups:
            group["lr"] = group["scale"] * lr_at(step, args)
        opt.zero_grad(set_to_none=True)
        totals = torch.zeros(2, device=device)  # KD, hard
        for i, (x, y) in enumerate(micro):
            # Gradients cross ranks once, in the last micro-batch.
            skip_sync = world > 1 and i + 1 < args.accum
            with model.no_sync() if skip_sync else nullcontext():
                x, y = run.to_device(x, device), run.to_device(y, device)
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    logits = model(x)  # (B, K, H, W)
                logits, *aux = as_tuple(logits)  # of some CNNs an auxiliary head's, too
                hard = weighted_sum(terms, logits, y, weights, args.label_smoothing, count=valid,
                                    total=run.over_ranks)
                for z in aux:
                    ce = weighted_sum([(1.0, "ce")], z, y, weights, count=valid)
                    hard = hard + AUX * ce
                hard = (1 - args.alpha) * hard
                kd = torch.zeros((), device=device)
                if teacher:
                    soft = soft_targets(teacher, x, change, args.temperature, amp)
                    own = logits if by_student else None
                    target = translate(soft, shares, own, args.temperature)  # (B, K, H, W)
                    kd = args.alpha * kl(logits, target, y, args.temperature, valid, known)
                loss = hard + kd
                # The loss divides by the pixels of all ranks: to be summed, where DDP takes a mean.
                (loss * world).backward()
            totals += torch.stack([kd, hard]).detach()

        # step; one with a non-finite gradient is skipped, five in a row end the run
        grad_norm = torch.nn.utils.clip_grad_norm_(params, CLIP)  # equal on all ranks
        last_step = step + 1 == args.steps
        # Step 20 says early how long it will take.
        log = (step + 1) % args.log_every == 0 or step + 1 == 20 or last_step
        if log:
            run.over_ranks(totals)
        # The one place of a step that waits for the GPU.
        numbers = torch.stack([grad_norm, *totals, stopping.float()])
        grad_norm, kd, hard, stopping = numbers.tolist()
        if isfinite(grad_norm):
            s.bad = 0
            opt.step()
        else:
            s.bad += 1
            if s.bad == 5:
                raise BadInput(f"5 non-finite gradients in a row at step {step + 1}, last images "
                               f"{', '.join(names)}; look at them, then start a new run with --lr "
                               f"below {args.lr}")
        if look:  # also behind a skipped step, so that meetings stay where they are
            look.update(step)
        if ema and s.bad == 0:
            ema.update(step)
        s.step += 1
        s.seconds = time.time() - began

        # once in a while: log, validate, save, stop
        if log:
            row = dict(loss=kd + hard, lr=lr_at(step, args), grad_norm=grad_norm)
            if teacher:
                row |= dict(kd=kd, hard=hard)
            s.history.append(without_nan(dict(step=s.step, **row)))
            rest = minutes(s.seconds / s.step * (args.steps - s.step))
            say(f"step {s.step:5d} of {args.steps}  loss {kd + hard:.4f} = {kd:.4f} KD + {hard:.4f} "
                f"hard  |g| {grad_norm:.3f}  lr {row['lr']:.2e}  ETA {rest}", flush=True)
        due = s.step % args.eval_every == 0 or last_step
        if due and val:
            s.scored = False  # If the validation dies, it is done when the run goes on.
            save_last()
            validate()
        if last_step and not val:
            save_best(None)  # --final: nothing was held out to choose by
        if due or stopping:
            save_last()
        if stopping:
            break

    if stop.told(device):  # in a step, or in the last validation
        say(f"stopped at step {s.step} of {args.steps}; go on: {run.again(out)}", flush=True)
        run.end()
        stop.exit()

    # ---- report: the kept weights on the split that nothing above has looked at
    stop.release()
    run.wait()  # until rank 0 has written best.safetensors
    tensors, _ = checkpoint.load_weights(out / "best.safetensors")
    net.load_state_dict(tensors)
    test = d.part(d.reports, norm)
    cm = evaluate(net, test, window, args.workers, what=d.reports)
    if rank == 0:
        report = dict(split=d.reports, **metrics.report(cm, d.names, d.further))
        write(out / "results.json", report | dict(
            val_miou=s.best if d.picks else None, steps=s.step, seconds=round(s.seconds, 1),
            seed=args.seed, command=s.command))
        rows = examples(net, test, window, 6)
        write(out / "samples.png", plots.samples(rows, d.names, d.labels.colors))
        title = f"{d.name} {d.reports}"
        write(out / "confusion.png", plots.confusion(cm.numpy(), d.names, title))
        ious = zip(d.names, metrics.iou(cm).tolist())
        print("  ".join(f"{name} {iou:.3f}" for name, iou in ious))
        print(metrics.headline(report, d.further))
        if d.reports in ("train", d.picks):
            print("  (no other split: the weights were learned or chosen on these very images)")
        print(f"look at {out}/samples.png, confusion.png, curves.png; then, on your own images:\n"
              f"  python predict.py {shlex.quote(str(out))} IMAGE_OR_FOLDER --out predictions")
    run.end()


if __name__ == "__main__":
    with run.one_line_errors(lower="--batch-size or --crop"):
        main(parse_args())
