"""data/metrics.py, what train_cls.py reports: a table of classes, an interval of the accuracy."""
import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from data.metrics import bootstrap, class_table, confusion, table_text


def test_the_class_table_adds_up_and_is_scikit_learns():
    rng = np.random.default_rng(0)
    # Class 3 is predicted, never true; class 4 neither.
    true, pred = rng.integers(0, 3, 200), rng.integers(0, 4, 200)
    cm = confusion(torch.tensor(pred), torch.tensor(true), 5)
    np.testing.assert_array_equal(cm, confusion_matrix(true, pred, labels=range(5)))
    table = class_table(cm, list("abcde"))
    how = dict(labels=range(4), zero_division=0)
    precision, recall, f, _ = precision_recall_fscore_support(true, pred, **how)
    for i, c in enumerate("abcd"):
        row = table[c]
        assert row["tp"] + row["fp"] + row["tn"] + row["fn"] == 200
        assert row["tp"] + row["fn"] == (true == i).sum()
        assert row["tp"] + row["fp"] == (pred == i).sum()
        assert row["precision"] == pytest.approx(precision[i]) and row["f1"] == pytest.approx(f[i])
        assert row["recall"] == (None if c == "d" else pytest.approx(recall[i]))
        others = true != i
        assert row["specificity"] == pytest.approx((others & (pred != i)).sum() / others.sum())
    assert table["e"]["f1"] is None


def test_the_table_as_text_has_a_line_per_class_and_a_dash_for_none():
    table = class_table(torch.tensor([[3, 1], [0, 0]]), ["forest", "sea"])
    head, forest, sea = table_text(table).splitlines()
    assert head.split() == ["class", "TP", "FP", "TN", "FN", "prec.", "recall", "spec.", "F1"]
    assert forest.split() == ["forest", "3", "0", "0", "1", "1.000", "0.750", "-", "0.857"]
    assert sea.split() == ["sea", "0", "1", "3", "0", "0.000", "-", "0.750", "0.000"]


def test_the_interval_is_the_binomial_one_and_wider_for_groups():
    hits = np.random.default_rng(0).random(2000) < 0.9
    low, high = bootstrap(hits, [str(i) for i in range(2000)])
    half = 1.96 * np.sqrt(hits.mean() * (1 - hits.mean()) / 2000)
    assert low == pytest.approx(hits.mean() - half, abs=2e-3)
    assert high == pytest.approx(hits.mean() + half, abs=2e-3)
    low2, high2 = bootstrap(np.sort(hits), [str(i // 20) for i in range(2000)])
    assert high2 - low2 > 2 * (high - low)
