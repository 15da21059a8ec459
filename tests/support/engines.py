"""Models under the engines that share them among processes, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

ENGINES = ("ddp", "fsdp2", "fsdp1")


def wrap(model: nn.Module, engine: str, half: bool = False) -> nn.Module:
    """A PeftModel of a Llama or BERT, under an engine; `half`: computes in bfloat16, where the engine sees to that."""
    blocks = [m for m in model.modules() if type(m).__name__ in ("LlamaDecoderLayer", "BertLayer")]
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if engine == "fsdp1":
        low = MixedPrecision(torch.bfloat16, torch.float32) if half else None
        policy = ModuleWrapPolicy({type(blocks[0])})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"), mixed_precision=low
        )
    how: dict[str, Any] = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))}
    if half:
        how["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in blocks:
        fully_shard(block, **how)
    return fully_shard(model, **how)


def let_accelerate_shard_on_the_cpu() -> None:
    """Without an accelerator, accelerate takes FSDP for DDP; here it must not, since the CPU is all that there is."""
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            # every new AcceleratorState begins with what PartialState holds
            PartialState._shared_state.update(distributed_type=DistributedType.FSDP, device=torch.device("cpu"))
            self.__dict__.update(PartialState._shared_state)
            self.fsdp_plugin = fsdp_plugin
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)

    AcceleratorState.__init__ = init
