"""data/tiff.py; oracles: rasterio (GDAL) for pixels, masks and positions, tifffile for what GDAL cannot write."""
import io
import itertools
import pickle
import re
import resource
import shlex
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import tifffile
from PIL import Image
from rio_cogeo.cogeo import cog_validate

from data import tiff as module
from data.common import BadInput
from data.io import read_valid
from data.raster import open_raster
from data.tiff import Tag, Tiff, TiffWriter, mask_file, read_world_file, write_tiff

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
H, W = 37, 53  # no multiples of a tile
RNG = np.random.default_rng(0)


def numbers(dtype, bands, high=None, shape=(H, W)):
    """(bands, H, W) over the whole range of a type, or 0..high."""
    if np.dtype(dtype).kind == "f":
        return RNG.normal(size=(bands, *shape)).astype(dtype)
    info = np.iinfo(dtype)
    low, high = (info.min, info.max) if high is None else (0, high)
    return RNG.integers(low, high, (bands, *shape), dtype, endpoint=True)


def smooth(bands, shape=(H, W)):  # what lossy codecs keep nearly
    waves = np.cumsum(np.cumsum(RNG.normal(size=(bands, *shape)), 1), 2)
    return np.clip(waves * 2 + 128, 0, 255).astype(np.uint8)


def gdal(path, a, mask=None, **options):
    """A file as GDAL writes it, from (bands, H, W)."""
    path.unlink(missing_ok=True)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(
            path, "w", driver="GTiff", count=len(a), height=a.shape[1], width=a.shape[2], dtype=a.dtype,
            **options) as f:
        f.write(a)
        if mask is not None:
            f.write_mask(mask)
    return path


def by_gdal(path):
    with rasterio.open(path) as f:
        return f.read().transpose(1, 2, 0)


def assert_reads(path, want, windows=3):
    """The whole image and random windows of random bands, bit for bit."""
    tiff = Tiff(path)
    got = tiff.read()
    assert got.dtype == want.dtype == tiff.dtype and got.shape == want.shape == tiff.shape
    np.testing.assert_array_equal(got, want)
    h, w, bands = want.shape
    for _ in range(windows):
        top, left = RNG.integers(h), RNG.integers(w)
        height, width = RNG.integers(1, h - top + 1), RNG.integers(1, w - left + 1)
        chosen = RNG.integers(1, bands + 1, RNG.integers(1, 4)).tolist()
        part = want[top:top + height, left:left + width][..., [b - 1 for b in chosen]]
        np.testing.assert_array_equal(tiff.read((top, left, height, width), chosen), part)


def refusal(call, *args):
    """The message of the BadInput that the call must raise: one line."""
    with pytest.raises(BadInput) as e:
        call(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- pixels

INTEGERS = "uint8 uint16 uint32 uint64 int8 int16 int32 int64".split()


def grid():
    """Every dtype, compression, tiling and predictor that go together; bands and byte order by lot."""
    for dtype, compress, tiled in itertools.product(
            INTEGERS + ["float32", "float64"], ("none", "deflate", "lzw", "zstd", "packbits", "lzma"), (True, False)):
        if compress == "lzma" and dtype not in ("uint8", "uint16", "float32"):
            continue  # slow to write
        if compress in ("none", "packbits"):
            predictors = [1]
        else:
            predictors = [1, 2, 3] if dtype.startswith("float") else [1, 2]
        for predictor in predictors:
            bands, interleave = int(RNG.choice([1, 3, 4, 7])), RNG.choice(["pixel", "band"])
            options = dict(compress=compress, interleave=interleave, endianness=RNG.choice(["LITTLE", "BIG"]),
                           bigtiff=RNG.choice(["YES", "NO"]))
            if predictor > 1:
                options["predictor"] = predictor
            if tiled and compress == "lzma":
                options |= dict(tiled=True, blockxsize=64, blockysize=48)
            elif tiled:
                options |= dict(tiled=True, blockxsize=32, blockysize=16)
            else:
                options["blockysize"] = int(RNG.choice([1, 7, H])) if compress != "lzma" else H
            yield dtype, bands, options


def test_the_grid_equals_gdal(tmp_path):
    done = 0
    for dtype, bands, options in grid():
        a = numbers(dtype, bands)
        path = gdal(tmp_path / "a.tif", a, **options)
        np.testing.assert_array_equal(by_gdal(path), a.transpose(1, 2, 0))
        assert_reads(path, a.transpose(1, 2, 0), windows=2)
        done += 1
    assert done == 186


@pytest.mark.parametrize("bits", [*range(1, 8), 9, 12, 15, 20, 31])
def test_odd_numbers_of_bits(tmp_path, bits):
    dtype = "uint8" if bits < 8 else "uint16" if bits < 16 else "uint32"
    for compress, tiled, interleave in itertools.product(("none", "lzw"), (True, False), ("pixel", "band")):
        size = dict(tiled=True, blockxsize=16, blockysize=16) if tiled else {}
        a = numbers(dtype, 2, 2 ** bits - 1)
        path = gdal(tmp_path / "a.tif", a, nbits=bits, compress=compress, interleave=interleave,
                    endianness=RNG.choice(["LITTLE", "BIG"]), **size)
        assert_reads(path, a.transpose(1, 2, 0), windows=2)


@pytest.mark.parametrize("interleave", ["pixel", "band"])
@pytest.mark.parametrize("tiled", [True, False])
def test_jpeg(tmp_path, interleave, tiled):
    size = dict(tiled=True, blockxsize=32, blockysize=16) if tiled else dict(blockysize=16)
    for bands, photometric in ((1, None), (2, None), (3, None), (3, "rgb"), (4, None), (4, "rgb"), (4, "cmyk")):
        options = dict(photometric=photometric) if photometric else {}
        path = gdal(tmp_path / "a.tif", smooth(bands), compress="jpeg", interleave=interleave, **size, **options)
        assert_reads(path, by_gdal(path))
        assert Tiff(path).compression == "JPEG"


@pytest.mark.parametrize("sampling", [(1, 1), (2, 1), (2, 2)])
def test_jpeg_with_fewer_colours_than_pixels(tmp_path, sampling):
    # tifffile's libjpeg-turbo is the oracle. rasterio's wheels are built with another libjpeg, which spreads the
    # colours over the pixels differently.
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, smooth(3).transpose(1, 2, 0), photometric="ycbcr", compression="jpeg",
                     subsampling=sampling, tile=(32, 32))
    want = tifffile.imread(path)
    assert_reads(path, want)
    near = np.abs(want.astype(int) - by_gdal(path)).mean()
    assert near < (1e-3 if sampling == (1, 1) else 4)
    gdal(path, smooth(3), photometric="ycbcr", compress="jpeg", blockysize=16)  # tables apart, the last strip shorter
    assert_reads(path, tifffile.imread(path))


@pytest.mark.parametrize("lossless", [True, False])
def test_webp(tmp_path, lossless):
    for bands, tiled in itertools.product((3, 4), (True, False)):
        size = dict(tiled=True, blockxsize=32, blockysize=16) if tiled else dict(blockysize=16)
        a = smooth(bands)
        a[3:] = RNG.choice([0, 255])  # an alpha of 255 is not stored
        path = gdal(tmp_path / "a.tif", a, compress="webp", webp_lossless=lossless, interleave="pixel", **size)
        assert_reads(path, by_gdal(path))


def test_colours_as_gdal_gives_them(tmp_path):
    path = tmp_path / "a.tif"
    for interleave in ("pixel", "band"):
        gdal(path, smooth(4), photometric="cmyk", interleave=interleave)
        assert_reads(path, by_gdal(path))  # red, green, blue, and 255
        assert (Tiff(path).photometric, Tiff(path).alpha) == ("CMYK", 4)
    deep = numbers("uint16", 4).transpose(1, 2, 0)
    tifffile.imwrite(path, deep, photometric="separated", planarconfig="contig")
    np.testing.assert_array_equal(by_gdal(path), deep)
    assert_reads(path, deep)  # these are left as they are
    for bits in (1, 2, 8):
        a = numbers("uint8", 1, 2 ** bits - 1)
        assert_reads(gdal(path, a, nbits=bits, photometric="miniswhite"), a.transpose(1, 2, 0))


def test_palettes(tmp_path):
    colors = {i: (i * 7 % 256, 255 - i, i // 2, 255) for i in range(256)}
    for bits in (1, 2, 4, 8):
        a = numbers("uint8", 1, 2 ** bits - 1)
        path = gdal(tmp_path / "a.tif", a, nbits=bits, photometric="palette")
        with rasterio.open(path, "r+") as f:
            f.write_colormap(1, {i: colors[i] for i in range(2 ** bits)})
        assert_reads(path, a.transpose(1, 2, 0))
        with rasterio.open(path) as f:
            want = [f.colormap(1)[i][:3] for i in range(2 ** bits)]
        np.testing.assert_array_equal(Tiff(path).palette, want)
    eight = np.array([colors[i][:3] for i in range(256)]).T.astype(np.uint16)  # as some programs write them
    tifffile.imwrite(path, a[0], photometric="palette", colormap=eight)
    np.testing.assert_array_equal(Tiff(path).palette, eight.T)
    assert Tiff(gdal(path, a)).palette is None


def test_what_tifffile_writes(tmp_path):
    path = tmp_path / "a.tif"
    for compression, order in itertools.product(("zlib", "adobe_deflate", "packbits", "zstd", "lzw", None), "<>"):
        for a in (numbers("uint16", 5), numbers("float64", 5)):
            tifffile.imwrite(path, a.transpose(1, 2, 0), compression=compression, tile=(16, 16), photometric="rgb",
                             extrasamples=[0, 2], bigtiff=True, byteorder=order, planarconfig="contig")
            assert_reads(path, a.transpose(1, 2, 0))


def test_half_floats(tmp_path):
    path, half = tmp_path / "a.tif", numbers("float16", 3).astype(np.float32)
    for predictor, order, interleave in itertools.product((1, 2, 3), ("LITTLE", "BIG"), ("pixel", "band")):
        gdal(path, half, nbits=16, compress="deflate", predictor=predictor, endianness=order, interleave=interleave)
        assert_reads(path, half.transpose(1, 2, 0))
        assert tifffile.TiffFile(path).pages[0].bitspersample == 16


def tag_at(path, tag):
    """Where the entry of a tag of the first page lies."""
    with tifffile.TiffFile(path) as f:
        return f.pages[0].tags[tag].offset


def patch(path, at, form, *values):
    data = bytearray(path.read_bytes())
    struct.pack_into("<" + form, data, at, *values)
    path.write_bytes(data)


def test_absent_and_odd_tags(tmp_path):
    path, a = tmp_path / "a.tif", numbers("uint16", 3).transpose(1, 2, 0)
    for compression in (None, "lzw", "deflate"):
        cases = [(Tag.RowsPerStrip, 2**32 - 1), (Tag.RowsPerStrip, None), (Tag.StripByteCounts, None)]
        if compression is None:
            cases.append((Tag.StripByteCounts, 0))
        for tag, odd in cases:
            rows = 5 if (tag, odd) == (Tag.StripByteCounts, None) else H
            tifffile.imwrite(path, a, compression=compression, photometric="minisblack", planarconfig="contig",
                             rowsperstrip=rows, metadata=None)
            at = tag_at(path, tag)
            if odd is None:
                patch(path, at, "H", 65000)  # a number that means nothing
            else:
                patch(path, at + 2, "HII", 4, 1, odd)
            if rows == H:
                np.testing.assert_array_equal(by_gdal(path), a)
            assert_reads(path, a)
    # tiles whose offsets are listed under the strips' tags
    tifffile.imwrite(path, a, tile=(16, 16), photometric="minisblack", planarconfig="contig", metadata=None)
    patch(path, tag_at(path, Tag.TileByteCounts), "H", Tag.StripByteCounts)
    patch(path, tag_at(path, Tag.TileOffsets), "H", Tag.StripOffsets)
    assert_reads(path, a)


@pytest.mark.parametrize("compression", [None, "deflate", "lzw"])
def test_bits_in_reverse_order(tmp_path, compression):
    path = tmp_path / "a.tif"
    for a in (numbers("uint8", 1)[0], numbers("uint16", 1)[0], numbers("uint8", 1, 1)[0].astype(bool)):
        tifffile.imwrite(path, a, compression=compression, rowsperstrip=H, metadata=None, photometric="minisblack")
        with tifffile.TiffFile(path) as f:
            start, count = f.pages[0].dataoffsets[0], f.pages[0].databytecounts[0]
        data = bytearray(path.read_bytes())
        for i in range(start, start + count):
            data[i] = int(f"{data[i]:08b}"[::-1], 2)
        path.write_bytes(data)
        patch(path, tag_at(path, 305), "HHII", Tag.FillOrder, 3, 1, 2)  # in place of the name of the software
        np.testing.assert_array_equal(by_gdal(path)[..., 0], a)
        assert_reads(path, a[..., None].astype(np.uint8 if a.dtype == bool else a.dtype))


@pytest.mark.parametrize("dtype, nodata", [("uint8", 7), ("uint8", None), ("int16", -9999), ("float32", np.nan),
                                           ("float64", -9999), ("uint16", 65535), ("int8", -1)])
def test_sparse_files(tmp_path, dtype, nodata):
    path = tmp_path / "a.tif"
    for compress in ("none", "deflate"):
        with rasterio.open(path, "w", driver="GTiff", count=2, height=H, width=W, dtype=dtype, nodata=nodata,
                           tiled=True, blockxsize=16, blockysize=16, sparse_ok=True, compress=compress) as f:
            f.write(numbers(dtype, 2, 99, (16, 16)), window=rasterio.windows.Window(16, 16, 16, 16))
        want = by_gdal(path)
        assert len(np.unique(want[:16])) == 1
        assert_reads(path, want)


def test_one_strip_is_read_in_parts(tmp_path):
    """What is not compressed is read by rows: a window of a huge strip takes no more memory than itself."""
    path, h, w = tmp_path / "a.tif", 60_000, 50_000
    tifffile.imwrite(path, shape=(8, w), dtype="uint8", rowsperstrip=8, metadata=None, photometric="minisblack")
    for tag, value in ((Tag.ImageLength, h), (Tag.RowsPerStrip, h), (Tag.StripByteCounts, h * w)):
        patch(path, tag_at(path, tag) + 2, "HII", 4, 1, value)
    with tifffile.TiffFile(path) as f:
        start = f.pages[0].dataoffsets[0]
    with open(path, "r+b") as f:
        f.truncate(start + h * w)  # 3 GB, of which the disk holds none but this
        f.seek(start + (h - 1) * w)
        f.write(bytes(range(100)))
    tiff = Tiff(path)
    assert tiff.shape == (h, w, 1) and tiff.block == (h, w)
    np.testing.assert_array_equal(tiff.read((h - 1, 0, 1, 100))[0, :, 0], np.arange(100))


def test_strips_beyond_pillows_limit(tmp_path):
    """179 million pixels, of which the wrapped strip has one a byte."""
    side = 13_400
    a = np.zeros((side, side), np.uint8)
    a[-1] = np.arange(side) % 251
    tifffile.imwrite(tmp_path / "a.tif", a, compression="zstd", rowsperstrip=side, photometric="minisblack")
    got = Tiff(tmp_path / "a.tif").read((side - 1, 0, 1, side))
    np.testing.assert_array_equal(got[0, :, 0], a[-1])


def test_windows_and_bands_that_are_not_there(tmp_path):
    path = gdal(tmp_path / "a.tif", numbers("uint8", 3))
    tiff = Tiff(path)
    for window in ((0, 0, H + 1, W), (-1, 0, 2, 2), (0, W - 1, 1, 2), (0, 0, -1, 5)):
        assert f"{path}: {H} x {W} pixels, and the window" in refusal(tiff.read, window)
    assert tiff.read((H, W, 0, 0)).shape == (0, 0, 3)
    for bands in ([4], [0], [1, -1]):
        assert f"{path}: 3 bands, and the bands {bands}" in refusal(tiff.read, None, bands)


def test_threads_and_other_processes_share_a_tiff(tmp_path):
    a = numbers("uint16", 3, shape=(200, 300))
    path = gdal(tmp_path / "a.tif", a, compress="lzw", tiled=True, blockxsize=64, blockysize=64)
    tiff = pickle.loads(pickle.dumps(Tiff(path)))
    corners = RNG.integers(0, 150, (200, 2)).tolist()
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda at: tiff.read((*at, 50, 50)), corners))
    for (top, left), part in zip(corners, parts):
        np.testing.assert_array_equal(part, a[:, top:top + 50, left:left + 50].transpose(1, 2, 0))


# ---- which pixels are data

def by_gdal_valid(path):
    """GDAL's dataset mask: that of all bands together, or valid in any band."""
    with rasterio.open(path) as f:
        if rasterio.enums.MaskFlags.per_dataset in f.mask_flag_enums[0]:
            return f.read_masks(1) > 0
        return np.bitwise_or.reduce(f.read_masks()) > 0


def assert_valid(path, want):
    tiff = Tiff(path)
    assert 0 < want.mean() < 1
    np.testing.assert_array_equal(tiff.valid(), want)
    np.testing.assert_array_equal(tiff.valid((5, 7, 20, 30)), want[5:25, 7:37])
    pixels, valid = tiff.read_valid((5, 7, 20, 30))
    np.testing.assert_array_equal(valid, want[5:25, 7:37])
    colours = [b for b in range(1, tiff.shape[2] + 1) if b != tiff.alpha]
    np.testing.assert_array_equal(pixels, by_gdal(path)[5:25, 7:37][..., [b - 1 for b in colours]])


HOLES = RNG.random((H, W)) < 0.3


@pytest.mark.parametrize("dtype, nodata", [("uint8", 0), ("int16", -9999), ("uint16", 65535), ("float32", -9999),
                                           ("float32", -3.4028234663852886e+38), ("float64", 0.1), ("float32", 0.1),
                                           ("int64", -2**53 + 1), ("float64", 2**64)])
def test_nodata(tmp_path, dtype, nodata):
    a = numbers(dtype, 3)
    a[:, HOLES] = nodata
    a[0, ::3] = nodata  # one band alone is no hole
    path = gdal(tmp_path / "a.tif", a, nodata=nodata)
    assert Tiff(path).nodata == nodata
    assert_valid(path, by_gdal_valid(path))
    assert not Tiff(path).valid(bands=[1, 1])[::3].any()  # but it is where that band alone is asked for
    np.testing.assert_array_equal(Tiff(path).valid(bands=[2]), (a[1] != np.array(nodata, dtype)))


@pytest.mark.parametrize("text, nodata, holes", [
    ("7", 7, True), (" 7.0 ", 7, True), ("-9999", -9999, False), ("300", 300, False), ("0.5", 0.5, False),
    ("nan", np.nan, False), ("1e400", np.inf, False), ("9" * 5000, np.inf, False)])
def test_nodata_of_other_programs(tmp_path, text, nodata, holes):
    a = numbers("uint8", 1, 200)[0]
    a[HOLES] = 7
    tifffile.imwrite(tmp_path / "a.tif", a, extratags=[(int(Tag.GDALNoData), 2, None, text, True)], metadata=None)
    np.testing.assert_equal(Tiff(tmp_path / "a.tif").nodata, nodata)
    np.testing.assert_array_equal(Tiff(tmp_path / "a.tif").valid(), a != (7 if holes else 250))


BESIDE = '<PAMDataset><Metadata><MDI key="NODATA_VALUES">{}</MDI></Metadata>{}</PAMDataset>'
OF_BAND = '<PAMRasterBand band="{}"><NoDataValue le_hex_equiv="0">{}</NoDataValue></PAMRasterBand>'


@pytest.mark.parametrize("tag, metadata, beside, metadata_beside", [
    (None, None, {1: 7, 2: 7, 3: 7}, None), (9, None, {1: 7, 2: 7, 3: 7}, None), (None, None, {1: 7}, None),
    (9, None, {1: 7}, None), (None, None, {1: 7, 2: 8, 3: 9}, None), (None, "7 8 9", None, None),
    (9, "7 7 7", None, None),
    (9, "7 7", None, None), (7, None, {}, "9 9 9"), (None, "7 7 7", {}, "9 9 9"), (9, "7.0 7 7", {1: 9}, None)])
def test_nodata_beside_an_image_and_in_its_metadata(tmp_path, tag, metadata, beside, metadata_beside):
    """GDAL is the oracle: its mask of TIFFs, and of a PNG where the value lies in the file beside it."""
    a = numbers("uint8", 3, 6)
    for i, hole in enumerate(([7, 7, 7], [9, 9, 9], [7, 8, 9], [7, 9, 9], [7, 9, 8])):
        a[:, i::7, i] = np.array(hole)[:, None]
    path = gdal(tmp_path / "a.tif", a, nodata=tag)
    if metadata:
        with rasterio.open(path, "r+") as file:
            file.update_tags(NODATA_VALUES=metadata)
    Image.fromarray(a.transpose(1, 2, 0)).save(tmp_path / "b.png")
    for image in (path, tmp_path / "b.png"):
        if beside is not None:
            of_bands = "".join(OF_BAND.format(*item) for item in beside.items())
            Path(f"{image}.aux.xml").write_text(BESIDE.format(metadata_beside or "", of_bands))
        with rasterio.open(image) as file:
            want = file.dataset_mask() > 0
        valid = read_valid(image)[1]
        np.testing.assert_array_equal(np.ones((H, W), bool) if valid is None else valid, want)
    if (by_gdal_valid(path) == 0).any():
        assert_valid(path, by_gdal_valid(path))


def test_metadata_that_are_no_xml_are_named(tmp_path):
    path = gdal(tmp_path / "a.tif", numbers("uint8", 1))
    Path(f"{path}.aux.xml").write_text("<PAMDataset>")
    assert f"{path}.aux.xml: its XML metadata are damaged" in refusal(Tiff, path)


def test_nodata_that_is_no_number(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, numbers("uint8", 1)[0], extratags=[(int(Tag.GDALNoData), 2, None, "none", True)])
    said = refusal(Tiff, path)
    assert f"{path}: the nodata tag is 'none', expected a number" in said and "gdal_edit.py -a_nodata" in said


def test_nan_and_infinity_are_no_data(tmp_path):
    a = numbers("float32", 3)
    assert Tiff(gdal(tmp_path / "a.tif", a)).valid().all()
    a[1, 2, 3], a[0, 4, 5], a[:, 6, 7] = np.nan, np.inf, np.nan
    for nodata in (None, np.nan):
        tiff = Tiff(gdal(tmp_path / "a.tif", a, nodata=nodata))
        assert np.argwhere(~tiff.valid()).tolist() == [[2, 3], [4, 5], [6, 7]]
        assert np.argwhere(~tiff.valid(bands=[2, 3])).tolist() == [[2, 3], [6, 7]]


@pytest.mark.parametrize("interleave", ["pixel", "band"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_alpha(tmp_path, dtype, interleave):
    for bands, photometric in ((2, "minisblack"), (4, "rgb")):
        a = numbers(dtype, bands)
        a[-1] = np.where(HOLES, 0, RNG.integers(300 if dtype == "uint16" else 1, 255, endpoint=True, size=(H, W))
                         if dtype == "uint8" else 65535)
        path = gdal(tmp_path / "a.tif", a, photometric=photometric, alpha="yes", interleave=interleave)
        assert Tiff(path).alpha == bands
        assert_valid(path, by_gdal_valid(path))
        # infrared that was saved as alpha
        assert Tiff(path).valid(bands=[bands, 1]) is None
        np.testing.assert_array_equal(Tiff(path).read_valid(bands=[bands, 1])[0], a[[-1, 0]].transpose(1, 2, 0))
    for alpha, want in (([0, 2], 5), ([2, 0], 4), ([0, 0], None), ([1, 2], 4)):
        tifffile.imwrite(path, numbers("uint8", 5).transpose(1, 2, 0), photometric="rgb", extrasamples=alpha,
                         planarconfig="contig")
        with rasterio.open(path) as f:
            assert ("alpha" in [c.name for c in f.colorinterp]) == bool(want)
        assert Tiff(path).alpha == want


def test_mask_page_and_overviews(tmp_path):
    mask = np.where(HOLES, 0, 255).astype(np.uint8)
    a = numbers("uint8", 3)
    for bits, options in itertools.product(("YES", "NO"), ({}, dict(nodata=5), dict(compress="deflate", tiled=True))):
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK_TO_8BIT=bits):
            path = gdal(tmp_path / "a.tif", a, mask, **options)
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as f:
            f.build_overviews([2, 4])
        assert_valid(path, by_gdal_valid(path))
        np.testing.assert_array_equal(Tiff(path).valid(), ~HOLES)
        assert Tiff(path).overviews == [(19, 27), (10, 14)] and Tiff(path).pages == 1
    assert_reads(path, a.transpose(1, 2, 0))


def test_mask_file(tmp_path):
    mask = np.where(HOLES, 0, 255).astype(np.uint8)
    path = gdal(tmp_path / "a.tif", numbers("uint8", 3))
    assert Tiff(path).valid() is None and Tiff(path).read_valid()[1] is None
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as f:
        f.write_mask(mask)
    assert (tmp_path / "a.tif.msk").exists()
    assert_valid(path, by_gdal_valid(path))
    Image.fromarray(mask).save(tmp_path / "b.png")
    (tmp_path / "b.png.msk").write_bytes((tmp_path / "a.tif.msk").read_bytes())
    np.testing.assert_array_equal(mask_file(tmp_path / "b.png").read()[..., 0], mask)
    gdal(tmp_path / "a.tif", numbers("uint8", 3, shape=(9, 9)))
    assert f"{path}.msk: {H} x {W} pixels, but its image has 9 x 9" in refusal(Tiff(path).valid)


def test_nodata_and_alpha_count_both(tmp_path):
    a = numbers("uint8", 4) | 1
    a[:3, :9], a[3, 9:] = 0, 255
    a[3, 20:30] = 0
    tiff = Tiff(gdal(tmp_path / "a.tif", a, photometric="rgb", alpha="yes", nodata=0))
    assert np.flatnonzero(~tiff.valid().any(1)).tolist() == [*range(9), *range(20, 30)]
    assert tiff.valid()[9:20].all() and tiff.valid()[30:].all()


def test_pages(tmp_path):
    path, a = tmp_path / "a.tif", numbers("uint8", 3)
    tifffile.imwrite(path, a, photometric="minisblack")
    assert Tiff(path).pages == 3 and Tiff(path).shape == (H, W, 1) and Tiff(path).damage is None
    # a small preview before the image
    with tifffile.TiffWriter(path) as f:
        f.write(a[0, ::4, ::4], subfiletype=1, photometric="minisblack")
        f.write(a[1], photometric="minisblack")
    assert Tiff(path).pages == 1 and Tiff(path).overviews == [(10, 14)]
    assert_reads(path, a[1][..., None])


# ---- where the image lies

def assert_placed(path):
    with rasterio.open(path) as f:
        want, crs = f.transform, f.crs
    georef = Tiff(path).georef
    np.testing.assert_allclose(georef.transform, want[:6], rtol=1e-12)
    assert georef.epsg == (crs.to_epsg() if crs else None)
    return georef


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326", "EPSG:3857", "EPSG:2056"])
def test_georeference(tmp_path, crs):
    turn = rasterio.Affine(1.7, 1.5, 5e5, 1, -2.6, 4e6)
    for transform, kind in itertools.product((rasterio.Affine(0.5, 0, 5e5, 0, -0.25, 4e6), turn), ("Area", "Point")):
        path = gdal(tmp_path / "a.tif", numbers("uint8", 1), crs=crs, transform=transform)
        with rasterio.open(path, "r+") as f:
            f.update_tags(AREA_OR_POINT=kind)
        georef = assert_placed(path)
        np.testing.assert_allclose(georef.transform, transform[:6], rtol=1e-12)
        with tifffile.TiffFile(path) as f:
            tags = f.pages[0].tags
            assert georef.keys[Tag.GeoKeyDirectory] == tags[34735].value
            assert georef.keys[Tag.GeoAsciiParams] == tags[34737].value


def test_odd_georeferences(tmp_path):
    path = tmp_path / "a.tif"

    def write(scale=None, tie=None):
        tags = [(33550, 12, len(scale), scale, True)] if scale else []
        tags += [(33922, 12, len(tie), tie, True)] if tie else []
        tifffile.imwrite(path, numbers("uint8", 1)[0], extratags=tags, metadata=None)

    write((2.0, 3.0, 0.0), (10.0, 5.0, 0.0, 1000.0, 2000.0, 0.0))  # a tie point inside the image
    assert assert_placed(path).transform == (2, 0, 980, 0, -3, 2015)
    write((2.0, -3.0, 0.0), (0.0, 0.0, 0.0, 1000.0, 2000.0, 0.0))
    assert assert_placed(path).transform == (2, 0, 1000, 0, -3, 2000)
    write((0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1000.0, 2000.0, 0.0))
    assert Tiff(path).georef is None
    write(None, (0.0, 0.0, 0.0, 1.0, 2.0, 0.0, 5.0, 0.0, 0.0, 2.0, 2.0, 0.0))  # ground control points
    assert Tiff(path).georef is None
    gdal(path, numbers("uint8", 1), crs="+proj=laea +lat_0=10 +lon_0=20", transform=rasterio.Affine(1, 0, 0, 0, -1, 9))
    assert Tiff(path).georef.epsg is None


@pytest.mark.parametrize("image, world", [
    ("a.tif", "a.tfw"), ("a.tif", "a.tifw"), ("a.tif", "a.wld"), ("a.tif", "a.TFW"), ("a.b.tiff", "a.b.tfw"),
    ("a.png", "a.pgw"), ("a.jpg", "a.jgw"), ("a.jpeg", "a.jpegw"), ("a.png", "a.wld")])
def test_world_files(tmp_path, image, world):
    Image.fromarray(numbers("uint8", 1)[0]).save(tmp_path / image)
    assert read_world_file(tmp_path / image) is None
    (tmp_path / world).write_text("0.5\n0.1\n0.2\n-0.25\n500000.125\n4000000.0\n")
    with rasterio.open(tmp_path / image) as f:
        want = f.transform[:6]
    np.testing.assert_allclose(read_world_file(tmp_path / image), want)
    if ".tif" in image:
        assert Tiff(tmp_path / image).georef.transform == read_world_file(tmp_path / image)
        gdal(tmp_path / image, numbers("uint8", 1), transform=rasterio.Affine(1, 0, 7, 0, -1, 9))
        assert Tiff(tmp_path / image).georef.transform == (1, 0, 7, 0, -1, 9)  # the file's own comes first
    (tmp_path / world).write_text("0,5\n0,1\n0,2\n-0,25\n500000,125\n4000000\n")  # as a German program writes it
    np.testing.assert_allclose(read_world_file(tmp_path / image), want)
    (tmp_path / world).write_text("0.5\n0\n0\n")
    said = refusal(read_world_file, tmp_path / image)
    assert f"{tmp_path / world}: a world file with '0.5 0 0', expected six numbers" in said


# ---- files that are not read

def follow(command, folder):
    """Do what the message says. rasterio stands for GDAL's programs, of which it is the library."""
    words = shlex.split(command)
    new = folder / "NEW.tif"
    if words[0] == "gdal_translate":
        source, options = words[-2], {}
        for flag, value in zip(words[1:-2:2], words[2:-2:2]):
            if flag == "-co":
                name, _, option = value.partition("=")
                options[name.lower()] = option
        bands = [int(b) for flag, b in zip(words[1:], words[2:]) if flag == "-b"]
        if bands:
            with rasterio.open(source) as f:
                gdal(new, f.read(bands), **options)
        else:
            rasterio.shutil.copy(source, new, driver="GTiff", **options)
    else:
        assert command.startswith("pip install tifffile imagecodecs; python -c ")
        subprocess.run([sys.executable, *words[words.index("python") + 1:]], cwd=folder, check=True)
    return new


def write_tags(path, data, **tags):
    """A TIFF of one strip with these bytes, by the specification: {name: a number or several}."""
    height, width = tags["ImageLength"], tags["ImageWidth"]
    tags |= dict(StripOffsets=8, RowsPerStrip=height, StripByteCounts=len(data))
    data += b"\0" * (len(data) % 2)
    entries, values = b"", b""
    for name, value in sorted(tags.items(), key=lambda item: int(getattr(Tag, item[0], 0) or item[0][1:])):
        numbers = value if isinstance(value, tuple) else (value,)
        word = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(word) > 4:
            place = 8 + len(data) + 2 + 12 * len(tags) + 4 + len(values)
            word, values = struct.pack("<I", place), values + word
        entries += struct.pack("<HHI4s", int(getattr(Tag, name, 0) or name[1:]), 4, len(numbers), word)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    path.write_bytes(head + data + struct.pack("<H", len(tags)) + entries + bytes(4) + values)


def old_jpeg(path):
    """Compression 6 as many scanners wrote it: a whole JPEG file as the strip."""
    file = io.BytesIO()
    Image.fromarray(smooth(3).transpose(1, 2, 0)).save(file, "JPEG", subsampling=0)
    data = file.getvalue()
    write_tags(path, data, ImageWidth=W, ImageLength=H, BitsPerSample=(8, 8, 8), Compression=6,
               PhotometricInterpretation=6, SamplesPerPixel=3, _513=8, _514=len(data), YCbCrSubSampling=(1, 1))
    return np.asarray(Image.open(file))


def sgi_log(path):
    """Luminance in SGI's logarithm: of each row the upper bytes, then the lower ones, in runs of 100."""
    values, data = np.linspace(12000, 17000, H * W).astype(np.int16).reshape(H, W), b""
    for row in values:
        for digits in (row >> 8, row & 255):
            digits = digits.astype(np.uint8).tobytes()
            data += b"".join(bytes([len(digits[i:i + 100])]) + digits[i:i + 100] for i in range(0, W, 100))
    write_tags(path, data, ImageWidth=W, ImageLength=H, BitsPerSample=16, Compression=34676,
               PhotometricInterpretation=32844, SamplesPerPixel=1, SampleFormat=2)
    return values[..., None]


@pytest.mark.parametrize("write, found", [
    (old_jpeg, "uint8, 3 bands, compression 6 (old-style JPEG), photometric 6 (YCbCr): old-style JPEG cannot be read"),
    (sgi_log, "int16, 1 bands, compression 34676 (SGI Log), photometric 32844 (LogL): SGI Log cannot be read")])
def test_advice_for_old_compressions_gives_the_right_pixels(tmp_path, write, found):
    want = write(tmp_path / "a.tif")
    said = refusal(Tiff, tmp_path / "a.tif")
    assert found in said
    pixels = Tiff(follow(said.split("convert it: ")[1], tmp_path)).read()
    np.testing.assert_allclose(pixels, want, rtol=0, atol=write is old_jpeg)  # two libjpegs round apart


def write_refused(path, what):
    """A file of a layout that data/tiff.py does not read."""
    rgb = smooth(3).transpose(1, 2, 0)
    if what == "complex64":
        tifffile.imwrite(path, (rgb[..., 0] + 1j).astype(np.complex64), photometric="minisblack")
    elif what in ("JPEG 2000", "PNG", "JPEG XL", "JPEG XR"):
        tifffile.imwrite(path, rgb, compression=what.replace(" ", ""), photometric="rgb", tile=(16, 16))
    elif what == "LERC":
        tifffile.imwrite(path, rgb, compression="lerc", photometric="rgb")
    elif what == "CIELab":
        tifffile.imwrite(path, rgb, photometric="cielab")
    elif what == "YCbCr":
        tifffile.imwrite(path, rgb, photometric="ycbcr", compression="lzw")
    elif what == "CMYK":
        tifffile.imwrite(path, smooth(5).transpose(1, 2, 0), photometric="separated", extrasamples=[0],
                         planarconfig="contig")
    elif what == "CCITT fax 4":
        gdal(path, numbers("uint8", 1, 1), nbits=1, compress="ccittfax4")
    elif what == "float24":
        tifffile.imwrite(path, numbers("uint8", 1, 60, (H, 3 * W))[0], metadata=None)
        for tag, value in ((Tag.ImageWidth, W), (Tag.BitsPerSample, 24), (305, 3)):
            patch(path, tag_at(path, tag) + 2, "HII", 4, 1, value)
        patch(path, tag_at(path, 305), "H", Tag.SampleFormat)  # in place of the name of the software
    elif what == "12 bits":
        gdal(path, numbers("uint16", 1, 4095), nbits=12, compress="jpeg")


@pytest.mark.parametrize("what, found", [
    ("complex64", "complex64, 1 bands, compression 1 (none)"),
    ("JPEG 2000", "uint8, 3 bands, compression 34712 (JPEG 2000)"),
    ("PNG", "compression 34933 (PNG)"), ("JPEG XL", "compression 50002 (JPEG XL)"),
    ("JPEG XR", "compression 34934 (JPEG XR)"), ("LERC", "compression 34887 (LERC)"),
    ("CIELab", "uint8, 3 bands, compression 1 (none), photometric 8 (CIELab)"),
    ("YCbCr", "compression 5 (LZW), photometric 6 (YCbCr)"),
    ("CMYK", "uint8, 5 bands, compression 1 (none), photometric 5 (CMYK)"),
    ("CCITT fax 4", "uint1, 1 bands, compression 4 (CCITT fax 4)"), ("float24", "float24, 1 bands"),
    ("12 bits", "uint12, 1 bands, compression 7 (JPEG)")])
def test_what_is_refused_is_named_and_its_advice_helps(tmp_path, what, found):
    path = tmp_path / "it's a file.tif"  # quotes and blanks must not break the command
    write_refused(path, what)
    said = refusal(Tiff, path)
    assert said.startswith(f"{path}: ") and found in said and what in said
    new = follow(said.split("convert it: ")[1], tmp_path)
    if what in ("JPEG 2000", "PNG", "JPEG XL", "JPEG XR"):
        want = tifffile.imread(path)
    elif what == "complex64":
        want = by_gdal(f"DERIVED_SUBDATASET:AMPLITUDE:{path}")
    else:
        want = by_gdal(path)
    if what == "CIELab":
        want = want[..., :3]
    assert_reads(new, want)


@pytest.mark.parametrize("tag, form, value, found", [
    (Tag.Compression, "HHII", (3, 1, 6), "compression 6 (old-style JPEG)"),
    (Tag.Compression, "HHII", (3, 1, 4711), "compression 4711 (unknown)"),
    (Tag.SampleFormat, "HHII", (3, 1, 9), "unknown format 16"),
    (Tag.BitsPerSample, "HHII", (3, 1, 24), "float24"),
    (Tag.Predictor, "HHII", (3, 1, 34892), "predictor 34892 of float16")])
def test_refused_by_the_numbers_of_the_header(tmp_path, tag, form, value, found):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RNG.normal(size=(H, W)).astype(np.float16), compression="deflate", predictor=True)
    patch(path, tag_at(path, tag), form, tag, *value)
    assert found in refusal(Tiff, path) and "not a readable image" not in refusal(Tiff, path)


def test_bands_of_different_kinds(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, numbers("uint8", 3).transpose(1, 2, 0), photometric="rgb")
    with tifffile.TiffFile(path) as f:
        patch(path, f.pages[0].tags[258].valueoffset, "HHH", 5, 6, 5)
    assert "BitsPerSample [5, 6, 5]" in refusal(Tiff, path)


def test_a_pillow_without_the_codec(tmp_path, monkeypatch):
    path = gdal(tmp_path / "a.tif", numbers("uint8", 1), compress="zstd")
    data = path.read_bytes()
    with tifffile.TiffFile(path) as f:
        start = f.pages[0].dataoffsets[0]
    path.write_bytes(data[:start] + b"\0" * 9 + data[start + 9:])
    assert "damaged TIFF: strip 1 of 1 cannot be unpacked (ZSTD" in refusal(Tiff(path).read)

    def encoder_error(*args, **kwargs):  # what such a Pillow says to saving
        raise OSError("encoder error -2 when writing image file")

    monkeypatch.setattr(Image.Image, "save", encoder_error)
    assert "ZSTD, which this Pillow was built without, cannot be read here; convert it: " in refusal(Tiff(path).read)


def test_no_tiffs(tmp_path):
    path = tmp_path / "a.tif"
    assert refusal(Tiff, path) == f"{path}: no such file"
    assert "Is a directory" in refusal(Tiff, tmp_path)
    Image.fromarray(numbers("uint8", 1)[0]).save(path, format="PNG")
    assert f"{path}: not a TIFF; it begins with" in refusal(Tiff, path) and "PNG" in refusal(Tiff, path)
    for text in (b"", b"I", b"II*", b"II*\0", b"II+\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"II*\0\x08\0\0\0\0\0"):
        path.write_bytes(text)
        refusal(Tiff, path)


def test_directories_in_a_circle(tmp_path):
    path, a = tmp_path / "a.tif", numbers("uint8", 3)
    tifffile.imwrite(path, a, photometric="minisblack")
    with tifffile.TiffFile(path) as f:
        first, last = f.pages[0], f.pages[2]
        first, end = first.offset, last.offset + 2 + 12 * len(last.tags)
    patch(path, end, "I", first)
    assert Tiff(path).pages == 3 and "round in a circle" in Tiff(path).damage
    patch(path, end, "I", 2**31)
    assert Tiff(path).pages == 3 and "a directory should lie at bytes" in Tiff(path).damage
    assert_reads(path, a[0][..., None])


@pytest.mark.parametrize("tag, value, said", [
    (Tag.ImageWidth, 0, "height, width, bands"), (Tag.ImageLength, 2**32 - 1, "strips are listed"),
    (Tag.SamplesPerPixel, 0, "height, width, bands"), (Tag.RowsPerStrip, 0, "height, width, bands"),
    (Tag.StripOffsets, 2**31, "strip 1 of 1 should lie at bytes 2147483648")])
def test_headers_that_contradict_the_file(tmp_path, tag, value, said):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, numbers("uint8", 1)[0], compression="deflate", rowsperstrip=H)
    patch(path, tag_at(path, tag) + 2, "HII", 4, 1, value)
    assert said in refusal(lambda: Tiff(path).read())


def test_what_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((64, 64), np.uint8), compression="lzw", rowsperstrip=64)
    for side in (30_000, 100_000, 2**31):
        for tag in (Tag.ImageWidth, Tag.ImageLength, Tag.RowsPerStrip):
            patch(path, tag_at(path, tag) + 2, "HII", 4, 1, side)
        said = refusal(lambda: Tiff(path).read())
        if side == 30_000:
            assert "strip 1 of 1 unpacks to 0 of 900000000 bytes" in said
        else:
            assert "a strip of" in said and "gdal_translate -co TILED=YES" in said
    # pixels that take no room in the file
    tifffile.imwrite(path, np.zeros((64, 64), np.uint8), rowsperstrip=64)
    for tag, value in ((Tag.ImageWidth, 2**20), (Tag.ImageLength, 2**20), (Tag.RowsPerStrip, 2**20),
                       (Tag.StripOffsets, 0)):
        patch(path, tag_at(path, tag) + 2, "HII", 4, 1, value)
    assert "1048576 x 1048576 pixels of 1 bands take 1024.0 GiB" in refusal(lambda: Tiff(path).read())
    assert not Tiff(path).read((2**20 - 9, 0, 9, 9)).any()


@pytest.mark.parametrize("compress", ["none", "deflate", "lzw", "zstd", "packbits", "jpeg", "webp", "lzma"])
def test_files_cut_short(tmp_path, compress):
    path = gdal(tmp_path / "a.tif", smooth(3), compress=compress, interleave="pixel", tiled=True, blockxsize=32,
                blockysize=32)
    want = by_gdal(path)
    with tifffile.TiffFile(path) as f:
        last = f.pages[0].dataoffsets[-1]
    path.write_bytes(path.read_bytes()[:last + 9])
    tiff = Tiff(path)
    assert re.search(r"tile 4 of 4 should lie at bytes \d+ to \d+ of a file of", refusal(tiff.read))
    np.testing.assert_array_equal(tiff.read((0, 0, 32, W)), want[:32])


BASES = [dict(compress="deflate", tiled=True, blockxsize=16, blockysize=16, predictor=2),
         dict(compress="lzw", endianness="BIG", bigtiff="YES", interleave="band", blockysize=5, nodata=3),
         dict(compress="jpeg", photometric="ycbcr", interleave="pixel", tiled=True, blockxsize=32, blockysize=32),
         dict(compress="zstd", bigtiff="YES", blockysize=8), dict(endianness="BIG"), dict(compress="packbits")]


@pytest.mark.parametrize("base", range(len(BASES)))
def test_mutations(tmp_path, base):
    """Any bytes of a file may change: it reads as what its header says, or is refused, at once."""
    path = gdal(tmp_path / "a.tif", smooth(3), np.where(HOLES, 0, 255).astype(np.uint8), crs="EPSG:32633",
                transform=rasterio.Affine(1, 0, 5e5, 0, -1, 4e6), **BASES[base])
    whole = path.read_bytes()
    head = min(len(whole), 700)
    rng = np.random.default_rng(base)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = refused = 0
    for i in range(80):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(data) if i % 4 == 3 else head))
            size = int(rng.choice([1, 2, 4]))
            data[at:at + size] = bytes(rng.choice([rng.integers(256), 0, 255], size).astype(np.uint8))
        if i % 10 == 9:
            del data[rng.integers(len(data)):]
        path.write_bytes(data)
        start = time.monotonic()
        try:
            tiff = Tiff(path)
            h, w, bands = tiff.shape
            pixels, valid = tiff.read_valid((0, 0, min(h, 500), min(w, 500)))
            assert pixels.dtype == tiff.dtype and pixels.shape[:2] == (min(h, 500), min(w, 500))
            assert valid is None or valid.shape == pixels.shape[:2]
            tiff.georef
            read += 1
        except BadInput as e:
            assert "\n" not in str(e) and str(path) in str(e)
            refused += 1
        assert time.monotonic() - start < 2
    assert read > 5 and refused > 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_a_deflated_block_ends_with_its_checksum(tmp_path):
    """A turned bit that unpacks to as many bytes is found by adler32, as zlib itself finds it."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.tif", compression="tiff_adobe_deflate")
    assert (Tiff(tmp_path / "a.tif").read()[..., 0] == pixels).all()
    data = (tmp_path / "a.tif").read_bytes()
    start = data.index(zlib.compress(pixels.tobytes())[:2])
    for i in range(start + 20, start + 200, 9):  # noise is stored as it is, so every byte is a pixel
        (tmp_path / "a.tif").write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1:])
        assert "damaged TIFF: strip 1 of 1 cannot be unpacked" in refusal(Tiff(tmp_path / "a.tif").read)


# ---- writing

UTM = dict(crs="EPSG:32632", transform=rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 5_400_000))


def written(path, pixels, **how):
    """The file, after GDAL, rio-cogeo and our reader have found the pixels in it."""
    write_tiff(path, pixels, **how)
    np.testing.assert_array_equal(by_gdal(path), pixels)
    assert_reads(path, pixels)
    ok, errors, warnings = cog_validate(path, strict=min(pixels.shape[:2]) > 1)
    assert ok and not errors and not warnings
    return path


@pytest.mark.parametrize("shape", [(1, 1, 1), (512, 513, 1), (1030, 700, 1), (600, 1100, 3)])
def test_what_is_written_is_a_cloud_optimised_geotiff(tmp_path, shape):
    pixels = numbers("uint8", shape[2], high=5, shape=shape[:2]).transpose(1, 2, 0)
    path = written(tmp_path / "a.tif", pixels)
    for i, factor in enumerate(rasterio.open(path).overviews(1)):
        assert factor == 2 ** (i + 1)
        with rasterio.open(path, overview_level=i) as f:  # every second pixel: no class that was not there
            np.testing.assert_array_equal(f.read().transpose(1, 2, 0), pixels[::factor, ::factor])
    assert Tiff(path).block == (512, 512) and [f.name for f in tmp_path.iterdir()] == ["a.tif"]


def test_ids_have_colours_and_nodata_and_bands_have_names(tmp_path):
    ids = RNG.integers(0, 3, (40, 30)).astype(np.uint8)
    colors = np.array([[255, 0, 7], [0, 128, 9], [1, 2, 3]], np.uint8)
    info = {"MODEL": "vit & <fpn>", "CLASSES": "0 Wälder"}
    write_tiff(tmp_path / "a.tif", ids, palette=colors, nodata=255, info=info)
    with rasterio.open(tmp_path / "a.tif") as f:
        assert f.nodata == 255 and f.colorinterp[0].name == "palette"
        assert [f.colormap(1)[i][:3] for i in range(3)] == [tuple(c) for c in colors.tolist()]
        assert {k: v for k, v in f.tags().items() if k in info} == info
    with tifffile.TiffFile(tmp_path / "a.tif") as f:
        np.testing.assert_array_equal(f.asarray(), ids)
    written(tmp_path / "b.tif", numbers("uint16", 3).transpose(1, 2, 0), bands=["a & b", "<c>", "d"])
    assert rasterio.open(tmp_path / "b.tif").descriptions == ("a & b", "<c>", "d")


def test_four_gigabytes_make_a_bigtiff(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CLASSIC_LIMIT", 3000)
    pixels = numbers("uint8", 2, shape=(600, 520)).transpose(1, 2, 0)
    assert written(tmp_path / "a.tif", pixels).read_bytes()[:4] == b"II+\0"


@pytest.mark.parametrize("how", [
    UTM, UTM | dict(AREA_OR_POINT="Point"), dict(crs="EPSG:4326", transform=rasterio.Affine(1e-5, 0, 7, 0, -1e-5, 48)),
    UTM | dict(transform=rasterio.Affine(0.4, 0.3, 5e5, 0.3, -0.4, 5e6))], ids=["utm", "centres", "degrees", "turned"])
def test_the_georeference_is_that_of_the_source(tmp_path, how):
    how = how.copy()
    point = how.pop("AREA_OR_POINT", None)
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", count=1, height=8, width=9, dtype="uint8", **how) as f:
        f.write(numbers("uint8", 1, shape=(8, 9)))
        if point:
            f.update_tags(AREA_OR_POINT=point)
    write_tiff(tmp_path / "b.tif", np.zeros((8, 9), np.uint8), georef=Tiff(tmp_path / "a.tif").georef)
    with rasterio.open(tmp_path / "a.tif") as a, rasterio.open(tmp_path / "b.tif") as b:
        assert a.transform == b.transform and a.crs == b.crs and a.tags()["AREA_OR_POINT"] == b.tags()["AREA_OR_POINT"]


@pytest.mark.parametrize("lines", ["0.5 0 0 -0.5 100.25 199.75", "0.4 0.3 0.3 -0.4 10 20"])
def test_a_world_file_becomes_tags(tmp_path, lines):
    Image.new("RGB", (9, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.pgw").write_text("\n".join(lines.split()))
    write_tiff(tmp_path / "b.tif", np.zeros((8, 9), np.uint8), georef=open_raster(tmp_path / "a.png").georef)
    with rasterio.open(tmp_path / "a.png") as a, rasterio.open(tmp_path / "b.tif") as b:
        np.testing.assert_allclose(a.transform, b.transform, atol=1e-9)


def test_the_area_of_a_pixel_where_it_is_known(tmp_path):
    affine = UTM["transform"]
    for code, want in [(32632, 0.25), (25832, 0.25), (2263, 0.25 * (1200 / 3937) ** 2), (4326, "degrees"),
                       (3857, "Web Mercator")]:
        gdal(tmp_path / "a.tif", numbers("uint8", 1), crs=f"EPSG:{code}", transform=affine)
        m2, why = Tiff(tmp_path / "a.tif").georef.pixel_area()
        if isinstance(want, str):
            assert m2 is None and want in why
        else:
            assert m2 == pytest.approx(want, rel=1e-9) and why == ""
    (tmp_path / "a.tfw").write_text("1 0 0 -1 0 0")
    gdal(tmp_path / "a.tif", numbers("uint8", 1))
    assert Tiff(tmp_path / "a.tif").georef.pixel_area() == (None, "the unit of the coordinates is not said")


def test_a_writer_that_is_killed_goes_on_and_ends_with_the_same_bytes(tmp_path):
    pixels = numbers("uint8", 1, high=3, shape=(1600, 1100)).transpose(1, 2, 0)
    whole = tmp_path / "whole.tif"
    write_tiff(whole, pixels)
    part = tmp_path / "a.tif.part"

    def out(resume="x"):
        return TiffWriter(tmp_path / "a.tif", pixels.shape, resume=resume)
    first = out()
    first.start(0, 1100)
    first.append(pixels[:700])  # one row of tiles
    first.append(pixels[700:1100])  # another one
    part.write_bytes(part.read_bytes()[:-3])  # of which the last bytes have not reached the disk
    assert out().done(0, 1100) == 512 and out().done(0, 1024) == 1024
    go_on = out()
    go_on.start(0, 1100, 512)
    go_on.append(pixels[512:])
    assert out().done(0, 1100) == 1600  # killed before the file was made
    out().finish()
    assert (tmp_path / "a.tif").read_bytes() == whole.read_bytes() and not part.exists()
    assert out().done(0, 1100) == 0
    out().start(0, 1100)
    assert out("other settings").done(0, 1100) == 0


def test_a_part_of_somebody_else_stays(tmp_path):
    (tmp_path / "a.tif.part").write_text("a download")
    assert "a.tif.part: would be overwritten" in refusal(write_tiff, tmp_path / "a.tif", np.zeros((4, 4), np.uint8))
    assert (tmp_path / "a.tif.part").read_text() == "a download"


@pytest.mark.parametrize("how", [dict(compress="deflate", tiled=True, blockxsize=16, blockysize=16), dict(), dict(
    compress="lzw", interleave="band", blockysize=5)], ids=["tiles", "uncompressed", "planar strips"])
def test_a_file_that_was_cut_short_is_known_by_its_header(tmp_path, how):
    path = gdal(tmp_path / "a.tif", numbers("uint8", 3), **how)
    Tiff(path).check_whole()
    path.write_bytes(path.read_bytes()[:-20])
    assert "truncated TIFF: 1 of" in refusal(Tiff(path).check_whole)


def test_three_bands_of_bytes_are_colours_unless_they_have_names(tmp_path):
    from rasterio.enums import ColorInterp
    pixels = np.random.default_rng(0).integers(0, 255, (600, 600, 3), np.uint8)
    colours = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
    for name, how, rgb in (("a", {}, True), ("b", dict(bands=["x", "y", "z"]), False), ("c", {}, False)):
        write_tiff(tmp_path / f"{name}.tif", pixels.astype(np.uint16) if name == "c" else pixels, **how)
        for level in ({}, dict(overview_level=0)):
            with rasterio.open(tmp_path / f"{name}.tif", **level) as f:
                assert (f.colorinterp == colours) == rgb
        with rasterio.open(tmp_path / f"{name}.tif") as f:
            assert np.array_equal(f.read().transpose(1, 2, 0), pixels)
