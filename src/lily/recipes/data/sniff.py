"""Rows of a file of which nobody has said how it is written: its format, encoding, separator and header line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lily.errors import LilyError
from lily.recipes.data import delimited, tables
from lily.recipes.data.tables import EncodingError, Row

READ = 20_000  # rows that are looked at
NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?")
LONG_NAME = 60  # characters; longer is a text, not the name of a column
DEPTH = 3  # of objects in a row, whose values are columns with dotted names
OTHER = {"json": "jsonl", "jsonl": "json"}  # what a file with this ending is too, more often than not
TRAIN = re.compile(r"(?:^|(?<=[^a-z]))train(?:ing)?(?=[^a-z]|$)", re.IGNORECASE)
PARTS = {"validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing")}


@dataclass(frozen=True)
class Opened:
    """The first rows of a file, and how a recipe says that they are read.

    Attributes:
        rows: values of nested objects under dotted names.
        how: keys beside `path`: format, encoding, delimiter, header.
    """

    rows: list[Row]
    how: dict[str, Any]


def open_table(path: Path, delimiter: str | None = None) -> Opened:
    """The first rows of a table, in whatever way it can be read.

    Raises:
        LilyError: if there is none; what its ending says comes first.
    """
    kind = tables.kind_of(path)
    tries: list[dict[str, Any]] = [{}]
    if kind in OTHER:
        tries.append({"format": OTHER[kind]})
    elif not kind and not path.name.lower().endswith(tables.SHEETS):
        tries = [{"format": "json"}, {"format": "jsonl"}, {"format": "csv"}]
    errors = []
    for how in tries:
        try:
            return _opened(path, how | ({"delimiter": delimiter} if delimiter else {}))
        except LilyError as error:
            errors.append(error)
    if kind or path.name.lower().endswith(tables.SHEETS):
        raise errors[0]
    raise LilyError(
        f"{path}: its name does not say what it is (csv, tsv, json, jsonl, parquet), and it reads as none of them; "
        "write it as a table, with a column of texts and one of labels or answers"
    )


def _opened(path: Path, how: dict[str, Any]) -> Opened:
    try:
        rows = _rows(path, how)
    except delimited.DuplicateNameError as error:
        if not any(NUMBER.fullmatch(name.strip()) for name in error.names):
            raise
        return _opened(path, how | {"header": _columns(len(error.names))})
    except EncodingError as error:
        if error.better is None:
            raise
        how = how | {"encoding": error.better}
        rows = _rows(path, how)
    kind = how.get("format") or tables.kind_of(path)
    if kind not in delimited.USUAL:
        if how.get("format") == "jsonl" and len(rows) == 1 and tables.kind_of(path) == "json":
            raise LilyError(f"{path}: is one object")  # what is wrong with it as json comes first
        return Opened(_without_single_lists([dict(_flat(row)) for row in rows]), how)
    separator = how.get("delimiter") or tables.separator_of(path, kind, how.get("encoding"))
    if separator != delimited.USUAL[kind]:
        how = how | {"delimiter": separator}
    if rows and len(rows[0]) < 2 and not tables.kind_of(path):
        raise LilyError(f"{path}: is no table with columns")
    if "header" not in how and _is_row(list(rows[0]) if rows else [], rows):
        how = how | {"header": _columns(len(rows[0]))}
        rows = _rows(path, how)
    return Opened(rows, how)


def _columns(count: int) -> list[str]:
    return [f"column{i}" for i in range(1, count + 1)]


def _rows(path: Path, how: dict[str, Any]) -> list[Row]:
    stream = tables.stream_rows(
        path, how.get("format", "auto"), how.get("header"), how.get("delimiter"), how.get("encoding")
    )
    return list(islice(stream, READ))


def _is_row(names: list[str], rows: list[Row]) -> bool:
    """Whether the first line of a csv holds values and not names; that of pandas' index may be missing."""
    if not any(name.strip() for name in names):
        return bool(names)
    if any(NUMBER.fullmatch(name.strip()) or len(name) > LONG_NAME for name in names):
        return True
    # a value of a column that has few, such as a class
    return any(name.strip() and sum(row[name] == name for row in rows) > 1 for name in names)


def _flat(row: Row, before: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict) and value and depth < DEPTH and all(isinstance(key, str) for key in value):
            yield from _flat(value, f"{before}{name}.", depth + 1)
        else:
            yield before + name, value


def _without_single_lists(rows: list[Row]) -> list[Row]:
    """Columns that hold a list of one value in every row, as annotation tools write labels, named by that value."""
    single = {name for row in rows[:1] for name in row if all(_is_single(row.get(name)) for row in rows)}
    return [{f"{k}.0" if k in single else k: v[0] if k in single else v for k, v in row.items()} for row in rows]


def _is_single(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, int, float))


def beside(path: Path) -> dict[str, Path]:
    """Files for validation and test beside a file with `train` in its name."""
    found: dict[str, Path] = {}
    for part, words in PARTS.items():
        names = [TRAIN.sub(word, path.name) for word in words]
        file = next((path.with_name(n) for n in names if n != path.name and path.with_name(n).is_file()), None)
        if file is not None:
            found[part] = file
    return found


def table_in(folder: Path) -> Path | None:
    """The table of a folder to train on: the only one, or the one with `train` in its name.

    Raises:
        LilyError: if there are several.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() and tables.kind_of(file))
    training = [file for file in files if TRAIN.search(file.name)]
    if len(files) > 1 and len(training) != 1:
        shown = ", ".join(file.name for file in files[:4]) + (", ..." if len(files) > 4 else "")
        if (folder / "dataset_info.json").is_file():
            raise LilyError(
                f"{folder} is what datasets' save_to_disk writes; write a table: "
                f'datasets.load_from_disk("{folder}").to_parquet("{folder.name}.parquet"), for each split'
            )
        fix = f"name the one to train on: lily new {shlex.quote(str(files[0]))}"
        raise LilyError(f"{folder} holds {len(files)} tables ({shown}); {fix}")
    return next(iter(training or files), None)


def parts_of(folder: Path) -> dict[str, Path]:
    """Folders of a folder of images that hold its parts: train, validation, test."""
    below = {p.name.lower(): p for p in sorted(folder.iterdir()) if p.is_dir()}
    train = below.get("train") or below.get("training")
    if train is None:
        return {}
    others = {part: next((below[w] for w in words if w in below), None) for part, words in PARTS.items()}
    return {"train": train} | {part: other for part, other in others.items() if other is not None}
