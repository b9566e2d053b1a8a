"""Curves, bars, confusion matrix, coloured masks and contact sheets: numpy in, Pillow images out.

    write("curves.png", curves(history, "demo: fpn"))
    write("samples.png", samples([(image, truth, prediction, "scene_001")], names, colors))

Pictures are put together from parts: column() and row() place them below and beside each other.
All lengths are in pixels.
"""
import functools
import math
import numbers
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .common import IGNORE, even_sample

Picture = Image.Image
Color = tuple[int, int, int]
Series = dict[str, np.ndarray]  # {name: (2, N) steps and values}

INK = (45, 45, 45)  # text
SOFT = (115, 115, 115)  # text of less weight
GRID = (225, 225, 225)
WRONG = (214, 20, 30)  # errors

# Okabe and Ito's colours, which are told apart with any colour vision, and darker once more.
BRIGHT = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167),
          (230, 159, 0), (86, 180, 233), (90, 90, 90))
LINES = BRIGHT + tuple((r * 9 // 20, g * 9 // 20, b * 9 // 20) for r, g, b in BRIGHT)

# ColorBrewer's Blues for shares of 0, 0.35, 0.7 and 1.
HEAT = np.array([(247, 251, 255), (158, 202, 225), (49, 130, 189), (8, 48, 107)])

LEGEND = 240  # at least so wide is that of quick_look()
PANEL = 256  # longer side of a picture in samples()
ROW = 20  # height of a line of text
MANY = 60  # a curve of more points has no dots, and the loss is smoothed

# font(size): Pillow >= 10.1 brings an outline font.
font = functools.cache(ImageFont.load_default)


# ---- parts

def blank(wide: int, high: int) -> Picture:
    return Image.new("RGB", (max(1, wide), max(1, high)), "white")


def column(parts: list[Picture], gap: int = 8) -> Picture:
    """Pictures below each other."""
    # No gap after the last one.
    high = sum(part.height + gap for part in parts) - gap
    img = blank(max([part.width for part in parts], default=1), high)
    y = 0
    for part in parts:
        img.paste(part, (0, y))
        y += part.height + gap
    return img


def row(parts: list[Picture], gap: int = 8) -> Picture:
    """Pictures beside each other."""
    wide = sum(part.width + gap for part in parts) - gap
    img = blank(wide, max([part.height for part in parts], default=1))
    x = 0
    for part in parts:
        img.paste(part, (x, 0))
        x += part.width + gap
    return img


def page(parts: list[Picture], gap: int = 8) -> Picture:
    """Pictures below each other with a margin around them."""
    return ImageOps.expand(column(parts, gap), 20, "white")


def cell(part: Picture, wide: int, high: int) -> Picture:
    """A part in a larger white field, so that columns line up."""
    img = blank(wide, high)
    img.paste(part)
    return img


def scaled(array: np.ndarray, side: int, is_mask: bool = False) -> Picture:
    """The picture (H, W) or (H, W, 3) with a longer side of `side` pixels."""
    h, w = array.shape[:2]
    scale = side / max(h, w)
    high = max(1, round(scale * h))
    wide = max(1, round(scale * w))
    # Nearest shows the pixels of a small image, and invents no class in a mask.
    smooth = scale < 1 and not is_mask
    method = Image.LANCZOS if smooth else Image.NEAREST
    return Image.fromarray(array).resize((wide, high), method)


def hatch(h: int, w: int) -> np.ndarray:
    """(h, w, 3) uint8 diagonal stripes for "no label"."""
    # Black or grey may be the colour of a class.
    diagonal = np.add.outer(np.arange(h), np.arange(w))
    stripes = np.where(diagonal % 8 < 2, 205, 238).astype(np.uint8)
    return stripes[..., None].repeat(3, 2)


# ---- text

def width(text: str, size: int = 13) -> int:
    return math.ceil(font(size).getbbox(text)[2])


def shorten(text: str, limit: int, size: int = 13) -> str:
    """Text of at most `limit` pixels, cut in the middle."""
    if width(text, size) <= limit:
        return text
    # Names and paths tend to differ at their ends: both ends stay. A letter is wider than a pixel,
    # which bounds the number of tries.
    for kept in range(min(len(text), limit) // 2, 0, -1):
        short = text[:kept] + "..." + text[-kept:]
        if width(short, size) <= limit:
            return short
    return "..."


def line(text: str, limit: int, size: int = 13, color: Color = INK) -> Picture:
    """One line of text, at most `limit` pixels wide."""
    text = shorten(text, limit, size)
    img = blank(width(text, size), size + 7)
    write_at(img, 0, img.height // 2, text, "lm", size, color)
    return img


def write_at(img: Picture, x: float, y: float, text: str, anchor: str,
             size: int = 13, color: Color = INK) -> None:
    """Text at a place; `anchor` is Pillow's: l, m, r across and a (top), m, s (baseline) down."""
    ImageDraw.Draw(img).text((x, y), text, color, font(size), anchor)


def label(v: float) -> str:
    """A number at an axis: 2500 -> 2.5k, 2e-05 -> 2e-5."""
    if 1000 <= abs(v) < 1e9:
        return f"{v / 1000:.8g}k"
    return f"{v:.8g}".replace("e-0", "e-").replace("e+0", "e")


def flow(items: list[tuple], limit: int) -> tuple[list[tuple], int]:
    """Legend items (swatch, text) -> [(x, y, swatch, text)] in lines of `limit`, their height."""
    if not items:
        return [], 0
    placed = []
    x = y = 0
    for swatch, text in items:
        # 20 for the swatch before the text, 18 before the next item.
        text = shorten(text, limit - 20)
        if x and x + 20 + width(text) > limit:
            x = 0
            y += ROW
        placed.append((x, y, swatch, text))
        x += 20 + width(text) + 18
    return placed, y + ROW


def legend(img: Picture, placed: list[tuple], x0: int, y0: int) -> None:
    """Draw what flow() has placed; a swatch is a colour or a 13 x 13 image."""
    draw = ImageDraw.Draw(img)
    for x, y, swatch, text in placed:
        left = x0 + x
        top = y0 + y + 4
        img.paste(swatch, (left, top, left + 13, top + 13))
        # With an outline a white class stays visible.
        draw.rectangle((left, top, left + 12, top + 12), outline=SOFT)
        write_at(img, left + 20, top + 6, text, "lm")


def legend_of(items: list[tuple], wide: int) -> Picture:
    placed, high = flow(items, wide)
    img = blank(wide, high)
    legend(img, placed, 0, 0)
    return img


# ---- training curves

def ticks(lo: float, hi: float, n: int) -> list[float]:
    """About n round numbers (1, 2 or 5 times a power of ten) in lo..hi."""
    span = hi - lo
    # The smallest step that gives no more than n intervals.
    unit = 10.0 ** math.floor(math.log10(span / n))
    for m in (1, 2, 5, 10):
        step = m * unit
        if step * n >= span * 0.999:
            break
    # Limits that are round numbers themselves count, whatever the rounding.
    first = math.ceil(lo / step - 1e-9)
    last = math.floor(hi / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


class Axes(NamedTuple):
    """Where steps 0..last and values lo..hi lie in a picture."""
    box: tuple[int, int, int, int]  # left, top, right, bottom
    last: float
    lo: float
    hi: float

    def pixels(self, xy: np.ndarray) -> np.ndarray:
        """(2, N) steps and values -> (N, 2) x, y."""
        left, top, right, bottom = self.box
        # Dots at the first and last step need room.
        x = left + 8 + xy[0] / self.last * (right - left - 16)
        share = (xy[1] - self.lo) / (self.hi - self.lo)
        # Pillow cannot draw to places that are very far outside.
        share = np.clip(share, -1, 2)
        y = bottom - share * (bottom - top)
        return np.stack([x, y], 1)

    def at(self, step: float, value: float) -> tuple[int, int]:
        x, y = self.pixels(np.array([[step], [value]]))[0]
        return round(x), round(y)


def draw_axes(img: Picture, last: float, lo: float, hi: float) -> Axes:
    """Frame, grid and tick labels."""
    pad = 0.05 * (hi - lo)
    if hi - lo <= 1e-6 * abs(hi):
        # A constant gets room on both sides.
        pad = 0.1 * abs(hi) + 0.5 * (hi == 0)
    lo = lo - pad
    hi = hi + pad
    # Room at the left for the longest number.
    marks = ticks(lo, hi, 5)
    left = 8 + max([12, *(width(label(v)) for v in marks)])
    right = img.width - 12
    bottom = img.height - 38
    axes = Axes((left, 8, right, bottom), last, lo, hi)

    draw = ImageDraw.Draw(img)
    # Grid lines first, so that the frame lies on top.
    for v in marks:
        _, y = axes.at(0, v)
        draw.line((left, y, right, y), GRID)
        write_at(img, left - 6, y, label(v), "rm", 12, SOFT)
    for step in ticks(0, last, max(2, (right - left) // 80)):
        x, _ = axes.at(step, lo)
        draw.line((x, 8, x, bottom), GRID)
        write_at(img, x, bottom + 6, label(step), "ma", 12, SOFT)
    write_at(img, (left + right) // 2, bottom + 22, "step", "ma", 12, SOFT)
    draw.line((left, 8, left, bottom, right, bottom), SOFT)
    return axes


def stroke(img: Picture, axes: Axes, xy: np.ndarray, color: Color,
           thick: float = 0, dot: float = 0) -> None:
    """Line `thick` wide and dots of radius `dot` through (2, N) steps and values, clipped."""
    # Pillow's own lines are jagged: draw a mask four times as large and shrink it.
    left, top, right, bottom = axes.box
    mask = Image.new("L", (4 * (right - left), 4 * (bottom - top)))
    draw = ImageDraw.Draw(mask)
    xy = 4 * (axes.pixels(xy) - (left, top))
    points = [tuple(p) for p in xy]
    if thick and len(points) > 1:
        # Round joints are slow.
        joint = "curve" if len(points) < 1000 else None
        draw.line(points, 255, round(4 * thick), joint)
    radius = 4 * dot
    for x, y in points if dot else ():
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), 255)
    img.paste(color, axes.box, mask.reduce(4))


def smoothed(xy: np.ndarray) -> np.ndarray:
    """The centred mean over 4 % of the points, which does not lag behind."""
    n = len(xy[1])
    window = np.ones(2 * (n // 50) + 1)
    total = np.convolve(xy[1], window, "same")
    count = np.convolve(np.ones(n), window, "same")
    return np.stack([xy[0], total / count])


def panel(heading: str, series: Series, last: float, wide: int, smooth: bool = False,
          mark_best: bool = False) -> Picture:
    """Heading, plot and legend; the names of the series stand in the legend."""
    if not series:
        return cell(line(f"{heading}: no data", wide, 15), wide, 300)
    img = blank(wide, 300)
    values = np.concatenate([xy[1] for xy in series.values()])
    lo = values.min()
    hi = values.max()
    # One spike of the loss must not flatten the rest: it leaves the frame.
    usual = 3 * np.quantile(values, 0.9)
    if smooth and 0 < usual < hi:
        hi = usual
    axes = draw_axes(img, last, lo, hi)
    items = []
    for i, (name, xy) in enumerate(series.items()):
        color = LINES[i % len(LINES)]
        items.append((color, name))
        many = len(xy[0]) > MANY
        if many and smooth:
            # The raw values stay visible, but pale.
            pale = tuple((255 + c) // 2 for c in color)
            stroke(img, axes, xy, pale, 0.8)
            xy = smoothed(xy)
        stroke(img, axes, xy, color, 1.8, 0 if many else 2.5)
        if mark_best:
            best = xy[1].argmax()
            stroke(img, axes, xy[:, [best]], color, dot=5)
    return column([line(heading, wide, 15), img, legend_of(items, wide)])


def read_series(history: list[dict]) -> tuple[Series, int]:
    """The rows' numbers by key, and how many of the losses are not finite."""
    found = {}
    lost = 0
    for entry in history:
        if "step" not in entry:
            continue
        for key, value in entry.items():
            if not isinstance(value, numbers.Real):
                continue
            if math.isfinite(value):
                # A resumed run repeats steps: the last one counts.
                found.setdefault(key, {})[entry["step"]] = value
            elif "loss" in key:
                lost += 1
    series = {}
    for key, values in found.items():
        series[key] = np.array(sorted(values.items()), float).T
    return series, lost


def curves(history: list[dict], title: str = "") -> Picture:
    """Rows {"step": 20, "loss": 1.2, "lr": 1e-3, "val_miou": .4} -> three panels.

    Any key but step may be missing; the losses are all keys with "loss" in them.
    """
    series, lost = read_series(history)
    last = max([1, *(xy[0, -1] for xy in series.values())])
    losses = {}
    scores = {}
    rates = {}
    for key, xy in series.items():
        if "loss" in key:
            losses[key] = xy
        elif key.startswith("val_"):
            step, value = xy[:, xy[1].argmax()]
            scores[f"{key[4:]}, best {value:.4f} at {step:.0f}"] = xy
        elif key == "lr":
            rates[key] = xy

    heading = "loss"
    if lost:
        heading += f", {lost} values not finite"
    return page([
        line(title, 1280, 18),
        row([
            panel(heading, losses, last, 480, smooth=True),
            panel("validation", scores, last, 480, mark_best=True),
            panel("learning rate", rates, last, 260),
        ], 30),
    ], 16)


# ---- bars

def bars(history: list[dict], title: str = "") -> Picture:
    """Rows {"step": 20, "scores": {"train": {"accuracy": .9, ...}, "val": {...}}} -> bars of 0..1.

    Rows without "scores" are passed over; of more than 12 the first, the last and an even choice
    between are drawn.
    """
    # Of repeated steps the last one counts.
    rows = {entry["step"]: entry["scores"] for entry in history if "scores" in entry}
    steps = even_sample(sorted(rows), 12)
    # Splits and names in their order of appearance.
    splits = {}
    names = {}
    for step in steps:
        for split, scores in rows[step].items():
            splits[split] = None
            names |= dict.fromkeys(scores)
    colors = {name: LINES[i % len(LINES)] for i, name in enumerate(names)}

    # All bars of a step take about 40 pixels, and at least 6 each.
    bar = max(6, 40 // max(1, len(names)) + 4)
    wide = 40 + max(480, len(steps) * (bar * len(names) + 22))
    items = [(color, name) for name, color in colors.items()]
    parts = [line(title, wide, 18), legend_of(items, wide)]
    for split in splits:
        groups = {step: rows[step].get(split, {}) for step in steps}
        parts += [line(split, wide, 15), bar_panel(groups, colors, bar, wide)]
    if not splits:
        parts.append(line("no data", wide, 15, SOFT))
    return page(parts)


def bar_panel(groups: dict[int, dict], colors: dict, bar: int, wide: int) -> Picture:
    """{step: {name: score}} -> a group of bars a step, each `bar` wide."""
    # A score of 1 is 200 pixels high.
    img = blank(wide, 240)
    draw = ImageDraw.Draw(img)
    base = 210
    for v in (0, 0.25, 0.5, 0.75, 1):
        y = round(base - 200 * v)
        draw.line((40, y, wide, y), GRID)
        write_at(img, 34, y, label(v), "rm", 12, SOFT)
    x = 51
    for step, scores in groups.items():
        middle = x + bar * len(colors) // 2
        write_at(img, middle, base + 6, label(step), "ma", 12, SOFT)
        for name, color in colors.items():
            v = scores.get(name)
            # A score that is not defined leaves a gap.
            if v is not None and math.isfinite(v):
                high = round(200 * min(max(v, 0), 1))
                draw.rectangle((x, base - high, x + bar - 2, base), color)
            x += bar
        x += 22
    draw.line((40, base, wide, base), SOFT)
    write_at(img, 34, base + 6, "step", "ra", 12, SOFT)
    return img


# ---- confusion matrix

def confusion(cm: np.ndarray, names: list[str], title: str = "") -> Picture:
    """(K, K) counts, rows true, columns predicted -> heat map of each row's shares.

    A row without counts is hatched.
    """
    cm = np.asarray(cm)
    k = len(cm)
    if len(names) != k:
        raise ValueError(f"{len(names)} names for {k} classes")
    names = [shorten(name, 220) for name in names]
    support = cm.sum(1)
    counts = [f"{n:,}" for n in support]
    side = min(84, max(46, 640 // k))
    header = max(width(name) for name in names)
    # Column names read upwards when one does not fit.
    upright = header > side - 8

    # The first field begins at left, top; names stand before and above it, counts behind.
    left = header + 8
    top = 8 + (header if upright else ROW)
    right = left + k * side
    last = max(width(text) for text in [*counts, "support"])
    img = blank(right + 14 + last, top + k * side + 1)
    write_at(img, right + 14, top - 8, "support", "ls", 13, SOFT)
    for i, name in enumerate(names):
        middle = side * i + side // 2
        write_at(img, left - 8, top + middle, name, "rm")
        write_at(img, right + 14, top + middle, counts[i], "lm")
        if upright:
            text = line(name, 220).rotate(90, expand=True)
            img.paste(text, (left + middle - ROW // 2, top - 8 - text.height))
        else:
            write_at(img, left + middle, top - 8, name, "ms")
        for j in range(k):
            box = cm_cell(cm[i, j], support[i], side)
            img.paste(box, (left + j * side, top + i * side))
    ImageDraw.Draw(img).rectangle((left, top, right, top + k * side), outline=SOFT)
    note = "rows: true class, columns: predicted class; % of the true class"
    wide = max(img.width, width(note))
    return page([line(title, wide, 18), line(note, wide, 13, SOFT), img])


def cm_cell(count: int, support: int, side: int) -> Picture:
    """A field of the heat map with its share in per cent."""
    if support == 0:
        img = Image.fromarray(hatch(side, side))
        write_at(img, side // 2, side // 2, "-", "mm")
        return img
    share = count / support
    shade = [np.interp(share, (0, 0.35, 0.7, 1), channel) for channel in HEAT.T]
    img = blank(side, side)
    # A white line at the left and top parts the fields.
    img.paste(tuple(round(v) for v in shade), (1, 1, side, side))
    # 0.0 is a few pixels, 0 is none.
    text = f"{100 * share:.1f}" if count else "0"
    ink = INK if count else SOFT
    if share > 0.55:
        ink = (255, 255, 255)
    write_at(img, side // 2, side // 2, text, "mm", 13, ink)
    return img


# ---- calibration

def reliability(share: np.ndarray, confidence: np.ndarray, accuracy: np.ndarray,
                title: str = "") -> Picture:
    """Per bin of confidence its share of the pixels, mean confidence and accuracy, (n,) each.

    A bar is as high as the accuracy; a calibrated model's bars end at the diagonal.
    """
    side = 300
    n = len(share)
    img = blank(side + 60, side + 90)
    draw = ImageDraw.Draw(img)
    left, base = 48, side + 10
    for v in (0, 0.25, 0.5, 0.75, 1):
        at = round(side * v)
        draw.line((left, base - at, left + side, base - at), GRID)
        write_at(img, left - 6, base - at, label(v), "rm", 12, SOFT)
        write_at(img, left + at, base + 6, label(v), "ma", 12, SOFT)
    for i in range(n):
        if share[i] == 0:
            continue
        x0 = left + round(side * i / n) + 1
        x1 = left + round(side * (i + 1) / n) - 1
        draw.rectangle((x0, base - round(side * accuracy[i]), x1, base), BRIGHT[0])
        # A red line where the bar should end.
        expected = base - round(side * confidence[i])
        draw.line((x0, expected, x1, expected), WRONG, 2)
        # The share of the pixels below, the largest 30 pixels long.
        long = math.ceil(30 * share[i] / share.max())
        draw.rectangle((x0, base + 52, x1, base + 52 + long), SOFT)
    draw.line((left, base, left + side, base - side), SOFT)
    draw.line((left, base - side, left, base, left + side, base), SOFT)
    note = "confidence; below: share of the pixels"
    write_at(img, left + side // 2, base + 24, note, "ma", 12, SOFT)
    items = [(BRIGHT[0], "accuracy"), (WRONG, "confidence")]
    return page([line(title, side + 60, 18), img, legend_of(items, side + 60)])


# ---- masks and contact sheets

def colorize(ids: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """(H, W) ids, (K, 3) colours -> (H, W, 3) uint8, ignored pixels black.

    An id without a colour is an IndexError.
    """
    ignored = ids == IGNORE
    out = np.asarray(colors, np.uint8)[np.where(ignored, 0, ids)]
    out[ignored] = 0
    return out


def overlay(image: np.ndarray, ids: np.ndarray, colors: np.ndarray,
            alpha: float = 0.5) -> np.ndarray:
    """(H, W, 3) uint8 under `alpha` parts of class colour -> (H, W, 3); ignored pixels stay."""
    out = image.copy()
    # In strips: floats take eight times the memory of the picture.
    for top in range(0, len(image), 256):
        x = image[top:top + 256]
        y = ids[top:top + 256]
        mixed = np.rint((1 - alpha) * x + alpha * colorize(y, colors))
        ignored = (y == IGNORE)[..., None]
        out[top:top + 256] = np.where(ignored, x, mixed.astype(np.uint8))
    return out


def quick_look(image: np.ndarray, ids: np.ndarray, names: list[str],
               colors: np.ndarray) -> Picture:
    """overlay() above a legend of the classes that are in it."""
    present = np.flatnonzero(np.bincount(ids.ravel(), minlength=256)[:len(names)])
    items = [(tuple(colors[i].tolist()), names[i]) for i in present]
    picture = Image.fromarray(overlay(image, ids, colors))
    return column([picture, legend_of(items, max(picture.width, LEGEND))])


def samples(rows: list[tuple], names: list[str], colors: np.ndarray) -> Picture:
    """Rows (image (H, W, 3), truth (H, W) or None, prediction (H, W), caption) -> contact sheet."""
    heads = ["image", "prediction"]
    swatches = [tuple(color) for color in np.asarray(colors).tolist()]
    items = list(zip(swatches, names, strict=True))
    if any(truth is not None for _, truth, _, _ in rows):
        heads = ["image", "truth", "prediction", "errors"]
        items += [(WRONG, "wrong"), (Image.fromarray(hatch(13, 13)), "no label")]
    wide = len(heads) * (PANEL + 10) - 8
    titles = [line(head, PANEL, 15) for head in heads]
    parts = [row([cell(title, PANEL + 2, 22) for title in titles])]
    for image, truth, prediction, caption in rows:
        pictures = compared(image, truth, prediction, colors)
        # A frame, because a white class must end somewhere.
        framed = [ImageOps.expand(pictures[head], 1, GRID) for head in heads]
        parts.append(row([cell(picture, PANEL + 2, picture.height) for picture in framed]))
        parts.append(line(caption, wide, 13, SOFT))
    return page([*parts, legend_of(items, wide)])


def compared(image: np.ndarray, truth: np.ndarray | None, prediction: np.ndarray,
             colors: np.ndarray) -> dict[str, Picture]:
    """The pictures of a row of samples(), all of one size."""
    if truth is None:
        truth = np.full(prediction.shape, IGNORE)
    image = np.asarray(scaled(image, PANEL))
    truth = np.asarray(scaled(truth.astype(np.uint8), PANEL, is_mask=True))
    prediction = np.asarray(scaled(prediction.astype(np.uint8), PANEL, is_mask=True))
    # Where nothing is labelled nothing can be wrong.
    void = (truth == IGNORE)[..., None]
    wrong = (truth != prediction)[..., None]
    stripes = hatch(*truth.shape)
    # Errors are red on a pale grey image.
    pale = image.mean(2, keepdims=True) * 0.4 + 140
    errors = np.where(wrong, WRONG, pale).astype(np.uint8)
    pictures = {
        "image": image,
        "truth": np.where(void, stripes, colorize(truth, colors)),
        "prediction": colorize(prediction, colors),
        "errors": np.where(void, stripes, errors),
    }
    return {head: Image.fromarray(picture) for head, picture in pictures.items()}


def cards(sections: list[tuple], columns: int = 8, side: int = 128) -> Picture:
    """Sections (title, [(image (H, W, 3), lines of text, wrong)]) -> contact sheet.

    `wrong` puts a red frame around a card.
    """
    # A card is 4 wider than its picture, and 8 lie between two cards.
    wide = columns * (side + 12) - 8
    blocks = []
    for title, items in sections:
        parts = [line(title, wide, 15)]
        if not items:
            parts.append(line("none", wide, 13, SOFT))
        drawn = [card(image, texts, wrong, side) for image, texts, wrong in items]
        for i in range(0, len(drawn), columns):
            parts.append(row(drawn[i:i + columns]))
        blocks.append(column(parts))
    return page(blocks, 24)


def card(image: np.ndarray, texts: list[str], wrong: bool, side: int) -> Picture:
    """A picture with lines of text below it, of which the first names the image."""
    frame = WRONG if wrong else GRID
    picture = ImageOps.expand(scaled(image, side), 2, frame)
    # The texts of all cards begin at the same height.
    parts = [cell(picture, side + 4, side + 4)]
    for i, text in enumerate(texts):
        ink = WRONG if wrong and i else INK
        parts.append(line(text, side, 12, ink))
    return column(parts, 0)
