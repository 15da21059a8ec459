"""Which tokens count: the masks that are in force while an adapted model runs, for layers that never see one.

`sequence` routing averages over the unmasked tokens of each sample. Hooks (`mask_hooks`) note the masks that models are
called with; a layer looks up the one that fits the shape of its input.

Before and after its encoder, a speech model's own formula gives the length of a sequence, or the number of frames of a
token.

Under gradient checkpointing layers run again during backward, when the model's forward has ended and another one (such
as the second half of a contrastive pair) may have left its mask. So a gradient hook on a model's outputs restores its
masks: autograd works in reverse order, so it finishes one forward's graph, recomputation included, before it reaches
the outputs of an earlier one.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lily.layers.mask_forms import is_told_to_be_causal
from lily.layers.traced import exporting

Address = tuple[int, torch.Size]


@dataclass(frozen=True)
class Scope:
    """The masks that one model was called with.

    Attributes:
        own: (batch, tokens) of the model's input sequence; None: all its tokens count. (batch, tokens, samples) where a
            row has several samples: which tokens are of which.
        other: (batch, tokens) of the sequence that it attends to (cross-attention).
        other_address: memory address of that sequence's hidden states, to recognize layers that read them.
        other_states: these hidden states where they have no address because the model is being exported.
        model: the model.
        inner: as `own`, of the sequence that the encoder inside the model has, where that is another one.
        more: of each sequence in a denoiser.
        samples: in the model's input.
    """

    own: Tensor | None
    other: Tensor | None = None
    other_address: Address | None = None
    other_states: Tensor | None = None
    model: nn.Module | None = None
    inner: Tensor | None = None
    more: tuple[Tensor, ...] = ()
    samples: int = 0

    @property
    def is_packed(self) -> bool:
        """Whether a row of the model's input has several samples."""
        return self.own is not None and self.own.ndim == 3

    def fit(self, x: Tensor) -> Tensor | None:
        """The mask for a layer's input `x`, or None where all tokens count."""
        if self.other_address is not None and _address(x) == self.other_address:
            return self.other
        if self.other_states is not None and x is self.other_states:
            return self.other
        for mask in (self.own, self.inner, *self.more):
            if mask is not None and fits(mask, x):
                return mask
            if mask is not None and x.ndim == 4 and (x.shape[0], x.shape[2]) == mask.shape:
                return mask.unsqueeze(1).expand(x.shape[:3])  # (batch, heads, tokens, in), as WavLM's position gates
        if self.own is None or self.is_packed or not _hears(self.model):
            return None
        if x.ndim < 3 or x.shape[0] != self.own.shape[0]:
            return None
        mask = self.own if self.inner is None else self.inner
        if x.shape[1] > mask.shape[1]:
            return F.pad(mask, (0, x.shape[1] - mask.shape[1]))  # attention by blocks of one length
        return _shortened(self.own, x, self.model)


def fits(mask: Tensor, x: Tensor) -> bool:
    """Whether `x` is (batch, tokens, ..., in) or (batch * tokens, in) with the (batch, tokens) of the mask."""
    batch, tokens = mask.shape[:2]
    if x.ndim >= 3:
        return x.shape[:2] == (batch, tokens) and (mask.ndim == 2 or x.ndim == 3)
    return x.ndim == 2 and x.shape[0] == batch * tokens and x.shape[0] != batch


FRAMES, WAVE = "input_features", "input_values"  # what speech models call their input
LENGTHS = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")  # methods of speech models


def _hears(model: nn.Module | None) -> bool:
    """Whether a model reads speech, whose sequences get shorter inside it and are padded there at their end."""
    return getattr(model, "main_input_name", None) in (FRAMES, WAVE) or any(hasattr(model, name) for name in LENGTHS)


def _shortened(mask: Tensor, x: Tensor, model: nn.Module | None) -> Tensor:
    """The mask for `x` (batch, fewer tokens, ...) of a speech model; all tokens count if no formula gives that length.

    The comparison is a tensor, so that nothing waits for it and programs with dynamic shapes have it too.
    """
    tokens, lengths = x.shape[1], torch.full_like(mask[:, 0], x.shape[1], dtype=torch.long)
    of_all = torch.full_like(mask[:1, 0], mask.shape[1], dtype=torch.long)
    for formula in _formulas(model, (mask.shape[1] + tokens // 2) // tokens):  # the last that fits
        if isinstance(full := formula(of_all), Tensor):  # some return two
            lengths = torch.where(full == tokens, formula(mask.sum(-1)).long(), lengths)
    return torch.arange(tokens, device=mask.device) < lengths.unsqueeze(-1)


def _formulas(model: nn.Module | None, stride: int) -> list[Any]:
    """The lengths of sequences in a speech model, by several formulas.

    Where it reads frames, a token may be `stride` of them, those left over none or one; its own formula says it before
    and, in some models, behind the layers that follow the encoder.
    """
    made: list[Any] = []
    if getattr(model, "main_input_name", None) == FRAMES:
        made = [lambda lengths: lengths // stride, lambda lengths: (lengths + stride - 1) // stride]
    formula = next((getattr(model, name) for name in LENGTHS if hasattr(model, name)), None)
    if formula is None or "add_adapter" not in inspect.signature(formula).parameters:
        return made if formula is None else [*made, formula]
    return [*made, *(functools.partial(formula, add_adapter=behind) for behind in (True, False))]


def _address(x: Tensor) -> Address | None:
    # A traced or meta tensor has none; the layer then takes the mask that fits its shape.
    return None if torch.compiler.is_compiling() or x.device.type == "meta" else (x.data_ptr(), x.shape)


def recognized(states: object) -> tuple[Address | None, Tensor | None]:
    """By what layers that read these hidden states are recognized: their address, or, in an export, themselves."""
    if not isinstance(states, Tensor):
        return None, None
    address = _address(states)
    return address, states if address is None and exporting() else None


class _OfThread(threading.local):
    """What a thread runs: a server's, or one of `nn.DataParallel` for its replica. Not copied with a model."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.backward: Scope | None = None

    def __reduce__(self) -> Any:
        return _OfThread, ()


class MaskTracker:
    """The masks of the forward that is running; one per adapted model, shared by its layers and the hooks.

    autograd has a thread for each device, so it need not be the one that ran the forward.
    """

    def __init__(self) -> None:
        self._mine = _OfThread()
        self._backward: Scope | None = None
        self._trained_in: set[int] = set()
        self._asked: set[int] = set()
        self._warned = False

    @property
    def scopes(self) -> list[Scope]:
        """Masks of the models that this thread is running, outermost first."""
        return self._mine.scopes

    @property
    def backward(self) -> Scope | None:
        """The scope whose graph autograd is traversing: in this thread, if several have run the model."""
        return self._mine.backward if len(self._trained_in) > 1 else self._backward

    def in_backward(self, scope: Scope) -> Callable[[Tensor], None]:
        """A gradient hook by which autograd tells that it comes to the graph of a forward of this thread."""
        self._trained_in.add(threading.get_ident())

        def reopen(_: Tensor) -> None:
            self._backward = self._mine.backward = scope

        return reopen

    def ask(self, module: nn.Module, *said: object) -> None:
        """Warn once if a module's first call says, by a mask or `is_causal`, that no token may see later ones."""
        if torch.compiler.is_compiling() or self._warned or id(module) in self._asked:
            return
        self._asked.add(id(module))
        if is_told_to_be_causal(*said):
            self._warned = True
            warnings.warn(
                f"routing='sequence', but {type(module).__name__} attends to earlier tokens alone: with this routing "
                "its outputs depend on later tokens. Use routing='token' (see docs/routing.md)",
                stacklevel=2,
            )

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The mask that fits the input `x` of a layer, on its device; None: all tokens count."""
        scope = self.scopes[-1] if self.scopes else self.backward
        mask = None if scope is None else scope.fit(x)
        return None if mask is None else mask.to(x.device)  # the model's inputs may be on another device than the layer

    @contextmanager
    def of_tokens(self, own: Tensor | None) -> Iterator[None]:
        """Within: `own` (batch, tokens) is the mask; None: that of the model stays."""
        if own is not None:
            self.scopes.append(Scope(own))
        try:
            yield
        finally:
            if own is not None:
                self.scopes.pop()

    @contextmanager
    def of_rows(self, x: Tensor, rows: Tensor) -> Iterator[Tensor]:
        """Within: the masks for some rows of a layer's input `x`, which is returned."""
        scope, own = self.scopes[-1] if self.scopes else Scope(None), x[rows]

        def part(mask: Tensor | None) -> Tensor | None:
            return mask[rows.to(mask.device)] if mask is not None and len(mask) == len(x) else None

        crossed = scope.other_address is not None and _address(x) == scope.other_address
        address = _address(own) if crossed else None
        masks = (part(scope.own), part(scope.other), address, None, scope.model, part(scope.inner))
        self.scopes.append(Scope(*masks, tuple(mask for mask in map(part, scope.more) if mask is not None)))
        try:
            yield own
        finally:
            self.scopes.pop()
