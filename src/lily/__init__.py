"""Lily: low-rank interconnected adaptation across layers, as a drop-in for LoRA on the Hugging Face stack.

Importing the package makes PEFT use it for Lily, as soon as PEFT itself is imported; `lily.unregister()` undoes that.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from lily._after_import import Handlers, watch
from lily._version import __version__
from lily.errors import LilyError

if TYPE_CHECKING:
    from lily import export, optim
    from lily.callbacks.health import HealthCallback
    from lily.callbacks.null_space import NullSpace, NullSpaceCallback, null_space
    from lily.callbacks.settle import SettleCallback, Settling
    from lily.deploy.collapse import CollapseReport, collapse
    from lily.distributed import gathered_state, save_adapter, sum_bank_gradients
    from lily.plan.config import LilyConfig
    from lily.plan.select import select_modules
    from lily.plan.sharing_plan import SharingPlan, build_plan
    from lily.recipes.results.base_model import base_model
    from lily.tuner.data_start import DataStart, initialize_from_data
    from lily.tuner.model import LilyModel
    from lily.tuner.registry import register, unregister

# PEFT, transformers and torch take seconds to import, so each name is imported when it is first used.
LAZY = {
    "CollapseReport": "lily.deploy.collapse",
    "DataStart": "lily.tuner.data_start",
    "HealthCallback": "lily.callbacks.health",
    "LilyConfig": "lily.plan.config",
    "LilyModel": "lily.tuner.model",
    "NullSpace": "lily.callbacks.null_space",
    "NullSpaceCallback": "lily.callbacks.null_space",
    "SettleCallback": "lily.callbacks.settle",
    "Settling": "lily.callbacks.settle",
    "SharingPlan": "lily.plan.sharing_plan",
    "base_model": "lily.recipes.results.base_model",
    "build_plan": "lily.plan.sharing_plan",
    "collapse": "lily.deploy.collapse",
    "export": "lily.export",
    "gathered_state": "lily.distributed",
    "initialize_from_data": "lily.tuner.data_start",
    "null_space": "lily.callbacks.null_space",
    "optim": "lily.optim",
    "register": "lily.tuner.registry",
    "save_adapter": "lily.distributed",
    "select_modules": "lily.plan.select",
    "sum_bank_gradients": "lily.distributed",
    "unregister": "lily.tuner.registry",
}

__all__ = [
    "CollapseReport",
    "DataStart",
    "HealthCallback",
    "LilyConfig",
    "LilyError",
    "LilyModel",
    "NullSpace",
    "NullSpaceCallback",
    "SettleCallback",
    "Settling",
    "SharingPlan",
    "__version__",
    "base_model",
    "build_plan",
    "collapse",
    "export",
    "gathered_state",
    "initialize_from_data",
    "null_space",
    "optim",
    "register",
    "save_adapter",
    "select_modules",
    "sum_bank_gradients",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module 'lily' has no attribute {name!r}")
    module = importlib.import_module(LAZY[name])
    return module if LAZY[name] == f"lily.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    from lily.tuner import auto_classes
    from lily.tuner.registry import register

    auto_classes.finder = _base_model
    register()


def _base_model(adapter: str) -> str:
    from lily.recipes.results.base_model import base_model

    return base_model(adapter)


def _from_auto_class(*args: Any, **kwargs: Any) -> Any:
    from lily.tuner.auto_classes import auto_transformers

    return auto_transformers(*args, **kwargs)


def _removed(model: Any) -> None:
    if "lily.tuner.model" in sys.modules:  # else it has no Lily adapter
        from lily.tuner.removal import remove_if_empty

        remove_if_empty(model)


def _lora_state(state: Any) -> Any:
    from lily.deploy.diffusers_files import lora_state

    return lora_state(state)


def _save_lora_adapter(*args: Any, **kwargs: Any) -> None:
    from lily.deploy.diffusers_files import save_lora_adapter

    save_lora_adapter(*args, **kwargs)


def _refuse_lora(adapter: Any) -> None:
    from lily.tuner.hotswap import refuse_lora

    refuse_lora(adapter)


def _sync_config(model: Any) -> Any:
    from lily.deploy.trl_sync import sync_config

    return sync_config(model)


def _save_for_sync(*args: Any) -> None:
    from lily.deploy.trl_sync import save_for_sync

    save_for_sync(*args)


watch(
    Handlers(
        _register,
        _removed,
        _lora_state,
        _save_lora_adapter,
        _refuse_lora,
        _sync_config,
        _save_for_sync,
        _from_auto_class,
    )
)
