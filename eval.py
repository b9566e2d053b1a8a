"""Score a trained model, or anybody's masks, on one split: one confusion matrix, every metric, the protocol beside it.

    python eval.py runs/demo                                    the reported split, windows and precision as in training
    python eval.py runs/demo --split val --overlap 0.5
    python eval.py runs/demo --masks predictions --mask-ids train   masks from predict.py or any other program
    python eval.py --summary runs/*                             one table of what these runs reported
    torchrun --standalone --nproc_per_node=8 eval.py runs/demo  images are shared out, the numbers stay the same
Writes eval.json and confusion.png into RUN/eval-SPLIT, of --masks into RUN/eval-SPLIT-masks.
Copy with: models/vit.py models/weights.py models/heads.py models/deeplab.py models/unetformer.py
    models/efficientnet_unet.py models/checkpoint.py data/io.py data/datasets.py
    data/public.py data/cache.py data/metrics.py data/tiles.py data/plots.py
"""
import argparse
import ctypes
import hashlib
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: spinning threads cost 6x on a shared CPU

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from data import plots, public
from data.cache import Cache
from data.datasets import SegDataset, find_pairs, load_splits, read_description
from data.common import IGNORE, BadInput, write
from data.io import Labels
from data.metrics import confusion, f1, headline, iou, precision, recall, report
from data.tiles import blend_weight, windows
from models import deeplab, efficientnet_unet, unetformer
from models.checkpoint import load_weights
from models.heads import HEADS, Segmenter
from models.vit import ViT
from models.weights import BadWeights, fill, load_vit


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", nargs="?", help="run folder, or its best.safetensors")
    p.add_argument("--summary", nargs="+", metavar="RUN", help="print the results of these runs as a Markdown table")
    p.add_argument("--split", help="(the one that training reported)")
    p.add_argument("--root", help="data folder (as in training)")
    p.add_argument("--variant", help="form of a public data set, where it has several: irrg,eroded (data/public.py)")
    p.add_argument("--split-file", help="JSON {split: [names]} instead of the data set's own: a run's split.json")
    p.add_argument("--masks", help="score the masks NAME.png in this folder instead of running the model")
    p.add_argument("--mask-ids", choices=["train", "raw"], help="ids 0..K-1, or values as in the data set's own masks")
    p.add_argument("--overlap", type=float, help="of windows, as a part of the crop (as in training)")
    p.add_argument("--weights", help="backbone file of a run saved with --save head (where it was in training)")
    p.add_argument("--amp", default="auto", choices=["auto", "bf16", "off"], help="auto: as trained, where fast")
    p.add_argument("--batch-size", type=int, default=16, help="windows at once")
    p.add_argument("--cache", help="folder for decoded images, at most 64 GB (~/.cache/nanors); off = none")
    p.add_argument("--workers", type=int, default=min(4, os.cpu_count() - 1), help="reading processes")
    p.add_argument("--out", help="folder for the results (RUN/eval-SPLIT, with --masks RUN/eval-SPLIT-masks)")
    args = p.parse_args(argv)
    if args.mask_ids and not args.masks:
        p.error("--mask-ids goes with --masks; leave it out")
    if empty := [k for k, v in vars(args).items() if v == ""]:
        p.error(f"--{empty[0].replace('_', '-')} is empty; is the shell variable set?")
    if bool(args.run) == bool(args.summary):
        p.error("name one run folder, or several after --summary")
    if args.batch_size < 1 or not 0 <= args.workers <= 64 or not 0 <= (args.overlap or 0) <= 0.9:
        p.error("--batch-size from 1, --workers in 0..64, --overlap in 0..0.9")
    return args


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


def summary(runs):  # Markdown; runs that differ in no more than seed and place become one row, mean +/- sd
    groups, left_out = {}, []
    for run in (r for r in map(Path, runs) if (r / "protocol.json").exists()):  # runs/data is none
        try:
            result, protocol = (json.loads((run / f"{name}.json").read_text()) for name in ("results", "protocol"))
            if "accuracy" in result:  # of train_cls.py: the same words for the same numbers
                result |= dict(oa=result["accuracy"], mf1=result["macro_f1"], iou=result["table"])
                protocol |= dict(report={}, variant=None)
            place = ("seed", "out", "resume", "workers", "cache", "root")
            same = {k: v for k, v in protocol["flags"].items() if k not in place}
            same |= {k: protocol[k] for k in ("dataset", "variant", "world", "amp", "report")}
            same |= dict(classes=sorted(result["iou"]), split=result["split"])
        except FileNotFoundError:
            left_out.append(f"{run}: not finished; go on with --resume {run}")
        except (ValueError, LookupError, TypeError) as e:
            left_out.append(f"{run}: its results cannot be read ({e!r})")
        else:
            groups.setdefault(json.dumps(same, sort_keys=True), []).append((run, result, protocol))
    if not groups:
        raise BadInput(f"{runs[0]}: no results.json in these folders; name finished runs, such as runs/*")
    lines = ["| run | data | split | classes | seeds | mIoU | mean F1 | OA | majority mIoU | also reported |",
             "|" + "---|" * 10]
    for group in groups.values():
        def score(key):
            if key not in group[0][1]:
                return ""
            values = torch.tensor([result[key] for _, result, _ in group], dtype=torch.float64)
            return f"{values.mean():.4f}" + (f" +/- {values.std():.4f}" if len(group) > 1 else "")

        _, result, protocol = group[0]
        further = ", ".join(f"{key.replace('_', ' ')}: mIoU {score(f'miou_{key}')}" for key in protocol["report"])
        cells = [", ".join(run.name for run, _, _ in group), protocol["dataset"], result["split"],
                 f"{result['classes_in_mean']} of {len(result['iou'])}", ", ".join(str(r["seed"]) for _, r, _ in group),
                 score("miou"), score("mf1"), score("oa"), score("majority_miou"), further]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *left_out])


def main(args):
    if args.summary:
        return print(summary(args.summary))
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

    # ---- model and data
    meta = load_weights(args.run, header_only=True)[1]
    if meta.get("task") == "classification":
        raise BadInput(f"{args.run}: a run of train_cls.py, which has written its own results.json; type python "
                       f"predict.py {args.run} IMAGES for others")
    labels = Labels(meta["classes"], meta["ignore"])
    K = len(labels.names)
    amp = args.amp == "bf16" or args.amp == "auto" and meta["amp"] == "bf16" and fast_bf16(device)
    overlap = meta["overlap"] if args.overlap is None else args.overlap
    args.split = args.split or meta["reported"]
    run = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
    root = Path(args.root or meta["root"])
    variant, other = args.variant or meta["variant"], args.root or args.variant  # other: not the files of training
    official = meta["source"] in public.SETS
    description = public.describe(meta["source"], root, variant) if official else read_description(root)
    pairs = find_pairs(root, description)
    here = {c["name"]: c for c in description["classes"]}
    if set(here) != set(labels.names):
        raise BadInput(f"{root}: the classes {', '.join(here)}; the model knows {', '.join(labels.names)}")
    labels = Labels([here[n] for n in labels.names], description["ignore"])  # of these masks, in the model's order
    split_file = args.split_file or (run / "split.json" if (run / "split.json").exists() and not other else None)
    splits = load_splits(root, description, pairs, split_file, need=(), final=True)
    if args.split in description.get("unlabelled", ()) and args.split not in splits:
        raise BadInput(f"{root}: no masks for {args.split}; predict it: python predict.py {args.run} IMAGES, with "
                       "--label-out train or raw as the grader wants")
    if not splits.get(args.split):
        raise BadInput(f"{root}: no split {args.split!r}; type --split with one of: {', '.join(splits)}" + (
            f", or --split-file {run}/split.json for that of training" if other else ""))
    names = splits[args.split]
    files = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    seen = [s for s in ("train", meta["chosen_on"]) if files == meta["splits"].get(s)]
    used = [f"; WARNING: the model's own {s} images" for s in seen]
    say(f"{len(names)} {args.split} images of {root}", *used)

    if args.masks and not args.mask_ids:
        raise BadInput("--masks without --mask-ids; type train for ids 0..K-1, which predict.py writes, or raw for "
                       "values as in the data set's own masks")
    if not args.masks:
        net = load_net(args.run, args.weights)[0].to(device)
    folder, found, ids = Path(args.masks or ""), {}, [dict(name=n, id=i) for i, n in enumerate(labels.names)]
    table = labels if args.mask_ids == "raw" else Labels(ids, [IGNORE])

    for name in names if args.masks else ():  # predict.py names them below the folder it was given
        parts = name.split("/")
        places = [folder / f"{'/'.join(parts[i:])}.png" for i in range(len(parts))]
        found[name] = next((f for f in places if f.exists()), None)
        if found[name] is None:
            raise BadInput(f"{places[0]}: no such mask, nor {places[-1]}; expected one for every image of the split")
    if len(set(found.values())) < len(found):
        raise BadInput(f"{folder}: images of one name in several folders, and only one mask for them; name the masks "
                       f"like {next(iter(found))}.png")

    # ---- one matrix
    kept = {} if args.cache == "off" else {"cache": Cache(args.cache)}
    data = SegDataset({n: pairs[n] for n in names}, labels, meta["norm"], **kept, **meta["reading"])
    cm = torch.zeros(K, K, dtype=torch.int64, device=device)
    mine = range(rank, len(data), world)
    with torch.inference_mode():
        for x, y, name in DataLoader(data, batch_size=None, sampler=mine, num_workers=args.workers,
                                     prefetch_factor=1 if args.workers else None):
            if args.masks:
                file = found[name]
                pred = torch.from_numpy(table.load(file)).long()
                if pred.shape == y.shape:
                    pred[y == IGNORE] = 0  # is not counted: predict.py leaves transparent pixels without a class
                if pred.shape != y.shape or (pred >= K).any():
                    raise BadInput(f"{file}: {tuple(pred.shape)} (H, W), ids up to {pred.max()}; expected "
                                   f"{tuple(y.shape)} with a class everywhere")
            else:
                pred = logits_of(net, x.to(device), meta["crop"], overlap, args.batch_size, amp).max(0).indices
            cm += confusion(pred.to(device), y.to(device), K)
    if world > 1:
        dist.all_reduce(cm)
    if not cm.any():
        raise BadInput(f"{root}: every pixel of {args.split} is ignored; check \"ignore\" in dataset.json")

    # ---- report
    if rank == 0:
        cm = cm.cpu()
        r = dict(split=args.split, **report(cm, labels.names, meta["report"]))
        width = max(map(len, labels.names))
        print(f"{'class':{width}}    IoU     F1   prec. recall   share")
        for row in zip(labels.names, iou(cm), f1(cm), precision(cm), recall(cm), cm.sum(1) / cm.sum()):
            print(f"{row[0]:{width}} " + " ".join(f"{v:6.3f}" for v in row[1:5]) + f" {row[5]:7.2%}")
        print(headline(r, meta["report"]))
        out = Path(args.out or run / f"eval-{args.split}{'-masks' if args.masks else ''}")
        protocol = dict(run=str(args.run), masks=args.masks, root=str(root), files=files, images=len(names),
                        variant=variant, **meta["reading"],
                        crop=meta["crop"], overlap=overlap, amp="bf16" if amp else "off", tta="none")
        write(out / "eval.json", dict(r, protocol=protocol))
        write(out / "confusion.png", plots.confusion(cm.numpy(), labels.names, f"{meta['dataset']} {args.split}"))
        print(f"wrote {out}/eval.json and confusion.png")
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
