"""Recipes say of Lily what the paper's vision experiments need: slices, whole modules, groups, one router."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from recipes_helpers import classification, sft, tokenizer, write_recipe
from transformers import AutoModelForCausalLM, Phi3Config
from typer.testing import CliRunner

from lily.cli.main import app
from lily.errors import LilyError
from lily.insight.gather import insight
from lily.recipes import loader, methods, models, train

HIDDEN, INNER, LAYERS = 32, 48, 4
PAPER = {
    "r": 4,
    "num_A": 2,
    "num_B": 3,
    "slices": {"qkv_proj": ["k", "v"]},
    "parallel": ["mlp"],
    "groups": {"mlp": {"r": 8, "activation": "relu"}, "qkv_proj.v": {"num_B": 1, "scaling": 2.0}},
}


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with query, key and value in one projection, and gate and up in another."""
    folder = tmp_path_factory.mktemp("phi")
    words = tokenizer(chat=True)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 6}
    config = Phi3Config(
        **sizes, **ends, num_attention_heads=4, num_key_value_heads=2, vocab_size=len(words), max_position_embeddings=64
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def recipe_with(phi, table, tmp_path, lily, overrides=(), **changes):
    values = sft(phi, table, tmp_path, targets=[], lily=lily, metrics=["loss"], **changes)
    return loader.load_recipe(write_recipe(tmp_path, values), list(overrides))


def group(r, n_in, n_out, num_A, num_B, routers=LAYERS):
    """Parameters by the formula: A (r, in) and B (experts, r, out), and a router (experts, r) for each layer."""
    return num_A * r * n_in + num_B * r * n_out + (routers * num_B * r if num_B > 1 else 0)


def test_slices_modules_and_groups_are_planned_trained_and_read_again(tmp_path, phi, chat_table):
    recipe = recipe_with(phi, chat_table, tmp_path, PAPER, ["train.max_steps=2", "generation.samples=0"])
    small = HIDDEN // 2  # two key heads of four
    expected = {
        "qkv_proj.k": group(4, HIDDEN, small, 2, 3),
        "qkv_proj.v": group(4, HIDDEN, small, 2, 1),
        "mlp": group(8, HIDDEN, HIDDEN, 2, 3),
    }
    said = CliRunner().invoke(app, ["plan", str(tmp_path / "recipe.yaml"), "--json"])
    assert said.exit_code == 0, said.output
    plan = json.loads(said.stdout)["plan"]
    assert {g["name"]: g["parameters"] for g in plan["groups"]} == expected
    assert {g["name"]: g["r"] for g in plan["groups"]} == {"qkv_proj.k": 4, "qkv_proj.v": 4, "mlp": 8}
    assert "mlp: r=8, activation=relu, as given for this group." in plan["reason"]
    result = train.train(recipe, quiet=True)
    assert result.parameters["adapter"] == sum(expected.values()) == plan["parameters"]["total"]
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(phi), tmp_path / "run" / "best")
    config = again.peft_config["default"]
    assert config.group_options == {
        "mlp": {"activation": "relu", "scaling": 2.0},  # by its rank, 8
        "qkv_proj.v": {"num_B": 1, "scaling": 2.0},
    }
    assert config.options_of("qkv_proj.v").scaling == 2.0
    text = CliRunner().invoke(app, ["plan", str(tmp_path / "recipe.yaml"), "--all"]).stdout
    assert "qkv_proj.k" in text
    assert "slices:" in text
    told = insight(str(tmp_path / "run"), rows=4)
    assert {g.name for g in told.plan.groups} == set(expected)
    assert told.equal_lora is None


def test_slices_of_an_unknown_layout_are_said_by_their_outputs(tmp_path, encoder, table):
    lily = {"r": 2, "num_A": 1, "num_B": 2, "slices": {"query": {"head": [8, 16], "last": [0, 8, 16]}}}
    path = write_recipe(tmp_path, classification(encoder, table, tmp_path, targets=["value"], lily=lily))
    recipe = loader.load_recipe(path)
    decided = methods.decide(recipe, models.meta_model(recipe.model, recipe.task))
    assert {g.name: g.out_features for g in decided.plan.groups} == {"query.last": 16, "query.head": 8, "value": 32}


def test_one_router_for_all_layers_counts_once_against_a_budget(tmp_path, phi, chat_table):
    lily = {"params": "9k", "slices": {"qkv_proj": ["k", "v"]}, "parallel": ["mlp"], "shared_router": True}
    recipe = recipe_with(phi, chat_table, tmp_path, lily)
    model = models.meta_model(recipe.model, recipe.task)
    decided = methods.decide(recipe, model)
    assert decided.choice.parameters == decided.plan.parameters.total <= 9000
    assert decided.plan.parameters.router == 3 * decided.choice.r * decided.choice.num_B
    larger = methods.decide(recipe.model_copy(update={"lily": recipe.lily.model_copy(update={"r": decided.choice.r + 1,
        "num_A": decided.choice.num_A, "num_B": decided.choice.num_B, "params": None})}), model)  # fmt: skip
    assert larger.plan.parameters.total > 9000


@pytest.mark.parametrize("exclude", [None, ["down_proj"]])
def test_lora_goes_on_the_sliced_layers_and_inside_the_modules_at_no_more_parameters(
    tmp_path, phi, chat_table, exclude
):
    recipe = recipe_with(phi, chat_table, tmp_path, {**PAPER, "r": 32}, method="lora", exclude=exclude)
    model = models.meta_model(recipe.model, recipe.task)
    lily = methods.decide(recipe, model).plan.parameters.total
    config = methods.peft_config(recipe, model)
    assert isinstance(config, LoraConfig)
    adapted = get_peft_model(models.load_model(recipe.model, recipe.task), config)
    names = {
        name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_modules() if "lora_A" in name
    }
    assert names == {"qkv_proj", "gate_up_proj", "down_proj"} - set(exclude or ())
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained <= lily < trained * (config.r + 1) / config.r


REFUSED = [
    (
        {"slices": {"qkv": ["k"]}},
        r"yaml:\d+: lily.slices='qkv' matches no module; linear layers of this model: .*qkv_proj",
    ),
    ({"slices": {"qkv_proj": ["key"]}}, r"lily.slices: .*qkv_proj has no slice 'key'; it has q, k, v"),
    ({"slices": {"down_proj": ["k"]}}, r"lily.slices: the layout of .*down_proj is not known; state it"),
    ({"slices": {"down_proj": {"k": [0]}}}, r"lily.slices: k: \[0\] of .* is not \[start, stop\]"),
    ({"parallel": ["Mlp"]}, r"yaml:\d+: lily.parallel='Mlp' matches no module by name or class: .*Phi3MLP"),
    ({"parallel": ["mlp"], "groups": {"mpl": {"r": 8}}}, None),
    (
        {"parallel": ["mlp"], "groups": {"mpl": {"activation": "relu"}}},
        r"yaml:\d+: lily.groups has the key 'mpl', which matches no group; did you mean mlp\? groups: mlp",
    ),
    ({"parallel": ["mlp", "qkv_proj"], "slices": {"qkv_proj": ["k"]}}, r"qkv_proj"),
]


@pytest.mark.parametrize(("lily", "says"), REFUSED, ids=[str(lily) for lily, _ in REFUSED])
def test_what_the_model_has_not_is_named_in_the_recipes_words_with_the_line(tmp_path, phi, chat_table, lily, says):
    recipe = recipe_with(phi, chat_table, tmp_path, {"r": 4, **lily})
    with pytest.raises(LilyError, match=says or r"yaml:\d+: lily.groups has the key 'mpl'") as caught:
        methods.decide(recipe, models.meta_model(recipe.model, recipe.task))
    assert not any(word in str(caught.value) for word in methods.KEYS if word != "target_parameters")


def test_two_names_of_one_router_and_other_contradictions_are_told_before_the_model(tmp_path, phi, chat_table):
    for lily, says in [
        (
            {"params": "9k", "groups": {"mlp": {"r": 2}}},
            "lily.groups.mlp.r: lily.params chooses one r, num_A and num_B",
        ),
        ({"groups": {"mlp": {"num_A": 2, "stride_A": 2}}}, "lily.groups.mlp.stride_A: says the same as num_A"),
        ({"groups": {"v": {"r": 2}, "qkv_proj.v": {"r": 3}}}, "lily.groups.v: fits the layers of 'qkv_proj.v' too"),
        ({"groups": {"mlp": {"rank": 2}}}, "lily.groups.mlp.rank: unknown key; did you mean r?"),
        ({"shared_router": True, "routing": "static"}, "lily.shared_router: with routing static there is no router"),
        ({"parallel": ["mlp"], "settle": {}}, "lily.settle: an adapter parallel to a module"),
        (
            {"shared_router": True, "settle": {}, "slices": {"x": ["k"]}},
            "lily.settle: gives each layer separate weights",
        ),
        ({"groups": {"mlp": {"activation": "relu"}}, "settle": {}}, "lily.settle: an adapter with an activation"),
        ({"num_B": 1, "groups": {"mlp": {"num_B": 1}}, "settle": {}}, "lily.settle: num_B=1 has no router"),
        ({"num_B": 1, "groups": {"mlp": {"num_B": 2}}, "settle": {}}, "targets: is empty; name modules such as"),
        ({}, "targets: is empty; name modules such as"),
    ]:
        with pytest.raises(LilyError) as caught:
            recipe_with(phi, chat_table, tmp_path, lily)
        assert says in str(caught.value)


def test_lora_of_a_module_of_which_everything_is_excluded_is_refused(tmp_path, phi, chat_table):
    excluded = ["gate_up_proj", "down_proj"]
    recipe = recipe_with(phi, chat_table, tmp_path, {"r": 4, "parallel": ["mlp"]}, method="lora", exclude=excluded)
    with pytest.raises(LilyError, match=r"yaml:\d+: exclude: leaves LoRA no layer inside the modules of lily.parallel"):
        methods.peft_config(recipe, models.meta_model(recipe.model, recipe.task))


def test_an_option_that_the_chosen_shape_contradicts_is_blamed_on_the_block(tmp_path, encoder, table):
    lily = {"r": 2, "settle": {}}  # of two layers there is one expert, and no router to settle
    path = write_recipe(tmp_path, classification(encoder, table, tmp_path, targets=["query"], lily=lily))
    recipe, line = loader.load_recipe(path), Path(path).read_text().splitlines().index("lily:") + 1
    with pytest.raises(LilyError, match=f"yaml:{line}: lily: settled=.*num_B=1 has no router"):
        methods.decide(recipe, models.meta_model(recipe.model, recipe.task))
