"""Are the defaults for own data as good as a short search? `lily new` on seven data sets, with Lily and LoRA.

    LILY_DATA=../shared/data python benchmarks/defaults.py --out runs/defaults --jobs 2
    python benchmarks/defaults.py --pages          # the table of the committed figures

Each data set is written as a user would have it: a csv file, a folder of images, a jsonl file, with test rows beside
the training rows. `lily new` writes the recipe, and Lily and LoRA train it with the recipe's settings, and with half
and twice its learning rate. The best of the three by its validation rows (the short search) and the defaults train with
more seeds; the test rows compare the two. Finished runs are not repeated. Keeps the figures in
benchmarks/results/defaults.json and writes the table into docs/results.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structure_tasks as tasks
from performance import put

from lily.io.atomic import write_text
from lily.recipes import loader
from lily.recipes.data.guess import guess
from lily.recipes.data.sources import local_path
from lily.recipes.new import recipe_text
from lily.recipes.offline.standins import digits
from lily.recipes.scoring.metrics import LOWER_IS_BETTER, shown
from lily.search import folder
from lily.search.runner import Job, run, side_by_side

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "defaults.json"
PAGE = ROOT / "docs" / "results.md"
MARKER = "defaults"
METHODS = {"Lily": "lily", "LoRA": "lora"}
RATES = (1, 0.5, 2)  # times the recipe's learning rate
COLUMNS = ("data", "rows", "metric", "method", "parameters", "scale", "rate", "epochs", "default", "best of three",
           "its rate", "seeds", "p")  # fmt: skip


@dataclass(frozen=True)
class Own:
    """A data set as somebody has it.

    Attributes:
        kind: `texts`, `images` or `prompts`.
        source: key of `structure_tasks.TASKS`, or the name of images.
        rows: training rows; `lily new` takes validation rows from them.
        test: test rows.
        changes: of the recipe, so that a run takes minutes on one thread.
    """

    kind: str
    source: str
    rows: int
    test: int = 1000
    changes: tuple[str, ...] = ()


SETS = {
    "headlines-400": Own("texts", "headlines", 400),
    "digits-300": Own("images", "digits", 300, changes=("data.image.size=28",)),
    "sst2-300": Own("texts", "sst2", 300),
    "cifar10-300": Own("images", "cifar10", 300, changes=("data.image.size=42",)),
    "cola-1000": Own("texts", "cola", 1000),
    "chat-80": Own("prompts", "headlines", 80, 100, ("generation.samples=0",)),
    "headlines-2000": Own("texts", "headlines", 2000),
}


@dataclass(frozen=True)
class Trial:
    """A run: a method with the recipe's learning rate multiplied by a factor."""

    method: str
    rate: float = 1
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{METHODS[self.method]}-rate{self.rate:g}-{self.seed}"

    def changes(self, recipe: Any) -> list[str]:
        return [
            f"method={METHODS[self.method]}",
            f"train.learning_rate={self.rate * recipe.train.learning_rate:g}",
            f"seed={self.seed}",
            "baselines=[]",
        ]


def write(own: Own, at: Path) -> Path:
    """The data set as files; what `lily new` is given."""
    at.mkdir(parents=True, exist_ok=True)
    if own.kind == "images":
        return _images(own, at / "images")
    found = tasks.TASKS[own.source].rows(own.rows)
    for part, rows in (("train", found.train), ("test", found.test[: own.test])):
        if own.kind == "texts":
            with open(at / f"{part}.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("text", "label"), *((text, f"class {label}") for text, label in rows)])
        else:
            asked = ({"prompt": f"Is it sarcastic? {text}", "completion": ("no", "yes")[y]} for text, y in rows)
            write_text(at / f"{part}.jsonl", "".join(json.dumps(one) + "\n" for one in asked))
    return at / ("train.csv" if own.kind == "texts" else "train.jsonl")


def _images(own: Own, at: Path) -> Path:
    if own.source == "digits":
        files = sorted(digits().glob("*/*.png"))
    else:
        unpacked = at.parent / "cifar10"
        with tarfile.open(local_path("$LILY_DATA/cifar10/train_1000_per_class.tar.xz")) as archive:
            archive.extractall(unpacked, filter="data")
        files = sorted(file for file in unpacked.rglob("*") if file.is_file())
    random.Random(0).shuffle(files)
    for part, chosen in (("train", files[own.test :][: own.rows]), ("test", files[: own.test])):
        for file in chosen:
            link = at / part / file.parent.name / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(file)
    return at


def recipe_of(name: str, out: Path) -> Path:
    """The recipe that `lily new` writes for a data set."""
    at = out / name
    written = at / f"{name}.yaml"
    if not written.is_file():
        write_text(written, recipe_text(guess(write(SETS[name], at / "data")), name))
    return written


def train(name: str, trials: Iterable[Trial], out: Path, jobs: int) -> dict[Trial, dict[str, Any]]:
    """The figures of trials, after training those that are missing; one that fails has none."""
    written = recipe_of(name, out)
    changes = SETS[name].changes
    base = loader.load_recipe(str(written), changes)
    runs = {}
    for trial in trials:
        recipe = loader.load_recipe(str(written), [*changes, *trial.changes(base)])
        at = out / name / "search" / "runs" / trial.name
        runs[trial] = Job(trial.name, folder.inside(recipe, at), at)
    count, threads = side_by_side(jobs)
    with folder.opened(out / name / "search", "benchmarks/defaults.py", ("runs", "recipes", "logs")) as lock:
        run(list(runs.values()), out / name / "search", count, threads, lock, partial(print, flush=True))
    return {
        trial: json.loads((job.folder / "metrics.json").read_text("utf-8")) for trial, job in runs.items() if job.done
    }


def study(name: str, out: Path, jobs: int, seeds: int) -> dict[str, Any]:
    """A data set's figures: for each method the defaults, and the settings that the search chose."""
    own = SETS[name]
    first = [Trial(method, rate) for method in METHODS for rate in RATES]
    found = train(name, first, out, jobs)
    chosen = {}
    for method in METHODS:
        mine = {trial: figures for trial, figures in found.items() if trial.method == method}
        chosen[method] = max(mine, key=lambda trial: validation(mine[trial]))
    compared = {
        (method, which): [Trial(method, trial.rate, seed) for seed in range(seeds)]
        for method in METHODS
        for which, trial in (("default", Trial(method)), ("search", chosen[method]))
    }
    found |= train(name, dict.fromkeys(trial for trials in compared.values() for trial in trials), out, jobs)
    some = next(iter(found.values()))
    metric = some["metric"]
    base = loader.load_recipe(str(recipe_of(name, out)), own.changes)
    return {
        "metric": metric, "rows": some["rows"], "device": some["device"],
        "learning_rate": base.train.learning_rate, "epochs": base.train.epochs,
        "trials": {trial.name: {"validation": validation(figures)[0], "test": figures["final"][metric]}
                   for trial, figures in found.items()},
        "methods": {
            method: {
                "parameters": found[Trial(method)]["parameters"]["adapter"],
                "scale": scale(found[Trial(method)]),
                "chosen": chosen[method].rate,
                **{which: [found[trial]["final"][metric] for trial in compared[method, which]]
                   for which in ("default", "search")},
            }
            for method in METHODS
        },
    }  # fmt: skip


def validation(figures: dict[str, Any]) -> tuple[float, float]:
    """What a search chooses by, larger is better: the main metric on the validation rows, and minus the loss there."""
    value = figures["best"]["value"]
    losses = [one["loss"] for one in figures["history"] if "loss" in one]
    return (-value if figures["metric"] in LOWER_IS_BETTER else value), -min(losses, default=0.0)


def scale(figures: dict[str, Any]) -> float:
    """What multiplies the method's update."""
    adapter = figures["adapter"]
    return float(adapter["scaling"] if "scaling" in adapter else adapter["lora_alpha"] / adapter["r"])


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    from scipy.stats import ttest_rel

    lines = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
    for name, one in found.items():
        for method, mine in one["methods"].items():
            p = "-"
            if len(mine["default"]) > 1 and mine["default"] != mine["search"]:
                p = f"{ttest_rel(mine['default'], mine['search']).pvalue:.2g}"
            cells = [
                name, f"{one['rows']['train']:,}", one["metric"], method, f"{mine['parameters']:,}",
                f"{mine['scale']:.3g}", f"{one['learning_rate']:g}", f"{one['epochs']:g}",
                _spread(one, mine["default"]), _spread(one, mine["search"]),
                f"{one['learning_rate'] * mine['chosen']:g}", str(len(mine["default"])), p,
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(one: dict[str, Any], values: list[float]) -> str:
    more = f" ± {shown(one['metric'], statistics.stdev(values))}" if len(values) > 1 else ""
    return shown(one["metric"], statistics.fmean(values)) + more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", type=int, default=3, help="That compare; the search has the first alone.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time.")
    parser.add_argument("--pages", action="store_true", help="Train nothing; print and write the table.")
    given = parser.parse_args()
    found = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    for name in [] if given.pages else given.sets:
        found[name] = study(name, given.out.resolve(), given.jobs, given.seeds)
        ordered = {name: found[name] for name in SETS if name in found}
        write_text(RESULTS, json.dumps(ordered, indent=1) + "\n")
    written = table(found)
    put(PAGE, MARKER, written)
    print(written)


if __name__ == "__main__":
    main()
