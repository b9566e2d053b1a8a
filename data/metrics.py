"""Segmentation metrics from one confusion matrix over the whole data set.

    cm += confusion(pred, true, k)    add counts over all images, divide once at the end
    r = report(cm, names)             mIoU, OA, mean F1 and a row per class, for results.json
    bins += confidence_bins(p, right)    the same for calibration: ece(bins)

Absent classes (neither true nor predicted) are NaN and left out of means. Beside each score stands
the majority baseline: a predictor that always says the most frequent class.
"""
import numpy as np
import torch
from torch import Tensor

from .common import IGNORE

BINS = 15  # of the confidence, for the calibration error
UNIT = 2**24  # of sums of confidences: a float from 0.5 on is a multiple of 1 / UNIT


# ---- counting

def confusion(pred: Tensor, true: Tensor, k: int) -> Tensor:
    """pred, true: class ids of any one shape, true with IGNORE -> (k, k) int64, rows true.

    An id that is no class is a ValueError; what is ignored has the id 255 in `true`, not -1.
    """
    if pred.shape != true.shape:
        raise ValueError(f"a prediction {tuple(pred.shape)} of a mask {tuple(true.shape)}")
    for ids in (pred, true):
        if ids.dtype != torch.uint8 and ids.numel() and (ids.min() < 0 or ids.max() > 255):
            raise ValueError(f"ids {int(ids.min())}..{int(ids.max())}; expected 0..255")
    # Count all 256 x 256 pairs in one pass. That needs no slow selection of valid pixels, and no id
    # from k on can pass for another one.
    pair = true.int() * 256 + pred.int()
    counts = torch.bincount(pair.flatten(), minlength=256 * 256)
    counts = counts.view(256, 256)
    if counts[k:IGNORE].any() or counts[:k, k:].any():
        strange = int(counts[:IGNORE].nonzero().max())
        raise ValueError(f"id {strange} in a mask or prediction of {k} classes")
    return counts[:k, :k].contiguous()


def count_pairs_(cm: Tensor, pred: Tensor, true: Tensor) -> None:
    """Add the counts of confusion() to cm (k, k) int64, in place and without a check of the ids."""
    # For use in a training step: nothing here waits for a GPU, as torch.bincount and checks would.
    # One bin more than pairs takes the ignored pixels.
    k = len(cm)
    pair = true.long() * k + pred
    pair = pair.masked_fill(true == IGNORE, k * k).flatten()
    counts = cm.new_zeros(k * k + 1)
    counts.scatter_add_(0, pair, torch.ones_like(pair))
    cm += counts[:-1].view(k, k)


# ---- scores of a matrix (k, k)
# In float64, which holds counts up to 2**53 exactly. 0 / 0 is NaN: the class is absent.

def iou(cm: Tensor) -> Tensor:
    """(k,) float64 intersection over union per class."""
    tp = cm.double().diag()
    return tp / (cm.sum(0) + cm.sum(1) - tp)


def f1(cm: Tensor) -> Tensor:
    """(k,) float64 F1 = Dice per class."""
    tp = cm.double().diag()
    return 2 * tp / (cm.sum(0) + cm.sum(1))


def precision(cm: Tensor) -> Tensor:
    """(k,) float64; NaN for a class never predicted."""
    return cm.double().diag() / cm.sum(0)


def recall(cm: Tensor) -> Tensor:
    """(k,) float64; NaN for a class never true."""
    return cm.double().diag() / cm.sum(1)


def specificity(cm: Tensor) -> Tensor:
    """(k,) float64, one class against the rest; NaN where every pixel is of the class."""
    others = (cm.sum() - cm.sum(1)).double()
    false = cm.sum(0) - cm.diag()
    return (others - false) / others


def kappa(cm: Tensor) -> float:
    """Cohen's kappa: agreement beyond chance, from 0 for chance to 1; NaN if there is one class."""
    total = cm.sum().double()
    chance = (cm.sum(0).double() / total * (cm.sum(1) / total)).sum()
    # Where chance alone agrees everywhere nothing is left to divide by.
    return ((oa(cm) - chance) / (1 - chance)).item() if chance < 1 else float("nan")


def oa(cm: Tensor) -> float:
    """Overall accuracy = single-label micro F1."""
    hits = cm.double().diag().sum()
    return (hits / cm.sum()).item()


def averages(cm: Tensor) -> dict[str, float]:
    """Accuracy; precision, recall and F1, as macro mean and weighted by the true pixels.

    The macro mean is over the classes true or predicted. A class that is true and never predicted
    has precision 0, as in scikit-learn with zero_division=0. An empty matrix gives 0 everywhere.
    """
    # If such a class were left out instead, never predicting a hard class would pay.
    share = cm.sum(1).double() / cm.sum().clamp(min=1)
    present = (cm.sum(0) + cm.sum(1) > 0).sum().clamp(min=1)
    hits = recall(cm).nan_to_num(0.0) * share
    out = {"accuracy": hits.sum().item()}
    for name, score in (("precision", precision), ("recall", recall), ("f1", f1)):
        values = score(cm).nan_to_num(0.0)
        out[f"{name}_macro"] = (values.sum() / present).item()
        out[f"{name}_weighted"] = (values * share).sum().item()
    return out


def majority(cm: Tensor) -> Tensor:
    """The matrix of a predictor that always says the most frequent true class."""
    true = cm.sum(1)
    out = torch.zeros_like(cm)
    out[:, true.argmax()] = true
    return out


# ---- reports

def report(cm: Tensor, names: list[str], without: dict[str, list[str]] = {}) -> dict:
    """Plain dict for results.json; NaN as None, since JSON has no NaN.

    without={"5_without_clutter": ["clutter"]} adds miou_5_without_clutter and
    mf1_5_without_clutter, the means over the other rows of the same matrix: what is wrongly called
    clutter, or wrongly not, still counts there.
    """
    cm = cm.cpu()
    true = cm.sum(1)
    ious = iou(cm)
    f1s = f1(cm)
    baseline = majority(cm)
    # The means first: they are what people look for in the file.
    out = {
        "miou": ious.nanmean().item(),
        "oa": oa(cm),
        "mf1": f1s.nanmean().item(),
    }
    for name, left_out in without.items():
        # Rows left out of the mean only: the matrix stays as it is.
        kept = torch.tensor([n not in left_out for n in names])
        out[f"miou_{name}"] = ious[kept].nanmean().item()
        out[f"mf1_{name}"] = f1s[kept].nanmean().item()
    absent = ious.isnan()
    out |= {
        "classes_in_mean": int((~absent).sum()),
        "absent": [n for n, gone in zip(names, absent) if gone],
        # What every score must be compared with.
        "majority_class": names[int(true.argmax())],
        "majority_miou": iou(baseline).nanmean().item(),
        "majority_oa": oa(baseline),
        "iou": by_class(names, ious),
        "f1": by_class(names, f1s),
        "precision": by_class(names, precision(cm)),
        "recall": by_class(names, recall(cm)),
        "pixels": dict(zip(names, true.tolist())),
        "confusion": cm.tolist(),
    }
    return out


def by_class(names: list[str], values: Tensor) -> dict[str, float | None]:
    """{class: score}, None for NaN."""
    return {name: or_none(value) for name, value in zip(names, values.tolist())}


def or_none(value: float) -> float | None:
    """Six digits, so that the files stay readable; JSON has no NaN."""
    return None if np.isnan(value) else round(value, 6)


def headline(r: dict, without: dict[str, list[str]] = {}) -> str:
    """report() and r["split"] in a few lines: means, those of `without`, the majority baseline."""
    absent = ""
    if r["absent"]:
        absent = f" (absent: {', '.join(r['absent'])})"
    first = (
        f"{r['split']} mIoU {r['miou']:.4f} over {r['classes_in_mean']} of {len(r['iou'])} classes"
        f"{absent}, mean F1 {r['mf1']:.4f}, OA {r['oa']:.4f};  "
        f"always {r['majority_class']!r}: mIoU {r['majority_miou']:.4f}, OA {r['majority_oa']:.4f}")
    # One line each for the means that leave a class out.
    lines = [first]
    for name in without:
        miou = r[f"miou_{name}"]
        mf1 = r[f"mf1_{name}"]
        title = name.replace("_", " ")
        lines.append(f"    {title}: mIoU {miou:.4f}, mean F1 {mf1:.4f}")
    return "\n".join(lines)


def class_table(cm: Tensor, names: list[str]) -> dict[str, dict]:
    """{class: tp, fp, tn, fn, precision, recall, specificity, f1}, one class against the rest.

    Every row adds up to all samples, tp and fn to the true ones of the class, tp and fp to the
    predicted ones. 0 / 0 is None.
    """
    cm = cm.cpu()
    table = {}
    for i, name in enumerate(names):
        # True and false, positives and negatives, as Python ints for JSON.
        tp = int(cm[i, i])
        fp = int(cm[:, i].sum()) - tp
        fn = int(cm[i].sum()) - tp
        tn = int(cm.sum()) - tp - fp - fn
        table[name] = {
            "tp": tp,
            "fp": fp,
            "tn": tn,
            "fn": fn,
            "precision": ratio(tp, tp + fp),
            "recall": ratio(tp, tp + fn),
            "specificity": ratio(tn, tn + fp),
            "f1": ratio(2 * tp, 2 * tp + fp + fn),
        }
    return table


def ratio(a: int, b: int) -> float | None:
    return a / b if b else None


# ---- calibration
# Where a calibrated model gives the winner a probability of 0.8, 80 % of the pixels are right.

def confidence_bins(confidence: Tensor, right: Tensor, counted: Tensor | None = None) -> Tensor:
    """Confidence of the winner and whether it is right, of one shape -> (BINS, 3) int64 to add up.

    Per bin of equal width: pixels, right ones, sum of the confidence in units of 1 / UNIT. counted:
    bool, False for pixels to leave out.
    """
    bins = (confidence * BINS).int().clamp_(0, BINS - 1)
    if counted is not None:
        bins = bins.masked_fill_(~counted, BINS)  # one bin more takes what does not count
    bins = bins.flatten()
    # Whole numbers add up to the same in any order, over any number of ranks.
    units = (confidence.double() * UNIT).round_().flatten()
    columns = [
        torch.bincount(bins, minlength=BINS + 1),
        torch.bincount(bins, right.double().flatten(), BINS + 1).long(),
        torch.bincount(bins, units, BINS + 1).long(),
    ]
    return torch.stack(columns, dim=1)[:BINS]


def reliability(bins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """confidence_bins() -> share of all pixels, mean confidence and accuracy, (BINS,) float64 each.

    In an empty bin the share is 0, the others are NaN.
    """
    pixels, right, units = bins.double().unbind(1)
    return pixels / pixels.sum(), units / UNIT / pixels, right / pixels


def ece(bins: Tensor) -> float:
    """Expected calibration error: mean over pixels of |accuracy - confidence| of their bin."""
    share, confidence, accuracy = reliability(bins)
    return (share * (accuracy - confidence).abs()).nansum().item()


# ---- intervals
# Images of one scene resemble each other: drawn one by one, the interval would be too narrow.

def bootstrap(hits: np.ndarray, groups: list[str], seed: int = 0,
              rounds: int = 2000) -> tuple[float, float]:
    """(N,) bool hits -> 95 % interval of the accuracy, by drawing whole groups with replacement."""
    _, index = np.unique(groups, return_inverse=True)
    right = np.bincount(index, hits)
    size = np.bincount(index)
    # The 6 keeps these draws apart from all others of the same seed.
    rng = np.random.default_rng((6, seed))
    drawn = rng.integers(len(size), size=(rounds, len(size)))
    # One accuracy a round, over all images of the groups drawn.
    accuracy = right[drawn].sum(1) / size[drawn].sum(1)
    low, high = np.percentile(accuracy, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_iou(matrices: Tensor, groups: list[str], seed: int = 0, rounds: int = 1000) -> Tensor:
    """(N, k, k) matrices of images -> (rounds, k) IoU of as many whole groups, drawn anew.

    With the same groups and seed, two models have the same draws: their difference is a paired one.
    """
    _, index = np.unique(groups, return_inverse=True)
    index = torch.from_numpy(index)
    G = int(index.max()) + 1
    matrices = matrices.double()
    hits = matrices.diagonal(dim1=1, dim2=2)
    parts = torch.cat([hits, matrices.sum(1) + matrices.sum(2) - hits], dim=1)  # (N, 2 k)
    parts = parts.new_zeros(G, parts.shape[1]).index_add_(0, index, parts)
    # The 9 keeps these draws apart from all others of the same seed.
    rng = np.random.default_rng((9, seed))
    out = []
    for _ in range(rounds):
        times = np.bincount(rng.integers(G, size=G), minlength=G)
        both, either = (torch.from_numpy(times).double() @ parts).chunk(2)
        out.append(both / either)
    return torch.stack(out)


def interval(values: Tensor) -> list[float] | None:
    """(rounds,) -> [2.5 %, 97.5 %] of those that are numbers; None if there is none."""
    values = values[~values.isnan()].numpy()
    if not len(values):
        return None
    low, high = np.percentile(values, [2.5, 97.5]).tolist()
    return [round(low, 6), round(high, 6)]


# ---- text

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
