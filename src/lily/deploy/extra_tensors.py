"""Tensors of an adapter besides its matrices: biases and modules saved whole."""

from __future__ import annotations

import peft
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from lily.plan.config import LilyConfig
from lily.tuner.adapter import Adapted

PREFIX = "base_model.model."


def saved_modules(config: LilyConfig) -> list[str] | None:
    """The modules that an adapter saves whole, without the duplicates that PEFT adds at every load."""
    return list(dict.fromkeys(config.modules_to_save)) if config.modules_to_save else None


def other_entries(model: nn.Module, adapted: Adapted, frozen: bool = True) -> dict[str, Tensor]:
    """Entries of an adapter file besides Lily's tensors: biases, modules saved whole.

    PEFT also saves the frozen weight of an adapted output layer, which is kept if `frozen`.
    """
    wrapped = isinstance(model, peft.PeftModel)
    state = get_peft_model_state_dict(model if wrapped else adapted.root, adapter_name=adapted.name)
    if not wrapped:  # PeftModel's names have the prefix already
        state = {f"{PREFIX}{k}": v for k, v in state.items()}
    # With bias="all" PEFT repeats a saved module's bias under its wrapper's names, which are not valid in a file.
    own = ("lily_", "modules_to_save.", "original_module.")
    left_out = own if frozen else (*own, "base_layer.")
    return {k: v.detach().cpu().contiguous() for k, v in state.items() if not any(f".{o}" in k for o in left_out)}
