"""Classify every pixel of images of any size: id mask, colour mask and overlay. Or whole images: a table.

    python predict.py runs/demo IMAGE_OR_FOLDER_OR_GLOB ... --out predictions
    python predict.py runs/demo D --label-out raw         ids or colours as in the training masks
    python predict.py runs/eurosat-cnn D --montage 8      a run of train_cls.py: a table, and pictures

Writes OUT/NAME.png (ids in a palette PNG: opens in colour, reads back as ids), NAME_color.png,
NAME_overlay.jpg and classes.json; sub-folders of an input folder are kept. What is transparent in an
image gets no class: 255. A file that cannot be read is named and left out; exit code 2. Needs about
12 bytes of memory per pixel of 8-bit images (tests/bench_predict.py). Of a classification run it
writes OUT/predictions.csv (file, class, probability, next classes) and montage.png.
"""
import csv
import io
import os
import sys
import time
from collections import Counter
from pathlib import Path

# Read when torch loads: threads that spin while they wait cost sixfold on a shared CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from data import plots
from data.common import IGNORE, BadInput, escaped, minutes, progress, read_json, write
from data.datasets import NORMS
from data.files import SUFFIXES, image_name, images_in, is_image, not_used, typed
from data.io import Labels, id_image, read_image, read_valid
from data.scenes import prepare, square
from models import nets, run
from models.checkpoint import load_weights
from models.infer import slide_rows
from models.run import COUNT, WHOLE, between

ENDINGS = ".png", "_color.png", "_overlay.jpg"  # what is written of NAME
JPEG_SIDE = 65_000  # pixels; overlays of larger images are thinned, a JPEG has at most 65,535
SILENT = 10.0  # seconds between lines about one image


def parse_args(argv=None):
    p = run.Parser(__doc__)
    p.add_argument("run", help="run folder, or its best.safetensors")
    p.add_argument("inputs", nargs="+", help="images, folders (with sub-folders) or patterns")
    p.add_argument("--out", default="predictions", help="folder for the results")
    p.add_argument("--label-out", default="train", choices=["train", "raw"],
                   help="ids 0..K-1, or those of the masks")
    p.add_argument("--overlap", type=between(0, 0.9),
                   help="of windows, as a part of the crop (as in training)")
    p.add_argument("--weights", help="backbone of a run saved with --save head (as in training)")
    p.add_argument("--amp", default="auto", choices=["auto", "bf16", "off"],
                   help="auto: as trained, where fast")
    p.add_argument("--batch-size", type=COUNT, default=16, help="windows or images at once")
    p.add_argument("--top", type=COUNT, default=3, help="classes per image in predictions.csv")
    p.add_argument("--montage", type=WHOLE, default=0,
                   help="images per class in montage.png, the surest first; 0 = none")
    return p.parse_args(argv)


def find_images(inputs):
    # -> {file: name below --out}, of folders with their sub-folders; other files in them
    found, others = {}, []
    for word in inputs:
        paths = typed(word)
        if not paths:
            raise BadInput(f"{word}: no such file or folder, and nothing fits it as a pattern")
        here = {}
        for path in paths:
            if path.is_dir():
                images, more = images_in(path)
                others += more
                here |= {file: file.relative_to(path) for file in images}
            elif is_image(path) or str(path) == word:
                here[path] = Path(path.name)
            else:
                others.append(path)
        if not here:
            what = f"; {not_used(others)}" if others else ""
            raise BadInput(f"{word}: no image there ({' '.join(SUFFIXES)}){what}")
        for file, name in here.items():
            found.setdefault(file, image_name(name))
    return found, others


def leave_out(e):
    # The flags of reading are the run's.
    hint = ""
    if "--bands" in str(e) or "--input-range" in str(e):
        hint = " - in training; this file must be as those were"
    print(f"left out: {escaped(str(e))}{hint}", file=sys.stderr)


def use_bf16(args, meta, device):
    return args.amp == "bf16" or (
        args.amp == "auto" and meta["amp"] == "bf16" and run.fast_bf16(device))


# ---- every pixel: masks

def check_outputs(out, images, values):
    # Nothing is overwritten but results of the same classes.
    for name, n in Counter(images.values()).items():
        if n > 1:
            a, b, *_ = [file for file in images if images[file] == name]
            raise BadInput(f"{a} and {b}: both would become {name}.png; predict them into two "
                           "folders")
    outputs = [(out / f"{name}{end}").resolve() for name in images.values() for end in ENDINGS]
    clash = {file.resolve() for file in images} & set(outputs)
    if clash:
        raise BadInput(f"{out}: results would overwrite {min(clash)}; name another --out, or the "
                       "images without earlier results")
    twice = [file for file, n in Counter(outputs).items() if n > 1]
    if twice:
        raise BadInput(f"{out}: results would overwrite each other ({twice[0].name}); name another "
                       "--out, or the images without earlier results")
    listing = out / "classes.json"
    if not listing.exists():
        there = [file for file in outputs if file.exists()]
        if there:
            raise BadInput(f"{there[0]}: would be overwritten, and predict.py has not written it; "
                           "name another --out")
        return
    try:
        same = read_json(listing, list) == values
    except BadInput:
        same = False
    if not same:
        raise BadInput(f"{listing}: of other classes or --label-out than this run's; name another "
                       "--out")


def mask_image(ids, labels, label_out):
    # class ids (H, W) -> palette image of ids, or RGB image of the masks' own colours
    if label_out == "train":
        return id_image(ids, labels.colors)
    raw = labels.decode(ids)
    if raw.ndim == 3 or raw.dtype != np.uint8:  # colours, or ids above 255, for which no palette is
        return Image.fromarray(raw)
    colors = np.zeros((256, 3), np.uint8)
    colors[labels.raw] = labels.colors
    return id_image(raw, colors)


def predict_masks(args, images, rank, world, device):
    # -> files left out by this rank
    say = print if rank == 0 else lambda *words, **how: None
    net, meta = nets.load_run(args.run, args.weights)
    net.to(device)
    labels, out = Labels.of(meta), Path(args.out)
    amp = use_bf16(args, meta, device)
    overlap = meta["overlap"] if args.overlap is None else args.overlap
    values = []
    for i, c in enumerate(labels.classes):
        raw = c["color"] if labels.by_color else int(labels.raw[i])
        value = raw if args.label_out == "raw" else i
        values.append(dict(value=value, train_id=i, **c))
    check_outputs(out, images, values)
    run.wait()  # what another rank writes from here on is no old file
    if rank == 0:
        write(out / "classes.json", values)

    mine = list(images.items())[rank::world]
    left_out, began = [], time.time()
    for i, (file, name) in enumerate(mine):
        try:
            image, valid = read_valid(file, **meta["reading"])
            holes = valid is not None and not valid.all()
            if holes and args.label_out == "raw" and labels.void is None:
                raise BadInput(f"{file}: transparent pixels, and no value of the masks means no "
                               "class; type --label-out train, which writes 255 there")
        except BadInput as e:
            leave_out(e)
            left_out.append(file)
            continue

        start = shown = time.time()
        for ids, rows in slide_rows(net, image, meta["norm"], meta["crop"], overlap,
                                    args.batch_size, amp):  # complete after the last turn
            if time.time() - shown > SILENT:
                shown = time.time()
                rest = minutes((shown - start) * (len(image) / rows - 1))
                say(f"{name}  row {rows} of {len(image)}  ETA of this image {rest}", flush=True)
        if valid is not None:
            ids[~valid] = IGNORE

        write(out / f"{name}.png", mask_image(ids, labels, args.label_out))
        write(out / f"{name}_color.png", Image.fromarray(plots.colorize(ids, labels.colors)))
        n = -(-max(ids.shape) // JPEG_SIDE)  # every n-th pixel
        blend = plots.overlay(image[::n, ::n], ids[::n, ::n], labels.colors)
        write(out / f"{name}_overlay.jpg", Image.fromarray(blend), quality=90)
        rest = minutes((time.time() - began) / (i + 1) * (len(mine) - i - 1))
        say(f"{i + 1} of {len(mine)}  {escaped(name)}  {image.shape[0]} x {image.shape[1]}  ETA {rest}",
            flush=True)
    count = run.over_ranks(torch.tensor(len(mine) - len(left_out), device=device))
    say(f"wrote the masks of {count} images to {out}/: NAME.png, NAME_color.png, NAME_overlay.jpg")
    return left_out


# ---- whole images: a table

def predict_table(args, images, rank, world, device):
    # -> files left out by this rank
    net, meta = nets.load_run(args.run, args.weights, "classification")
    net.to(device)
    names, out = [c["name"] for c in meta["classes"]], Path(args.out)
    amp = use_bf16(args, meta, device)
    listing, montage = out / "predictions.csv", out / "montage.png"
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)  # fails now, not after the last image
        ours = listing.exists() and listing.read_bytes().startswith(b"file,class_1,")
        for file in (listing, montage):
            if file.exists() and not ours:
                raise BadInput(f"{file}: would be overwritten, and predict.py has not written it; "
                               "name another --out")
    files = [file for file in images if file.resolve() != montage.resolve()]
    mine = files[rank::world]
    rows, left_out, began = [], [], time.time()  # rows: file, probabilities, classes, both falling

    def load(file):
        return square(read_image(file, **meta["reading"]), meta["stored"])

    for i in progress(range(0, len(mine), args.batch_size), "batches of images"):
        read, images = [], []
        for file in mine[i:i + args.batch_size]:
            try:
                images.append(load(file))
                read.append(str(file))
            except BadInput as e:
                leave_out(e)
                left_out.append(str(file))
        if not read:
            continue
        x = prepare(torch.from_numpy(np.stack(images)).to(device), NORMS[meta["norm"]],
                    meta["size"])
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = net(x)
        p, order = logits.float().softmax(1).cpu().sort(dim=1, descending=True)
        for file, ps, cs in zip(read, p.tolist(), order.tolist()):
            rows.append((file, ps, [names[c] for c in cs]))
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, rows)
        rows = sorted((row for part in parts for row in part), key=lambda row: row[0])
    if rank > 0:
        return left_out

    top = min(args.top, len(names))
    header = ["file"]
    for i in range(top):
        header += [f"class_{i + 1}", f"probability_{i + 1}"]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    for file, ps, cs in rows:
        cells = [file]
        for c, p in zip(cs[:top], ps):
            cells += [c, f"{p:.4f}"]
        table.writerow(cells)
    speed = len(rows) / (time.time() - began)
    write(listing, text.getvalue())
    if args.montage:
        sections = []
        for c in names:
            found = sorted((row for row in rows if row[2][0] == c), key=lambda row: -row[1][0])
            cards = [(load(file), [Path(file).name, f"{ps[0]:.3f}"], False)
                     for file, ps, _ in found[:args.montage]]
            sections.append((f"{c}: {len(found)} images", cards))
        write(montage, plots.cards(sections))
    print(f"wrote {listing}{' and montage.png' if args.montage else ''}: {len(rows)} images, "
          f"{speed:.0f} images/s on {device}, reading included")
    return left_out


def main(args):
    rank, world, device = run.start()
    task = load_weights(args.run, header_only=True)[1].get("task")
    predict = predict_table if task == "classification" else predict_masks
    images, others = find_images(args.inputs)
    if others and rank == 0:
        print(f"note: {not_used(others)}")
    left_out = predict(args, images, rank, world, device)
    run.end()
    if left_out:
        sys.exit(2)


if __name__ == "__main__":
    with run.one_line_errors():
        main(parse_args())
