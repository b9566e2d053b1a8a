"""data/cache.py: the same arrays as without it, decoded once, whatever is changed, killed, full or read-only."""
import errno
import io
import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pytest
from PIL import Image

from data import cache as module
from data.cache import HEADER, Cache, Rows
from data.common import BadInput
from data.io import Labels, read_image, read_valid

SIZE = HEADER + 60 * 40 * 4  # bytes of an entry


class Decode:
    """Reads an image and its mask, and counts how often."""

    def __init__(self, classes="ab"):
        self.calls, self.labels = 0, Labels([{"name": c, "id": "ab".index(c)} for c in classes])

    def __call__(self, image, mask):
        self.calls += 1
        return read_image(image), self.labels.load(mask)


def save(folder, seed, H=60):
    pixels = np.random.default_rng(seed).integers(0, 256, (H, 40, 3), np.uint8)
    paths = folder / f"{seed}.png", folder / f"{seed}_mask.png"
    for path, array in zip(paths, (pixels, pixels[..., 0] % 2)):
        Image.fromarray(array).save(path)
    return paths


@pytest.fixture
def pair(tmp_path):
    return save(tmp_path, 0)


@pytest.fixture(autouse=True)
def nothing_said():
    module.NOTES[:] = bytes(len(module.NOTES))


@pytest.fixture
def blocks(monkeypatch):
    """Arrays above 1000 bytes are verified in blocks of 4 rows of an image, 12 of a mask."""
    monkeypatch.setattr(module, "LAZY", 1000)
    monkeypatch.setattr(module, "BLOCK", 500)


def same(got, paths):  # Pillow alone is the oracle
    return len(got) == 2 and all(type(a) is np.ndarray and not a.flags.writeable and a.dtype == np.uint8 and
                                 np.array_equal(a, Image.open(p)) for a, p in zip(got, paths))


def files(cache):
    return sorted(cache.folder.glob("nanors-*"))


def test_the_same_arrays_and_decoded_once(pair, tmp_path):
    folder, decode = tmp_path / "a" / "cache", Decode()
    for cache in (Cache(folder), Cache(folder)):
        for _ in range(3):
            assert same(cache(pair, decode), pair)
            module.open_map.cache_clear()  # the file is what remembers
    assert decode.calls == 1 and [f.suffix for f in files(cache)] == [".raw"]


def test_any_kind_of_array(pair, tmp_path):
    rng, cache = np.random.default_rng(0), Cache(tmp_path)
    arrays = [rng.random((5, 7)), rng.integers(0, 9, (3, 3, 3), np.uint8), np.float16(rng.random(9)).reshape(3, 3).T]
    for _ in range(2):
        got = cache(pair[:1], lambda path: tuple(a.copy() for a in arrays))
        assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(got, arrays, strict=True))


def test_what_another_version_has_decoded_is_not_taken(pair, tmp_path, monkeypatch):
    cache, decode = Cache(tmp_path), Decode()
    cache(pair, decode)
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    assert same(cache(pair, decode), pair) and decode.calls == 2


def test_two_label_tables_are_two_entries(pair, tmp_path):
    cache, decodes = Cache(tmp_path), [Decode("ab"), Decode("ba")]
    for _ in range(2):
        masks = [cache(pair, decode, str(decode.labels.classes))[1] for decode in decodes]
    np.testing.assert_array_equal(masks[0], 1 - masks[1])
    assert [d.calls for d in decodes] == [1, 1] and len(files(cache)) == 2


@pytest.mark.parametrize("which", [0, 1])
def test_a_changed_file_is_decoded_again(pair, tmp_path, which):
    cache, decode = Cache(tmp_path), Decode()
    before, kept = cache(pair, decode), [a.copy() for a in cache(pair, decode)]
    stat, pixels = pair[which].stat(), np.array(Image.open(pair[which]))
    pixels[3:9] = 0
    for new, later in ((pixels, 1), (pixels[:50], 0)):  # written in place; replaced by one of the same time
        Image.fromarray(new).save(pair[which])
        os.utime(pair[which], ns=(stat.st_atime_ns, stat.st_mtime_ns + later))
        assert same(cache(pair, decode), pair)
    assert decode.calls == 3 and all(np.array_equal(a, b) for a, b in zip(before, kept))


def test_a_mask_or_a_nodata_value_laid_beside_an_image_counts_at_once(pair, tmp_path):
    """A GIS writes them without touching the image; what was decoded before does not know them."""
    cache, image = Cache(tmp_path / "cache"), pair[0]
    Image.fromarray(np.uint8([[7, 7], [7, 9]])).save(image)

    def valid(path):
        _, valid = read_valid(path)
        return (np.zeros((1, 1)) if valid is None else valid,)

    assert cache((image,), valid)[0].shape == (1, 1)
    for value, want in ((7, [[0, 0], [0, 1]]), (9, [[1, 1], [1, 0]])):
        beside = image.with_name(f"{image.name}.aux.xml")
        beside.write_text(f'<PAMDataset><PAMRasterBand band="1"><NoDataValue>{value}</NoDataValue></PAMRasterBand>'
                          "</PAMDataset>")
        os.utime(beside, ns=(value, value))
        assert cache((image,), valid)[0].tolist() == want
    Image.fromarray(np.uint8([[0, 0], [255, 255]])).save(f"{image}.msk", "TIFF")
    assert cache((image,), valid)[0].tolist() == [[0, 0], [1, 1]]


def test_bad_input_is_said_each_time_and_not_kept(pair, tmp_path):
    cache, (image, mask) = Cache(tmp_path / "cache"), pair
    image.write_bytes(image.read_bytes()[:-60])
    for path, said in ((image, "damaged"), (image, "damaged"), (tmp_path / "none.png", "no such file")):
        with pytest.raises(BadInput, match=said):
            cache((path, mask), Decode())
    assert not files(cache)
    with pytest.raises(BadInput, match="type --cache DIR or off"):
        Cache(image / "cache")


def read_when_both_are_ready(cache, pair, barrier, out):
    def decode(*paths):
        barrier.wait()  # neither has found anything in the folder
        return Decode()(*paths)
    out.put(same(cache(pair, decode), pair))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_two_processes_at_once(pair, tmp_path, method):
    context = multiprocessing.get_context(method)
    cache, barrier, out = Cache(tmp_path / "cache"), context.Barrier(2, timeout=60), context.Queue()
    both = [context.Process(target=read_when_both_are_ready, args=(cache, pair, barrier, out)) for _ in range(2)]
    for process in both:
        process.start()
    assert [out.get(timeout=60) for _ in both] == [True, True]
    for process in both:
        process.join()
    decode = Decode()
    assert same(cache(pair, decode), pair) and decode.calls == 0 and len(files(cache)) == 1


class Dying(io.FileIO):  # the process is killed when half of a file is written
    def write(self, data):
        super().write(bytes(data)[:1000])
        if self.tell() > HEADER:
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_half_way(pair, tmp_path):
    cache, decode = Cache(tmp_path / "cache"), Decode()
    pid = os.fork()
    if pid == 0:
        module.os.fdopen = Dying
        cache(pair, decode)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    left, = files(cache)
    assert left.suffix == ".tmp" and left.stat().st_size == HEADER + 1000
    assert same(cache(pair, decode), pair) and decode.calls == 1
    Cache(cache.folder).make_room(1)
    assert left.exists()  # somebody might be writing it
    os.utime(left, (0, time.time() - 2 * module.ABANDONED))
    Cache(cache.folder).make_room(1)
    assert [f.suffix for f in files(cache)] == [".raw"]


def test_a_file_cut_short_is_written_anew(pair, tmp_path):
    cache, decode = Cache(tmp_path / "cache"), Decode()
    for length in (SIZE - 1, HEADER, 50, 0):  # what a power failure leaves
        assert same(cache(pair, decode), pair)
        module.open_map.cache_clear()
        os.truncate(*files(cache), length)
        assert same(cache(pair, decode), pair)
    assert decode.calls == 5


def flip(file, bits):
    data = np.fromfile(file, np.uint8)
    for bit in bits:
        data[bit // 8] ^= np.uint8(1 << bit % 8)
    with open(file, "r+b") as f:  # in place, as a disk does it: times and mappings stay
        f.write(data)
    module.open_map.cache_clear()


@pytest.mark.parametrize("lazily", [False, True])
def test_whatever_bits_of_a_file_flip_the_right_pixels_come_out(pair, tmp_path, request, lazily):
    if lazily:
        request.getfixturevalue("blocks")
    cache, rng = Cache(tmp_path / "cache"), np.random.default_rng(0)
    cache(pair, Decode())
    file, = files(cache)
    size, header = 8 * file.stat().st_size, len(file.read_bytes()[:HEADER].rstrip())
    drawn = [rng.integers(0, end, n) for end in (size, 8 * header) for n in (1, 1, 2, 5) for _ in range(10)]
    for bits in [*drawn, [8 * HEADER], [size - 1]]:
        flip(file, bits)
        decode, want = Decode(), [np.asarray(Image.open(p)) for p in pair]
        got = [np.array(a) for a in cache(pair, decode)]
        if lazily:  # parts of it, too
            flip(file, bits)
            image, mask = cache(pair, decode)
            at = np.s_[rng.integers(40):50:rng.integers(1, 4), 3:9]
            assert type(image) is Rows and type(image[at]) is type(mask[at]) is np.ndarray
            assert np.array_equal(image[at], want[0][at]) and np.array_equal(mask[at], want[1][at])
            mask.whole(), image.whole()  # what the part did not touch is found now
        assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True)), bits
        before = decode.calls
        assert before >= 1 and len(files(cache)) == 1
        module.open_map.cache_clear()
        assert same([np.asarray(a) for a in cache(pair, decode)], pair) and decode.calls == before  # written anew


def test_a_part_verifies_its_own_rows_only_and_each_once(pair, tmp_path, blocks, capsys):
    cache, decode = Cache(tmp_path / "cache"), Decode()
    cache(pair, decode)
    file, = files(cache)
    flip(file, [8 * (HEADER + 41 * 120)])  # row 41 of the image
    image, _ = cache(pair, decode)
    want = np.asarray(Image.open(pair[0]))
    for part in (np.s_[:40], np.s_[44:], np.s_[-3], np.s_[[3, 50]], np.s_[39:30:-2, 5], np.s_[9:9]):
        assert np.array_equal(image[part], want[part]) and decode.calls == 1
    assert np.array_equal(image[40], want[40]) and decode.calls == 2
    assert np.array_equal(image[::7], want[::7]) and np.array_equal(image[...], want) and decode.calls == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(file) in said and str(pair[0]) in said and "decoded anew" in said


def test_a_large_array_that_is_not_cut_is_as_any_other(pair, tmp_path, blocks):
    cache, want = Cache(tmp_path / "cache"), np.asarray(Image.open(pair[0]))
    image, mask = cache(pair, Decode())
    assert type(image) is Rows and (image.shape, image.dtype, len(image)) == ((60, 40, 3), np.uint8, 60)
    assert np.array_equal(image == 7, want == 7) and np.array_equal(7 + image, 7 + want)
    assert np.array_equal(image.transpose(2, 0, 1), want.transpose(2, 0, 1)) and image.mean() == want.mean()
    assert np.array_equal(image[want > 9], want[want > 9]) and np.array_equal(np.stack([image])[0], want)
    assert np.array_equal(pickle.loads(pickle.dumps(image)), want)
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(mask)[0] = 1
    with pytest.raises(IndexError):
        image[60]


def test_the_umask_says_who_may_read_an_entry(pair, tmp_path):
    cache = Cache(tmp_path / "cache")
    before = os.umask(0o027)
    try:
        cache(pair, Decode())
    finally:
        os.umask(before)
    assert [f.stat().st_mode & 0o777 for f in files(cache)] == [0o640]


def test_two_files_of_one_size_and_time_that_change_places_are_told_apart(tmp_path):
    pairs, cache, decode = [save(tmp_path, seed) for seed in (1, 2)], Cache(tmp_path / "cache"), Decode()
    for image, _ in pairs:
        image.write_bytes(image.read_bytes().ljust(9000, b"\0"))
        os.utime(image, (1000, 1000))
    for pair in pairs:
        cache(pair, decode)
    a, b, c = pairs[0][0], pairs[1][0], tmp_path / "c.png"
    os.rename(a, c), os.rename(b, a), os.rename(c, b)
    for pair in pairs:
        assert same(cache(pair, decode), pair)


def test_the_oldest_make_room_but_none_of_this_run(tmp_path):
    pairs, folder, decode = [save(tmp_path, seed) for seed in range(6)], tmp_path / "cache", Decode()
    folder.mkdir()
    (folder / "mine.raw").write_bytes(b"0" * 10**6)
    old = Cache(folder, 3.5 * SIZE / 2**30)  # room for three
    for i in (0, 1, 2):
        entries = files(old)
        old(pairs[i], decode)
        entry, = set(files(old)) - set(entries)
        os.utime(entry, (0, old.since - 100 + i))
    module.open_map.cache_clear()
    new = Cache(folder, 3.5 * SIZE / 2**30)
    new(pairs[0], decode)  # the oldest is now the newest
    assert decode.calls == 3
    for i in (3, 4, 5):
        assert same(new(pairs[i], decode), pairs[i])
    assert decode.calls == 6 and len(files(new)) == 3
    for i in (0, 3, 4, 5, 5):
        assert same(new(pairs[i], decode), pairs[i])
    assert decode.calls == 8  # 5 found no place; 0, 3 and 4 stay, or every epoch would decode all of them
    new.clear()
    assert [f.name for f in folder.iterdir()] == ["mine.raw"]
    new(pairs[5], decode), new(pairs[5], decode)
    assert decode.calls == 9


class Full(io.FileIO):
    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_slows_down_but_stops_nothing(pair, tmp_path, monkeypatch, capsys):
    cache, decode = Cache(tmp_path / "cache"), Decode()
    with monkeypatch.context() as m:
        m.setattr(module.os, "fdopen", Full)
        assert same(cache(pair, decode), pair) and same(cache(pair, decode), pair)
    assert decode.calls == 2 and not files(cache)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot be written (No space left on device)" in said and "--cache DIR" in said
    for _ in range(4):  # there is room again, which is found out at last
        cache(pair, decode)
    assert len(files(cache)) == 1 and decode.calls == 5
    cache.clear()
    monkeypatch.setattr(module, "KEEP_FREE", 2**60)
    for _ in range(2):
        assert same(Cache(cache.folder)(pair, decode), pair) and not files(cache)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{cache.folder}: full" in said and "--cache DIR" in said


def test_a_folder_removed_during_a_run_comes_back(pair, tmp_path):
    cache, decode = Cache(tmp_path / "cache"), Decode()
    before = cache(pair, decode)
    files(cache)[0].unlink()
    cache.folder.rmdir()
    assert same(cache(pair, decode), pair) and same(before, pair) and decode.calls == 1  # still mapped
    module.open_map.cache_clear()
    assert same(cache(pair, decode), pair) and decode.calls == 2 and len(files(cache)) == 1


def test_nothing_is_written_beside_the_images(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    pair = save(tmp_path / "images", 0)
    pair[0].parent.chmod(0o500)  # stops everybody but root, for whom the listing below tells
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NANORS_CACHE", raising=False)
    assert same(Cache()(pair, Decode()), pair)
    monkeypatch.setenv("NANORS_CACHE", str(tmp_path / "env"))
    assert same(Cache()(pair, Decode()), pair)
    pair[0].parent.chmod(0o700)
    assert sorted(pair[0].parent.iterdir()) == sorted(pair)
    assert all(len(list(d.glob("nanors-*.raw"))) == 1 for d in (tmp_path / "home/.cache/nanors", tmp_path / "env"))
