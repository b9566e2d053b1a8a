"""Read images and masks without guessing; turn a mask's ids or colours into class ids and back.

    image, valid = read_valid("a.tif", bands=[4, 1, 2], input_range=[0, 3000])
    labels = Labels([{"name": "land", "id": 0}, {"name": "road", "id": 1}], ignore=[255])
    ids = labels.load("a_mask.png")  # (H, W) uint8, 0..K-1 and IGNORE
"""
import colorsys
from pathlib import Path

import numpy as np
from PIL import Image

from .common import IGNORE, BadInput, check_pixels, escaped
from .raster import AS_MASK, open_raster, valid_pixels
from .tiff import Window, both

UNKNOWN = 254  # marks mask values that no class and no ignore entry names; never leaves this file

MAX_ID = 2**53  # float64 holds whole numbers up to here
SAY_RANGE = ("say which values become 0 and 255: --input-range LOW HIGH, or p2-98 for percentiles, "
             'or "input_range": [LOW, HIGH] in dataset.json')


# ---- images

def size_of(path: str | Path) -> tuple[int, int]:
    """(H, W) by the header of a picture file; one that cannot be read is a BadInput."""
    return open_raster(path).shape[:2]


def read_image(path: str | Path, bands: list[int] | None = None,
               input_range: list | None = None) -> np.ndarray:
    """(H, W, 3) uint8. Grey becomes three equal bands; what needs the user's choice is refused."""
    return read_valid(path, bands, input_range)[0]


def read_valid(path: str | Path, bands: list[int] | None = None, input_range: list | None = None,
               window: Window | None = None, alpha_is_mask: bool | None = None
               ) -> tuple[np.ndarray, np.ndarray | None]:
    """(h, w, 3) uint8, and (h, w) bool or None: False where the file says that there is no data.

    bands: the three to take, counted from 1. input_range: the values that become 0 and 255,
    linearly, [low, high] or a pair for each of the three. window: (top, left, h, w), else all.
    alpha_is_mask: where other windows have decided it.
    """
    a, valid = stored_colours(path, bands, window, alpha_is_mask)
    return in_range(a, input_range, path), valid


def in_range(a: np.ndarray, input_range: list | None, path: str | Path) -> np.ndarray:
    """(h, w, 3) as stored -> uint8, if they are bytes or input_range says how to make them bytes."""
    if input_range:
        a = to_bytes(a, input_range, path)
    if a.dtype != np.uint8:
        raise BadInput(f"{path}: {a.dtype} pixels ({a.min()}..{a.max()}); expected 8 bit: "
                       f"how bright 255 is would be a guess, so {SAY_RANGE}")
    return np.ascontiguousarray(a)


def stored_colours(path: str | Path, bands: list[int] | None, window: Window | None = None,
                   alpha_is_mask: bool | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """(h, w, 3) of three bands in the file's own type, palettes as colours; valid as read_valid."""
    raster = open_raster(path)
    H, W, n = raster.shape
    check_pixels(path, *(window[2:] if window else (H, W)))
    if not raster.indexed:
        a, valid, n = chosen_bands(raster, bands, window, alpha_is_mask)
    else:
        index = raster.read(window)
        valid = valid_pixels(raster, index, window)
        a, valid, n = paint(raster, index[..., 0], bands, valid)
    if raster.bits in (1, 2, 4) and not raster.indexed:
        a = a * np.uint8(255 // (2 ** raster.bits - 1))  # all values that there can be
    found = f"{path}: {n} bands ({raster.photometric})"
    if n == 4 and a.shape[2] == 4 and (raster.alpha or raster.indexed):
        found += f", and alpha is more than 0 and 255; a mask with soft edges: {AS_MASK}"
    return three_bands(a, bands, found), valid


def chosen_bands(raster, bands: list[int] | None, window: Window | None,
                 alpha_is_mask: bool | None = None) -> tuple:
    """Pixels (h, w, n) of `bands`, or of all but a mask; valid; how many bands there are."""
    n = raster.shape[2]
    if bands and max(bands) > n:
        raise BadInput(f"{raster.path}: {n} bands ({raster.photometric}), and --bands or "
                       f'"bands" in dataset.json asks for number {max(bands)}')
    wanted = bands or [*range(1, n + 1)]
    read = wanted
    if raster.alpha and raster.alpha not in wanted:
        read = [*wanted, raster.alpha]
    a = raster.read(window, read)

    # An alpha band that is all 0 or 255 is a mask. Other values prove nothing: some programs
    # write infrared as alpha.
    veil = a[..., read.index(raster.alpha)] if raster.alpha else None
    asked = bands and raster.alpha in bands
    is_mask = veil is not None and not asked
    if is_mask:
        is_mask = is_mask_band(veil) if alpha_is_mask is None else alpha_is_mask
    if bands is None and is_mask:
        a = np.delete(a, raster.alpha - 1, axis=2)
        wanted = [b for b in wanted if b != raster.alpha]
    elif len(read) > len(wanted):
        a = a[..., :len(wanted)]
    valid = valid_pixels(raster, a, window, wanted)
    if is_mask:
        valid = both(valid, veil > 0)
    return a, valid, n


def is_mask_band(veil: np.ndarray) -> bool:
    """Whether all of an alpha band is 0 or opaque: the highest number, of floats 1."""
    opaque = 1 if veil.dtype.kind == "f" else np.iinfo(veil.dtype).max
    return bool(np.isin(veil, (0, opaque)).all())


def paint(raster, index: np.ndarray, bands: list[int] | None, valid: np.ndarray | None) -> tuple:
    """chosen_bands() of an image of indices (h, w): its colours, and valid by their opacity."""
    opacity = getattr(raster, "opacity", None)
    a = raster.palette[np.minimum(index, len(raster.palette) - 1)]
    if opacity is None:
        return a, valid, 3
    # As of any alpha band: only 0 and 255 make a mask.
    seen = opacity[index]
    if is_mask_band(seen):
        return a, both(valid, seen > 0), 3
    if bands and max(bands) <= 3:
        return a, valid, 4
    return np.dstack([a, seen]), valid, 4


def three_bands(a: np.ndarray, bands: list[int] | None, found: str) -> np.ndarray:
    """(h, w, n) of `bands` or of all -> (h, w, 3); `found` begins the message if that is a guess."""
    if bands and a.shape[2] != len(bands):  # of a palette's three
        a = a[..., [b - 1 for b in bands]]
    if a.shape[2] == 1:
        a = np.repeat(a, 3, axis=2)
    if a.shape[2] != 3:
        such = [1, 2, min(3, a.shape[2])]
        raise BadInput(f"{found}; expected 3: say which with --bands, such as "
                       f'{",".join(map(str, such))}, or "bands": {such} in dataset.json')
    return a


def to_bytes(a: np.ndarray, input_range: list, path: str | Path) -> np.ndarray:
    """Any numbers -> uint8: the lower of input_range becomes 0, the upper 255, linearly."""
    # Numbers, or one a band; in float64 where float32 cannot hold the values of the file.
    kind = np.result_type(a.dtype, np.float32)
    low, high = np.moveaxis(np.array(input_range, kind), -1, 0)
    if a.dtype == np.uint8 and np.max(high) > 255:
        raise BadInput(f"{path}: 8 bits, for which --input-range {np.min(low):g} {np.max(high):g}, "
                       'or "input_range" in dataset.json, cannot be meant; leave it out, or the '
                       "image where others have more bits")
    a = np.nan_to_num(a.astype(kind))  # nodata of floats becomes black, and is not valid
    share = np.clip((a - low) / (high - low), 0, 1)
    return (share * 255 + 0.5).astype(np.uint8)


# ---- masks

def read_mask(path: str | Path) -> np.ndarray:
    """(H, W) whole numbers, uint8 where they fit, or (H, W, 3) uint8 colours. A palette gives indices."""
    return read_labels(path)[0]


def read_labels(path: str | Path) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """read_mask(); (H, W) bool or None: False where transparent, masked or not a number; the palette.

    (256, 3) uint8 colours of a palette image, None for every other.
    """
    raster = open_raster(path)
    if raster.lossy:
        raise BadInput(f"{path}: compressed as {raster.compression}, which blurs labels at every "
                       "edge; export the masks anew, as PNG or as TIFF with deflate")
    check_pixels(path, *raster.shape[:2])
    a = raster.read()
    valid = colors = None
    if raster.indexed:
        colors = np.zeros((256, 3), np.uint8)
        colors[:len(raster.palette)] = raster.palette[:256]
    else:
        if type(raster.nodata) in (int, float) and is_id(raster.nodata):
            raster.nodata = None  # a value of the table, "ignore" names it
        valid = valid_pixels(raster, a)
    if raster.alpha and raster.alpha == a.shape[2]:
        valid = both(valid, a[..., -1] > 0)
        a = a[..., :-1]
    if a.shape[2] not in (1, 3):
        raise BadInput(f"{path}: a mask of {a.shape[2]} bands; "
                       "expected one band of ids or three of colours")
    a = whole_numbers(a, valid, path)
    if a.shape[2] == 1:
        return a[..., 0], valid, colors
    # Colours of 16 bits that some programs make of 8: each value times 257, or as it was.
    if a.dtype != np.uint8 and not (a % 257).any():
        a = (a // 257).astype(np.uint8)
    if a.dtype != np.uint8:
        raise BadInput(f"{path}: a colour mask of values {a.min()}..{a.max()}; "
                       "expected 0..255: export it with 8 bits a band")
    return a, valid, colors


def whole_numbers(a: np.ndarray, valid: np.ndarray | None, path: str | Path) -> np.ndarray:
    """The values of a mask as uint8 if they fit, else int64; where not valid they mean nothing."""
    if a.dtype == np.uint8:
        return a
    if a.dtype.kind == "f":
        if valid is not None:
            a = np.where(valid[..., None], a, 0)
        if (a != np.rint(a)).any() or np.abs(a).max(initial=0) > MAX_ID:
            raise BadInput(f"{path}: a mask of {a.dtype} values {a.min()}..{a.max()}; "
                           "expected whole numbers")
    a = a.astype(np.int64)
    fits = a.size == 0 or (a.min() >= 0 and a.max() <= 255)
    return a.astype(np.uint8) if fits else a


def is_id(value: int | float) -> bool:
    """Can a label table name this value of a mask?"""
    return abs(value) <= MAX_ID and value == round(value)  # NaN is not


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


def color_text(color: np.ndarray) -> str:
    """(3,) uint8, [60 16 152] -> '#3c1098'."""
    return "#" + color.tobytes().hex()


def pack(color: np.ndarray) -> np.ndarray:
    """(..., 3) -> (...) int32: one number per colour, 0xRRGGBB."""
    r, g, b = np.moveaxis(color.astype(np.int32), -1, 0)
    return r << 16 | g << 8 | b


# ---- label tables

class Labels:
    """Label table: file ids or colours <-> class ids 0..K-1 and IGNORE.

    classes: [{"name": "road", "id": 3, "color": "#ff0000"}, ...]; without "id" the colour is what
    the file holds. ignore: ids or colours that become IGNORE. threshold: of soft masks, whose greys
    above it are id 1 and all others id 0. All are plain types, so that the table travels in JSON
    and in best.safetensors. raw: what predictions write for each class, where it is an id.
    """

    def __init__(self, classes: list[dict], ignore: list = (), threshold: float | None = None):
        # The first class decides whether the masks hold ids or colours.
        value = "id" if classes and isinstance(classes[0], dict) and "id" in classes[0] else "color"
        for c in classes:
            if not isinstance(c, dict) or "name" not in c or value not in c:
                raise BadInput(f'label table with the class {c}; expected "name" and "id" in every '
                               'class, or "name" and "color" in every class')
            name = c["name"]
            if not isinstance(name, str) or not name.strip() or escaped(name) != name:
                raise BadInput(f"label table with the class name {name!r}; expected text in one "
                               "line")
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
        self.threshold = threshold
        if threshold is not None:
            self.check_threshold()
        if not self.by_color:
            self.raw = np.array([c["id"] for c in self.classes], np.int64)
            if threshold is not None:  # the greys of 0 and 1
                self.raw *= max(v for v in range(256) if v not in self.ignore)
        self.void = self.ignored_value()

    @classmethod
    def of(cls, description: dict) -> "Labels":
        """The table of a dataset.json, or of a run that was trained with it."""
        return cls(description["classes"], description["ignore"], description.get("threshold"))

    @property
    def parts(self) -> list:
        """What the table is made of: two of them are equal if these are."""
        more = [] if self.threshold is None else [self.threshold]
        return [self.classes, self.ignore, *more]

    def check_threshold(self) -> None:
        """A threshold tells two classes apart, and both sides of it are greys."""
        t = self.threshold
        if type(t) not in (int, float) or not 0 <= t < 255:
            raise BadInput(f'"threshold" is {t!r}; expected a grey from 0 to 254, such as 127')
        ids = [c.get("id") for c in self.classes]
        if self.by_color or sorted(ids) != [0, 1]:
            raise BadInput(f'"threshold" with the classes {self.classes}; expected two: "id": 0 for '
                           f'greys up to {t:g}, and "id": 1 for those above')

    def ignored_value(self) -> int | str | None:
        """What a prediction writes where there is no class: of "ignore" the first that its type holds."""
        if self.by_color:
            return self.ignore[0] if self.ignore else None
        highest = 255 if self.raw.max() <= 255 else 65535
        fitting = [v for v in self.ignore if 0 <= v <= highest and v not in self.raw]
        if self.ignore and highest not in self.raw:
            fitting.append(highest)
        return int(fitting[0]) if fitting else None

    def lookup_table(self, colors: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
        """All values of a mask, packed colours or ids, in rising order; the class id or IGNORE of each."""
        if self.by_color:
            raw = [tuple(c) for c in colors] + [parse_color(c) for c in self.ignore]
            whole = True
        else:
            raw = [c["id"] for c in self.classes] + self.ignore
            whole = all(type(i) in (int, float) and is_id(i) for i in raw)
        # A value that means two things would silently go to the last one.
        if not whole or len(set(raw)) < len(raw):
            raise BadInput(f"label table with the values {raw}; expected each once, whole numbers")
        values = pack(np.array(raw)) if self.by_color else np.array(raw, np.int64)
        ids = [*range(len(self.names))] + [IGNORE] * len(self.ignore)
        order = np.argsort(values)
        return values[order].astype(np.int64), np.array(ids, np.uint8)[order]

    def look_up(self, values: np.ndarray) -> np.ndarray:
        """Values of a mask -> uint8 class ids, IGNORE and UNKNOWN."""
        if values.dtype == np.uint8:  # four times as fast
            return self.look_up(np.arange(256))[values]
        known, ids = self.table
        if self.threshold is not None:
            void = np.isin(values, self.ignore)
            values = (values > self.threshold).astype(np.int64)
        place = np.searchsorted(known, values).clip(max=len(known) - 1)
        found = np.where(known[place] == values, ids[place], np.uint8(UNKNOWN))
        if self.threshold is not None:
            found[void] = IGNORE
        return found

    def load(self, path: str | Path) -> np.ndarray:
        """Mask file -> (H, W) uint8 class ids and IGNORE; an unknown value stops and is named."""
        mask, valid, palette = read_labels(path)
        if self.by_color:
            values = pack(self.as_colors(mask, palette, path))
        elif self.threshold is None:
            values = self.as_ids(mask, path)
        else:
            values = self.as_ids(self.as_greys(mask, palette, path), path)
        ids = self.look_up(values)
        if valid is not None:
            ids[~valid] = IGNORE
        unknown = ids == UNKNOWN
        if unknown.any():
            seen, count = np.unique(values[unknown], return_counts=True)
            most = seen[np.argsort(-count)][:4]
            shown = ", ".join(f"#{v:06X}" if self.by_color else str(v) for v in most)
            kind = "colours" if self.by_color else "ids"
            raise BadInput(f"{path}: unknown {kind} {shown} on {count.sum()} of {ids.size} pixels; "
                           'add them to "classes" or "ignore" in dataset.json or data/public.py')
        return ids

    def encode(self, values: np.ndarray) -> np.ndarray:
        """What decode() made, (H, W, 1) ids or (H, W, 3) colours -> class ids and IGNORE."""
        ids = self.look_up(pack(values) if self.by_color else values[..., 0])
        ids[ids >= len(self.names)] = IGNORE
        return ids

    def as_colors(self, mask: np.ndarray, palette: np.ndarray | None,
                  path: str | Path) -> np.ndarray:
        """(H, W, 3) of a mask file that should hold colours, by its palette if it has one."""
        if mask.ndim == 3:
            return mask
        if palette is None:
            raise BadInput(f"{path}: one band of ids {np.unique(mask)[:8].tolist()}, but the label "
                           'table lists colours; give every class its "id" in dataset.json')
        return palette[mask]

    def as_greys(self, mask: np.ndarray, palette: np.ndarray | None,
                 path: str | Path) -> np.ndarray:
        """A mask file that should hold greys from 0 to 255: of a palette its colours."""
        if palette is not None:
            return palette[mask]
        bits = open_raster(path).bits
        if bits < 8:
            return mask * np.uint8(255 // (2 ** bits - 1))  # all values that there can be
        if mask.min(initial=0) < 0 or mask.max(initial=0) > 255:
            known = np.isin(mask, self.ignore)
            rest = mask[~known & ((mask < 0) | (mask > 255))]
            if rest.size:
                raise BadInput(f"{path}: a mask of values {mask.min()}..{mask.max()}, but "
                               '"threshold" in dataset.json goes with greys from 0 to 255; export '
                               'it with 8 bits, or name what is no grey in "ignore"')
        return mask

    def as_ids(self, mask: np.ndarray, path: str | Path) -> np.ndarray:
        """(H, W) of a mask file that should hold ids, which may be saved as grey RGB."""
        if mask.ndim == 2:
            return mask
        if not (mask == mask[..., :1]).all():
            raise BadInput(f"{path}: a colour mask, but the label table lists ids; take the \"id\" "
                           'entries out of dataset.json and give every class its "color"')
        return mask[..., 0]

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Class ids -> the file's own ids (H, W), uint8 or uint16, or colours (H, W, 3) uint8.

        IGNORE becomes .void.
        """
        if self.void is None and (ids == IGNORE).any():
            raise BadInput("pixels without a class, and no value in the masks means that; "
                           "--label-out train writes 255")
        if self.by_color:
            table = np.zeros((256, 3), np.uint8)
            table[:len(self.colors)] = self.colors
            table[IGNORE] = parse_color(self.void or "#000000")
            return table[ids]
        raw = self.raw
        highest = 255 if raw.max() <= 255 else 65535
        if raw.min() < 0 or raw.max() > highest:
            raise BadInput(f"class ids {raw.min()} to {raw.max()}: a PNG holds 0 to 65535; "
                           "--label-out train writes 0, 1, ...")
        void = highest if self.void is None else self.void
        table = np.full(256, void, np.uint8 if highest == 255 else np.uint16)
        table[:len(raw)] = raw
        return table[ids]
