"""Rows of csv and tsv files as they are found: with any separator, and never with a quote that swallows rows."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, TextIO

from lily.errors import LilyError

Note = Callable[[str], None]

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
USUAL = {"csv": ",", "tsv": "\t"}
SAMPLE = 100  # lines that the separator is guessed from
MANY_LINES = 100  # in one field: more is rarely a text
SWALLOWED = 5  # lines in one field that look like rows

csv.field_size_limit(1 << 24)


class DuplicateNameError(LilyError):
    """Two columns have one name: `names` are those of the header line, which may be a row."""

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = names


def rows(
    text: TextIO, name: str, kind: str, header: Sequence[str] | None, delimiter: str | None, note: Note
) -> Iterator[dict[str, str]]:
    """Rows one at a time.

    Args:
        text: opened with `newline=""`.
        name: of the file, in messages.
        kind: csv or tsv.
        header: names of the columns; None: the first line has them.
        delimiter: None: the usual one of the kind, or another that fits better.
        note: told what may not be as it was meant.

    Raises:
        LilyError: with the line of the first row that cannot be read.
    """
    head = list(islice(text, SAMPLE))
    skipped = 0
    if head and (stated := re.fullmatch(r"sep=(.)\r?\n?", head[0])):  # Excel's own line
        delimiter, skipped, head = delimiter or stated[1], 1, head[1:]
    elif delimiter is None:
        delimiter = _guessed(head, name, kind, header)
        if delimiter != USUAL[kind]:
            note(
                f"{name} is separated by {SEPARATORS[delimiter]}, not {SEPARATORS[USUAL[kind]]}; "
                f"data.delimiter: {delimiter!r} says that this is right"
            )
    reader = _reader(chain(head, text), kind, delimiter or USUAL[kind], strict=True)
    start = skipped + 1
    try:
        names = list(header) if header else next(reader, [])
        # Excel writes commas for empty columns; nothing can ask for a column without a name.
        duplicate = next((column for i, column in enumerate(names) if column and column in names[:i]), None)
        if duplicate is not None:
            hint = ", or, if the file has no header line, set header: [names]" if looks_like_data(duplicate) else ""
            raise DuplicateNameError(f"{name}: two columns are named {duplicate!r}; rename one of them{hint}", names)
        start = skipped + reader.line_num + 1
        for fields in reader:
            here, start = start, skipped + reader.line_num + 1
            if not fields or (len(fields) == 1 < len(names) and not fields[0].strip()):
                continue
            if len(names) > 1 and fields[1:] == names[1:] and fields[0].lstrip("\ufeff") == names[0]:
                said = "data.header names the columns too" if header else "files were joined with their header lines"
                raise LilyError(f"{name}:{here}: repeats the names of the columns ({said}); remove one of them")
            if len(fields) != len(names):
                raise LilyError(f"{name}:{here}: {_unequal(fields, names, reader.dialect.delimiter, header)}")
            if start - here > SWALLOWED:
                _note_long(fields, names, reader.dialect.delimiter, f"{name}:{here}", note)
            yield dict(zip(names, fields, strict=True))
    except csv.Error as error:
        hint = ", or set format: tsv, in which quotes are ordinary characters" if delimiter == "\t" else ""
        raise LilyError(
            f"{name}:{start}: not valid {kind}: {error}. A quote at the start of a field opens it and is not closed "
            f"as it should be, so the field would swallow what follows; close it (a quote inside is written twice)"
            f"{hint}"
        ) from None


def separator_in(text: TextIO, name: str, kind: str) -> str:
    """The separator that `rows` finds without being told one.

    Raises:
        LilyError: if two fit.
    """
    head = list(islice(text, SAMPLE))
    stated = re.fullmatch(r"sep=(.)\r?\n?", head[0]) if head else None
    return stated[1] if stated else _guessed(head, name, kind, None)


def _reader(lines: Iterable[str], kind: str, delimiter: str, strict: bool) -> Any:
    if kind == "tsv" and delimiter == "\t":  # as in GLUE: quotes are ordinary characters
        return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    return csv.reader(lines, delimiter=delimiter, strict=strict)


def _guessed(head: Sequence[str], name: str, kind: str, header: Sequence[str] | None) -> str:
    """The separator by which most rows of the sample have as many fields as there are columns.

    Raises:
        LilyError: if two separators fit all rows.
    """
    usual, fits = USUAL[kind], {}
    for separator in sorted(SEPARATORS, key=lambda s: s != usual):
        try:
            counts = [len(fields) for fields in _reader(head, kind, separator, strict=False) if fields]
        except csv.Error:  # a field that is too large by this separator
            continue
        columns = len(header) if header else counts[0] if counts else 0
        equal = sum(count == columns for count in counts)
        if columns > 1 and equal > (0 if header else 1):
            fits[separator] = equal / len(counts)
        elif columns > 1 and separator == usual:
            fits[separator] = 0.0
    whole = [separator for separator, share in fits.items() if share == 1]
    if len(whole) > 1:
        both = " and by ".join(SEPARATORS[separator] for separator in whole[:2])
        raise LilyError(
            f"{name} can be separated by {both}; set data.delimiter to the right one (lily new: --delimiter)"
        )
    return max(fits, key=lambda separator: fits[separator], default=usual)


def _unequal(fields: Sequence[str], names: Sequence[str], delimiter: str, header: Sequence[str] | None) -> str:
    """What to do about a row with another number of fields than there are columns."""
    text = f"{len(fields)} fields, expected {len(names)} ({', '.join(names)})"
    mark = "tab" if delimiter == "\t" else "comma" if delimiter == "," else repr(delimiter)
    if len(fields) > len(names):
        if any(fields[len(names) :]):
            text += (
                f'; a {mark} inside a text needs quotes around the text ("a{delimiter} b"), or another data.delimiter'
            )
        else:
            text += (
                f"; the line ends with a {mark} that separates nothing; remove it there, or add one to the header line"
            )
    else:
        text += f"; a value or a {mark} is missing, or a line break inside a text has no quotes around the text"
    if not header and any(looks_like_data(name) for name in names):
        text += "; if the file has no header line, set header: [names]"
    return text


def looks_like_data(name: str) -> bool:
    """Whether a column's name is more likely a value, because the file has no header line."""
    return bool(re.fullmatch(r"[-+]?[0-9.]+", name.strip())) or len(name.split()) > 4


def _note_long(fields: Sequence[str], names: Sequence[str], delimiter: str, where: str, note: Note) -> None:
    for column, field in zip(names, fields, strict=True):
        lines = field.splitlines()
        alike = sum(line.count(delimiter) == len(names) - 1 for line in lines) if len(names) > 1 else 0
        if alike >= max(SWALLOWED, 0.8 * len(lines)):
            note(
                f"{where}: column {column!r} holds {len(lines)} lines, {alike} of which look like rows; close its quote"
            )
        elif len(lines) > MANY_LINES:
            note(f"{where}: column {column!r} holds {len(lines)} lines; if that is not one text, close its quote")
