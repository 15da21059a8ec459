"""The sentence that compares a run with its baselines."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lily.recipes.results.standing import rivals, standing


def run(own, baselines, metric="accuracy", rows=200, method="lily", before=0.25):
    baselines = {name: {metric: value} for name, value in baselines.items()}
    return SimpleNamespace(method=method, metric=metric, split="test", rows={"test": rows}, final={metric: own},
                           before={metric: before}, baselines=baselines)  # fmt: skip


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (
            run(0.793, {"majority": 0.25, "tfidf": 0.983, "lora": 0.879}),
            "Lily 79.3, TF-IDF 98.3, LoRA 87.9 (accuracy in percent, on 200 test rows): "
            "this adapter loses to TF-IDF by 19.0 and LoRA by 8.6.",
        ),
        (run(0.9, {"lora": 0.5, "tfidf": 0.7}), "this adapter beats TF-IDF by 20.0 and LoRA by 40.0."),
        (run(0.9, {"lora": 0.91}), "this adapter is level with LoRA (no difference that these rows can show)."),
        (
            run(0.9, {"lora": 0.91, "tfidf": 0.5, "frozen": 0.99}),
            "this adapter loses to the frozen encoder by 9.0, "
            "is level with LoRA (no difference that these rows can show) and beats TF-IDF by 40.0.",
        ),
        (run(0.25, {"majority": 0.25, "lora": 0.9}), "this adapter is no better than guessing (25.0)."),
        (run(0.9, {}), "Lily 90.0 (accuracy in percent, on 200 test rows): no baseline beside this adapter, "
                       "from 25.0 before training."),
        (run(0.5, {"lora": 0.6}, "loss"), "(loss, on 200 test rows): this adapter beats LoRA by 0.1000."),
        (run(0.7, {"lora": 0.71}, "f1"), "this adapter loses to LoRA by 1.0."),
        (run(0.9, {"tfidf": 0.5}, method="none"), "head alone 90.0, TF-IDF 50.0 (accuracy in percent, on 200 test rows)"
                                                  ": this head beats TF-IDF by 40.0."),
    ],
)  # fmt: skip
def test_the_sentence_names_everyone_and_says_who_is_better(run, said):
    assert standing(run).endswith(said)


def test_more_rows_show_a_smaller_difference():
    assert not rivals(run(0.9, {"lora": 0.91}, rows=200))[0].apart
    assert rivals(run(0.9, {"lora": 0.91}, rows=20_000))[0].apart


def test_a_run_without_its_metric_has_no_standing():
    nothing = run(0.9, {})
    nothing.final = {}
    assert standing(nothing) == ""
