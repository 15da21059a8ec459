"""Who is compared: names, equal budgets, and methods of PEFT in recipes."""

from __future__ import annotations

import copy

import pytest
from peft import get_peft_model

from lily.compare.contestants import parse, resolve
from lily.errors import LilyError
from lily.recipes import loader, methods, preflight
from lily.recipes.methods import other_peft
from lily.recipes.results.adapter import Adapter

ALL = "lily,lily:batch,lily:static,stock-lily,lora,rslora,dora,vera,loha,ia3,none"


@pytest.fixture
def prepared(recipe):
    return loader.load_recipe(recipe), preflight.prepare(loader.load_recipe(recipe)).meta


def trained(config, recipe, model):
    """Parameters that train, counted on the adapted model by PEFT itself."""
    with other_peft.implementation(recipe):
        made = get_peft_model(copy.deepcopy(model), config)
    head = sum(p.numel() for n, p in made.named_parameters() if p.requires_grad and "modules_to_save" in n)
    return made.get_nb_trainable_parameters()[0] - head


def test_at_equal_parameters_no_method_has_more_than_lily_and_one_more_rank_would(prepared):
    recipe, model = prepared
    found = {c.name: c for c in resolve(recipe, parse(ALL), "params", model)}
    budget = found["lily"].parameters
    assert budget == trained(methods.peft_config(found["lily"].recipe, model), found["lily"].recipe, model)
    for name, contestant in found.items():
        assert contestant.parameters <= budget, name
        config = methods.peft_config(contestant.recipe, model)
        if name != "none":
            assert trained(config, contestant.recipe, model) == contestant.parameters, name
    for name, block in (("lora", "lora"), ("rslora", "lora"), ("dora", "lora")):
        contestant = found[name]
        more = getattr(contestant.recipe, block).model_copy(update={"r": contestant.rank + 1})
        one_more = contestant.recipe.model_copy(update={block: more})
        assert trained(methods.peft_config(one_more, model), one_more, model) > budget, name
    assert found["ia3"].rank is None
    assert found["vera"].rank == 48  # the widest layer: its parameters hardly depend on the rank


def test_at_equal_rank_every_method_with_a_rank_has_lilys(prepared):
    recipe, model = prepared
    for contestant in resolve(recipe, parse(ALL), "rank", model):
        assert contestant.rank in ((None,) if contestant.name in ("ia3", "none") else (4,)), contestant.name


def test_stock_lily_shares_as_ours_does(prepared):
    recipe, model = prepared
    ours, stock = resolve(recipe, ["lily:batch", "stock-lily"], "params", model)
    assert methods.peft_config(stock.recipe, model).stride_A == 3
    assert stock.parameters == ours.parameters


def test_a_divisor_gives_the_largest_of_its_kind_within_that_part_of_the_parameters(prepared):
    recipe, model = prepared
    found = {c.name: c for c in resolve(recipe, parse("lily,lily/2,lily:static/2,lora,lora/2"), "params", model)}
    for whole in ("lily", "lora"):
        half = found[f"{whole}/2"]
        assert half.parameters <= found["lily"].parameters // 2
        assert half.parameters > found[whole].parameters // 4
        assert half.recipe.method == whole
        assert trained(methods.peft_config(half.recipe, model), half.recipe, model) == half.parameters
        assert half.folder == f"{whole}-over-2"
    assert found["lily:static/2"].recipe.lily.routing == "static"
    with pytest.raises(LilyError, match=r"lora/4: the smallest lora has .*; leave it out"):
        resolve(recipe, parse("lily,lora/4"), "params", model)
    with pytest.raises(LilyError, match="lily/2 with --equal rank"):
        resolve(recipe, ["lily/2"], "rank", model)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("lily,lora/0", "lora/0: after the / comes what divides the parameters, such as lora/4"),
        ("lily/x", "such as lily/4"),
        ("none/2", "no parameters to divide"),
        ("lily,lorra", "lorra is none of lily, .*did you mean LORA"),
        ("lora:batch", "only lily has variants"),
        ("lily:fast", "only lily has variants: lily:batch"),
        ("lora,lily,lora", "names lora twice"),
        (" , ", "is empty"),
    ],
)
def test_a_method_that_is_not_known_is_refused(names, said):
    with pytest.raises(LilyError, match=said):
        parse(names)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("{peft_type: VERRA}", "no such method; did you mean VERA"),
        ("{peft_type: VERA, projection_key: 1}", "VeraConfig has no such option; did you mean projection_prng_key"),
        ("{peft_type: LOHA, target_modules: [x]}", "the recipe's key for this is targets"),
        ("{peft_type: LILY}", "write method: lily"),
        ("{peft_type: IA3, r: 4}", "IA3Config has no rank"),
        ("{peft_type: ADALORA}", "PEFT rejects this AdaLoraConfig"),
        ("{}", "method: peft needs peft_type"),
    ],
)
def test_what_is_wrong_with_a_method_of_peft_is_told_before_a_weight_is_read(recipe, monkeypatch, block, said):
    from lily.recipes import models, train

    monkeypatch.setattr(models, "load_model", None)
    with pytest.raises(LilyError, match=said):
        train.train(loader.load_recipe(recipe, ["method=peft", f"peft={block}"]), quiet=True)


@pytest.mark.parametrize("changes", [["method=stock-lily"], ["method=dora"], ["method=peft", "peft.peft_type=VERA"]])
def test_any_method_trains_and_its_adapter_gives_the_figures_again(recipe, tmp_path, changes):
    from lily.recipes import train

    chosen = loader.load_recipe(recipe, [*changes, "train.epochs=1", f"output={tmp_path / 'run'}"])
    result = train.train(chosen, quiet=True)
    again = Adapter(str(tmp_path / "run")).evaluate()
    assert again == pytest.approx(result.final)
    assert result.method == chosen.method
    assert result.parameters["adapter"] > 0
