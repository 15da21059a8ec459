"""Quantized frozen weights: loading options and sizes for a recipe's `model.quantization`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lily.layers.quantized import keep_differentiable
from lily.plan.sharing_plan import SAVED_HEADS
from lily.recipes.spec.base import Task
from lily.recipes.spec.schema import Quantization

if TYPE_CHECKING:
    import torch
    from torch import nn

# Bytes of a quantized weight, with its scales: nf4 has one 8-bit scale per 64 weights and one 32-bit scale per 256 of
# these (double quantization); int8 has one 32-bit scale per row, which is negligible.
BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


def loading_options(quantization: Quantization, model: nn.Module, task: Task, compute: torch.dtype) -> dict[str, Any]:
    """Further arguments of `from_pretrained`; `compute` is the data type of products with nf4 weights.

    `model` is the same architecture on the meta device.
    """
    from transformers import BitsAndBytesConfig

    kept = {"llm_int8_skip_modules": sorted(kept_modules(model, task))}
    if quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, **kept)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            **kept,
        )
    return {"quantization_config": config}


def kept_modules(model: nn.Module, task: Task) -> set[str]:
    """The linear layers that are not quantized: the output layer, and trained heads."""
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = {name.removesuffix(".weight").removesuffix(".bias") for name in get_keys_to_not_convert(model)}
    return kept if task == "sft" else kept | set(SAVED_HEADS["SEQ_CLS"])


def prepared(model: Any) -> Any:
    """Prepare a quantized model for an adapter with PEFT: all frozen, other weights in float32.

    Also for inference, so that the model computes the same as in training. The trainer sets gradient checkpointing.
    """
    from peft import prepare_model_for_kbit_training

    keep_differentiable(model)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def frozen_bytes(model: nn.Module, task: Task, quantization: Quantization) -> int:
    """Bytes of the frozen weights after quantization, with the rest in float32, computed from shapes."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kept = kept_modules(model, task)
    quantized = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not any(f"{name}.".startswith(f"{k}.") for k in kept)
    )
    rest = sum(p.numel() for p in model.parameters()) - quantized
    return round(quantized * BYTES[quantization] + 4 * rest)
