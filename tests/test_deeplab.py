"""models/deeplab.py against torchvision's own DeepLabV3: numbers, names, files; and batch norm with one image."""
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import deeplabv3 as tv
from torchvision.models.segmentation.fcn import FCNHead

from models.deeplab import DeepLabV3, load_pretrained
from models.weights import BadWeights


def oracle(classes, stride, aux=True):  # at 8 the very network of torchvision.models.segmentation.deeplabv3_resnet50
    if stride == 8:
        return tv.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=classes, aux_loss=aux)
    trunk = resnet50(weights=None, replace_stride_with_dilation=[False, False, True])
    trunk = IntermediateLayerGetter(trunk, {"layer4": "out", "layer3": "aux"})
    return tv.DeepLabV3(trunk, tv.DeepLabHead(2048, classes, (6, 12, 18)), FCNHead(1024, classes))


def shake(net, seed=0):  # statistics and norms as after training: fresh ones hide many a mistake
    g = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.running_mean, m.bias.data):
                t.normal_(0, 0.1, generator=g)
            for t in (m.running_var, m.weight.data):
                t.uniform_(0.5, 1.5, generator=g)
    return net


def close(a, b):  # to rounding, measured on the tensor's own scale
    error = (a - b).abs().max() / b.abs().max().clamp(min=1e-6)
    assert a.shape == b.shape and error < 5e-5, f"{error:.1e} off"


@pytest.fixture(scope="module")
def pairs():
    torch.manual_seed(0)
    out = {}
    for stride in (8, 16):
        theirs, ours = shake(oracle(5, stride)), DeepLabV3(5, stride)
        ours.load_state_dict(theirs.state_dict())
        out[stride] = theirs, ours
    return out


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 65, 97, generator=torch.Generator().manual_seed(1))


def test_names_and_size_are_torchvisions():
    net = DeepLabV3(8, 8)
    assert list(net.state_dict()) == list(oracle(8, 8).state_dict())
    assert sum(p.numel() for p in net.parameters()) == 41_997_392  # WEIGHTS: torchvision with the auxiliary head
    assert sum(p.numel() for p in DeepLabV3(8, aux=False).parameters()) == 39_635_528
    with pytest.raises(ValueError, match="stride 32; expected 8 or 16"):
        DeepLabV3(8, 32)


@pytest.mark.parametrize("stride", [8, 16])
def test_eval_is_torchvisions(pairs, x, stride):
    theirs, ours = (net.eval() for net in pairs[stride])
    for size in ((65, 97), (64, 48), (1, 7)):
        part = x[..., :size[0], :size[1]]
        with torch.no_grad():
            got, want = ours(part), theirs(part)["out"]
        assert got.dtype == torch.float32 and got.shape == (2, 5, *size)
        close(got, want)
    with torch.no_grad():
        last = ours.backbone.layer4(ours.backbone.layer3(torch.zeros(1, 512, 16, 16)))  # of an image of 128 x 128
    assert last.shape[-2:] == (128 // stride, 128 // stride)


@pytest.mark.parametrize("stride", [8, 16])
def test_train_is_torchvisions_with_its_dropout_gradients_and_statistics(pairs, x, stride):
    theirs, ours = (net.train() for net in pairs[stride])
    results = []
    for net in (theirs, ours):
        torch.manual_seed(7)
        out = net(x)
        logits, aux = out if isinstance(out, tuple) else (out["out"], out["aux"])
        assert logits.shape == aux.shape == (2, 5, 65, 97)
        (logits.square().mean() + 0.4 * aux.square().mean()).backward()
        results.append([logits, aux])
    close(results[1][0], results[0][0])
    close(results[1][1], results[0][1])
    for (name, p), (other, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        close(p.grad, q.grad)
    for (name, b), (other, c) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert name == other
        close(b, c)
    for net in (theirs, ours):
        net.zero_grad()


def test_autocast_still_gives_fp32_logits(pairs, x):
    net = pairs[16][1].eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert net(x[..., :32, :32]).dtype == torch.float32


def test_one_image_is_explained_or_trains_with_frozen_statistics(x):
    net = DeepLabV3(3).train()
    with pytest.raises(ValueError, match="batch size 1 cannot train BatchNorm; use --batch-size 2 or more, or --fr"):
        net(x[:1])
    assert net.freeze_bn() is net and net.training
    before = {n: b.clone() for n, b in net.named_buffers()}
    net.eval()
    assert not any(m.training for m in net.modules())
    net.train()  # as after every validation
    logits, aux = net(x[:1])
    (logits.sum() + aux.sum()).backward()
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())
    assert net.classifier[0].convs[4][2].weight.grad.abs().sum() > 0 and net.classifier[0].project[3].training
    torch.testing.assert_close(DeepLabV3(3, aux=False).freeze_bn().train()(x[:1]).shape, (1, 3, 65, 97))


# ---- files

def poisoned(*args, **kw):
    net = DeepLabV3(*args, **kw)
    for t in net.state_dict().values():
        t.fill_(float("nan") if t.is_floating_point() else -1)
    return net


def unset(net):  # names of tensors that no file has filled
    return {n for n, t in net.state_dict().items() if (t.isnan().any() if t.is_floating_point() else (t == -1).any())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    net, file = shake(oracle(5, 8), 3), tmp_path_factory.mktemp("w") / "deeplabv3_resnet50_coco.pth"
    torch.save(net.state_dict(), file)
    return net, file


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    net, file = shake(resnet50(weights=None), 4), tmp_path_factory.mktemp("w") / "resnet50.pth"
    torch.save(net.state_dict(), file)
    return net, file


def test_a_whole_file_fills_everything(whole, x):
    net = poisoned(5, 8)
    info = load_pretrained(net, str(whole[1]))
    assert not unset(net) and info["norm"] == "imagenet" and len(info["sha256"]) == 64
    assert info["line"].startswith("layout=torchvision deeplabv3_resnet50, 370 of 370 tensors, sha256 ")
    with torch.no_grad():
        close(net.eval()(x), whole[0].eval()(x)["out"])


def test_a_trunk_fills_the_trunk_and_says_that_the_heads_are_fresh(trunk, tmp_path):
    state = trunk[0].state_dict()
    save_file(state, tmp_path / "model.safetensors")
    old = {f"module.{k}": t for k, t in state.items() if not k.endswith("num_batches_tracked")}  # before torch 0.4.1
    torch.save({"state_dict": old, "epoch": 3}, tmp_path / "old.pth")
    for file, n in ((trunk[1], 320), (tmp_path / "model.safetensors", 320), (tmp_path / "old.pth", 267)):
        net = poisoned(7)
        line = load_pretrained(net, str(file))["line"]
        assert f"resnet50, {n} of {n} tensors" in line and "not needed: classifier" in line
        assert "random: classifier, aux_classifier" in line
        empty = {n for n in unset(net) if not n.endswith("num_batches_tracked")}
        assert empty == {n for n in net.state_dict() if "classifier" in n and not n.endswith("num_batches_tracked")}
        assert torch.equal(net.backbone.layer4[2].conv3.weight, state["layer4.2.conv3.weight"])


def test_another_number_of_classes_or_heads_is_said(whole, tmp_path):
    net = poisoned(4, 16)
    assert "random: last convolution, 5 classes in the file and 4 here" in load_pretrained(net, str(whole[1]))["line"]
    assert unset(net) == {f"{a}classifier.4.{b}" for a in ("", "aux_") for b in ("weight", "bias")}
    net = poisoned(5, aux=False)
    assert "not needed: auxiliary head" in load_pretrained(net, str(whole[1]))["line"] and not unset(net)
    state = {k: t for k, t in whole[0].state_dict().items() if not k.startswith("aux")}
    torch.save(state, tmp_path / "plain.pth")
    net = poisoned(5)
    assert "random: aux_classifier" in load_pretrained(net, str(tmp_path / "plain.pth"))["line"]
    assert unset(net) == {k for k in net.state_dict() if k.startswith("aux")}


@pytest.mark.parametrize("change, said", [
    (lambda sd: sd | {"layer1.0.extra": torch.zeros(1)}, "unknown tensor backbone.layer1.0.extra"),
    (lambda sd: {k: t for k, t in sd.items() if k != "layer2.1.bn2.running_var"}, "layer2.1.bn2.running_var is mis"),
    (lambda sd: sd | {"conv1.weight": torch.zeros(64, 4, 7, 7)}, r"conv1.weight is \(64, 4, 7, 7\), expected \(64, 3"),
    (lambda sd: {k: t for k, t in sd.items() if k.startswith("layer1.0.bn")}, "neither a resnet50 nor a deeplab"),
    (lambda sd: resnet18(weights=None).state_dict(), "neither a resnet50 nor a deeplabv3_resnet50 of torchvision")])
def test_what_does_not_fit_stops_in_one_line(trunk, tmp_path, change, said):
    torch.save(dict(change(trunk[0].state_dict())), tmp_path / "f.pth")
    with pytest.raises(BadWeights, match=said) as e:
        load_pretrained(DeepLabV3(2), str(tmp_path / "f.pth"))
    assert "\n" not in str(e.value) and "f.pth" in str(e.value)


def test_weights_that_have_become_nan_are_refused(trunk, tmp_path):
    state = dict(trunk[0].state_dict())
    state["layer3.2.bn1.running_mean"] = torch.full_like(state["layer3.2.bn1.running_mean"], float("nan"))
    torch.save(state, tmp_path / "f.pth")
    with pytest.raises(BadWeights, match="f.pth: layer3.2.bn1.running_mean holds NaN"):
        load_pretrained(DeepLabV3(2), str(tmp_path / "f.pth"))


def test_the_hash_in_the_name_is_checked(trunk, tmp_path):
    (tmp_path / "resnet50-0676ba61.pth").symlink_to(trunk[1])
    with pytest.raises(BadWeights, match="its name says 0676ba61"):
        load_pretrained(DeepLabV3(2), str(tmp_path / "resnet50-0676ba61.pth"))
