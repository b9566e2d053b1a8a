"""DeepLabV3 on ResNet-50 (Chen et al. 2017, arXiv 1706.05587) with torchvision's parameter names and numbers.

    net = DeepLabV3(classes=8, output_stride=8)
    info = load_pretrained(net, "deeplabv3_resnet50_coco-cd0a2569.pth")    or a resnet50 file: the trunk alone
    logits = net.eval()(x)                        x (B, 3, H, W) normalised -> (B, K, H, W) fp32, any H and W
    logits, aux = net.train()(x)                  the auxiliary head's logits too, of the same size

At output stride 8 it is torchvision's deeplabv3_resnet50; 16 is the paper's other setting: the last stage alone is
dilated, and the rates of the pyramid are halved with the stride. 42.0 M parameters with the auxiliary head.
Unlike the ViTs here, train() differs from eval(): batch statistics, and dropout of .5 and .1 in the two heads.
"""
# B batch, K classes, H W pixels, h w = H W / output_stride, rounded up
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet50

from .weights import BadWeights, load_cnn

# stride: (dilate instead of striding in layers 2, 3 and 4; rates of the three dilated branches)
STRIDES = {8: ((False, True, True), (12, 24, 36)), 16: ((False, False, True), (6, 12, 18))}


def conv(dim: int, width: int, kernel: int = 1, dilation: int = 1) -> list[nn.Module]:
    """Convolution that keeps h and w, batch norm, ReLU."""
    same = dilation * (kernel // 2)
    layer = nn.Conv2d(dim, width, kernel, padding=same, dilation=dilation, bias=False)
    return [layer, nn.BatchNorm2d(width), nn.ReLU()]


class Aspp(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1, three dilated 3x3 and the image's mean, side by side, then joined."""

    def __init__(self, dim: int, rates: tuple[int, int, int], width: int = 256):
        super().__init__()
        self.convs = nn.ModuleList([nn.Sequential(*conv(dim, width))])
        self.convs.extend(nn.Sequential(*conv(dim, width, 3, rate)) for rate in rates)
        self.convs.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv(dim, width)))
        self.project = nn.Sequential(*conv(len(self.convs) * width, width), nn.Dropout(0.5))

    def forward(self, x):  # (B, C, h, w) -> (B, 256, h, w)
        branches = [branch(x) for branch in self.convs]
        branches[-1] = branches[-1].expand_as(branches[0])  # one value per image, everywhere
        return self.project(torch.cat(branches, dim=1))


class DeepLabV3(nn.Module):
    """(B, 3, H, W) normalised -> logits (B, K, H, W) fp32; in train mode with `aux` the pair (logits, aux logits).

    Batch norm has no variance over one value, as the pooled branch gives for one image: a batch of 1 trains only after
    freeze_bn(), and is a ValueError before.
    """

    def __init__(self, classes: int, output_stride: int = 16, aux: bool = True):
        super().__init__()
        if output_stride not in STRIDES:
            raise ValueError(f"output stride {output_stride}; expected 8 or 16")
        dilate, rates = STRIDES[output_stride]
        self.backbone = resnet50(weights=None, replace_stride_with_dilation=dilate)
        del self.backbone.avgpool, self.backbone.fc
        self.classifier = nn.Sequential(Aspp(2048, rates), *conv(256, 256, 3), nn.Conv2d(256, classes, 1))
        self.aux_classifier = None
        if aux:
            self.aux_classifier = nn.Sequential(*conv(1024, 256, 3), nn.Dropout(0.1), nn.Conv2d(256, classes, 1))
        self.bn_frozen = False

    def freeze_bn(self) -> "DeepLabV3":
        """From now on batch norm keeps the statistics it has, in train mode too; its scale and shift still learn."""
        self.bn_frozen = True
        return self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.modules() if self.bn_frozen else ():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x):
        if self.training and len(x) == 1 and not self.bn_frozen:
            raise ValueError("batch size 1 cannot train BatchNorm; use --batch-size 2 or more, or --freeze-bn")
        trunk, size = self.backbone, x.shape[-2:]

        def up(logits):  # torchvision's alignment: half pixels at the ends, whatever H and W are
            return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)

        x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(x))))
        third = trunk.layer3(trunk.layer2(trunk.layer1(x)))
        logits = up(self.classifier(trunk.layer4(third)))  # before the other head: torchvision's order of random draws
        if self.training and self.aux_classifier is not None:
            return logits, up(self.aux_classifier(third))
        return logits


def load_pretrained(net: DeepLabV3, path: str) -> dict:
    """Fill `net` from a torchvision resnet50 or deeplabv3_resnet50 file, strictly -> info (line, sha256, path, norm).

    A trunk leaves both heads random, another number of classes their last convolutions, and "line" says so.
    """
    def convert(sd):
        dropped = set()
        if "backbone.conv1.weight" in sd and "classifier.0.project.0.weight" in sd:
            layout, state = "torchvision deeplabv3_resnet50", dict(sd)
            new = () if any(k.startswith("aux_classifier.") for k in sd) else ("aux_classifier.",)
        elif "layer1.0.conv3.weight" in sd:
            layout, new = "torchvision resnet50", ("classifier.", "aux_classifier.")
            state = {f"backbone.{k}": t for k, t in sd.items() if not k.startswith("fc.")}
            dropped = {"classifier"} if len(state) < len(sd) else dropped
        else:
            raise BadWeights(f"neither a resnet50 nor a deeplabv3_resnet50 of torchvision (first tensors: "
                             f"{', '.join(list(sd)[:3])}); expected one of the two")
        if net.aux_classifier is None and not new:
            state = {k: t for k, t in state.items() if not k.startswith("aux_classifier.")}
            dropped = {"auxiliary head"}
        for name, t in net.state_dict().items():
            if name.endswith("num_batches_tracked"):  # files from before torch 0.4.1 have no such counters
                state.setdefault(name, t)
        return layout, state, dropped, new

    return load_cnn(net, path, convert, last=("classifier.4.", "aux_classifier.4."))
