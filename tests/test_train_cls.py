"""Scene classification as a user types it: folders, splits, probes against scikit-learn, training, and bad input."""
import csv
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from forks import Forks
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from sklearn.neighbors import KNeighborsClassifier

from data import augment, plots
from data.datasets import NORMS, normalise
from data.common import BadInput
from data.metrics import bootstrap, class_table, confusion
from data.scenes import (augment_scenes, base_of, check_classes, decode_scenes, draw_splits, few, find_scenes,
                         groups_of, load_splits, prepare, square, twins)
from models.checkpoint import load_state, load_weights
from models.classify import Knn, cnn, fit_linear

NAMES = ["field", "forest", "water"]
TINY = ["--epochs", 3, "--batch-size", 8, "--eval-every", 4, "--log-every", 1, "--warmup", 2,
        "--amp", "off"]
VIT = ["--mode", "finetune", "--arch", "nano8"]


def draw(folder, name, colour, n, rng, side=16):
    (folder / name).mkdir(parents=True)
    for i in range(n):
        noise = rng.integers(-40, 40, (side, side, 3))
        Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype("u1")).save(folder / name / f"{name}_{i}.png")


def make_set(folder, n=(20, 15, 15), side=16):
    rng = np.random.default_rng(0)
    for name, colour, count in zip(NAMES, ((150, 140, 60), (40, 110, 50), (40, 60, 140)), n):
        draw(folder, name, colour, count, rng, side)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("scenes") / "tiny")


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def run(root, forks, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a"
    forks.run("train_cls", "--root", root, "--out", out, *VIT, *TINY)
    return out


def results(run):
    return json.loads((run / "results.json").read_text())


def same_run(a, b):
    x, y = (load_state(f / "last.pt") for f in (a, b))
    assert (a / "best.safetensors").read_bytes() == (b / "best.safetensors").read_bytes()
    assert x["net"].keys() == y["net"].keys() and all(torch.equal(x["net"][k], y["net"][k]) for k in x["net"])
    assert (x["step"], x["best"]) == (y["step"], y["best"])
    assert results(a)["confusion"] == results(b)["confusion"]


# ---- folders and splits

@pytest.mark.parametrize("place", ["2750", "EuroSAT/2750", "EuroSAT_RGB"])
def test_eurosat_is_found_from_any_parent(tmp_path, place):
    make_set(tmp_path / place, (2, 1, 1))
    (tmp_path / "LICENSE").write_text("free")
    for start in [tmp_path, *(p for p in tmp_path.rglob("*") if p.is_dir() and p.name not in NAMES)]:
        assert base_of(start) == (tmp_path / place).resolve()
        assert find_scenes(start)[1]["forest/forest_0.png"] == "forest"


def test_folders_may_hold_splits_and_files_that_are_no_images(tmp_path):
    for split in ("train", "Valid", "test"):
        make_set(tmp_path / split, (3, 2, 1))
    (tmp_path / "train/field/notes.txt").write_text("mine")
    (tmp_path / "train/field/.DS_Store").write_text("")
    (tmp_path / "train/nothing").mkdir()
    base, scenes, splits, stray, empty = find_scenes(tmp_path)
    assert {s: len(n) for s, n in splits.items()} == {"train": 6, "val": 6, "test": 6} and len(scenes) == 18
    assert [f.name for f in stray] == ["notes.txt"] and empty == ["nothing"]


def test_a_drawn_split_is_stratified_and_keeps_groups_together():
    scenes = {f"{c}/{c}_{i}": c for c, n in (("a", 100), ("b", 50), ("c", 10)) for i in range(n)}
    shares = dict(train=0.6, val=0.2, test=0.2)
    splits = draw_splits(scenes, groups_of(list(scenes), None), shares, 0)
    for c, n in (("a", 100), ("b", 50), ("c", 10)):
        assert [sum(scenes[x] == c for x in splits[s]) for s in shares] == [n * 6 // 10, n * 2 // 10, n * 2 // 10]
    assert sorted(sum(splits.values(), [])) == sorted(scenes)
    assert draw_splits(scenes, groups_of(list(scenes), None), shares, 1) != splits
    groups = groups_of(list(scenes), r"_(\d+)$")  # a_7 and b_7 are one place
    splits = draw_splits(scenes, groups, shares, 0)
    homes = {s: {groups[n] for n in names} for s, names in splits.items()}
    assert not homes["train"] & homes["val"] and not homes["train"] & homes["test"] and not homes["val"] & homes["test"]
    assert abs(len(splits["train"]) - 96) <= 8
    with pytest.raises(BadInput, match="does not match"):
        groups_of(["a"], "x")


def test_few_shot_subsets_are_nested_and_by_seed():
    scenes = {f"{c}{i}": c for c in "ab" for i in range(30)}
    names = list(scenes)
    small, large = few(names, scenes, 5, 0), few(names, scenes, 20, 0)
    assert set(small) < set(large) and [sum(scenes[n] == c for n in small) for c in "ab"] == [5, 5]
    assert set(few(names, scenes, 5, 1)) != set(small) and set(few(names[::-1], scenes, 5, 0)) == set(small)


def test_val_is_drawn_from_train_where_the_folders_give_only_test():
    scenes = {f"{s}/{i}": "ab"[i % 2] for s in ("train", "test") for i in range(40)}
    given = {s: [n for n in scenes if n.startswith(s)] for s in ("train", "test")}
    splits = load_splits(scenes, given, dict(train=0.6, val=0.2, test=0.2), groups_of(list(scenes), None), 0)
    assert splits["test"] == given["test"] and len(splits["val"]) == 10 and len(splits["train"]) == 30


def test_classes_of_train_rule():
    scenes = {"1": "a", "2": "b", "3": "a", "4": "c"}
    assert "no image of b in val" in check_classes({"train": ["1", "2"], "val": ["3"]}, scenes, ["a", "b"])[0]
    with pytest.raises(BadInput, match="'c' is in val but not in train"):
        check_classes({"train": ["1", "2"], "val": ["4"]}, scenes, ["a", "b"])
    with pytest.raises(BadInput, match="'b' has no image in train"):
        check_classes({"train": ["1"], "val": ["2"]}, scenes, ["a", "b"])


# ---- pixels

def test_pixels_are_those_of_the_files_and_large_ones_are_not_squashed(root, tmp_path):
    files = sorted(root.rglob("*.png"))[:5]
    pixels, digests = decode_scenes(*files)
    assert pixels.shape == (5, 16, 16, 3) and digests.any(1).all()
    np.testing.assert_array_equal(pixels, [np.asarray(Image.open(f)) for f in files])
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200  # exactly the middle square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no")
    pixels, digests = decode_scenes(files[0], tmp_path / "wide.png", tmp_path / "broken.jpg", side=12)
    assert pixels.shape == (3, 12, 12, 3) and (pixels[1, :, 1:-1] > 190).all()
    assert digests.any(1).tolist() == [True, True, False]
    assert (square(wide, 20) == 200).all()


def test_twins_are_equal_pictures(tmp_path):
    a, b = (np.random.default_rng(i).integers(0, 255, (8, 8, 3), np.uint8) for i in (0, 1))
    for name, image in (("0.png", a), ("1.png", b), ("2.bmp", a)):
        Image.fromarray(image).save(tmp_path / name)
    assert twins(decode_scenes(*(tmp_path / n for n in ("0.png", "1.png", "2.bmp")))[1]) == [[0, 2]]


def test_augmented_scenes_are_symmetries_and_do_not_depend_on_the_batch():
    x = torch.randint(0, 255, (40, 9, 9, 3), dtype=torch.uint8)
    out = augment_scenes(x, list(range(40)), seed=3, shift=0)
    kinds = set()
    for a, b in zip(x.numpy(), out.numpy()):  # the eight symmetries by NumPy's own turns
        kinds |= {(t, f) for t in range(4) for f in (0, 1)
                  if np.array_equal(b, np.rot90(a, t)[:, ::-1] if f else np.rot90(a, t))}
    assert len(kinds) == 8
    assert torch.equal(augment_scenes(x[5:7], [5, 6], seed=3, shift=0), out[5:7])
    moved = augment_scenes(x, list(range(40)), seed=3, shift=3)
    assert moved.shape == x.shape and not torch.equal(moved, out)
    ramp = torch.arange(9).view(1, 9, 1, 1).expand(40, 9, 9, 3)  # mirrored at the border: neighbours stay neighbours
    steps = augment_scenes(ramp, list(range(40)), seed=3, shift=3).float()
    assert (steps.diff(dim=1).abs() + steps.diff(dim=2).abs()[:, :, :1].mean() * 0 <= 1).all()


def test_prepare_is_the_normalisation_of_the_segmentation_scripts():
    image = np.random.default_rng(0).integers(0, 255, (7, 7, 3), np.uint8)
    torch.testing.assert_close(prepare(torch.from_numpy(image)[None], NORMS["sat"])[0], normalise(image, "sat"))
    assert prepare(torch.from_numpy(image)[None], NORMS["sat"], 14).shape == (1, 3, 14, 14)


def test_cutmix_share_is_the_area_left():
    x = torch.arange(6).view(6, 1, 1, 1).expand(6, 3, 32, 32).float()
    mixed, y, other, share = augment.cutmix_scenes(x, torch.arange(6), np.random.default_rng(1))
    for i in range(6):
        own = (mixed[i, 0] == y[i]).float().mean().item()
        assert own == (1.0 if other[i] == y[i] else pytest.approx(share)) and 0 < share < 1


# ---- probes against scikit-learn

@pytest.fixture(scope="module")
def blobs():
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (5, 24)) * rng.uniform(0.1, 5, 24)
    y = rng.integers(0, 5, 900)
    x = centres[y] + rng.normal(0, 2, (900, 24)) * rng.uniform(0.5, 3, 24) + 3
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    return x[:600], y[:600], x[600:], y[600:]


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("k", [1, 7, 20])
def test_knn_is_scikit_learns(blobs, unit, k):
    x, y, x2, _ = blobs
    head = Knn(len(x), x.shape[1], 5, k, 0.5, unit).fit(x, y)
    mean, std = x.mean(0), x.std(0, correction=0)
    a, b = ((t / t.norm(dim=1, keepdim=True) if unit else (t - mean) / std).double().numpy() for t in (x, x2))
    oracle = KNeighborsClassifier(k, weights=lambda d: np.exp(-d**2 / (2 * 0.5)), algorithm="brute").fit(a, y)
    p = head(x2).softmax(1).numpy()
    np.testing.assert_allclose(p, oracle.predict_proba(b), atol=2e-3)
    assert (p.argmax(1) == oracle.predict(b)).mean() > 0.99  # ties may go either way


def test_the_linear_probe_is_as_good_as_logistic_regression(blobs):
    x, y, x2, y2 = blobs
    mean, std = x.mean(0), x.std(0, correction=0)
    oracle = LogisticRegression(C=10.0, max_iter=2000).fit(((x - mean) / std).numpy(), y)
    want = accuracy_score(y2, oracle.predict(((x2 - mean) / std).numpy()))
    probes = fit_linear(x, y, 5, [1e-4, 0.03, 0.1], epochs=60)
    got = [(probe(x2).argmax(1) == y2).float().mean().item() for probe in probes]
    assert 0.6 < want < 0.98 and max(got) == pytest.approx(want, abs=0.02)
    assert len(set(got)) > 1  # the rates are tried apart
    again = fit_linear(x, y, 5, [0.1], epochs=60)[0]
    torch.testing.assert_close(again.weight, probes[2].weight)


# ---- numbers

def test_the_class_table_adds_up_and_is_scikit_learns():
    rng = np.random.default_rng(0)
    true, pred = rng.integers(0, 3, 200), rng.integers(0, 4, 200)  # class 3 is predicted, never true
    cm = confusion(torch.tensor(pred), torch.tensor(true), 5)
    np.testing.assert_array_equal(cm, confusion_matrix(true, pred, labels=range(5)))
    table = class_table(cm, list("abcde"))
    precision, recall, f, _ = precision_recall_fscore_support(true, pred, labels=range(4), zero_division=0)
    for i, c in enumerate("abcd"):
        row = table[c]
        assert row["tp"] + row["fp"] + row["tn"] + row["fn"] == 200
        assert row["tp"] + row["fn"] == (true == i).sum() and row["tp"] + row["fp"] == (pred == i).sum()
        assert row["precision"] == pytest.approx(precision[i]) and row["f1"] == pytest.approx(f[i])
        assert row["recall"] == (pytest.approx(recall[i]) if c != "d" else None)
        assert row["specificity"] == pytest.approx(((true != i) & (pred != i)).sum() / (true != i).sum())
    assert table["e"]["f1"] is None


def test_the_interval_is_the_binomial_one_and_wider_for_groups():
    hits = np.random.default_rng(0).random(2000) < 0.9
    low, high = bootstrap(hits, [str(i) for i in range(2000)])
    half = 1.96 * np.sqrt(hits.mean() * (1 - hits.mean()) / 2000)
    assert low == pytest.approx(hits.mean() - half, abs=2e-3) and high == pytest.approx(hits.mean() + half, abs=2e-3)
    low2, high2 = bootstrap(np.sort(hits), [str(i // 20) for i in range(2000)])
    assert high2 - low2 > 2 * (high - low)


def test_cards_frame_what_is_wrong_and_survive_nothing():
    image = np.full((4, 8, 3), 90, np.uint8)
    sheet = np.asarray(plots.cards([("two", [(image, ["a", "b 0.9"], True), (image, ["a"], False)]), ("none", [])]))
    assert (sheet == (214, 20, 30)).all(2).any() and (sheet == 90).all(2).sum() > 2 * 128 * 64 * 0.9
    assert not (np.asarray(plots.cards([("right", [(image, ["a"], False)])])) == (214, 20, 30)).all(2).any()


def test_a_torchvision_file_fits_the_resnet_of_stem_imagenet():
    import torchvision
    net = torchvision.models.resnet18(weights=None, num_classes=7).eval()
    ours = cnn("resnet18", "imagenet", 7).eval()
    ours.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), net(x))
    assert cnn("resnet18", "small", 7)(x).shape == cnn("nano", "small", 7)(x).shape == (2, 7)


# ---- runs

def test_the_run_folder_holds_what_the_design_promises(run):
    assert sorted(p.name for p in run.iterdir()) == [
        "best.safetensors", "confusion.png", "curves.png", "last.pt", "log.jsonl", "protocol.json", "results.json",
        "samples.png", "split.json"]
    r = results(run)
    assert r["split"] == "test" and list(r["table"]) == NAMES
    assert r["accuracy_low"] <= r["accuracy"] <= r["accuracy_high"]
    assert np.sum(r["confusion"]) == 10 and r["images_per_second"] > 0
    meta = load_weights(run)[1]
    assert [c["name"] for c in meta["classes"]] == NAMES and meta["task"] == "classification"
    torch.load(run / "last.pt", weights_only=True)


def test_a_signal_saves_and_resume_is_bit_for_bit(root, run, forks, tmp_path):
    pid = forks.start("train_cls", "--root", root, "--out", tmp_path / "c", *VIT, *TINY)
    while not (tmp_path / "c/last.pt").exists():
        time.sleep(0.005)
    os.kill(pid, signal.SIGTERM)
    code, text = forks.finish()
    assert code == 128 + signal.SIGTERM and f"--resume {tmp_path / 'c'}" in text
    assert "batch_size = 8, not 4" in forks.run("train_cls", "--resume", tmp_path / "c", "--batch-size", 4, ok=2)
    forks.run("train_cls", "--resume", tmp_path / "c")
    same_run(run, tmp_path / "c")
    assert "--resume" in forks.run("train_cls", "--root", root, "--out", tmp_path / "c", *TINY, ok=2)


def test_ranks_train_and_report_alike(root, forks, tmp_path):
    losses, tables = {}, {}
    for ranks in (1, 2, 3):
        for mode in (VIT, ["--mode", "linear"]) if ranks != 2 else (VIT,):
            out = tmp_path / f"{mode[1]}{ranks}"
            flags = [*mode, *TINY, "--batch-size", 6 // ranks, "--epochs", 1]
            forks.run("train_cls", "--root", root, "--out", out, *flags, ranks=ranks)
            tables.setdefault(mode[1], []).append(results(out)["table"])
        rows = map(json.loads, (tmp_path / f"finetune{ranks}/log.jsonl").read_text().splitlines())
        losses[ranks] = [row["loss"] for row in rows if "loss" in row]
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-4)
    np.testing.assert_allclose(losses[3], losses[1], rtol=1e-4)
    for same in tables.values():
        assert all(table == same[0] for table in same)


def test_cnn_mixing_smoothing_and_two_ranks(root, forks, tmp_path):
    flags = ["--mode", "cnn", "--mixup", 0.5, "--cutmix", 0.5, "--label-smoothing", 0.1, *TINY]
    forks.run("train_cls", "--root", root, "--out", tmp_path / "a", *flags, ranks=2)
    assert results(tmp_path / "a")["accuracy"] >= 0.3


def test_frozen_features_are_computed_once_and_feed_both_probes(root, run, forks, tmp_path):
    flags = ["--root", root, "--weights", run]
    text = forks.run("train_cls", *flags, "--out", tmp_path / "a")
    assert "images/s on cpu" in text and "mode linear" not in text and "rate 0.1" in text
    text = forks.run("train_cls", *flags, "--out", tmp_path / "b", "--mode", "knn", "--k", 1, 5)
    assert "from the cache" in text and "k 5" in text
    text = forks.run("train_cls", *flags, "--out", tmp_path / "d", "--mode", "knn", "--per-class", 2, "--split-seed", 5)
    assert "from the cache" in text and "6 train" in text
    other = shutil.copytree(root, tmp_path / "copy")
    assert "images/s" in forks.run("train_cls", "--root", other, "--weights", run, "--out", tmp_path / "c")
    assert "a finished run" in forks.run("train_cls", *flags, "--out", tmp_path / "c", ok=2)
    for out in "abc":
        assert results(tmp_path / out)["accuracy"] > 0.8  # three colours


def test_channel_means_are_scikit_learns_knn(root, forks, tmp_path):
    flags = ["--features", "mean", "--k", 5, "--temperature", 1e6]
    forks.run("train_cls", "--root", root, *flags, "--out", tmp_path / "a")
    splits = json.loads((tmp_path / "a/split.json").read_text())
    x, y = {}, {}
    for s, names in splits.items():
        x[s] = np.array([np.asarray(Image.open(root / n)).mean((0, 1)) for n in names])
        y[s] = [NAMES.index(n.split("/")[0]) for n in names]
    scale = x["train"].std(0)
    oracle = KNeighborsClassifier(5).fit(x["train"] / scale, y["train"])
    want = confusion_matrix(y["test"], oracle.predict(x["test"] / scale))
    assert results(tmp_path / "a")["confusion"] == want.tolist()


def test_half_of_the_classes_and_a_split_from_a_file(root, run, forks, tmp_path):
    out = tmp_path / "a"
    flags = ["--classes", "water", "field", "--split-file", run / "split.json", "--features", "mean", "--per-class", 3]
    forks.run("train_cls", "--root", root, *flags, "--out", out)
    whole, half = (json.loads((r / "split.json").read_text()) for r in (run, out))
    assert half["test"] == [n for n in whole["test"] if "forest" not in n] and len(half["train"]) == 6
    assert list(results(out)["table"]) == ["water", "field"]
    assert "--classes sea: not there" in forks.run("train_cls", "--root", root, "--classes", "sea", "field", ok=2)


@pytest.mark.parametrize("mode", ["finetune", "knn", "head"])
def test_predict_agrees_with_the_report(root, run, forks, tmp_path, mode):
    trained = run
    if mode != "finetune":
        trained, flags = tmp_path / "run", ["--save", "head"] if mode == "head" else ["--mode", "knn"]
        forks.run("train_cls", "--root", root, "--weights", run, "--out", trained, *flags)
        kept = load_file(trained / "best.safetensors")
        assert any(k.startswith("backbone.") for k in kept) == (mode != "head")
    splits = json.loads((trained / "split.json").read_text())
    files = [root / n for n in splits["test"]]
    text = forks.run("predict", trained, *files, "--out", tmp_path / "p", "--top", 2, "--montage", 2)
    assert "images/s" in text and (tmp_path / "p/montage.png").exists()
    rows = list(csv.DictReader((tmp_path / "p/predictions.csv").open()))
    assert {r["file"] for r in rows} == set(map(str, files)) and "class_3" not in rows[0]
    cm = confusion_matrix([r["file"].split("/")[-2] for r in rows], [r["class_1"] for r in rows], labels=NAMES)
    assert cm.tolist() == results(trained)["confusion"]
    assert all(float(r["probability_1"]) >= float(r["probability_2"]) for r in rows)


def test_predict_takes_folders_that_share_file_names(root, run, forks, tmp_path):
    for place, name in (("north", "water_0"), ("south", "field_0")):
        (tmp_path / place).mkdir()
        shutil.copy(next(root.rglob(f"{name}.png")), tmp_path / place / "1.png")
    forks.run("predict", run, tmp_path / "north", tmp_path / "south", "--out", tmp_path / "p")
    rows = list(csv.DictReader((tmp_path / "p/predictions.csv").open()))
    assert [r["file"] for r in rows] == [str(tmp_path / "north/1.png"), str(tmp_path / "south/1.png")]
    flags = ["--out", tmp_path / "north", "--montage", 1]
    forks.run("predict", run, tmp_path / "north", *flags), forks.run("predict", run, tmp_path / "north", *flags)
    assert len(list(csv.DictReader((tmp_path / "north/predictions.csv").open()))) == 1  # not the montage as well
    (tmp_path / "south/predictions.csv").write_text("mine")
    text = forks.run("predict", run, tmp_path / "south", "--out", tmp_path / "south", ok=2)
    assert "predictions.csv: would be overwritten" in text


def test_eval_and_segmentation_know_a_classification_run(run, forks):
    assert "train_cls.py" in forks.run("eval", run, ok=2)
    row = forks.run("eval", "--summary", run).splitlines()[2]
    assert row.startswith(f"| a | tiny | test | 3 of 3 | 0 |  | {results(run)['macro_f1']:.4f} | ")


def test_bad_files_are_named_and_may_be_skipped(tmp_path, forks):
    root = make_set(tmp_path / "d", (8, 8, 8))
    flags = ["--root", root, "--features", "mean", "--out", tmp_path / "r"]
    (root / "field/notes.txt").write_text("mine")
    (root / "field/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    shutil.copy(root / "water/water_0.png", root / "forest/also.png")
    shutil.copy(root / "water/water_1.png", root / "water/again.png")
    text = forks.run("train_cls", *flags, ok=2)
    assert "broken.jpg: not a readable image" in text and "(3 such files" in text and not (tmp_path / "r").exists()
    text = forks.run("train_cls", *flags, "--skip-bad")
    left = json.loads((tmp_path / "r/protocol.json").read_text())["left_out"]
    assert sorted(left) == ["field/broken.jpg", "forest/also.png", "water/water_0.png", "water/water_1.png"]
    assert all(name in text for name in [*left, "notes.txt: no image"])
    shutil.rmtree(root / "field"), (root / "field").mkdir()
    assert "'field' holds no image" in forks.run("train_cls", *flags[:4], ok=2)
    text = forks.run("train_cls", *flags[:4], "--classes", "water", "forest", "--skip-bad", "--out", tmp_path / "s")
    assert list(results(tmp_path / "s")["table"]) == ["water", "forest"]


def test_flags_that_cannot_work_say_what_to_type(root, run, forks, tmp_path):
    for flags, words in (
            ([], "--root is missing; type"), (["--root", tmp_path / "no"], "no such folder"),
            (["--root", tmp_path], "no images in sub-folders"),
            (["--root", root, "--mode", "cnn", "--features", "mean"], "nothing to train or load"),
            (["--root", root, "--weights", run, "--features", "mean"], "no --weights"),
            (["--root", root, "--mode", "cnn", "--unfreeze", 2], "--unfreeze 2"),
            (["--root", root, "--save", "head"], "--save head needs"),
            (["--root", root, "--fractions", 0.5, 0.2, 0.2], "sum 1"),
            (["--root", root, "--group-regex", "("], "no regular expression"),
            (["--root", root, "--split-file", run / "log.jsonl"], "expected JSON"),
            (["--root", root, "--mode", "cnn", "--weights", run], "--cnn resnet18"),
            (["--root", root, "--mode", "cnn", "--cnn", "resnet18", "--weights", run], "is missing")):
        text = forks.run("train_cls", *flags, "--epochs", 1, ok=2)
        assert words in text and "Traceback" not in text, text


def test_a_cnn_takes_torchvision_weights(root, forks, tmp_path):
    save_file(cnn("resnet18", "imagenet", 1000).state_dict(), tmp_path / "resnet.safetensors")
    flags = ["--mode", "cnn", "--cnn", "resnet18", "--size", 32, "--epochs", 1]
    text = forks.run("train_cls", "--root", root, *flags, "--weights", tmp_path / "resnet.safetensors",
                     "--out", tmp_path / "a")
    assert "a new fc" in text and "input 32 x 32" in text
