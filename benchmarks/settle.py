"""What becoming static costs on real tasks: never, by collapse, from the start, by settling. Prints Markdown.

    LILY_DATA=../shared/data python benchmarks/settle.py --out runs/settle

The recipes ship and are cut to what two cores do in minutes. `collapsed` is the run that never settles, collapsed over
256 training rows; its drift is the KL divergence per held-out output. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

# Recipe -> what is cut.
TASKS = {
    "cola": [],
    "sst2": ["data.max_train=3000", "train.epochs=2"],
    "rte": ["train.epochs=2", "train.batch_size=32", "data.max_length=96", "train.learning_rate=5e-4"],
    "quickstart-routed": ["data.max_train=3000", "train.learning_rate=1e-3", "baselines=[]"],
}
WAYS = {
    "sequence": ["lily.routing=sequence"],
    "static": ["lily.routing=static"],
    "settled": ["lily.settle={start: 0.6, end: 0.8}"],
}
SEEDS = range(3)


def folder_of(task: str, way: str, seed: int, out: Path) -> Path:
    """Where a run is."""
    return out / f"{task}-{way}-{seed}"


def finished(task: str, way: str, seed: int, out: Path) -> bool:
    """Whether a run is finished."""
    return (folder_of(task, way, seed, out) / "metrics.json").is_file()


def run(task: str, way: str, seed: int, out: Path) -> dict[str, Any]:
    """The figures of one run, trained now if it is missing."""
    folder = folder_of(task, way, seed, out)
    if not finished(task, way, seed, out):
        command = [sys.executable, "-m", "lily", "train", task, *TASKS[task], *WAYS[way], f"seed={seed}"]
        subprocess.run([*command, "--output", str(folder), "--overwrite", "--quiet"], check=True)
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text("utf-8"))
    return found


def collapsed(task: str, seed: int, out: Path, refit_steps: int = 0) -> dict[str, Any]:
    """The report of collapsing the run that never settles, made now if it is missing."""
    from lily.recipes.deploy import collapse_adapter

    source = folder_of(task, "sequence", seed, out)
    folder = source.with_name(f"{source.name}-collapsed{f'-refit{refit_steps}' if refit_steps else ''}")
    if not (folder / "collapse.json").is_file():
        collapse_adapter(str(source), str(folder), refit_steps=refit_steps)
    report: dict[str, Any] = json.loads((folder / "collapse.json").read_text("utf-8"))
    return report


def shown(values: list[float]) -> str:
    """Mean and standard deviation, in percent."""
    spread = f" +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/settle"))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--refit-steps", type=int, default=0)
    parser.add_argument("--only-done", action="store_true", help="Use the seeds that are complete, train nothing.")
    options = parser.parse_args()
    print("| task | metric | never | collapsed | its drift (KL) | static from the start | settled | seeds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for task in options.tasks:
        seeds = [s for s in SEEDS if not options.only_done or all(finished(task, way, s, options.out) for way in WAYS)]
        if not seeds:
            continue
        found = {way: [run(task, way, seed, options.out) for seed in seeds] for way in WAYS}
        metric = found["static"][0]["metric"]
        never, static, settled = ([r["final"][metric] for r in found[way]] for way in WAYS)
        reports = [collapsed(task, seed, options.out, options.refit_steps) for seed in seeds]
        after = [r["metrics"]["after"][metric] for r in reports]
        drift = statistics.mean(r["drift"]["kl"] for r in reports)
        print(
            f"| {task} | {metric} | {shown(never)} | {shown(after)} | {drift:.2g} | {shown(static)} | {shown(settled)} "
            f"| {len(seeds)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
