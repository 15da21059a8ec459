"""What is wrong with a recipe's values, in the words of a recipe: pydantic's findings by key, each with its fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from lily.io.words import joined
from lily.recipes.spec.base import Section
from lily.recipes.spec.locations import Key

MAX_SHOWN = 200  # characters of a wrong value
MOST = 3  # keys that are suggested
SIMILAR = 0.6  # how alike a key of another section must be
FIRST = "train"  # the section that most changes on a command line are for
OPTIONS = ("resume", "overwrite", "quiet", "verbose")  # that somebody may take for keys
MATCHED = "`lily plan MODEL --match-lora RANK` prints a shape of LoRA's size; lily.params takes it as a number"
ALIASES = {"lr": "learning_rate", "rank": "r", "lora_alpha": "alpha", "bs": "batch_size", "dropout_rate": "dropout"}

SECTION = ("model_type", "model_attributes_type", "dict_type", "dict_attributes_type", "mapping_type")
NUMBERS = {
    "int_type": "a whole number", "int_parsing": "a whole number", "int_parsing_size": "a whole number",
    "int_from_float": "a whole number", "float_type": "a number", "float_parsing": "a number",
    "finite_number": "a finite number",
}  # fmt: skip
OTHERS = {
    "bool_type": "true or false", "bool_parsing": "true or false", "string_type": "text",
    "string_sub_type": "text", "string_unicode": "text", "string_too_short": "text that is not empty",
    "list_type": "a list such as [a, b]", "tuple_type": "a list such as [a, b]", "none_required": "no value",
}  # fmt: skip
BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
WORDS = {None: "nothing", True: "true", False: "false"}
# A pattern of a key's text -> what it means
PATTERNS = {
    r"^[a-z0-9][a-z0-9._-]*$": "lower-case letters, digits, '.', '_' and '-', such as my-run",
    r"^[A-Za-z0-9][A-Za-z0-9_-]*$": "letters, digits, '_' and '-', such as part-1",
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "a package's name: letters, digits, '.', '_' and '-'",
    r"^[0-9][A-Za-z0-9.!+_-]*$": "an exact version, such as 1.2.0",
    r"^[0-9a-f]{64}$": "a SHA-256: 64 digits from 0 to f",
}


def problems(
    error: ValidationError, written: set[Key], kind: type[Section], overridden: Collection[Key] = ()
) -> Iterator[tuple[Key, str]]:
    """What pydantic found: (path of the key, what is wrong and how to fix it), one for each key.

    Args:
        error: of a recipe's values.
        written: the keys that are written, and those above them.
        kind: class of the recipe.
        overridden: the keys that the command line sets.
    """
    found: dict[Key, list[Any]] = {}
    for problem in error.errors():
        found.setdefault(_path(problem, written), []).append(problem)
    for path, several in found.items():
        inside = any(other[: len(path)] == path and len(other) > len(path) for other in found)
        expected = [problem for problem in several if _expected(problem, path, kind) is not None]
        for problem in several:
            if problem not in expected:
                yield path, _other(problem, path, kind)
        # Of the alternatives of a union, those of another form are not meant if a key inside one of them is wrong.
        if expected and not inside:
            yield path, _together(expected, path, kind, path in overridden)


def _path(problem: Any, written: set[Key]) -> Key:
    path: Key = ()
    for part in map(str, problem["loc"]):
        # pydantic adds the alternatives of a union to the location; these are not keys of the recipe.
        if (*path, part) in written:
            path = (*path, part)
    return (*path, str(problem["loc"][-1])) if problem["type"] == "missing" else path


def _other(problem: Any, path: Key, kind: type[Section]) -> str:
    if problem["type"] == "extra_forbidden":
        return f"unknown key; {near(path, kind)}"
    if problem["type"] == "missing":
        return "is required, but missing"
    if problem["type"] == "value_error":
        return str(problem["msg"]).removeprefix("Value error, ")
    return f"is not valid ({problem['msg']}), got {_short(problem.get('input'))}"


def _expected(problem: Any, path: Key, kind: type[Section]) -> str | None:
    """What was expected in the place of a value; None if the problem is not about a value's form."""
    wrong, context = problem["type"], problem.get("ctx", {})
    if wrong in SECTION:
        keys = list(_fields(path, kind))
        return "keys below it" + (f", such as {', '.join(keys[:MOST])}" if keys else "")
    if wrong in BOUNDS:
        words, name = BOUNDS[wrong]
        return f"{words} {context[name]:g}" if isinstance(context[name], float) else f"{words} {context[name]}"
    if wrong in ("literal_error", "enum"):
        return joined(re.findall(r"'([^']*)'", context["expected"]) or [str(context["expected"])], "or")
    if wrong == "string_pattern_mismatch":
        return PATTERNS.get(context["pattern"], f"text of the form {context['pattern']}")
    return NUMBERS.get(wrong) or OTHERS.get(wrong)


def _together(several: Sequence[Any], path: Key, kind: type[Section], override: bool) -> str:
    """One sentence about a value that fits none of its alternatives."""
    deepest = max(len(problem["loc"]) for problem in several)  # about an item of a list rather than the list
    several = [problem for problem in several if len(problem["loc"]) == deepest]
    value = several[0].get("input")
    expected = list(dict.fromkeys(str(_expected(problem, path, kind)) for problem in several))
    text = f"expected {' or '.join(expected)}, got {_short(value)}"
    kinds = {problem["type"] for problem in several}
    if kinds == {"string_type"} and isinstance(value, (bool, int, float)):
        text += "; put text that looks like a number or a boolean in quotes"
    if isinstance(value, str) and kinds & {*SECTION} and "path" in _fields(path, kind):
        sources = ("hub", "path") if path[-1] == "model" and not Path(value).expanduser().exists() else ("path",)
        forms = [f"{'.'.join(path)}.{key}={value}" if override else f"{{{key}: {value}}}" for key in sources]
        text += f"; write {' or '.join(forms)}"
    elif isinstance(value, str) and "list_type" in kinds:
        text += "; write [] for none" if value.lower() == "none" else f"; write [{value}]"
    choices = [name for e in several if "expected" in e.get("ctx", {}) for name in _choices(e)]
    close = difflib.get_close_matches(value, choices, n=1, cutoff=0.5) if isinstance(value, str) else []
    return f"{text}; did you mean {close[0]}?" if close else text


def _choices(problem: Any) -> list[str]:
    return re.findall(r"'([^']*)'", problem["ctx"]["expected"])


def _short(value: Any) -> str:
    text = WORDS[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


# --- keys -----------------------------------------------------------------------------------------------------------


def near(path: Key, kind: type[Section]) -> str:
    """The keys that an unknown one may mean: of its section, then of others, `train` first."""
    section, key = path[:-1], ALIASES.get(path[-1], path[-1])
    if path[-1] in OPTIONS:
        return f"of the command line, it is --{path[-1]}"
    if key == "match_lora":
        return MATCHED
    allowed = list(_fields(section, kind))
    if key in allowed:
        return f"did you mean {key}?"
    everywhere = [at for at in _everywhere(kind) if at[:-1] != section]
    if same := [at for at in everywhere if at[-1] == key]:
        return _suggested(same)
    own = difflib.get_close_matches(key, allowed, n=2, cutoff=0.5)
    alike = {at[-1]: difflib.SequenceMatcher(None, key, at[-1]).ratio() for at in everywhere}
    others = sorted((at for at in everywhere if alike[at[-1]] >= SIMILAR), key=lambda at: -alike[at[-1]])
    if own:
        best = max(difflib.SequenceMatcher(None, key, name).ratio() for name in own)
        others = [at for at in others if alike[at[-1]] > best]  # only what is closer still
    if others:
        return _suggested([at for at in others if alike[at[-1]] == alike[others[0][-1]]])
    return f"did you mean {' or '.join(own)}?" if own else f"keys of this section: {', '.join(allowed)}"


def keys_like(path: Key, kind: type[Section]) -> list[Key]:
    """The keys that are called as the end of `path`, `train` first; `path` itself, if it is one."""
    known, name = list(_everywhere(kind)), ALIASES.get(path[-1], path[-1])
    return [path] if path in known else _ordered([at for at in known if at[-1] == name])


def _suggested(keys: Sequence[Key]) -> str:
    return f"did you mean {' or '.join('.'.join(at) for at in _ordered(keys))}?"


def _ordered(keys: Sequence[Key]) -> list[Key]:
    return sorted(keys, key=lambda at: (at[0] != FIRST, len(at)))[:MOST]


def _everywhere(kind: type[Section], at: Key = ()) -> Iterator[Key]:
    """Every key of a recipe, without those below names that a recipe chooses."""
    for name, info in kind.model_fields.items():
        yield (*at, name)
        inner, named = _section(info.annotation)
        if inner is not None and not named:
            yield from _everywhere(inner, (*at, name))


def _fields(path: Key, section: type[Section]) -> Mapping[str, FieldInfo]:
    parts = iter(path)
    for part in parts:
        info = section.model_fields.get(part)
        inner, named = (None, False) if info is None else _section(info.annotation)
        if inner is None or (named and next(parts, None) is None):
            return {}
        section = inner
    return section.model_fields


def _section(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section type of a key, and whether the key maps names to such sections."""
    for candidate in (annotation, *get_args(annotation)):
        named = get_origin(candidate) is dict
        kind = get_args(candidate)[1] if named else candidate
        if isinstance(kind, type) and get_origin(kind) is None and issubclass(kind, Section):
            return kind, named
    return None, False
