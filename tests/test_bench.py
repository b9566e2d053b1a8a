"""The tables of the long measurements, with their runs replaced: hours of work must not end in a bad column."""
import json

import bench_kd
import bench_points
import pytest
from PIL import Image


def score(seed, lift=0.0):
    return dict(miou=0.5 + lift + 0.01 * seed, oa=0.7, iou={"a": 0.5, "b": None}, majority_miou=0.1, seconds=3.0)


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_points_against_full_masks(tmp_path, monkeypatch, capsys, seeds):
    def train(out, root, steps, seed, points, flags):
        return score(seed, 0.1 * bool(flags)) | {"points": None if points is None else 40 * points}

    monkeypatch.setattr(bench_points, "train", train)
    monkeypatch.setattr(bench_points.demo, "make", lambda root: root)
    bench_points.main(["--out", str(tmp_path), "--points", "1", "5", "--grown", "5", "--seeds", *map(str, seeds)])
    spread = " +/- 0.010" if len(seeds) == 3 else ""
    middle = 0.51 if len(seeds) == 3 else 0.5
    rows = (tmp_path / "table.md").read_text().splitlines()[2:]
    cell, grown = f"{middle:.3f}{spread}", f"{middle + 0.1:.3f}{spread}"
    assert rows == [f"| demo | {cell} | {cell} | {cell} | 0.100 |", f"| demo, grown |  | {grown} | {cell} | 0.100 |"]
    assert "\n".join(rows) in capsys.readouterr().out and Image.open(tmp_path / "table.png").size[0] > 500
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    labelled = {(r["points"], r["grow"]): r["labelled"] for r in rows}
    assert labelled == {(1, False): 40, (5, False): 200, (5, True): 200, (None, False): None}


def test_every_arm_against_its_own_baseline(tmp_path, monkeypatch, capsys):
    def run(script, out, *flags):
        *_, arm, seed = out.name.replace("kd-", "kd_").split("-")
        return score(int(seed) if seed.isdigit() else 0, 0.1 * (arm == "weighted"))

    monkeypatch.setattr(bench_kd, "run", run)
    monkeypatch.setattr(bench_kd.demo, "make", lambda root: root)
    monkeypatch.setattr(bench_kd, "merged", lambda root, out, classes: out)
    monkeypatch.setattr(bench_kd, "read_description", lambda root: {"classes": [{"name": "a"}, {"name": "b"}]})
    monkeypatch.setattr("sys.argv", ["bench_kd.py", "--out", str(tmp_path)])
    bench_kd.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[0] == "| arm | mIoU | minus baseline | a | b |" and len(rows) == 9
    assert rows[1] == "| baseline | 51.0 +/- 1.0 | 0.0 +/- 0.0 | 50.0 +/- 0.0 | - |"
    assert rows[2] == "| weighted | 61.0 +/- 1.0 | 10.0 +/- 0.0 | 50.0 +/- 0.0 | - |"
    monkeypatch.setattr("sys.argv", ["bench_kd.py", "--out", str(tmp_path), "--steps", "7"])
    with pytest.raises(SystemExit):  # what lies there was measured otherwise
        bench_kd.main()
