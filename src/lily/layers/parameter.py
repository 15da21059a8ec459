"""An adapted parameter: a matrix, or the stacked matrices of a mixture's experts.

The module that owns the parameter computes with an updated weight; its tokens are not visible here. So the update must
be a matrix (static weights), and it is added to the weight during a forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lily import functional
from lily.layers.bank import LilyBank
from lily.layers.devices import call_with, placement
from lily.layers.part import PartLayer
from lily.plan.config import LilyConfig
from lily.plan.sharing_plan import Group, Slot
from lily.plan.specs import EXPERTS, is_transposed


class Parameter(PartLayer):
    """An adapted parameter of `base_layer`; two of one module are nested, as PEFT's LoRA nests them.

    As in PEFT, the update is in force only while the module is called; reading the parameter from outside gives the
    frozen one.

    Args:
        base_layer: the module that owns the parameter, or another adapted parameter of it.
        bank: the shared tensors.
        part: the parameter's name in that module.
    """

    def __init__(self, base_layer: nn.Module, bank: LilyBank, part: str) -> None:
        super().__init__(base_layer, bank, part)
        self.weight_name = part
        self.experts = 0  # stacked experts; 0: a single matrix

    @property
    def adapted_weight(self) -> Any:
        """The frozen parameter."""
        return getattr(self.base, self.weight_name)

    def update_layer(
        self, adapter: str, group: Group, slot: Slot, config: LilyConfig, device: torch.device | None = None
    ) -> None:
        """See `LilyLayer.update_layer`."""
        if group.kind == EXPERTS:
            self.experts = len(group.members)
            self.transposed = is_transposed(self.base)
        super().update_layer(adapter, group, slot, config, device)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        home, dtype = placement(self, parameter=self.weight_name)
        self._move_own(adapter_name, device or home, dtype)

    def tensors_of(self, adapter: str, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (experts of B, r, out). For stacked experts, A is (experts, r, in), the A of each.

        With own ranks their B is (experts, experts of B, r + own_r, out).
        """
        A, B = super().tensors_of(adapter, device)
        if not self.experts:
            return A, B
        settings = self.settings[adapter]
        A, stride = A.view(-1, settings.r, A.shape[1]), settings.stride
        if settings.distinction is None and stride > 1:
            A = A[torch.arange(self.experts, device=A.device) // stride]
        if settings.own_r:
            own = (self._own(adapter, f"lily_own_{part}", B.device) for part in "AB")
            A, B = functional.with_own(A, B, *(t.view(self.experts, -1, t.shape[1]) for t in own))
        return A, B

    def shared_A(self, adapter: str) -> tuple[Tensor, Tensor | None]:
        """Of stacked experts that share one A: that A (r, in), and what makes each expert's of it, (experts, r, r).

        The second multiplies from the left; None: all experts have the shared A itself.
        """
        settings = self.settings[adapter]
        A = self.bank.pair(adapter, settings.slot)[0].detach()
        if settings.distinction is None:
            return A, None
        coordinates = torch.eye(settings.r, device=A.device, dtype=A.dtype)
        changes = settings.distinction.apply(coordinates, self._own(adapter, "lily_gain", A.device))
        return A, changes.detach().view(self.experts, settings.r, settings.r)

    def inputs_of_A(self, x: Tensor) -> Tensor | None:
        """None: what the module multiplies its parameter with is not visible here."""
        return None

    def _with_own(self, adapter: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return (A, B) if self.experts else super()._with_own(adapter, A, B)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output with its updated weights, including those of the adapters nested inside this one."""
        acting = [(layer, layer.acting()) for layer in self.nested]
        if not any(adapters for _, adapters in acting):
            return self.base(*args, **kwargs)
        return call_with(self.base, partial(_updated, acting), args, kwargs)

    def updated(self, adapters: Sequence[str]) -> Tensor:
        """The weight with the updates of some adapters, in its own dtype."""
        weight: Tensor = self.adapted_weight
        for adapter in adapters:
            weight = self._updated_weight(weight, adapter)
        return weight

    def _updated_weight(self, weight: Tensor, adapter: str) -> Tensor:
        """`weight` plus an update, in one (batched, for stacked experts) multiply-add."""
        with torch.autocast(weight.device.type, enabled=False):  # the weight keeps its dtype
            if (fixed := self._fixed(adapter)) is not None:
                A, mixed, scaling = fixed.A, fixed.B, 1.0
            else:
                A, B = self.tensors_of(adapter, weight.device)
                mixed, scaling = self._mixed(B, self.router_of(adapter)), self.settings[adapter].scaling
            left, right = (A.mT, mixed) if self.transposed else (mixed.mT, A)
            add = torch.baddbmm if self.experts else torch.addmm
            return add(weight, left.to(weight), right.to(weight), alpha=scaling)

    def _mixed(self, B: Tensor, logits: Tensor | None) -> Tensor:
        mixed = super()._mixed(B, logits)
        return mixed if not self.experts or mixed.ndim == 3 else mixed.expand(self.experts, *mixed.shape)


def _updated(acting: Sequence[tuple[Parameter, Sequence[str]]]) -> dict[str, Tensor]:
    return {layer.weight_name: layer.updated(adapters) for layer, adapters in acting if adapters}
