"""Time and peak memory of predict.py on one image, by its size; each row is a process of its own.

    python tests/bench_predict.py [RUN] [SIDE ...]        (a demo run of one step; 512, 2048, 4096, 8192)
"""
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
MEASURED = "import resource, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); " \
           "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def script(name, *args):  # -> what it printed
    command = [sys.executable, "-c", MEASURED, ROOT / name, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def main(run=None, *sides):
    with tempfile.TemporaryDirectory() as folder:
        if run is None:
            run = Path(folder, "run")
            demo = ["--dataset", "demo", "--root", Path(folder, "demo"), "--workers", 0]
            script("train_seg.py", *demo, "--steps", 1, "--out", run)
        print("pixels a side   seconds   GB at most   bytes per further pixel")
        before = None
        for side in map(int, sides or (512, 2048, 4096, 8192)):
            noise = np.random.default_rng(0).integers(0, 256, (side // 16, side // 16, 3), np.uint8)
            Image.fromarray(noise).resize((side, side)).save(Path(folder, "image.png"), compress_level=1)
            began = time.time()
            peak = int(script("predict.py", run, Path(folder, "image.png"), "--out", folder + "/p").split()[-1]) * 1024
            more = f"{(peak - before[1]) / (side ** 2 - before[0] ** 2):25.1f}" if before else ""
            print(f"{side:13} {time.time() - began:9.1f} {peak / 1e9:12.2f}{more}", flush=True)
            before = side, peak


if __name__ == "__main__":
    main(*sys.argv[1:])
