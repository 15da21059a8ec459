"""Values of a recipe over those that it inherits, and which of those give way to a key that says the same."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from lily.recipes.spec import lily_checks
from lily.recipes.spec.data import SOURCES
from lily.recipes.spec.schema import STANDIN

SOURCE_DETAILS = ("revision", "format", "header", "delimiter", "encoding", "split", "config", "architecture")
# A key that is set -> inherited keys that say the same in another way, and give way
RIVALS: dict[str, tuple[str, ...]] = {
    "params": lily_checks.SHAPE,
    "r": ("params", "fewest"),
    "num_A": ("stride_A", "params", "fewest"),
    "stride_A": ("num_A", "params", "fewest"),
    "num_B": ("params", "fewest"),
}


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `over`, and those of `base` that it does not replace, section by section."""
    values = dict(base)
    for key, value in over.items():
        make_way(values, key, value)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = merged(values[key], value) if both else value
    return values


def make_way(section: dict[str, Any], key: str, value: Any, kept: Container[str] = ()) -> None:
    """Remove the inherited keys that a key replaces, except `kept`.

    A source replaces one of another kind and what describes it; a budget replaces the shape, also of groups, and a part
    of the shape replaces a budget.
    """
    if value is None:
        return
    kinds = (*SOURCES, STANDIN)
    if key in kinds and section.get(key) is None:
        for inherited in (*kinds, *SOURCE_DETAILS):
            section.pop(inherited, None)
    gone = {name for name in RIVALS.get(key, ()) if name not in kept}
    for inherited in gone & section.keys():
        del section[inherited]
    groups = section.get("groups")
    if key == "params" and isinstance(groups, dict):
        section["groups"] = {
            name: {k: v for k, v in group.items() if k not in gone} if isinstance(group, dict) else group
            for name, group in groups.items()
        }
