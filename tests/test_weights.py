"""Weight files: every layout gives the same bits, and every bad file is refused with one line that says why."""
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
from test_vit import KEYS, NETS, hf_net, load, steady  # noqa: F401, a fixture

from models import weights
from models.vit import PRESETS, ViT, arch_name
from models.weights import BadWeights, fill, load_vit, norm_of

HF_TO_META = [  # regular expressions, applied in this order; checked against shared/keys below
    (r"^encoder\.", ""), (r"^layer\.", "blocks."), (r"^layernorm\.", "norm."),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings(\.projection)?", "patch_embed.proj"), (r"^embeddings\.", ""),
    (r"attention\.(output\.dense|o_proj)", "attn.proj"), (r"layer_scale(.)\.lambda1", r"ls\1.gamma"),
    (r"attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)", r"attn.\2"),
    (r"mlp\.weights_in", "mlp.w12"), (r"mlp\.weights_out", "mlp.w3")]
MLP = [("up_proj", "fc1"), ("down_proj", "fc2")]
SWIGLU = [("gate_proj", "w1"), ("up_proj", "w2"), ("down_proj", "w3")]
FILES = {"meta": "net.pth", "hf": "net.safetensors", "memory": "net.bin", "timm": "timm.safetensors"}


def to_meta(hub):
    """The official file of the net in a Hugging Face file; DINOv3 with NaN where the key bias is masked."""
    v3, out = "layer.0.norm1.weight" in hub, {}
    for key, t in hub.items():
        for old, new in HF_TO_META + (SWIGLU if "layer.0.mlp.gate_proj.weight" in hub else MLP):
            key = re.sub(old, new, key)
        out[key.replace("register", "storage") if v3 else key] = t
    for stem in [k.removesuffix("q.weight") for k in out if k.endswith("attn.q.weight")]:
        out[stem + "qkv.weight"] = torch.cat([out.pop(f"{stem}{c}.weight") for c in "qkv"])
        if stem + "q.bias" in out:
            q, v = out.pop(stem + "q.bias"), out.pop(stem + "v.bias")
            out[stem + "qkv.bias"] = torch.cat([q, out.pop(stem + "k.bias", q * torch.nan), v])
            if v3:
                out[stem + "qkv.bias_mask"] = torch.cat([torch.ones_like(q), torch.zeros_like(q), torch.ones_like(q)])
    if v3:
        out |= {"mask_token": out["mask_token"][0], "rope_embed.periods": 100.0 ** (torch.arange(16) / 16)}
    return out


def to_timm(name, meta):  # by timm's own conversion
    net = timm.create_model(NETS[name][2], embed_dim=128, depth=3, num_heads=2, num_classes=0, **NETS[name][3])
    module = timm.models.eva if "v3" in name else timm.models.vision_transformer
    net.load_state_dict(module.checkpoint_filter_fn(dict(meta), net))
    return net.state_dict()


@pytest.fixture(scope="session")
def states(tmp_path_factory):
    """name -> the same net as {"meta", "hf", "memory", "timm"} state dicts."""
    @functools.cache
    def of(name):
        folder = tmp_path_factory.mktemp(name)
        hf_net(name).save_pretrained(folder)
        hub = load_file(folder / "model.safetensors")
        meta = to_meta(hub)
        return {"meta": meta, "hf": hub, "memory": hf_net(name).state_dict(), "timm": to_timm(name, meta)}
    return of


def write(sd, path):
    (save_file if path.suffix == ".safetensors" else torch.save)(sd, path)
    return path


def refusal(path):
    with pytest.raises(BadWeights) as e:
        cfg, state, info = load_vit(str(path))
        with torch.device("meta"):
            net = ViT(**cfg)
        fill(net, state, info)
    message = str(e.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 400, message
    return message


@torch.no_grad()
def features(net):
    maps, cls = net(torch.randn(1, 3, 70, 70, generator=torch.Generator().manual_seed(0)), blocks=[0, 1, 2])
    return torch.cat([t.flatten() for t in [*maps, cls]])


# ---- the chain: names in, bits out

@pytest.mark.parametrize("name", NETS)
def test_every_layout_gives_the_same_bits(name, states, tmp_path):
    want = None
    for layout, sd in states(name).items():
        path = write(sd, tmp_path / FILES[layout])
        net = load(path)
        got = features(net)
        assert torch.equal(got, got if want is None else want), layout
        assert all(t.isfinite().all() for t in net.state_dict().values())  # Meta's key bias above is NaN
        want = got
        line = load_vit(str(path))[2]["line"]
        shown = "hf" if layout == "memory" else "meta/timm" if (layout, name) == ("timm", "dinov2") else layout
        assert line.startswith(f"layout={shown}, {len(sd)} of {len(sd)} tensors") and "\n" not in line
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:8] in line


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
    net, plain = load(write(sd | extra, tmp_path / "sat.pth")), load(write(sd, tmp_path / "plain.pth"))
    assert torch.equal(features(net), features(plain))
    line = load_vit(str(tmp_path / "sat.pth"))[2]["line"]
    assert "not needed: " in line and "local_cls_norm" in line and "bias_mask" in line and "mask_token" in line


@pytest.mark.parametrize("wrap", [
    lambda sd: {f"module.{k}": t for k, t in sd.items()},
    lambda sd: {f"_orig_mod.{k}": t for k, t in sd.items()},
    lambda sd: {f"module._orig_mod.{k}": t for k, t in sd.items()},
    lambda sd: {f"_orig_mod.module.{k}": t for k, t in sd.items()},
    lambda sd: {f"backbone.{k}": t for k, t in sd.items()} | {"head.conv.weight": torch.zeros(1)},
    lambda sd: {"model": sd, "optimizer": {"state": {0: torch.zeros(1)}}, "epoch": 3},
    lambda sd: {"state_dict": {f"module.{k}": t for k, t in sd.items()}},
    lambda sd: {"teacher": {f"backbone.{k}": t for k, t in sd.items()} | {"dino_head.mlp.0.weight": torch.zeros(1)}},
], ids=["module", "compiled", "ddp of compiled", "compiled ddp", "backbone", "model", "state_dict", "teacher"])
@pytest.mark.parametrize("layout", ["meta", "hf", "memory", "timm"])
def test_wrappers_are_taken_off(wrap, layout, states, tmp_path):
    sd = states("dinov3")[layout]
    plain, wrapped = load(write(sd, tmp_path / "plain.pth")), load(write(wrap(sd), tmp_path / "wrapped.pth"))
    assert torch.equal(features(wrapped), features(plain))


def test_half_precision_file(states, tmp_path):
    for name in ("dinov2", "dinov3"):
        half = {k: t.bfloat16() for k, t in states(name)["meta"].items()}
        got = load(write(half, tmp_path / "half.pth"))
        want = load(write({k: t.float() for k, t in half.items()}, tmp_path / "full.pth"))
        assert got.norm.weight.dtype == torch.float32 and torch.equal(features(got), features(want))


def test_folders_and_shards(states, tmp_path):
    sd = states("dinov3")["hf"]
    want = features(load(write(sd, tmp_path / "one.safetensors")))
    (tmp_path / "whole").mkdir(), (tmp_path / "bin").mkdir(), (tmp_path / "shards").mkdir()
    write(sd, tmp_path / "whole" / "model.safetensors")
    torch.save(sd, tmp_path / "bin" / "pytorch_model.bin")
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        write({k: sd[k] for k in sorted(sd)[i::3]}, tmp_path / "shards" / name)
    index = {"metadata": {}, "weight_map": {k: names[i % 3] for i, k in enumerate(sorted(sd))}}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    for folder in ("whole", "bin", "shards"):
        assert torch.equal(features(load(tmp_path / folder)), want)
    (tmp_path / "shards" / names[1]).unlink()
    assert names[1] in refusal(tmp_path / "shards")


# ---- recognising the published sizes, from names and shapes alone

def recognise(sd, tmp_path, monkeypatch):
    """load_vit and fill on tensors without values -> the preset's name."""
    (tmp_path / "any.pth").write_bytes(b"")
    monkeypatch.setattr(weights, "read", lambda path: sd)
    cfg, state, info = load_vit(str(tmp_path / "any.pth"))
    with torch.device("meta"):
        net = ViT(**cfg)
    fill(net, state, info)
    return arch_name(cfg)


def listed(file):
    rows = [line.split("\t") for line in (KEYS / file).read_text().splitlines()]
    return {k: torch.empty(json.loads(shape.replace("(", "[").replace(")", "]").replace(",]", "]")), device="meta")
            for k, shape, _ in rows}


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta")
@pytest.mark.parametrize("file", sorted(f.name for f in KEYS.glob("dinov*.txt")))
def test_published_lists_are_recognised(file, tmp_path, monkeypatch):
    assert recognise(listed(file), tmp_path, monkeypatch) == file.split(".")[0].removesuffix("_sat493m")


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta")
@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith("dino")])
def test_timm_sizes_are_recognised(name, tmp_path, monkeypatch):
    family, size, patch, plus, reg = re.fullmatch(r"(\w+)_vit(7b|\D)(\d\d)(plus)?(_reg)?", name).groups()
    size = {"s": "small", "b": "base", "l": "large", "h": "huge", "g": "giant", "7b": "7b"}[size]
    model = f"vit_{size}{'_plus' * bool(plus)}_patch{patch}_{'reg4_' * bool(reg)}{family}"
    with torch.device("meta"):
        net = timm.create_model(model, num_classes=0)
    assert recognise(net.state_dict(), tmp_path, monkeypatch) == name


@pytest.mark.parametrize("name", sorted(f.name.split(".")[0] for f in KEYS.glob("dinov*.hf_hub.txt")))
def test_the_writer_above_gives_metas_names(name):
    got, want = to_meta(listed(f"{name}.hf_hub.txt")), listed(f"{name}.meta.txt")
    assert {k: t.shape for k, t in got.items()} == {k: t.shape for k, t in want.items()}


# ---- refusals

@pytest.mark.parametrize("layout", ["meta", "hf", "memory", "timm"])
@pytest.mark.parametrize("name", ["dinov2_g", "dinov2_reg", "dinov3_plus"])
def test_one_changed_tensor_is_refused_and_named(name, layout, states, tmp_path, monkeypatch):
    sd, path = states(name)[layout], tmp_path / "changed.pth"
    path.write_bytes(b"")

    def said(changed):
        monkeypatch.setattr(weights, "read", lambda path: {k: t for k, t in sd.items() if k != key} | changed)
        return refusal(path)

    for key in [k for k in sd if not re.search(r"(blocks|layer)\.[02]\.", k)]:
        shown = "patch_embed.proj" if "patch_embed" in key else key.removeprefix("model.")
        assert shown in said({key + "_x": sd[key]}), f"{key} renamed: {said({key + '_x': sd[key]})}"
        if key.endswith(("mask_token", "bias_mask")) or "reg" in key and "v2" in name:
            continue  # not needed; without registers it is a plain DINOv2
        assert "missing" in said({}), f"{key} missing: {said({})}"
        for wrong in (sd[key][None], sd[key][..., :-1]):
            message = said({key: wrong})
            if re.search(r"(blocks|layer)\.1\.|norm", key):  # the others say how large the net is
                assert shown in message and "expected" in message, f"{key} {tuple(wrong.shape)}: {message}"


def saved(obj, **options):
    torch.save(obj, f := io.BytesIO(), **options)
    return f.getvalue()


def small(model, **options):
    return saved(timm.create_model(model, **options).state_dict())


TENSORS = {f"blocks.{i}.weight": torch.zeros(64, 64) for i in range(4)}
CONVNEXT = transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
VIT = dict(embed_dim=64, depth=1, num_heads=1)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 86\n"
BAD = {  # content of a file, words that must stand in the message
    "html": (b"<!DOCTYPE html>\n<html><body>403</body></html>", ["a web page", "refused or has expired", "it again"]),
    "xml": (b'\xef\xbb\xbf<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', ["a web page (HTML/XML)"]),
    "lfs pointer": (LFS, ["a Git-LFS pointer", "git lfs pull"]),
    "empty": (b"", ["0 bytes", "download it again"]),
    "text": (b"Not Found", ["neither a .pth nor a .safetensors", "Not Found", "download it again"]),
    "json": (b'{"message": "Bad credentials"}', ["neither a .pth nor a .safetensors", "Bad cred"]),
    **{f"cut .pth {n}": (saved(TENSORS)[:n], ["truncated", f"{n} bytes", "download it again"])
       for n in (20, 999, 40000)},
    **{f"cut old .pth {n}": (saved(TENSORS, _use_new_zipfile_serialization=False)[:n], ["truncated", f"{n} bytes"])
       for n in (3, 18, 30, 700, 40000)},
    **{f"cut .safetensors {n}": (save(TENSORS)[:n], ["truncated", f"{n} bytes"]) for n in (9, 100, 40000)},
    "objects": (saved({"model": TENSORS, "args": argparse.Namespace(lr=1)}), ["Python objects", "plain state_dict"]),
    "no tensors": (saved([1, 2]), ["no tensors in it, only list"]),
    "optimizer": (saved({"state": {0: {"step": torch.zeros(1)}}}), ["no tensors in it, only dict"]),
    "timm classifier": (lambda: small("vit_small_patch14_dinov2", img_size=28, num_classes=9, **VIT),
                        ["a classifier (head.weight (9, 64))", "expected a backbone"]),
    "hf classifier": (lambda: saved({f"dinov2.{k}": t for k, t in hf_net("dinov2").state_dict().items()}
                                    | {"classifier.weight": torch.zeros(9, 256)}),
                      ["a classifier (classifier.weight (9, 256))"]),
    "head alone": (saved({"weight": torch.zeros(9, 8), "bias": torch.zeros(9)}),
                   ["no network known here (first tensors: weight, bias)"]),
    "hf ConvNeXt": (lambda: saved(transformers.DINOv3ConvNextModel(CONVNEXT).state_dict()),
                    ["a ConvNeXt", "expected a DINOv2 or DINOv3 ViT backbone"]),
    "timm ConvNeXt": (lambda: small("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)), ["a ConvNeXt"]),
    "meta ConvNeXt": (saved({"downsample_layers.0.0.weight": torch.zeros(1), "stages.0.0.gamma": torch.zeros(1)}),
                      ["a ConvNeXt"]),
    "resnet": (saved({"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}), ["a ResNet"]),
    "swin": (lambda: small("swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1), num_heads=(1, 1)),
             ["a Swin transformer"]),
    "plain ViT": (lambda: small("vit_tiny_patch16_224", **VIT), ["a ViT without LayerScale", "neither DINOv2 nor"]),
    "no blocks": (saved({"cls_token": torch.zeros(1, 1, 8), "blocks.0.ls1.gamma": torch.zeros(8)}),
                  ["patch_embed.proj.weight is missing"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused_in_one_line(case, tmp_path):
    content, words = BAD[case]
    path = tmp_path / "weights.pth"
    path.write_bytes(content() if callable(content) else content)
    message = refusal(path)
    assert all(word in message for word in words), message


def test_bad_paths_and_folders(tmp_path):
    assert "no such file or folder; pass --weights" in refusal(tmp_path / "absent.pth")
    assert "without model.safetensors" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {')
    assert "truncated" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(LFS)
    assert "Git-LFS" in refusal(tmp_path)


def test_pickled_code_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    write({"cls_token": torch.zeros(1), "trap": Trap()}, tmp_path / "trap.pth")
    assert "never run" in refusal(tmp_path / "trap.pth") and not (tmp_path / "run").exists()


def test_header_length_that_reads_as_markup(states, tmp_path):
    sd, pad = states("dinov3")["hf"], 0x3C20  # its bytes are " <", as a web page may begin
    size = int.from_bytes(save(sd, {"pad": ""})[:8], "little")
    path = tmp_path / "net.safetensors"
    save_file(sd, path, {"pad": "x" * (pad - size)})
    assert path.read_bytes()[:2] == b" <" and load(path)


def test_hash_in_the_name(states, tmp_path):
    plain = write(states("dinov3")["meta"], tmp_path / "net.pth")
    digest = hashlib.sha256(plain.read_bytes()).hexdigest()
    good, bad = tmp_path / f"net-{digest[:8]}.pth", tmp_path / "net-0123abcd.pth"
    for path in (good, bad):
        path.write_bytes(plain.read_bytes())
    info = load_vit(str(good))[2]
    assert info["sha256"] == digest and info["line"].endswith(f"sha256 {digest[:8]} as in the name")
    assert all(word in refusal(bad) for word in (digest[:8], "0123abcd", "truncated or altered"))


# ---- normalisation

MINE = ("rope_embed.periods",)  # tensors by which the layouts differ
META = (*MINE, "mask_token")
SAT_L = (*META, "local_cls_norm.weight")  # both 7B files have it too
NORMS = [  # file, family, dim, tensors, sha256, preprocessor mean -> norm
    ("x.pth", "dinov3", 1024, SAT_L, "", None, "sat"),
    ("x.pth", "dinov3", 1024, META, "eadcf0ff", None, "sat"),
    ("x.pth", "dinov3", 4096, SAT_L, "a6675841", None, "sat"),
    ("x.pth", "dinov3", 4096, SAT_L, "a955f4ea", None, "imagenet"),
    ("x.pth", "dinov3", 4096, SAT_L, "", None, None),
    ("dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth", "dinov3", 4096, SAT_L, "a955f4ea", None, "imagenet"),
    ("x.pth", "dinov3", 1024, META, "", None, "imagenet"),
    ("best.safetensors", "dinov3", 1024, MINE, "", None, None),
    ("model.safetensors", "dinov3", 1024, (), "", None, None),
    ("dinov3-vitl16-pretrain-sat493m/model.safetensors", "dinov3", 1024, (), "", None, "sat"),
    ("dinov3-vitl16-pretrain-lvd1689m/model.safetensors", "dinov3", 1024, (), "", None, "imagenet"),
    ("vit_large_patch16_dinov3.sat493m/model.safetensors", "dinov3", 1024, (), "", None, "sat"),
    ("sat493m_runs/dinov3-vitl16-pretrain-lvd1689m.safetensors", "dinov3", 1024, (), "", None, "imagenet"),
    ("lvd1689m/SAT-493M/model.safetensors", "dinov3", 1024, (), "", None, "sat"),
    ("model.safetensors", "dinov3", 1024, (), "", [0.43, 0.411, 0.296], "sat"),
    ("model.safetensors", "dinov3", 1024, (), "", [0.485, 0.456, 0.406], "imagenet"),
    ("dinov3-vitl16-pretrain-sat493m/model.safetensors", "dinov3", 1024, (), "", [0.485, 0.456, 0.406], "sat"),
    ("model.safetensors", "dinov3", 768, (), "", None, "imagenet"),
    ("model.safetensors", "dinov2", 1024, (), "", None, "imagenet"),
]


@pytest.mark.parametrize("name, family, dim, tensors, sha, mean, want", NORMS)
def test_normalisation_follows_the_file(name, family, dim, tensors, sha, mean, want, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True, parents=True)
    if mean:
        (file.parent / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean}))
    sd = dict.fromkeys(tensors, torch.zeros(dim))
    assert norm_of(file, dict(family=family, dim=dim), sd, sha.ljust(64, "0")) == want


def test_normalisation_is_reported(states, tmp_path):
    for folder, want in (("net-sat493m", "sat"), ("net", "imagenet")):
        (tmp_path / folder).mkdir()
        write(states("dinov3")["hf"], tmp_path / folder / "model.safetensors")
        assert load_vit(str(tmp_path / folder))[2]["norm"] == want


# ---- download

@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "www").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "www", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_url(site, states, tmp_path):
    folder, url = site
    content = saved(states("dinov3")["meta"])
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    with pytest.raises(BadWeights, match=f"{url}/{name}: download failed .*404.*in a browser"):
        load_vit(f"{url}/{name}")
    (folder / name).write_bytes(content[:1000])
    with pytest.raises(BadWeights, match="download failed"):
        load_vit(f"{url}/{name}")
    assert not list((tmp_path / "cache").rglob("*.pth"))  # a later try starts afresh
    (folder / name).write_bytes(content)
    first = features(load(f"{url}/{name}?download=true"))
    (folder / name).unlink()
    assert torch.equal(features(load(f"{url}/{name}")), first)  # from the cache
