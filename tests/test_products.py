"""Products with a weight that stays: right, the same for any threads and rows, and never stale, in each of the ways."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from patchnetvlad import products
from patchnetvlad.products import FEWEST_ROWS, WEIGHT_WAYS, KeptWeight, fastest_way

PRECISIONS = [torch.float32, torch.bfloat16]


@pytest.fixture
def ways():
    """Which way is taken is asked anew, in the test and after it."""
    fastest_way.cache_clear()
    yield
    fastest_way.cache_clear()


@pytest.mark.parametrize("name", WEIGHT_WAYS)
@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(FEWEST_ROWS, 90),
    inner=st.integers(1, 300),
    outer=st.integers(1, 70),
    seed=st.integers(0, 2**32),
    special=st.sampled_from(["none", "zero", "equal", "far"]),
)
def test_every_way_gives_the_float64_products(name, precision, rows, inner, outer, seed, special):
    way = WEIGHT_WAYS[name]
    if not way.works(precision):
        pytest.skip("not on this machine")
    generator = torch.Generator().manual_seed(seed)
    left, weight = (torch.randn(count, inner, generator=generator) for count in (rows, outer))
    bias = torch.randn(outer, generator=generator)
    if special == "zero":
        left[1::2], weight[::2] = 0, 0
    elif special == "equal":
        left[:] = left[0]
    elif special == "far":
        left[::3] *= 1e4
    left, weight = left.to(precision), weight.to(precision)
    found = way.multiply(left, way.prepare(weight), bias).double()
    exact = left.double() @ weight.double().T + bias
    terms = left.double().abs() @ weight.double().abs().T + bias.abs()  # rounding is relative to what is added up
    sums = 2e-6 if precision == torch.float32 else 2.0**-7
    assert ((found - exact).abs() <= sums * terms.clamp(min=1e-30)).all()
    assert special != "equal" or bool((found == found[0]).all())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("inner", "outer"), [(8192, 128), (8192, 512), (1024, 64), (96, 7)])
def test_a_row_depends_neither_on_the_others_nor_on_the_threads(precision, inner, outer):
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(count, inner, generator=generator) for count in (130, outer))
    kept, bias, rows = KeptWeight(), torch.randn(outer, generator=generator), rows.to(precision)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = kept.product(rows, weight, bias)
        for threads in (1, 2, 3, 4, 16):
            torch.set_num_threads(threads)
            for count in (1, 2, 31, 32, 33, 129):
                assert torch.equal(kept.product(rows[:count], weight, bias), whole[:count]), (threads, count)
    finally:
        torch.set_num_threads(before)


def test_shapes_are_those_of_a_linear_layer():
    kept, weight, bias = KeptWeight(), torch.randn(5, 12), torch.randn(5)
    for shape in ((12,), (0, 12), (1, 12), (3, 12), (2, 40, 12), (2, 0, 12)):
        rows = torch.randn(shape)
        torch.testing.assert_close(kept.product(rows, weight, bias), F.linear(rows, weight, bias))


def test_a_changed_weight_is_prepared_anew():
    kept, weight, bias, rows = KeptWeight(), torch.randn(8, 40), torch.zeros(8), torch.randn(50, 40)
    before = kept.product(rows, weight, bias)
    torch.testing.assert_close(kept.product(rows, weight.neg_(), bias), -before)
    torch.testing.assert_close(kept.product(rows, weight * 2, bias), -2 * before)
    rounded = kept.product(rows.bfloat16(), weight, bias).float()
    torch.testing.assert_close(rounded, -before, atol=0.3, rtol=0)
    assert not torch.equal(rounded, -before)


def test_copies_and_files_go_without_the_prepared_weight():
    """oneDNN's order can be neither copied nor written."""
    layer = torch.nn.Linear(40, 8)
    layer.kept = KeptWeight()
    rows = torch.randn(50, 40)
    expected = layer.kept.product(rows, layer.weight, layer.bias)
    copied = copy.deepcopy(layer)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for other in (copied, torch.load(stream, weights_only=False)):
        assert torch.equal(other.kept.product(rows, other.weight, other.bias), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fails", ["is missing", "is wrong"])
def test_without_right_products_of_onednn_there_are_plain_ones(precision, fails, ways, monkeypatch):
    def wrong(rows, weight, bias):
        if fails == "is missing":
            raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")
        return torch.zeros(len(rows), len(bias))

    monkeypatch.setattr(products, "_multiply_packed", wrong)
    assert fastest_way("cpu", precision) == "plain"
    assert fastest_way("cuda", precision) == "plain"
    rows, weight, bias = torch.randn(40, 30), torch.randn(6, 30), torch.randn(6)
    found = KeptWeight().product(rows.to(precision), weight, bias)
    torch.testing.assert_close(found.float(), F.linear(rows, weight, bias), atol=0.3, rtol=0)
