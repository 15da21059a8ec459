"""Tables of every format, columns, splits."""

from __future__ import annotations

import gzip
import json

import pytest
from recipes_helpers import classification, rows, write_jsonl, write_recipe

from lily.errors import LilyError
from lily.recipes import data, loader
from lily.recipes.schema import File

TABLE = [{"text": "a, b", "label": "0"}, {"text": 'say "x"', "label": "1"}]


def written(folder, kind):
    path = folder / f"t.{kind}"
    if kind == "csv":
        path.write_text('text,label\n"a, b",0\n"say ""x""",1\n')
    elif kind == "tsv":
        path.write_text('text\tlabel\na, b\t0\nsay "x"\t1\n')
    elif kind == "json":
        path.write_text(json.dumps({"version": 1, "rows": TABLE}))
    elif kind == "jsonl":
        write_jsonl(path, TABLE)
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'lily-peft[dev]'")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(TABLE), path)
    else:
        path = folder / "t.tsv.gz"
        path.write_bytes(gzip.compress(b'text\tlabel\na, b\t0\nsay "x"\t1\n'))
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "gz"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    assert data.read_rows(File(path=str(written(tmp_path, kind)))) == TABLE


def test_a_file_without_a_header_takes_the_given_names(tmp_path):
    (tmp_path / "t.tsv").write_text("x\t1\t\ty\n")
    file = File(path=str(tmp_path / "t.tsv"), header=["source", "label", "mark", "sentence"])
    assert data.read_rows(file) == [{"source": "x", "label": "1", "mark": "", "sentence": "y"}]


def test_rows_are_streamed(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\nnot json\n')
    stream = data.stream_rows(path)
    assert next(stream) == {"a": 1}
    assert next(stream) == {"a": 2}
    with pytest.raises(LilyError, match=r"t\.jsonl:3"):
        next(stream)


def splits(encoder, folder, table, overrides=()):
    path = write_recipe(folder, classification(encoder, write_jsonl(folder / "t.jsonl", table), folder))
    return data.load_splits(loader.load_recipe(path, list(overrides)))


def test_a_split_is_disjoint_complete_stratified_and_fixed(encoder, tmp_path):
    table = [{"text": f"text {i}", "label": str(i % 3 == 0)} for i in range(300)]
    first, second = splits(encoder, tmp_path, table), splits(encoder, tmp_path, table, ["seed=5"])
    assert first == second
    parts = [first.train, first.validation, first.test]
    assert [len(p) for p in parts] == [180, 60, 60]
    assert len({row["text"] for part in parts for row in part}) == 300
    assert [sum(row["label"] == "True" for row in part) for part in parts] == [60, 20, 20]
    assert splits(encoder, tmp_path, table, ["data.split.seed=1"]).test != first.test


def test_repeated_inputs_are_dropped_before_the_split(encoder, tmp_path):
    table = [*rows(40), *({"text": r["text"].upper(), "label": r["label"]} for r in rows(40))]
    plain = splits(encoder, tmp_path, table)
    unique = splits(encoder, tmp_path, table, ["data.deduplicate=true"])
    assert len(unique.train + unique.validation + unique.test) < len(plain.train + plain.validation + plain.test)
    texts = [row["text"].casefold() for part in (unique.train, unique.validation, unique.test) for row in part]
    assert len(texts) == len(set(texts))


def test_limits_take_a_fixed_sample(encoder, tmp_path):
    limited = splits(encoder, tmp_path, rows(), ["data.max_train=10", "data.max_test=3"])
    assert (len(limited.train), len(limited.test)) == (10, 3)
    assert limited == splits(encoder, tmp_path, rows(), ["data.max_train=10", "data.max_test=3"])


def test_integer_labels_are_ordered_as_numbers(encoder, tmp_path):
    table = [{"text": f"text {i}", "label": i % 11} for i in range(200)]
    assert splits(encoder, tmp_path, table).labels == tuple(str(i) for i in range(11))


def test_a_dotted_column_reaches_into_nested_rows(encoder, tmp_path):
    table = [{"input": [{"content": "s"}, {"content": f"text {i}"}], "label": i % 2} for i in range(40)]
    got = splits(encoder, tmp_path, table, ["data.columns.text=input.1.content"])
    assert all(row["text"].startswith("text ") for row in got.train)
    with pytest.raises(LilyError, match=r"no column 'input.2.content'"):
        splits(encoder, tmp_path, table, ["data.columns.text=input.2.content"])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "expected a list of"),
        ([{"role": "robot", "content": "x"}], "expected a list of"),
        ([{"role": "user", "content": "x"}], "must end with an assistant message"),
        ([], "expected a list of"),
    ],
)
def test_malformed_conversations_are_refused(chat_model, tmp_path, messages, message):
    from recipes_helpers import sft

    values = sft(chat_model, write_jsonl(tmp_path / "t.jsonl", [{"messages": messages}] * 9), tmp_path)
    values["data"]["columns"] = {"messages": "messages"}
    with pytest.raises(LilyError, match=message):
        data.load_splits(loader.load_recipe(write_recipe(tmp_path, values)))
