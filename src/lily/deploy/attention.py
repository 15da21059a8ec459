"""The projections of `nn.MultiheadAttention` in a LoRA: PEFT adapts both, under the attention's name, with one rank."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import peft
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lily.checkpoint.format import PREFIX
from lily.deploy.lora_layer import Layer, finished
from lily.layers.layer import NESTED
from lily.plan.attention import IN, OUT

OUT_IN_FILE = f"{NESTED}.{OUT}"


def names_in_file(layers: Iterable[str], root: nn.Module) -> dict[str, str]:
    """Those of `layers` that are projections of attentions -> their names in the file of a LoRA."""
    names: dict[str, str] = {}
    for name in layers:
        path, _, short = name.rpartition(".")
        if short in (IN, OUT) and isinstance(root.get_submodule(path), nn.MultiheadAttention):
            names[name] = path if short == IN else f"{path}{OUT_IN_FILE}"
    return names


def attention_of(name: str, names: Mapping[str, str]) -> str:
    """What PEFT targets for a layer: the attention for its projections, the layer itself for any other."""
    return names[name].removesuffix(OUT_IN_FILE) if name in names else name


def as_pairs(
    layers: Mapping[str, Layer],
    names: Mapping[str, str],
    root: nn.Module,
) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """Both projections of each attention with one rank and scale, and zeros for those that are not adapted.

    Args:
        layers: all layers of the export.
        names: from `names_in_file`.
        root: the adapted model.

    Returns:
        The layers, and further entries of the file.
    """
    out, zero = dict(layers), {}
    for path in dict.fromkeys(attention_of(name, names) for name in names):
        both = {IN: f"{path}.{IN}", OUT: f"{path}.{OUT}"}
        found = [layers[name] for name in both.values() if name in layers]
        rank, width = max(layer.rank for layer in found), cast(Any, root.get_submodule(path)).embed_dim
        same = len({(layer.rank, layer.scale) for layer in found}) == 1
        for short, name in both.items():
            if name in layers:
                out[name] = layers[name] if same else finished(layers[name], rank, None, True)
            else:
                file, rows = (path, 3 * width) if short == IN else (f"{path}{OUT_IN_FILE}", width)
                zero[f"{PREFIX}{file}.lora_A.weight"] = found[0].A.new_zeros(rank, width)
                zero[f"{PREFIX}{file}.lora_B.weight"] = found[0].B.new_zeros(rows, rank)
    projections = [name for name in names if name.endswith(f".{OUT}")]
    if projections and (times := times_applied()) != 1:
        warnings.warn(
            f"PEFT {peft.__version__} adds the update of {OUT} to an nn.MultiheadAttention {times} times, so it is "
            f"written as 1 / {times} of what it is, for that version; one that adds it once needs another export",
            stacklevel=4,
        )
        out |= {name: replace(out[name], B=out[name].B / times) for name in projections}
    return out, zero


@functools.cache
def times_applied() -> int:
    """How many times the installed PEFT adds the update of `out_proj`: once, or, by an error of its merging, twice."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attention = nn.MultiheadAttention(2, 1)
        before = attention.out_proj.weight.clone()
        model = get_peft_model(nn.Sequential(attention), LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
        layer: Any = model.base_model.model[0]
        out = layer.base_layer.out_proj
        out.lora_A["default"].weight.fill_(1.0)
        out.lora_B["default"].weight.fill_(1.0)
        layer.merge()
        return round(float((out.get_base_layer().weight - before).mean()))
