"""What models say of the images of a data set: folders that eval.py --probabilities has written.

    found = Predicted(["runs/a-train", "runs/b-train"])
    found.source, found.names                       the data set, opened; its classes
    for labels, p in found.strips("images/3"): ...  (h, w) ids and (K, h, w) probabilities
"""
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

import numpy as np

from ..common import BadInput, nfc, read_json
from ..datasets import PROJECT, SegDataset, script_command
from ..raster import Picture, open_raster
from ..source import Source
from ..tiff import Tiff

ROWS = 512  # of an image at once: a row of tiles of the files that eval.py writes
EVAL = "python eval.py RUN --split S --probabilities"
NEEDED = {"root": str, "split": str, "classes": list[str]}


def curate_command(words: str) -> str:
    """What starts this program, from the folder where the user stands."""
    # "python -m" finds the program from its own folder only.
    if Path.cwd() == PROJECT:
        return f"python -m data.curate {words}"
    return f"{script_command('data/curate')} {words}"


def data_flags(root: str | Path, kind: str, variant: str | None) -> str:
    """The flags by which a script finds this data set."""
    flags = f"--root {quote(str(root))}"
    if kind != "folder":
        flags = f"--dataset {kind} {flags}"
        if variant:
            flags += f" --variant {quote(variant)}"
    return flags


def read_index(folder: str | Path, need: str) -> dict:
    """folder/index.json; `need`: what it must name, "images" or "features"."""
    path = Path(folder) / "index.json"
    if not path.exists():
        raise BadInput(f"{path}: no such file; write it with: {EVAL} {folder}")
    index = read_json(path)
    for key in (*NEEDED, need):
        # A file cut off or written by hand stops here, and not in the middle of a search.
        if key not in index or key in NEEDED and type(index[key]) is not type(NEEDED[key]()):
            raise BadInput(f"{path}: no {key!r}, or no such value; write it anew with: "
                           f"{EVAL} {folder} --features {folder}")
    return index


def open_source(about: dict, root: str | None = None) -> Source:
    """The data set of an index.json or a suspects.json; `root`: where it is, if it was moved."""
    source = Source(about.get("source", "folder"), root or about["root"], about.get("variant"),
                    cache="off", need=())
    if about.get("reading"):  # in numbers, as the run has read the images
        source.reading = about["reading"]
    # One name may be stored as different bytes: an accent may be a sign of its own.
    source.names = [nfc(name) for name in source.names]
    known = sorted(map(nfc, about["classes"]))
    if sorted(source.names) != known:
        raise BadInput(f"{source.root}: the classes {', '.join(source.names)}; the models know "
                       f"{', '.join(known)}")
    return source


def read_sample(source: Source, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) uint8 image and (H, W) uint8 labels, as training reads them."""
    # A data set of its own: it remembers the file read last, which threads must not share.
    data = SegDataset({name: source.pairs[name]}, source.labels, "imagenet", **source.reading)
    return data.read(0)


class Predicted:
    """The probabilities of one or more models for images of one data set.

    images: their names. indexes: {folder: its index.json}. Where several models have predicted an
    image, the mean of their probabilities counts.
    """

    def __init__(self, folders: list[str | Path], root: str | None = None):
        self.indexes = {Path(folder): read_index(folder, "images") for folder in folders}
        about = next(iter(self.indexes.values()))
        self.source = open_source(about, root)
        self.names = self.source.names
        self.maps = {}  # {image: [(file, numbers of its bands in the order of the classes)]}
        for folder, index in self.indexes.items():
            self.add(folder, index, about)
        self.images = list(self.maps)
        if not self.images:
            raise BadInput(f"{folders[0]}/index.json: no images; write it anew with: {EVAL} "
                           f"{folders[0]}")

    def add(self, folder: Path, index: dict, about: dict) -> None:
        """Takes note of the files of one more folder."""
        for key in ("root", "variant"):
            # The mean over two data sets would be of different pictures with equal names.
            if index.get(key) != about.get(key):
                raise BadInput(f"{folder}/index.json: {key} is {index.get(key)}, and "
                               f"{about.get(key)} in the first folder; expected one data set")
        classes = [nfc(name) for name in index["classes"]]
        if sorted(classes) != sorted(self.names):
            raise BadInput(f"{folder}/index.json: the classes {', '.join(classes)}; the data set "
                           f"has {', '.join(self.names)}")
        # Read in this order, all models have the classes in the order of the data set.
        bands = [classes.index(name) + 1 for name in self.names]
        for name, file in index["images"].items():
            if name not in self.source.pairs:
                raise BadInput(f"{folder}/index.json: {name!r} is no image of {self.source.root}; "
                               f"write it anew with: {EVAL} {folder}")
            self.maps.setdefault(name, []).append((folder / file, bands))

    def trained_on(self) -> dict[str, int]:
        """{run: how many of its images in its own folder of probabilities it was trained on}."""
        found = {}
        for index in self.indexes.values():
            # The run folder may be gone; then only the name of the split can tell.
            file = Path(str(index.get("run"))) / "split.json"
            own = set(index["images"])
            seen = own if index["split"] == "train" else set()
            if file.exists():
                seen = own & set(read_json(file, dict[str, list[str]]).get("train", ()))
            if seen:
                found[str(index.get("run"))] = len(seen)
        return found

    def open_maps(self, name: str, size: tuple[int, int]) -> list[tuple[Tiff | Picture, list[int]]]:
        """The files of an image, which are of its size and have a band for each class."""
        found = []
        for file, bands in self.maps[name]:
            raster = open_raster(file)
            # Files of an earlier run, or of images cut anew, would be of other pixels.
            expected = *size, len(bands)
            if raster.shape != expected or raster.dtype != np.uint8:
                raise BadInput(f"{file}: {raster.dtype} of shape {raster.shape}; expected uint8 of "
                               f"{expected} as {name} has; write it anew with: {EVAL} DIR")
            found.append((raster, bands))
        return found

    def strips(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(h, w) uint8 labels and (K, h, w) float32 probabilities, from the top down."""
        _, labels = read_sample(self.source, name)
        H, W = labels.shape
        rasters = self.open_maps(name, (H, W))
        # Strips: of a scene of 20,000 x 20,000 pixels all classes at once would be gigabytes.
        for top in range(0, H, ROWS):
            rows = labels[top:top + ROWS]
            total = 0
            for raster, bands in rasters:
                p = raster.read((top, 0, len(rows), W), bands)
                total = total + np.float32(p)
            mean = total / (255 * len(rasters))
            yield rows, np.moveaxis(mean, -1, 0)
