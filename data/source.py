"""A segmentation data set, opened: its classes, its splits, and torch data sets of their images.

    d = Source("potsdam", "D", variant="rgb,eroded")        or Source(root="D") with D/dataset.json; Source(): demo
    d.names, d.splits, d.picks, d.reports                   classes; {split: names}; "val", "test"
    train = d.part("train", norm="imagenet", augment=f, seed=0)     x (3, H, W), y (H, W), name
"""
import hashlib
from pathlib import Path

import numpy as np

from . import demo, public
from .cache import Cache
from .common import BadInput, as_bytes, escaped, progress
from .datasets import (
    SegDataset, check_headers, check_masks, check_size, class_counts, count_ids, find_pairs,
    in_threads, load_splits, read_description, read_list, unknown_files, without_mask)
from .files import not_used
from .fingerprint import fingerprint, path_in, prints_of_run
from .io import Labels, read_valid
from .ranges import percentile_range, range_of_run
from .raster import check_kind, kinds_in
from .samplers import check_repeated, rich, share_of


class Source:
    """Everything that a script asks of a data set; faults in its files are BadInputs.

    dataset: a name of data/public.py, "folder" or "demo"; without it "folder" if there is a root, else "demo".
    split_file: a run's split.json instead of the data set's splits. val_frac: part of train to hold out.
    final: hold nothing out. bands, input_range: as in dataset.json, which they override. Of
    percentiles .reading has the numbers, and .percentiles what was asked for, such as "p2-98".
    cache: folder for decoded images, "off", or None for the usual one.
    resume: a run folder, whose split.json counts: files may have been added since.
    need: splits that must be there. need_masks=False: no image needs a mask (labels are points).
    skip_bad: leave out what cannot be read, see headline().
    """

    def __init__(self, dataset: str | None = None, root: str | Path | None = None,
                 variant: str | None = None, split_file: str | Path | None = None,
                 val_frac: float | None = None, final: bool = False,
                 bands: list[int] | None = None, input_range: list | str | None = None,
                 cache: str | None = None, resume: str | None = None, need: tuple[str, ...] = ("train", "val"),
                 need_masks: bool = True, skip_bad: bool = False):
        self.kind = dataset or ("folder" if root else "demo")
        if self.kind not in ("demo", "folder", *public.SETS):
            raise BadInput(f"--dataset {self.kind}: expected demo, folder, {', '.join(public.SETS)}")
        if self.kind != "demo" and not root:
            raise BadInput("--root is missing; type the folder that holds images, masks and "
                           "dataset.json, or a public set")
        if variant and self.kind not in public.SETS:
            raise BadInput(f"--variant {variant} goes with a public --dataset, not {self.kind}; "
                           "leave it out")
        if final and val_frac:
            raise BadInput("--final holds nothing out, --val-frac does; leave one of them out")
        if val_frac == 0 and not resume:
            raise BadInput("--val-frac 0 holds nothing out; type --final in its place")
        if resume:
            split_file, val_frac = f"{resume}/split.json", None
        if self.kind == "demo":
            root = demo.make(root or "runs/data/demo")
        self.root = Path(root).resolve()
        self.description = self.describe(variant)
        self.name = self.description["name"]
        self.labels = Labels.of(self.description)
        self.names = self.labels.names
        self.reading = dict(bands=bands or self.description.get("bands"),
                            input_range=input_range or self.description.get("input_range"))
        self.percentiles = None
        if isinstance(self.reading["input_range"], str):
            self.percentiles = self.reading["input_range"]
        self.kinds = None  # of the images of all splits, where training opens them: raster.kinds_of()
        self.cache = {} if cache == "off" else dict(cache=Cache(cache))

        # Before the splits, which complain of images that are gone, too.
        self.notes = []
        self.prints = None  # of files.json of a run that goes on
        if resume:
            self.prints, self.notes = prints_of_run(resume, self.root)
        # {name: (image, mask)} or {name: (image, mask, box)} of all images. Of a split file, images
        # beside those that it lists need no masks.
        all_needed = need_masks and not (split_file or skip_bad)
        self.pairs = find_pairs(self.root, self.description, all_needed)
        if final:
            need = tuple(split for split in need if split != "val")
        self.splits = load_splits(self.root, self.description, self.pairs, split_file, val_frac,
                                  need=need, final=final)
        if self.percentiles and resume:
            self.reading["input_range"] = range_of_run(resume)
        elif self.percentiles and "train" in need:
            self.measure_range()
        self.left_out = {}  # {name: why}
        if skip_bad:
            self.leave_out_bad(need_masks)
        used = {n: self.pairs[n] for names in self.splits.values() for n in names}
        if need_masks:
            check_masks(used, self.description)
        if "train" in need:
            self.sizes, self.kinds = check_headers(used)  # {image file: (H, W)}
        # The split that chooses the weights, and the one that is reported: the same one only where
        # there is no other with labels.
        self.picks = "select" if self.splits.get("select") else "val"
        if final:
            self.picks = None
        self.reports = next((s for s in ("test", "val", "train") if self.splits.get(s)), None)
        self.further = self.description.get("report", {})
        self.warnings = []
        if "warning" in self.description:
            self.warnings.append(self.description["warning"])
        unknown = unknown_files(self.root, self.description)
        if unknown:
            self.warnings.append(not_used(unknown))
        if val_frac and "scene" not in self.description:
            self.warnings.append('--val-frac without "scene" in dataset.json: neighbouring images '
                                 "may stand on both sides")

    def describe(self, variant: str | None) -> dict:
        """The contents of dataset.json, or those of a public set in the form that is on disk."""
        if self.kind in public.SETS:
            return public.describe(self.kind, self.root, variant)
        return read_description(self.root)

    def measure_range(self) -> None:
        """Puts numbers in the place of percentiles: those of the training images."""
        self.reading["input_range"], notes = percentile_range(
            self.percentiles, self.files("train").values(), self.reading["bands"])
        self.notes += notes

    def leave_out_bad(self, need_masks: bool) -> None:
        """Takes images and masks that cannot be read out of the splits: all are read now."""
        def fault(pair):
            image, mask = pair
            try:
                pixels, _ = read_valid(image, **self.reading)
                if mask:
                    check_size(mask, self.labels.load(mask).shape, pixels.shape[:2])
                elif need_masks:
                    return without_mask(image, self.description)
            except BadInput as e:
                return str(e)
            return None

        pair_of = {n: self.pairs[n][:2] for names in self.splits.values() for n in names}
        pairs = list(dict.fromkeys(pair_of.values()))  # tiles share theirs
        faults = dict(zip(pairs, in_threads(fault, pairs, "images")))
        self.left_out = {n: faults[pair] for n, pair in pair_of.items() if faults[pair]}
        for split, names in self.splits.items():
            self.splits[split] = [name for name in names if name not in self.left_out]
            if names and not self.splits[split]:
                raise BadInput(f"{self.left_out[names[0]]} (--skip-bad leaves nothing of {split})")

    def headline(self) -> str:
        """Name, classes and numbers of images, and a line for each note, warning and image left out."""
        sizes = ", ".join(f"{len(names)} {split}" for split, names in self.splits.items())
        lines = [f"data    {self.name}, {len(self.names)} classes, images: {sizes}"]
        lines += [f"        {line}" for line in self.notes]
        lines += [f"        WARNING {line}" for line in self.warnings]
        for why in dict.fromkeys(self.left_out.values()):
            lines.append(f"        left out: {escaped(why)}")
        return "\n".join(lines)

    def files(self, split: str) -> dict[str, tuple]:
        """{name: (image, mask)} of a split, with a box as third entry where names are tiles."""
        return {name: self.pairs[name] for name in self.splits[split]}

    def check_kinds(self, split: str, meta: dict, run: str = "the run") -> None:
        """BadInput where an image of a split is of no kind that a run's data set had: check_kind()."""
        if self.kinds and kinds_in(meta).issuperset(map(tuple, self.kinds)):
            return  # The headers have been read: all are of such a kind.
        images = list(dict.fromkeys(image for image, *_ in self.files(split).values()))
        in_threads(lambda image: check_kind(image, meta, run), images, "headers")

    def size(self, image: Path, mask: Path, *box: tuple) -> tuple[int, int]:
        """(H, W) of a pair of a split that training opened, or of its box."""
        return box[0][2:] if box else self.sizes[image]

    def sizes_of(self, split: str) -> list[tuple[int, int]]:
        """(H, W) of every image of a split that training opened, or of its box."""
        return [self.size(*pair) for pair in self.files(split).values()]

    def part(self, split: str, norm: str, augment=None, seed: int = 0,
             names: list[str] | None = None) -> SegDataset:
        """The images of a split, or those of `names`, normalised; augment(image, mask, rng) sees uint8 arrays."""
        files = self.files(split)
        if names is not None:
            files = {name: self.pairs[name] for name in names}
        return SegDataset(files, self.labels, norm, augment, seed, **self.cache, **self.reading)

    def count(self, limit: int | None) -> np.ndarray:
        """(N, K + 1) pixels per training mask, ignored ones last: of all of them, or of `limit` evenly spread.

        A bad mask in any split is a BadInput now, not hours later.
        """
        counts = class_counts(self.files("train"), self.labels, limit)
        for split in self.splits:
            if split != "train":
                class_counts(self.files(split), self.labels, limit or 64)
        if not counts[:, :-1].any():
            raise BadInput(f"{self.root}: no labelled pixel in the training masks; correct "
                           '"ignore" in dataset.json')
        return counts

    def names_to_repeat(self, wanted: str, resume: str | None = None) -> list[str]:
        """--replicate: training names, one for each further time, from a file; or "5%", full of a rare class.

        resume: a run folder, whose replicated.txt counts.
        """
        names = self.splits["train"]
        share = share_of(wanted)
        if resume or share is None:
            file = Path(resume) / "replicated.txt" if resume else Path(wanted)
            listed = read_list(file, self.files("train"))
        else:
            counts = self.count_as_read("train")
            rare = rare_classes(counts)
            if not rare:
                raise BadInput("--replicate: no class is rare in the training images; leave it out, or name "
                               "a file that lists some")
            listed = [names[i] for i in rich(counts, rare, share)]
        if not resume:  # A run that was begun before there was this check goes on.
            check_repeated(names, listed)
        return listed

    def count_as_read(self, split: str) -> np.ndarray:
        """(N, K) pixels per image as training reads it: tiles one by one, transparent pixels left out."""
        data = self.part(split, "imagenet")
        images = progress(range(len(data)), f"{split} masks")
        return np.stack([count_ids(data.read(i)[1], len(self.names))[:-1] for i in images])

    def used(self, split: str) -> list[Path]:
        """Images and masks of a split, a file once for each of its tiles."""
        found = []
        for image, mask, *_ in self.files(split).values():
            found += [image, mask] if mask else [image]
        return found

    def fingerprint(self) -> dict:
        """Of the images and masks of all splits, for a run's files.json."""
        if self.prints is None:
            used = sum(map(self.used, self.splits), [])
            self.prints = fingerprint(self.root, used)
        return self.prints

    def hashes(self, split: str) -> dict[str, str]:
        """{path in root: hash} of the images and masks of a split."""
        names = {path_in(self.root, file) for file in self.used(split)}
        prints = self.fingerprint()["files"]
        return {name: prints[name].rsplit(" ", 1)[1] for name in sorted(names)}

    def about(self) -> dict:
        """What a run's files say of its data: enough to open it again, and to tell other splits from these."""
        splits = {split: hashlib.sha256(as_bytes("\n".join(names))).hexdigest()[:16]
                  for split, names in self.splits.items()}
        return dict(classes=self.labels.classes, ignore=self.labels.ignore,
                    threshold=self.labels.threshold, dataset=self.name,
                    root=str(self.root), source=self.kind, variant=self.description.get("variant"),
                    chosen_on=self.picks, reported=self.reports, reading=self.reading,
                    percentiles=self.percentiles, kinds=self.kinds,
                    report=self.further, splits=splits)


def rare_classes(counts: np.ndarray) -> list[int]:
    """Pixels (N, K) -> the classes with less than half of an equal share, absent ones left out."""
    pixels = counts.sum(0)
    few = pixels.sum() / (2 * len(pixels))
    return [c for c, n in enumerate(pixels) if 0 < n < few]
