"""Rows of labeled examples: checked, split, and renamed to canonical keys."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import random
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lily.errors import LilyError
from lily.recipes.data import chats, images
from lily.recipes.data.chat_template import Chat
from lily.recipes.data.sources import fetch
from lily.recipes.data.tables import Row, name_of, read_rows
from lily.recipes.spec.locations import Key, located
from lily.recipes.spec.schema import CLASSIFYING, Choices, Columns, File, Recipe

T = TypeVar("T")


@dataclass(frozen=True)
class Splits:
    """The examples of a recipe, with canonical keys.

    Attributes:
        train: rows with text, text_pair and label; or image and label; or prompt and completion (and choices); or
            messages (and tools) and where they stand.
        validation: selects the best epoch.
        test: for the final metrics; may be empty.
        labels: the classes, in the order of their ids; None without classification.
        tests: further test sets, by name.
        unseen: classes without a training row; for images only, an error for other tasks.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: tuple[str, ...] | None
    tests: dict[str, list[Row]] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()

    @property
    def held_out(self) -> list[Row]:
        """The rows that results are reported on: test, or validation if there is no test."""
        return self.test or self.validation

    @property
    def judged(self) -> dict[str, list[Row]]:
        """All rows for which metrics are computed, by name of the set."""
        return {"validation": self.validation, "test": self.test, **self.tests}


def load_splits(recipe: Recipe) -> Splits:
    """Read, check and split a recipe's data. The split depends on `data.split.seed` alone.

    Raises:
        LilyError: for the first problem, with its file, row and column.
    """
    data = recipe.data
    pool = _rows_at(("train",), recipe)
    for name in data.mix or ():
        pool += _rows_at(("mix", name), recipe)
    if data.deduplicate:
        pool = list({_key(row): row for row in reversed(pool)}.values())[::-1]
    parts: dict[str, list[Row]] = {}
    shares, seed = {"validation": data.split.validation, "test": data.split.test}, data.split.seed
    held_out = {name: share for name, share in shares.items() if getattr(data, name) is None and share > 0}
    all_train, carved = _carve(pool, held_out, seed, recipe.task in CLASSIFYING)
    for name, most in (("validation", data.max_validation), ("test", data.max_test)):
        rows = carved.get(name, []) if getattr(data, name) is None else _rows_at((name,), recipe)
        parts[name] = _sample(rows, most, seed)
    train = _sample(all_train, data.max_train, seed)
    tests = {name: _sample(_rows_at(("tests", name), recipe), data.max_test, seed) for name in data.tests or ()}
    if not train or not parts["validation"]:
        with located(recipe, "data", "train"):
            raise LilyError(
                f"data.train has {len(pool)} rows, too few to train ({len(train)}) and validate "
                f"({len(parts['validation'])}); give more rows or a smaller data.split"
            )
    named: dict[Key, list[Row]] = {(name,): rows for name, rows in parts.items()}
    named |= {("tests", name): rows for name, rows in tests.items()}
    labels = _labels(all_train, named, recipe) if recipe.task in CLASSIFYING else None
    seen = {row["label"] for row in all_train} if labels is not None else set()
    unseen = tuple(label for label in labels or () if label not in seen)
    return Splits(train, parts["validation"], parts["test"], labels, tests, unseen)


def _rows_at(key: Key, recipe: Recipe) -> list[Row]:
    """The rows of the recipe's file at a path below `data`."""
    file, classes = recipe.data.files[key], recipe.data.classes
    with located(recipe, "data", *key, file.kind):
        rows = rows_of(file, recipe)
    if classes is None:
        return rows
    present = {row["label"] for row in rows}
    if missing := [name for name in classes if name not in present]:
        with located(recipe, "data", "classes"):
            raise LilyError(f"{name_of(file)} has no rows of {missing[0]!r}; it has {', '.join(sorted(present))}")
    return [row for row in rows if row["label"] in classes]


def rows_of(file: File, recipe: Recipe, labeled: bool = True) -> list[Row]:
    """The rows of a file that has the recipe's columns, with canonical keys.

    The label column of a classification or regression is required if `labeled`.

    Raises:
        LilyError: for the first problem, with its row and column.
    """
    if recipe.task == "image-classification" and file.hub is None:
        path = fetch(file)
        if images.holds_images(path):
            return list(images.read_images(path))
    return [_canonical(row, i, file, recipe, labeled) for i, row in enumerate(read_rows(file), 1)]


def check_labels(rows: Iterable[Row], labels: Sequence[str], where: str) -> None:
    """Check that the model was trained on all labels of these rows.

    Raises:
        LilyError: for the first label that it was not trained on.
    """
    unknown = sorted({row["label"] for row in rows} - set(labels))
    if unknown:
        raise LilyError(f"{where} has the label {unknown[0]!r}; the model was trained on {', '.join(labels)}")


def _canonical(row: Row, number: int, file: File, recipe: Recipe, labeled: bool = True) -> Row:
    where = f"{name_of(file)}, row {number}"
    columns = recipe.data.columns
    if columns.messages is not None:
        with located(recipe, "data", "columns", "messages"):
            messages, more = _get(row, columns.messages, "messages", where), _beside(row, columns, where)
            return chats.conversation(messages, columns.messages, where, row=row, **more)
    if recipe.task == "sft":
        before, after = (_value(row, role, recipe, where) for role in ("prompt", "completion"))
        with located(recipe, "data", "columns", "prompt"):
            prompt = before if chats.is_chat(before) else _prompt(row, columns, where)
        if _needs_chat(before, columns) or chats.is_chat(after):
            with located(recipe, "data", "columns"):
                _check_chat(recipe, where)
                names = (str(columns.prompt), str(columns.completion))
                return chats.pair(prompt, after, names, where, row=row, **_beside(row, columns, where))
        texts = {"prompt": prompt, "completion": _text_of(row, "completion", recipe, where)}
        if recipe.data.choices is None:
            return texts
        with located(recipe, "data", "choices"):
            return {**texts, "choices": _choices(row, texts, recipe.data.choices, where)}
    folder = None if file.hub is not None else fetch(file).parent
    out = inputs_of(row, recipe, where, folder)
    if not labeled:
        return out
    with located(recipe, "data", "columns", "label"):
        column = columns.label or "label"
        label = _get(row, column, "label", where)
        regression = recipe.task == "text-regression"
        out["label"] = _number(label, column, where) if regression else _class(label, column, where)
    return out


def inputs_of(row: Row, recipe: Recipe, where: str, folder: Path | None = None) -> Row:
    """The texts of a classification or regression row, or its image, by their canonical names.

    `where` is for messages; `folder` is the base of relative image paths, by default the working directory.
    """
    if recipe.task == "image-classification":
        column = recipe.data.columns.image or "image"
        with located(recipe, "data", "columns", "image"):
            return {"image": images.image_of(_get(row, column, "image", where), column, where, folder)}
    roles = ("text",) if recipe.data.columns.text_pair is None else ("text", "text_pair")
    return {role: _text_of(row, role, recipe, where) for role in roles}


def _value(row: Row, role: str, recipe: Recipe, where: str) -> Any:
    with located(recipe, "data", "columns", role):
        return _get(row, str(getattr(recipe.data.columns, role)), role, where)


def _text_of(row: Row, role: str, recipe: Recipe, where: str) -> str:
    with located(recipe, "data", "columns", role):
        return _text(_value(row, role, recipe, where), str(getattr(recipe.data.columns, role)), where)


def prompt_of(row: Row, columns: Columns, where: str) -> Any:
    """The prompt of an sft row: a text, or the messages before the last answer (which may be absent)."""
    column, role = (columns.prompt, "prompt") if columns.messages is None else (columns.messages, "messages")
    value = _get(row, str(column), role, where)
    if role == "prompt" and not chats.is_chat(value):
        text = _prompt(row, columns, where)
        if not _needs_chat(value, columns):
            return text
        value = [{"role": "user", "content": text}]
    return Chat.of(chats.prompt(value, str(column), where, **_beside(row, columns, where)))


def _prompt(row: Row, columns: Columns, where: str) -> str:
    """The text of a prompt, with Alpaca's `input` if the recipe names it."""
    column = str(columns.prompt)
    prompt = _text(_get(row, column, "prompt", where), column, where)
    if columns.input is None:
        for name in ("input", "context") if column == "instruction" else ():
            if isinstance(row.get(name), str) and row[name].strip():
                warnings.warn(
                    f"rows have a text in {name!r} beside 'instruction', which is left out; data.columns.input: {name} "
                    "appends it to the prompt",
                    stacklevel=2,
                )
        return prompt
    more = _get(row, columns.input, "input", where)
    if more is None or (isinstance(more, str) and not more.strip()):
        return prompt
    return f"{prompt}\n{_text(more, columns.input, where)}"


def _beside(row: Row, columns: Columns, where: str) -> dict[str, Any]:
    """The tools and the system text of a conversation; columns with these names are read also if none is given."""
    return {
        name: row.get(name) if getattr(columns, name) is None else _get(row, getattr(columns, name), name, where)
        for name in ("tools", "system")
    } | ({"tools": row["functions"]} if columns.tools is None and "tools" not in row and "functions" in row else {})


def _needs_chat(prompt: Any, columns: Columns) -> bool:
    """Whether a prompt can only be written by a chat template."""
    return chats.is_chat(prompt) or columns.tools is not None or columns.system is not None


def _check_chat(recipe: Recipe, where: str) -> None:
    for key, wrong in (
        ("data.chat: false", not recipe.data.chat),
        ("data.template", recipe.data.template is not None),
        ("data.choices", recipe.data.choices is not None),
        ("train.packing", recipe.train.packing),
    ):
        if wrong:
            raise LilyError(
                f"{where}: messages, tools and a system text need the chat template, which {key} excludes; remove it"
            )


def completion_of(row: Row) -> str:
    """The (last) completion of a canonical sft row, without white space at its ends; tool calls as JSON."""
    if "messages" not in row:
        return str(row["completion"]).strip()
    answer = chats.answer(row["messages"])
    return answer["content"].strip() or json.dumps([call["function"] for call in answer.get("tool_calls", ())])


def texts_of(file: File, column: str, key: str, count: int, seed: int) -> list[str | Chat]:
    """A fixed sample of `count` texts or chats in one column of a table that need not have the recipe's columns.

    `key` is the recipe's key that names the column, for messages.

    Raises:
        LilyError: for the first row without text in the column.
    """
    rows = _sample(list(enumerate(read_rows(file), 1)), count, seed)
    found: list[str | Chat] = []
    for number, row in rows:
        where = f"{name_of(file)}, row {number}"
        value = _get(row, column, key, where, "")
        if chats.is_chat(value):
            more = _beside(row, Columns(), where)
            found.append(Chat.of(chats.conversation(value, column, where, row=row, **more)))
        else:
            found.append(_text(value, column, where))
    return found


def _get(row: Row, column: str, role: str, where: str, section: str = "data.columns.") -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.lstrip("-").isdigit() and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            near = difflib.get_close_matches(column, row, n=1)
            raise LilyError(
                f"{where}: no column {column!r} ({section}{role}); "
                + (f"did you mean {near[0]!r}? " if near else "")
                + f"columns: {', '.join(map(str, row))}"
            )
    return value


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise LilyError(f"{where}: column {column!r} holds {_short(value)}, expected text")
    return value


def _choices(row: Row, texts: Row, section: Choices, where: str) -> list[str]:
    """The completions to choose from in a row."""
    if section.column is not None:
        options = _get(row, section.column, "column", where, "data.choices.")
        if not isinstance(options, list) or not all(isinstance(choice, str) and choice.strip() for choice in options):
            raise LilyError(f"{where}: column {section.column!r} holds {_short(options)}, expected a list of texts")
    else:
        _, mark, rest = texts["prompt"].rpartition(str(section.after))
        if not mark:
            raise LilyError(
                f"{where}: the prompt has no {section.after!r} (data.choices.after): {_short(texts['prompt'])}"
            )
        line = (rest.splitlines() or [""])[0]
        options = [choice.strip() for choice in line.split(section.separator) if choice.strip()]
    choices = [section.completion.replace("{choice}", choice) for choice in options]
    if len(choices) < 2:
        raise LilyError(f"{where}: data.choices finds {len(choices)}, expected two or more")
    if texts["completion"] not in choices:
        raise LilyError(
            f"{where}: the completion {_short(texts['completion'])} is not one of the choices "
            f"({', '.join(map(_short, choices))})"
        )
    return choices


def _class(value: Any, column: str, where: str) -> str:
    if isinstance(value, bool) or (isinstance(value, (str, int)) and str(value).strip()):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    raise LilyError(f"{where}: label column {column!r} holds {_short(value)}, expected a class (text or integer)")


def _number(value: Any, column: str, where: str) -> float:
    with contextlib.suppress(TypeError, ValueError):
        number = float(value)
        if math.isfinite(number):
            return number
    raise LilyError(f"{where}: label column {column!r} holds {_short(value)}, expected a finite number")


def _short(value: Any) -> str:
    text = repr(value)
    return "nothing" if value is None else text if len(text) <= 60 else text[:57] + "..."


def _key(row: Row) -> str:
    """The input of a row without case and spaces, by which duplicates are detected."""
    if "image" in row:
        return images.digest(row["image"])
    if "messages" in row:
        inputs = chats.inputs(row)
    else:
        inputs = [v for k, v in sorted(row.items()) if k not in ("label", "completion", "choices")]
    return json.dumps([" ".join(text.casefold().split()) for text in inputs])


def _carve(
    rows: list[Row], shares: dict[str, float], seed: int, stratify: bool
) -> tuple[list[Row], dict[str, list[Row]]]:
    """Split off shares of the rows, per class if `stratify`. Returns (remaining rows, shares), shuffled."""
    strata: dict[Any, list[Row]] = {}
    for row in _shuffled(rows, seed):
        strata.setdefault(row["label"] if stratify else None, []).append(row)
    remaining: list[Row] = []
    carved: dict[str, list[Row]] = {name: [] for name in shares}
    for label in sorted(strata, key=str):
        members, start = strata[label], 0
        for name, share in shares.items():
            count = min(round(share * len(members)), len(members) - start - 1)  # each class keeps one training row
            carved[name] += members[start : start + count]
            start += count
        remaining += members[start:]
    return _shuffled(remaining, seed), {name: _shuffled(part, seed) for name, part in carved.items()}


def _shuffled(rows: Iterable[T], seed: int) -> list[T]:
    out = list(rows)
    random.Random(seed).shuffle(out)
    return out


def _sample(rows: list[T], count: int | None, seed: int) -> list[T]:
    return rows if count is None or count >= len(rows) else _shuffled(rows, seed)[:count]


def drawn(rows: list[T], count: int | None, seed: int = 0) -> list[T]:
    """A random sample of rows (`count` None: all) in their order, since files are often sorted by class or length."""
    return [rows[i] for i in sorted(_sample(list(range(len(rows))), count, seed))]


def _labels(train: list[Row], parts: dict[Key, list[Row]], recipe: Recipe) -> tuple[str, ...]:
    """The classes in the order of their ids.

    In a table of texts, a label without a training row is usually a typo, so it is an error. For images, a small random
    sample such as VTAB-1K's may miss a class.
    """
    classes, column = {row["label"] for row in train}, recipe.data.columns.label or "label"
    if len(classes) < 2:
        with located(recipe, "data", "columns", "label"):
            raise LilyError(
                f"label column {column!r} holds one class only ({classes.pop()!r}); give rows of at least two"
            )
    for key, rows in parts.items():
        unknown = sorted({row["label"] for row in rows} - classes)
        if unknown and recipe.task != "image-classification":
            with located(recipe, "data", *key):
                raise LilyError(
                    f"data.{'.'.join(key)} has the label {unknown[0]!r}, which no training row has; training rows "
                    f"have {', '.join(sorted(classes))}"
                )
    classes |= {row["label"] for rows in parts.values() for row in rows}
    if len(classes) > 1000:
        with located(recipe, "data", "columns", "label"):
            raise LilyError(
                f"label column {column!r} holds {len(classes)} classes; for numbers set task: text-regression"
            )
    numeric = all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in classes)
    return tuple(sorted(classes, key=lambda label: (int(label) if numeric else 0, label)))
