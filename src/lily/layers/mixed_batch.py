"""A batch whose rows use different adapters (`adapter_names` of PEFT): layers update each adapter's rows with it.

While such a batch runs, the layers have another `forward`, so that a usual one costs nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lily.errors import LilyError
from lily.layers.layer import LilyLayer
from lily.layers.linear import Linear
from lily.layers.parallel_module import ParallelModule
from lily.layers.parameter import Parameter
from lily.layers.slice import Slice

BASE = "__base__"  # PEFT's name for no adapter


def check_names(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse names that no layer has, and models on which rows cannot use different adapters.

    Raises:
        LilyError: says which, and what to do instead.
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise LilyError(f"adapter_names={names!r} is not a list of names, one for each row of the batch")
    layers = [module for module in model.modules() if isinstance(module, LilyLayer)]
    known = {name for layer in layers for name in layer.settings}
    if unknown := sorted({*names} - known - {BASE}):
        raise LilyError(
            f"adapter_names has {', '.join(unknown)}, which the model does not have; it has "
            f"{', '.join(sorted(known))}, and {BASE} is the base model"
        )
    if model.training:
        raise LilyError(
            "adapter_names in training mode: call model.eval() first: rows of different adapters are for inference"
        )
    for layer in layers:
        if layer.merged_adapters:
            raise LilyError(
                f"adapter_names while {', '.join(layer.merged_adapters)} is merged into the base weights, which all "
                "rows use; call unmerge_adapter() first"
            )
        if isinstance(layer, Parameter) and (mine := sorted({*names} & layer.settings.keys())):
            raise LilyError(
                f"adapter_names has {', '.join(mine)}, which changes parameters (target_parameters) that all rows of a "
                "batch share; call the model once for each adapter"
            )


@contextmanager
def rows_of(model: nn.Module, names: Sequence[str], copies: int = 1) -> Iterator[None]:
    """Within: row i of a batch uses the adapter `names[i]` alone.

    Args:
        model: holds the layers.
        names: of adapters, or `__base__`, for each row.
        copies: of each row in a row, as in beam search; a layer may see both.
    """
    if torch.compiler.is_dynamo_compiling():
        # The model around the layers is compiled: dynamo would delete a `forward` that it never set. Inside, all is.
        torch._dynamo.graph_break()
    ways = {len(names) * n: [name for name in names for _ in range(n)] for n in {1, copies}}
    replaced = []
    for layer in (module for module in model.modules() if isinstance(module, LilyLayer)):
        if isinstance(layer, Parameter):  # has none of these adapters
            continue
        name = "_old_forward" if "_old_forward" in vars(layer) else "forward"  # accelerate has put its own before it
        replaced.append((layer, name, vars(layer).get(name)))
        setattr(layer, name, partial(_forward, layer, ways))
    try:
        yield
    finally:
        for layer, name, own in replaced:
            delattr(layer, name) if own is None else setattr(layer, name, own)


def _forward(layer: LilyLayer, ways: dict[int, list[str]], *args: Any, **kwargs: Any) -> Any:
    out = layer.base_layer(*args, **kwargs)
    x = args[0] if args else kwargs[next(iter(kwargs))]
    turned = layer.tokens_first and x.ndim > 2
    x = x.transpose(0, 1) if turned else x
    if len(x) not in ways:
        raise LilyError(
            f"adapter_names has {min(ways)} names, and a {type(layer.base).__name__} got {len(x)} rows; give one name "
            "for each row of the batch"
        )
    names = ways[len(x)]
    result = out[0] if isinstance(out, tuple) else out
    result = result.transpose(0, 1) if turned else result
    x = x.to(result.device)  # accelerate may run the base layer on another device than its input's
    for adapter in dict.fromkeys(name for name in names if name in layer.settings):
        rows = torch.tensor([i for i, name in enumerate(names) if name == adapter], device=result.device)
        with layer.bank.masks.of_rows(x, rows) as own:
            updated = _updated(layer, result[rows], own, adapter)
        result = result.index_copy(0, rows, updated.to(result.dtype))
    result = result.transpose(0, 1) if turned else result
    return (result, *out[1:]) if isinstance(out, tuple) else result


def _updated(layer: LilyLayer, result: Tensor, x: Tensor, adapter: str) -> Tensor:
    plus: Callable[[Tensor, Tensor, str], Tensor] = layer._plus_update
    if isinstance(layer, Slice):
        part = layer.rows.view(result)
        part.copy_(plus(part.flatten(-2), x, adapter).view(part.shape))
        return result
    if isinstance(layer, (Linear, ParallelModule)):
        return plus(result, x, adapter)
    return result + layer.update_of(adapter, x).to(result.dtype)
