"""models/checkpoint.py: the two files of a run are whole, plain, and named where they are not."""
import math
import pickle
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models.checkpoint import (
    learned, load_state, load_weights, restore, restore_optimizer, save_state, save_weights, take_up, weights_file)
from models.weights import BadWeights


def refusal(call, *args):
    """The one line of the BadWeights that the call must raise."""
    with pytest.raises(BadWeights) as e:
        call(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- best.safetensors

def test_weights_round_trip_with_their_description(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.randn(2).bfloat16(), "c": torch.arange(5),
               "d": torch.tensor(1.5), "e": nn.Parameter(torch.randn(2))}
    meta = {"classes": [{"name": "é", "id": 3}], "taps": [1, 2], "path": None}
    save_weights(tmp_path / "best.safetensors", tensors, meta)
    for path in (tmp_path, tmp_path / "best.safetensors", str(tmp_path)):
        back, said = load_weights(path)
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], t) for name, t in tensors.items())
        assert {key: said[key] for key in meta} == meta
        assert load_weights(path, header_only=True) == ({}, said)
    assert weights_file(tmp_path) == weights_file(tmp_path / "best.safetensors")


def test_weights_are_as_readable_as_other_files(tmp_path):
    save_weights(tmp_path / "best.safetensors", {"a": torch.ones(1)}, {})
    save_state(tmp_path / "last.pt", step=1)
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE(f.stat().st_mode) for f in tmp_path.iterdir()}
    assert len(modes) == 1


def test_safetensors_itself_reads_the_weights(tmp_path):
    save_weights(tmp_path / "best.safetensors", {"a": torch.ones(2)}, {"classes": []})
    assert torch.equal(load_file(tmp_path / "best.safetensors")["a"], torch.ones(2))


def test_weights_that_no_run_wrote_are_told_apart(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "best.safetensors")
    said = refusal(load_weights, tmp_path)
    assert "no run here wrote; a backbone goes to train_seg.py --weights" in said
    save_weights(tmp_path / "best.safetensors", {}, {"format": 99})
    assert "format 99, expected 1" in refusal(load_weights, tmp_path)


@pytest.mark.parametrize("field, value", [
    ("model", None), ("model", []), ("classes", {}), ("classes", ["a"]), ("classes", [{"id": 3}]),
    ("crop", "256"), ("crop", 0), ("crop", 10**9), ("crop", None), ("overlap", 1), ("overlap", -0.1),
    ("overlap", float("nan")), ("norm", "mars"), ("norm", []), ("amp", 1), ("saved", False), ("size", -1),
    ("reading", [1]), ("reading", {"bands": 3}), ("reading", {"bands": [1, 2]}), ("reading", {"more": 1}),
    ("reading", {"input_range": "p2-98"}), ("reading", {"input_range": [3, 1]}), ("crop", True), ("crop", 64.0),
    ("overlap", True), ("saved", "some"), ("reported", 3), ("variant", []), ("task", "painting"),
    ("report", {"a": "b"}), ("kinds", [3, 8]), ("kinds", [[3]]), ("kinds", [[3, "8"]]),
    ("classes", [{"name": "a"}, {"name": "a"}]), ("ignore", 255), ("weights", "a.pth"), ("weights", {"path": 3}),
    ("splits", []), ("root", 3)])
def test_a_field_that_no_run_writes_is_named(field, value, tmp_path):
    good = dict(model={}, classes=[{"name": "a"}], crop=64, overlap=0.25, norm="sat", amp="off", saved="all",
                size=64, reading={}, weights={"path": None}, splits={}, root=".")
    save_weights(tmp_path / "best.safetensors", {}, good)
    assert load_weights(tmp_path)[1] == good | {"format": 1}
    save_weights(tmp_path / "best.safetensors", {}, good | {field: value})
    said = refusal(load_weights, tmp_path)
    assert f"best.safetensors: {field} in its header is" in said


def test_there_are_as_many_classes_as_outputs(tmp_path):
    for names, right in (("ab", True), ("a", False), ("abc", False)):
        meta = dict(model={"classes": 2}, classes=[{"name": name} for name in names])
        save_weights(tmp_path / "best.safetensors", {}, meta)
        if right:
            assert load_weights(tmp_path)[1]["classes"] == meta["classes"]
        else:
            assert f"{len(names)} classes in its header for a network of 2" in refusal(load_weights, tmp_path)


def test_a_field_that_is_not_there_is_named_by_whoever_asks(tmp_path):
    save_weights(tmp_path / "best.safetensors", {}, {"crop": 64})
    meta = load_weights(tmp_path)[1]
    assert meta["crop"] == 64 and meta.get("norm") is None
    assert "best.safetensors: no norm in its header" in refusal(meta.__getitem__, "norm")


@pytest.mark.parametrize("text", [
    "", "{", "null", "3", '"text"', "[" * 10**5, '{"a":' * 10**5, '{"format": ' + "9" * 5000 + "}"])
def test_a_header_that_is_no_json_object_is_one_line(text, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "best.safetensors", {"nanors": text})
    for header_only in (True, False):
        assert "best.safetensors: its header is not readable" in refusal(load_weights, tmp_path, header_only)


# ---- last.pt

def test_state_is_tensors_and_plain_values(tmp_path):
    path = tmp_path / "last.pt"
    args = {"lr": 1e-3, "scale": [0.5, 2]}
    state = dict(net={"w": torch.ones(2)}, step=3, args=args, best=-1.0, none=None)
    save_state(path, **state)
    plain = torch.load(path, weights_only=True)
    for back in (plain, load_state(path), load_state(str(path))):
        assert back.keys() == state.keys() and torch.equal(back["net"]["w"], state["net"]["w"])
        assert all(back[key] == state[key] for key in ("step", "args", "best", "none"))


def test_a_state_that_cannot_be_saved_leaves_the_previous_one(tmp_path):
    save_state(tmp_path / "last.pt", step=3)
    with pytest.raises(Exception, match="lambda|pickle"):
        save_state(tmp_path / "last.pt", step=lambda: 4)
    assert load_state(tmp_path / "last.pt") == {"step": 3}
    assert [f.name for f in tmp_path.iterdir()] == ["last.pt"]


def test_what_is_no_checkpoint_is_named(tmp_path):
    good, weights = tmp_path / "good", {"w": torch.ones(999)}
    save_state(good, net=weights)
    save_weights(tmp_path / "best.safetensors", weights, {})
    torch.save({"path": Path("a")}, tmp_path / "objects")
    contents = [b"", b"hello\n", b"<html>403</html>", b"version https://git-lfs",
                pickle.dumps([1], 2), bytes(200), (tmp_path / "objects").read_bytes()]
    contents += [good.read_bytes()[:n] for n in (9, 99, 999, -9)]
    contents += [(tmp_path / "best.safetensors").read_bytes()[:n] for n in (7, 50, -9)]
    file = tmp_path / "bad"
    for content in contents:
        file.write_bytes(content)
        assert str(file) in refusal(load_state, file)
        assert str(file) in refusal(load_weights, file)


def test_what_is_not_there_is_named(tmp_path):
    assert "nothing to resume" in refusal(load_state, tmp_path / "none")
    assert "no such file; train first" in refusal(load_weights, tmp_path / "none")
    # A folder without it:
    assert "best.safetensors: no such file" in refusal(load_weights, tmp_path)


# ---- what training alters

def network(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    return net


def test_only_what_training_alters_is_kept():
    net = network(0)
    assert learned(net).keys() == {
        "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked",
        "2.weight", "2.bias"}
    assert learned(net)["2.weight"].data_ptr() == net[2].weight.data_ptr()


def test_restore_puts_it_back_and_leaves_the_rest_alone(tmp_path):
    net, other = network(0), network(1)
    net(torch.randn(5, 3))  # moves the statistics
    frozen = other[0].weight.clone()
    save_state(tmp_path / "last.pt", net=learned(net))
    restore(other, load_state(tmp_path / "last.pt")["net"])
    assert all(torch.equal(t, learned(net)[name]) for name, t in learned(other).items())
    assert torch.equal(other[0].weight, frozen) and not torch.equal(frozen, net[0].weight)


@pytest.mark.parametrize("change", [
    lambda state: state.pop("2.bias"),
    lambda state: state.update(more=torch.ones(1)),
    lambda state: state.clear()])
def test_restore_refuses_the_tensors_of_another_network(change):
    state = dict(learned(network(0)))
    change(state)
    assert "holds other tensors than this network learns" in refusal(restore, network(1), state)


@pytest.mark.parametrize("name, change, said", [
    ("2.weight", lambda t: t.t(), "2.weight has another shape"), ("2.bias", lambda t: t[None], "another shape"),
    ("2.bias", lambda t: 3, "another shape"), ("2.bias", lambda t: t.int(), "2.bias is torch.int32"),
    ("2.bias", lambda t: t.bool(), "is torch.bool"), ("2.bias", lambda t: t.to(torch.complex64), "is torch.complex64"),
    ("2.bias", lambda t: t / 0, "NaN or infinity"), ("1.running_var", lambda t: t * math.nan, "NaN or infinity")])
def test_restore_refuses_tensors_that_are_no_weights_of_the_network(name, change, said):
    state = dict(learned(network(0)))
    state[name] = change(state[name].detach())
    assert said in refusal(restore, network(1), state)


# ---- what else last.pt holds

def stepped(seed, lr=0.1):
    net = network(seed)
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr, weight_decay=0.05)
    net(torch.randn(5, 3)).sum().backward()
    opt.step()
    return opt


def test_an_optimiser_goes_on_where_it_was():
    first, second = stepped(0, lr=0.1), stepped(1, lr=0.2)
    restore_optimizer(second, first.state_dict())
    a, b = first.state_dict(), second.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert all(torch.equal(t, b["state"][i][key]) for i, one in a["state"].items() for key, t in one.items())
    new = torch.optim.AdamW([p for p in network(2).parameters() if p.requires_grad], weight_decay=0.05)
    restore_optimizer(stepped(1), new.state_dict())  # of a run that was ended before its first step


def spoil(path, value):
    """A change of an optimiser's state."""
    def change(state):
        for key in path[:-1]:
            state = state[key]
        if value is None:
            del state[path[-1]]
        else:
            state[path[-1]] = value
    return change


@pytest.mark.parametrize("change", [
    spoil(["state"], None), spoil(["param_groups"], []), spoil(["param_groups"], 3), spoil(["state"], [1]),
    spoil(["param_groups", 0, "weight_decay"], math.nan), spoil(["param_groups", 0, "betas"], (0.5, 0.5)),
    spoil(["param_groups", 0, "params"], [0]), spoil(["state", 0, "exp_avg"], torch.ones(2, 2)),
    spoil(["state", 0, "exp_avg"], torch.tensor(math.nan)), spoil(["state", 0, "exp_avg_sq"], None),
    spoil(["state", 1, "exp_avg_sq"], -torch.ones(4)), spoil(["state", 0, "step"], torch.tensor(-1.0)),
    spoil(["state", 0, "exp_avg"], torch.ones(4, dtype=torch.complex64)),
    spoil(["state", 0, "exp_avg"], torch.ones(4, dtype=torch.bool)), spoil(["state", 0, "step"], "3")])
def test_what_is_no_state_of_this_optimiser_is_refused(change):
    state = stepped(0).state_dict()
    change(state)
    assert "last.pt: of another optimiser" in refusal(restore_optimizer, stepped(1), state)


NEW = dict(step=0, best=-1.0, seconds=0.0, history=[], command="python a.py", speed=None)
DONE = dict(step=7, best=0.5, seconds=9.5, history=[dict(step=1, loss=None), dict(step=7, loss=0.1)], command="b",
            speed=3.5)


def test_the_state_of_a_run_is_taken_up():
    s = SimpleNamespace(**NEW)
    take_up(s, DONE)
    assert vars(s) == DONE
    take_up(s := SimpleNamespace(**NEW), NEW)
    assert vars(s) == NEW


@pytest.mark.parametrize("change", [
    dict(step=-1), dict(step=7.0), dict(step=True), dict(step="7"), dict(best=math.nan), dict(best=-2.0),
    dict(best=None), dict(seconds=math.inf), dict(seconds=-1.0), dict(history={}), dict(history=[3]), dict(more=1),
    dict(history=[dict(loss=1.0)]), dict(history=[dict(step=1, loss="a")]), dict(history=[dict(step=1, loss=math.nan)]),
    dict(history=[dict(step=1, loss=10**400)]), dict(step=10**400),
    dict(command=3), dict(speed="fast")])
def test_a_state_that_no_run_has_is_refused(change):
    s = SimpleNamespace(**NEW)
    said = refusal(take_up, s, DONE | change)
    assert said.startswith("last.pt: ") and said.endswith("; start a new run") and vars(s) == NEW
    for state in (None, [], {}, {"step": 3}):
        assert "last.pt: its state is" in refusal(take_up, s, state)


def test_what_is_missing_in_last_pt_is_named(tmp_path):
    save_state(tmp_path / "last.pt", net={})
    assert "last.pt: no opt in it; start a new run" in refusal(load_state(tmp_path / "last.pt").__getitem__, "opt")
