"""How well data.curate finds and mends wrong labels, on demo scenes whose labels are spoilt at a known rate.

    python tests/bench_curate.py spoil D             a demo set, labels of train spoilt; D/truth has the right ones
    python -m data.curate folds D --number 3         prints the commands that train and write probabilities
    python tests/bench_curate.py score D PROBABILITIES...

`score` prints precision and recall of suspects at several budgets, beside cleanlab's scores (pip install
cleanlab; optional) and random regions, and what a reviewer who errs once in twenty times mends.
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from data import demo
from data.common import write
from data.curate.predicted import Predicted, read_sample
from data.curate.regions import from_runs, part
from data.curate.suspects import find_suspects, thresholds
from data.points import components

RATE = 0.08  # of the regions
SMALLEST, LARGEST = 40, 8000  # pixels of a region that is spoilt
BUDGETS = (25, 50, 100, 200, 400)  # regions that are looked at
ERROR = 0.05  # of the reviewer


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


class Case:
    """Labels, right labels and what models say of all images, (N, H, W) and (N, K, H, W) uint8."""

    def __init__(self, root, folders):
        self.predicted = Predicted(folders, str(root))
        self.names = self.predicted.images
        source = self.predicted.source
        self.labels = np.stack([read_sample(source, name)[1] for name in self.names])
        masks = [source.pairs[name][1].relative_to(source.root) for name in self.names]
        self.truth = np.stack([read_ids(source.root / "truth" / mask) for mask in masks])
        self.wrong = self.labels != self.truth

    def said(self, region):
        """(h, w) of an image and (h, w) of a region in it, as indices of the arrays."""
        inside = from_runs(region.runs, tuple(region.box[2:]))
        return (self.names.index(region.image), *part(region.box)), inside


def row(title, chosen, wrong):
    """Of the pixels chosen, how many are wrong; of the wrong ones, how many are chosen."""
    hit = (chosen & wrong).sum()
    print(f"  {title:34} {chosen.sum():8d} pixels   precision {hit / max(1, chosen.sum()):.3f}   "
          f"recall {hit / wrong.sum():.3f}")


def lowest(scores, n):
    """The n pixels of lowest score."""
    chosen = np.zeros(scores.size, bool)
    chosen[np.argpartition(scores.ravel(), n)[:n]] = True
    return chosen.reshape(scores.shape)


def random_regions(labels, n, rng):
    """Regions of the labels at random, until they are n pixels."""
    parts = [components(ids) for ids in labels]
    sizes = [np.bincount(p.ravel()) for p in parts]
    listed = [(i, number) for i, size in enumerate(sizes) for number in range(len(size)) if size[number] <= LARGEST]
    chosen = np.zeros(labels.shape, bool)
    for at in rng.permutation(len(listed)):
        i, number = listed[at]
        chosen[i] |= parts[i] == number
        if chosen.sum() >= n:
            return chosen


def reviewed(case, regions, rng):
    """Labels after a reviewer who knows the truth and errs at a rate of ERROR has looked at these regions."""
    labels = case.labels.copy()
    for region in regions:
        place, inside = case.said(region)
        right = np.bincount(case.truth[place][inside]).argmax()
        if rng.random() < ERROR:
            right = region.proposed if right == region.label else region.label
        labels[place][inside] = right
    return labels


def cleanlab_scores(case):
    """(N, H, W) of cleanlab, low = doubtful, and its own choice; None without the package."""
    try:
        from cleanlab.segmentation.filter import find_label_issues
        from cleanlab.segmentation.rank import get_label_quality_scores
    except ImportError:
        return None
    strips = [[p for _, p in case.predicted.strips(name)] for name in case.names]
    p = np.stack([np.concatenate(parts, 1) for parts in strips])
    _, scores = get_label_quality_scores(case.labels.astype(int), p, verbose=False)
    issues = find_label_issues(case.labels.astype(int), p, downsample=1, n_jobs=1, verbose=False)
    return scores, issues


def score(root, folders):
    case = Case(root, folders)
    rng = np.random.default_rng(0)
    print(f"{len(case.names)} images, {case.wrong.mean():.2%} of the labels are wrong")
    start = time.time()
    found = find_suspects(case.predicted, thresholds(case.predicted)).regions
    print(f"{len(found)} suspect regions in {time.time() - start:.1f} s")
    start = time.time()
    theirs = cleanlab_scores(case)
    if theirs:
        print(f"cleanlab in {time.time() - start:.1f} s")
        row("cleanlab find_label_issues", theirs[1], case.wrong)
    for budget in BUDGETS:
        chosen = np.zeros(case.labels.shape, bool)
        hits = 0
        for region in found[:budget]:
            place, inside = case.said(region)
            chosen[place][inside] = True
            hits += case.wrong[place][inside].mean() > 0.5
        print(f"{budget} regions, {hits / len(found[:budget]):.3f} of them mostly wrong")
        row("suspects", chosen, case.wrong)
        if theirs:
            row("cleanlab, lowest pixels", lowest(theirs[0], chosen.sum()), case.wrong)
        row("random regions", random_regions(case.labels, chosen.sum(), rng), case.wrong)
        after = reviewed(case, found[:budget], rng) != case.truth
        print(f"  reviewed with {ERROR:.0%} errors: {1 - after.sum() / case.wrong.sum():.3f} of the wrong "
              "labels mended")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["spoil", "score"])
    p.add_argument("root", type=Path)
    p.add_argument("probabilities", nargs="*", type=Path)
    p.add_argument("--scenes", type=int, nargs=3, default=(96, 16, 24))
    args = p.parse_args()
    if args.what == "spoil":
        make(args.root, tuple(args.scenes))
    else:
        score(args.root, args.probabilities)
