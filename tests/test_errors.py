"""How messages count."""

import pytest

from patchnetvlad.errors import by_number, counted


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 pictures"), (1, "1 picture"), (2, "2 pictures"), (30, "30 pictures")]
)
def test_one_is_singular(number, said):
    assert counted(number, "picture") == said


def test_words_of_their_own():
    assert counted(1, "query has", "queries have") == "1 query has"
    assert counted(0, "query has", "queries have") == "0 queries have"
    assert [by_number(number, "agrees", "agree") for number in (0, 1, 2)] == ["agree", "agrees", "agree"]
