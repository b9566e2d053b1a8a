"""models/recipes.py: the published numbers, what was typed is kept, few images get few steps."""
import pytest

from data.common import BadInput
from models import recipes
from models.recipes import FLAGS, fill

LOVEDA = [(1024, 1024)] * 2522  # its training images
NOTHING = dict.fromkeys(FLAGS)


def test_a_frozen_vit_on_loveda_gets_the_published_recipe():
    """DINOv3's own: 40,000 steps of 16 crops of 512 (518 for patches of 14), 4 % warm-up, dropout .1."""
    for patch, crop in ((16, 512), (14, 518)):
        chosen = fill("frozen", NOTHING, LOVEDA, patch)
        assert (chosen["steps"], chosen["batch_size"], chosen["crop"]) == (40_000, 16, crop)
        assert (chosen["warmup"], chosen["dropout"], chosen["scale"]) == (1600, 0.1, [0.5, 2.0])
        assert 60 < recipes.passes(40_000, chosen, LOVEDA) < 70  # 40,000 x 16 x 512² / (2522 x 1024²)


def test_a_tuned_backbone_learns_slower_than_its_head():
    chosen = fill("tuned", NOTHING, LOVEDA, 16)
    assert 10 <= chosen["lr"] / chosen["backbone_lr"] <= 40 and chosen["layer_decay"] == 0.8 and chosen["ema"] > 0


@pytest.mark.parametrize("name", ["frozen", "tuned"])
def test_thirty_images_get_no_forty_thousand_steps(name):
    thirty = [(2000, 1000)] * 30
    few = fill(name, NOTHING, thirty, 16)
    assert few["steps"] == round(500 * 60e6 / (16 * 512 ** 2)) and few["warmup"] == few["steps"] // 25
    assert fill(name, NOTHING, thirty, 16, crops=4)["steps"] == round(500 * 60e6 / (64 * 512 ** 2))
    assert fill(name, NOTHING, [(256, 256)], 16)["steps"] == recipes.QUICK["steps"]  # one small image


@pytest.mark.parametrize("name", recipes.RECIPES)
@pytest.mark.parametrize("patch", [None, 8, 14])
def test_what_was_typed_is_kept(name, patch):
    if patch is None and name == "frozen":
        return  # CNNs are never frozen
    typed = dict(optimizer="adamw", steps=7, batch_size=3, crop=50, scale=[1.0, 1.0], lr=0.5, backbone_lr=0.25,
                 layer_decay=0.5, weight_decay=0.0, dropout=0.0, ema=0.0, warmup=0, eval_every=2)
    assert typed.keys() == set(FLAGS) and fill(name, typed, LOVEDA, patch, quick=True) == typed
    for flag, value in typed.items():
        assert fill(name, NOTHING | {flag: value}, LOVEDA, patch)[flag] == value


def test_from_scratch_all_learns_at_one_rate_and_quick_is_short():
    assert fill("scratch", NOTHING | dict(lr=0.1), LOVEDA, 8)["backbone_lr"] == 0.1
    quick = fill("frozen", NOTHING, LOVEDA, 16, quick=True)
    assert (quick["warmup"], quick["lr"]) == (50, 3e-3) and quick.items() >= recipes.QUICK.items()
    cnn = fill("tuned", NOTHING, LOVEDA, None)
    assert (cnn["optimizer"], cnn["lr"], cnn["backbone_lr"]) == ("adamw", 1e-3, 1e-4)


@pytest.mark.parametrize("sizes, patch, side, crop", [
    ([(256, 256)] * 9, 16, 256, 256), ([(250, 256)] * 9, 14, 250, 252),
    ([(600, 700), (256, 256), (300, 200)], None, 256, 256)])
def test_a_crop_is_no_larger_than_the_images_unless_it_was_typed(sizes, patch, side, crop):
    chosen = fill("tuned", NOTHING, sizes, patch)
    assert chosen["crop"] == crop and "padding" not in recipes.text("tuned", chosen, sizes)
    for typed, warned in ((512, True), (350, False)):  # of 250 or 256 squared, a half is 354 or 362
        chosen = fill("tuned", NOTHING | dict(crop=typed), sizes, patch)
        text = recipes.text("tuned", chosen, sizes)
        assert chosen["crop"] == typed
        assert (f"WARNING --crop {typed}: images have {side} rows" in text) == warned
    long = [(256, 1024)]
    assert "WARNING" not in recipes.text("tuned", fill("tuned", NOTHING | dict(crop=400), long, patch), long)


def test_a_crop_is_at_least_what_can_be_typed():
    assert fill("tuned", NOTHING, [(12, 12)], None)["crop"] == fill("scratch", NOTHING, [(8, 8)], 8)["crop"] == 16


def test_what_would_act_behind_the_last_step_is_refused():
    with pytest.raises(BadInput, match="--warmup 90: in 40 steps the rate would .* type --warmup 20"):
        fill("scratch", NOTHING | dict(steps=40, warmup=90), LOVEDA, 16)
    with pytest.raises(BadInput, match="--patience 4: of 40 steps, with a validation every 8, it could save none"):
        fill("scratch", NOTHING | dict(steps=40, eval_every=8, patience=4), LOVEDA, 16)
    fill("scratch", NOTHING | dict(steps=41, eval_every=8, patience=4, warmup=40), LOVEDA, 16)
    with pytest.raises(BadInput, match="--warmup 41"):
        fill("scratch", NOTHING | dict(steps=41, warmup=41), LOVEDA, 16)
    fill("scratch", NOTHING | dict(steps=40, warmup=90, resume="runs/a"), LOVEDA, 16)  # begun before this check


def test_the_situation():
    assert [recipes.name_of("none", False), recipes.name_of("f.pth", True), recipes.name_of("f.pth", False)] == [
        "scratch", "frozen", "tuned"]
