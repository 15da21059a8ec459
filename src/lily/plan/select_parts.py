"""What a configuration selects besides whole layers: slices, parallel modules and parameters.

Only names and sizes are read, so a model on the meta device is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from lily.errors import LilyError
from lily.plan.config import LilyConfig
from lily.plan.fused_layouts import layout_of, rows_of
from lily.plan.specs import (
    LINEAR,
    PARALLEL_MODULE,
    SLICE,
    ModuleSpec,
    base_of,
    layer_spec,
    linear_layers,
    parallel_module_spec,
    parameter_spec,
)
from lily.plan.walk import NoTargetError, own_modules, suggest


def select_slices(
    model: nn.Module, specs: Sequence[ModuleSpec], wanted: Mapping[str, object] | None
) -> list[ModuleSpec]:
    """Replace layers in `specs` by their slices that `LilyConfig.target_slices` names.

    Raises:
        NoTargetError: (a LilyError) if a name in `wanted` matches none of these layers.
        LilyError: if a layer is not linear, or has no such slices.
    """
    out: list[ModuleSpec] = []
    matched: set[str] = set()
    modules = dict(own_modules(model)) if wanted else {}
    for spec in specs:
        hits = [t for t in wanted or () if spec.name == t or spec.name.endswith(f".{t}")]
        matched.update(hits)
        if not hits:
            out.append(spec)
            continue
        if spec.kind != LINEAR:
            raise LilyError(f"target_slices: {spec.name} is of the kind {spec.kind}; only linear layers can be sliced")
        parent, _, short = spec.name.rpartition(".")
        owner = base_of(modules.get(parent, model))
        layout = layout_of(short, base_of(modules[spec.name]), owner, getattr(model, "config", None))
        asked = (wanted or {})[max(hits, key=len)]
        out += [
            replace(spec, name=f"{spec.name}.{part}", out_features=rows.size(spec.out_features), kind=SLICE, rows=rows)
            for part, rows in rows_of(spec.name, asked, layout, spec.out_features).items()
        ]
    for name in wanted or ():
        if name not in matched:
            known = list(dict.fromkeys(spec.name.rpartition(".")[2] for spec in specs))
            raise NoTargetError(
                f"target_slices has the key {name!r}, which matches no adapted layer; adapted: {', '.join(known)}"
            )
    return out


def select_parallel_modules(model: nn.Module, wanted: Sequence[str] | None) -> list[ModuleSpec]:
    """The parallel modules, matched by name or class (`LilyConfig.parallel_modules`).

    Raises:
        NoTargetError: (a LilyError) if one of `wanted` matches nothing.
        LilyError: if the sizes of a match are not known.
    """
    specs: list[ModuleSpec] = []
    matched: set[str] = set()
    for name, module in own_modules(model):
        base = base_of(module)
        hits = [w for w in wanted or () if name == w or name.endswith(f".{w}") or type(base).__name__ == w]
        matched.update(hits)
        if hits:
            specs.append(parallel_module_spec(name, base))
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
    """The layers where LoRA can go instead: sliced layers whole, and the linear layers inside parallel modules.

    Args:
        model: the base model, without adapters.
        specs: what Lily adapts.
        exclude: layers inside parallel modules to leave out.

    Returns:
        Layers and parameters, each once.
    """
    layers: dict[str, ModuleSpec] = {}
    modules = dict(own_modules(model))
    for spec in specs:
        here = [spec]
        if spec.kind == SLICE:
            here = [layer_spec(spec.path, modules[spec.path])]
        elif spec.kind == PARALLEL_MODULE:
            inside = list(linear_layers(spec.name, model.get_submodule(spec.name)))
            free = LilyConfig(target_modules=[inner.name for inner in inside], exclude_modules=exclude)
            here = [inner for inner in inside if check_target_module_exists(free, inner.name)]
        layers |= {one.name: one for one in here}
    return list(layers.values())


def select_parameters(model: nn.Module, targets: Sequence[str]) -> list[ModuleSpec]:
    """The parameters whose names end with one of `targets` at a dot boundary, in the model's order.

    Raises:
        NoTargetError: (a LilyError) if one of `targets` matches nothing, with near matches.
        LilyError: if a match cannot be adapted.
    """
    specs: list[ModuleSpec] = []
    unmatched: dict[str, None] = {}
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
                unmatched[short] = None
                continue
            _check_owner(name, path, base)
            specs.append(parameter_spec(name, base))
    for target in targets:
        if target not in matched:
            hint, shown = suggest([target], list(unmatched))
            raise NoTargetError(
                f"target_parameters={target!r} matches no parameter; {hint}others of this model: {shown}"
            )
    return specs


def _check_owner(name: str, path: str, base: nn.Module) -> None:
    if not path:
        raise LilyError(
            f"target parameter {name} belongs to the model itself, and only submodules can be replaced; name other "
            "parameters in target_parameters"
        )
    if hasattr(base, "parametrizations") and name.rpartition(".")[2] in base.parametrizations:  # type: ignore[operator]
        raise LilyError(
            f"target parameter {name} has a parametrization (perhaps a quantization), so there is no plain weight to "
            "add to; remove the parametrization, or name other target_parameters"
        )
