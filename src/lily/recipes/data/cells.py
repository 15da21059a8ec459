"""One cell of a row: found by its column, and checked for what a task needs."""

from __future__ import annotations

import contextlib
import difflib
import math
from decimal import Decimal
from typing import Any

from lily.errors import LilyError
from lily.recipes.data.delimited import looks_like_data
from lily.recipes.data.tables import Row
from lily.recipes.spec.values import SURROGATE, is_blank

ABSENT = object()


def get(row: Row, column: str, role: str, where: str, section: str = "data.columns.") -> Any:
    """The value of a column, which may be a dotted path into nested values; `section` and `role` name its key.

    Raises:
        LilyError: if there is no such column, or its text holds half a surrogate pair.
    """
    value = at(row, column)
    if value is ABSENT:
        near = difflib.get_close_matches(column, row, n=1)
        raise LilyError(
            f"{where}: no column {column!r} ({section}{role}); "
            + (f"did you mean {near[0]!r}? " if near else "")
            + f"columns: {', '.join(map(str, row))}"
            + ("; if the file has no header line, set header: [names]" if any(map(looks_like_data, row)) else "")
        )
    if _has_surrogate(value):
        raise LilyError(
            f"{where}: column {column!r} holds half of a surrogate pair (a character that was cut in two, as \\ud83d): "
            f"{short(value)}; cut texts between characters, or remove the row"
        )
    return value


def _has_surrogate(value: Any) -> bool:
    """Of a text or a list of texts; messages are checked one by one, to name the message."""
    if isinstance(value, list):
        return any(isinstance(inner, str) and _has_surrogate(inner) for inner in value)
    return isinstance(value, str) and not value.isascii() and SURROGATE.search(value) is not None


def at(row: Row, column: str) -> Any:
    """The value of a column, which may be a dotted path into nested values; `ABSENT` if there is no such column."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if value is None:
            return None
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.lstrip("-").isdigit() and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            return ABSENT
    return value


def text_in(value: Any, column: str, where: str) -> str:
    """The value as a text that is not empty."""
    if not isinstance(value, str) or is_blank(value):
        fix = "; fill it, or remove the row" if value is None or isinstance(value, str) else ""
        raise LilyError(f"{where}: column {column!r} holds {short(value)}, expected text{fix}")
    return value


def class_in(value: Any, column: str, where: str) -> str:
    """The value as the name of a class."""
    if isinstance(value, bool) or (isinstance(value, (str, int)) and not is_blank(str(value))):
        return str(value)
    with contextlib.suppress(ValueError, OverflowError):  # not a number, infinite
        if isinstance(value, (float, Decimal)) and value == int(value):
            return str(int(value))
    raise LilyError(f"{where}: label column {column!r} holds {short(value)}, expected a class (text or integer)")


def number_in(value: Any, column: str, where: str) -> float:
    """The value as a finite number."""
    with contextlib.suppress(TypeError, ValueError):
        number = float(value)
        if math.isfinite(number) and not isinstance(value, bool):
            return number
    raise LilyError(f"{where}: label column {column!r} holds {short(value)}, expected a finite number such as 1234.5")


def short(value: Any) -> str:
    """A value as it is shown in messages."""
    text = repr(value)
    return "nothing" if value is None else text if len(text) <= 60 else text[:57] + "..."
