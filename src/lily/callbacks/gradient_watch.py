"""Adapted layers without a gradient: their parent never calls them, or the loss does not use their output.

No error is raised then; the layer's tensors just never receive a gradient. Known cases are refused or fixed when a plan
is made (`lily.plan.uncalled_layers`); this finds the others in the first steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

from torch import Tensor, nn

from lily.io.words import some
from lily.layers.bank import banks_in
from lily.layers.find import layers_of
from lily.layers.layer import LilyLayer

# An expert may receive no token for a few steps, so warn only after this many steps without a gradient.
STEPS = 20


class IdleWatch:
    """Reports, once, the adapted layers that received no gradient in the first steps.

    Args:
        announce: called with the report.
    """

    def __init__(self, announce: Callable[[str], Any]) -> None:
        self.announce = announce
        self._idle: set[str] | None = None
        self._seen = 0

    @property
    def wanted(self) -> bool:
        """Whether some layer may still be without a gradient."""
        return self._idle is None or bool(self._idle)

    def look(self, model: nn.Module, trained: Collection[nn.Parameter], last: bool) -> None:
        """Inspect the gradients of a step, after backward and before the optimizer's step.

        Args:
            model: with its adapters.
            trained: the optimizer's parameters. Layers with no tensor among them are skipped: some engines keep the
                gradients elsewhere.
            last: whether it is the last step of the training.
        """
        idle, total = idle_layers(model, trained)
        self._idle = idle if self._idle is None else self._idle & idle
        self._seen += 1
        if self._idle and (last or self._seen >= STEPS):
            self.announce(idle_message(sorted(self._idle), total, self._seen))
            self._idle = set()


def idle_layers(model: nn.Module, trained: Collection[nn.Parameter]) -> tuple[set[str], int]:
    """The adapted layers that the last backward did not reach, and the number of all adapted layers.

    A layer with a router or logits is judged by these, any other by the tensors that it shares.
    """
    trained_ids = {id(p) for p in trained}
    idle: set[str] = set()
    total = 0
    for root, bank in banks_in(model):
        layers = layers_of(root)
        total += len(layers)
        for name, layer in layers.items():
            tensors = [t for adapter in cast("list[str]", bank.active_adapters) for t in _tensors(layer, adapter)]
            tensors = [t for t in tensors if id(t) in trained_ids and t.numel()]  # a sharded one may hold nothing here
            if tensors and all(t.grad is None for t in tensors):
                idle.add(name)
    return idle, total


def _tensors(layer: LilyLayer, adapter: str) -> list[Tensor]:
    if adapter not in layer.settings:
        return []
    own = [cast(Tensor, layer.lily_router[adapter].weight)] if adapter in layer.lily_router else []
    own += [layer.logits_of(adapter)] if adapter in layer.lily_logits else []
    return own or list(layer.bank.pair(adapter, layer.settings[adapter].slot))


def idle_message(idle: Sequence[str], total: int, steps: int) -> str:
    """The warning about layers that received no gradient.

    Args:
        idle: their names; at least one.
        total: number of adapted layers.
        steps: number of steps inspected.
    """
    return (
        f"{len(idle)} of {total} adapted layers got no gradient in {steps} steps: {some(idle)}. Their parent reads the "
        "weight without calling the layer, or the loss does not use their output, so an adapter there does nothing; "
        "remove them from the targets (experts that received no token are not a fault)"
    )
