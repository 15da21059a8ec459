"""What a search may change of a recipe, and what the recipe becomes: pure functions.

Lily's knobs are its learning rate, its scaling and its shape (r, num_A and num_B within one budget); LoRA's are its
learning rate and its alpha. All but the shape are searched on a logarithmic scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lily.analysis.granularity import Point, frontier
from lily.errors import LilyError
from lily.plan.budget import parse_count
from lily.plan.decide import Decided
from lily.recipes.methods.configs import LORAS, learning_rate, section_of
from lily.recipes.spec.schema import Recipe

KNOBS = {
    "lily": ("learning_rate", "scaling", "shape"),
    "stock-lily": ("learning_rate", "scaling"),
    **dict.fromkeys(LORAS, ("learning_rate", "alpha")),
}
# Times below and above the recipe's own value. Scaling is what the paper searches most widely, from 0.01 to 10.
WITHIN = {"learning_rate": 8.0, "scaling": 16.0, "alpha": 8.0}
DIGITS = 3  # of a value that is tried, so that the recipe written in the end is what was tried
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
EVALUATIONS = 4  # at least so many in a trial, so that there is something to stop it by

Values = dict[str, float | str]


@dataclass(frozen=True)
class Range:
    """A knob with values between two bounds, on a logarithmic scale.

    Attributes:
        low: smallest value.
        high: largest value.
        start: the recipe's own, tried first.
    """

    low: float
    high: float
    start: float


@dataclass(frozen=True)
class Shape:
    """One way to spend the budget.

    Attributes:
        r: rank.
        num_A: A per group; None: `stride_A` says it.
        stride_A: layers per A, where the recipe says it so.
        num_B: experts per group.
        parameters: what an adapter of this shape trains.
    """

    r: int
    num_A: int | None
    stride_A: int | None
    num_B: int
    parameters: int

    @property
    def name(self) -> str:
        """Such as r40-A3-B3; S for layers per A."""
        sharing = f"S{self.stride_A}" if self.num_A is None else f"A{self.num_A}"
        return f"r{self.r}-{sharing}-B{self.num_B}"


@dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
        method: one of `KNOBS`.
        ranges: knob -> its values.
        shapes: those to choose from, the recipe's own first; none: the shape stays.
        notes: what is not searched, and why.
    """

    method: str
    ranges: Mapping[str, Range]
    shapes: tuple[Shape, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def knobs(self) -> tuple[str, ...]:
        """The names of what is searched."""
        return (*self.ranges, *(["shape"] if self.shapes else []))

    @property
    def start(self) -> Values:
        """The recipe's own values."""
        own: Values = {name: found.start for name, found in self.ranges.items()}
        return own | ({"shape": self.shapes[0].name} if self.shapes else {})

    def shape(self, name: str) -> Shape:
        """The shape of that name."""
        return next(shape for shape in self.shapes if shape.name == name)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        ranges = {name: asdict(found) for name, found in self.ranges.items()}
        return {"method": self.method, "ranges": ranges, "shapes": [asdict(shape) for shape in self.shapes]}


def space_of(
    recipe: Recipe,
    decided: Decided,
    config: Any,
    *,
    knobs: Sequence[str] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    budget: int | str | None = None,
    grid: bool = False,
) -> Space:
    """What a search may change of a recipe.

    Args:
        recipe: its method decides which knobs there are.
        decided: its Lily on its model.
        config: what its method puts on the model; LoRA's knows its alpha.
        knobs: names of those to search; default: all that the method has.
        ranges: bounds of single knobs; default: `WITHIN` around the recipe's own value.
        budget: parameters that a shape may cost; default: what the recipe's own costs.
        grid: every num_A with every num_B; default: equal ones, as in the paper.

    Raises:
        LilyError: for a knob that the method does not have, or bounds that are none.
    """
    known = KNOBS.get(recipe.method)
    if known is None:
        raise LilyError(f"method: {recipe.method} has nothing to search; choose one of {', '.join(KNOBS)}")
    chosen, given = tuple(dict.fromkeys(knobs or known)), dict(ranges or {})
    for name in (*chosen, *given):
        if name not in known:
            raise LilyError(f"{name!r} is no knob of {recipe.method}; choose from {', '.join(known)}")
    if unused := [name for name in given if name not in chosen or name == "shape"]:
        raise LilyError(f"a range for {unused[0]} is of no use: it is not searched between two bounds")
    if budget is not None and "shape" not in chosen:
        raise LilyError("a budget is for the shape of Lily, which is not searched here; leave it out")
    found = {name: _range(name, recipe, config, given.get(name)) for name in chosen if name != "shape"}
    shapes: tuple[Shape, ...] = ()
    notes: tuple[str, ...] = ()
    if "shape" in chosen and recipe.lily.groups:
        notes = ("the shape stays, because lily.groups gives some groups a shape of their own",)
    elif "shape" in chosen:
        shapes = shapes_of(recipe, decided, budget, grid=grid)
        if len(shapes) == 1:
            shapes, notes = (), ("the shape stays, because the budget buys no other",)
    if not found and not shapes:
        raise LilyError(f"nothing is left to search: {'; '.join(notes)}")
    return Space(recipe.method, found, shapes, notes)


def shapes_of(
    recipe: Recipe, decided: Decided, budget: int | str | None = None, *, grid: bool = False
) -> tuple[Shape, ...]:
    """The shapes that a budget buys, by falling rank, but the recipe's own first if it is within the budget.

    Args:
        recipe: asks for routing and shared routers, which have a size.
        decided: its Lily on its model.
        budget: default: what the recipe's own costs.
        grid: every num_A with every num_B; default: equal ones.

    Raises:
        LilyError: if no shape fits.
    """
    own = _own(decided)
    most = own.parameters if budget is None else parse_count(budget)
    depth = max(len(group.members) for group in decided.plan.groups)
    counts = [n for n in COUNTS if n <= depth]
    points: list[Point] = []
    for pair in [(counts, counts)] if grid else [([n], [n]) for n in counts]:
        try:
            points += frontier(
                decided.modules,
                most,
                num_A=pair[0],
                num_B=pair[1],
                routing=decided.plan.routing,
                targets=decided.config.target_modules,
                shared_router=recipe.lily.shared_router,
            )
        except LilyError:  # too many matrices for the budget, or too few to use it
            continue
    bought = [Shape(p.r, p.num_A, None, p.num_B, p.parameters) for p in sorted(points, key=lambda p: -p.r)]
    first = [own] if own.parameters <= most else []
    if not first and not bought:
        raise LilyError(f"{most:,} parameters buy no shape that uses them well; give another budget")
    same = (own.r, own.parameters, own.num_B)
    return (*first, *(s for s in bought if not first or (s.r, s.parameters, s.num_B) != same))


def _own(decided: Decided) -> Shape:
    choice = decided.choice
    return Shape(choice.r, choice.num_A, choice.stride_A, choice.num_B, decided.plan.parameters.total)


def _range(name: str, recipe: Recipe, config: Any, given: tuple[float, float] | None) -> Range:
    own = {
        "learning_rate": lambda: learning_rate(recipe),
        "scaling": lambda: recipe.lily.scaling,
        "alpha": lambda: float(config.lora_alpha),
    }[name]()
    low, high = given or (own / WITHIN[name], own * WITHIN[name])
    least = recipe.train.min_learning_rate
    if name == "learning_rate" and least is not None and low <= least:
        if given is not None:
            raise LilyError(f"learning_rate from {low:g}: train.min_learning_rate, {least:g}, must be below it")
        low = min(own, 2 * least)
    if not (math.isfinite(low) and math.isfinite(high) and 0 < low < high):
        raise LilyError(f"{name} from {low:g} to {high:g} is no range; give two numbers above 0, the smaller one first")
    return Range(rounded(low), rounded(high), rounded(min(max(own, low), high)))


def rounded(value: float) -> float:
    """A value with few digits, as it is tried and written."""
    return float(f"{value:.{DIGITS}g}")


def changes(space: Space, values: Mapping[str, float | str]) -> dict[str, dict[str, Any]]:
    """What a trial's values change of the recipe: section -> key -> value."""
    section: dict[str, Any] = {}
    for name, value in values.items():
        if name == "shape":
            section |= shape_keys(space.shape(str(value)))
        else:
            section[name] = rounded(float(value))
    return {str(section_of(space.method)): section}


def shape_keys(shape: Shape) -> dict[str, Any]:
    """A shape in a recipe's words. None drops what a recipe may have inherited."""
    return {"params": None, "r": shape.r, "num_A": shape.num_A, "stride_A": shape.stride_A, "num_B": shape.num_B}


def changed(recipe: Recipe, sections: Mapping[str, Mapping[str, Any]], **keys: Any) -> Recipe:
    """A recipe with some keys of its sections, and some of its own, replaced by what is known to be valid."""
    update = {name: getattr(recipe, name).model_copy(update=dict(values)) for name, values in sections.items()}
    return recipe.model_copy(update={**update, **keys})


def steps_of(recipe: Recipe, rows: int) -> int:
    """Optimiser steps of a recipe on so many training rows (examples; packing needs fewer)."""
    t = recipe.train
    per_epoch = math.ceil(math.ceil(rows / t.batch_size) / t.gradient_accumulation)
    return t.max_steps or max(1, math.ceil(t.epochs * per_epoch))


def cadence(recipe: Recipe, rows: int, least: int = EVALUATIONS) -> int | str:
    """How often a run is evaluated: as the recipe says, or more often where that would be too rare to stop it.

    Args:
        recipe: says how often, and how long.
        rows: training rows.
        least: evaluations of a run.
    """
    every, total = recipe.train.evaluate_every, steps_of(recipe, rows)
    epochs = total / steps_of(recipe.model_copy(update={"train": _one_epoch(recipe)}), rows)
    evaluations = epochs if every == "epoch" else total / every
    return every if evaluations >= least or recipe.train.packing else max(1, total // least)


def _one_epoch(recipe: Recipe) -> Any:
    return recipe.train.model_copy(update={"epochs": 1.0, "max_steps": None})


def parse_ranges(texts: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Bounds as they are written on a command line: `learning_rate=1e-4:1e-2`.

    Raises:
        LilyError: quotes what is no such text.
    """
    found: dict[str, tuple[float, float]] = {}
    for text in texts:
        name, _, bounds = text.partition("=")
        low, _, high = bounds.partition(":")
        try:
            found[name.strip()] = (float(low), float(high))
        except ValueError:
            raise LilyError(f"--range {text!r}: expected a knob and two numbers, such as scaling=0.1:10") from None
    return found
