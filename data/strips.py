"""An image of any size read from top to bottom: a TIFF by strips, so that it never is in memory.

    scene = Strips("scene.tif", bands=[4, 1, 2], input_range=[0, 3000])  # checks the file
    image, valid = scene.read(0, 512)  # rows 0..511: (512, W, 3) uint8, (512, W) bool or None
    scene.columns(0, 10240)            # from now on only these columns
    small = scene.thinned(8)           # every 8th pixel of every 8th row

read() unpacks each strip or tile of a TIFF once, as long as rows are asked for in rising order.
"""
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .io import is_mask_band, read_valid
from .raster import AS_MASK, open_raster, part_of
from .tiff import Tiff, Window

MANY_ROWS = 256  # at least so many are read at once
HEAVY = 2**28  # bytes of one strip, unpacked: above, a note says how to convert the file


class Strips:
    """Rows of an image, of all columns or of some. shape: (H, W). georef: where it lies, or None.

    notes: lines for the user: that reading takes much memory, that alpha is no mask, what to type.
    reading: bands and input_range of read_valid(). A file that cannot be read is a BadInput; a TIFF
    that ends too early is one at once, not when the missing rows are asked for.
    """

    def __init__(self, path: str | Path, **reading):
        self.path = Path(path)
        self.reading = reading
        raster = open_raster(path)
        self.shape = raster.shape[:2]
        self.georef = raster.georef
        self.is_tiff = isinstance(raster, Tiff)
        self.raster = raster
        self.notes = []
        self.whole = None  # of a picture all pixels, and which of them are data
        if self.is_tiff:
            self.georef = self.georef or raster.position  # tie points alone give no transform
            raster.check_whole()
            self.step = rows_at_once(raster)
            self.notes = about_strips(raster)
        else:
            self.whole = read_valid(path, **reading)
        self.alpha_is_mask = None
        bands = reading.get("bands") or []
        # Of a picture without named bands read_valid() has looked at alpha.
        if raster.alpha and raster.alpha not in bands and (self.is_tiff or bands):
            # By the whole band: a window of an infrared band may hold nothing but 0 and 255.
            if self.is_tiff:
                strips = alpha_strips(raster, self.step)
            else:
                strips = [raster.read(bands=[raster.alpha])]
            self.alpha_is_mask = all(map(is_mask_band, strips))
            if not self.alpha_is_mask:
                self.notes.append(f"{path}: alpha is more than 0 and 255, so it hides no pixel; a "
                                  f"mask with soft edges: {AS_MASK}")
        self.columns(0, self.shape[1])

    def columns(self, left: int, width: int) -> None:
        """read() returns these from now on."""
        self.left, self.width = left, width
        # What read() has last unpacked: rows start..end, their pixels, which of them are data.
        self.kept = 0, 0, np.zeros((0, width, 3), np.uint8), None

    def read(self, top: int, height: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(height, width, 3) uint8 and (height, width) bool, or None where all pixels are data."""
        if self.whole is not None:
            image, valid = self.whole
            window = top, self.left, height, self.width
            return part_of(image, window), None if valid is None else part_of(valid, window)
        start, end, image, valid = self.kept
        if not start <= top <= end:  # a jump: nothing that is kept is of use
            start = end = top
            image, valid = image[:0], None
        if top + height > end:
            # Rows above `top` are not asked for again. Read on to the end of a strip or tile.
            stop = min(-(-(top + height) // self.step) * self.step, self.shape[0])
            window = end, self.left, stop - end, self.width
            more, more_valid = self.unpack(window)
            if valid is not None or more_valid is not None:
                valid = np.concatenate([everywhere(valid, image)[top - start:],
                                        everywhere(more_valid, more)])
            image = np.concatenate([image[top - start:], more])
            start = top
            self.kept = start, stop, image, valid
        rows = slice(top - start, top - start + height)
        return image[rows], None if valid is None else valid[rows]

    def unpack(self, window: Window) -> tuple[np.ndarray, np.ndarray | None]:
        """read_valid() of a window of a TIFF, some tiles at a time."""
        top, left, height, width = window
        # Where the file has no tile all pixels are as one of them, and cost next to nothing.
        spans, empty = self.raster.spans(window)
        if empty is None and len(spans) == 1:
            return self.read_valid(window)
        image = np.empty((height, width, 3), np.uint8)
        valid = None
        if empty is not None:
            pixel, is_data = self.read_valid((*empty, 1, 1))
            image[:] = np.tile(pixel[0], (width, 1))  # a row: ten times as fast as the pixel
            valid = None if is_data is None else np.full((height, width), is_data[0, 0])
        for start, wide in spans:
            columns = slice(start - left, start - left + wide)
            image[:, columns], seen = self.read_valid((top, start, height, wide))
            # A file marks pixels everywhere or nowhere.
            if seen is not None:
                valid = np.empty((height, width), bool) if valid is None else valid
                valid[:, columns] = seen
        return image, valid

    def read_valid(self, window: Window) -> tuple[np.ndarray, np.ndarray | None]:
        return read_valid(self.path, **self.reading, window=window,
                          alpha_is_mask=self.alpha_is_mask)

    def thinned(self, n: int) -> np.ndarray:
        """Every n-th pixel of every n-th row of all columns."""
        self.columns(0, self.shape[1])
        if self.whole is not None:
            return self.whole[0][::n, ::n]
        parts = []
        for top in range(0, self.shape[0], self.step):
            rows = min(self.step, self.shape[0] - top)
            first = -top % n  # the first row of these that counts
            if first < rows:
                parts.append(self.read(top, rows)[0][first::n, ::n].copy())
        return np.concatenate(parts)


def rows_at_once(raster: Tiff) -> int:
    """Whole strips or tiles of at least MANY_ROWS rows, so that none is unpacked twice."""
    rows = raster.block[0]
    if raster.compression == "none":
        rows = min(rows, MANY_ROWS)  # any row can be read by itself
    return -(-MANY_ROWS // rows) * rows


def about_strips(raster: Tiff) -> list[str]:
    """A note on a file whose strips fill the memory: they are unpacked from their start."""
    rows, width = raster.block
    size = rows * width * raster.shape[2] * raster.dtype.itemsize
    if raster.page.tiled or raster.compression == "none" or size < HEAVY:
        return []
    advice = raster.page.gdal_translate("-co TILED=YES -co BIGTIFF=IF_SAFER ")
    return [f"{raster.path}: strips of {rows} rows, which are unpacked as a whole: about "
            f"{4 * size / 1e9:.1f} GB of memory; tiles take little: {advice}"]


def everywhere(valid: np.ndarray | None, image: np.ndarray) -> np.ndarray:
    """Which pixels of an image are data, (h, w) bool, where None stands for all."""
    return np.ones(image.shape[:2], bool) if valid is None else valid


def alpha_strips(raster: Tiff, step: int) -> Iterator[np.ndarray]:
    """The alpha band of an image, some rows at a time."""
    height, width = raster.shape[:2]
    for top in range(0, height, step):
        yield raster.read((top, 0, min(step, height - top), width), [raster.alpha])
