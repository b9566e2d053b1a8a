"""Scene classification: class folders, splits without leaks, all images in one uint8 array, augmentation.

    d = Scenes("EuroSAT")                       d.pixels (N, S, S, 3) uint8, d.splits, d.rows, d.y, d.names
    x = augment_scenes(torch.from_numpy(d.images("train")[:8]), draws, seed=0)
    x = prepare(x, NORMS["imagenet"])           (B, 3, S, S) float32

Folders: ROOT/<class>/ with images at any depth, or ROOT/train/<class>/ with val and test beside it;
EuroSAT's 2750/ is found below any parent. A scene's name is its path below the base, suffix included.
"""
import hashlib
import os
import shlex
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .cache import Cache
from .common import BadInput, as_bytes, as_text, nfc, plural, read_text
from .datasets import read_split_file, script_command, search_all, uncached
from .files import check_folder, folders, images_in, not_used
from .fingerprint import fingerprint, prints_of_run
from .io import in_range, read_image, stored_colours
from .ranges import percentile_range, range_of_run
from .raster import kinds_of, open_raster

# How folders may call the three splits.
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
          "test": "test", "testing": "test"}
FRACTIONS = 0.6, 0.2, 0.2  # of every class for train, val and test, where nothing else divides
LARGEST = 224  # side to which images of other than one small square size are brought, unless told


# ---- folders

def base_of(root: str | Path) -> Path:
    """The folder whose sub-folders are the classes, or train, val and test: root, or the place below it."""
    check_folder(root)
    base = Path(root).resolve()
    for place in (base / "2750", *sorted(base.glob("*/2750"))):  # EuroSAT as downloaded
        if place.is_dir():
            return place
    inner = folders(base)
    while len(inner) == 1 and folders(inner[0]):
        base = inner[0]
        inner = folders(base)
    return base


def find_scenes(root: str | Path) -> tuple[Path, dict[str, str], dict[str, list[str]], list[str],
                                           list[str]]:
    """-> base, {name: class}, {split: names} if folders give splits, notes on files left out, empty classes."""
    base = base_of(root)
    description = Path(root) / "dataset.json"
    if description.exists() and '"masks"' in read_text(description):
        raise BadInput(f"{root}: its dataset.json describes images and masks; type "
                       f"{script_command('train_seg.py')} --root {shlex.quote(str(root))}")
    tops = folders(base)
    known = [top for top in tops if top.name.lower() in SPLITS]
    official = len(known) == len(tops)
    if not official and {SPLITS[top.name.lower()] for top in known} >= {"train", "val"}:
        other = [top for top in tops if top not in known][0]
        raise BadInput(f"{other}: beside {known[0].name}/; move it away, or name --root the folder "
                       "of classes")
    images, others = images_in(base)
    level = 1 if official else 0  # of the class folders
    scenes, splits, loose = {}, {}, []
    for file in images:
        place = file.relative_to(base)
        if len(place.parts) < level + 2:
            loose.append(file)
            continue
        scenes[place.as_posix()] = nfc(place.parts[level])
        if official:
            splits.setdefault(SPLITS[place.parts[0].lower()], []).append(place.as_posix())
    notes = [not_used(others)] if others else []
    if not scenes:
        if loose and base.name != "2750" and all(file.parent == base for file in loose):
            parent = shlex.quote(str(base.parent))
            notes.append(f"{plural(len(loose), 'image')} in it: is it a class, and --root {parent}?")
        raise BadInput("; ".join([f"{base}: no images in sub-folders", *notes, "expected "
                                  f"{base}/CLASS/NAME.jpg, or {base}/train/CLASS/..."]))
    if loose:
        notes.append(f"{len(loose)} images lie in no class folder, first {loose[0]}")
    places = tops
    if official:
        places = [folder for top in tops for folder in folders(top)]
    filled = set(scenes.values())
    empty = [folder.name for folder in places if nfc(folder.name) not in filled]
    return base, scenes, splits, notes, empty


# ---- splits

def groups_of(names: list[str], regex: str | None) -> dict[str, str]:
    """{name: its group}: the regex's first group, or its match; without a regex every name is its own."""
    if not regex:
        return {name: name for name in names}
    groups = {}
    for name, match in search_all(regex, names, "--group-regex").items():
        if match is None:
            raise BadInput(f"--group-regex {regex!r} does not match {name!r}")
        groups[name] = match[min(1, match.re.groups)] or ""  # of an optional group
    return groups


def draw_splits(scenes: dict[str, str], groups: dict[str, str], shares: dict[str, float],
                seed: int) -> dict[str, list[str]]:
    """{split: names}: whole groups, large ones first, each to the split that is emptiest in its classes."""
    total = Counter(scenes.values())
    members = defaultdict(list)
    for name in sorted(scenes):
        members[groups[name]].append(name)
    # Which part of a split's share of a class is still empty.
    room = {split: dict.fromkeys(total, 1.0) for split in shares}
    order = np.random.default_rng((4, seed)).permutation(sorted(members)).tolist()
    order.sort(key=lambda group: -len(members[group]))  # stable: equal sizes stay shuffled
    home = {}
    for group in order:
        count = Counter(scenes[name] for name in members[group])

        def fits(split):
            return sum(n / total[c] * room[split][c] for c, n in count.items())

        split = max(room, key=fits)
        home |= dict.fromkeys(members[group], split)
        for c, n in count.items():
            room[split][c] -= n / (shares[split] * total[c])
    return {split: [name for name in sorted(scenes) if home[name] == split] for split in shares}


def complete_splits(scenes: dict[str, str], given: dict[str, list[str]], shares: dict[str, float],
                    groups: dict[str, str], seed: int) -> dict[str, list[str]]:
    """The given splits as far as they are in scenes; without any a draw of all; without val a part of train."""
    splits = {}
    for split, names in given.items():
        splits[split] = [name for name in names if name in scenes]
    if not given:
        wanted = {split: share for split, share in shares.items() if share}
        splits = draw_splits(scenes, groups, wanted, seed)
        for split in ("train", "val"):
            if not splits[split]:
                raise BadInput(f"{len(set(groups.values()))} scenes leave {split} empty; change "
                               "--group-regex or --fractions, or give --split-file")
    if not splits.get("train"):
        raise BadInput(f"splits {', '.join(given)}: no images in train; expected train, val and "
                       "test")
    if not splits.get("val"):
        part = {name: scenes[name] for name in splits["train"]}
        both = shares["train"] + shares["val"]
        wanted = {split: shares[split] / both for split in ("train", "val")}
        splits |= draw_splits(part, groups, wanted, seed)
    if not splits["val"]:
        raise BadInput(f"{len(splits['train'])} training images leave val empty; add images, or "
                       "give --split-file")
    return splits


def check_classes(splits: dict[str, list[str]], scenes: dict[str, str],
                  classes: list[str]) -> list[str]:
    """Warnings about classes that a split lacks; train must have all of them, and no split any other."""
    warnings = []
    for split, names in splits.items():
        there = {scenes[name] for name in names}
        unknown = sorted(there - set(classes))
        if unknown:
            raise BadInput(f"class {unknown[0]!r} is in {split} but not in train; add images of it "
                           "to train, or name the classes to take: --classes A B C")
        absent = [c for c in classes if c not in there]
        if absent and split == "train":
            raise BadInput(f"class {absent[0]!r} has no image in train; add some, or leave it out "
                           "of --classes")
        if absent:
            warnings.append(f"no image of {', '.join(absent)} in {split}: not in its macro F1")
    if not 2 <= len(classes) <= 254:
        raise BadInput(f"{len(classes)} classes ({', '.join(classes[:3])}); expected 2 to 254 "
                       "sub-folders of --root")
    return warnings


def few(names: list[str], scenes: dict[str, str], n: int, seed: int) -> list[str]:
    """n names per class: the first n of one order per seed, so that a smaller subset lies inside a larger one."""
    by_class = defaultdict(list)
    for name in sorted(names):
        by_class[scenes[name]].append(name)
    keep = set()
    for part in by_class.values():
        order = np.random.default_rng((5, seed)).permutation(part)
        keep |= set(order[:n].tolist())
    return [name for name in names if name in keep]


# ---- pixels

def square(image: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (side, side, 3): the middle square, scaled; never squashed."""
    h, w = image.shape[:2]
    if h == w == side:
        return image
    s = min(h, w)
    left, top = (w - s) // 2, (h - s) // 2
    box = left, top, left + s, top + s
    return np.asarray(Image.fromarray(image).resize((side, side), Image.BICUBIC, box))


def digest_of(image: np.ndarray) -> np.ndarray:
    """(16,) uint8, equal for equal pictures."""
    size = str(image.shape).encode()
    digest = hashlib.blake2b(image, digest_size=16, key=size).digest()
    return np.frombuffer(digest, np.uint8)


def decode_scenes(*paths: Path, side: int | None = None, bands: list[int] | None = None,
                  input_range: list[float] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> (N, S, S, 3) uint8; (N, 16) uint8 digests of the images as stored, all 0 for an unreadable one;
    (n, 2) uint16 bands and bits of every kind of image: see raster.check_kind().

    S: the images' own side if all are equal squares of at most `side` or LARGEST; else that, by square().
    """
    largest = side or LARGEST

    def look(path):
        try:
            raster = open_raster(path)
        except BadInput:
            return
        sides.update(raster.shape[:2])
        kinds.update(kinds_of(raster))

    def decode(i):
        try:
            stored, _ = stored_colours(paths[i], bands)
            image = in_range(stored, input_range, paths[i])
        except BadInput:
            return  # its digest stays 0
        # Of the values as stored: all that lies above the input range would look alike.
        digests[i] = digest_of(np.ascontiguousarray(stored))
        pixels[i] = square(image, S)

    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:  # Pillow lets go of the GIL
        sides, kinds = set(), set()
        list(pool.map(look, paths))  # list(): waits until all are read
        S = largest
        if len(sides) == 1 and max(sides) <= largest:
            S = max(sides)
        pixels = np.zeros((len(paths), S, S, 3), np.uint8)
        digests = np.zeros((len(paths), 16), np.uint8)
        list(pool.map(decode, range(len(paths))))
    return pixels, digests, np.array(sorted(kinds), np.uint16)


def twins(digests: np.ndarray) -> list[list[int]]:
    """Digests (N, 16) -> indices of equal images, each group in rising order; unreadable ones (0) have no twins."""
    seen = defaultdict(list)
    for i, digest in enumerate(map(bytes, digests)):
        if any(digest):
            seen[digest].append(i)
    return [group for group in seen.values() if len(group) > 1]


def faults(base: Path, scenes: dict[str, str], digests: np.ndarray,
           reading: dict) -> tuple[dict[str, str], dict[str, str]]:
    """-> {name: why it cannot be used}: unreadable, or one picture under two classes; {name: whose copy it is}."""
    names = list(scenes)
    bad, copies = {}, {}
    for i in np.flatnonzero(~digests.any(1)):
        file = base / names[i]
        try:
            read_image(file, **reading)
        except BadInput as e:
            bad[names[i]] = str(e)
        else:  # a network disk that hung, or a newer Pillow
            bad[names[i]] = (f"{file}: could not be read when the cache was made; type --cache off")
    for group in twins(digests):
        first, *others = [names[i] for i in group]
        if len({scenes[names[i]] for i in group}) == 1:
            for name in others:
                copies[name] = f"{base / name}: the same picture as {first}"
            continue
        why = f"{len(group)} equal pictures in different classes; leave them in one"
        for name in others:
            bad[name] = f"{base / name}: the same picture as {first}: {why}"
        bad[first] = f"{base / first}: the same picture as {others[0]}: {why}"
    return bad, copies


def augment_scenes(x: Tensor, draws: list[int], seed: int, side: int) -> Tensor:
    """(B, S, S, 3) uint8 on any device -> (B, side, side, 3): random windows, turned and flipped.

    One of the 8 symmetries of the square, all in one gather. What a sample gets is a function of
    (seed, its draw) alone.
    """
    B, S = x.shape[:2]
    # Per sample: transposed? flipped along y, along x? first row and column of the window
    sides = [2, 2, 2, S - side + 1, S - side + 1]
    dice = [np.random.default_rng((2, seed, draw)).integers(sides) for draw in draws]
    dice = torch.from_numpy(np.stack(dice)).to(x.device, non_blocking=True)  # (B, 5)
    transposed = dice[:, 0, None, None] == 1
    flipped = dice[:, 1:3, None] == 1
    first = dice[:, 3:, None]

    # Which row and which column each pixel comes from, (B, 2, side).
    place = torch.arange(side, device=x.device)
    place = torch.where(flipped, side - 1 - place, place) + first
    rows = place[:, 0, :, None].expand(B, side, side)
    columns = place[:, 1, None, :].expand(B, side, side)
    rows = torch.where(transposed, rows.mT, rows)
    columns = torch.where(transposed, columns.mT, columns)
    return x[torch.arange(B, device=x.device)[:, None, None], rows, columns]


def prepare(x: Tensor, norm: tuple, side: int | None = None) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, side, side) float32, normalised by norm = (mean, std), channels last in memory."""
    x = x.permute(0, 3, 1, 2).float().div_(255)
    if side not in (None, x.shape[-1]):
        x = F.interpolate(x, (side, side), mode="bicubic", align_corners=False, antialias=True)
        x = x.clamp_(0, 1)
    # Not made on the device, which would wait for the copy.
    mean, std = (torch.tensor(v).view(1, 3, 1, 1).to(x.device, non_blocking=True) for v in norm)
    return x.sub_(mean).div_(std)


# ---- opened

class Scenes:
    """Class folders, opened: images, classes and splits. Faults in the files are BadInputs.

    .pixels (N, S, S, 3) uint8 and .digests of all images; per split .splits (names), .rows (places in
    .pixels) and .y (class numbers); .names of the classes; .reports, the split that is reported.

    classes: those to take, in this order; without them all of train. size: side that larger images get.
    fractions: shares of train, val and test for a drawn split; scene: regex of what it keeps together.
    per_class: so many training images per class, by seed. resume: a run folder, whose split.json
    counts as it is. bands, input_range, .reading, .percentiles: as of data/source.py.
    """

    def __init__(self, root: str | Path, classes: list[str] | None = None,
                 split_file: str | Path | None = None, fractions: list[float] = FRACTIONS,
                 split_seed: int = 0, scene: str | None = None, per_class: int | None = None,
                 seed: int = 0, resume: str | None = None, skip_bad: bool = False,
                 bands: list[int] | None = None, input_range: list | str | None = None,
                 size: int | None = None, cache: str | None = None):
        self.base, found, given, notes, empty = find_scenes(root)
        self.dataset = "eurosat" if self.base.name == "2750" else as_text(self.base.name)
        self.percentiles = None
        if isinstance(input_range, str):
            self.percentiles = input_range
        if self.percentiles and resume:
            input_range = range_of_run(resume)
        self.reading = dict(bands=bands, input_range=input_range)
        self.prints = None  # of files.json of a run that goes on
        if resume:
            self.prints, more = prints_of_run(resume, self.base)
            notes = notes + more
        self.notes = [f"note: {line}" for line in notes]
        classes = classes and [nfc(name) for name in classes]
        check_asked(self.base, classes, found)
        if empty and not classes:
            if not skip_bad:
                why = "; ".join([f"class folder {empty[0]!r} holds no image", *notes])
                raise BadInput(f"{self.base}: {why}; fill it or remove it, or name the classes to "
                               "take: --classes A B C")
            self.notes.append(f"left out: {', '.join(empty)}: class folders without an image")
        scenes = {n: c for n, c in found.items() if not classes or c in classes}

        if resume:
            split_file = f"{resume}/split.json"
        if split_file:
            given = read_split_file(split_file, {n: (self.base / n, None) for n in found})
        if given.get("train") and given.get("val") and not resume:
            drawn = {"--fractions": tuple(fractions) != FRACTIONS, "--split-seed": split_seed != 0}
            for flag, typed in drawn.items():
                if typed:
                    raise BadInput(f"{flag}: nothing is drawn, {split_file or self.base} has train and "
                                   "val; leave it out")
        shares = dict(zip(("train", "val", "test"), fractions))
        some = None if resume else per_class

        def divide(scenes):
            """{split: names}, with `per_class` of each class in train."""
            self.groups = groups_of(list(scenes), scene)
            splits = complete_splits(scenes, given, shares, self.groups, split_seed)
            if some:
                splits["train"] = few(splits["train"], scenes, some, seed)
            return splits

        # Pixels of all images, kept on disk as one array.
        self.keep = uncached if cache == "off" else Cache(cache)
        self.all = list(scenes)
        at = {name: row for row, name in enumerate(scenes)}
        measured = self.percentiles and not resume
        if measured:
            told = self.measure_range(divide(scenes)["train"])
        faulty, copies = self.decode(scenes, size)

        # What cannot be used. Without it other images may be drawn for training, of which the
        # percentiles shall be.
        if measured and (faulty or copies):
            good = {n: c for n, c in scenes.items() if n not in faulty | copies}
            before = self.reading["input_range"]
            told = self.measure_range(divide(good)["train"])
            if self.reading["input_range"] != before:
                faulty, copies = self.decode(scenes, size)
        if measured:
            self.notes += told
        if faulty and not skip_bad:
            raise BadInput(f"{next(iter(faulty.values()))} ({len(faulty)} such files; --skip-bad "
                           "leaves them out)")
        self.notes += [f"note: {why}; left out" for why in copies.values()]
        self.notes += [f"left out: {why}" for why in faulty.values()]
        self.left_out = faulty | copies
        scenes = {n: c for n, c in scenes.items() if n not in self.left_out}

        if not given and not scene:
            self.notes.append("random split without --group-regex: neighbouring scenes may stand "
                              "on both sides")
        self.splits = divide(scenes)
        self.names = classes or sorted({scenes[n] for n in self.splits["train"]})
        self.notes += [f"WARNING {line}"
                       for line in check_classes(self.splits, scenes, self.names)]
        if some:
            sizes = Counter(scenes[n] for n in self.splits["train"])
            scarce = [f"{sizes[c]} of {c}" for c in self.names if sizes[c] < some]
            if scarce:
                self.notes.append(f"WARNING --per-class {some}: train has only {', '.join(scarce)}")
        self.reports = "test" if self.splits.get("test") else "val"

        number = {name: i for i, name in enumerate(self.names)}
        self.rows, self.y = {}, {}
        for split, names in self.splits.items():
            self.rows[split] = np.array([at[n] for n in names], np.int64)
            self.y[split] = torch.tensor([number[scenes[n]] for n in names], dtype=torch.int64)

    def decode(self, scenes: dict[str, str], size: int | None) -> tuple[dict, dict]:
        """Sets .pixels of all images -> faults()."""
        decode = partial(decode_scenes, side=size, **self.reading)
        paths = tuple(self.base / name for name in scenes)
        tag = f"scenes 3 {size} {self.reading}"
        self.pixels, digests, self.kinds = self.keep(paths, decode, tag)
        return faults(self.base, scenes, digests, self.reading)

    def measure_range(self, train: list[str]) -> list[str]:
        """Puts numbers in the place of percentiles -> notes."""
        images = [(self.base / name, None) for name in train]
        self.reading["input_range"], notes = percentile_range(
            self.percentiles, images, self.reading["bands"])
        return notes

    def images(self, split: str) -> np.ndarray:
        """(n, S, S, 3) uint8 of a split."""
        return self.pixels[self.rows[split]]

    def fingerprint(self) -> dict:
        """Of the images of all splits, for a run's files.json."""
        if self.prints is None:
            used = [self.base / name for names in self.splits.values() for name in names]
            self.prints = fingerprint(self.base, used)
        return self.prints

    def about(self) -> dict:
        """What a run's files say of its data."""
        splits = {split: hashlib.sha256(as_bytes("\n".join(names))).hexdigest()[:16]
                  for split, names in self.splits.items()}
        return dict(classes=[{"name": c} for c in self.names], dataset=self.dataset,
                    root=str(self.base), chosen_on="val", reported=self.reports,
                    reading=self.reading, percentiles=self.percentiles, kinds=self.kinds.tolist(),
                    stored=self.pixels.shape[1], splits=splits)


def check_asked(base: Path, classes: list[str] | None, found: dict[str, str]) -> None:
    """BadInput where --classes names one twice, or one that is not there."""
    there = sorted(set(found.values()))
    for name in classes or ():
        if name not in there:
            raise BadInput(f"--classes {name}: not there; {base} has {', '.join(there)}")
        if classes.count(name) > 1:
            raise BadInput(f"--classes names {name} twice; leave one of them out")
