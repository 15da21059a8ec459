"""Adapted layers that take no part in training: their parent never calls them, or what they compute is not used.

Nothing fails then; the layer's own tensors just never get a gradient. What is known beforehand is refused or remedied
when a plan is made (`lily.plan.uncalled_layers`); this finds the rest in the first steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

from torch import Tensor, nn

from lily.layers.bank import BANK, LilyBank
from lily.layers.find import layers_of
from lily.layers.layer import LilyLayer

# An expert of a mixture may get no token for some steps; a layer that got no gradient in so many is told of.
STEPS = 20


class IdleWatch:
    """Looks for adapted layers without a gradient in the first steps, until all have had one; reports the others once.

    Args:
        announce: is given the report.
    """

    def __init__(self, announce: Callable[[str], Any]) -> None:
        self.announce = announce
        self._idle: set[str] | None = None
        self._seen = 0

    @property
    def wanted(self) -> bool:
        """Whether there is anything left to look for."""
        return self._idle is None or bool(self._idle)

    def look(self, model: nn.Module, trained: Collection[nn.Parameter], last: bool) -> None:
        """Take note of a step, after its gradient is there and before it is used.

        Args:
            model: with its adapters.
            trained: what the optimiser has. Of a layer none of whose tensors is in it nothing is known: some engines
                keep the gradients elsewhere.
            last: whether it is the last step of the training.
        """
        found, total = idle_layers(model, trained)
        self._idle = found if self._idle is None else self._idle & found
        self._seen += 1
        if self._idle and (last or self._seen >= STEPS):
            self.announce(idle_message(sorted(self._idle), total, self._seen))
            self._idle = set()


def idle_layers(model: nn.Module, trained: Collection[nn.Parameter]) -> tuple[set[str], int]:
    """The adapted layers that the last backward did not reach, and how many there are.

    A layer with a tensor of its own (router or logits) is judged by it, any other by those that it shares.
    """
    known = {id(p) for p in trained}
    idle: set[str] = set()
    total = 0
    for path, bank in model.named_modules():
        if not isinstance(bank, LilyBank):
            continue
        layers = layers_of(model.get_submodule(path.removesuffix(BANK).rstrip(".")))
        total += len(layers)
        for name, layer in layers.items():
            tensors = [t for adapter in cast("list[str]", bank.active_adapters) for t in _tensors(layer, adapter)]
            tensors = [t for t in tensors if id(t) in known and t.numel()]  # a sharded one may hold nothing here
            if tensors and all(t.grad is None for t in tensors):
                idle.add(name)
    return idle, total


def _tensors(layer: LilyLayer, adapter: str) -> list[Tensor]:
    if adapter not in layer.settings:
        return []
    own = [cast(Tensor, layer.lily_router[adapter].weight)] if adapter in layer.lily_router else []
    own += [cast(Tensor, layer.lily_logits[adapter])] if adapter in layer.lily_logits else []
    return own or list(layer.bank.pair(adapter, layer.settings[adapter].slot))


def idle_message(idle: Sequence[str], total: int, steps: int) -> str:
    """What to say of layers that got no gradient.

    Args:
        idle: their names; at least one.
        total: adapted layers in all.
        steps: that were looked at.
    """
    shown = ", ".join(idle[:3]) + (f" and {len(idle) - 3} more" if len(idle) > 3 else "")
    return (
        f"{len(idle)} of {total} adapted layers got no gradient in {steps} steps: {shown}. Their parent reads the "
        "weight without calling the layer, or what it computes is not used for the loss, so an adapter there does "
        "nothing; leave them out of the targets (experts that no token was sent to are no fault)"
    )
