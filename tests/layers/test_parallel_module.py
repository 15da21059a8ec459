"""Adapters beside whole modules, options of single groups, and routers that layers share."""

from __future__ import annotations

import pytest
import torch
from helpers import build, inputs, predict, randomise
from peft import PeftModel, get_peft_model
from torch import nn

from lily import LilyConfig, collapse, functional
from lily.errors import LilyError
from lily.export import as_lora
from lily.tuner.adapter import find

PAPER = {
    "target_modules": ["q_proj", "v_proj"],
    "parallel_modules": ["ViTMLP"],
    "rank_pattern": {"mlp": 8},
    "group_options": {"mlp": {"activation": "relu"}},
}


def vit(**options: object) -> PeftModel:
    torch.manual_seed(1)
    config = LilyConfig(**{"r": 4, "num_A": 2, "num_B": 3, "routing": "sequence", "scaling": 1.0, **PAPER, **options})
    return randomise(get_peft_model(build("vit"), config)).eval()


def test_an_adapter_beside_an_mlp_equals_the_formula(routing):
    model = vit(routing=routing)
    found = find(model)
    blocks = [name for name in found.layers if name.endswith("mlp")]
    assert len(blocks) == 3
    assert found.plan.group_of(blocks[0]).r == 8
    for name in blocks:
        layer = found.layers[name]
        x = torch.randn(2, 7, 32)
        A, B = layer.tensors_of("default")
        router = layer.router_of("default")
        update = functional.lily(x, A, B, router, routing=routing, activation="relu")
        with torch.no_grad():
            assert torch.allclose(layer(x), layer.base_layer(x) + update, atol=1e-5)
    assert {found.layers[n].settings["default"].activation for n in found.layers if n not in blocks} == {"none"}


def test_it_trains_saves_and_loads(routing, tmp_path):
    model = vit(routing=routing).train()
    model(**inputs("vit")).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(build("vit"), tmp_path).eval()
    assert torch.equal(predict(back, inputs("vit")), predict(model, inputs("vit")))
    assert not torch.allclose(predict(back, inputs("vit")), predict(build("vit"), inputs("vit")), atol=1e-3)
    assert torch.equal(predict(back.unload(), inputs("vit")), predict(build("vit"), inputs("vit")))


def test_an_untrained_adapter_beside_a_module_changes_nothing(routing):
    config = LilyConfig(r=4, num_B=3, routing=routing, parallel_modules=["mlp"])
    model = get_peft_model(build("vit"), config).eval()
    assert torch.equal(predict(model, inputs("vit")), predict(build("vit"), inputs("vit")))
    assert {name.rpartition(".")[2] for name in find(model).layers} == {"mlp"}


def test_a_second_adapter_goes_beside_the_same_module():
    model = vit()
    first = predict(model, inputs("vit"))
    model.add_adapter("more", LilyConfig(r=2, num_B=2, parallel_modules=["mlp"]))
    model.set_adapter("more")
    assert torch.equal(predict(model, inputs("vit")), predict(build("vit"), inputs("vit")))
    model.set_adapter("default")
    assert torch.equal(predict(model, inputs("vit")), first)


def test_what_runs_beside_a_module_is_neither_merged_nor_exported():
    model = vit(routing="static", group_options=None)
    with pytest.raises(LilyError, match="runs in parallel to a ViTMLP"):
        model.merge_adapter()
    with pytest.raises(LilyError, match="is of the kind block"):
        as_lora(model)


class Pair(nn.Module):
    """Gives another number of tokens than it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4))
        self.inner.register_forward_hook(lambda m, args, out: out[:, :1])

    def forward(self, x):
        return self.inner(x)


def test_a_module_that_drops_tokens_is_refused_when_it_runs():
    model = get_peft_model(Pair(), LilyConfig(r=2, num_B=2, parallel_modules=["inner"]))
    with pytest.raises(LilyError, match=r"its input and output are \(2, 3, 4\) and \(2, 1, 4\)"):
        model(torch.randn(2, 3, 4))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"parallel_modules": ["nothing"]}, "'nothing' matches no module by name or class"),
        ({"parallel_modules": ["layernorm_before"]}, "without linear layers"),
        ({"parallel_modules": ["mlp"], "target_modules": ["fc1"]}, "fc1 is inside .*mlp"),
        ({"group_options": {"mlp": {"num_B": 1}}, "target_modules": ["q_proj"]}, "'mlp', which matches no group"),
    ],
)
def test_modules_that_cannot_be_are_refused_before_anything_is_touched(options, says):
    model = build("vit")
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(LilyError, match=says):
        get_peft_model(model, LilyConfig(r=4, **options))
    assert [n for n, _ in model.named_modules()] == names


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"group_options": {"q": {"r": 3}}}, "set ranks with rank_pattern"),
        ({"group_options": {"q": {"num_B": 0}}}, r"group_options\['q'\]: num_B=0"),
        ({"group_options": {"q": {"stride_A": 2, "num_A": 2}}}, "say the same thing twice"),
        ({"group_options": {"q": 3}}, "is not valid; write"),
        ({"shared_router": True, "routing": "static"}, "separate weights and no router"),
        ({"shared_router": 1}, "is not a bool"),
        ({"parallel_modules": "mlp"}, "not a list of names"),
    ],
)
def test_options_that_cannot_be_are_refused(options, says):
    with pytest.raises(LilyError, match=says):
        LilyConfig(r=4, target_modules=["q"], **options)


def test_options_of_a_group_hold_for_it_alone():
    own = {"value": {"num_B": 1, "stride_A": 1, "scaling": 0.5, "dropout": 0.1}}
    config = LilyConfig(
        r=4, num_A=2, num_B=3, routing="token", target_modules=["query", "value"], group_options=own, scaling=2.0
    )
    found = find(get_peft_model(build("bert"), config))
    query, value = found.plan.groups
    assert (query.num_B, len(query.blocks), value.num_B, len(value.blocks)) == (3, 2, 1, 4)
    settings = {
        n.rpartition(".")[2]: (
            m.settings["default"].scaling,
            m.settings["default"].dropout,
            m.router_of("default") is None,
        )
        for n, m in found.layers.items()
    }
    assert settings == {"query": (2.0, 0.0, False), "value": (0.5, 0.1, True)}


@pytest.fixture
def shared() -> PeftModel:
    """As the paper's Vim: one router for all layers, an A per layer, one layer kind without a router."""
    torch.manual_seed(1)
    config = LilyConfig(
        r=4, stride_A=1, num_B=3, routing="token", target_modules=["query", "value"], shared_router=True, scaling=1.0,
        group_options={"value": {"num_B": 1}},
    )  # fmt: skip
    return randomise(get_peft_model(build("bert"), config)).eval()


@pytest.mark.filterwarnings("error:Found missing adapter keys")
def test_layers_that_share_a_router_have_one(shared, tmp_path):
    found = find(shared)
    routers = {id(m.router_of("default")) for n, m in found.layers.items() if n.endswith("query")}
    assert len(routers) == 1
    assert found.plan.parameters.router == 3 * 4
    trainable = sum(p.numel() for p in shared.parameters() if p.requires_grad)
    assert trainable == found.plan.parameters.total
    shared.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    assert torch.equal(predict(back, inputs("bert")), predict(shared, inputs("bert")))
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert sum("lily_router" in key for key in file.keys()) == 1  # noqa: SIM118


def test_a_shared_router_equals_the_formula_and_learns_from_all_layers(shared):
    found = find(shared)
    layer = next(m for n, m in found.layers.items() if n.endswith("query"))
    x = torch.randn(2, 5, 32)
    A, B = layer.tensors_of("default")
    R = layer.router_of("default")
    expected = layer.base_layer(x) + functional.lily(x, A, B, R, routing="token")
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, atol=1e-5)
    shared.train()
    predictions = shared(**inputs("bert")).logits
    assert torch.autograd.grad(predictions.sum(), R)[0].abs().sum() > 0


def test_collapsing_ends_the_sharing_of_a_router(shared):
    report = collapse(shared, [inputs("bert")])
    found = find(shared)
    assert report.adapter == "default"
    assert found.config.shared_router is False
    assert "default" not in found.bank.lily_R
    lora = as_lora(shared)
    assert set(lora.layers) == set(found.layers)
    shared.merge_adapter()
