"""Lily per routing against LoRA at equal parameters on real tasks, from the recipes that ship. Prints Markdown.

    LILY_DATA=../shared/data python benchmarks/tasks.py --out runs/tasks

Every contestant has the same rows, schedule and learning rate; the subsets below keep a run short on two cores. Runs
that are already there are not repeated, so an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROUTINGS = ("token", "sequence", "batch", "static", "uniform")
CONTESTANTS = {**{f"Lily {r}": [f"lily.routing={r}"] for r in ROUTINGS}, "LoRA": ["method=lora"]}
TASKS = {
    "cola": (2, ["data.max_train=3000", "train.epochs=2"]),
    "rte": (2, ["train.epochs=2", "train.batch_size=32", "data.max_length=96"]),
    "sst2": (1, ["data.max_train=3000", "train.epochs=1"]),
    "boolq": (1, ["data.max_train=240", "data.max_validation=100", "generation.samples=0"]),
}


def run(task: str, contestant: str, seed: int, changes: list[str], out: Path) -> dict[str, object] | None:
    folder = out / f"{task}-{contestant.replace(' ', '-')}-{seed}"
    if not (folder / "metrics.json").is_file():
        command = [sys.executable, "-m", "lily", "train", task, *changes, *CONTESTANTS[contestant], f"seed={seed}"]
        command += ["--output", str(folder), "--overwrite", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{folder.name}: {done.stderr.splitlines()[-1]}", file=sys.stderr)
            return None
    found: dict[str, object] = json.loads((folder / "metrics.json").read_text())
    return found


def row(task: str, name: str, runs: list[dict[str, object]]) -> str:
    metric = str(runs[0]["metric"])
    values = [100 * r["final"][metric] for r in runs]  # type: ignore[index]
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    before = 100 * statistics.mean(r["before"][metric] for r in runs)  # type: ignore[index]
    parameters = runs[0]["parameters"]["adapter"]  # type: ignore[index]
    seconds = statistics.mean(r["seconds"]["train"] for r in runs)  # type: ignore[index]
    return (
        f"| {task} | {name} | {metric} | {before:.1f} | {statistics.mean(values):.1f}{spread} | {len(runs)} "
        f"| {parameters:,} | {seconds:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    options = parser.parse_args()
    print("| task | method | metric | before | best | seeds | parameters | train s |", flush=True)
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for task in options.tasks:
        seeds, changes = TASKS[task]
        for contestant in CONTESTANTS:
            runs = [run(task, contestant, seed, changes, options.out) for seed in range(seeds)]
            if complete := [r for r in runs if r is not None]:
                print(row(task, contestant, complete), flush=True)


if __name__ == "__main__":
    main()
