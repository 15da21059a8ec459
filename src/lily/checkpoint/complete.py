"""Is an adapter's file complete? Checked at every save: a tensor under an unknown name would be left out in silence."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from lily.errors import LilyError
from lily.io.words import some
from lily.layers.find import names_of_parameters

# A tensor that PEFT or Lily trains for one adapter.
OWN = re.compile(
    r"\.(?P<part>lily_(?!bank)[A-Za-z_]+|modules_to_save|trainable_tokens_delta)\.(?P<adapter>[^.]+)(\.|$)"
)


def check_complete(model: nn.Module, configs: Mapping[str, Any], adapter: str, saved: Collection[str]) -> None:
    """Refuse a file without a tensor of the adapter, and warn of base weights that train without being saved.

    Args:
        model: the model with the adapter, whose modules have their plain names.
        configs: adapter -> configuration, of all adapters of the model.
        adapter: the saved one.
        saved: names in the model's state dict of the tensors that the file will hold.

    Raises:
        LilyError: naming the tensors that the file would lack, and the fix.
    """
    lost = [tied for tied in names_of_parameters(model).values() if not any(name in saved for name in tied)]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    routers_unused = getattr(configs[adapter], "settled", None) == 1
    missing, base = [], []
    for name, *_ in lost:
        own = OWN.search(f".{name}")
        if own is None:
            if name in trainable:
                base.append(name)
        elif own["adapter"] == adapter and not (routers_unused and own["part"] == "lily_router"):
            missing.append(name)
    if missing:
        raise LilyError(
            f"the file of adapter {adapter!r} would lack {len(missing)} of its tensors, which nothing could restore: "
            f"{some(missing)}. Either the state_dict that was given lacks them, or a module around them was replaced "
            "or wrapped after the adapter was added, so that their names changed: wrap before get_peft_model, or take "
            "the wrapper out before saving"
        )
    biases = any(getattr(config, "bias", "none") != "none" for config in configs.values())
    if base := [name for name in base if not (biases and name.endswith(".bias"))]:
        warnings.warn(
            f"tensors of the base model are trainable, but no part of adapter {adapter!r}, so its file does not hold "
            f"them ({len(base)}: {some(base)}). Name their modules in modules_to_save, or freeze them; or save the "
            "base model too",
            stacklevel=4,
        )
