"""models/compiled.py: the same logits from a compiled program; other sizes and no compiler go without."""
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config, cpp_builder

from models.compiled import Compiled, compiled

SIDE = 24
# What only pays for large networks: a pool of compiling processes, and headers compiled ahead.
SMALL = {"compile_threads": 1, "cpp_cache_precompile_headers": False}


@pytest.fixture(scope="module")
def net():
    """One convolution: a ViT takes a minute to compile, see the differences that bench_vit.py prints."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU()).eval()


@pytest.fixture(scope="module")
def program(net):
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler here")
    with config.patch(SMALL):
        program, note = compiled(net, SIDE)
    assert isinstance(program, Compiled)
    assert note.startswith("compiled in ")
    return program


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 3])
def test_a_program_answers_as_its_network(net, program, batch):
    x = torch.randn(batch, 3, SIDE, SIDE)
    got, want = program(x), net(x)
    assert got.shape == want.shape == (batch, 4, SIDE, SIDE)
    assert want.std() > 0.01
    torch.testing.assert_close(got, want, rtol=4e-6, atol=4e-6)
    # A window is the same in whatever batch it comes: killed and gone on with, a scene may have others.
    for i in range(batch):
        assert torch.equal(program(x[i:i + 1])[0], got[i])


def test_no_call_compiles_again(program):
    programs = counters["stats"]["unique_graphs"]
    assert programs > 0
    x = torch.randn(2, 3, SIDE, SIDE)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for made_in_mode in (x, x + 0):
                program(made_in_mode)
                program(made_in_mode[:1])
    assert counters["stats"]["unique_graphs"] == programs


@torch.inference_mode()
@pytest.mark.parametrize("h, w", [(SIDE, 17), (40, SIDE), (32, 32)])
def test_other_sizes_go_through_the_network(net, program, h, w):
    x = torch.randn(2, 3, h, w)
    assert torch.equal(program(x), net(x))


def test_gradients_are_the_networks(net, program):
    x = torch.randn(1, 3, SIDE, SIDE, requires_grad=True)
    program(x).sum().backward()
    got, x.grad = x.grad, None
    net(x).sum().backward()
    assert torch.equal(got, x.grad)
    assert got.abs().max() > 0


def test_weights_are_its_networks(net, program):
    assert {id(p) for p in program.parameters()} == {id(p) for p in net.parameters()}
    assert not program.training


@torch.inference_mode()
def test_without_a_compiler_the_network_stays(net):
    cpp_builder.cpp_compiler_search.cache_clear()
    with config.patch(SMALL | {"cpp.cxx": (None, "/nonexistent/g++"), "force_disable_caches": True}):
        got, note = compiled(net, SIDE + 8)
    cpp_builder.cpp_compiler_search.cache_clear()
    assert got is net
    assert "\n" not in note and "/nonexistent/g++" in note and "CXX=" in note
    x = torch.randn(1, 3, SIDE + 8, SIDE + 8)
    assert got(x).isfinite().all()
