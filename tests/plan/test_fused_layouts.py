"""Layouts of fused projections, each checked against the model's code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel

from lily.errors import LilyError
from lily.plan.fused_layouts import RULES, TIMM, Rows, layout_of, rows_of

COMMON = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 20}
PAD = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 20}
DECISIONS = {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 20}
FALCON = {**COMMON, "alibi": False}
DBRX = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 1,
    "vocab_size": 20,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 9, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
}
MODERNBERT = ("ModernBertConfig", {**COMMON, "intermediate_size": 48, **PAD, "cls_token_id": 1, "sep_token_id": 2})
PHI3 = ("Phi3Config", {**COMMON, "num_key_value_heads": 2, "intermediate_size": 48, **PAD})
ATTENTION = {
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 20}),
    "gpt_neox": ("GPTNeoXConfig", {**COMMON, "intermediate_size": 48}),
    "persimmon": ("PersimmonConfig", {**COMMON, "intermediate_size": 48, "qk_layernorm": False, **PAD}),
    "falcon": ("FalconConfig", {**FALCON, "multi_query": False}),
    "falcon of one key": ("FalconConfig", {**FALCON, "multi_query": True}),
    "falcon of groups": ("FalconConfig", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_bigcode": ("GPTBigCodeConfig", {**SMALL, "n_positions": 32}),
    "gpt_bigcode of heads": ("GPTBigCodeConfig", {**SMALL, "n_positions": 32, "multi_query": False}),
    "codegen": ("CodeGenConfig", {**SMALL, "n_embd": 64, "rotary_dim": 8}),
    "phi3": PHI3,
    "dbrx": ("DbrxConfig", DBRX),
    "gpt2": ("GPT2Config", SMALL),
    "gpt_neox_japanese": ("GPTNeoXJapaneseConfig", COMMON),
    "decision_transformer": ("DecisionTransformerConfig", DECISIONS),
    "imagegpt": ("ImageGPTConfig", SMALL),
    "openai": ("OpenAIGPTConfig", SMALL),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 20, "max_seq_len": 32}),
    "modernbert": MODERNBERT,
}
FUSED = ("query_key_value", "c_attn", "qkv_proj", "Wqkv")


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    name, options = ATTENTION[kind]
    config = getattr(transformers, name)(**options)
    config._attn_implementation = "eager"
    model = AutoModel.from_config(config).eval()
    return model.encoder if kind == "decision_transformer" else model  # past what embeds states and rewards


def fused_layer(model: nn.Module, names: tuple[str, ...]) -> tuple[str, nn.Module, nn.Module]:
    for path, module in model.named_modules():
        parent, _, last = path.rpartition(".")
        if last in names:
            return last, module, model.get_submodule(parent)
    raise AssertionError(f"no {names}")


def weight_of(layer: nn.Module) -> torch.Tensor:
    """(out, in)."""
    return layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight


def rows(layout: dict[str, Rows], name: str, out: int) -> list[int]:
    return layout[name].view(torch.arange(out)).flatten().tolist()


@pytest.mark.parametrize("kind", sorted(ATTENTION))
def test_query_key_and_value_are_where_the_model_reads_them(kind):
    model = model_of(kind)
    name, layer, parent = fused_layer(model, FUSED)
    weight = weight_of(layer)
    layout = layout_of(name, layer, parent, model.config)
    assert layout is not None
    assert set(layout) == {"q", "k", "v"}
    assert sorted(i for part in layout for i in rows(layout, part, len(weight))) == list(range(len(weight)))

    seen = []
    after = next(m for n, m in parent.named_children() if n in ("dense", "c_proj", "out_proj", "o_proj", "Wo"))
    after.register_forward_pre_hook(lambda m, args: seen.append(args[0]))  # some blocks add the residual within

    def attention() -> torch.Tensor:
        with torch.no_grad():
            model(input_ids=torch.tensor([[3, 4, 5, 6, 7, 8]]))
        return seen[-1][0].clone()

    # One feature is nonzero at one token alone, so a change of its column reaches that token's query, key or value.
    token, feature = 3, 1
    layer.register_forward_pre_hook(lambda m, args: (only_at(args[0], token, feature),))
    before = attention()
    touched = {}
    for part in layout:
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[rows(layout, part, len(weight)), feature] += 5 * torch.randn(layout[part].size(len(weight)))
        touched[part] = {i for i in range(6) if not torch.allclose(attention()[i], before[i], atol=1e-5)}
        with torch.no_grad():
            weight.copy_(kept)
    assert touched["q"] == {token}  # its own query moves its own output alone
    assert touched["k"] - {token}  # its key is seen by others
    assert touched["v"] - {token}
    with torch.no_grad():  # without values nothing of the input is left: every token gets the same
        weight[rows(layout, "v", len(weight))] = 0
    flat = attention()
    assert torch.allclose(flat, flat[:1].expand_as(flat), atol=1e-5)
    with torch.no_grad():
        weight.copy_(kept)
        weight[rows(layout, "k", len(weight))] = 0
    assert not torch.allclose(attention(), flat, atol=1e-3)


def only_at(x: torch.Tensor, token: int, feature: int) -> torch.Tensor:
    x = x.clone()
    x[..., feature] = 0
    x[..., token, feature] = 3
    return x


GLM = ("GlmConfig", {**PHI3[1], "head_dim": 8})
GATED = {
    "phi3": (*PHI3, ("gate_up_proj",), "silu"),
    "glm": (*GLM, ("gate_up_proj",), "silu"),
    "glm4": ("Glm4Config", GLM[1], ("gate_up_proj",), "silu"),
    "modernbert": (*MODERNBERT, ("Wi",), "gelu"),
}


@pytest.mark.parametrize("kind", sorted(GATED))
def test_gate_and_up_are_where_the_model_reads_them(kind):
    name, options, layers, activation = GATED[kind]
    model = AutoModel.from_config(getattr(transformers, name)(**options)).eval()
    name, layer, parent = fused_layer(model, layers)
    layout = layout_of(name, layer, parent, model.config)
    x = torch.randn(1, 3, 32)
    with torch.no_grad():
        gate, up = (layout[part].view(layer(x)).flatten(-2) for part in ("gate", "up"))
        last = next(m for n, m in parent.named_children() if n in ("down_proj", "Wo"))
        expected = last(up * getattr(torch.nn.functional, activation)(gate))
        assert torch.allclose(parent(x), expected, atol=1e-5)


def test_every_rule_has_its_case():
    fused = {(kind.partition(" ")[0], name) for kind in ATTENTION for name in FUSED}
    gated = {(kind, names[0]) for kind, (_, _, names, _) in GATED.items()}
    mixers = {(kind, "in_proj") for kind in ("mamba", "falcon_mamba", "mamba2")}
    assert RULES.keys() <= fused | gated | mixers


def test_what_a_cross_attention_fuses_is_not_known():
    config = transformers.GPT2Config(n_embd=48, n_layer=1, n_head=4, vocab_size=20, add_cross_attention=True)
    block = AutoModel.from_config(config).h[0]
    assert set(layout_of("c_attn", block.attn.c_attn, block.attn, config)) == {"q", "k", "v"}
    assert layout_of("c_attn", block.crossattention.c_attn, block.crossattention, config) is None


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("MambaConfig", {"state_size": 4}, {"x": 64, "z": 64}),
        ("FalconMambaConfig", {"state_size": 4}, {"x": 64, "z": 64}),
        ("Mamba2Config", {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2},
         {"z": 64, "x": 64, "B": 8, "C": 8, "dt": 8}),
    ],
)  # fmt: skip
def test_a_mamba_block_gates_with_z(name, options, size):
    config = getattr(transformers, name)(hidden_size=32, num_hidden_layers=1, vocab_size=20, expand=2, **options)
    model = AutoModel.from_config(config).eval()
    name, layer, parent = fused_layer(model, ("in_proj",))
    layout = layout_of(name, layer, parent, model.config)
    assert {part: found.size(layer.out_features) for part, found in layout.items()} == size
    with torch.no_grad():
        layer.weight[rows(layout, "z", layer.out_features)] = 0  # silu(0) closes the gate
        closed = parent(torch.randn(1, 5, 32))
    assert torch.allclose(closed, torch.zeros_like(closed), atol=1e-6)


# Class of timm -> its options, and what its forward is given; of width 24, of 2 heads where it does not say.
TOKENS, PIXELS, PLANES = (1, 4, 24), (1, 2, 2, 24), (1, 24, 2, 2)
TIMM_CASES: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "layers.attention.Attention": ({"num_heads": 2}, (TOKENS,)),
    "layers.attention.AttentionRope": ({"num_heads": 2}, (TOKENS,)),
    "layers.attention_pool2d.RotAttentionPool2d": ({"head_dim": 12, "ref_feat_size": 2}, (PLANES,)),
    "layers.attention_pool2d.AttentionPool2d": ({"head_dim": 12, "feat_size": 2}, (PLANES,)),
    "layers.diff_attention.DiffAttention": ({"num_heads": 2}, (TOKENS,)),
    "models.vision_transformer_relpos.RelPosAttention": ({"num_heads": 2}, (TOKENS,)),
    "models.vision_transformer_sam.Attention": ({"num_heads": 2}, (PIXELS,)),
    "models.beit.Attention": ({"num_heads": 2}, (TOKENS,)),
    "models.cait.TalkingHeadAttn": ({"num_heads": 2}, (TOKENS,)),
    "models.coat.FactorAttnConvRelPosEnc": ({"num_heads": 2, "shared_crpe": lambda q, v, size: 0}, (TOKENS, (2, 2))),
    "models.convit.MHSA": ({"num_heads": 2}, (TOKENS,)),
    "models.davit.ChannelAttention": ({"num_heads": 2}, (TOKENS,)),
    "models.davit.ChannelAttentionV2": ({"num_heads": 2}, (TOKENS,)),
    "models.davit.WindowAttention": ({"num_heads": 2, "window_size": (2, 2)}, (TOKENS,)),
    "models.edgenext.CrossCovarianceAttn": ({"num_heads": 2}, (TOKENS,)),
    "models.eva.EvaAttention": ({"num_heads": 2, "qkv_bias": False, "scale_norm": False}, (TOKENS,)),
    "models.fastvit.Attention": ({"head_dim": 12}, (PLANES,)),
    "models.hiera.MaskUnitAttention": ({"dim_out": 24, "heads": 2}, (TOKENS,)),
    "models.hieradet_sam2.MultiScaleAttention": ({"dim_out": 24, "num_heads": 2}, (PIXELS,)),
    "models.metaformer.Attention": ({"head_dim": 12}, (TOKENS,)),
    "models.mvitv2.MultiScaleAttention": (
        {"dim_out": 24, "feat_size": (2, 2), "num_heads": 2, "has_cls_token": False}, (TOKENS, [2, 2])),
    "models.nest.Attention": ({"num_heads": 2}, ((1, 1, 4, 24),)),
    "models.swin_transformer.WindowAttention": ({"num_heads": 2, "window_size": 2}, (TOKENS,)),
    "models.swin_transformer_v2.WindowAttention": (
        {"num_heads": 2, "window_size": (2, 2), "qkv_bias": False}, (TOKENS,)),
    "models.swin_transformer_v2_cr.WindowMultiHeadAttention": ({"num_heads": 2, "window_size": (2, 2)}, (TOKENS,)),
    "models.twins.LocallyGroupedAttn": ({"num_heads": 2, "ws": 2}, (TOKENS, (2, 2))),
    "models.volo.Attention": ({"num_heads": 2}, (PIXELS,)),
    "models.xcit.XCA": ({"num_heads": 2}, (TOKENS,)),
    "models.maxxvit.AttentionCl": ({"dim_head": 12, "head_first": True}, (PIXELS,)),
    "models.maxxvit.AttentionCl of blocks": ({"dim_head": 12, "head_first": False}, (PIXELS,)),
    "models.tiny_vit.Attention": ({"key_dim": 8, "num_heads": 2, "attn_ratio": 2, "resolution": (2, 2)}, (TOKENS,)),
    "models.efficientformer.Attention": ({"key_dim": 8, "num_heads": 2, "attn_ratio": 2, "resolution": 2}, (TOKENS,)),
    "models.gcvit.WindowAttentionGlobal": ({"num_heads": 2, "window_size": (2, 2)}, (TOKENS, TOKENS)),
    "models.gcvit.WindowAttentionGlobal of its own": (
        {"num_heads": 2, "window_size": (2, 2), "use_global": False}, (TOKENS,)),
}  # fmt: skip


def made_by_timm(kind: str, **options: Any) -> nn.Module:
    pytest.importorskip("timm", reason="needs timm, which the vision environment has: make test-vision")
    path, _, name = kind.partition(" ")[0].rpartition(".")
    made = getattr(importlib.import_module(f"timm.{path}"), name)
    first = "in_features" if "pool2d" in path else "dim"
    attention: nn.Module = made(**{first: 24, **options})
    attention.eval()  # which some of timm's do not return
    return attention


def first_bound(attention: nn.Module, inputs: Sequence[Any]) -> dict[str, torch.Tensor]:
    """What its forward calls query, key and value, as it first binds these names."""
    names = {"q": "q", "k": "k", "v": "v", "query": "q", "key": "k", "value": "v"}
    found: dict[str, torch.Tensor] = {}

    def look(frame: Any, event: str, arg: Any) -> Any:
        for name in names.keys() & frame.f_locals.keys():
            found.setdefault(names[name], frame.f_locals[name].clone())
        return look

    before, code = sys.gettrace(), type(attention).forward.__code__
    sys.settrace(lambda frame, event, arg: look if frame.f_code is code else None)
    try:
        with torch.no_grad():
            attention(*inputs)
    finally:
        sys.settrace(before)
    return found


@pytest.mark.parametrize("kind", sorted(TIMM_CASES))
def test_query_key_and_value_are_where_timm_reads_them(kind):
    options, given = TIMM_CASES[kind]
    attention = made_by_timm(kind, **options)
    out = attention.qkv.out_features
    layout = layout_of("qkv", attention.qkv, attention, None)
    assert layout is not None
    if hasattr(attention, "scale"):
        attention.scale = 1  # some scale the query as they bind it
    attention.qkv.register_forward_hook(lambda m, args, y: torch.arange(float(out)).expand_as(y))
    inputs = [torch.zeros(x) if isinstance(x, tuple) and len(x) > 2 else x for x in given]
    found = first_bound(attention, inputs)
    for part, outputs in found.items():
        expected = sorted(rows(layout, part, out)) if part in layout else [0]  # a query that comes from elsewhere
        assert sorted(set(outputs.flatten().tolist())) == expected
    assert layout.keys() <= found.keys()


def test_every_layout_of_timm_has_its_case():
    there = {kind.partition(" ")[0].rpartition(".")[0] for kind in TIMM_CASES}
    assert TIMM.keys() - there == {"models.vision_transformer"}  # which has attention of its own in older versions
    assert there <= TIMM.keys()


def test_attention_of_timm_that_is_not_known_is_asked_for_its_layout():
    unknown = type("Attention", (nn.Module,), {"__module__": "timm.models.some_day"})()
    assert layout_of("qkv", nn.Linear(4, 12), unknown, None) is None


def test_a_view_of_interleaved_heads_writes_into_the_output():
    y = torch.zeros(2, 12)
    Rows(2, 4, 6).view(y).add_(1)
    assert y[0].tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0]


def test_an_unknown_architecture_is_asked_for_its_layout():
    layer = nn.Linear(4, 12)
    assert layout_of("qkv", layer, nn.Sequential(layer), None) is None
    with pytest.raises(LilyError, match=r"the layout of qkv is not known; state it, such as \{'v': \[8, 12\]\}"):
        rows_of("qkv", ["v"], None, 12)
    assert rows_of("qkv", {"v": [8, 12], "k": [4, 8]}, None, 12) == {"k": Rows(4, 8, 12), "v": Rows(8, 12, 12)}
    assert rows_of("qkv", {"v": [4, 6, 6]}, None, 12) == {"v": Rows(4, 6, 6)}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["w"], "has no slice 'w'; it has q, k, v"),
        ({"v": [4]}, "is not"),
        ({"v": [4, 13]}, "does not fit"),
        ({"v": [2, 2]}, "does not fit"),
        ({"v": [0, 2, 5]}, "divides 12"),
        ({"v": [0, 2, True]}, "is not"),
        ({"k": [0, 4], "v": [3, 6]}, "overlap at output 3"),
        ({"k": [0, 2, 4], "v": [5, 6]}, "overlap at output 5"),
    ],
)
def test_slices_that_are_not_there_are_refused(asked, says):
    layout = {"q": Rows(0, 4, 12), "k": Rows(4, 8, 12), "v": Rows(8, 12, 12)}
    with pytest.raises(LilyError, match=says):
        rows_of("qkv", asked, layout, 12)
