"""An adapter that runs in parallel to a whole module, such as the MLP of a transformer layer."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lily.errors import LilyError
from lily.layers.layer import LilyLayer


class ParallelModule(LilyLayer):
    """Any module with a parallel update: `module(x) + scaling * mix(act(x @ A.T), p, B)`.

    The paper's VTAB experiments adapt each MLP in this way, with ReLU.

    Args:
        base_layer: the module; its first output has the leading dimensions of its input.
        bank: the shared tensors.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, with the update added to the first tensor of it."""
        adapters = self.acting()
        out = self.base_layer(*args, **kwargs)
        if not adapters:
            return out
        x = args[0] if args else kwargs[next(iter(kwargs))]
        result = cast(Tensor, out[0] if isinstance(out, tuple) else out)
        self._check_shapes(adapters[0], x, result)
        x = x.to(result.device)  # accelerate may run a module on another device than its input's
        for adapter in adapters:
            result = self._plus_update(result, x, adapter)
        return (result, *out[1:]) if isinstance(out, tuple) else result

    def _check_shapes(self, adapter: str, x: Any, result: Any) -> None:
        fixed = self._fixed(adapter)
        A, B = self.tensors_of(adapter) if fixed is None else (fixed.A, fixed.B)
        fits = isinstance(x, Tensor) and isinstance(result, Tensor) and x.shape[:-1] == result.shape[:-1]
        if not fits or (x.shape[-1], result.shape[-1]) != (A.shape[-1], B.shape[-1]):
            shapes = [str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in (x, result)]
            raise LilyError(
                f"a {type(self.base_layer).__name__} cannot have a parallel adapter: its input and output are "
                f"{' and '.join(shapes)}, expected (..., {A.shape[-1]}) and (..., {B.shape[-1]}); remove it "
                "from parallel_modules"
            )

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        like = next(self.base.parameters())
        dtype = like.dtype if like.is_floating_point() else None
        self._move_own(adapter_name, device or like.device, dtype)

    @property
    def adapted_weight(self) -> Any:
        """None: the update belongs to no weight."""
        return None

    def check_merge(self, adapter: str, safe_merge: bool = False) -> None:
        """Always refuse: see `LilyLayer.check_merge`.

        Raises:
            LilyError: always.
        """
        raise LilyError(
            f"adapter {adapter!r} runs in parallel to a {type(self.base_layer).__name__} (parallel_modules) and "
            "belongs to no weight, so it cannot be merged; use it unmerged"
        )
