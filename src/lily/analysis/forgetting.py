"""Quality against forgetting: which settings no other setting beats in both, and what a method reaches within a limit.

Pure functions; `benchmarks/forgetting.py` trains what they look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """An adapter as two numbers.

    Attributes:
        contestant: the method, or the method with a rule.
        quality: the task's metric; more is better.
        forgetting: increase of the loss per token on general text.
        settings: what it was trained with, for reading.
    """

    contestant: str
    quality: float
    forgetting: float
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


def frontier(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that no other one beats: as good or better in both, and better in one. By rising forgetting.

    Of equal ones the first stays.
    """
    found: list[Outcome] = []
    for one in sorted(outcomes, key=lambda o: (o.forgetting, -o.quality)):
        if not found or one.quality > found[-1].quality:
            found.append(one)
    return found


def best_within(outcomes: Sequence[Outcome], limit: float) -> Outcome | None:
    """The best that forgets no more than `limit`; of equal ones the one that forgets least. None: there is none."""
    within = [one for one in frontier(outcomes) if one.forgetting <= limit]
    return within[-1] if within else None


def by_contestant(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes of each contestant, in the order in which they first appear."""
    found: dict[str, list[Outcome]] = {}
    for one in outcomes:
        found.setdefault(one.contestant, []).append(one)
    return found


def moved(
    outcomes: Sequence[Outcome], against: Sequence[Outcome], limits: Sequence[float]
) -> dict[float, float | None]:
    """By how much a contestant's quality within each limit exceeds another's; None: one of them has nothing there."""
    found: dict[float, float | None] = {}
    for limit in limits:
        one, other = best_within(outcomes, limit), best_within(against, limit)
        found[limit] = None if one is None or other is None else one.quality - other.quality
    return found
