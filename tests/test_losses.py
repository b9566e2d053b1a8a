"""Losses against definitions in plain Python, torch built-ins, and the same batch in parts."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from models.losses import (
    IGNORE, LOSSES, boundary, ce, class_weights, dice, focal, kl, lovasz, parse_loss, translate,
    weighted_sum)

NAMES = sorted(LOSSES)
SETS = ("boundary", "dice")
WEIGHTS = torch.tensor([0.5, 2.0, 1.5, 1.0], dtype=torch.float64)


def batch(seed=0, B=6, K=4, H=9, W=11, dtype=torch.float64):
    """Logits, and labels in blocks of 3 x 3 pixels.

    The last class is in image 0 only, image 1 is wholly ignored, in the others a corner is.
    """
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(B, K, H, W, generator=g, dtype=torch.float64)
    y = torch.randint(0, K - 1, (B, H, W), generator=g)
    y = y[:, torch.arange(H) // 3][:, :, torch.arange(W) // 3]
    y[0, 5:, 6:] = K - 1
    y[1] = IGNORE
    y[2:, :2, :3] = IGNORE
    return logits.to(dtype).requires_grad_(), y


def grad(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def valid_pixels(y):
    """Coordinates (b, i, j) of the pixels that are not ignored."""
    places = itertools.product(*map(range, y.shape))
    return [place for place in places if y[place] != IGNORE]


def one_hot(y, K):
    return F.one_hot(y, K).movedim(-1, 1)


# ---- values against the definitions

@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_ce_is_the_definition(smoothing, weights):
    logits, y = batch()
    p = logits.softmax(1)
    w = torch.ones(4) if weights is None else weights
    want = 0.0
    for b, i, j in valid_pixels(y):
        for c in range(4):
            true = (y[b, i, j] == c).item()
            target = smoothing / 4 + (1 - smoothing) * true
            want -= target * w[c].item() * math.log(p[b, c, i, j].item())
    got = ce(logits, y, class_weights=weights, smoothing=smoothing)
    assert got.item() == pytest.approx(want / len(valid_pixels(y)), rel=1e-12)
    if weights is None:
        x = logits.movedim(1, -1)[y != IGNORE]
        t = y[y != IGNORE]
        torch.testing.assert_close(got, F.cross_entropy(x, t, label_smoothing=smoothing))


def test_focal_is_torchvisions_for_two_classes():
    logits, y = batch(K=2)
    valid = y != IGNORE
    # A softmax over two classes is the sigmoid of the difference.
    z = (logits[:, 1] - logits[:, 0])[valid]
    want = sigmoid_focal_loss(z, y[valid].to(z), alpha=-1, gamma=2, reduction="mean")
    got = focal(logits, y)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad(got, logits), grad(want, logits))


def test_focal_by_hand():
    # One pixel with these probabilities.
    logits = torch.tensor([0.7, 0.2, 0.1]).log()[None, :, None, None]
    weights = torch.tensor([1.0, 2.0, 3.0])
    for c, p in enumerate((0.7, 0.2, 0.1)):
        got = focal(logits, torch.full((1, 1, 1), c), class_weights=weights)
        want = -(c + 1) * (1 - p) ** 2 * math.log(p)
        assert got.item() == pytest.approx(want, rel=1e-5)
    torch.testing.assert_close(focal(*batch(), gamma=0), ce(*batch()))


def test_dice_is_the_definition_and_leaves_absent_classes_out():
    logits, y = batch()
    y[y == 1] = 2  # class 1 has no true pixel
    p = logits.softmax(1)
    scores = []
    for c in (0, 2, 3):
        both = size = 0.0
        for b, i, j in valid_pixels(y):
            true = (y[b, i, j] == c).item()
            both += p[b, c, i, j].item() * true
            size += p[b, c, i, j].item() + true
        scores.append(2 * both / size)
    assert dice(logits, y).item() == pytest.approx(1 - sum(scores) / 3, rel=1e-12)


def jaccard_loss(wrong, true):
    """Berman et al. 2018, eq. 6: a function of the set of mispredicted pixels."""
    return len(wrong) / len(wrong | true) if wrong else 0.0


def test_lovasz_is_the_integral_over_level_sets():
    """Lovasz extension = Choquet integral: jaccard_loss({error > t}) over t from 0 to 1."""
    logits, y = batch(B=3)
    p = logits.softmax(1)
    want = 0.0
    for b in range(3):
        pixels = [place for place in valid_pixels(y) if place[0] == b]
        integrals = []
        for c in {y[place].item() for place in pixels}:
            true = {place for place in pixels if y[place] == c}
            error = {}
            for place in pixels:
                _, i, j = place
                error[place] = abs((place in true) - p[b, c, i, j].item())
            steps = sorted({0.0, *error.values()})
            integral = 0.0
            for low, high in zip(steps, steps[1:]):
                wrong = {place for place in pixels if error[place] > low}
                integral += (high - low) * jaccard_loss(wrong, true)
            integrals.append(integral)
        want += len(pixels) * sum(integrals) / max(1, len(integrals))
    assert lovasz(logits, y).item() == pytest.approx(want / len(valid_pixels(y)), rel=1e-12)


def test_lovasz_of_a_hard_prediction_is_one_minus_iou():
    predicted = torch.tensor([[0, 0, 1, 1, 1, 0]])
    y = torch.tensor([[0, 1, 1, 1, 0, IGNORE]])
    logits = 100 * one_hot(predicted, 3)[..., None].float()  # (1, 3, 6, 1)
    want = 1 - (1 / 3 + 2 / 4) / 2  # class 0: 1 of 3; class 1: 2 of 4; class 2 is absent
    assert lovasz(logits, y[..., None]).item() == pytest.approx(want, abs=1e-6)


def test_boundary_is_the_definition():
    logits, y = batch(B=3, H=14, W=16)
    B, H, W = y.shape
    p = logits.softmax(1).tolist()
    true = torch.stack([y == c for c in range(4)], 1).double().tolist()

    def window(i, j, r):
        rows = range(max(0, i - r), min(H, i + r + 1))
        columns = range(max(0, j - r), min(W, j + r + 1))
        return list(itertools.product(rows, columns))

    def edges(q):
        """[i][j] -> the drop from the pixel to the lowest of its 3 x 3 neighbours."""
        out = [[0.0] * W for _ in range(H)]
        for i, j in itertools.product(range(H), range(W)):
            out[i][j] = q[i][j] - min(q[r][s] for r, s in window(i, j, 1))
        return out

    scores = []
    for c in range(4):
        e_near = e_all = t_near = t_all = 0.0
        for b in range(B):
            e, t = edges(p[b][c]), edges(true[b][c])
            for i, j in itertools.product(range(H), range(W)):
                if any(y[b, r, s] == IGNORE for r, s in window(i, j, 3)):
                    continue
                e_all += e[i][j]
                e_near += e[i][j] * max(t[r][s] for r, s in window(i, j, 2))
                t_all += t[i][j]
                t_near += t[i][j] * max(e[r][s] for r, s in window(i, j, 2))
        if t_all:
            # The harmonic mean of precision and recall.
            scores.append(2 / (e_all / e_near + t_all / t_near))
    assert len(scores) > 1
    want = 1 - sum(scores) / len(scores)
    assert boundary(logits, y).item() == pytest.approx(want, abs=2e-7)


def half_plane(column, size=24):
    """Labels (1, size, size): class 1 from this column on, class 0 before."""
    return (torch.arange(size) >= column).long().expand(1, size, size)


def test_boundary_is_zero_when_perfect_within_theta_and_one_far_off():
    y = half_plane(12)
    for shift, want in ((0, 0.0), (1, 0.0), (6, 1.0)):  # theta 5 forgives up to 2 pixels
        logits = 1e4 * one_hot(half_plane(12 + shift), 2).float()
        assert boundary(logits, y).item() == pytest.approx(want, abs=1e-6)


def test_boundary_leaves_out_classes_without_a_boundary():
    logits, _ = batch()
    assert boundary(logits, torch.ones(6, 9, 11, dtype=torch.int64)).item() == 0


def test_boundary_gradient_moves_an_edge_that_misses():
    # Precision and recall are 0, and yet descent finds the way.
    x = 2 * one_hot(half_plane(16), 2).double()
    y = half_plane(13)
    assert boundary(x, y).item() == pytest.approx(1, abs=1e-6)
    for _ in range(25):
        x.requires_grad_()
        x = (x - 5 * grad(boundary(x, y), x)).detach()
    assert boundary(x, y) < 0.6


# ---- ignored pixels

@pytest.mark.parametrize("name", NAMES)
def test_ignored_pixels_have_no_gradient_and_no_influence(name):
    logits, y = batch(dtype=torch.float32)
    ignored = (y == IGNORE)[:, None]
    loss = LOSSES[name](logits, y)
    g = grad(loss, logits)
    assert (g.masked_select(ignored) == 0).all()
    assert g.abs().sum() > 0
    for value in (0.0, 1e4, -1e4):
        other = logits.detach().clone()
        other[:, 1:2].masked_fill_(ignored, value)
        other.requires_grad_()
        changed = LOSSES[name](other, y)
        assert changed.item() == loss.item()
        assert torch.equal(grad(changed, other), g)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_labels_gives_zero_and_zero_gradient(name):
    logits, y = batch()
    y.fill_(IGNORE)
    for count in (None, torch.tensor(0), torch.tensor(7)):
        loss = weighted_sum([(0.5, name)], logits, y, count=count, total=lambda t: t)
        assert loss.item() == 0
        assert (grad(loss, logits) == 0).all()


# ---- ranks and micro-batches

def run_ranks(name, parts, count, **options):
    """Values (R,) and concatenated gradients of simulated ranks."""
    if name in SETS:
        # A first round collects what each rank would send. all_reduce works in place.
        sent = []
        for x, y in parts:
            LOSSES[name](x, y, count, total=lambda t: sent.append(t) or t)
        options["total"] = lambda t: t.copy_(sum(sent))
    values, gradients = [], []
    for x, y in parts:
        value = LOSSES[name](x, y, count, **options)
        values.append(value.detach())
        gradients.append(grad(value, x))
    return torch.stack(values), torch.cat(gradients)


def split(logits, y, sizes):
    parts = zip(logits.split(sizes), y.split(sizes))
    return [(x.detach().requires_grad_(), t) for x, t in parts]


# In the last case rank 1 has no valid pixel.
@pytest.mark.parametrize("sizes", [(6,), (4, 2), (1, 1, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_ranks_add_up_to_that_of_the_whole_batch(name, sizes):
    logits, y = batch()
    options = {}
    if name in ("ce", "focal"):
        options["class_weights"] = WEIGHTS
    if name == "ce":
        options["smoothing"] = 0.1
    whole = LOSSES[name](logits, y, **options)
    parts = split(logits, y, sizes)
    values, g = run_ranks(name, parts, (y != IGNORE).sum(), **options)
    torch.testing.assert_close(g, grad(whole, logits), rtol=1e-10, atol=1e-14)
    assert values.sum().item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up(name):
    logits, y = batch()
    count = (y != IGNORE).sum()
    micro = split(logits, y, (1, 2, 3))
    values = [LOSSES[name](x, t, count) for x, t in micro]
    if name in SETS:
        # One set each, weighted by valid pixels.
        want = sum((t != IGNORE).sum() * LOSSES[name](x, t) for x, t in micro) / count
    else:
        want = LOSSES[name](logits, y)
        g = torch.cat([grad(value, x) for value, (x, _) in zip(values, micro)])
        torch.testing.assert_close(g, grad(want, logits), rtol=1e-10, atol=1e-14)
    assert sum(values).item() == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_repeating_the_batch_changes_nothing(name):
    logits, y = batch()
    twice = LOSSES[name](logits.repeat(2, 1, 1, 1), y.repeat(2, 1, 1))
    torch.testing.assert_close(twice, LOSSES[name](logits, y))


# ---- numerics

@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    logits, y = batch(B=2, H=8, W=9)
    logits = logits[:1].detach().requires_grad_()
    y = y[:1].clone()
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
@pytest.mark.parametrize("sign", [1e4, -1e4])  # certain and right, certain and wrong
def test_huge_logits_stay_finite(name, sign):
    _, y = batch()
    true = y.where(y != IGNORE, 0)
    x = (sign * one_hot(true, 4).float()).requires_grad_()
    loss = LOSSES[name](x, y)
    assert loss.isfinite()
    assert grad(loss, x).isfinite().all()
    assert (loss < 1e-6) == (sign > 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_head_that_starts_at_zero_gets_a_bounded_gradient(name):
    logits, y = batch(dtype=torch.float32)
    logits = torch.zeros_like(logits).requires_grad_()
    g = grad(LOSSES[name](logits, y), logits)
    assert 0 < g.abs().max() < 1


# ---- kl: a teacher's probabilities as the target

def kl_by_hand(z, q, y, T, known):
    total = 0.0
    for b, i, j in valid_pixels(y):
        mass = sum(q[b, k, i, j].item() for k in known)
        norm = sum(math.exp(z[b, k, i, j].item() / T) for k in known)
        for k in known:
            share = q[b, k, i, j].item()
            if share > 0:
                p = math.exp(z[b, k, i, j].item() / T) / norm
                total += share * math.log(share / mass / p)
    return T * T * total / len(valid_pixels(y))


@pytest.fixture
def taught():
    """Logits, a teacher's probabilities and labels; some pixels count in part, some not at all."""
    z, y = batch(B=2, H=5, W=3)
    y[:] = 0
    y[:, 2] = IGNORE
    q = batch(seed=1, B=2, H=5, W=3)[0].detach().softmax(1)
    q[:, :, 0, 0] *= 0.4  # dropped classes held the rest
    q[0, :, 1, 1] = 0
    return z, q, y


@pytest.mark.parametrize("T", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("known", [[0, 1, 2, 3], [0, 1, 3]])
def test_kl_is_the_sum_over_classes_and_the_mean_over_valid_pixels(taught, T, known):
    z, q, y = taught
    loss = kl(z, q, y, T, known=torch.tensor(known))
    assert loss.item() == pytest.approx(kl_by_hand(z, q, y, T, known), rel=1e-9)
    g = grad(loss, z)
    assert (g[:, :, 2] == 0).all()  # ignored
    assert (g[0, :, 1, 1] == 0).all()  # without mass
    assert (g[:, [k for k in range(4) if k not in known]] == 0).all()
    assert (g[:, :, 3:] != 0).any()


def test_kl_of_a_larger_batch_or_image_is_no_larger(taught):
    z, q, y = taught
    want = kl(z, q, y, 2.0).item()
    more = kl(z.repeat(2, 1, 1, 1), q.repeat(2, 1, 1, 1), y.repeat(2, 1, 1), 2.0)
    assert more.item() == pytest.approx(want)
    taller = kl(z.repeat(1, 1, 2, 1), q.repeat(1, 1, 2, 1), y.repeat(1, 2, 1), 2.0)
    assert taller.item() == pytest.approx(want)
    assert kl(z, q, torch.full_like(y, IGNORE), 2.0).item() == 0


def test_kl_is_torchs_and_zero_for_a_perfect_teacher():
    torch.manual_seed(0)
    z = torch.randn(3, 6, 8, 8, requires_grad=True)
    q = torch.randn(3, 6, 8, 8).softmax(1)
    y = torch.zeros(3, 8, 8, dtype=torch.int64)
    want = 4 * F.kl_div((z / 2).log_softmax(1), q, reduction="sum") / y.numel()
    torch.testing.assert_close(kl(z, q, y, 2.0), want)
    loss = kl(z, (z.detach() / 2).softmax(1), y, 2.0)
    assert abs(loss.item()) < 1e-6
    assert grad(loss, z).abs().max() < 1e-8


# ---- translate: from the teacher's classes to the student's

def test_what_the_teacher_cannot_tell_apart_is_left_to_the_student():
    torch.manual_seed(0)
    z = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    q = torch.randn(2, 3, 4, 3, dtype=torch.float64).softmax(1)
    y = torch.zeros(2, 4, 3, dtype=torch.int64)
    shares = torch.tensor([[0.7, 0.3, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0.5, 0.5]]).double()
    loss = kl(z, translate(q, shares, z, 2.0), y, 2.0)
    # The KL between the teacher and the student's sums over each of the teacher's classes.
    p = (z / 2).softmax(1)
    p = torch.stack([p[:, :2].sum(1), p[:, 2], p[:, 3:].sum(1)], 1)
    want = 4 * (q * (q / p).log()).sum(1).mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grad(loss, z), grad(want, z))


def test_a_map_of_one_class_each_is_the_same_either_way_and_mass_is_kept():
    torch.manual_seed(0)
    z = torch.randn(2, 4, 3, 3)
    q = torch.randn(2, 3, 3, 3).softmax(1)
    one = torch.eye(4)[[2, 0, 2]]
    assert torch.equal(translate(q, one, z), translate(q, one))
    # Class 1 is in two rows, and the last row goes nowhere.
    several = torch.tensor([[0.5, 0.5, 0, 0], [0, 0.2, 0.8, 0], [0, 0, 0, 0]])
    for logits in (None, z, 1000 * z):
        target = translate(q, several, logits)
        torch.testing.assert_close(target.sum(1), q[:, :2].sum(1))
        assert (target[:, 3] == 0).all()


# ---- weighted_sum, parse_loss, class_weights

def test_weighted_sum_is_the_sum_of_its_terms():
    logits, y = batch()
    terms = parse_loss("ce+0.5*dice+2*lovasz+.25*focal+1e-1*boundary")
    assert terms == [(1.0, "ce"), (0.5, "dice"), (2.0, "lovasz"), (0.25, "focal"),
                     (0.1, "boundary")]
    loss = weighted_sum(terms, logits, y, class_weights=WEIGHTS, smoothing=0.1)
    want = ce(logits, y, class_weights=WEIGHTS, smoothing=0.1)
    want += 0.5 * dice(logits, y)
    want += 2 * lovasz(logits, y)
    want += 0.25 * focal(logits, y, class_weights=WEIGHTS)
    want += 0.1 * boundary(logits, y)
    torch.testing.assert_close(loss, want)


def test_class_ids_must_stay_below_ignore():
    logits, y = torch.zeros(1, 256, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="256 classes, at most 255"):
        weighted_sum([(1.0, "ce")], logits, y)


@pytest.mark.parametrize("text, what", [
    ("ce+dise", "unknown term 'dise', known: " + ", ".join(LOSSES)),
    ("", "unknown term ''"),
    ("ce+", "unknown term ''"),
    ("x*dice", "weight in 'x\\*dice'"),
    ("-1*ce", "weight in '-1\\*ce'"),
    ("nan*ce", "weight in 'nan\\*ce'"),
    ("ce+0.5*ce", "'ce' stands twice"),
    ("0*ce+0*dice", "every weight is 0"),
])
def test_parse_loss_says_what_is_wrong(text, what):
    with pytest.raises(ValueError, match=what) as e:
        parse_loss(text)
    assert "\n" not in str(e.value)


COUNTS = torch.tensor([8_000_000_000, 1_000_000_000, 0, 999_000_000, 1_000_000])
ONE_CLASS = torch.tensor([5, 0, 0, 0, 0])


@pytest.mark.parametrize("how", ["none", "inverse", "sqrt", "median", "effective"])
@pytest.mark.parametrize("counts, cap", [
    (COUNTS, 10.0), (COUNTS, 1e9), (ONE_CLASS, 10.0), (COUNTS // 1_000_000, 3.0)])
def test_class_weights_have_pixel_mean_one_and_a_bounded_ratio(how, counts, cap):
    w = class_weights(counts, how, cap)
    assert w.dtype == torch.float32
    assert w.isfinite().all() and (w > 0).all()
    assert (w * counts / counts.sum()).sum().item() == pytest.approx(1, abs=1e-6)
    assert w.max() / w.min() <= cap * (1 + 1e-6)
    # An absent class does not touch the others, and a rarer class never weighs less.
    kept = counts > 0
    assert (w[~kept] == 1).all()
    torch.testing.assert_close(class_weights(counts[kept], how, cap), w[kept])
    rarest_first = w[kept][counts[kept].argsort()]
    assert (rarest_first.diff() <= 1e-6).all()


@pytest.mark.parametrize("how", ["none", "inverse", "sqrt", "median", "effective"])
def test_class_weights_without_a_pixel_are_one(how):
    counts = torch.zeros(3, dtype=torch.int64)
    torch.testing.assert_close(class_weights(counts, how), torch.ones(3))


def test_class_weights_by_hand():
    counts = torch.tensor([60, 30, 10])
    want = torch.tensor([100 / 180, 100 / 90, 100 / 30])
    torch.testing.assert_close(class_weights(counts, "inverse"), want)

    # 10/6 : 10/3 : 10, the last cut to 4 * 10/6.
    capped = class_weights(counts, "inverse", cap=4.0)
    torch.testing.assert_close(capped / capped[0], torch.tensor([1.0, 2.0, 4.0]))

    # sqrt: w is proportional to 1 / sqrt(n).
    assert (class_weights(counts, "sqrt") ** 2 * counts).diff().abs().max() < 1e-3

    # effective is milder than inverse, where the ratio is 6.
    beta = 1 - 1 / (100 / 3)
    w = class_weights(counts, "effective")
    ratio = (w[2] / w[0]).item()
    assert ratio == pytest.approx((1 - beta ** 60) / (1 - beta ** 10), rel=1e-5)
    assert 1 < ratio < 6


def test_median_frequency_looks_only_at_images_with_the_class():
    per_image = torch.tensor([[50, 50, 0], [80, 0, 20], [100, 0, 0]])
    w = class_weights(per_image, "median")
    # Shares where present: 230/300, 50/100, 20/100.
    torch.testing.assert_close(w / w[1], torch.tensor([0.5 / (230 / 300), 1.0, 0.5 / 0.2]))
    whole = class_weights(per_image.sum(0), "sqrt")
    torch.testing.assert_close(class_weights(per_image, "sqrt"), whole)
    # Without images of their own it is inverse.
    torch.testing.assert_close(class_weights(COUNTS, "median"), class_weights(COUNTS, "inverse"))


def test_class_weights_unknown_way():
    with pytest.raises(ValueError, match="'auto', known: none, inverse, sqrt, median, effective"):
        class_weights(COUNTS, "auto")


@pytest.mark.parametrize("name", NAMES)
def test_terms_that_are_ratios_of_sums_ask_the_other_ranks(name):
    logits, y = batch()
    asked = []
    weighted_sum([(1.0, name)], logits, y, total=lambda t: asked.append(t) or t)
    assert bool(asked) == (name in SETS)  # a new term: does it divide sums over the batch? See OPTIONS
