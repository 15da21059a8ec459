"""An adapter beside a whole module, such as the MLP of a transformer's block."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lily.errors import LilyError
from lily.layers.layer import LilyLayer


class ParallelModule(LilyLayer):
    """Any module with an update beside it: `module(x) + scaling * mix(act(x @ A.T), p, B)`.

    The paper's VTAB experiments run one with ReLU beside each MLP.

    Args:
        base_layer: the module; what it returns first has the leading dimensions of its input.
        bank: the shared tensors.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module makes of its arguments; the first tensor that it returns has the update in it."""
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
        A, B = self.tensors_of(adapter)
        fits = isinstance(x, Tensor) and isinstance(result, Tensor) and x.shape[:-1] == result.shape[:-1]
        if not fits or (x.shape[-1], result.shape[-1]) != (A.shape[1], B.shape[2]):
            shapes = [str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in (x, result)]
            raise LilyError(
                f"a {type(self.base_layer).__name__} cannot have an adapter beside it: its input and output are "
                f"{' and '.join(shapes)}, expected (..., {A.shape[1]}) and (..., {B.shape[2]}); leave it "
                "out of parallel_modules"
            )

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        like = next(self.base.parameters())
        dtype = like.dtype if like.is_floating_point() else None
        if adapter_name in self.lily_router:
            self.lily_router[adapter_name].to(device or like.device, dtype)
        if adapter_name in self.lily_logits:
            logits = self.lily_logits[adapter_name]
            moved = logits.to(device or like.device, dtype)
            self.lily_logits[adapter_name] = nn.Parameter(moved, requires_grad=logits.requires_grad)

    @property
    def adapted_weight(self) -> Any:
        """None: there is no weight that the update is for."""
        return None

    def check_merge(self, adapter: str, safe_merge: bool = False) -> None:
        """Refused: see `LilyLayer.check_merge`.

        Raises:
            LilyError: always.
        """
        raise LilyError(
            f"adapter {adapter!r} runs beside a {type(self.base_layer).__name__} (parallel_modules), and is no part of "
            "any weight, so it cannot be merged; use it unmerged"
        )
