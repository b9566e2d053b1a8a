"""Runs that end before their end: all four training scripts save, go on, and learn from the files they began with."""
import os
import shutil
import signal

import pytest
import torch
from runs import FOLDER, keep_signals, read, same_run, tiny_set  # noqa: F401, one is a fixture
from test_scenes import make_scenes

import train_cls
import train_kd
import train_points
import train_seg
from data.common import BadInput
from models.checkpoint import load_state, load_weights

ONE = [*FOLDER, "--steps", 1, "--crop", 32, "--batch-size", 2, "--warmup", 1]
SCRIPTS = {
    train_seg: ONE, train_points: ONE, train_kd: [*ONE, "--alpha", 0],
    train_cls: ["--mode", "finetune", "--epochs", 1, "--batch-size", 30, "--amp", "off"]}
TOLD = {signal.SIGTERM: [train_seg, train_cls], signal.SIGHUP: [train_points, train_kd]}


def main(script, *argv):
    script.main(script.parse_args([str(a) for a in argv]))


def signalled(monkeypatch, script, number, turn=1):
    """The script's validation, in whose turn of this number the signal comes."""
    name = "probabilities" if script is train_cls else "evaluate"
    validate, turns = getattr(script, name), iter(range(1, 9))

    def told(*args, **how):
        if next(turns) == turn:
            signal.raise_signal(number)
        return validate(*args, **how)

    monkeypatch.setattr(script, name, told)


def root_of(script, folder):
    if script is train_cls:
        return make_scenes(folder), "field"
    return shutil.copytree(tiny_set(), folder), "train/images"


@pytest.mark.parametrize("number, script", [(n, s) for n in TOLD for s in TOLD[n]])
def test_told_to_stop_in_the_last_validation_it_saves_and_then_insists_on_its_files(
        number, script, tmp_path, monkeypatch, capsys, keep_signals):  # noqa: F811
    (root, inside), out = root_of(script, tmp_path / "set"), tmp_path / "a"
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as e:
        signalled(m, script, number)
        main(script, "--root", root, "--out", out, *SCRIPTS[script])
    signal.signal(signal.SIGHUP, before)
    assert e.value.code == 128 + number and not (out / "results.json").exists()
    said = f"; go on: python {os.path.basename(os.sys.argv[0])} --resume {out}"
    assert f"stopped at step 1 of 1{said}" in capsys.readouterr().out
    assert load_state(out / "last.pt")["state"]["step"] == load_weights(out)[1]["step"] == 1

    # An image that is in a split: a byte behind its end changes no pixel, but who knows that?
    file = min((root / inside).iterdir())
    assert file.relative_to(root).as_posix() in read(out / "files.json")["files"]
    pixels, stat = file.read_bytes(), file.stat()
    file.write_bytes(pixels[:-1] + b"x")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(BadInput) as e:
        main(script, "--resume", out)
    assert str(e.value).startswith(f"{file}: has changed (other contents) since {out} began; ")
    file.unlink()
    with pytest.raises(BadInput, match="is gone .* bring the old files back"):
        main(script, "--resume", out)
    assert not (out / "results.json").exists()

    file.write_bytes(pixels)  # the advice is followed
    main(script, "--resume", out)
    assert (out / "results.json").exists() and "files.json" not in capsys.readouterr().out


def test_told_to_stop_in_the_validation_that_ends_patience_it_is_not_over_either(
        tmp_path, monkeypatch, capsys, keep_signals):  # noqa: F811
    with monkeypatch.context() as m, pytest.raises(SystemExit) as e:
        m.setattr(train_seg.metrics, "iou", lambda cm: cm.diagonal() * 0.0)  # gains nothing
        signalled(m, train_seg, signal.SIGTERM, turn=2)
        main(train_seg, "--root", tiny_set(), "--out", tmp_path / "a", *ONE, "--steps", 9, "--eval-every", 1,
             "--patience", 1)
    said = capsys.readouterr().out
    assert e.value.code == 143 and "stop: no better" in said and "stopped at step 2 of 9; go on" in said


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_validation_that_dies_costs_no_step_and_is_done_when_the_run_goes_on(
        script, tmp_path, monkeypatch, keep_signals):  # noqa: F811
    (root, _), out = root_of(script, tmp_path / "set"), tmp_path / "a"
    longer = ["--epochs", 2] if script is train_cls else ["--steps", 2]
    flags = ["--root", root, *SCRIPTS[script], "--eval-every", 1, *longer]
    main(script, *flags, "--out", tmp_path / "whole")

    def full(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB")

    with monkeypatch.context() as m, pytest.raises(torch.OutOfMemoryError):
        m.setattr(script, "probabilities" if script is train_cls else "evaluate", full)
        main(script, *flags, "--out", out)
    state = load_state(out / "last.pt")["state"]
    assert state["step"] == 1 and not state["scored"] and not (out / "best.safetensors").exists()
    main(script, "--resume", out)
    same_run(tmp_path / "whole", out)


@pytest.mark.parametrize("script", [train_points, train_cls])
def test_without_room_for_its_first_last_pt_the_same_command_starts_again(script, tmp_path, monkeypatch):
    (root, _), out = root_of(script, tmp_path / "set"), tmp_path / "a"
    flags = "--root", root, "--out", out, *SCRIPTS[script]

    def full(*args, **state):
        raise OSError("last.pt: cannot be written (No space left on device); is the disk full?")

    with monkeypatch.context() as m, pytest.raises(OSError, match="disk full"):
        m.setattr(script.checkpoint, "save_state", full)
        main(script, *flags)
    with pytest.raises(BadInput, match="was ended before its first last.pt.*start it again: python "):
        main(script, "--resume", out)
    main(script, *flags)
    assert (out / "results.json").exists() and (out / "last.pt").exists()
