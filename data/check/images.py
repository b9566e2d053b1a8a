"""Read every image and mask: faults, pictures that are equal, orientations that mislead.

    finding = inspect_pair(image, mask, labels, {"bands": None, "input_range": None})
"""
import dataclasses
import hashlib
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from ..common import IGNORE, BadInput, plural
from ..datasets import check_size, count_ids
from ..io import Labels, read_valid, size_of
from ..raster import open_raster
from .complaints import Complaints, attempt


@dataclasses.dataclass
class Finding:
    """What is known of one pair."""
    errors: dict = dataclasses.field(default_factory=dict)  # {kind: line}
    mode: str | None = None  # RGB, palette, ... of an image of which no bands were chosen
    digest: tuple | None = None  # equal for equal pictures; None for one of a single colour
    turned: bool = False  # by its EXIF tag
    counts: np.ndarray | int = 0  # (K+1,) pixels


def inspect_pair(image: Path, mask: Path | None, labels: Labels | None, reading: dict) -> Finding:
    """Reads both; `reading`: bands and input_range."""
    finding = Finding()
    x = valid = None
    try:
        x, valid = read_valid(image, **reading)
        if not reading["bands"]:
            finding.mode = open_raster(image).photometric
        finding.turned = is_turned(image)
        if (x != x[0, 0]).any():  # the empty margins of mosaics are all alike
            finding.digest = x.shape, hashlib.blake2b(x.reshape(-1)).digest()
    except BadInput as e:
        finding.errors["image"] = e
    if mask is None:
        return finding

    try:
        size = size_of(mask)  # of the header: a mask may have unknown values, too
        fault = attempt(check_size, mask, size, size if x is None else x.shape[:2])
        if fault:
            finding.errors["size"] = fault
        ids = labels.load(mask)
        if valid is not None and valid.shape == ids.shape:
            ids[~valid] = IGNORE  # as SegDataset does
        finding.counts = count_ids(ids, len(labels.names))
    except BadInput as e:
        finding.errors["mask"] = e
    return finding


def is_turned(image: Path) -> bool:
    """Does EXIF ask viewers to turn the picture?"""
    try:
        header = Image.open(image)
        tags = header.getexif() if "exif" in header.info else getattr(header, "tag_v2", {})
        return tags.get(274, 1) not in (0, 1)  # Orientation
    except Exception:  # Pillow raises many kinds on damaged EXIF of images that it reads well
        return False


def check_images(findings: dict[str, Finding], homes: dict[str, list[str]],
                 complaints: Complaints) -> None:
    """Faults, modes that are converted, turned images, and equal ones.

    `homes`: {name: its splits}. Equal images in two splits are an error.
    """
    modes = defaultdict(list)
    twins = defaultdict(list)
    for n, finding in findings.items():
        modes[finding.mode].append(n)
        twins[finding.digest].append(n)
        for kind, line in finding.errors.items():
            complaints.error(kind, line)
    for mode, names in modes.items():
        if mode not in ("RGB", None):
            complaints.note("mode", f"{plural(len(names), 'image')} read as RGB: mode {mode}, "
                                    f"first {names[0]}")
    turned = [n for n, finding in findings.items() if finding.turned]
    if turned:
        complaints.warning("turned", f"EXIF orientation in {plural(len(turned), 'image')}, first "
                           f"{turned[0]}: some programs turn such pictures, others do not; if "
                           "masks do not lie on their images in a run's samples.png, turn the "
                           "pixels for good")
    twins.pop(None, None)
    for names in twins.values():
        if len(names) > 1:
            complain_of_twins(names, homes, complaints)


def complain_of_twins(names: list[str], homes: dict[str, list[str]],
                      complaints: Complaints) -> None:
    """Equal images: in two splits the score is not independent, in one they only waste time."""
    example = {}  # {split: one of the names}
    for n in names:
        example |= dict.fromkeys(homes[n], n)
    if len(example) > 1:
        where = ", ".join(f"{n} ({split})" for split, n in example.items())
        complaints.error("leak", f"{where}: identical images in different splits; "
                                 "leave them in one")
    else:
        complaints.note("twins", f"{', '.join(names[:3])}: {len(names)} identical images")
