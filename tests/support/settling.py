"""A tiny causal model, rows and training arguments, for the callbacks."""

from __future__ import annotations

import torch
from adapters import config_for
from helpers import build, inputs
from peft import get_peft_model
from transformers import TrainingArguments

ROWS = [{k: v[0] for k, v in inputs("llama", batch=1, tokens=8, seed=s).items()} for s in range(16)]


for row in ROWS:
    row["labels"] = row["input_ids"]


def arguments(folder, **options):
    values = {
        "output_dir": str(folder), "max_steps": 20, "per_device_train_batch_size": 2, "learning_rate": 5e-3,
        "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 0,
        "dataloader_pin_memory": False, "logging_strategy": "no",
    }  # fmt: skip
    return TrainingArguments(**{**values, **options})


def fresh(kind="llama", **options):
    torch.manual_seed(3)
    return get_peft_model(build(kind), config_for(kind, **options))
