"""data/fingerprint.py: what a run began with is told from what has changed; the oracle is the change made."""
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from data import fingerprint as module
from data.common import BadInput, write
from data.fingerprint import check_unchanged, digest, fingerprint, prints_of_run


@pytest.fixture
def root(tmp_path):
    """Six raw pictures of one size and one time, as an archive unpacks them."""
    rng = np.random.default_rng(0)
    for i in range(6):
        file = tmp_path / f"set/{'images' if i < 3 else 'masks'}/{i}.tif"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50), np.uint8)).save(file)
        os.utime(file, (10**9, 10**9))
    (tmp_path / "run").mkdir()
    return tmp_path / "set"


def files(root):
    return sorted(root.rglob("*.tif"))


def keep(root):
    write(root.parent / "run/files.json", fingerprint(root, files(root)))
    return root.parent / "run/files.json"


def refused(path, root):
    with pytest.raises(BadInput) as e:
        check_unchanged(path, root)
    said = str(e.value)
    assert "\n" not in said and f"since {path.parent} began" in said and "bring the old files back" in said
    return said


def test_it_is_sizes_times_and_sha256(root):
    kept = json.loads(keep(root).read_text())
    assert list(kept["files"]) == [file.relative_to(root).as_posix() for file in files(root)]
    for file in files(root):
        stat, data = file.stat(), file.read_bytes()
        assert kept["files"][file.relative_to(root).as_posix()] == (
            f"{len(data)} {10**18} {stat.st_ctime_ns} {hashlib.sha256(data).hexdigest()}")


def invert(file):
    pixels = np.asarray(Image.open(file))
    Image.fromarray(255 - pixels).save(file)


def one_pixel(file):
    pixels = np.array(Image.open(file))
    pixels[20, 25] ^= 1
    Image.fromarray(pixels).save(file)


def exchange(file):
    other = file.with_name("5.tif")
    os.rename(file, file.with_name("x")), os.rename(other, file), os.rename(file.with_name("x"), other)


def resize(file):
    Image.open(file).resize((30, 40)).save(file)


@pytest.mark.parametrize("change, said, others", [
    (invert, "has changed (other contents)", 0), (one_pixel, "has changed (other contents)", 0),
    (exchange, "has changed (other contents)", 1), (resize, "bytes instead of", 0),
    (os.unlink, "is gone", 0), (lambda file: file.write_bytes(b""), "has changed (0 bytes instead of", 0)])
def test_what_has_changed_is_named_though_its_time_is_the_old_one(root, change, said, others):
    path, file = keep(root), root / "masks/4.tif"
    change(file)
    for each in files(root):
        os.utime(each, (10**9, 10**9))
    text = refused(path, root)
    assert text.startswith(f"{file}: ") and said in text
    assert (f"as {others} other files" in text) == bool(others)


def test_what_is_only_newer_or_elsewhere_is_the_same_and_the_old_file_is_welcome_back(root, tmp_path):
    path = keep(root)
    for each in files(root):
        os.utime(each)
    prints, notes = check_unchanged(path, root)
    assert notes == [] and prints == fingerprint(root, files(root))  # of the times of now
    other = shutil.copytree(root, tmp_path / "other", copy_function=shutil.copyfile)
    shutil.copy(other / "masks/4.tif", other / "masks/9.tif")  # added since
    assert check_unchanged(path, other)[1] == []
    old = (root / "images/0.tif").read_bytes()
    invert(root / "images/0.tif")
    refused(path, root)
    (root / "images/0.tif").write_bytes(old)
    check_unchanged(path, root)


def test_a_run_of_an_earlier_version_goes_on_with_a_note(root):
    run = root.parent / "run"
    prints, (note,) = prints_of_run(run, root)
    assert prints is None and note == (
        f"{run}: begun without files.json, so whether images have changed since is not known")
    keep(root)
    assert prints_of_run(run, root) == check_unchanged(run / "files.json", root)


def test_unchanged_files_are_not_read_again(root, monkeypatch):
    path = keep(root)
    monkeypatch.setattr(module, "digest", None)
    check_unchanged(path, root)


def test_of_a_large_set_blocks_from_the_first_to_the_last_byte_are_hashed(root, monkeypatch):
    monkeypatch.setattr(module, "WHOLE", 6 * 1200)
    monkeypatch.setattr(module, "LEAST", 8)
    path, file = keep(root), root / "images/1.tif"
    data = file.read_bytes()
    starts = [round(i * (len(data) - 300) / 3 - 0.5 + 1e-9) for i in range(4)]
    blocks = b"".join(data[s:s + 300] for s in starts)
    assert json.loads(path.read_text())["share"] == 1200 and digest(file, 1200) == hashlib.sha256(blocks).hexdigest()
    os.utime(file)
    assert check_unchanged(path, root)[1] == [
        "1 files have another time than when this run began; 1200 bytes of each were compared, and agree"]
    for at in (0, len(data) - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        file.write_bytes(changed)
        assert str(file) in refused(path, root)


@pytest.mark.parametrize("content", [{}, {"share": 1}, {"share": "x", "files": {}}, {"share": 1, "files": []},
                                     {"share": 1, "files": {"a": 5}}, {"share": 1, "files": {"a": "no numbers"}}])
def test_a_damaged_list_is_said(tmp_path, content):
    write(tmp_path / "files.json", content)
    with pytest.raises(BadInput, match="files.json: damaged; remove it to go on"):
        check_unchanged(tmp_path / "files.json", tmp_path)
