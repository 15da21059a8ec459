"""What `lily plan` reports: a plan and its costs as plain values, made without reading a weight."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lily.plan.budget import Choice, choose, equal_lora_rank, lora_compute, lora_parameters
from lily.plan.config import LilyConfig
from lily.plan.cost import Estimate, estimate
from lily.plan.select import is_causal, select_targets, whole_layers
from lily.plan.sharing_plan import SAVED_HEADS, Group, SharingPlan, build_plan
from lily.plan.specs import ModuleSpec

if TYPE_CHECKING:
    from torch import nn

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class Wish:
    """What the user asks of a plan; None leaves the choice to `lily.budget.choose`."""

    targets: list[str] | str = "all-linear"
    exclude: list[str] | str | None = None
    r: int | None = None
    num_A: int | None = None
    stride_A: int | None = None
    num_B: int | None = None
    parameters: int | None = None
    match_lora: int | None = None
    routing: str | None = None
    task: str | None = None
    batch: int = 8
    tokens: int = 512
    target_parameters: list[str] | None = None
    heads: list[str] | None = None


@dataclass(frozen=True)
class GroupReport:
    """One row of the sharing table. `blocks` are the names that share an A, `sharing` their layer numbers.

    `kind` and `shape`, of the base weights, are `lily.plan.Group`'s.
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
    """What LoRA would get on the same layers: the rank to be matched, else the largest with no more parameters."""

    r: int
    parameters: int
    share_of_compute: float
    checkpoint_bytes: int


@dataclass(frozen=True)
class PlanReport:
    """What `lily plan` says: a value with numbers only, rendered by `render_plan` or as JSON by `to_dict`.

    Attributes:
        model: as the user named it.
        dtype: of the frozen weights.
        model_parameters: of the frozen model.
        routing: the adapter's routing.
        options: `LilyConfig` arguments that give this plan (r, num_A or stride_A, num_B).
        groups: the sharing.
        parameters: trainable parameters, by part (A, B, router) and in total.
        share_of_model: trainable over frozen parameters.
        batch: samples of a step, for the estimates.
        tokens: tokens of a sample, for the estimates.
        costs: multiply-adds, file size, training memory.
        lora: LoRA with the same budget.
        rank_advantage: Lily's rank over LoRA's.
        reason: why this shape.
    """

    model: str
    dtype: str
    model_parameters: int
    routing: str
    options: dict[str, int]
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
        """How many layers are adapted."""
        return sum(group.layers for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


# --- from a model to a report ---------------------------------------------------------------------------------------


def plan_for(
    model: nn.Module, wish: Wish, *, name: str, dtype: str = "float32", base_bytes: int | None = None
) -> PlanReport:
    """The report for a model, which may be on the meta device.

    Args:
        model: the base model.
        wish: what the user asks.
        name: how to call the model in the report.
        dtype: of the frozen weights, for the memory estimate.
        base_bytes: what the frozen weights take, where that does not follow from `dtype`.

    Raises:
        LilyError: if the targets match nothing, the budget is too small, or a value cannot work.
    """
    asked = LilyConfig(
        target_modules=wish.targets,
        target_parameters=wish.target_parameters,
        exclude_modules=wish.exclude,
        modules_to_save=SAVED_HEADS.get(wish.task or "") or wish.heads,
        routing=wish.routing,
        task_type=wish.task,
    )
    routing = asked.default_routing(True) if asked.routing_is_default and is_causal(model) else str(asked.routing)
    modules = select_targets(model, asked)  # replaces all-linear by the names it stands for
    choice = choose(
        modules,
        parameters=wish.parameters,
        match_lora=wish.match_lora,
        r=wish.r,
        num_A=wish.num_A,
        stride_A=wish.stride_A,
        num_B=wish.num_B,
        routing=routing,
        targets=asked.target_modules,
    )
    found: dict[str, Any] = {
        "target_modules": asked.target_modules,
        "target_parameters": asked.target_parameters,
    }
    plan = build_plan(modules, LilyConfig(routing=routing, **found, **choice.options))
    return report_of(model, modules, plan, choice, wish, name=name, dtype=dtype, base_bytes=base_bytes)


def report_of(
    model: nn.Module,
    modules: Sequence[ModuleSpec],
    plan: SharingPlan,
    choice: Choice,
    wish: Wish,
    *,
    name: str,
    dtype: str,
    base_bytes: int | None,
) -> PlanReport:
    """What a plan says of a model: sharing, counts, costs, and the LoRA of equal size.

    Args:
        model: without weights.
        modules: the adapted layers.
        plan: made of them.
        choice: how its shape was chosen.
        wish: what was asked.
        name: of the model.
        dtype: of its weights.
        base_bytes: of its weights where they are not all of that type.
    """
    size = sum(p.numel() for p in model.parameters())
    whole = whole_layers(model, modules, wish.exclude)
    costs = estimate(
        plan,
        modules,
        batch=wish.batch,
        tokens=wish.tokens,
        base_parameters=size,
        linear=list(_linear_layers(model)),
        weight_bytes=WEIGHT_BYTES.get(dtype, 4),
        base_bytes=base_bytes,
        whole=whole,
    )
    total = plan.parameters
    # Lily fills a budget up to the grain of its rank; LoRA of the rank to be matched must not lose it to that grain.
    budget = total.total if wish.match_lora is None else lora_parameters(whole, wish.match_lora)
    lora = _lora(whole, budget, wish.batch * wish.tokens)
    return PlanReport(
        model=name,
        dtype=dtype,
        model_parameters=size,
        routing=plan.routing,
        options=choice.options,
        groups=tuple(_group(g, plan.routers_of(g)) for g in plan.groups),
        parameters={"A": total.A, "B": total.B, "router": total.router, "total": total.total},
        share_of_model=total.total / size,
        batch=wish.batch,
        tokens=wish.tokens,
        costs=costs,
        lora=lora,
        rank_advantage=choice.r / lora.r,
        reason=choice.reason,
    )


def _group(group: Group, routers: int) -> GroupReport:
    numbers = iter(depth_numbers(group.members))
    sharing = tuple(compress([next(numbers) for _ in block]) for block in group.blocks)
    shared = len(group.blocks) * group.r * group.in_features + group.num_B * group.r * group.out_features
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
        shared + routers,
        group.blocks,
    )


def _lora(modules: Sequence[ModuleSpec], budget: int, tokens: int) -> LoraReport:
    r = equal_lora_rank(modules, budget)
    size = lora_parameters(modules, r)
    return LoraReport(r, size, lora_compute(modules, r, tokens), 4 * size)


def _linear_layers(model: nn.Module) -> Iterator[ModuleSpec]:
    """Every nn.Linear and Conv1D (GPT-2's, which keeps its sizes as nx and nf) of the model, adapted or not."""
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
    """The layer number in each name (`model.layers.7.mlp.up_proj` is 7), or positions where that names no one layer."""
    found = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names]
    numbers = [int(match[1]) for match in found if match]
    return numbers if len(set(numbers)) == len(names) else list(range(len(names)))


# --- from a name to a model on the meta device ----------------------------------------------------------------------


# --- the dry run of a recipe ----------------------------------------------------------------------------------------


# --- rendering ------------------------------------------------------------------------------------------------------


def dtype_of(config: Any) -> str:
    """The data type that a model configuration states, float32 if it states none."""
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
