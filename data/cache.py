"""Decoded images as memory-mapped files: a tile is decoded once, then a random crop costs a slice.

    cache = Cache(folder=None, limit_gb=64)
    image, mask = cache((image_path, mask_path), decode)    decode(*paths) runs the first time only

Place: the folder given, else $NANORS_CACHE, else ~/.cache/nanors. Better on a local disk: a file
removed from under a mapping is harmless there, on NFS it kills the reader. There is one
nanors-*.raw for an image and its mask; nothing else is ever deleted.
Size: up to `limit_gb`, and KEEP_FREE of the disk stays free. To make room the least recently used
go first, but none that were used since this Cache was made: what then finds no place is decoded
every time, instead of all images in turn.
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
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .common import BadInput
from .files import with_companions

FORMAT = 4  # raise it when decoding changes: what another version has decoded is then not taken
HEADER = 512  # bytes: JSON [[dtype, shape], ...], then spaces; the arrays follow
KEEP_FREE = 4 * 2**30  # bytes, for the checkpoints that may go to the same disk
ABANDONED = 600  # seconds without a write, after which the .tmp of a killed process is removed


@functools.lru_cache(128)  # open mappings of a process, a file handle each
def open_map(file: Path) -> tuple[np.ndarray, ...]:
    """Read-only arrays on the file's pages, shared by processes; opening marks the file as used."""
    pages = np.asarray(np.memmap(file, np.uint8, "r"))  # slices of a np.memmap itself are slow
    arrays = []
    start = HEADER
    for dtype, shape in json.loads(pages[:HEADER].tobytes()):
        end = start + np.dtype(dtype).itemsize * int(np.prod(shape))
        arrays.append(pages[start:end].view(dtype).reshape(shape))
        start = end
    with contextlib.suppress(OSError):  # somebody else's cache can be read all the same
        os.utime(file)
    return tuple(arrays)


class Cache:
    """cache(paths, decode, tag) -> decode(*paths), arrays not to be written to; later off the disk.

    `tag` says what besides the files decides the result, such as bands or label table. Two
    processes may decode the same file at once: each writes under a name of its own and renames, so
    readers see whole files only.
    """

    def __init__(self, folder: str | Path | None = None, limit_gb: float = 64.0):
        place = folder or os.environ.get("NANORS_CACHE") or "~/.cache/nanors"
        self.folder = Path(place).expanduser()
        self.limit = limit_gb * 2**30
        self.since = time.time() - 2  # file times may lag by so many seconds
        self.room = 0  # bytes this process may write before it looks at the folder again
        self.full = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise BadInput(f"{self.folder}: no place for a cache ({e.strerror}); "
                           "type --cache DIR or off") from None

    def __call__(self, paths: tuple, decode: Callable[..., tuple],
                 tag: str = "") -> tuple[np.ndarray, ...]:
        # Size and time are part of the name, so that a changed file is decoded again.
        stats = []
        try:
            for path in with_companions(paths):
                stat = os.stat(path)
                stats.append((os.path.abspath(path), stat.st_size, stat.st_mtime_ns))
        except OSError:
            return decode(*paths)  # has the better message
        key = hashlib.blake2b(f"{stats} {tag} {FORMAT}".encode(), digest_size=16).hexdigest()
        file = self.folder / f"nanors-{key}.raw"
        try:
            return open_map(file)
        except (OSError, ValueError):  # not there yet, or cut short by a power failure
            return self.store(file, decode(*paths))

    def store(self, file: Path, arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """The arrays, mapped from `file` if there is room for them; read-only in either case."""
        for a in arrays:
            a.setflags(write=False)
        size = HEADER + sum(a.nbytes for a in arrays)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.has_room(size):
                return arrays
            self.write(file, arrays)
            self.room -= size
            return open_map(file)
        except OSError:
            # Disk or quota full, folder gone or read-only: go on, at the speed of decoding.
            self.full = True
            return arrays

    def write(self, file: Path, arrays: tuple[np.ndarray, ...]) -> None:
        """Header and arrays into a file that appears when it is whole."""
        header = json.dumps([(a.dtype.str, a.shape) for a in arrays])
        handle, temporary = tempfile.mkstemp(".tmp", "nanors-", self.folder)
        try:
            # Not through a mapping, where a full disk would be a SIGBUS.
            with os.fdopen(handle, "wb") as f:
                f.write(header.encode().ljust(HEADER))
                for a in arrays:
                    f.write(np.ascontiguousarray(a))
            os.replace(temporary, file)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

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
