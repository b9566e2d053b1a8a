"""Read images and masks without guessing, turn a mask's ids or colours into class ids 0..K-1 and back, write safely."""
import contextlib
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Iterable

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from .common import IGNORE, BadInput

UNKNOWN = 254  # marks file values that no class and no ignore entry names; never leaves this file
MAX_PIXELS = 2_000_000_000  # Pillow's own limit (179 M) refuses normal orthophotos
Image.MAX_IMAGE_PIXELS = None  # replaced by the check in open_image, which names the file and the flag
ImageFile.LOAD_TRUNCATED_IMAGES = False
for order in (b"II", b"MM"):  # else Pillow drops the fourth band of a TIFF where it is not alpha but, say, infrared
    for photometric, extra in ((2, (0,)), (1, (0, 0, 0))):  # RGB and one more; grey and three more
        TiffImagePlugin.OPEN_INFO[order, photometric, (1,), 1, (8, 8, 8, 8), extra] = "RGBX", "RGBX"


def by_stem(names: Iterable[str]) -> dict[str, str]:
    """{name: itself} and {last part of a path: name} where only one name has it: how lists and tables call images."""
    stems = {n: n.rsplit("/", 1)[-1] for n in names}
    count = Counter(stems.values())
    return {stem: n for n, stem in stems.items() if count[stem] == 1} | {n: n for n in stems}


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS, deep: bool = False) -> Image.Image:
    """Header only; .size is (W, H). `deep` lets colours of 16 bits pass, for deep_pixels."""
    try:
        image = Image.open(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as e:  # Pillow raises a dozen kinds on damaged headers
        raise BadInput(f"{path}: not a readable image ({str(e)[:100]}); expected PNG, JPEG or TIFF") from None
    if is_deep(image) and not deep:
        raise BadInput(f"{path}: 16 bits a band; say which values become 0 and 255: --input-range LOW HIGH")
    bands = getattr(image, "tag_v2", {}).get(277, 1)  # SamplesPerPixel of a TIFF
    if bands > len(image.getbands()):
        raise BadInput(f"{path}: {bands} bands, of which Pillow would drop {bands - len(image.getbands())}; save the "
                       "ones to use, at most four, as a TIFF of their own")
    if image.format == "TIFF" and (pages := full_pages(path)) > 1:
        raise BadInput(f"{path}: {pages} pages, of which only the first would be read; if they are bands, save "
                       "the ones to use as bands of one page")
    if image.width * image.height > max_pixels:
        raise BadInput(f"{path}: {image.height} x {image.width} pixels, over the limit of {max_pixels}; cut it up")
    return image


def full_pages(path: str | Path) -> int:
    """Pages of a TIFF without its overviews and masks, which further pages of GeoTIFFs mostly are."""
    pages = 1
    with Image.open(path) as tiff, contextlib.suppress(Exception):  # EOFError behind the last one, others for damage
        while True:
            tiff.seek(tiff.tell() + 1)
            pages += not tiff.tag_v2.get(254, 0) & 5  # NewSubfileType: 1 = overview, 4 = mask
    return pages


def pixels(image: Image.Image, path: str | Path, mode: str | None = None) -> np.ndarray:
    """Decode, and convert to `mode` if given."""
    try:
        return np.array(image.convert(mode) if mode else image)  # a copy: torch wants to own what it is given
    except Exception as e:
        raise BadInput(f"{path}: damaged or truncated ({str(e)[:100]}); copy the file again or take it out") from None


def is_deep(image: Image.Image) -> bool:  # colours of 16 bits, of which Pillow hands out the upper 8
    return image.mode in ("RGB", "RGBA") and ";16" in str(image.tile[:1])


def deep_pixels(path: str | Path) -> np.ndarray:
    """(H, W, 3 or 4) uint16: read twice, the second time with the two bytes of a value taken for swapped."""
    upper, lower = open_image(path, deep=True), open_image(path, deep=True)
    other = {";16L": ";16B", ";16B": ";16L", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}
    for i, (codec, box, offset, args) in enumerate(lower.tile):
        raw, *rest = (args,) if isinstance(args, str) else args
        raw = re.sub(";16[LBN]", lambda m: other[m[0]], raw)
        lower.tile[i] = type(lower.tile[i])(codec, box, offset, raw if isinstance(args, str) else (raw, *rest))
    return pixels(upper, path).astype(np.uint16) << 8 | pixels(lower, path)


def read_image(path: str | Path, bands: list[int] | None = None,
               input_range: list[float] | None = None) -> np.ndarray:
    """(H, W, 3) uint8. Grey becomes three equal bands; anything that needs a choice by the user is refused."""
    return read_valid(path, bands, input_range)[0]


def read_valid(path: str | Path, bands: list[int] | None = None,
               input_range: list[float] | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """(H, W, 3) uint8, and (H, W) bool that is False where alpha is 0 or a value not finite, or None: valid everywhere.

    `bands`: the three to take, counted from 1. `input_range`: the values that become 0 and 255, linearly.
    """
    image = open_image(path, deep=input_range is not None)
    mode = {"P": "RGB", "1": "L", "CMYK": "RGB", "YCbCr": "RGB", "LA": "RGBA"}.get(image.mode)
    if "transparency" in image.info and image.mode in ("P", "L", "RGB") and not is_deep(image):
        mode = "RGBA"  # one colour of a PNG or GIF
    a = deep_pixels(path) if is_deep(image) else pixels(image, path, mode)
    a = a[:, :, None] if a.ndim == 2 else a
    valid = np.isfinite(a).all(2) if a.dtype.kind == "f" else None
    # a fourth band that is all 0 or 255 is a mask; some programs write infrared as alpha, so other values are no proof
    if (mode or image.mode) == "RGBA" and not (bands and 4 in bands) and np.isin(a[..., 3], (0, 255)).all():
        a, valid = a[..., :3], a[..., 3] > 0
    if bands and max(bands) > a.shape[2]:
        raise BadInput(f"{path}: {a.shape[2]} bands ({image.mode}), and --bands asks for number {max(bands)}")
    if bands:
        a = a[..., [b - 1 for b in bands]]
    if a.shape[2] == 1:
        a = np.repeat(a, 3, axis=2)
    if a.shape[2] != 3:
        raise BadInput(f"{path}: {a.shape[2]} bands ({image.mode}); expected 3: say which with --bands, such as 1,2,3")
    if input_range:
        low, high = input_range
        if a.dtype == np.uint8 and high > 255:
            raise BadInput(f"{path}: 8 bits, for which --input-range {low:g} {high:g} cannot be meant; leave it out")
        a = (np.clip((np.nan_to_num(a.astype(np.float32)) - low) / (high - low), 0, 1) * 255 + 0.5).astype(np.uint8)
    if a.dtype != np.uint8:
        raise BadInput(f"{path}: {a.dtype} pixels ({a.min()}..{a.max()}); expected 8 bit: how bright 255 is would be a "
                       "guess, so say which values become 0 and 255: --input-range LOW HIGH")
    return np.ascontiguousarray(a), valid


def read_mask(path: str | Path) -> np.ndarray:
    """(H, W) uint8 ids, or (H, W, 3) uint8 colours. A palette PNG is its indices."""
    if Path(path).suffix.lower() in (".jpg", ".jpeg"):
        raise BadInput(f"{path}: a JPEG mask; JPEG blurs labels at every edge: export the masks as PNG or TIFF")
    image = open_image(path)
    a = pixels(image, path, "L" if image.mode == "1" else None)
    if a.ndim == 3 and a.shape[2] == 4 and (a[..., 3] == 255).all():
        a = a[..., :3]
    if a.ndim == 3 and a.shape[2] != 3:
        raise BadInput(f"{path}: a mask of {a.shape[2]} bands; expected one band of ids or three of colours")
    if a.ndim == 2 and a.dtype != np.uint8:
        if a.dtype.kind == "f" or a.min() < 0 or a.max() > 255:
            raise BadInput(f"{path}: a mask of {a.dtype} values {a.min()}..{a.max()}; expected whole ids 0..255")
        a = a.astype(np.uint8)
    return a


def palette_of(path: str | Path) -> np.ndarray | None:
    """(256, 3) uint8 colours of a palette image, None for every other."""
    image = open_image(path)
    if image.mode != "P":
        return None
    colors = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    return np.concatenate([colors, np.zeros((256 - len(colors), 3), np.uint8)])


def parse_color(text: str) -> tuple[int, int, int]:
    """'#3C1098' -> (60, 16, 152)."""
    try:
        return tuple(bytes.fromhex(text.removeprefix("#")[:6].ljust(6, "x")))
    except (ValueError, AttributeError):  # AttributeError: a number or a list instead of text
        raise BadInput(f"colour {text!r}; expected six hex digits such as '#3C1098'") from None


class Labels:
    """Label table: file ids or colours <-> class ids 0..K-1 and IGNORE.

    classes: [{"name": "road", "id": 3, "color": "#ff0000"}, ...]; without "id" the colour is what the file holds.
    ignore: ids or colours that become IGNORE. Plain types, so that it travels in JSON and in best.safetensors.
    """

    def __init__(self, classes: list[dict], ignore: list = ()):
        for c in classes:
            if not isinstance(c, dict) or "name" not in c or ("id" if "id" in classes[0] else "color") not in c:
                raise BadInput(f'label table with the class {c}; expected "name" and "id" in every class, '
                               'or "name" and "color" in every class')
        self.classes = [dict(c) for c in classes]
        self.ignore = list(ignore) if isinstance(ignore, (list, tuple)) else [ignore]
        self.names = [c["name"] for c in self.classes]
        self.by_color = "id" not in self.classes[0] if self.classes else False
        if not 1 <= len(self.classes) <= UNKNOWN or len(set(self.names)) < len(self.names):
            raise BadInput(f"label table with {len(self.names)} classes; expected 1 to {UNKNOWN} with different names")
        colors = [parse_color(c.get("color") or default_color(i)) for i, c in enumerate(self.classes)]
        self.colors = np.array(colors, np.uint8)  # (K, 3), also what predictions are painted with
        if self.by_color:
            raw = colors + [parse_color(c) for c in self.ignore]
        else:
            raw = [c["id"] for c in self.classes] + self.ignore
        ok = self.by_color or all(type(i) is int and 0 <= i <= 255 for i in raw)
        if not ok or len(set(raw)) < len(raw):
            raise BadInput(f"label table with the values {raw}; expected each once, ids in 0..255")
        self.table = np.full(1 << 24 if self.by_color else 256, UNKNOWN, np.uint8)  # 16 MB, mostly never touched
        at = pack(np.array(raw)) if self.by_color else raw
        self.table[at] = [*range(len(self.names))] + [IGNORE] * len(self.ignore)

    def load(self, path: str | Path) -> np.ndarray:
        """Mask file -> (H, W) uint8 class ids and IGNORE; an unknown value stops and is named."""
        mask = read_mask(path)
        if self.by_color and mask.ndim == 2:
            palette = palette_of(path)
            if palette is None:
                raise BadInput(f"{path}: one band of ids {np.unique(mask)[:8].tolist()}, but the label table lists "
                               'colours; give every class its "id" in dataset.json')
            mask = palette[mask]
        if not self.by_color and mask.ndim == 3:
            if not (mask == mask[..., :1]).all():
                raise BadInput(f"{path}: a colour mask, but the label table lists ids; "
                               'take the "id" entries out of dataset.json and give every class its "color"')
            mask = mask[..., 0]  # ids saved as grey RGB
        values = pack(mask) if self.by_color else mask
        ids = self.table[values]
        if (ids == UNKNOWN).any():
            seen, count = np.unique(values[ids == UNKNOWN], return_counts=True)
            shown = [f"#{v:06X}" if self.by_color else str(v) for v in seen[np.argsort(-count)][:4]]
            raise BadInput(f"{path}: unknown {'colours' if self.by_color else 'ids'} {', '.join(shown)} on "
                           f'{count.sum()} of {ids.size} pixels; add them to "classes" or "ignore" in dataset.json '
                           "or data/public.py")
        return ids

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Class ids -> the file's own ids (H, W) or colours (H, W, 3), uint8; IGNORE -> the first ignored value."""
        if not self.ignore and (ids == IGNORE).any():
            raise BadInput("pixels without a class, and no value in the masks means that; --label-out train writes 255")
        if self.by_color:
            table = np.zeros((256, 3), np.uint8)
            table[: len(self.colors)] = self.colors
            table[IGNORE] = parse_color(self.ignore[0] if self.ignore else "#000000")
        else:
            table = np.full(256, IGNORE, np.uint8)
            table[: len(self.classes)] = [c["id"] for c in self.classes]
            table[IGNORE] = self.ignore[0] if self.ignore else IGNORE
        return table[ids]


def pack(color: np.ndarray) -> np.ndarray:  # (..., 3) -> (...) one int per colour
    r, g, b = np.moveaxis(color.astype(np.int32), -1, 0)
    return r << 16 | g << 8 | b


def default_color(i: int) -> str:  # golden-angle hues: neighbouring ids differ
    hue = Image.new("HSV", (1, 1), (i * 97 % 256, 170, 220)).convert("RGB").getpixel((0, 0))
    return "#%02x%02x%02x" % hue


def id_image(ids: np.ndarray, colors: np.ndarray) -> Image.Image:
    """(H, W) uint8 ids -> palette PNG image: reads back as the same ids, opens in colour in any viewer."""
    image = Image.fromarray(ids, "P")
    table = np.zeros((256, 3), np.uint8)
    table[: len(colors)] = colors
    image.putpalette(table.tobytes())
    return image
