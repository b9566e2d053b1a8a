"""eval.py: one matrix per split, of a model or anybody's masks; calibration; comparisons; a table of runs."""
import csv
import functools
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from runs import (
    OLD_SPECS, forks, ids_of, matrix, old_run, place, read, server, tiny_set, trained)  # noqa: F401
from scipy.ndimage import binary_dilation

from data.common import BadInput, write
from data.datasets import normalise
from data.io import Labels, read_image
from data.masks import find_masks, read_masks
from eval import parse_args
from models.nets import load_run
from models.vit import PRESETS

QUICK = ["--workers", 0]


@pytest.fixture
def run():
    return trained()


def scenes(split="test"):
    """(name, image, mask) of a split of the tiny set."""
    for image in sorted((tiny_set() / split / "images").iterdir()):
        yield f"{split}/images/{image.stem}", image, tiny_set() / split / "masks" / image.name


def counted(answers):
    """The confusion matrix of {image name: (H, W) ids} on the test scenes, pixel by pixel."""
    cm = np.zeros((8, 8), int)
    for name, _, mask in scenes():
        np.add.at(cm, (np.asarray(Image.open(mask)), answers[name]), 1)
    return cm.tolist()


def predicted(run, forks, out):
    forks.run("predict", run, tiny_set() / "test/images", "--out", out)
    return {name: np.asarray(Image.open(out / f"{image.stem}.png")) for name, image, _ in scenes()}


# ---- the model

def test_the_score_is_that_of_the_run_and_of_the_predicted_masks(run, forks, tmp_path):
    text = forks.run("eval", run, "--out", tmp_path / "e", *QUICK)
    assert "3 test images" in text and "test mIoU" in text and "always" in text
    assert matrix(tmp_path / "e/eval.json") == matrix(run)
    assert matrix(run) == counted(predicted(run, forks, tmp_path / "p"))
    report = read(tmp_path / "e/eval.json")
    assert report["protocol"]["images"] == 3 and report["split"] == "test"
    assert sum(map(sum, report["confusion"])) == 3 * 64 * 64
    assert Image.open(tmp_path / "e/confusion.png").size[0] > 100


def test_results_go_into_the_run_by_default(run, forks, tmp_path):
    copy = shutil.copytree(run, tmp_path / "a")
    forks.run("eval", copy / "best.safetensors", *QUICK)
    assert matrix(copy / "eval-test/eval.json") == matrix(run)


def test_it_is_said_when_the_images_chose_or_taught_the_weights(run, forks, tmp_path):
    for split in ("val", "train"):
        text = forks.run("eval", run, "--split", split, "--out", tmp_path / split, *QUICK)
        assert f"WARNING: the model's own {split} images" in text
    assert "WARNING" not in forks.run("eval", run, "--out", tmp_path, *QUICK)


def test_windows_may_overlap_otherwise(run, forks, tmp_path):
    forks.run("eval", run, "--overlap", 0.7, "--out", tmp_path, *QUICK)
    assert read(tmp_path / "eval.json")["protocol"]["overlap"] == 0.7
    assert matrix(tmp_path / "eval.json") != matrix(run)


@pytest.mark.parametrize("spec", OLD_SPECS)
def test_runs_of_earlier_versions_are_scored(forks, tmp_path, spec):
    net = old_run(tmp_path / "old", OLD_SPECS[spec])
    forks.run("eval", tmp_path / "old", "--out", tmp_path / "e", *QUICK)
    want = counted({name: ids_of(net, image) for name, image, _ in scenes()})
    difference = np.abs(np.subtract(matrix(tmp_path / "e/eval.json"), want)).sum()
    assert difference <= 4  # two ways to round, a pixel counts twice
    assert np.count_nonzero(np.sum(want, 0)) > 1  # it says more than one class


# ---- what else one call writes

@functools.cache
def scored():
    """A copy of the run that is calibrated on val, then scored on test with all that eval.py can write."""
    run = shutil.copytree(trained(), place() / "scored")
    calibrating = server().run("eval", run, "--split", "val", "--calibrate", *QUICK)
    assert "RUN" not in calibrating and f"wrote {run}/calibration.json" in calibrating
    for where in ("maps", "vectors"):
        flags = ["--probabilities", run / where] if where == "maps" else ["--features", run / where]
        server().run("eval", run, *flags, *QUICK)
    return run


@functools.cache
def own_probabilities():
    """{name: (H, W, 8)} of the test scenes by 0..255 in the files."""
    index = read(scored() / "maps/index.json")
    found = {}
    for name, file in index["images"].items():
        with rasterio.open(scored() / "maps" / file) as f:
            assert list(f.descriptions) == index["classes"]
            found[name] = f.read().transpose(1, 2, 0)
    return found


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_probabilities_are_a_tiff_per_image_and_an_index():
    run = scored()
    index = read(run / "maps/index.json")
    about = ("run", "weights", "root", "split", "classes", "temperature")
    sha = hashlib.sha256((run / "best.safetensors").read_bytes()).hexdigest()
    classes = [c["name"] for c in read(tiny_set() / "dataset.json")["classes"]]
    temperature = read(run / "calibration.json")["temperature"]
    assert [index[key] for key in about] == [str(run), sha, str(tiny_set()), "test", classes, temperature]
    maps = own_probabilities()
    assert set(maps) == {name for name, *_ in scenes()}
    assert index["source"] == "folder" and index["variant"] is None
    assert index["reading"] == dict(bands=None, input_range=None)
    assert all(np.abs(p.sum(2, dtype=int) - 255).max() <= 4 for p in maps.values())
    # The winners are the prediction, but for the few pixels where rounding leaves two of them.
    wrong = counted({name: p.argmax(2) for name, p in maps.items()})
    assert np.abs(np.subtract(wrong, matrix(run))).sum() < 0.01 * np.sum(wrong)


def test_calibration_is_fitted_on_val_and_counts_for_test():
    run = scored()
    about = read(run / "calibration.json")
    assert about["weights"] == hashlib.sha256((trained() / "best.safetensors").read_bytes()).hexdigest()
    assert about["split"] == "val" and about["pixels"] == 2 * 64 * 64 and about["nll_after"] <= about["nll_before"]
    report = read(run / "eval-test/eval.json")
    assert report["protocol"]["temperature"] == about["temperature"] and report["ece_calibrated"] != report["ece"]
    error = 0  # of the files' rounded probabilities, by hand
    hits, sums, pixels = (np.zeros(15) for _ in range(3))
    for name, _, mask in scenes():
        p = own_probabilities()[name]
        right = p.argmax(2) == np.asarray(Image.open(mask))
        for b in range(15):
            here = np.clip(p.max(2) / 255 * 15, 0, 14.99).astype(int) == b
            hits[b] += right[here].sum()
            sums[b] += (p.max(2)[here] / 255).sum()
            pixels[b] += here.sum()
    error = np.abs(hits - sums).sum() / pixels.sum()
    assert report["ece_calibrated"] == pytest.approx(error, abs=0.01) and error > 0.02
    assert Image.open(run / "eval-test/reliability.png").size[0] > 100


def test_a_temperature_of_other_weights_is_not_used(run, forks, tmp_path):
    copy = shutil.copytree(scored(), tmp_path / "a")
    write(copy / "calibration.json", read(copy / "calibration.json") | dict(weights="0" * 64))
    text = forks.run("eval", copy, "--out", tmp_path / "e", *QUICK)
    assert "calibration.json is of other weights" in text
    report = read(tmp_path / "e/eval.json")
    assert report["ece_calibrated"] is None and report["protocol"]["temperature"] is None


@pytest.mark.parametrize("split, named, said", [
    ("test", "test", "its images are reported; type --split val"),
    ("train", "train", "its images are trained on; type --split val"),
    ("test", "mine", "its images are reported; type --split val")])  # by another name, and only some of them
def test_what_is_reported_cannot_calibrate(run, forks, tmp_path, split, named, said):
    write(tmp_path / "split.json", {named: read(run / "split.json")[split][:2]})
    text = forks.run("eval", run, "--split", named, "--split-file", tmp_path / "split.json", "--calibrate",
                     "--out", tmp_path / "e", *QUICK, ok=2)
    assert f"--calibrate on {named}: {said}" in text
    assert not (run / "calibration.json").exists() and not (tmp_path / "e").exists()


def test_features_are_the_mean_patch_tokens_of_all_windows():
    run = scored()
    index = read(run / "vectors/index.json")
    features = np.load(run / "vectors" / index["features"])
    assert index["names"] == [name for name, *_ in scenes()] and index["split"] == "test"
    net, meta = load_run(run)
    taps, mean, std = net.taps, np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    assert meta["norm"] == "imagenet" and meta["crop"] == 32 and meta["overlap"] == 0.25
    for (_, image, _), vector in zip(scenes(), features):
        x = torch.tensor(((read_image(image) / 255 - mean) / std).transpose(2, 0, 1), dtype=torch.float32)
        parts = []
        for top in (0, 24, 32):  # steps of 24, the last window shifted inwards
            for left in (0, 24, 32):
                with torch.no_grad():
                    tokens = net.backbone(x[None, :, top:top + 32, left:left + 32], taps)[0][-1]
                parts.append(tokens[0].flatten(1).mean(1))
        np.testing.assert_allclose(vector, torch.stack(parts).mean(0).numpy(), atol=1e-4)
    assert np.abs(features[0] - features[1]).max() > 0.01


def test_each_image_has_a_row_and_all_add_up():
    run = scored()
    with open(run / "eval-test/scenes.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["image"] for row in rows] == [name for name, *_ in scenes()]
    arrays = np.load(run / "eval-test/matrices.npz")
    assert arrays["matrices"].sum(0).tolist() == matrix(run)
    for row, cm in zip(rows, arrays["matrices"]):
        seen = cm.sum(0) + cm.sum(1) > 0
        ious = cm.diagonal()[seen] / (cm.sum(0) + cm.sum(1) - cm.diagonal())[seen]
        assert float(row["mIoU"]) == pytest.approx(ious.mean(), abs=1e-6) and row["pixels"] == "4096"
        assert float(row["OA"]) == pytest.approx(cm.trace() / 4096, abs=1e-6)
    report = read(run / "eval-test/eval.json")
    low, high = report["interval"]["miou"]
    assert report["interval"]["scenes"] == 3 and low < report["miou"] < high
    assert Image.open(run / "eval-test/worst.png").size[1] > 3 * 256


def test_the_protocol_says_what_was_scored_how():
    protocol = read(scored() / "eval-test/eval.json")["protocol"]
    want = dict(dataset="demo", split="test", images=3, ignore_boundary=0, tta="none", crop=32, overlap=0.25,
                boundary_f1="tolerance 3 pixels", ignore=read(tiny_set() / "dataset.json")["ignore"])
    assert {key: protocol[key] for key in want} == want
    assert protocol["files"] == read(scored() / "protocol.json")["splits"]["test"]
    assert protocol["torch"] == torch.__version__ and "pool" in protocol["classes"]


def test_two_ranks_write_the_same_numbers(forks, tmp_path):
    copy = shutil.copytree(scored(), tmp_path / "a", ignore=shutil.ignore_patterns("eval-*", "calib*", ".written*"))
    flags = ["--split", "val", "--calibrate", "--features", tmp_path / "v", *QUICK]
    forks.run("eval", copy, *flags, ranks=2)
    reports = [read(run / "eval-val/eval.json") for run in (copy, scored())]
    for report in reports:
        assert report.pop("protocol")
    assert reports[0] == reports[1]
    assert read(copy / "calibration.json") == read(scored() / "calibration.json")
    for file in ("scenes.csv", "worst.png"):
        assert (copy / "eval-val" / file).read_bytes() == (scored() / "eval-val" / file).read_bytes()
    assert len(np.load(tmp_path / "v/features.npy")) == 2


def test_pixels_near_another_label_do_not_count_where_that_is_wanted(run, forks, tmp_path):
    forks.run("eval", run, "--ignore-boundary", 2, "--out", tmp_path / "e", *QUICK)
    answers, cm = predicted(run, forks, tmp_path / "p"), np.zeros((8, 8), int)
    disk = np.add.outer(np.arange(-2, 3) ** 2, np.arange(-2, 3) ** 2) <= 4
    for name, _, mask in scenes():
        true = np.asarray(Image.open(mask))
        kept = [(true == c) & ~binary_dilation(true != c, disk) for c in range(8)]
        inside = np.any(kept, 0)
        np.add.at(cm, (true[inside], answers[name][inside]), 1)
    report = read(tmp_path / "e/eval.json")
    assert report["confusion"] == cm.tolist() and report["protocol"]["ignore_boundary"] == 2
    for c, (name, iou) in enumerate(report["iou"].items()):  # absent: neither true nor predicted where it counts
        union = cm[c].sum() + cm[:, c].sum() - cm[c, c]
        assert iou == (pytest.approx(cm[c, c] / union, abs=1e-6) if union else None)
        assert (name in report["absent"]) == (union == 0)


def test_results_that_somebody_changed_are_not_replaced(run, forks, tmp_path):
    masks = [run, "--masks", tiny_set() / "test/masks", "--mask-ids", "raw", "--out", tmp_path, *QUICK]
    for _ in range(2):
        forks.run("eval", *masks)
    (tmp_path / "scenes.csv").write_text("corrected by hand")
    said = forks.run("eval", *masks, ok=2)
    assert f"{tmp_path}/scenes.csv: would be overwritten" in said and said.count("error: ") == 1
    assert (tmp_path / "scenes.csv").read_text() == "corrected by hand"
    forks.run("eval", *masks, "--overwrite")
    assert (tmp_path / "scenes.csv").read_text().startswith("image,")


def test_results_of_another_protocol_are_not_replaced_unasked(run, forks, tmp_path):
    copy = shutil.copytree(run, tmp_path / "a", ignore=shutil.ignore_patterns("eval-*"))
    for _ in range(2):
        forks.run("eval", copy, *QUICK)
    before = (copy / "eval-test/eval.json").read_bytes()
    overlap, border = "overlap 0.25, now 0.5", "ignore_boundary 0, now 1"
    for flags, said in ((["--overlap", 0.5], overlap),
                        (["--overlap", 0.5, "--ignore-boundary", 1], f"{border}; {overlap}")):
        text = forks.run("eval", copy, *flags, *QUICK, ok=2)
        assert f"eval-test: holds results of another protocol ({said}); name" in text
        assert (copy / "eval-test/eval.json").read_bytes() == before and text.count("error: ") == 1
    moved = copy.rename(tmp_path / "b")
    forks.run("eval", moved, *QUICK)
    forks.run("eval", moved, "--overlap", 0.5, "--overwrite", *QUICK)
    assert read(moved / "eval-test/eval.json")["protocol"]["overlap"] == 0.5
    # A folder that was named may hold the results of another run, or of other masks.
    forks.run("eval", moved, "--out", tmp_path / "e", *QUICK)
    said = forks.run("eval", run, "--out", tmp_path / "e", *QUICK, ok=2)
    assert f"run '{moved}', now '{run}'" in said


def test_images_of_another_kind_than_in_training_are_not_scored(run, forks, tmp_path):
    root = shutil.copytree(tiny_set(), tmp_path / "grey")
    file = next((root / "test/images").iterdir())
    Image.open(file).convert("L").save(file)
    said = forks.run("eval", run, "--root", root, "--out", tmp_path / "e", *QUICK, ok=2)
    assert f"{file}: 1 band of 8 bits; expected 3 bands of 8 bits" in said and said.count("error: ") == 1
    assert not (tmp_path / "e").exists()


def test_probabilities_and_features_share_a_folder_of_one_model(run, forks, tmp_path):
    both = tmp_path / "both"
    forks.run("eval", run, "--probabilities", both, "--out", tmp_path / "e", *QUICK)
    forks.run("eval", run, "--features", both, "--out", tmp_path / "e", *QUICK)
    index = read(both / "index.json")
    assert len(index["images"]) == len(index["names"]) == 3 and index["features"] == "features.npy"
    val = [run, "--split", "val", "--features", both, "--out", tmp_path / "v", *QUICK]
    assert "index.json: of another split; name another folder" in forks.run("eval", *val, ok=2)
    assert read(both / "index.json") == index
    forks.run("eval", *val, "--overwrite")
    index = read(both / "index.json")
    assert index["split"] == "val" and "images" not in index  # they were of test


# ---- data that has moved or changed

def test_data_may_stand_elsewhere_and_list_its_classes_in_another_order(run, forks, tmp_path):
    root = shutil.copytree(tiny_set(), tmp_path / "moved")
    d = read(root / "dataset.json")
    write(root / "dataset.json", d | {"classes": d["classes"][::-1]})
    forks.run("eval", run, "--root", root, "--out", tmp_path / "e", *QUICK)
    assert matrix(tmp_path / "e/eval.json") == matrix(run)


def test_other_classes_and_splits_are_refused(run, forks, tmp_path):
    said = forks.run("eval", run, "--split", "nonsense", ok=2)
    assert "no split 'nonsense'; type --split with one of: train, val, test" in said
    root = shutil.copytree(tiny_set(), tmp_path / "other")
    d = read(root / "dataset.json")
    d["classes"][3]["name"] = "sea"
    write(root / "dataset.json", d)
    said = forks.run("eval", run, "--root", root, ok=2)
    assert "sea" in said and "the model knows field" in said and said.count("\n") == 1


# ---- anybody's masks

def test_masks_are_scored_like_the_model_that_made_them(run, forks, tmp_path):
    predicted(run, forks, tmp_path / "p")
    assert "type train" in forks.run("eval", run, "--masks", tmp_path / "p", ok=2)  # never a guess
    masks = ["--masks", tmp_path / "p", "--mask-ids", "train", "--out", tmp_path / "e", *QUICK]
    forks.run("eval", run, *masks)
    assert matrix(tmp_path / "e/eval.json") == matrix(run)
    *_, (_, image, _) = scenes()
    (tmp_path / "p" / image.name).unlink()
    assert f"no {image.stem}.png (or .tif) there" in forks.run("eval", run, *masks, ok=2)


def test_masks_that_have_nothing_to_do_with_the_labels_are_suspected(run, forks, tmp_path):
    rng = np.random.default_rng(0)
    for _, image, _ in scenes():
        noise = rng.integers(0, 8, (64, 64)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{image.stem}.png")
    masks = ["--masks", tmp_path, "--mask-ids", "train", "--out", tmp_path / "e", *QUICK]
    assert "no better than chance; are the masks of this --split" in forks.run("eval", run, *masks)
    gone = ["--masks", tmp_path / "gone", "--mask-ids", "train", "--out", tmp_path / "e", *QUICK]
    assert "gone: no such folder" in forks.run("eval", run, *gone, ok=2)


def test_masks_lie_equally_deep_below_the_folder_or_are_refused(tmp_path):
    names = ["a/x/1", "a/y/1", "b/é"]
    for layout, want in ((["a/x/1.png", "a/y/1.PNG", "b/e\u0301.png"],) * 2,
                         (["x/1.png", "y/1.png", "é.png", "b/é_color.png"], ["x/1.png", "y/1.png", "é.png"])):
        folder = tmp_path / str(len(layout))
        for name in layout:
            write(folder / name, b"")
        assert find_masks(folder, names) == {n: folder / m for n, m in zip(names, want)}
    write(tmp_path / "p/1.png", b"")
    write(tmp_path / "p/é.png", b"")
    with pytest.raises(BadInput, match="images of one name in several folders"):
        find_masks(tmp_path / "p", names)
    (tmp_path / "3/b/e\u0301.png").unlink()
    write(tmp_path / "3/é.png", b"")  # would fit if this name alone were shortened
    with pytest.raises(BadInput, match="3: no 1.png .or .tif. there, and no a/x/1.png"):
        find_masks(tmp_path / "3", names)
    with pytest.raises(BadInput, match="none: no such folder"):
        find_masks(tmp_path / "none", names)


def as_tif(ids, file, colors):
    file.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(file, "w", driver="GTiff", width=64, height=64, count=1, dtype="uint8", nodata=255,
                       crs="EPSG:32633", transform=rasterio.Affine(0.5, 0, 5e5, 0, -0.5, 5e6)) as f:
        f.write(ids, 1)


def as_palette(ids, file, colors):
    image = Image.fromarray(20 - ids, "P")  # other ids, the same colours
    table = np.zeros((256, 3), np.uint8)
    table[20 - np.arange(8)] = colors
    image.putpalette(table.tobytes())
    image.save(file)


def as_colors(ids, file, colors):
    Image.fromarray(colors[ids]).save(file.with_suffix(".bmp"))


@pytest.mark.parametrize("save, suffix, values", [
    (as_tif, ".tif", "train"), (as_tif, ".TIF", "raw"), (as_palette, ".png", "color"),
    (as_colors, ".png", "color")])
def test_masks_of_any_format_are_scored_without_a_run(run, forks, tmp_path, save, suffix, values):
    classes = read(tiny_set() / "dataset.json")["classes"]
    colors = np.array([list(bytes.fromhex(c["color"][1:])) for c in classes], np.uint8)
    answers = {}
    (tmp_path / "m").mkdir()
    for i, (name, image, _) in enumerate(scenes()):
        answers[name] = np.random.default_rng(i).integers(0, 8, (64, 64)).astype(np.uint8)
        save(answers[name], tmp_path / "m" / f"{image.stem}{suffix}", colors)
    forks.run("eval", "--masks", tmp_path / "m", "--mask-ids", values, "--root", tiny_set(), *QUICK)
    report = read(tmp_path / "m/eval-test/eval.json")
    assert report["confusion"] == counted(answers)
    assert report["protocol"]["run"] is None and report["ece"] is None


def test_two_masks_of_one_image_are_never_chosen_from(tmp_path):
    for name in ("a.png", "a.jpg", "b.tif"):
        write(tmp_path / name, b"")
    assert find_masks(tmp_path, ["a", "b"]) == {"a": tmp_path / "a.png", "b": tmp_path / "b.tif"}
    write(tmp_path / "b.png", b"")
    with pytest.raises(BadInput, match="b.png and .*b.tif: two masks of one image; take one away"):
        find_masks(tmp_path, ["a", "b"])


def test_the_truth_itself_scores_one(run, forks, tmp_path):
    text = forks.run("eval", run, "--masks", tiny_set() / "test/masks", "--mask-ids", "raw",
                     "--out", tmp_path, *QUICK)
    report = read(tmp_path / "eval.json")
    assert "mIoU 1.0000" in text and report["oa"] == report["miou"] == 1


def test_every_labelled_pixel_needs_an_answer(run, forks, tmp_path):
    predicted(run, forks, tmp_path)
    name = next(scenes())[1].name
    ids = np.array(Image.open(tmp_path / name))
    ids[0, 0] = 255
    Image.fromarray(ids).save(tmp_path / name)
    masks = ["--masks", tmp_path, "--mask-ids", "train", "--out", tmp_path / "e", *QUICK]
    said = forks.run("eval", run, *masks, ok=2)
    assert f"{name}: no class (255, transparent or nodata) on 1 labelled pixels" in said
    Image.fromarray(ids[:60]).save(tmp_path / name)
    said = forks.run("eval", run, *masks, ok=2)
    assert f"{name}: 60 x 64 pixels (H x W); expected 64 x 64" in said
    # What the file calls nodata is no class either, whatever its number.
    values = np.where(ids == 255, np.float32(-9999), ids)
    (tmp_path / name).unlink()
    with rasterio.open(tmp_path / f"{Path(name).stem}.tif", "w", driver="GTiff", width=64, height=64, count=1,
                       dtype="float32", nodata=-9999) as f:
        f.write(values, 1)
    assert "nodata) on 1 labelled pixels" in forks.run("eval", run, *masks, ok=2)


@pytest.mark.parametrize("paint, found", [
    (lambda ids: np.stack([ids, ids, 255 - ids], 2), "a colour mask, but the label table lists ids"),
    (lambda ids: ids + 100, "unknown ids 1")])
def test_masks_of_others_are_not_blamed_on_the_label_table(run, forks, tmp_path, paint, found):
    for name, image, mask in scenes():
        Image.fromarray(paint(np.array(Image.open(mask)))).save(tmp_path / f"{image.stem}.png")
    said = forks.run("eval", run, "--masks", tmp_path, "--mask-ids", "train", "--out", tmp_path / "e", *QUICK, ok=2)
    assert found in said and "dataset.json" not in said and "color for the classes' colours" in said


def test_a_mask_keeps_its_classes_where_labels_are_ignored(tmp_path):
    """Labels of before a review may count there."""
    y = np.array([[255, 255, 1]], np.uint8)
    Image.fromarray(np.array([[1, 255, 1]], np.uint8)).save(tmp_path / "a.png")
    table = Labels([dict(name="x", id=0), dict(name="y", id=1)], [255])

    class Data(list):
        names, labels = ["a"], table

        def read(self, i):
            return None, y
    (_, _, ids), = read_masks({"a": tmp_path / "a.png"}, table, Data([0]), 0, 1)
    assert ids.tolist() == [[1, 0, 1]]


# ---- difficulty

def test_difficulty_counts_the_classes_of_an_image_with_a_low_iou(run, forks, tmp_path):
    text = forks.run("eval", run, "--difficulty", "--out", tmp_path / "e", *QUICK)
    assert f"--difficulty {tmp_path}/e/difficulty.json" in text
    want, answers = {}, predicted(run, forks, tmp_path / "p")
    for name, _, mask in scenes():
        true, pred = np.asarray(Image.open(mask)), answers[name]
        want[name] = 0
        for c in np.unique(true):
            both, either = (true == c) & (pred == c), (true == c) | (pred == c)
            want[name] += int(both.sum() < 0.5 * either.sum())
    assert read(tmp_path / "e/difficulty.json") == want and len(set(want.values())) > 1


# ---- which run is better

def test_results_are_compared_where_they_can_be(forks, tmp_path):
    for name, overlap in (("a", 0), ("b", 0.7)):
        forks.run("eval", trained(), "--overlap", overlap, "--out", tmp_path / name, *QUICK)
    text = forks.run("eval", "--compare", tmp_path / "a", tmp_path / "b/eval.json")
    a, b = (read(tmp_path / name / "eval.json")["miou"] for name in "ab")
    (line,) = [line for line in text.splitlines() if line.startswith("mIoU")]
    assert line.split()[1:4] == [f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}"] and a != b
    forks.run("eval", "--compare", scored(), tmp_path / "a")
    said = forks.run("eval", "--compare", scored(), scored() / "eval-val", ok=2)
    assert "cannot be compared, they differ in split: test and val" in said and said.count("\n") == 1


# ---- the table of several runs

def test_the_summary_has_a_row_per_experiment(run, forks, tmp_path):
    results = read(run / "results.json")
    for seed in (1, 2):  # two more runs of the experiment, as if their scores were these
        copy = shutil.copytree(run, tmp_path / f"seed-{seed}")
        protocol = read(copy / "protocol.json")
        protocol["flags"] |= dict(seed=seed, steps=99)
        write(copy / "protocol.json", protocol)
        write(copy / "results.json", results | dict(miou=0.2 * seed, seed=seed))
    shutil.copytree(run, tmp_path / "killed", ignore=shutil.ignore_patterns("results.json"))
    runs = run, tmp_path / "seed-1", tmp_path / "seed-2", tmp_path / "killed", tiny_set()
    head, _, first, second, last = forks.run("eval", "--summary", *runs).splitlines()
    assert head.count("|") == first.count("|") == second.count("|")
    n, miou = results["classes_in_mean"], results["miou"]
    assert first.startswith(f"| trained | demo | test | {n} of 8 | 0 | {miou:.4f} |")
    assert second.startswith(f"| seed-1, seed-2 | demo | test | {n} of 8 | 1, 2 | "
                             "0.3000 +/- 0.1414 |")
    assert "killed: not finished" in last
    results |= dict(split="val")
    write(tmp_path / "seed-2/results.json", results)
    *_, last = forks.run("eval", "--summary", run, tmp_path / "seed-2").splitlines()
    assert last == "not comparable: trained and seed-2 differ in split, images of the split"
    assert "no results.json" in forks.run("eval", "--summary", tiny_set(), ok=2)
    copy = shutil.copytree(run, tmp_path / "copy")
    *_, row, twice = forks.run("eval", "--summary", run, copy).splitlines()
    assert row.startswith(f"| trained | demo | test | {n} of 8 | 0 | {miou:.4f} |")
    assert twice == f"{copy}: the results of trained once more, not counted"
    assert "gone: no such folder" in forks.run("eval", "--summary", run, tmp_path / "gone", ok=2)


@pytest.mark.parametrize("argv, said", [
    ([], "name one run folder, or several after --summary"),
    (["a", "--summary", "b"], "name one run folder"),
    (["RUN", "--mask-ids", "raw"], "--mask-ids goes with --masks"),
    (["--compare", "a"], "--compare: expected 2 arguments"),
    (["--masks", "a", "--mask-ids", "raw"], "or --masks with --root"),
    (["RUN", "--masks", "a", "--mask-ids", "raw", "--calibrate"], "--calibrate asks the model"),
    (["RUN", "--ignore-boundary", "-1"], "expected a whole number from 0 to 1000"),
    (["RUN", "--split", "val", "--calibrate", "--ignore-boundary", "3"], "leave --ignore-boundary out"),
    (["none"], "none: no such file; train first"),
    (["RUN", "--overlap", "1"], "expected a number from 0 to 0.9")])
def test_what_is_typed_wrong(run, forks, argv, said):
    text = forks.run("eval", *[run if a == "RUN" else a for a in argv], ok=2)
    assert said in text and text.startswith("error: ") and text.count("\n") == 1


def test_results_are_json_that_others_read(run, forks, tmp_path):
    forks.run("eval", run, "--out", tmp_path, *QUICK)

    def refuse(constant):
        raise AssertionError(constant)  # NaN and Infinity are no JSON

    json.loads((tmp_path / "eval.json").read_text(), parse_constant=refuse)


# ---- several runs and views

def test_runs_and_views_are_averaged(forks, tmp_path):
    a = old_run(tmp_path / "a", OLD_SPECS["vit without final norm, blocks of its own"])
    b = old_run(tmp_path / "b", dict(name="vit", backbone=PRESETS["nano8"], head="linear", taps=[3], feat_norm=True))
    text = forks.run("eval", tmp_path / "a", "--with", tmp_path / "b", "--tta", "flips", *QUICK)
    out = tmp_path / "a/eval-test-with-flips"
    assert f"wrote {out}/" in text
    answers = {}
    for name, image, _ in scenes():
        x = normalise(np.asarray(Image.open(image)), "sat")[None]
        with torch.no_grad():
            p = sum(net(x.flip(axes)).softmax(1).flip(axes) for net in (a, b) for axes in ([], [2], [3], [2, 3]))
        answers[name] = p[0].argmax(0).numpy()
    difference = np.subtract(matrix(out / "eval.json"), counted(answers))
    assert np.abs(difference).sum() <= 6  # two ways to round
    protocol = read(out / "eval.json")["protocol"]
    assert (protocol["tta"], protocol["with"]) == ("flips", str(tmp_path / "b"))


@pytest.mark.parametrize("flags, said", [
    (["run", "--tta", "d4", "--calibrate"], "--calibrate is of one run as it is"),
    (["run", "--with", "b", "--features", "F"], "--features are of one network"),
    (["--masks", "M", "--mask-ids", "raw", "--root", "D", "--soup", "b"], "--soup asks the model, --masks does not")])
def test_flags_of_averages_that_do_not_fit(flags, said, capsys):
    with pytest.raises(SystemExit):
        parse_args(flags)
    assert said in capsys.readouterr().err
