"""A search index over global descriptors that is made once: built, saved in shards, and opened without being read.

``NAME.json`` says what the index was made of; the shards beside it are files of faiss, for consecutive pictures each.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.config import BUILT_INDEX
from patchnetvlad.errors import UserError
from patchnetvlad.faiss_library import faiss
from patchnetvlad.files import make_folder, read_text, replacing, told, write_text
from patchnetvlad.retrieval import Float32Rows, exact_rows, faiss_reason
from patchnetvlad.store.manifest import hash_names

logger = logging.getLogger(__name__)

_FORMAT = "patchnetvlad search index"
_VERSION = 2
_TRAINED_ON = 1 << 18  # pictures at most; faiss itself takes no more than 256 for each list or centroid
_ROWS_AT_ONCE = 1 << 16  # rows added at a time
_HASHED_ROWS = 64  # rows whose bytes stand for all: each may be a read of the disk when an index is opened
_TRIALS = 500  # queries whose neighbours tell the recall
_LIKENESS = 0.5  # of a made query to a picture, as of a place at another time
_MIXED = 1024  # pictures whose covariance the rest of it has
_WIDENINGS = (1, 2, 3, 4, 6, 8, 12, 16)  # candidates looked up for each one wanted
_FEWEST_CODED = 10_000  # pictures below which a byte a dimension is short enough
_FEWEST_IN_CELLS = 4_000_000  # pictures from which on comparing all takes too long
_EFFORTS = ("nprobe", "efSearch")  # what faiss calls the effort of a search
_DAMAGED = "edited or damaged; build the index again"


@dataclass(frozen=True)
class IndexRecord:
    """What an index was made of, and how it is searched.

    factory: faiss's factory string; num_pictures and num_dims: N and D of the descriptors; names_sha256 and
    rows_sha256: of the picture list, and of some of the descriptors; parameters: faiss's effort of a search;
    widening: rows that are looked up and compared exactly for each one wanted; recall: the share of the exact
    `neighbours` nearest that were found for the queries that it was tuned with; shards: files and their lengths in
    bytes.
    """

    factory: str
    num_pictures: int
    num_dims: int
    names_sha256: str
    rows_sha256: str
    parameters: dict[str, int]
    widening: int
    recall: float
    neighbours: int
    shards: tuple[tuple[str, int], ...]

    @property
    def num_bytes(self) -> int:
        """Of all shards."""
        return sum(size for _, size in self.shards)


class SearchIndex:
    """An index at work; an `ApproximateSearch` of `retrieval`."""

    def __init__(self, record: IndexRecord, shards: Sequence[faiss.Index]) -> None:
        self.record = record
        self._shards = list(shards)  # faiss keeps pointers to them only
        if len(self._shards) == 1:
            self._index = self._shards[0]
        else:
            self._index = faiss.IndexShards(record.num_dims)
            self._index.successive_ids = True  # rows are counted on from shard to shard
            for shard in self._shards:
                self._index.add_shard(shard)
        self._set(record.parameters)

    def search(self, queries: Float32Rows, count: int) -> NDArray[np.int64]:
        """Rows that are probably among the `count` nearest of each query (N×D), and some more, −1 for none."""
        wanted = min(count * self.record.widening, self.record.num_pictures)
        _, rows = self._index.search(np.ascontiguousarray(queries, dtype=np.float32), wanted)
        return np.asarray(rows, dtype=np.int64)

    def tuned(self, database: Float32Rows, queries: Float32Rows, neighbours: int, recall: float) -> "SearchIndex":
        """With the least effort that finds this share of the queries' nearest pictures, or the greatest there is."""
        neighbours = min(neighbours, len(database))
        if neighbours < 1:
            return self
        nearest = exact_rows(queries, database, neighbours)
        best = replace(self.record, widening=_WIDENINGS[-1], neighbours=neighbours)
        for parameters in self._efforts():
            best = replace(best, parameters=parameters)
            best = replace(best, recall=self._measure(best, queries, nearest))
            if best.recall >= recall:
                break
        for widening in _WIDENINGS[:-1]:
            narrower = replace(best, widening=widening)
            reached = self._measure(narrower, queries, nearest)
            if reached >= min(recall, best.recall):
                best = replace(narrower, recall=reached)
                break
        return SearchIndex(best, self._shards)

    def _measure(self, record: IndexRecord, queries: Float32Rows, nearest: NDArray[np.int64]) -> float:
        """Share of the nearest rows that a search finds before the exact comparison puts them in order."""
        neighbours = SearchIndex(record, self._shards).search(queries, nearest.shape[1])
        hits = sum(len(np.intersect1d(*rows)) for rows in zip(neighbours, nearest, strict=True))
        return hits / nearest.size

    def _efforts(self) -> Iterator[dict[str, int]]:
        space = faiss.ParameterSpace()
        space.initialize(self._shards[0])
        for position in range(space.parameter_ranges.size()):
            offered = space.parameter_ranges.at(position)
            if offered.name in _EFFORTS:
                values = faiss.vector_to_array(offered.values).astype(int).tolist()
                if offered.name == "nprobe":  # faiss offers fewer than all cells
                    values.append(faiss.extract_index_ivf(self._shards[0]).nlist)
                for value in values:
                    yield {offered.name: value}
                return
        yield {}

    def _set(self, parameters: dict[str, int]) -> None:
        space = faiss.ParameterSpace()
        for shard in self._shards:
            for name, value in parameters.items():
                space.set_index_parameter(shard, name, value)


def default_factory(num_pictures: int, num_dims: int) -> str:
    """All descriptors in short codes that a processor compares at once; in cells too where there are millions of them.

    What the codes confuse the exact comparison puts right, so that a wider search makes up for them.
    """
    if num_pictures < _FEWEST_CODED or num_dims % 2:
        return "SQ8"
    codes = f"PQ{num_dims // 2}x4fs"
    if num_pictures < _FEWEST_IN_CELLS:
        return codes
    return f"IVF{1 << round(math.log2(4 * math.sqrt(num_pictures)))},{codes}"


def build_index(
    database: Float32Rows,
    names: Sequence[str],
    path: Path,
    factory: str | None = None,
    shards: int = 1,
    neighbours: int = 100,
    recall: float = 0.99,
    queries: Float32Rows | None = None,
) -> SearchIndex:
    """Build, save and tune an index of N×D descriptors, which may be memory-mapped.

    path: the .json file, beside which the shards go; factory: None for `default_factory`; shards: parts of which one
    at a time is in memory; neighbours and recall: the search takes the least effort that finds this share of the
    exact nearest ones; queries: descriptors like those that will be searched, None for made ones.

    Raises UserError where faiss cannot make the index, and when files cannot be written.
    """
    if path.suffix != BUILT_INDEX:
        raise ValueError(f"{path} does not end in {BUILT_INDEX}")
    factory = default_factory(*database.shape) if factory is None else factory
    shards = max(1, min(shards, len(database)))
    try:
        trained = faiss.index_factory(database.shape[1], factory)
        if not trained.is_trained:
            trained.train(_sample(database))
        files = _write_shards(trained, database, path, shards)
        record = IndexRecord(
            factory=factory,
            num_pictures=len(database),
            num_dims=database.shape[1],
            names_sha256=hash_names(names),
            rows_sha256=_rows_sha256(database),
            parameters={},
            widening=1,
            recall=1.0,
            neighbours=0,
            shards=files,
        )
        trials = _made_queries(database) if queries is None else queries[:: max(1, len(queries) // _TRIALS)][:_TRIALS]
        index = SearchIndex(record, _open_shards(path, files)).tuned(database, trials, neighbours, recall)
    except RuntimeError as error:
        raise UserError(
            f"--factory {factory}: faiss cannot make this index of {len(database)} pictures of {database.shape[1]} "
            f"dimensions: {faiss_reason(error)}"
        ) from error
    content = {"format": _FORMAT, "version": _VERSION, **asdict(index.record)}
    write_text(path, json.dumps(content, indent=1) + "\n")
    return index


def open_index(path: Path, database: Float32Rows, names: Sequence[str]) -> SearchIndex:
    """Open a built index for a database; its shards are memory-mapped.

    Raises UserError, in one line, when it is of another list or model, damaged or cut short.
    """
    record = _read_record(path)
    if record.num_pictures != len(database) or record.names_sha256 != hash_names(names):
        raise UserError(
            f"{path}: is an index of another list ({record.num_pictures} pictures there, {len(database)} here; build "
            "it again with tools/build_index.py)"
        )
    if record.num_dims != database.shape[1] or record.rows_sha256 != _rows_sha256(database):
        raise UserError(
            f"{path}: is an index of other descriptors of these pictures (extracted with another model or "
            "configuration since; build it again with tools/build_index.py)"
        )
    try:
        return SearchIndex(record, _open_shards(path, record.shards))
    except RuntimeError as error:
        raise UserError(f"{path}: faiss cannot open its shards: {faiss_reason(error)} ({_DAMAGED})") from error


def _write_shards(trained: faiss.Index, database: Float32Rows, path: Path, shards: int) -> tuple[tuple[str, int], ...]:
    """Add the rows to copies of a trained index, one shard at a time; returns files and lengths."""
    make_folder(path.parent)
    with told(path):
        path.unlink(missing_ok=True)  # an index without its record is none: nobody opens what is half replaced
        for old in path.parent.glob(f"{path.stem}.*.faiss"):
            old.unlink()
    files = []
    bounds = np.linspace(0, len(database), shards + 1).astype(int).tolist()
    for number, (first, end) in enumerate(pairwise(bounds)):
        index = trained if shards == 1 else faiss.clone_index(trained)
        for start in range(first, end, _ROWS_AT_ONCE):
            index.add(np.ascontiguousarray(database[start : min(end, start + _ROWS_AT_ONCE)], dtype=np.float32))
        file = path.with_name(f"{path.stem}.{number:03}.faiss")
        with replacing(file) as temporary:
            faiss.write_index(index, str(temporary))
        files.append((file.name, file.stat().st_size))
        logger.info("%s: %d pictures, %.1f MB", file, end - first, file.stat().st_size / 1e6)
    return tuple(files)


def _open_shards(path: Path, files: Sequence[tuple[str, int]]) -> list[faiss.Index]:
    shards = []
    for name, num_bytes in files:
        file = path.with_name(name)
        size = file.stat().st_size if file.exists() else None
        if size != num_bytes:
            fault = "is missing" if size is None else f"has {size} bytes, {path.name} says {num_bytes}"
            raise UserError(f"{file}: {fault} (interrupted copy, or part of another index; build the index again)")
        shards.append(faiss.read_index(str(file), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY))
    return shards


def _read_record(path: Path) -> IndexRecord:
    try:
        content = json.loads(read_text(path, "a search index"))
        if content.pop("format") != _FORMAT:
            raise ValueError(content)
        version = content.pop("version")
        if version == _VERSION:
            parameters = {str(name): int(value) for name, value in content["parameters"].items()}
            shards = tuple((Path(str(name)).name, int(size)) for name, size in content["shards"])
            return IndexRecord(**{**content, "parameters": parameters, "shards": shards})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: does not describe a search index ({_DAMAGED})") from error
    raise UserError(f"{path}: written in format version {version}, this program reads {_VERSION} (build it again)")


def _sample(database: Float32Rows) -> NDArray[np.float32]:
    if len(database) <= _TRAINED_ON:
        return np.ascontiguousarray(database, dtype=np.float32)
    chosen = np.random.default_rng(0).choice(len(database), _TRAINED_ON, replace=False)
    return np.ascontiguousarray(database[np.sort(chosen)], dtype=np.float32)


def _made_queries(database: Float32Rows) -> Float32Rows:
    """Half a picture, half noise of the pictures' covariance: as queries are less like a database than it is to itself.

    What finds their neighbours finds those of pictures of the database too; the other way round it is not so.
    """
    rng = np.random.default_rng(0)
    count = min(_TRIALS, len(database))
    near, mixed = (np.sort(rng.choice(len(database), min(many, len(database)), False)) for many in (count, _MIXED))
    pictures = np.asarray(database[mixed], dtype=np.float32)
    noise = rng.standard_normal((count, len(pictures)), dtype=np.float32) @ (pictures - pictures.mean(axis=0))
    noise /= np.maximum(np.linalg.norm(noise, axis=1, keepdims=True), np.float32(1e-12))
    return np.asarray(_LIKENESS * database[near] + np.float32(math.sqrt(1 - _LIKENESS**2)) * noise, dtype=np.float32)


def _rows_sha256(database: Float32Rows) -> str:
    rows = np.unique(np.linspace(0, max(0, len(database) - 1), _HASHED_ROWS).astype(int))
    chosen = database[rows] if len(database) else database
    return hashlib.sha256(np.ascontiguousarray(chosen, dtype=np.float32).tobytes()).hexdigest()
