"""Multiplying an adapter's update for a while, by the calls that PEFT's LoRA layers have and diffusers uses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from peft.tuners.tuners_utils import BaseTunerLayer

from lily.errors import LilyError

Value = TypeVar("Value")


class _Present(Mapping[str, Value]):
    """Adapter -> one of its settings on a layer, now. Of what PEFT's LoRA layers have as a dictionary of their own.

    Args:
        layer: the adapted layer.
    """

    def __init__(self, layer: ScaleMixin) -> None:
        self._layer = layer

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer.settings)

    def __len__(self) -> int:
        return len(self._layer.settings)

    def __repr__(self) -> str:
        return repr(dict(self))


class Ranks(_Present[int]):
    """Adapter -> rank on a layer, now."""

    def __getitem__(self, adapter: str) -> int:
        return self._layer.settings[adapter].r  # type: ignore[no-any-return]


class Scales(_Present[float], MutableMapping[str, float]):
    """Adapter -> what multiplies its update on a layer now. Assign to an entry to change it, as on LoRA's layers."""

    def __getitem__(self, adapter: str) -> float:
        return self._layer.settings[adapter].scaling  # type: ignore[no-any-return]

    def __setitem__(self, adapter: str, scale: float) -> None:
        if adapter not in self._layer.settings:
            known = ", ".join(self._layer.settings)
            raise LilyError(f"no adapter {adapter!r} on this layer, whose scale could be set; there are {known}")
        self._layer._change_scale(adapter, _number(scale))

    def __delitem__(self, adapter: str) -> None:
        raise LilyError(f"the scale of adapter {adapter!r} cannot be removed; set it, or call delete_adapter")


class ScaleMixin(BaseTunerLayer):  # type: ignore[misc]
    """The part of an adapted layer that changes scales; `lily.layers.layer.LilyLayer` has the rest.

    The update is computed, merged and exported with the scale as it is; files keep the configuration's.
    """

    settings: dict[str, Any]

    if TYPE_CHECKING:  # LilyLayer's
        refill: Any

    @property
    def scaling(self) -> Scales:
        """Adapter -> what multiplies its update now. Assign to an entry, or a dictionary, to change it."""
        return Scales(self)

    @scaling.setter
    def scaling(self, scales: Mapping[str, float]) -> None:
        self.scaling.update(scales)

    def change_settings(self, adapter: str, **changes: Any) -> None:
        """Replace some fields of an adapter's settings."""
        self.settings[adapter] = replace(self.settings[adapter], **changes)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the configured scale of an adapter; one that is not on this layer is ignored. See PEFT's LoRA."""
        if adapter in self.settings:
            self._change_scale(adapter, _number(scale) * self.settings[adapter].configured_scaling)

    def scale_layer(self, scale: float) -> None:
        """Multiply the present scale of the active adapters. See PEFT's LoRA."""
        for name in self._active_here():
            self._change_scale(name, self.settings[name].scaling * _number(scale))

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the present scale of the active adapters, or restore the configured one. See PEFT's LoRA."""
        for name in self._active_here():
            settings = self.settings[name]
            restored = settings.configured_scaling if scale is None else settings.scaling / _number(scale)
            self._change_scale(name, restored)

    def _change_scale(self, adapter: str, scaling: float) -> None:
        self.change_settings(adapter, scaling=scaling)
        self.refill(adapter)

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.settings]


def _number(scale: Any) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise LilyError(f"the scale {scale!r} of an adapter is not a finite number; give one such as 0.5")
    return float(scale)
