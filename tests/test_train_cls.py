"""train_cls.py as a user types it: training, probes, kill and resume, ranks, bad input."""
import csv
import json
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from runs import (  # noqa: F401, two are fixtures
    SEGMENTATION_FILES, forks, interrupt, keep_signals, logged, place, read, same_run, server)
from safetensors.torch import load_file, save_file
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import KNeighborsClassifier
from test_scenes import NAMES, make_scenes

import train_cls
from data.common import BadInput
from models.checkpoint import load_state, load_weights
from models.classify import cnn

STEPS = ["--epochs", 3, "--batch-size", 8, "--eval-every", 4, "--log-every", 1, "--warmup", 2,
         "--amp", "off"]
TUNE = ["--mode", "finetune", "--arch", "nano8"]


@pytest.fixture(scope="module")
def root():
    return make_scenes(place() / "scenes")


@pytest.fixture(scope="module")
def run(root):
    server().run("train_cls", "--root", root, "--out", place() / "cls", *TUNE, *STEPS)
    return place() / "cls"


def results(run):
    return read(run / "results.json")


# ---- one run

def test_the_run_folder_holds_what_the_design_promises(run):
    assert {p.name for p in run.iterdir()} == SEGMENTATION_FILES
    r = results(run)
    assert r["split"] == "test" and list(r["table"]) == NAMES
    assert r["accuracy_low"] <= r["accuracy"] <= r["accuracy_high"]
    assert np.sum(r["confusion"]) == 10 and r["majority_accuracy"] == 0.4
    assert r["images_per_second"] > 0
    meta = load_weights(run)[1]
    assert [c["name"] for c in meta["classes"]] == NAMES and meta["task"] == "classification"
    torch.load(run / "last.pt", weights_only=True)  # plain types only


def test_killed_stopped_and_resumed_it_ends_alike(root, run, forks, tmp_path):
    out, flags = tmp_path / "c", ["--root", root, *TUNE, *STEPS]
    code, _ = interrupt(forks, signal.SIGKILL, out, "train_cls", *flags, "--out", out)
    assert code == -signal.SIGKILL
    code, text = interrupt(forks, signal.SIGTERM, out, "train_cls", "--resume", out)
    assert code == 128 + signal.SIGTERM and f"go on: python train_cls.py --resume {out}" in text
    text = forks.run("train_cls", "--resume", out, "--batch-size", 4, ok=2)
    assert "batch_size = 8, not 4" in text
    forks.run("train_cls", "--resume", out)
    same_run(run, out)
    assert "type --resume" in forks.run("train_cls", "--root", root, "--out", out, *STEPS, ok=2)


def test_more_epochs_go_on(run, forks, tmp_path):
    shutil.copytree(run, tmp_path / "a")
    text = forks.run("train_cls", "--resume", tmp_path / "a", "--epochs", 4)
    assert "at step 11 of 15" in text and list(logged(tmp_path / "a", "loss")) == list(range(1, 16))
    text = forks.run("train_cls", "--resume", tmp_path / "a", "--epochs", 2, ok=2)
    assert "epochs = 4, not 2, and only more epochs" in text


def test_ranks_train_and_report_alike(root, forks, tmp_path):
    losses, tables = {}, {}
    for ranks in (1, 2, 3):
        for mode in (TUNE, ["--mode", "linear"]):
            if ranks == 2 and mode != TUNE:
                continue
            out = tmp_path / f"{mode[1]}{ranks}"
            steps = STEPS if mode == TUNE else []
            flags = [*mode, *steps, "--batch-size", 6 // ranks, "--epochs", 1]
            forks.run("train_cls", "--root", root, "--out", out, *flags, ranks=ranks)
            tables.setdefault(mode[1], []).append(results(out)["table"])
        losses[ranks] = list(logged(tmp_path / f"finetune{ranks}", "loss").values())
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-4)
    np.testing.assert_allclose(losses[3], losses[1], rtol=1e-4)
    for same in tables.values():
        assert all(table == same[0] for table in same)


def test_a_cnn_learns_with_mixing_and_smoothing_on_two_ranks(root, forks, tmp_path):
    flags = ["--mode", "cnn", "--mixup", 0.5, "--cutmix", 0.5, "--label-smoothing", 0.1, *STEPS,
             "--epochs", 16]
    forks.run("train_cls", "--root", root, "--out", tmp_path / "a", *flags, ranks=2)
    r = results(tmp_path / "a")
    assert r["accuracy"] >= 0.9 and r["majority_accuracy"] == 0.4  # three colours


# ---- probes

def test_frozen_features_are_computed_once_and_feed_both_probes(root, run, forks, tmp_path):
    flags = ["--root", root, "--weights", run]
    text = forks.run("train_cls", *flags, "--out", tmp_path / "a")
    assert "images/s on cpu" in text and "rate 0.1" in text
    text = forks.run("train_cls", *flags, "--out", tmp_path / "b", "--mode", "knn", "--k", 1, 5, 500)
    assert "from the cache" in text and "k 5" in text and "\nk 500" not in text
    assert "WARNING --k 500: train has 30 images, so the largest is 30" in text
    text = forks.run("train_cls", *flags, "--out", tmp_path / "d", "--mode", "knn",
                     "--per-class", 2, "--split-seed", 5)
    assert "from the cache" in text and "6 train" in text
    other = shutil.copytree(root, tmp_path / "copy")
    text = forks.run("train_cls", "--root", other, "--weights", run, "--out", tmp_path / "c")
    assert "images/s" in text
    assert "a finished run" in forks.run("train_cls", *flags, "--out", tmp_path / "c", ok=2)
    text = forks.run("train_cls", "--resume", tmp_path / "c", ok=2)  # a probe is quick
    assert "nothing to resume" in text
    for out in "abc":
        assert results(tmp_path / out)["accuracy"] >= 0.9


def test_channel_means_are_scikit_learns_knn(root, forks, tmp_path):
    flags = ["--features", "mean", "--k", 5, "--temperature", 1e6]
    forks.run("train_cls", "--root", root, *flags, "--out", tmp_path / "a")
    x, y = {}, {}
    for split, names in read(tmp_path / "a/split.json").items():
        x[split] = np.array([np.asarray(Image.open(root / name)).mean((0, 1)) for name in names])
        y[split] = [NAMES.index(name.split("/")[0]) for name in names]
    scale = x["train"].std(0)
    oracle = KNeighborsClassifier(5).fit(x["train"] / scale, y["train"])
    want = confusion_matrix(y["test"], oracle.predict(x["test"] / scale))
    assert results(tmp_path / "a")["confusion"] == want.tolist()


def test_half_of_the_classes_and_a_split_from_a_file(root, run, forks, tmp_path):
    out = tmp_path / "a"
    flags = ["--classes", "water", "field", "--split-file", run / "split.json",
             "--features", "mean", "--per-class", 3]
    forks.run("train_cls", "--root", root, *flags, "--out", out)
    whole, half = read(run / "split.json"), read(out / "split.json")
    assert half["test"] == [name for name in whole["test"] if "forest" not in name]
    assert len(half["train"]) == 6
    assert list(results(out)["table"]) == ["water", "field"]


def test_a_cnn_takes_torchvision_weights(root, forks, tmp_path):
    save_file(cnn("resnet18", "imagenet", 1000).state_dict(), tmp_path / "resnet.safetensors")
    flags = ["--mode", "cnn", "--cnn", "resnet18", "--size", 32, "--epochs", 1]
    text = forks.run("train_cls", "--root", root, *flags,
                     "--weights", tmp_path / "resnet.safetensors", "--out", tmp_path / "a")
    assert "a new fc" in text and "input 32 x 32" in text


# ---- predict.py and eval.py on these runs

@pytest.mark.parametrize("mode", ["finetune", "knn", "head"])
def test_predict_agrees_with_the_report(root, run, forks, tmp_path, mode):
    trained = run
    if mode != "finetune":
        trained = tmp_path / "run"
        flags = ["--save", "head"] if mode == "head" else ["--mode", "knn"]
        forks.run("train_cls", "--root", root, "--weights", run, "--out", trained, *flags)
        kept = load_file(trained / "best.safetensors")
        assert any(name.startswith("backbone.") for name in kept) == (mode != "head")
    files = [root / name for name in read(trained / "split.json")["test"]]
    text = forks.run("predict", trained, *files, "--out", tmp_path / "p", "--top", 2,
                     "--montage", 2)
    assert "images/s" in text and (tmp_path / "p/montage.png").exists()
    rows = list(csv.DictReader((tmp_path / "p/predictions.csv").open()))
    assert {row["file"] for row in rows} == set(map(str, files)) and "class_3" not in rows[0]
    true, said = [row["file"].split("/")[-2] for row in rows], [row["class_1"] for row in rows]
    assert confusion_matrix(true, said, labels=NAMES).tolist() == results(trained)["confusion"]
    assert all(1 >= float(row["probability_1"]) >= float(row["probability_2"]) >= 0 for row in rows)


def test_ranks_predict_one_table(root, run, forks, tmp_path):
    for ranks in (1, 3):
        forks.run("predict", run, root, "--out", tmp_path / str(ranks), "--batch-size", 7,
                  ranks=ranks)
    one, three = ((tmp_path / out / "predictions.csv").read_text().splitlines() for out in "13")
    files, others = ([line.split(",")[:2] for line in table] for table in (one, three))
    assert len(files) == 51 and files == others  # probabilities may differ in their last digit


def test_predict_takes_folders_that_share_file_names(root, run, forks, tmp_path):
    for folder, name in (("north", "water_0"), ("south", "field_0")):
        (tmp_path / folder).mkdir()
        shutil.copy(next(root.rglob(f"{name}.png")), tmp_path / folder / "1.png")
    forks.run("predict", run, tmp_path / "north", tmp_path / "south", "--out", tmp_path / "p")
    rows = list(csv.DictReader((tmp_path / "p/predictions.csv").open()))
    files = [str(tmp_path / folder / "1.png") for folder in ("north", "south")]
    assert [row["file"] for row in rows] == files
    for _ in range(2):
        forks.run("predict", run, tmp_path / "north", "--out", tmp_path / "north", "--montage", 1)
    rows = list(csv.DictReader((tmp_path / "north/predictions.csv").open()))
    assert len(rows) == 1  # not the montage as well
    (tmp_path / "south/predictions.csv").write_text("mine")
    text = forks.run("predict", run, tmp_path / "south", "--out", tmp_path / "south", ok=2)
    assert "predictions.csv: would be overwritten" in text


def test_eval_and_segmentation_know_a_classification_run(run, forks):
    assert "a run of train_cls.py" in forks.run("eval", run, ok=2)
    row, f1 = forks.run("eval", "--summary", run).splitlines()[2], results(run)["macro_f1"]
    assert row.startswith(f"| cls | scenes | test | 3 of 3 | 0 |  | {f1:.4f} | ")


# ---- bad steps, bad files, bad flags

def poisoned(monkeypatch, calls):
    """train_cls.py in this process, where the cross-entropy of these calls is NaN."""
    cross_entropy, number = train_cls.F.cross_entropy, iter(range(10**6))

    def some_nan(*args, **how):
        return cross_entropy(*args, **how) * (float("nan") if next(number) in calls else 1)

    monkeypatch.setattr(train_cls.F, "cross_entropy", some_nan)
    return lambda *argv: train_cls.main(train_cls.parse_args([str(a) for a in argv]))


@pytest.mark.usefixtures("keep_signals")
def test_bad_steps_are_skipped_and_five_in_a_row_end_the_run(root, tmp_path, monkeypatch):
    flags = ["--root", root, *TUNE, *STEPS]
    with monkeypatch.context() as patches:
        poisoned(patches, {0, 1, 2, 3, 6})(*flags, "--out", tmp_path / "a")
    last = load_state(tmp_path / "a/last.pt")
    assert all(t.isfinite().all() for t in last["net"].values()) and last["state"]["step"] == 11
    assert {int(s["step"]) for s in last["opt"]["state"].values() if "step" in s} == {6}
    bad = [step for step, loss in logged(tmp_path / "a", "loss").items() if loss is None]
    assert bad == [1, 2, 3, 4, 7]
    said = r"gradients in a row at step 7, last images \w+/\w+.png, .*--lr below 0.002"
    with pytest.raises(BadInput, match=said):
        poisoned(monkeypatch, range(2, 7))(*flags, "--out", tmp_path / "b")


def test_bad_files_are_named_and_may_be_skipped(tmp_path, forks):
    root = make_scenes(tmp_path / "d", (8, 8, 8))
    (root / "field/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    flags = ["--root", root, "--features", "mean", "--out", tmp_path / "r"]
    text = forks.run("train_cls", *flags, ok=2)
    assert "broken.jpg: not a readable image" in text and "--skip-bad leaves them out" in text
    assert text.count("\n") == 1 and not (tmp_path / "r").exists()
    text = forks.run("train_cls", *flags, "--skip-bad")
    assert list(read(tmp_path / "r/protocol.json")["left_out"]) == ["field/broken.jpg"]
    assert "broken.jpg" in text


@pytest.mark.parametrize("flags, said", [
    ([], "--root is missing; type"), (["--root", "none"], "no such folder"),
    (["--root", "EMPTY"], "no images in sub-folders"),
    (["--root", "ROOT", "--mode", "cnn", "--features", "mean"], "nothing to train or load"),
    (["--root", "ROOT", "--weights", "RUN", "--features", "mean"], "no --weights"),
    (["--root", "ROOT", "--mode", "cnn", "--unfreeze", 2], "--unfreeze goes with --mode finetune, not cnn"),
    (["--root", "ROOT", "--save", "head"], "--save head needs"),
    (["--root", "ROOT", "--fractions", 0.5, 0.2, 0.2], "sum 1"),
    (["--root", "ROOT", "--group-regex", "("], "no regular expression"),
    (["--root", "ROOT", "--classes", "water", "field", "water"], "--classes names water twice"),
    (["--root", "ROOT", "--split-file", "LOG"], "log.jsonl: not valid JSON"),
    (["--root", "ROOT", "--mode", "cnn", "--weights", "RUN"], "--cnn resnet18"),
    (["--root", "ROOT", "--mode", "cnn", "--cnn", "resnet18", "--weights", "RUN"], "is missing"),
    (["--root", "ROOT", "--mode", "cnn", "--warmup", 700], "--warmup 700: at most a fifth of the steps"),
    (["--root", "ROOT", "--batch-size", 1], "expected a whole number from 2")])
def test_what_cannot_work_says_what_to_type(root, run, forks, tmp_path, flags, said):
    places = {"EMPTY": tmp_path, "ROOT": root, "RUN": run, "LOG": run / "log.jsonl"}
    flags = [places.get(f, f) for f in flags]
    text = forks.run("train_cls", *flags, "--epochs", 1, "--out", tmp_path / "x", ok=2)
    last = text.splitlines()[-1]
    assert last.startswith("error: ") and said in last and "Traceback" not in text
    assert not (tmp_path / "x").exists()


def test_results_are_json_that_others_read(run):
    def refuse(constant):
        raise AssertionError(constant)  # NaN and Infinity are no JSON

    for name in ("results.json", "protocol.json"):
        json.loads((run / name).read_text(), parse_constant=refuse)
