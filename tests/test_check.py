"""data.check holds a description against the files: each fault has its line and exit code."""
import io
import os
import shutil

import numpy as np
import pytest
from folder_sets import PLAIN, RED, plain, put, rng, run, save  # noqa: F401: two are fixtures
from PIL import Image, TiffImagePlugin, TiffTags

from data import common
from data.check.__main__ import main
from data.check.values import is_drafted
from data.common import write
from data.curate.__main__ import main as curate
from data.datasets import check_command, find_pairs, read_description, script_command


# ---- check: one fault each

def edit(root, **changes):
    write(root / "dataset.json", {**PLAIN, **changes})


def test_nothing_to_complain_about(plain, capsys):
    code, out = run(capsys, plain)
    lines = out.splitlines()
    assert code == 0 and lines[9:] == ["6 images, 0 complaints",
                                       f"{script_command('train_seg.py')} --dataset folder --root {plain}"]
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


def held_out(root):
    edit(root, splits={"train": "*/[0-3]"}, select=0.5, scene="[01]|[23]")


def held_out_by_image(root):
    edit(root, splits={"train": "*/[0-3]"}, select=0.5)


def names_of_a_draft(root):
    edit(root, classes=[dict(name="id_0", id=0), dict(name="class_9", id=1), dict(name="id_2", id=2)])


def held_out_of_one_scene(root):
    edit(root, splits={"train": "*/[0-3]"}, select=0.2, scene="images")


def scene_of_none(root):
    edit(root, splits={"train": "*/[0-3]"}, select=0.2, scene="area")


def scene_in_two_splits(root):
    edit(root, scene="images/")  # no group: the whole match


def fifth_band(root):
    edit(root, bands=[5, 1, 2])


def range_of_bytes(root):
    edit(root, input_range=[0, 3000])


def range_of_one(root):
    edit(root, input_range=[7, 7])


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
    (alpha_image, 2, "error: {root}/images/1.png: 4 bands (RGBA), and alpha is more than 0 and 255; a mask with soft"),
    (transparent_images, 0, f"ignored of all pixels    {'25.00%':>14} {'0.00%':>14}"),  # as in training
    (grey_image, 0, "note: 1 image read as RGB: mode L, first images/1"),
    (damaged_exif, 0, "6 images, 0 complaints"),
    (turned_image, 0, "warning: EXIF orientation in 1 image, first images/1: some programs turn such pictures"),
    (twin_in_other_split, 2, "error: images/1 (train), images/4 (val): identical images in different splits; leave"),
    (twin_in_same_split, 0, "note: images/1, images/2: 2 identical images"),
    (blank_images, 0, "6 images, 0 complaints"),
    (same_bytes_in_another_shape, 0, "6 images, 0 complaints"),
    (two_splits, 2, "error: images/4: in the splits train and val; leave it in one of them"),
    (rule_without_match, 2,
    "error: split 'train' in dataset.json: nothing matches 'west/*'; names look like 'images/0'"),
    (empty_split, 2, "error: split 'val' is empty; name its images in dataset.json, or delete it"),
    (share_for_a_split, 2, "error: split 'val' in dataset.json is"),
    (missing_list, 2, "error: {root}/val.txt: no such file"),
    (no_val, 0, "warning: no val split: list whole scenes under \"val\" in dataset.json, or hold them out: \"select\""),
    (no_val, 0, "--dataset folder --root {root} --val-frac 0.2\n"),
    (held_out, 0, "--dataset folder --root {root}\n"),
    (held_out_by_image, 0, "warning: a part of train is held out image by image, so neighbours may stand on both"),
    (names_of_a_draft, 0, "note: classes are called id_0, id_2 as in a draft; name them in dataset.json before"),
    (held_out_of_one_scene, 2, "error: 0.2 of 1 scenes leaves train or val empty; change \"select\" or \"scene\" in"),
    (scene_of_none, 2, "error: \"scene\" in dataset.json is 'area', which does not match 'images/0'"),
    (scene_in_two_splits, 0, "warning: 1 of 1 scenes are in several splits, such as images/ in train, val: the"),
    (fifth_band, 2, "error: {root}/images/1.png: 3 bands (RGB), and --bands or \"bands\" in dataset.json asks for"),
    (range_of_bytes, 2, "images/1.png: 8 bits, for which --input-range 0 3000, or \"input_range\" in dataset.json"),
    (range_of_one, 2, "error: {root}/dataset.json: \"input_range\" is [7, 7]; expected the lower value, then"),
    (no_val, 0, "note: in no split: 2 images, first images/4"),
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
    again = f"\nCorrect the errors, then type: {check_command(plain)}\n"
    assert out.endswith(again) == (code == 2 and "complaint" in out)


def test_bands_and_range_of_the_description_unless_flags_say_otherwise(plain, capsys):
    for i in range(6):
        Image.fromarray(np.arange(192, dtype=np.uint16).reshape(12, 16) * 99 + i).save(plain / f"images/{i}.png")
    assert run(capsys, plain)[0] == 2
    edit(plain, input_range=[0, 20000])
    code, out = run(capsys, plain)
    assert code == 0 and "--input-range" not in out
    edit(plain, bands=[2, 1, 1], input_range=[0, 20000])
    code, out = run(capsys, plain)
    assert code == 2 and "asks for number 2" in out
    code, out = run(capsys, plain, "--bands", "1,1,1", "--input-range", 0, 9000)
    assert code == 0 and out.endswith(f"--root {plain} --bands 1,1,1 --input-range 0.0 9000.0\n")


def test_flags_that_cannot_be(plain, capsys):
    for flags in (["--bands", "1,2"], ["--bands", "0,1,2"], ["--input-range", 9, 1], ["--input-range", "nan", 1]):
        with pytest.raises(SystemExit):
            run(capsys, plain, *flags)
        assert "expected" in capsys.readouterr().err


def test_all_faults_are_listed_at_once_and_the_same_fault_at_most_twenty_times(tmp_path, rng, capsys):
    for i in range(30):
        put(rng, tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png", (0, 1, 2) if i < 5 else (0, 1, 9))
    cut_image(tmp_path)
    (tmp_path / "masks/0.png").unlink()
    edit(tmp_path, splits={"train": "*"})
    code, out = run(capsys, tmp_path)
    assert code == 2 and out.count("unknown ids 9") == 20 and "error: ... and 5 more like these" in out
    assert "images/1.png: damaged" in out and "images/0.png: no mask" in out
    assert "\n30 images, 28 complaints, 27 errors among them\n" in out  # 25 unknown, truncated, no mask; no val split


def test_no_class_is_called_absent_while_masks_could_not_be_counted(plain, capsys):
    absent_class(plain)
    assert "class 'car' is in no mask" in run(capsys, plain)[1]
    cut_mask(plain)
    code, out = run(capsys, plain)
    assert code == 2 and "damaged or truncated" in out and "is in no mask" not in out


def test_a_class_is_called_absent_only_where_every_mask_was_read(plain, capsys):
    save(plain / "masks/3.png", np.full((12, 16), 7))
    edit(plain, classes=[*PLAIN["classes"], {"name": "car", "id": 7}, {"name": "bus", "id": 8}])
    assert "warning" not in run(capsys, plain, "--limit", "3")[1]  # reads 0, 2, 5
    out = run(capsys, plain)[1]
    assert "class 'bus' is in no mask: correct its id" in out and "class 'car' is not in val" in out
    edit(plain, classes=[*PLAIN["classes"], {"name": "car", "id": 7}], splits={"train": "*/[0-2]", "val": "*/[45]"})
    out = run(capsys, plain)[1]
    assert "class 'car' is only in images, or parts of them, that are in no split" in out and "delete it" not in out


def test_one_training_image_is_trained_on_with_final(plain, capsys):
    edit(plain, splits={"train": "*/0", "test": "*/[45]"})
    code, out = run(capsys, plain)
    assert code == 0 and "one training image, of which nothing can be held out" in out
    assert out.endswith(f"--root {plain} --final\n")
    edit(plain, splits={"train": "*/0"}, select=0.2)
    code, out = run(capsys, plain)
    assert code == 2 and "error: one training image, of which nothing can be held out to choose the weights; add" in out


def test_a_missing_folder_is_called_missing(plain, capsys):
    for root, said in ((plain / "a/b", f"{plain}/a/b: no such folder; there is {plain}: correct the rest"),
                       (plain / "dataset.json", "dataset.json: a file; type the folder that holds")):
        for flags in ([], ["--dataset", "potsdam"], ["--force"]):
            code, out = run(capsys, root, *flags)
            assert code == 2 and said in out and out.count("\n") == 1
    edit(plain, images="imgs/[a-z]/*.png")
    assert f"; there is no folder {plain}/imgs" in run(capsys, plain)[1]


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
    assert run(capsys, root)[1].endswith(f"train_seg.py --dataset folder --root '{root}'\n")
    root.rename(plain)


def test_progress_goes_to_stderr(plain, capsys, monkeypatch):
    monkeypatch.setattr(common, "SILENT", 0)
    run(capsys, plain)
    assert "files: 5 of 6  ETA 0:00" in run(capsys, plain)[1]


def test_any_name_and_class_is_shown_on_a_terminal_of_windows(tmp_path, rng, monkeypatch):
    root = tmp_path / os.fsdecode(b"s\xe9t")
    for i in range(3):
        put(rng, root / "images" / os.fsdecode(b"t\xff%d.png" % i), root / "masks" / os.fsdecode(b"t\xff%d.png" % i))
    for _ in range(2):  # draft and check
        stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
        monkeypatch.setattr("sys.stdout", stream)
        assert main([str(root)]) == 0
        d = read_description(root)
        write(root / "dataset.json", d | {"classes": [{"name": n, "id": i} for i, n in enumerate(("水", "é", "x"))]})
    stream.flush()
    shown = stream.buffer.getvalue()
    assert b"\\u6c34" in shown and b"\xe9 " in shown and b"s\\udce9t" in shown
    assert d["name"] == "s?t" and len(find_pairs(root, d)) == 3


@pytest.mark.parametrize("flag, value, said", [
    ("--limit", "0", "argument --limit: 0: expected a whole number from 1"), ("--limit", "-1", "--limit: -1"),
    ("--limit", "nan", "--limit: nan"), ("--limit", "\u0663", "--limit: \u0663"),
    ("--limit", "1e400", "--limit: 1e400"),
    ("--bands", "", "argument --bands: : expected three numbers from 1"), ("--bands", "1,2", "--bands: 1,2"),
    ("--max-pixels", "0", "--max-pixels: 0"), ("--input-range", "--", "--input-range=--: expected a value")])
def test_a_flag_that_is_no_number_is_one_line(plain, capsys, flag, value, said):
    with pytest.raises(SystemExit) as e:
        main([str(plain), f"{flag}={value}"])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_names_that_a_terminal_would_obey_are_shown_as_escapes_in_one_line(plain, capsys):
    name = "a\n\x1b[31mb.png"
    (plain / "images" / name).write_bytes(b"nothing")
    (plain / "masks" / name).write_bytes(b"nothing")
    os.mkfifo(plain / "images/pipe.png")
    code, out = run(capsys, plain)
    assert code == 2 and "\x1b" not in out and "images/a\\n\\x1b[31mb.png: not a readable image" in out
    assert "images/pipe.png: a pipe, a socket or a device; expected a regular file" in out


@pytest.mark.parametrize("argv, said", [
    (["folds", "D", "--out", "o", "--number", "nan"], "--number: nan: expected a whole number from 1"),
    (["next", "D", "--budget=\u0663"], "--budget: \u0663: expected a whole number from 1"),
    (["tile", "D", "--out", "o", "--overlap=-1"], "--overlap: -1: expected a whole number from 0"),
    (["filter", "D", "--class", "a", "--at-most", "nan%", "--out", "o"], "expected a percentage"),
    (["filter", "D", "--class", "a", "--at-most", "500%", "--out", "o"], "expected a percentage"),
    (["folds", "D", "--out=--"], "--out=--: expected a value"), (["folds", "a\0b"], "NUL character")])
def test_flags_of_data_curate_have_the_same_rules(capsys, argv, said):
    with pytest.raises(SystemExit) as e:
        curate(argv)
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_link_to_no_file_is_not_replaced_by_a_draft(plain, capsys):
    (plain / "dataset.json").rename(plain / "kept.json")
    (plain / "dataset.json").symlink_to("gone.json")
    code, out = run(capsys, plain)
    assert code == 2 and "dataset.json: a link to no file; bring the file back, or remove the link" in out
    (plain / "kept.json").rename(plain / "gone.json")
    assert (plain / "dataset.json").is_symlink() and run(capsys, plain)[0] == 0  # as the message says


def test_a_drafted_name_is_by_the_id_or_else_by_the_colours_rank():
    red = dict(color="#FF0000")
    assert is_drafted(dict(red, name="class_2")) and is_drafted(dict(name="id_7", id=7))
    assert not is_drafted(dict(red, name="class_2", id=2)) and not is_drafted(dict(name="id_7", id=8))


def test_ctrl_c_is_quiet(plain, capsys, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("data.check.__main__.check", stop)
    assert run(capsys, plain)[0] == 130
