"""Segmentation metrics from one confusion matrix over the whole data set: add counts, divide once at the end.

Absent classes (neither true nor predicted) are NaN and left out of means. Beside each score: the majority baseline.
"""
import numpy as np
import torch

from .common import IGNORE


def confusion(pred: torch.Tensor, true: torch.Tensor, k: int) -> torch.Tensor:
    """pred, true: class ids of any one shape, true with IGNORE -> (k, k) int64, rows true, columns predicted."""
    # counts all 256 x 256 pairs in one pass: no slow selection of valid pixels, and no id >= k can pass for another
    pairs = torch.bincount((true.int() * 256 + pred.int()).flatten(), minlength=1 << 16).view(256, 256)
    if pairs[k:IGNORE].any() or pairs[:k, k:].any():
        raise ValueError(f"id {int(pairs[:IGNORE].nonzero().max())} in a mask or prediction of {k} classes")
    return pairs[:k, :k].contiguous()


def iou(cm: torch.Tensor) -> torch.Tensor:
    """(k,) float64 intersection over union per class."""
    tp = cm.double().diag()
    return tp / (cm.sum(0) + cm.sum(1) - tp)


def f1(cm: torch.Tensor) -> torch.Tensor:
    """(k,) float64 F1 = Dice per class."""
    tp = cm.double().diag()
    return 2 * tp / (cm.sum(0) + cm.sum(1))


def precision(cm: torch.Tensor) -> torch.Tensor:
    """(k,) float64; NaN for a class never predicted."""
    return cm.double().diag() / cm.sum(0)


def recall(cm: torch.Tensor) -> torch.Tensor:
    """(k,) float64; NaN for a class never true."""
    return cm.double().diag() / cm.sum(1)


def oa(cm: torch.Tensor) -> float:
    """Overall accuracy = single-label micro F1."""
    return (cm.double().diag().sum() / cm.sum()).item()


def averages(cm: torch.Tensor) -> dict[str, float]:
    """Accuracy; precision, recall and F1 as macro mean over the classes true or predicted, and weighted by true pixels.

    A class that is true and never predicted has precision 0 here, as in scikit-learn with zero_division=0; so leaving
    a class out cannot pay.
    """
    share = cm.sum(1).double() / cm.sum().clamp(min=1)  # an empty matrix gives 0 everywhere
    out, there = {"accuracy": (recall(cm).nan_to_num(0.0) * share).sum().item()}, cm.sum(0) + cm.sum(1) > 0
    for name, score in (("precision", precision), ("recall", recall), ("f1", f1)):
        values = score(cm).nan_to_num(0.0)
        out[f"{name}_macro"] = (values.sum() / there.sum().clamp(min=1)).item()
        out[f"{name}_weighted"] = (values * share).sum().item()
    return out


def majority(cm: torch.Tensor) -> torch.Tensor:
    """The matrix of a predictor that always says the most frequent true class: what any score must beat."""
    out = torch.zeros_like(cm)
    out[:, cm.sum(1).argmax()] = cm.sum(1)
    return out


def report(cm: torch.Tensor, names: list[str], without: dict[str, list[str]] = {}) -> dict:
    """Plain dict for results.json; NaN as None, since JSON has no NaN.

    `without`: {"5_without_clutter": ["clutter"]} adds miou_5_without_clutter and mf1_5_without_clutter, the means over
    the other rows of the same matrix: what is wrongly called clutter, or wrongly not, still counts there.
    """
    def by_class(values):
        return {n: None if v != v else round(v, 6) for n, v in zip(names, values.tolist())}

    cm = cm.cpu()
    base, more = majority(cm), {}
    for name, left_out in without.items():
        keep = torch.tensor([n not in left_out for n in names])
        more |= {f"miou_{name}": iou(cm)[keep].nanmean().item(), f"mf1_{name}": f1(cm)[keep].nanmean().item()}
    return dict(
        miou=iou(cm).nanmean().item(), oa=oa(cm), mf1=f1(cm).nanmean().item(), **more,
        classes_in_mean=int((~iou(cm).isnan()).sum()), absent=[n for n, v in zip(names, iou(cm)) if v.isnan()],
        majority_class=names[int(cm.sum(1).argmax())], majority_miou=iou(base).nanmean().item(), majority_oa=oa(base),
        iou=by_class(iou(cm)), f1=by_class(f1(cm)), precision=by_class(precision(cm)), recall=by_class(recall(cm)),
        pixels=dict(zip(names, cm.sum(1).tolist())), confusion=cm.tolist())


def headline(r: dict, without: dict[str, list[str]] = {}) -> str:
    """report() in a few lines: the means, those of `without`, and the majority baseline."""
    absent = f" (absent: {', '.join(r['absent'])})" if r["absent"] else ""
    further = [f"    {k.replace('_', ' ')}: mIoU {r[f'miou_{k}']:.4f}, mean F1 {r[f'mf1_{k}']:.4f}" for k in without]
    return "\n".join([
        f"{r['split']} mIoU {r['miou']:.4f} over {r['classes_in_mean']} of {len(r['iou'])} classes{absent}, mean F1 "
        f"{r['mf1']:.4f}, OA {r['oa']:.4f};  always {r['majority_class']!r}: mIoU {r['majority_miou']:.4f}, OA "
        f"{r['majority_oa']:.4f}", *further])


def class_table(cm: torch.Tensor, names: list[str]) -> dict[str, dict]:
    """{class: tp, fp, tn, fn, precision, recall, specificity, f1}, one class against the rest; 0 / 0 is None.

    Every row adds up to all samples, the tp and fn to the true ones of the class, the tp and fp to the predicted ones.
    """
    cm, table = cm.cpu(), {}
    for i, name in enumerate(names):
        tp = int(cm[i, i])
        fp, fn = int(cm[:, i].sum()) - tp, int(cm[i].sum()) - tp
        tn = int(cm.sum()) - tp - fp - fn
        ratios = dict(precision=(tp, tp + fp), recall=(tp, tp + fn), specificity=(tn, tn + fp),
                      f1=(2 * tp, 2 * tp + fp + fn))
        table[name] = dict(tp=tp, fp=fp, tn=tn, fn=fn, **{k: a / b if b else None for k, (a, b) in ratios.items()})
    return table


def bootstrap(hits: np.ndarray, groups: list[str], seed: int = 0, rounds: int = 2000) -> tuple[float, float]:
    """(N,) bool hits -> 95 % interval of the accuracy, by drawing whole groups (scenes) with replacement."""
    _, index = np.unique(groups, return_inverse=True)
    right, size = np.bincount(index, hits), np.bincount(index)
    pick = np.random.default_rng((6, seed)).integers(len(size), size=(rounds, len(size)))
    low, high = np.percentile(right[pick].sum(1) / size[pick].sum(1), [2.5, 97.5])
    return float(low), float(high)


def table_text(table: dict[str, dict]) -> str:
    """class_table() as lines to print."""
    width = max(map(len, table))
    lines = [f"{'class':{width}}     TP     FP     TN     FN  prec. recall  spec.     F1"]
    for name, row in table.items():
        cells = []
        for key, value in row.items():
            if value is None:
                cells.append("     -")
            else:
                cells.append(f"{value:6d}" if key in ("tp", "fp", "tn", "fn") else f"{value:6.3f}")
        lines.append(f"{name:{width}} {' '.join(cells)}")
    return "\n".join(lines)


def averages_text(row: dict) -> str:
    """averages() as one line: accuracy, then macro and weighted precision, recall and F1."""
    cells = []
    for name in ("precision", "recall", "f1"):
        cells.append(f"{name} {row[f'{name}_macro']:.3f} {row[f'{name}_weighted']:.3f}")
    return f"accuracy {row['accuracy']:.3f}  {'  '.join(cells)}  (macro, weighted)"
