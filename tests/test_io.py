"""data/io.py: files, masks and label tables; oracles: Pillow, definitions in Python."""
import itertools
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image

from data.check.images import inspect_pair
from data.common import IGNORE, BadInput, write
from data.datasets import SegDataset, check_headers
from data.io import Labels, default_color, id_image, read_image, read_mask, read_valid
from data.plots import WRONG

RGB = np.random.default_rng(0).integers(1, 256, (9, 7, 3), np.uint8)
BY_ID = [{"name": "a", "id": 3}, {"name": "b", "id": 0}, {"name": "c", "id": 254}]
BY_COLOR = [{"name": "a", "color": "#0A0B0C"}, {"name": "b", "color": "000000"}, {"name": "c", "color": "#FF0010"}]


def refusal(call, *args):
    """The message of the BadInput that the call must raise: one line."""
    with pytest.raises(BadInput) as e:
        call(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def save(path, array, mode=None):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return path


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
    if mode != "L":  # the colour counts, whichever bands are read
        np.testing.assert_array_equal(read_valid(tmp_path / "a.png", [3, 1, 2])[1], want)


def test_read_image_refuses_what_would_be_a_guess(tmp_path):
    grey, veiled = RGB[..., 0], np.dstack([RGB, RGB[..., 0]])
    for array, said in ((grey * np.uint16(9), "uint16"), (grey / np.float32(9), "float32"), (veiled, "4 bands")):
        assert said in refusal(read_image, save(tmp_path / "a.tif", array))
    png = bytearray(save(tmp_path / "a.png", np.hstack([RGB, RGB])).read_bytes())
    png[16:20], png[24] = (7).to_bytes(4, "big"), 16  # 14 pixels of 8 bits have the bytes of 7 pixels of 16 bits
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(png)
    assert Image.open(tmp_path / "a.png").mode == "RGB" and "uint16" in refusal(read_image, tmp_path / "a.png")
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
    np.testing.assert_array_equal(read_mask(save(tmp_path / "b.png", ids > 99)), ids > 99)  # as stored: 0 and 1
    np.testing.assert_array_equal(read_mask(save(tmp_path / "c.png", ids + np.uint16(999))), ids.astype(int) + 999)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "d.tif", ids - np.float32(9999))), ids.astype(int) - 9999)
    assert "compressed as JPEG" in refusal(read_mask, save(tmp_path / "a.jpg", ids))
    (tmp_path / "a.png").write_bytes((tmp_path / "a.jpg").read_bytes())  # told by content
    assert "compressed as JPEG" in refusal(read_mask, tmp_path / "a.png")
    assert "float32" in refusal(read_mask, save(tmp_path / "a.tif", ids / np.float32(2)))


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
    ([{"name": "a", "id": 1.5}], []), ([{"name": "a", "id": "1"}], []), ([{"name": "a", "id": [1]}], []),
    ([{"name": "a\nb", "id": 0}], []), ([{"name": "\x1b[31m", "id": 0}], []), ([{"name": " ", "id": 0}], []),
    ([{"name": 3, "id": 0}], []), ([{"name": None, "id": 0}], []), ([{"name": "a", "color": "red"}], []),
    ([{"name": str(i), "id": i} for i in range(255)], [])])
def test_label_tables_that_contradict_themselves(classes, ignore):
    refusal(Labels, classes, ignore)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(width, height):
    """A PNG of a few bytes that says it is so large."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header_and_by_how_to_read_it_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(bomb(36_000, 36_000))  # 3.9 GB when it is unpacked
    for call in (read_image, read_mask, lambda path: read_valid(path)):
        said = refusal(call, tmp_path / "a.png")
        assert "a.png: 36000 x 36000 pixels (H x W) by its header" in said and "--max-pixels 1296000000" in said
    (tmp_path / "b.png").write_bytes(bomb(3, 4))
    assert (read_image(tmp_path / "b.png") == 0).all() and read_image(tmp_path / "b.png").shape == (4, 3, 3)


def test_every_byte_of_a_png_is_under_a_checksum(tmp_path):
    """The right pixels or a refusal, whichever bit is turned; and no end is cut off in silence."""
    file = save(tmp_path / "a.png", RGB)
    good = file.read_bytes()
    rng = np.random.default_rng(0)
    for i in [*range(0, 33), *rng.integers(0, len(good), 60), len(good) - 1]:
        file.write_bytes(good[:i] + bytes([good[i] ^ 1 << int(rng.integers(8))]) + good[i + 1:])
        assert "a.png" in refusal(read_image, file)
    for end in (10, 40, len(good) - 12, len(good) - 4, len(good) - 1):
        file.write_bytes(good[:end])
        assert "a.png" in refusal(read_image, file)
    file.write_bytes(good + b"behind the end")
    assert (read_image(file) == RGB).all()


def test_id_image_reads_back_as_ids_and_opens_in_colour(tmp_path):
    ids = np.random.default_rng(0).integers(0, 256, (9, 7), np.uint8)
    colors = np.random.default_rng(1).integers(0, 256, (256, 3), np.uint8)
    write(tmp_path / "a.png", id_image(ids, colors))
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), ids)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colors[ids])


# ---- bands, depth and alpha

def test_bands_depth_and_alpha_are_chosen_never_guessed(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (6, 5, 4), np.uint8)
    four = tmp_path / "a.tif"
    Image.merge("RGBX", [Image.fromarray(band) for band in np.moveaxis(a, -1, 0)]).save(four)
    np.testing.assert_array_equal(read_image(four, [4, 1, 2]), a[..., [3, 0, 1]])
    veiled = save(tmp_path / "b.png", a)  # RGBA with all values: may be infrared
    np.testing.assert_array_equal(read_image(veiled, [1, 2, 3]), a[..., :3])
    deep = save(tmp_path / "c.tif", (a[..., 0] * np.uint16(40)))
    np.testing.assert_array_equal(read_image(deep, None, [0, 10200])[..., 1], a[..., 0])
    np.testing.assert_array_equal(read_image(deep, None, [1000, 1001])[..., 1], (a[..., 0] > 25) * 255)
    for file, bands, said in ((four, None, "4 bands (RGB); expected 3: say which with --bands"),
                              (veiled, None, "4 bands (RGBA)"),
                              (four, [5, 1, 2], 'or "bands" in dataset.json asks for number 5'),
                              (deep, None, "uint16 pixels (")):
        with pytest.raises(BadInput) as e:
            read_image(file, bands)
        assert said in str(e.value) and str(file) in str(e.value)
    with pytest.raises(BadInput, match="--input-range LOW HIGH"):
        read_image(deep)


def tiff(path, array, photometric, extra, deflate=False):  # what Pillow cannot write: any number of bands, 16 bits
    h, w, n = array.shape
    body = zlib.compress(array.tobytes()) if deflate else array.tobytes()
    tags = [(256, 3, [w]), (257, 3, [h]), (258, 3, [8 * array.itemsize] * n), (259, 3, [8 if deflate else 1]),
            (262, 3, [photometric]), (273, 4, [500]), (277, 3, [n]), (278, 3, [h]), (279, 4, [len(body)])]
    tags += [(338, 3, extra)] if extra else []
    head, more = struct.pack("<2sHIH", b"II", 42, 8, len(tags)), b""
    for tag, kind, values in tags:
        data = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(data) > 4:
            data, more = struct.pack("<I", 200 + len(more)), more + data
        head += struct.pack("<HHI", tag, kind, len(values)) + data.ljust(4, b"\0")
    path.write_bytes((head.ljust(200, b"\0") + more).ljust(500, b"\0") + body)
    return path


def test_no_band_of_a_tiff_is_dropped_in_silence(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (6, 5, 5), np.uint8)
    for n, photometric, extra in ((4, 2, [0]), (4, 2, [2]), (4, 2, []), (4, 1, [0, 0, 0])):  # [2] = said to be alpha
        file = tiff(tmp_path / "a.tif", np.ascontiguousarray(a[..., :n]), photometric, extra)
        np.testing.assert_array_equal(read_image(file, [4, 3, 1]), a[..., [3, 2, 0]])
        with pytest.raises(BadInput, match="4 bands .*--bands"):
            read_image(file)
    for n, photometric, extra in ((5, 2, [0, 0]), (4, 1, [])):  # what Pillow does not read
        file = tiff(tmp_path / "a.tif", np.ascontiguousarray(a[..., :n]), photometric, extra)
        np.testing.assert_array_equal(read_image(file, [4, 2, 3]), a[..., [3, 1, 2]])


@pytest.mark.parametrize("kind", ["raw", "deflate", "png"])
def test_sixteen_bit_colour_keeps_all_its_bits(kind, tmp_path):
    a = np.random.default_rng(0).integers(900, 1600, (6, 5, 3), np.uint16)  # upper bytes 3 to 6
    file = tmp_path / ("a.png" if kind == "png" else "a.tif")
    if kind == "png":  # Pillow cannot write one
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in a)
        head = struct.pack(">IIBBBBB", 5, 6, 16, 2, 0, 0, 0)  # W, H, bits, RGB
        chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks))
    else:
        tiff(file, a, 2, [], deflate=kind == "deflate")
    with pytest.raises(BadInput, match="uint16 pixels .*--input-range"):
        read_image(file)
    np.testing.assert_array_equal(read_image(file, None, [1000, 1255]), np.clip(a.astype(int) - 1000, 0, 255))
    check_headers({"a": (file, save(tmp_path / "m.png", np.zeros((6, 5), np.uint8)))})
    assert not inspect_pair(file, None, None, {"bands": None, "input_range": [1000, 1255]}).errors


def test_what_is_transparent_or_not_finite_is_ignored(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (6, 5, 4), np.uint8)
    a[..., 3] = (a[..., 3] > 99) * 255
    number = a[..., 0] / np.float32(3)
    number[2, 3] = np.nan
    pairs = {"alpha": (save(tmp_path / "a.png", a), save(tmp_path / "m.png", np.ones((6, 5), np.uint8))),
             "float": (save(tmp_path / "f.tif", number), tmp_path / "m.png")}
    labels = Labels([{"name": "a", "id": 0}, {"name": "b", "id": 1}])
    data = SegDataset({"alpha": pairs["alpha"]}, labels, "imagenet")
    np.testing.assert_array_equal(data.read(0)[1], np.where(a[..., 3] == 0, IGNORE, 1))
    np.testing.assert_array_equal(data.read(0)[0], a[..., :3])
    ids = SegDataset({"float": pairs["float"]}, labels, "imagenet", input_range=[0, 85]).read(0)[1]
    assert (ids == IGNORE).sum() == 1 and ids[2, 3] == IGNORE


# ---- colours

def lab(color):
    """CIELAB of "#3C1098" by its definition: sRGB, D65."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in
              (int(color[i:i + 2], 16) / 255 for i in (1, 3, 5))]
    rows = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
    xyz = [sum(a * b for a, b in zip(row, linear)) / white for row, white in zip(rows, (0.95047, 1, 1.08883))]
    x, y, z = (t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_default_colours_differ_from_each_other_and_from_the_red_of_errors():
    colors = [default_color(i) for i in range(254)]
    assert len(set(colors)) == 254 and all(len(c) == 7 for c in colors)
    assert math.dist(lab("#FFFFFF"), lab("#000000")) == pytest.approx(100, abs=0.01)
    red = lab("#%02X%02X%02X" % WRONG)
    assert min(math.dist(lab(c), red) for c in colors[:20]) > 40 and min(math.dist(lab(c), red) for c in colors) > 25
    first = [lab(c) for c in colors[:20]]
    assert min(math.dist(a, b) for a, b in itertools.combinations(first, 2)) > 28
    assert min(math.dist(lab(a), lab(b)) for a, b in itertools.pairwise(colors)) > 28
    pale = [lab(c) for c in ("#FFFFFF", "#000000", "#CDCDCD", "#EEEEEE")]  # paper, ink, the stripes of "no label"
    assert min(math.dist(a, b) for a in first for b in pale) > 25
    assert Labels(BY_ID).colors.tolist() == [list(bytes.fromhex(c[1:])) for c in colors[:3]]


# ---- soft masks

ROADS = [{"name": "road", "id": 1}, {"name": "land", "id": 0}]  # in any order


def test_greys_above_the_threshold_are_id_1(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name, a in (("g.png", grey), ("rgb.png", np.dstack([grey] * 3)), ("deep.tif", grey.astype(np.uint16))):
        ids = Labels(ROADS, threshold=127).load(save(tmp_path / name, a))
        np.testing.assert_array_equal(ids, np.where(grey > 127, 0, 1))  # road is class 0
    palette = Image.fromarray(255 - grey).convert("P")  # of greys, its indices run the other way
    palette.putpalette(np.repeat(np.arange(255, -1, -1), 3).astype(np.uint8).tobytes())
    palette.putdata(grey.ravel().tolist())
    palette.save(tmp_path / "p.png")
    shown = np.asarray(palette.convert("L"))
    np.testing.assert_array_equal(Labels(ROADS, threshold=99.5).load(tmp_path / "p.png") == 0, shown > 99.5)
    Image.fromarray(grey > 99).save(tmp_path / "bit.png")  # 1 bit: 0 and 1 are black and white
    np.testing.assert_array_equal(Labels(ROADS, threshold=127).load(tmp_path / "bit.png") == 0, grey > 99)
    assert "a colour mask" in refusal(Labels(ROADS, threshold=127).load, save(tmp_path / "c.png", RGB))


def test_soft_masks_go_back_as_black_and_white(tmp_path):
    ids = np.array([[0, 1, 1, 255]], np.uint8)
    labels = Labels(ROADS, [200], 127)
    raw = labels.decode(ids)
    assert raw.tolist() == [[255, 0, 0, 200]]  # road is class 0
    np.testing.assert_array_equal(labels.load(save(tmp_path / "a.png", raw)), ids)
    assert Labels(ROADS, [255], 127).decode(ids).tolist() == [[254, 0, 0, 255]]
    assert Labels(ROADS, [], 127).decode(ids[:, :3]).tolist() == [[255, 0, 0]]
    for ignore in ([], [-9999]):  # no grey means "no class"
        assert "--label-out train writes 255" in refusal(Labels(ROADS, ignore, 127).decode, ids)


def test_a_value_beside_the_greys_must_be_ignored(tmp_path):
    file = save(tmp_path / "a.tif", np.array([[0, 255, 300]], np.uint16))
    assert "0..300" in refusal(Labels(ROADS, threshold=127).load, file)
    assert Labels(ROADS, [300], 127).load(file).tolist() == [[1, 0, IGNORE]]


@pytest.mark.parametrize("classes, threshold, said", [
    (ROADS, -1, "a grey from 0 to 254"), (ROADS, 255, "a grey"), (ROADS, "127", "a grey"), (ROADS, True, "a grey"),
    (ROADS[:1], 127, 'expected two: "id": 0 for greys up to 127'), ([*ROADS, {"name": "x", "id": 2}], 127, "two"),
    ([{"name": "a", "id": 0}, {"name": "b", "id": 255}], 127, "expected two"),
    ([{"name": "a", "color": "#000000"}, {"name": "b", "color": "#ffffff"}], 127, "expected two")])
def test_a_threshold_goes_with_two_ids(classes, threshold, said):
    assert said in refusal(Labels, classes, [], threshold)


def test_a_table_travels_whole():
    labels = Labels(ROADS, [7], 127)
    again = Labels.of({"classes": ROADS, "ignore": [7], "threshold": 127, "name": "roads"})
    assert labels.parts == again.parts == [ROADS, [7], 127]
    assert Labels.of({"classes": ROADS, "ignore": []}).parts == [ROADS, []]


def test_nodata_that_no_table_can_name_is_no_data(tmp_path):
    a = np.array([[1, 2], [-3.4e38, 2]], np.float32)
    with rasterio.open(tmp_path / "a.tif", "w", "GTiff", 2, 2, 1, dtype="float32", nodata=-3.4e38) as f:
        f.write(a, 1)
    labels = Labels([{"name": "a", "id": 1}, {"name": "b", "id": 2}])
    assert labels.load(tmp_path / "a.tif").tolist() == [[0, 1], [IGNORE, 1]]
    assert "whole numbers" in refusal(Labels, [{"name": "a", "id": float("inf")}])
