import hashlib
import json
import os
import threading

import numpy as np
import pytest
from PIL import Image

from data import demo
from data.demo import make

SCENES, SIZE = (6, 5, 5), 192


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make(tmp_path_factory.mktemp("demo") / "deep" / "demo", seed=1, scenes=SCENES, size=SIZE)


def contents(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def masks(root, split):
    return np.stack([np.asarray(Image.open(p)) for p in sorted((root / split / "masks").iterdir())])


def test_dataset_json_describes_the_files(root):
    info = json.loads((root / "dataset.json").read_text())
    assert set(info) == {"name", "images", "masks", "classes", "ignore", "splits", "made_by"}
    assert [c["id"] for c in info["classes"]] == list(range(8)) and info["ignore"] == []
    for (split, pattern), count in zip(info["splits"].items(), SCENES):
        folders = [p.name for p in root.glob(pattern)]
        assert sorted(folders) == ["images", "masks"] and pattern == f"{split}/*"
        assert [len(list((root / split / f).iterdir())) for f in folders] == [count, count]
    images, labels = sorted(root.glob(info["images"])), sorted(root.glob(info["masks"]))
    assert [p.name for p in images] == [p.name for p in labels] and len(images) == sum(SCENES)
    assert {(Image.open(p).mode, Image.open(p).size) for p in images} == {("RGB", (SIZE, SIZE))}
    colors = ["#%02x%02x%02x" % tuple(Image.open(labels[0]).getpalette()[3 * i:3 * i + 3]) for i in range(8)]
    assert Image.open(labels[0]).mode == "P" and colors == [c["color"] for c in info["classes"]]


def test_every_class_in_every_split_and_the_rare_ones_rare(root):
    counts = np.array([np.bincount(masks(root, s).ravel(), minlength=8) for s in ("train", "val", "test")])
    assert counts.shape == (3, 8) and (counts > 0).all()
    share = dict(zip(demo.CLASSES, counts.sum(0) / counts.sum()))
    assert 0.001 < share["car"] < 0.006 and 0.001 < share["pool"] < 0.008
    assert max(share.values()) < 0.45 and min(v for k, v in share.items() if k not in ("car", "pool")) > 0.02


def test_same_bytes_again_and_a_scene_depends_on_seed_split_and_number_only(root, tmp_path):
    fewer, other = make(tmp_path / "a", 1, (3, 2, 1), SIZE), make(tmp_path / "b", 2, (1, 1, 1), SIZE)
    whole, part = contents(root), {k: v for k, v in contents(fewer).items() if k != "dataset.json"}
    assert len(part) == 12 and all(whole[k] == v for k, v in part.items())
    images = [v for files in (whole, contents(other)) for k, v in files.items() if "/images/" in k]
    assert len(set(images)) == len(images) == sum(SCENES) + 3  # no scene twice, in no other split or seed


def test_scenes_are_those_of_version_1():
    """Recorded: what is published about the demo set holds for these pixels only."""
    digest = hashlib.sha256()
    for seed in range(12):
        for array in demo.scene(np.random.default_rng(seed), 128):
            digest.update(array.tobytes())
    assert demo.VERSION == 1 and digest.hexdigest() == RECORDED


RECORDED = "ec8085337df312e81dd2d489f3a0e28ec00ebcb274fcbc99af7862e3ed58350b"


def test_second_make_touches_nothing(root):
    before = {p: p.stat().st_mtime_ns for p in (root, *root.rglob("*"))}
    assert make(str(root), 1, SCENES, SIZE) == root
    assert {p: p.stat().st_mtime_ns for p in (root, *root.rglob("*"))} == before


@pytest.mark.parametrize("other", [{"seed": 2}, {"scenes": (6, 5, 6)}, {"size": 128}])
def test_another_data_set_in_the_folder_is_an_error(root, other):
    with pytest.raises(ValueError, match="name another folder") as e:
        make(root, **{"seed": 1, "scenes": SCENES, "size": SIZE} | other)
    assert str(root) in str(e.value) and "\n" not in str(e.value)


def test_an_older_generator_and_foreign_files_are_errors(root, tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="other files"):
        make(tmp_path, scenes=(1, 1, 1), size=64)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
    with pytest.raises(ValueError, match="version"):
        make(root, 1, SCENES, SIZE)


def test_killed_half_way_leaves_no_data_set(tmp_path, monkeypatch):
    real, calls = demo.scene, []

    def dies(rng, size):
        calls.append(size)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(rng, size)

    monkeypatch.setattr(demo, "scene", dies)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "demo", scenes=(2, 2, 2), size=64)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".demo-0123.tmp" / "train" / "images").mkdir(parents=True)  # what kill -9 leaves
    assert len(contents(make(tmp_path / "demo", scenes=(2, 2, 2), size=64))) == 13


def test_two_at_once_make_one_whole_data_set(tmp_path, monkeypatch):
    gate, errors, real = threading.Barrier(2, timeout=30), [], os.rename

    def rename(a, b):
        gate.wait()  # both have a complete folder in hand
        real(a, b)

    def work():
        try:
            make(tmp_path / "demo", scenes=(1, 1, 1), size=64)
        except BaseException as e:
            errors.append(e)

    monkeypatch.setattr(demo.os, "rename", rename)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == [] and [p.name for p in tmp_path.iterdir()] == ["demo"] and len(contents(tmp_path / "demo")) == 7


def test_a_shadow_darkens_the_ground_and_keeps_its_label():
    """A tower on even grass: some ground gets much darker, on one side only, and no label moves."""
    ids, height = np.full((64, 64), demo.GRASS, np.uint8), np.zeros((64, 64), np.float32)
    ids[28:36, 28:36], height[28:36, 28:36] = demo.BUILDING, 12
    land = demo.Land(np.full((64, 64, 3), 120, np.float32), ids.copy(), height)
    grey = demo.photograph(np.random.default_rng(0), land).mean(2)
    np.testing.assert_array_equal(land.ids, ids)
    y, x = np.nonzero((grey < 0.8 * np.median(grey)) & (ids == demo.GRASS))
    assert 40 < len(y) < 300  # a tower 8 wide casts 9 to 17 pixels
    assert np.hypot(y.mean() - 31.5, x.mean() - 31.5) > 6


def test_labels_do_not_depend_on_the_light(monkeypatch):
    image, ids = demo.scene(np.random.default_rng(3), 128)
    monkeypatch.setattr(demo, "photograph", lambda rng, land: None)
    np.testing.assert_array_equal(ids, demo.scene(np.random.default_rng(3), 128)[1])
    assert image.shape == (128, 128, 3) and image.dtype == ids.dtype == np.uint8


@pytest.mark.parametrize("size", [32, 100, 384])
def test_any_size(size):
    image, ids = demo.scene(np.random.default_rng(0), size)
    assert image.shape == (size, size, 3) and ids.shape == (size, size) and ids.max() < 8
