"""What the masks hold, as the classes of a draft.

    scans = {mask: scan(mask) for mask in masks}
    values = count_values(scans, complaints)
    described = draft_classes(values, complaints)    {"classes": [...], "ignore": [...]}
"""
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..common import BadInput
from ..io import UNKNOWN, is_id, pack, read_labels
from ..raster import open_raster
from .complaints import Complaints

STRAY = 1e-4  # a colour on a smaller share of all pixels comes from drawing or resizing
MAX_STRAYS = 64  # more of them mean blurred masks, which no list of colours can mend
TABLE_ROWS = 40
# Values that often mean unlabelled or no data: zero, and what fills the bytes of a number.
VOID = (0, 255, 65535, 2**32 - 1, "#000000")

# Soft masks: nearly all pixels are as good as black or white, and greys of all kinds lie between.
THRESHOLD = 127
END = 16  # greys that count as black, and as white
SOFT = 0.9  # the least share of both together
BETWEEN = 16  # the least number of greys on either side of the threshold: no table of ids has them


class Scan(NamedTuple):
    """One mask."""
    kind: str  # palette, grey, RGB or grey RGB
    values: np.ndarray  # ids, or colours as one number
    counts: np.ndarray  # their pixels
    palette: np.ndarray | None  # (256, 3) uint8
    nodata: float | None  # the file's own tag


class Values(NamedTuple):
    """All masks; values as dataset.json writes them: 3, or "#3C1098" where colours count."""
    pixels: Counter  # {value: its pixels}
    files: dict[int | str, list[Path]]  # {value: masks with it}
    colors: dict[int, str]  # {id: "#3C1098"} of palettes
    masks: int  # how many, also those that cannot be read
    kinds: Counter  # {kind: readable masks}
    nodata: list[int | str]  # by the masks' own tags, whether or not it occurs


def scan(path: Path) -> Scan:
    """Count the values of a mask, where they are data."""
    mask, valid, palette = read_labels(path)
    if palette is not None:
        kind = "palette"
    elif mask.ndim == 2:
        kind = "grey"
    elif (mask == mask[..., :1]).all():
        kind = "grey RGB"
    else:
        kind = "RGB"
    packed = pack(mask) if mask.ndim == 3 else mask
    if valid is not None:
        packed = packed[valid]
    values, counts = np.unique(packed, return_counts=True)
    raster = open_raster(path)
    nodata = raster.nodata
    if isinstance(nodata, tuple):
        nodata = None  # the bands of a colour have different ones: no value of a table
    if nodata is not None and raster.dtype.kind in "iu":
        limits = np.iinfo(raster.dtype)
        if not limits.min <= nodata <= limits.max:  # GDAL does not count it either
            nodata = None
    return Scan(kind, values, counts, palette, nodata)


def count_values(scans: dict[Path, Scan | BadInput], complaints: Complaints) -> Values:
    """{mask: scan of it} -> Values, of ids if all masks agree on what an id is."""
    unreadable = [s for s in scans.values() if isinstance(s, BadInput)]
    if len(unreadable) == len(scans):
        raise BadInput(f"{unreadable[0]} (all {len(unreadable)} masks fail)")
    for why in unreadable:
        complaints.error("mask", why)
    good = {file: s for file, s in scans.items() if not isinstance(s, BadInput)}
    kinds = Counter(s.kind for s in good.values())

    # Programs that reduce colours number them anew in every file: then the ids mean nothing and
    # the colours count.
    painted = palette_colors(good)
    by_color = "RGB" in kinds or any(len(colors) > 1 for colors in painted.values())

    pixels = Counter()
    files = defaultdict(list)
    nodata = {}
    for file, s in good.items():
        nodata[tag_of(s, by_color)] = True
        if by_color and s.kind == "grey":
            complaints.error("grey", f"{file}: one band of ids {s.values[:8].tolist()} among masks "
                                     "of colours; save it in the colours of the others")
            continue
        values = s.values
        if by_color and s.kind == "palette":
            values = pack(s.palette[values])
        elif not by_color and s.kind == "grey RGB":
            values = values & 255  # of three equal bands, one
        for v, n in zip(values.tolist(), s.counts.tolist()):
            value = f"#{v:06X}" if by_color else v
            pixels[value] += n
            files[value].append(file)

    # A palette of greys 0, 1, 2, ... is nobody's choice of colours.
    is_ramp = all(colors == {v * 0x10101} for v, colors in painted.items())
    chosen = {}
    if not by_color and not is_ramp:
        chosen = {v: f"#{color:06X}" for v, (color,) in painted.items()}
    nodata.pop(None, None)
    return Values(pixels, files, chosen, len(scans), kinds, list(nodata))


def tag_of(s: Scan, by_color: bool) -> int | str | None:
    """A mask's nodata tag as dataset.json writes values; None if no value of a mask can be it."""
    if s.nodata is None or not is_id(s.nodata):
        return None
    v = int(s.nodata)
    if not by_color:
        return v
    if not 0 <= v <= 255:
        return None
    color = pack(s.palette[v]) if s.kind == "palette" else v * 0x10101
    return f"#{int(color):06X}"


def palette_colors(scans: dict[Path, Scan]) -> dict[int, set[int]]:
    """{id: its packed colours in the palettes of all masks}."""
    painted = defaultdict(set)
    for s in scans.values():
        if s.kind == "palette":
            for v in s.values.tolist():
                painted[v].add(int(pack(s.palette[v])))
    return painted


def values_table(root: Path, values: Values) -> list[str]:
    """Lines to print: the kinds of masks, then the values by falling share."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in values.kinds.most_common())
    lines = [f"{values.masks} masks read: {kinds}",
             f"{'value':>8} {'share':>9} {'files':>6}  first in"]
    for v, n in values.pixels.most_common(TABLE_ROWS):
        files = values.files[v]
        share = n / values.pixels.total()
        lines.append(f"{v:>8} {share:9.4%} {len(files):6d}  {files[0].relative_to(root)}")
    return lines


def is_drafted(c: dict) -> bool:
    """Has this class the name that draft_classes() gave it, by its id or its colour's rank?"""
    if "id" in c:
        return c["name"] == f"id_{c['id']}"
    return bool(re.fullmatch(r"class_\d+", c["name"]))


def draft_classes(values: Values, complaints: Complaints) -> dict:
    """"classes", ids in rising order and colours by falling share, "ignore", "threshold" if soft."""
    if not values.pixels:
        raise BadInput(f"{values.masks} masks, and no pixel of them is data; expected ids or "
                       "colours: export the masks anew")
    if is_soft(values, complaints):
        ignored = [v for v in values.nodata if not 0 <= v <= 255]
        note_nodata(ignored, complaints)
        return {"classes": [{"name": f"id_{i}", "id": i} for i in (0, 1)], "ignore": ignored,
                "threshold": THRESHOLD}
    ignored = proposed_nodata(values, complaints)
    ranked = [v for v, _ in values.pixels.most_common() if v not in ignored]
    by_color = isinstance(ranked[0], str)
    least = STRAY * values.pixels.total()
    rare = [v for v in ranked if values.pixels[v] < least]
    # A rare id is a rare class, since nobody's brush mixes ids; a rare colour may be a mixture.
    stray = []
    kept = ranked
    if by_color:
        stray = rare
        kept = [v for v in ranked if values.pixels[v] >= least]
    if len(rare) > MAX_STRAYS or len(kept) > UNKNOWN:
        file = values.files[ranked[-1]][0]
        raise BadInput(f"{file}: {len(ranked)} values in the masks, {len(rare)} of them rare: "
                       "blurred edges, or no masks at all; export them without anti-aliasing, "
                       "resize them with nearest")
    if stray:
        complaints.warning("stray", f"the draft IGNORES {', '.join(stray)}: each under {STRAY:.2%} "
                                    "of the pixels; if one is a class, move it from \"ignore\" to "
                                    '"classes"')
    note_void(kept, ranked, complaints)
    if by_color:
        classes = [{"name": f"class_{i}", "color": v} for i, v in enumerate(kept, 1)]
        return {"classes": classes, "ignore": [*ignored, *stray]}
    classes = []
    for v in sorted(kept):
        color = {"color": values.colors[v]} if v in values.colors else {}
        classes.append({"name": f"id_{v}", "id": v, **color})
    return {"classes": classes, "ignore": ignored}


def is_soft(values: Values, complaints: Complaints) -> bool:
    """Are the masks greys of which most are black or white, with all kinds of greys between?"""
    pixels = {v: n for v, n in values.pixels.items() if v not in values.nodata or v in range(256)}
    if not values.kinds.keys() <= {"grey", "grey RGB"} or not pixels.keys() <= set(range(256)):
        return False
    black = sum(n for v, n in pixels.items() if v < END)
    white = sum(n for v, n in pixels.items() if v > 255 - END)
    dark = [v for v in pixels if 0 < v <= THRESHOLD]
    bright = [v for v in pixels if THRESHOLD < v < 255]
    share = (black + white) / sum(pixels.values())
    if not black or not white or share < SOFT or min(len(dark), len(bright)) < BETWEEN:
        return False
    complaints.note("soft", f"soft masks: {len(pixels)} greys, of which those below {END} and above "
                    f"{255 - END} cover {share:.1%} of the pixels; \"threshold\": {THRESHOLD} in "
                    "the draft makes greys above it the class of id 1, all others that of id 0")
    return True


def proposed_nodata(values: Values, complaints: Complaints) -> list[int | str]:
    """The masks' own nodata values, for "ignore", if two classes are left without them."""
    left = [v for v in values.pixels if v not in values.nodata]
    there = [v for v in values.nodata if v in values.pixels]
    if len(left) < 2 and there:
        complaints.warning("nodata", f"the masks' nodata tag says {', '.join(map(str, there))}, "
                           "without which less than two classes are left, so it is a class in the "
                           'draft; if it is none, move it from "classes" to "ignore"')
        return [v for v in values.nodata if v not in there]
    note_nodata(values.nodata, complaints)
    return values.nodata


def note_nodata(ignored: list[int | str], complaints: Complaints) -> None:
    """Say which values the draft ignores because of a tag."""
    for v in ignored:
        complaints.note("nodata", f"value {v} is nodata by a tag of the masks, so the draft ignores "
                                  'it; if it is a class, move it from "ignore" to "classes"')


def note_void(kept: list, ranked: list, complaints: Complaints) -> None:
    """Say which classes of the draft may mean unlabelled, or edges; only the user knows."""
    if len(ranked) > 2 and set(ranked[:2]) == {0, 255}:
        complaints.note("edges", f"0 and 255 are the most frequent of {len(ranked)} values: if the "
                        'others are the greys of soft edges, write two classes, "id": 0 and '
                        f'"id": 1, and "threshold": {THRESHOLD}, above which a grey is the second')
    if set(ranked) == {0, 255}:
        complaints.note("void", "ids 0 and 255: binary masks; both are classes in the draft, "
                                "255 is not ignored")
        return
    for v in kept:
        if v in VOID or not isinstance(v, str) and v < 0:
            complaints.note("void", f"value {v} is a class in the draft; if it means unlabelled or "
                                    'no data, move it from "classes" to "ignore"')
