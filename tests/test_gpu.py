"""The scripts on a real GPU: as on the CPU, in bf16, compiled, in DDP, and without waiting.

    NANORS_TEST_GPU=1 python -m pytest tests/test_gpu.py        other tests compare bits, and hide the GPU
"""
import os
import shutil
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from forks import ROOT
from PIL import Image
from runs import TINY, forks, interrupt, logged, matrix, tiny_set, trained  # noqa: F401, forks is a fixture
from test_scenes import make_scenes

import train_seg
from models.checkpoint import load_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or hidden without NANORS_TEST_GPU=1")

FP32 = [*TINY, "--amp", "off"]
DEVICES = {"gpu": "cuda", "cpu": "cpu"}


def losses(run):
    return list(logged(run, "loss").values())


def on(device, forks, script, out, *flags):
    """The losses of a run of a script on the tiny set."""
    forks.run(script, "--root", tiny_set(), "--out", out, *flags, "--device", device)
    found = losses(out)
    assert len(found) == 6 and np.isfinite(found).all()
    return found


SCRIPTS = {
    "fpn": ("train_seg", FP32, 1e-3),
    "all losses": ("train_seg", [*FP32, "--loss", "ce+dice+lovasz+boundary+focal"], 1e-3),
    "mixed": ("train_seg", [*FP32, "--mixup", 0.5, "--cutmix", 0.5, "--accum", 2], 1e-3),
    "upernet": ("train_seg", [*FP32, "--head", "upernet"], 1e-3),
    "unetformer": ("train_seg", [*TINY[:-2], "--model", "unetformer", "--amp", "off", "--crop", 64], 0.05),
    "bf16": ("train_seg", TINY, 0.05),
    "compiled": ("train_seg", [*FP32, "--compile"], 1e-3),
    "points": ("train_points", [*FP32, "--grow", 1, "--ema", 0.5], 1e-3),
    "distilled": ("train_kd", FP32, 1e-3)}


@pytest.mark.parametrize("which", SCRIPTS)
def test_it_trains_as_on_the_cpu(which, forks, tmp_path):  # noqa: F811
    script, flags, off = SCRIPTS[which]
    if script == "train_kd":
        flags = [*flags, "--teacher", trained()]
    on_gpu = on("cuda", forks, script, tmp_path / "gpu", *flags)
    plain = [flag for flag in flags if flag != "--compile"]
    on_cpu = on("cpu", forks, script, tmp_path / "cpu", *plain, *(["--amp", "off"] if which == "bf16" else []))
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=off)


def test_killed_it_goes_on_and_so_does_the_cpu(forks, tmp_path):  # noqa: F811
    whole = on("cuda", forks, "train_seg", tmp_path / "a", *FP32)
    flags = ["--root", tiny_set(), "--out", tmp_path / "b", *FP32, "--device", "cuda"]
    code, text = interrupt(forks, signal.SIGTERM, tmp_path / "b", "train_seg", *flags)
    assert code == 128 + signal.SIGTERM, text
    done = load_state(tmp_path / "b/last.pt")["state"]["step"]
    assert done < 6
    for name, device in DEVICES.items():
        out = shutil.copytree(tmp_path / "b", tmp_path / name)
        forks.run("train_seg", "--resume", out, "--device", device)
        assert len(losses(out)) == 6
        np.testing.assert_allclose(losses(out)[done:], whole[done:], rtol=1e-3)


def test_kept_features_are_those_of_the_run_itself(forks, tmp_path):  # noqa: F811
    flags = [*TINY[:-2], "--weights", trained(), "--views", 2]
    fresh = on("cuda", forks, "train_seg", tmp_path / "a", *flags)
    kept = on("cuda", forks, "train_seg", tmp_path / "b", *flags, "--cache-features", tmp_path / "f")
    np.testing.assert_allclose(kept, fresh, rtol=0.02)


@pytest.mark.parametrize("mode", ["finetune", "linear", "knn"])
def test_whole_images(mode, forks, tmp_path):  # noqa: F811
    root = make_scenes(tmp_path / "scenes")
    flags = dict(finetune=["--arch", "nano8", "--epochs", 3], linear=["--weights", trained()],
                 knn=["--weights", trained()])[mode]
    found = {}
    for name, device in DEVICES.items():
        out = tmp_path / name
        forks.run("train_cls", "--root", root, "--mode", mode, *flags, "--amp", "off", "--device", device,
                  "--out", out)
        found[name] = matrix(out)
    assert abs(np.array(found["gpu"]) - found["cpu"]).sum() <= 2  # one image


def test_it_predicts_and_scores_as_on_the_cpu(forks, tmp_path):  # noqa: F811
    ids = {}
    for name, device in DEVICES.items():
        out = tmp_path / name
        forks.run("predict", trained(), tiny_set() / "test/images", "--out", out, "--device", device,
                  "--amp", "off", "--tta", "flips")
        ids[name] = np.concatenate([np.asarray(Image.open(out / f"scene_{i:03}.png")) for i in range(3)])
        forks.run("eval", trained(), "--device", device, "--out", tmp_path / f"e-{name}", "--workers", 0,
                  "--amp", "off")
    assert (ids["gpu"] == ids["cpu"]).mean() > 0.999
    a, b = (np.array(matrix(tmp_path / f"e-{name}/eval.json")) for name in ids)
    assert abs(a - b).sum() < 0.002 * a.sum()


DDP_OF_ONE = """
import sys
import torch
torch.distributed.init_process_group("nccl", rank=0, world_size=1, init_method="file://" + sys.argv[1])
import train_seg
train_seg.main(train_seg.parse_args(sys.argv[2:]))
"""


def test_ddp_of_one_is_the_plain_run(forks, tmp_path):  # noqa: F811
    plain = on("cuda", forks, "train_seg", tmp_path / "a", *FP32)
    words = [tmp_path / "meet", "--root", tiny_set(), "--out", tmp_path / "b", *FP32, "--device", "cuda"]
    subprocess.run([sys.executable, "-c", DDP_OF_ONE, *map(str, words)], check=True, cwd=ROOT, env=dict(os.environ))
    np.testing.assert_allclose(losses(tmp_path / "b"), plain, rtol=1e-4)


def test_a_step_waits_once(tmp_path):
    """torch tells of what waits for the GPU; two runs differ by ten steps."""
    def waits(steps):
        flags = ["--root", tiny_set(), *TINY, "--steps", steps, "--log-every", 100, "--eval-every", 100, "--final",
                 "--out", tmp_path / f"{steps}", "--device", "cuda"]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                train_seg.main(train_seg.parse_args([str(flag) for flag in flags]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [f"{w.filename}:{w.lineno}" for w in found if "synchroniz" in str(w.message)]

    waits(2)  # warms up
    few, many = waits(21), waits(31)
    assert len(few) >= 21 and len(many) - len(few) <= 10, sorted(set(many))
