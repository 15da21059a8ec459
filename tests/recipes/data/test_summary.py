"""The numbers of the data table are those of the data, and a run's files have them."""

from __future__ import annotations

import json
import re

import pytest
from recipes_helpers import classification, rows, sft, write_jsonl, write_recipe
from typer.testing import CliRunner

from lily.cli.main import app
from lily.recipes import data, loader, preflight
from lily.recipes import train as training
from lily.recipes.data import summary as looking
from lily.recipes.data.summary import RARE, SHOWN, summarize

WORDS = "the film was good "


def prepared(folder, values, *overrides):
    return preflight.prepare(loader.load_recipe(write_recipe(folder, values), list(overrides)))


def files(folder, **tables):
    return {name: {"path": str(write_jsonl(folder / f"{name}.jsonl", table))} for name, table in tables.items()}


def labeled(texts, label="a"):
    return [{"text": text, "label": label} for text in texts]


def test_rows_classes_and_repeats_are_counted_per_part(encoder, tmp_path):
    table = files(
        tmp_path,
        train=[*labeled(f"film {i}" for i in range(9)), *labeled(["Film  3", "was bad"], "b"), *labeled(["x"], "c")],
        validation=[*labeled(["film 1", "very new"]), *labeled(["other"], "b")],
        test=labeled(["FILM 2", "film 2", "film 3"]),
    )
    values = classification(encoder, "unused", tmp_path)
    values["data"] |= table
    seen = prepared(tmp_path, values).data
    assert {p.name: (p.rows, p.used, p.repeated, p.in_train) for p in seen.parts} == {
        "train": (12, 12, 1, None),
        "validation": (3, 3, 0, 1),
        "test": (3, 3, 1, 3),
    }
    assert [p.classes for p in seen.parts] == [
        {"a": 9, "b": 2, "c": 1},
        {"a": 2, "b": 1, "c": 0},
        {"a": 3, "b": 0, "c": 0},
    ]
    assert seen.contradictions == 1
    assert seen.classes()[1] == [["a", "9", "2", "3", ""], ["b", "2", "1", "0", "rare"], ["c", "1", "0", "0", "rare"]]
    told = " ".join(seen.warnings)
    assert f"2 of 3 classes have fewer than {RARE} rows ('c' 1, 'b' 2)" in told
    assert "1 input of validation and 3 inputs of test are in train too" in told
    assert re.search(r"1 input has different labels \('[Ff]ilm +3': '[ab]' and '[ab]'\)", told)


def test_rows_that_are_left_out_are_counted_with_the_reason(encoder, tmp_path):
    table = [*labeled([f"film {i}" for i in range(30)]), *labeled([f"plot {i}" for i in range(30)], "b")]
    table += [*labeled(["film 1"] * 5), *labeled(["so"] * 4, "c")]
    values = classification(encoder, write_jsonl(tmp_path / "t.jsonl", table), tmp_path)
    values["data"] |= {"classes": ["a", "b"], "deduplicate": True, "max_train": 20, "max_test": 5}
    train, _, test = prepared(tmp_path, values).data.parts
    assert dict(train.left_out) == {
        "not in data.classes": 4,
        "repeated (data.deduplicate)": 5,
        "over data.max_train": 16,
    }
    assert (train.used, train.rows) == (20, 45)
    assert (test.used, dict(test.left_out)) == (5, {"over data.max_test": 7})


def test_lengths_are_those_before_truncation(encoder, tmp_path, monkeypatch):
    table = labeled([WORDS * n for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)]) + labeled([WORDS * 2] * 10, "b")
    values = classification(encoder, "unused", tmp_path)
    values["data"] |= files(tmp_path, train=table, validation=table, test=table)
    for part in prepared(tmp_path, values).data.parts:
        assert part.lengths == looking.Lengths(10, 38, 42, 7 / 20)  # four words each, and two special tokens
    monkeypatch.setattr(looking, "CAP", 5)
    train, _, test = prepared(tmp_path, values).data.parts
    assert (train.lengths.sample, test.lengths.sample) == (5, 5)
    assert train.lengths.median == 10
    assert "Lengths of train: of a sample of 5." in prepared(tmp_path, values).data.facts()


def conversations(folder, chat_model, answered: int, filled: int):
    long = "question " + "very " * 60
    table = [
        {"question": f"{'question' if i < answered else long} {i}", "answer": "yes"} for i in range(answered + filled)
    ]
    values = sft(chat_model, "unused", folder, metrics=["loss"], train={"max_steps": 1, "precision": "float32"})
    values["data"] |= files(folder, train=table[::-1], validation=table)
    values["data"]["split"] = {"test": 0}
    return values


def test_rows_of_sft_without_a_loss_are_not_counted_as_trained_on(chat_model, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_run", lambda *_: None)
    path = write_recipe(tmp_path, conversations(tmp_path, chat_model, 8, 8))
    said = CliRunner().invoke(app, ["train", path, "--quiet"], catch_exceptions=False).stderr
    assert "their prompt fills data.max_length=24: 8 of train, 8 of validation; raise it to 66 or more" in said
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written["rows"] == {"train": 8, "validation": 8, "test": 0}
    part = written["data"]["parts"][0]
    assert (part["rows"], part["used"], part["left_out"]) == (16, 8, {"no loss within data.max_length": 8})
    assert (part["lengths"]["longest"], part["lengths"]["truncated"]) == (67, 0.5)
    fitting = prepared(tmp_path, conversations(tmp_path, chat_model, 8, 8), "data.max_length=66").data
    assert [dict(p.left_out) for p in fitting.parts] == [{}, {}]


def test_the_example_shown_has_a_loss(chat_model, tmp_path):
    path = write_recipe(tmp_path, conversations(tmp_path, chat_model, 4, 12))
    shown = json.loads(CliRunner().invoke(app, ["plan", path, "--json"]).stdout)
    assert "yes" in "".join(part["text"] for part in shown["preview"] if part["trained"])
    assert [part["used"] for part in shown["data"]["parts"]] == [4, 4]
    long = [{"role": "user", "content": "very " * 30}, {"role": "assistant", "content": "no"}]
    talk = [{"role": "user", "content": "so"}, {"role": "assistant", "content": "yes"}, *long]
    values = conversations(tmp_path, chat_model, 4, 4)
    values["data"] |= files(tmp_path, train=[{"m": talk}] * 8, validation=[{"m": talk}])
    values["data"]["columns"] = {"messages": "m"}
    shown = json.loads(CliRunner().invoke(app, ["plan", write_recipe(tmp_path, values), "--json"]).stdout)
    assert "yes" in "".join(part["text"] for part in shown["preview"] if part["trained"])
    train = shown["data"]["parts"][0]
    assert (train["used"], train["left_out"], train["lengths"]["truncated"]) == (8, {}, 0.5)


def test_prompts_may_have_several_answers_and_choices_are_counted_as_classes(chat_model, tmp_path):
    table = [{"question": f"question {i // 2} yes/no", "answer": ("yes", "no")[i % 2]} for i in range(20)]
    values = sft(chat_model, "unused", tmp_path, metrics=["loss"])
    values["data"] |= files(tmp_path, train=table, validation=table[:4]) | {"split": {"test": 0}}
    seen = prepared(tmp_path, values).data
    assert "10 prompts have more than one answer." in seen.facts()
    assert not any("different labels" in warning for warning in seen.warnings)
    values["data"]["choices"] = {"after": " "}
    values["metrics"] = ["accuracy"]
    chosen = prepared(tmp_path, values).data
    assert chosen.parts[0].classes == {"yes": 10, "no": 10}
    assert any("10 inputs have different labels" in warning for warning in chosen.warnings)


def test_of_many_classes_the_rarest_and_the_most_frequent_are_shown(encoder, tmp_path):
    table = [{"text": f"film {i} {k}", "label": f"c{k:02}"} for k in range(20) for i in range(k + 2)]
    values = classification(encoder, write_jsonl(tmp_path / "t.jsonl", table), tmp_path)
    header, lines = prepared(tmp_path, values).data.classes()
    assert (header[0], len(lines)) == ("20 classes", SHOWN)
    assert [line[0] for line in lines] == ["c01", "c00", "c02", "c03", "...", "c17", "c18", "c19"]
    assert lines[4][-1] == "13 more"


def test_numbers_have_a_range(encoder, tmp_path):
    values = classification(encoder, write_jsonl(tmp_path / "t.jsonl", rows()), tmp_path, task="text-regression")
    values["data"]["columns"]["label"] = "score"
    seen = prepared(tmp_path, values).data
    assert (seen.numbers, seen.classes()) == ((0.5, 0.5, 1.5), None) or seen.numbers == (0.5, 1.5, 1.5)
    assert seen.facts()[0].startswith("Labels from 0.5 to 1.5, median")
    assert not seen.warnings


def test_numbers_that_a_new_head_does_not_reach_are_told(encoder, tmp_path):
    prices = [{**row, "score": 20000 + 10000 * (i % 3)} for i, row in enumerate(rows())]
    values = classification(encoder, write_jsonl(tmp_path / "t.jsonl", prices), tmp_path, task="text-regression")
    values["data"]["columns"]["label"] = "score"
    warnings = prepared(tmp_path, values).data.warnings
    assert any(
        "labels from 20000 to 40000 are far from 0" in said and "write each as (label - " in said for said in warnings
    )


def test_a_described_model_says_whether_its_data_are_here(encoder, tmp_path):
    values = classification(encoder, write_jsonl(tmp_path / "t.jsonl", rows()), tmp_path)
    values["model"] = {"hub": "some/model", "architecture": json.loads((encoder / "config.json").read_text())}
    shown = json.loads(CliRunner().invoke(app, ["plan", write_recipe(tmp_path, values), "--json"]).stdout)
    assert [(part["rows"], part["lengths"]) for part in shown["data"]["parts"]] == [(36, None), (12, None), (12, None)]
    for source, why in (
        ({"path": "$NOT_SET/t.csv"}, "data.train is not here: $NOT_SET/t.csv: the variable NOT_SET is not set"),
        ({"hub": "some/data"}, "data.train is downloaded, which a plan of a described model"),
    ):
        values["data"]["train"] = source
        out = CliRunner().invoke(app, ["plan", write_recipe(tmp_path, values)], env={"COLUMNS": "300"})
        assert out.exit_code == 0, out.output
        assert f"The data were not looked at: {why}" in out.stdout


def test_images_are_counted_too(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'lily-peft[vision]'")
    for i in range(20):
        (tmp_path / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        image.new("RGB", (4, 4), (i // 4 * 4, 0, 0)).save(tmp_path / "images" / "ab"[i % 2] / f"{i}.png")
    values = classification("unused", tmp_path / "images", tmp_path, task="image-classification")
    del values["data"]["columns"], values["data"]["max_length"]
    recipe = loader.load_recipe(write_recipe(tmp_path, values))
    seen = summarize(recipe, data.load_splits(recipe), {})
    assert seen.contradictions == 5
    assert [sum((part.classes or {}).values()) for part in seen.parts] == [part.used for part in seen.parts]
    assert sum(part.repeated + (part.in_train or 0) for part in seen.parts) >= 12
    assert seen.rows()[0] == ["", "rows", "used", "repeated", "also in train"]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("not relevant", "not_relevant", "relevant"), ["'not relevant'", "'not_relevant'"]),
        (("pos", "pos.", "neg"), ["'pos'", "'pos.'"]),
        (("01", "1", "2"), ["'01'", "'1'"]),
        (("+1", "-1", "1"), ["'+1'", "'1'"]),
        (("C", "C++", "C#"), None),
        (("A+", "A-", "A"), None),
        (("1.1", "1.10", "11"), None),
        (("none", "favor", "against"), None),
    ],
)
def test_classes_that_differ_in_punctuation_only_are_told(encoder, tmp_path, names, told):
    table = [{"text": f"text {i}", "label": names[i % 3]} for i in range(60)]
    values = classification(encoder, write_jsonl(tmp_path / "t.jsonl", table), tmp_path)
    warnings = prepared(tmp_path, values).data.warnings
    assert len(warnings) == (told is not None)
    for name in told or ():
        assert "classes differ only in punctuation" in warnings[0]
        assert name in warnings[0]
    assert prepared(tmp_path, values, "data.similar_labels=keep").data.warnings == ()


def test_parts_of_one_class_are_told(encoder, tmp_path):
    table = files(
        tmp_path,
        train=[*labeled([f"good {i}" for i in range(9)]), *labeled([f"bad {i}" for i in range(9)], "b")],
        validation=labeled(["so good"]),
        test=labeled(["very good"]),
    )
    values = classification(encoder, "unused", tmp_path)
    values["data"] |= table
    (told,) = prepared(tmp_path, values).data.warnings
    assert told.startswith("validation and test: all rows are of the class 'a', so results say nothing of the others")


def test_texts_that_the_model_cannot_read_are_told(encoder, tmp_path):
    table = [{"text": f"服务很好 {i}", "label": "ab"[i % 2]} for i in range(60)]
    values = classification(encoder, write_jsonl(tmp_path / "t.jsonl", table), tmp_path)
    (told,) = prepared(tmp_path, values).data.warnings
    assert re.search(r"train: \d+% of the tokens are unknown to the model, which reads \[UNK\]", told)


def test_a_class_named_as_a_missing_value_of_python_is_told(encoder, tmp_path):
    table = [{"text": f"text {i}", "label": ("None", "pos")[i % 2]} for i in range(60)]
    values = classification(encoder, write_jsonl(tmp_path / "t.jsonl", table), tmp_path)
    assert "a class is named 'None'" in prepared(tmp_path, values).data.warnings[0]


@pytest.mark.parametrize("chat", [False, True])
def test_answers_that_repeat_their_prompt_are_told(chat_model, tmp_path, chat):
    pairs = [(f"good {i}", f"good {i} " if i % 2 else "yes") for i in range(40)]
    table = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} if chat
        else {"question": q, "answer": a}
        for q, a in pairs
    ]  # fmt: skip
    values = sft(chat_model, write_jsonl(tmp_path / "t.jsonl", table), tmp_path)
    if chat:
        values["data"]["columns"] = {"messages": "messages"}
    seen = prepared(tmp_path, values).data
    told = [int(n) for n in re.findall(r": (\d+) answers are the same text as their prompt", "\n".join(seen.warnings))]
    assert len(told) == 3
    assert sum(told) == 20
