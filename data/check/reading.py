"""How the images of a draft are to be read: which three bands, and which values become 0 and 255.

    reading, flags = draft_reading(images, train, typed, complaints)    {"bands": [1, 2, 3]}, []
"""
import shlex
from pathlib import Path

from ..common import BadInput, even_sample
from ..datasets import in_threads
from ..ranges import IMAGES, percentile_range, reading_flags, some_pixels
from ..raster import Picture, open_raster
from ..tiff import Tiff
from .complaints import Complaints, attempt

RANGE = "p2-98"  # of images of more than 8 bits


def draft_reading(images: list[Path], train: list[tuple], typed: dict,
                  complaints: Complaints) -> tuple[dict, list[str]]:
    """"bands" and "input_range" where images need them, and what to type if the files do not say.

    `train`: files as of percentile_range(). `typed`: both, where the flags gave them.
    """
    found = in_threads(lambda image: attempt(open_raster, image), images, "images")
    rasters = [r for r in found if not isinstance(r, BadInput)]
    faults = [fault for fault in found if isinstance(fault, BadInput)]
    for fault in faults:
        complaints.error("image", fault)
    reading = dict(typed)
    # What is corrected in images is drafted anew: it may change how all of them are read.
    anew = ["--force", *reading_flags(typed.get("bands"), typed.get("input_range"))]
    if "bands" not in reading:
        reading["bands"], numbers = draft_bands(rasters, complaints)
        if reading["bands"] is None:
            del reading["bands"]
        if numbers:
            return reading, [*anew, "--bands", numbers]

    # A grey image among those of more bands has not all that are read.
    bands = reading.get("bands")
    few = [r for r in rasters if bands and colours_of(r) < max(bands)]
    if few:
        complaints.error("bands", too_few(few, bands))
        faults += few

    # Then the values: no one range fits bytes beside other numbers.
    word = reading.get("input_range")
    deep = [r for r in rasters if r.dtype != "uint8" and not r.indexed]
    kinds = kinds_of(rasters)
    if len(kinds) > 1 and not isinstance(word, list):
        complaints.error("kinds", one_range(kinds))
        return reading, anew
    if deep and word is None:
        word = RANGE
    if isinstance(word, str):
        measured = attempt(percentile_range, word, train, reading.get("bands"))
        if isinstance(measured, BadInput):
            complaints.error("range", measured)
            return reading, anew
        reading["input_range"], (listed, *constant) = measured
        what = f"{len(deep)} images are {deep[0].dtype}: " if deep else ""
        complaints.note("range", f'{what}{listed}; "input_range" in the draft')
        for line in constant:
            complaints.warning("range", line)
    return reading, anew if faults else []


def draft_bands(rasters: list[Tiff | Picture], complaints: Complaints
                ) -> tuple[list[int] | None, str | None]:
    """The three to read if the headers say which, else None; and what to type if nothing does."""
    # Images of which three bands cannot be had without a choice.
    odd = [r for r in rasters if colours_of(r) not in (1, 3)]
    odd = [r for r in even_sample(odd, IMAGES)
           if isinstance(attempt(some_pixels, r.path, None, None), BadInput)]
    if not odd:
        return None, None
    path, n, alpha = odd[0].path, colours_of(odd[0]), odd[0].alpha
    if not all(begins_with_colours(r) for r in rasters):
        numbers = "1,2,3" if n > 2 else "1,2,2"
        complaints.error("bands", f"{path}: {n} bands ({odd[0].photometric}), and the file does "
                         "not say which are red, green and blue; choose three, such as "
                         f"--bands {numbers}")
        return None, numbers
    # An alpha that is a mask would have been left out. Programs write infrared as alpha, too.
    veil = ""
    if alpha:
        veil = (f"; band {alpha} is called alpha, but is no mask of transparent and opaque pixels "
                "alone: it hides none")
    complaints.note("bands", f"{path}: {n} bands, of which the first are red, green and blue by "
                             f'its header: "bands" in the draft{veil}')
    return [1, 2, 3], None


def too_few(few: list[Tiff | Picture], bands: list[int]) -> str:
    """The line about images that lack a band which the others have."""
    path, n = few[0].path, colours_of(few[0])
    advice = "take them out"
    if n == 1:
        command = shlex.join(["gdal_translate", *["-b", "1"] * max(bands), str(path), "NEW.tif"])
        advice += f", or put a copy of its grey in each band: {command}"
    return (f"{path}: {n} bands, and number {max(bands)} of the others is read ({len(few)} such "
            f"images); {advice}")


def kinds_of(rasters: list[Tiff | Picture]) -> dict[str, list[Tiff | Picture]]:
    """Images by what their numbers may mean: no range fits bytes, more bits and floats at once."""
    kinds = {}
    for r in rasters:
        kind = "8 bits" if r.indexed or r.dtype == "uint8" else "whole numbers of more bits"
        if r.dtype.kind == "f":
            kind = "floats"
        kinds.setdefault(kind, []).append(r)
    return kinds


def one_range(kinds: dict[str, list[Tiff | Picture]]) -> str:
    """The line that says which images are of which kind, and how to make them alike."""
    listed = ", ".join(f"{len(rasters)} of {kind}, first {rasters[0].path}"
                       for kind, rasters in kinds.items())
    kind = next(kind for kind in kinds if kind != "8 bits")
    path = kinds[kind][0].path
    command = shlex.join(["gdal_translate", "-ot", "Byte", "-scale", "LOW", "HIGH", "0", "255",
                          str(path), "NEW.tif"])
    return (f"images that no one range fits: {listed}; keep those of one kind, or put 8 bits in "
            f"place of the others: {command}")


def colours_of(raster: Tiff | Picture) -> int:
    """How many bands; the colours of a palette are three."""
    return 3 if raster.indexed else raster.shape[2]


def begins_with_colours(raster: Tiff | Picture) -> bool:
    """Are the first three bands red, green and blue by the header?"""
    return raster.indexed or raster.photometric in ("RGB", "RGBA", "YCbCr", "CMYK")
