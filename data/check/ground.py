"""Images of different splits that show the same ground, by the georeference of their headers."""
from collections import defaultdict
from pathlib import Path

import numpy as np

from ..raster import open_raster
from ..tiff import Tag
from .complaints import Complaints, attempt

SHARED = 0.01  # of the smaller image: neighbours may share an edge


def footprint(path: Path) -> tuple | None:
    """(coordinate system, west, south, east, north) of an image; None without, or if turned."""
    raster = open_raster(path)
    place = raster.georef
    if place is None or place.transform[1] or place.transform[3]:
        return None
    h, w = raster.shape[:2]
    dx, _, west, _, dy, north = place.transform  # dy is negative: rows go south
    system = place.keys.get(Tag.GeoKeyDirectory)
    return system, west, north + h * dy, west + w * dx, north


def check_ground(pairs: dict, homes: dict[str, list[str]], complaints: Complaints) -> None:
    """A test on ground that was trained on is not independent. `homes`: {name: its splits}."""
    systems = defaultdict(list)  # coordinates compare within one system only
    for n, (image, _) in pairs.items():
        place = attempt(footprint, image) if homes[n] else None
        if isinstance(place, tuple):
            system, *box = place
            systems[system].append((n, box))

    shared = []
    for places in systems.values():
        names = [n for n, _ in places]
        boxes = np.array([box for _, box in places])
        splits = np.array([homes[n][0] for n in names])
        shared += overlaps(names, boxes, splits)
    if shared:
        part, a, b = max(shared)
        complaints.warning("ground", f"{len(shared)} pairs of images in different splits show the "
                           f"same ground, such as {a} ({homes[a][0]}) and {b} ({homes[b][0]}), "
                           f"{part:.0%} of the smaller: the scores say little about new ground")


def overlaps(names: list[str], boxes: np.ndarray, splits: np.ndarray) -> list[tuple]:
    """[(shared part of the smaller, name, name)] of boxes (N, 4) in different splits."""
    found = []
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    for i, box in enumerate(boxes):
        common = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
        part = common.clip(0).prod(1) / np.minimum(area, area[i])
        part[:i + 1] = 0  # each pair once
        part[splits == splits[i]] = 0
        for j in np.flatnonzero(part > SHARED):
            found.append((part[j], names[i], names[j]))
    return found
