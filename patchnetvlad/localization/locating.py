"""Queries to places on the map: all of a finished matching run, or single pictures against a feature folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.config import Config
from patchnetvlad.csv_table import write_table
from patchnetvlad.errors import UserError
from patchnetvlad.evaluation import open_features, with_built_index
from patchnetvlad.ground_truth import GroundTruth, check_lists
from patchnetvlad.image_lists import ImageList
from patchnetvlad.localization.coordinates import Zone, to_geographic
from patchnetvlad.localization.position import Position, estimate_position
from patchnetvlad.ranking import Ranker, check_panoramas
from patchnetvlad.recognizer import PlaceRecognizer, for_ranking
from patchnetvlad.result_files import read_scores
from patchnetvlad.store.cache.memory_cache import cache_bytes


@dataclass(frozen=True)
class Located:
    """A query's name, its position (None without a match) and the name of its best match."""

    query: str
    position: Position | None
    best: str


def locate_run(scores_path: Path, truth_path: Path, truth: GroundTruth) -> list[Located]:
    """Positions of all queries of a matching run from its scores.npz and the database's coordinates."""
    if not scores_path.is_file():
        raise UserError(f"{scores_path}: no such file (it is written when candidates are re-ranked by their patches)")
    scores, queries, names = read_scores(scores_path)
    rows = len(truth.utm_database)
    if len(names) != rows:
        raise UserError(f"{scores_path}: its database has {len(names)} pictures, the ground truth {rows} rows")
    check_lists(truth_path, truth, len(truth.utm_query), names)
    located = []
    for query, indices, fused in zip(queries, scores.indices, scores.fused, strict=True):
        if (indices >= 0).any():
            position = estimate_position(indices, fused, truth.utm_database, truth.radius)
            located.append(Located(query, position, names[position.best]))
        else:
            located.append(Located(query, None, ""))
    return located


def locate_pictures(
    config: Config,
    pictures: Sequence[Path],
    database_list: ImageList,
    features: Path,
    database: NDArray[np.float64],
    neighbourhood: float,
    device: torch.device,
) -> list[Located]:
    """Positions of single pictures: described, searched in a feature folder, re-ranked by their patches."""
    options = config.feature_match
    config.check_own_candidates("single pictures (give the results of feature_match)")
    check_panoramas(options.panorama_cutouts, len(database_list), database)
    recognizer = PlaceRecognizer.load(config, device)
    queries = for_ranking(recognizer, recognizer.describe(pictures))
    memory = cache_bytes(options.cache_gb)
    with open_features(config, database_list, features, memory, lambda: recognizer.model) as database_features:
        database_features = with_built_index(config, database_list, database_features)
        rankings = Ranker(options, database_features, device).rank(queries)
    if rankings.scores is None:  # similarities in standard deviations, as fused scores are
        indices, similarities = rankings.indices, rankings.retrieved.scores.astype(np.float64)
        ranked = [(row, _standardized(values, row)) for row, values in zip(indices, similarities, strict=True)]
    else:
        ranked = list(zip(rankings.scores.indices, rankings.scores.fused, strict=True))
    positions = [estimate_position(*ranking, database, neighbourhood) for ranking in ranked]
    return [
        Located(str(path), position, database_list.names[position.best])
        for path, position in zip(pictures, positions, strict=True)
    ]


def _standardized(similarities: NDArray[np.float64], indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Similarities of one query's candidates (k,) with mean 0 and deviation 1; 0 where there is none."""
    present = indices >= 0
    scores = np.zeros(len(similarities))
    values = similarities[present]
    if len(values):
        scores[present] = (values - values.mean()) / (values.std() or 1.0)
    return scores


def position_lines(located: Sequence[Located], zone: Zone | None, unit: str) -> list[str]:
    """One line a query, for people; unit: of the coordinates."""
    lines = []
    for row in position_rows(located, zone):
        if "radius" in row:
            row["radius"] = f"{row['radius']} {unit}"
        lines.append(", ".join(f"{column} {value}" for column, value in row.items()))
    return lines


def position_rows(located: Sequence[Located], zone: Zone | None) -> list[dict[str, str]]:
    """One row a query for a table: coordinates, latitude and longitude where the zone is known, radius."""
    rows = []
    for estimate in located:
        row = {"query": estimate.query}
        if estimate.position is not None:
            names = ("easting", "northing", "height")
            row |= {
                name: f"{value:.2f}" for name, value in zip(names, estimate.position.coordinates.tolist(), strict=False)
            }
            if zone is not None:
                latitude, longitude = to_geographic(estimate.position.coordinates[None, :2], zone)[0]
                row |= {"latitude": f"{latitude:.7f}", "longitude": f"{longitude:.7f}"}
            row |= {"radius": f"{estimate.position.radius:.2f}", "supporters": str(estimate.position.supporters)}
            row["best_match"] = estimate.best
        rows.append(row)
    return rows


def write_positions(path: Path, located: Sequence[Located], zone: Zone | None) -> None:
    """Write the rows as CSV; a query without a match has empty cells."""
    rows = position_rows(located, zone)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    write_table(path, columns, [[row.get(column, "") for column in columns] for row in rows])
