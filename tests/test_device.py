"""Which device a script takes, what it says of one, and that a training step on a GPU waits for nothing.

No GPU is needed: fake tensors know their device and have no values, so that whatever asks for one is an error.
"""
import re

import numpy as np
import pytest
import torch
from gloo import on_ranks
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from data import augment, metrics
from data.common import BadInput
from data.datasets import NORMS
from data.scenes import augment_scenes, prepare
from models import nets, run
from models.lookahead import Lookahead
from models.losses import ce, kl, parse_loss, translate, weighted_sum
from models.muon import Muon
from train_points import sure_pixels

DEVICE = torch.device("cuda")


# ---- which one

@pytest.fixture
def machine(monkeypatch):
    """machine(2, LOCAL_RANK=1): torch sees two GPUs, in this environment."""
    def make(gpus, cuda="13.0", **env):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, str(value))
    return make


@pytest.mark.parametrize("wanted, gpus, env, device", [
    ("auto", 0, {}, "cpu"), ("auto", 2, {}, "cuda:0"), ("cpu", 2, {}, "cpu"), ("cuda", 1, {}, "cuda:0"),
    ("cuda:1", 2, {}, "cuda:1"), ("auto", 8, dict(LOCAL_RANK=5, LOCAL_WORLD_SIZE=8), "cuda:5"),
    ("auto", 0, dict(LOCAL_RANK=5, LOCAL_WORLD_SIZE=8), "cpu"), ("cpu", 2, dict(LOCAL_RANK=5), "cpu")])
def test_the_device_is_the_one_that_was_asked_for(machine, wanted, gpus, env, device):
    machine(gpus, **env)
    assert run.choose_device(wanted) == torch.device(device)


RANKS = dict(LOCAL_RANK=0, LOCAL_WORLD_SIZE=4)


@pytest.mark.parametrize("wanted, gpus, env, said", [
    ("cuda", 0, dict(cuda=None), r"--device cuda: torch \S+ sees no GPU, for it is a build for CPUs; install "
                                 r"one for your GPU .*, or type --device cpu"),
    ("cuda:1", 0, {}, r"sees no GPU by its CUDA 13.0; see whether nvidia-smi lists one .*, or type --device cpu"),
    ("cuda", 0, dict(CUDA_VISIBLE_DEVICES=""), "sees no GPU in CUDA_VISIBLE_DEVICES=''; correct or unset that, or"),
    ("cuda:2", 2, {}, "--device cuda:2: torch sees 2 GPUs, the last one is cuda:1; type --device cuda:1"),
    ("cuda:1", 1, dict(CUDA_VISIBLE_DEVICES=3),
     r"torch sees 1 GPU \(CUDA_VISIBLE_DEVICES=3\), the last one is cuda:0; type --device cuda:0"),
    ("cuda:1", 8, RANKS, "cuda:1 for 4 processes: each takes a GPU of its own; type --device cuda, and CUDA_VIS"),
    ("auto", 2, RANKS, "4 processes on a machine where torch sees 2 GPUs; type torchrun --nproc_per_node=2, or "
                       "--device cpu"),
    ("cuda", 1, dict(LOCAL_RANK=1), "2 processes on a machine where torch sees 1 GPU; type torchrun --nproc_per")])
def test_a_device_that_is_not_there_is_one_line(machine, wanted, gpus, env, said):
    machine(gpus, **env)
    with pytest.raises(BadInput) as e:
        run.choose_device(wanted)
    assert re.search(said, str(e.value)) and "\n" not in str(e.value)


def test_on_a_gpu_fp32_is_fp32(machine, monkeypatch):
    machine(2)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    before = torch.get_float32_matmul_precision()
    try:
        assert run.start(wanted="cuda:1") == (0, 1, torch.device("cuda:1"))
        assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("capability, amp, said", [
    ((9, 0), True, "bf16 on cuda:0"), ((8, 0), False, "fp32 on cuda:0"),
    ((7, 5), False, "fp32 on cuda:0, for Tesla T4 has no bf16"),
    ((7, 0), True, "bf16 on cuda:0, which Tesla T4 only imitates; --amp off is faster")])
def test_a_gpu_without_bf16_is_named(monkeypatch, capability, amp, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert run.precision(amp, torch.device("cuda:0")) == said
    assert run.precision(amp, torch.device("cpu")) == said[:4] + " on cpu"


def test_a_run_that_moves_to_another_device_says_so():
    cpu = torch.device("cpu")
    assert run.device_change(dict(device="cuda"), cpu) == "; on cpu after cuda: no longer bit for bit"
    assert run.device_change(dict(device="cpu"), cpu) == run.device_change({}, cpu) == ""


# ---- a step

@pytest.fixture
def fake(monkeypatch):
    """Networks are made on a GPU without values, and what is made outside of them on the CPU."""
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda t, **how: t)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t)  # asks for a real GPU, as autocast does
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **how: True)
    # Ema copies a network, but not the mode that its tensors belong to.
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
    with FakeTensorMode():
        yield


def network(K=5):
    with DEVICE:
        net, *_ = nets.make("vit", K, "none", "nano16", "fpn")
    return net.train()


def batch(K=5):
    return torch.randn(2, 3, 64, 64), torch.randint(0, K, (2, 64, 64))


def step(net, loss):
    """The limit of the gradient's norm, an update of weights and averages -> what is then waited for."""
    params = list(net.parameters())
    assert loss.requires_grad and loss.device.type == "cuda"
    for p in params:  # torch's backward asks for a real GPU
        p.grad = torch.zeros_like(p)
    opt = Muon(nets.param_groups(net, 1e-3, 1e-4, 0.9, 0.05), lr=1e-3)
    look, ema = Lookahead(params, 1), run.Ema(net, 0.9)
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
    opt.step()
    look.update(0)
    ema.update(0)
    return torch.stack([norm, loss.detach()])


def test_fake_tensors_find_what_waits(fake):
    with pytest.raises(DataDependentOutputException):
        torch.ones(3, device=DEVICE).sum().item()
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device=DEVICE) + torch.ones(3)


def test_a_step_on_masks_waits_for_nothing(fake):
    net, (x, y) = network(), batch()
    y = run.to_device(y, DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.is_autocast_enabled("cuda")
        logits = net(run.to_device(x, DEVICE))
    count, weights = (y != 255).sum(), torch.ones(5, device=DEVICE)
    terms = parse_loss("ce+focal+dice+lovasz+boundary")
    loss = weighted_sum(terms, logits, y, weights, 0.1, count=count, total=run.over_ranks)
    assert step(net, loss).is_cuda


def test_muons_state_follows_its_parameters_to_the_gpu(fake):
    p = nn.Parameter(torch.zeros(4, device=DEVICE))
    opt = Muon([dict(params=[p], trained=False, layers=False, weight_decay=0.0)], 1e-3)
    moments = dict(step=torch.tensor(3.0), exp_avg=torch.zeros(4), exp_avg_sq=torch.zeros(4))
    opt.load_state_dict(dict(opt.state_dict(), state={0: moments}))
    assert {name: t.device.type for name, t in opt.state[p].items()} == dict.fromkeys(moments, "cuda")


def test_distillation_waits_for_nothing(fake):
    logits = torch.randn(2, 5, 8, 8, device=DEVICE, requires_grad=True)
    soft = torch.rand(2, 3, 8, 8, device=DEVICE)
    y = torch.randint(0, 5, (2, 8, 8), device=DEVICE)
    for known in (None, torch.tensor([0, 2], device=DEVICE)):
        for own in (None, logits):
            target = translate(soft, torch.ones(3, 5, device=DEVICE), own, 2.0)
            assert kl(logits, target, y, 2.0, (y != 255).sum(), known).is_cuda


def test_points_wait_for_nothing(fake):
    x, y = (t.to(DEVICE) for t in batch())
    logits = torch.randn(2, 5, 64, 64, device=DEVICE, requires_grad=True)
    grown = sure_pixels(lambda x: x[:, :1].expand(-1, 5, -1, -1), x, 0.8, amp=True)
    seen = torch.zeros(5, 5, dtype=torch.int64, device=DEVICE)
    metrics.count_pairs_(seen, logits.detach().max(1).indices, y)
    assert ce(logits, grown, (grown != 255).sum()).is_cuda


def test_a_step_on_whole_images_waits_for_nothing(fake):
    with DEVICE:
        net = nets.make_classifier(dict(name="cnn", cnn="nano", stem="small", classes=4, fold=2), None, {})
    pixels, y = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    x = augment_scenes(run.to_device(pixels, DEVICE), [0, 1, 2, 3], 0, 24)
    x = prepare(x, NORMS["sat"], 32)
    rng = np.random.default_rng(0)
    x, y, other, share = augment.mixup(x, y.to(DEVICE), rng)
    x, y, other, share = augment.cutmix_scenes(x, y, rng)
    with torch.autocast("cuda", torch.bfloat16):
        logits = net.train()(x).float()
    loss = torch.nn.functional.cross_entropy(logits, other, label_smoothing=0.1)
    assert step(net, loss).is_cuda


# ---- compiled

def gradients(rank, compiled):
    """Of two micro-batches, as train_seg.py accumulates them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model = run.parallel(net, torch.device("cpu"))
    if compiled:
        model = torch.compile(model, backend="eager")  # dynamo's graphs, without compiling C++
    micro = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(rank))
    with model.no_sync():
        model(micro[0]).square().mean().backward()
    alone = net[0].weight.grad.clone()
    model(micro[1]).square().mean().backward()
    return alone.tolist(), [p.grad.tolist() for p in net.parameters()]


def test_a_compiled_network_accumulates_over_ranks_as_a_plain_one(tmp_path):
    def work(rank, world):
        return gradients(rank, False), gradients(rank, True)

    (plain, compiled), (other, _) = on_ranks(tmp_path, 2, work)
    assert compiled == plain
    # Nothing crossed the ranks in the first micro-batch, all in the second.
    assert plain[0] != other[0] and plain[1] == other[1]
