"""Picture files become checked RGB tensors, in batches loaded while the batch before is computed."""

import struct
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader, FileIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import functional
from tqdm import tqdm

from patchnetvlad.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)

ChangePicture = Callable[[int, NDArray[np.uint8]], NDArray[np.uint8]]
"""A picture's index and its H×W×3 RGB → the picture as it is to be seen, of the same size."""

_PROBLEMS_SHOWN = 10
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
        orientation = _orientation(picture) if exif_rotation else 1
        rgb = _to_rgb(picture)
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def check_images(paths: Sequence[Path], workers: int = 4, progress: bool = False) -> list[str]:
    """Decode every picture; one line "FILE: reason" for each that ``read_image`` would refuse, in list order.

    Only decoding finds a truncated file; JPEGs are decoded at an eighth of their size, which is faster and
    reads them whole all the same. ``workers`` threads share the work; ``progress`` shows a bar.
    """
    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        checked = tqdm(
            pool.map(_problem, distinct), "Checking pictures", len(distinct), disable=not progress, unit="img"
        )
        return [problem for problem in checked if problem is not None]


def require_readable(paths: Sequence[Path], source: Path, workers: int = 4, progress: bool = False) -> None:
    """Raises one UserError that counts the unreadable pictures of a list or folder, source, and names the first ten."""
    problems = check_images(paths, workers, progress)
    if not problems:
        return
    shown = "; ".join(problems[:_PROBLEMS_SHOWN])
    more = f"; and {len(problems) - _PROBLEMS_SHOWN} more" if len(problems) > _PROBLEMS_SHOWN else ""
    total = len(set(paths))
    hint = " (is the dataset's root folder right?)" if not any(map(Path.exists, paths)) else ""
    raise UserError(f"{source}: {len(problems)} of {total} pictures cannot be read{hint}: {shown}{more}")


def prepare_image(picture: Image.Image, height: int, width: int) -> Tensor:
    """RGB picture to a normalised 3×height×width float32 tensor; a size of 0 or less keeps the picture's own.

    Bilinear with antialiasing, to [0, 1], then ImageNet's mean and standard deviation.
    """
    if height > 0 and width > 0:
        picture = functional.resize(picture, [height, width])
    # In NumPy, with the result of torchvision's to_tensor and normalize bit for bit: torch would start a team
    # of threads of its own in each loading thread.
    pixels = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1)  # H×W×3 → 3×H×W
    pixels = np.divide(pixels, np.float32(255), order="C")
    pixels -= np.asarray(IMAGENET_MEAN, dtype=np.float32)[:, None, None]
    pixels /= np.asarray(IMAGENET_STD, dtype=np.float32)[:, None, None]
    return torch.from_numpy(pixels)


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
        self.paths = tuple(paths)
        self.height = height
        self.width = width
        self.exif_rotation = exif_rotation
        self.change = change

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        picture = read_image(self.paths[index], self.exif_rotation)
        if self.change is not None:
            if min(self.height, self.width) > 0:
                picture = functional.resize(picture, [self.height, self.width])
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
    if threads < 1:
        for batch in batches:
            yield batch, torch.stack([dataset[index][1] for index in batch])
        return
    ahead = 2 + threads // batch_size  # batches under way: enough for every thread and for the next one to be ready
    pool = ThreadPoolExecutor(threads)
    under_way: deque[tuple[list[int], list[Future[tuple[int, Tensor]]]]] = deque()
    try:
        for batch in batches:
            under_way.append((batch, [pool.submit(dataset.__getitem__, index) for index in batch]))
            if len(under_way) > ahead:
                yield _finished(*under_way.popleft())
        while under_way:
            yield _finished(*under_way.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(batch: list[int], loading: list[Future[tuple[int, Tensor]]]) -> tuple[list[int], Tensor]:
    return batch, torch.stack([future.result()[1] for future in loading])


def _batches_of_one_size(
    dataset: ImageDataset, indices: Sequence[int], batch_size: int, threads: int
) -> list[list[int]]:
    """Indices in batches of one picture size, read from the files' headers."""

    def size(index: int) -> tuple[int, int]:
        with _opened(dataset.paths[index]) as picture:
            turned = dataset.exif_rotation and _orientation(picture) in _SIDEWAYS
            return picture.size[::-1] if turned else picture.size

    batches: list[list[int]] = []
    filling: dict[tuple[int, int], list[int]] = {}  # the newest batch of each size
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for index, picture_size in zip(indices, pool.map(size, indices), strict=True):
            batch = filling.get(picture_size)
            if batch is None or len(batch) == batch_size:
                batch = filling[picture_size] = []
                batches.append(batch)
            batch.append(index)
    return batches


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
        raise UserError(f"{path}: not a picture, or of a kind that cannot be read") from error
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
            _to_rgb(picture)
    except UserError as error:
        return str(error)
    return None


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1, as stored, when the picture does not tell or its EXIF is broken."""
    try:
        return int(picture.getexif().get(_ORIENTATION_TAG, 1))
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error):
        return 1


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        values = np.asarray(picture, dtype=np.int64).clip(0, 65535)
        picture = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    else:
        picture.load()
        picture.info.pop("transparency", None)  # Pillow warns of dropping it
    return picture.convert("RGB")
