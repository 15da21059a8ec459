"""`nn.MultiheadAttention` with adapted projections.

torch's forward reads the weights of its projections, in one fused kernel or in a function. An attention with an adapter
on one of them gets this class, whose forward calls them; the adapters are on linear layers like any others.
"""

from __future__ import annotations

import functools
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lily.layers.layer import LilyLayer
from lily.layers.mask_forms import kept_tokens
from lily.plan.attention import IN, OUT, has_in_projection


class CallingAttention(nn.MultiheadAttention):
    """An attention that calls `in_proj` and `out_proj` where they are adapted.

    While all their adapters are merged or disabled, torch's forward runs.
    """

    calls_projections = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results of `nn.MultiheadAttention.forward`.

        `key_padding_mask` is the mask of `sequence` routing too, for what the keys are made of.
        """
        adapted = [m for m in (self._modules.get(IN), self._modules.get(OUT)) if isinstance(m, LilyLayer)]
        if all(_is_silent(layer) for layer in adapted):
            for layer in adapted:
                layer.acting()  # a merged one that is switched off is unmerged
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True is a hint about attn_mask, so attn_mask is needed too")
        masks = adapted[0].bank.masks
        if any(layer.routes_by_sequence for layer in adapted):
            masks.ask(self, attn_mask, is_causal)
        spans = _spans(query, key, value)
        batched, padding = query.dim() == 3, key_padding_mask
        if padding is not None:
            padding = padding if batched else padding.unsqueeze(0)
        kept = None if padding is None else kept_tokens(padding)
        projected: list[Tensor] = []
        for x, first, end in spans:
            x = x.unsqueeze(0) if not batched else x if self.batch_first else x.transpose(0, 1)
            with masks.of_tokens(kept if end > 1 else None):
                projected += _project(self, x, first, end)
        q, k, v = projected
        context, weights = _attend(self, q, k, v, padding, attn_mask, need_weights, is_causal)
        with masks.of_tokens(kept if spans[0][2] > 1 else None):
            out = cast(Tensor, self.out_proj(context))
        out = out.squeeze(0) if not batched else out if self.batch_first else out.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return out, weights


def set_calling(attention: nn.MultiheadAttention, wanted: bool) -> None:
    """Make an attention call its projections, or give it its own class back."""
    cls = type(attention)
    if wanted == issubclass(cls, CallingAttention):
        return
    attention.__class__ = new = calling_class(cast(Any, cls)) if wanted else _own_class(cls)
    if "_old_forward" in vars(attention):  # accelerate has put its own forward before the class's
        vars(attention)["_old_forward"] = new.forward.__get__(attention)


@functools.cache
def calling_class(cls: Any) -> type[CallingAttention]:
    """`CallingAttention` for a class of attention, which may be a subclass of torch's."""
    if cls is nn.MultiheadAttention:
        return CallingAttention
    return type(cls.__name__, (CallingAttention, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _own_class(cls: Any) -> Any:
    return nn.MultiheadAttention if cls is CallingAttention else cls.__mro__[2]


def _is_silent(layer: LilyLayer) -> bool:
    """Whether calling the layer would only multiply by its weight, without anything that watches it."""
    still = layer.merged_adapters or layer._disable_adapters
    return bool(still) and not layer._forward_hooks and not layer._forward_pre_hooks


def _spans(query: Tensor, key: Tensor, value: Tensor) -> list[tuple[Tensor, int, int]]:
    """Different inputs, each with the projections that read it: first and end of query, key, value."""
    if key is value:
        return [(query, 0, 3)] if query is key else [(query, 0, 1), (key, 1, 3)]
    return [(query, 0, 2), (value, 2, 3)] if query is key else [(query, 0, 1), (key, 1, 2), (value, 2, 3)]


def _project(attention: nn.MultiheadAttention, x: Tensor, first: int, end: int) -> list[Tensor]:
    """Some of query, key and value (batch, tokens, embed_dim) of an input."""
    bias, width = attention.in_proj_bias, attention.embed_dim
    if not has_in_projection(attention):
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)[first:end]
        biases = [None] * 3 if bias is None else bias.chunk(3)
        return [F.linear(x, w, b) for w, b in zip(weights, biases[first:end], strict=True)]
    start, stop = first * width, end * width
    layer = attention._modules.get(IN)
    if not isinstance(layer, LilyLayer):
        y = F.linear(x, attention.in_proj_weight[start:stop], None if bias is None else bias[start:stop])
    elif end - first == 3:
        y = layer(x)
    else:
        y = layer(x, part=(start, stop))[..., start:stop]
    return list(y.chunk(end - first, -1))


def _attend(
    attention: nn.MultiheadAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    need_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """The attended values (batch, tokens, embed_dim), and the attention weights (batch, heads, tokens, keys)."""
    keys, one = k.shape[1], (len(k), 1, -1)
    if attention.bias_k is not None and attention.bias_v is not None:
        k = torch.cat((k, attention.bias_k.expand(one)), 1)
        v = torch.cat((v, attention.bias_v.expand(one)), 1)
    if attention.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    added = k.shape[1] - keys
    q, k, v = (torch.unflatten(t, -1, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    dropout = attention.dropout if attention.training else 0.0
    causal = is_causal and padding is None and not need_weights and not added
    added_to_scores = None if causal else _scores_mask(padding, mask, attention.num_heads, q.dtype)
    if added_to_scores is not None and added:
        added_to_scores = F.pad(added_to_scores, (0, added))
    if not need_weights:
        attended = F.scaled_dot_product_attention(q, k, v, added_to_scores, dropout, causal)
        return attended.transpose(1, 2).flatten(2), None
    scores = (q * math.sqrt(1 / q.shape[-1])) @ k.mT
    weights = torch.softmax(scores if added_to_scores is None else scores + added_to_scores, -1)
    weights = F.dropout(weights, dropout) if dropout else weights
    return (weights @ v).transpose(1, 2).flatten(2), weights


def _scores_mask(padding: Tensor | None, mask: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores (batch, heads, tokens, keys): -inf where a mask excludes a key."""
    parts = []
    if mask is not None:
        parts.append(_additive(torch.unflatten(mask, 0, (-1, heads)) if mask.dim() == 3 else mask, dtype))
    if padding is not None:
        parts.append(_additive(padding, dtype)[:, None, None])
    return sum(parts[1:], parts[0]) if parts else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
