"""Small folders of images and masks, and data.check run on them: for test_check.py and test_draft.py."""
import numpy as np
import pytest
from PIL import Image

from data.check.__main__ import main
from data.common import write
from data.datasets import find_pairs, load_splits, read_description, split_names
from data.io import Labels

RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)
PLAIN = {"images": "images/*.png", "masks": "masks/*.png", "ignore": [255],
         "splits": {"train": "*/[0-3]", "val": "*/[45]"},
         "classes": [{"name": "land", "id": 0}, {"name": "road", "id": 1}, {"name": "water", "id": 2}]}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def save(path, pixels, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    if palette:
        image.putpalette(np.array(palette, np.uint8).tobytes())
    image.save(path)


def put(rng, image, mask=None, values=(0, 1, 2), size=(12, 16), palette=None):
    """A random image and a mask of the given ids or colours, each of which occurs."""
    save(image, rng.integers(0, 256, (*size, 3)))
    if mask is not None:
        index = rng.permutation(np.arange(size[0] * size[1]) % len(values)).reshape(size)
        save(mask, np.array(values)[index], palette)


@pytest.fixture
def plain(tmp_path, rng):
    """Six good pairs and their description, for one thing to be spoilt."""
    for i in range(6):
        put(rng, tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png")
    write(tmp_path / "dataset.json", PLAIN)
    return tmp_path


def run(capsys, *argv):
    """Exit code and all output of data.check."""
    code = main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out + out.err


def trainable(root):
    """Do the splits that train_seg.py makes of dataset.json have train and val, whatever the seed?"""
    d = read_description(root)
    pairs = find_pairs(root, d)
    for seed in range(5):
        splits = load_splits(root, d, pairs, seed=seed)
        if not splits["train"] or not splits["val"] or set(splits["train"]) & set(splits["val"]):
            return False
    return True


def described(root):
    """What train_seg.py makes of dataset.json."""
    d = read_description(root)
    pairs = find_pairs(root, d)
    return d, pairs, Labels.of(d), split_names(root, d, pairs)
