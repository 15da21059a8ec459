"""The offline recipes: the untrained model, LoRA and Lily at equal parameters, at equal rates and default scales.

    LILY_DATA=../shared/data python benchmarks/offline.py --out runs/offline

Trains what is not there yet (`lily compare`, so it may be killed and goes on), keeps the figures in
benchmarks/results/offline.json, and writes the table into docs/results.md. `--pages` trains nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from performance import put

from lily.compare.result import Comparison
from lily.compare.tables import summary

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "offline.json"
PAGE = ROOT / "docs" / "results.md"
MARKER = "offline"
METHODS = ("lily", "lora")
SEEDS = 3

# Recipe -> what is cut, so that six runs of it take half an hour on one core at most.
RECIPES = {
    "sst2": ["data.max_train=3000", "train.epochs=2"],
    "offline/cifar10": [],
    "offline/vtab-cifar10": [],
}


def train(out: Path, jobs: int) -> None:
    """Run the comparisons into `out`."""
    for recipe, changes in RECIPES.items():
        command = [sys.executable, "-m", "lily", "compare", recipe, *changes, "--methods", ",".join(METHODS)]
        subprocess.run([*command, "--seeds", str(SEEDS), "--jobs", str(jobs), "--output", str(out)], check=True)


def collect(out: Path) -> None:
    """Store the results of the comparisons."""
    found = {}
    for recipe in RECIPES:
        file = out / recipe.rpartition("/")[2] / "comparison.json"
        if file.is_file():
            found[recipe] = json.loads(file.read_text("utf-8"))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def kept() -> str:
    """The stored figures as Markdown."""
    return summary([Comparison.from_dict(values) for values in json.loads(RESULTS.read_text("utf-8")).values()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/offline"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--collect", action="store_true", help="only keep what is there, and write the page")
    parser.add_argument("--pages", action="store_true", help="only write the page")
    options = parser.parse_args()
    if not options.pages:
        if not options.collect:
            train(options.out, options.jobs)
        collect(options.out)
    written = kept()
    put(PAGE, MARKER, written)
    print(written)


if __name__ == "__main__":
    main()
