"""Refuse a layer that is adapted in two ways: by another adapter of the model, or by training it whole too."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from lily.checkpoint.beside import trained_beside
from lily.errors import LilyError
from lily.layers.layer import LilyLayer
from lily.layers.parameter import Parameter
from lily.layers.sharding import shape_of
from lily.layers.slice import Slice
from lily.plan.config import LilyConfig
from lily.plan.select import adapted_twice
from lily.plan.sharing_plan import SAVED_HEADS
from lily.plan.specs import PARAMETERS, SLICE, ModuleSpec


def check_targets(model: nn.Module, specs: Sequence[ModuleSpec]) -> None:
    """Compare the targets of a new adapter with the adapted layers of the model.

    Args:
        model: the base model, or one that already carries adapters.
        specs: targets of the new adapter; `lily.plan.select` has checked them against each other.

    Raises:
        LilyError: if a layer is already adapted differently.
    """
    for spec in specs:
        module = model.get_submodule(spec.path)
        is_parameter = spec.kind in PARAMETERS
        if not isinstance(module, LilyLayer):
            if is_parameter and isinstance(module, BaseTunerLayer):
                raise adapted_twice(spec.path)
            continue
        if isinstance(module, Parameter) != is_parameter:
            raise adapted_twice(spec.path)
        if not is_parameter and isinstance(module, Slice) != (spec.kind == SLICE):
            raise LilyError(
                f"{spec.path} is adapted as a whole by one adapter and by its slices by another; give both the same "
                "target_slices"
            )


def check_beside(model: nn.Module, config: LilyConfig, specs: Sequence[ModuleSpec]) -> None:
    """Check what an adapter trains beside its layers, before PEFT wraps it (`modules_to_save` and others).

    Args:
        model: the base model, or one that already carries adapters.
        config: the new adapter's configuration.
        specs: its targets.

    Raises:
        LilyError: if a module would be trained in two ways or cannot be trained so, or a token does not exist.
    """
    trained = trained_beside(model, config)
    for inner, outer in trained.nested.items():
        raise LilyError(
            f"modules_to_save names {outer} and, inside it, {inner}, which is saved with it; name one of them"
        )
    for name in config.modules_to_save or ():
        if f"{specs[0].path}.base_layer".endswith(name):
            raise LilyError(
                f"modules_to_save has {name!r}, which would also match the layer inside every adapted layer, "
                f"{specs[0].path}.base_layer; rename the module, or name it with its parent"
            )
    tasks = SAVED_HEADS.get(str(config.task_type or ""), [])  # added by PEFT, whichever of them the model has
    for name in config.modules_to_save or ():
        if name not in tasks and not any(module.endswith(name) for module in trained.saved):
            warnings.warn(
                f"modules_to_save has {name!r}, but this model has no module of that name, so nothing is trained whole "
                "for it; check the name with model.named_modules()",
                stacklevel=2,
            )
    rows = config.trainable_token_indices
    for target in rows if isinstance(rows, dict) else () if rows is None else ("",):
        if not any(name.endswith(target) for name in (*trained.rows, *trained.followers)):
            raise LilyError(f"trainable_token_indices names {target or 'embed_tokens'}, which this model does not have")
    layers = {spec.path for spec in specs}
    for name, (_, module) in trained.saved.items():
        if (inside := next((p for p in layers if p == name or p.startswith(f"{name}.")), None)) is not None:
            raise LilyError(
                f"{inside} would be adapted, and {name} trained whole (modules_to_save); exclude one of them "
                "(exclude_modules), or name the module to save in full"
            )
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
            raise LilyError(
                f"modules_to_save matches {name}, a {type(module).__name__}, which is never called itself; name the "
                "modules in it"
            )
        _check_free(name, module, ModulesToSaveWrapper, "modules_to_save")
    for name, (_, module, indices) in trained.rows.items():
        _check_free(name, module, TrainableTokensWrapper, "trainable_token_indices")
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise LilyError(f"trainable_token_indices matches {name}, which is no embedding; name an embedding")
        size = shape_of(weight)[0]
        if max(indices) >= size:
            raise LilyError(
                f"trainable_token_indices has {max(indices)}, but {name} has {size} rows, from 0 to {size - 1}; call "
                "resize_token_embeddings before the adapter is added"
            )
    for name in (*trained.rows, *trained.followers):
        other = "trained whole (modules_to_save)" if name in trained.saved else "adapted (target_modules)"
        if name in layers or name in trained.saved:
            tied = f", whose weight {name} has," if name in trained.followers else ""
            raise LilyError(
                f"trainable_token_indices trains rows of the input embedding{tied} and {name} would also be {other}; "
                "remove one of them"
            )


def _check_free(name: str, module: nn.Module, wrapper: type[nn.Module], option: str) -> None:
    """Refuse a module that another adapter of the model has replaced by something else."""
    if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not isinstance(module, wrapper):
        raise LilyError(
            f"{option} matches {name}, which another adapter of this model trains in another way; load that adapter "
            "on a separate model"
        )
