"""What the base model feeds into its adapted layers: the vectors that each A would multiply."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lily import functional
from lily.errors import LilyError
from lily.layers.find import layers_of
from lily.layers.layer import LilyLayer
from lily.tuner.adapter import Adapted

See = Callable[[str, Tensor], None]


@contextlib.contextmanager
def base_inputs(model: nn.Module, adapted: Adapted, see: See, acting: bool = False) -> Iterator[None]:
    """Within, forwards run the base model in eval mode, without gradients; the random state is restored.

    Args:
        model: the model with the adapter.
        adapted: the adapter whose layers are watched.
        see: called with a layer's name and its inputs (tokens, in), without padding. It is not called for embeddings
            and parameters: see `LilyLayer.inputs_of_A`.
        acting: whether the adapter acts, as it may while its B is zero: mixers call some layers only then (see
            `lily.tuner.call_uncalled`). Otherwise no adapter does.

    Raises:
        LilyError: if an adapter is merged into the base weights.
    """
    modes = {module: module.training for module in model.modules()}
    every = list(layers_of(adapted.root).values())
    switched = [(layer, layer._active_adapter, layer._disable_adapters) for layer in every]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    if merged := sorted({name for layer in every for name in layer.merged_adapters}):
        raise LilyError(f"adapter {merged[0]!r} is merged into the base weights; call unmerge_adapter() first")
    paths = {layer: path for path, layer in adapted.root.named_modules() if isinstance(layer, LilyLayer)}
    handles = [
        layer.register_forward_pre_hook(partial(_look, see, name), with_kwargs=True)
        for name, layer in adapted.layers.items()
    ]
    try:
        model.eval()
        for layer in every:
            layer._active_adapter, layer._disable_adapters = [adapted.name], not acting
        adapted.bank.watch(adapted.root, [paths[layer] for layer in adapted.layers.values()])
        with torch.no_grad(), torch.random.fork_rng(devices):  # a dataloader that shuffles draws, too
            yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, active, disabled in switched:
            layer._active_adapter, layer._disable_adapters = active, disabled
        adapted.watch_masks()
        for module, training in modes.items():
            module.training = training


def _look(see: See, name: str, layer: LilyLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = args[0] if args else next(iter(kwargs.values()))
    rows = layer.inputs_of_A(x)
    if rows is None:
        return
    mask = layer._mask(x, rows)
    if mask is not None:
        counts = mask.any(-1) if functional.is_of_samples(mask, x) else mask != 0
        rows = rows.reshape(*counts.shape, -1, rows.shape[-1])[counts]
    see(name, rows.reshape(-1, rows.shape[-1]).detach())
