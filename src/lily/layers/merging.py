"""Merging static adapters of one layer into its base weight and taking them out again.

`lily.layers.exact_merge` has the arithmetic that restores every bit.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from lily.errors import LilyError
from lily.kernels import fused
from lily.layers.exact_merge import Undo, add, fold, unfold


class NotStaticError(LilyError):
    """The update depends on the data or is not linear, so no matrix represents it. The message names the fixes."""

    def __init__(self, adapter: str, routing: str, activation: str) -> None:
        why = f"routing={routing!r} depends on the data"
        fix = (
            "make it static first (lily.collapse, or `lily collapse` on the command line), or train the next one with "
            "`settle`, which makes it static during training"
        )
        if activation != "none":
            why = f"activation={activation!r} between A and B is not linear"
            fix = "use the adapter unmerged, or train one with activation='none'"
        super().__init__(f"adapter {adapter!r} cannot be merged or exported: {why}; {fix}")


@dataclass(frozen=True)
class Factors:
    """The update of a layer with static routing, `scaling * B.T @ A`; for stacked experts, one per expert.

    Attributes:
        A: (r, in), or (experts, r, in).
        B: (r, out), or (experts, r, out), with the experts of B already mixed.
        scaling: multiplies the update.
    """

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def delta(self) -> Tensor:
        """The update as (out, in), or (experts, out, in)."""
        return self.scaling * (self.B.mT @ self.A)


@dataclass(frozen=True)
class Merged:
    """What `unmerge` needs to take an adapter out of the base weight: its factors when it was merged, and the undo."""

    factors: Factors
    undo: Undo


class MergingMixin(BaseTunerLayer):  # type: ignore[misc]
    """The part of an adapted layer that merges; `lily.layers.layer.LilyLayer` has the rest.

    Attributes:
        merged_adapters: the adapters that are merged into the base weight now, oldest first.
        merged_as: merged adapter -> what it takes to unmerge it.
        rounding: adapter -> share of its update's norm that the last merge rounded away.
        transposed: whether the base weight is (in, out), as in GPT-2's `Conv1D`.
        converts: whether PEFT's conversion to LoRA, which supports linear layers only, can take this kind of layer.
    """

    converts = False
    merged_adapters: list[str]
    merged_as: dict[str, Merged]
    rounding: dict[str, float]
    transposed: bool

    if TYPE_CHECKING:  # BaseTunerLayer's, which has no types, and LilyLayer's
        active_adapters: list[str]
        get_base_layer: Any
        _cast_input_dtype: Any
        _move_adapter_to_device_of_base_layer: Any
        is_static: Any
        factors: Any

        @property
        def adapted_weight(self) -> Any:
            """See `LilyLayer`."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` can take this layer's adapter; see `is_static`."""
        return self.converts and adapter_name in self._get_available_adapters() and self.is_static(adapter_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's update in the shape and orientation of the base weight.

        Raises:
            LilyError: if the update depends on the data.
        """
        return self._oriented(self.factors(adapter))

    def _oriented(self, factors: Factors) -> Tensor:
        with torch.autocast(factors.A.device.type, enabled=False):
            return factors.delta.mT if self.transposed else factors.delta

    def check_merge(self, adapter: str, safe_merge: bool = False) -> None:
        """Raise before anything is merged if the adapter cannot be.

        Args:
            adapter: its name.
            safe_merge: also refuse an update that is not finite.

        Raises:
            LilyError: if the update depends on the data, the base weight is quantized, or, with `safe_merge`, the
                merged weight is not finite.
        """
        factors = self.factors(adapter)
        base = self.get_base_layer()
        weight = self.adapted_weight
        plain = type(weight) in fused.PLAIN
        # A float8 weight is quantized too: its scale is stored separately.
        if not plain or not weight.is_floating_point() or weight.element_size() == 1:
            kind = f"{type(weight).__name__} of {weight.dtype}" if plain else type(weight).__name__
            raise LilyError(
                f"cannot merge into a {type(base).__name__} whose weight is a {kind}: the update would be rounded to "
                "its few values; load the base model unquantized (or call its dequantize()) and merge there, or "
                "export a LoRA"
            )
        if safe_merge and not torch.isfinite(add(weight.data, self._wide(factors, weight))[0]).all():
            raise LilyError(f"merged with adapter {adapter!r} the weight would hold NaN or infinity; it is not merged")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, in at least float32; `unmerge` restores every bit.

        Args:
            safe_merge: refuse values that are not finite.
            adapter_names: default: the active ones.

        Raises:
            LilyError: see `check_merge`. The weight is then unchanged.
        """
        for name in self._mergeable(safe_merge, adapter_names):
            weight, factors = self.adapted_weight, self.factors(name)
            merged, undo, self.rounding[name] = fold(weight.data, self._wide(factors, weight))
            weight.data.copy_(merged)
            self.merged_as[name] = Merged(replace(factors, A=factors.A.clone(), B=factors.B.clone()), undo)
            self.merged_adapters.append(name)

    def _mergeable(self, safe_merge: bool, adapter_names: list[str] | None) -> list[str]:
        available = self._get_available_adapters()
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in available]
        for name in names:
            self.check_merge(name, safe_merge)
        return names

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with adapters merged permanently or removed; see PEFT. No undo information is kept."""
        base: nn.Module = self.get_base_layer()
        if not merge:
            self.unmerge()
            return base
        weight = self.adapted_weight
        for name in self._mergeable(safe_merge, adapter_names):
            merged, self.rounding[name] = add(weight.data, self._wide(self.factors(name), weight))
            weight.data.copy_(merged)
        return base

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again, last in first out."""
        while self.merged_adapters:
            name, weight = self.merged_adapters.pop(), self.adapted_weight
            record = self.merged_as.pop(name)
            self.rounding.pop(name, None)
            restored, exact = unfold(weight.data, self._wide(record.factors, weight), record.undo)
            weight.data.copy_(restored)
            if not exact:
                warnings.warn(
                    "unmerged up to rounding, not to the last bit: the base weight or its device changed since the "
                    "merge",
                    stacklevel=2,
                )

    def _wide(self, factors: Factors, weight: Tensor) -> Tensor:
        A, B = factors.A.to(weight.device), factors.B.to(weight.device)
        delta = self._oriented(replace(factors, A=A, B=B))
        return delta.to(torch.promote_types(delta.dtype, weight.dtype)).contiguous()
