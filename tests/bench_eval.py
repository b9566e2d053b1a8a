"""What eval.py adds to the network: CPU seconds of counting and of the network, for one image of 1024 x 1024.

    python tests/bench_eval.py [--arch nano8] [--side 1024]
"""
import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import boundary, metrics  # noqa: E402
from models.infer import slide  # noqa: E402
from models.nets import make  # noqa: E402
from models.score import Counts  # noqa: E402


def least(work, rounds=3):
    """CPU seconds of the quickest of some rounds."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


@torch.inference_mode()
def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--arch", default="nano8")
    p.add_argument("--side", type=int, default=1024)
    p.add_argument("--classes", type=int, default=8)
    args = p.parse_args()
    torch.set_num_threads(1)
    net, _, _ = make("vit", args.classes, "none", args.arch, "fpn")
    net.eval()
    x = torch.randn(3, args.side, args.side)
    logits = slide(net, x, 256, 0.25, 8, False)
    fields = torch.randint(0, args.classes, (args.side // 32,) * 2, dtype=torch.uint8)
    y = fields.repeat_interleave(32, 0).repeat_interleave(32, 1)
    pred = y.roll((3, 2), (0, 1))

    def count(temperature):
        counts = Counts(1, args.classes, "cpu", 0, temperature)
        counts.add(0, y, y, pred)
        counts.add_confidence(logits, y, y, pred)

    network = least(lambda: slide(net, x, 256, 0.25, 8, False), 2)
    rows = {
        "network": network,
        "confusion matrix": least(lambda: metrics.confusion(pred, y, args.classes)),
        "borders": least(lambda: boundary.boundary_counts(pred, y, args.classes)),
        "all counts": least(lambda: count(None)),
        "all counts, calibrated": least(lambda: count(1.5)),
    }
    for name, seconds in rows.items():
        print(f"{name:24} {seconds:7.3f} s  {seconds / network:6.1%} of the network")


if __name__ == "__main__":
    main()
