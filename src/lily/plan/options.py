"""Valid values of `LilyConfig` options, and the options that can differ between groups of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ROUTINGS = ("batch", "sequence", "token", "static", "uniform")
DYNAMIC = ("batch", "sequence", "token")
ACTIVATIONS = ("none", "relu", "gelu", "silu")
BIASES = ("none", "all", "lily_only")
DISTINCT = ("none", "permute", "signs", "permute+signs")
GAINS = ("none", "ones", "signs", "half-signs")
STARTS = ("orthonormal", "data")  # of A, besides True and False
PATTERNS = ("rank_pattern", "scaling_pattern")  # options by names or regular expressions of layers

# The published method.
PAPER = {"routing": "batch", "scaling": 1.0, "distinct": "none", "gain": "none", "own_r": 0}

OPTIONS = ("num_B", "stride_A", "num_A", "scaling", "dropout", "activation", "distinct", "gain", "own_r")


@dataclass(frozen=True)
class Options:
    """Options that can differ between groups of layers; see `LilyConfig` for each."""

    num_B: int
    stride_A: int | None
    num_A: int | None
    scaling: float | None
    dropout: float
    activation: str
    distinct: str
    gain: str
    own_r: int


def layer_patterns(layers: Iterable[str]) -> dict[str, str]:
    """Layer -> its own key in a pattern, where a name holds for every layer whose name ends with it.

    Args:
        layers: full names of all adapted layers.
    """
    names = list(layers)
    ends = {".".join(parts[i:]) for name in names for parts in (name.split("."),) for i in range(1, len(parts))}
    return {name: f"^{re.escape(name)}" if name in ends else name for name in names}


def sharing(own: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options, where setting `stride_A` or `num_A` overrides both of the configuration's."""
    return {"stride_A": None, "num_A": None, **own} if {"stride_A", "num_A"} & own.keys() else dict(own)
