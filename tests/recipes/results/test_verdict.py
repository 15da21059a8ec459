"""What the figures of a run mean, in sentences, and what comes next."""

from __future__ import annotations

import shlex

import pytest
from recipes_helpers import classification, write_recipe

from lily.recipes import loader
from lily.recipes.results.result import Result
from lily.recipes.results.standing import spoken
from lily.recipes.results.verdict import advice, command, how_sure, next_commands, still_improving, verdict
from lily.recipes.scoring.review import Classes, ClassScore, Review


def result(final, history=(), rows=1000, metric="accuracy", method="lily", **baselines):
    entries = [{"epoch": i + 1.0, "step": i + 1, metric: value} for i, value in enumerate(history)]
    best = max(entries, key=lambda entry: entry[metric], default={"epoch": 1.0, metric: final})
    last = entries[-1] if entries else best
    return Result(
        name="mine",
        method=method,
        task="text-classification",
        seed=0,
        metric=metric,
        split="test",
        labels=["a", "b"],
        before={metric: 0.5},
        final={metric: final},
        best={"epoch": best["epoch"], "value": best[metric]},
        last={"epoch": last["epoch"], "value": last[metric]},
        adapter={"num_B": 1},
        history=entries,
        rows={"train": 400, "validation": 100, "test": rows},
        baselines={name: {metric: value} for name, value in baselines.items()},
    )


@pytest.fixture
def recipe(tmp_path, encoder):
    return loader.load_recipe(write_recipe(tmp_path, classification(encoder, "rows.jsonl", tmp_path)))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            result(0.793, lora=0.879, tfidf=0.983, majority=0.5),
            "Lily (one B) has accuracy 79.3 on the 1,000 test rows, 8.6 points worse than LoRA (87.9); 19.0 points "
            "worse than TF-IDF (98.3).",
        ),
        (
            result(0.9, lora=0.88, rows=100),
            "Lily (one B) has accuracy 90.0 on the 100 test rows, 2.0 points better than LoRA (88.0), which so few "
            "rows cannot tell from chance; 40.0 points better than the untrained model (50.0).",
        ),
        (
            result(0.5, metric="loss", frozen=0.6),
            "Lily (one B) has loss 0.5000 on the 1,000 test rows, equal to the untrained model (0.5000).",
        ),
    ],
)
def test_a_run_is_compared_with_lora_and_with_the_best_of_the_others(found, said):
    assert verdict(found) == said


def test_a_figure_that_is_not_a_number_is_no_success():
    assert "is not a number" in verdict(result(float("nan")))


def test_a_run_that_was_still_improving_gets_a_command_that_trains_longer(recipe):
    found = result(0.9, history=[0.6, 0.7, 0.8])
    assert still_improving(found)
    (said,) = advice(found, recipe, "my recipe.yaml", ["seed=3"])
    command = shlex.split(said.splitlines()[-1])
    assert command == [
        "lily", "train", "my recipe.yaml", "seed=3", "train.epochs=12", f"output={recipe.output}-longer",
    ]  # fmt: skip
    for history in ([0.6, 0.8, 0.7], [0.8], [0.7, 0.8, 0.8]):
        assert not still_improving(result(0.9, history=history))
    steps = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 50})})
    assert "train.max_steps=100" in next(advice(found, steps, "r", []))


@pytest.mark.parametrize("folder", ["runs/mine", "runs/try #2", "runs/{a}", "a: b", "123", "it's", '"q"'])
def test_a_folder_of_any_name_is_named_in_a_command(recipe, folder):
    literal = recipe.model_copy(update={"output": loader.without_placeholders(folder)})
    (said,) = advice(result(0.9, history=[0.6, 0.7, 0.8]), literal, "r", [])
    *_, changed = shlex.split(said.splitlines()[-1])
    (written,) = loader.overriding([changed]).values()
    assert written.format(name="", method="", seed=0) == f"{folder}-longer"
    change = loader.change_of("output", folder)
    assert loader.overriding([change]) == {"output": folder}
    assert change == f"output={folder}" or folder != "runs/mine"


def test_a_baseline_that_is_better_is_told_with_the_search_that_may_help(recipe):
    (said,) = advice(result(0.79, tfidf=0.98, frozen=0.85, majority=0.5), recipe, "mine.yaml", ["output=x", "seed=1"])
    assert said.startswith("TF-IDF and the frozen encoder are ahead without an adapter")
    assert said.endswith("  lily tune mine.yaml seed=1")
    (said,) = advice(result(0.79, tfidf=0.98), recipe, "mine.yaml", ["train.learning_rate=1", "seed=1"])
    assert said.endswith("  lily tune mine.yaml seed=1")
    (said,) = advice(result(0.79, lora=0.88, majority=0.5), recipe, "mine.yaml", [])
    assert said.endswith("  lily compare mine.yaml --tune")
    (said,) = advice(result(0.4), recipe, "mine.yaml", [])
    assert said.startswith("The training made the model worse")
    assert list(advice(result(0.99, lora=0.88, tfidf=0.6), recipe, "mine.yaml", [])) == []


def test_training_that_the_command_line_cut_short_says_so_and_nothing_else(recipe):
    found = result(0.4, tfidf=0.9)
    found.last = {"epoch": 0.25, "value": 0.4}
    (said,) = advice(found, recipe, "mine.yaml", ["train.max_steps=6", "seed=1"])
    assert said.startswith("The training ended after 25% of the training rows")
    assert said.endswith(f"  lily train mine.yaml seed=1 output={recipe.output}-whole")
    assert "TF-IDF is ahead" in next(advice(found, recipe, "mine.yaml", ["seed=1"]))


def test_a_classifier_that_predicts_one_class_alone_is_told(recipe):
    found = result(0.5)
    scores = [ClassScore("a", 0.5, 1.0, 0.67, 5, 10), ClassScore("b", None, 0.0, 0.0, 5, 0)]
    found.review = Review(Classes(tuple(scores), None, ()))
    said = list(advice(found, recipe, "mine.yaml", []))
    assert said[0] == "It predicts 'a' for every row, so it tells no classes apart."
    assert said[1] == "Another learning rate may help:\n  lily tune mine.yaml"


def test_what_comes_next_depends_on_the_adapter(recipe):
    def verbs(found):
        return [shlex.split(command)[1] for command, _ in next_commands(found, recipe, "mine.yaml", [])]

    assert verbs(result(0.9)) == ["predict", "inspect", "export", "compare"]
    dynamic = result(0.9)
    dynamic.adapter = {"num_B": 4, "routing": "token"}
    assert verbs(dynamic) == ["predict", "inspect", "collapse", "compare"]
    assert verbs(result(0.9, method="lora")) == ["predict", "inspect"]


def test_an_evaluation_says_how_far_other_rows_may_be_off():
    assert (
        how_sure("accuracy", 0.9, 100) == "90.0% of 100 rows are right; on other rows of the kind expect 84.0 to 96.0."
    )
    assert how_sure("accuracy", 1.0, 4) == "100.0% of 4 rows are right; on other rows of the kind expect 75.0 to 100.0."
    assert how_sure("loss", 0.5, 9) == "On 9 rows; loss: less is better."


def test_a_command_to_paste_has_each_key_once():
    assert command("train", "x.yaml", ["train.epochs=2", "seed=1", "train.epochs=4"]) == (
        "lily train x.yaml train.epochs=4 seed=1"
    )


def test_the_guess_of_a_regression_is_the_mean():
    assert spoken("majority", "pearson") == "the mean"
    assert spoken("majority", "accuracy") == "the majority"
