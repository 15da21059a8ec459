"""Small dirty files: `lily plan` says in one look what is wrong with each, and `lily train` says it too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from recipes_helpers import classification, sft, write_recipe
from typer.testing import CliRunner

from lily.cli.main import app
from lily.errors import LilyError
from lily.recipes import train as training

DIRTY = Path(__file__).parent / "dirty"
SFT: dict[str, Any] = {"task": "sft"}
CHAT: dict[str, Any] = {"task": "sft", "columns": {"messages": "messages"}}

# file, keys of `data` besides the usual ones, what is said, whether it is refused (None: either, as long as it is said)
CASES: list[tuple[str, dict[str, Any], list[str], bool | None]] = [
    ("open_quote.csv", {}, [r"open_quote\.csv:22: not valid csv.*close it"], True),
    ("quote_closed_below.csv", {}, [r":22: column 'text' holds 31 lines, 30 of which look like rows"], False),
    ("hundred_lines.csv", {}, [r":32: column 'text' holds 120 lines; if that is not one text, close its quote"], False),
    ("semicolons.csv", {}, [r"is separated by semicolons, not commas; data\.delimiter: ';' says"], False),
    ("comma_in_text.csv", {}, [r":9: 3 fields, expected 2 .*a comma inside a text needs quotes"], True),
    ("no_header.csv", {}, [r"no column 'text' .*if the file has no header line, set header"], True),
    ("cp1252.csv", {}, [r"byte 0xe9 in line 4\).*data\.encoding: cp1252"], True),
    ("cp1252.csv", {"encoding": "latin-1"}, [r"train +36 +36 "], False),
    ("utf16.csv", {}, [r"holds NUL bytes.*data\.encoding: utf-16-le"], True),
    ("mojibake.csv", {}, [r"train: \d+ texts were once decoded wrongly"], False),
    ("half_surrogate.jsonl", {}, [r"row 34: column 'text' holds half of a surrogate pair"], True),
    ("half_answer.jsonl", SFT, [r"row 5: column 'answer' holds half of a surrogate pair"], True),
    ("spellings.csv", {}, [r"holds 'pos' \(\d rows\), .*differ only in spaces, case or notation"], True),
    ("spellings.csv", {"similar_labels": "merge"}, [r"merged into the most frequent", r"pos +18 +6 +6"], False),
    ("booleans.jsonl", {}, [r"'1' \(20 rows\) and 'True' \(10 rows\); '0'.*similar_labels: merge"], True),
    ("missing_values.csv", {}, [r"a class is named 'nan', as missing values are", r"nan +4 +1 +1 +rare"], False),
    ("empty_label.csv", {}, [r"column 'label' is empty in row 12; fill it, or remove the row"], True),
    (
        "rare_classes.csv",
        {},
        [r"2 of 4 classes have fewer than 5 rows \('awfull' 1, 'fine' 1\)", r"fine +1 +0 +0 +rare"],
        False,
    ),
    ("contradictions.csv", {}, [r"8 inputs have different labels \('the "], False),
    (
        "clean.csv",
        {"test": {"path": str(DIRTY / "leaking_test.csv")}},
        [r"\d+ inputs of test are in train too.*from one of"],
        False,
    ),
    ("repeats.csv", {}, [r"\d+ inputs of validation and .* are in train too.*data\.deduplicate: true"], False),
    ("repeats.csv", {"deduplicate": True}, [r"Left out of train: 40 repeated \(data\.deduplicate\)"], False),
    (
        "long_texts.jsonl",
        {},
        [r"train: \d+% of the examples are cut at data\.max_length=16; the longest has 58 tokens"],
        False,
    ),
    (
        "pairs.jsonl",
        {"columns": {"text": "a", "text_pair": "b", "label": "label"}},
        [r"3 inputs have different labels"],
        False,
    ),
    (
        "scores.csv",
        {"task": "text-regression", "columns": {"text": "text", "label": "score"}},
        [r"label 3\.5, so there is"],
        False,
    ),
    (
        "long_prompts.jsonl",
        SFT,
        [r"prompt fills data\.max_length=24: 5 of train, .*raise it to 5\d or more", r"train +10 +5 "],
        False,
    ),
    ("empty_turns.jsonl", CHAT, [r"empty"], True),
    ("empty_answers.jsonl", SFT, [r"train: 2 answers are empty but for special tokens such as the end token"], False),
]


def recipe_of(folder: Path, encoder: Path, chat_model: Path, name: str, keys: dict[str, Any]) -> str:
    keys = dict(keys)
    task = keys.pop("task", "text-classification")
    values = (sft if task == "sft" else classification)(chat_model if task == "sft" else encoder, DIRTY / name, folder)
    values |= {"task": task, "metrics": ["loss"], "train": {"max_steps": 1, "precision": "float32"}}
    values["data"] |= keys
    return write_recipe(folder, values)


def said_by(command: str, path: str) -> tuple[str, bool]:
    """What a command says, on one line, and whether it refused."""
    out = CliRunner().invoke(app, [command, path], env={"COLUMNS": "300"})
    if out.exception is not None:
        assert isinstance(out.exception, LilyError), out.exception
    text = out.stdout if command == "plan" else out.stderr
    return f"{text}\n{out.exception or ''}", out.exception is not None


@pytest.mark.parametrize(("name", "keys", "wanted", "refused"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_a_dirty_file_is_not_trained_in_silence(
    tmp_path, encoder, chat_model, monkeypatch, name, keys, wanted, refused
):
    monkeypatch.setattr(training, "_run", lambda *_: None)  # everything before the first step, and what is written
    path = recipe_of(tmp_path, encoder, chat_model, name, keys)
    for command in ("plan", "train"):
        said, ended = said_by(command, path)
        print(said)
        assert refused is None or ended == refused
        if command == "train" and not ended:  # which shows warnings; the tables are in its log
            said = f"{said}\n{(tmp_path / 'run' / 'train.log').read_text('utf-8')}"
        for pattern in wanted:
            assert re.search(pattern, said), (command, pattern)
    assert (tmp_path / "run" / "metrics.json").exists() != ended
    if not ended:
        look = said_by("plan", path)[0].partition("\ndata ─")[2].partition("\ntraining ─")[0]
        assert 3 < len(look.strip().splitlines()) <= 16
        assert json.loads((tmp_path / "run" / "metrics.json").read_text())["data"]["parts"][0]["name"] == "train"


def test_there_are_twenty_files():
    assert len({name for name, *_ in CASES}) >= 20
    assert {name for name, *_ in CASES} | {"leaking_test.csv"} == {path.name for path in DIRTY.iterdir()}
