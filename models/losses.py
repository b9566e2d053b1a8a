"""Segmentation losses that do not depend on how a batch is cut into ranks.

    terms = parse_loss("ce+0.5*dice")
    loss = weighted_sum(terms, net(x), y, count=count, total=total)
    (loss * world).backward()  # DDP averages gradients over ranks; these are made to be summed

logits (B, K, H, W) of any float type; y (B, H, W) int64 in 0..K-1, or IGNORE.
count: valid pixels of the step, over all ranks and accumulated micro-batches; None = of this batch.
total: sums a detached tensor over ranks, called once per set-based term; None = one rank.

Values and gradients of all ranks and micro-batches add up to the loss of the step and its gradient.
Pixel-wise terms (ce, focal, lovasz) are a local sum over count. Set-based terms (dice, boundary)
are ratios of sums per class, which need all their pixels at once: `total` brings those of the other
ranks, and each rank holds its share of the value. A micro-batch is a set of its own, scaled by its
share of count, so that micro-batches add up to a mean.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from data.common import IGNORE, BadInput, number

# B batch, K classes, H W pixels.


# ---- what the terms share

def at_least_fp32(logits: Tensor) -> Tensor:
    """Half types as float32, where sums over pixels are safe; double stays, gradcheck needs it."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def class_masks(y: Tensor, K: int) -> Tensor:
    """(B, H, W) -> (B, K, H, W) bool; an ignored pixel is in no class. An eighth of F.one_hot."""
    classes = torch.arange(K, device=y.device)
    return y[:, None] == classes[:, None, None]


def pixel_count(y: Tensor, count: Tensor | None) -> Tensor:
    """What a pixel-wise sum is divided by."""
    if count is None:
        count = (y != IGNORE).sum()
    return count.clamp(min=1)  # a batch without labels gives 0, not NaN


def add_other_ranks(local: Tensor, total: Callable | None) -> Tensor:
    """Sums of this rank -> value of all ranks, gradient of this one."""
    if total is None:
        return local
    # A collective may work in place, so it gets a copy.
    own = local.detach()
    return local + (total(own.clone()) - own)


def mean_of_classes(loss: Tensor, there: Tensor, own: Tensor, n: Tensor,
                    count: Tensor | None) -> Tensor:
    """This rank's share of the mean of `loss` (K,) over the classes `there` (K,), times n / count.

    own, n: valid pixels of this rank and of all ranks; count: those of all micro-batches too.
    """
    value = (loss * there).sum() / there.sum().clamp(min=1)
    if count is not None:
        value = value * (n / count.clamp(min=1))
    # Each rank computes the value of all. It keeps the part that belongs to its own pixels, and of
    # the gradient everything, since only its own sums have one.
    others = 1 - own / n.clamp(min=1)
    return value - value.detach() * others


# ---- pixel-wise terms

def ce(logits: Tensor, y: Tensor, count: Tensor | None = None,
       class_weights: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy over the count of valid pixels; weights (K,) and smoothing as in torch."""
    # torch's weighted mean divides by the weights met in the batch, so the share of a rank or
    # micro-batch would depend on its classes. The count does not, and class_weights() has pixel
    # mean 1, so the size of the loss stays the same.
    x = at_least_fp32(logits)
    w = None if class_weights is None else class_weights.to(x)
    loss = F.cross_entropy(
        x, y, w, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    return loss / pixel_count(y, count)


def focal(logits: Tensor, y: Tensor, count: Tensor | None = None,
          class_weights: Tensor | None = None, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al. 2017): cross-entropy times (1 - p)^gamma; gamma >= 1.

    p is the softmax at the true class.
    """
    x = at_least_fp32(logits)
    nll = F.cross_entropy(x, y, ignore_index=IGNORE, reduction="none")  # (B, H, W), 0 if ignored
    miss = -torch.expm1(-nll)  # 1 - p; expm1 keeps its digits when p is near 1
    loss = miss ** gamma * nll
    if class_weights is not None:
        label = y.where(y != IGNORE, 0)
        loss = loss * class_weights.to(loss)[label]
    return loss.sum() / pixel_count(y, count)


def lovasz(logits: Tensor, y: Tensor, count: Tensor | None = None) -> Tensor:
    """Lovasz-Softmax (Berman et al. 2018) per image over the classes present in it.

    Images weigh by their valid pixels.
    """
    # Per image, because no sum over ranks gives the sort of a whole batch. By valid pixels, so that
    # count is enough to be exact, and an image with three labels does not weigh as much as a full
    # one. With full crops it is the plain mean.
    p = at_least_fp32(logits).softmax(1).flatten(2)  # (B, K, HW)
    true = class_masks(y, p.shape[1]).flatten(2)  # (B, K, HW)
    valid = (y != IGNORE).flatten(1)  # (B, HW)

    # Errors from large to small. Ignored pixels come last.
    error = (p - true.to(p)).abs()
    error = error.masked_fill(~valid[:, None], -1)
    error, order = error.sort(2, descending=True)
    hit = true.gather(2, order)

    # M = the k largest errors has Jaccard loss 1 - left / union, with left = true and outside M,
    # union = true or in M. The weight of an error is what its pixel adds to that loss. It is
    # written out, since the usual difference of two losses near 1 loses digits. Ignored pixels
    # add 0, because nothing is left when they come. float32 counts up to 2^24 pixels an image.
    size = hit.sum(2, keepdim=True)
    left = size - hit.cumsum(2, dtype=p.dtype)
    union = size + (~hit).cumsum(2, dtype=p.dtype)
    weight = torch.where(hit, 1 / union, left / union / (union - 1).clamp(min=1))

    there = true.any(2)  # (B, K)
    image = (error * weight).sum(2) * there
    image = image.sum(1) / there.sum(1).clamp(min=1)  # (B,)
    return (image * valid.sum(1)).sum() / pixel_count(y, count)


# ---- set-based terms

def dice(logits: Tensor, y: Tensor, count: Tensor | None = None,
         total: Callable | None = None) -> Tensor:
    """1 - soft Dice, mean over the classes that have a true pixel on any rank."""
    p = at_least_fp32(logits).softmax(1)
    true = class_masks(y, p.shape[1])
    valid = (y != IGNORE)[:, None]

    # Per class (K,): pixels in both, predicted, true.
    sums = [t.sum((0, 2, 3)).to(p) for t in (p * true, p * valid, true)]
    both, predicted, size = add_other_ranks(torch.stack(sums), total)
    # No eps is needed: a class that counts has at least one true pixel.
    loss = 1 - 2 * both / (predicted + size).clamp(min=1)
    return mean_of_classes(loss, size > 0, true.sum(), size.sum(), count)


def boundary(logits: Tensor, y: Tensor, count: Tensor | None = None,
             total: Callable | None = None, theta0: int = 3, theta: int = 5) -> Tensor:
    """1 - boundary F1 (Bokhovkin & Burnaev 2019), mean over the classes with a true boundary.

    Window sizes in pixels, both odd: theta0 sets how thick a boundary is, theta // 2 how far off it
    may lie. Alone this term invents edges near the true ones
    (yiskw713/boundary_loss_for_remote_sensing#1): use it beside ce or dice.
    """
    def pool(x, k):
        return F.max_pool2d(x, k, 1, k // 2)  # pads with -inf: the image's edge is no boundary

    def edge(q):
        # 1 on pixels of a class that have another class beside them. In the paper it is
        # pool(1 - q) - (1 - q), which is the same.
        return q + pool(-q, theta0)

    p = at_least_fp32(logits).softmax(1)
    true = class_masks(y, p.shape[1])

    # All that a kept pixel looks at lies within theta0 // 2 + theta // 2 of it. None of that may
    # be ignored.
    ignored = (y == IGNORE)[:, None].to(p)
    keep = pool(ignored, theta0 + theta - 1) == 0  # (B, 1, H, W)

    # Per class (K,): predicted boundary near a true one, all predicted, true near predicted, all.
    e, t = edge(p), edge(true.to(p))
    maps = [e * pool(t, theta) * keep, e * keep, t * pool(e, theta) * keep, t * keep, true]
    sums = [m.sum((0, 2, 3)).to(p) for m in maps]
    e_near, e_all, t_near, t_all, size = add_other_ranks(torch.stack(sums), total)

    # With less than one pixel of predicted boundary, as from a head that starts at zero, the slope
    # of the precision would have no bound: hence the clamp. And 2PR / (P + R) alone is flat at
    # P = R = 0, just where an edge that misses needs a push: hence 1e-7.
    precision = e_near / e_all.clamp(min=1) + 1e-7
    recall = t_near / t_all.clamp(min=1) + 1e-7
    f1 = 2 * precision * recall / (precision + recall)
    return mean_of_classes(1 - f1, t_all > 0, true.sum(), size.sum(), count)


# ---- distillation

def kl(logits: Tensor, target: Tensor, y: Tensor, temperature: float = 1.0,
       count: Tensor | None = None, known: Tensor | None = None) -> Tensor:
    """T^2 KL(target, softmax(logits / T)) over the count of valid pixels (Hinton et al. 2015).

    target (B, K, H, W): probabilities made with the same T; a pixel where they sum to m < 1 counts
    m times. known: the classes (n,) the target speaks of and the softmax is over; None = all.
    """
    z = at_least_fp32(logits) / temperature
    if known is not None:
        z, target = z[:, known], target[:, known]
    # sum q log(q / p), where q sums to m, is m KL + m log m. The last part is taken off.
    mass = target.sum(1)
    constant = torch.xlogy(target, target).sum(1) - torch.xlogy(mass, mass)
    divergence = constant - (target * z.log_softmax(1)).sum(1)
    divergence = divergence.where(y != IGNORE, 0)
    return temperature ** 2 * divergence.sum() / pixel_count(y, count)


def translate(q: Tensor, shares: Tensor, logits: Tensor | None = None,
              temperature: float = 1.0) -> Tensor:
    """A teacher's probabilities (B, Kt, H, W) -> (B, K, H, W), the target for kl().

    shares (Kt, K): how much of each class of the teacher goes to each class of the student. With
    the student's logits a class that goes to several is divided as the student itself divides it,
    so that nothing is taught that the teacher cannot know; shares then only say which classes.
    """
    if logits is None:
        return torch.einsum("bthw,ts->bshw", q, shares)
    # The E-step of learning from unions of classes.
    z = at_least_fp32(logits.detach()) / temperature
    target = torch.zeros_like(z)
    goes = (shares > 0)[..., None, None]  # (Kt, K, 1, 1)
    for part, row in zip(q.split(1, dim=1), goes):
        within = z.masked_fill(~row, -1e9).softmax(1)
        target += part * row * within
    return target


# ---- the sum of several terms

# What --loss may name. A new term is a function f(logits, y, count) and an entry here; OPTIONS says
# what else of weighted_sum() it takes. A ratio of sums over the batch, like dice, takes `total`.
LOSSES = {"ce": ce, "focal": focal, "lovasz": lovasz, "dice": dice, "boundary": boundary}
OPTIONS = {
    "ce": ["class_weights", "smoothing"],
    "focal": ["class_weights"],
    "dice": ["total"],
    "boundary": ["total"],
}


def parse_loss(text: str) -> list[tuple[float, str]]:
    """'ce+0.5*dice' -> [(1.0, 'ce'), (0.5, 'dice')]; what is wrong is a BadInput."""
    terms = []
    for part in text.split("+"):
        factor, _, name = part.rpartition("*")
        name = name.strip()
        if name not in LOSSES:
            known = ", ".join(LOSSES)
            raise BadInput(
                f"--loss {text}: unknown term '{name}', known: {known}; e.g. ce+0.5*dice")
        if name in [other for _, other in terms]:
            raise BadInput(f"--loss {text}: term '{name}' stands twice, give it one weight")
        try:
            weight = number(factor or "1")
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise BadInput(f"--loss {text}: the weight in '{part}' is not a number >= 0; "
                             "e.g. ce+0.5*dice")
        terms.append((weight, name))
    if not any(weight for weight, _ in terms):
        raise BadInput(f"--loss {text}: every weight is 0, so nothing would be learned")
    return terms


def uses(terms: list[tuple[float, str]], option: str) -> bool:
    """Does one of the terms take this option of weighted_sum(), such as "class_weights"?"""
    return any(option in OPTIONS.get(name, []) for _, name in terms)


def weighted_sum(terms: list[tuple[float, str]], logits: Tensor, y: Tensor,
                 class_weights: Tensor | None = None, smoothing: float = 0.0,
                 count: Tensor | None = None, total: Callable | None = None) -> Tensor:
    """Sum of the terms of parse_loss(), each with its weight; arguments as in the first lines."""
    K = logits.shape[1]
    if K > IGNORE:
        raise ValueError(f"{K} classes, at most {IGNORE}: label {IGNORE} means ignore")
    given = dict(class_weights=class_weights, smoothing=smoothing, total=total)
    loss = 0
    for weight, name in terms:
        options = {key: given[key] for key in OPTIONS.get(name, [])}
        loss = loss + weight * LOSSES[name](logits, y, count, **options)
    return loss


def class_weights(counts: Tensor, how: str = "none", cap: float = 10.0) -> Tensor:
    """Pixel counts (K,), or per image (N, K), -> float32 (K,) with pixel mean 1.

    how: none | inverse | sqrt | median | effective. cap: largest / smallest weight, at most.
    A class without pixels gets 1 and does not touch the others.
    """
    weights = torch.ones(counts.shape[-1], device=counts.device)
    # (N, K); a single row where images are not told apart.
    counts = counts.double().reshape(-1, counts.shape[-1])
    n = counts.sum(0)
    seen = n > 0
    share = n[seen] / n.sum()  # of all pixels
    if how == "none":
        w = torch.ones_like(share)
    elif how == "inverse":
        w = 1 / share
    elif how == "sqrt":
        w = share ** -0.5
    elif how == "median":
        # Eigen & Fergus 2015: the share within those images only that have the class. The median
        # itself is a mere factor. With one row this is inverse.
        around = (counts > 0) * counts.sum(1, keepdim=True)  # (N, K) pixels of images with it
        w = around.sum(0)[seen] / n[seen]
    elif how == "effective":
        # Cui et al. 2019: 1 / (1 - beta^n), beta = 1 - 1/N for N distinct samples. Their .9999 is
        # meant for counts of images and gives equal weights to millions of pixels. N = mean pixels
        # per class works at any size of data set: inverse for classes well below the mean,
        # levelling off above it.
        samples = n[seen].mean().clamp(min=2)
        w = 1 / -torch.expm1(n[seen] * torch.log1p(-1 / samples))
    else:
        raise ValueError(f"class weights '{how}', known: none, inverse, sqrt, median, effective")
    if seen.any():
        w = w.clamp(max=cap * w.min())
        weights[seen] = (w / (share * w).sum()).float()
    return weights
