"""Wrappers inside a model: torch.compile, activation checkpointing, FSDP1, DDP and DeepSpeed.

A wrapper puts its name into the names of everything inside it. An adapter must not depend on it, so plans,
files and configurations have the names without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

# The child that a wrapper wraps. Only wrappers have children of these names.
CHILDREN = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module")
FSDP1 = "_fsdp_wrapped_module"

# The wrappers whose child has a name that other modules use too, by the Python package of their class.
ENGINE_CHILD = "module"
ENGINES = ("torch.nn.parallel.", "deepspeed.", "fairscale.", "torch_xla.")


def wrapped_child(module: nn.Module) -> str | None:
    """The name of the child that a wrapper wraps; None: it is not a wrapper."""
    children = module._modules
    if ENGINE_CHILD in children and any(f"{c.__module__}.".startswith(ENGINES) for c in type(module).__mro__):
        return ENGINE_CHILD
    return next((name for name in CHILDREN if name in children), None)


def unwrapped(name: str) -> str:
    """A name without the parts of wrappers that are known from the name alone (not DDP's and DeepSpeed's)."""
    for child in CHILDREN:
        name = name.replace(f"{child}.", "").removesuffix(f".{child}")
    return name


def plain_name(model: nn.Module) -> Callable[[str], str]:
    """The function that removes the parts of wrappers from names in `model`."""
    paths = [unwrapped(path) for path, module in model.named_modules() if wrapped_child(module) == ENGINE_CHILD]
    outside = [f"{path}.".removeprefix(".") for path in paths]

    def plain(name: str) -> str:
        name = unwrapped(name)
        for path in reversed(outside):  # the innermost first: the others are in its path
            if f"{name}.".startswith(f"{path}{ENGINE_CHILD}."):
                name = (path + f"{name}.".removeprefix(f"{path}{ENGINE_CHILD}.")).removesuffix(".")
        return name

    return plain


def innermost(module: nn.Module) -> nn.Module:
    """The module without the wrappers around it."""
    while (child := wrapped_child(module)) is not None:
        module = module._modules[child]  # type: ignore[assignment]
    return module


@contextlib.contextmanager
def plain_names(model: nn.Module, fsdp: bool = True) -> Iterator[nn.Module]:
    """Context: modules have their names without wrappers, and what replaces a wrapped module ends up in its wrapper.

    The model must not be called within.

    Args:
        model: wrapped or not.
        fsdp: whether FSDP1's wrappers are taken out, too. Their hooks gather and write tensors.

    Yields:
        The model without the wrappers around it.
    """
    root = innermost(model)
    taken: list[tuple[nn.Module, str, nn.Module, nn.Module, str]] = []
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            chain = [] if child is None or wrapped_child(parent) is not None else list(_wrappers(child))
            if chain and (fsdp or all(wrapped_child(wrapper) != FSDP1 for wrapper in chain)):
                assert child is not None
                taken.append((parent, name, child, chain[-1], str(wrapped_child(chain[-1]))))
    inside = [innermost(outer) for _, _, outer, _, _ in taken]
    for (parent, name, *_), module in zip(taken, inside, strict=True):
        parent._modules[name] = module
    try:
        yield root
    finally:
        for (parent, name, outer, last, own), module in zip(taken, inside, strict=True):
            now = parent._modules[name]
            parent._modules[name] = outer
            if now is not None and now is not module:
                _rewrap(last, own, now)


def _wrappers(module: nn.Module) -> Iterator[nn.Module]:
    """The wrappers around a module, the outermost first."""
    while (child := wrapped_child(module)) is not None:
        yield module
        module = module._modules[child]  # type: ignore[assignment]


def _rewrap(wrapper: Any, child: str, module: nn.Module) -> None:
    wrapper._modules[child] = module
    if child == "_orig_mod":
        wrapper._initialize()  # torch.compile has bound the forward of the module that it was made with
