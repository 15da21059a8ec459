"""Options of `LoraConfig` that `LilyConfig` does not have, and what does their job."""

from __future__ import annotations

from collections.abc import Iterable

from lily.errors import LilyError

NONE_NEEDED = "none is needed"
ANSWERS = {
    "lora_alpha": "`scaling` is the scale itself, LoRA's lora_alpha / r; the default suits LoRA's learning rate at "
    "lora_alpha = 2 r for every rank, so leave it out, or give scaling=lora_alpha / r",
    "lora_dropout": "use `dropout`, which acts on the hidden state of rank r",
    "use_rslora": f"{NONE_NEEDED}: the default `scaling` falls with the square root of the rank",
    "init_lora_weights": "use `init_weights`: True, False, 'orthonormal', or 'data' for a start from data (as EVA)",
    "eva_config": "use init_weights='data' and lily.initialize_from_data(model, dataloader)",
    "lora_bias": "B has no bias; bias='lily_only' trains those of the adapted layers",
    "alpha_pattern": "use `scaling_pattern`, whose values are scales, LoRA's alpha / r, such as "
    "scaling_pattern={'v_proj': 0.5}",
    "fan_in_fan_out": f"{NONE_NEEDED}: transformers' Conv1D is recognized",
    "use_dora": "Lily has no magnitudes; remove it, or use LoraConfig(use_dora=True)",
    "layer_replication": "layers that share A and B cannot be replicated with separate adapters; replicate the base "
    "model's layers first, then adapt it",
    "loftq_config": "quantize the base model first; see docs/quantization.md",
    "megatron_config": "Megatron's parallel layers are not supported; see docs/distributed.md",
    "megatron_core": "Megatron's parallel layers are not supported; see docs/distributed.md",
}
OTHERS = (
    "alora_invocation_tokens", "arrow_config", "corda_config", "kasa_config", "lora_ga_config", "monteclora_config",
    "qalora_group_size", "runtime_config", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip


def refuse(names: Iterable[str]) -> None:
    """Refuse options of LoRA's alone.

    Raises:
        LilyError: names the first, and the option of Lily that does its job or why there is none.
    """
    for name in names:
        if name in ANSWERS:
            raise LilyError(f"LilyConfig has no {name}: {ANSWERS[name]}")
        if name in OTHERS:
            raise LilyError(f"LilyConfig has no {name}, a variant of LoRA; remove it, or use LoraConfig")
