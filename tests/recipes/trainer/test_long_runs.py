"""Long runs: numbers that stop being numbers, routers that stop routing, and memory that stays where it is."""

from __future__ import annotations

import gc
import math
import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import llama, tally
from peft import LoraConfig, get_peft_model
from recipes_helpers import classification, rows, write_jsonl, write_recipe
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

import lily
from lily.callbacks.router_watch import AT_LEAST, IN_A_ROW, RouterWatch, diagnose, problem_message
from lily.errors import LilyError
from lily.layers.routing_statistics import RoutingStatistics
from lily.recipes import loader, train
from lily.recipes.trainer import checkpoints
from lily.recipes.trainer import trainer as runner


def recipe_in(folder: Path, encoder: Path, *changes: str) -> Any:
    values = classification(encoder, write_jsonl(folder / "t.jsonl", rows()), folder)
    return loader.load_recipe(write_recipe(folder, values), list(changes))


def seen(p: torch.Tensor) -> RoutingStatistics:
    """Statistics of weights (tokens, experts)."""
    statistics = RoutingStatistics.empty(p.shape[-1], per_token=True)
    statistics.add(p, torch.zeros(len(p), 1), None)
    return statistics


def softmax_of(gain: float, experts: int = 4, tilt: float = 0.0) -> torch.Tensor:
    logits = torch.randn(4000, experts, generator=torch.Generator().manual_seed(0)) * gain
    logits[:, 0] += tilt
    return logits.softmax(-1)


@pytest.mark.parametrize(
    ("p", "problem"),
    [
        (softmax_of(0.0), None),
        (softmax_of(1.0), None),
        (softmax_of(5.0), None),
        (softmax_of(1.0, tilt=3.0), None),
        (softmax_of(1.0, tilt=8.0), "degenerate"),
        (softmax_of(1.0, experts=2, tilt=8.0), "degenerate"),
        (softmax_of(500.0), "saturated"),
        (softmax_of(1.0, tilt=-12.0), "dead experts"),
    ],
)
def test_a_routers_problem_is_told_from_what_its_softmax_gave(p, problem):
    assert diagnose(seen(p)).problem == problem


def test_statistics_per_token_see_what_the_mean_over_a_sample_hides():
    torch.manual_seed(0)
    config = lily.LilyConfig(
        r=4, num_A=1, num_B=2, target_modules=["q_proj"], routing="sequence", task_type="CAUSAL_LM"
    )
    model = get_peft_model(llama(), config).train()
    for name, p in model.named_parameters():
        if "router" in name:
            p.data *= 1e4
    watch = RouterWatch(pytest.fail)
    watch.attach(model)
    model(input_ids=torch.randint(3, 60, (2, 16)))
    watch.collect(1)
    assert watch.state["certainty"] > 0.98
    assert watch.state["largest_share"] < 0.98
    assert not any(layer.statistics for layer in model.modules() if hasattr(layer, "lily_router"))


def test_a_problem_is_reported_once_and_only_when_it_lasts():
    said: list[str] = []
    watch = RouterWatch(said.append)
    bad, good = diagnose(seen(softmax_of(1.0, tilt=8.0))), diagnose(seen(softmax_of(1.0)))
    for step in range(1, IN_A_ROW):
        watch.note(step, {"layers.0.q_proj": bad, "layers.1.q_proj": good})
    watch.note(IN_A_ROW, {"layers.0.q_proj": good, "layers.1.q_proj": good})
    assert not said
    for step in range(10, 20):
        watch.note(step, {"layers.0.q_proj": bad, "layers.1.q_proj": good})
    assert len(said) == 1
    assert said[0].startswith(
        f"step {9 + IN_A_ROW}: 1 of 2 routers give one expert nearly everything: layers.0.q_proj ("
    )
    assert "Lower the learning rate or scaling" in said[0]
    assert list(watch.state["problems"]) == ["layers.0.q_proj"]


def test_a_report_on_many_routers_stays_short():
    bad = diagnose(seen(softmax_of(500.0)))
    said = problem_message(7, {f"layers.{i}.up_proj": bad for i in range(200)}, 224)
    assert "layers.2.up_proj (mean certainty 0.99" in said
    assert " and 197 more. Lower" in said
    assert len(said) < 500


@pytest.mark.parametrize(("total", "expected"), [(10, 5), (500, 50), (50_000, 500)])
def test_routers_are_looked_at_in_few_steps_but_often_enough(total, expected):
    looked = [step for step in range(total) if RouterWatch.wants(step, total)]
    assert len(looked) == expected
    assert max(b - a for a, b in pairwise(looked)) <= AT_LEAST


def trained(folder: Path, steps: int, rate: float, *callbacks: TrainerCallback, **config: Any) -> Trainer:
    """A tiny causal model, trained with the health callback."""
    torch.manual_seed(0)
    given = {"r": 4, "num_A": 1, "num_B": 4, "scaling": 4.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(llama(), lily.LilyConfig(**{**given, **config}))
    table = [{"input_ids": (ids := torch.randint(3, 60, (12,))), "labels": ids} for _ in range(64)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=rate,
        lr_scheduler_type="constant",
        logging_steps=5,
        save_steps=5,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_only_model=True,
    )
    trainer = Trainer(model, arguments, train_dataset=table, callbacks=list(callbacks))
    trainer.train()
    return trainer


def test_an_extreme_learning_rate_collapses_routers_and_that_is_reported(tmp_path):
    said: list[str] = []
    health = lily.HealthCallback(said.append)
    trained(tmp_path, 12, 0.5, health)
    assert len(said) == 1
    assert "choose one expert for each token with certainty" in said[0]
    assert health.routers.state["certainty"] > 0.9


class Partly(torch.nn.Module):
    """Reads the weight of one of its layers without calling it, and calls another in its sixth forward alone."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.rare = (torch.nn.Linear(4, 4) for _ in range(3))
        self.forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        y = torch.nn.functional.linear(self.called(x), self.read.weight)
        return self.rare(y) if self.forwards == 6 else y


@pytest.mark.parametrize("routing", ["token", "static", "uniform"])
@pytest.mark.parametrize(("steps", "idle"), [(30, ["read"]), (4, ["rare", "read"])])
def test_layers_that_get_no_gradient_are_told_of_once(routing, steps, idle):
    torch.manual_seed(0)
    config = lily.LilyConfig(r=2, num_B=2, routing=routing, target_modules=["called", "read", "rare"])
    model, said = get_peft_model(Partly(), config), []
    health = lily.HealthCallback(said.append)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    arguments = SimpleNamespace(fp16=False, output_dir="", device="cpu")
    for step in range(steps):
        optimiser.zero_grad()
        model(torch.randn(3, 4)).sum().backward()
        state = SimpleNamespace(global_step=step, max_steps=steps, is_world_process_zero=True)
        health.on_pre_optimizer_step(arguments, state, None, model=model, optimizer=optimiser)
    assert len(said) == 1
    assert said[0].startswith(f"{len(idle)} of 3 adapted layers got no gradient in {min(steps, 20)} steps: ")
    assert f"steps: {', '.join(idle)}. Their parent reads the weight without calling" in said[0]


def test_a_healthy_run_reports_nothing_and_its_figures_tell_the_routing(tmp_path, encoder, capfd):
    result = train.train(recipe_in(tmp_path, encoder), quiet=True)
    # ours begin a line; what another library or a compiler prints may have the word somewhere
    assert [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning:")] == []
    assert result.router["problems"] == {}
    assert result.router["routers"] == 13  # 6 in each of two layers, and the pooler
    assert 0.5 <= result.router["largest_share"] < 0.98


class Breaks(TrainerCallback):
    """Makes something of a model not finite at the beginning of a step."""

    def __init__(self, step: int, value: float, name: str) -> None:
        self.step, self.value, self.name = step, value, name

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step - 1:
            parameter = next(p for n, p in model.named_parameters() if self.name in n and p.requires_grad)
            parameter.data.view(-1)[0] = self.value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_users_trainer_stops_at_the_step_and_keeps_the_last_good_checkpoint(tmp_path, value):
    with pytest.raises(LilyError) as found:
        trained(tmp_path, 20, 1e-3, Breaks(8, value, "lily_B"), lily.HealthCallback())
    said = str(found.value)
    assert said.startswith("step 8: the gradient of ")
    assert "is not finite (learning rate 0.001); lower the learning rate or scaling" in said
    assert said.endswith(f"the last checkpoint is {tmp_path}/checkpoint-5")
    tally("faults survived")


def test_a_loss_that_is_no_number_ends_a_run_and_what_was_saved_is_finite(tmp_path, encoder, monkeypatch):
    recipe = recipe_in(tmp_path, encoder, "train.evaluate_every=3")
    build = runner.build_trainer

    def broken(*args: Any, **kwargs: Any) -> Any:
        trainer = build(*args, **kwargs)
        trainer.add_callback(Breaks(8, math.nan, "lily_router"))
        return trainer

    monkeypatch.setattr(runner, "build_trainer", broken)
    with pytest.raises(LilyError, match=r"^step 8: the loss is nan \(learning rate .*checkpoint-6$"):
        train.train(recipe, quiet=True)
    run = tmp_path / "run"
    for folder in (run / "best", checkpoints.last(run)):
        assert all(t.isfinite().all() for t in load_file(folder / "adapter_model.safetensors").values())
    assert not (run / "last").exists()
    tally("faults survived")


class Poisons(TrainerCallback):
    """Makes a weight infinite after the optimiser's step, as an overflowing update does."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 10:
            next(p for n, p in model.named_parameters() if "lily_router" in n).data.view(-1)[0] = math.inf


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(LilyError, match=r"step 10: the weight of .*lily_router.* is not finite"):
        trained(tmp_path, 20, 1e-3, Poisons(), lily.HealthCallback())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-5"]
    tally("faults survived")


def test_what_is_not_finite_in_the_first_step_is_no_matter_of_the_learning_rate(tmp_path):
    with pytest.raises(LilyError, match=r"^step 1: .*check the base model's weights.*there is no checkpoint yet$"):
        trained(tmp_path, 2, 1e-3, Breaks(1, math.nan, "lily_A"), lily.HealthCallback())


def test_under_float16_single_overflows_are_the_scalers_business_and_endless_ones_are_not(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimiser = torch.optim.SGD([parameter], lr=1.0)
    health = lily.HealthCallback()
    arguments = SimpleNamespace(fp16=True, output_dir=str(tmp_path))

    def step(number: int, gradient: float, loss: float = 1.0) -> None:
        parameter.grad = torch.full((2,), gradient)
        health.note_loss(torch.tensor(loss))
        state = SimpleNamespace(global_step=number, max_steps=400, is_world_process_zero=True)
        health.on_pre_optimizer_step(arguments, state, None, model=torch.nn.Module(), optimizer=optimiser)

    for number in range(200):  # ends with one that overflows not
        step(number, 1.0 if number % 3 == 1 else math.inf)
    for number in range(200, 249):
        step(number, math.inf)
    with pytest.raises(LilyError, match="the gradient has overflowed in 50 steps in a row"):
        step(249, math.inf)
    with pytest.raises(LilyError, match="the loss is nan"):
        step(300, 1.0, math.nan)


def test_a_norm_that_overflows_is_no_fault_if_no_number_does():
    from lily.callbacks.health import _finite

    assert _finite([torch.full((4,), 3e38)], None)
    assert not _finite([torch.full((4,), 3e38), torch.tensor([math.inf])], None)


def test_the_callback_works_for_other_adapters(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    watch = RouterWatch(pytest.fail)
    watch.attach(model)
    watch.collect(1)
    assert watch.state == {}


class Measures(TrainerCallback):
    """Resident memory and live tensors, at two steps."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.found = steps, []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.steps:
            gc.collect()
            tensors = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            self.found.append((tensors, resident))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize("routing", ["token", "sequence", "batch", "static", "uniform", "settle"])
def test_memory_stays_flat_over_2000_steps(tmp_path, routing):
    measures = Measures(400, 2000)
    callbacks: list[TrainerCallback] = [measures, lily.HealthCallback()]
    if routing == "settle":
        callbacks.append(lily.SettleCallback(0.6, 0.999))  # settling, with its statistics, until the last steps
    trained(tmp_path, 2000, 1e-3, *callbacks, routing="token" if routing == "settle" else routing, dropout=0.1)
    (tensors, resident), (tensors_after, resident_after) = measures.found
    # settling begins to record in between: three tensors for each of 28 layers, and what the bank keeps of masks
    assert tensors_after - tensors <= (28 * 3 + 8 if routing == "settle" else 0)
    assert resident_after - resident < 16 * 2**20
    tally("loads held")
