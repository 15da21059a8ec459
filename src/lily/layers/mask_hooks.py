"""Note the attention masks that models are called with, for layers that never see them.

Models pass the mask down in many forms that a linear layer cannot recognize, so forward hooks read it where it still is
(batch, tokens): at the models inside a model (the model itself, an encoder stack, a decoder stack). Code that calls
`model.forward(...)` runs no hooks, so the class of such a model becomes a subclass whose `forward` does what they do,
as FSDP2 and `torch.nn.utils.parametrize` change classes.

Inside a model the sequence can have another length than its mask: speech models shorten it, others add pixels or
padding of their own. Such a model makes a mask of that length, in any form, and calls its encoder with it; hooks there
read which tokens somebody attends to.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lily.layers.attention_masks import MaskTracker, Scope, recognized
from lily.layers.mask_forms import (
    MASKS,
    attended,
    blocks,
    is_denoiser,
    is_matrix,
    kept_tokens,
    length,
    masks_of_call,
    packed,
    text_mask,
    with_other_lengths,
)
from lily.layers.traced import exporting
from lily.plan.tokens_first import TORCH_LAYERS

PADDING = ("src_key_padding_mask", "tgt_key_padding_mask")  # arguments of torch's encoder and decoder layers
CAUSAL = ("src_mask", "tgt_mask", "is_causal", "tgt_is_causal")
# (batch, tokens) of a model's input: of SigLIP 2's patches, and of timm's NaFlexViT's
OWN_MASKS = ("attention_mask", "pixel_attention_mask", "patch_valid")
UNCHANGED = (torch.jit.ScriptModule, torch.fx.GraphModule, FSDPModule)


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
        if isinstance(module, TORCH_LAYERS):
            self.tracker.ask(module, *(arguments.get(name) for name in CAUSAL))
        if own is None and isinstance(module, TORCH_LAYERS):
            padding = [arguments[name] for name in PADDING if is_matrix(arguments.get(name))]
            if not (padding and _is_batch_first(module)):  # that of the model stays
                scopes.append(replace(scopes[-1] if scopes else Scope(None), model=module))
                return
            own = kept_tokens(padding[0])
        if own is not None and not is_matrix(own):
            own = scopes[-1].own if scopes else None
        samples = packed(arguments)
        if samples is None and own is None and scopes and scopes[-1].is_packed:
            samples = scopes[-1].own  # a model inside need not be told
        own = own if samples is None else samples
        other, states = arguments.get("encoder_attention_mask"), arguments.get("encoder_hidden_states")
        rows = next((value.shape[0] for value in arguments.values() if isinstance(value, Tensor) and value.ndim > 1), 0)
        other = other if is_matrix(other) else None
        scopes.append(Scope(own, other, *recognized(states), module, samples=rows))

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
        mask = next((arguments[name] for name in _encoder_masks(module) if name in arguments), None)
        tracker = self.tracker
        scopes = tracker.scopes
        # A checkpointed module runs again when no scope is open.
        scope = scopes[-1] if scopes else tracker.backward or Scope(None)
        if isinstance(mask, Tensor) and mask.ndim >= 2 and (scope.own is None or scope.own.shape[1] != mask.shape[-1]):
            samples = blocks(mask, scope.samples)
            scope = replace(scope, inner=attended(mask) if samples is None else samples)
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
        own, text = length(arguments, "hidden_states", "x"), text_mask(arguments)
        states = None if text is None else arguments["encoder_hidden_states"]
        masks = tuple(masks_of_call(arguments))
        if not is_denoiser(module):  # what the denoiser makes of a sequence that it pads is read by layers behind too
            tracker.scopes[:] = [replace(scope, more=with_other_lengths(scope.more, masks)) for scope in tracker.scopes]
        kept = (mask for mask in outer.more if mask.shape[1] != own)
        tracker.scopes.append(Scope(None, text, *recognized(states), module, None, (*masks, *kept)))


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


def _encoder_masks(module: nn.Module) -> tuple[str, ...]:
    """The arguments that are masks; an `attn_mask` of torch's own modules says which tokens do not count."""
    return ("attention_mask", "attn_mask") if type(module).__module__.startswith("timm.") else ("attention_mask",)


def _takes_mask(module: nn.Module, model: type[ModelHooks]) -> bool:
    """Whether a module inside a model is no adapted layer and is called with an attention mask of whatever form."""
    names = MASKS if model is DenoiserHooks else _encoder_masks(module)
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
