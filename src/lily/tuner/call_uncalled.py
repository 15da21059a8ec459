"""Make mixers and attention call the layers whose weights they otherwise only read (`lily.plan.uncalled_layers`).

A mixer of transformers passes the weights of `x_proj`, `dt_proj` and `out_proj` to one fused kernel in training, and
always multiplies by the weight of `dt_proj`. In a mixer with an adapter on one of them, two hooks around its forward
select the evaluation path (it calls `x_proj` and `out_proj`, and convolution and scan still use separate kernels) and
replace the weight of `dt_proj` by the adapted layer. Other mixers are not changed.

`nn.MultiheadAttention` gets a class that calls its projections, and a layer for the one that has none. torch's encoder
layers, which read the weights of all their layers into one kernel outside training, are kept from that.

timm's attention with separate `q` and `v` biases multiplies by the weight of `qkv` and adds them in one step; while
there is an adapter, a flag makes it call `qkv` and add the biases afterwards.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lily.layers.attention import set_calling
from lily.layers.layer import LilyLayer
from lily.plan.attention import IN, InProjection
from lily.plan.uncalled_layers import SEPARATE, SEPARATED, children_read

NESTED = "_lily_nested"  # marks an encoder whose nested tensors are switched off


class Applied:
    """A stand-in for an adapted layer in a mixer that multiplies by its weight: `layer.weight @ x` applies the layer.

    Args:
        layer: the adapted layer.
    """

    def __init__(self, layer: LilyLayer) -> None:
        self.layer, self.weight, self.bias = layer, self, layer.bias

    def __call__(self, x: Tensor) -> Tensor:
        """Call the layer, as a mixer of a quantized model does."""
        return self.layer(x)  # type: ignore[no-any-return]

    def __matmul__(self, columns: Tensor) -> Tensor:
        """The layer without its bias: columns (..., in, tokens) -> (..., out, tokens)."""
        # The same product as the mixer's, so that an adapter that adds zero does not even change the rounding.
        result: Tensor = self.layer.get_base_layer().weight @ columns
        rows = columns.transpose(-1, -2)
        for adapter in self.layer.active_adapters:
            if adapter in self.layer.settings:
                result = result + self.layer.update_of(adapter, rows).transpose(-1, -2).to(result.dtype)
        return result


class Calling:
    """The hooks around one mixer's forward.

    Attributes:
        training: the mixer's mode before the current forward; None between forwards.
        handles: remove the hooks.
    """

    def __init__(self, mixer: nn.Module) -> None:
        self.training: bool | None = None
        self.handles = [
            mixer.register_forward_pre_hook(self.enter),
            mixer.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, mixer: nn.Module, args: Any) -> None:
        """Select the path. Without an acting adapter, the weights suffice, which every path reads."""
        layers = adapted(mixer)
        for layer in layers.values():
            if layer.merged and layer.disable_adapters:
                layer.unmerge()  # as the layer would if it were called
        acting = {name: layer for name, layer in layers.items() if _acts(layer)}
        if not acting:
            return
        # The mixer's flag, not its children's: dropout in an adapter stays active.
        self.training, mixer.training = mixer.training, False
        for name, layer in acting.items():
            if children_read(mixer)[name].remedy == "applied":
                mixer.__dict__[name] = Applied(layer)  # takes precedence over the child of that name

    def leave(self, mixer: nn.Module, args: Any, output: Any) -> None:
        """Restore what `enter` changed, also after a forward that raised."""
        if self.training is not None:
            mixer.training, self.training = self.training, None
        for name in children_read(mixer):
            mixer.__dict__.pop(name, None)


def adapted(mixer: nn.Module) -> dict[str, LilyLayer]:
    """The layers with an adapter that the mixer does not always call."""
    children = ((name, mixer._modules.get(name)) for name in children_read(mixer))
    return {name: layer for name, layer in children if isinstance(layer, LilyLayer) and layer.settings}


def applied(model: nn.Module) -> str | None:
    """The name of an adapted layer whose weight a mixer multiplies by without calling it, if there is one."""
    for name, mixer in model.named_modules():
        for child in adapted(mixer):
            if children_read(mixer)[child].remedy == "applied":
                return f"{name}.{child}"
    return None


def _acts(layer: LilyLayer) -> bool:
    active = any(adapter in layer.settings for adapter in layer.active_adapters)
    return active and not layer.merged and not layer.disable_adapters


def watch(model: nn.Module) -> None:
    """Install hooks, flags and classes on the modules that need them now, and remove them from the others.

    Args:
        model: with or without adapters.
    """
    hooked = []
    _avoid_encoder_kernels(model)
    for name, mixer in list(model.named_modules()):
        read = children_read(mixer)
        if not read:
            continue
        there, needed = _calling(mixer), adapted(mixer)
        if isinstance(mixer, nn.MultiheadAttention):
            set_calling(mixer, bool(needed))
            if isinstance(mixer._modules.get(IN), InProjection) and not needed:
                del mixer._modules[IN]
            continue
        if any(layer.remedy == "separated" for layer in read.values()):
            _separate(mixer, bool(needed))
            continue
        if needed and there is None:
            Calling(mixer)
            hooked += [f"{name}.{child}" for child in needed]
        elif not needed and there is not None:
            for handle in there.handles:
                handle.remove()
    if hooked and kernels_installed():
        names = sorted({name.rpartition(".")[2] for name in hooked})
        warnings.warn(
            f"{', '.join(names)}: {len(hooked)} adapted layers are read by their mixers' fused training kernel without "
            "being called, so these mixers run without it: same result, more time and memory. Remove them from "
            "target_modules to keep it",
            stacklevel=3,
        )


def add_in_projections(model: nn.Module, layers: Iterable[str]) -> None:
    """Give each attention whose `in_proj` is among `layers` a module of that name; `watch` removes unused ones."""
    for name in layers:
        parent, _, short = name.rpartition(".")
        if short != IN:
            continue
        attention = model.get_submodule(parent)
        if isinstance(attention, nn.MultiheadAttention) and IN not in attention._modules:
            attention.add_module(IN, InProjection(attention))


def _avoid_encoder_kernels(model: nn.Module) -> None:
    """Keep `nn.TransformerEncoderLayer` with adapted layers from its fused kernel, and others not any longer.

    torch runs the kernel only for layers without forward hooks, and its input may be a nested tensor, which
    `nn.TransformerEncoder` makes if its flag allows it.
    """
    for module in model.modules():
        if not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            continue
        wanted = any(isinstance(m, LilyLayer) and m.settings for m in module.modules())
        if isinstance(module, nn.TransformerEncoderLayer):
            there = [key for key, hook in module._forward_pre_hooks.items() if hook is _no_kernel]
            if wanted and not there:
                module.register_forward_pre_hook(_no_kernel)
            for key in () if wanted else there:
                del module._forward_pre_hooks[key]
        elif wanted and getattr(module, "use_nested_tensor", False):
            module.use_nested_tensor = False
            setattr(module, NESTED, True)
        elif not wanted and hasattr(module, NESTED):
            module.use_nested_tensor = True
            delattr(module, NESTED)


def _no_kernel(layer: nn.Module, args: Any) -> None:
    """A hook that does nothing: see `_avoid_encoder_kernels`."""


def kernels_installed() -> bool:
    """Whether a fused kernel may be installed: from mamba_ssm, or from the hub through `kernels`."""
    return any(importlib.util.find_spec(package) is not None for package in ("mamba_ssm", "kernels"))


def call_projections(model: nn.Module) -> None:
    """Make timm's attention call its `qkv`, for adapters of methods other than Lily.

    Args:
        model: without adapters.
    """
    for module in model.modules():
        if any(layer.remedy == "separated" for layer in children_read(module).values()):
            _separate(module, True)


def _separate(attention: nn.Module, wanted: bool) -> None:
    # An attribute, not a hook: it holds for every forward, so a compiled model has nothing to trace.
    setattr(attention, SEPARATE, wanted)
    if wanted:
        setattr(attention, SEPARATED, True)
    elif hasattr(attention, SEPARATED):
        delattr(attention, SEPARATED)


def _calling(mixer: nn.Module) -> Calling | None:
    owners = (getattr(hook, "__self__", None) for hook in mixer._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Calling)), None)
