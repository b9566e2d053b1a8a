"""data/ from file to score, the heads, the two files of a run; oracles: Pillow, torchmetrics, definitions in Python."""
import json
import pickle
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics.functional.classification as tm
from PIL import Image
from torch import nn

import train_seg
from data import augment, metrics
from data.crops import crop, random_crop
from data.datasets import SegDataset, find_pairs, hold_out, load_splits, split_names
from data.common import IGNORE, BadInput, write
from data.io import Labels, id_image, read_image, read_mask, read_valid
from data.samplers import StepSampler
from data.tiles import blend_weight, windows
from models.checkpoint import load_state, load_weights, save_state, save_weights
from models.heads import HEADS, Linear, Segmenter
from models.weights import BadWeights

RGB = np.random.default_rng(0).integers(1, 256, (9, 7, 3), np.uint8)
BY_ID = [{"name": "a", "id": 3}, {"name": "b", "id": 0}, {"name": "c", "id": 254}]
BY_COLOR = [{"name": "a", "color": "#0A0B0C"}, {"name": "b", "color": "000000"}, {"name": "c", "color": "#FF0010"}]


def refusal(call, *args):
    """The message of the BadInput or BadWeights that the call must raise: one line."""
    with pytest.raises((BadInput, BadWeights)) as e:
        call(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def save(path, array, mode=None):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return path


# ---- io

@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "RGBA", "LA"])
def test_read_image_shows_what_pillow_shows(tmp_path, mode):
    path = save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), RGB.repeat(6, 0), mode)
    got = read_image(path)
    np.testing.assert_array_equal(got, Image.open(path).convert("RGB"))
    assert got.dtype == np.uint8 and got.flags.writeable
    path.write_bytes(path.read_bytes()[:-60])
    assert f"{path}: damaged or truncated" in refusal(read_image, path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_pages_of_a_tiff_are_refused_but_overviews_and_masks_are_none(tmp_path):
    pages, path = [Image.fromarray(RGB[..., i]) for i in range(3)], tmp_path / "a.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:])  # bands as pages, as tifffile writes (3, H, W)
    said = f"{path}: 3 pages, of which only the first would be read"
    assert said in refusal(read_image, path) and said in refusal(read_mask, path)
    path.write_bytes(path.read_bytes()[:-120])
    assert f"{path}: 2 pages" in refusal(read_image, path)  # the third one's directory is damaged
    pages[1].encoderinfo, pages[2].encoderinfo = {"tiffinfo": {254: 1}}, {"tiffinfo": {254: 4}}
    pages[0].save(path, save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(read_image(path)[..., 0], RGB[..., 0])
    whole = path.read_bytes()
    path.write_bytes(whole[:-120])  # into the last directory, which nothing needs
    with pytest.raises(Exception):
        Image.open(path).n_frames
    np.testing.assert_array_equal(read_image(path)[..., 0], RGB[..., 0])


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_one_transparent_colour_of_a_png_is_not_valid(tmp_path, mode):
    image = Image.fromarray(RGB).convert(mode)
    key = image.getpixel((3, 2))
    image.save(tmp_path / "a.png", transparency=key)
    got, valid = read_valid(tmp_path / "a.png")
    np.testing.assert_array_equal(got, image.convert("RGB"))
    want = [[image.getpixel((x, y)) != key for x in range(7)] for y in range(9)]
    np.testing.assert_array_equal(valid, want)
    assert not valid[2, 3]


def test_read_image_refuses_what_would_be_a_guess(tmp_path):
    grey, veiled = RGB[..., 0], np.dstack([RGB, RGB[..., 0]])
    for array, said in ((grey * np.uint16(9), "uint16"), (grey / np.float32(9), "float32"), (veiled, "4 bands")):
        assert said in refusal(read_image, save(tmp_path / "a.tif", array))
    png = bytearray(save(tmp_path / "a.png", np.hstack([RGB, RGB])).read_bytes())
    png[16:20], png[24] = (7).to_bytes(4, "big"), 16  # 14 pixels of 8 bits have the bytes of 7 pixels of 16 bits
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(png)
    assert Image.open(tmp_path / "a.png").mode == "RGB" and "16 bits" in refusal(read_image, tmp_path / "a.png")
    key = b"tRNS" + bytes(6)  # a transparent colour of 16 bits has no mask, and is no crash
    chunk = (6).to_bytes(4, "big") + key + zlib.crc32(key).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(png[:33] + chunk + png[33:])
    assert Image.open(tmp_path / "a.png").info["transparency"] == (0, 0, 0)
    assert read_valid(tmp_path / "a.png", input_range=[0, 65535])[1] is None
    (tmp_path / "a.png").write_text("<html>")
    assert "not a readable image" in refusal(read_image, tmp_path / "a.png")
    assert "no such file" in refusal(read_image, tmp_path / "none.png")


def test_read_mask_keeps_values_and_refuses_other(tmp_path):
    ids = RGB[..., 0]
    for i, array in enumerate((ids, ids.astype(np.uint16), ids.astype(np.int32), id_image(ids, RGB[0]), RGB)):
        path = tmp_path / f"{i}.tif"
        array.save(path) if isinstance(array, Image.Image) else save(path, array)
        np.testing.assert_array_equal(read_mask(path), RGB if array is RGB else ids)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "b.png", ids > 99)), (ids > 99) * 255)
    assert "JPEG" in refusal(read_mask, save(tmp_path / "a.jpg", ids))
    assert "uint16 values" in refusal(read_mask, save(tmp_path / "a.png", ids + np.uint16(99)))
    assert "float32" in refusal(read_mask, save(tmp_path / "a.tif", ids.astype(np.float32)))


def test_labels_by_id(tmp_path):
    raw = np.random.default_rng(1).choice(np.uint8([3, 0, 254, 9]), (9, 7))
    want = [[{3: 0, 0: 1, 254: 2, 9: 255}[v] for v in row] for row in raw.tolist()]
    for ignore in ([9], 9):
        labels = Labels(BY_ID, ignore)
        for array in (raw, raw.astype(np.uint16), raw[..., None].repeat(3, 2)):
            np.testing.assert_array_equal(labels.load(save(tmp_path / "a.png", array)), want)
    np.testing.assert_array_equal(labels.decode(np.uint8(want)), raw)
    assert "lists ids" in refusal(labels.load, save(tmp_path / "b.png", RGB))


def test_labels_by_colour(tmp_path):
    colors = np.uint8([(10, 11, 12), (0, 0, 0), (255, 0, 16), (1, 2, 3)])
    ids = np.random.default_rng(1).integers(0, 4, (9, 7), np.uint8)
    labels, want = Labels(BY_COLOR, ["#010203"]), np.where(ids == 3, 255, ids)
    save(tmp_path / "a.png", colors[ids]), save(tmp_path / "b.png", colors[ids], "RGBA")
    id_image(3 - ids, colors[::-1]).save(tmp_path / "c.png")  # a palette in another order: its colours count
    for name in "abc":
        np.testing.assert_array_equal(labels.load(tmp_path / f"{name}.png"), want)
    np.testing.assert_array_equal(labels.decode(want.astype(np.uint8)), colors[ids])
    np.testing.assert_array_equal(labels.colors, colors[:3])
    assert "one band of ids" in refusal(labels.load, save(tmp_path / "d.png", ids))


@pytest.mark.parametrize("classes, value, shown", [(BY_ID, 7, "ids 7"), (BY_COLOR, (1, 2, 255), "colours #0102FF")])
def test_an_unknown_value_names_file_value_pixels_and_remedy(tmp_path, classes, value, shown):
    mask = np.zeros((9, 7) + np.shape(value), np.uint8)
    mask[:2, :3] = value
    said = refusal(Labels(classes).load, save(tmp_path / "a.png", mask))
    assert all(s in said for s in (str(tmp_path / "a.png"), f"{shown} on 6 of 63 pixels", '"ignore" in dataset.json'))


@pytest.mark.parametrize("classes, ignore", [
    ([], []), (["road"], []), ([{"id": 1}], []), (BY_ID + BY_COLOR, []), (BY_ID + [{"name": "d", "id": 3}], []),
    (BY_ID + [{"name": "a", "id": 4}], []), (BY_ID, [0]), (BY_ID, ["9"]), (BY_ID, None), (BY_COLOR, ["#000000"]),
    ([{"name": "a", "id": 256}], []), ([{"name": "a", "id": "1"}], []), ([{"name": "a", "id": [1]}], []),
    ([{"name": "a", "color": "red"}], []), ([{"name": str(i), "id": i} for i in range(255)], [])])
def test_label_tables_that_contradict_themselves(classes, ignore):
    refusal(Labels, classes, ignore)


def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.json"
    write(path, {"old": [1]})
    real = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda self, b: real(self, b[: len(b) // 2]) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(path, {"new": [2]})
    assert json.loads(path.read_text()) == {"old": [1]}


def test_id_image_reads_back_as_ids_and_opens_in_colour(tmp_path):
    ids = np.random.default_rng(0).integers(0, 256, (9, 7), np.uint8)
    colors = np.random.default_rng(1).integers(0, 256, (256, 3), np.uint8)
    write(tmp_path / "a.png", id_image(ids, colors))
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), ids)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colors[ids])


# ---- datasets

@pytest.mark.parametrize("images, masks, pairs", [
    ("*.jpg", "*_m.png", {"a.jpg": "a_m.png", "a_m.jpg": "a_m_m.png"}),
    ("*.png", "*_m.png", {"a.png": "a_m.png", "b.png": "b_m.png"}),
    ("T */im/*.jpg", "T */m/*.png", {f"T {i}/im/{c}.jpg": f"T {i}/m/{c}.png" for i in (1, 2) for c in "ab"}),
    ("**/img/*_?.tif", "lbl/**/*-?.tif", {"x/y/img/a_1.tif": "lbl/x/y/a-1.tif", "img/a_1.tif": "lbl/a-1.tif"}),
    (["a/*.jpg", "b/*.jpg"], ["ma/*.png", "mb/*.png"], {"a/1.jpg": "ma/1.png", "b/1.jpg": "mb/1.png"})])
def test_what_the_stars_stand_for_pairs_image_and_mask(tmp_path, images, masks, pairs):
    for name in [*pairs, *pairs.values()]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_pairs(tmp_path, dict(images=images, masks=masks))
    assert found == {a.rsplit(".", 1)[0]: (tmp_path / a, tmp_path / b) for a, b in pairs.items()}
    (tmp_path / list(pairs.values())[0]).unlink()
    assert f"(1 of {len(pairs)} images" in refusal(find_pairs, tmp_path, dict(images=images, masks=masks))


def test_ambiguous_pairs_are_refused(tmp_path):
    for name in ("im1/a.jpg", "im2/a.jpg", "im2/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert "cannot tell" in refusal(find_pairs, tmp_path, dict(images="im*/**", masks="m/*.png"))
    assert "two images of one" in refusal(find_pairs, tmp_path, dict(images=["*/*.jpg", "*/*.png"], masks="m/*.png"))
    assert "no image matches" in refusal(find_pairs, tmp_path, dict(images="x/*.jpg", masks="m/*.png"))


NAMES = ["T 1/a", "T 1/b", "T 2/a", "T 3/c.5", "T 3/d"]


def test_splits_by_pattern_and_by_list(tmp_path):
    (tmp_path / "l.txt").write_text("T 1/a\n\nb.png\n c.5 \nT 2/a.jpg\n")
    splits = split_names(tmp_path, {"splits": {"train": ["l.txt"], "val": ["*/d", "T [3-9]/d"], "test": []}}, NAMES)
    assert splits == {"train": NAMES[:4], "val": ["T 3/d"], "test": []}
    for rules, said in (({"train": "T 1/*", "val": "*/a"}, "'T 1/a' is in the splits"), ({"train": "t.txt"}, "no such"),
                        ({"train": "X*"}, "nothing matches 'X*'"), ({"train": 0.8}, "--val-frac")):
        assert said in refusal(split_names, tmp_path, {"splits": rules}, NAMES)
    (tmp_path / "l.txt").write_text("a\n")
    assert "'a' is no image here, or several" in refusal(split_names, tmp_path, {"splits": {"train": "l.txt"}}, NAMES)


def test_split_file_and_no_silent_random_split(tmp_path):
    all_train, file = {"splits": {"train": "*"}}, tmp_path / "split.json"
    assert "--val-frac" in refusal(load_splits, tmp_path, all_train, NAMES)
    assert "has a val" in refusal(load_splits, tmp_path, {"splits": {"train": "T 1*", "val": "T 2*"}}, NAMES, None, 0.5)
    for content in ('{"train": ["T 1/a"], "val": ["T 1/a"]}', '{"train": ["x"]}', '["a"]', '{"train": 1}', "{"):
        file.write_text(content)
        assert str(file) in refusal(load_splits, tmp_path, all_train, NAMES, file)
    file.write_text(json.dumps(splits := {"train": ["T 3/d"], "val": ["T 1/a"]}))
    assert load_splits(tmp_path, all_train, dict.fromkeys(NAMES, ("image", "mask")), file) == splits
    drawn = load_splits(tmp_path, all_train, NAMES, None, 0.3, "T .")
    assert sorted(drawn["train"] + drawn["val"]) == NAMES and drawn["val"]


def test_hold_out_never_cuts_a_scene():
    names = [f"area{i % 7}_{i}" for i in range(70)]
    rest, held = hold_out(names, 0.25, r"(area\d)_", seed=0)
    assert sorted(rest + held) == sorted(names) and len(held) == 20  # 17.5 asked for, scenes of ten
    assert {n[:5] for n in held} == {"area2", "area4"} and not any(n[:5] in ("area2", "area4") for n in rest)
    assert (rest, held) == hold_out(names, 0.25, r"area\d", seed=0) != hold_out(names, 0.25, r"area\d", seed=1)
    assert len(hold_out(names, 0.25, None, 0)[1]) == 18
    for regex, said in ((r"area[0-5]", "does not match 'area6_6'"), ("(", "no regular expression"), ("area", "empty")):
        assert said in refusal(hold_out, names, 0.25, regex, 0)


def add_noise(image, mask, rng):
    return image + rng.integers(0, 99, image.shape, np.uint8), mask


def test_a_sample_depends_on_seed_and_draw_alone(tmp_path):
    mask = save(tmp_path / "mask.png", np.full((9, 7), 3, np.uint8))
    pairs = {f"{i}": (save(tmp_path / f"{i}.png", RGB + i), mask) for i in range(3)}
    data = SegDataset(pairs, Labels(BY_ID), "sat", add_noise, seed=5)
    first = [data[2, 4][0], data[1, 0][0], data[2, 7][0]]
    other = pickle.loads(pickle.dumps(data))  # what a spawned reading process gets
    assert torch.equal(other[2, 7][0], first[2]) and torch.equal(other[2, 4][0], first[0])
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(first[0], SegDataset(pairs, Labels(BY_ID), "sat", add_noise, seed=6)[2, 4][0])
    x, y, name = SegDataset(pairs, Labels(BY_ID), "sat")[1]
    sat = zip((RGB + 1)[8, 2].tolist(), (0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
    torch.testing.assert_close(x[:, 8, 2], torch.tensor([(v / 255 - mean) / std for v, mean, std in sat]))
    assert x.shape == (3, 9, 7) and y.shape == (9, 7) and y.dtype == torch.int64 and not y.any() and name == "1"
    save(mask, np.full((8, 7), 3, np.uint8))
    assert "mask of 8 x 7 for an image of 9 x 7" in refusal(lambda: SegDataset(pairs, Labels(BY_ID), "sat")[0])


# ---- crops and augmentations

@pytest.mark.parametrize("side, scales", [(1, (1, 2)), (3, (0.5, 2))])  # 3 pixels survive nearest at half the size
def test_a_crop_around_a_rare_class_holds_it(side, scales):
    for seed in range(1500):
        rng = np.random.default_rng(seed)
        (H, W), size = rng.integers(5, 90, 2), int(rng.choice([16, 32]))
        top, left = rng.integers(H - side + 1), rng.integers(W - side + 1)
        mask = np.zeros((H, W), np.uint8)
        mask[top:top + side, left:left + side] = 1
        x, y = random_crop(np.zeros((H, W, 3), np.uint8), mask, size, scales, rng, [1, 2], 1.0)
        assert x.shape == (size, size, 3) and y.shape == (size, size) and (y == 1).any()


def test_crops_invent_no_labels_and_pad_right_and_bottom_only():
    values = np.uint8([0, 50, 100, 250])
    for seed in range(300):
        rng = np.random.default_rng(seed)
        (H, W), scale = rng.integers(1, 40, 2), rng.uniform(0.5, 2)
        image, mask = np.full((H, W, 3), 9, np.uint8), rng.choice(values, (H, W))
        x, y = crop(image, mask, 24, scale, rng.uniform(0, (H, W)))
        h, w = (max(1, min(24, round(n * scale))) for n in (H, W))
        inside = np.outer(np.arange(24) < h, np.arange(24) < w)
        assert ((y != IGNORE) == inside).all() and set(y[inside]) <= set(values)
        assert (x == np.where(inside, 9, 0)[..., None]).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_image_and_mask_are_cut_and_scaled_alike(axis):
    """Both hold the coordinate c: nearest gives floor(c), bilinear c - 1/2; they differ by up to 1, on average by 0."""
    ramp, off = np.indices((200, 200))[axis].astype(np.uint8), []
    for seed in range(200):
        x, y = random_crop(ramp[..., None].repeat(3, 2), ramp, 48, (0.5, 2), np.random.default_rng(seed))
        off.append(x[..., 0].astype(float) - y)
    assert np.abs(off).max() <= 1 and abs(np.mean(off)) < 0.05


def test_crops_of_mapped_tiles_read_no_more_than_they_need(tmp_path):
    image = np.memmap(tmp_path / "image", np.uint8, "w+", shape=(20000, 20000, 3))  # sparse: 1.2 GB that take no place
    mask, rng = np.memmap(tmp_path / "mask", np.uint8, "w+", shape=image.shape[:2]), np.random.default_rng(0)
    mask[7000:7055, 9000:9055], image[7000:7055, 9000:9055] = 1, 200  # every 55th row and column are searched
    tracemalloc.start()
    for _ in range(20):
        x, y = random_crop(image, mask, 512, (0.5, 2), rng, [1], 1.0)
        assert (y == 1).any() and abs((x[..., 0] > 100).sum() - (y == 1).sum()) < 500
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_dihedral_turns_pairs_alike_and_hits_all_eight():
    mask = np.arange(6, dtype=np.uint8).reshape(2, 3)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(100):
        x, y = augment.dihedral(mask[..., None].repeat(3, 2), mask, rng)
        assert (x == y[..., None]).all()
        seen.add((y.shape, y.tobytes()))
    flips = [m[::a, ::b] for m in (mask, mask.T) for a in (1, -1) for b in (1, -1)]
    assert seen == {(m.shape, m.tobytes()) for m in flips}


def test_color_changes_within_its_strength():
    rng, before = np.random.default_rng(0), RGB.copy()
    assert (augment.color(RGB, rng, 0) == RGB).all()
    grey = np.full((4, 4, 3), 100, np.uint8)  # has neither contrast nor saturation: brightness and tint are left
    seen = np.array([augment.color(grey, rng, 0.2) for _ in range(200)])
    assert 100 * 0.8 * 0.95 - 1 <= seen.min() < 82 and 118 < seen.max() <= 100 * 1.2 * 1.05
    assert (augment.color(RGB, rng, 0.5) != RGB).any() and (RGB == before).all()


def test_mixup_and_cutmix_keep_labels_with_their_pixels():
    y = torch.arange(4)[:, None, None].repeat(1, 8, 6)
    y[:, 2, 1:4] = IGNORE
    x, shares = y[:, None].float(), []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        mixed, y1, y2, share = augment.mixup(x, y, rng)
        torch.testing.assert_close(mixed, share * y1[:, None] + (1 - share) * y2[:, None])
        assert torch.equal(y1, y) and sorted(y2[:, 0, 0].tolist()) == [0, 1, 2, 3]
        pasted, labels = augment.cutmix(x, y, rng)
        assert torch.equal(pasted[:, 0], labels.float()) and torch.equal(labels == IGNORE, y == IGNORE)
        if len(box := (labels != y).any(0).nonzero()):  # (n, 2) rows, columns; empty where every image stayed itself
            h, w = (box.amax(0) - box.amin(0) + 1).tolist()
            shares.append(h * w / 48)
            assert h * w - 3 <= len(box) <= h * w  # full, but for the three ignored pixels
    assert 0.4 < np.mean(shares) < 0.6 and torch.equal(x[:, 0], y.float())  # uniform; the inputs stay as they were


def test_mix_is_cutmix_then_mixup_by_their_probabilities():
    x, y = torch.randn(4, 3, 8, 6), torch.arange(4 * 48).view(4, 8, 6)
    seen = set()
    for seed in range(100):
        mixed, targets = augment.mix(x, y, np.random.default_rng(seed), 0.5, 0.4)
        rng, want, labels = np.random.default_rng(seed), x, y
        if pasted := rng.random() < 0.5:
            want, labels = augment.cutmix(want, labels, rng)
        if blended := rng.random() < 0.4:
            want, labels, other, share = augment.mixup(want, labels, rng)
            assert targets[1][0] == 1 - share and torch.equal(targets[1][1], other)
        assert torch.equal(mixed, want) and torch.equal(targets[0][1], labels)
        assert sum(share for share, _ in targets) == pytest.approx(1) and len(targets) == 1 + blended
        seen.add((pasted, blended))
    assert len(seen) == 4
    assert torch.equal(augment.mix(x, y, np.random.default_rng(0), 0, 0)[0], x)


# ---- samplers

def steps_of(world, batch, accum=1, **more):
    """Samples of each optimiser step over all ranks."""
    ranks = [list(StepSampler(10, batch, 6 * accum, 3, rank=r, world=world, **more)) for r in range(world)]
    starts = range(0, 6 * accum, accum)
    return [sorted(s for rank in ranks for micro in rank[i:i + accum] for s in micro) for i in starts]


def test_ranks_and_accumulation_only_share_out_the_same_samples():
    want = steps_of(1, 12)
    for world, batch, accum in ((2, 6, 1), (3, 4, 1), (4, 3, 1), (1, 4, 3), (2, 3, 2)):
        assert steps_of(world, batch, accum) == want
    index, draw = zip(*sorted((s for step in want for s in step), key=lambda s: s[1]))
    assert draw == tuple(range(72))
    epochs = [index[i:i + 10] for i in range(0, 70, 10)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and len(set(epochs)) == 7


def test_start_skips_steps_and_changes_nothing_else():
    whole, rest = StepSampler(10, 4, 9, 3, rank=1, world=2), StepSampler(10, 4, 9, 3, start=5, rank=1, world=2)
    assert list(rest) == list(whole)[5:] and len(rest) == 4 and len(whole) == 9


# ---- metrics

def drawn(n=600):
    """pred, true of n pixels: class 3 is predicted but never true, class 4 in neither, a sixth is ignored."""
    pred, true = torch.from_numpy(np.random.default_rng(0).integers(0, (4, 3), (n, 2)).T.copy())
    true[: n // 6] = IGNORE
    return pred, true


def test_scores_are_the_set_definitions():
    pred, true = drawn()
    valid = [i for i in range(600) if true[i] != 255]
    A = [{i for i in valid if true[i] == c} for c in range(5)]
    B = [{i for i in valid if pred[i] == c} for c in range(5)]
    cm = metrics.confusion(pred, true, 5)
    assert cm.tolist() == [[len(a & b) for b in B] for a in A]

    def ratio(f, g):
        return torch.tensor([f(a, b) / g(a, b) if g(a, b) else torch.nan for a, b in zip(A, B)], dtype=torch.float64)

    for score, f, g in ((metrics.iou, lambda a, b: len(a & b), lambda a, b: len(a | b)),
                        (metrics.f1, lambda a, b: 2 * len(a & b), lambda a, b: len(a) + len(b)),
                        (metrics.precision, lambda a, b: len(a & b), lambda a, b: len(b)),
                        (metrics.recall, lambda a, b: len(a & b), lambda a, b: len(a))):
        torch.testing.assert_close(score(cm), ratio(f, g), rtol=0, atol=0, equal_nan=True)
    assert metrics.iou(cm)[3] == 0 and metrics.iou(cm)[4].isnan()
    assert metrics.oa(cm) == sum(int(pred[i] == true[i]) for i in valid) / len(valid)


def test_scores_are_those_of_torchmetrics():
    pred, true = (t[t2 != 9] for t, t2 in zip(drawn(), drawn()[::-1]))
    cm, how = metrics.confusion(pred, true, 4), dict(num_classes=4, ignore_index=IGNORE, average="none")
    for ours, theirs in ((metrics.iou, tm.multiclass_jaccard_index), (metrics.f1, tm.multiclass_f1_score),
                         (metrics.precision, tm.multiclass_precision)):
        torch.testing.assert_close(ours(cm).float(), theirs(pred, true, **how))
    torch.testing.assert_close(metrics.recall(cm)[:3].float(), tm.multiclass_recall(pred, true, **how)[:3])
    micro = tm.multiclass_f1_score(pred, true, 4, average="micro", ignore_index=IGNORE)
    assert metrics.oa(cm) == pytest.approx(micro.item())


def test_batches_and_shards_give_one_matrix():
    pred, true = drawn(60)
    whole = metrics.confusion(pred, true, 5)
    for n in (1, 7):
        parts = zip(pred.split(n), true.split(n))
        assert torch.equal(sum(metrics.confusion(p, t, 5) for p, t in parts), whole)
    assert torch.equal(sum(metrics.confusion(pred[r::3], true[r::3], 5) for r in range(3)), whole)
    assert torch.equal(metrics.confusion(pred.byte().view(6, 10), true.byte().view(6, 10), 5), whole)


@pytest.mark.parametrize("bad", [5, 6, 30, 254, 300, -1])
@pytest.mark.parametrize("where", ["pred", "true"])
def test_an_id_that_is_no_class_fails_and_never_counts_for_another(where, bad):
    for good in (0, 1, 4):
        pair = {"pred": torch.full((9,), good), "true": torch.full((9,), good)}
        pair[where][3] = bad
        with pytest.raises((ValueError, RuntimeError)):
            metrics.confusion(**pair, k=5)
    ignored = metrics.confusion(torch.full((9,), 77), torch.full((9,), IGNORE), 5)  # nobody looks there
    assert ignored.shape == (5, 5) and not ignored.any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_counting_without_checks_adds_the_same_matrix(dtype):
    pred, true = (t.to(dtype).view(6, 10) for t in drawn(60))
    cm = torch.arange(25).view(5, 5)
    metrics.count_pairs_(cm, pred, true)
    assert torch.equal(cm, torch.arange(25).view(5, 5) + metrics.confusion(pred, true, 5))
    before = cm.clone()
    metrics.count_pairs_(cm, torch.full((9,), 77, dtype=dtype), torch.full((9,), IGNORE, dtype=dtype))
    assert torch.equal(cm, before)  # what is predicted on ignored pixels does not count, whatever it is


def test_report_names_the_absent_and_the_baseline():
    cm = torch.diag(torch.tensor([70, 20, 10, 0, 0]))
    cm[0, 3] = 20  # predicted, never true
    r = metrics.report(cm, list("abcde"))
    assert json.loads(json.dumps(r, allow_nan=False)) == r
    assert r["absent"] == ["e"] and r["classes_in_mean"] == 4 and r["iou"]["e"] is None and r["iou"]["d"] == 0
    assert r["miou"] == pytest.approx((70 / 90 + 1 + 1 + 0) / 4) and r["oa"] == pytest.approx(100 / 120)
    share = 90 / 120  # always "a": its IoU is its share, the other two classes have 0, OA is the share
    assert r["majority_class"] == "a" and r["majority_oa"] == share and r["majority_miou"] == pytest.approx(share / 3)
    assert r["pixels"] == dict(a=90, b=20, c=10, d=0, e=0)


# ---- tiles

@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.9])
def test_windows_cover_every_pixel_and_stay_inside(overlap):
    for H, W in ((1, 1), (31, 33), (32, 32), (64, 65), (100, 47), (5, 200)):
        boxes, seen = windows(H, W, 32, overlap), np.zeros((H, W), int)
        for t, l, h, w in boxes:
            assert (h, w) == (min(H, 32), min(W, 32)) and 0 <= t <= H - h and 0 <= l <= W - w
            seen[t:t + h, l:l + w] += 1
        assert seen.min() >= 1 and len(set(boxes)) == len(boxes)
        tops = sorted({t for t, *_ in boxes})
        assert all(b - a <= 32 * (1 - overlap) + 1 for a, b in zip(tops, tops[1:])) and tops[-1] == max(0, H - 32)


class Pixelwise(nn.Module):
    """Logits are a function of each pixel alone, so that windows must not show."""

    def __init__(self, gain):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x):
        return x * self.gain + 3


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5])
@pytest.mark.parametrize("gain", [0.0, 1.0])  # a constant network, and one that passes its input on
def test_blending_returns_what_every_window_agrees_on(overlap, gain):
    for H, W in ((5, 7), (33, 65), (32, 32), (17, 90), (101, 40)):
        x = torch.randn(3, H, W)
        with torch.no_grad():
            out = train_seg.logits_of(Pixelwise(gain), x, 32, overlap, batch=3, amp=False)
        torch.testing.assert_close(out, x * gain + 3, rtol=1e-5, atol=1e-5)
    assert all((blend_weight(h, w) > 0).all() for h, w in ((1, 1), (2, 9), (512, 512)))


# ---- heads

class Pooled(nn.Module):
    """A backbone whose only map is the input, averaged over patches, and whose parameter does nothing."""

    def __init__(self, patch=4):
        super().__init__()
        self.patch, self.one = patch, nn.Parameter(torch.ones(1))

    def forward(self, x, taps, norm):
        H, W = x.shape[-2:]
        x = F.pad(x, (0, -W % self.patch, 0, -H % self.patch))
        return [F.avg_pool2d(x, self.patch) * self.one for _ in taps], None


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("h, w", [(1, 1), (3, 5)])
def test_every_head_trains_on_one_image_of_any_size(name, h, w):
    head = HEADS[name](32, 4, 5)
    out = head([torch.randn(1, 32, h, w) for _ in range(4)])
    assert out.shape[:2] == (1, 5) and out.shape[2] * w == out.shape[3] * h
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("name", ["linear", "fpn"])
def test_logits_have_the_size_of_the_input(name):
    net = Segmenter(Pooled(16), HEADS[name](3, 2, 5), [0, 1]).eval()
    for extra in range(1, 41):
        out = net(torch.randn(2, 3, 16 + extra, 57 - extra))
        assert out.shape == (2, 5, 16 + extra, 57 - extra) and out.dtype == torch.float32


@pytest.mark.parametrize("H, W", [(64, 64), (61, 75), (50, 63)])
def test_logits_lie_where_the_pixels_are(H, W):
    net = Segmenter(Pooled(8), Linear(3, 1, 1), [0])
    with torch.no_grad():
        net.head.out.weight.copy_(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1))
        net.head.out.bias.zero_()
        for top, left, limit in ((16, 24, 0.1), (24, 16, 0.1), (20, 27, 4), (29, 33, 4)):  # on the patch grid; off it
            x = torch.zeros(1, 3, H, W)
            x[..., top:top + 16, left:left + 16] = 1
            z = net(x)[0, 0]
            y, x = ((z.sum(1 - i) * torch.arange(n)).sum() / z.sum() for i, n in enumerate((H, W)))
            assert abs(y - top - 7.5) < limit and abs(x - left - 7.5) < limit


def test_a_frozen_backbone_stays_in_eval_and_gets_no_gradient():
    net = Segmenter(Pooled(), HEADS["linear"](3, 1, 5), [0])
    assert net.train().backbone.training
    net.backbone.requires_grad_(False)
    assert not net.train().backbone.training and net.head.training and not net.eval().head.training
    net(torch.randn(1, 3, 9, 9)).sum().backward()
    assert net.backbone.one.grad is None and net.head.out.weight.grad is not None


# ---- checkpoint

def test_weights_round_trip_with_their_description(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.randn(2).bfloat16(), "c": torch.arange(5), "d": torch.tensor(1.5)}
    save_weights(tmp_path / "best.safetensors", tensors, {"classes": [{"name": "é", "id": 3}], "taps": [1, 2]})
    (tmp_path / "plain").touch()  # colleagues may read one as they may the other
    assert (tmp_path / "best.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    for path in (tmp_path, tmp_path / "best.safetensors"):
        back, meta = load_weights(path)
        assert back.keys() == tensors.keys() and all(torch.equal(back[k], v) for k, v in tensors.items())
        assert meta["classes"] == [{"name": "é", "id": 3}] and meta["taps"] == [1, 2]


def test_state_is_tensors_and_plain_values_and_whole(tmp_path):
    path = tmp_path / "last.pt"
    save_state(path, net={"w": torch.ones(2)}, step=3, args={"lr": 1e-3, "scale": [0.5, 2]}, best=-1.0)
    assert torch.load(path, weights_only=True)["args"] == load_state(path)["args"] == {"lr": 1e-3, "scale": [0.5, 2]}
    with pytest.raises(Exception, match="lambda|pickle"):
        save_state(path, step=lambda: 4)
    assert load_state(path)["step"] == 3


def test_what_is_no_checkpoint_is_named(tmp_path):
    good, w = tmp_path / "good", {"w": torch.ones(999)}
    save_state(good, net=w), save_weights(tmp_path / "best.safetensors", w, {})
    torch.save({"path": Path("a")}, tmp_path / "objects")
    contents = [b"", b"hello\n", b"<html>403</html>", b"version https://git-lfs", pickle.dumps([1], 2), bytes(200)]
    contents += [good.read_bytes()[:n] for n in (9, 99, 999, -9)] + [(tmp_path / "objects").read_bytes()]
    contents += [(tmp_path / "best.safetensors").read_bytes()[:n] for n in (7, 50, -9)]
    for content in contents:
        (file := tmp_path / "bad").write_bytes(content)
        assert str(file) in refusal(load_state, file) and str(file) in refusal(load_weights, file)
    for load in (load_state, load_weights):
        assert "no such file" in refusal(load, tmp_path / "none")
