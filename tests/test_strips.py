"""data/strips.py: rows of an image by strips are those of the image read whole."""
import numpy as np
import pytest
import rasterio
from PIL import Image

from data import strips, tiff
from data.common import BadInput
from data.io import read_valid
from data.strips import Strips

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
H, W = 700, 90
RNG = np.random.default_rng(0)


def scene(path, bands=3, zeros=True, **how):
    pixels = RNG.integers(1, 256, (bands, H, W)).astype(np.uint8)
    if zeros:
        pixels[:, 100:400, 20:60] = 0
    with rasterio.open(path, "w", driver="GTiff", count=bands, height=H, width=W, dtype="uint8", **how) as f:
        f.write(pixels)
    return path


def assert_same_rows(path, **reading):
    image, valid = read_valid(path, **reading)
    rows = Strips(path, **reading)
    assert rows.shape == (H, W)
    rising = [(0, 64), (48, 64), (96, 300), (390, 310)]
    for left, width in [(0, W), (16, 50)]:
        rows.columns(left, width)
        # Rows that follow each other, then a step back and one far ahead.
        for top, height in [*rising, (10, 20), (600, 100)]:
            got, seen = rows.read(top, height)
            part = slice(top, top + height), slice(left, left + width)
            np.testing.assert_array_equal(got, image[part])
            want = np.ones((height, width), bool) if valid is None else valid[part]
            np.testing.assert_array_equal(np.ones_like(want) if seen is None else seen, want)
    for n in (1, 7, 300):
        np.testing.assert_array_equal(rows.thinned(n), image[::n, ::n])


@pytest.mark.parametrize("how", [
    dict(tiled=True, blockxsize=32, blockysize=32, compress="deflate"), dict(compress="lzw", blockysize=7), dict(),
    dict(compress="deflate", blockysize=H)], ids=["tiles", "strips", "uncompressed", "one strip"])
def test_rows_of_a_tiff(tmp_path, how):
    assert_same_rows(scene(tmp_path / "a.tif", nodata=0, **how))
    assert_same_rows(scene(tmp_path / "b.tif", bands=5, **how), bands=[4, 1, 2], input_range=[0, 200])


@pytest.mark.parametrize("nodata", [0, 7, None])
@pytest.mark.parametrize("how", [
    dict(), dict(interleave="band"), dict(mask=True), dict(alpha="yes"), dict(dtype="float32")], ids=str)
def test_rows_of_a_sparse_tiff(tmp_path, monkeypatch, how, nodata):
    """Tiles that the file does not hold: scattered ones, whole columns and whole rows."""
    how = dict(how)
    bands, dtype, masked = 3 + ("alpha" in how), how.pop("dtype", "uint8"), how.pop("mask", False)
    if "alpha" in how:
        how["photometric"] = "rgb"
    monkeypatch.setattr(tiff, "WIDE", 32)  # more than one part in a row
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(
            tmp_path / "a.tif", "w", driver="GTiff", count=bands, height=H, width=W, dtype=dtype, nodata=nodata,
            sparse_ok=True, tiled=True, blockxsize=16, blockysize=16, compress="deflate", **how) as f:
        for top, left in [(0, 16), (48, 0), (48, 16), (48, 64), (304, 80), (688, 32)]:
            h, w = min(16, H - top), min(16, W - left)
            pixels = RNG.integers(0, 9, (bands, h, w)).astype(dtype)
            f.write(pixels, window=rasterio.windows.Window(left, top, w, h))
        if masked:
            f.write_mask(RNG.integers(0, 2, (H, W)).astype(bool))
    assert_same_rows(tmp_path / "a.tif", bands=[3, 1, 2] if "alpha" in how else None, input_range=[0, 9])


def test_rows_of_a_picture(tmp_path):
    image = RNG.integers(0, 256, (H, W, 4)).astype(np.uint8)
    image[..., 3] = 255 * (image[..., 3] > 99)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert_same_rows(tmp_path / "a.png")


@pytest.mark.parametrize("odd", [0, 1], ids=["mask", "infrared"])
def test_alpha_is_a_mask_in_all_windows_or_in_none(tmp_path, odd):
    """The last pixel of the fourth band decides: where it is neither 0 nor 255, the band is no mask."""
    pixels = RNG.integers(1, 256, (4, H, W)).astype(np.uint8)
    pixels[3] = RNG.integers(0, 2, (H, W)) * 255
    pixels[3, -1, -1] = 255 - odd
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", count=4, height=H, width=W, dtype="uint8",
                       photometric="rgb", alpha="yes", blockysize=4) as f:
        f.write(pixels)
    valid = Strips(tmp_path / "a.tif", bands=[1, 2, 3]).read(0, 64)[1]
    if odd:
        assert valid is None
    else:
        np.testing.assert_array_equal(valid, pixels[3, :64] == 255)
    assert_same_rows(tmp_path / "a.tif", bands=[1, 2, 3])


def test_a_file_that_was_cut_short_is_refused_before_a_row_is_read(tmp_path):
    path = scene(tmp_path / "a.tif", compress="deflate", blockysize=16)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BadInput, match="a.tif: truncated TIFF"):
        Strips(path)


def test_alpha_with_soft_edges_hides_nothing_and_that_is_said(tmp_path):
    pixels = np.full((20, 30, 4), 200, np.uint8)
    pixels[..., 3] = 255
    pixels[:5, :, 3] = 0
    for name, veil in (("hard", 0), ("soft", 128)):
        pixels[5, :, 3] = veil
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        with rasterio.open(tmp_path / f"{name}.tif", "w", driver="GTiff", height=20, width=30, count=4, dtype="uint8",
                           photometric="RGB", alpha="YES") as f:
            f.write(pixels.transpose(2, 0, 1))
        for path in (tmp_path / f"{name}.png", tmp_path / f"{name}.tif"):
            # Of named bands; without names it is a guess whether the fourth is one.
            opened = Strips(path, bands=[1, 2, 3])
            _, valid = opened.read(0, 20)
            if name == "hard":
                assert not opened.notes and valid[:6].sum() == 0 and valid[6:].all()
                continue
            assert valid is None and "alpha is more than 0 and 255, so it hides no pixel" in opened.notes[0]
            with pytest.raises(BadInput, match="alpha is more than 0 and 255; a mask with soft edges: gdal_translate"):
                Strips(path).read(0, 20)


def test_only_packed_strips_that_fill_the_memory_get_a_note(tmp_path, monkeypatch):
    files = dict(one=dict(compress="deflate", blockysize=H), few=dict(compress="deflate", blockysize=8),
                 plain=dict(blockysize=H), tiles=dict(tiled=True, blockxsize=512, blockysize=512, compress="deflate"))
    paths = {name: scene(tmp_path / f"{name}.tif", **how) for name, how in files.items()}
    assert not any(Strips(path).notes for path in paths.values())
    monkeypatch.setattr(strips, "HEAVY", 3 * H * W)
    notes = {name: Strips(path).notes for name, path in paths.items()}
    path = paths["one"]
    assert notes.pop("one") == [
        f"{path}: strips of 700 rows, which are unpacked as a whole: about 0.0 GB of memory; tiles take little: "
        f"gdal_translate -co TILED=YES -co BIGTIFF=IF_SAFER -co COMPRESS=DEFLATE {path} NEW.tif"]
    assert not any(notes.values())
