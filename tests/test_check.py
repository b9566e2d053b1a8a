"""python -m data.check: drafts of many layouts can be used as they are; each complaint has its line and exit code."""
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin, TiffTags

from data import check, draft
from data.datasets import (
    class_counts, find_pairs, match_pairs, read_description, split_names, star_key)
from data.common import BadInput, write
from data.io import Labels

DUBAI = Path(__file__).parents[2] / "shared/data/dubai"
RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)
PLAIN = {"images": "images/*.png", "masks": "masks/*.png", "ignore": [255],
         "splits": {"train": "*/[0-3]", "val": "*/[45]"},
         "classes": [{"name": "land", "id": 0}, {"name": "road", "id": 1}, {"name": "water", "id": 2}]}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def save(path, pixels, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    if palette:
        image.putpalette(np.array(palette, np.uint8).tobytes())
    image.save(path)


def put(rng, image, mask=None, values=(0, 1, 2), size=(12, 16), palette=None):
    """A random image and a mask of the given ids or colours, each of which occurs."""
    save(image, rng.integers(0, 256, (*size, 3)))
    if mask is not None:
        index = rng.permutation(np.arange(size[0] * size[1]) % len(values)).reshape(size)
        save(mask, np.array(values)[index], palette)


@pytest.fixture
def plain(tmp_path, rng):
    """Six good pairs and their description, for one thing to be spoilt."""
    for i in range(6):
        put(rng, tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png")
    write(tmp_path / "dataset.json", PLAIN)
    return tmp_path


def run(capsys, *argv):
    code = check.main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out + out.err


def described(root):
    """What train_seg.py makes of dataset.json."""
    d = read_description(root)
    pairs = find_pairs(root, d)
    return d, pairs, Labels(d["classes"], d["ignore"]), split_names(root, d, list(pairs))


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
    flags = "" if "val" in sizes else " --val-frac 0.2"
    assert code == 0 and out.endswith(f"\npython train_seg.py --dataset folder --root {tmp_path}{flags}\n")


def test_tile_9_comes_before_tile_10():
    assert sorted(["Tile 10", "Tile 9", "Tile 9b", "1"], key=draft.natural) == ["1", "Tile 9", "Tile 9b", "Tile 10"]


def test_infrared_images_and_second_masks_stay_out_of_the_draft(tmp_path, rng, capsys):
    for i in range(3):
        put(rng, tmp_path / f"2_Ortho_RGB/top_{i}_RGB.tif", tmp_path / f"5_Labels/top_{i}_label.tif")
        put(rng, tmp_path / f"3_Ortho_IRRG/top_{i}_IRRG.tif", tmp_path / f"5_Labels_2/top_{i}_label_noBoundary.tif")
    code, out = run(capsys, tmp_path)
    d = read_description(tmp_path)
    assert (d["images"], d["masks"]) == ("2_Ortho_RGB/*_RGB.tif", "5_Labels/*_label.tif") and code == 0
    assert "3 images are in no pair" in out and "3 masks are in no pair" in out


def test_the_draft_takes_official_lists_for_splits(tmp_path, rng, capsys):
    for i in range(6):
        put(rng, tmp_path / f"JPEGImages/{i:03d}_a.jpg", tmp_path / f"SegmentationClass/{i:03d}_a.png")
    write(tmp_path / "ImageSets/trn.txt", "000_a\n001_a\n002_a\n")
    write(tmp_path / "ImageSets/val.txt", "003_a.jpg\n004_a.jpg\n")
    run(capsys, tmp_path)
    d, _, _, splits = described(tmp_path)
    assert d["splits"] == {"train": ["ImageSets/trn.txt"], "val": ["ImageSets/val.txt"]}
    assert [len(n) for n in splits.values()] == [3, 2]
    assert "1 images are in no split, first JPEGImages/005_a" in run(capsys, tmp_path)[1]
    write(tmp_path / "ImageSets/val.txt", "elsewhere\n")
    code, out = run(capsys, tmp_path, "--force")
    assert "not used for the splits" in out and "'elsewhere' is no image here" in out
    assert read_description(tmp_path)["splits"] == {"train": "*"}


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
    assert '\n  { "name": "id_1", "id": 1, "color": "#00FF00" }\n ],\n' in text and '\n  "train": "*"\n }\n}\n' in text


# ---- drafts: what the masks hold

def draft_of(tmp_path, rng, capsys, *masks, size=(12, 16)):
    for i, (values, palette) in enumerate(masks):
        put(rng, tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png", values, size, palette)
    code, out = run(capsys, tmp_path)
    return read_description(tmp_path), out


def test_palette_masks_are_ids_with_the_colours_of_the_palette(tmp_path, rng, capsys):
    d, out = draft_of(tmp_path, rng, capsys, ((0, 1, 1), [RED, GREEN]), ((1,), [RED, GREEN]))
    assert d["classes"] == [{"name": "id_1", "id": 1, "color": "#00FF00"},
                            {"name": "id_0", "id": 0, "color": "#FF0000"}]
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


def test_likely_void_stays_a_class_and_is_named(tmp_path, rng, capsys):
    d, out = draft_of(tmp_path, rng, capsys, ((1, 2, 255), None))
    assert len(d["classes"]) == 3 and "value 255 is a class in the draft; if it means unlabelled" in out
    shutil.rmtree(tmp_path / "masks")
    (tmp_path / "dataset.json").unlink()
    d, out = draft_of(tmp_path, rng, capsys, ((RED, GREEN, BLACK), None))
    assert len(d["classes"]) == 3 and 'value #000000 is a class in the draft; if it means unlabelled' in out


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


def test_what_cannot_be_drafted(tmp_path, rng, capsys):
    assert run(capsys, tmp_path) == (2, f"error: {tmp_path}: no .png .jpg .jpeg .tif .tiff .bmp file in it; type the "
                                        "folder that holds the images and masks\n")
    for i in range(2):
        put(rng, tmp_path / f"images/{i}.png")
    code, out = run(capsys, tmp_path)
    assert code == 2 and "no folder or file name says mask" in out
    for i in range(2):
        put(rng, tmp_path / f"masks/{i}.jpg")
    code, out = run(capsys, tmp_path)
    assert code == 2 and "a JPEG mask" in out and "PNG or TIFF (all 2 masks fail)" in out
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


# ---- check: one fault each

def edit(root, **changes):
    write(root / "dataset.json", {**PLAIN, **changes})


def test_nothing_to_complain_about(plain, capsys):
    code, out = run(capsys, plain)
    lines = out.splitlines()
    assert code == 0 and lines[9:] == ["6 images, 0 complaints",
                                       f"python train_seg.py --dataset folder --root {plain}"]
    assert [" ".join(line.split()) for line in lines[:9]] == [
        "share of labelled pixels train val", "land 33.33% 33.33%", "road 33.33% 33.33%", "water 33.33% 33.33%",
        "ignored of all pixels 0.00% 0.00%", "images 4 2", "majority class land land", "its accuracy 0.3333 0.3333",
        "its mIoU 0.1111 0.1111"]


def drop_mask(root):
    (root / "masks/1.png").unlink()


def drop_image(root):
    (root / "images/1.png").unlink()


def cut_image(root):
    (root / "images/1.png").write_bytes((root / "images/1.png").read_bytes()[:300])


def cut_mask(root):
    (root / "masks/1.png").write_bytes((root / "masks/1.png").read_bytes()[:60])


def unknown_ids(root):
    a = np.asarray(Image.open(root / "masks/1.png")).copy()
    a[0, :7], a[1, :5] = 9, 8
    save(root / "masks/1.png", a)


def small_mask(root):
    save(root / "masks/1.png", np.ones((6, 8)))


def small_mask_with_unknown(root):
    save(root / "masks/1.png", np.full((6, 8), 9))


def colour_mask(root):
    save(root / "masks/1.png", np.full((12, 16, 3), RED))


def deep_image(root):
    Image.fromarray(np.arange(192, dtype=np.uint16).reshape(12, 16) * 99).save(root / "images/1.png")


def alpha_image(root):
    save(root / "images/1.png", np.arange(768).reshape(12, 16, 4) % 251)


def transparent_images(root):  # 0 to 3 are train: a quarter of 4 x 192 pixels
    for i in range(4):
        save(root / f"images/{i}.png", np.dstack([np.random.default_rng(i).integers(0, 256, (12, 16, 3)),
                                                  np.repeat([0, 255], [4 * 12, 12 * 12]).reshape(12, 16)]))


def grey_image(root):
    save(root / "images/1.png", np.arange(192).reshape(12, 16))


def twin_in_other_split(root):
    Image.open(root / "images/1.png").save(root / "images/4.png", compress_level=0)  # other bytes, same pixels


def twin_in_same_split(root):
    shutil.copy(root / "images/1.png", root / "images/2.png")


def blank_images(root):
    for i in 1, 4:
        save(root / f"images/{i}.png", np.zeros((12, 16, 3)))


def same_bytes_in_another_shape(root):
    for folder in "images", "masks":
        a = np.asarray(Image.open(root / folder / "1.png"))
        save(root / folder / "4.png", a.reshape(16, 12, *a.shape[2:]))


def two_splits(root):
    edit(root, splits={"train": "*/[0-4]", "val": "*/[45]"})


def rule_without_match(root):
    edit(root, splits={"train": ["*/[0-3]", "west/*"], "val": ["*/[45]"]})


def empty_split(root):
    edit(root, splits={"train": "*/[0-3]", "val": []})


def share_for_a_split(root):
    edit(root, splits={"train": "*/[0-3]", "val": 0.2})


def missing_list(root):
    edit(root, splits={"train": "*/[0-3]", "val": "val.txt"})


def no_val(root):
    edit(root, splits={"train": "*/[0-3]"})


def absent_in_val(root):
    for i in 4, 5:
        save(root / f"masks/{i}.png", np.arange(192).reshape(12, 16) % 2)


def absent_class(root):
    edit(root, classes=[*PLAIN["classes"], {"name": "car", "id": 7}])


def binary_ignored(root):
    for i in range(6):
        save(root / f"masks/{i}.png", np.arange(192).reshape(12, 16) % 2 * 255)


def same_id_twice(root):
    edit(root, classes=[*PLAIN["classes"], {"name": "car", "id": 2}])


def half_a_class(root):
    edit(root, classes=[*PLAIN["classes"], {"name": "car", "color": "#FF0000"}])


def colour_among_ids(root):
    edit(root, ignore=["#000000"])


def wrong_json(root):
    (root / "dataset.json").write_text("{'name': 1}")


def turned_image(root):
    exif = Image.Exif()
    exif[274] = 3  # half a turn
    Image.open(root / "images/1.png").save(root / "images/1.png", exif=exif)


def damaged_exif(root):
    Image.open(root / "images/1.png").save(root / "images/1.png", exif=b"Exif\x00\x00no such thing")


def misspelt_split(root):
    edit(root, splits={"trainn": "*/[0-3]", "val": "*/[45]"})


def split_without_a_rule(root):
    edit(root, splits={"train": None, "north": "*/[45]"})


def no_splits(root):
    edit(root, splits={})


def wrong_glob(root):
    edit(root, images="image/*.png")


@pytest.mark.parametrize("spoil, code, line", [
    (drop_mask, 2, "error: {root}/images/1.png: no mask for it by 'masks/*.png'; correct \"masks\" in dataset.json"),
    (drop_image, 0, "warning: {root}/masks/1.png: no image for it by 'images/*.png'; it is not used"),
    (cut_image, 2, "error: {root}/images/1.png: damaged or truncated"),
    (cut_mask, 2, "error: {root}/masks/1.png: damaged or truncated"),
    (unknown_ids, 2, "error: {root}/masks/1.png: unknown ids 9, 8 on 12 of 192 pixels; add them to \"classes\" or"),
    (small_mask, 2, "error: {root}/masks/1.png: mask of 6 x 8 for an image of 12 x 16 (H x W); export it"),
    (small_mask_with_unknown, 2, "error: {root}/masks/1.png: mask of 6 x 8 for an image of 12 x 16"),
    (small_mask_with_unknown, 2, "error: {root}/masks/1.png: unknown ids 9 on 48 of 48 pixels"),
    (colour_mask, 2, "error: {root}/masks/1.png: a colour mask, but the label table lists ids"),
    (deep_image, 2, "error: {root}/images/1.png: uint16 pixels (0..18909); expected 8 bit"),
    (alpha_image, 2, "error: {root}/images/1.png: 4 bands (RGBA); expected 3"),
    (transparent_images, 0, f"ignored of all pixels    {'25.00%':>14} {'0.00%':>14}"),  # as in training
    (grey_image, 0, "note: 1 images of mode L are read as RGB, first images/1"),
    (damaged_exif, 0, "6 images, 0 complaints"),
    (turned_image, 0, "warning: 1 images have an EXIF orientation, first images/1: some programs turn such pictures"),
    (twin_in_other_split, 2, "error: images/1 (train), images/4 (val): identical images in different splits; leave"),
    (twin_in_same_split, 0, "note: images/1, images/2: 2 identical images"),
    (blank_images, 0, "6 images, 0 complaints"),
    (same_bytes_in_another_shape, 0, "6 images, 0 complaints"),
    (two_splits, 2, "error: images/4: in the splits train and val; leave it in one of them"),
    (rule_without_match, 2, "error: split 'train': nothing matches 'west/*'; names look like 'images/0'"),
    (empty_split, 2, "error: split 'val' is empty; name its images in dataset.json, or delete it"),
    (share_for_a_split, 2, "error: split 'val' is"),
    (missing_list, 2, "error: {root}/val.txt: no such split file"),
    (no_val, 0, "warning: no val split: list whole scenes under \"val\" in dataset.json, or train with --val-frac 0.2"),
    (no_val, 0, "note: 2 images are in no split, first images/4"),
    (absent_in_val, 0, "warning: class 'water' is not in val: it cannot be scored there; move images"),
    (absent_in_val, 0, f"  its mIoU {'0.1111':>28} {'0.2500':>14}\n"),  # val: of the two classes that it has
    (absent_class, 0, "warning: class 'car' is in no mask: correct its id or colour, or delete it"),
    (binary_ignored, 0, "warning: every labelled pixel is 'land'; if [255] holds a class, move it from \"ignore\" to"),
    (same_id_twice, 2, "error: {root}/dataset.json: label table with the values [0, 1, 2, 2, 255]; expected each once"),
    (half_a_class, 2, "expected \"name\" and \"id\" in every class, or \"name\" and \"color\" in every class"),
    (colour_among_ids, 2, "error: {root}/dataset.json: label table with the values [0, 1, 2, '#000000']"),
    (wrong_json, 2, "error: {root}/dataset.json: not valid JSON"),
    (misspelt_split, 2, "error: {root}/dataset.json: \"splits\" has trainn, val; the names are train, val and test"),
    (split_without_a_rule, 2, "error: {root}/dataset.json: \"splits\" has train, north; the names are train, val"),
    (no_splits, 2, "error: {root}/dataset.json: \"splits\" is missing, empty or malformed"),
    (wrong_glob, 2, "error: {root}: no image matches 'image/*.png'; correct \"images\" in dataset.json or --root"),
], ids=lambda v: getattr(v, "__name__", ""))
def test_each_fault_has_its_line_and_exit_code(spoil, code, line, plain, capsys):
    spoil(plain)
    got, out = run(capsys, plain)
    assert line.format(root=plain) in out and got == code
    again = f"\nCorrect the errors, then type: python -m data.check {plain}\n"
    assert out.endswith(again) == (code == 2 and "complaints" in out)


def test_all_faults_are_listed_at_once_and_the_same_fault_at_most_twenty_times(tmp_path, rng, capsys):
    for i in range(30):
        put(rng, tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png", (0, 1, 2) if i < 5 else (0, 1, 9))
    cut_image(tmp_path)
    (tmp_path / "masks/0.png").unlink()
    edit(tmp_path, splits={"train": "*"})
    code, out = run(capsys, tmp_path)
    assert code == 2 and out.count("unknown ids 9") == 20 and "error: ... and 5 more like these" in out
    assert "images/1.png: damaged" in out and "images/0.png: no mask" in out
    assert "\n30 images, 28 complaints, 27 of them errors\n" in out  # 25 unknown, truncated, no mask; no val split


def test_no_class_is_called_absent_while_masks_could_not_be_counted(plain, capsys):
    absent_class(plain)
    assert "class 'car' is in no mask" in run(capsys, plain)[1]
    cut_mask(plain)
    code, out = run(capsys, plain)
    assert code == 2 and "damaged or truncated" in out and "is in no mask" not in out


def test_limit_reads_an_even_sample_and_says_so(plain, capsys):
    unknown_ids(plain)
    code, out = run(capsys, plain, "--limit", "3")  # reads 0, 2, 5
    assert code == 0 and "only 3 of 6 images and masks were read" in out


def test_tiles_of_two_splits_that_show_the_same_ground(tmp_path, rng, capsys):
    def place(i, tags):
        put(rng, tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png")
        info = TiffImagePlugin.ImageFileDirectory_v2()
        for number, values in tags.items():
            info.tagtype[number] = TiffTags.DOUBLE if number != 34735 else TiffTags.SHORT
            info[number] = values
        Image.open(tmp_path / f"images/{i}.png").save(tmp_path / f"images/{i}.tif", tiffinfo=info)
        (tmp_path / f"images/{i}.png").unlink()

    scale, utm = {33550: (0.5, 0.5, 0.0)}, {34735: (1, 1, 0, 0)}  # 12 x 16 pixels (H x W) are 6 x 8 m
    place(0, {**scale, **utm, 33922: (0.0, 0.0, 0.0, 100.0, 200.0, 0.0)})
    place(1, {**scale, 34735: (1, 1, 0, 1), 33922: (0.0, 0.0, 0.0, 106.0, 200.0, 0.0)})  # in another system
    place(2, {**utm, 34264: (0.5, 0.0, 0.0, 92.0, 0.0, -0.5, 0.0, 200.0, *(0.0,) * 7, 1.0)})  # shares an edge
    place(3, {})
    place(4, {**scale, **utm, 33922: (2.0, 0.0, 0.0, 107.0, 203.0, 0.0)})  # from x 106, y 203 down: 2 x 3 m of 0
    place(5, {})
    write(tmp_path / "dataset.json", PLAIN | {"images": "images/*.tif"})
    code, out = run(capsys, tmp_path)
    assert code == 0 and ("warning: 1 pairs of images in different splits show the same ground, such as images/0 "
                          "(train) and images/4 (val), 12% of the smaller") in out


def test_a_root_with_a_blank_can_be_pasted(plain, capsys):
    root = plain.rename(plain.with_name("my set"))
    assert run(capsys, root)[1].endswith(f"python train_seg.py --dataset folder --root '{root}'\n")
    root.rename(plain)


def test_progress_goes_to_stderr(plain, capsys, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(check.time, "monotonic", lambda: next(clock))
    check.main([str(plain)])
    assert "files: 3 of 6, 3 s left" in capsys.readouterr().err


# ---- what the check relies on in data/datasets.py

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
    unknown_ids(plain)
    with pytest.raises(BadInput, match="masks/1.png: unknown ids 9, 8"):
        class_counts(pairs, labels)


@pytest.mark.parametrize("pattern, path, key", [
    ("T */*.png", "T 2/a.png", "2/a"), ("T [1-3]/*.png", "T 2/a.png", "2/a"), ("T [!1]/*.png", "T 2/a.png", "2/a"),
    ("**/*.png", "a.png", "/a"), ("**/*.png", "x/y/a.png", "x/y//a"), ("a?.png", "ab.png", "b"),
    ("*.png", "x/a.png", None)])
def test_stars_stand_for_text(pattern, path, key):
    assert star_key(pattern, path) == key


def test_two_images_of_one_name_are_refused(plain):
    shutil.copy(plain / "images/1.png", plain / "images/1.PNG")
    with pytest.raises(BadInput, match="two images of one name"):
        match_pairs(plain, {"images": ["images/*.png", "images/*.PNG"], "masks": ["masks/*.png", "masks/*.png"]})


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
