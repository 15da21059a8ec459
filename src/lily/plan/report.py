"""What `lily plan` reports: a plan and its costs as plain values, computed without reading a weight."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lily.plan.budget import equal_lora_rank, lora_compute, lora_parameters
from lily.plan.cost import Estimate, estimate
from lily.plan.decide import Decided, decide
from lily.plan.select_parts import whole_layers
from lily.plan.sharing_plan import SAVED_HEADS, Group, SharingPlan
from lily.plan.specs import ModuleSpec

if TYPE_CHECKING:
    from torch import nn

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
SHAPE = ("r", "num_A", "stride_A", "num_B", "parameters", "match_lora")  # arguments of `choose` in a `PlanRequest`


@dataclass(frozen=True)
class PlanRequest:
    """Settings of `plan_for`; `lily.plan.budget.choose` fills what is None of the shape."""

    targets: list[str] | str = "all-linear"
    exclude: list[str] | str | None = None
    r: int | None = None
    num_A: int | None = None
    stride_A: int | None = None
    num_B: int | None = None
    parameters: int | None = None
    match_lora: int | None = None
    routing: str | None = None
    distinct: str | None = None
    gain: str = "none"
    own_r: int = 0
    task: str | None = None
    batch: int = 8
    tokens: int = 512
    target_parameters: list[str] | None = None


@dataclass(frozen=True)
class GroupReport:
    """One row of the sharing table.

    Attributes:
        name: of the group.
        kind: as in `lily.plan.Group`.
        shape: of the base weights, as in `lily.plan.Group`.
        in_features: inputs of a layer.
        out_features: outputs of a layer.
        layers: number of layers.
        sharing: layer numbers of each block, such as `0-13`.
        r: rank.
        num_B: experts.
        parameters: trainable parameters, routers, gains and own A and B included.
        blocks: names of the layers that share an A.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    in_features: int
    out_features: int
    layers: int
    sharing: tuple[str, ...]
    r: int
    num_B: int
    parameters: int
    blocks: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class LoraReport:
    """LoRA on the same layers: of the rank to match, else of the largest rank with no more parameters."""

    r: int
    parameters: int
    share_of_compute: float
    checkpoint_bytes: int
    scale: float


@dataclass(frozen=True)
class PlanReport:
    """The plan of a model in numbers; `render_plan` prints it, `to_dict` gives it as JSON values.

    Attributes:
        model: name that the user gave.
        dtype: of the frozen weights.
        model_parameters: number of parameters of the base model.
        routing: of the adapter.
        options: `LilyConfig` arguments that give this plan (r, num_A or stride_A, num_B).
        scaling: of the update, unless a group has another one.
        groups: rows of the sharing table.
        parameters: trainable parameters, by part (A, B, router) and in total.
        share_of_model: trainable over frozen parameters.
        batch: samples per step, for the estimates.
        tokens: tokens per sample, for the estimates.
        costs: multiply-adds, file size, training memory.
        lora: LoRA with the same budget.
        rank_advantage: Lily's rank over LoRA's.
        reason: sentences that explain the shape.
    """

    model: str
    dtype: str
    model_parameters: int
    routing: str
    options: dict[str, int]
    scaling: float
    groups: tuple[GroupReport, ...]
    parameters: dict[str, int]
    share_of_model: float
    batch: int
    tokens: int
    costs: Estimate
    lora: LoraReport
    rank_advantage: float
    reason: tuple[str, ...]

    @property
    def layers(self) -> int:
        """Number of adapted layers."""
        return sum(group.layers for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


def plan_for(model: nn.Module, request: PlanRequest, *, name: str, dtype: str = "float32") -> PlanReport:
    """The report for a model.

    Args:
        model: the base model; may be on the meta device.
        request: targets, shape and sizes of a batch.
        name: the model's name in the report.
        dtype: of the frozen weights, for the memory estimate.

    Raises:
        LilyError: if the targets match nothing, the budget is too small, or a value is not allowed.
    """
    config = {
        "target_modules": request.targets,
        "target_parameters": request.target_parameters,
        "exclude_modules": request.exclude,
        "modules_to_save": SAVED_HEADS.get(request.task or ""),
        "routing": request.routing,
        "distinct": request.distinct,
        "gain": request.gain,
        "own_r": request.own_r,
        "task_type": request.task,
    }
    shape = {key: getattr(request, key) for key in SHAPE}
    match_lora, batch, tokens = request.match_lora, request.batch, request.tokens
    decided = decide(model, config, shape)
    return report_of(model, decided, name=name, dtype=dtype, batch=batch, tokens=tokens, match_lora=match_lora)


def report_of(
    model: nn.Module,
    decided: Decided,
    *,
    name: str,
    dtype: str,
    batch: int,
    tokens: int,
    match_lora: int | None = None,
    base_bytes: int | None = None,
    lora_alpha: float | None = None,
) -> PlanReport:
    """The sharing, sizes and costs of an adapter, and the LoRA of equal size.

    Args:
        model: the base model; may be on the meta device.
        decided: the adapter on it.
        name: the model's name in the report.
        dtype: of the frozen weights.
        batch: samples per step, for the estimates.
        tokens: tokens per sample, for the estimates.
        match_lora: rank of the LoRA whose size was the budget; default: the largest LoRA that is not larger.
        base_bytes: size of the frozen weights if it does not follow from `dtype`.
        lora_alpha: of the LoRA; default: twice its rank.
    """
    plan, modules = decided.plan, decided.modules
    size = sum(p.numel() for p in model.parameters())
    whole = whole_layers(model, modules, decided.config.exclude_modules)
    costs = estimate(
        plan,
        modules,
        batch=batch,
        tokens=tokens,
        base_parameters=size,
        linear=list(linear_layers(model)),
        weight_bytes=WEIGHT_BYTES.get(dtype, 4),
        base_bytes=base_bytes,
        whole=whole,
    )
    total = plan.parameters
    # r is whole, so Lily may stay below the budget; the LoRA that set the budget keeps its rank nevertheless.
    budget = total.total if match_lora is None else lora_parameters(whole, match_lora)
    lora = _lora(whole, budget, batch * tokens, lora_alpha)
    return PlanReport(
        model=name,
        dtype=dtype,
        model_parameters=size,
        routing=plan.routing,
        options=decided.choice.options,
        scaling=decided.scaling,
        groups=tuple(_group(g, plan) for g in plan.groups),
        parameters={"A": total.A, "B": total.B, "router": total.router, "own": total.own, "total": total.total},
        share_of_model=total.total / size,
        batch=batch,
        tokens=tokens,
        costs=costs,
        lora=lora,
        rank_advantage=decided.choice.r / lora.r,
        reason=decided.choice.reason,
    )


def _group(group: Group, plan: SharingPlan) -> GroupReport:
    numbers = iter(depth_numbers(group.members))
    sharing = tuple(compress([next(numbers) for _ in block]) for block in group.blocks)
    shared = len(group.blocks) * group.r * group.in_features + group.num_B * group.r * group.reach
    return GroupReport(
        group.name,
        group.kind,
        group.shape,
        group.in_features,
        group.out_features,
        len(group.members),
        sharing,
        group.r,
        group.num_B,
        shared + plan.routers_of(group) + plan.own_of(group),
        group.blocks,
    )


def _lora(modules: Sequence[ModuleSpec], budget: int, tokens: int, alpha: float | None) -> LoraReport:
    r = equal_lora_rank(modules, budget)
    size = lora_parameters(modules, r)
    return LoraReport(r, size, lora_compute(modules, r, tokens), 4 * size, 2.0 if alpha is None else alpha / r)


def linear_layers(model: nn.Module) -> Iterator[ModuleSpec]:
    """Every nn.Linear and Conv1D (GPT-2's, whose sizes are nx and nf) of the model, adapted or not."""
    for name, module in model.named_modules():
        if isinstance(out := getattr(module, "out_features", getattr(module, "nf", None)), int):
            yield ModuleSpec(name, int(getattr(module, "in_features", getattr(module, "nx", 0))), out)


def compress(numbers: Sequence[int]) -> str:
    """Layer numbers in runs: `[0, 1, 2, 5]` as `0-2,5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def depth_numbers(names: Sequence[str]) -> list[int]:
    """The layer number in each name (`model.layers.7.mlp.up_proj` is 7), or positions if the numbers are not unique."""
    matches = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names]
    numbers = [int(match[1]) for match in matches if match]
    return numbers if len(set(numbers)) == len(names) else list(range(len(names)))


def dtype_of(config: Any) -> str:
    """The data type in a model configuration; float32 if there is none."""
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
