"""What is adapted, which layers share which tensors, and what does it cost? Decided before a weight is read."""

import peft  # noqa: F401  first, since `import lily` registers as soon as PEFT is imported, and that needs this package

from lily.plan.config import LilyConfig
from lily.plan.select import select_targets
from lily.plan.sharing_plan import SharingPlan, build_plan
from lily.plan.specs import ModuleSpec

__all__ = ["LilyConfig", "ModuleSpec", "SharingPlan", "build_plan", "select_targets"]
