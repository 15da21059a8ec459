"""Compute and memory of a plan, before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lily.plan.options import DYNAMIC
from lily.plan.sharing_plan import SharingPlan
from lily.plan.specs import EMBEDDING, PARAMETERS, ModuleSpec, base_compute, require_modules, require_positive


@dataclass(frozen=True)
class Compute:
    """Multiply-adds per token (of a convolution: per pixel), summed over the adapted layers.

    In a convolution with groups, out is the outputs of one group, since a rank reaches no more.

    Attributes:
        base: the frozen layers: in * out; for an embedding, which looks up, out.
        down: h = x A^T: r * in; for an embedding 0. Here and below own ranks count as ranks.
        router: h R^T: r * num_B with dynamic routing and more than one expert, else 0.
        expand_first: concat(w_e h) concat(B_e): num_B * r * out.
        combine_first: h (sum w_e B_e): r * out, plus `combine` for every distinct w.
        combine: sum w_e B_e: num_B * r * out per combination; 0 with one expert.
        parameters: the updates of adapted parameters, num_B * r * out + r * in * out for each matrix, once for all
            tokens of the batch; all experts count, in `base` too.
        tokens_per_combine: number of tokens that share one combination: 1 (token), the tokens of a sample (sequence)
            or of the batch (all others).
        form: the cheaper form, `expand-first` or `combine-first`.
        share: compute of the adapter in that form, as a share of `base`.
        share_expand_first: the same in the expand-first form.
        share_combine_first: the same in the combine-first form.
    """

    base: int
    down: int
    router: int
    expand_first: int
    combine_first: int
    combine: int
    parameters: int
    tokens_per_combine: int
    form: str
    share: float
    share_expand_first: float
    share_combine_first: float


@dataclass(frozen=True)
class Memory:
    """Training memory in bytes, an estimate: see `estimate`."""

    weights: int
    adapter: int
    activations: int
    total: int


@dataclass(frozen=True)
class Estimate:
    """Compute, file size and training memory of a plan."""

    compute: Compute
    checkpoint_bytes: int
    memory: Memory


def estimate(
    plan: SharingPlan,
    modules: Sequence[ModuleSpec],
    *,
    batch: int = 1,
    tokens: int = 512,
    base_parameters: int | None = None,
    linear: Sequence[ModuleSpec] | None = None,
    weight_bytes: int = 4,
    base_bytes: int | None = None,
    whole: Sequence[ModuleSpec] | None = None,
) -> Estimate:
    """Estimate the compute, file size and training memory of a plan.

    The file holds every shared tensor once, in float32: `4 * parameters` bytes (and a header of a few KB).
    Memory, with an adapter in float32 and Adam, without gradient checkpointing:

        weights     = weight_bytes * base_parameters
        adapter     = 16 * parameters               # weight, gradient and Adam's two moments
        activations = batch * tokens * (weight_bytes * sum over all linear layers of (in + out)
                                        + 4 * sum over adapted layers of (r + own_r + num_B))
                      + weight_bytes * sum over adapted parameters of in * out    # the updated weights

    The activations are a rough estimate: the input and output of every linear layer count once, as a proxy for what the
    layers around it store; attention scores, dropout masks and allocator overhead are not included.

    Args:
        plan: the sharing plan.
        modules: the layers it adapts.
        batch: samples per step.
        tokens: tokens per sample.
        base_parameters: parameters of the whole frozen model; default: of the adapted layers.
        linear: all linear layers of the model; default: the adapted ones.
        weight_bytes: bytes per frozen weight and per activation: 4 for float32, 2 for bfloat16.
        base_bytes: bytes of the frozen weights, if they are quantized.
        whole: the whole layers that contain `modules`, relative to which compute is reported; default: `modules`.

    Raises:
        LilyError: if there are no layers, or batch or tokens is not positive.
    """
    require_modules(modules)
    require_positive(batch=batch, tokens=tokens)
    if base_parameters is None:
        base_parameters = sum(m.experts * m.in_features * m.out_features for m in modules)
    trained = plan.parameters.total
    weights, adapter = weight_bytes * base_parameters if base_bytes is None else base_bytes, 16 * trained
    wide = sum(m.in_features + m.out_features for m in (modules if linear is None else linear))
    hidden = sum(len(g.members) * (g.r + g.own_r + g.num_B) for g in plan.groups if g.kind not in PARAMETERS)
    updated = sum(len(g.members) * g.in_features * g.out_features for g in plan.groups if g.kind in PARAMETERS)
    activations = batch * tokens * (weight_bytes * wide + 4 * hidden) + weight_bytes * updated
    memory = Memory(weights, adapter, activations, weights + adapter + activations)
    return Estimate(
        _compute(plan, batch, tokens, base_compute(modules if whole is None else whole)), 4 * trained, memory
    )


def _compute(plan: SharingPlan, batch: int, tokens: int, base: int) -> Compute:
    counted = [(g, len(g.members)) for g in plan.groups]
    layers = [(g, n) for g, n in counted if g.kind not in PARAMETERS]
    down = sum(n * (g.r + g.own_r) * g.in_features for g, n in layers if g.kind != EMBEDDING)
    updates = sum(
        n * (g.r + g.own_r) * g.out_features * (g.num_B + g.in_features) for g, n in counted if g.kind in PARAMETERS
    )
    router = sum(n * g.r * g.num_B for g, n in layers if g.num_B > 1 and plan.routing in DYNAMIC)
    expand = sum(n * g.num_B * (g.r + g.own_r) * g.reach for g, n in layers)
    shared = sum(n * (g.r + g.own_r) * g.reach for g, n in layers)
    combine = sum(n * g.num_B * (g.r + g.own_r) * g.reach for g, n in layers if g.num_B > 1)
    per_combine = {"token": 1, "sequence": tokens}.get(plan.routing, batch * tokens)
    by_form = {
        "expand-first": (down + router + expand + updates / (batch * tokens)) / base,
        "combine-first": (down + router + shared + combine / per_combine + updates / (batch * tokens)) / base,
    }
    form = min(by_form, key=lambda name: by_form[name])
    shares = (by_form[form], *by_form.values())
    return Compute(base, down, router, expand, shared, combine, updates, per_combine, form, *shares)
