"""A recipe's `model.quantization`: trained on few bits, used on the same bits, merged into the full weights."""

from __future__ import annotations

import json

import pytest
import torch
from recipes_helpers import classification, sft
from runs import invoke, make
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lily.errors import LilyError
from lily.recipes import loader, packages, preflight, train
from lily.recipes.deploy import load_for_export
from lily.recipes.models.load import load_model
from lily.recipes.models.quantization import frozen_bytes
from lily.recipes.results.adapter import Adapter

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'lily-peft[quantized]'")
pytestmark = pytest.mark.filterwarnings("ignore:routing=.* on a causal model")

CHANGES = ["train.epochs=8", "lily.routing=token"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, encoder, chat_model):
    out = {}
    for name, kind, model, changes in (
        # at the unquantised recipe's rate it learns on some CPUs and not on others
        ("chat", sft, chat_model, ["model.quantization=nf4", "train.learning_rate=0.005", *CHANGES]),
        ("classifier", classification, encoder, ["model.quantization=int8", *CHANGES]),
    ):
        folder = tmp_path_factory.mktemp(name)
        out[name] = train.train(make(kind, folder, model, changes), quiet=True), folder / "run"
    return out


def kinds(model):
    return {type(m).__name__ for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lily" not in name}


@pytest.mark.parametrize("name", [pytest.param("chat", marks=pytest.mark.slow), "classifier"])
def test_a_quantised_run_learns_and_is_evaluated_on_the_same_bits(trained, name):
    result, folder = trained[name]
    assert result.quantization == {"chat": "nf4", "classifier": "int8"}[name]
    assert result.final[result.metric] > result.before[result.metric]
    used = Adapter(str(folder))
    assert {"chat": "Linear4bit", "classifier": "Linear8bitLt"}[name] in kinds(used.model)
    found = used.evaluate()
    assert found == pytest.approx(result.final, abs=1e-6)
    names = load_file(folder / "best" / "adapter_model.safetensors")
    assert all("lily_" in n or "classifier" in n for n in names)
    assert {t.dtype for t in names.values()} == {torch.float32}
    assert "BitsAndBytesConfig" in (folder / "best" / "README.md").read_text()


def test_heads_and_output_layers_are_not_quantised(chat_model, encoder, tmp_path):
    for kind, model, head in ((sft, chat_model, "lm_head"), (classification, encoder, "classifier")):
        recipe = make(kind, tmp_path, model, ["model.quantization=nf4"])
        loaded = load_model(recipe.model, recipe.task, ("0", "1"))
        assert type(loaded.get_submodule(head)) is nn.Linear
        assert not any(p.requires_grad for p in loaded.parameters())
        others = [m for n, m in loaded.named_modules() if isinstance(m, nn.Linear) and n != head]
        assert others
        assert {type(m).__name__ for m in others} == {"Linear4bit"}


def test_the_frozen_weights_take_what_the_plan_says(chat_model, tmp_path):
    sizes = {}
    for quantization in ("none", "int8", "nf4"):
        recipe = make(sft, tmp_path, chat_model, [f"model.quantization={quantization}"])
        loaded = load_model(recipe.model, recipe.task)
        sizes[quantization] = loaded.get_memory_footprint()
        if quantization != "none":
            full = AutoModelForCausalLM.from_pretrained(chat_model)
            # bitsandbytes' own tables and the scales of rows are small beside weights, but not beside these
            assert frozen_bytes(full, "sft", quantization) == pytest.approx(sizes[quantization], rel=0.1)
    assert sizes["nf4"] < sizes["int8"] < sizes["none"]


def test_a_quantised_run_is_collapsed_exported_and_merged_into_the_full_weights(trained, tmp_path):
    _, folder = trained["chat"]
    invoke("collapse", folder, "--out", tmp_path / "static", "--refit-steps", "2")
    invoke("export", tmp_path / "static", "--to", "lora", "--out", tmp_path / "lora")
    invoke("export", tmp_path / "static", "--to", "merged", "--out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert kinds(merged) == {"Linear"}
    assert getattr(merged.config, "quantization_config", None) is None
    unmerged, _, facts = load_for_export(str(tmp_path / "static"), weights=True)
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, unmerged.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert facts["trained_on"] == "the base model in nf4"
    told = json.loads((tmp_path / "lora" / "lily_provenance.json").read_text())
    assert told["trained_on"] == facts["trained_on"]


def test_a_package_that_is_not_installed_is_told_before_anything_is_read(chat_model, tmp_path, monkeypatch):
    recipe = make(sft, tmp_path, chat_model, ["model.quantization=nf4"])
    found = packages.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(LilyError, match=r'bitsandbytes is not installed; pip install "lily-peft\[quantized\]"'):
        preflight.prepare(recipe)


def test_a_quantisation_that_does_not_exist_is_named_with_those_that_do(chat_model, tmp_path):
    with pytest.raises(LilyError, match=r"quantization.*none.*nf4.*int8"):
        make(sft, tmp_path, chat_model, ["model.quantization=int3"])


def test_the_shipped_recipe_differs_from_chat_in_its_bits_alone():
    chat, quantised = (loader.load_recipe(name).model_dump() for name in ("chat", "chat-nf4"))
    assert quantised["model"].pop("quantization") == "nf4"
    assert chat["model"].pop("quantization") == "none"
    for recipe in (chat, quantised):
        recipe.pop("name")
        recipe.pop("description")
    assert quantised == chat


def test_adapters_stay_in_float32_under_trl(trained):
    """TRL rounds what trains on a quantised model to bfloat16, in which a small step changes nothing."""
    state = load_file(trained["chat"][1] / "last" / "adapter_model.safetensors")
    assert any(not torch.equal(t, t.bfloat16().float()) for t in state.values())
