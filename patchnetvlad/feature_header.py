"""The manifest of a feature folder: what made the features, and which pictures are finished.

``manifest.jsonl`` holds one JSON object a line. The first line, the header, says which checkpoint, settings and
picture list made the folder; every further line is a picture whose files are all in place. Lines are only appended,
so that a run which was killed leaves at worst a torn last line, which reading ignores.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from patchnetvlad.errors import UserError
from patchnetvlad.feature_files import num_bands
from patchnetvlad.patch_grid import EncoderGeometry, PatchGrid

MANIFEST_NAME = "manifest.jsonl"
FEATURE_DTYPES = ("float32", "float16", "int8")

_FORMAT = "patchnetvlad features"
_VERSION = 2
_DAMAGED = "edited or damaged; restore it, or extract again with --overwrite"


@dataclass(frozen=True)
class StoreHeader:
    """What makes the features of one picture list: two runs with equal headers may share a folder.

    checkpoint_sha256: hash of the model's file, "" for a model without one; settings: further settings that decide
    the descriptors (backbone, pooling, picture size, …) as JSON values; names and feature_names: one for each
    picture, as in the list and as in its files; num_dims: D; patch_sizes and strides: one for each scale, both empty
    for a purely global store; dtype: how patch descriptors are stored, one of FEATURE_DTYPES; list_name: told to
    readers of the manifest only.
    """

    checkpoint_sha256: str
    settings: Mapping[str, object]
    names: tuple[str, ...]
    feature_names: tuple[str, ...]
    num_dims: int
    patch_sizes: tuple[int, ...]
    strides: tuple[int, ...]
    geometry: EncoderGeometry
    dtype: str = "float32"
    list_name: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in FEATURE_DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(FEATURE_DTYPES)}")
        if len(self.names) != len(self.feature_names) or len(self.patch_sizes) != len(self.strides):
            raise ValueError("names and feature_names, patch_sizes and strides must be of equal length")
        # A picture may be listed twice; two pictures must not share files.
        if len(set(self.feature_names)) != len(set(zip(self.names, self.feature_names, strict=True))):
            raise ValueError("feature_names must differ from picture to picture")
        if any("/" in name or "\\" in name or "\0" in name for name in self.feature_names):
            raise ValueError("feature_names must be plain file names")
        if len(set(self.patch_sizes)) != len(self.patch_sizes):
            raise UserError(f"patch_sizes: {list(self.patch_sizes)} names a size twice (files are named by it)")

    def grids(self, map_size: tuple[int, int]) -> tuple[PatchGrid, ...]:
        """Where the patches lie on a feature map of (height, width), one grid for each patch size."""
        return tuple(
            PatchGrid(*map_size, patch_size, stride, self.geometry)
            for patch_size, stride in zip(self.patch_sizes, self.strides, strict=True)
        )


@dataclass(frozen=True)
class ManifestHeader:
    """A StoreHeader as the manifest keeps it: the names are in the lines, here only their number and hash."""

    checkpoint_sha256: str
    settings: Mapping[str, object]
    num_pictures: int
    names_sha256: str
    num_dims: int
    patch_sizes: tuple[int, ...]
    strides: tuple[int, ...]
    geometry: EncoderGeometry
    dtype: str

    @classmethod
    def of(cls, header: StoreHeader) -> "ManifestHeader":
        """The header as it would be read back from a manifest."""
        return cls(
            header.checkpoint_sha256,
            json.loads(json.dumps(dict(header.settings))),
            len(header.names),
            hashlib.sha256(json.dumps(header.names).encode("ascii")).hexdigest(),
            header.num_dims,
            header.patch_sizes,
            header.strides,
            header.geometry,
            header.dtype,
        )


@dataclass(frozen=True)
class ManifestEntry:
    """One finished picture.

    map_size: (height, width) of its feature map, None in a purely global store; scales: for int8, those of
    each patch size (one for each band of dimensions), otherwise empty.
    """

    index: int
    name: str
    feature_name: str
    map_size: tuple[int, int] | None
    scales: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Manifest:
    """A manifest as read: entries by picture index, the last line of a picture wins; whole_bytes: its length in
    bytes without a torn last line."""

    path: Path
    header: ManifestHeader
    entries: Mapping[int, ManifestEntry]
    whole_bytes: int


def header_line(header: StoreHeader) -> bytes:
    """First line of a new manifest."""
    try:
        software = importlib.metadata.version("patchnetvlad")
    except importlib.metadata.PackageNotFoundError:
        software = "checkout"
    record: dict[str, object] = {
        "format": _FORMAT,
        "version": _VERSION,
        "software": software,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "list": header.list_name,
        **asdict(ManifestHeader.of(header)),
    }
    return json.dumps(record).encode("ascii") + b"\n"


def entry_line(entry: ManifestEntry) -> bytes:
    """Line of a finished picture."""
    record: dict[str, object] = {
        "index": entry.index,
        "name": entry.name,
        "feature_name": entry.feature_name,
        "map": entry.map_size,
    }
    if entry.scales:
        record["scales"] = entry.scales
    return json.dumps(record).encode("ascii") + b"\n"


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a feature folder; None when it has none.

    Raises UserError when the manifest is of another version or damaged elsewhere than in its last line.
    """
    path = folder / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    lines = content.splitlines(keepends=True)
    header = _parse_header(lines[0] if lines else b"", path)
    entries: dict[int, ManifestEntry] = {}
    whole_bytes = len(lines[0])
    for number, line in enumerate(lines[1:], start=2):
        entry = _parse_entry(line, header) if line.endswith(b"\n") else None
        if entry is not None:
            entries[entry.index] = entry
            whole_bytes += len(line)
        elif number < len(lines):
            raise UserError(f"{path}: line {number} does not describe a picture ({_DAMAGED})")
    return Manifest(path, header, entries, whole_bytes)


def _parse_header(line: bytes, path: Path) -> ManifestHeader:
    try:
        record = json.loads(line)
        if record["format"] != _FORMAT:
            raise ValueError(record["format"])
        version = int(record["version"])
        if version == _VERSION:
            header = ManifestHeader(
                checkpoint_sha256=str(record["checkpoint_sha256"]),
                settings=dict(record["settings"]),
                num_pictures=int(record["num_pictures"]),
                names_sha256=str(record["names_sha256"]),
                num_dims=int(record["num_dims"]),
                patch_sizes=tuple(int(size) for size in record["patch_sizes"]),
                strides=tuple(int(stride) for stride in record["strides"]),
                geometry=EncoderGeometry(**record["geometry"]),
                dtype=str(record["dtype"]),
            )
            if header.dtype not in FEATURE_DTYPES or len(header.patch_sizes) != len(header.strides):
                raise ValueError(header)
            return header
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: line 1 is not the header of a feature manifest ({_DAMAGED})") from error
    raise UserError(
        f"{path}: written in format version {version}, this program reads {_VERSION} (made by another version of it)"
    )


def _parse_entry(line: bytes, header: ManifestHeader) -> ManifestEntry | None:
    """The picture of a line, None when the line does not describe one."""
    try:
        record = json.loads(line)
        map_size = record["map"]
        entry = ManifestEntry(
            index=int(record["index"]),
            name=str(record["name"]),
            feature_name=str(record["feature_name"]),
            map_size=None if map_size is None else (int(map_size[0]), int(map_size[1])),
            scales=tuple(tuple(float(scale) for scale in bands) for bands in record.get("scales", ())),
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None
    num_scales = len(header.patch_sizes) if header.dtype == "int8" else 0
    right = (
        0 <= entry.index < header.num_pictures
        and len(entry.scales) == num_scales
        and all(len(bands) == num_bands(header.num_dims) for bands in entry.scales)
        and (entry.map_size is not None or not header.patch_sizes)
        and "/" not in entry.feature_name
    )
    return entry if right else None


def writing_differences(stored: ManifestHeader, wanted: ManifestHeader) -> list[str]:
    """In words, everything that forbids to add pictures to a folder; empty when a run may resume there."""
    differences = _model_differences(stored, wanted)
    for key in ("patch_sizes", "strides", "dtype"):
        there, here = getattr(stored, key), getattr(wanted, key)
        if there != here:
            differences.append(_difference(key, _plain(there), _plain(here)))
    keys = [*wanted.settings, *(key for key in stored.settings if key not in wanted.settings)]
    differences += _setting_differences(stored, wanted, keys)
    if stored.num_pictures != wanted.num_pictures:
        differences.append(_difference("pictures in the list", stored.num_pictures, wanted.num_pictures))
    elif stored.names_sha256 != wanted.names_sha256:
        differences.append("picture list: other names, or another order")
    return differences


def reading_differences(stored: ManifestHeader, expected: StoreHeader) -> list[str]:
    """In words, everything that forbids to use stored features where `expected` is wanted.

    The dtype may differ, patch sizes may be a selection of the stored ones, and only the settings that `expected`
    has are compared; names are not looked at.
    """
    wanted = ManifestHeader.of(expected)
    differences = _model_differences(stored, wanted)
    strides = dict(zip(stored.patch_sizes, stored.strides, strict=True))
    for patch_size, stride in zip(expected.patch_sizes, expected.strides, strict=True):
        if patch_size not in strides:
            differences.append(_difference("patch_sizes", list(stored.patch_sizes), list(expected.patch_sizes)))
            break
        if strides[patch_size] != stride:
            differences.append(_difference(f"stride of patch size {patch_size}", strides[patch_size], stride))
    return differences + _setting_differences(stored, wanted, list(wanted.settings))


def _model_differences(stored: ManifestHeader, wanted: ManifestHeader) -> list[str]:
    differences = []
    if stored.checkpoint_sha256 != wanted.checkpoint_sha256:
        hashes = (value[:12] or "none" for value in (stored.checkpoint_sha256, wanted.checkpoint_sha256))
        differences.append(_difference("checkpoint sha256", *hashes))
    if stored.num_dims != wanted.num_dims:
        differences.append(_difference("descriptor dimensions", stored.num_dims, wanted.num_dims))
    if stored.geometry != wanted.geometry:
        differences.append(_difference("encoder geometry", asdict(stored.geometry), asdict(wanted.geometry)))
    return differences


def _setting_differences(stored: ManifestHeader, wanted: ManifestHeader, keys: Sequence[str]) -> list[str]:
    return [
        _difference(key, stored.settings.get(key, "absent"), wanted.settings.get(key, "absent"))
        for key in keys
        if stored.settings.get(key) != wanted.settings.get(key)
    ]


def _difference(what: str, there: object, here: object) -> str:
    return f"{what}: {there} there, {here} wanted"


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
