"""Rankings, scores and recalls as files for people and other tools; the only module that knows these formats.

- Kapture pairs: `#` header lines, then `query, map, score`. Kapture sorts by score and drops negative ones, so the
  score is 1/rank, not the similarity.
- Published pairs: the same without scores, of whole paths, as the authors' release writes them.
- hloc pairs: `query database` on each line, best first.
- MSLS predictions: `query_key database_key database_key …`, keys being base names without extension.
- Scores: an .npz file, see write_scores. Recalls: text, see write_recalls.

Every file appears complete or not at all.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.candidates import Candidates, RankingScores
from patchnetvlad.errors import UserError
from patchnetvlad.files import read_text, some_of, told, write_text, writing
from patchnetvlad.image_lists import ImageList
from patchnetvlad.recall import Recall

RETRIEVAL, RERANKING = "NetVLAD", "PatchNetVLAD"  # names of the two stages
_KAPTURE_HEADER = ("# kapture format: 1.1", "# query_image, map_image, score")
_PUBLISHED_HEADER = ("# kapture format: 1.0", "# query_image, map_image")


@dataclass(frozen=True)
class NamedRanking:
    """Names of one query and of its predictions, best first."""

    query: str
    database: tuple[str, ...]


def name_rankings(
    query_names: Sequence[str], database_names: Sequence[str], indices: NDArray[np.int64]
) -> list[NamedRanking]:
    """Names for predictions nQ×k; entries of −1 are left out."""
    return [
        NamedRanking(query, tuple(database_names[index] for index in row if index >= 0))
        for query, row in zip(query_names, indices.tolist(), strict=True)
    ]


def write_kapture_pairs(path: Path, rankings: Iterable[NamedRanking]) -> None:
    """Raises UserError for a name that this format cannot hold."""

    def lines() -> Iterator[str]:
        yield from _KAPTURE_HEADER
        for ranking in rankings:
            for rank, name in enumerate(ranking.database, start=1):
                yield f"{ranking.query}, {name}, {1 / rank:.10g}"

    rankings = list(rankings)
    _check_kapture_names(path, *_all_names(rankings))
    _write_lines(path, lines())


def _check_kapture_names(place: Path, *sides: Iterable[str]) -> None:
    for name in chain(*sides):
        if "," in name or name.startswith("#") or name != name.strip():
            raise UserError(
                f"{place}: picture {name!r}: a name in a Kapture pairs file holds no comma, starts with no # and has "
                "no white space around it (rename the picture, or write hloc pairs)"
            )


def write_hloc_pairs(path: Path, rankings: Iterable[NamedRanking]) -> None:
    """Raises UserError for a name that this format cannot hold."""
    rankings = list(rankings)
    _check_hloc_names(path, *_all_names(rankings))
    _write_lines(path, (f"{ranking.query} {name}" for ranking in rankings for name in ranking.database))


def _check_hloc_names(place: Path, *sides: Iterable[str]) -> None:
    for name in chain(*sides):
        if name.split() != [name] or name.startswith("#") or name.endswith(","):
            raise UserError(
                f"{place}: picture {name!r}: a name in an hloc pairs file holds no white space, starts with no # and "
                "ends with no comma (rename the picture, or write Kapture pairs)"
            )


def write_msls_predictions(path: Path, rankings: Iterable[NamedRanking], append: bool = False) -> None:
    """Write MSLS predictions, or add those of a further city to a file that exists.

    Every row must have the same number of columns: shorter ones repeat their last key, which changes no recall
    and no average precision. Raises UserError for a query without predictions, a query that the file already has,
    white space in a key, and two pictures with one key.
    """
    rows = _msls_rows(path) if append else []
    rankings = list(rankings)
    query_key, database_key = (_key_table(path, names) for names in _all_names(rankings))
    present = {row[0] for row in rows}
    for ranking in rankings:
        key = query_key[ranking.query]
        if not ranking.database:
            raise UserError(f"{path}: {ranking.query} has no prediction: MSLS expects some for every query")
        _check_new_query(path, key, present)
        present.add(key)
        rows.append([key, *(database_key[name] for name in ranking.database)])
    width = max(map(len, rows), default=0)
    _write_lines(path, (" ".join(row + row[-1:] * (width - len(row))) for row in rows))


def check_new_city(path: Path, query_names: Sequence[str], database_names: Sequence[str]) -> None:
    """Raises UserError where `write_msls_predictions` could not add these lists' rankings to a file."""
    present = {row[0] for row in _msls_rows(path)}
    _key_table(path, database_names)
    for key in _key_table(path, query_names).values():
        _check_new_query(path, key, present)


def _check_new_query(path: Path, key: str, present: Collection[str]) -> None:
    if key in present:
        raise UserError(f"{path}: query {key} appears a second time (was this city added before?)")


def _msls_rows(path: Path) -> list[list[str]]:
    return [line.split() for _, line in read_lines(path)] if path.exists() else []


def _check_msls_names(place: Path, *sides: Iterable[str]) -> None:
    for names in sides:
        _key_table(place, names)


def write_published_pairs(path: Path, rankings: Iterable[NamedRanking]) -> None:
    """Pairs as the authors' release writes them, for programs that part its lines at the comma: no score.

    Raises UserError for a name that this format cannot hold.
    """
    rankings = list(rankings)
    _check_kapture_names(path, *_all_names(rankings))
    pairs = (f"{ranking.query}, {name}" for ranking in rankings for name in ranking.database)
    _write_lines(path, chain(_PUBLISHED_HEADER, pairs))


@dataclass(frozen=True)
class PredictionFormat:
    """A way to write rankings.

    ending: of the file's name, after the stage; check: raises UserError, which begins with the path given, for names
    of the queries and of the database that the format cannot hold; full_paths: names are whole paths.
    """

    ending: str
    write: Callable[[Path, Iterable[NamedRanking]], None]
    check: Callable[[Path, Iterable[str], Iterable[str]], None]
    full_paths: bool = False

    def names(self, pictures: ImageList) -> Sequence[str]:
        """What a list's pictures are called in this format."""
        return [str(path) for path in pictures.paths] if self.full_paths else pictures.names


FORMATS = {
    "kapture": PredictionFormat("predictions.txt", write_kapture_pairs, _check_kapture_names),
    "published": PredictionFormat("predictions.txt", write_published_pairs, _check_kapture_names, full_paths=True),
    "hloc": PredictionFormat("pairs_hloc.txt", write_hloc_pairs, _check_hloc_names),
    "msls": PredictionFormat("predictions_msls.txt", write_msls_predictions, _check_msls_names),
}
WRITTEN = ("kapture",)  # where no format is asked for


def check_formats(names: Sequence[str]) -> None:
    """Raises UserError for formats that would write the same files."""
    taken: dict[str, str] = {}
    for name in dict.fromkeys(names):
        other = taken.setdefault(FORMATS[name].ending, name)
        if other != name:
            raise UserError(f"--formats {other} {name}: both write files of one name (choose one)")


def read_pairs(path: Path) -> list[NamedRanking]:
    """Read a Kapture (two or three columns) or hloc pairs file; queries in the order of their first line.

    Kapture pairs are ordered by score, equal ones and hloc pairs by line; a pair counts once. A leading ./ of names
    is dropped. Raises UserError naming the line that fits neither format.
    """
    pairs_of: dict[str, list[tuple[float, str]]] = {}
    kapture: bool | None = None
    columns = 0
    for number, line in read_lines(path):
        if kapture is None:
            # hloc: two names and a space. A Kapture line has a comma after its first name.
            words = line.split()
            kapture = len(words) != 2 or words[0].endswith(",")
        fields = [field.strip() for field in line.split(",")] if kapture else line.split()
        columns = columns or len(fields)
        try:
            query, name, *rest = fields
            score = float(rest[0]) if rest else 0.0
            understood = all((query, name)) and len(fields) == columns <= (3 if kapture else 2) and score == score
        except ValueError:
            understood = False
        if not understood:
            expected = "query, map, score" if kapture else "query database"
            raise UserError(
                f"{path}: line {number}: {line[:80]!r}: expected {expected} (not a Kapture or hloc pairs file?)"
            )
        pairs_of.setdefault(_plain(query), []).append((-score, _plain(name)))
    return [
        NamedRanking(query, tuple(dict.fromkeys(name for _, name in sorted(pairs, key=lambda pair: pair[0]))))
        for query, pairs in pairs_of.items()
    ]


def read_predictions(path: Path, query_names: Sequence[str], database_names: Sequence[str]) -> Candidates:
    """Predictions of any other method: an .npy file of database rows, nQ×k, or a Kapture or hloc pairs file.

    Best first; a repeated or negative (absent) entry of an .npy row is dropped and shorter rows end in −1. Scores are
    1/rank. Raises UserError for a wrong shape or type, a row outside the database, an unknown name and a query
    without predictions.
    """
    if path.suffix == ".npy":
        rows = _read_npy_rows(path, len(query_names), len(database_names))
    else:
        rows = _read_named_rows(path, query_names, database_names)
    empty = [name for name, row in zip(query_names, rows, strict=True) if not row]
    if empty:
        raise UserError(f"{path}: no prediction for {_examples(empty)} (predictions for another query list?)")
    indices = np.full((len(rows), max(map(len, rows), default=0)), -1, dtype=np.int64)
    for row, database_rows in zip(indices, rows, strict=True):
        row[: len(database_rows)] = database_rows
    ranks = np.arange(1, indices.shape[1] + 1, dtype=np.float32)
    return Candidates(indices, np.where(indices >= 0, 1 / ranks, np.float32(-np.inf)))


def write_recalls(path: Path, recalls: Mapping[str, Recall]) -> None:
    """One line for each method and N, over all queries: `Recall NetVLAD@1: 0.1234`."""
    _write_lines(
        path,
        (
            f"Recall {method}@{n}: {value:.4f}"
            for method, recall in recalls.items()
            for n, value in zip(recall.n_values, recall.all_queries, strict=True)
        ),
    )


def write_scores(path: Path, scores: RankingScores, query_names: Sequence[str], database_names: Sequence[str]) -> None:
    """Write an .npz file of the fields of RankingScores and of query_names and database_names, text arrays."""
    with writing(path) as file:
        np.savez_compressed(
            file,
            patch_sizes=np.array(scores.patch_sizes, dtype=np.int64),
            matcher=np.array(scores.matcher),
            indices=scores.indices,
            fused=scores.fused,
            per_scale=scores.per_scale,
            query_names=np.array(query_names, dtype=np.str_),
            database_names=np.array(database_names, dtype=np.str_),
        )


def read_scores(path: Path) -> tuple[RankingScores, tuple[str, ...], tuple[str, ...]]:
    """Scores, query names and database names from a file of write_scores."""
    with np.load(path, allow_pickle=False) as arrays:
        scores = RankingScores(
            tuple(arrays["patch_sizes"].tolist()),
            str(arrays["matcher"]),
            arrays["indices"],
            arrays["fused"],
            arrays["per_scale"],
        )
        return scores, tuple(arrays["query_names"].tolist()), tuple(arrays["database_names"].tolist())


def _read_npy_rows(path: Path, num_queries: int, num_database: int) -> list[list[int]]:
    try:
        with told(path, "cannot be read"):
            indices = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not an .npy file of integers, or damaged") from error
    if not isinstance(indices, np.ndarray) or indices.ndim != 2 or indices.dtype.kind not in "iu":
        raise UserError(f"{path}: expected a table of integers, a row of database indices for each query")
    if len(indices) != num_queries:
        raise UserError(
            f"{path}: {len(indices)} rows for {num_queries} queries: row i belongs to line i (another query list?)"
        )
    if indices.size and indices.max() >= num_database:
        raise UserError(
            f"{path}: index {indices.max()}: the database has {num_database} pictures, counted from 0 "
            "(another database list?)"
        )
    return [list(dict.fromkeys(index for index in row if index >= 0)) for row in indices.tolist()]


def _read_named_rows(path: Path, query_names: Sequence[str], database_names: Sequence[str]) -> list[list[int]]:
    rankings = {ranking.query: ranking.database for ranking in read_pairs(path)}
    queries = [_plain(name) for name in query_names]
    row_of = {_plain(name): row for row, name in reversed(list(enumerate(database_names)))}
    unknown_queries = sorted(rankings.keys() - set(queries))
    if unknown_queries:
        raise UserError(f"{path}: {_examples(unknown_queries)}: not in the query list (names of another root?)")
    unknown = [name for name in dict.fromkeys(n for row in rankings.values() for n in row) if name not in row_of]
    if unknown:
        raise UserError(f"{path}: {_examples(unknown)}: not in the index list (names of another root?)")
    return [[row_of[name] for name in rankings.get(query, ())] for query in queries]


def _examples(names: Sequence[str]) -> str:
    return f"{len(names)} pictures such as {some_of(names, 3)}"


def _plain(name: str) -> str:
    while name.startswith("./"):
        name = name[2:]
    return name


def _all_names(rankings: Sequence[NamedRanking]) -> tuple[Iterable[str], Iterable[str]]:
    """Those of the queries and those of the database, each once."""
    queries = dict.fromkeys(ranking.query for ranking in rankings)
    return queries, dict.fromkeys(name for ranking in rankings for name in ranking.database)


def _key_table(path: Path, names: Iterable[str]) -> dict[str, str]:
    """MSLS key of each name, which may come more than once."""
    name_of: dict[str, str] = {}
    for name in dict.fromkeys(names):
        key = PurePosixPath(name).stem
        if key.split() != [key] or "#" in key:
            raise UserError(f"{path}: picture {name!r}: an MSLS key holds no white space and no #")
        if key in name_of:
            raise UserError(f"{path}: {name_of[key]} and {name} have the same MSLS key {key} (not an MSLS list?)")
        name_of[key] = name
    return {name: key for key, name in name_of.items()}


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines that are neither blank nor comments."""
    lines = ((number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), start=1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    write_text(path, (f"{line}\n" for line in lines))
