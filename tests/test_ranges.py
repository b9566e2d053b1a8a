"""data/ranges.py: what an input range may be, and percentiles against NumPy's of all pixels."""
import math

import numpy as np
import pytest
import rasterio
from PIL import Image

from data.common import BadInput
from data.io import read_valid
from data.ranges import is_range, parse_range, percentile_range, reading_flags, spread_windows


@pytest.mark.parametrize("text, want", [
    ("0 3000", [0, 3000]), ("-1.5 2", [-1.5, 2]), ("0 1 0 2 -3 3", [[0, 1], [0, 2], [-3, 3]]),
    ("p2-98", "p2-98"), ("p0-100", "p0-100"), ("p0.5-99.5", "p0.5-99.5")])
def test_words_become_a_range_and_words_again(text, want):
    value = parse_range(text.split())
    assert value == want and is_range(value)
    assert parse_range(reading_flags([4, 1, 2], value)[3:]) == value
    assert reading_flags([4, 1, 2], value)[:3] == ["--bands", "4,1,2", "--input-range"]


@pytest.mark.parametrize("text", ["3000 0", "1 1", "1", "1 2 3", "1 2 3 4", "0 1 0 1 2 2", "0 nan", "0 inf", "p98-2",
                                  "p2-101", "p2-2", "p-2", "p2-98 3", "q2-98", "a b", "0,3000", "0 1 2 3 4 5 6 7"])
def test_what_is_no_range_is_refused_with_what_would_be(text):
    with pytest.raises(BadInput, match="expected the lower number first, a pair .* such as p2-98"):
        parse_range(text.split())


def test_what_json_may_hold():
    assert is_range([[0, 1]] * 3) and is_range([0.5, 1]) and is_range("p1-99")
    for value in ([[0, 1]] * 2, [[0, 1], [0, 1], [1, 1]], [[0, 1], [0, 1], "p2"], [0, True], "p2", "", [0, math.inf],
                  [[0, 1], [0, 1], 3], {}, {"a": 1, "b": 2}):
        assert not is_range(value), value


def geotiff(path, a, nodata=None, **more):
    """(H, W, n) by GDAL."""
    h, w, n = a.shape
    with rasterio.open(path, "w", "GTiff", w, h, n, dtype=a.dtype, nodata=nodata, **more) as f:
        f.write(np.moveaxis(a, -1, 0))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_percentiles_are_numpys_of_all_valid_pixels(tmp_path, dtype):
    rng = np.random.default_rng(0)
    images, pixels = [], []
    for i in range(3):
        a = rng.integers(1, 100, (20 + i, 30, 4)).astype(dtype)
        a[:5] = 0  # no data where all bands are
        a[6, :, 0] = 0
        geotiff(tmp_path / f"{i}.tif", a, nodata=0)
        with rasterio.open(tmp_path / f"{i}.tif") as f:
            pixels.append(f.read([4, 1, 2])[:, f.dataset_mask() > 0])
        images.append((tmp_path / f"{i}.tif", None))
    pairs, notes = percentile_range("p2-98", images, [4, 1, 2])
    want = np.percentile(np.concatenate(pixels, 1), (2, 98), axis=1).T
    np.testing.assert_allclose(pairs, want, rtol=1e-6)
    first = f"band 4 {want[0, 0]:g} to {want[0, 1]:g}"
    assert notes[0].startswith(f"input range p2-98 of 3 training images: {first}, band 1")


def test_large_images_are_read_in_windows_that_stand_for_the_whole(tmp_path):
    a = np.arange(900) + 1000 * (np.arange(700)[:, None] > 600)
    a = np.dstack([a, a, a]).astype(np.uint16)
    for file in (tmp_path / "a.tif", tmp_path / "tiled.tif"):
        tiled = dict(tiled=True, blockxsize=128, blockysize=128) if file.stem == "tiled" else {}
        geotiff(file, a, **tiled)
        pairs, _ = percentile_range("p20-80", [(file, None)], None)
        assert np.abs(pairs[0] - np.percentile(a, (20, 80))).max() < 60 and pairs[1:] == pairs[:2]
    small = (a % 251).astype(np.uint8)
    Image.fromarray(small).save(tmp_path / "a.png")
    geotiff(tmp_path / "b.tif", small)  # the same windows of what Pillow reads whole
    assert percentile_range("p9-91", [(tmp_path / "a.png", None)], None)[0] == \
        percentile_range("p9-91", [(tmp_path / "b.tif", None)], None)[0]


def test_windows_agree_on_whether_alpha_is_a_mask(tmp_path):
    """Infrared called alpha is 0 over water: no window may take it for a mask there."""
    a = np.random.default_rng(0).integers(1, 255, (500, 400, 4), np.uint8)
    a[:200, :, 3] = 0
    a[:200, :, 0] = 200  # brighter over water
    for name, alpha in (("a", "YES"), ("b", "NO")):
        geotiff(tmp_path / f"{name}.tif", a, photometric="RGB", alpha=alpha)
    files = [[(tmp_path / f"{name}.tif", None)] for name in "ab"]
    with_alpha, without = (percentile_range("p10-90", one, [1, 2, 3])[0] for one in files)
    assert with_alpha == without


@pytest.mark.parametrize("veil, hidden", [((0, 1), 40), ((0.0, 0.5), 0)])
def test_alpha_of_floats_is_a_mask_of_0_and_1(tmp_path, veil, hidden):
    a = np.random.default_rng(0).random((10, 8, 4), np.float32)
    a[:5, :, 3], a[5:, :, 3] = veil
    geotiff(tmp_path / "a.tif", a, photometric="RGB", alpha="YES")
    valid = read_valid(tmp_path / "a.tif", [1, 2, 3], [0, 1])[1]
    assert (0 if valid is None else np.sum(~valid)) == hidden


def test_windows_lie_in_the_box_and_do_not_repeat():
    for box in ((3, 4, 4000, 50), (0, 0, 400, 5000), (7, 7, 385, 385)):
        windows = spread_windows(box)
        assert 1 < len(windows) == len(set(windows)) <= 9
        tops, lefts, hs, ws = np.array(windows).T
        assert tops.min() >= box[0] and lefts.min() >= box[1]
        assert (tops + hs).max() <= box[0] + box[2] and (lefts + ws).max() <= box[1] + box[3]
        # As much room before the first window as behind the last.
        assert abs(tops.min() - box[0] - (box[0] + box[2] - (tops + hs).max())) <= 1
    assert spread_windows((5, 6, 300, 400)) == [(5, 6, 300, 400)]


@pytest.mark.parametrize("dtype, value, want", [
    ("uint8", 7, [7, 8]), ("uint8", 255, [254, 255]), ("uint16", 65535, [65535, 65536]), ("float32", 2.0**30, None)])
def test_a_band_of_one_value_is_widened_and_named(tmp_path, dtype, value, want):
    rng = np.random.default_rng(0)
    a = rng.integers(0, 200, (9, 9, 3)).astype(dtype)
    a[..., 1] = value
    geotiff(tmp_path / "a.tif", a)
    pairs, notes = percentile_range("p2-98", [(tmp_path / "a.tif", None)], [1, 2, 3])
    assert want is None or pairs[1] == want
    assert len(notes) == 2 and f"band 2 is {value:g} at both percentiles" in notes[1]
    image, _ = read_valid(tmp_path / "a.tif", input_range=pairs)
    assert len(np.unique(image[..., 1])) == 1 and image[0, 0, 1] == (255 if want == [254, 255] else 0)
    assert image[..., 0].min() == 0 and image[..., 0].max() == 255


def test_numbers_that_float32_cannot_hold(tmp_path):
    a = np.array([16777216, 16777217, 16777218], np.uint32).reshape(1, 3, 1)
    geotiff(tmp_path / "a.tif", a)
    image, _ = read_valid(tmp_path / "a.tif", input_range=[16777216, 16777218])
    assert image[0, :, 0].tolist() == [0, 128, 255]


def test_nothing_to_measure_on_is_said(tmp_path):
    geotiff(tmp_path / "a.tif", np.zeros((4, 4, 3), np.uint16), nodata=0)
    with pytest.raises(BadInput, match="--input-range p2-98: no pixel in the 1 training images is data; type numbers"):
        percentile_range("p2-98", [(tmp_path / "a.tif", None)], None)
    geotiff(tmp_path / "b.tif", np.ones((4, 4, 5), np.uint16))
    with pytest.raises(BadInput, match="b.tif: 5 bands .* say which with --bands"):
        percentile_range("p2-98", [(tmp_path / "b.tif", None)], None)
