"""csv and tsv as they are found: separators, encodings, quotes, and what the messages advise."""

from __future__ import annotations

import codecs
import csv
import gzip

import pytest

from lily.errors import LilyError
from lily.recipes.data import tables
from lily.recipes.spec.data import Data, File

WANTED = [{"text": "good, very", "label": "1"}, {"text": "bad", "label": "0"}, {"text": "fine; so", "label": "1"}]


def read(path, content: str | bytes, **keys):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    notes: list[str] = []
    return tables.read_rows(File(path=str(path), **keys), notes.append), notes


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", 'text,label\n"good, very",1\nbad,0\nfine; so,1\n', None),
        ("t.csv", 'text;label\ngood, very;1\nbad;0\n"fine; so";1\n', "semicolons"),
        ("t.csv", "text\tlabel\ngood, very\t1\nbad\t0\nfine; so\t1\n", "tabs"),
        ("t.csv", "text|label\r\ngood, very|1\r\nbad|0\r\nfine; so|1\r\n", "vertical bars"),
        ("t.csv", 'sep=;\ntext;label\ngood, very;1\nbad;0\n"fine; so";1\n', None),
        ("t.tsv", "text\tlabel\ngood, very\t1\nbad\t0\nfine; so\t1\n", None),
        ("t.tsv", 'text,label\n"good, very",1\nbad,0\nfine; so,1\n', "commas"),
    ],
)
def test_the_separator_is_found_and_told(tmp_path, name, content, said):
    rows, notes = read(tmp_path / name, content)
    assert rows == WANTED
    assert [said in note for note in notes] == ([] if said is None else [True])
    packed = tmp_path / f"{name}.gz"
    assert read(packed, gzip.compress(content.encode()))[0] == WANTED


@pytest.mark.parametrize("delimiter", [";", "\t", "\\t", "tab", "|", "^"])
def test_a_separator_that_is_set_is_not_told(tmp_path, delimiter):
    mark = Data(train=File(path="x"), delimiter=delimiter).delimiter
    rows, notes = read(tmp_path / "t.csv", f"text{mark}label\ngood, very{mark}1\n", delimiter=delimiter)
    assert (rows, notes) == ([{"text": "good, very", "label": "1"}], [])


def test_two_separators_that_fit_are_not_guessed_between(tmp_path):
    lines = "good, very;1\nbad, so;0\n"
    with pytest.raises(LilyError, match=r"separated by commas and by semicolons; set data\.delimiter"):
        read(tmp_path / "t.csv", lines, header=["text", "label"])
    rows, _ = read(tmp_path / "t.csv", lines, header=["text", "label"], delimiter=";")
    assert rows[0] == {"text": "good, very", "label": "1"}


def test_one_column_has_no_separator(tmp_path):
    rows, notes = read(tmp_path / "t.csv", "text\ngood; very\nbad | so\n")
    assert (rows, notes) == ([{"text": "good; very"}, {"text": "bad | so"}], [])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.json"])
def test_a_byte_order_mark_says_the_encoding(tmp_path, encoding, name):
    text = {"t.csv": "text,label\nété,1\n", "t.jsonl": '{"text": "été", "label": "1"}\n'}
    text["t.json"] = f"[{text['t.jsonl']}]"
    assert read(tmp_path / name, text[name].encode(encoding))[0] == [{"text": "été", "label": "1"}]


def test_utf16_of_either_order_is_read_and_without_a_mark_is_named(tmp_path):
    text = "text,label\nété,1\n"
    marked = codecs.BOM_UTF16_BE + text.encode("utf-16-be")
    assert read(tmp_path / "t.csv", marked)[0] == [{"text": "été", "label": "1"}]
    for encoding in ("utf-16-le", "utf-16-be"):
        with pytest.raises(LilyError, match=rf"holds NUL bytes.*data\.encoding: {encoding}"):
            read(tmp_path / "t.csv", text.encode(encoding))
        rows, _ = read(tmp_path / "t.csv", text.encode(encoding), encoding=encoding)
        assert rows == [{"text": "été", "label": "1"}]


def test_cp1252_is_named_with_the_key_that_reads_it(tmp_path):
    content = "text,label\ngood,1\ncafé “so”,0\n".encode("cp1252")
    with pytest.raises(LilyError, match=r"byte 0xe9 in line 3.*data\.encoding: cp1252.*'café “so”,0'"):
        read(tmp_path / "t.csv", content)
    rows, _ = read(tmp_path / "t.csv", content, encoding="cp1252")
    assert rows[1] == {"text": "café “so”", "label": "0"}


def test_one_damaged_line_of_utf8_is_not_called_cp1252(tmp_path):
    with pytest.raises(LilyError, match=r"byte 0xff in line 3.*mend that line") as caught:
        read(tmp_path / "t.csv", "text,label\nété,1\n".encode() + b"\xff,0\n")
    assert "cp1252" not in str(caught.value)


def test_a_wrong_encoding_is_one_message(tmp_path):
    with pytest.raises(LilyError, match=r"not SHIFT_JIS text.*remove data\.encoding"):
        read(tmp_path / "t.csv", "text,label\né,1\n".encode("cp1252"), encoding="shift_jis")
    for wrong in ("cp125", "hex", ""):
        with pytest.raises(ValueError, match="is no encoding of text"):
            File(path="x", encoding=wrong)
    for wrong in ("", ", ", '"', "\n"):
        with pytest.raises(ValueError, match="expected one character"):
            File(path="x", delimiter=wrong)


@pytest.mark.parametrize(
    ("rest", "line"),
    [
        ('"bad film 20,0\n' + "".join(f"good film {i},1\n" for i in range(40)), 21),
        ('"bad film 20,0\n' + "".join(f"good film {i},1\n" for i in range(39)) + '"so, nice",1\n', 21),
        ('good,1\n"he said "so" and, left",0\n', 22),
    ],
)
def test_an_open_quote_names_the_row_that_it_begins_in(tmp_path, rest, line):
    rows = "text,label\n" + "".join(f"good film {i},{i % 2}\n" for i in range(19))
    with pytest.raises(LilyError, match=rf"t\.csv:{line}: not valid csv.*close it"):
        read(tmp_path / "t.csv", rows + rest)


def test_a_field_that_swallowed_rows_is_told(tmp_path):
    rows = 'text,label\n"bad film 0,0\n' + "".join(f"good film {i},1\n" for i in range(40)) + 'so it ends",0\n'
    assert len(read(tmp_path / "t.csv", rows)[0]) == 1
    assert (
        "t.csv:2: column 'text' holds 42 lines, 41 of which look like rows; close its quote"
        in (read(tmp_path / "t.csv", rows)[1][0])
    )
    letter = 'text,label\n"' + "Dear all,\nso it is.\n" * 20 + '",0\n'
    assert read(tmp_path / "t.csv", letter)[1] == []
    assert (
        "holds 160 lines; if that is not one text"
        in (read(tmp_path / "t.csv", 'text,label\n"' + "Dear all,\nso it is.\n" * 80 + '",0\n')[1][0])
    )


@pytest.mark.parametrize(
    ("content", "advised", "not_advised"),
    [
        ("text,label\ngood,1\nbad, so,0\n", "a comma inside a text needs quotes around the text", "header"),
        ("good film,1\nbad, so,0\nfine,1\n", "if the file has no header line, set header", "is missing"),
        ("text,label\ngood,1\nbad\n", "a value or a comma is missing", "header"),
        ("text;label;n\ngood;1;1\nbad; so;0;1\n", "a ';' inside a text needs quotes", "header"),
    ],
)
def test_a_row_of_another_width_is_advised_what_mends_it(tmp_path, content, advised, not_advised):
    with pytest.raises(LilyError, match="fields, expected") as caught:
        read(tmp_path / "t.csv", content)
    assert advised in str(caught.value)
    assert not_advised not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "keys", "said"),
    [
        (
            "text,label\ngood,1\ntext,label\nbad,0\n",
            {},
            r"t\.csv:3: repeats the names of the columns \(files were joined",
        ),
        ("text,label\ngood,1\n\ufefftext,label\nbad,0\n", {}, r"t\.csv:3: repeats the names of the columns"),
        (
            "text,label\ngood,1\n",
            {"header": ["text", "label"]},
            r"t\.csv:1: repeats .*data\.header names the columns too",
        ),
        ("text,label\ngood,1,\nbad,0,\n", {}, r"t\.csv:2: 3 fields.*ends with a comma that separates nothing"),
        ("text,label\ngood, very,1\n", {}, r"t\.csv:2: 3 fields.*a comma inside a text needs quotes"),
        ("text,label\ngo\0od,1\n", {}, "holds NUL bytes, which no text has"),
        (gzip.compress(b"text,label\ngood,1\n", mtime=0), {}, "is no text but compressed by gzip; add .gz"),
        (b"PK\x03\x04\x14\x00\x06\x00", {}, "is no text but a zip archive, as Excel's .xlsx files are"),
        (b"PAR1\x15\x00", {}, "is no text but a parquet file; set format: parquet"),
    ],
)
def test_what_is_no_row_is_refused_with_its_own_fix(tmp_path, content, keys, said):
    with pytest.raises(LilyError, match=said):
        read(tmp_path / "t.csv", content, **keys)


def test_a_row_that_only_resembles_the_header_is_a_row(tmp_path):
    rows, _ = read(tmp_path / "t.csv", "text,label\ntext,1\na,label\n")
    assert [row["label"] for row in rows] == ["1", "label"]
    rows, _ = read(tmp_path / "t.csv", "text\ngood\ntext\n")
    assert len(rows) == 2


def test_columns_without_names_and_lines_of_spaces_are_as_excel_leaves_them(tmp_path):
    rows, notes = read(tmp_path / "t.csv", "text,label,,\ngood,1,,\n   \nbad,0,,\n")
    assert [(row["text"], row["label"]) for row in rows] == [("good", "1"), ("bad", "0")]
    assert notes == []


def test_a_field_over_the_limit_of_the_reader_is_one_error(tmp_path):
    limit = csv.field_size_limit(1 << 10)
    try:
        with pytest.raises(LilyError, match=r"t\.csv:2: not valid csv: field larger than field limit"):
            read(tmp_path / "t.csv", f"text,label\n{'good ' * 1000},1\n")
    finally:
        csv.field_size_limit(limit)
