"""One file, many recipes: `variants` holds what differs from one to another, and FILE:NAME means one of them.

Works on what was read from files, before it is known to be a recipe.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from lily.errors import LilyError
from lily.recipes.spec.places import Key, Places

KEY = "variants"
PLACEHOLDER = "{variant}"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")  # it ends the recipe's name, and stands in its strings

Merge = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]


def names_of(values: Mapping[str, Any], places: Mapping[Key, str]) -> list[str]:
    """The variants of a file, in its order; none where it is one recipe.

    Args:
        values: of the file.
        places: where its keys were written.

    Raises:
        LilyError: if they are no names with keys of their own.
    """
    found = values.get(KEY)
    if found is None:
        return []

    def wrong(at: Key, said: str) -> LilyError:
        return LilyError(f"{Places(places).of(at) or 'recipe'}: {'.'.join(at)}: {said}")

    if not isinstance(found, dict) or not found:
        raise wrong((KEY,), f"expected names with the keys in which each differs, got {type(found).__name__}")
    for name, own in found.items():
        at = (KEY, name)
        if not NAME.fullmatch(name):
            raise wrong(at, "a variant's name has small letters, digits, '.', '_' and '-', at most 64")
        if own is not None and not isinstance(own, dict):
            raise wrong(at, f"expected the keys in which it differs, got {type(own).__name__}")
        for key in ("extends", KEY):
            if key in (own or {}):
                raise wrong((*at, key), "belongs to the file, not to one of its variants")
    return list(found)


def chosen(
    values: Mapping[str, Any], places: Mapping[Key, str], variant: str | None, file: str, merge: Merge
) -> tuple[dict[str, Any], dict[Key, str]]:
    """The values of one variant, and where they were written.

    Args:
        values: of the file.
        places: where its keys were written.
        variant: its name; None: of a file that is one recipe.
        file: as the user named it, without the variant.
        merge: puts values over others.

    Raises:
        LilyError: if there is no such variant, or one has to be named; says which there are.
    """
    known = names_of(values, places)
    shared = {key: value for key, value in values.items() if key != KEY}
    if not known:
        if variant is not None:
            raise LilyError(f"{file} has no variants, so there is no {file}:{variant}; leave :{variant} away")
        return shared, dict(places)
    if variant not in known:
        near = difflib.get_close_matches(variant or "", known, n=3)
        wrong = f"has no variant {variant!r}" if variant else f"holds {len(known)} recipes"
        asked = f"did you mean {' or '.join(f'{file}:{name}' for name in near)}? There are" if near else "name one of"
        raise LilyError(f"{file} {wrong}; {asked} {file}:NAME with NAME {', '.join(known)}")
    own = values[KEY][variant] or {}
    merged = merge(shared, own)
    if "name" not in own and isinstance(merged.get("name"), str) and PLACEHOLDER not in merged["name"]:
        merged["name"] = f"{merged['name']}-{variant}"
    here = {at[2:]: place for at, place in places.items() if at[:2] == (KEY, variant) and len(at) > 2}
    return _filled(merged, variant), {**{at: place for at, place in places.items() if at[0] != KEY}, **here}


def _filled(value: Any, variant: str) -> Any:
    if isinstance(value, str):
        return value.replace(PLACEHOLDER, variant)
    if isinstance(value, dict):
        return {key: _filled(inner, variant) for key, inner in value.items()}
    return [_filled(inner, variant) for inner in value] if isinstance(value, list) else value
