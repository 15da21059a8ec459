"""The bank: every tensor that layers share, stored once, at the root of the adapted model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lily.layers.attention_masks import MaskTracker
from lily.layers.devices import Placement
from lily.layers.mask_hooks import watch
from lily.layers.starts import kaiming, orthonormal
from lily.plan.sharing_plan import Group, SharingPlan, Slot
from lily.plan.specs import EMBEDDING
from lily.plan.wrappers import innermost

BANK = "lily_bank"


class Settled:
    """The interpolation between the data-dependent weights of an adapter and each layer's static ones.

    Args:
        share: of the static weights, 0 to 1.

    Attributes:
        begun: whether the share is above 0.
        done: whether it is 1, so that the weights no longer depend on the data.
    """

    def __init__(self, share: float) -> None:
        # A tensor, so that a compiled layer is not recompiled at every step.
        self._share = torch.tensor(share, dtype=torch.float64)
        self.move(share)

    def move(self, share: float) -> None:
        """Set the share."""
        self._share.fill_(share)
        self.begun, self.done = share > 0, share >= 1

    def blend(self, dynamic: Tensor, static: Tensor) -> Tensor:
        """Interpolate `dynamic` (..., E) and `static` (E,): the weights in use."""
        return torch.lerp(dynamic, static.expand_as(dynamic), self._share.to(dynamic))


class LilyBank(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """Every A and B of every adapter, and the plan that assigns them to layers.

    A `BaseTunerLayer` without a base layer, because PEFT, transformers and diffusers switch, freeze, cast and delete
    adapters layer by layer, and must do so with the shared tensors too.

    Attributes:
        lily_A: adapter -> list of A, each (r, in), numbered as `SharingPlan.blocks`; for stacked experts one tensor of
            all their A, (A * r, in).
        lily_B: adapter -> list of B, each (experts * r, out), one per group; stock PEFT's layout. A convolution with
            groups has (experts * r / groups, out).
        lily_R: adapter -> number of the group -> router R (experts, r), where a group's layers share one.
        plans: adapter -> its sharing plan.
        placements: adapter -> device and dtype of each A and B, those of the first layer that uses it.
        settled: adapter -> how far its routing has settled; absent if it is not settling.
        awaiting: adapter -> the hook that warns if it trains without its start from data (`init_weights="data"`).
        masks: the attention masks for `sequence` routing.
        arrived: tensors by name that are being loaded into a model that accelerate spreads over devices; empty after.
    """

    # PEFT reads these of every tuner layer's base layer; the bank has none.
    weight = None
    bias = None

    cast_input_dtype_enabled = True  # as the layers have it
    adapter_layer_names: tuple[str, ...] = ("lily_A", "lily_B", "lily_R")
    other_param_names: tuple[str, ...] = ("plans", "placements", "settled", "awaiting")

    if TYPE_CHECKING:  # BaseTunerLayer's own, which has no types

        def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
            """Switch and freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.lily_A = nn.ModuleDict({})
        self.lily_B = nn.ModuleDict({})
        self.lily_R = nn.ModuleDict({})
        self.plans: dict[str, SharingPlan] = {}
        self.placements: dict[str, tuple[list[Placement], list[Placement]]] = {}
        self.settled: dict[str, Settled] = {}
        self.awaiting: dict[str, Any] = {}
        self.masks = MaskTracker()
        self.arrived: dict[str, Tensor] = {}
        self.watching: list[Any] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []

    def add(
        self,
        adapter: str,
        plan: SharingPlan,
        placements: Mapping[str, Placement],
        init_weights: bool | str | None,
        activations: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Create the tensors of a plan, initialized by `first_values`.

        Args:
            adapter: its name; an adapter of that name is replaced.
            plan: the sharing plan.
            placements: device and dtype by layer.
            init_weights: as in `LilyConfig`; None: whatever is in memory, because values follow.
            activations: group -> activation between its A and B; default: none.
        """
        self.plans[adapter] = plan
        starts = {g.name: first_values(g, init_weights, activations.get(g.name, "none")) for g in plan.groups}
        on_A, on_B = [placements[b[0]] for _, b in plan.blocks], [placements[g.layers[0]] for g in plan.groups]
        self.placements[adapter] = (on_A, on_B)
        self.lily_A[adapter] = nn.ParameterList(
            _shared(group.rows_A, group.in_features, placement, starts[group.name][0])
            for (group, _), placement in zip(plan.blocks, on_A, strict=True)
        )
        self.lily_B[adapter] = nn.ParameterList(
            _shared(g.rows_B, g.out_features, placement, starts[g.name][1])
            for g, placement in zip(plan.groups, on_B, strict=True)
        )
        if adapter in self.lily_R:
            del self.lily_R[adapter]
        if plan.shared_router:
            routers = {
                str(i): _shared(g.num_B, g.r, placement, kaiming)
                for i, (g, placement) in enumerate(zip(plan.groups, on_B, strict=True))
                if g.num_B > 1
            }
            self.lily_R[adapter] = nn.ParameterDict(routers)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. See PEFT."""
        self.stop_waiting(adapter_name)
        super().delete_adapter(adapter_name)

    def stop_waiting(self, adapter: str) -> bool:
        """Stop waiting for the start from data, if an adapter does; returns whether it did."""
        waiting = self.awaiting.pop(adapter, None)
        if waiting is not None:
            waiting.handle.remove()
        return waiting is not None

    def tensors(self, adapter: str) -> tuple[nn.ParameterList, nn.ParameterList]:
        """The A and the B of an adapter, in the plan's order. Do not cache them: sharding replaces the parameters."""
        return cast(nn.ParameterList, self.lily_A[adapter]), cast(nn.ParameterList, self.lily_B[adapter])

    def pair(self, adapter: str, slot: Slot) -> tuple[Tensor, Tensor]:
        """One layer's A and B; called in each forward, so it must be fast."""
        (tensors_A, tensors_B), (a, b) = self.tensors(adapter), (str(slot.A), str(slot.B))
        # Indexing a ParameterList takes longer than a small matrix product. Subscripts and not get(): DeepSpeed's
        # ZeRO-3 replaces the dictionary, and its subscript gathers a parameter that another module owns. FSDP1 replaces
        # a parameter by a plain tensor, which is an attribute.
        of_A, of_B = tensors_A._parameters, tensors_B._parameters
        A = of_A[a] if a in of_A else getattr(tensors_A, a)
        B = of_B[b] if b in of_B else getattr(tensors_B, b)
        return cast(Tensor, A), cast(Tensor, B)

    def router(self, adapter: str, slot: Slot) -> Tensor:
        """The router R (experts, r) that the layers of a group share."""
        return getattr(self.lily_R[adapter], str(slot.B))  # type: ignore[no-any-return]

    def watch(self, model: nn.Module, layers: list[str]) -> None:
        """Record the attention masks of `model`'s forwards for `layers`; with no layers, stop recording."""
        for handle in self.watching:
            handle.remove()
        self.watching = watch(model, layers, self.masks) if layers else []

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`: a root that calls all its children in turn (`nn.Sequential`) calls the bank too."""
        return x

    def get_base_layer(self) -> nn.Module:
        """Itself: the bank wraps nothing."""
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.plans:
            return
        (on_A, on_B), holders = self.placements[adapter_name], (self.lily_A, self.lily_B, self.lily_R)
        for holder, placements in zip(holders, (on_A, on_B, on_B), strict=True):
            own = holder[adapter_name]._parameters if adapter_name in holder else {}
            for number, tensor in own.items():
                home, dtype = placements[int(number)]
                if tensor is not None and tensor.device.type != "meta":
                    own[number] = nn.Parameter(tensor.to(device or home, dtype), tensor.requires_grad)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the layers decide; `lily.tuner.to_lora` makes PEFT's conversion skip the bank."""
        return True

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Empty: the bank adds nothing."""
        return torch.zeros(0, 0)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to do: layers merge."""

    def unmerge(self) -> None:
        """Nothing to do: layers unmerge."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """Nothing to do: layers have the scales. So for the next two."""

    def scale_layer(self, scale: float) -> None:
        """Nothing to do."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """Nothing to do."""

    def __repr__(self) -> str:
        return f"lily.LilyBank({', '.join(self.plans)})"


def banks_in(model: nn.Module) -> list[tuple[nn.Module, LilyBank]]:
    """Every bank inside a model, after the module that it belongs to."""
    banks = [(path, module) for path, module in model.named_modules() if isinstance(module, LilyBank)]
    return [(model.get_submodule(path.removesuffix(BANK).rstrip(".")), bank) for path, bank in banks]


def bank_of(model: nn.Module) -> LilyBank:
    """The bank of an adapted model.

    Raises:
        AttributeError: if the model carries no Lily adapter.
    """
    bank = getattr(innermost(model), BANK)
    assert isinstance(bank, LilyBank)
    return bank


Fill = Callable[[Tensor], Tensor]


def first_values(
    group: Group, init_weights: bool | str | None, activation: str, rank: int | None = None
) -> tuple[Fill, Fill]:
    """Initializers of the A and the B of a group: by default A Kaiming-uniform and B zero, so that the update is zero.

    An embedding has A zero and B standard normal, as in LoRA: A has a column for every row of the embedding, and rows
    that training never looks up must not change with B. (With ReLU, whose gradient at zero is zero, such an A would
    never learn.)

    Args:
        group: the group.
        init_weights: as in `LilyConfig`; with `data`, A is Kaiming-uniform until the data have been seen. None: as they
            are.
        activation: between A and B.
        rank: rows of one A; default: the group's.
    """
    if init_weights is None:
        return _unchanged, _unchanged
    if not init_weights:
        return kaiming, kaiming
    if group.kind == EMBEDDING and activation != "relu":
        return nn.init.zeros_, nn.init.normal_
    start_A = partial(orthonormal, rank=rank or group.r) if init_weights == "orthonormal" else kaiming
    return start_A, nn.init.zeros_


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _shared(rows: int, columns: int, placement: Placement, fill: Fill) -> nn.Parameter:
    device, dtype = placement
    return nn.Parameter(fill(torch.empty(rows, columns)).to(device, dtype))
