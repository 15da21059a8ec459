"""Intruder dimensions of an exported LoRA, reduced by PEFT's own function.

Layers that share A and B cannot be changed one by one, so only the LoRA that an adapter exports to can be reduced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import intruders as peft_intruders
from torch import Tensor, nn

from lily.deploy.lora import LoraExport
from lily.deploy.lora_layer import Layer
from lily.errors import LilyError
from lily.kernels import fused
from lily.layers.find import layers_of
from lily.plan.specs import LINEAR
from lily.plan.wrappers import plain_names
from lily.tuner.adapter import find

REDUCED = "intruder_reduced"


def reduce_intruder_dimension(
    export: LoraExport,
    model: nn.Module,
    *,
    adapter: str | None = None,
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> LoraExport:
    """Reduce the intruder dimensions of a LoRA, which forgets less and learns less (arXiv 2410.21228).

    An intruder dimension is a leading singular vector of a weight with its update that is like none of the weight
    alone. The result is that of `peft.tuners.lora.intruders.reduce_intruder_dimension` for each linear layer, computed
    in at least float32. Other layers stay unchanged, and one line names them.

    Args:
        export: from `as_lora`.
        model: the model that it was exported from, with its base weights loaded.
        adapter: name of the adapter; default: the active one.
        top_k: leading singular vectors that are looked at.
        threshold_epsilon: a cosine similarity below it to all singular vectors of the base weight makes an intruder.
        mitigation_lambda: factor on the intruder dimensions: 1 keeps them, 0 removes them.
        logging_sink: called with one line per layer, which says how many were found; None: no output.

    Raises:
        LilyError: for an invalid parameter, an export of another model, no linear layer, or base weights that are
            quantized, merged or not loaded.
    """
    if export.experts == "shared":
        raise LilyError("experts='shared' keeps matrices of a mixture together, which this takes apart; leave it out")
    if top_k < 1 or not 0 <= threshold_epsilon <= 1 or not 0 <= mitigation_lambda <= 1:
        raise LilyError(
            f"top_k={top_k}, threshold_epsilon={threshold_epsilon:g}, mitigation_lambda={mitigation_lambda:g} are not "
            "valid; give a positive integer, and two numbers from 0 to 1"
        )
    options: dict[str, Any] = {
        "top_k": top_k, "threshold_epsilon": threshold_epsilon, "mitigation_lambda": mitigation_lambda,
    }  # fmt: skip
    log = logging_sink or (lambda _: None)
    linear = [name for name in export.layers if export.groups[name].kind == LINEAR]
    if not linear:
        raise LilyError("intruder dimensions are those of linear layers, and this adapter has none; export without")
    with plain_names(model) as inner:
        root = find(inner, adapter).root
        if merged := [name for layer in layers_of(root).values() for name in layer.merged_adapters]:
            raise LilyError(f"adapter {merged[0]!r} is merged into the base weights; call unmerge_adapter() first")
        weights = {name: _weight(root, name, export.layers[name]) for name in linear}
    layers = dict(export.layers)
    for name, weight in weights.items():
        layers[name] = _reduced(name, layers[name], weight, options, log)
    if others := [name for name in export.layers if name not in weights]:
        kinds = sorted({export.groups[name].kind for name in others})
        log(f"{len(others)} layers left unchanged, which are not linear ({', '.join(kinds)}): {', '.join(others)}")
    same = all(torch.equal(layers[name].A, export.layers[name].A) for name in linear)
    facts = {"intruders": options, "exact": bool(export.provenance.get("exact")) and same}
    return replace(export, layers=layers, provenance={**export.provenance, **facts})


def _weight(root: nn.Module, name: str, lora: Layer) -> Tensor:
    """The base weight (out, in) of an adapted linear layer."""
    try:
        layer: Any = root.get_submodule(name)
        weight = layer.get_base_layer().weight
    except AttributeError:
        raise LilyError(
            f"the model has no adapted layer {name}; give the model that the LoRA was exported from"
        ) from None
    if type(weight) not in fused.PLAIN or not weight.is_floating_point() or weight.element_size() == 1:
        raise LilyError(f"the base weight of {name} is quantized or sharded; load the base model unquantized and whole")
    if weight.is_meta:
        raise LilyError(f"the base weight of {name} is not loaded (meta device, or offloaded); load the model whole")
    weight = weight.detach()
    oriented: Tensor = weight.mT if layer.transposed else weight
    if oriented.shape != (lora.B.shape[0], lora.A.shape[1]):
        raise LilyError(
            f"{name} is {tuple(oriented.shape)} in the model and {(lora.B.shape[0], lora.A.shape[1])} in the LoRA; "
            "give the model that it was exported from"
        )
    return oriented


def _reduced(name: str, lora: Layer, weight: Tensor, options: dict[str, Any], log: Callable[[str], Any]) -> Layer:
    """One layer, as a LoRA on a model of that layer alone: PEFT's function takes every layer of a model."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    # PEFT would round the new factors to a half precision of the weight
    linear.weight = nn.Parameter(weight.to(torch.promote_types(weight.dtype, torch.float32)), requires_grad=False)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.scale * lora.rank, target_modules=[name])
    model = get_peft_model(_at(name, linear), config)
    layer: Any = model.get_submodule(f"base_model.model.{name}")
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(lora.A)
        layer.lora_B["default"].weight.copy_(lora.B)

    def sink(line: str) -> None:
        if name in line:  # not the line about the name of the new adapter
            log(line.removeprefix("base_model.model."))

    with torch.no_grad():
        peft_intruders.reduce_intruder_dimension(model, "default", REDUCED, **options, logging_sink=sink)
    A, B = (part[REDUCED].weight.detach() for part in (layer.lora_A, layer.lora_B))
    missing = lora.rank - A.shape[0]  # a rank above that of the weight
    A, B = nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))
    return replace(lora, A=A.to(lora.A), B=B.to(lora.B))


def _at(name: str, module: nn.Module) -> nn.Module:
    """A model in which a module is alone, at a dotted name."""
    for part in reversed(name.split(".")):
        holder = nn.Module()
        holder.add_module(part, module)
        module = holder
    return module
