"""The commonsense and GSM8K recipes on the sets' own rows, where they are."""

from __future__ import annotations

import re

import pytest

from lily.errors import LilyError
from lily.recipes import data, loader
from lily.recipes.data import sources, tables
from lily.recipes.scoring import answers

SETS = ("boolq", "piqa", "social_i_qa", "ARC-Easy", "openbookqa")
PAPER = {*SETS, "ARC-Challenge", "hellaswag", "winogrande"}

# The patterns of LLM-Adapters' commonsense_evaluate.py, which the paper's code keeps, set by set.
ADAPTERS = {
    "boolq": "true|false",
    "piqa": "solution1|solution2",
    **dict.fromkeys(
        ("social_i_qa", "ARC-Challenge", "ARC-Easy", "openbookqa"), "answer1|answer2|answer3|answer4|answer5"
    ),
    "hellaswag": "ending1|ending2|ending3|ending4",
    "winogrande": "option1|option2",
}
ANSWERS = {name: pattern.split("|") for name, pattern in ADAPTERS.items()}


def offline(name):
    recipe = loader.load_recipe(f"offline/{name}")
    try:
        sources.fetch(recipe.data.train)
    except LilyError as error:
        pytest.skip(str(error))
    return recipe


@pytest.mark.parametrize("name", sorted(PAPER))
def test_one_pattern_for_all_sets_reads_what_a_sets_own_pattern_reads(name):
    recipe = loader.load_recipe("paper/commonsense-llama3-8b")
    for answer in ANSWERS[name]:
        other = ANSWERS[name][0]
        for text in (
            f"the correct answer is {answer}",
            f"{answer}",
            f"the correct answer is {answer}</s> the correct answer is {other}",
            f"The correct {answer} is right, {other} is wrong.\n\n### Instruction:\nIs it true? option1/option2",
            "the correct answer is",
            answer.upper(),
        ):
            own = re.findall(ADAPTERS[name], text.strip())
            assert answers.answer_in(text, recipe) == (own[0] if own else "")


@pytest.mark.parametrize("name", SETS)
def test_the_rows_of_a_set_offer_their_answer_and_it_is_read_off_their_completion(name):
    recipe = offline("commonsense")
    raw = tables.read_rows(recipe.data.tests[name])
    rows = data.rows_of(recipe.data.tests[name], recipe)
    assert answers.expected_answers(rows, recipe) == [row["answer"] for row in raw]
    for row, source in zip(rows, raw, strict=True):
        assert row["choices"].count(row["completion"]) == 1
        assert row["completion"] == f"the correct answer is {source['answer']}"
        assert set(row["choices"]) <= {f"the correct answer is {answer}" for answer in ANSWERS[name]}


def test_the_offline_recipe_asks_and_reads_as_the_papers_does():
    paper, small = (loader.load_recipe(name) for name in ("paper/commonsense-falcon-mamba-7b", "offline/commonsense"))
    assert set(paper.data.tests) == PAPER
    assert set(small.data.tests) == set(SETS) == {"boolq", *small.data.mix}
    for key in ("template", "choices", "chat", "columns"):
        assert getattr(paper.data, key) == getattr(small.data, key)
    assert paper.generation.answer == small.generation.answer
    assert set(paper.metrics) == set(small.metrics) == {"exact_match", "accuracy", "loss"}


def test_the_mix_is_of_all_kinds_of_sets_and_each_test_set_is_small():
    recipe = offline("commonsense")
    splits = data.load_splits(recipe)
    assert len(splits.train) == recipe.data.max_train <= 1600
    kinds = {row["prompt"].rpartition("Answer format: ")[2].partition("/")[0] for row in splits.train}
    assert kinds == {"true", "solution1", "answer1"}
    assert {len(rows) for rows in splits.tests.values()} == {recipe.data.max_test}


def test_the_number_read_off_a_gsm8k_answer_is_the_one_it_states():
    recipe = offline("gsm8k")
    rows = data.rows_of(recipe.data.test, recipe)
    stated = [row["completion"].rpartition("#### ")[2].replace(",", "") for row in rows]
    assert answers.expected_answers(rows, recipe) == stated
    assert all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", number) for number in stated)
