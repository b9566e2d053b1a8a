"""Score a trained model, or anybody's masks, on one split: one confusion matrix, every metric, the protocol beside it.

    python eval.py runs/demo                         the reported split, windows as in training
    python eval.py runs/demo --split val --overlap 0.5
    python eval.py runs/demo --masks predictions --mask-ids train    masks of any program
    python eval.py runs/demo --split train --difficulty    scores images for train_kd.py --sampler weighted
    python eval.py --summary runs/*                  one table of what these runs reported
    torchrun --standalone --nproc_per_node=8 eval.py runs/demo    the numbers stay the same

Writes eval.json and confusion.png into RUN/eval-SPLIT, of --masks into RUN/eval-SPLIT-masks.
"""
import json
import os
import sys
from pathlib import Path
from shlex import quote

# Read when torch loads: threads that spin while they wait cost sixfold on a shared CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist

from data import metrics, plots, public, samplers
from data.common import IGNORE, BadInput, nfc, progress, read_json, write
from data.files import check_folder, image_name, walk
from data.io import Labels
from data.source import Source
from models import nets, run
from models.checkpoint import load_weights
from models.infer import matrices
from models.run import COUNT, between

HARD_IOU = 0.5  # a class of an image with less is hard, for --difficulty

# Flags by which runs may differ and still be one experiment in --summary.
PLACE = "seed", "out", "resume", "workers", "cache", "root"


def parse_args(argv=None):
    p = run.Parser(__doc__)
    p.add_argument("run", nargs="?", help="run folder, or its best.safetensors")
    p.add_argument("--summary", nargs="+", metavar="RUN", help="one Markdown table of these runs")
    p.add_argument("--split", help="(the one that training reported)")
    p.add_argument("--root", help="data folder (as in training)")
    p.add_argument("--variant", help="form of a public set that has several: rgb,eroded")
    p.add_argument("--split-file", help="JSON {split: [names]}, such as a run's split.json")
    p.add_argument("--masks", help="score the masks NAME.png in this folder, not the model")
    p.add_argument("--mask-ids", choices=["train", "raw"],
                   help="ids 0..K-1, or values as in the data set's own masks")
    p.add_argument("--difficulty", action="store_true",
                   help="also write difficulty.json: hard classes per image")
    p.add_argument("--overlap", type=between(0, 0.9),
                   help="of windows, as a part of the crop (as in training)")
    p.add_argument("--weights", help="backbone of a run saved with --save head (as in training)")
    p.add_argument("--amp", default="auto", choices=["auto", "bf16", "off"],
                   help="auto: as trained, where fast")
    p.add_argument("--batch-size", type=COUNT, default=16, help="windows at once")
    p.add_argument("--cache", help="folder for decoded images, or off (~/.cache/nanors)")
    p.add_argument("--workers", type=between(0, 64, int), default=min(4, os.cpu_count() - 1),
                   help="reading processes")
    p.add_argument("--out", help="folder for the results (RUN/eval-SPLIT, or -masks)")
    args = p.parse_args(argv)
    if bool(args.run) == bool(args.summary):
        p.error("name one run folder, or several after --summary")
    if args.masks and not args.mask_ids:
        p.error("--masks without --mask-ids; type train for ids 0..K-1, which predict.py writes, or "
                "raw for values as in the data set's own masks")
    if args.mask_ids and not args.masks:
        p.error("--mask-ids goes with --masks; leave it out")
    return args


# ---- --summary

def read_run(folder):
    # -> what tells the experiment from others, results, protocol
    result, protocol = [read_json(folder / f"{name}.json") for name in ("results", "protocol")]
    if "accuracy" in result:  # of train_cls.py: the same words for the same numbers
        result |= dict(oa=result["accuracy"], mf1=result["macro_f1"], iou=result["table"])
        protocol |= dict(report={}, variant=None)
    same = {flag: value for flag, value in protocol["flags"].items() if flag not in PLACE}
    same |= {key: protocol[key] for key in ("dataset", "variant", "world", "amp", "report")}
    same |= dict(classes=sorted(result["iou"]), split=result["split"])
    return json.dumps(same, sort_keys=True), result, protocol


def mean_and_sd(results, key):
    if not all(isinstance(r.get(key), (int, float)) for r in results):
        return ""
    values = torch.tensor([r[key] for r in results], dtype=torch.float64)
    spread = f" +/- {values.std():.4f}" if len(results) > 1 else ""
    return f"{values.mean():.4f}{spread}"


def summary(folders):
    # Markdown; runs that differ in no more than seed and place become one row, mean +/- sd
    groups, left_out = {}, []
    for folder in map(Path, folders):
        if not (folder / "protocol.json").exists():  # such as runs/data
            continue
        if not (folder / "results.json").exists():
            left_out.append(f"{folder}: not finished; go on with --resume {quote(str(folder))}")
            continue
        try:
            same, result, protocol = read_run(folder)
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            why = e if isinstance(e, BadInput) else repr(e)
            left_out.append(f"{folder}: its results cannot be read ({why})")
        else:
            groups.setdefault(same, []).append((folder.name, result, protocol))
    if not groups:
        raise BadInput(f"{folders[0]}: no results.json in these folders; name finished runs, such "
                       "as runs/*")
    head = ["run", "data", "split", "classes", "seeds", "mIoU", "mean F1", "OA", "majority mIoU",
            "also reported"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for group in groups.values():
        names, results, protocols = zip(*group)
        first, protocol = results[0], protocols[0]
        further = [f"{key.replace('_', ' ')}: mIoU {mean_and_sd(results, f'miou_{key}')}"
                   for key in protocol["report"]]
        scores = [mean_and_sd(results, key) for key in ("miou", "mf1", "oa", "majority_miou")]
        cells = [", ".join(names), protocol["dataset"], first["split"],
                 f"{first.get('classes_in_mean')} of {len(first['iou'])}",
                 ", ".join(str(r.get("seed")) for r in results), *scores, ", ".join(further)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *left_out])


# ---- --masks

def find_masks(folder, names):
    # -> {image name: mask}; predict.py names them below the folder that it was given, so all names
    # lack the same number of leading folders
    check_folder(folder)
    there = {}
    for file in walk(folder):
        if file.suffix.lower() == ".png":
            there[nfc(image_name(file.relative_to(folder)))] = file
    depth = max(name.count("/") for name in names)
    for cut in range(depth + 1):
        wanted = {name: without_folders(name, cut) for name in names}
        missing = [name for name in names if wanted[name] not in there]
        if not missing:
            break
    if missing:
        raise BadInput(f"{folder}/{missing[0]}.png: no such mask, nor {wanted[missing[0]]}.png; "
                       "expected one for every image of the split")
    if len(set(wanted.values())) < len(wanted):
        raise BadInput(f"{folder}: images of one name in several folders, and only one mask for "
                       f"them; name the masks like {names[0]}.png")
    return {name: there[key] for name, key in wanted.items()}


def without_folders(name, cut):
    # "a/b/c" without so many of its leading folders
    parts = name.split("/")
    return nfc("/".join(parts[min(cut, len(parts) - 1):]))


def mask_matrices(files, table, data, k):
    # (name, (k, k) confusion matrix) of this rank's masks
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for i in progress(range(rank, len(data), world), "masks"):
        name = data.names[i]
        y = torch.from_numpy(data.read(i)[1].copy()).long()
        pred = torch.from_numpy(table.load(files[name])).long()
        if pred.shape == y.shape:
            pred[y == IGNORE] = 0  # not counted: transparent pixels have no class in them
        if pred.shape != y.shape or (pred >= k).any():
            raise BadInput(f"{files[name]}: {tuple(pred.shape)} (H, W), ids up to {pred.max()}; "
                           f"expected {tuple(y.shape)} with a class everywhere")
        yield name, metrics.confusion(pred, y, k)


def open_data(args, meta, folder):
    # -> the data set with the model's classes in the model's order
    official = meta["source"] in public.SETS
    split_file = args.split_file
    own = folder / "split.json"
    if not split_file and own.exists() and not (args.root or args.variant):
        split_file = own
    variant = args.variant
    if official and not variant:
        variant = meta["variant"]
    d = Source(meta["source"] if official else "folder", args.root or meta["root"], variant,
               split_file, cache=args.cache, need=())
    d.reading = meta["reading"]  # in numbers, whatever dataset.json says by now
    here = {nfc(c["name"]): c for c in d.labels.classes}
    names = [nfc(c["name"]) for c in meta["classes"]]
    if set(here) != set(names):
        raise BadInput(f"{d.root}: the classes {', '.join(here)}; the model knows "
                       f"{', '.join(names)}")
    d.labels = Labels([here[name] for name in names], d.labels.ignore, d.labels.threshold)
    d.names = names
    if args.split in d.description.get("unlabelled", ()) and args.split not in d.splits:
        raise BadInput(f"{d.root}: no masks for {args.split}; predict it: python predict.py "
                       f"{args.run} IMAGES, with --label-out train or raw as the grader wants")
    if not d.splits.get(args.split):
        hint = ""
        if args.root or args.variant:
            hint = f", or --split-file {own} for that of training"
        raise BadInput(f"{d.root}: no split {args.split!r}; type --split with one of: "
                       f"{', '.join(d.splits)}{hint}")
    return d


def main(args):
    if args.summary:
        print(summary(args.summary))
        return
    rank, world, device = run.start()
    say = print if rank == 0 else lambda *words, **how: None

    # ---- data
    _, meta = load_weights(args.run, header_only=True)
    if meta.get("task") == "classification":
        raise BadInput(f"{args.run}: a run of train_cls.py, which has written its own "
                       f"results.json; type python predict.py {args.run} IMAGES for others")
    folder = Path(args.run)
    if not folder.is_dir():
        folder = folder.parent
    args.split = args.split or meta["reported"]
    d = open_data(args, meta, folder)
    K, names = len(d.names), d.splits[args.split]
    digest = d.about()["splits"][args.split]
    say(f"{len(names)} {args.split} images of {d.root}")
    for split in ("train", meta["chosen_on"]):
        if digest == meta["splits"].get(split):
            say(f"WARNING: the model's own {split} images")
    data = d.part(args.split, meta["norm"])

    # ---- one matrix
    amp = args.amp == "bf16"
    if args.amp == "auto":
        amp = meta["amp"] == "bf16" and run.fast_bf16(device)
    overlap = meta["overlap"] if args.overlap is None else args.overlap
    window = dict(crop=meta["crop"], overlap=overlap, batch=args.batch_size, amp=amp)
    if args.masks:
        files = find_masks(Path(args.masks), names)
        own_ids = Labels([dict(name=name, id=i) for i, name in enumerate(d.names)], [IGNORE])
        table = d.labels if args.mask_ids == "raw" else own_ids
        found = mask_matrices(files, table, data, K)
    else:
        net, _ = nets.load_run(args.run, args.weights)
        found = matrices(net.to(device), data, window, args.workers, what=args.split)
    at = {name: i for i, name in enumerate(names)}
    hard = torch.zeros(len(names), dtype=torch.int64, device=device)  # classes per image
    cm = torch.zeros(K, K, dtype=torch.int64, device=device)
    for name, one in found:
        cm += one.to(device)
        hard[at[name]] = int(samplers.hard_classes(one[None].cpu().numpy(), HARD_IOU)[0])
    run.over_ranks(cm)
    run.over_ranks(hard)
    if not cm.any():
        raise BadInput(f"{d.root}: every pixel of {args.split} is ignored; check \"ignore\" in "
                       "dataset.json")

    # ---- report
    if rank == 0:
        cm = cm.cpu()
        report = dict(split=args.split, **metrics.report(cm, d.names, meta["report"]))
        width = max(map(len, d.names))
        print(f"{'class':{width}}    IoU     F1   prec. recall   share")
        scores = torch.stack([metrics.iou(cm), metrics.f1(cm), metrics.precision(cm),
                              metrics.recall(cm)], dim=1)
        shares = cm.sum(1) / cm.sum()
        for name, row, share in zip(d.names, scores, shares):
            print(f"{name:{width}} " + " ".join(f"{v:6.3f}" for v in row) + f" {share:7.2%}")
        print(metrics.headline(report, meta["report"]))
        suffix = "-masks" if args.masks else ""
        out = Path(args.out or folder / f"eval-{args.split}{suffix}")
        protocol = dict(run=str(args.run), masks=args.masks, root=str(d.root), files=digest,
                        images=len(names), variant=d.description.get("variant"),
                        **meta["reading"], crop=meta["crop"], overlap=overlap,
                        amp="bf16" if amp else "off", tta="none")
        write(out / "eval.json", report | dict(protocol=protocol))
        title = f"{meta['dataset']} {args.split}"
        write(out / "confusion.png", plots.confusion(cm.numpy(), d.names, title))
        print(f"wrote {out}/eval.json and confusion.png")
        if args.difficulty:
            write(out / "difficulty.json", dict(zip(names, hard.tolist())))
            print(f"wrote {out}/difficulty.json, for train_kd.py --sampler weighted --difficulty "
                  f"{out}/difficulty.json")
    run.end()


if __name__ == "__main__":
    with run.one_line_errors():
        main(parse_args())
