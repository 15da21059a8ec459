"""Which generated answers `generation.max_new_tokens` cut, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recipes_helpers import sft, tokenizer, write_jsonl, write_recipe

from lily.cli import evaluate as command
from lily.recipes import loader, train
from lily.recipes.results.adapter import Adapter
from lily.recipes.scoring import evaluate
from lily.recipes.scoring.answer_lengths import Answer, lengths_of, unreachable

END, PAD, YES, NO = 6, 0, 22, 21


@pytest.fixture
def made(tmp_path, chat_model):
    def make(**generation):
        values = sft(chat_model, tmp_path / "t.jsonl", tmp_path, generation={"max_new_tokens": 3, **generation})
        return loader.load_recipe(write_recipe(tmp_path, values))

    return make


class Written(torch.nn.Module):
    """A model that continues every prompt with given tokens."""

    def __init__(self, continuations, ends):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.continuations, self.generation_config = continuations, SimpleNamespace(eos_token_id=ends)

    def generate(self, input_ids, **_):
        return torch.cat([input_ids, torch.tensor(self.continuations)], 1)


@pytest.mark.parametrize("ends", [END, [5, END]])
def test_an_answer_without_an_end_token_at_the_limit_is_cut(made, ends):
    model = Written([[YES, END, PAD], [YES, NO, YES], [YES, NO, END]], ends)
    found = evaluate.answers(model, tokenizer(chat=True), ["is it"] * 3, made())
    assert [(a.tokens, a.cut) for a in found] == [(1, False), (3, True), (2, False)]


def test_answers_that_all_end_before_the_limit_are_not_cut(made):
    model = Written([[YES, END], [YES, NO]], END)
    assert not any(a.cut for a in evaluate.answers(model, tokenizer(chat=True), ["is it"] * 2, made()))


def test_the_warning_has_the_share_and_an_option_that_holds_the_longest_expected_answer(made):
    answers = [Answer("yes", 1, False), Answer("yes no yes", 3, True), Answer("no no no", 3, True)]
    found = lengths_of(answers, [2, 40, 1], made())
    assert found.words().startswith("3 answers have 3 tokens in the median and 3 at most; the longest expected one has")
    assert found.warning() == (
        "2 of 3 answers (67%) were cut at generation.max_new_tokens=3; raise it, such as generation.max_new_tokens=48"
    )
    assert lengths_of(answers[:1], [1], made()).warning() is None
    assert lengths_of([], [], made()) is None


def test_an_answer_that_the_pattern_found_before_the_cut_is_no_reason_to_warn(made):
    answers = [Answer("yes and more", 3, True), Answer("so it is", 3, True)]
    found = lengths_of(answers, [1, 1], made(answer={"pattern": "yes|no"}))
    assert found.cut == 1


def test_expected_answers_that_cannot_be_generated_are_told_before_training(made):
    rows = [{"prompt": "is it", "completion": text} for text in ("yes", "yes no yes no yes")]
    said = unreachable(rows, "test", made(), tokenizer(chat=True))
    assert said == [
        "test: 1 of 2 expected answers (50%) are longer than generation.max_new_tokens=3, so exact_match cannot find "
        "them; raise it to 13"
    ]
    assert unreachable(rows, "test", made(max_new_tokens=5), tokenizer(chat=True)) == []
    assert unreachable(rows, "test", made(answer={"pattern": "yes"}), tokenizer(chat=True)) == []


def test_a_run_warns_of_them_and_keeps_the_share_that_was_cut(tmp_path, chat_model):
    table = [{"question": "is it", "answer": "yes it is " * 3}, {"question": "was it", "answer": "no"}] * 20
    values = sft(chat_model, write_jsonl(tmp_path / "t.jsonl", table), tmp_path)
    values["generation"] = {"max_new_tokens": 2, "samples": 1}
    values["train"]["epochs"] = 1
    result = train.train(loader.load_recipe(write_recipe(tmp_path, values)), quiet=True)
    assert any("expected answers" in warning and "max_new_tokens=2" in warning for warning in result.data.warnings)
    kept = json.loads((tmp_path / "run" / "metrics.json").read_text())["review"]["answers"]
    assert (kept["count"], kept["limit"], kept["longest_expected"]) == (result.rows["test"], 2, 9)
    used = Adapter(str(tmp_path / "run"))
    turns = evaluate.prompts_of([{"prompt": "is it", "completion": "no"}], used.recipe, used.tokenizer)
    (answer,) = evaluate.answers(used.model, used.tokenizer, turns, used.recipe)
    list(used.predict([{"question": "is it"}] * 3))
    assert (used.answered, used.cut) == (3, 3 * answer.cut)


@pytest.mark.parametrize(("answered", "said"), [(1, "the answer was cut"), (30, "2 of 30 answers were cut")])
def test_predict_and_generate_tell_on_standard_error_what_was_cut(capsys, made, answered, said):
    command._warn_of_cut(SimpleNamespace(cut=2, answered=answered, recipe=made(), path=Path("run/best")))
    assert capsys.readouterr().err.startswith(f"warning: {said} at generation.max_new_tokens=3; raise it")
    command._warn_of_cut(SimpleNamespace(cut=0, answered=answered, recipe=made(), path=Path("run/best")))
    assert capsys.readouterr().err == ""
