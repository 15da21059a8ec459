"""Words of messages: a number agrees with its noun, and a list ends as a sentence does."""

import pytest

from lily.io.words import counted, joined, some


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((1, "row"), "1 row"),
        ((0, "row"), "0 rows"),
        ((1204, "row"), "1,204 rows"),
        ((1.0, "epoch"), "1 epoch"),
        ((0.5, "epoch"), "0.5 epochs"),
        ((1, "class", "classes"), "1 class"),
        ((2, "class", "classes"), "2 classes"),
    ],
)
def test_a_number_agrees_with_its_noun(given, said):
    assert counted(*given) == said


def test_names_in_a_list():
    assert [joined("abc"[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert joined(["a", "b"], "or") == "a or b"


def test_the_first_names_and_how_many_more():
    assert [some("abcde"[:n]) for n in (0, 1, 3, 5)] == ["", "a", "a, b, c", "a, b, c and 2 more"]
    assert some(map(str, range(2003)), most=1) == "0 and 2,002 more"
