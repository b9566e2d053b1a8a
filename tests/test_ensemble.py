"""models/ensemble.py: nothing moves by a pixel, probabilities and weights are means, other runs are refused."""
import hashlib

import numpy as np
import pytest
import torch
from runs import OLD_SPECS, old_run
from torch import nn

from data.common import BadInput
from data.datasets import NORMS, normalise
from models.checkpoint import load_weights, save_weights
from models.ensemble import VIEWS, Average, Member, Scale, identity, load_runs, soup
from models.infer import slide
from models.nets import NETS, load_run
from models.vit import PRESETS
from models.weights import BadWeights

SIZES = [(8, 8), (7, 12), (13, 6), (1, 9)]


def image(h, w, channels=3, seed=0):
    return torch.randn(2, channels, h, w, generator=torch.Generator().manual_seed(seed))


class Pixelwise(nn.Module):
    """Logits of five classes from each pixel alone: whatever turns the image turns them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Conv2d(8, 5, 1))

    def forward(self, x):
        return self.body(x)


class Lopsided(nn.Module):
    """Looks to the upper left, in patches of three, padded as a ViT is: every view gives another answer."""

    def __init__(self, patch=3):
        super().__init__()
        torch.manual_seed(1)
        self.patch, self.body = patch, nn.Conv2d(3, 4, patch, stride=patch)

    def forward(self, x):
        h, w = x.shape[-2:]
        z = self.body(nn.functional.pad(x, (0, -w % self.patch, 0, -h % self.patch)))
        return z.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)[..., :h, :w]


# ---- views

@pytest.mark.parametrize("h, w", SIZES)
@pytest.mark.parametrize("tta", ["flips", "d4"])
def test_turned_views_of_a_pixelwise_network_say_what_it_says(tta, h, w):
    net, x = Pixelwise(), image(h, w)
    with torch.no_grad():
        found, want = Average([net], VIEWS[tta])(x), net(x).log_softmax(1)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


def turned(a, way):
    """One of the eight ways to lay a sheet: NumPy's own turns and mirrors."""
    quarters, mirrored = divmod(way, 2)
    return np.rot90(a[..., ::-1] if mirrored else a, quarters, (-2, -1))


def turned_back(a, way):
    quarters, mirrored = divmod(way, 2)
    a = np.rot90(a, -quarters, (-2, -1))
    return a[..., ::-1] if mirrored else a


@pytest.mark.parametrize("h, w", SIZES)
@pytest.mark.parametrize("tta, ways", [("flips", [0, 1, 4, 5]), ("d4", range(8))])
def test_probabilities_of_the_views_are_averaged(tta, ways, h, w):
    net, x = Lopsided(), image(h, w)
    with torch.no_grad():
        want = []
        for way in ways:
            z = net(torch.tensor(turned(x.numpy(), way).copy())).softmax(1).numpy()
            want.append(turned_back(z, way))
        found = Average([net], VIEWS[tta])(x)
    np.testing.assert_allclose(found.exp(), np.mean(want, 0), atol=1e-6)
    assert h == 1 or len({z.tobytes() for z in want}) == len(ways)
    assert found.shape == (2, 4, h, w) and found.dtype == torch.float32


class Constant(nn.Module):
    def forward(self, x):
        return torch.tensor([0.3, -2.0, 1.7]).view(3, 1, 1).expand(len(x), 3, *x.shape[-2:])


@pytest.mark.parametrize("h, w", [(8, 8), (37, 50), (1, 9), (3, 2)])
def test_scales_of_a_constant_network_are_exact(h, w):
    found = Average([Constant()], VIEWS["scales"])(image(h, w))
    want = Constant()(image(h, w)).log_softmax(1)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [0.5, 0.75, 1.25, 1.9])
@pytest.mark.parametrize("h, w", [(40, 40), (37, 51)])
def test_there_and_back_through_a_scale_moves_nothing(factor, h, w):
    """A slope of one a pixel shows a shift as its value."""
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    x = torch.stack([rows, columns])[None].float()
    scale = Scale(factor)
    seen = scale.there(x)
    assert seen.shape[-2:] == (round(h * factor), round(w * factor))
    back = scale.back(seen, (h, w))
    inner = (..., slice(6, h - 6), slice(6, w - 6))  # at the rim the slope is cut off
    torch.testing.assert_close(back[inner], x[inner], rtol=0, atol=1e-3)


# ---- members

def meta_of(norm, names, crop):
    return dict(norm=norm, classes=[dict(name=name) for name in names], crop=crop, overlap=0.5)


def test_a_member_sees_its_own_normalisation_and_answers_in_the_first_ones_classes():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)
    net, first = Lopsided(), meta_of("imagenet", ["road", "car", "tree", "pool"], 16)
    member = Member(net, meta_of("sat", ["tree", "pool", "road", "car"], 16), first, 16)
    with torch.no_grad():
        found = member(normalise(pixels, "imagenet")[None])
        mean, std = NORMS["sat"]
        own = torch.tensor(((pixels / 255 - mean) / std).transpose(2, 0, 1)[None], dtype=torch.float32)
        want = net(own)[:, [2, 3, 0, 1]]
    torch.testing.assert_close(found, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("crop", [12, 16])
def test_a_member_of_smaller_windows_slides_them_over_the_larger_one(crop):
    net, x = Lopsided(), image(16, 16)
    meta = meta_of("sat", "abcd", crop)
    with torch.no_grad():
        found = Member(net, meta, meta, 16)(x)
        want = [slide(net, one, crop, 0.5, 1, False) for one in x]
    torch.testing.assert_close(found, torch.stack(want))
    assert torch.equal(found, net(x)) == (crop == 16)


# ---- runs

class WithBatchNorm(nn.Sequential):
    def __init__(self, classes):
        super().__init__(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, classes, 1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of the tiny set's classes: a, a network of other sizes, and one with BatchNorm."""
    NETS["tiny"] = WithBatchNorm, None, {}
    yield make_runs(tmp_path_factory)
    del NETS["tiny"]


def make_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    vit = dict(name="vit", backbone=PRESETS["nano8"], head="linear", taps=[0, 3], feat_norm=True)
    old_run(folder / "a", vit)
    old_run(folder / "other", OLD_SPECS["vit without final norm, blocks of its own"])
    old_run(folder / "bn", dict(name="tiny", options={}))
    return folder


def changed(run, out, shift=None, **fields):
    """A copy of a run with other fields in its header, and with all its weights moved by shift(name, tensor)."""
    tensors, meta = load_weights(run)
    if shift:
        tensors = {name: shift(name, t) for name, t in tensors.items()}
    save_weights(out / "best.safetensors", tensors, meta | fields)
    return out


def test_one_run_without_views_is_its_network(runs):
    net, meta = load_runs(runs / "a")
    same, same_meta = load_run(runs / "a")
    x = image(20, 30)
    with torch.no_grad():
        assert torch.equal(net(x), same(x)) and meta == same_meta and not net.training


def test_runs_of_other_networks_norms_windows_and_orders_are_averaged(runs, tmp_path):
    _, meta = load_weights(runs / "other")
    other = changed(runs / "other", tmp_path / "b", classes=meta["classes"][::-1], norm="imagenet", crop=96)
    net, joint = load_runs(runs / "a", partners=[other])
    assert joint["crop"] == 96 and joint["norm"] == "sat" and not net.training
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    with torch.no_grad():
        a = load_run(runs / "a")[0](normalise(pixels, "sat")[None]).softmax(1)
        b = load_run(other)[0](normalise(pixels, "imagenet")[None]).softmax(1).flip(1)
        found = net(normalise(pixels, "sat")[None])
        slid = slide(net, normalise(pixels, "sat"), 96, 0.25, 4, False)
    torch.testing.assert_close(found.exp(), (a + b) / 2, rtol=0, atol=1e-5)
    torch.testing.assert_close(slid, found[0])
    assert (a - b).abs().max() > 0.01


def test_bf16_only_where_all_runs_were_trained_so(runs, tmp_path):
    fast = changed(runs / "a", tmp_path / "fast", amp="bf16")
    assert load_runs(fast, partners=[fast])[1]["amp"] == "bf16"
    assert load_runs(fast, partners=[runs / "a"])[1]["amp"] == "off"


def test_runs_of_other_classes_readings_or_tasks_are_refused_by_name(runs, tmp_path):
    _, meta = load_weights(runs / "a")
    names = [c["name"] for c in meta["classes"]]
    other = changed(runs / "a", tmp_path / "b", classes=[*meta["classes"][1:], dict(name="ship", id=0)])
    with pytest.raises(BadInput, match=f"{other}: .* ship, those of {runs}/a {names[0]}, .* same classes"):
        load_runs(runs / "a", partners=[other])
    bands = changed(runs / "a", tmp_path / "c", reading=dict(bands=[4, 1, 2], input_range=None))
    with pytest.raises(BadInput, match=f"{bands}: .*bands .4, 1, 2.*{runs}/a by bands None"):
        load_runs(runs / "a", partners=[bands])
    colours, grey = (changed(runs / "a", tmp_path / f"k{n}", kinds=[[n, 8]]) for n in (3, 1))
    with pytest.raises(BadInput, match=f"{grey}: trained on images of 1 band of 8 bits, {colours} on 3 bands of 8"):
        load_runs(colours, partners=[grey])
    # Named bands are there in images of four bands, too; of other bits they are others.
    named = dict(reading=dict(bands=[3, 2, 1], input_range=None))
    three, four, deep = (changed(runs / "a", tmp_path / f"n{n}-{bits}", kinds=[[n, bits]], **named)
                         for n, bits in ((3, 8), (4, 8), (3, 16)))
    load_runs(three, partners=[four])
    with pytest.raises(BadInput, match="3 bands of 16 bits"):
        load_runs(three, partners=[deep])
    table = changed(runs / "a", tmp_path / "d", task="classification")
    with pytest.raises(BadWeights, match=f"{table}: of another kind"):
        load_runs(runs / "a", partners=[table])


# ---- soups

def test_a_soup_is_the_mean_of_each_tensor():
    a = dict(w=torch.tensor([1.0, 2.0]), n=torch.tensor([3]))
    b = dict(w=torch.tensor([2.0, 6.0]), n=torch.tensor([3]))
    assert soup([a, b])["w"].tolist() == [1.5, 4.0]
    assert soup([a, a, b])["w"].tolist() == [np.float32(4 / 3), np.float32(10 / 3)]
    assert soup([a, b])["n"].tolist() == [3]
    with pytest.raises(ValueError, match="n differs"):
        soup([a, b | dict(n=torch.tensor([4]))])


def test_three_equal_networks_make_the_same_soup(runs):
    net, _ = load_run(runs / "a")
    mixed, _ = load_runs(runs / "a", soup=[runs / "a", runs / "a"])
    assert all(torch.equal(t, net.state_dict()[name]) for name, t in mixed.state_dict().items())


def test_a_soup_of_runs_of_one_start_has_the_mean_of_their_weights(runs, tmp_path):
    b = changed(runs / "a", tmp_path / "b", lambda name, t: t + 0.02 if t.is_floating_point() else t, step=7)
    tensors, _ = load_weights(runs / "a")
    net, meta = load_runs(runs / "a", soup=[b])
    assert meta["step"] == 6
    for name, t in net.state_dict().items():
        torch.testing.assert_close(t, tensors[name] + 0.01, rtol=1e-6, atol=1e-6)


def test_runs_that_have_no_mean_are_refused_by_name(runs, tmp_path):
    _, meta = load_weights(runs / "a")
    turned = changed(runs / "a", tmp_path / "turned", classes=meta["classes"][::-1])
    norm = changed(runs / "a", tmp_path / "norm", norm="imagenet")
    stats = changed(runs / "bn", tmp_path / "stats", lambda name, t: t + name.endswith("running_mean"))
    torch.manual_seed(5)
    again = changed(runs / "a", tmp_path / "again",
                    lambda name, t: torch.randn_like(t) if name.startswith("head") else t)
    for first, other, said in [
            ("a", runs / "other", "other: .* of other sizes than "),
            ("a", turned, "turned: the classes of .*/a in another order"),
            ("a", norm, "norm: normalisation imagenet, that of .*/a sat"),
            ("a", again, "again: its head has nothing in common with that of .*/a; .*--weights and --seed"),
            ("bn", stats, "stats: its BatchNorm has other statistics than that of ")]:
        with pytest.raises(BadInput, match=f"{said}.*--with {other}"):
            load_runs(runs / first, soup=[other])
        load_runs(runs / first, partners=[other])  # as the message says
    # With statistics that were kept, a network with BatchNorm has a mean.
    load_runs(runs / "bn", soup=[runs / "bn"])


def test_an_identity_is_of_all_that_answers(runs):
    a, b = runs / "a", runs / "other"
    own = hashlib.sha256((a / "best.safetensors").read_bytes()).hexdigest()
    assert identity(a) == identity(a, [], [], None) == own
    several = [dict(tta="d4"), dict(tta="flips"), dict(partners=[b]), dict(soup=[b]), dict(partners=[b, b])]
    assert len({own, *(identity(a, **how) for how in several)}) == 6
    assert identity(a, [b, runs / "bn"]) == identity(a, [runs / "bn", b])
