"""Several recipes in one file: `variants` has the keys in which they differ, and FILE:NAME selects one.

Works on the values of a file, before they are validated as a recipe.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from lily.errors import LilyError
from lily.recipes.spec.locations import Key, KeyLocations

KEY = "variants"
PLACEHOLDER = "{variant}"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")  # part of the recipe's name and of its strings

Merge = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]


def names_of(values: Mapping[str, Any], locations: Mapping[Key, str]) -> list[str]:
    """The variants of a file, in its order; none if it is a single recipe.

    Raises:
        LilyError: if `variants` does not map names to keys.
    """
    section = values.get(KEY)
    if section is None:
        return []

    def wrong(at: Key, text: str) -> LilyError:
        return LilyError(f"{KeyLocations(locations).of(at) or 'recipe'}: {'.'.join(at)}: {text}")

    if not isinstance(section, dict) or not section:
        raise wrong((KEY,), f"expected names with the keys in which each differs, got {type(section).__name__}")
    for name, own in section.items():
        at = (KEY, name)
        if not NAME.fullmatch(name):
            raise wrong(at, "a variant's name must consist of lowercase letters, digits, '.', '_' and '-', at most 64")
        if own is not None and not isinstance(own, dict):
            raise wrong(at, f"expected the keys in which it differs, got {type(own).__name__}")
        for key in ("extends", KEY):
            if key in (own or {}):
                raise wrong((*at, key), "is a key of the file, not of one of its variants; move it to the top")
    return list(section)


def chosen(
    values: Mapping[str, Any], locations: Mapping[Key, str], variant: str | None, file: str, merge: Merge
) -> tuple[dict[str, Any], dict[Key, str]]:
    """The values of one variant, and the locations of its keys.

    Args:
        values: of the file.
        locations: of its keys.
        variant: None for a file that is a single recipe.
        file: name for messages, without the variant.
        merge: merges values over others.

    Raises:
        LilyError: if there is no such variant, or none is named; lists them.
    """
    names = names_of(values, locations)
    shared = {key: value for key, value in values.items() if key != KEY}
    if not names:
        if variant is not None:
            raise LilyError(f"{file} has no variants, so there is no {file}:{variant}; remove :{variant}")
        return shared, dict(locations)
    if variant not in names:
        near = difflib.get_close_matches(variant or "", names, n=3)
        wrong = f"has no variant {variant!r}" if variant else f"holds {len(names)} recipes"
        hint = f"did you mean {' or '.join(f'{file}:{name}' for name in near)}? There are" if near else "name one of"
        raise LilyError(f"{file} {wrong}; {hint} {file}:NAME with NAME {', '.join(names)}")
    own = values[KEY][variant] or {}
    merged = merge(shared, own)
    if "name" not in own and isinstance(merged.get("name"), str) and PLACEHOLDER not in merged["name"]:
        merged["name"] = f"{merged['name']}-{variant}"
    here = {at[2:]: location for at, location in locations.items() if at[:2] == (KEY, variant) and len(at) > 2}
    return _filled(merged, variant), {**{at: location for at, location in locations.items() if at[0] != KEY}, **here}


def _filled(value: Any, variant: str) -> Any:
    if isinstance(value, str):
        return value.replace(PLACEHOLDER, variant)
    if isinstance(value, dict):
        return {key: _filled(inner, variant) for key, inner in value.items()}
    return [_filled(inner, variant) for inner in value] if isinstance(value, list) else value
