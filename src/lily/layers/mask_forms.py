"""What masks of other forms than (batch, tokens) say, and those that the denoisers of diffusers are called with.

A denoiser has two sequences, of an image (a video, a sound) and of text, and usually a mask of the text alone. Its
layers read one of them, or both in one sequence, for which the denoiser makes a mask that it calls its blocks with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lily.layers.traced import exporting
from lily.plan.walk import is_causal_mask

TEXT_MASKS = (
    "encoder_attention_mask",
    "encoder_attention_mask_2",
    "encoder_hidden_states_mask",
    "encoder_mask",
    "text_embedding_mask",
    "text_embedding_mask_t5",
)
TOKENS = ("input_ids", "inputs_embeds")  # (batch, tokens, ...)
MASKS = ("attention_mask", "attn_mask", *TEXT_MASKS)


def attended(mask: Tensor) -> Tensor:
    """Which tokens (batch, tokens) a mask of any form lets somebody attend to.

    Args:
        mask: (batch, tokens) or (batch, ..., queries, tokens); True or 1 where a token counts, or what is added to the
            scores, which is very negative where one does not.
    """
    kept = _kept(mask)
    return kept.flatten(1, -2).any(1) if mask.ndim > 2 else kept


def _kept(mask: Tensor) -> Tensor:
    """A mask of any form as truth values: True where a token counts."""
    if mask.dtype == torch.bool:
        return mask
    added = ((mask != 0) & (mask != 1)).any() | (mask == 0).all()
    return either(added, mask > -1e3, mask != 0)


def blocks(mask: Tensor, samples: int) -> Tensor | None:
    """Which tokens are of which sample, (1, tokens, samples), where a model has put all samples into one row.

    Pixtral does so with the images of a batch, and calls its encoder with a mask (1, ..., tokens, tokens) of blocks.
    One sample may have blocks too, of windows, so that their number must be that of the samples.
    """
    if not _can_ask(mask) or samples < 2 or mask.ndim < 3 or mask.shape[0] != 1 or mask.shape[-1] != mask.shape[-2]:
        return None
    seen = _kept(mask).flatten(0, -3)[0]
    first = seen.int().argmax(-1)
    found = torch.unique(first)
    if len(found) != samples or not torch.equal(seen, first.unsqueeze(-1) == first):
        return None
    return torch.eq(first.unsqueeze(-1), found).unsqueeze(0)


def packed(arguments: Mapping[str, Any]) -> Tensor | None:
    """Which tokens are of which sample, (batch, tokens, samples), where a model is called with several in a row.

    As transformers' `DataCollatorWithFlattening` does for attention without padding, and sentence-transformers where it
    can: `cu_seq_lens_q` has the ends of samples, `seq_idx` their numbers, or positions begin again where no mask says
    that they are padding.
    """
    tokens = next((arguments[name].shape[1] for name in TOKENS if isinstance(arguments.get(name), Tensor)), 0)
    if not tokens:
        return None
    ends, numbers, positions = (arguments.get(name) for name in ("cu_seq_lens_q", "seq_idx", "position_ids"))
    if isinstance(ends, Tensor) and ends.ndim == 1:
        places = torch.arange(tokens, device=ends.device).unsqueeze(-1)
        return ((places >= ends[:-1]) & (places < ends[1:])).unsqueeze(0)
    if not is_matrix(numbers):
        masked = arguments.get("attention_mask") is not None
        if masked or not is_matrix(positions) or not _can_ask(positions):
            return None
        begins = positions.diff(dim=1) <= 0
        if not begins.any():
            return None
        numbers = F.pad(begins.cumsum(1), (1, 0))
    if not _can_ask(numbers):
        return None
    return torch.eq(numbers.unsqueeze(-1), torch.unique(numbers))


def _can_ask(data: Tensor) -> bool:
    """Whether data may decide, as of how many samples there are: not in programs that are made once for all data."""
    return not (torch.compiler.is_compiling() or exporting() or data.device.type == "meta")


def is_matrix(value: object) -> TypeGuard[Tensor]:
    """Whether an argument is a tensor (batch, tokens)."""
    return isinstance(value, Tensor) and value.ndim == 2


def either(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`torch.where` of truth values, for which ONNX Runtime has none."""
    return (condition & yes) | (~condition & no)


def kept_tokens(padding: Tensor) -> Tensor:
    """The mask that belongs to torch's padding mask, which is True, or -inf, where a token does not count."""
    return ~(padding if padding.dtype == torch.bool else padding.isneginf())


def is_told_to_be_causal(*said: object) -> bool:
    """Whether a mask or an `is_causal` of a call lets each token attend to earlier ones alone."""
    return any(_can_ask(one) and is_causal_mask(one) if isinstance(one, Tensor) else one is True for one in said)


def is_denoiser(module: nn.Module) -> bool:
    """Whether a module is a model of diffusers; asked without importing it."""
    names = ((cls.__module__, cls.__name__) for cls in type(module).__mro__)
    return ("diffusers.models.modeling_utils", "ModelMixin") in names


def masks_of_call(arguments: Mapping[str, Any]) -> Iterator[Tensor]:
    """The masks (batch, tokens) that a denoiser, or a module inside it, is called with, for what it and its text read.

    A mask of both sequences also gives that of the text. One that is as long as either sequence gives none, because
    its length does not say which of them it is for.
    """
    own, text = length(arguments, "hidden_states", "x"), length(arguments, "encoder_hidden_states")
    for name in MASKS:
        mask = arguments.get(name)
        if not isinstance(mask, Tensor) or mask.ndim < 2:
            continue
        kept = attended(mask)
        if own is None or text is None:
            yield kept
        elif kept.shape[1] == own + text:
            yield kept
            if own != text:  # the image has no padding
                yield either(kept[:, text:].all(), kept[:, :text], kept[:, own:])
        elif own != text:
            yield kept


def length(arguments: Mapping[str, Any], *names: str) -> int | None:
    """The number of tokens of the sequence (batch, tokens, in) that an argument is; None: there is no such argument."""
    found = (arguments.get(name) for name in names)
    return next((x.shape[1] for x in found if isinstance(x, Tensor) and x.ndim == 3), None)


def text_mask(arguments: Mapping[str, Any]) -> Tensor | None:
    """The mask of the text `encoder_hidden_states`, if a denoiser or a module inside it is called with one."""
    masks = (arguments.get(name) for name in TEXT_MASKS)
    kept = (attended(mask) for mask in masks if isinstance(mask, Tensor) and mask.ndim >= 2)
    return next((mask for mask in kept if mask.shape[1] == length(arguments, "encoder_hidden_states")), None)


def with_other_lengths(masks: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`masks` and those of `new` that have another number of tokens."""
    lengths = {mask.shape[1] for mask in masks}
    return (*masks, *(mask for mask in new if mask.shape[1] not in lengths))
