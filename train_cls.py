"""Classify whole images: k-NN or linear probe on frozen features, fine-tuning, and a CNN to compare with.

    python train_cls.py --root EuroSAT                                  CNN from scratch, on a CPU
    python train_cls.py --root EuroSAT --features mean                  k-NN on channel means: what to beat
    python train_cls.py --root D --weights dinov2_vitb14_pretrain.pth   linear probe; --mode knn or finetune
    python train_cls.py --root D --mode finetune --arch mini8           small ViT from scratch
    torchrun --standalone --nproc_per_node=8 train_cls.py ...           same flags; --batch-size is per process
    python train_cls.py --resume runs/eurosat-cnn                       go on after a kill, bit for bit on a CPU
--root: ROOT/CLASS/images, ROOT/{train,val,test}/CLASS/images, or any parent of EuroSAT's 2750.
Copy with: models/vit.py models/weights.py models/classify.py models/checkpoint.py data/io.py data/scenes.py
    data/datasets.py data/cache.py data/augment.py data/samplers.py data/metrics.py data/plots.py
"""
import argparse
import ctypes
import hashlib
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: spinning threads cost 6x on a shared CPU

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data import augment, plots
from data.cache import Cache
from data.datasets import NORMS
from data.common import BadInput, write
from data.metrics import bootstrap, class_table, confusion, f1, majority, oa
from data.samplers import StepSampler
from data.scenes import (augment_scenes, check_classes, decode_scenes, faults, few, find_scenes, groups_of, load_splits,
                         prepare, read_splits)
from models.checkpoint import load_state, load_weights, save_state, save_weights
from models.classify import CNNS, ChannelMeans, Classifier, Knn, cnn, fit_linear
from models.vit import PRESETS, ViT, arch_name
from models.weights import BadWeights, checked_sha256, fill, load_vit, locate, read


MOVABLE = ("out", "resume", "cache", "root", "weights")  # what a resumed run may have at another place


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = p.add_argument_group("data")
    data.add_argument("--root", help="folder with a sub-folder of images per class, or EuroSAT's, or any parent of it")
    data.add_argument("--classes", nargs="+", metavar="NAME", help="the classes to take, in this order (all of train)")
    data.add_argument("--split-file", help="JSON {split: [names]} instead of the data set's own: a run's split.json")
    data.add_argument("--fractions", type=float, nargs=3, default=[0.6, 0.2, 0.2], metavar=("TRAIN", "VAL", "TEST"),
                      help="shares of every class, where neither folders nor --split-file give splits")
    data.add_argument("--split-seed", type=int, default=0, help="of that draw; --seed leaves the splits alone")
    data.add_argument("--group-regex", help="the scene in a name: the draw keeps a scene's images together")
    data.add_argument("--per-class", type=int, help="few-shot: so many training images per class, by --seed, nested")
    data.add_argument("--skip-bad", action="store_true", help="list bad images and leave them out")
    data.add_argument("--bands", type=numbers, help="the three to read from images with more, from 1: 4,1,2")
    data.add_argument("--input-range", type=float, nargs=2, metavar=("LOW", "HIGH"),
                      help="values that become 0 and 255, for images of other than 8 bits")
    data.add_argument("--size", type=int, help="side of the network's input (the images' own; with --weights 224)")
    data.add_argument("--shift", type=int, default=4, help="random shift in training, pixels, beside flips and turns")
    data.add_argument("--mixup", type=float, default=0.0, help="probability per batch")
    data.add_argument("--cutmix", type=float, default=0.0, help="probability per batch")
    data.add_argument("--cache", help="folder for decoded images, at most 64 GB (~/.cache/nanors); off = none")
    model = p.add_argument_group("model")
    model.add_argument("--mode", choices=["knn", "linear", "finetune", "cnn"],
                       help="(linear with --weights, knn with --features mean, else cnn)")
    model.add_argument("--weights", default="none", help="DINOv2/v3 (or CNN) file, folder or URL; none = from scratch")
    model.add_argument("--arch", default="nano8", choices=sorted(PRESETS), help="backbone without --weights")
    model.add_argument("--features", default="cls+patch", choices=["cls+patch", "cls", "mean"],
                       help="cls token and mean patch token, cls alone, or means of the three channels")
    model.add_argument("--cnn", default="nano", choices=CNNS, help="for --mode cnn; --weights: torchvision's file")
    model.add_argument("--stem", choices=["small", "imagenet"],
                       help="first layers of a ResNet: 3x3, or 7x7 and pool (as --weights; else small)")
    model.add_argument("--norm", default="auto", choices=["auto", *NORMS], help="pixel mean and std (of the weights)")
    model.add_argument("--unfreeze", help="last K blocks to train, or all (all)")
    model.add_argument("--save", default="all", choices=["all", "head"], help="head: without the frozen backbone")
    model.add_argument("--k", type=int, nargs="+", default=[5, 10, 20, 50], help="neighbours; val chooses")
    model.add_argument("--temperature", type=float, default=0.07, help="of the k-NN votes")
    model.add_argument("--lrs", type=float, nargs="+", default=[0.003, 0.01, 0.03, 0.1, 0.3, 1.0],
                       help="rates of the linear probe; val chooses")
    opt = p.add_argument_group("optimiser")
    opt.add_argument("--epochs", type=int, help="(15; linear 100)")
    opt.add_argument("--batch-size", type=int, default=64, help="per process")
    opt.add_argument("--lr", type=float, help="of the head (2e-3 from scratch, 1e-3 with --weights)")
    opt.add_argument("--backbone-lr", type=float, help="(--lr from scratch; with --weights 2e-5, of a CNN 1e-4)")
    opt.add_argument("--layer-decay", type=float, default=1.0, help="factor on the rate per block below the last")
    opt.add_argument("--weight-decay", type=float, default=0.05)
    opt.add_argument("--warmup", type=int, default=50, help="steps of rising rate")
    opt.add_argument("--schedule", default="cosine", choices=["cosine", "poly"])
    opt.add_argument("--clip", type=float, default=1.0, help="gradient norm limit, inf = off")
    opt.add_argument("--label-smoothing", type=float, default=0.0, help="of the cross-entropy")
    opt.add_argument("--amp", default="auto", choices=["auto", "bf16", "off"])
    run = p.add_argument_group("run")
    run.add_argument("--out", help="run folder (runs/<dataset>-<mode>, numbered when taken)")
    run.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, with its flags")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--eval-every", type=int, default=375, help="steps between validations, where last.pt is written")
    run.add_argument("--log-every", type=int, default=50)
    args = p.parse_args(argv)
    if empty := [k for k, v in vars(args).items() if v == ""]:
        p.error(f"--{empty[0].replace('_', '-')} is empty; is the shell variable set?")
    # >>> same: resume_flags
    if args.resume:  # the stored flags become the defaults, so a flag that now differs was typed
        stored = load_state(Path(args.resume) / "last.pt").get("args")
        if stored is None or stored.keys() != vars(args).keys():
            raise BadInput(f"{args.resume}/last.pt: not written by this version of this script; name a run of it")
        p.set_defaults(**stored | {"resume": args.resume})
        args = p.parse_args(argv)
        args.out = args.resume
        for k in (k for k, v in stored.items() if getattr(args, k) != v and k not in MOVABLE):
            raise BadInput(f"{args.resume}: was trained with {k} = {stored[k]}, not {getattr(args, k)}; leave the flag "
                           "out, or start a new run")
        return args
    # <<< same: resume_flags
    ranges = [("epochs eval_every log_every per_class", 1, 2**31), ("batch_size", 2, 2**31), ("size", 8, 2**12),
              ("clip temperature", 1e-9, math.inf), ("seed split_seed warmup shift", 0, 2**31), ("lr", 1e-9, 10),
              ("label_smoothing", 0, 0.9), ("mixup cutmix", 0, 1), ("backbone_lr layer_decay weight_decay", 0, 10)]
    for flag, low, high in ((f, *limits) for flags, *limits in ranges for f in flags.split()):
        if getattr(args, flag) is not None and not low <= getattr(args, flag) <= high:
            p.error(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected {low} to {high}")
    if min(args.fractions) < 0 or not 0.999 < sum(args.fractions) < 1.001 or 0 in args.fractions[:2]:
        p.error(f"--fractions {args.fractions}: expected three shares of sum 1, train and val above 0")
    if min(args.k) < 1 or min(args.lrs) <= 0:
        p.error("--k and --lrs: expected positive numbers")
    if args.bands and (len(args.bands) != 3 or min(args.bands) < 1):
        p.error(f"--bands {args.bands}: expected three numbers from 1, such as 4,1,2")
    if args.input_range and not -math.inf < args.input_range[0] < args.input_range[1] < math.inf:
        p.error(f"--input-range {args.input_range}: expected the lower value first")
    return args


def numbers(text):  # "4,1,2" -> [4, 1, 2]
    return [int(n) for n in text.split(",")]


def lr_at(step, args, steps, warmup):  # a pure function of step: a resumed run has no scheduler to restore
    done = max(0.0, (step - warmup) / max(1, steps - warmup))
    fall = 0.5 * (1 + math.cos(math.pi * done)) if args.schedule == "cosine" else (1 - done) ** 0.9
    return args.lr * min((step + 1) / max(1, warmup), fall)


# >>> same: build_cls
def build_cls(m):  # the "model" entry of a classification run -> network, weights still random
    if m["name"] == "cnn":
        return cnn(m["cnn"], m["stem"], m["classes"])
    backbone = ChannelMeans() if m["name"] == "mean" else ViT(**m["backbone"])
    width = backbone.dim * (2 if m["features"] == "cls+patch" else 1)
    if "bank" in m:
        head = Knn(m["bank"], width, m["classes"], m["k"], m["temperature"], unit=m["features"] != "mean")
    else:
        head = nn.Linear(width, m["classes"])
    return Classifier(backbone, head, m["features"])
# <<< same: build_cls


def param_groups(net, args):  # no decay on norms, biases and tokens; "scale" is the group's share of --lr
    groups = {}
    for name, p in net.named_parameters():
        if not p.requires_grad:
            continue
        scale = 1.0
        if name.startswith("backbone."):
            parts, depth = name.split("."), net.backbone.depth
            block = int(parts[2]) if parts[1] == "blocks" else depth - 1 if parts[1] == "norm" else -1
            scale = args.backbone_lr / args.lr * args.layer_decay ** (depth - 1 - block)
        elif not name.startswith(("head.", "fc.")):
            scale = args.backbone_lr / args.lr
        decay = args.weight_decay if p.ndim > 1 and "token" not in name and "pos_embed" not in name else 0.0
        groups.setdefault((scale, decay), []).append(p)
    return [dict(params=ps, scale=scale, weight_decay=decay) for (scale, decay), ps in groups.items()]


# >>> same: fast_bf16
def fast_bf16(device):  # in hardware; older GPUs and CPUs only imitate it
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # private; bool() = False where it is missing
# <<< same: fast_bf16


def main(args):
    # >>> same: setup
    rank, world, local = (int(os.environ.get(v, d)) for v, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        if not getattr(torch.cpu, "_is_amx_tile_supported", bool)():  # which would round to bf16
            torch.set_float32_matmul_precision("medium")  # on a CPU this means oneDNN: fp32 accuracy, twice the speed
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
            libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)  # keep freed blocks: no page faults at every step
    if world > 1 and not dist.is_initialized():  # torchrun set the variables; plain `python` is rank 0 of 1
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1),  # torchrun ends
                                device_id=device if device.type == "cuda" else None)  # all ranks when one has died
    say = print if rank == 0 else lambda *a, **k: None
    # <<< same: setup
    torch.manual_seed(args.seed)  # same on all ranks and before the model exists: same initial head

    # ---- data
    if not args.root:
        raise BadInput("--root is missing; type python train_cls.py --root D, where D holds a folder of images per "
                       "class; EuroSAT is such a set, 94 MB: github.com/phelber/eurosat")
    base, found, given, stray, empty = find_scenes(args.root)
    dataset = "eurosat" if base.name == "2750" else base.name
    if absent := set(args.classes or ()) - set(found.values()):
        raise BadInput(f"--classes {min(absent)}: not there; {base} has {', '.join(sorted(set(found.values())))}")
    scenes = {n: c for n, c in found.items() if not args.classes or c in args.classes}
    if empty and not args.classes and not args.skip_bad:
        raise BadInput(f"{base}: class folder {empty[0]!r} holds no image; fill it or remove it, or name the classes "
                       "to take: --classes A B C")
    reading = dict(bands=args.bands, input_range=args.input_range)
    frozen_kind = "mean" if args.features == "mean" else "vit"
    args.mode = args.mode or ("knn" if frozen_kind == "mean" else "cnn" if args.weights == "none" else "linear")
    out = Path(args.out or f"runs/{dataset}-{args.mode}")
    if not args.out:
        numbered = (out if i == 1 else Path(f"{out}-{i}") for i in itertools.count(1))
        out = next(f for f in numbered if not (f / "last.pt").exists() and not (f / "results.json").exists())
    elif rank == 0 and not args.resume and out.exists():
        if (out / "last.pt").exists():
            raise BadInput(f"{out}: holds a run; type --resume {out} to go on with it, or another --out")
        if (out / "results.json").exists() and (out / "protocol.json").exists():
            raise BadInput(f"{out}: holds a finished run; type another --out")
        if not out.is_dir() or any(out.iterdir()) and not (out / "protocol.json").exists():
            raise BadInput(f"{out}: there, and no run of this script; name another --out")
    if world > 1:  # rank 0 may be ahead and have made the folder
        dist.broadcast_object_list(name := [str(out)])
        out = Path(name[0])
    backbone, state, info = None, None, dict(norm="imagenet", path=None, sha256=None)
    if args.mode == "cnn" and args.weights != "none":
        if args.cnn == "nano":
            raise BadInput(f"--weights {args.weights} with --cnn nano, which nobody has published weights of; type "
                           "--cnn resnet18 or resnet50, as the file is")
        file = locate(args.weights)
        state, info = read(file), dict(norm="imagenet", path=str(file), sha256=checked_sha256(file)[0])
    elif args.weights != "none":
        backbone, state, info = load_vit(args.weights)
    size = args.size or (224 if state is not None else None)
    if state is not None and not args.size:
        with suppress(BadWeights):  # a run of this project knows the size of its images
            size = load_weights(args.weights, header_only=True)[1].get("size", size)

    keep = (lambda paths, decode, tag: decode(*paths)) if args.cache == "off" else Cache(args.cache)
    decode = partial(decode_scenes, side=size, **reading)
    began = time.time()
    for turn in range(2):  # rank 0 decodes, the others find it in the cache
        if (rank > 0) == turn:
            pixels, digests = keep(tuple(base / n for n in scenes), decode, f"scenes 1 {size} {reading}")
        if world > 1:
            dist.barrier()
    say(f"data    {base}: {len(scenes)} images, {pixels.shape[1]} x {pixels.shape[2]}, {time.time() - began:.1f} s")
    faulty, copies = faults(base, scenes, digests, reading)
    for line in [f"{f}: no image, ignored" for f in stray] + [f"{why}; left out" for why in copies.values()]:
        say(f"        note: {line}")
    if empty and not args.classes:
        say(f"        left out: {', '.join(empty)}: class folders without an image")
    if faulty and not args.skip_bad:
        raise BadInput(f"{next(iter(faulty.values()))} ({len(faulty)} such files; --skip-bad leaves them out)")
    for why in faulty.values():
        say(f"        left out: {why}")
    at = {n: i for i, n in enumerate(scenes)}  # row of pixels
    scenes = {n: c for n, c in scenes.items() if n not in faulty | copies}
    groups, shares = groups_of(list(scenes), args.group_regex), dict(zip(("train", "val", "test"), args.fractions))
    if fixed := out / "split.json" if args.resume else args.split_file:
        given = read_splits(fixed, found)
    splits = load_splits(scenes, given, shares, groups, args.split_seed)
    if not given and not args.group_regex:
        say("        random split without --group-regex: neighbouring scenes may stand on both sides")
    classes = args.classes or sorted({scenes[n] for n in splits["train"]})
    for line in check_classes(splits, scenes, classes):
        say(f"        WARNING {line}")
    if args.per_class and not args.resume:  # split.json already holds the few
        splits["train"] = few(splits["train"], scenes, args.per_class, args.seed)
    test_split, K = "test" if splits.get("test") else "val", len(classes)  # the one that is reported
    rows = {s: np.array([at[n] for n in names]) for s, names in splits.items()}
    y = {s: torch.tensor([classes.index(scenes[n]) for n in names]) for s, names in splits.items()}
    say(f"        {K} classes, " + ", ".join(f"{len(n)} {s}" for s, n in splits.items()))

    # ---- model
    pixel_norm = info["norm"] if args.norm == "auto" else args.norm
    if pixel_norm is None:
        raise BadInput(f"{args.weights}: published with two normalisations; type --norm imagenet for LVD-1689M, "
                       "--norm sat for SAT-493M")
    if info["norm"] not in (None, pixel_norm):
        say(f"        WARNING --norm {pixel_norm}, but these weights were trained with {info['norm']}")
    scratch, probe = state is None, args.mode in ("knn", "linear")
    size = size or pixels.shape[1]
    lr = args.lr or (2e-3 if scratch else 1e-3)
    defaults = dict(lr=lr, stem="small" if scratch else "imagenet", unfreeze="all", epochs=100 if probe else 15,
                    backbone_lr=lr if scratch else 1e-4 if args.mode == "cnn" else 2e-5)
    vars(args).update({k: v for k, v in defaults.items() if getattr(args, k) is None})
    if args.features == "mean" and not (probe and scratch):
        raise BadInput(f"--features mean with --mode {args.mode}, --weights {args.weights}: nothing to train or load "
                       "in means; type --mode knn or linear, and no --weights")
    if args.mode == "cnn":
        m = dict(name="cnn", cnn=args.cnn, stem=args.stem, classes=K)
    else:
        m = dict(name=frozen_kind, features=args.features, classes=K)
        m |= dict(backbone=backbone or PRESETS[args.arch]) if frozen_kind == "vit" else {}
    if args.mode == "knn":
        m |= dict(bank=len(rows["train"]), k=max(args.k), temperature=args.temperature)
    net = build_cls(m)
    title = args.cnn if args.mode == "cnn" else arch_name(m["backbone"]) if "backbone" in m else "channel means"
    if not scratch and args.mode == "cnn":
        head = net.fc.state_dict(prefix="fc.")
        fill(net, {k: t for k, t in state.items() if not k.startswith("fc.")} | head, info)
        say(f"model   {title}, {info['path']}, sha256 {info['sha256'][:8]}, a new fc")
    elif not scratch and frozen_kind == "vit":
        fill(net.backbone, state, info)
        say(f"model   {title}, {info['line']}")
    elif frozen_kind == "vit" or args.mode == "cnn":
        say(f"model   {title} FROM RANDOM WEIGHTS: " + ("frozen so, a control; --weights loads DINO" if probe else
                                                         "everything is learned from these images"))
    else:
        say(f"model   {title}")
    if args.unfreeze != "all" and not (args.unfreeze.isdigit() and args.mode == "finetune"):
        raise BadInput(f"--unfreeze {args.unfreeze}: expected all, or a number of blocks with --mode finetune")
    if probe:
        net.backbone.requires_grad_(False)
    elif args.unfreeze != "all":
        last = net.backbone.depth - int(args.unfreeze)
        net.backbone.requires_grad_(False)
        net.backbone.blocks[max(0, last):].requires_grad_(True)
        net.backbone.norm.requires_grad_(last < net.backbone.depth)
    head_only = args.save == "head"
    if head_only and (scratch or not probe):
        raise BadInput("--save head needs a frozen backbone from --weights; leave --save out, or --mode linear or knn")
    net.to(device, memory_format=torch.channels_last).train()
    trainable = {n: p for n, p in net.named_parameters() if p.requires_grad}
    amp = (args.amp == "bf16" or args.amp == "auto" and fast_bf16(device)) and m["name"] != "mean"
    say(f"        {args.mode}, {sum(p.numel() for p in trainable.values()) / 1e6:.2f} M of "
        f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters train, input {size} x {size}, "
        f"normalisation {pixel_norm}, {'bf16' if amp else 'fp32'} on {device}")
    meta = dict(
        task="classification", mode=args.mode, model=m, classes=[{"name": c} for c in classes], norm=pixel_norm,
        size=size, stored=pixels.shape[1], amp="bf16" if amp else "off", saved="head" if head_only else "all",
        weights=dict(path=info["path"] and str(Path(info["path"]).resolve()), sha256=info["sha256"]), dataset=dataset,
        root=str(base), chosen_on="val", reported=test_split, reading=reading,
        splits={s: hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] for s, names in splits.items()})
    last, command = load_state(out / "last.pt") if args.resume else None, shlex.join(["python", *sys.argv])
    if args.resume:
        if last["weights"] != info["sha256"]:
            raise BadInput(f"{args.weights}: not the file this run was trained on (sha256 {last['weights']})")
        if last["world"] != world:  # it would change the batch and the order of the samples
            raise BadInput(f"{out}: trained by {last['world']} processes, not {world}; use as many: torchrun "
                           f"--nproc_per_node={last['world']}, or plain python for 1")
        command = last["command"]
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write(out / "split.json", splits)
        write(out / "protocol.json", meta | dict(
            command=command, flags=vars(args), selection="best val accuracy",
            left_out=faulty | copies, torch=torch.__version__, python=sys.version.split()[0], world=world,
            device=torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"))

    @torch.inference_mode()
    def outputs(f, which):  # f(x) of this rank's part of the rows: (n, D) fp32 on the CPU
        results, mine = [], which[rank::world]
        for i in range(0, len(mine), args.batch_size):
            x = torch.from_numpy(pixels[mine[i:i + args.batch_size]]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                results.append(f(prepare(x, NORMS[pixel_norm], size)).float().cpu())
        return torch.cat(results) if results else torch.zeros(0, 0)

    def gather(part, n):  # parts (rank::world) of all ranks -> (n, D), on every rank
        if world == 1:
            return part
        widths = [None] * world
        dist.all_gather_object(widths, part.shape[1])  # 0 where a rank had no image
        whole = torch.zeros(n, max(widths), device=device)
        if len(part):
            whole[rank::world] = part.to(device)
        dist.all_reduce(whole)
        return whole.cpu()

    def probabilities(split):  # of the whole split, (n, K), on every rank
        net.eval()
        if world > 1:  # DDP hands out rank 0's running statistics only before the next forward
            for b in net.buffers():
                dist.broadcast(b, 0)
        p = gather(outputs(lambda x: net(x).float().softmax(1), rows[split]), len(rows[split]))
        net.train()
        return p

    def save_best(step, accuracy):
        if rank == 0:
            tensors = {k: t for k, t in net.state_dict().items() if not head_only or k.startswith("head.")}
            save_weights(out / "best.safetensors", tensors, meta | dict(step=step, val_accuracy=accuracy))

    def accuracy(p, split):  # (n, K) or log of it
        return (p.argmax(1) == y[split]).double().mean().item()

    history, seconds, best, start, speed = [], 0.0, -1.0, 0, None
    began = time.time()
    if probe:
        # ---- frozen features, computed once, and a head on them
        used = np.array([at[n] for n in scenes])  # all splits, however few are drawn from train: one entry in the cache
        origin = info["sha256"] or (args.seed if "backbone" in m else None)
        tag = f"features 1 {origin} {m.get('backbone')} {args.features} {pixel_norm} {size} {amp} {device.type}"
        fresh = []
        net.eval()

        def compute(*paths):
            fresh.append(len(paths))
            return outputs(net.features, used).numpy(),

        files = tuple(base / n for n in list(scenes)[rank::world])
        (part,) = keep(files, compute, f"{tag} {pixels.shape} {reading}")
        features = gather(torch.from_numpy(np.array(part)), len(used)).to(device)
        took = time.time() - began
        speed = len(used) / took if fresh else None
        say(f"features {len(used)} x {features.shape[1]}, " +
            (f"{took:.1f} s, {speed:.0f} images/s on {device}" if fresh else f"from the cache, {took:.1f} s"))
        place = {r: i for i, r in enumerate(used)}
        f = {s: features[[place[r] for r in rows[s]]] for s in rows}
        net.to(device)
        if args.mode == "knn":
            net.head.fit(f["train"], y["train"].to(device))
            tried = [(k, net.head) for k in args.k]
        else:
            probes = fit_linear(f["train"], y["train"].to(device), K, args.lrs, args.epochs, seed=args.seed)
            tried = list(zip(args.lrs, probes))
        for value, head in tried:
            net.head, net.head.k = head, value
            with torch.inference_mode():
                right = accuracy(head(f["val"]).cpu(), "val")
            history.append(dict(step=len(history) + 1, tried=value, val_accuracy=right))
            say(f"{'k' if args.mode == 'knn' else 'rate'} {value:<6g}  val accuracy {right:.4f}")
        scores = [row["val_accuracy"] for row in history]
        best = max(scores)
        value, net.head = tried[scores.index(best)]
        if args.mode == "knn":
            net.head.k = m["k"] = value
        save_best(0, best)
        with torch.inference_mode():
            p = net.head(f[test_split]).cpu().softmax(1)
        meta["chosen"] = value
        title += f", step = number of the {'k' if args.mode == 'knn' else 'rate'} in {[v for v, _ in tried]}"
    else:
        # ---- optimiser
        params = list(trainable.values())
        opt = torch.optim.AdamW(param_groups(net, args), lr=args.lr, betas=(0.9, 0.999), fused=True)
        model = net
        if world > 1:
            model = DistributedDataParallel(net, device_ids=[local] if device.type == "cuda" else None)
        steps = max(1, round(args.epochs * len(rows["train"]) / (args.batch_size * world)))
        warmup = min(args.warmup, steps // 5)  # few-shot runs are short

        # ---- resume
        bad = 0
        if args.resume:
            net.load_state_dict(last["net"])
            opt.load_state_dict(last["opt"])
            start, best, bad, seconds = (last[k] for k in ("step", "best", "bad", "seconds"))
            history = last["history"]
            del last
            say(f"resume  {out} at step {start} of {steps}, best val accuracy {best:.4f}")

        def save_last(step):
            if rank == 0:
                write(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in history))
                save_state(out / "last.pt", net=net.state_dict(), opt=opt.state_dict(), step=step, best=best, bad=bad,
                           seconds=seconds + time.time() - began, world=world, weights=info["sha256"],
                           command=command, history=history, args=vars(args))

        statistics = [*net.buffers()] if m["name"] == "cnn" else []
        stopped = []  # a signal lets the step finish, then saves and leaves
        def stop(number, frame):
            stopped.append(number)
            signal.signal(number, before[number])  # a second one ends at once

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

        # ---- loop
        if start == 0:
            save_last(0)
        say(f"loop    {steps} steps of {args.batch_size * world}, {args.epochs} epochs")
        draws = StepSampler(len(rows["train"]), args.batch_size, steps, args.seed, start, rank, world)
        for step, batch in enumerate(draws, start):
            index, draw = map(list, zip(*batch))
            x = torch.from_numpy(pixels[rows["train"][index]]).to(device)  # (B, S, S, 3) uint8
            x = prepare(augment_scenes(x, draw, args.seed, args.shift), NORMS[pixel_norm], size)
            target, other, share = y["train"][index].to(device), None, 1.0
            rng = np.random.default_rng((3, args.seed, step))  # 3: a stream of its own, equal on all ranks
            if rng.random() < args.cutmix:
                x, target, other, share = augment.cutmix_scenes(x, target, rng)
            elif rng.random() < args.mixup:
                x, target, other, share = augment.mixup(x, target, rng)
            before_step = [t.clone() for t in statistics]
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):  # bf16 needs no GradScaler
                logits = model(x).float()  # (B, K)
            loss = share * F.cross_entropy(logits, target, label_smoothing=args.label_smoothing)
            if other is not None:
                loss = loss + (1 - share) * F.cross_entropy(logits, other, label_smoothing=args.label_smoothing)
            for g in opt.param_groups:
                g["lr"] = g["scale"] * lr_at(step, args, steps, warmup)
            opt.zero_grad(set_to_none=True)
            loss.backward()  # DDP averages the gradients here, so `norm` is the same number on every rank ...
            norm = torch.nn.utils.clip_grad_norm_(params, args.clip)
            bad = 0 if norm.isfinite() else bad + 1  # ... and all ranks skip together, without one more collective
            if bad:  # what it did to BatchNorm's statistics
                for t, old in zip(statistics, before_step):
                    t.copy_(old)
            if bad == 0:
                opt.step()
            elif bad == 5:
                raise BadInput(f"5 non-finite gradients in a row at step {step + 1}; look at the last images "
                               f"({', '.join(splits['train'][i] for i in index[:3])}, ...), or --lr below {args.lr:g}")
            done = step + 1
            due, stops = done % args.eval_every == 0 or done == steps, len(stopped)
            loss = loss.detach()
            if world > 1:  # was any rank told to stop, and the loss over all
                dist.all_reduce(both := torch.stack([loss.new_tensor(stops), loss / world]))
                stops, loss = both[0].item(), both[1]
            if done % args.log_every == 0 or done == steps:
                took = time.time() - began
                speed = (done - start) * args.batch_size * world / took
                rest = round(took / (done - start) * (steps - done))
                history.append(dict(step=done, loss=loss.item() if loss.isfinite() else None,
                                    lr=lr_at(step, args, steps, warmup),
                                    grad_norm=norm.item() if norm.isfinite() else None))
                say(f"step {done:5d} of {steps}  loss {loss.item():.4f}  |g| {norm.item():.3f}  "
                    f"lr {history[-1]['lr']:.2e}  {speed:.0f} images/s  ETA {rest // 60}:{rest % 60:02d}",
                    flush=True)
            if due:
                value = accuracy(probabilities("val"), "val")
                history.append(dict(step=done, val_accuracy=value))
                say(f"step {done:5d}  val accuracy {value:.4f}", flush=True)
                if value > best:
                    save_best(done, value)
                best = max(best, value)
                if rank == 0:
                    write(out / "curves.png", plots.curves(history, f"{out.name}: {title}"))
            if due or stops:
                save_last(done)
            if stops:
                say(f"stopped at step {done} of {steps}; go on: python train_cls.py --resume {shlex.quote(str(out))}")
                if world > 1:
                    dist.barrier()  # rank 0 has saved
                    dist.destroy_process_group()
                sys.exit(128 + (stopped or [signal.SIGTERM])[0])
        for number in before:
            signal.signal(number, before[number])
        if world > 1:
            dist.barrier()
        net.load_state_dict(load_weights(out / "best.safetensors")[0])
        p = probabilities(test_split)

    # ---- report: the best weights on test, which nothing above has looked at
    if rank == 0:
        pred, true, names = p.argmax(1), y[test_split], splits[test_split]
        cm = confusion(pred, true, K)
        hits, table = (pred == true).numpy(), class_table(cm, classes)
        low, high = bootstrap(hits, [groups[n] for n in names])
        macro, base_rate = f1(cm).nanmean().item(), oa(majority(cm))
        write(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in history))
        write(out / "results.json", dict(
            split=test_split, accuracy=oa(cm), accuracy_low=low, accuracy_high=high, macro_f1=macro,
            classes_in_mean=int((~f1(cm).isnan()).sum()), majority_accuracy=base_rate, val_accuracy=best,
            chosen=meta.get("chosen"), images_per_second=speed, seconds=round(seconds + time.time() - began, 1),
            seed=args.seed, command=command, table=table, confusion=cm.tolist()))
        write(out / "curves.png", plots.curves(history, f"{out.name}: {title}"))
        write(out / "confusion.png", plots.confusion(cm.numpy(), classes, f"{dataset} {test_split}"))

        def card(i):
            words = [f"{classes[true[i]]}", f"{classes[pred[i]]} {p[i].max():.2f}"]
            return pixels[rows[test_split][i]], words, not hits[i]

        wrong = sorted(np.flatnonzero(~hits), key=lambda i: -p[i].max())[:16]
        some = np.sort(np.random.default_rng(args.seed).permutation(len(names))[:16])
        write(out / "samples.png", plots.cards([
            ("most confident mistakes: true class, then what was predicted", [card(i) for i in wrong]),
            (f"drawn at random from {test_split}", [card(i) for i in some])]))
        width = max(map(len, classes))
        print(f"{'class':{width}}     TP     FP     TN     FN  prec. recall  spec.     F1")
        for c, row in table.items():
            tail = " ".join("     -" if v is None else f"{v:6.3f}" for v in list(row.values())[4:])
            print(f"{c:{width}} " + " ".join(f"{row[k]:6d}" for k in ("tp", "fp", "tn", "fn")) + f" {tail}")
        note = "" if test_split == "test" else "  (no test split: these images chose the weights)"
        print(f"{test_split} accuracy {oa(cm):.4f} (95 % interval {low:.4f} to {high:.4f}), macro F1 {macro:.4f};  "
              f"always the largest class: accuracy {base_rate:.4f}{note}")
        print(f"look at {out}/samples.png, confusion.png, curves.png; then, on your own images:\n"
              f"  python predict.py {shlex.quote(str(out))} IMAGE_OR_FOLDER --out predictions")
    # >>> same: leave
    if world > 1:  # gloo's threads may still hold tensors of the last collective, and Python's end under them aborts
        dist.barrier()
        dist.destroy_process_group()
    # <<< same: leave


# >>> same: main
if __name__ == "__main__":
    try:
        main(parse_args())
    except (BadInput, BadWeights, OSError) as e:  # its last line: a reading process puts a traceback before the message
        print(f"error: {str(e).splitlines()[-1].split('BadInput: ')[-1]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
# <<< same: main
