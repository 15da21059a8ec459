"""An adapted embedding."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from lily import functional
from lily.errors import LilyError
from lily.layers.bank import LilyBank
from lily.layers.layer import LilyLayer


class Embedding(LilyLayer):
    """An adapted `nn.Embedding`: A has a column for each of its rows.

    Args:
        base_layer: the frozen layer.
        bank: the shared tensors.
    """

    def __init__(self, base_layer: nn.Module, bank: LilyBank) -> None:
        super().__init__(base_layer, bank)
        self.transposed = True  # its weight is (rows, out), and A sees rows

    @property
    def _table(self) -> nn.Embedding:
        return cast(nn.Embedding, self.base)

    def _down(self, x: Tensor, A: Tensor) -> Tensor:
        return functional.down_embedding(x, A, self._table)

    def inputs_of_A(self, x: Tensor) -> Tensor | None:
        """None: ids are no vectors."""
        return None

    def _out(self, update: Tensor, x: Tensor) -> Tensor:
        scale = self._get_embed_scale()  # type: ignore[operator]  # Gemma scales the looked-up rows
        return update if scale is None else update * scale.to(update)

    def _mask(self, x: Tensor, h: Tensor) -> Tensor | None:
        return self.bank.masks.mask_for(h)  # masks are matched by shape, and ids have no feature dimension

    def check_merge(self, adapter: str, safe_merge: bool = False) -> None:
        """See `LilyLayer.check_merge`; refuses `max_norm`, which would clip the sum instead of each part."""
        if self._table.max_norm is not None:
            raise LilyError(
                f"cannot merge into an embedding with max_norm={self._table.max_norm}: it clips the rows that it looks "
                "up, so the merged weight would give other values; use the adapter unmerged, or export a LoRA"
            )
        super().check_merge(adapter, safe_merge)
