"""A page by which a person decides about suspect regions, in a browser and without a server.

    page = page_of(read_suspects("O/suspects.json"), source, limit=500, controls=20, seed=0)
    write("O/review.html", html(page))

Regions and controls come in random order, and for each it is drawn which of label and proposal is
called A, so that nobody can simply trust one of them. Controls have a label that was altered here:
answers to them tell how often the reviewer errs. review.js is what the page does.
"""
import base64
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from ..common import BadInput, file_sha256, read_json
from ..datasets import in_threads
from ..io import color_text, id_image
from ..source import Source
from .predicted import read_sample
from .regions import check_region, from_runs, part
from .suspects import surroundings

FOLDER = Path(__file__).parent
LARGEST = 512  # longer side of a picture: larger surroundings are shown smaller
KEPT = ("root", "source", "variant", "reading", "classes", "models")  # of suspects.json


def read_suspects(path: str | Path) -> dict:
    """What suspects.json holds; one of another program is a BadInput."""
    found = read_json(path)
    for key in ("root", "classes", "models", "regions", "controls"):
        if key not in found:
            raise BadInput(f"{path}: no {key!r}; expected a suspects.json that python -m "
                           "data.curate suspects has written")
    for row in [*found["regions"], *found["controls"]]:
        check_region(row, path, proposed=str)
        for name in (row["label"], row["proposed"]):
            if name not in found["classes"]:
                raise BadInput(f"{path}: region {row['id']} has the class {name!r}, which is not "
                               'in "classes"; search suspects again')
    return found | {"sha256": file_sha256(path)}


def page_of(suspects: dict, source: Source, limit: int, controls: int, seed: int) -> dict:
    """All that the page shows: the `limit` most suspect regions and so many controls, shuffled."""
    # By score, the reviewer would soon learn that the first ones are always wrong.
    rng = np.random.default_rng(seed)
    regions = [dict(region, control=False) for region in suspects["regions"][:limit]]
    planted = [dict(region, control=True) for region in suspects["controls"]]
    # Which controls, their places and sides depend on the seed alone.
    chosen = rng.permutation(len(planted))[:controls]
    items = regions + [planted[i] for i in chosen]
    items = [items[i] for i in rng.permutation(len(items))]
    # Half of them each, so that a reviewer who always says A is right half of the time.
    for item, side in zip(items, rng.permutation(len(items)) % 2):
        item["labelIs"] = "ab"[side]
    # Cut out here: the browser needs no other file. Each image is read once, since a large one
    # takes seconds.
    by_image = {}
    for item in items:
        by_image.setdefault(item["image"], []).append(item)
    in_threads(lambda group: add_pictures(group, source), list(by_image.values()), "images")

    about = {key: suspects.get(key) for key in KEPT}
    about |= {"suspects": suspects["sha256"], "seed": seed}
    # The name under which a browser keeps progress: another page must not take it over.
    drawn = json.dumps([suspects["sha256"], limit, controls, seed])
    colors = [color_text(color) for color in source.labels.colors]
    return dict(
        key="nanors-review-" + hashlib.sha256(drawn.encode()).hexdigest()[:16],
        about=about, classes=source.names, colors=dict(zip(source.names, colors)),
        ignore=source.labels.void is not None, items=items)


def add_pictures(items: list[dict], source: Source) -> None:
    """To each region of one image its surroundings: image, and labels A and B, as data URLs."""
    name = items[0]["image"]
    if name not in source.pairs:
        raise BadInput(f"{source.root}: no image {name!r}, which is in suspects.json; search "
                       "suspects again")
    image, labels = read_sample(source, name)
    for item in items:
        # Regions are boxes in the image, with runs of pixels inside of the box.
        size = tuple(item["box"][2:])
        inside = from_runs(item["runs"], size)
        place = part(item["box"])
        label, proposed = (source.names.index(item[key]) for key in ("label", "proposed"))
        there = proposed if item["control"] else label  # the label of a control is altered here
        if labels[place].shape != size or not (labels[place][inside] == there).all():
            raise BadInput(f"{source.pairs[name][1]}: other labels than when suspects were "
                           "searched; search them again: python -m data.curate suspects")
        around = surroundings(item["box"], labels.shape)
        urls = {"picture": picture_url(image[part(around)])}
        by_class = {"label": label, "proposed": proposed}
        other = "b" if item["labelIs"] == "a" else "a"
        # The same surroundings in both: only the region differs.
        for layer, key in ((item["labelIs"], "label"), (other, "proposed")):
            labels[place][inside] = by_class[key]
            urls[layer] = mask_url(labels[part(around)], source.labels.colors)
        labels[place][inside] = there  # as it was, for the next region
        item.update(urls, around=around)


def picture_url(pixels: np.ndarray) -> str:
    """(h, w, 3) -> a JPEG as text."""
    return data_url(shrunk(Image.fromarray(pixels)), "JPEG", quality=90)


def mask_url(ids: np.ndarray, colors: np.ndarray) -> str:
    """(h, w) ids -> a PNG in the classes' colours as text; ignored pixels are transparent."""
    return data_url(shrunk(id_image(ids, colors)), "PNG", transparency=255, optimize=True)


def shrunk(picture: Image.Image) -> Image.Image:
    """No larger than LARGEST."""
    scale = LARGEST / max(picture.size)
    if scale >= 1:
        return picture
    wide, high = (max(1, round(scale * side)) for side in picture.size)
    # Class ids must not be mixed; colours of the image should be.
    return picture.resize((wide, high), Image.NEAREST if picture.mode == "P" else Image.BOX)


def data_url(picture: Image.Image, kind: str, **options) -> str:
    """A picture file as text."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def html(page: dict) -> str:
    """The whole page in one file."""
    # A class may be called </script>: within JSON these signs may also be written as numbers.
    data = json.dumps(page)
    for sign in "<>&":
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    # One file can be mailed to a reviewer, and opens where there is no network.
    text = (FOLDER / "review.html").read_text("utf-8")
    script = (FOLDER / "review.js").read_text("utf-8")
    before, between, after = re.split("@DATA@|@SCRIPT@", text)
    return before + data + between + script + after
