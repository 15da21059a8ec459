"""From a recipe's method to a PEFT configuration, Lily's or another's."""

from lily.recipes.methods.configs import (
    HEAD,
    KEYS,
    LORAS,
    decide,
    learning_rate,
    learning_rates,
    lily_config,
    peft_config,
    planned_rates,
    section_of,
)

__all__ = [
    "HEAD",
    "KEYS",
    "LORAS",
    "decide",
    "learning_rate",
    "learning_rates",
    "lily_config",
    "peft_config",
    "planned_rates",
    "section_of",
]
