"""Half a surrogate pair, in what the commands that use an adapter read and write."""

from __future__ import annotations

import io
import json

import pytest
from typer.testing import CliRunner

from lily.cli.evaluate import _write
from lily.cli.main import app
from lily.errors import LilyError
from lily.insight.texts import load_texts


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
