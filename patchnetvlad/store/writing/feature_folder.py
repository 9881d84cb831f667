"""A feature folder made ready for writing: one process at a time, nothing mixed, resumed, or grown with its list.

A folder grows when it is opened for a list that has more pictures: rows take their new places in a file beside the
others, and the new manifest, put in place by one rename, decides which of the two belongs to it.
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from patchnetvlad.errors import UserError
from patchnetvlad.files import (
    locked,
    make_folder,
    remove_temporary_files,
    some_of,
    sync_folder,
    writing,
)
from patchnetvlad.image_lists import ImageList, hash_names, unique_feature_names
from patchnetvlad.store.arrays.array_files import (
    GLOBAL_NAME,
    PATCH_GLOB,
    create_rows_file,
    map_rows,
    patch_file_name,
    read_array_info,
)
from patchnetvlad.store.arrays.blocks import (
    BLOCK_GLOB,
    Block,
    damaged_file,
    file_sizes,
)
from patchnetvlad.store.arrays.codecs import CODEC_NAME, Trained, stored_codec, write_patch_codec
from patchnetvlad.store.manifest import (
    MANIFEST_NAME,
    Manifest,
    ManifestEntry,
    StoreHeader,
    block_line,
    entry_line,
    header_line,
    read_manifest,
    short_block_line,
    writing_differences,
)

logger = logging.getLogger(__name__)

PARTIAL_NAME = GLOBAL_NAME + ".partial"
GROWN_NAME = GLOBAL_NAME + ".grown"

_ROWS_AT_ONCE = 4096  # global descriptors that are copied at a time
_NOT_FIRST = "picture list: its first {} are not those in the blocks (new pictures go to the end of the list)"

_WAYS_OUT = "choose another output folder, or replace these features with --overwrite"


@dataclass(frozen=True)
class WritableFolder:
    """A folder that is ready for the features of a header.

    manifest: open at its end; rows: the global descriptors' partial file, None when they are complete already;
    rows_offset: where its first row begins, in bytes; missing: the pictures still to be made; feature_names: of all
    pictures, in the list's order; short_blocks: those of a packed folder that has grown; last: the last picture that
    the manifest names, as `Manifest` says. The files are unbuffered and closed, and the folder released, by the exit
    stack they were opened with.
    """

    manifest: BinaryIO
    rows: BinaryIO | None
    rows_offset: int
    missing: frozenset[int]
    feature_names: Sequence[str]
    short_blocks: Sequence[Block]
    last: int | None


def open_folder(
    folder: Path,
    pictures: ImageList,
    header: StoreHeader,
    trained: Trained | None,
    overwrite: bool,
    files: ExitStack,
) -> WritableFolder:
    """Make a folder, or check that it holds the same features and see which are missing."""
    make_folder(folder)
    files.enter_context(locked(folder))
    remove_temporary_files(folder)
    if overwrite:
        _remove_features(folder)
    _refuse_links(folder)
    entries, blocks, finished, last = _resume(folder, pictures, header, trained)
    feature_names = pictures.feature_names
    if entries:
        feature_names = unique_feature_names(pictures.names, {entry.name: entry.feature_name for entry in entries})
    shape = len(pictures), header.num_dims
    complete, partial = folder / GLOBAL_NAME, folder / PARTIAL_NAME
    source = partial if partial.exists() else complete
    _remove_damaged(source)
    if source.exists():
        finished = _with_rows(source, shape, finished)
        blocks = [block for block in blocks if finished.issuperset(block.pictures)]
        if header.layout == "packed":
            finished = frozenset(index for block in blocks for index in block.pictures)
    else:
        blocks, finished = [], frozenset()
        create_rows_file(partial, shape)
    missing = frozenset(range(len(pictures))) - finished
    if missing and not partial.exists():
        complete.replace(partial)
    rows = files.enter_context(partial.open("r+b", buffering=0)) if partial.exists() else None
    manifest = files.enter_context((folder / MANIFEST_NAME).open("ab", buffering=0))
    rows_offset = 0 if rows is None else read_array_info(partial).offset
    layout = header.block_layout(len(pictures))
    short = list(filter(layout.is_short, blocks))
    return WritableFolder(manifest, rows, rows_offset, missing, feature_names, short, None if short else last)


def _refuse_links(folder: Path) -> None:
    """Raise UserError where a file that is filled in place is a link: what it leads to would be written over."""
    for name in (MANIFEST_NAME, PARTIAL_NAME, GLOBAL_NAME, GROWN_NAME):
        if (folder / name).is_symlink():
            raise UserError(
                f"{folder / name}: is a symbolic link, and would be written through it (link the whole folder, or "
                "replace the features with --overwrite)"
            )


def _remove_damaged(rows: Path) -> None:
    """Remove global descriptors that were cut off: which rows are right is not known, so all are made again."""
    try:
        if rows.exists():
            read_array_info(rows)
    except UserError as error:
        logger.warning("%s: all pictures are described again", error)
        rows.unlink()


def _resume(
    folder: Path, pictures: ImageList, header: StoreHeader, trained: Trained | None
) -> tuple[tuple[ManifestEntry, ...], list[Block], frozenset[int], int | None]:
    """Check the manifest against the header, or start it, or make it the manifest of a longer list.

    Returns its pictures with files of their own, the blocks that are there, the numbers of all pictures whose patch
    descriptors are, and the last one that it names, as `Manifest` says.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        foreign = next(_feature_files(folder), None)
        if foreign is not None:
            raise UserError(
                f"{folder}: holds features without a manifest, such as {foreign.name}, and two kinds must not be "
                f"mixed (made by the published code? {_WAYS_OUT})"
            )
        (folder / PARTIAL_NAME).unlink(missing_ok=True)
        if trained is not None:
            write_patch_codec(folder, trained)
        with writing(folder / MANIFEST_NAME) as file:
            file.write(header_line(header, pictures.names, pictures.source.name))
        return (), [], frozenset(), -1
    _settle_growth(folder, manifest)
    differences = writing_differences(manifest.header, header) + _list_differences(manifest, pictures)
    if differences:
        raise UserError(f"{folder}: holds other features, {'; '.join(differences)} ({_WAYS_OUT})")
    stored_codec(folder, manifest.header.dtype, manifest.header.codec_sha256)
    if manifest.num_pictures < len(pictures):
        entries = _grow(folder, manifest, pictures)
        last = None if header.layout == "packed" else max((entry.index for entry in entries), default=-1)
    else:
        os.truncate(manifest.path, manifest.whole_bytes)  # a torn last line must not run into the next one
        entries, last = tuple(manifest.entries.values()), manifest.last
    if header.layout == "packed":
        layout, there = header.block_layout(len(pictures)), file_sizes(folder)
        whole = [block for block in manifest.blocks.values() if damaged_file(layout, block, there) is None]
        return (), whole, frozenset(index for block in whole for index in block.pictures), last
    return entries, [], frozenset(entry.index for entry in entries if _has_files(folder, header, entry)), last


def _list_differences(manifest: Manifest, pictures: ImageList) -> list[str]:
    if manifest.num_pictures < len(pictures):
        if manifest.header.layout == "packed":
            first = hash_names(pictures.names[: manifest.num_pictures])
            return [] if first == manifest.names_sha256 else [_NOT_FIRST.format(manifest.num_pictures)]
        listed = set(pictures.names)
        absent = [entry.name for entry in manifest.entries.values() if entry.name not in listed]
        return [f"pictures that the list has not: {some_of(absent)}"] if absent else []
    if manifest.num_pictures > len(pictures):
        return [f"pictures in the list: {manifest.num_pictures} there, {len(pictures)} wanted"]
    if manifest.names_sha256 != hash_names(pictures.names):
        return ["picture list: other names, or another order"]
    return []


def _grow(folder: Path, manifest: Manifest, pictures: ImageList) -> tuple[ManifestEntry, ...]:
    """Give finished pictures the places that they have in a longer list; their entries there."""
    known = {entry.name: entry for entry in manifest.entries.values()}
    placed = [(known[name], index) for index, name in enumerate(pictures.names) if name in known]
    entries = tuple(replace(entry, index=index) for entry, index in placed)
    if manifest.header.layout == "packed":
        starts = range(0, manifest.num_pictures, _ROWS_AT_ONCE)
        moves = [(start, min(_ROWS_AT_ONCE, manifest.num_pictures - start), start) for start in starts]
    else:
        moves = [(entry.index, 1, index) for entry, index in placed]
    _grow_rows(folder, manifest, len(pictures), moves)
    layout = manifest.header.block_layout(len(pictures))
    with writing(manifest.path) as file:  # from here on, the grown rows are the manifest's
        file.write(header_line(manifest.header, pictures.names, pictures.source.name))
        file.writelines(map(entry_line, entries))
        for block in manifest.blocks.values():
            file.write(short_block_line(block) if layout.is_short(block) else block_line(block))
    _use_grown_rows(folder)
    return entries


def _grow_rows(folder: Path, manifest: Manifest, count: int, moves: Iterable[tuple[int, int, int]]) -> None:
    """Make the global descriptors of a list of `count` pictures; moves: from which row how many go to which."""
    partial, complete, grown = folder / PARTIAL_NAME, folder / GLOBAL_NAME, folder / GROWN_NAME
    source = partial if partial.exists() else complete
    if not source.exists():
        return
    dims = manifest.header.num_dims
    old = map_rows(source, (manifest.num_pictures, dims), _WAYS_OUT)
    create_rows_file(grown, (count, dims))
    offset = read_array_info(grown).offset
    with grown.open("r+b", buffering=0) as new:
        for first, number, place in moves:
            new.seek(offset + place * old[0].nbytes)
            write_all(new, old[first : first + number].tobytes())
        os.fsync(new.fileno())
    sync_folder(folder)


def _settle_growth(folder: Path, manifest: Manifest) -> None:
    """Complete the growth of a killed run if its manifest is in place, otherwise undo it.

    A list only ever grows, so the number of rows tells whether they are the manifest's.
    """
    grown = folder / GROWN_NAME
    if grown.exists():
        with contextlib.suppress(UserError):  # cut off while it was made
            if read_array_info(grown).shape[0] == manifest.num_pictures:
                _use_grown_rows(folder)
        grown.unlink(missing_ok=True)


def _use_grown_rows(folder: Path) -> None:
    grown = folder / GROWN_NAME
    if grown.exists():
        grown.replace(folder / PARTIAL_NAME)
        (folder / GLOBAL_NAME).unlink(missing_ok=True)


def _has_files(folder: Path, header: StoreHeader, entry: ManifestEntry) -> bool:
    """Whether a picture's patch files are there and whole: a lost machine or a user may have removed them."""
    for grid in header.stored_grids(entry.map_size) if entry.map_size is not None else ():
        try:
            info = read_array_info(folder / patch_file_name(grid.patch_size, entry.feature_name))
        except UserError:
            return False
        if info.shape != (header.codec.width(header.num_dims), len(grid)) or info.dtype != header.codec.dtype:
            return False
    return True


def _with_rows(path: Path, shape: tuple[int, int], finished: Iterable[int]) -> frozenset[int]:
    """Those pictures whose global descriptor was written: a row that a lost machine did not write is all zero."""
    rows = map_rows(path, shape, _WAYS_OUT)
    return frozenset(index for index in finished if rows[index].any())


def _feature_files(folder: Path) -> Iterator[Path]:
    yield from folder.glob(GLOBAL_NAME)
    yield from folder.glob(PATCH_GLOB)
    yield from folder.glob(BLOCK_GLOB)


def _remove_features(folder: Path) -> None:
    # The manifest goes first: what a killed run leaves then counts as foreign, never as finished.
    for name in (MANIFEST_NAME, PARTIAL_NAME, GROWN_NAME, CODEC_NAME):
        (folder / name).unlink(missing_ok=True)
    for path in list(_feature_files(folder)):
        path.unlink()


def write_all(file: BinaryIO, content: bytes) -> None:
    while content:  # an unbuffered write may stop early, the next one then says why
        content = content[file.write(content) :]
