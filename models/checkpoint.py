"""The two files of a run: best.safetensors (weights, and what is needed to use them), last.pt (to go on training).

    save_weights("runs/a/best.safetensors", net.state_dict(), meta)     meta: plain JSON types, kept in the header
    tensors, meta = load_weights("runs/a")
    save_state("runs/a/last.pt", net=learned(net), opt=opt.state_dict(), state=vars(s))
    last = load_state("runs/a/last.pt")
    restore(net, last["net"]), restore_optimizer(opt, last["opt"]), take_up(s, last["state"])

Both may come from anybody: what no run writes is a BadWeights before anything is built of it.
"""
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from data.common import BadInput, check_file, fits, follows, json_text, replace
from data.datasets import NORMS, are_bands
from data.io import Labels
from data.ranges import is_range
from models.muon import Muon

from .weights import BadWeights, read, run_meta, same_kind, short

FORMAT = 1


# ---- what may stand in the header of best.safetensors

def is_text(value) -> bool:
    return isinstance(value, str)


def is_text_or_none(value) -> bool:
    return value is None or isinstance(value, str)


def is_side(value) -> bool:
    """A side in pixels."""
    return type(value) is int and 1 <= value <= 2**16


def is_overlap(value) -> bool:
    """A share of a window."""
    return type(value) in (int, float) and 0 <= value <= 0.99


def is_reading(value) -> bool:
    """How images are read: three bands or None, an input range in numbers or None."""
    if not isinstance(value, dict) or not value.keys() <= {"bands", "input_range"}:
        return False
    chosen, limits = value.get("bands"), value.get("input_range")
    if isinstance(limits, str):  # training has put numbers there
        return False
    return (chosen is None or are_bands(chosen)) and (limits is None or is_range(limits))


def are_classes(value) -> bool:
    """Class names in dicts, each once; of segmentation with more in them, see Labels."""
    if not isinstance(value, list):
        return False
    names = [c.get("name") if isinstance(c, dict) else None for c in value]
    return all(map(is_text, names)) and len(set(names)) == len(names)


def are_texts(value) -> bool:
    return isinstance(value, dict) and all(map(is_text_or_none, value.values()))


def are_kinds(value) -> bool:
    """Pairs of bands and bits; None where training has not opened its images."""
    if value is None:
        return True
    return fits(value, list[list[int]]) and all(len(pair) == 2 for pair in value)


# Each of the two kinds of run has some of these fields, an old run has fewer.
RULES = {
    "model": lambda v: isinstance(v, dict), "classes": are_classes,
    "ignore": lambda v: isinstance(v, list), "report": lambda v: fits(v, dict[str, list[str]]),
    "weights": are_texts, "splits": are_texts, "reading": is_reading,
    "kinds": are_kinds,
    "norm": lambda v: v in NORMS, "saved": lambda v: v in ("all", "head"), "amp": is_text,
    "task": lambda v: v in (None, "classification"), "dataset": is_text, "root": is_text,
    "source": is_text, "variant": is_text_or_none, "percentiles": is_text_or_none,
    "chosen_on": is_text_or_none, "reported": is_text_or_none,
    "crop": is_side, "size": is_side, "stored": is_side, "overlap": is_overlap}


# ---- best.safetensors

def save_weights(path: str | Path, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Tensors and `meta` (plain JSON types) into one .safetensors file, whole or not at all."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = {"nanors": json_text({"format": FORMAT, **meta})}

    def save(name):
        try:
            save_file(tensors, name, header)
        except SafetensorError as e:  # its name for a full disk
            raise OSError(str(e)) from None

    replace(path, save)


def weights_file(run: str | Path) -> Path:
    """A run folder, or the file itself -> its best.safetensors."""
    run = Path(run)
    return run / "best.safetensors" if run.is_dir() else run


class Header(dict):
    """What a run says of its weights; to ask for a field that is not there is a BadWeights."""

    def __init__(self, path: Path, fields: dict):
        super().__init__(fields)
        self.path = path

    def __missing__(self, name):
        raise BadWeights(f"{self.path}: no {name} in its header; use the code that trained it")


def check_header(path: Path, meta: dict) -> None:
    """Nobody vouches for a file: a field of another type or size is a BadWeights."""
    for name, is_right in RULES.items():
        if name in meta and not follows(meta[name], is_right):
            raise BadWeights(f"{path}: {name} in its header is {str(meta[name])[:60]!r}, which no "
                             "run writes; copy the file from its run again")
    outputs = meta.get("model", {}).get("classes")
    if "classes" in meta and outputs not in (None, len(meta["classes"])):
        raise BadWeights(f"{path}: {len(meta['classes'])} classes in its header for a network of "
                         f"{str(outputs)[:40]}; copy the file from its run again")
    # Of segmentation; a classifier's classes have names alone.
    if "classes" in meta and "ignore" in meta:
        try:
            Labels.of(meta)
        except BadInput as e:
            raise BadWeights(f"{path}: {e}") from None


def load_weights(path: str | Path, header_only: bool = False) -> tuple[dict[str, torch.Tensor], dict]:
    """best.safetensors, or the run folder that holds it -> tensors, meta; `header_only` reads no tensor."""
    path = weights_file(path)
    if not path.is_file():
        run = path.parent
        stopped = (run / "last.pt").exists() and not (run / "results.json").exists()
        if path.name == "best.safetensors" and stopped:
            raise BadWeights(f"{path}: no such file yet; its training was stopped before the first "
                             f"validation, type its script with --resume {shlex.quote(str(run))}")
        raise BadWeights(f"{path}: no such file; train first, or name a run folder or its "
                         "best.safetensors")
    tensors = {} if header_only else read(path)
    meta = run_meta(path)
    if meta is None:
        raise BadWeights(f"{path}: weights that no run here wrote; a backbone goes to train_seg.py "
                         "--weights")
    if meta.get("format") != FORMAT:
        raise BadWeights(f"{path}: format {str(meta.get('format'))[:40]}, expected {FORMAT}; use "
                         "the code that trained it")
    check_header(path, meta)
    return tensors, Header(path, meta)


# ---- last.pt

def save_state(path: str | Path, **state) -> None:
    """Tensors and plain Python values only, whole or not at all: a killed job leaves the previous file."""
    replace(path, lambda name: torch.save(state, name))


class State(dict):
    """What last.pt holds; to ask for an entry that is not there is a BadWeights."""

    def __init__(self, path: str | Path, entries: dict):
        super().__init__(entries)
        self.path = path

    def __missing__(self, name):
        raise BadWeights(f"{self.path}: no {name} in it; start a new run")


def load_state(path: str | Path) -> State:
    """What save_state was given, on the CPU; tensors and plain Python values, nothing is executed."""
    if not Path(path).exists():
        raise BadWeights(f"{path}: no such file, so there is nothing to resume; start without "
                         "--resume, into another --out")
    try:
        check_file(path)
        return State(path, torch.load(path, map_location="cpu", weights_only=True))
    except BadInput as e:
        raise BadWeights(str(e)) from None
    except Exception as e:  # of any kind, by what the pickle holds
        raise BadWeights(f"{path}: no last.pt of a run, or truncated ({type(e).__name__}); start a "
                         "new run") from None


def learned(net: nn.Module) -> dict[str, torch.Tensor]:
    """What training alters: trainable parameters and buffers. The frozen rest comes from --weights again."""
    names = {name for name, p in net.named_parameters() if p.requires_grad}
    names |= {name for name, _ in net.named_buffers()}
    return {name: t for name, t in net.state_dict().items() if name in names}


def restore(net: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Puts back what learned(net) gave, exactly these tensors; of another network it is a BadWeights."""
    check_tensors(state, learned(net))
    net.load_state_dict(state, strict=False)


def check_tensors(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> None:
    """BadWeights unless `state`, of last.pt, has the names, shapes and types of `own`, and finite numbers."""
    if not isinstance(state, dict) or state.keys() != own.keys():
        raise BadWeights("last.pt holds other tensors than this network learns; start a new run")
    for name, t in state.items():
        if not isinstance(t, torch.Tensor) or t.shape != own[name].shape:
            raise BadWeights(f"last.pt: {name} has another shape than in this network; start a new "
                             "run")
        if not same_kind(t.dtype, own[name].dtype) or not t.isfinite().all():
            raise BadWeights(f"last.pt: {name} is {t.dtype}, or holds NaN or infinity; start a new "
                             "run")


def restore_optimizer(opt: torch.optim.Optimizer, state: dict) -> None:
    """Puts back a state_dict() of AdamW or Muon; of another network or other flags it is a BadWeights."""
    own = opt.state_dict()["param_groups"]
    try:
        for group, now in zip(state["param_groups"], own, strict=True):
            # The rate is set at every step. What else differs would be another run.
            for key in now.keys() & group.keys() - {"lr"}:
                if group[key] != now[key]:
                    raise ValueError(f"{key} is {str(group[key])[:40]}, not {now[key]}")
        for moments in state["state"].values():
            if not all(t.is_floating_point() for t in moments.values()):
                raise ValueError("moments that are no floats")
        opt.load_state_dict(state)
        matrices = opt.matrices if isinstance(opt, Muon) else ()
        for p, moments in opt.state.items():
            wanted = dict(exp_avg=p.shape)
            if p not in matrices:
                wanted |= dict(step=(), exp_avg_sq=p.shape)
            if moments.keys() != wanted.keys():
                raise ValueError(f"moments {', '.join(map(str, moments))}")
            for name, shape in wanted.items():
                t = moments[name]
                # Of squares, as of a number of steps, none is negative.
                if t.shape != shape or not t.isfinite().all():
                    raise ValueError(f"{name} of shape {tuple(t.shape)}, or with NaN or infinity")
                if name != "exp_avg" and (t < 0).any():
                    raise ValueError(f"{name} below 0")
    except Exception as e:  # of any kind, by what the file holds
        raise BadWeights(f"last.pt: of another optimiser ({short(e)}); start a new run") from None


def take_up(s: SimpleNamespace, state: dict) -> None:
    """Puts the values that a run remembers into `s`, which has those of a new run; else a BadWeights."""
    names = state.keys() if isinstance(state, dict) else set()
    if names != vars(s).keys():
        raise BadWeights(f"last.pt: its state is {str(state)[:60]!r}; start a new run")
    for name, was in state.items():
        new = getattr(s, name)
        kinds = (type(new),) if new is not None else (type(None), int, float, dict)
        right = type(was) in kinds
        if type(was) in (int, float) and new is not None:
            # A best score begins at -1; all others are counts and seconds.
            right = right and is_finite(was) and was >= min(new, 0)
        if name == "history":
            right = right and all(map(is_row, was))
        if not right:
            raise BadWeights(f"last.pt: {name} is {str(was)[:60]!r}; start a new run")
    vars(s).update(state)


def is_row(row) -> bool:
    """A line of log.jsonl: the step, and numbers by their names, None for those that were not finite.

    train_points.py has scores of splits among them: {split: {name: number}}.
    """
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    numbers = []
    for value in row.values():
        for part in value.values() if isinstance(value, dict) else [value]:
            numbers += part.values() if isinstance(part, dict) else [part]
    return all(value is None or is_finite(value) for value in numbers)


def is_finite(value) -> bool:
    """A number that a float can hold; math.isfinite() fails at 10^400."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
