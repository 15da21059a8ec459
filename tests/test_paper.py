"""The paper's settings, each against a transcription of its formula that knows nothing of this package."""

from __future__ import annotations

import pytest
import torch
from helpers import build, inputs, randomise
from peft import get_peft_model
from torch import Tensor, nn

from lily import LilyConfig
from lily.tuner.adapter import find

pytestmark = pytest.mark.filterwarnings("ignore:routing=.* on a causal model")


def paper_update(x: Tensor, A: Tensor, B: Tensor, R: Tensor, scaling: float = 1.0, relu: bool = False) -> Tensor:
    """The paper's Lily: x (batch, tokens, in), A (r, in), B (experts, r, out), R (experts, r); one mixture a batch."""
    h = torch.einsum("bti,ri->btr", x, A)
    if relu:
        h = torch.maximum(h, torch.zeros(()))
    logits = torch.einsum("btr,er->bte", h, R)
    p = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    combined = sum(p[..., e].mean() * B[e] for e in range(B.shape[0]))
    return scaling * torch.einsum("btr,ro->bto", h, combined)


def caught(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(input, output) of every call of a module from now on."""
    calls: list[tuple[Tensor, Tensor]] = []
    module.register_forward_hook(lambda m, args, out: calls.append((args[0].detach(), out.detach())))
    return calls


def tensors(layer: object) -> tuple[Tensor, Tensor, Tensor]:
    A, B = layer.tensors_of("default")
    return A.detach(), B.detach(), layer.router_of("default").detach()


def test_query_key_and_value_of_a_llama():
    """Commonsense, LLaMA3-8B: q, k, v; r 16, 4 A and 4 B; scaling 1."""
    config = LilyConfig.paper(
        r=16, num_A=4, num_B=4, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = randomise(get_peft_model(build("llama"), config)).eval()
    found = find(model)
    calls = {name: caught(layer) for name, layer in found.layers.items()}
    with torch.no_grad():
        model(**inputs("llama"))
    assert len(calls) == 12
    for name, layer in found.layers.items():
        (x, y), *_ = calls[name]
        expected = x @ layer.base_layer.weight.T + paper_update(x, *tensors(layer))
        assert torch.allclose(y, expected, atol=1e-5)
    assert {len(group.blocks) for group in found.plan.groups} == {4}


def timm_vit() -> nn.Module:
    pytest.importorskip("timm", reason="needs timm, which the vision environment has: make test-vision")
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=5).eval()


def test_k_and_v_slices_and_a_parallel_mlp_of_a_timm_vit():
    """VTAB-1K, ViT-B/16: k and v of the fused qkv, r 32; beside each MLP with ReLU, r 64; 4 A and 4 B."""
    config = LilyConfig(
        r=4,
        num_A=4,
        num_B=4,
        scaling=1.0,
        routing="batch",
        target_slices={"qkv": ["k", "v"]},
        parallel_modules=["Mlp"],
        rank_pattern={"mlp": 8},
        group_options={"mlp": {"activation": "relu"}},
    )
    model = randomise(get_peft_model(timm_vit(), config)).eval()
    blocks = model.base_model.model.blocks
    qkv, mlp = ([caught(getattr(b.attn if n == "qkv" else b, n)) for b in blocks] for n in ("qkv", "mlp"))
    with torch.no_grad():
        model(torch.randn(3, 3, 32, 32))
    for i, block in enumerate(blocks):
        (x, y), *_ = qkv[i]
        fused = block.attn.qkv
        slices = {layer.part: layer for layer in fused.nested}
        base = fused.get_base_layer()
        expected = x @ base.weight.T + base.bias
        expected[..., 32:64] += paper_update(x, *tensors(slices["k"]))
        expected[..., 64:] += paper_update(x, *tensors(slices["v"]))
        assert torch.allclose(y, expected, atol=1e-4)
        (x, y), *_ = mlp[i]
        plain = block.mlp.base_layer
        inside = torch.nn.functional.gelu(x @ plain.fc1.weight.T + plain.fc1.bias)
        expected = inside @ plain.fc2.weight.T + plain.fc2.bias + paper_update(x, *tensors(block.mlp), relu=True)
        assert torch.allclose(y, expected, atol=1e-4)
    found = find(model)
    assert {group.name: (group.r, len(group.blocks)) for group in found.plan.groups} == {
        "qkv.k": (4, 4), "qkv.v": (4, 4), "mlp": (8, 4),
    }  # fmt: skip
