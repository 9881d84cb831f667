"""The manifest of a feature folder: what made the features, and which pictures are finished.

``manifest.jsonl`` holds one JSON object a line. The first line, the header, says which checkpoint, settings and
picture list made the folder; every further line is a picture, or in a packed folder a block of pictures, whose files
are all in place. Lines are only appended, so that a run which was killed leaves at worst a torn last line, which
reading ignores.
"""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path

from patchnetvlad.config_values import code_form
from patchnetvlad.errors import UserError
from patchnetvlad.files import told
from patchnetvlad.image_lists import hash_names
from patchnetvlad.patch_codes import coded_for, coded_grids
from patchnetvlad.patch_grid import EncoderGeometry, PatchGrid
from patchnetvlad.store.arrays.blocks import Block, BlockLayout
from patchnetvlad.store.arrays.codecs import Codec, LearnedCodec, codec_of
from patchnetvlad.store.arrays.map_codes import map_grid

MANIFEST_NAME = "manifest.jsonl"

_FORMAT = "patchnetvlad features"
_VERSION = 2
_DAMAGED = "edited or damaged; restore it, or extract again with --overwrite"


@dataclass(frozen=True)
class StoreHeader:
    """What makes features, of whatever picture list: two folders with equal headers may be compared.

    checkpoint_sha256: hash of the model's file, "" for a model without one; settings: further settings that decide
    the descriptors (backbone, pooling, picture size, …) as JSON values; num_dims: D; patch_sizes and strides: one for
    each scale, both empty for a purely global store; dtype: how patch descriptors are stored, float32,
    float16, int8, pqN or mapN; codec_sha256: hash of the quantiser of codes, "" for others and where any will do.
    layout: "files", for each picture its own, or "packed", blocks of pictures.
    Of a header that is expected and not stored, checkpoint_sha256 = None and num_dims = 0 stand for any.
    """

    checkpoint_sha256: str | None
    settings: Mapping[str, object]
    num_dims: int
    patch_sizes: tuple[int, ...]
    strides: tuple[int, ...]
    geometry: EncoderGeometry
    dtype: str = "float32"
    codec_sha256: str = ""
    layout: str = "files"

    def __post_init__(self) -> None:
        codec_of(self.dtype)
        if self.layout not in ("files", "packed"):
            raise ValueError(f"layout {self.layout}: expected files or packed")
        if len(self.patch_sizes) != len(self.strides):
            raise ValueError("patch_sizes and strides must be of equal length")
        if len(set(self.patch_sizes)) != len(self.patch_sizes):
            raise UserError(f"patch_sizes: {list(self.patch_sizes)} names a size twice (files are named by it)")

    @property
    def codec(self) -> Codec | LearnedCodec:
        """How patch descriptors are stored; that of codes is not trained and knows sizes only."""
        return codec_of(self.dtype)

    def block_layout(self, num_pictures: int) -> BlockLayout:
        """How the blocks of a packed folder of so many pictures are laid out."""
        return BlockLayout(
            num_pictures,
            self.codec.width(self.num_dims),
            self.codec.dtype,
            lru_cache(maxsize=1024)(lambda map_size: tuple(map(len, self.stored_grids(map_size)))),
            self.codec.num_scales(self.num_dims) * len(self.patch_sizes),
        )

    def grids(self, map_size: tuple[int, int]) -> tuple[PatchGrid, ...]:
        """Where the patches lie on a feature map of (height, width), one grid for each patch size."""
        return PatchGrid.of_map(map_size, self.patch_sizes, self.strides, self.geometry)

    def stored_grids(self, map_size: tuple[int, int]) -> tuple[PatchGrid, ...]:
        """What is stored: all patches, and with codes those that all can be estimated from, or the map's positions."""
        grids = self.grids(map_size)
        form = code_form(self.dtype)
        if form is None:
            return grids
        return map_grid(grids) if form.kind == "map" else coded_grids(grids)

    def grids_to_read(self, map_size: tuple[int, int], patch_sizes: Sequence[int]) -> tuple[PatchGrid, ...]:
        """Those of the stored grids that a selection of the patch sizes needs, in that order without codes."""
        wanted = {grid.patch_size: grid for grid in self.grids(map_size)}
        stored = self.stored_grids(map_size)
        form = code_form(self.dtype)
        if form is None:
            return tuple(wanted[size] for size in patch_sizes)
        if form.kind == "map":
            return stored
        needed = {coded_for(wanted[size], stored) for size in patch_sizes if len(wanted[size])}
        return tuple(grid for grid in stored if grid in needed)

    @property
    def coded(self) -> bool:
        """Whether patch descriptors are stored as codes."""
        return code_form(self.dtype) is not None


@dataclass(frozen=True)
class ManifestEntry:
    """One finished picture.

    map_size: (height, width) of its feature map, None in a purely global store; scales: the codec's for each patch
    size, empty where the codec has none.
    """

    index: int
    name: str
    feature_name: str
    map_size: tuple[int, int] | None
    scales: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Manifest:
    """A manifest as read.

    num_pictures and names_sha256: of the picture list, see `hash_names`; entries: by picture index, the last line of
    a picture wins; blocks: by number, those of a packed folder, which has no entries; whole_bytes: the manifest's
    length in bytes without a torn last line; last: the last picture that a line names, −1 where there is none, and
    None unless the lines are in the order of the list, one for each picture or block.
    """

    path: Path
    header: StoreHeader
    num_pictures: int
    names_sha256: str
    entries: Mapping[int, ManifestEntry]
    blocks: Mapping[int, Block]
    whole_bytes: int
    last: int | None


def header_line(header: StoreHeader, names: Sequence[str], list_name: str) -> bytes:
    """First line of a new manifest; list_name is for people only."""
    try:
        software = importlib.metadata.version("patchnetvlad")
    except importlib.metadata.PackageNotFoundError:
        software = "checkout"
    record: dict[str, object] = {
        "format": _FORMAT,
        "version": _VERSION,
        "software": software,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "list": list_name,
        "num_pictures": len(names),
        "names_sha256": hash_names(names),
        **asdict(header),
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


def block_line(block: Block) -> bytes:
    """Line of a finished block."""
    return json.dumps({"block": block.number, "maps": block.maps}).encode("ascii") + b"\n"


def short_block_line(block: Block) -> bytes:
    """Line of a block that was the last one of a shorter list."""
    return json.dumps({"block": block.number, "maps": block.maps, "short": True}).encode("ascii") + b"\n"


def has_manifest(folder: Path) -> bool:
    """Whether something says what made the features of a folder; the published code wrote nothing."""
    return (folder / MANIFEST_NAME).exists()


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a feature folder; None when it has none.

    Raises UserError when the manifest is of another version or damaged elsewhere than at its end.
    """
    if not has_manifest(folder):
        return None
    path = folder / MANIFEST_NAME
    with told(path, "cannot be read"):
        content = path.read_bytes()
    # Where a machine was lost while it wrote, a file may end in zero bytes.
    lines = content.partition(b"\0")[0].splitlines(keepends=True)
    header, num_pictures, names_sha256 = _parse_header(lines[0] if lines else b"", path)
    layout = header.block_layout(num_pictures)
    entries: dict[int, ManifestEntry] = {}
    blocks: dict[int, Block] = {}
    whole_bytes = len(lines[0])
    last: int | None = -1
    for number, line in enumerate(lines[1:], start=2):
        record: Block | ManifestEntry | None = None
        if line.endswith(b"\n"):
            packed = header.layout == "packed"
            record = _parse_block(line, layout) if packed else _parse_entry(line, header, num_pictures)
        if isinstance(record, Block):
            blocks[record.number] = record
            last = _later(last, record.pictures)
        elif record is not None:
            entries[record.index] = record
            last = _later(last, range(record.index, record.index + 1))
        elif number < len(lines):
            raise UserError(f"{path}: line {number} does not describe a picture or block ({_DAMAGED})")
        else:
            break
        whole_bytes += len(line)
    return Manifest(path, header, num_pictures, names_sha256, entries, blocks, whole_bytes, last)


def first_line(folder: Path) -> bytes:
    """What says what made the features of a folder, as it is; empty where there is no manifest."""
    path = folder / MANIFEST_NAME
    with told(path, "cannot be read"):
        if not path.exists():
            return b""
        with path.open("rb") as file:
            return file.readline()


def _later(last: int | None, pictures: range) -> int | None:
    """The last picture, with these behind it; None where they are not, or others come between."""
    return None if last is None or pictures[0] <= last else pictures[-1]


def in_list_order(content: bytes) -> bytes:
    """A whole manifest with a line for each picture or block, by its number; of several the last one counts."""
    header, *lines = content.splitlines(keepends=True)
    numbered = {}
    for line in lines:
        record = json.loads(line)
        numbered[record["block"] if "block" in record else record["index"]] = line
    return header + b"".join(line for _, line in sorted(numbered.items()))


def _parse_header(line: bytes, path: Path) -> tuple[StoreHeader, int, str]:
    """The header, the number of pictures and the hash of their names."""
    try:
        record = json.loads(line)
        if record["format"] != _FORMAT:
            raise ValueError(record["format"])
        version = int(record["version"])
        if version == _VERSION:
            header = StoreHeader(
                checkpoint_sha256=str(record["checkpoint_sha256"]),
                settings=dict(record["settings"]),
                num_dims=int(record["num_dims"]),
                patch_sizes=tuple(int(size) for size in record["patch_sizes"]),
                strides=tuple(int(stride) for stride in record["strides"]),
                geometry=EncoderGeometry(**record["geometry"]),
                dtype=str(record["dtype"]),
                codec_sha256=str(record.get("codec_sha256", "")),
                layout=str(record.get("layout", "files")),
            )
            return header, int(record["num_pictures"]), str(record["names_sha256"])
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError, UserError) as error:
        raise UserError(f"{path}: line 1 is not the header of a feature manifest ({_DAMAGED})") from error
    raise UserError(
        f"{path}: written in format version {version}, this program reads {_VERSION} (made by another version of it)"
    )


def _parse_entry(line: bytes, header: StoreHeader, num_pictures: int) -> ManifestEntry | None:
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
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return None
    num_scales = header.codec.num_scales(header.num_dims)
    right = (
        0 <= entry.index < num_pictures
        and len(entry.scales) == (len(header.patch_sizes) if num_scales else 0)
        and all(len(scales) == num_scales for scales in entry.scales)
        and (entry.map_size is not None or not header.patch_sizes)
        and "/" not in entry.feature_name
    )
    return entry if right else None


def _parse_block(line: bytes, layout: BlockLayout) -> Block | None:
    """The block of a line, None when the line does not describe one."""
    try:
        record = json.loads(line)
        runs = tuple((int(height), int(width), int(count)) for height, width, count in record["maps"])
        block = Block(int(record["block"]), runs)
        pictures = len(layout.pictures(block.number))
        right = block.num_pictures == pictures or (record.get("short") is True and 0 < block.num_pictures < pictures)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return None
    return block if block.number >= 0 and pictures and right else None


def writing_differences(stored: StoreHeader, wanted: StoreHeader) -> list[str]:
    """In words, everything that forbids to add pictures to a folder; empty when a run may resume there."""
    differences = _model_differences(stored, wanted)
    for key in ("patch_sizes", "strides", "dtype", "layout"):
        there, here = getattr(stored, key), getattr(wanted, key)
        if there != here:
            differences.append(_difference(key, _plain(there), _plain(here)))
    if stored.dtype == wanted.dtype and stored.codec_sha256 != wanted.codec_sha256:
        differences.append("codec of the patch descriptors: another one")
    keys = [*wanted.settings, *(key for key in stored.settings if key not in wanted.settings)]
    return differences + _setting_differences(stored, wanted, keys)


def reading_differences(stored: StoreHeader, expected: StoreHeader) -> list[str]:
    """In words, everything that forbids to use stored features where `expected` is wanted.

    The dtype may differ, patch sizes may be a selection of the stored ones, and only the settings that `expected`
    has are compared.
    """
    differences = _model_differences(stored, expected)
    strides = dict(zip(stored.patch_sizes, stored.strides, strict=True))
    for patch_size, stride in zip(expected.patch_sizes, expected.strides, strict=True):
        if patch_size not in strides:
            differences.append(_difference("patch_sizes", list(stored.patch_sizes), list(expected.patch_sizes)))
            break
        if strides[patch_size] != stride:
            differences.append(_difference(f"stride of patch size {patch_size}", strides[patch_size], stride))
    return differences + _setting_differences(stored, expected, list(expected.settings))


def _model_differences(stored: StoreHeader, wanted: StoreHeader) -> list[str]:
    differences = []
    if wanted.checkpoint_sha256 not in (None, stored.checkpoint_sha256):
        hashes = ((value or "")[:12] or "none" for value in (stored.checkpoint_sha256, wanted.checkpoint_sha256))
        differences.append(_difference("checkpoint sha256", *hashes))
    if wanted.num_dims not in (0, stored.num_dims):
        differences.append(_difference("descriptor dimensions", stored.num_dims, wanted.num_dims))
    if stored.geometry != wanted.geometry:
        differences.append(_difference("encoder geometry", asdict(stored.geometry), asdict(wanted.geometry)))
    return differences


def _setting_differences(stored: StoreHeader, wanted: StoreHeader, keys: Sequence[str]) -> list[str]:
    wanted_settings = json.loads(json.dumps(dict(wanted.settings)))  # tuples become lists, as in the manifest
    return [
        _difference(key, stored.settings.get(key, "absent"), wanted_settings.get(key, "absent"))
        for key in keys
        if stored.settings.get(key) != wanted_settings.get(key)
    ]


def _difference(what: str, there: object, here: object) -> str:
    return f"{what}: {there} there, {here} wanted"


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
