"""Rows of tables in any format, as they are."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from lily.errors import LilyError
from lily.recipes.data import delimited
from lily.recipes.data.delimited import Note
from lily.recipes.data.sources import fetch
from lily.recipes.spec.data import File

Row = dict[str, Any]

FORMATS = {".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
SHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")

# Limits of a .gz file, against decompression bombs. Text compresses 5 times, logs 50 times.
MAX_UNPACKED = 1 << 30
MAX_RATIO = 100
MAX_EXAMINED = 1 << 26  # bytes read again to explain why they are no text

# UTF-32's mark starts with that of UTF-16
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

STDIN = "standard input"
LISTED = "; jsonl has one object in each line; for one list of objects set format: json"

# First bytes of files that are no text, whatever they are called
PACKED = {
    b"\x1f\x8b": "compressed by gzip; add .gz to its name",
    b"PK": "a zip archive, as Excel's .xlsx files are; save the table as CSV UTF-8",
    b"PAR1": "a parquet file; set format: parquet",
}


class EncodingError(LilyError):
    """Text in another encoding than was expected; `better` is the one that it likely has."""

    def __init__(self, message: str, better: str | None = None) -> None:
        super().__init__(message)
        self.better = better


class Bomb(LilyError):
    """A decompression bomb; a separate type, so that it is not reported as invalid JSON."""


def read_rows(file: File, note: Note = lambda _: None) -> list[Row]:
    """The rows of a table, unchanged; `note` is told what may not be as it was meant.

    Raises:
        LilyError: if it cannot be downloaded, read or parsed, or is empty.
    """
    if file.hub is not None:
        rows = _hub_rows(file)
    else:
        rows = list(stream_rows(fetch(file), file.format, file.header, file.delimiter, file.encoding, note))
    if not rows:
        raise LilyError(f"{name_of(file)} has no rows; check the file")
    return rows


def name_of(file: File) -> str:
    """The name of a file in messages."""
    return file.path or file.hub or (file.package.member if file.package else "?")


def stream_rows(
    path: Path | str,
    format: str = "auto",
    header: Sequence[str] | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    note: Note = lambda _: None,
) -> Iterator[Row]:
    """Rows one at a time, in constant memory for csv, tsv and jsonl. `-` reads jsonl from standard input.

    `header`, `delimiter` and `encoding` as in `File`; `note` is told what may not be as it was meant.

    Raises:
        LilyError: with the line of the first row that cannot be parsed.
    """
    name = str(path)
    if name == "-":
        try:
            yield from _jsonl(sys.stdin, STDIN)
        except UnicodeDecodeError as error:
            raise LilyError(f"{STDIN}: not UTF-8 text ({error.reason})") from None
        return
    kind = format if format != "auto" else kind_of(name)
    if not kind:
        if name.lower().endswith(SHEETS):
            raise LilyError(f"{name}: spreadsheets are not read; save the sheet as CSV UTF-8")
        endings = ".csv, .tsv, .json, .jsonl or .parquet"
        raise LilyError(f"{name}: unknown ending; name it {endings}, or set format in the recipe")
    if kind == "parquet":
        yield from _parquet(name)
        return
    with _text(name, encoding) as text:
        if kind in delimited.USUAL:
            yield from delimited.rows(text, name, kind, header, delimiter, note)
        elif kind == "jsonl":
            yield from _jsonl(text, name)
        else:
            yield from _json(text, name)


def kind_of(path: Path | str) -> str:
    """The format that a file's name says: csv, tsv, json, jsonl or parquet; empty: none of them."""
    return FORMATS.get(Path(str(path).removesuffix(".gz")).suffix.lower(), "")


def separator_of(path: Path, kind: str, encoding: str | None) -> str:
    """The separator that `stream_rows` finds in a csv or tsv."""
    with _text(str(path), encoding) as text:
        return delimited.separator_in(text, str(path), kind)


def is_utf8(path: Path) -> bool:
    """Whether the start of a file is UTF-8 with letters beyond ASCII."""
    with _bytes_of(str(path)) as raw:
        start = raw.read(1 << 20)
    try:
        return not start.isascii() and bool(codecs.getincrementaldecoder("utf-8")().decode(start))
    except UnicodeDecodeError:
        return False


def _bytes_of(name: str) -> BinaryIO:
    """An open file, unpacked if need be."""
    return cast(BinaryIO, (_Unpacked if name.endswith(".gz") else open)(name, "rb"))


@contextlib.contextmanager
def _text(name: str, encoding: str | None) -> Iterator[TextIO]:
    """An open text file, unpacked if need be."""
    try:
        with _bytes_of(name) as raw:
            encoding = _encoding(raw, name, encoding)
            with io.TextIOWrapper(raw, encoding, newline="") as text:
                yield text
    except UnicodeError as error:
        with _bytes_of(name) as raw:
            raise _not_text(raw.read(MAX_EXAMINED), str(encoding), error, name) from None
    except (OSError, EOFError, zlib.error) as error:
        raise LilyError(f"{name}: cannot be read ({error}); check the path and the file") from None


def _encoding(raw: BinaryIO, name: str, stated: str | None) -> str:
    """The encoding by the byte order mark, else the stated one, else UTF-8.

    Raises:
        LilyError: if the text can be neither UTF-8 nor anything else that is stated.
    """
    start = raw.read(1 << 10)
    raw.seek(0)
    marked = next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), None)
    if marked is None and stated is None and b"\0" in start:
        if packed := next((what for mark, what in PACKED.items() if start.startswith(mark)), None):
            raise LilyError(f"{name}: is no text but {packed}")
        odd, even = start[1::2].count(0), start[::2].count(0)
        if max(odd, even) < 4 or min(odd, even) > max(odd, even) / 10:
            raise LilyError(f"{name}: holds NUL bytes, which no text has; remove them, or check that it is a table")
        guess = "utf-16-le" if odd > even else "utf-16-be"
        raise EncodingError(
            f"{name}: holds NUL bytes, as UTF-16 does; set data.encoding: {guess} in the recipe, or save it as UTF-8",
            guess,
        )
    return marked or stated or "utf-8"


def _not_text(content: bytes, encoding: str, error: UnicodeError, name: str) -> EncodingError:
    """The error about bytes that are no text in an encoding: where, and what they may be."""
    codec = codecs.lookup(encoding).name
    said = f"{name}: not {codec.upper().removesuffix('-SIG')} text"
    reason = getattr(error, "reason", error)
    if not codec.startswith("utf-8"):
        return EncodingError(f"{said} ({reason}); remove data.encoding, or set the right one")
    try:
        content.decode("utf-8")
        return EncodingError(f"{said} ({reason}); save it as UTF-8")
    except UnicodeDecodeError as first:
        line = content.count(b"\n", 0, first.start) + 1
        around = content[max(0, first.start - 15) : first.start + 15].decode("cp1252", "replace").split("\n")
        said += f" ({first.reason}: byte 0x{content[first.start]:02x} in line {line})"
        if not content[: first.start].isascii():
            return EncodingError(f"{said}, although what comes before is; mend that line, and save the file as UTF-8")
        shown = max(around, key=len).strip()
        return EncodingError(
            f"{said}; save it as UTF-8, or set data.encoding: cp1252 in the recipe if it comes from Windows or Excel "
            f"(that byte is then read so: {shown!r})",
            "cp1252",
        )


class _Unpacked(gzip.GzipFile):
    """A .gz file with limited expansion: a few compressed megabytes of zeros could fill the memory."""

    def read1(self, size: int = -1) -> bytes:
        """`gzip.GzipFile.read1`, with the limit; text is read through it."""
        data = super().read1(size)
        if self.tell() > max(MAX_UNPACKED, MAX_RATIO * os.path.getsize(self.name)):
            raise Bomb(
                f"{self.name}: expands to over {MAX_UNPACKED >> 20} MiB and {MAX_RATIO} times its size; unpack it "
                "yourself if you trust it"
            )
        return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose second value of a key would silently replace the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for i, key in enumerate(names) if key in names[:i])!r} stands there twice")
    return found


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _jsonl(text: TextIO, name: str) -> Iterator[Row]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            hint = LISTED if line.strip() == "{" or line.lstrip().startswith("[") else ""
            if line.rstrip().endswith("},") and "Extra data" in str(error):
                hint = "; each line is one object, with no comma between the lines"
            hint = hint or ("; it is read as jsonl: one object in each line" if name == STDIN else "")
            # of a line by itself, the number of the line would always be 1 or 2
            said = f"{error.msg} (character {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else error
            raise LilyError(f"{name}:{number}: not valid JSON: {said}{hint}") from None
        if not isinstance(row, dict):
            chat = isinstance(row, list) and any(map(_is_message, row))
            hint = '; write a chat as {"messages": [...]}' if chat else LISTED if isinstance(row, list) else ""
            raise LilyError(f"{name}:{number}: expected an object with named values, got {type(row).__name__}{hint}")
        yield row


def _json(text: TextIO, name: str) -> Iterator[Row]:
    try:
        value = json.load(text, object_pairs_hook=_object)
    except (UnicodeError, Bomb):
        raise
    except (ValueError, RecursionError) as error:
        raise LilyError(f"{name}: not valid JSON: {error}; for one object per line set format: jsonl") from None
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise LilyError(f"{name}: expected a list of objects, or an object with one such list{_other_shape(value)}")
    yield from value


def _other_shape(value: Any) -> str:
    """What JSON that is no list of objects holds instead, and how it becomes one, as the end of a message."""
    if isinstance(value, list) and any(isinstance(row, list) and any(map(_is_message, row)) for row in value):
        return '; write each chat as {"messages": [...]}'
    if isinstance(value, dict) and value and all(isinstance(inner, (list, dict)) for inner in value.values()):
        shown = ", ".join(list(value)[:2]) + (", ..." if len(value) > 2 else "")
        return f", and not one of columns or of rows by name ({shown}); pandas writes a list with orient='records'"
    return ', one for each row, such as [{"text": "...", "label": "..."}]'


def _parquet(name: str) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise LilyError(f"{name}: reading parquet needs pyarrow; pip install pyarrow") from None
    try:
        with parquet.ParquetFile(name) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise LilyError(f"{name}: two columns are named {max(names, key=names.count)!r}; rename one of them")
            for batch in file.iter_batches():
                yield from map(_without_fillers, batch.to_pylist())
    except (ArrowException, OSError) as error:
        raise LilyError(f"{name}: not a readable parquet file: {error}") from None


def _hub_rows(file: File) -> list[Row]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise LilyError('data from the hub needs datasets; pip install "lily-peft[sft]"') from None
    try:
        table = load_dataset(file.hub, file.config, split=file.split or "train", revision=file.revision)
    except Exception as error:
        raise LilyError(f"data set {file.hub!r} could not be loaded: {str(error).splitlines()[0]}") from None
    return [_without_fillers(dict(row)) for row in table]


def _without_fillers(row: Row) -> Row:
    """A row of an Arrow table, in which nested objects have every key that any of them has, without these nulls."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(inner) for key, inner in value.items() if inner is not None}
        return [kept(inner) for inner in value] if isinstance(value, list) else value

    return {key: kept(value) for key, value in row.items()}
