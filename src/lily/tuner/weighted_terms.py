"""The words of `add_weighted_adapter`: what is combined, how, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lily.plan.options import DYNAMIC
from lily.tuner.adapter import Adapted

PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
KINDS = ("cat", "linear", "svd", *PRUNING, *(f"{kind}_svd" for kind in PRUNING))
SIGN_METHODS = ("total", "frequency")


@dataclass(frozen=True)
class How:
    """The options of PEFT's `LoraModel.add_weighted_adapter`, by which adapters are combined."""

    combination_type: str
    svd_rank: int | None
    svd_clamp: float | None
    svd_full_matrices: bool
    svd_driver: str | None
    density: float | None
    majority_sign_method: str


@dataclass(frozen=True)
class Term:
    """An adapter with its weight in a combination."""

    adapted: Adapted
    weight: float

    @property
    def name(self) -> str:
        """Name of the adapter."""
        return self.adapted.name

    @property
    def dynamic(self) -> bool:
        """Whether the weights of some layer's experts depend on the data now."""
        settled = self.adapted.bank.settled.get(self.name)
        settings = [layer.settings[self.name] for layer in self.adapted.layers.values()]
        return not (settled and settled.done) and any(s.num_B > 1 and s.routing in DYNAMIC for s in settings)


@dataclass(frozen=True)
class Shape:
    """What a group of the new adapter needs; see `LilyConfig`."""

    r: int
    num_B: int = 1
    stride_A: int | None = None
    num_A: int | None = None
    own_r: int = 0
    gain: str = "none"
    activation: str = "none"
    dropout: float = 0.0


@dataclass(frozen=True)
class Combined:
    """The content of the new adapter.

    Attributes:
        shapes: one for each group of its layers.
        routing: of all groups.
        shared_router: whether the layers of a group share one.
        state: its tensors by their names in a file.
    """

    shapes: list[Shape]
    routing: str
    state: dict[str, Tensor]
    shared_router: bool = False


class NotSharedError(Exception):
    """No adapter that shares as its terms do equals their sum. The message says why."""
