"""UNetFormer on ResNet-18 and FTUNetFormer on Swin-B (Wang et al. 2022, arXiv 2109.08937).

    net = UNetFormer(6)
    info = load_pretrained(net, "resnet18-f37072fd.pth")
    logits = net.eval()(x)           x (B, 3, H, W) normalised -> (B, K, H, W) fp32, any H and W
    logits, aux = net.train()(x)     UNetFormer alone has an auxiliary head

Parameters have the published code's names (WangLibo1995/GeoSeg), those of the Swin trunk
torchvision's; both kinds of file load. The decoders' arithmetic is the published one. That code
stops at 224, 480 x 640 or 500: here images and windows that do not fill the grid are mirrored at
the right and bottom, and the logits cut back to H x W. Up to 224 pixels a side torchvision's Swin
leaves out a shift that GeoSeg's makes: there FTUNetFormer differs from it.
"""
import re

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from .weights import RESNET, RESNET_PARTS, BadWeights, load_cnn

WINDOW = 8  # side of an attention window, in pixels of the decoder's maps
STRIDE = 32  # of the trunks: images are padded to whole pixels of their deepest map

# B batch, K classes, C width, nh heads, hd = C // nh, H W pixels of the image, h w of a map.
# Everything is (B, C, h, w).


def pad(x: Tensor, right: int, bottom: int) -> Tensor:
    """Mirrored at the right and bottom, as published, where there is enough to mirror.

    Else the edge is repeated.
    """
    if right:
        mode = "reflect" if right < x.shape[3] else "replicate"
        x = F.pad(x, (0, right, 0, 0), mode=mode)
    if bottom:
        mode = "reflect" if bottom < x.shape[2] else "replicate"
        x = F.pad(x, (0, 0, 0, bottom), mode=mode)
    return x


def conv(dim: int, width: int, kernel: int = 3, *after: nn.Module,
         groups: int = 1) -> nn.Sequential:
    """Convolution without bias that keeps h and w, then `after`.

    With an even kernel x must be one larger.
    """
    same = (kernel - 1) // 2
    layer = nn.Conv2d(dim, width, kernel, padding=same, groups=groups, bias=False)
    return nn.Sequential(layer, *after)


def conv_norm_act(dim: int, width: int, kernel: int = 3) -> nn.Sequential:
    return conv(dim, width, kernel, nn.BatchNorm2d(width), nn.ReLU6())


def separable(dim: int, kernel: int, norm_last: bool) -> nn.Sequential:
    """Convolution per channel, then across channels."""
    # UNetFormer has its norm between the two, FTUNetFormer behind them.
    point = nn.Conv2d(dim, dim, 1, bias=False)
    norm = nn.BatchNorm2d(dim)
    after = (point, norm) if norm_last else (norm, point)
    return conv(dim, dim, kernel, *after, groups=dim)


class Attention(nn.Module):
    """Global branch: window attention, then means over a window's height and width.

    Local branch: two convolutions.
    """

    def __init__(self, dim: int, heads: int, norm_last: bool):
        super().__init__()
        n = WINDOW
        self.heads = heads
        self.qkv = conv(dim, 3 * dim, 1)
        self.local1 = conv(dim, dim, 3, nn.BatchNorm2d(dim))
        self.local2 = conv(dim, dim, 1, nn.BatchNorm2d(dim))
        self.proj = separable(dim, n, norm_last)

        # A learned bias for each distance of two pixels of a window, from -7 to 7 either way.
        table = nn.Parameter(torch.zeros((2 * n - 1) ** 2, heads))
        self.relative_position_bias_table = table
        nn.init.trunc_normal_(table, std=0.02)
        y, x = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
        y, x = y.flatten(), x.flatten()
        dy = y[:, None] - y + n - 1  # (64, 64), from 0 to 14
        dx = x[:, None] - x + n - 1
        index = dy * (2 * n - 1) + dx
        self.register_buffer("relative_position_index", index, persistent=False)

    def attend(self, x: Tensor) -> Tensor:
        """Attention within each window, (B, C, h, w) -> the same."""
        B, C, h, w = x.shape
        n, nh, hd = WINDOW, self.heads, C // self.heads
        rows, columns = -(-h // n), -(-w // n)  # windows, rounded up

        # (B, 3C, h, w) -> q, k and v, each (B * windows, nh, n * n, hd)
        qkv = self.qkv(pad(x, columns * n - w, rows * n - h))
        qkv = qkv.reshape(B, 3, nh, hd, rows, n, columns, n)
        qkv = qkv.permute(1, 0, 4, 6, 2, 5, 7, 3)  # (3, B, rows, columns, nh, n, n, hd)
        q, k, v = qkv.reshape(3, B * rows * columns, nh, n * n, hd)

        bias = self.relative_position_bias_table[self.relative_position_index]
        bias = bias.permute(2, 0, 1)[None].to(q.dtype)  # (1, nh, 64, 64)
        x = F.scaled_dot_product_attention(q, k, v, bias)  # divides by sqrt(hd) itself

        # Back to (B, C, h, w), without what was padded.
        x = x.reshape(B, rows, columns, nh, n, n, hd)
        x = x.permute(0, 3, 6, 1, 4, 2, 5)  # (B, nh, hd, rows, n, columns, n)
        return x.reshape(B, C, rows * n, columns * n)[..., :h, :w]

    def forward(self, x: Tensor) -> Tensor:
        local = self.local2(x) + self.local1(x)
        # Windows see nothing of their neighbours. The means that follow carry it across.
        x = self.attend(x)
        # Means over 8 pixels: an even window reaches one pixel further to the right and bottom.
        before = WINDOW // 2 - 1
        tall = F.avg_pool2d(pad(x, 0, 1), (WINDOW, 1), 1, (before, 0))
        wide = F.avg_pool2d(pad(x, 1, 0), (1, WINDOW), 1, (0, before))
        # proj's kernel is 8 wide: one more row and column keep h and w.
        return self.proj(pad(tall + wide + local, 1, 1))


class Mlp(nn.Module):
    """(B, C, h, w) -> the same, pixel by pixel."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, 4 * dim, 1)
        self.fc2 = nn.Conv2d(4 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu6(self.fc1(x)))


class Block(nn.Module):
    """A transformer block on maps, with batch norms and 1x1 convolutions in place of the usual."""

    def __init__(self, dim: int, heads: int, norm_last: bool):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = Attention(dim, heads, norm_last)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Fuse(nn.Module):
    """Doubles x and adds the trunk's map `skip`, with two learned shares.

    The shares are positive and sum to one.
    """

    def __init__(self, skip: int, dim: int, wide: bool):
        super().__init__()
        if wide:
            self.pre_conv = conv(skip, dim, 3, nn.BatchNorm2d(dim))
        else:
            self.pre_conv = conv(skip, dim, 1)
        self.weights = nn.Parameter(torch.ones(2))
        self.post_conv = conv_norm_act(dim, dim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        # As published: both shares positive, their sum one; 1e-8 keeps 0 / 0 away.
        share = self.weights.relu() / (self.weights.relu().sum() + 1e-8)
        x = share[0] * self.pre_conv(skip) + share[1] * x  # (B, C, 2h, 2w)
        return self.post_conv(x)


class Refine(Fuse):
    """The last fusion, followed by a spatial gate and a channel gate side by side."""

    def __init__(self, skip: int, dim: int, wide: bool):
        super().__init__(skip, dim, wide)
        # Gates between 0 and 1: pa for each pixel of each channel, ca for each channel.
        self.pa = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.Sigmoid())
        self.ca = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            conv(dim, dim // 16, 1),
            nn.ReLU6(),
            conv(dim // 16, dim, 1),
            nn.Sigmoid(),
        )
        self.shortcut = conv(dim, dim, 1, nn.BatchNorm2d(dim))
        self.proj = separable(dim, 3, norm_last=wide)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = super().forward(x, skip)
        # Both gates see the same x; the shortcut goes round them.
        gated = self.pa(x) * x + self.ca(x) * x
        return F.relu6(self.proj(gated) + self.shortcut(x))


class AuxHead(nn.Module):
    """(B, C, h, w) -> auxiliary logits (B, K, h, w), in training alone."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.conv = conv_norm_act(dim, dim)
        self.drop = nn.Dropout(0.1)
        self.conv_out = conv(dim, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.drop(self.conv(x)))


class Decoder(nn.Module):
    """Four maps of the trunk, shallow first -> logits and aux logits at a quarter of the image.

    aux logits: None outside train mode, and without `aux`. wide: FTUNetFormer's larger layers.
    """

    def __init__(self, widths: tuple, dim: int, heads: int, classes: int, wide: bool, aux: bool):
        super().__init__()
        self.pre_conv = conv(widths[3], dim, 1, nn.BatchNorm2d(dim))
        self.b4 = Block(dim, heads, norm_last=wide)
        self.b3 = Block(dim, heads, norm_last=wide)
        self.b2 = Block(dim, heads, norm_last=wide)
        self.p3 = Fuse(widths[2], dim, wide)
        self.p2 = Fuse(widths[1], dim, wide)
        self.p1 = Refine(widths[0], dim, wide)
        self.aux_head = AuxHead(dim, classes) if aux else None
        self.segmentation_head = nn.Sequential(
            conv_norm_act(dim, dim), nn.Dropout2d(0.1), conv(dim, classes, 1))

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        # From the deepest map up, at 1/32, 1/16, 1/8, 1/4.
        x4 = self.b4(self.pre_conv(maps[3]))
        x3 = self.b3(self.p3(x4, maps[2]))
        x2 = self.b2(self.p2(x3, maps[1]))
        logits = self.segmentation_head(self.p1(x2, maps[0]))
        if self.aux_head is None or not self.training:
            return logits, None
        # Only here are corners aligned, as published.
        size = x2.shape[2:]
        x4 = F.interpolate(x4, size, mode="bilinear", align_corners=True)
        x3 = F.interpolate(x3, size, mode="bilinear", align_corners=True)
        return logits, self.aux_head(x4 + x3 + x2)


class ResNet18(nn.Module):
    """torchvision's ResNet-18 up to its last map: four maps at 1/4, 1/8, 1/16, 1/32."""

    def __init__(self):
        super().__init__()
        # Under torchvision's own names, so that its file fits.
        for name, part in torchvision.models.resnet18().named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, part)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


class Swin(nn.Module):
    """torchvision's Swin, by default Swin-B, with a norm on each of its four maps.

    The maps are at 1/4, 1/8, 1/16, 1/32.
    """

    def __init__(self, dim: int = 128, depths: tuple = (2, 2, 18, 2),
                 heads: tuple = (4, 8, 16, 32)):
        super().__init__()
        swin = torchvision.models.SwinTransformer(
            [4, 4], dim, list(depths), list(heads), window_size=[7, 7],
            stochastic_depth_prob=0.3, num_classes=1)
        self.features = swin.features  # embedding, stage, merging, stage, merging, ...
        self.widths = tuple(dim * 2 ** i for i in range(4))
        for i, width in enumerate(self.widths):
            self.add_module(f"norm{i}", nn.LayerNorm(width))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, part in enumerate(self.features):
            # Odd parts are the stages. Their maps are (B, h, w, C).
            x = part(x)
            if i % 2 == 1:
                norm = getattr(self, f"norm{i // 2}")
                maps.append(norm(x).permute(0, 3, 1, 2))
        return maps


class Net(nn.Module):
    """x (B, 3, H, W) normalised -> logits (B, K, H, W) fp32.

    In train mode with an auxiliary head it is the pair (logits, aux logits).
    """

    def __init__(self, backbone: nn.Module, decoder: Decoder):
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        H, W = x.shape[2:]
        # The logits are resized to the padded image and then cut, so that they stay aligned.
        x = pad(x, -W % STRIDE, -H % STRIDE)
        size = x.shape[2:]

        def up(logits):
            logits = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
            return logits[..., :H, :W]

        logits, aux = self.decoder(self.backbone(x))
        if aux is None:
            return up(logits)
        return up(logits), up(aux)


class UNetFormer(Net):
    """11.72 M parameters at 6 classes; the auxiliary head's loss was published with weight 0.4."""

    def __init__(self, classes: int):
        # The decoder first: the order of the random draws makes the weights of a seed.
        decoder = Decoder((64, 128, 256, 512), 64, 8, classes, wide=False, aux=True)
        super().__init__(ResNet18(), decoder)


class FTUNetFormer(Net):
    """95.98 M parameters at 6 classes.

    swin: arguments of a smaller Swin, for tests and small machines.
    """

    def __init__(self, classes: int, dim: int = 256, heads: int = 16, swin: dict | None = None):
        # Here the backbone is drawn first.
        backbone = Swin() if swin is None else Swin(**swin)
        decoder = Decoder(backbone.widths, dim, heads, classes, wide=True, aux=False)
        super().__init__(backbone, decoder)


# ---- weights

# Published names of a Swin block -> torchvision's. + is weight and bias.
SWIN_BLOCK = {
    "norm1.+": "norm1.+",
    "norm2.+": "norm2.+",
    "attn.qkv.+": "attn.qkv.+",
    "attn.proj.+": "attn.proj.+",
    "attn.relative_position_bias_table": "attn.relative_position_bias_table",
    "mlp.fc1.+": "mlp.0.+",
    "mlp.fc2.+": "mlp.3.+",
}


def swin_table() -> dict[str, str]:
    """Published names of the Swin trunk -> torchvision's; * is the number of a block."""
    # torchvision counts embedding, stages and mergings through: stages are odd, mergings even.
    table = {"patch_embed.proj.+": "features.0.0.+", "patch_embed.norm.+": "features.0.2.+"}
    for i in range(4):
        for theirs, ours in SWIN_BLOCK.items():
            table[f"layers.{i}.blocks.*.{theirs}"] = f"features.{2 * i + 1}.*.{ours}"
    for i in range(3):
        for part in ("reduction.weight", "norm.+"):
            table[f"layers.{i}.downsample.{part}"] = f"features.{2 * i + 2}.{part}"

    whole = {}
    for theirs, ours in table.items():
        for leaf in ("weight", "bias"):
            whole[theirs.replace("+", leaf)] = ours.replace("+", leaf)
    return whole


SWIN = swin_table()


def swin_name(name: str) -> str:
    """A published name of the Swin trunk -> torchvision's; others as they are."""
    block = re.search(r"\.blocks\.(\d+)\.", name)
    if not block:
        return SWIN.get(name, name)
    any_block = name.replace(block[0], ".blocks.*.")
    return SWIN.get(any_block, name).replace("*", block[1])


def load_pretrained(net: Net, path: str) -> dict:
    """Fill `net` from a file or URL -> info (line, sha256, path, norm).

    The file is a trunk (torchvision's, or GeoSeg's Swin) or a whole checkpoint.
    """
    resnet = isinstance(net.backbone, ResNet18)

    def convert(sd):
        whole = any(k.startswith("decoder.") for k in sd)
        sd = {k.removeprefix("backbone."): t for k, t in sd.items()}
        geoseg = "patch_embed.proj.weight" in sd  # names of the published Swin
        torchvisions = ("conv1.weight" if resnet else "features.0.0.weight") in sd
        if not whole and not torchvisions and (resnet or not geoseg):
            first = ", ".join(list(sd)[:3])
            trunk = "resnet18" if resnet else "swin_b"
            raise BadWeights(f"first tensors: {first}; expected torchvision's {trunk} or a "
                             f"{type(net).__name__} checkpoint")

        # The constants of the trunk come from the net. Those of the decoder are not
        # in its state dict.
        state = {}
        for key, t in net.state_dict().items():
            if key.endswith(".relative_position_index"):
                state[key] = t
        # What is needed, under our names.
        dropped = set()
        for key, t in sd.items():
            if key.endswith(".relative_position_index"):
                dropped.add("relative_position_index")
            elif key.startswith(("fc.", "head.")):
                dropped.add("classifier")
            elif key.startswith("decoder."):
                state[key] = t
            elif geoseg:
                state[f"backbone.{swin_name(key)}"] = t
            else:
                # torchvision's Swin has one norm, that of the deepest map.
                name = re.sub(r"^norm\.", "norm3.", key)
                state[f"backbone.{name}"] = t

        # A trunk leaves the decoder random, and the norms that it does not bring.
        if whole:
            return "checkpoint", state, dropped, ()
        layout = "geoseg" if geoseg else "torchvision"
        norms = [f"backbone.norm{i}." for i in range(4)]
        return layout, state, dropped, ("decoder.", *norms)

    last = ("decoder.segmentation_head.2.", "decoder.aux_head.conv_out.")
    swin = r"features\.0\.0\.weight|patch_embed\.proj\.weight"
    parts = RESNET_PARTS | {"backbone", "decoder", "features", "patch_embed", "layers", "norm",
                            "norm0", "norm1", "norm2", "norm3", "head"}
    return load_cnn(net, path, convert, last, whole=r"decoder\.pre_conv\.0\.weight",
                    trunk=RESNET if resnet else swin, parts=parts)
