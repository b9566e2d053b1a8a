"""data/plots.py: exact pixels where a reader would be misled, survival everywhere else."""
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from data import plots

BLUE, RED = (0, 114, 178), (214, 20, 30)  # first line colour, wrong pixel
COLORS = np.array([[255, 255, 255], [10, 20, 30], [200, 0, 0], [0, 150, 0]], np.uint8)


def where(img, colour, box=None):
    """(x, y) arrays of the pixels that have exactly this colour, inside box (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = box or (0, 0, *img.size)
    y, x = np.nonzero((np.asarray(img)[y0:y1, x0:x1] == colour).all(2))
    return x + x0, y + y0


def line_only(img, x0, x1):
    """Like where(), for the first line colour below the legend of an untitled one-line-legend plot."""
    return where(img, BLUE, (x0, 62, x1, img.height))


def test_colorize_and_overlay_are_exact():
    ids = np.array([[0, 1], [3, 255]], np.uint8)
    image = np.array([[[1, 2, 3], [100, 100, 100]], [[7, 8, 9], [11, 12, 13]]], np.uint8)
    assert plots.colorize(ids, COLORS).tolist() == [[[255] * 3, [10, 20, 30]], [[0, 150, 0], [0] * 3]]
    assert plots.overlay(image, ids, COLORS, alpha=.25).tolist() == [  # .75 image + .25 colour
        [[64, 65, 66], [78, 80, 82]], [[5, 44, 7], [11, 12, 13]]]
    np.testing.assert_array_equal(plots.overlay(image, ids, COLORS, alpha=0), image)
    rng = np.random.default_rng(0)
    image, ids = rng.integers(0, 256, (600, 3, 3), np.uint8), rng.integers(0, 4, (600, 3))  # more than two strips
    np.testing.assert_array_equal(plots.overlay(image, ids, COLORS), np.rint((image + COLORS[ids].astype(float)) / 2))
    assert plots.overlay(image, ids, COLORS).dtype == plots.colorize(ids.astype(np.int64), COLORS).dtype == np.uint8


def test_colorize_takes_any_ignore_and_refuses_an_id_without_colour():
    assert plots.colorize(np.array([[0, 2]]), COLORS, ignore=0).tolist() == [[[0] * 3, [200, 0, 0]]]
    with pytest.raises(IndexError):
        plots.colorize(np.array([[4]], np.uint8), COLORS)


def test_a_straight_loss_is_drawn_straight_and_downwards():
    img = plots.curves([{"step": s, "loss": 3 - s / 500} for s in range(0, 1001, 100)])  # few points: not smoothed
    x, y = line_only(img, 0, 510)
    slope, offset = np.polyfit(x, y, 1)
    assert slope > 0 and np.abs(y - slope * x - offset).max() < 4  # dots have radius 2.5
    assert x.max() - x.min() > 400 and y.max() - y.min() > 200  # fills its panel


def test_smoothing_keeps_the_level_and_removes_the_noise():
    noisy = [{"step": s, "loss": 1 + .5 * (-1) ** s} for s in range(400)]
    _, y = line_only(plots.curves(noisy), 0, 510)
    assert y.max() - y.min() < 40  # pixels, of about 240: the raw line is pale
    _, flat = line_only(plots.curves([{"step": s, "loss": v} for s, v in enumerate([.5, 1.5] + [1] * 9)]), 0, 510)
    assert abs(np.median(y) - np.median(flat)) < 4  # 1 lies at the same height


def test_the_best_score_carries_the_ring():
    scores = [.2, .7, .4, .5]
    img = plots.curves([{"step": 10 * i, "val_miou": v} for i, v in enumerate(scores)])
    x, y = line_only(img, 525, 1020)
    ring = y.min() + 6  # the highest ink is the ring of radius 6 around the best
    columns = x[y <= ring]
    dots = np.linspace(x[x > x.min()].min() + 2, x.max() - 2, 4)  # where the four points stand, to a pixel or two
    assert abs(columns.mean() - dots[1]) < 4 and columns.max() - columns.min() >= 10
    assert tuple(np.asarray(img)[ring, round(columns.mean())]) == (255, 255, 255)


def test_a_repeated_step_counts_once_and_a_nan_is_reported():
    rows = [{"step": s, "loss": 2 - s / 10} for s in range(10)]
    assert plots.curves([{"step": 3, "loss": 1.9}, *rows]).tobytes() == plots.curves(rows).tobytes()
    assert plots.curves([*rows, {"step": 9, "loss": math.nan}]).tobytes() != plots.curves(rows).tobytes()
    assert plots.curves([*rows, {"step": 9, "loss": None, "note": "x"}]).tobytes() == plots.curves(rows).tobytes()


@pytest.mark.parametrize("history", [
    [], [{}], [{"step": 0}], [{"step": 0, "loss": 1.0}], [{"step": 7, "loss": 1, "lr": 1e-3, "val_miou": .4}],
    [{"step": s, "loss": math.nan, "lr": 0.0, "val_oa": None} for s in range(3)],
    [{"step": s, "loss": 0.0, "lr": 1e-4, "val_oa": 1.0} for s in range(99)],
    [{"step": s, "loss": 10.0 ** (s % 30 - 15)} for s in range(99)], [{"step": 5, "val_miou": np.float32(.3)}],
    [{"step": s, "loss": -1000.0 - 1e-7 * s} for s in range(3)], [{"step": 1, "loss": math.inf}, {"val_oa": .1}],
    [{"step": 1, **{f"val_iou_{'long name ' * 9}{i}": i / 20 for i in range(20)}}]])
def test_curves_survive(history):
    img = plots.curves(history, "a title " * 40)
    assert img.mode == "RGB" and img.width == 1320 and img.height < 900


def test_ticks_are_round_inside_and_few():
    rng = np.random.default_rng(0)
    for lo, span in zip(rng.normal(0, 100, 300), 10 ** rng.uniform(-4, 6, 300)):
        t = plots.ticks(lo, lo + span, 5)
        step = np.diff(t).mean()
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert 2 <= len(t) <= 6 and min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6
        assert lo - 1e-6 * span <= t[0] and t[-1] <= lo + span * (1 + 1e-6)
    assert plots.ticks(-.1, 1.1, 5, log=True) == [1, 2, 5, 10]
    assert plots.ticks(-15.5, 15.5, 5, log=True)[:2] == [1e-15, 1e-10]
    assert [plots.label(v) for v in (0, .30000000000000004, 2500, 2e-5, -1.5)] == ["0", "0.3", "2.5k", "2e-5", "-1.5"]


def test_confusion_shades_rows_by_share_not_by_count():
    cm = np.array([[5, 5, 0], [0, 10 ** 7, 0], [0, 0, 0]])
    img = plots.confusion(cm, ["a", "b", "c"])
    white, navy = (247, 251, 255), (8, 48, 107)
    x, y = where(img, navy)
    side = x.max() - x.min() + 1
    assert abs(side - 84) <= 2 and abs(y.max() - y.min() + 1 - side) <= 1  # one full cell, the middle one
    left, top = x.min() - side, y.min() - side
    pixel = lambda row, col: tuple(np.asarray(img)[top + row * side + 8, left + col * side + 8])
    assert pixel(1, 1) == navy and pixel(0, 2) == pixel(1, 0) == white
    assert pixel(0, 0) == pixel(0, 1) not in (navy, white)
    assert {tuple(p) for p in np.asarray(img)[top + 2 * side + 4:top + 3 * side - 4, left + 8]} == {
        (205,) * 3, (238,) * 3}  # absent class: stripes


@pytest.fixture
def texts(monkeypatch):
    """Collects the (x0, y0, x1, y1) of every text that is drawn, the rotated ones included."""
    boxes, text, upright = [], ImageDraw.ImageDraw.text, plots.upright

    def record(self, xy, s, fill, font, anchor="la"):
        if s and self.mode == "RGB":  # a rotated text is drawn on a mask of its own first
            boxes.append(self.textbbox(xy, s, font, anchor))
        text(self, xy, s, fill, font, anchor)

    def record_upright(img, x, bottom, s, fill):
        boxes.append((x - 8, bottom - ImageDraw.Draw(img).textlength(s, ImageFont.load_default(13)), x + 8, bottom))
        upright(img, x, bottom, s, fill)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    monkeypatch.setattr(plots, "upright", record_upright)
    return boxes


def assert_clear(img, texts):
    b = np.array(texts)
    assert (b[:, :2] >= 4).all() and (b[:, 2:] <= np.array(img.size) - 4).all(), "clipped"
    meet = (b[:, None, :2] < b[None, :, 2:]).all(2) & (b[None, :, :2] < b[:, None, 2:]).all(2)
    assert meet.sum() == len(b), "two texts overlap"  # each meets only itself


@pytest.mark.parametrize("k", [1, 2, 8, 16, 20])
@pytest.mark.parametrize("words", [0, 9])
def test_confusion_text_is_neither_clipped_nor_overlapping(k, words, texts):
    names = [f"{'long name ' * (i % 4 * words)}{i}" for i in range(k)]
    cm = np.random.default_rng(k).integers(0, 10 ** 9, (k, k)) * 1000
    cm[k // 2] = 0
    img = plots.confusion(cm, names, "title " * 10 * words)
    assert len(texts) == k * k + 3 * k + 4 + (words > 0) and max(img.size) < 1500
    assert_clear(img, texts)


def test_text_of_curves_and_samples_is_clear(texts):
    rows = [{"step": s, "loss": 10 ** (s / 9999), "lr": 1e-4 * s, **{f"val_score_{i}": .1 * i for i in range(9)}}
            for s in range(0, 123457, 1000)]
    assert_clear(plots.curves(rows, "title " * 90), texts)
    texts.clear()
    assert_clear(plots.curves([{"step": 10 ** 6, "loss": 1234.5678901, "lr": 1.2345e-5, "val_oa": .123456789}]), texts)
    texts.clear()
    image, ids = np.zeros((90, 160, 3), np.uint8), np.zeros((90, 160), np.uint8)
    names = [f"{'a long class name ' * (i % 7 * 3)}{i}" for i in range(20)]
    sheet = plots.samples([(image, ids, ids, "dir/" * 99)] * 3, names, np.zeros((20, 3), np.uint8))
    assert len(texts) == 4 + 3 + 22
    assert_clear(sheet, texts)


def test_wrong_names_are_an_error():
    with pytest.raises(ValueError):
        plots.confusion(np.eye(3, dtype=int), ["a", "b"])


@pytest.mark.parametrize("side", [256, 64])  # shown pixel by pixel, and enlarged four times
def test_error_panel_marks_exactly_the_wrong_pixels(side):
    rng = np.random.default_rng(0)
    truth, pred = rng.integers(0, 4, (2, side, side)).astype(np.uint8)
    truth[rng.random(truth.shape) < .1] = 255
    image = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
    sheet = np.asarray(plots.samples([(image, truth, pred, "x.png")], list("abcd"), COLORS))
    n = 256 // side
    columns = zip(("image", "truth", "pred", "err"), range(20, 999, 264))
    shown = {head: sheet[44:300:n, x:x + 256:n] for head, x in columns}
    np.testing.assert_array_equal(shown["image"], image)
    np.testing.assert_array_equal(shown["pred"], COLORS[pred])
    np.testing.assert_array_equal(shown["truth"][truth != 255], COLORS[truth[truth != 255]])
    np.testing.assert_array_equal((shown["err"] == RED).all(2), (truth != pred) & (truth != 255))
    assert (np.ptp(shown["err"][(truth == pred) | (truth == 255)].astype(int), axis=1) == 0).all()  # the rest is grey


def test_samples_survive_and_stay_small():
    rng = np.random.default_rng(0)
    shapes = (2000, 1500), (30, 900), (900, 30), (1, 1)
    rows = [(np.zeros((h, w, 3), np.uint8), None if w == 900 else rng.integers(0, 4, (h, w)),
             rng.integers(0, 4, (h, w)), "folder/" * 60 + "name.png") for h, w in shapes]
    names = ["a very long class name " * 20, "", "b", "c"]
    img = plots.samples(rows, names, COLORS)
    assert img.width == 20 + 4 * 264 - 8 + 20 and img.height < 4 * 300 + 200
    assert plots.samples([], names, COLORS).width == plots.samples(rows[1:2], names, COLORS).width == 560  # no truth


def test_fit_keeps_both_ends_and_the_limit():
    draw, font = ImageDraw.Draw(Image.new("L", (9, 9))), ImageFont.load_default(13)
    for limit in (20, 60, 200):
        text = plots.fit("folder/" * 9 + "name_17.png", limit)
        assert draw.textbbox((0, 0), text, font)[2] <= limit and "..." in text
    assert plots.fit("short", 200) == "short" and text.startswith("folder") and text.endswith("17.png")
