"""Simulated devices: tensors that are computed on the CPU and say that they are somewhere else.

A real second device is not always there. `cpu:0` and `cpu:1` are devices to PyTorch, to autograd (which checks where
gradients are) and to accelerate, but hold no tensors of their own; here they do, and an operation on tensors of two
devices fails as it would on two GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
FIRST, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)


class Elsewhere(torch.Tensor):
    """A tensor on a simulated device; `held` is what it holds."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real: torch.Tensor, device: torch.device, requires_grad: bool = False) -> Elsewhere:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=device,
            requires_grad=requires_grad,
        )

    def __init__(self, real: torch.Tensor, device: torch.device, requires_grad: bool = False) -> None:
        self.held = real

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self) -> str:
        return f"Elsewhere({self.held}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class MixedDevicesError(RuntimeError):
    """An operation on tensors of several devices."""


class Machine(TorchDispatchMode):
    """Within: `device="cpu:0"` and `device="cpu:1"` make simulated tensors."""

    def __enter__(self) -> Machine:
        # `module.to` would else put a simulated tensor's inside into a parameter of another class
        self.before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.__future__.set_overwrite_module_params_on_conversion(self.before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    if func is aten.copy_.default:  # the one operation between devices, besides those that name one
        _real(args[0]).copy_(_real(args[1]))
        return args[0]
    named = kwargs.get("device")
    # a number (a tensor without dimensions) of the host may take part anywhere
    devices = {t.device for t in given if t.ndim or isinstance(t, Elsewhere)}
    if len(devices) > 1 and named is None:
        raise MixedDevicesError(f"{func} of tensors on {' and '.join(sorted(map(str, devices)))}")
    device = torch.device(named) if named is not None else next(iter(devices), torch.device("cpu"))
    simulated = device.type == "cpu" and device.index is not None
    if named is not None and torch.device(named).type == "cpu":
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*tree_map(_real, args), **tree_map(_real, kwargs))
    mutated = {id(_real(t)): t for t in given}

    def wrap(t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        return mutated.get(id(t)) if id(t) in mutated else Elsewhere(t, device) if simulated else t

    return tree_map(wrap, out)


def _real(t: Any) -> Any:
    return t.held if isinstance(t, Elsewhere) else t
