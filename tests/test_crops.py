"""data/crops.py: crops hold what they should, invent no labels, read no more than they need."""
import tracemalloc

import numpy as np
import pytest

from data.common import IGNORE
from data.crops import crop, crop_window, random_crop, random_place


@pytest.mark.parametrize("side, scales", [(1, (1, 2)), (3, (0.5, 2))])  # 3 pixels survive nearest at half the size
def test_a_crop_around_a_rare_class_holds_it(side, scales):
    for seed in range(1500):
        rng = np.random.default_rng(seed)
        (H, W), size = rng.integers(5, 90, 2), int(rng.choice([16, 32]))
        top, left = rng.integers(H - side + 1), rng.integers(W - side + 1)
        mask = np.zeros((H, W), np.uint8)
        mask[top:top + side, left:left + side] = 1
        x, y = random_crop(np.zeros((H, W, 3), np.uint8), mask, size, scales, rng, [1, 2], 1.0)
        assert x.shape == (size, size, 3) and y.shape == (size, size) and (y == 1).any()


def test_crops_invent_no_labels_and_pad_right_and_bottom_only():
    values = np.uint8([0, 50, 100, 250])
    for seed in range(300):
        rng = np.random.default_rng(seed)
        (H, W), scale = rng.integers(1, 40, 2), rng.uniform(0.5, 2)
        image, mask = np.full((H, W, 3), 9, np.uint8), rng.choice(values, (H, W))
        x, y = crop(image, mask, 24, scale, rng.uniform(0, (H, W)))
        h, w = (max(1, min(24, round(n * scale))) for n in (H, W))
        inside = np.outer(np.arange(24) < h, np.arange(24) < w)
        assert ((y != IGNORE) == inside).all() and set(y[inside]) <= set(values)
        assert (x == np.where(inside, 9, 0)[..., None]).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_image_and_mask_are_cut_and_scaled_alike(axis):
    """Both hold the coordinate c: nearest gives floor(c), bilinear c - 1/2; they differ by up to 1, on average by 0."""
    ramp, off = np.indices((200, 200))[axis].astype(np.uint8), []
    for seed in range(200):
        x, y = random_crop(ramp[..., None].repeat(3, 2), ramp, 48, (0.5, 2), np.random.default_rng(seed))
        off.append(x[..., 0].astype(float) - y)
    assert np.abs(off).max() <= 1 and abs(np.mean(off)) < 0.05


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale", [1 / 4, 1 / 3, 1 / 2, 2 / 3, 1, 3 / 2, 2])
def test_at_round_scales_the_mask_lies_on_its_image(scale, axis):
    """There middles of the crop's pixels fall between two of the mask's: taking always one side would move it."""
    # Of 60 pixels, four apart in value, so that rounding the filtered image to bytes moves nothing.
    ramp = 4 * np.indices((60, 60))[axis].astype(np.uint8)
    x, y = crop(ramp[..., None].repeat(3, 2), ramp, round(60 * scale), scale, (30, 30))
    inner = slice(3, -3)  # the image is filtered at the rims
    off = (x[inner, inner, 0].astype(float) - y[inner, inner]) / 4
    assert abs(off.mean()) < 0.06 and np.abs(off).max() <= 0.5


def test_at_half_the_size_squares_and_their_labels_have_one_middle():
    """Squares at every place: on average the label's middle is the image's, to a hundredth of a pixel."""
    off = []
    for top in range(30, 62):
        mask = np.zeros((96, 96), np.uint8)
        mask[top:top + 12, 96 - top - 12:96 - top] = 1
        x, y = crop(np.repeat(mask[..., None] * 240, 3, 2), mask, 48, 0.5, (48, 48))
        weight = x[..., 0].astype(float)
        for axis in (0, 1):
            grid = np.indices(y.shape)[axis]
            off.append((grid * weight).sum() / weight.sum() - grid[y == 1].mean())
    assert abs(np.mean(off)) < 0.01 and np.abs(off).max() <= 0.5


@pytest.mark.parametrize("n", [20, 21, 33])
def test_every_window_is_drawn_alike_often_also_at_the_rims(n):
    """16 pixels of n: n - 15 starts, each within four standard deviations of its share."""
    rng, draws = np.random.default_rng(0), 20000
    starts = []
    for _ in range(draws):
        scale, centre = random_place(n, 2 * n, 16, (1, 1), rng)
        starts.append(crop_window(n, 2 * n, 16, scale, centre)[0][:2])
    for axis, number in enumerate((n - 15, 2 * n - 15)):
        count = np.bincount(np.array(starts)[:, axis], minlength=number)
        assert len(count) == number
        spread = np.sqrt(draws / number * (1 - 1 / number))
        assert np.abs(count - draws / number).max() < 4 * spread


def test_crops_of_mapped_tiles_read_no_more_than_they_need(tmp_path):
    image = np.memmap(tmp_path / "image", np.uint8, "w+", shape=(20000, 20000, 3))  # sparse: 1.2 GB that take no place
    mask, rng = np.memmap(tmp_path / "mask", np.uint8, "w+", shape=image.shape[:2]), np.random.default_rng(0)
    mask[7000:7055, 9000:9055], image[7000:7055, 9000:9055] = 1, 200  # every 55th row and column are searched
    tracemalloc.start()
    for _ in range(20):
        x, y = random_crop(image, mask, 512, (0.5, 2), rng, [1], 1.0)
        assert (y == 1).any() and abs((x[..., 0] > 100).sum() - (y == 1).sum()) < 500
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
