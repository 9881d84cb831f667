"""Patch descriptors of pictures that were described on demand, kept on disk up to a limit from run to run."""

import contextlib
import hashlib
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from threading import Lock

import numpy as np

from patchnetvlad.files import writing

FOLDER_NAME = "described"

_ENDING = ".npz"


class DiskCache:
    """The pictures described last, as many as fit into max_bytes; of a folder that holds more, the oldest go first.

    A picture is known by its path, length and time of change and by what described it, so that one that was replaced,
    or another model, finds nothing. What is damaged counts as missing. Other processes may use the folder too; then
    each keeps to the limit with what it has seen. Full or read-only disks are errors, UserError in one line.
    """

    def __init__(self, folder: Path, max_bytes: int, described_by: str) -> None:
        """described_by: the model and the settings, in any words."""
        self._folder, self._max_bytes, self._described_by = folder, max_bytes, described_by
        self._lock = Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the oldest first
        if folder.is_dir():
            kept = [(entry.stat(), entry.name) for entry in os.scandir(folder) if entry.name.endswith(_ENDING)]
            kept.sort(key=lambda info_and_name: info_and_name[0].st_mtime_ns)
            self._sizes.update((name, info.st_size) for info, name in kept)
        self._shrink()

    def get(self, picture: Path) -> tuple[tuple[int, int], tuple[np.ndarray, ...]] | None:
        """Feature map (height, width) and P×D float32 for each patch size; None where they are not kept."""
        name = self._name(picture)
        path = self._folder / name
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
                height, width = content["map"].tolist()
                arrays = tuple(content[f"size{place}"] for place in range(len(content.files) - 1))
            os.utime(path)
        except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile):
            return None
        with self._lock:
            self._sizes[name] = path.stat().st_size if name not in self._sizes else self._sizes[name]
            self._sizes.move_to_end(name)
        return (height, width), arrays

    def put(self, picture: Path, map_size: tuple[int, int], arrays: tuple[np.ndarray, ...]) -> None:
        """Keep a picture, and drop the oldest ones that this leaves no room for."""
        if sum(array.nbytes for array in arrays) > self._max_bytes:
            return
        name = self._name(picture)
        named = {f"size{place}": array for place, array in enumerate(arrays)}
        with writing(self._folder / name, durable=False) as file:
            np.savez(file, map=np.array(map_size), **named)  # type: ignore[arg-type]  # numpy's stub
        with self._lock:
            self._sizes[name] = (self._folder / name).stat().st_size
            self._sizes.move_to_end(name)
        self._shrink()

    def _shrink(self) -> None:
        with self._lock:
            while self._sizes and sum(self._sizes.values()) > self._max_bytes:
                name, _ = self._sizes.popitem(last=False)
                with contextlib.suppress(OSError):  # another process was faster
                    (self._folder / name).unlink()

    def _name(self, picture: Path) -> str:
        info = picture.stat()
        identity = repr((self._described_by, str(picture.resolve()), info.st_size, info.st_mtime_ns))
        return hashlib.sha256(identity.encode()).hexdigest() + _ENDING
