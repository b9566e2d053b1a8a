"""The U-Net equals segmentation-models-pytorch's, its trunk torchvision's; both kinds of file load strictly."""
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
    torch.manual_seed(0)
    net = smp.Unet("efficientnet-b4", encoder_weights=None, classes=8)
    state = {k: t.clone() for k, t in net.state_dict().items()}
    for k, t in state.items():  # statistics and scales that are not 0 and 1
        if k.endswith("running_mean"):
            t.normal_(0, 0.1)
        elif k.endswith("running_var"):
            t.uniform_(0.5, 1.5)
    net.load_state_dict(state)
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


def test_parameters_are_smps_without_the_head_convolution_it_never_runs(reference):
    head = reference.encoder._conv_head, reference.encoder._bn1
    assert count(reference) == 20_226_704 and sum(map(count, head)) == 806_400
    with torch.device("meta"):
        assert count(EfficientNetUnet(8)) == 20_226_704 - 806_400


@torch.inference_mode()
@pytest.mark.parametrize("size", [(64, 64), (128, 96), (32, 160)])
def test_logits_are_smps(reference, net, size):
    x = torch.randn(2, 3, *size)
    want = reference(x)
    assert want.std() > 1e-3
    torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_a_training_step_moves_weights_and_statistics_as_smps(reference, net, file):
    a, b = smp.Unet("efficientnet-b4", encoder_weights=None, classes=8), EfficientNetUnet(8)
    x = torch.randn(2, 3, 64, 64)
    a.load_state_dict(reference.state_dict())
    load_pretrained(b, file)
    a.encoder._drop_connect_rate = 0.0
    for m in b.modules():
        if isinstance(m, torchvision.ops.StochasticDepth):
            m.p = 0.0
    for n in (a.train(), b.train()):
        n(x).square().mean().backward()
    torch.testing.assert_close(b.encoder[0][0].weight.grad, a.encoder._conv_stem.weight.grad, rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(b.encoder[7][1].block[1][1].running_var, a.encoder._blocks[31]._bn1.running_var)
    assert not [n for n, p in b.named_parameters() if p.grad is None]


@torch.inference_mode()
def test_any_size(net):
    for size in ((1, 1), (33, 70), (224, 100)):
        assert net(torch.randn(1, 3, *size)).shape == (1, 8, *size)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(net(x[..., :40])[..., :8], net(torch.cat([x[..., :40]] + [x[..., 39:40]] * 24, 3))[..., :8])


def test_names_are_those_of_the_published_list(reference):
    assert {k: t.shape for k, t in listed("unet_efficientnet-b4_c8.smp.txt").items()} == {
        k: t.shape for k, t in reference.state_dict().items()}


@torch.inference_mode()
def test_the_trunk_is_torchvisions_and_its_arithmetic_travels_with_the_weights(net, tmp_path):
    torch.manual_seed(0)
    whole = torchvision.models.efficientnet_b4().eval()
    torch.save(whole.state_dict(), tmp_path / "b4.pth")
    a, x = EfficientNetUnet(8).eval(), torch.randn(1, 3, 64, 96)
    info = load_pretrained(a, str(tmp_path / "b4.pth"))
    assert "(not needed: classifier, head convolution)" in info["line"]
    assert info["line"].endswith("random: decoder, segmentation_head")
    assert torch.equal(a.encoder(x), whole.features[:8](x))
    for source in (a, net):  # a state dict alone is enough, also after weights of the other kind
        b = EfficientNetUnet(8).eval()
        b.load_state_dict((net if source is a else a).state_dict())
        b.load_state_dict(source.state_dict())
        assert torch.equal(b(x), source(x))
    save_file(net.state_dict(), tmp_path / "own.safetensors")
    b = EfficientNetUnet(8).eval()
    load_pretrained(b, str(tmp_path / "own.safetensors"))
    assert torch.equal(b(x), net(x))


def test_loading_says_what_it_did_and_refuses_the_rest(net, file, reference, tmp_path):
    assert net.info["line"].startswith("layout=smp, 766 of 766 tensors (not needed: head convolution)")
    other = EfficientNetUnet(3)
    assert load_pretrained(other, file)["line"].endswith("random: last convolution, 8 classes in the file and 3 here")
    encoder = {k.removeprefix("encoder."): t for k, t in reference.state_dict().items() if k.startswith("encoder.")}
    torch.save(encoder, tmp_path / "encoder.pth")
    assert load_pretrained(other, str(tmp_path / "encoder.pth"))["line"].endswith("random: decoder, segmentation_head")
    torch.save({k: t for k, t in encoder.items() if k != "_blocks.6._bn1.bias"}, tmp_path / "short.pth")
    with pytest.raises(BadWeights, match="tensor encoder.3.0.block.1.1.bias is missing"):
        load_pretrained(other, str(tmp_path / "short.pth"))
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r.pth")
    with pytest.raises(BadWeights, match="first tensors: conv1.weight"):
        load_pretrained(other, str(tmp_path / "r.pth"))
