"""Running a model without training it: eval mode, precision, batches by length, devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lily.recipes.data.tasks import Example, length
from lily.recipes.models.precision import precision_of
from lily.recipes.spec.schema import Recipe


def by_length(examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Batches of indices, short examples first, so that little is padded."""
    order = sorted(range(len(examples)), key=lambda i: length(examples[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


class inference:
    """Within: no gradients, eval mode, the recipe's precision. After: the model's mode as it was."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe) -> None:
        self.model, self.training = model, model.training
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision_of(recipe))
        self.contexts: list[Any] = [torch.no_grad()]
        if dtype is not None:
            self.contexts.append(torch.autocast(device_of(model).type, dtype))

    def __enter__(self) -> None:
        self.model.eval()
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)
        self.model.train(self.training)


def to_device(inputs: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A model's inputs, where the model takes them."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model's inputs go."""
    return next(model.parameters()).device


def place(model: Any) -> Any:
    """The model, moved to the GPU if there is one; transformers has put a quantised one there itself."""
    quantised = getattr(model, "is_quantized", False)
    return model.to("cuda") if torch.cuda.is_available() and not quantised else model
