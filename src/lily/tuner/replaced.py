"""Drop an adapter before another one of its name is added: PEFT would leave it on layers that the new one lacks."""

from __future__ import annotations

import warnings

from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn

from lily.layers.bank import BANK, LilyBank
from lily.layers.layer import LilyLayer
from lily.tuner.removal import unwrap_saved


def drop_replaced(model: nn.Module, adapter: str) -> None:
    """Drop the adapter of that name, if there is one, and what it trains beside its layers, and warn.

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
    bank.stop_waiting(adapter)
    for layer in (m for m in model.modules() if isinstance(m, (LilyLayer, LilyBank))):
        if adapter in layer.merged_adapters:
            layer.unmerge()
        for own in (getattr(layer, name) for name in (*layer.adapter_layer_names, *layer.other_param_names)):
            if adapter in own:
                del own[adapter]
    wrappers = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    for wrapper in wrappers:  # all before a deletion: tied layers have one set of rows
        if isinstance(wrapper, TrainableTokensWrapper) and adapter in wrapper.token_adapter.merged_adapters:
            wrapper.token_adapter.unmerge()
    for wrapper in wrappers:
        if adapter in wrapper._adapters:
            wrapper.delete_adapter(adapter, [name for name in wrapper.active_adapters if name != adapter])
    unwrap_saved(model)
