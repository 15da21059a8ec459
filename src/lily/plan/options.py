"""The choices that a configuration offers, and the options that groups of layers may have of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROUTINGS = ("batch", "sequence", "token", "static", "uniform")
DYNAMIC = ("batch", "sequence", "token")
ACTIVATIONS = ("none", "relu", "gelu", "silu")
BIASES = ("none", "all", "lily_only")

OPTIONS = ("num_B", "stride_A", "num_A", "scaling", "dropout", "activation")


@dataclass(frozen=True)
class Options:
    """What may differ from one group of layers to another; see `LilyConfig` for each."""

    num_B: int
    stride_A: int | None
    num_A: int | None
    scaling: float
    dropout: float
    activation: str


def sharing(own: Mapping[str, Any]) -> dict[str, Any]:
    """A group's own options, of which either way to say how A is shared takes the place of both."""
    return {"stride_A": None, "num_A": None, **own} if {"stride_A", "num_A"} & own.keys() else dict(own)
