"""Several data sets as one, under one list of classes: images are linked, masks are written anew.

    classes, tables = merged_classes(sources, read_map("map.json", sources))
    for item in items_of(source): link(item.image, out / "images" / item.place) ...

map.json: {"potsdam": {"low vegetation": "grass", "clutter": null}, "dubai": {"tree": "grass"}}
by names of sets and classes; null is ignored, a class that is not named keeps its name.
"""
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..common import IGNORE, BadInput, nfc, read_json
from ..files import is_image
from ..io import color_text
from ..source import Source
from .masks import beside
from .predicted import curate_command
from .tiles import folders_of

Map = dict[str, dict[str, str | None]]
READING = ("bands", "input_range")  # of dataset.json: how images are read


class Item(NamedTuple):
    """An image of a set: its files, its split, and SET/SCENE/NAME.SUFFIX in the merged one."""
    image: Path
    mask: Path
    split: str
    place: str


def read_map(path: str | Path | None, sources: list[Source]) -> Map:
    """{set: {its class: class of the merged set, or None}}, with an entry for every class."""
    given = read_json(path, dict[str, dict], "{set: {class: class}}") if path else {}
    sets = [source.name for source in sources]
    # Names of sets are names of folders in the merged one.
    if len(set(sets)) < len(sets):
        raise BadInput(f"sets of the names {', '.join(sets)}; give each its own \"name\" in its "
                       "dataset.json")
    unknown = given.keys() - set(sets)
    if unknown:
        raise BadInput(f"{path}: no set {min(unknown)!r}; there are {', '.join(sets)}")
    found = {}
    for source in sources:
        # A class that the map leaves out keeps its name.
        own = {nfc(name): nfc(name) for name in source.names}
        for name, to in given.get(source.name, {}).items():
            if nfc(name) not in own:
                raise BadInput(f"{path}: {source.name} has no class {name!r}; it has "
                               f"{', '.join(own)}")
            if not isinstance(to, str | None):
                raise BadInput(f"{path}: {name!r} becomes {to!r}; expected the name of a class, or "
                               "null for ignored")
            own[nfc(name)] = to and nfc(to)
        found[source.name] = own
    return found


def merged_classes(sources: list[Source], class_map: Map) -> tuple[list[dict], list[np.ndarray]]:
    """"classes" of the merged dataset.json, and (256,) uint8 per set: its ids -> the merged."""
    colors = {}  # of each merged class, as the first set that has it shows it
    for source in sources:
        for i, to in enumerate(class_map[source.name].values()):
            if to is not None:
                colors.setdefault(to, color_text(source.labels.colors[i]))
    names = list(colors)
    tables = []
    for source in sources:
        # Read by id of the set: table[ids] are the merged ids, and what is ignored stays so.
        table = np.full(256, IGNORE, np.uint8)
        for i, to in enumerate(class_map[source.name].values()):
            if to is not None:
                table[i] = names.index(to)
        tables.append(table)
    classes = [dict(name=name, id=i, color=color) for i, (name, color) in enumerate(colors.items())]
    if not classes:
        raise BadInput("all classes are ignored; name at least one in the map")
    return classes, tables


def check_alike(sources: list[Source]) -> None:
    """BadInput where one description cannot say how the images of all sets are read."""
    first = sources[0]
    for source in sources:
        for key in READING:
            ours, theirs = first.description.get(key), source.description.get(key)
            # A missing entry is a difference, too: then it is 8 bits here and a range there.
            if ours != theirs:
                raise BadInput(f"{source.root}: {key!r} is {theirs}, and {ours} in {first.root}; "
                               "one dataset.json cannot say both: convert the images of one set")
        if "tiles" in source.description:
            raise BadInput(f"{source.root}: has \"tiles\"; cut them first: "
                           f"{curate_command('tile')} {source.root} --out FOLDER")


def items_of(source: Source) -> list[Item]:
    """All images that are in a split and have a mask."""
    folders = folders_of(source)
    items = []
    for split, names in source.splits.items():
        for name in names:
            image, mask = source.pairs[name]
            if mask is None:
                continue
            if not is_image(image):
                raise BadInput(f"{image}: expected a file that ends like an image, such as .png or "
                               ".tif; convert it")
            # Two sets may both have a 1.png.
            place = f"{source.name}/{folders[image]}{image.suffix}"
            items.append(Item(image, mask, split, place))
    return items


def link(image: Path, place: Path) -> None:
    """`place` stands for the image, and so do the files beside it, such as its world file."""
    place.parent.mkdir(parents=True, exist_ok=True)
    pairs = [(image, place)]
    # a.tfw and a.tif.msk belong to a.tif: they follow the name of the link.
    for file in beside(image):
        ending = file.name.removeprefix(image.name).removeprefix(image.stem)
        kept = place.name if file.name.startswith(image.name) else place.stem
        pairs.append((file, place.with_name(kept + ending)))
    for file, new in pairs:
        # Typed again, it finds its own links.
        if new.is_symlink() and os.readlink(new) == str(file):
            continue
        if os.path.lexists(new):
            raise BadInput(f"{new}: is in the way of a link to {file}; name another --out")
        new.symlink_to(file)


def description_of(name: str, first: Source, classes: list[dict], splits: list[str]) -> dict:
    """dataset.json of the merged set, whose splits are listed in SPLIT.txt."""
    # What all sets agree about, see check_alike().
    kept = {key: first.description[key] for key in READING if key in first.description}
    return {"name": name, "images": "images/**/*", "masks": "masks/**/*.png", "classes": classes,
            "ignore": [IGNORE], "scene": "images/([^/]*/[^/]*)/",
            "splits": {split: f"{split}.txt" for split in splits}, **kept}
