"""`train.B_lr_ratio` and `train.router_lr_ratio`: what each part of a run learns at, and where a user sees it."""

from __future__ import annotations

import json
import re

import pytest
import torch
from adapters import config_for
from helpers import build
from peft import get_peft_model
from recipes_helpers import classification, sft
from runs import invoke, make
from safetensors.torch import load_file

from lily.recipes import train
from lily.recipes.spec.dreambooth import DreamBooth
from lily.recipes.trainer.optimizer_groups import parameter_groups

RATIOS = ["train.B_lr_ratio=4", "train.router_lr_ratio=0.5", "train.head_learning_rate=0.003"]


def rates_by_step(recipe, monkeypatch, **options):
    """(name, rate) of each group in every optimizer step."""
    rates = []
    step = torch.optim.AdamW.step

    def noting(self, *arguments, **more):
        rates.append([(group.get("name"), group["lr"]) for group in self.param_groups])
        return step(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", noting)
        result = train.train(recipe, quiet=True, **options)
    return rates, result


@pytest.mark.parametrize(
    ("method", "multiples", "recorded"),
    [
        ("lily", {"A": 1, "B": 4, "router": 0.5, "head": 0.3}, {"B_lr_ratio": 4.0, "router_lr_ratio": 0.5}),
        ("lora", {"A": 1, "B": 4, "head": 0.3}, {"B_lr_ratio": 4.0}),
        ("none", {None: 0.3}, {}),
    ],
)
def test_each_part_learns_at_its_multiple_in_every_step(tmp_path, encoder, monkeypatch, method, multiples, recorded):
    changes = [f"method={method}", "train.max_steps=6", "train.warmup=2", *RATIOS]
    rates, _ = rates_by_step(make(classification, tmp_path, encoder, changes), monkeypatch)
    shares = [0, 0.5, 1, 0.75, 0.5, 0.25]
    assert rates == [[(part, pytest.approx(0.01 * m * share)) for part, m in multiples.items()] for share in shares]
    adapter = json.loads((tmp_path / "run" / "metrics.json").read_text())["adapter"]
    assert {name: value for name, value in adapter.items() if name.endswith("ratio")} == recorded
    card = (tmp_path / "run" / "best" / "README.md").read_text()
    assert ("B_lr_ratio 4.0" in card, "router_lr_ratio 0.5" in card) == (method != "none", method == "lily")


def test_trls_trainer_too(tmp_path, chat_model, monkeypatch):
    recipe = make(sft, tmp_path, chat_model, ["train.max_steps=1", "train.warmup=0", "lily.gain=ones", *RATIOS[:2]])
    rates, _ = rates_by_step(recipe, monkeypatch)
    assert rates == [[("A", 0.02), ("B", 0.08), ("router", 0.01), ("gain", 0.02)]]


def test_without_ratios_the_groups_are_those_of_earlier_checkpoints(tmp_path, encoder, monkeypatch):
    changes = ["train.max_steps=1", "train.warmup=0", "train.head_learning_rate=0.003"]
    rates, result = rates_by_step(make(classification, tmp_path, encoder, changes), monkeypatch)
    assert rates == [[(None, 0.01), (None, 0.003)]]  # the adapter and the head
    assert not any(name.endswith("ratio") for name in result.adapter)


def test_a_run_with_ratios_is_resumed_to_the_same_bits(tmp_path, encoder):
    recipe = make(classification, tmp_path, encoder, ["train.epochs=2", *RATIOS])
    train.train(recipe, quiet=True)
    expected = load_file(tmp_path / "run" / "last" / "adapter_model.safetensors")
    train.train(recipe, overwrite=True, quiet=True, watch=lambda history: len(history) == 1)
    train.train(recipe, resume=True, quiet=True)
    got = load_file(tmp_path / "run" / "last" / "adapter_model.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        (RATIOS, {"A": 0.01, "B": 0.04, "router": 0.005, "head": 0.003}),
        (
            [*RATIOS, "lily.routing=static", "lily.gain=signs"],
            {"A": 0.01, "B": 0.04, "logits": 0.005, "gain": 0.01, "head": 0.003},
        ),
        ([*RATIOS, "lily.settle={}"], {"A": 0.01, "B": 0.04, "router": 0.005, "logits": 0.005, "head": 0.003}),
        ([*RATIOS, "lily.num_B=1"], {"A": 0.01, "B": 0.04, "head": 0.003}),
        ([*RATIOS, "method=rslora"], {"A": 0.01, "B": 0.04, "head": 0.003}),
        ([RATIOS[1], "method=lora"], {}),
        ([*RATIOS, "method=none"], {}),
        ([], {}),
    ],
)
def test_a_plan_says_what_each_part_learns_at(tmp_path, encoder, monkeypatch, changes, rates):
    monkeypatch.setenv("COLUMNS", "300")
    make(classification, tmp_path, encoder)
    values = json.loads(invoke("plan", tmp_path / "recipe.yaml", "--json", *changes))
    assert values["learning_rates"] == pytest.approx(rates)
    assert list(values["learning_rates"]) == list(rates)
    text = re.sub(r"[\s│]+", " ", invoke("plan", tmp_path / "recipe.yaml", *changes))
    line = ", ".join(f"{part} {rate:g}" for part, rate in rates.items())
    assert (line in text) if rates else (", A " not in text)


@pytest.mark.parametrize(
    ("ratios", "names"), [({}, [None]), ({"B_lr_ratio": 2, "router_lr_ratio": 3}, ["A", "B", "router"])]
)
def test_dreambooth_has_the_same_groups(ratios, names):
    recipe = DreamBooth.model_validate(
        {
            "name": "demo",
            "task": "dreambooth",
            "model": {"standin": "sdxl"},
            "subject": {"images": "x", "prompt": "a photo", "resolution": 64},
            "train": {"learning_rate": 0.5, **ratios},
        }
    )
    model = get_peft_model(build("plain"), config_for("plain", routing="token"))
    groups = parameter_groups(recipe, model)
    assert [group.get("name") for group in groups] == names
    assert [group["lr"] for group in groups] == [0.5, 1.0, 1.5][: len(names)]
    trained = [p for p in model.parameters() if p.requires_grad]
    grouped = [p for group in groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in trained}
    assert len(grouped) == len(trained)
    if not ratios:  # the order of earlier checkpoints
        assert [id(p) for p in grouped] == [id(p) for p in trained]
