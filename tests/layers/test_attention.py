"""`nn.MultiheadAttention`: torch's own function judges it, and PEFT's LoRA adapts the same beside it."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from helpers import randomise
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn

import lily
from lily import LilyConfig, LilyError, build_plan, export, functional, select_modules
from lily.budget import lora_parameters
from lily.layers.attention import CallingAttention
from lily.layers.find import layers_of

pytestmark = [
    pytest.mark.sample(every=8),
    pytest.mark.filterwarnings("ignore:PEFT .* adds the update of out_proj", "ignore:enable_nested_tensor is True"),
]
ROUTINGS = ("token", "sequence", "batch", "static", "uniform")
E, HEADS = 8, 2


class Attending(nn.Module):
    """An attention in a model."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(E, HEADS, **options)

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


def adapted(routing="static", base=None, **options) -> PeftModel:
    values = {"r": 4, "num_B": 2, "routing": routing, "target_modules": ["attn"], "scaling": 1.5, **options}
    model = get_peft_model(Attending(batch_first=True) if base is None else base, LilyConfig(**values))
    return randomise(model, scale=0.3).eval()


def states(*shape: int, seed: int = 1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def update(layer, x, mask=None):
    """The update of one projection for x (batch, tokens, E), by the reference."""
    A, B = layer.tensors_of("default")
    routing = layer.settings["default"].routing
    return functional.lily(x, A, B, layer.router_of("default"), routing=routing, scaling=1.5, mask=mask)


def judged(base, layers, query, key, value, key_padding_mask=None, **call):
    """torch's function of projected inputs, whose own projections are the identity."""
    batched = query.dim() == 3
    by_sample = [x[None] if not batched else x if base.batch_first else x.transpose(0, 1) for x in (query, key, value)]
    padding = key_padding_mask if batched or key_padding_mask is None else key_padding_mask[None]
    kept = None if padding is None else ~padding
    masks = [kept if key is query or value is query else None, kept, kept]
    q, k, v = (
        F.linear(x, W, b) + update(layers["attn.in_proj"], x, mask)[..., i * E : (i + 1) * E]
        for i, (x, W, b, mask) in enumerate(
            zip(
                by_sample,
                base.in_proj_weight.chunk(3),
                [None] * 3 if base.in_proj_bias is None else base.in_proj_bias.chunk(3),
                masks,
                strict=True,
            )
        )
    )
    one = torch.eye(E, dtype=q.dtype)
    context, weights = F.multi_head_attention_forward(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), E, HEADS, None, None, base.bias_k, base.bias_v,
        base.add_zero_attn, base.dropout, one, None, base.training, padding, use_separate_proj_weight=True,
        q_proj_weight=one, k_proj_weight=one, v_proj_weight=one, **call,
    )  # fmt: skip
    context = context.transpose(0, 1)
    out = base.out_proj.base_layer(context) + update(layers["attn.out_proj"], context, masks[0])
    out = out if base.batch_first or not batched else out.transpose(0, 1)
    if weights is not None and not batched:
        weights = weights[0]
    return (out if batched else out[0]), weights


PADDED = torch.arange(5) >= torch.tensor([[5], [3]])
CAUSAL = torch.triu(torch.full((5, 5), -torch.inf, dtype=torch.float64), 1)
CASES = {  # options of the attention, shapes of query, key and value (repeated: the same tensor), arguments
    "self": ({}, "aaa", (5, 2), {}),
    "self, padded": ({"batch_first": True}, "aaa", (2, 5), {"key_padding_mask": PADDED, "need_weights": False}),
    "cross": (
        {"batch_first": True, "bias": False},
        "abb",
        (2, 5),
        {"key_padding_mask": PADDED, "average_attn_weights": False},
    ),
    "three inputs": (
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
        "abc",
        (2, 5),
        {"attn_mask": torch.rand(4, 5, 5, generator=torch.Generator().manual_seed(0)) > 0.7, "need_weights": False},
    ),
    "other values": ({"dropout": 0.3}, "aab", (5, 2), {"attn_mask": CAUSAL}),
    "no batch": ({}, "aaa", (5,), {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    "no batch, cross": ({}, "abb", (5,), {"key_padding_mask": PADDED[1]}),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("case", CASES)
def test_it_is_torchs_function_of_adapted_projections(case, routing):
    options, which, shape, call = CASES[case]
    model = adapted(routing, Attending(**options)).double()
    base, layers = model.base_model.model.attn, layers_of(model.base_model.model)
    base.train("dropout" in options)
    inputs = {letter: states(*shape, seed=i, dtype=torch.float64) for i, letter in enumerate("abc")}
    given = [inputs[letter] for letter in which]
    torch.manual_seed(0)
    out, weights = model(*given, **call)
    torch.manual_seed(0)
    expected = judged(base, layers, *given, **call)
    assert torch.allclose(out, expected[0], atol=1e-12)
    assert (weights is None) == (expected[1] is None)
    if weights is not None:
        assert torch.allclose(weights, expected[1], atol=1e-12)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradients_reach_every_tensor_and_are_right(routing):
    model = adapted(routing, own_r=1, gain="ones").double()
    x = states(2, 3, dtype=torch.float64).requires_grad_()
    y = states(2, 4, seed=2, dtype=torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: model(x, y, y)[0], (x, *trained), fast_mode=True)
    model(x, y, y)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trained)


def test_untrained_it_is_the_base_model_and_has_loras_parameters_and_names():
    x = states(2, 5)
    config = LilyConfig(r=4, num_B=1, num_A=1, target_modules=["attn"], scaling=1.0)
    fresh = get_peft_model(Attending(batch_first=True), config).eval()
    with torch.no_grad():
        assert torch.allclose(fresh(x, x, x)[0], Attending(batch_first=True).eval()(x, x, x)[0], atol=1e-6)
    lora = get_peft_model(Attending(), LoraConfig(r=4, target_modules=["attn"]))
    size = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    specs = select_modules(Attending(), config)
    assert [spec.name for spec in specs] == ["attn.in_proj", "attn.out_proj"]
    assert lora_parameters(specs, 4) == size == sum(p.numel() for p in fresh.parameters() if p.requires_grad)
    with torch.device("meta"):
        assert build_plan(select_modules(Attending(), config), config).parameters.total == size
    assert not [key for key in fresh.state_dict() if "in_proj.base_layer" in key]


@pytest.mark.parametrize("bias", ["all", "lily_only"])
def test_the_biases_that_train_are_those_of_the_file(bias):
    config = LilyConfig(r=4, num_B=1, target_modules=["attn"], bias=bias)
    model = get_peft_model(Attending(batch_first=True), config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert trained == {name for name in peft.get_peft_model_state_dict(model) if name.endswith("bias")} != set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:merging rounded")
def test_merging_computes_the_same_and_unmerging_restores_every_bit(dtype):
    model = adapted("static").to(dtype)
    x, close = states(2, 5, dtype=dtype), 1e-5 if dtype == torch.float32 else 0.05
    own = {name: tensor.clone() for name, tensor in Attending(batch_first=True).to(dtype).state_dict().items()}
    expected = model(x, x, x)[0]
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(model(x, x, x)[0], expected, atol=close)
    with model.disable_adapter():
        assert torch.equal(model(x, x, x)[0], Attending(batch_first=True).to(dtype).eval()(x, x, x)[0])
    model.merge_adapter()
    model.unmerge_adapter()
    attention = model.base_model.model.attn
    assert torch.equal(attention.in_proj_weight, own["attn.in_proj_weight"])
    assert torch.equal(attention.out_proj.weight, own["attn.out_proj.weight"])
    merged = model.merge_and_unload()
    assert type(merged.attn) is nn.MultiheadAttention
    assert list(merged.state_dict()) == list(own)
    assert torch.allclose(merged(x, x, x)[0], expected, atol=close)


@pytest.mark.parametrize("routing", ["token", "static"])
def test_it_is_saved_and_loaded_and_two_adapters_act_alone_together_and_by_row(routing, tmp_path):
    x = states(3, 5)
    model = adapted(routing, distinct="permute+signs", own_r=2, init_weights="orthonormal")
    first = model(x, x, x)[0]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Attending(batch_first=True), tmp_path).eval()
    assert torch.equal(again(x, x, x)[0], first)
    injected = inject_adapter_in_model(
        LilyConfig(**{**model.peft_config["default"].to_dict(), "target_modules": None, "peft_type": None}),
        Attending(batch_first=True),
        state_dict=peft.get_peft_model_state_dict(model),
    )
    set_peft_model_state_dict(injected, peft.get_peft_model_state_dict(model))
    assert torch.equal(injected.eval()(x, x, x)[0], first)
    again.load_adapter(str(tmp_path), "twin")
    again.add_adapter("out", LilyConfig(r=2, num_B=2, routing="uniform", target_modules=["out_proj"]))
    randomise(again, seed=5, scale=0.3)
    alone = {}
    for name in ("default", "out"):
        again.set_adapter(name)
        alone[name] = again(x, x, x)[0]
    with again.disable_adapter():
        alone["__base__"] = again(x, x, x)[0]
    mixed = again(x, x, x, adapter_names=["out", "__base__", "default"])[0]
    for i, name in enumerate(("out", "__base__", "default")):
        assert torch.allclose(mixed[i], alone[name][i], atol=1e-5)
    again.base_model.set_adapter(["default", "out"])
    assert not torch.allclose(again(x, x, x)[0], alone["out"], atol=1e-3)
    for name in ("default", "twin"):
        again.delete_adapter(name)
    assert torch.allclose(again(x, x, x)[0], alone["out"], atol=1e-6)
    again.delete_adapter("out")
    assert type(again.base_model.model.attn) is nn.MultiheadAttention
    assert [name for name, _ in again.base_model.model.attn.named_children()] == ["out_proj"]


def test_scales_act_as_on_loras_layers():
    model, x = adapted("token"), states(2, 5)
    base = Attending(batch_first=True).eval()(x, x, x)[0]
    layers = layers_of(model.base_model.model).values()
    for layer in layers:
        layer.set_scale("default", 0.0)
    assert torch.allclose(model(x, x, x)[0], base, atol=1e-6)
    for layer in layers:
        layer.unscale_layer()
        layer.scale_layer(2.0)
    assert {layer.scaling["default"] for layer in layers} == {3.0}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"target_modules": ["attn"]}, ["in_proj", "out_proj"]),
        ({"target_modules": ["in_proj"]}, ["in_proj"]),
        ({"target_modules": "all-linear"}, ["out_proj"]),
        ({"target_modules": r".*attn", "exclude_modules": ["out_proj"], "own_r": 2, "gain": "signs"}, ["in_proj"]),
        (
            {"target_modules": ["attn"], "rank_pattern": {"out_proj": 2}, "scaling_pattern": {"in_proj": 0.7}},
            ["in_proj", "out_proj"],
        ),
        (
            {"target_modules": ["attn"], "target_slices": {"in_proj": ["q", "v"]}},
            ["in_proj.q", "in_proj.v", "out_proj"],
        ),
    ],
)
def test_an_exported_lora_computes_the_same_in_peft(options, names, tmp_path):
    model, x, y = adapted("static", **options), states(2, 5), states(2, 4, seed=2)
    assert set(layers_of(model.base_model.model)) == {f"attn.{name}" for name in names}
    expected = model(x, y, y)[0]
    assert not torch.allclose(expected, Attending(batch_first=True)(x, y, y)[0], atol=1e-2)
    export.write_lora(export.as_lora(model), tmp_path / "lora")
    back = PeftModel.from_pretrained(Attending(batch_first=True), tmp_path / "lora").eval()
    assert type(back.base_model.model.attn).__module__ == "peft.tuners.lora.layer"
    assert torch.allclose(back(x, y, y)[0], expected, atol=1e-5)


def test_the_export_says_for_which_peft_it_is(monkeypatch):
    from lily.deploy import attention

    monkeypatch.setattr(attention, "times_applied", lambda: 1)
    B = "base_model.model.attn.base_layer.out_proj.lora_B.weight"
    right = export.as_lora(adapted("static")).state_dict()[B]
    monkeypatch.setattr(attention, "times_applied", lambda: 2)
    with pytest.warns(UserWarning, match=r"adds the update of out_proj to an nn.MultiheadAttention 2 times"):
        half = export.as_lora(adapted("static")).state_dict()[B]
    assert torch.equal(half, right / 2)


def encoder(nested: bool, batch_first: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, HEADS, 12, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("targets", "routing"),
    [(["self_attn"], "token"), (["out_proj"], "sequence"), (["self_attn", "linear1", "linear2"], "sequence"),
     (["linear1"], "static")],
)  # fmt: skip
def test_torchs_encoder_calls_its_adapted_layers_and_masks_reach_them(targets, routing, nested):
    model = adapted(routing, encoder(nested), target_modules=targets)
    x = states(2, 5)
    trained = model(x, src_key_padding_mask=PADDED)
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=PADDED)
        assert torch.allclose(fast, trained, atol=1e-5)
        assert torch.allclose(model(x[1:, :3]), fast[1:, :3], atol=1e-5)
        assert not torch.allclose(encoder(nested)(x, src_key_padding_mask=PADDED)[0], fast[0], atol=1e-2)
        base = model.unload()
        assert torch.equal(base(x, src_key_padding_mask=PADDED), encoder(nested)(x, src_key_padding_mask=PADDED))
    assert base.use_nested_tensor == nested
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_a_decoder_attends_to_a_padded_memory():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(E, HEADS, 12, batch_first=True)
    model = adapted("sequence", nn.TransformerDecoder(layer, 1), target_modules=["multihead_attn", "linear1"])
    x, memory = states(2, 4), states(2, 5, seed=2)
    padded = model(x, memory, memory_key_padding_mask=PADDED)
    assert torch.allclose(model(x[1:], memory[1:, :3]), padded[1:], atol=1e-5)


def test_collapsing_the_null_space_and_a_start_from_data_see_the_inputs():
    x, y = states(2, 5), states(2, 4, seed=2)
    batches = [{"query": x, "key": y, "value": y}]
    model = adapted("token")
    report = lily.collapse(model, batches, forward=lambda model, batch: model(**batch)[0])
    assert {layer.name for layer in report.layers} == {"attn.in_proj", "attn.out_proj"}
    fresh = get_peft_model(Attending(batch_first=True), LilyConfig(r=2, target_modules=["attn"], init_weights="data"))
    started = lily.initialize_from_data(fresh, batches)
    assert set(started.explained) == {"attn.in_proj", "attn.out_proj"}
    far = (model(x, y, y)[0] - Attending(batch_first=True)(x, y, y)[0]).norm()
    lily.null_space(model, batches, rank=7)
    assert (model(x, y, y)[0] - Attending(batch_first=True)(x, y, y)[0]).norm() < 0.9 * far


def test_a_copy_is_of_its_own_and_a_compiled_one_has_no_graph_break():
    model, x = adapted("token"), states(2, 5)
    expected = model(x, x, x)[0]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.base_model.model.attn.in_proj_weight.zero_()
    assert torch.equal(model(x, x, x)[0], expected)
    assert not torch.equal(twin(x, x, x)[0], expected)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x, x, x)[0], expected, atol=1e-6)


@pytest.mark.parametrize("routing", ["token", "static"])
def test_it_trains_under_autocast_and_in_half_precision(routing):
    for model, autocast in ((adapted(routing), True), (adapted(routing).to(torch.bfloat16), False)):
        x = states(2, 5, dtype=torch.float32 if autocast else torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model.train()(x, x, x)[0]
        out.float().square().sum().backward()
        assert out.dtype == torch.bfloat16
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_subclass_keeps_its_class_and_accelerates_forward_is_followed():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Own(nn.MultiheadAttention):
        pass

    x = states(2, 5)
    base = Attending(batch_first=True)
    expected = adapted("token")(x, x, x)[0]
    base.attn.__class__ = Own
    add_hook_to_module(base.attn, ModelHook())
    model = adapted("token", base)
    assert isinstance(base.attn, Own)
    assert isinstance(base.attn, CallingAttention)
    assert torch.equal(model(x, x, x)[0], expected)
    model.unload()
    assert type(base.attn) is Own
    assert torch.equal(base(x, x, x)[0], Attending(batch_first=True).eval()(x, x, x)[0])


class Quantized(nn.Linear):
    pass


def quantized() -> nn.Module:
    base = Attending()
    base.attn.out_proj = Quantized(E, E)
    return base


def with_forward() -> nn.Module:
    base = Attending()
    base.attn.__class__ = type("Rotary", (nn.MultiheadAttention,), {"forward": lambda self, x: x})
    return base


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Attending(kdim=4, vdim=6),
            "attn is an nn.MultiheadAttention with kdim=4 and vdim=6 beside embed_dim=8",
        ),
        (quantized, "attn is a MultiheadAttention that an adapter cannot follow: .* not quantized"),
        (with_forward, "attn is a Rotary that an adapter cannot follow"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_changes_nothing(make, message):
    base = make()
    kind = type(base.attn)
    with pytest.raises(LilyError, match=message):
        get_peft_model(base, LilyConfig(target_modules=["attn"]))
    assert type(base.attn) is kind
    good = Attending()
    with pytest.raises(LilyError, match="matches no group"):
        get_peft_model(good, LilyConfig(target_modules=["attn"], group_options={"mlp": {"num_B": 1}}))
    assert [name for name, _ in good.attn.named_children()] == ["out_proj"]


def test_with_other_sizes_of_keys_the_output_projection_is_adapted():
    base = Attending(kdim=4, vdim=6, batch_first=True)
    model = adapted("static", base, target_modules=["out_proj"])
    query, key, value = states(2, 5), torch.randn(2, 3, 4), torch.randn(2, 3, 6)
    expected = model(query, key, value)[0]
    with pytest.raises(LilyError, match=r"peft reads no LoRA of an nn\.MultiheadAttention with kdim or vdim"):
        export.as_lora(model)
    assert torch.allclose(model.merge_and_unload()(query, key, value)[0], expected, atol=1e-6)


def test_readers_that_cannot_apply_it_are_named(tmp_path):
    model = adapted("static")
    with pytest.raises(LilyError, match=r"vllm reads no LoRA of an nn\.MultiheadAttention, whose .* is adapted"):
        export.as_lora(model, target="vllm")
    with pytest.raises(
        LilyError, match=r"stock Lily does nothing on attn\.in_proj, since torch\.nn\.MultiheadAttention"
    ):
        export.write_stock(model, "never")
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(model, rank=2)
    adapted("batch").save_pretrained(tmp_path)
    assert '"LILY_PEFT"' in (tmp_path / "adapter_config.json").read_text()


def test_the_pooling_head_of_siglip_is_adapted_by_all_linear():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = SiglipVisionModel(SiglipVisionConfig(**small, image_size=8, patch_size=4)).eval()
    pixels = torch.randn(2, 3, 8, 8)
    before = base(pixels).pooler_output.detach()
    model = adapted("sequence", base, target_modules="all-linear", exclude_modules=r".*(encoder|mlp).*")
    (name,) = layers_of(model.base_model.model)
    assert name.endswith("head.attention.out_proj")
    assert not torch.allclose(model(pixels).pooler_output, before, atol=1e-3)
