"""Granularity: all shapes within one budget, from few matrices of large rank to many of small rank.

Only arithmetic, as in `lily.budget`, which chooses one of these shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from lily.errors import LilyError
from lily.plan.budget import WELL_USED, choose, parse_count, rank_unit
from lily.plan.config import LilyConfig
from lily.plan.sharing_plan import build_plan
from lily.plan.specs import ModuleSpec


@dataclass(frozen=True)
class Point:
    """One shape within a budget.

    Attributes:
        r: the largest rank that fits.
        num_A: A per group.
        num_B: experts per group.
        parameters: number of trainable parameters.
        share: share of the budget that they use.
        union: largest rank that the updates of all tokens can span together in any layer, at most num_B * r.
    """

    r: int
    num_A: int
    num_B: int
    parameters: int
    share: float
    union: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Quality:
    """A shape, as in `Point`, and its measured quality.

    Attributes:
        values: values of the metric, one per seed.
    """

    r: int
    num_A: int
    num_B: int
    values: tuple[float, ...]


def frontier(
    modules: Sequence[ModuleSpec],
    parameters: int | str,
    *,
    num_A: Iterable[int] | None = None,
    num_B: Iterable[int] | None = None,
    routing: str = "token",
    targets: object = None,
    least: float = WELL_USED,
    shared_router: bool = False,
    gain: bool = False,
    own_r: int = 0,
) -> tuple[Point, ...]:
    """All shapes of nearly equal size: the largest rank that fits for each num_A and num_B.

    Args:
        modules: the layers to adapt.
        parameters: the budget, such as `1.2M`; no point exceeds it.
        num_A: values of num_A; default: 1 to the depth, without those that give the same sharing.
        num_B: values of num_B; default: 1 to the depth.
        routing: the adapter's routing, which decides the size of the routers.
        targets: the adapter's `target_modules`; see `lily.plan.build_plan`.
        least: smallest share of the budget that a point may use. A smaller share means that the layers' sizes limit
            the rank, which would make comparisons unfair.
        shared_router: whether all layers of a group have one router.
        gain: whether each layer has a gain (r,).
        own_r: rank of each layer's own A and B.

    Returns:
        Points by decreasing rank, then by num_A. Of several num_A with the same sharing, the smallest.

    Raises:
        LilyError: if no shape fits.
    """
    budget, chosen = parse_count(parameters), "all-linear" if targets is None else targets
    rest: dict[str, Any] = {"routing": routing, "targets": targets, "shared_router": shared_router}
    depth = max(
        len(g.members) for g in build_plan(modules, LilyConfig(r=rank_unit(modules), target_modules=chosen)).groups
    )
    widest = max(m.out_features for m in modules)
    points: dict[tuple[tuple[int, ...], int], Point] = {}
    refused: LilyError | None = None
    for experts, count in product(*(tuple(values or ()) or range(1, depth + 1) for values in (num_B, num_A))):
        shape: dict[str, Any] = {"num_A": count, "num_B": experts}
        try:
            choice = choose(modules, parameters=budget, gain=gain, own_r=own_r, **rest, **shape)
        except LilyError as error:
            refused = error
            continue
        plan = build_plan(modules, LilyConfig(r=choice.r, target_modules=chosen, **shape))
        share = choice.parameters / budget
        if share >= least:
            point = Point(choice.r, count, experts, choice.parameters, share, min(widest, experts * choice.r + own_r))
            points.setdefault((tuple(len(g.blocks) for g in plan.groups), experts), point)
    if not points:
        raise refused or LilyError(
            f"no shape uses {least:.0%} of {budget:,} parameters, because the layers' sizes limit the rank; "
            "give a smaller budget, or a smaller `least`"
        )
    return tuple(sorted(points.values(), key=lambda p: (-p.r, p.num_A, p.num_B)))
