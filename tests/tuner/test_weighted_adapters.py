"""`add_weighted_adapter`: `cat` is the exact sum; the other kinds are what PEFT's LoRA makes of the exports."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from every_kind import KINDS, base, lily_config, output
from helpers import build, inputs, predict, randomise
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from lily import LilyConfig, LilyError, export
from lily.layers.layer import LilyLayer
from lily.tuner.adapter import find
from lily.tuner.weighted_terms import KINDS as COMBINATIONS

pytestmark = [pytest.mark.sample(every=8), pytest.mark.filterwarnings("ignore")]

WEIGHTS = [0.7, -1.3]
# what LoRA calls combinations of A and B themselves, and not of updates
PRUNED = {kind: {"density": 0.6} for kind in COMBINATIONS if kind.startswith(("ties", "dare", "magnitude"))}


def config(**options: object) -> LilyConfig:
    shared = {
        "r": 4,
        "num_A": 2,
        "num_B": 3,
        "routing": "static",
        "scaling": 2.0,
        "target_modules": ["q_proj", "down_proj"],
    }
    return LilyConfig(**{**shared, "task_type": "CAUSAL_LM", **options})


def trained(*options: dict[str, object], kind: str = "llama") -> PeftModel:
    """A model with an adapter `a`, `b`, ... for each of some options, and large random tensors."""
    model = get_peft_model(build(kind), config(**options[0]), adapter_name="a")
    for name, own in zip("bcdef", options[1:], strict=False):
        model.add_adapter(name, config(**own))
    return randomise(model, scale=0.3).eval()


def lora_of(model: PeftModel, fresh: nn.Module, names: list[str]) -> PeftModel:
    """The adapters of a model as LoRAs on a fresh base."""
    exports = {name: export.as_lora(model, adapter=name) for name in names}
    lora = None
    for name, exported in exports.items():
        if lora is None:
            lora = get_peft_model(fresh, exported.config, adapter_name=name)
        else:
            lora.add_adapter(name, exported.config)
        loaded = set_peft_model_state_dict(lora, exported.state_dict(), adapter_name=name)
        assert not loaded.unexpected_keys
    return lora.eval()


def with_adapter(model: PeftModel, name: str) -> torch.Tensor:
    model.set_adapter(name)
    return predict(model, inputs("llama"))


def updates(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    return {n: layer.factors(name).delta for n, layer in find(model, name).layers.items()}


def weighted_sum(model: PeftModel, names: list[str], weights: list[float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for name, weight in zip(names, weights, strict=True):
        for layer, update in updates(model, name).items():
            total[layer] = total.get(layer, 0) + weight * update
    return total


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        assert torch.allclose(found[name], update, atol=1e-5, rtol=1e-4), name
        assert update.abs().max() > 0.05


@pytest.fixture(scope="module")
def pair() -> tuple[PeftModel, PeftModel]:
    """A model with two Lily adapters, and one with the LoRAs that they are."""
    lily = trained({}, {"num_B": 2, "gain": "ones"})
    return lily, lora_of(lily, build("llama"), ["a", "b"])


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_every_kind_gives_what_lora_gives(pair, kind):
    outputs = []
    for model in pair:
        torch.manual_seed(5)
        model.add_weighted_adapter(["a", "b"], WEIGHTS, kind, kind, **PRUNED.get(kind, {}))
        outputs.append(with_adapter(model, kind))
        model.delete_adapter(kind)
    assert torch.allclose(*outputs, atol=2e-4)
    assert not torch.allclose(outputs[0], with_adapter(pair[0], "a"), atol=1e-2)


@pytest.mark.parametrize(("kind", "rank"), [("cat", 8), ("ties", 4)])
def test_a_combination_is_saved_loaded_exported_and_merged(pair, kind, rank, tmp_path):
    lily = pair[0]
    lily.add_weighted_adapter(["a", "b"], WEIGHTS, f"my_{kind}", kind, **PRUNED.get(kind, {}))
    expected = with_adapter(lily, f"my_{kind}")
    lily.save_pretrained(tmp_path, selected_adapters=[f"my_{kind}"])
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / f"my_{kind}").eval()
    assert torch.allclose(predict(loaded, inputs("llama")), expected, atol=1e-5)
    exported = export.as_lora(loaded)
    assert exported.rank == rank  # LoRA's
    assert exported.provenance["combination"] == {"type": kind, "adapters": ["a", "b"], "weights": WEIGHTS}
    lora = lora_of(loaded, build("llama"), ["default"])
    assert torch.allclose(predict(lora, inputs("llama")), expected, atol=2e-4)
    assert torch.allclose(predict(loaded.merge_and_unload(), inputs("llama")), expected, atol=2e-4)


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_loras_other_options_are_passed_on(pair, method):
    options = {"density": 0.5, "majority_sign_method": method, "svd_rank": 2, "svd_clamp": 0.9}
    found = []
    for model in pair:
        model.add_weighted_adapter(["a", "b"], WEIGHTS, method, "ties_svd", svd_full_matrices=False, **options)
        found.append(with_adapter(model, method))
    assert torch.allclose(*found, atol=2e-4)
    assert export.as_lora(pair[0], adapter=method).rank == 2
    for model in pair:
        model.delete_adapter(method)


SHARED = {
    "equal plans": ({"distinct": "none"}, {"distinct": "none"}),
    "other ranks and experts": ({"distinct": "none"}, {"distinct": "none", "r": 6, "num_B": 2}),
    "gain and own ranks": ({"distinct": "none", "gain": "ones"}, {"distinct": "none", "num_B": 1, "own_r": 2}),
    "a layer's scale": ({"distinct": "none"}, {"distinct": "none", "scaling_pattern": {"layers.1.+q_proj": 9.0}}),
    "uniform": ({"distinct": "none", "routing": "uniform"}, {"distinct": "none"}),
}
APART = {
    "permuted": ({}, {"distinct_seed": 4}),
    "signs and gain": ({"distinct": "signs", "gain": "signs"}, {"distinct": "permute+signs", "own_r": 1}),
    "other blocks": ({"distinct": "none"}, {"distinct": "none", "num_A": 1}),
    "groups that differ": ({"rank_pattern": {"down_proj": 2}, "group_options": {"q_proj": {"num_B": 2}}}, {"num_B": 1}),
}


@pytest.mark.parametrize("case", [*SHARED, *APART])
def test_cat_is_the_exact_sum_and_keeps_the_sharing(case):
    model = trained(*{**SHARED, **APART}[case], {"num_B": 1})
    names, weights = ["a", "b"], WEIGHTS
    model.add_weighted_adapter(names, weights, "new", "cat")
    assert_same(updates(model, "new"), weighted_sum(model, names, weights))
    plan, first = find(model, "new").plan, find(model, "a").plan
    for group, like in zip(plan.groups, first.groups, strict=True):
        assert group.members == like.members
        assert group.r == sum(find(model, name).plan.group_of(like.layers[0]).r for name in names)
        assert group.blocks == (like.blocks if case in SHARED else tuple((name,) for name in like.members))
    model.add_weighted_adapter(["new", "c", "a"], [2.0, -1.0, 0.0], "again", "cat")  # of a combination
    assert_same(updates(model, "again"), weighted_sum(model, ["new", "c"], [2.0, -1.0]))


DYNAMIC = {
    "permuted": {},
    "shared router": {"shared_router": True},
    "all that layers have": {"own_r": 2, "gain": "signs", "distinct": "permute+signs"},
    "relu": {"activation": "relu"},
    "shared A": {"distinct": "none"},
}


@pytest.mark.parametrize(
    ("routing", "case"), [*(("token", case) for case in DYNAMIC), ("sequence", "shared A"), ("batch", "shared A")]
)
def test_cat_of_routed_adapters_is_exact(routing, case, tmp_path):
    options = {**DYNAMIC[case], "routing": routing}
    model = trained(options, {**options, "num_B": 2, "r": 6}, {**options, "num_B": 1})
    model.add_weighted_adapter(["a", "b", "c"], [0.6, -1.1, 0.3], "new", "cat")
    assert model.peft_config["new"].routing == routing
    assert find(model, "new").plan.shared_router == (case == "shared router")
    for layer in find(model, "new").layers.values():
        x = torch.randn(2, 5, layer.in_features)
        parts = [layer.update_of(name, x) for name in "abc"]
        expected = 0.6 * parts[0] - 1.1 * parts[1] + 0.3 * parts[2]
        assert torch.allclose(layer.update_of("new", x), expected, atol=1e-4)
        assert expected.abs().max() > 0.1
    expected = with_adapter(model, "new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "new").eval()
    assert torch.equal(predict(loaded, inputs("llama")), expected)


def test_a_static_adapter_beside_a_routed_one_becomes_own_ranks():
    model = trained({"routing": "token"}, {"routing": "static", "num_B": 2}, {"target_modules": ["o_proj"]})
    model.add_weighted_adapter(["a", "b", "c"], [0.6, -1.1, 1.0], "new", "cat")
    for name, layer in find(model, "new").layers.items():
        x = torch.randn(2, 5, layer.in_features)
        used = {"c": 1.0} if name.endswith("o_proj") else {"a": 0.6, "b": -1.1}
        expected = sum(weight * layer.update_of(adapter, x) for adapter, weight in used.items())
        assert torch.allclose(layer.update_of("new", x), expected, atol=1e-4)
        assert layer.settings["new"].own_r == 4


@pytest.mark.sample(every=6)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind, tmp_path):
    model = get_peft_model(base(), lily_config(kind), adapter_name="a")
    if kind != "saved module":
        model.add_adapter("b", lily_config(kind, r=3))
    else:
        model.add_adapter("b", LilyConfig(r=3, routing="static", target_modules=["linear"]))
        torch.nn.init.normal_(model.get_parameter("base_model.model.head.modules_to_save.a.weight"))
    randomise(model, scale=0.4).eval()
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "cat", "cat")
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "svd", "svd", svd_rank=5)  # all ranks, so exact
    expected = weighted_sum(model, ["a", "b"], WEIGHTS)
    assert_same(updates(model, "cat"), expected)
    assert_same(updates(model, "svd"), expected)
    model.save_pretrained(tmp_path, selected_adapters=["cat", "svd"])
    outputs = []
    for name in ("cat", "svd"):
        model.set_adapter(name)
        outputs.append(output(model))
        fresh = PeftModel.from_pretrained(base(), tmp_path / name).eval()
        assert torch.allclose(output(fresh), outputs[-1], atol=1e-5)
        if kind == "parallel":  # belongs to no weight
            continue
        if name == "cat":
            assert torch.allclose(output(lora_of(model, base(), [name])), outputs[-1], atol=1e-4)
        assert torch.allclose(output(fresh.merge_and_unload()), outputs[-1], atol=1e-4)
    assert torch.allclose(*outputs, atol=1e-4)
    if kind == "saved module":  # the trained module of the one adapter that has it
        heads = model.base_model.model.head.modules_to_save
        assert torch.equal(heads["cat"].weight, heads["a"].weight)
        assert not torch.equal(heads["a"].weight, model.base_model.model.head.original_module.weight)


@pytest.mark.parametrize("kind", ["linear", "svd", "cat"])
def test_adapters_of_other_layers_add_up_as_loras_do(kind):
    lily = trained(
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]}, {"target_modules": ["q_proj", "v_proj"]}
    )
    lora = lora_of(lily, build("llama"), ["a", "b"])
    for model in (lily, lora):
        model.add_weighted_adapter(["a", "b"], WEIGHTS, "new", kind)
    assert torch.allclose(with_adapter(lily, "new"), with_adapter(lora, "new"), atol=2e-4)
    assert len(find(lily, "new").layers) == 8


@pytest.mark.parametrize("kind", ["svd", "cat"])
def test_adapters_of_other_layers_add_up_once_they_are_loaded_from_files(kind, tmp_path):
    trained({"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "v_proj"]}).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build("llama"), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    ranks = sum(model.peft_config[name].r for name in "ab")
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "new", kind, svd_rank=ranks)  # so the SVD is exact
    assert_same(updates(model, "new"), weighted_sum(model, ["a", "b"], WEIGHTS))


class Stages(nn.Sequential):
    """Layers of one name and several shapes, and one of another name."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        sizes = [(8, 8), (8, 16), (16, 16)]
        stages = [nn.Sequential() for _ in sizes]
        for stage, size in zip(stages, sizes, strict=True):
            stage.add_module("fc", nn.Linear(*size))
        super().__init__(*stages, nn.Sequential(OrderedDict(out=nn.Linear(16, 4))))


OF_STAGES = {"r": 4, "num_A": 1, "num_B": 1, "routing": "static", "target_modules": ["fc"]}


def two_of_stages(**options: object) -> PeftModel:
    model = get_peft_model(Stages(), LilyConfig(**OF_STAGES), adapter_name="a")
    model.add_adapter("b", LilyConfig(**{**OF_STAGES, **options}))
    return randomise(model, scale=0.3).eval()


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["1.fc"]},
        {"target_modules": ["1.fc", "out"], "num_B": 2, "own_r": 2},
        {"rank_pattern": {"1.fc": 2}},
    ],
)
def test_layers_of_one_name_have_several_shapes(kind, options, tmp_path):
    model = two_of_stages(**options)
    expected = weighted_sum(model, ["a", "b"], WEIGHTS)
    # a rank above the inputs of some layers, as of adapters with several times LoRA's
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "new", combination_type=kind, svd_rank=12)
    assert_same(updates(model, "new"), expected)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    assert_same(updates(PeftModel.from_pretrained(Stages(), tmp_path / "new"), "default"), expected)


def test_routed_adapters_that_differ_between_shapes_are_refused():
    model = two_of_stages(target_modules=["1.fc"], num_B=2, routing="token")
    with pytest.raises(LilyError, match="layers called fc have several shapes"):
        model.add_weighted_adapter(["a", "b"], WEIGHTS, "new", combination_type="cat")
    assert list(model.peft_config) == ["a", "b"]


def test_adapters_with_equal_ranks_where_they_meet_are_added_up():
    model = two_of_stages(target_modules=["1.fc", "out"], rank_pattern={"out": 6})
    both = updates(model, "a"), updates(model, "b")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", combination_type="linear")
    new = updates(model, "new")
    assert torch.allclose(new["0.fc"], both[0]["0.fc"], atol=1e-6)
    assert torch.allclose(new["3.out"], both[1]["3.out"], atol=1e-6)


def test_what_trains_and_what_is_active_are_as_with_lora(pair):
    for model, layer, prefix in zip(pair, (LilyLayer, LoraLayer), ("lily_", "lora_"), strict=True):
        model.set_adapter("a")
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        tensors = {name: p.clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            expected = predict(model, inputs("llama"))
        model.add_weighted_adapter(["b"], [-0.5], "scaled", "svd")  # one adapter is only multiplied
        new = {name: p for name, p in model.named_parameters() if name not in before}
        assert model.active_adapter == "a"
        assert torch.equal(predict(model, inputs("llama")), expected)
        assert new
        assert all(".scaled." in name and not p.requires_grad for name, p in new.items())
        assert {name: p.requires_grad for name, p in model.named_parameters() if name in before} == before
        assert all(torch.equal(model.get_parameter(name), t) for name, t in tensors.items())
        model.set_adapter("scaled")
        assert all(p.requires_grad == (".scaled." in name) for name, p in model.named_parameters() if prefix in name)
        for m in model.modules():
            if isinstance(m, layer) and "b" in m.scaling:
                assert torch.allclose(m.get_delta_weight("scaled"), -0.5 * m.get_delta_weight("b"), atol=1e-6)
    lily = pair[0]
    loss = lily(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None for name, p in lily.named_parameters() if ".scaled." in name)
    lily.zero_grad()
    for model in pair:
        model.delete_adapter("scaled")
        assert not [name for name, _ in model.named_parameters() if ".scaled." in name]


def test_a_merged_adapter_is_combined_as_it_was(pair):
    for model in pair:
        model.set_adapter("a")
        model.merge_adapter(["a"])
        model.add_weighted_adapter(["a", "b"], WEIGHTS, "late", "cat")
        model.unmerge_adapter()
    assert torch.allclose(with_adapter(pair[0], "late"), with_adapter(pair[1], "late"), atol=2e-4)


ERRORS = {
    "unknown": ((["a", "x"], WEIGHTS, "n", "cat"), {}, "adapter 'x' does not exist; the model has a, b"),
    "weights": ((["a", "b"], [1.0], "n", "cat"), {}, "2 adapters and 1 weights"),
    "kind": ((["a", "b"], WEIGHTS, "n", "mean"), {}, "combination_type='mean' is not known; choose one of cat, linear"),
    "density": ((["a", "b"], WEIGHTS, "n", "ties"), {}, "density=None; give a share from 0 to 1"),
    "signs": (
        (["a", "b"], WEIGHTS, "n", "ties"),
        {"density": 0.5, "majority_sign_method": "x"},
        "majority_sign_method",
    ),
    "ranks": ((["a", "c"], WEIGHTS, "n", "linear"), {}, "needs equal ranks, but 'a' has rank 4 and 'c' 2"),
    "taken": ((["a", "b"], WEIGHTS, "b", "cat"), {}, "there is an adapter 'b' already"),
    "none": (([], [], "n", "cat"), {}, "adapters is empty"),
    "rank": ((["a", "b"], WEIGHTS, "n", "svd"), {"svd_rank": 0}, "svd_rank=0 is not a rank"),
    "dynamic": ((["a", "d"], WEIGHTS, "n", "linear"), {}, "use combination_type='cat'.*collapse.*settle"),
    "routings": ((["d", "e"], WEIGHTS, "n", "cat"), {}, "different routings .sequence, token.; make it static first"),
}


@pytest.fixture(scope="module")
def several() -> PeftModel:
    return trained({}, {}, {"r": 2}, {"routing": "token"}, {"routing": "sequence"})


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_combined_is_refused_and_changes_nothing(several, case):
    arguments, options, message = ERRORS[case]
    before = [name for name, _ in several.named_parameters()]
    with pytest.raises(LilyError, match=message):
        several.add_weighted_adapter(*arguments, **options)
    assert [name for name, _ in several.named_parameters()] == before
    assert list(several.peft_config) == list("abcde")


def test_two_saved_modules_are_refused_as_with_lora():
    shared = {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    lily = trained(shared, shared, kind="bert")
    for model in (lily, lora_of(lily, build("bert"), ["a", "b"])):
        with pytest.raises(ValueError, match="modules_to_save"):
            model.add_weighted_adapter(["a", "b"], WEIGHTS, "new", "cat")
        assert "new" not in model.peft_config


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_adapters_on_convolutions_with_groups_are_refused(kind):
    model = get_peft_model(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), LilyConfig(r=2, num_B=1, target_modules=["0"]))
    with pytest.raises(LilyError, match=r"0 is a convolution with groups=2.*set_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "new", combination_type=kind)
    assert list(model.peft_config) == ["default"]
