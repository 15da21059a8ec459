"""Drop an adapter before another one of its name is added: PEFT would leave it on layers that the new one lacks."""

from __future__ import annotations

import warnings

from torch import nn

from lily.layers.bank import BANK, LilyBank
from lily.layers.layer import LilyLayer


def drop_replaced(model: nn.Module, adapter: str) -> None:
    """Drop the adapter of that name, if there is one, from the bank and every layer, and warn.

    Args:
        model: the root that holds the bank, or a model without adapters.
        adapter: name of the new adapter.
    """
    bank = model._modules.get(BANK)
    if not isinstance(bank, LilyBank) or adapter not in bank.plans:
        return
    warnings.warn(
        f"this model already has an adapter {adapter!r}; its tensors are dropped and the new one takes its place. To "
        "keep both, give the new one another adapter_name; to start from the base model, call unload() first",
        stacklevel=3,
    )
    for layer in (m for m in model.modules() if isinstance(m, (LilyLayer, LilyBank))):
        if adapter in layer.merged_adapters:
            layer.unmerge()
        for own in (getattr(layer, name) for name in (*layer.adapter_layer_names, *layer.other_param_names)):
            if adapter in own:
                del own[adapter]
