"""Drafts of data.check for many layouts can be used as they are; what they rest on is said."""
import shlex
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import tifffile
from folder_sets import BLACK, GREEN, RED, described, put, rng, run, save, trainable  # noqa: F401: a fixture
from PIL import Image

from data.check.complaints import Complaints
from data.check.proposal import natural, propose_hold_out
from data.check.shares import print_shares
from data.check.values import Values, draft_classes
from data.common import write
from data.datasets import (
    check_command, class_counts, hold_out, load_splits, read_description, scenes_of, script_command)
from data.io import Labels

DUBAI = Path(__file__).parents[2] / "shared/data/dubai"


# ---- drafts: {image: mask or None} by layout, and what the draft must say

def tiles(i):
    return f"Tile {i // 2 + 1}/images/part_{i % 2}.jpg", f"Tile {i // 2 + 1}/masks/part_{i % 2}.png"


def loveda(i):
    part = ("Train", "Val", "Test")[i % 3] + "/" + ("Urban", "Rural")[i % 2]
    return f"{part}/images_png/{i}.png", None if i % 3 == 2 else f"{part}/masks_png/{i}.png"


LAYOUTS = {
    "tiles": (20, tiles, "*/images/*.jpg", "*/masks/*.png", {"train": 16, "val": 2, "test": 2}),
    "loveda": (12, loveda, ["Train/*/images_png/*.png", "Val/*/images_png/*.png"],
               ["Train/*/masks_png/*.png", "Val/*/masks_png/*.png"], {"train": 4, "val": 4}),
    "suffix": (4, lambda i: (f"output/x_{i}.jpg", f"output/x_{i}_m.png"), "output/*.jpg", "output/*_m.png",
               {"train": 4}),
    "same type": (4, lambda i: (f"{i}.png", f"{i}_mask.png"), "*.png", "*_mask.png", {"train": 4}),
    "two suffixes": (4, lambda i: (f"train/{i}_sat.jpg", f"train/{i}_seg.png"), "train/*_sat.jpg", "train/*_seg.png",
                     {"train": 4}),
    "prefixes": (4, lambda i: (f"src/img_{i}.png", f"gt/mask_{i}.png"), "src/img_*.png", "gt/mask_*.png", {"train": 4}),
    "voc": (4, lambda i: (f"JPEGImages/{i}.jpg", f"SegmentationClass/{i}.png"), "JPEGImages/*.jpg",
            "SegmentationClass/*.png", {"train": 4}),
    "in common": (4, lambda i: (f"segmentation/rgb/{i}.tif", f"segmentation/label/{i}.tif"), "segmentation/rgb/*.tif",
                  "segmentation/label/*.tif", {"train": 4}),
    "folders of splits": (6, lambda i: (f"{'train' if i < 4 else 'valid'}/{i}.tif",
                                        f"{'train' if i < 4 else 'valid'}_labels/{i}.tif"),
                          ["train/*.tif", "valid/*.tif"], ["train_labels/*.tif", "valid_labels/*.tif"],
                          {"train": 4, "val": 2}),
    "scene folders": (5, lambda i: (f"scene{i}/photo.png", f"scene{i}/label.png"), "*/photo.png", "*/label.png",
                      {"train": 3, "val": 1, "test": 1}),
    "subsets": (6, lambda i: (f"{'test_' if i > 3 else ''}img_subset/{i % 4}.png",
                              f"{'test_' if i > 3 else ''}gt_subset/{i % 4}.png"),
                ["img_subset/*.png", "test_img_subset/*.png"], ["gt_subset/*.png", "test_gt_subset/*.png"],
                {"train": 4, "test": 2}),
    "images beside a folder test": (
        6, lambda i: (f"{'test/' if i > 3 else ''}{i}.jpg", f"{'test/' if i > 3 else ''}{i}_mask.png"),
        ["*.jpg", "test/*.jpg"], ["*_mask.png", "test/*_mask.png"], {"train": 4, "test": 2}),
    "a folder test in one of images": (
        6, lambda i: (f"a/img/{'test/' if i > 3 else ''}{i}.png", f"a/gt/{'test/' if i > 3 else ''}{i}.png"),
        ["a/img/*.png", "a/img/test/*.png"], ["a/gt/*.png", "a/gt/test/*.png"], {"train": 4, "test": 2}),
    "all in test": (4, lambda i: (f"test/img/{i}.png", f"test/gt/{i}.png"), "test/img/*.png", "test/gt/*.png",
                    {"train": 4}),
    "mmseg": (6, lambda i: (f"img_dir/{'train' if i < 4 else 'val'}/{i}.png",
                            f"ann_dir/{'train' if i < 4 else 'val'}/{i}.png"),
              ["img_dir/train/*.png", "img_dir/val/*.png"], ["ann_dir/train/*.png", "ann_dir/val/*.png"],
              {"train": 4, "val": 2}),
    "file types": (4, lambda i: (f"rgb/{i}.{'JPG' if i % 2 else 'png'}", f"gt/{i}.png"), ["rgb/*.JPG", "rgb/*.png"],
                   ["gt/*.png", "gt/*.png"], {"train": 4}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_draft_pairs_every_image_and_passes_its_own_check(layout, tmp_path, rng, capsys):
    n, name, images, masks, sizes = LAYOUTS[layout]
    want = {}
    for i in range(n):
        image, mask = name(i)
        put(rng, tmp_path / image, mask and tmp_path / mask)
        if mask:
            want[tmp_path / image] = tmp_path / mask
    code, out = run(capsys, tmp_path)
    d, pairs, labels, splits = described(tmp_path)
    assert code == 0 and (d["images"], d["masks"]) == (images, masks)
    assert dict(pairs.values()) == want
    assert {s: len(names) for s, names in splits.items()} == sizes
    assert sorted(c["id"] for c in d["classes"]) == [0, 1, 2] and d["ignore"] == []
    assert ("no val split" in out) == ("val" not in sizes)
    assert (f"{n - len(want)} images are in no pair" in out) == (len(want) < n)
    code, out = run(capsys, tmp_path)
    assert code == 0 and out.endswith(f"\n{script_command('train_seg.py')} --dataset folder --root {tmp_path}\n")
    assert ("select" in d) == ("val" not in sizes) and trainable(tmp_path)


def test_tile_9_comes_before_tile_10():
    assert sorted(["Tile 10", "Tile 9", "Tile 9b", "1"], key=natural) == ["1", "Tile 9", "Tile 9b", "Tile 10"]


def test_infrared_images_and_second_masks_stay_out_of_the_draft(tmp_path, rng, capsys):
    for i in range(3):
        put(rng, tmp_path / f"2_Ortho_RGB/top_{i}_RGB.tif", tmp_path / f"5_Labels/top_{i}_label.tif")
        put(rng, tmp_path / f"3_Ortho_IRRG/top_{i}_IRRG.tif", tmp_path / f"5_Labels_2/top_{i}_label_noBoundary.tif")
    code, out = run(capsys, tmp_path)
    d = read_description(tmp_path)
    assert (d["images"], d["masks"]) == ("2_Ortho_RGB/*_RGB.tif", "5_Labels/*_label.tif") and code == 0
    assert "3 images are in no pair" in out and "3 masks are in no pair" in out


def test_one_of_several_folders_of_masks_is_chosen(tmp_path, rng, capsys):
    for tile in "ab":
        for i in range(2):
            put(rng, tmp_path / f"{tile}/rgb/{i}.png", tmp_path / f"{tile}/masks_fine/{i}.png", (0, 1, 2))
            put(rng, tmp_path / f"{tile}/rgb/{i}.png", tmp_path / f"{tile}/masks_binary/{i}.png", (0, 5))
            put(rng, tmp_path / f"{tile}/rgb/{i}.png", tmp_path / f"{tile}/y/{i}.png", (7, 8))
    for chosen, ids in (("masks_fine", [0, 1, 2]), ("masks_binary", [0, 5]), ("masks_binary/", [0, 5]), ("y", [7, 8])):
        assert run(capsys, tmp_path, "--force", "--masks", chosen)[0] == 0
        d, pairs, _, _ = described(tmp_path)
        assert [c["id"] for c in d["classes"]] == ids and d["masks"] == f"*/{chosen.strip('/')}/*.png"
        assert sorted(pairs) == ["a/rgb/0", "a/rgb/1", "b/rgb/0", "b/rgb/1"] and run(capsys, tmp_path)[0] == 0
    for chosen in ("a/masks_fine", tmp_path / "a/masks_fine"):  # as a path, below root or as typed
        assert run(capsys, tmp_path, "--force", "--masks", chosen)[0] == 0
        assert described(tmp_path)[0]["masks"] == "a/masks_fine/*.png" and len(described(tmp_path)[1]) == 2
    code, out = run(capsys, tmp_path, "--masks", "y")
    assert code == 2 and "dataset.json is there; type --force" in out
    code, out = run(capsys, tmp_path, "--force", "--masks", "masks")
    assert code == 2 and "no picture in a folder 'masks'; there are a/masks_binary, a/masks_fine, a/rgb, a/y, " in out
    (tmp_path / "dataset.json").unlink()
    assert "4 masks are in no pair" in (out := run(capsys, tmp_path)[1]) and "--masks FOLDER chooses others" in out
    for folder in ("masks_fine", "masks_binary"):
        for tile in "ab":
            shutil.rmtree(tmp_path / tile / folder)
    code, out = run(capsys, tmp_path, "--force")
    assert code == 2 and "name the folder of the masks: --masks FOLDER" in out


@pytest.mark.parametrize("ids, said, unsaid", [
    ((0, 1, 2, 3, 4, 5, 6), "it converts potsdam to 1 impervious, 2 building, 3 low vegetation, 4 tree, 5 car, "
     "6 clutter", "loveda"),
    ((0, 1, 7, 255), "it converts loveda to 1 background, 2 building, 3 road, 4 water, 5 barren, 6 forest, 7 agri",
     "isaid"),
    ((0, 15), "it converts isaid to 0 background, 1 ship", "potsdam"),
    ((0, 3), "reduce_zero_label=True", "it converts")])
def test_ids_of_sets_converted_by_mmsegmentation_are_explained(ids, said, unsaid, tmp_path, rng, capsys):
    for i in range(4):
        split = "train" if i < 3 else "val"
        put(rng, tmp_path / f"img_dir/{split}/{i}.png", tmp_path / f"ann_dir/{split}/{i}.png", ids)
    code, out = run(capsys, tmp_path)
    assert code == 0 and said in out and unsaid not in out
    code, out = run(capsys, tmp_path, "--dataset", "potsdam")
    assert code == 2 and "as mmsegmentation converts potsdam; expected the official download, or describe this" in out


def test_the_draft_takes_official_lists_for_splits(tmp_path, rng, capsys):
    for i in range(6):
        put(rng, tmp_path / f"JPEGImages/{i:03d}_a.jpg", tmp_path / f"SegmentationClass/{i:03d}_a.png")
    write(tmp_path / "ImageSets/trn.txt", "000_a\n001_a\n002_a\n")
    write(tmp_path / "ImageSets/val.txt", "003_a.jpg\n004_a.jpg\n")
    run(capsys, tmp_path)
    d, _, _, splits = described(tmp_path)
    assert d["splits"] == {"train": ["ImageSets/trn.txt"], "val": ["ImageSets/val.txt"]}
    assert [len(n) for n in splits.values()] == [3, 2]
    assert "in no split: 1 image, first JPEGImages/005_a" in run(capsys, tmp_path)[1]
    write(tmp_path / "ImageSets/val.txt", "elsewhere\n")
    code, out = run(capsys, tmp_path, "--force")
    assert "not used for the splits" in out and "'elsewhere' is no image here" in out
    assert read_description(tmp_path)["splits"] == {"train": "*"}


def test_folders_without_one_to_learn_from_are_an_error_at_once(tmp_path, rng, capsys):
    for i in range(4):
        split = ("val", "test")[i % 2]
        put(rng, tmp_path / f"{split}/img/{i}.png", tmp_path / f"{split}/gt/{i}.png")
    for _ in range(2):
        code, out = run(capsys, tmp_path)
        assert code == 2 and 'no train split, only val, test; name the images to learn from under "train"' in out


def test_a_draft_is_never_overwritten_without_force(tmp_path, rng, capsys):
    put(rng, tmp_path / "images/a.png", tmp_path / "masks/a.png")
    run(capsys, tmp_path)
    first = (tmp_path / "dataset.json").read_text()
    put(rng, tmp_path / "images/b.png", tmp_path / "masks/b.png", (0, 7))
    code, out = run(capsys, tmp_path)
    assert code == 2 and "unknown ids 7 on 96 of 192 pixels" in out and (tmp_path / "dataset.json").read_text() == first
    assert run(capsys, tmp_path, "--force")[0] == 0 and (tmp_path / "dataset.json").read_text() != first


def test_one_class_and_one_split_a_line(tmp_path, rng, capsys):
    put(rng, tmp_path / "img/ä.png", tmp_path / "gt/ä.png", (0, 1), palette=[RED, GREEN])
    run(capsys, tmp_path)
    text = (tmp_path / "dataset.json").read_text()
    assert '\n  {"name": "id_1", "id": 1, "color": "#00FF00"}\n ],\n' in text and '\n  "train": "*"\n }\n}\n' in text


def test_bands_and_range_of_the_flags_stay_in_the_draft(tmp_path, rng, capsys):
    for i in range(3):
        put(rng, tmp_path / f"img/{i}.png", tmp_path / f"gt/{i}.png")
    run(capsys, tmp_path, "--bands", "3,1,2", "--input-range", 0, 100)
    d = read_description(tmp_path)
    assert (d["bands"], d["input_range"]) == ([3, 1, 2], [0, 100]) and run(capsys, tmp_path)[0] == 0
    assert '\n "bands": [3, 1, 2],\n' in (tmp_path / "dataset.json").read_text()


def test_brackets_in_the_names_of_folders_and_images_beside_folders(tmp_path, rng, capsys):
    for i in range(8):
        put(rng, tmp_path / f"Tile [{i // 2}]/photo_{i}.png", tmp_path / f"Tile [{i // 2}]/mask_{i}.png")
    assert run(capsys, tmp_path)[0] == 0 and run(capsys, tmp_path)[0] == 0
    assert trainable(tmp_path) and described(tmp_path)[3]["val"] == ["Tile [2]/photo_4", "Tile [2]/photo_5"]
    for place in ("a", "b", "c", "c/d"):
        put(rng, tmp_path / "other/img" / place / "1.png", tmp_path / "other/gt" / place / "1.png")
    run(capsys, tmp_path / "other")
    assert run(capsys, tmp_path / "other")[0] == 0 and trainable(tmp_path / "other")


ODD = ["a[1]", "[a]", "a*b", "w?", "[!x]", "[[]", "a]b[", "{0}", "%s%d", "^$+.(x)|", "a\\b", "~", "#1", "'q'", "!",
       "a b"]


@pytest.mark.parametrize("layout, alone", [
    ("{0}/img/{1}.png|{0}/gt/{1}.png", False), ("{0}/img/{1}.png|{0}/gt/{1}.png", True),
    ("img {0}/{1}.png|gt {0}/{1}.png", True), ("{1}{0}.png|{1}{0}_mask.png", True),
    ("{0}/img/a{1}_[img].png|{0}/gt/a{1}_[mask].png", True), ("{0} (img)/{1}.png|{0} (gt)/{1}.png", True)])
def test_any_name_of_a_folder_or_a_file_may_stand_in_a_draft(layout, alone, tmp_path, rng, capsys):
    roots = [tmp_path / str(i) for i in range(len(ODD))] if alone else [tmp_path] * len(ODD)
    want = {}
    for root, odd in zip(roots, ODD):
        for i in range(2):
            image, mask = (root / name.replace("{0}", odd).replace("{1}", str(i)) for name in layout.split("|"))
            put(rng, image, mask)
            want.setdefault(root, {})[image] = mask
    for root, pairs in want.items():
        assert run(capsys, root)[0] == 0
        code, out = run(capsys, root)
        assert code == 0 and f"\n{len(pairs)} images, " in out
        assert dict(described(root)[1].values()) == pairs and sum(map(len, described(root)[3].values())) == len(pairs)


def test_a_name_taken_for_a_pattern_is_explained(tmp_path, rng, capsys):
    for i in range(4):
        put(rng, tmp_path / f"img[1]/{i}.png", tmp_path / f"gt/{i}.png")
    run(capsys, tmp_path)
    d = read_description(tmp_path)
    assert d["images"] == "img[[]1]/*.png"
    write(tmp_path / "dataset.json", d | {"splits": {"train": ["img[1]/0", "img[1]/1"], "val": ["img[1]/[23]"]}})
    code, out = run(capsys, tmp_path)
    assert code == 2 and "nothing matches 'img[1]/[23]'; names look like 'img[1]/0'; for a [ in a name write [[]" in out
    assert "'img[1]/0';" not in out.replace("names look like 'img[1]/0';", "")  # a name in full is that name
    write(tmp_path / "dataset.json", d | {"splits": {"train": ["img[1]/0", "img[1]/1"], "val": ["img[[]1]/[23]"]}})
    assert run(capsys, tmp_path)[0] == 0
    write(tmp_path / "dataset.json", d | {"images": "img[1]/*.png"})
    assert "for a [ in a name write [[]" in run(capsys, tmp_path)[1]


# ---- drafts: what is held out where no split is called val

NAMES = {
    "folders": ([f"train/{city}/{i}" for city in ("Aa", "Bb", "Cc") for i in range(4)], "train/Bb/2", "train/Bb"),
    "two numbers": ([f"img/s{a}_x{x}_y{y}" for a in range(4) for x in (0, 64) for y in (0, 64)], "img/s2_x0_y64",
                    "img/s2"),
    "one number": ([f"img/area{a}-{i:03d}" for a in "abc" for i in range(5)], "img/areab-003", "img/areab"),
    "numbers alone": ([f"img/{i}" for i in range(12)], None, None),
    "no numbers": (["img/" + "abcdefgh"[i:] for i in range(8)], None, None),
    "every name its own scene": ([f"img/{c}_1" for c in "abcdef"], None, None),
    "two scenes": ([f"img/{c}_{i}" for c in "ab" for i in range(6)], None, None),
    "nearly all in one scene": ([f"img/a_{i}" for i in range(20)] + ["img/b_1", "img/c_1"], None, None)}


@pytest.mark.parametrize("kind", NAMES)
def test_whole_scenes_are_held_out_where_names_say_them(kind):
    (names, name, scene), complaints = NAMES[kind], Complaints()
    more = propose_hold_out(names, complaints)
    assert more["select"] == 0.2 and ("scene" in more) == (scene is not None)
    if scene:
        scenes = scenes_of(names, more["scene"])
        assert scenes[name] == scene and 3 <= len(set(scenes.values())) < len(names)
    else:
        assert "neighbours may stand on both sides" in complaints.lines["warning", "val"][0]
    for seed in range(20):
        rest, held = hold_out(names, more["select"], more.get("scene"), seed)
        assert rest and held and sorted(rest + held) == sorted(names)


def test_one_image_cannot_be_held_out():
    complaints = Complaints()
    assert propose_hold_out(["a"], complaints) == {}
    assert "one training image, of which nothing can be held out" in complaints.lines["warning", "val"][0]
    assert "--final" in complaints.lines["warning", "val"][0]


# ---- drafts: what the masks hold

def draft_of(tmp_path, rng, capsys, *masks, size=(12, 16)):
    for i, (values, palette) in enumerate(masks):
        put(rng, tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png", values, size, palette)
    code, out = run(capsys, tmp_path)
    return read_description(tmp_path), out


def test_palette_masks_are_ids_with_the_colours_of_the_palette(tmp_path, rng, capsys):
    d, out = draft_of(tmp_path, rng, capsys, ((0, 1, 1), [RED, GREEN]), ((1,), [RED, GREEN]))
    assert d["classes"] == [{"name": "id_0", "id": 0, "color": "#FF0000"},
                            {"name": "id_1", "id": 1, "color": "#00FF00"}]  # the ids rise, whatever their shares
    assert "2 masks read: 2 palette" in out and "       1  83.3333%      2  masks/0.png" in out


@pytest.mark.parametrize("second", [((1, 0, 0), [GREEN, RED]), ((RED, RED, GREEN), None)], ids=["numbered anew", "RGB"])
def test_palettes_that_differ_and_palettes_beside_rgb_are_colours(second, tmp_path, rng, capsys):
    d, out = draft_of(tmp_path, rng, capsys, ((0, 0, 1), [RED, GREEN]), second)
    assert {c["color"] for c in d["classes"]} == {"#FF0000", "#00FF00"} and not any("id" in c for c in d["classes"])
    d, pairs, labels, _ = described(tmp_path)
    counts = dict(zip(labels.names, class_counts(pairs, labels).sum(0)))
    masks = np.stack([Image.open(tmp_path / f"masks/{i}.png").convert("RGB") for i in range(2)])
    assert {c["color"]: counts[c["name"]] for c in d["classes"]} == {"#FF0000": (masks == RED).all(3).sum(),
                                                                     "#00FF00": (masks == GREEN).all(3).sum()}


def test_binary_masks_have_two_classes(tmp_path, rng, capsys):
    d, out = draft_of(tmp_path, rng, capsys, ((0, 0, 255), None), ((BLACK, (255, 255, 255)), None))
    assert d["classes"] == [{"name": "id_0", "id": 0}, {"name": "id_255", "id": 255}] and d["ignore"] == []
    assert "1 grey, 1 grey RGB" in out and "ids 0 and 255: binary masks" in out


def geotiff(path, a, nodata=None, **more):
    """(H, W) or (H, W, n) by GDAL."""
    a = a.reshape(*a.shape[:2], -1)
    path.parent.mkdir(parents=True, exist_ok=True)
    h, w, n = a.shape
    with rasterio.open(path, "w", "GTiff", w, h, n, dtype=a.dtype, nodata=nodata, **more) as f:
        f.write(np.moveaxis(a, -1, 0))


@pytest.mark.parametrize("dtype, nodata, ignore", [
    ("uint8", 0, [0]), ("int16", -9999, [-9999]), ("uint16", 65535, [65535]), ("float32", -9999, [-9999]),
    ("uint8", 77, [77]), ("float32", np.nan, []), ("float32", -3.4e38, [])])
def test_the_nodata_tag_of_masks_is_proposed_as_ignore(dtype, nodata, ignore, tmp_path, rng, capsys):
    ids = rng.permutation(np.arange(192) % 4).reshape(12, 16)
    tag_occurs = dtype != "uint8" or nodata == 0
    a = ids.astype(dtype)
    if tag_occurs:
        a[ids == 0] = nodata
    for i in range(2):
        put(rng, tmp_path / f"images/{i}.png")
        geotiff(tmp_path / f"masks/{i}.tif", a, nodata)
    code, out = run(capsys, tmp_path)
    d, pairs, labels, _ = described(tmp_path)
    assert code == 0 and d["ignore"] == ignore
    assert [c["id"] for c in d["classes"]] == ([1, 2, 3] if tag_occurs else [0, 1, 2, 3])
    assert (f"value {nodata} is nodata by a tag of the masks" in out) == bool(ignore)
    want = np.where(ids > 0, ids - 1, 255) if tag_occurs else ids
    for _, mask in pairs.values():
        np.testing.assert_array_equal(labels.load(mask), want)
    assert run(capsys, tmp_path)[0] == 0


def test_a_tag_that_no_byte_can_be_is_none(tmp_path, rng, capsys):
    put(rng, tmp_path / "images/a.png")
    (tmp_path / "masks").mkdir()
    tifffile.imwrite(tmp_path / "masks/a.tif", np.arange(192, dtype=np.uint8).reshape(12, 16) % 3,
                     extratags=[(42113, "s", 0, "-9999", True)])
    run(capsys, tmp_path)
    assert read_description(tmp_path)["ignore"] == []


def test_a_tag_that_leaves_one_class_stays_a_class_and_colours_have_tags_too(tmp_path, rng, capsys):
    put(rng, tmp_path / "images/a.png")
    geotiff(tmp_path / "masks/a.tif", np.arange(192).reshape(12, 16).astype(np.uint8) % 2 * 255, 0)
    out = run(capsys, tmp_path)[1]
    d = read_description(tmp_path)
    assert [c["id"] for c in d["classes"]] == [0, 255] and d["ignore"] == [] and "less than two classes are left" in out
    index = np.arange(192).reshape(12, 16) % 3
    geotiff(tmp_path / "masks/a.tif", np.uint8([BLACK, RED, GREEN])[index], 0)
    out = run(capsys, tmp_path, "--force")[1]
    d = read_description(tmp_path)
    assert {c["color"] for c in d["classes"]} == {"#FF0000", "#00FF00"} and d["ignore"] == ["#000000"]


def test_transparent_pixels_of_masks_are_no_class(tmp_path, rng, capsys):
    put(rng, tmp_path / "images/a.png")
    grey = np.arange(192).reshape(12, 16).astype(np.uint8) % 3
    path = tmp_path / "masks/a.png"
    path.parent.mkdir()
    Image.fromarray(np.dstack([grey, 255 * (grey < 2).astype(np.uint8)]), "LA").save(path)
    run(capsys, tmp_path)
    assert [c["id"] for c in read_description(tmp_path)["classes"]] == [0, 1]


def soft_masks(size=64, edge=6.0):
    """Half planes whose edges fade from white to black over some pixels."""
    y, x = np.mgrid[:size, :size]
    for angle in (0.3, 1.2, 2.4):
        distance = (x - size / 2) * np.cos(angle) + (y - size / 2) * np.sin(angle)
        yield (255 / (1 + np.exp(-8 * distance / edge))).round().astype(np.uint8)


def test_soft_masks_get_a_threshold_and_binary_ones_none(tmp_path, rng, capsys):
    wide = list(soft_masks())
    for i, a in enumerate(wide):
        put(rng, tmp_path / f"images/{i}.png", size=a.shape)
        save(tmp_path / f"masks/{i}.png", a)
    assert len(np.unique(wide)) > 90
    code, out = run(capsys, tmp_path)
    d, pairs, labels, _ = described(tmp_path)
    assert code == 0 and (d["threshold"], d["ignore"]) == (127, [])
    assert d["classes"] == [{"name": "id_0", "id": 0}, {"name": "id_1", "id": 1}]
    grey = np.stack(wide)
    share = ((grey < 16) | (grey > 239)).mean()
    assert f"{len(np.unique(grey))} greys, of which those below 16 and above 239 cover {share:.1%}" in out
    assert class_counts(pairs, labels).tolist() == [[(a <= 127).sum(), (a > 127).sum(), 0] for a in wide]
    code, out = run(capsys, tmp_path)
    assert code == 0 and f"{(grey <= 127).mean():.2%}"[:4] in out
    for i, a in enumerate(wide):
        save(tmp_path / f"masks/{i}.png", a // 128 * 255)
    run(capsys, tmp_path, "--force")
    d = read_description(tmp_path)
    assert "threshold" not in d and [c["id"] for c in d["classes"]] == [0, 255]


@pytest.mark.parametrize("values", [
    [*range(21), 255], [0, 64, 128, 191, 255], [*range(0, 200, 5), 255], [0] * 900 + [255] * 900 + [*range(20)]],
    ids=["voc", "steps", "many ids", "ids that are rare"])
def test_ids_are_no_soft_masks(values, tmp_path, rng, capsys):
    d, _ = draft_of(tmp_path, rng, capsys, (values, None), size=(60, 60))
    assert "threshold" not in d and [c["id"] for c in d["classes"]] == sorted(set(values))


# ---- drafts: how the images are read

def test_images_of_several_kinds_have_no_one_range(tmp_path, rng, capsys):
    """Bytes beside 16 bits: the draft says which are which; made alike, as it says, they are drafted."""
    for i in range(6):
        put(rng, tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png")
        pixels = np.asarray(Image.open(tmp_path / f"images/{i}.png"))
        deep = pixels.astype(np.uint16) * 8 if i % 2 else pixels
        tifffile.imwrite(tmp_path / f"images/{i}.tif", deep, photometric="rgb")
        (tmp_path / f"images/{i}.png").unlink()
    code, out = run(capsys, tmp_path)
    assert code == 2 and f"3 of 8 bits, first {tmp_path}/images/0.tif, 3 of whole numbers of more bits" in out
    assert f"gdal_translate -ot Byte -scale LOW HIGH 0 255 {tmp_path}/images/1.tif NEW.tif" in out
    assert out.endswith(f"data.check {tmp_path} --force\n")
    assert "input_range" not in (tmp_path / "dataset.json").read_text()
    for i in (1, 3, 5):
        with rasterio.open(tmp_path / f"images/{i}.tif") as file:
            pixels = file.read() // 8
        tifffile.imwrite(tmp_path / f"images/{i}.tif", pixels.astype(np.uint8).transpose(1, 2, 0), photometric="rgb")
    assert run(capsys, tmp_path, "--force")[0] == run(capsys, tmp_path)[0] == 0


def test_a_grey_image_among_those_of_four_bands_gets_copies_of_its_band(tmp_path, rng, capsys):
    for i in range(4):
        put(rng, tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png")
        (tmp_path / f"images/{i}.png").unlink()
        shape = (12, 16) if i == 2 else (12, 16, 4)
        tifffile.imwrite(tmp_path / f"images/{i}.tif", rng.integers(0, 256, shape, np.uint8),
                         photometric="minisblack" if i == 2 else "rgb", planarconfig=None if i == 2 else "contig")
    code, out = run(capsys, tmp_path, "--bands", "4,1,2")
    assert code == 2 and "1 bands, and number 4 of the others is read (1 such images)" in out
    *_, source, new = command = shlex.split(out.split("in each band: ")[1].split("\n")[0])
    with rasterio.open(source) as file:
        pixels = file.read([int(n) for flag, n in zip(command, command[1:]) if flag == "-b"])
    tifffile.imwrite(tmp_path / new, pixels, photometric="minisblack", planarconfig="separate")
    (tmp_path / new).rename(source)
    assert run(capsys, tmp_path, "--bands", "4,1,2", "--force")[0] == run(capsys, tmp_path)[0] == 0


def test_an_image_that_cannot_be_read_is_said_by_the_draft(tmp_path, rng, capsys):
    for i in range(4):
        put(rng, tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png")
    tifffile.imwrite(tmp_path / "images/3.tif", np.ones((12, 16, 3), np.uint8), compression="lerc", photometric="rgb")
    (tmp_path / "images/3.png").unlink()
    code, out = run(capsys, tmp_path)
    assert code == 2 and "error: " in out and "images/3.tif: uint8, 3 bands, compression 34887 (LERC)" in out


def test_images_of_16_bits_get_percentiles_of_train_as_numbers(tmp_path, rng, capsys):
    pixels = []
    for i in range(10):
        a = rng.integers(1, 3000 + 100 * i, (12, 16, 3)).astype(np.uint16)
        a[:2] = 0
        geotiff(tmp_path / f"images/{i}.tif", a, nodata=0)
        put(rng, tmp_path / f"images/{i}_.png", tmp_path / f"masks/{i}.png")
        (tmp_path / f"images/{i}_.png").unlink()
        pixels.append(a[2:].reshape(-1, 3))
    code, out = run(capsys, tmp_path)
    d, pairs, _, _ = described(tmp_path)
    train = load_splits(tmp_path, d, pairs)["train"]  # a fifth is held out
    assert code == 0 and len(train) == 8
    chosen = np.concatenate([pixels[int(name[-1])] for name in train])
    np.testing.assert_allclose(d["input_range"], np.percentile(chosen, (2, 98), axis=0).T)
    assert "note: 10 images are uint16: input range p2-98 of 8 training images: band 1" in out
    assert run(capsys, tmp_path)[0] == 0
    run(capsys, tmp_path, "--force", "--input-range", "p0-50")
    d = read_description(tmp_path)
    np.testing.assert_allclose(d["input_range"], np.percentile(chosen, (0, 50), axis=0).T)
    write(tmp_path / "dataset.json", d | {"input_range": "p0-50"})
    code, out = run(capsys, tmp_path)
    assert code == 0 and not out.splitlines()[-1].count("--input-range")
    code, out = run(capsys, "--input-range", "p1-99", tmp_path)  # the folder may stand behind
    assert code == 0 and out.endswith(f"--root {tmp_path} --val-frac 0.2 --input-range p1-99\n") or "select" in d


def test_bands_are_drafted_where_the_header_names_the_colours(tmp_path, rng, capsys):
    for i in range(2):
        put(rng, tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png")
        (tmp_path / f"images/{i}.png").unlink()

    def images(dtype="uint8", bands=4, high=250, **more):
        for i in range(2):
            geotiff(tmp_path / f"images/{i}.tif", rng.integers(1, high, (12, 16, bands)).astype(dtype), **more)
        code, out = run(capsys, tmp_path, "--force")
        return code, out, read_description(tmp_path)

    for photometric in ({}, {"photometric": "RGB"}):  # infrared as alpha, which GDAL writes by default; and without
        code, out, d = images(**photometric)
        assert code == 0 and d["bands"] == [1, 2, 3] and "first are red, green and blue by its header" in out
        assert ("band 4 is called alpha, but is no mask of transparent and opaque" in out) == (not photometric)
        assert run(capsys, tmp_path)[0] == 0
    for bands, numbers in ((4, "1,2,3"), (2, "1,2,2"), (6, "1,2,3")):
        code, out, d = images("uint16", bands, 4000, photometric="MINISBLACK")
        assert code == 2 and "bands" not in d and "input_range" not in d
        assert f"{bands} bands (BlackIsZero), and the file does not say which are red" in out
        assert out.endswith(f"then type: {check_command(tmp_path)} --force --bands {numbers}\n")
        code, out = run(capsys, *out.split()[-4:])
        d = read_description(tmp_path)
        assert code == 0 and d["bands"] == [int(n) for n in numbers.split(",")] and len(d["input_range"]) == 3
        assert run(capsys, tmp_path)[0] == 0

    # An alpha that is a mask is no band; nor is one asked for where bytes are three.
    for i in range(2):
        a = rng.integers(0, 255, (12, 16, 4)).astype(np.uint8)
        a[..., 3] = a[..., 3] // 128 * 255
        geotiff(tmp_path / f"images/{i}.tif", a)
    code, out = run(capsys, tmp_path, "--force")
    assert code == 0 and not {"bands", "input_range"} & read_description(tmp_path).keys()


def test_likely_void_stays_a_class_and_is_named(tmp_path, rng, capsys):
    d, out = draft_of(tmp_path, rng, capsys, ((1, 2, 255), None))
    assert len(d["classes"]) == 3 and "value 255 is a class in the draft; if it means unlabelled" in out
    shutil.rmtree(tmp_path / "masks")
    (tmp_path / "dataset.json").unlink()
    d, out = draft_of(tmp_path, rng, capsys, ((RED, GREEN, BLACK), None))
    assert len(d["classes"]) == 3 and 'value #000000 is a class in the draft; if it means unlabelled' in out


@pytest.mark.parametrize("pixels, named", [
    ({1: 9, 2: 9, 65535: 2}, [65535]), ({1: 9, 0: 9, -9999: 2, -1: 1}, [0, -9999, -1]),
    ({7: 5, 2**32 - 1: 3}, [2**32 - 1]),
    ({1: 9, 254: 9}, []), ({0: 60, 255: 40, 30: 5, 90: 5, 200: 5}, [0, 255, "soft edges"])])
def test_what_may_be_no_class_is_named(pixels, named, capsys):
    complaints = Complaints()
    values = Values(Counter(pixels), {v: [Path("a.tif")] for v in pixels}, {}, 1, Counter(grey=1), [])
    drafted = draft_classes(values, complaints)
    assert [c["id"] for c in drafted["classes"]] == sorted(pixels) and drafted["ignore"] == []
    complaints.show(1, "", "")
    out = capsys.readouterr().out
    said = [v for v in pixels if f"value {v} is a class in the draft; if it" in out]
    assert said == [v for v in named if v in pixels]
    assert ("soft edges" in out) == ("soft edges" in named)


def test_a_table_of_no_pixel_names_no_class(capsys):
    print_shares({"train": np.array([0, 0, 5]), "val": np.array([3, 1, 0])}, {"train": 1, "val": 1},
                 Labels([{"name": "land", "id": 0}, {"name": "road", "id": 1}]))
    *_, major, accuracy, miou = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in (major, accuracy, miou)] == [["-", "land"], ["-", "0.7500"], ["-", "0.3750"]]


def test_stray_colours_are_ignored_loudly_but_blurred_masks_refused(tmp_path, rng, capsys):
    d, out = draft_of(tmp_path, rng, capsys, ((RED, GREEN), None), size=(120, 160))
    mask = np.asarray(Image.open(tmp_path / "masks/0.png")).copy()
    mask[0, 0] = 1, 2, 3
    save(tmp_path / "masks/0.png", mask)
    code, out = run(capsys, tmp_path, "--force")
    assert "the draft IGNORES #010203" in out and described(tmp_path)[0]["ignore"] == ["#010203"] and code == 0
    mask[0, :90, 2] = range(90)
    save(tmp_path / "masks/0.png", mask)
    code, out = run(capsys, tmp_path, "--force")
    assert code == 2 and "blurred" in out and "without anti-aliasing" in out


def test_a_wrong_classes_json_is_compared_not_believed(tmp_path, rng, capsys):
    write(tmp_path / "classes.json", [{"title": "a", "color": "#ff0000"}, {"title": "b", "color": "#123456"}])
    d, out = draft_of(tmp_path, rng, capsys, ((RED, GREEN), None))
    assert "classes.json lists 2 colours, 1 of them are in the masks" in out
    assert {c["color"] for c in d["classes"]} == {"#FF0000", "#00FF00"}


def test_one_letter_may_be_spelt_in_two_ways(tmp_path, rng, capsys):
    """macOS writes a letter with a mark as two code points; for a reader the names are equal."""
    for i in range(4):
        put(rng, tmp_path / f"Fl\u00e4che/images/B\u00e4ume {i}.png",
            tmp_path / f"Fla\u0308che/masks/Ba\u0308ume {i}.png")
    code, out = run(capsys, tmp_path)
    assert code == 0 and "4 masks read" in out and "in no pair" not in out
    assert run(capsys, tmp_path)[0] == 0


def test_pictures_of_gis_programs_are_told_how_to_be_read(tmp_path, rng, capsys):
    """Sentinel-2 comes as JPEG 2000: the line names the files, and its command makes images of them."""
    for i in range(3):
        put(rng, tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png")
        with Image.open(tmp_path / f"images/{i}.png") as image:
            image.save(tmp_path / f"images/{i}.jp2", irreversible=False)
        (tmp_path / f"images/{i}.png").unlink()
    code, out = run(capsys, tmp_path)
    assert code == 2 and "first masks/0.png" in out and "3 .jp2" in out
    command = shlex.split(out.split("converted with ")[1])
    assert command[:3] == ["gdal_translate", "-co", "COMPRESS=DEFLATE"]
    for i in range(3):
        rasterio.shutil.copy(command[-2].replace("0.jp2", f"{i}.jp2"), command[-1].replace("0.tif", f"{i}.tif"))
    # Files that GDAL keeps beside an image are a part of it.
    (tmp_path / "images/0.tif.aux.xml").write_text("<PAMDataset/>")
    code, out = run(capsys, tmp_path)
    assert code == 0 and "images/*.tif" in out and "aux" not in out


def test_what_cannot_be_drafted(tmp_path, rng, capsys):
    assert run(capsys, tmp_path) == (2, f"error: {tmp_path}: no .png .jpg .jpeg .tif .tiff .bmp .webp file in it; type "
                                        "the folder that holds the images and masks\n")
    for i in range(2):
        put(rng, tmp_path / f"images/{i}.png")
    code, out = run(capsys, tmp_path)
    assert code == 2 and "no folder or file name says mask" in out
    for i in range(2):
        put(rng, tmp_path / f"masks/{i}.jpg")
    code, out = run(capsys, tmp_path)
    assert code == 2 and "compressed as JPEG" in out and "(all 2 masks fail)" in out
    for i in range(2):
        (tmp_path / f"masks/{i}.jpg").rename(tmp_path / f"masks/z{i}.jpg")
    code, out = run(capsys, tmp_path)
    assert code == 2 and "no rule by which" in out
    assert not (tmp_path / "dataset.json").exists()


def test_a_draft_with_a_fault_says_so(tmp_path, rng, capsys):
    for i in range(3):
        put(rng, tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png", (RED, GREEN))
    put(rng, tmp_path / "images/3.png")
    put(rng, tmp_path / "images/4.png", tmp_path / "masks/4.png", (0, 1))
    put(rng, tmp_path / "images/5.png")
    write(tmp_path / "masks/5.png", b"not an image")
    code, out = run(capsys, tmp_path)
    assert code == 2 and "masks/5.png: not a readable image" in out
    assert "masks/4.png: one band of ids [0, 1] among masks of colours" in out
    assert "images/3.png: no mask for it by 'masks/*.png' (1 of 6 images without)" in out


# ---- the real thing

@pytest.mark.skipif(not DUBAI.exists(), reason="the Dubai set is not here")
def test_dubai_draft_finds_the_true_colours(tmp_path, capsys):
    shutil.copy(DUBAI / "classes.json", tmp_path)
    for tile in 1, 2, 3:  # Tile 2 has palette masks; part 6 of Tile 3 has #000000
        for part in 1, 6:
            for file in f"Tile {tile}/images/image_part_00{part}.jpg", f"Tile {tile}/masks/image_part_00{part}.png":
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(DUBAI / file, tmp_path / file)
    code, out = run(capsys, tmp_path)
    d, pairs, labels, splits = described(tmp_path)
    assert code == 0 and "4 RGB, 2 palette" in out and "classes.json lists 6 colours" in out
    assert {"#3C1098", "#8429F6", "#6EC1E4", "#FEDD3A", "#E2A929"} <= {c["color"] for c in d["classes"]}
    assert "#000000" in {c["color"] for c in d["classes"]} | set(d["ignore"]) and "#000000" in out
    assert {s: len(n) for s, n in splits.items()} == {"train": 2, "val": 2, "test": 2}
    assert run(capsys, tmp_path)[0] == 0
