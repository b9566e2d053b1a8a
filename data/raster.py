"""A picture file of any format as it is stored: size, bands, type, pixels, and which of them are data.

    raster = open_raster("a.tif")                # the header; told by content, whatever the suffix
    raster.shape, raster.dtype                   (H, W, bands), uint16
    pixels = raster.read(bands=[4, 1, 2])        (H, W, 3) of dtype; bands count from 1
    valid = valid_pixels(raster, pixels)         (H, W) bool, or None where the file cannot say
    check_kind("a.tif", meta)                    is it an image such as a run was trained on?

TIFFs are read by data/tiff.py, all other formats by Pillow, whole.
"""
import contextlib
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from .common import BadInput, check_file, check_pixels
from .tiff import (Georef, Tiff, Window, both, data_pixels, mask_beside, nodata_beside, of_bands,
                   read_world_file)

Image.MAX_IMAGE_PIXELS = None  # Pillow's limit of 179 million refuses normal orthophotos
ImageFile.LOAD_TRUNCATED_IMAGES = False

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # + is 43, the version of BigTIFF
PART = 2**20  # bytes of a file that are read at once
LOSSY = {"JPEG", "JPEG2000", "MPO"}  # what Pillow calls them

# Pillow's mode -> bands, type. Of the others the colours are read.
MODES = {
    "1": (1, np.uint8), "L": (1, np.uint8), "P": (1, np.uint8), "I;16": (1, np.uint16),
    "I;16B": (1, np.uint16), "I;16L": (1, np.uint16), "I": (1, np.int32), "F": (1, np.float32),
    "LA": (2, np.uint8), "RGB": (3, np.uint8), "RGBA": (4, np.uint8)}
COLOURS = {"PA": "RGBA", "La": "LA", "RGBa": "RGBA", "RGBX": "RGBA"}

# How a file becomes one like those that a run was trained on.
CONVERT = ("gdal_translate IN OUT.tif takes bands with -b 1 -b 2 -b 3 (-b 1 -b 1 -b 1 makes three of "
           "one), changes bits and range with -ot Byte or UInt16 and -scale LOW HIGH NEW_LOW NEW_HIGH")


def open_raster(path: str | Path) -> "Tiff | Picture":
    """The header of a picture file."""
    check_file(path)
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror})") from None
    if start not in TIFF_STARTS:
        return Picture(path)
    tiff = Tiff(path)
    if tiff.pages > 1:
        raise BadInput(f"{path}: {tiff.pages} pages, of which only the first would be read; "
                       "if they are bands, save the ones to use as bands of one page")
    return tiff


# How an alpha band with soft edges becomes the mask of a TIFF, where whatever is not 0 is data.
AS_MASK = ("gdal_translate -b 1 -b 2 -b 3 -mask 4 --config GDAL_TIFF_INTERNAL_MASK YES IN OUT.tif")


class Picture:
    """A PNG, JPEG, WebP, BMP, ... with the attributes of a Tiff.

    indexed: are the pixels indices of a palette? palette: its (256, 3) uint8 colours after read();
    opacity: (256,) uint8 beside it, or None. opaque: (H, W) bool after read() where one colour is
    transparent, else None. alpha: number of the alpha band, or None. lossy: does
    the compression change values? nodata: as of a Tiff, by the file NAME.aux.xml.
    """

    def __init__(self, path: str | Path):
        self.path = path
        image = self.open()
        self.deep = is_deep(image)
        mode = COLOURS.get(image.mode, image.mode)
        self.mode = mode if mode in MODES else "RGB"
        bands, dtype = MODES[self.mode]
        self.shape = image.height, image.width, bands
        self.dtype = np.dtype(np.uint16 if self.deep else dtype)
        self.photometric = image.mode
        self.compression = image.format
        self.bits = {"1": 1, "L;2": 2, "L;4": 4}.get(raw_mode(image), 8 * self.dtype.itemsize)
        self.lossy = image.format in LOSSY or is_lossy_webp(image)
        self.alpha = bands if self.mode in ("LA", "RGBA") else None
        self.nodata = nodata_beside(path, bands)
        self.indexed = self.mode == "P"
        self.palette = None  # of an indexed one once it is read: Pillow decodes to tell it
        # Some PNGs declare one colour, or entries of their palette, to be transparent.
        self.key = image.info.get("transparency")
        self.opacity = self.opaque = None
        if self.indexed and self.key is not None:
            self.opacity = opacity_of(self.key)

    def open(self) -> Image.Image:
        """Pillow's image, not yet decoded."""
        try:
            return Image.open(self.path)
        except Exception as e:  # Pillow raises a dozen kinds on damaged headers
            why = str(e).split(" '")[0][:100]  # without the path once more
            if os.path.getsize(self.path) == 0:
                why = "an empty file"
            raise BadInput(f"{self.path}: not a readable image ({why}); "
                           "expected PNG, JPEG or TIFF") from None

    def read(self, window: Window | None = None, bands: list[int] | None = None) -> np.ndarray:
        """(h, w, len(bands)) as stored; without window the whole image, without bands all."""
        check_pixels(self.path, *self.shape[:2])
        try:
            if self.compression == "PNG":
                check_png(self.path)
            a = deep_pixels(self) if self.deep else self.decode()
        except Exception as e:
            raise BadInput(f"{self.path}: damaged or truncated ({str(e)[:100]}); "
                           "copy the file again or take it out") from None
        # By all bands, whichever are asked for. Of colours of 16 bits nobody has seen one.
        if self.key is not None and not self.indexed and self.dtype != np.uint16:
            self.opaque = (a != np.array(self.key, np.int64)).any(-1)
        a = part_of(a, window)
        return a if bands is None else a[..., [b - 1 for b in bands]]

    def decode(self) -> np.ndarray:
        """(H, W, bands); greys of 1, 2 and 4 bits are the numbers in the file, as in GDAL."""
        image = self.open()
        step = {2: 85, 4: 17}.get(self.bits, 1)  # Pillow makes 0..255 of them
        if image.mode != self.mode:
            image = image.convert(self.mode)
        a = np.array(image)  # a copy: torch wants to own what it is given
        if self.indexed:
            listed = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            self.palette = np.zeros((256, 3), np.uint8)
            self.palette[:len(listed)] = listed
        a = a.astype(self.dtype, copy=False) // self.dtype.type(step) if step > 1 else a
        return a.reshape(self.shape).astype(self.dtype, copy=False)

    def mask(self, window: Window | None = None) -> np.ndarray | None:
        """(h, w) bool by the file NAME.msk beside it, None without."""
        return mask_beside(self.path, self.shape[:2], window)

    @property
    def placed(self) -> bool:
        """As of a Tiff."""
        return self.georef is not None

    @property
    def georef(self) -> Georef | None:
        """Where the image lies, by a world file beside it."""
        transform = read_world_file(self.path)
        return Georef(transform, None, {}) if transform else None


def kinds_of(raster: "Tiff | Picture") -> set[tuple[int, int]]:
    """(bands, bits) of an image by its header; two where an alpha band may be a mask or a band."""
    n = 3 if raster.indexed else raster.shape[2]
    bits = 8 * raster.dtype.itemsize
    return {(n, bits), (n - bool(raster.alpha), bits)}


def kinds_text(kinds: set[tuple[int, int]]) -> str:
    """{(3, 8)} -> '3 bands of 8 bits'"""
    words = []
    for n, bits in sorted(kinds):
        plural = "s" if n > 1 else ""
        words.append(f"{n} band{plural} of {bits} bits")
    return " or ".join(words)


def kinds_in(meta: dict) -> set[tuple[int, int]]:
    """What kinds_of() gave for a run's data set, by its header; earlier versions have not kept them: {}."""
    return set(map(tuple, meta.get("kinds") or ()))


def kinds_agree(a: set[tuple[int, int]], b: set[tuple[int, int]], bands: list[int] | None) -> bool:
    """Do two sets of kinds have one in common? bands: those that are read, None for the first three."""
    if bands:
        # Named bands are taken from images of any number of bands: the bits must agree.
        a, b = ({bits for _, bits in kinds} for kinds in (a, b))
    return not a.isdisjoint(b)


def check_kind(path: str | Path, meta: dict, run: str = "the run") -> None:
    """BadInput where no image of a run's data set was of this image's kind: it would be guessed at.

    meta: the run's header. run: what the message calls it.
    """
    known = kinds_in(meta)
    found = kinds_of(open_raster(path))
    if known and not kinds_agree(found, known, meta["reading"]["bands"]):
        raise BadInput(f"{path}: {kinds_text(found)}; expected {kinds_text(known)}, as in the data "
                       f"set of {run}: {CONVERT}")


def part_of(a: np.ndarray, window: Window | None = None) -> np.ndarray:
    """The part (top, left, h, w) of an array (H, W, ...), or all of it."""
    if window is None:
        return a
    top, left, h, w = window
    return a[top:top + h, left:left + w]


def valid_pixels(raster: "Tiff | Picture", pixels: np.ndarray,
                 window: Window | None = None, bands: list[int] | None = None
                 ) -> np.ndarray | None:
    """Which pixels (h, w, n) of `bands` are data, (h, w) bool, None where all are. Not by alpha.

    As GDAL has it: by the mask page; without one by the file NAME.msk; without that, a pixel is
    nodata if all its bands are. Beyond GDAL: a transparent colour, NaN and infinity are no data.
    """
    seen = raster.mask(window or (0, 0, *raster.shape[:2]))
    valid = data_pixels(pixels, seen, of_bands(raster.nodata, bands))
    opaque = getattr(raster, "opaque", None)
    return valid if opaque is None else both(valid, part_of(opaque, window))


# ---- what Pillow does not tell

def check_png(path: str | Path) -> None:
    """ValueError where a chunk of a PNG differs from its checksum, which Pillow does not ask of pixels."""
    with open(path, "rb") as file:
        file.seek(8)  # behind the signature
        name = b""
        while name != b"IEND":
            head = file.read(8)
            if len(head) < 8:
                raise ValueError("it ends too early")
            length, name = struct.unpack(">I4s", head)
            digest = zlib.crc32(name)
            while length:
                part = file.read(min(length, PART))
                if not part:
                    raise ValueError("it ends too early")
                digest = zlib.crc32(part, digest)
                length -= len(part)
            if file.read(4) != struct.pack(">I", digest):
                raise ValueError(f"the checksum of its chunk {name!r} is wrong")


def opacity_of(key: int | bytes) -> np.ndarray:
    """(256,) uint8: a palette's transparent entry, or the opacity of the first entries."""
    opacity = np.full(256, 255, np.uint8)
    if isinstance(key, int):
        opacity[key] = 0
    else:
        opacity[:len(key)] = list(key)
    return opacity


def raw_mode(image: Image.Image) -> str | None:
    """How the pixels lie in the file, such as "L;4", if Pillow says."""
    with contextlib.suppress(Exception):
        args = image.tile[0][3]
        return args if isinstance(args, str) else args[0]
    return None


def is_deep(image: Image.Image) -> bool:
    """Colours of 16 bits, of which Pillow hands out the upper 8."""
    return image.mode in ("RGB", "RGBA") and ";16" in str(image.tile[:1])


def deep_pixels(picture: Picture) -> np.ndarray:
    """(H, W, 3 or 4) uint16.

    Pillow keeps the first byte of a value only. So the file is read twice: the second time Pillow
    is told the other byte order, and keeps the byte that was dropped.
    """
    upper, lower = picture.open(), picture.open()
    native = ";16B" if sys.byteorder == "little" else ";16L"
    other = {";16L": ";16B", ";16B": ";16L", ";16N": native}
    for i, (codec, box, offset, args) in enumerate(lower.tile):
        # The arguments of the decoder: the raw mode such as "RGB;16L", alone or first of several.
        raw = args if isinstance(args, str) else args[0]
        raw = raw[:-4] + other[raw[-4:]]
        args = raw if isinstance(args, str) else (raw, *args[1:])
        lower.tile[i] = type(lower.tile[i])(codec, box, offset, args)
    return np.array(upper).astype(np.uint16) << 8 | np.array(lower)


def is_lossy_webp(image: Image.Image) -> bool:
    """A WebP holds a chunk VP8L if it is lossless, VP8 if not."""
    if image.format != "WEBP":
        return False
    with open(image.filename, "rb") as file:
        return b"VP8L" not in file.read(4096)
