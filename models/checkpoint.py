"""The two files of a run: best.safetensors (weights, and what is needed to use them), last.pt (to go on training)."""
import json
import os
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .weights import BadWeights

FORMAT = 1


def save_weights(path: str | Path, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Tensors and `meta` (plain JSON types) into one .safetensors file, whole or not at all."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    replace(path, lambda tmp: save_file(tensors, tmp, {"nanors": json.dumps({"format": FORMAT, **meta})}))


def replace(path: str | Path, write) -> None:
    """write(name) under a temporary name, then renamed; what goes wrong is an OSError, and leaves the old file."""
    tmp = f"{path}.tmp"
    try:
        Path(tmp).unlink(missing_ok=True)
        Path(tmp).touch()
        mode = os.stat(tmp).st_mode  # as the umask says: safetensors would let nobody else read the file
        write(tmp)
        os.chmod(tmp, mode)
        os.replace(tmp, path)
    except (OSError, RuntimeError, SafetensorError) as e:  # torch and safetensors have their own names for a full disk
        Path(tmp).unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({str(e)[:100]}); is the disk full or read-only?") from None


def load_weights(path: str | Path, header_only: bool = False) -> tuple[dict[str, torch.Tensor], dict]:
    """best.safetensors, or the run folder that holds it -> tensors, meta; `header_only` reads no tensor."""
    path = Path(path) / "best.safetensors" if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise BadWeights(f"{path}: no such file; train first, or name a run folder or its best.safetensors")
    try:
        with safe_open(path, "pt") as f:
            meta = (f.metadata() or {}).get("nanors")
            tensors = {} if header_only else {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, OSError) as e:
        raise BadWeights(f"{path}: not readable ({str(e)[:100]}); expected the best.safetensors of a run") from None
    if meta is None:
        raise BadWeights(f"{path}: weights that no run here wrote; a backbone goes to train_seg.py --weights")
    meta = json.loads(meta)
    if meta.get("format") != FORMAT:
        raise BadWeights(f"{path}: format {meta.get('format')}, expected {FORMAT}; use the code that trained it")
    return tensors, meta


def save_state(path: str | Path, **state) -> None:
    """Tensors and plain Python values only, whole or not at all: a killed job leaves the previous file."""
    replace(path, lambda tmp: torch.save(state, tmp))


def load_state(path: str | Path) -> dict:
    """What save_state was given, on the CPU."""
    if not Path(path).exists():
        raise BadWeights(f"{path}: no such file, so there is nothing to resume; start without --resume")
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, pickle.UnpicklingError) as e:
        raise BadWeights(f"{path}: no last.pt of a run, or truncated ({type(e).__name__}); start a new run") from None
