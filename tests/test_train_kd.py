"""Distillation: the KL by hand, maps by name, and the script: alpha 0 is train_seg, resume, ranks, other teachers."""
import json
import math
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forks import Forks
from PIL import Image

from data import classmap
from data.datasets import NORMS, normalise
from data.demo import make
from data.common import IGNORE, BadInput, write
from models.checkpoint import load_state, load_weights
from models.losses import distill, translate

TINY = ["--steps", 8, "--eval-every", 2, "--log-every", 1, "--batch-size", 4, "--crop", 64, "--warmup", 2,
        "--arch", "nano16", "--dataset", "folder", "--workers", 0]


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data") / "demo", scenes=(6, 2, 2), size=128)


@pytest.fixture(scope="module")
def teacher(demo, forks, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "teacher"
    forks.run("train_seg", "--root", demo, "--out", out, *TINY)
    return out


@pytest.fixture(scope="module")
def stranger(demo, forks, tmp_path_factory):
    """A teacher of five other classes, sat normalisation, larger windows: demo with its masks renamed and merged."""
    root = tmp_path_factory.mktemp("other") / "set"
    d = json.loads((demo / "dataset.json").read_text())
    names = ["green", "soil", "wet", "built", "street"]
    table = np.array([1, 0, 0, 2, 4, 3, 4, 2], np.uint8)  # field grassland forest water road building car pool
    for file in [*demo.glob("*/images/*"), *demo.glob("*/masks/*")]:
        image, to = Image.open(file), root / file.relative_to(demo)
        to.parent.mkdir(parents=True, exist_ok=True)
        (Image.fromarray(table[np.array(image)]) if "masks" in file.parts else image).save(to)
    write(root / "dataset.json", d | {"name": "other", "ignore": [], "classes": [
        {"name": n, "id": i, "color": f"#{i * 40:06x}"} for i, n in enumerate(names)]})
    out = root.parent / "run"
    forks.run("train_seg", "--root", root, "--out", out, *TINY, "--crop", 96, "--norm", "sat", "--arch", "nano8")
    return out


MAP = {"green": {"grassland": 0.7, "forest": 0.3}, "soil": "field", "wet": "water", "built": "building", "street": None}


def rows(run, key):
    return [row[key] for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if key in row]


def same(a, b):  # whole runs: weights byte by byte, optimiser state, and every logged number
    assert (a / "best.safetensors").read_bytes() == (b / "best.safetensors").read_bytes()
    assert (a / "log.jsonl").read_text() == (b / "log.jsonl").read_text()
    x, y = (load_state(run / "last.pt") for run in (a, b))
    assert all(torch.equal(x["net"][k], y["net"][k]) for k in x["net"])
    slow = [t for t in (x["opt"].get("slow") or [])]
    assert all(map(torch.equal, slow, y["opt"].get("slow") or []))
    return x


# ---- the KL term

def by_hand(z, q, y, T, known):
    total = valid = 0
    for b, i, j in np.ndindex(*y.shape):
        if y[b, i, j] == IGNORE:
            continue
        valid += 1
        weights = [math.exp(z[b, k, i, j] / T) if known[k] else 0.0 for k in range(z.shape[1])]
        m = sum(q[b, k, i, j] for k in range(z.shape[1]) if known[k])
        for k in range(z.shape[1]):
            if known[k] and q[b, k, i, j] > 0:
                total += q[b, k, i, j] * math.log(q[b, k, i, j] / m / (weights[k] / sum(weights)))
    return T * T * total / max(valid, 1)


@pytest.mark.parametrize("T", [1.0, 2.0, 5.0])
def test_kl_is_the_sum_over_classes_and_the_mean_over_valid_pixels(T):
    rng = np.random.default_rng(0)
    z, y = rng.normal(0, 3, (2, 4, 5, 3)), rng.integers(0, 4, (2, 5, 3))
    q = rng.dirichlet(np.ones(4), (2, 5, 3)).transpose(0, 3, 1, 2)
    q[:, :, 0, 0] *= 0.4  # dropped classes held the rest
    q[0, :, 1, 1] = 0
    y[:, 2] = IGNORE
    known = np.array([True, True, False, True])
    a, b, c = torch.tensor(z, requires_grad=True), torch.tensor(q), torch.tensor(y)
    for k in (np.ones(4, bool), known):
        value = distill(a, b, c, T, known=torch.tensor(k))
        assert value.item() == pytest.approx(by_hand(z, q, y, T, k), rel=1e-9)
    value.backward()
    assert (a.grad[:, :, 2] == 0).all() and (a.grad[:, 2] == 0).all() and (a.grad[0, :, 1, 1] == 0).all()
    assert (a.grad[:, :, 3:] != 0).any()
    whole = distill(a, b, c, T).item()
    for twice in (dict(repeats=2, dim=0), dict(repeats=2, dim=2)):  # a larger batch or image is no larger loss
        label = twice | dict(dim=max(0, twice["dim"] - 1))
        more = distill(a.repeat_interleave(**twice), b.repeat_interleave(**twice), c.repeat_interleave(**label), T)
        assert more.item() == pytest.approx(whole)
    assert distill(a, b, torch.full_like(c, IGNORE), T).item() == 0
    flat = torch.zeros(1, 2, 1, 1), torch.tensor([0.25, 0.75]).view(1, 2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long)
    assert distill(*flat).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_kl_is_torchs_and_zero_for_a_perfect_teacher():
    torch.manual_seed(0)
    z, y = torch.randn(3, 6, 8, 8), torch.zeros(3, 8, 8, dtype=torch.long)
    q = torch.randn(3, 6, 8, 8).softmax(1)
    want = F.kl_div((z / 2).log_softmax(1), q, reduction="sum") / y.numel() * 4
    torch.testing.assert_close(distill(z, q, y, 2.0), want)
    z.requires_grad_()
    value = distill(z, (z.detach() / 2).softmax(1), y, 2.0)
    value.backward()
    assert abs(value.item()) < 1e-6 and z.grad.abs().max() < 1e-8


# ---- from the teacher's classes to the student's

def test_what_the_teacher_cannot_tell_apart_is_left_to_the_student():
    torch.manual_seed(0)
    z, q = torch.randn(2, 5, 4, 3, dtype=torch.float64), torch.randn(2, 3, 4, 3, dtype=torch.float64).softmax(1)
    y = torch.zeros(2, 4, 3, dtype=torch.long)
    shares = torch.tensor([[0.7, 0.3, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0.5, 0.5]], dtype=torch.float64)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    value = distill(a, translate(q, shares, a, 2.0), y, 2.0)
    p = (b / 2).softmax(1)  # the oracle: KL between the teacher and the student's sums over each of its classes
    p = torch.stack([p[:, :2].sum(1), p[:, 2], p[:, 3:].sum(1)], 1)
    want = 4 * (q * (q / p).log()).sum(1).mean()
    torch.testing.assert_close(value, want)
    value.backward(), want.backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_a_map_of_one_class_each_is_the_same_either_way_and_mass_is_kept():
    torch.manual_seed(0)
    z, q = torch.randn(2, 4, 3, 3), torch.randn(2, 3, 3, 3).softmax(1)
    one = torch.eye(4)[[2, 0, 2]]
    assert torch.equal(translate(q, one, z), translate(q, one))
    several = torch.tensor([[0.5, 0.5, 0, 0], [0, 0.2, 0.8, 0], [0, 0, 0, 0]])  # class 1 in two rows, a row nowhere
    for logits in (None, z, 1000 * z):
        target = translate(q, several, logits)
        torch.testing.assert_close(target.sum(1), q[:, :2].sum(1))
        assert (target[:, 3] == 0).all()


# ---- maps

TEACHER, STUDENT = ["green", "soil", "wet", "built", "street"], ["field", "grassland", "forest", "water", "building"]


def read(tmp_path, **content):
    write(tmp_path / "map.json", content)
    return classmap.read_map(tmp_path / "map.json", TEACHER, STUDENT)


def test_a_map_goes_by_name_whatever_its_order(tmp_path):
    want = [[0, .7, .3, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    for rows in (MAP, dict(reversed(MAP.items()))):
        assert read(tmp_path, map=rows, teacher=TEACHER, student=STUDENT).tolist() == want
    many = read(tmp_path, map=dict.fromkeys(TEACHER, "forest"))
    assert many[:, 2].tolist() == [1] * 5 and many.sum() == 5
    assert classmap.same_names(["b", "a"], ["a", "b", "c"]).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("change, words", [
    ({"green": {"grassland": 0.7, "forest": 0.2}}, "shares of 'green' sum to 0.9, not 1"),
    ({"green": {"grassland": 1.5, "forest": -0.5}}, "expected a name"), ({"green": 3}, "goes to 3; expected a name"),
    ({"green": "gras"}, "'green' goes to 'gras', which the student does not have; it has field"),
    ({"greens": "field"}, "the teacher has no class 'greens'; it has green, soil")])
def test_a_wrong_map_is_refused_with_one_line(tmp_path, change, words):
    with pytest.raises(BadInput, match=re.escape(words)) as e:
        read(tmp_path, map=MAP | change)
    assert "map.json" in str(e.value) and "\n" not in str(e.value)


def test_the_rest_that_can_be_wrong_with_a_map(tmp_path):
    with pytest.raises(BadInput, match="nothing for the teacher's 'wet', 'street'"):
        read(tmp_path, map={k: v for k, v in MAP.items() if k not in ("wet", "street")})
    with pytest.raises(BadInput, match='"teacher" lists .*the order of its outputs counts'):
        read(tmp_path, map=MAP, teacher=TEACHER[::-1])
    with pytest.raises(BadInput, match='no "map" in it'):
        read(tmp_path, maps=MAP)
    (tmp_path / "map.json").write_text('{"map": {"green": "field", "green": "forest"}}')
    with pytest.raises(BadInput, match="a name stands twice"):
        classmap.read_map(tmp_path / "map.json", TEACHER, STUDENT)
    with pytest.raises(BadInput, match="equal class names.*'soil', 'wet'"):
        classmap.same_names(TEACHER, ["green", "built", "street"])


def test_the_measured_map_and_the_table():
    m = classmap.measured([[6, 2, 0], [0, 0, 0], [0, 1, 99]])
    assert m.tolist() == [[.75, .25, 0], [0, 0, 0], [0, .01, .99]]
    without = classmap.measured([[96, 3, 1], [0, 0, 0], [4, 0, 96]], 0.05)  # class 1 is rare, but all of it is there
    np.testing.assert_allclose(without, [[96 / 99, 3 / 99, 0], [0, 0, 0], [0, 0, 1]])
    named = classmap.matrix({"a": "x", "b": None, "c": {"y": 0.5, "z": 0.5}}, ["a", "b", "c"], ["x", "y", "z"])
    text = classmap.table(["a", "b", "c"], ["x", "y", "z"], named=named, measured=m)
    assert text.splitlines() == [
        "teacher  -> student (named)  -> student (measured)", "a        x                   0.75 x + 0.25 y",
        "b        -                   -", "c        0.50 y + 0.50 z     0.99 z"]
    assert "silent about: z" in classmap.table(["a"], ["x", "z"], named=np.array([[1, 0]]))


# ---- the script

def test_alpha_0_is_train_seg_bit_for_bit(demo, forks, tmp_path, teacher):
    flags = ["--root", demo, *TINY, "--cutmix", 0.5, "--mixup", 0.5, "--ema", 0.9, "--loss", "ce+0.5*dice"]
    forks.run("train_seg", *flags, "--out", tmp_path / "a")
    forks.run("train_kd", *flags, "--out", tmp_path / "b", "--alpha", 0, "--teacher", teacher)
    same(tmp_path / "a", tmp_path / "b")


def test_a_teacher_with_the_students_own_weights_has_nothing_to_teach(demo, forks, tmp_path):
    still = [*TINY, "--steps", 1, "--eval-every", 1, "--lr", 1e-9, "--weight-decay", 0]
    forks.run("train_seg", "--root", demo, "--out", tmp_path / "a", *still)  # the initial weights, all but unchanged
    forks.run("train_kd", "--root", demo, "--out", tmp_path / "b", *still, "--teacher", tmp_path / "a")
    forks.run("train_kd", "--root", demo, "--out", tmp_path / "c", *still, "--teacher", tmp_path / "a", "--seed", 1)
    assert abs(rows(tmp_path / "b", "kd")[0]) < 1e-5 < rows(tmp_path / "c", "kd")[0]
    hard, loss = rows(tmp_path / "b", "hard")[0], rows(tmp_path / "a", "loss")[0]
    assert hard == pytest.approx(0.3 * loss, rel=1e-5)


def test_killed_and_resumed_with_everything_on(demo, forks, tmp_path, teacher, stranger):
    names = sorted(p.stem for p in (demo / "train/images").iterdir())
    write(tmp_path / "list.txt", "\n".join([names[0], names[1], names[1]]))
    write(tmp_path / "map.json", {"map": MAP})
    flags = ["--root", demo, *TINY, "--steps", 14, "--teacher", stranger, "--map", tmp_path / "map.json",
             "--focus", 0.7, "--sampler", "weighted", "--difficulty", teacher, "--replicate", tmp_path / "list.txt",
             "--lookahead", 2, "--schedule", "restarts", "--cycle", 4, 2]
    text = forks.run("train_kd", *flags, "--out", tmp_path / "a")
    assert "warm restarts: 12 of 14 steps, since cycles end at 4, 12" in text
    assert "48 crops drawn with replacement, an image" in text
    assert "3 entries repeat training images: 9 instead of 6" in text
    before, after = text.split("loop ")
    assert "green    0.70 grassland + 0.30 forest" in re.sub(" +", " ", before).replace("green ", "green    ")
    assert "silent about: road, car, pool" in before and "measured on 6 images" in before and "step" in after
    pid = forks.start("train_kd", *flags, "--out", tmp_path / "b")
    while not (tmp_path / "b/last.pt").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(pid, signal.SIGTERM)
    code, text = forks.finish()
    assert code == 128 + signal.SIGTERM and f"train_kd.py --resume {tmp_path / 'b'}" in text
    for name in ("map.json", "list.txt"):
        (tmp_path / name).unlink()  # what counts stands in the run
    forks.run("train_kd", "--resume", tmp_path / "b")
    last = same(tmp_path / "a", tmp_path / "b")
    assert last["step"] == 12 and last["opt"]["count"] == 12
    assert json.loads((tmp_path / "a/map.json").read_text())["map"]["street"] is None
    assert load_weights(tmp_path / "a")[1]["model"] == load_weights(teacher)[1]["model"]
    assert 'b/map.json: "teacher" lists' in forks.run(
        "train_kd", "--resume", tmp_path / "b", "--teacher", teacher, ok=2)


def test_resume_refuses_another_teacher(demo, forks, tmp_path, teacher):
    short = [*TINY, "--steps", 1]
    forks.run("train_kd", "--root", demo, "--out", tmp_path / "a", *short, "--teacher", teacher)
    text = forks.run("train_kd", "--resume", tmp_path / "a", "--teacher", tmp_path / "a", ok=2)
    assert "not the teacher this run was trained with" in text
    assert "trained with alpha = 0.7, not 0.5" in forks.run(
        "train_kd", "--resume", tmp_path / "a", "--alpha", 0.5, ok=2)


def test_ranks_learn_alike(demo, forks, tmp_path, stranger, teacher):
    losses = {}
    for ranks in (1, 2):
        flags = [*TINY, "--batch-size", 4 // ranks, "--steps", 3, "--teacher", stranger, "--map", "measured",
                 "--sampler", "weighted", "--difficulty", teacher]
        forks.run("train_kd", "--root", demo, "--out", tmp_path / f"r{ranks}", *flags, ranks=ranks)
        losses[ranks] = rows(tmp_path / f"r{ranks}", "kd") + rows(tmp_path / f"r{ranks}", "hard")
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-4)
    a, b = (json.loads((tmp_path / f"r{n}/map.json").read_text()) for n in (1, 2))
    assert a == b and set(a["teacher"]) == set(MAP)


def here(monkeypatch, **patches):  # runs in this process, with parts of the script replaced
    import train_kd
    for name, patch in patches.items():
        monkeypatch.setattr(train_kd, name, patch(getattr(train_kd, name)))
    monkeypatch.setattr(train_kd.signal, "signal", lambda *args: None)  # pytest keeps its own Ctrl-C
    return lambda *argv: train_kd.main(train_kd.parse_args([str(a) for a in argv]))


def test_the_teacher_sees_the_students_pixels_in_its_own_normalisation(demo, tmp_path, monkeypatch, stranger):
    seen = []

    def spy(real):
        return lambda net, x, change, *rest: seen.append((net.training, x, x * change[0] + change[1])) or real(
            net, x, change, *rest)

    write(tmp_path / "map.json", {"map": MAP})
    here(monkeypatch, soft_targets=spy)("--root", demo, "--out", tmp_path / "a", *TINY, "--steps", 1, "--teacher",
                                        stranger, "--map", tmp_path / "map.json")
    training, x, z = seen[0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in NORMS["imagenet"])
    raw = ((x * std + mean) * 255).round().byte()  # (B, 3, H, W), the augmented image
    again = torch.stack([normalise(image.permute(1, 2, 0).numpy(), "sat") for image in raw])
    assert not training and len(seen) == 1 and torch.allclose(z, again, atol=1e-5)


def test_probabilities_are_kept_where_no_crop_is_random(demo, tmp_path, monkeypatch, teacher, capsys):
    calls = []

    def spy(real):
        return lambda net, x, *rest: calls.append(len(x)) or real(net, x, *rest)

    flags = ["--root", demo, *TINY, "--crop", 128, "--scale", 1, 1, "--teacher", teacher, "--steps", 30, "--eval-every",
             30, "--log-every", 30]
    here(monkeypatch, soft_targets=spy)(*flags, "--color", 0, "--out", tmp_path / "a")
    assert "probabilities are kept" in capsys.readouterr().out
    assert len(calls) <= 6 * 8 and set(calls) == {1}  # six images, eight symmetries, 120 crops
    calls.clear()
    here(monkeypatch)(*flags, "--steps", 2, "--out", tmp_path / "b")
    assert "probabilities are kept" not in capsys.readouterr().out and calls == [4, 4]


def test_non_finite_kl_is_skipped_and_five_in_a_row_go_back(demo, tmp_path, monkeypatch, capsys, teacher):
    def nan(steps):
        calls = iter(range(10**6))
        return lambda real: lambda *a: real(*a) * (float("nan") if next(calls) in steps else 1)

    flags = ["--root", demo, *TINY, "--teacher", teacher, "--lookahead", 2]
    with monkeypatch.context() as m:
        here(m, distill=nan({3, 4}))(*flags, "--out", tmp_path / "a")
    assert all(t.isfinite().all() for t in load_state(tmp_path / "a/last.pt")["net"].values())
    assert "rate halved" not in capsys.readouterr().out
    with monkeypatch.context() as m:
        here(m, distill=nan(set(range(2, 7))))(*flags, "--out", tmp_path / "b", "--steps", 10)
    assert "weights of step 6 again, rate halved" in capsys.readouterr().out


def test_what_bad_input_says(demo, forks, tmp_path, teacher, stranger):
    def refused(*flags):
        text = forks.run("train_kd", "--root", demo, "--out", tmp_path / "x", *TINY, *flags, ok=2)
        assert text.splitlines()[-1].startswith("error: ") and not (tmp_path / "x").exists()
        return text.splitlines()[-1]

    assert "--teacher is missing" in refused()
    assert "nothing for the teacher's 'green'" in refused("--teacher", stranger)
    assert "no such file" in refused("--teacher", teacher, "--map", tmp_path / "none.json")
    assert "name a run folder" in refused("--alpha", 0, "--sampler", "weighted")
    assert "score the images with a network of the same classes" in refused(
        "--alpha", 0, "--sampler", "weighted", "--difficulty", stranger)
    write(tmp_path / "list.txt", "val/images/scene_000.png")
    assert "is no image here" in refused("--alpha", 0, "--replicate", tmp_path / "list.txt")


def test_class_balanced_sampling_and_the_share_rule(demo, forks, tmp_path):
    text = forks.run("train_kd", "--root", demo, "--out", tmp_path / "a", *TINY, "--steps", 2, "--alpha", 0,
                     "--sampler", "class-balanced", "--replicate", "1%")
    assert re.search(r"\d+ entries repeat training images", text) and "8 crops drawn with replacement" in text


def test_a_cnn_as_student_and_as_teacher(demo, forks, tmp_path, teacher):
    flags = ["--root", demo, "--dataset", "folder", "--workers", 0, "--crop", 32, "--batch-size", 2, "--warmup", 1]
    student = [*flags, "--model", "unetformer", "--steps", 3, "--eval-every", 3, "--teacher", teacher]
    forks.run("train_kd", *student, "--out", tmp_path / "a")
    pid = forks.start("train_kd", *student, "--out", tmp_path / "b")
    while not (tmp_path / "b/last.pt").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    code, text = forks.finish()
    assert code == 128 + signal.SIGTERM, text
    forks.run("train_kd", "--resume", tmp_path / "b")
    same(tmp_path / "a", tmp_path / "b")  # dropout and batch statistics too
    flags += ["--arch", "nano16", "--steps", 1, "--log-every", 1, "--teacher", tmp_path / "a"]
    forks.run("train_kd", *flags, "--out", tmp_path / "c")
    assert rows(tmp_path / "c", "kd")[0] > 0
