"""State-space models: adapters act where mixers read weights without calling their layers, and decoding is exact."""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import VOCAB, randomise
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    FalconMambaConfig,
    JambaConfig,
    Mamba2Config,
    MambaConfig,
)

import lily
from lily import LilyConfig, LilyError, export
from lily.plan.uncalled_layers import uncalled
from lily.recipes.offline.vision_mamba import VisionMambaConfig, VisionMambaForImageClassification
from lily.tuner import call_uncalled

pytestmark = pytest.mark.sample(every=10)

SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.5}
CONFIGS = {
    "mamba": MambaConfig(**SMALL, state_size=4),
    "falcon_mamba": FalconMambaConfig(**SMALL, state_size=4),
    "mamba2": Mamba2Config(**SMALL, state_size=4, num_heads=4, head_dim=8, n_groups=2, chunk_size=4),
    "jamba": JambaConfig(
        **SMALL, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, num_experts=2,
        num_experts_per_tok=1, mamba_d_state=4, mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1,
    ),
}  # fmt: skip
PURE = ("mamba", "falcon_mamba", "mamba2")
FUSED = {"mamba": "mamba_inner_fn", "falcon_mamba": "mamba_inner_fn", "mamba2": "mamba2_split_conv1d_scan_combined"}
READ = [(k, t) for k in ("mamba", "falcon_mamba") for t in ("x_proj", "dt_proj", "out_proj")] + [("mamba2", "out_proj")]
PROJECTIONS = {
    "mamba": ["in_proj", "x_proj", "dt_proj", "out_proj"],
    "falcon_mamba": ["in_proj", "x_proj", "dt_proj", "out_proj"],
    "mamba2": ["in_proj", "out_proj"],
    "jamba": ["in_proj", "x_proj", "dt_proj", "out_proj"],
}
IDS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


def base(kind: str) -> Any:
    torch.manual_seed(0)
    # Frozen already, because the convolution picks its kernel by what requires grad.
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind])).eval().requires_grad_(False)


def adapted(kind: str, targets: Any, model: nn.Module | None = None, **options: Any) -> PeftModel:
    options = {"r": 4, "num_B": 3, "stride_A": 2, "task_type": "CAUSAL_LM", **options}
    return randomise(get_peft_model(model or base(kind), LilyConfig(target_modules=targets, **options))).eval()


def logits(model: nn.Module, ids: Tensor = IDS, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **options).logits


def home(kind: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")


def mixers_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if "A_log" in m._parameters]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A fused kernel that ignores every projection, in all three architectures; its calls are counted."""
    calls: list[str] = []

    def ignores_projections(projected: Tensor, *_: Any, **__: Any) -> Tensor:
        calls.append("fused")
        tokens = projected.transpose(1, 2) if projected.shape[-1] == IDS.shape[1] else projected
        return tokens[..., : SMALL["hidden_size"]]

    for kind, name in FUSED.items():
        monkeypatch.setattr(home(kind), name, ignores_projections)
    return calls


@pytest.mark.parametrize(("kind", "target"), READ)
def test_an_adapter_on_what_a_fused_kernel_reads_acts_in_training_as_in_evaluation(kind, target, kernel):
    model = adapted(kind, [target])
    in_evaluation, untouched = logits(model), logits(base(kind))
    model.train()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    assert not kernel
    torch.testing.assert_close(out.logits.detach(), in_evaluation)
    assert (in_evaluation - untouched).abs().max() > 1e-3
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients
    assert all(g is not None and g.abs().max() > 0 for g in gradients.values())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", PURE)
def test_mixers_without_such_an_adapter_keep_their_kernel(kind, kernel):
    adapted(kind, ["in_proj"]).train()(input_ids=IDS)
    assert len(kernel) == 2
    adapted(kind, ["in_proj", "out_proj"], layers_to_transform=[1]).train()(input_ids=IDS)
    assert len(kernel) == 3


@pytest.mark.parametrize("leave", ["unload", "delete_adapter", "disable_adapter", "merge", "set_adapter"])
def test_a_mixer_takes_its_kernel_again_when_no_adapter_acts_in_it(leave, kernel):
    model = adapted("mamba", ["dt_proj", "out_proj"], num_B=1).train()
    if leave == "unload":
        model.unload()(input_ids=IDS)
    elif leave == "delete_adapter":
        model.delete_adapter("default")
        model.base_model.model(input_ids=IDS)
    elif leave == "set_adapter":
        model.add_adapter("second", LilyConfig(target_modules=["in_proj"], r=4, task_type="CAUSAL_LM"))
        model.set_adapter("second")
        model(input_ids=IDS)
    elif leave == "merge":
        model.merge_adapter()
        model(input_ids=IDS)
    else:
        with model.disable_adapter():
            model(input_ids=IDS)
    assert len(kernel) == 2
    hooks = [hook for m in mixers_of(model) for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert bool(hooks) == (leave not in ("unload", "delete_adapter"))


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_untrained_adapter_on_every_linear_layer_changes_nothing(kind):
    untouched = logits(base(kind))
    config = LilyConfig(r=4, num_B=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base(kind), config).eval()
    names = {name.rpartition(".")[2] for name in model.base_model.model.lily_bank.plans["default"].slots}
    assert set(PROJECTIONS[kind]) <= names
    assert "conv1d" not in names
    assert torch.equal(logits(model), untouched)


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "jamba"])
@pytest.mark.parametrize("routing", ["token", "static"])
def test_the_time_step_gets_the_update_of_the_formula(kind, routing, monkeypatch):
    model, seen = adapted(kind, ["dt_proj"], routing=routing, activation="silu", scaling=0.7), {}
    scan = home(kind).mamba_selective_scan

    def noting(hidden: Tensor, time_step: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.setdefault("time_step", time_step)
        return scan(hidden, time_step, *args, **kwargs)

    monkeypatch.setattr(home(kind), "mamba_selective_scan", noting)
    mixer = mixers_of(model)[0]
    mixer.x_proj.register_forward_hook(lambda _m, _i, out: seen.setdefault("x_proj", out))
    logits(model)
    low = seen["x_proj"][..., : mixer.time_step_rank]
    if hasattr(mixer, "dt_layernorm"):
        low = mixer.dt_layernorm(low)
    layer = mixer.dt_proj
    (A, B), router = layer.tensors_of("default"), layer.router_of("default")
    h = F.silu(low @ A.T)
    p = (h @ router.T).softmax(-1) if routing == "token" else router.softmax(-1).expand(*h.shape[:2], 3)
    expected = low @ layer.base_layer.weight.T + 0.7 * torch.einsum("bte,btr,ero->bto", p, h, B)
    torch.testing.assert_close(seen["time_step"], expected.transpose(1, 2))


def test_a_mixer_of_a_quantized_model_which_calls_its_time_step_gets_the_same_update():
    model = adapted("falcon_mamba", ["dt_proj"])
    by_product = logits(model)
    model.config._is_quantized = True
    torch.testing.assert_close(logits(model), by_product)


@pytest.mark.parametrize("kind", PURE)
def test_decoding_with_the_state_is_decoding_without_it_under_token_routing(kind):
    model = adapted(kind, PROJECTIONS[kind])
    assert model.peft_config["default"].routing == "token"
    whole = logits(model)
    with torch.no_grad():
        start = model(input_ids=IDS[:, :4], use_cache=True)
        state, stepwise = start.cache_params, [start.logits]
        for i in range(4, IDS.shape[1]):
            step = model(input_ids=IDS[:, i : i + 1], cache_params=state, use_cache=True)
            stepwise.append(step.logits)
    # The chunked scan of Mamba-2 sums in another order than the recurrence.
    torch.testing.assert_close(torch.cat(stepwise, 1), whole, atol=2e-5, rtol=1e-4)
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_state, without = (model.generate(input_ids=IDS, use_cache=use, **greedy) for use in (True, False))
    assert torch.equal(with_state, without)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_static_adapter_merges_and_unmerges_exactly(kind):
    model = adapted(kind, PROJECTIONS[kind], routing="static")
    before, untouched = logits(model), logits(base(kind))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, atol=2e-5, rtol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), untouched)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, atol=2e-5, rtol=1e-4)


def test_a_lora_is_refused_where_no_reader_would_apply_it(tmp_path):
    lora = export.as_lora(adapted("mamba", ["in_proj", "x_proj"], routing="static"))
    assert len(lora.layers) == 4
    for target in ("dt_proj", "out_proj"):
        with pytest.raises(LilyError, match=rf"{target}: MambaMixer reads its weight .*--to merged"):
            export.as_lora(adapted("mamba", ["in_proj", target], routing="static"))


def test_a_file_with_an_adapter_on_the_time_step_refuses_stock_peft(tmp_path):
    model = adapted("mamba", ["dt_proj"], routing="batch")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] != "LILY"
    again = PeftModel.from_pretrained(base("mamba"), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_the_plain_ones(reentrant, kernel):
    def gradients(model: PeftModel) -> list[Tensor]:
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain = gradients(adapted("mamba", PROJECTIONS["mamba"]))
    model = adapted("mamba", PROJECTIONS["mamba"])
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for found, expected in zip(gradients(model), plain, strict=True):
        torch.testing.assert_close(found, expected)
    assert not kernel
    assert all(module.training for module in model.modules())


def test_a_forward_that_raises_leaves_the_mixer_as_it_was():
    model = adapted("mamba", ["dt_proj"]).train()
    mixer = mixers_of(model)[0]

    def fails(*_: Any) -> None:
        raise RuntimeError("on purpose")

    handle = mixer.x_proj.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(input_ids=IDS)
    assert mixer.training
    assert "dt_proj" not in vars(mixer)
    handle.remove()
    model(input_ids=IDS)


def test_a_copy_of_an_adapted_model_stands_on_its_own(kernel):
    model = adapted("mamba", PROJECTIONS["mamba"])
    twin = copy.deepcopy(model)
    expected = logits(model)
    model.unload()
    assert torch.equal(logits(twin), expected)
    twin.train()(input_ids=IDS)
    assert not kernel
    twin.delete_adapter("default")
    twin.base_model.model(input_ids=IDS)
    assert len(kernel) == 2


def test_dropout_in_an_adapter_goes_on_in_a_mixer_that_skips_its_kernel(kernel):
    model = adapted("mamba", ["x_proj", "dt_proj"], dropout=0.5).train()
    first, second = (model(input_ids=IDS).logits for _ in range(2))
    assert not torch.allclose(first, second)


def test_what_it_costs_is_said_once_and_only_where_there_is_a_kernel_to_lose(monkeypatch):
    def said() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = adapted("mamba", ["in_proj", "out_proj"])
            model.add_adapter("second", model.peft_config["default"])
        return [str(w.message) for w in caught if "fused training kernel" in str(w.message)]

    monkeypatch.setattr(call_uncalled, "kernels_installed", lambda: False)
    assert not said()
    monkeypatch.setattr(call_uncalled, "kernels_installed", lambda: True)
    assert len(said()) == 1
    assert "out_proj: 2 adapted layers" in said()[0]


class Original(nn.Module):
    """As the mamba_ssm package and Vim have it: every projection is a product with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.use_fast_path = True
        self.A_log = nn.Parameter(torch.zeros(8, 2))
        self.in_proj, self.x_proj, self.x_proj_b = nn.Linear(4, 16), nn.Linear(8, 6), nn.Linear(8, 6)
        self.dt_proj, self.out_proj = nn.Linear(2, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.in_proj.weight @ x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("target", ["in_proj", "x_proj_b", "dt_proj", "out_proj"])
def test_the_projections_of_a_mixer_that_calls_none_are_refused(target):
    model = nn.ModuleDict({"mixer": Original(), "head": nn.Linear(4, 4)})
    with pytest.raises(LilyError, match=f"mixer.{target} belongs to Original, which reads its weight in a product"):
        lily.select_modules(model, LilyConfig(target_modules=[target]))
    assert [m.name for m in lily.select_modules(model, LilyConfig(target_modules="all-linear"))] == ["head"]


def test_the_convolution_of_a_mixer_is_refused_with_the_reason():
    with pytest.raises(LilyError, match=r"mixer.conv1d belongs to MambaMixer, which reads its weight without"):
        get_peft_model(base("mamba"), LilyConfig(target_modules=["conv1d"]))


HYBRIDS = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "attn_layer_indices": [1]},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_d_ssm": 64},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 4, "hybrid_override_pattern": "M*"},
}


@pytest.mark.parametrize("kind", HYBRIDS)
def test_the_mixers_of_hybrid_models_are_known_too(kind):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads, **HYBRIDS[kind]))
    found = {(name.rpartition(".")[2], layer.remedy) for name, layer in uncalled(dict(model.named_modules())).items()}
    assert found == {("conv1d", None), ("out_proj", "unfused")}


@pytest.mark.slow
def test_a_compiled_model_computes_the_same(kernel):
    model, ids = adapted("mamba", PROJECTIONS["mamba"]), IDS[:, :3]
    expected = logits(model, ids)
    compiled = torch.compile(model.train(), backend="eager")
    torch.testing.assert_close(compiled(input_ids=ids).logits.detach(), expected)
    assert not kernel


# The bidirectional image model


def vim(**options: Any) -> VisionMambaForImageClassification:
    torch.manual_seed(0)
    sizes = {"image_size": 12, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 4}
    model = VisionMambaForImageClassification(VisionMambaConfig(**sizes, num_labels=3, **options)).eval()
    for name, p in model.named_parameters():
        if "in_proj" in name or "x_proj" in name:
            nn.init.normal_(p, std=0.5)  # large enough for what the scan adds to show
    return model


PIXELS = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def vim_formula(model: Any, x: Tensor, project: Any, time_step: Any) -> Tensor:
    """Vim's bidirectional block as it is written down, one token after the other; the projections are given."""
    xz = project(x)
    width = xz.shape[-1] // 2
    total = torch.zeros(*x.shape[:2], width, dtype=x.dtype)
    for end, log in (("", "A_log"), ("_b", "A_b_log")):
        part = xz.flip(1) if end else xz
        u, z = part[..., :width], part[..., width:]
        conv, x_proj = model.get_submodule(f"conv1d{end}"), model.get_submodule(f"x_proj{end}")
        padded = F.pad(u.transpose(1, 2), (conv.kernel_size[0] - 1, 0))
        u = F.silu(F.conv1d(padded, conv.weight, conv.bias, groups=width)).transpose(1, 2)
        rank, states = model.config.time_step_rank, model.config.state_size
        low, B, C = x_proj(u).split([rank, states, states], -1)
        delta = F.softplus(time_step(low, end))
        A, D = -torch.exp(getattr(model, log)), getattr(model, f"D{end}")
        state, out = torch.zeros(x.shape[0], width, states, dtype=x.dtype), []
        for t in range(x.shape[1]):
            state = torch.exp(delta[:, t, :, None] * A) * state + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
            out.append((state * C[:, t, None]).sum(-1) + D * u[:, t])
        y = torch.stack(out, 1) * F.silu(z)
        total = total + (y.flip(1) if end else y)
    return total / 2 @ model.out_proj.weight.T


def lily_formula(x: Tensor, W: Tensor, A: Tensor, B: Tensor, R: Tensor | None, dropout: float = 0.0) -> Tensor:
    """y = x W.T + mix(dropout(x A.T), softmax(h R.T), B): token routing, scaling 1, no bias; without R, one expert."""
    h = F.dropout(x @ A.T, dropout, training=dropout > 0)
    if R is None:
        return x @ W.T + h @ B[0]
    p = torch.softmax(h @ R.T, dim=-1)
    return x @ W.T + torch.einsum("bte,btr,ero->bto", p, h, B)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_papers_setting_for_vim_is_its_formula(dropout):
    """in_proj: r 8, 5 experts, token routing, one router, dropout on h, A per layer; dt_proj: A per layer, one B."""
    config = LilyConfig(
        target_modules=["in_proj", "dt_proj"],
        r=8,
        num_B=5,
        stride_A=1,
        routing="token",
        scaling=1.0,
        shared_router=True,
        group_options={"in_proj": {"dropout": dropout}, "dt_proj": {"num_B": 1}},
    )
    model = randomise(get_peft_model(vim(), config))
    bank = model.base_model.model.lily_bank
    groups = bank.plans["default"].groups
    assert [(len(group.blocks), group.num_B) for group in groups] == [(3, 5), (3, 1)]
    assert sum(p.numel() for p in bank.lily_R.parameters()) == 5 * 8
    mixer = model.base_model.model.layers[1].mixer.double()
    model.base_model.model.lily_bank.double()
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mixer.train(dropout > 0)

    (A, B), R = mixer.in_proj.tensors_of("default"), mixer.in_proj.router_of("default")
    dt_A, dt_B = mixer.dt_proj.tensors_of("default")

    def project(x: Tensor) -> Tensor:
        return lily_formula(x, mixer.in_proj.base_layer.weight, A, B, R, dropout)

    def time_step(low: Tensor, end: str) -> Tensor:
        layer = mixer.get_submodule(f"dt_proj{end}")
        if end:
            return layer(low)
        return lily_formula(low, layer.base_layer.weight, dt_A, dt_B, None) + layer.base_layer.bias

    torch.manual_seed(7)
    found = mixer(x)
    torch.manual_seed(7)
    # The scan is float32 in parts, as in transformers.
    torch.testing.assert_close(found, vim_formula(mixer, x, project, time_step), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, vim_formula(mixer, x, mixer.in_proj.base_layer, time_step), atol=1e-3)


@pytest.mark.parametrize("target", ["in_proj", "out_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b"])
def test_an_adapter_on_any_projection_of_the_image_model_acts(target):
    model = randomise(get_peft_model(vim(), LilyConfig(target_modules=[target], r=4, num_B=2))).train()
    out = model(pixel_values=PIXELS, labels=torch.tensor([0, 2]))
    out.loss.backward()
    assert not torch.allclose(out.logits, vim()(PIXELS).logits, atol=1e-4)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    assert not any(m._forward_pre_hooks for m in mixers_of(model))


@pytest.mark.parametrize("class_token", [True, False])
def test_the_image_model_is_saved_and_loaded_like_any_other(class_token, tmp_path):
    model = vim(class_token=class_token)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert isinstance(again, VisionMambaForImageClassification)
    assert torch.equal(again(PIXELS).logits, model(PIXELS).logits)
    other = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True).eval()
    assert other.head.weight.shape == (7, 16)
    assert torch.equal(other.features(PIXELS), model.features(PIXELS))


def test_the_image_model_reads_its_patches_in_both_directions():
    model = vim(class_token=False)
    tokens = torch.randn(1, 9, 16)
    changed = tokens.clone()
    changed[:, 4] += 1
    moved = (model.layers[0].mixer(changed) - model.layers[0].mixer(tokens)).abs().amax(-1)[0]
    assert (moved > 0).all()


def test_the_paper_sized_image_model_has_the_parameters_of_vim_s():
    with torch.device("meta"):
        model = VisionMambaForImageClassification(VisionMambaConfig(num_labels=1000))
    assert model.num_parameters() == pytest.approx(26e6, rel=0.02)
