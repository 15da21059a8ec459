"""What a file of somebody's own data is for, and what somebody should know about it."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lily.errors import LilyError
from lily.recipes.data import chats, images, sniff
from lily.recipes.data.columns import (
    NAMES,
    distinct,
    is_id,
    is_parts,
    is_text,
    labels,
    listed,
    number_of,
    task_and_columns,
)
from lily.recipes.data.sniff import READ
from lily.recipes.data.tables import Row
from lily.recipes.spec.values import is_empty

HELD_OUT = 0.15  # share of the rows for validation, and for test
AMOUNT = re.compile(r"[^\w-]*-?\d+([.,]\d+)*\W*")
LISTS = re.compile(r"[\w ]+([,;|][\w ]+)+")
SHOWN = 12  # columns in a message


@dataclass(frozen=True)
class Guess:
    """What a file holds.

    Attributes:
        path: the file or folder.
        task: as in recipes.
        columns: the section `data.columns`.
        unused: columns that are not used.
        rows: number of rows; None: it was not counted.
        classes: class -> rows, the most frequent first; empty: no classes.
        longest: characters of the longest text, or prompt and answer.
        answer: characters of the longest answer.
        others: `validation` and `test` -> files beside it.
        how: keys beside the path of the training file: how it is read.
        told: what somebody should know, in sentences.
    """

    path: Path
    task: str
    columns: dict[str, str]
    unused: tuple[str, ...] = ()
    rows: int | None = None
    classes: dict[str, int] = field(default_factory=dict)
    longest: int = 0
    answer: int = 0
    others: dict[str, Path] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)
    told: tuple[str, ...] = ()


def guess(
    path: Path, *, task: str | None = None, columns: dict[str, str] | None = None, delimiter: str | None = None
) -> Guess:
    """Look at a file, or at a folder of images or with a table in it.

    Args:
        path: csv, tsv, json, jsonl or parquet; a folder with a folder of images per class, or an archive of one.
        task: what the user says it is.
        columns: the columns that the user names, by their key in a recipe.
        delimiter: between the columns of a csv; None: it is found.

    Raises:
        LilyError: if it cannot be read, or no task fits; names the columns that are there.
    """
    if not path.exists():
        raise LilyError(f"{path}: there is no such file or folder; name a table, or a folder with a folder per class")
    if re.search(r"\$\{?\w", str(path)):
        raise LilyError(f"{path}: a $ in a recipe's path starts a variable; rename the file or its folder")
    if path.is_dir():
        counts = _image_classes(path)
        if len(counts) < 2 and (table := sniff.table_in(path)) is not None:
            return guess(table, task=task, columns=columns, delimiter=delimiter)
    if path.is_dir() or images.is_archive(path) or images.is_list(path):
        if columns:
            raise LilyError(f"{path}: images in folders have no columns; drop --{next(iter(columns))}")
        return _of_images(path)
    opened = sniff.open_table(path, delimiter)
    rows = opened.rows
    if not rows:
        raise LilyError(f"{path} has no rows; check the file")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for given in (columns or {}).values():
        if given not in names and given.partition(".")[0] not in names:
            near = difflib.get_close_matches(given, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {_few(names)}"
            raise LilyError(f"{path} has no column {given!r}; {hint}")
    found = task_and_columns(rows, names, dict(columns or {}), task)
    if found is None:
        raise LilyError(
            f"{path}: it is not clear what to learn from the columns {_few(names)}; {_reason(rows, names)}"
            "name them with --text and --label, --prompt and --completion, --messages, or --image and --label"
        )
    kind, chosen = found
    seen = _described(path, kind, chosen, rows, names)
    others, without = _beside(path, chosen, opened.how)
    told = (*_told(seen, rows, dict(columns or {})), *without)
    seen = replace(seen, how=opened.how, others=others, told=told)
    _check_classes(seen, rows)
    return seen


def _few(names: Sequence[str]) -> str:
    shown = [name if name.strip() else "(without a name)" for name in names[:SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _image_classes(folder: Path) -> dict[str, int]:
    """Class -> number of images, in a folder as it is read."""
    try:
        return dict(Counter(row["label"] for row in images.read_images(folder)).most_common())
    except LilyError:
        return {}


def _of_images(path: Path) -> Guess:
    if not path.is_dir():
        return Guess(path, "image-classification", {})
    parts = sniff.parts_of(path)
    train = parts.pop("train", path)
    counts = _image_classes(train)
    if len(counts) < 2:
        texts = next((p for p in train.rglob("*.txt") if p.parent != train), None) if not counts else None
        if texts is not None:
            raise LilyError(
                f"{path} holds texts in folders, such as {texts}; write them into one table, such as a csv with the "
                "columns text and label"
            )
        loose = any(p.suffix.lower() in images.ENDINGS for p in train.iterdir())
        what = f"no images ({', '.join(images.ENDINGS)}) in folders of classes"
        what = "images in no folder of a class" if loose else what
        what = f"images of one class only ({next(iter(counts))})" if counts else what
        raise LilyError(f"{path} holds {what}; make one folder per class in it, with its name, or name a table")
    return Guess(train, "image-classification", {}, rows=sum(counts.values()), classes=counts, others=parts)


def _reason(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Why no task fits, where that is known, as the start of a sentence that says what to do."""
    lower = {name.lower(): name for name in names}
    if {"chosen", "rejected"} <= set(lower):
        prompt = f"--prompt {lower['prompt']} " if "prompt" in lower else ""
        return (
            "preferences are for TRL's DPOTrainer with a LilyConfig, not for recipes; to train on the chosen answers "
            f"alone: {prompt}--completion {lower['chosen']}; else "
        )
    own = [name for name in names if not is_id(rows, name)]
    texts = [name for name in own if is_text(rows, name)]
    for name in own:
        if name.lower() in NAMES["label"] and distinct(rows, name) == 1:
            return f"{name!r} is {str(rows[0].get(name))!r} in every row read, so there is nothing to tell apart; "
        if name in texts and _amounts(rows, name):
            return f"{name!r} holds amounts such as {rows[0].get(name)!r}, which are numbers only as 1234.5; else "
    if len(texts) == len(own) == 1:
        return "texts alone have nothing to predict, so add a column with a label or an answer for each; "
    if len(texts) == len(own) == 2:
        return f"if {texts[1]!r} answers {texts[0]!r}: --prompt {texts[0]} --completion {texts[1]}; else "
    return "" if texts else "no column holds texts alone; "


def _amounts(rows: Sequence[Row], name: str) -> bool:
    """Whether a column holds numbers that are not written as plain ones: 1,5 or 50% or $3."""
    amounts = sum(bool(AMOUNT.fullmatch(str(row.get(name)))) for row in rows)
    return amounts > len(rows) / 2 and any(number_of(row.get(name)) is None for row in rows)


def _told(found: Guess, rows: Sequence[Row], given: dict[str, str]) -> list[str]:
    """What somebody should know about rows and columns before training."""
    told = []
    label = found.columns.get("label")
    if label is not None and "label" not in given and label.lower().strip().rpartition(".")[2] not in NAMES["label"]:
        others = [name for name in labels(rows, found.unused) if not is_id(rows, name)][:3]
        if others:
            told.append(f"The label is a guess; `lily new` takes another with --label: {', '.join(others)}.")
    if found.task == "text-classification" and sum(bool(LISTS.fullmatch(name)) for name in found.classes) > 1:
        told.append("Some labels look like lists: each combination is a class by itself.")
    for name in found.unused:
        if is_parts(rows, name):
            told.append(f"{name} says what a row is for, but is not used: write a file for each part to keep them.")
    for key, name in found.columns.items():
        blank = [i for i, row in enumerate(rows, 1) if is_empty(row.get(name))]
        if blank and key != "input":
            shown = ", ".join(map(str, blank[:3])) + (", ..." if len(blank) > 3 else "")
            told.append(f"{name} is empty in {_rows_n(len(blank))} ({shown}): fill these in or remove them first.")
    letters = [
        c for row in rows[:200] for name in found.columns.values() for c in str(row.get(name, "")) if c.isalpha()
    ]
    if sum(c > "\u024f" for c in letters) > len(letters) / 4:
        told.append("The base's model knows English: for other scripts name one that knows yours (model: {hub: ...}).")
    return told


def _rows_n(n: int) -> str:
    return "1 row" if n == 1 else f"{n:,} rows"


def _check_classes(found: Guess, rows: Sequence[Row]) -> None:
    """That classes repeat, and are enough for rows to be held out.

    Raises:
        LilyError: if not.
    """
    if found.task != "text-classification":
        return
    label, n = found.columns["label"], _rows_n(len(rows))
    if 2 < len(rows) < 2 * len(found.classes):
        fix = (
            f"if they are amounts, write them as plain numbers such as 1234.5, not {next(iter(found.classes))!r}"
            if _amounts(rows, label)
            else "name the right column with --label, or, if it answers the text, use --prompt and --completion"
        )
        raise LilyError(
            f"{found.path}: label column {label!r} holds {len(found.classes):,} different values in {n}, so they are "
            f"no classes; {fix}"
        )
    if "validation" not in found.others and all(round(HELD_OUT * count) < 1 for count in found.classes.values()):
        shown = ", ".join(f"{name!r} {count}" for name, count in list(found.classes.items())[:3])
        raise LilyError(
            f"{found.path} has {n} ({shown}), too few to hold any out for validation; give 4 rows or more of each "
            "class, better 50"
        )


def _described(path: Path, task: str, columns: dict[str, str], rows: Sequence[Row], names: list[str]) -> Guess:
    used = set(columns.values()) | {name.partition(".")[0] for name in columns.values() if name not in names}
    unused = tuple(name for name in names if name.strip() and name not in used)
    label = columns.get("label", "")
    present = [str(row[label]) for row in rows if not is_empty(row.get(label))]
    counts = Counter(present) if task.endswith("classification") else Counter()
    keys = [key for key in ("text", "text_pair", "prompt", "input", "completion", "messages") if key in columns]
    longest = max(sum(len(_plain(row.get(columns[key]))) for key in keys) for row in rows) if keys else 0
    answer = max(len(_answer(row, columns)) for row in rows) if task == "sft" else 0
    return Guess(
        path, task, columns, unused, len(rows) if len(rows) < READ else None,
        dict(counts.most_common()), longest, answer,
    )  # fmt: skip


def _plain(value: Any) -> str:
    value = listed(value)
    if chats.is_chat(value):
        return " ".join(str(m.get("content") or m.get("value") or "") for m in value)
    return str(value or "")


def _answer(row: Row, columns: dict[str, str]) -> str:
    if "messages" not in columns:
        return str(row.get(columns["completion"]) or "")
    said = listed(row.get(columns["messages"]))
    answers = [m for m in said or () if isinstance(m, dict) and _role(m) == "assistant"]
    return max((str(m.get("content") or m.get("value") or "") for m in answers), key=len, default="")


def _role(message: dict[str, Any]) -> str | None:
    return chats.ALIASES.get(str(message.get("role") or message.get("from")).strip().lower())


def _beside(path: Path, columns: dict[str, str], how: dict[str, Any]) -> tuple[dict[str, Path], list[str]]:
    """Files for validation and test beside a training file, and what is wrong with the others."""
    found, told = {}, []
    for part, file in sniff.beside(path).items():
        try:
            rows = sniff.open_table(file, how.get("delimiter")).rows
        except LilyError:
            rows = []
        missing = [name for name in columns.values() if not rows or name not in rows[0]]
        if missing and "header" not in how:
            told.append(f"{file.name} beside it is not used, as it has no column {missing[0]!r} to judge by.")
        else:
            found[part] = file
    return found, told
