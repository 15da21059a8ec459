"""Quantised base layers: what of them an adapter must know besides calling them."""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_differentiable(model: nn.Module) -> None:
    """Have bitsandbytes' 4-bit layers go on giving gradients on CPUs.

    On a CPU that multiplies bfloat16 they repack themselves, at the first forward in eval mode, for a product that
    autograd cannot go through: whatever trains afterwards gets no gradient from behind them, and no error tells. So
    where something is to be trained they must not; those that have are repacked back.

    Args:
        model: holds the layers, adapted or not.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            _unpack(module)


def _unpack(layer: Any) -> None:
    state = getattr(layer.weight, "quant_state", None)
    if state is not None and getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
