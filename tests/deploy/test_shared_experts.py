"""Stacked experts written with shared outer matrices, read back as servers read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import randomise
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from lily import LilyConfig, export
from lily.errors import LilyError

EXPERTS, HIDDEN, INNER, R = 5, 16, 24, 3
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
SIZES = {
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 19, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS = {
    "mixtral": lambda: MixtralConfig(num_local_experts=EXPERTS, **SIZES),
    "qwen3_moe": lambda: Qwen3MoeConfig(num_experts=EXPERTS, moe_intermediate_size=INNER, head_dim=8, **SIZES),
    "gpt_oss": lambda: GptOssConfig(num_local_experts=EXPERTS, head_dim=8, **SIZES),
}


def adapted(kind: str = "qwen3_moe", **options: object) -> PeftModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    defaults = {"r": R, "num_A": 1, "num_B": 1, "target_modules": [], "target_parameters": BOTH}
    return randomise(get_peft_model(base, LilyConfig(**{**defaults, **options})), scale=0.3).eval()


def served(folder: Path) -> dict[str, Tensor]:
    """What SGLang makes of the file, by module: each expert's update, (experts, out, in), or a layer's, (out, in)."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    renamed = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    by_module: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        owner, _, last = module.rpartition(".")
        assert renamed.get(last, last) in config["target_modules"]
        by_module.setdefault(f"{owner}.{renamed.get(last, last)}", {})[part] = tensor
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    scaling = config["lora_alpha"] / config["r"]
    updates = {}
    for module, parts in by_module.items():
        A, B = parts["lora_A"], parts["lora_B"]
        assert A.shape[-2] == B.shape[-1] == config["r"]
        if ".experts." in module:
            outer = B if module.endswith("down_proj") else A
            assert (A.ndim, B.ndim, outer.shape[0]) == (3, 3, 1)
            assert sorted((A.shape[0], B.shape[0])) == [1, EXPERTS]
        updates[module] = scaling * (B @ A)
    return updates


def merged_updates(model: PeftModel) -> dict[str, Tensor]:
    """The same from the weights before and after merging."""
    before = {n.replace(".base_layer", ""): p.detach().clone() for n, p in model.base_model.model.named_parameters()}
    found = {}
    for name, p in model.merge_and_unload().named_parameters():
        delta = p.detach() - before[name]
        if not delta.any():
            continue
        if name.endswith(("gate_up_proj", "down_proj")) and p.ndim == 3:
            transposed = p.shape[1:] in ((HIDDEN, 2 * INNER), (INNER, HIDDEN))
            delta = delta.mT if transposed else delta
        if name.endswith("gate_up_proj"):
            whole = name.removesuffix("gate_up_proj")
            interleaved = isinstance(model.get_base_model().config, GptOssConfig)
            gate, up = (delta[:, ::2], delta[:, 1::2]) if interleaved else delta.chunk(2, 1)
            found |= {f"{whole}gate_proj": gate, f"{whole}up_proj": up}
        else:
            found[name.removesuffix(".weight")] = delta
    return found


def compare(model: PeftModel, folder: Path, **options: object) -> None:
    export.write_lora(export.as_lora(model, experts="shared", **options), folder)
    found, expected = served(folder), merged_updates(model)
    assert found.keys() == expected.keys()
    for name, update in found.items():
        torch.testing.assert_close(update, expected[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_expert_gets_its_update(kind, tmp_path):
    compare(adapted(kind), tmp_path / "lora")


@pytest.mark.parametrize(
    "options",
    [
        {"distinct": "none"},
        {"distinct": "permute+signs"},
        {"distinct": "permute", "gain": "signs"},
        {"num_B": 2, "routing": "uniform"},
        {"num_B": 2, "group_options": {"experts.down_proj": {"num_B": 1}}},
        {"scaling": 0.37, "target_modules": ["q_proj", "v_proj"]},
        {"target_parameters": BOTH[:1]},
    ],
    ids=str,
)
def test_what_experts_have_for_themselves_goes_to_the_side_that_each_has(options, tmp_path):
    compare(adapted(**options), tmp_path / "lora")


def test_ranks_are_those_that_vllm_accepts(tmp_path):
    compare(adapted(), tmp_path / "lora", target="vllm")
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["r"] == 8


def test_the_outer_matrices_are_there_once():
    model = adapted(target_parameters=BOTH)
    shared, repeated = (export.as_lora(model, experts=how).size for how in ("shared", "peft"))
    # Per layer: A of gate and of up, and B of down, instead of one A for each expert, and one B.
    assert repeated - shared == 2 * 4 * R * ((EXPERTS - 2) * HIDDEN + (EXPERTS - 1) * HIDDEN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_A": None, "stride_A": 2}, r"gate_up_proj do not share one A: 2 experts in a row .*num_A=1"),
        ({"num_B": 2}, r"down_proj do not share one B: each mixes num_B=2 .*num_B=1 or routing='uniform'"),
        ({"own_r": 1}, r"gate_up_proj do not share one A: own_r=1 .*own_r=0"),
        ({"target_modules": ["q_proj"], "target_parameters": None}, "has no stacked experts"),
        ({"bias": "lily_only"}, "reads no trained biases"),
        ({"modules_to_save": ["lm_head"]}, "reads no modules saved whole"),
    ],
    ids=str,
)
def test_an_adapter_whose_experts_do_not_share_is_refused_with_the_setting(options, message):
    with pytest.raises(LilyError, match=message):
        export.as_lora(adapted(**options), experts="shared")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2}, "rank=2 gives each expert separate matrices"),
        ({"target": "llama.cpp"}, r"llama\.cpp reads no stacked experts"),
        ({"experts": "all"}, "experts='all' is not known; choose peft or shared"),
    ],
    ids=str,
)
def test_an_option_that_takes_experts_apart_is_refused(options, message):
    with pytest.raises(LilyError, match=message):
        export.as_lora(adapted(), **{"experts": "shared", **options})


def test_other_stacked_parameters_are_refused():
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(EXPERTS, 6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weights.mT).sum(0)

    config = LilyConfig(r=2, num_B=1, num_A=1, target_modules=[], target_parameters=["0.weights"])
    model = get_peft_model(nn.ModuleDict({"0": Stack()}), config)
    with pytest.raises(LilyError, match=r"0\.weights is neither experts\.gate_up_proj nor experts\.down_proj"):
        export.as_lora(model, experts="shared")


def test_intruders_are_not_reduced_in_shared_experts():
    model = adapted()
    lora = export.as_lora(model, experts="shared")
    with pytest.raises(LilyError, match="leave it out"):
        export.reduce_intruder_dimension(lora, model)


def test_lora_of_peft_has_other_experts_matrices_for_each():
    """Why there is a second layout: PEFT's own file of the same adapter has an A for each expert."""
    model = adapted()
    lora = export.as_lora(model)
    assert isinstance(lora.config, LoraConfig)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert lora.layers[name].A.shape == (EXPERTS, R, HIDDEN)
