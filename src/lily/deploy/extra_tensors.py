"""Tensors of an adapter besides its matrices: biases, modules saved whole, rows and embeddings."""

from __future__ import annotations

import peft
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from lily.checkpoint.beside import tied_modules
from lily.checkpoint.format import KEY, PREFIX
from lily.plan.config import LilyConfig
from lily.plan.vocabulary import vocabulary_changed
from lily.tuner.adapter import Adapted


def saved_modules(config: LilyConfig) -> list[str] | None:
    """The modules that an adapter saves whole, without the duplicates that PEFT adds at every load."""
    return list(dict.fromkeys(config.modules_to_save)) if config.modules_to_save else None


def other_entries(model: nn.Module, adapted: Adapted) -> dict[str, Tensor]:
    """Entries of an adapter file besides Lily's tensors, as PEFT reads them beside a LoRA.

    Frozen embeddings are there only if the vocabulary was changed. A module saved whole is there under each of its
    names if it is tied, since PEFT looks up each.
    """
    wrapped = isinstance(model, peft.PeftModel)
    resized = vocabulary_changed(adapted.root, adapted.config)
    state = get_peft_model_state_dict(
        model if wrapped else adapted.root, adapter_name=adapted.name, save_embedding_layers=resized
    )
    if not wrapped:  # PeftModel's names have the prefix already
        state = {f"{PREFIX}{k}": v for k, v in state.items()}
    out = {k: v.detach().cpu().contiguous() for k, v in state.items() if not KEY.match(k)}
    embedding = f"{PREFIX}{tied_modules(adapted.root)[0]}."
    for name in adapted.config.modules_to_tie or ():
        tied = {f"{PREFIX}{name}.{k.removeprefix(embedding)}": v for k, v in out.items() if k.startswith(embedding)}
        out |= {k: v.clone() for k, v in tied.items()}
    return out
