"""Find wrong labels, decide about them in a browser, choose what to label next. No file of a data set is changed.

    python -m data.curate folds ROOT --out O            models that have not seen the labels they judge
    python -m data.curate suspects DIR... --out O       regions where models contradict the labels
    python -m data.curate review O/suspects.json        a page to decide about them; saves decisions.json
    python -m data.curate apply decisions.json --out M  all masks once more, those of the decisions changed
    python -m data.curate verify M                      are masks and originals as they were written?
    python -m data.curate revert M --region 17          take regions back, or all
    python -m data.curate next DIR --budget 50          which images to label next
    python -m data.curate tile ROOT --out T             big scenes as a data set of tiles
    python -m data.curate merge ROOT ROOT --out M       several data sets as one, images linked
    python -m data.curate stats ROOT --out O            which classes are in which images and splits
    python -m data.curate filter ROOT --class water --at-most 50% --out O     a split file
    python -m data.curate replicate ROOT --class pool --share 5% --out O      a list to repeat

DIR: what eval.py RUN --split S --probabilities DIR has written.
"""
import argparse
import json
import sys
from functools import partial
from pathlib import Path
from shlex import quote

import numpy as np

if not __package__:  # started as `python /path/to/data/curate`: let "data" be found, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from data.common import BadInput, Written, as_text, file_sha256, print_anything, progress
from data.curate import choice, folds, masks, merge, review, shares, suspects, tiles
from data.curate.predicted import Predicted, curate_command, open_source, read_index
from data.datasets import check_command, script_command
from data.io import id_image, parse_color
from data.public import SETS
from data.source import Source


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, prog="python -m data.curate",
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    programs = p.add_subparsers(dest="program", required=True, metavar="PROGRAM")

    def add(name, help, overwrite=True):
        program = programs.add_parser(name, help=help, description=help)
        if overwrite:
            program.add_argument("--overwrite", action="store_true",
                                 help="replace files of others, or changed by hand")
        return program

    def add_data(program):
        program.add_argument("root", type=Path, help="data folder")
        program.add_argument("--dataset", default="folder", choices=["folder", *SETS],
                             help="folder (default): by ROOT/dataset.json; else one of data/public.py")
        program.add_argument("--variant", help="form of a public data set, where it has several")

    q = add("folds", "split files by which no model judges labels that it was trained on")
    add_data(q)
    q.add_argument("--number", type=int, default=3, help="of folds (default: 3)")
    q.add_argument("--seed", type=int, default=0, help="of the draw of scenes (default: 0)")
    q.add_argument("--out", type=Path, required=True, help="folder for the split files")

    q = add("suspects", "regions where models contradict the labels")
    q.add_argument("folders", nargs="+", metavar="DIR", help="written by eval.py --probabilities")
    q.add_argument("--root", help="data folder (as eval.py had it)")
    q.add_argument("--out", type=Path, help="folder for the results (default: DIR/suspects)")

    q = add("review", "one HTML page to decide about suspect regions; needs no network")
    q.add_argument("suspects", type=Path, help="suspects.json")
    q.add_argument("--root", help="data folder (as when suspects were searched)")
    q.add_argument("--limit", type=int, default=500, help="regions, the most suspect (default: 500)")
    q.add_argument("--controls", type=int, default=20,
                   help="regions of known label among them, to tell how often the reviewer errs "
                        "(default: 20)")
    q.add_argument("--seed", type=int, default=0, help="of order and drawing (default: 0)")

    q = add("apply", "carry decisions out in a new folder of masks; the originals stay", overwrite=False)
    q.add_argument("decisions", type=Path, help="decisions.json")
    q.add_argument("--out", type=Path, required=True, help="new folder for all masks of the data set")
    q.add_argument("--root", help="data folder (as when suspects were searched)")
    q.add_argument("--dry-run", action="store_true", help="say what would change, write nothing")
    q.add_argument("--including-heldout", action="store_true",
                   help="also change labels of val and test")
    q = add("revert", "take decisions back: masks are again what they were", overwrite=False)
    q.add_argument("masks", type=Path, help="folder that apply has written")
    q.add_argument("--region", type=int, nargs="+", help="numbers of regions (default: all)")
    q = add("verify", "compare masks and their originals with the sha256 of the manifest", overwrite=False)
    q.add_argument("masks", type=Path, help="folder that apply has written")

    q = add("next", "images to label next: of which a model is unsure, and that look like no others")
    q.add_argument("folders", nargs="+", metavar="DIR",
                   help="written by eval.py --probabilities and --features, or by predict.py "
                        "--probabilities")
    q.add_argument("--budget", type=int, required=True, help="number of images")
    q.add_argument("--labelled", metavar="DIR",
                   help="features of the images that have labels: eval.py RUN --split train "
                        "--features DIR")
    q.add_argument("--root", help="data folder (as eval.py had it)")
    q.add_argument("--out", type=Path, help="folder for the results (default: DIR/next)")

    q = add("stats", "shares of classes per image, split and set: CSV, JSON, bar chart")
    add_data(q)
    q.add_argument("--out", type=Path, required=True, help="folder for the results")
    q = add("filter", "a split file without training images that one class fills")
    add_data(q)
    q.add_argument("--class", dest="name", required=True, help="name of the class")
    q.add_argument("--at-most", type=percent, required=True, metavar="SHARE",
                   help="of an image's labelled pixels, such as 50%%")
    q.add_argument("--out", type=Path, required=True, help="folder for split.json and record.json")
    q = add("replicate", "a list of training images that have much of some classes, to repeat them")
    add_data(q)
    q.add_argument("--class", dest="names", nargs="+", required=True, help="names of classes")
    q.add_argument("--share", type=percent, required=True,
                   help="of an image's labelled pixels, such as 5%%")
    q.add_argument("--out", type=Path, required=True,
                   help="folder for replicated.txt and record.json")
    q = add("tile", "big scenes as overlapping tiles, with georeference: a data set of its own")
    add_data(q)
    q.add_argument("--side", type=int, default=512, help="of a tile, in pixels (default: 512)")
    q.add_argument("--overlap", type=int, default=64,
                   help="pixels that neighbours share (default: 64)")
    q.add_argument("--out", type=Path, required=True, help="folder for the new data set")
    q = add("merge", "several data sets under one list of classes; images are linked, not copied")
    q.add_argument("roots", type=Path, nargs="+", metavar="ROOT", help="folders with a dataset.json")
    q.add_argument("--map", type=Path, metavar="JSON",
                   help="{set: {its class: merged class, or null for ignored}} "
                        "(default: classes of one name are one)")
    q.add_argument("--out", type=Path, required=True, help="folder for the merged data set")
    return p.parse_args(argv)


def percent(text: str) -> float:
    """'50%' -> 0.5."""
    share = float(text.removesuffix("%")) / 100
    if not text.endswith("%") or not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a percentage such as 50%")
    return share


def make_folds(args) -> None:
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
    out = Written(args.out or Path(args.folders[0]) / "suspects", args.overwrite)
    files = ["suspects.csv", "suspects.json", "images.csv", "suspects.png"]
    out.check(files)
    predicted = Predicted(args.folders, args.root)
    for run, images in predicted.trained_on().items():
        print(f"WARNING: {run} was trained on {images} of these images, and may have learned their "
              f"errors; ask models that have not: "
              f"{curate_command(f'folds {quote(str(predicted.source.root))} --out FOLDER')}")
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
    out = Written(args.suspects.parent, args.overwrite)
    out.check(["review.html"])
    found = review.read_suspects(args.suspects)
    source = open_source(found, args.root)
    page = review.page_of(found, source, args.limit, args.controls, args.seed)
    if not page["items"]:
        raise BadInput(f"{args.suspects}: no suspect regions; there is nothing to review")
    text = review.html(page)
    out.write("review.html", text)
    planted = sum(item["control"] for item in page["items"])
    print(f"wrote {out.folder}/review.html ({len(text) / 1e6:.1f} MB): {len(page['items']) - planted} "
          f"regions, {planted} controls; open it in a browser, decide, save decisions.json, then type: "
          f"{curate_command('apply decisions.json --out NEWMASKS')}")


def apply_decisions(args) -> None:
    decisions = masks.read_decisions(args.decisions)
    source = open_source(decisions, args.root)
    manifest = masks.plan(decisions, source, args.out, args.including_heldout)
    for line in masks.summary(manifest):
        print(line)
    controls = decisions.get("controls")
    if isinstance(controls, dict) and controls.get("answered"):
        print(f"reviewer {decisions.get('reviewer')}: {controls.get('wrong')} of "
              f"{controls['answered']} controls wrong")
    if args.dry_run:
        print("nothing was written; leave --dry-run out to write")
        return
    if masks.applied(manifest, args.out):
        print(f"{args.out}: written already by these decisions; nothing to do")
        return
    masks.carry_out(manifest, args.out)
    print(f"wrote {args.out}/: {len(manifest['masks'])} masks and manifest.json")
    patterns = masks.new_patterns(source, args.out)
    value = json.dumps(patterns[0] if len(patterns) == 1 else patterns, ensure_ascii=False)
    if source.kind == "folder":
        print(f'to train on them, write into {source.root}/dataset.json:  "masks": {value}')
    else:
        description = source.description | {"masks": json.loads(value)}
        print(f"to train on them, save this as {source.root}/dataset.json and leave --dataset out:")
        print(json.dumps(description, ensure_ascii=False))


def revert_decisions(args) -> None:
    count = masks.revert(args.masks, args.region)
    print(f"{args.masks}: {count} regions as they were")


def verify_masks(args) -> None:
    faults = masks.verify(args.masks)
    for line in faults:
        print(line)
    if faults:
        raise BadInput(f"{args.masks}: {len(faults)} files are not as they were written")
    print(f"{args.masks}: all masks and their originals are as they were written")


def choose_next(args) -> None:
    if args.budget < 1:
        raise BadInput(f"--budget {args.budget}: expected a number of images from 1")
    out = Written(args.out or Path(args.folders[0]) / "next", args.overwrite)
    pool = choice.read_pool(args.folders)
    files = ["next.txt", "next.csv"]
    if pool.index:
        files.append("next.png")
    out.check(files)
    labelled = None
    if args.labelled:
        rows = choice.read_features(args.labelled, read_index(args.labelled, "features"))
        labelled = np.stack(list(rows.values()))
    doubt, features = choice.entropies(pool)
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
    print(f"{len(order)} of {len(pool.names)} images, mean entropy "
          f"{doubt[order].mean():.3f} (all: {doubt.mean():.3f}); wrote {out.folder}/: {', '.join(files)}")


def counted_classes(args) -> shares.Counted:
    return shares.count_classes(Source(args.dataset, args.root, args.variant, cache="off", need=()))


def data_flags(args) -> str:
    # -> what training commands repeat
    flags = f"--root {quote(str(args.root))}"
    if args.dataset != "folder":
        flags = f"--dataset {args.dataset} {flags}"
    if args.variant:
        flags += f" --variant {quote(args.variant)}"
    return flags


def write_stats(args) -> None:
    out = Written(args.out, args.overwrite)
    files = ["shares.csv", "stats.json", "stats.png"]
    out.check(files)
    counted = counted_classes(args)
    found = shares.summary(counted)
    out.write("shares.csv", shares.csv_table(counted))
    out.write("stats.json", found)
    out.write("stats.png", shares.chart(counted))
    for name, images in found["images_of_rare_classes"].items():
        print(f"rare: {name}, {found['shares'][name]:.2%} of the labelled pixels, in {len(images)} images")
    print(f"{len(counted.images)} images; wrote {out.folder}/: {', '.join(files)}")


def filter_images(args) -> None:
    out = Written(args.out, args.overwrite)
    out.check(["split.json", "record.json"])
    splits, removed = shares.without(counted_classes(args), args.name, args.at_most)
    out.write("split.json", splits)
    out.write("record.json", dict(root=str(args.root), at_most={args.name: args.at_most},
                                  removed=removed))
    print(f"train without {len(removed)} images, {len(splits['train'])} left; now type: "
          f"{script_command('train_seg.py')} {data_flags(args)} --split-file "
          f"{quote(str(out.folder / 'split.json'))}")


def replicate_images(args) -> None:
    out = Written(args.out, args.overwrite)
    out.check(["replicated.txt", "record.json"])
    names = shares.with_at_least(counted_classes(args), args.names, args.share)
    out.write("replicated.txt", "".join(f"{name}\n" for name in names))
    out.write("record.json", dict(root=str(args.root), at_least={n: args.share for n in args.names},
                                  images=names))
    print(f"{len(names)} training images to repeat; now type: {script_command('train_kd.py')} "
          f"{data_flags(args)} --replicate {quote(str(out.folder / 'replicated.txt'))}")


def cut_tiles(args) -> None:
    if not 0 <= args.overlap < args.side:
        raise BadInput(f"--side {args.side} --overlap {args.overlap}: expected an overlap from 0 to "
                       "less than the side")
    source = Source(args.dataset, args.root, args.variant, cache="off", need=())
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
        (split, name), = splits.items()
        mask = source.pairs[name][1]
        stem = image.relative_to(source.root).as_posix()
        for tile in tiles.tiles_of_scene(source, image, mask, args.side, args.overlap):
            top, left, h, w = tile.window
            place = f"{folders[image]}/{top}_{left}"
            info = {"SOURCE": stem, "SOURCE_WINDOW": f"{top} {left} {h} {w}"}
            out.replace(f"images/{place}.tif", partial(tiles.save_image, tile=tile, info=info))
            if tile.ids is not None:
                out.replace(f"masks/{place}.tif",
                            partial(tiles.save_mask, tile=tile, colors=source.labels.colors, info=info))
            names[split].append(f"images/{place}")
            rows.append((f"images/{place}", split, stem, tile.window))
    for split, listed in names.items():
        out.write(f"{split}.txt", "".join(f"{name}\n" for name in listed))
    out.write("tiles.csv", tiles.tile_table(rows))
    out.write("dataset.json", tiles.description_of(source, list(names)))
    print(f"{len(rows)} tiles of {len(homes)} images in {out.folder}/; now type: "
          f"{check_command(out.folder)}")


def merge_sets(args) -> None:
    sources = [Source(root=root, cache="off", need=()) for root in args.roots]
    merge.check_alike(sources)
    class_map = merge.read_map(args.map, sources)
    classes, tables = merge.merged_classes(sources, class_map)
    colors = np.array([parse_color(c["color"]) for c in classes], np.uint8)
    out = Written(args.out, args.overwrite)
    out.check(["dataset.json", "merge.json"])
    splits = {}
    for source, table in zip(sources, tables):
        for item in progress(merge.items_of(source), source.name):
            merge.link(item.image, out.folder / "images" / item.place)
            ids = table[source.labels.load(item.mask)]
            out.write(f"masks/{item.place}.png", id_image(ids, colors))
            splits.setdefault(item.split, []).append(f"images/{item.place}")
    for split, listed in splits.items():
        out.write(f"{split}.txt", "".join(f"{name}\n" for name in listed))
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


PROGRAMS = {"folds": make_folds, "suspects": find_suspects, "review": make_page,
            "apply": apply_decisions, "revert": revert_decisions, "verify": verify_masks,
            "next": choose_next,
            "stats": write_stats, "filter": filter_images, "replicate": replicate_images,
            "tile": cut_tiles, "merge": merge_sets}


def main(argv=None) -> int:
    """The exit code: 2 if something must be corrected first."""
    print_anything()
    args = parse_args(argv)
    try:
        PROGRAMS[args.program](args)
    except (BadInput, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
