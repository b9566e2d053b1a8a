"""The main job as a user types it: train, resume, kill, ranks, evaluate, predict, and what bad input says."""
import contextlib
import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import torchvision
from forks import Forks
from PIL import Image

import predict
from data.datasets import normalise
from data.demo import make
from data.common import BadInput, write
from data.io import Labels
from models.checkpoint import load_state, load_weights

TINY = ["--steps", 8, "--eval-every", 2, "--log-every", 1, "--batch-size", 4, "--crop", 64, "--warmup", 2,
        "--arch", "nano16", "--dataset", "folder", "--workers", 0]


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data") / "demo", scenes=(8, 4, 5), size=128)


@pytest.fixture(scope="module")
def run(demo, forks, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a"
    forks.run("train_seg", "--root", demo, "--out", out, *TINY)
    return out


def same_bytes(a, b):  # best.safetensors byte by byte; last.pt holds times and paths too, so its tensors one by one
    x, y = (load_state(f / "last.pt") for f in (a, b))
    assert (a / "best.safetensors").read_bytes() == (b / "best.safetensors").read_bytes()
    assert x["net"].keys() == y["net"].keys() and all(torch.equal(x["net"][k], y["net"][k]) for k in x["net"])
    assert x["step"] == y["step"] and x["best"] == y["best"]
    assert (a / "log.jsonl").read_text() == (b / "log.jsonl").read_text()
    assert matrix(a / "results.json") == matrix(b / "results.json")


def matrix(path):
    return json.loads(path.read_text())["confusion"]


def column(run, key):  # of log.jsonl: {step: value}
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in rows if key in row}


def test_the_run_folder_holds_what_the_design_promises(run):
    assert sorted(p.name for p in run.iterdir()) == [
        "best.safetensors", "confusion.png", "curves.png", "last.pt", "log.jsonl", "protocol.json", "results.json",
        "samples.png", "split.json"]
    r = json.loads((run / "results.json").read_text())
    assert {"miou", "oa", "iou", "majority_miou", "split", "steps", "seconds", "command"} <= set(r)
    assert r["split"] == "test" and r["steps"] == 8 and set(r["iou"]) == set(r["pixels"])
    assert load_weights(run)[1]["classes"][0]["name"] == "field"


def test_same_command_same_bytes_whatever_the_workers(demo, run, forks, tmp_path):
    forks.run("train_seg", "--root", demo, "--out", tmp_path / "b", *TINY[:-1], 2)
    same_bytes(run, tmp_path / "b")


def test_killed_at_ten_random_moments(demo, forks, tmp_path):
    flags = ["--root", demo, *TINY, "--steps", 16, "--ema", 0.9, "--cutmix", 0.5, "--mixup", 0.5, "--focus", 0.5]
    began = time.time()
    forks.run("train_seg", *flags, "--out", tmp_path / "whole")
    length, kills, clock = time.time() - began, 0, random.Random(0)
    while kills < 10:
        out = tmp_path / f"killed-{kills}"
        while True:
            again = ["--resume", out] if (out / "last.pt").exists() else [*flags, "--out", out]
            pid = forks.start("train_seg", *again)
            time.sleep(clock.uniform(0, length * 0.7))
            if kills < 10:
                with contextlib.suppress(ProcessLookupError):  # it was faster
                    os.kill(pid, signal.SIGKILL)
            code, text = forks.finish()
            assert code in (0, -signal.SIGKILL), text
            kills += code != 0
            if code == 0:
                break
        same_bytes(tmp_path / "whole", out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(demo, run, forks, tmp_path, number):
    pid = forks.start("train_seg", "--root", demo, "--out", tmp_path / "c", *TINY)
    while not (tmp_path / "c/last.pt").exists():
        time.sleep(0.01)
    os.kill(pid, number)
    code, text = forks.finish()
    assert code == 128 + number and f"--resume {tmp_path / 'c'}" in text
    forks.run("train_seg", "--resume", tmp_path / "c")
    same_bytes(run, tmp_path / "c")


def test_resume_refuses_what_would_make_it_a_lie(run, forks):
    text = forks.run("train_seg", "--resume", run, "--batch-size", 8, ok=2)
    assert "batch_size = 4, not 8" in text and text.count("\n") == 1
    assert "nothing to resume" in forks.run("train_seg", "--resume", run.parent / "none", ok=2)


def test_an_existing_run_is_not_overwritten(demo, run, forks):
    assert f"--resume {run}" in forks.run("train_seg", "--root", demo, "--out", run, *TINY, ok=2)


def test_ranks_train_alike_and_evaluate_exactly_alike(demo, run, forks, tmp_path):
    losses, matrices = {}, {}
    for ranks in (1, 2, 3):
        out = tmp_path / f"r{ranks}"
        flags = [*TINY, "--batch-size", 6 // ranks, "--steps", 3, "--loss", "ce+0.5*dice+lovasz+boundary+focal"]
        forks.run("train_seg", "--root", demo, "--out", out, *flags, ranks=ranks)
        losses[ranks] = list(column(out, "loss").values())
        forks.run("eval", run, "--out", out / "e", "--workers", 0, ranks=ranks)
        matrices[ranks] = matrix(out / "e/eval.json")
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-4)
    np.testing.assert_allclose(losses[3], losses[1], rtol=1e-4)
    assert matrices[1] == matrices[2] == matrices[3] == matrix(run / "results.json")


@pytest.mark.parametrize("model", ["unetformer", "deeplabv3", "effunet"])
def test_every_network_trains_resumes_evaluates_and_predicts(model, demo, forks, tmp_path):
    flags = ["--root", demo, *TINY[:-6], "--model", model, "--crop", 64, "--overlap", 0, "--steps", 3,
             "--eval-every", 3, "--batch-size", 2, "--workers", 0, "--dataset", "folder", "--ema", 0.5]
    forks.run("train_seg", *flags, "--out", tmp_path / "a")
    pid = forks.start("train_seg", *flags, "--out", tmp_path / "b")
    while not (tmp_path / "b/last.pt").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert forks.finish()[0] in (143, 0)
    forks.run("train_seg", "--resume", tmp_path / "b")  # dropout and BatchNorm's statistics too
    same_bytes(tmp_path / "a", tmp_path / "b")
    forks.run("eval", tmp_path / "a", "--out", tmp_path / "e", "--workers", 0)
    assert matrix(tmp_path / "e/eval.json") == matrix(tmp_path / "a/results.json")
    forks.run("predict", tmp_path / "a", next((demo / "test/images").iterdir()), "--out", tmp_path / "p")


def test_flags_of_another_model_are_refused(demo, forks):
    text = forks.run("train_seg", "--root", demo, "--model", "unetformer", "--head", "unet", ok=2)
    assert "--head goes with --model vit, not unetformer" in text
    assert "--freeze-bn goes with --model deeplabv3" in forks.run("train_seg", "--freeze-bn", ok=2)


def test_a_bad_step_leaves_batch_norm_alone(demo, tmp_path, monkeypatch):
    import train_seg
    monkeypatch.setattr(train_seg.signal, "signal", lambda *args: None)
    forward_, steps = train_seg.unetformer.ResNet18.forward, iter(range(10**6))

    def forward(self, x):  # the third step's images are infinite
        return forward_(self, x * float("inf") if self.training and next(steps) == 2 else x)

    monkeypatch.setattr(train_seg.unetformer.ResNet18, "forward", forward)
    flags = ["--root", demo, *TINY[:-6], "--model", "unetformer", "--crop", 64, "--steps", 4, "--dataset", "folder",
             "--workers", 0, "--out", tmp_path / "a"]
    train_seg.main(train_seg.parse_args([str(f) for f in flags]))
    assert all(t.isfinite().all() for t in load_weights(tmp_path / "a")[0].values())


def test_a_cnn_starts_from_its_trunk_file(demo, forks, tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    flags = ["--root", demo, *TINY[:-6], "--model", "unetformer", "--steps", 1, "--dataset", "folder", "--workers", 0]
    text = forks.run("train_seg", *flags, "--out", tmp_path / "a", "--weights", tmp_path / "resnet18.pth", "--crop", 64)
    assert "layout=torchvision, 122 of 122 tensors (not needed: classifier)" in text and "random: decoder" in text
    assert "nor" in forks.run("train_seg", *flags, "--out", tmp_path / "b", "--weights", demo / "dataset.json", ok=2)


def test_accumulation_is_the_large_batch(demo, forks, tmp_path):
    flags = ["--root", demo, *TINY, "--loss", "ce+focal+lovasz", "--steps", 4]
    forks.run("train_seg", *flags, "--out", tmp_path / "a")
    forks.run("train_seg", *flags, "--out", tmp_path / "b", "--batch-size", 1, "--accum", 4)
    a, b = (list(column(tmp_path / out, "loss").values()) for out in "ab")
    np.testing.assert_allclose(a, b, rtol=1e-4)


def test_eval_and_predict_agree(demo, run, forks, tmp_path):
    text = forks.run("predict", run, demo / "test/images", "--out", tmp_path / "p")
    names = [p.stem for p in sorted((demo / "test/images").iterdir())]
    assert f"masks of {len(names)} images" in text
    assert {p.name for p in (tmp_path / "p").iterdir()} == {"classes.json"} | {
        n + end for n in names for end in (".png", "_color.png", "_overlay.jpg")}
    assert "type train" in forks.run("eval", run, "--masks", tmp_path / "p", ok=2)  # never a guess
    flags = ["--mask-ids", "train", "--out", tmp_path / "e", "--workers", 0]
    forks.run("eval", run, "--masks", tmp_path / "p", *flags)
    assert matrix(tmp_path / "e/eval.json") == matrix(run / "results.json")
    (tmp_path / "p" / f"{names[1]}.png").unlink()
    assert f"{names[1]}.png: no such mask" in forks.run("eval", run, "--masks", tmp_path / "p", *flags, ok=2)


def test_eval_says_when_the_images_chose_the_weights(run, forks, tmp_path):
    text = forks.run("eval", run, "--split", "val", "--out", tmp_path, "--workers", 0)
    assert "WARNING: the model's own val images" in text


def test_predict_any_size_raw_colours_and_a_bad_file(demo, forks, tmp_path):
    root = tmp_path / "colour"
    shutil.copytree(demo, root)
    d = json.loads((root / "dataset.json").read_text())
    labels = Labels(d["classes"])
    for mask in root.glob("*/masks/*.png"):  # the same set with RGB masks
        Image.fromarray(labels.colors[np.array(Image.open(mask))]).save(mask)
    write(root / "dataset.json", d | {"classes": [{"name": c["name"], "color": c["color"]} for c in d["classes"]]})
    forks.run("train_seg", "--dataset", "folder", "--root", root, "--out", tmp_path / "run", *TINY, "--steps", 2)
    images = tmp_path / "in/sub"
    images.mkdir(parents=True)
    sizes = (1, 1), (40, 300), (65, 64), (1, 66_000)  # the last is more than a JPEG holds
    for h, w in sizes:
        Image.fromarray(np.full((h, w, 3), 90, np.uint8)).save(images / f"{h}x{w}.png")
    (images / "broken.png").write_bytes((images / "40x300.png").read_bytes()[:60])
    (images / "notes.txt").write_text("not an image")
    out = tmp_path / "out"
    text = forks.run("predict", tmp_path / "run", tmp_path / "in", "--out", out, "--label-out", "raw", ok=2)
    assert "broken.png" in text and "masks of 4 images" in text
    for h, w in sizes:
        raw = np.array(Image.open(out / f"sub/{h}x{w}.png"))
        assert raw.shape == (h, w, 3) and (raw == Image.open(out / f"sub/{h}x{w}_color.png")).all()
    assert Image.open(out / "sub/1x66000_overlay.jpg").size == (33_000, 1)
    assert not (out / "sub/broken.png").exists()
    text = forks.run("predict", tmp_path / "run", images / "1x1.png", "--out", out, ok=2)  # other values than before
    assert "classes.json: of other classes or --label-out" in text
    write(tmp_path / "mine/classes.json", {"mine": 1})
    forks.run("predict", tmp_path / "run", images / "1x1.png", "--out", tmp_path / "mine", ok=2)
    assert json.loads((tmp_path / "mine/classes.json").read_text()) == {"mine": 1}
    shutil.copy(images / "1x1.png", tmp_path)
    text = forks.run("predict", tmp_path / "run", tmp_path / "1x1.png", images, "--out", tmp_path / "p", ok=2)
    assert "both would become 1x1.png" in text and not (tmp_path / "p").exists()


@pytest.mark.parametrize("overlap", [0, 0.25, 0.7])
def test_predict_blends_strips_as_windows_are_blended(overlap, run):
    net, meta = predict.load_net(run, None)
    image = np.random.default_rng(0).integers(0, 256, (150, 100, 3), np.uint8)
    *_, (ids, rows) = predict.ids_by_strips(net, image, meta["norm"], 64, overlap, 3, False, whole=0)
    with torch.inference_mode():
        want = predict.logits_of(net, normalise(image, meta["norm"]), 64, overlap, 3, False).max(0).indices
    assert rows == 150 and len(np.unique(ids)) > 1 and (ids == want.numpy()).mean() > 0.999  # two ways to round a sum


def test_what_is_transparent_gets_no_class(run, demo, forks, tmp_path):
    image = Image.open(next((demo / "test/images").iterdir())).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 50, 30))  # left, top, right, bottom
    image.save(tmp_path / "a.png")
    forks.run("predict", run, tmp_path / "a.png", "--out", tmp_path / "p")
    ids = np.array(Image.open(tmp_path / "p/a.png"))
    assert (ids[:30, :50] == 255).all() and (ids == 255).sum() == 1500
    names = [p.stem for p in sorted((demo / "test/images").iterdir())]
    forks.run("predict", run, demo / "test/images", "--out", tmp_path / "p")
    for name in names:  # the masks of predict.py go back into eval.py, transparent pixels and all
        a = np.array(Image.open(tmp_path / f"p/{name}.png"))
        a[0, 0] = 255
        Image.fromarray(a).save(tmp_path / f"p/{name}.png")
    flags = ["--masks", tmp_path / "p", "--mask-ids", "train", "--workers", 0]
    text = forks.run("eval", run, *flags, "--out", tmp_path / "e", ok=2)
    assert f"{names[0]}.png" in text and "expected" in text  # a labelled pixel without an answer
    text = forks.run("predict", run, tmp_path / "a.png", "--out", tmp_path / "r", "--label-out", "raw", ok=2)
    assert "--label-out train" in text and not (tmp_path / "r/a.png").exists()


def test_summary_is_a_row_per_experiment(run, demo, forks, tmp_path):
    for seed in (1, 2):
        out = tmp_path / f"seed-{seed}"
        forks.run("train_seg", "--root", demo, "--out", out, *TINY, "--steps", 2, "--seed", seed)
    shutil.copytree(run, tmp_path / "killed", ignore=shutil.ignore_patterns("results.json"))
    text = forks.run("eval", "--summary", run, tmp_path / "seed-1", tmp_path / "seed-2", tmp_path / "killed", demo)
    head, _, first, second, last = text.splitlines()
    assert head.count("|") == first.count("|") == second.count("|")
    a, b = (json.loads((tmp_path / f"seed-{s}/results.json").read_text())["miou"] for s in (1, 2))
    assert second.startswith("| seed-1, seed-2 | demo | test | 8 of 8 | 1, 2 | "
                             f"{(a + b) / 2:.4f} +/- {abs(a - b) / 2 ** 0.5:.4f} |")
    assert first.startswith(f"| {run.name} | demo | test |") and "killed: not finished" in last
    assert "no results.json" in forks.run("eval", "--summary", demo, ok=2)


def poisoned(monkeypatch, steps):  # the loss of these calls is NaN
    import train_seg
    calls, compute = iter(range(10**6)), train_seg.compute

    def nan(*args):
        return compute(*args) * (float("nan") if next(calls) in steps else 1)

    monkeypatch.setattr(train_seg, "compute", nan)
    monkeypatch.setattr(train_seg.signal, "signal", lambda *args: None)  # pytest keeps its own Ctrl-C
    return lambda *argv: train_seg.main(train_seg.parse_args([str(a) for a in argv]))


def test_a_non_finite_step_is_skipped(demo, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, {3, 4})("--root", demo, "--out", tmp_path / "a", *TINY)
    assert all(t.isfinite().all() for t in load_state(tmp_path / "a/last.pt")["net"].values())
    assert "rate halved" not in capsys.readouterr().out


def test_five_non_finite_steps_go_back_once_then_stop_and_name_files(demo, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, set(range(2, 7)))("--root", demo, "--out", tmp_path / "a", *TINY, "--steps", 10)
    assert "weights of step 6 again, rate halved" in capsys.readouterr().out
    assert load_state(tmp_path / "a/last.pt")["rate"] == 0.5
    with pytest.raises(BadInput, match=r"gradients in a row at step 12.*train/images/scene_\d+.*--lr below"):
        poisoned(monkeypatch, set(range(2, 40)))("--root", demo, "--out", tmp_path / "b", *TINY, "--steps", 20)
