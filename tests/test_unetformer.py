"""UNetFormer and FTUNetFormer: counts, published names, any size, and an oracle in loops.

NANORS_KEYS=FOLDER adds tests on the tensors of published files, here and in test_vit.py,
test_weights.py, test_efficientnet_unet.py: one list a file, "name TAB shape TAB dtype" a line.
"""
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file

from models.unetformer import Attention, FTUNetFormer, UNetFormer, load_pretrained, swin_name
from models.weights import BadWeights

KEYS = Path(os.environ.get("NANORS_KEYS", Path(__file__).parents[2] / "shared/keys"))
SWIN = dict(dim=16, depths=(1, 2, 1, 1), heads=(1, 2, 2, 2))


def small_ft(classes=5):
    return FTUNetFormer(classes, 16, 4, SWIN)


def randomise(net, seed=0):
    """Also statistics and biases, so that nothing can hide behind zeros and ones."""
    g = torch.Generator().manual_seed(seed)
    for name, t in net.state_dict().items():
        if not t.dtype.is_floating_point:
            continue
        if "running_var" in name:
            t.copy_(1 + 0.5 * torch.rand(t.shape, generator=g))
            continue
        noise = torch.randn(t.shape, generator=g)
        if t.dim() > 1:
            t.copy_(noise * t[0].numel() ** -0.5)
        else:
            t.copy_(noise / 4 + (0 if "bias" in name else 1))
    return net


def count(net):
    return sum(p.numel() for p in net.parameters())


def listed(name):
    """Tensors of a recorded list: zeros with a published file's names, shapes and types."""
    file = KEYS / name
    if not file.exists():
        pytest.skip("NANORS_KEYS names no folder with this list")
    tensors = {}
    for line in file.read_text().splitlines():
        key, shape, dtype = line.split("\t")
        shape = [int(n) for n in re.findall(r"\d+", shape)]
        tensors[key] = torch.zeros(shape, dtype=getattr(torch, dtype))
    return tensors


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        assert count(UNetFormer(6)) == 11_724_894
        assert count(FTUNetFormer(6)) == 95_978_478


# ---- arithmetic

@pytest.mark.parametrize("size", [(64, 64), (33, 70), (1, 1), (32, 96), (224, 224), (500, 40)])
@pytest.mark.parametrize("make, aux", [(UNetFormer, True), (small_ft, False)])
def test_any_size_train_and_eval(make, aux, size):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size)
    net = make(5)
    assert net.eval()(x).shape == (2, 5, *size)

    # Batch norm wants more than one value per channel.
    if min(size) <= 32:
        return
    out = net.train()(x)
    assert isinstance(out, tuple) == aux
    outputs = out if aux else (out,)
    assert len(outputs) == 1 + aux
    loss = 0
    for logits in outputs:
        assert logits.shape == (2, 5, *size)
        loss = loss + logits.square().mean()
    loss.backward()
    # DDP would wait for ever for a parameter without a gradient.
    assert not [name for name, p in net.named_parameters() if p.grad is None]


@torch.inference_mode()
def test_padding_changes_nothing_where_the_grid_is_full():
    torch.manual_seed(0)
    net, x = randomise(UNetFormer(3)).eval(), torch.randn(1, 3, 256, 256)
    logits, _ = net.decoder(net.backbone(x))
    want = F.interpolate(logits, (256, 256), mode="bilinear", align_corners=False)
    assert torch.equal(net(x), want)


@pytest.fixture
def attention():
    """A small Attention in float64, and a map of two windows one above the other."""
    torch.manual_seed(0)
    net = randomise(Attention(4, 2, norm_last=False)).double().eval()
    return net, torch.randn(1, 4, 16, 8, dtype=torch.float64)


def test_attention_in_windows_is_its_definition_in_loops(attention):
    net, x = attention
    table = net.relative_position_bias_table
    q, k, v = F.conv2d(x, net.qkv[0].weight)[0].view(3, 2, 2, 16, 8)  # 3, heads, hd, h, w
    want = torch.zeros(2, 2, 16, 8, dtype=torch.float64)
    for top in (0, 8):
        places = [(i, j) for i in range(top, top + 8) for j in range(8)]
        for head in range(2):
            for yi, xi in places:
                scores = []
                for yj, xj in places:
                    distance = (yi - yj + 7) * 15 + xi - xj + 7
                    score = q[head, :, yi, xi] @ k[head, :, yj, xj] / 2 ** 0.5
                    scores.append(score + table[distance, head])
                weights = torch.stack(scores).softmax(0)
                for weight, (yj, xj) in zip(weights, places):
                    want[head, :, yi, xi] += weight * v[head, :, yj, xj]
    torch.testing.assert_close(net.attend(x), want.view(1, 4, 16, 8), rtol=0, atol=1e-12)


def test_attention_goes_on_as_its_definition_in_loops(attention):
    net, x = attention
    mixed = net.attend(x)
    # Means over the places n - 3 .. n + 4: mirrored once at the end, 0 beyond either end.
    tall, wide = torch.zeros_like(mixed), torch.zeros_like(mixed)
    for i in range(16):
        for r in range(max(0, i - 3), min(16, i + 4) + 1):
            tall[:, :, i] += mixed[:, :, 14 if r == 16 else r] / 8
    for j in range(8):
        for c in range(max(0, j - 3), min(8, j + 4) + 1):
            wide[..., j] += mixed[..., 6 if c == 8 else c] / 8
    out = tall + wide + net.local1(x) + net.local2(x)
    # One more row and column, mirrored, for the kernel of 8.
    out = torch.cat([out, out[:, :, -2:-1]], 2)
    out = torch.cat([out, out[..., -2:-1]], 3)
    out = F.conv2d(out, net.proj[0].weight, padding=3, groups=4)
    want = F.conv2d(net.proj[1](out), net.proj[2].weight)
    torch.testing.assert_close(net(x), want, rtol=0, atol=1e-12)


def test_resnet_maps_are_torchvisions():
    torch.manual_seed(0)
    whole = torchvision.models.resnet18().eval()
    trunk = {k: t for k, t in whole.state_dict().items() if not k.startswith("fc.")}
    net = UNetFormer(2).eval()
    net.backbone.load_state_dict(trunk)
    x = torch.randn(1, 3, 64, 96)
    maps = net.backbone(x)
    assert torch.equal(whole.fc(maps[3].mean((2, 3))), whole(x))
    shapes = [tuple(m.shape[1:]) for m in maps]
    assert shapes == [(64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 2, 3)]


def test_swin_maps_are_torchvisions():
    torch.manual_seed(0)
    trunk = randomise(small_ft()).eval().backbone
    x = torch.randn(1, 3, 96, 64)
    for i, got in enumerate(trunk(x)):
        part = trunk.features[: 2 * i + 2](x)
        norm = getattr(trunk, f"norm{i}")
        want = F.layer_norm(part, part.shape[-1:], norm.weight, norm.bias)
        assert torch.equal(got, want.permute(0, 3, 1, 2))


# ---- files

@pytest.mark.parametrize("name, make", [
    ("unetformer_r18_c6.geoseg.txt", UNetFormer),
    ("ftunetformer_swinb_c6.geoseg.txt", FTUNetFormer)])
def test_names_and_shapes_are_those_of_the_published_checkpoints(name, make):
    ours = {}
    for key, t in listed(name).items():
        if key.startswith("backbone.") and make is FTUNetFormer:
            key = "backbone." + swin_name(key.removeprefix("backbone."))
        ours[key] = t.shape
    with torch.device("meta"):
        own = {key: t.shape for key, t in make(6).state_dict().items()}
    # Constants are in one of the two, and differ in shape.
    for shapes in (ours, own):
        for key in [key for key in shapes if key.endswith("relative_position_index")]:
            del shapes[key]
    assert ours == own


def test_a_published_checkpoint_loads(tmp_path):
    # Every tensor with a value of its own, under Lightning's prefix.
    published = listed("unetformer_r18_c6.geoseg.txt")
    filled = {f"net.{key}": t + i for i, (key, t) in enumerate(published.items())}
    torch.save({"state_dict": filled}, tmp_path / "x.pth")
    net = UNetFormer(6)
    info = load_pretrained(net, str(tmp_path / "x.pth"))
    assert "289 of 289 tensors (not needed: relative_position_index)" in info["line"]
    for key, t in net.state_dict().items():
        assert torch.equal(t, filled[f"net.{key}"])


def geoseg_name(key):
    """One of our names of a Swin trunk -> the published one, by hand: the reverse of the table."""
    if not key.startswith("backbone.features."):
        return key
    number, rest = key.removeprefix("backbone.features.").split(".", 1)
    number = int(number)
    if number == 0:
        part = "proj" if rest[0] == "0" else "norm"
        return f"backbone.patch_embed.{part}.{rest[2:]}"
    if number % 2 == 0:
        return f"backbone.layers.{number // 2 - 1}.downsample.{rest}"
    rest = rest.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
    return f"backbone.layers.{number // 2}.blocks.{rest}"


@pytest.mark.parametrize("names", ["published", "own"])
def test_whole_checkpoints_with_a_swin_load(names, tmp_path):
    torch.manual_seed(0)
    a, x = randomise(small_ft()).eval(), torch.randn(1, 3, 70, 64)
    state = a.state_dict()
    if names == "published":
        state = {geoseg_name(key): t for key, t in state.items()}
    save_file(state, tmp_path / "net.safetensors")
    b = randomise(small_ft(), seed=1).eval()
    assert not torch.equal(a(x), b(x))
    info = load_pretrained(b, str(tmp_path / "net.safetensors"))
    assert torch.equal(a(x), b(x))
    assert "layout=checkpoint" in info["line"]
    assert info["norm"] == "imagenet"


def test_torchvisions_swin_fills_the_trunk(tmp_path):
    torch.manual_seed(0)
    swin = torchvision.models.SwinTransformer([4, 4], 16, [1, 2, 1, 1], [1, 2, 2, 2], [7, 7])
    torch.save(randomise(swin).eval().state_dict(), tmp_path / "swin.pth")
    net, x = small_ft().eval(), torch.randn(1, 3, 70, 64)
    before = {key: t.clone() for key, t in net.state_dict().items()}
    info = load_pretrained(net, str(tmp_path / "swin.pth"))
    assert "(not needed: classifier, relative_position_index)" in info["line"]
    fresh = "random: decoder, backbone.norm0, backbone.norm1, backbone.norm2"
    assert info["line"].endswith(fresh)
    # It has one norm, that of the deepest map.
    assert torch.equal(net.backbone.norm3.weight, swin.norm.weight)
    deepest = net.backbone(x)[3].permute(0, 2, 3, 1)
    assert torch.equal(deepest, swin.norm(swin.features(x)))
    for key, t in net.decoder.state_dict().items():
        assert torch.equal(t, before[f"decoder.{key}"])


def test_other_classes_leave_the_last_convolutions_fresh(tmp_path):
    torch.manual_seed(0)
    a, b = UNetFormer(6), UNetFormer(3)
    torch.save(a.state_dict(), tmp_path / "a.pth")
    fresh = b.decoder.segmentation_head[2][0].weight.clone()
    info = load_pretrained(b, str(tmp_path / "a.pth"))
    said = "random: last convolution, 6 classes in the file and 3 here"
    assert info["line"].endswith(said)
    assert torch.equal(b.decoder.segmentation_head[2][0].weight, fresh)
    assert torch.equal(b.decoder.p1.proj[0].weight, a.decoder.p1.proj[0].weight)


def test_resnet18_fills_the_trunk_and_bad_files_are_refused(tmp_path):
    net, state = UNetFormer(3), torchvision.models.resnet18().state_dict()
    path, named = tmp_path / "a.pth", tmp_path / "resnet18-f37072fd.pth"

    torch.save(state, path)
    line = load_pretrained(net, str(path))["line"]
    assert "(not needed: classifier)" in line
    assert line.endswith("random: decoder")

    torch.save(state, named)
    with pytest.raises(BadWeights, match="its name says f37072fd"):
        load_pretrained(net, str(named))

    torch.save({k.replace("layer3", "layerX"): t for k, t in state.items()}, path)
    said = "tensor backbone.layer3.*is missing.*left out: layerX"
    with pytest.raises(BadWeights, match=said):
        load_pretrained(net, str(path))

    torch.save({"features.0.weight": torch.zeros(1)}, path)  # as of a VGG or an AlexNet
    said = "first tensors: features.0.weight.*expected torchvision's resnet18"
    with pytest.raises(BadWeights, match=said):
        load_pretrained(net, str(path))
