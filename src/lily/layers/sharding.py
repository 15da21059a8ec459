"""Processes, and parameters that are sharded among them: gather the whole tensor and write it back.

FSDP2 replaces a parameter by a DTensor, FSDP1 by a flat shard of its values (or an empty one), DeepSpeed's ZeRO-3 by an
empty tensor that stores the shape.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def from_first(value: Any) -> Any:
    """Broadcast `value`, which can be pickled, from the first process to all."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def is_partitioned(p: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 shards the tensor."""
    return hasattr(p, "ds_id")


def is_flat(p: Tensor) -> bool:
    """Whether FSDP1 shards the tensor; its shape is then meaningless."""
    return getattr(p, "_fsdp_flattened", False)


def is_sharded(p: Tensor) -> bool:
    """Whether an engine shards the tensor."""
    return isinstance(p, DTensor) or is_flat(p) or is_partitioned(p)


def is_here(t: Tensor) -> bool:
    """Whether a tensor of two or more dimensions is whole in this process now."""
    return not isinstance(t, DTensor) and t.ndim >= 2


def shape_of(p: Tensor) -> torch.Size:
    """The whole tensor's shape."""
    shape: torch.Size = p.ds_shape if is_partitioned(p) else p.shape  # type: ignore[attr-defined]
    return shape


def whole(p: Tensor) -> Tensor:
    """The whole tensor; under FSDP2 a collective operation, under ZeRO-3 and FSDP1 within `units` only."""
    if isinstance(p, DTensor):
        # with CPU offload the shards are on a device that the process group may not support
        on_device: Any = p.to(p.device_mesh.device_type)
        return cast(Tensor, on_device.full_tensor())
    return p


def put(p: Tensor, value: Tensor) -> None:
    """Write a whole tensor, the same in all processes, into a parameter: the inverse of `whole`."""
    if isinstance(p, DTensor):
        on_device = value.to(p.device_mesh.device_type, p.dtype)
        p.copy_(distribute_tensor(on_device, p.device_mesh, p.placements))
    else:
        p.copy_(value)


def engine_in(model: nn.Module) -> str | None:
    """The class of an engine in the model that averages the gradients of several processes; None: there is none."""
    if world_size() == 1:
        return None
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    kinds = (nn.parallel.DistributedDataParallel, FullyShardedDataParallel, FSDPModule)
    return next((type(m).__name__ for m in model.modules() if isinstance(m, kinds)), None)


def reshard(model: nn.Module) -> None:
    """Reshard FSDP2's parameters; a forward without backward leaves those of the root whole."""
    if dist.is_available():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@contextlib.contextmanager
def root_gathered(model: nn.Module) -> Iterator[None]:
    """Within, a method other than forward, such as `generate`, can be called on a model under FSDP1.

    For FSDP2, transformers registers such methods.
    """
    if _fsdp1_units(model)[:1] == [model]:
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(model, recurse=False, writeback=False):
            yield
    else:
        yield


def units(model: nn.Module, wanted: Iterable[str], change: bool) -> Iterator[dict[str, Tensor]]:
    """Iterate over groups of named parameters within which `whole` and `put` work. All processes must iterate together.

    Args:
        model: as its engine wrapped it.
        wanted: names as in `model.named_parameters()`.
        change: whether the caller changes them.
    """
    names = set(wanted)
    parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if name in names}
    flat = _fsdp1_units(model)
    if flat:
        from torch.distributed.fsdp import FullyShardedDataParallel

        for unit in flat:
            own = {id(p) for module in _modules_of(unit, flat) for p in module.parameters(recurse=False)}
            with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=change):
                yield {name: p for name, p in parameters.items() if id(p) in own}
    elif any(is_partitioned(p) for p in parameters.values()):
        zero: Any = importlib.import_module("deepspeed").zero
        with zero.GatheredParameters(list(parameters.values()), modifier_rank=0 if change else None):
            yield parameters
    else:
        yield parameters


class _Sum(torch.autograd.Function):
    """The sum over all processes; the gradient is summed over all processes, too."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        t = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(t)
        return t

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _sum_of_all(grad)


def _sum_of_all(t: Tensor) -> Tensor:
    summed: Tensor = _Sum.apply(t)  # type: ignore[no-untyped-call]
    return summed


def mean_of_all(p: Tensor) -> Tensor:
    """The mean over all rows of all processes, which must all call this; differentiable.

    Args:
        p: (..., E); the number of rows may differ between processes.

    Returns:
        (E,), the same in all processes.
    """
    rows = p.reshape(-1, p.shape[-1])
    if not (dist.is_available() and dist.is_initialized()):
        return rows.mean(dim=0)
    wide = torch.promote_types(p.dtype, torch.float32)
    sums = torch.cat([rows.sum(dim=0, dtype=wide), rows.new_tensor([rows.shape[0]], dtype=wide)])
    total = _sum_of_all(sums)
    return (total[:-1] / total[-1].detach()).to(p.dtype)


def _fsdp1_units(model: nn.Module) -> list[nn.Module]:
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel

    return [m for m in model.modules() if isinstance(m, FullyShardedDataParallel)]


def _modules_of(unit: nn.Module, others: list[nn.Module]) -> Iterator[nn.Module]:
    """The modules whose parameters belong to this unit: below it, but not below another unit inside it."""
    stack = list(unit.children())
    while stack:
        module = stack.pop()
        if not any(module is other for other in others):
            yield module
            stack.extend(module.children())
