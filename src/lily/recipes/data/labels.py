"""Labels that differ only in how they are written, such as `pos` and `Pos `: surely one class."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping

# Marks above and below a line have a meaning of their own: m² is not m2.
MEANINGFUL = ("<super>", "<sub>", "<fraction>")
BOOLEANS = {"true": "1", "false": "0"}
MISSING = ("nan", "null", "n/a", "na", "<na>", "#n/a")


def alike(label: str) -> str:
    """The form that labels share if they differ in spaces, case, invisible characters, Unicode or number notation.

    >>> alike(" ＰＯＳ") == alike("pos\u200b"), alike("1.0") == alike("True"), alike("m²") == alike("m2")
    (True, True, False)
    """
    shown = (
        c for c in unicodedata.normalize("NFC", label) if unicodedata.category(c) not in ("Cf", "Cc") or c.isspace()
    )
    folded = "".join(_folded(c) for c in shown)
    text = " ".join(unicodedata.normalize("NFC", folded.casefold()).split())
    whole = re.fullmatch(r"([+-]?[0-9]+)\.0*", text)
    return BOOLEANS.get(text, whole[1] if whole else text)


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


def families(labels: Iterable[str]) -> list[list[str]]:
    """The labels that are alike, each family with the most frequent one first."""
    found: dict[str, list[str]] = {}
    for label, _ in sorted(Counter(labels).items(), key=lambda item: (-item[1], len(item[0]), item[0])):
        found.setdefault(alike(label), []).append(label)
    return [family for family in found.values() if len(family) > 1]


def named(family: Iterable[str], counts: Mapping[str, int]) -> str:
    """Labels with their numbers of rows; with escapes where two would look the same."""
    shown = [(label, repr(label) if unicodedata.is_normalized("NFKC", label) else ascii(label)) for label in family]
    parts = [f"{text} ({counts[label]} {'row' if counts[label] == 1 else 'rows'})" for label, text in shown]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def looks_missing(label: str) -> bool:
    """Whether a class has a name that programs write for a missing value."""
    return label.strip().lower() in MISSING
