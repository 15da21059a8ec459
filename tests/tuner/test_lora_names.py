"""What clients and habits know from LoRA: sizes on layers, scales of single layers, tags, keys that fit nothing."""

from __future__ import annotations

import warnings
from dataclasses import fields

import every_kind
import pytest
import torch
from adapters import adapted, config_for
from helpers import build, inputs, predict
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from lily import LilyConfig, LilyError
from lily.layers.find import layers_of

pytestmark = pytest.mark.filterwarnings("ignore:routing=.* on a causal model")


def test_every_option_of_lora_is_an_option_or_answered():
    own = {field.name for field in fields(LilyConfig)}
    for option in (field.name for field in fields(LoraConfig) if field.name not in own):
        with pytest.raises(LilyError, match=f"LilyConfig has no {option}"):
            LilyConfig(**{option: 1})


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv", "embedding"])
def test_layers_have_the_sizes_that_lora_gives_them(kind):
    lora, ours = every_kind.base(), every_kind.base()
    get_peft_model(lora, every_kind.lora_config(kind))
    get_peft_model(ours, every_kind.lily_config(kind))
    expected = {n: (m.in_features, m.out_features) for n, m in lora.named_modules() if isinstance(m, LoraLayer)}
    assert {name: (m.in_features, m.out_features) for name, m in layers_of(ours).items()} == expected


def test_a_scale_for_single_layers_is_loras_alpha_pattern(tmp_path):
    pattern = {r"layers\.1\.self_attn\.q_proj": 3.0, "v_proj": 0.5}
    options = {"routing": "static", "scaling": 2.0, "distinct": "permute", "target_modules": ["q_proj", "v_proj"]}
    model = adapted("llama", scaling_pattern=pattern, **options)
    alpha = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], alpha_pattern={k: 4 * v for k, v in pattern.items()}
    )
    beside = get_peft_model(build("llama"), alpha)
    scales = {
        name: m.scaling["default"] for name, m in beside.base_model.model.named_modules() if isinstance(m, LoraLayer)
    }
    assert {name: layer.scaling["default"] for name, layer in layers_of(model.base_model.model).items()} == scales
    assert len(set(scales.values())) == 3
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(predict(back, inputs("llama")), predict(model, inputs("llama")))
    assert back.peft_config["default"].scaling_pattern == pattern


def test_a_scale_for_a_name_that_no_layer_has_is_refused():
    with pytest.raises(LilyError, match=r"scaling_pattern has the key 'v_prj', .* did you mean v_proj"):
        get_peft_model(build("llama"), config_for("llama", scaling_pattern={"v_prj": 2.0}))


def test_model_cards_have_the_tag(tmp_path):
    model = adapted("llama")
    model.base_model.model.add_model_tags(["mine"])
    model.save_pretrained(tmp_path)
    assert set(ModelCard.load(tmp_path / "README.md").data.tags) >= {"lily", "mine", "transformers"}
    base = model.unload()
    assert base.model_tags == ["mine"]


def test_tensors_for_layers_that_are_not_adapted_are_named():
    state = get_peft_model_state_dict(adapted("llama", target_modules=["q_proj", "v_proj"]))
    narrow = LilyConfig(r=4, num_A=2, num_B=2, target_modules=["q_proj"])
    with pytest.warns(
        UserWarning, match=r"the state_dict has tensors for .*v_proj.*, which the configuration does not"
    ):
        inject_adapter_in_model(narrow, build("llama"), state_dict=state)
    with pytest.warns(UserWarning, match="no tensor of a Lily adapter"):
        inject_adapter_in_model(narrow, build("llama"), state_dict={"q_proj.lora_A.weight": torch.zeros(1)})
    with pytest.raises(LilyError, match="no tensor of a Lily adapter"):
        inject_adapter_in_model(LilyConfig(), build("llama"), state_dict={"q_proj.lora_A.weight": torch.zeros(1)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = inject_adapter_in_model(LilyConfig(r=4, num_A=2, num_B=2), build("llama"), state_dict=state)
    assert {name.rpartition(".")[2] for name in layers_of(model)} == {"q_proj", "v_proj"}
