"""Find the adapted layers and the tied parameters of a model; what is done to all layers at once."""

from __future__ import annotations

from torch import nn

from lily.layers.bank import bank_of
from lily.layers.layer import LilyLayer
from lily.plan.wrappers import plain_name


def layers_of(root: nn.Module) -> dict[str, LilyLayer]:
    """All adapted layers of a model, by their names in plans."""
    plain = plain_name(root)
    modules = ((plain(path), module) for path, module in root.named_modules() if isinstance(module, LilyLayer))
    return {layer.name_in_plan(path): layer for path, layer in modules}


def refill(model: nn.Module, adapter: str) -> None:
    """Bring the fixed shapes of an adapter up to date, after its tensors have changed; see `LilyLayer.refill`."""
    for layer in (module for module in model.modules() if isinstance(module, LilyLayer)):
        layer.refill(adapter)


def names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Identity (`id`) of each parameter -> its names in the model: several for one that modules share."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return names


def masked_layers(model: nn.Module) -> list[str]:
    """The layers that use attention masks now."""
    return [name for name, m in model.named_modules() if isinstance(m, LilyLayer) and _uses_masks(m)]


def _uses_masks(layer: LilyLayer) -> bool:
    fixed = any(f.shape.routing == "sequence" for f in layer.fixed_shapes.values())
    return bool(layer.statistics) or layer.routes_by_sequence or fixed


def watch_masks(model: nn.Module) -> None:
    """Record attention masks for the layers that use them now.

    Args:
        model: the root that holds the bank.
    """
    bank_of(model).watch(model, masked_layers(model))
