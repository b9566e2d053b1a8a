"""models/heads.py: any size in, the same size out, and pixels stay where they are."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetHead

from models.heads import HEADS, Fpn, Linear, Segmenter, UperNet


class Pooled(nn.Module):
    """A backbone whose only map is the input, averaged over patches, and whose parameter does nothing."""

    def __init__(self, patch=4):
        super().__init__()
        self.patch, self.one = patch, nn.Parameter(torch.ones(1))

    def forward(self, x, taps, norm):
        H, W = x.shape[-2:]
        x = F.pad(x, (0, -W % self.patch, 0, -H % self.patch))
        return [F.avg_pool2d(x, self.patch) * self.one for _ in taps], None


@pytest.mark.parametrize("make", HEADS.values())
@pytest.mark.parametrize("patch", [8, 14, 16])
@pytest.mark.parametrize("h, w", [(1, 1), (3, 5)])
def test_every_head_trains_on_one_image_of_any_size(make, patch, h, w):
    head = make(32, 4, 5, patch)
    out = head([torch.randn(1, 32, h, w) for _ in range(4)], torch.randn(1, 3, patch * h, patch * w))
    assert out.shape[:2] == (1, 5) and out.shape[2] * w == out.shape[3] * h
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("name, patch", [("linear", 16), ("fpn", 14), ("fpn", 16)])
def test_logits_have_the_size_of_the_input(name, patch):
    net = Segmenter(Pooled(patch), HEADS[name](3, 2, 5, patch), [0, 1]).eval()
    for extra in range(1, 41):
        out = net(torch.randn(2, 3, 16 + extra, 57 - extra))
        assert out.shape == (2, 5, 16 + extra, 57 - extra) and out.dtype == torch.float32


@pytest.mark.parametrize("H, W", [(64, 64), (61, 75), (50, 63)])
def test_logits_lie_where_the_pixels_are(H, W):
    net = Segmenter(Pooled(8), Linear(3, 1, 1, 8), [0])
    with torch.no_grad():
        net.head.out.weight.copy_(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1))
        net.head.out.bias.zero_()
        for top, left, limit in ((16, 24, 0.1), (24, 16, 0.1), (20, 27, 4), (29, 33, 4)):  # on the patch grid; off it
            x = torch.zeros(1, 3, H, W)
            x[..., top:top + 16, left:left + 16] = 1
            z = net(x)[0, 0]
            y, x = ((z.sum(1 - i) * torch.arange(n)).sum() / z.sum() for i, n in enumerate((H, W)))
            assert abs(y - top - 7.5) < limit and abs(x - left - 7.5) < limit


@torch.no_grad()
def symmetrical(head):
    """The head with each kernel replaced by the mean over its mirror images: nothing in it prefers a side."""
    for layer in head.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            w = layer.weight
            w.copy_((w + w.flip(2) + w.flip(3) + w.flip(2, 3)) / 4)
        if isinstance(layer, nn.Sequential) and isinstance(layer[1], nn.PixelShuffle):
            n = layer[1].upscale_factor ** 2  # channels that become the pixels of one place: all alike
            for w in (layer[0].weight, layer[0].bias):
                w.copy_(w.unflatten(0, (-1, n)).mean(1).repeat_interleave(n, dim=0))
    return head


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("patch", [8, 14, 16])
@pytest.mark.parametrize("flip", [2, 3])
def test_no_head_moves_the_map_by_a_fraction_of_a_pixel(name, patch, flip):
    """Mirrored maps and image give the mirrored logits, unless a layer lies off its pixels to one side."""
    torch.manual_seed(0)
    net = Segmenter(Pooled(patch), symmetrical(HEADS[name](3, 4, 5, patch)), [0, 1, 2, 3]).double().eval()
    x = torch.randn(1, 3, 3 * patch, 5 * patch, dtype=torch.double)
    torch.testing.assert_close(net(x.flip(flip)), net(x).flip(flip))


def test_the_fpn_head_reads_the_image():
    torch.manual_seed(0)
    head = Fpn(8, 1, 3, patch=16).eval()
    maps, image = [torch.zeros(1, 8, 4, 4)], torch.zeros(1, 3, 64, 64)
    image[..., 30, 20] = 1  # far finer than a token
    moved = (head(maps, image) - head(maps, torch.zeros_like(image))).abs().sum(1)[0]
    row, column = divmod(moved.argmax().item(), moved.shape[1])
    assert abs(2 * row + 0.5 - 30) <= 3 and abs(2 * column + 0.5 - 20) <= 3


@pytest.mark.parametrize("patch, scales", [(8, (2, 1, 0.5, 0.25)), (16, (4, 2, 1, 0.5))])
def test_upernet_is_transformers_with_other_norms(patch, scales):
    """The same weights in the order of the layers give the same logits."""
    torch.manual_seed(0)
    ours = UperNet(64, 4, 7, patch, width=32).eval()
    theirs = UperNetHead(UperNetConfig(hidden_size=32, pool_scales=[1, 2, 3, 6], num_labels=7), [64] * 4).eval()
    for module in [m for m in theirs.modules() if hasattr(m, "batch_norm")]:
        module.batch_norm = nn.GroupNorm(32, 32)
    theirs = dict(pools=theirs.psp_modules, bottleneck=theirs.bottleneck, lateral=theirs.lateral_convs,
                  smooth=theirs.fpn_convs, join=theirs.fpn_bottleneck, out=theirs.classifier, whole=theirs)
    for name, part in theirs.items():
        if name != "whole":
            mine = getattr(ours, "pooled" if name == "pools" else name)
            tensors = list(mine.state_dict().values())
            part.load_state_dict(dict(zip(part.state_dict(), tensors, strict=True)))
    maps = [torch.randn(2, 64, 8, 12) for _ in range(4)]
    strides = [F.interpolate(m, scale_factor=s, mode="bilinear") for m, s in zip(maps, scales)]
    with torch.no_grad():
        torch.testing.assert_close(ours(maps, None), theirs["whole"](strides), rtol=1e-5, atol=1e-5)


def test_a_frozen_backbone_stays_in_eval_and_gets_no_gradient():
    net = Segmenter(Pooled(), HEADS["linear"](3, 1, 5, 4), [0])
    assert net.train().backbone.training
    net.backbone.requires_grad_(False)
    assert not net.train().backbone.training and net.head.training and not net.eval().head.training
    net(torch.randn(1, 3, 9, 9)).sum().backward()
    assert net.backbone.one.grad is None and net.head.out.weight.grad is not None
