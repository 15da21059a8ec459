"""Layers whose input is not (batch, tokens, ...) of samples, so that they cannot average over a sample's tokens.

Modules work on (tokens, batch, ...), or a layer projects positions, of which there are as many as the batch has tokens.
"""

from __future__ import annotations

from torch import nn

from lily.plan.specs import base_of

TOKENS_FIRST = (
    "BridgeTowerResidualAttention",
    "FSMTDecoder",
    "FSMTEncoder",
    "LEDEncoderSelfAttention",
    "LongformerSelfAttention",
    "Mask2FormerMaskedAttentionDecoderLayer",
    "OneFormerTransformerDecoderLayer",
    "OneFormerTransformerDecoderQueryTransformerDecoderLayer",
    "XLNetModel",
)
BATCH_FIRST = ("Mask2FormerAttention", "OneFormerAttention", "MultiheadAttention")  # they transpose for their layers
POSITIONS = ("linear_pos", "relative_k_proj")  # layers of Conformers, in transformers, NeMo and ESPnet
TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def is_tokens_first(model: nn.Module, path: str) -> bool:
    """Whether the layer at `path` reads (tokens, batch, ...)."""
    found, module = _changes(model, False), model
    for part in path.split(".")[:-1]:
        module = module.get_submodule(part)
        found = _changes(module, found)
    return found


def reads_positions(path: str) -> bool:
    """Whether the layer at `path` projects relative positions."""
    return path.rpartition(".")[2] in POSITIONS


def _changes(module: nn.Module, outside: bool) -> bool:
    base = base_of(module)
    if isinstance(base, TORCH_LAYERS):
        return not getattr(base.self_attn, "batch_first", True)
    names = {cls.__name__ for cls in type(base).__mro__}  # an adapted attention is of a subclass
    return not names.isdisjoint(TOKENS_FIRST) or (outside and names.isdisjoint(BATCH_FIRST))
