"""Lily: low-rank interconnected adaptation across layers, as a drop-in for LoRA on the Hugging Face stack.

Importing the package makes PEFT use it for Lily; `lily.unregister()` undoes that.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lily._version import __version__
from lily.errors import LilyError
from lily.plan.config import LilyConfig
from lily.plan.select import select_modules
from lily.plan.sharing_plan import SharingPlan, build_plan
from lily.tuner.model import LilyModel
from lily.tuner.registry import register, unregister

if TYPE_CHECKING:
    from lily import export
    from lily.callbacks.health import HealthCallback
    from lily.callbacks.settle import SettleCallback, Settling
    from lily.deploy.collapse import CollapseReport, collapse
    from lily.distributed import gathered_state, save_adapter, sum_bank_gradients

register()

# What a training script does not need at once is imported when it is asked for.
LAZY = {
    "CollapseReport": "lily.deploy.collapse",
    "collapse": "lily.deploy.collapse",
    "HealthCallback": "lily.callbacks.health",
    "SettleCallback": "lily.callbacks.settle",
    "Settling": "lily.callbacks.settle",
    "export": "lily.export",
    "gathered_state": "lily.distributed",
    "save_adapter": "lily.distributed",
    "sum_bank_gradients": "lily.distributed",
}

__all__ = [
    "CollapseReport",
    "HealthCallback",
    "LilyConfig",
    "LilyError",
    "LilyModel",
    "SettleCallback",
    "Settling",
    "SharingPlan",
    "__version__",
    "build_plan",
    "collapse",
    "export",
    "gathered_state",
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
