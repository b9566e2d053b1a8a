"""Regions where models contradict the labels with confidence: what a person should look at first.

    predicted = Predicted(["runs/a-train"])
    sure = thresholds(predicted)             (K,) how sure is sure, for each class
    found = find_suspects(predicted, sure)   regions by falling score, controls, scores of images

A pixel is suspect where the most likely class is another one than the label, and at least as
likely as that class is on average where it is the label: the rule of confident learning (Northcutt
et al., JAIR 2021). Suspect pixels of one label and one proposal that touch are a region.
"""
import zlib
from collections import Counter
from typing import NamedTuple

import numpy as np

from .. import plots
from ..common import IGNORE, as_bytes, csv_text, even_sample
from ..datasets import in_threads
from ..points import components
from .predicted import Predicted, read_sample
from .regions import from_runs, part, to_runs

SMALLEST = 16  # pixels of a region: nobody can judge less
TEMPERATURE = 0.1  # of the soft minimum over an image's pixels (arXiv 2307.05080)
LEAST = 1 / 255  # probability of a label: the files of eval.py have no smaller one but 0
TRIES = 20  # places where a control is tried
CONTROLS_PER_IMAGE, CONTROLS = 2, 200
MARGIN = 32  # pixels shown around a region, and at least half its size
SHOWN = 12  # regions in the sheet


class Region(NamedTuple):
    """Touching pixels of an image: box (top, left, h, w) and runs, see regions.py; class ids.

    confidence: mean probability of the proposal. score: the mean of the logarithm of its
    probability over that of the label, times the root of the pixels, which depend on each other.
    """
    image: str
    box: list[int]
    runs: list[int]
    pixels: int
    label: int
    proposed: int
    confidence: float
    score: float


class Suspects(NamedTuple):
    """Regions by falling score; controls, where `proposed` is right; {image: score}."""
    regions: list[Region]
    controls: list[Region]
    images: dict[str, float]


class Opinion(NamedTuple):
    """What models say of an image, (H, W) each: labels, the likeliest class and its probability.

    of_label: the probability of the label. agrees: bool, is it what they are sure of? score: the
    soft minimum of the labels' probabilities.
    """
    labels: np.ndarray
    likeliest: np.ndarray
    confidence: np.ndarray
    of_label: np.ndarray
    agrees: np.ndarray
    score: float


# ---- pixels

def label_probability(labels: np.ndarray, p: np.ndarray) -> np.ndarray:
    """(h, w) ids, (K, h, w) probabilities -> (h, w): that of the label, of class 0 if ignored."""
    # IGNORE is no index of a class; whoever calls this leaves those pixels out.
    ids = np.where(labels == IGNORE, 0, labels)
    return np.take_along_axis(p, ids[None].astype(np.int64), 0)[0]


def thresholds(predicted: Predicted) -> np.ndarray:
    """(K,) mean probability of a class where it is the label; 0.5 of one that is nowhere."""
    k = len(predicted.names)

    def measure(name):
        # Row 0: sums of probabilities. Row 1: pixels.
        total = np.zeros((2, k))
        for labels, p in predicted.strips(name):
            known = labels != IGNORE
            ids = labels[known]
            total[0] += np.bincount(ids, label_probability(labels, p)[known], k)
            total[1] += np.bincount(ids, minlength=k)
        return total

    # Sums over all images, divided once.
    sums, pixels = sum(in_threads(measure, predicted.images, "probabilities"))
    return np.where(pixels > 0, sums / np.maximum(pixels, 1), 0.5)


def opinion(predicted: Predicted, name: str, sure: np.ndarray) -> Opinion:
    """What the models say of an image."""
    strips = []
    weighted = weights = 0.0
    for labels, p in predicted.strips(name):
        likeliest = p.argmax(0).astype(np.uint8)
        # What the models think, whatever the label says.
        confidence = p.max(0)
        known = labels != IGNORE
        own = label_probability(labels, p)
        agrees = known & (likeliest == labels) & (confidence >= sure[likeliest])
        strips.append((labels, likeliest, confidence, own, agrees))
        # The least likely labels weigh most: a few wrong ones count in an image of thousands.
        weight = np.exp((1 - own[known]) / TEMPERATURE, dtype=np.float64)
        weighted += (weight * own[known]).sum()
        weights += weight.sum()
    # Without a labelled pixel nothing is suspect.
    score = weighted / weights if weights else 1.0
    return Opinion(*map(np.concatenate, zip(*strips)), score)


# ---- regions

def regions_of(name: str, seen: Opinion, sure: np.ndarray) -> list[Region]:
    """The suspect regions of an image, of SMALLEST pixels or more."""
    labels, likeliest, confidence, of_label, _, _ = seen
    suspect = (labels != IGNORE) & (likeliest != labels) & (confidence >= sure[likeliest])
    # Touching pixels of one label and one proposal have one number; all others have -1.
    pair = labels.astype(np.int64) * 256 + likeliest
    parts = components(np.where(suspect, pair, -1))

    # The pixels of a region behind each other, in the order of the regions.
    y, x = np.nonzero(suspect)
    numbers = parts[y, x]
    order = np.argsort(numbers, kind="stable")
    y, x, numbers = y[order], x[order], numbers[order]
    first = np.flatnonzero(np.diff(numbers, prepend=-1))
    areas = np.diff(first, append=len(numbers))

    found = []
    for start, area in zip(first, areas):
        # Single pixels along borders are many, and nobody can say what they are.
        if area < SMALLEST:
            continue
        rows = y[start:start + area]
        columns = x[start:start + area]
        top, left = rows.min(), columns.min()
        box = [int(v) for v in (top, left, rows.max() - top + 1, columns.max() - left + 1)]
        inside = parts[part(box)] == numbers[start]
        p = confidence[rows, columns]
        # The mean log of how many times likelier the proposal is than the label.
        evidence = np.log(p / np.maximum(of_label[rows, columns], LEAST)).mean()
        label = int(labels[rows[0], columns[0]])
        proposed = int(likeliest[rows[0], columns[0]])
        found.append(Region(name, box, to_runs(inside), int(area), label, proposed,
                            round(float(p.mean()), 4), round(float(evidence * area ** 0.5), 4)))
    return found


def controls_of(name: str, seen: Opinion, regions: list[Region]) -> list[Region]:
    """Shapes of suspect regions, moved to where label and models agree: there `proposed` is right.

    `label` is a class that is not there. A reviewer who cannot tell is wrong there.
    """
    # Of the image alone, whatever else is looked at.
    rng = np.random.default_rng(zlib.crc32(as_bytes(name)))
    H, W = seen.labels.shape
    found = []
    # Shaped as suspects are, controls cannot be told from them.
    for i in rng.permutation(len(regions)):
        region = regions[i]
        _, _, h, w = region.box
        inside = from_runs(region.runs, (h, w))
        for _ in range(TRIES):
            box = [int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1)), h, w]
            labels = seen.labels[part(box)][inside]
            if seen.agrees[part(box)][inside].all() and (labels == labels[0]).all():
                right = int(labels[0])
                # Of the two classes of the suspect region one at least is not the right one.
                wrong = region.label if region.label != right else region.proposed
                mean = float(seen.confidence[part(box)][inside].mean())
                found.append(region._replace(box=box, label=wrong, proposed=right,
                                             confidence=round(mean, 4)))
                break
        if len(found) == CONTROLS_PER_IMAGE:
            break
    return found


def find_suspects(predicted: Predicted, sure: np.ndarray) -> Suspects:
    """All images, one after the other; only their regions are kept."""
    def look(name):
        seen = opinion(predicted, name, sure)
        regions = regions_of(name, seen, sure)
        return regions, controls_of(name, seen, regions), seen.score

    regions = []
    controls = []
    scores = {}
    found = in_threads(look, predicted.images, "suspects")
    for name, (of_image, planted, score) in zip(predicted.images, found):
        regions += of_image
        controls += planted
        scores[name] = score
    # Stable: regions of one score keep the order of the images.
    regions.sort(key=lambda region: -region.score)
    return Suspects(regions, even_sample(controls, CONTROLS), scores)


# ---- files

def about(predicted: Predicted, sure: np.ndarray) -> dict:
    """What suspects.json says besides the regions: enough to open the data set again."""
    # Which models said so: apply keeps it beside the masks.
    models = []
    for folder, index in predicted.indexes.items():
        models.append(dict(folder=str(folder), run=index.get("run"), weights=index.get("weights"),
                           split=index["split"], temperature=index.get("temperature")))
    source = predicted.source
    return dict(root=str(source.root), source=source.kind,
                variant=source.description.get("variant"), reading=source.reading,
                classes=predicted.names, models=models,
                sure=dict(zip(predicted.names, np.round(sure, 4).tolist())))


def as_rows(regions: list[Region], names: list[str]) -> list[dict]:
    """For suspects.json and the page: classes by name, regions numbered from 1."""
    rows = []
    for number, region in enumerate(regions, 1):
        classes = dict(label=names[region.label], proposed=names[region.proposed])
        rows.append(dict(id=number) | region._asdict() | classes)
    return rows


def as_csv(rows: list[dict]) -> str:
    """suspects.csv: a line per region, by falling score."""
    table = [["image", "region", "top", "left", "height", "width", "pixels", "label", "proposed",
              "confidence", "score"]]
    for row in rows:
        table.append([row["image"], row["id"], *row["box"], row["pixels"], row["label"],
                      row["proposed"], row["confidence"], row["score"]])
    return csv_text(table)


def images_csv(found: Suspects) -> str:
    """images.csv: the most suspect first, by the soft minimum of their labels' probabilities."""
    regions = Counter()
    pixels = Counter()
    for region in found.regions:
        regions[region.image] += 1
        pixels[region.image] += region.pixels
    table = [["image", "score", "regions", "suspect pixels"]]
    for name, score in sorted(found.images.items(), key=lambda item: item[1]):
        table.append([name, f"{score:.6f}", regions[name], pixels[name]])
    return csv_text(table)


def surroundings(box: list[int], size: tuple[int, int]) -> list[int]:
    """A box around a region that shows what lies beside it, within an image of `size` (H, W)."""
    top, left, h, w = box
    # Without its surroundings nobody knows a roof from a car park.
    margin = max(MARGIN, max(h, w) // 2)
    bottom = min(size[0], top + h + margin)
    right = min(size[1], left + w + margin)
    top = max(0, top - margin)
    left = max(0, left - margin)
    return [top, left, bottom - top, right - left]


def sheet(predicted: Predicted, regions: list[Region]) -> plots.Picture:
    """Image, label and proposal of the first regions, and which pixels are suspect."""
    source = predicted.source
    colors = source.labels.colors
    heads = {"image": "image", "truth": "label", "prediction": "proposal", "errors": "suspect"}
    wide = plots.PANEL + 8
    titles = [plots.cell(plots.line(title, wide, 15), wide, 22) for title in heads.values()]
    parts = [plots.row(titles)]
    for number, region in enumerate(regions[:SHOWN], 1):
        image, labels = read_sample(source, region.image)
        around = part(surroundings(region.box, labels.shape))
        # As the label would be if the proposal were accepted.
        proposal = labels.copy()
        inside = from_runs(region.runs, tuple(region.box[2:]))
        proposal[part(region.box)][inside] = region.proposed
        drawn = plots.compared(image[around], labels[around], proposal[around], colors)
        cells = [plots.cell(drawn[head], wide, drawn[head].height) for head in heads]
        parts.append(plots.row(cells))
        parts.append(plots.line(
            f"{number}  {region.image}: {predicted.names[region.label]}, proposed "
            f"{predicted.names[region.proposed]}, {region.pixels} pixels, confidence "
            f"{region.confidence:.2f}", 4 * wide, 13, plots.SOFT))
    swatches = [tuple(color) for color in colors.tolist()]
    parts.append(plots.legend_of(list(zip(swatches, predicted.names)), 4 * wide))
    return plots.page(parts)
