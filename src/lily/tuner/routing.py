"""The routing that an adapter has on a model, where its configuration leaves it open."""

from __future__ import annotations

import warnings

from torch import nn

from lily.plan.config import CAUSAL_TASKS, LilyConfig
from lily.plan.walk import has_causal_part, is_causal


def decide_routing(config: LilyConfig, model: nn.Module) -> None:
    """Choose the default routing of the model, and warn of one that lets a causal model see later tokens."""
    if config.routing_is_default:
        config.routing = config.default_routing(config.task_type in CAUSAL_TASKS or has_causal_part(model))
    if is_causal(model) and config.num_B > 1 and config.routing in ("batch", "sequence"):
        leaked = "later tokens and padding" + (
            " and the other samples of the batch" if config.routing == "batch" else ""
        )
        warnings.warn(
            f"routing={config.routing!r} on a causal model: its outputs will depend on {leaked}, so decoding with a KV "
            "cache differs from decoding without. Use routing='token' (see docs/routing.md)",
            stacklevel=2,
        )
