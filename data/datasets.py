"""Segmentation data sets as one small description: where images and masks are, what labels mean.

    description = read_description("D")                      D/dataset.json, or public.describe(...)
    pairs = find_pairs("D", description)                     {name: (image, mask)}
    splits = load_splits("D", description, pairs, seed=0)    {"train": names, "val": names, ...}
    labels = Labels.of(description)
    x, y, name = SegDataset(pairs, labels, norm="imagenet")[0]

A `folder` data set carries the description as dataset.json in its root (data/check drafts it):
    {"name": "dubai", "images": "Tile */images/*.jpg", "masks": "Tile */masks/*.png",
     "classes": [{"name": "building", "color": "#3C1098"}, {"name": "road", "color": "#6EC1E4"}],
     "ignore": ["#000000"],
     "splits": {"train": "Tile [1-6]/*", "val": ["Tile 7/*"], "test": "lists/test.txt"}}
Masks of ids: {"name": "road", "id": 2, "color": "#6EC1E4"}, the colour for pictures, "ignore": [0].
An image and a mask belong together when the stars of the two patterns stand for the same text; a
[ of a name is written [[]. A line of a list is an image, or an image and its mask.
"images" and "masks" may also be lists of patterns; then the stars of the first two are compared,
those of the second two, and so on. Further keys, none of them needed:
    "bands"        [4, 1, 2]: the three to read from images with more, from 1; --bands overrides it
    "input_range"  [0, 3000]: the values that become 0 and 255; a pair for each of the three bands;
                   or "p2-98", percentiles of the training images; --input-range overrides it
    "threshold"    127: masks are soft, greys above it are the class of "id" 1, others that of 0
    "select"       0.2: the share of train held out to choose the weights
    "scene"        regex for the scene in a name, its first group if it has one: a hold-out keeps
                   scenes whole, and data/check finds those in two splits
    "tiles"        side of the square tiles that the split lists mean: NAME_k is the k-th of NAME
    "unlabelled"   splits whose masks may be missing: for predict.py only
    "instances"    pattern of files with the number of the instance at every pixel (train_points.py)
    "report"       further means under their own names, without the classes listed:
                   {"5_without_clutter": ["clutter"]}
    "warning"      what is known to be wrong with the data, said before every training
"""
import os
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from fnmatch import fnmatch
from glob import has_magic
from itertools import takewhile
from pathlib import Path
from shlex import quote

import numpy as np
import torch

from .common import (IGNORE, SHORT, BadInput, as_text, even_sample, follows, in_time, nfc, progress,
                      read_json, read_text)
from .files import (FILE_NAME, MATCH_TIME, SUFFIXES, Names, about_encoding, check_folder, is_file_name,
                    is_image, match)
from .io import Labels, read_valid, size_of
from .ranges import is_range
from .raster import kinds_of, open_raster, part_of

# Mean and standard deviation of red, green and blue that the weights were trained with.
NORMS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # DINOv2, LVD-1689M, torchvision
    "sat": ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))}  # DINOv3 SAT-493M
SPELLING = 0.85  # share of equal letters from which a key is taken for a misspelt one
# What dataset.json may hold, see above.
CLASS_KEYS = ("name", "id", "color")
KEYS = ("name", "images", "masks", "classes", "ignore", "splits", "bands", "input_range",
        "threshold", "select", "scene", "tiles", "unlabelled", "instances", "report", "warning",
        "variant", "made_by")
PROJECT = Path(__file__).resolve().parents[1]
LONGEST_LINE = 2**14  # letters; two paths have at most 2^13
EXAMPLE = "data/datasets.py begins with an example"
ONE_IMAGE = ("one training image, of which nothing can be held out to choose the weights; add "
             "images, or type --final, which trains on all there is")


# ---- commands to type next

def script_command(script: str) -> str:
    """What starts a script, such as train_seg.py, from the folder where the user stands."""
    if Path.cwd() != PROJECT:
        script = str(PROJECT / script)
    return f"python {quote(script)}"


def check_command(root: str | Path) -> str:
    """What checks the folder `root`, or drafts its dataset.json, from where the user stands."""
    if Path.cwd() == PROJECT:
        program = "python -m data.check"
    else:
        program = script_command("data/check")  # a folder with a __main__.py can be run by its path
    return f"{program} {quote(str(root))}"


# ---- the description

def read_description(root: str | Path) -> dict:
    """root/dataset.json, checked for its parts; one line says what is wrong."""
    path = Path(root) / "dataset.json"
    check_folder(root)
    if path.is_symlink() and not path.exists():
        raise BadInput(f"{path}: a link to no file; bring the file back, or remove the link")
    if not path.exists():
        raise BadInput(f"{path}: no such file; draft it with: {check_command(root)}")
    d = read_json(path, dict, '{"images": ...}')
    check_spelling(d, path)
    check_needed_keys(d, path)
    # A set without a name is called like its folder, and its runs go to runs/<name>.
    d = {"name": as_text(Path(root).resolve().name), "ignore": [], **d}
    try:
        names = Labels.of(d).names
    except BadInput as e:
        raise BadInput(f"{path}: {e}") from None
    if not d["splits"].keys() <= {"train", "val", "test", "select"}:
        if d["splits"].get("train") is None:  # misspelt, or made for something else
            raise BadInput(f'{path}: "splits" has {", ".join(d["splits"])}; '
                           "the names are train, val and test")
    check_optional_keys(d, names, path)
    return d


def check_spelling(d: dict, path: Path) -> None:
    """A key that is nearly a known one would be passed over in silence; all others are the user's."""
    places = [(d, KEYS)]
    places += [(c, CLASS_KEYS) for c in entries_of(d.get("classes")) if isinstance(c, dict)]
    for found, known in places:
        for key in found.keys() - set(known):
            meant = get_close_matches(key.lower(), known, 1, SPELLING)
            if meant:
                raise BadInput(f"{path}: the key {key!r} is unknown; is {meant[0]!r} meant? Correct "
                               "it, or give a key of your own another name")


def entries_of(value) -> list:
    """The list, or none instead of anything else."""
    return value if isinstance(value, list) else []


def check_needed_keys(d: dict, path: Path) -> None:
    """Images, masks, classes with names and splits are there and of the right kind."""
    kinds = {"images": (str, list), "masks": (str, list), "classes": list, "splits": dict}
    for key, kind in kinds.items():
        if not d.get(key) or not isinstance(d[key], kind):
            raise BadInput(f'{path}: "{key}" is missing, empty or malformed; {EXAMPLE}')
    for key in ("images", "masks"):
        odd = [part for part in entries_of(d[key]) if not isinstance(part, str) or not part]
        if odd:
            raise BadInput(f'{path}: "{key}" lists {odd[0]!r:.60}; expected patterns such as '
                           f"'{key}/*.png'")
    for c in d["classes"]:
        if not isinstance(c, dict) or not isinstance(c.get("name"), str):
            raise BadInput(f'{path}: an entry of "classes" has no "name"; {EXAMPLE}')


def check_optional_keys(d: dict, names: list[str], path: Path) -> None:
    """The keys that stand for themselves; `names`: of the classes."""
    rules = {
        "name": (is_file_name, FILE_NAME),  # runs are saved in a folder of it
        "instances": (lambda v: v and isinstance(v, (str, list)), "a pattern as of masks"),
        "unlabelled": (lambda v: isinstance(v, list) and set(v) <= set(d["splits"]),
                       "a list of splits"),
        "tiles": (lambda v: type(v) is int and v > 0, "a whole number of pixels"),
        "variant": (lambda v: isinstance(v, str), "text"),
        "warning": (lambda v: isinstance(v, str), "text"),
        "select": (lambda v: isinstance(v, float) and 0 < v < 1, "a share of train such as 0.2"),
        "scene": (is_regex, 'a regular expression such as "(.*)_\\\\d+$"'),
        "bands": (are_bands, "three whole numbers from 1, such as [4, 1, 2]"),
        "input_range": (is_range, "the lower value, then the higher one, such as [0, 3000], a pair "
                                  'for each band, or percentiles such as "p2-98"'),
        "report": (lambda v: are_means(v, names), 'names with lists of names from "classes"')}
    for key, (is_good, expected) in rules.items():
        if key in d and not follows(d[key], is_good):
            raise BadInput(f'{path}: "{key}" is {SHORT.repr(d[key])}; expected {expected}')


def is_regex(value) -> bool:
    """Text that re can compile."""
    try:
        compile_regex(value, "")
    except BadInput:
        return False
    return isinstance(value, str)


def compile_regex(regex: str, where: str) -> re.Pattern:
    """`where` it stands begins the BadInput."""
    try:
        return re.compile(regex)
    except (re.error, OverflowError, RecursionError) as e:
        raise BadInput(f"{where} {regex!r} is no regular expression: {e}") from None


def are_bands(value) -> bool:
    """Three band numbers, counted from 1."""
    return len(value) == 3 and all(type(n) is int and n >= 1 for n in value)


def are_means(value, names: list[str]) -> bool:
    """{name of a mean: classes that it leaves out}."""
    return isinstance(value, dict) and all(
        isinstance(left_out, list) and set(left_out) <= set(names) for left_out in value.values())


# ---- images and masks

def is_wanted(file: Path, pattern: str) -> bool:
    """"images/*" leaves texts and world files alone; "images/*.jp2" takes what it names."""
    return is_image(file) or pattern.endswith(file.suffix)


def match_files(root: str | Path, patterns: str | list[str]) -> dict[tuple[int, str], Path]:
    """{(number of the pattern, what its stars stand for): file}, in order."""
    if isinstance(patterns, str):
        patterns = [patterns]
    found = {}
    for i, pattern in enumerate(patterns):
        for file, stars in match(root, pattern):
            if not is_wanted(file, pattern):
                continue
            key = i, stars
            if key in found:
                raise BadInput(f"{file} and {found[key]}: the pattern {pattern!r} cannot tell them "
                               "apart; make it more exact in dataset.json")
            found[key] = file
    return found


def unknown_files(root: str | Path, description: dict) -> list[Path]:
    """What the patterns fit and match_files leaves out, since no suffix says that it is an image."""
    found = []
    for key in ("images", "masks"):
        patterns = description[key]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if not pattern.lower().endswith(SUFFIXES):  # else it wants all that it fits
                found += [file for file, _ in match(root, pattern) if not is_wanted(file, pattern)]
    return sorted(set(found))


def match_pairs(root: str | Path, description: dict) -> tuple[dict[str, tuple], list[Path]]:
    """{name: (image, mask or None)}, name = the image's path in root without suffix, in order.

    Also the masks that belong to no image.
    """
    masks = match_files(root, description["masks"])
    taken = set(masks.values())
    pairs = {}
    for key, file in match_files(root, description["images"]).items():
        if file in taken:  # "*.png" for images beside "*_mask.png" for masks: both match a mask
            continue
        name = nfc(file.relative_to(root).with_suffix("").as_posix())
        if name in pairs:
            raise BadInput(f"{file} and {pairs[name][0]}: two images of one name; "
                           "rename one, or move it away")
        pairs[name] = file, masks.get(key)
    if not pairs:
        images = description["images"]
        hint = about_brackets(str(images)) + about_folder(root, images)
        raise BadInput(f"{root}: no image matches {images!r}; "
                       f'correct "images" in dataset.json or --root{hint}')
    paired = {mask for _, mask in pairs.values()}
    return pairs, sorted(taken - paired)


def find_pairs(root: str | Path, description: dict, need_masks: bool = True) -> dict[str, tuple]:
    """{name: (image, mask)} as match_pairs has it, or {name_k: (image, mask, box)} of "tiles".

    Every image needs its mask, unless its split is in "unlabelled". need_masks=False: none does.
    """
    pairs, _ = match_pairs(root, description)
    if need_masks:
        free = unlabelled(root, description, pairs)
        check_masks({n: pair for n, pair in pairs.items() if n not in free}, description)
    if "tiles" in description:
        return tiles_of(pairs, description["tiles"])
    return pairs


def without_mask(image: Path, description: dict) -> str:
    """The beginning of a message: that this image has no mask."""
    return f"{image}: no mask for it by {description['masks']!r}"


def check_masks(pairs: dict[str, tuple], description: dict) -> None:
    """BadInput unless every image has a mask."""
    # A missing mask is never taken for an empty one: it would be scored as background.
    lonely = [image for image, mask, *_ in pairs.values() if mask is None]
    if lonely:
        raise BadInput(f"{without_mask(lonely[0], description)} ({len(lonely)} of "
                       f'{len(pairs)} images without); correct "masks" in dataset.json or move the '
                       "images away; --skip-bad of training leaves them out")


def unlabelled(root: str | Path, description: dict, pairs: dict[str, tuple]) -> set[str]:
    """Names without masks that may be so, since their splits are in "unlabelled"."""
    rules = {split: description["splits"][split] for split in description.get("unlabelled", ())}
    splits = split_names(root, description | {"splits": rules}, pairs)
    free = set()
    for names in splits.values():
        free.update(n for n in names if pairs[n][1] is None)
    return free


def tiles_of(pairs: dict[str, tuple[Path, Path | None]], side: int) -> dict[str, tuple]:
    """{name_k: (image, mask, (top, left, h, w))}: the full square tiles of every image.

    k counts all places of the image's grid, row by row, as LandCover.ai's split.py does: also
    those that the right and bottom border cut, which are left out.
    """
    tiles = {}
    for name, (image, mask) in pairs.items():
        H, W = size_of(image)
        k = 0
        for top in range(0, H, side):
            for left in range(0, W, side):
                if top + side <= H and left + side <= W:
                    tiles[f"{name}_{k}"] = image, mask, (top, left, side, side)
                k += 1
    if not tiles:
        raise BadInput(f'"tiles": {side} in dataset.json, and no image is that large; correct it')
    return tiles


# ---- splits

def split_names(root: str | Path, description: dict,
                pairs: dict[str, tuple]) -> dict[str, list[str]]:
    """{split: names} from patterns over the names (* crosses /), or .txt files, one name a line.

    What fits no name as a pattern may be an image in any way that Names knows, as in a file.
    """
    names, known = list(pairs), Names(pairs)
    splits = {}
    for split, rules in description["splits"].items():
        optional = split in description.get("unlabelled", ())
        if isinstance(rules, str):
            rules = [rules]
        if not isinstance(rules, list) or not all(isinstance(rule, str) for rule in rules):
            raise BadInput(f"split {split!r} in dataset.json is {SHORT.repr(rules)}; expected "
                           "patterns or a .txt file; for a share, --val-frac")
        chosen = set()
        for rule in rules:
            if rule.endswith(".txt"):
                chosen.update(read_list(Path(root) / rule, pairs, optional))
                continue
            with in_time(MATCH_TIME, f"split {split!r} in dataset.json: {rule!r} takes too long; "
                                     "write it with fewer stars"):
                found = [n for n in names if n == rule or fnmatch(n, nfc(rule))]
            found = found or [n for n in [known.find(rule)] if n is not None]
            if not found and not optional:
                raise BadInput(f"split {split!r} in dataset.json: nothing matches {rule!r}; "
                               f"names look like {names[0]!r}{about_brackets(rule)}")
            chosen.update(found)
        splits[split] = [n for n in names if n in chosen]
    return check_disjoint(splits)


def about_folder(root: str | Path, pattern: str | list[str]) -> str:
    """The end of a message where the folder that a pattern begins with is missing."""
    first = pattern if isinstance(pattern, str) else pattern[0]
    folder = Path(root, *takewhile(lambda part: not has_magic(part), Path(first).parts[:-1]))
    return "" if folder.is_dir() else f"; there is no folder {folder}"


def about_brackets(pattern: str) -> str:
    """The end of a message where a name may have been taken for a pattern."""
    return "; for a [ in a name write [[]" if "[" in pattern else ""


def read_list(path: Path, pairs: dict[str, tuple], optional: bool = False) -> list[str]:
    """The names that a text file lists: an image a line, as Names finds it, or an image and its mask.

    Images that are not there are left out, and so may be the file, where it is `optional`.
    """
    if optional and not path.exists():
        return []
    names = Names(pairs)
    listed = []
    for line in read_text(path, "surrogateescape").splitlines():
        line = line.strip()
        if not line:
            continue
        if len(line) > LONGEST_LINE:
            raise BadInput(f"{path}: a line of {len(line)} letters, {line[:40]!r}...; expected the "
                           "name of an image in every line")
        try:
            name = names.find_line(line)
        except BadInput as e:
            raise BadInput(f"{path}: {e}") from None
        if name is not None:
            listed.append(name)
        elif not optional:
            raise BadInput(f"{path}: {SHORT.repr(line)} is no image here, or several; "
                           f"names look like {next(iter(pairs))!r}{about_encoding(line)}")
    if not listed and not optional:
        raise BadInput(f"{path}: names no image; write one in every line, or take the list out of "
                       '"splits" in dataset.json')
    return listed


def check_disjoint(splits: dict[str, list[str]]) -> dict[str, list[str]]:
    """The splits, unless a name is in two of them, or twice in one."""
    home = {}
    for split, names in splits.items():
        if not is_file_name(split):  # eval.py writes to RUN/eval-SPLIT
            raise BadInput(f"a split is called {SHORT.repr(split)}; expected {FILE_NAME}")
        for n in names:
            if n in home:
                raise BadInput(f"{n!r} is in the splits {home[n]!r} and {split!r}; "
                               "leave it in one place")
            home[n] = split
    return splits


def scenes_of(names: list[str], scene: str | None) -> dict[str, str]:
    """{name: its scene}: the regex's first group, or its match; without a regex the name itself."""
    if not scene:
        return {n: n for n in names}
    where = '"scene" in dataset.json'
    scenes = {}
    for n, found in search_all(scene, names, where).items():
        group = min(1, found.re.groups) if found else 0
        if not found or found[group] is None:
            raise BadInput(f"{where} is {scene!r}, which does not match {n!r}")
        scenes[n] = found[group]
    return scenes


def search_all(regex: str, names: list[str], where: str) -> dict[str, re.Match | None]:
    """{name: what the regex finds in it}; one that takes too long is a BadInput that `where` begins."""
    pattern = compile_regex(regex, where)
    found = {}
    for n in names:
        with in_time(MATCH_TIME, f"{where}: {regex!r} takes too long on {n!r}; write it without a "
                                 "repetition inside a repetition"):
            found[n] = pattern.search(n)
    return found


def hold_out(names: list[str], frac: float, scene: str | None,
             seed: int) -> tuple[list[str], list[str]]:
    """Names -> (rest, held out): whole scenes, in random order, until `frac` is reached."""
    scenes = scenes_of(names, scene)
    size = Counter(scenes.values())
    # Neighbouring tiles look alike: a scene on both sides would make the score too good.
    chosen = set()
    count = 0
    for s in np.random.default_rng(seed).permutation(sorted(size)).tolist():
        if count >= frac * len(names):
            break
        chosen.add(s)
        count += size[s]
    if len(names) < 2:
        raise BadInput(ONE_IMAGE)
    if not 0 < len(chosen) < len(size):
        raise BadInput(f"{frac} of {len(size)} scenes leaves train or val empty; "
                       'change "select" or "scene" in dataset.json, or --val-frac; or type --final, '
                       "which holds nothing out")
    rest = [n for n in names if scenes[n] not in chosen]
    return rest, [n for n in names if scenes[n] in chosen]


def load_splits(root: str | Path, description: dict, pairs: dict[str, tuple],
                split_file: str | None = None, val_frac: float | None = None, seed: int = 0,
                need: tuple = ("train", "val"), final: bool = False) -> dict[str, list[str]]:
    """{split: names} of the description, or of a JSON file; those in `need` are there.

    Splits without masks are not. val, or select where val is reported, comes by hold_out if
    `val_frac` or the description's "select" asks for it; `final` leaves train whole.
    """
    if split_file:
        splits = read_split_file(split_file, pairs)
    else:
        splits = split_names(root, description, pairs)
    if "unlabelled" in description:
        splits = splits_with_masks(splits, description["unlabelled"], pairs)

    select = description.get("select")
    # A second val split would leave open which one is meant.
    if val_frac and splits.get("val") and not select:
        raise BadInput("--val-frac for a data set that has a val split; leave the flag out, "
                       "or take val out of splits")
    # With val and test there is a split to choose the weights by, and another one to report.
    complete = splits.get("val") and splits.get("test")
    share = val_frac
    if not share and not split_file and not complete:
        share = select
    if share and splits.get("train") and not final:
        held = "select" if splits.get("val") else "val"  # a val that is reported chooses no weights
        rest, chosen = hold_out(splits["train"], share, description.get("scene"), seed)
        splits["train"], splits[held] = rest, chosen

    for split in need:
        if splits.get(split):
            continue
        if split == "val" and len(splits["train"]) < 2:
            raise BadInput(f"{root}: no val split: {ONE_IMAGE}")
        if split_file:
            advice = f"add it to {split_file}"
            hold = ", or hold out a part of train: --val-frac 0.2"
        else:
            advice = 'add it to "splits" in dataset.json'
            hold = (', or hold out whole scenes: "select": 0.2 and "scene": REGEX in dataset.json '
                    "(or --val-frac 0.2 for one run)")
        raise BadInput(f"{root}: no {split} split; {advice}{hold if split == 'val' else ''}")
    return splits


def read_split_file(path: str | Path, pairs: dict[str, tuple]) -> dict[str, list[str]]:
    """{split: names} of a JSON file, all of them images of the data set, as Names finds them."""
    names = Names(pairs)
    splits = {}
    for split, listed in read_json(path, dict[str, list[str]], "{split: [names]}").items():
        splits[split] = [names.find(text) for text in listed]
        for text, name in zip(listed, splits[split]):
            if name is None:
                raise BadInput(f"{path}: {SHORT.repr(text)} is no image here, or several; "
                               f"names look like {next(iter(pairs))!r}")
    try:
        return check_disjoint(splits)
    except BadInput as e:
        raise BadInput(f"{path}: {e}") from None


def splits_with_masks(splits: dict, optional: list[str], pairs: dict) -> dict[str, list[str]]:
    """The splits without those of `optional` that lack masks, which are for predict.py."""
    kept = {}
    for split, names in splits.items():
        complete = bool(names) and all(pairs[n][1] for n in names)
        if split not in optional or complete:
            kept[split] = names
    return kept


# ---- masks of a whole data set

def in_threads(work: Callable, items: list, what: str) -> list:
    """[work(item)] by threads: Pillow and NumPy let go of the GIL while they decode.

    `what` the items are is shown with the progress.
    """
    if not items:
        return []
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        return list(progress(pool.map(work, items), what, len(items)))


def check_headers(pairs: dict) -> tuple[dict[Path, tuple[int, int]], list[list[int]]]:
    """Reads the headers of all images and masks -> {image: (H, W)}, [bands, bits] of every kind.

    A bad one, or a mask of another size than its image, stops a run before its first step.
    """
    def compare(pair):
        image, mask = pair
        raster = open_raster(image)
        size = raster.shape[:2]
        if mask:
            check_size(mask, size_of(mask), size)
        kinds.update(kinds_of(raster))
        return size

    kinds = set()
    files = list(dict.fromkeys(pair[:2] for pair in pairs.values()))
    sizes = in_threads(compare, files, "sizes")
    sizes = {image: size for (image, _), size in zip(files, sizes)}
    return sizes, sorted(map(list, kinds))


def check_size(mask: Path, found: tuple[int, int], expected: tuple[int, int]) -> None:
    """Sizes (H, W) of a mask and of its image."""
    if found != expected:
        (h, w), (H, W) = found, expected
        raise BadInput(f"{mask}: mask of {h} x {w} for an image of {H} x {W} (H x W); "
                       "export it at the image's size")


def count_ids(ids: np.ndarray, k: int) -> np.ndarray:
    """Class ids with IGNORE -> (k + 1,) int64 pixels of each class, ignored ones last."""
    return np.bincount(ids.ravel(), minlength=256)[[*range(k), IGNORE]]


def class_counts(pairs: dict, labels: Labels, limit: int | None = None) -> np.ndarray:
    """(N, K+1): count_ids of each mask of pairs {name: (image, mask)}, in order.

    All masks, or an even sample of `limit` pairs. One that cannot be read or holds an unknown
    value is a BadInput. A mask of several tiles is read once, and is one row.
    """
    k = len(labels.names)
    boxes = {}  # {mask: [box] or [nothing]}
    for _, mask, *box in even_sample(list(pairs.values()), limit):
        boxes.setdefault(mask, []).append(box)

    def count(mask):
        ids = labels.load(mask)
        return sum(count_ids(part_of(ids, *box), k) for box in boxes[mask])

    rows = in_threads(count, list(boxes), "masks")
    return np.array(rows, np.int64).reshape(-1, k + 1)


# ---- samples

def normalise(image: np.ndarray, norm: str) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 by a name of NORMS."""
    # Transposed as bytes, which are a quarter of the floats.
    return normalised(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), norm)


def normalised(x: torch.Tensor, norm: str) -> torch.Tensor:
    """(..., 3, H, W) uint8 on any device -> float32 by a name of NORMS."""
    # Not made on the device, which would wait for the copy.
    mean, std = (torch.tensor(v).view(3, 1, 1).to(x.device, non_blocking=True)
                 for v in NORMS[norm])
    return x.float().div_(255).sub_(mean).div_(std)


def uncached(paths: tuple, decode: Callable, tag: str = "") -> tuple:
    """Stands for a data/cache.py Cache where there is none."""
    return decode(*paths)


class SegDataset(torch.utils.data.Dataset):
    """pairs {name: (image, mask)} -> x (3, H, W) float32, y (H, W) int64 with IGNORE, name.

    A third entry of a pair is a box (top, left, h, w) in both. Where the image is transparent, y is
    IGNORE. Index with i, or with (i, draw) as data/samplers.py does.

    `augment(image, mask, rng) -> image, mask` sees uint8 arrays, large ones perhaps as Rows of
    data/cache.py; its rng is a function of (seed, draw) alone: workers, ranks and resuming cannot
    change it.
    `cache(paths, decode, tag)` is a data/cache.py Cache, whose arrays nobody may write to.
    """

    def __init__(self, pairs: dict, labels: Labels, norm: str, augment: Callable | None = None,
                 seed: int = 0, cache: Callable = uncached, bands: list[int] | None = None,
                 input_range: list[float] | None = None):
        self.names = list(pairs)
        self.files = list(pairs.values())
        self.labels = labels
        self.norm = norm
        self.augment = augment
        self.seed = seed
        self.bands = bands
        self.input_range = input_range
        self.cache = cache
        # What besides the files decides the decoded arrays.
        self.tag = " ".join(map(str, [*labels.parts, bands, input_range]))
        # The file read last: the next tile is often of the same one.
        self.last_paths = None
        self.last_arrays = None

    def __len__(self):
        return len(self.names)

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, 3) uint8 image, (H, W) uint8 class ids."""
        image, mask = self.read_lazily(i)
        return np.asarray(image), np.asarray(mask)

    def read_lazily(self, i: int) -> tuple:
        """As read(), but large arrays may be Rows of data/cache.py, of which a crop needs only some."""
        image_path, mask_path, *box = self.files[i]
        paths = image_path, mask_path
        if self.last_paths != paths:
            self.last_arrays = self.cache(paths, self.decode, self.tag)
            self.last_paths = paths
        image, mask = self.last_arrays
        return part_of(image, *box), part_of(mask, *box)

    def decode(self, image_path: Path, mask_path: Path) -> tuple[np.ndarray, np.ndarray]:
        """The two whole files."""
        image, valid = read_valid(image_path, self.bands, self.input_range)
        mask = self.labels.load(mask_path)
        check_size(mask_path, mask.shape, image.shape[:2])
        if valid is not None:
            mask[~valid] = IGNORE
        return image, mask

    def sample(self, i: int, draw: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, 3) uint8 image, (H, W) uint8 class ids of a draw."""
        if self.augment is None:
            return self.read(i)
        image, mask = self.read_lazily(i)
        return self.augment(image, mask, self.rng(draw))

    def rng(self, draw: int) -> np.random.Generator:
        """The random numbers of a draw."""
        # The 2 keeps them apart from those of other purposes.
        return np.random.default_rng((2, self.seed, draw))

    def __getitem__(self, key):
        i, draw = key if isinstance(key, tuple) else (key, 0)
        image, mask = self.sample(i, draw)
        return normalise(image, self.norm), torch.from_numpy(mask.astype(np.int64)), self.names[i]


def renormalise(norm: str, other: str, device: torch.device | str = "cpu") -> tuple | None:
    """(factor, shift), (3, 1, 1) each, that turn pixels normalised one way into the other; None where equal."""
    if norm == other:
        return None
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in NORMS[norm])
    other_mean, other_std = (torch.tensor(v, device=device)[:, None, None] for v in NORMS[other])
    return std / other_std, (mean - other_mean) / other_std
