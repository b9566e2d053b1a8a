"""The rules of the house: the layout, who imports whom, what copies alone, what a flag means everywhere."""
import argparse
import ast
import collections
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.common import BadInput

ROOT = Path(__file__).parents[1]
LAYOUT = {"README.md", "requirements.txt", "LICENSE", ".gitignore", ".ci", "models", "data", "tests",
          "predict.py", "eval.py", "train_seg.py", "train_cls.py", "train_kd.py", "train_points.py"}
PACKAGES = set(sys.stdlib_module_names) | {"torch", "torchvision", "numpy", "PIL", "safetensors"}
SCRIPTS = sorted(ROOT.glob("*.py"))
MODULES = sorted(f for d in ("models", "data") for f in (ROOT / d).rglob("*.py"))
# These copy with nothing but data/common.py; in models/ with weights.py too.
ALONE = {"models": "vit heads deeplab unetformer efficientnet_unet classify weights lookahead losses",
         "data": "tiff crops augment samplers metrics classmap"}


def name_of(file):
    return file.relative_to(ROOT).as_posix()


def module_of(file):  # data/io.py -> data.io, data/check/__init__.py -> data.check
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


KNOWN = {module_of(f): f for f in [*SCRIPTS, *MODULES]}


def imports(file):
    """Whole names of the modules that a file imports, also inside functions."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in KNOWN else base


def own_imports(file):
    return {m for m in imports(file) if m in KNOWN} - {"models", "data"}


def floor_of(module):
    return {"data": 0, "models": 1}.get(module.split(".")[0], 2)


def tracked(*patterns):
    done = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git checkout: what belongs to the project cannot be told")
    return done.stdout.split("\n")[:-1]


def test_the_top_level_is_the_layout():
    assert {name.split("/")[0] for name in tracked()} == LAYOUT


@pytest.mark.parametrize("file", [*SCRIPTS, *MODULES], ids=name_of)
def test_imports_go_down_and_to_five_packages(file):
    own = module_of(file)
    for module in imports(file):
        if module in KNOWN:
            assert floor_of(module) <= floor_of(own), f"imports {module}"
            assert floor_of(module) < 2, f"imports the script {module}"
        else:
            assert module.split(".")[0] in PACKAGES, f"imports {module}"


def test_no_circles():
    arrows = {module: own_imports(file) for module, file in KNOWN.items()}
    while arrows:
        ends = {m for m, others in arrows.items() if not others - {m} & arrows.keys()}
        assert ends, f"a circle among {sorted(arrows)}"
        arrows = {m: others - ends for m, others in arrows.items() if m not in ends}


def test_what_copies_alone_needs_no_siblings(tmp_path):
    """With data/common.py, in models/ also weights.py, and nothing else; one process imports them all in turn."""
    names = [f"{folder}.{stem}" for folder, stems in ALONE.items() for stem in stems.split()]
    for name in names:
        folder, stem = name.split(".")
        weights = ["models/weights.py"] if folder == "models" else []
        for part in ["data/common.py", f"{folder}/{stem}.py", *weights]:
            (tmp_path / name / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / part, tmp_path / name / part)
    code = f"""
import importlib, sys
for name in {names!r}:
    sys.path.insert(0, {str(tmp_path)!r} + "/" + name)
    importlib.import_module(name)
    for module in [m for m in sys.modules if m.split(".")[0] in ("data", "models")]:
        del sys.modules[module]
    del sys.path[0]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_modules_have_no_flags_and_print_nothing():
    programs = {f for f in MODULES if f.parent.name in ("check", "curate")}
    for file in set(MODULES) - programs:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                to = [k for k in node.keywords if k.arg == "file"]
                assert to, f"{name_of(file)}:{node.lineno} prints"
        if file.name != "run.py":
            assert "argparse" not in set(imports(file)), name_of(file)


def test_importing_the_scripts_does_nothing_else(tmp_path):
    names = ", ".join(f.stem for f in SCRIPTS)
    code = f"import signal, sys, threading; sys.path.insert(0, {str(ROOT)!r}); " \
           f"was = signal.getsignal(signal.SIGINT); import {names}; assert threading.active_count() == 1; " \
           "assert signal.getsignal(signal.SIGINT) is was"  # not always Python's own: background jobs ignore it
    done = subprocess.run([sys.executable, "-Bc", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


def parser_of(file, monkeypatch):
    caught = []
    with monkeypatch.context() as m:
        m.setattr(argparse.ArgumentParser, "parse_args", lambda self, argv=None: caught.append(self) or sys.exit())
        with pytest.raises(SystemExit):
            importlib.import_module(file.stem).parse_args([])
    return caught[0]


@pytest.mark.parametrize("file", SCRIPTS, ids=name_of)
def test_help_shows_every_default(file, monkeypatch):
    parser = parser_of(file, monkeypatch)
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        assert action.help, f"{action.dest} has no help"
        if action.default not in (None, False, argparse.SUPPRESS):
            assert f"(default: {action.default})" in text


def test_a_flag_means_the_same_in_all_scripts(monkeypatch):
    def differ(scripts):
        seen = collections.defaultdict(set)
        for f in scripts:
            for a in parser_of(f, monkeypatch)._actions:
                if a.option_strings:
                    seen[a.option_strings[0]].add(repr((a.default, a.help)))
        return {flag for flag, meanings in seen.items() if len(meanings) > 1}

    training = [f for f in SCRIPTS if f.name.startswith("train")]
    # A classification run has its own folder, batch, split and fine-tuning; points have ce alone and no micro-batches.
    assert differ(training) == {"--root", "--out", "--batch-size", "--class-weights", "--unfreeze", "--loss", "--lr",
                                "--eval-every", "--seed", "--label-smoothing",
                                "--temperature",  # of k-NN, and of distillation
                                # The recipes of models/recipes.py and larger patches are for segmentation.
                                "--arch", "--optimizer", "--backbone-lr", "--layer-decay", "--weight-decay", "--warmup",
                                "--crop", "--ema"}
    # predict.py writes probabilities beside its masks, eval.py into a folder of their own.
    assert differ(set(SCRIPTS) - set(training)) == {"--out", "--batch-size", "--probabilities"}
    # A trained model brings its own values, which eval and predict take by default.
    # eval.py writes the file that train_kd.py reads, and features; train_cls.py chooses among them.
    # predict.py's compiled weights are frozen.
    assert differ(SCRIPTS) == differ(training) | {
        "--weights", "--amp", "--difficulty", "--features", "--probabilities", "--compile"}


KNOWN_BY_FLAGS = [
    *[(script, f"--unfreeze {blocks}", "expected a number of blocks, or all")
      for script in ("train_seg", "train_points", "train_kd", "train_cls")
      for blocks in ("x", "-1", "1.5", "Âµ", "²", "٣", "1_0", "nan")],
    *[(script, f"--cache-features f {more}", "--cache-features needs a frozen backbone")
      for script in ("train_seg", "train_points") for more in ("", "--weights w --unfreeze 1")],
    ("train_seg", "--save head", "--save head needs a frozen backbone"),
    ("train_seg", "--save head --weights w --unfreeze all", "--save head needs a frozen backbone"),
    *[(script, "--weights w --arch nano8", "--arch goes with --weights none")
      for script in ("train_seg", "train_points", "train_kd")],
    ("train_seg", "--loss dice --class-weights sqrt", "--class-weights goes with ce or focal in --loss, not dice"),
    ("train_kd", "--alpha 0 --loss lovasz --label-smoothing 0.1",
     "--label-smoothing goes with ce in --loss, not lovasz"),
    ("train_seg", "--loss focal --label-smoothing 0.1", "--label-smoothing goes with ce in --loss, not focal"),
    ("train_seg", "--weights w --layer-decay 0.5", "--layer-decay is of a backbone that learns"),
    ("train_points", "--weights w --backbone-lr 0.1", "--backbone-lr is of a backbone that learns"),
    ("train_cls", "--mode cnn --k 3", "--k goes with --mode knn, not cnn"),
    ("train_cls", "--weights w --mode knn --lr 0.1", "--lr goes with --mode finetune or cnn, not knn"),
    ("train_cls", "--weights w --arch nano16", "--arch goes with --weights none"),
    ("train_points", "--grow 1", "--grow without --ema"),
    ("train_points", "--grow 1 --weights w", "--grow without --ema"),
    ("train_points", "--grow 1 --weights w --unfreeze 2 --ema 0", "--grow without --ema"),
    ("train_kd", "", "--teacher is missing"),
    ("train_kd", "--alpha 0 --within shares", "--within goes with --alpha above 0"),
    ("train_kd", "--alpha 0 --sampler weighted", "--sampler weighted without --difficulty"),
    ("train_kd", "--alpha 0 --restarts 4 2 --steps 3", "no cycle would end"),
    ("train_kd", "--alpha 0 --lookahead 4 --steps 8 --eval-every 6", "choose --steps and --eval-every so"),
    ("train_cls", "--save head", "--save head needs a frozen backbone"),
    ("train_cls", "--weights w --unfreeze 1", "--unfreeze goes with --mode finetune, not linear"),
    ("train_cls", "--weights w --features mean", "nothing to train or load in means")]


def words(flags):
    return flags.replace("--weights w", f"--weights {__file__}").split()  # any file that is there


@pytest.mark.parametrize("script, flags, said", KNOWN_BY_FLAGS)
def test_what_flags_alone_rule_out_is_refused_before_anything_is_read(script, flags, said, capsys):
    with pytest.raises((SystemExit, BadInput)) as e:
        importlib.import_module(script).parse_args(["--root", "nowhere", *words(flags)])
    assert said in f"{e.value} {capsys.readouterr().err}"


@pytest.mark.parametrize("flags", [
    "--grow 1 --weights w --unfreeze 2", "--grow 1 --ema 0.9", "--cache-features f --weights w"])
def test_what_the_recipe_of_the_flags_allows_is_taken(flags):
    importlib.import_module("train_points").parse_args(words(flags))


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_public_names_are_explained(file):
    """A docstring, or a comment on the def line; what fits in 7 lines, forward() and nested helpers may do without."""
    lines, tree = file.read_text().splitlines(), ast.parse(file.read_text())
    assert ast.get_docstring(tree)

    def explained(n):  # a class also by one of its methods, such as forward with its shapes
        parts = [f for f in n.body if isinstance(n, ast.ClassDef) and isinstance(f, ast.FunctionDef)]
        return ast.get_docstring(n) or "#" in lines[n.body[0].lineno - 2] or any(map(explained, parts))

    public = [n for c in (tree, *tree.body) if isinstance(c, (ast.Module, ast.ClassDef)) for n in c.body
              if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"]
    obvious = ("forward", "main", "parse_args", "error")
    assert not [n.name for n in public if n.end_lineno - n.lineno > 6 and n.name not in obvious and not explained(n)]


def test_no_line_is_longer_than_120():
    files = [*SCRIPTS, *MODULES, *(ROOT / "tests").glob("*.py")]
    assert not [f"{name_of(f)}:{i}" for f in files for i, s in enumerate(f.read_text().splitlines(), 1) if len(s) > 120]


def test_one_ignore_index_one_error_one_writer():
    homes = collections.defaultdict(set)
    for file in MODULES:
        for node in ast.parse(file.read_text()).body:
            names = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
            for name in [*names, getattr(node, "name", None)]:
                homes[name].add(name_of(file))
    for name in ("IGNORE", "BadInput", "write", "replace", "progress", "SUFFIXES", "load_splits"):
        assert len(homes[name]) == 1, f"{name} in {homes[name]}"
