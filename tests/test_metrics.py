"""data/metrics.py against the set definitions and torchmetrics."""
import itertools
import json

import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as tm
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from data import metrics
from data.common import IGNORE


def drawn(n=600):
    """pred, true of n pixels: class 3 is predicted but never true, class 4 in neither, a sixth is ignored."""
    pred, true = torch.from_numpy(np.random.default_rng(0).integers(0, (4, 3), (n, 2)).T.copy())
    true[: n // 6] = IGNORE
    return pred, true


def test_scores_are_the_set_definitions():
    pred, true = drawn()
    valid = [i for i in range(600) if true[i] != 255]
    A = [{i for i in valid if true[i] == c} for c in range(5)]
    B = [{i for i in valid if pred[i] == c} for c in range(5)]
    cm = metrics.confusion(pred, true, 5)
    assert cm.tolist() == [[len(a & b) for b in B] for a in A]

    def ratio(f, g):
        return torch.tensor([f(a, b) / g(a, b) if g(a, b) else torch.nan for a, b in zip(A, B)], dtype=torch.float64)

    for score, f, g in ((metrics.iou, lambda a, b: len(a & b), lambda a, b: len(a | b)),
                        (metrics.f1, lambda a, b: 2 * len(a & b), lambda a, b: len(a) + len(b)),
                        (metrics.precision, lambda a, b: len(a & b), lambda a, b: len(b)),
                        (metrics.recall, lambda a, b: len(a & b), lambda a, b: len(a))):
        torch.testing.assert_close(score(cm), ratio(f, g), rtol=0, atol=0, equal_nan=True)
    assert metrics.iou(cm)[3] == 0 and metrics.iou(cm)[4].isnan()
    assert metrics.oa(cm) == sum(int(pred[i] == true[i]) for i in valid) / len(valid)


def test_scores_are_those_of_torchmetrics():
    pred, true = (t[t2 != 9] for t, t2 in zip(drawn(), drawn()[::-1]))
    cm, how = metrics.confusion(pred, true, 4), dict(num_classes=4, ignore_index=IGNORE, average="none")
    for ours, theirs in ((metrics.iou, tm.multiclass_jaccard_index), (metrics.f1, tm.multiclass_f1_score),
                         (metrics.precision, tm.multiclass_precision)):
        torch.testing.assert_close(ours(cm).float(), theirs(pred, true, **how))
    torch.testing.assert_close(metrics.recall(cm)[:3].float(), tm.multiclass_recall(pred, true, **how)[:3])
    micro = tm.multiclass_f1_score(pred, true, 4, average="micro", ignore_index=IGNORE)
    assert metrics.oa(cm) == pytest.approx(micro.item())


def test_batches_and_shards_give_one_matrix():
    pred, true = drawn(60)
    whole = metrics.confusion(pred, true, 5)
    for n in (1, 7):
        parts = zip(pred.split(n), true.split(n))
        assert torch.equal(sum(metrics.confusion(p, t, 5) for p, t in parts), whole)
    assert torch.equal(sum(metrics.confusion(pred[r::3], true[r::3], 5) for r in range(3)), whole)
    assert torch.equal(metrics.confusion(pred.byte().view(6, 10), true.byte().view(6, 10), 5), whole)


@pytest.mark.parametrize("bad", [5, 6, 30, 254, 300, -1])
@pytest.mark.parametrize("where", ["pred", "true"])
def test_an_id_that_is_no_class_fails_and_never_counts_for_another(where, bad):
    for good in (0, 1, 4):
        pair = {"pred": torch.full((9,), good), "true": torch.full((9,), good)}
        pair[where][3] = bad
        with pytest.raises((ValueError, RuntimeError)):
            metrics.confusion(**pair, k=5)
    ignored = metrics.confusion(torch.full((9,), 77), torch.full((9,), IGNORE), 5)  # nobody looks there
    assert ignored.shape == (5, 5) and not ignored.any()


def test_report_names_the_absent_and_the_baseline():
    cm = torch.diag(torch.tensor([70, 20, 10, 0, 0]))
    cm[0, 3] = 20  # predicted, never true
    r = metrics.report(cm, list("abcde"))
    assert json.loads(json.dumps(r, allow_nan=False)) == r
    assert r["absent"] == ["e"] and r["classes_in_mean"] == 4 and r["iou"]["e"] is None and r["iou"]["d"] == 0
    assert r["miou"] == pytest.approx((70 / 90 + 1 + 1 + 0) / 4) and r["oa"] == pytest.approx(100 / 120)
    share = 90 / 120  # always "a": its IoU is its share, the other two classes have 0, OA is the share
    assert r["majority_class"] == "a" and r["majority_oa"] == share and r["majority_miou"] == pytest.approx(share / 3)
    assert r["pixels"] == dict(a=90, b=20, c=10, d=0, e=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_counting_without_checks_adds_the_same_matrix(dtype):
    pred, true = (t.to(dtype).view(6, 10) for t in drawn(60))
    cm = torch.arange(25).view(5, 5)
    metrics.count_pairs_(cm, pred, true)
    assert torch.equal(cm, torch.arange(25).view(5, 5) + metrics.confusion(pred, true, 5))
    before = cm.clone()
    metrics.count_pairs_(cm, torch.full((9,), 77, dtype=dtype), torch.full((9,), IGNORE, dtype=dtype))
    assert torch.equal(cm, before)  # what is predicted on ignored pixels does not count, whatever it is


def test_kappa_and_specificity_are_scikit_learns():
    pred, true = drawn()
    valid = true != IGNORE
    cm = metrics.confusion(pred, true, 5)
    assert metrics.kappa(cm) == pytest.approx(cohen_kappa_score(true[valid], pred[valid]), abs=1e-12)
    for c, got in enumerate(metrics.specificity(cm).tolist()):
        tn, fp, _, _ = confusion_matrix(true[valid] == c, pred[valid] == c, labels=[False, True]).flatten()
        assert got == tn / (tn + fp)
    assert metrics.kappa(torch.tensor([[5, 5], [5, 5]])) == 0 and metrics.kappa(torch.eye(3)) == 1
    one_class = torch.tensor([[7, 0], [0, 0]])
    assert np.isnan(metrics.kappa(one_class)) and metrics.specificity(one_class)[0].isnan()


def test_the_calibration_error_is_torchmetrics_and_that_of_a_sum_over_bins():
    g = torch.Generator().manual_seed(3)
    z = 2 * torch.randn(4000, 5, generator=g)
    true = torch.multinomial((0.5 * z).softmax(1), 1, generator=g)[:, 0]
    confidence, pred = z.softmax(1).max(1)
    bins = sum(metrics.confidence_bins(c, r) for c, r in zip(confidence.view(40, 100), (pred == true).view(40, 100)))
    theirs = tm.multiclass_calibration_error(z, true, 5, n_bins=15, norm="l1").item()
    assert metrics.ece(bins) == pytest.approx(theirs, abs=1e-6) and theirs > 0.05
    by_hand = 0
    for low in range(15):
        here = [i for i, c in enumerate(confidence.tolist()) if low <= 15 * c < low + 1]
        right = sum(int(pred[i] == true[i]) for i in here)
        by_hand += abs(right - sum(confidence[here].tolist())) / 4000
    assert metrics.ece(bins) == pytest.approx(by_hand, abs=1e-7)
    sure = metrics.confidence_bins(torch.ones(4), torch.tensor([True, True, True, False]))
    assert metrics.ece(sure) == 0.25 and sure[-1].tolist() == [4, 3, 4 * 2**24]


def test_the_interval_of_iou_draws_whole_scenes():
    rng = np.random.default_rng(0)
    matrices = torch.from_numpy(rng.integers(0, 50, (6, 3, 3)))
    matrices[:, 2] = matrices[:, :, 2] = 0  # a class that is nowhere
    groups = ["a", "b", "c", "a", "b", "a"]
    draws = metrics.bootstrap_iou(matrices, groups, rounds=300)
    assert draws.shape == (300, 3) and draws[:, 2].isnan().all() and metrics.interval(draws[:, 2]) is None

    possible = set()  # IoU of class 0 for all 27 draws of three scenes
    for drawn in itertools.product("abc", repeat=3):
        cm = sum(matrices[i] * drawn.count(g) for i, g in enumerate(groups)).numpy()
        possible.add(round(float(cm[0, 0] / (cm[0].sum() + cm[:, 0].sum() - cm[0, 0])), 9))
    assert {round(v, 9) for v in draws[:, 0].tolist()} == possible and len(possible) == 10
    low, high = metrics.interval(draws[:, 0])
    assert min(possible) - 1e-6 <= low < high <= max(possible) + 1e-6
    assert torch.equal(draws[:, :2], metrics.bootstrap_iou(matrices, groups, rounds=300)[:, :2])


def test_the_interval_is_as_wide_as_theory_says():
    hits = torch.from_numpy(np.random.default_rng(1).random(400) < 0.3)
    matrices = torch.zeros(400, 2, 2, dtype=torch.int64)
    matrices[hits, 0, 0] = 1
    matrices[~hits, 0, 1] = 1  # so the IoU of class 0 is the share of the hits
    low, high = metrics.interval(metrics.bootstrap_iou(matrices, list(range(400)))[:, 0])
    share = hits.double().mean().item()
    half = 1.96 * (share * (1 - share) / 400) ** 0.5
    assert low == pytest.approx(share - half, abs=0.006) and high == pytest.approx(share + half, abs=0.006)
