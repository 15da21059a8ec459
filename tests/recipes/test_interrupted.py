"""Runs that are killed, stopped or out of disk, and what becomes of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tally
from recipes_helpers import classification, rows, sft, write_jsonl, write_recipe

from lily import files
from lily.recipes import loader, states, train
from lily.recipes.resumable import Resumable

# Two passes over 36 rows in 5 steps each, the last of which is half a step; evaluations and checkpoints out of step.
SCHEDULE = {"epochs": 2, "batch_size": 4, "gradient_accumulation": 2, "learning_rate": 0.01, "precision": "float32"}
TOKEN = {"r": 4, "num_A": 1, "num_B": 2, "scaling": 4.0, "dropout": 0.1, "routing": "token"}
KINDS: dict[str, dict[str, Any]] = {
    "token": {"lily": TOKEN, "train": {**SCHEDULE, "evaluate_every": 3, "save_every": 2}, "baselines": ["lora"]},
    "settle": {
        "lily": {**TOKEN, "settle": {"start": 0.3, "end": 0.7}},
        "train": {**SCHEDULE, "evaluate_every": 2, "save_every": 1},
    },
    "lora": {"method": "lora", "train": {**SCHEDULE, "save_every": 3, "max_steps": 8, "early_stopping": 3}},
    "sft": {"train": {**SCHEDULE, "evaluate_every": 4, "save_every": "epoch"}},
}


def recipe_for(kind: str, model: Path, folder: Path, run: str) -> Any:
    table = [{**r, "question": f"question {r['text']}", "answer": ("no", "yes")[int(r["label"])]} for r in rows()]
    values = (sft if kind == "sft" else classification)(model, write_jsonl(folder / "t.jsonl", table), folder)
    return loader.load_recipe(write_recipe(folder, {**values, **KINDS[kind], "output": str(folder / run)}))


def forked(work: Callable[[], Any]) -> int:
    """The exit code of `work` in a process of its own, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            work()
        except SystemExit as end:
            code = int(end.code)
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Events:
    """Counts what a run does to the disk, and its steps, and calls `strike` before the n-th.

    A file of weights or states is half written at that moment.
    """

    def __init__(self, strike_at: int, strike: Callable[[], Any]) -> None:
        self.count, self.strike_at, self.strike = 0, strike_at, strike
        import peft.peft_model

        for place, name in [
            *((os, name) for name in ("replace", "fsync", "mkdir", "unlink", "rmdir")),
            (files, "_exchange"),
            (Resumable, "training_step"),
            (Resumable, "prediction_step"),
        ]:
            self.watch(place, name, half=False)
        for place, name in [(states, "save_file"), (peft.peft_model, "safe_save_file")]:
            self.watch(place, name, half=True)

    def watch(self, place: Any, name: str, half: bool) -> None:
        real = getattr(place, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.strike_at:
                if half:
                    real(*args, **kwargs)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                self.strike()
            return real(*args, **kwargs)

        setattr(place, name, counted)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def struck(recipe: Any, at: int, strike: Callable[[], Any], resume: bool = False) -> int:
    """Train in a process of its own with `strike` at one event; its exit code."""

    def work() -> None:
        Events(at, strike)
        train.train(recipe, quiet=True, resume=resume)

    return forked(work)


def goes_on(recipe: Any, output: Path) -> int:
    """Train on, in a process of its own; its exit code."""
    return forked(lambda: train.train(recipe, quiet=True, resume=(output / "recipe.yaml").is_file()))


def left(run: Path) -> dict[str, Any]:
    """What a finished run left: weights, evaluations and figures, times aside; every file's name."""
    found: dict[str, Any] = {"names": sorted(str(p.relative_to(run)) for p in run.rglob("*"))}
    for folder in (run, run / "lora"):
        if folder.is_dir():
            figures = json.loads((folder / "metrics.json").read_text())
            figures.pop("seconds")
            for values in figures["baselines"].values():
                values.pop("seconds")
            found[f"{folder.name} figures"] = figures
            found[f"{folder.name} progress"] = json.loads((folder / "progress.json").read_text())
            for name in ("best", "last"):
                found[f"{folder.name} {name}"] = (folder / name / "adapter_model.safetensors").read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory, encoder, chat_model):
    """Kind -> its recipes' folder and model, what an uninterrupted run leaves, and how many events it has."""
    torch.set_num_threads(1)
    known: dict[str, Any] = {}

    def of(kind: str) -> tuple[Path, Path, dict[str, Any], int]:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            model = chat_model if kind == "sft" else encoder
            recipe = recipe_for(kind, model, folder, "run")

            def work() -> None:
                events = Events(0, killed)
                train.train(recipe, quiet=True)
                (folder / "events").write_text(str(events.count))

            assert forked(work) == 0
            found = left(folder / "run")
            shutil.move(folder / "run", folder / "whole")
            known[kind] = folder, model, found, int((folder / "events").read_text())
        return known[kind]

    return of


def survives(whole: Any, kind: str, at: int, strike: Callable[[], Any], code: int) -> None:
    folder, model, expected, _ = whole(kind)
    shutil.rmtree(folder / "run", ignore_errors=True)
    recipe = recipe_for(kind, model, folder, "run")
    assert struck(recipe, at, strike) == code
    assert goes_on(recipe, folder / "run") == 0
    found = left(folder / "run")
    for name, value in expected.items():
        assert found[name] == value, f"{kind}, event {at}: {name}"
    tally("faults survived")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_killed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(whole, kind, share):
    survives(whole, kind, round(share * whole(kind)[3]), killed, -signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_may_be_killed_at_any_write_and_any_step(whole, kind):
    for at in range(1, whole(kind)[3] + 1):
        survives(whole, kind, at, killed, -signal.SIGKILL)
