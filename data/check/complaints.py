"""What is wrong with a data set: collected while it is read, shown at once.

    complaints.error("split", "split 'val' is empty; ...")    a level, a kind of fault, a line
    exit_code = complaints.show(images, again, good)
"""
from collections import Counter, defaultdict
from collections.abc import Callable

from ..common import BadInput, escaped, plural

LEVELS = ("note", "warning", "error")  # the worst stand next to the prompt
SHOWN = 20  # lines of one kind: one fault must not hide the others


class Complaints:
    """Lines by level and kind."""

    def __init__(self):
        self.lines = defaultdict(list)  # {(level, kind): lines}

    def note(self, kind: str, line: str) -> None:
        self.lines["note", kind].append(line)

    def warning(self, kind: str, line: str) -> None:
        self.lines["warning", kind].append(line)

    def error(self, kind: str, line: str) -> None:
        self.lines["error", kind].append(line)

    def has_error(self, *kinds: str) -> bool:
        """Was there an error of one of these kinds?"""
        return any(self.lines.get(("error", kind)) for kind in kinds)

    def show(self, images: int, again: str, good: str) -> int:
        """Print all and what to type next: `again` after errors, else `good` -> exit code."""
        count = Counter()
        by_level = sorted(self.lines.items(), key=lambda item: LEVELS.index(item[0][0]))
        for (level, _), lines in by_level:
            count[level] += len(lines)
            for line in lines[:SHOWN]:
                print(f"{level}: {escaped(str(line))}")
            if len(lines) > SHOWN:
                print(f"{level}: ... and {len(lines) - SHOWN} more like these")
        errors = f", {plural(count['error'], 'error')} among them" if count["error"] else ""
        found = plural(count["warning"] + count["error"], "complaint")
        print(f"{plural(images, 'image')}, {found}{errors}")
        if errors:
            print(f"Correct the errors, then type: {again}")
            return 2
        print(good)
        return 0


def attempt(work: Callable, *args):
    """The result, or the BadInput instead of raising it: one bad file must not hide the next."""
    try:
        return work(*args)
    except BadInput as e:
        return e
