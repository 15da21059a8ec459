"""Lily: low-rank interconnected adaptation across layers, as a drop-in for LoRA on the Hugging Face stack.

Importing the package makes PEFT use it for Lily; `lily.unregister()` undoes that.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lily._version import __version__
from lily.config import LilyConfig
from lily.errors import LilyError
from lily.model import LilyModel
from lily.plan import SharingPlan, build_plan
from lily.registry import register, unregister
from lily.selection import select_modules

if TYPE_CHECKING:
    from lily import export
    from lily.collapsing import CollapseReport, collapse
    from lily.distributed import gathered_state, save_adapter
    from lily.health import HealthCallback
    from lily.pipeline import sum_bank_gradients
    from lily.settle import SettleCallback, Settling

register()

# What a training script does not need at once is imported when it is asked for.
LAZY = {
    "CollapseReport": "lily.collapsing",
    "collapse": "lily.collapsing",
    "HealthCallback": "lily.health",
    "SettleCallback": "lily.settle",
    "Settling": "lily.settle",
    "export": "lily.export",
    "gathered_state": "lily.distributed",
    "save_adapter": "lily.distributed",
    "sum_bank_gradients": "lily.pipeline",
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
