"""Decoded images as memory-mapped files: a tile is decoded once, then a random crop costs a slice.

    cache = Cache(folder=None, limit_gb=64)
    image, mask = cache((image_path, mask_path), decode)    decode(*paths) runs the first time only

Place: the folder given, else $NANORS_CACHE, else ~/.cache/nanors. Better on a local disk: a file
removed from under a mapping is harmless there, on NFS it kills the reader. There is one
nanors-*.raw for an image and its mask; nothing else is ever deleted.
Damage: every block of rows has a checksum, which a process compares before it uses the block for
the first time. What does not agree is decoded anew.
Size: up to `limit_gb`, and KEEP_FREE of the disk stays free. To make room the least recently used
go first, but none that were used since this Cache was made: what then finds no place is decoded
every time, instead of all images in turn.
Cleaning: Cache(folder).clear(), or delete the folder at any time.
"""
import contextlib
import functools
import hashlib
import json
import mmap
import os
import secrets
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from .common import BadInput
from .files import with_companions

FORMAT = 4  # raise it when decoding changes: what another version has decoded is then not taken
# Bytes: the checksum of what follows, JSON {"arrays": [[dtype, shape], ...], "sums": checksum of
# the last part}, then spaces; behind it the arrays, and last a checksum for each of their blocks.
HEADER = 512
BLOCK = 2**18  # bytes of the rows that share a checksum
LAZY = 2**22  # bytes; smaller arrays are verified when they are opened
KEEP_FREE = 4 * 2**30  # bytes, for the checkpoints that may go to the same disk
ABANDONED = 600  # seconds without a write, after which the .tmp of a killed process is removed

# Notes are said once; reading processes, which are forks, share these bytes.
NOTES = mmap.mmap(-1, 3)
DAMAGED, FAILED, FULL = range(3)


def note_once(kind: int, text: str) -> None:
    """A line on stderr, the first time."""
    if not NOTES[kind]:
        NOTES[kind] = 1
        print(f"note: {text}", file=sys.stderr)


# ---- checksums

def rows_per_block(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """So many rows of an array make a block."""
    row = dtype.itemsize * int(np.prod(shape[1:]))
    return max(1, BLOCK // max(1, row))


def checksums(a: np.ndarray) -> np.ndarray:
    """The checksum of every block of rows, (n,) uint32."""
    step = rows_per_block(a.dtype, a.shape)
    starts = range(0, len(a), step)
    return np.array([zlib.crc32(a[i:i + step]) for i in starts], np.uint32)


class Rows(np.lib.mixins.NDArrayOperatorsMixin):
    """A large array of a file, verified block by block: rows[10:20, 5:9] is a plain array.

    What is no choice of rows, such as np.asarray(rows) or rows.mean(), verifies all of them.
    renew() -> the right array, where a checksum does not agree.
    """

    def __init__(self, array: np.ndarray, sums: np.ndarray, verified: bytearray,
                 renew: Callable | None = None):
        self.array = array
        self.sums = sums  # of each block
        self.verified = verified  # 1 for each block that is, 0 for the others
        self.renew = renew
        self.step = rows_per_block(array.dtype, array.shape)
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim
        self.size, self.nbytes = array.size, array.nbytes

    def verify(self, rows: slice | np.ndarray) -> None:
        """Compares the checksums of these rows that have not been compared yet."""
        if isinstance(rows, slice):
            chosen = range(*rows.indices(len(self.array)))
            if not chosen:
                return
            first, last = sorted([chosen[0], chosen[-1]])  # the step may be negative
            blocks = range(first // self.step, last // self.step + 1)
        else:
            blocks = np.unique(rows % len(self.array) // self.step)
        for block in blocks:
            if self.verified[block]:
                continue
            start = block * self.step
            if zlib.crc32(self.array[start:start + self.step]) != self.sums[block]:
                self.array = self.renew()
                self.verified = bytearray(b"\1" * len(self.sums))
                return
            self.verified[block] = 1

    def whole(self) -> np.ndarray:
        """The array, all of it verified."""
        self.verify(slice(None))
        return self.array

    def __getitem__(self, key):
        rows = key[0] if isinstance(key, tuple) and key else key
        if not isinstance(rows, slice):
            numbers = np.atleast_1d(rows)
            rows = numbers if numbers.dtype.kind in "iu" else slice(None)
        self.verify(rows)
        return self.array[key]

    def __len__(self):
        return len(self.array)

    def __array__(self, dtype=None, copy=None):
        a = self.whole()
        if copy or dtype not in (None, a.dtype):
            return np.array(a, dtype)
        return a

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        inputs = [np.asarray(a) if isinstance(a, Rows) else a for a in inputs]
        return getattr(ufunc, method)(*inputs, **options)

    def __getattr__(self, name):  # of what is not above, such as copy() and T
        return getattr(self.whole(), name)

    def __reduce__(self):  # to another process as a plain array
        return self.whole().__reduce__()


VERIFIED = {}  # {file: (its inode, size and times, [verified blocks of each array])} of a process


@functools.lru_cache(128)  # open mappings of a process, a file handle each
def open_map(file: Path, since: float) -> tuple[np.ndarray | Rows, ...]:
    """Read-only arrays on the file's pages, shared by processes. Large ones are Rows.

    Marks a file as used that was not used `since` then. One that was cut short, or whose checksums
    do not agree, is a ValueError.
    """
    stat = os.stat(file)
    if stat.st_mtime < since:
        with contextlib.suppress(OSError):  # somebody else's cache can be read all the same
            os.utime(file)
            stat = os.stat(file)
    state = stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns

    pages = np.asarray(np.memmap(file, np.uint8, "r"))  # slices of a np.memmap itself are slow
    text = pages[8:HEADER].tobytes()
    if pages[:8].tobytes() != b"%08x" % zlib.crc32(text):
        raise ValueError("header")
    header = json.loads(text)
    arrays, blocks = [], []
    start = HEADER
    for dtype, shape in header["arrays"]:
        end = start + np.dtype(dtype).itemsize * int(np.prod(shape))
        a = pages[start:end].view(dtype).reshape(shape)
        arrays.append(a)
        blocks.append(-(-len(a) // rows_per_block(a.dtype, a.shape)))
        start = end
    if zlib.crc32(pages[start:]) != header["sums"]:
        raise ValueError("checksums")
    sums = np.split(pages[start:].view(np.uint32), np.cumsum(blocks)[:-1])

    # What this process has verified holds, although the mapping may have been closed meanwhile.
    known = VERIFIED.get(file)
    if known is None or known[0] != state:
        known = VERIFIED[file] = state, [bytearray(n) for n in blocks]
    opened = []
    for a, own, verified in zip(arrays, sums, known[1]):
        if a.nbytes > LAZY:
            a = Rows(a, own, verified)
        elif not all(verified):
            if not np.array_equal(checksums(a), own):
                raise ValueError("array")
            verified[:] = b"\1" * len(own)
        opened.append(a)
    return tuple(opened)


def write_arrays(file: Path, arrays: tuple[np.ndarray, ...]) -> None:
    """Header, arrays and checksums into a file that appears when it is whole: see open_map()."""
    arrays = [np.ascontiguousarray(a) for a in arrays]
    sums = np.concatenate([checksums(a) for a in arrays])
    kinds = [(a.dtype.str, a.shape) for a in arrays]
    header = json.dumps({"arrays": kinds, "sums": zlib.crc32(sums)})
    text = header.encode().ljust(HEADER - 8)
    # Made like every other file, so that the umask says who may read it.
    temporary = file.parent / f"nanors-{secrets.token_hex(8)}.tmp"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        # Not through a mapping, where a full disk would be a SIGBUS.
        with os.fdopen(handle, "wb") as f:
            f.write(b"%08x" % zlib.crc32(text) + text)
            for a in [*arrays, sums]:
                f.write(a)
        os.replace(temporary, file)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def size_of(shapes: list[tuple[tuple[int, ...], str]]) -> int:
    """Bytes of the file that write_arrays() makes of arrays of these shapes and types."""
    size = HEADER
    for shape, dtype in shapes:
        kind = np.dtype(dtype)
        size += kind.itemsize * int(np.prod(shape)) + 4 * -(-shape[0] // rows_per_block(kind, shape))
    return size


# ---- the folder

class Cache:
    """cache(paths, decode, tag) -> decode(*paths), arrays not to be written to; later off the disk.

    `tag` says what besides the files decides the result, such as bands or label table. Arrays above
    LAZY bytes come as Rows. Two processes may decode the same file at once: each writes under a
    name of its own and renames, so readers see whole files only.
    """

    def __init__(self, folder: str | Path | None = None, limit_gb: float = 64.0):
        place = folder or os.environ.get("NANORS_CACHE") or "~/.cache/nanors"
        self.folder = Path(place).expanduser()
        self.limit = limit_gb * 2**30
        self.since = time.time() - 2  # file times may lag by so many seconds
        self.room = 0  # bytes this process may write before it looks at the folder again
        self.full = False
        self.failures = 0  # in a row
        self.skip = 0  # so many more entries are not written
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise BadInput(f"{self.folder}: no place for a cache ({e.strerror}); "
                           "type --cache DIR or off") from None

    def __call__(self, paths: tuple, decode: Callable[..., tuple],
                 tag: str = "") -> tuple[np.ndarray | Rows, ...]:
        # Size and times are part of the name, so that a changed file is decoded again. The time of
        # the last change of status tells two files of equal size and time that were exchanged.
        stats = []
        try:
            for path in with_companions(paths):
                stat = os.stat(path)
                stats.append((os.path.abspath(path), stat.st_size, stat.st_mtime_ns,
                              stat.st_ctime_ns))
        except OSError:
            return decode(*paths)  # has the better message
        key = hashlib.blake2b(f"{stats} {tag} {FORMAT}".encode(), digest_size=16).hexdigest()
        file = self.folder / f"nanors-{key}.raw"
        try:
            return self.mapped(file, paths, decode)
        except ValueError:  # a power failure has cut it short, or the disk has changed it
            arrays = self.decode_anew(file, paths, decode)
        except OSError:  # not there yet
            arrays = decode(*paths)
        if self.store(file, arrays):
            with contextlib.suppress(OSError, ValueError):
                return self.mapped(file, paths, decode)
        return arrays

    def mapped(self, file: Path, paths: tuple, decode: Callable) -> tuple[np.ndarray | Rows, ...]:
        """open_map() of a file that, where it turns out to be damaged, is decoded anew."""
        arrays = open_map(file, self.since)
        for i, a in enumerate(arrays):
            if isinstance(a, Rows):
                a.renew = partial(self.renew, file, paths, decode, i)
        return arrays

    def decode_anew(self, file: Path, paths: tuple, decode: Callable) -> tuple[np.ndarray, ...]:
        """What a damaged file of the cache should hold."""
        note_once(DAMAGED, f"{file}: damaged, so {paths[0]} is decoded anew; is the disk sound?")
        return decode(*paths)

    def renew(self, file: Path, paths: tuple, decode: Callable, i: int) -> np.ndarray:
        """Array number i of a damaged file, which is written anew."""
        arrays = self.decode_anew(file, paths, decode)
        open_map.cache_clear()  # of the damaged pages
        self.store(file, arrays)
        return arrays[i]

    def store(self, file: Path, arrays: tuple[np.ndarray, ...]) -> bool:
        """Makes the arrays read-only, and writes them if there is room for them; has it?"""
        for a in arrays:
            a.setflags(write=False)
        size = HEADER + sum(a.nbytes for a in arrays)
        if self.skip:
            self.skip -= 1
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.has_room(size):
                note_once(FULL, f"{self.folder}: full, so further images are decoded each time "
                                "they are read; type --cache DIR on a larger disk")
                return False
            write_arrays(file, arrays)
        except OSError as e:
            # Disk or quota full, folder gone or read-only: go on, at the speed of decoding. Try
            # again, but ever less often: for a large image that costs time.
            note_once(FAILED, f"{file}: cannot be written ({e.strerror}), so images are decoded "
                              "each time they are read; make room, or type --cache DIR")
            self.failures += 1
            self.skip = 2 ** min(self.failures, 10) - 2  # 0, 2, 6, 14, ...
            return False
        self.room -= size
        self.failures = 0
        return True

    def has_room(self, size: int) -> bool:
        """Looks at the folder once per 1/64 of the limit: k processes may pass it by up to k/64."""
        if self.room < size and not self.full:
            self.room = self.make_room(max(size, self.limit / 64))
            # Once full, stay so: looking again for every tile would cost more than decoding it.
            self.full = self.room < size
        return self.room >= size

    def make_room(self, wanted: float) -> float:
        """Removes dead and old files until `wanted` bytes are free, or no more may go.

        Returns the free bytes, at most `wanted`.
        """
        files = self.entries()
        free = self.limit - sum(size for _, size, _ in files)
        free = min(free, shutil.disk_usage(self.folder).free - KEEP_FREE)
        for used, size, file in sorted(files):
            if free >= wanted or used >= self.since:
                break
            with contextlib.suppress(OSError):
                file.unlink()
                free += size
        return min(free, wanted)

    def entries(self) -> list[tuple[float, int, Path]]:
        """(last used, bytes, file) of all files; removes what killed processes left."""
        now = time.time()
        files = []
        for file in self.folder.glob("nanors-*"):
            with contextlib.suppress(OSError):  # removed or renamed by another process meanwhile
                stat = file.stat()
                if file.suffix == ".tmp" and now - stat.st_mtime > ABANDONED:
                    file.unlink()
                else:
                    files.append((stat.st_mtime, stat.st_size, file))
        return files

    def clear(self) -> None:
        """Removes every file of the cache; arrays that are in use stay valid."""
        for file in self.folder.glob("nanors-*"):
            file.unlink(missing_ok=True)
        open_map.cache_clear()
        self.room = 0
        self.full = False
