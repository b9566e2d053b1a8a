"""From a folder of GeoTIFFs to predictions: every step is the command that the step before has printed."""
import json
import re
import shlex
import signal

import numpy as np
import pytest
import rasterio
from runs import forks, interrupt, read, same_run  # noqa: F401, forks is a fixture

from data.check.__main__ import main as data_check
from data.common import write
from data.source import Source
from models.checkpoint import load_weights

SIDE, RIM = 64, 8
SHORT = ["--steps", 2, "--eval-every", 1, "--batch-size", 2, "--crop", 32, "--arch", "nano16", "--workers", 0]


def geotiff(path, a, nodata=None, west=0):
    """(H, W, n) by GDAL, as rasterio's defaults have it, each at its own place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    place = rasterio.transform.from_origin(500000 + 10 * west, 5000000, 10, 10)
    h, w, n = a.shape
    with rasterio.open(path, "w", "GTiff", w, h, n, dtype=a.dtype, nodata=nodata, crs="EPSG:32633",
                       transform=place, compress="deflate") as f:
        f.write(np.moveaxis(a, -1, 0))


def scenes(root, soft=False):
    """Ten scenes of four 16-bit bands (blue, green, red, infrared) with a rim of nodata 0."""
    rng = np.random.default_rng(0)
    for i in range(10):
        water = np.add.outer(np.arange(SIDE), np.arange(SIDE)) > SIDE + 4 * i - 20
        a = rng.integers(300, 500, (SIDE, SIDE, 4)) + np.where(water[..., None], [50, 40, 0, 0], [0, 100, 200, 2500])
        a[:, :RIM] = 0
        geotiff(root / f"images/tile_{i}.tif", a.astype(np.uint16), nodata=0, west=100 * i)
        mask = np.where(water, 2, 1).astype(np.uint8)
        mask[:RIM] = 255  # nobody has labelled it
        if soft:
            edge = np.add.outer(np.arange(SIDE), np.arange(SIDE)) - (SIDE + 4 * i - 20)
            mask = (255 / (1 + np.exp(-2.0 * edge))).round().astype(np.uint8)
            noise = (rng.random(mask.shape) < 0.03) * rng.integers(0, 100, mask.shape)
            mask = np.where(mask < 128, mask + noise.clip(max=100), mask - noise).astype(np.uint8)
        geotiff(root / f"masks/tile_{i}.tif", mask[..., None], nodata=None if soft else 255, west=100 * i)
    return root


def check(capsys, words):
    """data.check, as the words of a command -> exit code, last line."""
    assert words[0] == "python" and (words[1:3] == ["-m", "data.check"] or words[1].endswith("data/check"))
    code = data_check(words[3 if words[1] == "-m" else 2:])
    out = capsys.readouterr()
    return code, (out.out + out.err).splitlines()


def command(line, script):
    """The words of "... python /path/SCRIPT.py A B" behind the script's name."""
    words = shlex.split(re.search(rf"python \S*{script}.*", line)[0])
    return words[2:]


def test_16_bits_and_four_bands_from_draft_to_prediction(tmp_path, capsys, forks):
    root = scenes(tmp_path / "set")
    code, lines = check(capsys, ["python", "-m", "data.check", str(root)])
    assert code == 2 and any("4 bands" in line and "choose three, such as --bands" in line for line in lines)
    again = shlex.split(lines[-1].partition("then type: ")[2])
    assert again[-2:] == ["--bands", "1,2,3"]
    code, lines = check(capsys, [*again[:-1], "3,2,1"])  # red, green, blue
    assert not any("dataset.json" in line and "no images" in line for line in lines)
    assert code == 0 and any("value 255 is nodata by a tag of the masks" in line for line in lines)
    d = read(root / "dataset.json")
    assert d["bands"] == [3, 2, 1] and d["ignore"] == [255] and [c["id"] for c in d["classes"]] == [1, 2]
    code, lines = check(capsys, shlex.split(lines[-1].partition("then: ")[2]))
    told = [line for line in lines if line.startswith(("error", "note"))]
    assert code == 0 and len(told) == 1 and "classes are called id_1, id_2 as in a draft" in told[0]

    # The printed command trains; only shorter.
    flags = command(lines[-1], "train_seg.py")
    out = tmp_path / "run"
    text = forks.run("train_seg", *flags, *SHORT, "--out", out)
    files = [root / f"{name}.tif" for name in read(out / "split.json")["train"]]
    pixels = []
    for file in files:
        with rasterio.open(file) as f:
            pixels.append(f.read([3, 2, 1])[:, f.dataset_mask() > 0])
    want = np.percentile(np.concatenate(pixels, 1), (2, 98), axis=1).T
    reading = load_weights(out / "best.safetensors")[1]["reading"]
    assert reading["bands"] == [3, 2, 1]
    np.testing.assert_allclose(reading["input_range"], want)

    # Scored: the rim of nodata and the unlabelled one do not count.
    forks.run("eval", out, "--workers", 0)
    scored = read(out / "eval-val/eval.json")
    assert scored["confusion"] == read(out / "results.json")["confusion"]
    n = len(read(out / "split.json")["val"])
    assert np.sum(scored["confusion"]) == n * (SIDE - RIM) ** 2
    np.testing.assert_allclose(scored["protocol"]["input_range"], want)

    # Predicted by the printed command, in the file's own ids.
    words = command(text.replace("IMAGE_OR_FOLDER", shlex.quote(str(root / "images"))), "predict.py")
    forks.run("predict", *[tmp_path / "out" if word == "predictions" else word for word in words], "--label-out", "raw")
    for i in range(10):
        with rasterio.open(tmp_path / f"out/tile_{i}.tif") as got, rasterio.open(root / f"images/tile_{i}.tif") as f:
            ids = got.read(1)
            assert got.crs == f.crs and got.transform == f.transform
        assert (ids[:, :RIM] == 255).all() and set(np.unique(ids[:, RIM:])) <= {1, 2}


def test_soft_masks_from_draft_to_prediction(tmp_path, capsys, forks):
    root = scenes(tmp_path / "set", soft=True)
    code, lines = check(capsys, ["python", "-m", "data.check", str(root), "--bands", "4,3,2"])
    assert code == 0 and read(root / "dataset.json")["threshold"] == 127
    code, lines = check(capsys, shlex.split(lines[-1].partition("then: ")[2]))
    assert code == 0
    out = tmp_path / "run"
    forks.run("train_seg", *command(lines[-1], "train_seg.py"), *SHORT, "--out", out)
    assert load_weights(out / "best.safetensors")[1]["threshold"] == 127
    truth = []
    for name in read(out / "split.json")["val"]:
        with rasterio.open(root / f"{name.replace('images', 'masks')}.tif") as f:
            truth.append(f.read(1)[:, RIM:] > 127)
    rows = np.sum(read(out / "results.json")["confusion"], 1)
    assert rows.tolist() == [np.sum(~np.stack(truth)), np.sum(truth)]
    forks.run("train_points", "--root", root, *SHORT, "--out", tmp_path / "points")
    assert np.sum(read(tmp_path / "points/results.json")["confusion"], 1).tolist() == rows.tolist()

    # No grey means "no class": whole images go back as black and white, those with holes do not.
    text = forks.run("predict", out, root / "images", "--out", tmp_path / "none", "--label-out", "raw", ok=2)
    assert "transparent pixels, and no value of the masks means no class; type --label-out train" in text
    with rasterio.open(root / "images/tile_0.tif") as f:
        geotiff(tmp_path / "whole/a.tif", np.moveaxis(f.read()[:, :, RIM:], 0, -1))
    for kind in ("raw", "train"):
        forks.run("predict", out, tmp_path / "whole", "--out", tmp_path / kind, "--label-out", kind)
    raw, ids = (rasterio.open(tmp_path / kind / "a.tif").read(1) for kind in ("raw", "train"))
    np.testing.assert_array_equal(raw, ids * 255)
    assert [row["value"] for row in read(tmp_path / "raw/classes.json")] == [0, 255]
    forks.run("predict", out, root / "images", "--out", tmp_path / "masks", "--label-out", "train")
    forks.run("eval", out, "--masks", tmp_path / "masks", "--mask-ids", "train", "--workers", 0)
    assert read(out / "eval-val-masks/eval.json")["confusion"] == read(out / "results.json")["confusion"]


@pytest.fixture
def described(tmp_path, capsys):
    root = scenes(tmp_path / "set")
    data_check([str(root), "--bands", "4,3,2"])
    d = read(root / "dataset.json")
    write(root / "dataset.json", d | {"input_range": "p2-98"})
    capsys.readouterr()
    return root


def test_percentiles_on_resume_and_of_a_teacher(tmp_path, described, forks):
    flags = ["--root", described, *SHORT]
    forks.run("train_seg", *flags, "--steps", 8, "--out", tmp_path / "whole")
    code, _ = interrupt(forks, signal.SIGINT, tmp_path / "part", "train_seg", *flags, "--steps", 8, "--out",
                        tmp_path / "part")
    assert code == 128 + signal.SIGINT
    forks.run("train_seg", "--resume", tmp_path / "part")
    same_run(tmp_path / "whole", tmp_path / "part")

    # A student of other training images, and so of other percentiles, sees what its teacher sees.
    numbers = load_weights(tmp_path / "whole/best.safetensors")[1]["reading"]["input_range"]
    split = read(tmp_path / "whole/split.json")
    write(tmp_path / "few.json", {"train": split["train"][:2], "val": split["val"]})
    more = ["--split-file", tmp_path / "few.json", "--teacher", tmp_path / "whole"]
    forks.run("train_kd", *flags, *more, "--out", tmp_path / "kd")
    meta = load_weights(tmp_path / "kd/best.safetensors")[1]
    assert meta["reading"]["input_range"] == numbers and meta["percentiles"] == "p2-98"
    assert Source(root=described, split_file=tmp_path / "few.json", cache="off").reading["input_range"] != numbers

    # Of another word the message says what to type, and that works.
    said = forks.run("train_kd", *flags, *more, "--input-range", "p1-99", "--out", tmp_path / "other", ok=2)
    advice = shlex.split(re.search(r"type the same --bands and --input-range: ([^;]*?), and take", said)[1])
    forks.run("train_kd", *flags, *more, *advice, "--out", tmp_path / "other")
    assert load_weights(tmp_path / "other/best.safetensors")[1]["reading"]["input_range"] == numbers

    # What dataset.json says later does not change how a trained model reads.
    d = json.loads((described / "dataset.json").read_text())
    write(described / "dataset.json", d | {"input_range": [0, 65535], "bands": [1, 1, 1]})
    forks.run("eval", tmp_path / "whole", "--workers", 0)
    scored = read(tmp_path / "whole/eval-val/eval.json")
    assert scored["confusion"] == read(tmp_path / "whole/results.json")["confusion"]
