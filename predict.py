"""Classify every pixel of images of any size: id mask, colour mask and overlay per image. Or whole images, by table.

    python predict.py runs/demo IMAGE_OR_FOLDER_OR_GLOB ... --out predictions
    python predict.py runs/demo D --out predictions --label-out raw    ids or colours as in the training masks
Writes OUT/NAME.png (ids in a palette PNG: opens in colour, reads back as ids), NAME_color.png, NAME_overlay.jpg and
classes.json; sub-folders of an input folder are kept. What is transparent in an image gets no class: 255. A file that
cannot be read is named and left out; exit code 2. Needs about 12 bytes of memory per pixel of 8-bit images
(tests/bench_predict.py). Overlays of more than 65,000 pixels a side are thinned.
    python predict.py runs/eurosat-cnn D --top 3 --montage 8    a run of train_cls.py
Writes OUT/predictions.csv (file, class, probability, next classes) and montage.png, the surest 8 of every class.
Copy with: models/vit.py models/weights.py models/heads.py models/deeplab.py models/unetformer.py
    models/efficientnet_unet.py models/classify.py models/checkpoint.py data/io.py data/datasets.py data/scenes.py
    data/tiles.py data/plots.py
"""
import argparse
import csv
import ctypes
import glob
import io
import json
import os
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: spinning threads cost 6x on a shared CPU

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from data import plots
from data.datasets import NORMS, normalise
from data.common import IGNORE, BadInput, write
from data.io import Labels, id_image, read_image, read_valid
from data.scenes import prepare, square
from data.tiles import blend_weight, windows
from models import deeplab, efficientnet_unet, unetformer
from models.checkpoint import load_weights
from models.classify import ChannelMeans, Classifier, Knn, cnn
from models.heads import HEADS, Segmenter
from models.vit import ViT
from models.weights import BadWeights, fill, load_vit

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="run folder, or its best.safetensors")
    p.add_argument("inputs", nargs="+", help="images, folders (with sub-folders) or patterns")
    p.add_argument("--out", default="predictions", help="folder for the results")
    p.add_argument("--label-out", default="train", choices=["train", "raw"], help="ids 0..K-1, or those of the masks")
    p.add_argument("--overlap", type=float, help="of windows, as a part of the crop (as in training)")
    p.add_argument("--weights", help="backbone file of a run saved with --save head (where it was in training)")
    p.add_argument("--amp", default="auto", choices=["auto", "bf16", "off"], help="auto: as trained, where fast")
    p.add_argument("--batch-size", type=int, default=16, help="windows at once")
    p.add_argument("--top", type=int, default=3, help="classes per image in the table of a classification run")
    p.add_argument("--montage", type=int, default=0, help="images per class in montage.png, the surest first; 0 = none")
    args = p.parse_args(argv)
    if empty := [k for k, v in vars(args).items() if v == ""]:
        p.error(f"--{empty[0].replace('_', '-')} is empty; is the shell variable set?")
    if args.batch_size < 1 or not 0 <= (args.overlap or 0) <= 0.9 or args.top < 1 or args.montage < 0:
        p.error("--batch-size and --top from 1, --montage from 0, --overlap in 0..0.9")
    return args


def find_images(inputs):  # -> {file: name below --out}
    found = {}
    for text in inputs:
        path = Path(text)
        files = path.rglob("*") if path.is_dir() else [path] if path.exists() else map(Path, glob.glob(text))
        files = sorted(f for f in files if f.is_file() and (f.suffix.lower() in SUFFIXES or f == path))
        if not files:
            raise BadInput(f"{text}: no image there; expected a file, folder or pattern ({' '.join(sorted(SUFFIXES))})")
        for f in files:
            found.setdefault(f, (f.relative_to(path) if path.is_dir() else Path(f.name)).with_suffix("").as_posix())
    return found


def leave_out(e):  # flags of reading are the run's
    hint = " - in training; this file must be as those were" if "--bands" in str(e) or "--input-range" in str(e) else ""
    print(f"left out: {e}{hint}", file=sys.stderr)


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


@torch.inference_mode()
def ids_by_strips(net, image, norm, crop, overlap, batch, amp, whole=2**22):
    # image (H, W, 3) uint8 -> yields (H, W) uint8 that is filled down to row n, and n; above `whole` pixels by strips
    H, W = image.shape[:2]
    if H * W <= whole:  # to the bit as eval.py, and in full batches
        yield logits_of(net, normalise(image, norm), crop, overlap, batch, amp).max(0).indices.byte().numpy(), H
        return
    tops, ids, held = [top for top, *_ in windows(H, 1, crop, overlap)], np.empty((H, W), np.uint8), None
    for top, below in zip(tops, [*tops[1:], H]):  # a strip is one row of windows
        z = logits_of(net, normalise(image[top:top + crop], norm), crop, overlap, batch, amp)
        z.mul_(blend_weight(z.shape[1], 1))  # a window's weight is row times column: strips blend to what windows do
        if held is not None:
            z[:, :held.shape[1]] += held
        ids[top:below] = z[:, :below - top].max(0).indices.byte().numpy()  # all classes have the same sum of weights
        held = z[:, below - top:]
        yield ids, below


@torch.inference_mode()
def classify(args, rank, world, device):  # a run of train_cls.py: writes predictions.csv, montage.png -> files left out
    net, meta = load_net(args.run, args.weights, build_cls, "classification")
    net.to(device)
    names, out = [c["name"] for c in meta["classes"]], Path(args.out)
    amp = args.amp == "bf16" or args.amp == "auto" and meta["amp"] == "bf16" and fast_bf16(device)
    results = out / "predictions.csv", out / "montage.png"
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)  # fails now, not after the last image
        if there := [f for f in results if f.exists()]:
            if not results[0].exists() or not results[0].read_text(errors="ignore").startswith("file,class_1,"):
                raise BadInput(f"{there[0]}: would be overwritten, and predict.py has not written it; name another "
                               "--out")
    files = [f for f in find_images(args.inputs) if f.resolve() != results[1].resolve()]  # --out may lie among them
    table, bad, began = [], [], time.time()
    mine, shown = files[rank::world], began
    for i in range(0, len(mine), args.batch_size):
        images = []
        for file in mine[i:i + args.batch_size]:
            try:
                images.append((file, square(read_image(file, **meta["reading"]), meta["stored"])))
            except BadInput as e:
                leave_out(e)
                bad.append(str(file))
        if images:
            x = torch.from_numpy(np.stack([image for _, image in images])).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = net(prepare(x, NORMS[meta["norm"]], meta["size"]))
            p, order = logits.float().softmax(1).cpu().sort(dim=1, descending=True)
            table += [(str(file), ps.tolist(), [names[c] for c in cs])
                      for (file, _), ps, cs in zip(images, p, order)]
        if rank == 0 and time.time() - shown > 10:
            shown, done = time.time(), min(i + args.batch_size, len(mine))
            rest = round((shown - began) / done * (len(mine) - done))
            print(f"{min(done * world, len(files))} of {len(files)}  ETA {rest // 60}:{rest % 60:02d}", flush=True)
    if world > 1:
        dist.all_gather_object(parts := [None] * world, table)
        table = sorted((row for part in parts for row in part), key=lambda row: row[0])
    speed = len(table) / (time.time() - began)
    if rank == 0:
        text, top = io.StringIO(), min(args.top, len(names))
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["file", *(f"{column}_{i + 1}" for i in range(top) for column in ("class", "probability"))])
        rows.writerows([file, *(v for c, p in zip(cs[:top], ps) for v in (c, f"{p:.4f}"))] for file, ps, cs in table)
        write(results[0], text.getvalue())
        if args.montage:
            by_class = {c: sorted((r for r in table if r[2][0] == c), key=lambda r: -r[1][0]) for c in names}
            write(results[1], plots.cards(
                [(f"{c}: {len(found)} images", [(square(read_image(file, **meta["reading"]), meta["stored"]),
                                                 [Path(file).name, f"{ps[0]:.3f}"], False)
                                                for file, ps, _ in found[:args.montage]])
                 for c, found in by_class.items()]))
        print(f"wrote {out}/predictions.csv{' and montage.png' if args.montage else ''}: {len(table)} images, "
              f"{speed:.0f} images/s on {device}, reading included")
    return bad


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

    if load_weights(args.run, header_only=True)[1].get("task") == "classification":
        bad = classify(args, rank, world, device)
        if world > 1:
            dist.barrier()  # rank 0 has written
            dist.destroy_process_group()
        sys.exit(2 if bad else 0)
    net, meta = load_net(args.run, args.weights)
    net.to(device)
    labels, out = Labels(meta["classes"], meta["ignore"]), Path(args.out)
    amp = args.amp == "bf16" or args.amp == "auto" and meta["amp"] == "bf16" and fast_bf16(device)
    overlap = meta["overlap"] if args.overlap is None else args.overlap
    images = find_images(args.inputs)
    if twice := [name for name, n in Counter(images.values()).items() if n > 1]:
        a, b, *_ = (f for f in images if images[f] == twice[0])
        raise BadInput(f"{a} and {b}: both would become {twice[0]}.png; predict them into two folders")
    outputs = [(out / f"{n}{end}").resolve() for n in images.values() for end in (".png", "_color.png", "_overlay.jpg")]
    clash = {f.resolve() for f in images} & set(outputs)
    if clash or len(set(outputs)) < len(outputs):
        twice = [f for f, n in Counter(outputs).items() if n > 1]
        raise BadInput(f"{out}: results would overwrite {min(clash, default=None) or f'each other ({twice[0].name})'}; "
                       "name another --out, or the images without earlier results")
    values = [dict(value=c.get("id", c.get("color")) if args.label_out == "raw" else i, train_id=i, **c)
              for i, c in enumerate(labels.classes)]
    listing = out / "classes.json"
    if listing.exists():
        try:
            same = json.loads(listing.read_text()) == values
        except ValueError:
            same = False
        if not same:
            raise BadInput(f"{listing}: of other classes or --label-out than this run's; name another --out")
    elif there := [f for f in outputs if f.exists()]:
        raise BadInput(f"{there[0]}: would be overwritten, and predict.py has not written it; name another --out")
    if world > 1:
        dist.barrier()  # what another rank writes from here on is no old file
    if rank == 0:
        write(listing, values)
    mine, began, bad = list(images.items())[rank::world], time.time(), []
    for i, (file, name) in enumerate(mine):
        try:
            image, valid = read_valid(file, **meta["reading"])
            if valid is not None and not valid.all() and args.label_out == "raw" and not labels.ignore:
                raise BadInput(f"{file}: transparent pixels, and no value of the masks means no class; type "
                               "--label-out train, which writes 255 there")
        except BadInput as e:
            leave_out(e)
            bad.append(file)
            continue
        start = shown = time.time()  # after the last turn `ids` is complete
        for ids, rows in ids_by_strips(net, image, meta["norm"], meta["crop"], overlap, args.batch_size, amp):
            if time.time() - shown > 10:
                shown, rest = time.time(), round((time.time() - start) * (len(image) / rows - 1))
                say(f"{name}  row {rows} of {len(image)}  ETA of this image {rest // 60}:{rest % 60:02d}", flush=True)
        if valid is not None:
            ids[~valid] = IGNORE
        if args.label_out == "train":
            mask = id_image(ids, labels.colors)
        elif labels.by_color:
            mask = Image.fromarray(labels.decode(ids))
        else:
            colors = np.zeros((256, 3), np.uint8)
            colors[[c["id"] for c in labels.classes]] = labels.colors
            mask = id_image(labels.decode(ids), colors)
        write(out / f"{name}.png", mask)
        write(out / f"{name}_color.png", Image.fromarray(plots.colorize(ids, labels.colors)))
        n = -(-max(ids.shape) // 65_000)  # a JPEG has at most 65,535 pixels a side: every n-th of a larger image
        blend = plots.overlay(image[::n, ::n], ids[::n, ::n], labels.colors)
        write(out / f"{name}_overlay.jpg", Image.fromarray(blend), quality=90)
        rest = round((time.time() - began) / (i + 1) * (len(mine) - i - 1))
        say(f"{i + 1} of {len(mine)}  {name}  {image.shape[0]} x {image.shape[1]}  "
            f"ETA {rest // 60}:{rest % 60:02d}", flush=True)
    count = torch.tensor(len(mine) - len(bad), device=device)
    if world > 1:
        dist.all_reduce(count)
    say(f"wrote the masks of {count} images to {out}/: NAME.png, NAME_color.png, NAME_overlay.jpg")
    # >>> same: leave
    if world > 1:  # gloo's threads may still hold tensors of the last collective, and Python's end under them aborts
        dist.barrier()
        dist.destroy_process_group()
    # <<< same: leave
    if bad:
        sys.exit(2)


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
