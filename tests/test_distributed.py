"""Several processes: training under DDP, FSDP2 and FSDP1 is that of one process, and its adapter is saved once."""

from __future__ import annotations

import os
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import ENGINES, let_accelerate_shard_on_the_cpu, wrap
from helpers import build, inputs, processes, randomise, tally
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

import lily
from lily import distributed

STEPS, ROWS = 10, 8
METHODS = ("token", "static", "sequence", "uniform", "lora")


def adapted(method: str, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    targets = ["q_proj", "down_proj"]
    if method == "lora":
        config: Any = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    else:
        given = {"num_A": 2, **options}
        config = lily.LilyConfig(r=4, num_B=3, routing=method, target_modules=targets, task_type="CAUSAL_LM", **given)
    return randomise(get_peft_model(build("llama"), config)).train()


def batch(step: int) -> dict[str, torch.Tensor]:
    made = inputs("llama", ROWS, tokens=7, seed=step)
    return {**made, "labels": made["input_ids"]}


def part(values: dict[str, torch.Tensor], number: int, parts: int) -> dict[str, torch.Tensor]:
    return {name: value[number::parts] for name, value in values.items()}


def train(model: nn.Module, mine: Any, accumulation: int = 1, half: bool = False) -> list[float]:
    """The losses of some steps; `mine` gives this process's part of a micro-batch. Learns slowly, so that Adam, whose
    first steps are as large for a gradient of 1e-9 as for one of 1, does not make a difference of a rounding error."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-4)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for micro in range(accumulation):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(**mine(batch(step * accumulation + micro))).loss / accumulation
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def mean(losses: list[float]) -> list[float]:
    values = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(values)
    return (values / dist.get_world_size()).tolist()


def trained_alike(
    folder: Path, engine: str, methods: tuple[str, ...], checkpointing: bool, accumulation: int, rank: int
) -> dict[str, Any]:
    """Method -> losses, how a plain save ends, and how far what load_weights puts back is from what was there."""
    found = {}
    for method in methods:
        inner = adapted(method)
        if checkpointing:
            inner.gradient_checkpointing_enable({"use_reentrant": False})
        model = wrap(inner, engine)
        losses = mean(train(model, lambda values: part(values, rank, dist.get_world_size()), accumulation))
        refused = None
        if engine != "ddp" and method != "lora":
            try:
                inner.save_pretrained(str(folder / "plain"))
            except lily.LilyError as error:
                refused = str(error)
        lily.save_adapter(model, folder / method)
        state = lily.gathered_state(model)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad and p.numel():
                    p.zero_()
        distributed.load_weights(model, folder / method)
        again = lily.gathered_state(model)
        found[method] = losses, refused, all(torch.equal(state[name], again[name]) for name in state), len(state)
    return found


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(build("llama"), str(folder))
    return {n: p for n, p in model.named_parameters() if "lily_" in n or "lora_" in n}


def check_alike(
    folder: Path, engine: str, count: int, methods: tuple[str, ...], checkpointing: bool = False, accumulation: int = 1
) -> None:
    work = partial(trained_alike, folder, engine, methods, checkpointing, accumulation)
    found = processes(work, count)
    for method in methods:
        alone = adapted(method)
        losses = train(alone, lambda values: values, accumulation)
        for rank in range(count):
            assert found[rank][method][0] == pytest.approx(losses, abs=1e-5)
        parameters, before = dict(alone.named_parameters()), dict(adapted(method).named_parameters())
        saved = loaded(folder / method)
        assert saved
        for name, tensor in saved.items():
            assert torch.allclose(tensor, parameters[name], rtol=0, atol=1e-5), name
        assert max((before[name] - tensor).abs().max() for name, tensor in saved.items()) > 1e-3
        if engine != "ddp" and method != "lora":
            assert "lily.save_adapter(model, folder)" in found[0][method][1]
            assert not (folder / "plain").exists()
        assert found[0][method][2]
        assert found[0][method][3]
        assert not found[1][method][3]
        tally("loads held")


@pytest.mark.parametrize(
    "engine", [pytest.param(engine, marks=pytest.mark.slow) if engine == "fsdp1" else engine for engine in ENGINES]
)
def test_two_processes_train_and_save_what_one_does(tmp_path, engine):
    check_alike(tmp_path, engine, 2, ("token", "lora"))


def gradients(model: nn.Module) -> dict[str, Any]:
    return {n.removeprefix("module."): p.grad.tolist() for n, p in model.named_parameters() if p.requires_grad}


def global_gradients(rank: int) -> dict[str, Any]:
    model = wrap(adapted("batch", batch_scope="global"), "ddp")
    model(**part(batch(0), rank, 2)).loss.backward()
    return gradients(model)


def test_batch_routing_with_a_global_scope_is_that_of_one_process_gradients_included():
    alone = adapted("batch")
    alone(**batch(0)).loss.backward()
    expected, found = gradients(alone), processes(global_gradients)[0]
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert torch.allclose(torch.tensor(found[name]), torch.tensor(gradient), rtol=0, atol=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_four_processes_train_and_save_what_one_does(tmp_path, engine):
    check_alike(tmp_path, engine, 4, METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_checkpointing_and_accumulation_change_nothing(tmp_path, engine):
    check_alike(tmp_path, engine, 2, METHODS, checkpointing=True, accumulation=2)


def in_half(engine: str, rank: int) -> list[float]:
    model = wrap(adapted("token"), engine, half=engine != "ddp")
    return mean(train(model, lambda values: part(values, rank, 2), half=engine == "ddp"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_mixed_precision_gives_the_losses_of_one_process_as_far_as_bfloat16_tells(engine):
    found = processes(partial(in_half, engine))
    losses = train(adapted("token"), lambda values: values)
    assert found[0] == pytest.approx(losses, abs=2e-2)
    tally("loads held")


def bank_alone(rank: int) -> list[str]:
    model = adapted("token")
    bank = next(m for m in model.modules() if type(m).__name__ == "LilyBank")
    fully_shard(bank, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)))
    settling = wrap(adapted("token", settled=0.0), "fsdp2")
    said = []
    for work in (lambda: model(**batch(0)), lambda: lily.Settling(settling, total_steps=10).step(0)):
        with pytest.raises(lily.LilyError) as error:
            work()
        said.append(str(error.value))
    return said


def test_what_cannot_be_computed_from_parts_is_refused_with_the_way_out():
    not_gathered, settling = processes(bank_alone)[0]
    assert "fully_shard(model) after fully_shard(layer)" in not_gathered
    assert "train under DDP" in settling
    tally("inputs rejected", 2)


class Noticing(OrderedDict):
    """As DeepSpeed's ZeRO-3 replaces a module's parameters: it gathers those that are read by subscript."""

    read: list[str]

    def __getitem__(self, name: str) -> Any:
        self.read.append(name)
        return super().__getitem__(name)


def test_the_bank_reads_shared_tensors_in_the_way_that_zero3_notices():
    model = adapted("token")
    bank = next(m for m in model.modules() if type(m).__name__ == "LilyBank")
    lists = bank.tensors("default")
    for tensors in lists:
        tensors._parameters = Noticing(tensors._parameters)
        tensors._parameters.read = []
    model(**batch(0))
    for tensors in lists:
        assert set(tensors._parameters.read) == {str(i) for i in range(len(tensors))}


def by_trainer(folder: Path, kind: str, stop: int, resume: bool, rank: int) -> None:
    """transformers' own Trainer under FSDP2, with checkpoints of one kind."""
    os.environ.update(
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer",
        FSDP_STATE_DICT_TYPE=kind,
        FSDP_RESHARD_AFTER_FORWARD="true",
        FSDP_CPU_RAM_EFFICIENT_LOADING="false",
        FSDP_OFFLOAD_PARAMS="false",
    )
    let_accelerate_shard_on_the_cpu()
    rows = [{name: value[i] for name, value in batch(0).items()} for i in range(ROWS)] * 6
    arguments = TrainingArguments(
        str(folder / "trainer"),
        per_device_train_batch_size=ROWS // dist.get_world_size(),
        max_steps=stop,
        save_steps=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(adapted("token"), arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(folder / "trainer" / "checkpoint-3") if resume else None)
    if stop == 6:
        lily.save_adapter(trainer.model, folder / f"resumed-{resume}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_the_checkpoints_of_a_trainer_under_fsdp2_resume_on_fewer_processes(tmp_path, kind):
    processes(partial(by_trainer, tmp_path, kind, 6, False), 4)
    processes(partial(by_trainer, tmp_path, kind, 6, True), 2)
    whole, resumed = loaded(tmp_path / "resumed-False"), loaded(tmp_path / "resumed-True")
    untrained = dict(adapted("token").named_parameters())
    for name, tensor in whole.items():
        assert torch.allclose(tensor, resumed[name], rtol=0, atol=1e-5), name
        assert not torch.equal(tensor, untrained[name]), name
    tally("loads held")


def with_deepspeed(folder: Path, stage: int, method: str, rank: int) -> Any:
    import deepspeed

    deepspeed.init_distributed("gloo")
    inner = adapted(method)
    trained = [p for p in inner.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": ROWS // 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-4)
    engine, *_ = deepspeed.initialize(model=inner, optimizer=optimizer, config=config)
    losses = []
    for step in range(STEPS):
        loss = engine(**part(batch(step), rank, 2)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    lily.save_adapter(engine, folder / method)
    state = lily.gathered_state(engine)
    distributed.load_weights(engine, folder / method)
    again = lily.gathered_state(engine)
    return mean(losses), all(torch.equal(state[name], again[name]) for name in state)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("method", ["token", "static", "lora"])
def test_deepspeed_trains_and_saves_what_one_process_does(tmp_path, stage, method):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    found = processes(partial(with_deepspeed, tmp_path, stage, method))
    alone = adapted(method)
    assert found[0][0] == pytest.approx(train(alone, lambda values: values), abs=1e-5)
    assert found[0][1]
    parameters = dict(alone.named_parameters())
    for name, tensor in loaded(tmp_path / method).items():
        assert torch.allclose(tensor, parameters[name], rtol=0, atol=1e-5), name
    tally("loads held")
