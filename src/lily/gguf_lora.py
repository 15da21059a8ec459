"""A LoRA for llama.cpp: `write_gguf`."""

from lily.deploy.gguf import FAMILIES, describe_gguf, halves_to_pairs, write_gguf

__all__ = ["FAMILIES", "describe_gguf", "halves_to_pairs", "write_gguf"]
