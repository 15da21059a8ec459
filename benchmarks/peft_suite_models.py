"""Tiny models in place of those that PEFT's tests load from the hub, in a cache of the hub's layout.

They have the classes of the hub's models and random weights. There is no tokenizer and no finished adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

REVISION = "0" * 40
SIZES: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
T5: dict[str, Any] = {"vocab_size": 1000, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
# Class of the configuration, class of the model, what differs from SIZES, names on the hub.
MODELS: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
    ("OPTConfig", "OPTForCausalLM",
     {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0, "num_hidden_layers": 6}, (
        "peft-internal-testing/tiny-random-OPTForCausalLM", "peft-internal-testing/opt-125m",
        "peft-internal-testing/tiny-random-OPTForCausalLM-extended-vocab")),
    ("LlamaConfig", "LlamaForCausalLM", {}, (
        "trl-internal-testing/tiny-random-LlamaForCausalLM", "peft-internal-testing/tiny-random-LlamaForCausalLM",
        "hf-internal-testing/tiny-random-LlamaForCausalLM")),
    ("MistralConfig", "MistralForCausalLM", {}, ("hf-internal-testing/tiny-random-MistralForCausalLM",)),
    ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}, ("Qwen/Qwen2-0.5B",)),
    ("MixtralConfig", "MixtralForCausalLM", EXPERTS, ("hf-internal-testing/Mixtral-tiny",)),
    ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**EXPERTS, "moe_intermediate_size": 32}, (
        "trl-internal-testing/tiny-Qwen3MoeForCausalLM", "hf-internal-testing/tiny-qwen3-moe")),
    ("GptOssConfig", "GptOssForCausalLM", EXPERTS, ("trl-internal-testing/tiny-GptOssForCausalLM",)),
    ("Llama4TextConfig", "Llama4ForCausalLM", {**EXPERTS, "intermediate_size_mlp": 32},
     ("trl-internal-testing/tiny-Llama4ForCausalLM",)),
    ("Gemma3TextConfig", "Gemma3ForCausalLM", {}, ("hf-internal-testing/tiny-random-Gemma3ForCausalLM",)),
    ("BertConfig", "BertModel", {}, ("peft-internal-testing/tiny-random-BertModel",)),
    ("RobertaConfig", "RobertaForSequenceClassification", {},
     ("peft-internal-testing/tiny-random-RobertaForSequenceClassification",)),
    ("BloomConfig", "BloomForCausalLM", {"n_layer": 2, "n_head": 4},
     ("peft-internal-testing/tiny-random-BloomForCausalLM",)),
    ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4},
     ("peft-internal-testing/tiny-random-gpt2", "hf-internal-testing/tiny-random-gpt2")),
    ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}, ("peft-internal-testing/tiny-random-GPTNeoXForCausalLM",)),
    ("T5Config", "T5ForConditionalGeneration", T5, (
        "peft-internal-testing/tiny-random-t5", "peft-internal-testing/tiny-random-T5ForConditionalGeneration")),
    ("BartConfig", "BartForConditionalGeneration",
     {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
      "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96},
     ("peft-internal-testing/tiny-random-BartForConditionalGeneration",)),
    ("ResNetConfig", "ResNetForImageClassification",
     {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
     ("peft-internal-testing/tiny-random-ResNetForImageClassification",)),
]  # fmt: skip


def make(cache: Path) -> None:
    """Write the models that are not there into `cache`, which is then a `HF_HUB_CACHE`."""
    for config_class, model_class, sizes, names in MODELS:
        for name in names:
            home = cache / f"models--{name.replace('/', '--')}"
            if (home / "refs" / "main").exists():
                continue
            torch.manual_seed(0)
            given = {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **sizes}
            model = getattr(transformers, model_class)(getattr(transformers, config_class)(**given))
            model.save_pretrained(home / "snapshots" / REVISION)
            (home / "refs").mkdir()
            (home / "refs" / "main").write_text(REVISION)
