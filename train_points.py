"""Train on point labels: cross-entropy at the labelled pixels only, on points from a file or drawn from masks.

    python train_points.py                                  demo scenes, 5 points per class and image
    python train_points.py --points points.csv --root D     image,x,y,class; train needs no masks
    python train_points.py --points clicked-centre --points-per-class 3     drawn from masks
    python train_points.py --ema 0.99 --grow 1              learn from the teacher's sure pixels too
    python train_points.py --resume runs/demo-points        go on after a kill

This is train_seg.py with points in place of masks, and a second stage in which the averaged weights
teach, each under a banner of its own. The input is the image, the network gives logits, the loss is
the mean over the labelled points of the whole batch; with a point on every pixel it is train_seg.py.
Validation and test are scored on full masks. What the report on points got wrong: it fed points to
the network, took a softmax before the cross-entropy, did not divide by the number of points, and
reported the scores of always saying the largest class.
"""
import os
import shlex
import time
from functools import partial
from math import ceil, cos, isfinite, pi
from types import SimpleNamespace

# Read when torch loads: threads that spin while they wait cost sixfold on a shared CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from data import augment, crops, metrics, plots, points, public
from data.common import IGNORE, BadInput, json_lines, minutes, without_nan, write
from data.datasets import NORMS
from data.points import UNLABELLED, PointSet
from data.samplers import StepSampler
from data.source import Source, rare_classes
from data.views import Views
from models import checkpoint, features, nets, recipes, run
from models.heads import HEADS
from models.infer import evaluate, examples, rehearse
from models.losses import ce, class_weights, parse_loss, weighted_sum
from models.muon import OPTIMIZERS, optimizer
from models.nets import as_tuple
from models.run import COUNT, RATE, SHARE, WHOLE, between
from models.vit import PRESETS

AUX = 0.4  # weight of an auxiliary head's cross-entropy, as UNetFormer was published
CLIP = 1.0  # limit of the gradient's norm
OVERLAP = 0.25  # of evaluation windows, as a part of --crop
GROW_FROM = 0.4  # part of --steps after which the second stage begins
GROW_ABOVE = 0.8  # mean probability of the views above which a pixel is sure

# Flags that may differ on resume: paths, speed and printing, nothing that changes the result.
MOVABLE = ("log_every", "root", "weights", "cache", "cache_features", "workers", "amp", "device")


def parse_args(argv=None):
    p = run.Parser(__doc__)

    label = p.add_argument_group("points")
    label.add_argument("--points", default="class-balanced",
                       help="CSV or GeoJSON of image, x, y, class; or drawn from masks: "
                            + ", ".join(points.PATTERNS))
    label.add_argument("--points-per-class", type=COUNT,
                       help=f"and image, when drawn ({points.FEW}; of instances and centres all)")
    label.add_argument("--grow", type=RATE, default=0.0,
                       help="weight of the second stage: ce where the averaged weights are sure; "
                            "0 = off")

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
    data.add_argument("--views", type=COUNT,
                      help="fixed crops of every image, in turn, instead of a new one at each draw "
                           "(4 with --cache-features)")
    data.add_argument("--cache-features", metavar="DIR",
                      help="keep a frozen ViT's features of the --views and of val there")
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
    opt.add_argument("--batch-size", type=COUNT, help="per process (recipe)")
    opt.add_argument("--lr", type=between(1e-9, 10), help="learning rate of the head (recipe)")
    opt.add_argument("--backbone-lr", type=RATE, help="of the backbone (recipe)")
    opt.add_argument("--layer-decay", type=RATE,
                     help="factor on the rate per block below the last (recipe)")
    opt.add_argument("--weight-decay", type=RATE, help="of layers (recipe)")
    opt.add_argument("--warmup", type=WHOLE, help="steps of rising rate (recipe)")
    opt.add_argument("--schedule", default="cosine", choices=["cosine", "poly"], help="of the rate")
    opt.add_argument("--loss", default="ce",
                     help="sum of ce, focal, dice, lovasz over the points, such as ce+0.5*dice")
    opt.add_argument("--class-weights", choices=["none", "inverse", "sqrt", "median", "effective"],
                     help="for ce and focal, by the numbers of points (none; sqrt for the demo)")
    opt.add_argument("--ema", type=between(0, 0.99999),
                     help="decay of averaged weights, which are kept; 0 = off (recipe)")
    opt.add_argument("--amp", default="auto", choices=["auto", "bf16", "off"],
                     help="auto: bf16 where it is fast; off: fp32, without TF32")

    r = p.add_argument_group("run")
    r.add_argument("--out", help="run folder (runs/<dataset>-points, numbered when taken)")
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
                  "layer_decay", "dropout", "cache_features")
    run.only_with(p, args, "weights", "none", "arch")
    run.fill_unfreeze(p, args)
    run.check_loss(p, args)
    if args.grow and not recipes.ema_of(args.weights, args.unfreeze, args.ema):
        p.error("--grow without --ema: the averaged weights are the teacher; type --ema 0.99")
    if args.points_per_class and args.points not in points.PATTERNS:
        p.error(f"--points-per-class {args.points_per_class}: for points drawn from masks, not "
                f"--points {args.points}; leave it out")
    if "boundary" in args.loss:
        p.error(f"--loss {args.loss}: points have no boundary; take that term out")
    return args


def lr_at(step, args):
    # A pure function of the step: a resumed run has no scheduler to restore.
    rise = (step + 1) / max(1, args.warmup)
    done = max(0.0, (step - args.warmup) / max(1, args.steps - args.warmup))
    if args.schedule == "cosine":
        fall = 0.5 * (1 + cos(pi * done))
    else:
        fall = (1 - done) ** 0.9  # as DeepLab was published
    return args.lr * min(rise, fall)


def transform(image, mask, rng, ps, args, rare):
    # (H, W, 3) uint8, mask of UNLABELLED and IGNORE, points (n, 3) -> a crop with its points
    def one_of(some):
        return some[rng.integers(len(some)), 1::-1] if len(some) else None  # (y, x)

    def rare_point():
        return one_of(ps[np.isin(ps[:, 2], rare)])

    H, W = mask.shape
    scale, centre = crops.random_place(H, W, args.crop, args.scale, rng, rare_point, args.focus)
    part, _ = crops.crop_window(H, W, args.crop, scale, centre)
    if len(ps) and not len(points.inside(ps, part)):
        # No crop without a point where the image has some.
        centre = crops.around(one_of(ps), args.crop / scale, rng)
    image, mask = crops.crop(image, mask, args.crop, scale, centre)
    # As coordinates, a point stays one pixel at every scale.
    points.mark(mask, ps, *crops.crop_window(H, W, args.crop, scale, centre))
    image, mask = augment.dihedral(image, mask, rng)
    return augment.color(image, rng, args.color), mask


# ---- second stage

@torch.no_grad()
def sure_pixels(teacher, x, above, amp):
    # (B, 3, H, W) -> (B, H, W) class ids, IGNORE where the teacher is not sure
    def look(x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            return teacher(x)

    small = F.interpolate(x, scale_factor=0.75, mode="bilinear", antialias=True,
                          align_corners=False)
    back = F.interpolate(look(small), x.shape[-2:], mode="bilinear", align_corners=False)
    mirrored = look(x.flip(3)).flip(3)
    upside_down = look(x.flip(2)).flip(2)
    views = torch.stack([look(x), mirrored, upside_down, back])  # (4, B, K, H, W) logits
    p, ids = views.softmax(2).mean(0).max(1)
    # Sure: one answer from every view, and a confident mean.
    agree = (views.max(2).indices == ids).all(0)
    return ids.where(agree & (p > above), IGNORE)


def main(args):
    rank, world, device = run.start(args.seed, args.device)
    say = print if rank == 0 else lambda *words, **how: None
    terms = parse_loss(args.loss)  # [(1.0, "ce"), (1.0, "dice")]

    # ---- data
    drawn = args.points in points.PATTERNS  # from masks; with points from a file none is needed
    d = Source(args.dataset, args.root, variant=args.variant, split_file=args.split_file,
               val_frac=args.val_frac, final=args.final, bands=args.bands,
               input_range=args.input_range, cache=args.cache, resume=args.resume, need_masks=drawn,
               skip_bad=args.skip_bad)
    K = len(d.names)
    out = run.folder(args.out, f"runs/{d.name}-points", args.resume)
    say(d.headline())

    # ---- points
    wanted = f"{args.resume}/points.csv" if args.resume else args.points
    given, told = points.open_points(d, wanted, args.points_per_class, args.seed)
    files = d.files("train")
    ps = {name: given[name] for name in files if name in given}
    counts = np.zeros((len(ps), K), int)  # points per image and class
    for i, rows in enumerate(ps.values()):
        counts[i] = np.bincount(rows[:, 2], minlength=K)
    totals = dict(zip(d.names, counts.sum(0).tolist()))
    bare = [name for name in files if not len(ps.get(name, ()))]
    say(f"points  {told}")
    say(f"        {sum(totals.values())} on {len(files) - len(bare)} images: "
        + "  ".join(f"{name} {n}" for name, n in totals.items()))
    if not counts.any():
        raise BadInput(f"{args.points}: no point in a training image; check the image names in it")
    if bare:
        say(f"        {len(bare)} training images have none: "
            + ("for --grow alone" if args.grow else "left out"))
    if not args.grow:
        files = {name: file for name, file in files.items() if name not in bare}
    absent = [name for name, n in totals.items() if n == 0]
    if absent:
        say(f"        WARNING no point of {', '.join(absent)}: never learned")
    rare = rare_classes(counts) if args.focus else []
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
    crops = world  # of a step, times the batch size
    chosen = recipes.fill(recipe, vars(args), sizes, net.backbone.patch if vit else None, crops,
                          quick=args.quick or d.kind == "demo")
    for flag, value in chosen.items():
        setattr(args, flag, value)
    if vit:
        net.dropout.p = args.dropout
    if args.cache_features and args.views is None:
        args.views = features.VIEWS
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

    # ---- optimiser
    # Groups of parameters: group["scale"] is their learning rate as a share of the head's; norms,
    # biases and tokens have no weight decay.
    groups = nets.param_groups(net, args.lr, args.backbone_lr, args.layer_decay, args.weight_decay,
                               trained=not scratch)
    opt = optimizer(args.optimizer, groups, args.lr)
    params = [p for p in net.parameters() if p.requires_grad]
    weights = None  # (K,) of the classes
    if args.class_weights is None:
        args.class_weights = "sqrt" if d.kind == "demo" else "none"
    if args.class_weights != "none":
        weights = class_weights(torch.tensor(counts), args.class_weights).to(device)
        pairs = zip(d.names, weights.tolist())
        say("        class weights " + "  ".join(f"{name} {w:.2f}" for name, w in pairs))
    ema = run.Ema(net, args.ema) if args.ema else None
    judged = ema.net if ema else net  # what is evaluated and kept, and teaches in the second stage
    if ema:
        ema.net.eval()
    model = run.parallel(net, device)  # the same network, whose gradients are averaged over ranks

    # ---- start or resume
    facts = run.facts(device, world)
    # All that a run remembers beside its weights, stored whole in last.pt. bad: non-finite
    # gradients in a row; scored: is the validation of this step done?
    s = SimpleNamespace(step=0, best=-1.0, bad=0, scored=True, seconds=0.0, history=[],
                        command=facts["command"])
    # This rank's answers at training points since the last validation, rows true.
    seen = torch.zeros(K, K, dtype=torch.int64, device=device)
    # What must be equal on resume, or it would be another run.
    same = dict(world=world, weights=info["sha256"], amp=amp,
                labels=d.labels.parts, reading=d.reading,
                kept_features=bool(args.cache_features))
    # Random numbers have no state to restore: each is drawn from the number of its step or sample.
    if args.resume:
        last = checkpoint.load_state(out / "last.pt")
        run.check_same(out, last, same)
        checkpoint.restore(net, last["net"])
        if ema:
            checkpoint.restore(ema.net, last["ema"])
        checkpoint.restore_optimizer(opt, last["opt"])
        checkpoint.take_up(s, last["state"])
        if rank == 0:
            seen += last["seen"].to(device)
        say(f"resume  {out} at step {s.step} of {args.steps}, best val {run.score('mIoU', s.best)}"
            + run.device_change(last, device))
        if args.steps > last["args"]["steps"]:
            s.command += f" && {facts['command']}"
            say(f"        {args.steps} steps instead of {last['args']['steps']}: the rate follows "
                "the longer schedule from here on")
        del last

    how = partial(transform, args=args, rare=rare)
    train = PointSet(files, ps, d.labels, norm, how, args.seed, **d.cache, **d.reading)
    val = points.open_split(d, d.picks, norm, given) if d.picks else None
    test = points.open_split(d, d.reports, norm, given)
    for data in (val, test):
        if isinstance(data, PointSet):
            say(f"        WARNING no masks: scored on the points of {len(data)} images such as "
                f"{data.names[0]}, which tell little of edges")
    train.read(0)  # Images that need --bands or --input-range stop a run that has written nothing.

    # ---- fixed views, and a frozen backbone's features of them and of val's windows
    if args.views:
        train = Views(train, args.views)
    kept_val = None
    if args.cache_features:
        # Runs that agree in this, in the images and in the backbone share the features.
        drawn = dict(seed=args.seed, scale=args.scale, color=args.color, focus=args.focus, rare=rare,
                     points={name: rows.tolist() for name, rows in ps.items()})
        train, kept_val = features.open_kept(args.cache_features, net, info["sha256"], amp, d, train,
                                             drawn, val, args.crop, OVERLAP)
        left = args.steps - s.step
        for text in features.keep_all(net, train, kept_val, args.batch_size, amp, args.workers,
                                      reads=left * crops * args.batch_size,
                                      validations=ceil(left / args.eval_every)):
            say(text, flush=True)

    out = run.claim(out, args.out, args.resume)
    meta = d.about() | nets.about(info) | dict(
        model=spec, norm=norm, crop=args.crop, overlap=OVERLAP, amp="bf16" if amp else "off",
        saved="all")
    if rank == 0:
        write(out / "split.json", d.splits)
        write(out / "files.json", d.fingerprint())
        points.write_points(out / "points.csv", given, d.names)
        selection = f"best {d.picks} mIoU" if d.picks else "last step"
        write(out / "protocol.json", meta | facts | dict(
            command=s.command, flags=vars(args), selection=selection, tta="none",
            absent_class="NaN, not in the mean"))

    def save_last():
        if rank == 0 and s.scored:  # log and curves wait for the validation
            write(out / "log.jsonl", json_lines(s.history))
            title = f"{out.name}: {nets.name_of(spec)}"
            write(out / "curves.png", plots.curves(s.history, title))
            write(out / "bars.png", plots.bars(s.history, f"{title}, on points and on masks"))
        if rank == 0:
            checkpoint.save_state(
                out / "last.pt", net=checkpoint.learned(net), opt=opt.state_dict(), state=vars(s),
                ema=checkpoint.learned(ema.net) if ema else None, args=vars(args),
                seen=seen.cpu(), device=device.type, **same)

    def save_best(miou):
        if rank == 0:
            more = dict(step=s.step, val_miou=miou)
            checkpoint.save_weights(out / "best.safetensors", judged.state_dict(), meta | more)

    window = dict(crop=args.crop, overlap=OVERLAP, batch=args.batch_size, amp=amp)

    def validate():
        cm = evaluate(judged, val, window, args.workers, kept=kept_val)
        miou, oa = metrics.iou(cm).nanmean().item(), metrics.oa(cm)
        scores = {"train": metrics.averages(seen.cpu()), d.picks: metrics.averages(cm)}
        s.history.append(dict(step=s.step, val_miou=miou, val_oa=oa, scores=scores))
        say(f"step {s.step:5d}  {d.picks} mIoU {miou:.4f}  OA {oa:.4f}", flush=True)
        if (cm.sum(0) > 0).sum() == 1:
            say("        WARNING: one class everywhere")
        for split, row in scores.items():
            say(f"  {split:6} {metrics.averages_text(row)}")
        if miou > s.best:
            s.best = miou
            save_best(miou)
        s.scored = True

    # ---- loop
    # Draws are numbered over the whole run, so that a resumed one sees the images that come next.
    draws = StepSampler(len(train), args.batch_size, args.steps, args.seed, s.step, rank, world)
    batches = iter(DataLoader(train, batch_sampler=draws, num_workers=args.workers,
                              pin_memory=device.type == "cuda",
                              worker_init_fn=run.keep_signals_from_worker))
    if val and device.type == "cuda":  # Too little memory shall show now, not at step 1,000.
        rehearse(judged, d.sizes_of(d.picks), window, K)
    stop = run.Stop()
    began = time.time() - s.seconds
    if s.step == 0:
        save_last()  # what is killed before its first validation can be resumed, too
    if not s.scored:
        validate()
        seen.zero_()
        save_last()
    while s.step < args.steps:
        # A stream of random numbers of its own for dropout, another one on each rank.
        step = s.step
        run.seed_torch(4, args.seed, step, rank)
        # (B, 3, H, W), (B, H, W): class ids, UNLABELLED, IGNORE; the backbone's maps where kept.
        x, y, names, *maps = next(batches)
        x, y = run.to_device(x, device), run.to_device(y, device)
        maps = [run.to_device(t, device) for t in maps]
        unlabelled = y == UNLABELLED
        y = y.where(~unlabelled, IGNORE)

        # Over all ranks: how many points count, was any rank told to stop?
        numbers = [(y != IGNORE).sum(), y.new_full((), stop.signal)]
        growing = args.grow > 0 and step >= GROW_FROM * args.steps
        if growing:  # and how many pixels are unlabelled, of how many is the teacher sure?
            grown = sure_pixels(ema.net, x, GROW_ABOVE, amp).where(unlabelled, IGNORE)
            numbers += [unlabelled.sum(), (grown != IGNORE).sum()]
        valid, stopping, *others = run.over_ranks(torch.stack(numbers))

        # forward and backward
        for group in opt.param_groups:
            group["lr"] = group["scale"] * lr_at(step, args)
        opt.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(x, *maps)  # (B, K, H, W)
        logits, *aux = as_tuple(logits)  # of some CNNs an auxiliary head's, too
        loss = weighted_sum(terms, logits, y, weights, count=valid, total=run.over_ranks)
        for z in aux:
            loss = loss + AUX * weighted_sum([(1.0, "ce")], z, y, weights, count=valid)
        sure = torch.zeros((), device=device)
        if growing:
            # A mean over all unlabelled pixels: while few are sure, they weigh little.
            loss = loss + args.grow * ce(logits, grown, others[0])
            sure = others[1] / others[0].clamp(min=1)
        # The loss divides by the pixels of all ranks: to be summed, where DDP takes a mean.
        (loss * world).backward()
        total = loss.detach().clone()
        metrics.count_pairs_(seen, logits.detach().max(1).indices, y)

        # step; one with a non-finite gradient is skipped, five in a row end the run
        grad_norm = torch.nn.utils.clip_grad_norm_(params, CLIP)  # equal on all ranks
        last_step = step + 1 == args.steps
        # Step 20 says early how long it will take.
        log = (step + 1) % args.log_every == 0 or step + 1 == 20 or last_step
        if log:
            run.over_ranks(total)
        # The one place of a step that waits for the GPU.
        numbers = torch.stack([grad_norm, total, stopping.float(), sure])
        grad_norm, total, stopping, sure = numbers.tolist()
        if isfinite(grad_norm):
            s.bad = 0
            opt.step()
            if ema:
                ema.update(step)
        else:
            s.bad += 1
            if s.bad == 5:
                raise BadInput(f"5 non-finite gradients in a row at step {step + 1}, last images "
                               f"{', '.join(names)}; look at them, then start a new run with --lr "
                               f"below {args.lr}")
        s.step += 1
        s.seconds = time.time() - began

        # once in a while: log, validate, save, stop
        if log:
            row = dict(loss=total, lr=lr_at(step, args), grad_norm=grad_norm)
            sure_text = ""
            if growing:
                row["sure"] = sure
                sure_text = f"sure {sure:.1%}  "
            s.history.append(without_nan(dict(step=s.step, **row)))
            rest = minutes(s.seconds / s.step * (args.steps - s.step))
            say(f"step {s.step:5d} of {args.steps}  loss {total:.4f}  |g| {grad_norm:.3f}  "
                f"{sure_text}lr {row['lr']:.2e}  ETA {rest}", flush=True)
        due = s.step % args.eval_every == 0 or last_step
        if due or stopping:  # from here on rank 0 holds the answers of all
            run.over_ranks(seen)
            if rank > 0:
                seen.zero_()
        if due and val:
            s.scored = False  # If the validation dies, it is done when the run goes on.
            save_last()
            validate()
        if last_step and not val:
            save_best(None)  # --final: nothing was held out to choose by
        if due:
            seen.zero_()
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
    cm = evaluate(net, test, window, args.workers, what=d.reports)
    if rank == 0:
        report = dict(split=d.reports, **metrics.report(cm, d.names, d.further))
        base = metrics.majority(cm)
        write(out / "results.json", report | dict(
            scores=metrics.averages(cm), majority_scores=metrics.averages(base),
            points=sum(totals.values()),
            val_miou=s.best if d.picks else None, steps=s.step, seconds=round(s.seconds, 1),
            seed=args.seed, command=s.command))
        rows = examples(net, test, window, 6)
        if isinstance(test, PointSet):  # single points would not be seen
            rows = [(image, None, ids, name) for image, _, ids, name in rows]
        write(out / "samples.png", plots.samples(rows, d.names, d.labels.colors))
        title = f"{d.name} {d.reports}"
        write(out / "confusion.png", plots.confusion(cm.numpy(), d.names, title))
        ious = zip(d.names, metrics.iou(cm).tolist())
        print("  ".join(f"{name} {iou:.3f}" for name, iou in ious))
        print(metrics.headline(report, d.further))
        print(f"{d.reports} {metrics.averages_text(metrics.averages(cm))}")
        always = metrics.averages_text(metrics.averages(base))
        print(f"always {report['majority_class']!r} {always}")
        if d.reports in ("train", d.picks):
            print("  (no other split: the weights were learned or chosen on these very images)")
        print(f"look at {out}/samples.png, confusion.png, bars.png; then, on your own images:\n"
              f"  python predict.py {shlex.quote(str(out))} IMAGE_OR_FOLDER --out predictions")
    run.end()


if __name__ == "__main__":
    with run.one_line_errors(lower="--batch-size or --crop"):
        main(parse_args())
