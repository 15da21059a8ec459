"""Which values of a recipe may be misread: YAML 1.1 has numbers, booleans and dates that hardly anyone means.

`epochs: yes` would be 1.0, `r: 010` 8, `epochs: 1:30` 90, `revision: 2024-01-01` a date. Such a scalar stays text here,
as in YAML 1.2: right where text is meant (`classes: [yes, no]`), read as a boolean where a boolean is meant, and
refused where a number is.
"""

from __future__ import annotations

import math
import re
import types
from typing import Any, Union, get_args, get_origin

# Tags that YAML 1.1 gives to unquoted text, and the forms of them that YAML 1.2 has too
PLAIN = {
    "tag:yaml.org,2002:bool": r"true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9]*)",
    "tag:yaml.org,2002:float": r"[-+]?(0|[1-9][0-9]*)?\.[0-9]*([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "tag:yaml.org,2002:timestamp": r"(?!)",
}
DECIMAL = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
# What Python or a YAML reader would take for a number, and perhaps not the one that was meant
LIKE_NUMBER = re.compile(r"[-+]?(0[xob][0-9a-fA-F_]+|[0-9][0-9_]*(:[0-9_]+)*(\.[0-9_]*)?([eE][-+]?[0-9]+)?)")
WORDS = ("yes", "no", "on", "off", "y", "n", "true", "false")
SURROGATE = re.compile("[\ud800-\udfff]")
# White space, and characters that are not shown at all: zero-width ones, byte order marks, soft hyphens
BLANK = re.compile("[\\s\u00ad\u180e\u200b-\u200f\u2060-\u2064\ufeff]*")


def is_blank(text: str) -> bool:
    """Whether a text shows nothing."""
    return BLANK.fullmatch(text) is not None


def is_empty(value: Any) -> bool:
    """Whether a cell of a table shows nothing; pandas writes a missing text or class beside numbers as NaN."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and is_blank(value))
    )


def is_text(tag: str, text: str) -> bool:
    """Whether unquoted text stays text, although YAML 1.1 reads it with this tag."""
    return tag in PLAIN and re.fullmatch(PLAIN[tag], text) is None


def is_decimal(text: str) -> bool:
    """Whether text is a number that everyone reads alike: no leading zero, no underscore, no other base."""
    return DECIMAL.fullmatch(text.strip()) is not None


def misread(value: Any, annotation: Any) -> str | None:
    """What is wrong with a value for a key of this type; None if pydantic may read it."""
    kinds = set(_kinds(annotation))
    if kinds & {"section", Any}:  # a section's own keys are checked one by one
        return None
    for inner in _leaves(value):
        number = bool(kinds & {int, float})
        if isinstance(inner, bool) and bool not in kinds and number:
            return f"expected a number, got {str(inner).lower()}"
        if isinstance(inner, str) and number and (wrong := _number(inner, str in kinds)):
            return wrong
    return None


def untyped(value: Any) -> str | None:
    """What is wrong with an option that another library reads: text that may be meant as a boolean or a number."""
    for inner in _leaves(value):
        if isinstance(inner, str) and inner.lower() in WORDS:
            return f"{inner!r} is text here; write true or false"
        if isinstance(inner, str) and is_decimal(inner) and "e" in inner.lower():
            return f"{inner!r} is text in YAML, which wants a dot and a sign: {float(inner):e}"
        if isinstance(inner, str) and (wrong := _number(inner, False)):
            return wrong
    return None


def delimiter(text: str) -> str:
    r"""The character that separates columns; a tab may be written as `\t` or tab."""
    character = "\t" if text in ("\\t", "tab") else text
    if len(character) != 1 or character in '"\r\n':
        raise ValueError(f"expected one character, such as ';', or tab, got {text!r}")
    return character


def encoding(name: str) -> str:
    """The name of an encoding of text that Python knows."""
    try:
        "a".encode(name).decode(name)
    except (LookupError, UnicodeError, ValueError):
        raise ValueError(f"{name!r} is no encoding of text; cp1252, utf-16 and shift_jis are some") from None
    return name


def _number(text: str, budgets: bool) -> str | None:
    """`budgets`: the key also takes text such as 1_000_000."""
    plain = text.strip()
    if not LIKE_NUMBER.fullmatch(plain) or is_decimal(plain):
        return None
    if budgets and not re.match(r"[-+]?0[0-9_]", plain):
        return None
    digits = plain.replace("_", "").lstrip("0") or "0"
    hint = f", such as {digits}" if is_decimal(digits) else ""
    return f"{text!r} can be read as different numbers; write a plain decimal number{hint}"


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in _leaves(inner)]
    return [leaf for inner in value for leaf in _leaves(inner)] if isinstance(value, (list, tuple)) else [value]


def _kinds(annotation: Any) -> list[Any]:
    """The plain types in an annotation; "section" for a class of keys."""
    origin = get_origin(annotation)
    if origin is dict:
        return _kinds(get_args(annotation)[1])
    if origin in (Union, types.UnionType, list, tuple):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    if get_args(annotation) and hasattr(annotation, "__metadata__"):
        return _kinds(get_args(annotation)[0])
    return ["section"] if hasattr(annotation, "model_fields") else [annotation]
