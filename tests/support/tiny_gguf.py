"""Tiny transformers models as float32 GGUF files: llama.cpp and transformers compared without a download.

Whether a family's q and k rows are reordered here is not taken from the package: llama.cpp decides, since a wrong order
gives other logits.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 96
CHAT = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
# What differs from COMMON.
OPTIONS: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "smollm3": {"no_rope_layers": [1, 1, 1], "no_rope_layer_interval": 4},
    "granite": {
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 1.5,
    },
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 32, "tie_word_embeddings": True, "query_pre_attn_scalar": 32, "sliding_window": 128},
    "gemma3_text": {"head_dim": 32, "tie_word_embeddings": True, "query_pre_attn_scalar": 32, "sliding_window": 128},
    "phi3": {},
}


def tiny(family: str) -> nn.Module:
    """A random model in eval mode whose attention is far from uniform, so that a wrong order of channels shows.

    Its embeddings are small, or tied ones would make every model repeat its last token.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **OPTIONS[family]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.normal_(0, 0.05 if "embed" in name or "lm_head" in name else 1.5 / p.shape[1] ** 0.5)
            elif name == "model.norm.weight":
                p.fill_(6.0)
            elif name.endswith("bias"):
                p.normal_(0, 0.1)
    return model


def write_base(model: nn.Module, file: Path, architecture: str, reorders: bool) -> None:
    """Write a model as GGUF."""
    c = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type("model")
    writer.add_name("tiny")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(_theta(c))
    writer.add_vocab_size(c.vocab_size)
    _add_special(writer, c)
    _add_vocabulary(writer)
    names = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture), c.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        if architecture.startswith("gemma") and new.endswith("norm.weight"):
            tensor = tensor + 1
        if reorders and ("q_proj" in name or "k_proj" in name):
            heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(new, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _theta(config) -> float:
    rope = config.rope_parameters
    return float((rope.get("full_attention") or rope)["rope_theta"])


def _add_special(writer: gguf.GGUFWriter, c) -> None:
    if c.model_type == "granite":
        writer.add_attention_scale(c.attention_multiplier)
        writer.add_embedding_scale(c.embedding_multiplier)
        writer.add_residual_scale(c.residual_multiplier)
        writer.add_logit_scale(c.logits_scaling)
    if c.model_type == "gemma2":
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if c.model_type in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(c.sliding_window)
    if c.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(c.max_position_embeddings)


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """A vocabulary of single characters, of which the first is the space, and a chat template of them."""
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (VOCAB - 3)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<pad>", "<s>", "</s>", "\u0120", "\u0120!", *(chr(33 + i) for i in range(VOCAB - 5))])
    writer.add_token_types(kinds)
    writer.add_token_merges(["\u0120 !"])
    writer.add_chat_template(CHAT)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
