"""TRL's preference trainers copy a trained adapter as their reference: the first difference to it is exactly zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import VOCAB, build, inputs, predict, randomise
from peft import PeftModel, get_peft_model
from recipes_helpers import tokenizer
from transformers import AutoModelForCausalLM, MixtralConfig
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

from lily import LilyConfig

pytestmark = [pytest.mark.sample(every=10), pytest.mark.filterwarnings("ignore")]

PROMPT, GOOD, BAD = "the film", "was good and fine", "was bad"
PREFERENCES = [
    {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
    {"prompt": "actors so", "chosen": "fine", "rejected": "was very awful"},
]
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


def trained(routing: str | None = None, **options: Any) -> PeftModel:
    config = {"r": 4, "num_A": 2, "num_B": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = randomise(get_peft_model(build("llama"), LilyConfig(**{**config, "routing": routing, **options})))
    for name, p in model.named_parameters():
        if "trainable_tokens" in name:
            torch.nn.init.normal_(p)
    return model


@pytest.mark.parametrize("method", TRAINERS)
def test_the_first_difference_to_the_reference_is_exactly_zero(method, routing, tmp_path):
    log = first_step(method, trained(routing), tmp_path)
    assert {name: log[name] for name in TRAINERS[method][-1]} == dict.fromkeys(TRAINERS[method][-1], 0.0)
    assert log["grad_norm"] > 1e-3


VARIANTS: dict[str, dict[str, Any]] = {
    "shared router": {"routing": "token", "shared_router": True},
    "settling": {"routing": "token", "settled": 0.5},
    "one B": {"num_B": 1},
    "activation": {"routing": "token", "activation": "gelu"},
    "parallel modules": {"routing": "static", "parallel_modules": ["mlp"]},
    "slices": {"routing": "static", "target_slices": {"o_proj": {"low": [0, 16]}}},
    "saved head": {"routing": "static", "modules_to_save": ["lm_head"]},
    "embedding": {"routing": "static", "target_modules": ["embed_tokens", "q_proj"]},
    "trained rows": {"routing": "token", "trainable_token_indices": list(range(VOCAB))},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_equals_every_kind_of_adapter(variant, tmp_path):
    log = first_step("DPO", trained(**VARIANTS[variant]), tmp_path)
    assert (log["rewards/chosen"], log["rewards/rejected"], log["grad_norm"] > 1e-3) == (0.0, 0.0, True)


@pytest.mark.parametrize("method", TRAINERS)
def test_the_reference_equals_adapted_experts(method, tmp_path):
    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=5, num_experts_per_tok=2, vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    lily = LilyConfig(r=2, num_B=2, task_type="CAUSAL_LM", **options)
    log = first_step(method, randomise(get_peft_model(AutoModelForCausalLM.from_config(config), lily)), tmp_path)
    assert {name: log[name] for name in TRAINERS[method][-1]} == dict.fromkeys(TRAINERS[method][-1], 0.0)
    assert log["grad_norm"] > 1e-3


def test_the_policy_leaves_its_reference_and_only_the_policy_is_trained(tmp_path):
    model = trained("static")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}
    first_step("DPO", model, tmp_path)
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], p) for name, p in before.items())
    assert all(torch.equal(after[name.replace(".default.", ".ref.")], p) for name, p in before.items())
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert torch.equal(predict(back, inputs("llama")), predict(model.eval(), inputs("llama")))
