"""Files as wholes: text read, files that appear complete or not at all, folders locked, and their errors in one line.

Everything that the toolkit writes, except rows that are filled in place and log files, goes through `replacing`.
"""

import errno
import hashlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, cast

from patchnetvlad.errors import UserError

if TYPE_CHECKING:
    import h5py
    from typing_extensions import Buffer

_TEMPORARY = ".writing-"
_LOCK_NAME = ".writing.lock"

# File systems commit many files at once: asked for one after the other, each would wait for a commit of its own.
_SYNCING_THREADS = 8

_CAUSES = {
    errno.EACCES: "no permission there, or another program has it open",
    errno.EPERM: "no permission there",
    errno.EROFS: "the disk can only be read",
    errno.ENOTDIR: "a file is in the place of a folder",
    errno.EEXIST: "a file is in the place of a folder",
    errno.EISDIR: "a folder is in its place",
    errno.ENOTEMPTY: "a folder is in its place",
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the quota is used up: free some space",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def reason(error: OSError) -> str:
    """What the system says of a failure, and its likely cause."""
    said = error.strerror or (str(error).splitlines() or [type(error).__name__])[0]
    cause = _CAUSES.get(error.errno or 0)
    return f"{said}; {cause}" if cause else said


@contextmanager
def told(path: Path, what: str = "cannot be written", absent: str | None = None) -> Iterator[None]:
    """Turn errors of the file system within the block into a UserError about a path.

    absent: the likely cause where the file is not there.
    """
    try:
        yield
    except OSError as error:
        if absent is not None and isinstance(error, FileNotFoundError):
            raise UserError(f"{path}: is missing ({absent})") from error
        raise UserError(f"{path}: {what} ({reason(error)})") from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, if they are not there; raises UserError when that cannot be."""
    with told(folder, "cannot be made a folder"):
        folder.mkdir(parents=True, exist_ok=True)


def read_text(path: Path, what: str = "a text file") -> str:
    r"""The text of a UTF-8 file, a byte order mark left out and every line end as \n.

    what: what the file should be, for errors. Raises UserError when it cannot be read or is not text.
    """
    with told(path, "cannot be read"):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text (is it {what}?)") from error
    if "\0" in text:
        raise UserError(f"{path}: holds binary data (is it {what}?)")
    return text


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside ``path``, of the same ending, which takes its place when the block succeeds.

    The folder is made. After a crash ``path`` is what it was before or complete, after the loss of the machine too
    unless durable is False. What is no regular file, such as a pipe or a device, is written in place. Raises
    UserError for errors of the file system, also for those within the block.
    """
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file() and not path.is_dir():
            yield path
            return
        temporary = temporary_path(path)
        try:
            yield temporary
            if durable:
                _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` when the block succeeds, as `replacing` says."""
    with replacing(path, durable=durable) as temporary, temporary.open("wb") as file:
        yield file
        file.flush()


class _Patient:
    """A file whose first error of writing is kept, for libraries that abort the process when a write raises."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: "Buffer") -> int:
        """The number of bytes, as if all were well."""
        if self.error is None:
            try:
                self._file.write(content)
            except OSError as error:
                self.error = error
        return memoryview(content).nbytes

    def flush(self) -> None:
        """Nothing: the file is flushed at its end."""


@contextmanager
def writing_with_torch(path: Path) -> Iterator[IO[bytes]]:
    """As `writing`, for what torch saves: a full disk would end its writer with the process."""
    with writing(path) as file:
        patient = _Patient(file)
        yield cast(IO[bytes], patient)
        if patient.error is not None:
            raise patient.error


@contextmanager
def writing_hdf5(path: Path) -> Iterator["h5py.File"]:
    """As `writing`, for an HDF5 file."""
    import h5py

    with replacing(path) as temporary:
        try:
            with h5py.File(temporary, "w") as file:
                yield file
        except RuntimeError as error:  # what HDF5 says of a full disk when it closes a file
            number = re.search(r"errno = (\d+)", str(error))
            if number is None:
                raise
            code = int(number.group(1))
            raise OSError(code, os.strerror(code)) from error


def write_text(path: Path, text: str | Iterable[str]) -> None:
    r"""Write text, or pieces of it, as UTF-8 with \n as line end, complete or not at all."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.writelines([text] if isinstance(text, str) else text)


def temporary_path(path: Path) -> Path:
    """Where this process writes what is to become ``path``.

    Not made from the name, which may already fill what a file system allows; no other process uses it, of another
    machine neither.
    """
    digest = hashlib.sha256(os.fsencode(f"{platform.node()}/{path.name}")).hexdigest()[:12]
    return path.with_name(f"{_TEMPORARY}{os.getpid()}-{digest}{path.suffix}")


def remove_temporary_files(folder: Path) -> None:
    """Remove what killed processes left half written in a folder that nobody else writes into."""
    for path in list(folder.glob(f"{_TEMPORARY}*")):
        path.unlink(missing_ok=True)


def sync_files(paths: Iterable[Path]) -> None:
    """Return once the contents of files are on the disk and outlive the loss of the machine."""
    with ThreadPoolExecutor(_SYNCING_THREADS) as pool:
        list(pool.map(_sync, paths))


def sync_folder(folder: Path) -> None:
    """Return once the names in a folder are on the disk, where the system can promise that."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into a folder while the block lasts, or until this process ends in any way.

    Raises UserError when another process has it. A network file system without locks keeps nobody off.
    """
    path = folder / _LOCK_NAME
    with ExitStack() as held:
        while True:
            file = held.enter_context(path.open("ab"))
            if not _lock(file):
                raise UserError(f"{folder}: another process writes there (wait for it, or end it)")
            if _is_at(file, path):
                break
            held.close()  # it was removed by the process that had it, and another may have made it anew
        with _removed_at_end(path, file):
            yield


@contextmanager
def _removed_at_end(path: Path, file: BinaryIO) -> Iterator[None]:
    """Remove a lock file while it is locked, or where no open file can be removed, after closing it."""
    try:
        yield
    finally:
        if sys.platform == "win32":
            file.close()
        with suppress(OSError):
            path.unlink()


def _lock(file: BinaryIO) -> bool:
    """Whether the lock of an open file is ours now, or there are no locks on its file system."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            # lockf, unlike flock, is not inherited by forked data loaders, which outlive a killed parent for a while.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def some_of(names: Sequence[str], shown: int = 5, separator: str = ", ") -> str:
    """The first names, and how many more there are: a, b, c and 12 more."""
    more = f"{separator.strip(', ')} and {len(names) - shown} more" if len(names) > shown else ""
    return separator.join(names[:shown]) + more


def duration(seconds: float) -> str:
    """A time for people: 12.3 s, 5 min, 2.1 h."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is or will be."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; read once as long as the file stays as it is, under any name."""
    with told(path, "cannot be read"):
        status = path.stat()
        return _sha256(_Content(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, path.absolute()))


@dataclass(frozen=True)
class _Content:
    """What a file holds: equal while nobody writes into it, whatever it is called."""

    device: int
    inode: int
    size: int
    changed: int
    path: Path = field(compare=False)


@lru_cache(maxsize=16)
def _sha256(content: _Content) -> str:
    with content.path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
