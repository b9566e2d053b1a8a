"""models/infer.py: windows without seams, strips of large images, one matrix for a whole split."""
import numpy as np
import pytest
import torch
from gloo import on_ranks
from PIL import Image
from torch import nn

from data import metrics
from data.common import IGNORE, BadInput
from data.datasets import NORMS, SegDataset, normalise
from data.io import Labels
from models.infer import (
    as_tensor, blend_weight, class_ids, evaluate, examples, hann, ids_of, panels, predictions, slide, slide_down,
    slide_rows, starts, windows)

SIZES = [(1, 1), (5, 200), (31, 33), (32, 32), (33, 65), (64, 65), (100, 47)]


# ---- windows

@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("H, W", SIZES)
def test_windows_cover_every_pixel_and_stay_inside(overlap, H, W):
    boxes = windows(H, W, 32, overlap)
    seen = np.zeros((H, W), int)
    for top, left, h, w in boxes:
        assert (h, w) == (min(H, 32), min(W, 32))
        assert 0 <= top <= H - h and 0 <= left <= W - w
        seen[top:top + h, left:left + w] += 1
    assert seen.min() >= 1 and len(set(boxes)) == len(boxes)


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("n", [1, 32, 33, 64, 100, 101])
def test_neighbouring_windows_share_what_was_asked_for(overlap, n):
    found = starts(n, 32, overlap)
    assert found[0] == 0 and found[-1] == max(0, n - 32)
    steps = np.diff(found)
    assert (steps >= 1).all() and (steps <= 32 * (1 - overlap) + 1e-9).all()


@pytest.mark.parametrize("h, w", [(1, 1), (2, 9), (3, 3), (512, 512)])
def test_every_pixel_of_a_window_counts_and_its_middle_most(h, w):
    weight = blend_weight(h, w)
    assert weight.shape == (h, w) and (weight > 0).all()
    assert weight[h // 2, w // 2] > weight.max() - 1e-6
    for flip in (weight.flip(0), weight.flip(1)):
        torch.testing.assert_close(weight, flip)


def test_the_weight_is_a_hann_window_without_its_zeros():
    want = [0.5 - 0.5 * np.cos(2 * np.pi * i / 11) for i in range(1, 11)]
    np.testing.assert_allclose(hann(10), want, atol=1e-6)


class Pixelwise(nn.Module):
    """Logits are a function of each pixel alone, so that windows must not show."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x):
        return x * self.gain + 3


@pytest.mark.parametrize("overlap", [0, 0.25, 0.7])
@pytest.mark.parametrize("gain", [0.0, 1.0])  # a constant network, and one that passes its input on
@pytest.mark.parametrize("H, W", SIZES)
def test_blending_returns_what_every_window_says(overlap, gain, H, W):
    x = torch.randn(3, H, W, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = slide(Pixelwise(gain), x, crop=32, overlap=overlap, batch=3, amp=False)
    torch.testing.assert_close(out, x * gain + 3, rtol=1e-5, atol=1e-5)


class Conv(nn.Module):
    """Logits of 5 classes that depend on neighbours and on the edge of the window."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 5, padding=2), nn.BatchNorm2d(8), nn.Tanh(),
            nn.Conv2d(8, 5, 5, padding=2))

    def forward(self, x):
        return self.body(x)


def test_slide_is_the_weighted_mean_of_its_windows():
    net, x = Conv().eval(), torch.randn(3, 50, 70)
    total, weights = torch.zeros(5, 50, 70), torch.zeros(50, 70)
    with torch.no_grad():
        for top in (0, 18):  # 32 with an overlap of 1/4: steps of 24, the last one shifted inwards
            for left in (0, 24, 38):
                z = net(x[None, :, top:top + 32, left:left + 32])[0]
                w = torch.outer(hann(32), hann(32))
                total[:, top:top + 32, left:left + 32] += z * w
                weights[top:top + 32, left:left + 32] += w
        out = slide(net, x, crop=32, overlap=0.25, batch=4, amp=False)
    torch.testing.assert_close(out, total / weights)


@pytest.mark.parametrize("H, W", [(20, 25), (50, 70), (33, 100)])
def test_the_batch_does_not_matter(H, W):
    net, x = Conv().eval(), torch.randn(3, H, W)
    with torch.no_grad():
        one, five, all_ = (slide(net, x, 32, 0.4, batch, False) for batch in (1, 5, 100))
    torch.testing.assert_close(one, five)
    torch.testing.assert_close(one, all_)


@pytest.mark.parametrize("batch", [1, 3, 100])  # 3: a batch has windows of two rows, 100: all
@pytest.mark.parametrize("overlap", [0, 0.25, 0.7])
@pytest.mark.parametrize("H, W", [(400, 70), (64, 200), (33, 65), (200, 30), (64, 64)])
def test_some_rows_after_the_other_are_the_same_bits(overlap, H, W, batch):
    net, image = Conv().eval(), noise(H, W)
    whole = slide(net, normalise(image, "sat"), 64, overlap, batch, False)
    parts, height = [], 0
    for rows, logits in slide_down(net, as_tensor(image), 64, overlap, batch, False, norm="sat"):
        assert rows.start == height and logits.shape == (5, rows.stop - rows.start, W)
        height = rows.stop
        parts.append(logits.clone())
    assert height == H and torch.equal(torch.cat(parts, 1), whole)
    assert len(parts) > 2 or batch > 1 or H <= 128


@pytest.mark.parametrize("classes", [1, 2, 8, 254])
def test_the_class_of_the_highest_logit_and_of_equal_ones_the_first(classes):
    logits = np.random.default_rng(0).integers(-3, 4, (classes, 9, 7)).astype(np.float32)
    ids = class_ids(torch.from_numpy(logits))
    assert ids.dtype == np.uint8
    np.testing.assert_array_equal(ids, logits.argmax(0))


def reader(image, valid=None):
    """Rows of an array, as data/strips.py reads them of a file."""
    def read(top, height):
        rows = slice(top, top + height)
        return image[rows], None if valid is None else valid[rows]
    return read


def noise(H, W):
    return np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)


def ids_by_rows(net, image, valid=None, **how):
    """(H, W) ids, put together from strips that must follow each other."""
    how = dict(crop=64, overlap=0.25, batch=3, amp=False, whole=0) | how
    parts, next_row = [], how.get("first", 0)
    for strip in slide_rows(net, reader(image, valid), image.shape[:2], "sat", **how):
        assert strip.top == next_row
        parts.append(strip.ids().copy())
        next_row += len(parts[-1])
    assert next_row == len(image)
    return np.concatenate(parts)


@pytest.mark.parametrize("overlap", [0, 0.25, 0.7])
@pytest.mark.parametrize("H, W", [(150, 100), (64, 200), (40, 90), (200, 30)])
def test_rows_of_windows_say_what_the_whole_image_says(overlap, H, W):
    net, image = Conv().eval(), noise(H, W)
    ids = ids_by_rows(net, image, overlap=overlap)
    with torch.inference_mode():
        logits = slide(net, normalise(image, "sat"), 64, overlap, 3, False)
    assert ids.shape == (H, W) and ids.dtype == np.uint8 and len(np.unique(ids)) == 5
    # Sums of floats are rounded in two ways, so only near-ties may differ.
    best, second = logits.topk(2, dim=0).values
    differ = torch.from_numpy(ids) != logits.argmax(0)
    assert (best - second)[differ].lt(1e-4).all()
    whole = ids_by_rows(net, image, overlap=overlap, whole=None)
    np.testing.assert_array_equal(whole, logits.argmax(0).numpy())


@pytest.mark.parametrize("overlap", [0, 0.3, 0.7])
def test_rows_from_any_row_on_are_the_same_bits(overlap):
    net, image = Conv().eval(), noise(300, 90)
    want = ids_by_rows(net, image, overlap=overlap)
    for first in (0, 1, 64, 130, 299):
        got = ids_by_rows(net, image, overlap=overlap, first=first)
        np.testing.assert_array_equal(got, want[first:])
    for whole in (None, 0):  # all rows are there: nothing is computed
        how = dict(crop=64, overlap=overlap, batch=3, amp=False, whole=whole)
        assert not list(slide_rows(net, None, image.shape[:2], "sat", **how, first=300))


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5])
def test_a_crop_is_predicted_as_its_place_in_the_image(overlap):
    """Away from the rim by a window, for crops that begin where windows do."""
    net, image = Conv().eval(), noise(400, 400)
    step = round(64 * (1 - overlap))
    whole = ids_by_rows(net, image, overlap=overlap)
    top, left = 1 * step, 2 * step
    part = ids_by_rows(net, image[top:, left:left + 64 + 3 * step], overlap=overlap)
    inner = slice(64, -64)
    np.testing.assert_array_equal(part[inner, inner], whole[top:, left:left + 64 + 3 * step][inner, inner])


@pytest.mark.parametrize("overlap", [0, 0.25, 0.7])
@pytest.mark.parametrize("H, W", [(150, 100), (65, 64), (40, 90), (1, 1)])
def test_rows_of_a_network_that_passes_its_input_on(overlap, H, W):
    image = noise(H, W)
    mean, std = NORMS["sat"]
    want = ((image / 255 - mean) / std).argmax(2)
    np.testing.assert_array_equal(ids_by_rows(Pixelwise(), image, overlap=overlap), want)
    assert (ids_by_rows(Pixelwise(0.0), image, overlap=overlap) == 0).all()


class Counted(Conv):
    """Counts its windows."""
    seen = 0

    def forward(self, x):
        self.seen += len(x)
        return super().forward(x)


def test_windows_without_data_are_not_computed():
    net, image = Counted().eval(), noise(400, 256)
    valid = np.zeros((400, 256), bool)
    valid[70:100, 10:20] = True  # in two windows of 64 without overlap
    ids = ids_by_rows(net, image, valid, overlap=0)
    assert net.seen == 1 and (ids[~valid] == IGNORE).all()
    want = ids_by_rows(net, image, overlap=0)
    np.testing.assert_array_equal(ids[valid], want[valid])
    net.seen = 0
    ids = ids_by_rows(net, image, valid, overlap=0.5)
    assert net.seen == 3  # those that begin in row 32, 64 and 96, all in column 0
    want = ids_by_rows(net, image, overlap=0.5)
    np.testing.assert_array_equal(ids[valid], want[valid])
    net.seen = 0
    assert (ids_by_rows(net, image, valid & False) == IGNORE).all() and net.seen == 0


@pytest.mark.parametrize("whole", [0, None])
def test_probabilities_are_the_softmax_of_blended_logits(whole):
    net, image = Conv().eval(), noise(150, 100)
    valid = np.ones((150, 100), bool)
    valid[:, :7] = False
    how = dict(crop=64, overlap=0.25, batch=3, amp=False)
    with torch.inference_mode():
        logits = slide(net, normalise(image, "sat"), **how).double().numpy() / 0.3
        got = [p.copy() for strip in slide_rows(net, reader(image, valid), (150, 100), "sat", **how, whole=whole)
               for p in strip.probabilities(5, 0.3)]
    got = np.concatenate(got)
    e = np.exp(logits - logits.max(0))
    want = 255 * (e / e.sum(0)).transpose(1, 2, 0)
    assert got.dtype == np.uint8 and (got[:, :7] == 0).all()
    assert np.abs(got[:, 7:] - want[:, 7:]).max() < 0.51


@pytest.mark.parametrize("W, crop, overlap, classes", [
    (100, 512, 0.25, 8), (20_000, 512, 0.25, 8), (100_000, 512, 0.25, 8), (100_001, 300, 0.5, 20), (9000, 64, 0, 254)])
def test_panels_share_the_columns_and_have_all_their_windows(W, crop, overlap, classes):
    found = panels(W, crop, overlap, classes)
    lefts, all_ = [0], starts(W, crop, overlap)
    for left, width, first, wide in found:
        assert left == lefts[-1] and left % 512 == 0
        lefts.append(left + width)
        own = [first + l for l in starts(wide, crop, overlap)]
        touching = [l for l in all_ if l < left + width and l + crop > left]
        assert own == touching
        assert 4 * classes * crop * wide < 1e9  # bytes of logits
    assert lefts[-1] == W


# ---- a whole split

NAMES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven images of several sizes with masks of three classes, a tenth of them ignored."""
    root, rng, pairs = tmp_path_factory.mktemp("split"), np.random.default_rng(0), {}
    for i in range(7):
        H, W = rng.integers(20, 60, 2)
        image = rng.integers(0, 256, (H, W, 3), np.uint8)
        mask = rng.choice(np.uint8([0, 1, 2, 9]), (H, W), p=[0.5, 0.3, 0.1, 0.1])
        pairs[f"image {i}"] = root / f"{i}.png", root / f"{i}_mask.png"
        Image.fromarray(image).save(root / f"{i}.png")
        Image.fromarray(mask).save(root / f"{i}_mask.png")
    labels = Labels([dict(name=name, id=i) for i, name in enumerate(NAMES)], [9])
    return SegDataset(pairs, labels, "imagenet")


def answers(image):
    """What Pixelwise() says of an image: the channel that is largest once it is normalised."""
    mean, std = NORMS["imagenet"]
    return ((image / 255 - mean) / std).argmax(2)


def by_hand(data, which=range(7)):
    cm = np.zeros((3, 3), int)
    for i in which:
        image, mask = data.read(i)
        for true, pred in zip(mask.flatten(), answers(image).flatten()):
            if true != IGNORE:
                cm[true, pred] += 1
    return cm.tolist()


WINDOW = dict(crop=32, overlap=0.25, batch=4, amp=False)


@pytest.mark.parametrize("how, workers", [
    ({}, 0), (dict(batch=1), 0), (dict(crop=64), 0), (dict(overlap=0), 0), ({}, 2)])
def test_the_matrix_counts_every_pixel_once(data, how, workers):
    assert evaluate(Pixelwise(), data, WINDOW | how, workers).tolist() == by_hand(data)


def test_each_image_has_its_matrix_and_its_name(data):
    found = {}
    for name, y, strips in predictions(Pixelwise(), data, WINDOW):
        found[name] = metrics.confusion(ids_of(strips), y, len(data.labels.names))
    assert list(found) == data.names
    for i, name in enumerate(data.names):
        assert found[name].tolist() == by_hand(data, [i])


def test_the_matrix_may_be_wider_than_the_classes_of_the_data(data):
    cm = evaluate(Pixelwise(), data, WINDOW, classes=5)
    assert cm[:3, :3].tolist() == by_hand(data) and cm.sum() == np.sum(by_hand(data))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_network_is_left_alone(data, training):
    net = nn.Sequential(Conv(), nn.Dropout(0.5), nn.Conv2d(5, 3, 1)).train(training)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    first = evaluate(net, data, WINDOW)
    assert net.training == training and net[0].body[1].training == training
    assert torch.equal(evaluate(net, data, WINDOW), first)  # neither dropout nor batch statistics
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_images_and_know_the_whole(data, tmp_path, world):
    def work(rank, world):
        return evaluate(Pixelwise(), data, WINDOW).tolist()

    assert on_ranks(tmp_path, world, work) == [by_hand(data)] * world


class Shifted(Pixelwise):
    """Says another class by a statistic, as BatchNorm's, which each rank has counted for itself."""

    def __init__(self, shift):
        super().__init__()
        self.register_buffer("shift", torch.tensor([shift, 0.0, 0.0]).view(3, 1, 1))

    def forward(self, x):
        return x + self.shift


def test_all_ranks_evaluate_with_the_statistics_of_rank_0(data, tmp_path):
    def work(rank, world):
        return evaluate(Shifted(0.0 if rank == 0 else 100.0), data, WINDOW).tolist()

    assert on_ranks(tmp_path, 2, work) == [by_hand(data)] * 2


def test_a_split_without_a_labelled_pixel_is_an_error(data):
    pairs = dict(zip(data.names, data.files))
    nothing = SegDataset(pairs, Labels([dict(name="a", id=100)], [0, 1, 2, 9]), "imagenet")
    said = 'image 0 and 6 more: every pixel is ignored; correct "ignore"'
    with pytest.raises(BadInput, match=said):
        evaluate(Pixelwise(), nothing, WINDOW)


def test_examples_are_spread_and_hold_image_truth_and_answer(data):
    rows = examples(Pixelwise().train(), data, WINDOW, 3)
    assert [name for *_, name in rows] == ["image 0", "image 3", "image 6"]
    for i, (image, mask, ids, _) in zip((0, 3, 6), rows):
        want_image, want_mask = data.read(i)
        np.testing.assert_array_equal(image, want_image)
        np.testing.assert_array_equal(mask, want_mask)
        np.testing.assert_array_equal(ids, answers(image))
    assert len(examples(Pixelwise(), data, WINDOW, 100)) == 7
