"""Rows of one batch with different adapters (`adapter_names`): each row as with its adapter alone."""

from __future__ import annotations

import pytest
import torch
from helpers import TARGETS, build, randomise
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

import lily
from lily import LilyConfig, LilyError

NAMES = ["default", "second", "__base__", "default"]
pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(base: nn.Module, *more, **options):
    torch.manual_seed(0)
    model = get_peft_model(base, LilyConfig(r=4, num_A=2, num_B=2, **options))
    model.add_adapter("second", more[0] if more else LilyConfig(r=2, num_A=1, num_B=3, **options))
    return randomise(model).eval()


def alone(model, name, **inputs):
    if name == "__base__":
        with model.disable_adapter():
            return model(**inputs).logits
    model.set_adapter(name)
    return model(**inputs).logits


def check(model, **inputs):
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=NAMES).logits
        single = {name: alone(model, name, **inputs) for name in dict.fromkeys(NAMES)}
    rows = torch.stack([single[name][i] for i, name in enumerate(NAMES)])
    assert torch.allclose(mixed, rows, atol=1e-5)
    assert len({tuple(single[name][0].flatten().tolist()) for name in single}) == len(single)  # they differ
    model.set_adapter("default")
    with torch.no_grad():  # nothing is left behind
        assert torch.equal(model(**inputs).logits, single["default"])
    assert not any("forward" in vars(m) for m in model.modules())


IDS = torch.arange(4 * 6).reshape(4, 6) % 30
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6, [1] * 3 + [0] * 3])


@pytest.mark.parametrize("routing", ["token", "sequence", "static", "uniform"])
def test_each_row_is_as_with_its_adapter_alone(routing):
    check(adapted(build("llama"), target_modules=TARGETS["llama"], routing=routing), input_ids=IDS)


@pytest.mark.parametrize("distinct", ["none", "permute"])
def test_padding_does_not_count_in_a_row(distinct):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    base = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes)).eval()
    options = {"target_modules": ["query", "value", "word_embeddings"], "task_type": "SEQ_CLS"}
    model = adapted(base, routing="sequence", distinct=distinct, **options)
    check(model, input_ids=IDS, attention_mask=MASK)
    whole = model(input_ids=IDS, attention_mask=MASK, adapter_names=NAMES).logits
    cut = model(input_ids=IDS[1:2, :4], attention_mask=MASK[1:2, :4], adapter_names=NAMES[1:2]).logits
    assert torch.allclose(whole[1:2], cut, atol=1e-5)


@pytest.mark.parametrize("options", [
    {"target_modules": ["q_proj"], "target_slices": {"v_proj": {"a": [0, 8], "b": [8, 16]}}},
    {"target_modules": ["q_proj"], "parallel_modules": ["mlp"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj"], "gain": "signs", "own_r": 1},
    {"target_modules": ["q_proj"], "activation": "relu"},
])  # fmt: skip
def test_every_kind_of_layer_and_structure_has_it(options):
    check(adapted(build("llama"), routing="static", **options), input_ids=IDS)


def test_an_adapter_on_other_layers_leaves_the_rest_of_its_rows_alone():
    other = LilyConfig(r=2, num_A=1, num_B=1, target_modules=["gate_proj"])
    check(adapted(build("llama"), other, target_modules=["q_proj"]), input_ids=IDS)


@pytest.mark.parametrize("compiled", [nn.Module.compile, lambda model, **how: model.get_base_model().compile(**how)])
def test_a_compiled_model_has_it_also_after_a_batch_without_names(compiled):
    model = adapted(build("llama"), target_modules=["q_proj"], layers_to_transform=[0], routing="static")
    with torch.no_grad():
        eager = [model(input_ids=IDS, adapter_names=NAMES).logits, model(input_ids=IDS).logits]
        compiled(model, backend="eager")
        plain, mixed, again = (model(input_ids=IDS, **names).logits for names in ({}, {"adapter_names": NAMES}, {}))
    assert torch.allclose(mixed, eager[0], atol=1e-5)
    assert torch.allclose(plain, eager[1], atol=1e-5)
    assert torch.equal(plain, again)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_gives_each_row_its_adapters_text(beams):
    model = adapted(build("llama"), target_modules=TARGETS["llama"], task_type="CAUSAL_LM")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=IDS, adapter_names=NAMES, **options)
    for i, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                one = model.generate(input_ids=IDS[i : i + 1], **options)
        else:
            model.set_adapter(name)
            one = model.generate(input_ids=IDS[i : i + 1], **options)
        assert torch.equal(mixed[i], one[0])


def test_beams_of_an_encoder_and_a_decoder():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    base = T5ForConditionalGeneration(T5Config(vocab_size=32, **sizes)).eval()
    model = adapted(base, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    mixed = model.generate(input_ids=IDS, attention_mask=MASK, adapter_names=NAMES, **options)
    model.set_adapter("second")
    one = model.generate(input_ids=IDS[1:2], attention_mask=MASK[1:2], **options)
    assert torch.equal(mixed[1, : one.shape[1]], one[0])


def test_the_result_is_loras():
    """A static adapter and the LoRA that it is give the same mixed batch."""
    model = adapted(build("llama"), target_modules=["q_proj"], routing="static")
    lora = get_peft_model(build("llama"), LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]))
    lora.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
    for name in ("default", "second"):
        ours, theirs = (dict(m.base_model.model.named_modules()) for m in (model, lora))
        for path, layer in ours.items():
            if isinstance(layer, lily.layers.linear.Linear):
                factors = layer.factors(name)
                theirs[path].lora_A[name].weight.data = factors.A
                theirs[path].lora_B[name].weight.data = factors.scaling * factors.B.T
    lora.eval()
    with torch.no_grad():
        one, two = (m(input_ids=IDS, adapter_names=NAMES).logits for m in (model, lora))
    assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["default", "third", "default", "default"], "third, which the model does not have; it has default, second"),
        (["default"], "has 1 names, and a Linear got 4 rows"),
        ("default", "is not a list of names"),
    ],
)
def test_wrong_names_are_refused(names, said):
    model = adapted(build("llama"), target_modules=["q_proj"])
    with pytest.raises(LilyError, match=said):
        model(input_ids=IDS, adapter_names=names)
    assert not any("forward" in vars(m) for m in model.modules())


def test_training_merged_adapters_and_parameters_are_refused():
    model = adapted(build("llama"), target_modules=["q_proj"], routing="static")
    with pytest.raises(LilyError, match=r"in training mode: call model\.eval"):
        model.train()(input_ids=IDS, adapter_names=NAMES)
    model.eval().merge_adapter()
    with pytest.raises(LilyError, match=r"is merged into the base weights.*unmerge_adapter"):
        model(input_ids=IDS, adapter_names=NAMES)
    model = adapted(build("llama"), target_modules=["q_proj"], target_parameters=["k_proj.weight"])
    with pytest.raises(LilyError, match=r"target_parameters.*once for each adapter"):
        model(input_ids=IDS, adapter_names=NAMES)


def test_a_trained_head_is_each_adapters_own():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    base = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes)).eval()
    model = adapted(base, target_modules=["query"], task_type="SEQ_CLS")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save.second" in name:
                p.add_(1.0)
    check(model, input_ids=IDS)
