"""Rows of tables in any format, as they are."""

from __future__ import annotations

import csv
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
from lily.recipes.data.sources import fetch
from lily.recipes.spec.schema import File

Row = dict[str, Any]

FORMATS = {".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "jsonl", ".parquet": "parquet"}

csv.field_size_limit(1 << 24)

# Limits of a .gz file, against decompression bombs. Text compresses 5 times, logs 50 times.
MAX_UNPACKED = 1 << 30
MAX_RATIO = 100


class Bomb(LilyError):
    """A decompression bomb; a separate type, so that it is not reported as invalid JSON."""


def read_rows(file: File) -> list[Row]:
    """The rows of a table, unchanged.

    Raises:
        LilyError: if it cannot be downloaded, read or parsed, or is empty.
    """
    rows = _hub_rows(file) if file.hub is not None else list(stream_rows(fetch(file), file.format, file.header))
    if not rows:
        raise LilyError(f"{name_of(file)} has no rows; check the file")
    return rows


def name_of(file: File) -> str:
    """The name of a file in messages."""
    return file.path or file.hub or (file.package.member if file.package else "?")


def stream_rows(path: Path | str, format: str = "auto", header: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows one at a time, in constant memory for csv, tsv and jsonl. `-` reads jsonl from standard input.

    Raises:
        LilyError: with the line of the first row that cannot be parsed.
    """
    name = str(path)
    if name == "-":
        try:
            yield from _jsonl(sys.stdin, "standard input")
        except UnicodeDecodeError as error:
            raise LilyError(f"standard input: not UTF-8 text ({error.reason})") from None
        return
    kind = format if format != "auto" else FORMATS.get(Path(name.removesuffix(".gz")).suffix.lower(), "")
    if not kind:
        raise LilyError(f"{name}: unknown ending; set format: csv, tsv, json, jsonl or parquet")
    if kind == "parquet":
        yield from _parquet(name)
        return
    try:
        open_ = _Unpacked if name.endswith(".gz") else open
        with open_(name, "rb") as raw, io.TextIOWrapper(cast(BinaryIO, raw), "utf-8-sig", newline="") as text:
            if kind in ("csv", "tsv"):
                yield from _delimited(text, name, kind, header)
            elif kind == "jsonl":
                yield from _jsonl(text, name)
            else:
                yield from _json(text, name)
    except UnicodeDecodeError as error:
        raise LilyError(f"{name}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise LilyError(f"{name}: cannot be read ({error}); check the path and the file") from None


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


def _delimited(text: TextIO, name: str, kind: str, header: Sequence[str] | None) -> Iterator[Row]:
    # tsv as in GLUE: quotes are ordinary characters
    reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE) if kind == "tsv" else csv.reader(text)
    try:
        names = list(header) if header else next(reader, [])
        duplicate = next((column for i, column in enumerate(names) if column in names[:i]), None)
        if duplicate is not None:
            raise LilyError(f"{name}: two columns are named {duplicate!r}; rename one of them")
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(names):
                raise LilyError(
                    f"{name}:{reader.line_num}: {len(fields)} fields, expected {len(names)} ({', '.join(names)})"
                    + ("" if header else "; if the file has no header line, set header: [names]")
                )
            yield dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise LilyError(f"{name}:{reader.line_num}: not valid {kind}: {error}") from None


def _jsonl(text: TextIO, name: str) -> Iterator[Row]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LilyError(f"{name}:{number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise LilyError(f"{name}:{number}: expected an object with named values, got {type(row).__name__}")
        yield row


def _json(text: TextIO, name: str) -> Iterator[Row]:
    try:
        value = json.load(text)
    except (UnicodeDecodeError, Bomb):
        raise
    except (ValueError, RecursionError) as error:
        raise LilyError(f"{name}: not valid JSON: {error}; for one object per line set format: jsonl") from None
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise LilyError(f"{name}: expected a list of objects, or an object with one such list")
    yield from value


def _parquet(name: str) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise LilyError(f"{name}: reading parquet needs pyarrow; pip install pyarrow") from None
    try:
        with parquet.ParquetFile(name) as file:
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
