"""The end of `lily train` and `lily eval`: scores by class and the worst mistakes, within the terminal's width."""

from __future__ import annotations

from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from lily.io.tables import fitting
from lily.recipes.results.review_table import print_review
from lily.recipes.scoring import review
from lily.recipes.scoring.answer_lengths import AnswerLengths
from lily.recipes.scoring.review import Review


def printed(found, width=80):
    console = Console(width=width, file=StringIO())
    print_review(found, console)
    return console.file.getvalue()


def of(classes, rows=40):
    """Every second row of the last class is wrong."""
    expected = np.arange(rows) % classes
    outputs = np.eye(classes)[np.where((expected == classes - 1) & (np.arange(rows) % 2 == 1), 0, expected)] * 3
    labels = tuple(f"class [{i}]" for i in range(classes))
    return review.of_classes(outputs, expected, labels, [{"text": "word " * 60}] * rows)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_few_classes_are_all_shown_and_nothing_is_wider_than_the_terminal(width):
    text = printed(of(4), width)
    assert max(map(len, text.splitlines())) <= width
    for i in range(4):
        assert f"class [{i}]" in text
    assert sum("word word" in line for line in text.splitlines()) == 3
    assert "most confident mistakes" in text


def test_of_many_classes_the_weakest_are_shown():
    text = printed(of(12))
    assert "the 5 of 12 classes with the lowest F1" in text
    assert "class [11]" in text
    assert "class [5]" not in text


def test_a_regression_has_errors_and_no_table_and_cut_answers_have_a_warning():
    numbers = review.of_numbers(np.array([1.0, 2.0]), np.array([1.0, 5.0]), [{"text": "a"}, {"text": "b"}])
    assert printed(numbers).splitlines() == ["largest errors:", "  row 2: 5, predicted 2", "    b"]
    assert "5 of 10 answers (50%) were cut" in printed(Review(answers=AnswerLengths(10, 3, 4, 9, 5, 4)))
    assert printed(None) == printed(Review()) == ""


def test_a_table_that_is_too_wide_continues_below_with_its_first_column():
    header, rows = ["name", *(f"column {i}" for i in range(9))], [["first", *(["123,456,789"] * 9)]]
    console = Console(width=60, file=StringIO())
    for table in fitting(header, rows, 60, title="once"):
        console.print(table)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 60
    assert text.count("123,456,789") == 9
    assert text.count("first") == 3
    assert text.count("once") == 1
    assert len(fitting(header, rows, 200)) == 1
