"""Nothing that a file or a flag claims is trusted: thousands of odd files and flags against the scripts as they are.

    python tests/bench_fuzz.py                          all families, 3,260 cases
    python tests/bench_fuzz.py --only header flags --n 50
    python tests/bench_fuzz.py --only header --seed 17  this case alone, with all that it printed

A case is a copy of a small data set, run or weight file with one thing spoilt by a seeded generator, and a command.
Each runs in a fork of this process with limits on time and memory. It ends as
    correct      the result of the unspoilt input, or another one where that is no fault of the file
    clean        exit code 2 and one line that names the file or the flag
and otherwise as a fault: traceback, hang, unclear (two lines, nothing named), accepted (although the data are wrong),
changed (a file of the user). What is wrong is decided here, by schemas that share no code with the project.
"""
import argparse
import hashlib
import importlib
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

LIMIT = 30  # seconds of a case
MEMORY = 3 * 2**30  # bytes that a case may take beside what this process has
SCRIPTS = "train_seg", "train_kd", "train_points", "train_cls", "eval", "predict"
STEP = ["--steps", "1", "--eval-every", "1", "--batch-size", "1", "--crop", "16", "--arch", "nano16",
        "--workers", "0", "--cache", "off", "--amp", "off"]
CLASSES = [{"name": "land", "id": 0, "color": "#102030"}, {"name": "road", "id": 1}, {"name": "water", "id": 2}]
DESCRIPTION = {"name": "tiny", "images": "images/*.png", "masks": "masks/*.png", "classes": CLASSES, "ignore": [255],
               "splits": {"train": "*/[0-3]", "val": ["*/4"], "test": "lists/test.txt"},
               "scene": "(\\d)$", "report": {"dry": ["water"]}}
DEEP = "[" * 100_000
ODD = [None, True, False, 0, -1, 1, 2, 1.5, -0.5, 1e308, 10**400, 2**63, 2**64, "", " ", "a", "\0", "\x1b[31mred", "é",
       "../x", "/etc/passwd", "**", ".", "*", "[", "[]", "{}", "%s", "²", "\ud800", "(a+)+$", "a\nb", "x" * 5000,
       [], {}, [None], {"a": None}, [[]], ["a"], [0, 0], [255, 0], {"name": "a"}, float("nan"), float("inf"),
       -float("inf")]
NUMBERS = ["nan", "NaN", "inf", "-inf", "1e400", "-1e400", "", " ", "²", "٣", "１", "1_0", "0x10", "--", "-1e-400",
           "9" * 5000, "2147483647", "100000", "1e308", "-1", "0", "1", "True", "None", "1,5", "1 2", "\x1b[31m",
           "a\nb", "½", "∞"]


class Case(NamedTuple):
    """A folder with the spoilt thing, the command, what must happen, and words of which the message has one."""
    argv: list
    must: str  # refuse, same (as unspoilt), any
    words: list
    what: str


# ---- running

def scripts():
    """{name: code}; all is imported once, before the first fork."""
    found = {}
    for name in SCRIPTS:
        importlib.import_module(name)
        file = ROOT / f"{name}.py"
        found[name] = compile(file.read_text(), str(file), "exec")
    importlib.import_module("data.check.__main__")
    check = "import sys; from data.check.__main__ import main; sys.exit(main())"
    found["check"] = compile(check, "check", "exec")
    return found


CODE = {}


def run(argv, cwd, log):
    """-> exit code (None: it hung), what it printed to stdout, to stderr."""
    CODE or CODE.update(scripts())
    pid = os.fork()
    if pid == 0:
        child(argv, cwd, log)
    end = time.monotonic() + LIMIT
    status = None
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.003)
    else:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        status = None
    out, err = (Path(f"{log}.{n}").read_text("utf-8", "replace") for n in (1, 2))
    return None if status is None else os.waitstatus_to_exitcode(status), out, err


def child(argv, cwd, log):
    os.setsid()
    for n in (1, 2):
        os.dup2(os.open(f"{log}.{n}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), n)
    now = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(cwd)
    # A test runner may have put other streams there, or a script its own.
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
    from data import plots
    for name in ("curves", "samples", "confusion"):  # half of the time of a short run, and not asked here
        setattr(plots, name, lambda *a, **k: Image.new("RGB", (8, 8)))
    code = 1
    try:
        sys.argv, sys.stdin = [f"{argv[0]}.py", *map(str, argv[1:])], open(os.devnull)
        exec(CODE[argv[0]], {"__name__": "__main__"})
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:
                pass
        os._exit(code)


def digest(folder, argv, out):
    """Of what a command gave: two equal inputs have equal ones."""
    script = argv[0]
    result = folder / "out"
    if script == "check":
        return out.replace(str(folder), "")
    if script.startswith("train"):
        file = result / "best.safetensors"
        return {k: hashlib.sha256(t.numpy().tobytes()).hexdigest() for k, t in load_file(file).items()}
    if script == "eval":
        return json.loads((result / "eval.json").read_text())["confusion"] if result.exists() else out
    files = sorted(result.rglob("*.png")) + sorted(result.rglob("*.csv"))
    return [hashlib.sha256(f.read_bytes()).hexdigest() for f in files if not f.name.endswith("overlay.jpg")]


def snapshot(folder, written=()):
    """{file: size, time, kind} of what belongs to the user, not of the `written` folders."""
    found = {}
    for place, folders, files in os.walk(folder):
        if Path(place) == folder:
            folders[:] = [name for name in folders if name not in written]
        for name in files:
            s = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = s.st_size, s.st_mtime_ns, s.st_mode
    found.pop(str(folder / "run" / ".lock"), None)
    return found


def judge(case, folder, wanted, log):
    """-> how the case ended, and what it printed."""
    written = {"out"}
    if "--resume" in case.argv and case.must != "refuse":
        written.add("run")  # it is gone on with
    for word in case.argv:
        if word.startswith("--cache="):
            written.add(word[8:].split("/")[0])
    before = snapshot(folder, written)
    began = time.monotonic()
    code, out, err = run(case.argv, folder, log)
    said = f"{case.argv}\n{case.what}\nmust {case.must}, exit code {code}, {time.monotonic() - began:.1f} s\n{out}{err}"
    if snapshot(folder, written) != before:
        return "changed", said
    if code is None:
        return "hang", said
    if "Traceback" in err or code not in (0, 2):
        return "traceback", said
    text = out + err
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text) or "RuntimeWarning:" in err:
        return "unclear", said
    if code == 2:
        lines = [line for line in err.splitlines() if not line.startswith(("note:", "left out:"))]
        lines += [] if case.argv[0] != "check" else [line for line in out.splitlines() if line.startswith("ERROR")][:1]
        left_out = "left out:" in err or case.argv[0] == "check"
        if not (len(lines) == 1 or left_out and not lines):
            return "unclear", said
        named = any(word in text for word in [*case.words, "--split with", "split-file", "in the splits"])
        if not named or case.must == "same":
            return ("unclear" if case.must != "same" else "refused"), said
        return "clean", said
    if case.must == "refuse":
        return "accepted", said
    if case.must == "same":
        try:
            same = digest(folder, case.argv, out) == wanted
        except Exception as e:
            said += repr(e)
            same = False
        return ("correct" if same else "accepted"), said
    return "correct", said


# ---- unspoilt inputs

def make_base(base, log, trained=True):
    """A data set, class folders, runs, weights, lists below `base`; without `trained` no last.pt and no classifier."""
    rng = np.random.default_rng(0)
    for i in range(6):
        ids = (np.arange(32)[:, None] // 11 + np.arange(32) // 16 + i) % 3
        ids[:2] = 255
        noise = rng.integers(0, 40, (32, 32, 3)) + (ids % 3)[..., None] * 60
        save(base / f"set/images/{i}.png", noise.astype(np.uint8))
        save(base / f"set/masks/{i}.png", ids.astype(np.uint8))
    (base / "set/lists").mkdir()
    (base / "set/lists/test.txt").write_text("images/5\n")
    put(base / "set/dataset.json", DESCRIPTION)
    for c in "abc":
        for i in range(6):
            save(base / f"cls/{c}/{c}_{i}.png", rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
    put(base / "split.json", {"train": [f"images/{i}" for i in range(4)], "val": ["images/4"], "test": ["images/5"]})
    put(base / "map.json", {"map": {"land": "land", "road": {"road": 0.5, "water": 0.5}, "water": None}})
    put(base / "difficulty.json", {f"images/{i}": i for i in range(6)})
    rows = [f"images/{i},{x},{y},{name}" for i in range(4)
            for x, y, name in ((3, 9, "land"), (20, 9, "road"), (9, 20, "water"))]
    (base / "points.csv").write_text("\n".join(["image,x,y,class", *rows, ""]))
    points = [dict(type="Feature", geometry=dict(type="Point", coordinates=[int(x), int(y)]),
                   properties=dict([("image", image), ("class", name)]))
              for image, x, y, name in (row.split(",") for row in rows)]
    put(base / "points.geojson", {"type": "FeatureCollection", "features": points})
    (base / "repeat.txt").write_text("images/1\nimages/1\n")
    big = np.add.outer(np.arange(48), np.arange(40)).astype(np.uint16) * 30
    Image.fromarray((big >> 4).astype(np.uint8)).save(base / "grey.tif", compression="tiff_deflate")
    Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(base / "lzw.tif", compression="tiff_lzw")
    Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(base / "raw.tif")
    if not trained:
        untrained_run(base)
        return
    for argv in (["train_seg", "--root", "set", "--out", "run", *STEP],
                 ["train_cls", "--root", "cls", "--out", "clsrun", "--epochs", "1", "--batch-size", "4", "--size", "16",
                  "--cache", "off", "--amp", "off"]):
        code, out, err = run(argv, base, log)
        assert code == 0, out + err
    for name in ("run", "clsrun"):
        for file in (base / name).glob("*.png"):
            file.unlink()
    from models.vit import PRESETS, ViT
    torch.manual_seed(0)
    state = {k: t.clone() for k, t in ViT(**PRESETS["nano16"]).state_dict().items()}
    torch.save(state, base / "vit.pth")
    save_file(state, base / "vit.safetensors")
    (base / "hf").mkdir()
    names = list(state)
    half = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in half.items():
        save_file({k: state[k] for k in part}, base / "hf" / file)
    index = {"metadata": {}, "weight_map": {k: file for file, part in half.items() for k in part}}
    put(base / "hf/model.safetensors.index.json", index)
    put(base / "hf/preprocessor_config.json", {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.2, 0.2, 0.2]})
    put(base / "hf/config.json", {"hidden_size": 192})


def untrained_run(base):
    """run/best.safetensors with random weights."""
    from models import nets
    from models.checkpoint import save_weights
    torch.manual_seed(0)
    net, spec, info = nets.make("vit", 3, arch="nano16", head="linear")
    save_weights(base / "run/best.safetensors", net.state_dict(), dict(
        classes=CLASSES, ignore=[255], threshold=None, dataset="tiny", root=str(base / "set"), source="folder",
        variant=None, chosen_on="val", reported="test", reading=dict(bands=None, input_range=None), percentiles=None,
        report={}, splits={}, weights=dict(path=None, sha256=None), model=spec, norm="imagenet", crop=16, overlap=0.25,
        amp="off", saved="all"))


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def put(path, value):
    replace(path, json.dumps(value, indent=1).encode())


def replace(path, content):
    """New content at a path whose old file may be linked elsewhere."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


# ---- mutations of JSON, and what is right by schemas

def nodes(value, path=()):
    """All places in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from nodes(inner, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def change(rng, value):
    """A JSON value with one node spoilt -> text, the value or None where it is no JSON, what was done."""
    value = json.loads(json.dumps(value))
    kind = rng.choice(["value", "value", "value", "value", "delete", "rename", "extra", "text"])
    if kind == "text":
        return spoil_text(rng, json.dumps(value))
    places = [path for path in nodes(value) if path]
    path = places[rng.integers(len(places))]
    parent, key = at(value, path[:-1]), path[-1]
    what = f"{kind} {'.'.join(map(str, path))}"
    if kind == "value":
        parent[key] = ODD[rng.integers(len(ODD))]
        what += f" = {str(parent[key])[:40]!r}"
    elif kind == "delete":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
    elif isinstance(parent, dict):
        parent["strange"] = ODD[rng.integers(len(ODD))]
    else:
        parent.append(ODD[rng.integers(len(ODD))])
    text = json.dumps(value)
    return text.encode(), (None if no_json(value) else value), what


def no_json(value):
    if isinstance(value, float):
        return value != value or abs(value) == float("inf")
    if isinstance(value, int):
        return abs(value) >= 10**300
    if isinstance(value, str):
        return any(0xD800 <= ord(c) < 0xE000 for c in value)
    if isinstance(value, dict):
        return any(map(no_json, value)) or any(map(no_json, value.values()))
    return any(map(no_json, value)) if isinstance(value, list) else False


def spoil_text(rng, text):
    """-> bytes, the value they mean or None, what was done."""
    value = json.loads(text)
    i = int(rng.integers(1, len(text)))
    kinds = {
        "cut": text[:i], "empty": "", "blank": " \n", "null": "null", "list": "[]", "number": "1", "NaN": "NaN",
        "deep": DEEP, "deep closed": DEEP + "]" * len(DEEP), "deep inside": '{"a": ' + DEEP + "]" * len(DEEP) + "}",
        "long number": '{"a": ' + "9" * 10_000 + "}", "comma": text[:-1] + ",}", "twice": text[:-1] + "," + text[1:],
        "junk behind": text + "x", "html": "<html></html>", "single quotes": text.replace('"', "'"),
        "comment": "// a\n" + text, "half a character": text[:-1] + ', "\\ud800": 1}'}
    same = {"mark": b"\xef\xbb\xbf" + text.encode(), "utf-16": text.encode("utf-16"), "blanks": b" \n" + text.encode()}
    bad_bytes = {"latin": text.encode() + b"\xe9", "zeros": bytes(100), "png": b"\x89PNG\r\n\x1a\n",
                 "bin": b"\x80\4}q."}
    every = [*kinds, *same, *bad_bytes]
    kind = every[rng.integers(len(every))]
    if kind in same:
        return same[kind], value, kind
    return (kinds[kind].encode() if kind in kinds else bad_bytes[kind]), None, kind


def is_name(v):
    return isinstance(v, str) and v.strip() != "" and v.isprintable()


def whole(v, low, high):
    return type(v) is int and low <= v <= high


def right_classes(classes):
    if not isinstance(classes, list) or not classes or not all(isinstance(c, dict) for c in classes):
        return False
    names = [c.get("name") for c in classes]
    if not all(map(is_name, names)) or len(set(names)) < len(names):
        return False
    for c in classes:
        color = c.get("color")
        if color is not None and not (isinstance(color, str) and re.fullmatch("#?[0-9a-fA-F]{6}", color)):
            return False
    key = "id" if "id" in classes[0] else "color"
    values = [c.get(key) for c in classes]
    if key == "id":
        return all(type(v) in (int, float) and v == int(v) and abs(v) < 2**53 for v in values) \
            and len(set(values)) == len(values)
    return None not in values


def right_description(d):
    """Could a careful reader take this dataset.json as it is? By its documentation."""
    if not isinstance(d, dict) or not right_classes(d.get("classes")):
        return False
    names = [c["name"] for c in d["classes"]]
    for key in ("images", "masks"):
        patterns = d.get(key)
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(patterns, list) or not patterns or not all(isinstance(p, str) and p for p in patterns):
            return False
        if any(p in (".", "..", "/etc/passwd", "**", "*") or "\0" in p for p in patterns):
            return False
    splits = d.get("splits")
    if not isinstance(splits, dict) or not splits.get("train"):
        return False
    for rules in splits.values():
        rules = [rules] if isinstance(rules, str) else rules
        if not isinstance(rules, list) or not all(isinstance(rule, str) for rule in rules):
            return False
    report = d.get("report", {})
    if not isinstance(report, dict) or not all(isinstance(v, list) and set(map(str, v)) <= set(names)
                                               for v in report.values()):
        return False
    if "name" in d and (not is_name(d["name"]) or "/" in d["name"] or d["name"] in (".", "..")):
        return False
    if "scene" in d:
        try:
            re.compile(d["scene"])
        except (re.error, TypeError, OverflowError):
            return False
    known = {"name", "images", "masks", "classes", "ignore", "splits", "scene", "report"}
    for key in [*d, *(key for c in d["classes"] for key in c)]:
        if key not in known | {"id", "color"} and any(near(key, k) for k in known | {"id", "color"} if len(k) > 4):
            return False
    return True


def near(key, known):
    return key != known and key.rstrip("x") == known


def json_case(rng, folder, file, right, argv, words=()):
    """A spoilt JSON file and a command that reads it."""
    value = json.loads((folder / file).read_bytes())
    content, spoilt, what = change(rng, value)
    replace(folder / file, content)
    same = json.dumps(spoilt) == json.dumps(value)  # 1 == True
    must = "refuse" if spoilt is None or not right(spoilt) else "same" if same else "any"
    return Case(argv, must, [Path(file).name, *words], what)


# ---- families: each spoils the folder and returns a case

TRAIN = ["train_seg", "--root", "set", "--out", "out", *STEP]
KD = ["train_kd", "--root", "set", "--out", "out", *STEP]
POINTS = ["train_points", "--root", "set", "--out", "out", *STEP]
CLS = ["train_cls", "--root", "cls", "--out", "out", "--epochs", "1", "--batch-size", "4", "--size", "16",
       "--cache", "off", "--amp", "off"]
EVAL = ["eval", "run", "--out", "out", "--workers", "0", "--cache", "off", "--batch-size", "1"]
PREDICT = ["predict", "run", "set/images/0.png", "--out", "out"]
CHECK = ["check", "set"]


def dataset(rng, folder):
    argv = [CHECK, TRAIN, [*EVAL, "--root", "set"]][rng.choice(3, p=[0.7, 0.25, 0.05])]
    case = json_case(rng, folder, "set/dataset.json", right_description, argv)
    return case


def keys(rng, folder):
    """Optional keys of dataset.json."""
    rules = {
        "bands": lambda v: isinstance(v, list) and len(v) == 3 and all(whole(n, 1, 3) for n in v),
        "input_range": lambda v: v in ([0, 3000], "p2-98", [0, 0]) and v != [0, 0],
        "threshold": lambda v: False,
        "select": lambda v: isinstance(v, float) and 0 < v < 1,
        "scene": lambda v: isinstance(v, str) and compiles(v),
        "tiles": lambda v: whole(v, 1, 32),
        "unlabelled": lambda v: isinstance(v, list) and all(s in ("train", "val", "test") for s in v),
        "instances": lambda v: False,
        "report": lambda v: isinstance(v, dict) and all(isinstance(c, list) for c in v.values()),
        "warning": lambda v: isinstance(v, str),
        "variant": lambda v: isinstance(v, str)}
    more = {"bands": [[1, 2, 4], [0, 1, 2], [3, 2, 1], [1.0, 2, 3], [1, 2]], "input_range": ["p2-98", "p98-2", [5, 1]],
            "tiles": [33, 16, 10**9, 1], "scene": ["(a+)+$", "(", "(.*)*x", "\\d", "(?:(?:a|a)+)+b", "(\\w+\\s?)*$"]}
    key = str(rng.choice([*rules]))
    choices = [*ODD, *more.get(key, []), *more.get(key, []), *more.get(key, [])]
    value = choices[rng.integers(len(choices))]
    d = {**DESCRIPTION, key: value}
    replace(folder / "set/dataset.json", json.dumps(d).encode())
    must = "any"
    if no_json(value) or not rules[key](value) and key not in ("instances", "threshold", "variant"):
        must = "refuse"
    if key in ("instances", "threshold") and value is not None and not isinstance(value, (str, list)):
        must = "refuse"
    argv = TRAIN if key in ("tiles", "scene", "select", "bands", "input_range") and rng.random() < 0.5 else CHECK
    if key == "instances":
        argv = ["check", "set"]
    return Case(argv, must, ["dataset.json"], f"{key} = {str(value)[:60]!r}")


def compiles(regex):
    try:
        re.compile(regex)
        return True
    except (re.error, OverflowError, RecursionError):
        return False


def lists(rng, folder):
    """A list of a split, or of images to repeat."""
    file = ["set/lists/test.txt", "repeat.txt"][rng.integers(2)]
    good = (folder / file).read_bytes()
    lines = {"unknown": (b"images/77\n", "refuse"), "twice": (good * 2, "any"), "empty": (b"", "any"),
             "bad utf-8": (b"images/5\n\xff\xfe\xfa\n", "refuse"), "zeros": (bytes(50), "refuse"),
             "crlf": (good.replace(b"\n", b"\r\n"), "same"), "mark": (b"\xef\xbb\xbf" + good, "same"),
             "control": (b"images/\x1b[31m5\n", "refuse"), "long": (b"x" * 10**6, "refuse"),
             "utf-16": (good.decode().encode("utf-16"), "same"), "slashes": (good.replace(b"/", b"\\"), "same"),
             "wide": (b"a,b,c,d,e," * 20_000, "refuse"), "commas": (b"," * 3000, "refuse"),
             "png": ((folder / "set/images/0.png").read_bytes(), "refuse"), "train": (b"images/0\n", "any"),
             "parent": (b"../set/images/5\n", "any"), "nul": (b"images/5\0\n", "refuse")}
    kind = str(rng.choice([*lines]))
    content, must = lines[kind]
    replace(folder / file, content)
    argv = [*KD, "--alpha", "0", "--replicate", "repeat.txt"] if "repeat" in file else [CHECK, TRAIN][rng.integers(2)]
    if "repeat" in file and kind == "train":
        must = "any"
    if argv == CHECK and must == "same":
        must = "any"
    return Case(argv, must, [Path(file).name], f"{file} {kind}")


def right_split(s):
    names = {f"images/{i}" for i in range(6)}
    listed = [n for part in s.values() for n in part] if isinstance(s, dict) and all(
        isinstance(v, list) for v in s.values()) else [None]
    return all(isinstance(n, str) and (n in names or n.strip("./") in names) for n in listed) and \
        len(set(listed)) == len(listed) and bool(s.get("train")) and bool(s.get("val"))


def split(rng, folder):
    argv = [[*TRAIN, "--split-file", "split.json"], [*EVAL, "--split-file", "split.json"]][rng.integers(2)]
    case = json_case(rng, folder, "split.json", right_split, argv)
    unused = case.what.startswith(("delete", "rename", "value val", "value tr"))
    if argv[0] == "eval" and case.must == "refuse" and unused:
        case = case._replace(must="any")
    return case


def right_map(m):
    if not isinstance(m, dict) or not isinstance(m.get("map"), dict):
        return False
    names = {"land", "road", "water"}
    if set(m["map"]) != names:
        return False
    for to in m["map"].values():
        shares = {to: 1} if isinstance(to, str) else to
        if shares is None:
            continue
        if not isinstance(shares, dict) or not set(shares) <= names:
            return False
        if not all(type(v) in (int, float) and 0 <= v <= 1 for v in shares.values()):
            return False
        if shares and abs(sum(shares.values()) - 1) > 1e-5:
            return False
    return any(m["map"].values())


def class_map(rng, folder):
    return json_case(rng, folder, "map.json", right_map, [*KD, "--teacher", "run", "--map", "map.json"])


def difficulty(rng, folder):
    def right(d):
        return isinstance(d, dict) and all(type(v) is int and 0 <= v for v in d.values()) and \
            all(f"images/{i}" in d for i in range(4))

    argv = [*KD, "--alpha", "0", "--sampler", "weighted", "--difficulty", "difficulty.json"]
    return json_case(rng, folder, "difficulty.json", right, argv)


def reports(rng, folder):
    """results.json and protocol.json, which eval.py --summary and a resumed run read."""
    file = f"run/{rng.choice(['results', 'protocol'])}.json"
    case = json_case(rng, folder, file, lambda v: True, ["eval", "--summary", "run"], ["run:"])
    if rng.random() < 0.3:
        return json_case(rng, folder, "run/split.json", right_split, EVAL)._replace(must="any")
    return case


def prints(rng, folder):
    """files.json, by which a resumed run knows its images; one that tells of no file is none of these."""
    return json_case(rng, folder, "run/files.json", lambda v: isinstance(v, dict), ["train_seg", "--resume", "run"],
                     ["since run began", "run"])._replace(must="any")


def points(rng, folder):
    good = (folder / "points.csv").read_text()
    first = "images/0,3,9,land"
    spoilt = {
        "nan": ("3,9", "nan,9"), "inf": ("3,9", "3,inf"), "huge": ("3,9", "1e400,9"), "outside": ("3,9", "99,9"),
        "negative": ("3,9", "-1,9"), "empty": ("3,9", ",9"), "word": ("3,9", "x,9"), "class": ("land", "sea"),
        "no class": (",land", ","), "image": ("images/0", "images/9"), "quote": ("images/0,3", '"images/0,3'),
        "short": (first, "images/0,3"), "long": (first, first + ",1,2,3"), "nul": ("images/0", "images\0/0"),
        "control": ("images/0", "images/\x1b[31m0"), "other class": (first, "images/0,20,9,land"),
        "header": ("image,x,y,class", "image,x,y"), "same": ("", ""), "semicolons": (",", ";"), "crlf": ("\n", "\r\n"),
        "twice": (first, f"{first}\n{first}"), "superscript": ("3,9", "²,9"), "arabic": ("3,9", "٣,9"),
        "underscore": ("20,9", "2_0,9"), "hex": ("20,9", "0x14,9"), "bool": ("3,9", "True,9"),
        "digits": ("3,9", "9" * 500 + ",9"), "column twice": ("image,x,y,class", "image,x,x,y,class")}
    right = {"same", "semicolons", "crlf", "twice"}
    kind = str(rng.choice([*spoilt, "binary", "nothing", "only header", "huge field"]))
    content = {"binary": b"\x89PNG\0\0", "nothing": b"", "only header": b"image,x,y,class\n",
               "huge field": b"image,x,y,class\n" + b"a" * 200_000 + b",1,1,land\n"}.get(kind)
    if content is None:
        content = good.replace(*spoilt[kind], 1 if kind not in ("semicolons", "crlf") else -1).encode()
    replace(folder / "points.csv", content)
    must = "same" if kind in right else "refuse"
    return Case([*POINTS, "--points", "points.csv"], "any" if kind == "twice" else must, ["points.csv"], kind)


def right_geojson(g):
    if not isinstance(g, dict) or not isinstance(g.get("features"), list) or not g["features"] or g.get("crs"):
        return False
    seen = {}
    for f in g["features"]:
        try:
            x, y = f["geometry"]["coordinates"][:2]
            image, label = f["properties"]["image"], f["properties"]["class"]
            fits = f["geometry"]["type"] == "Point" and type(x) in (int, float) and type(y) in (int, float)
            fits &= 0 <= x < 32 and 0 <= y < 32 and label in ("land", "road", "water")
            fits &= re.fullmatch(r"(images/)?[0-3]", image) is not None
        except Exception:
            return False
        if not fits or seen.setdefault((image[-1], int(x), int(y)), label) != label:
            return False
    return True


def geojson(rng, folder):
    return json_case(rng, folder, "points.geojson", right_geojson, [*POINTS, "--points", "points.geojson"])


# ---- runs and weights

def header_of(file):
    with safe_open(file, "pt") as f:
        return json.loads(f.metadata()["nanors"])


def use_run(rng):
    """A command that reads best.safetensors."""
    return [EVAL, PREDICT, [*KD, "--teacher", "run", "--map", "names"], PREDICT][rng.integers(4)]


def right_header(old):
    def right(new):
        if not isinstance(new, dict) or new.get("format") != 1 or not right_classes(new.get("classes")):
            return False
        model = dict(new["model"]) if isinstance(new.get("model"), dict) else {}
        if type(model.get("feat_norm")) is bool:  # either can be right
            model["feat_norm"] = old["model"]["feat_norm"]
        if len(new["classes"]) != 3 or model != old["model"] or new.get("norm") not in ("imagenet", "sat"):
            return False
        if not whole(new.get("crop"), 1, 2**16) or new.get("saved") != "all" or type(new.get("amp")) is not str:
            return False
        overlap = new.get("overlap")
        return type(overlap) in (int, float) and 0 <= overlap < 1 and isinstance(new.get("ignore"), list)

    return right


def header(rng, folder):
    """The header of best.safetensors."""
    file = folder / "run/best.safetensors"
    old = header_of(file)
    content, value, what = change(rng, old)
    text = content.decode("utf-8", "replace")
    tensors = load_file(file)
    file.unlink()
    save_file(tensors, file, {"nanors": text})
    argv = use_run(rng)
    same = json.dumps(value) == json.dumps(old)
    must = "refuse" if value is None or not right_header(old)(value) else "same" if same else "any"
    if value is not None and "strange" in json.dumps(value.get("model", 0) if isinstance(value, dict) else 0):
        must = "refuse"
    if value is not None and what.startswith("extra model.backbone"):
        must = "refuse"
    if what in ("utf-16", "mark"):
        must = "any"
    if what.startswith(("rename", "delete")) and argv[0] != "eval" and value and right_header(old)(
            {**old, **value}) and value.get("model") == old["model"]:
        must = "any"
    return Case(argv, must, ["best.safetensors", "run:", "run/"], what)


def class_header(rng, folder):
    """The header of a classification run."""
    file = folder / "clsrun/best.safetensors"
    old = header_of(file)
    content, value, what = change(rng, old)
    tensors = load_file(file)
    file.unlink()
    save_file(tensors, file, {"nanors": content.decode("utf-8", "replace")})
    same = value == old
    must = "refuse" if value is None else "same" if same else "any"
    if value is not None and isinstance(value, dict):
        for key in ("model", "task", "norm", "size", "stored", "format"):
            if value.get(key) != old[key] and not whole(value.get(key), 8, 4096):
                must = "refuse"
    if what in ("utf-16", "mark"):
        must = "any"
    argv = ["predict", "clsrun", "cls/a/a_0.png", "--out", "out"]
    return Case(argv, must, ["best.safetensors", "clsrun"], what)


def spoil_tensors(rng, tensors):
    """-> tensors, must, what."""
    name = str(rng.choice(list(tensors)))
    t = tensors[name].clone()
    kinds = ["nan", "inf", "-inf", "complex", "bool", "int", "half", "double", "shape", "extra dim", "scalar", "empty",
             "missing", "extra", "deep", "rename", "zero size", "bfloat16", "flat", "extra nan"]
    kind = str(rng.choice(kinds))
    must = "refuse"
    floating = t.is_floating_point()
    if kind in ("nan", "inf", "-inf"):
        if not floating:
            return tensors, "same", f"{kind} {name}: whole numbers"
        t.view(-1)[rng.integers(t.numel())] = float(kind)
        if name.endswith("qkv.bias") and kind:  # the key bias is masked in some layouts
            must = "any"
    elif kind == "complex":
        t = t.to(torch.complex64)
    elif kind == "bool":
        t = t.bool()
    elif kind == "int":
        t = t.to(torch.int32)
        must = "any" if not floating else "refuse"
    elif kind in ("half", "double", "bfloat16"):
        t = t.to({"half": torch.float16, "double": torch.float64, "bfloat16": torch.bfloat16}[kind])
        must = "any"
    elif kind == "shape":
        t = torch.zeros(tuple(d + 1 for d in t.shape) or (2,))
    elif kind == "extra dim":
        t = t[None]
    elif kind == "scalar":
        t = torch.tensor(1.0)
        must = "refuse" if tensors[name].dim() else "any"
    elif kind in ("empty", "zero size"):
        t = torch.zeros(0) if kind == "empty" else torch.zeros(*t.shape[:-1], 0)
    elif kind == "flat":
        t = t.reshape(-1)
        must = "refuse" if tensors[name].dim() > 1 else "any"
    out = dict(tensors)
    if kind == "missing":
        del out[name]
    elif kind in ("extra", "extra nan"):
        out[["head.strange", "a b", "norm.strange.weight"][rng.integers(3)]] = torch.full((3,), float("nan"))
        must = "any"
    elif kind == "rename":
        out[name + "x"] = out.pop(name)
    elif kind == "deep":
        prefix = "backbone." if any(k.startswith("backbone.") for k in tensors) else ""
        out[f"{prefix}blocks.9999.norm1.weight"] = torch.ones(3)
    else:
        out[name] = t.contiguous()
    return out, must, f"{kind} {name}"


def tensors(rng, folder):
    """The tensors of best.safetensors."""
    file = folder / "run/best.safetensors"
    meta, found = header_of(file), load_file(file)
    spoilt, must, what = spoil_tensors(rng, found)
    if must == "any" and "extra" in what:
        must = "refuse"  # no run writes others
    file.unlink()
    save_file(spoilt, file, {"nanors": json.dumps(meta)})
    return Case(use_run(rng), must, ["best.safetensors", "run:", "run/"], what)


def spoil_bytes(rng, data):
    """-> bytes, are they surely damaged, what was done."""
    kind = str(rng.choice(["cut", "flip", "zeros", "empty", "head", "insert", "swap", "random"]))
    n = len(data)
    i = int(rng.integers(n))
    if kind == "cut":
        return data[:i], True, f"cut {i}"
    if kind == "flip":
        return data[:i] + bytes([data[i] ^ 1 << int(rng.integers(8))]) + data[i + 1:], False, f"flip at {i}"
    if kind == "zeros":
        k = int(rng.integers(1, 64))
        return data[:i] + bytes(k) + data[i + k:], False, f"zeros at {i}"
    if kind == "empty":
        return b"", True, "empty"
    if kind == "head":
        k = int(rng.integers(1, 16))
        return bytes(rng.integers(0, 256, k, dtype=np.uint8)) + data[k:], True, f"head {k}"
    if kind == "insert":
        return data[:i] + b"abc" + data[i:], False, f"insert at {i}"
    if kind == "swap":
        return data[i:] + data[:i], i > 0, f"swap at {i}"
    return bytes(rng.integers(0, 256, n, dtype=np.uint8)), True, "random"


def run_bytes(rng, folder):
    """The bytes of best.safetensors, mostly of its header."""
    file = folder / "run/best.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    kind = rng.choice(["bytes", "header", "length", "json"])
    sure, what = True, str(kind)
    if kind == "bytes":
        data, sure, what = spoil_bytes(rng, data)
    elif kind == "header":
        part, sure, what = spoil_bytes(rng, data[8:8 + length])
        data = struct.pack("<Q", len(part)) + part + data[8 + length:]
        sure = False
    elif kind == "length":
        value = [0, 1, 2**63, 2**64 - 1, 2**40, length - 1, length + 1, len(data)][rng.integers(8)]
        data = struct.pack("<Q", value) + data[8:]
        what = f"length {value}"
    else:
        head = json.loads(data[8:8 + length])
        name = str(rng.choice([k for k in head if k != "__metadata__"]))
        entry = head[name]
        lie = str(rng.choice(["dtype", "shape", "offsets", "negative", "huge", "overlap"]))
        if lie == "dtype":
            entry["dtype"] = str(rng.choice(["F16", "BOOL", "C64", "F8_E4M3", "X", "I64"]))
        elif lie == "shape":
            entry["shape"] = [2**40, 2**40]
        elif lie == "offsets":
            entry["data_offsets"] = [0, 1]
        elif lie == "negative":
            entry["shape"] = [-1]
        elif lie == "huge":
            entry["data_offsets"] = [0, 2**62]
        else:
            other = next(k for k in head if k not in ("__metadata__", name))
            entry["data_offsets"] = head[other]["data_offsets"]
            sure = head[other]["data_offsets"] != entry["data_offsets"]
        what = f"{lie} {name}"
        text = json.dumps(head).encode()
        data = struct.pack("<Q", len(text)) + text + data[8 + length:]
        sure = lie != "overlap"
    replace(file, data)
    return Case(use_run(rng), "refuse" if sure else "any", ["best.safetensors", "run:", "run/"], what)


def last(rng, folder):
    """last.pt of a run that is resumed."""
    file = folder / "run/last.pt"
    state = torch.load(file, weights_only=True)
    kind = rng.choice(["bytes", "node", "delete", "tensor", "extra"], p=[0.2, 0.5, 0.15, 0.1, 0.05])
    must = "refuse"
    if kind == "bytes":
        data, sure, what = spoil_bytes(rng, file.read_bytes())
        replace(file, data)
        return Case(["train_seg", "--resume", "run"], "refuse" if sure else "any", ["last.pt", "run"], what)
    plain = {k: v for k, v in state.items() if k not in ("net", "opt", "ema")}
    places = [p for p in nodes(plain) if p]
    path = places[rng.integers(len(places))]
    parent, key = at(state, path[:-1]), path[-1]
    what = f"{kind} {'.'.join(map(str, path))}"
    if kind == "node":
        value = ODD[rng.integers(len(ODD))]
        same = type(value) is type(parent[key])
        what += f" = {str(value)[:40]!r}"
        must = "any" if same or path[0] in ("args", "labels") or path[-1] == "command" else "refuse"
        if parent[key] is None or len(path) > 2 or isinstance(value, (int, float)):
            must = "any"
        parent[key] = value
    elif kind == "delete":
        del parent[key]
        must = "any" if {"history", "labels", "weights"} & {*map(str, path)} else "refuse"
    elif kind == "tensor":
        part = str(rng.choice(["net", "opt"]))
        if part == "net":
            state["net"], must, more = spoil_tensors(rng, state["net"])
        else:
            number = int(rng.choice(list(state["opt"]["state"])))
            one, must, more = spoil_tensors(rng, state["opt"]["state"][number])
            state["opt"]["state"][number] = one
        what = f"{part} {more}"
    else:
        state["strange"] = 1
        must = "any"
    file.unlink()
    torch.save(state, file)
    # A value of a flag that is another one is typed again, and must be refused or taken.
    return Case(["train_seg", "--resume", "run"], must, ["last.pt", "run:", "run/", "--", "no such folder"], what)


def pth(rng, folder):
    """A backbone given to --weights."""
    name = ["vit.pth", "vit.safetensors"][rng.integers(2)]
    file = folder / name
    argv = [*TRAIN, "--weights", name]
    if rng.random() < 0.4:
        data, sure, what = spoil_bytes(rng, file.read_bytes())
        replace(file, data)
        return Case(argv, "refuse" if sure else "any", [name], what)
    state = torch.load(file, weights_only=True) if name == "vit.pth" else load_file(file)
    spoilt, must, what = spoil_tensors(rng, state)
    file.unlink()
    if name == "vit.pth":
        odd = rng.random()
        content = spoilt
        if odd < 0.3:
            choices = [[1], {"a": 1}, None, "text", {"model": spoilt}, [spoilt], {"model": {"model": {}}},
                       torch.ones(3),
                       {1: spoilt}, {None: torch.ones(2)}, {"a": torch.ones(2).to_sparse()}, {"x": {"y": [{}, []]}},
                       {("a", "b"): torch.ones(2)}, {"\x1b[31m": torch.ones(2)}, {"a\nb": torch.ones(2)},
                       nested(3000), nested(300)]
            i = int(rng.integers(len(choices)))
            content, what = choices[i], f"{what}, content {i}"
            must = must if i in (4, 5, 8) else "refuse"
            must = "any" if i == 8 else must
        torch.save(content, file)
    else:
        save_file(spoilt, file)
    return Case(argv, must, [name], what)


def nested(depth):
    value = torch.ones(2)
    for _ in range(depth):
        value = [value]
    return value


def hf(rng, folder):
    """A Hugging Face folder whose side files are spoilt."""
    name = str(rng.choice(["model.safetensors.index.json", "preprocessor_config.json"]))
    file = folder / "hf" / name
    old = json.loads(file.read_text())
    content, value, what = change(rng, old)
    if rng.random() < 0.2:
        names = list(old.get("weight_map", {}))
        if names:
            target = str(rng.choice(["../vit.safetensors", "/etc/passwd", "", ".", "three.safetensors", "config.json",
                                     "a\0b", "one.safetensors/"]))
            old["weight_map"][names[0]] = target
            content, value, what = json.dumps(old).encode(), old, f"shard {target!r}"
            replace(file, content)
            return Case([*TRAIN, "--weights", "hf"], "refuse", ["hf"], what)
    replace(file, content)
    must = "refuse" if value is None else "same" if value == old else "any"
    return Case([*TRAIN, "--weights", "hf"], must, ["hf"], f"{name} {what}")


# ---- pictures

def image(rng, folder):
    """The bytes of an image, a mask, or what stands in its place."""
    part = str(rng.choice(["images", "masks"]))
    file = folder / f"set/{part}/0.png"
    formats = ["png", "png", "jpg", "webp", "bmp", "tif"] if part == "images" else ["png", "png", "tif", "bmp"]
    kind = str(rng.choice(formats))
    buffer = io.BytesIO()
    pixels = Image.open(file)
    packing = str(rng.choice(["raw", "tiff_deflate", "tiff_lzw", "packbits"]))
    options = {}
    if kind == "tif" and packing != "raw":
        options = dict(compression=packing)
    pixels.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(kind, kind), **options)
    data, sure, what = spoil_bytes(rng, buffer.getvalue())
    if kind in ("jpg", "webp"):
        sure = what in ("empty", "random") or "head" in what
    if kind == "tif" and what.startswith(("head", "swap")):
        sure = False
    if kind == "bmp" and "head" in what:
        sure = False
    crc = kind == "png" and what.startswith(("flip", "zeros")) and data != buffer.getvalue()
    if crc:  # every byte of a PNG is under a checksum but those of a length, which move the next chunk
        sure = not png_is_whole(data)
    replace(file, data)
    argv = [CHECK, TRAIN, PREDICT][rng.integers(3)] if part == "images" else [CHECK, TRAIN][rng.integers(2)]
    return Case(argv, "refuse" if sure else "any", ["0.png"], f"{part} {kind} {what}")


def png_is_whole(data):
    """Signature, chunks with their checksums, up to IEND: by the specification."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return False
    place = 8
    while place + 12 <= len(data):
        length, name = struct.unpack(">I4s", data[place:place + 8])
        body = data[place + 4:place + 8 + length]
        end = place + 8 + length
        if len(body) < length + 4 or data[end:end + 4] != struct.pack(">I", zlib.crc32(body)):
            return False
        if name == b"IEND":
            return True
        place += 12 + length
    return False


def png(width, height, bits=8, kind=2, body=b""):
    """A PNG of any claim."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


BOMB = {}


def special(rng, folder):
    """FIFOs, sockets, devices, folders, links and bombs where a file should be."""
    places = ["set/images/0.png", "set/masks/0.png", "set/dataset.json", "split.json", "points.csv", "map.json",
              "vit.pth", "run/best.safetensors", "run/last.pt", "repeat.txt", "cls/a/a_0.png", "difficulty.json",
              "set/lists/test.txt", "set/images/0.png.msk", "set/images/0.pgw", "run/results.json",
              "hf/one.safetensors",
              "hf/preprocessor_config.json", "hf/model.safetensors.index.json", "run/protocol.json", "run/split.json"]
    place = str(rng.choice(places))
    file = folder / place
    kinds = ["fifo", "socket", "folder", "zero", "loop", "nowhere", "null", "full", "unreadable dir"]
    if "png" in place[-4:]:
        kinds += ["bomb", "bomb", "claim", "claim", "suffix"]
    kind = str(rng.choice(kinds))
    file.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "socket":
        s = socket.socket(socket.AF_UNIX)
        was = os.getcwd()
        os.chdir(file.parent)
        s.bind(file.name)
        os.chdir(was)
        s.close()
    elif kind in ("folder", "unreadable dir"):
        file.mkdir()
    elif kind == "zero":
        file.touch()
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "nowhere":
        file.symlink_to("nothing")
    elif kind == "null":
        file.symlink_to("/dev/null")
    elif kind == "full":
        file.symlink_to("/dev/zero")
    elif kind == "bomb":
        if not BOMB:
            packer = zlib.compressobj(9)
            rows = [packer.compress(bytes(100 * (36_000 * 3 + 1))) for _ in range(360)]
            BOMB["bytes"] = b"".join([*rows, packer.flush()])
        file.write_bytes(png(36_000, 36_000, body=BOMB["bytes"]))
    elif kind == "claim":
        sides = [(2**31 - 1, 2**31 - 1), (0, 5), (5, 0), (10**6, 10**6), (2**32 - 1, 1), (65_000, 65_000)]
        file.write_bytes(png(*sides[rng.integers(len(sides))], body=zlib.compress(bytes(100))))
    elif kind == "suffix":
        file.write_bytes(b"GIF89a" + bytes(20))
    commands = {"set/images/0.png": [CHECK, TRAIN, PREDICT], "set/masks/0.png": [CHECK, TRAIN],
                "set/dataset.json": [CHECK, TRAIN], "split.json": [[*TRAIN, "--split-file", "split.json"]],
                "points.csv": [[*POINTS, "--points", "points.csv"]],
                "map.json": [[*KD, "--teacher", "run", "--map", "map.json"]],
                "vit.pth": [[*TRAIN, "--weights", "vit.pth"]],
                "run/best.safetensors": [EVAL, PREDICT], "run/last.pt": [["train_seg", "--resume", "run"]],
                "repeat.txt": [[*KD, "--alpha", "0", "--replicate", "repeat.txt"]], "cls/a/a_0.png": [CLS],
                "difficulty.json": [[*KD, "--alpha", "0", "--sampler", "weighted", "--difficulty", "difficulty.json"]],
                "set/lists/test.txt": [CHECK, TRAIN], "set/images/0.png.msk": [TRAIN, PREDICT],
                "set/images/0.pgw": [PREDICT], "run/results.json": [["eval", "--summary", "run"]],
                "run/protocol.json": [["eval", "--summary", "run"]], "run/split.json": [EVAL]}
    choices = commands.get(place, [[*TRAIN, "--weights", "hf"]])
    must = "refuse"
    beside = place.endswith((".msk", ".pgw"))
    if beside or place.startswith("hf/pre") or place.startswith(("run/split", "run/results", "run/protocol")) \
            or kind == "suffix":
        must = "any"
    if kind in ("folder", "unreadable dir") and place.startswith(("set/images", "set/masks", "cls")):
        must = "any"  # a folder of that name may hold further images
    argv = choices[rng.integers(len(choices))]
    if place == "set/dataset.json" and kind in ("folder", "nowhere", "loop") and argv == CHECK:
        must = "any"
    return Case(argv, must, [file.name, place.split("/")[0]], f"{kind} {place}")


def tiff(rng, folder):
    """Tags of a TIFF, one entry of its directory spoilt."""
    name = str(rng.choice(["grey.tif", "lzw.tif", "raw.tif"]))
    file = folder / name
    data = bytearray(file.read_bytes())
    first = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, first)[0]
    place = first + 2 + 12 * int(rng.integers(count))
    tag = struct.unpack_from("<H", data, place)[0]
    kind = str(rng.choice(["value", "count", "type", "tag", "entries", "first", "next", "bytes", "cut"]))
    odd = int(rng.choice([0, 1, 2, 3, 7, 255, 256, 65535, 2**16, 2**31 - 1, 2**31, 2**32 - 1]))
    what = f"{name} {kind} of tag {tag}: {odd}"
    must = "any"
    if kind == "value":
        struct.pack_into("<I", data, place + 8, odd)
    elif kind == "count":
        struct.pack_into("<I", data, place + 4, odd)
    elif kind == "type":
        struct.pack_into("<H", data, place + 2, odd & 0xFFFF)
    elif kind == "tag":
        struct.pack_into("<H", data, place, int(rng.choice([257, 258, 259, 277, 284, 317, 320, 322, 338, 339, 34264])))
    elif kind == "entries":
        struct.pack_into("<H", data, first, odd & 0xFFFF)
    elif kind == "first":
        struct.pack_into("<I", data, 4, odd)
    elif kind == "next":
        struct.pack_into("<I", data, first + 2 + 12 * count, odd)
    elif kind == "bytes":
        new, _, what = spoil_bytes(rng, bytes(data))
        data = bytearray(new)
    else:
        data = data[:int(rng.integers(8, len(data)))]
        must = "refuse"
    replace(file, bytes(data))
    return Case(["predict", "run", name, "--out", "out"], must, [name], what)


# ---- flags

def numeric_flags(script):
    """{flag: how many values} of a script whose values are numbers, asked of its own parser."""
    found = {}

    class Stop(Exception):
        pass

    def caught(parser, *_):
        for action in parser._actions:
            if action.option_strings and action.type is not None and action.nargs != 0:
                found[action.option_strings[-1]] = action.nargs if isinstance(action.nargs, int) else 1
        raise Stop

    module = importlib.import_module("data.check.__main__" if script == "check" else script)
    was = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = caught
    try:
        module.parse_args([])
    except Stop:
        pass
    finally:
        argparse.ArgumentParser.parse_args = was
    return found


def is_number(text):
    return re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) and abs(float(text)) < float("inf")


def flags(rng, folder):
    """Numeric flags of all scripts with odd numbers."""
    commands = dict(train_seg=TRAIN, train_kd=[*KD, "--alpha", "0"], train_points=POINTS, train_cls=CLS, eval=EVAL,
                    predict=PREDICT, check=CHECK)
    script = str(rng.choice([*commands]))
    numeric = numeric_flags(script)
    flag = str(rng.choice([*numeric]))
    value = str(rng.choice(NUMBERS))
    n = numeric[flag]
    argv = [*commands[script]]
    if n == 1 and rng.random() < 0.7 or value == "--":
        argv.append(f"{flag}={value}")
    else:
        values = ["1"] * n
        values[rng.integers(n)] = value
        argv += [flag, *values]
    must = "any" if is_number(value) and value != "-1" else "refuse"
    if flag == "--bands" or "\n" in value:
        must = "any" if flag == "--bands" and value in ("1", "0") else "refuse"
    return Case(argv, must, [flag], f"{flag} {value[:30]!r}")


def words(rng, folder):
    """Flags of text: names of files, regexes, formulas, lists."""
    odd = ["", " ", "\0", "a\0b", "\x1b[31m", "a\nb", "²", "٣", "nan", "500%", "-5%", "nan%", "1e400%", "%", "0%", "--",
           "/", ".", "..", "~", "x" * 5000, "/dev/null", "/dev/zero", "\udcff", "(a+)+$", "(.*)*x", "(", "[", "é",
           "http://",
           "https://localhost:1/a.pth", "file:///etc/passwd", "http://[", "set", "vit.pth", "none", "all", "-1",
           "1.5", "*"]
    value = str(rng.choice(odd))
    targets = [
        (TRAIN, "--root"), (TRAIN, "--split-file"), (TRAIN, "--weights"), (TRAIN, "--unfreeze"), (TRAIN, "--loss"),
        (TRAIN, "--input-range"), (TRAIN, "--bands"), (TRAIN, "--cache"), (TRAIN, "--resume"), (TRAIN, "--variant"),
        (KD, "--teacher"), ([*KD, "--teacher", "run"], "--map"), ([*KD, "--alpha", "0"], "--replicate"),
        ([*KD, "--alpha", "0", "--sampler", "weighted"], "--difficulty"),
        (POINTS, "--points"), (CLS, "--group-regex"), (CLS, "--classes"),
        (CLS, "--split-file"), (CLS, "--weights"), (CLS, "--unfreeze"), (EVAL, "--split"), (EVAL, "--root"),
        (EVAL, "--masks"), (EVAL, "--weights"), (PREDICT, "--weights"), (PREDICT, "--out"), (CHECK, "--masks"),
        (CHECK, "--bands"), (CHECK, "--input-range"), (EVAL, "--summary"), (PREDICT, "INPUT"), (PREDICT, "RUN"),
        (TRAIN, "--out"), (CHECK, "ROOT")]
    argv, flag = targets[rng.integers(len(targets))]
    must = "any"
    if flag == "INPUT":
        argv = ["predict", "run", value, "--out", "out"]
    elif flag == "RUN":
        argv = ["predict", value, "set/images/0.png", "--out", "out"]
    elif flag == "ROOT":
        value = "set" if value in (".", "..") else value  # where a draft would be written, as it should
        argv = ["check", value]
    else:
        argv = [*argv, f"{flag}={value}"]
    if flag == "--replicate" and "%" in value or flag == "--unfreeze" and value in "²٣-1.5nan":
        must = "refuse"
    if flag == "--out" and value not in ("", "\0", "a\0b", "--"):
        return Case([*CHECK, "--limit", "0"], "refuse", ["--limit"], "limit 0")
    if flag == "--cache" and value in ("/dev/null", "/", "~", "..", "."):
        value = "off"
        argv = [*TRAIN, "--cache=off"]
    shown = value.encode("unicode_escape", "surrogateescape").decode() if value.isascii() else value
    return Case(argv, must, [flag, *([value[:200]] if value.strip() else []), shown[:40], repr(value)[1:-1][:100],
                             value.split(":")[-1].strip("/") or value.rstrip("/") or "/", "dataset.json"],
                             f"{flag} {value[:40]!r}")


def names(rng, folder):
    """Odd names of files, classes and folders: shown escaped, in one line."""
    odd = ["a\x1b[31mb", "a\nb", "a\rb", "a\tb", "a\x07b", "\u202eabc", "a b", "é", "a\udcffb", "-a", "a'b", 'a"b',
           "[a]",
           "a\x7fb", "a\x9bb"]
    name = str(odd[rng.integers(len(odd))])
    kind = str(rng.choice(["image", "damaged", "class folder", "class", "folder", "stray"]))
    argv, must = [CHECK, TRAIN, ["predict", "run", "set/images", "--out", "out"]][rng.integers(3)], "any"
    if kind in ("image", "damaged"):
        for part in ("images", "masks"):
            source = folder / f"set/{part}/0.png"
            target = folder / f"set/{part}" / f"{name}.png"
            source.rename(target)
            if kind == "damaged" and part == "images":
                replace(target, b"nothing")
        put(folder / "set/dataset.json", {**DESCRIPTION, "splits": {**DESCRIPTION["splits"], "train": "*/[!45]*"}})
        must = "refuse" if kind == "damaged" else "any"
    elif kind == "class folder":
        (folder / "cls/a").rename(folder / "cls" / name)
        argv = CLS
    elif kind == "class":
        if "\udcff" in name:
            name = "a\x1bb"
        put(folder / "set/dataset.json", {**DESCRIPTION, "classes": [{**CLASSES[0], "name": name}, *CLASSES[1:2],
                                                                    {**CLASSES[2], "id": 77}], "report": {}})
        must = "any"
    elif kind == "folder":
        (folder / "set").rename(folder / name)
        (folder / name / "images/0.png").unlink()
        replace(folder / name / "images/1.png", b"nothing")
        argv = [a if a not in ("set", "set/images") else f"./{name}" for a in argv]
        must = "any" if argv[0] == "predict" else "refuse"
    else:
        replace(folder / "set/images" / f"{name}.xyz", b"nothing")
    return Case(argv, must, ["a", "set", name[:3], "dataset.json"], f"{kind} {name!r}")


def folders(rng, folder):
    """Class folders."""
    kind = str(rng.choice(["empty class", "one class", "damaged", "fifo", "deep", "link", "file", "no images",
                           "dup classes",
                           "missing class", "splits", "big", "grey", "tiny"]))
    argv, must, words = list(CLS), "any", ["cls", "--classes", "class"]
    if kind == "empty class":
        (folder / "cls/d").mkdir()
    elif kind == "one class":
        shutil.rmtree(folder / "cls/b")
        shutil.rmtree(folder / "cls/c")
        must = "refuse"
    elif kind == "damaged":
        replace(folder / "cls/a/a_0.png", b"nothing")
        must = "refuse"
    elif kind == "fifo":
        (folder / "cls/a/a_0.png").unlink()
        os.mkfifo(folder / "cls/a/a_0.png")
        must = "refuse"
    elif kind == "deep":
        (folder / "cls/a/x/y").mkdir(parents=True)
        (folder / "cls/a/a_0.png").rename(folder / "cls/a/x/y/0.png")
    elif kind == "link":
        (folder / "cls/a/up").symlink_to("..")
        (folder / "cls/a/gone.png").symlink_to("nothing")
        must = "refuse"
    elif kind == "file":
        shutil.rmtree(folder / "cls")
        (folder / "cls").touch()
        must = "refuse"
    elif kind == "no images":
        for file in (folder / "cls").rglob("*.png"):
            file.unlink()
        must = "refuse"
    elif kind == "dup classes":
        argv += ["--classes", "a", "a", "b"]
        must = "refuse"
    elif kind == "missing class":
        argv += ["--classes", "a", "b", str(rng.choice(["z", "\x1b[31m", "é", "../a", "a/"]))]
        must = "refuse"
    elif kind == "splits":
        (folder / "cls/train").mkdir()
        (folder / "cls/val").mkdir()
        must = "refuse"
    elif kind == "big":
        replace(folder / "cls/a/a_0.png", png(10**5, 10**5))
        must = "refuse"
    elif kind == "grey":
        replace(folder / "cls/a/a_0.png", png(16, 16, 16, 0, zlib.compress(bytes(33 * 16))))
        must = "refuse"
    elif kind == "tiny":
        replace(folder / "cls/a/a_0.png", png(1, 1, body=zlib.compress(bytes(4))))
    return Case(argv, must, words, kind)


# Family: generator, cases.
FAMILIES = {
    "dataset": (dataset, 400), "keys": (keys, 200), "lists": (lists, 60), "split": (split, 100), "map": (class_map, 70),
    "difficulty": (difficulty, 60), "reports": (reports, 100), "points": (points, 80), "geojson": (geojson, 80),
    "header": (header, 250), "class header": (class_header, 150), "tensors": (tensors, 100),
    "run bytes": (run_bytes, 150),
    "last": (last, 130), "weights": (pth, 150), "hf": (hf, 60), "image": (image, 150), "special": (special, 120),
    "tiff": (tiff, 200), "flags": (flags, 350), "words": (words, 150), "names": (names, 80), "folders": (folders, 30),
    "prints": (prints, 40)}
ENDS = "correct", "clean", "traceback", "hang", "unclear", "accepted", "refused", "changed"


def one(base, family, seed, wanted, log):
    """Makes, runs and judges a case -> how it ended, what it printed."""
    rng = np.random.default_rng((list(FAMILIES).index(family), seed))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "case"
        shutil.copytree(base, folder, copy_function=os.link)
        case = FAMILIES[family][0](rng, folder)
        expected = None
        if case.must == "same":
            key = str(case.argv)
            if key not in wanted:
                clean = Path(place) / "unspoilt"
                shutil.copytree(base, clean, copy_function=os.link)
                _, out, _ = run(case.argv, clean, log)
                wanted[key] = digest(clean, case.argv, out)
            expected = wanted[key]
        result = judge(case, folder, expected, log)
        for file in folder.rglob("*"):
            if not file.is_symlink() and file.is_dir():
                file.chmod(0o700)
    return result


def sample(families, n, seed=0, base=None):
    """For a test: n cases of each family -> [(family, seed, how it ended, what it printed)] of the faults."""
    faults = []
    with tempfile.TemporaryDirectory() as place:
        log = f"{place}/log"
        base = Path(place) / "base"
        base.mkdir()
        make_base(base, log, trained=False)
        wanted = {}
        for family in families:
            for s in range(seed, seed + n):
                end, said = one(base, family, s, wanted, log)
                if end not in ("correct", "clean"):
                    faults.append((family, s, end, said))
    return faults


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=[*FAMILIES], default=[*FAMILIES])
    p.add_argument("--n", type=int, help="cases of each family (as listed in FAMILIES)")
    p.add_argument("--first", type=int, default=0, help="the first seed")
    p.add_argument("--seed", type=int, nargs="+", help="these cases alone, with all that they printed")
    p.add_argument("--show", action="store_true", help="what the faults printed")
    args = p.parse_args()
    CODE.update(scripts())
    rows, failing = [], []
    with tempfile.TemporaryDirectory() as place:
        base, log = Path(place) / "base", f"{place}/log"
        base.mkdir()
        make_base(base, log)
        wanted = {}
        for family in args.only:
            count, began = Counter(), time.monotonic()
            seeds = range(args.first, args.first + (args.n or FAMILIES[family][1]))
            for seed in seeds if args.seed is None else args.seed:
                end, said = one(base, family, seed, wanted, log)
                count[end] += 1
                if end not in ("correct", "clean"):
                    failing.append((family, seed, end))
                    if args.show:
                        print(f"---- {family} {seed} {end}\n{said[-2500:]}", flush=True)
                if args.seed is not None:
                    print(f"{end}\n{said}")
            rows.append((family, count))
            took = time.monotonic() - began
            print(f"{family:13} {sum(count.values()):5} tried  "
                  + "  ".join(f"{count[end]} {end}" for end in ENDS if count[end]) + f"  ({took:.0f} s)", flush=True)
    total = sum((count for _, count in rows), Counter())
    print(f"{'all':13} {sum(total.values()):5} tried  " + "  ".join(f"{total[end]} {end}" for end in ENDS))
    if failing:
        print("failing: " + ", ".join(f"{family} {seed} {end}" for family, seed, end in failing))
    sys.exit(bool(failing))


if __name__ == "__main__":
    main()
