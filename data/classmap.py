"""A map from one class list to another, by name: {"teacher class": "student class", {"a": 0.7, "b": 0.3} or null}.

    {"map": {"forest": "forest", "water": "background", "rangeland": {"grassland": 0.7, "semi-natural": 0.3},
             "snow": null}}

Each teacher class goes to one student class, in shares of sum 1 to several, or nowhere (null: what the teacher calls so
teaches nothing). "teacher" and "student" may list the classes in the order of the outputs; then both lists are compared
with those that the two models bring along.
"""
import json
from pathlib import Path

import numpy as np

from .common import BadInput


def read_map(path: str | Path, teacher: list[str], student: list[str]) -> np.ndarray:
    """JSON file and both models' class names, in the order of their outputs -> (teacher, student) float64 shares."""
    try:
        d = json.loads(Path(path).read_text(), object_pairs_hook=unique)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; data/classmap.py begins with an example") from None
    except ValueError as e:
        raise BadInput(f"{path}: not valid JSON ({e})") from None
    if not isinstance(d, dict) or not isinstance(d.get("map"), dict):
        raise BadInput(f'{path}: no "map" in it; data/classmap.py begins with an example')
    for side, names in (("teacher", teacher), ("student", student)):
        if d.get(side, names) != names:
            raise BadInput(f'{path}: "{side}" lists {d[side]}, the {side} has {names}; the order of its outputs counts')
    return matrix(d["map"], teacher, student, path)


def unique(pairs):  # JSON keeps the last of two equal keys and says nothing
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a name stands twice in {[k for k, _ in pairs]}")
    return dict(pairs)


def matrix(rows: dict, teacher: list[str], student: list[str], where: str | Path = "class map") -> np.ndarray:
    """{teacher name: student name, {student name: share} or None} -> (teacher, student); rows of sum 1, or all 0."""
    strange, absent = [n for n in rows if n not in teacher], [n for n in teacher if n not in rows]
    if strange:
        raise BadInput(f"{where}: the teacher has no class {strange[0]!r}; it has {', '.join(teacher)}")
    if absent:
        raise BadInput(f"{where}: nothing for the teacher's {', '.join(map(repr, absent))}; name student classes "
                       f"({', '.join(student)}), or null to leave it out")
    m = np.zeros((len(teacher), len(student)))
    for name, shares in rows.items():
        shares = {} if shares is None else {shares: 1.0} if isinstance(shares, str) else shares
        if not isinstance(shares, dict) or not all(type(v) in (int, float) and v >= 0 for v in shares.values()):
            raise BadInput(f"{where}: {name!r} goes to {shares!r}; expected a name, {{name: share}} or null")
        for to, share in shares.items():
            if to not in student:
                raise BadInput(f"{where}: {name!r} goes to {to!r}, which the student does not have; it has "
                               f"{', '.join(student)}")
            m[teacher.index(name), student.index(to)] = share
        if shares and abs(sum(shares.values()) - 1) > 1e-6:
            raise BadInput(f"{where}: the shares of {name!r} sum to {sum(shares.values()):g}, not 1")
    return m


def same_names(teacher: list[str], student: list[str]) -> np.ndarray:
    """The map of equal class names; one that only the teacher has is a BadInput."""
    return matrix({n: n for n in teacher if n in student}, teacher, student, "equal class names (no --map FILE)")


def measured(counts: np.ndarray, least: float = 0.0) -> np.ndarray:
    """Pixels (teacher's class, true student class) -> shares; a class that the teacher never says goes nowhere.

    Shares below `least` are left out as stray pixels, unless most of the student class lies there.
    """
    counts = np.asarray(counts, np.float64)
    stray = (counts < least * counts.sum(1, keepdims=True)) & (counts < counts.max(0))
    counts = np.where(stray, 0, counts)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def table(teacher: list[str], student: list[str], **maps: np.ndarray) -> str:
    """One line per teacher class, one column per map, shares below 5 % left out; then student classes without any."""
    def shares(row):
        big = [j for j in np.argsort(-row, kind="stable") if row[j] >= 0.05]
        return " + ".join(student[j] if row[j] > 0.995 else f"{row[j]:.2f} {student[j]}" for j in big) or "-"

    cells = [["teacher", *(f"-> student ({name})" for name in maps)]]
    cells += [[t, *(shares(m[i]) for m in maps.values())] for i, t in enumerate(teacher)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells]
    for name, m in maps.items():
        without = [s for s, total in zip(student, m.sum(0)) if total == 0]
        lines += [f"({name}) the teacher is silent about: {', '.join(without)}"] if without else []
    return "\n".join(lines)


def rows(teacher: list[str], student: list[str], shares: np.ndarray) -> dict:
    """matrix() back: {teacher name: {student name: share} or None}, as map.json holds it."""
    out = {}
    for name, row in zip(teacher, shares.tolist()):
        out[name] = {to: share for to, share in zip(student, row) if share} or None
    return out


def contradicted(teacher: list[str], given: np.ndarray, measured: np.ndarray) -> list[str]:
    """Teacher classes that a map sends where the measured one says they mostly are not."""
    names = []
    for name, a, b in zip(teacher, given, measured):
        if a.any() and b.any() and a[b.argmax()] == 0:
            names.append(name)
    return names
