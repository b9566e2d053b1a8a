"""DeepLabV3 on ResNet-50 (Chen et al. 2017, arXiv 1706.05587), torchvision's names and numbers.

    net = DeepLabV3(classes=8, output_stride=8)
    info = load_pretrained(net, "deeplabv3_resnet50_coco-cd0a2569.pth")
    logits = net.eval()(x)           x (B, 3, H, W) normalised -> (B, K, H, W) fp32, any H and W
    logits, aux = net.train()(x)     the auxiliary head's logits too, of the same size

At output stride 8 it is torchvision's deeplabv3_resnet50. 16 is the paper's other setting: the last
stage alone is dilated, and the rates of the pyramid are halved with the stride. 42.0 M parameters
with the auxiliary head. A resnet50 file loads too, into the trunk alone. Unlike the ViTs here,
train() differs from eval(): batch statistics, and dropout of .5 and .1 in the two heads.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50

from .weights import RESNET_PARTS, BadWeights, load_cnn

# B batch, K classes, C channels, H W pixels, h w = H W / output_stride, rounded up.

# Output stride -> does layer 2, 3, 4 dilate instead of striding?
DILATED = {8: (False, True, True), 16: (False, False, True)}
# Output stride -> rates of the pyramid's three dilated branches.
RATES = {8: (12, 24, 36), 16: (6, 12, 18)}


def conv_bn_relu(dim: int, width: int, kernel: int = 1, dilation: int = 1) -> list[nn.Module]:
    """Convolution that keeps h and w, batch norm, ReLU."""
    same = dilation * (kernel // 2)
    layer = nn.Conv2d(dim, width, kernel, padding=same, dilation=dilation, bias=False)
    return [layer, nn.BatchNorm2d(width), nn.ReLU()]


class Aspp(nn.Module):
    """Atrous spatial pyramid pooling, (B, C, h, w) -> (B, 256, h, w).

    A 1x1, three dilated 3x3 and the image's mean, side by side, then joined.
    """

    def __init__(self, dim: int, rates: tuple[int, int, int], width: int = 256):
        super().__init__()
        self.convs = nn.ModuleList([nn.Sequential(*conv_bn_relu(dim, width))])
        for rate in rates:
            self.convs.append(nn.Sequential(*conv_bn_relu(dim, width, 3, rate)))
        self.convs.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(dim, width)))
        joined = len(self.convs) * width
        self.project = nn.Sequential(*conv_bn_relu(joined, width), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        branches = [branch(x) for branch in self.convs]
        # The image's mean is one value per channel, the same everywhere.
        branches[-1] = branches[-1].expand_as(branches[0])
        return self.project(torch.cat(branches, dim=1))


class DeepLabV3(nn.Module):
    """(B, 3, H, W) normalised -> logits (B, K, H, W) fp32.

    In train mode with `aux` it is the pair (logits, aux logits).
    """

    def __init__(self, classes: int, output_stride: int = 16, aux: bool = True):
        super().__init__()
        if output_stride not in DILATED:
            raise ValueError(f"output stride {output_stride}; expected 8 or 16")
        dilated = DILATED[output_stride]
        self.backbone = resnet50(weights=None, replace_stride_with_dilation=dilated)
        # ResNet-50's own classifier is no part of it.
        del self.backbone.avgpool, self.backbone.fc
        # 2048 and 1024 channels: of ResNet-50's layers 4 and 3.
        pyramid = Aspp(2048, RATES[output_stride])
        self.classifier = nn.Sequential(
            pyramid, *conv_bn_relu(256, 256, 3), nn.Conv2d(256, classes, 1))
        self.aux_classifier = None
        if aux:
            self.aux_classifier = nn.Sequential(
                *conv_bn_relu(1024, 256, 3), nn.Dropout(0.1), nn.Conv2d(256, classes, 1))
        self.bn_frozen = False

    def freeze_bn(self) -> "DeepLabV3":
        """From now on batch norm keeps its statistics, in train mode too; scale and shift learn."""
        self.bn_frozen = True
        return self.train(self.training)

    def train(self, mode: bool = True) -> "DeepLabV3":
        super().train(mode)
        if self.bn_frozen:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        # The pooled branch gives one value per image, and one value has no variance.
        if self.training and len(x) == 1 and not self.bn_frozen:
            raise ValueError("batch size 1 cannot train BatchNorm; use --batch-size 2 or more, "
                             "or --freeze-bn")
        size = x.shape[-2:]

        def up(logits):
            # torchvision's alignment: half pixels at the ends, whatever H and W are.
            return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)

        trunk = self.backbone
        x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(x))))
        # Layer 3 feeds the auxiliary head too.
        third = trunk.layer3(trunk.layer2(trunk.layer1(x)))
        fourth = trunk.layer4(third)
        # The main head goes first, for torchvision's order of random draws.
        logits = up(self.classifier(fourth))
        if self.training and self.aux_classifier is not None:
            return logits, up(self.aux_classifier(third))
        return logits


# ---- weights

def load_pretrained(net: DeepLabV3, path: str) -> dict:
    """Fill `net` from torchvision's resnet50 or deeplabv3_resnet50 file or URL, strictly.

    -> info (line, sha256, path, norm). A trunk leaves both heads random, another number of classes
    their last convolutions, and "line" says so.
    """
    def convert(sd):
        # A whole DeepLabV3, with or without the auxiliary head, or a trunk alone.
        dropped = set()
        if "backbone.conv1.weight" in sd and "classifier.0.project.0.weight" in sd:
            layout = "torchvision deeplabv3_resnet50"
            state = dict(sd)
            with_aux = any(k.startswith("aux_classifier.") for k in sd)
            new = () if with_aux else ("aux_classifier.",)
        elif "layer1.0.conv3.weight" in sd:
            layout = "torchvision resnet50"
            state = {f"backbone.{k}": t for k, t in sd.items() if not k.startswith("fc.")}
            if len(state) < len(sd):
                dropped = {"classifier"}
            new = ("classifier.", "aux_classifier.")
        else:
            first = ", ".join(list(sd)[:3])
            raise BadWeights("neither a resnet50 nor a deeplabv3_resnet50 of torchvision "
                             f"(first tensors: {first}); expected one of the two")

        # Without `aux` the net has no place for the auxiliary head of a whole file.
        if net.aux_classifier is None and not new:
            state = {k: t for k, t in state.items() if not k.startswith("aux_classifier.")}
            dropped = {"auxiliary head"}
        # Files from before torch 0.4.1 do not count batches.
        for name, t in net.state_dict().items():
            if name.endswith("num_batches_tracked"):
                state.setdefault(name, t)
        return layout, state, dropped, new

    return load_cnn(net, path, convert, last=("classifier.4.", "aux_classifier.4."),
                    whole=r"classifier\.0\.project\.0\.weight", trunk=r"layer1\.0\.conv3\.weight",
                    parts=RESNET_PARTS | {"backbone", "classifier", "aux_classifier"})
