"""The house rules of the repository: who imports whom, what is repeated word for word, what a flag means everywhere."""
import argparse
import ast
import collections
import fnmatch
import importlib
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import data.io
import models.losses

ROOT = Path(__file__).parents[1]
LAYOUT = {"README.md", "requirements.txt", "LICENSE", ".gitignore", ".ci", "models", "data", "tests", "predict.py",
          "eval.py", "train_seg.py", "train_cls.py", "train_kd.py", "train_points.py"}
PACKAGES = set(sys.stdlib_module_names) | {"torch", "torchvision", "numpy", "PIL", "safetensors"}
MODULES = sorted(f for d in ("models", "data") for f in (ROOT / d).glob("*.py") if f.name != "__init__.py")
SCRIPTS = sorted(ROOT.glob("*.py"))
SHARED = {"models": {"weights"}, "data": {"io"}}  # what siblings may import
COMMAND = ROOT / "data" / "check.py"  # the one module with flags and prints ...
PARTS = {"datasets", "draft", "public"}  # ... and with more siblings


def name_of(file):
    return file.relative_to(ROOT).as_posix()


def imports(file):
    """(dots, module) of every import in a file, also inside functions; "from data import io" gives data.io."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module in (None, "data", "models"):
            package = f"{node.module}." if node.module else ""
            yield from ((node.level, package + alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module


def test_the_top_level_is_the_layout():
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()] + [".git"]
    there = {p.name for p in ROOT.iterdir() if not any(fnmatch.fnmatch(p.name, pattern) for pattern in ignored)}
    assert there <= LAYOUT and {"README.md", "LICENSE", "requirements.txt"} <= there


def test_repeated_blocks_are_the_same_text():
    seen = collections.defaultdict(dict)
    for f in SCRIPTS:
        for name, body in re.findall(r"# >>> same: (\w+)\n(.*?)# <<< same: \1\n", f.read_text(), re.S):
            seen[name][f.name] = textwrap.dedent(body).strip()
        fences = len(re.findall("# (>>>|<<<) same", f.read_text()))
        assert fences == 2 * sum(f.name in c for c in seen.values()), f"{f.name}: a fence without its other end"
    for name, copies in seen.items():
        assert len(copies) > 1 and len(set(copies.values())) == 1, f"'{name}' differs or stands alone: {sorted(copies)}"


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_a_module_copied_alone_imports(file, tmp_path, monkeypatch):
    package = tmp_path / f"alone_{file.parent.name}_{file.stem}"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in {file.stem} | SHARED[file.parent.name] | (PARTS if file == COMMAND else set()):
        shutil.copy(file.with_name(f"{name}.py"), package)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(f"{package.name}.{file.stem}")


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_modules_know_no_flags_ranks_scripts_or_siblings(file):
    siblings = SHARED[file.parent.name] | (PARTS if file == COMMAND else set())
    for dots, module in imports(file):
        top = module.split(".")[0]
        assert top in (siblings if dots else PACKAGES), f"imports {module}"
        assert file == COMMAND or top != "argparse" and "distributed" not in module, f"imports {module}"
    if file != COMMAND:
        code = ast.walk(ast.parse(file.read_text()))
        assert not [n.lineno for n in code if isinstance(n, ast.Name) and n.id == "print" or
                    isinstance(n, ast.Attribute) and n.attr == "distributed"]


@pytest.mark.parametrize("file", SCRIPTS, ids=name_of)
def test_copy_with_lists_what_a_script_imports(file):
    found = list(imports(file))
    assert not [m for dots, m in found if dots or m.split(".")[0] not in PACKAGES | {"models", "data"}]
    parts = {"/".join(m.split(".")[:2]) + ".py" for _, m in found if m.split(".")[0] in ("models", "data")}
    listed = re.search(r"^Copy with:(.*)\Z", ast.get_docstring(ast.parse(file.read_text())), re.M | re.S)[1].split()
    assert sorted(listed) == sorted(parts)


def test_importing_the_scripts_does_nothing_else(tmp_path):
    names = ", ".join(f.stem for f in SCRIPTS)
    code = f"import signal, sys, threading; sys.path.insert(0, {str(ROOT)!r}); " \
           f"was = signal.getsignal(signal.SIGINT); import {names}; assert threading.active_count() == 1; " \
           "assert signal.getsignal(signal.SIGINT) is was"  # not always Python's own: background jobs ignore it
    done = subprocess.run([sys.executable, "-Bc", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


def flags(file, monkeypatch):
    """{flag: (default, help)} of a script's parser, caught where it would parse."""
    caught = []
    with monkeypatch.context() as m:
        m.setattr(argparse.ArgumentParser, "parse_args", lambda self, argv=None: caught.append(self) or sys.exit())
        with pytest.raises(SystemExit):
            importlib.import_module(file.stem).parse_args([])
    return {a.option_strings[0]: (a.default, a.help) for a in caught[0]._actions if a.option_strings}


def test_a_flag_means_the_same_in_all_scripts(monkeypatch):
    def differ(scripts):
        seen = collections.defaultdict(set)
        for f in scripts:
            for flag, meaning in flags(f, monkeypatch).items():
                seen[flag].add(repr(meaning))
        return {flag for flag, meanings in seen.items() if len(meanings) > 1}

    training = [f for f in SCRIPTS if f.name.startswith("train")]
    # a classification run has its own kind of folder, batch, split and fine-tuning; on points: ce alone
    assert differ(training) == {"--root", "--out", "--batch-size", "--group-regex", "--unfreeze", "--loss", "--lr",
                                "--eval-every", "--temperature"}  # of k-NN, and of distillation
    assert differ(set(SCRIPTS) - set(training)) == {"--out"}
    # a trained model brings its own values, which eval and predict take by default
    assert differ(SCRIPTS) == differ(training) | {"--overlap", "--weights", "--amp"}


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
    obvious = ("forward", "main", "parse_args")
    assert not [n.name for n in public if n.end_lineno - n.lineno > 6 and n.name not in obvious and not explained(n)]


def test_no_line_is_longer_than_120():
    files = [*SCRIPTS, *MODULES, *(ROOT / "tests").glob("*.py")]
    assert not [f"{name_of(f)}:{i}" for f in files for i, s in enumerate(f.read_text().splitlines(), 1) if len(s) > 120]


def test_one_ignore_index():
    assert data.io.IGNORE == models.losses.IGNORE == 255
