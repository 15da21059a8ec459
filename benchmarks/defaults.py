"""Are the defaults for own data as good as a short search? `lily new` on seven data sets, with Lily and LoRA.

    LILY_DATA=../shared/data python benchmarks/defaults.py --out runs/defaults --jobs 2
    python benchmarks/defaults.py --pages          # the table of the committed figures

Each data set is written as a user would have it: a csv file, a folder of images, a jsonl file, with test rows beside
the training rows. `lily new` writes the recipe, and Lily and LoRA train it at three learning rates, of which one is the
recipe's. It and the best by the validation rows (the short search) train with more seeds. Every run has a row in
benchmarks/results/defaults.jsonl and is not repeated. Writes the table into docs/results.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structure_tasks as tasks
from grid import run_all
from performance import put

from lily.io.atomic import write_text
from lily.recipes import loader
from lily.recipes.data.guess import guess
from lily.recipes.data.sources import local_path
from lily.recipes.new import recipe_text
from lily.recipes.offline.standins import digits
from lily.recipes.scoring.metrics import LOWER_IS_BETTER, shown
from lily.search import folder
from lily.search.runner import Job

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "defaults.jsonl"
PAGE = ROOT / "docs" / "results.md"
MARKER = "defaults"
METHODS = {"Lily": "lily", "LoRA": "lora"}
RATES = {"texts": (7e-4, 1e-3, 1.4e-3), "images": (5e-4, 1e-3, 2e-3), "prompts": (5e-4, 1e-3, 2e-3)}
COLUMNS = ("data", "rows", "metric", "method", "parameters", "scale")

Row = dict[str, Any]


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
    """A run: a method at a learning rate."""

    method: str
    rate: float
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{METHODS[self.method]}-rate{self.rate:g}-{self.seed}"

    @property
    def changes(self) -> list[str]:
        """Of the recipe."""
        rate = f"train.learning_rate={self.rate:g}"
        return [f"method={METHODS[self.method]}", rate, f"seed={self.seed}", "baselines=[]"]


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


def train(name: str, trials: Iterable[Trial], out: Path, jobs: int) -> None:
    """Train the trials that have no row, and append their rows; one that fails has none."""
    known = {trial for found, trial in stored() if found == name}
    written = recipe_of(name, out)
    changes = SETS[name].changes
    runs = {}
    for trial in (one for one in dict.fromkeys(trials) if one not in known):
        recipe = loader.load_recipe(str(written), [*changes, *trial.changes])
        at = out / name / "search" / "runs" / trial.name
        runs[trial] = Job(trial.name, folder.inside(recipe, at), at)
    if not runs:
        return
    run_all(list(runs.values()), out / name / "search", jobs)
    with ROWS.open("a", encoding="utf-8") as file:
        for trial in (trial for trial, job in runs.items() if job.done):
            figures = json.loads((runs[trial].folder / "metrics.json").read_text("utf-8"))
            file.write(json.dumps({"set": name, **asdict(trial)} | row(figures, runs[trial].recipe)) + "\n")


def row(figures: dict[str, Any], recipe: Any) -> dict[str, Any]:
    """What is kept of a run."""
    metric, adapter = figures["metric"], figures["adapter"]
    return {
        "epochs": recipe.train.epochs, "batch": recipe.train.batch_size,
        "rows": figures["rows"], "metric": metric, "validation": figures["best"]["value"],
        "best_epoch": figures["best"]["epoch"],
        "test": figures["final"][metric], "parameters": figures["parameters"]["adapter"],
        "scale": adapter["scaling"] if "scaling" in adapter else adapter["lora_alpha"] / adapter["r"],
        "seconds": round(figures["seconds"]["train"]), "device": figures["device"],
    }  # fmt: skip


def stored() -> dict[tuple[str, Trial], Row]:
    """The committed rows."""
    found = {}
    for line in ROWS.read_text("utf-8").splitlines() if ROWS.is_file() else []:
        one = json.loads(line)
        found[one.pop("set"), Trial(one.pop("method"), one.pop("rate"), one.pop("seed"))] = one
    return found


def chosen(rows: dict[tuple[str, Trial], Row], name: str, method: str) -> float:
    """The best rate by the validation rows of seed 0: of several the lowest."""
    mine = {trial.rate: one for (of, trial), one in rows.items() if (of, trial.method, trial.seed) == (name, method, 0)}
    return max(
        sorted(mine), key=lambda rate: mine[rate]["validation"] * (-1 if mine[rate]["metric"] in LOWER_IS_BETTER else 1)
    )


def study(name: str, out: Path, jobs: int, seeds: int) -> None:
    """Train the search of a data set, then what compares."""
    train(name, [Trial(method, rate) for method in METHODS for rate in RATES[SETS[name].kind]], out, jobs)
    default = loader.load_recipe(str(recipe_of(name, out))).train.learning_rate
    rates = {method: {default, chosen(stored(), name, method)} for method in METHODS}
    train(name, [Trial(m, rate, seed) for m in METHODS for rate in rates[m] for seed in range(seeds)], out, jobs)


def table(rows: dict[tuple[str, Trial], Row]) -> str:
    """The rows as Markdown."""
    rates = sorted({trial.rate for _, trial in rows})
    head = [*COLUMNS, *(f"{rate:.1e}" for rate in rates), "chosen", "seeds"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for name, method in dict.fromkeys(
        (name, method) for name in SETS for of, trial in rows if of == name for method in METHODS
    ):
        mine = {trial: one for (of, trial), one in rows.items() if (of, trial.method) == (name, method)}
        some = next(iter(mine.values()))
        by_rate = {rate: [one["test"] for trial, one in mine.items() if trial.rate == rate] for rate in rates}
        cells = [
            name, f"{some['rows']['train']:,}", some["metric"], method, f"{some['parameters']:,}",
            f"{some['scale']:.3g}",
            *(_spread(some["metric"], by_rate[rate]) if by_rate[rate] else "" for rate in rates),
            f"{chosen(rows, name, method):g}", str(max(map(len, by_rate.values()))),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(metric: str, values: list[float]) -> str:
    more = f" ± {shown(metric, statistics.stdev(values))}" if len(values) > 1 else ""
    return shown(metric, statistics.fmean(values)) + more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", type=int, default=3, help="That compare; the search has the first alone.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time.")
    parser.add_argument("--pages", action="store_true", help="Train nothing; print and write the table.")
    given = parser.parse_args()
    for name in [] if given.pages else given.sets:
        study(name, given.out.resolve(), given.jobs, given.seeds)
    written = table(stored())
    put(PAGE, MARKER, written)
    print(written)


if __name__ == "__main__":
    main()
