"""What a training run does where its flags do not say: one recipe for each situation.

    typed = dict(steps=None, crop=None, lr=3e-4, ...)           None: not typed
    chosen = fill("frozen", typed, sizes=[(1024, 1024)] * 2522, patch=16)
    chosen["steps"], chosen["lr"], ...                          40000, 3e-4, ...

Steps, crops and batches are what published figures were reached with: DINOv3's evaluations
(github.com/facebookresearch/dinov3, issues 95, 112, 117) for frozen backbones, EoMT and
lightly-train for tuned ones. Muon in place of AdamW is ours (tests/bench_heads.py).
"""
import math
import statistics

from data.common import BadInput, plural

# optimizer: of models/muon.py. lr: learning rate of the head. backbone_lr: of the backbone's last
# block. layer_decay: factor on it for each block below. dropout: of the channels that a head reads.
# ema: decay of averaged weights. scale: range of random scales.
RECIPES = {
    # All of a small network, from random weights and at one rate.
    "scratch": dict(
        optimizer="muon", steps=2000, batch_size=8, crop=128, scale=[0.75, 1.5], lr=3e-3,
        backbone_lr=3e-3, layer_decay=1.0, weight_decay=0.05, dropout=0.0, ema=0.0),
    # A head on a backbone that stays as it is.
    "frozen": dict(
        optimizer="muon", steps=40_000, batch_size=16, crop=512, scale=[0.5, 2.0], lr=3e-3,
        backbone_lr=0.0, layer_decay=1.0, weight_decay=0.01, dropout=0.1, ema=0.0),
    # A head on a backbone that learns, too: by AdamW, whatever the optimizer, at a thirtieth of the
    # head's rate and less in lower blocks.
    "tuned": dict(
        optimizer="muon", steps=40_000, batch_size=16, crop=512, scale=[0.5, 2.0], lr=3e-3,
        backbone_lr=1e-4, layer_decay=0.8, weight_decay=0.05, dropout=0.1, ema=0.999),
}

# What differs for CNNs.
CNN = {
    "scratch": dict(lr=1e-3, backbone_lr=1e-3),
    "tuned": dict(optimizer="adamw", lr=1e-3, layer_decay=1.0, dropout=0.0),
}

# The demo's, and --quick: minutes on a CPU, to see that all fits together.
QUICK = dict(steps=500, batch_size=8, eval_every=250)

LEAST_CROP = 16  # the smallest side of a crop

# As many pixels as the training images have are one pass over them. More passes than this add
# little, so thirty images get no 40,000 steps.
PASSES = 500

FLAGS = (*RECIPES["scratch"], "warmup", "eval_every")


def name_of(weights: str, frozen: bool) -> str:
    """--weights, and whether the backbone stays as it is -> "scratch", "frozen" or "tuned"."""
    if weights == "none":
        return "scratch"
    return "frozen" if frozen else "tuned"


def ema_of(weights: str, unfreeze: str, typed: float | None) -> float:
    """--weights, --unfreeze, --ema -> the decay of the averaged weights; 0 without any."""
    recipe = RECIPES[name_of(weights, unfreeze == "0")]
    return recipe["ema"] if typed is None else typed


def fill(recipe: str, typed: dict, sizes: list[tuple[int, int]], patch: int | None, crops: int = 1,
         quick: bool = False) -> dict:
    """A value for each of FLAGS: as typed, else the recipe's. typed: {flag: value, or None if not typed}.

    sizes: (H, W) of the training images. patch: of a ViT, None for a CNN. crops: times the batch
    size that a step takes, over processes and micro-batches. BadInput where warm-up or patience
    would outlast the run.
    """
    chosen = RECIPES[recipe].copy()
    # At scale 1, more than an image has would be padding.
    chosen["crop"] = min(chosen["crop"], max(LEAST_CROP, side_of(sizes)))
    if patch is None:
        chosen |= CNN[recipe]
    else:  # whole patches
        chosen["crop"] = math.ceil(chosen["crop"] / patch) * patch
    if quick:
        chosen |= QUICK
    chosen |= {flag: typed[flag] for flag in FLAGS if typed[flag] is not None}
    if recipe == "scratch" and typed["backbone_lr"] is None:
        chosen["backbone_lr"] = chosen["lr"]

    if typed["steps"] is None:
        most = round(PASSES / passes(1, chosen, sizes, crops))
        chosen["steps"] = min(chosen["steps"], max(QUICK["steps"], most))
    if typed["warmup"] is None:
        steps = chosen["steps"]
        rise = max(50, steps // 25)
        # A short run shall reach its rate, too.
        chosen["warmup"] = min(rise, steps // 2)
    if "eval_every" not in chosen:
        chosen["eval_every"] = max(360, chosen["steps"] // 20)
    if not typed.get("resume"):  # A run that was begun before there was this check goes on.
        check_schedule(chosen["steps"], chosen["warmup"], chosen["eval_every"], typed.get("patience"))
    return chosen


def check_schedule(steps: int, warmup: int, eval_every: int, patience: int | None = None,
                   longer: str = "more --steps") -> None:
    """BadInput where a run would end before its rate has risen, or before --patience could end it."""
    if warmup >= max(steps, 2):
        raise BadInput(f"--warmup {warmup}: in {plural(steps, 'step')} the rate would rise and not fall; "
                       f"type --warmup {steps // 2}, or {longer}")
    # The first validation is always a gain.
    if patience and (patience + 1) * eval_every >= steps:
        raise BadInput(f"--patience {patience}: of {steps} steps, with a validation every {eval_every}, "
                       "it could save none; type a smaller one of the two, or leave --patience out")


def side_of(sizes: list[tuple[int, int]]) -> int:
    """The shorter side of images (H, W), their median."""
    return statistics.median_low(map(min, sizes))


def passes(steps: int, chosen: dict, sizes: list[tuple[int, int]], crops: int = 1) -> float:
    """How many times over the pixels of its images a run of so many steps goes."""
    pixels = sum(H * W for H, W in sizes)
    return steps * crops * chosen["batch_size"] * chosen["crop"] ** 2 / pixels


def text(recipe: str, chosen: dict, sizes: list[tuple[int, int]], crops: int = 1) -> str:
    """Lines that say what a run will do."""
    times = passes(chosen["steps"], chosen, sizes, crops)
    views = f", {chosen['views']} fixed ones of each image" if chosen.get("views") else ""
    low, high = chosen["scale"]
    crop, warning = chosen["crop"], ""
    filled = statistics.median(min(H, crop) * min(W, crop) for H, W in sizes)
    if filled < crop ** 2 / 2:
        warning = (f"\n        WARNING --crop {crop}: images have {side_of(sizes)} rows or columns; at "
                   "scale 1 most of a crop is padding")
    return (f"recipe  {recipe}: {chosen['steps']} steps of {crops * chosen['batch_size']} crops of "
            f"{crop} at scale {low:g}-{high:g}{views}, {times:.0f} times the pixels of all images\n"
            f"        {chosen['optimizer']}, lr {chosen['lr']:g}, backbone {chosen['backbone_lr']:g}, "
            f"layer decay {chosen['layer_decay']:g}, weight decay {chosen['weight_decay']:g}, "
            f"warm-up {chosen['warmup']} steps, dropout {chosen['dropout']:g}, EMA {chosen['ema']:g}{warning}")
