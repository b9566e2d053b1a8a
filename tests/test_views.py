"""data/views.py and --cache-features: kept features are the backbone's, and train as computed ones do."""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections import Counter

import numpy as np
import pytest
import torch
from runs import FOLDER, forks, logged, matrix, place, read, same_run, server, tiny_set  # noqa: F401, a fixture

import train_points
import train_seg
from data import augment, views
from data.cache import open_map
from data.common import BadInput
from data.crops import random_crop
from data.samplers import StepSampler
from data.source import Source
from data.views import Views
from models import features
from models.heads import HEADS, Segmenter
from models.nets import make
from models.vit import ViT, preset


def vit_file(seed, name):
    """A DINOv2 file of a random ViT of four blocks, 64 wide."""
    torch.manual_seed(seed)
    vit = ViT(**preset("dinov2", 14, 64, 4, 1, registers=0, grid=3))
    torch.save(vit.state_dict() | {"mask_token": torch.zeros(1, 64)}, place() / name)
    return place() / name


@pytest.fixture(scope="module")
def flags():
    """A short run on a frozen ViT; crops of 30 are padded to three patches of 14."""
    weights = vit_file(0, "dinov2_views.pth")
    return ["--root", tiny_set(), *FOLDER, "--weights", weights, "--norm", "imagenet", "--crop", 30, "--steps", 8,
            "--eval-every", 4, "--log-every", 1, "--batch-size", 3, "--warmup", 1, "--views", 2]


@pytest.fixture(scope="module")
def computed(flags):
    """The same run, in which every step computes the features of its views."""
    server().run("train_seg", *flags, "--out", place() / "computed")
    return place() / "computed"


@pytest.fixture(scope="module")
def kept(flags):
    """A run on kept features, and their folder."""
    out, folder = place() / "kept", place() / "features"
    text = server().run("train_seg", *flags, "--out", out, "--cache-features", folder)
    return out, folder, text


def crop_of(image, mask, rng):
    image, mask = random_crop(image, mask, 30, (0.5, 2), rng)
    image, mask = augment.dihedral(image, mask, rng)
    return augment.color(image, rng, 0.2), mask


def open_tiny(folder, weights="any", amp=False, seed=0, n=2, drawn=None):
    """(net, Source, Views, Kept of them, Kept of val) of a small random ViT."""
    torch.manual_seed(0)
    vit = ViT(**preset("dinov3", 16, 32, 3, 2))
    net = Segmenter(vit, HEADS["linear"](32, 2, 8, 16), [0, 2])
    net.unfreeze(0)
    net.train()
    d = Source("folder", tiny_set())
    train, val = (d.part("train", "sat", crop_of, seed), d.part("val", "sat"))
    fixed = Views(train, n)
    both = features.open_kept(folder, net, weights, amp, d, fixed, drawn or {}, val, 40, 0.25)
    return net, d, fixed, *both


def fill(net, kept, kept_val=None, batch=5, workers=0):
    return list(features.keep_all(net, kept, kept_val, batch, False, workers, reads=100, validations=1))


def files_of(folder):
    """{name: (bytes, time)} of the views in a sub-folder."""
    return {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.glob("view-*")}


def near_bf16(kept, exact):
    """bf16 keeps 8 bits of a number: rounding is up to half a unit of the last, 2^-8 of the value."""
    torch.testing.assert_close(kept.float(), exact, rtol=2 ** -8, atol=1e-5)


# ---- which views

@pytest.mark.parametrize("world", [1, 3])
def test_every_image_shows_its_views_in_turn_and_equally_often(world):
    d = Source("folder", tiny_set())
    train = Views(d.part("train", "imagenet", crop_of), 4)
    seen = Counter()
    for rank in range(world):
        for batch in StepSampler(6, 8 // (world + 1), 12 * 6 // (world * (8 // (world + 1))), 0, 0, rank, world):
            seen.update((i, train.number(i, draw)) for i, draw in batch)
    assert set(seen.values()) == {3} and len(seen) == 24
    assert {k % 6 for i, k in seen} == set(range(6)) and all(k % 6 == i for i, k in seen)


def test_a_view_is_the_same_whenever_it_is_drawn_and_others_differ():
    d = Source("folder", tiny_set())
    train = Views(d.part("train", "imagenet", crop_of, 5), 2)
    first, second, again = (train[1, draw][0] for draw in (4, 6 + 4, 12 + 3))
    assert torch.equal(first, again) and not torch.equal(first, second)
    other = Views(d.part("train", "imagenet", crop_of, 6), 2)
    assert not torch.equal(first, other[1, 4][0])


# ---- kept features

@pytest.mark.parametrize("workers", [0, 1])
def test_kept_is_what_an_uncached_sample_and_the_backbone_give(tmp_path, workers):
    net, d, fixed, kept, kept_val = open_tiny(tmp_path)
    fill(net, kept, kept_val, workers=workers)
    for i, draw in ((0, 0), (5, 7), (2, 21)):
        x, y, name = fixed[i, draw]
        x_kept, y_kept, name_kept, *maps = kept[i, draw]
        assert torch.equal(x, x_kept) and torch.equal(y, y_kept) and name == name_kept
        with torch.no_grad():
            exact, _ = net.backbone(x[None], [0, 2], True)
        assert len(maps) == 2 and maps[0].dtype == torch.bfloat16
        for a, b in zip(maps, exact):
            near_bf16(a, b[0])
    # Windows of 40 with an overlap of a quarter in 64 x 64 pixels begin at 0 and 24.
    x, _, _ = d.part("val", "sat")[1]
    for n, (top, left) in enumerate([(0, 0), (0, 24), (24, 0), (24, 24)]):
        with torch.no_grad():
            exact, _ = net.backbone(x[None, :, top:top + 40, left:left + 40], [0, 2], True)
        for a, b in zip(kept_val.maps_of(1, n, n + 1), exact):
            near_bf16(a, b)


def test_a_head_on_known_maps_gives_what_the_whole_network_gives():
    net, *_ = make("vit", 4, arch="nano16", head="fpn")
    net.eval()
    x = torch.randn(2, 3, 40, 50)
    with torch.no_grad():
        maps, _ = net.backbone(x, net.taps, net.feat_norm)
        assert torch.equal(net(x, *maps), net(x))
        off = net(x, *(t.bfloat16() for t in maps)) - net(x)
        other = net(x, *(t.flip(0) for t in maps)) - net(x)
    assert 0 < off.abs().max() < 0.1 * other.abs().max()


def test_what_is_printed_first_is_what_lies_on_disk(kept):
    _, folder, text = kept
    lines = [line for line in text.splitlines() if line.startswith("features")]
    # 2 views of 6 images, 9 windows in each of 2 images: 64 pixels in steps of 22, the last moved inwards.
    assert [line.split()[1] for line in lines] == ["12", "18"]
    for line in lines:
        sub = folder / line.split("features-")[1].split()[0].join(["features-", ""])
        size = sum(f.stat().st_size for f in sub.glob("view-*"))
        assert f"{size / 1e6:.1f} MB" in line and read(sub / "about.json")["crop"] == 30
    assert "computing one takes" in text


# ---- trainings

def test_training_on_kept_features_is_training_that_computes_them(kept, computed):
    a, b = (logged(run, "loss") for run in (kept[0], computed))
    assert list(a) == list(b) == [1, 2, 3, 4, 5, 6, 7, 8]
    off = max(abs(a[step] / b[step] - 1) for step in a)
    assert 0 < off < 1e-3 < max(abs(a[step] / b[step + 1] - 1) for step in range(1, 8))
    miou, exact = (logged(run, "val_miou") for run in (kept[0], computed))
    assert list(miou) == [4, 8] and miou == pytest.approx(exact, abs=0.005)


def test_another_head_rate_and_loss_share_the_files(kept, flags, forks, tmp_path):
    _, folder, _ = kept
    before = {sub.name: files_of(sub) for sub in folder.iterdir()}
    text = forks.run("train_seg", *flags, "--out", tmp_path / "b", "--cache-features", folder, "--head", "linear",
                     "--lr", 0.01, "--loss", "ce+dice", "--steps", 2, "--workers", 2)
    assert "12 are there" in text and "18 are there" in text and "computing one" not in text
    assert before == {sub.name: files_of(sub) for sub in folder.iterdir()}


def test_killed_and_resumed_it_ends_alike(kept, flags, forks, tmp_path):
    out, folder, _ = kept
    pid = forks.start("train_seg", *flags, "--out", tmp_path / "b", "--cache-features", folder)
    while not (tmp_path / "b/best.safetensors").exists():
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    forks.finish()
    # Another place for the same features, where they are computed again.
    forks.run("train_seg", "--resume", tmp_path / "b", "--cache-features", tmp_path / "moved")
    same_run(out, tmp_path / "b")


def test_two_ranks_fill_one_folder_and_train_alike(flags, forks, tmp_path):
    # In bf16 a batch of two may round otherwise than one of four.
    more = ["--steps", 4, "--head", "linear", "--dropout", 0, "--amp", "off"]
    folder = tmp_path / "g"
    forks.run("train_seg", *flags, *more, "--out", tmp_path / "one", "--batch-size", 4, "--cache-features", folder)
    text = forks.run("train_seg", *flags, *more, "--out", tmp_path / "two", "--batch-size", 2, "--cache-features",
                     tmp_path / "f", ranks=2)
    assert text.count("computing one") == 2  # rank 0 alone prints
    one, two = (list(logged(tmp_path / run, "loss").values()) for run in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4) and matrix(tmp_path / "one") == matrix(tmp_path / "two")
    for sub in folder.iterdir():
        assert files_of(sub).keys() == files_of(tmp_path / "f" / sub.name).keys()


def test_points_train_on_kept_features_too(flags, forks, tmp_path):
    flags = [*flags, "--steps", 3, "--focus", 0]
    forks.run("train_points", *flags, "--out", tmp_path / "a", "--cache-features", tmp_path / "f")
    forks.run("train_points", *flags, "--out", tmp_path / "b")
    a, b = (list(logged(tmp_path / run, "loss").values()) for run in "ab")
    assert a == pytest.approx(b, rel=2e-3)
    # Other points are other masks.
    text = forks.run("train_points", *flags, "--out", tmp_path / "c", "--cache-features", tmp_path / "f",
                     "--points-per-class", 2, "--final", "--steps", 1)
    assert "is not taken: it has another points" in text and "computing one" in text


# ---- interrupted, stale, damaged

def test_a_killed_filling_goes_on_where_it_was(tmp_path):
    net, _, _, kept, _ = open_tiny(tmp_path / "a", n=3)
    fill(net, kept)
    whole = files_of(kept.folder)
    assert len(whole) == 18
    net, _, _, kept, _ = open_tiny(tmp_path / "b", n=3)
    fill(net, kept)
    gone = [kept.file(k) for k in (3, 7, 17)]
    gone[0].unlink()
    gone[1].write_bytes(gone[1].read_bytes()[:-1])  # as after a power failure
    gone[2].rename(kept.folder / "nanors-0.tmp")
    os.utime(kept.folder / "nanors-0.tmp", (0, 0))
    before = files_of(kept.folder)
    text, = fill(net, kept, batch=2)
    assert "15 are there" in text and not list(kept.folder.glob("*.tmp"))
    after = files_of(kept.folder)
    for name, (content, when) in after.items():
        arrays = [np.frombuffer(c[512:512 + 30 * 30 * 4], np.uint8) for c in (content, whole[name][0])]
        assert np.array_equal(*arrays) and len(content) == len(whole[name][0])
        untouched = name not in {file.name for file in gone}
        assert (before.get(name, (0, 0))[1] == when) == untouched


@pytest.mark.parametrize("what, change", [
    ("seed", ["--seed", 1]), ("scale", ["--scale", 1, 1]), ("color", ["--color", 0]), ("views", ["--views", 3]),
    ("weights", ["--weights", "other"]), ("files", ["--root", "changed"])])
def test_what_decides_features_has_a_folder_of_its_own(kept, flags, tmp_path, capsys, what, change):
    if change[1] == "other":
        change = ["--weights", vit_file(1, "dinov2_other.pth")]
    if change[1] == "changed":
        root = shutil.copytree(tiny_set(), tmp_path / "set")
        image, other = sorted((root / "train/images").iterdir())[:2]
        shutil.copy(other, image)
        change = ["--root", root]
    shutil.copytree(kept[1], tmp_path / "f")
    argv = [*flags, "--head", "linear", "--steps", 1, "--final", "--out", tmp_path / "b",
            "--cache-features", tmp_path / "f", *change]
    train_seg.main(train_seg.parse_args([str(word) for word in argv]))
    text = capsys.readouterr().out
    assert len(list((tmp_path / "f").iterdir())) == 3 and "are there" not in text
    assert f"is not taken: it has another {what}" in text


def test_every_part_of_the_key_counts(tmp_path):
    net, d, fixed, kept, kept_val = open_tiny(tmp_path)
    val = kept_val.views.data
    net.taps = [0, 2]

    def folders(weights="any", amp=False, drawn=None, crop=40, overlap=0.25):
        both = features.open_kept(tmp_path, net, weights, amp, d, fixed, drawn or {}, val, crop, overlap)
        return [part.folder.name for part in both]

    train_before, val_before = before = folders()
    assert before == [kept.folder.name, kept_val.folder.name]
    for change in (dict(weights="b"), dict(amp=True), dict(crop=41)):
        assert not set(folders(**change)) & set(before), change
    assert folders(drawn=dict(focus=0.1))[0] != train_before and folders(drawn=dict(focus=0.1))[1] == val_before
    assert folders(overlap=0.5)[1] != val_before
    net.taps = [1, 2]
    assert not set(folders()) & set(before)


def test_a_damaged_file_is_named_and_the_advice_works(tmp_path):
    net, _, _, kept, _ = open_tiny(tmp_path)
    fill(net, kept)
    file = kept.file(4)
    content = bytearray(file.read_bytes())
    content[-3000] ^= 1
    file.write_bytes(content)
    open_map.cache_clear()  # as another process, which verifies each file once
    with pytest.raises(BadInput, match="view-000004.raw: damaged.* rm .*view-000004.raw"):
        kept[4, 0]
    file.unlink()
    open_map.cache_clear()
    with pytest.raises(BadInput, match="view-000004.raw: cannot be read .No such file"):
        kept[4, 0]
    fill(net, kept)
    assert len(kept[4, 0]) == 5


def test_all_damaged_files_are_named_at_once(tmp_path):
    net, _, _, kept, _ = open_tiny(tmp_path)
    fill(net, kept)
    for k in (1, 4, 5):
        content = bytearray(kept.file(k).read_bytes())
        content[-3000] ^= 1
        kept.file(k).write_bytes(content)
    open_map.cache_clear()
    with pytest.raises(BadInput) as e:
        kept[4, 0]
    command = re.search(r"Type (rm .*), then the same command", str(e.value))[1]
    assert shlex.split(command) == ["rm", *(str(kept.file(k)) for k in (1, 4, 5))]
    subprocess.run(command, shell=True, check=True)
    assert kept.missing() == [1, 4, 5]


def test_features_of_another_backbone_under_this_name_are_refused(tmp_path):
    net, _, _, kept, _ = open_tiny(tmp_path)
    fill(net, kept)
    with torch.no_grad():
        net.backbone.blocks[1].attn.proj.weight.normal_()
    with pytest.raises(BadInput, match="not what is drawn and computed now.*rm -r"):
        fill(net, kept)


def test_a_disk_too_small_is_said_before_anything_is_computed(flags, tmp_path):
    argv = [*flags, "--crop", 1024, "--views", 50000, "--out", tmp_path / "b", "--cache-features", tmp_path / "f"]
    with pytest.raises(BadInput, match="features need .* GB, and .* are free .*fewer --views"):
        train_seg.main(train_seg.parse_args([str(word) for word in argv]))
    assert not (tmp_path / "b").exists() and not list((tmp_path / "f").iterdir())


@pytest.mark.parametrize("script", [train_seg, train_points])
@pytest.mark.parametrize("change, said", [
    (["--weights", "none"], "frozen backbone"), (["--unfreeze", "2"], "frozen backbone"),
    (["--unfreeze", "all"], "frozen backbone"), (["--model", "unetformer", "--weights", "none"], "--model vit")])
def test_a_backbone_that_learns_is_refused(flags, tmp_path, capsys, script, change, said):
    argv = [*flags, "--out", tmp_path / "b", "--cache-features", tmp_path / "f", *change]
    with pytest.raises((BadInput, SystemExit)) as caught:
        script.main(script.parse_args([str(word) for word in argv]))
    assert said in f"{caught.value} {capsys.readouterr().err}"
    assert not list(tmp_path.iterdir())


def test_mixed_images_and_a_resumed_run_without_features_are_refused(computed, flags, forks, tmp_path, capsys):
    for mix in ("--mixup", "--cutmix"):
        with pytest.raises(SystemExit):
            train_seg.parse_args([str(word) for word in [*flags, "--cache-features", tmp_path / "f", mix, "0.5"]])
        assert "new images" in capsys.readouterr().err
    text = forks.run("train_seg", "--resume", computed, "--cache-features", tmp_path / "f", ok=2)
    assert "leave --cache-features out" in text and not (tmp_path / "f").exists()


def test_about_json_says_what_the_features_are_of(kept):
    _, folder, _ = kept
    found = {json.loads((sub / "about.json").read_text())["split"]: sub for sub in folder.iterdir()}
    about = read(found["train"] / "about.json")
    assert about["seed"] == 0 and about["taps"] == [0, 1, 2, 3] and len(about["files"]) == 12
    assert found["train"].name == f"features-{views.short_hash(about)}"
    assert "seed" not in read(found["val"] / "about.json")
