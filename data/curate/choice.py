"""Which images to label next: those that a model is unsure of and that look like no others.

    pool = read_pool(["runs/a-pool"])           names, files of probabilities, features
    doubt, shares = entropies(pool)             (N,) from 0 (sure) to 1 (every class is as likely)
    order, distance = choose(doubt, pool.features, 50, labelled)

Greedy k-centre (Sener and Savarese, ICLR 2018), weighted: each next image has the largest product
of doubt and distance to the nearest image that is labelled or chosen already.
"""
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import plots
from ..common import BadInput, check_file, csv_text, read_json
from ..datasets import in_threads
from ..files import match
from ..io import read_valid
from ..raster import open_raster, part_of
from .predicted import EVAL, ROWS, open_source, read_index

ENDING = "_probabilities.tif"  # of the files that predict.py --probabilities writes


class Pool(NamedTuple):
    """Images to choose from: their names, files of probabilities, and features (N, C) or None.

    index: an index.json, or None of a folder of predict.py.
    """
    names: list[str]
    files: list[Path]
    features: np.ndarray | None
    index: dict | None


def read_features(folder: str | Path, index: dict) -> dict[str, np.ndarray]:
    """{image: its features}, as eval.py --features has written them."""
    file = Path(folder, str(index.get("features")))
    check_file(file)
    try:
        rows = np.load(file, allow_pickle=False)
        fits = rows.ndim == 2 and len(rows) == len(index["names"]) and np.isfinite(rows).all()
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        fits = False
    if not fits:
        raise BadInput(f"{file}: not the features of the images in index.json; write it anew with: "
                       f"python eval.py RUN --split S --features {folder}")
    return dict(zip(index["names"], rows))


def read_pool(folders: list[str | Path]) -> Pool:
    """Of folders of eval.py, which hold probabilities, features or both, or one of predict.py."""
    maps = {}
    features = {}
    index = None
    for folder in folders:
        # eval.py names its files in index.json; of predict.py there are only the files.
        if (Path(folder) / "index.json").exists():
            found = read_json(Path(folder) / "index.json")
            if "features" in found:
                features |= read_features(folder, found)
            if "images" in found:
                index = read_index(folder, "images")
                maps |= {name: Path(folder) / file for name, file in index["images"].items()}
            continue
        for file, _ in match(folder, f"**/*{ENDING}"):
            name = file.relative_to(folder).as_posix()
            maps[name.removesuffix(ENDING)] = file
    if not maps:
        raise BadInput(f"{folders[0]}: no probabilities; write them with: {EVAL} {folders[0]}, or, "
                       f"of images without masks, python predict.py RUN IMAGES --probabilities "
                       f"--out {folders[0]}")
    # Without its features an image could not be compared with the others.
    if features:
        without = [name for name in maps if name not in features]
        if without:
            raise BadInput(f"{folders[0]}: no features of {without[0]}, but of other images; write "
                           f"both with: {EVAL} DIR --features DIR")
    rows = np.stack([features[name] for name in maps]) if features else None
    return Pool(list(maps), list(maps.values()), rows, index)


def look(file: Path) -> tuple[float, np.ndarray]:
    """Mean entropy of an image's pixels, 0 to 1, and the mean probability (K,) of each class."""
    raster = open_raster(file)
    H, W, k = raster.shape
    if raster.dtype != np.uint8 or k < 2:
        raise BadInput(f"{file}: {raster.dtype} of {k} bands; expected uint8 and a band for each "
                       f"class, as {EVAL} DIR writes them")
    # A big image is read in strips: K bands of it may not fit into memory.
    total = pixels = 0.0
    sums = np.zeros(k)
    for top in range(0, H, ROWS):
        p = np.float32(raster.read((top, 0, min(ROWS, H - top), W))).reshape(-1, k)
        p = p[p.any(1)]  # where there is no data all are 0
        # Rounded to 1/255, the bands of a pixel add up to nearly 1.
        p /= p.sum(1, keepdims=True)
        # 0 times the logarithm of 0 is 0.
        logs = np.log(p, out=np.zeros_like(p), where=p > 0)
        total -= float((p * logs).sum(dtype=np.float64))
        pixels += len(p)
        sums += p.sum(0)
    # The entropy of K equally likely classes is log K, so that 1 is the most there can be.
    return total / max(pixels, 1) / math.log(k), sums / max(pixels, 1)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1: only their directions are compared."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(length, 1e-12)


def choose(doubt: np.ndarray, features: np.ndarray, budget: int,
           labelled: np.ndarray | None = None) -> tuple[list[int], list[float]]:
    """(N,), (N, C) -> indices of the images to label, best first, and the distance of each.

    labelled: (M, C) features of images that have labels.
    """
    # Lengths of features differ with brightness and contrast, directions with what is shown.
    rows = unit(features)
    distance = np.full(len(rows), 2.0)  # no two directions are farther apart
    for other in unit(labelled) if labelled is not None else ():
        distance = np.minimum(distance, np.linalg.norm(rows - other, axis=1))
    free = np.ones(len(rows), bool)
    order = []
    distances = []
    for _ in range(min(budget, len(rows))):
        # Below every gain, so that no image is chosen twice.
        # Doubt alone would choose near copies of one hard image, distance alone odd but easy ones.
        gain = np.where(free, doubt * distance, -1.0)
        best = int(gain.argmax())
        order.append(best)
        distances.append(float(distance[best]))
        free[best] = False
        # From now on images like the chosen one are worth less.
        distance = np.minimum(distance, np.linalg.norm(rows - rows[best], axis=1))
    return order, distances


def table(pool: Pool, doubt: np.ndarray, order: list[int], distances: list[float]) -> str:
    """next.csv: the images in the order in which to label them."""
    rows = [["rank", "image", "entropy", "distance"]]
    for rank, (i, distance) in enumerate(zip(order, distances), 1):
        rows.append([rank, pool.names[i], f"{doubt[i]:.4f}", f"{distance:.4f}"])
    return csv_text(rows)


def sheet(pool: Pool, doubt: np.ndarray, order: list[int], root: str | None) -> plots.Picture:
    """The first images of an index.json, with their entropies."""
    source = open_source(pool.index, root)
    cards = []
    # A picture of more would be too long to look at.
    for i in order[:40]:
        image, _, *box = source.pairs[pool.names[i]]
        pixels = part_of(read_valid(image, **source.reading)[0], *box)
        cards.append((pixels, [pool.names[i], f"entropy {doubt[i]:.3f}"], False))
    return plots.cards([(f"to label next, of {len(pool.names)}", cards)])


def entropies(pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    """(N,) mean entropies and (N, K) mean probabilities of the images."""
    found = in_threads(look, pool.files, "probabilities")
    doubt, shares = zip(*found)
    return np.array(doubt), np.stack(shares)
