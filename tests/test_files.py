"""data/files.py: what a folder holds, what patterns and words of a command line mean; oracles: glob, definitions."""
import glob
import os
import re
from pathlib import Path

import pytest

from data import files as files_module
from data.common import BadInput
from data.files import Names, image_name, is_file_name, is_hidden, match, not_used, star_key, typed, walk


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


# ---- folders

@pytest.mark.parametrize("names, hidden", [
    (["b.png", "_DSC0001.JPG", "_a", "a..b", "~a.png", "#1.png", "$a.png", "icon.png"], False),
    ([".a.png", "._b.png", ".ipynb_checkpoints", ".DS_Store", "__MACOSX", "Thumbs.db", "desktop.ini", "thumbs.db",
      "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Icon\r"], True)])
def test_hidden_and_system_files(names, hidden):
    assert [name for name in names if is_hidden(name) != hidden] == []


def test_a_walk_goes_by_the_order_of_paths_and_may_be_told_what_fits(tmp_path):
    names = ["b/1.png", "a.png", "a/z.png", "a/b/c/1.png", "A.txt", "b.png", "a/b.png", "a-b/1.png", "a/b-c/1.png"]
    touch(tmp_path, *names)
    assert list(walk(tmp_path)) == sorted(tmp_path / name for name in names)
    any_name, starts_with_a = re.compile(".*"), re.compile("a.*")
    for levels, want in (([any_name], [n for n in names if "/" not in n]),
                         ([starts_with_a, any_name], ["a-b/1.png", "a/b.png", "a/z.png"]),
                         ([starts_with_a, any_name, any_name], ["a/b-c/1.png"])):
        assert list(walk(tmp_path, levels)) == sorted(tmp_path / name for name in want)


def test_links_to_nothing_are_files_that_cannot_be_read_not_left_out(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    assert [file.name for file in walk(tmp_path)] == ["gone.png", "round.png"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(BadInput, match="a: cannot be read .No such file or directory.; make it readable"):
        list(walk(tmp_path / "a"))


@pytest.mark.parametrize("path, name", [
    ("T 1/a.png", "T 1/a"), ("a.b.TIFF", "a.b"), ("t1.2020", "t1.2020"), ("t0.5.jpg", "t0.5"), ("a", "a"),
    ("a.png/b", "a.png/b"), (".png", ".png")])
def test_only_the_suffix_of_an_image_is_cut(tmp_path, path, name):
    assert image_name((tmp_path / path).relative_to(tmp_path)) == name


def test_files_not_used_are_counted_by_suffix(tmp_path):
    files = [tmp_path / name for name in ("b.jp2", "a.txt", "c.jp2", "README")]
    assert not_used(files) == ("4 files are no images by their suffix: 2 .jp2, 1 .txt, 1 without suffix; first "
                               f"{tmp_path}/b.jp2; images are converted with gdal_translate -co COMPRESS=DEFLATE "
                               f"{tmp_path}/b.jp2 {tmp_path}/b.tif")


# ---- names that become files

@pytest.mark.parametrize("good, names", [
    (True, ["a", "a b", "..a", "...", ".a", "水", "a.b", "x" * 200, "-", "~", "C:"]),
    (False, ["", ".", "..", "/", "a/b", "../a", "a/", "\\", "a\\b", "a\0", "a\nb",
             "x" * 201, "水" * 67, 3, None, ["a"]])])
def test_a_name_is_a_name_and_no_path(tmp_path, good, names):
    assert [is_file_name(name) for name in names] == [good] * len(names)
    for name in names if good else ():  # and the system can make it, inside
        (tmp_path / f"{name}-points-12").mkdir()
    assert good == (len(list(tmp_path.iterdir())) == len(names))


# ---- patterns

@pytest.mark.parametrize("pattern, path, key", [
    ("T */*.png", "T 2/a.png", "2/a"), ("T [1-3]/*.png", "T 2/a.png", "2/a"), ("T [!1]/*.png", "T 2/a.png", "2/a"),
    ("**/*.png", "a.png", "/a"), ("**/*.png", "x/y/a.png", "x/y//a"), ("a?.png", "ab.png", "b"),
    ("*.png", "x/a.png", None), ("a[[]1]/*.png", "a[1]/x.png", "x"), ("a[1]/*.png", "a[1]/x.png", None),
    ("a[[b]/*", "a[/x", "[/x"), ("a[]b]/*", "a]/x", "]/x"), ("a[[]*[]]", "a[7]", "7"), ("[*][?]*", "*?a", "a"),
    ("a.b+(c)|{1}^$/*", "a.b+(c)|{1}^$/x", "x"), ("a[^1]", "a^", "^"), ("a[", "a[", ""), ("*", "a\nb", "a\nb")])
def test_stars_stand_for_text(pattern, path, key):
    assert star_key(pattern, path) == key


FILES = ["a.png", "x/a.png", "x/b.jpg", "x/y/a.png", "x/y/z/c.tif", "area[1]/a.png", "area1/a.png", "w*/a.png", "w?"]


@pytest.mark.parametrize("pattern", [
    "*.png", "*/*.png", "x/*", "x/y/*.png", "**/*.png", "x/**/*.png", "x/**", "area[1]/*.png", "area[[]1]/*.png",
    "x/a.png", "./x/*.png", "x//*.png", "x/../*.png", "[!x]*/*.png", "none/*.png", "w[*]/*", "w[?]", "?/?.png"])
def test_a_pattern_means_the_files_that_glob_finds(tmp_path, pattern):
    touch(tmp_path, *FILES)
    found = glob.glob(pattern, root_dir=tmp_path, recursive=True)
    want = {(tmp_path / name).resolve() for name in found if (tmp_path / name).is_file()}
    assert {file.resolve() for file, _ in match(tmp_path, pattern)} == want


def test_backslashes_of_windows_and_what_is_no_pattern(tmp_path):
    touch(tmp_path, *FILES)
    assert [stars for _, stars in match(tmp_path, "x\\y\\*.png")] == ["a"]
    for pattern in ("", "/x/*.png", 5, None, "[z-a]*"):
        with pytest.raises(BadInput, match="is no pattern .*expected 'images/") as e:
            list(match(tmp_path, pattern))
        assert "\n" not in str(e.value)


def test_a_typed_word_is_itself_where_it_is_there_and_else_a_pattern(tmp_path, monkeypatch):
    touch(tmp_path, *FILES, "x/.hidden.png", "__MACOSX/a.png", "area[1]/b1.png")
    monkeypatch.chdir(tmp_path)

    def names(word):
        return [path.as_posix() for path in typed(word)]

    assert names("area[1]") == ["area[1]"] and names("w*/a.png") == ["w*/a.png"] and names("w?") == ["w?"]
    assert names("area[1]/*.png") == ["area[1]/a.png", "area[1]/b1.png"]  # of a folder that is there
    assert names("area[1]/b[1-3].png") == ["area[1]/b1.png"]
    assert names("area?/a.png") == ["area1/a.png"]
    assert names("*.png") == ["a.png"] and names("x/*") == ["x/a.png", "x/b.jpg", "x/y"]
    assert names("*/a.png") == ["area1/a.png", "area[1]/a.png", "w*/a.png", "x/a.png"]
    assert names("**/c.tif") == ["x/y/z/c.tif"] and names(f"{tmp_path}/x/*.jpg") == [f"{tmp_path}/x/b.jpg"]
    assert names("none") == names("none/*.png") == names("x/none*") == []


# ---- names in lists and tables

@pytest.fixture
def pairs(tmp_path):
    """Images of all kinds of names, with masks; two have the same last part."""
    names = ["T 1/a", "T 1/b", "T 2/a", "T 3/c.5", "T 3/d", "x/é 1", "T 1/t0", "T 1/t0.2020"]
    found = {}
    for name in names:
        touch(tmp_path, f"{name}.tif", f"masks/{name}_m.png")
        found[name] = tmp_path / f"{name}.tif", tmp_path / f"masks/{name}_m.png"
    return found


@pytest.mark.parametrize("text, name", [
    ("T 1/a", "T 1/a"), ("T 1/a.tif", "T 1/a"), ("T 1/a.PNG", "T 1/a"), ("b", "T 1/b"), ("b.jpg", "T 1/b"),
    ("a", None), ("a.tif", None), ("T 3/a", None), ("1/a", None), ("x/b", None), ("other/T 1/b", None),
    ("c.5", "T 3/c.5"), ("c.5.png", "T 3/c.5"), ("c", None), ("c.png", None), ("c.6", None), ("d.5", None),
    ("d.", None),
    ("t0.5", None), ("t0.2020", "T 1/t0.2020"), ("t0.2021", None), ("t0.png", "T 1/t0"), ("t0.png.png", None),
    ("", None), ("T 1\\a.tif", "T 1/a"), (".\\T 1\\b", "T 1/b"), ("./T 1/a", "T 1/a"), ("/T 1/a.tif", "T 1/a"),
    ("T 1//b", "T 1/b"), ("T 2/../T 1/a", "T 1/a"), ("ROOT/T 1/a.tif", "T 1/a"), ("ROOT/T 1/a", "T 1/a"),
    ("ROOT/T 1/c.5", None), ("ROOT", None), ("ROOT/x/e\u0301 1.tif", "x/é 1"),
    ("LINK/T 2/a.tif", "T 2/a"), ("/home/alice/T 1/a.tif", None), ("C:\\set\\T 1\\a.tif", None),
    ("x/e\u0301 1", "x/é 1"), ("e\u0301 1.tif", "x/é 1"), ("x/e 1", None), ("/a\0/T 1/a.tif", None)])
def test_nothing_of_a_name_is_cut_but_the_suffix_of_an_image(pairs, tmp_path, text, name):
    (tmp_path.with_name(tmp_path.name + "-link")).symlink_to(tmp_path)
    text = text.replace("ROOT", str(tmp_path)).replace("LINK", f"{tmp_path}-link")
    names = Names(pairs)
    assert names.find(text) == names.find_line(text) == name
    for own in pairs:  # its own names before all
        assert names.find(own) == own


@pytest.mark.parametrize("line, name", [
    ("T 1/a.tif masks/T 1/a_m.png", "T 1/a"), ("T 1/a.tif,masks/T 1/a_m.png", "T 1/a"), ("b\tb_m", "T 1/b"),
    ("T 1\\a.tif ; masks\\T 1\\a_m.png", "T 1/a"), ("ROOT/T 2/a.tif ROOT/masks/T 2/a_m.png", "T 2/a"),
    ("é 1 /masks/x/e\u0301 1_m.png", "x/é 1"), ("T 1/x.tif masks/T 1/a_m.png", None),
    ("masks/T 1/a_m.png T 1/a.tif", None)])
def test_a_line_may_hold_an_image_and_its_mask(pairs, tmp_path, line, name):
    assert Names(pairs).find_line(line.replace("ROOT", str(tmp_path))) == name


@pytest.mark.parametrize("line", ["T 1/a.tif masks/T 1/b_m.png", "T 1/a.tif m.png", "b 1", "b b", "b _m.png"])
def test_a_line_with_another_mask_is_refused(pairs, line):
    with pytest.raises(BadInput, match=r"the mask of T 1/[ab] is .*/masks/T 1/[ab]_m.png; correct the line") as e:
        Names(pairs).find_line(line)
    assert "\n" not in str(e.value)


def test_one_file_of_several_tiles_is_none_of_them(tmp_path):
    file = tmp_path / "s.tif"
    names = Names({f"s_{k}": (file, None, (0, 8 * k, 8, 8)) for k in range(2)})
    assert names.find("s_1.tif") == "s_1" and names.find(str(file)) is None


def test_a_suffix_that_the_data_set_itself_has_counts_as_one():
    assert Names({"a": (Path("/d/a.jp2"), None)}).find("a.jp2") == "a"
    assert Names({"a": (Path("/d/a.png"), None)}).find("a.jp2") is None


def test_a_pattern_of_too_many_stars_is_refused_in_time(monkeypatch):
    monkeypatch.setattr(files_module, "MATCH_TIME", 0.1)
    with pytest.raises(BadInput, match="too many stars to compare with 'aaa"):
        star_key("*a" * 30 + "b", "a" * 200)
    assert star_key("*a*b", "xaab") == "xa/"
