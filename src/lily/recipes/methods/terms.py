"""Equal terms: the learning rate and scale of each method of a comparison, and whether anything chose differences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig
from torch import nn

from lily.recipes.methods.configs import learning_rate, peft_config, section_of
from lily.recipes.spec.dreambooth import DreamBooth
from lily.recipes.spec.locations import Key
from lily.recipes.spec.schema import Recipe

DIFFERENT = 1e-3  # relative; whole ranks make the scales of one alpha differ a little less


@dataclass(frozen=True)
class Terms:
    """What a method trains with.

    Attributes:
        name: of the method.
        rank: of its updates; None where it has none.
        rate: learning rate of its adapter.
        rate_key: the recipe's key that sets it.
        scale: what multiplies its updates, in one unit: LoRA's alpha is divided by its rank (rsLoRA: by its root);
            None where a method has no such factor, or none that is known.
        scale_key: the recipe's key that sets it.
    """

    name: str
    rank: int | None
    rate: float
    rate_key: Key
    scale: float | None
    scale_key: Key | None

    @property
    def settings(self) -> str:
        """Learning rate and scale in words."""
        return f"learning rate {self.rate:g}" + ("" if self.scale is None else f", scale {self.scale:.3g}")


def terms_of(recipe: Recipe | DreamBooth, model: nn.Module, methods: Sequence[str]) -> list[Terms]:
    """The terms of methods on a recipe; `none` trains no adapter and has none.

    Args:
        recipe: the experiment.
        model: the base model; may be on the meta device.
        methods: as in its key `method`.
    """
    found = []
    for method in dict.fromkeys(methods):
        other = recipe.model_copy(update={"method": method}).written_at(recipe.locations)
        config = None if method == "none" else peft_config(other, model)
        if config is not None:
            rank = getattr(config, "r", None)
            found.append(named(method, other, rank if isinstance(rank, int) else None, scale_of(config)))
    return found


def contestants(recipe: Recipe | DreamBooth) -> list[str]:
    """The methods that a run of the recipe trains or stands beside: its own, Lily, and LoRA where it is a baseline."""
    # a baseline's run inherits the location of the key, not its value
    asked = recipe.locations.written.get(("method",)) == f"override 'method={recipe.method}'"
    return [recipe.method, *(["lily"] if asked else []), *(["lora"] if "lora" in recipe.baselines else [])]


def named(name: str, recipe: Recipe | DreamBooth, rank: int | None, scale: float | None) -> Terms:
    """The terms of the recipe's method, whose rank and scale are known."""
    section = section_of(recipe.method)
    own = section is not None and getattr(recipe, section).learning_rate is not None
    rate_key = (str(section), "learning_rate") if own else ("train", "learning_rate")
    scale_key: Key | None = {"lily": ("lily", "scaling"), "lora": ("lora", "alpha")}.get(section or "")
    if (
        section == "lily"
        and getattr(recipe.lily, "preset", None)
        and ("lily", "scaling") not in recipe.locations.written
    ):
        scale_key = ("lily", "preset")
    return Terms(name, rank, learning_rate(recipe), rate_key, scale, scale_key)


def scale_of(config: PeftConfig | Any) -> float | None:
    """What multiplies an adapter's updates, in one unit."""
    if isinstance(config, LoraConfig):
        return float(config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r))
    scaling = getattr(config, "scaling", None)
    return float(scaling) if isinstance(scaling, int | float) else None


def warnings_of(recipe: Recipe | DreamBooth, model: nn.Module) -> list[str]:
    """`unchosen` of what a run trains or stands beside; `model` may be on the meta device."""
    methods = dict.fromkeys(contestants(recipe))
    return list(unchosen(recipe, terms_of(recipe, model, list(methods)))) if len(methods) > 1 else []


def unchosen(recipe: Recipe | DreamBooth, terms: Sequence[Terms]) -> Iterator[str]:
    """A warning for each of learning rate and scale in which methods differ although neither search nor recipe chose.

    Defaults differ by a rule that was measured (docs/tune.md), so they need no warning; nor do values that the recipe
    has for every method, or `chosen_by`.
    """
    rates = [(t.name, t.rate, t.rate_key) for t in terms]
    scales = [(t.name, t.scale, t.scale_key) for t in terms if t.scale is not None and t.scale_key is not None]
    for what, values in (("learning rates", rates), ("scales", scales)):
        if len({key for _, _, key in values}) < 2 or _same([value for _, value, _ in values]):
            continue
        origins = [_origin(recipe, key) for _, _, key in values]
        if "command line" not in origins and (len(set(origins)) == 1 or _covered(recipe, [k for _, _, k in values])):
            continue
        shown = ", ".join(
            f"{name} {value:.3g} ({'.'.join(key)}: {origin})"
            for (name, value, key), origin in zip(values, origins, strict=True)
        )
        yield (
            f"{what} differ, and neither a search nor the recipe chose them for both: {shown}; the comparison favors "
            "the method that they suit. Set them alike, search them for every method (lily compare --tune), or name "
            "what chose them in the recipe's chosen_by"
        )


def _same(values: Sequence[Any]) -> bool:
    return bool(max(values) <= min(values) * (1 + DIFFERENT))


def _origin(recipe: Recipe | DreamBooth, key: Key) -> str:
    where = recipe.locations
    value: Any = recipe
    for part in key:
        value = getattr(value, part)
    if value is None:
        return "default"
    above = [key[:i] for i in range(1, len(key) + 1)]
    if any(part in where.overridden for part in above):
        return "command line"
    return "recipe" if key in where.written else "default"


def _covered(recipe: Recipe | DreamBooth, keys: Sequence[Key]) -> bool:
    """Whether `chosen_by` is about these values: an inherited one is not about what nearer files set."""
    if not recipe.chosen_by:
        return False
    where = recipe.locations
    said = where.origin(("chosen_by",))  # not in `files`: on the command line, about all of them
    above = where.files[: where.files.index(said)] if said in where.files else ()
    return not any(where.origin(key) in above for key in keys if key in where.written)
