"""Training end to end on tiny models: every task and method, files, resume, evaluation, prediction."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from peft import PeftModel
from recipes_helpers import classification, rows, sft, write_jsonl, write_recipe
from rich.console import Console
from runs import files, make, paste
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from lily.cli.main import app
from lily.errors import LilyError
from lily.recipes import loader, train
from lily.recipes.results import card as report
from lily.recipes.results import model_card
from lily.recipes.results.adapter import Adapter
from lily.recipes.scoring import evaluate
from lily.recipes.scoring.answer_lengths import Answer


@pytest.mark.parametrize("method", ["lily", "lora", "none"])
def test_a_classifier_learns_and_leaves_everything_it_should(tmp_path, encoder, method):
    changes = [f"method={method}", "baselines=[majority, tfidf, frozen]", "seed=3"]  # this seed learns
    recipe = make(classification, tmp_path, encoder, changes)
    result = train.train(recipe, quiet=True)
    run = tmp_path / "run"
    assert {"best", "last", "metrics.json", "recipe.yaml", "progress.json"} <= set(files(run))
    assert files(run / "best") == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "labels.json",
        "recipe.yaml",
    ]
    assert not [p for p in run.rglob(".*")]
    assert json.loads((run / "metrics.json").read_text())["final"] == result.final
    assert result.final["accuracy"] >= result.before["accuracy"]
    assert len(result.history) == 6
    assert result.parameters["head"] == 2 * 32 + 2
    assert set(result.baselines) == {"majority", "tfidf", "frozen"}
    assert 0.4 <= result.baselines["majority"]["accuracy"] <= 0.6
    card = (run / "best" / "README.md").read_text()
    assert ("import lily" in card) == (method == "lily")
    assert ("An adapter (" in card, "adapter |" in card, "of the adapter" in card) == (method != "none",) * 3
    assert "66 parameters of the new head" in card
    assert f", after the last epoch {100 * result.history[-1]['accuracy']:.1f}. " in card
    result.best, result.last = {"epoch": 2.5, "value": 0.75}, {"epoch": 6.0, "value": 0.625}
    chosen = "est accuracy on validation 75.0 after epoch 2.5, after the last epoch 62.5"
    console = Console(record=True, width=200)
    report.print_result(result, recipe, run, console)
    assert f"b{chosen}; " in console.export_text()
    assert f"B{chosen}. " in model_card.card(recipe, result)
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    assert isinstance(PeftModel.from_pretrained(base, run / "best"), PeftModel)
    if method == "lily":
        assert result.final["accuracy"] > 0.9
        assert result.parameters["adapter"] == sum(
            t.numel() for n, t in load_file(run / "best" / "adapter_model.safetensors").items() if "lily_" in n
        )


def test_texts_without_words_give_tfidf_the_majoritys_guess(tmp_path, encoder):
    from lily.recipes import data
    from lily.recipes.scoring import baselines

    def figures(table):
        values = classification(encoder, write_jsonl(tmp_path / "t.jsonl", table), tmp_path)
        values["data"]["columns"] = {"text": "a", "text_pair": "b", "label": "label"}
        recipe = loader.load_recipe(write_recipe(tmp_path, values))
        found = (baselines.run(name, recipe, data.load_splits(recipe)) for name in ("majority", "tfidf"))
        return [{k: v for k, v in f.items() if k != "seconds"} for f in found]

    majority, tfidf = figures([{"a": "?!" * (i + 1), "b": "...", "label": i % 2} for i in range(40)])
    assert tfidf == majority
    majority, tfidf = figures([{"a": "?!", "b": ("no", "yes")[i % 2], "label": i % 2} for i in range(40)])
    assert tfidf["accuracy"] == 1.0 > majority["accuracy"]


def test_lora_gets_no_more_parameters_than_lily_and_nearly_as_many(tmp_path, encoder):
    recipe = make(classification, tmp_path, encoder, ["baselines=[lora]", "lily.r=16", "train.epochs=1"])
    result = train.train(recipe, quiet=True)
    lora = result.baselines["lora"]["parameters"]
    assert 0.8 * result.parameters["adapter"] < lora <= result.parameters["adapter"]
    assert (tmp_path / "run" / "lora" / "metrics.json").is_file()


def test_a_budget_chooses_the_shape(tmp_path, encoder):
    from lily.recipes import methods, models

    recipe = make(classification, tmp_path, encoder)
    recipe = recipe.model_copy(update={"lily": type(recipe.lily)(params="3k")})
    config = methods.peft_config(recipe, models.meta_model(recipe.model, recipe.task))
    assert config.r > 1
    result = train.train(
        recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 1.0})}), quiet=True
    )
    assert 0.8 * 3000 < result.parameters["adapter"] <= 3000


@pytest.mark.slow
def test_regression_on_pairs_runs(tmp_path, encoder):
    table = [{"a": r["text"], "b": "the film was good", "score": r["score"]} for r in rows()]
    values = classification(encoder, write_jsonl(tmp_path / "t.jsonl", table), tmp_path, task="text-regression")
    values["data"]["columns"] = {"text": "a", "text_pair": "b", "label": "score"}
    recipe = loader.load_recipe(
        write_recipe(tmp_path, values),
        ["baselines=[majority, tfidf, frozen]", "train.epochs=20", "train.learning_rate=0.02", "seed=1"],
    )
    result = train.train(recipe, quiet=True)
    assert set(result.final) == {"pearson", "spearman"}
    assert result.final["pearson"] > 0.5
    assert result.baselines["majority"]["pearson"] == 0.0
    (prediction,) = Adapter(str(tmp_path / "run")).predict([{"a": "the film was good", "b": "x"}])
    assert isinstance(prediction["prediction"], float)
    assert paste(tmp_path / "run" / "best")["model"].config.num_labels == 1
    assert "- regression" in (tmp_path / "run" / "best" / "README.md").read_text()


@pytest.mark.parametrize("packing", [False, True])
def test_a_chat_model_learns_to_answer(tmp_path, chat_model, packing):
    recipe = make(sft, tmp_path, chat_model, [f"train.packing={packing}"])
    result = train.train(recipe, quiet=True)
    assert result.final["loss"] < result.before["loss"]
    if not packing:
        assert result.final["exact_match"] > result.before["exact_match"] + 0.2
    assert [set(s) - {"cut"} for s in result.samples] == [{"prompt", "expected", "before", "after"}] * 2
    assert result.adapter["routing"] == "token"


def test_method_none_only_evaluates_a_chat_model(tmp_path, chat_model):
    result = train.train(make(sft, tmp_path, chat_model, ["method=none"]), quiet=True)
    assert result.final == result.before
    assert not (tmp_path / "run" / "best").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, encoder):
    """A run of three epochs: its folder and result."""
    folder = tmp_path_factory.mktemp("whole")
    result = train.train(make(classification, folder, encoder, [f"output={folder}/run", "train.epochs=3"]), quiet=True)
    return folder / "run", result


def same_weights(one, other, names=("best", "last")):
    for name in names:
        first, second = (load_file(run / name / "adapter_model.safetensors") for run in (one, other))
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert torch.equal(tensor, second[key]), key


def test_training_is_the_same_for_the_same_seed(tmp_path, encoder, whole):
    train.train(make(classification, tmp_path, encoder, ["train.epochs=3"]), quiet=True)
    same_weights(whole[0], tmp_path / "run")


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, encoder, whole):
    run, expected = whole
    half = make(classification, tmp_path, encoder, [f"output={tmp_path}/half", "train.epochs=3"])

    class Stopped(Exception):
        pass

    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.epoch and state.epoch >= 1:
                raise Stopped

    from lily.recipes.trainer import trainer as runner

    build = runner.build_trainer

    def interrupted(*args, **kwargs):
        trainer = build(*args, **kwargs)
        trainer.add_callback(Stop())
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "build_trainer", interrupted)
        with pytest.raises(Stopped):
            train.train(half, quiet=True)
    got = train.train(half, resume=True, quiet=True)
    assert [h["step"] for h in got.history] == [h["step"] for h in expected.history]
    assert got.final == expected.final
    same_weights(run, tmp_path / "half")


def test_a_model_with_a_head_of_another_size_is_trained_and_its_card_loads_it(tmp_path, encoder, capsys):
    from lily.recipes import models
    from lily.recipes.spec.schema import Model

    folder = tmp_path / "three"
    models.load_model(Model(path=str(encoder)), "text-classification", ("a", "b", "c")).save_pretrained(folder)
    for file in encoder.glob("tokenizer*"):
        shutil.copy(file, folder)
    train.train(make(classification, tmp_path, folder, ["train.max_steps=1"]), quiet=True)
    assert [line for line in capsys.readouterr().err.splitlines() if "starts with a new head" in line]
    assert paste(tmp_path / "run" / "best")["model"].config.num_labels == 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_weights_that_cannot_be_read_leave_no_folder_and_no_run_behind(tmp_path, encoder, overwrite):
    broken = shutil.copytree(encoder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nope")
    recipe = make(classification, tmp_path, broken)
    if overwrite:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LilyError, match=r"recipe\.yaml:4: model\.path: model of .* could not be loaded"):
        train.train(recipe, quiet=True, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_run_is_not_overwritten_unless_asked(tmp_path, encoder):
    recipe = make(classification, tmp_path, encoder, ["train.max_steps=1"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("x")
    with pytest.raises(LilyError, match="--resume continues it, --overwrite replaces it"):
        train.train(recipe)
    assert files(tmp_path / "run") == ["precious"]
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(LilyError, match="nothing to resume"):
        train.train(recipe, resume=True)
    train.train(recipe, quiet=True)
    again = train.train(recipe, overwrite=True, quiet=True)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["seconds"] == again.seconds


def test_early_stopping_stops(tmp_path, encoder):
    recipe = make(
        classification, tmp_path, encoder, ["train.epochs=30", "train.early_stopping=2", "lily.learning_rate=1e-9"]
    )
    assert len(train.train(recipe, quiet=True).history) < 30


@pytest.mark.slow
def test_gradient_checkpointing_and_accumulation_run(tmp_path, encoder):
    changes = ["train.gradient_checkpointing=true", "train.gradient_accumulation=2", "train.evaluate_every=4"]
    changes.append("train.epochs=15")
    result = train.train(make(classification, tmp_path, encoder, changes), quiet=True)
    assert result.final["accuracy"] > 0.6


@pytest.fixture
def finished(tmp_path, classifier_run):
    classifier_run.copy(tmp_path)
    return tmp_path, classifier_run.result


def test_eval_gives_the_figures_of_the_run(finished):
    folder, result = finished
    run = CliRunner().invoke(app, ["eval", str(folder / "run"), "--json"])
    found = json.loads(run.stdout)
    assert found.pop("review") == json.loads((folder / "run" / "metrics.json").read_text())["review"]
    assert found == pytest.approx(result.final, abs=1e-6)
    table = write_jsonl(folder / "more.jsonl", rows(10))
    run = CliRunner().invoke(app, ["eval", str(folder / "run" / "best"), "--file", str(table), "--json"])
    assert 0 <= json.loads(run.stdout)["accuracy"] <= 1
    assert "was trained on" not in run.stderr
    own = loader.load_recipe(str(folder / "run" / "recipe.yaml")).data.train.path
    run = CliRunner().invoke(app, ["eval", str(folder / "run" / "best"), "--file", own, "--json"])
    assert f"{own} is what the adapter was trained on, so results flatter" in run.stderr
    with pytest.raises(LilyError, match="exclude each other"):
        CliRunner().invoke(app, ["eval", str(folder / "run"), "--file", "x", "--split", "test"], catch_exceptions=False)


def test_a_run_keeps_its_confusion_and_its_most_confident_mistakes(finished):
    folder, result = finished
    items = json.loads((folder / "run" / "predictions.json").read_text())["items"]
    pairs = list(zip(items["expected"], items["predicted"], strict=True))
    kept = json.loads((folder / "run" / "metrics.json").read_text())["review"]
    assert kept["classes"]["confusion"] == [[pairs.count((i, j)) for j in range(2)] for i in range(2)]
    wrong = [i for i, (expected, predicted) in enumerate(pairs, 1) if expected != predicted]
    assert sorted(mistake["row"] for mistake in kept["mistakes"]) == wrong
    run = CliRunner().invoke(app, ["eval", str(folder / "run"), "--split", "train"])
    assert "precision" in run.stdout
    assert result.review.classes.scores[0].support == sum(kept["classes"]["confusion"][0])


def test_predict_streams_rows_in_and_out(finished):
    folder, _ = finished
    table = write_jsonl(folder / "new.jsonl", [{"text": r["text"], "id": i} for i, r in enumerate(rows(20))])
    out = folder / "predicted.jsonl"
    arguments = ["predict", str(folder / "run"), "--input", str(table), "--output", str(out)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    got = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in got] == list(range(20))
    assert {row["prediction"] for row in got} <= {"0", "1"}
    assert all(0.5 <= row["score"] <= 1 for row in got)
    with pytest.raises(LilyError, match="exists; name another file"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    piped = CliRunner().invoke(app, [*arguments[:2], "--input", "-"], input=table.read_text())
    assert [json.loads(line) for line in piped.stdout.splitlines()] == got


def test_predict_never_overwrites_a_column_of_the_users_own(finished):
    folder, _ = finished
    table = write_jsonl(folder / "own.jsonl", [{"text": "the film was good"}, {"text": "bad", "score": 5}])
    out = folder / "own-out.jsonl"
    arguments = ["predict", str(folder / "run"), "--input", str(table), "--output", str(out)]
    with pytest.raises(LilyError, match=r"row 2 already has a column 'score'.*--prefix"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert not out.exists()
    assert CliRunner().invoke(app, [*arguments, "--prefix", "lily_"]).exit_code == 0
    got = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row.get("score") for row in got] == [None, 5]
    assert all(0.5 <= row["lily_score"] <= 1 and row["lily_prediction"] in "01" for row in got)


def test_prediction_reads_no_further_than_it_must(finished):
    folder, _ = finished
    seen = []

    def endless():
        for i in range(10**9):
            seen.append(i)
            yield {"text": "the film was good"}

    stream = Adapter(str(folder / "run")).predict(endless())
    next(stream)
    assert len(seen) == 64


def test_generate_answers_a_prompt(chat_run):
    run = CliRunner().invoke(app, ["generate", str(chat_run.run), "question the film was good"])
    assert run.exit_code == 0
    assert run.stdout.strip()


def test_other_rows_under_the_same_name_are_noticed(tmp_path, encoder):
    table = tmp_path / "t.jsonl"
    path = write_recipe(tmp_path, classification(encoder, write_jsonl(table, rows()), tmp_path))
    recipe = loader.load_recipe(path, ["train.max_steps=1", "baselines=[]"])
    train.train(recipe, quiet=True)
    run = tmp_path / "run"
    train.train(recipe, resume=True, quiet=True)  # the same rows
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Adapter(str(run)).rows()
    write_jsonl(table, rows()[:-6])
    with pytest.raises(LilyError, match=r"--resume: the rows of data\.\w+.* may have been trained on"):
        train.train(recipe, resume=True, quiet=True)
    with pytest.warns(UserWarning, match="rows that it was trained on may be among those"):
        Adapter(str(run)).rows()
    (run / "rows.json").unlink()  # a run of an earlier version
    train.train(recipe, resume=True, quiet=True)


def test_a_system_message_stands_before_the_prompt(chat_run):
    command = ["generate", str(chat_run.run), "question the film was good", "--system"]
    seen, answer = [], Answer("yes", 1, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lily.recipes.results.adapter.answers", lambda m, t, turns, *_: seen.extend(turns) or [answer])
        assert CliRunner().invoke(app, [*command, "be kind"]).exit_code == 0
    assert [message["role"] for message in seen[0].messages] == ["system", "user"]


def test_the_model_card_says_how_to_load(finished):
    folder, _ = finished
    card = (folder / "run" / "best" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "import lily" in card
    assert "| this adapter |" in card


def test_a_cosine_ends_at_the_least_learning_rate_of_the_adapter_and_in_proportion_of_the_head(tmp_path, encoder):
    changes = ["train.schedule=cosine", "train.min_learning_rate=1e-3", "train.epochs=1", "train.warmup=0"]
    recipe = make(classification, tmp_path, encoder, [*changes, "train.head_learning_rate=0.02"])
    rates = []
    with pytest.MonkeyPatch.context() as patch:
        step = torch.optim.lr_scheduler.LambdaLR.step
        patch.setattr(
            torch.optim.lr_scheduler.LambdaLR,
            "step",
            lambda self, *more: (step(self, *more), rates.append(self.get_last_lr()))[0],
        )
        train.train(recipe, quiet=True)
    assert rates[-1] == pytest.approx([1e-3, 2e-3])
    assert rates == sorted(rates, reverse=True)


def test_a_watch_stops_a_run_that_goes_on_later_to_where_an_undisturbed_one_ends(tmp_path, encoder, whole):
    recipe, (run, expected) = make(classification, tmp_path, encoder, ["train.epochs=3"]), whole
    seen = []

    def watch(history):
        seen.append([h["epoch"] for h in history])
        return len(history) == 2

    paused = train.train(recipe, quiet=True, watch=watch)
    assert seen == [[1.0], [1.0, 2.0]]
    assert paused.history == expected.history[:2]
    assert train.train(recipe, resume=True, quiet=True).history == expected.history
    same_weights(run, tmp_path / "run")


def test_a_trial_of_a_search_leaves_the_test_rows_alone(tmp_path, encoder, monkeypatch):
    recipe = make(classification, tmp_path, encoder, ["train.epochs=2"])
    monkeypatch.setattr(evaluate.Judge, "__call__", lambda *_: pytest.fail("rows were judged"))
    result = train.train(recipe, quiet=True, validation_only=True)
    assert result.split == "validation"
    assert result.before == {}
    assert result.final["accuracy"] == result.best["value"]
