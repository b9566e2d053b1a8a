"""What every other file stands on: the ignore index, the error that a user can mend, the atomic writer, progress.

    raise BadInput(f"{path}: found this, expected that; type so and so")      one line, printed without a traceback
    write("runs/a/split.json", {"train": names})                              whole or not at all
    out = Written("predictions", overwrite=False)                             replaces only files that it wrote
    splits = read_json(path, dict[str, list[str]], "{split: [names]}")        or one line that says what is wrong
    for x, y, name in progress(loader, "validation"): ...                     count and ETA once it takes long

Nothing that a file or a flag claims is trusted: check_file() before one is opened, check_pixels()
before an image is unpacked, parse_json() and number() for what is written in them, in_time() for
patterns of the user, escaped() and print_anything() for names that go to a terminal.
"""
import codecs
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import reprlib
import signal
import stat
import sys
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import get_args, get_origin

import numpy as np
from PIL import Image

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

IGNORE = 255  # the one ignore index: unlabelled, void, padding
SILENT = 10.0  # seconds before a program says how far it is, and between such lines
SHORT = reprlib.Repr()  # of user's values in messages, which may be of any length and depth
SHORT.maxstring = SHORT.maxother = 200
MAX_TEXT = 2**30  # bytes; an image or a weight file given for a list would fill the memory
MAX_PIXELS = 10**9  # of an image that is read as a whole; --max-pixels of the scripts
PIXELS_VARIABLE = "NANORS_MAX_PIXELS"  # Reading processes inherit it from the script.
LARGEST_NUMBER = 2**64  # in JSON: of larger whole numbers float64 and int64 hold none exactly
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)

# What a terminal obeys instead of showing it, and what turns the direction of writing.
CODES = [*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
ESCAPES = {code: repr(chr(code))[1:-1] for code in CODES}


class BadInput(ValueError):
    """A user's file or flag that cannot be used: one line with what was found, what was expected and what to type."""


class NotWritten(OSError):
    """A file that cannot be written: one line that names it, and what to do."""


def temporary_of(name: str) -> str | None:
    """The file that replace() was writing under this name when it was killed; None of other names."""
    stem, _, number = name.removesuffix(".tmp").rpartition(".")
    return stem if name.endswith(".tmp") and number.isdecimal() else None


def replace(path: str | Path, save: Callable[[str], None]) -> None:
    """save(temporary name), then rename: a killed job or a full disk leaves the old file. Failures are NotWritten."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(temporary).touch()
        mode = os.stat(temporary).st_mode
        save(temporary)
        os.chmod(temporary, mode)  # As the umask says: safetensors would let nobody else read its files.
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        # torch.save reports a full disk as a RuntimeError.
        if isinstance(e, NotWritten) or not isinstance(e, (OSError, RuntimeError)):
            raise
        why = getattr(e, "strerror", None) or str(e)[:100]
        if "PytorchStreamWriter" in why or "inline_container" in why:
            why = "torch could not finish it"
        raise NotWritten(f"{path}: cannot be written ({why}); is the disk full or read-only?") from None


def write(path: str | Path, content: Image.Image | dict | list | str | bytes, **options) -> None:
    """Picture (`options` are Pillow's), JSON, text or bytes into a file, whole or not at all."""
    content = file_bytes(path, content, **options)
    replace(path, lambda name: Path(name).write_bytes(content))


def file_bytes(path: str | Path, content: Image.Image | dict | list | str | bytes, **options) -> bytes:
    """What write() puts into a file of this name: its suffix says the format of a picture."""
    if isinstance(content, Image.Image):
        buffer = io.BytesIO()
        kinds = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}
        content.save(buffer, format=kinds.get(Path(path).suffix.lower(), "PNG"), **options)
        return buffer.getvalue()
    if not isinstance(content, (str, bytes)):
        content = json_text(content, indent=1) + "\n"
    if isinstance(content, str):
        content = as_bytes(content)
    return content


def try_lock(file: io.IOBase, byte: int | None = None) -> bool | None:
    """Locks an open file, or one byte of it, for this process -> has it? None: no locks here.

    The lock ends with the process, killed or not, or when it closes any handle of the file.
    """
    if fcntl is None:
        return None
    length, start = (0, 0) if byte is None else (1, byte)  # a length of 0: up to the end
    try:
        # lockf, not flock: a DataLoader worker, which is a fork, would hold that one too.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a network disk
        return None
    return True


class Written:
    """The files that a program writes into a folder: of those there, only its own are replaced.

    A hidden list beside them holds the sha256 of all that was written. A file that is not in it, or
    was changed since, is a BadInput unless `overwrite`. Processes may share a folder.
    """

    def __init__(self, folder: str | Path, overwrite: bool = False):
        self.folder = Path(folder)
        self.overwrite = overwrite
        self.list = self.folder / ".written.jsonl"
        self.checked = set()
        self.digests = {}  # {name: sha256} of what was written here
        self.left = {}  # {file: what a killed process was writing of it}

    def check(self, names: Iterable[str]) -> None:
        """BadInput where some of these files may not be replaced: before any long work."""
        if self.folder.exists() and not self.folder.is_dir():
            raise BadInput(f"{self.folder}: a file, where a folder for results is expected; name "
                           "another --out")
        names = list(names)
        for folder in {(self.folder / name).parent for name in names}:
            for file in folder.glob("*.tmp"):
                target = temporary_of(file.name)
                if target:
                    self.left.setdefault(folder / target, []).append(file)
        there = {}  # {name: sha256, or None of what is no file}
        for name in names:
            file = self.folder / name
            if file.is_dir():
                raise BadInput(f"{file}: a folder, where a file will be written; name another --out")
            if not self.overwrite and os.path.lexists(file):
                there[name] = file_sha256(file) if file.is_file() else None
        # Read last: another process may have written while the files were hashed.
        own = self.read_list()
        foreign = [self.folder / name for name, digest in there.items() if (name, digest) not in own]
        if foreign:
            raise BadInput(f"{first_few(foreign)}: would be overwritten, though not written by this "
                           "program, or changed since; type --overwrite to replace what is there, "
                           "or name another --out")
        self.checked.update(names)

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[None]:
        """While the block runs no other process has this name here; BadInput where one has it.

        Of a file, or of all that is written of one image. One claim at a time.
        """
        place = self.folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place.parent / ".writing", "a") as locks:
            # One byte stands for each name, so that others may write other files there.
            digest = hashlib.sha256(as_bytes(place.name)).hexdigest()
            if try_lock(locks, int(digest[:15], 16)) is False:
                raise BadInput(f"{place}: another process is writing there; wait for it, or name "
                               "another --out")
            yield

    def write(self, name: str, content: Image.Image | dict | list | str | bytes, **options) -> None:
        """write(folder / name, ...) of a file that may be replaced."""
        content = file_bytes(name, content, **options)
        self.replace(name, lambda temporary: Path(temporary).write_bytes(content))

    def replace(self, name: str, save: Callable[[str], None]) -> None:
        """replace(folder / name, save) of a file that may be replaced."""
        if name not in self.checked:
            self.check([name])

        def save_and_list(temporary):
            save(temporary)
            # Listed before the new name: if the process is killed here, the old file still counts
            # by its older line.
            self.digests[name] = file_sha256(temporary)
            add_row(self.list, dict(file=name, sha256=self.digests[name]))

        replace(self.folder / name, save_and_list)
        for left in self.left.pop(self.folder / name, ()):
            left.unlink(missing_ok=True)

    def read_list(self) -> set[tuple[str, str]]:
        """(name, sha256) of every file ever written."""
        rows = read_rows(self.list, file=str, sha256=str)
        return {(row["file"], row["sha256"]) for row in rows}


def add_row(path: Path, row: dict) -> None:
    """One more row in a list that processes share."""
    # One short write to the end, so that they do not mix lines. A line begins with its line break:
    # one that a full disk or the end of a process cut off spoils no other.
    with open(path, "ab", buffering=0) as f:
        f.write(b"\n" + json.dumps(row).encode())


def read_rows(path: Path, start: int = 0, **fields: type) -> list[dict]:
    """What add_row() has written from byte `start` on; rows that lack one of `fields` are passed over."""
    if not path.exists():
        return []
    with open(path, "rb") as f:
        f.seek(start)
        lines = f.read().splitlines()
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if fits(row, dict) and all(fits(row.get(key), kind) for key, kind in fields.items()):
                rows.append(row)
    return rows


def file_sha256(*paths: str | Path) -> str:
    """Of a file of any size, or of several one behind the other, as hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while block := f.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def as_text(name: str) -> str:
    """A name of a file as UTF-8 text, with a ? for each byte that is none."""
    return name.encode("utf-8", "replace").decode()


def as_bytes(text: str) -> bytes:
    """UTF-8; names of files that are not UTF-8 become their own bytes again."""
    return text.encode("utf-8", "surrogateescape")


def check_file(path: str | Path) -> None:
    """BadInput unless a regular file is there: to open a FIFO is to wait, /dev/zero has no end."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, ValueError) as e:  # ValueError: of a name that no file can have
        raise BadInput(f"{str(path)!r}: cannot be read ({getattr(e, 'strerror', e)})") from None
    if stat.S_ISDIR(mode):
        raise BadInput(f"{path}: cannot be read (Is a directory); name a file")
    if not stat.S_ISREG(mode):
        raise BadInput(f"{path}: a pipe, a socket or a device; expected a regular file, so copy "
                       "what it gives into one")


def check_pixels(path: str | Path, height: int, width: int) -> None:
    """BadInput where an image by its header has more pixels than --max-pixels allows."""
    most = int(os.environ.get(PIXELS_VARIABLE, MAX_PIXELS))
    if height * width > most:
        raise BadInput(f"{path}: {height} x {width} pixels (H x W) by its header, over the limit "
                       f"of {most}; where that is right and fits into memory, type --max-pixels "
                       f"{height * width}, else cut the image up")


def read_text(path: str | Path, errors: str = "strict") -> str:
    """A text file of the user: UTF-8, or UTF-16 with a byte order mark, as PowerShell writes.

    errors="surrogateescape" keeps bytes that are not UTF-8 as Python has them in names of files.
    """
    path = Path(path)
    check_file(path)
    size = path.stat().st_size
    if size > MAX_TEXT:
        raise BadInput(f"{path}: {size / 2**30:.1f} GiB; expected a text file")
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as e:  # ValueError: of a name that no file can have
        raise BadInput(f"{path}: cannot be read ({getattr(e, 'strerror', e)})") from None
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if marked else "utf-8-sig", errors)
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not UTF-8 text; save it as UTF-8") from None


def read_json(path: str | Path, shape: type = dict, expected: str = "{...}"):
    """What a JSON file of the user holds, of `shape`, such as dict[str, list[str]]; else BadInput.

    `expected` is the shape in words. NaN and a name that stands twice in an object are no JSON.
    """
    text = read_text(path)
    try:
        found = parse_json(text)
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{path}: not valid JSON ({e}); expected {expected}") from None
    if not fits(found, shape):
        raise BadInput(f"{path}: holds {SHORT.repr(found)}; expected JSON {expected}")
    return found


def parse_json(text: str):
    """The value of a JSON text; a ValueError or RecursionError where it is none."""
    found = json.loads(text, object_pairs_hook=unique, parse_constant=no_number,
                       parse_int=whole_in_json, parse_float=float_in_json)
    # What cannot be written again would end a run later: half a character, a thousand brackets.
    as_bytes(json.dumps(found, ensure_ascii=False))
    return found


def whole_in_json(text: str) -> int:
    """A whole number that others can count with."""
    value = int(text)
    if abs(value) > LARGEST_NUMBER:
        raise ValueError(f"{text[:20]}... is too large a number")
    return value


def float_in_json(text: str) -> float:
    """A finite number: 1e400 would become infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def unique(pairs: list[tuple]) -> dict:
    """A JSON object whose names are all different: json keeps the last of two and says nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name!r} stands twice in an object")
    return found


def no_number(text: str):
    """NaN and Infinity, which json reads and JSON does not have."""
    raise ValueError(f"{text} is no number")


def fits(value, shape: type) -> bool:
    """Is a JSON value of a shape such as int, dict, list[str] or dict[str, list[str]]?"""
    kind = get_origin(shape) or shape
    if type(value) is not kind:  # not isinstance: True is an int, too
        return False
    if kind is shape:
        return True
    parts = value.values() if kind is dict else value
    return all(fits(part, get_args(shape)[-1]) for part in parts)


def follows(value, is_right: Callable) -> bool:
    """Does a value of unknown type pass a rule that is written for one type?"""
    try:
        return bool(is_right(value))
    except TypeError:  # a number where a list should be, or the like
        return False


def first_few(items: list, n: int = 3) -> str:
    """[1, 2, 3, 4, 5] -> '1, 2, 3 and 2 more'"""
    text = ", ".join(map(str, items[:n]))
    return f"{text} and {len(items) - n} more" if len(items) > n else text


def nfc(text: str) -> str:
    """A name as text with composed accents: macOS writes e and an accent, others one letter for both.

    Without a UTF-8 locale Python has the bytes of a name for its letters.
    """
    return unicodedata.normalize("NFC", as_bytes(text).decode("utf-8", "surrogateescape"))


def json_text(value, indent: int | None = None) -> str:
    """A value as JSON text, with null for NaN and infinity, which JSON does not have."""
    return json.dumps(without_nan(value), indent=indent, allow_nan=False)


def without_nan(value):
    """The value with None for every NaN and infinity in its lists and dicts."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def csv_text(rows: Iterable[Iterable]) -> str:
    """The rows as text, cells with commas between them."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def json_lines(rows: list[dict]) -> str:
    """The rows as text, one JSON object a line."""
    return "".join(json_text(row) + "\n" for row in rows)


# ---- what a user types, and what a terminal shows

def plural(n: int, word: str) -> str:
    """1 image, 2 images."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def number(text: str, kind: type = float) -> int | float:
    """A finite number as people write it, else ValueError.

    int() and float() also take "nan", "1e400", "1_0" and the digits of all scripts.
    """
    text = text.strip(" ")
    if len(text) > 100 or not NUMBER.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is no number")
    value = kind(text)
    if not abs(value) < math.inf:
        raise ValueError(f"{text[:40]!r} is too large a number")
    return value


def check_words(words: list[str], flags: dict) -> None:
    """BadInput for a word of a command line that no file and none of its `flags` can be."""
    for word in words:
        flag, _, value = word.partition("=")
        if "\0" in word:
            raise BadInput(f"{word}: no file or flag has a NUL character in it; type it without")
        if flag in flags and value == "--":  # argparse would take an empty list for the value
            raise BadInput(f"{word}: expected a value behind the =; a file of that name is ./--")


def escaped(text: str) -> str:
    """The text in one line, with escapes for what a terminal would obey in names of files."""
    return text.translate(ESCAPES)


class Shown:
    """A text stream that writes escaped lines; all else is the stream's own."""
    KEPT = {code: escape for code, escape in ESCAPES.items() if chr(code) not in "\n\t"}

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        # print() writes its end by itself: a line that changes on a terminal ends with "\r".
        return self.stream.write(text if text == "\r" else text.translate(self.KEPT))


def print_anything() -> None:
    """Call it first in a program: what a terminal lacks, or would obey, is shown as \\u6c34."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        if stream is not None and not isinstance(stream, Shown):
            setattr(sys, name, Shown(stream))


@contextlib.contextmanager
def in_time(seconds: float, message: str) -> Iterator[None]:
    """BadInput(message) where the block takes longer: a regex may try 2^n ways to match.

    Only in the main thread, and where the system has such a clock (not on Windows).
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not hasattr(signal, "setitimer"):
        yield
        return

    def end(signum, frame):
        raise BadInput(message)

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def minutes(seconds: float) -> str:
    """75.2 -> '1:15', as ETAs are shown."""
    seconds = round(seconds)
    return f"{seconds // 60}:{seconds % 60:02d}"


def progress(items: Iterable, what: str, total: int | None = None) -> Iterator:
    """The items; once they take more than ten seconds, rank 0 shows how many are done and the ETA on stderr."""
    total = total or len(items)
    terminal = sys.stderr.isatty()
    end, pause = ("\r", 1.0) if terminal else ("\n", SILENT)
    start = time.monotonic()
    due = start + SILENT
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now > due and os.environ.get("RANK", "0") == "0":
            rest = minutes((now - start) / done * (total - done))
            print(f"{what}: {done} of {total}  ETA {rest} ", end=end, file=sys.stderr, flush=True)
            due = now + pause
        yield item
    if terminal and due > start + SILENT:
        print(file=sys.stderr)


def even_sample(items: list, limit: int | None) -> list:
    """At most `limit` of the items, evenly spread; all of them without a limit."""
    if not limit or limit >= len(items):
        return items
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, limit)]
