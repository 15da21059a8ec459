"""Drift: the difference between a model's outputs before and after a change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lily.errors import LilyError
from lily.plan.wrappers import innermost
from lily.tuner.recording import Batch


@dataclass(frozen=True)
class Drift:
    """Difference between a model's outputs before and after, on held-out batches.

    Attributes:
        kl: mean KL divergence of the new output distribution from the old one in nats, over unmasked positions; None
            if the outputs are not distributions.
        relative_error: norm of the difference over the norm of the old outputs.
        positions: number of compared outputs.
    """

    kl: float | None
    relative_error: float
    positions: int

    def closer_than(self, other: Drift) -> bool:
        """Whether this drift is smaller: by `kl` if both have it, else by `relative_error`."""
        if self.kl is not None and other.kl is not None:
            return self.kl < other.kl
        return self.relative_error < other.relative_error


def outputs(result: Any) -> Tensor:
    """The compared part of a model's result: logits, last hidden state, sample, or the first tensor with a dimension.

    Raises:
        LilyError: if there is none.
    """
    for found in (*(getattr(result, name, None) for name in ("logits", "last_hidden_state", "sample")), result):
        if isinstance(found, Tensor):
            return found
    if isinstance(result, Mapping):
        result = tuple(result.values())
    values = result if isinstance(result, Sequence) else ()
    first = next((v for v in values if isinstance(v, Tensor) and v.ndim), None)
    if first is None:
        raise LilyError(
            f"a {type(result).__name__} holds no outputs to compare; give collapse a `forward` that returns them"
        )
    return first


def kept_rows(out: Tensor, batch: Batch, model: nn.Module) -> Tensor:
    """Mask (rows,) of the flattened outputs: unmasked positions if there is one output per token, else all.

    An encoder-decoder model has one output per token of the decoder, which has a separate mask.
    """
    paired = bool(getattr(getattr(innermost(model), "config", None), "is_encoder_decoder", False))
    mask = batch.get("decoder_attention_mask" if paired else "attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and out.shape[:-1] == mask.shape:
        return (mask != 0).reshape(-1).to(out.device)
    return torch.ones(out.shape[:-1].numel(), dtype=torch.bool, device=out.device)


def is_distribution(model: nn.Module) -> bool:
    """Whether the model's outputs are logits of a distribution, judged by its name and configuration."""
    model = innermost(model)
    model = innermost(getattr(model, "get_base_model", lambda: model)())
    config = getattr(model, "config", None)
    if getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
        return False
    name = type(model).__name__
    return any(word in name for word in ("LM", "Classification", "ConditionalGeneration", "Choice"))


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Sum over rows of KL(softmax(p) || softmax(q)), for logits (rows, classes)."""
    return F.kl_div(F.log_softmax(q, -1), F.log_softmax(p, -1), reduction="sum", log_target=True)
