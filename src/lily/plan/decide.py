"""What an adapter is on a model: decided once, for `lily plan`, training, searches and `lily bench` alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lily.plan.budget import FEWEST, Choice, choose
from lily.plan.config import LilyConfig
from lily.plan.select import select_targets
from lily.plan.sharing_plan import SharingPlan, build_plan
from lily.plan.specs import ModuleSpec
from lily.plan.walk import has_causal_part

if TYPE_CHECKING:
    from torch import nn

Step = Literal["targets", "shape", "options"]


@dataclass(frozen=True)
class Decided:
    """A Lily adapter on a model.

    Attributes:
        config: complete configuration of the adapter.
        modules: the adapted layers.
        plan: which layers share what; its routing is the one that the model's kind implies.
        choice: r, num_A and num_B, with reasons.
    """

    config: LilyConfig
    modules: Sequence[ModuleSpec]
    plan: SharingPlan
    choice: Choice

    @property
    def scaling(self) -> float:
        """Scale of the update, unless a group has another one."""
        assert isinstance(self.config.scaling, float | int)  # `decide` has replaced the default by a number
        return float(self.config.scaling)


def decide(
    model: nn.Module,
    config: Mapping[str, Any],
    shape: Mapping[str, int | None],
    options: Mapping[str, Any] | None = None,
    errors: Callable[[Step], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> Decided:
    """Select the layers, choose what is open of r, num_A and num_B, and build the plan.

    Args:
        model: the base model; may be on the meta device.
        config: arguments of `LilyConfig` besides the shape, as far as they select layers or change sizes.
        shape: arguments of `lily.budget.choose`: r, num_A, stride_A, num_B, fewest, and a budget.
        options: further arguments of `LilyConfig`, which may need to know the shape; they override `config`.
        errors: context manager in which a step runs, to rewrite its errors.

    Raises:
        LilyError: if a target matches nothing, the budget is too small, or a value is not allowed.
    """
    with errors("targets"):
        selected = LilyConfig(**config)
        modules = select_targets(model, selected)  # replaces all-linear by the names it stands for
    causal = selected.routing_is_default and has_causal_part(model)
    routing = selected.default_routing(True) if causal else str(selected.routing)
    fewest = shape.get("fewest")
    with errors("shape"):
        choice = choose(
            modules,
            **{name: value for name, value in shape.items() if name != "fewest"},
            routing=routing,
            targets=selected.target_modules,
            shared_router=selected.shared_router,
            gain=selected.gain != "none",
            own_r=selected.own_r,
            # without a distinction, layers that share everything would have the same update
            fewest=fewest or (FEWEST if selected.distinct == "none" else None),
        )
    with errors("options"):
        targets = {"target_modules": selected.target_modules, "target_parameters": selected.target_parameters}
        complete = LilyConfig(**{**config, **targets, **(options or {}), **choice.options})
        plan = replace(build_plan(modules, complete), routing=routing)
    complete.resolve_scaling(plan.ranks)
    if added := sorted({*(selected.target_parameters or ())} - {*(config.get("target_parameters") or ())}):
        why = f"target_parameters={added}: where this model holds the experts that target_modules names."
        choice = replace(choice, reason=(*choice.reason, why))
    return Decided(complete, modules, plan, choice)
