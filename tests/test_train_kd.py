"""train_kd.py as a user types it, and its limits: without a teacher, and with a perfect one."""
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from runs import (  # noqa: F401, forks is a fixture
    FOLDER, SEGMENTATION_FILES, TINY, equal, forks, interrupt, logged, place, read, same_run,
    server, tiny_set, trained)

from data.common import write
from data.datasets import NORMS
from models.checkpoint import load_state, load_weights, save_weights

CLASSES = ["green", "soil", "wet", "built", "street"]  # of the teacher that knows other classes
MAP = {"green": {"grassland": 0.7, "forest": 0.3}, "soil": "field", "wet": "water",
       "built": "building",
       "street": None}


@pytest.fixture
def teacher():
    return trained()


@pytest.fixture(scope="module")
def stranger():
    """A teacher of five other classes, another normalisation and larger windows."""
    root, out = place() / "other", place() / "stranger"
    shutil.copytree(tiny_set(), root)
    # Of field grassland forest water road building car pool.
    merge = np.uint8([1, 0, 0, 2, 4, 3, 4, 2])
    for mask in root.glob("*/masks/*"):
        Image.fromarray(merge[np.asarray(Image.open(mask))]).save(mask)
    classes = [{"name": name, "id": i, "color": f"#{i * 40:06x}"} for i, name in enumerate(CLASSES)]
    d = read(root / "dataset.json")
    write(root / "dataset.json", d | {"name": "other", "classes": classes})
    server().run("train_seg", "--root", root, "--out", out, *TINY, "--crop", 48, "--norm", "sat",
                 "--arch", "nano8")
    return out


@pytest.fixture(scope="module")
def difficulty():
    """What eval.py says of the training images."""
    server().run("eval", trained(), "--split", "train", "--difficulty", "--out", place() / "hard",
                 "--workers", 0)
    return place() / "hard/difficulty.json"


def values(run, key):
    return list(logged(run, key).values())


# ---- limits

def test_alpha_0_is_train_seg_bit_for_bit(forks, tmp_path):
    flags = ["--root", tiny_set(), *TINY, "--ema", 0.9, "--loss", "ce+0.5*dice", "--accum", 2,
             "--batch-size", 2]
    forks.run("train_seg", *flags, "--out", tmp_path / "a")
    forks.run("train_kd", *flags, "--out", tmp_path / "b", "--alpha", 0)
    best = [tmp_path / out / "best.safetensors" for out in "ab"]
    assert best[0].read_bytes() == best[1].read_bytes()
    a, b = (load_state(tmp_path / out / "last.pt") for out in "ab")
    for key in ("net", "ema"):
        assert all(torch.equal(t, b[key][name]) for name, t in a[key].items())
    assert values(tmp_path / "a", "loss") == values(tmp_path / "b", "loss")
    assert values(tmp_path / "a", "val_miou") == values(tmp_path / "b", "val_miou")


# The weights stay all but unchanged.
STILL = [*TINY, "--steps", 1, "--lr", 1e-9, "--weight-decay", 0]


def test_a_teacher_with_the_students_own_weights_has_nothing_to_teach(forks, tmp_path):
    forks.run("train_seg", "--root", tiny_set(), "--out", tmp_path / "a", *STILL)
    kd = ["--root", tiny_set(), *STILL, "--teacher", tmp_path / "a"]
    forks.run("train_kd", *kd, "--out", tmp_path / "b")
    forks.run("train_kd", *kd, "--out", tmp_path / "c", "--seed", 1)
    assert abs(logged(tmp_path / "b", "kd")[1]) < 1e-5 < logged(tmp_path / "c", "kd")[1]
    loss = logged(tmp_path / "a", "loss")[1]
    assert logged(tmp_path / "b", "hard")[1] == pytest.approx(0.3 * loss, rel=1e-5)
    assert logged(tmp_path / "b", "loss")[1] == pytest.approx(0.3 * loss, rel=1e-4)


def test_alpha_weighs_the_two_terms(teacher, forks, tmp_path):
    kd, hard = {}, {}
    for alpha in (0.25, 0.75, 1):
        flags = ["--root", tiny_set(), *STILL, "--teacher", teacher, "--alpha", alpha]
        out = tmp_path / str(alpha)
        forks.run("train_kd", *flags, "--out", out)
        kd[alpha], hard[alpha] = logged(out, "kd")[1], logged(out, "hard")[1]
    assert kd[0.75] == pytest.approx(3 * kd[0.25]) and kd[1] == pytest.approx(4 * kd[0.25])
    assert hard[0.25] == pytest.approx(3 * hard[0.75]) and hard[1] == 0


def test_the_teacher_sees_the_students_pixels_in_its_own_normalisation(forks, tmp_path):
    """Two teachers say the same: one of imagenet pixels, one of sat pixels, by its first layer."""
    teacher = tmp_path / "teacher"  # whose head does not see the pixels, too
    forks.run("train_seg", "--root", tiny_set(), *TINY, "--head", "linear", "--out", teacher)
    tensors, meta = load_weights(teacher)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in NORMS["imagenet"])
    other_mean, other_std = (torch.tensor(v).view(1, 3, 1, 1) for v in NORMS["sat"])
    # x = a z + b turns pixels z of sat into pixels x of imagenet; W x + c = (W a) z + (W b + c).
    a, b = other_std / std, (other_mean - mean) / std
    weight, bias = "backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"
    w, c = tensors[weight], tensors[bias]  # (C, 3, P, P), (C,)
    sat = tensors | {weight: w * a, bias: c + (w * b).sum((1, 2, 3))}
    save_weights(tmp_path / "sat/best.safetensors", sat, meta | dict(norm="sat"))
    # Of this one the pixels do not fit the first layer.
    save_weights(tmp_path / "wrong/best.safetensors", sat, meta)
    for name, run in dict(imagenet=teacher, sat=tmp_path / "sat", wrong=tmp_path / "wrong").items():
        forks.run("train_kd", "--root", tiny_set(), *STILL, "--teacher", run,
                  "--out", tmp_path / f"kd-{name}")
    kd = {name: logged(tmp_path / f"kd-{name}", "kd")[1] for name in ("imagenet", "sat", "wrong")}
    assert kd["sat"] == pytest.approx(kd["imagenet"], rel=1e-4)
    assert kd["wrong"] != pytest.approx(kd["imagenet"], rel=1e-3)


# ---- runs

def test_killed_stopped_and_resumed_with_everything_on(forks, tmp_path, stranger, difficulty):
    names = read(trained() / "split.json")["train"]
    write(tmp_path / "list.txt", "\n".join([names[0], names[1], names[1]]))
    write(tmp_path / "map.json", {"map": MAP})
    shutil.copy(difficulty, tmp_path / "hard.json")
    flags = ["--root", tiny_set(), *TINY, "--steps", 14, "--teacher", stranger,
             "--map", tmp_path / "map.json",
             "--focus", 0.7, "--sampler", "weighted", "--difficulty", tmp_path / "hard.json",
             "--replicate", tmp_path / "list.txt", "--lookahead", 2, "--restarts", 4, 2,
             "--ema", 0.9, "--warmup", 2]
    text = forks.run("train_kd", *flags, "--out", tmp_path / "a")
    assert "warm restarts: 12 of 14 steps, cycles end at 4, 12" in text
    assert "48 crops drawn with replacement, an image" in text
    assert "3 entries repeat training images: 9 instead of 6" in text
    before, after = text.split("step ", 1)
    assert "green 0.70 grassland + 0.30 forest" in re.sub(" +", " ", before)
    assert "silent about: road, car, pool" in before and "measured on 6 images" in before
    assert "12 of 12" in after

    code, _ = interrupt(forks, signal.SIGKILL, tmp_path / "b", "train_kd", *flags,
                        "--out", tmp_path / "b")
    assert code == -signal.SIGKILL
    for name in ("map.json", "list.txt", "hard.json"):
        (tmp_path / name).unlink()  # what counts stands in the run
    code, text = interrupt(forks, signal.SIGTERM, tmp_path / "b", "train_kd",
                           "--resume", tmp_path / "b")
    assert code == 128 + signal.SIGTERM and f"train_kd.py --resume {tmp_path / 'b'}" in text
    forks.run("train_kd", "--resume", tmp_path / "b")
    same_run(tmp_path / "a", tmp_path / "b")

    files = {p.name for p in (tmp_path / "a").iterdir()}
    assert files == SEGMENTATION_FILES | {"map.json", "replicated.txt", "difficulty.json"}
    assert read(tmp_path / "a/map.json")["map"]["street"] is None
    assert read(tmp_path / "a/difficulty.json") == read(difficulty)
    last = load_state(tmp_path / "a/last.pt")
    assert last["state"]["step"] == 12 and len(last["slow"]) > 50
    # The rate starts again after step 4, and was warmed up over the first two steps.
    done = np.array([0, 2, 4, 6, *range(8)]) / 8  # of a cycle
    rise = np.minimum(np.arange(1, 13) / 2, 1)
    want = 3e-3 * np.minimum(rise, 0.5 * (1 + np.cos(np.pi * done)))
    np.testing.assert_allclose(values(tmp_path / "a", "lr"), want)


def test_resume_refuses_another_teacher_and_another_alpha(forks, tmp_path, teacher):
    run = tmp_path / "a"
    forks.run("train_kd", "--root", tiny_set(), "--out", run, *TINY, "--steps", 1,
              "--teacher", teacher)
    text = forks.run("train_kd", "--resume", run, "--teacher", run, ok=2)
    assert "trained with teacher " in text and "name the run with that sha256" in text
    assert "alpha = 0.7, not 0.5" in forks.run("train_kd", "--resume", run, "--alpha", 0.5, ok=2)
    moved = shutil.copytree(teacher, tmp_path / "moved")
    text = forks.run("train_kd", "--resume", run, "--teacher", moved, "--steps", 2)
    assert "2 steps instead of 1" in text and read(run / "results.json")["steps"] == 2


def test_ranks_learn_alike(forks, tmp_path, stranger, difficulty):
    losses = {}
    for ranks in (1, 2):
        flags = [*TINY, "--batch-size", 4 // ranks, "--steps", 3, "--teacher", stranger,
                 "--map", "measured", "--sampler", "weighted", "--difficulty", difficulty]
        out = tmp_path / f"r{ranks}"
        forks.run("train_kd", "--root", tiny_set(), "--out", out, *flags, ranks=ranks)
        losses[ranks] = values(out, "kd") + values(out, "hard")
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-4)
    a, b = (read(tmp_path / f"r{ranks}/map.json") for ranks in (1, 2))
    assert a == b and a["teacher"] == CLASSES


def test_difficulty_of_eval_draws_hard_images_more_often(forks, tmp_path, difficulty):
    hard = read(difficulty)
    assert set(hard) == set(read(trained() / "split.json")["train"])
    one = max(hard, key=hard.get)
    write(tmp_path / "hard.json", {name: 5 * (name == one) for name in hard})
    flags = ["--root", tiny_set(), *TINY, "--steps", 1, "--alpha", 0, "--sampler", "weighted"]
    text = forks.run("train_kd", *flags, "--difficulty", tmp_path / "hard.json",
                     "--out", tmp_path / "a")
    assert "hard classes: 0 in 5 images, 5 in 1 images" in text
    # One image of weight 6 beside five of weight 1: 6/11 and 1/11 of 4 crops.
    assert "an image 0.4 to 2.2 times (--sampler weighted)" in text


def test_class_balanced_sampling_and_the_share_rule(forks, tmp_path):
    flags = ["--root", tiny_set(), *TINY, "--steps", 2, "--alpha", 0, "--sampler", "class-balanced",
             "--replicate", "4%", "--out", tmp_path / "a"]
    text = forks.run("train_kd", *flags)
    assert "8 crops drawn with replacement" in text
    listed = (tmp_path / "a/replicated.txt").read_text().splitlines()
    assert f"{len(listed)} entries repeat training images: {6 + len(listed)} instead of 6" in text
    counts = {}
    for name in read(tmp_path / "a/split.json")["train"]:
        mask = tiny_set() / f"{name.replace('images', 'masks')}.png"
        counts[name] = np.bincount(np.asarray(Image.open(mask)).flatten(), minlength=8)
    total = sum(counts.values())
    rare = [c for c in range(8) if 0 < total[c] < total.sum() / 16]
    assert listed == [name for name, n in counts.items() if max(n[rare]) >= 0.04 * n.sum()] != []


def test_a_cnn_as_student_and_as_teacher(forks, tmp_path, teacher):
    flags = ["--root", tiny_set(), *FOLDER, "--crop", 64, "--batch-size", 2, "--warmup", 1,
             "--log-every", 1]
    student = [*flags, "--model", "unetformer", "--steps", 2, "--teacher", teacher]
    code, text = interrupt(forks, signal.SIGTERM, tmp_path / "a", "train_kd", *student,
                           "--out", tmp_path / "a")
    assert code == 128 + signal.SIGTERM, text
    forks.run("train_kd", "--resume", tmp_path / "a")
    flags += ["--arch", "nano16", "--steps", 1, "--teacher", tmp_path / "a"]
    text = forks.run("train_kd", *flags, "--out", tmp_path / "b")
    assert "teacher " in text and ": unetformer, 8 classes" in text
    assert logged(tmp_path / "b", "kd")[1] > 0


def test_bad_steps_are_skipped_and_five_in_a_row_end_the_run(forks, tmp_path, teacher):
    flags = ["--root", tiny_set(), *TINY, "--teacher", teacher, "--lookahead", 2,
             "--out", tmp_path / "a"]
    text = forks.run("train_kd", *flags, "--loss", "1e39*ce", ok=2)
    said = text.splitlines()[-1]
    assert said.startswith("error: 5 non-finite gradients in a row at step 5, last images ")
    assert "train/images/scene_" in said
    assert "--lr below 0.003" in said
    last = load_state(tmp_path / "a/last.pt")
    assert last["state"]["bad"] == 4 and not last["opt"]["state"]
    assert all(t.isfinite().all() for t in [*last["net"].values(), *last["slow"]])


# ---- bad input

def refused(forks, tmp_path, *flags):
    text = forks.run("train_kd", "--root", tiny_set(), "--out", tmp_path / "x", *TINY, *flags, ok=2)
    last = text.splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in text and not (tmp_path / "x").exists()
    return last


def test_what_is_wrong_with_a_teacher(forks, tmp_path, teacher, stranger):
    assert "--teacher is missing; name the run folder" in refused(forks, tmp_path)
    assert "nothing for the teacher's 'green'" in refused(forks, tmp_path, "--teacher", stranger)
    said = refused(forks, tmp_path, "--teacher", teacher, "--map", tmp_path / "none.json")
    assert "none.json: no such file" in said
    write(tmp_path / "map.json", {"map": dict.fromkeys(CLASSES)})
    said = refused(forks, tmp_path, "--teacher", stranger, "--map", tmp_path / "map.json")
    assert "all of the teacher's classes go nowhere" in said
    said = refused(forks, tmp_path, "--teacher", teacher, "--bands", "3,2,1")
    assert "type the same --bands and --input-range" in said
    tensors, meta = load_weights(teacher)
    save_weights(tmp_path / "grey/best.safetensors", tensors, meta | dict(kinds=[[1, 8]]))
    said = refused(forks, tmp_path, "--teacher", tmp_path / "grey")
    assert "3 bands of 8 bits; expected 1 band of 8 bits" in said


def test_what_is_wrong_with_sampling(forks, tmp_path, difficulty):
    said = refused(forks, tmp_path, "--alpha", 0, "--sampler", "weighted")
    assert "--sampler weighted without --difficulty; make the file with python eval.py" in said
    hard = read(difficulty)
    one_missing = dict(list(hard.items())[1:])
    for content in (one_missing, dict.fromkeys(hard, -1), dict.fromkeys(hard, 0.5), [1]):
        write(tmp_path / "hard.json", content)
        said = refused(forks, tmp_path, "--alpha", 0, "--sampler", "weighted",
                       "--difficulty", tmp_path / "hard.json")
        assert "hard.json" in said
        assert "make the file with python eval.py RUN --split train --difficulty" in said
    write(tmp_path / "list.txt", "val/images/scene_000.png")
    said = refused(forks, tmp_path, "--alpha", 0, "--replicate", tmp_path / "list.txt")
    assert "is no image here" in said
    for share in ("0%", "101%", "x%"):
        said = refused(forks, tmp_path, "--alpha", 0, "--replicate", share)
        assert "expected a share above 0%" in said


@pytest.mark.parametrize("flags, said", [
    (["--lookahead", 5, "--restarts", 7, 3, "--steps", 30, "--eval-every", 15],  # 7 + 21 = 28
     "--lookahead 5: the run ends at step 28 and is validated every 15; choose the cycles of --restarts and"),
    (["--lookahead", 4, "--steps", 8, "--eval-every", 6],
     "the run ends at step 8 and is validated every 6"),
    (["--restarts", 40, 2, "--steps", 30], "--restarts 40 2 with --steps 30: no cycle would end"),
    (["--alpha", 1, "--teacher", "a", "--loss", "lovasz"], "--loss goes with --alpha below 1, not 1.0"),
    (["--warmup", 70], "--warmup 70: in 6 steps the rate would rise and not fall"),
    (["--warmup", 5, "--restarts", 4, 2], "--warmup 5: in 4 steps the rate"),
    (["--restarts", 4, 2, "--schedule", "poly"], "--restarts has cosines of its own; leave --schedule out"),
    (["--replicate", "nosuch.txt"], "--replicate nosuch.txt: no such file or folder"),
    (["--replicate", "100%"], "--replicate: no training image is so full of a rare class"),
    (["--cycle", 4, 2], "--cycle is gone: train_kd.py has --restarts STEPS MULT"),
    (["--mixup", 0.5], "--mixup is gone: train_seg.py and train_cls.py mix images"),
    (["--teacher-weights", "a"], "--teacher-weights is gone"),
    (["--teacher", "a"], "--teacher goes with --alpha above 0, not 0.0; leave it out"),
    (["--map", "measured"], "--map goes with --alpha above 0"),
    (["--temperature", 3], "--temperature goes with --alpha above 0"),
    (["--difficulty", "a.json"], "--difficulty goes with --sampler weighted, not uniform"),
    (["--model", "unetformer", "--arch", "nano8"], "--arch goes with --model vit, not unetformer")])
def test_flags_that_do_not_go_together(forks, tmp_path, flags, said):
    assert said in refused(forks, tmp_path, "--alpha", 0, *flags)


def test_lookahead_goes_with_restarts_that_end_where_it_meets(forks, tmp_path):
    flags = ["--root", tiny_set(), *TINY, "--alpha", 0, "--restarts", 4, 1, "--lookahead", 4,
             "--eval-every", 4]
    text = forks.run("train_kd", *flags, "--out", tmp_path / "a")
    assert "warm restarts: 4 of 6 steps" in text
    at = flags.index("--warmup")
    text = forks.run("train_kd", *flags[:at], *flags[at + 2:], "--out", tmp_path / "own")
    assert "warm-up 2 steps" in text  # half of the first cycle
    last = load_state(tmp_path / "a/last.pt")
    assert last["args"]["steps"] == last["state"]["step"] == 4
    assert read(tmp_path / "a/results.json")["steps"] == 4
    # Without RoPE's periods, which are no parameter.
    learned = [t for name, t in last["net"].items() if not name.endswith("periods")]
    assert equal(learned, last["slow"]) and equal(load_weights(tmp_path / "a")[0], last["net"])
