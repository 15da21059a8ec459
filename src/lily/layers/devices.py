"""Device placement of adapters: layers on several devices, and base weights that accelerate offloads.

accelerate spreads a model that does not fit over devices, main memory and disk. *Offloaded* weights are on the meta
device except during the forward of their module. Adapters read their tensors without calling the module that holds
them, and are small, so they stay on the device that computes.
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

from lily.plan.specs import PARAMETERS, ModuleSpec, base_of

# Device and dtype that a layer's adapter takes (None: PyTorch's default dtype).
Placement = tuple[torch.device, torch.dtype | None]

# Names of the weight in quantized and other layers.
WEIGHTS = ("weight", "qweight", "W_q")

# The modules that hold an adapter's tensors.
HOLDER = re.compile(r"(^|\.)lily_(A|B|R|router|logits|gain|own_A|own_B)(\.|$)")


def placement(module: nn.Module, spread: bool = False, parameter: str | None = None) -> Placement:
    """Device and dtype of a layer's adapter: where its base layer computes, in its weight's dtype if floating.

    Args:
        module: the layer, adapted or not.
        spread: whether accelerate spreads its model (`is_spread`); a weight on the meta device is then offloaded,
            even if PEFT has removed accelerate's hooks to load an adapter.
        parameter: name of the adapted parameter; default: the layer's weight.
    """
    base = base_of(module)
    weight = weight_of(base) if parameter is None else getattr(base, parameter)
    if weight is None:
        weight = next(chain(base.parameters(), base.buffers()))
    dtype = getattr(base, "compute_dtype", None) or weight.dtype
    offloaded = spread and weight.device.type == "meta"
    device = execution_device(base) or (torch.device("cpu") if offloaded else weight.device)
    return device, dtype if dtype.is_floating_point else None


def placement_of(model: nn.Module, spec: ModuleSpec) -> Placement:
    """Device and dtype of the adapter of a layer, or of a part of one."""
    parameter = spec.name.rpartition(".")[2] if spec.kind in PARAMETERS else None
    return placement(model.get_submodule(spec.path), is_spread(model), parameter)


def weight_of(base: nn.Module) -> Any:
    """The base layer's weight under any of the `WEIGHTS` names; None where it has none."""
    return next((w for w in (getattr(base, name, None) for name in WEIGHTS) if w is not None), None)


def execution_device(module: nn.Module) -> torch.device | None:
    """The device on which accelerate runs a module; None without accelerate's hook."""
    hook = _hook(module)
    return None if hook is None else torch.device(hook.execution_device)


def is_spread(model: nn.Module) -> bool:
    """Whether accelerate keeps weights of the model in main memory or on disk between forwards."""
    return bool({"cpu", "disk"}.intersection((getattr(model, "hf_device_map", None) or {}).values()))


def call_with(module: nn.Module, weights: Callable[[], Mapping[str, Tensor]], args: Any, kwargs: Any) -> Any:
    """Call a module with some of its parameters replaced by other tensors.

    Args:
        module: its weights are loaded first if accelerate offloads them.
        weights: returns the tensors by name; called when the module's parameters are loaded.
        args: positional arguments of the module.
        kwargs: keyword arguments of the module.
    """
    hook = _hook(module)
    if hook is None or not hook.offload:
        with _replaced(module, weights()):
            return module(*args, **kwargs)
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    with _replaced(module, weights()):
        output = module._old_forward(*args, **kwargs)  # type: ignore[operator]
    return hook.post_forward(module, output)


@contextlib.contextmanager
def _replaced(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    own = {name: module._parameters[name] for name in tensors}
    module._parameters.update(tensors)  # type: ignore[arg-type]
    try:
        yield
    finally:
        module._parameters.update(own)


def onload(root: nn.Module, values_by_name: Mapping[str, Tensor] | None = None) -> None:
    """Move the adapter tensors inside `root` permanently to the device that computes, if accelerate offloaded them.

    Args:
        root: a bank, an adapted layer, or a model that holds them.
        values_by_name: values, named as in `root`, that accelerate does not have: it reads weights for the disk from
            the base model's files.
    """
    for path, holder in root.named_modules():
        hook = _hook(holder) if HOLDER.search(path) else None
        if hook is None or not hook.offload:
            continue
        names = [name for name, _ in holder.named_parameters(recurse=False)]
        values = {n: (values_by_name or {}).get(f"{path}.{n}") for n in names}
        values = {n: hook.weights_map[n] if value is None else value for n, value in values.items()}
        hook.offload = False  # otherwise removing the hook would restore its values
        remove_hook_from_module(holder)
        for name, value in values.items():
            set_module_tensor_to_device(holder, name, hook.execution_device, value=value)


def _hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = module.__dict__.get("_hf_hook")
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    aligning = (h for h in hooks if isinstance(h, AlignDevicesHook) and h.execution_device is not None)
    return next(aligning, None)
