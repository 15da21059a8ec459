"""Where an adapter's tensors are: layers on several devices, and base weights that accelerate keeps elsewhere.

A model that does not fit is spread by accelerate over devices, main memory and disk. A module whose weights are
*offloaded* has them on the meta device except within its own forward. Adapters read their tensors without calling the
module that holds them, and are small: they stay on the device that computes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from lily.plan.specs import base_of

# Device and dtype that a layer's adapter takes (None: PyTorch's default dtype).
Placement = tuple[torch.device, torch.dtype | None]

# What quantised layers call their weight.
WEIGHTS = ("weight", "qweight", "W_q")

# The modules that hold an adapter's tensors.
HOLDER = re.compile(r"(^|\.)lily_(A|B|R|router|logits)(\.|$)")


def placement(module: nn.Module, spread: bool = False, parameter: str | None = None) -> Placement:
    """Where a layer's adapter goes: where its base layer computes, in its weight's dtype if that is a floating one.

    Args:
        module: the layer, adapted or not.
        spread: whether accelerate spreads its model (`is_spread`); a weight on the meta device is then somewhere else,
            also where PEFT has taken accelerate's hooks off in order to load an adapter.
        parameter: the name of the one that is adapted, if it is not the layer.
    """
    base = base_of(module)
    weight = weight_of(base) if parameter is None else getattr(base, parameter)
    if weight is None:
        weight = next(chain(base.parameters(), base.buffers()))
    dtype = getattr(base, "compute_dtype", None) or weight.dtype
    away = spread and weight.device.type == "meta"
    device = execution_device(base) or (torch.device("cpu") if away else weight.device)
    return device, dtype if dtype.is_floating_point else None


def weight_of(base: nn.Module) -> Any:
    """The base layer's weight, whatever its kind of layer calls it; None where it has none."""
    return next((w for w in (getattr(base, name, None) for name in WEIGHTS) if w is not None), None)


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module; None where that is not accelerate's business."""
    hook = _hook(module)
    return None if hook is None else torch.device(hook.execution_device)


def is_spread(model: nn.Module) -> bool:
    """Whether accelerate keeps weights of the model in main memory or on disk between forwards."""
    return bool({"cpu", "disk"}.intersection((getattr(model, "hf_device_map", None) or {}).values()))


def call_with(module: nn.Module, weights: Callable[[], Mapping[str, Tensor]], args: Any, kwargs: Any) -> Any:
    """Call a module with other tensors in the place of some of its parameters.

    Args:
        module: where accelerate keeps its weights elsewhere, they are brought in first.
        weights: the tensors by name; called when the module's own parameters are there.
        args: of the module.
        kwargs: of the module.
    """
    hook = _hook(module)
    if hook is None or not hook.offload:
        with _standing_in(module, weights()):
            return module(*args, **kwargs)
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    with _standing_in(module, weights()):
        output = module._old_forward(*args, **kwargs)  # type: ignore[operator]
    return hook.post_forward(module, output)


@contextlib.contextmanager
def _standing_in(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    own = {name: module._parameters[name] for name in tensors}
    module._parameters.update(tensors)  # type: ignore[arg-type]
    try:
        yield
    finally:
        module._parameters.update(own)


def onload(root: nn.Module, known: Mapping[str, Tensor] | None = None) -> None:
    """Bring the adapter tensors inside `root` back from where accelerate offloaded them, for good.

    Args:
        root: a bank, an adapted layer, or a model that holds them.
        known: values by name in `root`, for what accelerate does not have: it takes what belongs on the disk from the
            base model's files.
    """
    for path, holder in root.named_modules():
        hook = _hook(holder) if HOLDER.search(path) else None
        if hook is None or not hook.offload:
            continue
        names = [name for name, _ in holder.named_parameters(recurse=False)]
        values = {n: (known or {}).get(f"{path}.{n}") for n in names}
        values = {n: hook.weights_map[n] if value is None else value for n, value in values.items()}
        hook.offload = False  # or else taking it off would put its own values back
        remove_hook_from_module(holder)
        for name, value in values.items():
            set_module_tensor_to_device(holder, name, hook.execution_device, value=value)


def _hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = module.__dict__.get("_hf_hook")
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    found = (h for h in hooks if isinstance(h, AlignDevicesHook) and h.execution_device is not None)
    return next(found, None)
