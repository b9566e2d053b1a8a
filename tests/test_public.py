"""The public data sets in miniature, with their official names: splits, labels there and back, train, eval, predict."""
import json
import shutil

import numpy as np
import pytest
from forks import Forks
from PIL import Image

from data.check.__main__ import main as check
from data.cache import Cache
from data.datasets import SegDataset, class_counts, find_pairs, load_splits
from data.common import IGNORE, BadInput, write
from data.io import Labels, read_image
from data.public import SETS, describe

TINY = ["--steps", 2, "--eval-every", 2, "--batch-size", 2, "--warmup", 1, "--arch", "nano16", "--workers", 0,
        "--focus", 0]
POTSDAM = {"train": "2_10 2_11 2_12 3_10 3_11 3_12 4_10 4_11 4_12 5_10 5_11 5_12 6_7 6_8 6_9 6_10 6_11 6_12 7_7 7_8 "
                    "7_9 7_10 7_11 7_12".split(),
           "test": "2_13 2_14 3_13 3_14 4_13 4_14 4_15 5_13 5_14 5_15 6_13 6_14 6_15 7_13".split()}
VAIHINGEN = {"train": "1 3 5 7 11 13 15 17 21 23 26 28 30 32 34 37".split(),
             "test": "2 4 6 8 10 12 14 16 20 22 24 27 29 31 33 35 38".split()}
COMPLETE = "ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE/top_mosaic_09cm_area{}.tif"
ERODED = "ISPRS_semantic_labeling_Vaihingen_ground_truth_eroded_COMPLETE/top_mosaic_09cm_area{}_noBoundary.tif"
PARTICIPANTS = "gts_for_participants/top_mosaic_09cm_area{}.tif"
# id, name, red, green, blue as the publishers list them; "-" is ignored
ISPRS = """impervious 255 255 255, building 0 0 255, low vegetation 0 255 255, tree 0 255 0, car 255 255 0,
    clutter 255 0 0, - 0 0 0"""
TABLES = {
    "potsdam": ISPRS, "vaihingen": ISPRS,
    "loveda": """- 0, background 1, building 2, road 3, water 4, barren 5, forest 6, agriculture 7""",
    "landcoverai": "background 0, building 1, woodland 2, water 3, road 4",
    "isaid": """background 0 0 0, ship 0 0 63, storage tank 0 63 63, baseball diamond 0 63 0, tennis court 0 63 127,
        basketball court 0 63 191, ground track field 0 63 255, bridge 0 127 63, large vehicle 0 127 127,
        small vehicle 0 0 127, helicopter 0 0 191, swimming pool 0 0 255, roundabout 0 191 127, soccer field 0 127 191,
        plane 0 127 255, harbor 0 100 155""",
    "openearthmap": """- 0, bareland 1, rangeland 2, developed 3, road 4, tree 5, water 6, agriculture 7, building 8""",
    "aeroscapes": """background 0, person 1, bike 2, car 3, drone 4, boat 5, animal 6, obstacle 7, construction 8,
        vegetation 9, road 10, sky 11"""}


def table(name):  # [(name, id or (r, g, b))]
    rows = [row.split() for row in TABLES[name].split(",")]
    rows = [(" ".join(w for w in r if not w.isdigit()), tuple(int(w) for w in r if w.isdigit())) for r in rows]
    return [(n, v if len(v) == 3 else v[0]) for n, v in rows]


def layout(name, form):
    """[(split, image, mask or None)] and {list file: text} of a data set in one of its forms."""
    if name == "potsdam":
        image = {"rgb": "2_Ortho_RGB/top_potsdam_{}_RGB.tif", "irrg": "3_Ortho_IRRG/top_potsdam_{}_IRRG.tif",
                 "rgbir": "4_Ortho_RGBIR/top_potsdam_{}_RGBIR.tif"}[form.split(",")[0]]
        mask = {"full": "5_Labels_all/top_potsdam_{}_label.tif",
                "eroded": "5_Labels_all_noBoundary/top_potsdam_{}_label_noBoundary.tif",
                "participants": "5_Labels_for_participants/top_potsdam_{}_label.tif"}[form.split(",")[1]]
        hidden = form.endswith("participants")
        return [(s, image.format(t), None if hidden and s == "test" else mask.format(t))
                for s in POTSDAM for t in POTSDAM[s]], {}
    if name == "vaihingen":
        mask = {"participants": PARTICIPANTS, "complete": COMPLETE, "eroded": ERODED}[form]
        hidden = form == "participants"
        return [(s, f"top/top_mosaic_09cm_area{t}.tif", None if hidden and s == "test" else mask.format(t))
                for s in VAIHINGEN for t in VAIHINGEN[s]], {}
    if name == "loveda":
        numbers = {"Train": (0, 140, 1366, 1600), "Val": (2522, 3514), "Test": (4191, 5167)}
        return [(s.lower(), f"{s}/{('Rural', 'Urban')[i % 2]}/images_png/{n}.png",
                 None if s == "Test" else f"{s}/{('Rural', 'Urban')[i % 2]}/masks_png/{n}.png")
                for s in numbers for i, n in enumerate(numbers[s])], {}
    if name == "isaid":
        mask = {"folder": "{}/Semantic_masks/images/{}_instance_color_RGB.png",
                "beside": "{}/images/{}_instance_color_RGB.png"}[form]
        names = {"train": ("P0000", "P0001", "P0002", "P1088"), "val": ("P0003", "P0004"), "test": ("P0006",)}
        return [(s, f"{s}/images/{n}.png", None if s == "test" else mask.format(s, n))
                for s in names for n in names[s]], {}
    if name == "openearthmap":
        names = {"train": ("aachen_1", "aachen_12", "tokyo_3"), "val": ("tokyo_1",), "test": ("viru_2",)}
        end = "_wo_xBD" if form == "wo_xbd" else ""
        lists = {f"{s}{end}.txt": "".join(f"{n}.tif\n" for n in names[s]) for s in names}
        return [(s, f"{n.split('_')[0]}/images/{n}.tif", f"{n.split('_')[0]}/labels/{n}.tif")
                for s in names for n in names[s]], lists
    if name == "aeroscapes":
        names = {"trn": ("000001_001", "000001_002", "003002_001", "040013_117"), "val": ("007001_001", "007001_002")}
        line = "JPEGImages/{}.jpg" if form == "paths" else "{}"
        lists = {f"ImageSets/{s}.txt": "\n".join(line.format(n) for n in names[s]) for s in names}
        return [(s.replace("trn", "train"), f"JPEGImages/{n}.jpg", f"SegmentationClass/{n}.png")
                for s in names for n in names[s]], lists
    sheet = "M-33-20-D-c-4-2"  # 1030 x 1100: 2 x 2 full tiles of a grid of 3 x 3
    lists = {"train.txt": f"{sheet}_0\n{sheet}_4\n", "val.txt": f"{sheet}_1\n", "test.txt": f"{sheet}_3\n"}
    if form == "raw":
        return [(None, f"images/{sheet}.tif", f"masks/{sheet}.tif")], lists
    return [(s, f"output/{sheet}_{k}.jpg", f"output/{sheet}_{k}_m.png")
            for s, k in (("train", 0), ("train", 4), ("val", 1), ("test", 3))], lists


FORMS = [("potsdam", f"{image},{mask}") for image in ("rgb", "irrg", "rgbir") for mask in ("full", "eroded")] + [
    ("potsdam", "rgb,participants"), *(("vaihingen", f) for f in ("participants", "complete", "eroded")),
    ("loveda", ""), ("landcoverai", "raw"), ("landcoverai", "tiles"), ("isaid", "folder"), ("isaid", "beside"),
    ("openearthmap", "all"), ("openearthmap", "wo_xbd"), ("aeroscapes", "ids"), ("aeroscapes", "paths")]
HELD = {"potsdam": "val", "vaihingen": "val", "loveda": "select", "isaid": "select", "aeroscapes": "select"}


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.merge(mode, [Image.fromarray(b) for b in np.moveaxis(array, -1, 0)]) if mode else \
        Image.fromarray(array)
    image.save(path)
    return path


def make(root, name, form):
    files, lists = layout(name, form)
    rng, values = np.random.default_rng(0), np.array([v for _, v in table(name)], np.uint8)
    if form in ("full", "complete") or ",full" in form:
        values = values[:-1]  # black borders are in the eroded labels only
    for _, image, mask in files:
        h, w = (1030, 1100) if form == "raw" else (512, 512) if name == "landcoverai" else (40, 48)
        pixels = rng.integers(0, 256, (h // 8 + 1, w // 8 + 1, 4), np.uint8).repeat(8, 0).repeat(8, 1)[:h, :w]
        save(root / image, *((pixels, "RGBX") if "RGBIR" in image else (np.ascontiguousarray(pixels[..., :3]),)))
        if mask:
            picks = rng.integers(0, len(values), (h // 8 + 1, w // 8 + 1)).repeat(8, 0).repeat(8, 1)[:h, :w]
            picks[:1, :len(values)] = np.arange(len(values))  # every value is in every mask
            save(root / mask, values[picks])
    for file, text in lists.items():
        write(root / file, text)
    return files


def read(root, name, variant=None, **more):
    d = describe(name, root, variant)
    pairs = find_pairs(root, d)
    return d, pairs, Labels(d["classes"], d["ignore"]), load_splits(root, d, pairs, **more)


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    yield forks
    forks.close()


@pytest.mark.parametrize("name, form", FORMS)
def test_pairs_splits_and_labels_there_and_back(name, form, tmp_path):
    files = make(tmp_path, name, form)
    d, pairs, labels, splits = read(tmp_path, name)
    assert d["variant"] == ("" if name in ("loveda", "aeroscapes") else form)
    if form == "raw":
        want = {"train": ["_0", "_4"], "val": ["_1"], "test": ["_3"]}
        assert splits == {s: [f"images/M-33-20-D-c-4-2{k}" for k in ks] for s, ks in want.items()}
    else:
        want = {}
        for split, image, mask in files:
            if mask:
                want.setdefault(split, {})[image.rsplit(".", 1)[0]] = tmp_path / image, tmp_path / mask
        held = splits.pop(HELD.get(name), []) if HELD.get(name) not in want else []
        got = {s: {n: pairs[n] for n in names + (held if s == "train" else [])} for s, names in splits.items()}
        assert got == want and bool(held) == (name in HELD)
        assert name not in HELD or not set(held) & set(splits["train"])

    rows = [(n, v) for n, v in table(name) if n != "-"]
    assert [(c, n) for c, n in enumerate(labels.names)] == [(c, n) for c, (n, _) in enumerate(rows)]
    for _, mask, *_ in list(pairs.values())[:2]:
        if mask:
            raw, ids = np.asarray(Image.open(mask)), labels.load(mask)
            for c, (_, value) in enumerate(rows):
                np.testing.assert_array_equal(ids == c, (raw == value).all(2) if labels.by_color else raw == value)
            np.testing.assert_array_equal(labels.decode(ids), raw)


def test_colours_of_ids_are_the_published_ones():
    for name, some in {"loveda": {"barren": (159, 129, 183), "agriculture": (255, 195, 128), "forest": (0, 255, 0)},
                       "openearthmap": {"rangeland": (0, 255, 36), "tree": (34, 97, 38), "building": (222, 31, 7),
                                        "water": (0, 69, 255), "agriculture": (75, 181, 73), "bareland": (128, 0, 0)},
                       "aeroscapes": {"person": (192, 128, 128), "animal": (192, 0, 128), "vegetation": (0, 64, 0),
                                      "construction": (192, 128, 0), "sky": (0, 128, 128)}}.items():
        labels = Labels(SETS[name]["classes"])
        assert some.items() <= dict(zip(labels.names, map(tuple, labels.colors.tolist()))).items()


def test_raw_orthophotos_and_split_tiles_are_the_same_pixels(tmp_path):
    make(tmp_path, "landcoverai", "raw")
    _, pairs, labels, splits = read(tmp_path, "landcoverai")
    cache, mask = Cache(tmp_path / "cache"), labels.load(tmp_path / "masks/M-33-20-D-c-4-2.tif")
    data = SegDataset(pairs, labels, "imagenet", cache=cache)
    image = read_image(tmp_path / "images/M-33-20-D-c-4-2.tif")
    for k, (top, left) in {0: (0, 0), 1: (0, 512), 3: (512, 0), 4: (512, 512)}.items():  # 2 is cut by the right border
        x, y = data.read(data.names.index(f"images/M-33-20-D-c-4-2_{k}"))
        np.testing.assert_array_equal(x, image[top:top + 512, left:left + 512])
        np.testing.assert_array_equal(y, mask[top:top + 512, left:left + 512])
    assert len(pairs) == 4 and len([*cache.folder.iterdir()]) == 1  # decoded once for its four tiles
    assert class_counts(pairs, labels).sum(0).tolist() == [*np.bincount(mask[:1024, :1024].ravel(), minlength=5), 0]


@pytest.mark.parametrize("name, form, flags", [
    ("potsdam", "rgb,eroded", []), ("potsdam", "rgbir,full", ["--bands", "4,1,2"]), ("vaihingen", "complete", []),
    ("loveda", "", []), ("landcoverai", "raw", ["--crop", 128]), ("landcoverai", "tiles", ["--crop", 128]),
    ("isaid", "folder", []), ("openearthmap", "all", []), ("aeroscapes", "paths", [])])
def test_train_eval_and_predict_back(name, form, flags, forks, tmp_path):
    root, run, out = tmp_path / "d", tmp_path / "run", tmp_path / "p"
    files = make(root, name, form)
    text = forks.run("train_seg", "--dataset", name, "--root", root, "--out", run, *TINY, "--crop", 32, *flags)
    assert ("WARNING" in text) == (name in ("potsdam", "landcoverai"))
    results = json.loads((run / "results.json").read_text())
    split = "val" if name in ("loveda", "isaid", "aeroscapes") else "test"
    assert results["split"] == split and "very images" not in text
    kept, classes = len(results["iou"]), list(results["iou"].values())
    for key, leave in {"potsdam": ("5_without_clutter", 5), "vaihingen": ("5_without_clutter", 5),
                       "isaid": ("15_without_background", 0), "aeroscapes": ("11_without_background", 0)}.items():
        if key == name:
            means = [v for i, v in enumerate(classes) if i != leave[1] and v is not None]
            assert abs(results[f"miou_{leave[0]}"] - np.mean(means)) < 1e-6 and leave[0].startswith(str(kept - 1))
            assert f"{leave[0].replace('_', ' ')}: mIoU" in text
    assert results["miou"] == pytest.approx(np.mean([v for v in classes if v is not None]), abs=1e-6)

    images = [root / i for s, i, _ in files if s in (split, None)]
    forks.run("predict", run, *images, "--out", out, "--label-out", "raw")
    known = {v for n, v in table(name) if n != "-"}
    for image in images:
        raw = np.asarray(Image.open(out / f"{image.stem}.png"))
        assert {tuple(v) if raw.ndim == 3 else v for v in raw.reshape(-1, *raw.shape[2:]).tolist()} <= known
    masks = ["--masks", out, "--mask-ids", "raw"] if form != "raw" else []
    # As many windows at once as in training: some CPUs round otherwise in batches of another size.
    forks.run("eval", run, *masks, "--out", tmp_path / "e", "--workers", 0, "--batch-size", 2)
    assert json.loads((tmp_path / "e/eval.json").read_text())["confusion"] == results["confusion"]


def test_loveda_submission_holds_0_to_6_and_its_test_has_no_score(forks, tmp_path):
    root, run = tmp_path / "d", tmp_path / "run"
    make(root, "loveda", "")
    forks.run("train_seg", "--dataset", "loveda", "--root", root, "--out", run, *TINY, "--crop", 32, "--final")
    forks.run("predict", run, root / "Test", "--out", tmp_path / "p")
    found = sorted(p for p in (tmp_path / "p").rglob("*.png") if p.stem.isdigit())
    assert [p.name for p in found] == ["4191.png", "5167.png"]
    assert all(np.asarray(Image.open(p)).max() <= 6 for p in found)
    assert "no masks for test; predict it" in forks.run("eval", run, "--split", "test", "--root", root, ok=2)
    assert len(json.loads((run / "split.json").read_text())["train"]) == 4
    assert json.loads((run / "protocol.json").read_text())["selection"] == "last step"


def test_trained_on_full_labels_scored_on_eroded_ones(forks, tmp_path):
    root, run = tmp_path / "d", tmp_path / "run"
    for form in ("complete", "eroded"):
        make(root, "vaihingen", form)
    flags = ["--dataset", "vaihingen", "--root", root, *TINY, "--crop", 32]
    assert "forms complete and eroded; type --variant" in forks.run("train_seg", *flags, ok=2)
    forks.run("train_seg", *flags, "--variant", "complete", "--out", run)
    sums = []
    for variant in ([], ["--variant", "eroded"]):
        forks.run("eval", run, *variant, "--out", tmp_path / "e", "--workers", 0, "--overwrite")
        e = json.loads((tmp_path / "e/eval.json").read_text())
        assert e["protocol"]["variant"] == (variant or ["complete"])[-1] and e["protocol"]["images"] == 17
        sums.append(np.sum(e["confusion"]))
    assert sums[0] == 17 * 40 * 48 > sums[1] > 0


@pytest.mark.parametrize("name, form, flags, lines", [
    ("potsdam", "rgbir,full", ["--bands", "4,1,2"], ["tile 7_10", "--variant rgbir,full --bands 4,1,2\n"]),
    ("vaihingen", "participants", [], ["17 images of test have no masks", "--dataset vaihingen"]),
    ("loveda", "", [], ["2 images of test have no masks: for predict.py only"]),
    ("landcoverai", "raw", [], ["spread each orthophoto", "1 of 1 scenes are in several splits, such as M-33-20-D-c"]),
    ("landcoverai", "tiles", [], ["1 of 1 scenes are in several splits"]), ("isaid", "beside", [], []),
    ("openearthmap", "all", [], ["1 of 3 scenes are in several splits, such as tokyo"]), ("aeroscapes", "ids", [], [])])
def test_check_reads_them_all(name, form, flags, lines, tmp_path, capsys):
    make(tmp_path, name, form)
    code = check([str(tmp_path), "--dataset", name, *flags])
    out = capsys.readouterr().out
    assert code == 0 and all(line in out for line in lines), out
    assert "val-frac" not in out and "cannot be" not in out and ("scenes" in out) == any("scenes" in li for li in lines)


@pytest.mark.parametrize("name, form, test", [
    ("loveda", "", "Test"), ("isaid", "beside", "test"), ("openearthmap", "all", "viru"),
    ("openearthmap", "all", "test.txt")])
def test_the_unlabelled_test_images_need_not_be_downloaded(name, form, test, tmp_path, capsys):
    make(tmp_path, name, form)
    shutil.move(tmp_path / test, tmp_path.with_name(f"{tmp_path.name}-away"))
    code = check([str(tmp_path), "--dataset", name])
    out = capsys.readouterr().out
    assert code == 0 and "note: no image of test is here" in out and "cannot be" not in out
    assert not read(tmp_path, name)[3].get("test")


def test_check_finds_a_video_in_both_lists(tmp_path, capsys):
    make(tmp_path, "aeroscapes", "ids")
    write(tmp_path / "ImageSets/trn.txt", "000001_001\n")
    write(tmp_path / "ImageSets/val.txt", "000001_002\n")
    check([str(tmp_path), "--dataset", "aeroscapes"])
    assert "1 of 4 scenes are in several splits, such as 000001 in train, val" in capsys.readouterr().out


def test_a_hold_out_keeps_videos_whole_and_final_keeps_all(tmp_path):
    make(tmp_path, "aeroscapes", "ids")
    _, _, _, splits = read(tmp_path, "aeroscapes", val_frac=0.5)
    scenes = [{n.split("/")[1][:6] for n in splits[s]} for s in ("train", "select", "val")]
    assert not scenes[0] & scenes[1] and scenes[2] == {"007001"} and sum(map(len, scenes)) == 4
    assert set(read(tmp_path, "aeroscapes", final=True)[3]) == {"train", "val"}
    assert read(tmp_path, "aeroscapes")[3] == read(tmp_path, "aeroscapes")[3]


def test_where_test_labels_are_hidden_val_is_reported_and_chooses_nothing(tmp_path):
    make(tmp_path, "openearthmap", "wo_xbd")
    assert {s: len(n) for s, n in read(tmp_path, "openearthmap")[3].items()} == {"train": 3, "val": 1, "test": 1}
    (tmp_path / "viru/labels/viru_2.tif").unlink()
    splits = read(tmp_path, "openearthmap")[3]
    assert {s: len(n) for s, n in splits.items()} in ({"train": 1, "select": 2, "val": 1},
                                                      {"train": 2, "select": 1, "val": 1})
    assert {n.split("/")[0] for n in splits["train"]} != {n.split("/")[0] for n in splits["select"]}
    (tmp_path / "tokyo/labels/tokyo_1.tif").unlink()
    assert "tokyo_1.tif: no mask for it" in refusal(tmp_path, "openearthmap")


def refusal(*args, **more):
    with pytest.raises(BadInput) as e:
        read(*args, **more)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_what_is_missing_doubled_or_unknown_is_named(tmp_path):
    make(tmp_path / "a", "aeroscapes", "ids")
    (tmp_path / "a/ImageSets/val.txt").unlink()
    assert "no ImageSets/val.txt there" in refusal(tmp_path / "a", "aeroscapes")
    make(tmp_path / "p", "potsdam", "rgb,full")
    assert "comes as rgb, irrg, rgbir, full, eroded" in refusal(tmp_path / "p", "potsdam", "irgb")
    assert "no 3_Ortho_IRRG/top_potsdam_*_IRRG.tif there" in refusal(tmp_path / "p", "potsdam", "irrg")
    assert "expected top/top_mosaic" not in refusal(tmp_path / "p", "vaihingen")
    make(tmp_path / "p", "potsdam", "irrg,full")
    assert "forms rgb and irrg; type --variant" in refusal(tmp_path / "p", "potsdam")
    d, pairs, labels, _ = read(tmp_path / "p", "potsdam", "irrg")
    assert d["variant"] == "irrg,full" and len(pairs) == 38 and "IRRG" in list(pairs)[0]
    save(tmp_path / "p/5_Labels_all/top_potsdam_2_10_label.tif", np.full((40, 48, 3), (252, 255, 0), np.uint8))
    with pytest.raises(BadInput, match="2_10_label.tif: unknown colours #FCFF00 on 1920 of 1920 pixels"):
        class_counts(pairs, labels)
    (tmp_path / "p/5_Labels_all/top_potsdam_7_13_label.tif").unlink()
    assert "7_13_IRRG.tif: no mask for it" in refusal(tmp_path / "p", "potsdam", "irrg")  # never zeros
    make(tmp_path / "i", "isaid", "folder")
    save(tmp_path / "i/train/Semantic_masks/images/P0999_instance_color_RGB.png", np.zeros((4, 4, 3), np.uint8))
    assert len(read(tmp_path / "i", "isaid")[1]) == 7  # a mask whose image is absent is left alone
    make(tmp_path / "i", "isaid", "beside")
    assert "forms folder and beside" in refusal(tmp_path / "i", "isaid")


def test_bands_are_stored_with_the_weights(forks, tmp_path):
    make(tmp_path / "d", "potsdam", "rgbir,full")
    flags = ["--dataset", "potsdam", "--root", tmp_path / "d", *TINY, "--crop", 32]
    text = forks.run("train_seg", *flags, "--out", tmp_path / "none", ok=2)
    assert "4 bands (RGB); expected 3: say which with --bands" in text and text.count("error") == 1
    assert "expected three numbers" in forks.run("train_seg", *flags, "--bands", "1,2", ok=2)
    assert "lower number first" in forks.run("train_seg", *flags, "--input-range", 9, 1, ok=2)
