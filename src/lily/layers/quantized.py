"""Work-around for quantized base layers."""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers differentiable on CPUs.

    On a CPU with bfloat16 instructions they repack their weights at the first forward in eval mode, for a product that
    has no backward: layers before them then get no gradient in training, without an error. This disables repacking and
    reverts it where it has happened.

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
