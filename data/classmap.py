"""A map from one class list to another, by name, for a student with other classes than its teacher.

    shares = read_map("map.json", teacher_names, student_names)    (teacher, student)

    {"map": {"forest": "forest", "water": "background", "snow": null,
             "rangeland": {"grassland": 0.7, "semi-natural": 0.3}}}

Each teacher class goes to one student class, in shares of sum 1 to several, or nowhere (null: what
the teacher calls so teaches nothing). "teacher" and "student" may list the classes in the order of
the outputs; then both lists are compared with those that the two models bring along.
"""
from pathlib import Path

import numpy as np

from .common import BadInput, nfc, read_json

# Shares in the text of table(): it leaves out those below SHOWN and takes one above WHOLE for 1.
SHOWN = 0.05
WHOLE = 0.995


def read_map(path: str | Path, teacher: list[str], student: list[str]) -> np.ndarray:
    """JSON file and both models' class names -> (teacher, student) float64 shares.

    The names stand in the order of the models' outputs.
    """
    found = read_json(path, dict, '{"map": {...}}')
    if not isinstance(found.get("map"), dict):
        raise BadInput(f'{path}: no "map" in it; data/classmap.py begins with an example')
    # Names in another order would send every class to a wrong one.
    for side, names in (("teacher", teacher), ("student", student)):
        listed = found.get(side, names)
        if listed != names:
            raise BadInput(f'{path}: "{side}" lists {listed}, the {side} has {names}; '
                           "the order of its outputs counts")
    return matrix(found["map"], teacher, student, path)


def matrix(rows: dict, teacher: list[str], student: list[str],
           where: str | Path = "class map") -> np.ndarray:
    """{teacher name: student name, {student name: share} or None} -> (teacher, student) shares.

    Rows sum to 1, or are all 0. `where` begins the errors.
    """
    rows = {nfc(name): goes_to for name, goes_to in rows.items()}
    teacher = [nfc(name) for name in teacher]
    student = [nfc(name) for name in student]
    # Every teacher class must be named: one that was forgotten would teach nothing, silently.
    strange = [name for name in rows if name not in teacher]
    absent = [name for name in teacher if name not in rows]
    if strange:
        raise BadInput(f"{where}: the teacher has no class {strange[0]!r}; "
                       f"it has {', '.join(teacher)}")
    if absent:
        raise BadInput(f"{where}: nothing for the teacher's {', '.join(map(repr, absent))}; "
                       f"name student classes ({', '.join(student)}), or null to leave it out")
    out = np.zeros((len(teacher), len(student)))
    # Rows are teacher classes, columns student classes, both in the order of the outputs.
    for name, goes_to in rows.items():
        shares = as_shares(goes_to)
        if shares is None:
            raise BadInput(f"{where}: {name!r} goes to {goes_to!r}; "
                           "expected a name, {name: share} or null")
        for to, share in shares.items():
            if nfc(to) not in student:
                raise BadInput(f"{where}: {name!r} goes to {to!r}, which the student does not "
                               f"have; it has {', '.join(student)}")
            out[teacher.index(name), student.index(nfc(to))] = share
        # Shares typed as 0.33, 0.33, 0.34 sum to 1 but for rounding.
        total = sum(shares.values())
        if shares and abs(total - 1) > 1e-6:
            raise BadInput(f"{where}: the shares of {name!r} sum to {total:g}, not 1")
    return out


def as_shares(goes_to) -> dict[str, float] | None:
    """A name, {name: share} or None (nowhere) as {name: share}; None for anything else."""
    # Nowhere is a row of zeros.
    if goes_to is None:
        return {}
    if isinstance(goes_to, str):
        return {goes_to: 1.0}
    if not isinstance(goes_to, dict):
        return None
    for share in goes_to.values():
        # Not isinstance: True is an int, too.
        if type(share) not in (int, float) or not share >= 0:
            return None
    return goes_to


def same_names(teacher: list[str], student: list[str]) -> np.ndarray:
    """The map of equal class names; one that only the teacher has is a BadInput."""
    there = {nfc(name) for name in student}
    rows = {name: name for name in teacher if nfc(name) in there}
    return matrix(rows, teacher, student, "equal class names (no --map FILE)")


def measured(counts: np.ndarray, least: float = 0.0) -> np.ndarray:
    """Pixels (teacher's class, true student class) -> shares.

    A class that the teacher never says goes nowhere. Shares below `least` are left out as stray
    pixels, unless most of the student class lies there.
    """
    # Stray pixels are a small part of what the teacher calls so. They stay where most of a student
    # class lies: so a rare class keeps its place.
    counts = np.asarray(counts, np.float64)
    few = counts < least * counts.sum(1, keepdims=True)
    stray = few & (counts < counts.max(0))
    counts = np.where(stray, 0, counts)
    # At least 1: a row without pixels stays 0.
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def table(teacher: list[str], student: list[str], **maps: np.ndarray) -> str:
    """One line per teacher class, one column per map, then the student classes without any."""
    # First a grid of texts, then every column padded to its widest one.
    cells = [["teacher", *(f"-> student ({name})" for name in maps)]]
    for i, name in enumerate(teacher):
        cells.append([name, *(describe(m[i], student) for m in maps.values())])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        padded = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(padded).rstrip())
    # Student classes that no teacher class goes to.
    for name, m in maps.items():
        totals = zip(student, m.sum(0))
        silent = [other for other, total in totals if total == 0]
        if silent:
            lines.append(f"({name}) the teacher is silent about: {', '.join(silent)}")
    return "\n".join(lines)


def describe(row: np.ndarray, student: list[str]) -> str:
    """Shares (student,) -> "0.70 grassland + 0.30 semi-natural", the largest first."""
    parts = []
    for j in np.argsort(-row, kind="stable"):
        if row[j] > WHOLE:
            parts.append(student[j])
        elif row[j] >= SHOWN:
            parts.append(f"{row[j]:.2f} {student[j]}")
    return " + ".join(parts) or "-"


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
