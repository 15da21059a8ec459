"""After any way to remove the last adapter, the model is the base; and PEFT's status has no bank among the layers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft import functional as peft_functional
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lily import LilyConfig

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
OF_PEFT = {"peft_config", "_hf_peft_config_loaded"}  # attributes that PEFT and transformers leave with LoRA too


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=4, **sizes))


def parts(model: nn.Module) -> dict[str, object]:
    """What a model is made of."""
    return {
        name: (type(m), set(vars(m)) - OF_PEFT, {hook: len(getattr(m, hook)) for hook in HOOKS}, set(m._parameters))
        for name, m in model.named_modules()
    }


def config(**options) -> LilyConfig:
    return LilyConfig(r=4, num_A=2, num_B=2, **{"target_modules": ["q_proj", "up_proj"], **options})


def transformers(model: nn.Module, **options) -> nn.Module:
    model.add_adapter(config(**options), "x")
    model.add_adapter(config(**options), "y")
    model.delete_adapter("y")
    model.delete_adapter("x")
    return model


def both_at_once(model: nn.Module, **options) -> nn.Module:
    model.add_adapter(config(**options), "x")
    model.add_adapter(config(**options), "y")
    model.delete_adapter(["x", "y"])
    return model


def peft(model: nn.Module, **options) -> nn.Module:
    get_peft_model(model, config(**options)).delete_adapter("default")
    return model


def injected(model: nn.Module, **options) -> nn.Module:
    inject_adapter_in_model(config(**options), model, "x")
    peft_functional.delete_adapter(model, "x", prefix="lily_")
    return model


def unload(model: nn.Module, **options) -> nn.Module:
    return get_peft_model(model, config(**options)).unload()


def merge_and_unload(model: nn.Module, **options) -> nn.Module:
    return get_peft_model(model, config(**{"routing": "static", **options})).merge_and_unload()


def diffusers(model: nn.Module, **options) -> nn.Module:
    from diffusers.loaders.lora_base import _remove_text_encoder_monkey_patch

    model.add_adapter(config(**options), "x")
    _remove_text_encoder_monkey_patch(model)
    return model


def diffusers_delete(model: nn.Module, **options) -> nn.Module:
    from diffusers.utils import delete_adapter_layers

    model.add_adapter(config(**options), "x")
    delete_adapter_layers(model, "x")
    return model


WAYS = [transformers, both_at_once, peft, injected, unload, merge_and_unload, diffusers, diffusers_delete]
KINDS = {
    "layers": {},
    "static": {"routing": "static"},
    "saved head": {"modules_to_save": ["lm_head"]},
    "trained rows": {"trainable_token_indices": [1, 2]},
    "waiting for data": {"init_weights": "data"},
    "parameters": {"target_parameters": ["k_proj.weight"]},
    "slices": {"target_slices": {"v_proj": {"half": [0, 16]}}},
}


OF_DIFFUSERS = (diffusers, diffusers_delete)  # it trains neither heads nor rows beside an adapter
BESIDE = ("saved head", "trained rows")
CASES = [(way, kind) for way in WAYS for kind in KINDS if way not in OF_DIFFUSERS or kind not in BESIDE]


@pytest.mark.sample(every=6)
@pytest.mark.parametrize(("way", "kind"), CASES)
def test_a_model_without_its_last_adapter_is_the_base(way, kind):
    if way in OF_DIFFUSERS:
        pytest.importorskip("diffusers")
    model = llama()
    before, state = parts(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = way(model, **KINDS[kind])
    assert parts(after) == before
    assert after.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in after.state_dict().items())


@pytest.mark.parametrize("way", [transformers, peft])
def test_another_adapter_can_come_afterwards(way):
    model = way(llama())
    adapted = get_peft_model(model, config())
    assert adapted(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 64)
    assert any(p.requires_grad for p in adapted.parameters())


def test_an_adapter_can_come_to_the_same_peft_model_afterwards():
    model = get_peft_model(llama(), config())
    model.delete_adapter("default")
    model.add_adapter("other", config())
    model.set_adapter("other")
    assert any(p.requires_grad for p in model.parameters())
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 64)


def test_a_deleted_adapter_is_in_no_file_of_the_model(tmp_path):
    model = transformers(llama())
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.state_dict().keys() == llama().state_dict().keys()


def test_a_unet_without_its_adapter_is_the_base():
    diffusers = pytest.importorskip("diffusers")
    blocks = {"block_out_channels": (32, 32), "layers_per_block": 1, "cross_attention_dim": 16}
    kinds = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
             "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
    unet = diffusers.UNet2DConditionModel(sample_size=8, norm_num_groups=8, attention_head_dim=8, **blocks, **kinds)
    before = parts(unet)
    for leave in (unet.unload_lora, lambda: unet.delete_adapters("default")):
        unet.add_adapter(config(target_modules=["to_q", "to_v"], routing="static"))
        leave()
        assert parts(unet) == before


def test_the_status_counts_layers_and_not_the_bank():
    model: PeftModel = get_peft_model(llama(), LilyConfig(r=4, num_A=2, num_B=1, target_modules=["q_proj", "up_proj"]))
    status = model.get_model_status()
    assert status.num_adapter_layers == 8
    assert status.requires_grad == {"default": True}
    assert status.devices == {"default": ["cpu"]}
    assert all("lily_bank" not in layer.name for layer in model.get_layer_status())
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    model.unmerge_adapter()
    model.add_adapter("other", config())
    status = model.get_model_status()
    assert status.merged_adapters == []
    assert status.requires_grad == {"default": True, "other": False}
    assert status.available_adapters == ["default", "other"]


@pytest.mark.parametrize("way", ["peft", "injected"])
def test_what_the_next_adapter_trained_beside_its_layers_is_active_after_a_deletion(way):
    configs = {"a": config(), "b": config(modules_to_save=["lm_head"], trainable_token_indices=[3, 5])}
    if way == "peft":
        model = get_peft_model(llama(), configs["a"], adapter_name="a")
        model.add_adapter("b", configs["b"])
        activate, delete = model.set_adapter, model.delete_adapter
    else:
        model = llama()
        for name, own in configs.items():
            inject_adapter_in_model(own, model, name)
        activate = partial(peft_functional.set_adapter, model)
        delete = partial(peft_functional.delete_adapter, model, prefix="lily_")
    for name, tensor in model.named_parameters():
        if "modules_to_save" in name or "trainable_tokens_delta" in name:
            nn.init.normal_(tensor)
    ids = torch.tensor([[3, 4, 5]])
    model.eval()
    activate("b")
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        activate("a")
        delete("a")
        assert torch.equal(model(input_ids=ids).logits, expected)
