"""Which layers of a model a configuration targets: names and sizes only, so the meta device is enough."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Sequence

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from lily.config import LilyConfig
from lily.errors import LilyError
from lily.kinds import ModuleSpec, base_of, layer_spec
from lily.uncalled import uncalled


class NoTargetError(LilyError, NoMatchingPeftModuleError):  # type: ignore[misc]
    """The targets match nothing. Also PEFT's own type for that, so existing handlers catch it."""


def select_modules(model: nn.Module, config: LilyConfig) -> list[ModuleSpec]:
    """The layers of `model` that `config` targets, in the model's order.

    Reads names and sizes only, so a model on the meta device will do. `"all-linear"` in `config.target_modules` is
    replaced by the names it stands for, as PEFT does.

    Args:
        model: the base model, or one that already carries adapters.
        config: `target_modules` must be set.

    Returns:
        One `ModuleSpec` per layer.

    Raises:
        NoTargetError: (a LilyError) if nothing matches, with near matches.
        LilyError: if a match is of no kind that can be adapted, or is read by its parent without being called, or if
            an index in `config.layers_to_transform` chooses no layer.
    """
    all_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    _maybe_include_all_linear_layers(config, model)
    modules = dict(own_modules(model))
    inert = {name: found for name, found in uncalled(modules).items() if found.remedy is None}
    if all_linear and isinstance(config.target_modules, set):
        config.target_modules -= inert.keys()
        # what trains whole needs no adapter
        saved = tuple(config.modules_to_save or ())
        config.target_modules -= {
            n for n in config.target_modules if n in saved or n.endswith(tuple(f".{s}" for s in saved))
        }
    found = []
    for name, module in modules.items():
        if not check_target_module_exists(config, name):
            continue
        if name in inert:
            raise LilyError(
                f"{name} belongs to {inert[name].parent}, which reads its weight {inert[name].why}, so an "
                f"adapter there would do nothing; leave it out with exclude_modules=['{name.rpartition('.')[2]}']"
            )
        found.append(layer_spec(name, module))
    if not found:
        raise _no_target(config, modules)
    _check_layer_indices(found, config)
    return found


def _check_layer_indices(found: Sequence[ModuleSpec], config: LilyConfig) -> None:
    asked = config.layers_to_transform
    for index in asked if isinstance(asked, (list, tuple)) else [] if asked is None else [asked]:
        alone = copy.copy(config)
        alone.layers_to_transform = [index]
        if not any(check_target_module_exists(alone, m.name) for m in found):
            raise LilyError(
                f"layers_to_transform has the index {index}, but no layer of that number matches target_modules="
                f"{sorted(config.target_modules or ())}; leave it out"
            )


def own_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Modules of the base model: adapted layers stand for their base layer, and adapter internals are skipped."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
            if not hasattr(module, "base_layer"):
                continue
        yield name, module


def _no_target(config: LilyConfig, modules: dict[str, nn.Module]) -> NoTargetError:
    known = list(dict.fromkeys(n.rpartition(".")[2] for n, m in modules.items() if _is_linear(m)))
    targets = config.target_modules
    wanted = sorted(targets) if isinstance(targets, (set, list, tuple)) else [str(targets)]
    if any(isinstance(check_target_module_exists(config, n), _ExcludedModule) for n in modules):
        free = LilyConfig(target_modules=targets)
        if any(check_target_module_exists(free, n) for n in modules):
            if not config.exclude_modules:
                return NoTargetError(
                    f"target_modules={wanted if len(wanted) > 1 else repr(wanted[0])} matches only modules that are "
                    f"trained whole anyway ({', '.join(config.modules_to_save or ())}); name others"
                )
            return NoTargetError(
                f"every module that target_modules={wanted} matches is excluded by exclude_modules="
                f"{config.exclude_modules} or modules_to_save={config.modules_to_save}; relax one of them"
            )
    near = list(dict.fromkeys(c for w in wanted for c in difflib.get_close_matches(w.rpartition(".")[2], known, n=3)))
    hint = f"did you mean {', '.join(near)}? " if near else ""
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    where = f" in layers {config.layers_to_transform}" if config.layers_to_transform is not None else ""
    return NoTargetError(
        f"target_modules={wanted if len(wanted) > 1 else repr(wanted[0])} matches no module{where}; {hint}"
        f"linear layers of this model: {shown or 'none'}"
    )


def _is_linear(module: nn.Module) -> bool:
    base = base_of(module)
    return isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D"


def is_causal(model: nn.Module) -> bool:
    """Whether tokens of this model must not see later ones: causal language models and state-space models."""
    config = getattr(model, "config", None)
    if isinstance(config, dict):
        return False
    model_type = str(getattr(config, "model_type", ""))
    if any(key in model_type for key in ("mamba", "rwkv", "xlstm", "recurrent_gemma")):
        return True
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return True
    return bool(getattr(config, "is_decoder", False)) or bool(getattr(config, "is_encoder_decoder", False))
