"""Classify whole images: k-NN or linear probe on frozen features, fine-tuning, and a CNN to compare with.

    python train_cls.py --root EuroSAT                               CNN from scratch, on a CPU
    python train_cls.py --root EuroSAT --features mean               k-NN on channel means
    python train_cls.py --root D --weights dinov2_vitb14_pretrain.pth    linear probe
    python train_cls.py --root D --weights FILE --mode finetune      or --mode knn
    torchrun --standalone --nproc_per_node=8 train_cls.py ...        --batch-size is per process
    python train_cls.py --resume runs/eurosat-cnn                    go on after a kill

--root: ROOT/CLASS/images, ROOT/{train,val,test}/CLASS/images, or any parent of EuroSAT's 2750.
Reads in the order in which it runs: flags; main() opens the data and makes the network; probe()
compares heads on frozen features, train() trains a network; main() reports.
What the report on EuroSAT got wrong: its classes were not EuroSAT's, ten outputs had four classes to
learn, there was no validation split, test held other images, and no baseline stood beside 72.9 %.
"""
import math
import os
import shlex
import time
from types import SimpleNamespace

# Read when torch loads: threads that spin while they wait cost sixfold on a shared CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import augment, metrics, plots
from data.common import BadInput, escaped, json_lines, minutes, without_nan, write
from data.datasets import NORMS
from data.samplers import StepSampler
from data.scenes import FRACTIONS, Scenes, augment_scenes, prepare
from models import checkpoint, nets, run
from models.classify import CNNS, fit_linear
from models.muon import OPTIMIZERS, optimizer
from models.run import COUNT, RATE, SHARE, WHOLE, between
from models.vit import PRESETS

CLIP = 1.0  # limit of the gradient's norm
WARMUP = 50  # steps of rising rate; fewer in a run of less than five times as many
CARDS = 16  # pictures in each part of samples.png

# Flags that may differ on resume: paths, speed and printing, nothing that changes the result.
MOVABLE = "log_every", "root", "weights", "cache", "amp", "device"


def parse_args(argv=None):
    p = run.Parser(__doc__)

    data = p.add_argument_group("data")
    data.add_argument("--root", help="folder with a sub-folder of images per class, or its parent")
    data.add_argument("--classes", nargs="+", metavar="NAME",
                      help="the classes to take, in this order (all of train)")
    data.add_argument("--split-file", help="JSON {split: [names]}, such as a run's split.json")
    data.add_argument("--fractions", type=SHARE, nargs=3, default=list(FRACTIONS),
                      metavar=("TRAIN", "VAL", "TEST"),
                      help="shares of every class, where nothing else gives splits")
    data.add_argument("--split-seed", type=WHOLE, default=0, help="of that draw")
    data.add_argument("--group-regex", help="the scene in a name: the draw keeps scenes together")
    data.add_argument("--per-class", type=COUNT, help="few-shot: so many training images per class")
    data.add_argument("--skip-bad", action="store_true", help="list bad images, leave them out")
    data.add_argument("--bands", type=run.bands, help="three of images with more, from 1: 4,1,2")
    data.add_argument("--input-range", action=run.InputRange, nargs="+", metavar=("LOW", "HIGH"),
                      help="values that become 0 and 255: two numbers, six for three bands, or "
                           "percentiles of the training images such as p2-98")
    data.add_argument("--size", type=between(8, 2**12, int),
                      help="side of the network's input (the images' own; with --weights 224)")
    data.add_argument("--crop", type=between(0.1, 1),
                      help="side of a random window in training, as a part of the image's (0.75 of "
                           "a CNN from scratch, 0.94)")
    data.add_argument("--mixup", type=SHARE, default=0.0, help="probability per batch")
    data.add_argument("--cutmix", type=SHARE, default=0.0, help="probability per batch")
    data.add_argument("--cache", help="folder for decoded images, or off (~/.cache/nanors)")

    model = p.add_argument_group("model")
    model.add_argument("--mode", choices=["knn", "linear", "finetune", "cnn"],
                       help="(linear with --weights, knn with --features mean, else cnn)")
    model.add_argument("--weights", default="none", help="DINO (or CNN) file, folder or URL")
    model.add_argument("--arch", default="nano8", choices=sorted(PRESETS),
                       help="backbone without --weights")
    model.add_argument("--features", default="cls+patch", choices=["cls+patch", "cls", "mean"],
                       help="cls token and mean patch token, cls alone, or channel means")
    model.add_argument("--cnn", default="nano", choices=CNNS, help="network of --mode cnn")
    model.add_argument("--stem", choices=["small", "imagenet"],
                       help="of a ResNet: 3x3, or 7x7 and pool (imagenet with --weights)")
    model.add_argument("--norm", default="auto", choices=["auto", *NORMS],
                       help="mean and std of pixels; auto: as the weights were trained")
    model.add_argument("--unfreeze", type=run.blocks, default="all",
                       help="last K blocks to fine-tune, or all")
    model.add_argument("--save", default="all", choices=["all", "head"],
                       help="head: without the frozen backbone")
    model.add_argument("--k", type=COUNT, nargs="+", default=[5, 10, 20, 50],
                       help="numbers of neighbours; val chooses")
    model.add_argument("--temperature", type=between(1e-9, 1e9), default=0.07,
                       help="of the k-NN votes")
    model.add_argument("--lrs", type=between(1e-9, 100), nargs="+", metavar="RATE",
                       default=[0.003, 0.01, 0.03, 0.1, 0.3, 1.0],
                       help="learning rates of the linear probe; val chooses")

    opt = p.add_argument_group("optimiser")
    opt.add_argument("--optimizer", choices=OPTIMIZERS,
                     help="(muon from scratch; adamw with --weights)")
    opt.add_argument("--epochs", type=COUNT, help="passes over train (15; linear 100)")
    opt.add_argument("--batch-size", type=between(2, 2**31, int), default=64, help="per process")
    opt.add_argument("--lr", type=between(1e-9, 10),
                     help="learning rate of the head (2e-3 from scratch, CNN 3e-3; 1e-3 with --weights)")
    opt.add_argument("--backbone-lr", type=RATE,
                     help="(--lr from scratch; with --weights 2e-5, of a CNN 1e-4)")
    opt.add_argument("--layer-decay", type=RATE, default=1.0,
                     help="factor on the rate per block below the last")
    opt.add_argument("--weight-decay", type=RATE, default=0.05, help="of layers")
    opt.add_argument("--warmup", type=WHOLE, default=WARMUP,
                     help="steps of rising rate, at most a fifth of all")
    opt.add_argument("--schedule", default="cosine", choices=["cosine", "poly"], help="of the rate")
    opt.add_argument("--label-smoothing", type=between(0, 0.9),
                     help="of the cross-entropy (0; CNN from scratch 0.1)")
    opt.add_argument("--ema", type=between(0, 0.99999),
                     help="decay of averaged weights, which are kept; 0 = off (CNN from scratch 0.998)")
    opt.add_argument("--amp", default="auto", choices=["auto", "bf16", "off"],
                     help="auto: bf16 where it is fast; off: fp32, without TF32")

    r = p.add_argument_group("run")
    r.add_argument("--out", help="run folder (runs/<dataset>-<mode>, numbered when taken)")
    r.add_argument("--resume", metavar="RUN", help="go on with a run, with its flags")
    r.add_argument("--seed", type=WHOLE, default=0, help="of weights, augmentation and order")
    r.add_argument("--eval-every", type=COUNT, default=375,
                   help="steps between validations, where last.pt is written")
    r.add_argument("--log-every", type=COUNT, default=50, help="steps between log lines")
    r.add_argument("--device", type=run.device_name, default="auto",
                   help="cpu, cuda or cuda:1; auto: a GPU if there is one")

    args = run.parse(p, argv, MOVABLE, longer="epochs")
    train, val, test = args.fractions
    if not (train and val and 0.999 < train + val + test < 1.001):
        p.error(f"--fractions {train} {val} {test}: expected shares of sum 1, train and val above 0")
    if not args.root:
        p.error("--root is missing; type python train_cls.py --root D, where D holds a folder of "
                "images per class; EuroSAT is such a set, 94 MB: github.com/phelber/eurosat")
    scratch = args.weights == "none"
    if args.mode is None:
        args.mode = "cnn" if scratch else "linear"
        if args.features == "mean":
            args.mode = "knn"
    probing = args.mode in ("knn", "linear")
    if args.features == "mean" and not (probing and scratch):
        p.error(f"--features mean with --mode {args.mode}, --weights {args.weights}: nothing to "
                "train or load in means; type --mode knn or linear, and no --weights")
    # Flags that only some modes follow.
    run.only_with(p, args, "weights", "none", "arch")
    run.only_with(p, args, "mode", ("knn", "linear", "finetune"), "arch", "features")
    run.only_with(p, args, "mode", "cnn", "cnn", "stem")
    run.only_with(p, args, "mode", "knn", "k", "temperature")
    run.only_with(p, args, "mode", "linear", "lrs")
    run.only_with(p, args, "mode", ("linear", "finetune", "cnn"), "epochs")
    run.only_with(p, args, "mode", "finetune", "unfreeze")
    run.only_with(p, args, "mode", ("finetune", "cnn"), "optimizer", "lr", "backbone_lr",
                  "layer_decay", "weight_decay", "warmup", "schedule", "label_smoothing", "ema",
                  "mixup", "cutmix", "crop", "eval_every")
    if args.save == "head" and (scratch or not probing):
        p.error("--save head needs a frozen backbone; type --weights FILE with --mode linear or "
                "knn, or leave --save out")
    return args


def steps_of(args, d, world):
    # of the whole run; each process takes its share of the training images
    return max(1, round(args.epochs * len(d.rows["train"]) / (args.batch_size * world)))


def lr_at(step, args, steps, warmup):
    # A pure function of the step: a resumed run has no scheduler to restore.
    rise = (step + 1) / max(1, warmup)
    done = max(0.0, (step - warmup) / max(1, steps - warmup))
    if args.schedule == "cosine":
        fall = 0.5 * (1 + math.cos(math.pi * done))
    else:
        fall = (1 - done) ** 0.9  # as DeepLab was published
    return args.lr * min(rise, fall)


# here: what all parts of a run need - rank, world, device, say; norm, size, amp; out, meta

@torch.inference_mode()
def outputs(f, images, here, batch):
    # f(x) of this rank's part of images (n, S, S, 3) uint8 -> (n / world, D) fp32 on the CPU
    mine = images[here.rank::here.world]
    results = []
    for i in range(0, len(mine), batch):
        x = torch.from_numpy(mine[i:i + batch].copy())  # the cache's are read-only
        x = run.to_device(x, here.device)
        x = prepare(x, NORMS[here.norm], here.size)
        with torch.autocast(here.device.type, torch.bfloat16, enabled=here.amp):
            results.append(f(x).float().cpu())
    return torch.cat(results) if results else torch.zeros(0, 0)


def probabilities(net, images, here, batch):
    # (n, S, S, 3) uint8 -> (n, K) on every rank
    net.eval()
    if here.world > 1:
        for statistics in net.buffers():  # BatchNorm's differ until DDP's next forward
            dist.broadcast(statistics, 0)

    def shares(x):
        return net(x).float().softmax(1)

    p = run.gather(outputs(shares, images, here, batch), len(images), here.device)
    net.train()
    return p


def accuracy(p, y):
    return (p.argmax(1) == y).double().mean().item()


def save_best(net, here, step, value):
    if here.rank == 0:
        tensors = net.state_dict()
        if here.meta["saved"] == "head":
            tensors = {name: t for name, t in tensors.items() if name.startswith("head.")}
        more = dict(step=step, val_accuracy=value)
        checkpoint.save_weights(here.out / "best.safetensors", tensors, here.meta | more)


# ---- frozen features, computed once, and heads on them: val chooses one

def probe(args, d, net, here, s):
    # -> (n, K) probabilities of the reported split
    spec, info = here.meta["model"], here.meta["weights"]
    began, fresh = time.time(), []
    net.to(here.device)
    net.eval()

    def compute(*paths):
        fresh.append(len(paths))
        return (outputs(net.features, d.pixels, here, args.batch_size).numpy(),)

    # Of all images, however few train is: one entry in the cache serves every split.
    origin = info["sha256"] or (args.seed if "backbone" in spec else None)
    tag = (f"features 1 {origin} {spec.get('backbone')} {args.features} {here.norm} {here.size} "
           f"{here.amp} {here.device.type} {d.pixels.shape} {d.reading}")
    mine = tuple(d.base / name for name in d.all[here.rank::here.world])
    (part,) = d.keep(mine, compute, tag)
    part = torch.from_numpy(np.array(part))
    features = run.gather(part, len(d.all), here.device).to(here.device)
    took = time.time() - began
    told = f"from the cache, {took:.1f} s"
    if fresh:
        s.speed = len(d.all) / took
        told = f"{took:.1f} s, {s.speed:.0f} images/s on {here.device}"
    here.say(f"features {len(d.all)} x {features.shape[1]}, {told}")

    x = {split: features[rows] for split, rows in d.rows.items()}
    y = d.y["train"].to(here.device)
    if args.mode == "knn":
        word = "k"
        net.head.fit(x["train"], y)
        tried = [(k, net.head) for k in args.k]
    else:
        word = "rate"
        heads = fit_linear(x["train"], y, len(d.names), args.lrs, args.epochs, seed=args.seed)
        tried = list(zip(args.lrs, heads))
    for value, head in tried:
        head.k = value  # of a k-NN head
        with torch.inference_mode():
            right = accuracy(head(x["val"]).cpu(), d.y["val"])
        number = len(s.history) + 1
        s.history.append(dict(step=number, tried=value, val_accuracy=right))
        here.say(f"{word} {value:<6g}  val accuracy {right:.4f}")

    scores = [row["val_accuracy"] for row in s.history]
    s.best = max(scores)
    s.chosen, net.head = tried[scores.index(s.best)]
    if args.mode == "knn":
        net.head.k = spec["k"] = s.chosen
    here.title += f", step = number of the {word} in {[value for value, _ in tried]}"
    with torch.inference_mode():
        return net.head(x[d.reports]).cpu().softmax(1)


# ---- training of a network: val chooses the step

def train(args, d, net, here, s):
    # -> (n, K) probabilities of the reported split
    rank, world, device = here.rank, here.world, here.device
    say, out = here.say, here.out
    # Groups of parameters: group["scale"] is their learning rate as a share of the head's; norms,
    # biases and tokens have no weight decay.
    groups = nets.param_groups(net, args.lr, args.backbone_lr, args.layer_decay, args.weight_decay,
                               trained=args.weights != "none")
    opt = optimizer(args.optimizer, groups, args.lr)
    params = [p for p in net.parameters() if p.requires_grad]
    ema = run.Ema(net, args.ema) if args.ema else None
    judged = ema.net if ema else net  # what is evaluated and kept
    model = run.parallel(net, device)  # the same network, whose gradients are averaged over ranks
    rows, labels = d.rows["train"], d.y["train"]
    batch = args.batch_size * world
    steps = steps_of(args, d, world)
    warmup = min(args.warmup, steps // 5)  # few-shot runs are short

    # Random numbers have no state to restore: each is drawn from the number of its step or sample.
    same = dict(world=world, weights=here.meta["weights"]["sha256"], amp=here.amp,
                stored=here.meta["stored"])
    if args.resume:
        last = checkpoint.load_state(out / "last.pt")
        run.check_same(out, last, same)
        checkpoint.check_tensors(last["net"], net.state_dict())
        net.load_state_dict(last["net"])
        if ema:
            checkpoint.check_tensors(last["ema"], net.state_dict())
            ema.net.load_state_dict(last["ema"])
        checkpoint.restore_optimizer(opt, last["opt"])
        this_command = s.command
        checkpoint.take_up(s, last["state"])
        say(f"resume  {out} at step {s.step} of {steps}, best val {run.score('accuracy', s.best)}"
            + run.device_change(last, device))
        if args.epochs > last["args"]["epochs"]:
            s.command += f" && {this_command}"
            say(f"        {args.epochs} epochs instead of {last['args']['epochs']}: the rate "
                "follows the longer schedule from here on")

    def save_last():
        if rank == 0 and s.scored:  # log and curves wait for the validation
            write(out / "log.jsonl", json_lines(s.history))
            write(out / "curves.png", plots.curves(s.history, f"{out.name}: {here.title}"))
        if rank == 0:
            checkpoint.save_state(out / "last.pt", net=net.state_dict(), opt=opt.state_dict(),
                                  ema=ema.net.state_dict() if ema else None,
                                  state=vars(s), args=vars(args),
                                  device=device.type, **same)

    def validate():
        p = probabilities(judged, d.images("val"), here, args.batch_size)
        value = accuracy(p, d.y["val"])
        s.history.append(dict(step=s.step, val_accuracy=value))
        say(f"step {s.step:5d}  val accuracy {value:.4f}", flush=True)
        if value > s.best:
            s.best = value
            save_best(judged, here, s.step, value)
        s.scored = True

    # A CNN takes windows as they are, a ViT at the size that its weights were trained for.
    window = max(1, round(args.crop * d.pixels.shape[1]))
    side = round(args.crop * here.size) if args.mode == "cnn" else here.size
    say(f"loop    {steps} steps of {batch}, {args.epochs} epochs")
    draws = StepSampler(len(rows), args.batch_size, steps, args.seed, s.step, rank, world)
    draws = iter(draws)
    stop = run.Stop()
    began = time.time() - s.seconds
    if s.step == 0:
        save_last()  # what is killed before its first validation can be resumed, too
    if not s.scored:
        validate()
        save_last()
    while s.step < steps:
        # Every random number below is a function of (seed, step), equal on all ranks.
        step = s.step
        rng = np.random.default_rng((3, args.seed, step))
        index, draw = map(list, zip(*next(draws)))
        x = run.to_device(torch.from_numpy(d.pixels[rows[index]]), device)  # (B, S, S, 3) uint8
        x = augment_scenes(x, draw, args.seed, window)
        x = prepare(x, NORMS[here.norm], side)
        y = labels[index].to(device, non_blocking=True)  # (B,)
        other, share = None, 1.0
        if rng.random() < args.cutmix:
            x, y, other, share = augment.cutmix_scenes(x, y, rng)
        elif rng.random() < args.mixup:
            x, y, other, share = augment.mixup(x, y, rng)

        # forward and backward
        with torch.autocast(device.type, torch.bfloat16, enabled=here.amp):
            logits = model(x).float()  # (B, K)
        loss = share * F.cross_entropy(logits, y, label_smoothing=args.label_smoothing)
        if other is not None:
            ce = F.cross_entropy(logits, other, label_smoothing=args.label_smoothing)
            loss = loss + (1 - share) * ce
        for group in opt.param_groups:
            group["lr"] = group["scale"] * lr_at(step, args, steps, warmup)
        opt.zero_grad(set_to_none=True)
        loss.backward()  # DDP takes the mean over ranks

        # step; one with a non-finite gradient is skipped, five in a row end the run
        grad_norm = torch.nn.utils.clip_grad_norm_(params, CLIP)  # equal on all ranks
        # Over all ranks: the loss, and was any rank told to stop? The one wait for the GPU.
        stopping = loss.new_full((), stop.signal)
        over = run.over_ranks(torch.stack([stopping, loss.detach() / world]))
        grad_norm, stopping, total = torch.stack([grad_norm, *over]).tolist()
        if math.isfinite(grad_norm):
            s.bad = 0
            opt.step()
            if ema:
                ema.update(step)
        else:
            s.bad += 1
            if s.bad == 5:
                names = ", ".join(d.splits["train"][i] for i in index[:3])
                raise BadInput(f"5 non-finite gradients in a row at step {step + 1}, last images "
                               f"{names}, ...; look at them, then start a new run with --lr below "
                               f"{args.lr:g}")
        s.step += 1
        s.seconds = time.time() - began
        s.speed = s.step * batch / s.seconds

        # once in a while: log, validate, save, stop
        last_step = s.step == steps
        if s.step % args.log_every == 0 or last_step:
            row = dict(loss=total, lr=lr_at(step, args, steps, warmup), grad_norm=grad_norm)
            s.history.append(without_nan(dict(step=s.step, **row)))
            rest = minutes(s.seconds / s.step * (steps - s.step))
            say(f"step {s.step:5d} of {steps}  loss {total:.4f}  |g| {grad_norm:.3f}  "
                f"lr {row['lr']:.2e}  {s.speed:.0f} images/s  ETA {rest}", flush=True)
        due = s.step % args.eval_every == 0 or last_step
        if due:
            s.scored = False  # If the validation dies, it is done when the run goes on.
            save_last()
            validate()
        if due or stopping:
            save_last()
        if stopping:
            break

    if stop.told(device):  # in a step, or in the last validation
        say(f"stopped at step {s.step} of {steps}; go on: {run.again(out)}", flush=True)
        run.end()
        stop.exit()

    stop.release()
    run.wait()  # until rank 0 has written best.safetensors
    net.load_state_dict(checkpoint.load_weights(out / "best.safetensors")[0])
    return probabilities(net, d.images(d.reports), here, args.batch_size)


def main(args):
    rank, world, device = run.start(args.seed, args.device, hours=24)
    say = print if rank == 0 else lambda *words, **how: None

    # ---- data
    scratch, probing = args.weights == "none", args.mode in ("knn", "linear")
    cnn_of = args.cnn if args.mode == "cnn" else None
    backbone, state, info = nets.load_trunk(args.weights, args.arch, cnn_of)
    for turn in (0, 1):  # rank 0 decodes, the others find it in the cache
        if (rank > 0) == turn:
            d = Scenes(args.root, args.classes, args.split_file, args.fractions, args.split_seed,
                       args.group_regex, args.per_class, args.seed, args.resume,
                       args.skip_bad, args.bands, args.input_range, args.size or info["size"],
                       args.cache)
        run.wait()
    K = len(d.names)
    out = run.folder(args.out, f"runs/{d.dataset}-{args.mode}", args.resume)
    say(f"data    {d.base}: {len(d.all)} images, {d.pixels.shape[1]} x {d.pixels.shape[2]}")
    for line in map(escaped, d.notes):
        say(f"        {line}")
    sizes = ", ".join(f"{len(names)} {split}" for split, names in d.splits.items())
    say(f"        {K} classes, {sizes}")

    # ---- network
    norm = nets.choose_norm(args.norm, info)
    size = args.size or info["size"] or d.pixels.shape[1]
    # What made the CNN better on EuroSAT was not tried on fine-tuned ViTs.
    recipe = dict(optimizer="adamw", lr=1e-3, epochs=15, crop=0.94, label_smoothing=0.0, ema=0.0)
    if scratch:
        recipe |= dict(optimizer="muon", lr=2e-3)
    if scratch and args.mode == "cnn":
        recipe |= dict(lr=3e-3, crop=0.75, label_smoothing=0.1, ema=0.998)
    if probing:
        recipe["epochs"] = 100
    for flag, value in recipe.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.backbone_lr is None:
        args.backbone_lr = 1e-4 if args.mode == "cnn" else 2e-5
        if scratch:
            args.backbone_lr = args.lr
    if args.stem is None:
        args.stem = "small" if scratch else "imagenet"

    if args.mode == "cnn":
        spec = dict(name="cnn", cnn=args.cnn, stem=args.stem, classes=K)
        if args.cnn == "nano":
            spec["fold"] = 2
    elif args.features == "mean":
        spec = dict(name="mean", features="mean", classes=K)
    else:
        spec = dict(name="vit", features=args.features, classes=K, backbone=backbone)
    if args.mode == "knn":
        bank = len(d.rows["train"])
        if max(args.k) > bank:
            say(f"        WARNING --k {max(args.k)}: train has {bank} images, so the largest is {bank}")
        args.k = sorted({min(k, bank) for k in args.k})
        spec |= dict(bank=bank, k=max(args.k), temperature=args.temperature)
    net = nets.make_classifier(spec, state, info)
    if probing:
        net.backbone.requires_grad_(False)
    elif args.mode == "finetune":
        nets.unfreeze(net, args.unfreeze)
    net.to(device, memory_format=torch.channels_last).train()
    amp = args.amp == "bf16" or args.amp == "auto" and run.fast_bf16(device)
    amp = amp and args.features != "mean"
    title, line = nets.name_of(spec), info["line"]
    if scratch and probing:
        line = "frozen as it is, FROM RANDOM WEIGHTS: a control; --weights loads DINO"
    if args.features == "mean":
        line = "nothing to learn"
    say(f"model   {title}, {line}")
    say(f"        {args.mode}, {nets.size_line(net, scratch)}, input {size} x {size}, normalisation {norm}, "
        + run.precision(amp, device))
    if not scratch and info["norm"] not in (None, norm):
        say(f"        WARNING --norm {norm}, but these weights were trained with {info['norm']}")

    most = steps_of(args, d, world) // 5
    if args.warmup > max(most, WARMUP) and not (probing or args.resume):
        raise BadInput(f"--warmup {args.warmup}: at most a fifth of the steps; type --warmup {most}, or "
                       "more --epochs")

    # ---- run folder
    out = run.claim(out, args.out, args.resume)
    facts = run.facts(device, world)
    meta = d.about() | nets.about(info) | dict(
        task="classification", mode=args.mode, model=spec, norm=norm, size=size,
        amp="bf16" if amp else "off", saved=args.save)
    # All that a run remembers beside its weights. bad: non-finite gradients in a row; scored: is the
    # validation of this step done?
    s = SimpleNamespace(step=0, best=-1.0, bad=0, scored=True, seconds=0.0, history=[], speed=None,
                        chosen=None, command=facts["command"])
    here = SimpleNamespace(rank=rank, world=world, device=device, say=say, norm=norm, size=size,
                           amp=amp, out=out, meta=meta, title=title)
    if rank == 0 and not args.resume:
        write(out / "split.json", d.splits)
        write(out / "files.json", d.fingerprint())
        write(out / "protocol.json", meta | facts | dict(
            flags=vars(args), selection="best val accuracy", left_out=d.left_out))
    began = time.time()
    if probing:
        p = probe(args, d, net, here, s)
        s.seconds = time.time() - began
    else:
        p = train(args, d, net, here, s)

    # ---- report: the chosen weights on the split that nothing above has looked at
    if rank == 0:
        names = d.splits[d.reports]
        pred, true = p.argmax(1), d.y[d.reports]
        cm = metrics.confusion(pred, true, K)
        hits = (pred == true).numpy()
        table = metrics.class_table(cm, d.names)
        low, high = metrics.bootstrap(hits, [d.groups[name] for name in names])
        oa, base = metrics.oa(cm), metrics.oa(metrics.majority(cm))
        f1 = metrics.f1(cm)
        macro, counted = f1.nanmean().item(), int((~f1.isnan()).sum())
        results = dict(
            split=d.reports, accuracy=oa, accuracy_low=low, accuracy_high=high, macro_f1=macro,
            classes_in_mean=counted, majority_accuracy=base, val_accuracy=s.best,
            chosen=s.chosen, images_per_second=s.speed, seconds=round(s.seconds, 1),
            seed=args.seed, command=s.command, table=table, confusion=cm.tolist())
        write(out / "log.jsonl", json_lines(s.history))
        write(out / "curves.png", plots.curves(s.history, f"{out.name}: {here.title}"))
        title = f"{d.dataset} {d.reports}"
        write(out / "confusion.png", plots.confusion(cm.numpy(), d.names, title))

        images, surest = d.images(d.reports), p.max(1).values

        def card(i):
            said = f"{d.names[pred[i]]} {surest[i]:.2f}"
            return images[i], [d.names[true[i]], said], not hits[i]

        wrong = np.flatnonzero(~hits)
        wrong = sorted(wrong, key=lambda i: -surest[i])[:CARDS]
        drawn = np.random.default_rng(args.seed).permutation(len(names))[:CARDS]
        write(out / "samples.png", plots.cards([
            ("most confident mistakes: true class, then what was predicted",
             [card(i) for i in wrong]),
            (f"drawn at random from {d.reports}", [card(i) for i in np.sort(drawn)])]))
        # Last: a probe that is killed before these two starts again by the same command.
        if probing:
            save_best(net, here, 0, s.best)
        write(out / "results.json", results)
        print(metrics.table_text(table))
        print(f"{d.reports} accuracy {oa:.4f} (95 % interval {low:.4f} to {high:.4f}), macro F1 "
              f"{macro:.4f};  always the largest class: accuracy {base:.4f}")
        if d.reports != "test":
            print("  (no test split: these images chose the weights)")
        print(f"look at {out}/samples.png, confusion.png, curves.png; then, on your own images:\n"
              f"  python predict.py {shlex.quote(str(out))} IMAGE_OR_FOLDER --out predictions")
    run.end()


if __name__ == "__main__":
    with run.one_line_errors(lower="--batch-size or --size"):
        main(parse_args())
