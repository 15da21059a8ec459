"""Reading answers off texts, and prompts in a template of the recipe's own."""

from __future__ import annotations

import json

import pytest
from recipes_helpers import rows, sft, tokenizer, write_jsonl, write_recipe
from typer.testing import CliRunner

from lily.cli.main import app
from lily.errors import LilyError
from lily.recipes import loader, train
from lily.recipes.data import tasks
from lily.recipes.data.tasks import IGNORED
from lily.recipes.results.adapter import Adapter
from lily.recipes.scoring import answers, evaluate
from lily.recipes.scoring.answer_lengths import Answer
from lily.recipes.spec.schema import Pattern


@pytest.fixture
def made(tmp_path, chat_model):
    """Makes a recipe on the tiny chat model from changes in the command line's form."""

    def make(*overrides):
        table = [{"question": r["text"], "answer": ("no", "yes")[int(r["label"])]} for r in rows()]
        path = write_recipe(tmp_path, sft(chat_model, write_jsonl(tmp_path / "t.jsonl", table), tmp_path))
        return loader.load_recipe(path, list(overrides))

    return make


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = <<3+4=7>>7 left.\n#### 7", "7"),
        ("#### 1,234.\n\nQuestion: 5 apples #### 9", "1234"),
        ("#### $18.50", "18.50"),
        ("####-5", "-5"),
        ("in all 12 and then 1,050 clips.", "1050"),
        ("It is worth $3.", "3"),
        ("#### none, so 4", "4"),
        ("no number at all", ""),
    ],
)
def test_the_number_is_what_follows_the_mark_or_else_the_last_one(made, text, number):
    assert answers.answer_in(text, made("generation.answer=number")) == number


def test_a_pattern_gives_its_first_match_or_that_matchs_first_group(made):
    choice = made("generation.answer={pattern: 'answer[1-5]|true|false'}")
    assert answers.answer_in("the correct answer is answer3, not answer1", choice) == "answer3"
    assert answers.answer_in("I cannot say", choice) == ""
    boxed = made(r"generation.answer={pattern: 'boxed\{([^}]*)\}'}")
    assert answers.answer_in(r"so \boxed{ 42 } it is", boxed) == "42"
    assert answers.answer_in(" yes\n", made()) == "yes"


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(a", "is not a regular expression"),
        ("(?R)", "is not a regular expression"),
        ("((((a{99}){99}){99}){99}){99}", "counted repeats multiply to over 1000"),
        ("a{0,99999}", "counted repeats multiply to over 1000"),
        ("x" * 501, "has 501 characters; at most 500"),
    ],
)
def test_a_pattern_that_cannot_be_or_would_fill_the_memory_is_refused(tmp_path, chat_model, pattern, says):
    values = sft(chat_model, tmp_path / "t.jsonl", tmp_path, generation={"answer": {"pattern": pattern}})
    with pytest.raises(LilyError, match=rf"recipe\.yaml:\d+: generation\.answer\.pattern: .*{says}"):
        loader.load_recipe(write_recipe(tmp_path, values))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("numbers", "generation.answer: expected whole or number"),
        ({"patern": "a"}, "generation.answer.patern: unknown key; did you mean pattern?"),
        ({}, "generation.answer.pattern: is required"),
    ],
)
def test_another_way_to_read_answers_is_named(tmp_path, chat_model, answer, says):
    values = sft(chat_model, tmp_path / "t.jsonl", tmp_path, generation={"answer": answer})
    with pytest.raises(LilyError, match=says):
        loader.load_recipe(write_recipe(tmp_path, values))


def test_a_pattern_that_backtracks_without_end_ends_in_an_error(made, monkeypatch):
    monkeypatch.setattr(answers, "MAX_SECONDS", 0.05)
    assert answers.problem_of(Pattern(pattern="(a|aa)+$")) is None
    with pytest.raises(LilyError, match=r"t.*generation\.answer: the pattern '\(a\|aa\)\+\$' takes over 0.05 s"):
        answers.answer_in("a" * 5000 + "b", made("generation.answer={pattern: '(a|aa)+$'}"))


def test_only_the_beginning_of_a_text_is_searched(made):
    recipe = made("generation.answer={pattern: b}")
    assert answers.answer_in("a" * (answers.MAX_TEXT - 1) + "b", recipe) == "b"
    assert answers.answer_in("a" * answers.MAX_TEXT + "b", recipe) == ""


def test_a_completion_without_an_answer_is_refused_before_a_weight_is_read(made, tmp_path):
    recipe = made("generation.answer=number")
    with pytest.raises(LilyError, match=r"finds no answer in the completion '(yes|no)'"):
        train.train(recipe, quiet=True)
    assert not (tmp_path / "run").exists()


def test_exact_match_compares_what_is_read_and_samples_show_the_whole_texts(made, monkeypatch):
    recipe = made(r"generation.answer={pattern: 'yes|no'}", "method=none")
    given = [Answer("yes it is", 3, False), Answer("awful", 1, True)]
    monkeypatch.setattr(evaluate, "answers", lambda model, tok, prompts, recipe: given)
    table = [{"prompt": "is it", "completion": "so yes"}, {"prompt": "is it", "completion": "no"}]
    tok = tokenizer(chat=True)
    assert evaluate.exact_matches(given, table, recipe) == [True, False]
    shown, lengths = evaluate.samples(None, tok, table, recipe, "before")
    assert [(s["expected"], s["before"]) for s in shown] == [("so yes", "yes it is"), ("no", "awful")]
    assert [s.get("cut") for s in shown] == [None, ["before"]]
    assert (lengths.count, lengths.cut, lengths.longest_expected) == (2, 1, 2)


def test_a_samples_prompt_is_the_whole_conversation(made, monkeypatch):
    monkeypatch.setattr(evaluate, "answers", lambda *_: [Answer("no", 1, False)])
    messages = [
        {"role": "user", "content": "is it good"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "is it bad"},
        {"role": "assistant", "content": "no"},
    ]
    (shown,), _ = evaluate.samples(None, tokenizer(chat=True), [{"messages": messages}], made(), "after")
    assert shown["prompt"] == "user: is it good\nassistant: yes\nuser: is it bad"


TEMPLATE = "question the film {prompt} answer "


def test_a_template_stands_around_the_prompt_wherever_prompts_are_built(made, tmp_path, monkeypatch):
    recipe = made("data.chat=false", f"data.template='{TEMPLATE}'", "train.epochs=1")
    tok = tokenizer(chat=True)
    (example,) = tasks.encode([{"prompt": "was good", "completion": "yes "}], recipe, tok, None)
    assert tok.decode(example["input_ids"]) == "question the film was good answer yes <end>"
    assert tok.decode([t for t in example["labels"] if t != IGNORED]) == "yes <end>"
    result = train.train(recipe, quiet=True)
    assert all(s["prompt"].startswith("question the film ") for s in result.samples)

    asked = []
    real = evaluate.prompt_ids
    monkeypatch.setattr(evaluate, "prompt_ids", lambda prompt, tok: asked.append(prompt) or real(prompt, tok))
    used = Adapter(str(tmp_path / "run"))
    list(used.predict([{"question": "was {bad}"}]))
    used.generate("was awful")
    assert asked == ["question the film was {bad} answer ", "question the film was awful answer "]


def test_the_dry_run_shows_the_template(made, tmp_path):
    made()
    changes = ["data.chat=false", f"data.template='{TEMPLATE}'"]
    shown = CliRunner().invoke(app, ["plan", str(tmp_path / "recipe.yaml"), *changes, "--json"])
    assert json.loads(shown.stdout)["preview"][0]["text"].startswith("question the film ")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["data.template='{prompt}'"], "data.template: replaces the tokenizer's chat template"),
        (["data.chat=false", "data.template=prompt"], r"data.template: must contain \{prompt\} once, not 0 times"),
        (["data.chat=false", "data.template='{prompt}{prompt}'"], "once, not 2 times"),
        (["data.template='{prompt}'", "data.columns={messages: m}"], "data.template: is for sft with prompt"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(made, changes, says):
    with pytest.raises(LilyError, match=says):
        made(*changes)
