"""What the tests of the scripts share: a forked server, tiny data and flags, equality of runs.

    from runs import TINY, forks, same_run, tiny_set  # noqa: F401, forks is a fixture
    forks.run("train_seg", "--root", tiny_set(), "--out", out, *TINY)
"""
import atexit
import functools
import json
import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Forks
from PIL import Image

from data.demo import make
from models.checkpoint import load_state, save_weights
from models.nets import build
from models.vit import PRESETS

FOLDER = ["--dataset", "folder", "--workers", 0]
TINY = [*FOLDER, "--steps", 6, "--eval-every", 2, "--log-every", 1, "--batch-size", 4,
        "--crop", 32, "--warmup", 1, "--arch", "nano16"]
SEGMENTATION_FILES = {
    ".lock", "best.safetensors", "confusion.png", "curves.png", "last.pt", "log.jsonl",
    "files.json", "protocol.json", "results.json", "samples.png", "split.json"}


@functools.cache
def server():
    forks = Forks()
    atexit.register(forks.close)
    forks.run("eval", "--help")  # now it has started
    return forks


@pytest.fixture
def forks():
    """The one server of this test session: it has imported torch and the scripts already."""
    return server()


@functools.cache
def place():
    """A folder of this test session."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def tiny_set():
    """Demo scenes of 64 x 64 pixels: 6 to train, 2 for val, 3 to test."""
    return make(place() / "demo", scenes=(6, 2, 3), size=64)


@functools.cache
def trained():
    """A run of train_seg.py on them that has learned to tell road from grassland."""
    out = place() / "trained"
    flags = [*TINY, "--arch", "nano8", "--steps", 40, "--eval-every", 20, "--log-every", 20,
             "--warmup", 5]
    server().run("train_seg", "--root", tiny_set(), "--out", out, *flags)
    return out


# ---- what a run has written

def read(path):
    return json.loads(Path(path).read_text())


def logged(run, key):
    """{step: value} of log.jsonl."""
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in rows if key in row}


def matrix(path):
    """The confusion matrix in results.json of a run, or in an eval.json."""
    path = Path(path)
    return read(path / "results.json" if path.is_dir() else path)["confusion"]


def equal(a, b):
    """Are these nested tensors and values equal, bit for bit?"""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same_run(a, b):
    """Two runs have learned, logged and scored the same; only times, paths and commands differ."""
    assert (a / "best.safetensors").read_bytes() == (b / "best.safetensors").read_bytes()
    assert (a / "log.jsonl").read_text() == (b / "log.jsonl").read_text()
    assert matrix(a) == matrix(b)
    x, y = (load_state(run / "last.pt") for run in (a, b))
    for last in (x, y):
        del last["args"], last["state"]["seconds"], last["state"]["command"]
        last["state"].pop("speed", None)
    assert x.keys() == y.keys()
    for key in x:
        assert equal(x[key], y[key]), key


# ---- signals

@pytest.fixture
def keep_signals():
    """For a script in this process that an error ends: it gives no signals back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def written(run):
    """When last.pt was written; None before the first one."""
    file = run / "last.pt"
    return file.stat().st_mtime_ns if file.exists() else None


def interrupt(forks, number, run, script, *argv):
    """Starts a script, sends the signal at its next last.pt -> exit code, what was printed.

    A kill comes when the file is there. What a script hears comes while it is written, or the next step may be first.
    """
    def writing():
        return set(run.glob("last.pt.*.tmp")) - left

    before, left = written(run), set(run.glob("last.pt.*.tmp"))
    pid = forks.start(script, *argv)
    deadline = time.monotonic() + 60
    while written(run) == before and time.monotonic() < deadline:
        if number != signal.SIGKILL and writing():
            break
        time.sleep(0.005)
    os.kill(pid, number)
    return forks.finish()


# ---- a run of an earlier version

def old_run(folder, spec):
    """best.safetensors as it was written before this version, of a random network -> the network.

    It segments the tiny set in one window per image.
    """
    torch.manual_seed(0)
    d = read(tiny_set() / "dataset.json")
    spec = spec | dict(classes=len(d["classes"]))
    net = build(spec).eval()
    meta = dict(
        model=spec, classes=d["classes"], ignore=[], norm="sat", crop=64, overlap=0.25, amp="off",
        saved="all", weights=dict(path=None, sha256=None), dataset="demo",
        root=str(tiny_set()), source="folder", variant=None, chosen_on="val", reported="test",
        reading=dict(bands=None, input_range=None), report={}, splits={}, step=6, val_miou=0.1)
    save_weights(folder / "best.safetensors", net.state_dict(), meta)
    return net


OLD_SPECS = {
    "vit without final norm, blocks of its own": dict(
        name="vit", backbone=PRESETS["nano16"], head="fpn", taps=[1, 3], feat_norm=False),
    "deeplabv3 of output stride 8": dict(name="deeplabv3", options=dict(output_stride=8))}


def ids_of(net, file):
    """(H, W) what an old run must say of an image: DINOv3's SAT normalisation, one window."""
    mean, std = np.array([0.430, 0.411, 0.296]), np.array([0.213, 0.156, 0.143])
    x = (np.asarray(Image.open(file)) / 255 - mean) / std
    with torch.no_grad():
        logits = net(torch.tensor(x.transpose(2, 0, 1)[None], dtype=torch.float32))
    return logits[0].argmax(0).numpy()
