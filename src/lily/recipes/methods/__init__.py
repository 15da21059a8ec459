"""What does a recipe's method make of the model? Its PEFT configuration, Lily or another."""

from lily.recipes.methods.configs import (
    KEYS,
    LORAS,
    Decided,
    block_of,
    decide,
    learning_rate,
    lily_config,
    lora_targets,
    peft_config,
    saved_heads,
    task_type_of,
)

__all__ = [
    "KEYS",
    "LORAS",
    "Decided",
    "block_of",
    "decide",
    "learning_rate",
    "lily_config",
    "lora_targets",
    "peft_config",
    "saved_heads",
    "task_type_of",
]
