"""Updates as products of thin factors, so that rank and overlap never need a full (out, in) matrix.

With `B_e^T = Q_out C_e` and `A^T = Q_in D` (thin QR, once per shared tensor) an update `s (sum_e w_e B_e)^T A` is
`Q_out (s sum_e w_e C_e) D^T Q_in^T`, so the small matrix in the middle determines the singular value decomposition.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lily import functional
from lily.errors import LilyError
from lily.layers.layer import LilyLayer
from lily.plan.sharing_plan import router_size
from lily.plan.specs import EXPERTS
from lily.plan.wrappers import innermost, plain_name
from lily.tuner.adapter import Adapted, find


@dataclass(frozen=True)
class Mixing:
    """Statistics of a layer's expert weights, on which the rank of its updates depends.

    Attributes:
        mean: mean weights over tokens, (E,).
        second: mean of the outer product of the weights with themselves, (E, E): covariance + mean mean^T.
        source: `static` (constant weights of the adapter), `data` (measured), or `equal` (assumed).
    """

    mean: Tensor
    second: Tensor
    source: str

    @classmethod
    def constant(cls, weights: Tensor) -> Mixing:
        """Weights (E,) that are the same for every token."""
        w = weights.detach().double().cpu()
        return cls(w, torch.outer(w, w), "static")

    @classmethod
    def assumed(cls, experts: int) -> Mixing:
        """The assumption for data-dependent routing without data: each token uses one expert, all equally often.

        The mean weights are equal, and the union is all that the experts can span.
        """
        mean = torch.full((experts,), 1 / experts, dtype=torch.float64)
        return cls(mean, torch.diag(mean), "equal")


@dataclass(frozen=True)
class Factored:
    """A layer's update for any mixing of its experts, in float64.

    Attributes:
        name: name of the layer.
        group: name and shape of its group, whose layers can be compared.
        shared: index of its A; layers with the same index share it.
        out_basis: (out, m), orthonormal columns.
        out_core: (m, E, r), with the scaling: `scaling * B_e^T = out_basis @ out_core[:, e]`.
        in_basis: (in, n), orthonormal columns.
        in_core: (n, r): `A^T = in_basis @ in_core`.
        static: its constant mixing, or None if it depends on the data.
    """

    name: str
    group: str
    shared: int
    out_basis: Tensor
    out_core: Tensor
    in_basis: Tensor
    in_core: Tensor
    static: Mixing | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_basis.shape[0], self.in_basis.shape[0]

    @property
    def r(self) -> int:
        """Rank of the factors."""
        return int(self.in_core.shape[1])

    @property
    def experts(self) -> int:
        """Number of experts."""
        return int(self.out_core.shape[1])

    def core(self, mean: Tensor) -> Tensor:
        """The expected update in the two bases, (m, n)."""
        return torch.einsum("e,mer->mr", mean, self.out_core) @ self.in_core.T

    def union_core(self, second: Tensor) -> Tensor:
        """A (m, k n) matrix with the singular values of all tokens' updates side by side; see `lily.analysis.rank`."""
        values, vectors = torch.linalg.eigh((second + second.T) / 2)
        root = vectors * values.clamp(min=0).sqrt()  # (E, k): root @ root.T = second
        mixed = torch.einsum("ek,mer->kmr", root, self.out_core) @ self.in_core.T  # (k, m, n)
        return mixed.permute(1, 0, 2).flatten(1)


def lily_layers(model: nn.Module, adapter: str | None = None) -> list[Factored]:
    """The layers of a Lily adapter; each of a parameter's stacked experts is one layer.

    Args:
        model: the model with the adapter.
        adapter: name of the adapter; default: the active one.

    Raises:
        LilyError: if there is no such adapter, or its update is not linear.
    """
    adapted = find(model, adapter)
    activations = (layer.settings[adapted.name].activation for layer in adapted.layers.values())
    bent = next((a for a in activations if a != "none"), None)
    if bent is not None:
        raise LilyError(
            f"adapter {adapted.name!r} has activation={bent!r} between A and B, so its update is no "
            "matrix and has no rank; rank is reported only for adapters with activation='none'"
        )
    return list(_lily_layers(adapted))


@torch.no_grad()
def _lily_layers(adapted: Adapted) -> Iterator[Factored]:
    numbers: dict[tuple[int, int], int] = {}
    downs: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
    ups: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
    for name, layer in adapted.layers.items():
        settings = layer.settings[adapted.name]
        A, B = (t.detach().double().cpu() for t in layer.tensors_of(adapted.name))  # (r, in), (E, r, out)
        if layer.conv_groups > 1:
            A, B = _dense(A, B, layer.conv_groups)
        group = adapted.plan.group_of(name)
        title = f"{group.name} ({group.out_features}, {group.in_features})"
        stacked = group.kind == EXPERTS
        for i, member in enumerate(group.members if stacked else (name,)):
            shared = (settings.slot.A, i // group.stride if stacked else 0)
            number = numbers.setdefault(shared, len(numbers))
            up = (settings.slot.B, member if settings.own_r else None)
            if up not in ups:
                basis, core = torch.linalg.qr((B[i] if B.ndim == 4 else B).flatten(0, 1).T)  # (out, m), (m, E r)
                ups[up] = basis, core.unflatten(1, B.shape[-3:-1])
            down = (*shared, None if settings.distinction is None and not settings.own_r else member)
            if down not in downs:
                downs[down] = torch.linalg.qr((A[i] if A.ndim == 3 else A).T)
            out_basis, core = ups[up][0], settings.scaling * ups[up][1]
            yield Factored(member, title, number, out_basis, core, *downs[down], static_mixing(layer, adapted, i))


def _dense(A: Tensor, B: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """A and B of a convolution with groups, as of one without: A (r, groups * in), B (E, r, out), zero elsewhere."""
    diagonal: Any = torch.block_diag
    parts = torch.unflatten(B, 2, (groups, -1)).unbind(2)  # of each group, (E, r / groups, out / groups)
    each = [diagonal(*blocks) for blocks in zip(*parts, strict=True)]
    return diagonal(*torch.unflatten(A, 0, (groups, -1))), torch.stack(each)


def static_mixing(layer: LilyLayer, adapted: Adapted, expert: int = 0) -> Mixing | None:
    """A layer's constant weights, or None if they depend on the data; for stacked experts, those of `expert`."""
    name, settings = adapted.name, layer.settings[adapted.name]
    if router_size(settings.routing, settings.r, settings.num_B) == 0:
        return Mixing.constant(torch.full((settings.num_B,), 1 / settings.num_B))
    settled = adapted.bank.settled.get(name)
    if settings.routing == "static" or (settled is not None and settled.done):
        logits = layer.logits_of(name).detach().double()
        return Mixing.constant(functional.softmax(logits[expert] if logits.ndim == 2 else logits))
    return None


def lora_layers(source: nn.Module | str | Path, adapter: str | None = None) -> list[Factored]:
    """The layers of a LoRA adapter of PEFT.

    Args:
        source: a model with the adapter, or an adapter's folder, which needs no base model.
        adapter: name of the model's adapter; default: the active one.

    Raises:
        LilyError: if there is no LoRA, or its update is not a product of two matrices (DoRA).
    """
    pairs = _lora_of_model(source, adapter) if isinstance(source, nn.Module) else _lora_of_folder(Path(source))
    out = []
    for number, (name, A, B, scale) in enumerate(pairs):
        A, B = (t.detach().double().cpu().flatten(1) for t in (A, B))  # (r, in), (out, r)
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise LilyError(f"{name}: the shapes of lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not match")
        in_basis, in_core = torch.linalg.qr(A.T)
        out_basis, out_core = torch.linalg.qr(B)
        group = f"{name.rpartition('.')[2]} ({B.shape[0]}, {A.shape[1]})"
        core = scale * out_core.unsqueeze(1)
        out.append(Factored(name, group, number, out_basis, core, in_basis, in_core, Mixing.constant(torch.ones(1))))
    if not out:
        raise LilyError(f"{source if not isinstance(source, nn.Module) else type(source).__name__} has no LoRA layer")
    return out


Pair = tuple[str, Tensor, Tensor, float]


def _lora_of_model(model: nn.Module, adapter: str | None) -> Iterator[Pair]:
    model = innermost(model)
    root: Any = innermost(getattr(model, "get_base_model", lambda: model)())
    plain = plain_name(root)
    for name, module in ((plain(name), module) for name, module in root.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        chosen = adapter or next(iter(module.active_adapters), "")
        if chosen in module.lora_A:
            if chosen in getattr(module, "use_dora", {}) and module.use_dora[chosen]:
                raise LilyError(f"{name} is a DoRA layer, whose update is not a product of two thin matrices")
            yield name, module.lora_A[chosen].weight, module.lora_B[chosen].weight, float(module.scaling[chosen])


def _lora_of_folder(folder: Path) -> Iterator[Pair]:
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not (folder / "adapter_config.json").is_file() or not file.is_file():
        raise LilyError(f"{folder} holds no adapter (adapter_config.json and {SAFETENSORS_WEIGHTS_NAME})")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        state = load_file(file)
    except (SafetensorError, json.JSONDecodeError, TypeError, KeyError) as error:
        raise LilyError(f"{folder}: its adapter cannot be read ({error})") from None
    if not isinstance(config, LoraConfig):
        raise LilyError(f"{folder} is a {getattr(config.peft_type, 'value', config.peft_type)} adapter, not a LoRA")
    if config.use_dora:
        raise LilyError(f"{folder} is a DoRA adapter, whose update is not a product of two thin matrices")
    patterns = config.alpha_pattern or {}
    for key, A in state.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        B = state.get(key.replace(".lora_A.", ".lora_B."))
        if B is None:
            raise LilyError(f"{file}: {name} has a lora_A but no lora_B; is the file complete?")
        alpha, rank = float(patterns.get(get_pattern_key(list(patterns), name), config.lora_alpha)), A.shape[0]
        yield name, A, B, alpha / (math.sqrt(rank) if config.use_rslora else rank)


class _InGroup(Protocol):
    @property
    def group(self) -> str: ...


T = TypeVar("T", bound=_InGroup)


def grouped(layers: Iterable[T]) -> dict[str, list[T]]:
    """Group -> its layers (factors, ranks or routings), in order."""
    out: dict[str, list[T]] = {}
    for layer in layers:
        out.setdefault(layer.group, []).append(layer)
    return out
