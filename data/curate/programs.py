"""What each sub-command does with its flags: read, call the modules beside this, write, print.

    make_folds(args)        args: of parse_args in __main__.py
"""
import json
from functools import partial
from pathlib import Path
from shlex import quote

import numpy as np

from ..common import BadInput, Written, as_text, file_sha256, progress
from ..datasets import check_command, script_command
from ..io import id_image, parse_color
from ..source import Source
from . import choice, folds, masks, merge, review, shares, suspects, tiles
from .predicted import Predicted, curate_command, data_flags, open_source, read_index


# ---- wrong labels

def make_folds(args) -> None:
    """Split files, and the commands that train and score by them."""
    # Masks are not read for this, so nothing is worth caching.
    source = Source(args.dataset, args.root, args.variant, cache="off", need=("train",))
    out = Written(args.out, args.overwrite)
    splits = folds.fold_splits(source, args.number, args.seed)
    for i, content in enumerate(splits, 1):
        out.write(f"fold_{i}.json", content)
    sizes = ", ".join(str(len(content["fold"])) for content in splits)
    print(f"wrote {args.number} split files into {args.out}: {sizes} images; type")
    for line in folds.commands(source, args.out, args.number):
        print(f"    {line}")


def find_suspects(args) -> None:
    """suspects.csv, suspects.json, images.csv and suspects.png of one or more models."""
    # Written keeps a list of what it wrote, and replaces nothing else without --overwrite.
    out = Written(args.out or Path(args.folders[0]) / "suspects", args.overwrite)
    files = ["suspects.csv", "suspects.json", "images.csv", "suspects.png"]
    out.check(files)
    predicted = Predicted(args.folders, args.root)
    # Not refused: a model that has not learned by heart still finds much.
    for run, images in predicted.trained_on().items():
        print(f"WARNING: {run} was trained on {images} of these images, and may have learned their "
              f"errors; ask models that have not: "
              f"{curate_command(f'folds {quote(str(predicted.source.root))} --out FOLDER')}")
    # All images are read twice: first how sure is sure, then who is surer than that.
    sure = suspects.thresholds(predicted)
    found = suspects.find_suspects(predicted, sure)
    rows = suspects.as_rows(found.regions, predicted.names)
    out.write("suspects.csv", suspects.as_csv(rows))
    out.write("images.csv", suspects.images_csv(found))
    out.write("suspects.json", suspects.about(predicted, sure) | dict(
        regions=rows, controls=suspects.as_rows(found.controls, predicted.names)))
    out.write("suspects.png", suspects.sheet(predicted, found.regions))
    pixels = sum(region.pixels for region in found.regions)
    print(f"{len(rows)} suspect regions, {pixels} pixels, in {len(predicted.images)} images")
    print(f"wrote {out.folder}/: {', '.join(files)}; now type: "
          f"{curate_command(f'review {quote(str(out.folder))}/suspects.json')}")


def make_page(args) -> None:
    """review.html beside suspects.json."""
    out = Written(args.suspects.parent, args.overwrite)
    out.check(["review.html"])
    found = review.read_suspects(args.suspects)
    source = open_source(found, args.root)
    # Cut from the data set now, which must still have the labels that were searched.
    page = review.page_of(found, source, args.limit, args.controls, args.seed)
    if not page["items"]:
        raise BadInput(f"{args.suspects}: no suspect regions; there is nothing to review")
    text = review.html(page)
    out.write("review.html", text)
    planted = sum(item["control"] for item in page["items"])
    regions = len(page["items"]) - planted
    more = len(found["regions"]) - regions
    rest = f" ({more} less suspect ones are left out: --limit)" if more else ""
    size = f"{len(text) / 1e6:.1f} MB"
    print(f"wrote {out.folder}/review.html ({size}): {regions} regions{rest}, {planted} controls; "
          "open it in a browser, decide, save decisions.json, then type, with the path where the "
          f"browser has saved it: {curate_command('apply decisions.json --out NEWMASKS')}")


def apply_decisions(args) -> None:
    """A new folder of masks, and what to write into dataset.json."""
    decisions = masks.read_decisions(args.decisions)
    source = open_source(decisions, args.root)
    # Everything that can be refused is refused here, before a file is written.
    manifest = masks.plan(decisions, source, args.out, args.including_heldout)
    print(masks.overview(decisions))
    for line in masks.summary(manifest):
        print(line)
    # How far the decisions can be trusted, in the reviewer's own answers.
    controls = decisions.get("controls")
    if isinstance(controls, dict) and controls.get("answered"):
        print(f"reviewer {decisions.get('reviewer')}: {controls.get('wrong')} of "
              f"{controls['answered']} controls wrong")
    if args.dry_run:
        print("nothing was written; leave --dry-run out to write")
        return
    # Typed twice it must not undo what revert has taken back since.
    if not masks.carry_out(manifest, args.out):
        print(f"{args.out}: written already by these decisions; nothing to do")
        return
    print(f"wrote {args.out}/: {len(manifest['masks'])} masks and manifest.json")
    patterns = masks.new_patterns(source, args.out)
    value = json.dumps(patterns[0] if len(patterns) == 1 else patterns, ensure_ascii=False)
    # Only data.check writes dataset.json, so the user is told what to put into it.
    if source.kind == "folder":
        print(f'to train on them, write into {source.root}/dataset.json:  "masks": {value}')
    else:
        description = source.description | {"masks": json.loads(value)}
        print(f"to train on them, save this as {source.root}/dataset.json and leave --dataset out:")
        print(json.dumps(description, ensure_ascii=False))


def revert_decisions(args) -> None:
    """Regions of a folder of masks as they were."""
    count = masks.revert(args.masks, args.region)
    print(f"{args.masks}: {count} regions as they were")


def verify_masks(args) -> None:
    """A line for each file that is not as it was written; then it is a BadInput."""
    faults = masks.verify(args.masks)
    for line in faults:
        print(line)
    if faults:
        raise BadInput(f"{args.masks}: {len(faults)} files are not as they were written")
    print(f"{args.masks}: all masks and their originals are as they were written")


# ---- what to label next

def choose_next(args) -> None:
    """next.txt, next.csv and next.png: images in the order in which to label them."""
    out = Written(args.out or Path(args.folders[0]) / "next", args.overwrite)
    pool = choice.read_pool(args.folders)
    files = ["next.txt", "next.csv"]
    if pool.index:
        files.append("next.png")
    out.check(files)
    # An image like one that has a label teaches little: distances start from those.
    labelled = None
    if args.labelled:
        rows = choice.read_features(args.labelled, read_index(args.labelled, "features"))
        labelled = np.stack(list(rows.values()))
    doubt, features = choice.entropies(pool)
    # Shares of the classes say what an image shows, features how it looks.
    if pool.features is not None:
        features = pool.features
    else:
        print("note: no features, so images are compared by their shares of the classes; "
              "eval.py --features writes better ones")
    if labelled is not None and labelled.shape[1] != features.shape[1]:
        raise BadInput(f"{args.labelled}: features of {labelled.shape[1]} numbers, and "
                       f"{features.shape[1]} of the images to choose from; take both from one run")
    order, distances = choice.choose(doubt, features, args.budget, labelled)
    out.write("next.txt", "".join(f"{pool.names[i]}\n" for i in order))
    out.write("next.csv", choice.table(pool, doubt, order, distances))
    if pool.index:
        out.write("next.png", choice.sheet(pool, doubt, order, args.root))
    print(f"{len(order)} of {len(pool.names)} images, mean entropy {doubt[order].mean():.3f} (all: "
          f"{doubt.mean():.3f}); wrote {out.folder}/: {', '.join(files)}")


# ---- whole data sets

def counted_classes(args) -> shares.Counted:
    return shares.count_classes(Source(args.dataset, args.root, args.variant, cache="off", need=()))


def write_stats(args) -> None:
    """shares.csv, stats.json and stats.png, and a line for each rare class."""
    out = Written(args.out, args.overwrite)
    files = ["shares.csv", "stats.json", "stats.png"]
    out.check(files)
    # By the masks alone; no image is opened.
    counted = counted_classes(args)
    found = shares.summary(counted)
    out.write("shares.csv", shares.csv_table(counted))
    out.write("stats.json", found)
    out.write("stats.png", shares.chart(counted))
    for name, images in found["images_of_rare_classes"].items():
        share = found["shares"][name]
        print(f"rare: {name}, {share:.2%} of the labelled pixels, in {len(images)} images")
    print(f"{len(counted.images)} images; wrote {out.folder}/: {', '.join(files)}")


def filter_images(args) -> None:
    """split.json without some training images, and record.json that names them."""
    out = Written(args.out, args.overwrite)
    out.check(["split.json", "record.json"])
    # A split file, not other files: nothing is moved or deleted.
    splits, removed = shares.without(counted_classes(args), args.name, args.at_most)
    out.write("split.json", splits)
    out.write("record.json", dict(root=str(args.root), at_most={args.name: args.at_most},
                                  removed=removed))
    data = data_flags(args.root, args.dataset, args.variant)
    print(f"train without {len(removed)} images, {len(splits['train'])} left; now type: "
          f"{script_command('train_seg.py')} {data} --split-file "
          f"{quote(str(out.folder / 'split.json'))}")


def replicate_images(args) -> None:
    """replicated.txt for --replicate, and record.json."""
    out = Written(args.out, args.overwrite)
    out.check(["replicated.txt", "record.json"])
    names = shares.with_at_least(counted_classes(args), args.names, args.share)
    out.write("replicated.txt", "".join(f"{name}\n" for name in names))
    out.write("record.json", dict(root=str(args.root), at_least={n: args.share for n in args.names},
                                  images=names))
    data = data_flags(args.root, args.dataset, args.variant)
    print(f"{len(names)} training images to repeat; now type: {script_command('train_kd.py')} "
          f"{data} --alpha 0 --replicate {quote(str(out.folder / 'replicated.txt'))}")


def cut_tiles(args) -> None:
    """A data set of tiles: images, masks, lists of splits, tiles.csv and dataset.json."""
    if not 0 <= args.overlap < args.side:
        raise BadInput(f"--side {args.side} --overlap {args.overlap}: expected an overlap from 0 "
                       "to less than the side")
    source = Source(args.dataset, args.root, args.variant, cache="off", need=())
    # There the patterns of the data set could find the tiles as images of its own.
    if args.out.resolve().is_relative_to(source.root):
        raise BadInput(f"--out {args.out}: lies in the data set; name a folder outside of "
                       f"{source.root}")
    out = Written(args.out, args.overwrite)
    out.check(["dataset.json", "tiles.csv"])
    tiles.check_sides(source)
    folders = tiles.folders_of(source)
    homes = tiles.homes_of(source)
    names = {split: [] for split in source.splits}
    rows = []
    for image, splits in progress(homes.items(), "images"):
        # check_sides() has made sure that an image is in one split.
        (split, name), = splits.items()
        mask = source.pairs[name][1]
        stem = image.relative_to(source.root).as_posix()
        for tile in tiles.tiles_of_scene(source, image, mask, args.side, args.overlap):
            top, left, h, w = tile.window
            place = f"{folders[image]}/{top}_{left}"
            # In the tags of the TIFF: where a tile is from, even when it is alone.
            info = {"SOURCE": stem, "SOURCE_WINDOW": f"{top} {left} {h} {w}"}
            out.replace(f"images/{place}.tif", partial(tiles.save_image, tile=tile, info=info))
            if tile.ids is not None:
                save = partial(tiles.save_mask, tile=tile, colors=source.labels.colors, info=info)
                out.replace(f"masks/{place}.tif", save)
            names[split].append(f"images/{place}")
            rows.append((f"images/{place}", split, stem, tile.window))
    for split, listed in names.items():
        out.write(f"{split}.txt", "".join(f"{name}\n" for name in listed))
    out.write("tiles.csv", tiles.tile_table(rows))
    # Last: a folder without it is no data set yet, should this be killed.
    out.write("dataset.json", tiles.description_of(source, list(names)))
    print(f"{len(rows)} tiles of {len(homes)} images in {out.folder}/; now type: "
          f"{check_command(out.folder)}")


def merge_sets(args) -> None:
    """A data set of several: links to images, masks, lists of splits, dataset.json and a record."""
    sources = [Source(root=root, cache="off", need=()) for root in args.roots]
    merge.check_alike(sources)
    class_map = merge.read_map(args.map, sources)
    classes, tables = merge.merged_classes(sources, class_map)
    colors = np.array([parse_color(c["color"]) for c in classes], np.uint8)
    out = Written(args.out, args.overwrite)
    out.check(["dataset.json", "merge.json"])
    # Masks are written anew because ids differ between sets; images are large and only linked.
    splits = {}
    for source, table in zip(sources, tables):
        for item in progress(merge.items_of(source), source.name):
            merge.link(item.image, out.folder / "images" / item.place)
            ids = table[source.labels.load(item.mask)]
            out.write(f"masks/{item.place}.png", id_image(ids, colors))
            splits.setdefault(item.split, []).append(f"images/{item.place}")
    for split, listed in splits.items():
        out.write(f"{split}.txt", "".join(f"{name}\n" for name in listed))
    # Which descriptions were merged: a later change of one shows by its sha256.
    sets = {}
    for source in sources:
        description = file_sha256(source.root / "dataset.json")
        sets[source.name] = dict(root=str(source.root), dataset_json=description,
                                 classes=class_map[source.name])
    out.write("merge.json", sets)
    out.write("dataset.json", merge.description_of(as_text(out.folder.resolve().name), sources[0],
                                                   classes, list(splits)))
    sizes = ", ".join(f"{len(listed)} {split}" for split, listed in splits.items())
    print(f"{len(classes)} classes, images: {sizes}; in {out.folder}/; now type: "
          f"{check_command(out.folder)}")
