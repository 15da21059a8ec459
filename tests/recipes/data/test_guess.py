"""`lily new`: what a file of somebody's own data is for, and the recipe that is written."""

from __future__ import annotations

import json
import random
import re
import zipfile
from pathlib import Path

import pytest
import yaml
from docs_blocks import blocks
from typer.testing import CliRunner

from lily.cli.main import app
from lily.errors import LilyError
from lily.recipes import loader
from lily.recipes.data.guess import guess
from lily.recipes.data.rows import load_splits
from lily.recipes.new import name_for, recipe_text

WORDS = ("area", "man", "wins", "award", "for", "sitting", "down", "while", "parliament", "passes", "a", "budget")


def sentence(i):
    drawn = random.Random(i)
    return " ".join(drawn.choices(WORDS, k=drawn.randint(4, 12)))


def table(path, columns, n=60, separator=","):
    """A csv of n rows; `columns`: name -> value of row i."""
    lines = [separator.join(columns)]
    lines += [separator.join(str(value(i)) for value in columns.values()) for i in range(n)]
    path.write_text("\n".join(lines) + "\n")
    return path


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def label(i):
    return ("bad", "good")[i % 2]


CSV = {
    "named columns": ({"id": lambda i: i, "review": sentence, "stars": label}, "text-classification",
                      {"text": "review", "label": "stars"}),
    "unnamed columns": ({"a": lambda i: i, "b": sentence, "c": label}, "text-classification",
                        {"text": "b", "label": "c"}),
    "a date and an author": ({"date": lambda i: f"2026-01-{i:02}", "author": lambda i: f"x{i}", "body": sentence,
                              "topic": label}, "text-classification", {"text": "body", "label": "topic"}),
    "two texts": ({"premise": sentence, "hypothesis": lambda i: sentence(-i - 1), "label": lambda i: i % 3},
                  "text-classification", {"text": "premise", "text_pair": "hypothesis", "label": "label"}),
    "numbers": ({"text": sentence, "score": lambda i: i / 7}, "text-regression", {"text": "text", "label": "score"}),
    "stars as classes": ({"review": sentence, "rating": lambda i: i % 5 + 1}, "text-classification",
                         {"text": "review", "label": "rating"}),
    "prompts": ({"prompt": sentence, "completion": label}, "sft", {"prompt": "prompt", "completion": "completion"}),
    "questions with long answers": ({"question": sentence, "answer": lambda i: sentence(i + 500)}, "sft",
                                    {"prompt": "question", "completion": "answer"}),
    "questions with classes": ({"question": sentence, "answer": label}, "text-classification",
                               {"text": "question", "label": "answer"}),
    "paths of images under another name": ({"image_id": lambda i: f"{i}.jpg", "breed": label}, "image-classification",
                                           {"image": "image_id", "label": "breed"}),
    "a text beside a path of an image": ({"body": sentence, "thumbnail": lambda i: f"{i}.jpg", "kind": label},
                                         "text-classification", {"text": "body", "label": "kind"}),
    "a question, an answer, and whether it fits": (
        {"question": sentence, "answer": lambda i: sentence(i + 500), "label": lambda i: i % 2}, "text-classification",
        {"text": "question", "text_pair": "answer", "label": "label"}),
    "a review with a summary and stars": (
        {"UserId": lambda i: f"A{i % 3}", "Score": lambda i: i % 5, "Summary": sentence, "Text": sentence},
        "text-classification", {"text": "Text", "label": "Score"}),
    "prompts with a mark": (
        {"prompt": sentence, "completion": lambda i: sentence(i + 500), "label": lambda i: i % 2 == 0}, "sft",
        {"prompt": "prompt", "completion": "completion"}),
    "ids and dates that repeat": (
        {"customer_id": lambda i: 1000 + i % 3, "day": lambda i: f"2026-01-{i % 2 + 1:02}", "body": sentence,
         "team": lambda i: "abcdef"[i % 6]}, "text-classification", {"text": "body", "label": "team"}),
    "a language beside a label": (
        {"lang": label, "body": sentence, "gold_label": lambda i: "abc"[i % 3]}, "text-classification",
        {"text": "body", "label": "gold_label"}),
    "numbers within the names of two texts": (
        {"Quality": lambda i: i % 2, "#1 String": sentence, "#2 String": lambda i: sentence(-i - 1)},
        "text-classification", {"text": "#1 String", "text_pair": "#2 String", "label": "Quality"}),
    "paths of images": ({"file": lambda i: f"x/{i}.png", "label": label}, "image-classification",
                        {"image": "file", "label": "label"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CSV)
def test_task_and_columns_of_a_table(tmp_path, name):
    columns, task, expected = CSV[name]
    found = guess(table(tmp_path / "mine.csv", columns))
    assert (found.task, found.columns) == (task, expected)
    assert set(found.unused) == set(columns) - set(expected.values())
    assert found.rows == 60


def test_alpacas_input_goes_with_the_instruction(tmp_path):
    rows = [{"instruction": sentence(i), "input": "", "output": sentence(-i)} for i in range(9)]
    found = guess(jsonl(tmp_path / "alpaca.jsonl", rows))
    assert found.columns == {"prompt": "instruction", "completion": "output", "input": "input"}


@pytest.mark.parametrize("key", ["messages", "conversations", "whatever"])
def test_chats_are_found_under_any_name(tmp_path, key):
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 90}]
    found = guess(jsonl(tmp_path / "talks.jsonl", [{"id": i, key: said} for i in range(9)]))
    assert (found.task, found.columns, found.answer) == ("sft", {"messages": key}, 90)


def test_a_folder_of_images_has_its_classes(tmp_path):
    for kind, n in (("cat", 5), ("dog", 4)):
        (tmp_path / "pets" / kind).mkdir(parents=True)
        for i in range(n):
            (tmp_path / "pets" / kind / f"{i}.JPG").touch()
    found = guess(tmp_path / "pets")
    assert (found.task, found.rows, found.classes) == ("image-classification", 9, {"cat": 5, "dog": 4})


def test_images_further_down_are_named(tmp_path):
    for part in ("Train", "Test"):
        (tmp_path / "pets" / "data" / part / "cat").mkdir(parents=True)
        (tmp_path / "pets" / "data" / part / "cat" / "1.png").touch()
    with pytest.raises(LilyError, match=r"holds no images .* in folders of classes, but \S*pets/data does; name that"):
        guess(tmp_path / "pets")


def test_folders_in_classes_are_no_classes(tmp_path):
    for kind in ("cat", "dog"):
        for place in ("indoor", "outdoor"):
            (tmp_path / "pets" / kind / place).mkdir(parents=True)
            for i in range(5):
                (tmp_path / "pets" / kind / place / f"{i}.png").touch()
    with pytest.raises(LilyError, match=r"the images are one folder deeper.*; if cat is a class, put its images into"):
        guess(tmp_path / "pets")


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (("config.json", "tokenizer.json", "model.safetensors"), "the folder of a model"),
        (("adapter_config.json", "adapter_model.safetensors"), "the folder of an adapter"),
        (("metrics.json", "predictions.json", "recipe.yaml"), "the folder of a run"),
        (("model_index.json",), "the folder of a pipeline of diffusers"),
    ],
)
def test_a_model_is_no_data(tmp_path, files, what):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(LilyError, match=f"is {what}, not data; name a table"):
        guess(tmp_path)


def test_a_config_beside_a_table_is_no_model(tmp_path):
    table(tmp_path / "train.csv", {"text": sentence, "label": label})
    (tmp_path / "config.json").write_text("{}")
    assert guess(tmp_path).path == tmp_path / "train.csv"


def test_cells_that_are_missing_are_no_class_and_no_number(tmp_path):
    measured = {"text": sentence, "price": lambda i: i / 7 if i % 4 else ""}
    found = guess(table(tmp_path / "x.csv", measured))
    assert (found.task, found.columns) == ("text-regression", {"text": "text", "label": "price"})
    # as pandas writes them
    rows = [{"text": sentence(i), "label": float(i % 2) if i % 5 else float("nan")} for i in range(60)]
    found = guess(jsonl(tmp_path / "x.jsonl", rows))
    assert found.classes == {"1.0": 24, "0.0": 24}
    assert "label is empty in 12 rows (1, 6, 11, ...)" in " ".join(found.told)


def test_the_text_that_a_question_is_about_goes_with_it(tmp_path):
    rows = [{"question": sentence(i), "answer": sentence(-i), "context": sentence(i + 90)} for i in range(9)]
    found = guess(jsonl(tmp_path / "questions.jsonl", rows))
    assert found.columns == {"prompt": "question", "completion": "answer", "input": "context"}


def test_a_line_of_names_that_is_missing_is_noticed(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("".join(f"{i}\t{sentence(i)}\t{label(i)}\n" for i in range(60)))
    found = guess(path)
    assert found.how == {"header": ["column1", "column2", "column3"]}
    assert found.columns == {"text": "column2", "label": "column3"}
    assert found.rows == 60


def test_files_beside_a_training_file_are_used(tmp_path):
    for part in ("train", "dev", "test"):
        table(tmp_path / f"{part}.csv", {"text": sentence, "label": label})
    found = guess(tmp_path / "train.csv")
    assert found.others == {"validation": tmp_path / "dev.csv", "test": tmp_path / "test.csv"}
    assert "split" not in recipe_text(found, "x")


def test_what_the_user_names_comes_first(tmp_path):
    path = table(tmp_path / "x.csv", {"title": sentence, "body": sentence, "kind": label, "label": label})
    assert guess(path, columns={"text": "body", "label": "kind"}).columns == {"text": "body", "label": "kind"}
    assert guess(path, task="text-regression").task == "text-regression"
    assert guess(path, task="sft", columns={"prompt": "title", "completion": "body"}).task == "sft"


@pytest.mark.parametrize(
    ("columns", "given", "said"),
    [
        (
            {"text": sentence},
            {},
            "columns text; texts alone have nothing to predict, so add a column with a label or an answer",
        ),
        ({"a": lambda i: i, "b": lambda i: i}, {}, "not clear what to learn from the columns a, b"),
        ({"text": sentence, "label": label}, {"label": "lable"}, "no column 'lable'; did you mean label?"),
        ({"text": sentence, "label": label}, {"label": "xyz"}, "no column 'xyz'; it has text, label"),
    ],
)
def test_what_is_not_clear_is_said(tmp_path, columns, given, said):
    with pytest.raises(LilyError, match=said.replace("?", r"\?")):
        guess(table(tmp_path / "x.csv", columns), columns=given)


def test_a_path_that_is_no_data(tmp_path):
    table(tmp_path / "in$USD.csv", {"text": sentence, "label": label})
    with pytest.raises(LilyError, match="starts a variable; rename"):
        guess(tmp_path / "in$USD.csv")
    (tmp_path / "in$USD.csv").unlink()
    with pytest.raises(LilyError, match="there is no such file or folder"):
        guess(tmp_path / "none.csv")
    with pytest.raises(LilyError, match=r"holds no images .* in folders of classes; make one folder per class"):
        guess(tmp_path)
    (tmp_path / "empty.csv").write_text("text,label\n")
    with pytest.raises(LilyError, match="has no rows"):
        guess(tmp_path / "empty.csv")


def pair(i):
    return [{"role": "user", "content": sentence(i)}, {"role": "assistant", "content": sentence(-i)}]


# file name, its text, and what of the guess is expected
TEXTS = "".join(f"{sentence(i)};{label(i)}\n" for i in range(40))
AS_FOUND = {
    "semicolons": ("x.csv", "text;label\n" + TEXTS, {"how": {"delimiter": ";"}}),
    "an index without a name": (
        "x.csv",
        ",text,label\n" + "".join(f"{i},{sentence(i)},{label(i)}\n" for i in range(40)),
        {"how": {}, "columns": {"text": "text", "label": "label"}, "unused": ()},
    ),
    "short lines without a header": ("x.csv", TEXTS, {"how": {"delimiter": ";", "header": ["column1", "column2"]}}),
    "numbers in a first row": (
        "x.csv",
        "".join(f"{i % 2},{sentence(i)},{i % 2}\n" for i in range(40)),
        {"how": {"header": ["column1", "column2", "column3"]}},
    ),
    "Windows' letters": (
        "x.csv",
        ("text,label\n" + TEXTS.replace(";", " caf\xe9,")).encode("cp1252"),
        {"how": {"encoding": "cp1252"}},
    ),
    "lines of JSON": (
        "x.json",
        "".join(json.dumps({"text": sentence(i), "label": i % 2}) + "\n" for i in range(40)),
        {"how": {"format": "jsonl"}},
    ),
    "a text file": ("x.txt", "text\tlabel\n" + TEXTS.replace(";", "\t"), {"how": {"format": "csv", "delimiter": "\t"}}),
    "nested": (
        "x.jsonl",
        "".join(json.dumps({"doc": {"text": sentence(i)}, "meta": {"label": label(i)}}) + "\n" for i in range(40)),
        {"columns": {"text": "doc.text", "label": "meta.label"}},
    ),
    "chats as JSON in a csv": (
        "x.csv",
        "id,messages\n" + "".join(f"""{i},"{json.dumps(pair(i)).replace('"', '""')}"\n""" for i in range(9)),
        {"columns": {"messages": "messages"}},
    ),
    "labels in lists of one": (
        "x.jsonl",
        "".join(json.dumps({"text": sentence(i), "label": [label(i)]}) + "\n" for i in range(40)),
        {"columns": {"text": "text", "label": "label.0"}, "classes": {"bad": 20, "good": 20}},
    ),
    "a system prompt beside prompts": (
        "x.csv",
        "prompt,completion,system_prompt\n" + "".join(f"{sentence(i)},{sentence(-i)},be kind\n" for i in range(9)),
        {"columns": {"prompt": "prompt", "completion": "completion", "system": "system_prompt"}, "unused": ()},
    ),
    "tools beside chats": (
        "x.jsonl",
        "".join(json.dumps({"messages": pair(i), "tools": []}) + "\n" for i in range(9)),
        {"columns": {"messages": "messages"}, "unused": ()},
    ),
    "prompts and completions of messages": (
        "x.jsonl",
        "".join(json.dumps({"prompt": pair(i)[:1], "completion": pair(i)[1:]}) + "\n" for i in range(9)),
        {"columns": {"prompt": "prompt", "completion": "completion"}},
    ),
    "names in capitals": (
        "x.jsonl",
        "".join(json.dumps({"Question": sentence(i), "Answer": sentence(-i)}) + "\n" for i in range(40)),
        {"columns": {"prompt": "Question", "completion": "Answer"}},
    ),
    "numbered texts": (
        "x.csv",
        "q1,q2,duplicate\n" + "".join(f"{sentence(i)},{sentence(-i)},{i % 2}\n" for i in range(40)),
        {"columns": {"text": "q1", "text_pair": "q2", "label": "duplicate"}},
    ),
    "a price": (
        "x.csv",
        "id,text,price\n" + "".join(f"{i},{sentence(i)},{i * 13}\n" for i in range(60)),
        {"task": "text-regression", "columns": {"text": "text", "label": "price"}},
    ),
    "missing numbers": (
        "x.csv",
        "text,label\n" + "".join(f"{sentence(i)},{('1', '2', 'nan')[i % 3]}\n" for i in range(60)),
        {"task": "text-classification"},
    ),
}


@pytest.mark.parametrize("name", AS_FOUND)
def test_files_are_read_as_they_are_found(tmp_path, name):
    file, text, expected = AS_FOUND[name]
    path = tmp_path / file
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = guess(path)
    assert {key: getattr(found, key) for key in expected} == expected
    (tmp_path / "x.yaml").write_text(recipe_text(found, "x"))
    load_splits(loader.load_recipe(str(tmp_path / "x.yaml")))


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (
            {"text": sentence, "kind": label, "country": lambda i: ["de", "fr", "it"][i % 3]},
            "a guess.*--label: country",
        ),
        ({"text": lambda i: "" if i == 3 else sentence(i), "label": label}, r"text is empty in 1 row \(4\): fill"),
        (
            {"text": sentence, "label": label, "split": lambda i: ["train", "test"][i % 2]},
            "split says what a row is",
        ),
        ({"text": lambda i: f"очень хороший отель {i}", "label": label}, "other scripts"),
        ({"text": sentence, "label": lambda i: ("a|b", "b|c")[i % 2]}, "labels look like lists"),
        ({"text": sentence, "label": lambda i: ("a", "b", "NA")[i % 3]}, "'NA' may stand for a missing .* its 20 rows"),
        ({"text": sentence, "author_id": label}, "author_id may be an id or a date"),
        ({"word": lambda i: f"w{i}", "tag": label}, "do not train NER"),
        (
            {"prompt": sentence, "completion": lambda i: sentence(-i), "label": lambda i: i % 2},
            "label is not used, and every answer is learned",
        ),
    ],
)
def test_what_somebody_should_know_stands_in_the_recipe(tmp_path, columns, told):
    assert re.search(told, recipe_text(guess(table(tmp_path / "x.csv", columns)), "x"))


@pytest.mark.parametrize(
    ("columns", "n", "said"),
    [
        ({"text": sentence, "label": lambda i: "x"}, 60, "'label' is 'x' in every row"),
        ({"text": sentence, "label": lambda i: f"l{i}"}, 60, "60 different values in 60 rows, so they are no classes"),
        ({"text": sentence, "score": lambda i: f"{i}%"}, 60, "write them as plain numbers such as 1234.5, not '0%'"),
        ({"text": sentence, "price": lambda i: f"${i}.5"}, 60, "holds amounts such as '$0.5'"),
        ({"id": lambda i: f"a{i}b", "breed": label}, 60, "'breed' holds classes, but no column beside it texts"),
        ({"file_name": lambda i: f"{i}.png", "caption": sentence}, 60, "no classes of the images of 'file_name'"),
        ({"text": sentence, "price": lambda i: f'"{i},{50 - i % 9}"'}, 60, "holds amounts such as '0,50'"),
        ({"text": sentence, "label": label}, 5, "has 5 rows .*, too few to hold any out"),
        ({"prompt": sentence, "completion": sentence}, 3, "has 3 rows, too few to hold any out.*; give 4 rows or more"),
        ({"text": sentence, "label": lambda i: f"l{i % 1100}"}, 9900, "1,100 classes, and at most 1,000 are trained"),
        ({"prompt": sentence, "chosen": sentence, "rejected": sentence}, 9, "TRL's DPOTrainer.*--completion chosen"),
    ],
)
def test_data_that_cannot_be_learned_say_why(tmp_path, columns, n, said):
    with pytest.raises(LilyError, match=said.replace("$", r"\$")):
        guess(table(tmp_path / "x.csv", columns, n))


@pytest.mark.parametrize(
    ("file", "value", "said"),
    [
        ("x.json", {"text": ["a b"] * 9, "label": ["x"] * 9}, "not one of columns or of rows by name (text, label)"),
        ("x.json", {str(i): {"text": sentence(i), "label": label(i)} for i in range(9)}, "pandas writes a list with"),
        ("x.json", [pair(i) for i in range(9)], 'write each chat as {"messages": [...]}'),
        ("x.json", {"a text": "x", "b text": "y"}, 'one for each row, such as [{"text": "...", "label": "..."}]'),
        ("x.jsonl", [{"text": sentence(i), "labels": ["a", "b"][: i % 2 + 1]} for i in range(9)], "'labels' holds ['a"),
        ("x.jsonl", [{"text": sentence(i), "messages": [{"who": "me"}]} for i in range(9)], "'messages' holds no mess"),
        ("x.jsonl", [{"text": f"<|im_start|>user\n{i}"} for i in range(9)], "'text' holds whole chats as texts"),
        (
            "x.jsonl",
            [{"messages": pair(i)[:1]} for i in range(9)],
            "'messages' holds no answer; its first row ends",
        ),
        ("x.jsonl", [{"contents": [{"role": "model", "parts": [{"text": "x"}]}]}] * 9, "'contents' holds no answer"),
        (
            "x.jsonl",
            [{"chosen": pair(i), "rejected": pair(-i)} for i in range(9)],
            "alone: --messages chosen",
        ),
        ("x.jsonl", [{"prompt": "x", "chosen": pair(i), "rejected": pair(-i)} for i in range(9)], "--messages chosen"),
        ("x.jsonl", [{"chosen": "Human: x", "rejected": "Human: y"}] * 9, "not for recipes; else name them"),
        ("x.jsonl", [{"tokens": ["a", "b"], "ner_tags": [0, i]} for i in range(9)], "classes of single words (NER)"),
        (
            "x.json",
            [{"image": {"bytes": "x", "path": f"{i}.png"}, "label": label(i)} for i in range(9)],
            "'image' holds",
        ),
        ("x.jsonl", [{"text": "a b c", "label": "x"}], "it has one row, and nothing is learned from that"),
    ],
)
def test_other_shapes_of_json_are_named(tmp_path, file, value, said):
    lines = [value] if file == "x.json" else value
    (tmp_path / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(LilyError) as caught:
        guess(tmp_path / file)
    assert said in str(caught.value)


def test_lists_are_no_classes_though_somebody_names_them(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"text": sentence(i), "kind": ["a", "b"]} for i in range(9)])
    with pytest.raises(LilyError, match="a class is one text or number"):
        guess(path, columns={"label": "kind"})


def test_calls_of_tools_count_as_answers(tmp_path):
    call = {"type": "function", "function": {"name": "look", "arguments": json.dumps({"what": sentence(1) * 3})}}
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    found = guess(jsonl(tmp_path / "x.jsonl", [{"messages": chat}] * 9))
    assert found.answer > len(json.dumps(call["function"]["arguments"]))


def test_an_archive_or_a_folder_that_holds_no_images_or_table_says_so(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x.csv", "text,label\n")
    with pytest.raises(LilyError, match=r"holds no images; .* unpack and name the table"):
        guess(tmp_path / "x.zip")
    (tmp_path / "saved").mkdir()
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / "saved" / name).write_text("{}")
    with pytest.raises(LilyError, match=r"save_to_disk writes; .*to_parquet"):
        guess(tmp_path / "saved")


def test_an_archive_of_images_is_looked_into(tmp_path, monkeypatch):
    monkeypatch.setenv("LILY_CACHE", str(tmp_path / "cache"))
    for name, folders in {
        "classes": ("cat", "dog"),
        "parts": ("train/cat", "train/dog", "test/cat"),
        "one": ("cat",),
    }.items():
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for number, folder in enumerate((*folders, folders[0])):
                for copy in range(4):
                    archive.writestr(f"{name}/{folder}/{number}-{copy}.png", "")
    found = guess(tmp_path / "classes.zip")
    assert (found.rows, found.classes) == (12, {"cat": 8, "dog": 4})
    with pytest.raises(LilyError, match=r"a folder for each part \(train, test\).*unpack it and name that"):
        guess(tmp_path / "parts.zip")
    with pytest.raises(LilyError, match=r"one class only \(cat\)"):
        guess(tmp_path / "one.zip")


def test_the_name_of_a_new_recipe_is_that_of_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "x.csv", {"text": sentence, "label": label})
    with pytest.raises(LilyError, match=r"ends with .yaml; write --out x.yaml"):
        CliRunner().invoke(app, ["new", "x.csv", "--out", "x.txt"], catch_exceptions=False)


def test_a_folder_may_hold_tables_or_parts(tmp_path):
    for part in ("train", "val", "test"):
        for kind in ("cat", "dog"):
            (tmp_path / "pets" / part / kind).mkdir(parents=True)
            (tmp_path / "pets" / part / kind / "1.png").touch()
    found = guess(tmp_path / "pets")
    assert (found.path, found.rows) == (tmp_path / "pets" / "train", 2)
    assert found.others == {"validation": tmp_path / "pets" / "val", "test": tmp_path / "pets" / "test"}
    (tmp_path / "tables").mkdir()
    table(tmp_path / "tables" / "my_train.csv", {"text": sentence, "label": label})
    (tmp_path / "tables" / "my_test.csv").write_text("text\nwithout labels\n")
    found = guess(tmp_path / "tables")
    assert (found.path.name, found.others) == ("my_train.csv", {})
    assert "my_test.csv beside it is not used, as it has no column 'label'" in recipe_text(found, "x")
    table(tmp_path / "tables" / "train2.csv", {"text": sentence, "label": label})
    (tmp_path / "tables" / "my_train.csv").rename(tmp_path / "tables" / "a.csv")
    (tmp_path / "tables" / "train2.csv").rename(tmp_path / "tables" / "b.csv")
    with pytest.raises(LilyError, match=r"holds 3 tables .*; name the one to train on: lily new"):
        guess(tmp_path / "tables")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Reviews 2024.csv", "reviews-2024"),
        ("data/My.Set/train.jsonl.gz", "my.set"),
        ("pets/", "pets"),
        ("Kunden März.csv", "kunden-marz"),
        ("日.csv", "mine"),
    ],
)
def test_names_of_recipes(path, name):
    assert name_for(Path(path)) == name


@pytest.mark.parametrize("name", CSV)
def test_the_recipe_is_one_and_holds_nothing_of_somebody_elses_data(tmp_path, name):
    columns, task, expected = CSV[name]
    path = tmp_path / "own.csv"
    table(path, columns)
    result = CliRunner().invoke(app, ["new", str(path), "--out", str(tmp_path / "own.yaml")])
    assert result.exit_code == 0, result.exception
    recipe = loader.load_recipe(str(tmp_path / "own.yaml"))
    assert recipe.task == task
    assert {k: v for k, v in recipe.data.columns.model_dump().items() if v is not None} == expected
    assert (recipe.data.deduplicate, recipe.data.max_train, recipe.data.max_test) == (False, None, None)
    assert recipe.data.max_length >= 128
    assert f"lily train {tmp_path / 'own.yaml'}" in result.stdout


def test_the_tutorial_shows_what_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = {block.file: block.text for block in blocks("docs/tutorials/text.md") if block.file}
    Path("reviews.csv").write_text(shown["reviews.csv"])
    written = recipe_text(guess(Path("reviews.csv")), "reviews")
    assert written in [block.text for block in blocks("docs/tutorials/text.md")]


def test_nothing_is_overwritten(tmp_path):
    path, out = table(tmp_path / "x.csv", {"text": sentence, "label": label}), tmp_path / "x.yaml"
    out.write_text("mine")
    result = CliRunner().invoke(app, ["new", str(path), "--out", str(out)])
    assert "exists; name another file with --out" in str(result.exception)
    assert out.read_text() == "mine"


def test_a_start_for_own_data_is_no_recipe_by_itself(tmp_path):
    assert not any(name.startswith("base/") for name in loader.shipped())
    with pytest.raises(LilyError, match="`lily new FILE` writes a recipe that extends it"):
        loader.load_recipe("base/encoder")
    with pytest.raises(LilyError, match="did you mean base/encoder"):
        loader.read(str(_written("extends: base/encodr\n", tmp_path / "typo.yaml")))


def _written(text, path):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(40, {"epochs": 10, "batch_size": 8}), (400, {"epochs": 3, "batch_size": 8}), (4000, {"epochs": 3})],
)
def test_few_chats_are_seen_more_often(tmp_path, rows, expected):
    asked = [{"prompt": f"what is {i} and {i} more", "completion": f"that is {2 * i} in all"} for i in range(rows)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), "utf-8")
    written = yaml.safe_load(recipe_text(guess(tmp_path / "talks.jsonl"), "talks"))
    assert written["train"] == expected
