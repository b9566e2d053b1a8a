"""Propose a dataset.json for a folder: which mask belongs to which image, what the masks hold, who is in which split.

`python -m data.check ROOT` calls the functions in this order, prints what they found and writes the result:
    draft_patterns, [scan(mask) for each mask], count_values, values_table, draft_classes, listed_splits, folder_splits
Copy with: data/io.py
"""
import os
import re
from collections import Counter, defaultdict
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .common import BadInput
from .io import UNKNOWN, pack, palette_of, read_mask

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
MASK = re.compile(r"masks?|(?<!un)label[a-z]*|annot[a-z]*|segm[a-z]*|ground.?truth|"
                  r"(?<![a-z])(?:gts?|lbls?|ann|seg|targets?)(?![a-z])|_m$", re.I)
IMAGE = re.compile(r"image(?:s|ry)?|img|rgb(?:ir)?|irrg|photo|ortho|(?<![a-z])(?:src|sat|input)(?![a-z])", re.I)
# all that a name says beside the scene, with the signs around it: "_label_noBoundary"
WORDS = re.compile(rf"([\W_]*(?:(?:{MASK.pattern}|{IMAGE.pattern}|instance|colou?r|noboundary)[\W_]*)+)", re.I)
SPLIT = re.compile(r"(?<![a-z])(train|trn|val|dev|test)(?:ing|id|idation)?(?![a-z])", re.I)
SPLITS = {"train": "train", "trn": "train", "val": "val", "dev": "val", "test": "test"}
MAX_PATTERNS = 99  # more of them mean that the names follow no rule
STRAY = 1e-4  # a colour on a smaller share of all pixels comes from drawing or resizing and is hardly a class
MAX_STRAYS = 64  # more of them mean blurred masks, which no list of colours can mend
TABLE_ROWS = 40

Complaints = dict[tuple[str, str], list]  # {(level, kind): lines}, a defaultdict; level: note, warning or error


# ---- images and masks

def draft_patterns(root: Path, complaints: Complaints) -> dict:
    """{"images": pattern or list of patterns, "masks": the same} as in dataset.json."""
    images, masks = find_pictures(root)
    patterns, paired = propose(pair_up(images, masks))
    if not 0 < len(patterns) <= MAX_PATTERNS:
        raise BadInput(f"{root}: no rule by which images such as {[str(p) for p in images[:2]]} and masks such as "
                       f"{[str(p) for p in masks[:2]]} pair; give both the same name in folders images and masks")
    for kind, files in ("images", images), ("masks", masks):
        if rest := [p for p in files if p not in paired]:
            line = f"{len(rest)} {kind} are in no pair and not in the draft, first {rest[0]}"
            complaints["warning", "unused"].append(line)
    images, masks = zip(*patterns)
    return {"images": list(images), "masks": list(masks)} if patterns[1:] else {"images": images[0], "masks": masks[0]}


def find_pictures(root: Path) -> tuple[list[Path], list[Path]]:
    """Images and masks as paths relative to root, told apart by the words in their folders and names."""
    files = [p.relative_to(root) for p in sorted(root.rglob("*")) if p.suffix.lower() in PICTURES and p.is_file()]
    files = [p for p in files if not any(part.startswith((".", "__MACOSX")) for part in p.parts)]
    if not files:
        raise BadInput(f"{root}: no {' '.join(PICTURES)} file in it; type the folder that holds the images and masks")
    shared = len(Path(os.path.commonpath([p.parent for p in files])).parts)  # what holds all pictures tells none apart
    images, masks = [], []
    for p in files:
        (masks if any(map(MASK.search, [*p.parts[shared:-1], p.stem])) else images).append(p)
    if not masks:
        raise BadInput(f"{root}: {len(files)} pictures, but no folder or file name says mask, label, gt or the like; "
                       "rename the folder of masks to masks, or write dataset.json by hand (see data/datasets.py)")
    return images, masks


def pair_up(images: list[Path], masks: list[Path]) -> list[tuple[Path, Path]]:
    """Each mask with the images of its scene: several where a set brings infrared or overlays."""
    by_scene, pairs = defaultdict(list), []
    for p in images:
        by_scene[scene(p)].append(p)
    for m in masks:  # "Tile 1/masks/part_001" belongs to the part_001 that shares its folder "Tile 1"
        near = {p: len(set(p.parts[:-1]) & set(m.parts[:-1])) for p in by_scene[scene(m)]}
        most = max(near.values(), default=0)
        pairs += [(p, m) for p, n in near.items() if n == most]
    return pairs


def scene(file: Path) -> str:
    """The name without WORDS, or the folder's if nothing is left: "a_sat.jpg" -> "a", "b/image.png" -> "b/"."""
    # a slash for each gap, as between the stars of a pattern: "a_img_b" and "a_b_mask" would have no pattern in common
    name, *folders = ("/".join(filter(None, WORDS.split(part)[::2])) for part in (file.stem, *file.parts[-2::-1]))
    return name or next(filter(None, folders), "") + "/"


def propose(pairs: list[tuple[Path, Path]]) -> tuple[list[tuple[str, str]], set[Path]]:
    """Sorted [(pattern of images, pattern of masks)], the most frequent that share no file, and the files they pair."""
    groups, found, paired, seen = defaultdict(list), [], set(), set()
    for image, mask in pairs:
        groups[star_patterns(image, mask)].append((image, mask))

    def rank(patterns):  # largest group first; of equal ones, what a set would call its images and masks
        image, mask = patterns
        jpeg = mask.lower().endswith((".jpg", ".jpeg"))  # a preview: no mask survives JPEG
        return -len(groups[patterns]), jpeg, not IMAGE.search(image), len(image + mask), patterns

    for patterns in sorted(groups, key=rank):
        files = {p for pair in groups[patterns] for p in pair}
        if not files & seen:
            found.append(tuple(map(fill_in, patterns, zip(*groups[patterns]))))
            paired |= files
        seen |= files  # of rejected groups as well: a second set of masks must not end with the infrared images
    return sorted(found), paired


def star_patterns(image: Path, mask: Path) -> tuple[str, str]:
    """Patterns that pair these two: common folders and the scene become stars, the rest stays as it is."""
    # Train/ and Val/ keep their names: many sets come with a Test/ without masks, which a star would let in
    common = [a == b and not SPLIT.search(a) for a, b in zip(image.parts[:-1], mask.parts[:-1])]

    def stars(p):  # the pattern of one of the two
        folders = ["*" if same else part for part, same in zip_longest(p.parts[:-1], common)]
        name = "".join(t if i % 2 else t and "*" for i, t in enumerate(WORDS.split(p.stem)))
        return "/".join([*folders, ("*" if image.stem == mask.stem else name) + p.suffix])

    return stars(image), stars(mask)


def fill_in(pattern: str, files: tuple[Path]) -> str:  # a star that stands for one folder only becomes its name
    *folders, name = pattern.split("/")
    values = [{f.parts[i] for f in files} for i in range(len(folders))]
    return "/".join([*(v.pop() if len(v) == 1 else "*" for v in values), name])


# ---- classes

class Values(NamedTuple):
    """What the masks hold; values as dataset.json writes them: 3, or "#3C1098" where colours count."""
    pixels: Counter  # {value: its pixels}
    files: dict[int | str, list[Path]]  # {value: masks with it}
    colors: dict[int, dict]  # {id: {"color": "#3C1098"}} of palettes
    masks: int  # how many, also those that cannot be read
    kinds: Counter  # {kind: readable masks}


def scan(path: Path) -> tuple:
    """A mask's kind, its values (ids, or colours as one number) with their pixel counts, its palette."""
    mask, palette = read_mask(path), palette_of(path)
    kind = "palette" if palette is not None else "grey" if mask.ndim == 2 else "RGB"
    if kind == "RGB" and (mask == mask[..., :1]).all():
        kind = "grey RGB"
    return kind, *np.unique(pack(mask) if mask.ndim == 3 else mask, return_counts=True), palette


def count_values(scans: dict[Path, tuple | BadInput], complaints: Complaints) -> Values:
    """{mask: scan of it} -> Values, of ids if all masks agree on what an id is."""
    bad = [s for s in scans.values() if isinstance(s, BadInput)]
    if len(bad) == len(scans):
        raise BadInput(f"{bad[0]} (all {len(bad)} masks fail)")
    complaints["error", "mask"] += bad
    good = {file: s for file, s in scans.items() if not isinstance(s, BadInput)}
    kinds, painted = Counter(kind for kind, *_ in good.values()), defaultdict(set)  # id -> its colours in the palettes
    for kind, values, _, palette in good.values():
        for v in values.tolist() if kind == "palette" else ():
            painted[v].add(int(pack(palette[v])))
    # programs that reduce colours number them anew in every file: then the ids mean nothing and the colours count
    by_color = "RGB" in kinds or any(len(colors) > 1 for colors in painted.values())
    pixels, files = Counter(), defaultdict(list)
    for file, (kind, values, counts, palette) in good.items():
        if by_color and kind == "grey":
            complaints["error", "grey"].append(f"{file}: one band of ids {values[:8].tolist()} among masks of colours; "
                                               "save it in the colours of the others")
            continue
        if by_color and kind == "palette":
            values = pack(palette[values])
        elif not by_color:
            values = values & 255  # of three equal bands, one
        for v, n in zip(values.tolist(), counts.tolist()):
            value = f"#{v:06X}" if by_color else v
            pixels[value] += n
            files[value].append(file)
    ramp = all(colors == {v * 0x10101} for v, colors in painted.items())  # then the palette is no choice of colours
    colors = {} if by_color or ramp else {v: {"color": f"#{c:06X}"} for v, (c,) in painted.items()}
    return Values(pixels, files, colors, len(scans), kinds)


def values_table(root: Path, values: Values) -> list[str]:
    """Lines to print: the kinds of masks, then the values by falling share."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in values.kinds.most_common())
    lines = [f"{values.masks} masks read: {kinds}", f"{'value':>8} {'share':>9} {'files':>6}  first in"]
    for v, n in values.pixels.most_common(TABLE_ROWS):
        files = values.files[v]
        lines.append(f"{v:>8} {n / values.pixels.total():9.4%} {len(files):6d}  {files[0].relative_to(root)}")
    return lines


def draft_classes(values: Values, complaints: Complaints) -> tuple[list[dict], list[str]]:
    """"classes" by falling share, and "ignore"."""
    ranked = [v for v, _ in values.pixels.most_common()]
    few = STRAY * values.pixels.total()
    rare = [v for v in ranked if values.pixels[v] < few]
    by_color = isinstance(ranked[0], str)
    stray = rare if by_color else []  # a rare id is a rare class: nobody's brush mixes ids
    kept = [v for v in ranked if not by_color or values.pixels[v] >= few]
    if len(rare) > MAX_STRAYS or len(kept) > UNKNOWN:
        raise BadInput(f"{values.files[ranked[-1]][0]}: {len(ranked)} values in the masks, {len(rare)} of them rare: "
                       "blurred edges, or no masks at all; export them without anti-aliasing, resize them with nearest")
    if stray:
        line = f"the draft IGNORES {', '.join(stray)}: each under {STRAY:.2%} of the pixels; if one is a class, "
        complaints["warning", "stray"].append(f'{line}move it from "ignore" to "classes"')
    hint = 'is a class in the draft; if it means unlabelled or no data, move it from "classes" to "ignore"'
    void = [f"value {v} {hint}" for v in kept if v in (0, 255, "#000000")]
    binary = ["ids 0 and 255: binary masks; both are classes in the draft, 255 is not ignored"]
    complaints["note", "void"] += binary if set(ranked) == {0, 255} else void
    if by_color:
        return [{"name": f"class_{i}", "color": v} for i, v in enumerate(kept, 1)], stray
    return [{"name": f"id_{v}", "id": v, **values.colors.get(v, {})} for v in kept], stray


# ---- splits

def listed_splits(root: Path) -> dict[str, list[str]]:
    """{split: lists} from files such as ImageSets/trn.txt; {} without."""
    lists = {"train": [], "val": [], "test": []}
    for file in sorted(root.rglob("*.txt")):
        if found := SPLIT.fullmatch(file.stem):
            lists[SPLITS[found[1].lower()]].append(file.relative_to(root).as_posix())
    return {split: several for split, several in lists.items() if several}


def folder_splits(names: list[str], complaints: Complaints) -> dict[str, str | list[str]]:
    """Splits from folders such as train/; else the last folders are held out; {"train": "*"} with less than three."""
    rules = {"train": set(), "val": set(), "test": set()}
    for name in names:
        if found := SPLIT.search(name.rpartition("/")[0]):  # "a/train_1/b/7" -> "a/train_1/*"
            rules[SPLITS[found[1].lower()]].add(name[:name.index("/", found.end())] + "/*")
    if any(rules.values()):
        return {split: sorted(several) for split, several in rules.items() if several}
    folders = [Path(name).parent for name in names]
    depth = len(Path(os.path.commonpath(folders)).parts) + 1  # where they begin to differ
    groups = sorted({"/".join([*f.parts[:depth], "*"]) for f in folders}, key=natural)
    if len(groups) < 3:
        return {"train": "*"}
    k = max(1, len(groups) // 7)
    line = f"the draft splits by folders: the last {k} of {len(groups)} test, {k} before it val"
    complaints["note", "groups"].append(line)
    return {"train": groups[:-2 * k], "val": groups[-2 * k:-k], "test": groups[-k:]}


def natural(text: str) -> list:  # a sorting key: "Tile 9" before "Tile 10"
    return [int(t) if i % 2 else t for i, t in enumerate(re.split(r"(\d+)", text))]
