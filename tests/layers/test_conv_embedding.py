"""Convolutions and embeddings: the formula written out, and everything a linear layer's adapter can do."""

from __future__ import annotations

import dataclasses
import math

import peft
import pytest
import torch
import torch.nn.functional as F
from helpers import build, inputs, predict, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lily
from lily import LilyConfig, LilyError, build_plan, export, functional, select_modules
from lily.budget import choose, lora_parameters
from lily.layers.find import layers_of
from lily.plan.specs import EMBEDDING

pytestmark = [
    pytest.mark.sample(every=10),
    pytest.mark.filterwarnings(
        "ignore:routing=.* on a causal model",
        "ignore:Could not identify embedding",
        "ignore:LoRA adapter added to ConvNd layer with groups",
    ),
]

ROUTINGS = ("token", "sequence", "batch", "static", "uniform")


class Pixels(nn.Module):
    """An embedded picture through convolutions of several kinds; `mid` twice with one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8, padding_idx=0)
        self.patch = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.first = nn.ModuleDict({"mid": nn.Conv2d(6, 6, 1)})
        self.second = nn.ModuleDict({"mid": nn.Conv2d(6, 6, 1)})
        self.last = nn.Conv2d(6, 5, (3, 2), padding="same", bias=False)
        self.cube = nn.Conv3d(1, 1, 3, padding=1)
        self.line = nn.Conv1d(5, 5, 3, padding=1)
        self.head = nn.Linear(5, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids).permute(0, 3, 1, 2)  # (batch, 8, height, width)
        x = torch.tanh(self.patch(x))
        x = x + torch.tanh(self.grouped(x))
        x = self.last(self.second["mid"](self.first["mid"](x)))
        x = x + self.cube(x.unsqueeze(1)).squeeze(1)
        return self.head(self.line(x.flatten(2)).mean(-1))


TARGETS = ["words", "patch", "grouped", "mid", "last", "cube", "line", "head"]


def pixels() -> nn.Module:
    torch.manual_seed(0)
    return Pixels().eval()


def ids(batch: int = 3) -> torch.Tensor:
    return torch.randint(0, 11, (batch, 6, 5), generator=torch.Generator().manual_seed(1))


def adapted(routing: str, **options) -> PeftModel:
    config = LilyConfig(**{"r": 4, "num_B": 2, "stride_A": 2, "target_modules": TARGETS, "routing": routing, **options})
    return randomise(get_peft_model(pixels(), config), scale=0.3).eval()


def run(model, batch=None) -> torch.Tensor:
    with torch.no_grad():
        return model(ids() if batch is None else batch)


def written_out(h, R, B, routing, scaling, logits=None):
    """The update (batch, ..., out) of h (batch, ..., r), token by token and expert by expert."""
    p = torch.softmax(h @ R.T, -1) if R is not None else None
    out = torch.zeros(*h.shape[:-1], B.shape[-1], dtype=h.dtype)
    for e in range(len(B)):
        if routing == "uniform":
            w = 1 / len(B)
        elif routing == "static":
            w = torch.softmax(logits, 0)[e]
        elif routing == "token":
            w = p[..., e, None]
        elif routing == "sequence":
            w = torch.stack([sample[..., e].mean() for sample in p]).view(-1, *[1] * (h.ndim - 1))
        else:
            w = p[..., e].mean()
        out = out + w * (h @ B[e])
    return scaling * out


CONVS = {
    "1x1": lambda: nn.Conv2d(4, 6, 1),
    "3x3": lambda: nn.Conv2d(4, 6, 3),
    "stride and padding": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2)),
    "dilation": lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    "same": lambda: nn.Conv2d(4, 6, 4, padding="same"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(4, 6, (1, 3), padding=(0, 1), padding_mode="circular", bias=False),
    "1d": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1),
    "3d": lambda: nn.Conv3d(4, 6, (2, 1, 3), padding=(1, 0, 1)),
    "groups": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=2),
    "1d with groups": lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2, groups=2),
    "3d by channel": lambda: nn.Conv3d(4, 8, 2, groups=4),
}
SIZES = {1: (9,), 2: (7, 6), 3: (3, 4, 5)}


def one(base: nn.Module, routing: str, **options):
    """A module alone in a model, in float64, and its adapted layer."""
    config = LilyConfig(**{"r": 4, "num_B": 3, "routing": routing, "target_modules": ["0"], "scaling": 1.5, **options})
    model = randomise(get_peft_model(nn.Sequential(base).double(), config), scale=0.5).double().eval()
    return model, layers_of(model.base_model.model)["0"]


def parts(layer, routing):
    A, B = layer.tensors_of("default")
    router = layer.router_of("default")
    R = router if routing in ("token", "sequence", "batch") else None
    return A, B, R, router if routing == "static" else None


def narrow(base, A, x):
    """The hidden state (batch, *size, r) of each group's channels by a convolution with the group's rows of A alone."""
    kernels = A.detach().view(base.groups, -1, base.in_channels // base.groups, *base.kernel_size)
    out = []
    for kernel, part in zip(kernels, x.chunk(base.groups, 1), strict=True):
        options = (base.kernel_size, base.stride, base.padding, base.dilation)
        conv = type(base)(kernel.shape[1], len(kernel), *options, bias=False, padding_mode=base.padding_mode)
        conv.weight.data = kernel
        out.append(conv(part))
    return torch.cat(out, 1).movedim(1, -1)


def dense(B, groups):
    """B (E, r, out) that is zero between different groups."""
    return torch.stack([torch.block_diag(*one.chunk(groups, 1)) for one in B])


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_is_the_formula_with_a_kernel_for_a(name, routing):
    torch.manual_seed(0)
    base = CONVS[name]()
    model, layer = one(base, routing)
    x = torch.randn(2, 4, *SIZES[len(base.kernel_size)], dtype=torch.float64)
    A, B, R, logits = parts(layer, routing)
    h = narrow(base, A, x)
    expected = base(x) + written_out(h, R, dense(B, base.groups), routing, 1.5, logits).movedim(-1, 1)
    assert torch.allclose(model(x), expected, atol=1e-12)
    patches = layer.inputs_of_A(x)  # (..., groups, in)
    seen = torch.einsum("...gi,gri->...gr", patches, A.view(base.groups, -1, A.shape[1]))
    assert torch.allclose(seen.reshape(h.shape), h, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("1d with groups", {"own_r": 2, "gain": "signs", "distinct": "permute+signs"}),
        ("3d by channel", {"own_r": 4, "init_weights": "orthonormal"}),
        ("groups", {}),
    ],
)
def test_a_convolution_with_groups_starts_at_zero_merges_exactly_and_is_a_lora_of_peft(name, own, tmp_path):
    torch.manual_seed(0)
    base = CONVS[name]()
    base = type(base)(4, 8, base.kernel_size, padding=1, groups=base.groups)  # LoRA ignores dilation and padding_mode
    model = nn.Sequential(base, type(base)(base.out_channels, base.out_channels, 1))
    for part in model:
        part.requires_grad_(False)
    x = torch.randn(2, 4, *SIZES[len(base.kernel_size)])
    before = model(x)
    config = LilyConfig(r=4, num_B=2, routing="static", target_modules=["0"], **own)
    adapter = get_peft_model(model, config).eval()
    assert torch.equal(adapter(x), before)
    expected = randomise(adapter, scale=0.3)(x)
    assert not torch.allclose(expected, before, atol=1e-2)
    weight = base.weight.clone()
    adapter.merge_adapter(safe_merge=True)
    assert torch.allclose(adapter(x), expected, atol=1e-5)
    adapter.unmerge_adapter()
    assert torch.equal(base.weight, weight)
    export.write_lora(export.as_lora(adapter), tmp_path / "lora")
    back = PeftModel.from_pretrained(adapter.unload(), tmp_path / "lora").eval()
    assert back.base_model.model[0].lora_B["default"].weight.shape[1] == (4 + config.own_r) // base.groups
    assert torch.allclose(back(x), expected, atol=1e-5)


def test_the_mask_reaches_a_convolution_that_keeps_the_tokens():
    class Speech(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 6, 1)

        def forward(self, x, attention_mask=None):
            return self.conv(x)

    config = LilyConfig(r=4, num_B=3, routing="sequence", target_modules=["conv"])
    model = randomise(get_peft_model(Speech(), config), scale=0.5).eval()
    x = torch.randn(2, 4, 7)
    mask = (torch.arange(7) < torch.tensor([[7], [5]])).long()
    masked, cut = model(x, attention_mask=mask), model(x[1:, :, :5])
    assert torch.allclose(masked[1:, :, :5], cut, atol=1e-6)
    assert not torch.allclose(model(x)[1:, :, :5], cut, atol=1e-4)
    model.add_adapter("other", config)
    randomise(model, seed=3, scale=0.5)
    alone = model(x, attention_mask=mask)
    mixed = model(x, attention_mask=mask, adapter_names=["other", "default"])
    assert torch.allclose(mixed[1], alone[1], atol=1e-6)
    assert not torch.allclose(mixed[0], alone[0], atol=1e-3)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_an_embedding_is_the_formula_with_a_column_of_a_for_each_row(routing):
    torch.manual_seed(0)
    base = nn.Embedding(9, 6)
    model, layer = one(base, routing)
    x = torch.randint(0, 9, (2, 5))
    A, B, R, logits = parts(layer, routing)
    expected = base(x) + written_out(F.one_hot(x, 9).double() @ A.T, R, B, routing, 1.5, logits)
    assert torch.allclose(model(x), expected, atol=1e-12)


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_gradients_of_a_convolution_are_right(routing, activation):
    torch.manual_seed(0)
    groups = 2 if activation == "silu" else 1
    model, _ = one(nn.Conv2d(2, 4, (2, 1), stride=2, groups=groups), routing, activation=activation, own_r=2)
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *trained), fast_mode=True)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_gradients_of_an_embedding_are_right(routing):
    torch.manual_seed(0)
    model, _ = one(nn.Embedding(5, 3), routing)
    x = torch.tensor([[0, 3, 3], [1, 4, 0]])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: model(x), tuple(trained), fast_mode=True)


@pytest.mark.parametrize("name", ["3x3", "1d with groups", "3d"])
def test_an_input_without_batch_is_one_sample(name):
    base = CONVS[name]()
    model, _ = one(base, "sequence")
    x = torch.randn(4, *SIZES[len(base.kernel_size)], dtype=torch.float64)
    assert torch.allclose(model(x), model(x.unsqueeze(0))[0], atol=1e-12)


def test_the_sequence_weights_of_many_pixels_combine_experts_once():
    h, B = torch.randn(2, 5, 4, 3), torch.randn(2, 3, 6)
    w = torch.softmax(torch.randn(2, 1, 1, 2), -1)
    assert torch.allclose(functional.mix(h, w, B), functional.mix(h, w.expand(2, 5, 4, 2), B), atol=1e-6)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_an_untrained_adapter_changes_nothing_and_a_trained_one_survives_saving(routing, tmp_path):
    fresh = get_peft_model(pixels(), LilyConfig(r=4, num_B=2, target_modules=TARGETS, routing=routing))
    assert torch.equal(fresh.eval()(ids()), pixels()(ids()))
    model = adapted(routing)
    expected = run(model)
    assert not torch.allclose(expected, run(pixels()), atol=1e-2)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(pixels(), tmp_path).eval()), expected)
    with model.disable_adapter():
        assert torch.equal(run(model), run(pixels()))


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_every_tensor_of_an_embedding_learns_and_rows_that_are_not_looked_up_stay(activation):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(9, 6))
    config = LilyConfig(r=4, num_B=2, routing="token", target_modules=["0"], activation=activation)
    model = get_peft_model(base, config)
    x, target = torch.tensor([[1, 2, 5]]), torch.randn(1, 3, 6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    first = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    before, losses = model(torch.arange(9)).detach(), []
    for _ in range(40):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(p, first[n]) for n, p in model.named_parameters() if p.requires_grad)
    if activation != "relu":
        unseen = [0, 3, 4, 6, 7, 8]
        assert torch.equal(model(torch.arange(9))[unseen], before[unseen])


def test_the_padding_row_of_an_embedding_does_not_learn():
    base = nn.Sequential(nn.Embedding(5, 4, padding_idx=2, scale_grad_by_freq=True))
    model = get_peft_model(base, LilyConfig(r=2, num_B=1, target_modules=["0"], init_weights=False))
    model(torch.tensor([[2, 1, 1]])).square().sum().backward()
    gradient = model.base_model.model.lily_bank.lily_A["default"][0].grad
    assert not gradient[:, 2].any()
    assert gradient[:, 1].any()


def test_padding_of_the_mask_does_not_count_in_an_embedding():
    config = LilyConfig(r=4, num_B=3, routing="sequence", target_modules=["word_embeddings"], task_type="SEQ_CLS")
    model = randomise(get_peft_model(build("bert"), config)).eval()
    batch = inputs("bert", batch=1, tokens=6)
    padded = {
        "input_ids": torch.cat([batch["input_ids"], torch.full((1, 3), 7)], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(1, 3, dtype=torch.long)], 1),
    }
    assert torch.allclose(predict(model, padded), predict(model, batch), atol=1e-6)


def test_a_scaled_embedding_scales_its_update_too():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    base = nn.Sequential(Gemma3TextScaledWordEmbedding(7, 4, padding_idx=0, embed_scale=3.0))
    model = randomise(get_peft_model(base, LilyConfig(r=2, num_B=2, routing="static", target_modules=["0"])))
    x = torch.arange(7)
    expected = model(x)
    model.merge_adapter()
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_layers_share_only_if_name_shape_and_kernel_agree():
    model = nn.ModuleDict(
        {
            "a": nn.ModuleDict({"conv": nn.Conv2d(9, 4, 1)}),
            "b": nn.ModuleDict({"conv": nn.Conv2d(1, 4, 3)}),  # as many columns of A
            "c": nn.ModuleDict({"conv": nn.Conv2d(1, 4, (9, 1))}),
            "d": nn.ModuleDict({"conv": nn.Linear(9, 4)}),
            "e": nn.ModuleDict({"conv": nn.Conv2d(1, 4, 3, stride=2)}),  # the same weight
            "f": nn.ModuleDict({"conv": nn.Conv1d(1, 4, 9)}),
            "g": nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, groups=4)}),  # as many columns of A
        }
    )
    config = LilyConfig(target_modules=["conv"], num_A=1)
    plan = build_plan(select_modules(model, config), config)
    members = ["a.conv", "b.conv e.conv", "c.conv", "d.conv", "f.conv", "g.conv"]
    assert [" ".join(group.members) for group in plan.groups] == members
    shapes = [(4, 9, 1, 1), (4, 1, 3, 3), (4, 1, 9, 1), (4, 9), (4, 1, 9), (4, 1, 3, 3)]
    assert [group.shape for group in plan.groups] == shapes


def test_the_closed_formula_counts_the_parameters_and_loras_agree_with_peft():
    model = adapted("token")
    plan = model.base_model.model.lily_bank.plans["default"]
    assert plan.parameters.total == sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = get_peft_model(pixels(), LoraConfig(r=2, target_modules=TARGETS))
    specs = select_modules(pixels(), LilyConfig(target_modules=TARGETS))
    assert lora_parameters(specs, 2) == sum(p.numel() for p in lora.parameters() if p.requires_grad)


def test_all_linear_means_linear_layers():
    config = LilyConfig(target_modules="all-linear")
    assert [spec.name for spec in select_modules(pixels(), config)] == ["head"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{"routing": "static"}, {"routing": "uniform"}, {"routing": "token", "num_B": 1}])
@pytest.mark.filterwarnings("ignore:merging rounded")
def test_merging_computes_the_same_and_unmerging_restores_every_bit(options, dtype):
    model = adapted(**options).to(dtype)
    weights = {n: m.adapted_weight.detach().clone() for n, m in layers_of(model).items()}
    expected = run(model)
    model.merge_adapter(safe_merge=True)
    close = {"atol": 0.05, "rtol": 2**-5} if dtype == torch.bfloat16 else {"atol": 1e-5}  # bfloat16 has 8 bits
    assert torch.allclose(run(model), expected, **close)
    model.unmerge_adapter()
    assert all(torch.equal(m.adapted_weight, weights[n]) for n, m in layers_of(model).items())
    assert torch.allclose(run(model.merge_and_unload()), expected, **close)


@pytest.mark.parametrize("rank", [None, 2])
def test_an_exported_lora_computes_the_same_in_peft(tmp_path, rank):
    model = adapted("static")
    expected = run(model)
    lora = export.as_lora(model, rank=rank, force=True)
    export.write_lora(lora, tmp_path / "lora")
    back = PeftModel.from_pretrained(pixels(), tmp_path / "lora").eval()
    assert type(back.base_model.model.patch).__module__ == "peft.tuners.lora.layer"
    if rank is None:
        assert torch.allclose(run(back), expected, atol=1e-5)
    else:
        kept = {name: layer.B @ layer.A * layer.scale for name, layer in lora.layers.items()}
        for name, layer in layers_of(model.base_model.model).items():
            deltas = layer.factors("default").delta.detach()
            best = []
            for delta in deltas if deltas.ndim == 3 else [deltas]:  # one for each group of a convolution
                u, s, v = torch.linalg.svd(delta, full_matrices=False)
                each = rank // layer.conv_groups
                best.append(u[:, :each] * s[:each] @ v[:each])
            assert torch.allclose(kept[name], torch.block_diag(*best), atol=1e-5)


@pytest.mark.parametrize("routing", ["token", "sequence", "batch"])
def test_a_dynamic_adapter_collapses_and_then_merges(routing):
    model = adapted(routing)
    with pytest.raises(LilyError, match="depends on the data"):
        model.merge_adapter()
    report = lily.collapse(model, [ids()], [ids(2)])
    assert {layer.name for layer in report.layers} == set(layers_of(model.base_model.model))
    assert all(math.isfinite(layer.update_error) for layer in report.layers)
    expected = run(model)
    assert torch.allclose(run(model.merge_and_unload()), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Conv2d(9, 9, 3, groups=3),
            "0 is a convolution with groups=3, among which its ranks are divided, and r=32 is not a multiple of that",
        ),
        (lambda: nn.ConvTranspose2d(4, 4, 3), r"target 0 is a ConvTranspose2d, .*nn.Conv3d and nn.Embedding"),
        (
            lambda: type("Padded", (nn.Conv2d,), {"forward": lambda self, x: x})(4, 4, 3),
            "a Padded, a subclass of nn.Conv2d",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(make, message):
    model = nn.Sequential(make(), nn.Linear(4, 4))
    with pytest.raises(LilyError, match=message):
        get_peft_model(model, LilyConfig(target_modules=["0", "1"]))
    assert type(model[1]) is nn.Linear


def test_an_embedding_that_cuts_norms_trains_and_refuses_to_merge():
    base = nn.Sequential(nn.Embedding(7, 4, max_norm=1.0))
    model = randomise(get_peft_model(base, LilyConfig(r=2, num_B=2, routing="static", target_modules=["0"])))
    model(torch.arange(7)).sum().backward()
    with pytest.raises(LilyError, match=r"max_norm=1\.0: it clips the rows that it looks up"):
        model.merge_adapter()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dilation": 2}, r"ignores dilation=\(2, 2\) of a convolution"),
        ({"padding": 1, "padding_mode": "reflect"}, "padding_mode"),
    ],
)
def test_a_convolution_that_pefts_lora_would_compute_otherwise_is_merged_not_exported(change, message):
    model, _ = one(nn.Conv2d(4, 6, 3, **change), "static")
    with pytest.raises(LilyError, match=message):
        export.as_lora(model)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    expected = model(x)
    assert torch.allclose(model.merge_and_unload()(x), expected, atol=1e-9)


@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
def test_servers_that_read_linear_layers_alone_are_named(target):
    with pytest.raises(LilyError, match=f"{target} reads LoRAs of linear layers, and words is of the kind embedding"):
        export.as_lora(adapted("static"), target=target)
    with pytest.raises(LilyError, match=r"stock Lily adapts nn\.Linear only, not Conv1d, Conv2d, Conv3d, E"):
        export.write_stock(adapted("static"), "never")


def test_a_rank_or_a_reader_that_groups_rule_out_is_refused():
    model, _ = one(CONVS["groups"](), "static")
    model.base_model.model[0].base_layer.padding_mode = "zeros"
    with pytest.raises(LilyError, match="rank=3 is not valid: 0 is a convolution with groups=2"):
        export.as_lora(model, rank=3, force=True)
    with pytest.raises(LilyError, match="diffusers reads no LoRA of a convolution with groups"):
        export.as_lora(model, target="diffusers")
    with pytest.raises(LilyError, match="own_r=3 is not a multiple"):
        one(CONVS["groups"](), "static", own_r=3)


def test_a_budget_gives_a_rank_that_groups_divide_and_is_not_exceeded():
    specs = select_modules(pixels(), LilyConfig(target_modules=["grouped", "head"]))
    for budget in range(120, 400, 7):
        choice = choose(specs, parameters=budget)
        plan = build_plan(specs, LilyConfig(target_modules=["grouped", "head"], **choice.options))
        assert choice.r % 2 == 0
        assert plan.parameters.total == choice.parameters <= budget


def test_pefts_own_conversion_says_that_it_takes_linear_layers_alone():
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(adapted("static"), rank=2)


def test_stock_peft_refuses_the_file(tmp_path):
    import json

    adapted("batch").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LILY_PEFT"


def test_two_adapters_act_together_and_one_goes(tmp_path):
    model = adapted("token")
    first = run(model)
    model.add_adapter("other", LilyConfig(r=2, num_B=3, routing="static", target_modules=["words", "patch"]))
    randomise(model, seed=4)
    model.base_model.set_adapter(["default", "other"])
    assert not torch.allclose(run(model), first, atol=1e-3)
    model.set_adapter("other")
    alone = run(model)
    model.delete_adapter("default")
    assert torch.equal(run(model), alone)


@pytest.mark.parametrize("routing", ["token", "static"])
def test_it_trains_under_autocast_and_in_half_precision(routing):
    for model, autocast in ((adapted(routing), True), (adapted(routing).to(torch.bfloat16), False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(ids())
        out.float().square().sum().backward()
        assert out.dtype == torch.bfloat16
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_compiled_model_has_no_graph_break_and_equals_the_eager_one():
    model = adapted("token", target_modules=["words", "patch", "grouped", "line"])
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(ids()), model(ids()), atol=1e-6)


def test_the_patch_embedding_of_a_vision_transformer_and_tied_word_embeddings(tmp_path):
    config = LilyConfig(r=4, num_B=2, routing="static", target_modules=["projection", "q_proj"])
    model = randomise(get_peft_model(build("vit"), config)).eval()
    expected = predict(model, inputs("vit"))
    export.write_lora(export.as_lora(model), tmp_path / "lora")
    back = PeftModel.from_pretrained(build("vit"), tmp_path / "lora").eval()
    assert torch.allclose(predict(back, inputs("vit")), expected, atol=1e-5)
    base = build("llama")
    base.lm_head.weight = base.model.embed_tokens.weight
    tied = randomise(get_peft_model(base, LilyConfig(r=4, num_B=1, target_modules=["embed_tokens"])))
    with pytest.raises(LilyError, match="are one tensor"):
        tied.merge_adapter()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapted_word_embedding_is_saved_and_loaded(tmp_path):
    config = LilyConfig(r=4, num_B=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    model = randomise(get_peft_model(build("llama"), config)).eval()
    expected = predict(model, inputs("llama"))
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert torch.equal(predict(back, inputs("llama")), expected)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [(EMBEDDING, ["words"]), ("conv1d", ["line"]), ("conv2d", ["patch", "grouped"]), ("conv3d", ["cube"])],
)
def test_a_plan_of_other_kinds_prints_and_costs(kind, targets):
    from lily.plan.report import PlanRequest, plan_for

    report = plan_for(pixels(), PlanRequest(targets=targets, r=2), name="pixels")
    assert {group.kind for group in report.groups} == {kind}
    assert 0 < report.costs.compute.share < 10
    assert dataclasses.asdict(report)
