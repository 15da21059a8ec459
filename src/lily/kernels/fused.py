"""A frozen base layer and its adapter in one autograd node.

Computes the same as `functional`, which its tests compare it with, but faster:

- the update is accumulated into the base layer's output by its matrix product, without a tensor for it;
- `x` is the only activation saved for backward, which recomputes h and p by one narrow product (saved, they would take
  more memory than LoRA's narrower h); so is a layer's own arrangement of the shared A;
- the gradients of `x` from the base layer and from A are accumulated in one tensor;
- half-precision inputs are multiplied in half precision, as under autocast, without a float32 copy.

Letters as in `functional`; `n` is the number of tokens of all samples, `C` (batch, r, out) the experts combined with a
sample's weights, `g` (n, E * r) the hidden states expanded with each token's weights.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lily import functional
from lily.kernels.matmul import mm, plus_mm
from lily.kernels.mixing import How, mix, mix_backward, route, route_backward, weights

# Up to this number of tokens, call overhead dominates a forward without gradients.
FEW = 16


def product_dtype(x: Tensor, A: Tensor, B: Tensor) -> torch.dtype | None:
    """The dtype in which the fast path multiplies, or None if only the reference supports the inputs.

    Half-precision inputs keep their dtype for float32 adapters, too; under autocast it is autocast's dtype.
    """
    if A.dtype != B.dtype or not x.is_floating_point() or A.device != x.device or A.ndim != 2:
        return None
    if not torch.compiler.is_compiling() and not _is_ordinary(A, B):
        return None
    if torch.is_autocast_enabled(x.device.type):
        low = torch.get_autocast_dtype(x.device.type)
        return low if x.dtype in (torch.float32, low) else None
    half = x.dtype in (torch.float16, torch.bfloat16)
    return x.dtype if x.dtype == A.dtype or (half and A.dtype == torch.float32) else None


def _plain_products(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Disable autocast within: `How.dtype` accounts for it already."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else NOTHING


NOTHING = contextlib.nullcontext()


def _is_ordinary(*tensors: Tensor) -> bool:
    """Whether the tensors are plain: no subclass, no functional transform."""
    return all(type(t) in PLAIN for t in tensors) and not torch._C._are_functorch_transforms_active()


PLAIN = (Tensor, torch.nn.Parameter)


class Update(NamedTuple):
    """An adapter's update in one forward.

    Attributes:
        A: (r, in).
        B: (E * r, out).
        router: as in `functional.lily`.
        how: the options.
        mask: (batch, tokens), for `sequence`.
        rows: (r,), which row of A each rank takes, as of `functional.layer_A`; None: its own.
        factor: (r,), what its row is multiplied by: signs, a gain, or both; None: 1.
        own_A: (own_r, in), as of `functional.with_own`; None: there is no own pair.
        own_B: (own_r, out).
    """

    A: Tensor
    B: Tensor
    router: Tensor | None
    how: How
    mask: Tensor | None = None
    rows: Tensor | None = None
    factor: Tensor | None = None
    own_A: Tensor | None = None
    own_B: Tensor | None = None

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """A (r + own_r, in) and B (E * (r + own_r), out) of the layer."""
        A = functional.layer_A(self.A, self.rows, None, self.factor)
        if self.own_A is None or self.own_B is None:
            return A, self.B
        A, B = functional.with_own(A, self.B.view(self.how.experts, -1, self.B.shape[1]), self.own_A, self.own_B)
        return A, B.flatten(0, 1)

    def shared(self, dA: Tensor, dB: Tensor | None, factor: bool) -> tuple[Tensor | None, ...]:
        """The gradients of A, B, factor (if it is wanted), own_A and own_B, of those of `pair`."""
        dfactor, down, up = None, None, None
        r = self.A.shape[0]
        if self.own_A is not None:
            dA, down = dA[:r], dA[r:].to(self.own_A.dtype)
            if dB is not None:
                by_expert = dB.view(self.how.experts, -1, dB.shape[1])
                dB, up = by_expert[:, :r].reshape(self.B.shape), by_expert[:, r:].sum(0)
        if self.factor is not None:
            if factor:
                taken = self.A if self.rows is None else self.A.index_select(0, self.rows)
                dfactor = (dA * taken).sum(1).to(self.factor.dtype)
            dA = self.factor.to(dA.dtype).unsqueeze(-1) * dA
        if self.rows is not None:
            dA = torch.zeros_like(self.A).index_add_(0, self.rows, dA)
        return dA, dB, dfactor, down, up


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, update: Update) -> Tensor:
    """A frozen linear layer with its update.

    Args:
        x: (..., in).
        weight: (out, in), or (in, out) if `how.transposed`; must not require a gradient.
        bias: (out,); may require one.
        update: the adapter's.

    Returns:
        (..., out), in `how.dtype`.
    """
    return _apply(x, weight, bias, None, update)


def plus_update(result: Tensor, x: Tensor, update: Update) -> Tensor:
    """Add the update to the output of any other base layer, such as a quantized or trainable one.

    Args:
        result: (..., out); not modified.
        x: (..., in).
        update: the adapter's.

    Returns:
        (..., out), in the dtype of `result`.
    """
    return _apply(x, None, None, result, update)


def _apply(x: Tensor, weight: Tensor | None, bias: Tensor | None, result: Tensor | None, update: Update) -> Tensor:
    if torch.is_grad_enabled():
        return cast(Tensor, _Node.apply(x, weight, bias, result, *update))  # type: ignore[no-untyped-call]
    if weight is not None and not torch.compiler.is_compiling() and 0 < x.numel() <= FEW * x.shape[-1]:
        y = _decode(x, weight, bias, update)
        if y is not None:
            return y
    return _forward(x, weight, bias, result, update)[0]


def _decode(x: Tensor, weight: Tensor, bias: Tensor | None, update: Update) -> Tensor | None:
    """The output for a few tokens with weights per token, in as few calls as possible, because calls dominate.

    None for other options.
    """
    router, how, mask = update.router, update.how, update.mask
    alone = how.routing == "sequence" and mask is None and x.ndim > 2 and x.numel() == x.shape[0] * x.shape[-1]
    per_token = (alone or how.routing in ("token", "static")) and how.experts > 1 and router is not None
    plain = not how.transposed and how.activation == "none" and not how.dropout
    if not (per_token and plain and x.dtype == update.A.dtype == weight.dtype == how.dtype):
        return None
    A, B = update.pair
    y = F.linear(x, weight, bias)
    h = F.linear(x, A)
    logits = router if how.routing == "static" else F.linear(h, router)  # type: ignore[arg-type]
    p = torch.softmax(logits, -1) if how.dtype == torch.float32 else functional.softmax(logits)  # type: ignore[arg-type]
    g = (p.unsqueeze(-1) * h.unsqueeze(-2)).view(-1, B.shape[0])
    y.view(-1, B.shape[1]).addmm_(g, B, alpha=how.scaling)
    return y


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, result, *update = inputs
        y, weight, dropped = _forward(x, weight, bias, result, Update(*update))
        A, B, router, how, mask, *apart = update
        ctx.how = how
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, A, B, router, mask, *apart, *dropped)
        return y.detach()  # not a view: autograd would refuse in-place changes of one, as by ReLU(inplace=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, dy)
        how: How = ctx.how
        x, weight, update, dropped = _saved(ctx)
        router, mask, (A, B) = update.router, update.mask, update.pair
        wants_x, _, wants_bias, wants_result, wants_A, wants_B, wants_router = ctx.needs_input_grad[:7]
        wants_apart = ctx.needs_input_grad[10:]  # factor, own_A, own_B
        with _plain_products(x):
            wide = dy.reshape(-1, dy.shape[-1])
            dbias = wide.sum(0).to(ctx.bias_dtype) if wants_bias else None
            wide = wide.to(how.dtype)
            rows = x.reshape(-1, x.shape[-1]).to(how.dtype)
            down = A.to(how.dtype)
            h, slope = dropped or activate(mm(rows, down.t()), how.activation)
            p = route(h, router, how)
            dh, dw, dB = mix_backward(wide, h, weights(p, how, x, mask), B, how, wants_B or wants_apart[2])
            drouter = None
            if dw is not None and p is not None and router is not None:
                dh, drouter = route_backward(dh, dw, h, p, router, how, x, mask)
            da = dh if slope is None else dh * slope
            dA: Tensor | None = None
            dapart: list[Tensor | None] = [None, None, None]
            if wants_A or any(wants_apart):
                dA, dB, *dapart = update.shared(mm(da.t(), rows).to(A.dtype), dB, wants_apart[0])
            dx = None
            if wants_x and weight is None:
                dx = mm(da, down).view(x.shape).to(x.dtype)
            elif wants_x:
                through_base = mm(wide, weight.t() if how.transposed else weight)
                dx = plus_mm(through_base, da, down, spare=True).view(x.shape).to(x.dtype)
        dresult = dy if wants_result else None
        return dx, None, dbias, dresult, dA, dB, drouter if wants_router else None, None, None, None, *dapart


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, result: Tensor | None, update: Update
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """The output, the base weight in `how.dtype`, and h and dh/da if dropout prevents recomputing them."""
    router, how, mask = update.router, update.how, update.mask
    A, B = update.pair
    with _plain_products(x):
        low = x.to(how.dtype)
        if result is None:
            assert weight is not None
            weight = weight.to(how.dtype)
            y = _base(low, weight, None if bias is None else bias.to(how.dtype), how.transposed)
        else:
            y = result
        a = mm(low.reshape(-1, x.shape[-1]), A.to(how.dtype).t())
        h, slope = activate(a, how.activation, how.dropout)
        w = weights(route(h, router, how), how, x, mask)
        rows = mix(y.reshape(-1, y.shape[-1]), h, w, B.to(how.dtype), how, spare=result is None)
        return rows.view(y.shape), weight, (h, cast(Tensor, slope)) if how.dropout else ()


def _saved(ctx: Any) -> tuple[Tensor, Any, Update, list[Tensor]]:
    """The input, the base weight or None, the update, and what dropout made necessary to keep."""
    x, weight, A, B, router, mask, rows, factor, own_A, own_B, *dropped = ctx.saved_tensors
    return x, weight, Update(A, B, router, ctx.how, mask, rows, factor, own_A, own_B), dropped


def _base(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return F.linear(x, weight, bias)
    assert bias is not None
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


def activate(a: Tensor, activation: str, dropout: float = 0.0) -> tuple[Tensor, Tensor | None]:
    """The hidden state h of `a` (n, r), and dh/da; None where that is 1."""
    slope: Tensor | None = None
    h = a
    if activation == "relu":
        h, slope = F.relu(a), (a > 0).to(a.dtype)
    elif activation == "silu":
        s = torch.sigmoid(a)
        h, slope = a * s, s * (1 + a * (1 - s))
    elif activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(a / math.sqrt(2)))
        h, slope = a * cdf, cdf + a * torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    if dropout:
        keep = F.dropout(torch.ones_like(h), dropout)
        h, slope = h * keep, keep if slope is None else slope * keep
    return h, slope


def _differentiable_backward(ctx: Any, dy: Tensor) -> Any:
    """The gradients by the reference, so that they can be differentiated again."""
    how: How = ctx.how
    x, weight, update, _ = _saved(ctx)
    router, mask = update.router, update.mask
    if how.dropout:
        raise RuntimeError("Lily's dropout cannot be differentiated twice; set dropout=0 or call eval()")
    names = ("A", "B", "factor", "own_A", "own_B")
    inputs: dict[str, Tensor | None] = {"x": x, "router": router, **{name: getattr(update, name) for name in names}}
    wanted = {name: t for name, t in inputs.items() if t is not None and t.requires_grad}
    with _plain_products(x):
        low_x, low_A, low_B = (t.to(how.dtype) for t in (x, *update.pair))
        low_router = None if router is None else router.to(how.dtype)
        experts = low_B.view(how.experts, -1, low_B.shape[1])
        y = functional.lily(
            low_x, low_A, experts, low_router, routing=how.routing, scaling=how.scaling, activation=how.activation,
            mask=mask,
        )  # fmt: skip
        if weight is not None:
            y = y + low_x @ (weight if how.transposed else weight.t())
        grads = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype), create_graph=True, allow_unused=True)
    by_name = dict(zip(wanted, grads, strict=True))
    dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    dresult = dy if ctx.needs_input_grad[3] else None
    dx, dA, dB, drouter, *dapart = (by_name.get(n) for n in ("x", "A", "B", "router", "factor", "own_A", "own_B"))
    return dx, None, dbias, dresult, dA, dB, drouter, None, None, None, *dapart
