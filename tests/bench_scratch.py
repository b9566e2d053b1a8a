"""Networks from random weights at equal CPU time: ours, a plain U-Net, segmentation-models-pytorch's Unet-ResNet18.

    python tests/bench_scratch.py --out runs/bench_scratch                      demo, 5 CPU minutes a run
    python tests/bench_scratch.py --out runs/bench_scratch --dubai D --minutes 13
All are trained by train_seg.py with the same crops, loss and rate schedule. The steps of each are what its first 20
let expect in the given time; the table has what they took. --only NAME ... and --seeds choose. One thread.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from torch import nn  # noqa: E402

# name -> flags of train_seg.py; unet and smp are made here.
NETWORKS = {
    "nano8": ["--arch", "nano8"],
    "nano16": ["--arch", "nano16"],
    "nano16 tokens": ["--arch", "nano16", "--head", "tokens"],
    "unetformer": ["--model", "unetformer"],
    "unet": ["--model", "unet"],
    "smp": ["--model", "smp"],
}
DATA = {"demo": [], "dubai": ["--crop", "192", "--scale", "0.4", "1.2"]}


class PlainUnet(nn.Module):
    """16, 32, 64 and 128 channels, two convolutions a level, half of the input's size: .49 M parameters."""

    def __init__(self, classes, widths=(16, 32, 64, 128)):
        super().__init__()
        double = lambda a, b: nn.Sequential(*[layer for i in (a, b) for layer in (
            nn.Conv2d(i, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())])
        self.down = nn.ModuleList([double(a, b) for a, b in zip((3, *widths), widths)])
        pairs = list(zip(widths, widths[1:]))[::-1]
        self.up = nn.ModuleList([nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairs])
        self.join = nn.ModuleList([double(2 * a, a) for a, b in pairs])
        self.out = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x):
        H, W = x.shape[-2:]
        x = nn.functional.pad(x, (0, -W % 16, 0, -H % 16))
        size = x.shape[-2:]
        x, kept = nn.functional.avg_pool2d(x, 2), []
        for i, layer in enumerate(self.down):
            x = layer(nn.functional.max_pool2d(x, 2) if i else x)
            kept.append(x)
        for up, join, skip in zip(self.up, self.join, kept[-2::-1]):
            x = join(torch.cat([up(x), skip], 1))
        return nn.functional.interpolate(self.out(x), size, mode="bilinear")[..., :H, :W]


class Smp(nn.Module):
    """smp.Unet on ResNet18, padded to whole 32."""

    def __init__(self, classes):
        super().__init__()
        import segmentation_models_pytorch as smp
        self.net = smp.Unet("resnet18", encoder_weights=None, classes=classes)

    def forward(self, x):
        H, W = x.shape[-2:]
        return self.net(nn.functional.pad(x, (0, -W % 32, 0, -H % 32)))[..., :H, :W]


def one(flags):
    """A process of its own: train_seg.py with two more networks. The last line is its CPU seconds."""
    from models import nets
    nets.NETS |= {"unet": (PlainUnet, None, {}), "smp": (Smp, None, {})}
    import train_seg
    train_seg.main(train_seg.parse_args(flags))
    print(time.process_time())


def call(flags):
    words = [sys.executable, __file__, "--one", *map(str, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def steps_in(minutes, flags, out):
    """How many steps fit: from the CPU seconds of runs of 4 and 24 steps, whose difference is twenty steps."""
    seconds = []
    for steps in (4, 24):
        trial = out / f"trial-{steps}"
        if not (trial / "cpu.json").exists():
            cpu = call([*flags, "--steps", steps, "--eval-every", steps, "--out", trial])
            (trial / "cpu.json").write_text(json.dumps(cpu))
        seconds.append(json.loads((trial / "cpu.json").read_text()))
    step = (seconds[1] - seconds[0]) / 20
    start = max(0.0, seconds[0] - 4 * step)  # opening the data, a validation and the test
    return max(50, round((60 * minutes - start) / step / 2) * 2)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="runs/bench_scratch")
    p.add_argument("--dubai", help="folder with dataset.json and the tiles; without it the demo")
    p.add_argument("--minutes", type=float, default=5.0, help="CPU minutes a run")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    args = p.parse_args(argv)
    data = "dubai" if args.dubai else "demo"
    root = ["--root", args.dubai] if args.dubai else []
    print("| network | test mIoU | OA | steps | CPU s |\n|---|---|---|---|---|")
    for name in args.only:
        flags = [*root, *DATA[data], *NETWORKS[name], "--workers", "0"]
        folder = Path(args.out) / data / name.replace(" ", "-")
        steps = steps_in(args.minutes, flags, folder)
        scores = []
        for seed in args.seeds:
            out = folder / str(seed)
            if not (out / "cpu.json").exists():
                cpu = call([*flags, "--steps", steps, "--eval-every", steps // 2, "--seed", seed, "--out", out])
                (out / "cpu.json").write_text(json.dumps(cpu))
            result = json.loads((out / "results.json").read_text())
            scores.append((result["miou"], result["oa"], json.loads((out / "cpu.json").read_text())))
        mean, sd = np.mean(scores, 0), np.std(scores, 0, ddof=len(scores) > 1)
        print(f"| {name} | {mean[0]:.3f} +/- {sd[0]:.3f} | {mean[1]:.3f} | {steps} | {mean[2]:.0f} |", flush=True)


if __name__ == "__main__":
    one(sys.argv[2:]) if sys.argv[1:2] == ["--one"] else main()
