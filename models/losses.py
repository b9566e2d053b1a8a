"""Segmentation losses that do not depend on how a batch is cut into ranks (and, pixel-wise, into micro-batches).

    loss = compute(parse_loss("ce+0.5*dice"), net(x), y, count=count, total=total)
    (loss * world).backward()  # DDP averages gradients over ranks; every term here is made to be summed

count: valid pixels of the step, over all ranks and accumulated micro-batches; None = of this batch.
total: sums a detached tensor over ranks, called once per set-based term; None = one rank.
Values and gradients of all ranks and micro-batches add up to the loss of the step and its gradient.
Pixel-wise (ce, focal, lovasz): a local sum over count. Set-based (dice, boundary): ratios of sums per class, which need
all their pixels at once: `total` brings those of the other ranks, and each rank holds its share of the value. A
micro-batch is a set of its own, scaled by its share of count: they add up to a mean.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from data.common import IGNORE

# B batch, K classes, H W pixels. logits (B, K, H, W) of any float type, y (B, H, W) int64 in 0..K-1 or IGNORE.


def _float(logits):  # half types to float32, where sums over pixels are safe; double stays, gradcheck needs it
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _one_hot(y, K):  # (B, H, W) -> (B, K, H, W) bool, an eighth of F.one_hot; IGNORE is in no class
    return y[:, None] == torch.arange(K, device=y.device)[:, None, None]


def _pixels(y, count):  # at least 1: a batch without labels gives 0, not NaN
    return ((y != IGNORE).sum() if count is None else count).clamp(min=1)


def _global(s, total):  # value of all ranks, gradient of this one; clone, because a collective may work in place
    return s if total is None else s + (total(s.detach().clone()) - s.detach())


def _class_mean(loss, there, own, n, count):
    """Mean over the classes `there` (K,), times n (valid pixels on all ranks) / count (in all micro-batches).

    Of the value a rank keeps the share of its own pixels, of the gradient all that came through its own sums."""
    share = 1 if count is None else n / count.clamp(min=1)
    value = (loss * there).sum() / there.sum().clamp(min=1) * share
    return value - value.detach() * (1 - own / n.clamp(min=1))


def ce(logits: torch.Tensor, y: torch.Tensor, count: torch.Tensor | None = None,
       class_weights: torch.Tensor | None = None, smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy with optional weights (K,) and label smoothing as in torch, over the count of valid pixels."""
    # torch's weighted mean divides by the weights met in the batch, so the share of a rank or micro-batch would hang
    # on its classes. The count does not, and class_weights() has pixel mean 1, so the size of the loss stays the same.
    x = _float(logits)
    w = None if class_weights is None else class_weights.to(x)
    loss = F.cross_entropy(x, y, w, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    return loss / _pixels(y, count)


def focal(logits: torch.Tensor, y: torch.Tensor, count: torch.Tensor | None = None,
          class_weights: torch.Tensor | None = None, gamma: float = 2.0) -> torch.Tensor:
    """Focal loss (Lin et al. 2017): cross-entropy times (1 - p)^gamma, p = softmax at the true class; gamma >= 1."""
    nll = F.cross_entropy(_float(logits), y, ignore_index=IGNORE, reduction="none")  # (B, H, W), 0 where ignored
    loss = (-torch.expm1(-nll)) ** gamma * nll  # expm1: 1 - p keeps its digits when p is near 1
    if class_weights is not None:
        loss = loss * class_weights.to(loss)[y.where(y != IGNORE, 0)]
    return loss.sum() / _pixels(y, count)


def lovasz(logits: torch.Tensor, y: torch.Tensor, count: torch.Tensor | None = None) -> torch.Tensor:
    """Lovasz-Softmax (Berman et al. 2018) per image over the classes present in it; images weigh by valid pixels."""
    # Per image, because no sum over ranks gives the sort of a whole batch; by valid pixels, so that count is enough to
    # be exact and an image with three labels does not weigh as much as a full one. Full crops: the plain mean.
    p = _float(logits).softmax(1).flatten(2)  # (B, K, HW)
    true, valid = _one_hot(y, p.shape[1]).flatten(2), (y != IGNORE).flatten(1)
    error, order = (p - true.to(p)).abs().masked_fill(~valid[:, None], -1).sort(2, descending=True)  # ignored come last
    hit = true.gather(2, order)
    # M = the k largest errors has Jaccard loss 1 - left / union: left = true and outside M, union = true or in M. The
    # weight of an error is what its pixel adds; written out, as the usual difference of two losses near 1 loses digits.
    # Ignored pixels add 0, since nothing is left when they come. float32 counts exactly up to 2^24 pixels an image.
    left = hit.sum(2, keepdim=True) - hit.cumsum(2, dtype=p.dtype)
    union = hit.sum(2, keepdim=True) + (~hit).cumsum(2, dtype=p.dtype)
    weight = torch.where(hit, 1 / union, left / union / (union - 1).clamp(min=1))
    there = true.any(2)  # (B, K)
    image = ((error * weight).sum(2) * there).sum(1) / there.sum(1).clamp(min=1)  # (B,)
    return (image * valid.sum(1)).sum() / _pixels(y, count)


def dice(logits: torch.Tensor, y: torch.Tensor, count: torch.Tensor | None = None,
         total: Callable | None = None) -> torch.Tensor:
    """1 - soft Dice, mean over the classes that have a true pixel on any rank; no eps: such a class has size >= 1."""
    p = _float(logits).softmax(1)
    true = _one_hot(y, p.shape[1])
    sums = [p * true, p * (y != IGNORE)[:, None], true]
    both, pred, size = _global(torch.stack([t.sum((0, 2, 3)).to(p) for t in sums]), total)  # (K,) each
    return _class_mean(1 - 2 * both / (pred + size).clamp(min=1), size > 0, true.sum(), size.sum(), count)


def boundary(logits: torch.Tensor, y: torch.Tensor, count: torch.Tensor | None = None, total: Callable | None = None,
             theta0: int = 3, theta: int = 5) -> torch.Tensor:
    """1 - boundary F1 (Bokhovkin & Burnaev 2019), mean over classes with a true boundary; odd window sizes in pixels.

    theta0 sets how thick a boundary is, theta // 2 how far off it may lie. Alone it invents edges near the true ones
    (yiskw713/boundary_loss_for_remote_sensing#1): use it beside ce or dice."""
    def pool(x, k):
        return F.max_pool2d(x, k, 1, k // 2)  # pads with -inf: the image's edge is no boundary

    def edge(q):  # pool(1 - q) - (1 - q) in the paper; 1 on pixels of the class that have another class beside them
        return q + pool(-q, theta0)

    p = _float(logits).softmax(1)
    true = _one_hot(y, p.shape[1])
    # All that a kept pixel looks at lies within theta0 // 2 + theta // 2 of it: none of that may be ignored.
    keep = pool((y == IGNORE)[:, None].to(p), theta0 + theta - 1) == 0  # (B, 1, H, W)
    e, t = edge(p), edge(true.to(p))
    sums = [s * keep for s in (e * pool(t, theta), e, t * pool(e, theta), t)] + [true]
    e_hit, e_all, t_hit, t_all, size = _global(torch.stack([s.sum((0, 2, 3)).to(p) for s in sums]), total)
    # 1e-7: 2PR / (P + R) alone is flat at P = R = 0, just where an edge that misses needs a push. clamp: with less than
    # one pixel of predicted boundary, as from a head that starts at zero, the slope of P would have no bound.
    precision, recall = e_hit / e_all.clamp(min=1) + 1e-7, t_hit / t_all.clamp(min=1) + 1e-7
    f1 = 2 * precision * recall / (precision + recall)
    return _class_mean(1 - f1, t_all > 0, true.sum(), size.sum(), count)


def check_logits(logits: torch.Tensor) -> None:
    """ValueError for probabilities: with a second softmax the loss still falls, but only to a floor above 0."""
    x = _float(logits.detach())
    if logits.shape[1] > 1 and (x >= 0).all() and ((x.sum(1) - 1).abs() < 0.01).all():
        raise ValueError("these are probabilities, they add up to 1 at every pixel; give the loss the logits before "
                         "softmax, which it takes itself")


def distill(logits: torch.Tensor, target: torch.Tensor, y: torch.Tensor, temperature: float = 1.0,
            count: torch.Tensor | None = None, known: torch.Tensor | None = None) -> torch.Tensor:
    """T^2 KL(target, softmax(logits / T)) summed over classes, over the count of valid pixels (Hinton et al. 2015).

    target (B, K, H, W): probabilities, made with the same T; where they sum to m < 1 the pixel counts m times.
    known: bool (K,), classes that the target speaks of; the softmax is taken over these alone. None = all."""
    z = _float(logits) / temperature
    if known is not None and not known.all():
        z, target = z[:, known], target[:, known]
    mass = target.sum(1)
    # written for any m: sum q log(q / p) with q of sum m is m KL + m log m
    kl = torch.xlogy(target, target).sum(1) - torch.xlogy(mass, mass) - (target * z.log_softmax(1)).sum(1)
    return temperature ** 2 * kl.where(y != IGNORE, 0).sum() / _pixels(y, count)


def translate(q: torch.Tensor, shares: torch.Tensor, logits: torch.Tensor | None = None,
              temperature: float = 1.0) -> torch.Tensor:
    """Teacher's probabilities (B, Kt, H, W), by shares (Kt, K) of its classes -> (B, K, H, W) as a target for distill.

    With the student's logits a class that goes to several is divided as the student itself divides it, so that nothing
    is taught that the teacher cannot know; the shares then only say which classes (the E-step of learning from unions).
    """
    if logits is None:
        return torch.einsum("bthw,ts->bshw", q, shares)
    z = _float(logits.detach()) / temperature
    target = torch.zeros_like(z)
    for part, row in zip(q.split(1, dim=1), (shares > 0)[..., None, None]):  # row (K, 1, 1)
        target += part * row * z.masked_fill(~row, -1e9).softmax(1)
    return target


LOSSES = {"ce": ce, "focal": focal, "lovasz": lovasz, "dice": dice, "boundary": boundary}


def parse_loss(text: str) -> list[tuple[float, str]]:
    """'ce+0.5*dice' -> [(1.0, 'ce'), (0.5, 'dice')]."""
    terms = []
    for part in text.split("+"):
        weight, _, name = part.strip().rpartition("*")
        if name not in LOSSES:
            raise ValueError(f"loss '{text}': unknown term '{name}', known: {', '.join(LOSSES)}; e.g. ce+0.5*dice")
        if name in (n for _, n in terms):
            raise ValueError(f"loss '{text}': term '{name}' stands twice, give it one weight")
        try:
            weight = float(weight or 1)
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise ValueError(f"loss '{text}': the weight in '{part}' is not a number >= 0; e.g. ce+0.5*dice")
        terms.append((weight, name))
    if not any(weight for weight, _ in terms):
        raise ValueError(f"loss '{text}': every weight is 0, so nothing would be learned")
    return terms


def compute(terms: list[tuple[float, str]], logits: torch.Tensor, y: torch.Tensor,
            class_weights: torch.Tensor | None = None, smoothing: float = 0.0, count: torch.Tensor | None = None,
            total: Callable | None = None) -> torch.Tensor:
    """Weighted sum of the terms of parse_loss()."""
    if logits.shape[1] > IGNORE:
        raise ValueError(f"{logits.shape[1]} classes, at most {IGNORE}: label {IGNORE} means ignore")
    extra = {"ce": {"class_weights": class_weights, "smoothing": smoothing}, "focal": {"class_weights": class_weights},
             "dice": {"total": total}, "boundary": {"total": total}}
    return sum(weight * LOSSES[name](logits, y, count, **extra.get(name, {})) for weight, name in terms)


def class_weights(counts: torch.Tensor, how: str = "none", cap: float = 10.0) -> torch.Tensor:
    """Pixel counts (K,), or per image (N, K), -> float32 (K,) with pixel mean 1 and largest / smallest <= cap.

    how: none | inverse | sqrt | median | effective. A class without pixels gets 1 and does not touch the others."""
    counts = counts.double().reshape(-1, counts.shape[-1])  # (N, K); one row where images are not told apart
    n, weights = counts.sum(0), torch.ones(counts.shape[1], device=counts.device)
    seen = n > 0
    share = n[seen] / n.sum()  # of all pixels
    if how == "none":
        w = torch.ones_like(share)
    elif how == "inverse":
        w = 1 / share
    elif how == "sqrt":
        w = share ** -0.5
    elif how == "median":  # Eigen & Fergus 2015: share only within images that have the class; their median is a mere
        w = ((counts > 0) * counts.sum(1, keepdim=True)).sum(0)[seen] / n[seen]  # factor. One row: equal to inverse
    elif how == "effective":
        # Cui et al. 2019: 1 / (1 - beta^n), beta = 1 - 1/N for N distinct samples. Their .9999 is meant for counts of
        # images and gives equal weights to millions of pixels. N = mean pixels per class works at any size of data set:
        # inverse for classes well below the mean, levelling off above it.
        w = 1 / -torch.expm1(n[seen] * torch.log1p(-1 / n[seen].mean().clamp(min=2)))
    else:
        raise ValueError(f"class weights '{how}', known: none, inverse, sqrt, median, effective")
    if seen.any():
        w = w.clamp(max=cap * w.min())
        weights[seen] = (w / (share * w).sum()).float()
    return weights
