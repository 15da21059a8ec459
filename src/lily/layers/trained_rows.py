"""Trained rows of an embedding (`trainable_token_indices`), whose parameters are named as an adapter's own.

PEFT keeps them in a `ParameterDict`, where a name ends with the adapter's. TRL and others copy the tensors with the
adapter's name between dots, and would leave the rows of a reference as they were before training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from lily.layers.router import Logits, LogitsByAdapter


class Rows(Logits):
    """The rows (tokens, width) of one adapter; held as its static logits are."""

    @property
    def requires_grad(self) -> bool:
        """Of the rows; it can be set, since PEFT's are a parameter."""
        return self.weight.requires_grad

    @requires_grad.setter
    def requires_grad(self, learns: bool) -> None:
        self.weight.requires_grad_(learns)


class RowsByAdapter(LogitsByAdapter):
    """Adapter -> its rows; reads as PEFT's `ParameterDict`. Loads the state dicts of earlier versions too."""

    def __init__(self, rows: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for adapter, row in rows.items():
            self[adapter] = row

    def __getitem__(self, adapter: str) -> Any:
        return self._modules[adapter].weight

    def __setitem__(self, adapter: str, value: Any) -> None:
        super().__setitem__(adapter, _rows(value) if isinstance(value, Tensor) else value)


class RowsWrapper(TrainableTokensWrapper):  # type: ignore[misc]
    """PEFT's wrapper around an embedding of which rows are trained, where adapters may train none, for these names."""

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Name in a file -> name in the wrapper, of one adapter's rows. See PEFT."""
        if adapter_name not in self.token_adapter.trainable_tokens_delta:
            return {}
        names = super().adapter_state_dict_load_map(adapter_name)
        return {name: f"{here}.weight" for name, here in names.items()}

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """One adapter's rows by name in a file. See PEFT."""
        return {name: state_dict[here] for name, here in self.adapter_state_dict_load_map(adapter_name).items()}


def name_rows(model: nn.Module) -> None:
    """Give the trained rows in `model` their names, after PEFT has added an adapter."""
    for wrapper in (m for m in model.modules() if type(m) is TrainableTokensWrapper):
        wrapper.__class__ = RowsWrapper  # PEFT makes it, wherever it is needed
    for layer in (m for m in model.modules() if isinstance(m, TrainableTokensLayer)):
        owner = layer.tied_adapter or layer  # tied layers have one set of rows
        if not isinstance(owner.trainable_tokens_delta, RowsByAdapter):
            owner.trainable_tokens_delta = RowsByAdapter(owner.trainable_tokens_delta)
        layer.trainable_tokens_delta = owner.trainable_tokens_delta


def _rows(value: Tensor) -> Rows:
    rows = Rows(value.detach(), value.requires_grad)
    if isinstance(value, nn.Parameter):
        rows.weight = value  # the object that an optimizer may already have
    return rows
