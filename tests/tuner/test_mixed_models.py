"""Lily beside other methods on one model (`mixed=True`): as PEFT's own methods are beside each other."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import build, inputs, predict, randomise
from peft import LoHaConfig, LoraConfig, PeftMixedModel, get_peft_model
from torch import nn

from lily import LilyConfig, LilyError, collapse, export
from lily.layers.bank import BANK
from lily.tuner.adapter import find

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ["q_proj", "v_proj"]
X = inputs("llama")


def config(method: str, **options: object) -> LilyConfig | LoraConfig | LoHaConfig:
    if method == "lily":
        shared = {"r": 4, "num_A": 2, "num_B": 2, "routing": "static", "own_r": 1, "gain": "ones"}
        return LilyConfig(**{**shared, "target_modules": TARGETS, **options})
    if method == "lora":
        return LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    return LoHaConfig(r=4, target_modules=TARGETS, init_weights=False)


def mixed(*methods: str, **options: object) -> PeftMixedModel:
    """A model with an adapter of each method, added in that order."""
    model = get_peft_model(build("llama"), config(methods[0], **options), adapter_name=methods[0], mixed=True)
    for method in methods[1:]:
        model.add_adapter(method, config(method, **options))
    return randomise(model).eval()


def kinds(model: nn.Module) -> list[tuple[str, str]]:
    return [(name, type(module).__name__) for name, module in model.named_modules()]


def updates(model: PeftMixedModel, method: str) -> dict[str, torch.Tensor]:
    """Layer -> the update of one method's adapter."""
    base = build("llama")
    alone = copy.deepcopy(model)
    alone.set_adapter(method)
    merged = alone.merge_and_unload().state_dict()
    return {name: merged[name] - t for name, t in base.state_dict().items() if not torch.equal(merged[name], t)}


# the last pair is PEFT's own, and behaves as the others
PAIRS = [("lily", "lora"), ("lora", "lily"), ("loha", "lily"), ("loha", "lora")]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_two_methods_add_up_whichever_comes_first(pair):
    model = mixed(*pair)
    assert model.active_adapters == [pair[0]]
    expected = build("llama")
    alone = []
    for method in pair:
        model.set_adapter(method)
        alone.append(predict(model, X))
        for name, update in updates(model, method).items():
            assert name.endswith(("q_proj.weight", "v_proj.weight"))
            expected.get_parameter(name).data.add_(update)
    model.set_adapter(list(pair))
    both = predict(model, X)
    assert torch.allclose(both, predict(expected, X), atol=1e-5)
    assert all((both - one).abs().max() > 0.01 for one in alone)
    with model.disable_adapter():
        assert torch.equal(predict(model, X), predict(build("llama"), X))
    for gone, left in (pair, pair[::-1]):
        one = copy.deepcopy(model)
        one.delete_adapter(gone)
        assert list(one.peft_config) == one.active_adapters == [left]
        assert torch.allclose(predict(one, X), alone[pair.index(left)], atol=1e-5)
        assert hasattr(one.base_model.model, BANK) == (left == "lily")
    unloaded = copy.deepcopy(model).unload()
    assert kinds(unloaded) == kinds(build("llama"))
    assert torch.equal(predict(unloaded, X), predict(build("llama"), X))
    merged = model.merge_and_unload()
    assert kinds(merged) == kinds(build("llama"))
    assert torch.allclose(predict(merged, X), both, atol=1e-5)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_what_is_active_trains_and_nothing_else(pair):
    model = mixed(*pair)
    owners = {"lily": "lily_", "lora": "lora_", "loha": "hada_"}
    for active in ([pair[0]], [pair[1]], list(pair)):
        model.set_adapter(active)
        for name, p in model.named_parameters():
            assert p.requires_grad == any(owners[method] in name for method in active), name
    model.train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    first = model(**X, labels=X["input_ids"]).loss
    first.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert model(**X, labels=X["input_ids"]).loss < first


def test_adapters_of_one_method_meet_below_those_of_another(tmp_path):
    """A second Lily adapter goes into the layers that the first has, wherever they are."""
    model = mixed("lily", "lora")
    model.add_adapter("second", config("lily", r=3, routing="token"))
    randomise(model, seed=5)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer).__module__ == "peft.tuners.lora.layer"
    assert set(layer.base_layer.settings) == {"lily", "second"}
    assert type(layer.base_layer.base_layer) is nn.Linear
    assert {name.rpartition(".")[2] for name in find(model, "second").layers} == set(TARGETS)
    for name in ("lily", "second"):  # the same tensors on a model of their own
        alone = get_peft_model(build("llama"), copy.deepcopy(model.peft_config[name]), adapter_name=name)
        own = {path.replace("q_proj.base_layer.", "q_proj.").replace("v_proj.base_layer.", "v_proj."): p
               for path, p in model.named_parameters() if f".{name}." in path}  # fmt: skip
        assert not alone.load_state_dict(own, strict=False).unexpected_keys
        model.set_adapter(name)
        assert torch.allclose(predict(model, X), predict(alone.eval(), X), atol=1e-5)
        alone.save_pretrained(tmp_path)
        model.load_adapter(tmp_path / name, f"loaded {name}")
        model.set_adapter(f"loaded {name}")
        assert torch.allclose(predict(model, X), predict(alone, X), atol=1e-5)
    exported = export.as_lora(model, adapter="lily")
    assert set(exported.layers) == set(find(model, "lily").layers)
    model.set_adapter("second")
    collapse(model, [X])
    assert export.as_lora(model, adapter="second").rank == 4


def test_methods_on_different_layers():
    model = get_peft_model(build("llama"), config("lora"), adapter_name="lora", mixed=True)
    model.add_adapter("lily", config("lily", target_modules=["o_proj", "down_proj"]))
    randomise(model).eval()
    model.set_adapter(["lora", "lily"])
    both = predict(model, X)
    assert torch.allclose(predict(model.merge_and_unload(), X), both, atol=1e-5)


@pytest.mark.parametrize("pair", PAIRS[:2], ids="-".join)
def test_a_routed_adapter_is_refused_before_anything_is_merged(pair):
    model = mixed(*pair, routing="token")
    model.set_adapter(list(pair))
    before = predict(model, X)
    with pytest.raises(LilyError, match="collapse"):
        model.merge_and_unload()
    assert torch.equal(predict(model, X), before)
    collapse(model, [X], adapter="lily")
    both = predict(model, X)
    assert torch.allclose(predict(model.merge_and_unload(), X), both, atol=1e-5)


def test_parts_of_layers_are_refused_and_nothing_changes():
    model = mixed("lora")
    before = kinds(model)
    with pytest.raises(LilyError, match=r"adapts whole layers, and model\.layers\.0\.mlp is a block"):
        model.add_adapter("lily", LilyConfig(r=4, target_modules=["q_proj"], parallel_modules=["mlp"]))
    assert kinds(model) == before
    assert list(model.peft_config) == ["lora"]


def test_convolutions_of_every_kind_are_mixed_with_lora():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Conv1d(6, 4, 3)).eval()
    model = get_peft_model(base, LilyConfig(r=2, num_B=1, target_modules=["0", "1"]), adapter_name="a", mixed=True)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["1"], init_lora_weights=False))
    randomise(model, scale=0.3)
    x, outputs = torch.randn(2, 4, 9), {}
    for active in (["a"], ["b"], ["a", "b"]):
        model.set_adapter(active)
        outputs["".join(active)] = model(x).detach()
    assert not torch.allclose(outputs["ab"], outputs["a"])
    assert not torch.allclose(outputs["ab"], outputs["b"])


@pytest.mark.parametrize("pair", [("lily", "lora"), ("loha", "lily")], ids="-".join)
def test_files_of_two_methods_are_loaded_onto_one_model(pair, tmp_path):
    base = build("llama").state_dict()
    expected = {name: tensor.clone() for name, tensor in base.items()}
    for method in pair:
        alone = randomise(get_peft_model(build("llama"), config(method)))
        alone.save_pretrained(tmp_path / method)
        for name, tensor in alone.merge_and_unload().state_dict().items():
            expected[name] += tensor - base[name]
    model = PeftMixedModel.from_pretrained(build("llama"), tmp_path / pair[0], pair[0])
    model.load_adapter(tmp_path / pair[1], pair[1])
    model.set_adapter(list(pair))
    merged = model.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.allclose(merged[name], tensor, atol=1e-5) for name, tensor in expected.items())
    assert any(not torch.equal(merged[name], base[name]) for name in base)
