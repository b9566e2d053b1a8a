"""What views, an ensemble and a soup add to finished runs: test mIoU and classes, seconds; mean +/- sd over the runs.

    python tests/bench_tta.py --runs runs/demo runs/demo-2 runs/demo-3      the same flags, three seeds
    python tests/bench_tta.py --runs A B C --soup A D E                     D, E: A's seed, another --lr or --steps
The rows plain, flips, d4 and scales are of each run by itself; the ensemble is of all runs, the soup of its own.
"""
import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the scripts

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import metrics, public  # noqa: E402
from data.common import BadInput  # noqa: E402
from data.source import Source  # noqa: E402
from models import run  # noqa: E402
from models.checkpoint import load_weights  # noqa: E402
from models.ensemble import VIEWS, load_runs  # noqa: E402
from models.infer import evaluate  # noqa: E402


def score(net, meta, folder, root, batch):
    """-> (1 + K,) IoU mean and per class of the split that the run reports, seconds."""
    kind = meta["source"] if meta["source"] in public.SETS else "folder"
    d = Source(kind, root or meta["root"], meta["variant"], Path(folder) / "split.json", need=())
    d.reading = meta["reading"]
    data = d.part(meta["reported"], meta["norm"])
    window = dict(crop=meta["crop"], overlap=meta["overlap"], batch=batch, amp=False)
    began = time.time()
    iou = metrics.iou(evaluate(net, data, window, what=meta["reported"]))
    return torch.cat([iou.nanmean()[None], iou]), time.time() - began


def row(name, found):
    scores, seconds = zip(*found)
    scores = torch.stack(scores)
    cells = [f"{v:.3f}" for v in scores.mean(0)]
    if len(found) > 1:
        cells = [f"{cell} +/- {sd:.3f}" for cell, sd in zip(cells, scores.std(0))]
    print("| " + " | ".join([name, *cells, f"{sum(seconds) / len(seconds):.1f}"]) + " |", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", nargs="+", required=True, help="finished runs of several seeds")
    p.add_argument("--soup", nargs="+", default=[], metavar="RUN", help="finished runs of one start")
    p.add_argument("--root", help="where the data set lies now, if not where the runs were trained")
    p.add_argument("--batch-size", type=int, default=16, help="windows at once")
    args = p.parse_args()
    _, _, device = run.start()
    first, *others = args.runs
    names = [c["name"] for c in load_weights(first, header_only=True)[1]["classes"]]
    print("| " + " | ".join(["", "mIoU", *names, "seconds"]) + " |\n" + "|---" * (len(names) + 3) + "|")

    def answer(folder, **how):
        net, meta = load_runs(folder, **how)
        return score(net.to(device), meta, folder, args.root, args.batch_size)

    for tta in (None, *VIEWS):
        row(tta or "plain", [answer(folder, tta=tta) for folder in args.runs])
    if others:
        row(f"ensemble of {len(args.runs)}", [answer(first, partners=others)])
        row("ensemble, flips", [answer(first, partners=others, tta="flips")])
    if args.soup:
        start, *rest = args.soup
        row("of the soup, plain", [answer(folder) for folder in args.soup])
        row("ensemble of these", [answer(start, partners=rest)])
        row(f"soup of {len(args.soup)}", [answer(start, soup=rest)])


if __name__ == "__main__":
    try:
        main()
    except BadInput as e:
        sys.exit(f"error: {e}")
