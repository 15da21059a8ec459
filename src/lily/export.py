"""Export: a static adapter as a plain LoRA, a merged model, or a stock Lily adapter."""

from lily.deploy.intruders import reduce_intruder_dimension
from lily.deploy.lora import TOLERANCE, LoraExport, as_lora, lora_entries
from lily.deploy.lora_layer import Layer
from lily.deploy.provenance import PROVENANCE, provenance
from lily.deploy.readers import TARGETS, VLLM_RANKS
from lily.deploy.write import write_lora, write_merged, write_stock

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
    "reduce_intruder_dimension",
    "write_lora",
    "write_merged",
    "write_stock",
]
