"""Picture files become checked RGB tensors, in batches loaded while the batch before is computed.

Checking many pictures takes long, so the user's cache remembers which file was found whole, by its size and time.
"""

import hashlib
import logging
import sqlite3
import struct
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from io import BufferedReader, FileIO
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from patchnetvlad.errors import UserError, by_number, counted
from patchnetvlad.files import duration, some_of
from patchnetvlad.paths import user_cache

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)

ChangePicture = Callable[[int, NDArray[np.uint8]], NDArray[np.uint8]]
"""A picture's index and its H×W×3 RGB → the picture as it is to be seen, of the same size."""

_PROBLEMS_SHOWN = 10
_TIMED = 100  # pictures whose checking tells how long the others will take
_REMEMBERED = "checked_pictures.sqlite"
_REMEMBERED_AT_ONCE = 5000
_LOOKED_AT = 10_000  # pictures at most whose proportions are looked at before a run
_HEADER_THREADS = 4
_HEADER_BYTES = 1 << 16  # read ahead, so that opening a picture under the lock seldom waits for the disk
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF orientation: what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height
_opening = threading.Lock()


def read_image(path: Path, exif_rotation: bool = False) -> Image.Image:
    """Decode a picture file of any kind to RGB; transparency is dropped, 16 bits a channel are scaled to 8.

    ``exif_rotation`` turns it upright by its EXIF orientation. Raises UserError: the file and what is wrong.
    """
    with _opened(path) as picture:
        return to_rgb(picture, exif_rotation)


def to_rgb(picture: Image.Image, exif_rotation: bool = False) -> Image.Image:
    """The same of a picture that is open, which stays as it is. Raises what Pillow does for a broken file."""
    orientation = _orientation(picture) if exif_rotation else 1
    rgb = _decoded(picture)
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def check_images(paths: Sequence[Path], workers: int = 4, progress: bool = False) -> dict[Path, str]:
    """Decode every picture; "FILE: reason" for each that ``read_image`` would refuse, by its path, in list order.

    Only decoding finds a truncated file; JPEGs are decoded at an eighth of their size, which is faster and
    reads them whole all the same. ``workers`` threads share the work; ``progress`` shows a bar. Pictures that were
    found whole before, and have the same size and time, are not decoded again.
    """
    distinct = list(dict.fromkeys(paths))
    states = dict(zip(distinct, in_order(_file_state, distinct, workers), strict=True))
    known = _remembered(states)
    unknown = [path for path in distinct if path not in known]
    problems: dict[Path, str] = {}
    whole: list[tuple[bytes, str]] = []
    checked = zip(unknown, in_order(_problem, unknown, workers), strict=True)
    started = perf_counter()
    try:
        for number, (path, problem) in enumerate(
            tqdm(checked, "Checking pictures", len(unknown), disable=not (progress and unknown), unit="img"), start=1
        ):
            state = states[path]
            if problem is not None:
                problems[path] = problem
            elif state is not None:
                whole.append(state)
            if number == _TIMED < len(unknown):
                _announce_check(len(unknown), len(known), (perf_counter() - started) / number, workers)
            if len(whole) == _REMEMBERED_AT_ONCE:
                _remember(whole)
                whole.clear()
    finally:  # an interrupted check goes on where it stopped
        _remember(whole)
    return problems


def require_readable(paths: Sequence[Path], source: Path, workers: int = 4, progress: bool = False) -> None:
    """Raises one UserError that counts the unreadable pictures of a list or folder, source, and names the first ten."""
    problems = list(check_images(paths, workers, progress).values())
    if not problems:
        return
    total, shown = len(set(paths)), some_of(problems, _PROBLEMS_SHOWN, "; ")
    hint = " (is the dataset's root folder right?)" if not any(map(Path.exists, paths)) else ""
    raise UserError(f"{source}: {len(problems)} of {counted(total, 'picture')} cannot be read{hint}: {shown}")


def prepare_image(picture: Image.Image, height: int, width: int) -> Tensor:
    """RGB picture to a normalised 3×height×width float32 tensor; a size of 0 or less keeps the picture's own.

    Bilinear with antialiasing, to [0, 1], then ImageNet's mean and standard deviation.
    """
    picture = _resized(picture, height, width)
    # In NumPy, with the result of torchvision's to_tensor and normalize bit for bit: torch would start a team
    # of threads of its own in each loading thread.
    pixels = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1)  # H×W×3 → 3×H×W
    pixels = np.divide(pixels, np.float32(255), order="C")
    pixels -= np.asarray(IMAGENET_MEAN, dtype=np.float32)[:, None, None]
    pixels /= np.asarray(IMAGENET_STD, dtype=np.float32)[:, None, None]
    return torch.from_numpy(pixels)


def tell_stretched_files(paths: Sequence[Path], height: int, width: int, exif_rotation: bool = False) -> None:
    """Say how many pictures resizing stretches, from their headers; of many those of a sample."""
    distinct = list(dict.fromkeys(paths)) if min(height, width) > 0 else []
    looked_at = distinct[:: len(distinct) // _LOOKED_AT + 1]
    with closing(in_order(lambda path: _size(path, exif_rotation), looked_at, _HEADER_THREADS)) as sizes:
        stretched = sum(stretches(size, height, width) for size in sizes)
    tell_stretched(stretched, len(looked_at), height, width)


def stretches(size: tuple[int, int], height: int, width: int) -> bool:
    """Whether resizing changes the proportions of a picture of (width, height) by over 1 %."""
    return min(height, width) > 0 and abs(size[0] * height / (size[1] * width) - 1) > 0.01


def tell_stretched(stretched: int, pictures: int, height: int, width: int) -> None:
    """Say that so many of the pictures were of other proportions than the size that all get, if any were."""
    if stretched:
        logger.info(
            "%d of %s of other proportions than %d×%d: stretched (imageresizew and imageresizeh; 0 keeps each "
            "picture's own size)",
            stretched,
            counted(pictures, "picture"),
            width,
            height,
        )


def _resized(picture: Image.Image, height: int, width: int) -> Image.Image:
    return picture.resize((width, height), Image.Resampling.BILINEAR) if min(height, width) > 0 else picture


class ImageDataset(Dataset[tuple[int, Tensor]]):
    """Pictures as (index, 3×H×W tensor), resized and then changed; UserError names one that cannot be read."""

    def __init__(
        self,
        paths: Sequence[Path],
        height: int,
        width: int,
        exif_rotation: bool = False,
        change: ChangePicture | None = None,
    ) -> None:
        self.paths = paths
        self.height = height
        self.width = width
        self.exif_rotation = exif_rotation
        self.change = change

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        picture = read_image(self.paths[index], self.exif_rotation)
        if self.change is not None:
            picture = _resized(picture, self.height, self.width)
            picture = Image.fromarray(self.change(index, np.asarray(picture)))
        return index, prepare_image(picture, self.height, self.width)


def image_batches(
    paths: Sequence[Path],
    height: int,
    width: int,
    batch_size: int,
    threads: int = 4,
    exif_rotation: bool = False,
    indices: Sequence[int] | None = None,
    change: ChangePicture | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of all pictures, or of those at ``indices``: (indices into ``paths``, N×3×H×W float32).

    N is at most ``batch_size``. ``threads`` load a few batches ahead of the caller's computing; with 0 each
    batch is loaded when it is asked for. Pictures come in the order of ``indices``. Where they keep their own
    size (height or width of 0 or less) a batch gathers pictures of one size from the whole list, and batches
    come in the order of their first pictures. ``change`` alters pictures before they are normalised.
    Raises UserError naming a picture that cannot be read.
    """
    dataset = ImageDataset(paths, height, width, exif_rotation, change)
    wanted = range(len(paths)) if indices is None else indices
    if height > 0 and width > 0:
        batches = [list(wanted[start : start + batch_size]) for start in range(0, len(wanted), batch_size)]
    else:
        batches = _batches_of_one_size(dataset, wanted, batch_size, threads)
    ahead = (2 + threads // batch_size) * batch_size  # enough for every thread, and for the next batch to be ready
    loaded = in_order(dataset.__getitem__, [index for batch in batches for index in batch], threads, ahead)
    with closing(loaded):
        for batch in batches:
            yield batch, torch.stack([next(loaded)[1] for _ in batch])


def in_order(
    function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int | None = None
) -> Generator[R, None, None]:
    """The function's results in the order of the items, computed by threads, at most ``ahead`` of them beforehand;
    with 0 threads each is computed when it is asked for."""
    if threads < 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from in_order_by(pool, function, items, 4 * threads if ahead is None else ahead)


def in_order_by(pool: Executor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Generator[R, None, None]:
    """The same by threads that are there; what has not begun when this ends early never does."""
    under_way: deque[Future[R]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) > ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()


def _batches_of_one_size(
    dataset: ImageDataset, indices: Sequence[int], batch_size: int, threads: int
) -> list[list[int]]:
    """Indices in batches of one picture size, read from the files' headers."""

    def size(index: int) -> tuple[int, int]:
        return _size(dataset.paths[index], dataset.exif_rotation)

    batches: list[list[int]] = []
    filling: dict[tuple[int, int], list[int]] = {}  # the newest batch of each size
    for index, picture_size in zip(indices, in_order(size, indices, threads), strict=True):
        batch = filling.get(picture_size)
        if batch is None or len(batch) == batch_size:
            batch = filling[picture_size] = []
            batches.append(batch)
        batch.append(index)
    return batches


def _size(path: Path, exif_rotation: bool) -> tuple[int, int]:
    """Width and height of a picture from its file's header."""
    with _opened(path) as picture:
        turned = exif_rotation and _orientation(picture) in _SIDEWAYS
        return picture.size[::-1] if turned else picture.size


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An open picture, its header read; whatever the file makes go wrong inside the block is a UserError."""
    try:
        with BufferedReader(FileIO(path), _HEADER_BYTES) as file:
            if not file.peek(1):
                raise UserError(f"{path}: empty file (0 bytes)")
            # Pillow only warns of pictures beyond its limit; filters belong to the process, hence the lock.
            with _opening, warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                picture = Image.open(file)
            with picture:
                yield picture
    except UserError:
        raise
    except IsADirectoryError as error:
        raise UserError(f"{path}: a folder, not a picture") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(
            f"{path}: not a picture, or of a kind that cannot be read (such as HEIC: convert it to .jpg)"
        ) from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise UserError(f"{path}: more than {limit} pixels (make it smaller)") from error
    except Exception as error:  # Pillow's decoders let through whatever a broken file makes them stumble over
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be decoded ({reason})") from error


def _problem(path: Path) -> str | None:
    try:
        with _opened(path) as picture:
            picture.draft("RGB", (max(1, picture.width // 8), max(1, picture.height // 8)))
            _decoded(picture)
    except UserError as error:
        return str(error)
    return None


def _file_state(path: Path) -> tuple[bytes, str] | None:
    """A hash of a file's absolute name, and its size and time; None for no file."""
    try:
        status, name = path.stat(), str(path.absolute()).encode("utf-8", "surrogateescape")
    except (OSError, ValueError):
        return None
    return hashlib.blake2b(name, digest_size=16).digest(), f"{status.st_size} {status.st_mtime_ns}"


def _remembered(states: Mapping[Path, tuple[bytes, str] | None]) -> set[Path]:
    """The pictures that were found whole as they are now."""

    def look_up(memory: sqlite3.Connection) -> set[Path]:
        query = "SELECT 1 FROM whole WHERE name = ? AND state = ?"
        return {path for path, state in states.items() if state and memory.execute(query, state).fetchone()}

    return _with_memory(look_up) or set()


def _remember(whole: Sequence[tuple[bytes, str]]) -> None:
    if whole:
        _with_memory(lambda memory: memory.executemany("REPLACE INTO whole VALUES (?, ?)", whole))


def _with_memory(work: Callable[[sqlite3.Connection], R]) -> R | None:
    """Work with what is remembered; None where that cannot be used, which costs time and nothing else."""
    try:
        file = user_cache() / _REMEMBERED
        file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(file, timeout=30)) as memory, memory:
            memory.execute("CREATE TABLE IF NOT EXISTS whole (name BLOB PRIMARY KEY, state TEXT) WITHOUT ROWID")
            return work(memory)
    except (OSError, RuntimeError, sqlite3.OperationalError) as error:  # RuntimeError: a user without a home folder
        logger.debug("%s is not at hand: %s", _REMEMBERED, error)
    except sqlite3.DatabaseError as error:
        logger.debug("%s is damaged and begun anew: %s", file, error)
        with suppress(OSError):
            file.unlink()
    return None


def _announce_check(count: int, before: int, seconds_each: float, workers: int) -> None:
    logger.info(
        "checking %d pictures with %s: about %s%s",
        count,
        counted(workers, "thread"),
        duration(count * seconds_each),
        f" ({by_number(before, '1 more was', f'{before} more were')} found whole before)" if before else "",
    )


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1, as stored, when the picture does not tell or its EXIF is broken."""
    try:
        return int(picture.getexif().get(_ORIENTATION_TAG, 1))
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error):
        return 1


def _decoded(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        values = np.asarray(picture, dtype=np.int64).clip(0, 65535)
        picture = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    else:
        picture.load()
        if "transparency" in picture.info:  # Pillow warns of dropping it
            picture = picture.copy()
            del picture.info["transparency"]
    return picture.convert("RGB")
