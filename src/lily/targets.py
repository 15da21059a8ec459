"""What a configuration targets in a model: layers by `target_modules`, parameters by `target_parameters`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lily.config import LilyConfig
from lily.errors import LilyError
from lily.kinds import PARAMETERS, ModuleSpec, base_of, parameter_spec
from lily.layer import LilyLayer
from lily.parameters import Parameter
from lily.plan import NoTargetError, own_modules, select_modules


def select_targets(model: nn.Module, config: LilyConfig) -> list[ModuleSpec]:
    """The layers and then the parameters that `config` targets, each in the model's order.

    Like `lily.plan.select_modules`, it reads names and sizes only.

    Args:
        model: the base model, or one that already carries adapters.
        config: what to adapt.

    Returns:
        One `ModuleSpec` per layer and per parameter.

    Raises:
        NoTargetError: (a LilyError) if a target matches nothing, with near matches.
        LilyError: if a match cannot be adapted.
    """
    specs = select_modules(model, config) if config.target_modules or not config.target_parameters else []
    if config.target_parameters:
        specs += select_parameters(model, config.target_parameters)
    _check_layers(model, specs)
    return specs


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
    """Refuse a layer that is to be adapted both as a layer and by its parameters."""
    layers = {spec.name for spec in specs if spec.kind not in PARAMETERS}
    for spec in specs:
        inside = spec.kind in PARAMETERS
        path = spec.name.rpartition(".")[0] if inside else spec.name
        module = model.get_submodule(path)
        other = isinstance(module, LilyLayer) and isinstance(module, Parameter) != inside
        if (inside and path in layers) or other or (inside and _foreign(module)):
            raise LilyError(
                f"{path} would be adapted as a layer and by its parameter too; leave it out of target_modules or of "
                "target_parameters"
            )


def _foreign(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer) and not isinstance(module, LilyLayer)
