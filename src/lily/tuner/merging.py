"""Merging the static adapters of a model into its base weights, or refusing it before any weight is changed.

`lily.layers.merging` merges one layer.
"""

from __future__ import annotations

import contextlib
import warnings

from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils.other import TrainableTokensWrapper
from torch import nn

from lily.errors import LilyError
from lily.layers.find import names_of_parameters
from lily.layers.layer import LilyLayer
from lily.plan.wrappers import plain_names
from lily.tuner.removal import remove_if_empty

# Merging warns if rounding to the base weight's precision loses more than this share of an update's norm.
REPORTED_ROUNDING = 0.01


class ModelMergingMixin(BaseTuner):  # type: ignore[misc]
    """The part of `LilyModel` that merges."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge static adapters into the base weights; `unmerge_adapter` restores every bit. See PEFT.

        Raises:
            LilyError: if a layer cannot be merged; no layer is then.
        """
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)
        _report_rounding(self.model)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        for name in adapter_names or ():
            if name not in self.peft_config:  # PEFT merges nothing, in silence
                raise LilyError(f"cannot merge adapter {name!r}; the model has {', '.join(self.peft_config) or 'none'}")
        names = names_of_parameters(self.model)
        wrappers = [m for m in self.model.modules() if isinstance(m, TrainableTokensWrapper)]
        for rows in (w.token_adapter for w in wrappers if not w.token_adapter.tied_adapter):
            tied = names.get(id(rows.get_base_layer().weight), [])
            if len(tied) > 1 + sum(w.token_adapter.tied_adapter is rows for w in wrappers):
                raise LilyError(
                    f"{' and '.join(tied)} are one tensor, so merging the trained rows of one would change the other; "
                    "untie them first, or train the same rows of both (trainable_token_indices as a list)"
                )
        for layer in self.model.modules():
            if not isinstance(layer, LilyLayer):
                continue
            for adapter in layer.active_adapters if adapter_names is None else adapter_names:
                if adapter in layer.settings and adapter not in layer.merged_adapters:
                    # only the safe check needs the values, and so reads offloaded weights
                    with onload_layer(layer) if safe_merge else contextlib.nullcontext():
                        layer.check_merge(adapter, safe_merge)
                    tied = names.get(id(layer.whole_weight), [])
                    if len(tied) > 1:
                        raise LilyError(
                            f"{' and '.join(tied)} are one tensor, so merging into one would change the other; untie "
                            "them first (load the base with tie_word_embeddings=False and copy the weight)"
                        )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = [m for m in self.model.modules() if isinstance(m, LilyLayer)]
        if merge:
            self._check_merge(adapter_names, safe_merge)
        with plain_names(self):
            super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if merge:
            _report_rounding(nn.ModuleList(layers))
        remove_if_empty(self.model)
        return self.model  # type: ignore[no-any-return]


def _report_rounding(model: nn.Module) -> None:
    errors = [e for m in model.modules() if isinstance(m, LilyLayer) for e in m.rounding.values()]
    if errors and max(errors) > REPORTED_ROUNDING:
        warnings.warn(
            f"merging rounded the updates by {sum(errors) / len(errors):.1%} on average and {max(errors):.1%} at worst "
            "(share of the update's norm), because the base weights are of low precision; the adapter unmerged, or "
            "merged into float32 weights, is more exact",
            stacklevel=3,
        )
