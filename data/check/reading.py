"""How the images of a draft are to be read: which three bands, and which values become 0 and 255.

    reading, flags = draft_reading(images, train, typed, complaints)    {"bands": [1, 2, 3]}, []
"""
from pathlib import Path

from ..common import BadInput, even_sample
from ..datasets import in_threads
from ..ranges import IMAGES, percentile_range, reading_flags, some_pixels
from ..raster import Picture, open_raster
from ..tiff import Tiff, Window
from .complaints import Complaints, attempt

RANGE = "p2-98"  # of images of more than 8 bits


def draft_reading(images: list[Path], train: list[tuple[Path, Window | None]], typed: dict,
                  complaints: Complaints) -> tuple[dict, list[str]]:
    """"bands" and "input_range" where images need them, and what to type if the files do not say.

    `train`: images, each with None for its box. `typed`: both, where the flags gave them.
    """
    found = in_threads(lambda image: attempt(open_raster, image), images, "images")
    rasters = [r for r in found if not isinstance(r, BadInput)]
    reading = dict(typed)
    if "bands" not in reading:
        # Those of which three bands cannot be had without a choice.
        odd = [r for r in rasters if colours_of(r) not in (1, 3)]
        odd = [r for r in even_sample(odd, IMAGES)
               if isinstance(attempt(some_pixels, r.path, None, None), BadInput)]
        if odd and not all(begins_with_colours(r) for r in rasters):
            n = colours_of(odd[0])
            numbers = "1,2,3" if n > 2 else "1,2,2"
            complaints.error("bands", f"{odd[0].path}: {n} bands ({odd[0].photometric}), and the "
                             "file does not say which are red, green and blue; choose three, such "
                             f"as --bands {numbers}")
            return reading, ["--force", *reading_flags(None, typed.get("input_range")),
                             "--bands", numbers]
        if odd:
            reading["bands"] = [1, 2, 3]
            complaints.note("bands", f"{odd[0].path}: {colours_of(odd[0])} bands, of which the "
                            'first are red, green and blue by its header: "bands" in the draft')

    word = reading.get("input_range")
    deep = [r for r in rasters if r.dtype != "uint8" and not r.indexed]
    if deep and word is None:
        word = RANGE
    if isinstance(word, str):
        measured = attempt(percentile_range, word, train, reading.get("bands"))
        if isinstance(measured, BadInput):
            complaints.error("range", measured)
            return reading, []
        reading["input_range"], (listed, *constant) = measured
        what = f"{len(deep)} images are {deep[0].dtype}: " if deep else ""
        complaints.note("range", f'{what}{listed}; "input_range" in the draft')
        for line in constant:
            complaints.warning("range", line)
    return reading, []


def colours_of(raster: Tiff | Picture) -> int:
    """How many bands; the colours of a palette are three."""
    return 3 if raster.indexed else raster.shape[2]


def begins_with_colours(raster: Tiff | Picture) -> bool:
    """Are the first three bands red, green and blue by the header?"""
    return raster.indexed or raster.photometric in ("RGB", "RGBA", "YCbCr", "CMYK")
