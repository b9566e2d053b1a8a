"""Several answers averaged into one: of views of an image, of several runs, or of their weights.

    net, meta = load_runs("runs/a", tta="d4")                       eight views of every window
    net, meta = load_runs("runs/a", partners=["runs/b", "runs/c"])  three runs' mean probability
    net, meta = load_runs("runs/a", soup=["runs/b"])                one network of mean weights

net is called as a run's network is, so models/infer.py slides it over images. An average of
probabilities answers with its logarithm, whose softmax it is.
"""
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.common import BadInput, nfc
from data.datasets import NORMS
from data.raster import kinds_agree, kinds_in, kinds_text

from .checkpoint import load_weights, weights_file
from .infer import slide
from .nets import load_run, name_of
from .weights import locate, sha256

# B batch, K classes, h w pixels of a window.

# Two runs with a lower mean cosine between their matrices did not start from the same weights. Demo
# runs of one start keep above .3 over 1,200 steps from scratch, those of two seeds lie below .03.
RELATED = 0.1


# ---- views of an image

@dataclass(frozen=True)
class Turn:
    """The image mirrored left to right, or not, and then turned by so many quarters."""
    quarters: int
    mirrored: bool

    def there(self, x: Tensor) -> Tensor:
        """(B, C, h, w) as it is shown to the network."""
        if self.mirrored:
            x = x.flip(3)
        return x.rot90(self.quarters, (2, 3))

    def back(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """The network's answer (B, K, ...) in the place of the image, of `size` (h, w)."""
        # The other way round: what came last is undone first.
        logits = logits.rot90(-self.quarters, (2, 3))
        if self.mirrored:
            logits = logits.flip(3)
        return logits


@dataclass(frozen=True)
class Scale:
    """The image resized by a factor; the corners of both lie in the same place."""
    factor: float

    def there(self, x: Tensor) -> Tensor:
        h, w = [max(1, round(side * self.factor)) for side in x.shape[-2:]]
        return resize(x, (h, w))

    def back(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        return resize(logits, size)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) to another h and w; a straight slope stays where it is, there and back."""
    # Antialiasing would move parts of it by up to .03 pixels.
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


UNCHANGED = Turn(0, False)
# Left to right; upside down, which is half a turn of the mirrored image; both.
FLIPS = [UNCHANGED, Turn(0, True), Turn(2, True), Turn(2, False)]
QUARTERS = [Turn(1, False), Turn(3, False), Turn(1, True), Turn(3, True)]
# What --tta may name.
VIEWS = {
    "flips": FLIPS,
    "d4": FLIPS + QUARTERS,
    "scales": [Scale(0.75), UNCHANGED, Scale(1.25)],
}


# ---- probabilities averaged

class Member(nn.Module):
    """A run's network that takes the first run's input and answers in the first run's classes.

    x (B, 3, h, w) normalised as the first run's -> logits (B, K, h, w) fp32. A network that was
    trained on smaller windows than `crop` slides over them by its own.
    """

    def __init__(self, net: nn.Module, meta: dict, first: dict, crop: int):
        super().__init__()
        self.net = net
        self.window = None
        if meta["crop"] < crop:
            self.window = dict(crop=meta["crop"], overlap=meta["overlap"])
        names = class_names(meta)
        order = [names.index(name) for name in class_names(first)]
        self.register_buffer("order", torch.tensor(order))

        # x is normalised by the first run's mean1 and std1; this network wants its own.
        # ((x std1 + mean1) - mean) / std is one factor and one shift per channel.
        self.renormalises = meta["norm"] != first["norm"]
        mean, std = torch.tensor(NORMS[meta["norm"]], dtype=torch.float64)
        mean1, std1 = torch.tensor(NORMS[first["norm"]], dtype=torch.float64)
        self.register_buffer("factor", (std1 / std).float().view(3, 1, 1))
        self.register_buffer("shift", ((mean1 - mean) / std).float().view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.renormalises:
            x = x * self.factor + self.shift
        if self.window is None:
            return self.net(x).float()[:, self.order]
        amp = torch.is_autocast_enabled(x.device.type)
        logits = [slide(self.net, image, **self.window, batch=len(x), amp=amp) for image in x]
        return torch.stack(logits)[:, self.order]


class Average(nn.Module):
    """x (B, 3, h, w) -> log of the mean probability over members and views, (B, K, h, w) fp32."""

    def __init__(self, members: list[nn.Module], views: list[Turn | Scale]):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.views = views

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        total = None
        for view in self.views:
            seen = view.there(x)
            for member in self.members:
                logits = view.back(member(seen), size)
                # Sums of logarithms: a probability of 1e-40 would be 0.
                log_p = logits.log_softmax(1)
                total = log_p if total is None else torch.logaddexp(total, log_p)
        return total - math.log(len(self.views) * len(self.members))


# ---- weights averaged

def soup(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """State dicts of one network -> the mean of each tensor.

    What is no weight, such as an index, must be equal in all. Wortsman et al. 2022, 2203.05482.
    """
    first = states[0]
    mean = {}
    for name, t in first.items():
        if t.is_floating_point():
            # In float64 the mean of equal numbers is that number.
            total = sum(state[name].double() for state in states)
            mean[name] = (total / len(states)).to(t.dtype)
        elif all(torch.equal(state[name], t) for state in states):
            mean[name] = t
        else:
            raise ValueError(f"{name} differs, and its values cannot be averaged")
    return mean


def statistics_differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Do two state dicts hold different statistics of BatchNorm?"""
    names = [name for name in a if name.endswith((".running_mean", ".running_var"))]
    return not all(torch.equal(a[name], b[name]) for name in names)


def unrelated_part(a: dict[str, Tensor], b: dict[str, Tensor]) -> str | None:
    """Name of a part, such as "head", that two runs did not learn from the same start, or None."""
    cosines = {}
    for name, t in a.items():
        if t.is_floating_point() and t.ndim > 1:
            cosine = F.cosine_similarity(t.flatten(), b[name].flatten(), dim=0)
            cosines.setdefault(name.split(".")[0], []).append(cosine.item())
    for part, values in cosines.items():
        if sum(values) / len(values) < RELATED:
            return part
    return None


# ---- runs

def class_names(meta: dict) -> list[str]:
    return [nfc(c["name"]) for c in meta["classes"]]


def check_same_classes(run: str | Path, meta: dict, first_run: str | Path, first: dict) -> None:
    """BadInput unless two runs know the same classes and read images in the same way."""
    names, wanted = class_names(meta), class_names(first)
    if sorted(names) != sorted(wanted):
        raise BadInput(f"{run}: its classes are {', '.join(names)}, those of {first_run} "
                       f"{', '.join(wanted)}; name a run of the same classes")
    if meta["reading"] != first["reading"]:
        raise BadInput(f"{run}: reads images by {as_words(meta['reading'])}, {first_run} by "
                       f"{as_words(first['reading'])}; name a run with the same --bands and "
                       "--input-range")
    kinds, known = kinds_in(meta), kinds_in(first)
    if kinds and known and not kinds_agree(kinds, known, meta["reading"]["bands"]):
        raise BadInput(f"{run}: trained on images of {kinds_text(kinds)}, {first_run} on "
                       f"{kinds_text(known)}; name a run that was trained on the same kind")


def as_words(reading: dict) -> str:
    """'bands None, input_range [0, 3000]'"""
    return ", ".join(f"{name} {value}" for name, value in sorted(reading.items()))


def all_runs(run: str | Path, partners: list | None, soup: list | None) -> list[str | Path]:
    """The run, and all that is averaged with it."""
    return [run, *(partners or ()), *(soup or ())]


def wants(run: str | Path, weights: str | None) -> bool:
    """Was the run saved without its backbone, and is that this file?"""
    _, meta = load_weights(run, header_only=True)
    if not weights or meta["saved"] != "head":
        return False
    return sha256(locate(weights)) == meta["weights"].get("sha256")


def check_runs(runs: list[str | Path], weights: str | None) -> None:
    """BadInput where one run is there twice, or none asks for the backbone --weights."""
    if len(runs) == 1 and not weights:
        return  # nothing to compare: no file is hashed
    first = {}  # {sha256: run}
    for run in runs:
        digest = sha256(weights_file(run))
        if digest in first:
            raise BadInput(f"{run}: the very weights of {first[digest]}, which would count twice; "
                           "leave it out")
        first[digest] = run
    if weights and not any(wants(run, weights) for run in runs):
        raise BadInput(f"{weights}: not the backbone of {', '.join(map(str, runs))}, so --weights "
                       "would not be used; leave it out, or name the file that the head was "
                       "trained on")


def load_other(run: str | Path, first_run: str | Path, first: dict,
               weights: str | None) -> tuple[nn.Module, dict]:
    """A further run of the first one's classes -> network in eval mode, meta."""
    net, meta = load_run(run, weights if wants(run, weights) else None)
    check_same_classes(run, meta, first_run, first)
    return net, meta


def average_weights(net: nn.Module, run: str | Path, meta: dict, others: list,
                    weights: str | None) -> None:
    """Puts the mean of this run's and the others' weights into net.

    Runs whose weights have no useful mean are a BadInput.
    """
    state = net.state_dict()
    states = [state]
    for other in others:
        other_net, other_meta = load_other(other, run, meta, weights)
        advice = f"leave it out of --soup, or average probabilities: --with {other}"
        if other_meta["model"] != meta["model"]:
            raise BadInput(f"{other}: {name_of(other_meta['model'])} of other sizes than "
                           f"{name_of(meta['model'])} of {run}; {advice}")
        if other_meta["norm"] != meta["norm"]:
            raise BadInput(f"{other}: normalisation {other_meta['norm']}, that of {run} "
                           f"{meta['norm']}; {advice}")
        if class_names(other_meta) != class_names(meta):
            raise BadInput(f"{other}: the classes of {run} in another order; {advice}")
        other_state = other_net.state_dict()
        # Statistics belong to each network's own activations; those of the mean network would have
        # to be counted anew over the training images.
        if statistics_differ(state, other_state):
            raise BadInput(f"{other}: its BatchNorm has other statistics than that of {run}, and "
                           f"no mean of them fits; {advice}")
        # Networks of two starts may do the same with their channels in another order.
        part = unrelated_part(state, other_state)
        if part:
            raise BadInput(f"{other}: its {part} has nothing in common with that of {run}; a soup "
                           f"is of runs from one start, by --weights and --seed; {advice}")
        states.append(other_state)
    net.load_state_dict(soup(states))


def load_runs(run: str | Path, weights: str | None = None, partners: list | None = None,
              soup: list | None = None, tta: str | None = None) -> tuple[nn.Module, dict]:
    """Runs -> network in eval mode, and the first one's meta with crop and amp of all.

    weights: backbone of runs saved without it. Without partners and tta it is nets.load_run's
    network itself.
    """
    net, meta = load_run(run, weights if wants(run, weights) else None)
    if soup:
        average_weights(net, run, meta, soup, weights)
    if not partners and tta is None:
        return net, meta
    runs = [(net, meta)]
    for partner in partners or ():
        runs.append(load_other(partner, run, meta, weights))
    # Every network sees windows of the size that it was trained on: see Member.
    crop = max(its["crop"] for _, its in runs)
    members = [Member(its_net, its, meta, crop) for its_net, its in runs]
    if any(its["amp"] != "bf16" for _, its in runs):
        meta["amp"] = "off"
    meta["crop"] = crop
    return Average(members, VIEWS.get(tta, [UNCHANGED])).eval(), meta


def identity(run: str | Path, partners: list | None = None, soup: list | None = None,
             tta: str | None = None) -> str:
    """sha256 of the run's weights; of an average the sha256 of all that it is made of."""
    own = sha256(weights_file(run))
    if not partners and not soup and tta is None:
        return own
    parts = [own, f"tta {tta}"]
    for what, others in (("soup", soup), ("with", partners)):
        # The order of the runs changes no mean, so it must not change the sha256.
        parts += sorted(f"{what} {sha256(weights_file(other))}" for other in others or ())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def about(partners: list | None = None, soup: list | None = None,
          tta: str | None = None) -> dict[str, str]:
    """What is averaged, for files: {"with": "runs/b, runs/c", "tta": "d4"}; {} of one run."""
    found = {}
    for flag, runs in (("with", partners), ("soup", soup)):
        if runs:
            found[flag] = ", ".join(map(str, runs))
    if tta:
        found["tta"] = tta
    return found
