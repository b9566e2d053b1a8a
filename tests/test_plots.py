"""data/plots.py: exact colours where a reader would be misled, survival everywhere else."""
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from data import plots

BLUE, RED = (0, 114, 178), (214, 20, 30)  # first line colour, wrong pixel
LIGHT, DARK = (238, 238, 238), (205, 205, 205)  # stripes: no label
NAVY = (8, 48, 107)  # a share of 100 %
SWATCH = 11 * 11  # pixels of a legend's colour inside its outline
COLORS = np.array([[255, 255, 255], [10, 20, 30], [200, 0, 0], [0, 150, 0]], np.uint8)


def amount(img, colour):
    """How many pixels have exactly this colour."""
    return int((np.asarray(img) == colour).all(2).sum())


def places(img, colour):
    """x, y of the pixels that have exactly this colour."""
    y, x = np.nonzero((np.asarray(img) == colour).all(2))
    return x, y


def assert_margin_is_empty(img):
    a = np.asarray(img)
    for edge in (a[:8], a[-8:], a[:, :8], a[:, -8:]):
        assert (edge == 255).all()


# ---- masks

def test_colorize_and_overlay_are_exact():
    ids = np.array([[0, 1], [3, 255]], np.uint8)
    image = np.array([[[1, 2, 3], [100, 100, 100]], [[7, 8, 9], [11, 12, 13]]], np.uint8)
    assert plots.colorize(ids, COLORS).tolist() == [[[255] * 3, [10, 20, 30]], [[0, 150, 0], [0] * 3]]
    assert plots.overlay(image, ids, COLORS, alpha=.25).tolist() == [  # .75 image + .25 colour
        [[64, 65, 66], [78, 80, 82]], [[5, 44, 7], [11, 12, 13]]]
    np.testing.assert_array_equal(plots.overlay(image, ids, COLORS, alpha=0), image)
    rng = np.random.default_rng(0)
    image, ids = rng.integers(0, 256, (600, 3, 3), np.uint8), rng.integers(0, 4, (600, 3))
    half = np.rint((image + COLORS[ids].astype(float)) / 2)
    np.testing.assert_array_equal(plots.overlay(image, ids, COLORS), half)
    assert plots.overlay(image, ids, COLORS).dtype == plots.colorize(ids, COLORS).dtype == np.uint8


def test_a_quick_look_has_a_legend_of_the_classes_that_are_in_it():
    image = np.full((50, 300, 3), 60, np.uint8)
    ids = np.zeros((50, 300), np.uint8)
    ids[:, 200:] = 255
    one = np.asarray(plots.quick_look(image, ids, ["land", "water"], np.uint8([[0, 200, 0], [0, 0, 200]])))
    np.testing.assert_array_equal(one[:50], plots.overlay(image, ids, np.uint8([[0, 200, 0]])))
    below = one[50:].reshape(-1, 3).tolist()
    assert [0, 200, 0] in below and [0, 0, 200] not in below
    small = plots.quick_look(image[:1, :1], ids[:1, :1], ["a class of a long name"] * 2, np.uint8([[1, 2, 3]] * 2))
    assert small.width >= 200


def test_colorize_refuses_an_id_without_colour():
    with pytest.raises(IndexError):
        plots.colorize(np.array([[4]], np.uint8), COLORS)


# ---- curves

@pytest.mark.parametrize("sign", [1, -1])
def test_a_falling_loss_is_drawn_downwards(sign):
    img = plots.curves([{"step": s, "loss": 3 - sign * s / 500} for s in range(0, 1001, 100)])
    x, y = places(img.crop((0, 0, 500, img.height - 60)), BLUE)  # without the legend; y counts from the top
    assert sign * np.corrcoef(x, y)[0, 1] > 0.5


def test_one_spike_does_not_flatten_the_rest():
    rows = [{"step": s, "loss": 1 + .5 * math.sin(s)} for s in range(50)]
    img = plots.curves([*rows, {"step": 50, "loss": 1e6}])
    _, y = places(img.crop((0, 0, 400, img.height - 60)), BLUE)  # without the legend and the way to the spike
    assert np.ptp(np.percentile(y, [10, 90])) > 50  # pixels


def test_smoothing_is_the_centred_mean():
    values = np.random.default_rng(0).normal(size=200)
    got = plots.smoothed(np.stack([np.arange(200), values]))
    assert got[0].tolist() == list(range(200))
    want = [np.mean(values[max(0, i - 4):i + 5]) for i in range(200)]  # 200 // 50 on each side
    np.testing.assert_allclose(got[1], want)


def test_a_repeated_step_counts_once_and_a_nan_is_reported():
    rows = [{"step": s, "loss": 2 - s / 10} for s in range(10)]
    assert plots.curves([{"step": 3, "loss": 1.9}, *rows]).tobytes() == plots.curves(rows).tobytes()
    assert plots.curves([*rows, {"step": 9, "loss": math.nan}]).tobytes() != plots.curves(rows).tobytes()
    assert plots.curves([*rows, {"step": 9, "loss": None, "note": "x"}]).tobytes() == plots.curves(rows).tobytes()


@pytest.mark.parametrize("history", [
    [], [{}], [{"step": 0}], [{"step": 0, "loss": 1.0}],
    [{"step": 7, "loss": 1, "lr": 1e-3, "val_miou": .4}],
    [{"step": s, "loss": math.nan, "lr": 0.0, "val_oa": None} for s in range(3)],
    [{"step": s, "loss": 0.0, "lr": 1e-4, "val_oa": 1.0} for s in range(99)],
    [{"step": s, "loss": 10.0 ** (s % 30 - 15)} for s in range(99)],
    [{"step": 5, "val_miou": np.float32(.3)}],
    [{"step": s, "loss": -1000.0 - 1e-7 * s} for s in range(3)],
    [{"step": 1, "loss": math.inf}, {"val_oa": .1}],
    [{"step": s, "loss": 10 ** (s / 9999), "lr": 1e-4 * s} for s in range(0, 123457, 1000)],
    [{"step": 10 ** 6, "loss": 1234.5678901, "lr": 1.2345e-5, "val_oa": .123456789}],
    [{"step": 1, **{f"val_iou_{'long name ' * 9}{i}": i / 20 for i in range(20)}}]])
def test_curves_survive(history):
    img = plots.curves(history, "a title " * 40)
    assert img.mode == "RGB" and img.width == 1320 and img.height < 900
    assert_margin_is_empty(img)


def test_ticks_are_round_inside_and_few():
    rng = np.random.default_rng(0)
    for lo, span in zip(rng.normal(0, 100, 300), 10 ** rng.uniform(-4, 6, 300)):
        t = plots.ticks(lo, lo + span, 5)
        step = np.diff(t).mean()
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert 2 <= len(t) <= 6 and min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6
        assert lo - 1e-6 * span <= t[0] and t[-1] <= lo + span * (1 + 1e-6)
    shown = [plots.label(v) for v in (0, .30000000000000004, 2500, 2e-5, -1.5)]
    assert shown == ["0", "0.3", "2.5k", "2e-5", "-1.5"]


# ---- bars

def bars_of(score):
    """A picture of one bar a split, whose legend has the colour once."""
    return plots.bars([{"step": 10, "scores": {"train": {"f1": score}, "val": {"f1": None}}}], "a run")


def test_bars_are_as_high_as_the_scores():
    high = {score: amount(bars_of(score), BLUE) - SWATCH for score in (0, 0.25, 0.5, 1, 2, None, math.nan)}
    assert high[0] == high[None] == high[math.nan] == 0
    assert 0 < high[1] == high[2] == 2 * high[0.5] == 4 * high[0.25]


def test_bars_survive_and_stay_small():
    rows = [{"step": s, "scores": {"train": {"f1": .5, "oa": .7}, "val": {"f1": .1}}} for s in range(0, 90000, 100)]
    for history in ([], [{"step": 1, "loss": 2.0}], rows[:1], rows):
        img = plots.bars([*history, {"step": 5, "loss": 3.0}], "a title " * 40)
        assert_margin_is_empty(img)
        assert img.width < 1000 and img.height < 700
    assert plots.bars(rows).size == plots.bars(rows[:12]).size != plots.bars(rows[:11]).size


# ---- confusion matrix

def test_confusion_shades_rows_by_share_not_by_count():
    few = plots.confusion(np.array([[5, 5], [0, 9]]), ["a", "b"])
    many = plots.confusion(np.array([[5, 5], [0, 9 * 10 ** 7]]), ["a", "b"])
    assert amount(few, NAVY) == pytest.approx(83 * 83, rel=.1)  # one field but for its text
    assert amount(few, NAVY) == amount(many, NAVY)
    half = amount(plots.confusion(np.array([[5, 5], [5, 5]]), ["a", "b"]), NAVY)
    assert half == 0 < amount(plots.confusion(np.eye(2, dtype=int), ["a", "b"]), NAVY)


def test_an_absent_class_is_hatched():
    there, absent = (plots.confusion(np.diag([3, n]), ["a", "b"]) for n in (1, 0))
    assert amount(absent, LIGHT) > 2 * 84 * 84 / 2 and amount(absent, DARK) > 2 * 84 * 84 / 6
    assert amount(there, LIGHT) + amount(there, DARK) < 100  # of text


@pytest.mark.parametrize("k", [1, 2, 8, 16, 20])
@pytest.mark.parametrize("words", [0, 9])
def test_confusion_survives_and_is_not_clipped(k, words):
    names = [f"{'long name ' * (i % 4 * words)}{i}" for i in range(k)]
    cm = np.random.default_rng(k).integers(0, 10 ** 9, (k, k)) * 1000
    cm[k // 2] = 0
    img = plots.confusion(cm, names, "title " * 10 * words)
    assert_margin_is_empty(img)
    assert max(img.size) < 1500


def test_a_wrong_number_of_names_is_an_error():
    for names in (["a", "b"], ["a", "b", "c", "d"]):
        with pytest.raises(ValueError):
            plots.confusion(np.eye(3, dtype=int), names)
    with pytest.raises(ValueError):
        plots.samples([], ["a"], COLORS)


# ---- contact sheets

@pytest.mark.parametrize("side", [256, 64])  # shown pixel by pixel, and enlarged four times
def test_samples_show_every_class_and_every_error(side):
    rng = np.random.default_rng(0)
    truth, pred = rng.integers(0, 4, (2, side, side)).astype(np.uint8)
    truth[rng.random(truth.shape) < .1] = 255
    image = np.zeros((side, side, 3), np.uint8)
    sheet = plots.samples([(image, truth, pred, "x.png")], list("abcd"), COLORS)
    n = (256 // side) ** 2
    for c in (1, 2, 3):
        assert amount(sheet, COLORS[c]) == n * ((truth == c).sum() + (pred == c).sum()) + SWATCH
    assert amount(sheet, RED) == n * ((truth != pred) & (truth != 255)).sum() + SWATCH
    right = plots.samples([(image, truth, truth, "x.png")], list("abcd"), COLORS)
    assert amount(right, RED) == SWATCH
    without = plots.samples([(image, None, pred, "x.png")], list("abcd"), COLORS)
    assert amount(without, COLORS[2]) == n * (pred == 2).sum() + SWATCH and amount(without, RED) == 0


def test_samples_survive_and_stay_small():
    rng = np.random.default_rng(0)
    shapes = (2000, 1500), (30, 900), (900, 30), (1, 1)
    rows = [(np.zeros((h, w, 3), np.uint8), None if w == 900 else rng.integers(0, 4, (h, w)),
             rng.integers(0, 4, (h, w)), "folder/" * 60 + "name.png") for h, w in shapes]
    names = ["a very long class name " * 20, "", "b", "c"]
    img = plots.samples(rows, names, COLORS)
    assert img.width < 4 * 280 and img.height < 4 * 310 + 200
    assert_margin_is_empty(img)
    without = plots.samples(rows[1:2], names, COLORS)
    assert plots.samples([], names, COLORS).width == without.width < img.width


def test_bars_of_reliability_are_as_high_as_the_accuracy():
    share, confidence = np.full(4, 0.25), np.array([0.1, 0.4, 0.6, 0.9])
    heights = []
    for accuracy in (np.zeros(4), np.full(4, 0.5), np.ones(4)):
        img = plots.reliability(share, confidence, accuracy, "a title")
        heights.append(amount(img, plots.BRIGHT[0]))
        assert_margin_is_empty(img)
    field = 300 * 300
    assert heights[0] < 0.05 * field < 0.45 * field < heights[1] < 0.52 * field < 0.9 * field < heights[2]
    empty = np.array([0, 0.5, 0, 0.5])
    half = plots.reliability(empty, np.where(empty, confidence, np.nan), np.where(empty, 1, np.nan))
    assert amount(half, plots.BRIGHT[0]) < 0.55 * field  # bins without a pixel have no bar


def test_cards_frame_what_is_wrong():
    image = np.full((4, 8, 3), 90, np.uint8)
    right, wrong = (image, ["a", "b 0.9", "c"], False), (image, ["a", "b 0.9", "c"], True)
    assert amount(plots.cards([("x", [right] * 9)]), RED) == 0
    frame = 2 * 2 * (132 + 64)  # two pixels wide around 128 x 64
    assert frame < amount(plots.cards([("x", [right, wrong])]), RED) < 2 * frame  # and red text
    for sections in ([], [("none", [])], [("many", [right] * 20), ("long title " * 50, [wrong])]):
        img = plots.cards(sections)
        assert_margin_is_empty(img)
        assert amount(img, (90, 90, 90)) >= 128 * 64 * sum(len(items) for _, items in sections)


def test_shorten_keeps_both_ends_and_the_limit():
    draw, font = ImageDraw.Draw(Image.new("L", (9, 9))), ImageFont.load_default(13)
    for limit in (20, 60, 200):
        text = plots.shorten("folder/" * 9 + "name_17.png", limit)
        assert draw.textbbox((0, 0), text, font)[2] <= limit and "..." in text
    assert plots.shorten("short", 200) == "short" and text.startswith("folder") and text.endswith("17.png")
