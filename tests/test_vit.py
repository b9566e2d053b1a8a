"""ViT against transformers and timm with the same random weights; positions and RoPE by definition.

NANORS_KEYS=FOLDER adds tests on the tensors of published files, see test_unetformer.py.
"""
import functools
import math
import tempfile

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from test_unetformer import KEYS, listed

from models.vit import PRESETS, Rope, ViT, attend, rotate, spread_taps
from models.weights import fill, load_vit

# Small nets of every kind: transformers class and its options, timm name and its options.
SMALL = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=2)
V2 = SMALL | dict(patch_size=14, image_size=70)  # a table of 5 x 5 positions
V3 = SMALL | dict(intermediate_size=512, num_register_tokens=4)
PLUS = V3 | dict(use_gated_mlp=True, hidden_act="silu")
SEVEN = PLUS | dict(intermediate_size=256, query_bias=False, value_bias=False)
NETS = {
    "dinov2": ("Dinov2", V2, "vit_small_patch14_dinov2", dict(img_size=70)),
    "dinov2_g": ("Dinov2", V2 | dict(use_swiglu_ffn=True),
                 "vit_giant_patch14_dinov2", dict(img_size=70, mlp_ratio=5.375)),
    "dinov2_reg": ("Dinov2WithRegisters", V2,
                   "vit_small_patch14_reg4_dinov2", dict(img_size=70, dynamic_img_size=True)),
    "dinov3": ("DINOv3ViT", V3, "vit_small_patch16_dinov3_qkvb", {}),
    "dinov3_plus": ("DINOv3ViT", PLUS, "vit_small_plus_patch16_dinov3_qkvb", {}),
    "dinov3_7b": ("DINOv3ViT", SEVEN, "vit_7b_patch16_dinov3", {}),
}


@pytest.fixture(autouse=True)
def steady():
    # One thread: on two cores of which one is busy, nets this small would take 15 times as long.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def randomise(net):
    """Every parameter random, so that no term hides; outputs stay near 1."""
    g = torch.Generator().manual_seed(0)
    for name, p in net.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if "lambda1" in name or "gamma" in name:
            p.copy_(0.3 + 0.2 * noise)  # layer scale
        elif "norm" in name and name.endswith("weight"):
            p.copy_(1 + 0.2 * noise)
        elif p.dim() == 1:
            p.copy_(0.2 * noise)
        elif p.dim() == 3:
            p.copy_(noise)  # tokens and positions
        else:
            p.copy_(noise / p[0].numel() ** 0.5)
    return net.eval()


@functools.cache
def hf_net(name):
    kind, options = NETS[name][:2]
    config = getattr(transformers, f"{kind}Config")(**options)
    return randomise(getattr(transformers, f"{kind}Model")(config))


def timm_net(name):
    model, options = NETS[name][2:]
    sizes = dict(embed_dim=128, depth=3, num_heads=2, num_classes=0)
    return randomise(timm.create_model(model, **sizes, **options))


def load(path):
    cfg, state, info = load_vit(str(path))
    net = ViT(**cfg).eval()
    fill(net, state, info)
    return net


@functools.cache
def hf_loaded(name):
    """The net of hf_net(name), by way of its file."""
    with tempfile.TemporaryDirectory() as folder:
        hf_net(name).save_pretrained(folder)
        return load(folder)


@torch.no_grad()
def hf_features(net, x, norm):
    """x of whole patches -> maps of all blocks, cls."""
    states = net(x, output_hidden_states=True).hidden_states[1:]
    if norm:
        final = net.layernorm if hasattr(net, "layernorm") else net.norm
        states = [final(tokens) for tokens in states]
    h, w = (n // net.config.patch_size for n in x.shape[-2:])
    maps = [tokens[:, -h * w:].unflatten(1, (h, w)).permute(0, 3, 1, 2) for tokens in states]
    return maps, states[-1][:, 0]


@torch.no_grad()
def timm_features(net, x, norm):
    out = net.forward_intermediates(
        x, indices=3, norm=norm, return_prefix_tokens=True, intermediates_only=True)
    maps = [m for m, _ in out]
    prefix = out[-1][1]
    return maps, prefix[:, 0]


def sizes(name):
    """H, W: native, less than that, square, both ways oblong, and no multiple of the patch."""
    p = 14 if "v2" in name else 16
    out = [(5 * p, 5 * p), (5 * p - 9, 5 * p)]
    # The libraries scale plain DINOv2's table of positions in another way than Meta.
    if "v3" in name or "reg" in name:
        out += [(4 * p, 4 * p), (3 * p, 6 * p), (6 * p - 3, 2 * p - 13)]
    return out


def compare(net, oracle, features, name, tol):
    dtype, p = net.cls_token.dtype, net.patch
    for H, W in sizes(name):
        g = torch.Generator().manual_seed(H)
        x = torch.randn(2, 3, H, W, generator=g).to(dtype)
        padded = torch.zeros(2, 3, math.ceil(H / p) * p, math.ceil(W / p) * p, dtype=dtype)
        padded[:, :, :H, :W] = x
        for norm in (True, False):
            with torch.no_grad():
                maps, cls = net(x, blocks=[0, 1, 2], norm=norm)
            want_maps, want_cls = features(oracle, padded, norm)
            for got, want in zip([*maps, cls], [*want_maps, want_cls], strict=True):
                torch.testing.assert_close(got, want, rtol=tol, atol=tol)


# ---- the same features as the libraries

@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize("name", NETS)
def test_equal_to_transformers(name, dtype, tol):
    net, hf = hf_loaded(name), hf_net(name)
    try:
        compare(net.to(dtype), hf.to(dtype), hf_features, name, tol)
    finally:
        # Both are cached for the other tests. fp32 -> fp64 -> fp32 is exact.
        net.float()
        hf.float()


@pytest.mark.parametrize("name", [*NETS, "dinov3_nobias"])
def test_equal_to_timm(name, tmp_path, monkeypatch):
    # timm's plain models, those without qkvb in the name, have no bias at all.
    monkeypatch.setitem(NETS, "dinov3_nobias", (None, None, "vit_small_patch16_dinov3", {}))
    net = timm_net(name)
    save_file(net.state_dict(), tmp_path / "timm.safetensors")
    compare(load(tmp_path / "timm.safetensors"), net, timm_features, name, 1e-5)


@torch.no_grad()
def test_taps_and_cls():
    net, x = hf_loaded("dinov3"), torch.randn(1, 3, 48, 80)
    (a, b, c), cls = net(x, blocks=[0, 1, 2])
    assert a.shape == (1, 128, 3, 5)
    assert cls.shape == (1, 128)

    # By default the last block.
    (last,), last_cls = net(x)
    assert torch.equal(last, c)
    assert torch.equal(last_cls, cls)

    # Nothing runs past the last tap, and cls is that of the tap.
    past = net.blocks[2].register_forward_hook(lambda *_: pytest.fail("ran past the last tap"))
    (only,), early = net(x, blocks=[1])
    past.remove()
    assert torch.equal(only, b)
    assert early.shape == (1, 128)
    assert not torch.equal(early, cls)


@pytest.mark.parametrize("depth, taps", [
    (24, [4, 11, 17, 23]), (12, [2, 5, 8, 11]), (6, [0, 2, 3, 5]), (3, [0, 1, 2]),
    (40, [9, 19, 29, 39])])
def test_taps_are_spread_over_the_depth(depth, taps):
    assert spread_taps(depth) == taps


@torch.no_grad()
def test_every_size_gives_the_padded_image():
    net = hf_loaded("dinov3")
    for h in range(1, 34):
        w = 50 - h
        x = torch.randn(1, 3, h, w)
        (got,), cls = net(x)
        (want,), want_cls = net(F.pad(x, (0, -w % 16, 0, -h % 16)))
        assert torch.equal(got, want)
        assert torch.equal(cls, want_cls)
        assert got.shape[2:] == (math.ceil(h / 16), math.ceil(w / 16))


# ---- DINOv2's position table

def bicubic(n_in, n_out):
    """(n_out, n_in) float64 matrix: Keys' cubic, a = -0.75, pixel centres at 1/2.

    The scale is Meta's, (n_out + 0.1) / n_in.
    """
    out = np.zeros((n_out, n_in))
    for i in range(n_out):
        centre = (i + 0.5) * n_in / (n_out + 0.1) - 0.5
        first = math.floor(centre) - 1
        for j in range(first, first + 4):
            d = abs(centre - j)
            if d <= 1:
                weight = 1.25 * d**3 - 2.25 * d**2 + 1
            else:
                weight = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            inside = min(max(j, 0), n_in - 1)
            out[i, inside] += weight
    return out


def resized(table, h, w):
    """Positions (n, n, C) -> (h * w, C), in float64."""
    n = len(table)
    rows, columns = bicubic(n, h), bicubic(n, w)
    return np.einsum("hi,wj,ijc->hwc", rows, columns, table).reshape(h * w, -1)


@pytest.mark.parametrize("h, w", [(16, 16), (32, 46), (37, 20), (46, 37), (1, 74), (2, 3)])
def test_plain_dinov2_positions_follow_meta(h, w):
    net = ViT("dinov2", 14, 8, 1, 1, 8, "mlp", registers=0, grid=37, qkv_bias=True)
    positions = torch.randn(1, 1370, 8)
    net.pos_embed.data = positions
    want = resized(positions[0, 1:].double().numpy().reshape(37, 37, 8), h, w)
    got = net.positions(h, w)[0].detach()
    assert np.abs(got[1:].double().numpy() - want).max() < 1e-4
    assert torch.equal(got[0], positions[0, 0])

    # transformers and timm resize otherwise.
    table = positions[:, 1:].view(1, 37, 37, 8).permute(0, 3, 1, 2)
    for antialias in (False, True):
        theirs = F.interpolate(table, size=(h, w), mode="bicubic", antialias=antialias)
        theirs = theirs[0].flatten(1).T.double().numpy()
        assert np.abs(theirs - want).max() > 0.02


@torch.no_grad()
def test_plain_dinov2_at_another_size():
    x = torch.randn(1, 3, 112, 112)  # 8 x 8 patches on a table of 5 x 5
    hf = hf_net("dinov2")
    (ours,), cls = hf_loaded("dinov2")(x)
    theirs, _ = hf_features(hf, x, True)
    assert (ours - theirs[-1]).abs().max() > 0.01  # transformers has another rule

    # Its net with Meta's 8 x 8 table agrees.
    own = hf.embeddings.position_embeddings
    table = resized(own[0, 1:].double().numpy().reshape(5, 5, -1), 8, 8)
    positions = torch.cat([own[0, :1], torch.from_numpy(table).float()])
    try:
        hf.embeddings.position_embeddings = torch.nn.Parameter(positions[None])
        maps, want_cls = hf_features(hf, x, True)
    finally:
        hf.embeddings.position_embeddings = own
    torch.testing.assert_close(ours, maps[-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cls, want_cls, atol=1e-5, rtol=1e-5)


# ---- RoPE, key bias, bf16

def test_rope_is_the_definition():
    h, w = 3, 5
    sin, cos = Rope(64)(h, w)
    for i, j, k in np.ndindex(h, w, 32):
        # 16 periods for the height, then 16 for the width; the second half repeats the first.
        place = (i + 0.5) / h if k < 16 else (j + 0.5) / w
        angle = 2 * math.pi * (2 * place - 1) / 100 ** (k % 16 / 16)
        for column in (k, k + 32):
            assert sin[i * w + j, column].item() == pytest.approx(math.sin(angle), abs=2e-6)
            assert cos[i * w + j, column].item() == pytest.approx(math.cos(angle), abs=2e-6)


def test_rope_is_computed_in_fp32():
    rope = Rope(64)
    plain = rope(7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = rope(7, 5)
    for a, b in zip(plain, inside, strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)
    q = torch.randn(1, 2, 40, 64).bfloat16()
    turned = rotate(q, *plain)
    assert torch.equal(turned, rotate(q.float(), *plain).bfloat16())
    assert torch.equal(turned[:, :, :5], q[:, :, :5])  # cls and registers


def test_periods_keep_their_digits():
    net = ViT(**PRESETS["nano16"])
    periods = net.rope_embed.periods.clone()
    for cast in (net.bfloat16, net.half, net.double, net.float):
        cast()
        assert net.rope_embed.periods.dtype == torch.float32
        assert torch.equal(net.rope_embed.periods, periods)
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
    assert torch.equal(got, want)
    assert bias.grad[128:256].abs().max() == 0
    assert bias.grad[256:].abs().min() > 0
    net.zero_grad()


@pytest.mark.parametrize("tokens", [1, 35, 200])
def test_bf16_attention_agrees_with_sdpa(tokens):
    q, k, v = torch.randn(3, 2, 4, tokens, 64).bfloat16()
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    got = attend(q, k, v)
    torchs = F.scaled_dot_product_attention(q, k, v)
    assert got.dtype == torch.bfloat16
    assert got.shape == q.shape
    for out in (got, torchs):
        error = (out - want).abs()
        assert error.max() < 2**-6  # bf16 steps by 2**-7 above 1
        assert error.mean() < 2**-10
    # With gradients it is sdpa itself.
    assert torch.equal(attend(q.requires_grad_(), k, v), torchs)


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_autocast_is_near_fp32(name):
    net, x = hf_loaded(name), torch.randn(1, 3, 5 * 14, 5 * 14)
    (want,), _ = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        (got,), _ = net(x)
    error = (got - want).abs()
    assert error.mean() < 0.01
    assert error.max() < 0.1


# ---- modes, initial and loaded values

@torch.no_grad()
def test_train_equals_eval():
    net, x = hf_loaded("dinov3"), torch.randn(1, 3, 64, 48)
    (still,), cls = net(x)
    (moved,), moved_cls = net.train()(x)
    net.eval()
    assert torch.equal(still, moved)
    assert torch.equal(cls, moved_cls)

    # transformers rescales RoPE at random in train().
    hf = hf_net("dinov3").train()
    theirs, _ = hf_features(hf, x, True)
    hf.eval()
    assert (theirs[-1] - still).abs().max() > 1e-4


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
    (tokens,), _ = net(torch.randn(1, 3, 40, 70))
    assert tokens.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if p["dim"] <= 384])
def test_random_init_is_finite(name):
    (tokens,), cls = ViT(**PRESETS[name])(torch.randn(1, 3, 40, 33))
    assert tokens.isfinite().all()
    assert cls.isfinite().all()
    assert 0.5 < tokens.std() < 2


# ---- presets against the published files

# Parameters with Meta's mask token, which we leave out; it has one number per channel.
PUBLISHED = {
    "dinov2_vits14": 22056576, "dinov2_vits14_reg": 22058112,
    "dinov2_vitb14": 86580480, "dinov2_vitb14_reg": 86583552,
    "dinov2_vitl14": 304368640, "dinov2_vitl14_reg": 304372736,
    "dinov3_vits16": 21601152, "dinov3_vits16plus": 28697472,
    "dinov3_vitb16": 85669632, "dinov3_vitl16": 303154176,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_sizes(name):
    with torch.device("meta"):
        net = ViT(**PRESETS[name])
    count = sum(p.numel() for p in net.parameters())
    assert count + net.dim == PUBLISHED[name]


@pytest.mark.parametrize("name", [n for n in PRESETS if (KEYS / f"{n}.meta.txt").exists()])
def test_preset_names_and_shapes_are_metas(name):
    with torch.device("meta"):
        published = listed(f"{name}.meta.txt")
        net = ViT(**PRESETS[name])
    want = {}
    for key, t in published.items():
        if key != "mask_token" and not key.endswith("bias_mask"):
            want[key.replace("register_tokens", "storage_tokens")] = t.shape
    assert {key: t.shape for key, t in net.state_dict().items()} == want
