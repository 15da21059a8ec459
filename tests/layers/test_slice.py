"""Adapters on slices of fused projections."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import randomise
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, Phi3Config

from lily import LilyConfig, functional
from lily.errors import LilyError
from lily.export import as_lora, write_lora
from lily.layers.layer import LilyLayer
from lily.layers.slice import Slice
from lily.plan.config import EXTENDED_TYPE
from lily.plan.fused_layouts import Rows
from lily.plan.specs import layer_spec
from lily.tuner.adapter import find

pytestmark = pytest.mark.filterwarnings("ignore:routing=.* on a causal model")

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 1, 2, 8, 5, 5]])
COMMON = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 20}
EDGES = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS = {
    "phi3": (Phi3Config(**COMMON, num_key_value_heads=2, intermediate_size=48, **EDGES), "qkv_proj"),
    "gpt_neox": (GPTNeoXConfig(**COMMON, intermediate_size=48), "query_key_value"),  # interleaved heads
    "gpt2": (GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=20), "c_attn"),  # (in, out)
}


@pytest.fixture(params=sorted(KINDS))
def fused(request):
    return request.param


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(KINDS[kind][0]).eval()


def adapted(kind: str, routing: str = "token", **options: object) -> PeftModel:
    config = LilyConfig(
        **{
            "r": 4,
            "stride_A": 2,
            "num_B": 3,
            "routing": routing,
            "scaling": 1.0,
            "target_slices": {KINDS[kind][1]: ["v", "k"]},
            **options,
        }
    )
    torch.manual_seed(1)
    return randomise(get_peft_model(base(kind), config)).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def named(module: nn.Module, part: str) -> Slice:
    return next(layer for layer in module.nested if layer.part == part)


def rows(module: nn.Module, part: str) -> torch.Tensor:
    """Output numbers of a slice."""
    return named(module, part).rows.view(torch.arange(layer_spec(part, module).out_features)).flatten()


def test_slices_equal_the_formula_on_their_outputs_and_leave_the_rest(fused, routing):
    model = adapted(fused, routing)
    found = find(model)
    torch.manual_seed(2)
    x = torch.randn(2, 5, 32)
    for path in {name.rpartition(".")[0] for name in found.layers}:
        module = found.root.get_submodule(path)
        expected = module.get_base_layer()(x)
        for part in ("k", "v"):
            layer = named(module, part)
            A, B = layer.tensors_of("default")
            update = functional.lily(x, A, B, layer.router_of("default"), routing=routing)
            expected[..., rows(module, part)] += update
        with torch.no_grad():
            assert torch.allclose(module(x), expected, atol=1e-5)
    slots = found.plan.slots
    assert {group.name for group in found.plan.groups} == {f"{KINDS[fused][1]}.k", f"{KINDS[fused][1]}.v"}
    assert len({slot.A for slot in slots.values()}) == 4  # 3 layers in blocks of 2, for k and for v


def test_gradients_equal_those_of_the_formula(fused, routing):
    model = adapted(fused, routing).train()
    found = find(model)
    path = next(iter(found.layers)).rpartition(".")[0]
    module = found.root.get_submodule(path)
    torch.manual_seed(2)
    x, weight = torch.randn(2, 40, 32, requires_grad=True), torch.randn(2, 40, layer_spec("", module).out_features)
    wanted = [p for p in found.root.parameters() if p.requires_grad]
    got = torch.autograd.grad((module(x) * weight).sum(), [x, *wanted], allow_unused=True)
    y = module.get_base_layer()(x)
    for part in ("k", "v"):
        layer = named(module, part)
        A, B = layer.tensors_of("default")
        update = functional.lily(x, A, B, layer.router_of("default"), routing=routing)
        y = y.index_add(-1, rows(module, part), update)
    expected = torch.autograd.grad((y * weight).sum(), [x, *wanted], allow_unused=True)
    for g, e in zip(got, expected, strict=True):
        assert (g is None) == (e is None)
        assert g is None or torch.allclose(g, e, atol=1e-4)


def test_an_untrained_adapter_changes_nothing(fused, routing):
    config = LilyConfig(r=4, num_B=3, routing=routing, target_slices={KINDS[fused][1]: ["q"]})
    assert torch.equal(logits(get_peft_model(base(fused), config).eval()), logits(base(fused)))


def test_saving_and_loading_gives_the_same_model(fused, routing, tmp_path):
    model = adapted(fused, routing)
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(base(fused), tmp_path).eval()
    assert torch.equal(logits(back), logits(model))
    assert not torch.allclose(logits(back), logits(base(fused)), atol=1e-3)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == EXTENDED_TYPE


@pytest.mark.parametrize("routing", ["static", "uniform"])
def test_merging_is_exact_and_unmerging_restores_every_bit(fused, routing):
    model = adapted(fused, routing)
    expected = logits(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    assert torch.allclose(logits(model), expected, atol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    plain = model.merge_and_unload()
    assert not any(isinstance(m, LilyLayer) for m in plain.modules())
    assert torch.allclose(logits(plain), expected, atol=1e-4)


@pytest.mark.parametrize("routing", ["static", "uniform"])
def test_the_exported_lora_computes_the_same(fused, routing, tmp_path):
    model = adapted(fused, routing, scaling=0.7)
    export = as_lora(model)
    assert export.rank == 8
    write_lora(export, tmp_path / "lora")
    lora = PeftModel.from_pretrained(base(fused), tmp_path / "lora").eval()
    assert torch.allclose(logits(lora), logits(model), atol=1e-4)
    delta = find(model).layers[next(iter(find(model).layers))].get_delta_weight("default")
    assert delta.shape == find(model).root.get_submodule(next(iter(export.layers))).get_base_layer().weight.shape


def test_a_second_adapter_and_unloading(fused):
    model = adapted(fused, "static")
    first = logits(model)
    model.add_adapter("more", LilyConfig(r=2, num_B=2, routing="token", target_slices={KINDS[fused][1]: ["q", "v"]}))
    model.set_adapter("more")
    randomise(model)
    model.set_adapter("default")
    assert not torch.equal(logits(model), first)  # it was made random again too
    model.delete_adapter("more")
    assert torch.allclose(logits(model.unload()), logits(base(fused)), atol=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_slices": {"qkv_proj": ["w"]}}, "no slice 'w'; it has q, k, v"),
        ({"target_slices": {"qkv": ["k"]}, "target_modules": ["o_proj"]}, "'qkv', which matches no adapted layer"),
        ({"target_slices": {"o_proj": ["k"]}}, "the layout of .*o_proj is not known"),
        ({"target_slices": {"o_proj": {"k": [0, 99]}}}, "does not fit .*o_proj, which has 32 outputs"),
        ({"target_slices": {"qkv_proj": []}}, "is not valid; write"),
        ({"target_slices": ["qkv_proj"]}, "is not valid; write"),
        ({"target_slices": {"norm": ["k"]}}, "RMSNorm"),
    ],
)
def test_slices_that_cannot_be_are_refused_before_anything_is_touched(options, says):
    model = base("phi3")
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(LilyError, match=says):
        get_peft_model(model, LilyConfig(r=4, **options))
    assert [n for n, _ in model.named_modules()] == names


def test_an_explicit_layout_means_the_same_as_a_known_one():
    known = adapted("phi3")
    said = adapted("phi3", target_slices={"qkv_proj": {"k": [32, 48], "v": [48, 64]}})
    assert find(said).plan == find(known).plan
    assert torch.equal(logits(said), logits(known))
    assert find(said).plan.groups[0].rows == Rows(32, 48, 64)
