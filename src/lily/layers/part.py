"""Adapters on parts of a module (parameters, slices); several on one module are nested."""

from __future__ import annotations

from torch import nn
from typing_extensions import Self

from lily.layers.bank import LilyBank
from lily.layers.layer import LilyLayer


class PartLayer(LilyLayer):
    """An adapter on one part of a module. Adapters on other parts are nested inside, as PEFT's LoRA nests parameters.

    Args:
        base_layer: the module, or an adapter on another part of it.
        bank: the shared tensors.
        part: the part's name.
    """

    def __init__(self, base_layer: nn.Module, bank: LilyBank, part: str) -> None:
        super().__init__(base_layer, bank)
        self.part = part

    def name_in_plan(self, path: str) -> str:
        """See `LilyLayer.name_in_plan`: the module's name and the part's, without the nesting."""
        return f"{super().name_in_plan(path)}.{self.part}"

    @property
    def nested(self) -> list[Self]:
        """Itself and the adapters of its kind inside it, outermost first."""
        return [self, *(self.base_layer.nested if isinstance(self.base_layer, type(self)) else [])]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """See `LilyLayer`; the adapters inside this one are unloaded too."""
        base = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        if isinstance(self.base_layer, PartLayer):
            self.base_layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return base

    def __repr__(self) -> str:
        first, _, rest = super().__repr__().partition("\n")
        return f"{first}\n  ({self.part})\n{rest}"
