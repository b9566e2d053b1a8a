"""The U-Net is segmentation-models-pytorch's, its trunk torchvision's; both kinds of file load."""
import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from safetensors.torch import save_file
from test_unetformer import count, listed

from models.efficientnet_unet import EfficientNetUnet, load_pretrained
from models.weights import BadWeights


@pytest.fixture(scope="module")
def reference():
    """smp's net, with statistics that are not 0 and 1."""
    torch.manual_seed(0)
    net = smp.Unet("efficientnet-b4", encoder_weights=None, classes=8)
    for name, t in net.state_dict().items():
        if name.endswith("running_mean"):
            t.normal_(0, 0.1)
        elif name.endswith("running_var"):
            t.uniform_(0.5, 1.5)
    return net.eval()


@pytest.fixture(scope="module")
def file(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("smp") / "unet.safetensors"
    save_file(reference.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def net(file):
    net = EfficientNetUnet(8)
    net.info = load_pretrained(net, file)
    return net.eval()


# ---- smp's network

def test_parameters_are_smps_without_the_head_convolution_it_never_runs(reference):
    head = count(reference.encoder._conv_head) + count(reference.encoder._bn1)
    assert count(reference) == 20_226_704
    assert head == 806_400
    with torch.device("meta"):
        assert count(EfficientNetUnet(8)) == 20_226_704 - 806_400


@torch.inference_mode()
@pytest.mark.parametrize("size", [(64, 64), (128, 96), (32, 160)])
def test_logits_are_smps(reference, net, size):
    x = torch.randn(2, 3, *size)
    want = reference(x)
    assert want.std() > 1e-3
    torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_a_training_step_moves_weights_and_statistics_as_smps(reference, file):
    theirs = smp.Unet("efficientnet-b4", encoder_weights=None, classes=8)
    theirs.load_state_dict(reference.state_dict())
    ours = EfficientNetUnet(8)
    load_pretrained(ours, file)
    # Without the random dropping of whole blocks.
    theirs.encoder._drop_connect_rate = 0.0
    for m in ours.modules():
        if isinstance(m, torchvision.ops.StochasticDepth):
            m.p = 0.0

    x = torch.randn(2, 3, 64, 64)
    theirs.train()(x).square().mean().backward()
    ours.train()(x).square().mean().backward()
    got, want = ours.encoder[0][0].weight.grad, theirs.encoder._conv_stem.weight.grad
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-5)
    got = ours.encoder[7][1].block[1][1].running_var
    torch.testing.assert_close(got, theirs.encoder._blocks[31]._bn1.running_var)
    assert not [name for name, p in ours.named_parameters() if p.grad is None]


def test_names_are_those_of_the_published_list(reference):
    want = {k: t.shape for k, t in listed("unet_efficientnet-b4_c8.smp.txt").items()}
    assert {k: t.shape for k, t in reference.state_dict().items()} == want


@torch.inference_mode()
def test_any_size(net):
    for size in ((1, 1), (33, 70), (224, 100)):
        assert net(torch.randn(1, 3, *size)).shape == (1, 8, *size)
    # Padding repeats the last column: 40 wide is as 64 wide with 24 copies of it.
    x = torch.randn(1, 3, 64, 40)
    wide = torch.cat([x, x[..., -1:].expand(1, 3, 64, 24)], 3)
    assert torch.equal(net(x), net(wide)[..., :40])


# ---- files

@torch.inference_mode()
def test_the_trunk_is_torchvisions(tmp_path):
    torch.manual_seed(0)
    whole = torchvision.models.efficientnet_b4().eval()
    torch.save(whole.state_dict(), tmp_path / "b4.pth")
    ours, x = EfficientNetUnet(8).eval(), torch.randn(1, 3, 64, 96)
    line = load_pretrained(ours, str(tmp_path / "b4.pth"))["line"]
    assert "(not needed: classifier, head convolution)" in line
    assert line.endswith("random: decoder, segmentation_head")
    assert torch.equal(ours.encoder(x), whole.features[:8](x))


@torch.inference_mode()
def test_the_arithmetic_of_the_trunk_travels_with_the_weights(net, tmp_path):
    x = torch.randn(1, 3, 64, 96)
    torchvisions = EfficientNetUnet(8).eval()
    # A state dict alone is enough, also after weights of the other kind.
    for first, second in ((net, torchvisions), (torchvisions, net)):
        copy = EfficientNetUnet(8).eval()
        copy.load_state_dict(first.state_dict())
        copy.load_state_dict(second.state_dict())
        assert torch.equal(copy(x), second(x))
    save_file(net.state_dict(), tmp_path / "own.safetensors")
    copy = EfficientNetUnet(8).eval()
    load_pretrained(copy, str(tmp_path / "own.safetensors"))
    assert torch.equal(copy(x), net(x))


def test_loading_says_what_it_did(net, file, reference, tmp_path):
    start = "layout=smp, 766 of 766 tensors (not needed: head convolution)"
    assert net.info["line"].startswith(start)
    other = EfficientNetUnet(3)
    line = load_pretrained(other, file)["line"]
    assert line.endswith("random: last convolution, 8 classes in the file and 3 here")
    torch.save(reference.encoder.state_dict(), tmp_path / "encoder.pth")
    line = load_pretrained(other, str(tmp_path / "encoder.pth"))["line"]
    assert line.endswith("random: decoder, segmentation_head")


def test_other_files_are_refused(reference, tmp_path):
    net, path = EfficientNetUnet(3), tmp_path / "file.pth"
    encoder = reference.encoder.state_dict()
    torch.save({k: t for k, t in encoder.items() if k != "_blocks.6._bn1.bias"}, path)
    with pytest.raises(BadWeights, match="tensor encoder.3.0.block.1.1.bias is missing"):
        load_pretrained(net, str(path))
    torch.save(torchvision.models.resnet18().state_dict(), path)
    with pytest.raises(BadWeights, match="first tensors: conv1.weight"):
        load_pretrained(net, str(path))
