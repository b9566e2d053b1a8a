"""models/checkpoint.py: the two files of a run, whole, plain and named when they are not."""
import pickle
from pathlib import Path

import pytest
import torch

from data.common import BadInput
from models.checkpoint import load_state, load_weights, save_state, save_weights
from models.weights import BadWeights


def refusal(call, *args):
    """The message of the BadInput or BadWeights that the call must raise: one line."""
    with pytest.raises((BadInput, BadWeights)) as e:
        call(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_weights_round_trip_with_their_description(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.randn(2).bfloat16(), "c": torch.arange(5), "d": torch.tensor(1.5)}
    save_weights(tmp_path / "best.safetensors", tensors, {"classes": [{"name": "é", "id": 3}], "taps": [1, 2]})
    (tmp_path / "plain").touch()  # colleagues may read one as they may the other
    assert (tmp_path / "best.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    for path in (tmp_path, tmp_path / "best.safetensors"):
        back, meta = load_weights(path)
        assert back.keys() == tensors.keys() and all(torch.equal(back[k], v) for k, v in tensors.items())
        assert meta["classes"] == [{"name": "é", "id": 3}] and meta["taps"] == [1, 2]


def test_state_is_tensors_and_plain_values_and_whole(tmp_path):
    path = tmp_path / "last.pt"
    save_state(path, net={"w": torch.ones(2)}, step=3, args={"lr": 1e-3, "scale": [0.5, 2]}, best=-1.0)
    assert torch.load(path, weights_only=True)["args"] == load_state(path)["args"] == {"lr": 1e-3, "scale": [0.5, 2]}
    with pytest.raises(Exception, match="lambda|pickle"):
        save_state(path, step=lambda: 4)
    assert load_state(path)["step"] == 3


def test_what_is_no_checkpoint_is_named(tmp_path):
    good, w = tmp_path / "good", {"w": torch.ones(999)}
    save_state(good, net=w), save_weights(tmp_path / "best.safetensors", w, {})
    torch.save({"path": Path("a")}, tmp_path / "objects")
    contents = [b"", b"hello\n", b"<html>403</html>", b"version https://git-lfs", pickle.dumps([1], 2), bytes(200)]
    contents += [good.read_bytes()[:n] for n in (9, 99, 999, -9)] + [(tmp_path / "objects").read_bytes()]
    contents += [(tmp_path / "best.safetensors").read_bytes()[:n] for n in (7, 50, -9)]
    for content in contents:
        (file := tmp_path / "bad").write_bytes(content)
        assert str(file) in refusal(load_state, file) and str(file) in refusal(load_weights, file)
    for load in (load_state, load_weights):
        assert "no such file" in refusal(load, tmp_path / "none")
