"""Read TIFFs with GDAL's values, any window of any bands; write cloud-optimised GeoTIFFs.

    tiff = Tiff("scene.tif")  # reads the header: tiff.shape (10980, 10980, 4), tiff.dtype uint16
    pixels = tiff.read(window=(0, 512, 256, 256), bands=[4, 1, 2])  # (256, 256, 3) uint16
    pixels, valid = tiff.read_valid((0, 512, 256, 256), [4, 1, 2])  # (256, 256) bool, or None
    write_tiff("ids.tif", ids, palette=colors, nodata=255, georef=tiff.georef)  # (H, W) uint8

A window is (top, left, height, width) in pixels; bands count from 1. A file is opened for each call
and closed after it, so threads and worker processes share nothing.

Read are whole numbers of 1 to 32 and 64 bits, and floats of 16, 32 and 64; strips and tiles, bands
together or one after the other, sparse files, both byte orders, BigTIFF; deflate, LZW, ZSTD, LZMA,
PackBits, JPEG, WebP, and all predictors. Pillow's libtiff unpacks; NumPy does the rest. What is not
read is refused by name, with a command that converts it. Images that do not fit into memory are
written row by row with TiffWriter, which goes on where a killed one stopped.
"""
import contextlib
import io
import json
import os
import shlex
import struct
import zlib
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO, NamedTuple
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from PIL import Image, features
from PIL.TiffImagePlugin import COMPRESSION_INFO, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from .common import BadInput, NotWritten, as_bytes, check_file, read_text, replace

# A damaged header may ask for any size. What is larger than this is refused. Pillow's own limit is
# lower than what large strips hold.
Image.MAX_IMAGE_PIXELS = None
LARGEST_BLOCK = 2**30  # bytes of one strip or tile, unpacked
LARGEST_WINDOW = 2**33  # bytes that one call returns
LARGEST_RATIO = 50_000  # of unpacked to packed bytes; ZSTD comes nearest with 32,768
MOST_PAGES = 2**16

Window = tuple[int, int, int, int]  # top, left, height, width


# ---- numbers of the format

class Tag(IntEnum):
    """The tags that this module knows, as the specifications of TIFF and GeoTIFF call them."""
    NewSubfileType = 254
    ImageWidth = 256
    ImageLength = 257
    BitsPerSample = 258
    Compression = 259
    PhotometricInterpretation = 262
    FillOrder = 266
    StripOffsets = 273
    SamplesPerPixel = 277
    RowsPerStrip = 278
    StripByteCounts = 279
    PlanarConfiguration = 284
    Predictor = 317
    ColorMap = 320
    TileWidth = 322
    TileLength = 323
    TileOffsets = 324
    TileByteCounts = 325
    ExtraSamples = 338
    SampleFormat = 339
    JPEGTables = 347
    YCbCrSubSampling = 530
    ModelPixelScale = 33550
    ModelTiepoint = 33922
    ModelTransformation = 34264
    GeoKeyDirectory = 34735
    GeoDoubleParams = 34736
    GeoAsciiParams = 34737
    GDALMetadata = 42112
    GDALNoData = 42113


# Types of values -> NumPy's. The rationals (5 and 10) are in none of the tags above.
TYPES = {1: "u1", 2: "S1", 3: "u2", 4: "u4", 6: "i1", 7: "V1", 8: "i2", 9: "i4", 11: "f4",
         12: "f8", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}

OVERVIEW, MASK = 1, 4  # bits of NewSubfileType
PLANAR = 2  # PlanarConfiguration: the bands one after the other
LOWEST_BIT_FIRST = 2  # FillOrder
ALPHA = (1, 2)  # ExtraSamples: colours are multiplied by it, or not

NONE, LZW, JPEG, DEFLATE, OLD_DEFLATE = 1, 5, 7, 8, 32946  # Compression
PACKBITS, LZMA, ZSTD, WEBP = 32773, 34925, 50000, 50001
READ = {NONE: "none", LZW: "LZW", JPEG: "JPEG", DEFLATE: "deflate", OLD_DEFLATE: "deflate",
        PACKBITS: "PackBits", LZMA: "LZMA", ZSTD: "ZSTD", WEBP: "WebP"}
READ_BY_GDAL = {2: "CCITT RLE", 3: "CCITT fax 3", 4: "CCITT fax 4", 6: "old-style JPEG",
                34676: "SGI Log", 34677: "SGI Log 24", 34887: "LERC"}
READ_BY_OTHERS = {33003: "JPEG 2000", 33004: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000",
                  34892: "lossy JPEG", 34933: "PNG", 34934: "JPEG XR", 50002: "JPEG XL"}
COMPRESSIONS = READ | READ_BY_GDAL | READ_BY_OTHERS
PICTURES = (JPEG, WEBP)  # unpack to pixels, the others to bytes

HORIZONTAL, FLOATING_POINT = 2, 3  # Predictor
WITH_PREDICTOR = (LZW, DEFLATE, OLD_DEFLATE, LZMA, ZSTD)  # libtiff ignores it in all others

BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, CIELAB = 1, 2, 3, 5, 6, 8  # PhotometricInterpretation
PHOTOMETRICS = {0: "MinIsWhite", 1: "BlackIsZero", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK",
                6: "YCbCr", 8: "CIELab", 9: "ICCLab", 10: "ITULab", 32803: "CFA", 32844: "LogL",
                32845: "LogLuv"}

KINDS = {1: "uint", 2: "int", 3: "float", 4: "uint", 5: "complex int", 6: "complex"}  # SampleFormat
WHOLE = (8, 16, 32, 64)  # bits of NumPy's types
BITS = {"uint": (*range(1, 33), 64), "int": WHOLE, "float": (16, 32, 64)}

MODEL_TYPE, RASTER_TYPE, GEOGRAPHIC, PROJECTED, UNIT = 1024, 1025, 2048, 3072, 3076  # GeoKeys
CENTRES = 2  # RASTER_TYPE: coordinates are those of the centres of pixels
USER_DEFINED = 32767  # a coordinate system without an EPSG code
DEGREES = 2  # MODEL_TYPE: coordinates are longitude and latitude
METRE = 9001
METRES = {METRE: 1.0, 9002: 0.3048, 9003: 1200 / 3937}  # UNIT: metres, feet, US survey feet
MERCATOR = 3857, 3785, 900913, 102100, 3395  # EPSG codes, also of ESRI
UTM = {*range(32601, 32661), *range(32701, 32761), *range(25828, 25839), *range(26901, 26924)}
MODEL_TAGS = Tag.ModelPixelScale, Tag.ModelTiepoint, Tag.ModelTransformation
KEY_TAGS = Tag.GeoKeyDirectory, Tag.GeoDoubleParams, Tag.GeoAsciiParams

TILE = 512  # pixels a side of what is written
WIDE = 4096  # columns that spans() puts together: what is unpacked at once takes little memory
FILL = 0  # behind the edge of the image, where nobody looks
CLASSIC_LIMIT = 2**32  # bytes; a larger file is a BigTIFF
PART_HEAD = b"nanors part of a TIFF "
TILE_HEAD = struct.Struct("<QI")  # number and bytes of a tile in a .part

NODATA_VALUES = "NODATA_VALUES"  # how GDAL's metadata call values that count in all bands at once

TURNED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # each byte's bits in reverse


# ---- directories

class File:
    """A TIFF opened for one call: its size, its byte order, and any of its bytes."""

    def __init__(self, path: str | Path):
        self.path = path
        check_file(path)
        try:
            self.handle = open(path, "rb")
            self.size = os.fstat(self.handle.fileno()).st_size
        except OSError as e:
            raise BadInput(f"{path}: cannot be opened ({e.strerror})") from None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.close()

    def damaged(self, what: str) -> BadInput:
        """The error to raise where the file contradicts itself."""
        return BadInput(f"{self.path}: damaged TIFF: {what}; copy the file again or take it out")

    def take(self, offset: int, count: int, what: str) -> bytes:
        """Bytes of the file; `what` they are is named where the file ends before them."""
        data = b""
        if offset + count <= self.size:
            self.handle.seek(offset)
            data = self.handle.read(count)
        if len(data) < count:
            raise self.damaged(f"{what} should lie at bytes {offset} to {offset + count} "
                               f"of a file of {self.size}")
        return data

    def first_directory(self) -> int:
        """Where the first directory lies; sets the byte order, and whether it is a BigTIFF."""
        start = self.take(0, min(16, self.size), "the header").ljust(16, b"\0")
        self.order = ">" if start[:2] == b"MM" else "<"
        version = struct.unpack_from(self.order + "H", start, 2)[0]
        if start[:2] not in (b"II", b"MM") or version not in (42, 43):
            raise BadInput(f"{self.path}: not a TIFF; it begins with {start[:4]}")
        self.big = version == 43
        if self.big:
            return struct.unpack_from(self.order + "Q", start, 8)[0]
        return struct.unpack_from(self.order + "I", start, 4)[0]


class Directory:
    """The tags of one page; their values are read when they are asked for."""

    def __init__(self, file: File, offset: int):
        self.file = file
        # How many entries, the entries, the offset of the next directory. An entry is a tag, a
        # type, how many values, and a word: the values, or their offset where they do not fit.
        number, head, word = ("Q", "HHQ", "Q") if file.big else ("H", "HHI", "I")
        number, head, self.word = (struct.Struct(file.order + c) for c in (number, head, word))
        entries = number.unpack(file.take(offset, number.size, "a directory"))[0]
        offset += number.size
        step = head.size + self.word.size
        data = file.take(offset, entries * step + self.word.size, "a directory")
        self.next = self.word.unpack_from(data, entries * step)[0]
        self.entries = {}  # {tag: (type, how many values, where the word lies)}
        for start in range(0, entries * step, step):
            tag, kind, count = head.unpack_from(data, start)
            self.entries.setdefault(tag, (kind, count, offset + start + head.size))
        self.kind = self.number(Tag.NewSubfileType, 0) & (OVERVIEW | MASK)
        self.size = self.number(Tag.ImageLength), self.number(Tag.ImageWidth)

    def __contains__(self, tag: Tag) -> bool:
        return tag in self.entries

    def values(self, tag: Tag, kinds: str = "ui") -> np.ndarray:
        """All values of a tag, none where it is absent; `kinds` are NumPy's that it may have."""
        if tag not in self.entries:
            return np.zeros(0, np.int64)
        kind, count, place = self.entries[tag]
        dtype = np.dtype(self.file.order + TYPES.get(kind, "V1"))
        if dtype.kind not in kinds:
            raise self.file.damaged(f"{tag.name} has values of type {kind}")
        size = count * dtype.itemsize
        if size > self.word.size:
            place = self.word.unpack(self.file.take(place, self.word.size, tag.name))[0]
        return np.frombuffer(self.file.take(place, size, tag.name), dtype)

    def number(self, tag: Tag, default: int | None = None) -> int:
        """The first value of a tag; without a default it must be there."""
        values = self.values(tag)
        if values.size:
            return int(values[0])
        if default is None:
            raise self.file.damaged(f"{tag.name} is missing")
        return default

    def text(self, tag: Tag) -> str:
        """The value of an ASCII tag, empty where it is absent."""
        return self.values(tag, "S").tobytes().partition(b"\0")[0].decode("latin-1").strip()


def read_directories(file: File) -> tuple[list[Directory], str | None]:
    """All directories of a file, and what is wrong with the one that ends the list too early.

    Only the first one has to be whole. The others are overviews, mostly.
    """
    offset = file.first_directory()
    directories, seen = [Directory(file, offset)], {offset}
    while directories[-1].next and len(directories) < MOST_PAGES:
        offset = directories[-1].next
        try:
            if offset in seen:
                raise file.damaged("its directories lead round in a circle")
            seen.add(offset)
            directories.append(Directory(file, offset))
        except BadInput as e:
            return directories, str(e)
    return directories, None


# ---- pixels

class Page:
    """How the pixels of one directory are stored, and windows of them."""

    def __init__(self, file: File, directory: Directory):
        number = directory.number
        self.path, self.order = file.path, file.order
        self.height, self.width = directory.size
        self.bands = number(Tag.SamplesPerPixel, 1)
        self.planar = number(Tag.PlanarConfiguration, 1) == PLANAR and self.bands > 1
        self.photometric = number(Tag.PhotometricInterpretation, BLACK_IS_ZERO)
        self.compression = number(Tag.Compression, NONE)
        self.packing = COMPRESSIONS.get(self.compression, "unknown")
        self.predictor = number(Tag.Predictor, 1) if self.compression in WITH_PREDICTOR else 1
        self.turned = number(Tag.FillOrder, 1) == LOWEST_BIT_FIRST
        self.bits = number(Tag.BitsPerSample, 1)
        self.kind = KINDS.get(number(Tag.SampleFormat, 1), "unknown format ")
        self.fill = 0  # the value of sparse blocks, which take no room in the file
        self.refuse_unreadable(directory)

        whole = min(bits for bits in WHOLE if bits >= self.bits)
        self.stored = np.dtype(f"{self.kind}{whole}")
        # As GDAL reports it: before version 3.11 it has no half floats.
        self.dtype = np.dtype(np.float32) if self.stored == np.float16 else self.stored
        # GDAL turns these colours into red, green, blue and an alpha of 255.
        self.inks = self.photometric == CMYK and self.bits == 8 and self.bands == 4

        self.tiled = Tag.TileWidth in directory
        if self.tiled:
            self.block_name = "tile"
            self.block = number(Tag.TileLength), number(Tag.TileWidth)
        else:
            self.block_name = "strip"
            rows = number(Tag.RowsPerStrip, self.height)
            self.block = min(rows, self.height), self.width
        sizes = self.height, self.width, self.bands, *self.block
        if min(sizes) < 1:
            raise file.damaged(f"height, width, bands and size of a {self.block_name} are {sizes}")
        self.samples = 1 if self.planar else self.bands  # of one pixel in one block
        self.row_bytes = -(-self.block[1] * self.samples * self.bits // 8)
        self.find_blocks(file, directory)
        self.jpeg_fields = {}
        for tag in (Tag.JPEGTables, Tag.YCbCrSubSampling):
            if tag in directory and self.compression == JPEG:
                self.jpeg_fields[tag] = directory.values(tag, "uV")

    def refuse_unreadable(self, directory: Directory) -> None:
        """Refuse by name what is not read, each with a way to convert it."""
        bits, packing = self.bits, self.packing
        translate = self.gdal_translate
        for tag in (Tag.BitsPerSample, Tag.SampleFormat):
            values = directory.values(tag)[:self.bands].tolist()
            if len(set(values)) > 1:
                self.refuse(f"bands that differ ({tag.name} {values})",
                            "save it with bands of one kind in the program that wrote it")
        if self.kind.startswith("complex"):
            amplitude = shlex.quote(f"DERIVED_SUBDATASET:AMPLITUDE:{self.path}")
            self.refuse("complex numbers", f"gdal_translate {amplitude} NEW.tif")
        if bits not in BITS.get(self.kind, ()):
            self.refuse(f"{self.kind}{bits}", translate("-co NBITS=32 "))

        if self.compression in READ_BY_GDAL:
            self.refuse(packing, translate())
        # Colours that GDAL converts; those of other photometrics it hands out as they are stored.
        if self.photometric == YCBCR and (self.compression != JPEG or self.planar):
            self.refuse("YCbCr that is not JPEG", translate())
        if self.photometric == CIELAB and bits == 8:
            self.refuse("CIELab", translate("-b 1 -b 2 -b 3 "))
        if self.photometric == CMYK and bits == 8 and self.bands > 4:
            self.refuse("CMYK with more bands", translate())

        if self.compression not in READ:
            # GDAL as it is mostly built reads none of the others. imagecodecs reads nearly all.
            code = f"import tifffile as t; t.imwrite('NEW.tif', t.imread({str(self.path)!r}))"
            self.refuse(packing, "pip install tifffile imagecodecs; "
                        f"python -c {shlex.quote(code)}")
        if self.compression in PICTURES:
            bands = 1 if self.planar else self.bands
            possible = (1, 2, 3, 4) if self.compression == JPEG else (3, 4)
            if (self.kind, bits) != ("uint", 8) or bands not in possible:
                self.refuse(f"{packing} of {bits} bits and {bands} bands", translate())
        predictable = {HORIZONTAL: bits in WHOLE, FLOATING_POINT: self.kind == "float"}
        if self.predictor != 1 and not predictable.get(self.predictor):
            self.refuse(f"predictor {self.predictor} of {self.kind}{bits}",
                        "save it without a predictor in the program that wrote it")

    def refuse(self, what: str, advice: str) -> None:
        """Raise the error for a file that is in order, but that this module does not read."""
        photometric = PHOTOMETRICS.get(self.photometric, "unknown")
        raise BadInput(f"{self.path}: {self.kind}{self.bits}, {self.bands} bands, "
                       f"compression {self.compression} ({self.packing}), "
                       f"photometric {self.photometric} ({photometric}): "
                       f"{what} cannot be read here; convert it: {advice}")

    def gdal_translate(self, options: str = "") -> str:
        """The command that writes the image anew in a layout that is read."""
        path = shlex.quote(str(self.path))
        return f"gdal_translate {options}-co COMPRESS=DEFLATE {path} NEW.tif"

    def find_blocks(self, file: File, directory: Directory) -> None:
        """Where the strips or tiles lie: row by row, and band by band if planar."""
        self.grid = -(-self.height // self.block[0]), -(-self.width // self.block[1])
        needed = self.grid[0] * self.grid[1] * (self.bands if self.planar else 1)
        offsets, counts = Tag.StripOffsets, Tag.StripByteCounts
        if Tag.TileOffsets in directory:
            offsets, counts = Tag.TileOffsets, Tag.TileByteCounts
        self.offsets = directory.values(offsets)[:needed]
        self.counts = directory.values(counts)[:needed]
        if counts not in directory:
            # A block ends where another begins, at the latest. Decoders stop by themselves.
            ends = np.unique([*self.offsets.tolist(), file.size])
            following = np.searchsorted(ends, self.offsets, "right")
            self.counts = ends[np.minimum(following, len(ends) - 1)] - self.offsets
        listed = min(len(self.offsets), len(self.counts))
        if listed < needed:
            raise file.damaged(f"{listed} of {needed} {self.block_name}s are listed")
        size = self.block[0] * self.row_bytes
        if size > LARGEST_BLOCK and self.compression != NONE:
            self.refuse(f"a {self.block_name} of {size >> 20} MiB",
                        self.gdal_translate("-co TILED=YES "))

    def present(self, rows: range) -> np.ndarray:
        """(columns of blocks,) bool: does the file hold any block of these rows of blocks?"""
        held = self.offsets > 0
        if self.compression != NONE:  # whose counts are often wrong
            held &= self.counts > 0
        return held.reshape(-1, *self.grid)[:, rows.start:rows.stop].any((0, 1))

    def read(self, window: Window, bands: list[int]) -> np.ndarray:
        """(height, width, len(bands)), from the strips or tiles that the window touches."""
        if self.inks:
            inks = self.read_stored(window, [1, 2, 3, 4]).astype(np.uint16)
            colours = (255 - inks[..., :3]) * (255 - inks[..., 3:]) // 255
            pixels = np.insert(colours.astype(np.uint8), 3, 255, axis=-1)
            return pixels[..., [b - 1 for b in bands]]
        return self.read_stored(window, bands)

    def read_stored(self, window: Window, bands: list[int]) -> np.ndarray:
        """read(), with the numbers that the file holds."""
        top, left, height, width = window
        size = height * width * len(bands) * self.dtype.itemsize
        try:
            if size > LARGEST_WINDOW:
                raise MemoryError
            out = np.empty((height, width, len(bands)), self.dtype)
        except MemoryError:
            raise BadInput(f"{self.path}: {height} x {width} pixels of {len(bands)} bands take "
                           f"{size / 2**30:.1f} GiB at once, too much; cut the image up") from None
        with File(self.path) as file:
            for row, ys, to_ys in spans(top, height, self.block[0]):
                for column, xs, to_xs in spans(left, width, self.block[1]):
                    if not self.planar:
                        block = self.decode(file, 0, row, column, ys)
                    for i, band in enumerate(bands):
                        if self.planar:
                            block = self.decode(file, band - 1, row, column, ys)
                        out[to_ys, to_xs, i] = block[:, xs, 0 if self.planar else band - 1]
        return out

    def decode(self, file: File, plane: int, row: int, column: int, ys: slice) -> np.ndarray:
        """Rows `ys` of one strip or tile: (rows, columns, samples)."""
        index = (plane * self.grid[0] + row) * self.grid[1] + column
        offset, count = int(self.offsets[index]), int(self.counts[index])
        shape = ys.stop - ys.start, self.block[1], self.samples
        # Counts of what is not packed are often wrong, and not needed.
        if not offset or not (count or self.compression == NONE):
            return np.full(shape, self.fill, self.dtype)
        name = f"{self.block_name} {index + 1} of {len(self.offsets)}"
        if self.compression == NONE:
            # Only the rows that are wanted: the whole image may be one strip.
            start = offset + ys.start * self.row_bytes
            data = file.take(start, shape[0] * self.row_bytes, name)
            if self.turned:
                data = data.translate(TURNED)
            return self.to_numbers(data, shape)

        # Unpacking stops behind the last row that is wanted, except that of pictures.
        rows = ys.stop
        if self.compression in PICTURES:
            rows = self.block[0]
            if not self.tiled:
                rows = min(rows, self.height - row * rows)  # The last strip ends with the image.
        packed = file.take(offset, count, name)
        try:
            data = self.unpack(packed, rows)
        except Exception as e:  # Pillow raises many kinds.
            if not has_codec(self.compression):
                self.refuse(f"{self.packing}, which this Pillow was built without,",
                            "pip install --upgrade pillow, or " + self.gdal_translate())
            raise file.damaged(f"{name} cannot be unpacked ({self.packing}: {e})") from None
        if len(data) < rows * self.row_bytes:
            raise file.damaged(f"{name} unpacks to {len(data)} of {rows * self.row_bytes} bytes")
        return self.to_numbers(data[ys.start * self.row_bytes:ys.stop * self.row_bytes], shape)

    def unpack(self, data: bytes, rows: int) -> bytes:
        """The first rows of a strip or tile."""
        size = rows * self.row_bytes
        if self.compression == JPEG:
            photometric = BLACK_IS_ZERO if self.samples < 3 else RGB
            if self.photometric == YCBCR:
                photometric = YCBCR  # which libtiff turns into RGB
            return libtiff(data, self.compression, (rows, self.block[1], self.samples),
                           photometric, self.jpeg_fields)
        if self.compression == WEBP:
            image = WebPImageFile(io.BytesIO(data))
            if image.size != (self.block[1], rows):
                raise ValueError(f"a picture of {image.height} x {image.width} pixels")
            return image.convert("RGB" if self.samples == 3 else "RGBA").tobytes()
        if self.turned:
            data = data.translate(TURNED)
        if self.compression in (DEFLATE, OLD_DEFLATE):
            # One byte more than is wanted: so a whole block ends behind its checksum.
            return zlib.decompressobj().decompress(data, size + 1)[:size]
        if size > LARGEST_RATIO * len(data):
            return b""  # It cannot be true, and the memory would be taken first.
        return libtiff(data, self.compression, (rows, self.row_bytes, 1))

    def to_numbers(self, data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
        """Bytes of whole rows -> (rows, columns, samples) of the machine, the predictor undone."""
        rows, columns, samples = shape
        if self.bits not in WHOLE:
            lines = np.frombuffer(data, np.uint8).reshape(rows, -1)
            digits = np.unpackbits(lines, axis=1, count=columns * samples * self.bits)
            numbers = np.zeros(shape, self.stored)
            for digit in np.moveaxis(digits.reshape(*shape, self.bits), -1, 0):
                numbers = numbers << 1 | digit
            return numbers
        size = self.stored.itemsize
        if self.predictor == FLOATING_POINT:
            # Differences of bytes. The bytes of a row lie in planes, the highest ones first.
            planes = running_sum(np.frombuffer(data, np.uint8).reshape(rows, -1, samples))
            planes = planes.reshape(rows, size, -1).swapaxes(1, 2)
            return np.ascontiguousarray(planes).view(f">f{size}").reshape(shape).astype(self.stored)
        numbers = np.frombuffer(data, self.stored.newbyteorder(self.order)).reshape(shape)
        numbers = numbers.astype(self.stored, copy=False)
        if self.predictor == HORIZONTAL:
            # Differences modulo 2^bits, also those of floats.
            numbers = running_sum(numbers.view(f"u{size}")).view(self.stored)
        return numbers


def spans(start: int, length: int, size: int) -> Iterator[tuple[int, slice, slice]]:
    """Blocks along one axis that a window touches: (number, part of the block, of the window)."""
    for block in range(start // size, -(-(start + length) // size)):
        origin = block * size
        first, last = max(start, origin), min(start + length, origin + size)
        yield block, slice(first - origin, last - origin), slice(first - start, last - start)


def running_sum(a: np.ndarray) -> np.ndarray:
    """Sums along axis 1, modulo 2^bits: three times as fast as NumPy's cumsum for bytes."""
    a = a.copy()
    reach = 1  # Each number is the sum of so many.
    while reach < a.shape[1]:
        a[:, reach:] += a[:, :-reach]
        reach *= 2
    return a


def libtiff(data: bytes, compression: int, shape: tuple[int, int, int],
            photometric: int = BLACK_IS_ZERO, more: dict | None = None) -> bytes:
    """Bytes of the shape (height, width, bands), unpacked as the only strip of a TIFF in memory."""
    height, width, bands = shape
    fields = {
        Tag.ImageWidth: np.uint32([width]),
        Tag.ImageLength: np.uint32([height]),
        Tag.BitsPerSample: np.uint16([8] * bands),
        Tag.Compression: np.uint16([compression]),
        Tag.PhotometricInterpretation: np.uint16([photometric]),
        Tag.StripOffsets: np.uint32([8]),
        Tag.SamplesPerPixel: np.uint16([bands]),
        Tag.RowsPerStrip: np.uint32([height]),
        Tag.StripByteCounts: np.uint32([len(data)])}
    if bands in (2, 4):
        fields[Tag.ExtraSamples] = np.uint16([ALPHA[1]])  # Pillow would drop other fourth bands.
    fields |= more or {}
    end = 8 + len(data) + len(data) % 2
    file = struct.pack("<2sHI", b"II", 42, end) + data.ljust(end - 8, b"\0")
    return TiffImageFile(io.BytesIO(file + directory_bytes(fields, end))).tobytes()


def directory_bytes(fields: dict[Tag, np.ndarray], offset: int, big: bool = False,
                    last: bool = True) -> bytes:
    """A directory of a little-endian TIFF, which will lie at `offset`; the next lies behind it."""
    numbers = {TYPES[number]: number for number in sorted(TYPES, reverse=True)}
    number, word = ("<Q", "Q") if big else ("<H", "I")
    room = struct.calcsize(word)  # bytes of an entry for values; those that need more lie behind
    head = struct.Struct(f"<HH{word}{room}s")
    start = offset + struct.calcsize(number) + head.size * len(fields) + room
    entries = [struct.pack(number, len(fields))]
    values = bytearray()
    for tag in sorted(fields):
        array = fields[tag].astype(fields[tag].dtype.newbyteorder("<"))
        data = array.tobytes()
        if len(data) > room:
            place = struct.pack(f"<{word}", start + len(values))
            values += data + b"\0" * (len(data) % 2)
            data = place
        entries.append(head.pack(tag, numbers[array.dtype.str[1:]], array.size, data))
    following = 0 if last else start + len(values)
    return b"".join(entries) + struct.pack(f"<{word}", following) + values


def has_codec(compression: int) -> bool:
    """Whether Pillow was built with it: some lack ZSTD, LZMA or WebP."""
    if compression == WEBP:
        return features.check("webp")
    try:
        name = COMPRESSION_INFO[compression]
        Image.new("L", (16, 16)).save(io.BytesIO(), "TIFF", compression=name)
    except Exception:
        return False
    return True


# ---- files

class Tiff:
    """The first full page of a TIFF, and what its other pages and the files beside it say of it.

    shape: (H, W, bands), and dtype, of what read() returns: NumPy's type with room for the bits.
    nodata: number, a tuple with one for each band, or None. alpha: number of the alpha band, or
    None. palette: (n, 3) uint8 or None.
    photometric, compression: their names, such as "RGB", "JPEG"; YCbCr and CMYK are read as RGB and
    RGBA. pages: how many full ones. overviews: [(H, W)]. block: (h, w) of strips or tiles; a window
    costs at least those that it touches. damage: None, or what is wrong with the pages behind.
    """

    def __init__(self, path: str | Path):
        self.path = path
        with File(path) as file:
            directories, self.damage = read_directories(file)
            full = [d for d in directories if not d.kind]
            main = (full or directories)[0]
            self.page = Page(file, main)
            self.pages = max(len(full), 1)
            self.overviews = [d.size for d in directories if d.kind == OVERVIEW]
            self.mask_page = None
            for d in directories:
                if d.kind == MASK and d.size == main.size and d is not main:
                    self.mask_page = self.mask_page or Page(file, d)
            self.palette = read_palette(main, self.page)
            self.alpha = 4 if self.page.inks else alpha_band(main, self.page)
            self.nodata = read_nodata(main, self.page.bands)
            self.position = read_georef(main)
        self.shape = self.page.height, self.page.width, self.page.bands
        self.dtype = self.page.dtype
        self.bits = self.page.bits
        self.indexed = self.palette is not None
        self.lossy = self.page.compression == JPEG
        self.block = self.page.block
        self.compression = self.page.packing
        self.photometric = PHOTOMETRICS.get(self.page.photometric, "unknown")
        if isinstance(self.nodata, int | float):
            self.page.fill = nearest(self.nodata, self.dtype)

    def read(self, window: Window | None = None, bands: list[int] | None = None) -> np.ndarray:
        """(h, w, len(bands)) of dtype; without window the whole image, without bands all."""
        return self.page.read(self.inside(window), self.existing(bands))

    def read_valid(self, window: Window | None = None, bands: list[int] | None = None
                   ) -> tuple[np.ndarray, np.ndarray | None]:
        """read() of `bands` or of all but alpha, and (h, w) bool: which pixels are data, or None.

        None: the file marks no pixel. As in GDAL's dataset mask, pixels are valid where the mask
        page is not 0; without one, where the file NAME.msk is not 0; without that, where any of the
        bands differs from the nodata value and alpha is not 0. Beyond GDAL: nodata and alpha count
        both, alpha is data where `bands` names it, and a NaN or infinity in any band is no data.
        """
        window = self.inside(window)
        bands = bands or [b for b in self.existing() if b != self.alpha] or [1]
        seen = self.mask(window)
        veiled = seen is None and self.alpha is not None and self.alpha not in bands
        # One pass over the strips or tiles serves the pixels and alpha.
        pixels = self.read(window, [*bands, self.alpha] if veiled else bands)
        values = pixels[..., :len(bands)]

        valid = data_pixels(values, seen, of_bands(self.nodata, bands))
        return values, both(valid, pixels[..., -1] > 0) if veiled else valid

    def valid(self, window: Window | None = None, bands: list[int] | None = None):
        """The second of what read_valid() returns; decodes no pixels where none are asked."""
        if self.nodata is None and self.alpha is None and self.dtype.kind != "f":
            return self.mask(self.inside(window))
        return self.read_valid(window, bands)[1]

    def mask(self, window: Window) -> np.ndarray | None:
        """(h, w) bool by the mask page or the .msk file, True = data; None without either."""
        if self.mask_page is not None:
            return self.mask_page.read(window, [1])[..., 0] != 0
        return mask_beside(self.path, self.shape[:2], window)

    def spans(self, window: Window) -> tuple[list[tuple[int, int]], tuple[int, int] | None]:
        """How to read a window in parts: [(left, width)] with data, and an empty pixel or None.

        The parts end between tiles, so that none is unpacked twice. What they leave out is sparse:
        all its pixels are as that one (row, column).
        """
        top, left, height, width = window
        rows, columns = self.block
        sparse = ~self.page.present(range(top // rows, -(-(top + height) // rows)))
        if self.mask_page is not None or mask_file(self.path) is not None:
            sparse[:] = False  # a mask may tell sparse pixels apart
        parts, empty = [], None
        for start in range(left // columns * columns, left + width, columns):
            first, end = max(start, left), min(start + columns, left + width)
            if sparse[start // columns]:
                empty = top, first
            elif parts and sum(parts[-1]) == first and end - parts[-1][0] <= WIDE:
                parts[-1] = parts[-1][0], end - parts[-1][0]
            else:
                parts.append((first, end - first))
        return parts, empty

    def check_whole(self) -> None:
        """BadInput where a strip or tile lies behind the end of the file: it was cut short."""
        size = os.stat(self.path).st_size
        for page in (self.page, self.mask_page):
            if page is None:
                continue
            present = page.offsets > 0
            counts = page.counts.astype(np.uint64)
            if page.compression == NONE:
                # Counts of what is not packed are often wrong. The last strip ends with the image.
                rows = np.full(len(counts), page.block[0])
                if not page.tiled:
                    rows[page.grid[0] - 1::page.grid[0]] -= -page.height % page.block[0]
                counts = (rows * page.row_bytes).astype(np.uint64)
            ends = page.offsets.astype(np.uint64) + counts
            behind = np.flatnonzero(present & (ends > size))
            if behind.size:
                raise BadInput(f"{self.path}: truncated TIFF: {behind.size} of {len(ends)} "
                               f"{page.block_name}s lie behind its end at byte {size}; copy the "
                               "file again or take it out")

    def inside(self, window: Window | None) -> Window:
        """The window, if it lies in the image; the whole image for None."""
        height, width = self.shape[:2]
        top, left, rows, columns = map(int, window or (0, 0, height, width))
        if min(top, left, rows, columns) < 0 or top + rows > height or left + columns > width:
            raise BadInput(f"{self.path}: {height} x {width} pixels, and the window (top, left, "
                           f"height, width) {(top, left, rows, columns)} does not lie inside")
        return top, left, rows, columns

    def existing(self, bands: list[int] | None = None) -> list[int]:
        """The bands, if the file has them; all for None."""
        n = self.shape[2]
        if bands is None:
            return [*range(1, n + 1)]
        if not set(bands) <= {*range(1, n + 1)}:
            raise BadInput(f"{self.path}: {n} bands, and the bands {[*bands]} are asked for; "
                           f"expected numbers from 1 to {n}")
        return [*bands]

    @property
    def placed(self) -> bool:
        """Does the file say where the image lies, if only by ground control points?"""
        return bool(self.position.keys) or self.georef is not None

    @property
    def georef(self) -> "Georef | None":
        """Where the image lies, by its tags; by a world file beside it where they do not say."""
        transform = self.position.transform or read_world_file(self.path)
        return self.position._replace(transform=transform) if transform else None


def read_palette(directory: Directory, page: Page) -> np.ndarray | None:
    """(n, 3) uint8 colours of the values of a palette image."""
    colours = directory.values(Tag.ColorMap).astype(np.int64)
    if page.photometric != PALETTE or not colours.size:
        return None
    if colours.size % 3:
        raise directory.file.damaged(f"a palette of {colours.size} numbers")
    # The standard says 16 bits; some programs wrote 8.
    scale = 257 if colours.max() > 255 else 1
    return (colours.reshape(3, -1).T // scale).astype(np.uint8)


def alpha_band(directory: Directory, page: Page) -> int | None:
    """The number, from 1, of the first band that ExtraSamples calls alpha."""
    extra = directory.values(Tag.ExtraSamples).tolist()
    for band, meaning in enumerate(extra, page.bands - len(extra) + 1):
        if meaning in ALPHA and band > 0:
            return band
    return None


def read_nodata(directory: Directory, bands: int) -> int | float | tuple | None:
    """What GDAL takes for no data: one value, one for each band, or None.

    By the metadata NODATA_VALUES, in which all bands of a pixel must agree; without them by the
    file NAME.aux.xml, where GIS programs put what they do not write into an image; else by the tag.
    """
    path, metadata = directory.file.path, directory.text(Tag.GDALMetadata)
    tag = None
    text = directory.text(Tag.GDALNoData)
    if text:
        tag = as_value(text)
        if tag is None:
            raise BadInput(f"{path}: the nodata tag is {text[:40]!r}, expected a number; set it: "
                           f"gdal_edit.py -a_nodata NUMBER {shlex.quote(str(path))}")
    listed = ""
    if NODATA_VALUES in metadata:
        items = {i.get("name"): i.text for i in parse_xml(metadata, path).iter("Item")}
        listed = items.get(NODATA_VALUES) or ""
    return nodata_beside(path, bands, listed, tag)


def nodata_beside(path: str | Path, bands: int, metadata: str = "",
                  tag: int | float | None = None) -> int | float | tuple | None:
    """As read_nodata(), of an image of any format; metadata and tag: what the image itself says."""
    of_band = dict.fromkeys(range(1, bands + 1), tag)
    beside = Path(f"{path}.aux.xml")
    if beside.is_file():
        root = parse_xml(read_text(beside, "replace"), beside)
        more = {i.get("key"): i.text for i in root.iterfind("Metadata/MDI")}
        metadata = more.get(NODATA_VALUES) or metadata
        for band in root.iterfind("PAMRasterBand"):
            text, number = band.findtext("NoDataValue"), band.get("band", "")
            if text is not None and number.isdecimal() and len(number) < 10:
                of_band[int(number)] = as_value(text)
    values = [as_value(word) for word in metadata.split()]
    if len(values) != bands or None in values:  # GDAL leaves out such lists, too
        values = [of_band[b] for b in range(1, bands + 1)]
    same = len({str(value) for value in values}) == 1  # NaN is not equal to itself
    return values[0] if same else tuple(values)


def parse_xml(text: str, path: str | Path) -> ElementTree.Element:
    """What GDAL wrote into an image or beside it."""
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as e:
        raise BadInput(f"{path}: its XML metadata are damaged ({e}); write them anew, or take them "
                       "away") from None


def as_value(text: str) -> int | float | None:
    """A number written as text; None if it is none."""
    with contextlib.suppress(ValueError):
        value = float(text)
        # The numbers of 64 bits are more than a float can tell apart.
        whole = text.strip().lstrip("+-").isdecimal() and abs(value) <= 2**64
        return int(text) if whole else value
    return None


def of_bands(nodata: int | float | tuple | None, bands: list[int] | None = None
             ) -> int | float | tuple | None:
    """The nodata of some bands, of all for None; None if one of them has none."""
    if not isinstance(nodata, tuple):
        return nodata
    values = nodata if bands is None else tuple(nodata[b - 1] for b in bands)
    return None if None in values else values


def is_nodata(values: np.ndarray, nodata: int | float | tuple) -> np.ndarray:
    """Which values (..., bands) are nodata; floats with GDAL's tolerance, since the tag is decimal text."""
    if isinstance(nodata, tuple):
        return np.stack([is_nodata(values[..., i], v) for i, v in enumerate(nodata)], -1)
    if values.dtype.kind != "f":
        return values == nodata
    if nodata != nodata:
        return np.isnan(values)
    with np.errstate(over="ignore", invalid="ignore"):
        nodata = values.dtype.type(nodata)
        near = 2 * np.finfo(values.dtype).eps * np.abs(values + nodata)
        return (values == nodata) | (np.abs(values - nodata) < near)


def nearest(value: int | float, dtype: np.dtype) -> int | float:
    """The number of a type that is nearest to a value; 0 for NaN where the type has none."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return dtype.type(value)
    info = np.iinfo(dtype)
    return 0 if value != value else round(min(max(value, info.min), info.max))


def mask_file(path: str | Path) -> Tiff | None:
    """The mask that GDAL keeps beside an image of any format: a.png.msk is a TIFF."""
    beside = Path(f"{path}.msk")
    return Tiff(beside) if beside.is_file() else None


def mask_beside(path: str | Path, size: tuple[int, int], window: Window | None
                ) -> np.ndarray | None:
    """(h, w) bool by the .msk file of an image of that size (H, W), True = data; None without one."""
    beside = mask_file(path)
    if beside is None:
        return None
    if beside.shape[:2] != size:
        raise BadInput(f"{beside.path}: {beside.shape[0]} x {beside.shape[1]} pixels, but its "
                       f"image has {size[0]} x {size[1]}; take the mask away")
    return (beside.read(window) != 0).any(-1)


def data_pixels(pixels: np.ndarray, seen: np.ndarray | None,
                nodata: int | float | tuple | None) -> np.ndarray | None:
    """Which pixels (h, w, n) are data, (h, w) bool, or None where all are.

    By a mask `seen` (h, w); without one, a pixel is nodata if all its bands are. NaN and infinity
    are no data in any case.
    """
    valid = seen
    if seen is None and nodata is not None:
        # Band by band: NumPy's all() along a short axis takes three times as long as the reading.
        void = True
        for band in np.moveaxis(is_nodata(pixels, nodata), -1, 0):
            void &= band
        valid = ~void
    if pixels.dtype.kind == "f":
        valid = both(valid, np.isfinite(pixels).all(-1))
    return valid


def both(valid: np.ndarray | None, more: np.ndarray) -> np.ndarray:
    """Where two rules hold; None is a rule that always does."""
    return more if valid is None else valid & more


# ---- georeference

class Georef(NamedTuple):
    """Where an image lies.

    transform: a..f of x = a * column + b * row + c, y = d * column + e * row + f, as in rasterio;
    of the corners of pixels, also where the file gives centres. epsg: code of the coordinate system
    or None. keys: {tag: values} of the GeoKeys and of the tags that place them, as the file holds
    them.
    """
    transform: tuple[float, ...] | None
    epsg: int | None
    keys: dict[Tag, tuple | str]

    def codes(self) -> dict[int, int]:
        """{GeoKey: its number}, of those that are numbers."""
        # Four numbers as a head, then four for each key: key, tag of its value or 0, count, value.
        numbers = self.keys.get(Tag.GeoKeyDirectory, ())
        found = {}
        for i in range(4, len(numbers) - 3, 4):
            key, tag, _, value = numbers[i:i + 4]
            if tag == 0:
                found[key] = value
        return found

    def pixel_area(self) -> tuple[float | None, str]:
        """m2 of a pixel, or None and why it is not known."""
        codes = self.codes()
        text = str(self.keys.get(Tag.GeoAsciiParams, "")).lower()
        if not self.transform:
            return None, "no pixel size in the file"
        if codes.get(MODEL_TYPE) == DEGREES or GEOGRAPHIC in codes and PROJECTED not in codes:
            return None, "coordinates in degrees; reproject to metres, such as UTM"
        if self.epsg in MERCATOR or "pseudo-mercator" in text or "popular visualisation" in text:
            return None, "Web Mercator stretches areas; reproject, such as to UTM"
        unit = codes.get(UNIT, METRE if self.epsg in UTM else None)
        if unit not in METRES:
            return None, "the unit of the coordinates is not said"
        a, b, _, d, e, _ = self.transform
        return abs(a * e - b * d) * METRES[unit] ** 2, ""

    def tags(self) -> dict[Tag, np.ndarray]:
        """What a GeoTIFF of the same place holds: the file's own tags, or made of the transform."""
        own = {}
        for tag, values in self.keys.items():
            if tag == Tag.GeoAsciiParams:
                own[tag] = ascii_field(values)
            else:
                own[tag] = np.array(values, np.uint16 if tag == Tag.GeoKeyDirectory else float)
        if self.transform and not any(tag in own for tag in MODEL_TAGS):
            a, b, c, d, e, f = self.transform
            if self.codes().get(RASTER_TYPE) == CENTRES:
                c += (a + b) / 2
                f += (d + e) / 2
            if b == d == 0 and a > 0 > e:
                own[Tag.ModelPixelScale] = np.array([a, -e, 0])
                own[Tag.ModelTiepoint] = np.array([0, 0, 0, c, f, 0])
            else:
                matrix = [a, b, 0, c, d, e, 0, f, 0, 0, 0, 0, 0, 0, 0, 1]
                own[Tag.ModelTransformation] = np.array(matrix, float)
        return own


def read_georef(directory: Directory) -> Georef:
    """What the tags say; the transform is None where they do not."""
    keys = {}
    for tag in (*MODEL_TAGS, *KEY_TAGS[:2]):
        if tag in directory:
            keys[tag] = tuple(directory.values(tag, "uf").tolist())
    if Tag.GeoAsciiParams in directory:
        keys[Tag.GeoAsciiParams] = directory.text(Tag.GeoAsciiParams)
    place = Georef(None, None, keys)
    codes = place.codes()
    epsg = codes.get(PROJECTED) or codes.get(GEOGRAPHIC)
    if epsg == USER_DEFINED:
        epsg = None

    scale = directory.values(Tag.ModelPixelScale, "f").tolist()
    tie = directory.values(Tag.ModelTiepoint, "f").tolist()
    matrix = directory.values(Tag.ModelTransformation, "f").tolist()
    transform = None
    if len(scale) > 1 and len(tie) > 5 and all(scale[:2]):
        # The point (tie[0], tie[1]) of the image lies at (tie[3], tie[4]). GDAL takes rows to go
        # south whatever the sign of the scale.
        a, e = scale[0], -abs(scale[1])
        transform = a, 0.0, tie[3] - tie[0] * a, 0.0, e, tie[4] - tie[1] * e
    elif len(matrix) == 16:
        transform = matrix[0], matrix[1], matrix[3], matrix[4], matrix[5], matrix[7]
    if transform and codes.get(RASTER_TYPE) == CENTRES:
        transform = from_centre(*transform)
    return place._replace(transform=transform, epsg=epsg)


def from_centre(a: float, b: float, c: float, d: float, e: float, f: float) -> tuple[float, ...]:
    """A transform whose c and f are the first pixel's centre -> the same by its corner."""
    return a, b, c - (a + b) / 2, d, e, f - (d + e) / 2


def read_world_file(path: str | Path) -> tuple[float, ...] | None:
    """The transform, as in Georef, of the world file beside an image of any format, or None.

    In small or capital letters: world_files().
    """
    for beside in world_files(path):
        if beside.is_file():
            return parse_world_file(beside)
    return None


def world_files(path: str | Path) -> list[Path]:
    """Names that a world file of an image may have: of a.tif a.tfw, a.tifw and a.wld."""
    path = Path(path)
    suffix = path.suffix[1:] or "x"
    names = []
    for name in (suffix[0] + suffix[-1] + "w", suffix + "w", "wld"):
        names += [path.with_suffix(f".{name.lower()}"), path.with_suffix(f".{name.upper()}")]
    return names


def parse_world_file(path: Path) -> tuple[float, ...]:
    """Six lines with a number each: a, d, b, e, and the centre of the first pixel."""
    words = read_text(path, "replace").replace(",", ".").split()
    try:
        a, d, b, e, c, f = map(float, words[:6])
    except ValueError:
        raise BadInput(f"{path}: a world file with {' '.join(words)[:60]!r}, expected six numbers, "
                       "one a line; repair it or take it away") from None
    return from_centre(a, b, c, d, e, f)


# ---- writing

class Level(NamedTuple):
    """One resolution of a file that is written, and where its tiles stand among all."""
    height: int
    width: int
    grid: tuple[int, int]  # rows and columns of tiles
    bands: int
    first: int  # number of its first tile among all

    def number(self, band: int, row: int, column: int) -> int:
        """Of a tile: band by band, as the file lists them."""
        return self.first + (band * self.grid[0] + row) * self.grid[1] + column

    def numbers(self) -> range:
        """Of all its tiles."""
        return range(self.first, self.first + self.bands * self.grid[0] * self.grid[1])

    def quarters(self, row: int, column: int) -> list[tuple[int, int]]:
        """Up to four tiles (row, column) that a tile of the next level shows."""
        found = []
        for y in range(2 * row, min(2 * row + 2, self.grid[0])):
            found += [(y, x) for x in range(2 * column, min(2 * column + 2, self.grid[1]))]
        return found


class TiffWriter:
    """A cloud-optimised GeoTIFF of any size, written from top to bottom in little memory.

        out = TiffWriter("ids.tif", (H, W, 1), palette=colors, nodata=255)
        out.start(0, W)                     the columns that the next rows of pixels are of
        out.append(pixels)                  (h, w, bands), as many rows as there are
        out.finish()                        now ids.tif is there, with overviews

    Tiles are kept in ids.tif.part. `resume`: a text; the tiles of a .part that was begun with the
    same one count, and done() says how many rows they are. finish() takes the .part away.
    """

    def __init__(self, path: str | Path, shape: tuple[int, int, int],
                 palette: np.ndarray | None = None, nodata: int | None = None,
                 info: dict[str, str] | None = None, bands: list[str] = (),
                 georef: Georef | None = None, dtype: type = np.uint8, resume: str = ""):
        self.path = Path(path)
        self.part = Path(f"{path}.part")
        self.height, self.width, self.bands = shape
        self.dtype = np.dtype(dtype)
        self.levels = levels_of(self.height, self.width, self.bands)
        self.fields = page_fields(self.bands, self.dtype, palette, nodata, bands)
        self.first_fields = georef.tags() if georef else {}
        if info or bands:
            self.first_fields[Tag.GDALMetadata] = ascii_field(metadata_xml(info or {}, bands))
        self.uniform = {}  # {value: a tile of nothing else, packed}
        self.tiles = {}  # {number: (where in the .part, bytes)}
        self.end = 0  # of the .part
        self.unwritten = bytearray()  # its last bytes
        self.waiting = []  # rows of pixels that do not fill a tile yet
        self.begun_again = False  # was a .part dropped that was begun with another head?
        key = json.dumps([resume, *map(int, shape), self.dtype.str])
        self.open_part(PART_HEAD + key.encode() + b"\n", bool(resume))

    # The .part: a line that says whose tiles they are; then number, size and bytes of each.

    def open_part(self, head: bytes, resume: bool) -> None:
        """Goes on with a .part of the same head if that is wanted, else begins a new one."""
        if self.part.exists():
            with open(self.part, "rb") as file:
                found = file.readline(len(head))
                if not is_part(found):
                    raise BadInput(f"{self.part}: would be overwritten, and is no part of a TIFF "
                                   "that is being written; move it away")
                self.begun_again = found != head
                if resume and found == head:
                    self.end = self.find_tiles(file)
            os.truncate(self.part, self.end)
        if not self.end:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            self.add_bytes(head)
            self.flush()

    def find_tiles(self, file: BinaryIO) -> int:
        """Takes note of the tiles in a .part; where the last whole one ends."""
        size = os.fstat(file.fileno()).st_size
        end = file.tell()
        while end + TILE_HEAD.size <= size:
            file.seek(end)
            number, count = TILE_HEAD.unpack(file.read(TILE_HEAD.size))
            start = end + TILE_HEAD.size
            if start + count > size:
                break
            self.tiles[number] = start, count
            end = start + count
        return end

    def add_bytes(self, data: bytes) -> None:
        """To the end of the .part, as soon as flush() is called."""
        self.unwritten += data
        self.end += len(data)

    def flush(self) -> None:
        """Whole tiles into the .part: they outlive this process."""
        try:
            with open(self.part, "ab", buffering=0) as file:
                rest = memoryview(self.unwritten)
                while rest:
                    rest = rest[file.write(rest):]
        except OSError as e:
            raise NotWritten(f"{self.part}: cannot be written ({e.strerror}); make room on the "
                             "disk and type the same command again") from None
        self.unwritten = bytearray()

    def discard(self) -> None:
        """Takes the .part away."""
        remove_part(self.path)

    # Rows of pixels.

    def done(self, left: int, width: int) -> int:
        """How many rows of these columns the .part holds, counted from the top."""
        columns = range(left // TILE, -(-(left + width) // TILE))
        for row in range(self.levels[0].grid[0]):
            for plane in range(self.bands):
                if not all(self.levels[0].number(plane, row, c) in self.tiles for c in columns):
                    return row * TILE
        return self.height

    def start(self, left: int, width: int, top: int = 0) -> None:
        """append() goes on with these columns at row `top`; left and top are multiples of 512."""
        self.left, self.columns, self.top = left, width, top
        self.waiting = []

    def append(self, pixels: np.ndarray) -> None:
        """The next rows (h, w, bands), or (h, w) of one band."""
        self.waiting.append(pixels.reshape(*pixels.shape[:2], self.bands))
        rows = sum(map(len, self.waiting))
        last = self.top + rows == self.height
        if rows < TILE and not last:
            return
        pixels = np.concatenate(self.waiting)
        whole = rows if last else rows // TILE * TILE
        for i in range(0, whole, TILE):
            self.add_row(pixels[i:min(i + TILE, whole)])
        self.waiting = [pixels[whole:].copy()]

    def add_row(self, pixels: np.ndarray) -> None:
        """One row of tiles (up to 512, w, bands)."""
        for plane in range(self.bands):
            for x in range(0, self.columns, TILE):
                place = plane, self.top // TILE, (self.left + x) // TILE
                self.add(self.levels[0].number(*place), pixels[:, x:x + TILE, plane])
        self.top += len(pixels)
        self.flush()

    def add(self, number: int, pixels: np.ndarray) -> None:
        """One tile of one band; behind the edge of the image it is filled."""
        tile = np.full((TILE, TILE), FILL, self.dtype.newbyteorder("<"))
        tile[:pixels.shape[0], :pixels.shape[1]] = pixels
        data = self.pack(tile)
        self.add_bytes(TILE_HEAD.pack(number, len(data)))
        self.tiles[number] = self.end, len(data)
        self.add_bytes(data)

    def pack(self, tile: np.ndarray) -> bytes:
        """Deflate; tiles of one value, which large maps are full of, are packed once."""
        value = tile[0, 0]
        if not (tile == value).all():
            return zlib.compress(tile)
        if value not in self.uniform:
            self.uniform[value] = zlib.compress(tile)
        return self.uniform[value]

    # The file.

    def finish(self) -> None:
        """Makes the file of all tiles, whole or not at all."""
        replace(self.path, self.save)
        self.discard()

    def save(self, name: str) -> None:
        """The whole file: directories first, then the tiles of the smallest overview, ..."""
        with open(self.part, "rb") as part:
            for below, level in zip(self.levels, self.levels[1:]):
                self.add_overview(part, below, level)
            order = []
            for level in reversed(self.levels):
                order += level.numbers()
            sizes = [self.tiles[number][1] for number in order]
            # Directories do not depend on their values in size: at first without the places.
            nowhere = dict.fromkeys(order, 0)
            big = len(self.header(nowhere, True)) + sum(sizes) >= CLASSIC_LIMIT
            start = len(self.header(nowhere, big))
            places = start + np.cumsum([0, *sizes[:-1]])
            with open(name, "wb") as file:
                file.write(self.header(dict(zip(order, places.tolist())), big))
                for number in order:
                    file.write(self.packed(part, number))

    def packed(self, part: BinaryIO, number: int) -> bytes:
        """A tile as it lies in the file."""
        start, count = self.tiles[number]
        part.seek(start)
        return part.read(count)

    def add_overview(self, part: BinaryIO, below: Level, level: Level) -> None:
        """Every second pixel of every second row: a mean of classes would be another class."""
        half = TILE // 2
        for plane in range(self.bands):
            for row in range(level.grid[0]):
                for column in range(level.grid[1]):
                    pixels = np.full((TILE, TILE), FILL, self.dtype)
                    for y, x in below.quarters(row, column):
                        data = zlib.decompress(self.packed(part, below.number(plane, y, x)))
                        tile = np.frombuffer(data, self.dtype.newbyteorder("<"))
                        quarter = tile.reshape(TILE, TILE)[::2, ::2]
                        top, left = y % 2 * half, x % 2 * half
                        pixels[top:top + half, left:left + half] = quarter
                    self.add(level.number(plane, row, column), pixels)
                self.flush()

    def header(self, places: dict[int, int], big: bool) -> bytes:
        """All that lies before the tiles, which lie at these places."""
        data, offset = struct.pack("<2sHI", b"II", 42, 8), "u4"
        if big:
            offset = "u8"
            data = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16)
        for i, level in enumerate(self.levels):
            fields = self.fields | (self.first_fields if i == 0 else {})
            fields = fields | {
                Tag.NewSubfileType: np.uint32([OVERVIEW if i else 0]),
                Tag.ImageWidth: np.uint32([level.width]),
                Tag.ImageLength: np.uint32([level.height]),
                Tag.TileOffsets: np.array([places[n] for n in level.numbers()], offset),
                Tag.TileByteCounts: np.uint32([self.tiles[n][1] for n in level.numbers()])}
            data += directory_bytes(fields, len(data), big, level is self.levels[-1])
        return data


def write_tiff(path: str | Path, pixels: np.ndarray, palette: np.ndarray | None = None,
               nodata: int | None = None, info: dict[str, str] | None = None,
               bands: list[str] = (), georef: Georef | None = None) -> None:
    """(H, W) or (H, W, bands) uint8 or uint16 -> a cloud-optimised GeoTIFF, whole or not at all.

    palette: (n, 3) uint8 colours of the values of one band. info: {name: text} in GDAL's metadata.
    bands: their names. georef: that of the image which these pixels lie on.
    """
    height, width, *more = pixels.shape
    out = TiffWriter(path, (height, width, *(more or [1])), palette, nodata, info, bands, georef,
                     pixels.dtype)
    out.start(0, width)
    out.append(pixels)
    out.finish()


def is_part(start: bytes) -> bool:
    """Does a .part of a TiffWriter begin so? A killed one may have written less than its head."""
    return PART_HEAD.startswith(start[:len(PART_HEAD)])


def remove_part(path: str | Path) -> None:
    """Takes PATH.part away, if a TiffWriter has made it."""
    part = Path(f"{path}.part")
    if part.is_file():
        with open(part, "rb") as file:
            ours = is_part(file.read(len(PART_HEAD)))
        if ours:
            part.unlink()


def levels_of(height: int, width: int, bands: int) -> list[Level]:
    """The image and its overviews, halved until one tile holds them or a line is left."""
    levels = []
    first = 0
    while True:
        grid = -(-height // TILE), -(-width // TILE)
        levels.append(Level(height, width, grid, bands, first))
        first += bands * grid[0] * grid[1]
        if grid == (1, 1) or min(height, width) == 1:
            return levels
        height, width = -(-height // 2), -(-width // 2)


def page_fields(bands: int, dtype: np.dtype, palette: np.ndarray | None,
                nodata: int | None, names: list[str]) -> dict[Tag, np.ndarray]:
    """The tags that the image and its overviews have in common."""
    photometric = BLACK_IS_ZERO if palette is None else PALETTE
    colours = 1  # bands of colours; the others are extra
    if bands == 3 and dtype == np.uint8 and not names:
        photometric, colours = RGB, 3  # Programs would show the first band alone.
    fields = {
        Tag.BitsPerSample: np.uint16([8 * dtype.itemsize] * bands),
        Tag.Compression: np.uint16([DEFLATE]),
        Tag.PhotometricInterpretation: np.uint16([photometric]),
        Tag.SamplesPerPixel: np.uint16([bands]),
        Tag.PlanarConfiguration: np.uint16([PLANAR if bands > 1 else 1]),
        Tag.TileWidth: np.uint16([TILE]),
        Tag.TileLength: np.uint16([TILE]),
        Tag.SampleFormat: np.uint16([1] * bands)}
    if bands > colours:
        fields[Tag.ExtraSamples] = np.uint16([0] * (bands - colours))  # 0: no alpha
    if palette is not None:
        table = np.zeros((256, 3), np.uint16)
        table[:len(palette)] = palette
        fields[Tag.ColorMap] = 257 * table.T.ravel()
    if nodata is not None:
        fields[Tag.GDALNoData] = ascii_field(str(nodata))
    return fields


def metadata_xml(info: dict[str, str], bands: list[str]) -> str:
    """GDAL's metadata: what concerns the image, and the names of the bands."""
    # GDAL escapes texts twice, and undoes it twice.
    items = []
    for name, text in info.items():
        items.append(f"<Item name={quoteattr(name)}>{escape(escape(str(text)))}</Item>")
    for i, name in enumerate(bands):
        start = f'<Item name="DESCRIPTION" sample="{i}" role="description">'
        items.append(f"{start}{escape(escape(name))}</Item>")
    return "<GDALMetadata>" + "".join(items) + "</GDALMetadata>"


def ascii_field(text: str) -> np.ndarray:
    """Text as a value of a tag, which ends with a zero."""
    return np.frombuffer(as_bytes(text) + b"\0", "S1")
