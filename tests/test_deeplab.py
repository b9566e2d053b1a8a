"""models/deeplab.py against torchvision's own DeepLabV3: numbers, names, files; one image."""
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


def oracle(classes, stride, aux=True):
    """torchvision's deeplabv3_resnet50; at stride 16 the same put together from its parts."""
    if stride == 8:
        return tv.deeplabv3_resnet50(
            weights=None, weights_backbone=None, num_classes=classes, aux_loss=aux)
    trunk = resnet50(weights=None, replace_stride_with_dilation=[False, False, True])
    trunk = IntermediateLayerGetter(trunk, {"layer4": "out", "layer3": "aux"})
    return tv.DeepLabV3(trunk, tv.DeepLabHead(2048, classes, (6, 12, 18)), FCNHead(1024, classes))


def shake(net, seed=0):
    """Statistics and norms as after training: fresh ones hide many a mistake."""
    g = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1, generator=g)
            m.bias.data.normal_(0, 0.1, generator=g)
            m.running_var.uniform_(0.5, 1.5, generator=g)
            m.weight.data.uniform_(0.5, 1.5, generator=g)
    return net


def close(a, b):
    """Equal to rounding, measured on the tensor's own scale."""
    assert a.shape == b.shape
    error = (a - b).abs().max() / b.abs().max().clamp(min=1e-6)
    assert error < 5e-5, f"{error:.1e} off"


@pytest.fixture(scope="module")
def pairs():
    """Stride -> torchvision's net, and ours with its weights."""
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
    net, plain = DeepLabV3(8, 8), DeepLabV3(8, aux=False)
    assert list(net.state_dict()) == list(oracle(8, 8).state_dict())
    assert sum(p.numel() for p in net.parameters()) == 41_997_392
    assert sum(p.numel() for p in plain.parameters()) == 39_635_528
    with pytest.raises(ValueError, match="stride 32; expected 8 or 16"):
        DeepLabV3(8, 32)


@pytest.mark.parametrize("stride", [8, 16])
@torch.no_grad()
def test_eval_is_torchvisions(pairs, x, stride):
    theirs, ours = (net.eval() for net in pairs[stride])
    for H, W in ((65, 97), (64, 48), (1, 7)):
        part = x[..., :H, :W]
        got = ours(part)
        assert got.dtype == torch.float32
        assert got.shape == (2, 5, H, W)
        close(got, theirs(part)["out"])
    # layer2 of an image of 128 x 128 gives 16 x 16.
    last = ours.backbone.layer4(ours.backbone.layer3(torch.zeros(1, 512, 16, 16)))
    assert last.shape[-2:] == (128 // stride, 128 // stride)


@pytest.mark.parametrize("stride", [8, 16])
def test_train_is_torchvisions_with_its_dropout_gradients_and_statistics(pairs, x, stride):
    theirs, ours = (net.train() for net in pairs[stride])

    torch.manual_seed(7)
    want = theirs(x)
    (want["out"].square().mean() + 0.4 * want["aux"].square().mean()).backward()
    torch.manual_seed(7)
    logits, aux = ours(x)
    (logits.square().mean() + 0.4 * aux.square().mean()).backward()

    assert logits.shape == aux.shape == (2, 5, 65, 97)
    close(logits, want["out"])
    close(aux, want["aux"])
    parameters = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    for (name, p), (other, q) in parameters:
        assert name == other
        close(p.grad, q.grad)
    for (name, b), (other, c) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert name == other
        close(b, c)
    theirs.zero_grad()
    ours.zero_grad()


def test_autocast_still_gives_fp32_logits(pairs, x):
    net = pairs[16][1].eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert net(x[..., :32, :32]).dtype == torch.float32


# ---- one image

def test_one_image_cannot_train_batch_norm_and_the_message_says_what_to_do(x):
    net = DeepLabV3(3).train()
    with pytest.raises(ValueError, match="batch size 1 cannot train BatchNorm; use --batch-size 2 "
                                         "or more, or --freeze-bn"):
        net(x[:1])


def test_one_image_trains_with_frozen_statistics(x):
    net = DeepLabV3(3).train()
    assert net.freeze_bn() is net
    assert net.training
    before = {name: b.clone() for name, b in net.named_buffers()}
    # Back to train mode as after every validation.
    net.eval()
    assert not any(m.training for m in net.modules())
    net.train()
    logits, aux = net(x[:1])
    (logits.sum() + aux.sum()).backward()
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())
    aspp = net.classifier[0]
    assert aspp.convs[4][2].weight.grad.abs().sum() > 0  # the norm of the pooled branch
    assert aspp.project[3].training  # dropout
    plain = DeepLabV3(3, aux=False).freeze_bn().train()
    assert plain(x[:1]).shape == (1, 3, 65, 97)


# ---- files

def poisoned(*args, **options):
    """A net of NaN and -1, so that what no file fills can be seen."""
    net = DeepLabV3(*args, **options)
    for t in net.state_dict().values():
        t.fill_(float("nan") if t.is_floating_point() else -1)
    return net


def unset(net):
    """Names of tensors that no file has filled."""
    names = set()
    for name, t in net.state_dict().items():
        empty = t.isnan() if t.is_floating_point() else t == -1
        if empty.any():
            names.add(name)
    return names


def without_counters(names):
    return {name for name in names if not name.endswith("num_batches_tracked")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    net = shake(oracle(5, 8), 3)
    file = tmp_path_factory.mktemp("whole") / "deeplabv3_resnet50_coco.pth"
    torch.save(net.state_dict(), file)
    return net, file


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    net = shake(resnet50(weights=None), 4)
    file = tmp_path_factory.mktemp("trunk") / "resnet50.pth"
    torch.save(net.state_dict(), file)
    return net, file


def test_a_whole_file_fills_everything(whole, x):
    theirs, file = whole
    net = poisoned(5, 8)
    info = load_pretrained(net, str(file))
    assert not unset(net)
    assert info["norm"] == "imagenet"
    assert len(info["sha256"]) == 64
    start = "layout=torchvision deeplabv3_resnet50, 370 of 370 tensors, sha256 "
    assert info["line"].startswith(start)
    with torch.no_grad():
        close(net.eval()(x), theirs.eval()(x)["out"])


@pytest.mark.parametrize("form, n", [("pth", 320), ("safetensors", 320), ("old", 267)])
def test_a_trunk_fills_the_trunk_and_says_that_the_heads_are_fresh(trunk, tmp_path, form, n):
    state, file = trunk[0].state_dict(), trunk[1]
    if form == "safetensors":
        file = tmp_path / "model.safetensors"
        save_file(state, file)
    elif form == "old":
        # Before torch 0.4.1, and out of a DDP training.
        file = tmp_path / "old.pth"
        old = {f"module.{name}": state[name] for name in without_counters(state)}
        torch.save({"state_dict": old, "epoch": 3}, file)
    net = poisoned(7)
    line = load_pretrained(net, str(file))["line"]
    assert f"resnet50, {n} of {n} tensors" in line
    assert "not needed: classifier" in line
    assert "random: classifier, aux_classifier" in line
    heads = {name for name in net.state_dict() if "classifier" in name}
    assert without_counters(unset(net)) == without_counters(heads)
    assert torch.equal(net.backbone.layer4[2].conv3.weight, state["layer4.2.conv3.weight"])


def test_another_number_of_classes_is_said(whole):
    net = poisoned(4, 16)
    line = load_pretrained(net, str(whole[1]))["line"]
    assert "random: last convolution, 5 classes in the file and 4 here" in line
    assert unset(net) == {"classifier.4.weight", "classifier.4.bias",
                          "aux_classifier.4.weight", "aux_classifier.4.bias"}


def test_one_head_more_or_less_is_said(whole, tmp_path):
    theirs, file = whole
    net = poisoned(5, aux=False)
    assert "not needed: auxiliary head" in load_pretrained(net, str(file))["line"]
    assert not unset(net)
    state = {k: t for k, t in theirs.state_dict().items() if not k.startswith("aux")}
    torch.save(state, tmp_path / "plain.pth")
    net = poisoned(5)
    assert "random: aux_classifier" in load_pretrained(net, str(tmp_path / "plain.pth"))["line"]
    assert unset(net) == {name for name in net.state_dict() if name.startswith("aux")}


def extra_tensor(sd):
    return sd | {"layer1.0.extra": torch.zeros(1)}


def missing_tensor(sd):
    return {k: t for k, t in sd.items() if k != "layer2.1.bn2.running_var"}


def four_channels(sd):
    return sd | {"conv1.weight": torch.zeros(64, 4, 7, 7)}


def part_of_a_block(sd):
    return {k: t for k, t in sd.items() if k.startswith("layer1.0.bn")}


def another_resnet(sd):
    return resnet18(weights=None).state_dict()


def become_nan(sd):
    name = "layer3.2.bn1.running_mean"
    return sd | {name: torch.full_like(sd[name], float("nan"))}


@pytest.mark.parametrize("change, said", [
    (extra_tensor, "unknown tensor backbone.layer1.0.extra"),
    (missing_tensor, "layer2.1.bn2.running_var is missing"),
    (four_channels, r"conv1.weight is \(64, 4, 7, 7\), expected \(64, 3, 7, 7\)"),
    (part_of_a_block, "neither a resnet50 nor a deeplabv3_resnet50 of torchvision"),
    (another_resnet, "neither a resnet50 nor a deeplabv3_resnet50 of torchvision"),
    (become_nan, "f.pth: backbone.layer3.2.bn1.running_mean holds NaN"),
])
def test_what_does_not_fit_stops_in_one_line(trunk, tmp_path, change, said):
    torch.save(change(dict(trunk[0].state_dict())), tmp_path / "f.pth")
    with pytest.raises(BadWeights, match=said) as e:
        load_pretrained(DeepLabV3(2), str(tmp_path / "f.pth"))
    assert "\n" not in str(e.value)
    assert "f.pth" in str(e.value)


def test_the_hash_in_the_name_is_checked(trunk, tmp_path):
    (tmp_path / "resnet50-0676ba61.pth").symlink_to(trunk[1])
    with pytest.raises(BadWeights, match="its name says 0676ba61"):
        load_pretrained(DeepLabV3(2), str(tmp_path / "resnet50-0676ba61.pth"))
