"""Run a model without training: eval mode, precision, batches by length, devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from lily.recipes.data.tasks import Example, length
from lily.recipes.models.precision import precision_of
from lily.recipes.spec.schema import Recipe


def by_length(examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Batches of indices, sorted by length to reduce padding."""
    order = sorted(range(len(examples)), key=lambda i: length(examples[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@contextmanager
def inference(model: torch.nn.Module, recipe: Recipe) -> Iterator[None]:
    """Within: no gradients, eval mode, the recipe's precision. After: the model's previous mode."""
    training, dtype = model.training, getattr(torch, precision_of(recipe))
    model.eval()
    try:
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device_of(model).type, dtype)
        with torch.no_grad(), autocast:
            yield
    finally:
        model.train(training)


def to_device(inputs: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The inputs on a device."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def device_of(model: torch.nn.Module) -> torch.device:
    """The device of the model's inputs."""
    return next(model.parameters()).device


def place(model: Any) -> Any:
    """The model on the GPU if there is one; transformers loads a quantized model there itself."""
    quantized = getattr(model, "is_quantized", False)
    return model.to("cuda") if torch.cuda.is_available() and not quantized else model
