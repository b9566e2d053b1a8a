"""Time of one confusion matrix of 8 x 512 x 512 pixels and 8 classes, a tenth ignored, and of the argmax before it.

    python tests/bench_metrics.py                   best of 20, in turns, so that a busy machine slows all rows alike
"""
import sys
import time
from pathlib import Path

import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

sys.path.insert(0, str(Path(__file__).parents[1]))
from data.common import IGNORE
from data.metrics import confusion

K = 8


def selected(pred, true):
    keep = true != IGNORE
    return torch.bincount(true[keep] * K + pred[keep], minlength=K * K).view(K, K)


def extra_bin(pred, true):
    bins = torch.where(true == IGNORE, 0, true * K + pred + 1).flatten()
    return torch.bincount(bins, minlength=K * K + 1)[1:].view(K, K)


def torchmetrics(pred, true):
    return multiclass_confusion_matrix(pred, true, K, ignore_index=IGNORE)


def main(repeat=20):
    torch.manual_seed(0)
    torch.set_num_threads(1)  # bincount has no more, and one thread need not wait for another on a busy machine
    logits = torch.randn(8, K, 512, 512)
    true, pred = torch.randint(K, (8, 512, 512)), logits.max(1).indices
    true[torch.rand(true.shape) < 0.1] = IGNORE
    rows = {"data.metrics.confusion": lambda: confusion(pred, true, K),
            "bincount, ignored in a bin of their own": lambda: extra_bin(pred, true),
            "bincount of the selected valid pixels": lambda: selected(pred, true),
            "torchmetrics": lambda: torchmetrics(pred, true),
            "logits.max(1).indices": lambda: logits.max(1).indices,
            "logits.argmax(1)": lambda: logits.argmax(1)}
    assert all(torch.equal(f(), confusion(pred, true, K)) for f in list(rows.values())[:4])
    best = dict.fromkeys(rows, float("inf"))
    for _ in range(repeat):
        for name, f in rows.items():
            start = time.perf_counter()
            f()
            best[name] = min(best[name], time.perf_counter() - start)
    print(f"{'one thread':42}[ms]")
    for name, seconds in best.items():
        print(f"{name:40} {seconds * 1e3:6.1f}")


if __name__ == "__main__":
    main()
