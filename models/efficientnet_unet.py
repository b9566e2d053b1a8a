"""U-Net on EfficientNet-B4 (Tan & Le 2019): logits (B, K, H, W) for any H x W.

    net = EfficientNetUnet(8); info = load_pretrained(net, "unet_b4.safetensors"); print(info["line"])

The network of segmentation-models-pytorch (smp), whose checkpoints load and give its logits, on torchvision's trunk,
whose weight file loads too. smp counts 20.23 M parameters at 8 classes, of which 0.81 M are a head convolution that it
never runs: it is not here (19.42 M).
"""
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from .weights import BadWeights, load_cnn

STRIDE = 32  # images are padded to whole pixels of the deepest map
SKIPS = {0: 48, 2: 32, 3: 56, 5: 160, 7: 448}  # number of the trunk's part: channels of its map, at 1/2, 1/4, ... 1/32
WIDTHS = (256, 128, 64, 32, 16)
# smp pads a strided convolution as is right for an image of 380 pixels, at every size: (left, right, top, bottom)
SMP_PADS = {"0.0": (0, 1, 0, 1), "2.0.block.1.0": (0, 1, 0, 1), "3.0.block.1.0": (2, 2, 2, 2),
            "4.0.block.1.0": (0, 1, 0, 1), "6.0.block.1.0": (1, 2, 1, 2)}


class PaddedConv(nn.Conv2d):
    """A convolution that may pad the two sides differently."""
    pads = None  # (left, right, top, bottom) in place of its own padding

    def forward(self, x):
        if self.pads is None:
            return super().forward(x)
        return F.conv2d(F.pad(x, self.pads), self.weight, None, self.stride, 0, self.dilation, self.groups)


class DecoderBlock(nn.Module):
    def __init__(self, below: int, skip: int, width: int):
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Sequential(nn.Conv2d(a, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            for a in (below + skip, width))

    def forward(self, x, skip=None):  # (B, C, h, w) -> (B, width, 2h, 2w)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv2(self.conv1(x if skip is None else torch.cat([x, skip], 1)))


class EfficientNetUnet(nn.Module):
    """x (B, 3, H, W) normalised -> logits (B, K, H, W) fp32; load_pretrained() chooses the trunk's arithmetic."""

    def __init__(self, classes: int):
        super().__init__()
        self.encoder = torchvision.models.efficientnet_b4().features[:8]  # without the head convolution
        for m in list(self.encoder.modules()):
            if isinstance(m, nn.Sequential) and isinstance(m[0], nn.Conv2d) and m[0].stride == (2, 2):
                old = m[0]
                m[0] = PaddedConv(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding,
                                  groups=old.groups, bias=False)
                m[0].weight = old.weight
        self.decoder = nn.ModuleDict({"blocks": nn.ModuleList(
            DecoderBlock(below, skip, width)
            for below, skip, width in zip((448, *WIDTHS), (160, 56, 32, 48, 0), WIDTHS))})
        self.segmentation_head = nn.Sequential(nn.Conv2d(WIDTHS[-1], classes, 3, padding=1))
        # smp's and torchvision's trunks were trained with other padding and batch norm constants. Which ones these
        # weights need stands in the state dict, so that it goes wherever they go.
        self.register_buffer("like_smp", torch.tensor(0))
        self.register_load_state_dict_post_hook(lambda net, _: net.set_trunk(bool(net.like_smp)))

    def set_trunk(self, smp: bool) -> None:
        """Padding and batch norm constants of smp's trunk, or of torchvision's."""
        for name, m in self.encoder.named_modules():
            if isinstance(m, PaddedConv):
                m.pads = SMP_PADS[name] if smp else None
            elif isinstance(m, nn.BatchNorm2d):
                m.eps, m.momentum = (1e-3, 0.01) if smp else (1e-5, 0.1)

    def forward(self, x):
        H, W = x.shape[2:]
        x = F.pad(x, (0, -W % STRIDE, 0, -H % STRIDE), mode="replicate")
        skips = []
        for i, part in enumerate(self.encoder):
            x = part(x)
            if i in SKIPS:
                skips.append(x)
        x = skips.pop()
        for block in self.decoder["blocks"]:
            x = block(x, skips.pop() if skips else None)
        return self.segmentation_head(x).float()[..., :H, :W]


# ---- weights

def smp_table(encoder: nn.Module) -> dict:
    """Names of smp's encoder -> torchvision's: both list the same blocks in the same order."""
    table, number = {"_conv_stem": "0.0", "_bn0": "0.1"}, 0
    for i, stage in enumerate(encoder):
        for j, block in enumerate(stage if i else ()):
            parts = [("_depthwise_conv", "_bn1"), ("_se_reduce", "_se_expand"), ("_project_conv", "_bn2")]
            parts = [("_expand_conv", "_bn0")] * (len(block.block) == 4) + parts
            for k, pair in enumerate(parts):
                squeeze = pair[0] == "_se_reduce"
                for theirs, ours in zip(pair, ("fc1", "fc2") if squeeze else ("0", "1")):
                    table[f"_blocks.{number}.{theirs}"] = f"{i}.{j}.block.{k}.{ours}"
            number += 1
    return table


def load_pretrained(net: EfficientNetUnet, path: str) -> dict:
    """Fill `net` from smp's Unet("efficientnet-b4") or its encoder, or torchvision's efficientnet_b4 -> info."""
    table = smp_table(net.encoder)

    def convert(sd):
        whole = any(k.startswith("decoder.") for k in sd)
        if "like_smp" in sd:
            return "checkpoint", sd, set(), ()
        if "features.0.0.weight" in sd:
            layout, prefix = "torchvision", "features."
        elif "encoder._conv_stem.weight" in sd or "_conv_stem.weight" in sd:
            layout, prefix = "smp", "encoder." if "encoder._conv_stem.weight" in sd else ""
        else:
            raise BadWeights(f"first tensors: {', '.join(list(sd)[:3])}; expected smp's Unet('efficientnet-b4') or "
                             "torchvision's efficientnet_b4")
        state, dropped = {"like_smp": torch.tensor(int(layout == "smp"))}, set()
        for key, t in sd.items():
            name = key.removeprefix(prefix)
            stem, _, leaf = name.rpartition(".")
            if name.startswith(("_fc.", "classifier.")):
                dropped.add("classifier")
            elif name.startswith(("_conv_head.", "_bn1.", "8.")):
                dropped.add("head convolution")
            elif key.startswith(("decoder.", "segmentation_head.")):
                state[key] = t
            else:
                state["encoder." + table.get(stem, stem) + "." + leaf] = t
        return layout, state, dropped, () if whole else ("decoder.", "segmentation_head.")

    return load_cnn(net, path, convert, last=("segmentation_head.",))
