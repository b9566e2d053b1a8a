"""Random 512 crops per second out of files of 512, 1024 and 6000 pixels a side, bare and as whole training samples.

    python tests/bench_data.py [ROUNDS]        best of 3 rounds, in turns, so that a busy machine slows all rows alike
One process, one thread; the files are in the page cache. "first": what decoding and caching cost once, in seconds.
"""
import sys
import tempfile
import timeit
from pathlib import Path

import numpy as np
import torch
import torchvision.io as tvio
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))
from data.augment import dihedral
from data.cache import Cache
from data.crops import random_crop
from data.datasets import NORMS, normalise
from data.io import Labels, read_image

CROP, SCALES, K = 512, (0.75, 1.5), 7
FILES = {"512.png": {}, "1024.png": {}, "6000.png": {}, "6000 LZW.tif": {"compression": "tiff_lzw"}, "6000 raw.tif": {}}
LABELS = Labels([{"name": str(i), "id": i} for i in range(K)])
MEAN, STD = (np.float32(v) for v in NORMS["imagenet"])
RNG = np.random.default_rng(0)


def photo(n):  # smooth shapes with noise: a PNG of it has half the size of the pixels, as with aerial photographs
    smooth = Image.fromarray(RNG.integers(40, 200, (n // 32, n // 32, 3), np.uint8)).resize((n, n), Image.BICUBIC)
    return Image.fromarray(np.asarray(smooth) + RNG.integers(0, 12, (n, n, 3), np.uint8))


def window(n):  # of n x n pixels -> (left, top, right, bottom)
    left, top = RNG.integers(n - CROP + 1, size=2).tolist()
    return left, top, left + CROP, top + CROP


def cut(a, box):
    left, top, right, bottom = box
    return a[top:bottom, left:right]


def pillow_sample(image, mask):  # decode, scale, crop: the order of GeoSeg and mmsegmentation
    side = round(1024 * RNG.uniform(*SCALES))
    at, flips = window(side), np.s_[::RNG.choice([-1, 1]), ::RNG.choice([-1, 1])]
    x = np.asarray(Image.open(image).resize((side, side), Image.BILINEAR).crop(at))[flips]
    y = np.asarray(Image.open(mask).resize((side, side), Image.NEAREST).crop(at))[flips]
    x = (x.astype(np.float32) / 255 - MEAN) / STD
    return torch.from_numpy(x.transpose(2, 0, 1).copy()), torch.from_numpy(y.astype(np.int64))


def torchvision_sample(image, mask):
    x, y = tv_tensors.Image(tvio.read_image(image)), tv_tensors.Mask(tvio.read_image(mask))
    resize, crop = v2.Resize(round(1024 * RNG.uniform(*SCALES))), v2.RandomCrop(CROP)
    x, y = v2.Compose([resize, crop, v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()])(x, y)
    return v2.functional.normalize(v2.functional.to_dtype(x, scale=True), *NORMS["imagenet"]), y[0].long()


def our_sample(cache, *paths):
    x, y = random_crop(*cache(paths, lambda image, mask: (read_image(image), LABELS.load(mask))), CROP, SCALES, RNG)
    x, y = dihedral(x, y, RNG)
    return normalise(np.ascontiguousarray(x), "imagenet"), torch.from_numpy(y.astype(np.int64))


def rate(call):  # calls per second
    n, seconds = timeit.Timer(call).autorange()  # 0.2 seconds or more
    return n / seconds


def report(name, rounds, pillow, ours, torchvision=None):
    first = timeit.timeit(ours, number=1)
    a, b, c = np.max([[rate(f) if f else 0 for f in (pillow, torchvision, ours)] for _ in range(rounds)], axis=0)
    print(f"{name:24}{a:10.1f}{f'{b:.1f}' if b else '-':>13}{c:10.1f}{c / a:12.0f}x{first:8.2f}", flush=True)


def main(rounds=3):
    torch.set_num_threads(1)
    print(f"{'crops per second':24}    Pillow  torchvision      ours  ours/Pillow   first")
    with tempfile.TemporaryDirectory() as folder:
        cache, paths = Cache(f"{folder}/cache"), (f"{folder}/1024.png", f"{folder}/mask.png")
        for name, options in FILES.items():
            path, n = f"{folder}/{name}", int(name.split(".")[0].split()[0])
            photo(n).save(path, **options)
            report(name, rounds, lambda: np.asarray(Image.open(path).crop(window(n))),
                   lambda: cut(cache([path], lambda p: (read_image(p),))[0], window(n)).copy(),
                   (lambda: cut(tvio.read_image(path).permute(1, 2, 0), window(n)).clone())
                   if "png" in name else None)  # torchvision.io reads no TIFF
        Image.fromarray(RNG.integers(0, K, (32, 32), np.uint8)).resize((1024, 1024), Image.NEAREST).save(paths[1])
        report("1024.png, whole samples", rounds, lambda: pillow_sample(*paths), lambda: our_sample(cache, *paths),
               lambda: torchvision_sample(*paths))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
