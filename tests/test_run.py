"""models/run.py: flags, processes, signals, the lock of a run folder, averaged weights."""
import contextlib
import copy
import io
import json
import math
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gloo import FORK, on_ranks
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import eval as eval_script
import predict
import train_cls
import train_kd
import train_points
import train_seg
from data.common import BadInput, replace, without_nan, write
from data.io import read_image
from models import run
from models.checkpoint import save_state
from models.weights import BadWeights

SCRIPTS = [train_seg, train_points, train_kd, train_cls, eval_script, predict]


def refused(capsys, work, *args):
    """The one line with which the call ends the program, exit code 2."""
    with pytest.raises(SystemExit) as e:
        work(*args)
    said = capsys.readouterr()
    assert e.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


# ---- types of flags

def parser():
    p = run.Parser("words")
    p.add_argument("--steps", type=run.COUNT, default=10)
    p.add_argument("--warmup", type=run.WHOLE, default=0)
    p.add_argument("--color", type=run.SHARE, default=0.5)
    p.add_argument("--lr", type=run.RATE, default=1.0)
    p.add_argument("--bands", type=run.bands)
    p.add_argument("--scale", type=float, nargs=2, default=[0.5, 2.0])
    p.add_argument("--out")
    p.add_argument("--resume")
    return p


@pytest.mark.parametrize("flag, good", [
    ("--steps", ["1", "2147483648"]), ("--warmup", ["0", "7"]), ("--color", ["0", "0.25", "1"]),
    ("--lr", ["0", "1e-5", "10"])])
def test_numbers_in_range_are_taken(flag, good):
    for text in good:
        value = getattr(parser().parse_args([flag, text]), flag[2:])
        assert value == float(text) and isinstance(value, int) == (flag in ("--steps", "--warmup"))


@pytest.mark.parametrize("flag, bad", [
    ("--steps", "0 -1 1.5 2147483649"), ("--warmup", "-1 0.5"), ("--color", "-0.1 1.01"),
    ("--lr", "-1 10.1 1e9")])
def test_numbers_out_of_range_are_refused_and_so_is_nan(capsys, flag, bad):
    for text in [*bad.split(), "nan", "inf", "-inf", "ten", "1,5"]:
        said = refused(capsys, parser().parse_args, [f"{flag}={text}"])
        assert f"argument {flag}: {text}: expected " in said


def test_bands_are_three_numbers_from_1(capsys):
    assert parser().parse_args(["--bands", "4,1,2"]).bands == [4, 1, 2]
    for text in ("1,2", "1,2,3,4", "0,1,2", "a,b,c", "1,2,-3", "1 2 3", "1,,2"):
        assert "expected three numbers" in refused(capsys, parser().parse_args, ["--bands", text])


def test_a_pair_has_its_lower_number_first(capsys):
    p = parser()
    run.check_rising(p, p.parse_args(["--scale", "1", "1"]), "scale")
    run.check_rising(p, SimpleNamespace(scale=None), "scale")
    nan, inf = math.nan, math.inf
    for pair in ([2.0, 1.0], [nan, 1.0], [1.0, nan], [1.0, inf], [-inf, 1.0]):
        said = refused(capsys, run.check_rising, p, SimpleNamespace(scale=pair), "scale")
        assert "--scale" in said and "expected the lower number first" in said


def test_flags_that_go_with_a_choice_are_refused_beside_another(capsys):
    p = run.Parser("words")
    for flag in ("--model", "--head", "--layer-decay", "--resume"):
        p.add_argument(flag, default="vit" if flag == "--model" else "fpn")

    def check(*argv):
        run.only_with(p, p.parse_args(argv), "model", "vit", "head", "layer_decay")

    p.set_defaults(resume=None)
    check("--layer-decay", "1")
    check("--model", "unet", "--head", "fpn")  # as by default
    check("--model", "unet", "--head", "x", "--resume", "a")  # that run has been asked
    said = refused(capsys, check, "--model", "unet", "--layer-decay", "1")
    assert "--layer-decay goes with --model vit, not unet; leave it out" in said


@pytest.mark.parametrize("text", ["٣", "１", "1_0", "0x1", "1e400", "²", "--", ""])
def test_a_number_of_other_scripts_is_refused_by_every_numeric_flag(capsys, text):
    for flag in ("--steps", "--warmup", "--color", "--lr", "--bands"):
        assert flag in refused(capsys, parser().parse_args, [f"{flag}={text}"])


def test_a_word_that_no_flag_can_have_is_refused_by_name(capsys):
    assert "--out=--: expected a value behind the =" in refused(capsys, parser().parse_args, ["--out=--"])
    assert parser().parse_args(["--out=./--"]).out == "./--"  # the advice
    said = refused(capsys, parser().parse_args, ["--out", "a\0b"])
    assert said == "error: a\\x00b: no file or flag has a NUL character in it; type it without\n"
    assert "\x1b" not in refused(capsys, parser().parse_args, ["--steps", "\x1b[31m"])


def test_max_pixels_is_no_flag_of_a_run_and_counts_in_all_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("NANORS_MAX_PIXELS", "1000000000")
    args = parser().parse_args(["--max-pixels", "50"])
    assert "max_pixels" not in vars(args)  # so runs of earlier versions can be resumed
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(BadInput, match="a.png: 8 x 8 pixels .* over the limit of 50"):
        read_image(tmp_path / "a.png")
    parser().parse_args(["--max-pixels", "64"])  # as the message says
    assert read_image(tmp_path / "a.png").shape == (8, 8, 3)


def test_an_empty_value_is_refused(capsys):
    for argv in (["--out", ""], ["--out="], ["--resume", ""]):
        said = refused(capsys, parser().parse_args, argv)
        assert f"{argv[0].strip('=')} is empty" in said


def test_an_unknown_or_shortened_flag_is_refused(capsys):
    assert "--nonsense" in refused(capsys, parser().parse_args, ["--nonsense"])
    assert "--step" in refused(capsys, parser().parse_args, ["--step", "3"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_flags_of_earlier_versions_are_answered(capsys, monkeypatch, script):
    monkeypatch.setattr(sys, "argv", ["script.py", "RUN", "INPUT", "--help"])
    with pytest.raises(SystemExit):
        script.parse_args()
    text = capsys.readouterr().out
    gone = [flag for flag in run.REMOVED if f" {flag} " not in text and f" {flag}\n" not in text]
    assert {"--taps", "--feat-norm", "--output-stride", "--freeze-bn", "--clip"} <= set(gone)
    for flag in gone:
        for argv in ([flag, "1"], [f"{flag}=1"]):
            said = refused(capsys, script.parse_args, argv)
            assert said.startswith(f"error: {flag} is gone: ") and len(said) > len(flag) + 25
    monkeypatch.setattr(sys, "argv", ["script.py", "--taps", "3"])
    assert "--taps is gone" in refused(capsys, script.parse_args)  # typed, not given by a test


# ---- flags of a run that goes on

def stored(folder, **more):
    """A last.pt whose run was started with these flags."""
    args = vars(parser().parse_args([])) | dict(out=str(folder)) | more
    save_state(folder / "last.pt", args=args)
    return folder


def resumed(folder, *argv, **how):
    return run.parse(parser(), ["--resume", str(folder), *argv], **how)


def test_without_resume_the_flags_are_those_typed():
    assert run.parse(parser(), ["--steps", "3"]).steps == 3


def test_resume_takes_the_flags_of_the_run(tmp_path):
    stored(tmp_path, steps=7, color=0.25, scale=[1.0, 1.5], bands=[3, 2, 1], resume="earlier")
    args = resumed(tmp_path)
    assert (args.steps, args.color, args.scale, args.bands) == (7, 0.25, [1.0, 1.5], [3, 2, 1])
    assert args.out == args.resume == str(tmp_path)
    same = resumed(tmp_path, "--color", "0.25", "--scale", "1", "1.5", "--bands", "3,2,1")
    assert vars(same) == vars(args)


def test_a_changed_flag_is_refused(tmp_path):
    stored(tmp_path, color=0.25)
    said = "trained with color = 0.25, not 0.5; leave the flag out"
    with pytest.raises(BadInput, match=said) as e:
        resumed(tmp_path, "--color", "0.5")
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_a_movable_flag_may_change(tmp_path):
    stored(tmp_path, lr=1.0)
    assert resumed(tmp_path, "--lr", "2", movable=("lr", "color")).lr == 2


def test_steps_may_grow_but_not_shrink(tmp_path):
    stored(tmp_path, steps=10)
    assert resumed(tmp_path, "--steps", "11").steps == 11
    with pytest.raises(BadInput, match="steps = 10, not 9, and only more steps"):
        resumed(tmp_path, "--steps", "9")
    assert resumed(tmp_path, "--warmup", "5", longer="warmup").warmup == 5
    with pytest.raises(BadInput, match="steps = 10, not 11"):
        resumed(tmp_path, "--steps", "11", longer="warmup")


@pytest.mark.parametrize("state", [
    dict(args=dict(steps=3, out="a")), dict(args=[1, 2]), dict(net={}), {}])
def test_a_last_pt_of_another_script_or_version_is_refused(tmp_path, state):
    save_state(tmp_path / "last.pt", **state)
    with pytest.raises(BadInput, match="last.pt: of another script, or of an earlier version") as e:
        resumed(tmp_path)
    assert "\n" not in str(e.value)


def test_a_run_without_its_first_last_pt_is_started_again_by_its_own_command(tmp_path):
    out = filled(tmp_path / "a", ".lock", "split.json")
    with pytest.raises(BadInput, match="start it again: its command without --resume"):
        resumed(out)
    write(out / "protocol.json", dict(command="python train_seg.py --root D --out 'a b'"))
    with pytest.raises(BadInput) as e:
        resumed(out)
    assert str(e.value).startswith(f"{out}: was ended before its first last.pt")
    assert str(e.value).endswith("start it again: python train_seg.py --root D --out 'a b'")


@pytest.mark.parametrize("flag, value", [
    ("steps", 1e308), ("steps", True), ("steps", math.nan), ("steps", 2**40), ("lr", "1"), ("lr", 11), ("color", [0.5]),
    ("bands", [1, 2]), ("bands", 3), ("bands", "1,2,3"), ("bands", [1, 2, 0]), ("scale", [1.0]), ("scale", 1.0),
    ("out", 3), ("out", ["a"])])
def test_a_flag_in_last_pt_that_nobody_could_type_is_refused(tmp_path, flag, value):
    stored(tmp_path, **{flag: value})
    with pytest.raises(BadInput, match=f"last.pt: --{flag} is .* in it; start a new run"):
        resumed(tmp_path)


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(BadWeights, match="nothing to resume"):
        resumed(tmp_path / "none")
    (tmp_path / "last.pt").write_text("cut")
    with pytest.raises(BadWeights, match="no last.pt of a run, or truncated"):
        resumed(tmp_path)


# ---- errors

@pytest.mark.parametrize("error", [
    BadInput("a.png: found this"), BadWeights("a.png: found this"), OSError("a.png: found this")])
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(capsys, error):
    def work():
        with run.one_line_errors():
            raise error

    assert refused(capsys, work) == "error: a.png: found this\n"


@pytest.mark.parametrize("error, said", [
    (BadInput("a\nb\x1b[31m.png: found this"), "a\\nb\\x1b[31m.png: found this"),
    (MemoryError("Unable to allocate 3 GiB"), "out of memory (asked for 3 GiB); lower --batch-size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory; lower --batch-size")])
def test_an_error_is_one_line_whatever_it_names(capsys, error, said):
    def work():
        with run.one_line_errors():
            raise error

    shown = refused(capsys, work)
    assert shown.startswith(f"error: {said}") and shown.count("\n") == 1


class Bad(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, i):
        raise BadInput("a.png: found this")


def test_an_error_in_a_reading_process_is_one_line_too(capsys):
    batches = iter(DataLoader(Bad(), num_workers=1))

    def work():
        with run.one_line_errors():
            next(batches)

    assert refused(capsys, work) == "error: a.png: found this\n"
    assert not list(batches)  # ends the reading process


class Killed(torch.utils.data.Dataset):
    def __init__(self, number):
        self.number = number

    def __len__(self):
        return 1

    def __getitem__(self, i):
        if self.number:
            os.kill(os.getpid(), self.number)
        raise MemoryError("Unable to allocate 1.50 GiB for an array")


@pytest.mark.parametrize("number, said", [
    (signal.SIGKILL, "a reading process was killed (Killed): out of memory? try --workers 1"),
    (signal.SIGBUS, "a reading process was killed (Bus error): out of shared memory, /dev/shm? try --workers 0"),
    (None, "a reading process is out of memory (asked for 1.50 GiB); lower --workers")])
def test_a_reading_process_that_is_gone_is_one_line(capsys, number, said):
    def work():
        with run.one_line_errors():
            next(iter(DataLoader(Killed(number), num_workers=1)))

    assert refused(capsys, work) == f"error: {said}\n"


def test_the_disk_is_not_blamed_for_a_reading_process_that_is_gone(capsys, tmp_path):
    def save(name):  # torch's handler of the signal raises in whatever the process does
        raise RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. ")

    def work():
        with run.one_line_errors():
            replace(tmp_path / "last.pt", save)

    assert refused(capsys, work) == "error: a reading process was killed (Killed): out of memory? try --workers 1\n"


def cuda():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total of ...")


@pytest.mark.parametrize("work, said", [
    (lambda: torch.empty(2**58, dtype=torch.uint8), "out of memory (asked for 288230376151711744 bytes)"),
    (lambda: np.empty(2**58, np.uint8), "out of memory (asked for 256. PiB)"),
    (cuda, "out of memory of the GPU (asked for 2.50 GiB)")])
def test_too_little_memory_is_one_line_that_says_what_to_lower(capsys, work, said):
    def script():
        with run.one_line_errors(lower="--batch-size or --crop"):
            work()

    assert refused(capsys, script) == f"error: {said}; lower --batch-size or --crop\n"


def test_scripts_print_any_writing_from_their_first_line_on(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    with run.one_line_errors():
        print("水", flush=True)
    assert stream.buffer.getvalue() == b"\\u6c34\n"


def test_a_run_without_a_validation_has_no_score():
    assert run.score("mIoU", 0.5) == "mIoU 0.5000" and run.score("mIoU", -1.0) == "mIoU: none so far"


def test_ctrl_c_is_quiet_and_faults_of_the_code_are_not(capsys):
    with pytest.raises(SystemExit) as e, run.one_line_errors():
        raise KeyboardInterrupt
    assert e.value.code == 130 and capsys.readouterr() == ("", "interrupted\n")
    with pytest.raises(ZeroDivisionError), run.one_line_errors():
        1 / 0
    with pytest.raises(RuntimeError, match="shapes"), run.one_line_errors():
        raise RuntimeError("shapes (3, 4) and (5, 6)")


# ---- signals

@pytest.fixture
def interrupts():
    """Ctrl-C as in a terminal: in a shell's background job it would be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_is_noted_and_the_second_ends(interrupts):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop = run.Stop()
    assert not stop.signal
    signal.raise_signal(signal.SIGINT)
    assert stop.signal == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    stop.release()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_closed_terminal_is_noted_and_what_is_printed_then_does_no_harm(monkeypatch, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    read_end, write_end = os.pipe()
    os.close(read_end)
    monkeypatch.setattr(sys, "stdout", open(write_end, "w"))
    monkeypatch.setattr(sys, "stderr", open(tmp_path / "log", "w"))
    stop = run.Stop()
    signal.raise_signal(signal.SIGHUP)
    print("nobody reads this", flush=True)
    print("this stands in a file", file=sys.stderr, flush=True)
    assert stop.signal == signal.SIGHUP and stop.told(torch.device("cpu"))
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    assert (tmp_path / "log").read_text() == "this stands in a file\n"
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    run.Stop().release()
    stop = run.Stop()
    signal.raise_signal(signal.SIGHUP)
    assert not stop.signal and not stop.told(torch.device("cpu"))
    stop.release()
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("turn", range(5))
def test_a_terminal_that_is_closed_in_the_midst_of_a_line_ends_no_step(tmp_path, turn):
    pid, terminal = pty.fork()
    if pid == 0:  # as in a shell of its own, whose end the system signals
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop, step = run.Stop(), 0
        while not stop.signal:
            step += 1
            print(f"step {step}", "x" * 500, flush=True)
        print("saved", file=sys.stderr, flush=True)
        (tmp_path / "saved").write_text(str(step))
        try:
            stop.exit()
        except SystemExit as e:
            os._exit(e.code)
    while b"step 50" not in os.read(terminal, 1000):
        pass
    os.read(terminal, 100 + turn)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert int((tmp_path / "saved").read_text()) >= 50


def test_without_a_signal_a_pipe_that_nobody_reads_is_an_error(monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    monkeypatch.setattr(sys, "stdout", open(write_end, "w"))
    monkeypatch.setattr(run.Patient, "left", False)
    stop = run.Stop()
    with pytest.raises(BrokenPipeError):
        print("head has gone", flush=True)
    stop.release()


@pytest.mark.parametrize("number, code", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (0, 143)])
def test_the_exit_code_is_that_of_the_signal(number, code):
    stop = run.Stop()
    stop.release()
    stop.signal = number  # 0: another rank was told
    with pytest.raises(SystemExit) as e:
        stop.exit()
    assert e.value.code == code


def test_signals_are_given_back(interrupts):
    stop = run.Stop()
    stop.release()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert not stop.signal


class Group(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, i):
        return os.getpgrp()


def test_ctrl_c_of_a_terminal_does_not_reach_reading_processes():
    (group,) = DataLoader(Group(), num_workers=1, worker_init_fn=run.keep_signals_from_worker)
    assert group.item() != os.getpgrp()
    (group,) = DataLoader(Group(), num_workers=1)
    assert group.item() == os.getpgrp()


# ---- the run folder

def filled(folder, *names):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    return folder


FINISHED = "last.pt", "results.json", "protocol.json"


def test_a_default_folder_is_numbered(tmp_path):
    default = str(tmp_path / "demo")
    assert run.folder(None, default, None) == tmp_path / "demo"
    assert not (tmp_path / "demo").exists()  # nothing is made yet
    filled(tmp_path / "demo", *FINISHED)
    filled(tmp_path / "demo-2", "mine.txt")
    (tmp_path / "demo-3").touch()
    filled(tmp_path / "demo-5", *FINISHED)
    assert run.folder(None, default, None) == tmp_path / "demo-4"


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    for names, said in ((FINISHED, "holds a run; type --resume .* to go on"),
                        (FINISHED[1:], "holds a finished run; type another --out"),
                        (["mine.txt"], "no run of this script; name another --out"),
                        (["results.json"], "no run of this script")):
        folder = filled(tmp_path / f"a folder {len(names)} {names[0]}", *names)
        with pytest.raises(BadInput, match=said) as e:
            run.folder(str(folder), "unused", None)
        assert str(folder) in str(e.value) and "\n" not in str(e.value)
    assert "--resume '" in pytest.raises(  # can be pasted, blanks and all
        BadInput, run.folder, str(tmp_path / "a folder 3 last.pt"), "unused", None).value.args[0]
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="no run of this script"):
        run.folder(str(tmp_path / "file"), "unused", None)
    with pytest.raises(BadInput, match="not UTF-8; name another --out"):  # not after hours, when it is read back
        run.folder(str(tmp_path / os.fsdecode(b"r\xff")), "unused", None)


def test_resume_writes_to_the_run(tmp_path):
    filled(tmp_path / "a", *FINISHED)
    assert run.folder("ignored", "unused", str(tmp_path / "a")) == tmp_path / "a"


@pytest.mark.parametrize("left", [
    [], [".lock"], [".lock", "split.json"], [".lock", "split.json", "protocol.json"],
    [".lock", "split.json", "points.csv", "protocol.json", "log.jsonl", "curves.png"],
    [".lock", "split.json.4711.tmp"], [".lock", "split.json", "protocol.json.4711.tmp"]],
    ids=" ".join)
def test_the_same_command_starts_a_run_again_that_was_cut_off_early(tmp_path, left):
    filled(tmp_path / "demo", *left)
    assert run.folder(str(tmp_path / "demo"), "unused", None) == tmp_path / "demo"
    assert run.folder(None, str(tmp_path / "demo"), None) == tmp_path / "demo"


def test_old_temporary_files_are_cleared_away(tmp_path):
    filled(tmp_path / "a", ".lock", "protocol.json", "last.pt.4711.tmp")
    in_a_fork(run.claim, tmp_path / "a", str(tmp_path / "a"), None)
    assert not (tmp_path / "a/last.pt.4711.tmp").exists()


def test_what_finder_and_explorer_leave_makes_no_folder_a_foreign_one(tmp_path):
    for names in ([".DS_Store"], ["Thumbs.db", "desktop.ini", ".lock", "._split.json"]):
        out = filled(tmp_path / names[0], *names)
        assert run.folder(str(out), "unused", None) == in_a_fork(run.claim, out, str(out), None) == out
        assert set(names) <= {file.name for file in out.iterdir()}


# The user's own files may be called as those of a run; .lock says that a run has made a folder.
@pytest.mark.parametrize("names", [
    ["points.csv"], ["protocol.json", "log.jsonl"], ["results.json"], ["split.json", "curves.png"],
    [".lock", "notes.tmp"], [".lock", "last.pt.tmp"], [".lock", "mine.4711.tmp"], [".lock", "images"],
    [".git"], [".lock", "best.safetensors"]], ids=" ".join)
def test_nothing_is_touched_in_a_folder_with_files_of_others(tmp_path, names):
    out = filled(tmp_path / "a")
    for name in names:
        (out / name).write_text(f"my {name}")
    state = out.stat().st_mtime_ns
    with pytest.raises(BadInput, match="no run of this script; name another --out"):
        run.folder(str(out), "unused", None)
    assert run.folder(None, str(out), None) == tmp_path / "a-2"
    with pytest.raises(BadInput, match="no run of this script; name another --out"):
        run.claim(out, str(out), None)
    assert out.stat().st_mtime_ns == state and {file.name for file in out.iterdir()} == set(names)
    for name in names:
        assert (out / name).read_text() == f"my {name}"


def test_going_on_clears_away_the_runs_own_temporary_files_only(tmp_path):
    out = filled(tmp_path / "a", *FINISHED, "last.pt.4711.tmp", "notes.tmp", "notes.4711.tmp")
    in_a_fork(run.claim, out, None, str(out))
    assert {file.name for file in out.iterdir()} == {*FINISHED, ".lock", "notes.tmp", "notes.4711.tmp"}


# ---- the lock of a folder: it belongs to a process, so others are needed here

def answer(pipe, work, args):
    try:
        pipe.send(work(*args))
    except BadInput as e:
        pipe.send(e)


def in_a_fork(work, *args):
    """work(*args) in a process of its own, which then ends -> what it returned, or its BadInput."""
    mine, other = FORK.Pipe()
    process = FORK.Process(target=answer, args=(other, work, args))
    process.start()
    result = mine.recv()
    process.join()
    return result


def claim_and_hold(barrier, pipe, out, wanted):
    """A run as far as its first file, which lasts until the test has seen both."""
    out = run.folder(wanted, out, None)
    barrier.wait()
    try:
        out = run.claim(out, wanted, None)
        write(out / "protocol.json", {})
        pipe.send(out)
    except BadInput as e:
        pipe.send(e)
    barrier.wait()


def two_at_once(out, wanted):
    barrier, (mine, other) = FORK.Barrier(2), FORK.Pipe()
    processes = [FORK.Process(target=claim_and_hold, args=(barrier, other, out, wanted))
                 for _ in range(2)]
    for process in processes:
        process.start()
    answers = [mine.recv(), mine.recv()]
    for process in processes:
        process.join()
    return answers


@pytest.mark.parametrize("turn", range(3))
def test_two_runs_that_start_at_once_get_two_default_folders(tmp_path, turn):
    filled(tmp_path / "demo", *FINISHED)
    assert sorted(two_at_once(str(tmp_path / "demo"), None)) == [
        tmp_path / "demo-2", tmp_path / "demo-3"]


def test_of_two_runs_on_one_folder_the_second_is_refused_by_name(tmp_path):
    answers = two_at_once("unused", str(tmp_path / "a"))
    errors = [a for a in answers if isinstance(a, BadInput)]
    assert len(errors) == 1 and tmp_path / "a" in answers
    assert str(errors[0]).startswith(f"{tmp_path / 'a'}: another run is writing there")


def claim_and_sleep(pipe, out):
    run.claim(out, str(out), None)
    save_state(out / "last.pt", args=vars(parser().parse_args([])))
    worker = FORK.Process(target=time.sleep, args=(60,))  # as DataLoader's, it outlives a kill
    worker.start()
    pipe.send(worker.pid)
    time.sleep(60)


def test_a_running_run_is_not_resumed_and_a_killed_one_at_once(tmp_path):
    mine, other = FORK.Pipe()
    process = FORK.Process(target=claim_and_sleep, args=(other, tmp_path / "a"))
    process.start()
    worker = mine.recv()
    out = tmp_path / "a", None, str(tmp_path / "a")
    said = f"{tmp_path / 'a'}: another run is writing there; wait for it, or "
    assert str(in_a_fork(run.claim, *out)) == f"{said}end it"
    assert str(in_a_fork(run.folder, None, "unused", str(tmp_path / "a"))) == f"{said}end it"
    # The same command again: not to be resumed now.
    assert str(in_a_fork(run.folder, str(tmp_path / "a"), "unused", None)) == f"{said}name another --out"
    assert in_a_fork(run.folder, None, str(tmp_path / "a"), None) == tmp_path / "a-2"
    process.kill()
    process.join()
    os.kill(worker, 0)  # the worker is still there
    assert in_a_fork(run.claim, *out) == tmp_path / "a"
    os.kill(worker, signal.SIGKILL)


# ---- several processes

@pytest.mark.parametrize("n", [5, 3, 1])
def test_ranks_add_gather_and_agree_on_a_folder(tmp_path, n):
    rows = torch.arange(2.0 * n).view(n, 2)

    def work(rank, world):
        total = run.over_ranks(torch.tensor([rank, 1])).tolist()
        part = rows[rank::world]
        if not len(part):
            part = torch.zeros(0, 0)  # as a rank without images has it
        run.wait()
        out = run.claim(tmp_path / f"run{rank}", None, None)
        return total, run.gather(part, n, torch.device("cpu")).tolist(), out

    for answer in on_ranks(tmp_path, 3, work):
        assert answer == ([3, 3], rows.tolist(), tmp_path / "run0")


def test_ranks_all_say_that_another_run_is_writing(tmp_path):
    mine, other = FORK.Pipe()
    process = FORK.Process(target=claim_and_sleep, args=(other, tmp_path / "a"))
    process.start()
    worker = mine.recv()

    def work(rank, world):
        said = []
        for wanted, resume in ((str(tmp_path / "a"), None), (None, str(tmp_path / "a"))):
            try:
                run.folder(wanted, "unused", resume)
            except BadInput as e:
                said.append("another run is writing there" in str(e))
        return said

    assert on_ranks(tmp_path, 2, work) == 2 * [[True, True]]
    process.kill()
    process.join()
    os.kill(worker, signal.SIGKILL)


def lose_a_rank(rank, world, file, text, pipe):
    sys.stderr = open(text, "w", buffering=1)
    run.LOCKS.clear()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{file}")
    torch.distributed.barrier()
    pipe.send(rank)
    if rank == 1:
        os._exit(9)
    with run.one_line_errors():
        run.over_ranks(torch.ones(1000))


def test_when_a_rank_is_killed_the_others_end_soon_with_one_line(tmp_path):
    mine, other = FORK.Pipe()
    ranks = []
    for rank in range(3):
        args = rank, 3, tmp_path / "meet", tmp_path / f"{rank}.txt", other
        ranks.append(FORK.Process(target=lose_a_rank, args=args))
        ranks[-1].start()
    assert {mine.recv() for _ in ranks} == {0, 1, 2}  # all have met
    for rank, code in enumerate((2, 9, 2)):
        ranks[rank].join(60)
        line = (tmp_path / f"{rank}.txt").read_text()
        assert ranks[rank].exitcode == code, line
        if code == 2:
            assert line == f"error: rank {rank} of 3: another rank has ended; its own message says why\n"


@pytest.mark.parametrize("text, said", [
    ("[gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:3120", "has ended"),
    ("[gloo/unbound_buffer.cc:78] Timed out waiting 1000ms for recv operation to complete", "has not answered in time"),
    ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5) ran for 10800 ms before timing out.",
     "has not answered in time"),
    ("mat1 and mat2 shapes cannot be multiplied", None)])
def test_a_rank_that_does_not_answer_is_one_line(monkeypatch, text, said):
    assert run.about_ranks(RuntimeError(text)) is None  # a single process
    monkeypatch.setattr(run, "LOCKS", [])
    monkeypatch.setattr(run.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(run.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(run.dist, "get_world_size", lambda: 4)
    line = said and f"rank 1 of 4: another rank {said}; its own message says why"
    assert run.about_ranks(RuntimeError(text)) == line


def test_a_machine_that_does_not_see_the_run_folder_is_named_on_all_ranks(tmp_path):
    def work(rank, world):
        out = run.claim(tmp_path / "a", None, None)
        with pytest.raises(BadInput) as e:
            run.check_shared(out if rank == 0 else tmp_path / "another disk")
        return str(e.value)

    said = on_ranks(tmp_path, 2, work)
    assert said[0].startswith(f"{tmp_path}/a: rank 0 has made it, and it is not there on {socket.gethostname()}; ")
    assert "--out with a folder on a disk that they share" in said[1]


def test_the_command_to_go_on_has_as_many_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_kd.py", "--steps", "3"])
    out = Path("runs/a b")
    assert run.again(out) == "python train_kd.py --resume 'runs/a b'"
    assert on_ranks(tmp_path, 2, lambda rank, world: run.again(out)) == 2 * [
        "torchrun --standalone --nproc_per_node=2 train_kd.py --resume 'runs/a b'"]


def test_one_process_needs_no_group():
    part = torch.ones(3, 2)
    assert run.over_ranks(part) is part and run.gather(part, 3, torch.device("cpu")) is part
    run.wait()
    run.end()


def test_a_seed_gives_every_process_the_same_network(monkeypatch):
    monkeypatch.setattr(run, "tune_cpu", lambda: None)
    first, second = [], []
    for found in (first, second):
        rank, world, device = run.start(seed=3)
        assert (rank, world) == (0, 1)
        found.append(torch.randn(4))
    assert torch.equal(first[0], second[0])


def test_torch_is_seeded_by_every_number():
    drawn = []
    others = (4, 0, 1, 3), (4, 0, 2, 2), (4, 1, 1, 2), (5, 0, 1, 2)
    for numbers in ((4, 0, 1, 2), (4, 0, 1, 2), *others):
        run.seed_torch(*numbers)
        drawn.append(torch.randn(1).item())
    assert drawn[0] == drawn[1] and len(set(drawn)) == 5


# ---- what must be equal

SAME = dict(world=1, weights=None, amp=False, labels=[[{"name": "a", "id": 0}], []], teacher="12ab",
            reading=dict(bands=[4, 1, 2]), stored=64)


@pytest.mark.parametrize("key, was, said", [
    ("world", 4, "with processes 4, not 1; .* torchrun --nproc_per_node=4"),
    ("weights", "ab12", "with weights ab12, not None; name the file with that sha256"),
    ("teacher", None, "with teacher None, not 12ab; name the run"),
    ("amp", True, "with amp True, not False; choose it by --amp"),
    ("labels", [[{"name": "b", "id": 0}], []], "the classes or ignored values have changed"),
    ("reading", dict(bands=None), 'with reading .*; "bands" or "input_range" in dataset.json have changed; undo'),
    ("stored", 32, "with stored 32, not 64; images of another size were added; take them out")])
def test_what_would_make_it_another_run_is_named(tmp_path, key, was, said):
    run.check_same(tmp_path, copy.deepcopy(SAME) | dict(step=3), SAME)
    earlier = {name: value for name, value in SAME.items() if name not in ("reading", "stored")}
    run.check_same(tmp_path, earlier, SAME)  # of a version that did not keep these
    with pytest.raises(BadInput, match=said) as e:
        run.check_same(tmp_path, SAME | {key: was}, SAME)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_what_json_does_not_have_becomes_none():
    row = without_nan(dict(a=1.5, b=math.nan, c=math.inf, d=-math.inf, e=0))
    assert json.loads(json.dumps(row, allow_nan=False)) == dict(a=1.5, b=None, c=None, d=None, e=0)


# ---- averaged weights

def test_ema_is_its_definition():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    net[2].requires_grad_(False)
    ema = run.Ema(net, 0.7)
    want, mean = [p.tolist() for p in net[0].weight], net[1].running_mean.tolist()
    for step in range(30):
        with torch.no_grad():
            net[0].weight.copy_(torch.randn(2, 3))
            net[1].running_mean.copy_(torch.randn(2))
        ema.update(step)
        decay = min(0.7, (1 + step) / (10 + step))
        for i in range(2):
            for j in range(3):
                new = net[0].weight[i, j].item()
                want[i][j] = decay * want[i][j] + (1 - decay) * new
            mean[i] = decay * mean[i] + (1 - decay) * net[1].running_mean[i].item()
        torch.testing.assert_close(ema.net[0].weight, torch.tensor(want))
        torch.testing.assert_close(ema.net[1].running_mean, torch.tensor(mean))
    assert ema.net[2].weight is net[2].weight  # frozen weights are not copied
    assert ema.net[0].weight is not net[0].weight


LOADER = """
import time
from torch.utils.data import DataLoader, Dataset
from models.run import keep_signals_from_worker
class Large(Dataset):
    def __len__(self): return 100
    def __getitem__(self, i): return bytes(10**6)  # more than a pipe holds
batches = iter(DataLoader(Large(), batch_size=None, num_workers=1, worker_init_fn=keep_signals_from_worker))
next(batches)
print(batches._workers[0].pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a worker with its main process")
def test_a_worker_ends_with_its_main_process_even_if_that_is_killed():
    main = subprocess.Popen([sys.executable, "-c", LOADER], cwd=Path(__file__).parents[1],
                            stdout=subprocess.PIPE, text=True)
    worker = int(main.stdout.readline())
    main.kill()
    main.wait()
    for _ in range(100):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{worker}/stat").read_text().split()[2] != "Z":  # whom nobody has waited for yet
                time.sleep(0.05)
                continue
        return
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker still waits")
