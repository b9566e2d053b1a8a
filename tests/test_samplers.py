"""Samplers: proportions, disjoint ranks, exact resume, the report's rule; and that a focused crop has its pixel."""
import itertools

import numpy as np
import pytest

from data import crops
from data.common import IGNORE, BadInput
from data.samplers import (
    StepSampler, balanced_weights, check_repeated, difficulty_weights, hard_classes, replicated, rich)


def drawn(sampler):
    return [i for batch in sampler for i, _ in batch]


def within_3_sigma(counts, p):
    n, p = counts.sum(), np.asarray(p, float) / np.sum(p)
    return (abs(counts - n * p) <= 3 * np.sqrt(n * p * (1 - p)) + 1e-9).all()


def test_weighted_draws_have_their_proportions_and_differ_by_pass_and_seed():
    weights = np.array([1, 2, 4, 6, 1, 0, 3.5])
    sampler = StepSampler(7, 10, 4000, seed=0, weights=weights)
    draws = drawn(sampler)
    assert len(draws) == 40000 and within_3_sigma(np.bincount(draws, minlength=7), weights)
    assert draws[:7] != draws[7:14] and draws[:70] != drawn(StepSampler(7, 10, 7, seed=1, weights=weights))


@pytest.mark.parametrize("more", [{}, {"weights": np.arange(1, 12)}, {"items": [*range(11), 3, 3, 7]},
                                  {"weights": np.arange(1, 12), "items": [*range(11), 3]}])
def test_ranks_share_the_draws_and_resume_is_exact(more):
    whole = [*StepSampler(11, 6, 20, seed=3, **more)]
    for world in (2, 3):
        ranks = [[*StepSampler(11, 6 // world, 20, 3, 0, rank, world, **more)] for rank in range(world)]
        for step, parts in enumerate(zip(*ranks)):
            assert [*itertools.chain(*parts)] == whole[step]  # all of them, none twice
            assert len({draw for part in parts for _, draw in part}) == 6
    assert [*StepSampler(11, 6, 20, 3, start=13, **more)] == whole[13:]
    assert len(StepSampler(11, 6, 20, 3, start=13, **more)) == 7


def test_without_weights_and_lists_nothing_has_changed():
    order = [np.random.default_rng((1, 5, epoch)).permutation(4) for epoch in range(3)]
    assert drawn(StepSampler(4, 3, 4, seed=5)) == np.concatenate(order).tolist()


def test_replication_is_repeated_entries():
    items = replicated(["a", "b", "c"], ["c", "c", "a"])
    assert items.tolist() == [0, 1, 2, 2, 2, 0]
    draws = drawn(StepSampler(3, 6, 50, seed=0, items=items))
    assert np.bincount(draws).tolist() == [100, 50, 150]  # exact, pass by pass
    draws = drawn(StepSampler(3, 60, 500, seed=0, items=items, weights=[1, 1, 2]))
    assert within_3_sigma(np.bincount(draws), [2, 1, 6])
    with pytest.raises(BadInput, match="'d' is to be repeated but is no training image"):
        replicated(["a", "b"], ["d"])
    for listed, said in (([], "no training image is so full"), (["b", "a"], "repeats all training images alike")):
        with pytest.raises(BadInput, match=said):
            check_repeated(["a", "b"], listed)
    check_repeated(["a", "b"], ["a"])


def test_hard_classes_and_the_reports_weights():
    cms = np.zeros((4, 3, 3), int)
    cms[0] = np.diag([5, 5, 0])  # class 2 absent: not hard
    cms[1] = [[4, 0, 4], [0, 9, 0], [0, 0, 0]]  # class 0: 4 of 8, not below .5; class 2 only predicted: not hard
    cms[2] = [[3, 0, 4], [0, 9, 0], [0, 0, 1]]  # 3/7 and 1/5
    cms[3] = [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert hard_classes(cms).tolist() == [0, 0, 2, 3]
    assert hard_classes(cms, below=0.3).tolist() == [0, 0, 1, 3]
    assert difficulty_weights(np.arange(8)).tolist() == [1, 2, 2, 4, 4, 6, 6, 6]
    assert difficulty_weights(np.arange(4), limits=(1,), weights=(1, 10)).tolist() == [1, 1, 10, 10]
    with pytest.raises(BadInput, match="one weight more than limits"):
        difficulty_weights(np.arange(4), limits=(1, 2), weights=(1, 10))
    with pytest.raises(BadInput, match="sampling weights"):
        StepSampler(3, 1, 1, 0, weights=[0, 0, 0])


def test_class_balance_and_the_share_rule():
    counts = np.array([[90, 10, 0, 0], [100, 0, 0, 0], [100, 0, 0, 0], [50, 0, 50, 0]])  # nobody has class 3
    w = balanced_weights(counts)
    assert w.tolist() == [0.25 + 1, 0.25, 0.25, 0.25 + 1]
    draws = np.array(drawn(StepSampler(4, 10, 2000, seed=0, weights=w)))
    assert within_3_sigma(np.bincount(draws), w)
    assert rich(counts, [1, 2], 0.1).tolist() == [0, 3] and rich(counts, [1], 0.11).tolist() == []
    with pytest.raises(BadInput, match="nothing to balance"):
        balanced_weights(counts * 0)


# ---- the strategic crop of the KD report is data/crops.py with focus 0.7

def test_the_focused_pixel_is_in_the_crop_at_every_scale():
    """A thousand draws a scale: images of any shape, the pixel anywhere."""
    rng = np.random.default_rng(0)
    for scale in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0):
        for _ in range(1000):
            H, W = rng.integers(8, 90, 2)
            y, x = rng.integers(H), rng.integers(W)
            mask = np.zeros((H, W), np.uint8)
            mask[y, x] = 5
            drawn, centre = crops.random_place(
                H, W, 32, (scale, scale), rng, lambda: crops.random_pixel(mask, [4, 5], rng), focus_p=1.0)
            (top, left, h, w), _ = crops.crop_window(H, W, 32, drawn, centre)
            assert top <= y < top + h <= H and left <= x < left + w <= W, (scale, H, W, y, x)


def test_what_survives_scaling_is_in_the_cropped_mask():
    rng = np.random.default_rng(0)
    for scale in (0.25, 0.5, 1.0, 1.5, 3.0):
        for _ in range(300):
            mask = np.zeros((120, 100), np.uint8)
            y, x = rng.integers(120), rng.integers(100)
            mask[max(0, y - 4):y + 5, max(0, x - 4):x + 5] = 5  # at least 5 x 5: one pixel at scale 1/4
            image = np.repeat(mask[..., None] * 40, 3, 2)
            _, ids = crops.random_crop(image, mask, 32, (scale, scale), rng, focus=[5], focus_p=1.0)
            assert (ids == 5).any(), (scale, y, x)


def test_the_share_the_jitter_the_fallback_and_the_padding():
    rng = np.random.default_rng(0)
    mask = np.zeros((400, 400), np.uint8)
    mask[200, 200] = 4
    image = np.zeros((400, 400, 3), np.uint8)
    hits = sum((crops.random_crop(image, mask, 16, (1, 1), rng, [4], 0.7)[1] == 4).any() for _ in range(3000))
    assert within_3_sigma(np.array([hits, 3000 - hits]), [0.7 + 0.3 * 16 ** 2 / 385 ** 2, 0.3])

    def centres(pixel):
        return np.array([crops.random_place(400, 400, 16, (1, 1), rng, pixel, 1.0)[1] for _ in range(500)])

    near = centres(lambda: crops.random_pixel(mask, [4], rng))
    assert (abs(near - 200.5) <= 6).all()  # 3/8 of 16
    assert (near.min(0) < 195.5).all() and (near.max(0) > 205.5).all()  # jitter fills its square
    assert crops.random_pixel(mask, [3], rng) is None
    assert np.ptp(centres(lambda: None), axis=0).min() > 350  # no such pixel: an ordinary crop, anywhere
    x, ids = crops.random_crop(image[:10, :20], mask[195:205, 195:215], 16, (1, 1), rng, [4], 1.0)
    assert x.shape == (16, 16, 3) and (ids[10:] == IGNORE).all() and (ids[:10] != IGNORE).all() and (ids == 4).any()


def steps_of(world, batch, accum=1, **more):
    """Samples of each optimiser step over all ranks."""
    ranks = [list(StepSampler(10, batch, 6 * accum, 3, rank=r, world=world, **more)) for r in range(world)]
    starts = range(0, 6 * accum, accum)
    return [sorted(s for rank in ranks for micro in rank[i:i + accum] for s in micro) for i in starts]


def test_ranks_and_accumulation_only_share_out_the_same_samples():
    want = steps_of(1, 12)
    for world, batch, accum in ((2, 6, 1), (3, 4, 1), (4, 3, 1), (1, 4, 3), (2, 3, 2)):
        assert steps_of(world, batch, accum) == want
    index, draw = zip(*sorted((s for step in want for s in step), key=lambda s: s[1]))
    assert draw == tuple(range(72))
    epochs = [index[i:i + 10] for i in range(0, 70, 10)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and len(set(epochs)) == 7


def test_start_skips_steps_and_changes_nothing_else():
    whole, rest = StepSampler(10, 4, 9, 3, rank=1, world=2), StepSampler(10, 4, 9, 3, start=5, rank=1, world=2)
    assert list(rest) == list(whole)[5:] and len(rest) == 4 and len(whole) == 9
