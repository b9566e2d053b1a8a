"""The table of what several runs have reported.

    print(summary(["runs/a-0", "runs/a-1", "runs/b"]))     Markdown, a row per experiment

Runs that differ in nothing but seed and place are one experiment: its row has mean +/- standard
deviation. Rows of other data, splits or classes cannot be compared: that is said below the table.
"""
import json
from pathlib import Path
from shlex import quote

import numpy as np

from .common import BadInput, read_json

# Flags by which runs may differ and still be one experiment.
PLACE = "seed", "out", "resume", "workers", "cache", "root", "device"
HEAD = ("run", "data", "split", "classes", "seeds", "mIoU", "mean F1", "OA", "majority mIoU",
        "also reported")


def read_run(folder: Path) -> tuple[str, str, dict, dict]:
    """-> what tells the experiment from others, what it was scored on, results.json, protocol.json."""
    result = read_json(folder / "results.json")
    protocol = read_json(folder / "protocol.json")
    if "accuracy" in result:  # of train_cls.py: the same words for the same numbers
        result |= dict(oa=result["accuracy"], mf1=result["macro_f1"], iou=result["table"])
        protocol |= dict(report={}, variant=None)
    scored = {
        "data": protocol["dataset"],
        "variant": protocol["variant"],
        "split": result["split"],
        "images of the split": protocol.get("splits", {}).get(result["split"]),
        "classes": sorted(result["iou"]),
        "ignored values": protocol.get("ignore"),
    }
    same = {flag: value for flag, value in protocol["flags"].items() if flag not in PLACE}
    same |= {key: protocol[key] for key in ("dataset", "variant", "world", "amp", "report")}
    same |= dict(classes=sorted(result["iou"]), split=result["split"], scored=scored)
    return json.dumps(same, sort_keys=True), scored, result, protocol


def is_copy(result: dict, other: dict) -> bool:
    """The same run twice, or a run and one that repeats it."""
    return all(result.get(key) == other.get(key) for key in ("seed", "iou", "confusion"))


def mean_and_sd(results: list[dict], key: str) -> str:
    """"0.3000 +/- 0.1414"; nothing where a run has no such number."""
    values = [r.get(key) for r in results]
    if not all(isinstance(v, (int, float)) for v in values):
        return ""
    spread = f" +/- {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def summary(folders: list[str]) -> str:
    """Markdown table of finished runs, and a line for each run or row that is unlike the others."""
    groups, left_out = {}, []
    for folder in map(Path, folders):
        if not folder.exists():
            raise BadInput(f"{folder}: no such folder; name runs, such as runs/*")
        if not (folder / "protocol.json").exists():  # such as runs/data
            continue
        if not (folder / "results.json").exists():
            left_out.append(f"{folder}: not finished; go on with --resume {quote(str(folder))}")
            continue
        try:
            same, scored, result, protocol = read_run(folder)
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            why = e if isinstance(e, BadInput) else repr(e)
            left_out.append(f"{folder}: its results cannot be read ({why})")
        else:
            group = groups.setdefault(same, [])
            # Two runs of one seed are no two seeds.
            twins = [name for name, _, other, _ in group if is_copy(result, other)]
            if twins:
                left_out.append(f"{folder}: the results of {twins[0]} once more, not counted")
            else:
                group.append((folder.name, scored, result, protocol))
    if not groups:
        raise BadInput("; ".join([f"{folders[0]}: no results.json in these folders that can be read; "
                                  "name finished runs, such as runs/*", *left_out]))
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for group in groups.values():
        names, _, results, protocols = zip(*group)
        lines.append(row_of(names, results, protocols[0]))
    firsts = [group[0] for group in groups.values()]
    return "\n".join([*lines, *not_comparable(firsts), *left_out])


def row_of(names: list[str], results: list[dict], protocol: dict) -> str:
    """The row of one experiment."""
    first = results[0]
    further = []
    for key in protocol["report"]:
        title = key.replace("_", " ")
        further.append(f"{title}: mIoU {mean_and_sd(results, f'miou_{key}')}")
    scores = [mean_and_sd(results, key) for key in ("miou", "mf1", "oa", "majority_miou")]
    cells = [", ".join(names), protocol["dataset"], first["split"],
             f"{first.get('classes_in_mean')} of {len(first['iou'])}",
             ", ".join(str(r.get("seed")) for r in results), *scores, ", ".join(further)]
    return "| " + " | ".join(cells) + " |"


def not_comparable(firsts: list[tuple]) -> list[str]:
    """A line for each row that is scored on something else than the first one."""
    lines = []
    name, scored, *_ = firsts[0]
    for other_name, other, *_ in firsts[1:]:
        differing = [key for key in scored if scored[key] != other[key]]
        if differing:
            lines.append(f"not comparable: {name} and {other_name} differ in "
                         f"{', '.join(differing)}")
    return lines
