"""The sharing plan: deterministic, and independent of how a module was selected."""

from __future__ import annotations

import os
import subprocess
import sys

import peft
import pytest
import torch
from helpers import TARGETS, build
from paths import ROOT
from torch import nn

from lily import LilyConfig, LilyError, build_plan, select_modules
from lily.plan.sharing_plan import ModuleSpec
from lily.plan.walk import NoTargetError


def plan_of(model, **options):
    config = LilyConfig(**options)
    return build_plan(select_modules(model, config), config)


def specs(*names, n=4, m=4):
    return [ModuleSpec(name, n, m) for name in names]


def test_neighbours_share_a_and_all_share_b():
    plan = plan_of(build("llama"), target_modules=["q_proj"], r=4, stride_A=3, num_B=2)
    (group,) = plan.groups
    layer = "model.layers.{}.self_attn.q_proj".format
    assert group.blocks == ((layer(0), layer(1), layer(2)), (layer(3),))
    assert [plan.slots[layer(i)].A for i in range(4)] == [0, 0, 0, 1]
    assert {plan.slots[layer(i)].B for i in range(4)} == {0}


@pytest.mark.parametrize(("layers", "num_A", "stride"), [(6, 4, 2), (6, 3, 2), (7, 2, 4), (4, 9, 1), (5, 1, 5)])
def test_num_a_is_the_ceiling_of_layers_over_stride(layers, num_A, stride):
    names = [f"l.{i}.q" for i in range(layers)]
    (group,) = build_plan(specs(*names), LilyConfig(num_A=num_A)).groups
    assert group.stride == stride
    assert group.members == tuple(names)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "vit"])
def test_the_plan_is_the_same_for_a_list_a_regex_and_full_names(kind):
    model, names = build(kind), TARGETS[kind]
    options = {"stride_A": 2, "num_B": 3}
    listed = plan_of(model, target_modules=names, **options)
    regex = plan_of(model, target_modules=rf".*\.({'|'.join(n.replace('.', chr(92) + '.') for n in names)})", **options)
    full = plan_of(model, target_modules=list(listed.slots), **options)
    assert listed == regex == full


def test_all_linear_gives_the_plan_of_the_list_of_all_names():
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert plan_of(build("llama"), target_modules="all-linear") == plan_of(build("llama"), target_modules=every)


@pytest.mark.slow
def test_the_plan_does_not_depend_on_the_hash_seed():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from helpers import build\n"
        "from lily import LilyConfig, build_plan, select_modules\n"
        "for t in (['proj', 'q_proj', 'attn.proj'], ['dense', 'output.dense', 'query'], 'all-linear'):\n"
        "    c = LilyConfig(target_modules=t, stride_A=2)\n"
        "    try: print(build_plan(select_modules(build('bert'), c), c))\n"
        "    except ValueError as e: print(e)\n"
    )
    outputs = set()
    for seed in ("0", "1"):
        run = subprocess.run(
            [sys.executable, "-c", code, str(ROOT / "tests" / "support")],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.add(run.stdout)
    assert len(outputs) == 1
    assert "groups" in outputs.pop()


def test_a_module_listed_several_times_takes_the_longest_name_at_a_dot():
    config = LilyConfig(target_modules=["proj", "attn.proj", "q_proj"])
    names = [g.name for g in build_plan(specs("a.attn.proj", "a.mlp.proj", "a.q_proj"), config).groups]
    assert names == ["attn.proj", "proj", "q_proj"]


def test_shapes_part_a_group():
    modules = [ModuleSpec("a.q", 4, 4), ModuleSpec("b.q", 4, 8), ModuleSpec("c.q", 4, 4)]
    assert [g.members for g in build_plan(modules, LilyConfig()).groups] == [("a.q", "c.q"), ("b.q",)]


@pytest.mark.parametrize("routing", ["token", "static", "uniform"])
@pytest.mark.parametrize("num_B", [1, 3])
def test_the_closed_formula_counts_the_parameters_of_the_model(routing, num_B):
    import peft

    model = build("llama")
    config = LilyConfig(target_modules=TARGETS["llama"], r=5, num_A=2, num_B=num_B, routing=routing)
    plan = build_plan(select_modules(model, config), config)
    adapted = peft.get_peft_model(model, config)
    assert plan.parameters.total == adapted.get_nb_trainable_parameters()[0]


def test_the_plan_of_a_meta_model_is_that_of_the_real_one():
    with torch.device("meta"):
        meta = build("llama")
    assert plan_of(meta, target_modules="all-linear") == plan_of(build("llama"), target_modules="all-linear")


def test_rank_pattern_sets_the_rank_of_a_group():
    plan = plan_of(build("llama"), target_modules=["q_proj", "v_proj"], r=8, rank_pattern={"v_proj": 3})
    assert [g.r for g in plan.groups] == [8, 3]


def test_ranks_that_differ_inside_a_group_are_refused():
    with pytest.raises(LilyError, match=r"group 'q_proj' several ranks \(3 for model.layers.0.self_attn.q_proj, 8 for"):
        plan_of(build("llama"), target_modules=["q_proj"], r=8, rank_pattern={r"layers\.0\.self_attn\.q_proj": 3})


def test_layers_to_transform_and_exclude_modules_narrow_the_choice():
    plan = plan_of(
        build("llama"), target_modules=["q_proj", "v_proj"], layers_to_transform=[1, 2], layers_pattern="layers"
    )
    assert sorted(plan.slots) == [f"model.layers.{i}.self_attn.{n}_proj" for i in (1, 2) for n in "qv"]
    plan = plan_of(build("llama"), target_modules="all-linear", exclude_modules=["down_proj"])
    assert not any("down_proj" in name for name in plan.slots)


@pytest.mark.parametrize("indices", [[0, 9], 9])
def test_a_layer_index_that_chooses_nothing_is_refused(indices):
    config = LilyConfig(target_modules=["q_proj"], layers_to_transform=indices)
    with pytest.raises(LilyError, match=r"index 9, but no layer of that number|matches no module in layers 9"):
        select_modules(build("llama"), config)


class AtTheRoot(nn.Module):
    """A list of layers at the root of a model."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in range(3))
        self.inner = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8, 8)})])})


def test_layers_of_a_list_at_the_root_are_found_by_its_name():
    with pytest.raises(NoTargetError, match=r"no module in layers \[1\]; give layers_pattern='blocks', .*the root"):
        plan_of(AtTheRoot(), target_modules=["fc"], layers_to_transform=[1])
    with pytest.raises(LilyError, match=r"index 2, but no layer .*; give layers_pattern='blocks', .*the root"):
        plan_of(AtTheRoot(), target_modules=["fc"], layers_to_transform=[0, 2])
    plan = plan_of(AtTheRoot(), target_modules=["fc"], layers_to_transform=[1], layers_pattern="blocks")
    assert list(plan.slots) == ["blocks.1.fc"]


def test_layers_that_match_are_named_where_none_has_the_number():
    with pytest.raises(NoTargetError, match=r"in layers 9; layers that match: 0, 1, 2 in blocks; 0 in layers$"):
        plan_of(AtTheRoot(), target_modules=["fc"], layers_to_transform=9)
    with pytest.raises(NoTargetError, match=r"no module in layers \[0\]; give layers_pattern='layers', where .* are$"):
        plan_of(build("llama"), target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="h")
    with pytest.raises(NoTargetError, match=r"layers that match: bert.pooler.dense, which have no number$"):
        plan_of(build("bert"), target_modules=["pooler.dense"], layers_to_transform=[0])
    with pytest.raises(NoTargetError, match="matches no module; did you mean q_proj"):
        plan_of(build("llama"), target_modules=["qproj"], layers_to_transform=[0])


def test_a_rank_for_a_name_that_no_layer_has_is_refused():
    config = LilyConfig(target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 8, "v_prj": 4})
    modules = select_modules(build("llama"), config)
    with pytest.raises(LilyError, match=r"key 'v_prj', which matches no adapted layer; did you mean v_proj\?"):
        build_plan(modules, config)


def test_targets_that_match_nothing_name_near_matches():
    with pytest.raises(NoTargetError, match="matches no module; did you mean q_proj") as caught:
        plan_of(build("llama"), target_modules=["qproj"])
    assert "down_proj" in str(caught.value)
    with pytest.raises(LilyError, match="excluded by exclude_modules"):
        plan_of(build("llama"), target_modules=["q_proj"], exclude_modules=["q_proj"])
    with pytest.raises(LilyError, match=r"in layers \[99\]"):
        plan_of(build("llama"), target_modules=["q_proj"], layers_to_transform=[99])


def test_a_target_that_is_not_linear_is_refused_before_anything_changes():
    with pytest.raises(LilyError, match=r"input_layernorm is a LlamaRMSNorm, not a linear layer.*nn\.Conv2d"):
        plan_of(build("llama"), target_modules=["q_proj", "input_layernorm"])


def test_a_projection_that_its_parent_never_calls_is_refused():
    kind = type("Rotary", (nn.MultiheadAttention,), {"forward": lambda self, x: x})
    model = nn.Sequential(kind(8, 2), nn.Linear(8, 8))
    with pytest.raises(LilyError, match="reads its weight without calling it"):
        plan_of(model, target_modules=["out_proj", "1"])
    with pytest.warns(UserWarning, match=r"'all-linear' leaves out 0\.out_proj: torch\.nn.MultiheadAttention reads"):
        assert list(plan_of(model, target_modules="all-linear").slots) == ["1"]


def test_all_linear_on_a_model_without_linear_layers_is_refused():
    with pytest.raises(NoTargetError, match=r"'all-linear' matches no layer.*name convolutions"):
        plan_of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), target_modules="all-linear")


def test_names_that_also_match_what_cannot_be_adapted_do_not_stop_all_linear():
    inside = {"a": nn.ModuleDict({"proj": nn.Linear(8, 8)}), "b": nn.ModuleDict({"proj": nn.Conv3d(1, 8, 2)})}
    model = nn.ModuleDict({**inside, "proj": nn.LayerNorm(8)})
    adapted = peft.get_peft_model(model, LilyConfig(r=2, num_A=1, num_B=1, target_modules="all-linear"))
    assert [layer.name for layer in peft.get_layer_status(adapted)] == ["model.a.proj"]


def test_a_plan_prints_who_shares_what():
    text = str(plan_of(build("llama"), target_modules=["q_proj"], stride_A=2))
    assert "4 layers in 1 groups, routing sequence" in text
    assert "A0: model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj" in text
