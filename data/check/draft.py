"""Write a first dataset.json for a folder, by what lies in it."""
import json
import re
from pathlib import Path

from ..common import BadInput, as_text, even_sample, write
from ..datasets import (check_command, find_pairs, in_threads, load_splits, match_pairs,
                        split_names)
from ..public import SETS
from .complaints import Complaints, attempt
from .patterns import draft_patterns
from .proposal import folder_splits, listed_splits, no_train, propose_hold_out
from .reading import draft_reading
from .values import Values, count_values, draft_classes, scan, values_table

MAX_CLASS_LIST = 2**20  # bytes; annotations of a whole set are no class list
MMSEG = {"potsdam": 1, "vaihingen": 1, "loveda": 1, "isaid": 0}  # the id of the first class


def draft(root: Path, limit: int | None, masks: str | None, typed: dict) -> int:
    """Write dataset.json and show what it is based on -> exit code.

    `limit`: masks to read. `masks`: the folder of the masks, where there are several.
    `typed`: "bands" and "input_range", where the flags gave them.
    """
    complaints = Complaints()
    description = {"name": as_text(root.resolve().name), **draft_patterns(root, masks, complaints)}
    for key in "images", "masks":
        print(f"{key:6s} {description[key]}")
    pairs, _ = match_pairs(root, description)

    values = read_values(root, description, pairs, limit, complaints)
    print(*values_table(root, values), sep="\n")
    description |= draft_classes(values, complaints)
    splits = draft_splits(root, pairs, complaints)
    parts = attempt(lambda: load_splits(root, description | splits, pairs, need=()))
    train = [] if isinstance(parts, BadInput) else parts.get("train", [])
    reading, flags = draft_reading([image for image, _ in pairs.values()],
                                   [pairs[n] for n in train], typed, complaints)
    description |= reading
    description |= splits
    if "ann_dir" in str(description["masks"]):
        explain_mmseg(description["classes"], complaints)

    # What training would stop at is said now, beside everything else.
    unpaired = attempt(find_pairs, root, description)
    if isinstance(unpaired, BadInput):
        complaints.error("pairs", unpaired)
    compare_class_lists(root, description, complaints)

    # A name of a file that is not UTF-8 becomes an escape, as JSON has it.
    text = one_key_a_line(description).encode("utf-8", "backslashreplace")
    write(root / "dataset.json", text)
    print(f"wrote {root / 'dataset.json'}")
    again = " ".join([check_command(root), *flags])
    return complaints.show(len(pairs), again, good=f"Name the classes in it, then: {again}")


def read_values(root: Path, description: dict, pairs: dict, limit: int | None,
                complaints: Complaints) -> Values:
    """What the masks hold, all or an even sample of `limit`."""
    masks = even_sample([mask for _, mask in pairs.values() if mask], limit)
    if not masks:
        find_pairs(root, description)  # says why
    scans = in_threads(lambda mask: attempt(scan, mask), masks, "masks")
    return count_values(dict(zip(masks, scans)), complaints)


def draft_splits(root: Path, pairs: dict[str, tuple], complaints: Complaints) -> dict:
    """{"splits": by the lists or folders on disk}, and what to hold out where val is missing."""
    # Official lists count most, then folders such as train/. Lists may be those of another
    # version, with names that are not here.
    splits = listed_splits(root)
    chosen = attempt(split_names, root, {"splits": splits}, pairs)
    if isinstance(chosen, BadInput):
        complaints.warning("lists", f"not used for the splits: {chosen}")
        splits = {}
    if not splits:
        splits = folder_splits(list(pairs), complaints)
        chosen = split_names(root, {"splits": splits}, pairs)
    drafted = {"splits": splits}
    if "train" not in splits:
        complaints.error("train", no_train(splits))
    elif "val" not in splits:
        drafted |= propose_hold_out(chosen.get("train", []), complaints)
    return drafted


def explain_mmseg(classes: list[dict], complaints: Complaints) -> None:
    """The ids that mmsegmentation's converters write, of the sets that they and public.py know."""
    highest = max((c["id"] for c in classes if c.get("id", 255) != 255), default=None)
    text = ("img_dir and ann_dir are the layout of mmsegmentation: where its configuration has "
            'reduce_zero_label=True, id 0 is no class, and 255 never is: move them to "ignore"')
    for name, first in MMSEG.items():
        names = [c["name"] for c in SETS[name]["classes"]]
        if highest == first + len(names) - 1:
            listed = ", ".join(f"{i} {n}" for i, n in enumerate(names, first))
            text += f"; it converts {name} to {listed}"
    complaints.note("mmseg", text)


def compare_class_lists(root: Path, description: dict, complaints: Complaints) -> None:
    """Colours in other JSON files, such as the class list of an export, beside those found."""
    # Such lists are often of another version than the masks, so they are compared, not believed.
    colors = {c.get("color") for c in description["classes"]} | set(description["ignore"])
    for file in sorted(set(root.glob("[!.]*.json")) - {root / "dataset.json"}):
        if not file.is_file() or file.stat().st_size > MAX_CLASS_LIST:
            continue
        text = file.read_text("utf-8", errors="ignore")
        listed = {color.upper() for color in re.findall("#[0-9a-fA-F]{6}", text)}
        if listed:
            complaints.note("json", f"{file.name} lists {len(listed)} colours, "
                                    f"{len(listed & colors)} of them are in the masks; the draft "
                                    "goes by the masks alone")


def one_key_a_line(description: dict) -> str:
    """JSON to be edited by hand: one pattern, class or split a line, else one key a line."""
    lines = []
    for key, value in description.items():
        long = key in ("images", "masks", "classes", "splits") and not isinstance(value, str)
        text = one_a_line(value) if long else json.dumps(value, ensure_ascii=False)
        lines.append(f' "{key}": {text}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def one_a_line(value: list | dict) -> str:
    """JSON of a list or an object, one entry a line."""
    if isinstance(value, dict):
        entries = [f'"{k}": {json.dumps(v, ensure_ascii=False)}' for k, v in value.items()]
        opening, closing = "{", "}"
    else:
        entries = [json.dumps(v, ensure_ascii=False) for v in value]
        opening, closing = "[", "]"
    return f"{opening}\n  " + ",\n  ".join(entries) + f"\n {closing}"
