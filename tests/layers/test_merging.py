"""Static adapters fold into the weights and come out again without a trace; the others say why they cannot."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from adapters import adapted, base_bits, config_for, layers, same_bits
from helpers import build, inputs, predict, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from lily import LilyConfig, LilyError, export
from lily.layers.exact_merge import fold, unfold

pytestmark = [
    pytest.mark.sample(every=10),
    pytest.mark.filterwarnings("ignore:routing=.* on a causal model", "ignore:merging rounded"),
]

STATIC = [{"routing": "static"}, {"routing": "uniform"}, {"routing": "token", "num_B": 1}]
MERGEABLE = ["llama", "gpt2", "bert", "vit", "plain", "t5"]


@pytest.mark.parametrize("kind", MERGEABLE)
@pytest.mark.parametrize("options", STATIC, ids=lambda o: o["routing"] + str(o.get("num_B", "")))
def test_merging_computes_the_same_and_unmerging_restores_every_bit(kind, options):
    model, base = adapted(kind, **options), build(kind)
    before, expected = base_bits(model), predict(model, inputs(kind))
    assert not torch.allclose(expected, predict(base, inputs(kind)), atol=1e-3)
    model.merge_adapter(safe_merge=True)
    assert not same_bits(model, before)
    assert torch.allclose(predict(model, inputs(kind)), expected, atol=1e-5)
    model.unmerge_adapter()
    assert same_bits(model, before)
    assert torch.equal(predict(model, inputs(kind)), expected)
    assert torch.allclose(predict(model.merge_and_unload(), inputs(kind)), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_delta_weight_is_what_the_layer_adds(kind):
    model = adapted(kind, routing="static")
    for layer in layers(model).values():
        x = torch.randn(2, 5, layer.tensors_of("default")[0].shape[1])
        delta = layer.get_delta_weight("default")
        assert delta.shape == layer.get_base_layer().weight.shape
        matrix = delta if kind == "gpt2" else delta.T
        assert torch.allclose(x @ matrix, layer.update_of("default", x), atol=1e-5)


@pytest.mark.parametrize("merges", [200, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_many_merges_do_not_drift(dtype, merges):
    model = get_peft_model(build("plain").to(dtype), config_for("plain", routing="static"))
    randomise(model).eval()
    before = base_bits(model)
    model.merge_adapter()
    merged = base_bits(model)
    model.unmerge_adapter()
    for step in range(merges):
        if step % (merges // 4) == 0:  # training goes on between two synchronisations
            randomise(model, seed=step)
        model.merge_adapter()
        model.unmerge_adapter()
    assert same_bits(model, before)
    randomise(model)
    model.merge_adapter()
    assert same_bits(model, merged)


def test_an_adapter_that_changes_while_merged_still_comes_out_exactly():
    model = adapted("llama", routing="static")
    before = base_bits(model)
    model.merge_adapter()
    randomise(model, seed=9)
    model.unmerge_adapter()
    assert same_bits(model, before)


def test_a_weight_that_changes_while_merged_is_reported():
    model = adapted("plain", routing="static")
    model.merge_adapter()
    next(iter(layers(model).values())).get_base_layer().weight.data += 1
    with pytest.warns(UserWarning, match="unmerged up to rounding"):
        model.unmerge_adapter()


def test_a_change_while_merged_is_kept_and_reported_where_the_whole_weight_was_kept():
    model = randomise(
        get_peft_model(build("plain").to(torch.bfloat16), config_for("plain", routing="static")), scale=20
    )
    layer = next(iter(layers(model).values()))
    before = layer.get_base_layer().weight.float().clone()
    model.merge_adapter()
    assert layer.merged_as["default"].undo.where is None
    layer.get_base_layer().weight.data += 512
    with pytest.warns(UserWarning, match="unmerged up to rounding"):
        model.unmerge_adapter()
    assert (layer.get_base_layer().weight.float() - before).mean() > 256


def test_a_subset_of_adapters_merges():
    model = adapted("llama", routing="static")
    model.add_adapter("other", config_for("llama", routing="uniform", target_modules=["q_proj", "o_proj"]))
    randomise(model, seed=5)
    before = base_bits(model)
    model.base_model.set_adapter(["default", "other"])
    both = predict(model, inputs("llama"))
    model.set_adapter("other")
    other = predict(model, inputs("llama"))
    model.merge_adapter(adapter_names=["other"])
    assert torch.allclose(predict(model, inputs("llama")), other, atol=1e-5)
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(adapter_names=["default"])
    assert torch.allclose(predict(model, inputs("llama")), both, atol=1e-5)
    model.unmerge_adapter()
    assert same_bits(model, before)


def test_disabling_takes_a_merged_adapter_out():
    model = adapted("bert", routing="static")
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(predict(model, inputs("bert")), predict(build("bert"), inputs("bert")))


def test_unloading_takes_a_merged_adapter_out():
    model = adapted("bert", routing="static")
    model.merge_adapter()
    assert torch.equal(predict(model.unload(), inputs("bert")), predict(build("bert"), inputs("bert")))


def test_merging_and_unloading_a_merged_adapter_merges_it_once():
    model = adapted("bert", routing="static")
    expected = predict(model, inputs("bert"))
    model.merge_adapter()
    with pytest.warns(UserWarning, match="already merged"):
        merged = model.merge_and_unload()
    assert torch.allclose(predict(merged, inputs("bert")), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_tied_weight_is_refused():
    base = build("llama")
    base.config.tie_word_embeddings = True
    base.lm_head.weight = base.model.embed_tokens.weight
    model = get_peft_model(base, config_for("llama", routing="static", target_modules=["lm_head", "q_proj"]))
    randomise(model)
    before = base_bits(model)
    for act in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(LilyError, match=r"embed_tokens.weight and lm_head.* are one tensor.*untie them first"):
            act()
    assert same_bits(model, before)


def test_merging_under_autocast_is_computed_in_full_precision():
    model = adapted("llama", routing="static")
    expected = predict(model, inputs("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        model.merge_adapter()
    assert torch.allclose(predict(model, inputs("llama")), expected, atol=1e-5)


def test_an_injected_adapter_merges_layer_by_layer():
    model = inject_adapter_in_model(config_for("plain", routing="static"), build("plain"))
    randomise(model)
    expected = predict(model, inputs("plain"))
    for layer in layers(model).values():
        layer.merge()
    assert torch.allclose(predict(model, inputs("plain")), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing": "token"}, "routing='token' depends on the data; make it static first .lily.collapse"),
        ({"routing": "sequence"}, "routing='sequence' depends on the data"),
        ({"routing": "batch"}, "train the next one with `settle`"),
        ({"routing": "static", "activation": "relu"}, "activation='relu' between A and B is not linear"),
    ],
)
def test_what_is_no_matrix_is_refused_and_nothing_changes(options, message):
    model = adapted("llama", **options)
    before = base_bits(model)
    for act in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: next(iter(layers(model).values())).merge(),
        lambda: next(iter(layers(model).values())).get_delta_weight("default"),
    ):
        with pytest.raises(LilyError, match=message):
            act()
    assert same_bits(model, before)
    assert not any(layer.merged for layer in layers(model).values())


@pytest.mark.parametrize("where", ["adapter", "base"])
def test_a_safe_merge_refuses_nan_before_any_layer_is_merged(where):
    model = adapted("llama", routing="static")
    last = list(layers(model).values())[-1]
    with torch.no_grad():
        (last.get_base_layer().weight if where == "base" else last.tensors_of("default")[1])[0, 0] = float("nan")
    with pytest.raises(LilyError, match="would hold NaN or infinity; it is not merged"):
        model.merge_adapter(safe_merge=True)
    assert not any(layer.merged for layer in layers(model).values())


def test_a_safe_merge_refuses_what_half_precision_cannot_hold():
    model = randomise(get_peft_model(build("plain").half(), config_for("plain", routing="static", scaling=1e6)))
    before = base_bits(model)
    with pytest.raises(LilyError, match="would hold NaN or infinity"):
        model.merge_adapter(safe_merge=True)
    assert same_bits(model, before)


def test_a_quantized_weight_is_refused():
    class Packed(nn.Linear):
        pass

    model = build("plain")
    bits = nn.Parameter(torch.zeros(12, 8, dtype=torch.uint8), requires_grad=False)
    model.blocks[1]["up"].weight = bits
    model = get_peft_model(model, config_for("plain", routing="static", target_modules=["up"]))
    with pytest.raises(LilyError, match="load the base model unquantized"):
        model.merge_adapter()


def test_one_float8_weight_is_refused_before_any_layer_is_merged():
    base = build("plain")
    last = base.blocks[2]["up"]
    last.weight = nn.Parameter(last.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    model = randomise(get_peft_model(base, config_for("plain", routing="static", target_modules=["up"])))
    before = {n: w.view(torch.uint8) for n, w in base_bits(model).items()}
    for act in (model.merge_adapter, model.merge_and_unload, lambda: export.write_merged(model, "never")):
        with pytest.raises(LilyError, match=r"whose weight is a Parameter of torch.float8_e4m3fn.*unquantized"):
            act()
    assert {n: w.view(torch.uint8).tolist() for n, w in base_bits(model).items()} == {
        n: w.tolist() for n, w in before.items()
    }
    assert not any(layer.merged for layer in layers(model).values())


def test_a_4_bit_base_is_refused():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = build("plain")
    for block in model.blocks:
        block["up"] = bnb.nn.Linear4bit(8, 12, compute_dtype=torch.float32)
    model = get_peft_model(model, config_for("plain", routing="static", target_modules=["up"]))
    with pytest.raises(LilyError, match="cannot merge into a Linear4bit whose weight is a Params4bit"):
        model.merge_adapter()


def test_rounding_is_measured_and_reported():
    model = get_peft_model(build("llama").to(torch.bfloat16), config_for("llama", routing="static"))
    randomise(model, scale=0.03)
    before = base_bits(model)
    exact = {n: m.get_delta_weight("default") for n, m in layers(model).items()}
    with warnings.catch_warnings():
        warnings.resetwarnings()
        with pytest.warns(UserWarning, match=r"merging rounded the updates by \d+\.\d% on average"):
            model.merge_adapter()
    for name, layer in layers(model).items():
        moved = layer.get_base_layer().weight.float() - before[name].float()
        error = (moved - exact[name]).norm() / exact[name].norm()
        assert layer.rounding["default"] == pytest.approx(float(error), rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.floats(-8, 8),
)
def test_folding_is_undone_to_the_bit(seed, dtype, magnitude):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 7, generator=generator).to(dtype)
    weight[0, :3] = torch.tensor([0.0, -0.0, 1e-7])
    delta = (torch.randn(5, 7, generator=generator) * 10**magnitude).to(torch.promote_types(dtype, torch.float32))
    merged, undo, error = fold(weight, delta)
    back, exact = unfold(merged, delta, undo)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    assert torch.equal(back.view(bits), weight.view(bits))
    assert exact
    assert error >= 0


def test_pefts_own_conversion_to_lora_works(tmp_path):
    model = adapted("llama", routing="static", target_modules="all-linear")
    assert model.supports_lora_conversion()
    expected = predict(model, inputs("llama"))
    config, state = peft.convert_to_lora(model, rank=4)
    assert not any("lily" in key for key in state)
    back = get_peft_model(build("llama"), config).eval()
    peft.set_peft_model_state_dict(back, state)
    assert torch.allclose(predict(back, inputs("llama")), expected, atol=1e-4)
    peft.save_as_lora(tmp_path / "lora", model, rank=4)
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "lora")
    assert torch.allclose(predict(again, inputs("llama")), expected, atol=1e-4)


def test_pefts_conversion_refuses_what_depends_on_the_data():
    model = adapted("llama", routing="token")
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(model, rank=4)


def test_an_untrained_static_adapter_merges_to_the_same_bits():
    model = get_peft_model(build("bert"), LilyConfig(r=4, num_B=2, routing="static", target_modules=["query"]))
    before = base_bits(model)
    model.merge_adapter()
    assert same_bits(model, before)
