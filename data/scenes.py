"""Scene classification: class folders, splits without leaks, all images in one uint8 array, augmentation of batches.

    base, scenes, *rest = find_scenes("EuroSAT")              {"Forest/Forest_1.jpg": "Forest", ...}
    pixels, digests = decode_scenes(*files, side=None)        (N, S, S, 3) uint8; kept on disk by a data/cache.py Cache
    x = prepare(augment_scenes(torch.from_numpy(pixels[i]), draws, seed=0), NORMS["imagenet"])

Folders: ROOT/<class>/ with images at any depth, or ROOT/train/<class>/ with val and test beside it; EuroSAT's 2750/ is
found below any parent. A scene's name is its path below the base, suffix included.
"""
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .cache import Cache
from .common import BadInput
from .datasets import uncached
from .io import SUFFIXES, is_hidden, open_image, read_image

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
          "testing": "test"}
LARGEST = 224  # side to which images of other than one small square size are brought, unless told


def folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not is_hidden(p.name))


def base_of(root: str | Path) -> Path:
    """The folder whose sub-folders are the classes, or train, val and test: root, or the place below it."""
    base = Path(root).resolve()
    if not base.is_dir():
        raise BadInput(f"{root}: no such folder; expected one with a sub-folder of images per class")
    for place in (base / "2750", *sorted(base.glob("*/2750"))):  # EuroSAT as downloaded
        if place.is_dir():
            return place
    while len(inner := folders(base)) == 1 and folders(inner[0]):
        base = inner[0]
    return base


def find_scenes(root: str | Path) -> tuple[Path, dict[str, str], dict[str, list[str]], list[Path], list[str]]:
    """-> base, {name: class}, {split: names} where folders give splits, files that are no images, classes without any.
    """
    base, scenes, splits, stray, count = base_of(root), {}, {}, [], Counter()
    tops = folders(base)
    known = [top for top in tops if top.name.lower() in SPLITS]
    official = len(known) == len(tops)
    if not official and {SPLITS[top.name.lower()] for top in known} >= {"train", "val"}:
        other = next(top for top in tops if top not in known)
        raise BadInput(f"{other}: beside {known[0].name}/; move it away, or name --root the folder of classes")
    for top in tops:
        for folder in folders(top) if official else [top]:
            files = sorted(f for f in folder.rglob("*") if f.is_file() and not is_hidden(f.relative_to(base)))
            names = [f.relative_to(base).as_posix() for f in files if f.suffix.lower() in SUFFIXES]
            stray += [f for f in files if f.suffix.lower() not in SUFFIXES]
            scenes |= dict.fromkeys(names, folder.name)
            count[folder.name] += len(names)
            if official:
                splits.setdefault(SPLITS[top.name.lower()], []).extend(names)
    if not scenes:
        raise BadInput(f"{base}: no images in sub-folders; expected {base}/CLASS/NAME.jpg, or {base}/train/CLASS/...")
    return base, scenes, splits, stray, [name for name, n in count.items() if n == 0]


# ---- splits

def groups_of(names: list[str], regex: str | None) -> dict[str, str]:
    """{name: its group}: the regex's first group, or its match; without a regex every name is its own."""
    if not regex:
        return {n: n for n in names}
    try:
        found = {n: re.search(regex, n) for n in names}
    except re.error as e:
        raise BadInput(f"--group-regex {regex!r} is no regular expression: {e}") from None
    for n, match in found.items():
        if match is None:
            raise BadInput(f"--group-regex {regex!r} does not match {n!r}")
    return {n: match[1 if match.re.groups else 0] for n, match in found.items()}


def draw_splits(scenes: dict[str, str], groups: dict[str, str], shares: dict[str, float], seed: int) -> dict:
    """{split: names}: whole groups, large ones first, each to the split that is emptiest in its classes."""
    members, total = defaultdict(list), Counter(scenes.values())
    for n in sorted(scenes):
        members[groups[n]].append(n)
    room = {split: dict.fromkeys(total, 1.0) for split in shares}  # part of a split's share of a class, still empty
    order = np.random.default_rng((4, seed)).permutation(sorted(members)).tolist()
    home = {}
    for group in sorted(order, key=lambda g: -len(members[g])):  # stable: equal sizes stay shuffled
        count = Counter(scenes[n] for n in members[group])
        split = max(room, key=lambda s: sum(n / total[c] * room[s][c] for c, n in count.items()))
        home |= dict.fromkeys(members[group], split)
        for c, n in count.items():
            room[split][c] -= n / (shares[split] * total[c])
    return {split: [n for n in sorted(scenes) if home[n] == split] for split in shares}


def read_splits(path: str | Path, scenes: dict[str, str]) -> dict[str, list[str]]:
    """{split: names} of a JSON file, with names of scenes, each in one split only."""
    try:
        splits = {split: list(names) for split, names in json.loads(Path(path).read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise BadInput(f"{path}: {e}; expected JSON {{split: [names]}}") from None
    home = {}
    for split, names in splits.items():
        for n in names:
            if n not in scenes:
                raise BadInput(f"{path}: {n!r} is no image here; names look like {next(iter(scenes))!r}")
            if home.setdefault(n, split) != split:
                raise BadInput(f"{path}: {n!r} is in {home[n]!r} and {split!r}; leave it in one of them")
    return splits


def complete_splits(scenes: dict[str, str], given: dict[str, list[str]], shares: dict[str, float], groups: dict[str, str],
                seed: int) -> dict[str, list[str]]:
    """The given splits as far as they are in scenes; without any a draw of all; without val a part of train for it."""
    splits = {split: [n for n in names if n in scenes] for split, names in given.items()}
    if not given:
        splits = draw_splits(scenes, groups, {split: share for split, share in shares.items() if share}, seed)
        if empty := [split for split in ("train", "val") if not splits[split]]:
            raise BadInput(f"{len(set(groups.values()))} scenes leave {empty[0]} empty; change --group-regex or "
                           "--fractions, or give --split-file")
    if not splits.get("train"):
        raise BadInput(f"splits {', '.join(given)}: no images in train; expected train, val and test")
    if not splits.get("val"):
        part = {n: scenes[n] for n in splits["train"]}
        total = shares["train"] + shares["val"]
        splits |= draw_splits(part, groups, {split: shares[split] / total for split in ("train", "val")}, seed)
    return splits


def check_classes(splits: dict[str, list[str]], scenes: dict[str, str], classes: list[str]) -> list[str]:
    """Warnings about classes that a split lacks; train must have all of them, and no split any other."""
    warnings = []
    for split, names in splits.items():
        there = {scenes[n] for n in names}
        if unknown := sorted(there - set(classes)):
            raise BadInput(f"class {unknown[0]!r} is in {split} but not in train; add images of it to train, or name "
                           "the classes to take: --classes A B C")
        absent = [c for c in classes if c not in there]
        if absent and split == "train":
            raise BadInput(f"class {absent[0]!r} has no image in train; add some, or leave it out of --classes")
        if absent:
            warnings.append(f"no image of {', '.join(absent)} in {split}: not in its macro F1")
    if not 2 <= len(classes) <= 254:
        raise BadInput(f"{len(classes)} classes ({', '.join(classes[:3])}); expected 2 to 254 sub-folders of --root")
    return warnings


def few(names: list[str], scenes: dict[str, str], n: int, seed: int) -> list[str]:
    """n names per class: the first n of one order per seed, so that a smaller subset lies inside a larger one."""
    by_class = defaultdict(list)
    for name in sorted(names):
        by_class[scenes[name]].append(name)
    keep = {v for part in by_class.values() for v in np.random.default_rng((5, seed)).permutation(part)[:n].tolist()}
    return [name for name in names if name in keep]


# ---- pixels

def square(image: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (side, side, 3): the middle square, scaled; never squashed."""
    h, w = image.shape[:2]
    if h == w == side:
        return image
    s = min(h, w)
    box = (w - s) // 2, (h - s) // 2, (w - s) // 2 + s, (h - s) // 2 + s
    return np.asarray(Image.fromarray(image).resize((side, side), Image.BICUBIC, box))


def decode_scenes(*paths: Path, side: int | None = None, bands: list[int] | None = None,
                  input_range: list[float] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """-> (N, S, S, 3) uint8 and (N, 16) uint8 digests of the images as stored, all 0 for one that cannot be read.

    S: the images' own side if all are equal squares of at most `side` or LARGEST; else that, by square().
    """
    def size(path):
        try:
            return open_image(path, deep=input_range is not None).size
        except BadInput:
            return None

    def decode(i):
        try:
            image = read_image(paths[i], bands, input_range)
        except BadInput:
            return
        digests[i] = np.frombuffer(hashlib.blake2b(image, digest_size=16, key=str(image.shape).encode()).digest(), "u1")
        pixels[i] = square(image, S)

    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:  # Pillow lets go of the GIL
        sizes = {s for s in pool.map(size, paths) if s}
        own = {v for s in sizes for v in s}
        S = own.pop() if len(own) == 1 and max(own) <= (side or LARGEST) else side or LARGEST
        pixels, digests = np.zeros((len(paths), S, S, 3), np.uint8), np.zeros((len(paths), 16), np.uint8)
        list(pool.map(decode, range(len(paths))))
    return pixels, digests


def twins(digests: np.ndarray) -> list[list[int]]:
    """Digests (N, 16) -> indices of equal images, each group in rising order; unreadable ones (0) have no twins."""
    seen = defaultdict(list)
    for i, d in enumerate(map(bytes, digests)):
        if any(d):
            seen[d].append(i)
    return [group for group in seen.values() if len(group) > 1]


def faults(base: Path, scenes: dict[str, str], digests: np.ndarray, reading: dict) -> tuple[dict, dict]:
    """-> {name: why it cannot be used}: unreadable, or the same picture under two classes; {name: whose copy it is}."""
    names, bad, copies = list(scenes), {}, {}
    for i in np.flatnonzero(~digests.any(1)):
        try:
            read_image(base / names[i], **reading)
        except BadInput as e:
            bad[names[i]] = str(e)
        else:  # a network disk that hung, or a newer Pillow
            bad[names[i]] = f"{base / names[i]}: could not be read when the cache was made; type --cache off"
    for group in twins(digests):
        first, *others = (names[i] for i in group)
        if len({scenes[names[i]] for i in group}) == 1:
            copies |= {n: f"{base / n}: the same picture as {first}" for n in others}
        else:
            why = f"{len(group)} equal pictures in different classes; leave them in one"
            bad |= {n: f"{base / n}: the same picture as {first}: {why}" for n in others}
            bad[first] = f"{base / first}: the same picture as {others[0]}: {why}"
    return bad, copies


def augment_scenes(x: torch.Tensor, draws: list[int], seed: int, shift: int = 4) -> torch.Tensor:
    """(B, S, S, 3) uint8 on any device -> the same: one of the 8 symmetries of the square and a shift by up to `shift`
    pixels (mirrored at the border), all in one gather. What a sample gets is a function of (seed, its draw) alone."""
    B, S = x.shape[:2]
    shift = min(shift, S - 1)
    dice = np.stack([np.random.default_rng((2, seed, draw)).integers([2, 2, 2, 2 * shift + 1, 2 * shift + 1])
                     for draw in draws])  # (B, 5)
    dice = torch.from_numpy(dice).to(x.device)
    place = (torch.arange(S, device=x.device) + dice[:, 3:, None] - shift).abs()  # (B, 2, S): which row, which column
    place = S - 1 - (S - 1 - place).abs()
    place = torch.where(dice[:, 1:3, None] == 1, S - 1 - place, place)
    rows, columns = place[:, 0, :, None].expand(B, S, S), place[:, 1, None, :].expand(B, S, S)
    turned = dice[:, 0, None, None] == 1  # transposed
    rows, columns = torch.where(turned, rows.mT, rows), torch.where(turned, columns.mT, columns)
    return x[torch.arange(B, device=x.device)[:, None, None], rows, columns]


def prepare(x: torch.Tensor, norm: tuple, side: int | None = None) -> torch.Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, side, side) float32, normalised by norm = (mean, std), channels last in memory."""
    x = x.permute(0, 3, 1, 2).float().div_(255)
    if side not in (None, x.shape[-1]):
        x = F.interpolate(x, (side, side), mode="bicubic", align_corners=False, antialias=True).clamp_(0, 1)
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in norm)
    return x.sub_(mean).div_(std)


# ---- opened

class Scenes:
    """Class folders, opened: images, classes and splits. Faults in the files are BadInputs.

    .pixels (N, S, S, 3) uint8 and .digests of all images; per split .splits (names), .rows (places in
    .pixels) and .y (class numbers); .names of the classes; .reports, the split that is reported.

    classes: those to take, in this order; without them all of train. size: side that larger images get.
    fractions: shares of train, val and test for a drawn split; scene: regex of what it keeps together.
    per_class: so many training images per class, by seed. fixed: splits are a run's own, as they are.
    """

    def __init__(self, root: str | Path, classes: list[str] | None = None,
                 split_file: str | Path | None = None, fractions: list[float] = (0.6, 0.2, 0.2),
                 split_seed: int = 0, scene: str | None = None, per_class: int | None = None,
                 seed: int = 0, fixed: bool = False, skip_bad: bool = False,
                 bands: list[int] | None = None, input_range: list[float] | None = None,
                 size: int | None = None, cache: str | None = None):
        self.base, found, given, stray, empty = find_scenes(root)
        self.dataset = "eurosat" if self.base.name == "2750" else self.base.name
        self.reading = dict(bands=bands, input_range=input_range)
        self.notes = [f"note: {file}: no image, ignored" for file in stray]
        check_asked(self.base, classes, found)
        if empty and not classes:
            if not skip_bad:
                raise BadInput(f"{self.base}: class folder {empty[0]!r} holds no image; fill it or "
                               "remove it, or name the classes to take: --classes A B C")
            self.notes.append(f"left out: {', '.join(empty)}: class folders without an image")
        scenes = {n: c for n, c in found.items() if not classes or c in classes}

        # Pixels of all images, kept on disk as one array.
        self.keep = uncached if cache == "off" else Cache(cache)
        decode = partial(decode_scenes, side=size, **self.reading)
        paths = tuple(self.base / name for name in scenes)
        tag = f"scenes 1 {size} {self.reading}"
        self.pixels, digests = self.keep(paths, decode, tag)
        self.all = list(scenes)
        at = {name: row for row, name in enumerate(scenes)}

        # What cannot be used.
        faulty, copies = faults(self.base, scenes, digests, self.reading)
        if faulty and not skip_bad:
            raise BadInput(f"{next(iter(faulty.values()))} ({len(faulty)} such files; --skip-bad "
                           "leaves them out)")
        self.notes += [f"note: {why}; left out" for why in copies.values()]
        self.notes += [f"left out: {why}" for why in faulty.values()]
        self.left_out = faulty | copies
        scenes = {n: c for n, c in scenes.items() if n not in self.left_out}

        self.groups = groups_of(list(scenes), scene)
        shares = dict(zip(("train", "val", "test"), fractions))
        if split_file:
            given = read_splits(split_file, found)
        if not given and not scene:
            self.notes.append("random split without --group-regex: neighbouring scenes may stand "
                              "on both sides")
        self.splits = complete_splits(scenes, given, shares, self.groups, split_seed)
        self.names = classes or sorted({scenes[n] for n in self.splits["train"]})
        self.notes += [f"WARNING {line}"
                       for line in check_classes(self.splits, scenes, self.names)]
        if per_class and not fixed:
            self.splits["train"] = few(self.splits["train"], scenes, per_class, seed)
        self.reports = "test" if self.splits.get("test") else "val"

        number = {name: i for i, name in enumerate(self.names)}
        self.rows, self.y = {}, {}
        for split, names in self.splits.items():
            self.rows[split] = np.array([at[n] for n in names])
            self.y[split] = torch.tensor([number[scenes[n]] for n in names])

    def images(self, split: str) -> np.ndarray:
        """(n, S, S, 3) uint8 of a split."""
        return self.pixels[self.rows[split]]

    def about(self) -> dict:
        """What a run's files say of its data."""
        splits = {split: hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
                  for split, names in self.splits.items()}
        return dict(classes=[{"name": c} for c in self.names], dataset=self.dataset,
                    root=str(self.base), chosen_on="val", reported=self.reports,
                    reading=self.reading, stored=self.pixels.shape[1], splits=splits)


def check_asked(base: Path, classes: list[str] | None, found: dict[str, str]) -> None:
    """BadInput where --classes names one twice, or one that is not there."""
    there = sorted(set(found.values()))
    for name in classes or ():
        if name not in there:
            raise BadInput(f"--classes {name}: not there; {base} has {', '.join(there)}")
        if classes.count(name) > 1:
            raise BadInput(f"--classes names {name} twice; leave one of them out")
