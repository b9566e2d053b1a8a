"""Which classes are where: pixels per image, split and set; images by the share of a class.

    counted = count_classes(source)               a row per image
    tables = csv_table(counted), summary(counted), chart(counted)
    splits, removed = without(counted, "water", 0.5)    train without images of more than 50 % water
    names = with_at_least(counted, ["pool"], 0.05)      training images to show more often
"""
from typing import NamedTuple

import numpy as np
from PIL import ImageDraw

from .. import plots
from ..common import BadInput, csv_text, nfc
from ..datasets import count_ids, in_threads
from ..raster import part_of
from ..samplers import rich
from ..source import Source, rare_classes

BAR = 320  # pixels of a share of 1
HIGH = 12  # of a bar


class Counted(NamedTuple):
    """Pixels of each class in each image, by the masks: rows (N, K + 1) with ignored ones last."""
    source: Source
    images: list[str]
    splits: dict[str, str]  # {image: its split}
    rows: np.ndarray

    def of_split(self, split: str) -> np.ndarray:
        """(n, K + 1) rows of its images."""
        chosen = [i for i, name in enumerate(self.images) if self.splits[name] == split]
        return self.rows[chosen]


def count_classes(source: Source) -> Counted:
    """Of all images that are in a split and have a mask."""
    splits = {}
    for split, names in source.splits.items():
        splits |= dict.fromkeys((n for n in names if source.pairs[n][1]), split)
    if not splits:
        raise BadInput(f"{source.root}: no image with a mask is in a split; nothing to count")
    k = len(source.names)
    # Each mask is read once, however many tiles are cut from it.
    members = {}  # {mask: images}; tiles share one
    for name in splits:
        mask = source.pairs[name][1]
        members.setdefault(mask, []).append(name)

    def count(mask):
        ids = source.labels.load(mask)
        return [count_ids(part_of(ids, *source.pairs[name][2:]), k) for name in members[mask]]

    found = {}
    for names, rows in zip(members.values(), in_threads(count, list(members), "masks")):
        found |= zip(names, rows)
    return Counted(source, list(splits), splits, np.stack([found[name] for name in splits]))


def shares_of(pixels: np.ndarray) -> np.ndarray:
    """(..., K + 1) pixels -> (..., K) shares of the labelled ones; 0 where nothing is labelled."""
    classes = pixels[..., :-1]
    # Ignored pixels are no part of the whole: shares add up to 1.
    return classes / np.maximum(classes.sum(-1, keepdims=True), 1)


# ---- what stats writes

def csv_table(counted: Counted) -> str:
    """shares.csv: an image a line."""
    table = [["image", "split", *counted.source.names, "ignored pixels", "pixels"]]
    for name, row, share in zip(counted.images, counted.rows, shares_of(counted.rows)):
        digits = [f"{v:.6f}" for v in share]
        table.append([name, counted.splits[name], *digits, row[-1], row.sum()])
    return csv_text(table)


def by_name(counted: Counted, values: np.ndarray) -> dict:
    """{class: its value} of K values."""
    return dict(zip(counted.source.names, values.tolist()))


def summary(counted: Counted) -> dict:
    """stats.json: shares per split and of all, images where two classes meet, rare classes."""
    # Does the class occur in the image? int64, for the product below.
    there = (counted.rows[:, :-1] > 0).astype(np.int64)
    splits = {}
    for split in dict.fromkeys(counted.splits.values()):
        rows = counted.of_split(split)
        splits[split] = dict(images=len(rows), pixels=by_name(counted, rows.sum(0)[:-1]),
                             ignored=int(rows[:, -1].sum()),
                             shares=by_name(counted, shares_of(rows.sum(0)).round(6)),
                             images_with=by_name(counted, (rows[:, :-1] > 0).sum(0)))
    rare = {}
    for c in rare_classes(counted.rows[:, :-1]):
        most_first = np.argsort(-counted.rows[:, c], kind="stable")[:there[:, c].sum()]
        rare[counted.source.names[c]] = [counted.images[i] for i in most_first]
    together = {}
    # (K, N) @ (N, K): in how many images both classes occur.
    for name, row in zip(counted.source.names, there.T @ there):
        together[name] = by_name(counted, row)
    return dict(dataset=counted.source.name, root=str(counted.source.root),
                shares=by_name(counted, shares_of(counted.rows.sum(0)).round(6)),
                splits=splits, images_with_both=together, images_of_rare_classes=rare)


def chart(counted: Counted) -> plots.Picture:
    """A bar per class and split: the share of the labelled pixels."""
    splits = list(dict.fromkeys(counted.splits.values()))
    shares = [shares_of(counted.of_split(split).sum(0)) for split in splits]
    colors = dict(zip(splits, plots.BRIGHT))
    parts = [plots.line(f"{counted.source.name}: share of the labelled pixels", 600, 18),
             plots.legend_of([(color, split) for split, color in colors.items()], 600)]
    for c, name in enumerate(counted.source.names):
        bars = plots.blank(BAR + 80, len(splits) * (HIGH + 2))
        draw = ImageDraw.Draw(bars)
        for i, split in enumerate(splits):
            y = i * (HIGH + 2)
            share = shares[i][c]
            long = round(BAR * share)
            draw.rectangle((0, y, long, y + HIGH - 1), colors[split])
            plots.write_at(bars, long + 6, y + HIGH // 2, f"{share:.2%}", "lm", 11)
        title = plots.cell(plots.line(name, 180), 190, bars.height)
        parts.append(plots.row([title, bars]))
    return plots.page(parts)


# ---- lists of images

def class_numbers(counted: Counted, names: list[str]) -> list[int]:
    """Numbers of classes by their names."""
    known = [nfc(name) for name in counted.source.names]
    for name in names:
        if nfc(name) not in known:
            raise BadInput(f"--class {name}: no class of {counted.source.root}; there are "
                           f"{', '.join(known)}")
    return [known.index(nfc(name)) for name in names]


def without(counted: Counted, name: str, limit: float
            ) -> tuple[dict[str, list[str]], dict[str, float]]:
    """The splits without training images of which the class is more than `limit`; their shares."""
    # Val and test are left alone: their scores must stay comparable.
    c, = class_numbers(counted, [name])
    shares = shares_of(counted.rows)[:, c]
    removed = {}
    for image, share in zip(counted.images, shares.tolist()):
        if counted.splits[image] == "train" and share > limit:
            removed[image] = round(share, 6)
    kept = [image for image in counted.source.splits["train"] if image not in removed]
    if not kept:
        raise BadInput(f"--at-most {limit:.0%} of {name}: no training image is left; type a higher "
                       "share")
    return counted.source.splits | {"train": kept}, removed


def with_at_least(counted: Counted, names: list[str], share: float) -> list[str]:
    """Training images in which one of the classes has at least `share` of the labels."""
    # Only training images are ever repeated.
    train = [image for image in counted.images if counted.splits[image] == "train"]
    rows = counted.of_split("train")[:, :-1]
    found = [train[i] for i in rich(rows, class_numbers(counted, names), share)]
    if not found:
        raise BadInput(f"no training image has {share:.1%} of {', '.join(names)}; type a lower "
                       "share")
    return found
