"""Adapted parameters: a mixture's stacked experts and plain matrices, in models of transformers as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import VOCAB, build, inputs, predict, randomise, tally
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from lily import LilyConfig, LilyError, build_plan, export
from lily.budget import lora_parameters
from lily.layers.find import layers_of
from lily.layers.parameter import Parameter
from lily.plan.select import select_targets
from lily.plan.specs import EXPERTS, MATRIX
from lily.plan.walk import NoTargetError

pytestmark = [
    pytest.mark.sample(every=10),
    pytest.mark.filterwarnings("ignore:routing=.* on a causal model", "ignore:merging rounded"),
]

EXPERT_COUNT = 5
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": VOCAB, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "mixtral": lambda: MixtralConfig(num_local_experts=EXPERT_COUNT, **SIZES),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        num_experts=EXPERT_COUNT, moe_intermediate_size=24, shared_expert_intermediate_size=12, **SIZES
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(num_experts=EXPERT_COUNT, moe_intermediate_size=24, head_dim=8, **SIZES),
    "gpt_oss": lambda: GptOssConfig(num_local_experts=EXPERT_COUNT, head_dim=8, **SIZES),
}


def mixture(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()


def config_for(**options) -> LilyConfig:
    defaults = {"r": 3, "stride_A": 2, "num_B": 2, "target_modules": [], "target_parameters": BOTH}
    return LilyConfig(**{**defaults, "task_type": "CAUSAL_LM", **options})


def adapted(kind: str, **options) -> PeftModel:
    return randomise(get_peft_model(mixture(kind), config_for(**options)), scale=0.3).eval()


@pytest.fixture(params=sorted(CONFIGS))
def moe(request: pytest.FixtureRequest) -> str:
    return request.param


class Stack(nn.Module):
    """Experts without a router: every one sees everything."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        shape = (EXPERT_COUNT, 4, 6) if transposed else (EXPERT_COUNT, 6, 4)
        self.proj = nn.Parameter(torch.randn(shape))
        self.single = nn.Parameter(torch.randn(6, 6))
        if transposed:
            self.is_transposed = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.proj if hasattr(self, "is_transposed") else self.proj.mT
        return torch.tanh(x @ weight) @ self.single.T


class Block(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.experts = Stack(transposed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)


def stack(transposed: bool = False, **options) -> PeftModel:
    torch.manual_seed(0)
    shape = {"r": 3, "num_B": 2, "distinct": "none"}
    config = LilyConfig(**{"target_modules": [], "target_parameters": ["proj"], **shape, **options})
    return randomise(get_peft_model(Block(transposed).double(), config), scale=0.5).double()


@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"routing": "uniform"}, {"num_B": 1}, {"routing": "token", "num_B": 1}])
@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_is_its_weight_plus_its_own_update(transposed, options, stride):
    model = stack(transposed, stride_A=stride, scaling=1.5, **options)
    layer, base = model.base_model.model.experts, model.base_model.model.experts.base
    num_B = options.get("num_B", 2)
    A = model.base_model.model.lily_bank.lily_A["default"][0].view(-1, 3, 4)
    B = model.base_model.model.lily_bank.lily_B["default"][0].view(num_B, 3, 6)
    x = torch.randn(7, 4, dtype=torch.float64)
    expected = []
    for e in range(EXPERT_COUNT):
        w = torch.full((num_B,), 1 / num_B, dtype=torch.float64)
        if "routing" not in options and num_B > 1:
            w = torch.softmax(layer.logits_of("default")[e], 0)
        delta = 1.5 * sum(w[b] * B[b] for b in range(num_B)).T @ A[e // stride]  # (out, in)
        weight = base.proj[e].T if transposed else base.proj[e]
        expected.append(torch.tanh(x @ (weight + delta).T) @ base.single.T)
    assert torch.allclose(model(x), torch.stack(expected), atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradients_of_the_experts_update_are_right(transposed, stride):
    model = stack(transposed, stride_A=stride, target_parameters=["experts.proj", "experts.single"])
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 6
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *trained), fast_mode=True)


def test_the_experts_of_one_parameter_are_a_group_and_matrices_group_by_name():
    config = config_for(target_parameters=[*BOTH, "gate.weight"], num_B=3)
    plan = build_plan(select_targets(mixture("mixtral"), config), config)
    assert [group.name for group in plan.groups] == [
        "gate.weight",
        *(f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")),
    ]
    gate, first = plan.groups[:2]
    assert (gate.kind, gate.members) == (MATRIX, ("model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert (first.kind, first.shape) == (EXPERTS, (EXPERT_COUNT, 48, 16))
    assert first.blocks == ((f"{name}.0", f"{name}.1"), (f"{name}.2", f"{name}.3"), (f"{name}.4",))
    assert first.layers == (name,)
    assert "A2: " + f"{name}.4" in str(plan)


def test_the_closed_formula_counts_the_parameters_and_loras_agree_with_peft(moe):
    model = adapted(moe, target_modules=["q_proj"])
    plan = model.base_model.model.lily_bank.plans["default"]
    assert plan.parameters.total == sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = get_peft_model(mixture(moe), LoraConfig(r=2, target_modules=["q_proj"], target_parameters=BOTH))
    specs = select_targets(mixture(moe), config_for(target_modules=["q_proj"]))
    assert lora_parameters(specs, 2) == sum(p.numel() for p in lora.parameters() if p.requires_grad)


@pytest.mark.parametrize("targets", [BOTH, BOTH[1:]])
@pytest.mark.parametrize("modules", [[], ["q_proj", "v_proj"]])
def test_a_mixture_trains_saves_loads_merges_and_exports(moe, modules, targets, tmp_path):
    fresh = get_peft_model(mixture(moe), config_for(target_modules=modules, target_parameters=targets))
    batch = inputs("llama")
    base = predict(mixture(moe), batch)
    assert torch.equal(predict(fresh.eval(), batch), base)
    model = adapted(moe, target_modules=modules, target_parameters=targets)
    weights = {n: m.adapted_weight.clone() for n, m in layers_of(model).items()}
    expected = predict(model, batch)
    assert not torch.allclose(expected, base, atol=1e-3)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    back = PeftModel.from_pretrained(mixture(moe), tmp_path / "adapter").eval()
    assert torch.equal(predict(back, batch), expected)
    with model.disable_adapter():
        assert torch.equal(predict(model, batch), base)
    export.write_lora(export.as_lora(model), tmp_path / "lora")
    lora = PeftModel.from_pretrained(mixture(moe), tmp_path / "lora").eval()
    assert torch.allclose(predict(lora, batch), expected, atol=1e-5)
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(predict(model, batch), expected, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(m.adapted_weight, weights[n]) for n, m in layers_of(model).items())
    assert torch.equal(predict(model, batch), expected)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(predict(merged, batch), expected, atol=1e-5)
    assert not any(isinstance(module, Parameter) for module in merged.modules())
    assert torch.equal(predict(model.unload(), batch), base)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_of_computing_experts_sees_the_updated_weights(moe, implementation):
    model = adapted(moe)
    expected = predict(model, inputs("llama"))
    model.base_model.model.set_experts_implementation(implementation)
    assert torch.allclose(predict(model, inputs("llama")), expected, atol=1e-5)
    model.train()(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_file_holds_each_tensor_once_under_the_parameters_name(tmp_path):
    model = adapted("mixtral", num_B=3)
    model.save_pretrained(tmp_path)
    found = {k: tuple(v.shape) for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    name = "base_model.model.model.layers.0.mlp.experts.down_proj"
    assert {k: v for k, v in found.items() if k.startswith(name)} == {
        f"{name}.lily_A.weight": (3 * 3, 24),
        f"{name}.lily_B.weight": (3 * 3, 16),
        f"{name}.lily_logits": (EXPERT_COUNT, 3),
    }
    assert len(found) == 2 * 2 * 3


def test_nothing_of_the_updated_weight_is_kept_after_the_forward():
    model = adapted("mixtral")
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    predict(model, inputs("llama"))
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == before
    experts = model.base_model.model.model.layers[0].mlp.experts.base
    assert set(vars(experts)["_parameters"]) == {"gate_up_proj", "down_proj"}
    model.base_model.model.model.layers[1].mlp.experts.base.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict(model, inputs("llama"))
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == before


def test_gradient_checkpointing_gives_the_same_gradients(moe):
    def gradients(checkpointing: bool):
        model = adapted(moe).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**inputs("llama"), labels=inputs("llama")["input_ids"], use_cache=False).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_autocast_and_half_precision_keep_the_weights_dtype(moe):
    model = adapted(moe)
    expected = predict(model, inputs("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs("llama"), labels=inputs("llama")["input_ids"])
    out.loss.backward()
    assert (out.logits.float() - expected).abs().mean() < 0.02  # a router may choose another expert
    half = get_peft_model(mixture(moe).to(torch.bfloat16), config_for())
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    assert (predict(randomise(half, scale=0.3).eval(), inputs("llama")).float() - expected).abs().mean() < 0.02


def test_a_compiled_module_has_no_graph_break_and_equals_the_eager_one():
    model, x = stack(target_parameters=["experts.proj", "experts.single"]), torch.randn(3, 4, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-9)


def test_a_second_adapter_may_adapt_other_parameters_and_both_act(tmp_path):
    model = adapted("mixtral", target_parameters=BOTH[1:])
    first = predict(model, inputs("llama"))
    model.add_adapter("other", config_for(target_parameters=[*BOTH, "gate.weight"], num_B=3, routing="uniform"))
    randomise(model, scale=0.3, seed=5)
    model.set_adapter("other")
    other = predict(model, inputs("llama"))
    model.base_model.set_adapter(["default", "other"])
    both = predict(model, inputs("llama"))
    model.merge_adapter()
    assert torch.allclose(predict(model, inputs("llama")), both, atol=1e-5)
    model.unmerge_adapter()
    for name, expected in (("default", None), ("other", other)):
        model.set_adapter(name)
        model.save_pretrained(tmp_path, selected_adapters=[name])
        path = tmp_path if name == "default" else tmp_path / name
        back = PeftModel.from_pretrained(mixture("mixtral"), path).eval()
        assert torch.equal(predict(back, inputs("llama")), predict(model, inputs("llama")))
        assert expected is None or torch.equal(predict(model, inputs("llama")), expected)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(predict(model, inputs("llama")), other)
    assert not torch.allclose(first, other, atol=1e-3)


def test_a_dynamic_adapter_beside_the_experts_own_trains_as_a_second_one():
    model = adapted("mixtral")
    model.add_adapter("attention", LilyConfig(r=4, num_B=2, target_modules=["q_proj", "v_proj"], routing="token"))
    model.base_model.set_adapter(["default", "attention"])
    model(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(LilyError, match="'attention' cannot be merged"):
        model.merge_adapter()


def test_an_exported_lora_of_a_smaller_rank_is_each_experts_best(tmp_path):
    model = adapted("gpt_oss", target_parameters=BOTH[:1])
    lora = export.as_lora(model, rank=2, force=True)
    for name, layer in layers_of(model.base_model.model).items():
        u, s, v = torch.linalg.svd(layer.factors("default").delta.detach(), full_matrices=False)
        best = u[..., :2] * s[..., None, :2] @ v[..., :2, :]
        assert torch.allclose(lora.layers[name].B @ lora.layers[name].A * lora.layers[name].scale, best, atol=1e-5)
    export.write_lora(lora, tmp_path / "lora")
    back = PeftModel.from_pretrained(mixture("gpt_oss"), tmp_path / "lora")
    assert predict(back, inputs("llama")).isfinite().all()


def test_matrices_of_other_layers_are_adapted_by_their_parameter(tmp_path):
    targets = {"target_modules": [], "target_parameters": ["q_proj.weight"]}
    model = randomise(get_peft_model(build("llama"), LilyConfig(r=4, num_B=2, num_A=2, **targets))).eval()
    expected = predict(model, inputs("llama"))
    by_module = get_peft_model(
        build("llama"), LilyConfig(r=4, num_B=2, num_A=2, routing="static", target_modules=["q_proj"])
    )
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    by_module.load_state_dict(own, strict=False)
    assert torch.allclose(predict(by_module.eval(), inputs("llama")), expected, atol=1e-5)
    export.write_lora(export.as_lora(model), tmp_path / "lora")
    back = PeftModel.from_pretrained(build("llama"), tmp_path / "lora").eval()
    assert torch.allclose(predict(back, inputs("llama")), expected, atol=1e-5)
    with pytest.raises(LilyError, match=r"stock Lily adapts nn\.Linear only"):
        export.write_stock(model, tmp_path / "never")


def test_a_budget_and_a_rank_pattern_hold_for_parameters():
    config = config_for(rank_pattern={"experts.down_proj": 2})
    plan = build_plan(select_targets(mixture("mixtral"), config), config)
    assert {group.name.rpartition(".")[2]: group.r for group in plan.groups} == {"gate_up_proj": 3, "down_proj": 2}
    from lily.cli.plan_tables import folded
    from lily.plan.report import PlanRequest, plan_for

    report = plan_for(
        mixture("mixtral"),
        PlanRequest(targets=[], target_parameters=BOTH, parameters=9_000, task="CAUSAL_LM"),
        name="m",
    )
    assert report.routing == "static"
    assert 8_000 < report.parameters["total"] <= 9_000
    assert [len(groups) for groups in folded(report.groups).values()] == [2, 2]


def test_modules_by_architecture_join_where_none_are_named():
    config = config_for(target_modules=None)
    model = get_peft_model(mixture("mixtral"), config)
    kinds = {group.kind for group in model.base_model.model.lily_bank.plans["default"].groups}
    assert kinds == {"linear", EXPERTS}
    unknown = get_peft_model(Block(), LilyConfig(target_parameters=["proj"], r=2))
    assert unknown.peft_config["default"].routing == "static"


@pytest.mark.parametrize("routing", ["token", "sequence", "batch"])
def test_a_dynamic_routing_is_refused_before_anything_is_touched(routing):
    with pytest.raises(
        LilyError, match=rf"routing='{routing}' depends on tokens.*use routing='static'.*separate adapter"
    ):
        config_for(routing=routing)
    tally("inputs rejected")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu"}, "activation='relu' acts on hidden states, and target_parameters have none"),
        ({"dropout": 0.1}, "dropout=0.1 acts on hidden states"),
        ({"settled": 0.0}, "settled=0.0: routing='static' is static already"),
        ({"target_parameters": "experts.down_proj"}, r"target_parameters='experts.down_proj' is not a list of names"),
        ({"target_parameters": [""]}, "is not a list of names"),
        ({"target_parameters": []}, "target_modules is empty"),
    ],
)
def test_options_that_parameters_cannot_have_are_refused(options, message):
    with pytest.raises(LilyError, match=message):
        config_for(**options)
    tally("inputs rejected")


@pytest.mark.parametrize(
    ("targets", "modules", "message"),
    [
        (["experts.down_prj"], [], "target_parameters='experts.down_prj' matches no parameter; did you mean down_proj"),
        (["input_layernorm.weight"], [], r"input_layernorm.weight has shape \(16,\); Lily adapts matrices"),
        (["q_proj.weight"], ["q_proj"], "q_proj would be adapted both as a layer and by its parameter"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused_before_anything_is_touched(targets, modules, message):
    model = mixture("mixtral")
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(LilyError, match=message):
        get_peft_model(model, config_for(target_parameters=targets, target_modules=modules))
    assert [name for name, _ in model.named_modules()] == before
    tally("inputs rejected")


def test_a_parameter_that_matches_nothing_is_pefts_error_too():
    from peft.utils.error import NoMatchingPeftModuleError

    with pytest.raises(NoMatchingPeftModuleError):
        get_peft_model(mixture("mixtral"), config_for(target_parameters=["nothing"]))
    assert issubclass(NoTargetError, LilyError)


def test_weights_of_few_values_parametrized_ones_and_the_roots_own_are_refused():
    block = Block()
    block.own = nn.Parameter(torch.randn(3, 3))
    config = {"target_modules": [], "r": 2}
    with pytest.raises(LilyError, match="own belongs to the model itself"):
        get_peft_model(block, LilyConfig(target_parameters=["own"], **config))
    block.experts.proj = nn.Parameter(block.experts.proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(LilyError, match=r"experts\.proj has dtype torch\.float8_e4m3fn.*without quantization"):
        get_peft_model(block, LilyConfig(target_parameters=["proj"], **config))
    nn.utils.parametrize.register_parametrization(block.experts, "single", nn.Identity())
    with pytest.raises(LilyError, match=r"experts\.single has a parametrization"):
        get_peft_model(block, LilyConfig(target_parameters=["single"], **config))


@pytest.mark.parametrize("first", ["module", "parameter"])
def test_two_adapters_cannot_take_one_layer_in_two_ways(first):
    ways = {
        "module": LilyConfig(r=2, num_B=2, target_modules=["q_proj"], routing="static"),
        "parameter": LilyConfig(r=2, num_B=2, target_modules=[], target_parameters=["q_proj.weight"]),
    }
    model = get_peft_model(build("llama"), ways.pop(first))
    with pytest.raises(LilyError, match="q_proj would be adapted both as a layer and by its parameter"):
        model.add_adapter("second", next(iter(ways.values())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v[:-1] if k.endswith("lily_A.weight") else v for k, v in t.items()}, "has shape"),
        (lambda t: {k: v[:-1].clone() if k.endswith("logits") else v for k, v in t.items()}, "has shape"),
        (lambda t: {k: v for k, v in t.items() if not k.endswith("logits")}, "no lily_logits for model.layers.0.mlp"),
        (lambda t: {k.replace("down_proj", "up_proj"): v for k, v in t.items()}, "no adapted layer .*experts.*up_proj"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, message):
    adapted("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file)
    with pytest.raises(LilyError, match=message):
        PeftModel.from_pretrained(mixture("mixtral"), tmp_path)
    tally("inputs rejected")


def test_a_model_of_another_number_of_experts_is_refused(tmp_path):
    adapted("mixtral").save_pretrained(tmp_path)
    config = CONFIGS["mixtral"]()
    config.num_local_experts = EXPERT_COUNT + 2
    with pytest.raises(LilyError, match="has shape"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_config(config), tmp_path)


def test_loading_in_little_memory_and_on_the_meta_device(tmp_path):
    model = adapted("gpt_oss")
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(mixture("gpt_oss"), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(predict(back, inputs("llama")), predict(model, inputs("llama")))
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(CONFIGS["gpt_oss"]())
    planned = select_targets(base, config_for())
    assert planned == select_targets(mixture("gpt_oss"), config_for())


def test_the_update_acts_on_experts_that_accelerate_keeps_elsewhere():
    from accelerate import cpu_offload

    model = adapted("mixtral")
    expected = predict(model, inputs("llama"))
    cpu_offload(model.base_model.model.model.layers[0].mlp.experts.base, torch.device("cpu"))
    assert model.base_model.model.model.layers[0].mlp.experts.base.down_proj.is_meta
    assert torch.equal(predict(model, inputs("llama")), expected)
    assert model.base_model.model.model.layers[0].mlp.experts.base.down_proj.is_meta
