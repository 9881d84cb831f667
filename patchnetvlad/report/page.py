"""A run's rankings as one HTML page for people: curves, a map, and every query with its candidates."""

import logging
from pathlib import Path

import jinja2
from markupsafe import Markup

from patchnetvlad.figures import SCALE_COLOURS
from patchnetvlad.files import writing
from patchnetvlad.ground_truth import one_of, with_unit
from patchnetvlad.report.content import (
    ReportContent,
    candidates,
    examples,
    map_points,
    match_ranks,
    outcomes,
    stored_matches,
)
from patchnetvlad.report.curves import curves, recall_table
from patchnetvlad.report.thumbnails import thumbnails

logger = logging.getLogger(__name__)

THUMBNAIL_BUDGET = 60_000_000  # characters
_PAGE = Path(__file__).parent / "template"


def write_report(path: Path, content: ReportContent, progress: bool = False) -> int:
    """Write the page, complete or not at all; returns its size in bytes.

    It needs no network and no other file. Names are shown as text whatever they hold. Pictures that cannot be read
    are left blank, with a warning.
    """
    paths = [*content.queries.paths, *(content.database.paths[row] for row in content.used_rows)]
    pictures, aspects = thumbnails(paths, THUMBNAIL_BUDGET, content.exif_rotation, progress)
    unreadable = sum(picture is None for picture in pictures)
    if unreadable:
        logger.warning("report: %d of %d pictures cannot be read and are left blank", unreadable, len(pictures))
    embedded = {
        "stages": list(content.stages),
        "unit": content.ground_truth.unit if content.ground_truth else "",
        "unit_one": one_of(content.ground_truth.unit) if content.ground_truth else "",
        "colours": SCALE_COLOURS,
        "queries": content.queries.names,
        "database": [content.database.names[row] for row in content.used_rows],
        "aspects": aspects,
        "outcomes": outcomes(content),
        "ranks": match_ranks(content),
        "candidates": candidates(content),
        "examples": examples(content),
        "matches": stored_matches(content, progress),
        "curves": curves(content),
        "map": map_points(content),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("page.html").render(
        data=embedded,
        pictures=pictures,
        settings=content.settings,
        summary=_summary(content),
        unreadable=unreadable,
        style=Markup((_PAGE / "page.css").read_text(encoding="utf-8")),
        program=Markup((_PAGE / "page.js").read_text(encoding="utf-8")),
    )
    encoded = page.encode("utf-8", "backslashreplace")
    with writing(path) as file:
        file.write(encoded)
    return len(encoded)


def _summary(content: ReportContent) -> dict[str, object]:
    truth = content.ground_truth
    return {
        "queries": len(content.queries),
        "database": len(content.database),
        "query_list": content.queries.source.name,
        "index_list": content.database.source.name,
        "without_match": None if content.positives is None else sum(len(rows) == 0 for rows in content.positives),
        "radius": None if truth is None else with_unit(truth.radius, truth.unit),
        "recalls": recall_table(content),
        "stages": list(content.stages),
    }
