"""Lookahead against its definition in plain numbers, its resume state, and the cycles of warm restarts."""
import math

import pytest
import torch

from models.checkpoint import load_state, save_state
from models.lookahead import Lookahead, cycle_ends, warm_restarts


def problem(seed=0):
    torch.manual_seed(seed)
    w, b = torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(2))
    groups = [dict(params=[w], lr=0.1, weight_decay=0.0), dict(params=[b], lr=0.02, weight_decay=0.1)]
    return [w, b], torch.optim.AdamW(groups)


def train(params, opt, first, last):
    for step in range(first, last):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        opt.zero_grad(set_to_none=True)
        (x @ params[0] + params[1]).square().mean().backward()
        opt.step()


def test_every_k_steps_slow_goes_part_of_the_way_and_fast_follows():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    opt = Lookahead(torch.optim.SGD([p], lr=0.5), k=3, alpha=0.25)
    slow = fast = [1.0, -2.0]
    for step in range(1, 10):
        opt.zero_grad()
        p.square().sum().mul(0.5).backward()  # gradient p: SGD halves it
        opt.step()
        fast = [v - 0.5 * v for v in fast]
        if step % 3 == 0:
            slow = fast = [s + 0.25 * (f - s) for s, f in zip(slow, fast)]
        assert p.tolist() == pytest.approx(fast)


def test_alpha_one_is_the_optimiser_itself():
    (a, plain), (b, inner) = problem(), problem()
    train(a, plain, 0, 12)
    train(b, Lookahead(inner, k=4, alpha=1.0), 0, 12)
    assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("stop", [5, 7])  # at, and between, two synchronisations
def test_resume_is_exact(tmp_path, stop):
    params, inner = problem()
    opt = Lookahead(inner)
    train(params, opt, 0, stop)
    save_state(tmp_path / "last.pt", opt=opt.state_dict(), net=params)
    train(params, opt, stop, 23)
    again, inner = problem(seed=1)
    opt = Lookahead(inner)
    last = load_state(tmp_path / "last.pt")
    with torch.no_grad():
        for p, saved in zip(again, last["net"]):
            p.copy_(saved)
    opt.load_state_dict(last["opt"])
    train(again, opt, stop, 23)
    assert all(torch.equal(x, y) for x, y in zip(params, again))


def test_a_state_without_slow_weights_is_refused():
    params, inner = problem()
    train(params, inner, 0, 2)
    with pytest.raises(ValueError, match="without Lookahead's slow weights"):
        Lookahead(inner).load_state_dict(inner.state_dict())
    with pytest.raises(ValueError, match="k = 0"):
        Lookahead(inner, k=0)


def test_groups_are_the_inner_ones():
    params, inner = problem()
    opt = Lookahead(inner)
    for g in opt.param_groups:
        g["lr"] = 0.0
    before = params[0].clone()
    train(params, opt, 0, 1)
    assert torch.equal(params[0], before) and opt.param_groups is inner.param_groups


def test_warm_restarts_are_torchs_and_end_where_a_cycle_ends():
    p = torch.nn.Parameter(torch.zeros(1))
    opt = torch.optim.SGD([p], lr=1.0)
    torchs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=15, T_mult=2)
    for step in range(110):
        assert warm_restarts(step, 15, 2) == pytest.approx(torchs.get_last_lr()[0], abs=1e-12)
        opt.step()
        torchs.step()
    assert cycle_ends(15, 2, 105) == [15, 45, 105] and cycle_ends(15, 2, 104) == [15, 45]
    assert cycle_ends(10, 1, 30) == [10, 20, 30]
    assert warm_restarts(104, 15, 2) < 0.001 and warm_restarts(105, 15, 2) == 1.0
    assert math.isclose(warm_restarts(30, 15, 2), 0.5)
