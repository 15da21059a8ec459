"""The layers of a model that a configuration selects, and all that it selects together.

Only names and sizes are read, so a model on the meta device is enough.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Sequence

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn

from lily.errors import LilyError
from lily.io.words import some
from lily.plan.attention import IN, OUT, InProjection, check_attention
from lily.plan.config import LilyConfig
from lily.plan.select_parts import select_parallel_modules, select_parameters, select_slices
from lily.plan.specs import (
    PARALLEL_MODULE,
    PARAMETERS,
    ModuleSpec,
    base_of,
    layer_spec,
)
from lily.plan.stacked_experts import add_stacked_experts
from lily.plan.uncalled_layers import uncalled
from lily.plan.walk import NoTargetError, is_linear, own_modules, suggest

SHOWN = 3  # names in a message


def select_targets(model: nn.Module, config: LilyConfig) -> list[ModuleSpec]:
    """The layers, then the parallel modules, then the parameters that `config` targets, each in the model's order.

    Args:
        model: the base model, or one that already carries adapters.
        config: the adapter's configuration.

    Returns:
        One `ModuleSpec` per layer, slice, parallel module and parameter.

    Raises:
        NoTargetError: (a LilyError) if a target matches nothing, with near matches.
        LilyError: if a match cannot be adapted.
    """
    stacked = add_stacked_experts(model, config)
    others = config.target_parameters or config.parallel_modules
    specs: list[ModuleSpec] = []
    if config.target_modules or not others:
        try:
            specs = select_modules(model, config)
        except NoTargetError:
            if not stacked:
                raise
            config.target_modules = None  # it names stacked experts alone
    specs = select_slices(model, specs, config.target_slices)
    specs += select_parallel_modules(model, config.parallel_modules)
    if config.target_parameters:
        specs += select_parameters(model, config.target_parameters)
    _check_names(specs)
    return specs


def _check_names(specs: Sequence[ModuleSpec]) -> None:
    """Refuse a layer that one configuration would adapt in two ways: whole, by a part, or by a parallel module."""
    parallel = tuple(f"{spec.name}." for spec in specs if spec.kind == PARALLEL_MODULE)
    for spec in specs:
        if spec.name.startswith(parallel):
            raise LilyError(
                f"{spec.name} is inside {next(p for p in parallel if spec.name.startswith(p))[:-1]}, a parallel "
                "module; remove one of them from the configuration, or adapt it by a second adapter"
            )
    layers = {spec.path for spec in specs if spec.kind not in PARAMETERS}
    for spec in specs:
        if spec.kind in PARAMETERS and spec.path in layers:
            raise adapted_twice(spec.path)


def adapted_twice(path: str) -> LilyError:
    """The error for a layer that is adapted as a whole and by its parameter."""
    return LilyError(
        f"{path} would be adapted both as a layer and by its parameter; remove it from target_modules or from "
        "target_parameters"
    )


def select_modules(model: nn.Module, config: LilyConfig) -> list[ModuleSpec]:
    """The layers of `model` that `config` targets, in the model's order.

    Replaces `"all-linear"` in `config.target_modules` by the names that it stands for, as PEFT does.

    Args:
        model: the base model, or one that already carries adapters.
        config: `target_modules` must be set.

    Returns:
        One `ModuleSpec` per layer.

    Raises:
        NoTargetError: (a LilyError) if nothing matches, with near matches.
        LilyError: if a match cannot be adapted, or its parent reads its weight without calling it, or an index in
            `config.layers_to_transform` selects no layer.
    """
    all_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    _maybe_include_all_linear_layers(config, model)
    modules = dict(own_modules(model))
    _check_inside(model, config, all_linear)
    inert = {name: reason for name, reason in uncalled(modules).items() if reason.remedy is None}
    if all_linear and isinstance(config.target_modules, set):
        if left_out := sorted(config.target_modules & inert.keys()):
            warnings.warn(
                f"target_modules='all-linear' leaves out {some(left_out)}: {inert[left_out[0]].parent} reads "
                f"the weight {inert[left_out[0]].why}, so an adapter there would do nothing",
                stacklevel=2,
            )
        config.target_modules -= inert.keys() | {n for n, m in modules.items() if isinstance(base_of(m), InProjection)}
        # modules that train whole need no adapter
        saved = tuple(config.modules_to_save or ())
        config.target_modules -= {
            n for n in config.target_modules if n in saved or n.endswith(tuple(f".{s}" for s in saved))
        }
    specs = []
    attentions = {name for name, module in modules.items() if isinstance(base_of(module), nn.MultiheadAttention)}
    for name, module in modules.items():
        if name in attentions and check_target_module_exists(config, name):
            if isinstance(module, BaseTunerLayer):
                raise adapted_twice(name)
            check_attention(name, module)
        if name in attentions or not _is_target(config, name, attentions):
            continue
        if name in inert:
            raise LilyError(
                f"{name} belongs to {inert[name].parent}, which reads its weight {inert[name].why}, so an "
                f"adapter there would do nothing; exclude it with exclude_modules=['{name.rpartition('.')[2]}']"
            )
        specs.append(layer_spec(name, module))
    if not specs:
        raise _no_target(config, modules, attentions)
    _check_layer_indices(specs, config, modules, attentions)
    return specs


def _is_target(config: LilyConfig, name: str, attentions: set[str]) -> bool:
    """Whether `config.target_modules` matches a layer, or the `nn.MultiheadAttention` whose projection it is."""
    found = check_target_module_exists(config, name)
    parent, _, short = name.rpartition(".")
    if found or isinstance(found, _ExcludedModule) or parent not in attentions or short not in (IN, OUT):
        return bool(found)
    return bool(check_target_module_exists(config, parent))


def matched(model: nn.Module, config: LilyConfig) -> set[str]:
    """Names of the modules that `config.target_modules` matches, whether they can be adapted or not."""
    return {name for name, _ in own_modules(model) if check_target_module_exists(config, name)}


def _check_layer_indices(
    specs: Sequence[ModuleSpec], config: LilyConfig, modules: Collection[str], attentions: set[str]
) -> None:
    for index in _layer_indices(config):
        alone = copy.copy(config)
        alone.layers_to_transform = [index]
        if not any(_is_target(alone, m.name, attentions) for m in specs):
            raise LilyError(
                f"layers_to_transform has the index {index}, but no layer of that number matches target_modules="
                f"{sorted(config.target_modules or ())}; {_other_layers(alone, modules, attentions) or 'remove it'}"
            )


def _layer_indices(config: LilyConfig) -> Sequence[int]:
    asked = config.layers_to_transform
    return asked if isinstance(asked, (list, tuple)) else [] if asked is None else [asked]


def _other_layers(config: LilyConfig, modules: Collection[str], attentions: set[str]) -> str:
    """What to do where `target_modules` matches layers, but none that `layers_to_transform` asks for.

    Without `layers_pattern`, PEFT reads the number after a list that is inside a module (`model.layers.1.x`), not one
    after a list at the root of the model (`blocks.1.x`).

    Returns:
        "" where `target_modules` matches no layer at any number.
    """
    anywhere = copy.copy(config)
    anywhere.layers_to_transform = anywhere.layers_pattern = None
    names = [name for name in modules if _is_target(anywhere, name, attentions)]
    if not names:
        return ""
    numbers: dict[str, set[int]] = {}  # name of a list -> its layers that match
    for name in names:
        if found := re.match(r"(?:^|.*?\.)([^.]+)\.(\d+)\.", name):
            numbers.setdefault(found[1], set()).add(int(found[2]))
    lists = [name for name, those in numbers.items() if those & set(_layer_indices(config))]
    if lists:
        root = "" if config.layers_pattern else "; a list at the root of the model is found by its name alone"
        pattern = lists[0] if len(lists) == 1 else lists
        return f"give layers_pattern={pattern!r}, where layers of that number are{root}"
    where = "; ".join(f"{', '.join(map(str, sorted(those)[:SHOWN]))} in {name}" for name, those in numbers.items())
    return f"layers that match: {where or ', '.join(names[:SHOWN]) + ', which have no number'}"


def _check_inside(model: nn.Module, config: LilyConfig, all_linear: bool) -> None:
    """Refuse targets inside a module that another adapter runs beside: PEFT skips what is inside an adapted module."""
    for path, module in own_modules(model):
        for inner, child in base_of(module).named_modules() if isinstance(module, BaseTunerLayer) else ():
            name = f"{path}.{inner}"
            target = check_target_module_exists(config, name)
            wanted = target or (all_linear and not isinstance(target, _ExcludedModule))
            if inner and is_linear(child) and wanted:
                raise LilyError(
                    f"{name} is inside {path}, which an adapter of this model runs beside; add the adapter on {name} "
                    f"before that one, or exclude it with exclude_modules=['{inner.rpartition('.')[2]}']"
                )


def _no_target(config: LilyConfig, modules: dict[str, nn.Module], attentions: set[str]) -> NoTargetError:
    if not config.target_modules:
        return NoTargetError(
            "target_modules='all-linear' matches no layer: the model has no linear layers besides its output layer and "
            "what is trained whole; name convolutions in target_modules, or parameters in target_parameters"
        )
    known = list(dict.fromkeys(n.rpartition(".")[2] for n, m in modules.items() if is_linear(m)))
    targets = config.target_modules
    wanted = sorted(targets) if isinstance(targets, (set, list, tuple)) else [str(targets)]
    if any(isinstance(check_target_module_exists(config, n), _ExcludedModule) for n in modules):
        free = LilyConfig(target_modules=targets)
        if any(check_target_module_exists(free, n) for n in modules):
            if not config.exclude_modules:
                return NoTargetError(
                    f"target_modules={wanted if len(wanted) > 1 else repr(wanted[0])} matches only modules that are "
                    f"trained whole anyway ({', '.join(config.modules_to_save or ())}); name other modules"
                )
            return NoTargetError(
                f"every module that target_modules={wanted} matches is excluded by exclude_modules="
                f"{config.exclude_modules} or modules_to_save={config.modules_to_save}; relax one of them"
            )
    matches = f"target_modules={wanted if len(wanted) > 1 else repr(wanted[0])} matches no module"
    if config.layers_to_transform is not None and (hint := _other_layers(config, modules, attentions)):
        return NoTargetError(f"{matches} in layers {config.layers_to_transform}; {hint}")
    hint, shown = suggest(wanted, known)
    return NoTargetError(f"{matches}; {hint}linear layers of this model: {shown}")
