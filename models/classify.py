"""Networks from an image to class logits: frozen or trained features under a linear or k-NN head, and CNN baselines.

    net = Classifier(ViT(**cfg), nn.Linear(2 * dim, K), "cls+patch"); net(x)     x (B, 3, H, W) -> (B, K)
    probes = fit_linear(features, labels, K, rates=[0.1, 1.0])     one nn.Linear per rate, trained at once

k-NN: Wu et al. 2018 and DINO (Caron et al. 2021): the k nearest training images vote with weight exp(similarity / T).
"""
import math

import torch
import torch.nn.functional as F
import torchvision
from torch import nn


class ChannelMeans(nn.Module):
    """The mean of each channel: what a backbone's features have to beat."""

    dim = 3

    def forward(self, x):  # (B, 3, H, W) -> (B, 3)
        return x.mean((2, 3))


class Classifier(nn.Module):
    """Features of a backbone -> head -> logits (B, K) fp32. A backbone without trainable weights stays in eval mode.

    features: "cls+patch" (cls token and mean patch token, 2 C wide), "cls", or "mean" for a ChannelMeans backbone.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, features: str = "cls+patch"):
        super().__init__()
        self.backbone, self.head, self.kind = backbone, head, features

    def unfreeze(self, blocks: int | None) -> int:
        """Train the head and the last `blocks` of the backbone; None: the whole backbone -> how many blocks."""
        depth = self.backbone.depth
        if blocks is None:
            return depth
        blocks = min(blocks, depth)
        self.backbone.requires_grad_(False)
        self.backbone.blocks[depth - blocks:].requires_grad_(True)
        self.backbone.norm.requires_grad_(blocks > 0)
        return blocks

    def train(self, mode: bool = True):
        super().train(mode)
        if not any(p.requires_grad for p in self.backbone.parameters()):
            self.backbone.eval()
        return self

    def features(self, x):  # (B, 3, H, W) -> (B, D) fp32
        if self.kind == "mean":
            return self.backbone(x)
        maps, cls = self.backbone(x)
        parts = [cls.float()] if self.kind == "cls" else [cls.float(), maps[-1].float().mean((2, 3))]
        return torch.cat(parts, dim=1)

    def forward(self, x):
        f = self.features(x)
        with torch.autocast(x.device.type, enabled=False):  # a probe's standardisation, folded in, needs all digits
            return self.head(f)


class Knn(nn.Module):
    """Weighted k-NN as a head: features (B, D) -> log of the classes' shares of the vote (B, K).

    A vote weighs exp(-d^2 / 2T); on features of unit length (`unit`) that is DINO's exp(cosine / T). Without `unit`
    the features are standardised by the bank's mean and deviation instead.
    """

    def __init__(self, n: int, dim: int, classes: int, k: int, temperature: float = 0.07, unit: bool = True):
        super().__init__()
        self.classes, self.k, self.temperature, self.unit = classes, k, temperature, unit
        self.register_buffer("bank", torch.zeros(n, dim))  # features of the training images, ready to compare
        self.register_buffer("labels", torch.zeros(n, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def fit(self, features, labels):
        """features (N, D), labels (N,) of the training images."""
        if not self.unit:
            self.mean.copy_(features.mean(0))
            self.std.copy_(features.std(0, correction=0).clamp(min=1e-6))
        self.bank.copy_(self.compare(features))
        self.labels.copy_(labels)
        return self

    def compare(self, f):
        return F.normalize(f, dim=1) if self.unit else (f - self.mean) / self.std

    def forward(self, f):
        with torch.autocast(f.device.type, enabled=False):
            f = self.compare(f.float())
            near = f @ self.bank.T - self.bank.square().sum(1) / 2  # -d^2 / 2 up to |f|^2, which all votes share
            near, index = near.topk(min(self.k, len(self.bank)), dim=1)
            votes = ((near - near[:, :1]) / self.temperature).exp()
            total = votes.new_zeros(len(f), self.classes).scatter_add_(1, self.labels[index], votes)
            return (total / votes.sum(1, keepdim=True)).clamp(min=1e-6).log()


def fit_linear(features: torch.Tensor, labels: torch.Tensor, classes: int, rates: list[float], epochs: int = 100,
               batch: int = 256, seed: int = 0) -> list[nn.Linear]:
    """(N, D) features, (N,) labels -> one linear probe per learning rate: all see the same batches in one product.

    SGD with momentum 0.9 and a cosine on standardised features; the standardisation is folded into the weights.
    """
    mean, std = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    x, N, R = (features - mean) / std, len(features), len(rates)
    weight = torch.zeros(R, x.shape[1], classes, device=x.device)
    bias = torch.zeros(R, 1, classes, device=x.device)
    rate, speed = torch.tensor(rates, device=x.device).view(R, 1, 1), [torch.zeros_like(t) for t in (weight, bias)]
    order, steps = torch.Generator().manual_seed(seed), epochs * math.ceil(N / batch)
    for step in range(steps):
        if step % math.ceil(N / batch) == 0:
            parts = torch.randperm(N, generator=order).to(x.device).split(batch)
        i = parts[step % len(parts)]
        error = (x[i] @ weight + bias).softmax(2)  # (R, B, K); minus the one-hot label: the gradient at the logits
        error[:, torch.arange(len(i), device=x.device), labels[i]] -= 1
        fall = 0.5 * (1 + math.cos(math.pi * step / steps))
        for t, v, gradient in ((weight, speed[0], x[i].T @ error), (bias, speed[1], error.sum(1, keepdim=True))):
            v.mul_(0.9).add_(gradient / len(i))
            t.sub_(rate * fall * v)
    probes = []
    for w, b in zip(weight / std[:, None], bias):
        probe = nn.Linear(*w.shape, device=w.device)
        probe.load_state_dict({"weight": w.T, "bias": b[0] - mean @ w})
        probes.append(probe)
    return probes


class Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.skip = nn.Sequential() if (inside, stride) == (outside, 1) else nn.Sequential(
            nn.AvgPool2d(stride), nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x):  # (B, inside, h, w) -> (B, outside, h / stride, w / stride)
        return F.relu(self.skip(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class NanoCnn(nn.Module):
    """A residual net for images of 64 x 64 or so, small enough for a CPU; stages of one block, each half the size."""

    def __init__(self, classes: int, widths: tuple = (32, 64, 128, 256)):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.stages = nn.Sequential(*(Residual(a, b, 2) for a, b in zip(widths, widths[1:])))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x):  # (B, 3, H, W) -> (B, K)
        return self.fc(self.stages(self.stem(x)).mean((2, 3)))


CNNS = ("nano", "resnet18", "resnet50")


def cnn(name: str, stem: str, classes: int) -> nn.Module:
    """CNN with fc of `classes` outputs. stem "small" gives a ResNet a 3x3 stride-2 convolution instead of 7x7 and pool.

    torchvision's parameter names, so its weight files fit a ResNet with the stem "imagenet".
    """
    if name == "nano":
        return NanoCnn(classes)
    net = getattr(torchvision.models, name)(weights=None, num_classes=classes)
    if stem == "small":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 2, 1, bias=False), nn.Identity()
    return net
