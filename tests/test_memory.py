"""Memory that is too small, in every phase of every script: one line that says what to lower."""
import runpy
import sys

import pytest
import torch
from forks import ROOT
from runs import TINY, keep_signals, tiny_set, trained  # noqa: F401, one is a fixture
from test_scenes import make_scenes

from models.classify import Knn
from models.infer import rehearse
from models.nets import make

TRAIN = ["--steps", 1, "--batch-size", 2, "--warmup", 1]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes") / "set")


def gpu(*args, **how):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total of ...")


def host(*args, **how):
    raise MemoryError("Unable to allocate 2.50 GiB for an array")


# Script, phase, what fails in it, what is to be lowered.
PHASES = [
    ("train_seg", "training", "models.losses.weighted_sum", "--batch-size or --crop"),
    ("train_seg", "validation", "models.infer.slide_down", "--batch-size or --crop"),
    ("train_points", "training", "models.losses.weighted_sum", "--batch-size or --crop"),
    ("train_kd", "training", "models.losses.weighted_sum", "--batch-size or --crop"),
    ("train_cls", "training", "torch.nn.functional.cross_entropy", "--batch-size or --size"),
    ("train_cls", "features", "data.scenes.prepare", "--batch-size or --size"),
    ("train_cls", "k-NN", "models.classify.Knn.votes", "--batch-size or --size"),
    ("predict", "windows", "models.infer.slide", "--batch-size"),
    ("eval", "windows", "models.infer.slide_down", "--batch-size"),
    ("eval", "reading", "data.datasets.read_valid", "--batch-size")]


@pytest.mark.parametrize("script, phase, fails, lower", PHASES)
def test_it_is_one_line_that_says_what_to_lower(
        script, phase, fails, lower, scenes, tmp_path, monkeypatch, capsys, keep_signals):  # noqa: F811
    flags = {"predict": [trained(), tiny_set() / "test", "--out", tmp_path / "a"],
             "eval": [trained(), "--workers", 0, "--cache", "off", "--out", tmp_path / "a"]}.get(script)
    if script == "train_cls":
        mode = ["--mode", "cnn", "--epochs", 1] if phase == "training" else ["--mode", "knn", "--features", "mean"]
        flags = ["--root", scenes, "--out", tmp_path / "a", *mode]
    elif flags is None:
        flags = ["--root", tiny_set(), "--out", tmp_path / "a", *TINY, *TRAIN]
        flags += ["--alpha", 0] if script == "train_kd" else []
    monkeypatch.setattr(fails, host if phase == "reading" else gpu)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    where = "" if phase == "reading" else " of the GPU"
    assert e.value.code == 2
    assert capsys.readouterr().err == f"error: out of memory{where} (asked for 2.50 GiB); lower {lower}\n"


def test_a_block_of_distances_at_a_time_is_all_of_them(monkeypatch):
    g = torch.Generator().manual_seed(0)
    bank, x = torch.randn(50, 8, generator=g), torch.randn(23, 8, generator=g)
    head = Knn(50, 8, 3, k=5).fit(bank, torch.arange(50) % 3)
    # By hand: the five nearest by cosine vote with exp(cosine / T).
    unit = torch.nn.functional.normalize
    near, index = (unit(x, dim=1) @ unit(bank, dim=1).T).double().topk(5)
    votes = (near / 0.07).exp()
    want = torch.stack([(votes * (index % 3 == c)).sum(1) for c in range(3)], dim=1) / votes.sum(1, keepdim=True)
    for distances in (1, 200, 2**26):
        monkeypatch.setattr("models.classify.DISTANCES", distances)
        torch.testing.assert_close(head(x).exp().double(), want.clamp(min=1e-6), rtol=1e-4, atol=1e-6)


def test_a_rehearsal_sees_windows_of_the_widest_image_and_changes_nothing():
    seen = []
    net, *_ = make("vit", 3, "none", "nano16", "fpn")
    net.train().register_forward_pre_hook(lambda net, x: seen.append(x[0].shape))
    before = {name: t.clone() for name, t in net.state_dict().items()}
    state = torch.random.get_rng_state()
    rehearse(net, [(300, 40), (90, 200), (64, 64)], dict(crop=64, overlap=0.25, batch=3, amp=False), 3)
    # 90 x 200 in windows of 64: two rows of four, three at a time.
    assert [tuple(shape) for shape in seen] == [(3, 3, 64, 64), (3, 3, 64, 64), (2, 3, 64, 64)]
    assert net.training and torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
