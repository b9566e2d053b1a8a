"""Segmentation data sets as one small description: where images and masks are, what labels mean, who is in which split.

A `folder` data set carries the description as dataset.json in its root (draft it with `python -m data.check ROOT`):
    {"name": "dubai", "images": "Tile */images/*.jpg", "masks": "Tile */masks/*.png",
     "classes": [{"name": "building", "color": "#3C1098"}, {"name": "road", "color": "#6EC1E4"}, ...],
     "ignore": ["#000000"], "splits": {"train": "Tile [1-6]/*", "val": ["Tile 7/*"], "test": "lists/test.txt"}}
Masks of ids: {"name": "road", "id": 2, "color": "#6EC1E4"}, the colour for pictures, and "ignore": [0].
An image and a mask belong together when the stars of the two patterns stand for the same text. "images" and "masks" may
also be lists of patterns; then the stars of the first two are compared, those of the second two, and so on. Further
keys, such as "unlabelled", "select" and "report", are explained in data/public.py.
"""
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Callable

import numpy as np
import torch

from .common import IGNORE, BadInput, even_sample
from .io import Labels, by_stem, open_image, read_valid

NORMS = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # DINOv2, DINOv3 LVD-1689M, torchvision
         "sat": ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))}  # DINOv3 SAT-493M


def read_description(root: str | Path) -> dict:
    """root/dataset.json, checked for its parts; label values are checked by io.Labels."""
    path = Path(root) / "dataset.json"
    if not path.exists():
        raise BadInput(f"{path}: no such file; draft it with: python -m data.check '{root}'")
    try:
        d = json.loads(path.read_text("utf-8-sig"))  # as Windows editors write it, too
    except (ValueError, OSError) as e:
        raise BadInput(f"{path}: not valid JSON ({e})") from None
    for key, kind in {"images": (str, list), "masks": (str, list), "classes": list, "splits": dict}.items():
        if not isinstance(d, dict) or not d.get(key) or not isinstance(d[key], kind):
            raise BadInput(f'{path}: "{key}" is missing, empty or malformed; data/datasets.py begins with an example')
    if not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in d["classes"]):
        raise BadInput(f'{path}: an entry of "classes" has no "name"; data/datasets.py begins with an example')
    d = {"name": Path(root).resolve().name, "ignore": [], **d}
    try:
        names = Labels(d["classes"], d["ignore"]).names
    except BadInput as e:
        raise BadInput(f"{path}: {e}") from None
    if not d["splits"].keys() <= {"train", "val", "test", "select"} and d["splits"].get("train") is None:
        raise BadInput(f'{path}: "splits" has {", ".join(d["splits"])}; the names are train, val and test')
    means = d.get("report", {})
    checks = {  # of keys that stand for themselves
        "name": isinstance(d["name"], str) and d["name"] and not set(d["name"]) & set("/\\"),
        "unlabelled": set(d.get("unlabelled", ())) <= set(d["splits"]),
        "tiles": type(d.get("tiles", 1)) is int and d.get("tiles", 1) > 0,
        "variant": isinstance(d.get("variant", ""), str),
        "select": isinstance(d.get("select", 0.1), float) and 0 < d.get("select", 0.1) < 1,
        "report": isinstance(means, dict) and all(isinstance(m, list) and set(m) <= set(names) for m in means.values())}
    if wrong := [key for key, good in checks.items() if not good]:
        raise BadInput(f'{path}: "{wrong[0]}" is {d[wrong[0]]!r}, which cannot be; data/datasets.py and data/public.py '
                       "begin with what is expected")
    return d


def star_key(pattern: str, path: str) -> str | None:  # what the stars stand for: "T */*.png", "T 2/a.png" -> "2/a"
    wild = {"**/": "((?:.*/)?)", "**": "(.*)", "*": "([^/]*)", "?": "([^/])"}
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
    regex = "".join(wild.get(t) or (f"({t})".replace("[!", "[^") if t[:1] == "[" else re.escape(t)) for t in tokens)
    found = re.fullmatch(regex, path)
    return "/".join(found.groups()) if found else None


def match_files(root: str | Path, patterns: str | list[str]) -> dict[tuple[int, str], Path]:
    """{(number of the pattern, what its stars stand for): file}, in order."""
    found = {}
    for i, pattern in enumerate([patterns] if isinstance(patterns, str) else patterns):
        try:
            files = sorted(Path(root).glob(pattern))
        except (ValueError, TypeError, NotImplementedError) as e:
            raise BadInput(f"{root}: {pattern!r} is no pattern ({e}); expected 'images/*.png' or the like") from None
        for file in (f for f in files if f.name[0] != "."):  # such as the ._ files of macOS
            key = i, star_key(pattern, file.relative_to(root).as_posix())
            if key in found:
                raise BadInput(f"{file} and {found[key]}: the pattern {pattern!r} cannot tell them apart; "
                               "make it more exact in dataset.json")
            found[key] = file
    return found


def match_pairs(root: str | Path, description: dict) -> tuple[dict[str, tuple[Path, Path | None]], list[Path]]:
    """{name: (image, mask or None)}, name = the image's path in root without suffix, in order; masks of no image."""
    masks = match_files(root, description["masks"])
    taken = set(masks.values())  # "*.png" for images beside "*_mask.png" for masks: what both match is a mask
    pairs = {}
    for key, file in match_files(root, description["images"]).items():
        if file in taken:
            continue
        name = file.relative_to(root).with_suffix("").as_posix()
        if name in pairs:
            raise BadInput(f"{file} and {pairs[name][0]}: two images of one name; rename one, or move it away")
        pairs[name] = file, masks.get(key)
    if not pairs:
        raise BadInput(f"{root}: no image matches {description['images']!r}; "
                       'correct "images" in dataset.json or --root')
    return pairs, sorted(taken - {mask for _, mask in pairs.values()})


def find_pairs(root: str | Path, description: dict, masks: bool = True) -> dict[str, tuple]:
    """{name: (image, mask)} as match_pairs has it, or {name_k: (image, mask, box)} of "tiles".

    Every image needs its mask, unless `masks=False` or its split is in "unlabelled".
    """
    pairs, _ = match_pairs(root, description)
    if not masks:
        return {name: (image, None) for name, (image, _) in pairs.items()}
    free = unlabelled(root, description, pairs)
    lonely = [image for n, (image, mask) in pairs.items() if mask is None and n not in free]
    if lonely:
        raise BadInput(f"{lonely[0]}: no mask for it by {description['masks']!r} ({len(lonely)} of {len(pairs)} images "
                       'without); correct "masks" in dataset.json or move the images away')
    return cut(pairs, description["tiles"]) if "tiles" in description else pairs


def unlabelled(root: str | Path, description: dict, pairs: dict[str, tuple]) -> set[str]:
    """Names without masks that may be so, since their splits are in "unlabelled"."""
    rules = {split: description["splits"][split] for split in description.get("unlabelled", ())}
    splits = split_names(root, description | {"splits": rules}, list(pairs))
    return {n for names in splits.values() for n in names if pairs[n][1] is None}


def cut(pairs: dict[str, tuple[Path, Path | None]], side: int) -> dict[str, tuple]:
    """{name_k: (image, mask, (top, left, h, w))}: the full square tiles of every image, k counting all of its grid."""
    tiles = {}
    for name, (image, mask) in pairs.items():
        W, H = open_image(image, deep=True).size
        grid = [(top, left) for top in range(0, H, side) for left in range(0, W, side)]
        tiles |= {f"{name}_{k}": (image, mask, (top, left, side, side)) for k, (top, left) in enumerate(grid)
                  if top + side <= H and left + side <= W}  # LandCover.ai's split.py numbers the cut ones too
    return tiles


def split_names(root: str | Path, description: dict, names: list[str]) -> dict[str, list[str]]:
    """{split: names} from patterns over the names (here * crosses /), or from a .txt file of names, one a line."""
    splits = {}
    for split, rules in description["splits"].items():
        chosen, rules = set(), [rules] if isinstance(rules, str) else rules
        if not isinstance(rules, list) or not all(isinstance(rule, str) for rule in rules):
            raise BadInput(f"split {split!r} is {rules!r}; expected patterns or a .txt file; for a share, --val-frac")
        for rule in rules:
            if rule.endswith(".txt"):
                chosen |= set(read_list(Path(root) / rule, names))
            else:
                found = [n for n in names if fnmatch(n, rule)]
                if not found and split not in description.get("unlabelled", ()):
                    raise BadInput(f"split {split!r}: nothing matches {rule!r}; names look like {names[0]!r}")
                chosen |= set(found)
        splits[split] = [n for n in names if n in chosen]
    return check_disjoint(splits)


def read_list(path: Path, names: list[str]) -> list[str]:  # lines may be full names, names with suffix, or bare stems
    if not path.exists():
        raise BadInput(f"{path}: no such split file")
    known, out = by_stem(names), []
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not UTF-8 text; save it so (PowerShell's > writes UTF-16)") from None
    for line in filter(None, map(str.strip, text.splitlines())):
        line = re.sub(r"^\.?/", "", line)
        name = known.get(line) or known.get(re.sub(r"\.\w+$", "", line))
        if name is None:
            raise BadInput(f"{path}: {line!r} is no image here, or several; names look like {names[0]!r}")
        out.append(name)
    return out


def check_disjoint(splits: dict[str, list[str]]) -> dict[str, list[str]]:
    """The splits, unless a name is in two of them."""
    home = {}
    for split, names in splits.items():
        for n in names:
            if home.setdefault(n, split) != split:
                raise BadInput(f"{n!r} is in the splits {home[n]!r} and {split!r}; leave it in one of them")
    return splits


def hold_out(names: list[str], frac: float, group_regex: str | None, seed: int) -> tuple[list[str], list[str]]:
    """Names -> (rest, held out): whole scenes until `frac` is reached. A scene is the regex's group, or its match."""
    try:
        found = {n: re.search(group_regex or ".*", n) for n in names}
    except re.error as e:
        raise BadInput(f"--group-regex {group_regex!r} is no regular expression: {e}") from None
    scene = {n: f and f[1 if f.re.groups else 0] for n, f in found.items()}
    for n in names:
        if scene[n] is None:
            raise BadInput(f"--group-regex {group_regex!r} does not match {n!r}")
    size, chosen, count = Counter(scene.values()), set(), 0
    for s in np.random.default_rng(seed).permutation(sorted(size)).tolist():
        if count >= frac * len(names):
            break
        chosen.add(s)
        count += size[s]
    if not 0 < len(chosen) < len(size):
        raise BadInput(f"--val-frac {frac} of {len(size)} scenes leaves train or val empty; change it or --group-regex")
    return [n for n in names if scene[n] not in chosen], [n for n in names if scene[n] in chosen]


def load_splits(root: str | Path, description: dict, pairs: dict[str, tuple], split_file: str | None = None,
                val_frac: float | None = None, group_regex: str | None = None, seed: int = 0,
                need: tuple = ("train", "val"), final: bool = False) -> dict[str, list[str]]:
    """{split: names} of the description, or of a JSON file; those in `need` are there, those without masks are not.

    val, or select where val is reported, comes by hold_out if `val_frac` or the description's "select" asks for it;
    `final` leaves train whole.
    """
    names, select = list(pairs), description.get("select")
    if split_file:
        try:
            splits = check_disjoint(json.loads(Path(split_file).read_text()))
        except (OSError, ValueError, AttributeError, TypeError) as e:
            raise BadInput(f"{split_file}: {e}; expected JSON {{split: [names]}}") from None
        known = set(names)
        absent = [n for chosen in splits.values() for n in chosen if n not in known]
        if absent:
            raise BadInput(f"{split_file}: {absent[0]!r} is no image of {root}; names look like {names[0]!r}")
    else:
        splits = split_names(root, description, names)
    for split in description.get("unlabelled", ()):
        if split in splits and not (splits[split] and all(pairs[n][1] for n in splits[split])):
            del splits[split]
    chosen = [n for names in splits.values() for n in names] if "unlabelled" in description else []
    if bare := [n for n in chosen if pairs[n][1] is None]:
        raise BadInput(f"{split_file}: {bare[0]!r} has no mask; take it out of the split")
    if val_frac and splits.get("val") and not select:
        raise BadInput("--val-frac for a data set that has a val split; leave the flag out, or take val out of splits")
    share = val_frac or (None if split_file or splits.get("val") and splits.get("test") else select)
    held = "select" if splits.get("val") else "val"  # a val split that papers report chooses no weights
    if share and splits.get("train") and not final:
        group = group_regex or description.get("scene")
        splits["train"], splits[held] = hold_out(splits["train"], share, group, seed)
    for split in need:
        if not splits.get(split):
            raise BadInput(f'{root}: no {split} split; add it to "splits" in dataset.json, or hold out some scenes: '
                           "--val-frac 0.2 --group-regex REGEX")
    return splits


def check_sizes(pairs: dict) -> None:
    """Reads the headers of all images and masks: unreadable or unequal ones stop a run before its first step."""
    def compare(pair):
        (w, h), (mask_w, mask_h) = open_image(pair[0], deep=True).size, open_image(pair[1]).size
        if (h, w) != (mask_h, mask_w):
            raise BadInput(f"{pair[1]}: mask of {mask_h} x {mask_w} for an image of {h} x {w} (H x W); export it at "
                           "the image's size")

    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        list(pool.map(compare, {pair[:2] for pair in pairs.values() if pair[1]}))


def count_ids(ids: np.ndarray, k: int) -> np.ndarray:
    """Class ids with IGNORE -> (k + 1,) int64 pixels of each class, ignored ones last."""
    return np.bincount(ids.ravel(), minlength=256)[[*range(k), IGNORE]]


def class_counts(pairs: dict, labels: Labels, limit: int | None = None) -> np.ndarray:
    """count_ids of each mask of pairs {name: (image, mask)}, (N, K+1), all or an even sample of `limit` pairs.

    A mask that cannot be read or holds an unknown value is a BadInput.
    """
    k, boxes = len(labels.names), {}
    for _, mask, *box in even_sample(list(pairs.values()), limit):
        boxes.setdefault(mask, []).append(box)

    def count(mask):  # a mask is read once for all of its tiles
        ids = labels.load(mask)
        return sum(count_ids(window(ids, *box), k) for box in boxes[mask])

    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:  # Pillow decodes without holding the GIL
        return np.array([*pool.map(count, boxes)], np.int64).reshape(-1, k + 1)


def window(a: np.ndarray, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """The part (top, left, h, w) of an array (H, W, ...), or all of it."""
    top, left, h, w = box or (0, 0, *a.shape[:2])
    return a[top:top + h, left:left + w]


def normalise(image: np.ndarray, norm: str) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 by a name of NORMS."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in NORMS[norm])
    x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))  # turns bytes, a quarter of the floats
    return x.float().div_(255).sub_(mean).div_(std)


def uncached(paths: tuple, decode: Callable, tag: str = "") -> tuple:
    return decode(*paths)


class SegDataset(torch.utils.data.Dataset):
    """pairs {name: (image, mask)} -> x (3, H, W) float32 normalised, y (H, W) int64 with IGNORE, name.

    A third entry of a pair is a box (top, left, h, w) in both. Where the image is transparent, y is IGNORE.

    `augment(image, mask, rng) -> image, mask` sees uint8 arrays; its rng is a function of (seed, draw) alone: workers,
    ranks and resuming cannot change it. Index with i, or with (i, draw) as data/samplers.py does.
    `cache(paths, decode, tag)` is a data/cache.py Cache, whose arrays nobody may write to.
    """

    def __init__(self, pairs: dict, labels: Labels, norm: str, augment: Callable | None = None, seed: int = 0,
                 cache: Callable = uncached, bands: list[int] | None = None, input_range: list[float] | None = None):
        self.names, self.files = list(pairs), list(pairs.values())
        self.bands, self.input_range = bands, input_range
        self.labels, self.norm, self.augment, self.seed = labels, norm, augment, seed
        self.cache, self.tag = cache, f"{labels.classes} {labels.ignore} {bands} {input_range}"
        self.held = None, None

    def __len__(self):
        return len(self.names)

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, 3) uint8 image, (H, W) uint8 class ids."""
        image_path, mask_path, *box = self.files[i]
        if self.held[0] != (image_path, mask_path):  # the next tile is often of the same file
            key = image_path, mask_path
            self.held = key, self.cache(key, self.decode, self.tag)
        image, mask = self.held[1]
        return window(image, *box), window(mask, *box)

    def decode(self, image_path: Path, mask_path: Path) -> tuple[np.ndarray, np.ndarray]:
        """The two whole files."""
        (image, valid), mask = read_valid(image_path, self.bands, self.input_range), self.labels.load(mask_path)
        if image.shape[:2] != mask.shape:
            (h, w), (H, W) = mask.shape, image.shape[:2]
            raise BadInput(f"{mask_path}: mask of {h} x {w} for an image of {H} x {W} (H x W); export it at the "
                           "image's size")
        if valid is not None:
            mask[~valid] = IGNORE
        return image, mask

    def __getitem__(self, key):
        i, draw = key if isinstance(key, tuple) else (key, 0)
        image, mask = self.read(i)
        if self.augment is not None:
            image, mask = self.augment(image, mask, np.random.default_rng((2, self.seed, draw)))  # 2: its own stream
        return normalise(image, self.norm), torch.from_numpy(mask.astype(np.int64)), self.names[i]


def renormalise(norm: str, other: str, device: torch.device | str = "cpu") -> tuple | None:
    """(factor, shift), (3, 1, 1) each, that turn pixels normalised one way into the other; None where equal."""
    if norm == other:
        return None
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in NORMS[norm])
    other_mean, other_std = (torch.tensor(v, device=device)[:, None, None] for v in NORMS[other])
    return std / other_std, (mean - other_mean) / other_std
