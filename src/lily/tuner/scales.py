"""PEFT's `rescale_adapter_scale`, which knows LoRA's layers alone, for Lily's layers too.

`lily.tuner.replacements` installs the replacement. It calls the original for models without a Lily adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import helpers
from peft.tuners.lora import LoraLayer
from torch import nn

from lily.layers.layer import LilyLayer

_stock_rescale = helpers.rescale_adapter_scale


@functools.wraps(_stock_rescale)
@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: Any) -> Iterator[None]:
    """`rescale_adapter_scale`: multiply the scale of every adapter, and restore it at the end."""
    before = {layer: dict(layer.scaling) for layer in model.modules() if isinstance(layer, LilyLayer)}
    if not before:
        with _stock_rescale(model, multiplier):
            yield
        return
    if isinstance(multiplier, bool) or not isinstance(multiplier, (float, int)):  # as stock does
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    beside = any(isinstance(layer, LoraLayer) for layer in model.modules())
    try:
        for layer, scales in before.items():
            layer.scaling = {name: scale * multiplier for name, scale in scales.items()}
        if beside:
            with _stock_rescale(model, multiplier):
                yield
        else:
            yield
    finally:
        for layer, scales in before.items():
            layer.scaling = {name: scale for name, scale in scales.items() if name in layer.settings}
