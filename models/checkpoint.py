"""The two files of a run: best.safetensors (weights, and what is needed to use them), last.pt (to go on training).

    save_weights("runs/a/best.safetensors", net.state_dict(), meta)     meta: plain JSON types, kept in the header
    tensors, meta = load_weights("runs/a")
    save_state("runs/a/last.pt", net=learned(net), opt=opt.state_dict(), state=vars(s))
    restore(net, load_state("runs/a/last.pt")["net"])
"""
import json
import pickle
from numbers import Real
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from data.common import replace
from data.datasets import NORMS

from .weights import BadWeights, read, run_meta

FORMAT = 1
# What the header of best.safetensors holds. Each of the two kinds of run has some of these fields,
# an old run has fewer.
FIELDS = {
    "model": dict, "classes": list, "ignore": list, "weights": dict, "reading": dict,
    "report": dict, "splits": dict, "dataset": str, "root": str, "source": str, "norm": str,
    "amp": str, "saved": str, "crop": int, "size": int, "stored": int, "overlap": Real,
}
# Their lowest and highest values, in pixels and as a share of a window.
RANGES = {"crop": (1, 2**16), "size": (1, 2**16), "stored": (1, 2**16), "overlap": (0, 0.99)}


# ---- best.safetensors

def save_weights(path: str | Path, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Tensors and `meta` (plain JSON types) into one .safetensors file, whole or not at all."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = {"nanors": json.dumps({"format": FORMAT, **meta})}

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
    def need(name, is_right):
        if not is_right:
            raise BadWeights(f"{path}: {name} in its header is {str(meta[name])[:60]!r}, which no "
                             "run writes; copy the file from its run again")

    for name, kind in FIELDS.items():
        if name in meta:
            need(name, isinstance(meta[name], kind))
    for name, (low, high) in RANGES.items():
        if name in meta:
            need(name, low <= meta[name] <= high)
    if "norm" in meta:
        need("norm", meta["norm"] in NORMS)
    for c in meta.get("classes", []):
        need("classes", isinstance(c, dict) and isinstance(c.get("name"), str))
    for value in meta.get("weights", {}).values():
        need("weights", value is None or isinstance(value, str))


def load_weights(path: str | Path, header_only: bool = False) -> tuple[dict[str, torch.Tensor], dict]:
    """best.safetensors, or the run folder that holds it -> tensors, meta; `header_only` reads no tensor."""
    path = weights_file(path)
    if not path.is_file():
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


def load_state(path: str | Path) -> dict:
    """What save_state was given, on the CPU."""
    if not Path(path).exists():
        raise BadWeights(f"{path}: no such file, so there is nothing to resume; start without "
                         "--resume")
    damaged = (RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError,
               pickle.UnpicklingError)
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except damaged as e:
        raise BadWeights(f"{path}: no last.pt of a run, or truncated ({type(e).__name__}); start a "
                         "new run") from None


def learned(net: nn.Module) -> dict[str, torch.Tensor]:
    """What training alters: trainable parameters and buffers. The frozen rest comes from --weights again."""
    names = {name for name, p in net.named_parameters() if p.requires_grad}
    names |= {name for name, _ in net.named_buffers()}
    return {name: t for name, t in net.state_dict().items() if name in names}


def restore(net: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Puts back what learned(net) gave, exactly these tensors; of another network it is a BadWeights."""
    if state.keys() != learned(net).keys():
        raise BadWeights("last.pt holds other tensors than this network learns; start a new run")
    net.load_state_dict(state, strict=False)
