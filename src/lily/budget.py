"""From a parameter budget to r, num_A and num_B."""

from lily.plan.budget import Choice, choose, equal_lora_rank, lora_compute, lora_parameters, parse_count

__all__ = ["Choice", "choose", "equal_lora_rank", "lora_compute", "lora_parameters", "parse_count"]
