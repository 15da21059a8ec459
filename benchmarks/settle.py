"""What becoming static costs on real tasks: never, by collapse, from the start, by settling. Prints Markdown.

    LILY_DATA=../shared/data python benchmarks/settle.py --out runs/tasks

Uses the same runs as benchmarks/tasks.py. `collapsed` is the run that never settles, collapsed over 256 training rows;
its drift is the KL divergence per held-out output.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from runs import TASKS, default_routing, is_done, run, shown

SEEDS = range(3)


def collapsed(task: str, seed: int, out: Path, refit_steps: int = 0) -> dict[str, Any]:
    """The report of collapsing the run that never settles, made now if it is missing."""
    from lily.recipes.deploy import collapse_adapter

    source = out / f"{task}-{default_routing(task)}-{seed}"
    folder = source.with_name(f"{source.name}-collapsed{f'-refit{refit_steps}' if refit_steps else ''}")
    if not (folder / "collapse.json").is_file():
        collapse_adapter(str(source), str(folder), refit_steps=refit_steps)
    report: dict[str, Any] = json.loads((folder / "collapse.json").read_text())
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--tasks", nargs="*", default=["cola", "sst2", "rte", "quickstart-routed"], choices=list(TASKS))
    parser.add_argument("--refit-steps", type=int, default=0)
    parser.add_argument("--only-done", action="store_true", help="Use the seeds that are complete, train nothing.")
    options = parser.parse_args()
    print("| task | metric | never | collapsed | its drift (KL) | static from the start | settled | seeds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for task in options.tasks:
        names = (default_routing(task), "static", "settled")
        seeds = [
            s for s in SEEDS if not options.only_done or all(is_done(task, name, s, options.out) for name in names)
        ]
        if not seeds:
            continue
        found = {name: [run(task, name, seed, options.out) for seed in seeds] for name in names}
        metric = found["static"][0]["metric"]
        never, static, settled = ([r["final"][metric] for r in found[name]] for name in names)
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
