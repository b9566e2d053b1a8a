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
is named and left out; exit code 2, under torchrun 1. Killed, the same command goes on where it
stopped. Only files are replaced that predict.py wrote and nobody has changed since. Of a
classification run it writes OUT/predictions.csv (file, class, probability, next classes) and
montage.png.
"""
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

# Read when torch loads: threads that spin while they wait cost sixfold on a shared CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image
from torch import nn

from data import plots
from data.common import IGNORE, SILENT, BadInput, Written, csv_text, escaped, minutes, progress
from data.datasets import NORMS
from data.files import SUFFIXES, image_name, images_in, is_image, not_used, torn, typed
from data.io import Labels, read_image
from data.raster import CONVERT, check_kind, open_raster
from data.results import (
    Finished, area_summary, areas, check_outputs, class_values, found_masks, mark_of, mask_image,
    open_writers, qml, read_back)
from data.scenes import prepare, square
from data.strips import Strips
from data.tiff import TiffWriter, remove_part
from models import ensemble, export, nets, run
from models.calibrate import read_temperature
from models.checkpoint import load_weights, weights_file
from models.compiled import Compiled, compiled
from models.infer import panels, slide_rows
from models.run import COUNT, WHOLE, between

# Overlays of larger images have every n-th pixel only. A JPEG has at most 65,535 a side; that of a
# GeoTIFF is for a quick look.
JPEG_SIDE = 60_000
LOOK_SIDE = 2048

# What --export asks of a run, and the flags that only one kind of runs can follow.
FOR_EXPORT = ("run", "export", "soup", "weights", "resolution", "overwrite")
FOR_MASKS = ("label_out", "out_format", "confidence", "probabilities", "tta", "partners", "soup",
             "export", "overlap", "compile")
FOR_TABLES = ("top", "montage")
FOR_TRAINING = ("--bands", "--input-range")  # which messages about images may name


def parse_args(argv=None):
    p = run.Parser(__doc__)
    p.add_argument("run", help="run folder, or its best.safetensors")
    p.add_argument("inputs", nargs="*", metavar="images",
                   help="images, folders (with sub-folders) or patterns")
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
                   help="auto: as trained, where fast; off: fp32, without TF32")
    p.add_argument("--device", type=run.device_name, default="auto",
                   help="cpu, cuda or cuda:1; auto: a GPU if there is one")
    p.add_argument("--batch-size", type=COUNT, default=16, help="windows or images at once")
    p.add_argument("--compile", action="store_true",
                   help="compile the network first and say what that saves, for hours on a CPU")
    p.add_argument("--top", type=COUNT, default=3, help="classes per image in predictions.csv")
    p.add_argument("--montage", type=WHOLE, default=0,
                   help="images per class in montage.png, the surest first; 0 = none")
    args = p.parse_args(argv)
    if args.export:
        p.only(args, "--export writes one network and predicts nothing", FOR_EXPORT)
    elif args.resolution:
        p.error("--resolution goes with --export; leave it out")
    elif not args.inputs:
        p.error("no images: name them behind the run and before flags such as --with")
    if args.compile and (args.partners or args.tta):
        p.error("--compile is for one network that predicts; leave --with and --tta out")
    args.typed = p.typed(args)
    return args


def find_images(inputs):
    # -> {file: name below --out}, and what else lies in the folders
    found, others = {}, []
    for i, word in enumerate(inputs):
        paths = typed(word)
        if not paths:
            raise BadInput(f"{word}: no such file or folder, and nothing fits it as a pattern"
                           f"{torn(inputs[i:])}")
        here = {}
        for path in paths:
            if path.is_dir():
                images, no_images = images_in(path)
                others += no_images
                here |= {file: file.relative_to(path) for file in images}
            elif is_image(path) or path == Path(word):
                # A file that was named is an image, whatever its ending; one that fits a pattern
                # only if it ends like one.
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
    # -> what was said. The images still to come are predicted all the same.
    message = str(e)
    print(f"left out: {escaped(message.removesuffix(f': {CONVERT}'))}", file=sys.stderr)
    return message


def last_advice(messages):
    # Once for all files that were left out: it is long.
    if any(words in message for message in messages for words in (CONVERT, *FOR_TRAINING)):
        print(f"files that differ from those of training: {CONVERT} ({' and '.join(FOR_TRAINING)} "
              "are for training)", file=sys.stderr)


# ---- every pixel: masks

class Predictor(NamedTuple):
    # What every image is predicted with.
    net: nn.Module
    meta: dict  # the run's header
    window: dict  # crop, overlap, batch and amp of slide_rows()
    temperature: float | None  # of a calibrated run, for probabilities
    labels: Labels
    raw: bool  # masks hold the values of the training masks, not 0..K-1
    about: dict  # of a mask, for summary.json: what its values mean, and the weights
    info: dict  # for the TIFFs' metadata


def open_predictor(args, labels, values, device):
    # values: class_values(), which the TIFFs carry along
    runs = dict(partners=args.partners, soup=args.soup, tta=args.tta)
    net, meta = ensemble.load_runs(args.run, args.weights, **runs)
    net.to(device)
    weights = ensemble.identity(args.run, **runs)
    overlap = meta["overlap"] if args.overlap is None else args.overlap
    amp = run.use_bf16(args.amp, meta["amp"], device)
    window = dict(crop=meta["crop"], overlap=overlap, batch=args.batch_size, amp=amp)
    temperature = None
    if args.confidence or args.probabilities:
        temperature = read_temperature(Path(args.run), weights)
    info = dict(MODEL=nets.name_of(meta["model"]), WEIGHTS_SHA256=weights,
                CLASSES=", ".join(f"{v['value']} {v['name']}" for v in values))
    for flag, value in ensemble.about(**runs).items():
        info[flag.upper()] = value
    about = dict(values=values, weights=weights)
    return Predictor(net, meta, window, temperature, labels, args.label_out == "raw", about, info)


def no_temperature(args):
    # The note where probabilities stay as they are.
    advice = f"python eval.py {args.run} --split val --calibrate fits them"
    if args.tta or args.partners or args.soup:
        advice = "a calibration.json is of one run as it is"
    return f"note: no temperature of these weights: probabilities as the network says; {advice}"


def endings(file, args, by_color):
    # What is written of an image, behind NAME. Of one that cannot be read nothing is known yet.
    as_tif = args.out_format == "tif"
    if args.out_format == "auto":
        try:
            as_tif = open_raster(file).placed
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


def predict_rows(p, scene, writers, say):
    # Rows of windows from top to bottom, in columns that fit into memory.
    K = len(p.labels.names)
    H, W = scene.shape
    shown = time.time()
    columns = [(0, W, 0, W)]
    if scene.is_tiff:
        columns = panels(W, p.window["crop"], p.window["overlap"], K)
    for left, width, read_left, read_width in columns:
        start = time.time()
        # A call that was killed may have written more rows of one file than of another.
        first = min(writer.done(left, width) for writer in writers.values())
        if first:
            say(f"goes on at row {first}, which an earlier call has come to")
        for writer in writers.values():
            writer.start(left, width, first)
        # Windows reach beyond the columns that they are computed for.
        scene.columns(read_left, read_width)
        inner = slice(left - read_left, left - read_left + width)
        for rows in slide_rows(p.net, scene.read, (H, read_width), p.meta["norm"], **p.window,
                               first=first, skip_empty=scene.is_tiff):
            ids = rows.ids()[:, inner]
            append_rows(p, scene, writers, rows, ids, inner)
            if time.time() - shown > SILENT:
                shown = time.time()
                bottom = rows.top + len(ids)
                rest = minutes((shown - start) * ((H - first) / max(bottom - first, 1) - 1))
                say(f"row {bottom} of {H}, columns {left} to {left + width}  ETA of these {rest}")


def append_rows(p, scene, writers, rows, ids, inner):
    # inner: the columns of `rows` that are written; ids: their classes
    if p.raw and p.labels.void is None and (ids == IGNORE).any():
        raise BadInput(f"{scene.path}: transparent pixels, and no value of the masks means "
                       "no class; type --label-out train, which writes 255 there")
    # A TIFF is written as it goes; a picture is coded as a whole, in mask_image().
    as_stored = p.raw and isinstance(writers["ids"], TiffWriter)
    writers["ids"].append(p.labels.decode(ids) if as_stored else ids)
    if len(writers) == 1:
        return
    for part in rows.probabilities(len(p.labels.names), p.temperature or 1.0):
        if "confidence" in writers:
            writers["confidence"].append(part[:, inner].max(-1))
        if "probabilities" in writers:
            writers["probabilities"].append(part[:, inner])


def predict_scene(p, written, finished, name, scene, ends, mark, say):
    # All files of one image.
    out = written.folder / name
    writers = open_writers(scene, out, ends, p.labels, p.raw, p.info, mark)
    if any(writer.begun_again for writer in writers.values()):
        print(f"note: {escaped(str(out))}: begun by a call with other settings, or before the image "
              "changed, and not finished; begun again", file=sys.stderr)
    try:
        predict_rows(p, scene, writers, lambda row: say(f"{escaped(name)}  {row}", flush=True))
    except BadInput:
        # It cannot be finished, so its tiles are of no use.
        for writer in writers.values():
            writer.discard()
        raise
    counts = write_files(p, written, name, scene, writers, ends)
    digests = {f"{name}{end}": written.digests[f"{name}{end}"] for end in ends}
    finished.add(name, mark, digests, areas(counts, scene.georef) | p.about)
    for writer in writers.values():
        writer.discard()


def write_files(p, written, name, scene, writers, ends):
    # The files of an image whose pixels are complete -> pixels of every id, (256,).
    labels = p.labels
    as_tif = ".tif" in ends
    n = -(-max(scene.shape) // (LOOK_SIDE if as_tif else JPEG_SIDE))
    if as_tif:
        written.replace(f"{name}.tif", writers["ids"].save)
        counts, thinned = read_back(written.folder / f"{name}.tif", labels, p.raw, n)
    else:
        ids = writers["ids"].pixels
        counts, thinned = np.bincount(ids.ravel(), minlength=256), ids[::n, ::n]
        written.write(f"{name}.png", mask_image(ids, labels, p.raw))
        written.write(f"{name}_color.png", Image.fromarray(plots.colorize(ids, labels.colors)))
    if ".qml" in ends:
        values = labels.raw.tolist() if p.raw else range(len(labels.names))
        written.write(f"{name}.qml", qml(labels.names, values, labels.colors))
    for kind in ("confidence", "probabilities"):
        if f"_{kind}.tif" in ends:
            written.replace(f"{name}_{kind}.tif", writers[kind].save)
        elif kind in writers:
            written.write(f"{name}_{kind}.png", Image.fromarray(writers[kind].pixels))
    overlay = plots.quick_look(scene.thinned(n), thinned, labels.names, labels.colors)
    written.write(f"{name}_overlay.jpg", overlay, quality=90)
    return counts


def predict_masks(args, images, rank, world, device):
    # -> why this rank has left files out, a message each
    say = print if rank == 0 else lambda *words, **how: None
    out, raw = Path(args.out), args.label_out == "raw"
    labels = Labels.of(load_weights(args.run, header_only=True)[1])
    values = class_values(labels, raw)
    ends_of = {file: endings(file, args, labels.by_color) for file in images}
    written = Written(out, args.overwrite)
    check_outputs(written, images, ends_of, values)

    p = open_predictor(args, labels, values, device)
    if device.type == "cuda":
        say(run.precision(p.window["amp"], device))
    if (args.confidence or args.probabilities) and p.temperature is None:
        say(no_temperature(args))
    if args.compile:
        net, note = compiled(p.net, p.window["crop"], p.window["amp"])
        p = p._replace(net=net)
        say(note, flush=True)
    run.wait()  # what another rank writes from here on is no old file
    finished = Finished(out)
    if rank == 0 and (args.overwrite or not (out / "classes.json").exists()):
        written.write("classes.json", values)
    # By the batch size values differ in their last digits at most: one may lower it and go on.
    window = {name: value for name, value in p.window.items() if name != "batch"}
    settings = dict(p.info, window=window, reading=p.meta["reading"], norm=p.meta["norm"],
                    values=values, temperature=p.temperature, device=device.type)
    # A compiled network rounds otherwise, so no image may be begun with one and ended without.
    if isinstance(p.net, Compiled):
        settings["compiled"] = True
    marks = {file: mark_of(settings | dict(files=ends_of[file]), file) for file in images}

    # ---- one image after the other
    mine = list(images.items())[rank::world]
    left_out, began, old = [], time.time(), 0
    for i, (file, name) in enumerate(mine):
        try:
            with written.claim(name):
                if finished.find(name, marks[file]):
                    old += 1
                    for end in ends_of[file]:
                        # A call that was killed behind finished.add() has left its tiles.
                        remove_part(out / f"{name}{end}")
                    continue
                check_kind(file, p.meta)
                scene = Strips(file, **p.meta["reading"])
                for note in scene.notes:
                    print(f"note: {escaped(note)}", file=sys.stderr)
                for layer in finished.others(name, ends_of[file]):
                    print(f"note: {out / layer}: of an earlier call with other settings, and stays "
                          "as it is", file=sys.stderr)
                predict_scene(p, written, finished, name, scene, ends_of[file], marks[file], say)
        except BadInput as e:
            left_out.append(leave_out(e))
            continue
        rest = minutes((time.time() - began) / (i + 1) * (len(mine) - i - 1))
        size = f"{scene.shape[0]} x {scene.shape[1]}"
        part = f", of {len(images)} in all processes" if world > 1 else ""
        say(f"{i + 1} of {len(mine)}{part}  {escaped(name)}  {size}  ETA {rest}", flush=True)

    # ---- all images
    numbers = run.over_ranks(torch.tensor([len(mine) - len(left_out), old], device=device))
    if rank == 0:
        asked = {name: marks[file] for file, name in images.items()}
        facts, more, others = found_masks(out, asked, p.about)
        if facts:
            written.write("summary.json", area_summary(facts, labels.names))
        if more:
            say(f"note: summary.json counts {more} more masks of earlier calls, {others} of them of "
                "other weights")
        say(last_line(*numbers.tolist(), ends_of, out))
    return left_out


def last_line(count, old, ends_of, out):
    # The last line: how many masks there are, and which files.
    kinds = {}  # a dict, not a set: it keeps their order
    for found in ends_of.values():
        kinds |= dict.fromkeys(found)
    files = ", ".join(f"NAME{end}" for end in kinds)
    note = f" ({old} of them by an earlier call)" if old else ""
    if not count:
        return f"no mask was written to {out}/"
    what = "mask of 1 image" if count == 1 else f"masks of {count} images"
    return f"wrote the {what}{note} to {out}/: {files}, summary.json"


# ---- whole images: a table

def predict_table(args, images, rank, world, device):
    # -> why this rank has left files out, a message each
    net, meta = nets.load_run(args.run, args.weights, "classification")
    net.to(device)
    names, out = [c["name"] for c in meta["classes"]], Path(args.out)
    amp = run.use_bf16(args.amp, meta["amp"], device)
    if device.type == "cuda" and rank == 0:
        print(run.precision(amp, device))
    written = Written(out, args.overwrite)
    if rank == 0:
        written.check(["predictions.csv", "montage.png"] if args.montage else ["predictions.csv"])
        out.mkdir(parents=True, exist_ok=True)  # fails now, not after the last image
    # The folder of the images may be --out, with the montage of an earlier call in it.
    montage = (out / "montage.png").resolve()
    mine = [file for file in images if file.resolve() != montage][rank::world]
    rows, left_out, began = [], [], time.time()  # rows: file, probabilities, classes, both falling

    def load(file):
        check_kind(file, meta)
        return square(read_image(file, **meta["reading"]), meta["stored"])

    for i in progress(range(0, len(mine), args.batch_size), "batches of images"):
        loaded = {}
        for file in mine[i:i + args.batch_size]:
            try:
                loaded[str(file)] = load(file)
            except BadInput as e:
                left_out.append(leave_out(e))
        if not loaded:
            continue
        pixels = torch.from_numpy(np.stack(list(loaded.values()))).to(device)
        x = prepare(pixels, NORMS[meta["norm"]], meta["size"])
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = net(x)
        p, order = logits.float().softmax(1).cpu().sort(dim=1, descending=True)
        for file, ps, cs in zip(loaded, p.tolist(), order.tolist()):
            rows.append((file, ps, [names[c] for c in cs]))
    rows = run.from_all_ranks(rows)
    if rank > 0:
        return left_out
    place = {str(file): i for i, file in enumerate(images)}
    rows.sort(key=lambda row: place[row[0]])

    written.write("predictions.csv", table_text(rows, min(args.top, len(names))))
    speed = len(rows) / (time.time() - began)
    more = ""
    if args.montage:
        more = " and montage.png"
        written.write("montage.png", plots.cards(surest(rows, names, args.montage, load)))
    print(f"wrote {out}/predictions.csv{more}: {len(rows)} images, {speed:.0f} images/s on "
          f"{device}, reading included")
    return left_out


def table_text(rows, top):
    # (file, probabilities, classes) -> CSV with the `top` most probable classes of every file
    header = ["file"]
    for i in range(top):
        header += [f"class_{i + 1}", f"probability_{i + 1}"]
    table = [header]
    for file, ps, cs in rows:
        cells = [file]
        for c, p in zip(cs[:top], ps):
            cells += [c, f"{p:.4f}"]
        table.append(cells)
    return csv_text(table)


def surest(rows, names, n, load):
    # -> sections of plots.cards(): of every class the n images with the highest probability
    sections = []
    for c in names:
        found = sorted((row for row in rows if row[2][0] == c), key=lambda row: -row[1][0])
        cards = []
        for file, ps, _ in found[:n]:
            cards.append((load(file), [Path(file).name, f"{ps[0]:.3f}"], False))
        sections.append((f"{c}: {len(found)} images", cards))
    return sections


# ---- for other programs

def export_run(args):
    # One ONNX file of the network, and what onnxruntime makes of it.
    path = Path(args.export)
    if path.suffix.lower() != ".onnx":
        raise BadInput(f"--export {path}: expected a name that ends in .onnx")
    written = Written(path.parent, args.overwrite)
    written.check([path.name])
    net, meta = ensemble.load_runs(args.run, args.weights, soup=args.soup)
    temperature = read_temperature(Path(args.run), ensemble.identity(args.run, soup=args.soup))
    resolution = args.resolution or export.training_resolution(meta)
    if resolution is None:
        raise BadInput(f"--export {path}: how large a pixel is does not stand in the training "
                       "images; type --resolution 30 if one is 30 cm wide: maps will be resampled "
                       "to that")
    content, compared = export.to_onnx(net, meta, resolution, temperature or 1.0)
    written.write(path.name, content)
    S = meta["crop"]  # pixels of a side
    print(f"wrote {path}: {nets.name_of(meta['model'])}, 1 x 3 x {S} x {S} pixels of "
          f"{resolution:g} cm, divided by 255 -> probabilities of {len(meta['classes'])} classes"
          + (f", calibrated by {temperature:.3f}" if temperature else ""))
    print('in Deepness: choose the file, then press "Load default parameters"')
    if any(meta["reading"].values()):
        print(f"note: trained on images read with {ensemble.as_words(meta['reading'])}; a map must "
              "show the same bands in the same range")
    if temperature is None:
        print(no_temperature(args))
    if compared is None:
        print("note: not compared with the network; pip install onnxruntime, and type it again")
    else:
        print("compared in onnxruntime: probabilities differ by at most "
              f"{compared['difference']:.1e}, {compared['same']:.2%} of the pixels have the same "
              "class")


def check_run(args):
    # BadInput where this kind of run cannot do what is asked.
    # -> does it classify whole images?
    quotes = torn([args.run, *args.inputs])
    if quotes and not weights_file(args.run).is_file():
        raise BadInput(f"{args.run}: no such file or folder{quotes}")
    _, meta = load_weights(args.run, header_only=True)
    is_classifier = meta.get("task") == "classification"
    strange = FOR_MASKS if is_classifier else FOR_TABLES
    flags = [flag for name, flag in args.typed.items() if name in strange]
    if flags:
        what = "classifies whole images" if is_classifier else "classifies every pixel"
        raise BadInput(f"{args.run}: {what}, which {' and '.join(flags)} has no part in; leave it "
                       "out")
    ensemble.check_runs(ensemble.all_runs(args.run, args.partners, args.soup), args.weights)
    return is_classifier


def main(args):
    rank, world, device = run.start(wanted=args.device, hours=24)
    is_classifier = check_run(args)
    if args.export:
        if rank == 0:
            export_run(args)
        run.end()
        return
    images, others = find_images(args.inputs)
    if others and rank == 0:
        print(f"note: {not_used(others)}")
    predict = predict_table if is_classifier else predict_masks
    left_out = run.from_all_ranks(predict(args, images, rank, world, device))
    run.end()
    if left_out:
        if rank == 0:
            last_advice(left_out)
        sys.exit(2)


if __name__ == "__main__":
    with run.one_line_errors():
        main(parse_args())
