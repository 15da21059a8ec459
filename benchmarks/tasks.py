"""Lily per routing against LoRA at equal parameters on real tasks, from the recipes that ship. Prints Markdown.

    LILY_DATA=../shared/data python benchmarks/tasks.py --out runs/tasks

Every contestant of a task has the same rows and schedule (benchmarks/runs.py). Runs that are already there are not
repeated, so an interrupted comparison goes on where it stopped; `--only-done` trains nothing.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from runs import Run, is_done, run, shown

CONTESTANTS = ("LoRA", "sequence", "token", "static", "uniform", "batch")
SEEDS = {"cola": 2, "rte": 2, "sst2": 1, "boolq": 1}


def row(task: str, name: str, runs: list[Run]) -> str:
    metric = str(runs[0]["metric"])
    before = 100 * statistics.mean(r["before"][metric] for r in runs)
    title = name if name == "LoRA" else f"Lily {name}"
    return (
        f"| {task} | {title} | {metric} | {before:.1f} | {shown([r['final'][metric] for r in runs])} | {len(runs)} "
        f"| {runs[0]['parameters']['adapter']:,} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--tasks", nargs="*", default=list(SEEDS), choices=list(SEEDS))
    parser.add_argument("--only-done", action="store_true", help="Print what is there, train nothing.")
    options = parser.parse_args()
    print("| task | method | metric | before | best | seeds | parameters |", flush=True)
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for task in options.tasks:
        for name in CONTESTANTS:
            seeds = list(range(SEEDS[task]))
            if options.only_done:
                seeds = [s for s in seeds if is_done(task, name, s, options.out)]
            runs = [run(task, name, seed, options.out) for seed in seeds]
            if complete := [r for r in runs if r is not None]:
                print(row(task, name, complete), flush=True)


if __name__ == "__main__":
    main()
