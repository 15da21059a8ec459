"""TRL's preference trainers copy a trained adapter as their reference: the first difference to it is exactly zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import build, inputs, predict, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from recipes_helpers import tokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
)

from lily import LilyConfig, Settling
from lily.tuner.adapter import find

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT, GOOD, BAD = "the film", "was good and fine", "was bad"
PREFERENCES = [{"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}, {"prompt": PROMPT, "chosen": BAD, "rejected": GOOD}]
LABELED = [
    {"prompt": f"{PROMPT} {word}", "completion": text, "label": text == GOOD}
    for word in ("plot", "actors")
    for text in (GOOD, BAD)
]
# trainer, its configuration, rows, further options of the configuration, metrics that are zero in the first step
TRAINERS: dict[str, tuple[Any, Any, list[dict[str, Any]], dict[str, Any], tuple[str, ...]]] = {
    "DPO": (DPOTrainer, DPOConfig, PREFERENCES, {}, ("rewards/chosen", "rewards/rejected", "rewards/margins")),
    "GRPO": (GRPOTrainer, GRPOConfig, PREFERENCES, {"beta": 0.1, "num_generations": 2}, ("kl",)),
    "KTO": (KTOTrainer, KTOConfig, LABELED, {}, ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl")),
    "RLOO": (RLOOTrainer, RLOOConfig, PREFERENCES, {"beta": 0.1, "num_generations": 2}, ("kl",)),
}
EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def first_step(method: str, model: PeftModel, folder: Path) -> dict[str, float]:
    """The metrics of the first step of a TRL trainer."""
    trainer, configuration, rows, options, _ = TRAINERS[method]
    if "num_generations" in options:
        options = {**options, "max_completion_length": 6, "temperature": 1.0}
    args = configuration(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=1, logging_steps=1, report_to="none",
        save_strategy="no", learning_rate=1e-3, use_cpu=True, bf16=False, gradient_checkpointing=False, **options,
    )  # fmt: skip
    rewards = {"reward_funcs": length} if "num_generations" in options else {}
    torch.manual_seed(0)
    run = trainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(chat=False), **rewards
    )
    run.train()
    return run.state.log_history[0]


def trained(routing: str, **options: Any) -> PeftModel:
    config = {"r": 4, "num_A": 2, "num_B": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return randomise(get_peft_model(build("llama"), LilyConfig(**{**config, "routing": routing, **options})))


@pytest.mark.parametrize("method", TRAINERS)
def test_the_first_difference_to_the_reference_is_exactly_zero(method, routing, tmp_path):
    log = first_step(method, trained(routing), tmp_path)
    assert {name: log[name] for name in TRAINERS[method][-1]} == dict.fromkeys(TRAINERS[method][-1], 0.0)
    assert log["grad_norm"] > 0
