"""data/source.py: what a data set says of itself once it is opened, and the numbers it gives."""
import json

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from data import demo
from data.common import IGNORE, BadInput, read_json, write
from data.datasets import NORMS
from data.source import Source, rare_classes

CLASSES = [{"name": "land", "id": 0}, {"name": "road", "id": 4}, {"name": "water", "id": 2}]


def picture(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def make_set(root, splits=dict(train=4, val=2, test=2), **more):
    """Images of 12 x 16 with masks of three classes and of 9, which is ignored."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for i in range(count):
            picture(root / split / f"images/{i}.png", rng.integers(0, 256, (12, 16, 3), np.uint8))
            picture(root / split / f"masks/{i}.png", rng.choice(np.uint8([0, 4, 2, 9]), (12, 16)))
    description = dict(name="small", images="*/images/*.png", masks="*/masks/*.png",
                       classes=CLASSES, ignore=[9],
                       splits={split: f"{split}/*" for split in splits})
    write(root / "dataset.json", description | more)
    return root


def names(split, count):
    return [f"{split}/images/{i}" for i in range(count)]


def refusal(*args, **how):
    with pytest.raises(BadInput) as e:
        Source(*args, **how)
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- opening

def test_a_folder_is_opened(tmp_path):
    d = Source(root=make_set(tmp_path), cache="off")
    assert (d.kind, d.name, d.names) == ("folder", "small", ["land", "road", "water"])
    want = {"train": names("train", 4), "val": names("val", 2), "test": names("test", 2)}
    assert d.splits == want
    assert d.root == tmp_path.resolve() and not d.warnings and d.further == {}
    assert d.headline() == "data    small, 3 classes, images: 4 train, 2 val, 2 test"
    assert d.files("val") == {
        f"val/images/{i}": (tmp_path / f"val/images/{i}.png", tmp_path / f"val/masks/{i}.png")
        for i in (0, 1)}


def test_the_demo_needs_no_root_and_is_made_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = demo.make(tmp_path / "runs/data/demo", scenes=(3, 2, 1), size=64)
    d = read_json(small / "dataset.json")  # taken for the whole demo, which takes longer to make
    d["made_by"] |= dict(scenes=[96, 16, 24], size=256)
    write(small / "dataset.json", d)
    for opened in (Source(), Source("demo"), Source("demo", small)):
        assert (opened.kind, opened.name, opened.root) == ("demo", "demo", small.resolve())
        sizes = {split: len(found) for split, found in opened.splits.items()}
        assert sizes == dict(train=3, val=2, test=1)


@pytest.mark.parametrize("how, said", [
    (dict(dataset="folder"), "--root is missing"), (dict(dataset="potsdam"), "--root is missing"),
    (dict(root="ROOT", variant="rgb"), "--variant rgb goes with a public --dataset, not folder"),
    (dict(root="ROOT", final=True, val_frac=0.2), "--final holds nothing out, --val-frac does"),
    (dict(root="ROOT/train"), "dataset.json: no such file; draft it with"),
    (dict(root="ROOT/none"), "none: no such folder; there is "),
    (dict(root="ROOT/none", dataset="loveda"), "none: no such folder; there is ")])
def test_flags_that_contradict_each_other(tmp_path, how, said):
    make_set(tmp_path)
    how = how | {"root": how["root"].replace("ROOT", str(tmp_path))} if "root" in how else how
    assert said in refusal(**how)


def test_a_mask_of_another_size_stops_at_once(tmp_path):
    picture(make_set(tmp_path) / "test/masks/1.png", np.zeros((12, 15), np.uint8))
    assert "1.png: mask of 12 x 15 for an image of 12 x 16" in refusal(root=tmp_path)


# ---- reading

def arrays(d, split="train"):
    data = d.part(split, "imagenet")
    return [data.read(i) for i in range(len(data))]


def test_a_sample_is_the_image_normalised_and_the_mask_in_train_ids(tmp_path):
    d = Source(root=make_set(tmp_path), cache="off")
    x, y, name = d.part("val", "sat")[1]
    image, mask = (np.asarray(Image.open(file)) for file in d.pairs["val/images/1"])
    mean, std = NORMS["sat"]
    want = ((image / 255 - mean) / std).transpose(2, 0, 1)
    torch.testing.assert_close(x, torch.tensor(want, dtype=torch.float32))
    assert y.tolist() == [[{0: 0, 4: 1, 2: 2, 9: IGNORE}[v] for v in row] for row in mask.tolist()]
    assert name == "val/images/1" and y.dtype == torch.int64


def test_augmentation_is_given_arrays_and_a_draw_of_its_own(tmp_path):
    def noise(image, mask, rng):
        assert image.dtype == mask.dtype == np.uint8
        return np.full_like(image, rng.integers(256)), mask

    d = Source(root=make_set(tmp_path), cache="off")
    train, other = d.part("train", "sat", noise, seed=1), d.part("train", "sat", noise, seed=2)
    assert torch.equal(train[0, 5][0], train[0, 5][0])
    assert not torch.equal(train[0, 5][0], train[0, 6][0])
    assert not torch.equal(train[0, 5][0], other[0, 5][0])


def test_a_part_may_be_some_images_of_any_split(tmp_path):
    d = Source(root=make_set(tmp_path), cache="off")
    data = d.part("train", "sat", names=["test/images/1", "train/images/2"])
    assert [data[i][2] for i in range(len(data))] == ["test/images/1", "train/images/2"]


def test_the_cache_changes_nothing(tmp_path):
    root = make_set(tmp_path / "set")
    want = arrays(Source(root=root, cache="off"))
    for _ in range(2):  # decoded, then taken from the cache
        got = arrays(Source(root=root, cache=str(tmp_path / "cache")))
        for (image, mask), (image_, mask_) in zip(want, got):
            np.testing.assert_array_equal(image, image_)
            np.testing.assert_array_equal(mask, mask_)
    assert any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("flag, order", [(None, [2, 1, 0]), ([1, 1, 3], [0, 0, 2])])
def test_bands_of_the_description_and_of_the_flag_which_wins(tmp_path, flag, order):
    d = Source(root=make_set(tmp_path, bands=[3, 2, 1]), cache="off", bands=flag)
    assert d.reading["bands"] == [i + 1 for i in order]
    stored = np.asarray(Image.open(tmp_path / "train/images/0.png"))
    np.testing.assert_array_equal(arrays(d)[0][0], stored[..., order])


@pytest.mark.parametrize("flag, low, high", [(None, 0, 2550), ([1000, 2020], 1000, 2020)])
def test_the_input_range_of_the_description_and_of_the_flag_which_wins(tmp_path, flag, low, high):
    make_set(tmp_path, input_range=[0, 2550])
    deep = np.arange(192, dtype=np.uint16).reshape(12, 16) * 15
    for file in tmp_path.glob("*/images/*.png"):
        picture(file, deep)
    d = Source(root=tmp_path, cache="off", input_range=flag)
    assert d.reading["input_range"] == [low, high]
    want = ((deep.astype(float) - low) / (high - low) * 255).clip(0, 255)
    assert np.abs(arrays(d)[0][0] - want[..., None]).max() <= 1


def deep_set(root):
    """Four training images of two bands, 16 bits and nodata 0, one val image far brighter -> pixels of train."""
    make_set(root, dict(train=4, val=1), bands=[2, 1, 1])
    rng = np.random.default_rng(2)
    pixels = []
    for file in sorted(root.glob("*/images/*.png")):
        a = rng.integers(100, 4000, (12, 16, 2)).astype(np.uint16) * [1, 3]
        a[:3] = 0
        if "val" in file.parts:
            a = a + 40000
        else:
            pixels.append(a[3:].reshape(-1, 2))
        file.unlink()
        tifffile.imwrite(file.with_suffix(".tif"), a.astype(np.uint16), photometric="minisblack", planarconfig="contig",
                         extratags=[(42113, "s", 0, "0", True)])
    d = read_json(root / "dataset.json")
    write(root / "dataset.json", d | {"images": "*/images/*.tif"})
    return np.concatenate(pixels)


def test_percentiles_of_the_training_images_become_numbers_that_a_run_keeps(tmp_path):
    pixels = deep_set(tmp_path)
    d = Source(root=tmp_path, cache="off", input_range="p5-90")
    one, two = np.percentile(pixels, (5, 90), axis=0).T
    np.testing.assert_allclose(d.reading["input_range"], [two, one, one])
    assert d.about()["percentiles"] == "p5-90" and json.loads(json.dumps(d.about()))["reading"] == d.reading
    assert f"input range p5-90 of 4 training images: band 2 {two[0]:g} to {two[1]:g}, band 1" in d.headline()
    image, mask = arrays(d)[0]
    assert image[3:].min() == 0 and image[3:].max() == 255 and (mask[:3] == IGNORE).all()

    # The description may say so, too; a run that goes on has its own numbers, as its own split.
    write(tmp_path / "dataset.json", read_json(tmp_path / "dataset.json") | {"input_range": "p5-90"})
    assert Source(root=tmp_path, cache="off").reading == d.reading
    write(tmp_path / "run/split.json", d.splits)
    write(tmp_path / "run/protocol.json", {"reading": dict(bands=[2, 1, 1], input_range=[1, 2])})
    again = Source(root=tmp_path, cache="off", resume=str(tmp_path / "run"))
    assert again.reading["input_range"] == [1, 2]
    write(tmp_path / "run/protocol.json", {})
    assert "run/protocol.json: no input range" in refusal(root=tmp_path, cache="off", resume=str(tmp_path / "run"))


def test_percentiles_of_tiles_are_those_of_their_boxes(tmp_path):
    deep_set(tmp_path)
    file = tmp_path / "train/images/2.tif"
    a = tifffile.imread(file)
    write(tmp_path / "dataset.json", read_json(tmp_path / "dataset.json") | {
        "tiles": 4, "splits": {"train": "train/images/2_5", "val": "val/*"}})
    d = Source(root=tmp_path, cache="off", input_range="p0-100")  # the second tile of the second row
    want = [a[4:8, 4:8, b].min() for b in (1, 0, 0)], [a[4:8, 4:8, b].max() for b in (1, 0, 0)]
    np.testing.assert_array_equal(np.transpose(d.reading["input_range"]), want)


def test_without_either_images_are_read_as_they_are(tmp_path):
    d = Source(root=make_set(tmp_path), cache="off")
    assert d.reading == dict(bands=None, input_range=None)


# ---- splits

@pytest.mark.parametrize("splits, picks, reports", [
    (dict(train=4, val=2, test=2), "val", "test"), (dict(train=4, val=2), "val", "val"),
    (dict(train=4, val=2, test=2, select=1), "select", "test")])
def test_which_split_chooses_and_which_is_reported(tmp_path, splits, picks, reports):
    d = Source(root=make_set(tmp_path, splits), cache="off")
    assert (d.picks, d.reports) == (picks, reports)


def test_a_share_of_train_held_out_chooses_where_val_is_reported(tmp_path):
    d = Source(root=make_set(tmp_path, dict(train=8, val=2), select=0.25), cache="off")
    assert (d.picks, d.reports) == ("select", "val")
    assert len(d.splits["select"]) == 2 and len(d.splits["train"]) == 6
    assert sorted(d.splits["select"] + d.splits["train"]) == names("train", 8)


def test_final_holds_nothing_out(tmp_path):
    d = Source(root=make_set(tmp_path, dict(train=8, val=2), select=0.25), cache="off", final=True)
    assert d.picks is None and d.reports == "val" and len(d.splits["train"]) == 8
    # Val need not be there.
    d = Source(root=make_set(tmp_path / "b", dict(train=3)), cache="off", final=True)
    assert d.picks is None and d.reports == "train"


def test_a_split_must_be_there_if_it_is_needed(tmp_path):
    make_set(tmp_path, dict(train=8))
    assert "no val split" in refusal(root=tmp_path)
    assert Source(root=tmp_path, cache="off", need=("train",)).reports == "train"
    make_set(tmp_path / "b", dict(test=2))
    assert "no train split" in refusal(root=tmp_path / "b")
    assert Source(root=tmp_path / "b", cache="off", need=()).reports == "test"


def test_val_frac_holds_out_and_warns_without_scenes(tmp_path):
    root = make_set(tmp_path, dict(train=8))
    d = Source(root=root, cache="off", val_frac=0.25)
    assert len(d.splits["val"]) == 2 and len(d.splits["train"]) == 6
    assert d.picks == d.reports == "val"
    assert any('--val-frac without "scene"' in line for line in d.warnings)
    again = Source(root=root, cache="off", val_frac=0.25)
    assert again.splits == d.splits  # not drawn anew
    write(root / "dataset.json", read_json(root / "dataset.json") | {"scene": r"images/(\d)"})
    assert not Source(root=root, cache="off", val_frac=0.25).warnings


def test_the_warning_of_a_description_is_passed_on(tmp_path):
    d = Source(root=make_set(tmp_path, warning="masks are shifted"), cache="off")
    assert d.warnings == ["masks are shifted"] and "WARNING masks are shifted" in d.headline()


def test_a_split_file_replaces_the_splits(tmp_path):
    mine = {"train": names("test", 2), "val": names("train", 1)}
    write(tmp_path / "mine.json", mine)
    d = Source(root=make_set(tmp_path / "set"), cache="off", split_file=tmp_path / "mine.json")
    assert d.splits == mine and d.reports == "val"


def test_a_run_that_goes_on_has_its_own_split(tmp_path):
    own = {"train": names("train", 3), "val": names("train", 4)[3:]}
    write(tmp_path / "run/split.json", own)
    root = make_set(tmp_path / "set", dict(train=5))  # another image has come since
    d = Source(root=root, cache="off", val_frac=0.5, resume=str(tmp_path / "run"))
    assert d.splits == own


def test_beside_a_split_file_images_may_lack_masks_but_none_of_its_own(tmp_path):
    root = make_set(tmp_path / "set")
    (root / "test/masks/1.png").unlink()
    mine = {"train": names("train", 4), "val": names("val", 2)}
    write(tmp_path / "mine.json", mine)
    assert Source(root=root, cache="off", split_file=tmp_path / "mine.json").splits == mine
    write(tmp_path / "mine.json", mine | {"test": names("test", 2)})
    assert "test/images/1.png: no mask for it" in refusal(root=root, split_file=tmp_path / "mine.json")
    write(tmp_path / "mine.json", {"train": names("train", 4)})
    said = refusal(root=root, split_file=tmp_path / "mine.json")
    assert said.endswith(f"no val split; add it to {tmp_path}/mine.json, or hold out a part of train: --val-frac 0.2")
    d = Source(root=root, cache="off", split_file=tmp_path / "mine.json", val_frac=0.2)
    assert sorted(d.splits["train"] + d.splits["val"]) == names("train", 4) and len(d.splits["val"]) == 1


@pytest.mark.parametrize("more", [{}, {"select": 0.2}])
def test_one_training_image_needs_final(tmp_path, more):
    root = make_set(tmp_path, dict(train=1), **more)
    assert "one training image" in (said := refusal(root=root)) and "type --final" in said
    assert Source(root=root, cache="off", final=True).splits == {"train": names("train", 1)}


def test_one_scene_needs_final(tmp_path):
    root = make_set(tmp_path, dict(train=4), select=0.2, scene="train")
    assert "0.2 of 1 scenes leaves train or val empty" in (said := refusal(root=root)) and "type --final" in said
    assert Source(root=root, cache="off", final=True).splits == {"train": names("train", 4)}


# ---- what cannot be read

def spoil(root):
    """Five faults; {name: what is said of it}."""
    (root / "train/images/0.png").write_bytes(b"no image")
    (root / "train/masks/1.png").unlink()
    picture(root / "train/masks/2.png", np.full((12, 16), 77, np.uint8))
    picture(root / "train/masks/3.png", np.zeros((12, 15), np.uint8))
    file = root / "val/images/1.png"
    file.write_bytes(file.read_bytes()[:200])  # a good header
    return {"train/images/0": "0.png: not a readable image", "train/images/1": "1.png: no mask for it",
            "train/images/2": "unknown ids 77", "train/images/3": "mask of 12 x 15 for an image of 12 x 16",
            "val/images/1": "1.png: damaged or truncated"}


def test_images_that_cannot_be_read_are_listed_and_left_out(tmp_path):
    root = make_set(tmp_path, dict(train=6, val=2, test=2))
    faults = spoil(root)
    refusal(root=root)
    d = Source(root=root, cache="off", skip_bad=True)
    assert d.splits == {"train": names("train", 6)[4:], "val": names("val", 1), "test": names("test", 2)}
    assert d.left_out.keys() == faults.keys() and all(faults[name] in why for name, why in d.left_out.items())
    assert all(f"left out: {why}" in d.headline() for why in d.left_out.values())
    assert "--skip-bad" not in d.headline()  # which was typed
    d.count(None)
    shapes = [d.part(split, "sat")[i][0].shape for split, names in d.splits.items() for i in range(len(names))]
    assert shapes == [(3, 12, 16)] * 5
    write(tmp_path / "split.json", d.splits)  # what a run keeps, to be scored without the flag
    assert Source(root=root, cache="off", split_file=tmp_path / "split.json").splits == d.splits
    for i in (4, 5):
        (root / f"train/masks/{i}.png").unlink()
    assert "(--skip-bad leaves nothing of train)" in refusal(root=root, skip_bad=True)


def test_without_masks_only_images_can_be_bad(tmp_path):
    root = make_set(tmp_path, dict(train=6, val=2, test=2))
    spoil(root)
    assert "0.png: not a readable image" in refusal(root=root, need_masks=False)
    d = Source(root=root, cache="off", skip_bad=True, need_masks=False)
    assert "train/images/1" in d.splits["train"] and "train/images/0" not in d.splits["train"]


# ---- points instead of masks

def test_masks_may_be_missing_where_labels_are_points(tmp_path):
    root = make_set(tmp_path)
    (root / "train/masks/1.png").unlink()
    assert "no mask for it" in refusal(root=root)
    d = Source(root=root, cache="off", need_masks=False)
    assert d.pairs["train/images/1"] == (root / "train/images/1.png", None)
    assert d.pairs["train/images/0"][1] and len(d.splits["train"]) == 4


# ---- counting

def by_hand(files):
    counts = []
    for _, mask in files.values():
        values = np.asarray(Image.open(mask))
        counts.append([(values == v).sum() for v in (0, 4, 2, 9)])
    return np.array(counts)


def test_counts_are_the_pixels_of_the_training_masks(tmp_path):
    d = Source(root=make_set(tmp_path), cache="off")
    want = by_hand(d.files("train"))
    np.testing.assert_array_equal(d.count(None), want)
    np.testing.assert_array_equal(d.count(2), want[[0, 3]])
    np.testing.assert_array_equal(d.count_as_read("train"), want[:, :3])
    np.testing.assert_array_equal(d.count_as_read("val"), by_hand(d.files("val"))[:, :3])


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_bad_mask_of_any_split_is_said_before_the_first_step(tmp_path, split):
    d = Source(root=make_set(tmp_path), cache="off")
    picture(tmp_path / split / "masks/1.png", np.full((12, 16), 77, np.uint8))
    with pytest.raises(BadInput, match=f"{split}/masks/1.png: .*77") as e:
        d.count(None)
    assert "\n" not in str(e.value)


def test_training_masks_without_a_label_are_an_error(tmp_path):
    d = Source(root=make_set(tmp_path, ignore=[9]), cache="off")
    for i in range(4):
        picture(tmp_path / f"train/masks/{i}.png", np.full((12, 16), 9, np.uint8))
    with pytest.raises(BadInput, match='no labelled pixel in the training masks; correct "ignore"'):
        d.count(None)


def test_as_read_means_tile_by_tile_and_without_transparent_pixels(tmp_path):
    root = make_set(tmp_path, dict(train=1, val=1), tiles=8)
    clear = Image.open(root / "train/images/0.png").convert("RGBA")
    clear.putpixel((9, 3), (0, 0, 0, 0))  # column 9, row 3: in the second tile of 8 x 8
    clear.save(root / "train/images/0.png")
    d = Source(root=root, cache="off")
    mask = np.asarray(Image.open(root / "train/masks/0.png"))
    seen = np.ones((12, 16), bool)
    seen[3, 9] = False
    want = [[((mask == v) & seen)[:8, left:left + 8].sum() for v in (0, 4, 2)] for left in (0, 8)]
    np.testing.assert_array_equal(d.count_as_read("train"), want)


def test_rare_classes_have_less_than_half_an_equal_share():
    counts = np.array([[600, 40, 0, 10], [200, 85, 0, 65]])
    assert rare_classes(counts) == [3]  # of 1000: 800, 125, 0, 75; half a share is 125
    assert rare_classes(np.array([[1, 1, 1]])) == [] and rare_classes(np.zeros((2, 3), int)) == []


# ---- what a run keeps

def test_a_run_is_told_enough_to_open_the_data_again(tmp_path):
    d = Source(root=make_set(tmp_path, report={"2_without_road": ["road"]}, bands=[3, 2, 1]),
               cache="off")
    about = json.loads(json.dumps(d.about()))
    assert about == d.about()  # plain JSON
    assert about["classes"] == d.labels.classes and about["ignore"] == [9]
    assert about["root"] == str(tmp_path)
    assert (about["chosen_on"], about["reported"], about["source"]) == ("val", "test", "folder")
    assert about["report"] == {"2_without_road": ["road"]}
    assert about["reading"]["bands"] == [3, 2, 1]
    again = Source(about["source"], about["root"], about["variant"], need=(), cache="off")
    assert again.about()["splits"] == about["splits"] and len(set(about["splits"].values())) == 3


def test_other_names_give_another_digest(tmp_path):
    d = Source(root=make_set(tmp_path), cache="off")
    before = d.about()["splits"]
    d.splits["val"] = d.splits["val"][:1]
    after = d.about()["splits"]
    assert before["train"] == after["train"] and before["val"] != after["val"]
