"""data/results.py: what is finished, areas of classes, the style for QGIS."""
import hashlib
import json
import tracemalloc
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import rasterio

from data.results import Finished, area_summary, areas, found_masks, mark_of, qml, read_back
from data.tiff import Tiff, TiffWriter


def test_an_image_is_finished_while_its_files_are_the_same(tmp_path):
    for name in ("a.tif", "a.qml", "b.tif"):
        (tmp_path / name).write_text(name)
    done = Finished(tmp_path)
    assert done.find("a", "x") is None
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a.tif", "a.qml", "b.tif")}
    done.add("a", "x", {name: digests[name] for name in ("a.tif", "a.qml")}, dict(pixels=[1]))
    Finished(tmp_path).add("b", "x", {"b.tif": digests["b.tif"]}, dict(pixels=[2]))
    assert done.find("b", "x") == dict(pixels=[2])  # which another process has finished meanwhile
    with open(tmp_path / ".finished.jsonl", "a") as f:
        f.write('\n{"image": "b", "ma')  # killed here
    again = Finished(tmp_path)
    assert again.find("a", "x") == dict(pixels=[1]) and again.find("b", "x") == dict(pixels=[2])
    assert again.find("a", "other weights") is None
    (tmp_path / "a.qml").write_text("by hand")
    assert again.find("a", "x") is None
    (tmp_path / "b.tif").unlink()
    assert again.find("b", "x") is None


def test_masks_of_other_calls_count_while_they_mean_the_same_and_are_the_same(tmp_path):
    finished = Finished(tmp_path)
    digests = {}
    for name, values, weights in (("c", [1], "w"), ("a", [1], "w"), ("b", [1], "v"), ("d", [2], "w"), ("e", [1], "w")):
        (tmp_path / f"{name}.tif").write_text(name)
        digests[name] = hashlib.sha256(name.encode()).hexdigest()
        facts = dict(pixels=[1], values=values, weights=weights)
        finished.add(name, "x", {f"{name}.tif": digests[name]}, facts)
    (tmp_path / "e.tif").write_text("by hand")
    facts, more, others = found_masks(tmp_path, {"c": "x"}, dict(values=[1], weights="w"))
    assert list(facts) == ["a", "b", "c"] and (more, others) == (2, 1)
    assert list(found_masks(tmp_path, {"c": "other"}, dict(values=[1], weights="w"))[0]) == ["a", "b"]


def test_the_mark_changes_with_all_that_a_result_depends_on(tmp_path):
    file = tmp_path / "a.tif"
    file.write_text("1")
    marks = {mark_of(dict(overlap=0.25), file)}
    assert marks == {mark_of(dict(overlap=0.25), file)}
    marks.add(mark_of(dict(overlap=0.5), file))
    for beside in ("a.tif", "a.tfw", "a.tif.msk"):
        (tmp_path / beside).write_text("22")
        marks.add(mark_of(dict(overlap=0.25), file))
    assert len(marks) == 5


def counted(**pixels):
    counts = np.zeros(256, np.int64)
    for i, n in pixels.items():
        counts[int(i[1:])] = n
    return counts


def test_areas_by_class_in_pixels_metres_and_hectares(tmp_path):
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", count=1, height=8, width=9, dtype="uint8",
                       crs="EPSG:32632", transform=rasterio.Affine(5, 0, 5e5, 0, -2, 5e6)):
        pass
    a = areas(counted(_0=2000, _1=30, _255=7), Tiff(tmp_path / "a.tif").georef)
    b = areas(counted(_1=100), None)
    found = json.loads(json.dumps(area_summary(dict(a=a), ["land", "sea"])))
    assert found["images"]["a"] == dict(
        pixels=dict(land=2000, sea=30), without_class=7, pixel_m2=10.0, m2=dict(land=20000, sea=300),
        hectares=dict(land=2.0, sea=0.03))
    assert found["total"] == dict(pixels=dict(land=2000, sea=30), without_class=7, m2=dict(land=20000, sea=300),
                                  hectares=dict(land=2.0, sea=0.03))
    found = area_summary(dict(a=a, b=b), ["land", "sea"])
    assert found["images"]["b"]["area"] == "not known: no georeference"
    assert found["total"] == dict(
        pixels=dict(land=2000, sea=130), without_class=7, area="not known: b: no georeference")
    b["pixel_m2"] = 1.0
    assert area_summary(dict(a=a, b=b), ["land", "sea"])["total"]["m2"] == dict(land=20000, sea=400)


def test_areas_carry_no_noise_and_sums_are_of_what_was_not_rounded():
    """0.1 m x 0.1 m: 7 pixels are 0.07 m2; in binary 0.1 * 0.1 * 7 is 0.07000000000000002."""
    facts = dict(pixels=counted(_0=7, _1=123_456_789).tolist(), pixel_m2=0.1 * 0.1, unknown="")
    found = area_summary(dict(a=facts), ["land", "sea"])
    assert found["images"]["a"]["pixel_m2"] == 0.01
    for table in (found["images"]["a"], found["total"]):
        assert table["m2"] == dict(land=0.07, sea=1234567.89)
        assert table["hectares"] == dict(land=0.000007, sea=123.456789)
    # Of four images with a third of 0.0001 m2 each, none of them has one, all together have.
    third = dict(pixels=counted(_0=1).tolist(), pixel_m2=0.0001 / 3, unknown="")
    found = area_summary(dict.fromkeys("abcd", third), ["land"])
    assert [table["m2"]["land"] for table in found["images"].values()] == [0, 0, 0, 0]
    assert found["total"]["m2"] == dict(land=0.0001)


def test_the_style_names_and_colours_every_value():
    colors = np.array([[255, 0, 16], [1, 2, 3]], np.uint8)
    tree = ElementTree.fromstring(qml(['"a" & <b>', "ö"], [3, 7], colors))
    assert tree.find(".//rasterrenderer").get("type") == "paletted"
    entries = [(e.get("value"), e.get("color"), e.get("label")) for e in tree.iter("paletteEntry")]
    assert entries == [("3", "#ff0010", '"a" & <b>'), ("7", "#010203", "ö")]


@pytest.mark.parametrize("text", ["{}", "[]", '{"image": 3}', ""])
def test_lines_that_mean_nothing_are_passed_over(tmp_path, text):
    (tmp_path / ".finished.jsonl").write_text(text)
    assert Finished(tmp_path).find("a", "x") is None


def test_a_mask_is_read_back_in_the_memory_of_a_strip_not_of_the_image(tmp_path):
    ids = np.random.default_rng(0).integers(0, 3, (8192, 300), np.uint8)
    writer = TiffWriter(tmp_path / "a.tif", (*ids.shape, 1))
    writer.start(0, 300)
    writer.append(ids)
    writer.finish()
    tracemalloc.start()
    counts, thinned = read_back(tmp_path / "a.tif", None, False, 100)  # labels are for raw values
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(counts, np.bincount(ids.ravel(), minlength=256))
    np.testing.assert_array_equal(thinned, ids[::100, ::100])
    assert peak < ids.nbytes / 2
