"""What eval.py adds to the network: CPU seconds of counting and of the network, for one image of 1024 x 1024.

    python tests/bench_eval.py [--arch nano8] [--side 1024]
    python tests/bench_eval.py --memory --side 6000 --classes 20    memory that the validation of one scene takes
"""
import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import boundary, metrics  # noqa: E402
from data.datasets import SegDataset  # noqa: E402
from data.io import Labels  # noqa: E402
from models.infer import evaluate, slide  # noqa: E402
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


class Scene(SegDataset):
    """One scene of noise, made in memory."""
    side = 6000

    def decode(self, image_path, mask_path):
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (self.side, self.side, 3), np.uint8)
        return image, image[..., 0] % len(self.labels.names)


def memory(side, classes):
    """Prints how much more memory the process has held in the validation of one scene than before it."""
    data = Scene({"scene": ("scene", "mask")}, Labels([dict(name=str(i), id=i) for i in range(classes)]), "sat")
    data.side = side
    data.read(0)  # the scene itself is there in any case
    torch.manual_seed(0)
    net = nn.Conv2d(3, classes, 3, padding=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    cm = evaluate(net, data, dict(crop=512, overlap=0.25, batch=8, amp=False))
    took = time.process_time() - start
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{side} x {side}, {classes} classes: {more / 1024:.0f} MB more, {1024 * more / side**2:.0f} bytes a pixel, "
          f"{took:.1f} CPU s, {cm.diag().sum()} pixels right")


@torch.inference_mode()
def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--arch", default="nano8")
    p.add_argument("--side", type=int, default=1024)
    p.add_argument("--classes", type=int, default=8)
    p.add_argument("--memory", action="store_true")
    args = p.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        memory(args.side, args.classes)
        return
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
