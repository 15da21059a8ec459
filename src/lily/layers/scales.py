"""Multiplying an adapter's update for a while, by the calls that PEFT's LoRA layers have and diffusers uses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer

from lily.errors import LilyError


class ScaleMixin(BaseTunerLayer):  # type: ignore[misc]
    """The part of an adapted layer that changes scales; `lily.layers.layer.LilyLayer` has the rest.

    The update is computed, merged and exported with the scale as it is; files keep the configuration's.
    """

    settings: dict[str, Any]

    if TYPE_CHECKING:  # LilyLayer's
        refill: Any

    @property
    def scaling(self) -> dict[str, float]:
        """Adapter -> what multiplies its update now. Assign a dictionary to change it."""
        return {name: settings.scaling for name, settings in self.settings.items()}

    @scaling.setter
    def scaling(self, scales: dict[str, float]) -> None:
        for name, scale in scales.items():
            self._change_scale(name, _number(scale))

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
    return scale
