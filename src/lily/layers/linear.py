"""An adapted linear layer."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lily.kernels import fused
from lily.layers.devices import execution_device
from lily.layers.layer import LilyLayer
from lily.plan.attention import InProjection

OF_ATTENTION = (InProjection, NonDynamicallyQuantizableLinear)  # base layers in nn.MultiheadAttention


class Linear(LilyLayer):
    """An adapted linear layer: `nn.Linear`, a quantized replacement for it, or GPT-2's `Conv1D`.

    A frozen full-precision base layer and its adapter are computed as one (see `lily.kernels.fused`). Any other base
    layer is called unchanged, so that it still dequantizes, shards and runs its hooks.

    Args:
        base_layer: the frozen layer.
        bank: the shared tensors.
    """

    @property
    def converts(self) -> bool:  # type: ignore[override]
        """See `MergingMixin`; LoRA acts when a layer is called, and torch's attention does not call its layers."""
        return not isinstance(self.base, OF_ATTENTION)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` (..., in) -> (..., out), in the dtype of the base layer's output."""
        if self.merged_adapters:
            if self._disable_adapters:
                self.unmerge()
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        base, result = self.base_layer, None
        if "_hf_hook" in base.__dict__:  # accelerate may run the base layer on another device than its input's
            x = x.to(execution_device(base) or x.device)
        for adapter in [] if self._disable_adapters else self.active_adapters:
            if adapter not in self.settings:
                continue
            fast = self._fast(adapter, x)
            if result is None and fast and not args and not kwargs and is_plain(base, x, fast.how.dtype):
                result = fused.linear(x, base.weight, base.bias, fast)  # type: ignore[arg-type]
                continue
            if result is None:
                result = base(x, *args, **kwargs)
            if fast:
                result = fused.plus_update(result, x, fast)
            else:
                result = result + self.update_of(adapter, x).to(result.dtype)
        return cast(Tensor, base(x, *args, **kwargs)) if result is None else result


def is_plain(base: nn.Module, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether calling `base` on `x` only multiplies by a frozen weight, in `dtype`, and adds a bias."""
    if type(base) not in (nn.Linear, *OF_ATTENTION) and type(base).__name__ != "Conv1D":
        return False
    weight: Any = base.weight
    if weight.requires_grad or weight.device != x.device:
        return False
    if hasattr(type(weight), "__tensor_flatten__"):  # a quantized or sharded one, which compiling does not hide
        return False
    if not torch.compiler.is_compiling() and type(weight) not in fused.PLAIN:
        return False
    if weight.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        return False
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    return not any(hooks) and "forward" not in base.__dict__
