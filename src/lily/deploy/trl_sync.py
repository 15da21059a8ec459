"""What TRL's asynchronous trainers send to vLLM instead of merged weights: the plain LoRA that a static adapter is.

`lily._after_import` calls these where TRL's own functions would read LoRA's tensors from the model.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from torch import nn

from lily.deploy.lora import as_lora
from lily.deploy.write import write_lora


def sync_config(model: nn.Module) -> LoraConfig:
    """`validate_lora_for_vllm_sync` of TRL for a Lily adapter: the configuration of the LoRA that vLLM gets.

    Args:
        model: a `PeftModel`, of which one adapter is active.

    Raises:
        LilyError: (a ValueError, with which TRL merges instead) if the adapter depends on the data, or vLLM cannot read
            a part of it.
    """
    return as_lora(model, target="vllm").config


def save_for_sync(model: nn.Module, accelerator: Any, adapter_name: str, dest_dir: str) -> None:
    """`save_lora_adapter` of TRL for a Lily adapter, whose arguments these are: publish it as a LoRA, atomically.

    Raises:
        LilyError: as `sync_config`; also if the adapter is sharded.
    """
    lora = as_lora(model, adapter=adapter_name, target="vllm")  # in all processes: all fail, or none
    if accelerator.is_main_process:
        write_lora(lora, dest_dir, overwrite=True)
