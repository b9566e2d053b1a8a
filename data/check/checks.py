"""Hold a description against all files: every fault at once, and the shares of the classes."""
from collections import defaultdict
from pathlib import Path
from shlex import quote

import numpy as np

from ..common import BadInput, even_sample, plural
from ..datasets import (ONE_IMAGE, check_command, class_counts, hold_out, in_threads, match_pairs,
                        scenes_of, script_command, split_names, tiles_of, unknown_files,
                        unlabelled, without_mask)
from ..files import not_used
from ..io import Labels
from ..ranges import percentile_range
from .complaints import Complaints, attempt
from .ground import check_ground
from .images import Finding, check_images, inspect_pair
from .proposal import BY_IMAGE, no_train
from .shares import check_absent, check_ignored, print_shares
from .values import is_drafted

NO_VAL = ('no val split: list whole scenes under "val" in dataset.json, or hold them out: '
          '"select": 0.2 and "scene": REGEX in dataset.json (or --val-frac 0.2 for one run)')


def check(root: Path, description: dict, limit: int | None, source: str, flags: list[str]) -> int:
    """Show the shares of the classes and what is wrong -> exit code.

    `limit`: files to read. `source`: --dataset, and `flags`: further ones of the commands to type
    next.
    """
    complaints = Complaints()
    labels = Labels.of(description)

    # Names alone: pairs, splits, scenes.
    pairs, splits = check_pairs(root, description, complaints)
    description = description | {"splits": splits}
    tiles = tiles_of(pairs, description["tiles"]) if "tiles" in description else pairs
    homes = check_splits(root, splits, tiles, complaints)
    check_val(description, homes, source, complaints)
    if "scene" in description:
        check_scenes(description["scene"], homes, complaints)

    check_names(description["classes"], complaints)

    # Then the files, each read once.
    reading = reading_of(description, tiles, homes, complaints)
    findings = read_files(pairs, labels, reading, limit, complaints)
    if "tiles" in description:  # a file belongs to several splits: its tiles are counted
        check_images(findings, defaultdict(list), complaints)
        counts = attempt(tile_counts, tiles, homes, splits, labels, limit)
        images = {split: len(names_in(split, homes)) for split in splits}
    else:
        check_ground(pairs, homes, complaints)
        check_images(findings, homes, complaints)
        counts = split_counts(findings, homes, splits, len(labels.names))
        images = {split: sum(split in homes[n] for n in findings) for split in splits}
    if not isinstance(counts, BadInput):  # else inspect_pair has found the fault
        print_shares(counts, images, labels)
        unknown = complaints.has_error("no mask", "image", "mask", "split")
        if not unknown and len(findings) == len(pairs):
            everywhere = sum(finding.counts for finding in findings.values())
            check_absent(counts, everywhere, labels, complaints)
        check_ignored(counts, labels, complaints)
    few = len(names_in("train", homes)) < 2
    again, train = next_commands(root, description, source, flags, few)
    return complaints.show(len(pairs), again, good=train)


def next_commands(root: Path, description: dict, source: str, flags: list[str],
                  few: bool) -> tuple[str, str]:
    """What to type after errors, and without any; `few`: there is no image to hold out."""
    if description.get("variant"):
        flags = ["--variant", description["variant"], *flags]
    again = [check_command(root)]
    if source != "folder":
        again += ["--dataset", source]
    train = [script_command("train_seg.py"), "--dataset", source, "--root", quote(str(root))]
    train += flags
    if "val" not in description["splits"] and "select" not in description:
        train.append("--final" if few else "--val-frac 0.2")
    return " ".join([*again, *flags]), " ".join(train)


def check_names(classes: list[dict], complaints: Complaints) -> None:
    """Classes that are called as a draft calls them: a run keeps the names."""
    drafted = [c["name"] for c in classes if is_drafted(c)]
    if drafted:
        complaints.note("names", f"classes are called {', '.join(drafted[:3])} as in a draft; name them in "
                                 "dataset.json before you train: runs keep the names")


def read_files(pairs: dict, labels: Labels, reading: dict, limit: int | None,
               complaints: Complaints) -> dict[str, Finding]:
    """{name: what was found}, of all pairs or an even sample of `limit`."""
    names = even_sample(list(pairs), limit)
    if len(names) < len(pairs):
        complaints.note("limit", f"only {len(names)} of {len(pairs)} images and masks were read "
                                 "(--limit)")
    found = in_threads(lambda n: inspect_pair(*pairs[n], labels, reading), names, "files")
    return dict(zip(names, found))


def reading_of(description: dict, tiles: dict[str, tuple], homes: dict[str, list[str]],
               complaints: Complaints) -> dict:
    """"bands" and "input_range", whose percentiles become numbers: those of the training images."""
    reading = {key: description.get(key) for key in ("bands", "input_range")}
    word = reading["input_range"]
    if isinstance(word, str):
        train = [tiles[n] for n in names_in("train", homes)]
        found = attempt(percentile_range, word, train, reading["bands"])
        reading["input_range"] = None
        if isinstance(found, BadInput):
            complaints.error("range", found)
        else:
            reading["input_range"], (_, *constant) = found
            for line in constant:
                complaints.warning("range", line)
    return reading


def names_in(split: str, homes: dict[str, list[str]]) -> list[str]:
    """The names of a split."""
    return [n for n, splits in homes.items() if split in splits]


# ---- pairs

def check_pairs(root: Path, description: dict, complaints: Complaints) -> tuple[dict, dict]:
    """The pairs {name: (image, mask)} and the rules of the splits, without those for predict.py."""
    pairs, orphans = match_pairs(root, description)
    splits = dict(description["splits"])
    without = description.get("unlabelled", ())
    hidden = unlabelled(root, description, pairs)
    if hidden:
        complaints.note("hidden", f"{len(hidden)} images of {', '.join(without)} have no masks: "
                                  "for predict.py only")
        pairs = {n: pair for n, pair in pairs.items() if n not in hidden}
    of_split = split_names(root, description | {"splits": {s: splits[s] for s in without}}, pairs)
    for split in without:
        if not of_split[split]:
            del splits[split]
            if not hidden:
                complaints.note("hidden", f"no image of {split} is here; it has no masks for "
                                          "training anyway")
    unknown = unknown_files(root, description)
    if unknown:
        complaints.note("suffix", not_used(unknown))
    if "warning" in description:
        complaints.warning("known", description["warning"])
    for image, mask in pairs.values():
        if mask is None:
            complaints.error("no mask", f"{without_mask(image, description)}; "
                                        "correct \"masks\" in dataset.json or move the image away")
    for mask in orphans:
        complaints.warning("no image", f"{mask}: no image for it by {description['images']!r}; "
                                       "it is not used")
    return pairs, splits


# ---- splits

def check_splits(root: Path, splits: dict, pairs: dict[str, tuple],
                 complaints: Complaints) -> dict[str, list[str]]:
    """{name: its splits}, which should be one. `splits`: {split: rules}."""
    homes = {n: [] for n in pairs}
    for split, rules in splits.items():
        chosen = set()
        faults = []
        # Rule by rule: split_names stops at the first fault.
        for rule in rules if isinstance(rules, list) else [rules]:
            part = attempt(split_names, root, {"splits": {split: rule}}, pairs)
            if isinstance(part, BadInput):
                faults.append(part)
            else:
                chosen.update(part[split])
        if not chosen and not faults:
            faults.append(f"split {split!r} is empty; "
                          "name its images in dataset.json, or delete it")
        for fault in faults:
            complaints.error("split", fault)
        for n in chosen:
            homes[n].append(split)

    for n, several in homes.items():
        if len(several) > 1:
            complaints.error("twice", f"{n}: in the splits {' and '.join(several)}; "
                                      "leave it in one of them")
    nowhere = [n for n, several in homes.items() if not several]
    if nowhere:
        complaints.note("nowhere", f"in no split: {plural(len(nowhere), 'image')}, first {nowhere[0]}")
    if "train" not in splits:
        complaints.error("train", no_train(splits))
    return homes


def check_val(description: dict, homes: dict[str, list[str]], source: str,
              complaints: Complaints) -> None:
    """There is a val split, or one can be held out of train, as load_splits would."""
    train = names_in("train", homes)
    if "select" not in description:
        if "val" not in description["splits"]:
            complaints.warning("val", NO_VAL if len(train) > 1 else f"no val split: {ONE_IMAGE}")
        return
    # Hold out what training would: a regex that does not fit is then known now.
    complete = names_in("val", homes) and names_in("test", homes)
    if train and not complete:
        held = attempt(hold_out, train, description["select"], description.get("scene"), 0)
        if isinstance(held, BadInput):
            complaints.error("select", held)
        elif "scene" not in description and source == "folder":
            complaints.warning("val", f"a part of train is held out {BY_IMAGE}")


def check_scenes(scene: str, homes: dict[str, list[str]], complaints: Complaints) -> None:
    """Scenes with images in two splits: neighbours and video frames are no independent test."""
    splits_of = defaultdict(set)
    for n, splits in homes.items():
        found = attempt(scenes_of, [n], scene)  # names without a scene are in none
        if not isinstance(found, BadInput):
            splits_of[found[n]].update(splits)
    shared = sorted(s for s, splits in splits_of.items() if len(splits) > 1)
    if shared:
        where = ", ".join(sorted(splits_of[shared[0]]))
        complaints.warning("scene", f"{len(shared)} of {len(splits_of)} scenes are in several "
                                    f"splits, such as {shared[0]} in {where}: "
                                    "the scores say little about new scenes")


# ---- pixels of the classes

def split_counts(findings: dict[str, Finding], homes: dict[str, list[str]], splits: dict,
                 K: int) -> dict[str, np.ndarray]:
    """{split: (K+1,) pixels} of the masks that were read."""
    counts = {split: np.zeros(K + 1, np.int64) for split in splits}
    for n, finding in findings.items():
        for split in homes[n]:
            counts[split] = counts[split] + finding.counts
    return counts


def tile_counts(tiles: dict, homes: dict[str, list[str]], splits: dict, labels: Labels,
                limit: int | None) -> dict[str, np.ndarray]:
    """{split: (K+1,) pixels} of its tiles, of which several may lie in one file."""
    counts = {}
    for split in splits:
        members = {n: tiles[n] for n in names_in(split, homes)}
        counts[split] = class_counts(members, labels, limit).sum(0)
    return counts
