"""The methods of a comparison: each as a separate recipe, at the rank that makes the budgets equal.

A name may end in a divisor: `lora/4` has a quarter of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lily.compare.result import folder_of
from lily.errors import LilyError
from lily.plan.options import ROUTINGS
from lily.recipes import checks, methods
from lily.recipes.methods import other_peft
from lily.recipes.methods.terms import Terms, named
from lily.recipes.spec.schema import Recipe

if TYPE_CHECKING:
    from torch import nn

Equal = Literal["params", "rank"]
NAMED = ("lily", "stock-lily", "lora", "rslora", "dora", "peft", "none")


@dataclass(frozen=True)
class ComparedMethod:
    """A method, ready to train."""

    name: str  # as in `--methods`, such as `lily:batch`, `vera` or `lora/4`
    recipe: Recipe  # that trains it, with its rank as a number
    rank: int | None  # of its updates; None where it has none
    parameters: int  # number that train, without those of a new head
    # path of the recipe's key that multiplies the update, and its value; None where there is none
    scale: tuple[tuple[str, ...], float] | None

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return folder_of(self.name)

    @property
    def learning_rate(self) -> float:
        """Learning rate of its adapter."""
        return methods.learning_rate(self.recipe)

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the recipe's keys that `with_settings` changes."""
        return (".".join(self._rate), *([".".join(self.scale[0])] if self.scale is not None else []))

    @property
    def _rate(self) -> tuple[str, ...]:
        section = methods.section_of(self.recipe.method)
        return (section, "learning_rate") if section else ("train", "learning_rate")

    @property
    def terms(self) -> Terms:
        """Its learning rate, and its scale in one unit."""
        scale = None if self.scale is None else self.scale[1]
        if scale is not None and self.rank and self.recipe.method in methods.LORAS:
            scale /= math.sqrt(self.rank) if self.recipe.method == "rslora" else self.rank
        return named(self.name, self.recipe, self.rank, scale)

    @property
    def trains(self) -> bool:
        """Whether it has an adapter, and so settings to choose."""
        return self.recipe.method != "none"

    def with_settings(self, learning_rate: float | None = None, scale: float | None = None) -> ComparedMethod:
        """The same with another learning rate, or another scale."""
        recipe, own_scale = self.recipe, self.scale
        if learning_rate is not None:
            recipe = changed(recipe, {self._rate: learning_rate})
        if scale is not None and own_scale is not None:
            own_scale = (own_scale[0], scale)
            recipe = changed(recipe, dict([own_scale]))
        return replace(self, recipe=recipe, scale=own_scale)

    def with_seed(self, seed: int) -> Recipe:
        """Its recipe with another seed."""
        return changed(self.recipe, {("seed",): seed})


def parse(names: str) -> list[str]:
    """The methods in a comma-separated list, in order.

    Raises:
        LilyError: if a name is unknown or repeated.
    """
    listed = [name.strip().lower() for name in names.split(",") if name.strip()]
    if not listed:
        raise LilyError("--methods is empty; name some methods, such as lily,lora")
    for name in listed:
        whole, slash, divisor = name.partition("/")
        if slash and (not divisor.isdecimal() or int(divisor) < 2):
            raise LilyError(f"--methods {name}: after the / comes what divides the parameters, such as {whole}/4")
        method, colon, routing = whole.partition(":")
        if slash and method == "none":
            raise LilyError("--methods none: it has no parameters to divide; write none")
        if colon and (method != "lily" or routing not in ROUTINGS):
            raise LilyError(f"--methods {name}: only lily has variants: {', '.join(f'lily:{r}' for r in ROUTINGS)}")
        if method not in NAMED:
            try:
                other_peft.config_class(method)
            except LilyError as error:
                raise LilyError(f"--methods {name} is none of {', '.join(NAMED)}, and {error}") from None
    if twice := [name for name in listed if listed.count(name) > 1]:
        raise LilyError(f"--methods names {twice[0]} twice; remove one")
    return listed


def resolve(recipe: Recipe, names: Sequence[str], equal: Equal, model: nn.Module) -> list[ComparedMethod]:
    """The methods on a recipe, each at its rank.

    Args:
        recipe: the experiment; its `lily` section sets the budget.
        names: from `parse`.
        equal: `params`: for each the largest rank with no more parameters than Lily; `rank`: Lily's rank for all.
        model: the base model on the meta device.

    Raises:
        LilyError: if a method cannot adapt this model, or not with as few parameters as it is to have.
    """
    lily = methods.decide(changed(recipe, {("method",): "lily"}), model)
    rank, total = int(lily.config.r), lily.plan.parameters.total
    compared = []
    for name in names:
        whole, _, divisor = name.partition("/")
        if not divisor:
            compared.append(_compared(recipe, name, None if equal == "params" else rank, model))
            continue
        if equal == "rank":
            raise LilyError(f"--methods {name} with --equal rank: ranks are equal, not parameters; write {whole}")
        budget = total // int(divisor)
        smaller = _compared(_within(recipe, budget), whole, None, model)
        if smaller.parameters > budget:
            raise LilyError(
                f"--methods {name}: the smallest {whole} has {smaller.parameters:,} parameters, more than {budget:,}, "
                f"which is Lily's {total:,} divided by {divisor}; leave it out, or divide by less"
            )
        compared.append(replace(smaller, name=name))
    return compared


def _within(recipe: Recipe, budget: int) -> Recipe:
    """The recipe with a budget instead of the shape of its Lily, and of other methods."""
    values: dict[tuple[str, ...], Any] = {("lily", name): None for name in ("r", "num_A", "stride_A", "num_B")}
    return changed(recipe, values | {("lily", "params"): budget, ("lora", "r"): "equal"})


def _compared(recipe: Recipe, name: str, rank: int | None, model: nn.Module) -> ComparedMethod:
    method, _, routing = name.partition(":")
    changes: dict[tuple[str, ...], Any] = {("method",): method, ("baselines",): []}
    if routing:
        changes[("lily", "routing")] = routing
        if routing in ("static", "uniform"):
            changes[("lily", "settle")] = None
    if method in methods.LORAS:
        changes[("lora", "r")] = rank or "equal"
    elif method not in NAMED:
        peft_type = recipe.peft.peft_type
        if peft_type is None or peft_type.upper() != method.upper():  # the section is about another method
            changes[("peft",)] = {"peft_type": method.upper()}
        changes[("method",)] = "peft"
    chosen = changed(recipe, changes)
    section = methods.section_of(chosen.method)
    if section == "peft":
        kind = other_peft.config_class(str(chosen.peft.peft_type))
        has_rank = "r" in other_peft.options_of(kind)
        chosen = changed(chosen, {("peft", "r"): rank if has_rank else None})
    config = methods.peft_config(chosen, model)
    if config is None:
        return ComparedMethod(name, chosen, None, 0, None)
    with other_peft.implementation(chosen):
        parameters = 0 if chosen.method == "none" else other_peft.count(model, config)
    reached = _rank_of(config) if chosen.method != "none" else None
    if reached is not None and section in ("lora", "peft"):
        chosen = changed(chosen, {(section, "r"): reached})
    return ComparedMethod(name, chosen, reached, parameters, _scale(chosen, config))


def _rank_of(config: Any) -> int | None:
    rank = getattr(config, "init_r", None) or getattr(config, "r", None)
    return int(rank) if rank else None


def _scale(recipe: Recipe, config: Any) -> tuple[tuple[str, ...], float] | None:
    section = methods.section_of(recipe.method)
    if section == "lily":
        return ("lily", "scaling"), float(config.scaling)
    if section == "lora":
        return ("lora", "alpha"), float(config.lora_alpha)
    if section == "peft":
        name = next((name for name in other_peft.SCALES if getattr(config, name, None)), None)
        return None if name is None else (("peft", name), float(getattr(config, name)))
    return None


def changed(recipe: Recipe, values: dict[tuple[str, ...], Any]) -> Recipe:
    """The recipe with other values, validated.

    Raises:
        LilyError: if they contradict one another.
    """
    document = recipe.model_dump(mode="json")
    for path, value in values.items():
        where = document
        for part in path[:-1]:
            where = where[part]
        where[path[-1]] = value
    valid = Recipe.model_validate(document)
    for path, problem in checks.problems(valid):
        raise LilyError(f"{recipe.name}, method {valid.method}: {'.'.join(path)}: {problem}")
    return valid.written_at(recipe.locations)
