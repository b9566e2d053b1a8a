"""Which mask belongs to which image, as the patterns that dataset.json begins with.

    draft_patterns(root, complaints)  ->  {"images": "img/*.jpg", "masks": "gt/*.png"}
"""
import os
import re
from collections import defaultdict
from glob import escape
from itertools import zip_longest
from pathlib import Path

from ..common import BadInput, nfc
from ..files import SUFFIXES, images_in, not_used
from .complaints import Complaints

MASK = re.compile(r"masks?|(?<!un)label[a-z]*|annot[a-z]*|segm[a-z]*|ground.?truth|"
                  r"(?<![a-z])(?:gts?|lbls?|ann|seg|targets?)(?![a-z])|_m$", re.I)
IMAGE = re.compile(r"image(?:s|ry)?|img|rgb(?:ir)?|irrg|photo|ortho|"
                   r"(?<![a-z])(?:src|sat|input)(?![a-z])", re.I)
# All that a name says beside the place it shows, with the signs around it: "_label_noBoundary", and
# "[mask]", but not the bracket of "[1]_mask".
WORD = rf"{MASK.pattern}|{IMAGE.pattern}|instance|colou?r|noboundary"
WORDS = re.compile(rf"([\s_.-]*(?:[([{{]*(?:{WORD})[\])}}]*[\s_.-]*)+)", re.I)
# The names of splits, as in the folders train, Val and testing.
SPLIT = re.compile(r"(?<![a-z])(train|trn|val|dev|test)(?:ing|id|idation)?(?![a-z])", re.I)
MAX_PATTERNS = 99  # more of them mean that the names follow no rule


def draft_patterns(root: Path, chosen: str | None, complaints: Complaints) -> dict:
    """{"images": pattern or list of patterns, "masks": the same} as in dataset.json.

    `chosen`: the folder of the masks, where there are several; its name, or its path.
    """
    images, masks = find_pictures(root, chosen, complaints)
    patterns, paired = propose(pair_up(images, masks))
    if not 0 < len(patterns) <= MAX_PATTERNS:
        some_images, some_masks = ([str(p) for p in files[:2]] for files in (images, masks))
        raise BadInput(f"{root}: no rule by which images such as {some_images} and masks such as "
                       f"{some_masks} pair; give both the same name in folders images and masks")
    for kind, files in ("images", images), ("masks", masks):
        rest = [p for p in files if p not in paired]
        if rest:
            hint = "; --masks FOLDER chooses others" if kind == "masks" else ""
            complaints.warning("unused", f"{len(rest)} {kind} are in no pair and not in the draft, "
                                         f"first {rest[0]}{hint}")
    if len(patterns) == 1:
        images, masks = patterns[0]
        return {"images": images, "masks": masks}
    return {"images": [image for image, _ in patterns], "masks": [mask for _, mask in patterns]}


def find_pictures(root: Path, chosen: str | None,
                  complaints: Complaints) -> tuple[list[Path], list[Path]]:
    """Images and masks, relative to root, told apart by the words in their folders and names.

    `chosen`: as for draft_patterns.
    """
    pictures, others = images_in(root)
    others = [file for file in others if file != root / "dataset.json"]  # of an earlier draft
    files = [file.relative_to(root) for file in pictures]
    if not files:
        found = f"; {not_used(others)}" if others else ""
        raise BadInput(f"{root}: no {' '.join(SUFFIXES)} file in it{found}; "
                       "type the folder that holds the images and masks")
    if others:
        complaints.note("suffix", not_used(others))

    # A folder that holds all pictures, such as "segmentation", tells none apart.
    shared = len(Path(os.path.commonpath([p.parent for p in files])).parts)
    images = []
    masks = []
    for p in files:
        words = [*p.parts[shared:-1], p.stem]
        is_mask = any(MASK.search(word) for word in words)
        (masks if is_mask else images).append(p)
    if chosen:
        masks = in_folder(root, chosen, files)
        images = sorted(set(images) - set(masks))
    for found, missing, advice in (
            (images, "image", "an image needs one of these suffixes"),
            (masks, "mask", "no folder or file name says mask, label, gt or the like; name the "
                            "folder of the masks: --masks FOLDER")):
        if not found:
            passed = f"; {not_used(others)}" if others else ""
            raise BadInput(f"{root}: {len(files)} pictures, first {files[0]}, and no {missing} "
                           f"among them: {advice}{passed}")
    return images, masks


def in_folder(root: Path, folder: str, files: list[Path]) -> list[Path]:
    """The files, relative to root, that lie in folders of this name or path."""
    # As a path it may have been typed from where the user stands.
    typed = Path(folder)
    if typed.is_dir() and typed.resolve().is_relative_to(root.resolve()):
        folder = typed.resolve().relative_to(root.resolve()).as_posix()
    folder = folder.replace("\\", "/").strip("/")
    found = [p for p in files if f"/{nfc(folder)}/" in f"/{nfc(p.parent.as_posix())}/"]
    if not found:
        names = sorted({p.parent.as_posix() for p in files})
        raise BadInput(f"{root}: no picture in a folder {folder!r}; "
                       f"there are {', '.join(names[:9])}")
    return found


def pair_up(images: list[Path], masks: list[Path]) -> list[tuple[Path, Path]]:
    """Each mask with the images of its place: several where a set brings infrared or overlays."""
    by_place = defaultdict(list)
    for p in images:
        by_place[place_of(p)].append(p)
    pairs = []
    for m in masks:
        # "Tile 1/masks/part_001" belongs to the part_001 that shares its folder "Tile 1", and
        # "test_gt/1" to that in "test_img".
        shared = {p: len(folder_places(p) & folder_places(m)) for p in by_place[place_of(m)]}
        most = max(shared.values(), default=0)
        pairs += [(p, m) for p, n in shared.items() if n == most]
    return pairs


def place_of(file: Path) -> str:
    """The name without WORDS, or the folder's if nothing is left.

    "a_sat.jpg" -> "a", "b/image.png" -> "b/".
    """
    name = without_words(file.stem)
    if name:
        return name
    folders = [without_words(part) for part in file.parts[-2::-1]]
    return next(filter(None, folders), "") + "/"


def without_words(part: str) -> str:
    """A part of a path without WORDS: "top_1_RGB" -> "top_1"."""
    # A slash stands for each gap, as between the stars of a pattern: with nothing there,
    # "a_img_b" and "a_b_mask" would be one place, but have no pattern in common.
    return "/".join(filter(None, WORDS.split(nfc(part))[::2]))


def folder_places(file: Path) -> set[str]:
    """What the names of its folders say beside WORDS."""
    return {without_words(part) for part in file.parts[:-1]}


def propose(pairs: list[tuple[Path, Path]]) -> tuple[list[tuple[str, str]], set[Path]]:
    """The most frequent patterns that share no file, and the files that they pair.

    Patterns: sorted [(of images, of masks)].
    """
    groups = defaultdict(list)
    for image, mask in pairs:
        groups[star_patterns(image, mask)].append((image, mask))

    # The largest group first; of equal ones, what a set would call its images and masks. A JPEG
    # mask comes last: it is a preview, since no mask survives JPEG.
    def rank(patterns):
        image, mask = patterns
        is_jpeg = mask.lower().endswith((".jpg", ".jpeg"))
        return -len(groups[patterns]), is_jpeg, not IMAGE.search(image), len(image + mask), patterns

    found = []
    paired = set()
    seen = set()
    for patterns in sorted(groups, key=rank):
        files = set()
        for pair in groups[patterns]:
            files.update(pair)
        if not files & seen:
            images, masks = zip(*groups[patterns])
            found.append((fill_in(patterns[0], images), fill_in(patterns[1], masks)))
            paired |= files
        # Those of rejected groups count as seen, too: a second set of masks must not end with the
        # infrared images.
        seen |= files
    return sorted(found), paired


def star_patterns(image: Path, mask: Path) -> tuple[str, str]:
    """Patterns that pair these two: common folders and the place become stars, the rest stays."""
    # Train/ and Val/ keep their names: many sets come with a Test/ without masks, which a star
    # would let in.
    common = []
    for a, b in zip(image.parts[:-1], mask.parts[:-1]):
        common.append(nfc(a) == nfc(b) and not SPLIT.search(a))

    def stars(p):
        folders = ["*" if same else escape(part)
                   for part, same in zip_longest(p.parts[:-1], common)]
        if nfc(image.stem) == nfc(mask.stem):  # macOS spells letters with marks as two
            return "/".join([*folders, "*" + escape(p.suffix)])
        name = ""
        for i, text in enumerate(WORDS.split(p.stem)):
            is_word = i % 2 == 1
            name += escape(text) if is_word or not text else "*"
        return "/".join([*folders, name + escape(p.suffix)])

    return stars(image), stars(mask)


def fill_in(pattern: str, files: tuple[Path]) -> str:
    """The pattern, where a star that stands for one folder only becomes its name."""
    *folders, name = pattern.split("/")
    for i in range(len(folders)):
        values = {f.parts[i] for f in files}
        folders[i] = escape(values.pop()) if len(values) == 1 else "*"
    return "/".join([*folders, name])
