"""models/lookahead.py: Lookahead against its definition, resuming, the cycles of warm restarts."""
import math

import pytest
import torch

from data.common import BadInput
from models.checkpoint import load_state, save_state
from models.lookahead import Lookahead, cycle_ends, warm_restarts


def problem(seed=0):
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(2))]
    return params, torch.optim.AdamW(params, lr=0.1)


def train(params, opt, look, first, last):
    for step in range(first, last):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        opt.zero_grad(set_to_none=True)
        (x @ params[0] + params[1]).square().mean().backward()
        opt.step()
        if look:
            look.update(step)


@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_every_k_steps_slow_goes_part_of_the_way_and_fast_follows(alpha):
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    opt, look = torch.optim.SGD([p], lr=0.5), Lookahead([p], every=3, alpha=alpha)
    slow = fast = [1.0, -2.0]
    for step in range(10):
        opt.zero_grad()
        p.square().sum().mul(0.5).backward()  # the gradient is p, so SGD halves it
        opt.step()
        look.update(step)
        fast = [v - 0.5 * v for v in fast]
        if step in (2, 5, 8):
            slow = fast = [s + alpha * (f - s) for s, f in zip(slow, fast)]
        assert p.tolist() == pytest.approx(fast)
        assert look.slow[0].tolist() == pytest.approx(slow)


def test_the_published_values_are_the_defaults():
    p = torch.nn.Parameter(torch.zeros(1))
    look = Lookahead([p])
    with torch.no_grad():
        p.fill_(1.0)
    for step in range(4):
        look.update(step)
        assert p.item() == 1.0
    look.update(4)
    assert p.item() == look.slow[0].item() == 0.5


def test_alpha_one_is_the_optimiser_itself():
    (a, plain), (b, other) = problem(), problem()
    train(a, plain, None, 0, 12)
    train(b, other, Lookahead(b, every=4, alpha=1.0), 0, 12)
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_slow_weights_are_copies_and_need_no_gradient():
    params, opt = problem()
    look = Lookahead(params, every=5)
    before = [p.detach().clone() for p in params]
    train(params, opt, look, 0, 4)
    for slow, old, p in zip(look.slow, before, params):
        assert torch.equal(slow, old) and not torch.equal(p, old) and not slow.requires_grad


@pytest.mark.parametrize("stop", [5, 7])  # at, and between, two synchronisations
def test_resume_is_exact(tmp_path, stop):
    params, opt = problem()
    look = Lookahead(params, every=5)
    train(params, opt, look, 0, stop)
    save_state(tmp_path / "last.pt", opt=opt.state_dict(), net=params, slow=look.slow)
    train(params, opt, look, stop, 23)

    again, opt = problem(seed=1)
    look = Lookahead(again, every=5)
    last = load_state(tmp_path / "last.pt")
    with torch.no_grad():
        for p, saved in zip(again, last["net"]):
            p.copy_(saved)
    opt.load_state_dict(last["opt"])
    look.load(last["slow"])
    train(again, opt, look, stop, 23)
    assert all(torch.equal(x, y) for x, y in zip(params, again))
    assert not torch.equal(last["slow"][0], look.slow[0])  # what was loaded is not written to


@pytest.mark.parametrize("slow", [[], [torch.ones(2, 3), torch.ones(2)], [torch.ones(3, 2)]])
def test_slow_weights_of_another_network_are_refused(slow):
    params, _ = problem()
    with pytest.raises(ValueError, match="slow weights of another network"):
        Lookahead(params).load(slow)


def test_warm_restarts_are_torchs():
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=15, T_mult=2)
    for step in range(110):
        assert warm_restarts(step, 15, 2) == pytest.approx(torchs.get_last_lr()[0], abs=1e-12)
        opt.step()
        torchs.step()
    assert warm_restarts(0, 15, 2) == warm_restarts(15, 15, 2) == warm_restarts(105, 15, 2) == 1.0
    assert warm_restarts(104, 15, 2) < 0.001 and math.isclose(warm_restarts(30, 15, 2), 0.5)


@pytest.mark.parametrize("first, mult, steps, ends", [
    (15, 2, 105, [15, 45, 105]), (15, 2, 104, [15, 45]),
    (10, 1, 30, [10, 20, 30]), (10, 1, 39, [10, 20, 30]),
    (7, 3, 7, [7]), (7, 3, 27, [7]), (7, 3, 28, [7, 28])])
def test_cycles_end_within_the_steps(first, mult, steps, ends):
    assert cycle_ends(first, mult, steps) == ends


def test_a_cycle_longer_than_the_run_is_refused():
    with pytest.raises(BadInput, match="--restarts 40 2 with --steps 30: no cycle would end"):
        cycle_ends(40, 2, 30)
