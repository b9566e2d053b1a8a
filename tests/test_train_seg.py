"""train_seg.py as a user types it: train, kill, resume, ranks, every network, bad input."""
import contextlib
import json
import os
import random
import re
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from runs import (  # noqa: F401, forks is a fixture
    FOLDER, SEGMENTATION_FILES, TINY, equal, forks, interrupt, logged, matrix, place, read,
    same_run, server, tiny_set)

import train_seg
from models.checkpoint import load_state, load_weights
from models.vit import ViT, preset


@pytest.fixture(scope="module")
def run():
    """The run that others here are compared with."""
    out = place() / "seg"
    server().run("train_seg", "--root", tiny_set(), "--out", out, *TINY)
    return out


# ---- one run

def test_the_run_folder_holds_what_the_design_promises(run):
    assert {p.name for p in run.iterdir()} == SEGMENTATION_FILES
    results = read(run / "results.json")
    assert {"miou", "oa", "iou", "majority_miou", "seconds", "command"} <= results.keys()
    assert results["split"] == "test" and results["steps"] == 6
    assert results["iou"].keys() == results["pixels"].keys()
    meta = load_weights(run)[1]
    assert meta["classes"][0]["name"] == "field" and meta["chosen_on"] == "val"
    assert read(run / "split.json")["val"] == ["val/images/scene_000", "val/images/scene_001"]
    assert read(run / "protocol.json")["flags"]["steps"] == 6
    torch.load(run / "last.pt", weights_only=True)  # plain types only


def test_the_log_holds_every_step_and_every_validation(run):
    assert list(logged(run, "loss")) == [1, 2, 3, 4, 5, 6]
    scores = logged(run, "val_miou")
    assert list(scores) == [2, 4, 6]
    best = load_state(run / "last.pt")["state"]["best"]
    assert max(scores.values()) == best == load_weights(run)[1]["val_miou"]
    rates = list(logged(run, "lr").values())  # warmed up in one step, then a cosine over five
    assert rates == pytest.approx([3e-3, *(1.5e-3 * (1 + np.cos(np.pi * np.arange(5) / 5)))])


def test_the_rate_rises_over_two_steps_and_falls_over_four():
    args = SimpleNamespace(lr=3e-3, warmup=2, steps=6, schedule="cosine")
    assert [train_seg.lr_at(step, args) for step in range(6)] == pytest.approx([
        1.5e-3, 3e-3, 3e-3, 3e-3 * 0.5 * (1 + 2 ** -0.5), 1.5e-3, 3e-3 * 0.5 * (1 - 2 ** -0.5)])


def test_same_command_same_bytes_whatever_the_workers(run, forks, tmp_path):
    forks.run("train_seg", "--root", tiny_set(), "--out", tmp_path / "b", *TINY, "--workers", 2)
    same_run(run, tmp_path / "b")


def test_another_seed_is_another_run(run, forks, tmp_path):
    forks.run("train_seg", "--root", tiny_set(), "--out", tmp_path / "b", *TINY, "--steps", 1,
              "--seed", 1)
    assert logged(tmp_path / "b", "loss")[1] != logged(run, "loss")[1]


def test_without_out_folders_are_numbered(forks, tmp_path):
    root = shutil.copytree(tiny_set(), tmp_path / "set")
    d = read(root / "dataset.json")
    (root / "dataset.json").write_text(json.dumps(d | dict(name="numbered")))
    for folder in ("runs/numbered", "runs/numbered-2"):
        text = forks.run("train_seg", "--root", root, *TINY, "--steps", 1)
        assert f"predict.py {folder} IMAGE_OR_FOLDER" in text


# ---- killed, told to stop, resumed

def test_killed_at_four_random_moments_it_ends_alike(forks, tmp_path):
    flags = ["--root", tiny_set(), *TINY, "--steps", 12, "--ema", 0.9, "--cutmix", 0.5,
             "--mixup", 0.5, "--focus", 0.5, "--workers", 1]
    began = time.time()
    forks.run("train_seg", *flags, "--out", tmp_path / "whole")
    length, kills, clock = time.time() - began, 0, random.Random(0)
    while kills < 4:
        out, ended = tmp_path / f"killed-{kills}", False
        while not ended:
            again = ["--resume", out] if (out / "last.pt").exists() else [*flags, "--out", out]
            pid = forks.start("train_seg", *again)
            if kills < 4:
                time.sleep(clock.uniform(0, length * 0.8))
                with contextlib.suppress(ProcessLookupError):  # it was faster
                    os.kill(pid, signal.SIGKILL)
            code, text = forks.finish()
            assert code in (0, -signal.SIGKILL), text
            kills += code != 0
            ended = code == 0
        same_run(tmp_path / "whole", out)
    assert not list(tmp_path.glob("*/*.tmp"))


def test_ctrl_c_saves_and_says_how_to_go_on(run, forks, tmp_path):
    out = tmp_path / "a folder"
    code, text = interrupt(forks, signal.SIGINT, out, "train_seg", "--root", tiny_set(),
                           "--out", out, *TINY)
    assert code == 128 + signal.SIGINT and f"go on: python train_seg.py --resume '{out}'" in text
    assert "Traceback" not in text and not (out / "results.json").exists()
    text = forks.run("train_seg", "--resume", out)
    assert f"resume  {out} at step " in text
    same_run(run, out)


def test_a_finished_run_only_reports_again(run, forks, tmp_path):
    shutil.copytree(run, tmp_path / "a")
    (tmp_path / "a/results.json").unlink()
    forks.run("train_seg", "--resume", tmp_path / "a", "--amp", "off", "--device", "cpu")  # as it was
    same_run(run, tmp_path / "a")


def test_more_steps_go_on_and_it_is_said(run, forks, tmp_path):
    shutil.copytree(run, tmp_path / "a")
    text = forks.run("train_seg", "--resume", tmp_path / "a", "--steps", 9)
    assert "at step 6 of 9" in text
    assert "9 steps instead of 6: the rate follows the longer schedule" in text
    assert list(logged(tmp_path / "a", "loss")) == list(range(1, 10))
    assert read(tmp_path / "a/results.json")["steps"] == 9
    assert load_state(tmp_path / "a/last.pt")["args"]["steps"] == 9
    first, more = (list(logged(out, "loss").values()) for out in (run, tmp_path / "a"))
    assert more[:6] == first
    done = (np.arange(6, 9) - 1) / 8  # of the longer schedule, behind one step of warm-up
    rates = list(logged(tmp_path / "a", "lr").values())[6:]
    assert rates == pytest.approx(list(3e-3 * 0.5 * (1 + np.cos(np.pi * done))))


def test_resume_refuses_what_would_make_it_another_run(run, forks, tmp_path):
    for flags, said in ((["--batch-size", 8], "batch_size = 4, not 8"),
                        (["--steps", 5], "and only more steps"),
                        (["--lr", 1], "lr = 0.003, not 1.0")):
        text = forks.run("train_seg", "--resume", run, *flags, ok=2)
        assert said in text and text.count("\n") == 1
    assert "nothing to resume" in forks.run("train_seg", "--resume", tmp_path / "none", ok=2)
    text = forks.run("train_points", "--resume", run, ok=2)
    assert "of another script" in text and "the code that began it (python train_seg.py --root" in text
    assert "of another script" in forks.run("train_cls", "--resume", run, ok=2)
    root = shutil.copytree(tiny_set(), tmp_path / "set")
    d = read(root / "dataset.json")
    d["classes"][0]["name"] = "meadow"
    (root / "dataset.json").write_text(json.dumps(d))
    text = forks.run("train_seg", "--resume", run, "--root", root, ok=2)
    assert "the classes or ignored values have changed" in text.splitlines()[-1]


def test_images_added_since_are_not_trained_on(run, forks, tmp_path):
    root = shutil.copytree(tiny_set(), tmp_path / "set")
    shutil.copytree(run, tmp_path / "a")
    for kind in ("images", "masks"):
        shutil.copy(root / f"train/{kind}/scene_000.png", root / f"train/{kind}/scene_900.png")
    text = forks.run("train_seg", "--resume", tmp_path / "a", "--root", root, "--steps", 7)
    assert "6 train" in text and len(read(tmp_path / "a/split.json")["train"]) == 6


def test_an_existing_run_is_not_overwritten(run, forks):
    text = forks.run("train_seg", "--root", tiny_set(), "--out", run, *TINY, ok=2)
    assert f"type --resume {run} to go on" in text


# ---- the same on several processes and in several pieces

def test_ranks_train_alike_and_evaluate_exactly_alike(run, forks, tmp_path):
    losses = {}
    for ranks in (1, 2, 3):
        out = tmp_path / f"r{ranks}"
        flags = [*TINY, "--batch-size", 6 // ranks, "--steps", 3,
                 "--loss", "ce+0.5*dice+lovasz+boundary+focal"]
        forks.run("train_seg", "--root", tiny_set(), "--out", out, *flags, ranks=ranks)
        losses[ranks] = list(logged(out, "loss").values())
        forks.run("eval", run, "--out", out / "e", "--workers", 0, ranks=ranks)
        assert matrix(out / "e/eval.json") == matrix(run)
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-4)
    np.testing.assert_allclose(losses[3], losses[1], rtol=1e-4)
    text = forks.run("train_seg", "--resume", tmp_path / "r2", ok=2)
    assert "with processes 2, not 1; start it with as many: torchrun --nproc_per_node=2" in text


def test_accumulation_is_the_large_batch(forks, tmp_path):
    flags = ["--root", tiny_set(), *TINY, "--loss", "ce+focal+lovasz", "--steps", 4]
    forks.run("train_seg", *flags, "--out", tmp_path / "a")
    forks.run("train_seg", *flags, "--out", tmp_path / "b", "--batch-size", 1, "--accum", 4)
    a, b = (list(logged(tmp_path / out, "loss").values()) for out in "ab")
    np.testing.assert_allclose(a, b, rtol=1e-4)


# ---- networks

@pytest.mark.parametrize("model, batch", [("unetformer", 2), ("effunet", 2), ("deeplabv3-os8", 1)])
def test_every_network_trains_resumes_evaluates_and_predicts(model, batch, forks, tmp_path):
    out = tmp_path / "a"
    flags = ["--root", tiny_set(), *FOLDER, "--model", model, "--crop", 64, "--steps", 2,
             "--log-every", 1, "--warmup", 1, "--batch-size", batch]
    code, text = interrupt(forks, signal.SIGTERM, out, "train_seg", *flags, "--out", out)
    assert code == 128 + signal.SIGTERM and load_state(out / "last.pt")["state"]["step"] == 1, text
    frozen = "BatchNorm keeps its statistics: it cannot learn from batches of one" in text
    forks.run("train_seg", "--resume", out)
    means = [t for name, t in load_weights(out)[0].items() if name.endswith("running_mean")]
    assert frozen == (batch == 1) == (not any(mean.any() for mean in means))  # they began at 0
    forks.run("eval", out, "--out", tmp_path / "e", "--workers", 0)
    assert matrix(tmp_path / "e/eval.json") == matrix(out)
    image = tiny_set() / "test/images/scene_000.png"
    assert "mask of 1 image" in forks.run("predict", out, image, "--out", tmp_path / "p")
    if model == "unetformer":  # dropout, batch statistics and the auxiliary head resume bit for bit
        forks.run("train_seg", *flags, "--out", tmp_path / "whole")
        same_run(tmp_path / "whole", out)


def test_a_cnn_starts_from_its_trunk_file(forks, tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    flags = ["--root", tiny_set(), *FOLDER, "--model", "unetformer", "--crop", 32, "--steps", 1]
    text = forks.run("train_seg", *flags, "--out", tmp_path / "a",
                     "--weights", tmp_path / "resnet18.pth")
    assert "layout=torchvision, 122 of 122 tensors (not needed: classifier)" in text
    assert "random: decoder" in text
    text = forks.run("train_seg", *flags, "--out", tmp_path / "b",
                     "--weights", tiny_set() / "dataset.json", ok=2)
    assert "dataset.json" in text.splitlines()[-1] and not (tmp_path / "b").exists()


@pytest.fixture(scope="module")
def dino():
    """A DINOv2 file of a ViT of four blocks, 64 wide."""
    torch.manual_seed(0)
    vit = ViT(**preset("dinov2", 14, 64, 4, 1, registers=0, grid=3))
    torch.save(vit.state_dict() | {"mask_token": torch.zeros(1, 64)}, place() / "dinov2_vitx14.pth")
    return place() / "dinov2_vitx14.pth"


def test_a_frozen_backbone_stays_as_it_was_and_its_head_is_saved_alone(dino, forks, tmp_path):
    flags = ["--root", tiny_set(), *FOLDER, "--weights", dino, "--crop", 28, "--steps", 2,
             "--log-every", 1, "--batch-size", 2, "--head", "linear"]
    forks.run("train_seg", *flags, "--out", tmp_path / "all")
    forks.run("train_seg", *flags, "--out", tmp_path / "head", "--save", "head")
    whole, head = (load_weights(tmp_path / out)[0] for out in ("all", "head"))
    assert head.keys() == {"head.out.weight", "head.out.bias"}
    assert equal(head, {name: whole[name] for name in head})
    for name, t in torch.load(dino).items():
        assert name == "mask_token" or torch.equal(whole[f"backbone.{name}"], t)
    assert matrix(tmp_path / "all") == matrix(tmp_path / "head")
    kept = load_state(tmp_path / "all/last.pt")["net"]
    assert not any(name.startswith("backbone.") for name in kept)
    forks.run("eval", tmp_path / "head", "--out", tmp_path / "e", "--workers", 0)
    assert matrix(tmp_path / "e/eval.json") == matrix(tmp_path / "all")


# ---- the loop

def test_it_stops_where_validation_gains_nothing(forks, tmp_path):
    flags = ["--root", tiny_set(), *TINY, "--lr", 1e-9, "--eval-every", 1, "--patience", 2]
    text = forks.run("train_seg", *flags, "--out", tmp_path / "a")
    assert "stop: no better val mIoU in 2 validations" in text
    assert list(logged(tmp_path / "a", "val_miou")) == [1, 2, 3]
    assert read(tmp_path / "a/results.json")["steps"] == 3


def test_final_keeps_the_last_weights(forks, tmp_path):
    forks.run("train_seg", "--root", tiny_set(), *TINY, "--steps", 3, "--final",
              "--out", tmp_path / "a")
    assert not logged(tmp_path / "a", "val_miou")
    assert read(tmp_path / "a/protocol.json")["selection"] == "last step"
    assert equal(load_weights(tmp_path / "a")[0], load_state(tmp_path / "a/last.pt")["net"])


def poisoned(monkeypatch, calls):
    """train_seg.py in this process, where the loss of these calls is NaN."""
    weighted_sum, number = train_seg.weighted_sum, iter(range(10**6))

    def some_nan(*args, **how):
        return weighted_sum(*args, **how) * (float("nan") if next(number) in calls else 1)

    monkeypatch.setattr(train_seg, "weighted_sum", some_nan)
    return lambda *argv: train_seg.main(train_seg.parse_args([str(a) for a in argv]))


@pytest.mark.parametrize("script, more", [
    ("train_seg", []), ("train_points", []), ("train_kd", ["--alpha", 0])])
def test_bad_files_are_listed_and_left_out_and_the_run_goes_on(forks, tmp_path, script, more):
    root = shutil.copytree(tiny_set(), tmp_path / "set")
    (root / "train/images/scene_001.png").write_bytes(b"no image")
    (root / "test/masks/scene_002.png").unlink()
    flags = ["--root", root, "--out", tmp_path / "a", *TINY, "--steps", 2, *more]
    assert "scene_002.png: no mask for it" in forks.run(script, *flags, ok=2)
    text = forks.run(script, *flags, "--skip-bad")
    assert "5 train, 2 val, 2 test" in text and text.count("left out: ") == 2
    assert "scene_001.png: not a readable image" in text and "scene_002.png: no mask for it" in text
    assert "train/images/scene_001" not in read(tmp_path / "a/split.json")["train"]
    forks.run(script, "--resume", tmp_path / "a", "--steps", 4)
    forks.run("eval", tmp_path / "a", "--workers", 0, "--out", tmp_path / "e")
    assert matrix(tmp_path / "e/eval.json") == matrix(tmp_path / "a")


def test_a_step_with_a_non_finite_gradient_is_skipped(run, tmp_path, monkeypatch):
    poisoned(monkeypatch, {3, 4})("--root", tiny_set(), "--out", tmp_path / "a", *TINY)
    losses = logged(tmp_path / "a", "loss")
    assert losses[4] is losses[5] is None and losses[3] is not None and losses[6] is not None
    last = load_state(tmp_path / "a/last.pt")
    assert all(t.isfinite().all() for t in last["net"].values())
    steps = {int(s["step"]) for s in last["opt"]["state"].values() if "step" in s}
    assert steps == {4} and last["state"]["step"] == 6


def test_four_bad_steps_are_survived_and_a_good_one_forgets_them(tmp_path, monkeypatch):
    bad = {0, 1, 2, 3, 5, 6, 7, 8}
    poisoned(monkeypatch, bad)("--root", tiny_set(), "--out", tmp_path / "a", *TINY, "--steps", 10)
    assert load_state(tmp_path / "a/last.pt")["state"]["bad"] == 0


def test_five_in_a_row_end_the_run_and_name_the_images(forks, tmp_path):
    text = forks.run("train_seg", "--root", tiny_set(), "--out", tmp_path / "a", *TINY,
                     "--loss", "1e39*ce", ok=2)
    said = text.splitlines()[-1]
    assert said.startswith("error: 5 non-finite gradients in a row at step 5, last images ")
    assert len(re.findall(r"train/images/scene_\d+", said)) == 4 and "--lr below 0.003" in said
    assert load_state(tmp_path / "a/last.pt")["state"]["step"] == 4  # it can be looked at


# ---- bad input

@pytest.mark.parametrize("flags, said", [
    (["--model", "unetformer", "--head", "unet"], "--head goes with --model vit, not unetformer"),
    (["--freeze-bn"], "--freeze-bn is gone: batches of one freeze BatchNorm by themselves"),
    (["--loss", "ce+nonsense"], "unknown term 'nonsense'"),
    (["--crop", "nan"], "expected a whole number from 16"),
    (["--save", "head"], "--save head needs a frozen backbone from --weights"),
    (["--unfreeze", "few"], "--unfreeze: few: expected a number of blocks, or all"),
    (["--scale", "2", "1"], "expected the lower number first"),
    (["--split-file", "none.json"], "none.json"),
    (["--val-frac", "0"], "--val-frac 0 holds nothing out; type --final"),
    (["--val-frac", "0.5"], "a data set that has a val"),
    (["--weights", "none.pth"], "none.pth: no such file or folder"),
    (["--out", ""], "--out is empty")])
def test_what_is_typed_wrong_is_one_line_and_nothing_is_written(forks, tmp_path, flags, said):
    text = forks.run("train_seg", "--root", tiny_set(), *FOLDER, "--out", tmp_path / "x", *flags,
                     ok=2)
    last = text.splitlines()[-1]
    assert last.startswith("error: ") and said in last and "Traceback" not in text
    assert not (tmp_path / "x").exists()
    if "--weights" in flags:  # before the masks are counted
        assert text.count("\n") == 1


def test_too_few_or_many_bands_stop_before_anything_is_written(forks, tmp_path):
    root = shutil.copytree(tiny_set(), tmp_path / "set")
    text = forks.run("train_seg", "--root", root, *TINY, "--bands", "4,2,1",
                     "--out", tmp_path / "x", ok=2)
    assert "scene_000" in text.splitlines()[-1] and not (tmp_path / "x").exists()


def test_one_class_everywhere_is_said(run, forks, tmp_path):
    root = shutil.copytree(tiny_set(), tmp_path / "set")
    for mask in root.glob("*/masks/*.png"):
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(mask)
    flags = ["--root", root, *TINY, "--eval-every", 6, "--lr", 0.03, "--out", tmp_path / "a"]
    assert "WARNING: one class everywhere" in forks.run("train_seg", *flags)
    assert np.count_nonzero(np.sum(matrix(tmp_path / "a"), 0)) == 1
