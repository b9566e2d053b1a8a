"""Are a data set's files those that a run began with? Sizes, times and hashes of images and masks.

    prints = fingerprint("D", [Path("D/images/a.png"), ...])    plain JSON types: a run's files.json
    prints, notes = check_unchanged("runs/a/files.json", "D")   BadInput names a changed file

A file of the same size and times is the same: the system itself sets the time of the last change of
status. One of other times, such as a copy, is hashed. Of sets up to WHOLE bytes every byte is, so
that nothing escapes; of each file of a larger set PARTS blocks, spread evenly from its first byte
to its last, which takes seconds. These find other pixels wherever files are compressed, but not a
few in the middle of a raw one.
"""
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from .common import BadInput, check_file, file_sha256, read_json
from .datasets import in_threads

WHOLE = 2**29  # bytes of all files together
PARTS = 4  # blocks of a file of a larger set
LEAST = 2**13  # bytes of them together, whatever the number of files


def digest(file: Path, share: int) -> str:
    """The hash of a file of up to `share` bytes, or of PARTS blocks of it."""
    check_file(file)
    size = os.stat(file).st_size
    if size <= share:
        return file_sha256(file)
    h = hashlib.sha256()
    block = share // PARTS
    with open(file, "rb") as f:
        for i in range(PARTS):
            f.seek(i * (size - block) // (PARTS - 1))
            h.update(f.read(block))
    return h.hexdigest()


def size_and_times(file: Path) -> str:
    """What tells whether a file has to be hashed, as text."""
    s = os.stat(file)
    return f"{s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}"


def path_in(root: str | Path, file: Path) -> str:
    """A file as it is named in files.json: by its path from the root of its data set."""
    return Path(os.path.relpath(file, root)).as_posix()


def fingerprint(root: str | Path, files: Iterable[Path]) -> dict:
    """{"share": bytes hashed of a file, "files": {path in root: "size times hash"}}."""
    files = sorted(set(files))
    sizes = [os.stat(file).st_size for file in files]
    if sum(sizes) <= WHOLE:
        share = max(sizes, default=0)
    else:
        share = max(LEAST, WHOLE // len(files))

    def look(file):
        state = size_and_times(file)  # before it is read: a change meanwhile is found later
        return f"{state} {digest(file, share)}"

    names = [path_in(root, file) for file in files]
    return {"share": share, "files": dict(zip(names, in_threads(look, files, "hashes of files")))}


def prints_of_run(run: str | Path, root: str | Path) -> tuple[dict | None, list[str]]:
    """check_unchanged() of a run that goes on; None for one begun before there was files.json."""
    path = Path(run) / "files.json"
    if not path.exists():
        return None, [f"{run}: begun without files.json, so whether images have changed since is "
                      "not known"]
    return check_unchanged(path, root)


def read_prints(path: str | Path) -> tuple[int, dict[str, tuple[int, str, str]]]:
    """files.json -> bytes hashed of a file, {path in root: (bytes, size and times, hash)}."""
    kept = read_json(path, dict, '{"share": number, "files": {name: text}}')
    files = {}
    try:
        for name, text in kept["files"].items():
            state, found = text.rsplit(" ", 1)
            files[name] = int(state.split(" ")[0]), state, found
        return int(kept["share"]), files
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadInput(f"{path}: damaged; remove it to go on without a check that the images are "
                       "those of before") from None


def check_unchanged(path: str | Path, root: str | Path) -> tuple[dict, list[str]]:
    """The fingerprint in `path`, with the times of now, and notes.

    A file that is another, or gone, is a BadInput.
    """
    share, files = read_prints(path)
    faults, now, moved = [], {}, []  # moved: names of files whose times are others
    for name, (size, state, _) in files.items():
        file = Path(root, name)
        try:
            now[name] = size_and_times(file)
        except (OSError, ValueError) as e:  # ValueError: of a name that no file can have
            faults.append(f"{file}: is gone ({getattr(e, 'strerror', e)})")
            continue
        found = int(now[name].split(" ")[0])
        if found != size:
            faults.append(f"{file}: has changed ({found} bytes instead of {size})")
        elif now[name] != state:
            moved.append(name)
    hashes = in_threads(lambda name: digest(Path(root, name), share), moved, "hashes of files")
    for name, found in zip(moved, hashes):
        if found != files[name][2]:
            faults.append(f"{Path(root, name)}: has changed (other contents)")
    if faults:
        run = Path(path).parent
        others = f", as {len(faults) - 1} other files" if len(faults) > 1 else ""
        raise BadInput(f"{faults[0]} since {run} began{others}; bring the old files back, name the "
                       "--root that has them, or start a new run")

    notes = []
    if any(files[name][0] > share for name in moved):
        notes.append(f"{len(moved)} files have another time than when this run began; {share} "
                     "bytes of each were compared, and agree")
    prints = {name: f"{now[name]} {found}" for name, (_, _, found) in files.items()}
    return {"share": share, "files": prints}, notes
