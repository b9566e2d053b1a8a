"""Files of the user by their names: what a folder holds, what patterns, lists and tables mean.

    images, others = images_in("D")         also behind links; hidden and system files are left out
    star_key("T */*.png", "T 2/a.png")      "2/a": what the stars stand for
    typed("D/*/a.png")                      what a word of a command line means: files and folders
    Names(pairs).find("T 2\\a.png")         "T 2/a": the image that a list or a table means
"""
import functools
import glob
import os
import posixpath
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from .common import SHORT, BadInput, as_bytes, escaped, in_time, nfc
from .tiff import world_files

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")  # what counts as a picture
# Images of GIS programs that are not read here, and that GDAL turns into TIFFs.
OF_GDAL = (".jp2", ".j2k", ".img", ".vrt", ".ecw", ".sid", ".bil", ".bsq", ".gif")
MATCH_TIME = 10  # seconds that a pattern may take for a name
# What macOS, Windows and network disks leave in folders: @eaDir holds thumbnails, called *.jpg.
SYSTEM_FILES = {"__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin",
                "system volume information", "lost+found", "@eadir", "#recycle"}


# ---- folders

def is_hidden(name: str) -> bool:
    """Is a file or folder of this name hidden or the system's own?

    "_DSC0001.JPG" is a normal name; "._a.png" (macOS) and ".ipynb_checkpoints" are not.
    """
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def is_image(file: Path) -> bool:
    """By its suffix."""
    return file.suffix.lower() in SUFFIXES


def check_folder(path: str | Path) -> None:
    """BadInput unless the folder is there."""
    path = Path(path)
    if path.is_dir():
        return
    if path.exists():
        raise BadInput(f"{path}: a file; type the folder that holds the data")
    there = next(parent for parent in path.absolute().parents if parent.is_dir())
    raise BadInput(f"{path}: no such folder; there is {there}: correct the rest of the path")


def image_name(file: Path) -> str:
    """How a path names an image: with slashes, and without its suffix if that is an image's."""
    return (file.with_suffix("") if is_image(file) else file).as_posix()


def walk(folder: str | Path, levels: list[re.Pattern] | None = None) -> Iterator[Path]:
    """All files below a folder in the order of their paths, or those whose parts fit `levels`.

    Links to folders are followed, but for those to a folder that they lie in.
    """
    return below(Path(folder), ancestors(folder), levels)


def below(folder: Path, above: set[str], levels: list[re.Pattern] | None) -> Iterator[Path]:
    """walk() of a folder; `above`: the real paths of the folders that were passed on the way."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as e:
        raise BadInput(f"{folder}: cannot be read ({e.strerror}); make it readable, or move it "
                       "away") from None
    deeper = levels[1:] if levels else None
    for entry in entries:
        fits = levels is None or levels[0].fullmatch(nfc(entry.name))
        if is_hidden(entry.name) or not fits:
            continue
        path = folder / entry.name
        if not is_folder(entry):
            if not deeper:
                yield path
        elif levels is None or deeper:
            real = os.path.realpath(path)
            if real not in above:  # else the walk would go round for ever
                yield from below(path, above | {real}, deeper)


def ancestors(folder: str | Path) -> set[str]:
    """The real paths of a folder and of all that it lies in."""
    real = Path(os.path.realpath(folder))
    return {str(path) for path in (real, *real.parents)}


def is_folder(entry: os.DirEntry) -> bool:
    """A folder or a link to one; a link to nothing, or to itself, is a file that cannot be read."""
    return entry.is_dir(follow_symlinks=False) or entry.is_symlink() and os.path.isdir(entry)


def folders(folder: Path) -> list[Path]:
    """Sub-folders in order, without hidden ones and links that lead round."""
    above = ancestors(folder)
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not is_hidden(entry.name) and is_folder(entry):
            if os.path.realpath(entry) not in above:
                found.append(folder / entry.name)
    return found


def images_in(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """The images below a folder, and its other files.

    What lies beside an image under its name, a.tif.msk, a.tif.aux.xml or a.tfw, is neither.
    """
    images, others = [], []
    for file in walk(folder):
        if is_image(file):
            images.append(file)
        elif not any(map(is_image, longer_names(file))):
            others.append(file)
    places = {place for image in images for place in world_files(image)}
    return images, [file for file in others if file not in places]


def with_companions(images: Iterable[str | Path]) -> list[str | Path]:
    """Images, and the files beside them that say what of them is data: a.tif.msk, a.tif.aux.xml."""
    files = []
    for image in images:
        beside = [f"{image}{suffix}" for suffix in (".msk", ".aux.xml")]
        files += [image, *filter(os.path.exists, beside)]
    return files


def longer_names(file: Path) -> list[Path]:
    """The files that one is called after and that are there: a.tif.aux.xml -> [a.tif]."""
    parts = file.name.split(".")
    names = [file.with_name(".".join(parts[:n])) for n in range(2, len(parts))]
    return [name for name in names if name.is_file()]


def not_used(files: list[Path]) -> str:
    """The files that a walk passes over, in one line: how many, of which suffixes, the first."""
    kinds = Counter(file.suffix or "without suffix" for file in files)
    counts = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(5))
    first = escaped(str(files[0]))
    line = f"{len(files)} files are no images by their suffix: {counts}; first {first}"
    if len(files) == 1:
        line = f"1 file is no image by its suffix: {first}"
    foreign = [file for file in files if file.suffix.lower() in OF_GDAL]
    if not foreign:
        return line
    words = ["gdal_translate", "-co", "COMPRESS=DEFLATE", foreign[0], foreign[0].with_suffix(".tif")]
    return f"{line}; images are converted with {shlex.join(map(str, words))}"


# ---- names that become files

FILE_NAME = "a name without / and \\, at most 200 bytes long"


def is_file_name(value) -> bool:
    """May a file or folder be called so? What users name, such as data sets and splits, becomes one."""
    if not isinstance(value, str) or value in ("", ".", ".."):
        return False
    if set(value) & set("/\\") or any(ord(letter) < 32 for letter in value):
        return False
    return len(as_bytes(value)) <= 200  # systems allow 255, with -kd-2 behind


# ---- patterns

def match(root: str | Path, pattern: str) -> Iterator[tuple[Path, str]]:
    """(file, what the stars stand for) of all files in root that a pattern means.

    ** stands for any number of folders. A pattern that is none is a BadInput.
    """
    try:
        if "/" not in pattern:  # written on Windows
            pattern = pattern.replace("\\", "/")
        parts = PurePosixPath(pattern).parts
        star_regex("/".join(parts))
        if not parts or parts[0] == "/":
            raise ValueError("absolute" if parts else "empty")
    except (ValueError, TypeError, AttributeError, re.error) as e:
        raise BadInput(f"{root}: {pattern!r} is no pattern ({e}); expected 'images/*.png' or the "
                       "like") from None
    # The walk begins behind the folders that are there by these very names.
    base = Path(root)
    while len(parts) > 1 and not glob.has_magic(parts[0]) and (base / parts[0]).is_dir():
        base = base / parts[0]
        parts = parts[1:]
    rest = "/".join(parts)
    # Without ** every part has its level, and folders that do not fit are not walked.
    levels = None if "**" in rest else [star_regex(part) for part in parts]
    for file in walk(base, levels):
        stars = star_key(rest, "/".join(file.parts[len(base.parts):]))
        if stars is not None:
            yield file, stars


def star_key(pattern: str, path: str) -> str | None:
    """What the stars stand for: "T */*.png", "T 2/a.png" -> "2/a"; None where nothing fits."""
    with in_time(MATCH_TIME, f"{pattern!r}: too many stars to compare with {path!r}; write a "
                             "pattern of fewer"):
        found = star_regex(pattern).fullmatch(nfc(path))
    return "/".join(found.groups()) if found else None


@functools.lru_cache
def star_regex(pattern: str) -> re.Pattern:
    """Every star and bracket as a group, the rest as text; "[[]" stands for a bracket itself."""
    # The groups are what pairs an image with its mask. Python's fnmatch has none.
    wild = {"**/": "((?:.*/)?)", "**": "(.*)", "*": "([^/]*)", "?": "([^/])"}
    regex = ""
    for token in re.split(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^]]*\])", nfc(pattern)):
        if token in wild:
            regex += wild[token]
        elif token in ("[[]", "[]]", "[*]", "[?]"):
            regex += re.escape(token[1])
        elif token.startswith("[") and token.endswith("]"):
            inside = re.sub(r"([][\\^&~|])", r"\\\1", token[1:-1])
            regex += f"([{inside}])".replace("[!", "[^")
        else:
            regex += re.escape(token)
    return re.compile(regex, re.DOTALL)  # names may hold line breaks


def typed(word: str) -> list[Path]:
    """The files and folders that a word of a command line means: itself if there, or by its stars.

    Folders that are there may have brackets in their names; shells do not always fill in stars.
    """
    path = Path(word)
    if os.path.lexists(path):
        return [path]
    base = next(parent for parent in path.parents if parent.is_dir())
    rest = path.relative_to(base)
    if not glob.has_magic(rest.parts[0]):
        return []
    if "**" in rest.parts:
        return [file for file, _ in match(base, rest.as_posix())]
    found = glob.glob(os.path.join(glob.escape(str(base)), str(rest)))
    paths = sorted(map(Path, found))
    return [p for p in paths if not any(map(is_hidden, p.relative_to(base).parts))]


def torn(words: list[str]) -> str:
    """The end of a message about the first word, where it and the next ones are one path with spaces."""
    for n in range(2, min(len(words), 8) + 1):
        path = " ".join(words[:n])
        if os.path.lexists(path):
            return f"; a path with spaces goes into quotes: {shlex.quote(path)}"
    return ""


# ---- names in lists and tables

def about_encoding(text: str) -> str:
    """The end of a message about a text that was not UTF-8, as read with surrogateescape."""
    if text.isascii() or not re.search("[\udc80-\udcff]", text):
        return ""
    return "; the file is not UTF-8 text: save it again, in a spreadsheet as CSV UTF-8"


class Names:
    """The images of a data set, by all that lists, tables and split files call them.

    pairs: {name: (image, mask, ...)}. An image is called by its name, or by the last part of it
    where only one image has that, with the suffix of an image or without; by its absolute path;
    with slashes or backslashes.
    """

    def __init__(self, pairs: dict[str, tuple]):
        self.pairs = pairs
        self.suffixes = {Path(image).suffix.lower() for image, *_ in pairs.values()}
        self.suffixes |= set(SUFFIXES)
        last = {name: name.rsplit("/", 1)[-1] for name in pairs}
        count = Counter(last.values())
        self.known = {nfc(part): name for name, part in last.items() if count[part] == 1}
        self.known |= {nfc(name): name for name in pairs}

    def find(self, text: str) -> str | None:
        """The name, or None: nothing is cut off that is not the suffix of an image."""
        if text in self.pairs:
            return text
        # Lists of Windows have backslashes; "/images/a.png" may mean the root of the data set.
        slashed = posixpath.normpath(text.replace("\\", "/"))
        for path in (text, slashed, slashed.lstrip("/")):
            name = self.known.get(nfc(path)) or self.known.get(nfc(self.bare(path)))
            if name:
                return name
        if os.path.isabs(slashed):
            return self.places.get(self.bare(real_place(slashed)))
        return None

    def find_line(self, line: str) -> str | None:
        """The name in a line of a list, which may have the image's mask behind it."""
        name = self.find(line)
        if name:
            return name
        for gap in re.finditer(r"[,;\s]+", line):  # every one: names may have blanks themselves
            name = self.find(line[:gap.start()])
            if name is None:
                continue
            if not self.is_mask(line[gap.end():], name):
                mask = self.pairs[name][1]
                raise BadInput(f"{SHORT.repr(line)}: the mask of {name} is {mask}; correct the "
                               'line, or "masks" in dataset.json')
            return name
        return None

    def bare(self, path: str) -> str:
        """The path without the suffix of an image."""
        rest, suffix = posixpath.splitext(path)
        return rest if suffix.lower() in self.suffixes else path

    def is_mask(self, text: str, name: str) -> bool:
        """Is this the path of the image's mask, or its end? An image without one may have any."""
        mask = self.pairs[name][1]
        path = nfc(self.bare(posixpath.normpath(text.replace("\\", "/"))))
        if mask is None or self.bare(real_place(path)) == self.bare(real_place(str(mask))):
            return True
        return nfc(self.bare(Path(mask).as_posix())).endswith("/" + path.lstrip("/"))

    @functools.cached_property
    def places(self) -> dict[str, str | None]:
        """{real path of an image without its suffix: name}, None for one that is several tiles."""
        found = {}
        for name, (image, *_) in self.pairs.items():
            place = self.bare(real_place(str(image)))
            found[place] = None if place in found else name
        return found


def real_place(path: str) -> str:
    """The path with its folder's links resolved, but not the file's own: that may lie elsewhere."""
    folder, name = os.path.split(path)
    return nfc(Path(real_folder(folder), name).as_posix())


@functools.lru_cache  # a list names the same folder in every line
def real_folder(folder: str) -> str:
    try:
        return os.path.realpath(folder)
    except ValueError:  # of a name that no folder can have
        return folder
