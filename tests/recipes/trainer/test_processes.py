"""`lily train` on several processes: what one process does, under every engine, and errors that end them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import let_accelerate_shard_on_the_cpu
from helpers import processes, tally
from recipes_helpers import chat_model, chat_table, sft, write_recipe  # noqa: F401
from safetensors.torch import load_file

from lily.recipes import loader
from lily.recipes.train import train
from lily.recipes.trainer import batches

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_SYNC_MODULE_STATES": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
VERSIONS = {"fsdp1": "1", "fsdp2": "2"}


def values(model: Path, table: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """62 rows: the last batch of an epoch is a small one."""
    train = {"epochs": 2, "batch_size": 8, "learning_rate": 0.001, "precision": "float32"}
    return sft(model, table, tmp_path, **{"train": train, **changes})


def run(recipe: str, engine: str, overrides: list[str], resume: bool, rank: int) -> None:
    if engine in VERSIONS:
        os.environ.update(FSDP, FSDP_VERSION=VERSIONS[engine])
        if engine == "fsdp1":
            os.environ["FSDP_SHARDING_STRATEGY"] = "FULL_SHARD"
        let_accelerate_shard_on_the_cpu()
    train(loader.load_recipe(recipe, overrides), resume=resume, quiet=True)


def figures(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "metrics.json").read_text())
    return {name: found[name] for name in ("before", "final", "best", "last", "parameters", "rows")}


def assert_alike(one: Path, other: Path) -> None:
    for name in ("best", "last"):
        x, y = (load_file(folder / name / "adapter_model.safetensors") for folder in (one, other))
        assert set(x) == set(y)
        for key in x:
            assert torch.allclose(x[key], y[key], rtol=0, atol=1e-5), key
    x, y = figures(one), figures(other)
    assert x["parameters"] == y["parameters"]
    assert x["rows"] == y["rows"]
    for part in ("before", "final", "best", "last"):
        assert x[part] == pytest.approx(y[part], abs=1e-5)
    tally("loads held")


@pytest.fixture
def recipe(tmp_path, chat_model, chat_table):  # noqa: F811
    return write_recipe(tmp_path, values(chat_model, chat_table, tmp_path))


@pytest.fixture
def alone(tmp_path, recipe):
    train(loader.load_recipe(recipe, [f"output={tmp_path / 'alone'}"]), quiet=True)
    return tmp_path / "alone"


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2", pytest.param("fsdp1", marks=pytest.mark.slow)]
)
def test_a_recipe_on_two_processes_ends_as_on_one(tmp_path, recipe, alone, engine):
    processes(partial(run, recipe, engine, [f"output={tmp_path / engine}"], False))
    assert_alike(alone, tmp_path / engine)
    assert (tmp_path / engine / "best" / "README.md").is_file()
    assert not list((tmp_path / engine).glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("ddp", "fsdp2"), ("fsdp2", "fsdp1"), ("fsdp1", "alone")])
def test_a_run_resumes_on_another_number_of_processes_and_another_engine(tmp_path, recipe, before, after):
    same = ["train.schedule=constant", "train.warmup=0"]  # whatever the number of steps
    train(loader.load_recipe(recipe, [f"output={tmp_path / 'alone'}", *same]), quiet=True)
    out = tmp_path / "moved"
    stopped = [f"output={out}", "train.max_steps=3", "train.save_every=3", *same]
    processes(partial(run, recipe, before, stopped, False), 4)
    resumed = [f"output={out}", "train.max_steps=10", *same]
    if after == "alone":
        run(recipe, "none", resumed, True, 0)
    else:
        processes(partial(run, recipe, after, resumed, True), 2)
    x, y = (load_file(tmp_path / name / "last" / "adapter_model.safetensors") for name in ("alone", "moved"))
    for key in x:
        assert torch.allclose(x[key], y[key], rtol=0, atol=1e-5), key
    tally("loads held")


def launched(*arguments: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, "-m", "lily", "train", *arguments, "--quiet"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )


@pytest.mark.slow
def test_torchrun_trains_what_one_process_trains_and_reports_once(tmp_path, recipe, alone):
    done = launched(recipe, f"output={tmp_path / 'two'}", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("figures:") == 1
    assert_alike(alone, tmp_path / "two")


@pytest.mark.slow
def test_an_error_is_told_once_and_ends_all_processes(tmp_path, recipe):
    done = launched(recipe, "train.batch_size=7", f"output={tmp_path / 'two'}", tmp_path=tmp_path)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(told) == 1
    assert "train.batch_size=7 is the batch over all processes, and 2 of them cannot share it equally" in told[0]
    assert not (tmp_path / "two").exists()
    tally("inputs rejected")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", [None, [3 + i % 5 for i in range(22)]])
def test_every_row_is_trained_on_once_per_epoch_on_any_number_of_processes(world, lengths):
    order = batches.Batches(22, 4, seed=3, lengths=lengths, group=8)
    parts = [
        batches.Part(list(range(22)), lambda rows: {"rows": rows, "labels": torch.zeros(len(rows))}, rank, world)
        for rank in range(world)
    ]
    seen = []
    for epoch in (0, 1):
        order.set_epoch(epoch)
        rows = []
        for numbers in order:
            found = [part(numbers) for part in parts]
            shares = [part.get(batches.SHARE, torch.tensor([len(numbers), len(numbers)])) for part in found]
            assert sum(float(batches.weight_of(share, world)) for share in shares) == pytest.approx(world)
            taken = [row for part, share in zip(found, shares, strict=True) for row in part["rows"][: int(share[0])]]
            assert sorted(taken) == sorted(numbers)
            rows += numbers
        assert sorted(rows) == list(range(22))
        seen.append(rows)
    assert seen[0] != seen[1]
