"""data/classmap.py: classes meet by name, whatever their order, and a wrong map is one line."""
import re

import numpy as np
import pytest

from data import classmap
from data.common import BadInput, write

TEACHER = ["green", "soil", "wet", "built", "street"]
STUDENT = ["field", "grassland", "forest", "water", "building"]
MAP = {"green": {"grassland": 0.7, "forest": 0.3}, "soil": "field", "wet": "water",
       "built": "building",
       "street": None}


def read(tmp_path, **content):
    write(tmp_path / "map.json", content)
    return classmap.read_map(tmp_path / "map.json", TEACHER, STUDENT)


def test_a_map_goes_by_name_whatever_its_order(tmp_path):
    want = [[0, 0.7, 0.3, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    for rows in (MAP, dict(reversed(MAP.items()))):
        assert read(tmp_path, map=rows, teacher=TEACHER, student=STUDENT).tolist() == want
    many = read(tmp_path, map=dict.fromkeys(TEACHER, "forest"))
    assert many[:, 2].tolist() == [1] * 5 and many.sum() == 5


def test_a_map_may_be_stored_and_read_again(tmp_path):
    shares = read(tmp_path, map=MAP)
    rows = classmap.rows(TEACHER, STUDENT, shares)
    assert rows["street"] is None
    np.testing.assert_array_equal(read(tmp_path, map=rows), shares)


@pytest.mark.parametrize("change, words", [
    ({"green": {"grassland": 0.7, "forest": 0.2}}, "shares of 'green' sum to 0.9, not 1"),
    ({"green": {"grassland": 1.5, "forest": -0.5}}, "expected a name"),
    ({"green": 3}, "goes to 3; expected a name"), ({"green": {"forest": True}}, "expected a name"),
    ({"green": "gras"}, "'green' goes to 'gras', which the student does not have; it has field"),
    ({"greens": "field"}, "the teacher has no class 'greens'; it has green, soil")])
def test_a_wrong_map_is_refused_with_one_line(tmp_path, change, words):
    with pytest.raises(BadInput, match=re.escape(words)) as e:
        read(tmp_path, map=MAP | change)
    assert "map.json" in str(e.value) and "\n" not in str(e.value)


def test_the_rest_that_can_be_wrong_with_a_map(tmp_path):
    with pytest.raises(BadInput, match="nothing for the teacher's 'wet', 'street'"):
        read(tmp_path, map={k: v for k, v in MAP.items() if k not in ("wet", "street")})
    with pytest.raises(BadInput, match='"teacher" lists .*the order of its outputs counts'):
        read(tmp_path, map=MAP, teacher=TEACHER[::-1])
    with pytest.raises(BadInput, match='no "map" in it'):
        read(tmp_path, maps=MAP)
    (tmp_path / "map.json").write_text('{"map": {"green": "field", "green": "forest"}}')
    with pytest.raises(BadInput, match="'green' stands twice"):
        classmap.read_map(tmp_path / "map.json", TEACHER, STUDENT)
    with pytest.raises(BadInput, match="none.json: no such file"):
        classmap.read_map(tmp_path / "none.json", TEACHER, STUDENT)


def test_equal_names_meet_and_others_must_be_mapped():
    assert classmap.same_names(["b", "a"], ["a", "b", "c"]).tolist() == [[0, 1, 0], [1, 0, 0]]
    with pytest.raises(BadInput, match="equal class names.*'soil', 'wet'"):
        classmap.same_names(TEACHER, ["green", "built", "street"])


def test_the_measured_map_is_shares_of_what_the_teacher_says():
    shares = classmap.measured([[6, 2, 0], [0, 0, 0], [0, 1, 99]])
    assert shares.tolist() == [[0.75, 0.25, 0], [0, 0, 0], [0, 0.01, 0.99]]
    # Class 1 is rare, but most of it lies where the teacher says its class 0.
    shares = classmap.measured([[96, 3, 1], [0, 0, 0], [4, 0, 96]], 0.05)
    np.testing.assert_allclose(shares, [[96 / 99, 3 / 99, 0], [0, 0, 0], [0, 0, 1]])


def test_the_table_shows_maps_side_by_side():
    rows = {"a": "x", "b": None, "c": {"y": 0.5, "z": 0.5}}
    named = classmap.matrix(rows, ["a", "b", "c"], ["x", "y", "z"])
    measured = np.array([[0.75, 0.25, 0], [0, 0, 0], [0, 0.01, 0.99]])
    text = classmap.table(["a", "b", "c"], ["x", "y", "z"], named=named, measured=measured)
    assert text.splitlines() == [
        "teacher  -> student (named)  -> student (measured)",
        "a        x                   0.75 x + 0.25 y",
        "b        -                   -", "c        0.50 y + 0.50 z     0.99 z"]
    assert "silent about: z" in classmap.table(["a"], ["x", "z"], named=np.array([[1, 0]]))


def test_a_map_that_the_images_contradict_is_named():
    given = np.array([[1, 0], [1, 0], [0, 0]])
    measured = np.array([[0.9, 0.1], [0.2, 0.8], [0, 1]])
    assert classmap.contradicted(["a", "b", "c"], given, measured) == ["b"]
