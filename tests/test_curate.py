"""data.curate: wrong labels are found, shown, decided about and mended in new masks; the originals stay."""
import csv
import hashlib
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from data.common import write
from data.curate.__main__ import main
from data.curate.predicted import Predicted
from data.curate.regions import from_runs, to_runs
from data.tiff import write_tiff
from folder_sets import save

COLORS = ["#000080", "#FF0000", "#00C000"]
CLASSES = [{"name": "land", "id": 10, "color": COLORS[0]}, {"name": "<script>", "id": 20, "color": COLORS[1]},
           {"name": "water", "id": 30, "color": COLORS[2]}]
H, W = 60, 70
WRONG = (slice(10, 20), slice(15, 35))  # water that the masks of images/0 to 3 call land
RAW = np.array([10, 20, 30] + [255] * 253, np.uint8)


def truth(i):
    """Land with a lake and a field whose place depends on the image."""
    ids = np.zeros((H, W), np.uint8)
    ids[8:30, 10:40] = 2
    ids[35:55, 30 + i:60 + i] = 1
    return ids


def labels(i):
    ids = truth(i)
    if i < 4:
        ids[WRONG] = 0
    ids[:3] = 255  # not labelled
    return ids


def probabilities(ids, p=0.9):
    """(H, W, 3) uint8, p for the right class."""
    rest = (1 - p) / 2
    one_hot = np.eye(3)[ids] * (p - rest) + rest
    return np.round(255 * one_hot).astype(np.uint8)


@pytest.fixture
def made(tmp_path):
    """A data set of palette masks and what a good model says of its training images: root, folder."""
    root = tmp_path / "D"
    rng = np.random.default_rng(0)
    palette = np.zeros((256, 3), np.uint8)
    palette[[10, 20, 30]] = [(0, 0, 128), (255, 0, 0), (0, 192, 0)]
    names = [f"images/{i}" for i in range(6)]
    for i in range(6):
        save(root / f"images/{i}.png", rng.integers(0, 256, (H, W, 3)))
        save(root / f"masks/{i}.png", RAW[labels(i)], palette.tolist())
        write_tiff(tmp_path / f"P/images/{i}.tif", probabilities(truth(i)), bands=["a", "b", "c"])
    write(root / "dataset.json", {
        "name": "tiny", "images": "images/*.png", "masks": "masks/*.png", "classes": CLASSES,
        "ignore": [255], "scene": r"(\d)", "splits": {"train": names[:4], "val": names[4:5], "test": names[5:]}})
    index = {"run": "runs/none", "weights": "0", "root": str(root), "split": "fold", "temperature": None,
             "classes": [c["name"] for c in CLASSES], "images": {n: f"{n}.tif" for n in names[:4]}}
    write(tmp_path / "P/index.json", index)
    return root, tmp_path / "P"


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out + out.err


def suspects_of(capsys, folder, *flags):
    code, said = run(capsys, "suspects", folder, *flags)
    assert code == 0, said
    return json.loads((folder / "suspects/suspects.json").read_text())


# ---- suspects

def test_the_wrong_region_of_each_image_and_nothing_else_is_suspect(made, capsys):
    root, folder = made
    found = suspects_of(capsys, folder)["regions"]
    assert sorted(r["image"] for r in found) == [f"images/{i}" for i in range(4)]
    for r in found:
        assert (r["label"], r["proposed"], r["pixels"], r["box"]) == ("land", "water", 200, [10, 15, 10, 20])
        assert r["confidence"] == pytest.approx(0.9, abs=1 / 255) and r["score"] == pytest.approx(180, abs=1)
        assert from_runs(r["runs"], (10, 20)).all()
    rows = list(csv.DictReader((folder / "suspects/suspects.csv").open()))
    assert [(r["image"], r["region"], r["pixels"]) for r in rows] == [(r["image"], str(r["id"]), "200") for r in found]


def test_regions_are_those_of_scipy(made, capsys, rng):
    """Of noise: 4-neighbours of one label and one proposal; small ones are left out."""
    root, folder = made
    said = rng.choice(3, (H // 3, W // 2)).repeat(3, 0).repeat(2, 1).astype(np.uint8)
    write_tiff(folder / "images/0.tif", probabilities(said))
    own = [r for r in suspects_of(capsys, folder)["regions"] if r["image"] == "images/0"]
    expected = []
    for label in range(3):
        for other in {0, 1, 2} - {label}:
            parts, n = ndimage.label((labels(0) == label) & (said == other))
            for k, box in enumerate(ndimage.find_objects(parts), 1):
                inside = parts[box] == k
                if inside.sum() >= 16:
                    expected.append((label, other, box[0].start, box[1].start, inside.tolist()))
    names = [c["name"] for c in CLASSES]
    found = [(names.index(r["label"]), names.index(r["proposed"]), *r["box"][:2],
              from_runs(r["runs"], tuple(r["box"][2:])).tolist()) for r in own]
    assert len(found) > 5 and sorted(found) == sorted(expected)


def test_scores_of_images_are_the_soft_minimum(made, capsys):
    root, folder = made
    suspects_of(capsys, folder)
    rows = {r["image"]: float(r["score"]) for r in csv.DictReader((folder / "suspects/images.csv").open())}
    for i in range(4):
        p = probabilities(truth(i)) / 255
        known = labels(i) != 255
        own = np.take_along_axis(p, labels(i)[..., None].clip(max=2).astype(int), 2)[known]
        weight = np.exp((1 - own) / 0.1)
        assert rows[f"images/{i}"] == pytest.approx((weight * own).sum() / weight.sum(), abs=1e-5)


def test_the_mean_of_two_models_counts_and_their_classes_may_stand_in_any_order(made, capsys, tmp_path):
    root, folder = made
    other = tmp_path / "Q"
    index = json.loads((folder / "index.json").read_text())
    index["classes"] = index["classes"][::-1]
    write(other / "index.json", index)
    for i in range(4):  # as the labels say, so that the mean of both is in doubt
        write_tiff(other / f"images/{i}.tif", probabilities(labels(i).clip(max=2))[..., ::-1])
    code, said = run(capsys, "suspects", folder, other, "--out", tmp_path / "out")
    assert code == 0, said
    predicted = Predicted([folder, other])
    (y, p), = predicted.strips("images/0")
    assert p[:, 15, 20] == pytest.approx([0.475, 0.05, 0.475], abs=1 / 255)
    assert json.loads((tmp_path / "out/suspects.json").read_text())["regions"] == []


def test_controls_are_right_labels(made, capsys):
    root, folder = made
    controls = suspects_of(capsys, folder)["controls"]
    assert controls
    names = [c["name"] for c in CLASSES]
    for c in controls:
        top, left, h, w = c["box"]
        inside = from_runs(c["runs"], (h, w))
        i = int(c["image"][-1])
        for ids in (truth(i), labels(i)):
            assert (ids[top:top + h, left:left + w][inside] == names.index(c["proposed"])).all()
        assert c["label"] != c["proposed"]


def test_runs_come_back(rng):
    for share in (0, 0.3, 0.7, 1):
        inside = rng.random((7, 5)) < share
        assert (from_runs(to_runs(inside), (7, 5)) == inside).all()


@pytest.mark.parametrize("spoil, named", [
    (lambda f: (f / "index.json").unlink(), "--probabilities"),
    (lambda f: shutil.copy(f.parent / "D/images/0.png", f / "images/2.tif"), "images/2.tif"),
    (lambda f: write(f / "index.json", {"root": "x"}), "'split'"),
])
def test_bad_folders_are_named(made, capsys, spoil, named):
    root, folder = made
    spoil(folder)
    code, said = run(capsys, "suspects", folder)
    assert code == 2 and named in said and said.count("\n") == 1


def test_a_run_that_judges_its_own_training_labels_is_said(made, capsys, tmp_path):
    root, folder = made
    index = json.loads((folder / "index.json").read_text())
    write(folder / "index.json", index | {"run": str(tmp_path / "R")})
    write(tmp_path / "R/split.json", {"train": ["images/0", "images/1", "images/5"]})
    code, said = run(capsys, "suspects", folder)
    assert code == 0 and "was trained on 2 of these images" in said


# ---- folds

def test_folds_keep_scenes_whole_and_leave_no_image_out(made, capsys, tmp_path):
    root, _ = made
    d = json.loads((root / "dataset.json").read_text())
    write(root / "dataset.json", d | {"scene": "([01]|[23]|[45])"})
    code, said = run(capsys, "folds", root, "--number", 2, "--out", tmp_path / "O")
    assert code == 0 and said.count("train_seg.py") == said.count("eval.py") == 2
    folds = [json.loads((tmp_path / f"O/fold_{i}.json").read_text()) for i in (1, 2)]
    train = set(d["splits"]["train"])
    assert [set(f["train"]) | set(f["fold"]) for f in folds] == [train, train]
    assert sorted(map(tuple, (f["fold"] for f in folds))) == [("images/0",), ("images/1",)] \
        or {frozenset(f["fold"]) for f in folds} <= {frozenset(s) for s in
                                                     (["images/0"], ["images/1"], ["images/2"], ["images/3"],
                                                      ["images/0", "images/1"], ["images/2", "images/3"])}
    assert all(f["val"] == ["images/4"] and f["test"] == ["images/5"] for f in folds)
    code, said = run(capsys, "folds", root, "--number", 9, "--out", tmp_path / "O2")
    assert code == 2 and "--number 9" in said


@pytest.fixture
def rng():
    return np.random.default_rng(0)
