"""From a parameter budget to r, num_A and num_B.

Arithmetic on names and shapes only: no model, no tensor. A Lily adapter's size is linear in its rank,

    parameters(r) = r * sum over groups of (n_A * in + num_B * out + layers * num_B) + layers * num_B (static routing)

with `n_A` the number of A of a group and the router's term only where there is a router (and further terms, at most
linear, for gains and own ranks), so the largest rank that
fits a budget is one division, and the only choice left is how many layers share an A and how many experts there are.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from lily.errors import LilyError
from lily.plan.options import ROUTINGS
from lily.plan.sharing_plan import group_key, own_size, router_size
from lily.plan.specs import EMBEDDING, PARAMETERS, ModuleSpec, base_compute, require_modules, require_positive

DEFAULT_RANK = 32  # the paper's rank for encoders and vision transformers, and stock PEFT's default
LAYERS_PER_A = 14  # Hugging Face's best run: 28 layers, two A
WELL_USED = 0.9  # share of a budget; below it, the reason names what limits the rank
FEWEST, MOST = 2, 4  # the paper's range of num_A = num_B for 12 to 32 layers
# Budgets below that of LoRA of this rank: one A and one B that each layer permutes learn more than LoRA of equal size,
# and two of each do not (docs/results.md, the map).
SMALL = 4

SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
COUNT = re.compile(r"(\d[\d_,]*(?:\.\d+)?(?:e\+?\d{1,2})?)\s*([kmbg]?)")


def parse_count(value: str | int) -> int:
    """Parse a number of parameters: `1.2M`, `800k`, `1_000_000`, `1e6` or an int.

    Args:
        value: digits with an optional `k`, `M`, `B` or `G` (in any case); fractions of a parameter are dropped.

    Raises:
        LilyError: if it is not a number, or less than 1.
    """
    match = None if isinstance(value, bool) else COUNT.fullmatch(str(value).strip().lower())
    if match is None:
        raise LilyError(f"{value!r} is not a number of parameters; write it like 1.2M, 800k or 1_000_000")
    count = int(Decimal(re.sub("[_,]", "", match[1])) * SUFFIXES[match[2]])
    if count < 1:
        raise LilyError(f"{value!r} is less than one parameter; write a budget like 1.2M, 800k or 1_000_000")
    return count


def lora_parameters(modules: Sequence[ModuleSpec], r: int) -> int:
    """Parameters of LoRA of rank `r` on these layers: `r * (in + out)` for each layer and each stacked expert.

    LoRA's A on a convolution with groups reads the channels of all of them, and each rank reaches one group's outputs.
    """
    return r * sum(m.experts * (m.conv_groups * m.in_features + m.reach) for m in modules)


def lora_compute(modules: Sequence[ModuleSpec], r: int, tokens: int) -> float:
    """Multiply-adds of LoRA of rank `r`, as a share of those of the base layers; see `Compute`.

    Args:
        modules: the layers.
        r: LoRA's rank.
        tokens: tokens of a batch, for which the update of a parameter is computed once.
    """
    return sum(_lora_of(m, r, tokens) for m in modules) / base_compute(modules)


def _lora_of(m: ModuleSpec, r: int, tokens: int) -> float:
    if m.kind in PARAMETERS:
        return m.experts * r * m.in_features * m.out_features / tokens
    return r * ((0 if m.kind == EMBEDDING else m.conv_groups * m.in_features) + m.reach)


def equal_lora_rank(modules: Sequence[ModuleSpec], parameters: int) -> int:
    """The largest LoRA rank on these layers with no more than `parameters` parameters.

    At least 1 (or `rank_unit`), even if that has more.

    Raises:
        LilyError: if there are no layers.
    """
    require_modules(modules)
    unit = rank_unit(modules)
    return max(unit, parameters // lora_parameters(modules, unit) * unit)


def rank_unit(modules: Sequence[ModuleSpec]) -> int:
    """The number whose multiples ranks are: the least common multiple of the groups of convolutions, 1 without any."""
    return math.lcm(*(m.conv_groups for m in modules))


@dataclass(frozen=True)
class Choice:
    """Rank and sharing of an adapter, with the reasons.

    Attributes:
        r: rank.
        num_A: A per group, or None if `stride_A` was given.
        stride_A: layers per A if that was given, else None.
        num_B: experts per group.
        parameters: number of trainable parameters.
        reason: one sentence per decision.
    """

    r: int
    num_A: int | None
    stride_A: int | None
    num_B: int
    parameters: int
    reason: tuple[str, ...]

    @property
    def options(self) -> dict[str, Any]:
        """The same as keyword arguments of `LilyConfig`."""
        values = {"r": self.r, "num_A": self.num_A, "stride_A": self.stride_A, "num_B": self.num_B}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class _Sharing:
    """How tensors are shared; exactly one of num_A and stride_A is set."""

    num_A: int | None
    stride_A: int | None
    num_B: int
    shared_router: bool = False
    gain: bool = False
    own_r: int = 0

    def count_A(self, layers: int) -> int:
        stride = self.stride_A or math.ceil(layers / (self.num_A or 1))
        return math.ceil(layers / stride)


def choose(
    modules: Sequence[ModuleSpec],
    *,
    parameters: int | None = None,
    match_lora: int | None = None,
    r: int | None = None,
    num_A: int | None = None,
    stride_A: int | None = None,
    num_B: int | None = None,
    routing: str = "token",
    targets: object = None,
    shared_router: bool = False,
    gain: bool = False,
    own_r: int = 0,
    fewest: int | None = None,
) -> Choice:
    """Choose those of r, num_A and num_B that are not given.

    `num_A = num_B = n`, one A for about 14 layers, at least `fewest` and at most 4 (never more than one per two
    layers): the paper uses 2 to 4 for 12 to 32 layers, Hugging Face's best run 2 for 28. Then r is the largest rank
    that fits. If that would exceed the smallest side of a target, n grows instead; if not even r = 1 fits, n shrinks.
    With both a budget and `r`, n is the largest that fits. Without a budget, r is 32 unless given.

    Args:
        modules: the layers to adapt.
        parameters: the budget; the result never exceeds it.
        match_lora: instead of `parameters`: as many as LoRA of this rank has on the same layers.
        r: rank, kept if given; so are `num_A`, `stride_A` and `num_B`.
        num_A: A per group.
        stride_A: layers per A; instead of `num_A`.
        num_B: experts per group.
        routing: the adapter's routing, which decides the size of the routers.
        targets: the adapter's `target_modules`, which decide how layers group; see `lily.plan.build_plan`.
        shared_router: whether the layers of a group have one router.
        gain: whether each layer has a gain (r,).
        own_r: rank of each layer's own A and B.
        fewest: least n, where it fits. Default: 2, and 1 for a budget below that of LoRA of rank 4.

    Raises:
        LilyError: if the budget is too small (with the smallest one that works), given twice, or a value is not
            positive.
    """
    require_modules(modules)
    given = {"r": r, "num_A": num_A, "stride_A": stride_A, "num_B": num_B, "fewest": fewest}
    require_positive(parameters=parameters, match_lora=match_lora, **given)
    _not_both(parameters=parameters, match_lora=match_lora)
    _not_both(num_A=num_A, stride_A=stride_A)
    if routing not in ROUTINGS:
        raise LilyError(f"routing={routing!r} is not known; choose one of {', '.join(ROUTINGS)}")
    shapes = _shapes(modules, targets)
    depth = max(s.experts for s in shapes)
    least = rank_unit(shapes)

    def sharing(n: int) -> _Sharing:
        return _Sharing(num_A if num_A or stride_A else n, stride_A, num_B or n, shared_router, gain, own_r)

    def cost(rank: int, n: int) -> int:
        return _parameters(shapes, rank, sharing(n), routing)

    budget = lora_parameters(modules, match_lora) if match_lora is not None else parameters
    small = budget is not None and budget < lora_parameters(modules, SMALL)
    fewest = fewest or (1 if small else FEWEST)
    usual = _usual(depth, fewest)
    most = depth if sharing(1) != sharing(depth) else 1  # nothing is left to vary if all values are given
    if budget is None:
        n, rank = usual, r or max(least, min(DEFAULT_RANK, _cap(shapes)) // least * least)
    elif cost(r or least, 1) > budget:
        raise LilyError(_too_small(budget, cost(r or least, 1), r or least, sharing(1), r is not None))
    elif r is not None:
        rank, n = r, max(n for n in range(1, most + 1) if cost(r, n) <= budget)
    else:
        rank, n = _best(shapes, routing, budget, [sharing(n) for n in range(1, most + 1)], min(usual, most))
    chosen, size = sharing(n), cost(rank, n)
    reason = (
        *_why_budget(budget, match_lora, len(modules)),
        *_why_sharing(chosen, n, usual, depth, fewest, given=(num_A or stride_A, num_B), rank_given=r is not None),
        *_why_rank(shapes, rank, r, budget, size),
    )
    return Choice(rank, chosen.num_A, chosen.stride_A, chosen.num_B, size, reason)


def _not_both(**values: int | None) -> None:
    if None not in values.values():
        raise LilyError(f"{' and '.join(values)} say the same thing twice; give one of them")


def _shapes(modules: Sequence[ModuleSpec], targets: object) -> list[ModuleSpec]:
    """One spec per group, whose `experts` is the number of the group's members."""
    layers: Counter[ModuleSpec] = Counter()
    for m in modules:
        layers[group_key(m, targets)] += m.experts
    return [replace(key, experts=count) for key, count in layers.items()]


def _parameters(shapes: Sequence[ModuleSpec], r: int, sharing: _Sharing, routing: str) -> int:
    return sum(
        r * (sharing.count_A(s.experts) * s.in_features + sharing.num_B * s.reach)
        + (1 if sharing.shared_router else s.experts) * router_size(routing, r, sharing.num_B)
        + s.experts * own_size(r, sharing.gain, sharing.own_r, s.in_features, s.reach)
        for s in shapes
    )


def _usual(depth: int, fewest: int) -> int:
    """num_A = num_B by the rule: see `choose`."""
    return max(1, min(max(fewest, math.ceil(depth / LAYERS_PER_A)), MOST, depth // 2))


def _narrowest(shapes: Sequence[ModuleSpec]) -> ModuleSpec:
    return min(shapes, key=_side)


def _side(s: ModuleSpec) -> int:
    """The largest rank of a layer's weight: the smaller side, of a convolution with groups that of each."""
    return s.conv_groups * min(s.in_features, s.reach)


def _cap(shapes: Sequence[ModuleSpec]) -> int:
    """The largest useful rank: the smallest side of any target."""
    return _side(_narrowest(shapes))


def _largest_rank(shapes: Sequence[ModuleSpec], sharing: _Sharing, routing: str, budget: int) -> int:
    """The largest r within the budget, 0 if there is none. The size is linear in r, so two points give the line."""
    unit = rank_unit(shapes)
    one = _parameters(shapes, unit, sharing, routing)
    slope = _parameters(shapes, 2 * unit, sharing, routing) - one
    return max(0, (budget - one + slope) // slope) * unit


def _best(
    shapes: Sequence[ModuleSpec], routing: str, budget: int, sharings: Sequence[_Sharing], usual: int
) -> tuple[int, int]:
    """(r, n) for a free rank: the usual n, less if the least r does not fit, more if r would exceed the cap.

    Of the n from the usual one to the first that is not capped, the one with the most parameters: since ranks are
    integers, the first uncapped n may use less of the budget than the last capped one.
    """
    unit = rank_unit(shapes)
    cap = max(unit, _cap(shapes) // unit * unit)
    ranks = [_largest_rank(shapes, sharing, routing, budget) for sharing in sharings]
    start = max(n for n in range(1, usual + 1) if ranks[n - 1] >= 1)
    end = next((n for n in range(start, len(ranks) + 1) if ranks[n - 1] <= cap), len(ranks))
    candidates = [(min(ranks[n - 1], cap), n) for n in range(start, end + 1) if ranks[n - 1] >= 1]
    return max(candidates, key=lambda c: (_parameters(shapes, c[0], sharings[c[1] - 1], routing), -c[1]))


def _too_small(budget: int, least: int, r: int, sharing: _Sharing, rank_given: bool) -> str:
    own = f", own_r={sharing.own_r}" if sharing.own_r else ""
    shape = f"r={r}, {_say_A(sharing)}, num_B={sharing.num_B}{own}"
    fix = "give at least that many" + (", or leave r free" if rank_given else "") + ", or adapt fewer layers"
    return f"{budget:,} parameters are too few: the smallest Lily on these layers ({shape}) has {least:,}; {fix}"


def _say_A(sharing: _Sharing) -> str:
    return f"num_A={sharing.num_A}" if sharing.stride_A is None else f"stride_A={sharing.stride_A}"


def _why_budget(budget: int | None, match_lora: int | None, layers: int) -> list[str]:
    if budget is None:
        return []
    if match_lora is not None:
        return [f"Budget {budget:,}: what LoRA of rank {match_lora} has on these {layers} layers."]
    return [f"Budget {budget:,}: as given."]


def _why_sharing(
    sharing: _Sharing,
    n: int,
    usual: int,
    depth: int,
    fewest: int,
    *,
    given: tuple[int | None, int | None],
    rank_given: bool,
) -> list[str]:
    parts = (_say_A(sharing), f"num_B={sharing.num_B}")
    kept = [part for part, value in zip(parts, given, strict=True) if value is not None]
    free = [part for part, value in zip(parts, given, strict=True) if value is None]
    sentences = [f"{', '.join(kept)}: as given."] if kept else []
    if free and n == usual:
        why = "too few layers to share more finely"
        if depth >= 2 * FEWEST and usual < FEWEST:
            why = (
                f"one for about {LAYERS_PER_A} layers and at most {MOST}: at fewer parameters than LoRA of rank "
                f"{SMALL} has, a larger rank of fewer A and B learned more"
            )
        elif depth >= 2 * FEWEST:
            why = (
                f"about one for {LAYERS_PER_A} layers, at least {fewest} and at most {MOST} (the paper: 2 to 4 for 12 "
                "to 32 layers; Hugging Face's best run: 2 for 28); fewer A and B leave room for a larger rank"
            )
        sentences.append(f"{', '.join(free)}: {depth} layers deep, {why}.")
    elif free and rank_given:
        sentences.append(f"{', '.join(free)}: the most that fits the budget at the given rank.")
    elif free and n > usual:
        sentences.append(
            f"{', '.join(free)}: more than the usual {usual}, because the rank is limited by the targets' sizes."
        )
    elif free:
        sentences.append(f"{', '.join(free)}: fewer than the usual {usual}, because the budget is small.")
    return sentences


def _why_rank(shapes: Sequence[ModuleSpec], rank: int, given: int | None, budget: int | None, size: int) -> list[str]:
    cap, narrowest = _cap(shapes), _narrowest(shapes)
    bound = f"{cap}, the smallest side of {narrowest.name} ({narrowest.out_features}, {narrowest.in_features})"
    used = "" if budget is None else f"; {size:,} parameters are {size / budget:.1%} of the budget"
    if given is not None:
        beyond = f"; it is above {bound}, where it adds nothing" if given > cap else ""
        return [f"r={rank}: as given{beyond}{used}."]
    if budget is None:
        lowered = f"no more than {bound}" if rank < DEFAULT_RANK else "the default"
        return [f"r={rank}: {lowered}; a budget would choose it."]
    if rank < cap:
        return [f"r={rank}: the largest rank that fits{used}."]
    lone = size < WELL_USED * budget and any(_side(s) > cap for s in shapes)
    advice = f"; exclude {narrowest.name} (exclude_modules) to allow a larger rank" if lone else ""
    return [f"r={rank}: no more than {bound}{used}{advice}."]
