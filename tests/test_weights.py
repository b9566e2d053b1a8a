"""Weight files: every layout gives the same bits, and every bad file is refused in one line.

NANORS_KEYS=FOLDER adds tests on the tensors of published files, see test_unetformer.py.
"""
import argparse
import functools
import hashlib
import http.server
import io
import json
import re
import threading
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save, save_file
from test_unetformer import KEYS, listed
from test_vit import NETS, hf_net, load, steady  # noqa: F401, a fixture

from models import weights
from models.vit import PRESETS, ViT, arch_name
from models.weights import BadWeights, fill, load_vit, norm_of

# Hugging Face's names to Meta's: regular expressions, applied in this order. The published lists
# below check them.
HF_TO_META = [
    (r"^encoder\.", ""),
    (r"^layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings(\.projection)?", "patch_embed.proj"),
    (r"^embeddings\.", ""),
    (r"attention\.(output\.dense|o_proj)", "attn.proj"),
    (r"layer_scale(.)\.lambda1", r"ls\1.gamma"),
    (r"attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)", r"attn.\2"),
    (r"mlp\.weights_in", "mlp.w12"),
    (r"mlp\.weights_out", "mlp.w3"),
]
MLP = [("up_proj", "fc1"), ("down_proj", "fc2")]
SWIGLU = [("gate_proj", "w1"), ("up_proj", "w2"), ("down_proj", "w3")]
FILES = {
    "meta": "net.pth", "hf": "net.safetensors", "memory": "net.bin", "timm": "timm.safetensors"}


def to_meta(hub):
    """The official file of the net in a Hugging Face file.

    DINOv3 has NaN where the key bias is masked.
    """
    v3 = "layer.0.norm1.weight" in hub
    names = HF_TO_META + (SWIGLU if "layer.0.mlp.gate_proj.weight" in hub else MLP)
    out = {}
    for key, t in hub.items():
        for old, new in names:
            key = re.sub(old, new, key)
        if v3:
            key = key.replace("register", "storage")
        out[key] = t

    for stem in [k.removesuffix("q.weight") for k in out if k.endswith("attn.q.weight")]:
        out[f"{stem}qkv.weight"] = torch.cat([out.pop(f"{stem}{c}.weight") for c in "qkv"])
        if f"{stem}q.bias" not in out:
            continue
        q, v = out.pop(f"{stem}q.bias"), out.pop(f"{stem}v.bias")
        k = out.pop(f"{stem}k.bias", q * torch.nan)
        out[f"{stem}qkv.bias"] = torch.cat([q, k, v])
        if v3:
            one = torch.ones_like(q)
            out[f"{stem}qkv.bias_mask"] = torch.cat([one, torch.zeros_like(q), one])
    if v3:
        out["mask_token"] = out["mask_token"][0]
        out["rope_embed.periods"] = 100.0 ** (torch.arange(16) / 16)
    return out


def to_timm(name, meta):
    """By timm's own conversion."""
    model, options = NETS[name][2:]
    sizes = dict(embed_dim=128, depth=3, num_heads=2, num_classes=0)
    net = timm.create_model(model, **sizes, **options)
    module = timm.models.eva if "v3" in name else timm.models.vision_transformer
    net.load_state_dict(module.checkpoint_filter_fn(dict(meta), net))
    return net.state_dict()


@pytest.fixture(scope="session")
def states(tmp_path_factory):
    """Name of a net -> its state dicts {"meta", "hf", "memory", "timm"}."""
    @functools.cache
    def of(name):
        folder = tmp_path_factory.mktemp(name)
        hf_net(name).save_pretrained(folder)
        hub = load_file(folder / "model.safetensors")
        meta = to_meta(hub)
        memory = hf_net(name).state_dict()
        return {"meta": meta, "hf": hub, "memory": memory, "timm": to_timm(name, meta)}
    return of


def write(sd, path):
    if path.suffix == ".safetensors":
        save_file(sd, path)
    else:
        torch.save(sd, path)
    return path


def refusal(path):
    """What is said of a file that does not load: one line that begins with its name."""
    with pytest.raises(BadWeights) as e:
        cfg, state, info = load_vit(str(path))
        with torch.device("meta"):
            net = ViT(**cfg)
        fill(net, state, info)
    message = str(e.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 400
    return message


@torch.no_grad()
def features(net):
    """All that a net gives for a fixed picture, in one row."""
    x = torch.randn(1, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    maps, cls = net(x, blocks=[0, 1, 2])
    return torch.cat([t.flatten() for t in [*maps, cls]])


# ---- the chain: names in, bits out

@pytest.mark.parametrize("name", NETS)
def test_every_layout_gives_the_same_bits(name, states, tmp_path):
    results = []
    for layout, sd in states(name).items():
        path = write(sd, tmp_path / FILES[layout])
        net = load(path)
        results.append(features(net))
        # Meta's key bias is NaN in the file.
        assert all(t.isfinite().all() for t in net.state_dict().values())

        line = load_vit(str(path))[2]["line"]
        shown = layout
        if layout == "memory":
            shown = "hf"
        elif layout == "timm" and name == "dinov2":
            shown = "meta/timm"
        assert line.startswith(f"layout={shown}, {len(sd)} of {len(sd)} tensors")
        assert "\n" not in line
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:8] in line
    assert len(results) == 4
    assert all(torch.equal(result, results[0]) for result in results)


def test_stored_periods_are_used(states, tmp_path):
    sd = states("dinov3")["meta"]
    rounded = sd["rope_embed.periods"].bfloat16().float()
    net = load(write(sd | {"rope_embed.periods": rounded}, tmp_path / "rounded.pth"))
    exact = load(write(sd, tmp_path / "exact.pth"))
    assert torch.equal(net.rope_embed.periods, rounded)
    assert 1e-5 < (features(net) - features(exact)).abs().max() < 0.05


def test_extra_norm_of_sat_files_is_dropped(states, tmp_path):
    sd = states("dinov3")["meta"]
    extra = {"local_cls_norm.weight": torch.randn(128), "local_cls_norm.bias": torch.randn(128)}
    plain = load(write(sd, tmp_path / "plain.pth"))
    net = load(write(sd | extra, tmp_path / "sat.pth"))
    assert torch.equal(features(net), features(plain))
    line = load_vit(str(tmp_path / "sat.pth"))[2]["line"]
    for word in ("not needed: ", "local_cls_norm", "bias_mask", "mask_token"):
        assert word in line


def under(prefix, sd):
    return {prefix + k: t for k, t in sd.items()}


WRAPPERS = {
    "module": lambda sd: under("module.", sd),
    "compiled": lambda sd: under("_orig_mod.", sd),
    "ddp of compiled": lambda sd: under("module._orig_mod.", sd),
    "compiled ddp": lambda sd: under("_orig_mod.module.", sd),
    "backbone": lambda sd: under("backbone.", sd) | {"head.conv.weight": torch.zeros(1)},
    "model": lambda sd: {"model": sd, "optimizer": {"state": {0: torch.zeros(1)}}, "epoch": 3},
    "state_dict": lambda sd: {"state_dict": under("module.", sd)},
    "teacher": lambda sd: {
        "teacher": under("backbone.", sd) | {"dino_head.mlp.0.weight": torch.zeros(1)}},
}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("layout", ["meta", "hf", "memory", "timm"])
def test_wrappers_are_taken_off(wrap, layout, states, tmp_path):
    sd = states("dinov3")[layout]
    plain = load(write(sd, tmp_path / "plain.pth"))
    wrapped = load(write(WRAPPERS[wrap](sd), tmp_path / "wrapped.pth"))
    assert torch.equal(features(wrapped), features(plain))


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_half_precision_file(name, states, tmp_path):
    half = {k: t.bfloat16() for k, t in states(name)["meta"].items()}
    full = {k: t.float() for k, t in half.items()}
    got = load(write(half, tmp_path / "half.pth"))
    want = load(write(full, tmp_path / "full.pth"))
    assert got.norm.weight.dtype == torch.float32
    assert torch.equal(features(got), features(want))


def test_folders_and_shards(states, tmp_path):
    sd = states("dinov3")["hf"]
    want = features(load(write(sd, tmp_path / "one.safetensors")))
    whole, old, shards = tmp_path / "whole", tmp_path / "bin", tmp_path / "shards"
    for folder in (whole, old, shards):
        folder.mkdir()
    save_file(sd, whole / "model.safetensors")
    torch.save(sd, old / "pytorch_model.bin")
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    keys = sorted(sd)
    home = {key: names[i % 3] for i, key in enumerate(keys)}
    for i, name in enumerate(names):
        save_file({key: sd[key] for key in keys[i::3]}, shards / name)
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": home}))
    for folder in (whole, old, shards):
        assert torch.equal(features(load(folder)), want)
    (shards / names[1]).unlink()
    assert names[1] in refusal(shards)


# ---- recognising the published sizes, from names and shapes alone

meta_tensors = pytest.mark.filterwarnings("ignore:for .* copying from a non-meta")


def recognise(sd, tmp_path, monkeypatch):
    """load_vit and fill on tensors without values -> the preset's name."""
    (tmp_path / "any.pth").write_bytes(b"")
    monkeypatch.setattr(weights, "read", lambda path: sd)
    cfg, state, info = load_vit(str(tmp_path / "any.pth"))
    with torch.device("meta"):
        net = ViT(**cfg)
    fill(net, state, info)
    return arch_name(cfg)


@meta_tensors
@pytest.mark.parametrize("file", sorted(f.name for f in KEYS.glob("dinov*.txt")))
def test_published_lists_are_recognised(file, tmp_path, monkeypatch):
    with torch.device("meta"):
        sd = listed(file)
    name = file.split(".")[0].removesuffix("_sat493m")
    assert recognise(sd, tmp_path, monkeypatch) == name


TIMM_NAMES = {
    "dinov2_vits14": "vit_small_patch14_dinov2",
    "dinov2_vits14_reg": "vit_small_patch14_reg4_dinov2",
    "dinov2_vitb14": "vit_base_patch14_dinov2",
    "dinov2_vitb14_reg": "vit_base_patch14_reg4_dinov2",
    "dinov2_vitl14": "vit_large_patch14_dinov2",
    "dinov2_vitl14_reg": "vit_large_patch14_reg4_dinov2",
    "dinov2_vitg14": "vit_giant_patch14_dinov2",
    "dinov2_vitg14_reg": "vit_giant_patch14_reg4_dinov2",
    "dinov3_vits16": "vit_small_patch16_dinov3",
    "dinov3_vits16plus": "vit_small_plus_patch16_dinov3",
    "dinov3_vitb16": "vit_base_patch16_dinov3",
    "dinov3_vitl16": "vit_large_patch16_dinov3",
    "dinov3_vith16plus": "vit_huge_plus_patch16_dinov3",
    "dinov3_vit7b16": "vit_7b_patch16_dinov3",
}


def test_timm_has_every_dino_preset():
    assert set(TIMM_NAMES) == {name for name in PRESETS if name.startswith("dino")}


@meta_tensors
@pytest.mark.parametrize("name", TIMM_NAMES)
def test_timm_sizes_are_recognised(name, tmp_path, monkeypatch):
    with torch.device("meta"):
        net = timm.create_model(TIMM_NAMES[name], num_classes=0)
    assert recognise(net.state_dict(), tmp_path, monkeypatch) == name


@pytest.mark.parametrize("file", sorted(f.name for f in KEYS.glob("dinov*.hf_hub.txt")))
def test_the_writer_above_gives_metas_names(file):
    with torch.device("meta"):
        got = to_meta(listed(file))
        want = listed(file.replace("hf_hub", "meta"))
    assert {k: t.shape for k, t in got.items()} == {k: t.shape for k, t in want.items()}


# ---- refusals

@pytest.mark.parametrize("layout", ["meta", "hf", "memory", "timm"])
@pytest.mark.parametrize("name", ["dinov2_g", "dinov2_reg", "dinov3_plus"])
def test_one_changed_tensor_is_refused_and_named(name, layout, states, tmp_path, monkeypatch):
    sd, path = states(name)[layout], tmp_path / "changed.pth"
    path.write_bytes(b"")

    def said(left_out, changed):
        """What load_vit says of sd without one tensor and with the changed ones."""
        content = {k: t for k, t in sd.items() if k != left_out} | changed
        monkeypatch.setattr(weights, "read", lambda path: content)
        return refusal(path)

    # All tensors but those of the first and the last block.
    for key in [k for k in sd if not re.search(r"(blocks|layer)\.[02]\.", k)]:
        shown = "patch_embed.proj" if "patch_embed" in key else key.removeprefix("model.")
        assert shown in said(key, {f"{key}_x": sd[key]})

        # Not needed, or a plain DINOv2 without it.
        if key.endswith(("mask_token", "bias_mask")) or "reg" in key and "v2" in name:
            continue
        assert "missing" in said(key, {})
        for wrong in (sd[key][None], sd[key][..., :-1]):
            message = said(key, {key: wrong})
            # The others say how large the net is.
            if re.search(r"(blocks|layer)\.1\.|norm", key):
                assert shown in message
                assert "expected" in message


def saved(obj, **options):
    """The bytes that torch.save would write."""
    file = io.BytesIO()
    torch.save(obj, file, **options)
    return file.getvalue()


def timm_file(model, **options):
    return saved(timm.create_model(model, **options).state_dict())


TENSORS = {f"blocks.{i}.weight": torch.zeros(64, 64) for i in range(4)}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 86\n"
XML = b'\xef\xbb\xbf<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>'
NO_FILES = {  # content, words that must stand in the message
    "html": (b"<!DOCTYPE html>\n<html><body>403</body></html>",
             ["a web page", "refused or has expired", "download it again"]),
    "xml": (XML, ["a web page (HTML/XML)"]),
    "lfs pointer": (LFS, ["a Git-LFS pointer", "git lfs pull"]),
    "empty": (b"", ["0 bytes", "download it again"]),
    "text": (b"Not Found", ["neither a .pth nor a .safetensors", "Not Found", "download it again"]),
    "json": (b'{"message": "Bad credentials"}', ["neither a .pth nor a .safetensors", "Bad cred"]),
}


@pytest.mark.parametrize("case", NO_FILES)
def test_what_is_no_weight_file_is_refused(case, tmp_path):
    content, words = NO_FILES[case]
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    message = refusal(path)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("form, n", [
    ("zip", 20), ("zip", 999), ("zip", 40000),
    ("pickle", 3), ("pickle", 18), ("pickle", 30), ("pickle", 700), ("pickle", 40000),
    ("safetensors", 9), ("safetensors", 100), ("safetensors", 40000)])
def test_a_cut_file_is_refused(form, n, tmp_path):
    if form == "safetensors":
        content = save(TENSORS)
    else:  # a pickle is what torch before 1.6 wrote
        content = saved(TENSORS, _use_new_zipfile_serialization=form == "zip")
    path = tmp_path / "weights.pth"
    path.write_bytes(content[:n])
    message = refusal(path)
    for word in ("truncated", f"{n} bytes", "download it again"):
        assert word in message


CONVNEXT = transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
VIT = dict(embed_dim=64, depth=1, num_heads=1)


def hf_classifier():
    backbone = under("dinov2.", hf_net("dinov2").state_dict())
    return saved(backbone | {"classifier.weight": torch.zeros(9, 256)})


OTHER_NETS = {  # what writes the file, words that must stand in the message
    "objects": (lambda: saved({"model": TENSORS, "args": argparse.Namespace(lr=1)}),
                ["Python objects", "plain state_dict"]),
    "no tensors": (lambda: saved([1, 2]), ["no tensors in it, only list"]),
    "optimizer": (lambda: saved({"state": {0: {"step": torch.zeros(1)}}}),
                  ["no tensors in it, only dict"]),
    "timm classifier": (
        lambda: timm_file("vit_small_patch14_dinov2", img_size=28, num_classes=9, **VIT),
        ["a classifier (head.weight (9, 64))", "expected a backbone"]),
    "hf classifier": (hf_classifier, ["a classifier (classifier.weight (9, 256))"]),
    "head alone": (lambda: saved({"weight": torch.zeros(9, 8), "bias": torch.zeros(9)}),
                   ["no network known here (first tensors: weight, bias)"]),
    "hf ConvNeXt": (lambda: saved(transformers.DINOv3ConvNextModel(CONVNEXT).state_dict()),
                    ["a ConvNeXt", "expected a DINOv2 or DINOv3 ViT backbone"]),
    "timm ConvNeXt": (lambda: timm_file("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)),
                      ["a ConvNeXt"]),
    "meta ConvNeXt": (lambda: saved({"downsample_layers.0.0.weight": torch.zeros(1),
                                     "stages.0.0.gamma": torch.zeros(1)}),
                      ["a ConvNeXt"]),
    "resnet": (lambda: saved({"conv1.weight": torch.zeros(1),
                              "layer1.0.conv1.weight": torch.zeros(1)}),
               ["a ResNet"]),
    "swin": (
        lambda: timm_file(
            "swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1), num_heads=(1, 1)),
        ["a Swin transformer"]),
    "plain ViT": (lambda: timm_file("vit_tiny_patch16_224", **VIT),
                  ["a ViT without LayerScale", "neither DINOv2 nor"]),
    "no blocks": (lambda: saved({"cls_token": torch.zeros(1, 1, 8),
                                 "blocks.0.ls1.gamma": torch.zeros(8)}),
                  ["patch_embed.proj.weight is missing"]),
}


@pytest.mark.parametrize("case", OTHER_NETS)
def test_what_holds_no_backbone_is_refused(case, tmp_path):
    content, words = OTHER_NETS[case]
    path = tmp_path / "weights.pth"
    path.write_bytes(content())
    message = refusal(path)
    assert all(word in message for word in words), message


def test_bad_paths_and_folders(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    assert "no such file or folder; pass --weights" in refusal(tmp_path / "absent.pth")
    assert "without model.safetensors" in refusal(tmp_path)
    index.write_text('{"weight_map": {')
    assert "truncated" in refusal(tmp_path)
    index.unlink()
    (tmp_path / "model.safetensors").write_bytes(LFS)
    assert "Git-LFS" in refusal(tmp_path)


def test_pickled_code_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    write({"cls_token": torch.zeros(1), "trap": Trap()}, tmp_path / "trap.pth")
    assert "never run" in refusal(tmp_path / "trap.pth")
    assert not (tmp_path / "run").exists()


def test_header_length_that_reads_as_markup(states, tmp_path):
    # A header of 0x3c20 bytes: the file begins with " <", as a web page may.
    sd = states("dinov3")["hf"]
    size = int.from_bytes(save(sd, {"pad": ""})[:8], "little")
    path = tmp_path / "net.safetensors"
    save_file(sd, path, {"pad": "x" * (0x3C20 - size)})
    assert path.read_bytes()[:2] == b" <"
    assert load(path)


def test_hash_in_the_name(states, tmp_path):
    content = saved(states("dinov3")["meta"])
    digest = hashlib.sha256(content).hexdigest()
    good, bad = tmp_path / f"net-{digest[:8]}.pth", tmp_path / "net-0123abcd.pth"
    good.write_bytes(content)
    bad.write_bytes(content)
    info = load_vit(str(good))[2]
    assert info["sha256"] == digest
    assert info["line"].endswith(f"sha256 {digest[:8]} as in the name")
    message = refusal(bad)
    for word in (digest[:8], "0123abcd", "truncated or altered"):
        assert word in message


# ---- normalisation

PERIODS = ("rope_embed.periods",)  # tensors by which the layouts differ
META = (*PERIODS, "mask_token")
SAT_L = (*META, "local_cls_norm.weight")  # both 7B files have it too
RED_SAT, RED_IMAGENET = 0.43, 0.485  # the first image_mean of a preprocessor_config.json
SAT_FOLDER = "dinov3-vitl16-pretrain-sat493m/model.safetensors"
LVD_FOLDER = "dinov3-vitl16-pretrain-lvd1689m/model.safetensors"
LVD_7B = "dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth"
NORMS = [  # file, family, dim, tensors, sha256, red -> norm
    ("x.pth", "dinov3", 1024, SAT_L, "", None, "sat"),
    ("x.pth", "dinov3", 1024, META, "eadcf0ff", None, "sat"),
    ("x.pth", "dinov3", 4096, SAT_L, "a6675841", None, "sat"),
    ("x.pth", "dinov3", 4096, SAT_L, "a955f4ea", None, "imagenet"),
    ("x.pth", "dinov3", 4096, SAT_L, "", None, None),
    (LVD_7B, "dinov3", 4096, SAT_L, "a955f4ea", None, "imagenet"),
    ("x.pth", "dinov3", 1024, META, "", None, "imagenet"),
    ("best.safetensors", "dinov3", 1024, PERIODS, "", None, None),
    ("model.safetensors", "dinov3", 1024, (), "", None, None),
    (SAT_FOLDER, "dinov3", 1024, (), "", None, "sat"),
    (LVD_FOLDER, "dinov3", 1024, (), "", None, "imagenet"),
    ("vit_large_patch16_dinov3.sat493m/model.safetensors", "dinov3", 1024, (), "", None, "sat"),
    ("sat493m_runs/vitl16-lvd1689m.safetensors", "dinov3", 1024, (), "", None, "imagenet"),
    ("lvd1689m/SAT-493M/model.safetensors", "dinov3", 1024, (), "", None, "sat"),
    ("model.safetensors", "dinov3", 1024, (), "", RED_SAT, "sat"),
    ("model.safetensors", "dinov3", 1024, (), "", RED_IMAGENET, "imagenet"),
    (SAT_FOLDER, "dinov3", 1024, (), "", RED_IMAGENET, "sat"),
    ("model.safetensors", "dinov3", 768, (), "", None, "imagenet"),
    ("model.safetensors", "dinov2", 1024, (), "", None, "imagenet"),
]


@pytest.mark.parametrize("name, family, dim, tensors, sha, red, want", NORMS)
def test_normalisation_follows_the_file(name, family, dim, tensors, sha, red, want, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True, parents=True)
    if red:
        preprocessor = file.parent / "preprocessor_config.json"
        preprocessor.write_text(json.dumps({"image_mean": [red, 0.4, 0.3]}))
    sd = dict.fromkeys(tensors, torch.zeros(dim))
    assert norm_of(file, dict(family=family, dim=dim), sd, sha.ljust(64, "0")) == want


@pytest.mark.parametrize("folder, want", [("net-sat493m", "sat"), ("net", "imagenet")])
def test_normalisation_is_reported(folder, want, states, tmp_path):
    (tmp_path / folder).mkdir()
    save_file(states("dinov3")["hf"], tmp_path / folder / "model.safetensors")
    assert load_vit(str(tmp_path / folder))[2]["norm"] == want


# ---- download

@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder, and the URL at which a local server shows it; torch's cache is elsewhere."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    folder = tmp_path / "www"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_url(site, states, tmp_path):
    folder, url = site
    content = saved(states("dinov3")["meta"])
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    with pytest.raises(BadWeights, match=f"{url}/{name}: download failed .*404.*in a browser"):
        load_vit(f"{url}/{name}")

    # A cut download leaves nothing behind: a later try starts afresh.
    (folder / name).write_bytes(content[:1000])
    with pytest.raises(BadWeights, match="download failed"):
        load_vit(f"{url}/{name}")
    assert not list((tmp_path / "cache").rglob("*.pth"))

    # The second time it comes from the cache.
    (folder / name).write_bytes(content)
    first = features(load(f"{url}/{name}?download=true"))
    (folder / name).unlink()
    assert torch.equal(features(load(f"{url}/{name}")), first)
