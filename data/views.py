"""Fixed views of images instead of new ones at every draw, and files of a backbone's maps of them.

    train = Views(train, 4)                               of each image 4 crops, drawn once, in turn
    kept = Kept("features", train, about, maps=shapes)    about: all that decides the features
    [missing] = make_folders([kept])                      one of its own; is there room?
    kept.write(k, arrays, maps)                           models/features.py does so for all of them
    x, y, name, *maps = kept[i, draw]                     as train[i, draw], and the maps, bf16

A view has a number k, and a file: its pixels, its mask and the maps, with checksums, as
data/cache.py writes decoded images. A file appears when it is whole. What decides the features is
hashed into the sub-folder's name and lies in it as about.json, so a cache is never taken for
another one, and several fit in one folder.
"""
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .cache import ABANDONED, KEEP_FREE, Rows, open_map, size_of, write_arrays
from .common import BadInput, as_bytes, first_few, json_text, progress, read_json, write
from .datasets import SegDataset, normalise

FORMAT = 1  # of the files, and of how views are drawn: raise it when either changes
LISTED = 10  # damaged files that the advice names one by one
Shape = tuple[int, ...]


def short_hash(value: dict | list | str) -> str:
    """16 hexadecimal digits of the JSON text of a value."""
    return hashlib.sha256(as_bytes(json_text(value))).hexdigest()[:16]


# ---- which pixels

class Views(torch.utils.data.Dataset):
    """`n` fixed samples of every image: each pass over the images takes the next one.

    View v of image i is what `data` draws with the number v * len(data) + i, for any data set with
    sample(). Index with (i, draw), as data/samplers.py does.
    """

    def __init__(self, data: SegDataset, n: int):
        self.data = data
        self.n = n

    def __len__(self):
        return len(self.data)

    def number(self, i: int, draw: int) -> int:
        """The view of image i that is taken in this draw."""
        images = len(self.data)
        view = draw // images % self.n
        return view * images + i

    def __getitem__(self, key):
        i, draw = key
        return self.data[i, self.number(i, draw)]

    def sample(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, 3) uint8 image, (H, W) uint8 mask of view k."""
        return self.data.sample(k % len(self.data), k)

    def shapes(self) -> list[Shape]:
        """(H, W) of every view."""
        # Crops are all of one size.
        image, _ = self.sample(0)
        return [image.shape[:2]] * (self.n * len(self.data))


class Windows(torch.utils.data.Dataset):
    """The windows of whole images as views, one image after another.

    boxes: for every image its windows (top, left, h, w).
    """

    def __init__(self, data: SegDataset, boxes: list[list[tuple[int, int, int, int]]]):
        self.data = data
        self.boxes = []
        for i, windows in enumerate(boxes):
            self.boxes += [(i, box) for box in windows]
        # The number of each image's first window.
        self.first = [0, *accumulate(map(len, boxes))]

    def sample(self, k: int) -> tuple[np.ndarray]:
        """(H, W, 3) uint8 image of view k, by itself: masks are scored whole."""
        i, (top, left, h, w) = self.boxes[k]
        image, _ = self.data.read(i)
        return (image[top:top + h, left:left + w],)

    def shapes(self) -> list[Shape]:
        """(H, W) of every view."""
        return [(h, w) for _, (_, _, h, w) in self.boxes]


# ---- on disk

def make_folders(parts: list["Kept"]) -> list[list[int]]:
    """Makes the sub-folders -> the missing views of each; too small a disk is a BadInput."""
    # Over all parts, before any is filled: the second one must not find the disk full after hours.
    missing = [kept.missing() for kept in parts]
    need = sum(kept.sizes[k] for kept, views in zip(parts, missing) for k in views)
    parent = parts[0].parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free - KEEP_FREE
        if need > free:
            raise BadInput(f"{parent}: the features need {size_text(need)}, and "
                           f"{size_text(max(free, 0))} are free beside {size_text(KEEP_FREE)} for "
                           "other files; type --cache-features DIR on a larger disk, or fewer "
                           "--views")
        for kept in parts:
            kept.make()
    except OSError as e:
        raise BadInput(f"{parent}: no place for features ({e.strerror}); type --cache-features DIR "
                       "with a folder that can be written") from None
    return missing


def file_name(k: int) -> str:
    """The file of view k."""
    return f"view-{k:06d}.raw"


def size_text(n: int) -> str:
    """1234567 -> '1.2 MB'."""
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


class Kept(torch.utils.data.Dataset):
    """Views and a backbone's maps of them in files; an index (i, draw) is that of Views.

    about: what decides the maps, plain JSON; the names of the images are added. maps: a function,
    (H, W) of a view -> the shapes (C, h, w) of its maps.
    """

    def __init__(self, folder: str | Path, views: Views | Windows, about: dict,
                 maps: Callable[[Shape], list[Shape]]):
        self.views = views
        data = views.data
        about = about | dict(names=short_hash(data.names), views=len(views.shapes()), format=FORMAT)
        self.about = json.loads(json_text(about))  # as it is read again: lists for tuples
        self.parent = Path(folder).expanduser()
        self.folder = self.parent / f"features-{short_hash(self.about)}"
        arrays = views.sample(0)
        self.arrays = len(arrays)  # of a file; behind them are the maps

        # The bytes of every view's file are known before anything is computed.
        def bytes_of(size):
            shapes = [((*size, *a.shape[2:]), a.dtype.str) for a in arrays]
            shapes += [(shape, "<i2") for shape in maps(size)]
            return size_of(shapes)

        sizes = views.shapes()
        known = {size: bytes_of(size) for size in set(sizes)}
        self.sizes = [known[size] for size in sizes]
        self.number = len(sizes)  # of views

    def __len__(self):
        return len(self.views.data)

    def file(self, k: int) -> Path:
        """Where view k lies."""
        return self.folder / file_name(k)

    def missing(self) -> list[int]:
        """The views that are not there yet, or whose files have not their size."""
        there = {}
        if self.folder.is_dir():
            with os.scandir(self.folder) as files:
                there = {file.name: file.stat().st_size for file in files}
        return [k for k, size in enumerate(self.sizes) if there.get(file_name(k)) != size]

    def make(self) -> None:
        """Makes the sub-folder, says in it what it is, and removes what killed processes left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "about.json").exists():
            write(self.folder / "about.json", self.about)
        # A process may be writing there just now: only old files are a killed one's.
        for file in self.folder.glob("*.tmp"):
            with contextlib.suppress(OSError):  # removed by another process meanwhile
                if time.time() - file.stat().st_mtime > ABANDONED:
                    file.unlink()

    def differs(self) -> str:
        """What tells the most similar other sub-folder from this one; '' without another."""
        # Whoever expects a cache to be taken that is not wants to know why.
        found = []
        for file in self.parent.glob("features-*/about.json"):
            if file.parent == self.folder:
                continue
            try:
                other = read_json(file)
            except BadInput:  # not ours
                continue
            keys = [key for key in self.about | other if self.about.get(key) != other.get(key)]
            if "split" not in keys:
                found.append((len(keys), file.parent.name, keys))
        if not found:
            return ""
        _, name, keys = min(found)
        return f"{name} is not taken: it has another {', '.join(keys)}"

    def write(self, k: int, arrays: Sequence[np.ndarray], maps: Sequence[Tensor]) -> None:
        """Keeps what sample(k) gave, and its maps (C, h, w) as bf16."""
        # numpy has no bf16: its bits are stored as int16.
        bits = [t.to(torch.bfloat16).view(torch.int16).numpy() for t in maps]
        try:
            write_arrays(self.file(k), (*arrays, *bits))
        except OSError as e:
            raise BadInput(f"{self.file(k)}: cannot be written ({e.strerror}); make room, then "
                           "type the same command: it goes on from here") from None

    def read(self, k: int) -> tuple[list[np.ndarray], list[Tensor]]:
        """What sample(k) gave, and the maps (C, h, w) bf16; not to be written to."""
        try:
            arrays = self.arrays_of(k)
        except ValueError:
            raise self.damaged(k) from None
        except OSError as e:
            raise BadInput(f"{self.file(k)}: cannot be read ({e.strerror}); type the same command, or "
                           "--resume RUN: what is missing is computed again") from None
        # A copy, because torch has no tensors that cannot be written to.
        maps = [torch.from_numpy(a.copy()).view(torch.bfloat16) for a in arrays[self.arrays:]]
        return arrays[:self.arrays], maps

    def arrays_of(self, k: int) -> list[np.ndarray]:
        """All of view k's file; a ValueError where checksums do not agree."""
        def differ():
            raise ValueError

        arrays = []
        for a in open_map(self.file(k), 0):
            if isinstance(a, Rows):
                a.renew = differ
                a = a.whole()
            arrays.append(a)
        return arrays

    def damaged(self, first: int) -> BadInput:
        """What is said of all files whose checksums do not agree, not of the first that was met alone."""
        files = [str(self.file(first))]
        others = [k for k in range(self.number) if k != first]
        for k in progress(others, "features looked at"):
            try:
                self.arrays_of(k)
            except ValueError:
                files.append(str(self.file(k)))
            except OSError:  # missing: computed again anyway
                pass
        files.sort()
        remove = shlex.join(["rm", *files])
        if len(files) > LISTED:
            remove = shlex.join(["rm", "-r", str(self.folder)]) + " (sound features too)"
        return BadInput(f"{first_few(files)}: damaged; is the disk sound? Type {remove}, then the "
                        "same command, or --resume RUN: what is missing is computed again")

    def __getitem__(self, key):
        i, draw = key
        (image, mask), maps = self.read(self.views.number(i, draw))
        data = self.views.data
        y = torch.from_numpy(mask.astype(np.int64))
        return normalise(image, data.norm), y, data.names[i], *maps

    def maps_of(self, i: int, first: int, last: int) -> list[Tensor]:
        """Of windows first..last of image i of Windows, each map (n, C, h, w)."""
        start = self.views.first[i]
        each = [self.read(start + k)[1] for k in range(first, last)]
        return [torch.stack(tap) for tap in zip(*each)]
