"""Weight files: every layout gives the same bits, and every bad file is refused in one line.

NANORS_KEYS=FOLDER adds tests on the tensors of published files, see test_unetformer.py.
"""
import argparse
import contextlib
import functools
import hashlib
import http.server
import io
import json
import pickle
import re
import runpy
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed.checkpoint
import transformers
from safetensors.torch import load_file, save, save_file
from test_unetformer import KEYS, listed
from test_vit import NETS, SMALL, hf_net, load, steady  # noqa: F401, a fixture

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


def within(word, sd):
    """`word` behind the first number of every name: blocks.0.attn -> blocks.0.WORD.attn."""
    return {re.sub(r"\.(\d+)\.", rf".\1.{word}.", k, count=1): t for k, t in sd.items()}


def chunked(sd, size=2):
    """As Meta's training stores blocks: chunks of them, but numbered through."""
    def number(match):
        return f"blocks.{int(match[1]) // size}.{match[1]}."

    return {re.sub(r"^blocks\.(\d+)\.", number, k): t for k, t in sd.items()}


HEAD = {"decode_head.conv.weight": torch.zeros(1), "decode_head.conv.bias": torch.zeros(1)}
ADAM = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"params": [0, 1]}]}
WRAPPERS = {  # what is written instead of the tensors
    "module": lambda sd: under("module.", sd),
    "compiled": lambda sd: under("_orig_mod.", sd),
    "ddp of compiled": lambda sd: under("module._orig_mod.", sd),
    "compiled ddp": lambda sd: under("_orig_mod.module.", sd),
    "compiled blocks": lambda sd: within("_orig_mod", sd),
    "fsdp": lambda sd: under("_fsdp_wrapped_module.", within("_fsdp_wrapped_module", sd)),
    "checkpointed blocks": lambda sd: within("_checkpoint_wrapped_module", sd),
    "chunks": lambda sd: under("teacher.backbone.", chunked(sd)),
    "one chunk": lambda sd: under("backbone.", chunked(sd, 99)),
    "averaged model": lambda sd: under("module.", sd) | {"n_averaged": torch.tensor(3)},
    "backbone": lambda sd: under("backbone.", sd) | HEAD,
    "model": lambda sd: {"model": sd, "optimizer": ADAM, "epoch": 3},
    "lightning": lambda sd: {"state_dict": under("model.net.encoder.", sd), "callbacks": {}},
    "state_dict": lambda sd: {"state_dict": under("module.", sd)},
    "key nobody knows": lambda sd: {"a": [1, {"b": ({"c d": sd}, "e")}]},
    "twice the same": lambda sd: {"state_dict": under("net.", sd) | under("ddp.module.", sd)},
    "teacher": lambda sd: {
        "teacher": under("backbone.", sd) | {"dino_head.mlp.0.weight": torch.zeros(1)}},
}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("layout", ["meta", "hf", "memory", "timm"])
def test_wrappers_are_taken_off(wrap, layout, states, tmp_path):
    sd = states("dinov3")[layout]
    plain = load(write(sd, tmp_path / "plain.pth"))
    wrapped = load(write(WRAPPERS[wrap](sd), tmp_path / "wrapped.pth"))
    assert all(torch.equal(t, wrapped.state_dict()[k]) for k, t in plain.state_dict().items())


# ---- several networks in a file

COPIES = [  # where they lie, in the order of the file; the one that is loaded
    (["student.backbone.", "teacher.backbone."], "teacher.backbone."),
    (["teacher.backbone.", "gram_teacher.backbone.", "student.backbone."], "teacher.backbone."),
    (["gram_teacher.backbone.", "teacher.backbone."], "teacher.backbone."),
    (["model.", "model_ema."], "model_ema."),
    (["state_dict_ema.", "state_dict."], "state_dict_ema."),
    (["model.module.", "modelEMA.module."], "modelEMA.module."),
    (["net.", "swa_model.module."], "swa_model.module."),
    (["ema.", "net.teacher_vit."], "net.teacher_vit."),
    (["student.", ""], ""),
    (["encoder.", "momentum_encoder."], "momentum_encoder."),
    (["optimizer.exp_avg.", "model."], "model."),
]


@pytest.mark.parametrize("prefixes, best", COPIES)
def test_a_teacher_goes_before_an_average_and_a_student_is_last(prefixes, best, states, tmp_path):
    sd = states("dinov2")["meta"]
    content = {}
    for i, prefix in enumerate(prefixes):
        content |= {f"{prefix}{k}": t + i for k, t in sd.items()}
    path = write(content, tmp_path / "several.pth")
    net = load(path)
    shift = prefixes.index(best)
    assert torch.equal(net.norm.weight, sd["norm.weight"] + shift)
    assert torch.equal(net.blocks[1].attn.qkv.weight, sd["blocks.1.attn.qkv.weight"] + shift)
    line = load_vit(str(path))[2]["line"]
    assert f"{len(sd)} of {len(content)} tensors" in line
    assert (f", taken: {best.rstrip('.')}," in line) == bool(best)
    for prefix in prefixes:
        if prefix and prefix != best:
            assert prefix.split(".")[0] in line.split("left out: ")[1]


def test_networks_that_nothing_tells_apart_are_not_guessed(states, tmp_path):
    sd = states("dinov2")["meta"]
    other = {k: t + 1 for k, t in sd.items()}
    content = {"net": under("rgb.", sd) | under("sar.", other)}
    message = refusal(write(content, tmp_path / "two.pth"))
    assert "net.rgb., net.sar." in message and "save the one you mean alone" in message
    # As the message says:
    alone = {k.removeprefix("sar."): t for k, t in content["net"].items() if k.startswith("sar.")}
    net = load(write(alone, tmp_path / "one.pth"))
    assert torch.equal(net.norm.weight, other["norm.weight"])


def test_what_stands_beside_the_network_is_named(states, tmp_path):
    sd = states("dinov2")["meta"]
    extra = {f"{name}.weight": torch.zeros(1) for name in ("head", "neck", "a.b", "c", "d", "e")}
    content = {"model": under("vit.", sd) | {"vit.adapter.w": torch.zeros(1)} | extra}
    line = load_vit(str(write(content, tmp_path / "more.pth")))[2]["line"]
    said = "taken: model.vit, left out: model.vit.adapter, model.head, model.neck, model.a and 3 more,"
    assert said in line
    # A parameter of the network itself that nobody knows would change what it gives.
    for name in ("scale", "blocks.1.attn.lora", "patch_embed.norm.weight", "cls_norm.weight"):
        content = sd | {name: torch.zeros(1)}
        assert f"unknown tensor {name}" in refusal(write(content, tmp_path / "more.pth"))


def timm_classifier():
    net = timm.create_model("vit_small_patch14_dinov2", img_size=28, num_classes=9, **VIT)
    sd = net.state_dict()
    return sd, "left out: head,", sd["blocks.0.mlp.fc1.weight"]


def hf_classifier():
    config = transformers.Dinov2Config(num_labels=9, **SMALL)
    sd = transformers.Dinov2ForImageClassification(config).state_dict()
    name = "dinov2.encoder.layer.0.mlp.fc1.weight"
    return sd, "taken: dinov2, left out: classifier,", sd[name]


@pytest.mark.parametrize("make", [timm_classifier, hf_classifier])
def test_of_a_fine_tuned_classifier_the_backbone_is_taken(make, tmp_path):
    sd, said, want = make()
    path = write(sd, tmp_path / "own.pth")
    assert torch.equal(load(path).blocks[0].mlp.fc1.weight, want)
    assert said in load_vit(str(path))[2]["line"]


def test_names_that_meet_are_not_overwritten(states, tmp_path):
    sd = states("dinov2")["meta"]
    bias = torch.ones(128)
    both = sd | {"blocks.1.module.norm1.bias": bias}
    assert "both blocks.1.norm1.bias" in refusal(write(both, tmp_path / "a.pth"))
    both = {"a.b": bias, "a": {"b": bias}}
    assert "its key 'a.b'" in refusal(write(both, tmp_path / "b.pth"))
    # Numbers that begin anew in every chunk.
    both = {re.sub(r"^blocks\.(.)", r"blocks.\1.0", k): t for k, t in sd.items()}
    assert "are both blocks.0." in refusal(write(both, tmp_path / "c.pth"))


@pytest.mark.filterwarnings("ignore")  # of torch about its own
def test_a_distributed_checkpoint_says_how_to_make_one_file_of_it(states, tmp_path, monkeypatch):
    sd, folder = states("dinov2")["meta"], tmp_path / "ckpt"
    torch.distributed.checkpoint.save(
        {"model": under("teacher.backbone.", sd), "iteration": 3}, checkpoint_id=folder, no_dist=True)
    message = refusal(folder)
    module, *argv = re.search(r"python -m (\S+ dcp_to_torch \S+ weights.pth)", message)[1].split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *argv])
    runpy.run_module(module, run_name="__main__")
    assert torch.equal(load(tmp_path / "weights.pth").norm.weight, sd["norm.weight"])


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


def zipped(members, compression=zipfile.ZIP_STORED):
    """The bytes of a zip file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


TENSORS = {f"blocks.{i}.weight": torch.zeros(64, 64) for i in range(4)}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 86\n"
XML = b'\xef\xbb\xbf<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>'
NO_FILES = {  # content, words that must stand in the message
    "html": (b"<!DOCTYPE html>\n<html><body>403</body></html>",
             ["a web page", "refused or has expired", "download it again"]),
    "xml": (XML, ["a web page (HTML/XML)"]),
    "lfs pointer": (LFS, ["a Git-LFS pointer", "git lfs pull"]),
    "empty": (b"", ["0 bytes", "download it again"]),
    "text": (b"Not Found", ["neither a .pth nor a .safetensors", "Not Found", "pass the weight file"]),
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


OTHER_NETS = {  # what writes the file, words that must stand in the message
    "objects": (lambda: saved({"model": TENSORS, "args": argparse.Namespace(lr=1)}),
                ["Python objects", "plain state_dict"]),
    "plain pickle": (lambda: pickle.dumps({"a": 1}), ["a plain pickle", "with torch.save"]),
    "old pickle": (lambda: pickle.dumps({"a": 1}, 2), ["a plain pickle", "with torch.save"]),
    "no tensors": (lambda: saved([1, 2]), ["no tensors in it, only list"]),
    "a number": (lambda: saved(3), ["no tensors in it, only int"]),
    "keys alone": (lambda: saved({"epoch": 3, "args": {"lr": 1}}),
                   ["no tensors in it, only keys epoch, args; expected a state_dict"]),
    "optimizer": (lambda: saved({"state": {0: {"step": torch.zeros(1)}}}),
                  ["no network known here (first tensors: state.0.step)"]),
    "shard of FSDP": (lambda: saved({"model": {"backbone.blocks.0._flat_param": torch.zeros(9)}}),
                      ["a part of an FSDP checkpoint", "FULL_STATE_DICT"]),
    "other zip": (lambda: zipped({"a.txt": b"hello"}), ["a zip file of ['a.txt']", "unpack it"]),
    "program": (lambda: zipped({"a/data.pkl": b"", "a/constants.pkl": b""}), ["a TorchScript program"]),
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
    # Nothing in a whole file says that it was cut.
    assert not re.search("truncated|damaged|download", message), message


def test_bad_paths_and_folders(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    assert "no such file or folder; pass --weights" in refusal(tmp_path / "absent.pth")
    assert "without model.safetensors" in refusal(tmp_path)
    index.write_text('{"weight_map": {')
    assert "index.json: not valid JSON" in refusal(index.parent)
    for table in ("null", "[]", "{}", '{"a": 3}', "3"):
        index.write_text(f'{{"weight_map": {table}}}')
        assert "index" in refusal(tmp_path)
    # Neither a download nor a file elsewhere.
    for name in ("http://127.0.0.1:9/a.safetensors", "../a.safetensors", "/dev/zero"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        assert f"shard '{name}' is listed in the index but missing" in refusal(tmp_path)
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


# ---- values

@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_numbers_that_are_none_are_refused(name, bad, states, tmp_path):
    sd = states(name)["meta"]
    for key, place in (("norm.weight", 5), ("blocks.1.attn.qkv.bias", 2), ("blocks.2.ls1.gamma", -1)):
        changed = {k: t.clone() for k, t in sd.items()}
        changed[key][place] = bad
        message = refusal(write(changed, tmp_path / "bad.pth"))
        assert f"{key} holds NaN or infinity" in message
    # What is not loaded may hold anything.
    content = {"teacher": sd, "optimizer": {"exp_avg": torch.full((3,), bad)}}
    assert load(write(content, tmp_path / "good.pth"))


def test_float64_that_float32_cannot_hold_is_refused(states, tmp_path):
    sd = states("dinov2")["meta"]
    sd = sd | {"norm.bias": sd["norm.bias"].double() * 1e300}
    assert "norm.bias holds NaN or infinity" in refusal(write(sd, tmp_path / "bad.pth"))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int8, torch.int64,
                                   torch.float8_e4m3fn])
@pytest.mark.parametrize("key", ["norm.weight", "blocks.1.attn.qkv.weight", "cls_token"])
def test_other_types_are_refused(dtype, key, states, tmp_path):
    sd = states("dinov2")["meta"]
    sd = sd | {key: sd[key].to(dtype)}
    for file in ("a.pth", "a.safetensors"):
        assert f"{key} is {dtype}, expected torch.float32" in refusal(write(sd, tmp_path / file))


def test_parts_of_qkv_of_other_types_are_refused(states, tmp_path):
    sd = states("dinov2")["hf"]
    key = "encoder.layer.1.attention.attention.key.weight"
    message = refusal(write(sd | {key: sd[key] > 0}, tmp_path / "a.pth"))
    assert f"{key} is (128, 128), torch.bool" in message and "equal shapes and types" in message


# ---- files that claim things

def test_sizes_that_the_tensors_do_not_have(states, tmp_path):
    sd, path = states("dinov3")["meta"], tmp_path / "a.pth"
    for key, t, said in (
            ("blocks.1000000.norm1.weight", torch.ones(128), "unknown tensor blocks.1000000"),
            ("blocks.900.norm1.weight", torch.ones(128), "block 3 is missing"),
            ("patch_embed.proj.weight", torch.ones(0, 3, 16, 16), "expected 4 dimensions"),
            ("patch_embed.proj.weight", torch.ones(40000, 3, 1, 1), "40000 wide, need more than"),
            ("patch_embed.proj.weight", torch.ones(130, 3, 16, 16), "heads in a width of 130"),
            ("rope_embed.periods", torch.ones(()), "a single number"),
            ("rope_embed.periods", torch.ones(0), "rope_embed.periods is (0,)"),
            ("storage_tokens", torch.ones(4), "storage_tokens is (4,), expected 3 dimensions"),
            ("blocks.0.mlp.fc2.weight", torch.ones(128), "expected 2 dimensions"),
            ("pos_embed", torch.ones(1, 0, 128), "pos_embed is (1, 0, 128)")):
        assert said in refusal(write(sd | {key: t}, path)), key


HUGE = 2 * 10**9  # numbers, 8 GB of them
CLAIMS = {  # what a small .pth may claim, words of the refusal
    "expanded": (lambda: torch.zeros(1).expand(HUGE), "bytes in a file of"),
    "expanded many times": (lambda: [torch.zeros(1).expand(10**5)] * 1000, "bytes in a file of"),
    "on meta": (lambda: torch.empty(HUGE, device="meta"), "without values"),
    "sparse": (lambda: torch.sparse_coo_tensor([[0]], [1.0], (HUGE,)), "sparse"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised"),
    "name with codes": (lambda: {"\x1b[31m\n": torch.ones(1)}, r"named 'x.\x1b[31m\n'"),
}


@pytest.mark.filterwarnings("ignore")  # torch no longer wants to quantise
@pytest.mark.parametrize("case", CLAIMS)
def test_claims_are_compared_with_the_file(case, tmp_path):
    make, said = CLAIMS[case]
    assert said in refusal(write({"x": make()}, tmp_path / "a.pth"))


def test_nesting_without_end_is_refused(tmp_path):
    loop, deep = {"a": torch.ones(1)}, {"a": torch.ones(1)}
    loop["again"] = loop
    for _ in range(30):
        deep = {"nested" * 7: deep}
    # Twice the same dict on each of 60 levels has 2^60 paths.
    many = {"a": torch.ones(1)}
    for _ in range(60):
        many = {"l": many, "r": many}
    assert "no network known here (first tensors: a)" in refusal(write(loop, tmp_path / "a.pth"))
    assert "no network known" in refusal(write(many, tmp_path / "b.pth"))
    assert "no plain state_dict, by its key 'nestednested" in refusal(write(deep, tmp_path / "c.pth"))


def test_a_packed_archive_is_not_unpacked(states, tmp_path):
    sd, path = states("dinov2")["meta"], tmp_path / "a.pth"
    with zipfile.ZipFile(io.BytesIO(saved(sd))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    bomb = members | {next(iter(members)).split("/")[0] + "/data/0": bytes(10**7)}
    for content in (members, bomb):
        path.write_bytes(zipped(content, zipfile.ZIP_DEFLATED))
        assert "compressed" in refusal(path)
    # As the message says:
    path.write_bytes(zipped(members, zipfile.ZIP_DEFLATED))
    torch.save(torch.load(path, weights_only=True), path)
    assert torch.equal(load(path).norm.weight, sd["norm.weight"])


def header(content, length=None):
    """A .safetensors file with this header and 68 bytes of numbers."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return (length or len(text)).to_bytes(8, "little") + text + bytes(68)


def entry(**changed):
    return {"a": dict(dtype="F32", shape=[17], data_offsets=[0, 68]) | changed}


HEADERS = {
    "huge length": header(entry(), 2**63),
    "longer than the file": header(entry(), 99_000_000),
    "deep": header(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
    "list": header(b'{"a": [1, 2]}'),
    "unknown type": header(entry(dtype="X9")),
    "negative": header(entry(shape=[-17])),
    "huge shape": header(entry(shape=[2**40, 2**40])),
    "huge empty shape": header(entry(shape=[0, 2**63], data_offsets=[0, 0])),
    "text as shape": header(entry(shape="17")),
    "beyond the end": header(entry(shape=[999], data_offsets=[0, 3996])),
    "no name": header({"": entry()["a"]}),
    "name with codes": header({"a\n\x1b[31m": entry()["a"]}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_one_line(case, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(HEADERS[case])
    refusal(path)


def test_damage_never_ends_in_a_traceback(states, tmp_path):
    """A few random bytes, where the structure of the file is."""
    sd = {k: t for k, t in states("dinov2_reg")["meta"].items() if "blocks.2" not in k}
    files = {"a.safetensors": save(sd), "b.pth": saved({"teacher": sd}),
             "c.pth": saved(sd, _use_new_zipfile_serialization=False)}
    random, outcomes = torch.Generator().manual_seed(0), set()
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        intact = load(path).state_dict()
        # Numbers are between the two ends of a file.
        places = [*range(0, 700), *range(len(content) - 700, len(content))]
        for _ in range(60):
            damaged = bytearray(content)
            for i in torch.randint(len(places), (3,), generator=random).tolist():
                damaged[places[i]] = int(torch.randint(256, (1,), generator=random))
            path.write_bytes(damaged)
            try:
                net = load(path)
            except BadWeights as e:
                assert str(path) in str(e) and "\n" not in str(e)
                outcomes.add("refused")
                continue
            # Damaged numbers cannot be told, but they are numbers, and few.
            other = [k for k, t in net.state_dict().items() if not torch.equal(t, intact[k])]
            assert len(other) <= 3 and all(t.isfinite().all() for t in net.parameters())
            outcomes.add("read")
    assert outcomes == {"refused", "read"}


@pytest.mark.parametrize("content, said", [
    ("{", "not valid JSON"),
    ("[" * 100000, "not valid JSON"),
    ("[1]", "expected JSON {"),
    ('{"image_mean": null}', "image_mean is None, expected three numbers"),
    ('{"image_mean": ["a"]}', "expected three numbers"),
    ('{"image_mean": []}', "expected three numbers")])
def test_side_files_are_read_with_care(content, said, states, tmp_path):
    save_file(states("dinov2")["hf"], tmp_path / "model.safetensors")
    side = tmp_path / "preprocessor_config.json"
    side.write_bytes(content.encode())
    message = refusal(tmp_path)
    assert "preprocessor_config.json" in message and said in message
    side.write_bytes(b"\xef\xbb\xbf" + b'{"image_mean": [0.43, 0.411, 0.296]}')
    assert load_vit(str(tmp_path))[2]["norm"] == "sat"


# ---- download

class Site(http.server.BaseHTTPRequestHandler):
    """Answers with Site.pages[path] = body, stated length or None, seconds between its bytes."""

    pages, asked = {}, []

    def do_GET(self):
        self.asked.append(self.path)
        if self.path not in self.pages:
            return self.send_error(404)
        body, length, pause = self.pages[self.path]
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        with contextlib.suppress(OSError):  # who has enough hangs up
            for part in [body[i: i + 1] for i in range(len(body))] if pause else [body]:
                self.wfile.write(part)
                time.sleep(pause)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """show(path, body, ...) -> the URL at which a local server shows it; torch's cache is elsewhere."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(Site, "pages", {})
    monkeypatch.setattr(Site, "asked", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def show(path, body, length="its own", pause=0):
            if length == "its own":
                length = len(body)
            Site.pages[path] = body, length, pause
            return f"http://127.0.0.1:{server.server_port}{path}"

        yield show
        server.shutdown()


def kept(tmp_path):
    return [f for f in (tmp_path / "cache").rglob("*") if f.is_file()]


def no_download(url, tmp_path, said):
    """The refusal of a URL, after which nothing is kept."""
    with pytest.raises(BadWeights, match=said) as e:
        load_vit(url)
    message = str(e.value)
    assert message.startswith(f"{url}: download failed (") and "\n" not in message
    assert "in a browser and pass the file" in message and "cache" not in message
    assert not kept(tmp_path)


def test_a_url_is_fetched_once(site, states, tmp_path):
    content = saved(states("dinov3")["meta"])
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    url = site(f"/a/{name}", content)
    assert torch.equal(load(url).norm.weight, states("dinov3")["meta"]["norm.weight"])
    info = load_vit(url)[2]
    assert Site.asked == [f"/a/{name}"]
    assert info["line"].endswith("as in the name") and Path(info["path"]).name == name
    assert Path(info["path"]).read_bytes() == content and len(kept(tmp_path)) == 1


def test_every_address_is_a_file_of_its_own(site, states):
    sd = states("dinov3")["meta"]
    paths = "/a/model.pth", "/b/model.pth", "/a/model.pth?v=2", "/a/model.pth?v=3", "/model.pth/"
    urls = []
    for i, path in enumerate(paths):
        urls.append(site(path, saved({k: t + i for k, t in sd.items()})))
    for _ in range(2):
        for i, url in enumerate(urls):
            assert torch.equal(load(url).norm.bias, sd["norm.bias"] + i)
    assert Site.asked == list(paths)


@pytest.mark.parametrize("path", ["/", "/..", "/%2e%2e/%2f", "/" + "a" * 300, "/a\\b:c*.pth"])
def test_no_address_leaves_the_cache(path, site, states, tmp_path):
    load(site(path, saved(states("dinov3")["meta"])))
    (file,) = kept(tmp_path)
    assert file.parent.parent == tmp_path / "cache/hub/checkpoints"


def test_what_does_not_come_whole_is_not_kept(site, states, tmp_path):
    content = saved(states("dinov3")["meta"])
    page = b"<html><body>Please log in</body></html>"
    no_download(site("/page.pth", page), tmp_path, "a web page")
    no_download(site("/cut.pth", content[:999], len(content)), tmp_path, "cut off: 999 of")
    # A server that states no length: only the file itself tells.
    no_download(site("/cut.pth", content[:9999], None), tmp_path, "truncated, 9999 bytes")
    no_download(site("/net-0123abcd.pth", content), tmp_path, "its name says 0123abcd")
    no_download(site("/empty.pth", b""), tmp_path, "0 bytes")
    no_download(site("/a.pth", content) + "x", tmp_path, "404")
    # A later try starts afresh.
    url = site("/cut.pth", content, None)
    assert torch.equal(load(url).norm.bias, states("dinov3")["meta"]["norm.bias"])


def test_a_download_has_limits(site, states, tmp_path, monkeypatch, capsys):
    content = saved(states("dinov3")["meta"])
    monkeypatch.setattr(weights, "LARGEST", len(content) - 1)
    no_download(site("/a.pth", content), tmp_path, "more than")
    no_download(site("/b.pth", content, None), tmp_path, "more than")
    no_download(site("/c.pth", b"", 10**15), tmp_path, "more than|cut off")
    monkeypatch.setattr(weights, "PATIENCE", 0.5)
    no_download(site("/silent.pth", content[:3], len(content), pause=3), tmp_path, "timed out")
    no_download(site("/slow.pth", content[:30], len(content), pause=0.1), tmp_path, "bytes in 0.5 s")
    monkeypatch.setattr(weights, "LARGEST", len(content))
    monkeypatch.setattr("data.common.SILENT", 0)
    assert load(site("/d.pth", content))
    assert "d.pth, megabytes: 1 of " in capsys.readouterr().err


@pytest.mark.parametrize("url", [
    "http://", "https://[", "http://a b/c", "http://127.0.0.1:99999999/a", "http://127.0.0.1:x/a",
    "http:///etc/passwd", "HTTP://127.0.0.1:9/a.pth", "http://127.0.0.1:9/\u00e4\n.pth"])
def test_odd_urls_are_one_line(url, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with pytest.raises(BadWeights, match="download failed"):
        load_vit(url)
    assert not kept(tmp_path)
