"""What decides a layer's mixing weights: a router, or static logits.

Their layer reads the weights and never calls these modules. Engines that gather a module's weights when it is called
must therefore leave them to the module that contains them. PEFT's wrapping policy for FSDP1 makes units of trained
modules without children; hence the children `not_a_unit`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class Router(nn.Linear):
    """R (experts, r)."""

    def __init__(self, r: int, experts: int) -> None:
        super().__init__(r, experts, bias=False)
        self.not_a_unit = nn.Identity()
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))


class LayerTensor(nn.Module):
    """A tensor of one layer and adapter.

    A module and not a parameter: the parameter's name then has the adapter's name between dots, by which TRL and others
    find an adapter's tensors to copy them.

    Args:
        value: the tensor.
        requires_grad: whether they are trained.
    """

    def __init__(self, value: Tensor, requires_grad: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(value, requires_grad)
        self.not_a_unit = nn.Identity()


class Logits(LayerTensor):
    """The logits (experts,) of static weights; (stacked, experts) for stacked experts."""


class LogitsByAdapter(nn.ModuleDict):
    """Adapter -> `Logits`. Loads the state dicts of earlier versions too, in which they were plain parameters."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for adapter in self:
            if isinstance(value := state_dict.pop(f"{prefix}{adapter}", None), torch.Tensor):
                state_dict[f"{prefix}{adapter}.weight"] = value
        super()._load_from_state_dict(state_dict, prefix, *args)
