"""The tag `lily` among the tags of an adapted model, which PEFT and the Trainer write into model cards."""

from __future__ import annotations

from typing import Any

TAG = "lily"


def add_tag(model: Any) -> None:
    """Add the tag to `model.model_tags`, which PEFT reads of any model; beside the model's own tags."""
    tags = getattr(model, "model_tags", None) or []
    if TAG not in tags:
        model.model_tags = [*tags, TAG]


def remove_tag(model: Any) -> None:
    """Give the model back the tags that it had."""
    tags = [tag for tag in getattr(model, "model_tags", None) or [] if tag != TAG]
    if tags:
        model.model_tags = tags
    else:
        vars(model).pop("model_tags", None)
