"""data/common.py: files are written whole or not at all."""
import json
from pathlib import Path

import pytest

from data.common import write


def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.json"
    write(path, {"old": [1]})
    real = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda self, b: real(self, b[: len(b) // 2]) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(path, {"new": [2]})
    assert json.loads(path.read_text()) == {"old": [1]}
