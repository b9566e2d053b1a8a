"""How well data.curate finds and mends wrong labels, on demo scenes whose labels are spoilt at a known rate.

    python tests/bench_curate.py spoil D             a demo set, labels of train spoilt; D/truth has the right ones
    python -m data.curate folds D --number 3         prints the commands that train and write probabilities
    python tests/bench_curate.py score D PROBABILITIES...

`score` prints precision and recall of suspects at several budgets, beside cleanlab's scores (pip install
cleanlab; optional) and random regions, and what a reviewer who errs once in twenty times mends.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from data import demo
from data.common import write
from data.points import components

RATE = 0.08  # of the regions
SMALLEST, LARGEST = 40, 8000  # pixels of a region that is spoilt


def read_ids(path):
    return np.array(Image.open(path))


def surroundings(ids, region):
    """The class that is most frequent around a region."""
    ring = np.zeros(ids.shape, bool)
    for axis in (0, 1):
        for step in (-2, 2):
            ring |= np.roll(region, step, axis)
    found = np.bincount(ids[ring & ~region], minlength=256)
    return found.argmax()


def spoil(ids, k, rng):
    """A mask with some regions of another class, missing, or moved by a few pixels."""
    parts = components(ids)
    area = np.bincount(parts.ravel())
    spoilt = ids.copy()
    for number in np.flatnonzero((area >= SMALLEST) & (area <= LARGEST)):
        if rng.random() >= RATE:
            continue
        region = parts == number
        c = ids[region][0]
        fault = rng.choice(["swapped", "missing", "moved"])
        if fault == "swapped":
            spoilt[region] = rng.choice([other for other in range(k) if other != c])
            continue
        spoilt[region] = surroundings(ids, region)
        if fault == "moved":
            dy, dx = rng.choice([-6, -4, 4, 6], 2)
            y, x = np.nonzero(region)
            inside = (y + dy >= 0) & (y + dy < len(ids)) & (x + dx >= 0) & (x + dx < ids.shape[1])
            spoilt[y[inside] + dy, x[inside] + dx] = c
    return spoilt


def make(root, scenes):
    root = demo.make(root, scenes=scenes)
    rng = np.random.default_rng(0)
    changed = total = 0
    for path in sorted((root / "train/masks").glob("*.png")):
        kept = root / "truth/train/masks" / path.name
        if kept.exists():
            raise SystemExit(f"{root}: spoilt already; name another folder")
        write(kept, path.read_bytes())
        image = Image.open(path)
        ids = np.array(image)
        wrong = spoil(ids, len(demo.CLASSES), rng)
        mask = Image.fromarray(wrong)
        mask.putpalette(image.getpalette())
        write(path, mask)
        changed += (wrong != ids).sum()
        total += ids.size
    print(f"{root}: {changed / total:.2%} of the training labels are wrong now")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["spoil", "score"])
    p.add_argument("root", type=Path)
    p.add_argument("probabilities", nargs="*", type=Path)
    p.add_argument("--scenes", type=int, nargs=3, default=(96, 16, 24))
    args = p.parse_args()
    if args.what == "spoil":
        make(args.root, tuple(args.scenes))
