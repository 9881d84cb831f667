"""All ways of matching give the matches that exact products define, and the bounds on which they rest hold."""

import math
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from patchnetvlad import matching
from patchnetvlad.candidates import Candidates
from patchnetvlad.config import FeatureMatchConfig
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.errors import UserError
from patchnetvlad.matching import (
    WAYS,
    Prepared,
    mutual_matches,
    mutual_matches_batch,
    rounded_mutual_matches,
    rounding_works,
)
from patchnetvlad.patch_grid import EncoderGeometry, PatchGrid
from patchnetvlad.patch_rounding import (
    approximate_similarities,
    products_are_exact,
    round_patches,
    rounded_bytes,
    similarity_errors,
)
from patchnetvlad.ranking import Ranker
from patchnetvlad.reranking import match_pair
from patchnetvlad.store.reading.patch_sources import DescribedPictures, PatchesInMemory
from patchnetvlad.workers import choose_way


def overlapping_patches(count, dims, seed, common=None):
    """Rows that change slowly, as those of neighbouring windows do; ``common`` adds rows that both pictures share."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(count, dims, generator=generator)
    rows = torch.stack([steps[max(0, i - 4) : i + 1].sum(dim=0) for i in range(count)])
    if common is not None:
        rows += common
    return F.normalize(rows, dim=1)


def both_ways(query, reference):
    rounded = rounded_mutual_matches(
        query, reference, round_patches(query, "query"), round_patches(reference, "reference")
    )
    return rounded, mutual_matches(query, reference)


def assert_equal(first, second):
    assert torch.equal(first.query, second.query)
    assert torch.equal(first.reference, second.reference)


@pytest.mark.parametrize("dims", [16, 100, 513, 4096])
@pytest.mark.parametrize("shared", [False, True])
def test_matches_are_those_of_float32(dims, shared, monkeypatch):
    monkeypatch.setattr(matching, "DOUBTFUL", 1.0)  # never take the way out
    common = overlapping_patches(120, dims, 7) * 10 * math.sqrt(dims) if shared else None
    query = overlapping_patches(120, dims, 1, common)
    reference = overlapping_patches(90, dims, 2, None if common is None else common[:90])
    rounded, exact = both_ways(query, reference)
    assert len(exact) > (80 if shared else 5)
    assert_equal(rounded, exact)


@settings(deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_ties_go_to_the_first_index(data, query_rows, reference_rows, dims):
    few_values = st.integers(-1, 1)
    query, reference = (
        torch.from_numpy(data.draw(arrays("float32", (rows, dims), elements=few_values)))
        for rows in (query_rows, reference_rows)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "DOUBTFUL", 1.0)
        assert_equal(*both_ways(query, reference))


def test_a_flood_of_doubts_goes_to_float32(monkeypatch):
    rows = F.normalize(torch.ones(40, 64) + 1e-4 * torch.randn(40, 64, generator=torch.Generator().manual_seed(0)))
    called = []
    monkeypatch.setattr(matching, "mutual_matches", lambda *pair: called.append(pair) or mutual_matches(*pair))
    assert_equal(*both_ways(rows, rows.flip(0)))
    assert len(called) == 1


def test_empty_pictures_have_no_matches():
    some, none = torch.ones(3, 4), torch.empty(0, 4)
    for query, reference in ((some, none), (none, some), (none, none)):
        assert len(both_ways(query, reference)[0]) == 0


def test_errors_stay_within_their_bound_and_have_mean_zero():
    query, reference = overlapping_patches(400, 2048, 3), overlapping_patches(300, 2048, 4)
    first, second = round_patches(query, "query"), round_patches(reference, "reference")
    exact = query.double() @ reference.double().T
    error = approximate_similarities(first, second).double() - exact
    row, column = similarity_errors(first, second)
    assert (error.abs() <= row[:, None]).all() and (error.abs() <= column).all()
    assert row.max() < 0.2 * math.sqrt(2048) * first.scale.max()  # far below the lengths' bound
    assert abs(error.mean()) < 0.02 * row.mean()
    assert error.std() > 0.05 * row.mean()
    # Uniform within half a level on either side, so the variances are known
    expected = ((first.scale.square()[:, None] + second.scale.square()) / 12).mean().sqrt()
    assert float(error.std()) == pytest.approx(float(expected), rel=0.03)


def test_rounding_uses_the_whole_range_and_no_more():
    rows = torch.tensor([[1.0, -1.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    rounded = round_patches(rows, "query")
    assert rounded.levels[0, :3].tolist() == [126, -126, 0]
    assert rounded.levels[0, 3] in (63,)
    assert rounded.levels[1].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(rounded.norm, torch.tensor([1.5, 0.0]))
    parts = (rounded.levels, rounded.scale, rounded.norm, rounded.offset)
    assert sum(part.numel() * part.element_size() for part in parts) == rounded_bytes(2, 4)


def test_query_and_reference_are_rounded_independently():
    rows = overlapping_patches(20, 512, 5)
    first, again, other = (round_patches(rows, role) for role in ("query", "query", "reference"))
    assert torch.equal(first.levels, again.levels)
    assert 0.2 < (first.levels != other.levels).float().mean() < 0.8


def features(rows):
    geometry = EncoderGeometry(16, 196, 90)
    return PatchFeatures((rows,), (PatchGrid(1, len(rows), 1, 1, geometry),))


def test_pictures_match_alike_with_and_without_rounding():
    query, reference = features(overlapping_patches(60, 256, 1)), features(overlapping_patches(60, 256, 2))
    rounded = match_pair(query.round_as("query"), reference.round_as("reference"))
    assert_equal(rounded[0], match_pair(query, reference)[0])


@pytest.fixture
def fresh_checks():
    """What this processor can do is found out anew, before and after."""
    checks = (products_are_exact, rounding_works)
    for check in checks:
        check.cache_clear()
    yield
    for check in checks:
        check.cache_clear()


def test_a_processor_that_saturates_is_found_out(monkeypatch, fresh_checks):
    products = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda *pair: products(*pair).clamp(max=2_000_000))
    rows = features(torch.eye(512))
    assert not products_are_exact() and choose_way("auto", rows, rows) == "float32"
    with pytest.raises(UserError, match="similarity = int8"):
        choose_way("int8", rows, rows)


def test_a_torch_without_single_products_goes_by_float32(monkeypatch, fresh_checks):
    def refuse(*args, **kwargs):
        raise RuntimeError("not built for this")

    monkeypatch.setattr(torch.sparse, "sampled_addmm", refuse)
    rows = features(torch.eye(512))
    assert not rounding_works() and choose_way("auto", rows, rows) == "float32"


def test_who_decides_how_similarities_are_made(monkeypatch, caplog):
    rows = features(F.normalize(torch.ones(8, 512), dim=1))
    with caplog.at_level("INFO"):
        assert choose_way("float32", rows, rows) == "float32"
    assert caplog.messages == ["similarities in float32 (as configured)"]
    caplog.clear()
    if not rounding_works():
        return
    assert choose_way("int8", rows, rows) == "int8"
    for fastest in ("int8", "float32"):
        for name in ("int8", "float32"):
            slow = replace(WAYS[name], match=lambda *pair: time.sleep(0.002 if name == fastest else 0.02))  # noqa: B023
            monkeypatch.setitem(WAYS, name, slow if name != fastest else replace(slow, match=lambda *pair: None))
        with caplog.at_level("INFO"):
            assert choose_way("auto", rows, rows) == fastest
        assert len(caplog.messages) == 1
        times = ", ".join(rf"{name} \d+\.\d ms" for name in WAYS)
        line = rf"similarities {WAYS[fastest].text} \(the fastest here, a pair of the first pictures: {times}\)"
        assert re.fullmatch(line, caplog.messages[0])
        caplog.clear()


def test_the_log_says_where_there_is_no_choice(monkeypatch, caplog):
    monkeypatch.setitem(WAYS, "int8", replace(WAYS["int8"], works=lambda: False))
    on_processor, elsewhere = (features(torch.empty(8, 512, device=device)) for device in ("cpu", "meta"))
    for rows in (on_processor, elsewhere):
        with caplog.at_level("INFO"):
            assert choose_way("auto", rows, rows) == "float32"
        assert caplog.messages == ["similarities in float32 (the only way on this device)"]
        caplog.clear()


def test_an_accelerator_multiplies_in_float32():
    rows = features(torch.empty(8, 512, device="meta"))
    assert choose_way("auto", rows, rows) == "float32"
    with pytest.raises(UserError, match="similarity = int8"):
        choose_way("int8", rows, rows)


def wild_rows(draw, count, dims):
    """Unit rows of which some are drawn, some nearly or exactly one of the others, and some zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    rows = F.normalize(torch.randn(count, dims, generator=generator), dim=1)
    for row in range(1, count):
        kind = draw(st.sampled_from(["new", "new", "copy", "near", "zero"]))
        if kind == "zero":
            rows[row] = 0
        elif kind != "new":
            rows[row] = rows[draw(st.integers(0, row - 1))]
        if kind == "near":
            step = draw(st.sampled_from([1e-7, 1e-5, 1e-3]))
            rows[row] += step * torch.randn(dims, generator=generator)
    return rows


def defined_matches(query, reference):
    """By definition: mutual nearest neighbours by float64 products, of which those within 2⁻⁴⁰ are equal."""
    similarity = (query.double() @ reference.double().T * 2.0**40).round()
    nearest, back = similarity.numpy().argmax(axis=1), similarity.numpy().argmax(axis=0)  # of equal ones the first
    return [(i, j) for i, j in enumerate(nearest.tolist()) if back[j] == i]


@pytest.mark.parametrize("name", WAYS)
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_way_finds_what_float64_finds(name, data):
    way = WAYS[name]
    if not way.works():
        pytest.skip("this processor cannot")
    dims = data.draw(st.sampled_from([2, 8, 128, 600]))
    query = wild_rows(data.draw, data.draw(st.integers(1, 14)), dims)
    reference = wild_rows(data.draw, data.draw(st.integers(1, 14)), dims)
    if data.draw(st.booleans()):  # the two share rows
        shared = min(len(query), len(reference))
        reference[:shared] = query[:shared].flip(0)
    found = way.match(*prepared(way, query, reference))
    pairs = list(zip(found.query.tolist(), found.reference.tolist(), strict=True))
    expected = defined_matches(query, reference)
    assert pairs == expected
    (batched,) = mutual_matches_batch(query, reference[None])  # as on an accelerator
    assert list(zip(batched.query.tolist(), batched.reference.tolist(), strict=True)) == expected


def prepared(way, query, reference):
    if not way.rounds:
        return Prepared(query), Prepared(reference)
    return Prepared(query, round_patches(query, "query")), Prepared(reference, round_patches(reference, "reference"))


def test_what_float32_cannot_order_is_ordered_in_float64(monkeypatch):
    """Rows that lie so close together that the order of a float32 sum's terms would decide."""
    monkeypatch.setattr(matching, "DOUBTFUL", 1.0)
    generator = torch.Generator().manual_seed(3)
    rows = F.normalize(torch.randn(150, 256, generator=generator), dim=1)
    again = (rows + 1e-8 * torch.randn(150, 256, generator=generator)).repeat_interleave(2, dim=0)
    again[1::2] += 1e-8 * torch.randn(150, 256, generator=generator)
    expected = defined_matches(rows, again)
    by_float32 = (rows @ again.T).argmax(dim=1)
    assert len(expected) == 150 and sum(by_float32[i] != j for i, j in expected) > 5  # float32 would be wrong
    found = [*both_ways(rows, again), *mutual_matches_batch(rows, again[None])]
    for matches in found:
        assert list(zip(matches.query.tolist(), matches.reference.tolist(), strict=True)) == expected


@pytest.mark.skipif(not rounding_works(), reason="this processor saturates 8-bit products")
@pytest.mark.parametrize("matcher", ["spatialApproximator", "spatialSimilarity"])
def test_a_database_is_rounded_once_and_ranked_alike(matcher):
    asked = []

    class Counted(PatchesInMemory):
        def round_references(self):
            asked.append(True)
            super().round_references()

    query = features(overlapping_patches(60, 256, 0))
    pictures = [features(overlapping_patches(60, 256, seed)) for seed in (1, 2, 0)]
    rankings = []
    for similarity in ("float32", "int8"):
        options = FeatureMatchConfig(matcher=matcher, patchweights2use=(1.0,), similarity=similarity)
        vectors = np.eye(3, 4, dtype=np.float32)
        ranker = Ranker(options, DescribedPictures(vectors, Counted(pictures)), torch.device("cpu"))
        queries = DescribedPictures(vectors[:1], PatchesInMemory([query]))
        nothing = Candidates(np.full((1, 2), -1), np.full((1, 2), -np.inf, dtype=np.float32))
        assert ranker.rank(queries, nothing).scores.indices.shape == (1, 0) and len(asked) == 0
        rankings += [ranker.rank(queries) for _ in range(2)]
    assert len(asked) == 1
    for ranking in rankings:
        assert ranking.indices[0, 0] == 2
        np.testing.assert_array_equal(ranking.scores.per_scale, rankings[0].scores.per_scale)
