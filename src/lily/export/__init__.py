"""Export: a static adapter as a plain LoRA, a merged model, or a stock Lily adapter."""

from lily.export.folders import write_lora, write_merged, write_stock
from lily.export.lora import TOLERANCE, Layer, LoraExport, as_lora, lora_entries
from lily.export.origin import PROVENANCE, provenance
from lily.export.readers import TARGETS, VLLM_RANKS

__all__ = [
    "PROVENANCE",
    "TARGETS",
    "TOLERANCE",
    "VLLM_RANKS",
    "Layer",
    "LoraExport",
    "as_lora",
    "lora_entries",
    "provenance",
    "write_lora",
    "write_merged",
    "write_stock",
]
