"""What is said about a file of somebody's own data: why no task fits it, and what to know before training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lily.errors import LilyError
from lily.io.words import counted, some
from lily.recipes.data.cells import short
from lily.recipes.data.columns import (
    NAMES,
    VERDICTS,
    called,
    distinct,
    is_aside,
    is_id,
    is_image,
    is_nested,
    is_parts,
    is_text,
    labels,
    listed,
    number_of,
)
from lily.recipes.data.labels import MOST_CLASSES, too_many
from lily.recipes.data.tables import Row
from lily.recipes.spec.values import is_empty

AMOUNT = re.compile(r"[^\w-]*-?\d+([.,]\d+)*\W*")
LISTS = re.compile(r"[\w ]+([,;|][\w ]+)+")
CHAT = re.compile(r"<\|im_start\|>|<\|start_header_id\|>|\[INST\]|^\W*(human|user)\s*:", re.IGNORECASE)
WORD = ("word", "words", "token", "tokens")  # what a column of single words is called
MISSING = ("NA", "N/A", "n/a", "#N/A", "nan", "NaN", "NULL", "null", "None", "-", "?")  # written for no class
JUDGED = (*VERDICTS, "score", "rating", "stars")  # what a column about an answer is called
SHOWN = 12  # columns in a message


def few(names: Sequence[str]) -> str:
    """The first columns, in a message."""
    return some((name if name.strip() else "(without a name)" for name in names), SHOWN)


def reason(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Why no task fits, where that is known, as the start of a sentence that says what to do."""
    lower = {name.lower(): name for name in names}
    if {"chosen", "rejected"} <= set(lower):
        return "preferences are for TRL's DPOTrainer with a LilyConfig, not for recipes; " + _chosen(rows, lower)
    if len(rows) == 1:
        return "it has one row, and nothing is learned from that; add rows, or "
    own = [name for name in names if not is_id(rows, name)]
    texts = [name for name in own if is_text(rows, name) and not is_image(rows, name)]
    for name in own:
        if called(name) in (*NAMES["label"], *NAMES["messages"]) and is_nested(rows, name):
            return _about_lists(rows, name)
        if name.lower() in NAMES["label"] and distinct(rows, name) == 1:
            return f"{name!r} is {str(rows[0].get(name))!r} in every row read, so there is nothing to tell apart; "
        if _amounts(rows, name):
            shown = next(row[name] for row in rows if number_of(row.get(name)) is None)
            return f"{name!r} holds amounts such as {shown!r}, which are numbers only as 1234.5; else "
    if marked := next((name for name in texts if CHAT.search(str(rows[0].get(name)))), None):
        return (
            f"{marked!r} holds whole chats as texts; write the messages of each as a list, "
            '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}; else '
        )
    if packed := next((name for name in names if any(isinstance(row.get(name), bytes) for row in rows)), None):
        return (
            f"{packed!r} holds bytes; of images, write files and a column of their paths; of texts, write them as "
            "texts; else "
        )
    if (pictures := [name for name in own if is_image(rows, name)]) and texts:
        return f"{texts[0]!r} holds no classes of the images of {pictures[0]!r}, and other texts are not learned; "
    if len(texts) == len(own) == 1 and labels(rows, texts):
        return (
            f"{texts[0]!r} holds classes, but no column beside it texts, or paths of images with their endings, such "
            "as a1.jpg; "
        )
    if len(texts) == len(own) == 1:
        return "texts alone have nothing to predict, so add a column with a label or an answer for each; "
    if len(texts) == len(own) == 2:
        return f"if {texts[1]!r} answers {texts[0]!r}: --prompt {texts[0]} --completion {texts[1]}; else "
    if nested := next((name for name in own if is_nested(rows, name)), None):
        return _about_lists(rows, nested)
    return "" if texts else "no column holds texts alone; "


def _chosen(rows: Sequence[Row], names: Mapping[str, str]) -> str:
    """How to train on the chosen ones of preferences, as the start of a sentence."""
    chosen = listed(rows[0].get(names["chosen"]))
    if isinstance(chosen, list) and ("prompt" not in names or len(chosen) > 1):
        option = f"--messages {names['chosen']}"
    elif "prompt" in names:
        option = f"--prompt {names['prompt']} --completion {names['chosen']}"
    else:
        return "else "
    return f"to train on the chosen answers alone: {option}; else "


def _about_lists(rows: Sequence[Row], name: str) -> str:
    """What a column of lists or objects lacks, as the start of a sentence that says what to do."""
    value = next(row[name] for row in rows if isinstance(row.get(name), (list, dict)))
    if (words := _tagged(rows, name)) is not None:
        return (
            f"{name!r} holds a list as long as that of {words!r}, as classes of single words (NER) are written, which "
            'recipes do not train; use transformers\' Trainer with LilyConfig(task_type="TOKEN_CLS"), or '
        )
    if called(name) in NAMES["messages"]:
        return (
            f"{name!r} holds no messages, such as "
            '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]; write it so, or '
        )
    return (
        f"{name!r} holds {short(value)}, but a class is one text or number; write one into each row (Label Studio "
        "exports it as CSV or JSON-MIN), or "
    )


def _tagged(rows: Sequence[Row], name: str) -> str | None:
    """Another column whose lists are as long, in every row."""
    lists = [other for other in rows[0] if other != name and all(isinstance(row.get(other), list) for row in rows)]
    alike = (o for o in lists if all(len(row.get(name) or ()) == len(row[o]) for row in rows))
    return next(alike, None) if any(len(row.get(name) or ()) > 1 for row in rows) else None


def _yes_or_no(rows: Sequence[Row], name: str) -> bool:
    """Whether a column holds truth values."""
    return {str(row.get(name)).lower() for row in rows} in ({"0", "1"}, {"true", "false"}, {"yes", "no"})


def _amounts(rows: Sequence[Row], name: str) -> bool:
    """Whether a column holds numbers that are not written as plain ones: 1,5 or 50% or $3."""
    amounts = sum(bool(AMOUNT.fullmatch(str(row.get(name)))) for row in rows)
    return amounts > len(rows) / 2 and any(number_of(row.get(name)) is None for row in rows)


def told(
    columns: Mapping[str, str],
    unused: Sequence[str],
    classes: Mapping[str, int],
    rows: Sequence[Row],
    given: Mapping[str, str],
) -> list[str]:
    """What somebody should know about rows and columns before training, in sentences.

    Args:
        columns: the section `data.columns`.
        unused: columns that are not used.
        classes: class -> rows; empty: no classes.
        rows: all that were read.
        given: the columns that the user named.
    """
    said = []
    label = columns.get("label")
    if label is not None and "label" not in given and called(label) not in NAMES["label"]:
        others = [name for name in labels(rows, unused) if not is_id(rows, name)][:3]
        if others:
            said.append(f"The label is a guess; `lily new` takes another with --label: {', '.join(others)}.")
        elif is_aside(rows, label):
            said.append(f"{label} may be an id or a date and no class; `lily new` takes another column with --label.")
    if "completion" in columns and not given:
        beside = [name for name in labels(rows, unused) if called(name) in JUDGED or _yes_or_no(rows, name)]
        said += [f"{name} is not used, and every answer is learned. To predict it instead: --label {name}; where it "
                 "marks unwanted answers, remove these rows first." for name in beside[:1]]  # fmt: skip
    if called(columns.get("text", "")) in WORD:
        said.append("Each row is one word, and is classified without its sentence; recipes do not train NER.")
    if missing := next((name for name in classes if name.strip() in MISSING), None):
        said.append(
            f"Class {missing!r} may stand for a missing label; if so, remove its {counted(classes[missing], 'row')}."
        )
    if sum(bool(LISTS.fullmatch(name)) for name in classes) > 1:
        said.append("Some labels look like lists: each combination is a class by itself.")
    for name in unused:
        if is_parts(rows, name):
            said.append(f"{name} says what a row is for, but is not used: write a file for each part to keep them.")
    for key, name in columns.items():
        blank = [i for i, row in enumerate(rows, 1) if is_empty(row.get(name))]
        if blank and key not in ("input", "system"):
            shown = ", ".join(map(str, blank[:3])) + (", ..." if len(blank) > 3 else "")
            said.append(
                f"{name} is empty in {counted(len(blank), 'row')} ({shown}): fill these in or remove them first."
            )
    letters = [c for row in rows[:200] for name in columns.values() for c in str(row.get(name, "")) if c.isalpha()]
    if sum(c > "\u024f" for c in letters) > len(letters) / 4:
        said.append("The base's model knows English: for other scripts name one that knows yours (model: {hub: ...}).")
    return said


def no_answers(path: Path, column: str, rows: Sequence[Row]) -> LilyError:
    """What is wrong with chats in which no row has an answer."""
    chat = listed(rows[0].get(column))
    last = short(chat[-1]) if isinstance(chat, list) and chat else short(chat)
    return LilyError(
        f"{path}: {column!r} holds no answer; its first row ends with {last}, and a chat ends with "
        '{"role": "assistant", "content": "..."}'
    )


def check_classes(path: Path, label: str, classes: Mapping[str, int], rows: Sequence[Row]) -> None:
    """That classes repeat, and are not too many.

    Raises:
        LilyError: if not.
    """
    n = counted(len(rows), "row")
    if is_nested(rows, label):
        raise LilyError(f"{path}: {_about_lists(rows, label)}name another column with --label")
    if 2 < len(rows) < 2 * len(classes):
        fix = (
            f"if they are amounts, write them as plain numbers such as 1234.5, not {next(iter(classes))!r}"
            if _amounts(rows, label)
            else "name the right column with --label, or, if it answers the text, use --prompt and --completion"
        )
        raise LilyError(
            f"{path}: label column {label!r} holds {len(classes):,} different values in {n}, so they are "
            f"no classes; {fix}"
        )
    if len(classes) > MOST_CLASSES:
        raise LilyError(f"{path}: {too_many(label, len(classes))}")


def check_held_out(path: Path, rows: int, classes: Mapping[str, int], share: float) -> None:
    """That a share of the rows, or of the rows of some class, is at least one of them.

    Raises:
        LilyError: if not.
    """
    if any(round(share * count) for count in classes.values() or (rows,)):
        return
    shown = ", ".join(f"{name!r} {count}" for name, count in list(classes.items())[:3])
    of_each = " of each class" if classes else ""
    raise LilyError(
        f"{path} has {counted(rows, 'row')}{f' ({shown})' if shown else ''}, too few to hold any out for validation; "
        f"give 4 rows or more{of_each}, better 50"
    )
