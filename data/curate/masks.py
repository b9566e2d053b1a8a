"""Decisions of review.py carried out in a new folder of masks, which can be checked and taken back.

    decisions = read_decisions("decisions.json")
    manifest = plan(decisions, source, Path("D/masks_2"), including_heldout=False)
    carry_out(manifest, Path("D/masks_2"))              all masks, and manifest.json
    revert(Path("D/masks_2"), [17])                     region 17 as it was; None: all regions
    faults = verify(Path("D/masks_2"))                  lines about what is not as it was written
    before = before_review(source, "test")              its images whose masks were changed

The masks of the data set are only read. Changed ones keep their form: ids or colours, palette,
alpha, georeference; what is written is read again and compared before it gets its name.
"""
import filecmp
import functools
import os
import re
import time
from collections import Counter, defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from ..common import (IGNORE, BadInput, as_text, file_sha256, fits, nfc, progress, read_json,
                      replace, temporary_of, write)
from ..datasets import SegDataset
from ..files import is_image, match, star_key
from ..io import Labels
from ..raster import open_raster
from ..source import Source
from ..tiff import KEY_TAGS, MODEL_TAGS, Tag, mask_beside
from .regions import check_region, from_runs, part

HELD_OUT = {"val", "test", "select"}
MANIFEST = "manifest.json"
KEPT_TAGS = (*MODEL_TAGS, *KEY_TAGS, Tag.GDALMetadata, Tag.GDALNoData)


# ---- what is to be done

def read_decisions(path: str | Path) -> dict:
    """decisions.json as the page has saved it, and its sha256."""
    found = read_json(path)
    for key in ("root", "classes", "models", "decisions"):
        if key not in found:
            raise BadInput(f"{path}: no {key!r}; expected a decisions.json that the page of "
                           "data.curate review has saved")
    # A region that is listed twice would be decided by the order of the file.
    seen = set()
    for decision in found["decisions"]:
        check_region(decision, path, verdict=str, reviewer=str, time=str)
        chosen = decision.get("class")
        if not isinstance(chosen, str | None):
            raise BadInput(f"{path}: region {decision['id']} becomes {chosen!r}; expected the name "
                           "of a class, or null for ignored")
        if decision["id"] in seen:
            raise BadInput(f"{path}: two decisions about region {decision['id']}; leave one")
        seen.add(decision["id"])
    return found | {"sha256": file_sha256(path)}


def plan(decisions: dict, source: Source, out: Path, including_heldout: bool) -> dict:
    """manifest.json before anything is written: all masks, and the regions that will change.

    A decision about labels that are others by now, or that were held out, is a BadInput.
    """
    check_out(out, source)
    # The whole data set, so that dataset.json can point at the new folder.
    masks = {}  # {path in the new folder: what is known of it}
    for _, mask, *_ in source.pairs.values():
        if mask is not None:
            original = os.path.relpath(mask, source.root)
            masks[new_place(source.root, original)] = dict(original=original, regions=[])
    held_out = held_out_names(source, decisions)
    for decision in decisions["decisions"]:
        # "keep" and "skip" change nothing.
        if decision["verdict"] not in ("accept", "other"):
            continue
        name = decision["image"]
        if name not in source.pairs or source.pairs[name][1] is None:
            raise BadInput(f"{source.root}: no mask of {name!r}, about which region "
                           f"{decision['id']} is; type --root with the folder that was reviewed")
        if name in held_out and not including_heldout:
            raise BadInput(f"region {decision['id']}: {name} is held out for "
                           f"{held_out[name]}, and scores on changed labels cannot be compared "
                           "with older ones; type --including-heldout to change it all the same")
        _, mask, *tile = source.pairs[name]
        place = new_place(source.root, os.path.relpath(mask, source.root))
        masks[place]["regions"].append(region_of(decision, source, tile))
    for place, about in masks.items():
        # So that verify can tell whether an original was touched, and revert what it goes back to.
        about["before"] = file_sha256(source.root / about["original"])
        about["after"] = None
        if about["regions"]:
            with TemporaryDirectory() as folder:  # a form that cannot be written stops it now
                write_new(Path(folder) / "mask", source.root / about["original"], about["regions"],
                          source.labels)
    labels = source.labels
    table = dict(classes=labels.classes, ignore=labels.ignore, threshold=labels.threshold)
    return dict(complete=False, decisions=decisions["sha256"], root=str(source.root),
                reviewer=decisions.get("reviewer"), controls=decisions.get("controls"),
                models=decisions["models"], labels=table, masks=masks)


def overview(decisions: dict) -> str:
    """A line that shows whether this is the file that was meant: how many decisions, until when."""
    found = decisions["decisions"]
    counts = Counter(decision["verdict"] for decision in found)
    kinds = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    line = f"{len(found)} decisions ({kinds})" if found else "no decision"
    if found:
        line += f", the last of {max(decision['time'] for decision in found)}"
    if decisions.get("open"):
        line += f"; {decisions['open']} regions of the page were still open"
    return as_text(line)


def held_out_names(source: Source, decisions: dict) -> dict[str, str]:
    """{image: its split} of those that are for choosing weights or for scores."""
    # By dataset.json first.
    found = {}
    for split in HELD_OUT & source.splits.keys():
        found |= dict.fromkeys(source.splits[split], split)
    # A split of another file than dataset.json: eval.py has said its name.
    asked = {model.get("split") for model in decisions["models"]}
    if asked and asked <= HELD_OUT:
        split = ", ".join(sorted(asked))
        found |= {decision["image"]: split for decision in decisions["decisions"]}
    return found


def region_of(decision: dict, source: Source, tile: list) -> dict:
    """What manifest.json says of a region: box in the whole mask, from which class to which."""
    # The page knows the tile only; the file is the whole mask.
    box = list(decision["box"])
    if tile:  # of an image that is cut into several
        box[0] += tile[0][0]
        box[1] += tile[0][1]
    chosen = decision.get("class")
    for name in (decision["label"], chosen):
        if name is not None and nfc(name) not in source.names:
            raise BadInput(f"region {decision['id']}: no class {name!r}; {source.root} has "
                           f"{', '.join(source.names)}")
    if chosen is None and source.labels.void is None:
        raise BadInput(f"region {decision['id']} is to be ignored, and no value in the masks means "
                       'that; add one, such as 255, to "ignore" in dataset.json')
    return dict(id=decision["id"], image=decision["image"], box=box, runs=decision["runs"],
                label=decision["label"], to=chosen, reason=decision["verdict"],
                reviewer=decision["reviewer"], time=decision["time"])


def new_ids(mask: Path, regions: list[dict], labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) class ids of a mask after the change, and (H, W) bool where it changes."""
    names = [nfc(name) for name in labels.names]
    ids = labels.load(mask)
    changed = np.zeros(ids.shape, bool)
    # Each region must lie on the label that the reviewer saw: otherwise it is about other labels.
    for region in regions:
        top, left, h, w = region["box"]
        if top + h > ids.shape[0] or left + w > ids.shape[1]:
            raise BadInput(f"{mask}: region {region['id']} lies outside of it; search suspects "
                           "and review them again")
        inside = from_runs(region["runs"], (h, w))
        place = part(region["box"])
        if not (ids[place][inside] == names.index(nfc(region["label"]))).all():
            raise BadInput(f"{mask}: region {region['id']} is not {region['label']!r} any more; "
                           "search suspects and review them again")
        to = IGNORE if region["to"] is None else names.index(nfc(region["to"]))
        ids[place][inside] = to
        changed[place] |= inside
    return ids, changed


# ---- places

@functools.cache
def masks_made_in(folder: Path) -> dict[str, dict]:
    """{path: its original and the root of that} of a folder that apply has written; else {}."""
    if not (folder / MANIFEST).is_file():
        return {}
    try:
        manifest = read_manifest(folder, whole=False)
    except BadInput:  # a manifest.json of another program
        return {}
    return {place: about | {"root": manifest["root"]} for place, about in manifest["masks"].items()}


def new_place(root: Path, path: str) -> str:
    """Path of a mask, or pattern of masks, in root -> the same in a new folder.

    What an earlier review has put in front is left out, and so are ways out of root.
    """
    # Masks of a second round lie in masks_2 already, and must not go to masks_3/masks_2.
    parts = Path(path).parts
    for n in range(len(parts) - 1, 0, -1):
        if masks_made_in(root.joinpath(*parts[:n])):
            return Path(*parts[n:]).as_posix()
    return Path(*[p for p in parts if p != ".."]).as_posix()


def patterns_of(description: dict, key: str) -> list[str]:
    """"images" or "masks" of a description, as a list."""
    patterns = description[key]
    return [patterns] if isinstance(patterns, str) else patterns


def new_patterns(source: Source, out: Path) -> list[str]:
    """"masks" of dataset.json, for the masks in `out`."""
    base = Path(os.path.relpath(out, source.root)).as_posix()
    # A bracket or star in the name of a folder is none of a pattern.
    base = re.sub(r"[][*?]", lambda sign: f"[{sign[0]}]", base)
    found = []
    for pattern in patterns_of(source.description, "masks"):
        found.append(f"{base}/{new_place(source.root, pattern)}")
    return found


def check_out(out: Path, source: Source) -> None:
    """BadInput for a folder where the new masks would be taken for others, or replace them."""
    if out.resolve() == source.root:
        raise BadInput(f"--out {out}: the data set itself; name a new folder, such as "
                       f"{source.root / 'masks_2'}")
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out}: a file; name a new folder")
    base = Path(os.path.relpath(out.resolve(), source.root)).as_posix()
    # A pattern such as **/*.png would find the new masks beside the old ones.
    masks = [mask for _, mask, *_ in source.pairs.values() if mask is not None]
    for mask in masks:
        place = f"{base}/{new_place(source.root, os.path.relpath(mask, source.root))}"
        for key in ("images", "masks"):
            for pattern in patterns_of(source.description, key):
                if star_key(pattern, place) is not None:
                    raise BadInput(f"--out {out}: the pattern {pattern!r} of the data set would "
                                   "take the new masks for its own; name a folder outside of "
                                   f"{source.root}, or a deeper one")


# ---- carrying it out

def applied(manifest: dict, out: Path) -> bool:
    """Are these decisions carried out already? A folder with other contents is a BadInput."""
    if not out.is_dir() or not any(out.iterdir()):
        return False
    if not (out / MANIFEST).exists():
        raise BadInput(f"--out {out}: has other files; name a new folder")
    there = read_manifest(out, whole=False)
    # The same decisions are the same bytes: compared by their sha256.
    if there["decisions"] != manifest["decisions"] or there.get("root") != manifest["root"]:
        raise BadInput(f"--out {out}: has the masks of other decisions; name a new folder")
    return there.get("complete", False)


def carry_out(manifest: dict, out: Path) -> bool:
    """Write all masks into `out`; False: they are there. Killed and called again it finishes."""
    if applied(manifest, out):
        return False
    # Not complete: verify and revert refuse it, and apply begins anew.
    write(out / MANIFEST, manifest)
    labels = Labels.of(manifest["labels"])
    # Masks without a region are copied, so that the folder stands for the whole data set.
    for place, about in progress(manifest["masks"].items(), "masks"):
        write_new(out / place, Path(manifest["root"]) / about["original"], about["regions"], labels)
        about["after"] = file_sha256(out / place)
    # What a killed process was writing.
    for pattern in ("**/*.tmp", "*.tmp"):
        for file, _ in match(out, pattern):
            if temporary_of(file.name):
                file.unlink()
    write(out / MANIFEST, manifest | {"complete": True})
    return True


def write_new(path: Path, original: Path, regions: list[dict], labels: Labels) -> None:
    """A mask with its regions changed, or a copy without any; files beside it are copied."""
    for file in beside(original):
        copy(file, path.with_name(file.name))
    # Nothing to change: the same bytes, whatever form the file has.
    if not regions:
        copy(original, path)
        return
    ids, changed = new_ids(original, regions, labels)

    def save(name):
        picture, options = repainted(original, ids, changed, labels)
        picture.save(name, **options)
        # Read again before it gets its name: a lossy or too narrow form is found here.
        if not same_ids(name, original, ids, labels):
            raise BadInput(f"{original}: its form ({options['format']}, {picture.mode}) cannot "
                           "hold the new classes; save the masks as PNG of 8 bits, and correct "
                           "dataset.json")

    replace(path, save)


def same_ids(path: str, original: Path, ids: np.ndarray, labels: Labels) -> bool:
    """Does the new file hold these ids? The original's .msk, if any, will lie beside it."""
    try:
        found = labels.load(path)
    except BadInput:
        return False
    seen = mask_beside(original, ids.shape, None)
    # Under the original name its .msk hides pixels; the ids to compare with are those it leaves.
    if seen is not None:
        found[~seen] = IGNORE
    return np.array_equal(found, ids)


def copy(source: Path, path: Path) -> None:
    """The same bytes, whole or not at all."""
    replace(path, lambda name: Path(name).write_bytes(source.read_bytes()))


def beside(mask: Path) -> list[Path]:
    """Files of a mask's name that are no images: its world file, what a GIS noted, a .msk."""
    return files_by_stem(mask.parent).get(mask.stem, [])


@functools.cache
def files_by_stem(folder: Path) -> dict[str, list[Path]]:
    """{part of the name before its last suffix, or the one before: files that are no images}."""
    found = defaultdict(list)
    for file in sorted(folder.iterdir()):
        if file.is_file() and not is_image(file) and file.name != MANIFEST:
            found[file.stem].append(file)
            if is_image(Path(file.stem)):  # a.tif.msk, a.tif.aux.xml
                found[Path(file.stem).stem].append(file)
    return dict(found)


def repainted(path: Path, ids: np.ndarray, changed: np.ndarray, labels: Labels
              ) -> tuple[Image.Image, dict]:
    """A mask file with the ids where `changed`, as Pillow's image, and how to save it."""
    raster = open_raster(path)
    # Pillow keeps mode and palette; what it cannot hold is found when the new file is read again.
    try:
        image = Image.open(path)
        image.load()
    except Exception as e:  # Pillow raises a dozen kinds
        raise BadInput(f"{path}: Pillow cannot read it ({str(e)[:80]}), so it cannot be changed; "
                       "save the masks as PNG and correct dataset.json") from None
    values = labels.decode(ids[changed])  # (n,) ids or (n, 3) colours
    options = dict(format=image.format)
    # Else one colour would become opaque, and what it hides a label.
    if "transparency" in image.info:
        options["transparency"] = image.info["transparency"]
    # Lossless, and where the mask lies on the ground stays.
    if image.format == "TIFF":
        options["compression"] = "tiff_adobe_deflate"
        options["tiffinfo"] = {tag: image.tag_v2[tag] for tag in KEPT_TAGS if tag in image.tag_v2}

    if image.mode == "P":
        return repainted_indices(image, values, changed, labels), options
    if image.mode == "1" or raster.bits in (2, 4):
        # Pillow shows such greys as 0 to 255; ids are the numbers in the file.
        grey = np.array(image.convert("L"))
        pixels = grey if labels.threshold is not None else raster.read()[..., 0]
    else:
        pixels = np.array(image)
    # 1 band of greys, 2 with alpha, 3 of colours, 4 with alpha.
    bands = 1 if pixels.ndim == 2 else pixels.shape[2]
    if bands == 1:
        pixels[changed] = values
    else:
        colours = bands - (bands in (2, 4))
        pixels[changed, :colours] = values if values.ndim == 2 else values[:, None]
        pixels[changed, colours:] = 255  # alpha
    return Image.fromarray(pixels), options


def repainted_indices(image: Image.Image, values: np.ndarray, changed: np.ndarray, labels: Labels
                      ) -> Image.Image:
    """A palette image with ids, or with indices of colours, where `changed`; the palette stays."""
    pixels = np.array(image)
    palette = image.getpalette("RGB")
    if not labels.by_color and labels.threshold is None:
        pixels[changed] = values
    else:
        if values.ndim == 1:  # greys
            values = values[:, None].repeat(3, 1)
        # Colours count, not indices: the colour of a class may have to be added to the palette.
        listed = [tuple(palette[i:i + 3]) for i in range(0, len(palette), 3)]
        colors, which = np.unique(values, axis=0, return_inverse=True)
        indices = []
        for color in map(tuple, colors.tolist()):
            if color not in listed:
                listed.append(color)
            indices.append(listed.index(color))
        if len(listed) > 256:
            raise BadInput(f"{image.filename}: a full palette without the colour of a class; save "
                           "the masks as RGB and correct dataset.json")
        pixels[changed] = np.array(indices, np.uint8)[which.ravel()]
        palette = [value for color in listed for value in color]
    repainted = Image.fromarray(pixels, "P")
    repainted.putpalette(palette)
    return repainted


def summary(manifest: dict) -> list[str]:
    """A line for each mask that changes, and one for all."""
    lines = []
    count = 0
    for place, about in manifest["masks"].items():
        regions = about["regions"]
        if regions:
            count += len(regions)
            changes = []
            for region in regions:
                to = region["to"] or "ignored"
                changes.append(f"{region['id']}: {region['label']} -> {to}")
            lines.append(as_text(f"{place}: {', '.join(changes)}"))
    return [*lines, f"{count} regions in {len(lines)} of {len(manifest['masks'])} masks change"]


# ---- afterwards

def read_manifest(out: Path, whole: bool = True) -> dict:
    """manifest.json of a folder of masks; whole: it must be finished."""
    path = out / MANIFEST
    if not path.exists():
        raise BadInput(f"{path}: no such file; expected a folder that data.curate apply has "
                       "written")
    found = read_json(path)
    masks = found.get("masks")
    good = fits(masks, dict[str, dict]) and {"decisions", "root", "labels"} <= found.keys()
    for place, about in (masks if good else {}).items():
        # Files are written there: nothing may lead out of the folder.
        inside = not Path(place).is_absolute() and ".." not in Path(place).parts
        good = good and inside and {"original", "before", "after", "regions"} <= about.keys()
    if not good:
        raise BadInput(f"{path}: not a manifest of data.curate apply; name a folder that it has "
                       "written")
    if whole and not found.get("complete"):
        raise BadInput(f"{out}: not finished; type the apply command again")
    return found


def revert(out: Path, ids: list[int] | None) -> int:
    """Take back regions, or all; a mask without a changed region is the original, byte for byte."""
    manifest = read_manifest(out)
    labels = Labels.of(manifest["labels"])
    # A mistyped number must not pass for "nothing to take back".
    known = set()
    for about in manifest["masks"].values():
        known.update(region["id"] for region in about["regions"])
    unknown = set(ids or ()) - known
    if unknown:
        raise BadInput(f"{out}: no changed region {min(unknown)}; there are "
                       f"{', '.join(map(str, sorted(known)[:20])) or 'none'}")
    reverted = 0
    # Masks first, then the manifest: killed between them, the same command does it once more.
    for place, about in manifest["masks"].items():
        gone = [region for region in about["regions"] if ids is None or region["id"] in ids]
        if not gone:
            continue
        # Made of the original again, so that nothing of the region can stay.
        original = Path(manifest["root"]) / about["original"]
        if not original.exists() or file_sha256(original) != about["before"]:
            raise BadInput(f"{original}: not the mask that was changed into {out / place}; bring "
                           "the original back")
        about["regions"] = [region for region in about["regions"] if region not in gone]
        for region in gone:
            region["reverted"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        # What was taken back, and when, stays on record.
        about.setdefault("reverted", []).extend(gone)
        write_new(out / place, original, about["regions"], labels)
        about["after"] = file_sha256(out / place)
        reverted += len(gone)
    write(out / MANIFEST, manifest)
    return reverted


def verify(out: Path) -> list[str]:
    """What is not as manifest.json says: a line for each missing, changed or unknown file."""
    manifest = read_manifest(out)
    faults = []
    for place, about in manifest["masks"].items():
        original = Path(manifest["root"]) / about["original"]
        for file, digest in ((original, about["before"]), (out / place, about["after"])):
            if not file.exists():
                faults.append(f"{file}: missing")
            elif file_sha256(file) != digest:
                faults.append(f"{file}: changed since it was noted in {MANIFEST}")
    # A picture that nobody noted would be taken for a mask by the pattern in dataset.json.
    known = {out / place for place in manifest["masks"]}
    for file, _ in match(out, "**/*"):
        if is_image(file) and file not in known:
            faults.append(f"{file}: not in {MANIFEST}")
    return [as_text(fault) for fault in faults]


def before_review(source: Source, split: str) -> SegDataset | None:
    """Images of a split whose masks apply has changed, with the masks they had; None without any.

    After several reviews these are the masks of before the first one; what is gone is left out.
    """
    found = {}
    for name, (image, mask, *tile) in source.files(split).items():
        original = mask and original_of(mask)
        # Copied into the new folder without a decision, a mask is the same bytes.
        if original != mask and original.exists() and not filecmp.cmp(original, mask, False):
            found[name] = (image, original, *tile)
    if not found:
        return None
    return SegDataset(found, source.labels, "imagenet", **source.reading)


def original_of(mask: Path) -> Path:
    """The first mask of which reviews have made this one; itself, if it is of none."""
    for folder in mask.parents:
        about = masks_made_in(folder).get(mask.relative_to(folder).as_posix())
        if about:
            return original_of(Path(about["root"]) / about["original"])
    return mask
