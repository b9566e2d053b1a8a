"""Decoded images as memory-mapped files: a tile is decoded once, after that a random crop costs a slice of it.

Place: the folder given, else $NANORS_CACHE, else ~/.cache/nanors; on a local disk (a file removed from under a mapping
is harmless there, on NFS it kills the reader). One nanors-*.raw for an image and its mask; nothing else is deleted.
Size: up to `limit_gb`, and KEEP_FREE of the disk stays free. To make room the least recently used go first, but none
that were used since this Cache was made: what then finds no place is decoded every time, instead of all in turn.
Cleaning: Cache(folder).clear(), or delete the folder at any time.
"""
import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Callable

import numpy as np

from . import io
from .common import BadInput

HEADER = 512  # bytes: JSON [[dtype, shape], ...], then spaces; the arrays follow
KEEP_FREE = 4 * 2**30  # bytes, for the checkpoints that may go to the same disk
READER = hashlib.blake2b(Path(io.__file__).read_bytes()).hexdigest()  # what other code has decoded is not taken
ABANDONED = 600  # seconds without a write, after which the .tmp of a killed process is removed


@functools.lru_cache(128)  # open mappings of a process, a file handle each
def open_map(file: Path) -> tuple[np.ndarray, ...]:
    """Read-only arrays on the file's pages; processes share them, and opening marks the file as used."""
    pages, at, arrays = np.asarray(np.memmap(file, np.uint8, "r")), HEADER, []  # slices of a np.memmap itself are slow
    for dtype, shape in json.loads(pages[:HEADER].tobytes()):
        end = at + np.dtype(dtype).itemsize * int(np.prod(shape))
        arrays.append(pages[at:end].view(dtype).reshape(shape))
        at = end
    with contextlib.suppress(OSError):  # somebody else's cache can be read all the same
        os.utime(file)
    return tuple(arrays)


class Cache:
    """cache(paths, decode, tag) -> decode(*paths), a tuple of arrays not to be written to; later on off the disk.

    `tag` says what besides the files decides the result, such as bands or label table. Two processes may decode the
    same file at once: each writes under a name of its own and renames, so readers see whole files only.
    """

    def __init__(self, folder: str | Path | None = None, limit_gb: float = 64.0):
        self.folder = Path(folder or os.environ.get("NANORS_CACHE") or "~/.cache/nanors").expanduser()
        self.limit, self.since = limit_gb * 2**30, time.time() - 2  # file times may lag by so many seconds
        self.room, self.full = 0, False  # bytes this process may write before it looks at the folder again
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise BadInput(f"{self.folder}: no place for a cache ({e.strerror}); type --cache DIR or off") from None

    def __call__(self, paths: tuple, decode: Callable[..., tuple], tag: str = "") -> tuple[np.ndarray, ...]:
        try:  # a changed file has another name here
            stats = [(os.path.abspath(p), s.st_size, s.st_mtime_ns) for p in paths for s in [os.stat(p)]]
        except OSError:
            return decode(*paths)  # has the better message
        key = hashlib.blake2b(f"{stats} {tag} {READER}".encode(), digest_size=16).hexdigest()
        file = self.folder / f"nanors-{key}.raw"
        try:
            return open_map(file)
        except (OSError, ValueError):  # not there yet, or cut short by a power failure
            return self.store(file, decode(*paths))

    def store(self, file: Path, arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """The arrays, mapped from `file` if there is room for them."""
        for a in arrays:
            a.setflags(write=False)  # in either case
        size, temporary = HEADER + sum(a.nbytes for a in arrays), None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.has_room(size):
                return arrays
            handle, temporary = tempfile.mkstemp(".tmp", "nanors-", self.folder)
            with os.fdopen(handle, "wb") as f:  # not through a mapping, where a full disk would be a SIGBUS
                f.write(json.dumps([(a.dtype.str, a.shape) for a in arrays]).encode().ljust(HEADER))
                for a in arrays:
                    f.write(np.ascontiguousarray(a))
            os.replace(temporary, file)
            self.room -= size
            return open_map(file)
        except OSError:  # disk or quota full, folder gone or read-only: training goes on, at the speed of decoding
            self.full = True
            with contextlib.suppress(OSError, TypeError):  # TypeError: None
                os.unlink(temporary)
            return arrays

    def has_room(self, size: int) -> bool:
        """Looks at the folder once per 1/64 of the limit, so k processes may pass the limit by up to k/64."""
        if self.room < size and not self.full:
            self.room = self.make_room(max(size, self.limit / 64))
            self.full = self.room < size  # stays so: scanning for every tile would cost more than decoding it
        return self.room >= size

    def make_room(self, wanted: float) -> float:
        """Removes dead and old files until `wanted` bytes are free, or no more may go -> free bytes up to `wanted`."""
        now, files = time.time(), []
        for file in self.folder.glob("nanors-*"):
            with contextlib.suppress(OSError):  # removed or renamed by another process meanwhile
                stat = file.stat()
                if file.suffix == ".tmp" and now - stat.st_mtime > ABANDONED:
                    file.unlink()
                else:
                    files.append((stat.st_mtime, stat.st_size, file))
        free = self.limit - sum(size for _, size, _ in files)
        free = min(free, shutil.disk_usage(self.folder).free - KEEP_FREE)
        for used, size, file in sorted(files):
            if free >= wanted or used >= self.since:
                break
            with contextlib.suppress(OSError):
                file.unlink()
                free += size
        return min(free, wanted)

    def clear(self) -> None:
        """Removes every file of the cache; arrays that are in use stay valid."""
        for file in self.folder.glob("nanors-*"):
            file.unlink(missing_ok=True)
        open_map.cache_clear()
        self.room, self.full = 0, False
