"""Base models: loading, conversion and quantization."""

from lily.recipes.models.load import (
    AUTO_CLASSES,
    described_model,
    heads_of,
    image_size,
    load_model,
    load_processor,
    load_tokenizer,
    local_model,
    meta_model,
)
from lily.recipes.models.reference import reference

__all__ = [
    "AUTO_CLASSES",
    "described_model",
    "heads_of",
    "image_size",
    "load_model",
    "load_processor",
    "load_tokenizer",
    "local_model",
    "meta_model",
    "reference",
]
