"""Whether a model's vocabulary was changed after it was pretrained, so that an adapter needs its embeddings too."""

from __future__ import annotations

from typing import Any

from peft.config import PeftConfig
from torch import nn

REFERENCES = ("pkg:", "lily:")  # what the names of `lily.recipes.models.reference` begin with
FOLDER = "lily_base_folder"  # attribute of a model: where it was read from, if its name is no place


def vocabulary_changed(model: nn.Module, config: PeftConfig) -> bool:
    """Whether the base model has another vocabulary than its pretrained configuration; False if that is not known.

    Args:
        model: the base model.
        config: an adapter's configuration, which names the pretrained model.
    """
    ours: Any = getattr(model, "config", None)
    size = getattr(ours, "vocab_size", None)
    base = getattr(model, FOLDER, None) or config.base_model_name_or_path or getattr(model, "name_or_path", "")
    if size is None or not base:
        return False
    revision = config.revision or "main"
    try:
        # of a folder without a configuration, such as that of a GGUF file, transformers makes one of defaults
        known = bool(type(ours).get_config_dict(base, revision=revision)[0])
        return known and bool(type(ours).from_pretrained(base, revision=revision).vocab_size != size)
    except (OSError, ValueError):
        return False
