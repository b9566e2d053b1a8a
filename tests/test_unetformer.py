"""UNetFormer and FTUNetFormer: counts, published names, any size, and an oracle written out in loops."""
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file

from models.unetformer import Attention, FTUNetFormer, UNetFormer, load_pretrained, swin_name
from models.weights import BadWeights

KEYS = Path("/work/shared/keys")  # names and shapes of published files; not part of the project


def small_ft(classes=5):
    return FTUNetFormer(classes, 16, 4, dict(dim=16, depths=(1, 2, 1, 1), heads=(1, 2, 2, 2)))


def randomise(net, seed=0):  # also statistics and biases, so that nothing can hide behind zeros and ones
    g = torch.Generator().manual_seed(seed)
    for name, t in net.state_dict().items():
        if t.dtype.is_floating_point:
            spread = torch.rand(t.shape, generator=g) if "running_var" in name else torch.randn(t.shape, generator=g)
            scale = t.numel() / len(t) if t.dim() > 1 else 16
            t.copy_(spread * (0.5 if "running_var" in name else scale ** -0.5) + (t.dim() == 1 and "bias" not in name))
    return net


def count(net):
    return sum(p.numel() for p in net.parameters())


def listed(name):
    file = KEYS / name
    if not file.exists():
        pytest.skip(f"{file} is not here")
    rows = [line.split("\t") for line in file.read_text().splitlines()]
    dtypes = {"float32": torch.float32, "int64": torch.int64}
    return {k: torch.zeros(eval(shape), dtype=dtypes[dtype]) for k, shape, dtype in rows}


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        assert count(UNetFormer(6)) == 11_724_894
        assert count(FTUNetFormer(6)) == 95_978_478


@pytest.mark.parametrize("size", [(64, 64), (33, 70), (1, 1), (32, 96), (224, 224), (500, 40)])
def test_any_size_train_and_eval(size):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size)
    for net, aux in ((UNetFormer(5), True), (small_ft(), False)):
        assert net.eval()(x).shape == (2, 5, *size)
        if min(size) > 32:  # batch norm wants more than one value per channel
            out = net.train()(x)
            outputs = out if aux else (out,)
            assert isinstance(out, tuple) == aux and [z.shape for z in outputs] == [(2, 5, *size)] * len(outputs)
            sum(z.square().mean() for z in outputs).backward()
            assert not [n for n, p in net.named_parameters() if p.grad is None]  # DDP would wait for it for ever


def test_padding_changes_nothing_where_the_grid_is_full():
    torch.manual_seed(0)
    net, x = randomise(UNetFormer(3)).eval(), torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        maps = net.backbone(x)
        want = F.interpolate(net.decoder(maps)[0], (256, 256), mode="bilinear", align_corners=False)
        assert torch.equal(net(x), want)


def test_attention_is_its_definition_in_loops():
    torch.manual_seed(0)
    att = randomise(Attention(4, 2, norm_last=False)).double().eval()
    x = torch.randn(1, 4, 16, 8, dtype=torch.float64)
    table = att.relative_position_bias_table
    q, k, v = F.conv2d(x, att.qkv[0].weight)[0].view(3, 2, 2, 16, 8)  # 3, heads, hd, h, w
    mixed = torch.zeros(2, 2, 16, 8, dtype=torch.float64)
    for top in (0, 8):
        places = [(top + i, j) for i in range(8) for j in range(8)]
        for head in range(2):
            for yi, xi in places:
                score = torch.stack([q[head, :, yi, xi] @ k[head, :, yj, xj] / 2 ** 0.5
                                     + table[(yi - yj + 7) * 15 + xi - xj + 7, head] for yj, xj in places]).softmax(0)
                mixed[head, :, yi, xi] = sum(s * v[head, :, yj, xj] for s, (yj, xj) in zip(score, places))
    mixed = mixed.reshape(1, 4, 16, 8)
    assert torch.allclose(att.attend(x), mixed, atol=1e-12)
    tall, wide = torch.zeros_like(mixed), torch.zeros_like(mixed)
    for i in range(16):  # mean over the rows i - 3 .. i + 4, mirrored once at the end, 0 beyond
        rows = [mixed[:, :, 14] if r == 16 else mixed[:, :, r] for r in range(i - 3, i + 5) if 0 <= r <= 16]
        tall[:, :, i] = sum(rows) / 8
    for j in range(8):
        columns = [mixed[..., 6] if c == 8 else mixed[..., c] for c in range(j - 3, j + 5) if 0 <= c <= 8]
        wide[..., j] = sum(columns) / 8
    out = tall + wide + att.local1(x) + att.local2(x)
    out = torch.cat([out, out[:, :, -2:-1]], 2)
    out = torch.cat([out, out[..., -2:-1]], 3)
    want = F.conv2d(out, att.proj[0].weight, padding=3, groups=4)
    want = F.conv2d(att.proj[1](want), att.proj[2].weight)
    assert torch.allclose(att(x), want, atol=1e-12)


def test_resnet_maps_are_torchvisions():
    torch.manual_seed(0)
    whole = torchvision.models.resnet18().eval()
    net = UNetFormer(2).eval()
    net.backbone.load_state_dict({k: t for k, t in whole.state_dict().items() if not k.startswith("fc.")})
    x = torch.randn(1, 3, 64, 96)
    deepest = net.backbone(x)[3]
    assert torch.equal(whole.fc(deepest.mean((2, 3))), whole(x))
    assert [tuple(m.shape[1:]) for m in net.backbone(x)] == [(64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 2, 3)]


@pytest.mark.parametrize("name, net", [("unetformer_r18_c6.geoseg.txt", UNetFormer),
                                       ("ftunetformer_swinb_c6.geoseg.txt", FTUNetFormer)])
def test_published_checkpoints_load(name, net, tmp_path):
    published = listed(name)
    with torch.device("meta"):
        own = net(6).state_dict()
    constants = {k for k in published if k.endswith("relative_position_index")}
    ours = {("backbone." + swin_name(k.removeprefix("backbone.")) if net is FTUNetFormer and k.startswith("backbone.")
             else k): t.shape for k, t in published.items() if k not in constants}
    assert ours == {k: t.shape for k, t in own.items() if not k.endswith("relative_position_index")}
    if net is UNetFormer:  # the large one goes the same way, see the small one below
        fill = {f"net.{k}": t + i for i, (k, t) in enumerate(published.items())}  # Lightning's prefix
        torch.save({"state_dict": fill}, tmp_path / "x.pth")
        filled = net(6)
        info = load_pretrained(filled, str(tmp_path / "x.pth"))
        assert "289 of 289 tensors (not needed: relative_position_index)" in info["line"]
        assert all(torch.equal(t, fill[f"net.{k}"]) for k, t in filled.state_dict().items())


def geoseg_names(state):  # of a small net of ours, by hand: the reverse of the table
    out = {}
    for k, t in state.items():
        if k.startswith("backbone.features."):
            part, rest = k.removeprefix("backbone.features.").split(".", 1)
            part = int(part)
            if part == 0:
                k = f"backbone.patch_embed.{'proj' if rest[0] == '0' else 'norm'}.{rest[2:]}"
            elif part % 2 == 0:
                k = f"backbone.layers.{part // 2 - 1}.downsample.{rest}"
            else:
                rest = rest.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
                k = f"backbone.layers.{part // 2}.blocks.{rest}"
        out[k] = t
    return out


def test_swin_from_published_torchvision_and_own_files(tmp_path):
    torch.manual_seed(0)
    a, x = randomise(small_ft()).eval(), torch.randn(1, 3, 70, 64)
    for name, state in (("geoseg", geoseg_names(a.state_dict())), ("own", a.state_dict())):
        b = randomise(small_ft(), seed=1).eval()
        save_file(dict(state), tmp_path / f"{name}.safetensors")
        info = load_pretrained(b, str(tmp_path / f"{name}.safetensors"))
        assert torch.equal(a(x), b(x)) and "layout=checkpoint" in info["line"] and info["norm"] == "imagenet"
    swin = torchvision.models.SwinTransformer([4, 4], 16, [1, 2, 1, 1], [1, 2, 2, 2], [7, 7])
    torch.save(randomise(swin).eval().state_dict(), tmp_path / "swin.pth")
    b = small_ft().eval()
    before = {k: t.clone() for k, t in b.state_dict().items()}
    info = load_pretrained(b, str(tmp_path / "swin.pth"))
    assert "(not needed: classifier, relative_position_index)" in info["line"]
    assert info["line"].endswith("random: decoder, backbone.norm0, backbone.norm1, backbone.norm2")
    assert torch.equal(b.backbone.norm3.weight, swin.norm.weight)
    assert torch.equal(b.backbone(x)[3].permute(0, 2, 3, 1), swin.norm(swin.features(x)))
    assert all(torch.equal(t, before[k]) for k, t in b.state_dict().items() if k.startswith("decoder."))


def test_stage_maps_are_torchvisions_swin():
    torch.manual_seed(0)
    net = randomise(small_ft()).eval()
    x = torch.randn(1, 3, 96, 64)
    for i, m in enumerate(net.backbone(x)):
        part = net.backbone.features[: 2 * i + 2](x)
        assert torch.equal(m, F.layer_norm(part, part.shape[-1:], *(
            getattr(getattr(net.backbone, f"norm{i}"), n) for n in ("weight", "bias"))).permute(0, 3, 1, 2))


def test_other_classes_leave_the_last_convolutions_fresh(tmp_path):
    torch.manual_seed(0)
    a, b = UNetFormer(6), UNetFormer(3)
    torch.save(a.state_dict(), tmp_path / "a.pth")
    fresh = b.decoder.segmentation_head[2][0].weight.clone()
    info = load_pretrained(b, str(tmp_path / "a.pth"))
    assert info["line"].endswith("random: last convolution, 6 classes in the file and 3 here")
    assert torch.equal(b.decoder.segmentation_head[2][0].weight, fresh)
    assert torch.equal(b.decoder.p1.proj[0].weight, a.decoder.p1.proj[0].weight)


def test_bad_files_are_refused(tmp_path):
    net, path = UNetFormer(3), tmp_path / "a.pth"
    torch.save(torchvision.models.alexnet().state_dict(), path)
    with pytest.raises(BadWeights, match="first tensors: features.0.weight.*expected torchvision's resnet18"):
        load_pretrained(net, str(path))
    state = torchvision.models.resnet18().state_dict()
    torch.save({k.replace("layer3", "layerX"): t for k, t in state.items()}, path)
    with pytest.raises(BadWeights, match="tensor backbone.layer3.*is missing.*unknown tensor backbone.layerX"):
        load_pretrained(net, str(path))
    torch.save(state, tmp_path / "resnet18-f37072fd.pth")
    with pytest.raises(BadWeights, match="its name says f37072fd"):
        load_pretrained(net, str(tmp_path / "resnet18-f37072fd.pth"))
    torch.save(state, path)
    info = load_pretrained(net, str(path))
    assert "(not needed: classifier)" in info["line"] and info["line"].endswith("random: decoder")
