"""data/augment.py: image and mask are turned, coloured and mixed as they should be."""
import numpy as np
import pytest
import torch

from data import augment
from data.common import IGNORE

RGB = np.random.default_rng(0).integers(1, 256, (9, 7, 3), np.uint8)


def test_dihedral_turns_pairs_alike_and_hits_all_eight():
    mask = np.arange(6, dtype=np.uint8).reshape(2, 3)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(100):
        x, y = augment.dihedral(mask[..., None].repeat(3, 2), mask, rng)
        assert (x == y[..., None]).all()
        seen.add((y.shape, y.tobytes()))
    flips = [m[::a, ::b] for m in (mask, mask.T) for a in (1, -1) for b in (1, -1)]
    assert seen == {(m.shape, m.tobytes()) for m in flips}


def test_color_changes_within_its_strength():
    rng, before = np.random.default_rng(0), RGB.copy()
    assert (augment.color(RGB, rng, 0) == RGB).all()
    grey = np.full((4, 4, 3), 100, np.uint8)  # has neither contrast nor saturation: brightness and tint are left
    seen = np.array([augment.color(grey, rng, 0.2) for _ in range(200)])
    assert 100 * 0.8 * 0.95 - 1 <= seen.min() < 82 and 118 < seen.max() <= 100 * 1.2 * 1.05
    assert (augment.color(RGB, rng, 0.5) != RGB).any() and (RGB == before).all()


def test_mixup_and_cutmix_keep_labels_with_their_pixels():
    y = torch.arange(4)[:, None, None].repeat(1, 8, 6)
    y[:, 2, 1:4] = IGNORE
    x, shares = y[:, None].float(), []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        mixed, y1, y2, share = augment.mixup(x, y, rng)
        torch.testing.assert_close(mixed, share * y1[:, None] + (1 - share) * y2[:, None])
        assert torch.equal(y1, y) and sorted(y2[:, 0, 0].tolist()) == [0, 1, 2, 3]
        pasted, labels = augment.cutmix(x, y, rng)
        assert torch.equal(pasted[:, 0], labels.float()) and torch.equal(labels == IGNORE, y == IGNORE)
        if len(box := (labels != y).any(0).nonzero()):  # (n, 2) rows, columns; empty where every image stayed itself
            h, w = (box.amax(0) - box.amin(0) + 1).tolist()
            shares.append(h * w / 48)
            assert h * w - 3 <= len(box) <= h * w  # full, but for the three ignored pixels
    assert 0.4 < np.mean(shares) < 0.6 and torch.equal(x[:, 0], y.float())  # uniform; the inputs stay as they were


def test_mix_is_cutmix_then_mixup_by_their_probabilities():
    x, y = torch.randn(4, 3, 8, 6), torch.arange(4 * 48).view(4, 8, 6)
    seen = set()
    for seed in range(100):
        mixed, targets = augment.mix(x, y, np.random.default_rng(seed), 0.5, 0.4)
        rng, want, labels = np.random.default_rng(seed), x, y
        if pasted := rng.random() < 0.5:
            want, labels = augment.cutmix(want, labels, rng)
        if blended := rng.random() < 0.4:
            want, labels, other, share = augment.mixup(want, labels, rng)
            assert targets[1][0] == 1 - share and torch.equal(targets[1][1], other)
        assert torch.equal(mixed, want) and torch.equal(targets[0][1], labels)
        assert sum(share for share, _ in targets) == pytest.approx(1) and len(targets) == 1 + blended
        seen.add((pasted, blended))
    assert len(seen) == 4
    assert torch.equal(augment.mix(x, y, np.random.default_rng(0), 0, 0)[0], x)
