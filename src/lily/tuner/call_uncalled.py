"""Make mixers and attention call the layers that they would otherwise only read (`lily.plan.uncalled_layers`).

A mixer of transformers hands the weights of `x_proj`, `dt_proj` and `out_proj` to one fused kernel in training, and on
every path multiplies by the weight of `dt_proj`. In a mixer with an adapter on one of them, two hooks around its
forward choose the path that it takes in evaluation (it calls `x_proj` and `out_proj`, and convolution and scan still
have kernels of their own) and put the adapted `dt_proj` in its weight's place. Other mixers are left alone.

timm's attention with biases beside `qkv` multiplies by the weight of `qkv` and adds both in one step; while there is an
adapter, it is told to call `qkv` and add the biases afterwards.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

from torch import Tensor, nn

from lily.layers.layer import LilyLayer
from lily.plan.uncalled_layers import SEPARATE, SEPARATED, children_read


class Applied:
    """An adapted layer, to a mixer that multiplies by its weight: `layer.weight @ x` is what the layer does.

    Args:
        layer: the adapted layer.
    """

    def __init__(self, layer: LilyLayer) -> None:
        self.layer, self.weight, self.bias = layer, Product(layer), layer.bias

    def __call__(self, x: Tensor) -> Tensor:
        """The layer, as a mixer of a quantised model calls it."""
        result: Tensor = self.layer(x)
        return result


class Product:
    """The weight of an adapted layer that adds its updates to a product.

    Args:
        layer: the adapted layer.
    """

    def __init__(self, layer: LilyLayer) -> None:
        self.layer = layer

    def __matmul__(self, columns: Tensor) -> Tensor:
        """Columns (..., in, tokens) -> (..., out, tokens), without the layer's bias."""
        # The mixer's own product, so that an adapter that adds nothing changes not even a rounding.
        result: Tensor = self.layer.get_base_layer().weight @ columns
        rows = columns.transpose(-1, -2)
        for adapter in self.layer.active_adapters:
            if adapter in self.layer.settings:
                result = result + self.layer.update_of(adapter, rows).transpose(-1, -2).to(result.dtype)
        return result


class Calling:
    """The hooks around one mixer's forward.

    Attributes:
        training: what the mixer's flag was before the forward that is running.
        handles: take the hooks off again.
    """

    def __init__(self, mixer: nn.Module) -> None:
        self.training: bool | None = None
        self.handles = [
            mixer.register_forward_pre_hook(self.enter),
            mixer.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, mixer: nn.Module, args: Any) -> None:
        """Choose the path. What is merged or switched off is in the weights alone, which any path reads."""
        layers = adapted(mixer)
        for layer in layers.values():
            if layer.merged and layer.disable_adapters:
                layer.unmerge()  # as the layer would if it were called
        acting = {name: layer for name, layer in layers.items() if _acts(layer)}
        if not acting:
            return
        # The mixer's own flag, not its children's: dropout in an adapter goes on.
        self.training, mixer.training = mixer.training, False
        for name, layer in acting.items():
            if children_read(mixer)[name].remedy == "applied":
                mixer.__dict__[name] = Applied(layer)  # found before the child of that name, which stays where it is

    def leave(self, mixer: nn.Module, args: Any, output: Any) -> None:
        """Put back what `enter` changed, also after a forward that raised."""
        if self.training is not None:
            mixer.training, self.training = self.training, None
        for name in children_read(mixer):
            mixer.__dict__.pop(name, None)


def adapted(mixer: nn.Module) -> dict[str, LilyLayer]:
    """The layers with an adapter that the mixer would not, or not always, call."""
    children = ((name, mixer._modules.get(name)) for name in children_read(mixer))
    return {name: layer for name, layer in children if isinstance(layer, LilyLayer) and layer.settings}


def _acts(layer: LilyLayer) -> bool:
    active = any(adapter in layer.settings for adapter in layer.active_adapters)
    return active and not layer.merged and not layer.disable_adapters


def watch(model: nn.Module) -> None:
    """Put the hooks on the mixers that need them now, and take them off the others; likewise timm's flag.

    Args:
        model: with or without adapters.
    """
    begun = []
    for name, mixer in model.named_modules():
        read = children_read(mixer)
        if not read:
            continue
        there, needed = _calling(mixer), adapted(mixer)
        if any(layer.remedy == "separated" for layer in read.values()):
            _separate(mixer, bool(needed))
            continue
        if needed and there is None:
            Calling(mixer)
            begun += [f"{name}.{child}" for child in needed]
        elif not needed and there is not None:
            for handle in there.handles:
                handle.remove()
    if begun and kernels_installed():
        names = sorted({name.rpartition(".")[2] for name in begun})
        warnings.warn(
            f"{', '.join(names)}: {len(begun)} adapted layers are read by their mixers' fused training kernel without "
            "being called, so these mixers do without it: the same result in more time and memory. Leave them out of "
            "target_modules to keep it",
            stacklevel=3,
        )


def kernels_installed() -> bool:
    """Whether there may be a fused kernel at all: from mamba_ssm, or from the hub by way of `kernels`."""
    return any(importlib.util.find_spec(package) is not None for package in ("mamba_ssm", "kernels"))


def call_projections(model: nn.Module) -> None:
    """Have timm's attention call its `qkv` whatever adapter is put there: other methods than Lily need it as much.

    Args:
        model: without adapters.
    """
    for module in model.modules():
        if any(layer.remedy == "separated" for layer in children_read(module).values()):
            _separate(module, True)


def _separate(attention: nn.Module, wanted: bool) -> None:
    # An attribute and no hook: it holds for every forward, so a compiled model has nothing to trace.
    setattr(attention, SEPARATE, wanted)
    if wanted:
        setattr(attention, SEPARATED, True)
    elif hasattr(attention, SEPARATED):
        delattr(attention, SEPARATED)


def _calling(mixer: nn.Module) -> Calling | None:
    owners = (getattr(hook, "__self__", None) for hook in mixer._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Calling)), None)
