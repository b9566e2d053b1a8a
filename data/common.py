"""What every other file stands on: the ignore index, the error that a user can mend, the atomic writer, progress.

    raise BadInput(f"{path}: found this, expected that; type so and so")      one line, printed without a traceback
    write("runs/a/split.json", {"train": names})                              whole or not at all
    out = Written("predictions", overwrite=False)                             replaces only files that it wrote
    splits = read_json(path, dict[str, list[str]], "{split: [names]}")        or one line that says what is wrong
    for x, y, name in progress(loader, "validation"): ...                     count and ETA once it takes long
"""
import codecs
import contextlib
import hashlib
import io
import json
import os
import reprlib
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import get_args, get_origin

import numpy as np
from PIL import Image

IGNORE = 255  # the one ignore index: unlabelled, void, padding
SILENT = 10.0  # seconds before progress() says anything
MAX_TEXT = 2**30  # bytes; an image or a weight file given for a list would fill the memory


class BadInput(ValueError):
    """A user's file or flag that cannot be used: one line with what was found, what was expected and what to type."""


def replace(path: str | Path, save: Callable[[str], None]) -> None:
    """save(temporary name), then rename: a killed job or a full disk leaves the old file. Failures are OSErrors."""
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
        if not isinstance(e, (OSError, RuntimeError)):  # torch.save reports a full disk as a RuntimeError
            raise
        why = getattr(e, "strerror", None) or str(e)[:100]
        raise OSError(f"{path}: cannot be written ({why}); is the disk full or read-only?") from None


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
        content = json.dumps(content, indent=1) + "\n"
    if isinstance(content, str):
        content = as_bytes(content)
    return content


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

    def check(self, names: Iterable[str]) -> None:
        """BadInput for the first of these files that may not be replaced: before any long work."""
        own = self.read_list()
        for name in names:
            file = self.folder / name
            if file.is_dir():
                raise BadInput(f"{file}: a folder, where a file will be written; name another --out")
            if not self.overwrite and os.path.lexists(file):
                if not file.exists() or (name, file_sha256(file)) not in own:
                    raise BadInput(f"{file}: would be overwritten, and was not written by this "
                                   "program or was changed since; type --overwrite to replace it, "
                                   "or name another --out")
            self.checked.add(name)

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
            # by its older line. One short write to the end, so that processes do not mix lines.
            line = json.dumps({"file": name, "sha256": file_sha256(temporary)})
            with open(self.list, "ab", buffering=0) as f:
                f.write(b"\n" + line.encode())

        replace(self.folder / name, save_and_list)

    def read_list(self) -> set[tuple[str, str]]:
        """(name, sha256) of every file ever written."""
        if not self.list.exists():
            return set()
        found = set()
        for line in self.list.read_bytes().splitlines():
            # Lines begin with their line break: one that a full disk cut off spoils no other.
            with contextlib.suppress(ValueError, LookupError, TypeError):
                row = json.loads(line)
                found.add((row["file"], row["sha256"]))
        return found


def file_sha256(path: str | Path) -> str:
    """Of a file of any size, as hexadecimal digits."""
    digest = hashlib.sha256()
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


def read_text(path: str | Path, errors: str = "strict") -> str:
    """A text file of the user: UTF-8 with a byte order mark or without, or UTF-16 with one, as PowerShell writes.

    errors="surrogateescape" keeps bytes that are not UTF-8 as Python has them in names of files.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_TEXT:
            raise BadInput(f"{path}: {size / 2**30:.1f} GiB; expected a text file")
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, ValueError) as e:  # ValueError: of a name that no file can have
        raise BadInput(f"{str(path)!r}: cannot be read ({getattr(e, 'strerror', e)})") from None
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if marked else "utf-8-sig", errors)
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not UTF-8 text; save it as UTF-8") from None


def read_json(path: str | Path, shape: type = dict, expected: str = "{...}"):
    """What a JSON file of the user holds: a value of `shape`, such as dict[str, list[str]], else BadInput.

    `expected` is the shape in words. NaN and a name that stands twice in an object are no JSON.
    """
    text = read_text(path)
    try:
        found = json.loads(text, object_pairs_hook=unique, parse_constant=no_number)
        # What cannot be written again would end a run later: half a character, a thousand brackets.
        as_bytes(json.dumps(found, ensure_ascii=False))
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{path}: not valid JSON ({e})") from None
    if not fits(found, shape):
        raise BadInput(f"{path}: holds {reprlib.repr(found)}; expected JSON {expected}")
    return found


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


def nfc(text: str) -> str:
    """A name as text with composed accents: macOS writes e and an accent, others one letter for both.

    Without a UTF-8 locale Python has the bytes of a name for its letters.
    """
    return unicodedata.normalize("NFC", as_bytes(text).decode("utf-8", "surrogateescape"))


def json_lines(rows: list[dict]) -> str:
    """The rows as text, one JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def print_anything() -> None:
    """At the start of every program: a letter that the terminal's encoding lacks is shown as \\u6c34, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


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
