"""Networks from an image to class logits: features under a linear or k-NN head, and CNN baselines.

    net = Classifier(ViT(**cfg), nn.Linear(2 * dim, K), "cls+patch")
    logits = net(x)                                                x (B, 3, H, W) -> (B, K)
    probes = fit_linear(features, labels, K, rates=[0.1, 1.0])     one nn.Linear per rate

k-NN follows Wu et al. 2018 and DINO (Caron et al. 2021): the k nearest training images vote with
weight exp(similarity / T).
"""
import math

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

# B batch, K classes, C width of the backbone, D width of the features, N training images.

DISTANCES = 2**26  # of k-NN that are computed at once: 256 MB, and about as much for the sums


class ChannelMeans(nn.Module):
    """The mean of each channel, (B, 3, H, W) -> (B, 3): what a backbone's features have to beat."""

    dim = 3

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Classifier(nn.Module):
    """Features of a backbone -> head -> logits (B, K) fp32.

    features: "cls+patch" (cls token and mean patch token, 2 C wide), "cls", or "mean" for a
    ChannelMeans backbone. A backbone without trainable weights stays in eval mode.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, features: str = "cls+patch"):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.kind = features

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

    def train(self, mode: bool = True) -> "Classifier":
        # A frozen backbone must not change, not even its batch norm statistics.
        super().train(mode)
        if not any(p.requires_grad for p in self.backbone.parameters()):
            self.backbone.eval()
        return self

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D) fp32."""
        if self.kind == "mean":
            return self.backbone(x)
        # As models/vit.py returns them: maps (B, C, h, w), the cls token (B, C).
        maps, cls = self.backbone(x)
        if self.kind == "cls":
            return cls.float()
        patch = maps[-1].float().mean((2, 3))
        return torch.cat([cls.float(), patch], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        # fit_linear() folds a standardisation into the head's weights. It needs all digits.
        with torch.autocast(x.device.type, enabled=False):
            return self.head(features)


class Knn(nn.Module):
    """Weighted k-NN as a head: features (B, D) -> log of the classes' shares of the vote (B, K).

    A vote weighs exp(-d^2 / 2T). unit: features of unit length, where that is DINO's
    exp(cosine / T); otherwise they are standardised by the bank's mean and deviation.
    """

    def __init__(self, n: int, dim: int, classes: int, k: int, temperature: float = 0.07,
                 unit: bool = True):
        super().__init__()
        self.classes = classes
        self.k = k
        self.temperature = temperature
        self.unit = unit
        # The bank holds the features of the training images, ready to compare.
        self.register_buffer("bank", torch.zeros(n, dim))
        self.register_buffer("labels", torch.zeros(n, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def fit(self, features: Tensor, labels: Tensor) -> "Knn":
        """Keep the features (N, D) and labels (N,) of the training images."""
        if not self.unit:
            self.mean.copy_(features.mean(0))
            self.std.copy_(features.std(0, correction=0).clamp(min=1e-6))
        self.bank.copy_(self.comparable(features))
        self.labels.copy_(labels)
        return self

    def comparable(self, features: Tensor) -> Tensor:
        """(B, D) -> the same, of unit length or standardised."""
        if self.unit:
            return F.normalize(features, dim=1)
        return (features - self.mean) / self.std

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            # Of a whole split the distances to a large bank do not fit into memory.
            parts = features.float().split(max(1, DISTANCES // max(1, len(self.bank))))
            return torch.cat([self.votes(self.comparable(part)) for part in parts])

    def votes(self, x: Tensor) -> Tensor:
        """comparable() features (B, D) -> (B, K)."""
        # -d^2 / 2, but for |x|^2 / 2, which all votes share.
        near = x @ self.bank.T - self.bank.square().sum(1) / 2
        # The k nearest, in falling order; with fewer images all of them.
        near, index = near.topk(min(self.k, len(self.bank)), dim=1)
        # Relative to the nearest, so that no exponential is too large.
        votes = ((near - near[:, :1]) / self.temperature).exp()
        total = votes.new_zeros(len(x), self.classes)
        total.scatter_add_(1, self.labels[index], votes)
        # 1e-6 for a class without a vote, whose log would be -inf.
        shares = total / votes.sum(1, keepdim=True)
        return shares.clamp(min=1e-6).log()


def fit_linear(features: Tensor, labels: Tensor, classes: int, rates: list[float],
               epochs: int = 100, batch: int = 256, seed: int = 0) -> list[nn.Linear]:
    """Features (N, D), labels (N,) -> one linear probe per learning rate.

    SGD with momentum 0.9 and a cosine on standardised features; the standardisation is folded into
    the weights. All rates see the same batches, and one product computes them all.
    """
    # A feature that never changes becomes 0: 1e-6 keeps 0 / 0 away.
    mean = features.mean(0)
    std = features.std(0, correction=0).clamp(min=1e-6)
    x = (features - mean) / std
    N, D = x.shape
    R = len(rates)
    device = x.device

    # One probe a learning rate, all side by side along the first axis.
    weight = torch.zeros(R, D, classes, device=device)
    bias = torch.zeros(R, 1, classes, device=device)
    velocities = [torch.zeros_like(weight), torch.zeros_like(bias)]
    rate = torch.tensor(rates, device=device).view(R, 1, 1)
    order = torch.Generator().manual_seed(seed)
    steps_per_epoch = math.ceil(N / batch)
    steps = epochs * steps_per_epoch
    for step in range(steps):
        # Every epoch has its own order, drawn on the CPU: the same on every device.
        if step % steps_per_epoch == 0:
            parts = torch.randperm(N, generator=order).to(device).split(batch)
        i = parts[step % steps_per_epoch]

        # Softmax minus the one-hot label, (R, B, K), is the gradient at the logits. No autograd is
        # needed.
        error = (x[i] @ weight + bias).softmax(2)
        error[:, torch.arange(len(i), device=device), labels[i]] -= 1
        gradients = x[i].T @ error, error.sum(1, keepdim=True)

        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for t, velocity, gradient in zip((weight, bias), velocities, gradients):
            velocity.mul_(0.9).add_(gradient / len(i))
            t.sub_(rate * cosine * velocity)

    # On features that are not standardised, w / std and b - mean w / std give the same logits.
    probes = []
    for w, b in zip(weight / std[:, None], bias):  # (D, K), (1, K)
        probe = nn.Linear(D, classes, device=device)
        probe.load_state_dict({"weight": w.T, "bias": b[0] - mean @ w})
        probes.append(probe)
    return probes


# ---- CNN baselines

class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, (B, inside, h, w) -> (B, outside, h / stride, ..)."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        # As in ResNet-D the shortcut takes the mean of the pixels that a stride would leave out.
        self.skip = nn.Sequential()
        if inside != outside or stride != 1:
            self.skip = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True),
                nn.Conv2d(inside, outside, 1, bias=False),
                nn.BatchNorm2d(outside),
            )

    def forward(self, x: Tensor) -> Tensor:
        skip = self.skip(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return F.relu(skip + x)


class NanoCnn(nn.Module):
    """A small residual net for images of about 64 x 64, (B, 3, H, W) -> (B, K).

    Each stage is one block and halves the size. A CPU can train it.
    fold: as many rows and columns of pixels become channels first. 2 costs a quarter of 1.
    """

    def __init__(self, classes: int, widths: tuple = (32, 64, 128, 256), fold: int = 2):
        super().__init__()
        self.fold = fold
        self.stem = nn.Sequential(
            nn.Conv2d(3 * fold**2, widths[0], 3, 1, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        stages = [Residual(a, b, 2) for a, b in zip(widths, widths[1:])]
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        # Odd rows and columns at the end are mirrored.
        x = F.pad(x, (0, -x.shape[-1] % self.fold, 0, -x.shape[-2] % self.fold), mode="reflect")
        x = F.pixel_unshuffle(x, self.fold)
        x = self.stages(self.stem(x))
        return self.fc(x.mean((2, 3)))


CNNS = ("nano", "resnet18", "resnet50")


def cnn(name: str, stem: str, classes: int, fold: int = 2) -> nn.Module:
    """One of CNNS whose fc has `classes` outputs. fold: of NanoCnn.

    stem: a ResNet starts with a 7x7 convolution and pool ("imagenet") or a 3x3 convolution of
    stride 2 ("small"). With "imagenet" torchvision's weight files fit, by its parameter names.
    """
    if name == "nano":
        return NanoCnn(classes, fold=fold)
    net = getattr(torchvision.models, name)(weights=None, num_classes=classes)
    # The usual stem makes maps of a quarter of the image, too coarse for one of 64 x 64.
    if stem == "small":
        net.conv1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
        net.maxpool = nn.Identity()
    return net
