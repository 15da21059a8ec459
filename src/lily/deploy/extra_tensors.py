"""What an adapter has besides its matrices: biases and modules saved whole."""

from __future__ import annotations

import peft
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from lily.plan.config import LilyConfig
from lily.tuner.adapter import Adapted

PREFIX = "base_model.model."


def saved_modules(config: LilyConfig) -> list[str] | None:
    """The modules that an adapter saves whole; PEFT adds the same names again at every load."""
    return list(dict.fromkeys(config.modules_to_save)) if config.modules_to_save else None


def other_entries(model: nn.Module, found: Adapted, frozen: bool = True) -> dict[str, Tensor]:
    """What an adapter file holds besides Lily's own tensors: biases, modules saved whole.

    PEFT also saves the frozen weight of an adapted output layer; `frozen` says whether to keep that.
    """
    wrapped = isinstance(model, peft.PeftModel)
    state = get_peft_model_state_dict(model if wrapped else found.root, adapter_name=found.name)
    if not wrapped:  # a wrapper's names are what the file has
        state = {f"{PREFIX}{k}": v for k, v in state.items()}
    # With bias="all" a saved module's bias comes again under its wrapper's names, which are no names of a file.
    own = ("lily_A", "lily_B", "lily_router", "lily_logits", "modules_to_save.", "original_module.")
    left_out = own if frozen else (*own, "base_layer.")
    return {k: v.detach().cpu().contiguous() for k, v in state.items() if not any(f".{o}" in k for o in left_out)}
