"""`nn.MultiheadAttention`: its projections as linear layers, of which the one of the inputs has no module in torch."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lily.errors import LilyError

IN, OUT = "in_proj", "out_proj"


class InProjection(nn.Linear):
    """The projection of an attention's query, key and value, which are its outputs in this order.

    It has no parameters: weight and bias are the attention's, under the attention's names.

    Args:
        attention: an attention whose query, key and value have one size.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        # In a tuple, so that nn.Module does not register it: this module is a child of the attention.
        self._attention = (attention,)
        self.in_features, self.out_features = attention.embed_dim, 3 * attention.embed_dim

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The attention's `in_proj_weight` (3 * embed_dim, embed_dim)."""
        return self._attention[0].in_proj_weight

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """The attention's `in_proj_bias` (3 * embed_dim,), or None."""
        return self._attention[0].in_proj_bias

    def forward(self, x: Tensor, part: tuple[int, int] | None = None) -> Tensor:
        """`x` (..., embed_dim) -> (..., 3 * embed_dim); of these only the outputs of `part`, if given, others zero."""
        if part is None:
            return super().forward(x)
        first, end = part
        bias = None if self.bias is None else self.bias[first:end]
        return F.pad(F.linear(x, self.weight[first:end], bias), (first, self.out_features - end))


def has_in_projection(attention: nn.MultiheadAttention) -> bool:
    """Whether one weight projects query, key and value, which have one size then (`kdim` and `vdim` are not given)."""
    return bool(getattr(attention, "_qkv_same_embed_dim", True))


def is_called(attention: nn.MultiheadAttention) -> bool:
    """Whether the attention's projections can be called: its forward is torch's, and `out_proj` a plain linear layer.

    `lily.layers.attention.CallingAttention` has another forward, and says that it calls them.
    """
    owner = next(cls for cls in type(attention).__mro__ if "forward" in vars(cls))
    out: Any = attention._modules.get(OUT)
    base = out.get_base_layer() if hasattr(out, "get_base_layer") else out
    plain = type(base) in (nn.Linear, NonDynamicallyQuantizableLinear)
    return plain and (owner is nn.MultiheadAttention or getattr(owner, "calls_projections", False))


def check_attention(name: str, attention: Any) -> None:
    """Refuse an attention, named as a target, whose projections cannot both be adapted.

    Raises:
        LilyError: says why, and what to name instead.
    """
    if not has_in_projection(attention):
        raise LilyError(
            f"target {name} is an nn.MultiheadAttention with kdim={attention.kdim} and vdim={attention.vdim} beside "
            f"embed_dim={attention.embed_dim}, so it has no {IN}, and LoRA refuses it; adapt its {OUT} alone "
            f"(target_modules=['{name.rpartition('.')[2]}.{OUT}']), or narrow target_modules"
        )
    if not is_called(attention):
        raise LilyError(
            f"target {name} is a {type(attention).__name__} that an adapter cannot follow: Lily adapts "
            f"nn.MultiheadAttention with torch's own forward and an {OUT} that is not quantized. Narrow "
            "target_modules, or exclude it with exclude_modules"
        )
