"""An adapted slice: some outputs of a linear layer that fuses several projections."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lily.layers.merging import Factors
from lily.layers.part import PartLayer
from lily.plan.config import LilyConfig
from lily.plan.fused_layouts import Rows
from lily.plan.sharing_plan import Group, Slot
from lily.plan.specs import layer_spec


class Slice(PartLayer):
    """A linear layer with an update of its outputs `rows` alone. Slices of one layer are nested.

    Args:
        base_layer: the frozen layer, or another slice of it.
        bank: the shared tensors.
        part: the slice's name.
    """

    rows: Rows

    def update_layer(
        self, adapter: str, group: Group, slot: Slot, config: LilyConfig, device: torch.device | None = None
    ) -> None:
        """See `LilyLayer.update_layer`."""
        self.rows = cast(Rows, group.rows)
        super().update_layer(adapter, group, slot, config, device)

    @property
    def whole_weight(self) -> Any:
        """The weight of the whole layer."""
        return super().adapted_weight

    @property
    def adapted_weight(self) -> Any:
        """The slice's part of the base weight, as a view: (runs, run, in), or (in, runs, run) of `Conv1D`.

        A weight that is not a plain tensor is returned unchanged.
        """
        weight = self.whole_weight
        if type(weight) not in (nn.Parameter, Tensor) or weight.ndim != 2:
            return weight
        return self.rows.view(weight) if self.transposed else self.rows.view(weight.mT).permute(1, 2, 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` (..., in) -> (..., out) of the whole layer, in the dtype of its output."""
        adapters = self.acting()
        result = cast(Tensor, self.base_layer(x, *args, **kwargs))
        x = x.to(result.device)  # accelerate may run the base layer on another device than its input's
        for adapter in adapters:
            part = self.rows.view(result)
            # Nothing else refers to the layer's output yet, so the slice is updated in place.
            part.copy_(self._plus_update(part.flatten(-2), x, adapter).view(part.shape))
        return result

    def _oriented(self, factors: Factors) -> Tensor:
        """The update in the shape of `adapted_weight`."""
        delta = super()._oriented(factors)
        run = self.rows.stop - self.rows.start
        return delta.view(delta.shape[0], -1, run) if self.transposed else delta.view(-1, run, delta.shape[1])

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of the whole layer's weight, zero outside the slice.

        Raises:
            LilyError: if the update depends on the data.
        """
        factors = self.factors(adapter)
        spec = layer_spec(self.part, self)
        whole = torch.zeros(spec.in_features, spec.out_features, device=factors.A.device, dtype=factors.A.dtype)
        delta = super()._oriented(factors)
        part = self.rows.view(whole)
        part.copy_((delta if self.transposed else delta.mT).view(part.shape))
        return whole if self.transposed else whole.mT
