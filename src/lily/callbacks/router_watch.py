"""Routers that no longer route: one expert gets everything, the softmax is certain of every token, experts are dead.

The experts behind such a router stop learning. A pure function diagnoses the routing statistics of sampled steps; a
problem is reported when it persists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

from torch import nn

from lily.io.words import some
from lily.layers.bank import banks_in
from lily.layers.find import layers_of, watch_masks
from lily.layers.layer import LilyLayer
from lily.layers.routing_statistics import DEAD_EXPERT, RoutingStatistics

# Degenerate: one expert has at least this share of the weight, so the others learn nothing.
ALL = 0.98
# Saturated: the squared weights sum to at least this on average, so the softmax passes no gradient.
CERTAIN = 0.98
# Steps sampled per training.
SAMPLES = 50
# Largest number of steps between two samples.
AT_LEAST = 100
# Consecutive bad samples before a warning.
IN_A_ROW = 3


@dataclass(frozen=True)
class Routing:
    """What one router did in a sample.

    Attributes:
        experts: number of experts.
        expert: the one with the largest mean weight.
        share: that weight.
        certainty: sum of squared weights, mean over tokens: 1 / experts for a uniform softmax, 1 for a hard choice.
        dead: number of dead experts, see `routing_statistics.DEAD_EXPERT`.
    """

    experts: int
    expert: int
    share: float
    certainty: float
    dead: int

    @property
    def problem(self) -> str | None:
        """`degenerate`, `saturated`, `dead experts` or None: the most severe that applies."""
        if self.share >= ALL:
            return "degenerate"
        if self.certainty >= CERTAIN:
            return "saturated"
        return "dead experts" if self.dead else None

    def __str__(self) -> str:
        details = {
            "degenerate": f"{self.share:.1%} to expert {self.expert}",
            "saturated": f"mean certainty {self.certainty:.3f}",
            "dead experts": f"{self.dead} of {self.experts} experts dead",
        }
        return details.get(self.problem or "", "healthy")


def diagnose(seen: RoutingStatistics) -> Routing:
    """Diagnose a router from the statistics of its softmax weights per token."""
    mean = seen.mean
    experts = mean.numel()
    certainty = float(seen.square.sum() / seen.count) if seen.count.item() else 1 / experts
    dead = int((mean < DEAD_EXPERT / experts).sum())
    return Routing(experts, int(mean.argmax()), float(mean.max()), certainty, dead)


def problem_message(step: int, problems: Mapping[str, Routing], layers: int) -> str:
    """The warning about routers that have a problem.

    Args:
        step: the step of the newest sample.
        problems: layer -> its router's diagnosis; all have a problem.
        layers: number of routers.
    """
    parts = []
    for problem, meaning in (
        ("degenerate", "give one expert nearly everything"),
        ("saturated", "choose one expert for each token with certainty, so that they no longer learn"),
        ("dead experts", "give some experts nothing"),
    ):
        names = [name for name, routing in problems.items() if routing.problem == problem]
        if names:
            shown = some(f"{name} ({problems[name]})" for name in names)
            parts.append(f"{len(names)} of {layers} routers {meaning}: {shown}")
    return (
        f"step {step}: {'; '.join(parts)}. Lower the learning rate or scaling, or use fewer experts (num_B); "
        "routing uniform or static needs no router"
    )


@dataclass(frozen=True)
class _Watched:
    """A router that is being recorded."""

    name: str
    layer: LilyLayer
    adapter: str
    root: nn.Module


class RouterWatch:
    """Samples an adapted model's routers in some steps, and reports once when a problem persists.

    Args:
        announce: called with the report.

    Attributes:
        state: the last sample's result as JSON values; set it to continue a training of an earlier process.
    """

    def __init__(self, announce: Callable[[str], Any]) -> None:
        self.announce = announce
        self.state: dict[str, Any] = {}
        self._watched: list[_Watched] = []

    @staticmethod
    def wants(step: int, total: int) -> bool:
        """Whether to sample the step after `step` of `total`."""
        return step % max(2, min(AT_LEAST, total // SAMPLES)) == 0  # 2 or more: others may record the steps between

    def attach(self, model: nn.Module) -> None:
        """Start recording every data-dependent router that is not being recorded already."""
        for root, bank in banks_in(model):
            for (name, layer), adapter in product(layers_of(root).items(), cast("list[str]", bank.active_adapters)):
                if adapter in layer.lily_router and adapter not in layer.statistics:
                    experts = layer.settings[adapter].num_B
                    layer.statistics[adapter] = RoutingStatistics.empty(experts, training_only=True, per_token=True)
                    self._watched.append(_Watched(name, layer, adapter, root))
        self._watch_masks()

    def collect(self, step: int) -> None:
        """Stop recording, and diagnose what was recorded in `step`."""
        seen = {w.name: w.layer.statistics.pop(w.adapter) for w in self._watched}
        self._watch_masks()
        self._watched = []
        diagnoses = {name: diagnose(statistics) for name, statistics in seen.items() if statistics.count.item()}
        if diagnoses:
            self.note(step, diagnoses)

    def _watch_masks(self) -> None:
        for root in {id(w.root): w.root for w in self._watched}.values():
            watch_masks(root)

    def note(self, step: int, seen: Mapping[str, Routing]) -> None:
        """Update `state` with the diagnoses of a step; report problems that persist."""
        before = self.state.get("in_a_row", {})
        in_a_row = {name: before.get(name, 0) + 1 for name, routing in seen.items() if routing.problem}
        lasting = {name: seen[name] for name, times in in_a_row.items() if times >= IN_A_ROW}
        reported = self.state.get("reported")
        if lasting and reported is None:
            reported = problem_message(step, lasting, len(seen))
            self.announce(reported)
        self.state = {
            "step": step,
            "routers": len(seen),
            "largest_share": max(r.share for r in seen.values()),
            "certainty": sum(r.certainty for r in seen.values()) / len(seen),
            "problems": {name: str(routing) for name, routing in lasting.items()},
            "reported": reported,
            "in_a_row": in_a_row,
        }
