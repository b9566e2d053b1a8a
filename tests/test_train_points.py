"""train_points.py as a user types it, and its limits: a point on every pixel, an unsure teacher."""
import math
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import (  # noqa: F401, forks is a fixture
    FOLDER, SEGMENTATION_FILES, TINY, equal, forks, interrupt, logged, matrix, place, read,
    same_run, server, tiny_set)
from scipy import ndimage

import train_points
from data.common import IGNORE, write
from data.points import UNLABELLED
from models.checkpoint import load_state, load_weights
from models.vit import ViT, preset

POINTS_FILES = SEGMENTATION_FILES | {"bars.png", "points.csv"}
GROW = ["--steps", 10, "--eval-every", 5, "--lr", 0.01, "--ema", 0.5, "--grow", 1]


@pytest.fixture(scope="module")
def halves():
    """Images of a blue and a red half, so plain that a few steps make a teacher sure."""
    root, rng = place() / "halves", np.random.default_rng(0)
    for split, count in dict(train=6, val=2, test=3).items():
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((64, 64), np.uint8)
            mask[:, rng.integers(20, 44):] = 1
            colours = np.array([[60, 60, 200], [200, 60, 60]])
            image = colours[mask] + rng.integers(-30, 30, (64, 64, 3))
            Image.fromarray(image.astype(np.uint8)).save(root / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{i}.png")
    write(root / "dataset.json", dict(
        name="halves", images="*/images/*.png", masks="*/masks/*.png",
        classes=[dict(name="blue", id=0), dict(name="red", id=1)],
        splits={split: f"{split}/*" for split in ("train", "val", "test")}))
    return root


@pytest.fixture(scope="module")
def run(halves):
    """A run on points with a second stage in which the teacher is sure of some pixels."""
    text = server().run("train_points", "--root", halves, "--out", place() / "points", *TINY, *GROW)
    assert "n pixels of every class in the image, n = 5" in text
    assert "60 on 6 images: blue 30  red 30" in text
    return place() / "points"


def csv_of(path, rows):
    """rows: (image, x, y, class)."""
    lines = ["image,x,y,class", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_masks(split="train"):
    """{image name: (H, W) ids} and class names of the tiny set."""
    files = sorted((tiny_set() / split / "masks").iterdir())
    names = [c["name"] for c in read(tiny_set() / "dataset.json")["classes"]]
    return {f"{split}/images/{f.stem}": np.asarray(Image.open(f)) for f in files}, names


# ---- the limits

EQUAL = [*TINY, "--loss", "ce", "--scale", 1, 1, "--focus", 0]


def same_weights(a, b):
    assert equal(load_state(a / "last.pt")["net"], load_state(b / "last.pt")["net"])
    assert equal(load_weights(a)[0], load_weights(b)[0])
    assert logged(a, "loss") == logged(b, "loss") and matrix(a) == matrix(b)


@pytest.mark.parametrize("crop", [64, 32])  # whole images, and parts of them
def test_a_point_on_every_pixel_is_train_seg_bit_for_bit(forks, tmp_path, crop):
    masks, names = tiny_masks()
    rows = []
    for image, ids in masks.items():
        rows += [(image, x, y, names[ids[y, x]]) for y, x in np.ndindex(ids.shape)]
    file = csv_of(tmp_path / "all.csv", rows)
    flags = ["--root", tiny_set(), *EQUAL, "--crop", crop, "--steps", 4]
    text = forks.run("train_points", *flags, "--points", file, "--out", tmp_path / "p")
    assert f"{6 * 64 * 64} on 6 images" in text
    forks.run("train_seg", *flags, "--out", tmp_path / "s")
    same_weights(tmp_path / "p", tmp_path / "s")


@pytest.mark.parametrize("loss", ["ce", "ce+dice"])
def test_points_are_masks_that_ignore_the_rest_bit_for_bit(forks, tmp_path, loss):
    masks, names = tiny_masks()
    root, rng, rows = shutil.copytree(tiny_set(), tmp_path / "sparse"), np.random.default_rng(0), []
    write(root / "dataset.json", read(root / "dataset.json") | {"ignore": [255]})
    for image, ids in masks.items():
        sparse = np.full((64, 64), 255, np.uint8)
        for y, x in rng.integers(0, 64, (30, 2)):
            sparse[y, x] = ids[y, x]
        rows += [(image, x, y, names[sparse[y, x]]) for y, x in np.argwhere(sparse != 255)]
        Image.fromarray(sparse).save(root / f"{image.replace('images', 'masks')}.png")
    flags = [*EQUAL, "--crop", 64, "--loss", loss, "--class-weights", "sqrt"]
    file = csv_of(tmp_path / "some.csv", rows)
    forks.run("train_points", "--root", tiny_set(), *flags, "--points", file,
              "--out", tmp_path / "p")
    forks.run("train_seg", "--root", root, *flags, "--out", tmp_path / "s")
    same_weights(tmp_path / "p", tmp_path / "s")


def test_a_file_of_points_repeats_the_run_without_any_training_mask(halves, run, forks, tmp_path):
    root = shutil.copytree(halves, tmp_path / "bare")
    shutil.rmtree(root / "train/masks")
    flags = ["--root", root, *TINY, *GROW]
    text = forks.run("train_points", *flags, "--out", tmp_path / "b",
                     "--points", run / "points.csv")
    assert f"points  {run}/points.csv, 60 in all" in text
    same_run_but_for_labels(run, tmp_path / "b")
    drawn = forks.run("train_points", *flags, "--out", tmp_path / "c", ok=2)
    assert "no mask for it" in drawn and drawn.count("\n") == 1


def same_run_but_for_labels(a, b):  # best.safetensors says where the data was
    same_weights(a, b)
    assert (a / "log.jsonl").read_text() == (b / "log.jsonl").read_text()


# ---- crops

def crop_of(image, mask, draw, ps, **more):
    args = SimpleNamespace(crop=48, scale=(0.5, 2.0), color=0.2, focus=0.3)
    vars(args).update(more)
    return train_points.transform(image, mask, np.random.default_rng(draw), ps, args, rare=[2])


def test_every_crop_of_an_image_with_points_holds_one():
    image = np.zeros((200, 300, 3), np.uint8)
    blank = np.full((200, 300), UNLABELLED, np.uint8)
    ps = np.array([[5, 7, 1], [290, 100, 2]])
    found = []
    for draw in range(300):
        _, y = crop_of(image, blank, draw, ps)
        classes = [c for c in np.unique(y) if c != UNLABELLED]
        # A point stays one pixel at every scale.
        assert len(classes) == 1 and (y == classes[0]).sum() == 1
        found += classes
    # Of the crops .3 lie around the rare 2, of the rest half.
    assert found.count(1) > 60 and found.count(2) > 160


def test_padding_is_neither_labelled_nor_unlabelled():
    image = np.zeros((20, 20, 3), np.uint8)
    blank = np.full((20, 20), UNLABELLED, np.uint8)
    _, y = crop_of(image, blank, 0, np.zeros((0, 3), int), scale=(1.0, 1.0))
    assert (y == UNLABELLED).sum() == 400 and (y == IGNORE).sum() == 48 * 48 - 400


# ---- the second stage

def test_the_teacher_is_sure_where_all_its_views_agree():
    x = torch.zeros(1, 3, 32, 48)
    x[:, 0, :, :16], x[:, 1, :, 16:32], x[:, 2, :, 32:] = 9, 9, 9

    def by_colour(x):
        return x

    def by_place(x):  # left is 0, right is 1: a flip changes its mind
        ramp = torch.linspace(9, -9, x.shape[-1]).expand(1, 1, *x.shape[-2:])
        return torch.cat([ramp, -ramp], 1)

    got, want = train_points.sure_pixels(by_colour, x, 0.9, False), x.max(1).indices
    assert (got[..., 2:14] == want[..., 2:14]).all() and (got[..., 36:] == want[..., 36:]).all()
    assert ((got == want) | (got == IGNORE)).all()
    assert (train_points.sure_pixels(by_place, x, 0.0, False) == IGNORE).all()
    of_one_mind_but_not_sure = train_points.sure_pixels(lambda x: x / 9, x, 0.9, False)
    assert (of_one_mind_but_not_sure == IGNORE).all()


def test_the_second_stage_begins_after_two_fifths_and_becomes_sure(run):
    sure = logged(run, "sure")
    assert min(sure) == 5 and sure[10] > 0.02  # of 10 steps
    assert all(0 <= share <= 1 for share in sure.values())


def test_a_teacher_that_is_never_sure_changes_nothing(forks, tmp_path):
    flags = ["--root", tiny_set(), *TINY, "--ema", 0.5]  # of eight classes, untrained
    forks.run("train_points", *flags, "--out", tmp_path / "a")
    forks.run("train_points", *flags, "--grow", 1, "--out", tmp_path / "b")
    assert set(logged(tmp_path / "b", "sure").values()) == {0.0}
    same_weights(tmp_path / "a", tmp_path / "b")


def test_few_sure_pixels_weigh_little(tmp_path, monkeypatch):
    """What is added is -log p, summed over sure pixels and divided by all unlabelled ones."""
    monkeypatch.setattr(train_points, "GROW_FROM", 0)
    monkeypatch.setattr(train_points, "GROW_ABOVE", 0.2)
    for grow in (0, 1):
        flags = ["--root", tiny_set(), *TINY, "--ema", 0.5, "--steps", 1, "--grow", grow,
                 "--out", tmp_path / str(grow)]
        train_points.main(train_points.parse_args([str(a) for a in flags]))
    added = logged(tmp_path / "1", "loss")[1] - logged(tmp_path / "0", "loss")[1]
    sure = logged(tmp_path / "1", "sure")[1]
    # p is 1/8 at least, being the largest of 8. A mean over the sure pixels alone would be more.
    assert 0.01 < sure < 0.45 and 0 < added / sure <= math.log(8)
    assert added > 0.5 * sure  # and it is not nothing: here p is far from 1


# ---- the run

def test_the_run_folder_holds_what_is_promised(run):
    assert {p.name for p in run.iterdir()} == POINTS_FILES
    results = read(run / "results.json")
    assert results["points"] == len((run / "points.csv").read_text().splitlines()) - 1 == 60
    assert results["scores"].keys() == results["majority_scores"].keys()
    assert results["majority_scores"]["accuracy"] == results["majority_oa"]
    scores = list(logged(run, "scores").values())
    assert len(scores) == 2 and scores[0].keys() == {"train", "val"}
    assert scores[0]["val"].keys() == results["scores"].keys()


def test_it_learns_more_than_the_largest_class(halves, forks, tmp_path):
    flags = ["--root", halves, *TINY, "--arch", "nano8", "--steps", 30, "--eval-every", 30,
             "--out", tmp_path / "a"]
    forks.run("train_points", *flags)
    results = read(tmp_path / "a/results.json")
    assert results["oa"] > 0.9 > results["majority_oa"] + 0.2


def test_the_scores_are_printed_beside_those_of_the_largest_class(run, forks, tmp_path):
    shutil.copytree(run, tmp_path / "a")
    text = forks.run("train_points", "--resume", tmp_path / "a")
    results = read(run / "results.json")
    always = f"always {results['majority_class']!r}"
    for name, row in (("test", results["scores"]), (always, results["majority_scores"])):
        said = f"{name} accuracy {row['accuracy']:.3f}  precision {row['precision_macro']:.3f} "
        assert said in text


def test_eval_and_predict_take_the_run(halves, run, forks, tmp_path):
    forks.run("eval", run, "--out", tmp_path / "e", "--workers", 0)
    assert matrix(tmp_path / "e/eval.json") == matrix(run)
    text = forks.run("predict", run, halves / "test/images", "--out", tmp_path / "p")
    assert "masks of 3 images" in text


def test_killed_stopped_and_resumed_it_ends_alike(halves, run, forks, tmp_path):
    out = tmp_path / "c"
    shutil.copy(run / "points.csv", tmp_path / "mine.csv")
    flags = ["--root", halves, *TINY, *GROW]
    code, _ = interrupt(forks, signal.SIGKILL, out, "train_points", *flags, "--out", out)
    assert code == -signal.SIGKILL
    code, text = interrupt(forks, signal.SIGTERM, out, "train_points", "--resume", out)
    assert code == 128 + signal.SIGTERM and f"train_points.py --resume {out}" in text
    forks.run("train_points", "--resume", out)
    same_run(run, out)


def test_more_steps_go_on_with_the_same_points(run, forks, tmp_path):
    shutil.copytree(run, tmp_path / "a")
    text = forks.run("train_points", "--resume", tmp_path / "a", "--steps", 12)
    assert "12 steps instead of 10" in text
    assert f"points  {tmp_path}/a/points.csv, 60 in all" in text
    assert (tmp_path / "a/points.csv").read_text() == (run / "points.csv").read_text()


def test_ranks_share_the_points_of_a_step(halves, run, forks, tmp_path):
    two = tmp_path / "r2"  # the ranks have different numbers of points and of sure pixels
    forks.run("train_points", "--root", halves, *TINY, *GROW, "--batch-size", 2, "--out", two,
              ranks=2)
    assert (run / "points.csv").read_text() == (two / "points.csv").read_text()
    loss, other = (list(logged(out, "loss").values()) for out in (run, two))
    np.testing.assert_allclose(loss[:4], other[:4], rtol=1e-4)
    # Later on, a pixel at the border of sure may fall either way.
    np.testing.assert_allclose(loss, other, rtol=1e-2)
    sure, other = (list(logged(out, "sure").values()) for out in (run, two))
    np.testing.assert_allclose(sure, other, atol=0.01)
    train, other = ([row["train"] for row in logged(out, "scores").values()] for out in (run, two))
    for a, b in zip(train, other):
        assert a == pytest.approx(b, abs=0.06)  # of some 40 points one may fall either way


def test_bad_steps_are_skipped_and_five_in_a_row_end_the_run(halves, forks, tmp_path):
    flags = ["--root", halves, *TINY, "--loss", "1e39*ce", "--out", tmp_path / "a"]
    said = forks.run("train_points", *flags, ok=2).splitlines()[-1]
    assert said.startswith("error: 5 non-finite gradients in a row at step 5, last images ")
    assert load_state(tmp_path / "a/last.pt")["state"]["bad"] == 4


# ---- where points come from

@pytest.fixture(scope="module")
def dino():
    torch.manual_seed(0)
    vit = ViT(**preset("dinov2", 14, 64, 4, 1, registers=0, grid=3))
    torch.save(vit.state_dict() | {"mask_token": torch.zeros(1, 64)}, place() / "dinov2_points.pth")
    return place() / "dinov2_points.pth"


def test_a_frozen_vit_and_points_on_few_images(dino, forks, tmp_path):
    file = csv_of(tmp_path / "p.csv", [
        ("train/images/scene_001", 5, 6, "field"), ("train/images/scene_002.png", 60, 10, "water"),
        ("val/images/scene_000", 1, 1, "road")])
    flags = ["--root", tiny_set(), *TINY, "--crop", 28, "--steps", 2, "--weights", dino,
             "--focus", 0]
    text = forks.run("train_points", *flags, "--points", file, "--out", tmp_path / "f")
    assert "p.csv, 3 in all" in text and "2 on 2 images" in text
    assert "4 training images have none: left out" in text
    assert "WARNING no point of grassland, forest, road, building, car, pool: never learned" in text
    trained = load_weights(tmp_path / "f")[0]
    for name, t in torch.load(dino).items():
        assert name == "mask_token" or torch.equal(trained[f"backbone.{name}"], t)


def test_one_point_per_instance_of_an_instance_mask(forks, tmp_path):
    root = shutil.copytree(tiny_set(), tmp_path / "instances")
    write(root / "dataset.json", read(root / "dataset.json") | {"instances": "*/instances/*.png"})
    (root / "train/instances").mkdir()
    masks, names = tiny_masks()
    # One instance of each class, but fields by their connected parts.
    for image, ids in masks.items():
        file = root / f"{image.replace('images', 'instances')}.png"
        Image.fromarray((ids != 0).astype(np.uint8)).save(file)
    flags = ["--root", root, *TINY, "--steps", 1, "--points", "one-per-instance"]
    forks.run("train_points", *flags, "--out", tmp_path / "i")
    found = {image: [] for image in masks}
    for line in (tmp_path / "i/points.csv").read_text().splitlines()[1:]:
        image, x, y, name = line.split(",")
        assert names[masks[image][int(y), int(x)]] == name
        found[image].append(names.index(name))
    for image, ids in masks.items():
        assert sorted(c for c in found[image] if c) == [c for c in np.unique(ids) if c]
        assert found[image].count(0) == ndimage.label(ids == 0)[1]


@pytest.mark.parametrize("flags, said", [
    (["--points", "nowhere.csv"], "nowhere.csv: "),
    (["--points", "center"], "expected a .csv or .geojson"),
    (["--points", "dense"], "expected a .csv or .geojson"),
    (["--grow", 0.5], "--grow without --ema"),
    (["--points-per-class", 0], "--points-per-class: 0: expected a whole number from 1"),
    (["--points", "OUTSIDE", "--points-per-class", 3], "for points drawn from masks, not --points"),
    (["--points", "OUTSIDE"], "line 2: x 64, y 0 is outside train/images/scene_000 of 64 x 64"),
    (["--points", "NONE"], "no point in a training image"),
    (["--loss", "nonsense"], "unknown term 'nonsense'"),
    (["--grow-from", 0.3], "--grow-from is gone: the start is GROW_FROM")])
def test_bad_input_ends_in_one_line(forks, tmp_path, flags, said):
    outside = csv_of(tmp_path / "p.csv", [("train/images/scene_000", 64, 0, "road")])
    nothing = csv_of(tmp_path / "n.csv", [("val/images/scene_000", 0, 0, "road")])
    flags = [{"OUTSIDE": outside, "NONE": nothing}.get(f, f) for f in flags]
    text = forks.run("train_points", "--root", tiny_set(), "--out", tmp_path / "x", *TINY, *flags,
                     ok=2)
    last = text.splitlines()[-1]
    assert last.startswith("error: ") and said in last and "Traceback" not in text
    assert not (tmp_path / "x").exists()


def test_without_any_mask_the_scores_are_those_of_the_points(forks, tmp_path):
    root, rng, rows = shutil.copytree(tiny_set(), tmp_path / "bare"), np.random.default_rng(0), []
    for split in ("train", "val", "test"):
        masks, names = tiny_masks(split)
        for image, ids in masks.items():
            places = np.unique(rng.integers(0, 64, (9, 2)), axis=0)
            rows += [(image, x, y, names[ids[y, x]]) for y, x in places]
        shutil.rmtree(root / split / "masks")
    file = csv_of(tmp_path / "p.csv", rows)
    flags = ["--root", root, *TINY, "--points"]
    text = forks.run("train_points", *flags, file, "--out", tmp_path / "a")
    for n, split in ((2, "val"), (3, "test")):
        assert f"scored on the points of {n} images such as {split}/images/scene_000" in text
    true = [names.index(name) for image, _, _, name in rows if image.startswith("test/")]
    counted = np.sum(matrix(tmp_path / "a"), axis=1)
    assert counted.tolist() == np.bincount(true, minlength=8).tolist()
    forks.run("train_points", "--resume", tmp_path / "a")

    few = csv_of(tmp_path / "q.csv", [("train/images/scene_001", 9, 0, "road")])
    text = forks.run("train_points", *flags, few, "--out", tmp_path / "b", ok=2)
    assert ".png: in val, without a mask, and no point in that split" in text
    (root / "val/masks").mkdir()
    shutil.copy(tiny_set() / "val/masks/scene_000.png", root / "val/masks")
    text = forks.run("train_points", *flags, file, "--out", tmp_path / "b", ok=2)
    assert "in val, 1 of 2 without a mask; add them" in text


def test_a_cnn_with_an_auxiliary_head_learns_from_points_and_grows(halves, forks, tmp_path):
    flags = [*FOLDER, "--log-every", 1, "--warmup", 1, *GROW, "--model", "unetformer",
             "--crop", 64, "--batch-size", 2, "--steps", 3]
    text = forks.run("train_points", "--root", halves, *flags, "--out", tmp_path / "u")
    assert "model   unetformer, FROM RANDOM WEIGHTS" in text
    assert list(logged(tmp_path / "u", "sure")) == [3]
    assert all(t.isfinite().all() for t in load_weights(tmp_path / "u")[0].values())
    assert None not in logged(tmp_path / "u", "loss").values()
