"""`target_modules` that name experts' projections adapt the parameters that hold them, as for LoRA."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lily import LilyConfig, LilyError
from lily.plan.decide import decide

EXPERTS = {"gate_up_proj", "down_proj"}


def model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
               "decoder_sparse_step": 1, "head_dim": 8}  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=32, num_key_value_heads=2, **sizes, **experts)).eval()


def config(targets, **options) -> LilyConfig:
    return LilyConfig(r=2, num_A=1, num_B=1, target_modules=targets, task_type="CAUSAL_LM", **options)


def adapted(made) -> set[str]:
    """What has an adapter, without the nesting of layers on parts of one module."""
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model.")
        for name, m in get_peft_model(model(), made).named_modules()
        if isinstance(m, BaseTunerLayer) and "lily_bank" not in name
    }


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        ["q_proj", "gate_proj", "up_proj", "down_proj"],
        r".*\.(q_proj|gate_proj|up_proj|down_proj)",
        ["gate"],
    ],
)
def test_what_lora_adapts_is_adapted(targets):
    lora = adapted(LoraConfig(r=2, target_modules=targets))
    assert lora <= adapted(config(targets))


def test_experts_alone_are_adapted_trained_saved_and_loaded(tmp_path):
    made = get_peft_model(model(), config("all-linear"))
    ids = torch.arange(8)[None]
    made(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.requires_grad and ".lily_B." in name:
                p.add_(0.1)
    written = made.peft_config["default"]
    assert set(written.target_parameters) >= EXPERTS
    made.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model(), tmp_path)
    assert torch.allclose(again(ids).logits, made(ids).logits, atol=1e-6)
    assert not torch.allclose(again(ids).logits, model()(ids).logits, atol=1e-3)


def test_an_adapter_of_before_has_what_its_file_names(tmp_path):
    made = get_peft_model(model(), config(["q_proj", "gate_proj", "up_proj", "down_proj"], exclude_modules=["experts"]))
    old = made.peft_config["default"].file_dict() | {"exclude_modules": None, "target_parameters": None}
    again = LilyConfig.from_peft_type(**old)
    assert not any(name.endswith("experts") for name in adapted(again))


def test_exclusions_and_layers_hold_for_experts():
    assert not any("experts" in name for name in adapted(config("all-linear", exclude_modules=r".*\.experts\..*")))
    first = adapted(config(["gate_proj", "up_proj", "down_proj"], layers_to_transform=[0]))
    assert {name for name in first if name.endswith("experts")} == {"model.layers.0.mlp.experts"}


def test_one_of_two_projections_that_are_one_parameter_is_refused():
    with pytest.raises(LilyError, match="gate_proj without also targeting up_proj"):
        get_peft_model(model(), config(["q_proj", "gate_proj"]))


@pytest.mark.parametrize("options", [{"routing": "token"}, {"dropout": 0.1}, {"activation": "relu"}])
def test_options_that_need_hidden_states_leave_the_experts_out_and_say_so(options):
    made = LilyConfig(r=2, num_A=1, num_B=2, target_modules="all-linear", **options)
    with pytest.warns(UserWarning, match=f"{next(iter(options))}=.* so .*gate_up_proj.* are left out"):
        assert not any(name.endswith("experts") for name in adapted(made))


def test_the_plan_says_it():
    decided = decide(model(), {"target_modules": "all-linear"}, {"match_lora": 2})
    assert {group.name.rpartition(".")[2] for group in decided.plan.groups} >= EXPERTS
    assert decided.plan.routing == "static"
    assert "where this model holds the experts" in decided.choice.reason[-1]
