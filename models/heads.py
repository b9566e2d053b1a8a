"""Decoders on ViT maps, and the network that joins backbone and decoder.

    net = Segmenter(ViT(**cfg), HEADS["fpn"](dim, taps=4, classes=8), taps=[2, 5, 8, 11])
    logits = net(x)     x (B, 3, H, W) normalised -> (B, K, H, W) fp32, any H and W

Cost at 518 x 518, patch 14, width 768, K = 8, as tests/bench_heads.py prints it (a multiply-add
counts as 2):
    linear   0.02 M parameters,   0.1 GFLOP   four taps -> 1x1
    fpn      0.62 M parameters,   2.1 GFLOP   four taps fused at the token grid, sub-pixel
                                              shuffle to a quarter
    unet     2.26 M parameters,  21.9 GFLOP   last tap, four transposed convolutions
                                              512-256-128-64 (AeroScapes report)
All norms are GroupNorm: a batch of one image trains.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, K classes, C width of the backbone, H W pixels, h w patches. A tap is the number of a
# block whose map a head reads; `maps` is the list of them, each (B, C, h, w).


def norm_act(width: int) -> nn.Sequential:
    """Group norm and GELU; groups of at least 4 channels, at most 32 of them."""
    groups = min(32, width // 4)
    return nn.Sequential(nn.GroupNorm(groups, width), nn.GELU())


class Linear(nn.Module):
    """The honest probe: one 1x1 convolution on the concatenated taps, (B, K, h, w).

    Everything else is the backbone's.
    """

    def __init__(self, dim: int, taps: int, classes: int):
        super().__init__()
        self.out = nn.Conv2d(taps * dim, classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.out(torch.cat(maps, dim=1))


class Fpn(nn.Module):
    """The default: taps fused at the token grid, then finer by sub-pixel shuffle, (B, K, 4h, 4w).

    Two light convolutions at the finer grid make the logits.
    """

    def __init__(self, dim: int, taps: int, classes: int, width: int = 128, fine: int = 32):
        super().__init__()
        # At the token grid.
        self.fuse = nn.Sequential(
            nn.Conv2d(taps * dim, width, 1),
            norm_act(width),
            nn.Conv2d(width, width, 3, padding=1),
            norm_act(width),
        )
        # PixelShuffle(4) turns 16 channels of a token into 4 x 4 pixels.
        self.rise = nn.Sequential(
            nn.Conv2d(width, 16 * fine, 1),
            nn.PixelShuffle(4),
            norm_act(fine),
            nn.Conv2d(fine, fine, 3, padding=1),
            norm_act(fine),
            nn.Conv2d(fine, classes, 1),
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = self.fuse(torch.cat(maps, dim=1))  # (B, width, h, w)
        return self.rise(x)


class Unet(nn.Module):
    """The AeroScapes report's decoder, on the last tap alone, (B, K, 16h, 16w).

    Its output covers the whole input: it is resized, never cropped.
    """

    def __init__(self, dim: int, taps: int, classes: int, widths: tuple = (512, 256, 128, 64)):
        super().__init__()
        # Each of the four doubles height and width.
        layers = []
        for width in widths:
            layers += [nn.ConvTranspose2d(dim, width, 2, stride=2), norm_act(width)]
            dim = width
        self.up = nn.Sequential(*layers)
        self.out = nn.Conv2d(dim, classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.out(self.up(maps[-1]))


# What --head may name: made with (dim, taps, classes), from maps (B, C, h, w) of so many taps to
# logits (B, K, s h, s w), which Segmenter resizes to the image.
HEADS = {"linear": Linear, "fpn": Fpn, "unet": Unet}


class Segmenter(nn.Module):
    """Backbone maps -> head -> logits (B, K, H, W) fp32; a frozen backbone stays in eval mode.

    `backbone(x, taps, norm)` returns maps over the image padded to whole patches, as models/vit.py
    does; it has .patch, and .blocks and .norm for unfreeze(). taps: numbers of the blocks, rising.
    feat_norm: the backbone's final norm on every map.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, taps: list[int],
                 feat_norm: bool = True):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.taps = taps
        self.feat_norm = feat_norm

    def unfreeze(self, blocks: int | None) -> int:
        """Train the head and the last `blocks` blocks; None: the whole backbone -> how many."""
        # Blocks behind the last tap do not run: DDP would wait for their gradients.
        used = self.backbone.blocks[: self.taps[-1] + 1]
        n = len(used) if blocks is None else min(blocks, len(used))
        # Patch embedding, tokens and positions train only with the whole backbone.
        self.backbone.requires_grad_(blocks is None)
        self.backbone.blocks.requires_grad_(False)
        used[len(used) - n:].requires_grad_(True)
        self.backbone.norm.requires_grad_(n > 0 and self.feat_norm)
        return n

    def train(self, mode: bool = True) -> "Segmenter":
        # A frozen backbone must not change, not even its batch norm statistics.
        super().train(mode)
        if not any(p.requires_grad for p in self.backbone.parameters()):
            self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        maps, _ = self.backbone(x, self.taps, self.feat_norm)
        logits = self.head(maps).float()
        # Resized to the padded image and then cut, so that logits and pixels stay aligned.
        h, w = maps[0].shape[-2:]
        size = [h * self.backbone.patch, w * self.backbone.patch]
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return logits[..., :H, :W]
