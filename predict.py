"""Classify every pixel of images of any size: id mask, colour mask and overlay. Or whole images: a table.

    python predict.py runs/demo IMAGE_OR_FOLDER_OR_GLOB ... --out predictions
    python predict.py runs/demo scene.tif                 a GeoTIFF of any size, in flat memory
    python predict.py runs/demo D --label-out raw         ids or colours as in the training masks
    python predict.py runs/a D --with runs/b --tta d4     mean probability of two runs and eight views
    python predict.py runs/a --export model.onnx          for QGIS (Deepness) and WebODM (GeoDeep)
    python predict.py runs/eurosat-cnn D --montage 8      a run of train_cls.py: a table, and pictures

Writes OUT/NAME.png (ids in a palette PNG: opens in colour, reads back as ids), NAME_color.png,
NAME_overlay.jpg, classes.json and summary.json (area of every class); folders below an input folder
are kept. Of georeferenced images NAME.tif instead, a cloud-optimised GeoTIFF, with a style for QGIS,
NAME.qml. What is transparent or nodata in an image gets no class: 255. A file that cannot be read
is named and left out; exit code 2. Killed, the same command goes on where it stopped. Only files
are replaced that predict.py wrote and nobody has changed since. Of a classification run it writes
OUT/predictions.csv (file, class, probability, next classes) and montage.png.
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
from data.common import IGNORE, BadInput, Written, escaped, minutes, progress, read_json
from data.datasets import NORMS
from data.files import SUFFIXES, image_name, images_in, is_image, not_used, typed
from data.io import Labels, id_image, read_image
from data.raster import open_raster
from data.results import Finished, InMemory, areas, mark_of, qml, summary
from data.scenes import prepare, square
from data.strips import Strips
from data.tiff import Tiff, TiffWriter, remove_part
from models import ensemble, export, nets, run
from models.calibrate import read_temperature
from models.checkpoint import load_weights
from models.infer import panels, slide_rows
from models.run import COUNT, WHOLE, between

JPEG_SIDE = 60_000  # pixels; overlays of larger images are thinned: a JPEG has at most 65,535
LOOK_SIDE = 2048  # pixels; overlays of GeoTIFFs are thinned to that
SILENT = 10.0  # seconds between lines about one image


def parse_args(argv=None):
    p = run.Parser(__doc__)
    p.add_argument("run", help="run folder, or its best.safetensors")
    p.add_argument("inputs", nargs="*", help="images, folders (with sub-folders) or patterns")
    p.add_argument("--out", default="predictions", help="folder for the results")
    p.add_argument("--label-out", default="train", choices=["train", "raw"],
                   help="ids 0..K-1, or those of the masks")
    p.add_argument("--out-format", default="auto", choices=["auto", "png", "tif"],
                   help="auto: tif where the image is georeferenced")
    p.add_argument("--confidence", action="store_true",
                   help="also write the winner's probability times 255")
    p.add_argument("--probabilities", action="store_true",
                   help="also write a TIFF with a band per class, probability times 255")
    p.add_argument("--overwrite", action="store_true",
                   help="replace files of others, or changed by hand")
    p.add_argument("--tta", choices=list(ensemble.VIEWS),
                   help="average over views of every window: 4 flips, d4 8 turns, 3 scales")
    p.add_argument("--with", dest="partners", nargs="+", metavar="RUN",
                   help="average probabilities with these runs of the same classes")
    p.add_argument("--soup", nargs="+", metavar="RUN",
                   help="average weights with these runs of the same start")
    p.add_argument("--export", metavar="FILE.onnx",
                   help="write the network for QGIS' Deepness and GeoDeep, predict nothing")
    p.add_argument("--resolution", type=between(0.01, 1e6),
                   help="cm per pixel of the training images, for --export (by their georeference)")
    p.add_argument("--overlap", type=between(0, 0.9),
                   help="of windows, as a part of the crop (as in training)")
    p.add_argument("--weights", help="backbone of a run saved with --save head (as in training)")
    p.add_argument("--amp", default="auto", choices=["auto", "bf16", "off"],
                   help="auto: as trained, where fast")
    p.add_argument("--batch-size", type=COUNT, default=16, help="windows or images at once")
    p.add_argument("--top", type=COUNT, default=3, help="classes per image in predictions.csv")
    p.add_argument("--montage", type=WHOLE, default=0,
                   help="images per class in montage.png, the surest first; 0 = none")
    args = p.parse_args(argv)
    if not args.inputs and not args.export:
        p.error("no images: name them behind the run and before flags such as --with")
    if args.export and (args.inputs or args.partners or args.tta):
        p.error("--export writes one network and predicts nothing; leave images, --with and --tta out")
    if args.resolution and not args.export:
        p.error("--resolution goes with --export; leave it out")
    return args


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

def endings(file, args, by_color):
    # what is written of an image, behind NAME; of one that cannot be read nothing is known yet
    as_tif = args.out_format == "tif"
    if args.out_format == "auto":
        try:
            as_tif = open_raster(file).georef is not None
        except BadInput:
            return []
    found = [".png", "_color.png", "_overlay.jpg"]
    if as_tif:
        found = [".tif", "_overlay.jpg"]
        # Three bands of colours need no style.
        if args.label_out == "train" or not by_color:
            found.append(".qml")
    if args.confidence:
        found.append("_confidence.tif" if as_tif else "_confidence.png")
    if args.probabilities:
        found.append("_probabilities.tif")
    return found


def check_outputs(out, written, images, ends, values):
    # Nothing is overwritten but results of the same classes that nobody has changed.
    for name, n in Counter(images.values()).items():
        if n > 1:
            a, b, *_ = [file for file in images if images[file] == name]
            raise BadInput(f"{a} and {b}: both would become {name}.png; predict them into two "
                           "folders")
    names = ["summary.json"]
    for file, name in images.items():
        names += [f"{name}{end}" for end in ends[file]]
    outputs = [(out / name).resolve() for name in names]
    clash = {file.resolve() for file in images} & set(outputs)
    if clash:
        raise BadInput(f"{out}: results would overwrite {min(clash)}; name another --out, or the "
                       "images without earlier results")
    twice = [file for file, n in Counter(outputs).items() if n > 1]
    if twice:
        raise BadInput(f"{out}: results would overwrite each other ({twice[0].name}); name another "
                       "--out, or the images without earlier results")
    listing = out / "classes.json"
    if listing.exists() and not written.overwrite:
        try:
            same = read_json(listing, list) == values
        except BadInput:
            same = False
        if not same:
            raise BadInput(f"{listing}: of other classes or --label-out than this run's; name "
                           "another --out, or type --overwrite")
    written.check(names)


def mask_image(ids, labels, label_out):
    # class ids (H, W) -> palette image of ids, or RGB image of the masks' own colours
    if label_out == "train":
        return id_image(ids, labels.colors)
    raw = labels.decode(ids)
    if raw.ndim == 3 or raw.dtype != np.uint8:  # colours, or ids above 255, for which no palette is
        return Image.fromarray(raw)
    return id_image(raw, palette(labels, label_out))


def palette(labels, label_out):
    # (n, 3) colours of the values that a mask holds
    if label_out == "train":
        return labels.colors
    colors = np.zeros((256, 3), np.uint8)
    colors[labels.raw] = labels.colors
    return colors


def open_writers(scene, place, ends, args, labels, info, mark):
    # {"ids", "confidence", "probabilities": what takes the pixels}; TIFFs go on with what is there
    H, W = scene.shape
    K = len(labels.names)
    geo = dict(georef=scene.georef, resume=mark)
    writers = {}
    if ".png" in ends:
        writers["ids"] = InMemory((H, W))
    elif args.label_out == "train":
        writers["ids"] = TiffWriter(f"{place}.tif", (H, W, 1), labels.colors, IGNORE, info, **geo)
    else:
        value = labels.decode(np.zeros((1, 1), np.uint8))
        bands = value.size
        colors = palette(labels, "raw") if bands == 1 and value.dtype == np.uint8 else None
        nodata = labels.void if bands == 1 else None
        writers["ids"] = TiffWriter(f"{place}.tif", (H, W, bands), colors, nodata, info,
                                    dtype=value.dtype, **geo)
    if "_confidence.png" in ends:
        writers["confidence"] = InMemory((H, W))
    elif args.confidence:
        # Of K classes the winner has at least 1 / K: 0 is free for nodata.
        writers["confidence"] = TiffWriter(f"{place}_confidence.tif", (H, W, 1), nodata=0,
                                           info=info, **geo)
    if args.probabilities:
        writers["probabilities"] = TiffWriter(f"{place}_probabilities.tif", (H, W, K), info=info,
                                              bands=labels.names, **geo)
    return writers


def predict_scene(net, scene, writers, window, norm, labels, raw, temperature, say):
    # Rows of windows from top to bottom, in columns that fit into memory.
    K = len(labels.names)
    H, W = scene.shape
    start = shown = time.time()
    columns = [(0, W, 0, W)]
    if scene.is_tiff:
        columns = panels(W, window["crop"], window["overlap"], K)
    for left, width, x0, wide in columns:
        first = min(writer.done(left, width) for writer in writers.values())
        for writer in writers.values():
            writer.start(left, width, first)
        scene.columns(x0, wide)
        inner = slice(left - x0, left - x0 + width)
        for strip in slide_rows(net, scene.read, (H, wide), norm, **window, first=first,
                                skip_empty=scene.is_tiff):
            ids = strip.ids()[:, inner]
            if raw and labels.void is None and (ids == IGNORE).any():
                raise BadInput(f"{scene.path}: transparent pixels, and no value of the masks means "
                               "no class; type --label-out train, which writes 255 there")
            as_stored = isinstance(writers["ids"], TiffWriter) and raw
            writers["ids"].append(labels.decode(ids) if as_stored else ids)
            if len(writers) > 1:
                for p in strip.probabilities(K, temperature):
                    if "confidence" in writers:
                        writers["confidence"].append(p[:, inner].max(-1))
                    if "probabilities" in writers:
                        writers["probabilities"].append(p[:, inner])
            if time.time() - shown > SILENT:
                shown = time.time()
                rows = strip.top + len(ids)
                rest = minutes((shown - start) * ((H - first) / max(rows - first, 1) - 1))
                say(f"row {rows} of {H}, columns {left} to {left + width}  ETA of these {rest}")


def write_scene(written, name, scene, writers, ends, labels, args):
    # The files of an image whose pixels are complete -> pixels of every id, (256,).
    raw = args.label_out == "raw"
    H, W = scene.shape
    as_tif = ".tif" in ends
    n = -(-max(H, W) // (LOOK_SIDE if as_tif else JPEG_SIDE))  # the overlay has every n-th pixel
    if as_tif:
        written.replace(f"{name}.tif", writers["ids"].save)
        counts, small = read_back(written.folder / f"{name}.tif", labels, raw, n)
    else:
        ids = writers["ids"].pixels
        counts, small = np.bincount(ids.ravel(), minlength=256), ids[::n, ::n]
        written.write(f"{name}.png", mask_image(ids, labels, args.label_out))
        written.write(f"{name}_color.png", Image.fromarray(plots.colorize(ids, labels.colors)))
    if ".qml" in ends:
        values = labels.raw.tolist() if raw else range(len(labels.names))
        written.write(f"{name}.qml", qml(labels.names, values, labels.colors))
    for kind in ("confidence", "probabilities"):
        if f"_{kind}.tif" in ends:
            written.replace(f"{name}_{kind}.tif", writers[kind].save)
        elif kind in writers:
            written.write(f"{name}_{kind}.png", Image.fromarray(writers[kind].pixels))
    look = plots.quick_look(scene.thinned(n), small, labels.names, labels.colors)
    written.write(f"{name}_overlay.jpg", look, quality=90)
    return counts


def read_back(file, labels, raw, n):
    # A mask -> how many pixels of every id, (256,), and every n-th pixel as ids.
    tiff = Tiff(file)
    H, W = tiff.shape[:2]
    rows = tiff.block[0]
    counts, parts = np.zeros(256, np.int64), []
    for top in range(0, H, rows):
        pixels = tiff.read((top, 0, min(rows, H - top), W))
        ids = labels.encode(pixels) if raw else pixels[..., 0]
        counts += np.bincount(ids.ravel(), minlength=256)
        parts.append(ids[-top % n::n, ::n])
    return counts, np.concatenate(parts)


def predict_masks(args, images, rank, world, device):
    # -> files left out by this rank
    say = print if rank == 0 else lambda *words, **how: None
    meta = load_weights(args.run, header_only=True)[1]
    labels, out = Labels.of(meta), Path(args.out)
    raw = args.label_out == "raw"
    values = []
    for i, c in enumerate(labels.classes):
        own = c["color"] if labels.by_color else int(labels.raw[i])
        values.append(dict(value=own if raw else i, train_id=i, **c))
    ends = {file: endings(file, args, labels.by_color) for file in images}
    written = Written(out, args.overwrite)
    check_outputs(out, written, images, ends, values)

    # ---- network
    several = dict(partners=args.partners, soup=args.soup, tta=args.tta)
    net, meta = ensemble.load_runs(args.run, args.weights, **several)
    net.to(device)
    weights = ensemble.identity(args.run, **several)
    overlap = meta["overlap"] if args.overlap is None else args.overlap
    window = dict(crop=meta["crop"], overlap=overlap, batch=args.batch_size,
                  amp=use_bf16(args, meta, device))
    temperature = None
    if args.confidence or args.probabilities:
        temperature = read_temperature(Path(args.run), weights)
        if temperature is None:
            say("note: no calibration.json of these weights: probabilities as the network says")
    info = dict(MODEL=nets.name_of(meta["model"]), WEIGHTS_SHA256=weights,
                CLASSES=", ".join(f"{v['value']} {v['name']}" for v in values))
    for flag, value in ensemble.about(**several).items():
        info[flag.upper()] = value
    settings = dict(info, window=window, reading=meta["reading"], norm=meta["norm"], values=values,
                    temperature=temperature, device=device.type)
    run.wait()  # what another rank writes from here on is no old file
    finished = Finished(out)
    if rank == 0 and (args.overwrite or not (out / "classes.json").exists()):
        written.write("classes.json", values)

    # ---- one image after the other
    marks = {file: mark_of(settings | dict(files=ends[file]), file) for file in images}
    mine = list(images.items())[rank::world]
    left_out, began, old = [], time.time(), 0
    for i, (file, name) in enumerate(mine):
        mark, place, writers = marks[file], out / name, {}
        names = [f"{name}{end}" for end in ends[file]]
        if finished.find(name, mark):
            old += 1
            for end in ends[file]:
                remove_part(f"{place}{end}")  # of a call that was killed just before it did that
            continue
        try:
            scene = Strips(file, **meta["reading"])
            writers = open_writers(scene, place, ends[file], args, labels, info, mark)
            predict_scene(net, scene, writers, window, meta["norm"], labels, raw,
                          temperature or 1.0, lambda text: say(f"{escaped(name)}  {text}", flush=True))
        except BadInput as e:
            leave_out(e)
            left_out.append(file)
            for writer in writers.values():
                writer.discard()
            continue
        counts = write_scene(written, name, scene, writers, ends[file], labels, args)
        finished.add(name, mark, names, areas(counts, scene.georef))
        for writer in writers.values():
            writer.discard()
        rest = minutes((time.time() - began) / (i + 1) * (len(mine) - i - 1))
        size = f"{scene.shape[0]} x {scene.shape[1]}"
        say(f"{i + 1} of {len(mine)}  {escaped(name)}  {size}  ETA {rest}", flush=True)

    # ---- areas of all images
    numbers = run.over_ranks(torch.tensor([len(mine) - len(left_out), old], device=device))
    if rank == 0:
        found = Finished(out).rows
        facts = {}
        for file, name in images.items():
            if name in found and found[name]["mark"] == marks[file]:
                facts[name] = found[name]["facts"]
        written.write("summary.json", summary(facts, labels.names))
    count, old = numbers.tolist()
    kinds = {}
    for found in ends.values():
        kinds |= dict.fromkeys(found)
    kinds = ", ".join(f"NAME{end}" for end in kinds)
    note = f" ({old} of them by an earlier call)" if old else ""
    say(f"wrote the masks of {count} images{note} to {out}/: {kinds}, summary.json")
    return left_out


# ---- whole images: a table

def predict_table(args, images, rank, world, device):
    # -> files left out by this rank
    net, meta = nets.load_run(args.run, args.weights, "classification")
    net.to(device)
    names, out = [c["name"] for c in meta["classes"]], Path(args.out)
    amp = use_bf16(args, meta, device)
    montage = out / "montage.png"
    written = Written(out, args.overwrite)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)  # fails now, not after the last image
        written.check(["predictions.csv", "montage.png"] if args.montage else ["predictions.csv"])
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
    written.write("predictions.csv", text.getvalue())
    if args.montage:
        sections = []
        for c in names:
            found = sorted((row for row in rows if row[2][0] == c), key=lambda row: -row[1][0])
            cards = [(load(file), [Path(file).name, f"{ps[0]:.3f}"], False)
                     for file, ps, _ in found[:args.montage]]
            sections.append((f"{c}: {len(found)} images", cards))
        written.write("montage.png", plots.cards(sections))
    more = " and montage.png" if args.montage else ""
    print(f"wrote {out}/predictions.csv{more}: {len(rows)} images, {speed:.0f} images/s on {device}, reading included")
    return left_out


# ---- for other programs

def export_run(args):
    path = Path(args.export)
    if path.suffix.lower() != ".onnx":
        raise BadInput(f"--export {path}: expected a name that ends in .onnx")
    written = Written(path.parent, args.overwrite)
    written.check([path.name])
    net, meta = ensemble.load_runs(args.run, args.weights, soup=args.soup)
    resolution = args.resolution or export.training_resolution(meta)
    if resolution is None:
        raise BadInput(f"--export {path}: how large a pixel is does not stand in the training images; "
                       "type --resolution 30 if one is 30 cm wide: maps will be resampled to that")
    content, compared = export.to_onnx(net, meta, resolution)
    written.write(path.name, content)
    S = meta["crop"]
    print(f"wrote {path}: {nets.name_of(meta['model'])}, 1 x 3 x {S} x {S} pixels of "
          f"{resolution:g} cm, divided by 255 -> probabilities of {len(meta['classes'])} classes")
    if any(meta["reading"].values()):
        print(f"note: trained on images read with {ensemble.as_words(meta['reading'])}; a map must "
              "show the same bands in the same range")
    if compared is None:
        print("note: not compared with the network; pip install onnxruntime, and type it again")
    else:
        print(f"compared in onnxruntime: probabilities differ by at most {compared['difference']:.1e}, "
              f"{compared['same']:.2%} of the pixels have the same class")


def main(args):
    rank, world, device = run.start()
    task = load_weights(args.run, header_only=True)[1].get("task")
    if task == "classification" and (args.export or args.tta or args.partners or args.soup):
        raise BadInput(f"{args.run}: a run of train_cls.py; --export, --tta, --with and --soup are "
                       "for segmentation: leave them out")
    if args.export:
        if rank == 0:
            export_run(args)
        run.end()
        return
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
