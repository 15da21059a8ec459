"""What the commands that use an adapter read and write: prompts, rows, and what is wrong with either."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from lily.cli import evaluate
from lily.cli.evaluate import _write
from lily.cli.main import app
from lily.errors import LilyError
from lily.insight.texts import load_texts
from lily.recipes.data import tables
from lily.recipes.spec.data import Data


def test_rows_are_written_as_text_that_can_be_encoded():
    rows = [{"text": "été", "prediction": "a"}, {"text": "x", "other": "cut \ud83d", "prediction": "b"}]
    file = io.TextIOWrapper(io.BytesIO(), "utf-8")
    _write(rows, file)
    file.seek(0)
    lines = file.read().splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert "été" in lines[0]


def test_a_prompt_that_is_not_text_is_refused_before_a_model_is_read():
    with pytest.raises(LilyError, match="the prompt holds bytes that are not UTF-8"):
        CliRunner().invoke(app, ["generate", "nothing", "--prompt", "cut \ud83d"], catch_exceptions=False)


@pytest.mark.parametrize("column", ["text", "text_pair"])
def test_texts_of_an_inspection_are_refused_with_row_and_column(tmp_path, column):
    rows = [{"text": "a", "text_pair": "b"}, {"text": "a", "text_pair": "b", column: "cut \ud83d"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LilyError, match=f"row 2: column '{column}' holds half of a surrogate pair"):
        load_texts("nothing", str(tmp_path / "t.jsonl"), None, None)


@pytest.fixture
def answered(monkeypatch):
    """The prompts that reach a model."""
    prompts = []

    def generate(prompt, streamer, system):
        prompts.append(prompt)
        return " \n" if prompt == "say nothing" else "because"

    used = SimpleNamespace(generate=generate, tokenizer=None, cut=0)
    monkeypatch.setattr(evaluate, "located", lambda *_: None)
    monkeypatch.setattr(evaluate, "_adapter", lambda *_: used)
    monkeypatch.setattr("transformers.TextStreamer", lambda *_, **__: None)
    return prompts


@pytest.mark.parametrize(
    ("typed", "given"), [(["why?"], None), (["--prompt", "why?"], None), (["-"], "why?"), (["--", "why?"], None)]
)
def test_a_prompt_is_an_argument_an_option_or_standard_input(answered, typed, given):
    assert CliRunner().invoke(app, ["generate", "run", *typed], input=given).exit_code == 0
    assert answered == ["why?"]


def test_answers_without_text_are_told(answered):
    said = CliRunner().invoke(app, ["generate", "run", "say nothing"]).stderr
    assert said == "warning: the answer is empty\n"
    assert not CliRunner().invoke(app, ["generate", "run", "why?"]).stderr
    seen = evaluate.Predicted("prediction", "score")
    list(seen.watched({"prediction": text} for text in ("a", "", " ")))
    assert seen.sentence() == "3 rows predicted; 2 of the answers are empty."


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ([], "no prompt; write lily generate run"),
        (["a", "--prompt", "b"], "both name a prompt"),
        ([" "], "is empty"),
        ([""], "is empty"),
    ],
)
def test_no_prompt_and_two_are_refused(answered, typed, message):
    with pytest.raises(LilyError, match=message):
        CliRunner().invoke(app, ["generate", "run", *typed], catch_exceptions=False)
    assert answered == []


@pytest.mark.parametrize(
    ("names", "said"), [(["bad", "good", "bad"], "2 bad, 1 good"), (["1", "0", "1"], "2 of class 1, 1 of class 0")]
)
def test_classes_that_are_numbers_are_not_mistaken_for_counts(names, said):
    seen = evaluate.Predicted("prediction", "score")
    list(seen.watched({"prediction": name, "score": 0.9} for name in names))
    assert seen.sentence().startswith(f"3 rows predicted: {said}.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "prediction": "b"}, r"rows\.jsonl, row 2 already has a column 'prediction'"),
        ({"txt": "a"}, r"rows\.jsonl, row 2: no column 'text'.*did you mean 'txt'"),
        ({"text": 3}, r"rows\.jsonl, row 2: column 'text' holds 3, expected text"),
    ],
)
@pytest.mark.parametrize("typed", ["FILE", "-"])
def test_what_is_wrong_with_a_row_names_the_input(tmp_path, monkeypatch, row, message, typed):
    from lily.recipes.results.adapter import Adapter
    from lily.recipes.spec.schema import Recipe

    used = object.__new__(Adapter)
    data = {"train": {"path": "x.csv"}, "columns": {"text": "text", "label": "label"}}
    used.recipe = Recipe.model_validate(
        {"name": "a", "task": "text-classification", "model": {"path": "m"}, "data": data}
    )
    used._labels = ("a", "b")
    monkeypatch.setattr(evaluate, "located", lambda *_: None)
    monkeypatch.setattr(evaluate, "_adapter", lambda *_: used)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in ({"text": "a"}, row)))
    wanted = message if typed == "FILE" else message.replace(r"rows\.jsonl", "standard input")
    arguments = ["predict", "run", "--input", typed.replace("FILE", str(file))]
    with pytest.raises(LilyError, match=wanted):
        CliRunner().invoke(app, arguments, input=file.read_text(), catch_exceptions=False)


def test_predictions_are_csv_where_the_file_is_called_so(tmp_path):
    rows = [{"text": "a, b", "prediction": "x"}, {"text": 'c "d"', "prediction": "y"}]
    evaluate._write_file(iter(rows), tmp_path / "out.csv")
    assert list(tables.stream_rows(tmp_path / "out.csv")) == rows
    with pytest.raises(LilyError, match=r"row 2 has a column 'more'.*jsonl instead"):
        evaluate._write_file([{"a": 1}, {"a": 1, "more": 2}], tmp_path / "other.csv")
    assert not (tmp_path / "other.csv").exists()
    with pytest.raises(LilyError, match=r"written as csv or jsonl; name a file out\.csv"):
        CliRunner().invoke(app, ["predict", "run", "--input", "-", "--output", "out.json"], catch_exceptions=False)


def test_rows_to_predict_may_be_written_in_another_way_than_those_of_training(tmp_path):
    train = {"path": "x.csv", "delimiter": ";", "encoding": "cp1252"}
    data = Data.model_validate({"train": train, "columns": {"text": "text"}})
    used = SimpleNamespace(recipe=SimpleNamespace(task="text-classification", data=data))
    for text in ("id,text\n1,caf\xe9\n".encode(), "id;text\n1;caf\xe9\n".encode("cp1252")):
        (tmp_path / "new.csv").write_bytes(text)
        assert list(evaluate._rows(used, tmp_path / "new.csv")[0]) == [{"id": "1", "text": "caf\xe9"}]


def test_a_misspelt_run_is_looked_for_beside_it(tmp_path):
    for name in ("reviews-lily-0", "other"):
        (tmp_path / name).mkdir()
    with pytest.raises(LilyError, match=r"reviews-lily-1 holds no adapter.*did you mean .*/reviews-lily-0[?]$"):
        CliRunner().invoke(app, ["eval", str(tmp_path / "reviews-lily-1")], catch_exceptions=False)
