"""data/tiles.py: windows cover every pixel, and blending does not show."""
import numpy as np
import pytest
import torch
from torch import nn

import train_seg
from data.tiles import blend_weight, windows


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.9])
def test_windows_cover_every_pixel_and_stay_inside(overlap):
    for H, W in ((1, 1), (31, 33), (32, 32), (64, 65), (100, 47), (5, 200)):
        boxes, seen = windows(H, W, 32, overlap), np.zeros((H, W), int)
        for t, l, h, w in boxes:
            assert (h, w) == (min(H, 32), min(W, 32)) and 0 <= t <= H - h and 0 <= l <= W - w
            seen[t:t + h, l:l + w] += 1
        assert seen.min() >= 1 and len(set(boxes)) == len(boxes)
        tops = sorted({t for t, *_ in boxes})
        assert all(b - a <= 32 * (1 - overlap) + 1 for a, b in zip(tops, tops[1:])) and tops[-1] == max(0, H - 32)


class Pixelwise(nn.Module):
    """Logits are a function of each pixel alone, so that windows must not show."""

    def __init__(self, gain):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x):
        return x * self.gain + 3


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5])
@pytest.mark.parametrize("gain", [0.0, 1.0])  # a constant network, and one that passes its input on
def test_blending_returns_what_every_window_agrees_on(overlap, gain):
    for H, W in ((5, 7), (33, 65), (32, 32), (17, 90), (101, 40)):
        x = torch.randn(3, H, W)
        with torch.no_grad():
            out = train_seg.logits_of(Pixelwise(gain), x, 32, overlap, batch=3, amp=False)
        torch.testing.assert_close(out, x * gain + 3, rtol=1e-5, atol=1e-5)
    assert all((blend_weight(h, w) > 0).all() for h, w in ((1, 1), (2, 9), (512, 512)))
