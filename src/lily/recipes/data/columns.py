"""Which column of a table is what, and what task they are for: by their names, and by what is in them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise, permutations
from typing import Any

from lily.recipes.data import chats, images
from lily.recipes.data.sniff import NUMBER
from lily.recipes.data.tables import Row
from lily.recipes.spec.values import is_empty

MANY = 50  # classes; a column with more distinct values is no label unless it is named like one
ROWS_PER_CLASS = 10  # at least, where there are more
NAMES = {
    "label": ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "y", "tag", "stars",
              "rating", "score", "polarity", "priority", "similarity"),
    "text": ("text", "sentence", "review", "content", "body", "title", "headline", "comment", "message", "tweet",
             "document", "abstract", "description", "utterance"),
    "image": ("image", "file", "path", "filename", "file_name", "image_path", "img"),
    "messages": ("messages", "conversations", "conversation", "chat", "dialog", "dialogue", "turns"),
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
}  # fmt: skip
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text_a", "text_b"),
         ("text1", "text2"), ("query", "passage"), ("question", "sentence"))  # fmt: skip
NUMBERED = (("1", "2"), ("a", "b"))  # what the names of two columns of longer texts that are a pair differ in
ANSWERS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response"),
           ("question", "answer"), ("question", "response"), ("prompt", "answer"), ("prompt", "output"),
           ("input", "output"), ("query", "response"), ("query", "answer"), ("user", "assistant"),
           ("human", "assistant"), ("source", "target"), ("article", "summary"), ("document", "summary"),
           ("text", "summary"))  # fmt: skip
CHATS = ("prompt", "instruction")  # who calls a column so wants answers
VERDICTS = ("label", "labels", "class", "target", "y")  # what says of a text and its answer whether they fit
WORDS = 3.0  # mean words of an answer that is no class
IDS = re.compile(r"(^|.*_)(id|idx|index|no|nr)|.*id", re.IGNORECASE)
DATE = re.compile(r"\d{4}[-/.]\d\d?[-/.]\d\d?.*|\d\d?[-/.]\d\d?[-/.](\d\d){1,2}(\D.*)?")
PART_NAMES = {"train", "training", "test", "validation", "valid", "val", "dev"}


def task_and_columns(
    rows: Sequence[Row], names: list[str], given: dict[str, str], task: str | None
) -> tuple[str, dict[str, str]] | None:
    """The task and the section `columns`; None: nothing fits."""
    if "messages" in given or "prompt" in given or task == "sft":
        return _chat(rows, names, given)
    if not given and task is None and (chat := _chat(rows, names, given)) is not None:
        return chat
    free = [name for name in names if name not in given.values()]
    if "text" not in given and task in (None, "image-classification"):
        image = given.get("image") or _image(rows, free)
        if image is not None:
            label = given.get("label") or _label(rows, [name for name in free if name != image])
            return None if label is None else ("image-classification", {"image": image, "label": label})
    pair = () if "text" in given else _pair(rows, names) or _answered(rows, free)
    text = given.get("text") or (pair[0] if pair else _longest(rows, free))
    label = given.get("label") or _label(rows, [name for name in free if name not in (text, *pair)])
    if text is None or label is None:
        return None
    chosen = {"text": text} | ({"text_pair": pair[1]} if pair else {}) | {"label": label}
    chosen |= {key: name for key, name in given.items() if key == "text_pair"}
    values = [row.get(label) for row in rows]
    return task or ("text-regression" if _measured(values) else "text-classification"), chosen


def _image(rows: Sequence[Row], names: Sequence[str]) -> str | None:
    """A column of paths of images: one called so, or any where no column of longer texts is beside it."""
    paths = [name for name in names if is_image(rows, name)]
    longer = any(is_text(rows, name) and _words(rows, name) >= WORDS for name in names if name not in paths)
    return _first(paths, NAMES["image"]) or (None if longer else next(iter(paths), None))


def _pair(rows: Sequence[Row], names: Sequence[str]) -> tuple[str, ...]:
    """Two columns of texts that are one input: by known names, or by `NUMBERED` ones."""
    lower = _by_lower([name for name in names if is_text(rows, name)])
    for first, second in PAIRS:
        if first in lower and second in lower:
            return lower[first], lower[second]
    longer = {name: own for name, own in lower.items() if _words(rows, own) >= WORDS}
    for name, other in permutations(longer, 2):
        changed = [(a, b) for a, b in zip(name, other, strict=False) if a != b]
        if len(name) == len(other) > 1 and len(changed) == 1 and changed[0] in NUMBERED:
            return longer[name], longer[other]
    return ()


def _answered(rows: Sequence[Row], names: Sequence[str]) -> tuple[str, ...]:
    """Two columns of longer texts of which the second answers the first: what a label beside them is about."""
    lower = _by_lower(names)
    pair = tuple(lower[name] for name in _known(lower, [p for p in ANSWERS if p[1] != "summary"]) if name)
    return pair if all(_words(rows, name) >= WORDS for name in pair) else ()


def _by_lower(names: Sequence[str]) -> dict[str, str]:
    """Name in lower case -> column, the first of several."""
    return {name.lower().strip(): name for name in reversed(names)}


def _known(lower: Collection[str], pairs: Sequence[tuple[str, str]] = ANSWERS) -> tuple[str, str]:
    """The first pair of names that are there; two empty texts: none."""
    return next((pair for pair in pairs if set(pair) <= set(lower)), ("", ""))


def _words(rows: Sequence[Row], name: str) -> float:
    """Mean number of words in a column."""
    return sum(len(str(row.get(name, "")).split()) for row in rows) / len(rows)


def _chat(rows: Sequence[Row], names: list[str], given: dict[str, str]) -> tuple[str, dict[str, str]] | None:
    lower = _by_lower(names)
    known = _known(lower)
    if not given and ({"chosen", "rejected"} <= set(lower) or _is_judged(rows, names, known)):
        return None
    lists = [name for name in names if all(chats.is_chat(listed(row.get(name))) for row in rows[:50])]
    others = [name for name in lists if name.lower().strip() not in known]
    messages = given.get("messages") or _first(others, NAMES["messages"]) or next(iter(others), None)
    system = _first(names, NAMES["system"], lambda name: all(isinstance(row.get(name) or "", str) for row in rows))
    more = {} if system is None else {"system": system}
    if messages is not None and "prompt" not in given:
        return "sft", {"messages": messages} | more
    prompt, completion = given.get("prompt") or lower.get(known[0]), given.get("completion") or lower.get(known[1])
    if not prompt or not completion or (not given and not isinstance(rows[0].get(completion), (str, list))):
        return None
    # a question with few short answers is a classifier's, unless it is called a prompt
    words = _words(rows, completion)
    spaced = any(" " in str(row.get(prompt, "")) for row in rows)  # not in Chinese or Japanese
    if not given and known[0] not in CHATS and words < WORDS and spaced:
        return None
    context = _first([name for name in names if name not in (prompt, completion)], NAMES["input"])
    if context is not None and (known[0] == "instruction" or (known[0] == "question" and is_text(rows, context))):
        more = {"input": context} | more
    return "sft", {"prompt": prompt, "completion": completion} | more


def _is_judged(rows: Sequence[Row], names: Sequence[str], known: tuple[str, str]) -> bool:
    """Whether a label beside texts and their answers or summaries is what there is to learn."""
    found = NAMES["label"] if known[1] == "summary" else VERDICTS
    free = [name for name in labels(rows, names) if name.lower().strip() not in known]
    return bool(known[0]) and known[0] not in CHATS and any(called(name) in found for name in free)


def listed(value: Any) -> Any:
    """The list of messages in a cell, which may hold it as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        return chats.from_json(value)
    return value


def _label(rows: Sequence[Row], names: Sequence[str]) -> str | None:
    """A column named like a label, else the likeliest of `labels`."""
    named = _first(names, NAMES["label"], lambda name: distinct(rows, name) > 1 and not is_nested(rows, name))
    return named or next(iter(labels(rows, names)), None)


def labels(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Columns whose values repeat; without any, a single one of numbers.

    Those with a word for labels in their names come first, ids and dates last, and of each the fewest distinct ones.
    """
    most = min(max(MANY, len(rows) / ROWS_PER_CLASS), len(rows) / 2)
    names = [name for name in names if not is_nested(rows, name)]
    few = {name: n for name in names if 1 < (n := distinct(rows, name)) <= most and not is_parts(rows, name)}
    if few:
        return sorted(few, key=lambda name: (is_aside(rows, name), not is_named(name), few[name]))
    numbers = [name for name in names if distinct(rows, name) > 1 and not is_id(rows, name)]
    numbers = [
        name for name in numbers if all(is_empty(v := row.get(name)) or number_of(v) is not None for row in rows)
    ]
    return numbers if len(numbers) == 1 else []


def is_named(name: str) -> bool:
    """Whether one of the words of a column's name is a label's: gold_label, or class_id."""
    return not set(re.findall(r"[a-z]+", name.lower())).isdisjoint(NAMES["label"])


def is_aside(rows: Sequence[Row], name: str) -> bool:
    """Whether a column holds ids or dates, which repeat without being classes."""
    if is_named(name):
        return False
    return is_id(rows, name) or all(DATE.fullmatch(str(row.get(name) or "").strip()) for row in rows)


def is_parts(rows: Sequence[Row], name: str) -> bool:
    """Whether a column says which part a row belongs to."""
    values = {str(row.get(name)).lower() for row in rows}
    return len(values) > 1 and values <= PART_NAMES


def is_id(rows: Sequence[Row], name: str) -> bool:
    """Whether a column numbers the rows, or is called like one that does."""
    if not name.strip() or IDS.fullmatch(name.strip()):
        return True
    values = [number_of(row.get(name)) for row in rows]
    return all(a is not None and b is not None and b - a == 1 for a, b in pairwise(values))


def _longest(rows: Sequence[Row], names: Sequence[str]) -> str | None:
    """A column of texts named like one, else the one with the longest texts that are no ids and no paths of images."""
    varied = [name for name in names if is_text(rows, name) and not is_image(rows, name)]
    varied = [name for name in varied if _words(rows, name) > 1 or not is_id(rows, name)]
    named = _first(varied, NAMES["text"])
    lengths = {name: sum(len(row.get(name) or "") for row in rows) for name in varied if name not in NAMES["label"]}
    return named or (max(lengths, key=lengths.__getitem__) if lengths else None)


def is_text(rows: Sequence[Row], name: str) -> bool:
    """Whether a column holds texts that differ, and not numbers alone."""
    values = [row.get(name) or "" for row in rows]
    if not all(isinstance(value, str) for value in values) or len(set(values)) < 2:
        return False
    return any(value and not NUMBER.fullmatch(value.strip()) for value in values)


def _first(names: Sequence[str], known: Sequence[str], fits: Callable[[str], bool] = lambda _: True) -> str | None:
    """The first of `names` that is called as one of `known`, in the order of these; of a dotted name its end counts."""
    lower = {called(name): name for name in reversed(names)}
    return next((lower[name] for name in known if name in lower and fits(lower[name])), None)


def called(name: str) -> str:
    """What a column is called: the end of a dotted name, without the numbers of places in lists."""
    return re.sub(r"(\.\d+)+$", "", name.lower().strip()).rpartition(".")[2]


def is_image(rows: Sequence[Row], name: str) -> bool:
    """Whether a column holds paths of images."""
    return all(str(row.get(name) or "").lower().endswith(images.ENDINGS) for row in rows[:50])


def is_nested(rows: Sequence[Row], name: str) -> bool:
    """Whether a column holds lists or objects."""
    return any(isinstance(row.get(name), (list, dict)) for row in rows)


def distinct(rows: Sequence[Row], name: str) -> int:
    """How many different values a column has."""
    return len({str(row.get(name)) for row in rows})


def number_of(value: Any) -> float | None:
    """The finite number in a cell."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def _measured(values: Sequence[Any]) -> bool:
    """Whether values are measurements and not classes: numbers with decimals, or too many to be classes."""
    numbers = [number_of(value) for value in values if not is_empty(value)]
    known = [number for number in numbers if number is not None]
    if not known or len(known) < len(numbers):
        return False
    return any(n != int(n) for n in known) or len(set(known)) > MANY
