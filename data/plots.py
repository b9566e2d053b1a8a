"""Training curves, confusion matrix, colour masks and contact sheet; numpy in, Pillow images out, nothing is saved."""
import bisect
import functools
import math
import numbers

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, SOFT, GRID, WRONG = (45, 45, 45), (115, 115, 115), (225, 225, 225), (214, 20, 30)
LINES = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233),
         (90, 90, 90))  # Okabe and Ito: told apart with any colour vision
LINES += tuple(tuple(v * 9 // 20 for v in c) for c in LINES)  # and darker once more, for scores per class
HEAT = ((0, .35, .7, 1), ((247, 251, 255), (158, 202, 225), (49, 130, 189), (8, 48, 107)))  # ColorBrewer Blues
PANEL, ROW = 256, 20  # pixels: longer side of a picture in the contact sheet, height of a line of text
font = functools.cache(ImageFont.load_default)  # font(size): Pillow >= 10.1 brings an outline font


def width(text: str, size: int = 13) -> int:
    return math.ceil(font(size).getbbox(text)[2])


def fit(text: str, limit: int, size: int = 13) -> str:
    """Text of at most limit pixels, cut in the middle: names and paths tend to differ at the end."""
    if width(text, size) <= limit:
        return text
    n = bisect.bisect(range(1, len(text) // 2), limit, key=lambda n: width(text[:n] + "..." + text[-n:], size))
    return text[:n] + "..." + text[len(text) - n:]


def hatch(h: int, w: int) -> np.ndarray:
    """(h, w, 3) uint8 diagonal stripes for "no label": black or grey may be the colour of a class."""
    stripe = np.add.outer(np.arange(h), np.arange(w)) % 8 < 2
    return np.where(stripe[..., None], 205, 238).astype(np.uint8).repeat(3, 2)


def flow(items: list, limit: int) -> tuple[list, int]:
    """Legend items (swatch, text) -> [(x, y, swatch, text)] in lines of at most limit pixels, and their height."""
    placed, x, y = [], 0, 0
    for swatch, text in items:
        text = fit(text, limit - 20)
        if x and x + 20 + width(text) > limit:
            x, y = 0, y + ROW
        placed.append((x, y, swatch, text))
        x += 20 + width(text) + 18
    return placed, y + ROW if placed else 0


def legend(img: Image.Image, placed: list, x0: int, y0: int) -> None:
    draw = ImageDraw.Draw(img)
    for x, y, swatch, text in placed:
        box = (x0 + x, y0 + y + 4, x0 + x + 13, y0 + y + 17)
        img.paste(swatch, box)  # a colour or a 13 x 13 image
        draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=SOFT)  # a white class stays visible
        draw.text((x0 + x + 20, y0 + y + 10), text, INK, font(13), "lm")


def ticks(lo: float, hi: float, n: int, log: bool = False) -> list[float]:
    """About n round numbers (1, 2, 5 times a power of ten) in lo..hi; with log, lo and hi are exponents of ten."""
    if log:
        tens = range(math.floor(lo), math.ceil(hi) + 1)
        marks = [m * 10.0 ** e for e in tens for m in (1, 2, 5) if lo <= math.log10(m) + e <= hi]
        return marks if len(marks) <= n + 2 else [10.0 ** e for e in tens[1:-1:math.ceil(len(tens) / (n + 2))]]
    unit = 10.0 ** math.floor(math.log10((hi - lo) / n))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit * n >= (hi - lo) * .999)
    return [i * step for i in range(math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) + 1)]


def label(v: float) -> str:
    return f"{v / 1000:.8g}k" if 1000 <= abs(v) < 1e9 else f"{v:.8g}".replace("e-0", "e-").replace("e+0", "e")


def stroke(img: Image.Image, box: tuple, xy: np.ndarray, colour: tuple, thick: float = 0, dot: float = 0) -> None:
    """Line and dots through xy (N, 2), clipped to box; drawn at 4x and shrunk, as Pillow's own lines are jagged."""
    mask = Image.new("L", (4 * (box[2] - box[0]), 4 * (box[3] - box[1])))
    draw = ImageDraw.Draw(mask)
    xy = [tuple(p) for p in 4 * (xy - box[:2])]
    if thick and len(xy) > 1:
        draw.line(xy, 255, round(4 * thick), "curve" if len(xy) < 1000 else None)  # round joints are slow
    for x, y in xy if dot else ():
        draw.ellipse((x - 4 * dot, y - 4 * dot, x + 4 * dot, y + 4 * dot), 255)
    img.paste(colour, box, mask.reduce(4))


def axes(img: Image.Image, outer: tuple, xmax: float, lo: float, hi: float, log: bool = False) -> tuple:
    """Frame, grid and tick labels inside outer (x0, y0, x1, y1) -> inner box, function (N,), (N,) -> (N, 2) pixels."""
    draw, scale = ImageDraw.Draw(img), np.log10 if log else np.asarray
    lo, hi = float(scale(lo)), float(scale(hi))
    pad = .05 * (hi - lo) if hi - lo > 1e-6 * abs(hi) else abs(hi) * .1 or .5  # a constant gets room on both sides
    lo, hi = lo - pad, hi + pad
    ys = ticks(lo, hi, 5, log)
    x0, y0, x1, y1 = outer
    x0, y1 = x0 + max([width(label(v), 12) for v in ys], default=0) + 8, y1 - 38

    def to_pixels(x, y):
        u, v = np.asarray(x) / xmax, (scale(y) - lo) / (hi - lo)
        return np.stack([x0 + 8 + u * (x1 - x0 - 16), y1 - v * (y1 - y0)], 1)

    for v in ys:
        y = round(to_pixels([0], [v])[0, 1])
        draw.line((x0, y, x1, y), GRID)
        draw.text((x0 - 6, y), label(v), SOFT, font(12), "rm")
    for v in ticks(0, xmax, max(2, (x1 - x0) // 80)):
        x = round(to_pixels([v], [1])[0, 0])
        draw.line((x, y0, x, y1), GRID)
        draw.text((x, y1 + 6), label(v), SOFT, font(12), "ma")
    draw.text(((x0 + x1) // 2, y1 + 22), "step", SOFT, font(12), "ma")
    draw.line((x0, y0, x0, y1, x1, y1), SOFT)
    return (x0, y0, x1, y1), to_pixels


def curves(history: list[dict], title: str = "") -> Image.Image:
    """Rows {"step": 20, "loss": 1.2, "lr": 1e-3, "val_miou": .4}, any key but step may be missing -> three panels."""
    series, dropped = {}, 0
    for row in (r for r in history if "step" in r):
        for key, v in row.items():
            if isinstance(v, numbers.Real) and (key == "lr" or key.startswith("val_") or "loss" in key):
                if math.isfinite(v):
                    series.setdefault(key, {})[row["step"]] = v  # a resumed run repeats steps: the last one counts
                else:
                    dropped += "loss" in key
    series = {key: np.array(sorted(s.items()), float).T for key, s in series.items()}  # (2, N): steps, values
    xmax = max((s[0, -1] for s in series.values()), default=0) or 1
    loss = [key for key in series if "loss" in key]
    val = [key for key in series if key.startswith("val_") and key not in loss]
    best = {key: series[key][:, series[key][1].argmax()] for key in val}
    colour = {key: LINES[i % len(LINES)] for keys in (loss, val, ["lr"]) for i, key in enumerate(keys)}
    scores = [(colour[k], f"{k[4:]}, best {v:.4f} at {step:.0f}") for k, (step, v) in best.items()]
    parts = (("loss" + f", {dropped} values not finite" * (dropped > 0), loss, [(colour[k], k) for k in loss], 20, 500),
             ("validation", val, scores, 530, 1010),
             ("learning rate", ["lr"] * ("lr" in series), [], 1040, 1300))  # name, keys, legend, left, right
    legends = [flow(items, x1 - x0) for _, _, items, x0, x1 in parts]
    top = 46 * bool(title) + 14
    y0 = top + 26 + max(h for _, h in legends) + 8
    img = Image.new("RGB", (1320, y0 + 300 + 8), "white")
    draw = ImageDraw.Draw(img)
    draw.text((20, 16), fit(title, 1280, 18), INK, font(18))
    for (name, keys, _, x0, x1), (placed, _) in zip(parts, legends):
        if not keys:
            draw.text((x0, top), name + ": no data", SOFT, font(15))
            draw.rectangle((x0, y0, x1, y0 + 262), outline=GRID)
            continue
        values = np.concatenate([series[k][1] for k in keys])
        lo, hi = (0 if name == "learning rate" else values.min()), values.max()
        log = keys == loss and bool(0 < 50 * lo < hi)  # one spike must not flatten the rest
        draw.text((x0, top), name + " (log scale)" * log, INK, font(15))
        legend(img, placed, x0, top + 26)
        box, to_pixels = axes(img, (x0, y0, x1, y0 + 300), xmax, lo, hi, log)
        for key in keys:
            xy = to_pixels(*series[key])
            if len(xy) > 60 and key in loss:
                stroke(img, box, xy, tuple(255 - (255 - c) // 2 for c in colour[key]), .8)
                ones = np.ones(2 * (len(xy) // 50) + 1)  # centred mean over 4 % of the points: does not lag behind
                xy[:, 1] = np.convolve(xy[:, 1], ones, "same") / np.convolve(np.ones(len(xy)), ones, "same")
            stroke(img, box, xy, colour[key], 1.8, 0 if len(xy) > 60 else 2.5)
        for key in keys if keys == val else ():
            for shade, r in ((colour[key], 6), ((255, 255, 255), 3)):  # a ring on top of all lines
                stroke(img, box, to_pixels(*best[key][:, None]), shade, dot=r)
    return img


def bars(history: list[dict], title: str = "") -> Image.Image:
    """Rows {"step": 20, "scores": {"train": {"accuracy": .9, ...}, "val": {...}}} -> a panel of bars 0..1 per split.

    Rows without "scores" are passed over; of more than 12 the first, the last and an even choice between are drawn.
    """
    rows = {r["step"]: r["scores"] for r in history if "scores" in r}  # of repeated steps the last one counts
    steps = sorted(rows)
    if len(steps) > 12:
        steps = [steps[round(i)] for i in np.linspace(0, len(steps) - 1, 12)]
    splits = list(dict.fromkeys(split for step in steps for split in rows[step]))
    names = list(dict.fromkeys(name for step in steps for scores in rows[step].values() for name in scores))
    colour = {name: LINES[i % len(LINES)] for i, name in enumerate(names)}
    bar = max(6, 40 // max(1, len(names)) + 4)
    group, high = bar * len(names) + 22, 200  # pixels of one step, of a score of 1
    wide = 60 + max(group * len(steps), 480)
    placed, legend_high = flow([(colour[n], n) for n in names], wide - 80)
    top, panel = 16 + 30 * bool(title), high + 66
    img = Image.new("RGB", (wide + 20, top + legend_high + 8 + panel * max(1, len(splits))), "white")
    draw = ImageDraw.Draw(img)
    draw.text((20, 14), fit(title, wide - 20, 18), INK, font(18))
    legend(img, placed, 60, top)
    for i, split in enumerate(splits):
        base = top + legend_high + 36 + i * panel + high
        draw.text((60, base - high - 24), split, INK, font(15))
        for v in (0, .25, .5, .75, 1):
            y = round(base - v * high)
            draw.line((60, y, wide, y), GRID)
            draw.text((54, y), label(v), SOFT, font(12), "rm")
        for j, step in enumerate(steps):
            x = 71 + j * group
            below = x + bar * len(names) // 2, base + 6
            draw.text(below, f"step {step}" if j == 0 else label(step), SOFT, font(12), "ma")
            for k, name in enumerate(names):
                v = rows[step].get(split, {}).get(name)
                if v is not None and math.isfinite(v):
                    at = x + k * bar, round(base - min(max(v, 0), 1) * high), x + (k + 1) * bar - 2, base
                    draw.rectangle(at, colour[name])
        draw.line((60, base, wide, base), SOFT)
    if not splits:
        draw.text((60, top + 20), "no data", SOFT, font(15))
    return img


def upright(img: Image.Image, x: int, bottom: int, text: str, fill: tuple) -> None:
    """Text that reads upwards, centred on column x, starting at bottom."""
    mask = Image.new("L", (width(text), ROW))
    ImageDraw.Draw(mask).text((0, ROW // 2), text, 255, font(13), "lm")
    img.paste(fill, (x - ROW // 2, bottom - mask.width), mask.rotate(90, expand=True))


def confusion(cm: np.ndarray, names: list[str], title: str = "") -> Image.Image:
    """(K, K) counts, rows true, columns predicted -> heat map of each row's shares, hatched where a row is empty."""
    cm, names, title = np.asarray(cm), [fit(n, 220) for n in names], fit(title, 900, 18)
    k, support, note = len(cm), cm.sum(1), "share of the true class, %"
    cell, header = min(84, max(46, 640 // k)), max(map(width, names))
    turned = header > cell - 8  # column names read upwards when one does not fit
    y0 = 16 + 30 * bool(title)
    left, top = 56 + header, y0 + 36 + ROW + (header if turned else ROW)
    right, bottom = left + k * cell, top + k * cell
    counts = [f"{n:,}" for n in support]
    w = max(right + 14 + max(map(width, [*counts, "support"])), 20 + width(title, 18), 20 + width(note)) + 20
    img = Image.new("RGB", (w, bottom + 20), "white")
    draw = ImageDraw.Draw(img)
    draw.text((20, 14), title, INK, font(18))
    draw.text((20, y0), note, SOFT, font(13))
    draw.text(((left + right) // 2, y0 + 24 + ROW // 2), "predicted", SOFT, font(13), "mm")
    draw.text((right + 14, top - 8), "support", SOFT, font(13), "ls")
    upright(img, 20 + ROW // 2, (top + bottom + width("true")) // 2, "true", SOFT)
    for i, (name, count) in enumerate(zip(names, counts, strict=True)):
        mid = i * cell + cell // 2
        draw.text((left - 8, top + mid), name, INK, font(13), "rm")
        draw.text((right + 14, top + mid), count, INK, font(13), "lm")
        if turned:
            upright(img, left + mid, top - 8, name, INK)
        else:
            draw.text((left + mid, top - 8), name, INK, font(13), "ms")
        if support[i] == 0:
            img.paste(Image.fromarray(hatch(cell, right - left)), (left, top + i * cell))
        for j, n in enumerate(cm[i]):
            x, y, shade, ink, text = left + j * cell, top + i * cell, None, INK, "-"
            if support[i]:
                share = n / support[i]
                shade = tuple(round(np.interp(share, HEAT[0], c)) for c in zip(*HEAT[1]))
                ink = (255, 255, 255) if share > .55 else INK if n else SOFT
                text = f"{100 * share:.1f}" if n else "0"  # 0.0 is a few pixels, 0 is none
            draw.rectangle((x, y, x + cell, y + cell), shade, "white")
            draw.text((x + cell // 2, y + cell // 2), text, ink, font(13), "mm")
    draw.rectangle((left, top, right, bottom), outline=SOFT)
    return img


def colorize(ids: np.ndarray, colors: np.ndarray, ignore: int = 255) -> np.ndarray:
    """(H, W) ids, (K, 3) colours -> (H, W, 3) uint8, ignored pixels black; an id without a colour is an IndexError."""
    out = np.asarray(colors, np.uint8)[np.where(ids == ignore, 0, ids)]
    out[ids == ignore] = 0
    return out


def overlay(image: np.ndarray, ids: np.ndarray, colors: np.ndarray, alpha: float = .5, ignore: int = 255) -> np.ndarray:
    """(H, W, 3) uint8 image under alpha parts of class colour -> (H, W, 3) uint8; ignored pixels keep the image."""
    out = image.copy()
    for top in range(0, len(image), 256):  # in strips: floats take eight times the memory of the picture
        part, x = ids[top:top + 256], image[top:top + 256]
        mixed = np.rint((1 - alpha) * x + alpha * colorize(part, colors, ignore)).astype(np.uint8)
        out[top:top + 256] = np.where((part == ignore)[..., None], x, mixed)
    return out


def samples(rows: list[tuple], names: list[str], colors: np.ndarray, ignore: int = 255) -> Image.Image:
    """Rows (image (H, W, 3), truth (H, W) or None, prediction (H, W), caption) -> contact sheet with a legend."""
    labelled = any(truth is not None for _, truth, _, _ in rows)
    heads = ["image", "truth", "prediction", "errors"] if labelled else ["image", "prediction"]
    strips = []  # per row: {head: picture}, all of one size
    for image, truth, pred, _ in rows:
        scale = PANEL / max(image.shape[:2])
        size = [max(1, round(scale * n)) for n in image.shape[1::-1]]  # Pillow wants (W, H)
        truth = np.full(pred.shape, ignore) if truth is None else truth
        image = np.asarray(Image.fromarray(image).resize(size, Image.LANCZOS if scale < 1 else Image.NEAREST))
        truth, pred = (np.asarray(Image.fromarray(m.astype("u1")).resize(size, Image.NEAREST)) for m in (truth, pred))
        void, wrong, stripes = (truth == ignore)[..., None], (truth != pred)[..., None], hatch(*truth.shape)
        errors = np.where(wrong, WRONG, image.mean(2, keepdims=True) * .4 + 140).astype(np.uint8)
        strips.append({"image": image, "truth": np.where(void, stripes, colorize(truth, colors, ignore)),
                       "prediction": colorize(pred, colors, ignore), "errors": np.where(void, stripes, errors)})
    items = [(tuple(int(v) for v in c), n) for n, c in zip(names, colors, strict=True)]
    items += [(WRONG, "wrong"), (Image.fromarray(hatch(13, 13)), "no label")] * labelled
    columns = {head: 20 + i * (PANEL + 8) for i, head in enumerate(heads)}
    wide, y = columns[heads[-1]] + PANEL + 20, 44
    placed, high = flow(items, wide - 40)
    img = Image.new("RGB", (wide, y + sum(len(s["image"]) + ROW + 16 for s in strips) + high + 16), "white")
    draw = ImageDraw.Draw(img)
    for head, x in columns.items():
        draw.text((x, 16), head, INK, font(15))
    for (*_, caption), strip in zip(rows, strips):
        for head, x in columns.items():
            h, w, _ = strip[head].shape
            draw.rectangle((x - 1, y - 1, x + w, y + h), outline=GRID)  # a white class ends somewhere
            img.paste(Image.fromarray(strip[head]), (x, y))
        y += h
        draw.text((20, y + 4), fit(caption, wide - 40), SOFT, font(13))
        y += ROW + 16
    legend(img, placed, 20, y)
    return img


def cards(sections: list[tuple], columns: int = 8, side: int = 128) -> Image.Image:
    """Sections (title, [(image (H, W, 3), lines, wrong)]) -> contact sheet; `wrong` puts a red frame around a card."""
    step_x, wide = side + 12, 40 + columns * (side + 12) - 12
    plan, y = [], 16
    for title, items in sections:
        lines = max((len(texts) for _, texts, _ in items), default=1)
        plan.append((y, side + 16 * lines + 14))
        y += 30 + math.ceil(max(1, len(items)) / columns) * plan[-1][1] + 8
    img = Image.new("RGB", (wide, y), "white")
    draw = ImageDraw.Draw(img)
    for (title, items), (top, step_y) in zip(sections, plan):
        draw.text((20, top), fit(title, wide - 40, 15), INK, font(15))
        if not items:
            draw.text((20, top + 30), "none", SOFT, font(13))
        for i, (image, texts, wrong) in enumerate(items):
            x, y = 20 + i % columns * step_x, top + 30 + i // columns * step_y
            picture = Image.fromarray(image)
            scale = side / max(picture.size)
            size = [max(1, round(scale * n)) for n in picture.size]
            picture = picture.resize(size, Image.LANCZOS if scale < 1 else Image.NEAREST)
            img.paste(picture, (x, y))
            draw.rectangle((x - 2, y - 2, x + size[0] + 1, y + size[1] + 1), outline=WRONG if wrong else GRID, width=2)
            for j, text in enumerate(texts):
                draw.text((x, y + side + 3 + 16 * j), fit(text, side, 12), WRONG if wrong and j else INK, font(12))
    return img
