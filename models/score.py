"""All that eval.py counts of a split, image by image, and what it reports of that.

    counts = Counts(images=24, classes=8, device=device)
    counts.add(i, y, counts.labels(y), pred)  (H, W) uint8 labels and ids
    counts.add_confidence(logits, y, counts.labels(y), pred)    and of a model (K, H, W)
    counts.over_ranks()
    report = counts.report(names, scenes, {})  plain dict for eval.json
    print(table(report))

Every count is a whole number: neither the order of images nor the number of ranks changes a digit.
"""
import math

import numpy as np
import torch
from torch import Tensor

from data import boundary, metrics, plots
from data.common import IGNORE
from data.compare import intervals

from . import run
from .calibrate import confidence

COLUMNS = {"iou": "IoU", "f1": "F1", "precision": "prec.", "recall": "recall",
           "specificity": "spec.", "boundary_iou": "b.IoU", "boundary_f1": "b.F1"}


class Counts:
    """Whole numbers per image, class and bin of confidence, of which every score is made.

    ignore_boundary: pixels so near to another label count in the scores of borders only.
    temperature: of a calibrated model, for a second calibration error.
    """

    def __init__(self, images: int, classes: int, device: torch.device, ignore_boundary: int = 0,
                 temperature: float | None = None):
        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.matrices = zeros(images, classes, classes)
        self.edges = zeros(classes, 7)  # columns of boundary.boundary_counts()
        self.bins = zeros(metrics.BINS, 3)  # columns of metrics.confidence_bins()
        self.calibrated_bins = zeros(metrics.BINS, 3)
        self.ignore_boundary = ignore_boundary
        self.temperature = temperature

    def labels(self, y: Tensor) -> Tensor:
        """(H, W) labels -> those that count: IGNORE also near borders, if that is wanted."""
        return boundary.ignore_borders(y, self.ignore_boundary) if self.ignore_boundary else y

    def add(self, i: int, y: Tensor, counted: Tensor, pred: Tensor) -> None:
        """Image number i: its labels as they are, its labels(), and its ids."""
        k = len(self.edges)
        # Borders by the labels as they are: --ignore-boundary takes away what is measured here.
        self.edges += boundary.boundary_counts(pred, y, k)
        self.matrices[i] = metrics.confusion(pred, counted, k)

    def add_confidence(self, logits: Tensor, y: Tensor, counted: Tensor, pred: Tensor) -> None:
        """Logits (K, n, W) of some rows of an image, and the same rows of what add() takes."""
        right = pred == y
        there = counted != IGNORE
        self.bins += metrics.confidence_bins(confidence(logits), right, there)
        if self.temperature:
            sure = confidence(logits, self.temperature)
            self.calibrated_bins += metrics.confidence_bins(sure, right, there)

    def over_ranks(self) -> None:
        """Adds what the other ranks have counted, and moves all to the CPU."""
        for name in ("matrices", "edges", "bins", "calibrated_bins"):
            setattr(self, name, run.over_ranks(getattr(self, name)).cpu())

    def report(self, names: list[str], scenes: list[str], without: dict) -> dict:
        """metrics.report(), and kappa, borders, calibration and intervals; NaN as None."""
        cm = self.matrices.sum(0)
        report = metrics.report(cm, names, without)
        report["kappa"] = metrics.or_none(metrics.kappa(cm))
        report["specificity"] = metrics.by_class(names, metrics.specificity(cm))
        edges = {"boundary_iou": boundary.boundary_iou(self.edges),
                 "boundary_f1": boundary.boundary_f1(self.edges)}
        for key, values in edges.items():
            report[f"mean_{key}"] = metrics.or_none(values.nanmean().item())
            report[key] = metrics.by_class(names, values)
        for key, bins in (("ece", self.bins), ("ece_calibrated", self.calibrated_bins)):
            # Masks come without confidence: nothing was counted.
            report[key] = metrics.or_none(metrics.ece(bins)) if bins.any() else None
        report["interval"] = intervals(self.matrices, scenes, names)
        return report


class Worst:
    """The `n` images with the lowest mIoU and their predictions, small enough for a picture."""

    def __init__(self, n: int = 6):
        self.n = n
        self.rows = []  # (mIoU, number of the image, predicted ids), the worst first

    def add(self, i: int, cm: Tensor, pred: Tensor) -> None:
        """Image number i, its matrix (k, k) and its ids (H, W); left out if no pixel counts."""
        miou = metrics.iou(cm).nanmean().item()
        if math.isnan(miou):
            return
        if len(self.rows) == self.n and miou > self.rows[-1][0]:
            return
        # Kept at the size of the picture: six scenes as they are may not fit into memory.
        small = plots.scaled(pred.cpu().numpy(), plots.PANEL, is_mask=True)
        self.keep([*self.rows, (miou, i, np.asarray(small))])

    def keep(self, rows: list[tuple]) -> None:
        # Of equal mIoU the first image of the split, so that ranks change nothing.
        self.rows = sorted(rows, key=lambda row: row[:2])[:self.n]

    def over_ranks(self) -> None:
        """The worst of all ranks."""
        self.keep(run.from_all_ranks(self.rows))


# ---- text

def table(report: dict) -> str:
    """Lines: the scores of every class."""
    width = max(map(len, report["iou"]))
    titles = " ".join(f"{title:>6}" for title in COLUMNS.values())
    lines = [f"{'class':{width}} {titles}   share   95 % interval of IoU"]
    total = sum(report["pixels"].values())
    for name in report["iou"]:
        cells = []
        for key in COLUMNS:
            value = report[key][name]
            cells.append("   nan" if value is None else f"{value:6.3f}")
        share = report["pixels"][name] / total
        interval = interval_text(report["interval"]["iou"][name])
        lines.append(f"{name:{width}} {' '.join(cells)} {share:7.2%}   {interval}")
    return "\n".join(lines)


def further(report: dict) -> str:
    """A line: the scores of all classes that the headline does not have."""
    interval = report["interval"]
    parts = [f"mIoU 95 % interval {interval_text(interval['miou'])} ({interval['scenes']} scenes)"]
    titles = {"kappa": "kappa", "mean_boundary_iou": "boundary IoU", "mean_boundary_f1": "F1",
              "ece": "calibration error", "ece_calibrated": "calibrated"}
    for key, title in titles.items():
        if report[key] is not None:
            parts.append(f"{title} {report[key]:.4f}")
    return "    " + ", ".join(parts)


def interval_text(pair: list[float] | None) -> str:
    return "-" if pair is None else f"{pair[0]:.3f} to {pair[1]:.3f}"
