"""How sure a network really is: the temperature that its logits are divided by before the softmax.

    temperature = read_temperature(Path("runs/a"), sha256(Path("runs/a/best.safetensors")))
"""
from pathlib import Path

from data.common import BadInput, read_json


def read_temperature(run: Path, sha256: str) -> float | None:
    """Of RUN/calibration.json; None without one, or where it is of weights of another sha256."""
    folder = run if run.is_dir() else run.parent
    file = folder / "calibration.json"
    if not file.exists():
        return None
    found = read_json(file)
    if found.get("weights") != sha256:
        return None
    temperature = found.get("temperature")
    if type(temperature) not in (int, float) or not 0 < temperature < float("inf"):
        raise BadInput(f"{file}: the temperature {temperature!r}; expected a number above 0: take "
                       f"the file away, or type eval.py {run} --split val --calibrate")
    return float(temperature)
