"""Rows of labeled examples: checked, split, and renamed to canonical keys."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lily.errors import LilyError
from lily.io.words import counted, some
from lily.recipes.data import chats, images, labels
from lily.recipes.data.cells import ABSENT, at, class_in, get, number_in, short, text_in
from lily.recipes.data.chat_template import Chat
from lily.recipes.data.delimited import Note
from lily.recipes.data.sft import beside, check_chat, choices_of, needs_chat, text_prompt
from lily.recipes.data.sources import fetch
from lily.recipes.data.tables import Row, name_of, read_rows
from lily.recipes.spec.base import CLASSIFYING
from lily.recipes.spec.data import Columns, File
from lily.recipes.spec.locations import Key, located
from lily.recipes.spec.schema import Recipe
from lily.recipes.spec.values import is_empty

T = TypeVar("T")

NAMED = 20  # classes in a message


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
                f"({len(parts['validation'])}); {_too_few(pool, recipe)}"
            )
    named: dict[Key, list[Row]] = {(name,): rows for name, rows in parts.items()}
    named |= {("tests", name): rows for name, rows in tests.items()}
    classes = _labels(all_train, named, recipe) if recipe.task in CLASSIFYING else None
    seen = {row["label"] for row in all_train} if classes is not None else set()
    unseen = tuple(label for label in classes or () if label not in seen)
    return Splits(train, parts["validation"], parts["test"], classes, tests, unseen, left_out, tuple(notes))


def _too_few(pool: list[Row], recipe: Recipe) -> str:
    """What to do about too few rows: with as many classes as rows, the label column is likely another one."""
    if recipe.task in CLASSIFYING and (classes := {row["label"] for row in pool}) and 2 < len(pool) < 2 * len(classes):
        column = recipe.data.columns.label or "label"
        return f"label column {column!r} holds {len(classes)} classes ({short(pool[0]['label'])}); is it the right one?"
    return "add rows, or name a file for it under data.validation"


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
            raise LilyError(f"{name_of(file)} has no rows of {missing[0]!r}; it has {_listed(present)}")
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
            return list(images.read_images(path, note))
    rows = read_rows(file, note)
    _check_filled(rows, file, recipe, labeled)
    return [_canonical(row, i, file, recipe, labeled) for i, row in enumerate(rows, 1)]


def _check_filled(rows: Sequence[Row], file: File, recipe: Recipe, labeled: bool) -> None:
    """That no row is empty where the task needs a value: all rows are named at once, since one is seldom alone.

    Raises:
        LilyError: for the first column with an empty cell, with the numbers of the rows.
    """
    for role in ("text", "text_pair", "label", "prompt", "completion"):
        column = getattr(recipe.data.columns, role)
        if column is None or (role == "label" and not labeled):
            continue
        values = [at(row, column) for row in rows]
        # of a column that is in no row, or is misspelled in one, more is said where it is read
        in_others = 1 < sum(value is ABSENT for value in values) < len(values)
        empty = [i for i, v in enumerate(values, 1) if is_empty(v) or (in_others and v is ABSENT)]
        if empty:
            numbers = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
            which = f"row {numbers}" if len(empty) == 1 else f"{len(empty):,} of {len(rows):,} rows ({numbers})"
            with located(recipe, "data", "columns", role):
                fix = "fill it, or remove the row" if len(empty) == 1 else "fill them, or remove the rows"
                raise LilyError(f"{name_of(file)}: column {column!r} is empty in {which}; {fix}")


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
        raise LilyError(f"{where} has the label {short(unknown[0])}; the model was trained on {_listed(classes)}")


def _canonical(row: Row, number: int, file: File, recipe: Recipe, labeled: bool = True) -> Row:
    where = f"{name_of(file)}, row {number}"
    columns = recipe.data.columns
    if columns.messages is not None:
        with located(recipe, "data", "columns", "messages"):
            messages, more = get(row, columns.messages, "messages", where), beside(row, columns, where)
            return chats.conversation(messages, columns.messages, where, row=row, **more)
    if recipe.task == "sft":
        before, after = (_value(row, role, recipe, where) for role in ("prompt", "completion"))
        with located(recipe, "data", "columns", "prompt"):
            prompt = before if chats.is_chat(before) else text_prompt(row, columns, where)
        if needs_chat(before, columns) or chats.is_chat(after):
            with located(recipe, "data", "columns"):
                check_chat(recipe, where)
                names = (str(columns.prompt), str(columns.completion))
                return chats.pair(prompt, after, names, where, row=row, **beside(row, columns, where))
        texts = {"prompt": prompt, "completion": _text_of(row, "completion", recipe, where)}
        if recipe.data.choices is None:
            return texts
        with located(recipe, "data", "choices"):
            return {**texts, "choices": choices_of(row, texts, recipe.data.choices, where)}
    folder = None if file.hub is not None else fetch(file).parent
    out = inputs_of(row, recipe, where, folder)
    if not labeled:
        return out
    with located(recipe, "data", "columns", "label"):
        column = columns.label or "label"
        label = get(row, column, "label", where)
        regression = recipe.task == "text-regression"
        out["label"] = number_in(label, column, where) if regression else class_in(label, column, where)
    return out


def inputs_of(row: Row, recipe: Recipe, where: str, folder: Path | None = None) -> Row:
    """The texts of a classification or regression row, or its image, by their canonical names.

    `where` is for messages; `folder` is the base of relative image paths, by default the working directory.
    """
    if recipe.task == "image-classification":
        column = recipe.data.columns.image or "image"
        with located(recipe, "data", "columns", "image"):
            return {"image": images.image_of(get(row, column, "image", where), column, where, folder)}
    roles = ("text",) if recipe.data.columns.text_pair is None else ("text", "text_pair")
    return {role: _text_of(row, role, recipe, where) for role in roles}


def _value(row: Row, role: str, recipe: Recipe, where: str) -> Any:
    with located(recipe, "data", "columns", role):
        return get(row, str(getattr(recipe.data.columns, role)), role, where)


def _text_of(row: Row, role: str, recipe: Recipe, where: str) -> str:
    with located(recipe, "data", "columns", role):
        return text_in(_value(row, role, recipe, where), str(getattr(recipe.data.columns, role)), where)


def input_key(row: Row) -> str:
    """The input of a row without case and spaces, by which duplicates are detected."""
    if "image" in row:
        return images.digest(row["image"])
    if "messages" in row:
        inputs = chats.inputs(row)
    else:
        inputs = [v for k, v in sorted(row.items()) if k not in ("label", "completion", "choices")]
    return json.dumps([" ".join(text.casefold().split()) for text in inputs])


def fingerprints(splits: Splits) -> dict[str, str]:
    """Part -> SHA-256 of its rows in their order, by which other rows under the same name are noticed."""
    return {
        name: hashlib.sha256(json.dumps([_plain(row) for row in rows], sort_keys=True).encode()).hexdigest()
        for name, rows in splits.parts.items()
        if rows
    }


def _plain(row: Row) -> Row:
    """What of a row is the same wherever its file is; an image that is no file counts by its size."""
    return {key: str(v.size) if hasattr(v, "convert") else v for key, v in row.items() if key != "where"}


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


def _listed(names: Iterable[str]) -> str:
    """Names of classes in a message, which a column of texts would fill."""
    return some((name if len(name) <= 40 else short(name) for name in sorted(names)), NAMED)


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
                count = sum(row["label"] == unknown[0] for row in rows)
                raise LilyError(
                    f"data.{'.'.join(key)} has the label {short(unknown[0])}, which no training row has; correct or "
                    f"remove its {counted(count, 'row')}; training rows have {_listed(classes)}"
                )
    classes |= {row["label"] for rows in parts.values() for row in rows}
    if len(classes) > labels.MOST_CLASSES:
        with located(recipe, "data", "columns", "label"):
            raise LilyError(labels.too_many(column, len(classes)))
    numeric = all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in classes)
    return tuple(sorted(classes, key=lambda label: (int(label) if numeric else 0, label)))


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
        value = get(row, column, key, where, "")
        if chats.is_chat(value):
            more = beside(row, Columns(), where)
            found.append(Chat.of(chats.conversation(value, column, where, row=row, **more)))
        else:
            found.append(text_in(value, column, where))
    return found
