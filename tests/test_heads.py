"""models/heads.py: any size in, the same size out, and pixels stay where they are."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.heads import HEADS, Linear, Segmenter


class Pooled(nn.Module):
    """A backbone whose only map is the input, averaged over patches, and whose parameter does nothing."""

    def __init__(self, patch=4):
        super().__init__()
        self.patch, self.one = patch, nn.Parameter(torch.ones(1))

    def forward(self, x, taps, norm):
        H, W = x.shape[-2:]
        x = F.pad(x, (0, -W % self.patch, 0, -H % self.patch))
        return [F.avg_pool2d(x, self.patch) * self.one for _ in taps], None


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("h, w", [(1, 1), (3, 5)])
def test_every_head_trains_on_one_image_of_any_size(name, h, w):
    head = HEADS[name](32, 4, 5)
    out = head([torch.randn(1, 32, h, w) for _ in range(4)])
    assert out.shape[:2] == (1, 5) and out.shape[2] * w == out.shape[3] * h
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("name", ["linear", "fpn"])
def test_logits_have_the_size_of_the_input(name):
    net = Segmenter(Pooled(16), HEADS[name](3, 2, 5), [0, 1]).eval()
    for extra in range(1, 41):
        out = net(torch.randn(2, 3, 16 + extra, 57 - extra))
        assert out.shape == (2, 5, 16 + extra, 57 - extra) and out.dtype == torch.float32


@pytest.mark.parametrize("H, W", [(64, 64), (61, 75), (50, 63)])
def test_logits_lie_where_the_pixels_are(H, W):
    net = Segmenter(Pooled(8), Linear(3, 1, 1), [0])
    with torch.no_grad():
        net.head.out.weight.copy_(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1))
        net.head.out.bias.zero_()
        for top, left, limit in ((16, 24, 0.1), (24, 16, 0.1), (20, 27, 4), (29, 33, 4)):  # on the patch grid; off it
            x = torch.zeros(1, 3, H, W)
            x[..., top:top + 16, left:left + 16] = 1
            z = net(x)[0, 0]
            y, x = ((z.sum(1 - i) * torch.arange(n)).sum() / z.sum() for i, n in enumerate((H, W)))
            assert abs(y - top - 7.5) < limit and abs(x - left - 7.5) < limit


def test_a_frozen_backbone_stays_in_eval_and_gets_no_gradient():
    net = Segmenter(Pooled(), HEADS["linear"](3, 1, 5), [0])
    assert net.train().backbone.training
    net.backbone.requires_grad_(False)
    assert not net.train().backbone.training and net.head.training and not net.eval().head.training
    net(torch.randn(1, 3, 9, 9)).sum().backward()
    assert net.backbone.one.grad is None and net.head.out.weight.grad is not None
