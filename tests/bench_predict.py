"""Time and peak memory of predict.py on one image, by its size; each row is a process of its own.

    python tests/bench_predict.py                         on a demo run of one step
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", help="run folder of a trained network")
    p.add_argument("--sides", type=int, nargs="+", default=[512, 2048, 4096, 8192], help="of the images, rising")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = args.run
        if run is None:
            run = f"{folder}/run"
            demo = ["--dataset", "demo", "--root", f"{folder}/demo", "--workers", "0", "--steps", "1", "--out", run]
            subprocess.run([sys.executable, ROOT / "train_seg.py", *demo], check=True, stdout=subprocess.DEVNULL)
        print("pixels a side   seconds   GB at most   bytes per further pixel")
        before = None
        for side in sorted({*args.sides}):
            noise = np.random.default_rng(0).integers(0, 256, (side // 16, side // 16, 3), np.uint8)
            Image.fromarray(noise).resize((side, side)).save(f"{folder}/image.png", compress_level=1)
            began = time.time()
            job = subprocess.Popen([sys.executable, ROOT / "predict.py", run, f"{folder}/image.png", "--out",
                                    f"{folder}/predictions"], stdout=subprocess.DEVNULL)
            _, failed, usage = os.wait4(job.pid, 0)
            if failed:
                sys.exit(f"predict.py failed on {side} x {side} pixels")
            peak = usage.ru_maxrss * 1024  # Linux counts kilobytes
            more = f"{(peak - before[1]) / (side ** 2 - before[0] ** 2):25.1f}" if before else ""
            print(f"{side:13} {time.time() - began:9.1f} {peak / 1e9:12.2f}{more}", flush=True)
            before = side, peak


if __name__ == "__main__":
    main()
