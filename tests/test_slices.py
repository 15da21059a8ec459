"""Layouts of fused projections, each asked of the model's own code."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel

from lily.errors import LilyError
from lily.slices import Rows, layout_of, rows_of

COMMON = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 20}
PAD = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 20}
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
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 20, "max_seq_len": 32}),
    "modernbert": MODERNBERT,
}
FUSED = ("query_key_value", "c_attn", "qkv_proj", "Wqkv")


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    name, options = ATTENTION[kind]
    config = getattr(transformers, name)(**options)
    config._attn_implementation = "eager"
    return AutoModel.from_config(config).eval()


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


def test_a_view_of_interleaved_heads_writes_into_the_output():
    y = torch.zeros(2, 12)
    Rows(2, 4, 6).view(y).add_(1)
    assert y[0].tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0]


def test_an_unknown_architecture_is_asked_for_its_layout():
    layer = nn.Linear(4, 12)
    assert layout_of("qkv", layer, nn.Sequential(layer), None) is None
    with pytest.raises(LilyError, match=r"how qkv is laid out is not known; say it, such as \{'v': \[8, 12\]\}"):
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
