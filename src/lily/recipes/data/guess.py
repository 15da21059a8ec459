"""What a file of somebody's own data is for: the task, and which column is what."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from lily.errors import LilyError
from lily.recipes.data import chats, images, tables
from lily.recipes.data.tables import Row

READ = 20_000  # rows that are looked at
MANY = 50  # classes; a column with more distinct values is no label unless it is named like one
NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?")
LONG_NAME = 60  # characters; longer is a text, not the name of a column
IMAGE = re.compile(r"\.(jpe?g|png|webp|bmp|gif|tiff?)$", re.IGNORECASE)
NAMES = {
    "label": ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "y", "tag", "stars",
              "rating", "score", "polarity"),
    "text": ("text", "sentence", "review", "content", "body", "title", "headline", "comment", "message", "tweet",
             "document", "abstract", "description", "utterance"),
    "image": ("image", "file", "path", "filename", "file_name", "image_path", "img"),
    "messages": ("messages", "conversations", "conversation", "chat", "dialog", "dialogue", "turns"),
}  # fmt: skip
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text_a", "text_b"),
         ("text1", "text2"), ("query", "passage"))  # fmt: skip
ANSWERS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response"),
           ("question", "answer"), ("prompt", "answer"), ("input", "output"))  # fmt: skip
WORDS = 3.0  # mean words of an answer that is no class


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
        header: names that were given to the columns of a file without a header line.
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
    header: tuple[str, ...] = ()


def guess(path: Path, *, task: str | None = None, columns: dict[str, str] | None = None) -> Guess:
    """Look at a file, or at a folder of images.

    Args:
        path: csv, tsv, json, jsonl or parquet; a folder with a folder of images per class, or an archive of one.
        task: what the user says it is.
        columns: the columns that the user names, by their key in a recipe.

    Raises:
        LilyError: if it cannot be read, or no task fits; names the columns that are there.
    """
    if not path.exists():
        raise LilyError(f"{path}: there is no such file or folder; name a table, or a folder with a folder per class")
    if images.holds_images(path):
        if columns:
            raise LilyError(f"{path}: images in folders have no columns; drop --{next(iter(columns))}")
        return _of_images(path)
    rows, header = _rows(path)
    if not rows:
        raise LilyError(f"{path} has no rows; check the file")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for given in (columns or {}).values():
        if given.partition(".")[0] not in names:
            near = difflib.get_close_matches(given, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
            raise LilyError(f"{path} has no column {given!r}; {hint}")
    found = _columns(rows, names, dict(columns or {}), task)
    if found is None:
        raise LilyError(
            f"{path}: it is not clear what to learn from the columns {', '.join(names)}; name them with --text and "
            "--label, --prompt and --completion, --messages, or --image and --label"
        )
    kind, chosen = found
    return replace(_described(path, kind, chosen, rows, names), header=header)


def _rows(path: Path) -> tuple[list[Row], tuple[str, ...]]:
    """The first rows, and names for the columns of a csv or tsv whose first line is a row too."""
    rows = list(islice(tables.stream_rows(path), READ))
    names = list(rows[0]) if rows else []
    is_table = {".csv", ".tsv"} & {suffix.lower() for suffix in path.suffixes}
    if is_table and any(not name.strip() or NUMBER.fullmatch(name) or len(name) > LONG_NAME for name in names):
        header = tuple(f"column{i}" for i in range(1, len(names) + 1))
        return list(islice(tables.stream_rows(path, header=header), READ)), header
    return rows, ()


def _of_images(path: Path) -> Guess:
    counts: Counter[str] = Counter()
    if path.is_dir():
        for file in path.rglob("*"):
            if file.suffix.lower() in images.ENDINGS:
                counts[file.parent.name] += 1
        if len(counts) < 2:
            raise LilyError(
                f"{path} holds images of {len(counts)} classes; make one folder per class in it, with its name"
            )
    return Guess(
        path, "image-classification", {}, rows=sum(counts.values()) or None, classes=dict(counts.most_common())
    )


def _columns(
    rows: Sequence[Row], names: list[str], given: dict[str, str], task: str | None
) -> tuple[str, dict[str, str]] | None:
    """The task and the section `columns`; None: nothing fits."""
    if "messages" in given or "prompt" in given or task == "sft":
        return _chat(rows, names, given)
    if not given and task is None and (chat := _chat(rows, names, given)) is not None:
        return chat
    image = given.get("image") or _first(
        names, NAMES["image"], lambda name: all(IMAGE.search(str(row.get(name, ""))) for row in rows[:50])
    )
    free = [name for name in names if name not in given.values()]
    pair = () if "text" in given else next((p for p in PAIRS if set(p) <= set(names)), ())
    text = given.get("text") or (pair[0] if pair else _longest(rows, free))
    label = given.get("label") or _label(rows, [name for name in free if name not in (text, image, *pair)])
    if label is None or (image is None and text is None):
        return None
    if image is not None and "text" not in given and task in (None, "image-classification"):
        return "image-classification", {"image": image, "label": label}
    assert text is not None
    chosen = {"text": text} | ({"text_pair": pair[1]} if pair else {}) | {"label": label}
    chosen |= {key: name for key, name in given.items() if key == "text_pair"}
    values = [row.get(label) for row in rows]
    return task or ("text-regression" if _measured(values) else "text-classification"), chosen


def _chat(rows: Sequence[Row], names: list[str], given: dict[str, str]) -> tuple[str, dict[str, str]] | None:
    lists = [name for name in names if all(chats.is_chat(row.get(name)) for row in rows[:50])]
    messages = given.get("messages") or _first(lists, NAMES["messages"]) or next(iter(lists), None)
    if messages is not None and "prompt" not in given:
        return "sft", {"messages": messages}
    known = next((p for p in ANSWERS if set(p) <= set(names)), ("", ""))
    prompt, completion = given.get("prompt") or known[0], given.get("completion") or known[1]
    if not prompt or not completion:
        return None
    # a question with few short answers is a classifier's, unless it is called a prompt
    words = sum(len(str(row.get(completion, "")).split()) for row in rows) / len(rows)
    if not given and prompt not in ("prompt", "instruction") and words < WORDS:
        return None
    more = {"input": "input"} if prompt == "instruction" and "input" in names else {}
    return "sft", {"prompt": prompt, "completion": completion, **more}


def _label(rows: Sequence[Row], names: Sequence[str]) -> str | None:
    """A column named like a label, else the one with the fewest distinct values that repeat."""
    named = _first(names, NAMES["label"], lambda name: _distinct(rows, name) > 1)
    if named is not None:
        return named
    few = {name: n for name in names if 1 < (n := _distinct(rows, name)) <= min(MANY, len(rows) / 2)}
    return min(few, key=few.__getitem__) if few else None


def _longest(rows: Sequence[Row], names: Sequence[str]) -> str | None:
    """A column of texts named like one, else the one with the longest texts."""
    texts = [name for name in names if all(isinstance(row.get(name) or "", str) for row in rows)]
    varied = [name for name in texts if _distinct(rows, name) > 1]
    named = _first(varied, NAMES["text"])
    lengths = {name: sum(len(row.get(name) or "") for row in rows) for name in varied if name not in NAMES["label"]}
    return named or (max(lengths, key=lengths.__getitem__) if lengths else None)


def _first(names: Sequence[str], known: Sequence[str], fits: Any = lambda _: True) -> str | None:
    """The first of `names` that is called as one of `known`, in the order of these."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in known if name in lower and fits(lower[name])), None)


def _distinct(rows: Sequence[Row], name: str) -> int:
    return len({str(row.get(name)) for row in rows})


def _measured(values: Sequence[Any]) -> bool:
    """Whether values are measurements and not classes: numbers with decimals, or too many to be classes."""
    try:
        numbers = [float(value) for value in values if value not in (None, "")]
    except (TypeError, ValueError):
        return False
    return bool(numbers) and (any(n != int(n) for n in numbers) or len(set(numbers)) > MANY)


def _described(path: Path, task: str, columns: dict[str, str], rows: Sequence[Row], names: list[str]) -> Guess:
    used = {name.partition(".")[0] for name in columns.values()}
    counts = Counter(str(row.get(columns["label"])) for row in rows) if task.endswith("classification") else Counter()
    keys = [key for key in ("text", "text_pair", "prompt", "input", "completion", "messages") if key in columns]
    longest = max(sum(len(_plain(row.get(columns[key]))) for key in keys) for row in rows) if keys else 0
    answer = max(len(_answer(row, columns)) for row in rows) if task == "sft" else 0
    return Guess(
        path, task, columns, tuple(name for name in names if name not in used), len(rows) if len(rows) < READ else None,
        dict(counts.most_common()), longest, answer, _beside(path),
    )  # fmt: skip


def _plain(value: Any) -> str:
    if chats.is_chat(value):
        return " ".join(str(m.get("content") or m.get("value") or "") for m in value)
    return str(value or "")


def _answer(row: Row, columns: dict[str, str]) -> str:
    if "messages" not in columns:
        return str(row.get(columns["completion"]) or "")
    said = row.get(columns["messages"])
    texts = [str(m.get("content") or m.get("value") or "") for m in said or () if isinstance(m, dict)]
    return max(texts[1:], key=len, default="")


def _beside(path: Path) -> dict[str, Path]:
    """Files for validation and test beside a file called train."""
    found: dict[str, Path] = {}
    if path.name.lower().startswith("train"):
        ending = path.name[len("train") :]
        for part, words in (("validation", ("validation", "valid", "val", "dev")), ("test", ("test",))):
            file = next(
                (path.with_name(word + ending) for word in words if path.with_name(word + ending).is_file()), None
            )
            if file is not None:
                found[part] = file
    return found
