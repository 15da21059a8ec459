"""Which values of a recipe a search may change, and the recipe with other values: pure functions.

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
from lily.recipes.spec.values import is_decimal
from lily.recipes.work import steps_of

KNOBS = {
    "lily": ("learning_rate", "scaling", "shape"),
    "stock-lily": ("learning_rate", "scaling"),
    **dict.fromkeys(LORAS, ("learning_rate", "alpha")),
}
# Factor below and above the recipe's own value. Scaling is what the paper searches most widely, from 0.01 to 10.
WITHIN = {"learning_rate": 8.0, "scaling": 16.0, "alpha": 8.0}
DIGITS = 3  # significant digits of a trial's value, so that the best recipe has exactly that value
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
EVALUATIONS = 4  # least number in a trial, so that it can be stopped by them

Values = dict[str, float | str]


@dataclass(frozen=True)
class Range:
    """A knob with values between two bounds, on a logarithmic scale."""

    low: float  # smallest value
    high: float  # largest value
    start: float  # tried first: the recipe's own value, or the nearest between the bounds


@dataclass(frozen=True)
class AdapterShape:
    """One way to spend the budget."""

    r: int  # rank
    num_A: int | None  # A per group; None: `stride_A` is given instead
    stride_A: int | None  # layers per A
    num_B: int  # experts per group
    parameters: int  # trained parameters of an adapter of this shape

    @property
    def name(self) -> str:
        """Such as r40-A3-B3; S for layers per A."""
        sharing = f"S{self.stride_A}" if self.num_A is None else f"A{self.num_A}"
        return f"r{self.r}-{sharing}-B{self.num_B}"


@dataclass(frozen=True)
class Space:
    """The values that are searched."""

    method: str  # one of `KNOBS`
    ranges: Mapping[str, Range]  # knob -> range of its values
    shapes: tuple[AdapterShape, ...] = ()  # to choose from, the recipe's own first; empty: the shape is not searched
    notes: tuple[str, ...] = field(default=(), compare=False)  # what is not searched, and why
    without: tuple[str, ...] = field(default=(), compare=False)  # knobs whose own value in the recipe is not searched

    @property
    def knobs(self) -> tuple[str, ...]:
        """The names of the knobs that are searched."""
        return (*self.ranges, *(["shape"] if self.shapes else []))

    @property
    def start(self) -> Values:
        """The values of the first trial: the recipe's own, where they are searched."""
        own: Values = {name: knob.start for name, knob in self.ranges.items()}
        return own | ({"shape": self.shapes[0].name} if self.shapes else {})

    def shape(self, name: str) -> AdapterShape:
        """The shape of that name."""
        return next(shape for shape in self.shapes if shape.name == name)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        ranges = {name: asdict(knob) for name, knob in self.ranges.items()}
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
    """The search space of a recipe.

    Args:
        recipe: its method decides which knobs exist.
        decided: Lily's configuration and plan for its model.
        config: PEFT configuration of its method; LoRA's has alpha.
        knobs: names of those to search; default: all that the method has.
        ranges: bounds of single knobs; default: `WITHIN` around the recipe's own value.
        budget: parameters that a shape may cost; default: what the recipe's own shape costs.
        grid: combine every num_A with every num_B; default: num_A = num_B, as in the paper.

    Raises:
        LilyError: for a knob that the method does not have, or bounds that are not a range.
    """
    known = KNOBS.get(recipe.method)
    if known is None:
        raise LilyError(f"method: {recipe.method} has no values to search; choose one of {', '.join(KNOBS)}")
    chosen, bounds = tuple(dict.fromkeys(knobs or known)), dict(ranges or {})
    for name in (*chosen, *bounds):
        if name not in known:
            raise LilyError(
                f"--knobs or --range: {name!r} is not a knob of {recipe.method}; choose from {', '.join(known)}"
            )
    if unused := [name for name in bounds if name not in chosen or name == "shape"]:
        raise LilyError(f"--range {unused[0]}: {unused[0]} is not searched between two bounds; remove the range")
    if budget is not None and "shape" not in chosen:
        raise LilyError("--params is a budget for Lily's shape, which is not searched here; remove it")
    own = {name: _own(name, recipe, config) for name in chosen if name != "shape"}
    searched = {name: _range(name, value, recipe, bounds.get(name)) for name, value in own.items()}
    without = [name for name, knob in searched.items() if knob.start != rounded(own[name])]
    shapes: tuple[AdapterShape, ...] = ()
    notes: tuple[str, ...] = ()
    if "shape" in chosen and recipe.lily.groups:
        notes = ("the shape is not searched, because lily.groups sets the shape of some groups",)
    elif "shape" in chosen:
        shapes = shapes_of(recipe, decided, budget, grid=grid)
        if shapes == (_own_shape(decided),):
            shapes, notes = (), ("the shape is not searched, because the budget allows no other",)
        elif shapes[0] != _own_shape(decided):
            without.append("shape")
    if not searched and not shapes:
        raise LilyError(f"nothing is left to search: {'; '.join(notes)}")
    if without:
        notes += (f"no trial has the recipe's own {', '.join(without)}, which --range or --params leaves out",)
    return Space(recipe.method, searched, shapes, notes, tuple(without))


def shapes_of(
    recipe: Recipe, decided: Decided, budget: int | str | None = None, *, grid: bool = False
) -> tuple[AdapterShape, ...]:
    """The shapes within a budget, by falling rank, but the recipe's own first if it is within the budget.

    Args:
        recipe: its routing decides the size of the routers.
        decided: Lily's configuration and plan for its model.
        budget: default: what the recipe's own shape costs.
        grid: combine every num_A with every num_B; default: num_A = num_B.

    Raises:
        LilyError: if no shape fits.
    """
    own = _own_shape(decided)
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
                gain=recipe.lily.gain != "none",
                own_r=recipe.lily.own_r,
            )
        except LilyError:  # too many matrices for the budget, or too few to use it
            continue
    bought = [AdapterShape(p.r, p.num_A, None, p.num_B, p.parameters) for p in sorted(points, key=lambda p: -p.r)]
    first = [own] if own.parameters <= most else []
    if not first and not bought:
        raise LilyError(f"no shape uses {most:,} parameters well; give another budget with --params")
    same = (own.r, own.parameters, own.num_B)
    return (*first, *(s for s in bought if not first or (s.r, s.parameters, s.num_B) != same))


def _own_shape(decided: Decided) -> AdapterShape:
    """The recipe's own shape."""
    choice = decided.choice
    return AdapterShape(choice.r, choice.num_A, choice.stride_A, choice.num_B, decided.plan.parameters.total)


def _own(name: str, recipe: Recipe, config: Any) -> float:
    """The recipe's own value of a knob."""
    return {
        "learning_rate": lambda: learning_rate(recipe),
        "scaling": lambda: float(config.scaling),
        "alpha": lambda: float(config.lora_alpha),
    }[name]()


def _range(name: str, own: float, recipe: Recipe, bounds: tuple[float, float] | None) -> Range:
    low, high = bounds or (own / WITHIN[name], own * WITHIN[name])
    least = recipe.train.min_learning_rate
    if name == "learning_rate" and least is not None and low <= least:
        if bounds is not None:
            raise LilyError(f"--range learning_rate from {low:g}: train.min_learning_rate, {least:g}, must be below it")
        low = min(own, 2 * least)
    if not (math.isfinite(low) and math.isfinite(high) and 0 < low < high):
        raise LilyError(
            f"--range {name} from {low:g} to {high:g} is not a range; give two numbers above 0, the smaller one first"
        )
    return Range(rounded(low), rounded(high), rounded(min(max(own, low), high)))


def rounded(value: float) -> float:
    """A value with the number of digits that trials and recipes have."""
    return float(f"{value:.{DIGITS}g}")


def changes(space: Space, values: Mapping[str, float | str]) -> dict[str, dict[str, Any]]:
    """A trial's changes to the recipe: section -> key -> value."""
    section: dict[str, Any] = {}
    for name, value in values.items():
        if name == "shape":
            section |= shape_keys(space.shape(str(value)))
        else:
            section[name] = rounded(float(value))
    return {str(section_of(space.method)): section}


def shape_keys(shape: AdapterShape) -> dict[str, Any]:
    """A shape as keys of the section `lily`. None removes a value that a recipe may have inherited."""
    return {"params": None, "r": shape.r, "num_A": shape.num_A, "stride_A": shape.stride_A, "num_B": shape.num_B}


def changed(recipe: Recipe, sections: Mapping[str, Mapping[str, Any]], **keys: Any) -> Recipe:
    """A recipe with other values of keys of its sections, and of its top-level keys; the values are not validated."""
    update = {name: getattr(recipe, name).model_copy(update=dict(values)) for name, values in sections.items()}
    return recipe.model_copy(update={**update, **keys})


def cadence(recipe: Recipe, rows: int, least: int = EVALUATIONS) -> int | str:
    """How often a run is evaluated: as in the recipe, or more often if it could not be stopped early otherwise.

    Args:
        recipe: of the run.
        rows: number of training rows.
        least: least number of evaluations in a run.
    """
    every, total = recipe.train.evaluate_every, steps_of(recipe, rows)
    epochs = total / steps_of(changed(recipe, {"train": {"epochs": 1.0, "max_steps": None}}), rows)
    evaluations = epochs if every == "epoch" else total / every
    return every if evaluations >= least or recipe.train.packing else max(1, total // least)


def parse_ranges(texts: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Bounds as written on the command line, such as `learning_rate=1e-4:1e-2`.

    Raises:
        LilyError: quotes a text that is not of this form.
    """
    ranges: dict[str, tuple[float, float]] = {}
    for text in texts:
        name, _, bounds = text.partition("=")
        low, _, high = bounds.partition(":")
        if not (is_decimal(low) and is_decimal(high)):
            raise LilyError(f"--range {text!r}: expected a knob and two numbers, such as scaling=0.1:10")
        ranges[name.strip()] = (float(low), float(high))
    return ranges
