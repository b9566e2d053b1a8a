"""data.curate: wrong labels are found, shown, decided about and mended in new masks; the originals stay."""
import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from scipy import ndimage, stats

import eval as eval_script
from data.common import write
from data.curate import masks, review
from data.curate.__main__ import main
from data.curate.predicted import Predicted, read_sample
from data.curate.regions import from_runs, to_runs
from data.datasets import find_pairs, read_description
from data.io import Labels
from data.source import Source
from data.tiff import write_tiff
from folder_sets import save

SCRIPT = "<script>alert(1)</script>"  # the name of a class: text, wherever it is shown
COLORS = ["#000080", "#FF0000", "#00C000"]
CLASSES = [{"name": "land", "id": 10, "color": COLORS[0]}, {"name": SCRIPT, "id": 20, "color": COLORS[1]},
           {"name": "water", "id": 30, "color": COLORS[2]}]
H, W = 60, 70
WRONG = (slice(10, 20), slice(15, 35))  # water that the masks of images/0 to 3 call land
RAW = np.array([10, 20, 30] + [255] * 253, np.uint8)


def truth(i):
    """Land with a lake and a field whose place depends on the image."""
    ids = np.zeros((H, W), np.uint8)
    ids[8:30, 10:40] = 2
    ids[35:55, 30 + i:60 + i] = 1
    return ids


def labels(i):
    ids = truth(i)
    if i < 4:
        ids[WRONG] = 0
    ids[:3] = 255  # not labelled
    return ids


def probabilities(ids, p=0.9):
    """(H, W, 3) uint8, p for the right class."""
    rest = (1 - p) / 2
    one_hot = np.eye(3)[ids] * (p - rest) + rest
    return np.round(255 * one_hot).astype(np.uint8)


def make(place):
    """A data set of palette masks in place/D, and what a good model says of its training images in place/P."""
    root = place / "D"
    rng = np.random.default_rng(0)
    palette = np.zeros((256, 3), np.uint8)
    palette[[10, 20, 30]] = [(0, 0, 128), (255, 0, 0), (0, 192, 0)]
    names = [f"images/{i}" for i in range(6)]
    for i in range(6):
        save(root / f"images/{i}.png", rng.integers(0, 256, (H, W, 3)))
        save(root / f"masks/{i}.png", RAW[labels(i)], palette.tolist())
    for i in range(4):
        write_tiff(place / f"P/images/{i}.tif", probabilities(truth(i)), bands=["a", "b", "c"])
    write(root / "dataset.json", {
        "name": "tiny", "images": "images/*.png", "masks": "masks/*.png", "classes": CLASSES,
        "ignore": [255], "splits": {"train": names[:4], "val": names[4:5], "test": names[5:]}})
    index = {"run": "runs/none", "weights": "0", "root": str(root), "split": "fold", "temperature": None,
             "classes": [c["name"] for c in CLASSES], "images": {n: f"{n}.tif" for n in names[:4]}}
    write(place / "P/index.json", index)
    return root, place / "P"


@pytest.fixture
def made(tmp_path):
    """make(), for one thing to be spoilt."""
    return make(tmp_path)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """make() with suspects searched and a page of them: only to be read."""
    root, folder = make(tmp_path_factory.mktemp("searched"))
    assert main(["suspects", str(folder)]) == 0
    assert main(["review", str(folder / "suspects/suspects.json"), "--controls", "3"]) == 0
    return root, folder


def read_suspects(folder):
    return json.loads((folder / "suspects/suspects.json").read_text())


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out + out.err


# ---- suspects

def test_the_wrong_region_of_each_image_and_nothing_else_is_suspect(searched):
    _, folder = searched
    found = read_suspects(folder)["regions"]
    assert sorted(r["image"] for r in found) == [f"images/{i}" for i in range(4)]
    for r in found:
        assert (r["label"], r["proposed"], r["pixels"], r["box"]) == ("land", "water", 200, [10, 15, 10, 20])
        assert r["confidence"] == pytest.approx(230 / 255, abs=1e-4)
        assert r["score"] == pytest.approx(200 ** 0.5 * np.log(230 / 13), abs=0.001)
        assert from_runs(r["runs"], (10, 20)).all()
    rows = list(csv.DictReader((folder / "suspects/suspects.csv").open()))
    assert [(r["image"], r["region"], r["pixels"]) for r in rows] == [(r["image"], str(r["id"]), "200") for r in found]


def test_regions_are_those_of_scipy(made, capsys, rng):
    """Of noise: 4-neighbours of one label and one proposal; small ones are left out."""
    root, folder = made
    said = rng.choice(3, (H // 3, W // 2)).repeat(3, 0).repeat(2, 1).astype(np.uint8)
    write_tiff(folder / "images/0.tif", probabilities(said))
    index = json.loads((folder / "index.json").read_text())
    write(folder / "index.json", index | {"images": {"images/0": "images/0.tif"}})
    assert run(capsys, "suspects", folder)[0] == 0
    own = read_suspects(folder)["regions"]
    expected = []
    for label in range(3):
        for other in {0, 1, 2} - {label}:
            parts, n = ndimage.label((labels(0) == label) & (said == other))
            for k, box in enumerate(ndimage.find_objects(parts), 1):
                inside = parts[box] == k
                if inside.sum() >= 16:
                    expected.append((label, other, box[0].start, box[1].start, inside.tolist()))
    names = [c["name"] for c in CLASSES]
    found = [(names.index(r["label"]), names.index(r["proposed"]), *r["box"][:2],
              from_runs(r["runs"], tuple(r["box"][2:])).tolist()) for r in own]
    assert len(found) > 5 and sorted(found) == sorted(expected)


def test_scores_of_images_are_the_soft_minimum(searched):
    _, folder = searched
    rows = {r["image"]: float(r["score"]) for r in csv.DictReader((folder / "suspects/images.csv").open())}
    for i in range(4):
        p = probabilities(truth(i)) / 255
        known = labels(i) != 255
        own = np.take_along_axis(p, labels(i)[..., None].clip(max=2).astype(int), 2)[known]
        weight = np.exp((1 - own) / 0.1)
        assert rows[f"images/{i}"] == pytest.approx((weight * own).sum() / weight.sum(), abs=1e-5)


def test_the_mean_of_two_models_counts_and_their_classes_may_stand_in_any_order(made, capsys, tmp_path):
    root, folder = made
    other = tmp_path / "Q"
    index = json.loads((folder / "index.json").read_text())
    index["classes"] = index["classes"][::-1]
    write(other / "index.json", index)
    for i in range(4):  # as the labels say, so that the mean of both is in doubt
        write_tiff(other / f"images/{i}.tif", probabilities(labels(i).clip(max=2))[..., ::-1])
    code, said = run(capsys, "suspects", folder, other, "--out", tmp_path / "out")
    assert code == 0, said
    predicted = Predicted([folder, other])
    (y, p), = predicted.strips("images/0")
    assert p[:, 15, 20] == pytest.approx([0.475, 0.05, 0.475], abs=1 / 255)
    assert json.loads((tmp_path / "out/suspects.json").read_text())["regions"] == []


def test_controls_are_right_labels(searched):
    _, folder = searched
    controls = read_suspects(folder)["controls"]
    assert controls
    names = [c["name"] for c in CLASSES]
    for c in controls:
        top, left, h, w = c["box"]
        inside = from_runs(c["runs"], (h, w))
        i = int(c["image"][-1])
        for ids in (truth(i), labels(i)):
            assert (ids[top:top + h, left:left + w][inside] == names.index(c["proposed"])).all()
        assert c["label"] != c["proposed"]


def test_runs_come_back(rng):
    for share in (0, 0.3, 0.7, 1):
        inside = rng.random((7, 5)) < share
        assert (from_runs(to_runs(inside), (7, 5)) == inside).all()


@pytest.mark.parametrize("spoil, named", [
    (lambda f: (f / "index.json").unlink(), "--probabilities"),
    (lambda f: shutil.copy(f.parent / "D/masks/0.png", f / "images/2.tif"), "images/2.tif"),
    (lambda f: write(f / "index.json", {"root": "x"}), "'split'"),
])
def test_bad_folders_are_named(made, capsys, spoil, named):
    root, folder = made
    spoil(folder)
    code, said = run(capsys, "suspects", folder)
    assert code == 2 and named in said and said.count("\n") == 1


def test_a_run_that_judges_its_own_training_labels_is_said(made, capsys, tmp_path):
    root, folder = made
    index = json.loads((folder / "index.json").read_text())
    write(folder / "index.json", index | {"run": str(tmp_path / "R")})
    write(tmp_path / "R/split.json", {"train": ["images/0", "images/1", "images/5"]})
    code, said = run(capsys, "suspects", folder)
    assert code == 0 and "was trained on 2 of these images" in said


# ---- folds

def test_folds_keep_scenes_whole_and_leave_no_image_out(made, capsys, tmp_path):
    root, _ = made
    for i in range(4):
        for kind in ("images", "masks"):
            (root / kind / f"{i}.png").rename(root / kind / f"{'ab'[i % 2]}_{i}.png")
    d = json.loads((root / "dataset.json").read_text())
    splits = d["splits"] | {"train": ["images/?_*"]}
    write(root / "dataset.json", d | {"scene": r"images/([^_]*)", "splits": splits})
    code, said = run(capsys, "folds", root, "--number", 2, "--out", tmp_path / "O")
    assert code == 0 and said.count("train_seg.py") == said.count("eval.py") == 2
    folds = [json.loads((tmp_path / f"O/fold_{i}.json").read_text()) for i in (1, 2)]
    scenes = [["images/a_0", "images/a_2"], ["images/b_1", "images/b_3"]]
    assert sorted(f["fold"] for f in folds) == scenes and sorted(f["train"] for f in folds) == scenes
    assert all(f["train"] != f["fold"] for f in folds)
    assert all(f["val"] == ["images/4"] and f["test"] == ["images/5"] for f in folds)
    code, said = run(capsys, "folds", root, "--number", 3, "--out", tmp_path / "O2")
    assert code == 2 and "2 to 2" in said


# ---- the page

NODE = shutil.which("node")


def played(folder, presses):
    """What the page shows and saves after these presses of keys, by node and a stand-in for a browser."""
    player = Path(__file__).with_name("play_page.js")
    done = subprocess.run([NODE, player, folder / "suspects/review.html", json.dumps(presses)],
                          capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def page_data(folder):
    text = (folder / "suspects/review.html").read_text()
    return text, json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def picture(url):
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))


def test_the_page_needs_nothing_else_and_no_name_can_break_out(searched):
    text, page = page_data(searched[1])
    assert not re.search(r"""(src|href)\s*=\s*["']|https?:|@import|url\(""", text)
    assert text.count("<script") == text.count("</script") == 2
    assert SCRIPT in page["classes"] and "innerHTML" not in text


def test_the_page_shows_label_and_proposal_of_each_region_in_colour(searched):
    _, page = page_data(searched[1])
    assert sum(item["control"] for item in page["items"]) == 3 and len(page["items"]) == 7
    colors = {c["name"]: tuple(bytes.fromhex(c["color"][1:])) for c in CLASSES}
    assert len({item["labelIs"] for item in page["items"]}) == 2  # drawn, not always the same
    for item in page["items"]:
        top, left, h, w = item["around"]
        box = item["box"]
        assert picture(item["picture"]).size == (w, h)
        y, x = np.nonzero(from_runs(item["runs"], tuple(box[2:])))
        for layer in "ab":
            shown = np.array(picture(item[layer]).convert("RGB"))
            name = item["label"] if layer == item["labelIs"] else item["proposed"]
            assert (shown[y + box[0] - top, x + box[1] - left] == colors[name]).all()


@pytest.mark.skipif(not NODE, reason="needs node")
def test_keys_decide_undo_and_survive_closing(searched):
    _, page = page_data(searched[1])
    items = page["items"]
    regions = [i for i, item in enumerate(items) if not item["control"]]
    # A for all, the first one undone and said to be the second class; closed in the middle; the last left open.
    found = played(searched[1], ["name:Eva", " ", "a", "u", "2", "a", "close", *["a"] * (len(items) - 3)])
    assert found["count"] == f"{len(items) - 1} of {len(items)}" and found["outside"] == []
    assert found["saved"]["open"] == (not items[-1]["control"])
    saved = {d["id"]: d for d in found["saved"]["decisions"]}
    assert set(saved) == {items[i]["id"] for i in regions if i < len(items) - 1}
    for i in set(regions) - {len(items) - 1}:
        item, d = items[i], saved.get(items[i]["id"])
        if i == 0:
            expected = SCRIPT, "other"
        else:
            expected = (item["label"], "keep") if item["labelIs"] == "a" else (item["proposed"], "accept")
        assert (d["class"], d["verdict"]) == expected and d["reviewer"] == "Eva" and d["runs"] == item["runs"]
    answered = [i for i, item in enumerate(items) if item["control"] and i < len(items) - 1]
    wrong = [i for i in answered if (items[0]["proposed"] != SCRIPT if i == 0 else items[i]["labelIs"] == "a")]
    assert (found["saved"]["controls"]["answered"], found["saved"]["controls"]["wrong"]) == (len(answered), len(wrong))


@pytest.mark.skipif(not NODE, reason="needs node")
def test_the_reviewers_error_rate_is_said_at_the_end(searched):
    _, page = page_data(searched[1])
    right = ["b" if item["labelIs"] == "a" else "a" for item in page["items"]]  # the proposal
    found = played(searched[1], ["name:Eva", *right])
    # Wilson's interval of 0 out of 3.
    assert found["result"].startswith("All decided. Of 3 controls") and "0.0 % to 56.2 %" in found["result"]
    assert found["saved"]["controls"]["wrong"] == 0


@pytest.mark.skipif(not NODE, reason="needs node")
def test_nothing_is_decided_without_a_name(searched):
    found = played(searched[1], ["a"])
    assert found["count"].startswith("0 of") and "name" in found["warning"]


@pytest.mark.skipif(not NODE, reason="needs node")
def test_the_outline_is_the_border_and_zoom_keeps_the_place_under_the_cursor(rng):
    inside = rng.random((5, 7)) < 0.5
    script = Path(review.__file__).with_name("review.js")
    code = f"const p = require({json.dumps(str(script))}); console.log(JSON.stringify([" \
           f"p.outline({to_runs(inside)}, [2, 3, 5, 7]), p.zoomed({{scale: 2, x: 10, y: 20}}, 3, 100, 50)]))"
    lines, view = json.loads(subprocess.run([NODE, "-e", code], capture_output=True, text=True, check=True).stdout)
    framed = np.pad(inside, 1)
    expected = set()
    for y, x in np.argwhere(framed):  # of every pixel inside the sides that it does not share
        for dy, dx, line in ((-1, 0, (0, 0, 1, 0)), (1, 0, (0, 1, 1, 1)), (0, -1, (0, 0, 0, 1)), (0, 1, (1, 0, 1, 1))):
            if not framed[y + dy, x + dx]:
                expected.add(tuple(v + (x + 2, y + 1)[i % 2] for i, v in enumerate(line)))
    assert len(lines) == len(expected) and set(map(tuple, lines)) == expected
    # The pixel under the cursor, before and after.
    assert view["scale"] == 6 and [(100 - view["x"]) / 6, (50 - view["y"]) / 6] == [45, 15]


BROWSER = Path(os.environ.get("NANORS_BROWSER", Path.home() / ".cache/nanors-browser"))
has_browser = NODE and (BROWSER / "node_modules/puppeteer-core").exists()


@pytest.mark.skipif(not has_browser, reason="needs Chromium from npm")
def test_the_page_in_a_real_browser(made, capsys, tmp_path):
    """Chromium without a screen and without root, 120 MB:

    npm install --prefix ~/.cache/nanors-browser puppeteer-core@24.43 @sparticuz/chromium@147
    """
    root, folder = made
    assert run(capsys, "suspects", folder)[0] == 0
    assert run(capsys, "review", folder / "suspects/suspects.json", "--controls", 3)[0] == 0
    _, page = page_data(folder)
    items = page["items"]
    looks = "view.toDataURL()"
    actions = [
        # Nothing without a name, and what is said about it can be seen.
        ["press", "a"], ["read", "warning", "warning.textContent"],
        ["read", "in sight", "save.getBoundingClientRect().bottom <= innerHeight"],
        ["type", "#reviewer", "Eva"], ["press", "Enter"],
        # Blinking, and the image alone.
        ["read", "A", looks], ["press", " "], ["read", "B", looks], ["press", " "], ["read", "A again", looks],
        ["press", "c"], ["read", "bare", looks], ["press", "c"]]
    cursors = [(300, 306, -300), (520, 410, -300), (340, 420, 200)]
    for x, y, turn in cursors:
        color = f"String(view.getContext('2d').getImageData({x}, {y}, 1, 1).data)"
        actions += [["read", f"before {x}", color], ["wheel", x, y, turn], ["read", f"after {x}", color],
                    ["read", f"zoomed {x}", looks]]
    actions += [
        # Decided and undone; a key that is held down decides once; closed and opened again.
        ["press", "a"], ["press", "u"], ["read", "undone", "count.textContent"], ["press", "B"], ["hold", "a", 3],
        ["read", "held", "count.textContent"], ["reopen"], ["read", "kept", "count.textContent + reviewer.value"],
        *[["press", "2"]] * (len(items) - 3), ["press", "s"], ["read", "end", "result.textContent"],
        ["download", "#save"], ["press", " "],
        ["read", "scripts", "document.scripts.length"], ["read", "classes", "choices.textContent"]]
    done = subprocess.run([NODE, Path(__file__).with_name("browse_page.mjs"), BROWSER, tmp_path / "browser",
                           folder / "suspects/review.html", json.dumps(actions)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    played = json.loads(done.stdout)
    assert played["errors"] == [] and played["downloads"] == ["decisions.json"]
    assert all(url.startswith(("file:///", "data:image/")) for url in played["requests"]), played["requests"]
    seen = played["found"]
    assert "name first" in seen["warning"] and seen["in sight"]
    assert seen["A"] == seen["A again"] and len({seen["A"], seen["B"], seen["bare"]}) == 3
    for x, _, _ in cursors:  # the image is noise: another pixel would have another colour
        assert seen[f"before {x}"] == seen[f"after {x}"] != "0,0,0,0"
    assert len({seen["A"], *[seen[f"zoomed {x}"] for x, _, _ in cursors]}) == 4
    assert seen["undone"] == f"0 of {len(items)}" and seen["held"] == f"2 of {len(items)}"
    assert seen["kept"] == f"2 of {len(items)}Eva" and seen["end"].startswith("All decided")
    assert seen["scripts"] == 2 and SCRIPT in seen["classes"]

    # What was decided: B, A, always the second class, and nothing about the last one.
    expected = {f"images/{i}": labels(i) for i in range(6)}
    names = page["classes"]
    for i, item in enumerate(items[:-1]):
        if item["control"]:
            continue
        chosen = SCRIPT
        if i < 2:
            chosen = item["label"] if item["labelIs"] == "ba"[i] else item["proposed"]
        top, left, h, w = item["box"]
        inside = from_runs(item["runs"], (h, w))
        expected[item["image"]][top:top + h, left:left + w][inside] = names.index(chosen)
    code, said = run(capsys, "apply", tmp_path / "browser/downloads/decisions.json", "--out", tmp_path / "M")
    assert code == 0, said
    for i in range(6):
        assert np.array_equal(np.array(Image.open(tmp_path / f"M/masks/{i}.png")), RAW[expected[f"images/{i}"]])


# ---- masks

FORMS = ["ids", "grey", "palette of colours", "colours", "colours and alpha", "16 bits", "1 bit", "GeoTIFF",
         "threshold"]


def mask_set(place, form):
    """A data set of one training and one val mask, both of class 0 with a stripe of class 1: root, region."""
    ids = np.zeros((12, 16), np.uint8)
    ids[:, 4:8] = 1
    values = {"16 bits": (300, 301), "1 bit": (0, 1), "threshold": (0, 1)}.get(form, (10, 20))
    classes = [{"name": n, "id": v, "color": c} for n, v, c in zip("xy", values, COLORS)]
    colours = np.array([(0, 0, 128), (255, 0, 0)], np.uint8)
    more = {}
    if form in ("palette of colours", "colours", "colours and alpha"):
        classes = [{k: c[k] for k in ("name", "color")} for c in classes]
    picture = Image.fromarray(np.array(values)[ids].astype(np.uint8))
    if form == "ids":
        picture.putpalette([*range(256)] * 3)
    if form == "palette of colours":  # the second class only
        picture = Image.fromarray(np.zeros_like(ids) + 7, "P")
        picture.putpalette([0] * 21 + [0, 0, 128])
    if form in ("colours", "colours and alpha"):
        picture = Image.fromarray(colours[ids])
    if form == "colours and alpha":
        picture.putalpha(Image.fromarray(np.where(np.arange(16) < 14, 255, 0).astype(np.uint8)[None].repeat(12, 0)))
    if form == "16 bits":
        picture = Image.fromarray(np.array(values, np.uint16)[ids])
    if form == "1 bit":
        picture = Image.fromarray(ids > 0)
    if form == "threshold":
        more = {"threshold": 127}
        picture = Image.fromarray(ids * np.uint8(200))
    suffix = "tif" if form == "GeoTIFF" else "png"
    for i in range(2):
        save(place / f"i/{i}.png", np.zeros((12, 16, 3)))
        file = place / f"m/{i}.{suffix}"
        file.parent.mkdir(exist_ok=True)
        if form == "GeoTIFF":
            with rasterio.open(file, "w", driver="GTiff", height=12, width=16, count=1, dtype="uint8",
                               crs="EPSG:32633", transform=rasterio.Affine(2, 0, 5e5, 0, -2, 6e6)) as f:
                f.write(np.array(picture)[None])
        else:
            picture.save(file)
        write(file.with_suffix(".wld"), "1 0 0 -1 0 0")
    write(place / "dataset.json", {"name": "n", "images": "i/*.png", "masks": f"m/*.{suffix}", "classes": classes,
                                   "splits": {"train": "i/0", "val": "i/1"}, **more})
    before = Labels.of(read_description(place)).load(place / f"m/0.{suffix}")
    return before, f"0.{suffix}"


def decided(root, label="x", to="y", image="i/0", box=(2, 9, 3, 4), **more):
    """decisions.json about a region of one image; corners of its box lie outside."""
    inside = np.ones(box[2:], bool)
    inside[0, 0] = inside[-1, -1] = False
    decision = dict(id=7, image=image, box=list(box), runs=to_runs(inside), label=label, proposed=to,
                    verdict="accept", reviewer="Eva", time="2026-01-01", **{"class": to})
    file = root.parent / "decisions.json"
    write(file, {"root": str(root), "classes": ["x", "y"], "models": [{"split": "fold"}], "reviewer": "Eva",
                 "decisions": [decision | more, decision | {"id": 8, "verdict": "keep", "class": "x"}]})
    return file, inside


def contents(folder):
    return {f.relative_to(folder): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("form", FORMS)
def test_a_decision_changes_its_region_and_nothing_else(tmp_path, capsys, form):
    root = tmp_path / "D"
    before, name = mask_set(root, form)
    old = contents(root)
    file, inside = decided(root)
    code, said = run(capsys, "apply", file, "--out", root / "m2")
    assert code == 0, said
    after = Labels.of(read_description(root)).load(root / "m2/m" / name)
    expected = before.copy()
    expected[2:5, 9:13][inside] = 1
    assert np.array_equal(after, expected) and inside.sum() == 10
    assert {k: v for k, v in contents(root).items() if k.parts[0] != "m2"} == old
    # Masks without a decision, and what lies beside, are copies.
    assert (root / "m2/m" / name.replace("0", "1")).read_bytes() == (root / "m" / name.replace("0", "1")).read_bytes()
    assert (root / "m2/m/0.wld").read_text() == "1 0 0 -1 0 0"
    # In the form that it had.
    was, now = Image.open(root / "m" / name), Image.open(root / "m2/m" / name)
    if form not in ("1 bit",):
        assert now.mode == was.mode
    if form in ("ids", "palette of colours"):
        assert now.getpalette()[:24] == was.getpalette()[:24]
    if form == "GeoTIFF":
        with rasterio.open(root / "m2/m" / name) as f, rasterio.open(root / "m" / name) as g:
            assert (f.crs, f.transform) == (g.crs, g.transform)
    # The line to type into dataset.json is right.
    d = json.loads((root / "dataset.json").read_text())
    write(root / "dataset.json", d | json.loads("{" + said.split('dataset.json:')[1] + "}"))
    pairs = find_pairs(root, read_description(root))
    assert pairs["i/0"][1] == root / "m2/m" / name and pairs["i/1"][1] == root / "m2/m" / name.replace("0", "1")


def test_taken_back_it_is_the_original_byte_for_byte(tmp_path, capsys):
    root = tmp_path / "D"
    mask_set(root, "palette of colours")
    file, _ = decided(root)
    assert run(capsys, "apply", file, "--out", root / "m2")[0] == 0
    manifest = json.loads((root / "m2/manifest.json").read_text())
    for mask, about in manifest["masks"].items():
        assert about["before"] == hashlib.sha256((root / about["original"]).read_bytes()).hexdigest()
        assert about["after"] == hashlib.sha256((root / "m2" / mask).read_bytes()).hexdigest()
    region, = manifest["masks"]["m/0.png"]["regions"]
    assert (region["id"], region["to"], region["reviewer"], region["reason"]) == (7, "y", "Eva", "accept")
    assert run(capsys, "verify", root / "m2")[0] == 0
    # Of no model, such as decisions of a script; then no split is taken for held out.
    write(root / "more.json", json.loads(file.read_text()) | {"open": 3, "models": []})
    code, said = run(capsys, "apply", root / "more.json", "--out", root / "m3", "--dry-run")
    assert code == 0
    assert "2 decisions (1 accept, 1 keep), the last of 2026-01-01; 3 regions of the page were still open" in said
    code, said = run(capsys, "revert", root / "m2", "--region", 8)
    assert code == 2 and "there are 7" in said
    assert run(capsys, "revert", root / "m2", "--region", 7)[0] == 0
    assert (root / "m2/m/0.png").read_bytes() == (root / "m/0.png").read_bytes()
    assert run(capsys, "verify", root / "m2")[0] == 0
    # Typed again, apply does not bring back what was taken back.
    assert run(capsys, "apply", file, "--out", root / "m2")[0] == 0
    assert (root / "m2/m/0.png").read_bytes() == (root / "m/0.png").read_bytes()
    write(tmp_path / "N/manifest.json", manifest | {"masks": {"../x.png": manifest["masks"]["m/0.png"]}})
    code, said = run(capsys, "revert", tmp_path / "N")
    assert code == 2 and "not a manifest" in said
    (root / "m2/m/0.png").write_bytes(b"other")
    (root / "m2/m/1.png").unlink()
    shutil.copy(root / "m/0.png", root / "m2/m/9.png")
    code, said = run(capsys, "verify", root / "m2")
    assert code == 2 and "0.png: changed" in said and "1.png: missing" in said and "9.png: not in" in said


def test_killed_in_the_middle_and_typed_again_it_is_whole(tmp_path, capsys, monkeypatch):
    root = tmp_path / "D"
    mask_set(root, "ids")
    file, _ = decided(root)
    assert run(capsys, "apply", file, "--out", root / "whole")[0] == 0

    def killed(source, path):
        if path.name == "1.png":
            write(path.with_name("1.png.1.tmp"), "half")
            raise KeyboardInterrupt
        original(source, path)

    original = masks.copy
    monkeypatch.setattr(masks, "copy", killed)
    assert main(["apply", str(file), "--out", str(root / "m2")]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    monkeypatch.undo()
    code, said = run(capsys, "verify", root / "m2")
    assert code == 2 and "apply command again" in said
    assert run(capsys, "apply", file, "--out", root / "m2")[0] == 0
    assert contents(root / "m2") == contents(root / "whole")


def test_what_must_not_change_is_refused_and_nothing_written(tmp_path, capsys):
    root = tmp_path / "D"
    mask_set(root, "ids")
    old = contents(root)
    for more, flags, named in [
            (dict(image="i/1"), [], "--including-heldout"),
            (dict(label="y", to="x"), [], "is not 'y' any more"),
            (dict(box=(11, 9, 3, 4)), [], "outside"),
            (dict(to="z"), [], "no class 'z'"),
            (dict(to=None, verdict="other"), [], '"ignore" in dataset.json'),
            (dict(image="i/5"), [], "no mask of 'i/5'"),
            (dict(runs=[0, 5]), [], "runs of 5"),
            (dict(box=[-1, 9, 3, 4]), [], "'box' of a region"),
            (dict(**{"class": 3}), [], "becomes 3"),
            ({}, ["--out", root], "name a new folder"),
            ({}, ["--out", root / "i"], "other files")]:
        file, _ = decided(root, **more)
        code, said = run(capsys, "apply", file, *(flags or ["--out", root / "m2"]))
        assert code == 2 and named in said and said.splitlines()[-1].startswith("error"), (named, said)
        assert contents(root) == old
    file, inside = decided(root, image="i/1")
    code, said = run(capsys, "apply", file, "--out", root / "m2", "--dry-run", "--including-heldout")
    assert code == 0 and "7: x -> y" in said and contents(root) == old
    assert run(capsys, "apply", file, "--out", root / "m2", "--including-heldout")[0] == 0


def test_a_second_round_stands_on_the_first(tmp_path, capsys):
    """dataset.json points at new masks outside of the data set, and these are changed once more."""
    root = tmp_path / "D"
    before, _ = mask_set(root, "ids")
    d = json.loads((root / "dataset.json").read_text())
    for out, box in (("../one", (2, 9, 3, 4)), ("two", (6, 9, 3, 4))):
        file, inside = decided(root, box=box)
        code, said = run(capsys, "apply", file, "--out", root / out)
        assert code == 0, said
        d |= json.loads("{" + said.split('dataset.json:')[1] + "}")
        write(root / "dataset.json", d)
        before[box[0]:box[0] + 3, 9:13][inside] = 1
    assert d["masks"] == "two/m/*.png"
    mask = find_pairs(root, read_description(root))["i/0"][1]
    assert np.array_equal(Labels.of(read_description(root)).load(mask), before)


def test_eval_scores_old_and_new_labels_side_by_side(tmp_path, capsys):
    """Masks of a program that are right by the new labels: mIoU 1 there, of the old ones IoU in plain Python."""
    root = tmp_path / "D"
    old, _ = mask_set(root, "ids")
    d = json.loads((root / "dataset.json").read_text())
    write(root / "dataset.json", d | {"splits": {"train": "i/0", "test": "i/1"}})
    write(root / "m/manifest.json", {"name": "app"})  # of another program: says nothing
    new = old.copy()
    flags = ["--masks", tmp_path / "P", "--mask-ids", "train", "--root", root, "--split", "test"]
    for n, box in enumerate([(2, 9, 3, 4), (6, 9, 3, 4)]):
        file, inside = decided(root, image="i/1", box=box)
        assert run(capsys, "apply", file, "--out", root / "m2")[0] == 2  # test labels, without being asked for
        code, said = run(capsys, "apply", file, "--out", tmp_path / f"m{n}", "--including-heldout")
        assert code == 0, said
        d = json.loads((root / "dataset.json").read_text())
        write(root / "dataset.json", d | json.loads("{" + said.split("dataset.json:")[1] + "}"))
        new[box[0]:box[0] + 3, 9:13][inside] = 1
        save(tmp_path / "P/i/1.png", new)
        eval_script.main(eval_script.parse_args([str(f) for f in [*flags, "--out", tmp_path / f"E{n}"]]))
        assert (tmp_path / f"m{n}/m/1.png").exists() and "changed 1 of 1 masks" in capsys.readouterr().out
        report = json.loads((tmp_path / f"E{n}/eval.json").read_text())
        ious = [((old == c) & (new == c)).sum() / ((old == c) | (new == c)).sum() for c in (0, 1)]
        assert report["miou"] == 1 and report["before_review"]["miou"] == pytest.approx(sum(ious) / 2)
        assert list(report["before_review"]["iou"].values()) == pytest.approx(ious, abs=1e-6)
    # The second round taken back, the first one counts.
    assert run(capsys, "revert", tmp_path / "m1")[0] == 0
    first = Labels.of(read_description(root)).load(tmp_path / "m0/m/1.png")
    eval_script.main(eval_script.parse_args([str(f) for f in [*flags, "--out", tmp_path / "E"]]))
    report = json.loads((tmp_path / "E/eval.json").read_text())
    for truth_ids, found in (first, report), (old, report["before_review"]):
        ious = [((truth_ids == c) & (new == c)).sum() / ((truth_ids == c) | (new == c)).sum() for c in (0, 1)]
        assert found["miou"] == pytest.approx(sum(ious) / 2)


# ---- what to label next

def brute_force(doubt, features, budget, labelled):
    """The rule in plain Python."""
    unit = [f / np.linalg.norm(f) for f in features]
    centres = [f / np.linalg.norm(f) for f in labelled]
    chosen = []
    for _ in range(budget):
        gains = {i: doubt[i] * min([2.0, *(np.linalg.norm(unit[i] - c) for c in centres)])
                 for i in range(len(unit)) if i not in chosen}
        chosen.append(max(gains, key=gains.get))
        centres.append(unit[chosen[-1]])
    return chosen


def test_next_are_the_unsure_and_unlike_ones(tmp_path, capsys, rng):
    root, folder = make(tmp_path)
    names = [f"images/{i}" for i in range(4)]
    p = [0.5, 0.95, 0.6, 0.4]
    for i in range(4):
        write_tiff(folder / f"images/{i}.tif", probabilities(np.zeros((9, 9), int), p[i]))
    features = rng.normal(size=(4, 5))
    np.save(folder / "features.npy", features)
    index = json.loads((folder / "index.json").read_text())
    write(folder / "index.json", index | {"features": "features.npy", "names": names})
    labelled = tmp_path / "L"
    write(labelled / "index.json", {"root": str(root), "split": "train", "classes": [], "features": "f.npy",
                                    "names": ["images/5"]})
    np.save(labelled / "f.npy", features[:1] + 0.01)  # like images/0
    for flags, near in ([], []), (["--labelled", labelled], features[:1] + 0.01):
        code, said = run(capsys, "next", folder, "--budget", 3, *flags)
        assert code == 0, said
        rows = list(csv.DictReader((folder / "next/next.csv").open()))
        doubt = [float(stats.entropy([q, (1 - q) / 2, (1 - q) / 2], base=3)) for q in p]
        assert [r["image"] for r in rows] == [names[i] for i in brute_force(doubt, features, 3, near)]
        assert (folder / "next/next.txt").read_text().split() == [r["image"] for r in rows]
        for r in rows:
            assert float(r["entropy"]) == pytest.approx(doubt[names.index(r["image"])], abs=0.02)
    assert rows[0]["image"] != "images/0"


def test_next_takes_a_folder_of_predict(tmp_path, capsys):
    for name, p in ("a/x", 0.9), ("a/y", 0.5):
        write_tiff(tmp_path / f"{name}_probabilities.tif", probabilities(np.zeros((9, 9), int), p))
    code, said = run(capsys, "next", tmp_path, "--budget", 1, "--out", tmp_path / "o")
    assert code == 0 and "no features" in said
    assert (tmp_path / "o/next.txt").read_text() == "a/y\n"


# ---- which classes are where

def test_shares_of_classes_are_counted_by_image_split_and_set(searched, capsys, tmp_path):
    root, _ = searched
    code, said = run(capsys, "stats", root, "--out", tmp_path / "O")
    assert code == 0, said
    rows = {r["image"]: r for r in csv.DictReader((tmp_path / "O/shares.csv").open())}
    names = [c["name"] for c in CLASSES]
    pixels = {f"images/{i}": [int((labels(i) == c).sum()) for c in (0, 1, 2)] for i in range(6)}
    for name, counts in pixels.items():
        shares = [float(rows[name][c]) for c in names]
        assert shares == pytest.approx([n / sum(counts) for n in counts], abs=1e-6)
        assert int(rows[name]["ignored pixels"]) == 3 * W and int(rows[name]["pixels"]) == H * W
    found = json.loads((tmp_path / "O/stats.json").read_text())
    train = np.sum([pixels[f"images/{i}"] for i in range(4)], 0)
    assert [found["splits"]["train"]["pixels"][n] for n in names] == train.tolist()
    assert found["splits"]["val"]["images"] == found["splits"]["test"]["images"] == 1
    assert found["images_with_both"]["land"]["water"] == 6
    total = np.sum([*pixels.values()], 0)
    rare = [n for n, count in zip(names, total) if count < total.sum() / 6]
    assert list(found["images_of_rare_classes"]) == rare
    assert Image.open(tmp_path / "O/stats.png").width > 400


def test_filter_and_replicate_write_what_training_reads(made, capsys, tmp_path):
    root, _ = made
    palette = Image.open(root / "masks/0.png").getpalette()
    save(root / "masks/1.png", np.full((H, W), 30), palette)
    code, said = run(capsys, "filter", root, "--class", "water", "--at-most", "50%", "--out", tmp_path / "F")
    assert code == 0, said
    splits = json.loads((tmp_path / "F/split.json").read_text())
    assert splits == {"train": ["images/0", "images/2", "images/3"], "val": ["images/4"], "test": ["images/5"]}
    assert json.loads((tmp_path / "F/record.json").read_text())["removed"] == {"images/1": 1.0}
    code, said = run(capsys, "replicate", root, "--class", "water", "--share", "90%", "--out", tmp_path / "R")
    assert code == 0, said
    names = Source(root=root, cache="off").names_to_repeat(str(tmp_path / "R/replicated.txt"))
    assert names == ["images/1"]
    for words, named in (["filter", root, "--class", "sea", "--at-most", "5%"], f"land, {SCRIPT}, water"), \
                        (["filter", root, "--class", "land", "--at-most", "0%"], None), \
                        (["replicate", root, "--class", "land", "--share", "100%"], "lower share"):
        code, said = run(capsys, *words, "--out", tmp_path / "N")
        assert code == (2 if named else 0) and (named or "") in said


# ---- tiles

def scene_set(root, rng, places=(0, 1000)):
    """Two georeferenced scenes of 70 x 100 pixels of 2 m, train and val, that begin at these eastings."""
    root.mkdir()
    for i, x in enumerate(places):
        for kind, count in ("image", 4), ("mask", 1):
            with rasterio.open(root / f"{i}_{kind}.tif", "w", driver="GTiff", height=70, width=100, count=count,
                               dtype="uint16" if count == 4 else "uint8", crs="EPSG:32633",
                               transform=rasterio.Affine(2, 0, 5e5 + x, 0, -2, 6e6), photometric="MINISBLACK") as f:
                f.write(rng.integers(0, 3000 if count == 4 else 2, (count, 70, 100)) + 5 * (count == 1))
    write(root / "dataset.json", {"name": "s", "images": "*_image.tif", "masks": "*_mask.tif", "bands": [4, 1, 2],
                                  "input_range": [0, 3000], "ignore": [6], "splits": {"train": "0*", "val": "1*"},
                                  "classes": [{"name": "x", "id": 5}]})


def test_tiles_are_the_windows_of_their_scenes(tmp_path, capsys, rng):
    root, out = tmp_path / "S", tmp_path / "T"
    scene_set(root, rng)
    code, said = run(capsys, "tile", root, "--side", 48, "--overlap", 16, "--out", out)
    assert code == 0, said
    rows = list(csv.DictReader((out / "tiles.csv").open()))
    for image, split in ("0_image.tif", "train"), ("1_image.tif", "val"):
        own = [(int(r["top"]), int(r["left"])) for r in rows if (r["image"], r["split"]) == (image, split)]
        assert sorted(own) == [(0, 0), (0, 32), (0, 52), (22, 0), (22, 32), (22, 52)]
    labels_of = Labels.of(read_description(out))
    for r in rows:
        window = rasterio.windows.Window(int(r["left"]), int(r["top"]), 48, 48)
        mask = r["tile"].replace("images/", "masks/", 1) + ".tif"
        with rasterio.open(root / r["image"]) as scene, rasterio.open(out / (r["tile"] + ".tif")) as tile:
            assert np.array_equal(scene.read(window=window), tile.read())
            x, y = scene.transform.c + 2 * window.col_off, scene.transform.f - 2 * window.row_off
            assert tile.transform == rasterio.Affine(2, 0, x, 0, -2, y) and tile.crs == scene.crs
            assert tile.tags()["SOURCE"] == r["image"]
        with rasterio.open(root / r["image"].replace("image", "mask")) as scene:
            assert np.array_equal(np.where(scene.read(1, window=window) == 5, 0, 255), labels_of.load(out / mask))
    splits = Source(root=out, cache="off").splits
    assert {s: sorted(n) for s, n in splits.items()} == {
        s: sorted(r["tile"] for r in rows if r["split"] == s) for s in ("train", "val")}
    x, y = read_sample(Source(root=out, cache="off"), rows[0]["tile"])
    assert x.shape == (48, 48, 3) and set(np.unique(y)) == {0, 255}


def test_tiles_on_both_sides_are_refused(tmp_path, capsys, rng):
    scene_set(tmp_path / "S", rng, places=(0, 100))  # 50 of 100 columns are the same ground
    code, said = run(capsys, "tile", tmp_path / "S", "--out", tmp_path / "T")
    assert code == 2 and "the same ground (50%" in said and not (tmp_path / "T").exists()
    scene_set(tmp_path / "R", rng)
    d = json.loads((tmp_path / "R/dataset.json").read_text())
    write(tmp_path / "R/dataset.json", d | {"tiles": 50, "splits": {"train": "0_image_0", "val": "0_image_1"}})
    code, said = run(capsys, "tile", tmp_path / "R", "--out", tmp_path / "T")
    assert code == 2 and "train and val" in said


# ---- several sets as one

def test_sets_are_merged_by_the_names_of_their_classes(made, capsys, tmp_path):
    root, _ = made
    other = tmp_path / "E"
    mask_set(other, "palette of colours")
    mask_set(tmp_path / "F", "colours")
    shutil.copy(tmp_path / "F/m/0.png", other / "m/0.png")
    write(other / "i/0.pgw", "1 0 0 -1 0 0")
    old = contents(tmp_path)
    write(tmp_path / "map.json", {"n": {"x": "sea", "y": None}, "tiny": {"water": "sea"}})
    code, said = run(capsys, "merge", root, other, "--map", tmp_path / "map.json", "--out", tmp_path / "M")
    assert code == 0, said
    assert {k: v for k, v in contents(tmp_path).items() if k in old} == old
    d = read_description(tmp_path / "M")
    assert [c["name"] for c in d["classes"]] == ["land", SCRIPT, "sea"]
    source = Source(root=tmp_path / "M", cache="off")
    assert {s: len(n) for s, n in source.splits.items()} == {"train": 5, "val": 2, "test": 1}
    seen = []
    for name, (image, _) in source.pairs.items():
        assert image.is_symlink()
        pixels, ids = read_sample(source, name)
        original = image.resolve()
        assert np.array_equal(pixels, np.array(Image.open(original)))
        i = int(original.stem)
        expected = labels(i)
        if original.is_relative_to(other):  # x is sea, y is ignored; of images/1 all is x
            expected = np.full((12, 16), 2, np.uint8)
            expected[:, 4:8] = 255 if i == 0 else 2
            assert (image.with_suffix(".pgw")).exists() == (i == 0)
        assert np.array_equal(ids, expected)
        seen.append(original)
    assert len(set(seen)) == 8
    assert json.loads((tmp_path / "M/merge.json").read_text())["n"]["classes"] == {"x": "sea", "y": None}
    for spoilt, named in ({"q": {}}, "no set 'q'"), ({"n": {"w": "x"}}, "no class 'w'"), ({"n": {"x": 1}}, "null"):
        write(tmp_path / "map.json", spoilt)
        code, said = run(capsys, "merge", root, other, "--map", tmp_path / "map.json", "--out", tmp_path / "N")
        assert code == 2 and named in said
    code, said = run(capsys, "merge", root, root, "--out", tmp_path / "N")
    assert code == 2 and "its own" in said and not (tmp_path / "N").exists()


@pytest.fixture
def rng():
    return np.random.default_rng(0)
