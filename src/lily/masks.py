"""Which tokens count: how the attention mask reaches layers that never see it.

`sequence` routing averages over the unmasked tokens of each sample. Models pass the mask down in many forms, most of
them no longer recognisable where a linear layer is called, so it is read where it is still (batch, tokens): at the
models inside a model (the model itself, an encoder stack, a decoder stack), by forward hooks. A layer then looks up
the mask that fits the shape of its input.

Under gradient checkpointing a block runs again during backward, when the model's forward is over and another one
(the second half of a contrastive pair, say) may have left its own mask. So each block notes the masks under the
address of its input, which checkpointing keeps alive until then.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Forwards whose backward may still come; each holds masks only, so a few more cost nothing.
FORWARDS = 16

Address = tuple[int, torch.Size]


@dataclass(frozen=True)
class Scope:
    """The masks that one model was called with.

    Attributes:
        own: (batch, tokens) of the sequence that this model reads; None means that all its tokens count.
        other: (batch, tokens) of the sequence that it attends to (cross-attention).
        other_address: that sequence's hidden states, to recognise layers that read them.
    """

    own: Tensor | None
    other: Tensor | None = None
    other_address: Address | None = None

    def fit(self, x: Tensor) -> Tensor | None:
        """The mask for a layer's input `x`, or None where all tokens count."""
        if self.other_address is not None and _address(x) == self.other_address:
            return self.other
        return self.own if self.own is not None and fits(self.own, x) else None


def fits(mask: Tensor, x: Tensor) -> bool:
    """Whether `x` is (batch, tokens, ..., in), or (batch * tokens, in), of this (batch, tokens) mask."""
    if x.ndim >= 3:
        return x.shape[:2] == mask.shape
    return x.ndim == 2 and x.shape[0] == mask.numel() and x.shape[0] != mask.shape[0]


def _address(x: Tensor) -> Address | None:
    # A traced or meta tensor has none; a mask of the layer's own shape is then the best answer.
    return None if torch.compiler.is_compiling() or x.device.type == "meta" else (x.data_ptr(), x.shape)


class MaskTracker:
    """The masks of the forward that is running; one per adapted model, shared by its layers and the hooks."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.forwards: deque[dict[Address, tuple[Scope, ...]]] = deque(maxlen=FORWARDS)
        self.recomputing = False

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The mask that fits the input `x` of a layer; None means that all tokens count."""
        return self.scopes[-1].fit(x) if self.scopes else None


class _Hook:
    def __init__(self, tracker: MaskTracker) -> None:
        self.tracker = tracker


class EnterModel(_Hook):
    """Before a model's forward: its masks hold until `LeaveModel`."""

    def __init__(self, tracker: MaskTracker, module: nn.Module) -> None:
        super().__init__(tracker)
        self.names = list(inspect.signature(module.forward).parameters)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open a scope. A mask in a form that cannot be read leaves the outer one in force."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tracker = self.tracker
        own = given.get("attention_mask")
        if own is not None and not _readable(own):
            own = tracker.scopes[-1].own if tracker.scopes else None
        other, states = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
        if not tracker.scopes:
            tracker.forwards.append({})
        tracker.scopes.append(
            Scope(own, other if _readable(other) else None, _address(states) if isinstance(states, Tensor) else None)
        )


class LeaveModel(_Hook):
    """After a model's forward, also one that raised."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Close the scope."""
        if self.tracker.scopes:
            self.tracker.scopes.pop()


class EnterBlock(_Hook):
    """Before a block: note the masks under its input's address, or find them again when it runs for backward."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note or find."""
        tracker = self.tracker
        if not (module.training or torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        address = None if x is None else _address(x)
        if address is None:
            return
        if tracker.scopes:
            if tracker.forwards:
                tracker.forwards[-1][address] = tuple(tracker.scopes)
            return
        # Newest first: memory that was freed and used again belongs to the later forward.
        found = next((notes[address] for notes in reversed(tracker.forwards) if address in notes), None)
        if found is not None:
            tracker.scopes.extend(found)
            tracker.recomputing = True


class LeaveBlock(_Hook):
    """After a block that ran for backward."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forget what `EnterBlock` found."""
        if self.tracker.recomputing:
            self.tracker.scopes.clear()
            self.tracker.recomputing = False


def _readable(mask: object) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2


def watch(model: nn.Module, layers: Iterable[str], tracker: MaskTracker) -> list[Any]:
    """Install the hooks on `model` and on every model and outermost block that holds one of `layers`.

    Args:
        model: the adapted model.
        layers: dotted names of the adapted layers.
        tracker: what the layers ask.

    Returns:
        Handles; `.remove()` takes a hook off again.
    """
    models, blocks = {""}, set()
    for layer in layers:
        parts = layer.split(".")
        path = [".".join(parts[:i]) for i in range(1, len(parts))]
        models.update(name for name in path if isinstance(model.get_submodule(name), PreTrainedModel))
        lists = (b for a, b in zip(path, path[1:], strict=False) if _is_list(model.get_submodule(a)))
        blocks.update(name for _, name in zip(range(1), lists, strict=False))
    handles = []
    for name in sorted(models):
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(EnterModel(tracker, module), with_kwargs=True))
        handles.append(module.register_forward_hook(LeaveModel(tracker), always_call=True))
    for name in sorted(blocks):
        block = model.get_submodule(name)
        handles.append(block.register_forward_pre_hook(EnterBlock(tracker), with_kwargs=True))
        handles.append(block.register_forward_hook(LeaveBlock(tracker), always_call=True))
    return handles


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential))
