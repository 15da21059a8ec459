"""A save that would lack a tensor of the adapter is an error, and a complete one is not refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from adapters import config_for
from helpers import build, inputs, randomise
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

import lily
from lily import LilyError

FILE = "adapter_model.safetensors"


class Around(nn.Module):
    """A wrapper of the user's own."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs)


def adapted(**options):
    return randomise(get_peft_model(build("llama"), config_for("llama", routing="static", **options)))


def around_a_block(model):
    layers = model.get_base_model().model.layers
    layers[1] = Around(layers[1])
    return model


LOST = r"would lack 3 of its tensors.*layers\.1\.block\.self_attn\.q_proj\.lily_logits.*wrap before get_peft_model"


@pytest.mark.parametrize("frozen", [False, True])
def test_a_block_wrapped_after_it_was_adapted_is_an_error(tmp_path, frozen):
    model = around_a_block(adapted())
    if frozen:
        model.requires_grad_(False)
    with pytest.raises(LilyError, match=LOST):
        model.save_pretrained(tmp_path / "one")
    with pytest.raises(LilyError, match=LOST):
        lily.save_adapter(model, tmp_path / "two")
    with pytest.raises(LilyError, match=LOST):
        get_peft_model_state_dict(model)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_trainers_checkpoint_is_checked(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in inputs("llama")["input_ids"]]
    arguments = TrainingArguments(
        tmp_path, max_steps=1, save_steps=1, per_device_train_batch_size=1, report_to=[], disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    with pytest.raises(LilyError, match=LOST):
        Trainer(around_a_block(adapted()), arguments, train_dataset=rows).train()


def test_an_injected_adapter_is_checked(tmp_path):
    model = build("llama")
    model.add_adapter(config_for("llama", routing="static"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).is_file()
    model.model.layers[1] = Around(model.model.layers[1])
    with pytest.raises(LilyError, match=r"would lack 3 .*layers\.1\.block\.self_attn\.q_proj\.lily_logits"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["lily_A", "lily_B", "lily_logits", "modules_to_save"])
def test_a_given_state_dict_without_a_tensor_is_an_error(tmp_path, part):
    model = adapted(modules_to_save=["lm_head"])
    state = {name: t for name, t in model.state_dict().items() if f".{part}." not in name}
    with pytest.raises(LilyError, match=rf"would lack .*\.{part}\."):
        model.save_pretrained(tmp_path, state_dict=state)


def test_an_empty_state_dict_is_for_the_processes_that_do_not_write(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path, state_dict={}, is_main_process=False)
    assert not (tmp_path / FILE).exists()
    with pytest.raises(LilyError, match="the state_dict that was given is empty"):
        model.save_pretrained(tmp_path, state_dict={})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"routing": "token"},
        {"routing": "uniform"},
        {"routing": "token", "shared_router": True},
        {"modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "parallel_modules": ["mlp"]},
        {"target_modules": None, "target_parameters": ["mlp.down_proj.weight"]},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings")
def test_a_complete_file_is_not_refused(tmp_path, options):
    model = get_peft_model(build("llama"), config_for("llama", **({"routing": "static"} | options)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "tensors of the base model are trainable")
        model.save_pretrained(tmp_path)
    assert load_file(tmp_path / FILE)


@pytest.mark.parametrize("bias", ["all", "lily_only"])
def test_trained_biases_are_no_surprise(tmp_path, bias):
    model = get_peft_model(build("bert"), config_for("bert", bias=bias))
    model.add_adapter("other", config_for("bert"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "tensors of the base model are trainable")
        model.save_pretrained(tmp_path)


def test_each_of_several_adapters_is_checked_for_its_own_tensors(tmp_path):
    model = adapted()
    model.add_adapter("other", config_for("llama", routing="token", modules_to_save=["lm_head"]))
    model.base_model.set_adapter(["default", "other"])
    model.save_pretrained(tmp_path / "both")
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert (tmp_path / "both" / FILE).is_file()
    assert not (tmp_path / "one" / FILE).exists()
    around_a_block(model)
    with pytest.raises(LilyError, match="of adapter 'other' would lack"):
        model.save_pretrained(tmp_path / "two", selected_adapters=["other"])


def test_routers_that_have_settled_are_left_out(tmp_path):
    model = get_peft_model(build("llama"), config_for("llama", routing="token", settled=1.0))
    model.save_pretrained(tmp_path)
    assert not any("lily_router" in name for name in load_file(tmp_path / FILE))


def test_base_weights_that_train_are_warned_of(tmp_path):
    model = adapted()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"of the base model are trainable.*model\.norm\.weight.*modules_to_save"):
        model.save_pretrained(tmp_path)
    assert torch.is_tensor(next(iter(load_file(tmp_path / FILE).values())))


def test_the_gathered_tensors_of_a_data_parallel_base_have_plain_names():
    model = get_peft_model(nn.DataParallel(build("llama")), config_for("llama", routing="static", task_type=None))
    assert lily.gathered_state(model).keys() == lily.gathered_state(adapted()).keys()


def test_a_pickle_that_nothing_would_load_is_not_written(tmp_path):
    with pytest.raises(LilyError, match="safe_serialization=False writes a pickle"):
        adapted().save_pretrained(tmp_path / "out", safe_serialization=False)
    assert not (tmp_path / "out").exists()
