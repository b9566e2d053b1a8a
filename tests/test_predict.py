"""predict.py: masks of images of any size, what is left out, and nothing of others overwritten."""
import shutil

import numpy as np
import onnxruntime
import pytest
import rasterio
import torch
from PIL import Image
from runs import (  # noqa: F401, forks is a fixture
    OLD_SPECS, TINY, forks, ids_of, matrix, old_run, read, server, tiny_set, trained)

from data.common import file_sha256, write
from data.datasets import normalise
from data.io import Labels
from data.tiff import write_tiff
from models.checkpoint import load_weights, save_weights
from models.vit import PRESETS
from predict import parse_args


@pytest.fixture
def run():
    return trained()


def scenes():
    return sorted((tiny_set() / "test/images").iterdir())


def ids(path):
    return np.asarray(Image.open(path))


def seen_in(folder):
    return {file.name for file in folder.iterdir() if not file.name.startswith(".")}


def grey(path, h, w):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((h, w, 3), 90, np.uint8)).save(path)
    return path


def test_every_image_gets_ids_colours_and_an_overlay(run, forks, tmp_path):
    text = forks.run("predict", run, tiny_set() / "test/images", "--out", tmp_path)
    names = [file.stem for file in scenes()]
    assert "masks of 3 images" in text and "3 of 3" in text
    written = {f"{name}{end}" for name in names for end in (".png", "_color.png", "_overlay.jpg")}
    assert seen_in(tmp_path) == written | {"classes.json", "summary.json"}
    classes = read(tmp_path / "classes.json")
    assert [c["value"] for c in classes] == [c["train_id"] for c in classes] == list(range(8))
    colors = Labels(read(tiny_set() / "dataset.json")["classes"]).colors
    for file in scenes():
        found = ids(tmp_path / file.name)
        assert found.shape == (64, 64) and len(np.unique(found)) > 1
        shown = Image.open(tmp_path / file.name).convert("RGB")
        np.testing.assert_array_equal(shown, colors[found])
        np.testing.assert_array_equal(ids(tmp_path / f"{file.stem}_color.png"), colors[found])
        overlay = ids(tmp_path / f"{file.stem}_overlay.jpg")
        assert overlay.shape[0] > 64 and overlay.shape[1] > 64  # a legend below


@pytest.mark.parametrize("spec", OLD_SPECS)
def test_runs_of_earlier_versions_predict(forks, tmp_path, spec):
    net = old_run(tmp_path / "old", OLD_SPECS[spec])
    file = scenes()[0]
    forks.run("predict", tmp_path / "old", file, "--out", tmp_path / "p")
    want = ids_of(net, file)
    assert (ids(tmp_path / "p" / file.name) != want).sum() <= 2  # two ways to round
    assert len(np.unique(want)) > 1


SIZES = [(1, 1), (40, 300), (65, 64), (1, 66_000)]  # the last is more than a JPEG holds


def test_any_size_and_a_file_that_cannot_be_read(run, forks, tmp_path):
    for h, w in SIZES:
        grey(tmp_path / f"in/sub/{h}x{w}.png", h, w)
    broken = tmp_path / "in/sub/broken.png"
    broken.write_bytes((tmp_path / "in/sub/40x300.png").read_bytes()[:60])
    (tmp_path / "in/notes.txt").write_text("not an image")
    grey(tmp_path / "in/._hidden.png", 4, 4)
    text = forks.run("predict", run, tmp_path / "in", "--out", tmp_path / "out", ok=2)
    assert f"left out: {broken}" in text and "masks of 4 images" in text and "hidden" not in text
    for h, w in SIZES:
        assert ids(tmp_path / f"out/sub/{h}x{w}.png").shape == (h, w)
    assert Image.open(tmp_path / "out/sub/1x66000_overlay.jpg").width == 33_000
    assert not (tmp_path / "out/sub/broken.png").exists()


def make_kinds(folder):
    """One scene in every form -> {name: why a run on colours of 8 bits leaves it out}."""
    rgb = np.asarray(Image.open(scenes()[0]))
    first = rgb[..., :1]
    deep = (rgb.astype(np.uint16) * 257)
    pictures = {"colours": Image.fromarray(rgb), "grey": Image.fromarray(first[..., 0]),
                "palette": Image.fromarray(rgb).quantize(64),
                "veiled": Image.fromarray(np.dstack([rgb, np.full_like(first, 255)])),
                "grey_veiled": Image.fromarray(np.dstack([first, np.full_like(first, 255)]))}
    folder.mkdir()
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    bands = {"tif_grey": first, "tif_colours": rgb, "tif_deep": deep, "tif_infrared": np.dstack([rgb, first])}
    for name, pixels in bands.items():
        write_tiff(folder / f"{name}.tif", pixels)
    return {"grey": "1 band of 8 bits", "grey_veiled": "1 band of 8 bits or 2 bands of 8 bits",
            "tif_grey": "1 band of 8 bits", "tif_deep": "3 bands of 16 bits", "tif_infrared": "4 bands of 8 bits"}


def test_images_of_another_kind_than_in_training_are_left_out(run, forks, tmp_path):
    left_out = make_kinds(tmp_path / "in")
    text = forks.run("predict", run, tmp_path / "in", "--out", tmp_path / "p", ok=2)
    for file in (tmp_path / "in").iterdir():
        told = [line for line in text.splitlines() if line.startswith(f"left out: {file}: ")]
        assert len(told) == (file.stem in left_out) == (not list((tmp_path / "p").glob(f"{file.stem}_overlay*")))
        if told:
            assert f": {left_out[file.stem]}; expected 3 bands of 8 bits, as in" in told[0]
    # How a file becomes one of that kind stands there once, not behind each of them.
    assert "masks of 4 images" in text and text.count("gdal_translate IN OUT.tif takes bands") == 1


def test_what_a_run_may_see_is_what_its_training_images_were(forks, tmp_path):
    """Grey, deep or of named bands: the others are of another kind. Runs of earlier versions take what they took."""
    make_kinds(tmp_path / "in")
    tensors, meta = load_weights(trained())
    deep = dict(bands=[1, 2, 3], input_range=[0, 65535])
    takes = {"grey": ([[1, 8]], {}, {"grey", "grey_veiled", "tif_grey"}),
             "deep": ([[3, 16]], deep, {"tif_deep"}),
             # Bands that were named are taken from images of three, too.
             "four": ([[4, 8]], dict(bands=[1, 2, 3]), {"veiled", "tif_infrared", "colours", "palette", "tif_colours"}),
             "both": ([[1, 8], [3, 8]], {}, {"grey", "grey_veiled", "tif_grey", "colours", "palette", "veiled",
                                             "tif_colours"}),
             "before": (None, {}, {"grey", "grey_veiled", "tif_grey", "colours", "palette", "veiled", "tif_colours"})}
    for name, (kinds, reading, want) in takes.items():
        new = dict(meta, kinds=kinds, reading=meta["reading"] | reading)
        save_weights(tmp_path / name / "best.safetensors", tensors, new)
        forks.run("predict", tmp_path / name, tmp_path / "in", "--out", tmp_path / "p" / name, ok=2)
        found = {file.stem.removesuffix("_overlay") for file in (tmp_path / "p" / name).glob("*_overlay.jpg")}
        assert found == want, name


@pytest.fixture(scope="module")
def by_colour(tmp_path_factory):
    """A run on the tiny set with masks of colours, all of them valid classes."""
    root = tmp_path_factory.mktemp("colour") / "set"
    shutil.copytree(tiny_set(), root)
    d = read(root / "dataset.json")
    colors = Labels(d["classes"]).colors
    for mask in root.glob("*/masks/*.png"):
        Image.fromarray(colors[ids(mask)]).save(mask)
    classes = [{"name": c["name"], "color": c["color"]} for c in d["classes"]]
    write(root / "dataset.json", d | {"classes": classes})
    server().run("train_seg", "--root", root, "--out", root.parent / "run", *TINY, "--steps", 2)
    return root.parent / "run"


def test_raw_labels_are_the_colours_of_the_training_masks(by_colour, forks, tmp_path):
    file = scenes()[0]
    forks.run("predict", by_colour, file, "--out", tmp_path / "raw", "--label-out", "raw")
    forks.run("predict", by_colour, file, "--out", tmp_path / "train")
    raw = ids(tmp_path / "raw" / file.name)
    np.testing.assert_array_equal(raw, ids(tmp_path / "train" / f"{file.stem}_color.png"))
    assert read(tmp_path / "raw/classes.json")[1]["value"] == "#a3d977"
    forks.run("predict", by_colour, tiny_set() / "test/images", "--out", tmp_path / "raw",
              "--label-out", "raw")
    masks = ["--masks", tmp_path / "raw", "--mask-ids", "raw", "--out", tmp_path / "e",
             "--workers", 0]
    forks.run("eval", by_colour, *masks)  # as a grader would read them
    assert matrix(tmp_path / "e/eval.json") == matrix(by_colour)


def test_raw_labels_are_the_ids_of_the_training_masks(forks, tmp_path):
    net = old_run(tmp_path / "old", next(iter(OLD_SPECS.values())))
    d = read(tiny_set() / "dataset.json")["classes"]
    assert [c["id"] for c in d] == list(range(8))
    tensors, meta = load_weights(tmp_path / "old")
    for c in meta["classes"]:
        c["id"] = 100 + 3 * c["id"]
    save_weights(tmp_path / "old/best.safetensors", tensors, meta)
    file = scenes()[0]
    forks.run("predict", tmp_path / "old", file, "--out", tmp_path / "p", "--label-out", "raw")
    assert (ids(tmp_path / "p" / file.name) != 100 + 3 * ids_of(net, file)).sum() <= 2


def test_what_is_transparent_gets_no_class(run, forks, tmp_path):
    image = Image.open(scenes()[0]).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 50, 30))  # left, top, right, bottom
    image.save(tmp_path / "a.png")
    forks.run("predict", run, tmp_path / "a.png", "--out", tmp_path / "p")
    found = ids(tmp_path / "p/a.png")
    assert (found[:30, :50] == 255).all() and (found == 255).sum() == 1500
    text = forks.run("predict", run, tmp_path / "a.png", "--out", tmp_path / "r",
                     "--label-out", "raw", ok=2)
    assert "--label-out train" in text and not (tmp_path / "r/a.png").exists()


def test_more_overlap_changes_the_answer_a_little(run, forks, tmp_path):
    file = scenes()[0]
    for overlap in (0, 0.25, 0.9):
        forks.run("predict", run, file, "--out", tmp_path / str(overlap), "--overlap", overlap)
    forks.run("predict", run, file, "--out", tmp_path / "default")
    found = {out.name: ids(out / file.name) for out in tmp_path.iterdir()}
    assert (found["default"] == found["0.25"]).all()
    assert 0.5 < (found["0"] == found["0.9"]).mean() < 1


# ---- nothing of others is overwritten

def test_results_of_the_same_classes_may_be_written_anew(run, by_colour, forks, tmp_path):
    file = grey(tmp_path / "a.png", 32, 32)
    for _ in range(2):
        forks.run("predict", run, file, "--out", tmp_path / "p")
    for other in (["--label-out", "raw"], []):
        text = forks.run("predict", by_colour, file, "--out", tmp_path / "p", *other, ok=2)
        assert "classes.json: of other classes or --label-out" in text


def test_files_of_the_user_stay(run, forks, tmp_path):
    file = grey(tmp_path / "in/a.png", 32, 32)
    write(tmp_path / "mine/classes.json", {"mine": 1})
    assert "of other classes" in forks.run("predict", run, file, "--out", tmp_path / "mine", ok=2)
    assert read(tmp_path / "mine/classes.json") == {"mine": 1}
    grey(tmp_path / "masks/a.png", 8, 8)
    text = forks.run("predict", run, file, "--out", tmp_path / "masks", ok=2)
    assert "masks/a.png: would be overwritten" in text and "--overwrite" in text
    text = forks.run("predict", run, file, "--out", tmp_path / "in", ok=2)
    assert "results would overwrite" in text and ids(file).shape == (32, 32, 3)


def test_two_images_of_one_name_are_refused(run, forks, tmp_path):
    a, b = grey(tmp_path / "x/a.png", 8, 8), grey(tmp_path / "y/a.png", 8, 8)
    text = forks.run("predict", run, a, b, "--out", tmp_path / "p", ok=2)
    assert f"{a} and {b}: the results of both would be called a; predict" in text and not (tmp_path / "p").exists()
    # Below one folder they keep their places.
    forks.run("predict", run, tmp_path, "--out", tmp_path / "p")
    assert ids(tmp_path / "p/x/a.png").shape == ids(tmp_path / "p/y/a.png").shape == (8, 8)


def test_patterns_and_nothing_found(run, forks, tmp_path):
    for name in "abc":
        grey(tmp_path / f"in/{name}.png", 8, 8)
    text = forks.run("predict", run, tmp_path / "in/[ab].png", "--out", tmp_path / "p")
    assert "masks of 2 images" in text and not (tmp_path / "p/c.png").exists()
    text = forks.run("predict", run, tmp_path / "in/z*.png", "--out", tmp_path / "q", ok=2)
    assert "z*.png: no such file or folder, and nothing fits it as a pattern" in text
    (tmp_path / "in/a.jp2").touch()
    text = forks.run("predict", run, tmp_path / "in/*.jp2", "--out", tmp_path / "q", ok=2)
    assert "no image there (.png .jpg" in text and "1 file is no image by its suffix: " in text


def test_folders_are_walked_through_links_and_what_is_passed_over_is_counted(run, forks, tmp_path):
    grey(tmp_path / "pool/1.5.png", 8, 8)
    grey(tmp_path / "in/a[1]/x.png", 8, 8)
    (tmp_path / "in/notes.txt").touch()
    (tmp_path / "in/more").symlink_to(tmp_path / "pool")
    (tmp_path / "in/round").symlink_to(tmp_path / "in")
    text = forks.run("predict", run, tmp_path / "in", "--out", tmp_path / "p")
    assert "masks of 2 images" in text and ids(tmp_path / "p/more/1.5.png").shape == (8, 8)
    assert f"note: 1 file is no image by its suffix: {tmp_path}/in/notes.txt" in text
    forks.run("predict", run, tmp_path / "in/a[1]/*.png", "--out", tmp_path / "q")
    assert ids(tmp_path / "q/x.png").shape == (8, 8)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_images(run, forks, tmp_path, ranks):
    forks.run("predict", run, tiny_set() / "test/images", "--out", tmp_path / "one")
    images = tiny_set() / "test/images"
    text = forks.run("predict", run, images, "--out", tmp_path / "many", ranks=ranks)
    assert "masks of 3 images" in text
    for file in (tmp_path / "one").glob("*.png"):
        np.testing.assert_array_equal(ids(file), ids(tmp_path / "many" / file.name))


def test_ranks_share_geotiffs_and_all_end_with_2_where_one_left_a_file_out(run, forks, tmp_path):
    for file, name in zip(scenes(), "abc"):
        with rasterio.open(tmp_path / f"{name}.tif", "w", driver="GTiff", width=64, height=64, count=3, dtype="uint8",
                           crs="EPSG:32632", transform=rasterio.Affine(0.5, 0, 5e5, 0, -0.5, 5e6)) as f:
            f.write(ids(file).transpose(2, 0, 1))
    broken = tmp_path / "b.tif"
    broken.write_bytes(broken.read_bytes()[:8000])
    text = forks.run("predict", run, tmp_path, "--out", tmp_path / "p", ranks=2, ok=2)  # rank 1 has b.tif
    assert f"left out: {broken}: truncated TIFF" in text and "masks of 2 images" in text
    summary = read(tmp_path / "p/summary.json")["images"]
    for name in "ac":
        with rasterio.open(tmp_path / f"p/{name}.tif") as f:
            found = np.bincount(f.read(1).ravel(), minlength=8).tolist()
        assert list(summary[name]["pixels"].values()) == found
    assert list(summary) == ["a", "c"] and not list((tmp_path / "p").glob("b*"))


# ---- several runs and views; models/ensemble.py has the arithmetic

@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Two runs of other networks, one window an image."""
    folder = tmp_path_factory.mktemp("others")
    a = old_run(folder / "a", OLD_SPECS["vit without final norm, blocks of its own"])
    b = old_run(folder / "b", dict(name="vit", backbone=PRESETS["nano8"], head="linear", taps=[3], feat_norm=True))
    return folder, a, b


def test_runs_and_views_are_averaged(others, forks, tmp_path):
    folder, a, b = others
    file = scenes()[0]
    forks.run("predict", folder / "a", file, "--out", tmp_path / "p", "--with", folder / "b", "--tta", "flips")
    x = normalise(np.asarray(Image.open(file)), "sat")[None]
    with torch.no_grad():
        p = sum(net(x.flip(axes)).softmax(1).flip(axes) for net in (a, b) for axes in ([], [2], [3], [2, 3]))
    want = p[0].argmax(0).numpy()
    assert (ids(tmp_path / "p" / file.name) != want).sum() <= 2  # two ways to round
    assert (ids_of(a, file) != want).mean() > 0.01 and len(np.unique(want)) > 1
    # The same images by other answers are predicted anew.
    text = forks.run("predict", folder / "a", file, "--out", tmp_path / "p")
    assert "by an earlier call" not in text
    assert (ids(tmp_path / "p" / file.name) != ids_of(a, file)).sum() <= 2


def test_export_writes_the_network_and_compares_it(others, forks, tmp_path):
    folder, _, b = others
    path, resolution = tmp_path / "model.onnx", ["--resolution", 12.5]
    assert "type --resolution 30" in forks.run("predict", folder / "b", "--export", path, ok=2)
    text = forks.run("predict", folder / "b", "--export", path, *resolution)
    assert f"wrote {path}: " in text and "100.00% of the pixels have the same class" in text
    assert 'press "Load default parameters"' in text
    session = onnxruntime.InferenceSession(path)
    assert session.get_modelmeta().custom_metadata_map["resolution"] == "12.5"
    x = np.asarray(Image.open(scenes()[0]), np.float32).transpose(2, 0, 1)[None] / 255
    (p,) = session.run(None, {"input": x})
    assert (p[0].argmax(0) != ids_of(b, scenes()[0])).sum() <= 2 and p.shape == (1, 8, 64, 64)
    # A calibrated run's temperature is in the file.
    sha = file_sha256(folder / "b/best.safetensors")
    write(folder / "b/calibration.json", dict(temperature=4.0, weights=sha))
    text = forks.run("predict", folder / "b", "--export", tmp_path / "soft.onnx", *resolution)
    assert "calibrated by 4.000" in text
    (soft,) = onnxruntime.InferenceSession(tmp_path / "soft.onnx").run(None, {"input": x})
    np.testing.assert_allclose(np.log(soft / soft[:, :1]), np.log(p / p[:, :1]) / 4, atol=2e-3)
    path.write_bytes(b"mine")
    text = forks.run("predict", folder / "b", "--export", path, *resolution, ok=2)
    assert "--overwrite" in text and path.read_bytes() == b"mine"
    assert "ends in .onnx" in forks.run("predict", folder / "b", "--export", tmp_path / "m", *resolution, ok=2)


def test_the_summary_keeps_masks_of_other_calls_while_they_are_there(run, forks, tmp_path):
    a, b, _ = scenes()
    out = ["--out", tmp_path / "p"]
    images = lambda: list(read(tmp_path / "p/summary.json")["images"])  # noqa: E731
    forks.run("predict", run, a, *out)
    said = forks.run("predict", run, b, "--confidence", *out)
    assert images() == [a.stem, b.stem] and "counts 1 more masks of earlier calls, 0 of them of other" in said
    grey(tmp_path / "broken.png", 8, 8).write_bytes(b"no image")
    forks.run("predict", run, tmp_path / "broken.png", *out, ok=2)
    assert images() == [a.stem, b.stem]
    grey(tmp_path / f"p/{a.stem}.png", 64, 64)  # by hand
    forks.run("predict", run, b, *out)
    assert images() == [b.stem]
    forks.run("predict", run, tmp_path / "broken.png", "--out", tmp_path / "q", ok=2)
    assert not (tmp_path / "q/summary.json").exists()


def test_what_a_run_has_no_use_for_is_refused_before_work(run, forks, tmp_path):
    said = forks.run("predict", run, scenes()[0], "--top", 5, "--montage", 2, ok=2)
    assert "classifies every pixel, which --top and --montage has no part in" in said
    said = forks.run("predict", run, scenes()[0], "--weights", run, ok=2)
    assert f"{run}: not the backbone of {run}, so --weights would not be used" in said
    twin = shutil.copytree(run, tmp_path / "twin")
    for flag in ("--with", "--soup"):
        for script, words in (("predict", [scenes()[0]]), ("eval", [])):
            said = forks.run(script, run, *words, flag, twin, ok=2)
            assert f"{twin}: the very weights of {run}, which would count twice" in said
    (twin / "best.safetensors").unlink()
    (twin / "results.json").unlink()
    said = forks.run("predict", twin, scenes()[0], ok=2)
    assert f"before the first validation, type its script with --resume {twin}" in said


def test_named_files_are_images_and_empty_words_are_none(forks, tmp_path):
    shutil.copy(grey(tmp_path / "z.png", 8, 8), tmp_path / "a.dat")
    text = forks.run("predict", trained(), tmp_path / "z.png", f"{tmp_path}/./a.dat", "--out", tmp_path / "p")
    assert "masks of 2 images" in text
    assert "images is empty; is the shell variable set?" in forks.run("predict", trained(), "", ok=2)
    assert "--with is empty" in forks.run("predict", trained(), tmp_path / "z.png", "--with", "", ok=2)


def test_a_path_that_the_shell_has_torn_is_put_together(run, forks, tmp_path):
    folder = tmp_path / "my maps"
    grey(folder / "a.png", 8, 8)
    torn = str(folder).split()
    said = forks.run("predict", run, *torn, "--out", tmp_path / "p", ok=2)
    assert f"{torn[0]}: no such file or folder" in said and f"goes into quotes: '{folder}'" in said
    shutil.copytree(run, folder / "run 1")
    torn = str(folder / "run 1").split()
    said = forks.run("predict", *torn, scenes()[0], "--out", tmp_path / "p", ok=2)
    assert f"goes into quotes: '{folder}/run 1'" in said


@pytest.mark.parametrize("flags, said", [
    ([], "no images: name them"),
    (["x.png", "--export", "a.onnx"], "predicts nothing; leave images out"),
    (["--export", "a.onnx", "--tta", "d4", "--out", "p"], "predicts nothing; leave --out and --tta out"),
    (["--export", "a.onnx", "--confidence", "--compile"], "leave --confidence and --compile out"),
    (["x.png", "--compile", "--tta", "d4"], "leave --with and --tta out"),
    (["x.png", "--resolution", "3"], "--resolution goes with --export")])
def test_flags_that_do_not_go_together(flags, said, capsys):
    with pytest.raises(SystemExit):
        parse_args(["run", *flags])
    assert said in capsys.readouterr().err
