"""Which tokens count: how the attention mask reaches layers that never see it.

`sequence` routing averages over the unmasked tokens of each sample. Models pass the mask down in many forms that a
linear layer cannot recognize, so forward hooks read it where it still is (batch, tokens): at the models inside a model
(the model itself, an encoder stack, a decoder stack). A layer then looks up the mask that fits the shape of its input.
Code that calls `model.forward(...)` runs no hooks, so the class of such a model becomes a subclass whose `forward` does
what they do, as FSDP2 and `torch.nn.utils.parametrize` change classes.

Inside a model the sequence can have another length than its mask: speech models shorten it, others add pixels or
padding of their own. Such a model makes a mask of that length, in any form, and calls its encoder with it; hooks there
read which tokens somebody attends to. Before and after its encoder, a speech model's own formula gives the length.

Under gradient checkpointing layers run again during backward, when the model's forward has ended and another one (such
as the second half of a contrastive pair) may have left its mask. So a gradient hook on a model's outputs restores its
masks: autograd works in reverse order, so it finishes one forward's graph, recomputation included, before it reaches
the outputs of an earlier one.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lily.layers.mask_forms import (
    MASKS,
    attended,
    is_denoiser,
    kept_tokens,
    length,
    masks_of_call,
    text_mask,
    with_other_lengths,
)
from lily.layers.traced import exporting
from lily.plan.tokens_first import TORCH_LAYERS

Address = tuple[int, torch.Size]
PADDING = ("src_key_padding_mask", "tgt_key_padding_mask")  # arguments of torch's encoder and decoder layers
# (batch, tokens) of a model's input: of SigLIP 2's patches, and of timm's NaFlexViT's
OWN_MASKS = ("attention_mask", "pixel_attention_mask", "patch_valid")
UNCHANGED = (torch.jit.ScriptModule, torch.fx.GraphModule, FSDPModule)


@dataclass(frozen=True)
class Scope:
    """The masks that one model was called with.

    Attributes:
        own: (batch, tokens) of the model's input sequence; None: all its tokens count.
        other: (batch, tokens) of the sequence that it attends to (cross-attention).
        other_address: memory address of that sequence's hidden states, to recognize layers that read them.
        other_states: these hidden states where they have no address because the model is being exported.
        model: the model.
        inner: (batch, tokens) of the sequence that the encoder inside the model has, where that is another one.
        more: of each sequence in a denoiser.
    """

    own: Tensor | None
    other: Tensor | None = None
    other_address: Address | None = None
    other_states: Tensor | None = None
    model: nn.Module | None = None
    inner: Tensor | None = None
    more: tuple[Tensor, ...] = ()

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
        return None if self.own is None else _shortened(self.own, x, self.model)


def fits(mask: Tensor, x: Tensor) -> bool:
    """Whether `x` is (batch, tokens, ..., in) or (batch * tokens, in) with the (batch, tokens) of the mask."""
    if x.ndim >= 3:
        return x.shape[:2] == mask.shape
    return x.ndim == 2 and x.shape[0] == mask.numel() and x.shape[0] != mask.shape[0]


LENGTHS = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")  # methods of speech models


def _shortened(mask: Tensor, x: Tensor, model: nn.Module | None) -> Tensor | None:
    """The mask for `x` (batch, fewer tokens, ...) of a speech model; all tokens count if no formula gives that length.

    The comparison is a tensor, so that nothing waits for it and programs with dynamic shapes have it too.
    """
    formulas = _formulas(model)
    if not formulas or x.ndim < 3 or x.shape[0] != mask.shape[0] or x.shape[1] >= mask.shape[1]:
        return None
    tokens, lengths = x.shape[1], torch.full_like(mask[:, 0], x.shape[1], dtype=torch.long)
    of_all = torch.full_like(mask[:1, 0], mask.shape[1], dtype=torch.long)
    for formula in formulas:
        if isinstance(full := formula(of_all), Tensor):  # some return two
            lengths = torch.where(full == tokens, formula(mask.sum(-1)).long(), lengths)
    return torch.arange(tokens, device=mask.device) < lengths.unsqueeze(-1)


def _formulas(model: nn.Module | None) -> list[Any]:
    """The lengths of sequences in a speech model: before and, in some, behind the layers that follow the encoder."""
    formula = next((getattr(model, name) for name in LENGTHS if hasattr(model, name)), None)
    if formula is None or "add_adapter" not in inspect.signature(formula).parameters:
        return [] if formula is None else [formula]
    return [functools.partial(formula, add_adapter=behind) for behind in (True, False)]


def _address(x: Tensor) -> Address | None:
    # A traced or meta tensor has none; the layer then takes the mask that fits its shape.
    return None if torch.compiler.is_compiling() or x.device.type == "meta" else (x.data_ptr(), x.shape)


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


class ModelHooks:
    """Forward hooks of one model: its masks are in force during its forward, and again in its backward.

    Args:
        tracker: where the layers look up masks.
        module: the model.
    """

    def __init__(self, tracker: MaskTracker, module: nn.Module) -> None:
        self.tracker = tracker
        self.names = list(inspect.signature(module.forward).parameters)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        inputs = given.get(self.names[0]) if self.names else None
        return {**inputs, **given} if isinstance(inputs, Mapping) else given

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open a scope. If the mask has an unsupported form, the outer one stays in force."""
        arguments = self._named(args, kwargs)
        scopes = self.tracker.scopes
        own = next((mask for name in OWN_MASKS if (mask := arguments.get(name)) is not None), None)
        if own is None and isinstance(module, TORCH_LAYERS):
            padding = [arguments[name] for name in PADDING if _readable(arguments.get(name))]
            if not (padding and _is_batch_first(module)):  # that of the model stays
                scopes.append(replace(scopes[-1] if scopes else Scope(None), model=module))
                return
            own = kept_tokens(padding[0])
        if own is not None and not _readable(own):
            own = scopes[-1].own if scopes else None
        other, states = arguments.get("encoder_attention_mask"), arguments.get("encoder_hidden_states")
        address = _address(states) if isinstance(states, Tensor) else None
        held = states if isinstance(states, Tensor) and address is None and exporting() else None
        scopes.append(Scope(own, other if _readable(other) else None, address, held, module))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Close the scope, also after a forward that raised, and restore it in backward."""
        tracker = self.tracker
        if not tracker.scopes:
            return
        scope = tracker.scopes.pop()
        if torch.compiler.is_compiling() or exporting():
            return
        reopen = tracker.in_backward(scope)
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(reopen)  # type: ignore[no-untyped-call]


class EncoderHooks(ModelHooks):
    """Forward hooks of a module inside a model that is called with a mask: in force besides the model's own."""

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open the model's scope again, with what the mask says of a sequence of another length."""
        arguments = self._named(args, kwargs)
        mask = arguments.get("attention_mask", arguments.get("attn_mask") if _is_timms(module) else None)
        tracker = self.tracker
        scopes = tracker.scopes
        # A checkpointed module runs again when no scope is open.
        scope = scopes[-1] if scopes else tracker.backward or Scope(None)
        if isinstance(mask, Tensor) and mask.ndim >= 2 and (scope.own is None or scope.own.shape[1] != mask.shape[-1]):
            scope = replace(scope, inner=attended(mask))
            # The models around it may return what it returns, so that backward comes to their scopes last.
            scopes[:] = [outer if outer.inner is not None else replace(outer, inner=scope.inner) for outer in scopes]
        scopes.append(scope)


class DenoiserHooks(ModelHooks):
    """Forward hooks of a denoiser of diffusers and of the modules inside it that are called with masks."""

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open a scope; of the masks around a module, one as long as its own sequence may be for the other one."""
        arguments = self._named(args, kwargs)
        tracker = self.tracker
        outer = Scope(None)
        if not is_denoiser(module):  # a checkpointed module runs again when no scope is open
            outer = tracker.scopes[-1] if tracker.scopes else tracker.backward or outer
        own, text, states = length(arguments, "hidden_states", "x"), text_mask(arguments), None
        if text is not None:
            states = arguments["encoder_hidden_states"]
        address = None if states is None else _address(states)
        held = states if states is not None and address is None and exporting() else None
        masks = tuple(masks_of_call(arguments))
        if not is_denoiser(module):  # what the denoiser makes of a sequence that it pads is read by layers behind too
            tracker.scopes[:] = [replace(scope, more=with_other_lengths(scope.more, masks)) for scope in tracker.scopes]
        kept = (mask for mask in outer.more if mask.shape[1] != own)
        tracker.scopes.append(Scope(None, text, address, held, module, None, (*masks, *kept)))


class Watched(nn.Module):
    """Base of the classes that watched models have while they are watched; see `watched_class`."""

    lily_hooks: ModelHooks

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle finds classes by name, and that of this one names the original
        return _restored, (type(self).__mro__[2],), self.__getstate__()  # type: ignore[no-untyped-call]


@functools.cache
def watched_class(cls: Any) -> Any:
    """A subclass of a model's class, with its name, whose `forward` opens a scope unless a hook has opened it."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hooks = self.lily_hooks
        scopes = hooks.tracker.scopes
        if scopes and scopes[-1].model is self:
            return cls.forward(self, *args, **kwargs)
        hooks.enter(self, args, kwargs)
        output = None
        try:
            output = cls.forward(self, *args, **kwargs)
        finally:
            hooks.leave(self, args, output)
        return output

    names = {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (Watched, cls), names)


def _restored(cls: type[nn.Module]) -> nn.Module:
    made = watched_class(cast(Any, cls))
    return cast(nn.Module, made.__new__(made))


def _has_mask(module: nn.Module) -> bool:
    """Whether a module is called with the mask of its input, which is (batch, tokens, ...)."""
    if isinstance(module, PreTrainedModel) or is_denoiser(module):
        return True
    return isinstance(module, TORCH_LAYERS) and _is_batch_first(module)


def _kind(model: nn.Module) -> type[ModelHooks]:
    return DenoiserHooks if is_denoiser(model) else ModelHooks


def _is_timms(module: nn.Module) -> bool:
    return type(module).__module__.startswith("timm.")


def _takes_mask(module: nn.Module, model: type[ModelHooks]) -> bool:
    """Whether a module inside a model is no adapted layer and is called with an attention mask of whatever form."""
    # an `attn_mask` of torch's own modules says which tokens do not count
    names = MASKS if model is DenoiserHooks else MASKS[:2] if _is_timms(module) else MASKS[:1]
    taken = inspect.signature(module.forward).parameters
    return not isinstance(module, BaseTunerLayer) and any(name in taken for name in names)


def _is_batch_first(layer: nn.Module) -> bool:
    return bool(getattr(layer.self_attn, "batch_first", False))


class _ClassChange:
    """The change of a model's class, in the place of a hook's handle."""

    def __init__(self, module: nn.Module, hooks: ModelHooks) -> None:
        self.module = module
        if isinstance(module, Watched):
            vars(module)["lily_hooks"] = hooks
        # Scripted and traced modules do not run Python's `forward`, one that is an attribute (accelerate's hooks) comes
        # before the class's, and FSDP2's classes must stay what they are.
        elif "forward" not in vars(module) and not isinstance(module, UNCHANGED):
            vars(module)["lily_hooks"] = hooks
            module.__class__ = watched_class(cast(Any, type(module)))

    def remove(self) -> None:
        """Undo it, unless something else, such as FSDP2, has changed the class since."""
        made = type(self.module)
        if Watched in made.__bases__:
            self.module.__class__ = made.__mro__[2]
            del vars(self.module)["lily_hooks"]


def _readable(mask: object) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def watch(model: nn.Module, layers: Iterable[str], tracker: MaskTracker) -> list[Any]:
    """Install the hooks on `model` and on the models and torch's transformer layers inside it that hold `layers`.

    Args:
        model: the adapted model.
        layers: dotted names of the adapted layers.
        tracker: where the layers look up masks.

    Returns:
        Handles of the hooks.
    """
    models, inner = {"": _kind(model)}, {}
    for layer in layers:
        parts, kind, outside = layer.split("."), models[""], True
        for name in (".".join(parts[:i]) for i in range(1, len(parts))):
            module = model.get_submodule(name)
            if _has_mask(module):
                kind = models[name] = _kind(module)
                outside = True
            elif outside and _takes_mask(module, kind):
                inner[name] = kind if kind is DenoiserHooks else EncoderHooks
                outside = False
    handles: list[Any] = []
    for name, hooks in sorted(inner.items()) + sorted(models.items()):
        module = model.get_submodule(name)
        made = hooks(tracker, module)
        handles.append(module.register_forward_pre_hook(made.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(made.leave, always_call=True))
        if name in models:
            handles.append(_ClassChange(module, made))
    return handles
