"""Checks of a Lily adapter and of the output folder, for recipes of every kind."""

from __future__ import annotations

import string
from collections.abc import Iterator

from lily.recipes.spec.locations import Key
from lily.recipes.spec.methods import Lily

PLACEHOLDERS = {"name", "method", "seed"}
SHAPE = ("r", "num_A", "stride_A", "num_B")


def problems(lily: Lily, targets: object) -> Iterator[tuple[Key, str]]:
    """Every invalid combination: (path of the key, what is wrong and how to fix it).

    `targets` is false if the recipe names no target modules and no parameters.
    """
    if lily.num_A is not None and lily.stride_A is not None:
        yield ("lily", "stride_A"), "says the same as num_A; remove one of them"
    if not (targets or lily.slices or lily.parallel):
        yield ("targets",), "is empty; name modules such as [q_proj, v_proj], or write all-linear"
    if lily.shared_router and lily.routing in ("static", "uniform"):
        what = f"with routing {lily.routing} there is no router"
        yield ("lily", "shared_router"), f"{what}; remove it, or choose token, sequence or batch"
    yield from _groups(lily)


def _groups(lily: Lily) -> Iterator[tuple[Key, str]]:
    for name, group in (lily.groups or {}).items():
        at = ("lily", "groups", name)
        if group.num_A is not None and group.stride_A is not None:
            yield (*at, "stride_A"), "says the same as num_A; remove one of them"
        shape = [key for key in SHAPE if getattr(group, key) is not None]
        if lily.params is not None and shape:
            yield (
                (*at, shape[0]),
                "lily.params chooses one r, num_A and num_B for all groups; give r, num_A and num_B instead of params, "
                f"or remove {shape[0]} here",
            )
        # A rank applies to all layers whose names end in its key, in any order of the keys.
        for longer in lily.groups or {}:
            if longer.endswith(f".{name}"):
                yield at, f"fits the layers of {longer!r} too; name the others in full"


def output_problems(output: str) -> Iterator[tuple[Key, str]]:
    """Problems of `output` as a format string."""
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(output) if name is not None}
    except ValueError as error:
        yield ("output",), f"is not a name with placeholders ({error}); use {{name}}, {{method}} and {{seed}}"
        return
    if unknown := sorted(names - PLACEHOLDERS):
        yield ("output",), f"unknown placeholder {unknown[0]!r}; use {{name}}, {{method}} and {{seed}}"
