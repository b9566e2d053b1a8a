"""What data.curate is worth: wrong labels found and mended, and images to label next, on demo scenes.

    python tests/bench_curate.py suspects OUT          labels spoilt at a known rate, found, reviewed, trained on
    python tests/bench_curate.py next OUT              mIoU by the share of labelled images, beside random choice

Needs about 7 CPU minutes a seed each. Killed and typed again it goes on: what lies in OUT is not made anew, and
OUT/suspects-SEED.json and next-SEED.json keep each seed's numbers. Cleanlab stands beside the suspects where it is
installed (pip install cleanlab).
"""
import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from data import demo
from data.common import write
from data.curate.__main__ import main as curate
from data.curate.predicted import Predicted, read_sample
from data.curate.regions import from_runs, part
from data.curate.suspects import find_suspects, thresholds
from data.points import components

PROJECT = Path(__file__).resolve().parents[1]
SCENES = (48, 4, 16)  # train, val, test
RATE = 0.08  # of the regions are spoilt
SMALLEST, LARGEST = 40, 8000  # pixels of a region that is spoilt
BUDGETS = (25, 50, 100, 200, 400)  # regions that are looked at
REVIEWED = 100  # regions that are looked at before a model is trained again
ERROR = 0.05  # of the reviewer
SHARES = (0.1, 0.2, 0.4)  # of the training images that are labelled


# ---- programs

def call(*words):
    """A script of the project, in a process of its own."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or done.stdout).splitlines()[-1]
        sys.exit(f"{' '.join(map(str, words))}\n{why}")


def train(out, root, steps, seed, *flags):
    """Test mIoU of a run of so many steps, trained unless it is there; nothing chooses its weights."""
    if not (out / "results.json").exists():
        shutil.rmtree(out, ignore_errors=True)  # of a killed training
        call("train_seg.py", "--root", root, "--steps", steps, "--batch-size", 4, "--crop", 128, "--final",
             "--seed", seed, "--workers", 0, "--out", out, *flags)
    return json.loads((out / "results.json").read_text())["miou"]


def ask(run, split, out, *flags):
    """The folder of a run's probabilities of all images of a split."""
    if not (out / "index.json").exists():
        call("eval.py", run, "--split", split, "--probabilities", out, "--workers", 0, "--overwrite", *flags)
    return out


# ---- labels with known faults

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


def spoilt_copy(truth, root, seed):
    """The data set with some of its training labels spoilt."""
    if root.exists():
        return root
    part = root.with_name(f"{root.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(truth, part)
    rng = np.random.default_rng(seed)
    for path in sorted((part / "train/masks").glob("*.png")):
        image = Image.open(path)
        mask = Image.fromarray(spoil(np.array(image), len(demo.CLASSES), rng))
        mask.putpalette(image.getpalette())
        write(path, mask)
    return part.rename(root)


# ---- suspects against the truth

class Case:
    """Labels and right labels of all images that models were asked about, (N, H, W) uint8."""

    def __init__(self, root, truth, folders):
        self.predicted = Predicted(folders, str(root))
        self.names = self.predicted.images
        source = self.predicted.source
        self.labels = np.stack([read_sample(source, name)[1] for name in self.names])
        masks = [source.pairs[name][1].relative_to(source.root) for name in self.names]
        self.truth = np.stack([read_ids(truth / mask) for mask in masks])
        self.wrong = self.labels != self.truth

    def said(self, region):
        """(h, w) of an image and (h, w) of a region in it, as indices of the arrays."""
        inside = from_runs(region.runs, tuple(region.box[2:]))
        return (self.names.index(region.image), *part(region.box)), inside


def hits(chosen, wrong):
    """Of the pixels chosen, how many are wrong; of the wrong ones, how many are chosen; in how many pieces."""
    hit = float((chosen & wrong).sum())
    pieces = 0
    for one in chosen:
        parts = components(one.astype(np.uint8))
        pieces += len(np.unique(parts[one]))
    return dict(precision=hit / max(1, chosen.sum()), recall=hit / wrong.sum(), pieces=pieces)


def lowest(scores, n):
    """The n pixels of lowest score."""
    chosen = np.zeros(scores.size, bool)
    chosen[np.argpartition(scores.ravel(), n)[:n]] = True
    return chosen.reshape(scores.shape)


def random_regions(labels, n, rng):
    """Regions of the labels at random, until they are n pixels."""
    parts = [components(ids) for ids in labels]
    listed = []
    for i, numbers in enumerate(parts):
        sizes = np.bincount(numbers.ravel())
        listed += [(i, number) for number in np.flatnonzero(sizes <= LARGEST)]
    chosen = np.zeros(labels.shape, bool)
    for at in rng.permutation(len(listed)):
        i, number = listed[at]
        chosen[i] |= parts[i] == number
        if chosen.sum() >= n:
            break
    return chosen


def right_class(case, region, rng):
    """What a reviewer who knows the truth and errs at a rate of ERROR says of a region."""
    place, inside = case.said(region)
    right = int(np.bincount(case.truth[place][inside]).argmax())
    if rng.random() < ERROR:
        right = region.proposed if right == region.label else region.label
    return right


def mended(case, regions, rng):
    """The share of the wrong labels that is right after these regions were reviewed."""
    labels = case.labels.copy()
    for region in regions:
        place, inside = case.said(region)
        labels[place][inside] = right_class(case, region, rng)
    return 1 - float((labels != case.truth).sum() / case.wrong.sum())


def cleanlab_scores(case):
    """(N, H, W) of cleanlab, low = doubtful; None without the package."""
    try:
        from cleanlab.segmentation.rank import get_label_quality_scores
    except ImportError:
        return None
    p = []
    for name in case.names:
        p.append(np.concatenate([strip for _, strip in case.predicted.strips(name)], 1))
    return get_label_quality_scores(case.labels.astype(int), np.stack(p), verbose=False)[1]


def budgets(case, found, seed):
    """At each budget of regions: suspects, and as many pixels that cleanlab and chance choose."""
    rng = np.random.default_rng(seed)
    scores = cleanlab_scores(case)
    rows = {}
    for budget in BUDGETS:
        chosen = np.zeros(case.labels.shape, bool)
        mostly = []
        for region in found[:budget]:
            place, inside = case.said(region)
            chosen[place][inside] = True
            mostly.append(case.wrong[place][inside].mean() > 0.5)
        n = int(chosen.sum())
        row = {"suspects": hits(chosen, case.wrong)}
        if scores is not None:
            row["cleanlab"] = hits(lowest(scores, n), case.wrong)
        row["random"] = hits(random_regions(case.labels, n, rng), case.wrong)
        rows[budget] = row | dict(pixels=n, mostly_wrong=float(np.mean(mostly)),
                                  mended=mended(case, found[:budget], rng))
    return rows


def reviewed_copy(case, found, root, truth, seed):
    """The spoilt data set with the masks that data.curate apply writes after a review."""
    if root.exists():
        return root
    rng = np.random.default_rng(seed)
    names = case.predicted.names
    decisions = []
    for number, region in enumerate(found[:REVIEWED], 1):
        chosen = right_class(case, region, rng)
        verdict = {region.label: "keep", region.proposed: "accept"}.get(chosen, "other")
        decisions.append({"id": number, "image": region.image, "box": region.box, "runs": region.runs,
                          "label": names[region.label], "verdict": verdict, "class": names[chosen],
                          "reviewer": "oracle", "time": ""})
    spoilt = case.predicted.source.root
    file = root.with_name("decisions.json")
    write(file, {"root": str(spoilt), "classes": names, "models": [], "decisions": decisions})
    masks = root.with_name("masks")
    if curate(["apply", str(file), "--out", str(masks)]):
        sys.exit("apply failed")
    part = root.with_name(f"{root.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(spoilt, part)
    shutil.copytree(masks, part, dirs_exist_ok=True)
    return part.rename(root)


def suspects(out, seed, steps):
    """One seed: labels spoilt, suspects of two folds, and mIoU on the three kinds of labels."""
    truth = demo.make(out / "truth", seed=seed, scenes=SCENES)
    spoilt = spoilt_copy(truth, out / "spoilt", seed)
    if not (out / "fold_2.json").exists() and curate(
            ["folds", str(spoilt), "--number", "2", "--out", str(out), "--overwrite"]):
        sys.exit("folds failed")
    folders = []
    for i in (1, 2):
        train(out / f"run_{i}", spoilt, steps, seed, "--split-file", out / f"fold_{i}.json")
        folders.append(ask(out / f"run_{i}", "fold", out / f"probabilities_{i}"))
    case = Case(spoilt, truth, folders)
    found = find_suspects(case.predicted, thresholds(case.predicted)).regions
    reviewed = reviewed_copy(case, found, out / "reviewed", truth, seed)
    miou = {}
    for kind, root in ("spoilt", spoilt), ("reviewed", reviewed), ("clean", truth):
        miou[kind] = train(out / f"on_{kind}", root, steps, seed)
    return dict(images=len(case.names), wrong=float(case.wrong.mean()), regions=len(found),
                budgets=budgets(case, found, seed), miou=miou)


# ---- what to label next

def next_images(out, seed, steps):
    """One seed: {arm: mIoU at each share}, all from one first draw of images."""
    root = demo.make(out / "truth", seed=seed, scenes=SCENES)
    names = [f"train/images/scene_{i:03d}" for i in np.random.default_rng(seed).permutation(SCENES[0])]
    found = {}
    for arm in ("random", "next"):
        labelled = []
        scores = []
        for share in SHARES:
            want = round(share * len(names)) - len(labelled)
            pool = [name for name in names if name not in labelled]
            if arm == "next" and labelled:
                folder = ask(run, "pool", out / f"pool_{run.name}", "--features", out / f"pool_{run.name}")
                seen = out / f"seen_{run.name}"
                if not seen.exists():
                    call("eval.py", run, "--split", "train", "--features", seen, "--workers", 0)
                if curate(["next", str(folder), "--labelled", str(seen), "--budget", str(want), "--overwrite"]):
                    sys.exit("next failed")
                pool = (folder / "next/next.txt").read_text().split()
            labelled = labelled + pool[:want]
            rest = [name for name in names if name not in labelled]
            # The first draw is the same, and so is its model.
            run = out / (f"{arm}_{len(labelled)}" if scores else f"first_{len(labelled)}")
            split = out / f"{run.name}.json"
            write(split, {"train": labelled, "pool": rest, "test": [f"test/images/scene_{i:03d}"
                                                                    for i in range(SCENES[2])]})
            scores.append(train(run, root, steps, seed, "--split-file", split))
        found[arm] = scores
    return dict(shares=SHARES, miou=found)


# ---- tables

def spread(values):
    """'0.512 +/- 0.010' of a number per seed."""
    values = [v for v in values if v is not None]
    text = f"{np.mean(values):.3f}"
    return f"{text} +/- {np.std(values, ddof=1):.3f}" if len(values) > 1 else text


def print_suspects(results):
    wrong = spread([100 * r["wrong"] for r in results])
    print(f"{len(results)} seeds, {results[0]['images']} images each, {wrong} % of the labels are wrong")
    print("| regions seen | mostly wrong | wrong labels mended | as many pixels by | precision | recall | pieces |",
          "|---|---|---|---|---|---|---|", sep="\n")
    for budget in results[0]["budgets"]:
        rows = [r["budgets"][budget] for r in results]
        first = f"{budget} | {spread([r['mostly_wrong'] for r in rows])} | {spread([r['mended'] for r in rows])}"
        for way in ("suspects", "cleanlab", "random"):
            if way not in rows[0]:
                continue
            cells = [spread([r[way][key] for r in rows]) for key in ("precision", "recall")]
            pieces = round(np.mean([r[way]["pieces"] for r in rows]))
            print(f"| {first} | {way} | {' | '.join(cells)} | {pieces} |")
            first = " |  | "
    for kind in ("spoilt", "reviewed", "clean"):
        print(f"test mIoU, trained on {kind} labels: {spread([r['miou'][kind] for r in results])}")
    gains = [r["miou"]["reviewed"] - r["miou"]["spoilt"] for r in results]
    print(f"reviewed minus spoilt, seed by seed: {', '.join(f'{gain:+.3f}' for gain in gains)}")


def print_next(results):
    print("| labelled images | random | next | next minus random, seed by seed |\n|---|---|---|---|")
    for i, share in enumerate(results[0]["shares"]):
        cells = [[r["miou"][arm][i] for r in results] for arm in ("random", "next")]
        gains = ", ".join(f"{b - a:+.3f}" for a, b in zip(*cells))
        print(f"| {share:.0%} | {spread(cells[0])} | {spread(cells[1])} | {gains} |")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["suspects", "next"])
    p.add_argument("out", type=Path)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=250, help="of every training")
    args = p.parse_args(argv)
    measure, show = dict(suspects=(suspects, print_suspects), next=(next_images, print_next))[args.what]
    results = []
    for seed in args.seeds:
        file = args.out.absolute() / f"{args.what}-{seed}.json"
        if not file.exists():
            folder = file.parent / f"{args.what}_seed_{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            write(file, dict(steps=args.steps, **measure(folder, seed, args.steps)))
        results.append(json.loads(file.read_text()))
        if results[-1]["steps"] != args.steps:
            p.error(f"{file}: measured with {results[-1]['steps']} steps; name another OUT")
        show(results)


if __name__ == "__main__":
    main()
