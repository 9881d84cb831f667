"""Queries to places on the map: all of a finished matching run, or single pictures against a feature folder."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.config import Config
from patchnetvlad.errors import UserError
from patchnetvlad.evaluation import open_store
from patchnetvlad.files import write_text
from patchnetvlad.image_lists import ImageList
from patchnetvlad.localization.coordinates import Zone, to_geographic
from patchnetvlad.localization.position import Position, estimate_position
from patchnetvlad.recognizer import PlaceRecognizer
from patchnetvlad.reranker import Reranker
from patchnetvlad.result_files import read_scores
from patchnetvlad.retrieval import retrieve

CANDIDATES = 100  # re-ranked for a picture where the configuration does not say rerank_top


@dataclass(frozen=True)
class Located:
    """A query's name, its position (None without a match) and the name of its best match."""

    query: str
    position: Position | None
    best: str


def locate_run(scores_path: Path, database: NDArray[np.float64], neighbourhood: float) -> list[Located]:
    """Positions of all queries of a matching run from its scores.npz; database: M×c, row i of its line i."""
    if not scores_path.is_file():
        raise UserError(f"{scores_path}: no such file (it is written when candidates are re-ranked by their patches)")
    scores, queries, names = read_scores(scores_path)
    if len(names) != len(database):
        raise UserError(f"{scores_path}: its database has {len(names)} pictures, the ground truth {len(database)} rows")
    found = []
    for query, indices, fused in zip(queries, scores.indices, scores.fused, strict=True):
        if (indices >= 0).any():
            position = estimate_position(indices, fused, database, neighbourhood)
            found.append(Located(query, position, names[position.best]))
        else:
            found.append(Located(query, None, ""))
    return found


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
    recognizer = PlaceRecognizer.load(config, device)
    options = config.feature_match
    found = []
    with open_store(config, database_list, features, options.cache_gb) as store:
        reranker = Reranker(options, store)
        for path in pictures:
            (described,) = recognizer.describe(path)
            vector = described.global_[None].cpu().numpy()
            count = options.rerank_top or CANDIDATES
            candidates = retrieve(vector, store.global_, count, panorama_cutouts=options.panorama_cutouts)
            indices, scores = candidates.indices[0], candidates.scores[0].astype(np.float64)
            if described.patches.descriptors:
                ranking = reranker.rerank(described.patches, indices.tolist())
                indices, scores = indices[ranking.order], ranking.fused[ranking.order]
            else:  # similarities in standard deviations, as fused scores are
                scores = (scores - scores.mean()) / (scores.std() or 1.0)
            position = estimate_position(indices, scores, database, neighbourhood)
            found.append(Located(str(path), position, database_list.names[position.best]))
    return found


def position_rows(located: Sequence[Located], zone: Zone | None) -> list[dict[str, str]]:
    """One row a query for people and CSV: coordinates, latitude and longitude where the zone is known, radius."""
    rows = []
    for one in located:
        row = {"query": one.query}
        if one.position is not None:
            names = ("easting", "northing", "height")
            row |= {name: f"{value:.2f}" for name, value in zip(names, one.position.coordinates.tolist(), strict=False)}
            if zone is not None:
                latitude, longitude = to_geographic(one.position.coordinates[None, :2], zone)[0]
                row |= {"latitude": f"{latitude:.7f}", "longitude": f"{longitude:.7f}"}
            row |= {"radius": f"{one.position.radius:.2f}", "supporters": str(one.position.supporters)}
            row["best_match"] = one.best
        rows.append(row)
    return rows


def write_positions(path: Path, located: Sequence[Located], zone: Zone | None) -> None:
    """Write the rows as CSV; a query without a match has empty cells."""
    rows = position_rows(located, zone)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
