"""Learning rate and scale: which settings are near the best, and whether only their product matters.

Pure functions; `benchmarks/scaling.py` runs the trainings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Tried:
    """A setting and its quality.

    Attributes:
        contestant: the method.
        rate: learning rate.
        scale: factor of the update: Lily's scaling, LoRA's alpha over its rank.
        quality: the task's metric, mean over seeds; higher is better.
        seeds: number of seeds.
    """

    contestant: str
    rate: float
    scale: float
    quality: float
    seeds: int = 1

    @property
    def product(self) -> float:
        """Learning rate times scale, to which the first updates by Adam are proportional, since B starts at zero.

        Rounded to three digits, so that products can be compared.
        """
        return float(f"{self.rate * self.scale:.3g}")

    def times(self, factor: float) -> Tried:
        """The same setting with its quality in another unit."""
        return replace(self, quality=factor * self.quality)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def near(tried: Sequence[Tried], tolerance: float) -> list[Tried]:
    """The settings that are within `tolerance` of the best."""
    best = max((t.quality for t in tried), default=0.0)
    return [t for t in tried if t.quality >= best - tolerance]


def by_product(tried: Sequence[Tried]) -> dict[float, Tried]:
    """Learning rate times scale -> its best setting; of equal ones the first. By increasing product."""
    best: dict[float, Tried] = {}
    for one in sorted(tried, key=lambda t: t.product):
        if one.product not in best or one.quality > best[one.product].quality:
            best[one.product] = one
    return best
