"""Learning rates and scales of the methods that a recipe compares: equal, or chosen by something that is named."""

from __future__ import annotations

import pytest
from recipes_helpers import classification, write_recipe

from lily.functional import default_scaling
from lily.recipes import loader, methods, preflight, train
from lily.recipes.methods.terms import contestants, named, scale_of, unchosen, warnings_of

SHIPPED = [name for file in loader.shipped() for name in loader.names_of(file)]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_treats_lily_and_lora_alike_or_says_what_chose_the_difference(name):
    recipe = loader.load_any(name)
    rates = {methods.learning_rate(recipe.model_copy(update={"method": method})) for method in ("lily", "lora")}
    # Of both the default, which one rule gives (docs/tune.md), or of both a value of the recipe
    alike = (recipe.lily.scaling is None) == (recipe.lora.alpha is None)
    assert recipe.chosen_by or (len(rates) == 1 and alike)


def test_the_rule_gives_both_methods_one_scale_at_loras_usual_rank():
    from peft import LoraConfig

    assert default_scaling(8) == scale_of(LoraConfig(r=8, lora_alpha=16)) == 2
    assert scale_of(LoraConfig(r=4, lora_alpha=8, use_rslora=True)) == 4


@pytest.fixture
def told(tmp_path, encoder, table):
    """What is warned of between Lily and LoRA (rank 4, at their own scales) after changes to a recipe."""

    def warnings(*overrides, lily=None, lora=None, **own):
        values = classification(encoder, table, tmp_path, lily={"r": 4, **(lily or {})}, lora=lora or {}, **own)
        recipe = loader.load_recipe(write_recipe(tmp_path, values), overrides)
        terms = []
        for method in ("lily", "lora"):
            scale = recipe.lily.scaling or default_scaling(4) if method == "lily" else (recipe.lora.alpha or 8) / 4
            other = recipe.model_copy(update={"method": method}).written_at(recipe.locations)
            terms.append(named(method, other, 4, scale))
        return list(unchosen(recipe, terms))

    return warnings


def test_defaults_and_what_the_recipe_has_for_both_need_no_warning(told):
    assert told() == []
    assert told("train.learning_rate=0.5") == []
    assert told(lily={"scaling": 4.0}, lora={"alpha": 8}) == []
    assert told(lily={"learning_rate": 0.1}, lora={"learning_rate": 0.2}) == []
    assert told(lora={"learning_rate": 0.2}) == []  # the other one is train.learning_rate, which the recipe has too
    assert told(lily={"scaling": 2.0}, lora={}) == []  # equal, whoever set it
    assert told(lily={"scaling": 4.0}, chosen_by="a search") == []


def test_what_one_method_has_alone_is_told_with_its_origin(told):
    (one,) = told(lily={"scaling": 4.0})
    assert "scales differ" in one
    assert "lily 4 (lily.scaling: recipe), lora 2 (lora.alpha: default)" in one
    assert "--tune" in one
    (one,) = told("lora.learning_rate=0.3")
    assert "learning rates differ" in one
    assert "lily 0.01 (train.learning_rate: recipe), lora 0.3 (lora.learning_rate: command line)" in one
    (one,) = told("train.learning_rate=0.3", lora={"learning_rate": 0.2}, chosen_by="a search")
    assert "lily 0.3 (train.learning_rate: command line), lora 0.2 (lora.learning_rate: recipe)" in one
    assert len(told("lily={r: 4, scaling: 3.0}", "lora.learning_rate=0.3")) == 2


def test_what_chose_an_inherited_value_says_nothing_about_ones_own(tmp_path, encoder):
    def warned(extends="quickstart", **own):
        path = write_recipe(tmp_path, {"extends": extends, "name": "mine", **own})
        recipe = loader.load_recipe(path)
        others = [recipe.model_copy(update={"method": m}).written_at(recipe.locations) for m in ("lily", "lora")]
        terms = [named(o.method, o, 8, 3.0 if o.lily.scaling and o.method == "lily" else 2.0) for o in others]
        return [text.partition(" ")[0] for text in unchosen(recipe, terms)]

    assert warned() == []
    assert warned(lily={"scaling": 3.0}) == ["scales"]
    assert warned(lily={"scaling": 3.0}, chosen_by="my search") == []
    ours = {"extends": "quickstart", "name": "ours", "lily": {"scaling": 3.0}}
    between = write_recipe(tmp_path, ours, "between.yaml")
    assert warned(extends=between) == ["scales"]
    assert warned(extends=between, chosen_by="my search") == []


def test_a_run_is_compared_with_its_baseline_and_another_method_with_the_recipes_lily(tmp_path, encoder, table, capsys):
    def recipe(*overrides, **own):
        return loader.load_recipe(write_recipe(tmp_path, classification(encoder, table, tmp_path, **own)), overrides)

    assert contestants(recipe()) == ["lily"]
    assert contestants(recipe(baselines=["lora"])) == ["lily", "lora"]
    assert contestants(recipe("method=lora")) == ["lora", "lily"]
    meta = preflight.prepare(recipe()).meta
    assert warnings_of(recipe(), meta) == []
    assert "scales differ" in warnings_of(recipe("method=lora"), meta)[0]
    train.train(recipe("method=lora", "train.max_steps=1"), quiet=True)
    assert capsys.readouterr().err.count("warning: scales differ") == 1
