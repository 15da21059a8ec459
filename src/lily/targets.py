"""What a configuration targets in a model: layers by `target_modules`, parameters by `target_parameters`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from lily.config import LilyConfig
from lily.errors import LilyError
from lily.kinds import (
    BLOCK,
    LINEAR,
    PARAMETERS,
    SLICE,
    ModuleSpec,
    base_of,
    block_spec,
    layer_spec,
    linear_layers,
    parameter_spec,
)
from lily.layer import LilyLayer
from lily.parameters import Parameter
from lily.selection import NoTargetError, own_modules, select_modules
from lily.sliced import Slice
from lily.slices import layout_of, rows_of


def select_targets(model: nn.Module, config: LilyConfig) -> list[ModuleSpec]:
    """The layers, then the blocks and the parameters that `config` targets, each in the model's order.

    Like `lily.selection.select_modules`, it reads names and sizes only.

    Args:
        model: the base model, or one that already carries adapters.
        config: what to adapt.

    Returns:
        One `ModuleSpec` per layer and per parameter.

    Raises:
        NoTargetError: (a LilyError) if a target matches nothing, with near matches.
        LilyError: if a match cannot be adapted.
    """
    others = config.target_parameters or config.parallel_modules
    specs = select_modules(model, config) if config.target_modules or not others else []
    specs = select_slices(model, specs, config.target_slices)
    specs += select_blocks(model, config.parallel_modules)
    if config.target_parameters:
        specs += select_parameters(model, config.target_parameters)
    _check_layers(model, specs)
    return specs


def select_slices(
    model: nn.Module, specs: Sequence[ModuleSpec], wanted: Mapping[str, object] | None
) -> list[ModuleSpec]:
    """`specs` with the slices of a layer in its place, where `LilyConfig.target_slices` asks for them.

    Raises:
        NoTargetError: (a LilyError) if a name in `wanted` is none of these layers.
        LilyError: if a layer is not linear, or has no such slices.
    """
    out: list[ModuleSpec] = []
    matched: set[str] = set()
    for spec in specs:
        hits = [t for t in wanted or () if spec.name == t or spec.name.endswith(f".{t}")]
        matched.update(hits)
        if not hits:
            out.append(spec)
            continue
        if spec.kind != LINEAR:
            raise LilyError(f"target_slices: {spec.name} is of the kind {spec.kind}; only linear layers are sliced")
        parent, _, short = spec.name.rpartition(".")
        owner = base_of(model.get_submodule(parent))
        layout = layout_of(short, base_of(model.get_submodule(spec.name)), owner, getattr(model, "config", None))
        asked = (wanted or {})[max(hits, key=len)]
        out += [
            replace(spec, name=f"{spec.name}.{part}", out_features=rows.size(spec.out_features), kind=SLICE, rows=rows)
            for part, rows in rows_of(spec.name, asked, layout, spec.out_features).items()
        ]
    for name in wanted or ():
        if name not in matched:
            known = list(dict.fromkeys(spec.name.rpartition(".")[2] for spec in specs))
            raise NoTargetError(
                f"target_slices has the key {name!r}, which fits no adapted layer; adapted: {', '.join(known)}"
            )
    return out


def select_blocks(model: nn.Module, wanted: Sequence[str] | None) -> list[ModuleSpec]:
    """The modules, by name or class, that an adapter is to run beside (`LilyConfig.parallel_modules`).

    Raises:
        NoTargetError: (a LilyError) if one of `wanted` matches nothing.
        LilyError: if the sizes of a match cannot be known.
    """
    specs: list[ModuleSpec] = []
    matched: set[str] = set()
    for name, module in own_modules(model):
        base = base_of(module)
        hits = [w for w in wanted or () if name == w or name.endswith(f".{w}") or type(base).__name__ == w]
        matched.update(hits)
        if hits:
            specs.append(block_spec(name, base))
    for name in wanted or ():
        if name not in matched:
            known = list(dict.fromkeys(type(m).__name__ for _, m in own_modules(model)))
            raise NoTargetError(
                f"parallel_modules={name!r} matches no module by name or class: {', '.join(known[:20])}"
            )
    return specs


def whole_layers(
    model: nn.Module, specs: Sequence[ModuleSpec], exclude: list[str] | str | None = None
) -> list[ModuleSpec]:
    """Where LoRA can go instead: a sliced layer whole, the linear layers inside a module with an adapter beside it.

    Args:
        model: without adapters.
        specs: what Lily adapts.
        exclude: modules inside of modules to leave out.

    Returns:
        Layers and parameters, each once.
    """
    found: dict[str, ModuleSpec] = {}
    for spec in specs:
        here = [spec]
        if spec.kind == SLICE:
            here = [layer_spec(spec.path, model.get_submodule(spec.path))]
        elif spec.kind == BLOCK:
            inside = list(linear_layers(spec.name, model.get_submodule(spec.name)))
            free = LilyConfig(target_modules=[inner.name for inner in inside], exclude_modules=exclude)
            here = [inner for inner in inside if check_target_module_exists(free, inner.name)]
        found |= {one.name: one for one in here}
    return list(found.values())


def select_parameters(model: nn.Module, targets: Sequence[str]) -> list[ModuleSpec]:
    """The parameters whose names end with one of `targets` at a dot boundary, in the model's order.

    Raises:
        NoTargetError: (a LilyError) if one of `targets` matches nothing, with near matches.
        LilyError: if a match cannot be adapted.
    """
    found: list[ModuleSpec] = []
    known: dict[str, None] = {}
    matched: set[str] = set()
    for path, module in [("", model), *own_modules(model)]:
        base = base_of(module)
        names = {name: None for name, _ in base.named_parameters(recurse=False)}
        if hasattr(base, "parametrizations"):
            names |= dict.fromkeys(base.parametrizations)  # type: ignore[arg-type]
        for short in names:
            name = f"{path}.{short}".removeprefix(".")
            hits = [t for t in targets if name == t or name.endswith(f".{t}")]
            matched.update(hits)
            if not hits:
                known[short] = None
                continue
            _check_owner(name, path, base)
            found.append(parameter_spec(name, base))
    for target in targets:
        if target not in matched:
            near = difflib.get_close_matches(target.rpartition(".")[2], known, n=3)
            hint = f"did you mean {', '.join(near)}? " if near else ""
            shown = ", ".join(list(known)[:20]) + (", ..." if len(known) > 20 else "")
            raise NoTargetError(
                f"target_parameters={target!r} matches no parameter; {hint}others of this model: {shown or 'none'}"
            )
    return found


def _check_owner(name: str, path: str, base: nn.Module) -> None:
    if not path:
        raise LilyError(
            f"target parameter {name} belongs to the model itself, which nothing can stand in for; name others in "
            "target_parameters"
        )
    if hasattr(base, "parametrizations") and name.rpartition(".")[2] in base.parametrizations:  # type: ignore[operator]
        raise LilyError(
            f"target parameter {name} is parametrised (quantised, perhaps), so there is no plain weight to add to; "
            "remove the parametrisation, or name other target_parameters"
        )


def _check_layers(model: nn.Module, specs: Sequence[ModuleSpec]) -> None:
    """Refuse a layer that is to be adapted in two ways: as a whole, by its slices, or by its parameters."""
    blocks = tuple(f"{spec.name}." for spec in specs if spec.kind == BLOCK)
    for spec in specs:
        if spec.name.startswith(blocks):
            raise LilyError(
                f"{spec.name} is inside {next(b for b in blocks if spec.name.startswith(b))[:-1]}, beside which an "
                "adapter of parallel_modules runs; leave one of them out, or give it an adapter of its own"
            )
    layers = {spec.path for spec in specs if spec.kind not in PARAMETERS}
    for spec in specs:
        inside, path = spec.kind in PARAMETERS, spec.path
        module = model.get_submodule(path)
        other = isinstance(module, LilyLayer) and isinstance(module, Parameter) != inside
        sliced = isinstance(module, LilyLayer) and isinstance(module, Slice) != (spec.kind == SLICE)
        if sliced and not inside and not isinstance(module, Parameter):
            raise LilyError(
                f"{path} is adapted as a whole by one adapter and by its slices by another; give both the same "
                "target_slices"
            )
        if (inside and path in layers) or other or (inside and _foreign(module)):
            raise LilyError(
                f"{path} would be adapted as a layer and by its parameter too; leave it out of target_modules or of "
                "target_parameters"
            )


def _foreign(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer) and not isinstance(module, LilyLayer)
