"""An adapted convolution."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from lily import functional
from lily.layers.layer import LilyLayer
from lily.layers.merging import Factors


class Conv2d(LilyLayer):
    """An adapted `nn.Conv2d` of any kernel, stride, padding and dilation; its tokens are its output pixels.

    A is the kernel of a convolution to r channels, B a 1x1 convolution from there, as in PEFT's LoRA. `sequence`
    routing averages over the pixels of a sample.

    Args:
        base_layer: the frozen layer.
        bank: the shared tensors.
    """

    def update_of(self, adapter: str, x: Tensor) -> Tensor:
        """See `LilyLayer.update_of`; an input without batch dimension is one sample."""
        return super().update_of(adapter, x) if x.ndim == 4 else super().update_of(adapter, x.unsqueeze(0)).squeeze(0)

    @property
    def _conv(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.base)

    def beyond_lora(self) -> str | None:
        """The option of the base layer that PEFT's LoRA ignores: its A has the kernel, stride and padding only."""
        conv = self._conv
        if any(d > 1 and k > 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)):
            return f"dilation={conv.dilation}"
        if conv.padding_mode != "zeros" and any(conv._reversed_padding_repeated_twice):
            return f"padding_mode={conv.padding_mode!r}"
        return None

    def _down(self, x: Tensor, A: Tensor) -> Tensor:
        return functional.down_conv(self._cast_input_dtype(x, A.dtype), A, self._conv)

    def inputs_of_A(self, x: Tensor) -> Tensor | None:
        """The patches (batch, pixels, in) that the kernel covers; see `LilyLayer.inputs_of_A`."""
        conv, mode = self._conv, self._conv.padding_mode
        x = F.pad(
            x if x.ndim == 4 else x.unsqueeze(0),
            conv._reversed_padding_repeated_twice,
            mode="constant" if mode == "zeros" else mode,
        )
        return F.unfold(x, conv.kernel_size, conv.dilation, 0, conv.stride).mT

    def _out(self, update: Tensor, x: Tensor) -> Tensor:
        return update.movedim(-1, 1)

    def _mask(self, x: Tensor, h: Tensor) -> Tensor | None:
        return None  # an attention mask covers tokens, not pixels

    def _oriented(self, factors: Factors) -> Tensor:
        return super()._oriented(factors).view(self.adapted_weight.shape)
