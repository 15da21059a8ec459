"""Another way in than `PeftModel.from_pretrained`: transformers' own loading."""

from __future__ import annotations

import peft
import pytest
import torch
from adapters import config_for
from helpers import build, inputs, predict, randomise
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import lily
from lily import LilyError

pytestmark = pytest.mark.filterwarnings("ignore:routing=.* on a causal model")


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    build("llama").save_pretrained(folder)
    return folder


def saved(tmp_path, base, config, stock=False):
    """A trained adapter's folder, and what it computes."""
    if stock:
        lily.unregister()
    try:
        model = randomise(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)).eval()
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", predict(model, inputs("llama"))
    finally:
        lily.register()


@pytest.mark.parametrize("routing", ["token", "static", "batch", "uniform"])
def test_a_folder_of_ours_computes_what_was_saved(tmp_path, base, routing):
    folder, expected = saved(tmp_path, base, config_for("llama", routing=routing))
    assert torch.equal(predict(AutoModelForCausalLM.from_pretrained(folder).eval(), inputs("llama")), expected)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(folder), adapter_name="mine")
    assert not model.training
    assert torch.equal(predict(model, inputs("llama")), expected)
    model.disable_adapters()
    assert torch.equal(predict(model, inputs("llama")), predict(build("llama"), inputs("llama")))


def test_a_folder_of_stock_pefts_computes_what_stock_computes(tmp_path, base):
    config = peft.LilyConfig(r=4, stride_A=2, num_B=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    folder, expected = saved(tmp_path, base, config, stock=True)
    assert torch.equal(predict(AutoModelForCausalLM.from_pretrained(folder).eval(), inputs("llama")), expected)


def test_a_damaged_file_leaves_the_model_as_it_was(tmp_path, base):
    from safetensors.torch import load_file, save_file

    folder, _ = saved(tmp_path, base, config_for("llama"))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "lily_B" in name))
    save_file(tensors, file)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with pytest.raises(LilyError, match="no B of"):
        model.load_adapter(str(folder))
    assert torch.equal(predict(model, inputs("llama")), predict(build("llama"), inputs("llama")))


def test_other_adapters_go_their_usual_way(tmp_path, base):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    folder, expected = saved(tmp_path, base, config)
    assert torch.equal(predict(AutoModelForCausalLM.from_pretrained(folder).eval(), inputs("llama")), expected)


def test_a_regular_expression_of_a_plain_config_is_one_group_as_in_stock():
    config = peft.LilyConfig(r=4, stride_A=2, num_B=3, target_modules=r".*\.(q_proj|o_proj)")
    ours = get_peft_model(build("llama"), config).get_nb_trainable_parameters()
    lily.unregister()
    try:
        assert ours == get_peft_model(build("llama"), config).get_nb_trainable_parameters()
    finally:
        lily.register()
