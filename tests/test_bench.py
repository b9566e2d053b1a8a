"""The long measurements, their runs replaced: hours must not end in a wrong flag or column."""
import json
import sys
from collections import Counter
from pathlib import Path

import bench_curate
import bench_kd
import bench_points
import bench_train
import pytest
import torch
from PIL import Image

import eval as eval_script
import train_kd
import train_points
import train_seg
from data.common import write

SCRIPTS = {"train_seg.py": train_seg, "train_points.py": train_points, "train_kd.py": train_kd,
           "eval.py": eval_script}


def parsed(script, *flags):
    """The script takes these flags; a wrong one would end the test."""
    return SCRIPTS[script].parse_args([str(f) for f in flags])


def score(seed, lift=0.0):
    return dict(miou=0.5 + lift + 0.01 * seed, oa=0.7, iou={"a": 0.5, "b": None}, majority_miou=0.1,
                seconds=3.0)


# ---- points

@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_points_against_full_masks(tmp_path, monkeypatch, capsys, seeds):
    def train(out, root, steps, seed, points, flags):
        return score(seed, 0.1 * bool(flags)) | {"points": None if points is None else 40 * points}

    monkeypatch.setattr(bench_points, "train", train)
    monkeypatch.setattr(bench_points.demo, "make", lambda root: root)
    bench_points.main(["--out", str(tmp_path), "--points", "1", "5", "--grown", "5",
                       "--seeds", *map(str, seeds)])
    spread = " +/- 0.010" if len(seeds) == 3 else ""
    middle = 0.51 if len(seeds) == 3 else 0.5
    rows = (tmp_path / "table.md").read_text().splitlines()[2:]
    cell, grown = f"{middle:.3f}{spread}", f"{middle + 0.1:.3f}{spread}"
    assert rows == [f"| demo | {cell} | {cell} | {cell} | 0.100 |",
                    f"| demo, grown |  | {grown} | {cell} | 0.100 |"]
    assert "\n".join(rows) in capsys.readouterr().out
    assert Image.open(tmp_path / "table.png").size[0] > 500
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    labelled = {(row["points"], row["grow"]): row["labelled"] for row in rows}
    assert labelled == {(1, False): 40, (5, False): 200, (5, True): 200, (None, False): None}


def test_the_scripts_take_the_flags_of_the_points_table(tmp_path):
    script, *flags = bench_points.command(tmp_path, "root", 250, 1, 5, bench_points.GROW)
    args = parsed(script, *flags)
    assert (script, args.points_per_class, args.grow, args.steps) == ("train_points.py", 5, 1, 250)
    script, *flags = bench_points.command(tmp_path, "root", 250, 1, None, [])
    args = parsed(script, *flags)
    assert (script, args.loss, args.ema) == ("train_seg.py", "ce", 0.98)  # a point on every pixel
    (tmp_path / "last.pt").touch()
    assert bench_points.command(tmp_path, "root", 250, 1, 5, [])[1:] == ["--resume", tmp_path]


# ---- distillation

@pytest.fixture
def kd(tmp_path, monkeypatch):
    """bench_kd.py whose scripts check their flags and leave a score -> main(), what was called."""
    called = []

    def call(script, folder, *flags):
        called.append((script, parsed(script, *flags)))
        if script == "eval.py":
            write(Path(flags[0]) / "eval-train/difficulty.json", {})
            return
        out = Path(flags[flags.index("--out") + 1])
        *_, arm, seed = out.name.replace("kd-", "kd_").split("-")
        number = int(seed) if seed.isdigit() else 0  # the teacher has none
        write(out / "results.json", score(number, 0.1 * (arm == "weighted")))

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["bench_kd.py", "--out", str(tmp_path), *flags])
        bench_kd.main()

    monkeypatch.setattr(bench_kd, "call", call)
    monkeypatch.setattr(bench_kd.demo, "make", lambda root: root)
    monkeypatch.setattr(bench_kd, "merged", lambda root, out, classes: out)
    description = {"classes": [{"name": "a"}, {"name": "b"}]}
    monkeypatch.setattr(bench_kd, "read_description", lambda root: description)
    return main, called


def test_every_arm_against_its_own_baseline(kd, tmp_path, capsys):
    main, called = kd
    main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[0] == "| arm | mIoU | minus baseline | a | b |" and len(rows) == 9
    assert rows[1] == "| baseline | 51.0 +/- 1.0 | 0.0 +/- 0.0 | 50.0 +/- 0.0 | - |"
    assert rows[2] == "| weighted | 61.0 +/- 1.0 | 10.0 +/- 0.0 | 50.0 +/- 0.0 | - |"
    runs = Counter(script for script, _ in called)
    assert runs == {"train_seg.py": 1, "train_kd.py": 24, "eval.py": 3}
    called.clear()
    main()  # what is there is not run again
    assert not called
    with pytest.raises(SystemExit):  # what lies there was measured otherwise
        main("--steps", "7")


def test_images_are_weighted_by_what_their_own_baseline_finds_hard(kd, tmp_path):
    main, called = kd
    main("--seeds", "2")
    weighted = [args for _, args in called if getattr(args, "sampler", "") == "weighted"]
    assert len(weighted) == 4  # alone, and with all the rest
    for args in weighted:
        seed = Path(args.out).name[-1]
        assert args.difficulty == str(tmp_path / f"demo-baseline-{seed}/eval-train/difficulty.json")
    scored = [args for script, args in called if script == "eval.py"]
    assert all(args.split == "train" and args.difficulty for args in scored)


# ---- what to label next

def test_both_arms_start_alike_and_label_the_same_numbers(tmp_path, monkeypatch, capsys):
    splits = []

    def call(script, *flags):
        args = parsed(script, *flags)
        if script == "train_seg.py":
            splits.append(json.loads(Path(args.split_file).read_text()))
            write(Path(args.out) / "results.json", {"miou": 0.01 * len(splits[-1]["train"]) + 0.1 * args.seed})
        else:
            names = splits[-1]["pool" if args.probabilities else "train"]
            write(Path(args.probabilities or args.features) / "index.json", {"names": names})

    def choose(words):  # the last ones of the pool
        _, folder, _, seen, _, budget, _ = words
        names = json.loads((Path(folder) / "index.json").read_text())["names"]
        write(Path(folder) / "next/next.txt", "\n".join(names[-int(budget):]))
        assert (Path(seen) / "index.json").exists()

    monkeypatch.setattr(bench_curate, "call", call)
    monkeypatch.setattr(bench_curate, "curate", choose)
    monkeypatch.setattr(bench_curate.demo, "make", lambda root, **how: root)
    monkeypatch.setattr(bench_curate, "SCENES", (20, 2, 2))
    for _ in range(2):  # the second time all is there
        bench_curate.main(["next", str(tmp_path), "--seeds", "0", "1"])
        rows = capsys.readouterr().out.splitlines()[-3:]
        assert rows[-1] == "| 40% | 0.130 +/- 0.071 | 0.130 +/- 0.071 | +0.000, +0.000 |"
        assert len(splits) == 10  # five trainings a seed
    first, second, third, fourth, fifth = splits[:5]
    assert [len(s["train"]) for s in splits[:5]] == [2, 4, 8, 4, 8]
    assert set(first["train"]) < set(second["train"]) < set(third["train"])
    assert set(first["train"]) < set(fourth["train"]) < set(fifth["train"])
    assert fourth["train"][2:] == first["pool"][-2:] and second["train"][2:] == first["pool"][:2]
    assert all(len({*s["train"], *s["pool"]}) == 20 for s in splits)


# ---- a training step

def test_a_training_step_beside_a_plain_loop(capsys):
    before = torch.get_float32_matmul_precision()
    bench_train.main("--arch dinov3_vits16 --crop 32 --batch-size 1 --rounds 1 --cpu --tuned".split())
    torch.set_float32_matmul_precision(before)
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("dinov3_vits16 at 32, batch 1, tuned, linear head, fp32 on cpu; ")
    # 2 operations forward and 4 backward for each weight of a block and each of 4 patches and 5 tokens.
    gflop = 6 * 12 * 12 * 384**2 * 9 / 1e9
    assert float(rows[0].split("; ")[1].split()[0]) == pytest.approx(gflop, rel=0.1)
    assert [row.split()[1] for row in rows[3:5]] == ["ours", "timm"] and rows[5].startswith("ours / timm: ")
