"""models/nets.py: a name becomes a network, so does a run, and its parameters find their rates."""
import json

import pytest
import torch
import torchvision
from torch import nn

from data.common import BadInput
from models import nets
from models.checkpoint import save_weights
from models.vit import PRESETS, ViT, preset
from models.weights import BadWeights

TINY = preset("dinov2", 14, 64, 4, 1, registers=0, grid=3)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A DINOv2 file of a ViT of four blocks, 64 wide."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "dinov2_vitx14_pretrain.pth"
    torch.save(ViT(**TINY).state_dict() | {"mask_token": torch.zeros(1, 64)}, path)
    return path


def vit(**more):
    """A ViT of 4 blocks with a linear head on all of them."""
    spec = dict(name="vit", backbone=TINY, head="linear", taps=[0, 1, 2, 3], feat_norm=True,
                classes=3)
    return nets.build(spec | more)


def save_run(folder, net, spec, **more):
    """best.safetensors as far as load_run() needs it."""
    save_weights(folder / "best.safetensors", net.state_dict(),
                 dict(model=spec, saved="all") | more)
    return folder


# ---- name -> network -> run -> network

@pytest.mark.parametrize("model", ["vit", "deeplabv3-os8", "unetformer", "effunet"])
def test_a_run_gives_the_network_back(tmp_path, model):
    net, spec, info = nets.make(model, 5)
    assert info["sha256"] is None and info["norm"] == "imagenet" and "RANDOM" in info["line"]
    assert json.loads(json.dumps(spec)) == spec  # plain JSON
    save_run(tmp_path, net, spec)
    again, meta = nets.load_run(tmp_path)
    assert meta["model"] == spec and not again.training
    x = torch.randn(2, 3, 40, 72)
    with torch.no_grad():
        logits = again(x)
        assert logits.shape == (2, 5, 40, 72) and torch.equal(logits, net.eval()(x))


@pytest.mark.parametrize("model", ["vit", *nets.NETS])
def test_build_makes_what_make_made(model):
    with torch.device("meta"):  # names and shapes, without the numbers
        net, spec, _ = nets.make(model, 5)
        again = nets.build(json.loads(json.dumps(spec)))
    shapes = {name: t.shape for name, t in net.state_dict().items()}
    assert shapes == {name: t.shape for name, t in again.state_dict().items()}


@pytest.mark.parametrize("model, stride", [("deeplabv3", 16), ("deeplabv3-os8", 8)])
def test_deeplab_has_two_output_strides(model, stride):
    net, spec, _ = nets.make(model, 3)
    assert spec == dict(name="deeplabv3", classes=3, options=dict(output_stride=stride))
    maps = []
    net.backbone.layer4.register_forward_hook(lambda layer, x, out: maps.append(out))
    with torch.no_grad():
        net.eval()(torch.randn(1, 3, 64, 64))
    assert maps[0].shape[-2:] == (64 // stride, 64 // stride)


def test_weights_fill_the_backbone_and_nothing_else(file):
    net, spec, info = nets.make("vit", 3, str(file), head="linear")
    state = torch.load(file)
    assert all(torch.equal(t, state[name]) for name, t in net.backbone.state_dict().items())
    assert spec["backbone"] == TINY and spec["taps"] == [0, 1, 2, 3] and spec["feat_norm"]
    about = nets.about(info)["weights"]
    assert about["path"] == str(file.resolve()) and len(about["sha256"]) == 64
    assert nets.about(nets.SCRATCH) == dict(weights=dict(path=None, sha256=None))


def test_a_cnn_takes_the_file_of_its_trunk(tmp_path):
    trunk = torchvision.models.resnet18()
    torch.save(trunk.state_dict(), tmp_path / "resnet18.pth")
    net, _, info = nets.make("unetformer", 3, str(tmp_path / "resnet18.pth"))
    mine = [t for name, t in net.named_parameters() if not name.startswith("decoder.")]
    theirs = [t for name, t in trunk.named_parameters() if not name.startswith("fc.")]
    assert sum(t.sum().item() for t in mine) == pytest.approx(sum(t.sum().item() for t in theirs))
    assert "random: decoder" in info["line"]


@pytest.mark.parametrize("model", ["deeplabv3", "unetformer", "effunet"])
def test_a_cnn_is_found_in_a_training_checkpoint(model, tmp_path):
    theirs = nets.make(model, 3)[0].half().state_dict()
    student = {f"net.{name}": torch.zeros_like(t) for name, t in theirs.items()}
    average = {f"module._orig_mod.{name}": t for name, t in theirs.items()}
    content = {"state_dict": student, "swa": average | {"n_averaged": torch.tensor(9)}, "epoch": 3}
    torch.save(content, tmp_path / "last.ckpt")
    net, _, info = nets.make(model, 3, str(tmp_path / "last.ckpt"))
    assert all(torch.equal(t, theirs[name].to(t.dtype)) for name, t in net.state_dict().items())
    said = "taken: swa.module._orig_mod, left out: state_dict, swa.n_averaged,"
    assert f"{len(theirs)} of {2 * len(theirs) + 1} tensors" in info["line"] and said in info["line"]


def resnet18_of_another_trainer(path):
    """A file of a ResNet under a prefix, beside other modules -> the ResNet."""
    trunk = torchvision.models.resnet18()
    content = {f"backbone.module.{name}": t for name, t in trunk.state_dict().items()}
    content["backbone.projector.0.weight"] = content["decode_head.conv.weight"] = torch.zeros(1)
    torch.save({"state_dict": content}, path)
    return trunk


def test_a_trunk_is_found_beside_other_modules(tmp_path):
    path = str(tmp_path / "mm.pth")
    trunk = resnet18_of_another_trainer(path)
    said = "taken: state_dict.backbone.module, left out: state_dict.backbone.projector, "
    net, _, info = nets.make("unetformer", 3, path)
    assert torch.equal(net.backbone.layer4[1].conv2.weight, trunk.layer4[1].conv2.weight)
    assert said in info["line"] and "random: decoder" in info["line"]
    _, state, info = nets.load_trunk(path, "nano8", "resnet18")
    net = nets.make_classifier(dict(name="cnn", cnn="resnet18", stem="imagenet", classes=3), state, info)
    assert torch.equal(net.layer4[1].conv2.weight, trunk.layer4[1].conv2.weight)
    assert torch.equal(net.bn1.running_var, trunk.bn1.running_var) and said in info["line"]
    torch.save({"a": dict(trunk.state_dict()), "b": {k: t + 1 for k, t in trunk.state_dict().items()}}, path)
    for load in (lambda: nets.make("unetformer", 3, path), lambda: nets.load_trunk(path, "nano8", "resnet18")):
        with pytest.raises(BadWeights, match="several networks: a., b."):
            load()


# ---- specs of earlier versions

def moves(net, change):
    """Do the logits move when change() has altered some weights?"""
    x = torch.randn(1, 3, 28, 42)
    with torch.no_grad():
        before = net.eval()(x)
        change()
        return not torch.equal(net(x), before)


@pytest.mark.parametrize("feat_norm", [True, False])
def test_the_final_norm_is_on_the_maps_unless_an_old_run_says_no(feat_norm):
    net = vit(feat_norm=feat_norm)
    assert moves(net, lambda: net.backbone.norm.weight.mul_(2)) == feat_norm


def test_an_old_run_may_read_blocks_of_its_own():
    net = vit(taps=[0, 2])
    assert net.head.out.weight.shape[1] == 2 * 64
    assert not moves(net, lambda: net.backbone.blocks[3].attn.proj.weight.mul_(2))
    assert moves(net, lambda: net.backbone.blocks[2].attn.proj.weight.mul_(2))


def test_the_fpn_head_of_runs_before_it_saw_the_image(tmp_path):
    """Such a spec has no version; its tensors are those of the head that is called tokens now."""
    old = dict(name="vit", backbone=TINY, head="fpn", taps=[0, 1, 2, 3], feat_norm=True, classes=3)
    torch.manual_seed(0)
    now = nets.build(old | dict(head="tokens", version=2)).eval()
    again, _ = nets.load_run(save_run(tmp_path, now, old))
    x = torch.randn(1, 3, 28, 42)
    with torch.no_grad():
        assert torch.equal(again(x), now(x))
    shapes = {name: list(t.shape) for name, t in again.head.state_dict().items()}
    assert shapes["fuse.0.weight"] == [128, 4 * 64, 1, 1] and shapes["rise.0.weight"] == [512, 128, 1, 1]
    assert shapes["rise.5.weight"] == [3, 32, 1, 1] and len(shapes) == 18


def test_old_specs_load_from_files(tmp_path):
    old = dict(name="vit", backbone=TINY, head="linear", taps=[1, 3], feat_norm=False, classes=3)
    net = nets.build(old)
    again, meta = nets.load_run(save_run(tmp_path, net, old))
    assert meta["model"] == old and not moves(again, lambda: again.backbone.norm.weight.mul_(2))


# ---- what load_run refuses

def test_a_head_alone_finds_its_backbone(tmp_path, file):
    net, spec, info = nets.make("vit", 3, str(file), head="linear")
    heads = {name: t for name, t in net.state_dict().items() if name.startswith("head.")}
    meta = dict(model=spec, saved="head") | nets.about(info)
    save_weights(tmp_path / "best.safetensors", heads, meta)
    x = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        want = net.eval()(x)
        assert torch.equal(nets.load_run(tmp_path)[0](x), want)
        moved = tmp_path / "dinov2_elsewhere.pth"
        moved.write_bytes(file.read_bytes())
        assert torch.equal(nets.load_run(tmp_path, str(moved))[0](x), want)
    other = torch.load(file)
    other["norm.bias"] += 1
    torch.save(other, moved)
    with pytest.raises(BadWeights, match="not the backbone this head was trained on") as e:
        nets.load_run(tmp_path, str(moved))
    assert info["sha256"][:8] in str(e.value) and "\n" not in str(e.value)
    meta["weights"]["path"] = str(tmp_path / "gone.pth")
    save_weights(tmp_path / "best.safetensors", heads, meta)
    with pytest.raises(BadWeights, match="gone.pth"):
        nets.load_run(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_run_with_numbers_that_are_none_is_refused(tmp_path, bad):
    net, spec, _ = nets.make("vit", 3)
    for name in ("head.out.weight", "backbone.blocks.1.attn.qkv.bias"):
        net = nets.build(spec)
        with torch.no_grad():
            if name.startswith("head"):
                name = [n for n, _ in net.named_parameters() if n.startswith("head")][-1]
            net.get_parameter(name).view(-1)[0] = bad
        with pytest.raises(BadWeights, match=f"{name} holds NaN or infinity") as e:
            nets.load_run(save_run(tmp_path, net, spec))
        assert str(tmp_path) in str(e.value)


def test_a_url_in_a_file_is_not_fetched(tmp_path, file, monkeypatch):
    asked = []
    monkeypatch.setattr("urllib.request.OpenerDirector.open", lambda *a, **k: asked.append(a) or 1 / 0)
    net, spec, info = nets.make("vit", 3, str(file), head="linear")
    heads = {name: t for name, t in net.state_dict().items() if name.startswith("head.")}
    url = "https://example.com/backbone.pth"
    meta = dict(model=spec, saved="head", weights=dict(path=url, sha256=info["sha256"]))
    save_weights(tmp_path / "best.safetensors", heads, meta)
    with pytest.raises(BadWeights, match=f"type --weights '{url}'"):
        nets.load_run(tmp_path)
    assert not asked
    assert torch.equal(nets.load_run(tmp_path, str(file))[0].backbone.cls_token, net.backbone.cls_token)
    with pytest.raises(ZeroDivisionError):  # typed, it is
        nets.load_run(tmp_path, url)
    assert len(asked) == 1


SEGMENTER = dict(name="vit", backbone=TINY, head="linear", taps=[0, 1, 2, 3], feat_norm=True, classes=3)
KNN = dict(name="vit", features="cls", classes=5, backbone=TINY, bank=7, k=3, temperature=0.1)
LIES = [  # a spec of a run, what its header says instead, words of the refusal
    (SEGMENTER, dict(backbone=TINY | dict(depth=10**6)), "backbone is"),
    (SEGMENTER, dict(backbone=TINY | dict(dim=10**5)), "backbone is"),
    (SEGMENTER, dict(backbone=TINY | dict(heads=0)), "modulo"),
    (SEGMENTER, dict(backbone=TINY | dict(heads=7)), "backbone is"),
    (SEGMENTER, dict(backbone=TINY | dict(more=1)), "backbone is"),
    (SEGMENTER, dict(backbone=TINY | dict(family="x")), "backbone is"),
    (SEGMENTER, dict(backbone=None), "header does not fit"),
    (SEGMENTER, dict(backbone={}), "'heads'"),
    (SEGMENTER, dict(classes=10**9), "classes is 1000000000"),
    (SEGMENTER, dict(classes="3"), "classes is 3"),
    (SEGMENTER, dict(classes=2), "head.out"),
    (SEGMENTER, dict(head="x"), "head is x"),
    (SEGMENTER, dict(feat_norm="inf"), "feat_norm is inf"),
    (SEGMENTER, dict(feat_norm=1), "feat_norm is 1"),
    (SEGMENTER, dict(classes=True), "classes is True"),
    (SEGMENTER, dict(strange=1), "'strange' is unknown"),
    (SEGMENTER, dict(version=99), "version is 99"),
    (SEGMENTER, dict(head="fpn"), "missing"),
    (SEGMENTER, dict(taps=[0, 1, 2, 4]), "taps is"),
    (SEGMENTER, dict(taps=[3, 2, 1, 0]), "taps is"),
    (SEGMENTER, dict(taps=[0] * 10**4), "taps is"),
    (SEGMENTER, dict(taps=[]), "taps is"),
    (SEGMENTER, dict(taps=None), "header does not fit"),
    (SEGMENTER, dict(name="resnet"), "'resnet'"),
    (SEGMENTER, dict(name=["vit"]), "header does not fit"),
    (SEGMENTER, dict(name="cnn", cnn="get_model_weights", stem="small"), "cnn is get_model_weights"),
    (SEGMENTER, dict(name="deeplabv3", options=dict(output_stride=16, aux=False)), "options is"),
    (KNN, dict(bank=10**12), "bank is"),
    (KNN, dict(k=0), "k is 0"),
    (KNN, dict(k="3"), "k is 3"),
    (KNN, dict(temperature=0), "temperature is 0"),
    (KNN, dict(classes=2), "classes is 2"),
    (KNN, dict(features="all"), "features is all"),
]


@pytest.mark.parametrize("spec, lie, said", LIES)
def test_a_header_that_lies_builds_nothing(tmp_path, spec, lie, said):
    net, task = nets.build(spec), "classification" if "bank" in spec else None
    if task:
        net.head.labels.copy_(torch.arange(7) % 5)
    nets.load_run(save_run(tmp_path, net, spec, task=task), task=task)
    run = save_run(tmp_path, net, spec | lie, task=task)
    with pytest.raises(BadWeights, match=said) as e:
        nets.load_run(run, task=task)
    assert str(e.value).startswith(str(tmp_path)) and "\n" not in str(e.value)


def test_a_run_of_the_other_kind_is_refused(tmp_path):
    seg, cls = tmp_path / "seg", tmp_path / "cls"
    spec = dict(name="mean", features="mean", classes=3)
    save_run(cls, nets.build(spec), spec, task="classification")
    save_run(seg, vit(), dict(name="vit", backbone=TINY, head="linear", taps=[0, 1, 2, 3],
                              feat_norm=True, classes=3))
    assert nets.load_run(cls, task="classification")[1]["task"] == "classification"
    for run, task in ((cls, None), (seg, "classification")):
        with pytest.raises(BadWeights, match="of another kind"):
            nets.load_run(run, task=task)


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    spec = dict(name="vit", backbone=TINY, head="linear", taps=[0, 1, 2, 3], feat_norm=True,
                classes=4)
    with pytest.raises(BadWeights, match="head.out"):
        nets.load_run(save_run(tmp_path, vit(), spec))


# ---- classifiers

@pytest.mark.parametrize("spec", [
    dict(name="cnn", cnn="nano", stem="small", classes=5),
    dict(name="cnn", cnn="resnet18", stem="imagenet", classes=5),
    dict(name="vit", features="cls", classes=5, backbone=TINY),
    dict(name="vit", features="cls+patch", classes=5, backbone=TINY),
    dict(name="vit", features="cls+patch", classes=5, backbone=TINY, bank=7, k=3, temperature=0.1),
    dict(name="mean", features="mean", classes=5),
    dict(name="mean", features="mean", classes=5, bank=7, k=3, temperature=0.1)])
def test_every_classifier_builds_and_loads(tmp_path, spec):
    net = nets.build(spec)
    run = save_run(tmp_path, net, spec, task="classification")
    again, _ = nets.load_run(run, task="classification")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert again(x).shape == (2, 5) and torch.equal(again(x), net.eval()(x))


def test_a_classifier_gets_its_trunk_and_keeps_its_head_random(tmp_path, file):
    backbone, state, info = nets.load_trunk(str(file), "nano8")
    assert backbone == TINY and info["size"] == 224
    spec = dict(name="vit", features="cls", classes=3, backbone=backbone)
    net = nets.make_classifier(spec, state, info)
    assert all(torch.equal(t, state[name]) for name, t in net.backbone.state_dict().items())
    trunk = torchvision.models.resnet18()
    torch.save(trunk.state_dict(), tmp_path / "resnet18.pth")
    _, state, info = nets.load_trunk(str(tmp_path / "resnet18.pth"), "nano8", "resnet18")
    spec = dict(name="cnn", cnn="resnet18", stem="imagenet", classes=3)
    net = nets.make_classifier(spec, state, info)
    assert torch.equal(net.layer4[1].conv2.weight, trunk.layer4[1].conv2.weight)
    assert net.fc.weight.shape == (3, 512)
    want = PRESETS["mini8"], None, nets.SCRATCH | dict(size=None)
    assert nets.load_trunk("none", "mini8") == want
    with pytest.raises(BadInput, match="--cnn resnet18 or resnet50"):
        nets.load_trunk(str(file), "nano8", "nano")


@pytest.mark.parametrize("named", [".", "best.safetensors"])  # the folder, or the file in it
def test_weights_that_are_a_run_know_its_size_and_normalisation(tmp_path, named):
    spec = dict(name="vit", features="cls", classes=3, backbone=PRESETS["nano16"])
    save_run(tmp_path, nets.build(spec), spec, task="classification", size=64, norm="sat",
             weights=dict(path=None, sha256=None))
    backbone, _, info = nets.load_trunk(str(tmp_path / named), "nano8")
    assert backbone == PRESETS["nano16"]
    assert (info["size"], info["norm"]) == (64, "sat")


# ---- what trains

def trains(net):
    return {name for name, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("blocks, parts, frozen", [
    ("0", (), True),
    ("1", ("blocks.3.", "norm."), False),
    ("2", ("blocks.2.", "blocks.3.", "norm."), False),
    ("4", ("blocks.", "norm."), False),
    ("all", ("",), False)])
def test_unfreeze_trains_the_head_and_the_last_blocks(blocks, parts, frozen):
    net = vit()
    assert nets.unfreeze(net, blocks) == frozen
    names = {name for name, _ in net.backbone.named_parameters() if name.startswith(parts)}
    names = {f"backbone.{name}" for name in names}
    assert trains(net) == names | {"head.out.weight", "head.out.bias"}
    net = nets.build(dict(name="vit", features="cls", classes=3, backbone=TINY))
    assert nets.unfreeze(net, blocks) == frozen
    assert trains(net) == names | {"head.weight", "head.bias"}
    with pytest.raises(BadInput, match="--unfreeze 5: the backbone has 4 blocks; type --unfreeze all"):
        nets.unfreeze(net, "5")


def test_blocks_behind_the_last_tap_never_train():
    net = vit(taps=[0, 2])
    nets.unfreeze(net, "1")
    blocks = {name.split(".")[2] for name in trains(net) if name.startswith("backbone.blocks.")}
    assert blocks == {"2"}


def test_a_cnn_always_trains():
    net, _, _ = nets.make("unetformer", 3)
    for blocks in ("0", "all"):
        assert not nets.unfreeze(net, blocks)
        assert len(trains(net)) == len(list(net.parameters()))


def test_deeplab_alone_can_freeze_its_statistics():
    net, _, _ = nets.make("deeplabv3", 3)
    assert nets.freeze_bn(net.train())
    before = {name: t.clone() for name, t in net.named_buffers()}
    logits = net(torch.randn(1, 3, 32, 32))[0]  # a batch of one
    logits.sum().backward()
    assert all(torch.equal(t, before[name]) for name, t in net.named_buffers())
    assert net.backbone.conv1.weight.grad.abs().sum() > 0
    assert not nets.freeze_bn(vit())


# ---- rates and decay

def groups_by_name(net, **how):
    """{parameter: (scale, decay)} of the groups; each trainable one stands in exactly one group."""
    rates = dict(lr=1e-2, backbone_lr=1e-3, layer_decay=1.0, weight_decay=0.05) | how
    names = {id(p): name for name, p in net.named_parameters()}
    found = {}
    for group in nets.param_groups(net, **rates):
        for p in group["params"]:
            assert names[id(p)] not in found and p.requires_grad
            found[names[id(p)]] = group["scale"], group["weight_decay"]
    assert found.keys() == trains(net)
    return found


def test_rates_of_a_vit_fall_by_block_from_the_last_one():
    found = groups_by_name(vit(), layer_decay=0.5)
    want = {"head.out.weight": 1.0, "backbone.norm.weight": 0.1,
            "backbone.blocks.3.attn.qkv.weight": 0.1,
            "backbone.blocks.2.mlp.fc1.weight": 0.05, "backbone.blocks.0.norm1.bias": 0.0125,
            "backbone.patch_embed.proj.weight": 0.00625, "backbone.cls_token": 0.00625,
            "backbone.pos_embed": 0.00625}
    assert {name: found[name][0] for name in want} == pytest.approx(want)
    scales = sorted({scale for scale, _ in found.values()})
    assert scales == pytest.approx([0.00625, 0.0125, 0.025, 0.05, 0.1, 1])


def test_matrices_decay_and_nothing_else():
    for net in (vit(), nets.make("unetformer", 3)[0], nets.build(dict(
            name="cnn", cnn="nano", stem="small", classes=3))):
        for name, (_, decay) in groups_by_name(net).items():
            p = net.get_parameter(name)
            is_token = name in ("backbone.cls_token", "backbone.pos_embed")
            assert decay == (0.05 if p.ndim >= 2 and not is_token else 0.0), name


def test_frozen_parameters_are_in_no_group():
    net = vit()
    nets.unfreeze(net, "1")
    found = groups_by_name(net, layer_decay=0.5)
    assert not any(name.startswith(("backbone.blocks.0", "backbone.patch")) for name in found)


TRUNK_SIZE = {  # as torchvision counts them, without what classifies
    "deeplabv3": torchvision.models.resnet50, "unetformer": torchvision.models.resnet18,
    "effunet": torchvision.models.efficientnet_b4}


@pytest.mark.parametrize("model", nets.NETS)
def test_the_trunk_of_a_cnn_has_the_rate_of_a_backbone(model):
    with torch.device("meta"):
        net, _, _ = nets.make(model, 3)
        published = TRUNK_SIZE.get(model.removesuffix("-os8"))
        if published:
            published = published()
    found = groups_by_name(net, layer_decay=0.5)  # CNNs have no blocks to count
    slow = {name for name, (scale, _) in found.items() if scale == pytest.approx(0.1)}
    assert {scale for name, (scale, _) in found.items() if name not in slow} == {1.0}
    heads = ("decoder.", "classifier.", "aux_classifier.", "segmentation_head.")
    assert found.keys() - slow == {name for name in found if name.startswith(heads)}
    if published:
        left_out = ("fc.", "classifier.", "features.8.")  # smp's decoder reads no head convolution
        names = [name for name, _ in published.named_parameters() if not name.startswith(left_out)]
        want = sum(published.get_parameter(name).numel() for name in names)
        assert sum(net.get_parameter(name).numel() for name in slow) == want


def test_the_trunk_of_a_classifying_cnn_too():
    for name in ("nano", "resnet18"):
        net = nets.build(dict(name="cnn", cnn=name, stem="small", classes=3))
        fast = {name for name, (scale, _) in groups_by_name(net).items() if scale == 1.0}
        assert fast == {"fc.weight", "fc.bias"}


def test_an_optimiser_takes_the_groups():
    net = vit()
    opt = torch.optim.AdamW(nets.param_groups(net, 1e-2, 1e-3, 0.5, 0.05), lr=1e-2)
    net(torch.randn(1, 3, 14, 14)).sum().backward()
    opt.step()


# ---- words

def test_norms_are_chosen_and_never_guessed():
    known, unknown = dict(norm="sat"), dict(norm=None, line="layout=meta", path="a.pth")
    assert nets.choose_norm("auto", known) == "sat"
    for info in (known, unknown):
        assert nets.choose_norm("imagenet", info) == "imagenet"
    with pytest.raises(BadInput, match="type --norm imagenet .* --norm sat"):
        nets.choose_norm("auto", unknown)
    for lie in ("mars", [], {"a": 1}, 3):
        with pytest.raises(BadInput, match="a.pth: normalisation .*; type --norm imagenet or sat"):
            nets.choose_norm("auto", dict(norm=lie, path="a.pth"))


@pytest.mark.parametrize("spec, name", [
    (dict(name="cnn", cnn="resnet18"), "resnet18"),
    (dict(name="mean", features="mean"), "channel means"),
    (dict(name="unetformer"), "unetformer"),
    (dict(name="vit", backbone=PRESETS["nano16"], head="fpn"), "nano16 + fpn"),
    (dict(name="vit", backbone=PRESETS["dinov3_vitl16"], features="cls"), "dinov3_vitl16")])
def test_a_network_is_named(spec, name):
    assert nets.name_of(spec) == name


def test_sizes_are_counted():
    net = nn.Sequential(nn.Linear(1000, 300), nn.Linear(300, 100))
    net[0].requires_grad_(False)
    assert nets.size_line(net, scratch=False) == "0.03 M of 0.33 M parameters train"
    assert nets.size_line(net, scratch=True).endswith("train, THE OTHERS STAY RANDOM")
    net.requires_grad_(True)
    assert nets.size_line(net, scratch=True).endswith("parameters train")
