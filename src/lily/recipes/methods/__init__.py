"""From a recipe's method to a PEFT configuration, Lily's or another's."""

from lily.recipes.methods.configs import (
    KEYS,
    LORAS,
    decide,
    learning_rate,
    lily_config,
    peft_config,
    planned_rates,
    section_of,
)

__all__ = [
    "KEYS",
    "LORAS",
    "decide",
    "learning_rate",
    "lily_config",
    "peft_config",
    "planned_rates",
    "section_of",
]
