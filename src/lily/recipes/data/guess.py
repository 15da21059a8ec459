"""What a file of somebody's own data is for."""

from __future__ import annotations

import difflib
import json
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lily.errors import LilyError
from lily.recipes.data import chats, images, remarks, sniff
from lily.recipes.data.columns import PART_NAMES, listed, task_and_columns
from lily.recipes.data.delimited import Note
from lily.recipes.data.sniff import READ
from lily.recipes.data.tables import Row
from lily.recipes.spec.values import is_empty

BESIDE = ("tools", "functions")  # columns that are read beside chats without being named
MODELS = {
    ("adapter_config.json",): "the folder of an adapter",
    ("model_index.json",): "the folder of a pipeline of diffusers",
    ("config.json",): "the folder of a model",
    ("metrics.json", "recipe.yaml"): "the folder of a run",
}  # files of a folder that is no data -> what it is
HELD_OUT = 0.15  # share of the rows for validation, and for test


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
        _refuse_models(path)
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
            hint = f"did you mean {near[0]}?" if near else f"it has {remarks.few(names)}"
            raise LilyError(f"{path} has no column {given!r}; {hint}")
    found = task_and_columns(rows, names, dict(columns or {}), task)
    if found is None:
        raise LilyError(
            f"{path}: it is not clear what to learn from the columns {remarks.few(names)}; "
            f"{remarks.reason(rows, names)}"
            "name them with --text and --label, --prompt and --completion, --messages, or --image and --label"
        )
    kind, chosen = found
    stem, _, end = chosen.get("image", "").rpartition(".")
    if end == "path" and f"{stem}.bytes" in names:  # as datasets writes a column of images
        raise LilyError(f"{path}: {stem!r} holds the images themselves; write each to a file, in a folder of its class")
    seen = _described(path, kind, chosen, rows, names)
    if "messages" in chosen and not seen.answer:
        raise remarks.no_answers(path, chosen["messages"], rows)
    others, without = _beside(path, chosen, opened.how)
    if kind == "text-classification":
        remarks.check_classes(path, chosen["label"], seen.classes, rows)
    if "validation" not in others:
        remarks.check_held_out(path, len(rows), seen.classes, HELD_OUT)
    told = (*remarks.told(chosen, seen.unused, seen.classes, rows, dict(columns or {})), *without)
    return replace(seen, how=opened.how, others=others, told=told)


def _refuse_models(folder: Path) -> None:
    """That a folder does not hold a model, an adapter or a run, whose files of JSON would be taken for tables."""
    names = {file.name for file in folder.iterdir() if file.is_file()}
    weights = any(name.endswith((".safetensors", ".gguf", ".bin")) for name in names)
    for marks, what in MODELS.items():
        if names.issuperset(marks) and (weights or marks != ("config.json",)):
            raise LilyError(
                f"{folder} is {what}, not data; name a table, or a folder with a folder of images per class"
            )


def _image_classes(folder: Path, note: Note = lambda _: None) -> dict[str, int]:
    """Class -> number of images, in a folder as it is read."""
    try:
        return _counted(folder, note)
    except LilyError:
        return {}


def _counted(path: Path, note: Note = lambda _: None) -> dict[str, int]:
    return dict(Counter(row["label"] for row in images.read_images(path, note)).most_common())


def _of_images(path: Path) -> Guess:
    if not path.is_dir():
        return _of_packed_images(path)
    parts = sniff.parts_of(path)
    train = parts.pop("train", path)
    told: list[str] = []
    counts = _image_classes(train, told.append)
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
        below = next((p for p in sorted(train.rglob("*")) if p.suffix.lower() in images.ENDINGS), None)
        if not counts and below is not None and not loose:
            folder = below.parent.parent
            folder = folder.parent if folder.name.lower() in PART_NAMES else folder
            beside = [p for p in folder.parent.iterdir() if p.is_dir() and not images.is_stray(p.name)]
            if folder != train and sum(len(_image_classes(p)) > 1 for p in beside) > 1:
                raise LilyError(
                    f"{path}: the images are one folder deeper, such as {below}; if {folder.name} is a class, put its "
                    f"images into {folder} itself; if it is data by itself, name that"
                )
            raise LilyError(f"{path} holds {what}, but {folder} does; name that")
        raise LilyError(f"{path} holds {what}; make one folder per class in it, with its name, or name a table")
    rows = sum(counts.values())
    if "validation" not in parts:
        remarks.check_held_out(train, rows, counts, HELD_OUT)
    return Guess(train, "image-classification", {}, rows=rows, classes=counts, others=parts, told=tuple(told))


def _of_packed_images(path: Path) -> Guess:
    """Of an archive of folders of images, or of a list of images."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if not any(name.lower().endswith(images.ENDINGS) for name in archive.namelist()):
                raise LilyError(f"{path} holds no images; of a zip with a table in it, unpack and name the table")
    try:
        counts = _counted(path)
    except LilyError:
        top = images.unpacked(path) if images.is_archive(path) else None
        below = [] if top is None else [top, *(p for p in top.iterdir() if p.is_dir())]
        if not (parts := next(filter(None, map(sniff.parts_of, below)), {})):
            raise
        raise LilyError(
            f"{path} holds a folder for each part ({', '.join(parts)}), and parts are found in a folder only; unpack "
            "it and name that"
        ) from None
    if len(counts) == 1:
        raise LilyError(f"{path} holds images of one class only ({next(iter(counts))}); a classifier needs two")
    rows = sum(counts.values())
    remarks.check_held_out(path, rows, counts, HELD_OUT)
    return Guess(path, "image-classification", {}, rows=rows, classes=counts)


def _described(path: Path, task: str, columns: dict[str, str], rows: Sequence[Row], names: list[str]) -> Guess:
    used = {*columns.values(), *(BESIDE if "messages" in columns else ())} | {
        name.partition(".")[0] for name in columns.values() if name not in names
    }
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
        return " ".join(map(_said, value))
    return str(value or "")


def _said(message: dict[str, Any]) -> str:
    """What a message says, with its calls of tools."""
    calls = [message[key] for key in ("tool_calls", "function_call") if message.get(key)]
    text = str(message.get("content") or message.get("value") or "")
    return text + "".join(json.dumps(call, ensure_ascii=False) for call in calls)


def _answer(row: Row, columns: dict[str, str]) -> str:
    if "messages" not in columns:
        return str(row.get(columns["completion"]) or "")
    said = listed(row.get(columns["messages"]))
    answers = [m for m in said or () if isinstance(m, dict) and _role(m) == "assistant"]
    return max((_said(m) for m in answers), key=len, default="")


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
