"""What each layer has for itself beside a router: a fixed distinction, a gain, a small pair of A and B.

`lily.functional` has the arithmetic. A distinction has no tensor in files: it follows from the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lily import functional
from lily.layers.bank import first_values
from lily.layers.devices import onload
from lily.layers.router import LayerTensor
from lily.layers.traced import exporting
from lily.plan.config import LilyConfig
from lily.plan.sharing_plan import Group, Slot
from lily.plan.specs import EXPERTS


class Distinction:
    """A layer's permutation and signs of the rank coordinates, on the devices that have needed them.

    Neither a parameter nor a buffer: no engine has to move, shard or save it.

    Attributes:
        rows: (r,), which row of A each rank coordinate takes; None: its own. For stacked experts (experts * r,).
        signs: (r,), 1 or -1; None: all 1.
    """

    def __init__(self, rows: list[int] | None, signs: list[int] | None) -> None:
        with torch.device("cpu"):
            self.rows = None if rows is None else torch.tensor(rows)
            self.signs = None if signs is None else torch.tensor(signs, dtype=torch.float32)
        self._copies = {torch.device("cpu"): (self.rows, self.signs)}

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """The rows and signs on a device."""
        if device in self._copies:
            return self._copies[device]
        copies = (
            None if self.rows is None else self.rows.to(device),
            None if self.signs is None else self.signs.to(device),
        )
        if not exporting():  # those of a trace have no values
            self._copies[device] = copies
        return copies

    def arrangement(self, device: torch.device, gain: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The rows (r,) and the factor (r,), signs times gain, by which a layer's A is made of the shared one."""
        rows, signs = self.on(device)
        return rows, functional.row_factor(signs, gain)

    def apply(self, A: Tensor, gain: Tensor | None) -> Tensor:
        """The rows of A as the layer sees them: see `functional.layer_A`."""
        return functional.layer_A(A, *self.on(A.device), gain)


def distinction_of(group: Group, slot: Slot, config: LilyConfig) -> Distinction:
    """The distinction of a layer, from its place in its group; for stacked experts, from the place of each."""
    kind = config.options_of(group.name).distinct
    if group.kind != EXPERTS:
        return Distinction(*functional.distinction(kind, group.r, slot.place, config.distinct_seed))
    rows: list[int] = []
    signs: list[int] = []
    for place in range(len(group.members)):
        order, flips = functional.distinction(kind, group.r, place, config.distinct_seed)
        first = place // group.stride * group.r
        rows += [first + row for row in order or range(group.r)]
        signs += flips or [1] * group.r
    return Distinction(rows, None if all(sign == 1 for sign in signs) else signs)


def first_gain(group: Group, slot: Slot, config: LilyConfig) -> Tensor:
    """Where the gain of a layer starts: (r,), or (experts * r,) for stacked experts."""
    start, seed = config.options_of(group.name).gain, config.distinct_seed
    places = range(len(group.members)) if group.kind == EXPERTS else [slot.place]
    return torch.tensor([g for place in places for g in functional.first_gain(start, group.r, place, seed)])


def members_of(group: Group) -> int:
    """How many matrices one adapted layer of a group has: 1, or those that a parameter stacks."""
    return len(group.members) if group.kind == EXPERTS else 1


def own_shapes(group: Group) -> Mapping[str, tuple[int, ...]]:
    """Shapes of what one layer of a group has for itself beside a router, by the name of the part in files."""
    members = members_of(group)
    shapes: dict[str, tuple[int, ...]] = {}
    if group.gain:
        shapes["gain"] = (members * group.r,)
    if group.own_r:
        shapes["own_A"] = (members * group.own_r, group.in_features)
        shapes["own_B"] = (members * group.own_r // group.conv_groups, group.out_features)
    return shapes


class OwnMixin(nn.Module):
    """The part of an adapted layer that holds what it has for itself; see `lily.layers.layer.LilyLayer`."""

    if TYPE_CHECKING:
        settings: Any

        @property
        def conv_groups(self) -> int:
            """See `LilyLayer`."""

    def _add_own(self, adapter: str, group: Group, slot: Slot, config: LilyConfig) -> Distinction | None:
        """Create what the layer has for itself beside a router."""
        values = {"gain": lambda _: first_gain(group, slot, config)}
        activation = config.options_of(group.name).activation
        on_A, on_B = first_values(group, config.init_weights, activation, group.own_r)
        values.update(own_A=lambda shape: on_A(torch.empty(shape)), own_B=lambda shape: on_B(torch.empty(shape)))
        for part, shape in own_shapes(group).items():
            getattr(self, f"lily_{part}")[adapter] = LayerTensor(values[part](shape))
        found = distinction_of(group, slot, config)
        changes = group.gain or found.rows is not None or found.signs is not None
        return found if changes or (group.own_r and group.kind == EXPERTS) else None

    def _with_own(self, adapter: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A (r + own_r, in) and B (experts * (r + own_r), out), with the layer's own pair.

        Each group of a convolution has its shared ranks before its own.
        """
        own_A, own_B = (self._own(adapter, name, B.device) for name in ("lily_own_A", "lily_own_B"))
        A, own_A = (t.view(self.conv_groups, -1, t.shape[1]) for t in (A, own_A))
        A, B = functional.with_own(A, B.view(self.settings[adapter].num_B, -1, B.shape[1]), own_A, own_B)
        return A.flatten(0, 1), B.flatten(0, 1)

    def _own(self, adapter: str, part: str, device: torch.device) -> Any:
        """One of the layer's own tensors, on a device; None if it has none of that kind."""
        holder = getattr(self, part)
        if adapter not in holder:
            return None
        if holder[adapter].weight.is_meta:
            onload(self)
        return holder[adapter].weight.to(device)
