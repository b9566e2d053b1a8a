"""kill -9 at random moments: is a run that goes on, and a prediction that is repeated, the same to the last byte?

    python tests/bench_kill.py [N] [SCRIPT ...]      N runs of each script are killed (20), of all five without SCRIPT
Every run is killed once, every other one also when it goes on; then it is finished and compared with one that nobody
has killed. Killed before its first last.pt it is started again by the same command. Runs are tiny: a few seconds each.
"""
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from runs import TINY, same_run, server, tiny_set, trained
from test_scenes import make_scenes

FLAGS = {
    "train_seg": [*TINY, "--ema", 0.9, "--cutmix", 0.5, "--workers", 1],
    "train_points": [*TINY, "--ema", 0.5, "--grow", 1, "--workers", 1],
    "train_kd": [*TINY, "--lookahead", 2, "--workers", 1],
    "train_cls": ["--mode", "finetune", "--epochs", 3, "--batch-size", 8, "--eval-every", 4, "--warmup", 2,
                  "--amp", "off"],
    "predict": []}


def command(script, place, out):
    """The command that begins a run, and what is typed to go on with it."""
    if script == "predict":
        argv = [trained(), tiny_set(), "--out", out]
        return argv, argv
    root = tiny_set()
    if script == "train_cls":
        root = place / "scenes"
    more = ["--teacher", trained()] if script == "train_kd" else []
    return ["--root", root, "--out", out, *FLAGS[script], *more], ["--resume", out]


def killed(script, argv, seconds):
    """Runs the script for so long -> exit code and text."""
    pid = server().start(script, *argv)
    time.sleep(seconds)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # it was faster
        pass
    return server().finish()


def equal(script, a, b):
    """Have two runs, or two predictions, written the same?"""
    if script != "predict":
        try:
            same_run(a, b)
        except (AssertionError, OSError) as e:
            print(f"  {b}: {str(e).splitlines()[0]}")
            return False
        return not list(b.glob("*.tmp"))
    # The hidden lists of what was written have a line more for each file that was written twice.
    lists = (".written.jsonl", ".finished.jsonl")
    files, there = ({file.relative_to(folder) for file in folder.rglob("*")
                     if file.is_file() and file.name not in lists} for folder in (a, b))
    unequal = [str(f) for f in files & there if (a / f).read_bytes() != (b / f).read_bytes()]
    if unequal or files != there:
        print(f"  unequal {unequal[:3]}, only in one {sorted(map(str, files ^ there))[:3]}")
    return not unequal and files == there


def trial(script, place, seconds, clock, twice):
    """One killed run to its end -> its folder, when it was killed, last exit code and text."""
    out = place / f"{script}-{clock.random()}"
    begin, resume = command(script, place, out)
    moments, argv, code = [], begin, -signal.SIGKILL
    for _ in range(1 + twice):
        moments.append(clock.uniform(0, seconds))
        code, text = killed(script, argv, moments[-1])
        if code != -signal.SIGKILL:
            break
        argv = resume if script == "predict" or (out / "last.pt").exists() else begin
    if code == -signal.SIGKILL:
        server().start(script, *argv)
        code, text = server().finish()
    return out, moments, code, text


def main(n=20, *scripts):
    clock = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_scenes(place / "scenes")
        trained()
        for script in scripts or FLAGS:
            whole, began = place / script, time.time()
            server().run(script, *command(script, place, whole)[0])
            seconds = time.time() - began
            same = 0
            for i in range(n):
                out, moments, code, text = trial(script, place, seconds, clock, twice=i % 2)
                right = code == 0 and equal(script, whole, out)
                if not right:
                    print(f"  killed after {moments}, exit code {code}\n{text}")
                same += right
                shutil.rmtree(out, ignore_errors=True)
            print(f"{script:14} {n} tried, {same} equal  (a run takes {seconds:.1f} s)", flush=True)


if __name__ == "__main__":
    number, *names = sys.argv[1:] or ["20"]
    main(int(number), *names)
