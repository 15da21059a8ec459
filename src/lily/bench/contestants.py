"""The contestants: the frozen model, LoRA, stock Lily and this package's Lily, on the same base weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import peft
import torch
from torch import Tensor, nn

import lily
from lily.bench.subjects import Subject
from lily.errors import LilyError
from lily.plan.budget import choose, equal_lora_rank, lora_parameters
from lily.plan.options import ROUTINGS

FROZEN, LORA, LORA_RANK, STOCK, MERGED = "frozen", "LoRA", "LoRA, equal rank", "stock Lily", "Lily merged"
NAMES = (FROZEN, LORA, LORA_RANK, STOCK, *(f"Lily {routing}" for routing in ROUTINGS), MERGED)
# Structures with at most the parameters of LoRA, by the largest rank; measured when they are named.
PAIR: dict[str, Any] = {"num_A": 1, "num_B": 1, "distinct": "none"}
STRUCTURES: dict[str, dict[str, Any]] = {
    "Lily pair": PAIR,
    "Lily permuted": PAIR | {"distinct": "permute"},
    "Lily gains": PAIR | {"distinct": "permute", "gain": "signs"},
    "Lily own": PAIR | {"distinct": "permute", "own_r": 2},
}


@dataclass(frozen=True)
class Contestant:
    """A model that is measured."""

    name: str  # one of `NAMES` or `STRUCTURES`
    model: nn.Module  # shares its frozen weights with all contestants except the merged one
    rank: int  # of its updates; 0 for the frozen model
    parameters: int  # number that train


def contestants(subject: Subject, options: dict[str, Any], names: Sequence[str] = NAMES) -> list[Contestant]:
    """Build the contestants, with small random adapter weights as after some training.

    Args:
        subject: the base model.
        options: `r`, `num_A` (or `stride_A`), `num_B` and `scaling` of Lily; LoRA's rank follows from them.
        names: contestants to build, from `NAMES` and `STRUCTURES`.

    Raises:
        LilyError: for an unknown name.
    """
    if unknown := [name for name in names if name not in (*NAMES, *STRUCTURES)]:
        known = ", ".join(map(repr, (*NAMES, *STRUCTURES)))
        raise LilyError(f"--contestants: {unknown[0]!r} is unknown; choose from {known}")
    config = lily.LilyConfig(target_modules=subject.targets, routing="token", **options)
    modules = lily.select_modules(subject.base, config)
    plan = lily.build_plan(modules, config)
    targets = sorted({m.name.rpartition(".")[2] for m in modules})
    rank = int(options["r"])
    equal = equal_lora_rank(modules, plan.parameters.total)
    makers: dict[str, tuple[int, Callable[[nn.Module], nn.Module]]] = {
        FROZEN: (0, _frozen),
        LORA: (equal, partial(_lora, equal, targets)),
        LORA_RANK: (rank, partial(_lora, rank, targets)),
        STOCK: (rank, partial(_stock, options, targets)),
        **{f"Lily {routing}": (rank, partial(_ours, options, targets, routing)) for routing in ROUTINGS},
    }
    budget = min(plan.parameters.total, lora_parameters(modules, equal))
    for name in (name for name in names if name in STRUCTURES):
        made = STRUCTURES[name]
        shape = {"gain": "gain" in made, "own_r": made.get("own_r", 0), "num_A": 1, "num_B": 1}
        largest = choose(modules, parameters=budget, routing="static", targets=targets, **shape).r
        makers[name] = (largest + shape["own_r"], partial(_ours, {**made, "r": largest}, targets, "static"))
    built = []
    for name in names:
        if name == STOCK and options.get("num_B") == 1:
            continue  # stock Lily needs at least two experts
        rank_of, make = makers["Lily static" if name == MERGED else name]
        base = copy.deepcopy(subject.base) if name == MERGED else sharing_weights(subject.base)
        model = make(base).to(subject.device).train()
        _fill(model)
        if name == MERGED:
            cast(peft.PeftModel, model).merge_adapter()
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        built.append(Contestant(name, model, rank_of, parameters))
    return built


def sharing_weights(base: nn.Module) -> nn.Module:
    """A copy of the modules that shares the weights."""
    return copy.deepcopy(base, memo={id(p): p for p in base.parameters()})


def _frozen(base: nn.Module) -> nn.Module:
    """No adapter, but gradients flow through all layers, as they do with one."""
    base.get_input_embeddings().register_forward_hook(_requires_grad)  # type: ignore[operator]
    return base


def _requires_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)


def _lora(rank: int, targets: list[str], base: nn.Module) -> nn.Module:
    return _adapted(base, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))


def _stock(options: dict[str, Any], targets: list[str], base: nn.Module) -> nn.Module:
    values = {k: v for k, v in options.items() if k != "num_A"}
    if "num_A" in options:
        plan_config = lily.LilyConfig(target_modules=targets, routing="batch", **options)
        plan = lily.build_plan(lily.select_modules(base, plan_config), plan_config)
        values["stride_A"] = plan.groups[0].stride
    lily.unregister()
    try:
        return _adapted(base, peft.LilyConfig(target_modules=targets, **values))
    finally:
        lily.register()


def _ours(options: dict[str, Any], targets: list[str], routing: str, base: nn.Module) -> nn.Module:
    return _adapted(base, lily.LilyConfig(target_modules=targets, routing=routing, **options))


def _adapted(base: nn.Module, config: peft.PeftConfig) -> nn.Module:
    return cast(nn.Module, peft.get_peft_model(base, config))


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.copy_(0.01 * torch.randn(p.shape, generator=generator))
