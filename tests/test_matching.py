"""Mutual nearest neighbours against their definition, above all where descriptors tie."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from patchnetvlad.matching import Matches, mutual_matches, mutual_matches_batch


def by_definition(query, reference):
    """Argmax both ways, the first index winning, in plain Python."""
    similarity = (query @ reference.T).tolist()
    forward = [row.index(max(row)) for row in similarity]
    columns = [list(column) for column in zip(*similarity, strict=True)]
    backward = [column.index(max(column)) for column in columns]
    return [(i, j) for i, j in enumerate(forward) if backward[j] == i]


def pairs(matches: Matches):
    assert matches.query.dtype == matches.reference.dtype == torch.int64
    return list(zip(matches.query.tolist(), matches.reference.tolist(), strict=True))


def whole_numbers(rows, dims):
    """Descriptors of few values: nearly everything ties, and products are exact."""
    return arrays("float32", (rows, dims), elements=st.integers(-1, 1)).map(torch.from_numpy)


@settings(deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
def test_ties_go_to_the_first_index(data, query_rows, reference_rows, dims):
    query = data.draw(whole_numbers(query_rows, dims))
    reference = data.draw(whole_numbers(reference_rows, dims))
    assert pairs(mutual_matches(query, reference)) == by_definition(query, reference)


def test_a_row_that_ties_for_a_column_but_prefers_another_takes_the_column_from_later_rows():
    similarity = torch.tensor([[2.0, 2.0], [0.0, 2.0]])  # row 0 is first in column 1, but nearest to column 0
    assert pairs(mutual_matches(similarity, torch.eye(2))) == [(0, 0)]


def test_permuted_descriptors_find_each_other():
    generator = torch.Generator().manual_seed(0)
    query = F.normalize(torch.randn(50, 16, generator=generator), dim=1)
    order = torch.randperm(50, generator=generator)
    matches = mutual_matches(query, query[order])
    assert torch.equal(matches.query, torch.arange(50))
    assert torch.equal(order[matches.reference], torch.arange(50))


def test_swapping_pictures_swaps_matches():
    generator = torch.Generator().manual_seed(1)
    query = F.normalize(torch.randn(40, 8, generator=generator), dim=1)
    reference = F.normalize(torch.randn(30, 8, generator=generator), dim=1)
    there, back = mutual_matches(query, reference), mutual_matches(reference, query)
    assert len(there) > 0
    assert sorted((j, i) for i, j in pairs(there)) == pairs(back)
    assert pairs(there) == by_definition(query, reference)


def test_identical_pictures_match_throughout_though_products_round_above_one():
    generator = torch.Generator().manual_seed(2)
    patches = F.normalize(torch.randn(64, 4096, generator=generator), dim=1) * (1 + 1e-6)
    assert (patches @ patches.T).max() > 1
    assert pairs(mutual_matches(patches, patches)) == [(i, i) for i in range(64)]


def test_one_patch_repeated_matches_once():
    patches = F.normalize(torch.ones(7, 5), dim=1)
    assert pairs(mutual_matches(patches, patches[:4])) == [(0, 0)]


def test_empty_pictures_have_no_matches():
    some, none = torch.ones(3, 4), torch.empty(0, 4)
    for query, reference in ((some, none), (none, some), (none, none)):
        assert pairs(mutual_matches(query, reference)) == []
        assert [pairs(m) for m in mutual_matches_batch(query, torch.stack([reference, reference]))] == [[], []]
    assert mutual_matches_batch(some, torch.empty(0, 5, 4)) == []


@settings(deadline=None)
@given(st.data(), st.integers(1, 6), st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_a_batch_equals_its_pairs(data, query_rows, lengths):
    query = data.draw(whole_numbers(query_rows, 2))
    references = [data.draw(whole_numbers(length, 2)) for length in lengths]
    padded = torch.full((len(lengths), max(lengths), 2), 9.0)  # padding that would win
    for row, reference in zip(padded, references, strict=True):
        row[: len(reference)] = reference
    found = mutual_matches_batch(query, padded, torch.tensor(lengths))
    assert [pairs(m) for m in found] == [pairs(mutual_matches(query, reference)) for reference in references]


def test_a_batch_without_padding_needs_no_lengths():
    generator = torch.Generator().manual_seed(3)
    query, references = torch.randn(20, 8, generator=generator), torch.randn(3, 25, 8, generator=generator)
    found = mutual_matches_batch(query, references)
    assert [pairs(m) for m in found] == [pairs(mutual_matches(query, reference)) for reference in references]
