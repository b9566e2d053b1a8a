"""U-Net on EfficientNet-B4 (Tan & Le 2019): logits (B, K, H, W) for any H x W.

    net = EfficientNetUnet(8)
    info = load_pretrained(net, "unet_b4.safetensors")
    print(info["line"])

The network of segmentation-models-pytorch (smp), whose checkpoints load and give its logits, on
torchvision's trunk, whose weight file loads too. smp counts 20.23 M parameters at 8 classes. Of
these 0.81 M are a head convolution that it never runs; it is not here (19.42 M).
"""
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from .weights import BadWeights, load_cnn

# B batch, K classes, C channels, H W pixels of the image, h w of a map.

STRIDE = 32  # images are padded to whole pixels of the deepest map
# Number of the trunk's part: channels of its map, at 1/2, 1/4, 1/8, 1/16, 1/32.
SKIPS = {0: 48, 2: 32, 3: 56, 5: 160, 7: 448}
WIDTHS = (256, 128, 64, 32, 16)  # of the decoder's blocks, deepest first
# smp pads a strided convolution as is right for an image of 380 pixels, at every size.
# Name of the convolution: (left, right, top, bottom).
SMP_PADS = {
    "0.0": (0, 1, 0, 1),
    "2.0.block.1.0": (0, 1, 0, 1),
    "3.0.block.1.0": (2, 2, 2, 2),
    "4.0.block.1.0": (0, 1, 0, 1),
    "6.0.block.1.0": (1, 2, 1, 2),
}


class PaddedConv(nn.Conv2d):
    """A convolution that may pad the two sides differently."""

    pads = None  # (left, right, top, bottom) in place of its own padding

    def forward(self, x: Tensor) -> Tensor:
        if self.pads is None:
            return super().forward(x)
        x = F.pad(x, self.pads)
        return F.conv2d(x, self.weight, None, self.stride, 0, self.dilation, self.groups)


def padded(old: nn.Conv2d) -> PaddedConv:
    """The same convolution, with the same weight, as a PaddedConv."""
    new = PaddedConv(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding,
                     groups=old.groups, bias=False)
    new.weight = old.weight
    return new


def conv3x3(dim: int, width: int) -> nn.Sequential:
    """3x3 convolution that keeps h and w, batch norm, ReLU."""
    layer = nn.Conv2d(dim, width, 3, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU())


class DecoderBlock(nn.Module):
    """Doubles (B, C, h, w) and joins the trunk's map of that size -> (B, width, 2h, 2w)."""

    def __init__(self, below: int, skip: int, width: int):
        super().__init__()
        self.conv1 = conv3x3(below + skip, width)
        self.conv2 = conv3x3(width, width)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        if skip is not None:
            x = torch.cat([x, skip], 1)
        return self.conv2(self.conv1(x))


class EfficientNetUnet(nn.Module):
    """x (B, 3, H, W) normalised -> logits (B, K, H, W) fp32.

    load_pretrained() chooses the trunk's arithmetic.
    """

    def __init__(self, classes: int):
        super().__init__()
        # The first eight parts are all but the head convolution. What strides may pad as smp does.
        self.encoder = torchvision.models.efficientnet_b4().features[:8]
        for module in list(self.encoder.modules()):
            if isinstance(module, nn.Sequential) and isinstance(module[0], nn.Conv2d):
                if module[0].stride == (2, 2):
                    module[0] = padded(module[0])

        # Deepest first. The last block works at H x W, where the trunk has no map.
        deepest, *skips = reversed(SKIPS.values())
        blocks = nn.ModuleList()
        for below, skip, width in zip((deepest, *WIDTHS), (*skips, 0), WIDTHS):
            blocks.append(DecoderBlock(below, skip, width))
        self.decoder = nn.ModuleDict({"blocks": blocks})
        self.segmentation_head = nn.Sequential(nn.Conv2d(WIDTHS[-1], classes, 3, padding=1))

        # smp's and torchvision's trunks were trained with other padding and batch norm constants.
        # Which ones these weights need stands in the state dict, so that it goes wherever they go.
        self.register_buffer("like_smp", torch.tensor(0))
        self.register_load_state_dict_post_hook(lambda net, _: net.set_trunk(bool(net.like_smp)))

    def set_trunk(self, smp: bool) -> None:
        """Padding and batch norm constants of smp's trunk, or of torchvision's."""
        for name, module in self.encoder.named_modules():
            if isinstance(module, PaddedConv):
                module.pads = SMP_PADS[name] if smp else None
            elif isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-3 if smp else 1e-5
                module.momentum = 0.01 if smp else 0.1

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        x = F.pad(x, (0, -W % STRIDE, 0, -H % STRIDE), mode="replicate")
        maps = []
        for i, part in enumerate(self.encoder):
            x = part(x)
            if i in SKIPS:
                maps.append(x)
        # From the deepest map up, each time with the next one.
        x = maps.pop()
        for block in self.decoder["blocks"]:
            skip = maps.pop() if maps else None
            x = block(x, skip)
        return self.segmentation_head(x).float()[..., :H, :W]


# ---- weights

def smp_table(encoder: nn.Module) -> dict[str, str]:
    """Names of smp's encoder -> torchvision's: both list the same blocks in the same order."""
    table = {"_conv_stem": "0.0", "_bn0": "0.1"}
    number = 0  # smp numbers the blocks of all stages together
    for i in range(1, len(encoder)):
        for j, block in enumerate(encoder[i]):
            theirs = f"_blocks.{number}"
            parts = [("_depthwise_conv", "_bn1"), ("_se_reduce", "_se_expand"),
                     ("_project_conv", "_bn2")]
            # The first stage's blocks do not widen.
            if len(block.block) == 4:
                parts.insert(0, ("_expand_conv", "_bn0"))
            for k, (first, second) in enumerate(parts):
                ours = f"{i}.{j}.block.{k}"
                squeeze = first == "_se_reduce"
                table[f"{theirs}.{first}"] = f"{ours}.fc1" if squeeze else f"{ours}.0"
                table[f"{theirs}.{second}"] = f"{ours}.fc2" if squeeze else f"{ours}.1"
            number += 1
    return table


def load_pretrained(net: EfficientNetUnet, path: str) -> dict:
    """Fill `net` from a file or URL -> info (line, sha256, path, norm).

    The file is smp's Unet("efficientnet-b4") or its encoder, or torchvision's efficientnet_b4.
    """
    table = smp_table(net.encoder)

    def convert(sd):
        # One of ours, saved before.
        if "like_smp" in sd:
            return "checkpoint", sd, set(), ()
        if "features.0.0.weight" in sd:
            layout, prefix = "torchvision", "features."
        elif "encoder._conv_stem.weight" in sd:
            layout, prefix = "smp", "encoder."
        elif "_conv_stem.weight" in sd:
            layout, prefix = "smp", ""
        else:
            first = ", ".join(list(sd)[:3])
            raise BadWeights(f"first tensors: {first}; expected smp's Unet('efficientnet-b4') or "
                             "torchvision's efficientnet_b4")

        # What is needed, under our names.
        state = {"like_smp": torch.tensor(int(layout == "smp"))}
        dropped = set()
        for key, t in sd.items():
            name = key.removeprefix(prefix)
            if name.startswith(("_fc.", "classifier.")):
                dropped.add("classifier")
            elif name.startswith(("_conv_head.", "_bn1.", "8.")):
                dropped.add("head convolution")
            elif key.startswith(("decoder.", "segmentation_head.")):
                state[key] = t
            else:
                stem, _, leaf = name.rpartition(".")
                state[f"encoder.{table.get(stem, stem)}.{leaf}"] = t

        # An encoder alone leaves the rest random.
        whole = any(k.startswith("decoder.") for k in sd)
        new = () if whole else ("decoder.", "segmentation_head.")
        return layout, state, dropped, new

    parts = {"encoder", "decoder", "segmentation_head", "features", "classifier", "_conv_stem",
             "_bn0", "_blocks", "_conv_head", "_bn1", "_fc"}
    return load_cnn(net, path, convert, last=("segmentation_head.",), parts=parts,
                    whole=r"segmentation_head\.0\.weight",
                    trunk=r"features\.0\.0\.weight|_conv_stem\.weight")
