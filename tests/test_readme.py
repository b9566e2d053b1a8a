"""Every command the README shows runs as typed: only made shorter, and with small files in place of downloads."""
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import Forks
from PIL import Image
from test_public import FORMS
from test_public import make as make_public

from data.demo import make
from models.vit import ViT, preset

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands(text):  # what the page shows indented, of "a && b" the last, loops written out
    for line in re.findall(r"^    (?! )(.*)", text, re.M):
        command = line.split("  #")[0].split("&&")[-1].strip()
        loop = re.fullmatch(r"for (\w+) in ([^;]+); do (.+); done", command)
        for c in [loop[3].replace(f"${loop[1]}", word) for word in loop[2].split()] if loop else [command]:
            if re.match(r"(\.venv/bin/)?(python|torchrun)\b", c):
                yield c


COMMANDS = list(commands(README))
IDEA = re.search(r"```python\n(.*?)```", README, re.S)[1]
TRAIN = "--steps 2 --eval-every 2 --batch-size 4 --crop 128 --workers 0"
SHORT = {"train_seg.py": TRAIN, "train_points.py": TRAIN, "train_kd.py": TRAIN, "eval.py": "--workers 0",
         "train_cls.py": "--epochs 1 --batch-size 16"}
EUROSAT = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
           "Residential", "River", "SeaLake"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as the reader has it: the clone, a data set D without description, small DINO files."""
    place = tmp_path_factory.mktemp("reader")
    for name in ("data", "models", *(f.name for f in ROOT.glob("*.py"))):
        (place / name).symlink_to(ROOT / name)
    for i in range(120):  # 12 images of each class
        name = EUROSAT[i % 10]
        (place / "EuroSAT/2750" / name).mkdir(parents=True, exist_ok=True)
        image = Image.effect_noise((64, 64), 5 + i).convert("RGB")
        image.save(place / "EuroSAT/2750" / name / f"{name}_{i}.jpg")
    make(place / "D", scenes=(4, 2, 2), size=64)
    for name in re.findall(r"SETS/(\w+)", " ".join(COMMANDS)):
        make_public(place / "SETS" / name, name, next(form for n, form in FORMS if n == name))
    (place / "D/dataset.json").unlink()
    Image.effect_noise((300, 200), 60).convert("RGB").save(place / "scene.tif")
    small = make(place / "runs/data/demo", scenes=(12, 3, 4), size=128)  # taken for the whole demo
    d = json.loads((small / "dataset.json").read_text())
    d["made_by"] |= {"scenes": [96, 16, 24], "size": 256}
    (small / "dataset.json").write_text(json.dumps(d))
    for name in re.findall(r"\S+\.pth", " ".join(COMMANDS)):
        family, patch = ("dinov3", 16) if "dinov3" in name else ("dinov2", 14)
        cfg = preset(family, patch, 64, 4, 1, registers=4 * (family == "dinov3"), grid=3 * (family == "dinov2"))
        torch.save(ViT(**cfg).state_dict() | {"mask_token": torch.zeros(1, 64)}, place / name)
    return place


@pytest.fixture(scope="module")
def forks(place):
    forks = Forks(place)
    yield forks
    forks.close()


def run(command, place, forks):
    words = shlex.split(command.replace(".venv/bin/", ""))
    words = [f for word in words for f in (sorted(map(str, place.glob(word))) if "*" in word else [word])]
    script = next((w for w in words if w.endswith(".py")), "")
    for i, word in enumerate(words):
        if word.startswith("--nproc_per_node"):
            words[i] = "--nproc_per_node=2"
        if (place / word).suffix == ".pth" or word == "FILE":  # a small file cannot have the hash of the large one
            file = place / (word if word != "FILE" else "dinov2_vitb14_pretrain.pth")
            words[i] = re.sub("-[0-9a-f]{8}", f"-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}", file.name)
            if not (place / words[i]).exists():
                (place / words[i]).symlink_to(file)
    if not {"--summary", "--compare", "knn"} & set(words):  # which train nothing and read no images
        words += shlex.split(SHORT.get(script, ""))
    if words[:2] == ["python", script]:
        return forks.run(script.removesuffix(".py"), *words[2:])
    if words[:2] == ["python", "-m"]:
        return forks.run(words[2], *words[3:])
    launch = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *words[1:]], cwd=place, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"$ {command}\n{done.stdout + done.stderr}"
    return done.stdout


def test_the_readme_shows_every_script():
    assert len(COMMANDS) >= 8
    for script in ("train_seg.py", "eval.py", "predict.py", "data.check"):
        assert any(script in c for c in COMMANDS)


def test_commands_run_in_the_order_of_the_page(place, forks):
    for command in COMMANDS:
        if "pytest" in command:
            continue
        text = run(command, place, forks)
        if "data.check" in command and "wrote" in text:  # the page says: name the classes
            d = json.loads((place / "D/dataset.json").read_text())
            assert len(d["classes"]) > 1
        if "--summary" in command:
            assert all(f"| {name} |" in text for name in ("demo", "potsdam", "isaid"))
    assert (place / "runs/demo/results.json").exists() and list((place / "predictions").glob("*_overlay.jpg"))


def test_the_idea_in_60_lines_trains(place):
    short = re.sub(r"STEPS, BATCH, CROP = .*", "STEPS, BATCH, CROP = 3, 2, 64", IDEA)
    assert short != IDEA and len(IDEA.splitlines()) <= 60
    (place / "idea.py").write_text(short)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "idea.py"], cwd=place, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert re.search(r"test mIoU 0\.\d+", done.stdout)


def test_pictures_are_there_and_small():
    shown = re.findall(r"\]\((data/pictures/\S+)\)", README)
    files = list((ROOT / "data/pictures").iterdir())
    assert {ROOT / name for name in shown} == set(files)
    assert sum(f.stat().st_size for f in files) < 400_000
