"""Checks across the keys that decide a Lily adapter, which recipes of every kind have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lily.recipes.spec.places import Key
from lily.recipes.spec.schema import Lily

if TYPE_CHECKING:
    from lily.recipes.spec.dreambooth import DreamBooth
    from lily.recipes.spec.schema import Recipe

SHAPE = ("r", "num_A", "stride_A", "num_B")


def problems(recipe: Recipe | DreamBooth) -> Iterator[tuple[Key, str]]:
    """Every combination that cannot work: (path of the key, what is wrong and how to fix it)."""
    block = recipe.lily
    if block.num_A is not None and block.stride_A is not None:
        yield ("lily", "stride_A"), "says the same as num_A; give one of them"
    if not (recipe.targets or recipe.target_parameters or block.slices or block.parallel):
        yield ("targets",), "is empty; name modules such as [q_proj, v_proj], or write all-linear"
    if block.shared_router and block.routing in ("static", "uniform"):
        what = f"with routing {block.routing} there is no router"
        yield ("lily", "shared_router"), f"{what}; remove it, or choose token, sequence or batch"
    yield from _groups(block)


def _groups(block: Lily) -> Iterator[tuple[Key, str]]:
    for name, own in (block.groups or {}).items():
        at = ("lily", "groups", name)
        if own.num_A is not None and own.stride_A is not None:
            yield (*at, "stride_A"), "says the same as num_A; give one of them"
        given = [key for key in SHAPE if getattr(own, key) is not None]
        if block.params is not None and given:
            yield (
                (*at, given[0]),
                "lily.params chooses one r, num_A and num_B for all groups; give r, num_A and num_B instead of params, "
                f"or remove {given[0]} here",
            )
        # A rank belongs to all layers whose names end in its key, in whatever order the keys are.
        for longer in block.groups or {}:
            if longer.endswith(f".{name}"):
                yield at, f"fits the layers of {longer!r} too; name the others in full"
