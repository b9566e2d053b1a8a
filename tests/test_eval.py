"""eval.py: one matrix per split, of a model or anybody's masks; difficulty; a table of runs."""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from runs import OLD_SPECS, forks, ids_of, matrix, old_run, read, tiny_set, trained  # noqa: F401

from data.common import BadInput, write
from data.datasets import normalise
from eval import find_masks, parse_args
from models.vit import PRESETS

QUICK = ["--workers", 0]


@pytest.fixture
def run():
    return trained()


def scenes(split="test"):
    """(name, image, mask) of a split of the tiny set."""
    for image in sorted((tiny_set() / split / "images").iterdir()):
        yield f"{split}/images/{image.stem}", image, tiny_set() / split / "masks" / image.name


def counted(answers):
    """The confusion matrix of {image name: (H, W) ids} on the test scenes, pixel by pixel."""
    cm = np.zeros((8, 8), int)
    for name, _, mask in scenes():
        np.add.at(cm, (np.asarray(Image.open(mask)), answers[name]), 1)
    return cm.tolist()


def predicted(run, forks, out):
    forks.run("predict", run, tiny_set() / "test/images", "--out", out)
    return {name: np.asarray(Image.open(out / f"{image.stem}.png")) for name, image, _ in scenes()}


# ---- the model

def test_the_score_is_that_of_the_run_and_of_the_predicted_masks(run, forks, tmp_path):
    text = forks.run("eval", run, "--out", tmp_path / "e", *QUICK)
    assert "3 test images" in text and "test mIoU" in text and "always" in text
    assert matrix(tmp_path / "e/eval.json") == matrix(run)
    assert matrix(run) == counted(predicted(run, forks, tmp_path / "p"))
    report = read(tmp_path / "e/eval.json")
    assert report["protocol"]["images"] == 3 and report["split"] == "test"
    assert sum(map(sum, report["confusion"])) == 3 * 64 * 64
    assert Image.open(tmp_path / "e/confusion.png").size[0] > 100


def test_results_go_into_the_run_by_default(run, forks, tmp_path):
    copy = shutil.copytree(run, tmp_path / "a")
    forks.run("eval", copy / "best.safetensors", *QUICK)
    assert matrix(copy / "eval-test/eval.json") == matrix(run)


def test_it_is_said_when_the_images_chose_or_taught_the_weights(run, forks, tmp_path):
    for split in ("val", "train"):
        text = forks.run("eval", run, "--split", split, "--out", tmp_path, *QUICK)
        assert f"WARNING: the model's own {split} images" in text
    assert "WARNING" not in forks.run("eval", run, "--out", tmp_path, *QUICK)


def test_windows_may_overlap_otherwise(run, forks, tmp_path):
    forks.run("eval", run, "--overlap", 0.7, "--out", tmp_path, *QUICK)
    assert read(tmp_path / "eval.json")["protocol"]["overlap"] == 0.7
    assert matrix(tmp_path / "eval.json") != matrix(run)


@pytest.mark.parametrize("spec", OLD_SPECS)
def test_runs_of_earlier_versions_are_scored(forks, tmp_path, spec):
    net = old_run(tmp_path / "old", OLD_SPECS[spec])
    forks.run("eval", tmp_path / "old", "--out", tmp_path / "e", *QUICK)
    want = counted({name: ids_of(net, image) for name, image, _ in scenes()})
    difference = np.abs(np.subtract(matrix(tmp_path / "e/eval.json"), want)).sum()
    assert difference <= 4  # two ways to round, a pixel counts twice
    assert np.count_nonzero(np.sum(want, 0)) > 1  # it says more than one class


# ---- data that has moved or changed

def test_data_may_stand_elsewhere_and_list_its_classes_in_another_order(run, forks, tmp_path):
    root = shutil.copytree(tiny_set(), tmp_path / "moved")
    d = read(root / "dataset.json")
    write(root / "dataset.json", d | {"classes": d["classes"][::-1]})
    forks.run("eval", run, "--root", root, "--out", tmp_path / "e", *QUICK)
    assert matrix(tmp_path / "e/eval.json") == matrix(run)


def test_other_classes_and_splits_are_refused(run, forks, tmp_path):
    said = forks.run("eval", run, "--split", "nonsense", ok=2)
    assert "no split 'nonsense'; type --split with one of: train, val, test" in said
    root = shutil.copytree(tiny_set(), tmp_path / "other")
    d = read(root / "dataset.json")
    d["classes"][3]["name"] = "sea"
    write(root / "dataset.json", d)
    said = forks.run("eval", run, "--root", root, ok=2)
    assert "sea" in said and "the model knows field" in said and said.count("\n") == 1


# ---- anybody's masks

def test_masks_are_scored_like_the_model_that_made_them(run, forks, tmp_path):
    predicted(run, forks, tmp_path / "p")
    assert "type train" in forks.run("eval", run, "--masks", tmp_path / "p", ok=2)  # never a guess
    masks = ["--masks", tmp_path / "p", "--mask-ids", "train", "--out", tmp_path / "e", *QUICK]
    forks.run("eval", run, *masks)
    assert matrix(tmp_path / "e/eval.json") == matrix(run)
    *_, (_, image, _) = scenes()
    (tmp_path / "p" / image.name).unlink()
    assert f"{image.name}: no such mask" in forks.run("eval", run, *masks, ok=2)


def test_masks_lie_equally_deep_below_the_folder_or_are_refused(tmp_path):
    names = ["a/x/1", "a/y/1", "b/é"]
    for layout, want in ((["a/x/1.png", "a/y/1.PNG", "b/e\u0301.png"],) * 2,
                         (["x/1.png", "y/1.png", "é.png", "b/é_color.png"], ["x/1.png", "y/1.png", "é.png"])):
        folder = tmp_path / str(len(layout))
        for name in layout:
            write(folder / name, b"")
        assert find_masks(folder, names) == {n: folder / m for n, m in zip(names, want)}
    write(tmp_path / "p/1.png", b"")
    write(tmp_path / "p/é.png", b"")
    with pytest.raises(BadInput, match="images of one name in several folders"):
        find_masks(tmp_path / "p", names)
    (tmp_path / "3/b/e\u0301.png").unlink()
    write(tmp_path / "3/é.png", b"")  # would fit if this name alone were shortened
    with pytest.raises(BadInput, match="b/é.png: no such mask|1.png: no such mask"):
        find_masks(tmp_path / "3", names)
    with pytest.raises(BadInput, match="none: no such folder"):
        find_masks(tmp_path / "none", names)


def test_the_truth_itself_scores_one(run, forks, tmp_path):
    text = forks.run("eval", run, "--masks", tiny_set() / "test/masks", "--mask-ids", "raw",
                     "--out", tmp_path, *QUICK)
    report = read(tmp_path / "eval.json")
    assert "mIoU 1.0000" in text and report["oa"] == report["miou"] == 1


def test_every_labelled_pixel_needs_an_answer(run, forks, tmp_path):
    predicted(run, forks, tmp_path)
    name = next(scenes())[1].name
    ids = np.array(Image.open(tmp_path / name))
    ids[0, 0] = 255
    Image.fromarray(ids).save(tmp_path / name)
    masks = ["--masks", tmp_path, "--mask-ids", "train", "--out", tmp_path / "e", *QUICK]
    said = forks.run("eval", run, *masks, ok=2)
    assert name in said and "expected (64, 64) with a class everywhere" in said


# ---- difficulty

def test_difficulty_counts_the_classes_of_an_image_with_a_low_iou(run, forks, tmp_path):
    text = forks.run("eval", run, "--difficulty", "--out", tmp_path / "e", *QUICK)
    assert f"--difficulty {tmp_path}/e/difficulty.json" in text
    want, answers = {}, predicted(run, forks, tmp_path / "p")
    for name, _, mask in scenes():
        true, pred = np.asarray(Image.open(mask)), answers[name]
        want[name] = 0
        for c in np.unique(true):
            both, either = (true == c) & (pred == c), (true == c) | (pred == c)
            want[name] += int(both.sum() < 0.5 * either.sum())
    assert read(tmp_path / "e/difficulty.json") == want and len(set(want.values())) > 1


# ---- the table of several runs

def test_the_summary_has_a_row_per_experiment(run, forks, tmp_path):
    results = read(run / "results.json")
    for seed in (1, 2):  # two more runs of the experiment, as if their scores were these
        copy = shutil.copytree(run, tmp_path / f"seed-{seed}")
        protocol = read(copy / "protocol.json")
        protocol["flags"] |= dict(seed=seed, steps=99)
        write(copy / "protocol.json", protocol)
        write(copy / "results.json", results | dict(miou=0.2 * seed, seed=seed))
    shutil.copytree(run, tmp_path / "killed", ignore=shutil.ignore_patterns("results.json"))
    runs = run, tmp_path / "seed-1", tmp_path / "seed-2", tmp_path / "killed", tiny_set()
    head, _, first, second, last = forks.run("eval", "--summary", *runs).splitlines()
    assert head.count("|") == first.count("|") == second.count("|")
    n, miou = results["classes_in_mean"], results["miou"]
    assert first.startswith(f"| trained | demo | test | {n} of 8 | 0 | {miou:.4f} |")
    assert second.startswith(f"| seed-1, seed-2 | demo | test | {n} of 8 | 1, 2 | "
                             "0.3000 +/- 0.1414 |")
    assert "killed: not finished" in last
    assert "no results.json" in forks.run("eval", "--summary", tiny_set(), ok=2)


@pytest.mark.parametrize("argv, said", [
    ([], "name one run folder, or several after --summary"),
    (["a", "--summary", "b"], "name one run folder"),
    (["RUN", "--mask-ids", "raw"], "--mask-ids goes with --masks"),
    (["none"], "none: no such file; train first"),
    (["RUN", "--overlap", "1"], "expected a number from 0 to 0.9")])
def test_what_is_typed_wrong(run, forks, argv, said):
    text = forks.run("eval", *[run if a == "RUN" else a for a in argv], ok=2)
    assert said in text and text.startswith("error: ") and text.count("\n") == 1


def test_results_are_json_that_others_read(run, forks, tmp_path):
    forks.run("eval", run, "--out", tmp_path, *QUICK)

    def refuse(constant):
        raise AssertionError(constant)  # NaN and Infinity are no JSON

    json.loads((tmp_path / "eval.json").read_text(), parse_constant=refuse)


# ---- several runs and views

def test_runs_and_views_are_averaged(forks, tmp_path):
    a = old_run(tmp_path / "a", OLD_SPECS["vit without final norm, blocks of its own"])
    b = old_run(tmp_path / "b", dict(name="vit", backbone=PRESETS["nano8"], head="linear", taps=[3], feat_norm=True))
    text = forks.run("eval", tmp_path / "a", "--with", tmp_path / "b", "--tta", "flips", *QUICK)
    out = tmp_path / "a/eval-test-with-flips"
    assert f"wrote {out}/" in text
    answers = {}
    for name, image, _ in scenes():
        x = normalise(np.asarray(Image.open(image)), "sat")[None]
        with torch.no_grad():
            p = sum(net(x.flip(axes)).softmax(1).flip(axes) for net in (a, b) for axes in ([], [2], [3], [2, 3]))
        answers[name] = p[0].argmax(0).numpy()
    difference = np.subtract(matrix(out / "eval.json"), counted(answers))
    assert np.abs(difference).sum() <= 6  # two ways to round
    protocol = read(out / "eval.json")["protocol"]
    assert (protocol["tta"], protocol["with"]) == ("flips", str(tmp_path / "b"))


@pytest.mark.parametrize("flags, said", [
    (["run", "--tta", "d4", "--calibrate"], "--calibrate is of one run as it is"),
    (["run", "--with", "b", "--features", "F"], "--features are of one network"),
    (["--masks", "M", "--mask-ids", "raw", "--root", "D", "--soup", "b"], "--tta, --with and --soup ask the model")])
def test_flags_of_averages_that_do_not_fit(flags, said, capsys):
    with pytest.raises(SystemExit):
        parse_args(flags)
    assert said in capsys.readouterr().err
