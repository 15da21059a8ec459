"""An adapted convolution."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lily import functional
from lily.layers.layer import LilyLayer
from lily.layers.merging import Factors


class Conv(LilyLayer):
    """An adapted `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` with any options; its tokens are its output pixels.

    A is the kernel of a convolution to r channels, B a convolution with a kernel of 1 from there, as in PEFT's LoRA.
    `sequence` routing averages over the pixels of a sample. With groups, both convolutions have them too, so that the
    update is a grouped convolution like the layer and can be merged; LoRA's A reads the channels of all groups.

    Args:
        base_layer: the frozen layer.
        bank: the shared tensors.
    """

    def update_of(self, adapter: str, x: Tensor) -> Tensor:
        """See `LilyLayer.update_of`; an input without batch dimension is one sample."""
        if x.ndim == len(self._conv.kernel_size) + 2:
            return super().update_of(adapter, x)
        return super().update_of(adapter, x.unsqueeze(0)).squeeze(0)

    @property
    def _conv(self) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
        return cast("nn.Conv1d | nn.Conv2d | nn.Conv3d", self.base)

    @property
    def conv_groups(self) -> int:
        """See `LilyLayer.conv_groups`."""
        return self._conv.groups

    @property
    def groups(self) -> int:
        """The base layer's, which PEFT's LoRA reads of a layer that it is put around (in a mixed model)."""
        return self._conv.groups

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
        """The patches (batch, *output size, groups, in) that the kernel covers; see `LilyLayer.inputs_of_A`."""
        conv, mode = self._conv, self._conv.padding_mode
        n = len(conv.kernel_size)
        x = F.pad(
            x if x.ndim == n + 2 else x.unsqueeze(0),
            conv._reversed_padding_repeated_twice,
            mode="constant" if mode == "zeros" else mode,
        )
        for i, (size, step, d) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), 2):
            x = x.unfold(i, (size - 1) * d + 1, step)[..., ::d]  # (batch, channels, *output size, *kernel so far)
        x = torch.unflatten(x, 1, (conv.groups, -1)).movedim((1, 2), (n + 1, n + 2))
        return x.flatten(n + 2)

    def _out(self, update: Tensor, x: Tensor) -> Tensor:
        return update.movedim(-1, 1)

    def _mask(self, x: Tensor, h: Tensor) -> Tensor | None:
        # An attention mask covers tokens: the positions of a one-dimensional convolution that keeps their number.
        return self.bank.masks.mask_for(h.flatten(2)) if len(self._conv.kernel_size) == 1 else None

    def factors(self, adapter: str) -> Factors:
        """See `LilyLayer.factors`; of a convolution with groups, one update per group."""
        found, groups = super().factors(adapter), self.conv_groups
        if groups == 1:
            return found
        A, B = torch.unflatten(found.A, 0, (groups, -1)), torch.unflatten(found.B, 1, (groups, -1))
        return replace(found, A=A, B=B.movedim(1, 0))

    def _oriented(self, factors: Factors) -> Tensor:
        return super()._oriented(factors).reshape(self.adapted_weight.shape)
