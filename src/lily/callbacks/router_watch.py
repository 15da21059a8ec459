"""Routers that no longer route: one expert takes everything, the softmax is certain of every token, experts are dead.

Such a router still trains, but what is behind it does not. What one did is judged by a pure function on the statistics
of some steps; a finding counts when it lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from lily.layers.bank import BANK, LilyBank
from lily.layers.find import watch_masks
from lily.layers.layer import LilyLayer
from lily.layers.routing_statistics import RoutingStatistics

# An expert with this share of the weight has, for all that learning is concerned, all of it.
ALL = 0.98
# A softmax whose squared weights sum to this on average gives each token to one expert, and passes no gradient.
CERTAIN = 0.98
# An expert is dead when it gets less than this part of what it would get under a uniform routing.
DEAD = 0.01
# The routing is looked at in so many steps of a training, at least in every so many-th; so many in a row are a finding.
SAMPLES, AT_LEAST, IN_A_ROW = 50, 100, 3


@dataclass(frozen=True)
class Routing:
    """What one router did in a sample.

    Attributes:
        experts: how many there are.
        expert: the one that got most.
        share: of the weight, that it got.
        certainty: sum of squared weights, mean over tokens: 1 / experts for a uniform softmax, 1 for a hard choice.
        dead: experts that got next to nothing.
    """

    experts: int
    expert: int
    share: float
    certainty: float
    dead: int

    @property
    def problem(self) -> str | None:
        """`collapsed`, `saturated`, `dead experts` or None, the gravest that applies."""
        if self.share >= ALL:
            return "collapsed"
        if self.certainty >= CERTAIN:
            return "saturated"
        return "dead experts" if self.dead else None

    def __str__(self) -> str:
        said = {
            "collapsed": f"{self.share:.1%} to expert {self.expert}",
            "saturated": f"mean certainty {self.certainty:.3f}",
            "dead experts": f"{self.dead} of {self.experts} experts dead",
        }
        return said.get(self.problem or "", "healthy")


def judged(seen: RoutingStatistics) -> Routing:
    """What a router did, from the statistics of the weights that its softmax gave each token."""
    mean = seen.mean
    experts = mean.numel()
    certainty = float(seen.square.sum() / seen.count) if seen.count.item() else 1 / experts
    dead = int((mean < DEAD / experts).sum())
    return Routing(experts, int(mean.argmax()), float(mean.max()), certainty, dead)


def collapse_message(step: int, found: Mapping[str, Routing], layers: int) -> str:
    """What to say of routers that have a problem.

    Args:
        step: when it was found.
        found: layer -> what its router does; all have a problem.
        layers: routers in all.
    """
    parts = []
    for problem, meaning in (
        ("collapsed", "give one expert nearly everything"),
        ("saturated", "choose one expert for each token with certainty, so that they no longer learn"),
        ("dead experts", "give some experts nothing"),
    ):
        names = [name for name, routing in found.items() if routing.problem == problem]
        if names:
            shown = ", ".join(f"{name} ({found[name]})" for name in names[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{len(names)} of {layers} routers {meaning}: {shown}{more}")
    return (
        f"step {step}: {'; '.join(parts)}. Lower the learning rate or scaling, or use fewer experts (num_B); "
        "routing uniform or static does without a router"
    )


@dataclass(frozen=True)
class _Watched:
    """A router that is being recorded."""

    name: str
    layer: LilyLayer
    adapter: str
    root: nn.Module


class RouterWatch:
    """Looks at an adapted model's routers in some steps, and reports once when some have a problem that lasts.

    Args:
        announce: is given the report.

    Attributes:
        state: what was found, in JSON's terms; set it to go on where an earlier process stopped.
    """

    def __init__(self, announce: Callable[[str], Any]) -> None:
        self.announce = announce
        self.state: dict[str, Any] = {}
        self._watched: list[_Watched] = []

    @staticmethod
    def wants(step: int, total: int) -> bool:
        """Whether to look at the step after `step` of `total`."""
        return step % max(2, min(AT_LEAST, total // SAMPLES)) == 0  # others may want to record the steps between

    def attach(self, model: nn.Module) -> None:
        """Have every router recorded that decides by the data, and that nobody else is recording."""
        for path, bank in model.named_modules():
            if isinstance(bank, LilyBank):
                root = model.get_submodule(path.removesuffix(BANK).rstrip("."))
                self._attach(root, cast("list[str]", bank.active_adapters))

    def _attach(self, root: nn.Module, adapters: list[str]) -> None:
        for name, layer in root.named_modules():
            for adapter in adapters if isinstance(layer, LilyLayer) else ():
                if adapter in layer.lily_router and adapter not in layer.statistics:
                    experts = layer.settings[adapter].num_B
                    layer.statistics[adapter] = RoutingStatistics.empty(experts, training_only=True, per_token=True)
                    self._watched.append(_Watched(name, layer, adapter, root))
        self._watch_masks()

    def collect(self, step: int) -> None:
        """Stop recording, and judge what was recorded in `step`."""
        seen = {w.name: w.layer.statistics.pop(w.adapter) for w in self._watched}
        self._watch_masks()
        self._watched = []
        judgements = {name: judged(statistics) for name, statistics in seen.items() if statistics.count.item()}
        if judgements:
            self.note(step, judgements)

    def _watch_masks(self) -> None:
        for root in {id(w.root): w.root for w in self._watched}.values():
            watch_masks(root)

    def note(self, step: int, seen: Mapping[str, Routing]) -> None:
        """Take note of what the routers did in a step."""
        before = self.state.get("in_a_row", {})
        in_a_row = {name: before.get(name, 0) + 1 for name, routing in seen.items() if routing.problem}
        lasting = {name: seen[name] for name, times in in_a_row.items() if times >= IN_A_ROW}
        reported = self.state.get("reported")
        if lasting and reported is None:
            reported = collapse_message(step, lasting, len(seen))
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
