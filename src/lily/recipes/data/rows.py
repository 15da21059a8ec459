"""Rows of labeled examples: checked, split, and renamed to canonical keys."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lily.errors import LilyError
from lily.recipes.data import images, labels
from lily.recipes.data.delimited import Note, looks_like_data
from lily.recipes.data.sources import fetch
from lily.recipes.data.tables import Row, name_of, read_rows
from lily.recipes.spec.locations import Key, located
from lily.recipes.spec.schema import CLASSIFYING, Choices, Columns, File, Recipe
from lily.recipes.spec.values import SURROGATE

T = TypeVar("T")

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Splits:
    """The examples of a recipe, with canonical keys.

    Attributes:
        train: rows with text, text_pair and label; or image and label; or prompt and completion (and choices); or
            messages.
        validation: selects the best epoch.
        test: for the final metrics; may be empty.
        labels: the classes, in the order of their ids; None without classification.
        tests: further test sets, by name.
        unseen: classes without a training row; for images only, an error for other tasks.
        left_out: rows that were read and are in no part: part -> reason -> number.
        notes: what was read otherwise than the file or the recipe says, or may not be as it was meant.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: tuple[str, ...] | None
    tests: dict[str, list[Row]] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def held_out(self) -> list[Row]:
        """The rows that results are reported on: test, or validation if there is no test."""
        return self.test or self.validation

    @property
    def parts(self) -> dict[str, list[Row]]:
        """The rows of every part, by its key below `data`."""
        own = {"train": self.train, "validation": self.validation, "test": self.test}
        return own | {f"tests.{name}": rows for name, rows in self.tests.items()}

    @property
    def judged(self) -> dict[str, list[Row]]:
        """All rows for which metrics are computed, by name of the set."""
        return {"validation": self.validation, "test": self.test, **self.tests}


def load_splits(recipe: Recipe) -> Splits:
    """Read, check and split a recipe's data. The split depends on `data.split.seed` alone.

    Raises:
        LilyError: for the first problem, with its file, row and column.
    """
    data, notes = recipe.data, list[str]()
    files = {key: _rows_at(key, recipe, notes.append) for key in data.files}
    if recipe.task in CLASSIFYING:
        _settle_labels(files, recipe, notes.append)
    left_out: dict[str, dict[str, int]] = {}

    def kept(name: str, rows: list[Row], reason: str, of: list[Row]) -> list[Row]:
        if len(rows) < len(of):
            reasons = left_out.setdefault(name, {})
            reasons[reason] = reasons.get(reason, 0) + len(of) - len(rows)
        return rows

    if data.classes is not None:
        for key, rows in files.items():
            part = "train" if key[0] == "mix" else ".".join(key)
            files[key] = kept(part, _of_classes(rows, key, recipe), "not in data.classes", rows)
    pool = [row for key, rows in files.items() if key[0] in ("train", "mix") for row in rows]
    if data.deduplicate:
        unique = list({input_key(row): row for row in reversed(pool)}.values())[::-1]
        pool = kept("train", unique, "repeated (data.deduplicate)", pool)
    parts: dict[str, list[Row]] = {}
    shares, seed = {"validation": data.split.validation, "test": data.split.test}, data.split.seed
    held_out = {name: share for name, share in shares.items() if getattr(data, name) is None and share > 0}
    all_train, carved = _carve(pool, held_out, seed, recipe.task in CLASSIFYING)

    def sampled(name: str, rows: list[Row], key: str) -> list[Row]:
        return kept(name, _sample(rows, getattr(data, key), seed), f"over data.{key}", rows)

    for name in ("validation", "test"):
        rows = carved.get(name, []) if getattr(data, name) is None else files[name,]
        parts[name] = sampled(name, rows, f"max_{name}")
    train = sampled("train", all_train, "max_train")
    tests = {name: sampled(f"tests.{name}", files["tests", name], "max_test") for name in data.tests or ()}
    if not train or not parts["validation"]:
        with located(recipe, "data", "train"):
            raise LilyError(
                f"data.train has {len(pool)} rows, too few to train ({len(train)}) and validate "
                f"({len(parts['validation'])}); give more rows or a smaller data.split"
            )
    named: dict[Key, list[Row]] = {(name,): rows for name, rows in parts.items()}
    named |= {("tests", name): rows for name, rows in tests.items()}
    classes = _labels(all_train, named, recipe) if recipe.task in CLASSIFYING else None
    seen = {row["label"] for row in all_train} if classes is not None else set()
    unseen = tuple(label for label in classes or () if label not in seen)
    return Splits(train, parts["validation"], parts["test"], classes, tests, unseen, left_out, tuple(notes))


def _rows_at(key: Key, recipe: Recipe, note: Note) -> list[Row]:
    """The rows of the recipe's file at a path below `data`."""
    file = recipe.data.files[key]
    with located(recipe, "data", *key, file.kind):
        return rows_of(file, recipe, note=note)


def _of_classes(rows: list[Row], key: Key, recipe: Recipe) -> list[Row]:
    """The rows of the classes that the recipe names."""
    present, classes = {row["label"] for row in rows}, recipe.data.classes or []
    if missing := [name for name in classes if name not in present]:
        file = recipe.data.files[key]
        with located(recipe, "data", "classes"):
            raise LilyError(f"{name_of(file)} has no rows of {missing[0]!r}; it has {', '.join(sorted(present))}")
    return [row for row in rows if row["label"] in classes]


def _settle_labels(files: dict[Key, list[Row]], recipe: Recipe, note: Note) -> None:
    """Labels that differ only in how they are written: refused, merged into one, or kept, by `data.similar_labels`."""
    train = Counter(row["label"] for key, rows in files.items() if key[0] in ("train", "mix") for row in rows)
    counts = train + Counter(row["label"] for rows in files.values() for row in rows)  # training rows count twice
    similar = labels.families(counts.elements())
    if not similar or recipe.data.similar_labels == "keep":
        return
    total = Counter(row["label"] for rows in files.values() for row in rows)
    shown = "; ".join(labels.named(family, total) for family in similar[:3])
    if recipe.data.similar_labels == "refuse":
        with located(recipe, "data", "columns", "label"):
            raise LilyError(
                f"label column {recipe.data.columns.label or 'label'!r} holds {shown}, which differ only in spaces, "
                "case or notation and would be separate classes; write them alike in the file, or set "
                "data.similar_labels: merge (one class), or keep (separate classes)"
            )
    note(f"labels were merged into the most frequent one (data.similar_labels): {shown}")
    one = {label: family[0] for family in similar for label in family[1:]}
    for rows in files.values():
        for row in rows:
            row["label"] = one.get(row["label"], row["label"])


def rows_of(file: File, recipe: Recipe, labeled: bool = True, note: Note = lambda _: None) -> list[Row]:
    """The rows of a file that has the recipe's columns, with canonical keys.

    The label column of a classification or regression is required if `labeled`; `note` is told what may not be as it
    was meant.

    Raises:
        LilyError: for the first problem, with its row and column.
    """
    if recipe.task == "image-classification" and file.hub is None:
        path = fetch(file)
        if images.holds_images(path):
            return list(images.read_images(path))
    return [_canonical(row, i, file, recipe, labeled) for i, row in enumerate(read_rows(file, note), 1)]


def check_labels(rows: Iterable[Row], classes: Sequence[str], where: str, merge: bool = False) -> None:
    """Check that the model was trained on all labels of these rows.

    With `merge`, a label that differs from a class only in how it is written becomes that class, in place.

    Raises:
        LilyError: for the first label that it was not trained on.
    """
    rows = list(rows)
    if merge:
        own = {labels.alike(name): name for name in classes}
        for row in rows:
            if row["label"] not in classes:
                row["label"] = own.get(labels.alike(row["label"]), row["label"])
    unknown = sorted({row["label"] for row in rows} - set(classes))
    if unknown:
        raise LilyError(f"{where} has the label {unknown[0]!r}; the model was trained on {', '.join(classes)}")


def _canonical(row: Row, number: int, file: File, recipe: Recipe, labeled: bool = True) -> Row:
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


def _text_of(row: Row, role: str, recipe: Recipe, where: str) -> str:
    column = str(getattr(recipe.data.columns, role))
    with located(recipe, "data", "columns", role):
        return _text(_get(row, column, role, where), column, where)


def prompt_of(row: Row, columns: Columns, where: str) -> Any:
    """The prompt of an sft row: a text, or the messages before the last answer (which may be absent)."""
    if columns.messages is None:
        return _text(_get(row, str(columns.prompt), "prompt", where), str(columns.prompt), where)
    messages = _get(row, columns.messages, "messages", where)
    if isinstance(messages, list) and all(isinstance(m, dict) for m in messages):
        answered = bool(messages) and messages[-1].get("role") == "assistant"
        messages = messages if answered else [*messages, {"role": "assistant", "content": ""}]
    return _messages(messages, columns.messages, where)[:-1]


def completion_of(row: Row) -> str:
    """The (last) completion of a canonical sft row, without white space at its ends."""
    completion: str = row["messages"][-1]["content"] if "messages" in row else row["completion"]
    return completion.strip()


def texts_of(file: File, column: str, key: str, count: int, seed: int) -> list[str]:
    """A fixed sample of `count` texts in one column of a table that need not have the recipe's columns.

    `key` is the recipe's key that names the column, for messages.

    Raises:
        LilyError: for the first row without text in the column.
    """
    rows = _sample(list(enumerate(read_rows(file), 1)), count, seed)
    numbered = [(row, f"{name_of(file)}, row {number}") for number, row in rows]
    return [_text(_get(row, column, key, where, ""), column, where) for row, where in numbered]


def _get(row: Row, column: str, role: str, where: str, section: str = "data.columns.") -> Any:
    value = row[column] if column in row else _nested(row, column, role, where, section)
    if _has_surrogate(value):
        raise LilyError(
            f"{where}: column {column!r} holds half of a surrogate pair (a character that was cut in two, as \\ud83d): "
            f"{_short(value)}; cut texts between characters, or remove the row"
        )
    return value


def _has_surrogate(value: Any) -> bool:
    """Of a text or a list of texts; messages are checked one by one, to name the message."""
    if isinstance(value, list):
        return any(isinstance(inner, str) and _has_surrogate(inner) for inner in value)
    return isinstance(value, str) and not value.isascii() and SURROGATE.search(value) is not None


def _nested(row: Row, column: str, role: str, where: str, section: str) -> Any:
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
                + ("; if the file has no header line, set header: [names]" if any(map(looks_like_data, row)) else "")
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
            f"{where}: column {column!r} must end with an assistant message after a user's, which is the completion"
        )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _short(value: Any) -> str:
    text = repr(value)
    return "nothing" if value is None else text if len(text) <= 60 else text[:57] + "..."


def input_key(row: Row) -> str:
    """The input of a row without case and spaces, by which duplicates are detected."""
    if "image" in row:
        return images.digest(row["image"])
    inputs = [v for k, v in sorted(row.items()) if k not in ("label", "completion", "messages", "choices")]
    inputs += [m["content"] for m in row.get("messages", [])[:-1]]
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
