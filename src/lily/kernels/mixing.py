"""How a fused node mixes the experts, and the gradients of that; see `lily.kernels.fused`.

Letters as in `functional`; `n` is the number of tokens of all samples, `C` (batch, r, out) the experts combined with a
sample's weights, `g` (n, E * r) the hidden states expanded with each token's weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lily.kernels.matmul import bmm, mm, plus_mm

# Smallest number of tokens per sample for which combining the experts is faster than expanding the tokens.
COMBINE_FROM = 32
# The same for weights that all tokens share.
COMBINE_SHARED_FROM = 4


class How(NamedTuple):
    """Options that are the same for all tokens.

    Attributes:
        routing: as in `functional.lily`.
        experts: E.
        scaling: multiplies the update.
        dtype: dtype of the large matrix products.
        activation: between A and B.
        dropout: probability, on h; 0 outside training.
        transposed: the base weight is (in, out), as `Conv1D` has it.
    """

    routing: str
    experts: int
    scaling: float
    dtype: torch.dtype
    activation: str = "none"
    dropout: float = 0.0
    transposed: bool = False


def route(h: Tensor, router: Tensor | None, how: How) -> Tensor | None:
    """p: (n, E) per token, or (E,) for `static`; None without a router."""
    if router is None:
        return None
    logits = router if how.routing == "static" else mm(h, router.to(how.dtype).t())
    return torch.softmax(logits, -1, dtype=torch.promote_types(how.dtype, torch.float32))


def _samples(x: Tensor, how: How, mask: Tensor | None) -> tuple[int, int]:
    """The number of samples (whose tokens share mixing weights) in `x`, and the tokens of each."""
    n = x[..., 0].numel()
    if how.experts == 1 or how.routing in ("batch", "static", "uniform"):
        return 1, n
    if how.routing == "sequence":
        if x.ndim > 2:
            return x.shape[0], n // x.shape[0] if x.shape[0] else 0
        if mask is not None:
            return mask.shape[0], mask.shape[1]
    return n, 1


def _shares(x: Tensor, how: How, mask: Tensor | None, p: Tensor) -> Tensor | None:
    """The weight of each token in its sample's mean, (batch, tokens); None: all equal."""
    if mask is None or how.routing != "sequence":
        return None
    tokens = _samples(x, how, mask)[1]
    m = (mask != 0).to(p.dtype).flatten(1)
    m = m / m.sum(1, keepdim=True).clamp(min=1)  # a row of padding alone gets weight 0, not NaN
    repeats = tokens // m.shape[1]
    return m if repeats == 1 else (m / repeats).repeat_interleave(repeats, 1)


def weights(p: Tensor | None, how: How, x: Tensor, mask: Tensor | None) -> Tensor:
    """The mixing weights of every sample, (batch, E)."""
    if p is None:
        return torch.full((1, how.experts), 1 / how.experts, device=x.device, dtype=how.dtype)
    if how.routing == "static":
        return p.unsqueeze(0)
    batch, tokens = _samples(x, how, mask)
    if how.routing == "token" or (tokens == 1 and mask is None):
        return p
    per_sample = p.view(batch, tokens, how.experts)
    shares = _shares(x, how, mask, p)
    if tokens == 0:
        return per_sample.sum(1)
    return per_sample.mean(1) if shares is None else torch.bmm(shares.unsqueeze(1), per_sample).squeeze(1)


def _combines(h: Tensor, w: Tensor) -> bool:
    batch, experts = w.shape
    least = COMBINE_SHARED_FROM if batch == 1 else COMBINE_FROM * batch
    return experts > 1 and h.shape[0] >= max(least, 1)


def _combine(w: Tensor, B: Tensor, how: How) -> Tensor:
    """C (batch, r, out), scaled, from the weights (batch, E)."""
    return (_scaled(w, how, B.dtype) @ B.view(how.experts, -1)).view(w.shape[0], -1, B.shape[1])


def _expand(h: Tensor, w: Tensor, how: How) -> Tensor:
    """The expanded hidden states g (n, E * r), scaled."""
    return (_scaled(_per_token(w, h), how, h.dtype).unsqueeze(2) * h.unsqueeze(1)).flatten(1)


def _scaled(w: Tensor, how: How, dtype: torch.dtype) -> Tensor:
    return (w if how.scaling == 1 else w * how.scaling).to(dtype)


def _per_token(w: Tensor, h: Tensor) -> Tensor:
    """(batch, E) -> (n, E)."""
    return w if w.shape[0] == h.shape[0] else w.repeat_interleave(h.shape[0] // w.shape[0], 0)


def mix(y: Tensor, h: Tensor, w: Tensor, B: Tensor, how: How, spare: bool) -> Tensor:
    """`y` (n, out) plus the update."""
    if not _combines(h, w):
        return _plus(y, _expand(h, w, how), B, spare)
    C = _combine(w, B, how)
    batch = w.shape[0]
    if batch == 1:
        return _plus(y, h, C[0], spare)
    update = bmm(h.view(batch, -1, h.shape[1]), C).view(y.shape)
    return y.add_(update) if spare else y + update.to(y.dtype)


def _plus(y: Tensor, g: Tensor, B: Tensor, spare: bool) -> Tensor:
    return plus_mm(y, g, B, spare) if y.dtype == g.dtype else y + mm(g, B).to(y.dtype)


def mix_backward(
    dy: Tensor, h: Tensor, w: Tensor, B: Tensor, how: How, wants_B: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients dh (n, r), dw (batch, E) if there is a router, and dB (E * r, out) from dy (n, out)."""
    experts, r = how.experts, h.shape[1]
    learns = experts > 1 and how.routing != "uniform"
    low = B.to(dy.dtype)
    dw = dB = None
    if _combines(h, w):
        batch = w.shape[0]
        C = _combine(w, low, how)
        per_sample = dy.view(batch, -1, dy.shape[1])
        if learns or wants_B:
            dC = bmm(h.view(batch, -1, r).transpose(1, 2), per_sample).view(batch, -1)
            dB = (_scaled(w, how, dC.dtype).t() @ dC).view(B.shape).to(B.dtype) if wants_B else None
            dw = (dC @ low.view(experts, -1).t()).to(w.dtype) * how.scaling if learns else None
        return bmm(per_sample, C.transpose(1, 2)).reshape(-1, r), dw, dB
    g = _expand(h, w, how)
    if wants_B:
        dB = mm(g.t(), dy).to(B.dtype)
    dg = mm(dy, low.t()).view(h.shape[0], experts, r)
    scaled = _scaled(_per_token(w, h), how, dg.dtype)
    dh = torch.bmm(scaled.unsqueeze(1), dg).squeeze(1)
    if learns:
        dw = torch.bmm(dg, h.unsqueeze(2)).squeeze(2).to(w.dtype) * how.scaling
        if w.shape[0] != h.shape[0]:
            dw = dw.view(w.shape[0], h.shape[0] // w.shape[0], experts).sum(1)
    return dh, dw, dB


def route_backward(
    dh: Tensor, dw: Tensor, h: Tensor, p: Tensor, router: Tensor, how: How, x: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient dh including the part through the router, and the gradient of the router."""
    if how.routing == "static":
        dw = dw[0]
        return dh, (p * (dw - (p * dw).sum())).to(router.dtype)
    dp = dw
    if how.routing != "token":
        batch, tokens = _samples(x, how, mask)
        shares = _shares(x, how, mask, p)
        if shares is None:
            dp = (dw / max(tokens, 1)).unsqueeze(1).expand(batch, tokens, -1).reshape(p.shape)
        else:
            dp = (shares.unsqueeze(2) * dw.unsqueeze(1)).view(p.shape)
    dlogits = (p * (dp - (p * dp).sum(-1, keepdim=True))).to(h.dtype)
    return torch.addmm(dh, dlogits, router.to(h.dtype)), mm(dlogits.t(), h).to(router.dtype)
