"""Tables of every format, columns, splits."""

from __future__ import annotations

import gzip
import json
from decimal import Decimal

import pytest
from recipes_helpers import classification, rows, write_jsonl, write_recipe

from lily.errors import LilyError
from lily.recipes import data, loader
from lily.recipes.data import tables
from lily.recipes.data.cells import class_in, number_in, text_in
from lily.recipes.spec.data import Columns, File

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
    assert tables.read_rows(File(path=str(written(tmp_path, kind)))) == TABLE


def test_a_file_without_a_header_takes_the_given_names(tmp_path):
    (tmp_path / "t.tsv").write_text("x\t1\t\ty\n")
    file = File(path=str(tmp_path / "t.tsv"), header=["source", "label", "mark", "sentence"])
    assert tables.read_rows(file) == [{"source": "x", "label": "1", "mark": "", "sentence": "y"}]


def test_rows_are_streamed(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\nnot json\n')
    stream = tables.stream_rows(path)
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
        ([{"role": "robot", "content": "x"}], "expected one of system"),
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


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    (tmp_path / "t.csv").write_bytes("\ufefftext,label\na,0\n".encode())
    assert tables.read_rows(File(path=str(tmp_path / "t.csv"))) == [{"text": "a", "label": "0"}]


def test_repeats_are_found_whatever_their_case_and_spaces(encoder, tmp_path):
    table = [{"text": f"text {i}", "label": i % 2} for i in range(40)]
    extra = [{"text": text, "label": 0} for text in ("\u00c9T\u00c9 a", "\u00e9t\u00e9  a", " \u00c9t\u00e9 A ")]
    got = splits(encoder, tmp_path, [*table, *extra], ["data.deduplicate=true"])
    assert len(got.train + got.validation + got.test) == 41


def test_conversations_repeat_when_their_questions_do(chat_model, tmp_path):
    from recipes_helpers import sft

    def talk(i, answer):
        return {"m": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": answer}]}

    table = [talk(i, answer) for i in range(30) for answer in ("yes", "no")]
    values = sft(chat_model, write_jsonl(tmp_path / "t.jsonl", table), tmp_path)
    values["data"] |= {"columns": {"messages": "m"}, "deduplicate": True}
    got = data.load_splits(loader.load_recipe(write_recipe(tmp_path, values)))
    assert len(got.train + got.validation + got.test) == 30


def test_a_rare_class_stays_a_class_when_rows_are_sampled_or_split_away(encoder, tmp_path):
    table = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(200)]
    rare = [*table, *({"text": f"rare {i}", "label": "c"} for i in range(9))]
    assert splits(encoder, tmp_path, rare, ["data.max_train=12"]).labels == ("a", "b", "c")
    single = splits(encoder, tmp_path, [*table, {"text": "rare", "label": "c"}], ["data.split.validation=0.6"])
    assert "rare" in [row["text"] for row in single.train]


@pytest.mark.parametrize(
    ("labels", "order"),
    [(("01", "1", "2"), ("01", "1", "2")), (("--1", "2"), ("--1", "2")), (("\u00b2", "2"), ("2", "\u00b2"))],
)
def test_labels_that_only_look_like_numbers_have_an_order_too(encoder, tmp_path, labels, order):
    table = [{"text": f"text {i}", "label": labels[i % len(labels)]} for i in range(90)]
    assert splits(encoder, tmp_path, table).labels == order


BROKEN = bytearray(gzip.compress(bytes(range(256)) * 8, mtime=0))
BROKEN[20:40] = b"\xff" * 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv.gz", bytes(BROKEN), "cannot be read"),
        ("t.csv.gz", gzip.compress(b"a,b\n1,2\n" * 99, mtime=0)[:-12], "cannot be read"),
        ("t.jsonl", b'{"a": ' + b"1" * 5000 + b"}\n", r"t\.jsonl:1: not valid JSON"),
        ("t.csv", b"a,a\n1,2\n", "two columns are named 'a'"),
        ("t.csv", b"a,b\n\xff,2\n", "not UTF-8 text"),
    ],
)
def test_a_damaged_table_is_one_message(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LilyError, match=message):
        tables.read_rows(File(path=str(tmp_path / name)))


@pytest.mark.parametrize("messages", [None, ["hi"], {"role": "user"}, "hello"])
def test_a_prompt_that_is_no_conversation_is_refused(messages):
    with pytest.raises(LilyError, match="expected a list of"):
        data.prompt_of({"m": messages}, Columns(messages="m"), "row 1")


def test_a_second_value_of_one_key_or_column_does_not_replace_the_first_in_silence(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": "1"}\n{"text": "b", "label": "1", "label": "0"}\n')
    with pytest.raises(LilyError, match=r"t\.jsonl:2: .*the key 'label' stands there twice"):
        tables.read_rows(File(path=str(tmp_path / "t.jsonl")))
    (tmp_path / "t.json").write_text('[{"text": "b", "label": "1", "label": "0"}]')
    with pytest.raises(LilyError, match=r"t\.json: .*the key 'label' stands there twice"):
        tables.read_rows(File(path=str(tmp_path / "t.json")))
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'lily-peft[dev]'")
    from pyarrow import parquet

    table = pyarrow.table([pyarrow.array([part]) for part in "abc"], names=["text", "label", "label"])
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(LilyError, match=r"two columns are named 'label'; rename one"):
        tables.read_rows(File(path=str(tmp_path / "t.parquet")))


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_in_a_jsonl_file_names_the_format(tmp_path, indent):
    (tmp_path / "t.jsonl").write_text(json.dumps(TABLE, indent=indent))
    with pytest.raises(LilyError, match=r"t\.jsonl:1: .*for one list of objects set format: json"):
        tables.read_rows(File(path=str(tmp_path / "t.jsonl")))


@pytest.mark.parametrize("blank", ["\u200b\ufeff", " \u00ad", "\u2060\n"])
def test_text_that_shows_nothing_is_no_text(blank):
    for read in (text_in, class_in):
        with pytest.raises(LilyError, match=r"row 1: .*'c' holds "):
            read(blank, "c", "row 1")
    assert text_in("a\u200b", "c", "row 1") == "a\u200b"


@pytest.mark.parametrize(
    ("cells", "column", "message"),
    [
        ([{"label": "x"}, {"label": float("nan")}, {"label": float("nan")}], "label", "is empty in 2 of 3 rows (2, 3)"),
        ([{}, {}, {"label": "x"}], "label", "is empty in 2 of 3 rows (1, 2)"),
        ([{"lable": "y"}, {"label": "x"}, {"label": "x"}], "label", "row 1: no column 'label'"),
        ([{"out": None}, {"out": {"label": "x"}}, {"out": {"label": "x"}}], "out.label", "is empty in row 1; fill it"),
    ],
)
def test_cells_that_are_missing_are_told_of_all_rows(encoder, tmp_path, cells, column, message):
    table = [{"text": f"text {i}", **cell} for i, cell in enumerate(cells)]
    values = classification(encoder, write_jsonl(tmp_path / "t.jsonl", table), tmp_path)
    values["data"]["columns"]["label"] = column
    with pytest.raises(LilyError) as caught:
        data.load_splits(loader.load_recipe(write_recipe(tmp_path, values)))
    assert message in str(caught.value)


def test_whole_numbers_of_databases_are_classes():
    assert class_in(Decimal("3.00"), "c", "row 1") == class_in(3.0, "c", "row 1") == "3"
    for value in (Decimal("3.5"), Decimal("NaN"), Decimal("Infinity"), 3.5):
        with pytest.raises(LilyError, match=r"expected a class \(text or integer\)"):
            class_in(value, "c", "row 1")


def test_commas_between_lines_are_named(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a"},\n{"text": "b"}\n')
    with pytest.raises(LilyError, match=r"t\.jsonl:1: .*no comma between the lines"):
        tables.read_rows(File(path=str(tmp_path / "t.jsonl")))


@pytest.mark.parametrize("value", [True, "3,5", "50%", "1,000", [1]])
def test_a_label_of_a_regression_is_a_number_and_no_boolean(value):
    with pytest.raises(LilyError, match=r"row 1: label column 'c' holds .*, expected a finite number such as 1234\.5"):
        number_in(value, "c", "row 1")


def test_a_column_of_texts_as_the_label_is_told_in_one_line(encoder, tmp_path):
    table = [{"text": f"text {i} {'long ' * 20}", "label": str(i % 2)} for i in range(60)]
    values = classification(encoder, write_jsonl(tmp_path / "t.jsonl", table), tmp_path)
    values["data"]["columns"] = {"text": "label", "label": "text"}
    with pytest.raises(LilyError, match=r"label column 'text' holds 60 classes \('text 0 .*is it the right one\?"):
        data.load_splits(loader.load_recipe(write_recipe(tmp_path, values)))
    other = write_jsonl(tmp_path / "v.jsonl", [{"text": f"other {i}", "label": "0"} for i in range(5)])
    values["data"]["validation"] = {"path": str(other)}
    with pytest.raises(LilyError, match=r"has the label 'other 0', which no training row has.* and 40 more$") as error:
        data.load_splits(loader.load_recipe(write_recipe(tmp_path, values)))
    assert len(str(error.value)) < 2000
