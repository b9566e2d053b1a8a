"""data/crops.py: crops hold what they should, invent no labels, read no more than they need."""
import tracemalloc

import numpy as np
import pytest

from data.common import IGNORE
from data.crops import crop, random_crop


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
