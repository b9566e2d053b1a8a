"""data/common.py: files whole or not at all, progress when it takes long, samples evenly spread."""
import errno
import io
import json
import math
import os
import re
import signal
import socket
import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gloo import FORK
from PIL import Image

from data import common
from data.common import (
    BadInput, Written, as_text, check_file, check_pixels, escaped, even_sample, in_time, json_lines, json_text,
    minutes, nfc, number, print_anything, progress, read_json, read_text, replace, write)
from data.io import read_image, read_mask
from data.raster import open_raster
from data.tiff import Tiff
from models import weights
from models.checkpoint import load_state
from models.weights import BadWeights


# ---- files

@pytest.mark.parametrize("content, stored", [
    ("line\n", b"line\n"), (b"\x00\xff", b"\x00\xff"),
    ({"a": [1, None]}, b'{\n "a": [\n  1,\n  null\n ]\n}\n')])
def test_write_makes_folders_and_stores_text_bytes_and_json(tmp_path, content, stored):
    write(tmp_path / "deep/er/file", content)
    write(tmp_path / "deep/er/file", content)  # over the old one
    assert (tmp_path / "deep/er/file").read_bytes() == stored


@pytest.mark.parametrize("suffix, kind", [(".png", "PNG"), (".jpg", "JPEG"), (".tif", "TIFF")])
def test_pictures_are_stored_as_their_suffix_says(tmp_path, suffix, kind):
    picture = Image.fromarray(np.full((4, 6, 3), 90, np.uint8))
    write(tmp_path / f"a{suffix}", picture)
    back = Image.open(tmp_path / f"a{suffix}")
    assert back.format == kind
    assert np.abs(np.asarray(back).astype(int) - 90).max() <= 2


def half_then(error):
    def save(name):
        Path(name).write_text("hal")
        raise error
    return save


@pytest.mark.parametrize("save, raised, said", [
    (half_then(OSError(errno.ENOSPC, "No space left")), OSError,
     "cannot be written .No space left"),
    (half_then(RuntimeError("PytorchStreamWriter failed")), OSError,
     "a.json: cannot be written .torch could not finish it.; is the disk full"),
    (half_then(ZeroDivisionError("mine")), ZeroDivisionError, "mine"),
    (half_then(KeyboardInterrupt()), KeyboardInterrupt, None)])
def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, save, raised, said):
    write(tmp_path / "a.json", {"old": [1]})
    with pytest.raises(raised, match=said):
        replace(tmp_path / "a.json", save)
    assert read_json(tmp_path / "a.json") == {"old": [1]}
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_a_job_killed_in_the_middle_leaves_the_old_file(tmp_path):
    def die(name):
        Path(name).write_text("hal")
        os.kill(os.getpid(), signal.SIGKILL)

    write(tmp_path / "a.json", {"old": [1]})
    pid = os.fork()
    if pid == 0:
        replace(tmp_path / "a.json", die)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert read_json(tmp_path / "a.json") == {"old": [1]}


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_a_file_is_readable_as_the_umask_says(tmp_path, umask, mode):
    def private(name):  # as safetensors does
        os.unlink(name)
        os.close(os.open(name, os.O_CREAT, 0o600))

    before = os.umask(umask)
    try:
        replace(tmp_path / "a", private)
        write(tmp_path / "b", "text")
    finally:
        os.umask(before)
    for name in "ab":
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/a.json: cannot be written"):
        write(tmp_path / "file/a.json", {})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_of_windows_editors_is_read_by_its_byte_order_mark(tmp_path, encoding):
    text = json.dumps({"é 水": 1}, ensure_ascii=False)
    (tmp_path / "a.json").write_bytes(text.encode(encoding))
    assert read_json(tmp_path / "a.json") == {"é 水": 1}
    assert read_text(tmp_path / "a.json") == text


@pytest.mark.parametrize("content, said", [
    (b"{", "not valid JSON"), (b"", "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"\xe9", "not UTF-8 text"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"a": 1, "b": 2, "a": 1}', "'a' stands twice"), (b'{"a": NaN}', "NaN is no number"),
    (b'{"a": [-Infinity]}', "-Infinity is no number"), (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b'{"half": "\\ud83d"}', "not valid JSON"), (b"null", "holds None; expected JSON {...}"),
    (b'["a"]', r"holds \['a'\]; expected JSON"), (b'"' + b"x" * 10**6 + b'"', "holds 'x+[.]{3}x+'; expected JSON")])
def test_what_is_no_json_or_of_another_shape_is_one_short_line(tmp_path, content, said):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(BadInput, match=f"a.json: .*{said}") as e:
        read_json(tmp_path / "a.json")
    told = str(e.value).removeprefix(str(tmp_path))
    assert "\n" not in told and len(told) < 260


def test_what_is_no_file_is_named(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="cannot be read .Is a directory"):
        read_json(tmp_path)
    with pytest.raises(BadInput, match="none.json: no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(BadInput, match=r"a\\x00.json.: cannot be read .embedded null byte"):
        read_json(tmp_path / "a\0.json")
    monkeypatch.setattr(common, "MAX_TEXT", 9)
    (tmp_path / "a.json").write_text("0123456789")
    with pytest.raises(BadInput, match="GiB; expected a text file"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("shape, good, bad", [
    (dict[str, list[str]], [{}, {"a": []}, {"a": ["b", "c"], "d": []}],
     [[], {"a": "b"}, {"a": ["b", 1]}, {"a": None}]),
    (dict[str, int], [{"a": 1}], [{"a": 1.0}, {"a": True}, {"a": "1"}, 1]),
    (list, [[], [1, "a"]], [{}, "a", None]), (dict, [{"a": [None]}], [[{}]])])
def test_the_shape_of_what_a_json_file_holds(tmp_path, shape, good, bad):
    for value in good:
        write(tmp_path / "a.json", value)
        assert read_json(tmp_path / "a.json", shape, "so") == value
    for value in bad:
        (tmp_path / "a.json").write_text(json.dumps(value))
        with pytest.raises(BadInput, match="a.json: holds .*; expected JSON so"):
            read_json(tmp_path / "a.json", shape, "so")


@pytest.mark.parametrize("text, said", [
    ("1e400", "too large a number"), ("-1e999", "too large"), (str(2**64 + 1), "too large"), ("9" * 400, "too large")])
def test_a_number_that_nothing_can_count_with_is_no_json(tmp_path, text, said):
    (tmp_path / "a.json").write_text(f'{{"a": [{text}]}}')
    with pytest.raises(BadInput, match=f"a.json: not valid JSON .*{said}"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(f'{{"a": [{2**64}, 1e300, -0.5]}}')
    assert read_json(tmp_path / "a.json") == {"a": [2**64, 1e300, -0.5]}


def test_what_json_does_not_have_is_written_as_null(tmp_path):
    value = {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf, "d": True}, "e": 3}
    want = {"a": [None, [None, 1.5]], "b": {"c": None, "d": True}, "e": 3}
    write(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == json.loads(json_text(value)) == want
    assert json.loads(json_lines([value])) == want and math.isnan(value["a"][0])  # what was given stays as it was


# ---- what is opened

@pytest.fixture
def odd_files(tmp_path):
    """{words of the refusal: what is no regular file}."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "socket"))
        yield {"fifo: a pipe, a socket or a device": tmp_path / "fifo", "zero: a pipe, a socket": tmp_path / "zero",
               "socket: a pipe, a socket": tmp_path / "socket", "Is a directory": tmp_path, "loop": tmp_path / "loop",
               "none: no such file": tmp_path / "none"}


def test_only_regular_files_are_opened(odd_files):
    """Of all readers; a FIFO would wait for ever for somebody to write."""
    for said, file in odd_files.items():
        for call in (check_file, read_text, read_json, open_raster, Tiff):
            with pytest.raises(BadInput, match=said) as e:
                call(file)
            assert str(file) in str(e.value)
        for call in (load_state, weights.read):
            with pytest.raises(BadWeights, match=str(file)):
                call(file)


def test_pixels_are_counted_before_they_are_unpacked(tmp_path, monkeypatch):
    check_pixels("a.png", 10**4, 10**5)
    with pytest.raises(BadInput, match="a.png: 10001 x 100000 pixels .* type --max-pixels 1000100000"):
        check_pixels("a.png", 10_001, 10**5)
    monkeypatch.setenv(common.PIXELS_VARIABLE, "20")
    Image.new("L", (5, 4)).save(tmp_path / "a.png")
    Image.new("L", (7, 3)).save(tmp_path / "b.tif")
    assert read_image(tmp_path / "a.png").shape == (4, 5, 3)
    for call in (read_image, read_mask):
        with pytest.raises(BadInput, match="b.tif: 3 x 7 pixels .* over the limit of 20; .* --max-pixels 21"):
            call(tmp_path / "b.tif")


def test_bytes_that_are_not_utf_8_stay_what_they_are_where_asked(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"t\xcd\xff\n")
    assert os.fsencode(read_text(tmp_path / "list.txt", "surrogateescape")) == b"t\xcd\xff\n"


def test_rows_become_one_json_object_a_line():
    rows = [dict(step=1, loss=None), dict(step=2, name="é")]
    assert [json.loads(line) for line in json_lines(rows).splitlines()] == rows
    assert json_lines(rows).endswith("}\n") and json_lines([]) == ""


# ---- output

@pytest.mark.parametrize("encoding, shown", [
    ("ascii", b"Stra\\xdfe \\u6c34 t\\udcff"), ("cp1252", b"Stra\xdfe \\u6c34 t\\udcff"),
    ("utf-8", "Straße 水 t".encode() + b"\\udcff")])
def test_text_that_a_terminal_cannot_show_is_printed_as_escapes(monkeypatch, encoding, shown):
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(f"sys.{name}", stream)
        print_anything()
        stream.write("Straße 水 " + os.fsdecode(b"t\xff"))
        stream.flush()
        assert stream.buffer.getvalue() == shown


def test_what_a_terminal_obeys_is_shown_as_escapes(monkeypatch):
    name = "a\x1b[31mb\n\rc\x9b\u202ed\x00é水"
    assert escaped(name) == "a\\x1b[31mb\\n\\rc\\x9b\\u202ed\\x00é水" and escaped("a b-é.png") == "a b-é.png"
    for stream in ("stdout", "stderr"):
        raw = io.StringIO()
        monkeypatch.setattr(f"sys.{stream}", raw)
        print_anything()
        print_anything()  # the second time changes nothing
        print(name, "x\ty", file=getattr(sys, stream))
        print("3 of 4", end="\r", file=getattr(sys, stream))
        assert raw.getvalue() == "a\\x1b[31mb\n\\rc\\x9b\\u202ed\\x00é水 x\ty\n3 of 4\r"


@pytest.mark.parametrize("text, value", [
    ("1", 1), ("-2.5", -2.5), ("+3.", 3), (".5", 0.5), ("1e-3", 0.001), (" 7 ", 7), ("1E5", 1e5)])
def test_numbers_as_people_write_them(text, value):
    assert number(text) == value and type(number(text)) is float
    if text.strip().isdigit():
        assert number(text, int) == value and type(number(text, int)) is int


@pytest.mark.parametrize("text",
                                  ["", " ", "nan", "inf", "-Infinity", "1e400", "-1e400", "1_0", "٣", "１", "²", "½",
                                  "0x10",
                                  "1,5", "1 2", "--1", "e5", ".", "True", "9" * 400, "1\n"])
def test_what_is_no_finite_number_is_refused(text):
    for kind in (int, float):
        with pytest.raises(ValueError):
            number(text, kind)


def test_what_takes_too_long_ends_with_a_message():
    before = signal.getsignal(signal.SIGALRM)
    began = time.monotonic()
    with pytest.raises(BadInput, match="^too long$"), in_time(0.1, "too long"):
        re.fullmatch("(a+)+", "a" * 40 + "b")
    assert time.monotonic() - began < 5
    with in_time(0.05, "too long"):
        pass
    time.sleep(0.1)  # what was in time is not ended later
    assert signal.getsignal(signal.SIGALRM) == before


def test_a_name_is_the_same_text_whatever_the_disk_and_the_locale_make_of_it():
    for written in ("é水", "e\u0301水", "é水".encode().decode("ascii", "surrogateescape")):
        assert nfc(written) == "é水"
    assert nfc("t\udcff") == "t\udcff"


def test_names_that_are_not_utf_8_become_text_or_their_own_bytes(tmp_path):
    name = os.fsdecode(b"s\xe9t")
    assert as_text(name) == "s?t" and as_text("sét") == "sét"
    write(tmp_path / "list.txt", f"{name}\n")
    assert (tmp_path / "list.txt").read_bytes() == b"s\xe9t\n"
    write(tmp_path / "a.json", {"a": name})
    assert (tmp_path / "a.json").read_bytes().isascii() and read_json(tmp_path / "a.json") == {"a": name}


# ---- progress

@pytest.mark.parametrize("seconds, text", [
    (0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (75.2, "1:15"), (3600, "60:00")])
def test_minutes(seconds, text):
    assert minutes(seconds) == text


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns: clock.now, in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(common, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def work(clock, items, seconds, **more):
    """Goes through the items, each taking so many seconds -> those that came."""
    came = []
    for item in progress(items, "images", **more):
        came.append(item)
        clock.now += seconds
    return came


def test_what_takes_less_than_ten_seconds_is_silent(clock, capsys):
    assert work(clock, list("abcdefghij"), 0.99) == list("abcdefghij")
    assert capsys.readouterr() == ("", "")


def test_what_takes_longer_shows_count_and_eta_every_ten_seconds(clock, capsys):
    assert work(clock, range(10), 3) == list(range(10))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == ["images: 4 of 10  ETA 0:18 ", "images: 8 of 10  ETA 0:06 "]


def test_items_without_a_length_need_a_total(clock, capsys):
    assert work(clock, iter("abc"), 11, total=3) == list("abc")
    assert capsys.readouterr().err.splitlines()[0] == "images: 1 of 3  ETA 0:22 "


def test_other_ranks_are_silent(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert work(clock, range(10), 30) == list(range(10))
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_one_line_that_changes(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    work(clock, range(10), 3)
    first, *others, end = screen.getvalue().split("\r")
    assert first == "images: 4 of 10  ETA 0:18 "
    assert len(others) == 5 and end == "\n"


# ---- samples

@pytest.mark.parametrize("n, limit, want", [
    (10, 4, [0, 3, 6, 9]), (10, 1, [0]), (5, 5, [0, 1, 2, 3, 4]), (5, 9, [0, 1, 2, 3, 4]),
    (5, None, [0, 1, 2, 3, 4]), (0, 3, [])])
def test_an_even_sample(n, limit, want):
    assert list(even_sample(list(range(n)), limit)) == want


def test_an_even_sample_reaches_both_ends_and_repeats_nothing():
    for n in range(2, 40):
        for limit in range(2, n):
            found = even_sample(list(range(n)), limit)
            assert found == sorted(set(found)) and len(found) == limit
            assert (found[0], found[-1]) == (0, n - 1)
            assert max(np.diff(found)) - min(np.diff(found)) <= 1


# ---- files of earlier calls

def contents(folder):
    return {f.name: f.read_text() for f in sorted(folder.iterdir()) if not f.name.startswith(".")}


def test_own_files_are_replaced_however_often(tmp_path):
    for text in ("one", "two", "one"):
        out = Written(tmp_path)
        out.check(["a.txt", "deep/b.txt"])
        out.write("a.txt", text)
        out.replace("deep/b.txt", lambda name: Path(name).write_text(text))
        assert contents(tmp_path / "deep") == {"b.txt": text}
    assert (tmp_path / "a.txt").read_text() == "one"


def touched(folder):
    (folder / "a.txt").write_text("by hand")


def put_there(folder):
    (folder / "b.txt").write_text("by hand")


def copied_over(folder):
    (folder / "a.txt").write_bytes((folder / "c.txt").read_bytes())  # ours, but of another name


def linked(folder):
    (folder / "b.txt").symlink_to("nowhere")


@pytest.mark.parametrize("change", [touched, put_there, copied_over, linked])
def test_files_of_others_and_changed_ones_need_overwrite(tmp_path, change):
    Written(tmp_path).write("a.txt", "first")
    Written(tmp_path).write("c.txt", "third")
    change(tmp_path)
    name = "b.txt" if change in (put_there, linked) else "a.txt"
    before = os.readlink(tmp_path / name) if change is linked else contents(tmp_path)
    for say in (lambda out: out.check(["c.txt", name]), lambda out: out.write(name, "second")):
        with pytest.raises(BadInput, match=f"{name}: would be overwritten.*type --overwrite"):
            say(Written(tmp_path))
        assert before == (os.readlink(tmp_path / name) if change is linked else contents(tmp_path))
    Written(tmp_path, overwrite=True).write(name, "second")
    Written(tmp_path).write(name, "third time")  # it is ours from now on
    assert (tmp_path / name).read_text() == "third time"


def test_all_files_that_may_not_be_replaced_are_named_at_once(tmp_path):
    names = [f"{i}.txt" for i in range(7)]
    for name in names[:5]:
        (tmp_path / name).write_text("by hand")
    for there, said in ((["2.txt"], "2.txt"), (names, f"0.txt, {tmp_path}/1.txt, {tmp_path}/2.txt and 2 more")):
        with pytest.raises(BadInput, match=f"^{tmp_path}/{said}: would be overwritten"):
            Written(tmp_path).check(there)


def test_a_process_that_is_killed_between_two_steps_leaves_files_that_can_be_replaced(tmp_path):
    Written(tmp_path).write("a.txt", "old")

    def killed(name):
        Path(name).write_text("new")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        Written(tmp_path).replace("a.txt", killed)
    with open(tmp_path / ".written.jsonl", "a") as f:
        f.write('\n{"file": "a.txt", "sha')  # a full disk
    Written(tmp_path).write("a.txt", "next")
    Written(tmp_path).write("a.txt", "last")
    assert contents(tmp_path) == {"a.txt": "last"}


def test_what_a_killed_process_half_wrote_goes_when_the_file_is_written(tmp_path):
    for name in ("a.txt.4711.tmp", "b.txt.4711.tmp", "notes.tmp", "sub/a.txt.1.tmp", "mine.1.tmp"):
        write(tmp_path / name, "half")
    out = Written(tmp_path)
    out.check(["a.txt", "sub/a.txt"])
    assert (tmp_path / "a.txt.4711.tmp").exists()  # its writer may live; who writes the file has it to himself
    out.write("a.txt", "whole")
    out.write("sub/a.txt", "whole")
    assert {file.name for file in tmp_path.rglob("*.tmp")} == {"b.txt.4711.tmp", "notes.tmp", "mine.1.tmp"}


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    write(tmp_path / "out", "mine")
    with pytest.raises(BadInput, match="out: a file, where a folder for results is expected; name another --out"):
        Written(tmp_path / "out").check(["a.txt"])


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(BadInput, match="a.txt: a folder, .*--out"):
        Written(tmp_path, overwrite=True).check(["a.txt"])


def test_a_name_is_for_one_process_at_a_time_and_free_when_that_is_killed(tmp_path):
    """A fork claims two names one after the other; this process knocks meanwhile."""
    out = Written(tmp_path)
    mine, other = FORK.Pipe()

    def hold():
        for name in ("sub/a", "b"):
            with out.claim(name):
                other.send(name)
                other.recv()
        other.send("both")
        with out.claim("sub/a"):
            other.send("again")
            time.sleep(60)

    def free(name):
        try:
            with out.claim(name):
                return True
        except BadInput as e:
            assert str(e).startswith(f"{tmp_path / name}: another process is writing there")
            return False

    process = FORK.Process(target=hold)
    process.start()
    found = []
    for _ in range(2):
        mine.recv()
        found.append([free(name) for name in ("sub/a", "b", "a")])
        mine.send("go on")
    assert found == [[False, True, True], [True, False, True]]
    assert (mine.recv(), mine.recv()) == ("both", "again") and not free("sub/a")
    process.kill()
    process.join()
    assert free("sub/a")
