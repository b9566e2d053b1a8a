"""Read images and masks without guessing; turn a mask's ids or colours into class ids and back.

    image, valid = read_valid("a.tif", bands=[4, 1, 2], input_range=[0, 3000])
    labels = Labels([{"name": "land", "id": 0}, {"name": "road", "id": 1}], ignore=[255])
    ids = labels.load("a_mask.png")  # (H, W) uint8, 0..K-1 and IGNORE
"""
import colorsys
import contextlib
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from .common import IGNORE, BadInput

UNKNOWN = 254  # marks mask values that no class and no ignore entry names; never leaves this file

MAX_PIXELS = 2_000_000_000  # Pillow's own limit of 179 million refuses normal orthophotos
Image.MAX_IMAGE_PIXELS = None  # open_image checks instead, and names the file
ImageFile.LOAD_TRUNCATED_IMAGES = False

# Without these entries Pillow drops the fourth band of a TIFF where it is not alpha but, say,
# infrared. Two such layouts are common: RGB and one more, grey and three more.
for order in (b"II", b"MM"):
    for photometric, extra in ((2, (0,)), (1, (0, 0, 0))):
        layout = order, photometric, (1,), 1, (8, 8, 8, 8), extra
        TiffImagePlugin.OPEN_INFO[layout] = "RGBX", "RGBX"


# ---- images

def open_image(path: str | Path, max_pixels: int = MAX_PIXELS, deep: bool = False) -> Image.Image:
    """Header only; .size is (W, H). `deep` lets colours of 16 bits pass, for deep_pixels."""
    try:
        image = Image.open(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as e:  # Pillow raises a dozen kinds on damaged headers
        raise BadInput(f"{path}: not a readable image ({str(e)[:100]}); "
                       "expected PNG, JPEG or TIFF") from None
    if is_deep(image) and not deep:
        raise BadInput(f"{path}: 16 bits a band; "
                       "say which values become 0 and 255: --input-range LOW HIGH, "
                       'or "input_range": [LOW, HIGH] in dataset.json')
    if image.format == "TIFF":
        check_tiff(image, path)
    if image.width * image.height > max_pixels:
        raise BadInput(f"{path}: {image.height} x {image.width} pixels, "
                       f"over the limit of {max_pixels}; cut it up")
    return image


def check_tiff(image: Image.Image, path: str | Path) -> None:
    """Pillow would drop the fifth band and the second page without a word."""
    bands = image.tag_v2.get(277, 1)  # SamplesPerPixel
    dropped = bands - len(image.getbands())
    if dropped > 0:
        raise BadInput(f"{path}: {bands} bands, of which Pillow would drop {dropped}; "
                       "save the ones to use, at most four, as a TIFF of their own")
    pages = full_pages(path)
    if pages > 1:
        raise BadInput(f"{path}: {pages} pages, of which only the first would be read; "
                       "if they are bands, save the ones to use as bands of one page")


def full_pages(path: str | Path) -> int:
    """Pages of a TIFF without overviews and masks, which further pages of GeoTIFFs mostly are."""
    pages = 1
    with Image.open(path) as tiff:
        # EOFError comes behind the last page, other kinds where a directory is damaged.
        with contextlib.suppress(Exception):
            while True:
                tiff.seek(tiff.tell() + 1)
                kind = tiff.tag_v2.get(254, 0)  # NewSubfileType: bit 1 = overview, bit 4 = mask
                pages += not kind & 5
    return pages


def pixels(image: Image.Image, path: str | Path, mode: str | None = None) -> np.ndarray:
    """Decode, and convert to `mode` if given."""
    try:
        if mode:
            image = image.convert(mode)
        return np.array(image)  # a copy: torch wants to own what it is given
    except Exception as e:
        raise BadInput(f"{path}: damaged or truncated ({str(e)[:100]}); "
                       "copy the file again or take it out") from None


def is_deep(image: Image.Image) -> bool:
    """Colours of 16 bits, of which Pillow hands out the upper 8."""
    return image.mode in ("RGB", "RGBA") and ";16" in str(image.tile[:1])


def deep_pixels(path: str | Path) -> np.ndarray:
    """(H, W, 3 or 4) uint16.

    Pillow keeps the first byte of a value only. So the file is read twice: the second time Pillow
    is told the other byte order, and keeps the byte that was dropped.
    """
    upper, lower = open_image(path, deep=True), open_image(path, deep=True)
    native = ";16B" if sys.byteorder == "little" else ";16L"
    other = {";16L": ";16B", ";16B": ";16L", ";16N": native}
    for i, (codec, box, offset, args) in enumerate(lower.tile):
        # The arguments of the decoder: the raw mode such as "RGB;16L", alone or first of several.
        raw = args if isinstance(args, str) else args[0]
        raw = re.sub(";16[LBN]", lambda match: other[match[0]], raw)
        args = raw if isinstance(args, str) else (raw, *args[1:])
        lower.tile[i] = type(lower.tile[i])(codec, box, offset, args)
    return pixels(upper, path).astype(np.uint16) << 8 | pixels(lower, path)


def read_image(path: str | Path, bands: list[int] | None = None,
               input_range: list[float] | None = None) -> np.ndarray:
    """(H, W, 3) uint8. Grey becomes three equal bands; what needs the user's choice is refused."""
    return read_valid(path, bands, input_range)[0]


def read_valid(path: str | Path, bands: list[int] | None = None,
               input_range: list[float] | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """(H, W, 3) uint8, and (H, W) bool or None: False where transparent or not finite.

    `bands`: the three to take, counted from 1. `input_range`: the values that become 0 and 255,
    linearly.
    """
    image = open_image(path, deep=input_range is not None)
    a, mode = every_band(image, path)
    valid = np.isfinite(a).all(2) if a.dtype.kind == "f" else None

    # A fourth band that is all 0 or 255 is a mask. Other values prove nothing: some programs write
    # infrared as alpha.
    fourth_wanted = bands and 4 in bands
    if mode == "RGBA" and not fourth_wanted and np.isin(a[..., 3], (0, 255)).all():
        valid = a[..., 3] > 0
        a = a[..., :3]

    a = three_bands(a, bands, f"{path}: {a.shape[2]} bands ({image.mode})")
    if input_range:
        a = to_bytes(a, input_range, path)
    if a.dtype != np.uint8:
        raise BadInput(f"{path}: {a.dtype} pixels ({a.min()}..{a.max()}); expected 8 bit: "
                       "how bright 255 is would be a guess, so say which values become 0 and 255: "
                       '--input-range LOW HIGH, or "input_range": [LOW, HIGH] in dataset.json')
    return np.ascontiguousarray(a), valid


def every_band(image: Image.Image, path: str | Path) -> tuple[np.ndarray, str]:
    """(H, W, bands) as stored, and the mode: palettes as colours, a transparent colour as alpha."""
    if is_deep(image):
        return deep_pixels(path), image.mode
    colours = {"P": "RGB", "1": "L", "CMYK": "RGB", "YCbCr": "RGB", "LA": "RGBA"}
    mode = colours.get(image.mode)
    if "transparency" in image.info and image.mode in ("P", "L", "RGB"):
        mode = "RGBA"  # one colour of a PNG or GIF
    a = pixels(image, path, mode)
    if a.ndim == 2:
        a = a[:, :, None]
    return a, mode or image.mode


def three_bands(a: np.ndarray, bands: list[int] | None, found: str) -> np.ndarray:
    """(H, W, n) -> (H, W, 3); `found` begins the message where that would be a guess."""
    if bands and max(bands) > a.shape[2]:
        raise BadInput(f'{found}, and --bands or "bands" in dataset.json asks for number '
                       f"{max(bands)}")
    if bands:
        a = a[..., [b - 1 for b in bands]]
    if a.shape[2] == 1:
        a = np.repeat(a, 3, axis=2)
    if a.shape[2] != 3:
        raise BadInput(f"{found}; expected 3: say which with --bands, such as 1,2,3, "
                       'or "bands": [1, 2, 3] in dataset.json')
    return a


def to_bytes(a: np.ndarray, input_range: list[float], path: str | Path) -> np.ndarray:
    """Any numbers -> uint8: the lower of input_range becomes 0, the upper 255, linearly."""
    low, high = input_range
    if a.dtype == np.uint8 and high > 255:
        raise BadInput(f"{path}: 8 bits, for which --input-range {low:g} {high:g}, or "
                       '"input_range" in dataset.json, cannot be meant; leave it out')
    a = np.nan_to_num(a.astype(np.float32))  # nodata of floats becomes black, and is not valid
    share = np.clip((a - low) / (high - low), 0, 1)
    return (share * 255 + 0.5).astype(np.uint8)


# ---- masks

def read_mask(path: str | Path) -> np.ndarray:
    """(H, W) uint8 ids, or (H, W, 3) uint8 colours. A palette PNG is its indices."""
    if Path(path).suffix.lower() in (".jpg", ".jpeg"):
        raise BadInput(f"{path}: a JPEG mask; JPEG blurs labels at every edge: "
                       "export the masks as PNG or TIFF")
    image = open_image(path)
    a = pixels(image, path, "L" if image.mode == "1" else None)
    # An alpha band that hides nothing comes from the program that saved the mask.
    if a.ndim == 3 and a.shape[2] == 4 and (a[..., 3] == 255).all():
        a = a[..., :3]
    if a.ndim == 3 and a.shape[2] != 3:
        raise BadInput(f"{path}: a mask of {a.shape[2]} bands; "
                       "expected one band of ids or three of colours")
    if a.ndim == 2 and a.dtype != np.uint8:
        if a.dtype.kind == "f" or a.min() < 0 or a.max() > 255:
            raise BadInput(f"{path}: a mask of {a.dtype} values {a.min()}..{a.max()}; "
                           "expected whole ids 0..255")
        a = a.astype(np.uint8)
    return a


def palette_of(path: str | Path) -> np.ndarray | None:
    """(256, 3) uint8 colours of a palette image, None for every other."""
    image = open_image(path)
    if image.mode != "P":
        return None
    listed = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    colors = np.zeros((256, 3), np.uint8)
    colors[:len(listed)] = listed
    return colors


def id_image(ids: np.ndarray, colors: np.ndarray) -> Image.Image:
    """(H, W) uint8 ids -> palette image: reads back as the same ids, opens in colour anywhere."""
    image = Image.fromarray(ids, "P")
    table = np.zeros((256, 3), np.uint8)
    table[:len(colors)] = colors
    image.putpalette(table.tobytes())
    return image


# ---- colours

# Twenty colours, any two at least 28 apart in CIELAB and all at least 40 from the red of errors.
DEFAULT_COLORS = (
    "#0072B2", "#E8C547", "#2E8B3A", "#8A5BC8", "#F2883A", "#56C4E8", "#8C5A2B", "#F29BC1",
    "#1FA187", "#A8CF4A", "#1B2F7D", "#D94FC0", "#C9A679", "#0F5450", "#7F8C96", "#B5A4F0",
    "#6E7A12", "#7A1B5E", "#9FE3C0", "#3C4BE0")
SHADES = ((0.55, 0.9), (0.8, 0.6), (0.35, 0.7), (0.9, 0.85), (0.6, 0.4))  # saturation, brightness


def default_color(i: int) -> str:
    """The colour of class i, for tables that name none; neighbouring classes differ clearly."""
    if i < len(DEFAULT_COLORS):
        return DEFAULT_COLORS[i]
    # Golden-ratio steps over the hues, red (above 0.92 and below 0.06) left to the errors.
    hue = 0.06 + 0.86 * (i * 0.618034 % 1)
    rgb = colorsys.hsv_to_rgb(hue, *SHADES[i % len(SHADES)])
    return "#" + "".join(f"{round(255 * v):02X}" for v in rgb)


def parse_color(text: str) -> tuple[int, int, int]:
    """'#3C1098' -> (60, 16, 152)."""
    try:
        digits = text.removeprefix("#")[:6].ljust(6, "x")  # x is no digit: too short a text fails
        return tuple(bytes.fromhex(digits))
    except (ValueError, AttributeError):  # AttributeError: a number or a list instead of text
        raise BadInput(f"colour {text!r}; expected six hex digits such as '#3C1098'") from None


def pack(color: np.ndarray) -> np.ndarray:
    """(..., 3) -> (...) int32: one number per colour, 0xRRGGBB."""
    r, g, b = np.moveaxis(color.astype(np.int32), -1, 0)
    return r << 16 | g << 8 | b


# ---- label tables

class Labels:
    """Label table: file ids or colours <-> class ids 0..K-1 and IGNORE.

    classes: [{"name": "road", "id": 3, "color": "#ff0000"}, ...]; without "id" the colour is what
    the file holds. ignore: ids or colours that become IGNORE. Both are plain types, so that the
    table travels in JSON and in best.safetensors.
    """

    def __init__(self, classes: list[dict], ignore: list = ()):
        # The first class decides whether the masks hold ids or colours.
        value = "id" if classes and isinstance(classes[0], dict) and "id" in classes[0] else "color"
        for c in classes:
            if not isinstance(c, dict) or "name" not in c or value not in c:
                raise BadInput(f'label table with the class {c}; expected "name" and "id" in every '
                               'class, or "name" and "color" in every class')
        self.classes = [dict(c) for c in classes]
        self.ignore = list(ignore) if isinstance(ignore, (list, tuple)) else [ignore]
        self.names = [c["name"] for c in self.classes]
        self.by_color = value == "color" and bool(classes)
        if not 1 <= len(self.classes) <= UNKNOWN or len(set(self.names)) < len(self.names):
            raise BadInput(f"label table with {len(self.names)} classes; "
                           f"expected 1 to {UNKNOWN} with different names")
        colors = [parse_color(c.get("color") or default_color(i))
                  for i, c in enumerate(self.classes)]
        self.colors = np.array(colors, np.uint8)  # (K, 3), also what predictions are painted with
        self.table = self.lookup_table(colors)

    def lookup_table(self, colors: list[tuple]) -> np.ndarray:
        """(256,) or, by packed colour, (2^24,) uint8: value -> class id, IGNORE or UNKNOWN."""
        if self.by_color:
            raw = colors + [parse_color(c) for c in self.ignore]
            whole = True
        else:
            raw = [c["id"] for c in self.classes] + self.ignore
            whole = all(type(i) is int and 0 <= i <= 255 for i in raw)
        # A value that means two things would silently go to the last one.
        if not whole or len(set(raw)) < len(raw):
            raise BadInput(f"label table with the values {raw}; expected each once, ids in 0..255")
        ids = [*range(len(self.names))] + [IGNORE] * len(self.ignore)
        if self.by_color:
            table = np.full(1 << 24, UNKNOWN, np.uint8)  # 16 MB, mostly never touched
            table[pack(np.array(raw))] = ids
        else:
            table = np.full(256, UNKNOWN, np.uint8)
            table[raw] = ids
        return table

    def load(self, path: str | Path) -> np.ndarray:
        """Mask file -> (H, W) uint8 class ids and IGNORE; an unknown value stops and is named."""
        mask = read_mask(path)
        if self.by_color:
            values = pack(self.as_colors(mask, path))
        else:
            values = self.as_ids(mask, path)
        ids = self.table[values]
        unknown = ids == UNKNOWN
        if unknown.any():
            seen, count = np.unique(values[unknown], return_counts=True)
            most = seen[np.argsort(-count)][:4]
            shown = ", ".join(f"#{v:06X}" if self.by_color else str(v) for v in most)
            kind = "colours" if self.by_color else "ids"
            raise BadInput(f"{path}: unknown {kind} {shown} on {count.sum()} of {ids.size} pixels; "
                           'add them to "classes" or "ignore" in dataset.json or data/public.py')
        return ids

    def as_colors(self, mask: np.ndarray, path: str | Path) -> np.ndarray:
        """(H, W, 3) of a mask file that should hold colours, by its palette if it has one."""
        if mask.ndim == 3:
            return mask
        palette = palette_of(path)
        if palette is None:
            raise BadInput(f"{path}: one band of ids {np.unique(mask)[:8].tolist()}, but the label "
                           'table lists colours; give every class its "id" in dataset.json')
        return palette[mask]

    def as_ids(self, mask: np.ndarray, path: str | Path) -> np.ndarray:
        """(H, W) of a mask file that should hold ids, which may be saved as grey RGB."""
        if mask.ndim == 2:
            return mask
        if not (mask == mask[..., :1]).all():
            raise BadInput(f"{path}: a colour mask, but the label table lists ids; take the \"id\" "
                           'entries out of dataset.json and give every class its "color"')
        return mask[..., 0]

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Class ids -> the file's own ids (H, W) or colours (H, W, 3), uint8.

        IGNORE becomes the first ignored value.
        """
        if not self.ignore and (ids == IGNORE).any():
            raise BadInput("pixels without a class, and no value in the masks means that; "
                           "--label-out train writes 255")
        if self.by_color:
            table = np.zeros((256, 3), np.uint8)
            table[:len(self.colors)] = self.colors
            table[IGNORE] = parse_color(self.ignore[0] if self.ignore else "#000000")
        else:
            table = np.full(256, IGNORE, np.uint8)
            table[:len(self.classes)] = [c["id"] for c in self.classes]
            table[IGNORE] = self.ignore[0] if self.ignore else IGNORE
        return table[ids]
