"""Label efficiency: points per class and image against full masks, same network, same steps, with and without growing.

    python tests/bench_points.py --dubai DIR                      54 runs of 250 steps; demo alone without --dubai
    python tests/bench_points.py --seeds 0 --grown                a part; what is finished is read, not run again
DIR: the Dubai set as downloaded ("Tile 1" to "Tile 8"); it is linked, not changed. Writes OUT/table.md, table.json and
table.png; a cell is test mIoU, mean +/- standard deviation over the seeds, of the weights chosen on full val masks.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import demo, plots
from data.common import write

# true colours of the masks; the set's own classes.json lists others
DUBAI = {"name": "dubai", "images": "*/images/*.jpg", "masks": "*/masks/*.png",
         "classes": [{"name": "land", "color": "#8429F6"}, {"name": "water", "color": "#E2A929"},
                     {"name": "building", "color": "#3C1098"}, {"name": "vegetation", "color": "#FEDD3A"},
                     {"name": "road", "color": "#6EC1E4"}],
         "ignore": ["#000000", "#9B9B9B"],
         "splits": {"train": "Tile [1-6]/*", "val": "Tile 7/*", "test": "Tile 8/*"}}
GROW = "--grow 1".split()


def command(out, root, steps, seed, points, flags):
    """The script and flags of one run; `points` per class and image, None for full masks."""
    if points is None:  # train_points.py with a point on every pixel
        script, labels = "train_seg.py", ["--loss", "ce"]
    else:
        script, labels = "train_points.py", ["--points-per-class", points]
    if (out / "last.pt").exists():
        return [script, "--resume", out]
    return [script, "--root", root, "--dataset", "folder", "--out", out, "--steps", steps, "--seed", seed,
            "--eval-every", steps, "--log-every", max(1, steps // 5), "--ema", 0.98, *labels, *flags]


def train(out, root, steps, seed, points, flags):
    """-> results.json of one run, started unless it is there."""
    if not (out / "results.json").exists():
        words = [str(word) for word in command(out, root, steps, seed, points, flags)]
        done = subprocess.run([sys.executable, ROOT / words[0], *words[1:]], capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip() or done.stdout).splitlines()[-1]
            sys.exit(f"{' '.join(words)}\n{why}")
    return json.loads((out / "results.json").read_text())


def chart(rows, points):
    """Bars with their spread: rows [{data, points, grow, mean, sd, baseline}] -> image, a panel per data set."""
    sets = list(dict.fromkeys(r["data"] for r in rows))
    high, bar, group = 240, 34, 2 * 34 + 26
    wide = max(90 + group * (len(points) + 1), 520)
    img = Image.new("RGB", (wide, 60 + len(sets) * (high + 70)), "white")
    draw = ImageDraw.Draw(img)
    draw.text((20, 14), "test mIoU by points per class and image", plots.INK, plots.font(18))
    items = [(plots.LINES[0], "points"), (plots.LINES[1], "points, grown"), (plots.LINES[6], "full masks"),
             (plots.WRONG, "always the most frequent class")]
    placed, _ = plots.flow(items, wide - 40)
    plots.legend(img, placed, 20, 38)
    for i, name in enumerate(sets):
        base = 60 + i * (high + 70) + high + 40
        draw.text((60, base - high - 22), name, plots.INK, plots.font(15))
        mine = [r for r in rows if r["data"] == name]
        top = max(mine[0]["baseline"], *(r["mean"] + r["sd"] for r in mine)) * 1.05
        for v in plots.ticks(0, top, 5):
            draw.line((60, base - v / top * high, wide - 20, base - v / top * high), plots.GRID)
            draw.text((54, base - v / top * high), plots.label(v), plots.SOFT, plots.font(12), "rm")
        for j, count in enumerate([*points, None]):
            x = 70 + j * group
            draw.text((x + bar, base + 6), "all" if count is None else str(count), plots.SOFT, plots.font(12), "ma")
            for r in (r for r in mine if r["points"] == count):
                left, colour = x + bar * r["grow"], plots.LINES[6 if count is None else int(r["grow"])]
                draw.rectangle((left, round(base - r["mean"] / top * high), left + bar - 3, base), colour)
                ends = [round(base - (r["mean"] + s * r["sd"]) / top * high) for s in (1, -1)]
                draw.line((left + bar // 2 - 1, ends[0], left + bar // 2 - 1, ends[1]), plots.INK, 2)
        y = round(base - mine[0]["baseline"] / top * high)
        draw.line((60, y, wide - 20, y), plots.WRONG)
        draw.line((60, base, wide - 20, base), plots.SOFT)
    return img


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dubai", help="folder with Tile 1 to Tile 8")
    p.add_argument("--out", default="runs/points", help="folder for runs and table")
    p.add_argument("--points", type=int, nargs="+", default=[1, 5, 20, 100])
    p.add_argument("--grown", type=int, nargs="*", help="those of --points to run with the second stage, too (all)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=250)
    p.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of both scripts, last")
    args = p.parse_args(argv)
    if min(args.steps, *args.points) < 1:
        p.error("--steps and --points: expected 1 or more")
    if args.dubai and not any(Path(args.dubai).glob("Tile */images/*.jpg")):
        p.error(f"--dubai {args.dubai}: no \"Tile 1/images/*.jpg\" in it; name the folder that holds Tile 1 to Tile 8")
    out = Path(args.out).absolute()
    roots = {"demo": demo.make(out / "data/demo")}
    if args.dubai:
        roots["dubai"] = out / "data/dubai"
        roots["dubai"].mkdir(parents=True, exist_ok=True)
        for tile in Path(args.dubai).absolute().glob("Tile *"):
            if not (roots["dubai"] / tile.name).exists():
                os.symlink(tile, roots["dubai"] / tile.name)
        write(roots["dubai"] / "dataset.json", DUBAI)
    grown = args.points if args.grown is None else args.grown
    if set(grown) - set(args.points):
        p.error(f"--grown {grown}: expected some of --points {args.points}")
    settings = out / "settings.json"
    mine = dict(steps=args.steps, flags=args.flags, grow=GROW)
    if settings.exists() and (there := json.loads(settings.read_text())) != mine:
        p.error(f"{out}: holds runs with {there}, not {mine}; name another --out")
    write(settings, mine)
    cells = [(name, n, grow) for name in roots for n in [*args.points, None] for grow in (False, True)
             if not grow or n in grown]
    found, began, made = {}, time.time(), 0
    for seed in args.seeds:  # a whole table after the first seed, then better ones
        for name, n, grow in cells:
            run = out / f"{name}-{n or 'all'}{'-grown' * grow}-seed{seed}"
            made += not (run / "results.json").exists()
            r = train(run, roots[name], args.steps, seed, n, args.flags + GROW * grow)
            found.setdefault((name, n, grow), []).append(r)
            left = sum(not (out / f"{a}-{b or 'all'}{'-grown' * c}-seed{s}/results.json").exists()
                       for s in args.seeds for a, b, c in cells)
            rest = (time.time() - began) / max(1, made) * left
            print(f"{run.name:24} mIoU {r['miou']:.4f}  OA {r['oa']:.4f}  {r['seconds']:.0f} s  "
                  f"ETA {rest // 60:.0f}:{rest % 60:02.0f}", flush=True)
        rows = []
        for (name, n, grow), results in found.items():
            scores = [r["miou"] for r in results]
            rows.append(dict(data=name, points=n, grow=grow, mean=statistics.mean(scores), scores=scores,
                             sd=statistics.stdev(scores) if len(scores) > 1 else 0.0,
                             labelled=None if n is None else statistics.mean(r["points"] for r in results),
                             oa=statistics.mean(r["oa"] for r in results), baseline=results[0]["majority_miou"]))
        write(out / "table.json", dict(steps=args.steps, flags=args.flags, rows=rows))
        write(out / "table.png", chart(rows, args.points))
        text = f"| data | {' | '.join(f'{n} a class and image' for n in args.points)} | full masks | majority |\n"
        text += "|---" * (len(args.points) + 3) + "|\n"
        for name in roots:
            for grow in (False, True)[:1 + bool(grown)]:
                cell = {r["points"]: f"{r['mean']:.3f}" + f" +/- {r['sd']:.3f}" * (len(r["scores"]) > 1) for r in rows
                        if r["data"] == name and (r["grow"] == grow or r["points"] is None)}
                base = next(r["baseline"] for r in rows if r["data"] == name)
                text += f"| {name}{', grown' * grow} | " + " | ".join(cell.get(n, "") for n in [*args.points, None])
                text += f" | {base:.3f} |\n"
        write(out / "table.md", text)
    print(f"\n{text}\nwrote {out}/table.md, table.json, table.png; {len(args.seeds)} seeds of {args.steps} steps")


if __name__ == "__main__":
    main()
