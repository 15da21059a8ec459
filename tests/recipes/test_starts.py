"""`lily.init_weights` in recipes: a run starts A from its own first training batches, once."""

from __future__ import annotations

import warnings

import pytest
import torch
from recipes_helpers import classification, sft, write_recipe
from safetensors.torch import load_file
from typer.testing import CliRunner

from lily import LilyConfig, LilyError
from lily.cli.main import app
from lily.recipes import loader, train
from lily.recipes.trainer.parallel import Parallel

KINDS = {"classification": classification, "sft": sft}


@pytest.fixture
def made(request, tmp_path):
    """Make a recipe of a kind with changes of its keys."""

    def make(kind, *changes, name="run"):
        needs = {"classification": ("encoder", "table"), "sft": ("chat_model", "chat_table")}
        model, data = (request.getfixturevalue(need) for need in needs[kind])
        values = KINDS[kind](model, data, tmp_path, output=str(tmp_path / name))
        return loader.load_recipe(write_recipe(tmp_path, values), ["train.max_steps=4", *changes])

    return make


@pytest.fixture
def starts(monkeypatch):
    """The A of each start from data, as the training got them."""
    seen, start = [], Parallel.start_from_data

    def record(self):
        before = first_A(self.model)
        start(self)
        seen.append((before, first_A(self.model)))

    monkeypatch.setattr(Parallel, "start_from_data", record)
    return seen


def first_A(model):
    return next(p.detach().clone() for name, p in model.named_parameters() if ".lily_A." in name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_from_its_own_batches_and_again_in_the_same_way(made, starts, tmp_path, kind):
    for name in ("run", "again"):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*init_weights")
            train.train(made(kind, "lily.init_weights=data", name=name), quiet=True)
    (before, after), (_, again) = starts
    assert not torch.equal(before, after)
    assert torch.equal(after, again)
    norms = after.norm(dim=1)
    assert torch.allclose(after @ after.T, norms[0] ** 2 * torch.eye(len(after)), atol=1e-5)
    first, second = (load_file(tmp_path / name / "last" / "adapter_model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert LilyConfig.from_pretrained(tmp_path / "run" / "best").init_weights == "data"


def test_a_resumed_run_does_not_start_again_and_ends_where_an_uninterrupted_one_does(made, starts, tmp_path):
    options = ["lily.init_weights=data", "train.save_every=2", "train.evaluate_every=2", "train.schedule=constant"]
    train.train(made("classification", *options, name="whole"), quiet=True)
    train.train(made("classification", *options, "train.max_steps=2"), quiet=True)
    assert len(starts) == 2
    train.train(made("classification", *options), resume=True, quiet=True)
    assert len(starts) == 2
    whole, resumed = (load_file(tmp_path / name / "last" / "adapter_model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_lora_baseline_is_not_concerned(made, starts):
    recipe = made("classification", "lily.init_weights=data", "baselines=[lora]")
    with_data = train.train(recipe, quiet=True).baselines["lora"]
    without = train.train(made("classification", "baselines=[lora]", name="plain"), quiet=True).baselines["lora"]
    assert len(starts) == 1
    assert with_data["accuracy"] == without["accuracy"]


def test_orthonormal_rows_train(made, starts, tmp_path):
    train.train(made("classification", "lily.init_weights=orthonormal"), quiet=True)
    assert not starts
    assert LilyConfig.from_pretrained(tmp_path / "run" / "best").init_weights == "orthonormal"


def test_the_plan_accepts_it_and_an_unknown_start_is_refused(made, tmp_path):
    made("classification")
    plan = [str(part) for part in ("plan", tmp_path / "recipe.yaml")]
    assert CliRunner().invoke(app, [*plan, "lily.init_weights=data"]).exit_code == 0
    with pytest.raises(LilyError, match=r"lily\.init_weights"):
        made("classification", "lily.init_weights=eva")


def test_a_sharded_model_and_stock_lily_are_refused(made, monkeypatch):
    with pytest.raises(LilyError, match="stock Lily has no init_weights"):
        train.train(made("classification", "method=stock-lily", "lily.init_weights=data"), quiet=True)
    monkeypatch.setattr("lily.recipes.trainer.processes.to_be_sharded", lambda: True)
    with pytest.raises(LilyError, match=r"lily.init_weights: data needs the whole model"):
        train.train(made("classification", "lily.init_weights=data"), quiet=True)
