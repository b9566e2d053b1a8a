"""ViT against transformers and timm with the same random weights; positions and RoPE against second derivations."""
import functools
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

from models.vit import PRESETS, Rope, ViT, attend, rotate, spread_taps
from models.weights import fill, load_vit

KEYS = Path(__file__).parents[2] / "shared" / "keys"  # recorded "name TAB shape" lists of the published files
SMALL = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=2)
V2 = SMALL | dict(patch_size=14, image_size=70)  # a table of 5 x 5 positions
V3 = SMALL | dict(intermediate_size=512, num_register_tokens=4)
GATED = dict(use_gated_mlp=True, hidden_act="silu")
NETS = {  # transformers class, its options; timm name, its options
    "dinov2": ("Dinov2", V2, "vit_small_patch14_dinov2", dict(img_size=70)),
    "dinov2_g": ("Dinov2", V2 | dict(use_swiglu_ffn=True),
                 "vit_giant_patch14_dinov2", dict(img_size=70, mlp_ratio=5.375)),
    "dinov2_reg": ("Dinov2WithRegisters", V2,
                   "vit_small_patch14_reg4_dinov2", dict(img_size=70, dynamic_img_size=True)),
    "dinov3": ("DINOv3ViT", V3, "vit_small_patch16_dinov3_qkvb", {}),
    "dinov3_plus": ("DINOv3ViT", V3 | GATED, "vit_small_plus_patch16_dinov3_qkvb", {}),
    "dinov3_7b": ("DINOv3ViT", V3 | GATED | dict(intermediate_size=256, query_bias=False, value_bias=False),
                  "vit_7b_patch16_dinov3", {}),
}


@pytest.fixture(autouse=True)
def steady():  # one thread: on two cores of which one is busy elsewhere, nets this small take 15 times as long
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def randomise(net):
    """Every parameter random, layer scale 0.3 +- 0.2, so that no term hides; outputs stay near 1."""
    g = torch.Generator().manual_seed(0)
    for name, p in net.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if any(word in name for word in ("lambda1", "gamma")):
            p.copy_(0.3 + 0.2 * noise)
        elif p.dim() == 1:
            p.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
        else:
            p.copy_(noise if p.dim() == 3 else noise / p[0].numel() ** 0.5)
    return net.eval()


@functools.cache
def hf_net(name):
    kind, options = NETS[name][:2]
    return randomise(getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**options)))


def timm_net(name):
    model, options = NETS[name][2:]
    return randomise(timm.create_model(model, embed_dim=128, depth=3, num_heads=2, num_classes=0, **options))


def load(path):
    cfg, state, info = load_vit(str(path))
    net = ViT(**cfg).eval()
    fill(net, state, info)
    return net


@functools.cache
def hf_loaded(name):
    with tempfile.TemporaryDirectory() as folder:
        hf_net(name).save_pretrained(folder)
        return load(folder)


@torch.no_grad()
def hf_features(net, x, norm):  # x a multiple of the patch -> maps of all blocks, cls
    final = net.layernorm if hasattr(net, "layernorm") else net.norm
    tokens = [final(t) if norm else t for t in net(x, output_hidden_states=True).hidden_states[1:]]
    h, w = (n // net.config.patch_size for n in x.shape[-2:])
    return [t[:, -h * w:].unflatten(1, (h, w)).permute(0, 3, 1, 2) for t in tokens], tokens[-1][:, 0]


@torch.no_grad()
def timm_features(net, x, norm):
    out = net.forward_intermediates(x, indices=3, norm=norm, return_prefix_tokens=True, intermediates_only=True)
    return [m for m, _ in out], out[-1][1][:, 0]


def sizes(name):
    """Native, square, both ways oblong, and no multiple of the patch; plain DINOv2 only where no table is scaled."""
    p, plain = (14, "reg" not in name) if "v2" in name else (16, False)
    other = [(4 * p, 4 * p), (3 * p, 6 * p), (6 * p - 3, 2 * p - 13)]
    return [(5 * p, 5 * p), (5 * p - 9, 5 * p)] + other * (not plain)


def compare(net, oracle, features, name, tol):
    dtype, p = net.cls_token.dtype, net.patch
    for H, W in sizes(name):
        x = torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(H)).to(dtype)
        padded = torch.zeros(2, 3, math.ceil(H / p) * p, math.ceil(W / p) * p, dtype=dtype)
        padded[:, :, :H, :W] = x
        for norm in (True, False):
            with torch.no_grad():
                maps, cls = net(x, blocks=[0, 1, 2], norm=norm)
            want, want_cls = features(oracle, padded, norm)
            for i, (a, b) in enumerate(zip([*maps, cls], [*want, want_cls], strict=True)):
                assert a.shape == b.shape and torch.allclose(a, b, tol, tol), (H, W, norm, i, (a - b).abs().max())


# ---- the same features as the libraries

@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize("name", NETS)
def test_equal_to_transformers(name, dtype, tol):
    try:
        compare(hf_loaded(name).to(dtype), hf_net(name).to(dtype), hf_features, name, tol)
    finally:  # both are cached; fp32 -> fp64 -> fp32 is exact
        hf_loaded(name).float(), hf_net(name).float()


@pytest.mark.parametrize("name", [*NETS, "dinov3_nobias"])
def test_equal_to_timm(name, tmp_path, monkeypatch):
    monkeypatch.setitem(NETS, "dinov3_nobias", (None, None, "vit_small_patch16_dinov3", {}))  # not *_qkvb
    net = timm_net(name)
    save_file(net.state_dict(), tmp_path / "timm.safetensors")
    compare(load(tmp_path / "timm.safetensors"), net, timm_features, name, 1e-5)


def test_taps_and_cls():
    net, x = hf_loaded("dinov3"), torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        (a, b, c), cls = net(x, blocks=[0, 1, 2])
        assert torch.equal(net(x)[0][0], c) and torch.equal(net(x)[1], cls)  # default: the last block
        past = net.blocks[2].register_forward_hook(lambda *_: pytest.fail("ran past the last tap"))
        (only,), early = net(x, blocks=[1])
        past.remove()
    assert torch.equal(only, b) and a.shape == (1, 128, 3, 5) and cls.shape == early.shape == (1, 128)
    assert not torch.equal(early, cls)
    assert [spread_taps(d) for d in (24, 12, 6, 3, 40)] == [
        [4, 11, 17, 23], [2, 5, 8, 11], [0, 2, 3, 5], [0, 1, 2], [9, 19, 29, 39]]


@torch.no_grad()
def test_every_size_gives_the_padded_image():
    net = hf_loaded("dinov3")
    for h in range(1, 34):
        x = torch.randn(1, 3, h, 50 - h)
        (got,), cls = net(x)
        (want,), want_cls = net(F.pad(x, (0, -x.shape[3] % 16, 0, -h % 16)))
        assert torch.equal(got, want) and torch.equal(cls, want_cls)
        assert got.shape[2:] == (math.ceil(h / 16), math.ceil((50 - h) / 16))


# ---- DINOv2's position table

def bicubic(n_in, n_out):
    """(n_out, n_in) float64 matrix: Keys' cubic, a = -0.75, pixel centres at 1/2, scale (n_out + 0.1) / n_in."""
    out = np.zeros((n_out, n_in))
    for i in range(n_out):
        centre = (i + 0.5) * n_in / (n_out + 0.1) - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - j)
            weight = 1.25 * d**3 - 2.25 * d**2 + 1 if d <= 1 else -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            out[i, min(max(j, 0), n_in - 1)] += weight
    return out


@pytest.mark.parametrize("h, w", [(16, 16), (32, 46), (37, 20), (46, 37), (1, 74), (2, 3)])
def test_plain_dinov2_positions_follow_meta(h, w):
    net = ViT("dinov2", 14, 8, 1, 1, 8, "mlp", registers=0, grid=37, qkv_bias=True)
    table = torch.randn(1, 1370, 8)
    net.pos_embed.data = table
    grid = table[0, 1:].double().numpy().reshape(37, 37, 8)
    want = np.einsum("hi,wj,ijc->hwc", bicubic(37, h), bicubic(37, w), grid).reshape(-1, 8)
    got = net.positions(h, w)[0].detach().double().numpy()
    assert np.abs(got[1:] - want).max() < 1e-4 and np.array_equal(got[0], table[0, 0].double().numpy())
    for antialias in (False, True):  # transformers, timm
        theirs = F.interpolate(table[:, 1:].view(1, 37, 37, 8).permute(0, 3, 1, 2), size=(h, w), mode="bicubic",
                               antialias=antialias)
        assert np.abs(theirs[0].flatten(1).T.double().numpy() - want).max() > 0.02


@torch.no_grad()
def test_plain_dinov2_at_another_size():
    x, net, hf = torch.randn(1, 3, 112, 112), hf_loaded("dinov2"), hf_net("dinov2")
    (ours,), cls = net(x)
    assert (ours - hf_features(hf, x, True)[0][-1]).abs().max() > 0.01  # transformers has another rule
    table = hf.embeddings.position_embeddings
    scaled = np.einsum("hi,wj,ijc->hwc", bicubic(5, 8), bicubic(5, 8), table[0, 1:].double().numpy().reshape(5, 5, -1))
    try:  # its net with Meta's 8 x 8 table
        hf.embeddings.position_embeddings = torch.nn.Parameter(
            torch.cat([table[0, :1], torch.from_numpy(scaled).float().flatten(0, 1)])[None])
        maps, want_cls = hf_features(hf, x, True)
    finally:
        hf.embeddings.position_embeddings = table
    torch.testing.assert_close(ours, maps[-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cls, want_cls, atol=1e-5, rtol=1e-5)


# ---- RoPE, key bias, bf16

def test_rope_is_the_definition():
    h, w = 3, 5
    sin, cos = Rope(64)(h, w)
    for i, j, k in np.ndindex(h, w, 32):
        coord = (2 * (i + 0.5) / h - 1) if k < 16 else (2 * (j + 0.5) / w - 1)
        angle = 2 * math.pi * coord / 100 ** (k % 16 / 16)
        for column in (k, k + 32):
            assert sin[i * w + j, column].item() == pytest.approx(math.sin(angle), abs=2e-6)
            assert cos[i * w + j, column].item() == pytest.approx(math.cos(angle), abs=2e-6)


def test_rope_stays_fp32():
    rope = Rope(64)
    plain = rope(7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = rope(7, 5)
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(plain, inside))
    q = torch.randn(1, 2, 40, 64).bfloat16()  # 5 prefix tokens
    assert torch.equal(rotate(q, *plain), rotate(q.float(), *plain).bfloat16())
    assert torch.equal(rotate(q, *plain)[:, :, :5], q[:, :, :5])
    net = ViT(**PRESETS["nano16"])
    periods = net.rope_embed.periods.clone()
    for cast in (net.bfloat16, net.half, net.double, net.float):
        cast()
        assert net.rope_embed.periods.dtype == torch.float32 and torch.equal(net.rope_embed.periods, periods)
    with torch.device("meta"):
        empty = ViT(**PRESETS["nano16"])
    empty.to_empty(device="cpu").load_state_dict(net.state_dict())
    assert torch.equal(empty.rope_embed.periods, periods)


def test_masked_key_bias_is_without_effect():
    net, x = hf_loaded("dinov3"), torch.randn(1, 3, 32, 48)
    bias = net.blocks[1].attn.qkv.bias
    want = net(x)[0][0]
    key = bias.data[128:256].clone()
    bias.data[128:256] = torch.nan
    got = net(x)[0][0]
    got.sum().backward()
    bias.data[128:256] = key
    assert torch.equal(got, want) and bias.grad[128:256].abs().max() == 0 and bias.grad[256:].abs().min() > 0
    net.zero_grad()


@pytest.mark.parametrize("tokens", [1, 35, 200])
def test_bf16_attention_agrees_with_sdpa(tokens):
    q, k, v = torch.randn(3, 2, 4, tokens, 64).bfloat16()
    want, got = F.scaled_dot_product_attention(q.double(), k.double(), v.double()), attend(q, k, v)
    assert got.dtype == torch.bfloat16 and got.shape == q.shape
    for out in (got, F.scaled_dot_product_attention(q, k, v)):
        assert (out - want).abs().max() < 2**-6 and (out - want).abs().mean() < 2**-10  # bf16 steps by 2**-7 above 1
    assert torch.equal(attend(q.requires_grad_(), k, v), out)  # with gradients it is sdpa itself


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_autocast_is_near_fp32(name):
    net, x = hf_loaded(name), torch.randn(1, 3, 5 * 14, 5 * 14)
    (want,), _ = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        (got,), _ = net(x)
    assert (got - want).abs().mean() < 0.01 and (got - want).abs().max() < 0.1


# ---- modes, initial and loaded values

@torch.no_grad()
def test_train_equals_eval():
    net, x = hf_loaded("dinov3"), torch.randn(1, 3, 64, 48)
    (still,), cls = net(x)
    (moved,), moved_cls = net.train()(x)
    net.eval()
    assert torch.equal(still, moved) and torch.equal(cls, moved_cls)
    hf = hf_net("dinov3").train()
    theirs = hf_features(hf, x, True)[0][-1]
    hf.eval()
    assert (theirs - still).abs().max() > 1e-4  # there RoPE is rescaled at random in train()


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_nan_net_is_finite_after_loading(name, tmp_path):
    hf_net(name).save_pretrained(tmp_path)
    cfg, state, info = load_vit(str(tmp_path))
    net = ViT(**cfg)
    for t in net.state_dict().values():
        t.fill_(torch.nan)
    fill(net, state, info)
    assert all(t.isfinite().all() for t in net.state_dict().values())
    assert net(torch.randn(1, 3, 40, 70))[0][0].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if p["dim"] <= 384])
def test_random_init_is_finite(name):
    (tokens,), cls = ViT(**PRESETS[name])(torch.randn(1, 3, 40, 33))
    assert tokens.isfinite().all() and cls.isfinite().all() and 0.5 < tokens.std() < 2


# ---- presets against the published files

PUBLISHED = {  # parameters, Meta's mask token left out (one dim)
    "dinov2_vits14": 22056576 - 384, "dinov2_vits14_reg": 22058112 - 384, "dinov2_vitb14": 86580480 - 768,
    "dinov2_vitb14_reg": 86583552 - 768, "dinov2_vitl14": 304368640 - 1024, "dinov2_vitl14_reg": 304372736 - 1024,
    "dinov3_vits16": 21601152 - 384, "dinov3_vits16plus": 28697472 - 384, "dinov3_vitb16": 85669632 - 768,
    "dinov3_vitl16": 303154176 - 1024}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_sizes(name):
    with torch.device("meta"):
        net = ViT(**PRESETS[name])
    assert sum(p.numel() for p in net.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", [n for n in PRESETS if (KEYS / f"{n}.meta.txt").exists()])
def test_preset_names_and_shapes_are_metas(name):
    want = dict(line.split("\t")[:2] for line in (KEYS / f"{name}.meta.txt").read_text().splitlines())
    want = {k.replace("register_tokens", "storage_tokens"): shape for k, shape in want.items()
            if k != "mask_token" and not k.endswith("bias_mask")}
    with torch.device("meta"):
        got = {k: str(tuple(t.shape)) for k, t in ViT(**PRESETS[name]).state_dict().items()}
    assert got == want
