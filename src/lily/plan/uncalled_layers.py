"""Layers whose weights their parent reads without calling them, so that an adapter on one would silently do nothing.

Decided from classes and attributes alone, so the meta device is enough. What `lily.tuner.call_uncalled` can make a
parent call is marked; the rest is refused when a plan is made. A parent that is not known here shows in training, where
`lily.callbacks.gradient_watch` reports it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

# What transformers' mixers call in training, where a kernel is installed, in place of everything after in_proj.
FUSED = ("mamba_inner_fn", "mamba2_split_conv1d_scan_combined", "mamba_split_conv1d_scan_combined")

# The flag by which the original Mamba, Mamba-2 and Vim choose their kernels -> the weights that those read.
MAMBA = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
ORIGINAL = {
    "use_fast_path": (*MAMBA, *(f"{name}_b" for name in MAMBA)),
    "use_mem_eff_path": ("conv1d", "out_proj"),
}

# (package, class) whose forward hands weights to torch's attention function -> the layers that they are of.
ATTENTION: dict[tuple[str, str], tuple[str, ...]] = {
    ("transformers", "WavLMAttention"): ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("diffusers", "HunyuanDiTAttentionPool"): ("q_proj", "k_proj", "v_proj", "c_proj"),
}

# timm's flag for adding the biases of q and v to what `qkv` returns, and where lily.mixers notes that it set it.
SEPARATE, SEPARATED = "qkv_bias_separate", "_lily_separated"


@dataclass(frozen=True)
class Uncalled:
    """A layer that its parent does not always call.

    Attributes:
        parent: the class that reads its weight.
        why: when and how, completing "PARENT reads its weight ...".
        remedy: what makes an adapter on it act: "unfused", the parent's path without the fused kernel; "applied", that
            path and the layer in its weight's place; "separated", biases added after the layer; None: nothing does.
    """

    parent: str
    why: str
    remedy: str | None = None


def uncalled(modules: Mapping[str, nn.Module]) -> dict[str, Uncalled]:
    """Which of a model's layers are read without being called.

    Args:
        modules: by their dotted names.

    Returns:
        The layer's dotted name -> why, and what can be done.
    """
    return {
        f"{name}.{child}" if name else child: found
        for name, module in modules.items()
        for child, found in children_read(module).items()
    }


def children_read(module: nn.Module) -> dict[str, Uncalled]:
    """The same for the children of one module, by their own names."""
    parent = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        return {"out_proj": Uncalled("torch.nn.MultiheadAttention", "without calling it")}
    # A subclass may call what it likes: what counts is whose forward it is.
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    home = owner.__module__
    package = home.partition(".")[0]
    handed = ATTENTION.get((package, owner.__name__), ())
    if handed:
        found = Uncalled(parent, "in torch's attention function, without calling it")
        return {name: found for name in handed if name in module._modules}
    if package == "timm" and module._parameters.get("q_bias") is not None and "qkv" in module._modules:
        return _with_biases(module)
    if not isinstance(module._parameters.get("A_log"), nn.Parameter):
        return {}
    if not home.startswith("transformers.models."):
        found = Uncalled(parent, "in a product or a fused kernel, without calling it")
        names = next((names for flag, names in ORIGINAL.items() if hasattr(module, flag)), ())
        return {name: found for name in names if name in module._modules}
    read = {
        "conv1d": Uncalled(parent, "without calling it"),
        "dt_proj": Uncalled(parent, "in a product, without calling it", "applied"),
    }
    if any(name in vars(sys.modules[home]) for name in FUSED):
        fused = Uncalled(parent, "in a fused kernel, without calling it, when it trains on a GPU", "unfused")
        read.update(x_proj=fused, out_proj=fused)
    return {name: reason for name, reason in read.items() if name in module._modules}


def _with_biases(attention: nn.Module) -> dict[str, Uncalled]:
    """For timm's attention with biases of q and v beside `qkv`, which has none: BEiT, EVA, Swin V2."""
    if getattr(attention, SEPARATE, False) and not hasattr(attention, SEPARATED):
        return {}
    remedy = "separated" if hasattr(attention, SEPARATE) else None  # older versions of timm have no choice
    return {"qkv": Uncalled(type(attention).__name__, "in a product, without calling it", remedy)}
