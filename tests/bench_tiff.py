"""A 512 window of three bands out of tiled files of 20,000 x 20,000 pixels: data/tiff.py beside rasterio.

    python tests/bench_tiff.py [ROUNDS]        best of 5 rounds, in turns, so that a busy machine slows both alike
One process, one thread; the files are in the page cache and opened for every window, as a data loader does.
"""
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import rasterio
import tifffile
from rasterio.windows import Window

sys.path.insert(0, str(Path(__file__).parents[1]))
from data.tiff import Tiff

SIDE, WINDOW, WINDOWS, WRITTEN = 20_000, 512, 20, 2048
RNG = np.random.default_rng(0)
BANDS = {"uint8": (3, [1, 2, 3]), "uint16": (4, [4, 1, 2])}  # how many, which are read
FILES = {  # name: (dtype, GDAL's options)
    "uint8, deflate 256": ("uint8", dict(compress="deflate", tile=256)),
    "uint8, deflate 512": ("uint8", dict(compress="deflate", tile=512)),
    "uint8, deflate 256, predictor 2": ("uint8", dict(compress="deflate", predictor=2, tile=256)),
    "uint8, JPEG 256": ("uint8", dict(compress="jpeg", photometric="ycbcr", tile=256)),
    "uint8, not packed 256": ("uint8", dict(tile=256)),
    "uint16, deflate 256": ("uint16", dict(compress="deflate", tile=256)),
    "uint16, deflate 256, planar": ("uint16", dict(compress="deflate", tile=256, interleave="band")),
    "uint16, LZW 256, predictor 2": ("uint16", dict(compress="lzw", predictor=2, tile=256))}


def landscape(bands, dtype):  # smooth shapes with noise: deflate halves them, as it does with aerial photographs
    y, x = np.mgrid[:WRITTEN, :WRITTEN]
    waves = 110 + 60 * np.sin(x / 97) + 40 * np.cos(y / 61)
    noise = RNG.normal(scale=6, size=(bands, WRITTEN, WRITTEN))
    return np.clip((waves + noise) * (1 if dtype == "uint8" else 16), 0, None).astype(dtype)


def write(path, dtype, bands, tile, interleave="pixel", **options):
    """A sparse file of which one corner is written; its tiles then stand for all others, too."""
    with rasterio.open(path, "w", driver="GTiff", height=SIDE, width=SIDE, count=bands, dtype=dtype, tiled=True,
                       blockxsize=tile, blockysize=tile, sparse_ok=True, interleave=interleave, **options) as f:
        f.write(landscape(bands, dtype), window=Window(0, 0, WRITTEN, WRITTEN))
    with tifffile.TiffFile(path) as f:
        tags = [f.pages[0].tags[number] for number in (324, 325)]
        tags = [(tag.valueoffset, np.array(tag.value, f"<u{4 if tag.dtype == 4 else 2}")) for tag in tags]
    across, written = -(-SIDE // tile), WRITTEN // tile
    with open(path, "r+b") as f:
        for offset, values in tags:
            values = values.reshape(-1, across, across)
            repeated = np.arange(across) % written
            f.seek(offset)
            f.write(values[:, repeated][:, :, repeated].tobytes())


def by_rasterio(path, window, bands):
    top, left, height, width = window
    with rasterio.open(path) as f:
        return f.read(bands, window=Window(left, top, width, height)).transpose(1, 2, 0)


def by_tiff(path, window, bands):
    return Tiff(path).read(window, bands)


def main(rounds):
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    print("| file | MB | data/tiff.py, ms | rasterio, ms | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (dtype, options) in FILES.items():
            bands, chosen = BANDS[dtype]
            path = Path(folder, "a.tif")
            path.unlink(missing_ok=True)
            write(path, dtype, bands, **options)
            best = {by_tiff: np.inf, by_rasterio: np.inf}
            for _ in range(rounds):
                corners = RNG.integers(0, SIDE - WINDOW, (WINDOWS, 2)).tolist()
                for reader in best:
                    start = time.perf_counter()
                    for corner in corners:
                        reader(path, (*corner, WINDOW, WINDOW), chosen)
                    best[reader] = min(best[reader], (time.perf_counter() - start) / WINDOWS * 1e3)
            window = (*corners[0], WINDOW, WINDOW)
            if "JPEG" not in name:  # whose colours rasterio's libjpeg spreads over the pixels in another way
                np.testing.assert_array_equal(by_tiff(path, window, chosen), by_rasterio(path, window, chosen))
            ours, theirs = best.values()
            size = path.stat().st_size / 1e6
            print(f"| {name} | {size:.1f} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
