"""Who is in which split, as a draft proposes it.

    splits = listed_splits(root) or folder_splits(names, complaints)
    more = propose_hold_out(names of train, complaints)    {"select": 0.2, "scene": regex}
"""
import glob
import os
import re
from collections import Counter
from pathlib import Path, PurePosixPath

from ..common import BadInput
from ..datasets import ONE_IMAGE, scenes_of
from ..files import match
from .complaints import Complaints, attempt
from .patterns import SPLIT

SPLITS = {"train": "train", "trn": "train", "val": "val", "dev": "val", "test": "test"}
BY_IMAGE = ('image by image, so neighbours may stand on both sides: list whole scenes under "val" in '
            'dataset.json, or write "scene": REGEX, which finds the scene in a name')
SELECT = 0.2  # the share of train held out where there is no val split
# Where a name says its scene, the coarsest first: the folder; all before two trailing numbers, as
# in "area1_x0_y512" and "sheet_3_12"; all before one.
SCENES = (r"(.*)/[^/]*$", r"(.*?)[_-]?[xyrc]?\d+[_-][xyrc]?\d+$", r"(.*?)[_-]?\d+$")


def listed_splits(root: Path) -> dict[str, list[str]]:
    """{split: lists} from files such as ImageSets/trn.txt; {} without."""
    lists = {"train": [], "val": [], "test": []}
    for file, _ in match(root, "**/*.txt"):
        found = SPLIT.fullmatch(file.stem)
        if found:
            lists[SPLITS[found[1].lower()]].append(file.relative_to(root).as_posix())
    return {split: several for split, several in lists.items() if several}


def folder_splits(names: list[str], complaints: Complaints) -> dict[str, str | list[str]]:
    """Splits from folders such as train/; else the last folders are held out.

    {"train": "*"} with less than three folders, or with images beside the folders.
    """
    rules = {"train": set(), "val": set(), "test": set()}
    rest = []
    for name in names:
        found = SPLIT.search(name.rpartition("/")[0])
        if found:  # "a/train_1/b/7" -> "a/train_1/*"
            folder = name[:name.index("/", found.end())]
            rules[SPLITS[found[1].lower()]].add(in_folder(folder))
        else:
            rest.append(name)
    if not rules["train"] and (rules["val"] or rules["test"]):
        rules["train"] = rules_for(rest, names)  # "img" beside "test_img" is what to learn from
    # "test" alone, in the folders of all images, tells none apart.
    if rules["train"] or (rules["val"] and rules["test"]):
        return {split: sorted(several) for split, several in rules.items() if several}

    # Otherwise each folder counts as a place: the same place in two splits would help the score.
    folders = [Path(name).parent for name in names]
    depth = len(Path(os.path.commonpath(folders)).parts) + 1  # where they begin to differ
    groups = {"/".join(f.parts[:depth]) for f in folders}
    # No pattern means the images of a folder without those of its sub-folders.
    nested = any(len(f.parts) < depth for f in folders)
    if len(groups) < 3 or nested:
        return {"train": "*"}
    groups = [in_folder(group) for group in sorted(groups, key=natural)]
    k = max(1, len(groups) // 7)
    complaints.note("groups", f"the draft splits by folders: the last {k} of {len(groups)} test, "
                              f"{k} before it val")
    return {"train": groups[:-2 * k], "val": groups[-2 * k:-k], "test": groups[-k:]}


def no_train(splits: dict) -> str:
    """The complaint about splits without one to learn from."""
    return (f"no train split, only {', '.join(splits)}; name the images to learn from under "
            '"train" in dataset.json')


def rules_for(some: list[str], names: list[str]) -> set[str]:
    """Rules for some of the names and no other: folders, or names where others lie in one, too."""
    mixed = {"."}
    for other in set(names) - set(some):
        mixed.update(str(folder) for folder in PurePosixPath(other).parents)
    rules = set()
    for name in some:
        folder = str(PurePosixPath(name).parent)
        rules.add(glob.escape(name) if folder in mixed else in_folder(folder))
    return rules


def in_folder(folder: str) -> str:
    """The pattern of all in a folder, whose own name may have brackets."""
    return f"{glob.escape(folder)}/*"


def natural(text: str) -> list:
    """A sorting key: "Tile 9" before "Tile 10"."""
    parts = re.split(r"(\d+)", text)
    parts[1::2] = map(int, parts[1::2])
    return parts


def propose_hold_out(names: list[str], complaints: Complaints) -> dict:
    """"select", and "scene" where the names say it; both stand in dataset.json.

    {} where nothing can be held out.
    """
    if len(names) < 2:
        complaints.warning("val", f"no val split: {ONE_IMAGE}")
        return {}
    share = f"no val split: the draft holds out {SELECT:.0%} of train to choose the weights"
    for regex in SCENES:
        scenes = attempt(scenes_of, names, regex)
        if isinstance(scenes, BadInput):  # a name without a match
            continue
        size = Counter(scenes.values())
        # One scene with most of the images cannot be held out, nor all the others.
        largest = max(size.values())
        if 3 <= len(size) < len(names) and largest <= len(names) / 2:
            complaints.note("val", f"{share}, whole scenes by \"scene\": {len(size)} of them, such "
                                   f"as {min(size)!r}; correct it if a scene is something else")
            return {"select": SELECT, "scene": regex}
    complaints.warning("val", f"{share}, {BY_IMAGE}")
    return {"select": SELECT}
