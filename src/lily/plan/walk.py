"""The modules of a base model: which ones it has, without what adapters added, and what kind of model it is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from lily.errors import LilyError
from lily.plan.attention import IN, InProjection, has_in_projection
from lily.plan.specs import base_of

# Of attention, of whole models, and of convolutions beside attention whose window ends at the token.
CAUSAL = re.compile("Causal|Streaming")


class NoTargetError(LilyError, NoMatchingPeftModuleError):  # type: ignore[misc]
    """The targets match nothing. Subclass of PEFT's error for that, so existing handlers catch it."""


def own_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Named modules of the base model: adapted layers instead of their base layers, without adapter internals.

    The `in_proj` of an `nn.MultiheadAttention` is one, also where nothing has adapted it yet.
    """
    inside: list[str] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == IN and isinstance(base_of(module), InProjection):
            inside.append(f"{name}.")
            continue  # named after its attention
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, nn.MultiheadAttention) and has_in_projection(module):
            if name:
                yield name, module
            yield f"{name}.{IN}".removeprefix("."), module._modules.get(IN) or InProjection(module)
            continue
        if not name:
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
            if not hasattr(module, "base_layer"):
                continue
        yield name, module


def is_linear(module: nn.Module) -> bool:
    """Whether a module, or the one below its adapter, is a linear layer."""
    base = base_of(module)
    return isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D"


def is_causal(model: nn.Module) -> bool:
    """Whether each token depends on earlier ones only: causal language models and state-space models."""
    config = getattr(model, "config", None)
    if isinstance(config, dict):
        return False
    model_type = str(getattr(config, "model_type", ""))
    if any(key in model_type for key in ("mamba", "rwkv", "xlstm", "recurrent_gemma")):
        return True
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return True
    return bool(getattr(config, "is_decoder", False)) or bool(getattr(config, "is_encoder_decoder", False))


def has_causal_part(model: nn.Module) -> bool:
    """Whether something in a model reads from left to right: a causal model, or attention that is, under any head.

    The states of a decoder under a classification head, or in a model of one's own, must not depend on later tokens
    either; and those of its tokens are often read without a mask, since later padding does not matter.
    """
    from transformers.models.auto import modeling_auto as auto

    causal, masked = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    for module in model.modules():
        if isinstance(base_of(module), nn.TransformerDecoderLayer):
            return True
        if getattr(module, "is_causal", False) is True or CAUSAL.search(type(module).__name__):
            return True
        if any(map(is_causal_mask, module.buffers(recurse=False))):
            return True
        if hasattr(module, "get_input_embeddings"):  # a model of transformers
            if is_causal(module):
                return True
            model_type = getattr(getattr(module, "config", None), "model_type", None)
            if model_type in causal and model_type not in masked:
                return True
    return is_causal(model)


def is_causal_mask(mask: Tensor) -> bool:
    """Whether a mask lets each token attend to itself and earlier ones: 1 there and 0 elsewhere, or 0 and -inf."""
    n = mask.shape[-1] if mask.ndim >= 2 else 0
    if n < 2 or mask.shape[-2] != n or mask.numel() != n * n:
        return False
    if mask.device.type == "meta":
        return mask.dtype == torch.bool and mask.ndim == 4
    lower = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
    kept = mask.reshape(n, n) != 0
    return torch.equal(kept, lower) or torch.equal(~kept, lower)


def suggest(targets: Sequence[str], names: Sequence[str]) -> tuple[str, str]:
    """A question about near matches of `targets` among `names`, and the first of all names."""
    near = dict.fromkeys(n for t in targets for n in difflib.get_close_matches(t.rpartition(".")[2], names, n=3))
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return hint, ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or "none"
