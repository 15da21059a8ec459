"""Labels that differ only in how they are written, such as `pos` and `Pos `: surely one class."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from lily.io.words import counted, joined

# Marks above and below a line have a meaning of their own: m² is not m2.
MEANINGFUL = ("<super>", "<sub>", "<fraction>")
BOOLEANS = {"true": "1", "false": "0"}
MOST_CLASSES = 1000  # of more, the table of which is taken for which has millions of cells
MISSING = ("nan", "null", "n/a", "na", "<na>", "#n/a")


def alike(label: str) -> str:
    """The form that labels share if they differ in spaces, case, invisible characters, Unicode or number notation.

    >>> alike(" ＰＯＳ") == alike("pos\u200b"), alike("1.0") == alike("True"), alike("m²") == alike("m2")
    (True, True, False)
    """
    folded = "".join(map(_folded, unicodedata.normalize("NFC", label)))
    text = " ".join(unicodedata.normalize("NFC", folded.casefold()).split())
    whole = re.fullmatch(r"([+-]?[0-9]+)\.0*", text)
    return BOOLEANS.get(text, whole[1] if whole else text)


def nearly_alike(label: str) -> str:
    """The form that labels share if they differ in punctuation or leading zeros only: perhaps one class, perhaps not.

    >>> nearly_alike("not_relevant.") == nearly_alike("'not-relevant'"), nearly_alike("C") == nearly_alike("C++")
    (True, False)
    """
    text = re.sub(r"(?<=[^\W_])[-_/ ]+(?=[^\W_])", " ", alike(label)).strip(" _.,;:'\"`()[]")
    return re.sub(r"^[+]?(-?)0+(?=[0-9])|^[+](?=[0-9])", r"\1", text) or label


def _folded(character: str) -> str:
    kind = unicodedata.category(character)
    if (kind in ("Cf", "Cc") and not character.isspace()) or "\ufe00" <= character <= "\ufe0f":
        return ""  # zero-width characters, byte order marks, soft hyphens, variants of emoji
    if kind == "Pd":
        return "-"
    if character in "\u2018\u2019":
        return "'"
    meaningful = unicodedata.decomposition(character).startswith(MEANINGFUL)
    return character if meaningful else unicodedata.normalize("NFKC", character)


def families(labels: Iterable[str], form: Callable[[str], str] = alike) -> list[list[str]]:
    """The labels that share a form, each family with the most frequent one first."""
    found: dict[str, list[str]] = {}
    for label, _ in sorted(Counter(labels).items(), key=lambda item: (-item[1], len(item[0]), item[0])):
        found.setdefault(form(label), []).append(label)
    return [family for family in found.values() if len(family) > 1]


def named(family: Iterable[str], counts: Mapping[str, int]) -> str:
    """Labels with their numbers of rows; with escapes where two would look the same."""
    shown = [(label, repr(label) if unicodedata.is_normalized("NFKC", label) else ascii(label)) for label in family]
    return joined([f"{text} ({counted(counts[label], 'row')})" for label, text in shown])


def too_many(column: str, count: int) -> str:
    """What is wrong with more than `MOST_CLASSES` classes, and what to do."""
    return (
        f"label column {column!r} holds {count:,} classes, and at most {MOST_CLASSES:,} are trained; keep the frequent "
        "ones (data.classes lists them), or write one name for the rare; for numbers set task: text-regression"
    )


def looks_missing(label: str) -> bool:
    """Whether a class has a name that programs write for a missing value."""
    return label.strip().lower() in MISSING or label.strip() == "None"  # Python's; none is a class of many sets
