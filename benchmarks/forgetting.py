"""Task quality against forgetting over scaling and learning rate, for Lily, LoRA, and rules that might move Lily's.

    python benchmarks/forgetting.py --out runs/forgetting --jobs 2

Keeps the figures in benchmarks/results/forgetting.json, draws docs/figures/forgetting.svg and writes the tables into
docs/tune.md.

Every contestant has the same rows, schedule and number of parameters. Quality and forgetting are those of the
validation rows and of the recipe's general text, at every evaluation of every run, so what a run would have been had
it been stopped early counts too. Three rules need more than that:

- *weight decay*: of AdamW, on all of the adapter. It is scaled by the learning rate, so it has to be large to act in a
  few steps.
- *dropout*: on the adapter's input.
- *shrunk*: the finished adapter with its scaling (LoRA: alpha) multiplied by a factor; nothing is trained. Of every run
  that forgot more than the first limit.

Runs that are there already are not repeated, so the same command goes on after anything that ended it; `--jobs 0`
trains nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grid import Setting, lora_rank, train
from performance import put

from lily.analysis.forgetting import Outcome, best_within, by_contestant, frontier, moved
from lily.analysis.plots import forgetting_plot
from lily.io.atomic import write_text
from lily.recipes import loader
from lily.recipes.scoring.metrics import LOWER_IS_BETTER, shown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "forgetting.json"
PICTURE = ROOT / "docs" / "figures" / "forgetting.svg"
PAGE = ROOT / "docs" / "tune.md"
MARKER = "forgetting"

# What two cores do in half an hour: ten steps of 8 rows.
CHANGES = ["data.max_train=80", "train.batch_size=8", "data.max_validation=48", "train.evaluate_every=5",
           "train.epochs=1", "metrics=[loss]", "generation.samples=0"]  # fmt: skip
RATES = (1e-3, 4e-3)
SCALES = (0.5, 2.0)
DECAYS = (10.0,)
DROPOUTS = (0.1,)
FACTORS = (0.5, 0.75)
LIMITS = (0.01, 0.03, 0.1, 0.3)
DRAWN = {1: 1.0, 100: 0.2}  # unit -> how far behind the best a setting is still drawn


def settings() -> list[Setting]:
    grid = [(rate, scale) for scale in SCALES for rate in RATES]
    middle = [(RATES[0], SCALES[1])]
    return [
        *(Setting("Lily", *at) for at in grid),
        *(Setting("LoRA", *at) for at in grid),
        *(Setting("Lily, weight decay", *at, decay=decay) for decay in DECAYS for at in middle),
        *(Setting("Lily, dropout", *at, dropout=dropout) for dropout in DROPOUTS for at in middle),
    ]


def quality(metric: str, values: dict[str, Any]) -> float:
    """The quality, larger is better: a loss is negated."""
    return float(-values[metric] if metric in LOWER_IS_BETTER else values[metric])


def told(metric: str, found: float) -> str:
    """A quality in the metric's usual sign and unit."""
    return shown(metric, -found if metric in LOWER_IS_BETTER else found)


def outcomes_of(setting: Setting, run_folder: Path, metric: str) -> list[Outcome]:
    """Quality and forgetting of a run at each evaluation."""
    found = json.loads((run_folder / "metrics.json").read_text())
    before = found["forgetting"]["before"]
    with_ = {
        "learning_rate": setting.rate,
        "scale": setting.scale,
        "weight_decay": setting.decay,
        "dropout": setting.dropout,
    }
    return [
        Outcome(setting.contestant, quality(metric, h), h["general_loss"] - before, {**with_, "step": h["step"]})
        for h in found["history"]
    ]


def shrunk(setting: Setting, run_folder: Path, factor: float, metric: str) -> Outcome:
    """The best adapter of a run with its update multiplied by a factor."""
    kept = run_folder.parent / "shrunk" / f"{run_folder.name}-{factor:g}.json"
    if not kept.is_file():
        from lily.recipes.results.adapter import Adapter
        from lily.recipes.scoring import evaluate, forgetting

        copy = kept.with_suffix("")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run_folder / "best", copy)
        config = json.loads((copy / "adapter_config.json").read_text())
        option = "lora_alpha" if setting.contestant == "LoRA" else "scaling"
        config[option] *= factor
        (copy / "adapter_config.json").write_text(json.dumps(config))
        used = Adapter(str(copy), str(run_folder / "recipe.yaml"))
        values = used.evaluate("validation")
        general = forgetting.general_text(used.recipe, used.tokenizer)
        values["general_loss"] = evaluate.token_loss(used.model, general, used.recipe, used.tokenizer)
        write_text(kept, json.dumps(values))
        shutil.rmtree(copy)
    values = json.loads(kept.read_text())
    before = json.loads((run_folder / "metrics.json").read_text())["forgetting"]["before"]
    with_ = {"learning_rate": setting.rate, "scale": setting.scale, "factor": factor}
    name = f"{setting.contestant}, shrunk"
    return Outcome(name, quality(metric, values), values["general_loss"] - before, with_)


def tables(found: Sequence[Outcome], metric: str) -> str:
    """The best of each method within each limit, and what the rules add, as Markdown."""
    limits = " | ".join(f"within {limit:g}" for limit in LIMITS)
    lines = [f"| | {limits} | best | its forgetting |", "|" + " --- |" * (len(LIMITS) + 3)]
    groups = by_contestant(found)
    for name, own in groups.items():
        cells = [told(metric, one.quality) if (one := best_within(own, limit)) else "-" for limit in LIMITS]
        best = frontier(own)[-1]
        lines.append(f"| {name} | {' | '.join(cells)} | {told(metric, best.quality)} | {best.forgetting:+.3f} |")
    lines += ["", f"| what a rule adds | {limits} |", "|" + " --- |" * (len(LIMITS) + 1)]
    for name, own in groups.items():
        alone, _, rule = name.partition(", ")
        if rule:
            gains = moved([*groups[alone], *own], groups[alone], LIMITS).values()
            cells = ["-" if gain is None else f"{unit(metric) * gain:+.3g}" for gain in gains]
            lines.append(f"| {alone}: {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def unit(metric: str) -> int:
    """Losses are in nats, other metrics in percent."""
    return 1 if metric in LOWER_IS_BETTER else 100


def kept() -> str:
    """The tables of the stored figures."""
    found = json.loads(RESULTS.read_text("utf-8"))
    return tables([Outcome(**one) for one in found["outcomes"]], found["metric"])


def draw(found: Sequence[Outcome], metric: str) -> None:
    """The relevant part of the plane: within the last limit, and not far behind the best."""
    far = max(o.quality for o in found) - DRAWN[unit(metric)]
    near = [
        Outcome(o.contestant, unit(metric) * o.quality, o.forgetting)
        for o in found
        if o.quality > far and o.forgetting <= LIMITS[-1]
    ]
    axis = "minus the loss (nats per token)" if unit(metric) == 1 else f"{metric} (%)"
    forgetting_plot(near, f"{axis} on the validation rows").save(PICTURE, overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="chat")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="Changes of the recipe, for all.")
    parser.add_argument("--metric", default="loss", help="One of the recipe's.")
    parser.add_argument("--out", type=Path, default=Path("runs/forgetting"))
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time.")
    options = parser.parse_args()
    base = loader.load_recipe(options.recipe, [*CHANGES, *options.set])
    rank = lora_rank(base)
    done = train(base, rank, settings(), options.out, options.jobs)
    found = [o for s, at in done.items() for o in outcomes_of(s, at, options.metric)]
    if not found:
        raise SystemExit("no run is finished")
    for setting, at in done.items():
        last = outcomes_of(setting, at, options.metric)[-1]
        if setting.contestant in ("Lily", "LoRA") and last.forgetting > LIMITS[0]:
            found += [shrunk(setting, at, factor, options.metric) for factor in FACTORS]
    about = {"recipe": base.name, "changes": CHANGES, "metric": options.metric, "rank": rank,
             "outcomes": [o.to_dict() for o in found]}  # fmt: skip
    write_text(RESULTS, json.dumps(about, indent=1) + "\n")
    draw(found, options.metric)
    written = kept()
    put(PAGE, MARKER, written)
    print(written)


if __name__ == "__main__":
    main()
