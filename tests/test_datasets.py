"""data/datasets.py: pairs, splits, scenes, samples; oracles: definitions in Python."""
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from folder_sets import described, plain, rng, run  # noqa: F401: two are fixtures
from PIL import Image

from data import datasets
from data.check.complaints import Complaints
from data.check.patterns import find_pictures
from data.common import BadInput, write
from data.datasets import (SegDataset, check_command, class_counts, find_pairs, hold_out, load_splits, match_files,
                           match_pairs, read_description, read_list, split_names, unknown_files)
from data.io import Labels
from data.scenes import find_scenes, groups_of
from predict import find_images

RGB = np.random.default_rng(0).integers(1, 256, (9, 7, 3), np.uint8)
BY_ID = [{"name": "a", "id": 3}, {"name": "b", "id": 0}, {"name": "c", "id": 254}]


def refusal(call, *args):
    """The message of the BadInput that the call must raise: one line."""
    with pytest.raises(BadInput) as e:
        call(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def save(path, array, mode=None):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return path


@pytest.mark.parametrize("images, masks, pairs", [
    ("*.jpg", "*_m.png", {"a.jpg": "a_m.png", "a_m.jpg": "a_m_m.png"}),
    ("*.png", "*_m.png", {"a.png": "a_m.png", "b.png": "b_m.png"}),
    ("T */im/*.jpg", "T */m/*.png", {f"T {i}/im/{c}.jpg": f"T {i}/m/{c}.png" for i in (1, 2) for c in "ab"}),
    ("**/img/*_?.tif", "lbl/**/*-?.tif", {"x/y/img/a_1.tif": "lbl/x/y/a-1.tif", "img/a_1.tif": "lbl/a-1.tif"}),
    (["a/*.jpg", "b/*.jpg"], ["ma/*.png", "mb/*.png"], {"a/1.jpg": "ma/1.png", "b/1.jpg": "mb/1.png"})])
def test_what_the_stars_stand_for_pairs_image_and_mask(tmp_path, images, masks, pairs):
    for name in [*pairs, *pairs.values()]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_pairs(tmp_path, dict(images=images, masks=masks))
    assert found == {a.rsplit(".", 1)[0]: (tmp_path / a, tmp_path / b) for a, b in pairs.items()}
    (tmp_path / list(pairs.values())[0]).unlink()
    assert f"(1 of {len(pairs)} images" in refusal(find_pairs, tmp_path, dict(images=images, masks=masks))


def test_ambiguous_pairs_are_refused(tmp_path):
    for name in ("im1/a.jpg", "im2/a.jpg", "im2/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert "two images of one" in refusal(find_pairs, tmp_path, dict(images=["*/*.jpg", "*/*.png"], masks="m/*.png"))
    assert "no image matches" in refusal(find_pairs, tmp_path, dict(images="x/*.jpg", masks="m/*.png"))


NAMES = ["T 1/a", "T 1/b", "T 2/a", "T 3/c.5", "T 3/d"]
PAIRS = {name: (Path(f"/d/{name}.png"), Path(f"/d/masks/{name}_m.png")) for name in NAMES}


def test_splits_by_pattern_and_by_list(tmp_path):
    (tmp_path / "l.txt").write_text("T 1/a\n\nb.png\n c.5 \nT 2/a.jpg\n")
    splits = split_names(tmp_path, {"splits": {"train": ["l.txt"], "val": ["*/d", "T [3-9]/d"], "test": []}}, PAIRS)
    assert splits == {"train": NAMES[:4], "val": ["T 3/d"], "test": []}
    for rules, said in (({"train": "T 1/*", "val": "*/a"}, "'T 1/a' is in the splits"), ({"train": "t.txt"}, "no such"),
                        ({"train": "X*"}, "nothing matches 'X*'"), ({"train": 0.8}, "--val-frac"),
                        ({"train": "T 1/a", "../../x": "T 1/b"}, "a split is called '../../x'; expected a name")):
        assert said in refusal(split_names, tmp_path, {"splits": rules}, PAIRS)
    # Names stand in dataset.json as they may in a list.
    splits = split_names(tmp_path, {"splits": {"train": ["b", "T 2\\a.png"], "val": "/d/T 3/d.png"}}, PAIRS)
    assert splits == {"train": ["T 1/b", "T 2/a"], "val": ["T 3/d"]}
    assert "nothing matches 'a'" in refusal(split_names, tmp_path, {"splits": {"train": "a"}}, PAIRS)  # two of them
    (tmp_path / "l.txt").write_text("a\n")
    assert "'a' is no image here, or several" in refusal(split_names, tmp_path, {"splits": {"train": "l.txt"}}, PAIRS)


def test_lists_and_split_files_name_images_in_any_way(tmp_path):
    bytes_ = os.fsdecode(b"t\xcd\xff")
    want = ["T 1/é", f"x/{bytes_}", "t0.5", "t1"]
    pairs = {name: (tmp_path / f"{name}.png", tmp_path / f"m/{name}.png") for name in want}
    lines = [f"{tmp_path}/T 1/e\u0301.png", f"x\\{bytes_}.png", "t0.5.jpg", "t1.png m/t1.png"]
    (tmp_path / "l.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode("utf-8", "surrogateescape"))
    assert read_list(tmp_path / "l.txt", pairs) == want
    write(tmp_path / "split.json", {"train": lines[:2], "val": lines[2:3]})
    assert load_splits(tmp_path, {}, pairs, tmp_path / "split.json") == {"train": want[:2], "val": want[2:3]}
    (tmp_path / "l.txt").write_text("t0\n")
    assert "l.txt: 't0' is no image here, or several; names look like" in refusal(read_list, tmp_path / "l.txt", pairs)
    (tmp_path / "l.txt").write_text("t1.png m/t0.5.png\n")
    assert "l.txt: 't1.png m/t0.5.png': the mask of t1 is " in refusal(read_list, tmp_path / "l.txt", pairs)
    for names in (["t1", "t1.png"], ["t1.5"]):  # one image twice, and none
        write(tmp_path / "split.json", {"train": names, "val": ["t0.5"]})
        assert "split.json: 't1" in refusal(load_splits, tmp_path, {}, pairs, tmp_path / "split.json")


def test_names_with_accents_apart_or_in_one_pair_whatever_the_disk_has(tmp_path):
    touch(tmp_path, "e\u0301té/a\u030a.png", "m/ete/\u00e5.png", "e\u0301té/b.png", "m/ete/b.png")
    d = dict(images="\u00e9te\u0301/*.png", masks="m/ete/*.png", splits={})
    pairs = find_pairs(tmp_path, d)
    assert [name for name in pairs] == ["été/å", "été/b"]
    assert pairs["été/å"] == (tmp_path / "e\u0301té/a\u030a.png", tmp_path / "m/ete/\u00e5.png")
    touch(tmp_path, "e\u0301té/\u00e5.png")
    assert "cannot tell them apart" in refusal(find_pairs, tmp_path, d)


def test_split_file_and_no_silent_random_split(tmp_path):
    all_train, file = {"splits": {"train": "*"}}, tmp_path / "split.json"
    said = refusal(load_splits, tmp_path, all_train, PAIRS)
    assert said == (f'{tmp_path}: no val split; add it to "splits" in dataset.json, or hold out whole scenes: '
                    '"select": 0.2 and "scene": REGEX in dataset.json (or --val-frac 0.2 for one run)')
    said = refusal(load_splits, tmp_path, {"splits": {"val": "*"}}, PAIRS)
    assert said == f'{tmp_path}: no train split; add it to "splits" in dataset.json'
    assert "has a val" in refusal(load_splits, tmp_path, {"splits": {"train": "T 1*", "val": "T 2*"}}, PAIRS, None, 0.5)
    for content in ('{"train": ["T 1/a"], "val": ["T 1/a"]}', '{"train": ["x"]}', '["a"]', '{"train": 1}', "{"):
        file.write_text(content)
        assert str(file) in refusal(load_splits, tmp_path, all_train, PAIRS, file)
    file.write_text(json.dumps(splits := {"train": ["T 3/d"], "val": ["T 1/a"]}))
    assert load_splits(tmp_path, all_train, PAIRS, file) == splits
    drawn = load_splits(tmp_path, all_train | {"scene": "T ."}, PAIRS, None, 0.3)
    assert sorted(drawn["train"] + drawn["val"]) == NAMES and drawn["val"]
    assert drawn == load_splits(tmp_path, all_train | {"scene": "T .", "select": 0.3}, PAIRS)


def test_hold_out_never_cuts_a_scene():
    names = [f"area{i % 7}_{i}" for i in range(70)]
    rest, held = hold_out(names, 0.25, r"(area\d)_", seed=0)
    assert sorted(rest + held) == sorted(names) and len(held) == 20  # 17.5 asked for, scenes of ten
    assert {n[:5] for n in held} == {"area2", "area4"} and not any(n[:5] in ("area2", "area4") for n in rest)
    assert (rest, held) == hold_out(names, 0.25, r"area\d", seed=0) != hold_out(names, 0.25, r"area\d", seed=1)
    assert len(hold_out(names, 0.25, None, 0)[1]) == 18
    for regex, said in ((r"area[0-5]", "does not match 'area6_6'"), ("(", "no regular expression"), ("area", "empty")):
        assert said in refusal(hold_out, names, 0.25, regex, 0)


def add_noise(image, mask, rng):
    return image + rng.integers(0, 99, image.shape, np.uint8), mask


def test_a_sample_depends_on_seed_and_draw_alone(tmp_path):
    mask = save(tmp_path / "mask.png", np.full((9, 7), 3, np.uint8))
    pairs = {f"{i}": (save(tmp_path / f"{i}.png", RGB + i), mask) for i in range(3)}
    data = SegDataset(pairs, Labels(BY_ID), "sat", add_noise, seed=5)
    first = [data[2, 4][0], data[1, 0][0], data[2, 7][0]]
    other = pickle.loads(pickle.dumps(data))  # what a spawned reading process gets
    assert torch.equal(other[2, 7][0], first[2]) and torch.equal(other[2, 4][0], first[0])
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(first[0], SegDataset(pairs, Labels(BY_ID), "sat", add_noise, seed=6)[2, 4][0])
    x, y, name = SegDataset(pairs, Labels(BY_ID), "sat")[1]
    sat = zip((RGB + 1)[8, 2].tolist(), (0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
    torch.testing.assert_close(x[:, 8, 2], torch.tensor([(v / 255 - mean) / std for v, mean, std in sat]))
    assert x.shape == (3, 9, 7) and y.shape == (9, 7) and y.dtype == torch.int64 and not y.any() and name == "1"
    save(mask, np.full((8, 7), 3, np.uint8))
    assert "mask of 8 x 7 for an image of 9 x 7" in refusal(lambda: SegDataset(pairs, Labels(BY_ID), "sat")[0])


# ---- the description

GOOD = {"images": "images/*.png", "masks": "masks/*.png", "classes": BY_ID, "splits": {"train": "*", "test": "b*"}}


@pytest.mark.parametrize("key, good, bad", [
    ("bands", [[4, 1, 2], [1, 1, 1]], [[0, 1, 2], [1, 2], [1, 2, 3, 4], [1, 2, 2.5], [True, 1, 2], "123", 3, None]),
    ("input_range", [[0, 3000], [-1.5, 2]], [[3, 1], [1, 1], [1], ["0", "1"], 5]),
    ("scene", [r"(.*)_\d+$", "a"], ["(", "*a", "a{99999999999}", 3, ["a"], None]),
    ("instances", ["i/*.png", ["i/*.png"]], [5, "", None, {}]),
    ("select", [0.2], [0.0, 1.0, 1, "0.2", None]), ("tiles", [512], [0, 2.5, "512"]),
    ("unlabelled", [["test"], []], [["val"], "test", "", {}, 3]), ("name", ["a b", "..a"], ["", "a/b", "..", "a\0", 3]),
    ("report", [{"without a": ["a"]}], [{"without d": ["d"]}, ["a"], {"x": "a"}, {"x": [["a"]]}])])
def test_every_key_of_the_description_is_checked(tmp_path, key, good, bad):
    for value in good:
        write(tmp_path / "dataset.json", GOOD | {key: value})
        assert read_description(tmp_path)[key] == value
    for value in bad:
        (tmp_path / "dataset.json").write_text(json.dumps(GOOD | {key: value}))
        said = refusal(read_description, tmp_path)
        assert said.startswith(f'{tmp_path}/dataset.json: "{key}" is {value!r}; expected ')


@pytest.mark.parametrize("key, value", [
    ("report", '{"a": ' * 900 + "1" + "}" * 900), ("bands", '"' + "1" * 10**6 + '"'), ("name", '"a", "name": "b"'),
    ("select", "NaN"), ("input_range", "[0, 1e999]"), ("tiles", "9" * 400), ("warning", "3"), ("images", "null"),
    ("images", "[3]"), ("masks", '["a/*", null]'), ("masks", '[""]'), ("classes", "[null]"),
    ("classes", '[{"name": "a"}]'), ("splits", "[[[]]]")])
def test_what_no_description_can_hold_is_one_short_line(tmp_path, key, value):
    rest = json.dumps({k: v for k, v in GOOD.items() if k != key})[1:]
    (tmp_path / "dataset.json").write_text(f'{{"{key}": {value}, {rest}')
    said = refusal(read_description, tmp_path)
    assert said.startswith(f"{tmp_path}/dataset.json: ") and len(said) < 400 + len(str(tmp_path))


def test_a_key_that_is_misspelt_is_refused_and_others_are_the_users_own(tmp_path):
    for key, meant in {"scenes": "scene", "ignored": "ignore", "input-range": "input_range", "Bands": "bands"}.items():
        write(tmp_path / "dataset.json", GOOD | {key: 1})
        assert f"dataset.json: the key {key!r} is unknown; is {meant!r} meant?" in refusal(read_description, tmp_path)
    write(tmp_path / "dataset.json", GOOD | {"classes": [{**BY_ID[0], "colour": "#000000"}, *BY_ID[1:]]})
    assert "the key 'colour' is unknown; is 'color' meant?" in refusal(read_description, tmp_path)
    own = GOOD | {"license": "CC0", "made_by": {"seed": 3}, "doi": "10.1/x"}
    write(tmp_path / "dataset.json", own)
    assert read_description(tmp_path)["license"] == "CC0"


def test_patterns_that_name_everything_or_nothing_are_one_line(plain):
    for images, said in {"**": "no mask for it by", ".": "no pattern", "": "missing, empty", "/": "no pattern"}.items():
        write(plain / "dataset.json", {**json.loads((plain / "dataset.json").read_text()), "images": images})

        def read(root):
            d = read_description(root)
            return find_pairs(root, d)

        assert said in refusal(read, plain)


def test_a_regex_that_does_not_end_is_refused_in_time(monkeypatch):
    monkeypatch.setattr(datasets, "MATCH_TIME", 0.1)
    names = ["a" * 40 + "!", "b"]
    for regex in ("(a+)+$", "(a|a)*$", "(.*)*x"):
        said = refusal(hold_out, names, 0.5, regex, 0)
        assert said.startswith(f'"scene" in dataset.json: {regex!r} takes too long on')
        said = refusal(groups_of, names, regex)
        assert said.startswith(f"--group-regex: {regex!r} takes too long on")
    either = [(["a_1", "a_2"], ["b_1"]), (["b_1"], ["a_1", "a_2"])]
    assert hold_out(["a_1", "a_2", "b_1"], 0.3, "([a-z]+)_", 0) in either


def test_a_line_that_no_name_can_be_is_refused_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("a," * 10**5)
    assert "a.txt: a line of 200000 letters, 'a,a,a" in refusal(read_list, tmp_path / "a.txt", PAIRS)
    for text in ("", " \n\n"):  # cut off, it would leave a split out in silence
        (tmp_path / "a.txt").write_text(text)
        assert "a.txt: names no image" in refusal(read_list, tmp_path / "a.txt", PAIRS)
        assert read_list(tmp_path / "a.txt", PAIRS, optional=True) == []


def test_a_split_that_is_no_list_of_patterns_is_one_short_line(tmp_path):
    for rules in (None, 0.8, [["a"]], ["a", 1], {"a": "b"}, [["a" * 10**6]]):
        said = refusal(split_names, tmp_path, {"splits": {"train": rules}}, PAIRS)
        assert said.startswith("split 'train' in dataset.json is ") and "expected patterns" in said
        assert len(said) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("here", [True, False])
def test_the_command_to_type_works_where_the_user_stands(tmp_path, monkeypatch, capsys, here):
    root = tmp_path / "my 'first' set"
    for folder, name in (("img", "a"), ("gt", "a"), ("img", "b"), ("gt", "b")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        save(root / folder / f"{name}.png", RGB if folder == "img" else np.eye(9, 7, dtype=np.uint8) + ord(name))
    monkeypatch.chdir(datasets.PROJECT if here else tmp_path)
    command = check_command(root if here else root.name)
    assert command.startswith("python -m data.check '" if here else f"python {datasets.PROJECT}/data/check 'my ")
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(BadInput) as e:
        read_description(root if here else root.name)
    assert str(e.value).endswith(f"draft it with: {command}")
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and (root / "dataset.json").exists()
    assert done.stdout.endswith(f"Name the classes in it, then: {command}\n")
    code, out = run(capsys, root)
    train = shlex.split(out.splitlines()[-1])
    assert code == 0 and train[:1] == ["python"] and Path(train[1]).exists() and train[-1] == str(root)


SYSTEM = ["a/images/.d.png", "a/images/._b.webp", "a/.ipynb_checkpoints/b.png", "__MACOSX/images/b.png",
          "a/images/__MACOSX/1.png", ".git/images/1.png", "@eaDir/images/b.png", "a/images/@eaDir/b.webp",
          "$RECYCLE.BIN/images/b.png", "lost+found/images/b.png", "a/images/Thumbs.db", "a/images/desktop.ini"]


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_all_walkers_take_and_leave_out_the_same_files(tmp_path):
    good = ["a/images/_DSC0001.JPG", "a/images/b.webp", "_c/images/1.tif", "a/images/more/2.png",
            "a/images/again/2.png"]
    touch(tmp_path / "root", *good[:4], *SYSTEM, "a/images/b.tfw", "a/images/read.jp2", "masks/b.png")
    touch(tmp_path / "pool", "2.png", "note.txt", ".d.png")
    shutil.rmtree(tmp_path / "root/a/images/more")
    root = tmp_path / "root"
    for link in ("more", "again"):  # two links to one folder, and links that lead round
        (root / "a/images" / link).symlink_to(tmp_path / "pool")
    (root / "a/images/up").symlink_to(root)
    (root / "a/images/self").symlink_to(root / "a/images")
    (root / "a/images/far").symlink_to("/")
    (tmp_path / "pool/back").symlink_to(root / "a")
    want = sorted(root / name for name in good)
    others = ["b.tfw", "note.txt", "note.txt", "read.jp2"]

    d = dict(images="**/images/**", masks="masks/*")
    assert sorted(match_files(root, "**/images/**").values()) == want
    assert sorted(file.name for file in unknown_files(root, d)) == others
    assert sorted(match_files(root, ["*/*/*.tfw", "a/**/b.web*"]).values()) == [
        root / "a/images/b.tfw", root / "a/images/b.webp"]  # a pattern takes what it names
    complaints = Complaints()
    assert [root / p for p in find_pictures(root, None, complaints)[0]] == want
    note = "4 files are no images by their suffix: 2 .txt, 1 .tfw, 1 .jp2; first "
    said, = complaints.lines["note", "suffix"]
    assert said.startswith(f"{note}{root}/a/images/again/note.txt; images are converted with gdal_translate ")
    found, left = find_images([str(root / "a"), str(root / "_c")])
    assert sorted(found) == want and sorted(file.name for file in left) == others
    assert set(found.values()) == {"images/_DSC0001", "images/b", "images/more/2", "images/again/2", "images/1"}
    shutil.rmtree(root / "masks")
    base, scenes, _, notes, _ = find_scenes(root)
    assert sorted(base / n for n in scenes) == want and set(scenes.values()) == {"a", "_c"}
    assert notes == [said.replace(f"{root}/", f"{base}/")]


# ---- masks of a whole data set

def test_class_counts_are_the_pixels_of_each_class(plain):
    d, pairs, labels, splits = described(plain)
    a = np.asarray(Image.open(plain / "masks/2.png")).copy()
    a[:3] = 255
    save(plain / "masks/2.png", a)
    masks = [np.asarray(Image.open(plain / f"masks/{i}.png")).ravel().tolist() for i in range(6)]
    want = [sum(m.count(v) for m in masks) for v in (0, 1, 2, 255)]
    counts = class_counts(pairs, labels)
    assert counts.sum(0).tolist() == want and len(counts) == 6 and counts.dtype == np.int64
    assert class_counts(pairs, labels, 1).tolist() == [[masks[0].count(v) for v in (0, 1, 2, 255)]]
    assert class_counts({}, labels).sum(0).tolist() == [0, 0, 0, 0]
    a[0, :7], a[1, :5] = 9, 8
    save(plain / "masks/1.png", a)
    with pytest.raises(BadInput, match="masks/1.png: unknown ids 9, 8"):
        class_counts(pairs, labels)


def test_two_images_of_one_name_are_refused(plain):
    shutil.copy(plain / "images/1.png", plain / "images/1.PNG")
    with pytest.raises(BadInput, match="two images of one name"):
        match_pairs(plain, {"images": ["images/*.png", "images/*.PNG"], "masks": ["masks/*.png", "masks/*.png"]})
