"""Describe a folder of images and masks, and check the description against every file before any training.

    python -m data.check ROOT    without ROOT/dataset.json: looks at the masks and writes a first draft of it
    python -m data.check ROOT    with it: checks files, values and splits; exit code 2 where training would go wrong
    python -m data.check ROOT --dataset potsdam    checks a public data set, whose description is in data/public.py
Copy with: data/io.py data/datasets.py data/draft.py data/public.py
"""
import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shlex import quote

import numpy as np

from .common import IGNORE, BadInput, even_sample, write
from .datasets import (
    class_counts, count_ids, cut, find_pairs, match_pairs, read_description, split_names,
    unlabelled)
from .draft import (Complaints, count_values, draft_classes, draft_patterns, folder_splits, listed_splits, scan,
                    values_table)
from .io import Labels, open_image, read_valid
from .public import SETS, describe

LEVELS = ("note", "warning", "error")  # the worst stand next to the prompt
SHOWN = 20  # lines of one kind
NO_VAL = ('no val split: list whole scenes under "val" in dataset.json, or train with --val-frac 0.2 '
          "--group-regex REGEX, which finds the scene in a name")


def parse_args(argv=None):  # no flag says draft or check: whether dataset.json exists does
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("root", type=Path, help="folder that holds images and masks, in any sub-folders")
    p.add_argument("--limit", type=int, help="read only this many files, evenly spread (default: all)")
    p.add_argument("--dataset", default="folder", choices=["folder", *SETS])
    p.add_argument("--variant", help="form of a public data set, where it has several: irrg,eroded (data/public.py)")
    p.add_argument("--bands", type=lambda text: [int(n) for n in text.split(",")], help="as in train_seg.py")
    p.add_argument("--input-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="as in train_seg.py")
    p.add_argument("--force", action="store_true", help="write a new draft over an existing dataset.json")
    args = p.parse_args(argv)
    if args.bands and (len(args.bands) != 3 or min(args.bands) < 1):
        p.error(f"--bands {args.bands}: expected three numbers from 1, such as 4,1,2")
    return args


def show(complaints: Complaints, images: int, again: str, good: str) -> int:
    """Print all, those of one kind cut short, and what to type next -> exit code."""
    count = Counter()
    for (level, _), lines in sorted(complaints.items(), key=lambda item: LEVELS.index(item[0][0])):
        count[level] += len(lines)
        for line in lines[:SHOWN]:  # one fault must not hide the others
            print(f"{level}: {line}")
        if len(lines) > SHOWN:
            print(f"{level}: ... and {len(lines) - SHOWN} more like these")
    errors = f", {count['error']} of them errors" if count["error"] else ""
    print(f"{images} images, {count['warning'] + count['error']} complaints{errors}")
    print(f"Correct the errors, then type: {again}" if errors else good)
    return 2 if errors else 0


def attempt(work, *args):
    """The result, or the BadInput instead of raising it: one bad file must not hide the next."""
    try:
        return work(*args)
    except BadInput as e:
        return e


def each(work, items: list, what: str) -> list:
    """[work(item)] by threads, since Pillow and NumPy let go of the GIL; progress on stderr once it takes over 2 s."""
    out, start, told = [], time.monotonic(), 2.0
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        for result in pool.map(work, items):
            out.append(result)
            passed = time.monotonic() - start
            if passed > told:
                left, told = passed / len(out) * (len(items) - len(out)), passed + 0.5
                print(f"\r{what}: {len(out)} of {len(items)}, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
    if told > 2:
        print(file=sys.stderr)
    return out


# ---- without dataset.json

def draft(root: Path, limit: int | None) -> int:
    """Write a first dataset.json and show what it is based on -> exit code."""
    complaints = defaultdict(list)
    description = {"name": root.resolve().name, **draft_patterns(root, complaints)}
    for key in "images", "masks":
        print(f"{key:6s} {description[key]}")
    pairs, _ = match_pairs(root, description)
    masks = even_sample([mask for _, mask in pairs.values() if mask], limit)
    if not masks:
        find_pairs(root, description)  # raises: a folder's name such as "[a]" means something else in a pattern
    scans = each(lambda mask: attempt(scan, mask), masks, "masks")
    values = count_values(dict(zip(masks, scans)), complaints)
    print(*values_table(root, values), sep="\n")
    description["classes"], description["ignore"] = draft_classes(values, complaints)

    splits = listed_splits(root)
    failed = attempt(split_names, root, {"splits": splits}, list(pairs))
    if isinstance(failed, BadInput):
        complaints["warning", "lists"].append(f"not used for the splits: {failed}")
        splits = {}
    description["splits"] = splits or folder_splits(list(pairs), complaints)
    if "val" not in description["splits"]:
        complaints["warning", "val"].append(NO_VAL)
    lonely = attempt(find_pairs, root, description)
    if isinstance(lonely, BadInput):
        complaints["error", "pairs"].append(lonely)
    colors = {c.get("color") for c in description["classes"]} | set(description["ignore"])
    for file in sorted(set(root.glob("*.json")) - {root / "dataset.json"}):  # such as the class list of an export
        if listed := {c.upper() for c in re.findall("#[0-9a-fA-F]{6}", file.read_text(errors="ignore"))}:
            complaints["note", "json"].append(f"{file.name} lists {len(listed)} colours, {len(listed & colors)} of "
                                              "them are in the masks; the draft goes by the masks alone")
    text = json.dumps(description, indent=1, ensure_ascii=False)
    text = re.sub(r"\n {3,}|\n  (?=[\]}])", " ", text)  # one class, one split a line
    write(root / "dataset.json", text + "\n")
    print(f"wrote {root / 'dataset.json'}")
    again = f"python -m data.check {quote(str(root))}"
    return show(complaints, len(pairs), again, f"Name the classes in it, then: {again}")


# ---- with dataset.json, or a public data set

def turned(header) -> bool:  # a Pillow image, not yet decoded
    """Does EXIF ask viewers to turn the picture?"""
    try:
        return (header.getexif() if "exif" in header.info else getattr(header, "tag_v2", {})).get(274, 1) not in (0, 1)
    except Exception:  # Pillow raises many kinds on damaged EXIF of images that it reads well
        return False


def inspect(image: Path, mask: Path | None, labels: Labels | None, reading: dict) -> dict:
    """One pair: errors {kind: line}, the image's mode and hash, does EXIF turn it, pixel counts (K+1,) or 0."""
    found = {"errors": {}, "mode": None, "hash": None, "turned": False, "counts": 0}
    valid = None
    try:
        x, valid = read_valid(image, **reading)
        header = open_image(image, deep=True)
        found["mode"] = header.mode
        found["turned"] = turned(header)
        if (x != x[0, 0]).any():  # the empty margins of mosaics are all alike
            found["hash"] = x.shape, hashlib.blake2b(x.reshape(-1)).digest()
    except BadInput as e:
        found["errors"]["image"] = e
    try:
        if mask and found["mode"]:
            (w, h), (H, W, _) = open_image(mask).size, x.shape  # of the header: the values may be unknown
            if (h, w) != (H, W):
                found["errors"]["size"] = (f"{mask}: mask of {h} x {w} for an image of {H} x {W} (H x W); "
                                           "export it at the image's size")
        if mask and labels:
            ids = labels.load(mask)
            if valid is not None and valid.shape == ids.shape:
                ids[~valid] = IGNORE  # as SegDataset does
            found["counts"] = count_ids(ids, len(labels.names))
    except BadInput as e:
        found["errors"]["mask"] = e
    return found


def check_splits(root: Path, description: dict, names: list[str], complaints: Complaints) -> dict[str, list[str]]:
    """{name: its splits}, which should be one."""
    homes = {n: [] for n in names}
    for split, rules in description["splits"].items():
        chosen, bad = set(), []
        for rule in rules if isinstance(rules, list) else [rules]:  # one by one: split_names stops at the first fault
            part = attempt(split_names, root, {"splits": {split: rule}}, names)
            if isinstance(part, BadInput):
                bad.append(part)
            else:
                chosen.update(part[split])
        if not chosen and not bad:
            bad = [f"split {split!r} is empty; name its images in dataset.json, or delete it"]
        complaints["error", "split"] += bad
        for n in chosen:
            homes[n].append(split)
    complaints["error", "twice"] += [f"{n}: in the splits {' and '.join(several)}; leave it in one of them"
                                     for n, several in homes.items() if len(several) > 1]
    if nowhere := [n for n in names if not homes[n]]:
        complaints["note", "nowhere"].append(f"{len(nowhere)} images are in no split, first {nowhere[0]}")
    if "train" not in description["splits"]:
        line = f"no train split, only {', '.join(description['splits'])}; the names are train, val and test"
        complaints["error", "train"].append(line)
    if "val" not in description["splits"] and "select" not in description:
        complaints["warning", "val"].append(NO_VAL)
    return homes


def check_scenes(regex: str, homes: dict[str, list[str]], complaints: Complaints) -> None:
    """Scenes with images in two splits: neighbours and video frames are no independent test."""
    scenes = defaultdict(set)
    for n, splits in homes.items():
        if match := re.search(regex, n):
            scenes[match[1]].update(splits)
    if shared := sorted(scene for scene, splits in scenes.items() if len(splits) > 1):
        some = f"{shared[0]} in {', '.join(sorted(scenes[shared[0]]))}"
        complaints["warning", "scene"].append(f"{len(shared)} of {len(scenes)} scenes are in several splits, such as "
                                              f"{some}: the scores say little about new scenes")


def footprint(path: Path) -> tuple | None:
    """(coordinate system, west, south, east, north) of a GeoTIFF, from its header alone; None without or if turned."""
    image = open_image(path, deep=True)
    tags, (w, h) = getattr(image, "tag_v2", {}), image.size
    matrix, scale, tie = (tags.get(number) for number in (34264, 33550, 33922))
    if scale and tie:  # pixel (tie[0], tie[1]) lies at (tie[3], tie[4])
        west, north, dx, dy = tie[3] - tie[0] * scale[0], tie[4] + tie[1] * scale[1], scale[0], scale[1]
    elif matrix and not matrix[1] and not matrix[4]:
        west, north, dx, dy = matrix[3], matrix[7], matrix[0], -matrix[5]
    else:
        return None
    return tags.get(34735), west, north - h * dy, west + w * dx, north


def check_ground(pairs: dict, homes: dict[str, list[str]], complaints: Complaints) -> None:
    """Images of different splits that show the same ground, by their georeference: the test is not independent."""
    systems, shared = defaultdict(list), []
    for n in pairs:
        place = attempt(footprint, pairs[n][0]) if homes[n] else None
        if isinstance(place, tuple):
            systems[place[0]].append((n, *place[1:]))
    for tiles in systems.values():
        names, boxes = [t[0] for t in tiles], np.array([t[1:] for t in tiles])
        splits = np.array([homes[n][0] for n in names])
        area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        for i, box in enumerate(boxes):
            common = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
            part = common.clip(0).prod(1) / np.minimum(area, area[i])
            part[:i + 1] = 0
            part[splits == splits[i]] = 0
            shared += [(part[j], names[i], names[j]) for j in np.flatnonzero(part > 0.01)]  # an edge may be shared
    if shared:
        part, a, b = max(shared)
        complaints["warning", "ground"].append(
            f"{len(shared)} pairs of images in different splits show the same ground, such as {a} ({homes[a][0]}) and "
            f"{b} ({homes[b][0]}), {part:.0%} of the smaller: the scores say little about new ground")


def check_images(found: dict[str, dict], homes: dict[str, list[str]], complaints: Complaints) -> None:
    """What inspect found: faults, modes that are converted, and equal images, which are an error across splits."""
    modes, twins = defaultdict(list), defaultdict(list)
    for n, f in found.items():
        modes[f["mode"]].append(n)
        twins[f["hash"]].append(n)
        for kind, line in f["errors"].items():
            complaints["error", kind].append(line)
    for mode, names in modes.items():
        if mode not in ("RGB", None):
            complaints["note", "mode"].append(f"{len(names)} images of mode {mode} are read as RGB, first {names[0]}")
    if askew := [n for n, f in found.items() if f["turned"]]:
        complaints["warning", "turned"].append(
            f"{len(askew)} images have an EXIF orientation, first {askew[0]}: some programs turn such pictures, others "
            "do not; if masks do not lie on their images in a run's samples.png, turn the pixels for good")
    for names in (names for key, names in twins.items() if key and len(names) > 1):
        splits = {split: n for n in names for split in homes[n]}
        if len(splits) > 1:
            where = ", ".join(f"{n} ({split})" for split, n in splits.items())
            complaints["error", "leak"].append(f"{where}: identical images in different splits; leave them in one")
        else:
            complaints["note", "twins"].append(f"{', '.join(names[:3])}: {len(names)} identical images")


def check_shares(counts: dict[str, np.ndarray], images: dict[str, int], labels: Labels,
                 complaints: Complaints) -> None:
    """Print a table of {split: (K+1,) pixels}, with the scores of always saying the most frequent class."""
    columns = [["share of labelled pixels", *(f"  {name}" for name in labels.names), "ignored of all pixels", "images",
                "majority class", "  its accuracy", "  its mIoU"]]
    for split, (*c, ignored) in counts.items():
        labelled, total, present = max(1, sum(c)), max(1, sum(c) + ignored), max(1, np.count_nonzero(c))
        accuracy = max(c) / labelled
        columns.append([split, *(f"{n / labelled:.2%}" for n in c), f"{ignored / total:.2%}", images[split],
                        labels.names[np.argmax(c)], f"{accuracy:.4f}", f"{accuracy / present:.4f}"])
    for head, *cells in zip(*columns):
        print(f"{head:{max(map(len, columns[0]))}}" + "".join(f" {str(cell)[:14]:>14}" for cell in cells))

    for i, name in enumerate(labels.names):
        absent = [split for split, c in counts.items() if c[i] == 0]
        what = "learned" if "train" in absent else "scored"
        line = f"class {name!r} is not in {', '.join(absent)}: it cannot be {what} there; move images"
        if len(absent) == len(counts):
            line = f"class {name!r} is in no mask: correct its id or colour, or delete it"
        complaints["warning", "absent"] += [line] if absent else []
    for split, (*c, ignored) in counts.items():
        if ignored and not any(c):
            line = f"every pixel of {split} is ignored; correct \"ignore\", or the masks"
            complaints["error", "ignored"].append(line)
    *whole, ignored = sum(counts.values())
    if np.count_nonzero(whole) == 1 and ignored:  # such as binary masks whose 255 is ignored
        line = f"every labelled pixel is {labels.names[np.argmax(whole)]!r}; if {labels.ignore} holds a class, move it "
        complaints["warning", "single"].append(f'{line}from "ignore" to "classes"')


def check(root: Path, description: dict, limit: int | None, reading: dict, source: str, more: list[str]) -> int:
    """Hold a description against all files, list every fault at once and show the shares of the classes -> exit code.

    `reading`: bands and input_range; `source` and `more`: --dataset, and further flags of the commands to type next.
    """
    complaints = defaultdict(list)
    pairs, orphans = match_pairs(root, description)
    if hidden := unlabelled(root, description, pairs):
        line = f"{len(hidden)} images of {', '.join(description['unlabelled'])} have no masks: for predict.py only"
        complaints["note", "hidden"].append(line)
        pairs = {n: pair for n, pair in pairs.items() if n not in hidden}
        scored = {s: rule for s, rule in description["splits"].items() if s not in description["unlabelled"]}
        description = description | {"splits": scored}
    complaints["warning", "known"] += [description["warning"]] if "warning" in description else []
    why = f"no mask for it by {description['masks']!r}; correct \"masks\" in dataset.json or move the image away"
    complaints["error", "no mask"] += [f"{image}: {why}" for image, mask in pairs.values() if mask is None]
    why = f"no image for it by {description['images']!r}; it is not used"
    complaints["warning", "no image"] += [f"{mask}: {why}" for mask in orphans]
    tiles = cut(pairs, description["tiles"]) if "tiles" in description else pairs
    homes = check_splits(root, description, list(tiles), complaints)
    if "scene" in description:
        check_scenes(description["scene"], homes, complaints)
    labels = attempt(Labels, description["classes"], description["ignore"])
    if isinstance(labels, BadInput):
        complaints["error", "labels"].append(f"{root / 'dataset.json'}: {labels}")
        labels = None

    names = even_sample(list(pairs), limit)
    if len(names) < len(pairs):
        complaints["note", "limit"].append(f"only {len(names)} of {len(pairs)} images and masks were read (--limit)")
    found = dict(zip(names, each(lambda n: inspect(*pairs[n], labels, reading), names, "files")))
    if "tiles" not in description:
        check_ground(pairs, homes, complaints)
    check_images(found, defaultdict(list) if "tiles" in description else homes, complaints)
    if labels and "tiles" in description:  # a file belongs to several splits: its tiles are counted
        members = {split: {n: tiles[n] for n in tiles if split in homes[n]} for split in description["splits"]}
        counts = attempt(lambda: {split: class_counts(part, labels, limit).sum(0) for split, part in members.items()})
    elif labels:
        members = {split: [found[n] for n in names if split in homes[n]] for split in description["splits"]}
        none = np.zeros(len(labels.names) + 1, np.int64)
        counts = {split: sum((f["counts"] for f in part), none) for split, part in members.items()}
    if labels and not isinstance(counts, BadInput):  # else inspect has found the fault
        check_shares(counts, {split: len(part) for split, part in members.items()}, labels, complaints)
    if any(complaints.get(("error", kind)) for kind in ("no mask", "image", "mask", "split")):
        complaints["warning", "absent"].clear()  # not all was counted: "delete the class" would be bad advice
    train = ["python train_seg.py --dataset", source, "--root", quote(str(root)), *more]
    train += [] if "val" in description["splits"] or "select" in description else ["--val-frac 0.2"]
    again = ["python -m data.check", quote(str(root)), *([] if source == "folder" else ["--dataset", source]), *more]
    return show(complaints, len(pairs), " ".join(again), " ".join(train))


def main(argv=None) -> int:  # the exit code: 2 if something must be corrected first
    args = parse_args(argv)
    try:
        folder = args.dataset == "folder"
        if folder and (args.force or not (args.root / "dataset.json").exists()):
            return draft(args.root, args.limit)
        description = read_description(args.root) if folder else describe(args.dataset, args.root, args.variant)
        flags = ["--variant", description["variant"]] if description.get("variant") else []
        flags += ["--bands", ",".join(map(str, args.bands))] if args.bands else []
        flags += ["--input-range", *map(str, args.input_range)] if args.input_range else []
        reading = dict(bands=args.bands, input_range=args.input_range)
        return check(args.root, description, args.limit, reading, args.dataset, flags)
    except BadInput as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
