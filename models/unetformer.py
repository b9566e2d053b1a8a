"""UNetFormer on ResNet-18 and FTUNetFormer on Swin-B (Wang et al. 2022, arXiv 2109.08937): logits for any H x W.

    net = UNetFormer(6); info = load_pretrained(net, "resnet18-f37072fd.pth"); print(info["line"])

Parameters have the published code's names (WangLibo1995/GeoSeg), those of the Swin trunk torchvision's; both kinds of
file load. The decoders' arithmetic is the published one. That code stops at 224, 480 x 640 or 500: here images and
windows that do not fill the grid are mirrored at the right and bottom, and the logits cut back to H x W. Up to 224
pixels a side torchvision's Swin leaves out a shift that GeoSeg's makes: there FTUNetFormer differs from it.
"""
import re

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from .weights import BadWeights, load_cnn

WINDOW = 8  # side of an attention window, in pixels of the decoder's maps
STRIDE = 32  # of the trunks: images are padded to whole pixels of their deepest map


# B batch, C width, nh heads, hd = C // nh, H W pixels of the image, h w of a map. Everything is (B, C, h, w).

def pad(x, right, bottom):  # mirrored, as published, where there is enough to mirror; else the edge is repeated
    for sides, n in (((0, right, 0, 0), x.shape[3]), ((0, 0, 0, bottom), x.shape[2])):
        if any(sides):
            x = F.pad(x, sides, mode="reflect" if max(sides) < n else "replicate")
    return x


def conv(a: int, b: int, k: int = 3, *after: nn.Module, groups: int = 1) -> nn.Sequential:
    """Convolution without bias that keeps the size (an even k: of an input padded by one), then `after`."""
    return nn.Sequential(nn.Conv2d(a, b, k, padding=(k - 1) // 2, groups=groups, bias=False), *after)


def conv_norm_act(a: int, b: int, k: int = 3) -> nn.Sequential:
    return conv(a, b, k, nn.BatchNorm2d(b), nn.ReLU6())


def separable(dim: int, k: int, norm_last: bool) -> nn.Sequential:
    """Per channel, then across channels; the two networks were published with the norm in different places."""
    point, norm = nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim)
    return conv(dim, dim, k, *((point, norm) if norm_last else (norm, point)), groups=dim)


class Attention(nn.Module):
    """Global branch: window attention, then means over a window's height and width; local branch: two convolutions."""

    def __init__(self, dim: int, heads: int, norm_last: bool):
        super().__init__()
        self.heads, n = heads, WINDOW
        self.qkv = conv(dim, 3 * dim, 1)
        self.local1, self.local2 = conv(dim, dim, 3, nn.BatchNorm2d(dim)), conv(dim, dim, 1, nn.BatchNorm2d(dim))
        self.proj = separable(dim, n, norm_last)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * n - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        y, x = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
        dy, dx = (t.flatten()[:, None] - t.flatten() + n - 1 for t in (y, x))  # (64, 64), from 0
        self.register_buffer("relative_position_index", dy * (2 * n - 1) + dx, persistent=False)

    def attend(self, x):  # every window by itself
        B, C, h, w = x.shape
        n, rows, columns = WINDOW, -(-h // WINDOW), -(-w // WINDOW)
        qkv = self.qkv(pad(x, columns * n - w, rows * n - h))
        qkv = qkv.reshape(B, 3, self.heads, C // self.heads, rows, n, columns, n).permute(1, 0, 4, 6, 2, 5, 7, 3)
        q, k, v = qkv.reshape(3, B * rows * columns, self.heads, n * n, C // self.heads)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]  # (1, nh, 64, 64)
        x = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype))  # divides by sqrt(hd) itself
        x = x.reshape(B, rows, columns, self.heads, n, n, C // self.heads).permute(0, 3, 6, 1, 4, 2, 5)
        return x.reshape(B, C, rows * n, columns * n)[..., :h, :w]

    def forward(self, x):
        local = self.local2(x) + self.local1(x)
        x = self.attend(x)
        tall = F.avg_pool2d(pad(x, 0, 1), (WINDOW, 1), 1, (WINDOW // 2 - 1, 0))
        wide = F.avg_pool2d(pad(x, 1, 0), (1, WINDOW), 1, (0, WINDOW // 2 - 1))
        return self.proj(pad(tall + wide + local, 1, 1))


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, 4 * dim, 1), nn.Conv2d(4 * dim, dim, 1)

    def forward(self, x):
        return self.fc2(F.relu6(self.fc1(x)))


class Block(nn.Module):
    """A transformer block on maps: batch norm in place of layer norm, 1x1 convolutions in place of linear layers."""

    def __init__(self, dim: int, heads: int, norm_last: bool):
        super().__init__()
        self.norm1, self.attn = nn.BatchNorm2d(dim), Attention(dim, heads, norm_last)
        self.norm2, self.mlp = nn.BatchNorm2d(dim), Mlp(dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Fuse(nn.Module):
    """Doubles x and adds the trunk's map `skip`, with two learned shares that are positive and sum to one."""

    def __init__(self, skip: int, dim: int, wide: bool):
        super().__init__()
        self.pre_conv = conv(skip, dim, 3, nn.BatchNorm2d(dim)) if wide else conv(skip, dim, 1)
        self.weights, self.post_conv = nn.Parameter(torch.ones(2)), conv_norm_act(dim, dim)

    def forward(self, x, skip):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        share = self.weights.relu() / (self.weights.relu().sum() + 1e-8)
        return self.post_conv(share[0] * self.pre_conv(skip) + share[1] * x)


class Refine(Fuse):
    """The last fusion, followed by a spatial gate and a channel gate side by side."""

    def __init__(self, skip: int, dim: int, wide: bool):
        super().__init__(skip, dim, wide)
        self.pa = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.Sigmoid())
        self.ca = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(dim, dim // 16, 1), nn.ReLU6(),
                                conv(dim // 16, dim, 1), nn.Sigmoid())
        self.shortcut, self.proj = conv(dim, dim, 1, nn.BatchNorm2d(dim)), separable(dim, 3, norm_last=wide)

    def forward(self, x, skip):
        x = super().forward(x, skip)
        return F.relu6(self.proj(self.pa(x) * x + self.ca(x) * x) + self.shortcut(x))


class AuxHead(nn.Module):
    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.conv, self.drop, self.conv_out = conv_norm_act(dim, dim), nn.Dropout(0.1), conv(dim, classes, 1)

    def forward(self, x):
        return self.conv_out(self.drop(self.conv(x)))


class Decoder(nn.Module):
    """Four maps of the trunk, shallow first -> logits at a quarter of the image; with `aux` also those of training."""

    def __init__(self, widths: tuple, dim: int, heads: int, classes: int, wide: bool, aux: bool):
        super().__init__()
        self.pre_conv = conv(widths[3], dim, 1, nn.BatchNorm2d(dim))
        self.b4, self.b3, self.b2 = (Block(dim, heads, norm_last=wide) for _ in range(3))
        self.p3, self.p2, self.p1 = Fuse(widths[2], dim, wide), Fuse(widths[1], dim, wide), Refine(widths[0], dim, wide)
        self.aux_head = AuxHead(dim, classes) if aux else None
        self.segmentation_head = nn.Sequential(conv_norm_act(dim, dim), nn.Dropout2d(0.1), conv(dim, classes, 1))

    def forward(self, maps):
        x4 = self.b4(self.pre_conv(maps[3]))
        x3 = self.b3(self.p3(x4, maps[2]))
        x2 = self.b2(self.p2(x3, maps[1]))
        logits = self.segmentation_head(self.p1(x2, maps[0]))
        if self.aux_head is None or not self.training:
            return logits, None
        # only here are corners aligned, as published
        x4, x3 = (F.interpolate(x, x2.shape[2:], mode="bilinear", align_corners=True) for x in (x4, x3))
        return logits, self.aux_head(x4 + x3 + x2)


class ResNet18(nn.Module):
    """torchvision's ResNet-18 up to its last map: four maps at 1/4, 1/8, 1/16, 1/32."""

    def __init__(self):
        super().__init__()
        for name, part in torchvision.models.resnet18().named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, part)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


class Swin(nn.Module):
    """torchvision's Swin, by default Swin-B, with a norm on each of its four maps: 1/4, 1/8, 1/16, 1/32."""

    def __init__(self, dim: int = 128, depths: tuple = (2, 2, 18, 2), heads: tuple = (4, 8, 16, 32)):
        super().__init__()
        swin = torchvision.models.SwinTransformer([4, 4], dim, list(depths), list(heads), window_size=[7, 7],
                                                  stochastic_depth_prob=0.3, num_classes=1)
        self.features = swin.features  # embedding, stage, merging, stage, merging, ...
        for i in range(4):
            self.add_module(f"norm{i}", nn.LayerNorm(dim * 2 ** i))

    def forward(self, x):
        maps = []
        for i, part in enumerate(self.features):
            x = part(x)  # (B, h, w, C)
            if i % 2 == 1:
                maps.append(getattr(self, f"norm{i // 2}")(x).permute(0, 3, 1, 2))
        return maps


class Net(nn.Module):
    """x (B, 3, H, W) normalised -> logits (B, K, H, W) fp32; in train mode with an auxiliary head (logits, aux)."""

    def __init__(self, backbone: nn.Module, decoder: Decoder):
        super().__init__()
        self.backbone, self.decoder = backbone, decoder

    def forward(self, x):
        H, W = x.shape[2:]
        x = pad(x, -W % STRIDE, -H % STRIDE)
        outputs = [F.interpolate(z.float(), x.shape[2:], mode="bilinear", align_corners=False)[..., :H, :W]
                   for z in self.decoder(self.backbone(x)) if z is not None]
        return tuple(outputs) if len(outputs) == 2 else outputs[0]


class UNetFormer(Net):
    """11.72 M parameters at 6 classes; the auxiliary head's loss was published with weight 0.4."""

    def __init__(self, classes: int):
        decoder = Decoder((64, 128, 256, 512), 64, 8, classes, wide=False, aux=True)
        super().__init__(ResNet18(), decoder)


class FTUNetFormer(Net):
    """95.98 M parameters at 6 classes; `swin`: arguments of a smaller Swin, for tests and small machines."""

    def __init__(self, classes: int, dim: int = 256, heads: int = 16, swin: dict | None = None):
        backbone = Swin(**swin or {})
        widths = tuple(getattr(backbone, f"norm{i}").normalized_shape[0] for i in range(4))
        super().__init__(backbone, Decoder(widths, dim, heads, classes, wide=True, aux=False))


# ---- weights

# Published names of the Swin trunk -> torchvision's. * is the block number, + is weight and bias.
SWIN = {"patch_embed.proj.+": "features.0.0.+", "patch_embed.norm.+": "features.0.2.+"} | {
    f"layers.{i}.downsample.{part}": f"features.{2 * i + 2}.{part}"
    for i in range(3) for part in ("reduction.weight", "norm.+")} | {
    f"layers.{i}.blocks.*.{theirs}": f"features.{2 * i + 1}.*.{ours}" for i in range(4) for theirs, ours in {
        "norm1.+": "norm1.+", "norm2.+": "norm2.+", "attn.qkv.+": "attn.qkv.+", "attn.proj.+": "attn.proj.+",
        "attn.relative_position_bias_table": "attn.relative_position_bias_table",
        "mlp.fc1.+": "mlp.0.+", "mlp.fc2.+": "mlp.3.+"}.items()}
SWIN = {k.replace("+", s): v.replace("+", s) for k, v in SWIN.items() for s in ("weight", "bias")}


def swin_name(name: str) -> str:
    """A published name of the Swin trunk -> torchvision's; others as they are."""
    block = re.search(r"\.blocks\.(\d+)\.", name)
    new = SWIN.get(name.replace(block[0], ".blocks.*.") if block else name, name)
    return new.replace("*", block[1]) if block else new


def load_pretrained(net: Net, path: str) -> dict:
    """Fill `net` from a trunk file (torchvision, or GeoSeg's Swin) or a whole checkpoint -> info as load_vit's."""
    resnet = isinstance(net.backbone, ResNet18)

    def convert(sd):
        whole = any(k.startswith("decoder.") for k in sd)
        sd = {k.removeprefix("backbone."): t for k, t in sd.items()}
        published = "patch_embed.proj.weight" in sd
        if not whole and ("conv1.weight" if resnet else "features.0.0.weight") not in sd and (resnet or not published):
            raise BadWeights(f"first tensors: {', '.join(list(sd)[:3])}; expected torchvision's "
                             f"{'resnet18' if resnet else 'swin_b'} or a {type(net).__name__} checkpoint")
        # constants; the decoder's are not in the state dict, those of torchvision's trunk are and stay as they are
        state = {k: t for k, t in net.state_dict().items() if k.endswith(".relative_position_index")}
        dropped = set()
        for key, t in sd.items():
            if key.endswith(".relative_position_index"):
                dropped.add("relative_position_index")
            elif key.startswith(("fc.", "head.")):
                dropped.add("classifier")
            elif key.startswith("decoder."):
                state[key] = t
            else:  # torchvision's Swin has one norm, that of the deepest map
                state["backbone." + (swin_name(key) if published else re.sub(r"^norm\.", "norm3.", key))] = t
        new = () if whole else ("decoder.", *(f"backbone.norm{i}." for i in range(4)))
        return "checkpoint" if whole else "geoseg" if published else "torchvision", state, dropped, new

    return load_cnn(net, path, convert, last=("decoder.segmentation_head.2.", "decoder.aux_head.conv_out."))
