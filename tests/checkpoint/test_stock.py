"""Against stock PEFT's Lily: the same numbers where it can express the adapter, a refusal where it cannot.

Stock runs in a process in which this package is never imported.
"""

from __future__ import annotations

import json
import os

import peft
import pytest
import torch
from helpers import build, inputs, logits, randomise
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lily import LilyConfig, LilyError, register, unregister
from lily.layers.bank import bank_of

pytestmark = [pytest.mark.sample(every=10), pytest.mark.filterwarnings("ignore:routing=.* on a causal model")]

BOTH = {"r": 4, "stride_A": 2, "num_B": 3, "scaling": 0.7, "target_modules": ["q_proj", "v_proj", "down_proj"]}


SAVE_STOCK = """
m = peft.get_peft_model(build('llama'), peft.LilyConfig(task_type='CAUSAL_LM', **eval(args[1])))
randomise(m).eval()
m.save_pretrained(args[0])
out = logits(m, inputs('llama'))
out.square().sum().backward()
grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
save_file({'logits': out.detach(), **grads}, args[0] + '/result.safetensors')
"""

LOAD_STOCK = """
m = peft.PeftModel.from_pretrained(build('llama'), args[0]).eval()
save_file({'logits': logits(m, inputs('llama')).detach()}, args[0] + '/result.safetensors')
print('loaded')
"""


@pytest.fixture
def stock_adapter(tmp_path, stranger):
    stranger(SAVE_STOCK, tmp_path, BOTH)
    return tmp_path, load_file(tmp_path / "result.safetensors")


def test_a_stock_adapter_gives_stocks_logits_and_gradients(stock_adapter):
    folder, expected = stock_adapter
    model = PeftModel.from_pretrained(build("llama"), folder, is_trainable=True).eval()
    assert model.peft_config["default"].routing == "batch"
    out = logits(model, inputs("llama"))
    assert (out - expected["logits"]).abs().max() <= 1e-5
    out.square().sum().backward()
    bank = bank_of(model.base_model.model)
    plan, root = bank.plans["default"], "base_model.model."
    ours = {
        f"{root}{block[0]}.lily_A.default.weight": bank.lily_A["default"][i].grad
        for i, (_, block) in enumerate(plan.blocks)
    }
    ours |= {
        f"{root}{g.members[0]}.lily_B.default.weight": bank.lily_B["default"][i].grad for i, g in enumerate(plan.groups)
    }
    ours |= {n: p.grad for n, p in model.named_parameters() if "lily_router" in n}
    assert set(ours) == set(expected) - {"logits"}
    for name, grad in ours.items():
        assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("start", [True, "orthonormal"])
def test_stock_loads_our_batch_routed_file_with_difference_zero(tmp_path, stranger, start):
    config = LilyConfig(task_type="CAUSAL_LM", routing="batch", init_weights=start, **BOTH)
    model = randomise(get_peft_model(build("llama"), config)).eval()
    model.save_pretrained(tmp_path)
    assert "loaded" in stranger(LOAD_STOCK, tmp_path)
    assert torch.equal(load_file(tmp_path / "result.safetensors")["logits"], logits(model, inputs("llama")).detach())


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q_proj|o_proj)", ["self_attn.q_proj", "o_proj"]])
@pytest.mark.parametrize("how", [{"stride_A": 3}, {"num_A": 2}])
def test_whatever_selected_the_layers_stock_reads_our_file_rightly(tmp_path, stranger, targets, how):
    options = {**BOTH, "stride_A": None, **how, "target_modules": targets}
    model = randomise(
        get_peft_model(build("llama"), LilyConfig(task_type="CAUSAL_LM", routing="batch", **options))
    ).eval()
    model.save_pretrained(tmp_path)
    assert "loaded" in stranger(LOAD_STOCK, tmp_path)
    assert torch.equal(load_file(tmp_path / "result.safetensors")["logits"], logits(model, inputs("llama")).detach())


@pytest.mark.parametrize(
    "beyond",
    [
        {"routing": "token"},
        {"routing": "sequence"},
        {"routing": "static"},
        {"routing": "uniform"},
        {"num_B": 1},
        {"activation": "relu"},
        {"rank_pattern": {"v_proj": 2}},
        {"bias": "lily_only"},
        {"target_modules": ["proj", "q_proj", "o_proj"]},
    ],
)
def test_stock_refuses_what_it_would_compute_wrongly(tmp_path, stranger, beyond):
    options = {**BOTH, "routing": "batch", **beyond}
    if beyond.get("target_modules"):  # 'q_proj' ends with 'proj': stock's groups would depend on the hash seed
        model = build("llama")
        for layer in model.model.layers:
            layer.self_attn.proj = layer.self_attn.k_proj
            del layer.self_attn.k_proj
        get_peft_model(model, LilyConfig(task_type="CAUSAL_LM", **options)).save_pretrained(tmp_path)
    else:
        get_peft_model(build("llama"), LilyConfig(task_type="CAUSAL_LM", **options)).save_pretrained(tmp_path)
    printed = stranger(LOAD_STOCK, tmp_path)
    assert "loaded" not in printed
    assert "KeyError: 'LILY_PEFT'" in printed


@pytest.mark.parametrize("targets", [r".*\.(q_proj|o_proj)", ["q_proj", "o_proj"]])
def test_a_stock_file_with_another_grouping_is_loaded_as_it_was(tmp_path, stranger, targets):
    """Stock puts everything that a regular expression matches into one group per shape."""
    stranger(SAVE_STOCK, tmp_path, {**BOTH, "target_modules": targets})
    expected = load_file(tmp_path / "result.safetensors")["logits"]
    for low in (False, True):
        model = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True, low_cpu_mem_usage=low).eval()
        assert (logits(model, inputs("llama")) - expected).abs().max() <= 1e-5
    groups = bank_of(model.base_model.model).plans["default"].groups
    assert len(groups) == (1 if isinstance(targets, str) else 2)
    again = tmp_path / "again"
    model.save_pretrained(again)
    back = PeftModel.from_pretrained(build("llama"), again).eval()
    assert torch.equal(logits(back, inputs("llama")), logits(model, inputs("llama")))
    assert "loaded" in stranger(LOAD_STOCK, again)
    assert (load_file(again / "result.safetensors")["logits"] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("part", ["A", "B"])
def test_a_stock_file_whose_duplicates_disagree_is_damaged_and_no_third_grouping(stock_adapter, part):
    folder, _ = stock_adapter
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"base_model.model.model.layers.1.self_attn.q_proj.lily_{part}.weight"] += 1
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(LilyError, match=rf"different values for the shared {part} of .*layers\.0.* and .*layers\.1"):
        PeftModel.from_pretrained(build("llama"), folder)


def test_code_written_for_stock_keeps_running():
    config = peft.LilyConfig(task_type="CAUSAL_LM", **BOTH)
    model = get_peft_model(build("llama"), config)
    assert type(model.base_model).__module__ == "lily.tuner.model"
    assert model.peft_config["default"].routing == "batch"
    assert model.get_nb_trainable_parameters()[0] > 0


def test_registering_is_idempotent_and_can_be_undone(stock_adapter):
    folder, _ = stock_adapter
    register()
    register()
    try:
        unregister()
        model = PeftModel.from_pretrained(build("llama"), folder)
        assert type(model.base_model).__module__ == "peft.tuners.lily.model"
    finally:
        register()
    assert type(PeftModel.from_pretrained(build("llama"), folder).base_model).__module__ == "lily.tuner.model"


def test_a_file_is_no_larger_than_its_parameters(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8, vocab_size=61
    )
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config),
        LilyConfig(r=64, num_A=2, num_B=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path)
    trainable = model.get_nb_trainable_parameters()[0]
    assert trainable >= 1_000_000
    assert os.path.getsize(tmp_path / "adapter_model.safetensors") <= 1.02 * 4 * trainable


def written(tmp_path):
    model = randomise(get_peft_model(build("llama"), LilyConfig(task_type="CAUSAL_LM", routing="batch", **BOTH))).eval()
    model.save_pretrained(tmp_path)
    return model, load_file(tmp_path / "adapter_model.safetensors")


def reload(tmp_path, tensors):
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    return PeftModel.from_pretrained(build("llama"), tmp_path).eval()


@pytest.mark.parametrize("form", ["parameter", "linear"])
def test_the_paper_repositorys_files_are_read(tmp_path, form):
    model, tensors = written(tmp_path)
    plan = bank_of(model.base_model.model).plans["default"]
    paper = {}
    for name, slot in plan.slots.items():
        group, key = plan.group_of(name), f"base_model.model.{name}"
        first_A, first_B = plan.blocks[slot.A][1][0], group.members[0]
        B = tensors[f"base_model.model.{first_B}.lily_B.weight"].clone()
        paper[f"{key}.lily_lp.weight"] = tensors[f"base_model.model.{first_A}.lily_A.weight"].clone()
        if form == "parameter":
            paper[f"{key}.lily_hp"] = B.view(group.num_B, group.r, group.out_features)
        else:
            paper[f"{key}.lily_hp.weight"] = B
        paper[f"{key}.lily_router.weight"] = tensors[f"{key}.lily_router.weight"]
    assert torch.equal(logits(reload(tmp_path, paper), inputs("llama")), logits(model, inputs("llama")))


def first(tensors, part):
    return next(k for k in tensors if f"lily_{part}" in k)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(first(t, "A")), "has no A of model.layers.0"),
        (lambda t: t.pop(first(t, "B")), "has no B of down_proj"),
        (lambda t: t.pop(first(t, "router")), "has no lily_router for model.layers.0"),
        (lambda t: t.update({first(t, "A"): torch.zeros(5, 32)}), r"has shape \(5, 32\), expected \(4, 48\)"),
        (
            lambda t: t.update({"base_model.model.model.layers.9.self_attn.q_proj.lily_A.weight": torch.zeros(4, 32)}),
            "no adapted layer 'model.layers.9",
        ),
        (
            lambda t: t.update({"base_model.model.model.layers.1.self_attn.q_proj.lily_A.weight": torch.ones(4, 32)}),
            "different values for one shared tensor",
        ),
    ],
    ids=["no A", "no B", "no router", "shape", "layer", "duplicate"],
)
def test_a_damaged_file_ends_in_one_clear_error(tmp_path, damage, message):
    _, tensors = written(tmp_path)
    damage(tensors)
    with pytest.raises(LilyError, match=message):
        reload(tmp_path, tensors)


def test_the_config_says_what_is_inside(tmp_path):
    written(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == "LILY"
    assert values["routing"] == "batch"
    assert values["stride_A"] == 2
    assert values["inference_mode"] is True
