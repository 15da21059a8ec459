"""The sharing plan: which layers share which tensors, decided before a weight is read.

`select_modules` reads names and shapes from a model (the meta device is enough) and `build_plan`, a pure function,
turns them and a config into a `SharingPlan`: a value that can be printed, compared and tested without a model, and
that alone drives injection, checkpoints and the planner.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from peft.utils.other import get_pattern_key

from lily.errors import LilyError
from lily.plan.config import LilyConfig
from lily.plan.fused_layouts import Rows
from lily.plan.options import DYNAMIC, PATTERNS
from lily.plan.specs import EMBEDDING, EXPERTS, LINEAR, MATRIX, SLICE, ModuleSpec

# Modules that PEFT adds to modules_to_save for a task, after the plan is made and before layers are replaced.
SAVED_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


@dataclass(frozen=True)
class Group:
    """Layers of one target name, kind and shape: they share the experts B, and each block of them shares an A.

    The matrices that a parameter stacks (a mixture's experts) are a separate group: its members are named by their
    index, and their shared tensors are stored under the parameter's name, all A as one tensor.

    Attributes:
        name: the target name, such as `q_proj`; for stacked experts the parameter's full name.
        in_features: columns of A.
        out_features: columns of B.
        r: rank.
        num_B: experts.
        blocks: consecutive names that share one A, in the model's order.
        kind: kind of its layers; see `lily.plan.specs.ModuleSpec`.
        kernel: kernel size of convolutions.
        rows: outputs of their layers that slices select.
        gain: whether each of its members has a gain (r,).
        own_r: rank of each member's own A and B; 0 for none.
        conv_groups: groups of convolutions, among which the ranks are divided.
    """

    name: str
    in_features: int
    out_features: int
    r: int
    num_B: int
    blocks: tuple[tuple[str, ...], ...]
    kind: str = LINEAR
    kernel: tuple[int, ...] = ()
    rows: Rows | None = None
    gain: bool = False
    own_r: int = 0
    conv_groups: int = 1

    @property
    def reach(self) -> int:
        """Outputs that one rank reaches; see `ModuleSpec.reach`."""
        return self.out_features // self.conv_groups

    @property
    def rows_B(self) -> int:
        """Rows of the tensor that holds B: the experts' ranks, or those of one group of a convolution."""
        return self.num_B * self.r // self.conv_groups

    @property
    def members(self) -> tuple[str, ...]:
        """All names of the group, in the model's order."""
        return tuple(name for block in self.blocks for name in block)

    @property
    def kept(self) -> tuple[tuple[str, ...], ...]:
        """For each tensor that holds A, the names that use it: the blocks, except for stacked experts."""
        return ((self.name,),) if self.kind == EXPERTS else self.blocks

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the adapted layers: its members, or the parameter that stacks them."""
        return tuple(name for block in self.kept for name in block)

    @property
    def rows_A(self) -> int:
        """Rows of each tensor that holds A."""
        return self.r * (len(self.blocks) if self.kind == EXPERTS else 1)

    @property
    def logits_shape(self) -> tuple[int, ...]:
        """Shape of one layer's static logits: (num_B,), or (experts, num_B) for a parameter that stacks experts."""
        return (len(self.members), self.num_B) if self.kind == EXPERTS else (self.num_B,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the base weights: (out, in), (out, channels, *kernel), (rows, out), or (experts, out, in).

        The channels of a convolution are those of one of its groups.
        """
        if self.kernel:
            return (self.out_features, self.in_features // math.prod(self.kernel), *self.kernel)
        if self.kind == EMBEDDING:
            return (self.in_features, self.out_features)
        return (*((len(self.members),) if self.kind == EXPERTS else ()), self.out_features, self.in_features)

    @property
    def specs(self) -> list[ModuleSpec]:
        """The specs from which `build_plan` made the group."""
        experts = len(self.members) if self.kind == EXPERTS else 1
        sizes = (self.in_features, self.out_features, self.kind, self.kernel, experts, self.rows, self.conv_groups)
        return [ModuleSpec(name, *sizes) for name in self.layers]

    @property
    def stride(self) -> int:
        """Layers per A (of the largest block)."""
        return max(len(block) for block in self.blocks)


@dataclass(frozen=True)
class Parameters:
    """Trainable parameters of an adapter, by part; `own` is what layers have for themselves beside a router."""

    A: int
    B: int
    router: int
    own: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.A + self.B + self.router + self.own


@dataclass(frozen=True)
class Slot:
    """Indices of a layer's shared tensors: A among all A of the plan, B (and the group) among the groups.

    `place` is the layer's number in its group.
    """

    A: int
    B: int
    place: int = 0


@dataclass(frozen=True)
class SharingPlan:
    """Which layers share which A and which B. Compare with ==, print with str().

    Attributes:
        groups: in the order in which the model reaches their first layer.
        routing: the adapter's routing, which decides what a layer's router holds.
        shared_router: whether the layers of a group share one router.
        stock_differs: whether stock PEFT would group the same layers differently, so that its files may do so.
    """

    groups: tuple[Group, ...]
    routing: str
    shared_router: bool = False
    stock_differs: bool = field(default=False, compare=False)

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """Layer -> the indices of its shared tensors. A are numbered through all groups."""
        slots: dict[str, Slot] = {}
        a = 0
        for b, group in enumerate(self.groups):
            place = 0
            for block in group.kept:
                slots.update((name, Slot(a, b, place + i)) for i, name in enumerate(block))
                a, place = a + 1, place + len(block)
        return slots

    @property
    def blocks(self) -> tuple[tuple[Group, tuple[str, ...]], ...]:
        """(group, layers) of every tensor that holds A, in the order of their indices."""
        return tuple((group, block) for group in self.groups for block in group.kept)

    def group_of(self, name: str) -> Group:
        """The group of a module.

        Raises:
            KeyError: if the module is not in the plan.
        """
        return self.groups[self.slots[name].B]

    @property
    def num_layers(self) -> int:
        """Number of adapted layers."""
        return len(self.slots)

    @property
    def layers_by_name(self) -> dict[str, int]:
        """Last name -> number of adapted layers. Unlike groups, it does not depend on how they were selected."""
        return dict(Counter(name.rpartition(".")[2] for name in self.slots))

    @property
    def parameters(self) -> Parameters:
        """Trainable parameters by part; a shared tensor counts once."""
        return Parameters(
            A=sum(len(g.blocks) * g.r * g.in_features for g in self.groups),
            B=sum(g.num_B * g.r * g.reach for g in self.groups),
            router=sum(map(self.routers_of, self.groups)),
            own=sum(map(self.own_of, self.groups)),
        )

    @property
    def ranks(self) -> list[tuple[str, tuple[str, ...], int]]:
        """(name, layers, rank of their updates) of each group, own ranks included; several can have one name."""
        return [(g.name, g.layers, g.r + g.own_r) for g in self.groups]

    def routers_of(self, group: Group) -> int:
        """Parameters of a group's routers."""
        routers = 1 if self.shared_router else len(group.members)
        return routers * router_size(self.routing, group.r, group.num_B)

    def own_of(self, group: Group) -> int:
        """Parameters of the gains and the own A and B of a group's layers."""
        return len(group.members) * own_size(group.r, group.gain, group.own_r, group.in_features, group.reach)

    def __str__(self) -> str:
        total = self.parameters
        lines = [
            f"{self.num_layers} layers in {len(self.groups)} groups, routing {self.routing}, "
            f"{total.total:,} parameters (A {total.A:,}, B {total.B:,}, router {total.router:,}"
            + (f", own {total.own:,})" if total.own else ")")
        ]
        for g in self.groups:
            lines.append(f"{g.name} {g.shape}: r={g.r}, {g.num_B} experts")
            lines += [f"  A{i}: {', '.join(block)}" for i, block in enumerate(g.blocks)]
        return "\n".join(lines)


def router_size(routing: str, r: int, num_B: int) -> int:
    """Parameters of one layer's router: R (num_B, r), learned logits (num_B,), or nothing."""
    if num_B == 1 or routing == "uniform":
        return 0
    return num_B * r if routing in DYNAMIC else num_B


def own_size(r: int, gain: bool, own_r: int, in_features: int, reach: int) -> int:
    """Parameters of what one layer has for itself beside a router: its gain (r,), its own A and B of rank `own_r`."""
    return r * gain + own_r * (in_features + reach)


def build_plan(modules: Sequence[ModuleSpec], config: LilyConfig) -> SharingPlan:
    """Decide which layers share which tensors.

    A group is one target name, one kind and one shape. The name is the module's own last name, however the module was
    selected; only where a list names it several times over (`proj` and `attn.proj`), the longest of those. Inside a
    group, layers keep their order and every `stride_A` of them share an A.

    The experts that one parameter stacks are a separate group, in the order of their index.

    Args:
        modules: the layers and parameters to adapt, in the order in which the model yields them.
        config: the adapter's configuration.

    Returns:
        The plan. The same for any order of the set `config.target_modules`.

    Raises:
        LilyError: if `rank_pattern` gives layers of one group different ranks, a rank is not a multiple of the groups
            of a convolution, or a key of `group_options` or of a pattern matches nothing.
    """
    members: dict[ModuleSpec, list[str]] = {}
    expression = config.target_modules if isinstance(config.target_modules, str) else None
    for m in modules:
        # Stock PEFT treats everything that a regular expression selects as one target.
        stock = expression if config.stock_grouping else None
        key = group_key(m, config.target_modules)
        members.setdefault(replace(key, name=stock or key.name), []).append(m.name)
    _check_keys(config, list(dict.fromkeys(key.name for key in members)), [m.name for m in modules])
    groups = []
    for key, layers in members.items():
        r = _group_rank(key.name, layers, config)
        names = [f"{key.name}.{i}" for i in range(key.experts)] if key.kind == EXPERTS else layers
        own = config.options_of(key.name)
        _check_divides(key, r, own.own_r)
        stride = own.stride_A or math.ceil(len(names) / (own.num_A or 1))
        blocks = tuple(tuple(names[i : i + stride]) for i in range(0, len(names), stride))
        sizes = (key.in_features, key.out_features, r, own.num_B)
        private = (own.gain != "none", own.own_r)
        groups.append(Group(key.name, *sizes, blocks, key.kind, key.kernel, key.rows, *private, key.conv_groups))
    plan = SharingPlan(tuple(groups), str(config.routing), config.shared_router)
    return replace(plan, stock_differs=stock_grouping_differs(plan, config.target_modules or ()))


def group_key(spec: ModuleSpec, targets: object) -> ModuleSpec:
    """The spec that all layers of a group share, under the group's name; see `build_plan`."""
    if spec.kind == EXPERTS:
        return spec
    if spec.kind in (MATRIX, SLICE):  # `weight` and `v` mean little without their module's name
        return replace(spec, name=".".join(spec.name.split(".")[-2:]))
    return replace(spec, name=target_name(spec.name, targets))


def target_name(module: str, targets: object) -> str:
    """The group name of a module: see `build_plan`."""
    if isinstance(targets, (set, frozenset, list, tuple)):
        hits = sorted((t for t in targets if module == t or module.endswith(f".{t}")), key=lambda t: (len(t), t))
        if len(hits) > 1:
            return str(hits[-1])
    return module.rpartition(".")[2]


def _check_keys(config: LilyConfig, groups: Sequence[str], layers: Sequence[str]) -> None:
    """Refuse keys of `group_options`, `rank_pattern` and `scaling_pattern` that match nothing."""
    for key in config.group_options or ():
        if not any(name == key or name.endswith(f".{key}") for name in groups):
            hint = f"{_near(key, groups)}groups: {', '.join(groups)}"
            raise LilyError(f"group_options has the key {key!r}, which matches no group; {hint}")
    short = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    for option in PATTERNS:
        for key in getattr(config, option) or ():
            if not any(get_pattern_key([key], name) == key for name in layers):
                hint = f"{_near(key, short)}adapted: {', '.join(short)}"
                raise LilyError(f"{option} has the key {key!r}, which matches no adapted layer; {hint}")


def _near(key: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, names, n=1)
    return f"did you mean {near[0]}? " if near else ""


def _group_rank(group: str, names: Sequence[str], config: LilyConfig) -> int:
    patterns = config.rank_pattern or {}
    ranks: dict[str, int] = {n: patterns.get(get_pattern_key(patterns.keys(), n), int(config.r)) for n in names}
    if len(set(ranks.values())) > 1:
        shown = {rank: next(n for n in names if ranks[n] == rank) for rank in dict.fromkeys(ranks.values())}
        listed = ", ".join(f"{rank} for {name}" for rank, name in shown.items())
        raise LilyError(
            f"rank_pattern gives the group {group!r} several ranks ({listed}), but its layers share B; "
            f"write one rank for the whole group, such as {{{group!r}: {min(shown)}}}"
        )
    return next(iter(ranks.values()))


def _check_divides(key: ModuleSpec, r: int, own_r: int) -> None:
    """Refuse ranks that cannot be divided among the groups of a convolution, as LoRA does."""
    for name, rank in (("r", r), ("own_r", own_r)):
        if rank % key.conv_groups:
            raise LilyError(
                f"{key.name} is a convolution with groups={key.conv_groups}, among which its ranks are divided, and "
                f"{name}={rank} is not a multiple of that; give one (rank_pattern and group_options hold for single "
                "groups), or exclude it with exclude_modules"
            )


def resolved_stride(plan: SharingPlan, config: LilyConfig) -> int | None:
    """The one `stride_A` that is equivalent to `num_A` for every group, or None if there is none."""
    if config.stride_A is not None:
        return config.stride_A
    strides = {math.ceil(len(g.members) / (config.num_A or 1)) for g in plan.groups}
    return strides.pop() if len(strides) == 1 else None


def stock_grouping_differs(plan: SharingPlan, targets: str | Iterable[str]) -> bool:
    """Whether stock PEFT would group these layers differently.

    Stock groups by (matched target, shape). The target is the whole regular expression, or any listed name that the
    module's name ends with (as text, in the order of a set); so only lists in which exactly one name matches are safe.
    """
    seen: dict[tuple[str, int, int], int] = {}
    linear = [group for group in plan.groups if group.kind == LINEAR]  # stock PEFT adapts nothing else
    for b, group in enumerate(linear):
        for name in group.members:
            hits = [targets] if isinstance(targets, str) else [t for t in targets if name.endswith(t)]
            if len(hits) != 1 or seen.setdefault((hits[0], group.in_features, group.out_features), b) != b:
                return True
    return len(seen) != len(linear)
