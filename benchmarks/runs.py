"""Training runs of the real-task benchmarks: each is trained once."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

# Recipes that ship, cut to what two cores do in minutes. Learning rates were chosen for both methods alike, with
# seed 0: CoLA's are the recipe's; on RTE 5e-4 was the better of 5e-4 and 1e-3 for both.
TASKS = {
    "cola": [],
    "sst2": ["data.max_train=3000", "train.epochs=2"],
    "rte": ["train.epochs=2", "train.batch_size=32", "data.max_length=96", "train.learning_rate=5e-4"],
    "boolq": ["data.max_train=320", "data.max_validation=100", "generation.samples=0"],
    "quickstart-routed": ["data.max_train=3000", "train.learning_rate=1e-3", "baselines=[]"],
}

Run = dict[str, Any]


def changes(task: str, contestant: str) -> list[str]:
    """The overrides for LoRA, for a routing, or for `settled` from the task's default routing."""
    if contestant == "LoRA":
        return ["method=lora"]
    if contestant == "settled":
        return [f"lily.routing={default_routing(task)}", "lily.settle={start: 0.6, end: 0.8}"]
    return [f"lily.routing={contestant}"]


def default_routing(task: str) -> str:
    """The routing of a recipe that names none."""
    return "token" if task == "boolq" else "sequence"


def is_done(task: str, contestant: str, seed: int, out: Path) -> bool:
    """Whether a run is finished."""
    return (out / f"{task}-{contestant}-{seed}" / "metrics.json").is_file()


def run(task: str, contestant: str, seed: int, out: Path) -> Run | None:
    """The figures of one run, trained now if it is missing; None if it failed."""
    folder = out / f"{task}-{contestant}-{seed}"
    if not is_done(task, contestant, seed, out):
        command = [sys.executable, "-m", "lily", "train", task, *TASKS[task], *changes(task, contestant)]
        command += [f"seed={seed}", "--output", str(folder), "--overwrite", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{folder.name}: {done.stderr.splitlines()[-1]}", file=sys.stderr)
            return None
    found: Run = json.loads((folder / "metrics.json").read_text())
    return found


def shown(values: list[float]) -> str:
    """Mean and standard deviation, in percent."""
    spread = f" +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"
