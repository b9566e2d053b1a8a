"""data/boundary.py against the definitions: erosions one by one, distances between all pairs of pixels."""
import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation, binary_erosion

from data import boundary
from data.common import IGNORE


def blobs(h, w, k, seed=0, ignored=True):
    """(h, w) pred, true uint8: coarse fields of k classes, the prediction a bit off; a ninth is ignored."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, k, (-(-h // 6), -(-w // 6))).repeat(6, 0).repeat(6, 1)[:h, :w].astype(np.uint8)
    pred = np.roll(true, (2, -1), (0, 1))
    pred[rng.random((h, w)) < 0.03] = 0
    if ignored:
        true[h // 3:2 * h // 3, w // 3:2 * w // 3] = IGNORE
    return pred, true


def band_by_erosion(mask, d):
    """Cheng's reference code: pad by 1 with zeros, erode d times by 3 x 3, mask minus eroded."""
    padded = np.pad(mask, 1)
    eroded = binary_erosion(padded, np.ones((3, 3)), iterations=d)
    return mask & ~eroded[1:-1, 1:-1]


def tensors(*arrays):
    return [torch.from_numpy(a.copy()) for a in arrays]


@pytest.mark.parametrize("h, w, k, ignored", [
    (40, 60, 3, False), (33, 47, 3, True), (120, 90, 4, True), (7, 1, 2, False)])
def test_boundary_iou_is_chengs_definition_summed_over_images(h, w, k, ignored):
    d = max(1, round(0.02 * (h * h + w * w) ** 0.5))
    both, either = np.zeros(k + 1), np.zeros(k + 1)
    counts = 0
    for seed in range(2):
        pred, true = blobs(h, w, k, seed, ignored)
        counts = counts + boundary.boundary_counts(*tensors(pred, true), k + 1)  # a class that is nowhere
        for c in range(k + 1):
            a = band_by_erosion(true == c, d)
            b = band_by_erosion((pred == c) & (true != IGNORE), d)
            both[c] += (a & b).sum()
            either[c] += (a | b).sum()
    scores = boundary.boundary_iou(counts).numpy()
    assert either[k] == 0 and np.isnan(scores[k])
    seen = either > 0
    np.testing.assert_array_equal(scores[seen], both[seen] / either[seen])


def line_points(ids, c):
    """Pixels of a class with another id among the eight neighbours within the image."""
    found = []
    h, w = ids.shape
    for y, x in zip(*np.nonzero(ids == c)):
        if (ids[max(0, y - 1):y + 2, max(0, x - 1):x + 2] != c).any():
            found.append((y, x))
    return np.array(found, int).reshape(-1, 2)


def share_near(points, others):
    """How many points have one of the others at a distance of at most three pixels."""
    if not len(others):
        return 0
    squares = ((points[:, None] - others[None]) ** 2).sum(2)
    return int((squares <= 9).any(1).sum())


@pytest.mark.parametrize("k", [3, 11])  # more than eight classes are counted in two goes
def test_boundary_f1_is_its_definition_point_by_point(k):
    pred, true = blobs(40, 46, k, seed=4)
    true[:12, :12] = k  # a class that is only true, one only predicted, one nowhere
    pred[:12, :12] = 0
    pred[-12:, -12:], true[-12:, -12:] = k + 1, 0
    scores = boundary.boundary_f1(boundary.boundary_counts(*tensors(pred, true), k + 3))
    visible = np.where(true == IGNORE, IGNORE, pred)
    for c in range(k + 2):
        a, b = line_points(true, c), line_points(visible, c)
        recall, precision = share_near(a, b) / max(1, len(a)), share_near(b, a) / max(1, len(b))
        want = 2 * precision * recall / (precision + recall) if precision + recall else 0
        assert scores[c].item() == pytest.approx(want, abs=1e-12), c
    assert scores[k] == scores[k + 1] == 0 and scores[k + 2].isnan()
    assert 0 < scores[:k].min() < 1


def test_a_perfect_prediction_scores_one_also_beside_ignored_pixels():
    _, true = blobs(50, 40, 3)
    pred = true.copy()
    pred[true == IGNORE] = np.random.default_rng(1).integers(0, 3, (true == IGNORE).sum())
    counts = boundary.boundary_counts(*tensors(pred, true), 3)
    assert boundary.boundary_iou(counts).tolist() == boundary.boundary_f1(counts).tolist() == [1, 1, 1]


@pytest.mark.parametrize("radius", [1, 3, 5])
def test_pixels_near_another_label_are_ignored_as_by_a_disk(radius):
    _, true = blobs(40, 30, 3, seed=2)
    y, x = np.mgrid[-radius:radius + 1, -radius:radius + 1]
    disk = y ** 2 + x ** 2 <= radius ** 2
    near = np.zeros(true.shape, bool)
    for c in range(3):  # ISPRS: every class loses what a disk reaches from another one
        others = (true != c) & (true != IGNORE)
        near |= binary_dilation(others, disk) & (true == c)
    want = np.where(near, IGNORE, true)
    got = boundary.ignore_borders(*tensors(true), radius).numpy()
    np.testing.assert_array_equal(got, want)
    assert 0 < (want != IGNORE).sum() < (true != IGNORE).sum()


def test_one_class_has_no_border_but_the_band_along_the_rim():
    flat = torch.zeros(50, 50, dtype=torch.uint8)  # diagonal 70.7, band of one pixel
    assert torch.equal(boundary.ignore_borders(flat, 9), flat)
    counts = boundary.boundary_counts(flat, flat, 1)
    assert counts.tolist() == [[4 * 49] * 3 + [0] * 4]
