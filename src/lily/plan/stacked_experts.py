"""Experts whose projections transformers 5 stacks in parameters, found by the names that they had as layers.

`all-linear`, and names such as `gate_proj`, mean them for LoRA, so they do for Lily: PEFT's conversion says which
parameters hold them.
"""

from __future__ import annotations

import copy
import warnings

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from lily.errors import LilyError
from lily.plan.config import LilyConfig
from lily.plan.options import DYNAMIC
from lily.plan.specs import base_of


def add_stacked_experts(model: nn.Module, config: LilyConfig) -> bool:
    """Add the parameters that hold experts which `config.target_modules` names to `config.target_parameters`.

    A configuration that was read from a file names all that its adapter has, and is not changed. Routing becomes static
    where it is the default, since tokens cannot be observed at a parameter; where the configuration asks for anything
    that needs them, the experts are left out with a warning.

    Args:
        model: the base model.
        config: the adapter's configuration; changed in place.

    Returns:
        Whether it adapts such parameters.

    Raises:
        LilyError: if it names one of two projections that are one parameter, such as `gate_proj` without `up_proj`.
    """
    if config.from_file or not config.target_modules or not hasattr(getattr(model, "config", None), "model_type"):
        return False
    probe = LoraConfig(target_modules=copy.copy(config.target_modules), exclude_modules=config.exclude_modules)
    try:
        convert_peft_config_for_transformers(probe, model=model, conversions=None)
    except ValueError as error:
        raise LilyError(f"target_modules: {error}") from None
    found = [name for target in sorted(probe.target_parameters or ()) for name in _of_experts(model, config, target)]
    known = config.target_parameters or []
    new = [name for name in found if not any(name == k or name.endswith(f".{k}") for k in known)]
    if not new:
        return bool(found)
    if why := _needs_hidden_states(config):
        warnings.warn(
            f"{why} needs hidden states, which stacked experts do not have, so {', '.join(new)} are left out; adapt "
            "them by a second adapter, or leave that option out",
            stacklevel=2,
        )
        return False
    _leave_out_owners(model, config, new)
    config.target_parameters = sorted({*known, *new})
    if config.routing_is_default:
        config.routing = config.default_routing(False)
    return True


def _leave_out_owners(model: nn.Module, config: LilyConfig, parameters: list[str]) -> None:
    """Name the layers that `target_modules` matches one by one if it matches a parameter's module too."""
    if isinstance(config.target_modules, str) and config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return  # those are linear layers
    owners = {name.rpartition(".")[0] for p in parameters for name in _parameters(model, p)}
    matched = {name for name, _ in model.named_modules() if check_target_module_exists(config, name)}
    if matched & owners:
        config.target_modules = matched - owners or None


def _needs_hidden_states(config: LilyConfig) -> str | None:
    if not config.routing_is_default and config.num_B > 1 and config.routing in DYNAMIC:
        return f"routing={config.routing!r}"
    if config.activation != "none":
        return f"activation={config.activation!r}"
    return f"dropout={config.dropout}" if config.dropout else None


def _of_experts(model: nn.Module, config: LilyConfig, target: str) -> list[str]:
    """The parameters called `target`, by the shortest name that stands for those that the configuration leaves in."""
    module = target.removesuffix(".weight")
    alone = copy.copy(config)
    alone.target_modules = {module}
    names = _parameters(model, target)
    kept = [name for name in names if check_target_module_exists(alone, name.removesuffix(".weight"))]
    return [target] if kept and len(kept) == len(names) else kept


def _parameters(model: nn.Module, target: str) -> list[str]:
    """Full names of the parameters called `target`, without those of linear layers."""
    return [
        f"{path}.{name}"
        for path, owner in model.named_modules()
        if not isinstance(base_of(owner), nn.Linear)
        for name, _ in base_of(owner).named_parameters(recurse=False)
        if f".{path}.{name}".endswith(f".{target}")
    ]
