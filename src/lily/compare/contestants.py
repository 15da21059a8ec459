"""Who is compared: each method as a recipe of its own, at the rank that makes the budgets equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lily.errors import LilyError
from lily.plan.options import ROUTINGS
from lily.recipes import checks, methods
from lily.recipes.methods import other_peft
from lily.recipes.spec.schema import Recipe

if TYPE_CHECKING:
    from torch import nn

Equal = Literal["params", "rank"]
NAMED = ("lily", "stock-lily", "lora", "rslora", "dora", "peft", "none")


@dataclass(frozen=True)
class Contestant:
    """A method, ready to train.

    Attributes:
        name: as it was asked for, such as `lily:batch` or `vera`.
        recipe: what trains it, its rank written out.
        rank: of its updates; None where it has none.
        parameters: that train, a new head aside.
        scale: path of the recipe's key that says how much the update counts, and its value; None where it has none.
    """

    name: str
    recipe: Recipe
    rank: int | None
    parameters: int
    scale: tuple[tuple[str, ...], float] | None

    @property
    def folder(self) -> str:
        """What its folder is called."""
        return self.name.replace(":", "-")

    @property
    def learning_rate(self) -> float:
        """What it trains with."""
        return methods.learning_rate(self.recipe)

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the recipe's keys that `with_settings` changes."""
        return (".".join(self._rate), *([".".join(self.scale[0])] if self.scale is not None else []))

    @property
    def _rate(self) -> tuple[str, ...]:
        block = methods.section_of(self.recipe.method)
        return (block, "learning_rate") if block else ("train", "learning_rate")

    @property
    def trains(self) -> bool:
        """Whether there is anything of it to tune."""
        return self.recipe.method != "none"

    def with_settings(self, learning_rate: float | None = None, scale: float | None = None) -> Contestant:
        """The same with another learning rate, or another scale."""
        recipe, found = self.recipe, self.scale
        if learning_rate is not None:
            recipe = changed(recipe, {self._rate: learning_rate})
        if scale is not None and found is not None:
            recipe, found = changed(recipe, {found[0]: scale}), (found[0], scale)
        return replace(self, recipe=recipe, scale=found)

    def with_seed(self, seed: int) -> Recipe:
        """What trains it with a seed."""
        return changed(self.recipe, {("seed",): seed})


def parse(names: str) -> list[str]:
    """Names of contestants, with commas between them, in order.

    Raises:
        LilyError: if one is not known, or given twice.
    """
    listed = [name.strip().lower() for name in names.split(",") if name.strip()]
    if not listed:
        raise LilyError("--methods is empty; give some such as lily,lora")
    for name in listed:
        method, colon, routing = name.partition(":")
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


def resolve(recipe: Recipe, names: Sequence[str], equal: Equal, model: nn.Module) -> list[Contestant]:
    """The contestants of a recipe.

    Args:
        recipe: the experiment; its `lily` block is the budget.
        names: from `parse`.
        equal: `params`: for each the largest rank with no more parameters than Lily; `rank`: Lily's rank for all.
        model: the base model on the meta device.

    Raises:
        LilyError: if a method cannot be put on this model.
    """
    lily = methods.peft_config(changed(recipe, {("method",): "lily"}), model)
    assert lily is not None
    rank = int(lily.r)
    return [_contestant(recipe, name, None if equal == "params" else rank, model) for name in names]


def _contestant(recipe: Recipe, name: str, rank: int | None, model: nn.Module) -> Contestant:
    method, _, routing = name.partition(":")
    changes: dict[tuple[str, ...], Any] = {("method",): method, ("baselines",): []}
    if routing:
        changes[("lily", "routing")] = routing
        if routing in ("static", "uniform"):
            changes[("lily", "settle")] = None
    if method in methods.LORAS:
        changes[("lora", "r")] = rank or "equal"
    elif method not in NAMED:
        given = recipe.peft.peft_type
        if given is None or given.upper() != method.upper():  # the block is about another method
            changes[("peft",)] = {"peft_type": method.upper()}
        changes[("method",)] = "peft"
    chosen = changed(recipe, changes)
    block = methods.section_of(chosen.method)
    if block == "peft":
        kind = other_peft.config_class(str(chosen.peft.peft_type))
        has_rank = "r" in other_peft.options_of(kind)
        chosen = changed(chosen, {("peft", "r"): rank if has_rank else None})
    config = methods.peft_config(chosen, model)
    if config is None:
        return Contestant(name, chosen, None, 0, None)
    with other_peft.implementation(chosen):
        parameters = 0 if chosen.method == "none" else other_peft.count(model, config)
    reached = _rank_of(config) if chosen.method != "none" else None
    if reached is not None and block in ("lora", "peft"):
        chosen = changed(chosen, {(block, "r"): reached})
    return Contestant(name, chosen, reached, parameters, _scale(chosen, config))


def _rank_of(config: Any) -> int | None:
    found = getattr(config, "init_r", None) or getattr(config, "r", None)
    return int(found) if found else None


def _scale(recipe: Recipe, config: Any) -> tuple[tuple[str, ...], float] | None:
    block = methods.section_of(recipe.method)
    if block == "lily":
        return ("lily", "scaling"), recipe.lily.scaling
    if block == "lora":
        return ("lora", "alpha"), float(config.lora_alpha)
    if block == "peft":
        name = next((name for name in other_peft.SCALES if getattr(config, name, None)), None)
        return None if name is None else (("peft", name), float(getattr(config, name)))
    return None


def changed(recipe: Recipe, values: dict[tuple[str, ...], Any]) -> Recipe:
    """The recipe with other values, checked.

    Raises:
        LilyError: if they do not go together.
    """
    document = recipe.model_dump(mode="json")
    for path, value in values.items():
        where = document
        for part in path[:-1]:
            where = where[part]
        where[path[-1]] = value
    made = Recipe.model_validate(document)
    for path, said in checks.problems(made):
        raise LilyError(f"{recipe.name}, method {made.method}: {'.'.join(path)}: {said}")
    return made.written_at(recipe.locations)
