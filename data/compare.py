"""What eval.py leaves for comparisons: matrices of single images, intervals, paired differences.

    intervals(matrices, scenes, names)             95 % intervals of mIoU and of every class
    write("scenes.csv", scene_table(...))          a row per image
    write("matrices.npz", pack_matrices(...))      what compare() reads
    print(compare(read_scored("runs/a"), read_scored("runs/b")))     which is better, how surely
"""
import io
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import metrics
from .common import SHORT, BadInput, check_file, csv_text, file_sha256, read_json, without_nan

# What two results must have in common to be compared, in eval.json's protocol.
SAME = {
    "dataset": "data set", "variant": "variant", "split": "split", "files": "images of the split",
    "classes": "classes", "ignore": "ignored values", "ignore_boundary": "--ignore-boundary",
}

# Keys of the protocol that may differ from the results that are replaced: the run was trained
# further, the data were moved, a calibration was added, the machine is another one.
MAY_CHANGE = {"weights", "root", "temperature", "amp"}
PATHS = {"run", "masks"}  # of its keys: equal where they lead to the same place


# ---- intervals

def intervals(matrices: Tensor, scenes: list[str], names: list[str]) -> dict:
    """(N, k, k) per image -> 95 % intervals of mIoU and each class, whole scenes drawn anew."""
    number = len(set(scenes))
    if number < 2:  # nothing to draw from
        return dict(scenes=number, miou=None, iou={name: None for name in names})
    draws = metrics.bootstrap_iou(matrices, scenes)
    columns = zip(names, draws.unbind(1))
    return dict(scenes=number, draws=len(draws), miou=metrics.interval(draws.nanmean(1)),
                iou={name: metrics.interval(column) for name, column in columns})


def scene_table(images: list[str], scenes: list[str], matrices: Tensor, names: list[str]) -> str:
    """CSV: image, scene, mIoU of the classes in it, OA, pixels, IoU of each class or nothing."""
    table = [["image", "scene", "mIoU", "OA", "pixels", *(f"IoU {name}" for name in names)]]
    for image, scene, cm in zip(images, scenes, matrices):
        ious = metrics.iou(cm)
        cells = [image, scene, digits(ious.nanmean().item()), digits(metrics.oa(cm)), int(cm.sum())]
        table.append([*cells, *map(digits, ious.tolist())])
    return csv_text(table)


def digits(value: float) -> str:
    """Six of them, as in by_class(); nothing for NaN."""
    return "" if np.isnan(value) else f"{value:.6f}"


# ---- results that can be compared

class Scored(NamedTuple):
    """An evaluation: where it is from, eval.json, and per image its name, scene and matrix."""
    path: Path
    report: dict
    images: list[str]
    scenes: list[str]
    matrices: Tensor  # (N, k, k) int64


def pack_matrices(images: list[str], scenes: list[str], matrices: Tensor) -> bytes:
    """The bytes of matrices.npz, without pickled objects."""
    file = io.BytesIO()
    np.savez_compressed(file, images=np.array(images), scenes=np.array(scenes),
                        matrices=matrices.numpy())
    return file.getvalue()


def read_scored(path: str | Path, split: str | None = None) -> Scored:
    """A run folder, a folder of eval.py's results, or the eval.json in it."""
    folder = Path(path)
    if folder.name == "eval.json":
        folder = folder.parent
    if not folder.exists():
        raise BadInput(f"{folder}: no such folder; name a run, or a folder that eval.py has written")
    if (folder / "protocol.json").exists() and "accuracy" in read_results(folder):
        raise BadInput(f"{folder}: a run of train_cls.py; --compare is for segmentation, type "
                       f"python eval.py --summary {folder} ... for its table")
    # A run folder: the results of one of its splits lie below it.
    if (folder / "protocol.json").exists() and not (folder / "eval.json").exists():
        split = split or read_json(folder / "protocol.json").get("reported")
        folder = folder / f"eval-{split}"
    report = read_json(folder / "eval.json") if (folder / "eval.json").exists() else {}
    scored = report.get("protocol", {}).get("split")
    if split and scored and scored != split:
        raise BadInput(f"{folder}: scores of {scored}, not of --split {split}; name a run, or leave "
                       "--split out")
    file = folder / "matrices.npz"
    if not file.exists() or "protocol" not in report:
        wanted = f" --split {split}" if split else ""
        raise BadInput(f"{folder}: no eval.json with a matrices.npz beside it; type python eval.py "
                       f"{path}{wanted} first")
    check_file(file)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images, scenes = arrays["images"].tolist(), arrays["scenes"].tolist()
            matrices = torch.from_numpy(arrays["matrices"])
        fits = matrices.sum(0).tolist() == report["confusion"] and len(images) == len(matrices)
    except (OSError, EOFError, ValueError, LookupError, TypeError, RuntimeError, zlib.error,
            zipfile.BadZipFile):
        fits = False
    if not fits:
        raise BadInput(f"{file}: does not belong to the eval.json beside it; score the split again "
                       "with eval.py --overwrite")
    check_weights(folder, report["protocol"])
    return Scored(folder, report, images, scenes, matrices)


def read_results(run: Path) -> dict:
    """A run's results.json, {} without one."""
    file = run / "results.json"
    return read_json(file) if file.exists() else {}


def check_weights(folder: Path, protocol: dict) -> None:
    """BadInput where the run around the results has been trained on since."""
    weights = folder.parent / "best.safetensors"
    averaged = any(protocol.get(flag, "none") != "none" for flag in ("tta", "with", "soup"))
    if protocol.get("masks") or averaged or not weights.exists():
        return
    if protocol.get("weights") not in (None, file_sha256(weights)):
        raise BadInput(f"{folder}: results of earlier weights than {weights}; type python eval.py "
                       f"{folder.parent} --split {protocol['split']} first")


def check_earlier(folder: Path, protocol: dict, in_run: bool) -> None:
    """BadInput where the results in a folder are of another protocol than those to come.

    in_run: the folder is the run's own, wherever that lies by now.
    """
    file = folder / "eval.json"
    before = read_json(file).get("protocol", {}) if file.exists() else {}
    found = []
    for key, now in without_nan(protocol).items():
        was = before.get(key, now)  # earlier versions have kept fewer
        equal = was == now
        if key in PATHS and was and now:
            equal = Path(was).resolve() == Path(now).resolve()
        if not equal and key not in MAY_CHANGE and not (in_run and key == "run"):
            found.append(f"{key} {SHORT.repr(was)}, now {SHORT.repr(now)}")
    if found:
        raise BadInput(f"{folder}: holds results of another protocol ({'; '.join(found)}); name "
                       "another --out, or type --overwrite to replace them")


def differences(a: Scored, b: Scored) -> list[str]:
    """What keeps two results from being compared, in words: "split: test and val"."""
    ours, theirs = a.report["protocol"], b.report["protocol"]
    found = []
    for key, title in SAME.items():
        pair = [ours.get(key), theirs.get(key)]
        if key == "classes":  # in any order
            pair = [sorted(names) for names in pair]
        if pair[0] != pair[1]:
            found.append(f"{title}: {pair[0]} and {pair[1]}")
    if found:
        return found
    # The same names may hold other labels by now: the true pixels of every image must agree.
    if a.images != b.images or a.scenes != b.scenes:
        return ["names or scenes of the images"]
    if not torch.equal(a.matrices.sum(2), in_order(b, ours["classes"]).sum(2)):
        return ["labels: the masks hold other numbers of pixels per class"]
    return []


def in_order(scored: Scored, names: list[str]) -> Tensor:
    """(N, k, k) with the classes in this order."""
    own = scored.report["protocol"]["classes"]
    order = torch.tensor([own.index(name) for name in names])
    return scored.matrices[:, order][:, :, order]


def compare(a: Scored, b: Scored) -> str:
    """Lines: scores of both, b minus a with its 95 % interval, from the same draws of scenes."""
    found = differences(a, b)
    if found:
        raise BadInput(f"{a.path} and {b.path} cannot be compared, they differ in "
                       f"{'; '.join(found)}; score both with the same data, --split and flags")
    names = a.report["protocol"]["classes"]
    matrices_of_both = [a.matrices, in_order(b, names)]
    # The same scenes are drawn for both. What makes a draw easy for one does so for the other and
    # cancels in the difference, which single intervals do not show.
    number = len(set(a.scenes))
    draws = [torch.full((1, len(names)), torch.nan)] * 2  # of one scene: no interval
    if number > 1:
        draws = [metrics.bootstrap_iou(matrices, a.scenes) for matrices in matrices_of_both]
    ious = [metrics.iou(matrices.sum(0)) for matrices in matrices_of_both]

    lines = [f"A {a.path}", f"B {b.path}",
             f"{len(a.images)} images, {number} scenes, drawn anew together for both"]
    if number < 2:
        lines[-1] = f"{len(a.images)} images of one scene: no intervals"
    rows = [("mIoU", [iou.nanmean() for iou in ious], draws[1].nanmean(1) - draws[0].nanmean(1))]
    for i, name in enumerate(names):
        rows.append((name, [iou[i] for iou in ious], draws[1][:, i] - draws[0][:, i]))

    width = max(map(len, ["mIoU", *names]))
    lines.append(f"{'':{width}}       A       B    B - A   95 % interval")
    for name, (score_a, score_b), difference in rows:
        scores = f"{score_a:7.4f} {score_b:7.4f}  {score_b - score_a:+.4f}"
        # A class that neither has is nan, without a sign.
        scores = scores.replace("+nan", "    nan")
        lines.append(f"{name:{width}} {scores}  {verdict(difference)}")
    return "\n".join(lines)


def verdict(difference: Tensor) -> str:
    """Drawn differences -> "+0.0102 to +0.0300  B is better"; nothing is better if 0 is inside."""
    found = metrics.interval(difference)
    if found is None:
        return "-"
    low, high = found
    better = ""
    if low > 0:
        better = "  B is better"
    if high < 0:
        better = "  A is better"
    return f"{low:+.4f} to {high:+.4f}{better}"
