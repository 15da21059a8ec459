"""Running a model on batches while its routing is recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lily.plan.options import DYNAMIC
from lily.tuner.adapter import Adapted

Batch = Mapping[str, Any] | Sequence[Any] | Tensor


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's outputs for a batch in any of the forms that `collapse` takes."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    if isinstance(batch, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    return model(*(v.to(device) if isinstance(v, Tensor) else v for v in batch))


@contextlib.contextmanager
def evaluating(model: nn.Module, found: Adapted) -> Iterator[None]:
    """Within: eval mode, masks noted. After: the mode as it was, and nothing recorded any more."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        found.bank.settled.pop(found.name, None)
        for layer in found.layers.values():
            layer.statistics.pop(found.name, None)
            if layer.settings[found.name].routing in DYNAMIC and found.name in layer.lily_logits:  # it did not end well
                del layer.lily_logits[found.name]
        found.watch_masks()
        for module, training in modes.items():
            module.training = training
