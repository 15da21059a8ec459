"""Lily as pure functions: the paper's method on one screen, and the reference that tests every faster path.

Source: "Low-Rank Interconnected Adaptation across Layers" (arXiv 2407.09946), section 3.

    A_l = (s * g)[:, None] * A[perm]         # A: (r, in)            shared by neighboring layers
    h = dropout(act(x @ A_l.T))
    p = softmax(h @ R.T)                     # R: (experts, r)       the router, one per layer
    y = base(x) + scaling * mix(h, p, B)     # B: (experts, r, out)  shared by all layers of a group

In the first line, `perm` and the signs `s` are fixed for each layer (`distinct`), and g is a learned gain (`gain`); in
the paper A_l is A. With `own_r`, a layer's own pair is stacked below the shared ones: A_l is `cat(A_l, own_A)`, B of
each expert `cat(B_e, own_B)`, and R is 0 on the own ranks, so that they act with weight 1.

A convolution and an embedding differ only in the second line: `down_conv`, `down_embedding`. The stacked weights of a
mixture of experts, whose tokens are not accessible, are updated directly, by `A.T @ static_B`.

Letters: `x` input, `h` hidden (rank r), `p` expert weights per token, `w` the mixing weights that a routing
computes from `p`, `E` experts. Leading dimensions are (batch, tokens) where a layer sees sequences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALING_POWER = 0.5

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


def distinction(kind: str, r: int, place: int, seed: int) -> tuple[list[int] | None, list[int] | None]:
    """What distinguishes a layer from those that share its A: the rows of A that its ranks take, and signs.

    The rows are sorted by, and the signs are the lowest bit of the first byte of, the SHA-256 of a text: every program
    on every machine derives the same.

    Args:
        kind: `none`, `permute`, `signs` or `permute+signs`.
        r: rank.
        place: number of the layer in its group, from 0; layer 0 is not changed.
        seed: of the configuration.

    Returns:
        The rows (r,), and the signs 1 or -1 (r,); None where nothing changes.
    """
    order = sorted(range(r), key=lambda i: _digest(seed, place, i, "permute")) if "permute" in kind and place else None
    signs = [1 - 2 * (_digest(seed, place, i, "signs")[0] & 1) for i in range(r)] if "signs" in kind and place else None
    return order, signs


def _digest(seed: int, place: int, i: int, what: str) -> bytes:
    return hashlib.sha256(f"{what}/{seed}/{place}/{i}".encode()).digest()


def first_gain(start: str, r: int, place: int, seed: int) -> list[float]:
    """Where a layer's gain starts: `ones`; `signs` as of `distinction`; `half-signs`, those on the second half only."""
    _, signs = distinction("signs" if start != "ones" else "none", r, place, seed)
    kept = r // 2 if start == "half-signs" else 0
    return [1.0] * r if signs is None else [1.0] * kept + [float(sign) for sign in signs[kept:]]


def default_scaling(r: int) -> float:
    """The scale under which LoRA's learning rate is a good start for every rank: `2 * (8 / r) ** SCALING_POWER`.

    It is 2 at rank 8, the scale of LoRA with `lora_alpha = 2 r`. A step of Adam changes every entry of B by the
    learning rate, so at a fixed scale the output moves further the more ranks there are; the power was measured
    (docs/tune.md).

    Args:
        r: rank of a layer's update, own ranks included.
    """
    return float(2 * (8 / r) ** SCALING_POWER)


def layer_A(A: Tensor, rows: Tensor | None, signs: Tensor | None, gain: Tensor | None) -> Tensor:
    """The A (r, in) of one layer, of the shared one: `(signs * gain)[:, None] * A[rows]`."""
    A = A if rows is None else A.index_select(0, rows)
    factor = row_factor(signs, gain)
    return A if factor is None else factor.to(A.dtype).unsqueeze(-1) * A


def row_factor(signs: Tensor | None, gain: Tensor | None) -> Tensor | None:
    """`signs * gain` (r,), of what there is of them; None: nothing."""
    if signs is None or gain is None:
        return signs if gain is None else gain
    return signs.to(gain.dtype) * gain


def with_own(A: Tensor, B: Tensor, own_A: Tensor, own_B: Tensor) -> tuple[Tensor, Tensor]:
    """Stack a layer's own pair below the shared tensors.

    Args:
        A: (..., r, in).
        B: (E, r, out).
        own_A: (..., own_r, in).
        own_B: (..., own_r, out).

    Returns:
        A (..., r + own_r, in) and B (..., E, r + own_r, out). Each expert has the own B, so that it acts with the sum
        of the mixing weights, which is 1.
    """
    lead = own_B.shape[:-2]
    own_B = own_B.unsqueeze(-3).expand(*lead, B.shape[0], *own_B.shape[-2:])
    return torch.cat((A, own_A), -2), torch.cat((B.expand(*lead, *B.shape), own_B), -2)


def down(x: Tensor, A: Tensor, activation: str = "none", dropout: float = 0.0, training: bool = False) -> Tensor:
    """Project down: `x` (..., in) with `A` (r, in) gives `h` (..., r)."""
    return hidden(x @ A.T, activation, dropout, training)


def down_conv(x: Tensor, A: Tensor, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Tensor:
    """Project down for a convolution: A is the kernel of a narrow one, and tokens are output pixels.

    With groups, the ranks are divided among them like the channels: a rank reads the channels of its group alone.

    Args:
        x: (batch, channels, *size), with one size for each dimension of the kernel.
        A: (r, channels / groups * kernel size).
        layer: provides stride, padding, dilation and groups; r is a multiple of the groups.

    Returns:
        (batch, *output size, r); before the activation.
    """
    kernel = A.view(-1, layer.in_channels // layer.groups, *layer.kernel_size)
    a: Tensor = layer._conv_forward(x, kernel, None)
    return a.movedim(1, -1)


def down_embedding(ids: Tensor, A: Tensor, layer: nn.Embedding) -> Tensor:
    """Project down for an embedding: the columns of `A` (r, rows) at `ids` (...), as (..., r).

    `padding_idx`, `max_norm` and `scale_grad_by_freq` of the layer apply to A too, as in PEFT's LoRA. Before the
    activation.
    """
    options = (layer.padding_idx, layer.max_norm, layer.norm_type, layer.scale_grad_by_freq)
    return F.embedding(ids, A.T, *options)


def hidden(a: Tensor, activation: str = "none", dropout: float = 0.0, training: bool = False) -> Tensor:
    """The hidden state h of the input projected by A, (..., r).

    Dropout acts on h, after the activation, so the router and the experts see the same h.
    """
    h = a
    act = ACTIVATIONS[activation]
    if act is not None:
        h = act(h)
    return F.dropout(h, dropout, training) if dropout else h


def softmax(logits: Tensor) -> Tensor:
    """Softmax over experts, (..., E), in at least float32: half precision loses small expert weights."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.softmax(logits, dim=-1, dtype=dtype).to(logits.dtype)


def route(h: Tensor, R: Tensor) -> Tensor:
    """The router: `h` (..., r) with `R` (E, r) gives `p` (..., E), one distribution per token."""
    return softmax(h @ R.T)


def is_of_samples(mask: Tensor, x: Tensor) -> bool:
    """Whether a mask is (batch, tokens, samples), for rows with several samples; for x (batch, tokens, ...) or flat.

    With more dimensions of x, a mask of three is (batch, heads, tokens).
    """
    return mask.ndim == 3 and x.ndim <= 3


def pool(p: Tensor, routing: str, mask: Tensor | None = None) -> Tensor:
    """Turn `p` (..., E) per token into the mixing weights of a data-dependent routing.

    Args:
        p: expert weights per token, (batch, tokens, E) or any other leading shape.
        routing: `token`, `sequence` or `batch`.
        mask: (batch, tokens), or more of `p`'s leading dimensions, nonzero where a token counts; for `sequence` only.
            With `p` of shape (batch * tokens, E) the rows are regrouped by sample first. (batch, tokens, samples) where
            a row has several samples: nonzero where a token is of a sample.

    Returns:
        `token`: p itself. `sequence`: (batch, 1, E), broadcastable to p; p itself if a sample is one row; of p's shape
        where a row has several samples.
        `batch`: (E,).
    """
    if routing == "token":
        return p
    if routing == "batch":
        return p.reshape(-1, p.shape[-1]).mean(dim=0)
    if mask is not None and is_of_samples(mask, p):
        m = (mask != 0).to(p.dtype)
        means = (m / m.sum(1, keepdim=True).clamp(min=1)).mT @ p.view(*mask.shape[:2], -1)  # (batch, samples, E)
        return (m @ means).view(p.shape)
    if mask is not None and p.ndim == 2:
        per_sample = pool(p.view(*mask.shape, -1), "sequence", mask)  # (batch, 1, E)
        return per_sample.expand(*mask.shape, -1).reshape(p.shape)
    if p.ndim <= 2:
        return p
    if mask is None:
        return p.mean(dim=tuple(range(1, p.ndim - 1)), keepdim=True)
    m = (mask != 0).to(p.dtype)  # (batch, tokens)
    m = m / m.flatten(1).sum(1).clamp(min=1).view(-1, *([1] * (m.ndim - 1)))  # a row of padding alone: 0, not NaN
    m = m.reshape(*m.shape, *([1] * (p.ndim - m.ndim)))  # (batch, tokens, 1...)
    if p.ndim > mask.ndim + 1:
        m = m / p.shape[mask.ndim : -1].numel()
    return (p * m).sum(dim=tuple(range(1, p.ndim - 1)), keepdim=True)


def mix(h: Tensor, w: Tensor, B: Tensor, groups: int = 1) -> Tensor:
    """Project up through the weighted experts: sum over e of w_e * (h @ B_e).

    Two exact forms: combine first, `h @ (sum_e w_e B_e)`, if many tokens share one w; else `mix_expanded`. A B per
    token is never materialized.

    Args:
        h: (..., r).
        w: (E,), (batch, 1, E) (or with more dimensions of size 1) or (..., E).
        B: (E, r, out), or (E, r / groups, out) with groups.
        groups: of a convolution: equal parts of r and of out, each of which reads its own part alone.

    Returns:
        (..., out).
    """
    E, r, out = B.shape
    if groups > 1:
        parts = torch.unflatten(h, -1, (groups, r))  # (..., groups, r)
        B = torch.unflatten(B, -1, (groups, -1))  # (E, r, groups, out / groups)
        if w.ndim == 1:
            return torch.einsum("...gr,rgo->...go", parts, torch.einsum("e,ergo->rgo", w, B)).flatten(-2)
        expanded = w.unsqueeze(-1).unsqueeze(-1) * parts.unsqueeze(-3)  # (..., E, groups, r)
        return torch.einsum("...egr,ergo->...go", expanded, B).flatten(-2)
    if w.ndim == 1:
        return h @ torch.einsum("e,ero->ro", w, B)
    tokens = h.shape[1:-1].numel()
    if w.ndim == h.ndim >= 3 and w.shape[1:-1].numel() == 1 and tokens > E:
        combined = torch.einsum("be,ero->bro", w.flatten(0, -2), B)
        return torch.bmm(h.flatten(1, -2), combined).view(*h.shape[:-1], out)  # (batch, tokens, r) @ (batch, r, out)
    return mix_expanded(h, w, B)


def mix_expanded(h: Tensor, w: Tensor, B: Tensor) -> Tensor:
    """`mix` as one matrix product for any w, `concat_e(w_e * h) @ concat_e(B_e)`, whatever the sizes of the inputs."""
    expanded = (w.unsqueeze(-1) * h.unsqueeze(-2)).flatten(-2)  # (..., E * r)
    return expanded @ B.flatten(0, 1)


def lily(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router: Tensor | None,
    *,
    routing: str,
    scaling: float = 1.0,
    activation: str = "none",
    dropout: float = 0.0,
    training: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """The update that Lily adds to a frozen layer's output.

    Args:
        x: input of the layer, (batch, tokens, in) or (..., in).
        A: (r, in).
        B: (E, r, out).
        router: R (E, r) for `token`, `sequence` and `batch`; the learned logits (E,) for `static`; ignored for
            `uniform` and where E is 1.
        routing: `token`, `sequence`, `batch`, `static` or `uniform`.
        scaling: multiplies the update directly.
        activation: `none`, `relu`, `gelu` or `silu`, between A and B.
        dropout: probability, on h.
        training: whether dropout acts.
        mask: for `sequence`, nonzero where a token counts, (batch, tokens); other shapes: see `pool`.

    Returns:
        (..., out), of the dtype of the matrix products.
    """
    return up(down(x, A, activation, dropout, training), B, router, routing, scaling, mask)


def up(
    h: Tensor, B: Tensor, router: Tensor | None, routing: str, scaling: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """The update (..., out) from `h` (..., r), for a layer of any kind; see `lily` for the arguments."""
    return scaling * mix(h, weights(h, B.shape[0], router, routing, mask), B)


def static_B(B: Tensor, logits: Tensor | None) -> Tensor:
    """Mix the experts by constant weights.

    Args:
        B: (E, r, out), or (layers, E, r, out) for several layers.
        logits: (E,), or (layers, E) for several layers; None: equal weights.

    Returns:
        (r, out), or (layers, r, out).
    """
    w = B.new_full(B.shape[-3:-2], 1 / B.shape[-3]) if logits is None else softmax(logits.to(B)).to(B.dtype)
    return torch.einsum("...e,...ero->...ro", w, B)


def weights(h: Tensor, experts: int, router: Tensor | None, routing: str, mask: Tensor | None = None) -> Tensor:
    """The mixing weights of a layer: (E,), (batch, 1, E) or (..., E); see `lily` for the arguments."""
    if experts == 1 or routing == "uniform":
        return h.new_full((experts,), 1.0 / experts)
    if router is None:
        raise ValueError(f"routing {routing!r} with {experts} experts needs a router")
    if routing == "static":
        return softmax(router).to(h.dtype)
    return pool(route(h, router), routing, mask)
