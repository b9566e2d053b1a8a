"""Train on point labels: cross-entropy at the labelled pixels only, on points from a file or drawn from masks.

    python train_points.py                                       demo scenes, 5 points per class and image, on a CPU
    python train_points.py --points points.csv --dataset folder --root D    image,x,y,class; train needs no masks
    python train_points.py --points clicked-centre --points-per-class 3     drawn from masks, kept as OUT/points.csv
    python train_points.py --points dense                        every pixel of the masks: train_seg.py, bit for bit
    python train_points.py --ema 0.99 --grow 1                   second stage: learn from the teacher's sure pixels too
    torchrun --standalone --nproc_per_node=8 train_points.py ... same flags; --batch-size is per process
    python train_points.py --resume runs/demo-points             go on after a kill, bit for bit on a CPU
The input is the image, the network gives logits, the loss is the mean over the labelled points of the whole batch.
Validation and test are scored on full masks. eval.py and predict.py take the run folder as they take train_seg.py's.
Copy with: models/vit.py models/weights.py models/heads.py models/deeplab.py models/unetformer.py
    models/efficientnet_unet.py models/losses.py models/checkpoint.py data/io.py data/demo.py
    data/datasets.py data/public.py data/cache.py data/crops.py data/augment.py data/samplers.py data/metrics.py
    data/points.py data/tiles.py data/plots.py
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
from datetime import timedelta
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: spinning threads cost 6x on a shared CPU

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from data import augment, crops, demo, plots, points, public
from data.cache import Cache
from data.datasets import (NORMS, SegDataset, check_sizes, class_counts, find_pairs, load_splits,
                           match_pairs, normalise, read_description)
from data.common import IGNORE, BadInput, even_sample, write
from data.io import Labels, read_valid
from data.metrics import averages, confusion, headline, iou, majority, oa, report
from data.samplers import StepSampler
from data.tiles import blend_weight, windows
from models import deeplab, efficientnet_unet, unetformer
from models.checkpoint import load_state, load_weights, save_state, save_weights
from models.heads import HEADS, Segmenter
from models.losses import ce, check_logits, class_weights, compute, parse_loss
from models.vit import PRESETS, ViT, arch_name, spread_taps
from models.weights import BadWeights, fill, load_vit

UNLABELLED = 254  # in the image but no point: nothing to learn from, unless the teacher is sure of it


MOVABLE = ("out", "resume", "workers", "cache", "root", "weights")  # what a resumed run may have at another place


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    data.add_argument("--points", default="class-balanced",
                      help=f"CSV or GeoJSON of image, x, y, class; or drawn from masks: {', '.join(points.PATTERNS)}; "
                           "or dense, all pixels")
    data.add_argument("--points-per-class", type=int,
                      help="and image, when drawn (5; of one-per-instance and clicked-centre: all)")
    data.add_argument("--crop", type=int, help="training crop and evaluation window (128; with --weights 512 or 518)")
    data.add_argument("--scale", type=float, nargs=2, default=[0.75, 1.5], help="range of the random scale")
    data.add_argument("--color", type=float, default=0.2, help="strength of the colour augmentation, 0 = off")
    data.add_argument("--focus", type=float, default=0.3, help="share of crops laid around a pixel of a rare class")
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
    opt = p.add_argument_group("optimiser")
    opt.add_argument("--steps", type=int, default=720)
    opt.add_argument("--batch-size", type=int, default=8, help="per process and micro-batch")
    opt.add_argument("--lr", type=float, help="of the head (3e-3 from scratch, 1e-3 with --weights or a CNN)")
    opt.add_argument("--backbone-lr", type=float, help="(--lr from scratch; with --weights 2e-5, of a CNN 1e-4)")
    opt.add_argument("--layer-decay", type=float, default=1.0, help="factor on the rate per block below the last")
    opt.add_argument("--weight-decay", type=float, default=0.05)
    opt.add_argument("--warmup", type=int, default=50, help="steps of rising rate")
    opt.add_argument("--schedule", default="cosine", choices=["cosine", "poly"])
    opt.add_argument("--clip", type=float, default=1.0, help="gradient norm limit, inf = off")
    opt.add_argument("--loss", default="ce", help="ce, focal, dice, lovasz: ce+0.5*dice; each over labelled points")
    opt.add_argument("--class-weights", choices=["none", "inverse", "sqrt", "median", "effective"],
                     help="for ce and focal (none; sqrt for the demo, whose cars are .3 %% of it)")
    opt.add_argument("--ema", type=float, default=0.0, help="decay of averaged weights, evaluated and kept; 0 = off")
    opt.add_argument("--grow", type=float, default=0.0,
                     help="weight of the second stage: cross-entropy where the averaged weights are sure, as a mean "
                          "over all unlabelled pixels; 0 = off")
    opt.add_argument("--grow-from", type=float, default=0.4, help="part of --steps after which it begins")
    opt.add_argument("--grow-above", type=float, default=0.8, help="probability that counts as sure")
    opt.add_argument("--amp", default="auto", choices=["auto", "bf16", "off"])
    run = p.add_argument_group("run")
    run.add_argument("--out", help="run folder (runs/<dataset>-points, numbered when taken)")
    run.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, with its flags")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--eval-every", type=int, default=360, help="steps between validations, where last.pt is written")
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
    ranges = [("steps batch_size eval_every log_every points_per_class", 1, 2**31), ("crop", 16, 2**15),
              ("clip", 1e-9, math.inf), ("seed warmup", 0, 2**31), ("overlap", 0, 0.9), ("workers", 0, 64),
              ("focus color val_frac grow_from grow_above", 0, 1), ("ema", 0, 0.99999), ("lr", 1e-9, 10),
              ("backbone_lr layer_decay weight_decay grow", 0, 10)]
    for flag, low, high in ((f, *limits) for flags, *limits in ranges for f in flags.split()):
        if getattr(args, flag) is not None and not low <= getattr(args, flag) <= high:
            p.error(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected {low} to {high}")
    if args.bands and (len(args.bands) != 3 or min(args.bands) < 1):
        p.error(f"--bands {args.bands}: expected three numbers from 1, such as 4,1,2")
    if args.input_range and not -math.inf < args.input_range[0] < args.input_range[1] < math.inf:
        p.error(f"--input-range {args.input_range}: expected the lower value first")
    if args.final and args.val_frac:
        p.error("--final holds nothing out, --val-frac does; leave one of them out")
    owned = {"vit": "arch head taps feat_norm unfreeze layer_decay", "deeplabv3": "freeze_bn output_stride"}
    for flag, model in ((f, m) for m, flags in owned.items() if m != args.model for f in flags.split()):
        if getattr(args, flag) != p.get_default(flag):
            p.error(f"--{flag.replace('_', '-')} goes with --model {model}, not {args.model}; leave it out")
    if args.model == "deeplabv3" and args.batch_size == 1 and not args.freeze_bn:
        p.error("--batch-size 1: BatchNorm needs two images; type 2 or more, or add --freeze-bn")
    if not 0.05 <= args.scale[0] <= args.scale[1] <= 20:
        p.error(f"--scale {args.scale}: expected two rising numbers such as 0.75 1.5")
    if args.points_per_class and args.points not in points.PATTERNS:
        p.error(f"--points-per-class {args.points_per_class}: for points drawn from masks, not --points {args.points}; "
                "leave it out")
    if args.grow and not args.ema:
        raise BadInput("--grow without --ema: the averaged weights are the teacher; type --ema 0.99")
    if args.grow and args.points == "dense":
        raise BadInput("--grow with --points dense: no pixel is left to grow into; leave one of them out")
    return args


def numbers(text):  # "4,1,2" -> [4, 1, 2]
    return [int(n) for n in text.split(",")]


def lr_at(step, args):  # a pure function of step: a resumed run has no scheduler to restore
    done = max(0.0, (step - args.warmup) / max(1, args.steps - args.warmup))
    fall = 0.5 * (1 + math.cos(math.pi * done)) if args.schedule == "cosine" else (1 - done) ** 0.9
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


def as_text(row):  # of averages(): "accuracy .943  precision .157 .889  recall ..."
    cells = [f"{n} {row[f'{n}_macro']:.3f} {row[f'{n}_weighted']:.3f}" for n in ("precision", "recall", "f1")]
    return f"accuracy {row['accuracy']:.3f}  " + "  ".join(cells) + "  (macro, weighted)"


def transform(image, mask, rng, crop, scales, strength, rare, focus):  # --points dense: as in train_seg.py
    image, mask = crops.random_crop(image, mask, crop, scales, rng, rare, focus)
    image, mask = augment.dihedral(image, mask, rng)
    return augment.color(image, rng, strength), mask


def transform_points(image, mask, rng, ps, crop, scales, strength, rare, focus):  # mask: UNLABELLED, and IGNORE outside
    def one_of(some):  # (y, x) of a random point
        return some[rng.integers(len(some)), 1::-1] if len(some) else None

    H, W = mask.shape
    scale, centre = crops.random_place(H, W, crop, scales, rng, lambda: one_of(ps[np.isin(ps[:, 2], rare)]), focus)
    if len(ps) and not len(points.inside(ps, crops.window(H, W, crop, scale, centre)[0])):
        centre = crops.around(one_of(ps), crop / scale, rng)  # no crop without a point where the image has some
    image, mask = crops.crop(image, mask, crop, scale, centre)
    points.paint(mask, ps, *crops.window(H, W, crop, scale, centre))
    image, mask = augment.dihedral(image, mask, rng)
    return augment.color(image, rng, strength), mask


def at_points(image, mask, rng, ps):  # the whole image, to be scored where it has points
    mask = np.full(mask.shape, IGNORE, np.uint8)
    mask[ps[:, 1], ps[:, 0]] = ps[:, 2]
    return image, mask


class PointSet(SegDataset):
    """A SegDataset that opens no mask: labels are points {name: (n, 3) x, y, class}; all else is UNLABELLED."""

    def __init__(self, files, ps, *args, **kw):
        super().__init__({n: (image, image, *box) for n, (image, _, *box) in files.items()}, *args, **kw)
        self.points, self.tag = [ps.get(n, np.zeros((0, 3), np.int64)) for n in self.names], f"{self.tag} points"

    def decode(self, image_path, _):
        image, valid = read_valid(image_path, self.bands, self.input_range)
        mask = np.full(image.shape[:2], UNLABELLED, np.uint8)
        if valid is not None:
            mask[~valid] = IGNORE
        return image, mask

    def __getitem__(self, key):
        i, draw = key if isinstance(key, tuple) else (key, 0)
        image, mask = self.read(i)
        image, mask = self.augment(image, mask, np.random.default_rng((2, self.seed, draw)), self.points[i])
        return normalise(image, self.norm), torch.from_numpy(mask.astype(np.int64)), self.names[i]


@torch.no_grad()
def sure_pixels(teacher, x, above, amp):  # (B, 3, H, W) -> (B, H, W) class ids, IGNORE where the teacher is not sure
    def look(x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            return teacher(x)

    small = F.interpolate(x, scale_factor=0.75, mode="bilinear", antialias=True, align_corners=False)
    views = [look(x), look(x.flip(3)).flip(3), look(x.flip(2)).flip(2),
             F.interpolate(look(small), x.shape[-2:], mode="bilinear", align_corners=False)]
    p, ids = torch.stack([v.softmax(1) for v in views]).mean(0).max(1)
    agree = torch.stack([v.max(1).indices == ids for v in views]).all(0)  # one answer from every view ...
    return ids.where(agree & (p > above), IGNORE)  # ... and a confident mean


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
def draw_samples(net, data, args, device, amp, n=6):  # contact sheet of images spread over the split
    net.eval()
    rows = []
    for i in even_sample(range(len(data)), n):
        logits = logits_of(net, data[i][0].to(device), args.crop, args.overlap, args.batch_size, amp)
        image, mask = data.read(i)
        truth = None if isinstance(data, PointSet) else mask  # single pixels would not be seen
        rows.append((image, truth, logits.max(0).indices.byte().cpu().numpy(), data.names[i]))
    return plots.samples(rows, data.labels.names, data.labels.colors)


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
    out = Path(args.out or f"runs/{description['name']}-points")
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
    bare = description.get("unlabelled", [])
    if args.points not in ("dense", *points.PATTERNS):
        bare = list(description["splits"])  # with points from a file no image needs a mask
    pairs = find_pairs(root, description | {"unlabelled": bare})
    labels = Labels(description["classes"], description["ignore"])
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

    # ---- points
    files, dense, given = {n: pairs[n] for n in splits["train"]}, args.points == "dense", {}
    if dense:
        by_image = class_counts(files, labels, 64 if args.class_weights == "none" else None)
        counts = by_image.sum(0)
        say("points  none: every pixel of the masks")
    elif args.points in points.PATTERNS and not args.resume:
        by_instance = {}
        if "instances" in description:  # a pattern beside "masks": number or colour of the instance at every pixel
            by_instance = match_pairs(root, description | {"masks": description["instances"]})[0]
        few = args.points_per_class or (None if args.points in ("one-per-instance", "clicked-centre") else 5)
        given = points.simulate(files, labels, args.points, few, args.seed,
                                {n: instances for n, (_, instances) in by_instance.items() if instances}, **reading)
        say(f"points  drawn from the masks: {points.PATTERNS[args.points]}, n = {few or 'all'}")
    else:
        path = out / "points.csv" if args.resume else args.points
        if not args.resume and Path(path).suffix.lower() not in (".csv", ".geojson", ".json"):
            raise BadInput(f"--points {path}: expected a .csv or .geojson file, {', '.join(points.PATTERNS)}, or dense")
        given = points.read_points(path, pairs, labels.names)
        say(f"points  {path}, {sum(map(len, given.values()))} in all")
    for split in {val_split, test_split} - {None}:
        if bare := [n for n in splits[split] if pairs[n][1] is None]:
            marked = sum(n in given for n in splits[split])
            if len(bare) < len(splits[split]) or not marked:
                what = f"{len(bare)} of {len(splits[split])} without a mask" if marked else \
                    "without a mask, and no point in that split"
                raise BadInput(f"{pairs[bare[0]][0]}: in {split}, {what}; add them, or take it out of the splits")
            say(f"        WARNING no masks for {split}: scored on the points of {marked} of its {len(bare)} images, "
                "which tell little of edges")
    ps = {n: given[n] for n in files if n in given}
    if not dense:
        by_image = np.array([np.bincount(p[:, 2], minlength=K + 1) for p in ps.values()], int).reshape(-1, K + 1)
        counts = by_image.sum(0)
        n, bare = counts.sum(), [name for name in files if not len(ps.get(name, ()))]
        if n == 0:
            raise BadInput(f"{args.points}: no point in a training image; check the image names in it")
        if not args.grow:
            files = {name: f for name, f in files.items() if name not in bare}
        say(f"        {n} on {len(splits['train']) - len(bare)} images: "
            + "  ".join(f"{name} {c}" for name, c in zip(labels.names, counts)))
        if bare:
            say(f"        {len(bare)} training images have none: " + ("for --grow alone" if args.grow else "left out"))
        if absent := [name for name, c in zip(labels.names, counts) if c == 0]:
            say(f"        WARNING no point of {', '.join(absent)}: never learned")
    rare = [c for c in range(K) if args.focus and 0 < counts[c] < counts[:K].sum() / (2 * K)]
    if rare:
        say(f"        {args.focus:.0%} of the crops lie around {', '.join(labels.names[c] for c in rare)} (--focus)")
    if args.val_frac and not args.group_regex:
        say("        WARNING --val-frac without --group-regex: neighbouring images may stand on both sides")

    # ---- model
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
    frozen = False
    if vit:
        if args.unfreeze != "all" and not args.unfreeze.isdigit():
            raise BadInput(f"--unfreeze {args.unfreeze}: expected a number of blocks, or all")
        frozen = net.unfreeze(None if args.unfreeze == "all" else int(args.unfreeze)) == 0
    elif args.freeze_bn:
        net.freeze_bn()
    elif world > 1 and device.type == "cuda":
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    trainable = {n: p for n, p in net.named_parameters() if p.requires_grad}
    net.to(device).train()
    amp = args.amp == "bf16" or args.amp == "auto" and fast_bf16(device) and (frozen or device.type == "cuda")
    say(f"        {f'{args.head} head on blocks {taps}, ' if vit else ''}"
        f"{sum(p.numel() for p in trainable.values()) / 1e6:.2f} M of "
        f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters train, normalisation {pixel_norm}, "
        f"{'bf16' if amp else 'fp32'} on {device}")

    # ---- optimiser
    params = list(trainable.values())
    opt = torch.optim.AdamW(param_groups(net, args), lr=args.lr, betas=(0.9, 0.999), fused=True)
    terms = parse_loss(args.loss)
    class_w = None
    if args.class_weights != "none":
        class_w = class_weights(torch.tensor(by_image[:, :K]), args.class_weights).to(device)
        say("        class weights " + "  ".join(f"{n} {w:.2f}" for n, w in zip(labels.names, class_w.tolist())))
    ema = copy.deepcopy(net).requires_grad_(False).eval() if args.ema else None  # with --grow it also teaches
    if ema is not None and frozen:
        ema.backbone = net.backbone
    model = DistributedDataParallel(net, device_ids=[local] if device.type == "cuda" else None) if world > 1 else net

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
    start, best, bad, rate, seconds, history = 0, -1.0, 0, 1.0, 0.0, []
    command = shlex.join(["python", *sys.argv])
    seen = torch.zeros(K, K, dtype=torch.int64, device=device)  # this rank's training answers since the last validation
    if args.resume:
        last = load_state(out / "last.pt")
        if last["weights"] != info["sha256"]:
            raise BadInput(f"{args.weights}: not the file this run was trained on (sha256 {str(last['weights'])[:8]})")
        if last["world"] != world:  # it would change the batch and the order of the samples
            raise BadInput(f"{out}: trained by {last['world']} processes, not {world}; use as many: torchrun "
                           f"--nproc_per_node={last['world']}, or plain python for 1")
        restore(last)
        start, best, bad, rate, seconds = (last[k] for k in ("step", "best", "bad", "rate", "seconds"))
        if rank == 0:
            seen += last["seen"].to(device)
        history, command = last["history"], last["command"]
        if last["labels"] != [labels.classes, labels.ignore]:
            raise BadInput(f"{root}: the classes or ignored values are no longer those this run was trained with "
                           f"({', '.join(c['name'] for c in last['labels'][0])}); undo the change, or start a new run")
        del last
        say(f"resume  {out} at step {start} of {args.steps}, best val mIoU {best:.4f}")
    meta = dict(
        model=m, classes=labels.classes, ignore=labels.ignore, norm=pixel_norm, crop=args.crop, overlap=args.overlap,
        amp="bf16" if amp else "off", saved="all",
        weights=dict(path=info["path"] and str(Path(info["path"]).resolve()), sha256=info["sha256"]),
        dataset=description["name"], root=str(root), source=source, variant=description.get("variant"),
        chosen_on=val_split, reported=test_split, reading=reading, report=further,
        splits={s: hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] for s, names in splits.items()})
    def save_last(step):
        if rank == 0:
            write(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in history))
            save_state(out / "last.pt", net=changing(net), ema=ema and changing(ema), opt=opt.state_dict(), step=step,
                       best=best, bad=bad, rate=rate, seconds=seconds + time.time() - began, world=world,
                       seen=seen.cpu(), weights=info["sha256"], command=command, history=history,
                       labels=[labels.classes, labels.ignore], args=vars(args))

    def save_best(step, miou):
        if rank == 0:
            save_weights(out / "best.safetensors", (ema or net).state_dict(), meta | dict(step=step, val_miou=miou))

    def over_ranks(t):  # sum over ranks, in place
        if world > 1:
            dist.all_reduce(t)
        return t

    kept = {} if args.cache == "off" else {"cache": Cache(args.cache)}

    def part(split):
        whole = {n: pairs[n] for n in splits[split]}
        if all(mask for _, mask, *_ in whole.values()):
            return SegDataset(whole, labels, pixel_norm, **kept, **reading)
        whole = {n: f for n, f in whole.items() if n in given}
        return PointSet(whole, given, labels, pixel_norm, at_points, **kept, **reading)

    # ---- loop
    how = dict(crop=args.crop, scales=args.scale, strength=args.color, rare=rare, focus=args.focus)
    if dense:
        train = SegDataset(files, labels, pixel_norm, partial(transform, **how), args.seed, **kept, **reading)
    else:
        train = PointSet(files, ps, labels, pixel_norm, partial(transform_points, **how), args.seed, **kept, **reading)
    val = val_split and part(val_split)
    train.read(0)  # bands or depth that need a flag are told before anything is written
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write(out / "split.json", splits)
        if not dense:
            points.write_points(out / "points.csv", given, labels.names)
        write(out / "protocol.json", meta | dict(
            command=command, flags=vars(args), tta="none",
            selection=f"best {val_split} mIoU" if val_split else "last step",
            absent_class="NaN, not in the mean", torch=torch.__version__, python=sys.version.split()[0], world=world,
            device=torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"))
    draws = StepSampler(len(train), args.batch_size, args.steps, args.seed, start, rank, world)
    say(f"loop    {args.steps} steps, {args.steps * args.batch_size * world / len(train):.1f} crops per image")
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
        x, y, names = next(batches)  # (B, 3, H, W), (B, H, W): class ids at the points, UNLABELLED, IGNORE
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        growing = args.grow > 0 and step >= args.grow_from * args.steps
        unlabelled = y == UNLABELLED
        y = y.where(~unlabelled, IGNORE)
        asked = [(y != IGNORE).sum(), y.new_tensor(len(stopped))]
        if growing:
            grown = sure_pixels(ema, x, args.grow_above, amp).where(unlabelled, IGNORE)
            asked += [unlabelled.sum(), (grown != IGNORE).sum()]
        # one collective: points of the whole step, was any rank told to stop; of the second stage other and sure pixels
        count, stops, *second = over_ranks(torch.stack(asked))
        before_step = [t.clone() for t in statistics]
        for g in opt.param_groups:
            g["lr"] = g["scale"] * rate * lr_at(step, args)
        opt.zero_grad(set_to_none=True)
        torch.manual_seed(int(np.random.default_rng((4, args.seed, step, rank)).integers(2**63)))  # for dropout
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):  # bf16 needs no GradScaler
            logits = model(x)  # (B, K, H, W) fp32, of some CNNs two of them
        logits, *aux = logits if isinstance(logits, tuple) else (logits,)
        if step == start:
            check_logits(logits)
        loss = compute(terms, logits, y, class_w, 0.0, count, over_ranks)
        loss = loss + sum(AUX * compute([(1.0, "ce")], z, y, class_w, count=count) for z in aux)
        if growing:
            others, sure = second
            loss = loss + args.grow * ce(logits, grown, others)  # a mean over all: a few sure, easy pixels weigh little
        (loss * world).backward()  # DDP takes the mean over ranks, models/losses.py the sum
        seen += confusion(logits.detach().max(1).indices, y, K)
        norm = torch.nn.utils.clip_grad_norm_(params, args.clip)  # after DDP's average: one number on all ranks ...
        bad = 0 if norm.isfinite() else bad + 1  # ... so they skip together, without one more collective
        if bad:  # what it did to BatchNorm's statistics
            for t, old in zip(statistics, before_step):
                t.copy_(old)
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
            shown = over_ranks(loss.detach()).item()
            rest = round((time.time() - began) / (done - start) * (args.steps - done))
            history.append(dict(step=done, loss=shown if math.isfinite(shown) else None, lr=rate * lr_at(step, args),
                                grad_norm=norm.item() if norm.isfinite() else None))  # JSON has no NaN
            if growing:
                history[-1]["sure"] = (sure / others.clamp(min=1)).item()
                grows = f"  sure of {history[-1]['sure']:.1%}"
            say(f"step {done:5d} of {args.steps}  loss {shown:.4f}  |g| {norm.item():.3f}{grows if growing else ''}  "
                f"lr {history[-1]['lr']:.2e}  ETA {rest // 60}:{rest % 60:02d}", flush=True)
        due = done % args.eval_every == 0 or done == args.steps
        if due or stops:
            seen = over_ranks(seen)  # from here on rank 0 holds it all
            seen = seen if rank == 0 else seen.zero_()
        if args.final and done == args.steps:  # nothing was held out to choose by
            save_best(done, None)
        elif due and not args.final:
            cm = evaluate(ema or net, val, args, device, amp, rank, world)
            miou = iou(cm).nanmean().item()
            scores = {"train": averages(seen.cpu()), val_split: averages(cm)}
            history.append(dict(step=done, val_miou=miou, val_oa=oa(cm), scores=scores))
            constant = "  WARNING: one class everywhere" if (cm.sum(0) > 0).sum() == 1 else ""
            say(f"step {done:5d}  {val_split} mIoU {miou:.4f}  OA {oa(cm):.4f}{constant}", flush=True)
            for split, row in scores.items():
                say(f"  {split:6} {as_text(row)}")
            if miou > best:
                save_best(done, miou)
            best = max(best, miou)
        if due:
            seen.zero_()
        if due and rank == 0:
            write(out / "bars.png", plots.bars(history, f"{out.name}: train on points, {val_split} on full masks"))
            write(out / "curves.png", plots.curves(history, f"{out.name}: {args.head if vit else args.model}"))
        if due or stops:
            save_last(done)
        if stops:
            say(f"stopped at step {done} of {args.steps}; go on: "
                f"python train_points.py --resume {shlex.quote(str(out))}")
            if world > 1:
                dist.barrier()  # rank 0 has saved
                dist.destroy_process_group()
            sys.exit(128 + (stopped or [signal.SIGTERM])[0])

    # ---- report: the best weights on test, which nothing above has looked at
    for number in before:
        signal.signal(number, before[number])
    if world > 1:
        dist.barrier()
    net.load_state_dict(load_weights(out / "best.safetensors")[0])
    test = part(test_split)
    cm = evaluate(net, test, args, device, amp, rank, world)
    if rank == 0:
        r = dict(split=test_split, **report(cm, labels.names, further))
        write(out / "results.json", dict(
            r, scores=averages(cm), majority_scores=averages(majority(cm)),
            points=None if dense else int(counts[:K].sum()),
            val_miou=None if args.final else best, steps=history[-1]["step"],
            seconds=round(seconds + time.time() - began, 1),
            seed=args.seed, command=command))
        write(out / "confusion.png", plots.confusion(cm.numpy(), labels.names, f"{description['name']} {test_split}"))
        write(out / "samples.png", draw_samples(net, test, args, device, amp))
        note = "  (no other split: the weights were learned or chosen on these very images)"
        note = note if test_split in ("train", val_split) else ""
        print("  ".join(f"{n} {v:.3f}" for n, v in zip(labels.names, iou(cm).tolist())))
        print(headline(r, further) + note)
        for who, row in ((test_split, averages(cm)), (f"always {r['majority_class']!r}", averages(majority(cm)))):
            print(f"{who} {as_text(row)}")
        print(f"look at {out}/samples.png, confusion.png, bars.png; then, on your own images:\n"
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
