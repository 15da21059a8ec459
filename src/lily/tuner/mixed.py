"""Lily beside other methods on one model: `get_peft_model(model, config, mixed=True)`.

PEFT's `MixedModel` injects each adapter by the code of its method. Here that of Lily is `LilyModel`, on the same base
model. An adapter on a layer that another method has adapted is put around that method's layer, and the other way round,
as PEFT does with any two methods. `lily.tuner.replacements` lists the replacements.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.mixed import model as mixed
from peft.utils import PeftType
from torch import Tensor, nn

from lily.errors import LilyError
from lily.layers.bank import banks_in
from lily.plan.specs import CONVOLUTIONS, EMBEDDING, LINEAR
from lily.tuner import call_uncalled
from lily.tuner.model import LilyModel
from lily.tuner.removal import remove_if_empty

_stock_model = mixed.MixedModel


class _Inside(LilyModel):
    """The tuner for the Lily adapters of a mixed model.

    Args:
        outside: the mixed model.
    """

    def __init__(self, outside: Any) -> None:
        nn.Module.__init__(self)  # PEFT's would adapt the model
        self.model, self.peft_config, self.active_adapter = outside.model, outside.peft_config, outside.active_adapter
        self.targeted_module_names = outside.targeted_module_names
        self.targeted_parameter_names = outside.targeted_parameter_names

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        other = next((g for g in self._plan.groups if g.kind not in (LINEAR, *CONVOLUTIONS, EMBEDDING)), None)
        if other is not None:
            raise LilyError(
                f"a mixed model adapts whole layers, and {other.layers[0]} is a {other.kind} (target_slices, "
                "parallel_modules, target_parameters, or experts that all-linear names); leave it out, or use a model "
                "without mixed=True"
            )


class LilyMixedModel(_stock_model):  # type: ignore[misc, valid-type]
    """PEFT's `MixedModel`, which takes Lily adapters too."""

    def _is_lily(self, adapter_name: str) -> bool:
        return bool(self.peft_config[adapter_name].peft_type == PeftType.LILY)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter by the code of its method. See PEFT."""
        if self._is_lily(adapter_name):  # in the base model, so that plans have the names of its layers
            inside = _Inside(self)
            inside.inject_adapter(self.model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        else:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        cast = _Inside(self)._cast_adapter_dtype if self._is_lily(adapter_name) else super()._cast_adapter_dtype
        cast(adapter_name, autocast_adapter_dtype)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Remove adapters; with the last Lily adapter, all that Lily put into the model. See PEFT."""
        super().delete_adapter(adapter_name)
        if banks_in(self.model):
            call_uncalled.watch(self.model)
            remove_if_empty(self.model)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge and banks_in(self.model):  # before the first layer is merged
            _Inside(self)._check_merge(adapter_names, safe_merge)
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        remove_if_empty(self.model)
        return self.model  # type: ignore[no-any-return]
