"""Decoders on ViT maps, and the network that joins backbone and decoder: logits (B, K, H, W) at the input's size.

Cost at 518 x 518, patch 14, width 768, K = 8 (multiply-adds counted as 2; printed by tests/bench_heads.py):
    linear   0.02 M parameters,   0.1 GFLOP   four taps -> 1x1
    fpn      0.62 M parameters,   2.1 GFLOP   four taps fused at the token grid, sub-pixel shuffle to a quarter
    unet     2.26 M parameters,  21.9 GFLOP   last tap, four transposed convolutions 512-256-128-64 (AeroScapes report)
All norms are GroupNorm: a batch of one image trains.
"""
import torch
import torch.nn.functional as F
from torch import nn


def norm_act(width: int) -> nn.Sequential:  # groups of at least 4 channels, at most 32 of them
    return nn.Sequential(nn.GroupNorm(min(32, width // 4), width), nn.GELU())


class Linear(nn.Module):
    """The honest probe: one 1x1 convolution on the concatenated taps, everything else is the backbone's."""

    def __init__(self, dim: int, taps: int, classes: int):
        super().__init__()
        self.out = nn.Conv2d(taps * dim, classes, 1)

    def forward(self, maps):  # list of (B, C, h, w) -> (B, K, h, w)
        return self.out(torch.cat(maps, dim=1))


class Fpn(nn.Module):
    """Four taps fused at the token grid, sub-pixel shuffle to 4h x 4w, two light convolutions there. The default."""

    def __init__(self, dim: int, taps: int, classes: int, width: int = 128, fine: int = 32):
        super().__init__()
        self.fuse = nn.Sequential(nn.Conv2d(taps * dim, width, 1), norm_act(width),
                                  nn.Conv2d(width, width, 3, padding=1), norm_act(width))
        self.rise = nn.Sequential(nn.Conv2d(width, 16 * fine, 1), nn.PixelShuffle(4), norm_act(fine),
                                  nn.Conv2d(fine, fine, 3, padding=1), norm_act(fine), nn.Conv2d(fine, classes, 1))

    def forward(self, maps):  # list of (B, C, h, w) -> (B, K, 4h, 4w)
        return self.rise(self.fuse(torch.cat(maps, dim=1)))


class Unet(nn.Module):
    """The AeroScapes report's decoder on the last tap; its output covers the whole input: resized, never cropped."""

    def __init__(self, dim: int, taps: int, classes: int, widths: tuple = (512, 256, 128, 64)):
        super().__init__()
        layers = []
        for a, b in zip((dim, *widths), widths):
            layers += [nn.ConvTranspose2d(a, b, 2, stride=2), norm_act(b)]
        self.up, self.out = nn.Sequential(*layers), nn.Conv2d(widths[-1], classes, 1)

    def forward(self, maps):  # list of (B, C, h, w) -> (B, K, 16h, 16w)
        return self.out(self.up(maps[-1]))


HEADS = {"linear": Linear, "fpn": Fpn, "unet": Unet}


class Segmenter(nn.Module):
    """Backbone maps -> head -> logits (B, K, H, W) fp32 for any H and W; a frozen backbone stays in eval mode.

    `backbone(x, taps, norm)` returns maps over the image padded to whole patches, as models/vit.py does.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, taps: list[int], feat_norm: bool = True):
        super().__init__()
        self.backbone, self.head, self.taps, self.feat_norm = backbone, head, taps, feat_norm

    def unfreeze(self, blocks: int | None) -> int:
        """Train the head and the last `blocks` of those up to the last tap; None: the whole backbone -> how many."""
        used = self.backbone.blocks[: self.taps[-1] + 1]  # DDP would wait for gradients of those behind
        n = len(used) if blocks is None else min(blocks, len(used))
        self.backbone.requires_grad_(blocks is None)  # patch embedding, tokens and positions too
        self.backbone.blocks.requires_grad_(False)
        used[len(used) - n:].requires_grad_(True)
        self.backbone.norm.requires_grad_(n > 0 and self.feat_norm)
        return n

    def train(self, mode: bool = True):
        super().train(mode)
        if not any(p.requires_grad for p in self.backbone.parameters()):
            self.backbone.eval()
        return self

    def forward(self, x):  # (B, 3, H, W) normalised
        H, W = x.shape[-2:]
        maps, _ = self.backbone(x, self.taps, self.feat_norm)
        size = [n * self.backbone.patch for n in maps[0].shape[-2:]]  # the padded image: logits and pixels stay aligned
        logits = F.interpolate(self.head(maps).float(), size, mode="bilinear", align_corners=False)
        return logits[..., :H, :W]
