"""Quality against forgetting: the Pareto front of settings, and the best quality within a limit of forgetting.

Pure functions; `benchmarks/forgetting.py` runs the trainings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """Quality and forgetting of one trained adapter.

    Attributes:
        contestant: the method, or the method with a rule.
        quality: the task's metric; higher is better.
        forgetting: increase of the loss per token on general text.
        settings: settings of its training, for information.
    """

    contestant: str
    quality: float
    forgetting: float
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def frontier(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The Pareto front: outcomes that no other one dominates, by increasing forgetting; of equal ones the first."""
    front: list[Outcome] = []
    for one in sorted(outcomes, key=lambda o: (o.forgetting, -o.quality)):
        if not front or one.quality > front[-1].quality:
            front.append(one)
    return front


def best_within(outcomes: Sequence[Outcome], limit: float) -> Outcome | None:
    """The best outcome with at most `limit` forgetting; of equal ones that with the least. None: there is none."""
    within = [one for one in frontier(outcomes) if one.forgetting <= limit]
    return within[-1] if within else None


def by_contestant(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes of each contestant, in the order in which they first appear."""
    names = dict.fromkeys(one.contestant for one in outcomes)
    return {name: [one for one in outcomes if one.contestant == name] for name in names}


def moved(
    outcomes: Sequence[Outcome], against: Sequence[Outcome], limits: Sequence[float]
) -> dict[float, float | None]:
    """Limit -> difference of the best quality within it from that of `against`; None: one has no outcome within it."""
    pairs = {limit: (best_within(outcomes, limit), best_within(against, limit)) for limit in limits}
    return {limit: one.quality - other.quality if one and other else None for limit, (one, other) in pairs.items()}
