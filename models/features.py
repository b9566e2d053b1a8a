"""One vector per image that says what it looks like to a network, taken while the network predicts.

    features = MeanFeatures(net)
    logits = slide(net, x, **window)          however many windows the image has
    vector = features.take()                  (C,) float64, the mean over their pixels
"""
import torch
from torch import nn

from .deeplab import DeepLabV3
from .efficientnet_unet import EfficientNetUnet


def last_map(net: nn.Module) -> nn.Module:
    """The part of a segmentation network whose output is, or ends with, its backbone's last map."""
    if isinstance(net, DeepLabV3):
        return net.backbone.layer4
    if isinstance(net, EfficientNetUnet):
        return net.encoder[-1]
    return net.backbone  # of a ViT (maps, cls), of the UNetFormers the maps


class MeanFeatures:
    """Mean of a backbone's last map, of a ViT its patch tokens, over all windows since take()."""

    def __init__(self, net: nn.Module):
        self.total = 0.0
        self.windows = 0
        last_map(net).register_forward_hook(self.add)

    def add(self, module: nn.Module, inputs: tuple, found: torch.Tensor | tuple | list) -> None:
        """Called by torch with what the backbone returns for a batch of windows."""
        if isinstance(found, tuple):
            found = found[0]
        if isinstance(found, list):
            found = found[-1]
        means = found.double().mean((2, 3))  # (B, C)
        self.total = self.total + means.sum(0)
        self.windows += len(means)

    def take(self) -> torch.Tensor:
        """(C,) float64, and a fresh start for the next image."""
        vector = self.total / self.windows
        self.total = 0.0
        self.windows = 0
        return vector
