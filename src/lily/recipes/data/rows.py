"""Rows of labelled examples: checked, split, and given their canonical names."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lily.errors import LilyError
from lily.recipes.data import images
from lily.recipes.data.sources import fetch
from lily.recipes.data.tables import Row, name_of, read_rows
from lily.recipes.spec.places import Key, located
from lily.recipes.spec.schema import CLASSIFYING, Choices, Columns, File, Recipe

T = TypeVar("T")

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Splits:
    """The examples of a recipe, with canonical keys.

    Attributes:
        train: rows with text, text_pair and label; or image and label; or prompt and completion (and choices); or
            messages.
        validation: chooses the best epoch.
        test: gives the final figure; may be empty.
        labels: the classes, in the order of their ids; None outside classification.
        tests: further test sets, by name.
        unseen: those of the classes that no training row has; of images alone, elsewhere they are refused.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: tuple[str, ...] | None
    tests: dict[str, list[Row]] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()

    @property
    def held_out(self) -> list[Row]:
        """The rows that results are reported on: test, or validation where there is no test."""
        return self.test or self.validation

    @property
    def judged(self) -> dict[str, list[Row]]:
        """All rows that metrics are computed of, by what to call them."""
        return {"validation": self.validation, "test": self.test, **self.tests}


def load_splits(recipe: Recipe) -> Splits:
    """Read, check and split a recipe's data. The split depends on `data.split.seed` alone.

    Raises:
        LilyError: names the file, the row and the column of the first thing that is wrong.
    """
    data = recipe.data
    pool = _rows_at(("train",), recipe)
    for name in data.mix or ():
        pool += _rows_at(("mix", name), recipe)
    if data.deduplicate:
        pool = list({_key(row): row for row in reversed(pool)}.values())[::-1]
    parts: dict[str, list[Row]] = {}
    shares = {"validation": data.split.validation, "test": data.split.test}
    carve = {name: share for name, share in shares.items() if getattr(data, name) is None and share > 0}
    train, carved = _carve(pool, carve, data.split.seed, recipe.task in CLASSIFYING)
    for name in shares:
        parts[name] = carved.get(name, []) if getattr(data, name) is None else _rows_at((name,), recipe)
    seed = data.split.seed
    known, train = train, _sample(train, data.max_train, seed)
    parts["validation"] = _sample(parts["validation"], data.max_validation, seed)
    parts["test"] = _sample(parts["test"], data.max_test, seed)
    tests = {name: _sample(_rows_at(("tests", name), recipe), data.max_test, seed) for name in data.tests or ()}
    if not train or not parts["validation"]:
        with located(recipe, "data", "train"):
            raise LilyError(
                f"data.train has {len(pool)} rows, too few to train ({len(train)}) and validate "
                f"({len(parts['validation'])}); give more rows or a smaller data.split"
            )
    named: dict[Key, list[Row]] = {(name,): rows for name, rows in parts.items()}
    named |= {("tests", name): rows for name, rows in tests.items()}
    labels = _labels(known, named, recipe) if recipe.task in CLASSIFYING else None
    seen = {row["label"] for row in known} if labels is not None else set()
    unseen = tuple(label for label in labels or () if label not in seen)
    return Splits(train, parts["validation"], parts["test"], labels, tests, unseen)


def _rows_at(key: Key, recipe: Recipe) -> list[Row]:
    """The rows of the recipe's file at a path below `data`."""
    file, classes = recipe.data.files[key], recipe.data.classes
    with located(recipe, "data", *key, file.kind):
        rows = rows_of(file, recipe)
    if classes is None:
        return rows
    there = {row["label"] for row in rows}
    if missing := [name for name in classes if name not in there]:
        with located(recipe, "data", "classes"):
            raise LilyError(f"{name_of(file)} has no rows of {missing[0]!r}; it has {', '.join(sorted(there))}")
    return [row for row in rows if row["label"] in classes]


def rows_of(file: File, recipe: Recipe, labelled: bool = True) -> list[Row]:
    """The rows of a file that has the recipe's columns, with canonical keys.

    Args:
        file: the table.
        recipe: decides task and columns.
        labelled: whether the label column of a classification or regression is needed.

    Raises:
        LilyError: names the row and column of the first thing that is wrong.
    """
    if recipe.task == "image-classification" and file.hub is None:
        path = fetch(file)
        if images.holds_images(path):
            return list(images.read_images(path))
    return [_canonical(row, i, file, recipe, labelled) for i, row in enumerate(read_rows(file), 1)]


def check_labels(rows: Iterable[Row], known: Sequence[str], where: str) -> None:
    """Refuse rows with a label that the model was not trained on.

    Raises:
        LilyError: names the label.
    """
    unknown = sorted({row["label"] for row in rows} - set(known))
    if unknown:
        raise LilyError(f"{where} has the label {unknown[0]!r}; known: {', '.join(known)}")


def _canonical(row: Row, number: int, file: File, recipe: Recipe, labelled: bool = True) -> Row:
    where = f"{name_of(file)}, row {number}"
    columns = recipe.data.columns
    if columns.messages is not None:
        with located(recipe, "data", "columns", "messages"):
            return {"messages": _messages(_get(row, columns.messages, "messages", where), columns.messages, where)}
    if recipe.task == "sft":
        texts = {name: _text_of(row, name, recipe, where) for name in ("prompt", "completion")}
        if recipe.data.choices is None:
            return texts
        with located(recipe, "data", "choices"):
            return {**texts, "choices": _choices(row, texts, recipe.data.choices, where)}
    folder = None if file.hub is not None else fetch(file).parent
    out = inputs_of(row, recipe, where, folder)
    if not labelled:
        return out
    with located(recipe, "data", "columns", "label"):
        column = columns.label or "label"
        label = _get(row, column, "label", where)
        regression = recipe.task == "text-regression"
        out["label"] = _number(label, column, where) if regression else _class(label, column, where)
    return out


def inputs_of(row: Row, recipe: Recipe, where: str, folder: Path | None = None) -> Row:
    """The texts of a classification or regression row, or its image, by their canonical names.

    Args:
        row: as its table has it.
        recipe: decides task and columns.
        where: the row stands, for messages.
        folder: that paths of images are relative to; default: the working directory.
    """
    if recipe.task == "image-classification":
        column = recipe.data.columns.image or "image"
        with located(recipe, "data", "columns", "image"):
            return {"image": images.found(_get(row, column, "image", where), column, where, folder)}
    roles = ("text",) if recipe.data.columns.text_pair is None else ("text", "text_pair")
    return {role: _text_of(row, role, recipe, where) for role in roles}


def _text_of(row: Row, role: str, recipe: Recipe, where: str) -> str:
    column = str(getattr(recipe.data.columns, role))
    with located(recipe, "data", "columns", role):
        return _text(_get(row, column, role, where), column, where)


def prompt_of(row: Row, columns: Columns, where: str) -> Any:
    """What an sft row gives the model: a text, or the messages up to the last answer (which may be absent)."""
    if columns.messages is None:
        return _text(_get(row, str(columns.prompt), "prompt", where), str(columns.prompt), where)
    messages = _get(row, columns.messages, "messages", where)
    if isinstance(messages, list) and all(isinstance(m, dict) for m in messages):
        answered = bool(messages) and messages[-1].get("role") == "assistant"
        messages = messages if answered else [*messages, {"role": "assistant", "content": ""}]
    return _messages(messages, columns.messages, where)[:-1]


def completion_of(row: Row) -> str:
    """What a canonical sft row wants to hear (last), white space at the ends aside."""
    completion: str = row["messages"][-1]["content"] if "messages" in row else row["completion"]
    return completion.strip()


def texts_of(file: File, column: str, key: str, most: int, seed: int) -> list[str]:
    """A fixed sample of the texts in one column of a table that need not have the recipe's columns.

    Args:
        file: the table.
        column: of the text.
        key: what to call the recipe's key that names the column.
        most: texts to take.
        seed: decides which.

    Raises:
        LilyError: names the row that has no text there.
    """
    rows = _sample(list(enumerate(read_rows(file), 1)), most, seed)
    places = [(row, f"{name_of(file)}, row {number}") for number, row in rows]
    return [_text(_get(row, column, key, where, ""), column, where) for row, where in places]


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


def _choices(row: Row, texts: Row, said: Choices, where: str) -> list[str]:
    """The completions that a row offers."""
    if said.column is not None:
        found = _get(row, said.column, "column", where, "data.choices.")
        if not isinstance(found, list) or not all(isinstance(choice, str) and choice.strip() for choice in found):
            raise LilyError(f"{where}: column {said.column!r} holds {_short(found)}, expected a list of texts")
    else:
        _, mark, rest = texts["prompt"].rpartition(str(said.after))
        if not mark:
            raise LilyError(
                f"{where}: the prompt has no {said.after!r} (data.choices.after): {_short(texts['prompt'])}"
            )
        line = (rest.splitlines() or [""])[0]
        found = [choice.strip() for choice in line.split(said.separator) if choice.strip()]
    choices = [said.completion.replace("{choice}", choice) for choice in found]
    if len(choices) < 2:
        raise LilyError(f"{where}: data.choices finds {len(choices)}, expected two or more")
    if texts["completion"] not in choices:
        raise LilyError(
            f"{where}: the completion {_short(texts['completion'])} is none of the choices "
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


def _messages(value: Any, column: str, where: str) -> list[dict[str, str]]:
    well_formed = isinstance(value, list) and all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in value
    )
    if not well_formed or not value:
        raise LilyError(
            f"{where}: column {column!r} holds {_short(value)}, expected a list of "
            "{role: system | user | assistant, content: text}"
        )
    if value[-1]["role"] != "assistant" or len(value) < 2:
        raise LilyError(
            f"{where}: column {column!r} must end with an assistant message after a user's; that is trained"
        )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _short(value: Any) -> str:
    text = repr(value)
    return "nothing" if value is None else text if len(text) <= 60 else text[:57] + "..."


def _key(row: Row) -> str:
    """What makes two rows the same input: case and spaces do not count, nor does what is to be learnt."""
    if "image" in row:
        return images.digest(row["image"])
    inputs = [v for k, v in sorted(row.items()) if k not in ("label", "completion", "messages", "choices")]
    inputs += [m["content"] for m in row.get("messages", [])[:-1]]
    return json.dumps([" ".join(text.casefold().split()) for text in inputs])


def _carve(
    rows: list[Row], shares: dict[str, float], seed: int, stratify: bool
) -> tuple[list[Row], dict[str, list[Row]]]:
    """Take shares of the rows away, per class where asked. Returns (what is left, the shares), shuffled."""
    strata: dict[Any, list[Row]] = {}
    for row in _shuffled(rows, seed):
        strata.setdefault(row["label"] if stratify else None, []).append(row)
    left: list[Row] = []
    carved: dict[str, list[Row]] = {name: [] for name in shares}
    for label in sorted(strata, key=str):
        members, start = strata[label], 0
        for name, share in shares.items():
            count = min(round(share * len(members)), len(members) - start - 1)  # each class keeps one to learn from
            carved[name] += members[start : start + count]
            start += count
        left += members[start:]
    return _shuffled(left, seed), {name: _shuffled(part, seed) for name, part in carved.items()}


def _shuffled(rows: Iterable[T], seed: int) -> list[T]:
    out = list(rows)
    random.Random(seed).shuffle(out)
    return out


def _sample(rows: list[T], most: int | None, seed: int) -> list[T]:
    return rows if most is None or most >= len(rows) else _shuffled(rows, seed)[:most]


def drawn(rows: list[T], most: int | None, seed: int = 0) -> list[T]:
    """A fixed sample of rows in their own order: files are often sorted, by class or by length.

    Args:
        rows: to choose from.
        most: rows to take; None: all.
        seed: decides which.
    """
    return [rows[i] for i in sorted(_sample(list(range(len(rows))), most, seed))]


def _labels(train: list[Row], parts: dict[Key, list[Row]], recipe: Recipe) -> tuple[str, ...]:
    """The classes in the order of their ids.

    A label that no training row has is mostly a typo in a table of texts. The classes of images are folders and
    numbers, and a few images a class, drawn at random as VTAB-1K's, may leave some without any.
    """
    found, column = {row["label"] for row in train}, recipe.data.columns.label or "label"
    if len(found) < 2:
        with located(recipe, "data", "columns", "label"):
            raise LilyError(
                f"label column {column!r} holds one class only ({found.pop()!r}); there is nothing to learn"
            )
    for key, rows in parts.items():
        unknown = sorted({row["label"] for row in rows} - found)
        if unknown and recipe.task != "image-classification":
            known = ", ".join(sorted(found))
            with located(recipe, "data", *key):
                raise LilyError(
                    f"data.{'.'.join(key)} has the label {unknown[0]!r}, which no training row has (known: {known})"
                )
    found |= {row["label"] for rows in parts.values() for row in rows}
    if len(found) > 1000:
        with located(recipe, "data", "columns", "label"):
            raise LilyError(
                f"label column {column!r} holds {len(found)} classes; for numbers write task: text-regression"
            )
    numeric = all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in found)
    return tuple(sorted(found, key=lambda label: (int(label) if numeric else 0, label)))
