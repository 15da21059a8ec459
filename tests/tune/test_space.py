"""What a search may change of a recipe, and what the recipe becomes."""

from __future__ import annotations

import pytest
from recipes_helpers import classification, write_recipe

from lily.errors import LilyError
from lily.recipes import loader, methods, models
from lily.recipes.work import steps_of
from lily.tune import space as spaces
from lily.tune.space import EVALUATIONS, WITHIN, cadence, changed, changes, space_of


@pytest.fixture
def make(tmp_path, encoder, table):
    def made(*overrides):
        return loader.load_recipe(write_recipe(tmp_path, classification(encoder, table, tmp_path)), list(overrides))

    return made


@pytest.fixture
def space(encoder):
    def found(recipe, **how):
        meta = models.meta_model(recipe.model, recipe.task)
        return space_of(recipe, methods.decide(recipe, meta), methods.peft_config(recipe, meta), **how)

    return found


def test_each_method_has_its_knobs_around_the_recipes_own_values(make, space):
    lily = space(make("lily.scaling=2"))
    assert lily.knobs == ("learning_rate", "scaling", "shape")
    assert lily.start == {"learning_rate": 0.01, "scaling": 2.0, "shape": "r4-A1-B2"}
    for name, found in lily.ranges.items():
        assert found.low == pytest.approx(found.start / WITHIN[name], rel=0.01)
        assert found.high == pytest.approx(found.start * WITHIN[name], rel=0.01)
    assert space(make("method=stock-lily")).knobs == ("learning_rate", "scaling")
    lora = space(make("method=lora", "lora.r=8", "lora.learning_rate=0.02"))
    assert lora.knobs == ("learning_rate", "alpha")
    assert lora.start == {"learning_rate": 0.02, "alpha": 16.0}
    assert space(make("method=lora", "lora.r=8", "lora.alpha=3")).start["alpha"] == 3.0
    dora = space(make("method=dora", "lora.r=8"))
    assert dora.knobs == lora.knobs
    assert changes(dora, dora.start) == {"lora": {"learning_rate": 0.01, "alpha": 16.0}}


def test_shapes_cost_what_the_recipes_own_costs_at_most_and_nearly_as_much(make, space):
    recipe = make("lily.r=16", "lily.num_B=1")
    meta = models.meta_model(recipe.model, recipe.task)
    own = methods.decide(recipe, meta).plan.parameters.total
    found = space(recipe)
    assert found.shapes[0].name == "r16-A1-B1"
    assert found.shapes[0].parameters == own
    assert len(found.shapes) > 1
    assert len({shape.name for shape in found.shapes}) == len(found.shapes)
    for shape in found.shapes:
        real = changed(recipe, {"lily": spaces.shape_keys(shape)})
        assert methods.decide(real, meta).plan.parameters.total == shape.parameters
        assert 0.9 * own <= shape.parameters <= own
    assert len(space(recipe, grid=True).shapes) > len(found.shapes)


def test_a_budget_of_ones_own_leaves_out_what_costs_more(make, space):
    found = space(make("lily.r=16"), budget="9k")
    assert "r16-A1-B2" not in {shape.name for shape in found.shapes}
    assert all(8100 <= shape.parameters <= 9000 for shape in found.shapes)


def test_own_values_that_are_left_out_are_named(make, space):
    recipe = make("lily.r=16", "lily.num_B=1")
    assert space(recipe).without == ()
    assert space(recipe, ranges={"learning_rate": (0.005, 0.02)}).without == ()
    found = space(recipe, ranges={"learning_rate": (0.02, 0.04)}, budget=space(recipe).shapes[0].parameters - 1)
    assert found.start["learning_rate"] == 0.02
    assert found.without == ("learning_rate", "shape")
    assert found.notes == ("no trial has the recipe's own learning_rate, shape, which --range or --params leaves out",)


def test_the_only_shape_of_a_smaller_budget_takes_the_place_of_the_recipes_own(make, space, monkeypatch):
    recipe = make("lily.r=16", "lily.num_B=1")
    monkeypatch.setattr(spaces, "COUNTS", (1,))
    assert space(recipe).shapes == ()
    meta = models.meta_model(recipe.model, recipe.task)
    found = space(recipe, budget=methods.decide(recipe, meta).plan.parameters.total // 2)
    assert [shape.r for shape in found.shapes] == [8]
    assert found.without == ("shape",)


def test_a_sharing_said_as_layers_per_a_stays_said_so(make, space):
    recipe = make("lily.num_A=null", "lily.stride_A=2")
    found = space(recipe)
    assert found.shapes[0].name == "r4-S2-B2"
    assert changes(found, found.start)["lily"]["stride_A"] == 2


def test_the_shape_stays_where_groups_have_their_own(make, space):
    found = space(make("lily.groups={query: {r: 2}}"))
    assert found.knobs == ("learning_rate", "scaling")
    assert "lily.groups" in found.notes[0]


def test_the_learning_rate_stays_above_where_the_cosine_ends(make, space):
    recipe = make("train.schedule=cosine", "train.min_learning_rate=4e-3")
    assert space(recipe).ranges["learning_rate"].low == pytest.approx(8e-3)
    with pytest.raises(LilyError, match=r"min_learning_rate, 0\.004, must be below it"):
        space(recipe, ranges={"learning_rate": (1e-3, 1e-2)})


def test_what_a_trial_tries_is_a_valid_recipe(make, space):
    recipe = make("lily={params: 3k, r: null, num_A: null, num_B: null}")
    found = space(recipe)
    for shape in found.shapes:
        tried = changed(recipe, changes(found, {"learning_rate": 0.0123456, "scaling": 2.3456, "shape": shape.name}))
        assert tried.lily.learning_rate == 0.0123
        assert tried.lily.scaling == 2.35
        assert type(tried).model_validate(tried.model_dump()) == tried
    assert recipe.lily.params == "3k"


@pytest.mark.parametrize(
    ("overrides", "how", "message"),
    [
        ([], {"knobs": ["alpha"]}, "'alpha' is not a knob of lily; choose from learning_rate, scaling, shape"),
        (["method=lora"], {"knobs": ["shape"]}, "'shape' is not a knob of lora"),
        ([], {"ranges": {"lr": (1, 2)}}, "'lr' is not a knob of lily"),
        ([], {"ranges": {"scaling": (2, 1)}}, "scaling from 2 to 1 is not a range"),
        ([], {"ranges": {"scaling": (0, 1)}}, "scaling from 0 to 1 is not a range"),
        ([], {"ranges": {"scaling": (1, float("nan"))}}, "is not a range"),
        ([], {"ranges": {"shape": (1, 2)}}, "--range shape: shape is not searched between two bounds"),
        (
            [],
            {"ranges": {"scaling": (1, 2)}, "knobs": ["learning_rate"]},
            "--range scaling: scaling is not searched between two bounds",
        ),
        ([], {"knobs": ["scaling"], "budget": "1k"}, "--params is a budget for Lily's shape"),
        (["method=lora"], {"budget": "1k"}, "--params is a budget for Lily's shape"),
        ([], {"budget": "10"}, "no shape uses 10 parameters well"),
        ([], {"budget": "much"}, "'much' is not a number of parameters"),
        (["method=none"], {}, "method: none has no values to search"),
        (["lily.groups={query: {r: 2}}"], {"knobs": ["shape"]}, "nothing is left to search: the shape is not searched"),
    ],
    ids=str,
)
def test_a_wish_that_cannot_be_is_refused(make, space, overrides, how, message):
    with pytest.raises(LilyError, match=message):
        space(make(*overrides), **how)


@pytest.mark.parametrize("text", ["scaling", "scaling=1", "scaling=a:b", "=", "scaling=1:2:3"])
def test_a_range_that_is_none_is_quoted(text):
    with pytest.raises(LilyError, match=f"--range '{text}': expected a knob and two numbers"):
        spaces.parse_ranges([text])


def test_ranges_are_read_as_they_are_written():
    assert spaces.parse_ranges(["learning_rate=1e-4:1e-2", " scaling = 0.1 : 10 "]) == {
        "learning_rate": (1e-4, 1e-2),
        "scaling": (0.1, 10.0),
    }


def test_a_trial_is_evaluated_as_the_recipe_says_but_often_enough_to_be_stopped(make):
    recipe = make("train.epochs=6", "train.batch_size=8")
    assert steps_of(recipe, 36) == 30
    assert cadence(recipe, 36) == "epoch"
    one = make("train.epochs=1", "train.batch_size=1")
    assert cadence(one, 36) == 36 // EVALUATIONS
    assert cadence(make("train.evaluate_every=10", "train.max_steps=100"), 36) == 10
    assert cadence(make("train.evaluate_every=90", "train.max_steps=100"), 36) == 25
    assert steps_of(make("train.gradient_accumulation=2", "train.epochs=2"), 36) == 6
    assert cadence(make("train.epochs=1", "train.batch_size=36"), 36) == 1
