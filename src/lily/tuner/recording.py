"""Run a model on batches while its routing is recorded."""

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
    """The model's outputs for a batch in any of the forms that `lily.collapse` accepts."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    if isinstance(batch, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    return model(*(v.to(device) if isinstance(v, Tensor) else v for v in batch))


@contextlib.contextmanager
def evaluating(model: nn.Module, adapted: Adapted) -> Iterator[None]:
    """Within, the model is in eval mode; afterwards its mode is restored and recording stops."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        adapted.bank.settled.pop(adapted.name, None)
        for layer in adapted.layers.values():
            layer.statistics.pop(adapted.name, None)
            if (
                layer.settings[adapted.name].routing in DYNAMIC and adapted.name in layer.lily_logits
            ):  # `collapse` was interrupted
                del layer.lily_logits[adapted.name]
        adapted.watch_masks()
        for module, training in modes.items():
            module.training = training
