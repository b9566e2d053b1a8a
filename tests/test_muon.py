"""models/muon.py against torch.optim's Muon and AdamW, and singular values by SVD."""
import pytest
import torch

from models import nets
from models.checkpoint import restore_optimizer
from models.muon import Muon, is_matrix, optimizer, orthogonal
from models.weights import BadWeights


@pytest.mark.parametrize("shape", [(16, 16), (24, 500), (300, 20)])
def test_singular_values_become_about_one_and_their_directions_stay(shape):
    pair = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)) * 1e-4
    for x, y in zip(pair, orthogonal(pair)):
        got = torch.linalg.svdvals(y)
        assert 0.6 < got.min() and got.max() < 1.25
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        inside = u.T @ y @ v.T  # diagonal, where the directions are those of x
        assert (inside - inside.diag().diag()).abs().max() < 1e-4
    assert orthogonal(torch.zeros(2, *shape)).abs().max() == 0  # layers without a gradient


def steps(opt, params, n=4):
    g = torch.Generator().manual_seed(2)
    for _ in range(n):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g)
        opt.step()
    return params


def params():
    g = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in [(32, 48), (64, 16), (40,), (8, 64)]]


def same_size():
    return [*params()[:1], *(torch.nn.Parameter(torch.randn(shape)) for shape in [(32, 48), (32, 12, 2, 2)])]


def groups(layers, others):
    return [dict(params=layers, trained=False, layers=True, weight_decay=0.05),
            dict(params=others, trained=False, layers=False, weight_decay=0.0)]


def test_it_is_torchs_muon_on_matrices_and_torchs_adamw_on_the_rest():
    a, b, bias, narrow = steps(Muon(groups((p := params())[:2] + p[3:], p[2:3]), lr=0.01), p)
    q = params()
    steps(torch.optim.Muon(q[:2], lr=0.01, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"), q)
    # torch iterates in bf16; four steps moved the values by .004 in the mean.
    assert (a - q[0]).abs().max() < 2e-3 and (b - q[1]).abs().max() < 2e-3
    assert (a - params()[0]).abs().mean() > 3e-3
    q = params()
    rest = [dict(params=q[:2] + q[3:], weight_decay=0.05), dict(params=q[2:3], weight_decay=0.0)]
    steps(torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.999)), q)
    torch.testing.assert_close(bias, q[2])
    torch.testing.assert_close(narrow, q[3])


def test_matrices_of_one_size_move_each_by_its_own_gradient():
    torch.manual_seed(4)
    together = same_size()
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    steps(Muon(groups(together, []), lr=0.01), together)
    # The same gradients, an optimiser for each.
    several = [Muon(groups([p], []), lr=0.01) for p in alone]

    class All:
        def step(self):
            for opt in several:
                opt.step()

    steps(All(), alone)
    for p, q in zip(together, alone):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert (together[0] - params()[0]).abs().mean() > 3e-3


def test_a_convolution_is_the_matrix_of_its_outputs():
    flat = torch.nn.Parameter(torch.randn(32, 4 * 9))
    conv = torch.nn.Parameter(flat.detach().clone().view(32, 4, 3, 3))
    for p in (flat, conv):
        p.grad = torch.arange(flat.numel()).sin().view(p.shape)
        Muon([dict(params=[p], trained=False, layers=True, weight_decay=0.1)], lr=0.1).step()
    torch.testing.assert_close(conv.flatten(1), flat, rtol=0, atol=0)
    assert not is_matrix(torch.zeros(64, 1, 3, 3))  # each channel alone


def test_of_a_network_tokens_and_the_classes_are_adamws_also_without_weight_decay():
    net, _, _ = nets.make("vit", 8, "none", "nano16", "fpn")
    for decay in (0.05, 0.0):
        opt = optimizer("muon", nets.param_groups(net, 1e-3, 1e-3, 1.0, decay), 1e-3)
        names = {name for name, p in net.named_parameters() if p in opt.matrices}
        assert {"backbone.blocks.0.attn.qkv.weight", "backbone.patch_embed.proj.weight"} < names
        assert not any("token" in n or n.endswith("bias") or n == "head.out.weight" for n in names)


def test_a_trained_backbone_learns_by_adamw_under_a_head_that_learns_by_muon():
    net, _, _ = nets.make("vit", 8, "none", "nano16", "fpn")
    opt = optimizer("muon", nets.param_groups(net, 1e-3, 1e-3, 1.0, 0.05, trained=True), 1e-3)
    names = {name for name, p in net.named_parameters() if p in opt.matrices}
    assert "head.fuse.0.0.weight" in names and all(name.startswith("head.") for name in names)
    net(torch.zeros(1, 3, 32, 32)).square().mean().backward()
    opt.step()
    by_adamw = {name for name, p in net.named_parameters() if "exp_avg_sq" in opt.state[p]}
    assert "backbone.blocks.0.attn.qkv.weight" in by_adamw and not by_adamw & names


def test_it_goes_on_where_it_was_and_refuses_the_other_optimisers_state():
    def stepped(name, n):
        p = params()
        opt = optimizer(name, groups(p[:2] + p[3:], p[2:3]), 0.01)
        return steps(opt, p, n), opt

    _, first = stepped("muon", 2)
    _, second = stepped("muon", 0)
    restore_optimizer(second, first.state_dict())
    for i, one in first.state_dict()["state"].items():
        assert all(torch.equal(t, second.state_dict()["state"][i][key]) for key, t in one.items())
    for own, other in (("muon", "adamw"), ("adamw", "muon")):
        with pytest.raises(BadWeights, match="of another optimiser"):
            restore_optimizer(stepped(own, 0)[1], stepped(other, 1)[1].state_dict())
