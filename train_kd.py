"""Train a segmentation network on masks and on a trained network's probabilities: knowledge distillation (KD).

    python train_kd.py --teacher runs/demo --arch nano16             demo scenes, a smaller student of the demo run
    python train_kd.py --teacher runs/large --map map.json --dataset folder --root D      teacher of other classes
    python train_kd.py --teacher runs/large --map measured ...       the map from predictions against ground truth
    python train_kd.py --alpha 0 --sampler weighted --difficulty runs/demo --replicate 5% --focus 0.7    without KD
    python train_kd.py --resume runs/demo-kd                         go on after a kill, bit for bit on a CPU
L = alpha T^2 KL(teacher, student) + (1 - alpha) hard, the KL summed over classes and averaged over valid pixels, hard =
--loss; so --alpha 0 is train_seg.py bit for bit. Between the two: sampling, replication, Lookahead and warm restarts.
Copy with: models/vit.py models/weights.py models/heads.py models/deeplab.py models/unetformer.py
    models/efficientnet_unet.py models/losses.py models/lookahead.py models/checkpoint.py data/io.py data/demo.py
    data/datasets.py data/public.py data/cache.py data/crops.py data/augment.py data/samplers.py data/classmap.py
    data/metrics.py data/tiles.py data/plots.py
"""
import argparse
import copy
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
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: spinning threads cost 6x on a shared CPU

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from data import augment, classmap, demo, plots, public
from data.cache import Cache
from data.crops import random_crop
from data.datasets import (
    NORMS, SegDataset, check_sizes, class_counts, count_ids, find_pairs, load_splits, read_description,
    read_list)
from data.common import IGNORE, BadInput, even_sample, write
from data.io import Labels, open_image
from data.metrics import confusion, headline, iou, oa, report
from data.samplers import StepSampler, balanced_weights, difficulty_weights, hard_classes, replicated, rich
from data.tiles import blend_weight, windows
from models import deeplab, efficientnet_unet, unetformer
from models.checkpoint import load_state, load_weights, save_state, save_weights
from models.heads import HEADS, Segmenter
from models.lookahead import Lookahead, cycle_ends, warm_restarts
from models.losses import class_weights, compute, distill, parse_loss, translate
from models.vit import PRESETS, ViT, arch_name, spread_taps
from models.weights import BadWeights, fill, load_vit, sha256


MOVABLE = ("out", "resume", "workers", "cache", "root", "weights", "teacher", "teacher_weights",
           "difficulty")  # what a resumed run may have at another place


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kd = p.add_argument_group("distillation")
    kd.add_argument("--teacher", help="run folder of a trained network, or its best.safetensors")
    kd.add_argument("--teacher-weights", help="backbone file of a teacher saved with --save head")
    kd.add_argument("--map", default="names", help="teacher's classes -> these: names, measured, or a JSON file")
    kd.add_argument("--within", default="student", choices=["student", "shares"],
                    help="a teacher class that goes to several: the student divides it, or the map's shares do")
    kd.add_argument("--alpha", type=float, default=0.7, help="weight of the KL term, the masks get the rest")
    kd.add_argument("--temperature", type=float, default=2.0, help="T that softens both distributions")
    data = p.add_argument_group("data")
    data.add_argument("--dataset", choices=["demo", "folder", *public.SETS],
                      help="(demo without --root, folder with it)")
    data.add_argument("--root", help="folder with images, masks and dataset.json; for demo: where to make it")
    data.add_argument("--variant", help="form of a public data set, where it has several: irrg,eroded (data/public.py)")
    data.add_argument("--bands", type=numbers, help="the three to read from images with more, from 1: 4,1,2")
    data.add_argument("--input-range", type=float, nargs=2, metavar=("LOW", "HIGH"),
                      help="values that become 0 and 255, for images of other than 8 bits")
    data.add_argument("--split-file", help="JSON {split: [names]} instead of the data set's own: a run's split.json")
    data.add_argument("--val-frac", type=float, help="part of train to hold out for selection, where there is no val")
    data.add_argument("--group-regex", help="the scene in a name: --val-frac keeps a scene's images together")
    data.add_argument("--final", action="store_true", help="hold nothing out: all of train, and the last weights")
    data.add_argument("--check-data", type=int, default=64, help="training masks to read first; 0: if needed")
    data.add_argument("--crop", type=int, help="training crop and evaluation window (128; with --weights 512 or 518)")
    data.add_argument("--scale", type=float, nargs=2, default=[0.75, 1.5], help="range of the random scale")
    data.add_argument("--color", type=float, default=0.2, help="strength of the colour augmentation, 0 = off")
    data.add_argument("--focus", type=float, default=0.3, help="share of crops laid around a pixel of a rare class")
    data.add_argument("--sampler", default="uniform", choices=["uniform", "weighted", "class-balanced"])
    data.add_argument("--difficulty", metavar="RUN", help="trained network that scores the images for weighted")
    data.add_argument("--hard-iou", type=float, default=0.5, help="below it a class of an image counts as hard")
    data.add_argument("--hard-limits", type=int, nargs="*", default=[0, 2, 4], help="hard classes up to which ...")
    data.add_argument("--hard-weights", type=float, nargs="+", default=[1, 2, 4, 6], help="... an image weighs this")
    data.add_argument("--replicate", help="file of training images to repeat, one a line; or 5%%: those of which a "
                                          "rare class covers so much")
    data.add_argument("--mixup", type=float, default=0.0, help="probability per batch")
    data.add_argument("--cutmix", type=float, default=0.0, help="probability per batch")
    data.add_argument("--cache", help="folder for decoded images, at most 64 GB (~/.cache/nanors); off = none")
    data.add_argument("--workers", type=int, default=min(4, os.cpu_count() - 1), help="reading processes")
    model = p.add_argument_group("model")
    model.add_argument("--model", default="vit", choices=["vit", *NETS], help="vit with a --head, or a whole network")
    model.add_argument("--weights", default="none", help="DINOv2/v3 (or CNN) file, folder or URL; none = from scratch")
    model.add_argument("--arch", default="nano8", choices=sorted(PRESETS), help="backbone without --weights")
    model.add_argument("--head", default="fpn", choices=sorted(HEADS))
    model.add_argument("--taps", type=int, nargs="+", help="blocks the head reads, from 0 (four evenly spaced)")
    model.add_argument("--feat-norm", default="on", choices=["on", "off"], help="final norm on every tap")
    model.add_argument("--norm", default="auto", choices=["auto", *NORMS], help="pixel mean and std (of the weights)")
    model.add_argument("--unfreeze", help="last K blocks to train, or all (0 with --weights, all from scratch)")
    model.add_argument("--output-stride", type=int, default=16, choices=[8, 16], help="of deeplabv3, 8 as torchvision")
    model.add_argument("--freeze-bn", action="store_true", help="deeplabv3: keep BatchNorm's statistics (batches of 1)")
    model.add_argument("--save", default="all", choices=["all", "head"], help="head: without the frozen backbone")
    opt = p.add_argument_group("optimiser")
    opt.add_argument("--steps", type=int, default=720)
    opt.add_argument("--batch-size", type=int, default=8, help="per process and micro-batch")
    opt.add_argument("--accum", type=int, default=1, help="micro-batches per step")
    opt.add_argument("--lr", type=float, help="of the head (3e-3 from scratch, 1e-3 with --weights or a CNN)")
    opt.add_argument("--backbone-lr", type=float, help="(--lr from scratch; with --weights 2e-5, of a CNN 1e-4)")
    opt.add_argument("--layer-decay", type=float, default=1.0, help="factor on the rate per block below the last")
    opt.add_argument("--weight-decay", type=float, default=0.05)
    opt.add_argument("--warmup", type=int, default=50, help="steps of rising rate")
    opt.add_argument("--schedule", default="cosine", choices=["cosine", "poly", "restarts"])
    opt.add_argument("--cycle", type=int, nargs=2, default=[300, 2], metavar=("STEPS", "MULT"),
                     help="first cycle of restarts, and how many times longer each next one is")
    opt.add_argument("--lookahead", type=int, default=0, help="steps between synchronisations, 5 as published; 0 = off")
    opt.add_argument("--clip", type=float, default=1.0, help="gradient norm limit, inf = off")
    opt.add_argument("--loss", default="ce+dice", help="ce, focal, dice, lovasz, boundary: ce+0.5*dice")
    opt.add_argument("--class-weights", choices=["none", "inverse", "sqrt", "median", "effective"],
                     help="for ce and focal (none; sqrt for the demo, whose cars are .3 %% of it)")
    opt.add_argument("--label-smoothing", type=float, default=0.0, help="of the cross-entropy")
    opt.add_argument("--ema", type=float, default=0.0, help="decay of averaged weights, evaluated and kept; 0 = off")
    opt.add_argument("--amp", default="auto", choices=["auto", "bf16", "off"])
    opt.add_argument("--compile", action="store_true", help="torch.compile the network")
    run = p.add_argument_group("run")
    run.add_argument("--out", help="run folder (runs/<dataset>-kd, numbered when taken)")
    run.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, with its flags")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--eval-every", type=int, default=360, help="steps between validations, where last.pt is written")
    run.add_argument("--patience", type=int, default=0, help="stop after so many validations without gain, 0 = off")
    run.add_argument("--overlap", type=float, default=0.25, help="of evaluation windows, as a part of --crop")
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
    try:
        parse_loss(args.loss)
    except ValueError as e:
        p.error(str(e))
    ranges = [("steps batch_size accum eval_every log_every", 1, 2**31), ("crop", 16, 2**15), ("clip", 1e-9, math.inf),
              ("seed warmup patience check_data", 0, 2**31), ("overlap label_smoothing", 0, 0.9), ("workers", 0, 64),
              ("focus mixup cutmix color val_frac alpha hard_iou", 0, 1), ("ema", 0, 0.99999), ("lr", 1e-9, 10),
              ("backbone_lr layer_decay weight_decay", 0, 10), ("temperature", 0.1, 100), ("lookahead", 0, 1000)]
    for flag, low, high in ((f, *limits) for flags, *limits in ranges for f in flags.split()):
        if getattr(args, flag) is not None and not low <= getattr(args, flag) <= high:
            p.error(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected {low} to {high}")
    if args.schedule == "restarts" and args.cycle[0] > args.steps:
        p.error(f"--cycle {args.cycle[0]} is longer than --steps {args.steps}: no cycle would end")
    if args.lookahead and (args.steps % args.lookahead or args.eval_every % args.lookahead):
        p.error(f"--lookahead {args.lookahead}: --steps and --eval-every must be multiples of it, where fast and slow "
                "weights meet")
    difficulty_weights(np.zeros(1, int), args.hard_limits, args.hard_weights)  # raises where they do not fit
    if args.bands and (len(args.bands) != 3 or min(args.bands) < 1):
        p.error(f"--bands {args.bands}: expected three numbers from 1, such as 4,1,2")
    if args.input_range and not -math.inf < args.input_range[0] < args.input_range[1] < math.inf:
        p.error(f"--input-range {args.input_range}: expected the lower value first")
    if args.final and args.val_frac:
        p.error("--final holds nothing out, --val-frac does; leave one of them out")
    if args.replicate and args.replicate.endswith("%") and not args.replicate[:-1].replace(".", "", 1).isdigit():
        p.error(f"--replicate {args.replicate}: expected a file of image names, or a share such as 5%")
    if min(args.cycle) < 1:
        p.error(f"--cycle {args.cycle}: expected two numbers from 1, such as 300 2")
    owned = {"vit": "arch head taps feat_norm unfreeze save layer_decay", "deeplabv3": "freeze_bn output_stride"}
    for flag, model in ((f, m) for m, flags in owned.items() if m != args.model for f in flags.split()):
        if getattr(args, flag) != p.get_default(flag):
            p.error(f"--{flag.replace('_', '-')} goes with --model {model}, not {args.model}; leave it out")
    if args.model == "deeplabv3" and args.batch_size == 1 and not args.freeze_bn:
        p.error("--batch-size 1: BatchNorm needs two images; type 2 or more, or add --freeze-bn")
    if not 0.05 <= args.scale[0] <= args.scale[1] <= 20:
        p.error(f"--scale {args.scale}: expected two rising numbers such as 0.75 1.5")
    return args


def numbers(text):  # "4,1,2" -> [4, 1, 2]
    return [int(n) for n in text.split(",")]


def lr_at(step, args):  # a pure function of step: a resumed run has no scheduler to restore
    done = max(0.0, (step - args.warmup) / max(1, args.steps - args.warmup))
    fall = 0.5 * (1 + math.cos(math.pi * done)) if args.schedule == "cosine" else (1 - done) ** 0.9
    if args.schedule == "restarts":
        fall = warm_restarts(step, *args.cycle)
    return args.lr * min((step + 1) / max(1, args.warmup), fall)


# >>> same: build
NETS = {"deeplabv3": deeplab.DeepLabV3, "unetformer": unetformer.UNetFormer, "ftunetformer": unetformer.FTUNetFormer,
        "effunet": efficientnet_unet.EfficientNetUnet}


def build(m):  # the "model" entry of best.safetensors -> network, weights still random
    if m["name"] != "vit":
        return NETS[m["name"]](m["classes"], **m["options"])
    vit = ViT(**m["backbone"])
    head = HEADS[m["head"]](vit.dim, len(m["taps"]), m["classes"])
    return Segmenter(vit, head, m["taps"], m["feat_norm"])
# <<< same: build


# >>> same: load
def load_net(run, weights, build=build, task=None):  # best.safetensors or run folder -> network in eval mode, its meta
    state, meta = load_weights(run)
    if meta.get("task") != task:
        raise BadWeights(f"{run}: of another kind (segmentation or classification); name a run that fits")
    if meta["saved"] == "head":
        backbone, info = load_vit(weights or meta["weights"]["path"])[1:]
        if info["sha256"] != meta["weights"]["sha256"]:
            raise BadWeights(f"{info['path']}: not the backbone this head was trained on; pass --weights the file with "
                             f"sha256 {meta['weights']['sha256'][:8]}...")
        state |= {f"backbone.{name}": t for name, t in backbone.items()}
    net = build(meta["model"])
    fill(net, state, dict(path=run))
    return net.eval(), meta
# <<< same: load


# >>> same: pretrained
PRETRAINED = {"deeplabv3": deeplab.load_pretrained, "unetformer": unetformer.load_pretrained,
              "ftunetformer": unetformer.load_pretrained, "effunet": efficientnet_unet.load_pretrained}
AUX = 0.4  # weight of the auxiliary head's cross-entropy, as UNetFormer was published
# <<< same: pretrained


# >>> same: param_groups
def param_groups(net, args):  # no decay on norms, biases and tokens; "scale" is the group's share of --lr
    groups = {}
    for name, p in net.named_parameters():
        if not p.requires_grad:
            continue
        scale = 1.0
        if name.startswith(("backbone.", "encoder.")):
            scale = args.backbone_lr / args.lr
        if name.startswith("backbone.") and args.model == "vit":
            parts, depth = name.split("."), net.backbone.depth
            block = int(parts[2]) if parts[1] == "blocks" else depth - 1 if parts[1] == "norm" else -1
            scale *= args.layer_decay ** (depth - 1 - block)
        decay = args.weight_decay if p.ndim > 1 and "token" not in name and "pos_embed" not in name else 0.0
        groups.setdefault((scale, decay), []).append(p)
    return [dict(params=ps, scale=scale, weight_decay=decay) for (scale, decay), ps in groups.items()]
# <<< same: param_groups


# >>> same: transform
def transform(image, mask, rng, crop, scales, strength, rare, focus):  # uint8 arrays; all randomness comes from rng
    image, mask = random_crop(image, mask, crop, scales, rng, rare, focus)
    image, mask = augment.dihedral(image, mask, rng)
    return augment.color(image, rng, strength), mask
# <<< same: transform


# >>> same: leave_signals
def leave_signals_to_main(worker_id):  # Ctrl-C goes to a process group: here only main gets it, and saves
    if hasattr(os, "setpgid"):  # ignoring signals would not do: SIGTERM is how main's exit ends reading processes
        os.setpgid(0, 0)
# <<< same: leave_signals


# >>> same: fast_bf16
def fast_bf16(device):  # in hardware; older GPUs and CPUs only imitate it
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # private; bool() = False where it is missing
# <<< same: fast_bf16


# >>> same: logits_of
def logits_of(net, x, crop, overlap, batch, amp):  # image (3, H, W) -> (K, H, W) fp32 on x's device, blended windows
    H, W = x.shape[-2:]
    boxes, device = windows(H, W, crop, overlap), next(net.parameters()).device
    weight = blend_weight(*boxes[0][2:]).to(x.device)
    total = torch.zeros(H, W, device=x.device)
    for i in range(0, len(boxes), batch):
        tiles = torch.stack([x[:, t:t + h, l:l + w] for t, l, h, w in boxes[i:i + batch]])
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = net(tiles.to(device)).to(x.device)
        if len(boxes) == 1:
            return logits[0]
        if i == 0:
            out = torch.zeros(logits.shape[1], H, W, device=x.device)
        for (t, l, h, w), z in zip(boxes[i:i + batch], logits):
            out[:, t:t + h, l:l + w] += z * weight
            total[t:t + h, l:l + w] += weight
    return out.div_(total)
# <<< same: logits_of


# >>> same: evaluate
@torch.inference_mode()
def evaluate(net, data, args, device, amp, rank, world):  # -> (K, K) confusion matrix of the whole split, on every rank
    was_training = net.training
    net.eval()
    for statistics in net.buffers() if world > 1 else ():  # BatchNorm's differ until DDP's next forward
        dist.broadcast(statistics, 0)
    k = len(data.labels.names)
    cm = torch.zeros(k, k, dtype=torch.int64, device=device)
    for x, y, _ in DataLoader(data, batch_size=None, sampler=range(rank, len(data), world), num_workers=args.workers,
                              prefetch_factor=1 if args.workers else None, worker_init_fn=leave_signals_to_main):
        logits = logits_of(net, x.to(device), args.crop, args.overlap, args.batch_size, amp)
        cm += confusion(logits.max(0).indices, y.to(device), k)  # max().indices: ten times faster than argmax on a CPU
    if world > 1:
        dist.all_reduce(cm)  # the only collective, after the loop: each rank has its own unpadded part
    if not cm.any():
        raise BadInput(f"{data.names[0]} and {len(data) - 1} more: every pixel is ignored; correct \"ignore\"")
    net.train(was_training)
    return cm.cpu()
# <<< same: evaluate


@torch.inference_mode()
def image_matrices(net, meta, data, args, device, amp, rank, world):  # -> (N, K, K) int64, one per un-augmented image
    k = max(len(meta["classes"]), len(data.labels.names))  # rows true, columns predicted
    cms = torch.zeros(len(data), k, k, dtype=torch.int64, device=device)
    for i in range(rank, len(data), world):
        x, y, _ = data[i]
        logits = logits_of(net, x.to(device), meta["crop"], meta["overlap"], args.batch_size, amp)
        cms[i] = confusion(logits.max(0).indices, y.to(device), k)
    if world > 1:
        dist.all_reduce(cms)
    return cms.cpu()


@torch.no_grad()
def soft_targets(teacher, x, change, temperature, amp):  # x (B, 3, H, W) -> (B, teacher's classes, H, W) fp32
    if change is not None:  # from the student's normalisation to the teacher's, on the very same pixels
        x = x * change[0] + change[1]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        logits = teacher(x)
    return (logits.float() / temperature).softmax(1)


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
    source = args.dataset or ("folder" if args.root else "demo")
    if source != "demo" and not args.root:
        raise BadInput("--root is missing; type the folder that holds images, masks and dataset.json, or a public set")
    if args.variant and source not in public.SETS:
        raise BadInput(f"--variant {args.variant} goes with a public --dataset, not {source}; leave it out")
    root = (demo.make(args.root or "runs/data/demo") if source == "demo" else Path(args.root)).resolve()
    args.class_weights = args.class_weights or ("sqrt" if source == "demo" else "none")
    description = public.describe(source, root, args.variant) if source in public.SETS else read_description(root)
    out = Path(args.out or f"runs/{description['name']}-kd")
    if not args.out:
        names = (out if i == 1 else Path(f"{out}-{i}") for i in itertools.count(1))
        out = next(folder for folder in names if not (folder / "last.pt").exists())
    elif rank == 0 and not args.resume and out.exists():
        if (out / "last.pt").exists():
            raise BadInput(f"{out}: holds a run; type --resume {out} to go on with it, or another --out")
        if not out.is_dir() or any(out.iterdir()):
            raise BadInput(f"{out}: there, and no run of this script; name another --out")
    if world > 1:  # rank 0 may be ahead and have made the folder
        dist.broadcast_object_list(name := [str(out)])
        out = Path(name[0])
    # >>> same: splits
    pairs, labels = find_pairs(root, description), Labels(description["classes"], description["ignore"])
    fixed = out / "split.json" if args.resume else args.split_file  # files may have been added since the run began
    splits = load_splits(root, description, pairs, fixed, None if args.resume else args.val_frac, args.group_regex,
                         need=("train",) if args.final else ("train", "val"), final=args.final)
    val_split = None if args.final else "select" if splits.get("select") else "val"  # the split that picks the weights
    test_split = next(s for s in ("test", "val", "train") if splits.get(s))  # the split that is reported
    further, reading = description.get("report", {}), dict(bands=args.bands, input_range=args.input_range)
    K = len(labels.names)
    say(f"data    {description['name']}, {K} classes, images: " + ", ".join(f"{len(n)} {s}" for s, n in splits.items()))
    check_sizes({n: pairs[n] for names in splits.values() for n in names})
    if "warning" in description:
        say(f"        WARNING {description['warning']}")
    counts = None
    if args.check_data or args.focus or args.class_weights != "none":
        limit = (args.check_data or 64) if args.class_weights == "none" else None  # class weights need every mask
        by_mask = class_counts({n: pairs[n] for n in splits["train"]}, labels, limit)  # (N, K+1) pixels
        counts = by_mask.sum(0)
        for split in splits.keys() - {"train"}:  # a bad mask there would stop the run only when it is scored
            class_counts({n: pairs[n] for n in splits[split]}, labels, args.check_data or 1)
        say("        " + "  ".join(f"{n} {c:.2%}" for n, c in zip([*labels.names, "ignored"], counts / counts.sum())))
        if not counts[:K].any():
            raise BadInput(f"{root}: no labelled pixel in the training masks; correct \"ignore\" in dataset.json")
    rare = [c for c in range(K) if args.focus and 0 < counts[c] < counts[:K].sum() / (2 * K)]
    if rare:
        say(f"        {args.focus:.0%} of the crops lie around {', '.join(labels.names[c] for c in rare)} (--focus)")
    if args.val_frac and not args.group_regex:
        say("        WARNING --val-frac without --group-regex: neighbouring images may stand on both sides")
    # <<< same: splits

    # ---- model
    # >>> same: model
    scratch, vit, backbone = args.weights == "none", args.model == "vit", PRESETS[args.arch]
    info = dict(norm="imagenet", path=None, sha256=None,
                line="FROM RANDOM WEIGHTS: everything is learned from these images (--weights loads trained ones)")
    if vit and not scratch:
        backbone, state, info = load_vit(args.weights)
    taps = sorted(set(args.taps or spread_taps(backbone["depth"])))
    if not 0 <= taps[0] <= taps[-1] < backbone["depth"]:
        raise BadInput(f"--taps {taps}: the backbone has the blocks 0 to {backbone['depth'] - 1}")
    if vit:
        m = dict(name="vit", backbone=backbone, head=args.head, taps=taps, feat_norm=args.feat_norm == "on", classes=K)
    else:
        stride = {"output_stride": args.output_stride} if args.model == "deeplabv3" else {}
        m = dict(name=args.model, classes=K, options=stride)
    net = build(m)
    if vit and not scratch:
        fill(net.backbone, state, info)
        del state
    elif not scratch:
        info = PRETRAINED[args.model](net, args.weights)
    say(f"model   {args.model if not vit else args.arch if scratch else arch_name(backbone)}, {info['line']}")
    pixel_norm = info["norm"] if args.norm == "auto" else args.norm
    if pixel_norm is None:
        raise BadInput(f"{args.weights}: published with two normalisations; type --norm imagenet for LVD-1689M, "
                       "--norm sat for SAT-493M")
    if info["norm"] not in (None, pixel_norm):
        say(f"        WARNING --norm {pixel_norm}, but these weights were trained with {info['norm']}")
    lr = args.lr or (3e-3 if scratch and vit else 1e-3)
    defaults = dict(crop=128 if scratch else 518 if vit and backbone["patch"] == 14 else 512, lr=lr,
                    unfreeze="all" if scratch else "0", backbone_lr=lr if scratch else 2e-5 if vit else 1e-4)
    vars(args).update({k: v for k, v in defaults.items() if getattr(args, k) is None})
    frozen, head_only = False, args.save == "head"
    if vit:
        if args.unfreeze != "all" and not args.unfreeze.isdigit():
            raise BadInput(f"--unfreeze {args.unfreeze}: expected a number of blocks, or all")
        frozen = net.unfreeze(None if args.unfreeze == "all" else int(args.unfreeze)) == 0
    elif args.freeze_bn:
        net.freeze_bn()
    elif world > 1 and device.type == "cuda":
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    if head_only and (scratch or not frozen):
        raise BadInput("--save head needs a frozen backbone from --weights; leave --save or --unfreeze out")
    trainable = {n: p for n, p in net.named_parameters() if p.requires_grad}
    net.to(device).train()
    amp = args.amp == "bf16" or args.amp == "auto" and fast_bf16(device) and (frozen or device.type == "cuda")
    say(f"        {f'{args.head} head on blocks {taps}, ' if vit else ''}"
        f"{sum(p.numel() for p in trainable.values()) / 1e6:.2f} M of "
        f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters train, normalisation {pixel_norm}, "
        f"{'bf16' if amp else 'fp32'} on {device}")
    # <<< same: model

    # ---- teacher, after the student: with --alpha 0 the same random numbers as in train_seg.py
    teacher, taught = None, {}
    if args.alpha > 0:
        if not args.teacher:
            raise BadInput("--teacher is missing; name the run folder of a trained network, or type --alpha 0")
        teacher, theirs = load_net(args.teacher, args.teacher_weights)  # in eval mode, and it stays there
        teacher.to(device).requires_grad_(False)
        if theirs["reading"] != reading:
            raise BadInput(f"{args.teacher}: reads images with {theirs['reading']}, this run with {reading}; type the "
                           "same --bands and --input-range")
        file = Path(args.teacher) / "best.safetensors" if Path(args.teacher).is_dir() else Path(args.teacher)
        names = [c["name"] for c in theirs["classes"]]
        say(f"teacher {args.teacher}: {sum(p.numel() for p in teacher.parameters()) / 1e6:.2f} M parameters, "
            f"{len(names)} classes, normalisation {theirs['norm']}, trained at {theirs['crop']} px")
        shown_maps = {}
        if args.resume:
            shares = classmap.read_map(out / "map.json", names, labels.names)
        else:
            if args.map == "measured":
                equal = {n: n if n in labels.names else None for n in names}
                shown_maps["equal names"] = classmap.matrix(equal, names, labels.names)
            else:
                given = classmap.same_names if args.map == "names" else partial(classmap.read_map, args.map)
                shown_maps["map in use"] = shares = given(names, labels.names)
            looked_at = even_sample(splits["train"], args.check_data or 64 * (args.map == "measured"))
            if args.check_data or args.map == "measured":
                seen = SegDataset({n: pairs[n] for n in looked_at}, labels, theirs["norm"], **reading)
                cm = image_matrices(teacher, theirs, seen, args, device, amp, rank, world).sum(0).T
                least = 0.05 if args.map == "measured" and args.within == "student" else 0.0
                found = classmap.measured(cm[:len(names), :K].numpy(), least)
                shown_maps[f"measured on {len(looked_at)} images"] = found
                if args.map == "measured":
                    shares = found
                elif odd := [n for n, a, b in zip(names, shares, found) if a.any() and b.any() and
                             a[b.argmax()] == 0]:
                    say(f"        WARNING what the teacher calls {', '.join(odd)} is mostly something else here, see:")
            say("        " + classmap.table(names, labels.names, **shown_maps).replace("\n", "\n        "))
        rows = [{labels.names[j]: row[j] for j in np.flatnonzero(row)} or None for row in shares.tolist()]
        taught = dict(teacher=str(args.teacher), sha256=sha256(file), alpha=args.alpha, temperature=args.temperature,
                      within=args.within, map=dict(zip(names, rows)))
        divided = args.within == "student" and ((shares > 0).sum(1) > 1).any()
        shares = torch.tensor(shares, dtype=torch.float32, device=device)
        known = shares.sum(0) > 0  # the teacher says nothing about the rest, so KD does not either
        if not known.any():
            raise BadInput(f"{args.map}: all of the teacher's classes go nowhere; correct the map")
        change = None
        if theirs["norm"] != pixel_norm:
            (m1, s1), (m2, s2) = (torch.tensor(NORMS[n], device=device)[..., None, None]
                                  for n in (pixel_norm, theirs["norm"]))
            change = s1 / s2, (m1 - m2) / s2

    # ---- sampling
    kept = {} if args.cache == "off" else {"cache": Cache(args.cache)}

    def part(split, *augmentation):
        files = {n: pairs[n] for n in splits[split]}
        return SegDataset(files, labels, pixel_norm, *augmentation, **kept, **reading)

    plain, items, weights, listed, scored = part("train"), None, None, None, None
    plain.read(0)  # bands or depth that need a flag are told before anything is written
    if args.replicate and args.replicate.endswith("%") or args.sampler == "class-balanced":
        per_image = np.stack([count_ids(plain.read(i)[1], K)[:K] for i in range(len(plain))])  # (N, K) pixels
    if args.replicate:
        if args.resume:
            listed = (out / "replicated.txt").read_text().splitlines()
        elif args.replicate.endswith("%"):
            pixels = per_image.sum(0)
            scarce = [c for c in range(K) if 0 < pixels[c] < pixels.sum() / (2 * K)]  # as for --focus
            listed = [plain.names[i] for i in rich(per_image, scarce, float(args.replicate[:-1]) / 100)]
        else:
            listed = read_list(Path(args.replicate), plain.names)
        items = replicated(plain.names, listed)
        say(f"        {len(listed)} entries repeat training images: {len(items)} instead of {len(plain)} (--replicate)")
    if args.sampler == "class-balanced":
        weights = balanced_weights(per_image)
    elif args.sampler == "weighted":
        if args.resume:
            scored = json.loads((out / "difficulty.json").read_text())
        elif args.difficulty:
            judge, judged = load_net(args.difficulty, None)
            if judged["reading"] != reading:
                raise BadInput(f"{args.difficulty}: reads images with {judged['reading']}, this run with {reading}; "
                               "type the same --bands and --input-range")
            if [c["name"] for c in judged["classes"]] != labels.names:
                raise BadInput(f"{args.difficulty}: trained on the classes {[c['name'] for c in judged['classes']]}, "
                               f"these are {labels.names}; score the images with a network of the same classes")
            seen = SegDataset({n: pairs[n] for n in splits["train"]}, labels, judged["norm"], **kept, **reading)
            cms = image_matrices(judge.to(device), judged, seen, args, device, amp, rank, world)
            scored = dict(zip(plain.names, hard_classes(cms.numpy(), args.hard_iou).tolist()))
            del judge
        else:
            raise BadInput("--sampler weighted without --difficulty; name a run folder: its network scores the images")
        weights = difficulty_weights([scored[n] for n in plain.names], args.hard_limits, args.hard_weights)
        say("        classes with IoU < {} in an image: {}".format(args.hard_iou, ", ".join(
            f"{h} in {n} images" for h, n in zip(*np.unique([*scored.values()], return_counts=True)))))

    # ---- optimiser
    if args.schedule == "restarts":
        ends = cycle_ends(*args.cycle, args.steps)
        say(f"        warm restarts: {ends[-1]} of {args.steps} steps, since cycles end at {', '.join(map(str, ends))}")
        args.steps = ends[-1]
    params = list(trainable.values())
    opt = torch.optim.AdamW(param_groups(net, args), lr=args.lr, betas=(0.9, 0.999), fused=True)
    opt = Lookahead(opt, args.lookahead) if args.lookahead else opt
    terms = parse_loss(args.loss)
    class_w = None
    if args.class_weights != "none":
        class_w = class_weights(torch.tensor(by_mask[:, :K]), args.class_weights).to(device)
        say("        class weights " + "  ".join(f"{n} {w:.2f}" for n, w in zip(labels.names, class_w.tolist())))
    ema = copy.deepcopy(net).requires_grad_(False) if args.ema else None
    if ema is not None and frozen:
        ema.backbone = net.backbone
    model = DistributedDataParallel(net, device_ids=[local] if device.type == "cuda" else None) if world > 1 else net
    if args.compile:
        model = torch.compile(model)

    # >>> same: restore
    def changing(n):  # what training alters; the frozen rest comes from --weights
        keep = {name for name, _ in n.named_buffers()} | set(trainable)
        return {name: t for name, t in n.state_dict().items() if name in keep}

    def restore(last):  # strict: exactly the tensors that changing() names
        for n, state in ((net, last["net"]), (ema, last["ema"])):
            if n is not None:
                if state.keys() != changing(n).keys():
                    raise BadInput(f"{out}/last.pt: not of this network; start a new run")
                n.load_state_dict(state, strict=False)
        opt.load_state_dict(last["opt"])
    # <<< same: restore

    # ---- resume
    start, best, stale, bad, rate, seconds, history = 0, -1.0, 0, 0, 1.0, 0.0, []
    command = shlex.join(["python", *sys.argv])
    if args.resume:
        last = load_state(out / "last.pt")
        if last["weights"] != info["sha256"]:
            raise BadInput(f"{args.weights}: not the file this run was trained on (sha256 {str(last['weights'])[:8]})")
        if last["world"] != world:  # it would change the batch and the order of the samples
            raise BadInput(f"{out}: trained by {last['world']} processes, not {world}; use as many: torchrun "
                           f"--nproc_per_node={last['world']}, or plain python for 1")
        if teacher is not None and last["teacher"] != taught["sha256"]:
            raise BadInput(f"{file}: not the teacher this run was trained with (sha256 {last['teacher'][:8]})")
        restore(last)
        start, best, stale, bad, rate, seconds = (last[k] for k in ("step", "best", "stale", "bad", "rate", "seconds"))
        history, command = last["history"], last["command"]
        if last["labels"] != [labels.classes, labels.ignore]:
            raise BadInput(f"{root}: the classes or ignored values are no longer those this run was trained with "
                           f"({', '.join(c['name'] for c in last['labels'][0])}); undo the change, or start a new run")
        del last
        say(f"resume  {out} at step {start} of {args.steps}, best val mIoU {best:.4f}")
    meta = dict(
        model=m, classes=labels.classes, ignore=labels.ignore, norm=pixel_norm, crop=args.crop, overlap=args.overlap,
        amp="bf16" if amp else "off", saved="head" if head_only else "all",
        weights=dict(path=info["path"] and str(Path(info["path"]).resolve()), sha256=info["sha256"]),
        dataset=description["name"], root=str(root), source=source, variant=description.get("variant"),
        chosen_on=val_split, reported=test_split, reading=reading, report=further,
        splits={s: hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] for s, names in splits.items()})
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write(out / "split.json", splits)
        if teacher is not None:
            write(out / "map.json", dict(teacher=names, student=labels.names, map=taught["map"]))
        if listed is not None and not args.resume:
            write(out / "replicated.txt", "".join(f"{n}\n" for n in listed))
        if scored is not None and not args.resume:
            write(out / "difficulty.json", scored)
        write(out / "protocol.json", meta | dict(
            command=command, flags=vars(args), tta="none",
            selection=f"best {val_split} mIoU" if val_split else "last step",
            distillation=taught, absent_class="NaN, not in the mean",
            torch=torch.__version__, python=sys.version.split()[0], world=world,
            device=torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"))

    def save_last(step):
        if rank == 0:
            write(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in history))
            save_state(out / "last.pt", net=changing(net), ema=ema and changing(ema), opt=opt.state_dict(), step=step,
                       best=best, stale=stale, bad=bad, rate=rate, seconds=seconds + time.time() - began, world=world,
                       weights=info["sha256"], teacher=taught.get("sha256"), command=command, history=history,
                       labels=[labels.classes, labels.ignore], args=vars(args))

    def save_best(step, miou):
        if rank == 0:
            tensors = {k: t for k, t in (ema or net).state_dict().items() if not head_only or k.startswith("head.")}
            save_weights(out / "best.safetensors", tensors, meta | dict(step=step, val_miou=miou))

    def over_ranks(t):  # sum over ranks, in place
        if world > 1:
            dist.all_reduce(t)
        return t

    # ---- loop
    crops = partial(transform, crop=args.crop, scales=args.scale, strength=args.color, rare=rare, focus=args.focus)
    train, val = part("train", crops, args.seed), val_split and part(val_split)
    micro_steps = args.steps * args.accum
    draws = StepSampler(len(train), args.batch_size, micro_steps, args.seed, start * args.accum, rank, world, items,
                        weights)
    total = micro_steps * args.batch_size * world
    say(f"loop    {args.steps} steps, {total / len(train):.1f} crops per image")
    if weights is not None:
        say(f"        {total} crops drawn with replacement, an image {total * draws.share.min():.1f} to "
            f"{total * draws.share.max():.1f} times (--sampler {args.sampler})")
    # Where a training image always gives the same tile, up to its eight symmetries, the teacher sees it once. Tiles are
    # known by their pixels and kept as fp16, also before the first use: a resumed run learns from the same numbers.
    tiles, room = {}, 4 << 30  # bytes
    still = args.scale == [1, 1] and args.color == args.mixup == args.cutmix == 0 and all(
        max(open_image(pair[0], deep=True).size) <= args.crop for pair in train.files)
    if teacher is not None and still:
        say("        no random crop: the teacher's probabilities are kept")

    def targets_of(x):  # (B, 3, H, W) as the student gets it -> (B, teacher's classes, H, W) on the device
        if not still:
            return soft_targets(teacher, x, change, args.temperature, amp)
        rows = []
        for tile in x:
            key = hashlib.sha256(tile.numpy().tobytes()).digest()
            row = tiles.get(key)
            if row is None:
                row = soft_targets(teacher, tile[None].to(device), change, args.temperature, amp)
                row = row[0].half().cpu()
                if (len(tiles) + 1) * row.nbytes <= room:
                    tiles[key] = row
            rows.append(row)
        return torch.stack(rows).to(device, torch.float32)

    batches = iter(DataLoader(train, batch_sampler=draws, num_workers=args.workers, pin_memory=device.type == "cuda",
                              worker_init_fn=leave_signals_to_main))
    statistics = [] if vit else [*net.buffers()]
    stopped = []  # a signal lets the step finish, then saves and leaves
    def stop(number, frame):
        stopped.append(number)
        signal.signal(number, before[number])  # a second one ends at once

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    began = time.time()
    if start == 0:
        save_last(0)  # also what the first steps roll back to
    for step in range(start, args.steps):
        if args.patience and stale >= args.patience:
            say(f"stop: no better val mIoU in {stale} validations")
            break
        # 3: a stream of its own; equal on all ranks, since set-based losses call a collective for every target
        rng = np.random.default_rng((3, args.seed, step))
        torch.manual_seed(int(np.random.default_rng((4, args.seed, step, rank)).integers(2**63)))  # for dropout
        micro, valid = [], 0
        for _ in range(args.accum):
            x, y, names = next(batches)  # (B, 3, H, W), (B, H, W); 255 = ignore
            if rng.random() < args.cutmix:
                x, y = augment.cutmix(x, y, rng)
            targets = [(1.0, y)]
            if rng.random() < args.mixup:
                x, y, other, share = augment.mixup(x, y, rng)
                targets = [(share, y), (1 - share, other)]  # `other` is y in another order: as many valid pixels
            micro.append((x, targets))
            valid += (y != IGNORE).sum()
        # one collective, two questions: valid pixels of the whole step, and was any rank told to stop
        count, stops = over_ranks(torch.tensor([valid, len(stopped)], device=device))
        for g in opt.param_groups:
            g["lr"] = g["scale"] * rate * lr_at(step, args)
        opt.zero_grad(set_to_none=True)
        shown, shown_kd, before_step = 0.0, 0.0, [t.clone() for t in statistics]
        for i, (x, targets) in enumerate(micro):
            wait = world > 1 and i + 1 < args.accum  # gradients cross ranks once, in the last micro-batch
            with model.no_sync() if wait else nullcontext():
                x = x if still else x.to(device, non_blocking=True)  # kept targets are found by their pixels on the CPU
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):  # bf16 needs no GradScaler
                    logits = model(x.to(device, non_blocking=True))  # (B, K, H, W) fp32, of some CNNs two of them
                logits, *aux = logits if isinstance(logits, tuple) else (logits,)
                if teacher is not None:
                    soft = translate(targets_of(x), shares, logits if divided else None, args.temperature)
                hard = kd = 0.0
                for share, y in targets:
                    y = y.to(device, non_blocking=True)
                    value = compute(terms, logits, y, class_w, args.label_smoothing, count, over_ranks)
                    value = value + sum(AUX * compute([(1.0, "ce")], z, y, class_w, count=count) for z in aux)
                    hard = hard + share * value
                    if teacher is not None:
                        kd = kd + share * distill(logits, soft, y, args.temperature, count, known)
                loss = (1 - args.alpha) * hard + args.alpha * kd
                shown += (1 - args.alpha) * hard.detach()
                shown_kd += args.alpha * torch.as_tensor(kd).detach()
                (loss * world).backward()  # DDP takes the mean over ranks, models/losses.py the sum
        norm = torch.nn.utils.clip_grad_norm_(params, args.clip)  # after DDP's average: one number on all ranks ...
        bad = 0 if norm.isfinite() else bad + 1  # ... so they skip together, without one more collective
        if bad:  # what it did to BatchNorm's statistics
            for t, old in zip(statistics, before_step):
                t.copy_(old)
        if bad and args.lookahead:
            opt.step(skip=True)
        if bad == 0:
            opt.step()
            if ema is not None:  # young averages forget the initial weights faster
                for name, p in ema.named_parameters():
                    if name in trainable:
                        p.lerp_(trainable[name].detach(), 1 - min(args.ema, (1 + step) / (10 + step)))
                for average, now in zip(ema.buffers(), net.buffers()):  # statistics are averages already
                    average.copy_(now)
        if bad == 5:
            if rate < 1:
                raise BadInput(f"5 non-finite gradients in a row at step {step + 1}, at half the rate too; look at the "
                               f"last images ({', '.join(names)}), or start a new run with --lr below {args.lr}")
            last, rate, bad = load_state(out / "last.pt"), 0.5, 0
            restore(last)
            del last["net"], last["ema"], last["opt"]
            say(f"step {step + 1}: 5 non-finite gradients in a row; weights of step {last['step']} again, rate halved")
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            shown, shown_kd = over_ranks(torch.stack([torch.as_tensor(v, device=device)
                                                      for v in (shown, shown_kd)])).tolist()
            rest = round((time.time() - began) / (done - start) * (args.steps - done))
            loss_shown = shown + shown_kd
            history.append(dict(step=done, loss=loss_shown if math.isfinite(loss_shown) else None,
                                lr=rate * lr_at(step, args), grad_norm=norm.item() if norm.isfinite() else None))
            both = ""
            if teacher is not None and math.isfinite(loss_shown):  # JSON has no NaN
                history[-1] |= dict(kd=shown_kd, hard=shown)
                both = f" = {shown_kd:.4f} KD + {shown:.4f} hard"
            say(f"step {done:5d} of {args.steps}  loss {loss_shown:.4f}{both}  |g| {norm.item():.3f}  "
                f"lr {history[-1]['lr']:.2e}  ETA {rest // 60}:{rest % 60:02d}", flush=True)
        due = done % args.eval_every == 0 or done == args.steps
        if args.final and done == args.steps:  # nothing was held out to choose by
            save_best(done, None)
        elif due and not args.final:
            cm = evaluate(ema or net, val, args, device, amp, rank, world)
            miou = iou(cm).nanmean().item()
            history.append(dict(step=done, val_miou=miou, val_oa=oa(cm)))
            constant = "  WARNING: one class everywhere" if (cm.sum(0) > 0).sum() == 1 else ""
            say(f"step {done:5d}  {val_split} mIoU {miou:.4f}  OA {oa(cm):.4f}{constant}", flush=True)
            if miou > best:
                save_best(done, miou)
            stale = 0 if miou > best else stale + 1
            best = max(best, miou)
        if due and rank == 0:
            write(out / "curves.png", plots.curves(history, f"{out.name}: {args.head if vit else args.model}"))
        if due or stops:
            save_last(done)
        if stops:
            say(f"stopped at step {done} of {args.steps}; go on: python train_kd.py --resume {shlex.quote(str(out))}")
            if world > 1:
                dist.barrier()  # rank 0 has saved
                dist.destroy_process_group()
            sys.exit(128 + (stopped or [signal.SIGTERM])[0])

    # ---- report: the best weights on test, which nothing above has looked at
    for number in before:
        signal.signal(number, before[number])
    if world > 1:
        dist.barrier()
    net.load_state_dict(load_weights(out / "best.safetensors")[0], strict=not head_only)
    test = part(test_split)
    cm = evaluate(net, test, args, device, amp, rank, world)
    if rank == 0:
        r = dict(split=test_split, **report(cm, labels.names, further))
        write(out / "results.json", dict(
            r, val_miou=None if args.final else best, steps=history[-1]["step"],
            seconds=round(seconds + time.time() - began, 1),
            seed=args.seed, command=command))
        write(out / "confusion.png", plots.confusion(cm.numpy(), labels.names, f"{description['name']} {test_split}"))
        shown = []
        for i in even_sample(range(len(test)), 6):
            with torch.inference_mode():
                logits = logits_of(net.eval(), test[i][0].to(device), args.crop, args.overlap, args.batch_size, amp)
            shown.append((*test.read(i), logits.max(0).indices.byte().cpu().numpy(), test.names[i]))
        write(out / "samples.png", plots.samples(shown, labels.names, labels.colors))
        note = "  (no other split: the weights were learned or chosen on these very images)"
        note = note if test_split in ("train", val_split) else ""
        print("  ".join(f"{n} {v:.3f}" for n, v in zip(labels.names, iou(cm).tolist())))
        print(headline(r, further) + note)
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
