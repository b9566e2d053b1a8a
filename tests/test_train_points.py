"""Training on points as a user types it; its limits: every pixel a point = train_seg.py, no masks read, logits only."""
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
from scipy import ndimage

import train_points
from data import points
from data.datasets import find_pairs, read_description
from data.demo import make
from data.common import IGNORE, write
from data.io import Labels, read_image
from models import losses
from models.checkpoint import load_state, load_weights
from models.vit import ViT, preset

TINY = ["--steps", 6, "--eval-every", 3, "--log-every", 1, "--batch-size", 4, "--crop", 64, "--warmup", 2,
        "--arch", "nano16", "--dataset", "folder", "--workers", 0]
GROW = ["--ema", 0.5, "--grow", 0.5, "--grow-from", 0.3, "--grow-above", 0.2]


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data") / "demo", scenes=(6, 2, 3), size=96)


@pytest.fixture(scope="module")
def run(demo, forks, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a"
    text = forks.run("train_points", "--root", demo, "--out", out, *TINY, *GROW)
    assert "n pixels of every class in the image, n = 5" in text and "sure of" in text
    return out


def rows(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def same_weights(a, b):
    x, y = (load_state(f / "last.pt")["net"] for f in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    x, y = (load_weights(f)[0] for f in (a, b))
    assert all(torch.equal(x[k], y[k]) for k in x)
    assert [r["loss"] for r in rows(a) if "loss" in r] == [r["loss"] for r in rows(b) if "loss" in r]


# ---- the limits

@pytest.mark.parametrize("one, other", [
    (["--points", "dense"], []), (["--points", "dense", "--loss", "ce+dice", "--class-weights", "sqrt"],) * 2,
    (["--points-per-class", 10**6, "--scale", 1, 1, "--focus", 0], ["--scale", 1, 1, "--focus", 0])],
    ids=["ce", "ce+dice", "a point on every pixel"])
def test_points_everywhere_are_full_supervision_bit_for_bit(demo, forks, tmp_path, one, other):
    loss = [] if "--loss" in one else ["--loss", "ce"]
    other = [a for a in other if a not in ("--points", "dense")]
    forks.run("train_points", "--root", demo, "--out", tmp_path / "p", *TINY, *loss, *one)
    forks.run("train_seg", "--root", demo, "--out", tmp_path / "s", *TINY, *loss, *other)
    same_weights(tmp_path / "p", tmp_path / "s")
    results = [json.loads((tmp_path / f / "results.json").read_text()) for f in "ps"]
    assert results[0]["confusion"] == results[1]["confusion"]


def test_a_stored_file_of_points_repeats_the_run_without_any_training_mask(demo, run, forks, tmp_path):
    root = tmp_path / "bare"
    shutil.copytree(demo, root)
    shutil.rmtree(root / "train/masks")
    text = forks.run("train_points", "--root", root, "--out", tmp_path / "b", *TINY, *GROW, "--points",
                     run / "points.csv")
    assert "points.csv, " in text
    same_weights(run, tmp_path / "b")
    drawn = forks.run("train_points", "--root", root, "--out", tmp_path / "c", *TINY, ok=2)
    assert "no mask for it" in drawn and drawn.count("\n") == 1


def test_the_input_is_the_image_and_the_labels_are_its_points(demo, tmp_path, monkeypatch):
    seen, labels = [], []
    build, compute = train_points.build, train_points.compute

    def watched(m):
        net = build(m)
        net.register_forward_pre_hook(lambda net, args: seen.append(args[0]))
        return net

    monkeypatch.setattr(train_points, "build", watched)
    monkeypatch.setattr(train_points, "compute", lambda t, x, y, *a: labels.append(y) or compute(t, x, y, *a))
    monkeypatch.setattr(train_points.signal, "signal", lambda *args: None)  # pytest keeps its own Ctrl-C
    flags = ["--root", demo, "--out", tmp_path / "a", *TINY, "--scale", 1, 1, "--color", 0, "--crop", 96, "--steps", 1]
    train_points.main(train_points.parse_args([str(a) for a in flags]))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # ImageNet's, as published
    pairs, ids = find_pairs(demo, read_description(demo)), Labels(read_description(demo)["classes"])
    drawn = {n: p for n, p in points.read_points(tmp_path / "a/points.csv", pairs, ids.names).items()}
    found = 0
    for x, y in zip(seen[0], labels[0]):
        for name, ps in drawn.items():
            image = (read_image(pairs[name][0]) / 255 - mean) / std
            for turn in range(8):
                turned = np.rot90(image, turn % 4)[:, ::-1 if turn > 3 else 1]
                if np.allclose(turned.transpose(2, 0, 1), x, atol=1e-5):
                    mask = np.full((96, 96), IGNORE)
                    mask[ps[:, 1], ps[:, 0]] = ps[:, 2]
                    assert (np.rot90(mask, turn % 4)[:, ::-1 if turn > 3 else 1] == y.numpy()).all()
                    found += 1
    assert found == len(seen[0]) == 4


# ---- the loss

@pytest.mark.parametrize("loss", ["ce", "focal", "dice", "ce+0.5*lovasz"])
def test_what_is_not_labelled_changes_neither_loss_nor_gradient(loss):
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(2, 4, 9, 11, generator=g), torch.full((2, 9, 11), IGNORE)
    at = torch.randperm(2 * 9 * 11, generator=g)[:7]
    y.view(-1)[at] = torch.randint(0, 4, (7,), generator=g)
    other = torch.where((y == IGNORE)[:, None], 100 * torch.randn(z.shape, generator=g), z)
    values, grads = [], []
    for x in (z, other):
        x = x.clone().requires_grad_()
        value = losses.compute(losses.parse_loss(loss), x, y, count=(y != IGNORE).sum())
        value.backward()
        values.append(value.item())
        grads.append(x.grad)
    assert values[0] == pytest.approx(values[1], rel=1e-6) and (grads[0].movedim(1, 3)[y == IGNORE] == 0).all()
    torch.testing.assert_close(*grads)
    picked = z.movedim(1, 3)[y != IGNORE].double()  # the definition: the mean over the seven points
    logp = picked.log_softmax(1)[torch.arange(7), y[y != IGNORE]]
    want = {"ce": -logp.mean(), "focal": -((1 - logp.exp()) ** 2 * logp).mean()}.get(loss)
    assert want is None or values[0] == pytest.approx(want.item(), rel=1e-5)


def test_a_batch_without_points_costs_nothing_and_breaks_nothing():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    value = losses.compute(losses.parse_loss("ce+focal+dice"), x, torch.full((2, 4, 4), IGNORE))
    value.backward()
    assert value.item() == 0 and (x.grad == 0).all()


def test_probabilities_are_refused(demo, tmp_path, monkeypatch):
    z = torch.randn(2, 5, 6, 6)
    for good in (z, torch.zeros_like(z), torch.full_like(z, 0.3), z.softmax(1).log()):
        losses.check_logits(good)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="probabilities.*logits before softmax"):
            losses.check_logits(z.softmax(1).to(dtype))
    build = train_points.build

    def softmaxed(m):
        net = build(m)
        net.register_forward_hook(lambda net, args, out: out.softmax(1))
        return net

    monkeypatch.setattr(train_points, "build", softmaxed)
    monkeypatch.setattr(train_points.signal, "signal", lambda *args: None)
    with pytest.raises(ValueError, match="probabilities"):
        train_points.main(train_points.parse_args([str(a) for a in ["--root", demo, "--out", tmp_path / "a", *TINY]]))


# ---- crops and the second stage

def test_every_crop_of_an_image_with_points_holds_one():
    image, blank = np.zeros((200, 300, 3), np.uint8), np.full((200, 300), train_points.UNLABELLED, np.uint8)
    ps = np.array([[5, 7, 1], [290, 100, 2]])
    how = dict(crop=48, scales=(0.5, 2), strength=0.2, rare=[2], focus=0.3)
    hits = []
    for draw in range(300):
        _, y = train_points.transform_points(image, blank, np.random.default_rng(draw), ps, **how)
        hits += [int(c) for c in y[y < 200]]
        assert set(np.unique(y)) <= {1, 2, train_points.UNLABELLED} and (y < 200).any()
    assert set(hits) == {1, 2} and len(hits) == 300 and hits.count(2) > 160  # .3 around 2, of the rest half
    _, y = train_points.transform_points(image[:20, :20], blank[:20, :20], np.random.default_rng(0), ps[:0], **how)
    assert set(np.unique(y)) == {train_points.UNLABELLED, IGNORE}  # the padding is nobody's


def test_the_teacher_is_sure_where_all_its_views_agree():
    x = torch.zeros(1, 3, 32, 48)
    x[:, 0, :, :16], x[:, 1, :, 16:32], x[:, 2, :, 32:] = 9, 9, 9

    def by_colour(x):
        return x

    def by_place(x):  # left is 0, right is 1: a flip changes its mind
        ramp = torch.linspace(9, -9, x.shape[-1]).expand(1, 1, *x.shape[-2:])
        return torch.cat([ramp, -ramp], 1)

    got = train_points.sure_pixels(by_colour, x, 0.9, False)
    want = x.max(1).indices
    assert (got[..., 2:14] == want[..., 2:14]).all() and (got[..., 36:] == want[..., 36:]).all()
    assert ((got == want) | (got == IGNORE)).all()
    assert (train_points.sure_pixels(by_place, x, 0.0, False) == IGNORE).all()
    assert (train_points.sure_pixels(lambda x: x / 9, x, 0.9, False) == IGNORE).all()  # of one mind, but not sure


# ---- the run

def test_the_run_folder_holds_what_is_promised(run):
    assert sorted(p.name for p in run.iterdir()) == [
        "bars.png", "best.safetensors", "confusion.png", "curves.png", "last.pt", "log.jsonl", "points.csv",
        "protocol.json", "results.json", "samples.png", "split.json"]
    r = json.loads((run / "results.json").read_text())
    assert r["points"] == len((run / "points.csv").read_text().splitlines()) - 1
    assert r["scores"].keys() == r["majority_scores"].keys() and r["majority_scores"]["accuracy"] == r["majority_oa"]
    scores = [row["scores"] for row in rows(run) if "scores" in row]
    assert len(scores) == 2 and scores[0].keys() == {"train", "val"} and scores[0]["val"].keys() == r["scores"].keys()


def test_eval_and_predict_take_the_run(demo, run, forks, tmp_path):
    forks.run("eval", run, "--out", tmp_path / "e", "--workers", 0)
    r = json.loads((run / "results.json").read_text())
    assert json.loads((tmp_path / "e/eval.json").read_text())["confusion"] == r["confusion"]
    assert "masks of 3 images" in forks.run("predict", run, demo / "test/images", "--out", tmp_path / "p")


def test_a_signal_saves_and_resume_ends_alike(demo, run, forks, tmp_path):
    pid = forks.start("train_points", "--root", demo, "--out", tmp_path / "c", *TINY, *GROW)
    while not (tmp_path / "c/last.pt").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    code, text = forks.finish()
    assert code == 128 + signal.SIGTERM and f"train_points.py --resume {tmp_path / 'c'}" in text
    forks.run("train_points", "--resume", tmp_path / "c")
    same_weights(run, tmp_path / "c")
    assert (run / "log.jsonl").read_text() == (tmp_path / "c/log.jsonl").read_text()


def test_ranks_share_the_points_of_a_step(demo, forks, tmp_path):
    flags = ["--root", demo, *TINY, *GROW, "--steps", 4, "--points-per-class", 2]
    for ranks in (1, 2):  # the two have different numbers of points and sure pixels
        forks.run("train_points", *flags, "--batch-size", 4 // ranks, "--out", tmp_path / f"r{ranks}", ranks=ranks)
    one, two = (rows(tmp_path / f"r{ranks}") for ranks in (1, 2))
    for key in ("loss", "sure"):
        np.testing.assert_allclose([r[key] for r in one if key in r], [r[key] for r in two if key in r], rtol=1e-4)
    assert (tmp_path / "r1/points.csv").read_text() == (tmp_path / "r2/points.csv").read_text()


def test_few_sure_pixels_weigh_little(demo, tmp_path, monkeypatch):
    def one_corner(teacher, x, above, amp):
        ids = torch.full(x[:, 0].shape, IGNORE)
        ids[:, 0, 0] = 0
        return ids

    calls = []
    monkeypatch.setattr(train_points, "sure_pixels", one_corner)
    monkeypatch.setattr(train_points, "ce", lambda *args: calls.append(args) or losses.ce(*args))
    flags = ["--root", demo, "--out", tmp_path / "a", *TINY, *GROW, "--grow-from", 0, "--steps", 1, "--scale", 1, 1]
    train_points.main(train_points.parse_args([str(a) for a in flags]))
    (_, grown, count), = calls  # the mean is over all unlabelled pixels: 4 crops of 64 x 64, less their points
    assert 1 <= (grown != IGNORE).sum() <= 4 and 0.9 * 4 * 64 ** 2 < count < 4 * 64 ** 2


def test_a_frozen_vit_and_points_on_few_images(demo, forks, tmp_path):
    vit = ViT(**preset("dinov2", 14, 64, 4, 1, registers=0, grid=3))
    torch.save(vit.state_dict() | {"mask_token": torch.zeros(1, 64)}, tmp_path / "dinov2_vitx14.pth")
    (tmp_path / "p.csv").write_text("image,x,y,class\nscene_001,5,6,field\nscene_002,90,10,water\n"
                                    "val/images/scene_000,1,1,road\n".replace("scene_001", "train/images/scene_001")
                                    .replace("scene_002", "train/images/scene_002.png"))
    text = forks.run("train_points", "--root", demo, "--out", tmp_path / "f", *TINY, "--weights",
                     tmp_path / "dinov2_vitx14.pth", "--points", tmp_path / "p.csv", "--focus", 0)
    assert "p.csv, 3 in all" in text and "2 on 2 images" in text and "4 training images have none: left out" in text
    assert "WARNING no point of grassland, forest, road, building, car, pool: never learned" in text
    trained = load_weights(tmp_path / "f")[0]
    assert all(torch.equal(t, trained[f"backbone.{n}"]) for n, t in vit.state_dict().items())


def test_one_point_per_instance_of_an_instance_mask(demo, forks, tmp_path):
    root = tmp_path / "instances"
    shutil.copytree(demo, root)
    write(root / "dataset.json", read_description(root) | {"instances": "*/instances/*.png"})
    (root / "train/instances").mkdir()
    for mask in (root / "train/masks").iterdir():
        ids = np.array(Image.open(mask))
        Image.fromarray((ids != 0).astype(np.uint8)).save(root / "train/instances" / mask.name)  # one each but fields
    flags = ["--root", root, *TINY, "--steps", 1, "--points", "one-per-instance"]
    forks.run("train_points", *flags, "--out", tmp_path / "i")
    pairs, names = find_pairs(root, read_description(root)), [c["name"] for c in read_description(root)["classes"]]
    for name, ps in points.read_points(tmp_path / "i/points.csv", pairs, names).items():
        ids = np.array(Image.open(pairs[name][1]))
        assert sorted(ps[ps[:, 2] > 0, 2]) == [c for c in np.unique(ids) if c]
        assert (ps[:, 2] == 0).sum() == ndimage.label(ids == 0)[1]


@pytest.mark.parametrize("flags, said", [
    (["--points", "nowhere.csv"], "nowhere.csv: No such file"), (["--points", "center"], "expected a .csv or .geojson"),
    (["--grow", 0.5], "--grow without --ema"), (["--points-per-class", 0], "--points-per-class 0: expected 1 to"),
    (["--grow", 0.5, "--ema", 0.9, "--points", "dense"], "no pixel is left"),
    (["--model", "deeplabv3", "--batch-size", 1, "--arch", "nano8"], "BatchNorm needs two images"),
    (["--points", "dense", "--points-per-class", 3], "for points drawn from masks, not --points dense"),
    (["--points", "OUTSIDE"], "line 2: x 96, y 0 is outside train/images/scene_000 of 96 x 96")])
def test_bad_input_ends_in_one_line(demo, forks, tmp_path, flags, said):
    (tmp_path / "p.csv").write_text("image,x,y,class\ntrain/images/scene_000,96,0,road\n")
    flags = [tmp_path / "p.csv" if f == "OUTSIDE" else f for f in flags]
    text = forks.run("train_points", "--root", demo, "--out", tmp_path / "x", *TINY, *flags, ok=2)
    assert said in text.splitlines()[-1] and "error: " in text.splitlines()[-1]
    assert not (tmp_path / "x").exists()


def test_without_any_mask_the_scores_are_those_of_the_points(demo, forks, tmp_path):
    root = tmp_path / "bare"
    shutil.copytree(demo, root)
    pairs, d = find_pairs(demo, read_description(demo)), read_description(demo)
    drawn = points.simulate(pairs, Labels(d["classes"]), "random", 4, 0)
    points.write_points(tmp_path / "p.csv", drawn, [c["name"] for c in d["classes"]])
    for split in ("train", "val", "test"):
        shutil.rmtree(root / split / "masks")
    flags = ["--root", root, *TINY, "--points"]
    text = forks.run("train_points", *flags, tmp_path / "p.csv", "--out", tmp_path / "a")
    assert "no masks for val: scored on the points of 2 of its 2 images" in text and "no masks for test" in text
    counts = json.loads((tmp_path / "a/results.json").read_text())["confusion"]
    true = np.concatenate([ps[:, 2] for n, ps in drawn.items() if n.startswith("test/")])
    assert np.sum(counts, axis=1).tolist() == np.bincount(true, minlength=8).tolist()
    forks.run("train_points", "--resume", tmp_path / "a")
    (tmp_path / "q.csv").write_text("image,x,y,class\ntrain/images/scene_001,9,0,road\n")
    text = forks.run("train_points", *flags, tmp_path / "q.csv", "--out", tmp_path / "b", ok=2)
    assert ".png: in " in text and "without a mask, and no point in that split" in text
    mask = next((demo / "val/masks").iterdir())
    (root / "val/masks").mkdir()
    shutil.copy(mask, root / "val/masks")
    text = forks.run("train_points", *flags, tmp_path / "p.csv", "--out", tmp_path / "b", ok=2)
    assert "in val, 1 of 2 without a mask; add them" in text


def test_a_cnn_with_an_auxiliary_head_learns_from_points_and_grows(demo, forks, tmp_path):
    flags = [f for f in TINY if f not in ("--arch", "nano16")] + [*GROW, "--model", "unetformer", "--steps", 3]
    text = forks.run("train_points", "--root", demo, "--out", tmp_path / "u", *flags, "--batch-size", 2)
    assert "model   unetformer, FROM RANDOM WEIGHTS" in text and "sure of" in text
    assert all(t.isfinite().all() for t in load_weights(tmp_path / "u")[0].values())
    assert all(r["loss"] is not None for r in rows(tmp_path / "u") if "loss" in r)
