"""Several adapters on one model: each computes what it computes alone, whatever its routing, layers and sharing."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from adapters import adapted
from every_kind import KINDS, base, lily_config, output
from helpers import VOCAB, build, inputs, predict, randomise
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

from lily import LilyConfig, LilyError, collapse
from lily.layers.bank import bank_of
from lily.layers.layer import LilyLayer
from lily.layers.router import Logits
from lily.tuner.adapter import find

pytestmark = [pytest.mark.sample(every=10), pytest.mark.filterwarnings("ignore")]

LAYERS = [kind for kind in KINDS if kind not in ("parameter", "experts")]
HOWS = {
    "token": {"routing": "token"},
    "sequence": {"routing": "sequence"},
    "batch": {"routing": "batch"},
    "uniform": {"routing": "uniform"},
    "settling": {"routing": "token", "settled": 0.5},
    "shared router": {"routing": "token", "shared_router": True},
    "one B": {"num_B": 1},
}


def trained(kind: str, seed: int, **options: object) -> PeftModel:
    return randomise(get_peft_model(base(), lily_config(kind, **options)), scale=0.4, seed=seed).eval()


def alone(folder: Path) -> torch.Tensor:
    return output(PeftModel.from_pretrained(base(), folder).eval())


def copied(model: PeftModel, source: str, name: str) -> None:
    """Copy an adapter as TRL does."""
    model.add_adapter(name, model.peft_config[source])
    for path, p in model.named_parameters():
        if f".{source}." in path:
            model.get_parameter(path.replace(f".{source}.", f".{name}.")).data.copy_(p.data)


@pytest.mark.parametrize(
    ("kind", "how"), [*(("linear", how) for how in HOWS), *((kind, "token") for kind in LAYERS if kind != "linear")]
)
def test_each_of_several_adapters_gives_what_it_gives_alone(kind, how, tmp_path):
    options = HOWS[how]
    expected = {}
    for seed, name in enumerate(("first", "second")):
        trained(kind, seed, **options).save_pretrained(tmp_path / name)
        expected[name] = alone(tmp_path / name)
    model = PeftModel.from_pretrained(base(), tmp_path / "first").eval()
    model.load_adapter(tmp_path / "second", "second")
    copied(model, "second", "copy")

    def is_what(adapter: str, name: str) -> None:
        model.set_adapter(adapter)
        assert torch.allclose(output(model), expected[name], atol=1e-5), adapter

    is_what("second", "second")
    is_what("default", "first")
    is_what("copy", "second")
    hotswap_adapter(model, str(tmp_path / "first"), "copy", torch_device="cpu")
    is_what("copy", "first")
    model.delete_adapter("default")
    is_what("second", "second")
    model.save_pretrained(tmp_path / "again", selected_adapters=["copy"])
    assert torch.allclose(alone(tmp_path / "again" / "copy"), expected["first"], atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(output(model), output(base()))


@pytest.mark.parametrize("routing", ["token", "sequence", "batch", "static", "uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_its_adapters_name_between_dots(kind, routing):
    if kind in ("parameter", "experts") and routing not in ("static", "uniform"):
        pytest.skip("their routing is static")
    for options in ({}, {"shared_router": True}, {"settled": 0.5}):
        if options and routing not in ("token", "sequence", "batch"):
            continue
        model = trained(kind, 0, routing=routing, **options)
        model.add_adapter("other", lily_config(kind, routing=routing, **options))
        own = [name for name, _ in model.named_parameters() if "lily_" in name or "modules_to_save" in name]
        first = {name for name in own if ".default." in name}
        assert len(own) == 2 * len(first) > 0
        assert {name.replace(".default.", ".other.") for name in first} == set(own) - first


def test_the_state_dict_of_an_earlier_version_loads():
    """Static logits were parameters then, without a module and so without a last name."""
    model = adapted("llama", routing="static")
    earlier = {
        name.replace("lily_logits.default.weight", "lily_logits.default"): t for name, t in model.state_dict().items()
    }
    assert sum(name.endswith("lily_logits.default") for name in earlier) == 12
    fresh = adapted("llama", trained=False, routing="static")
    fresh.load_state_dict(earlier, strict=True)
    assert torch.equal(predict(fresh, inputs("llama")), predict(model, inputs("llama")))


@pytest.mark.parametrize("tied", [False, True])
def test_trained_rows_are_named_as_the_adapters_own_tensors_are(tied, tmp_path):
    def fresh() -> PeftModel:
        model = build("llama")
        model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)  # PEFT then writes the whole embedding too
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        rows = LilyConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, VOCAB], task_type="CAUSAL_LM")
        return get_peft_model(model, rows)

    model = randomise(fresh())
    model.add_adapter("other", LilyConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, VOCAB]))
    rows = {name: p for name, p in model.named_parameters() if "trainable_tokens" in name}
    assert [name.count(f".{own}.") for own in ("default", "other") for name in rows] == [1, 0, 0, 1]
    for p in rows.values():
        torch.nn.init.normal_(p)
    expected = predict(model, inputs("llama"))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    names = [name for name in load_file(tmp_path / "adapter_model.safetensors") if "trainable_tokens" in name]
    assert [name.partition("trainable_tokens_delta")[2] for name in names] == [""]  # as LoRA's
    back = fresh()
    back.load_adapter(tmp_path, "again")
    back.set_adapter("again")
    assert torch.equal(predict(back, inputs("llama")), expected)

    earlier = {name.replace("_delta.default.weight", "_delta.default"): p for name, p in model.state_dict().items()}
    back = fresh()
    back.load_state_dict({name: p for name, p in earlier.items() if ".other" not in name}, strict=True)
    assert torch.equal(predict(back, inputs("llama")), expected)


def test_one_configuration_object_serves_several_models(tmp_path):
    config = LilyConfig(r=4, num_B=2, target_modules=["q_proj"], task_type="CAUSAL_LM", routing="static")
    first = randomise(get_peft_model(build("llama"), config))
    expected = predict(first, inputs("llama"))
    smaller = build("llama")
    del smaller.model.layers[2:]
    get_peft_model(smaller, config)
    first.save_pretrained(tmp_path)
    assert torch.equal(predict(PeftModel.from_pretrained(build("llama"), tmp_path), inputs("llama")), expected)


def test_logits_are_no_unit_that_fsdp_would_gather_alone():
    """PEFT's wrapping policy for FSDP1 makes a unit of a module with a trained weight and without children."""
    assert list(Logits(torch.zeros(3)).children())


MIXES = {
    "other layers": {"target_modules": ["transposed", "conv"]},
    "more layers": {"target_modules": ["linear", "transposed", "embed"]},
    "fewer layers": {"target_modules": ["linear"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    "a slice of another layer": {"target_modules": ["linear"], "target_slices": {"fused": {"left": [0, 8]}}},
    "another slice": {"target_slices": {"fused": {"right": [8, 16]}}},
    "another sharing": {"target_modules": ["linear"], "stride_A": 3, "num_B": 3, "r": 3},
    "another routing": {"target_modules": ["linear"], "routing": "sequence"},
    "one router": {"target_modules": ["linear"], "routing": "token", "shared_router": True},
    "whole modules": {"target_modules": ["linear"], "parallel_modules": ["side"]},
    "parameters": {"target_modules": [], "target_parameters": ["own.up", "own.matrix"]},
    "fewer parameters": {"target_modules": [], "target_parameters": ["own.down"]},
}


@pytest.mark.parametrize(
    "first",
    ["linear", "experts", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("slice", "parallel"))],
)
@pytest.mark.parametrize("mix", MIXES)
def test_adapters_of_different_layers_and_sharing_act_alone_and_together(first, mix, tmp_path):
    options = {"r": 2, "num_B": 2, "routing": "static", **MIXES[mix]}
    trained(first, 1).save_pretrained(tmp_path / "first")
    randomise(get_peft_model(base(), LilyConfig(**options)), scale=0.4, seed=2).save_pretrained(tmp_path / "second")
    for names in (("first", "second"), ("second", "first")):
        model = PeftModel.from_pretrained(base(), tmp_path / names[0], adapter_name=names[0]).eval()
        model.load_adapter(tmp_path / names[1], names[1])
        for name in (*names[::-1], names[0]):
            model.set_adapter(name)
            assert torch.allclose(output(model), alone(tmp_path / name), atol=1e-5), name
        model.base_model.set_adapter(list(names))
        together = output(model)
        assert not torch.allclose(together, output(base()), atol=1e-3)
        model.delete_adapter(names[0])
        model.set_adapter(names[1])
        assert torch.allclose(output(model), alone(tmp_path / names[1]), atol=1e-5)
        model.load_adapter(tmp_path / names[0], names[0])
        model.base_model.set_adapter(list(names))
        assert torch.allclose(output(model), together, atol=1e-5)


def test_an_adapter_inside_a_parallel_module_goes_before_the_one_beside_it():
    inside, beside = LilyConfig(r=2, target_modules=["inner"]), lily_config("parallel")
    model = get_peft_model(base(), beside)
    with pytest.raises(
        LilyError, match=r"blocks\.0\.side\.inner is inside blocks\.0\.side, .*exclude_modules=\['inner'\]"
    ):
        model.add_adapter("inside", inside)
    with pytest.raises(LilyError, match=r"blocks\.0\.side\.inner is inside"):
        model.add_adapter("inside", LilyConfig(r=2, target_modules="all-linear"))
    model.add_adapter("others", LilyConfig(r=2, target_modules="all-linear", exclude_modules=["inner"]))
    assert sorted(model.peft_config) == ["default", "others"]
    model = get_peft_model(base(), inside)
    model.add_adapter("beside", beside)
    expected = []
    for name, config in (("default", inside), ("beside", beside)):
        randomise(model, scale=0.4)
        model.set_adapter(name)
        expected.append(output(model))
        assert not torch.allclose(expected[-1], output(base()), atol=1e-3), config
    assert not torch.allclose(*expected, atol=1e-3)


def test_after_a_deletion_every_layer_has_the_same_active_adapter():
    model = get_peft_model(build("llama"), LilyConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("b", LilyConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("c", LilyConfig(r=4, target_modules=["v_proj"]))
    model.delete_adapter("default")
    layers = [m for m in model.modules() if isinstance(m, LilyLayer)]
    assert {tuple(layer.active_adapters) for layer in layers} == {("b",)} == {tuple(model.active_adapters)}
    assert {".b." in name for name, p in model.named_parameters() if p.requires_grad} == {True}


def test_a_deletion_through_transformers_or_one_injection_leaves_no_tensor():
    model = build("llama")
    model.add_adapter(LilyConfig(r=4, target_modules=["q_proj"]), "a")
    model.add_adapter(LilyConfig(r=2, target_modules=["v_proj"]), "b")
    model.delete_adapter("a")
    assert list(bank_of(model).plans) == ["b"]
    assert not [name for name, _ in model.named_parameters() if ".a." in name]
    model.delete_adapter("b")
    assert not [name for name, _ in model.named_parameters() if "lily_" in name]


def regrouped(tmp_path: Path) -> PeftModel:
    """An adapter whose file shares A and B between q_proj and o_proj, as stock PEFT does under an expression."""
    config = LilyConfig(r=4, stride_A=2, num_B=2, routing="batch", target_modules=r".*\.(q_proj|o_proj)")
    model = get_peft_model(build("llama"), config)
    generator = torch.Generator().manual_seed(0)
    A, B, tensors = torch.randn(4, 4, 32, generator=generator), torch.randn(8, 32, generator=generator), {}
    for name in find(model).layers:
        root = f"base_model.model.{name}"
        tensors[f"{root}.lily_A.weight"] = A[int(name.split(".")[2])].clone()
        tensors[f"{root}.lily_B.weight"] = B.clone()
        tensors[f"{root}.lily_router.weight"] = torch.randn(2, 4, generator=generator)
    model.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": r".*\.(q_proj|o_proj)"}))
    return PeftModel.from_pretrained(build("llama"), tmp_path).eval()


def test_a_copy_shares_as_the_adapter_does_whose_file_decided_the_sharing(tmp_path):
    model = regrouped(tmp_path)
    expected = predict(model, inputs("llama"))
    assert len(find(model).plan.groups) == 1
    copied(model, "default", "copy")
    model.set_adapter("copy")
    assert torch.equal(predict(model, inputs("llama")), expected)


def test_a_copy_has_a_configuration_of_its_own(tmp_path):
    model = adapted("llama", routing="token")
    copied(model, "default", "copy")
    assert model.peft_config["copy"] is not model.peft_config["default"]
    batches = [inputs("llama")]
    collapse(model, batches)
    assert (model.peft_config["default"].routing, model.peft_config["copy"].routing) == ("static", "token")
    model.set_adapter("copy")
    expected = predict(model, inputs("llama"))
    model.save_pretrained(tmp_path, selected_adapters=["copy"])
    back = PeftModel.from_pretrained(build("llama"), tmp_path / "copy").eval()
    assert torch.equal(predict(back, inputs("llama")), expected)


FEWER = {"r": 4, "num_A": 2, "num_B": 2, "target_modules": ["q_proj"]}


@pytest.mark.parametrize("wrapped", [False, True], ids=["the base model", "the wrapped model"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_second_get_peft_model_replaces_the_adapter_and_says_so(wrapped, merged, tmp_path):
    model = build("llama")
    expected = predict(model, inputs("llama"))
    static = {"routing": "static", "target_modules": ["q_proj", "v_proj"]}
    first = randomise(get_peft_model(model, LilyConfig(**{**FEWER, **static})))
    if merged:
        first.merge_adapter()
    with pytest.warns(UserWarning, match=r"already has an adapter 'default'.*unload\(\)"):
        second = get_peft_model(first if wrapped else model, LilyConfig(**FEWER, routing="token")).eval()
    assert torch.equal(predict(second, inputs("llama")), expected)
    trained = {name for name, p in second.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in second.named_parameters() if "lily_" in name}
    assert not any("v_proj.lily" in name or "lily_logits" in name for name in trained)
    randomise(second)
    second.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert torch.equal(predict(back, inputs("llama")), predict(second, inputs("llama")))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("beside", [{"modules_to_save": ["norm", "lm_head"]}, {"trainable_token_indices": [1, 3]}])
def test_a_second_get_peft_model_replaces_what_is_trained_beside_the_adapter(beside, merged, tied, tmp_path):
    model = build("llama")
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    plain, expected = copy.deepcopy(model), predict(model, inputs("llama"))
    names = set(model.state_dict())
    first = get_peft_model(model, LilyConfig(**FEWER, **beside, routing="static", task_type="CAUSAL_LM"))
    for p in first.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    if merged:
        first.merge_adapter()
    second = get_peft_model(model, LilyConfig(**FEWER, task_type="CAUSAL_LM")).eval()
    assert torch.equal(predict(second, inputs("llama")), expected)
    assert {name.replace(".base_layer", "") for name in model.state_dict() if "lily" not in name} == names
    randomise(second).save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    assert torch.equal(predict(back, inputs("llama")), predict(second, inputs("llama")))
    # a loaded one replaces it too
    other = get_peft_model(plain, LilyConfig(**FEWER, **beside, task_type="CAUSAL_LM"))
    back = PeftModel.from_pretrained(other, tmp_path).eval()
    assert torch.equal(predict(back, inputs("llama")), predict(second, inputs("llama")))


def test_an_adapter_beside_a_replaced_one_keeps_what_it_trains():
    model = build("llama")
    first = get_peft_model(model, LilyConfig(**FEWER, modules_to_save=["lm_head"]), adapter_name="first")
    get_peft_model(model, LilyConfig(**FEWER, modules_to_save=["lm_head"]), adapter_name="second")
    torch.nn.init.normal_(model.lm_head.modules_to_save["second"].weight)
    kept = model.lm_head.modules_to_save["second"].weight
    get_peft_model(model, LilyConfig(**FEWER), adapter_name="first")
    assert list(model.lm_head.modules_to_save) == ["second"]
    assert model.lm_head.modules_to_save["second"].weight is kept
    assert first.base_model.model is model


def test_a_second_get_peft_model_with_another_name_keeps_both(tmp_path):
    first = adapted("llama", routing="static")
    expected = predict(first, inputs("llama"))
    second = get_peft_model(first, LilyConfig(**FEWER), adapter_name="second")
    second.set_adapter("default")
    assert torch.equal(predict(second, inputs("llama")), expected)
    second.save_pretrained(tmp_path)
    assert torch.equal(predict(PeftModel.from_pretrained(build("llama"), tmp_path).eval(), inputs("llama")), expected)


def test_a_second_get_peft_model_that_fails_changes_nothing():
    model = build("llama")
    first = randomise(get_peft_model(model, LilyConfig(**FEWER))).eval()
    expected, names = predict(first, inputs("llama")), [name for name, _ in first.named_parameters()]
    config = first.peft_config["default"]
    for again in (model, first):
        with pytest.raises(LilyError, match="matches no module"):
            get_peft_model(again, LilyConfig(r=4, target_modules=["nothing"]))
        with pytest.raises(LilyError):
            inject_adapter_in_model(LilyConfig(r=4, target_modules=["nothing"]), model, "other")
    assert dict(first.peft_config) == {"default": config}
    assert first.peft_config["default"] is config
    assert [name for name, _ in first.named_parameters()] == names
    assert torch.equal(predict(first, inputs("llama")), expected)


def test_a_frozen_adapter_stays_frozen_when_another_one_trains(tmp_path):
    adapted("llama", routing="token").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build("llama"), tmp_path)
    model.load_adapter(tmp_path, "other", is_trainable=True)
    model.base_model.set_adapter(["default", "other"], inference_mode=True)
    model.set_requires_grad("other")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**inputs("llama")).logits.square().sum().backward()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_merging_an_adapter_that_does_not_exist_is_an_error():
    model = adapted("llama", routing="static")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(LilyError, match="cannot merge adapter 'other'; the model has default"):
            merge(adapter_names=["other"])
    assert not model.base_model.model.model.layers[0].self_attn.q_proj.merged
