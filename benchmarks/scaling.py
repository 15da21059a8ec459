"""Learning rate and scale together, for Lily and a LoRA of equal size on real tasks: to choose the defaults.

    LILY_DATA=../shared/data python benchmarks/scaling.py --out runs/scaling --jobs 2

Every setting of a task has the same rows in the same order, the same schedule, the same learning rate of the head and
(nearly) the same number of parameters. Values are those of the validation rows at the best evaluation, since settings
are what is chosen here. Runs that are there already are not repeated; `--jobs 0` trains nothing. Keeps the figures in
benchmarks/results/scaling.json, draws docs/figures/scaling.svg and writes the tables into docs/tune.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from grid import Setting, lora_rank, train
from performance import put

from lily.analysis.plots import settings_plot
from lily.analysis.scaling import Tried, by_product, near
from lily.recipes import loader
from lily.recipes.scoring import metrics

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
PICTURE = ROOT / "docs" / "figures" / "scaling.svg"
PAGE = ROOT / "docs" / "tune.md"
MARKER = "learning-rate"

# Both by fours, so that a product of the two is met several times.
RATES = (2.5e-4, 1e-3, 4e-3)
SCALES = (0.25, 1.0, 4.0)
TOLERANCE = 0.01  # of the metric: what counts as the same as the best

# Recipe -> what is cut, so that 18 runs of it take half an hour at most on two cores; and the seeds.
TASKS = {
    "sst2": (["data.max_train=1200", "train.epochs=2", "train.head_learning_rate=1e-3"], (0,)),
}  # fmt: skip


def settings(seeds: Sequence[int]) -> list[Setting]:
    return [
        Setting(contestant, rate, scale, seed=seed)
        for seed in seeds
        for contestant in ("Lily", "LoRA")
        for scale in SCALES
        for rate in RATES
    ]


def collect(name: str, out: Path, jobs: int) -> list[Tried]:
    """A task's settings with the mean over the finished seeds."""
    changes, seeds = TASKS[name]
    base = loader.load_recipe(name, changes)
    metric = metrics.metrics_of(base)[0]
    values: dict[tuple[str, float, float], list[float]] = {}
    for setting, at in train(base, lora_rank(base), settings(seeds), out / base.name, jobs).items():
        history = json.loads((at / "metrics.json").read_text())["history"]
        best = max(h[metric] for h in history)
        values.setdefault((setting.contestant, setting.rate, setting.scale), []).append(best)
    return [Tried(*key, fmean(own), len(own)) for key, own in values.items()]


def tables(found: dict[str, list[Tried]]) -> str:
    """The stored figures as Markdown: each method's best, the settings near it, and the best at each product."""
    head = "| task | method | best | at learning rate | and scale | settings within 1 point | at rate 1e-3, scale 1 |"
    lines = [head, "| --- | --- | --- | --- | --- | --- | --- |"]
    for task, tried in found.items():
        for contestant in ("Lily", "LoRA"):
            own = [t for t in tried if t.contestant == contestant]
            best = max(own, key=lambda t: t.quality)
            usual = next((f"{100 * t.quality:.1f}" for t in own if (t.rate, t.scale) == (1e-3, 1.0)), "-")
            wide = f"{len(near(own, TOLERANCE))} of {len(own)}"
            cells = [task, contestant, f"{100 * best.quality:.1f}", f"{best.rate:g}", f"{best.scale:g}", wide, usual]
            lines.append(f"| {' | '.join(cells)} |")
    products = sorted({p for tried in found.values() for p in by_product(tried)})
    lines += ["", f"| task | method | {' | '.join(f'{p:g}' for p in products)} |"]
    lines.append("|" + " --- |" * (len(products) + 2))
    for task, tried in found.items():
        for contestant in ("Lily", "LoRA"):
            own_products = by_product([t for t in tried if t.contestant == contestant])
            cells = [f"{100 * own_products[p].quality:.1f}" if p in own_products else "-" for p in products]
            lines.append(f"| {' | '.join([task, contestant, *cells])} |")
    return "\n".join(lines)


def kept() -> str:
    """The tables of the stored figures."""
    found = json.loads(RESULTS.read_text("utf-8"))
    return tables({name: [Tried(**one) for one in own] for name, own in found.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time.")
    options = parser.parse_args()
    found = {name.rpartition("/")[2]: collect(name, options.out, options.jobs) for name in TASKS}
    found = {name: tried for name, tried in found.items() if tried}
    if not found:
        raise SystemExit("no run is finished")
    RESULTS.write_text(json.dumps({n: [t.to_dict() for t in own] for n, own in found.items()}, indent=1) + "\n")
    percent = {n: [t.times(100) for t in own] for n, own in found.items()}
    settings_plot(percent, "accuracy on the validation rows (%)").save(PICTURE, overwrite=True)
    written = kept()
    put(PAGE, MARKER, written)
    print(written)


if __name__ == "__main__":
    main()
