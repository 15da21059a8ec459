"""The base models of a benchmark: a real architecture and size with random weights, and inputs for it.

Times do not depend on the values of the weights, so none are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lily.errors import LilyError
from lily.plan.walk import is_causal

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a built-in model and of its inputs."""

    width: int = 768  # of the hidden state
    depth: int = 12  # number of layers
    batch: int = 4  # samples per step
    tokens: int = 128  # per sample; an image has one per patch and one more


@dataclass(frozen=True)
class Subject:
    """A base model and its inputs."""

    name: str  # in tables
    base: nn.Module  # the model, on its device and in its dtype, in training mode, without dropout
    inputs: Callable[[int], Inputs]  # seed -> the inputs of one training step, with labels
    targets: list[str] | str  # modules to adapt
    vocabulary: int | None  # size of a causal model's vocabulary; None: the model cannot decode
    shape: Shape  # batch and tokens of the inputs

    @property
    def device(self) -> torch.device:
        """Device of the base model."""
        return next(self.base.parameters()).device


def llama(shape: Shape, device: str, dtype: torch.dtype, vocabulary: int = 32000) -> Subject:
    """A Llama of `shape`, its MLP 8/3 times as wide (rounded up to 256), heads of 64."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=-(-shape.width * 8 // 3 // 256) * 256,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.width // 64,
        vocab_size=vocabulary,
        max_position_embeddings=max(2048, shape.tokens + 256),
    )
    base = _ready(lambda: AutoModelForCausalLM.from_config(config), device, dtype)
    return causal_subject(f"Llama {shape.width} x {shape.depth}", base, shape, "all-linear")


def vit(shape: Shape, device: str, dtype: torch.dtype) -> Subject:
    """A vision transformer of `shape` on 224-pixel images in patches of 16: 196 and 1 tokens."""
    from transformers import AutoModelForImageClassification, ViTConfig

    config = ViTConfig(
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.width // 64,
        num_labels=100,
    )
    base = _ready(lambda: AutoModelForImageClassification.from_config(config), device, dtype)

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(shape.batch, 3, 224, 224, generator=generator).to(device, dtype)
        return {"pixel_values": images, "labels": torch.randint(0, 100, (shape.batch,), generator=generator).to(device)}

    shape = replace(shape, tokens=197)
    return Subject(f"ViT {shape.width} x {shape.depth}", base, inputs, "all-linear", None, shape)


def causal_subject(name: str, base: nn.Module, shape: Shape, targets: list[str] | str) -> Subject:
    """Any causal language model, with random tokens as inputs."""
    config: Any = base.config
    vocabulary = int(config.get_text_config().vocab_size)
    device = next(base.parameters()).device

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, vocabulary, (shape.batch, shape.tokens), generator=generator).to(device)
        return {"input_ids": ids, "labels": ids}

    return Subject(name, base, inputs, targets, vocabulary, shape)


def own(name: str, meta: nn.Module, shape: Shape, targets: list[str] | str, device: str, dtype: torch.dtype) -> Subject:
    """A user's architecture, from a model on the meta device.

    Raises:
        LilyError: if it is not a causal language model.
    """
    if not is_causal(meta) or getattr(meta, "get_input_embeddings", None) is None:
        raise LilyError(
            f"{name} is a {type(meta).__name__}; lily bench needs a causal language model, or the built-in llama or vit"
        )

    def build() -> nn.Module:
        model = meta.to(dtype).to_empty(device="cpu")
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=0.02)
        cast(Any, model).init_weights()  # buffers too, such as the rotary ones
        return model

    return causal_subject(name, _ready(build, device, dtype), shape, targets)


def _ready(build: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return build().to(device, dtype).requires_grad_(False).train()
