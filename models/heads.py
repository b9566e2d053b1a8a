"""Decoders on ViT maps and the image, and the network that joins backbone and decoder.

    net = Segmenter(ViT(**cfg), HEADS["fpn"](dim, taps=4, classes=8, patch=16), taps=[2, 5, 8, 11])
    logits = net(x)     x (B, 3, H, W) normalised -> (B, K, H, W) fp32, any H and W

Cost at 518 x 518, patch 14, width 768, K = 8, as tests/bench_heads.py prints it (a multiply-add
counts as 2; the ViT-B below needs 234 GFLOP; time forward and backward on a CPU, tokens = 1):
    linear    0.02 M parameters,   0.1 GFLOP,  0.1   four taps -> 1x1
    tokens    0.62 M parameters,   2.1 GFLOP,  1     four taps fused at the token grid, sub-pixel
                                                     shuffle to a quarter
    fpn       0.74 M parameters,   8.4 GFLOP,  4     the same, joined by the image at a quarter
                                                     and a half
    unet      2.26 M parameters,  21.9 GFLOP,  7     last tap, four transposed convolutions
                                                     512-256-128-64 (AeroScapes report)
    upernet   9.64 M parameters, 151.4 GFLOP, 22     pyramid pooling and FPN over four strides
All norms are GroupNorm: a batch of one image trains.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, K classes, C width of the backbone, H W pixels, h w patches. A tap is the number of a
# block whose map a head reads; `maps` is the list of them, each (B, C, h, w). Every head is made
# with (dim, taps, classes, patch) and called with (maps, image), where image (B, 3, patch h,
# patch w) is the network's input, padded to whole patches.


def norm_act(width: int) -> nn.Sequential:
    """Group norm and GELU; groups of at least 4 channels, at most 32 of them."""
    groups = min(32, width // 4)
    return nn.Sequential(nn.GroupNorm(groups, width), nn.GELU())


def conv(dim: int, width: int, size: int = 3) -> nn.Sequential:
    """Convolution, group norm and GELU."""
    return nn.Sequential(nn.Conv2d(dim, width, size, padding=size // 2), norm_act(width))


def halve(dim: int, width: int) -> nn.Sequential:
    """Half of the height and width, then as conv()."""
    # A kernel of 4 lies around the middle of 2 x 2 pixels; one of 3 would lie off by half a pixel.
    return nn.Sequential(nn.Conv2d(dim, width, 4, stride=2, padding=1), norm_act(width))


def shuffle(dim: int, width: int, times: int) -> nn.Sequential:
    """`times` the height and width: PixelShuffle turns times² channels into so many pixels."""
    layer = nn.Conv2d(dim, times ** 2 * width, 1)
    return nn.Sequential(layer, nn.PixelShuffle(times), norm_act(width))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, with the corners of both images in the same place."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class Linear(nn.Module):
    """The honest probe: one 1x1 convolution on the concatenated taps, (B, K, h, w).

    Everything else is the backbone's.
    """

    def __init__(self, dim: int, taps: int, classes: int, patch: int):
        super().__init__()
        self.out = nn.Conv2d(taps * dim, classes, 1)

    def forward(self, maps: list[Tensor], image: Tensor) -> Tensor:
        return self.out(torch.cat(maps, dim=1))


class TokenFpn(nn.Module):
    """Fpn without the image, from tokens alone, (B, K, 4h, 4w): what the image adds is the difference.

    Taps fused at the token grid, then finer by sub-pixel shuffle.
    """

    def __init__(self, dim: int, taps: int, classes: int, patch: int, width: int = 128,
                 fine: int = 32):
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

    def forward(self, maps: list[Tensor], image: Tensor) -> Tensor:
        x = self.fuse(torch.cat(maps, dim=1))  # (B, width, h, w)
        return self.rise(x)


class Fpn(nn.Module):
    """The default: taps fused at the token grid, joined by the image itself at a quarter and a half.

    Tokens say what lies there, the image says where it ends. -> (B, K, H / 2, W / 2)
    """

    def __init__(self, dim: int, taps: int, classes: int, patch: int, width: int = 128,
                 quarter: int = 48, half: int = 24):
        super().__init__()
        # Pixels a token is worth here, a power of two: 16 for a patch of 14, whose image is
        # enlarged to it.
        self.side = 2 ** math.ceil(math.log2(patch))
        # Down the image, to a half and a quarter.
        self.to_half = nn.Sequential(halve(3, half), conv(half, half))
        self.to_quarter = nn.Sequential(halve(half, quarter), conv(quarter, quarter))
        # The taps at the token grid, and up again.
        self.fuse = nn.Sequential(conv(taps * dim, width, 1), conv(width, width))
        self.up_to_quarter = shuffle(width, quarter, self.side // 4)
        self.join_quarter = conv(2 * quarter, quarter)
        self.up_to_half = shuffle(quarter, half, 2)
        self.join_half = conv(2 * half, half)
        self.out = nn.Conv2d(half, classes, 1)

    def forward(self, maps: list[Tensor], image: Tensor) -> Tensor:
        h, w = maps[0].shape[-2:]
        size = self.side * h, self.side * w
        if image.shape[-2:] != size:
            image = resize(image, size)
        at_half = self.to_half(image)
        at_quarter = self.to_quarter(at_half)
        x = self.up_to_quarter(self.fuse(torch.cat(maps, dim=1)))
        x = self.join_quarter(torch.cat([x, at_quarter], dim=1))
        x = self.join_half(torch.cat([self.up_to_half(x), at_half], dim=1))
        return self.out(x)


class Unet(nn.Module):
    """The AeroScapes report's decoder, on the last tap alone, (B, K, 16h, 16w).

    Its output covers the whole input: it is resized, never cropped.
    """

    def __init__(self, dim: int, taps: int, classes: int, patch: int,
                 widths: tuple = (512, 256, 128, 64)):
        super().__init__()
        # Each of the four doubles height and width.
        layers = []
        for width in widths:
            layers += [nn.ConvTranspose2d(dim, width, 2, stride=2), norm_act(width)]
            dim = width
        self.up = nn.Sequential(*layers)
        self.out = nn.Conv2d(dim, classes, 1)

    def forward(self, maps: list[Tensor], image: Tensor) -> Tensor:
        return self.out(self.up(maps[-1]))


def conv_relu(dim: int, width: int, size: int) -> nn.Sequential:
    """Convolution, group norm and ReLU, as UPerNet has them (there with BatchNorm)."""
    layer = nn.Conv2d(dim, width, size, padding=size // 2, bias=False)
    return nn.Sequential(layer, nn.GroupNorm(32, width), nn.ReLU())


class UperNet(nn.Module):
    """Pyramid pooling on the last tap and an FPN over all, (B, K, H / 4, W / 4).

    Xiao et al. 2018, as mmsegmentation has it. The taps are resized to strides 4, 8, 16, 32.
    """

    POOLS = 1, 2, 3, 6  # sides of the pooled grids

    def __init__(self, dim: int, taps: int, classes: int, patch: int, width: int = 256):
        super().__init__()
        self.finest = 2 ** math.ceil(math.log2(patch)) / 4  # size of the first map in tokens
        self.pooled = nn.ModuleList([conv_relu(dim, width, 1) for _ in self.POOLS])
        self.bottleneck = conv_relu(dim + len(self.POOLS) * width, width, 3)
        self.lateral = nn.ModuleList([conv_relu(dim, width, 1) for _ in range(taps - 1)])
        self.smooth = nn.ModuleList([conv_relu(width, width, 3) for _ in range(taps - 1)])
        self.join = conv_relu(taps * width, width, 3)
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, maps: list[Tensor], image: Tensor) -> Tensor:
        h, w = maps[0].shape[-2:]
        pyramid = []
        for i, tap in enumerate(maps):
            scale = self.finest / 2 ** i
            size = max(1, round(h * scale)), max(1, round(w * scale))
            pyramid.append(resize(tap, size))
        return self.decode(pyramid)

    def decode(self, pyramid: list[Tensor]) -> Tensor:
        """Maps (B, C, ., .) from fine to coarse -> logits of the first one's size."""
        *finer, last = pyramid
        size = last.shape[-2:]
        pools = [last]
        for side, layer in zip(self.POOLS, self.pooled):
            pools.append(resize(layer(F.adaptive_avg_pool2d(last, side)), size))
        # From coarse to fine, each map takes in the one below it.
        coarse = self.bottleneck(torch.cat(pools, dim=1))
        levels = [coarse]
        for i in reversed(range(len(finer))):
            x = self.lateral[i](finer[i])
            coarse = x + resize(coarse, x.shape[-2:])
            levels.append(self.smooth[i](coarse))
        size = levels[-1].shape[-2:]
        levels = [resize(x, size) for x in reversed(levels)]
        return self.out(self.join(torch.cat(levels, dim=1)))


# What --head may name: made with (dim, taps, classes, patch), from maps (B, C, h, w) of so many
# taps and the padded image to logits (B, K, s h, s w), which Segmenter resizes to the image.
HEADS = {"linear": Linear, "tokens": TokenFpn, "fpn": Fpn, "unet": Unet, "upernet": UperNet}

# Of what the names mean, for files: in version 1 fpn was what is tokens now.
VERSION = 2


class Segmenter(nn.Module):
    """Backbone maps and image -> head -> logits (B, K, H, W) fp32; a frozen backbone stays in eval mode.

    `backbone(x, taps, norm)` returns maps of whole patches, as models/vit.py does; it has .patch,
    and .blocks and .norm for unfreeze(). taps: numbers of the blocks, rising. feat_norm: the
    backbone's final norm on every map. dropout: share of the maps' channels, in training.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, taps: list[int],
                 feat_norm: bool = True, dropout: float = 0.0):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.taps = taps
        self.feat_norm = feat_norm
        self.dropout = nn.Dropout2d(dropout)

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

    def forward(self, x: Tensor, *known: Tensor) -> Tensor:
        """known: the backbone's maps of x, where a file of data/views.py has them already."""
        H, W = x.shape[-2:]
        patch = self.backbone.patch
        # Padded to whole patches here, so that head and backbone see the same image.
        image = F.pad(x, (0, -W % patch, 0, -H % patch))
        if known:
            maps = [t.to(image.dtype) for t in known]  # from bf16
        else:
            maps, _ = self.backbone(image, self.taps, self.feat_norm)
        logits = self.head([self.dropout(x) for x in maps], image).float()
        # Resized to the padded image and then cut, so that logits and pixels stay aligned.
        return resize(logits, image.shape[-2:])[..., :H, :W]
