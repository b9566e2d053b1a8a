"""data/scenes.py: class folders, splits without leaks, pixels, and all of it opened."""
import json
import shutil

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from data import augment
from data.common import BadInput, write
from data.datasets import NORMS, normalise
from data.scenes import (
    Scenes, augment_scenes, base_of, check_classes, complete_splits, decode_scenes, draw_splits,
    few, find_scenes, groups_of, prepare, square, twins)

NAMES = ["field", "forest", "water"]
COLOURS = (150, 140, 60), (40, 110, 50), (40, 60, 140)


def make_scenes(root, counts=(20, 15, 15), side=16):
    """Noisy pictures in three colours, one folder per class."""
    rng = np.random.default_rng(0)
    for name, colour, count in zip(NAMES, COLOURS, counts):
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise = rng.integers(-40, 40, (side, side, 3))
            image = Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype("u1"))
            image.save(root / name / f"{name}_{i}.png")
    return root


# ---- folders

@pytest.mark.parametrize("place", ["2750", "EuroSAT/2750", "EuroSAT_RGB"])
def test_eurosat_is_found_from_any_parent(tmp_path, place):
    make_scenes(tmp_path / place, (2, 1, 1))
    (tmp_path / "LICENSE").write_text("free")
    parents = [p for p in tmp_path.rglob("*") if p.is_dir() and p.name not in NAMES]
    for start in [tmp_path, *parents]:
        assert base_of(start) == (tmp_path / place).resolve()
        assert find_scenes(start)[1]["forest/forest_0.png"] == "forest"


def test_folders_may_hold_splits_and_files_that_are_no_images(tmp_path):
    for split in ("train", "Valid", "test"):
        make_scenes(tmp_path / split, (3, 2, 1))
    (tmp_path / "train/field/notes.txt").write_text("mine")
    (tmp_path / "train/field/.DS_Store").write_text("")
    (tmp_path / "train/nothing").mkdir()
    (tmp_path / "train/loose.png").write_text("")
    base, scenes, splits, notes, empty = find_scenes(tmp_path)
    assert {split: len(names) for split, names in splits.items()} == dict(train=6, val=6, test=6)
    assert len(scenes) == 18 and base == tmp_path
    assert notes == [f"1 file is no image by its suffix: {tmp_path}/train/field/notes.txt",
                     f"1 images lie in no class folder, first {tmp_path}/train/loose.png"]
    assert empty == ["nothing"]


def test_a_class_is_one_however_its_accents_are_written(tmp_path):
    for split, name in (("train", "Fore\u0302t"), ("val", "Forêt"), ("train", "Eau"), ("val", "Eau")):
        made = make_scenes(tmp_path / f"{split} {name}", (2, 0, 0))
        (tmp_path / "set" / split).mkdir(parents=True, exist_ok=True)
        (made / "field").rename(tmp_path / "set" / split / name)
    base, scenes, splits, _, _ = find_scenes(tmp_path / "set")
    assert set(scenes.values()) == {"Forêt", "Eau"} and len(splits["val"]) == 4
    assert all((base / name).exists() for name in scenes)  # files keep their own names


def test_links_that_lead_round_are_no_classes(tmp_path):
    make_scenes(tmp_path / "real", (2, 2, 2))
    (tmp_path / "real/loop").symlink_to(tmp_path / "real")
    base, scenes, *_, empty = find_scenes(tmp_path / "real")
    assert set(scenes.values()) == set(NAMES) and len(scenes) == 6 and empty == []
    shutil.rmtree(tmp_path / "real")
    (tmp_path / "loop").symlink_to(tmp_path)  # the only folder of its folder
    with pytest.raises(BadInput, match="no images in sub-folders"):
        find_scenes(tmp_path)


def test_folders_that_are_no_classes_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no such folder"):
        find_scenes(tmp_path / "none")
    with pytest.raises(BadInput, match="no images in sub-folders"):
        find_scenes(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/dataset.json").write_text('{"masks": "m/*"}')
    with pytest.raises(BadInput, match="describes images and masks; type python train_seg.py --root"):
        find_scenes(tmp_path / "set")
    shutil.rmtree(tmp_path / "set")
    make_scenes(tmp_path / "A", (1, 1, 1))
    with pytest.raises(BadInput, match="1 image in it: is it a class, and --root .*/A\\?"):
        find_scenes(next((tmp_path / "A").rglob("*.*")).parent)
    shutil.rmtree(tmp_path / "A")
    for name in ("train", "val", "field"):
        make_scenes(tmp_path / name, (1, 1, 1))
    with pytest.raises(BadInput, match="field: beside train/; move it away"):
        find_scenes(tmp_path)


# ---- splits

def test_a_drawn_split_is_stratified_and_keeps_groups_together():
    counts = dict(a=100, b=50, c=10)
    scenes = {f"{c}/{c}_{i}": c for c, n in counts.items() for i in range(n)}
    shares = dict(train=0.6, val=0.2, test=0.2)
    splits = draw_splits(scenes, groups_of(list(scenes), None), shares, 0)
    for c, n in counts.items():
        found = [sum(scenes[x] == c for x in splits[split]) for split in shares]
        assert found == [n * 6 // 10, n * 2 // 10, n * 2 // 10]
    assert sorted(sum(splits.values(), [])) == sorted(scenes)
    assert draw_splits(scenes, groups_of(list(scenes), None), shares, 1) != splits

    groups = groups_of(list(scenes), r"_(\d+)$")  # a_7 and b_7 are one place
    splits = draw_splits(scenes, groups, shares, 0)
    homes = [{groups[name] for name in names} for names in splits.values()]
    assert len(set.union(*homes)) == sum(map(len, homes))  # no group in two splits
    assert abs(len(splits["train"]) - 96) <= 8


def test_the_group_is_the_first_bracket_or_the_whole_match():
    assert groups_of(["a1_x", "b2_y"], None) == {"a1_x": "a1_x", "b2_y": "b2_y"}
    assert groups_of(["a1_x", "b2_y"], r"\d") == {"a1_x": "1", "b2_y": "2"}
    assert groups_of(["a1_x", "b2_y"], r"(\w)\d_") == {"a1_x": "a", "b2_y": "b"}
    with pytest.raises(BadInput, match="does not match 'b'"):
        groups_of(["ax", "b"], "x")
    with pytest.raises(BadInput, match="no regular expression"):
        groups_of(["a"], "(")


def test_few_shot_subsets_are_nested_and_by_seed():
    scenes = {f"{c}{i}": c for c in "ab" for i in range(30)}
    names = list(scenes)
    small, large = few(names, scenes, 5, 0), few(names, scenes, 20, 0)
    assert set(small) < set(large)
    assert [sum(scenes[name] == c for name in small) for c in "ab"] == [5, 5]
    assert set(few(names, scenes, 5, 1)) != set(small) == set(few(names[::-1], scenes, 5, 0))


def test_val_is_drawn_from_train_where_the_folders_give_only_test():
    scenes = {f"{split}/{i}": "ab"[i % 2] for split in ("train", "test") for i in range(40)}
    given = {"train": [name for name in scenes if name.startswith("train")],
             "test": [name for name in scenes if name.startswith("test")]}
    shares = dict(train=0.6, val=0.2, test=0.2)
    splits = complete_splits(scenes, given, shares, groups_of(list(scenes), None), 0)
    assert splits["test"] == given["test"]
    assert len(splits["val"]) == 10 and len(splits["train"]) == 30
    assert sorted(splits["val"] + splits["train"]) == sorted(given["train"])


def test_classes_are_those_of_train():
    scenes = {"1": "a", "2": "b", "3": "a", "4": "c"}
    (warning,) = check_classes({"train": ["1", "2"], "val": ["3"]}, scenes, ["a", "b"])
    assert "no image of b in val" in warning
    with pytest.raises(BadInput, match="'c' is in val but not in train"):
        check_classes({"train": ["1", "2"], "val": ["4"]}, scenes, ["a", "b"])
    with pytest.raises(BadInput, match="'b' has no image in train"):
        check_classes({"train": ["1"], "val": ["2"]}, scenes, ["a", "b"])
    with pytest.raises(BadInput, match="1 classes .a.; expected 2 to 254"):
        check_classes({"train": ["1"], "val": ["3"]}, scenes, ["a"])


# ---- pixels

def test_pixels_are_those_of_the_files_and_large_ones_are_not_squashed(tmp_path):
    files = sorted(make_scenes(tmp_path / "set", (5, 0, 0)).rglob("*.png"))
    pixels, digests, kinds = decode_scenes(*files)
    assert pixels.shape == (5, 16, 16, 3) and digests.any(1).all()
    np.testing.assert_array_equal(pixels, [np.asarray(Image.open(f)) for f in files])
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200  # exactly the middle square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no")
    assert kinds.tolist() == [[3, 8]]
    Image.fromarray(wide[..., 0]).save(tmp_path / "grey.png")
    assert decode_scenes(*files, tmp_path / "grey.png")[2].tolist() == [[1, 8], [3, 8]]
    files = files[0], tmp_path / "wide.png", tmp_path / "broken.jpg"
    pixels, digests, kinds = decode_scenes(*files, side=12)
    assert pixels.shape == (3, 12, 12, 3) and (pixels[1, :, 1:-1] > 190).all()
    assert digests.any(1).tolist() == [True, True, False]
    assert (square(wide, 20) == 200).all()


def test_twins_are_equal_pictures(tmp_path):
    a, b = (np.random.default_rng(i).integers(0, 255, (8, 8, 3), np.uint8) for i in (0, 1))
    files = [tmp_path / name for name in ("0.png", "1.png", "2.bmp")]
    for file, image in zip(files, (a, b, a)):
        Image.fromarray(image).save(file)
    assert twins(decode_scenes(*files)[1]) == [[0, 2]]


def test_augmented_scenes_are_symmetries_and_do_not_depend_on_the_batch():
    x = torch.randint(0, 255, (40, 9, 9, 3), dtype=torch.uint8)
    out = augment_scenes(x, list(range(40)), seed=3, side=9)
    kinds = set()
    for a, b in zip(x.numpy(), out.numpy()):  # the eight symmetries by NumPy's own turns
        for turn in range(4):
            for flip in (0, 1):
                turned = np.rot90(a, turn)
                if np.array_equal(b, turned[:, ::-1] if flip else turned):
                    kinds.add((turn, flip))
    assert len(kinds) == 8
    assert torch.equal(augment_scenes(x[5:7], [5, 6], seed=3, side=9), out[5:7])


def test_windows_lie_anywhere_inside_and_equally_often():
    places = torch.arange(81).view(1, 9, 9, 1).expand(3000, 9, 9, 3)  # every pixel's own place
    out = augment_scenes(places, list(range(3000)), seed=3, side=7)[..., 0]
    rows, columns = out // 9, out % 9
    tops, lefts = rows.flatten(1).amin(1), columns.flatten(1).amin(1)
    counts = torch.bincount(3 * tops + lefts, minlength=9)
    assert len(counts) == 9 and counts.min() > 280  # of 333, spread 17
    # Each window has all of its own pixels: 7 x 7 neighbours.
    for window, top, left in zip(out[:50], tops, lefts):
        inside = places[0, top:top + 7, left:left + 7, 0]
        assert sorted(window.flatten().tolist()) == inside.flatten().tolist()


def test_prepare_is_the_normalisation_of_the_segmentation_scripts():
    image = np.random.default_rng(0).integers(0, 255, (7, 7, 3), np.uint8)
    x = torch.from_numpy(image)[None]
    torch.testing.assert_close(prepare(x, NORMS["sat"])[0], normalise(image, "sat"))
    assert prepare(x, NORMS["sat"], 14).shape == (1, 3, 14, 14)
    flat = torch.full((1, 7, 7, 3), 90, dtype=torch.uint8)  # resizing keeps what is constant
    larger = prepare(flat, NORMS["sat"], 14)
    torch.testing.assert_close(larger[..., :7, :7], prepare(flat, NORMS["sat"]))


def test_the_share_of_cutmix_is_the_area_left():
    x = torch.arange(6).view(6, 1, 1, 1).expand(6, 3, 32, 32).float()
    mixed, y, other, share = augment.cutmix_scenes(x, torch.arange(6), np.random.default_rng(1))
    assert 0 < share < 1
    for i in range(6):
        own = (mixed[i, 0] == y[i]).float().mean().item()
        assert own == (1.0 if other[i] == y[i] else pytest.approx(share))


# ---- opened

def refusal(*args, **how):
    with pytest.raises(BadInput) as e:
        Scenes(*args, cache="off", **how)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes") / "tiny")


def test_class_folders_are_opened(root):
    d = Scenes(root, cache="off")
    assert (d.names, d.dataset, d.reports) == (NAMES, "tiny", "test")
    sizes = {split: len(names) for split, names in d.splits.items()}
    assert sizes == dict(train=30, val=10, test=10)
    for split, names in d.splits.items():
        assert d.y[split].tolist() == [NAMES.index(name.split("/")[0]) for name in names]
        for row, name in zip(d.rows[split], names):
            np.testing.assert_array_equal(d.pixels[row], np.asarray(Image.open(root / name)))
        np.testing.assert_array_equal(d.images(split), d.pixels[d.rows[split]])
    assert any("random split without --group-regex" in note for note in d.notes)


@pytest.mark.parametrize("classes, said", [
    (["water", "field", "water"], "--classes names water twice"),
    (["sea", "field"], "--classes sea: not there; "),
    (["water"], "1 classes (water); expected 2 to 254")])
def test_classes_that_cannot_be_taken_are_refused(root, classes, said):
    assert said in refusal(root, classes)


def test_classes_have_the_order_asked_for(root):
    d = Scenes(root, ["water", "field"], cache="off")
    assert d.names == ["water", "field"] and len(d.all) == 35
    first = [name for name, y in zip(d.splits["val"], d.y["val"]) if y == 0]
    assert first and all(name.startswith("water/") for name in first)


def test_few_images_per_class_leave_val_and_test_alone(root, tmp_path):
    whole, part = Scenes(root, cache="off"), Scenes(root, cache="off", per_class=2)
    assert part.splits["test"] == whole.splits["test"] and part.splits["val"] == whole.splits["val"]
    assert torch.bincount(part.y["train"]).tolist() == [2, 2, 2]
    write(tmp_path / "run/split.json", whole.splits)
    again = Scenes(root, cache="off", per_class=2, resume=str(tmp_path / "run"))  # a run's own split
    assert again.splits == whole.splits
    assert not any("--per-class" in note for note in part.notes)
    many = Scenes(root, cache="off", per_class=20)
    assert "WARNING --per-class 20: train has only " in "\n".join(many.notes)


def test_a_split_file_counts_and_shares_do_otherwise(root, tmp_path):
    whole = Scenes(root, cache="off", split_seed=1).splits
    write(tmp_path / "split.json", whole)
    assert Scenes(root, cache="off", split_file=tmp_path / "split.json").splits == whole
    for flag, how in (("--fractions", dict(fractions=[0.5, 0.3, 0.2])), ("--split-seed", dict(split_seed=3))):
        assert f"{flag}: nothing is drawn" in refusal(root, split_file=tmp_path / "split.json", **how)
    assert Scenes(root, cache="off").splits != whole
    d = Scenes(root, cache="off", fractions=[0.8, 0.2, 0.0])
    assert set(d.splits) == {"train", "val"} and d.reports == "val" and len(d.splits["train"]) == 40
    for content, said in (({"train": ["field/none.png"]}, "'field/none.png' is no image here"),
                          ({"train": whole["val"], "val": whole["val"]}, "is in the splits 'train' and 'val'"),
                          ([1], "expected JSON {split: [names]}")):
        write(tmp_path / "split.json", content)
        assert said in refusal(root, split_file=tmp_path / "split.json")


def test_scenes_stay_whole_by_a_regex(root):
    d = Scenes(root, cache="off", scene=r"(\d)\.png")
    homes = [{name[-5] for name in names} for names in d.splits.values()]
    assert len(set.union(*homes)) == sum(map(len, homes)) == 10
    assert not any("random split" in note for note in d.notes)


def test_bad_files_are_named_and_may_be_left_out(tmp_path):
    root = make_scenes(tmp_path / "d", (8, 8, 8))
    (root / "field/notes.txt").write_text("mine")
    (root / "field/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    shutil.copy(root / "water/water_0.png", root / "forest/also.png")
    shutil.copy(root / "water/water_1.png", root / "water/again.png")
    said = refusal(root)
    assert "broken.jpg: not a readable image" in said and "(3 such files" in said
    d = Scenes(root, cache="off", skip_bad=True)
    bad = ["field/broken.jpg", "forest/also.png", "water/water_0.png", "water/water_1.png"]
    assert sorted(d.left_out) == bad and not set(bad) & set(sum(d.splits.values(), []))
    assert all(any(name in note for note in d.notes) for name in [*bad, "notes.txt"])


def test_an_empty_class_folder_is_named(tmp_path):
    root = make_scenes(tmp_path / "d", (0, 8, 8))
    assert "class folder 'field' holds no image" in refusal(root)
    assert Scenes(root, ["water", "forest"], cache="off").names == ["water", "forest"]
    (root / "field/a.jp2").touch()
    assert "'field' holds no image; 1 file is no image by its suffix: " in refusal(root)
    d = Scenes(root, cache="off", skip_bad=True)
    assert d.names == ["forest", "water"] and any("left out: field" in note for note in d.notes)


def test_the_cache_changes_nothing(root, tmp_path):
    want = Scenes(root, cache="off")
    for _ in range(2):  # decoded, then taken from the cache
        d = Scenes(root, cache=str(tmp_path))
        np.testing.assert_array_equal(d.pixels, want.pixels)
        assert d.splits == want.splits


def test_bands_and_size_reach_the_pixels(root):
    plain = Scenes(root, cache="off")
    turned = Scenes(root, cache="off", bands=[3, 2, 1])
    np.testing.assert_array_equal(turned.pixels, plain.pixels[..., ::-1])
    assert Scenes(root, cache="off", size=12).pixels.shape == (50, 12, 12, 3)


def deep_scenes(root, n=8):
    """Two classes of 16-bit TIFFs, each of another brightness -> {name: pixels}."""
    rng = np.random.default_rng(1)
    pixels = {}
    for i in range(2 * n):
        a = rng.integers(500 * i, 500 * i + 400, (8, 8, 3)).astype(np.uint16)
        name = f"{'ab'[i % 2]}/{i}.tif"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(root / name, a, photometric="rgb")
        pixels[name] = a
    return pixels


def as_bytes(pixels, pairs):
    """The definition of an input range, in float64."""
    low, high = np.array(pairs).T
    return ((pixels - low) / (high - low) * 255).clip(0, 255)


@pytest.mark.parametrize("spoilt", [False, True])
def test_percentiles_are_those_of_the_training_images_that_are_used(tmp_path, spoilt):
    pixels = deep_scenes(tmp_path / "d")
    if spoilt:  # a copy and a broken file change who is drawn
        shutil.copy(tmp_path / "d/a/0.tif", tmp_path / "d/a/copy.tif")
        (tmp_path / "d/b/broken.tif").write_bytes((tmp_path / "d/b/1.tif").read_bytes()[:300])
    d = Scenes(tmp_path / "d", cache="off", input_range="p2-98", skip_bad=True, split_seed=3)
    assert len(d.left_out) == 2 * spoilt
    train = np.stack([pixels[name] for name in d.splits["train"]]).reshape(-1, 3)
    want = np.percentile(train, (2, 98), axis=0).T
    np.testing.assert_allclose(d.reading["input_range"], want)
    for name, row in zip(d.splits["val"], d.images("val")):
        assert np.abs(row - as_bytes(pixels[name], want)).max() <= 0.51
    assert d.about()["percentiles"] == "p2-98" and d.notes[-2].startswith("input range p2-98 of ") or spoilt


def test_a_run_that_goes_on_reads_with_its_own_numbers(tmp_path):
    deep_scenes(tmp_path / "d")
    first = Scenes(tmp_path / "d", cache="off", input_range="p2-98")
    write(tmp_path / "run/split.json", first.splits)
    write(tmp_path / "run/protocol.json", first.about() | {"reading": dict(bands=None, input_range=[0, 9000])})
    again = Scenes(tmp_path / "d", cache="off", input_range="p2-98", resume=str(tmp_path / "run"))
    assert again.reading["input_range"] == [0, 9000] and again.about()["percentiles"] == "p2-98"


def test_a_run_is_told_what_it_needs(root):
    d = Scenes(root, cache="off", bands=[3, 2, 1])
    about = json.loads(json.dumps(d.about()))
    assert about == d.about() and about["classes"] == [{"name": name} for name in NAMES]
    assert (about["dataset"], about["root"], about["stored"]) == ("tiny", str(root), 16)
    assert about["reading"] == dict(bands=[3, 2, 1], input_range=None)
    assert len(set(about["splits"].values())) == 3
