"""Learning rate and scale together: how many settings do, and whether their product alone decides.

Pure functions; `benchmarks/scaling.py` trains what they look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Tried:
    """A setting and what came of it.

    Attributes:
        contestant: the method.
        rate: learning rate.
        scale: what multiplies the update: Lily's scaling, LoRA's alpha over its rank.
        quality: the task's metric, mean over seeds; more is better.
        seeds: how many.
    """

    contestant: str
    rate: float
    scale: float
    quality: float
    seeds: int = 1

    @property
    def product(self) -> float:
        """Learning rate times scale: B begins at zero, so this is what Adam's first steps of the update are
        proportional to. To three digits, so that equal ones are equal.
        """
        return float(f"{self.rate * self.scale:.3g}")

    def times(self, factor: float) -> Tried:
        """In another unit."""
        return replace(self, quality=factor * self.quality)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


def near(tried: Sequence[Tried], tolerance: float) -> list[Tried]:
    """The settings that are within `tolerance` of the best."""
    best = max((t.quality for t in tried), default=0.0)
    return [t for t in tried if t.quality >= best - tolerance]


def by_product(tried: Sequence[Tried]) -> dict[float, Tried]:
    """Learning rate times scale -> the best setting that has it; of equal ones the first. By rising product."""
    found: dict[float, Tried] = {}
    for one in sorted(tried, key=lambda t: t.product):
        if one.product not in found or one.quality > found[one.product].quality:
            found[one.product] = one
    return found


def spread_at_product(tried: Sequence[Tried]) -> dict[float, float]:
    """Learning rate times scale -> best less worst of the settings that have it; products met once are left out."""
    met: dict[float, list[float]] = {}
    for one in tried:
        met.setdefault(one.product, []).append(one.quality)
    return {p: max(own) - min(own) for p, own in sorted(met.items()) if len(own) > 1}
