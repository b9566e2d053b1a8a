"""Losses against definitions in plain Python, torch built-ins, and the same batch cut into ranks and micro-batches."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from models.losses import IGNORE, LOSSES, boundary, ce, class_weights, compute, dice, focal, lovasz, parse_loss

NAMES, SETS = sorted(LOSSES), ("boundary", "dice")
WEIGHTS = torch.tensor([0.5, 2.0, 1.5, 1.0], dtype=torch.float64)


def batch(seed=0, B=6, K=4, H=9, W=11, dtype=torch.float64):
    """3 x 3 blocks of labels, the last class in image 0 only, image 1 wholly ignored, a corner ignored in the rest."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(B, K, H, W, generator=g, dtype=torch.float64)
    y = torch.randint(0, K - 1, (B, H, W), generator=g)[:, torch.arange(H) // 3][:, :, torch.arange(W) // 3]
    y[0, 5:, 6:] = K - 1
    y[1] = IGNORE
    y[2:, :2, :3] = IGNORE
    return logits.to(dtype).requires_grad_(), y


def grad(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def pixels(y):  # coordinates of the valid pixels
    return [(b, i, j) for b, i, j in itertools.product(*map(range, y.shape)) if y[b, i, j] != IGNORE]


# ---- values against the definitions

@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_ce_is_the_definition(smoothing, weights):
    logits, y = batch()
    p, w, K = logits.softmax(1), torch.ones(4) if weights is None else weights, 4
    want = 0.0
    for b, i, j in pixels(y):
        for c in range(K):
            target = smoothing / K + (1 - smoothing) * (y[b, i, j] == c).item()
            want -= target * w[c].item() * math.log(p[b, c, i, j].item())
    got = ce(logits, y, class_weights=weights, smoothing=smoothing)
    assert got.item() == pytest.approx(want / len(pixels(y)), rel=1e-12)
    if weights is None:
        x, t = logits.movedim(1, -1)[y != IGNORE], y[y != IGNORE]
        torch.testing.assert_close(got, F.cross_entropy(x, t, label_smoothing=smoothing))


def test_focal_is_torchvisions_for_two_classes():
    logits, y = batch(K=2)
    valid = y != IGNORE
    z = (logits[:, 1] - logits[:, 0])[valid]  # softmax over two classes = sigmoid of the difference
    want = sigmoid_focal_loss(z, y[valid].to(z), alpha=-1, gamma=2, reduction="mean")
    torch.testing.assert_close(focal(logits, y), want)
    torch.testing.assert_close(grad(focal(logits, y), logits), grad(want, logits))


def test_focal_by_hand():
    logits = torch.tensor([0.7, 0.2, 0.1]).log()[None, :, None, None]  # one pixel with these probabilities
    for c, p in enumerate((0.7, 0.2, 0.1)):
        got = focal(logits, torch.full((1, 1, 1), c), class_weights=torch.tensor([1.0, 2.0, 3.0]))
        assert got.item() == pytest.approx(-(c + 1) * (1 - p) ** 2 * math.log(p), rel=1e-5)
    torch.testing.assert_close(focal(*batch(), gamma=0), ce(*batch()))


def test_dice_is_the_definition_and_leaves_absent_classes_out():
    logits, y = batch()
    y[y == 1] = 2  # class 1 has no true pixel
    p, scores = logits.softmax(1), []
    for c in (0, 2, 3):
        both = sum(p[b, c, i, j].item() for b, i, j in pixels(y) if y[b, i, j] == c)
        size = sum(p[b, c, i, j].item() + (y[b, i, j] == c).item() for b, i, j in pixels(y))
        scores.append(2 * both / size)
    assert dice(logits, y).item() == pytest.approx(1 - sum(scores) / 3, rel=1e-12)


def jaccard_loss(wrong, true):  # Berman et al. 2018, eq. 6: a set function of the mispredicted pixels
    return len(wrong) / len(wrong | true) if wrong else 0.0


def test_lovasz_is_the_integral_over_level_sets():
    """Lovasz extension = Choquet integral: the set function of {error > t}, integrated over t from 0 to 1."""
    logits, y = batch(B=3)
    p, want = logits.softmax(1), 0.0
    for b in range(3):
        ours, terms = [q for q in pixels(y) if q[0] == b], []
        for c in {y[q].item() for q in ours}:
            true = {q for q in ours if y[q] == c}
            error = {q: abs((q in true) - p[b, c, q[1], q[2]].item()) for q in ours}
            steps = sorted({0.0, *error.values()})
            terms.append(sum((hi - lo) * jaccard_loss({q for q in ours if error[q] > lo}, true)
                             for lo, hi in zip(steps, steps[1:])))
        want += len(ours) * sum(terms) / max(1, len(terms))
    assert lovasz(logits, y).item() == pytest.approx(want / len(pixels(y)), rel=1e-12)


def test_lovasz_of_a_hard_prediction_is_one_minus_iou():
    pred, y = torch.tensor([[0, 0, 1, 1, 1, 0]]), torch.tensor([[0, 1, 1, 1, 0, IGNORE]])
    logits = 100 * F.one_hot(pred, 3).movedim(-1, 1)[..., None].float()  # (1, 3, 6, 1)
    want = 1 - (1 / 3 + 2 / 4) / 2  # class 0: 1 of 3; class 1: 2 of 4; class 2 absent
    assert lovasz(logits, y[..., None]).item() == pytest.approx(want, abs=1e-6)


def test_boundary_is_the_definition():
    logits, y = batch(B=3, H=14, W=16)
    B, H, W = y.shape
    p, true = logits.softmax(1).tolist(), torch.stack([y == c for c in range(4)], 1).double().tolist()

    def window(i, j, r):
        return itertools.product(range(max(0, i - r), min(H, i + r + 1)), range(max(0, j - r), min(W, j + r + 1)))

    def edges(q):  # [i][j] -> drop from the pixel to the lowest of its 3 x 3 neighbours
        return [[q[i][j] - min(q[a][b] for a, b in window(i, j, 1)) for j in range(W)] for i in range(H)]

    scores = []
    for c in range(4):
        e_hit = e_all = t_hit = t_all = 0.0
        for b in range(B):
            e, t = edges(p[b][c]), edges(true[b][c])
            for i, j in itertools.product(range(H), range(W)):
                if all(y[b, r, s] != IGNORE for r, s in window(i, j, 3)):
                    e_all, e_hit = e_all + e[i][j], e_hit + e[i][j] * max(t[r][s] for r, s in window(i, j, 2))
                    t_all, t_hit = t_all + t[i][j], t_hit + t[i][j] * max(e[r][s] for r, s in window(i, j, 2))
        if t_all:
            scores.append(2 / (e_all / e_hit + t_all / t_hit))  # harmonic mean of precision and recall
    assert len(scores) > 1
    assert boundary(logits, y).item() == pytest.approx(1 - sum(scores) / len(scores), abs=2e-7)


def half_plane(column, size=24):  # hard prediction or label: class 1 from this column on
    return (torch.arange(size) >= column).long().expand(1, size, size)


def test_boundary_is_zero_when_perfect_within_theta_and_one_far_off():
    y = half_plane(12)
    for shift, want in ((0, 0.0), (1, 0.0), (6, 1.0)):  # theta 5 forgives up to 2 pixels
        logits = 1e4 * F.one_hot(half_plane(12 + shift), 2).movedim(-1, 1).float()
        assert boundary(logits, y).item() == pytest.approx(want, abs=1e-6)


def test_boundary_leaves_out_classes_without_a_boundary():
    assert boundary(batch()[0], torch.ones(6, 9, 11, dtype=torch.int64)).item() == 0


def test_boundary_gradient_moves_an_edge_that_misses():
    x, y = 2 * F.one_hot(half_plane(16), 2).movedim(-1, 1).double(), half_plane(13)  # precision and recall are 0 ...
    assert boundary(x, y).item() == pytest.approx(1, abs=1e-6)
    for _ in range(25):
        x.requires_grad_()
        x = (x - 5 * grad(boundary(x, y), x)).detach()
    assert boundary(x, y) < 0.6  # ... and yet descent finds the way


# ---- ignored pixels

@pytest.mark.parametrize("name", NAMES)
def test_ignored_pixels_have_no_gradient_and_no_influence(name):
    logits, y = batch(dtype=torch.float32)
    ignored = (y == IGNORE)[:, None]
    loss = LOSSES[name](logits, y)
    g = grad(loss, logits)
    assert (g.masked_select(ignored) == 0).all() and g.abs().sum() > 0
    for value in (0.0, 1e4, -1e4):
        other = logits.detach().clone()
        other[:, 1:2].masked_fill_(ignored, value)
        other.requires_grad_()
        changed = LOSSES[name](other, y)
        assert changed.item() == loss.item() and torch.equal(grad(changed, other), g)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_labels_gives_zero_and_zero_gradient(name):
    logits, y = batch()
    y.fill_(IGNORE)
    for count in (None, torch.tensor(0), torch.tensor(7)):
        loss = compute([(0.5, name)], logits, y, count=count, total=lambda t: t)
        assert loss.item() == 0
        assert (grad(loss, logits) == 0).all()


# ---- ranks and micro-batches

def run_ranks(name, parts, count, **options):
    """Values (R,) and concatenated gradients of simulated ranks; a first round collects what each would send."""
    sent = []
    if name in SETS:
        for x, y in parts:
            LOSSES[name](x, y, count, total=lambda t: sent.append(t) or t)
        options["total"] = lambda t: t.copy_(sum(sent))  # in place, as all_reduce does
    values = [LOSSES[name](x, y, count, **options) for x, y in parts]
    return torch.stack(values).detach(), torch.cat([grad(v, x) for v, (x, _) in zip(values, parts)])


def split(logits, y, sizes):
    return [(x.detach().requires_grad_(), t) for x, t in zip(logits.split(sizes), y.split(sizes))]


@pytest.mark.parametrize("sizes", [(6,), (4, 2), (1, 1, 4)])  # in the last, rank 1 has no valid pixel
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_ranks_add_up_to_that_of_the_whole_batch(name, sizes):
    logits, y = batch()
    options = {"ce": {"class_weights": WEIGHTS, "smoothing": 0.1}, "focal": {"class_weights": WEIGHTS}}.get(name, {})
    whole = LOSSES[name](logits, y, **options)
    values, g = run_ranks(name, split(logits, y, sizes), (y != IGNORE).sum(), **options)
    torch.testing.assert_close(g, grad(whole, logits), rtol=1e-10, atol=1e-14)
    assert values.sum().item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up(name):
    logits, y = batch()
    count = (y != IGNORE).sum()
    micro = split(logits, y, (1, 2, 3))
    values = [LOSSES[name](x, t, count) for x, t in micro]
    if name in SETS:  # one set each, weighted by valid pixels
        want = sum((t != IGNORE).sum() * LOSSES[name](x, t) for x, t in split(logits, y, (1, 2, 3))) / count
    else:
        want = LOSSES[name](logits, y)
        g = torch.cat([grad(v, x) for v, (x, _) in zip(values, micro)])
        torch.testing.assert_close(g, grad(want, logits), rtol=1e-10, atol=1e-14)
    assert sum(values).item() == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_repeating_the_batch_changes_nothing(name):
    logits, y = batch()
    torch.testing.assert_close(LOSSES[name](logits.repeat(2, 1, 1, 1), y.repeat(2, 1, 1)), LOSSES[name](logits, y))


# ---- numerics

@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    logits, y = batch(B=2, H=8, W=9)
    logits, y = logits[:1].detach().requires_grad_(), y[:1].clone()
    y[0, 0, :2] = IGNORE
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, y), logits)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_computed_in_float32(name, dtype):
    logits, y = batch(dtype=dtype)
    loss = LOSSES[name](logits, y)
    assert loss.dtype == torch.float32
    assert loss.item() == LOSSES[name](logits.float(), y).item()
    assert grad(loss, logits).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_huge_logits_stay_finite(name):
    logits, y = batch(dtype=torch.float32)
    for sign in (1e4, -1e4):  # certain and right, certain and wrong
        x = (sign * F.one_hot(y.where(y != IGNORE, 0), 4).movedim(-1, 1).float()).requires_grad_()
        loss = LOSSES[name](x, y)
        assert loss.isfinite() and grad(loss, x).isfinite().all()
        assert (loss < 1e-6) == (sign > 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_head_that_starts_at_zero_gets_a_bounded_gradient(name):
    logits, y = batch(dtype=torch.float32)
    logits = torch.zeros_like(logits).requires_grad_()
    g = grad(LOSSES[name](logits, y), logits)
    assert 0 < g.abs().max() < 1


# ---- compute, parse_loss, class_weights

def test_compute_is_the_weighted_sum():
    logits, y = batch()
    terms = parse_loss("ce+0.5*dice+2*lovasz+.25*focal+1e-1*boundary")
    assert terms == [(1.0, "ce"), (0.5, "dice"), (2.0, "lovasz"), (0.25, "focal"), (0.1, "boundary")]
    loss = compute(terms, logits, y, class_weights=WEIGHTS, smoothing=0.1)
    want = (ce(logits, y, class_weights=WEIGHTS, smoothing=0.1) + 0.5 * dice(logits, y) + 2 * lovasz(logits, y)
            + 0.25 * focal(logits, y, class_weights=WEIGHTS) + 0.1 * boundary(logits, y))
    torch.testing.assert_close(loss, want)


def test_class_ids_must_stay_below_ignore():
    with pytest.raises(ValueError, match="256 classes, at most 255"):
        compute([(1.0, "ce")], torch.zeros(1, 256, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64))


@pytest.mark.parametrize("text, what", [
    ("ce+dise", "unknown term 'dise', known: ce, focal, lovasz, dice, boundary"), ("", "unknown term ''"),
    ("ce+", "unknown term ''"), ("x*dice", "weight in 'x\\*dice'"), ("-1*ce", "weight in '-1\\*ce'"),
    ("nan*ce", "weight in 'nan\\*ce'"), ("ce+0.5*ce", "'ce' stands twice")])
def test_parse_loss_says_what_is_wrong(text, what):
    with pytest.raises(ValueError, match=what) as e:
        parse_loss(text)
    assert "\n" not in str(e.value)


COUNTS = torch.tensor([8_000_000_000, 1_000_000_000, 0, 999_000_000, 1_000_000])


@pytest.mark.parametrize("how", ["none", "inverse", "sqrt", "median", "effective"])
def test_class_weights_have_pixel_mean_one_and_a_bounded_ratio(how):
    one = torch.tensor([5, 0, 0, 0, 0])
    for counts, cap in ((COUNTS, 10.0), (COUNTS, 1e9), (one, 10.0), (COUNTS // 1_000_000, 3.0)):
        w = class_weights(counts, how, cap)
        assert w.dtype == torch.float32 and w.isfinite().all() and (w > 0).all()
        assert (w * counts / counts.sum()).sum().item() == pytest.approx(1, abs=1e-6)
        assert w.max() / w.min() <= cap * (1 + 1e-6)
        assert (w[counts == 0] == 1).all()
        kept = counts > 0  # the absent class does not touch the others ...
        torch.testing.assert_close(class_weights(counts[kept], how, cap), w[kept])
        rarest_first = w[kept][counts[kept].argsort()]  # ... and a rarer class never weighs less
        assert (rarest_first.diff() <= 1e-6).all()
    torch.testing.assert_close(class_weights(torch.zeros(3, dtype=torch.int64), how), torch.ones(3))


def test_class_weights_by_hand():
    counts = torch.tensor([60, 30, 10])
    torch.testing.assert_close(class_weights(counts, "inverse"), torch.tensor([100 / 180, 100 / 90, 100 / 30]))
    capped = class_weights(counts, "inverse", cap=4.0)  # 10/6 : 10/3 : 10, the last cut to 4 * 10/6
    torch.testing.assert_close(capped / capped[0], torch.tensor([1.0, 2.0, 4.0]))
    assert (class_weights(counts, "sqrt") ** 2 * counts).diff().abs().max() < 1e-3  # w proportional to 1 / sqrt(n)
    beta = 1 - 1 / (100 / 3)
    w = class_weights(counts, "effective")
    assert (w[2] / w[0]).item() == pytest.approx((1 - beta ** 60) / (1 - beta ** 10), rel=1e-5)
    assert 1 < w[2] / w[0] < 6  # milder than inverse


def test_median_frequency_looks_only_at_images_with_the_class():
    per_image = torch.tensor([[50, 50, 0], [80, 0, 20], [100, 0, 0]])  # share where present: 230/300, 50/100, 20/100
    w = class_weights(per_image, "median")
    torch.testing.assert_close(w / w[1], torch.tensor([0.5 / (230 / 300), 1.0, 0.5 / 0.2]))
    torch.testing.assert_close(class_weights(per_image, "sqrt"), class_weights(per_image.sum(0), "sqrt"))
    torch.testing.assert_close(class_weights(COUNTS, "median"), class_weights(COUNTS, "inverse"))


def test_class_weights_unknown_way():
    with pytest.raises(ValueError, match="'auto', known: none, inverse, sqrt, median, effective"):
        class_weights(COUNTS, "auto")
