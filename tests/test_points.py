"""data/points.py and its averages; oracles: scipy.ndimage, Pillow, scikit-learn, the definitions in Python."""
import csv
import json
import os
import re

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from scipy import ndimage
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from data import metrics, points
from data.crops import around, crop, crop_window, random_place
from data.common import IGNORE, BadInput
from data.io import Labels

NAMES = ["road", "roof", "tree"]
LABELS = Labels([{"name": n, "id": i} for i, n in enumerate(NAMES)], [9])


def blobs(seed=0, size=(60, 80), k=3):  # class ids in patches, with unlabelled ones
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, k + 1, (size[0] // 5, size[1] // 5))
    mask = coarse.repeat(5, 0).repeat(5, 1).astype(np.uint8)
    mask[mask == k] = IGNORE
    return mask


@pytest.fixture
def files(tmp_path):
    """Two images of 60 x 80 (H x W) and one tile of the first, with masks of ids."""
    out = {}
    for i, name in enumerate(("train/a", "val/b")):
        (tmp_path / name).parent.mkdir()
        image, mask = (tmp_path / f"{name}{end}" for end in (".jpg", "_m.png"))
        Image.fromarray(np.full((60, 80, 3), 90, np.uint8)).save(image)
        ids = blobs(i)
        Image.fromarray(np.where(ids == IGNORE, 9, ids)).save(mask)
        out[name] = image, mask
    return out | {"train/a_3": (*out["train/a"], (20, 40, 30, 40))}


# ---- simulation

@pytest.mark.parametrize("seed", range(8))
def test_regions_are_those_of_scipy(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 1 + seed % 4, rng.integers(1, 50, 2)).astype(np.uint8)
    got, want, n = points.components(ids), np.zeros(ids.shape, int), 0
    for c in range(4):
        region, m = ndimage.label(ids == c)
        want[region > 0] = region[region > 0] + n
        n += m
    pairs = set(zip(got.ravel().tolist(), want.ravel().tolist()))
    assert len(pairs) == n == got.max() + 1 == len({g for g, _ in pairs})
    edge = points.to_edge(got)
    for r in range(n):  # scipy measures to the first pixel outside, one further than the edge
        depth = ndimage.distance_transform_cdt(np.pad(got == r, 1), "taxicab")[1:-1, 1:-1] - 1
        assert (edge == depth)[got == r].all()


def test_an_instance_mask_joins_what_does_not_touch_and_parts_what_does():
    ids = np.zeros((4, 9), np.uint8)
    instances = np.array([[7, 0, 7, 8, 8, 0, 0, 0, 0]] * 4)
    parts = points.components(ids, instances)
    assert len(np.unique(parts)) == 4 and parts[0, 0] == parts[0, 2] != parts[0, 3] and parts[0, 1] != parts[0, 5]
    got = points.draw(ids, "one-per-instance", None, 0, "a", instances)
    assert sorted(parts[y, x] for x, y, _ in got) == [0, 1, 2, 3]


@pytest.mark.parametrize("pattern", points.PATTERNS)
def test_points_lie_on_their_class_once_and_are_as_many_as_asked(pattern):
    mask, n = blobs(), 4
    got = points.draw(mask, pattern, n, 0, "a")
    assert got.dtype == np.int64 and got.shape[1] == 3 and len({tuple(p) for p in got}) == len(got)
    assert all(mask[y, x] == c != IGNORE for x, y, c in got)
    count = np.bincount(got[:, 2], minlength=3)
    assert count.sum() == 12 and (pattern == "random" or (count == n).all())
    more = {tuple(p) for p in points.draw(mask, pattern, n + 3, 0, "a")}
    assert {tuple(p) for p in got} < more


def test_points_of_an_image_depend_on_seed_name_and_mask_alone(files):
    for pattern in points.PATTERNS:
        both = points.simulate(files, LABELS, pattern, 3, seed=1)
        alone = points.simulate({"val/b": files["val/b"]}, LABELS, pattern, 3, seed=1)
        np.testing.assert_array_equal(both["val/b"], alone["val/b"])
        other = points.simulate(files, LABELS, pattern, 3, seed=2)
        assert pattern == "clicked-centre" or not np.array_equal(both["val/b"], other["val/b"])
    np.testing.assert_array_equal(points.draw(blobs(1), "clicked-centre", 3, 1, "val/b"), alone["val/b"])
    tile = points.simulate(files, LABELS, "class-balanced", 3, 1)["train/a_3"]
    assert all(blobs(0)[20 + y, 40 + x] == c and x < 40 and y < 30 for x, y, c in tile)
    # the same points on every machine and in every version: what a published table was made with
    assert points.draw(blobs(), "class-balanced", 1, 0, "a").tolist() == RECORDED


RECORDED = [[39, 3, 0], [32, 12, 1], [23, 27, 2]]


def test_a_clicked_centre_is_the_innermost_pixel_of_the_largest_regions():
    mask = np.full((40, 60), IGNORE, np.uint8)
    mask[2:23, 3:24], mask[30:35, 5:46], mask[30:33, 50:53], mask[0, 59] = 0, 0, 0, 1
    assert points.draw(mask, "clicked-centre", 2, 0, "a").tolist() == [[13, 12, 0], [25, 32, 0], [59, 0, 1]]


def test_transparent_pixels_get_no_points(files):
    image = np.full((60, 80, 4), 255, np.uint8)
    image[:, 10:, 3] = 0
    files = {"a": (files["train/a"][0].with_suffix(".png"), files["train/a"][1])}
    Image.fromarray(image).save(files["a"][0])
    assert points.simulate(files, LABELS, "random", 10**6, 0)["a"][:, 0].max() == 9


def test_a_draw_without_repeats_is_even_and_grows():
    hits = np.zeros((4, 6), int)
    for seed in range(3000):
        picked = points.sample(np.arange(6), 4, np.random.default_rng(seed))
        assert len(set(picked.tolist())) == 4
        np.testing.assert_array_equal(picked[:3], points.sample(np.arange(6), 3, np.random.default_rng(seed)))
        hits[np.arange(4), picked] += 1
    assert abs(hits - 500).max() < 5 * 500 ** 0.5
    assert points.sample(np.arange(6), 6, np.random.default_rng(0)).tolist() == list(range(6))


# ---- files

@pytest.mark.parametrize("suffix", ["csv", "geojson"])
def test_a_file_of_points_reads_back(files, tmp_path, suffix):
    drawn = points.simulate(files, LABELS, "random", 5, 0)
    points.write_points(tmp_path / f"p.{suffix}", drawn, NAMES)
    got = points.read_points(tmp_path / f"p.{suffix}", files, NAMES)
    assert got.keys() == drawn.keys() and all(np.array_equal(got[n], drawn[n]) for n in drawn)


def test_the_columns_mean_what_they_say(files, tmp_path):
    (tmp_path / "p.csv").write_text("﻿class;y;image;x;who\nroof;7.9;a.jpg;3.2;me\ntree;59;val/b;79;me\n")
    got = points.read_points(tmp_path / "p.csv", files, NAMES)
    assert {n: p.tolist() for n, p in got.items()} == {"train/a": [[3, 7, 1]], "val/b": [[79, 59, 2]]}
    points.write_points(tmp_path / "q.csv", got, NAMES)
    rows = list(csv.reader(open(tmp_path / "q.csv")))
    assert rows == [["image", "x", "y", "class"], ["train/a", "3", "7", "roof"], ["val/b", "79", "59", "tree"]]
    points.write_points(tmp_path / "q.geojson", got, NAMES)
    feature = json.loads((tmp_path / "q.geojson").read_text())["features"][1]
    assert feature["geometry"] == {"type": "Point", "coordinates": [79, 59]}
    assert feature["properties"] == {"image": "val/b", "class": "tree"}


@pytest.mark.parametrize("written", [
    "train/a", "a", "a.jpg", "a.JPG", "a.tif", "train\\a.jpg", "./train/a", "/train/a", "ROOT/train/a.jpg"])
def test_an_image_is_called_by_all_that_names_it(files, tmp_path, written):
    (tmp_path / "p.csv").write_text(f"image,x,y,class\n{written.replace('ROOT', str(tmp_path))},5,6,tree\n")
    files.pop("train/a_3")  # one file of several tiles has no name but theirs
    assert points.read_points(tmp_path / "p.csv", files, NAMES)["train/a"].tolist() == [[5, 6, 2]]


def test_names_of_classes_and_images_in_another_writing_meet(files, tmp_path):
    composed, parted = "Forêt", "Foret\u0302".replace("et\u0302", "e\u0302t")
    assert composed != parted
    files[f"train/{composed}"] = files["train/a"]
    (tmp_path / "p.csv").write_text(f"image,x,y,class\n{parted},5,6,{parted}\n", "utf-8")
    got = points.read_points(tmp_path / "p.csv", files, ["road", composed])
    assert {name: rows.tolist() for name, rows in got.items()} == {f"train/{composed}": [[5, 6, 1]]}


def test_names_that_are_not_utf_8_are_written_and_read_back(files, tmp_path):
    name = "train/" + os.fsdecode(b"t\xcd\xff")
    drawn = points.simulate({name: files["train/a"]}, LABELS, "random", 5, 0)
    for file in ("p.csv", "p.geojson"):
        points.write_points(tmp_path / file, drawn, NAMES)
        got = points.read_points(tmp_path / file, {name: files["train/a"]}, NAMES)
        assert list(got) == [name] and np.array_equal(got[name], drawn[name])
    assert b"train/t\xcd\xff," in (tmp_path / "p.csv").read_bytes()


def test_points_of_a_broken_image_are_passed_over(files, tmp_path):
    files["val/b"][0].write_bytes(b"no image")
    (tmp_path / "p.csv").write_text("image,x,y,class\nb,999,6,tree\na,5,6,tree\n")
    got = points.read_points(tmp_path / "p.csv", files, NAMES)
    assert {name: rows.tolist() for name, rows in got.items()} == {"train/a": [[5, 6, 2]]}


@pytest.mark.parametrize("row, said", [
    ("a,80,5,road", r"line 3: x 80, y 5 is outside train/a of 80 x 60 .*from 0"),
    ("a,5,60,road", r"line 3: .*exchanged\?"), ("a,-1,5,road", "line 3: .*outside"),
    ("a,nan,5,road", "'nan' is no number"),
    ("a,٣,5,road", "'٣' is no number"), ("a,1_0,5,road", "'1_0' is no number"), ("a,1e400,5,road", "is no number"),
    ("a,1,5,road,3", "line 3: more fields than the header has"),
    ("a,1,5,lake", "line 3: unknown class 'lake'; expected one of: road, roof, tree"),
    ("c,1,5,road", "line 3: 'c' is no image"), ("a.5,1,5,road", "line 3: 'a.5' is no image"),
    ("x/a,1,5,road", "line 3: 'x/a' is no image"),
    ("a,one,5,road", "line 3: 'one' is no number"),
    ("a,1,,road", "line 3: '' is no number"), ("a,1", "line 3: unknown class 'None'"),
    ("a,2,2,road", "line 3: the pixel .2, 2. of train/a is 'roof' in an earlier row and 'road' here")])
def test_a_row_that_cannot_be_used_is_named(files, tmp_path, row, said):
    (tmp_path / "p.csv").write_text(f"image,x,y,class\na,2,2,roof\n{row}\n")
    with pytest.raises(BadInput, match=said) as e:
        points.read_points(tmp_path / "p.csv", files, NAMES)
    assert "\n" not in str(e.value) and "p.csv" in str(e.value)


@pytest.mark.parametrize("name, text, said", [
    ("p.csv", "image,x,class\na,1,road", "no column 'y'"), ("p.csv", "", "no column 'image' in an empty file"),
    ("p.csv", "image,x,x,y,class\na,1,2,3,road", "line 1: the column 'x' stands twice"),
    ("p.csv", "image,x,y,class\n", "no points"), ("p.geojson", "{}", "no GeoJSON FeatureCollection"),
    ("p.geojson", '{"features": null}', "no GeoJSON FeatureCollection"),
    ("p.geojson", "[1]", r"holds \[1\]; expected JSON"),
    ("p.geojson", '{"features": [{"properties": {"image": "a", "class": "road"}, "geometry": {'
     '"type": "Point", "coordinates": [NaN, 2]}}]}', "NaN is no number"), ("p.geojson", "[" * 10**5, "not valid JSON"),
    ("p.geojson", '{"features": [{"properties": {"image": "a", "class": "road"}, "geometry": {'
     '"type": "Point", "coordinates": [1' + "0" * 400 + ', 2]}}]}', "not valid JSON .10+[.]{3} is too large a number"),
    ("p.csv", 'image,x,y,class\n"a,2,2,roof\n' + "a,2,2,roof\n" * 20_000, "line 2.*is a quote left open"),
    ("p.csv", "image,x,y,class\ra,11,480,roof\r", "line 2: .*outside"),  # line ends of old spreadsheets
    ("p.geojson", json.dumps({"features": [{"properties": {"image": "a", "class": "road"}, "geometry": {
        "type": "Point", "coordinates": "12"}}]}), "feature 1: expected a Point"),
    ("p.geojson", '{"features": [{"properties": {}}]}', "feature 1: expected a Point"),
    ("q.csv", None, "no such file; expected a .csv or"),
    ("p.geojson", json.dumps({"features": [{"properties": {"image": "a", "class": "road"}, "geometry": {
        "type": "Point", "coordinates": [11.5, 480.2]}}]}), "feature 1: .*outside")])
def test_a_file_that_is_none_says_so(files, tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=said):
        points.read_points(tmp_path / name, files, NAMES)


POINTS = [("a", 13.40020, 52.50014, "road"), ("a", 13.40061, 52.50042, "roof"), ("val/b", 13.40102, 52.50071, "tree")]


def geojson(points, **more):
    features = [{"type": "Feature", "properties": {"image": image, "class": label},
                 "geometry": {"type": "Point", "coordinates": [x, y]}} for image, x, y, label in points]
    return json.dumps({"type": "FeatureCollection", **more, "features": features})


def table(points, header="image,x,y,class"):
    return "\n".join([header, *(",".join(map(str, row)) for row in points)])


CRS = {"type": "name", "properties": {"name": "urn:ogc:def:crs:OGC:1.3:CRS84"}}


@pytest.mark.parametrize("name, text, said", [
    ("p.geojson", geojson(POINTS, crs=CRS), "urn:ogc:def:crs:OGC:1.3:CRS84, as .crs. says"),
    ("p.geojson", geojson(POINTS[:1], crs="EPSG:4326"), "EPSG:4326, as"),
    ("p.geojson", geojson([("a", 500010.5, 4000010.5, "road")], crs={"properties": None}), "properties.*, as .crs."),
    ("p.geojson", geojson(POINTS), "degrees, it seems"), ("p.csv", table(POINTS), "degrees, it seems"),
    ("p.csv", table([(f"{i}", 13 + i / 9, 52.1, "road") for i in range(5)]), "degrees, it seems"),
    ("p.csv", table(POINTS, "image,lon,lat,class"), "the columns lon, lat"),
    ("p.csv", table(POINTS, "image,Longitude,Latitude,class"), "the columns Longitude, Latitude"),
    ("p.csv", table([("a", 500010, 4000010, "road")], "image,Easting,Northing,class"), "columns Easting, Northing")])
def test_coordinates_that_are_no_pixels_are_refused(files, tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=f"{name}: coordinates in .*{said}.*; expected pixels: x, the column") as e:
        points.read_points(tmp_path / name, files, NAMES)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("code, scale", [(32633, 0.5), (4326, 1e-5)])
@pytest.mark.parametrize("tiled", [False, True])
def test_coordinates_of_a_map_become_pixels_by_the_georeference(tmp_path, code, scale, tiled):
    """rasterio says where the middle of each pixel lies; the file with those places gives the pixels back."""
    image, names = tmp_path / "a.tif", ["road", "roof", "tree"]
    corner = (500000.0, 4000000.0) if code != 4326 else (13.4, 52.5)
    transform = rasterio.transform.from_origin(*corner, scale, scale)
    with rasterio.open(image, "w", driver="GTiff", width=80, height=60, count=3, dtype="uint8",
                       crs=f"EPSG:{code}", transform=transform) as file:
        file.write(np.ones((3, 60, 80), np.uint8))
    pixels = [(3, 7, 0), (40, 59, 1), (79, 0, 2)]
    places = [("a", *rasterio.transform.xy(transform, y, x), names[c]) for x, y, c in pixels]
    crs = {"type": "name", "properties": {"name": f"urn:ogc:def:crs:EPSG::{code}"}}
    texts = {"p.geojson": geojson(places, crs=crs)}
    if code == 4326:
        texts["p.csv"] = table(places, "image,lon,lat,class")
    box = (0, 0, 60, 80) if tiled else None
    files = {"a": (image, None, *[box][:tiled])}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert points.read_points(tmp_path / name, files, names)["a"].tolist() == [list(p) for p in pixels]
    other = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::3857"}}
    (tmp_path / "q.geojson").write_text(geojson(places, crs=other))
    with pytest.raises(BadInput, match=f"EPSG::3857.* but .*a.tif lies in EPSG:{code}; .*ogr2ogr -t_srs EPSG:{code}"):
        points.read_points(str(tmp_path / "q.geojson"), files, names)
    if code == 4326:
        return
    # Columns of metres are in the system of the image; without such names the message tells them.
    for header in ("image,easting,northing,class", " Image , Easting,NORTHING , Class"):
        (tmp_path / "m.csv").write_text(table(places, header))
        assert points.read_points(tmp_path / "m.csv", files, names)["a"].tolist() == [list(p) for p in pixels]
    (tmp_path / "m.csv").write_text(table(places))
    (tmp_path / "m.geojson").write_text(geojson(places))
    for name in "m.csv", "m.geojson":
        with pytest.raises(BadInput, match='columns easting and northing, .* "crs": .*"EPSG:32633"'):
            points.read_points(tmp_path / name, files, names)
    # Degrees in a table: the command says what they are and in which columns.
    (tmp_path / "d.csv").write_text(table([("a", 15.0, 36.1, "road")], "image,Lon,Lat,class"))
    with pytest.raises(BadInput, match=r"ogr2ogr -s_srs EPSG:4326 -oo X_POSSIBLE_NAMES=Lon -oo Y_POSSIBLE_NAMES=Lat "
                                       r"-t_srs EPSG:32633 -lco RFC7946=NO \S*d_32633.geojson \S*d.csv"):
        points.read_points(str(tmp_path / "d.csv"), files, names)


@pytest.mark.parametrize("name, text, want", [
    ("p.geojson", geojson([("a", 3.2, 7.9, "road"), ("a", 40, 7, "tree")], crs=None), [[3, 7, 0], [40, 7, 2]]),
    ("p.csv", table([("a", 3, 4, "road"), ("a", 4, 4, "road"), ("a", 3, 5, "roof")]),
     [[3, 4, 0], [4, 4, 0], [3, 5, 1]]),
    ("p.csv", table([("a", 3.2, 4.1, "road"), ("a", 3.4, 4.9, "road")]), [[3, 4, 0]]),
    ("p.csv", table([("a", 8, 9, "road", 13.4, 52.5)], "image,x,y,class,lon,lat"), [[8, 9, 0]])])
def test_pixels_that_lie_close_stay_pixels(files, tmp_path, name, text, want):
    (tmp_path / name).write_text(text)
    assert points.read_points(tmp_path / name, files, NAMES)["train/a"].tolist() == want


@pytest.mark.parametrize("text, said", [
    ("image;x;y;class\na;3;4;W\u00e4lder\n".encode("cp1252"), "line 2: unknown class .*; the file is not UTF-8 text: "
     "save it again, in a spreadsheet as CSV UTF-8"),
    (b"image;x;y;class\na;3,5;4,5;road\n", "line 2: '3,5' is no number; .*, with a decimal point")])
def test_tables_of_spreadsheets_are_told_what_to_save(files, tmp_path, text, said):
    (tmp_path / "p.csv").write_bytes(text)
    with pytest.raises(BadInput, match=said):
        points.read_points(tmp_path / "p.csv", files, NAMES)


# ---- crops

def every_pixel(mask):
    y, x = np.nonzero(mask != IGNORE)
    return np.stack([x, y, mask[y, x]], 1).astype(np.int64)


@pytest.mark.parametrize("scale", [1.0, 0.9, 0.7, 0.5, 0.33])
def test_points_everywhere_are_the_mask_resized(scale):
    mask = np.random.default_rng(3).integers(0, 200, (75, 90), np.uint8)
    for centre in ((0, 0), (37, 45), (70, 20)):
        _, want = crop(np.zeros((75, 90, 3), np.uint8), mask, 32, scale, centre)
        got = np.full((32, 32), IGNORE, np.uint8)
        points.mark(got, every_pixel(mask), *crop_window(75, 90, 32, scale, centre))
        np.testing.assert_array_equal(got, want)


def test_a_point_stays_one_pixel_on_what_it_marks_at_every_scale():
    rng = np.random.default_rng(0)
    for _ in range(200):
        at = rng.integers(6, [90, 70])  # x, y
        image = np.zeros((70, 90, 3), np.uint8)
        image[max(0, at[1] - 2):at[1] + 3, max(0, at[0] - 2):at[0] + 3] = 255
        scale, centre = random_place(70, 90, 48, (0.5, 2), rng)
        centre = around(at[::-1], 48 / scale, rng)
        x, y = crop(image, np.full((70, 90), IGNORE, np.uint8), 48, scale, centre)
        points.mark(y, np.array([[*at, 1]]), *crop_window(70, 90, 48, scale, centre))
        assert (y == 1).sum() == 1 and x[y == 1].min() > 180


def test_a_point_outside_the_crop_is_not_marked():
    y, part = np.full((8, 8), IGNORE, np.uint8), (3, 3, 6, 6)
    for ps in (np.array([[9, 2, 1], [2, 9, 1], [10, 10, 1]]), np.zeros((0, 3), np.int64)):
        points.mark(y, ps, part, (8, 8))
        assert (y == IGNORE).all() and len(points.inside(ps, part)) == 0
    points.mark(y, np.array([[8, 3, 1]]), part, (8, 8))  # x 8 is its last column, y 3 its first row
    assert y[0, 7] == 1 and (y != IGNORE).sum() == 1


# ---- scores

@pytest.mark.parametrize("seed", range(5))
def test_averages_are_those_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    true, pred = rng.integers(0, 4, 300), rng.integers(seed % 3, 6, 300)  # 4, 5 never true; 0 perhaps never predicted
    got = metrics.averages(metrics.confusion(torch.tensor(pred), torch.tensor(true), 7))
    want = {"accuracy": accuracy_score(true, pred)}
    for average in ("macro", "weighted"):
        scores = precision_recall_fscore_support(true, pred, average=average, zero_division=0)[:3]
        want |= {f"{n}_{average}": s for n, s in zip(("precision", "recall", "f1"), scores)}
    assert got.keys() == want.keys()
    assert got == pytest.approx(want, abs=1e-12)
    assert set(metrics.averages(torch.zeros(3, 3, dtype=torch.int64)).values()) == {0.0}


def test_the_reports_validation_scores_are_those_of_a_constant_answer():
    cm = torch.zeros(6, 6, dtype=torch.int64)
    cm[:, 2] = torch.tensor([100, 150, 9430, 120, 80, 120])  # one class holds .9430 of the pixels and is always said
    got = metrics.averages(cm)
    assert torch.equal(metrics.majority(cm), cm)
    report = {"accuracy": 0.94, "precision_weighted": 0.8893, "recall_weighted": 0.9430, "f1_weighted": 0.9153}
    assert all(got[k] == pytest.approx(v, abs=0.005 if k == "accuracy" else 1e-4) for k, v in report.items())
    assert metrics.iou(cm).nanmean() < 0.16


def test_every_pattern_is_explained():
    assert all(re.match("[a-z].* (image|class)$", text) for text in points.PATTERNS.values())
