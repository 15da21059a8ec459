"""Layers whose weights their parent reads without calling them, so that an adapter on one would silently do nothing.

Decided from classes and attributes alone, so the meta device is enough. Layers that `lily.tuner.call_uncalled` can make
their parent call have a `remedy`; the others are refused when a plan is made. Layers of parents that are not listed
here are reported during training by `lily.callbacks.gradient_watch`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lily.plan.attention import IN, OUT, has_in_projection, is_called

# Kernels that transformers' mixers, if they are installed, call in training instead of everything after in_proj.
FUSED = ("mamba_inner_fn", "mamba2_split_conv1d_scan_combined", "mamba_split_conv1d_scan_combined")

# Flag by which the original Mamba, Mamba-2 and Vim choose their kernels -> the layers whose weights those read.
MAMBA = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
ORIGINAL = {
    "use_fast_path": (*MAMBA, *(f"{name}_b" for name in MAMBA)),
    "use_mem_eff_path": ("conv1d", "out_proj"),
}

# (package, class) whose forward passes weights to torch's attention function -> the layers that own them.
ATTENTION: dict[tuple[str, str], tuple[str, ...]] = {
    ("transformers", "WavLMAttention"): ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("diffusers", "HunyuanDiTAttentionPool"): ("q_proj", "k_proj", "v_proj", "c_proj"),
}

# timm's flag for adding the biases of q and v to the output of `qkv`, and the attribute by which
# lily.tuner.call_uncalled marks that it set the flag.
SEPARATE, SEPARATED = "qkv_bias_separate", "_lily_separated"


# Remedies without which an adapter does nothing in any forward, so that other readers of its file lack it.
ALWAYS = ("applied", "separated", "called")


@dataclass(frozen=True)
class Uncalled:
    """A layer that its parent does not always call.

    Attributes:
        parent: the class that reads its weight.
        why: when and how, completing "PARENT reads its weight ...".
        remedy: what makes an adapter on it act: "unfused", the parent's path without the fused kernel; "applied", that
            path with a call of the layer instead of its weight; "separated", biases added after the layer; "called",
            a class that calls it; None: none.
    """

    parent: str
    why: str
    remedy: str | None = None


def uncalled(modules: Mapping[str, nn.Module]) -> dict[str, Uncalled]:
    """The layers of a model whose weights are read without calling them.

    Args:
        modules: dotted name -> module.

    Returns:
        The layer's dotted name -> the reason and the remedy.
    """
    return {
        f"{name}.{child}" if name else child: reason
        for name, module in modules.items()
        for child, reason in children_read(module).items()
    }


def children_read(module: nn.Module) -> dict[str, Uncalled]:
    """`uncalled` for the children of one module, by their names in it."""
    parent = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        reason = Uncalled("torch.nn.MultiheadAttention", "without calling it", "called" if is_called(module) else None)
        return dict.fromkeys((IN, OUT) if has_in_projection(module) else (OUT,), reason)
    # A subclass may define another forward: what counts is the class that defines it.
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    home = owner.__module__
    package = home.partition(".")[0]
    if passed := ATTENTION.get((package, owner.__name__), ()):
        reason = Uncalled(parent, "in torch's attention function, without calling it")
        return {name: reason for name in passed if name in module._modules}
    if package == "timm" and module._parameters.get("q_bias") is not None and "qkv" in module._modules:
        return _with_biases(module)
    if not isinstance(module._parameters.get("A_log"), nn.Parameter):
        return {}
    if not home.startswith("transformers.models."):
        reason = Uncalled(parent, "in a product or a fused kernel, without calling it")
        names = next((names for flag, names in ORIGINAL.items() if hasattr(module, flag)), ())
        return {name: reason for name in names if name in module._modules}
    read = {
        "conv1d": Uncalled(parent, "without calling it"),
        "dt_proj": Uncalled(parent, "in a product, without calling it", "applied"),
    }
    if any(name in vars(sys.modules[home]) for name in FUSED):
        fused = Uncalled(parent, "in a fused kernel, without calling it, when it trains on a GPU", "unfused")
        read.update(x_proj=fused, out_proj=fused)
    return {name: reason for name, reason in read.items() if name in module._modules}


def _with_biases(attention: nn.Module) -> dict[str, Uncalled]:
    """Timm's attention with biases of q and v outside `qkv`, which has none: BEiT, EVA, Swin V2."""
    if getattr(attention, SEPARATE, False) and not hasattr(attention, SEPARATED):
        return {}
    remedy = "separated" if hasattr(attention, SEPARATE) else None  # older versions of timm lack the flag
    return {"qkv": Uncalled(type(attention).__name__, "in a product, without calling it", remedy)}
