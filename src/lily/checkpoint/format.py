"""Adapter files: the layout that is written, and the three layouts that are read.

Written: stock PEFT's names, each shared tensor once, under the first layer that uses it.

    <layer>.lily_A.weight       (r, in)
    <layer>.lily_B.weight       (experts * r, out)
    <layer>.lily_router.weight  (experts, r)         token, sequence and batch routing
    <layer>.lily_logits         (experts,)           static routing
    <layer>.lily_gain.weight    (r,)                 with `gain`
    <layer>.lily_own_A.weight   (own_r, in)          with `own_r`
    <layer>.lily_own_B.weight   (own_r, out)

A convolution's A is (r, channels / groups * kernel size), its B (experts * r / groups, out), and an embedding's A
(r, rows). For a parameter that stacks the experts
of a mixture, `<layer>` is its name; all its A are concatenated into one tensor, as are gains and own A and B, and its
logits are (stacked, experts).

Read: that; stock's, which repeats shared tensors under every layer; and the paper repository's (`lily_lp` for A,
`lily_hp` for B, as a parameter (experts, r, out) or a linear layer's weight). Which layers share a tensor is determined
by the plan, not by memory addresses. Only if stock PEFT would group these layers differently (for example, under a
regular expression) and the file contradicts the plan, the file decides: equal tensors are then shared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lily.errors import LilyError
from lily.layers.bank import BANK
from lily.layers.own import own_shapes
from lily.plan.sharing_plan import Group, SharingPlan, router_size
from lily.plan.specs import ModuleSpec
from lily.plan.wrappers import unwrapped

PREFIX = "base_model.model."

PAPER_NAMES = {"lily_lp": "A", "lily_hp": "B"}
Parts = dict[str, dict[str, Tensor]]  # A, B, router, logits, gain, own_A, own_B -> layer -> tensor
OWN = {"gain": "gain", "own_A": "own_r", "own_B": "own_r"}  # what layers have for themselves -> its option
KEY = re.compile(r"^(?P<layer>.+)\.(?P<part>lily_(?:A|B|router|logits|gain|own_A|own_B)|lily_lp|lily_hp)(?:\.weight)?$")


@dataclass(frozen=True)
class AdapterTensors:
    """An adapter's tensors by their slots in a plan.

    Attributes:
        A: index of the A -> (r, in).
        B: index of the group -> (experts * r, out).
        router: layer -> R (experts, r), if each layer has a router.
        shared_router: index of the group -> R (experts, r), if its layers share one.
        logits: layer -> logits (experts,) of static weights.
        own: part (`gain`, `own_A`, `own_B`) -> layer -> tensor.
        other: everything else in the file (saved modules, biases), unchanged.
    """

    A: dict[int, Tensor]
    B: dict[int, Tensor]
    router: dict[str, Tensor]
    logits: dict[str, Tensor]
    other: dict[str, Tensor]
    shared_router: dict[int, Tensor] = field(default_factory=dict)
    own: Parts = field(default_factory=dict)


def dump(state: Mapping[str, Tensor], adapter: str, plan: SharingPlan, every_layer: bool = False) -> dict[str, Tensor]:
    """The adapter's entries of a model's state dict, under their names in a file.

    Args:
        state: the model's state dict; name parts of wrappers (FSDP, compile) are removed.
        adapter: name of the adapter.
        plan: its sharing plan.
        every_layer: repeat shared tensors under every layer, as stock PEFT does.

    Returns:
        Names as in the module's docstring, with `.{adapter}`, which PEFT removes.
    """
    clean = {unwrapped(key): value for key, value in state.items()}
    marker = f"{BANK}.lily_A.{adapter}."
    root = next((key.partition(marker)[0] for key in clean if marker in key), None)
    if root is None:
        return {}
    out: dict[str, Tensor] = {}
    for number, (_, block) in enumerate(plan.blocks):
        for name in block if every_layer else block[:1]:
            out[f"{root}{name}.lily_A.{adapter}.weight"] = clean[f"{root}{BANK}.lily_A.{adapter}.{number}"]
    for number, group in enumerate(plan.groups):
        for name in group.layers if every_layer else group.layers[:1]:
            out[f"{root}{name}.lily_B.{adapter}.weight"] = clean[f"{root}{BANK}.lily_B.{adapter}.{number}"]
    for number, group in enumerate(plan.groups if plan.shared_router else ()):
        if group.num_B > 1:
            key = f"{root}{group.layers[0]}.lily_router.{adapter}.weight"
            out[key] = clean[f"{root}{BANK}.lily_R.{adapter}.{number}"]
    for name in plan.slots:
        for part, suffix in (("lily_logits", ""), *((f"lily_{own}", ".weight") for own in ("router", *OWN))):
            key = f"{root}{name}.{part}.{adapter}"
            if f"{key}.weight" in clean:
                out[f"{key}{suffix}"] = clean[f"{key}.weight"]
    return out


def parse(state: Mapping[str, Tensor], plan: SharingPlan, settled: float | None = None) -> AdapterTensors:
    """Assign an adapter file's tensors, in any of the three layouts, to the slots of `plan`.

    Args:
        state: the file's entries, without the adapter's name.
        plan: the plan of the adapter they are loaded into.
        settled: how far that adapter has settled. Its file holds logits besides routers, and only logits once it has
            settled completely.

    Returns:
        All tensors of the plan.

    Raises:
        Regrouped: if the file shares tensors differently from the plan; its `plan` is that of the file.
        LilyError: if a tensor is missing, has another shape, belongs to a layer that is not adapted, or differs from
            its duplicate.
    """
    parts, other = _collect(state, plan)
    if (pair := _contradiction(parts, plan)) is not None:
        regrouped = _plan_of(parts, plan)
        if not plan.stock_differs:
            raise LilyError(
                f"the adapter file holds different values for the shared {pair[0]} of {pair[1]} and {pair[2]}; "
                "stock PEFT shares it too, so the file is damaged; save the adapter again"
            )
        raise Regrouped(regrouped)
    return _assign(parts, plan, settled, other)


def check_names(state: Mapping[str, Tensor], plan: SharingPlan, settled: float | None = None) -> dict[str, Tensor]:
    """Check the names and shapes of an adapter file against a plan, before any tensor is read.

    Args:
        state: as for `parse`, but tensors may be on the meta device.
        plan: as for `parse`.
        settled: as for `parse`.

    Returns:
        The tensors that are not Lily's (saved modules, biases), under their names in the file.

    Raises:
        LilyError: as for `parse`, except for duplicates that differ.
    """
    parts, other = _collect(state, plan)
    _assign(parts, plan, settled, other)
    return other


def resolve(
    state: Mapping[str, Tensor], plan: SharingPlan, settled: float | None = None
) -> tuple[AdapterTensors, SharingPlan]:
    """As `parse`, with the file's sharing if that contradicts the plan.

    Returns:
        The tensors, and the plan to whose slots they belong.
    """
    try:
        return parse(state, plan, settled), plan
    except Regrouped as regrouped:
        return parse(state, regrouped.plan, settled), regrouped.plan


def _assign(parts: Parts, plan: SharingPlan, settled: float | None, other: dict[str, Tensor]) -> AdapterTensors:
    A = {i: _shared(parts["A"], block, f"A of {block[0]}") for i, (_, block) in enumerate(plan.blocks)}
    B = {i: _shared(parts["B"], g.layers, f"B of {g.name}") for i, g in enumerate(plan.groups)}
    kept: Parts = {"router": {}, "logits": {}}
    private: Parts = {part: {} for part in OWN}
    for name in plan.slots:
        for part in own_shapes(plan.group_of(name)):
            if name not in parts[part]:
                raise LilyError(
                    f"the adapter file has no lily_{part} for {name}, which {OWN[part]} needs; is it the file of this "
                    "configuration, and complete?"
                )
            private[part][name] = parts[part][name]
    if settled is None and plan.routing != "uniform":  # the paper's files have routers with uniform routing, too
        spare = "router" if plan.routing == "static" else "logits"
        if parts[spare]:
            raise LilyError(
                f"the adapter file has lily_{spare} for {next(iter(parts[spare]))}, which routing={plan.routing!r} "
                "does not use; is it the file of this configuration?"
            )
    if plan.shared_router:
        for group in plan.groups:
            own = [name for name in group.layers if name in parts["router"]]
            if len(own) > 1:
                raise LilyError(
                    f"the adapter file has a lily_router for {own[0]} and for {own[1]}, which share one by "
                    "shared_router=True; is it the file of this configuration?"
                )
        shared = {
            i: _shared(parts["router"], group.layers, f"router of {group.name}")
            for i, group in enumerate(plan.groups)
            if group.num_B > 1
        }
        return AdapterTensors(A, B, {}, {}, other, shared, private)
    for name in plan.slots:
        group = plan.group_of(name)
        if not router_size(plan.routing, group.r, group.num_B):
            continue
        needed = {"logits" if plan.routing == "static" else "router"}
        if settled is not None:
            needed = {"logits"} | ({"router"} if parts["router"] else set())
        for part in needed:
            if name not in parts[part]:
                raise LilyError(
                    f"the adapter file has no lily_{part} for {name}, which routing={plan.routing!r} needs; "
                    "is it the file of this configuration and base model, and complete?"
                )
            kept[part][name] = parts[part][name]
    return AdapterTensors(A, B, kept["router"], kept["logits"], other, own=private)


def check_base(plan: SharingPlan, expected: Mapping[str, int] | None, base: str | None = None) -> None:
    """Refuse a base model with another number of layers, which an adapter with only shared tensors would fit.

    Args:
        plan: plan of the adapter on this base model.
        expected: the layers that the adapter was made for, as `SharingPlan.layers_by_name`; None: not known.
        base: the name of the adapter's base model, for the error.

    Raises:
        LilyError: if they differ.
    """
    here = plan.layers_by_name
    if expected is None or here == dict(expected):
        return
    wrong = next(n for n in (*expected, *here) if here.get(n, 0) != expected.get(n, 0))
    raise LilyError(
        f"the adapter was made for {expected.get(wrong, 0)} layers named {wrong!r}, but this base model has "
        f"{here.get(wrong, 0)} to adapt; load it on its own base model" + (f", {base}" if base else "")
    )


class Regrouped(Exception):
    """The sharing in the file contradicts the plan. `plan` is that of the file."""

    def __init__(self, plan: SharingPlan) -> None:
        super().__init__("the adapter file shares its tensors differently from the plan")
        self.plan = plan


def _collect(state: Mapping[str, Tensor], plan: SharingPlan) -> tuple[Parts, dict[str, Tensor]]:
    parts: Parts = {part: {} for part in ("A", "B", "router", "logits", *OWN)}
    other: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = KEY.match(unwrapped(key))
        if match is None:
            other[key] = tensor
            continue
        layer, name = match["layer"].removeprefix(PREFIX), match["part"]
        part = PAPER_NAMES.get(name, name.removeprefix("lily_"))
        if layer not in plan.slots:
            raise LilyError(
                f"the adapter file has {key!r}, but this model has no adapted layer {layer!r}; "
                "check that the base model and target_modules are those the adapter was trained with"
            )
        parts[part][layer] = _checked(key, tensor, part, plan.group_of(layer))
    return parts, other


def _checked(key: str, tensor: Tensor, part: str, group: Group) -> Tensor:
    expected = {
        "A": (group.rows_A, group.in_features),
        "B": (group.rows_B, group.out_features),
        "router": (group.num_B, group.r),
        "logits": group.logits_shape,
        **own_shapes(group),
    }.get(part)
    if expected is None:
        raise LilyError(
            f"the adapter file has {key!r}, but the configuration has no {OWN[part]}; is it the file of this "
            "configuration?"
        )
    if part == "B" and tuple(tensor.shape) == (group.num_B, group.rows_B // group.num_B, group.out_features):
        tensor = tensor.reshape(expected)  # the paper's nn.Parameter form
    if tuple(tensor.shape) == expected:
        return tensor
    if key.endswith(("lily_lp", "lily_hp", "lily_hp.weight")) and tuple(tensor.shape[::-1]) == expected:
        return tensor.T.contiguous()
    raise LilyError(
        f"{key!r} has shape {tuple(tensor.shape)}, expected {expected} (r={group.r}, num_B={group.num_B}, "
        f"layer {group.in_features} -> {group.out_features}); is it the file of this configuration and base model?"
    )


def _shared(tensors: dict[str, Tensor], layers: Iterable[str], what: str) -> Tensor:
    copies = [tensors[name] for name in layers if name in tensors]
    if not copies:
        raise LilyError(f"the adapter file has no {what}; is it complete, and of this configuration and base model?")
    return copies[0]


def _equal(x: Tensor, y: Tensor) -> bool:
    return x is y or (x.shape == y.shape and bool(torch.equal(x, y)))


def _contradiction(parts: Parts, plan: SharingPlan) -> tuple[str, str, str] | None:
    """A part and two layers that share it in the plan but not in the file; None: the file agrees."""
    for part, shares in (("A", [b for _, b in plan.blocks]), ("B", [g.layers for g in plan.groups])):
        for layers in shares:
            copies = [name for name in layers if name in parts[part]]
            for name in copies[1:]:
                if not _equal(parts[part][copies[0]], parts[part][name]):
                    return part, copies[0], name
    return None


def _plan_of(parts: Parts, plan: SharingPlan) -> SharingPlan:
    """The plan by which a file with all duplicates was written: equal tensors of one shape are shared.

    Raises:
        LilyError: if not every layer has a copy, so that the file is damaged or belongs to another base model.
    """
    if any(set(parts[part]) != set(plan.slots) for part in "AB"):
        raise LilyError(
            "the adapter file holds different values for one shared tensor, and not every layer has a copy: either "
            "the adapter was trained on another base model (for example, of another depth), or the file is damaged; "
            "load it on its own base model, or save the adapter again"
        )
    by_shape: dict[tuple[object, ...], list[str]] = {}
    for name in plan.slots:
        group = plan.group_of(name)
        by_shape.setdefault((group.kind, group.shape, group.r, group.conv_groups), []).append(name)
    order = {name: i for i, name in enumerate(plan.slots)}
    groups = []
    for names in by_shape.values():
        for members in _classes(sorted(names, key=order.__getitem__), parts["B"]):
            group = plan.group_of(members[0])
            blocks = tuple(tuple(block) for block in _classes(members, parts["A"]))
            last = dict.fromkeys(name.rpartition(".")[2] for name in members)
            groups.append(replace(group, name="+".join(last), blocks=blocks))
    return replace(plan, groups=tuple(groups))


def _classes(names: list[str], tensors: dict[str, Tensor]) -> list[list[str]]:
    classes: list[list[str]] = []
    for name in names:
        equal = next((c for c in classes if _equal(tensors[c[0]], tensors[name])), None)
        if equal is None:
            classes.append([name])
        else:
            equal.append(name)
    return classes


def layers_named(state: Iterable[str]) -> set[str]:
    """The layers that the tensors of an adapter are named after, in files or in a model."""
    parts = (unwrapped(key).rpartition(".lily_") for key in state)
    return {layer.removeprefix(PREFIX) for layer, found, _ in parts if found} - {BANK}


def specs_of(plan: SharingPlan) -> list[ModuleSpec]:
    """The layers of a plan."""
    return [spec for group in plan.groups for spec in group.specs]
