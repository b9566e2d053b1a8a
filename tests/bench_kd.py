"""What each measure of the biodiversity report is worth, on the demo data and on any folder data set, by seeds.

    python tests/bench_kd.py --out runs/bench_kd                            demo
    python tests/bench_kd.py --out runs/bench_kd --dubai D                  demo, and the Dubai set in folder D
Per data set and seed: baseline; with weighted sampling by the baseline's own difficulty scores; with replication; with
the strategic crop; with all three; and with KD from a teacher of other classes: the shares of a map by name, or of one
measured, taught (--within shares), and the division left to the student (the default). All have the same steps and
report the last weights, so the baseline is the step-matched control. Prints mean +/- sd per class, and the paired
difference to the baseline. What is there already is not run again. One thread; the slowest run is named.
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from data import demo  # noqa: E402
from data.common import write  # noqa: E402
from data.datasets import find_pairs, read_description  # noqa: E402
from data.io import Labels, id_image  # noqa: E402

# The teacher's classes, made by merging, with the student's classes in them and the shares that a user would guess.
TEACHERS = {
    "demo": {"cultivated": {"field": 1}, "green": {"grassland": 0.7, "forest": 0.3}, "wet": {"water": 0.9, "pool": 0.1},
             "sealed": {"road": 0.9, "car": 0.1}, "roof": {"building": 1}},
    "dubai": {"built": {"building": 1}, "open": {"land": 0.8, "vegetation": 0.2}, "street": {"road": 1},
              "sea": {"water": 1}}}
DUBAI = {"name": "dubai", "images": "Tile */images/*.jpg", "masks": "Tile */masks/*.png",
         "classes": [{"name": n, "color": c} for n, c in (
             ("building", "#3C1098"), ("land", "#8429F6"), ("road", "#6EC1E4"), ("vegetation", "#FEDD3A"),
             ("water", "#E2A929"))],
         "ignore": ["#9B9B9B", "#000000"], "splits": {"train": "Tile [1-6]/*", "val": "Tile 7/*", "test": "Tile 8/*"}}


def linked(folder, root, description):  # a description beside links: data sets may be read-only
    root.mkdir(parents=True, exist_ok=True)
    for part in Path(folder).resolve().iterdir():
        if part.is_dir() and not (root / part.name).exists():
            (root / part.name).symlink_to(part)
    write(root / "dataset.json", description)
    return root


def merged(root, out, classes):  # the same images, masks of the teacher's classes
    if (out / "dataset.json").exists():
        return out
    d = read_description(root)
    labels, names = Labels(d["classes"], d["ignore"]), list(classes)
    table = np.full(256, 255, np.uint8)
    for i, parts in enumerate(classes.values()):
        table[[labels.names.index(n) for n in parts]] = i
    for image, mask in find_pairs(root, d).values():
        for file in (image, mask):
            (out / file.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        (out / image.relative_to(root)).unlink(missing_ok=True)
        (out / image.relative_to(root)).symlink_to(image.resolve())
        colors = np.arange(3 * len(names), dtype=np.uint8).reshape(-1, 3)
        id_image(table[labels.load(mask)], colors).save(out / mask.relative_to(root))
    write(out / "dataset.json", d | {"name": f"{d['name']}-merged", "ignore": [255], "classes": [
        {"name": n, "id": i} for i, n in enumerate(names)]})
    return out


def call(script, folder, *flags):  # in that folder, on one thread
    command = [str(word) for word in (sys.executable, ROOT / script, *flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def score_difficulty(run):  # -> run/eval-train/difficulty.json
    if not (run / "eval-train/difficulty.json").exists():
        call("eval.py", run.parent, run, "--split", "train", "--difficulty", "--workers", 0)


def run(script, out, *flags):  # -> results.json
    if not (out / "results.json").exists():
        flags = ["--resume", out] if (out / "last.pt").exists() else ["--out", out, *flags]
        call(script, out.parent, *flags)
    r = json.loads((out / "results.json").read_text())
    print(f"{out.name:24} mIoU {r['miou']:.4f}  {r['seconds']:.0f} s", flush=True)
    return r


def spread(values):
    values = np.array([v for v in values if v is not None], float)  # None: a class that is nowhere in test
    if not len(values):
        return "-"
    return f"{100 * values.mean():.1f}" + (f" +/- {100 * values.std(ddof=1):.1f}" if len(values) > 1 else "")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/bench_kd"))
    p.add_argument("--dubai", help="folder with Tile 1 ... Tile 8; adds the second data set")
    p.add_argument("--only", choices=sorted(TEACHERS), nargs="+", help="data sets (demo; with --dubai both)")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--arch", default="nano16")
    args = p.parse_args()
    out = args.out.resolve()
    settings = out / "settings.json"
    mine = dict(steps=args.steps, arch=args.arch)
    if settings.exists() and (there := json.loads(settings.read_text())) != mine:
        p.error(f"{out}: holds runs with {there}, not {mine}; name another --out")
    write(settings, mine)
    for name in args.only or ["demo", *["dubai"] * bool(args.dubai)]:
        root = demo.make(out / "data/demo") if name == "demo" else linked(args.dubai, out / "data/dubai", DUBAI)
        other = merged(root, out / f"data/{name}-merged", TEACHERS[name])
        classes = [c["name"] for c in read_description(root)["classes"]]
        common = ["--dataset", "folder", "--arch", args.arch, "--steps", args.steps, "--eval-every", args.steps,
                  "--workers", 0, "--focus", 0, "--cache", out / "cache"]
        teacher = out / f"{name}-teacher"
        run("train_seg.py", teacher, *common, "--root", other, "--arch", "nano8", "--seed", 100)
        write(out / f"{name}.json", {"map": TEACHERS[name]})
        arms, seconds = {}, []
        for seed in range(args.seeds):
            base = out / f"{name}-baseline-{seed}"
            weighted = ["--sampler", "weighted", "--difficulty", base / "eval-train/difficulty.json"]
            repeat = ["--replicate", "5%"]
            for arm, flags in {
                    "baseline": ["--alpha", 0], "weighted": ["--alpha", 0, *weighted],
                    "replicated": ["--alpha", 0, *repeat], "strategic": ["--alpha", 0, "--focus", 0.7],
                    "all": ["--alpha", 0, *weighted, *repeat, "--focus", 0.7],
                    "kd-named": ["--teacher", teacher, "--map", out / f"{name}.json", "--within", "shares"],
                    "kd-measured": ["--teacher", teacher, "--map", "measured", "--within", "shares"],
                    "kd-student": ["--teacher", teacher, "--map", out / f"{name}.json"]}.items():
                r = run("train_kd.py", out / f"{name}-{arm}-{seed}", *common, "--root", root, "--seed", seed, *flags)
                if arm == "baseline":  # the first one: it says which images are hard
                    score_difficulty(base)
                arms.setdefault(arm, []).append(r)
                seconds.append((r["seconds"], f"{name}-{arm}-{seed}"))
        print(f"\n{name}, test, {args.seeds} seeds, {args.steps} steps, {args.arch}; slowest {max(seconds)}\n")
        print("| arm | mIoU | minus baseline | " + " | ".join(classes) + " |\n|" + "---|" * (3 + len(classes)))
        for arm, rows in arms.items():
            gain = [r["miou"] - b["miou"] for r, b in zip(rows, arms["baseline"])]
            by_class = [spread([r["iou"][c] for r in rows]) for c in classes]
            print(f"| {arm} | {spread([r['miou'] for r in rows])} | {spread(gain)} | " + " | ".join(by_class) + " |")
        print()


if __name__ == "__main__":
    main()
