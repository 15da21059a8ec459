"""Lily: low-rank interconnected adaptation across layers, as a drop-in for LoRA on the Hugging Face stack.

Importing the package makes PEFT use it for Lily; `lily.unregister()` undoes that.
"""

from lily._version import __version__
from lily.config import LilyConfig
from lily.errors import LilyError
from lily.model import LilyModel
from lily.plan import SharingPlan, build_plan, select_modules
from lily.registry import register, unregister

register()

__all__ = [
    "LilyConfig",
    "LilyError",
    "LilyModel",
    "SharingPlan",
    "__version__",
    "build_plan",
    "register",
    "select_modules",
    "unregister",
]
