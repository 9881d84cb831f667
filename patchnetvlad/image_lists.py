"""Lists of pictures, read and written, and the names under which the pictures' features are stored."""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar, overload

from natsort import natsorted

from patchnetvlad.errors import UserError
from patchnetvlad.files import read_text, write_text

T = TypeVar("T")

Side = Literal["query", "index"]
SIDES: tuple[Side, ...] = ("query", "index")  # of a dataset: its queries, and the database that they are searched in

PICTURE_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
)  # of files that list_folder takes, in any case
_PLAIN_NAME = re.compile(r"(?:[\w-][\w.-]*/)*[\w-][\w.-]*")  # stays as it is in the list; most do
_PLAIN_BYTES = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./\n"  # of lists of nothing but these
_NOT_PLAIN = ("//", "/.", "/\n", "\n/", "\n.")  # in such a list, with an empty line before and after it
_LONGEST_NAME = 200  # bytes; file systems allow 255, and the store adds to both ends


class Derived(Sequence[T]):
    """What follows from a list's names, made when it is first looked at.

    The paths and feature names of a million pictures take a GB, and matching needs neither.
    """

    def __init__(self, make: Callable[[], Sequence[T]], length: int) -> None:
        self._make = make
        self._length = length

    @cached_property
    def _values(self) -> tuple[T, ...]:
        return tuple(self._make())

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...

    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        return self._values[index]

    def __iter__(self) -> Iterator[T]:
        return iter(self._values)

    def __eq__(self, other: object) -> bool:
        return self._values == (other._values if isinstance(other, Derived) else other)

    def __hash__(self) -> int:
        return hash(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


@dataclass(frozen=True)
class ImageList:
    """Pictures in the order of their list; all sequences have one entry a line.

    names: relative to the dataset's root with forward slashes and without ``./``; absolute outside the root.
    paths: where the pictures are. feature_names: what the store calls them; a picture that is listed twice has
    one name, and so one set of files. source: the list's file.
    """

    names: Sequence[str]
    paths: Sequence[Path]
    feature_names: Sequence[str]
    source: Path

    def __len__(self) -> int:
        return len(self.names)


def read_image_list(list_path: Path, root: Path) -> ImageList:
    """Read a list of one picture a line, relative to ``root`` or absolute.

    Blank lines are left out, as is white space around a line. The pictures themselves are not looked at:
    matching stored features needs none. Raises UserError for a list that cannot be read, is empty or is not
    UTF-8 text.
    """
    text = read_text(list_path, "a list of pictures")
    if _all_plain(text):
        names = tuple(filter(None, text.split("\n")))
    else:
        lines = (line.strip() for line in text.split("\n"))
        names = tuple(_name_below(root, line) for line in lines if line)
    if not names:
        raise UserError(f"{list_path}: names no picture (expected one path a line)")
    paths = Derived(lambda: [root / name for name in names], len(names))
    return ImageList(names, paths, Derived(lambda: unique_feature_names(names), len(names)), list_path)


def list_file_name(name: str, side: Side) -> str:
    """What a list of the queries or of the database of a dataset is called, as the published ones are."""
    return f"{name}_imageNames_{side}.txt"


def write_image_list(list_path: Path, names: Sequence[str]) -> None:
    """Write names as a list, UTF-8, one a line, making its folder.

    Raises UserError for a name that a list cannot hold: a line end in it, white space at an end, no Unicode.
    """
    for name in names:
        if name != name.strip() or not name or any(mark in name for mark in "\n\r\0"):
            raise UserError(f"{list_path}: a list cannot hold the name {name!r} (rename the picture)")
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{list_path}: the name {name!r} is not Unicode (rename the picture)") from error
    write_text(list_path, (f"{name}\n" for name in names))


def list_folder(root: Path, recursive: bool = False) -> tuple[str, ...]:
    """Names of the pictures in a folder, relative to it, in natural order (2 before 10).

    Hidden files are left out; with ``recursive`` folders within are entered, linked ones too unless the link
    leads back up.
    Raises UserError when there is no such folder or no picture in it.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    names = [file.relative_to(root).as_posix() for file in _pictures(root, recursive)]
    if not names:
        hint = "" if recursive else " (folders within are entered with --recursive)"
        raise UserError(f"{root}: holds no picture{hint}")
    return tuple(natsorted(sorted(names)))  # names equal to natsort, such as 1 and 01, in a fixed order


def unique_feature_names(names: Sequence[str], settled: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """What each picture's files are called: its stem where no other picture has it, otherwise its path.

    A picture listed twice has one name. Names of different pictures differ even where a file system ignores
    case or Unicode forms; they do not depend on the order of the list, hold no separator and have at most 200
    bytes. Where paths do not tell pictures apart (``a/b.jpg`` and ``a_b.jpg``) a piece of a hash is added.
    settled: what some pictures are called already; they keep it, and the others stay apart from them.
    """
    pictures = sorted(set(names))
    stems = {name: _as_file_name(PurePosixPath(name).stem) for name in pictures}
    paths = {name: _as_file_name(name.lstrip("/")) for name in pictures}
    chosen: dict[str, str] = {}
    for form in (stems, paths):
        left = [name for name in pictures if name not in chosen]
        uses = Counter(_file_system_key(form[name]) for name in left)
        taken = {_file_system_key(name) for name in chosen.values()}
        for name in left:
            key = _file_system_key(form[name])
            if uses[key] == 1 and key not in taken:
                chosen[name] = form[name]
    kept = {name: form for name, form in (settled or {}).items() if name in stems}
    fixed = {_file_system_key(form) for form in kept.values()}
    chosen = {name: form for name, form in chosen.items() if name not in kept and _file_system_key(form) not in fixed}
    chosen |= kept
    taken = {_file_system_key(name) for name in chosen.values()}
    for name in pictures:
        if name not in chosen:
            chosen[name] = next(
                form for form in _hashed_names(name, paths[name]) if _file_system_key(form) not in taken
            )
            taken.add(_file_system_key(chosen[name]))
    return tuple(chosen[name] for name in names)


def hash_names(names: Sequence[str]) -> str:
    """SHA-256 of a list of names, their order included, in hexadecimal."""
    joined = '", "'.join(names)
    plain = joined.isascii() and joined.isprintable() and "\\" not in joined
    if plain and joined.count('"') == 2 * (len(names) - 1):
        return hashlib.sha256(f'["{joined}"]'.encode("ascii")).hexdigest()  # the JSON, made in less time
    return hashlib.sha256(json.dumps(tuple(names)).encode("ascii")).hexdigest()


def _all_plain(text: str) -> bool:
    """Whether every name of a list stays as it is: what `_PLAIN_NAME` says of a million lines, in a tenth of the time.

    False for some lists of which it is true.
    """
    if not text.isascii() or text.encode("ascii").translate(None, _PLAIN_BYTES):
        return False
    lines = f"\n{text}\n"
    return not any(mark in lines for mark in _NOT_PLAIN)


def _name_below(root: Path, line: str) -> str:
    if _PLAIN_NAME.fullmatch(line):
        return line
    path = Path(line)
    if path.is_absolute():
        for base in (root, root.absolute(), root.resolve()):
            if path.is_relative_to(base):
                return path.relative_to(base).as_posix()
    return path.as_posix()


def _pictures(folder: Path, recursive: bool, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    above |= {folder.resolve()}
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if recursive and entry.resolve() not in above:
                yield from _pictures(entry, recursive, above)
        elif entry.suffix.lower() in PICTURE_EXTENSIONS:
            yield entry


def _as_file_name(text: str) -> str:
    """Without separators, and short enough; the end is kept, since pictures of one folder differ there."""
    safe = text.replace("\\", "_").replace("/", "_").replace("\0", "_")
    encoded = safe.encode("utf-8", "surrogateescape")
    return encoded[-_LONGEST_NAME:].decode("utf-8", "ignore") if len(encoded) > _LONGEST_NAME else safe


def _hashed_names(name: str, form: str) -> Iterator[str]:
    """The form with ever more digits of the name's hash, so that one of them is free."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    for digits in range(8, len(digest) + 1, 8):
        yield f"{form[-(_LONGEST_NAME - digits) // 4 :]}-{digest[:digits]}"


def _file_system_key(name: str) -> str:
    """Equal for names that some file system holds to be the same file."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())
