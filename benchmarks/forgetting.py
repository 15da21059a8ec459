"""Task quality against forgetting over scaling and learning rate, for Lily, LoRA, and rules that might move Lily's.

Prints Markdown, writes JSON and a plot.

    python benchmarks/forgetting.py --out runs/forgetting --data benchmarks/results/forgetting.json

Every contestant has the same rows, schedule and number of parameters. Quality and forgetting are those of the
validation rows and of the recipe's general text, at every evaluation of every run, so what a run would have been had
it been stopped early counts too. Three rules need more than that:

- *weight decay*: of AdamW, on all of the adapter. It is scaled by the learning rate, so it has to be large to act in a
  few steps.
- *dropout*: on the adapter's input.
- *shrunk*: the finished adapter with its scaling (LoRA: alpha) multiplied by a factor; nothing is trained.

Runs that are there already are not repeated, so the same command goes on after anything that ended it; `--jobs 0`
trains nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from grid import Setting, lora_rank, train

from lily.analysis.forgetting import Outcome, best_within, by_contestant, frontier, moved
from lily.analysis.plots import forgetting_plot
from lily.files import write_text
from lily.recipes import loader

# What two cores do in some minutes a run. The last of two equal metrics is the one that is drawn.
CHANGES = ["data.max_train=640", "data.max_validation=200", "train.evaluate_every=10", "train.epochs=1",
           "metrics=[loss, exact_match]", "generation.samples=0"]  # fmt: skip
RATES = (3e-4, 1e-3, 3e-3)
SCALES = (0.5, 2.0, 8.0)
DECAYS = (1.0, 10.0)
DROPOUTS = (0.1,)
FACTORS = (0.25, 0.5, 0.75)
LIMITS = (0.01, 0.03, 0.1, 0.3)


def settings() -> list[Setting]:
    grid = [(rate, scale) for scale in SCALES for rate in RATES]
    middle = [(rate, SCALES[1]) for rate in RATES[1:]]
    return [
        *(Setting("Lily", *at) for at in grid),
        *(Setting("LoRA", *at) for at in grid),
        *(Setting("Lily, weight decay", *at, decay=decay) for decay in DECAYS for at in middle),
        *(Setting("Lily, dropout", *at, dropout=dropout) for dropout in DROPOUTS for at in middle),
    ]


def outcomes_of(setting: Setting, run_folder: Path, metric: str) -> list[Outcome]:
    """What a run was at each of its evaluations."""
    found = json.loads((run_folder / "metrics.json").read_text())
    before = found["forgetting"]["before"]
    told = {
        "learning_rate": setting.rate,
        "scale": setting.scale,
        "weight_decay": setting.decay,
        "dropout": setting.dropout,
    }
    return [
        Outcome(setting.contestant, h[metric], h["general_loss"] - before, {**told, "step": h["step"]})
        for h in found["history"]
    ]


def shrunk(setting: Setting, run_folder: Path, factor: float, metric: str) -> Outcome:
    """The best adapter of a run with its update multiplied by a factor."""
    kept = run_folder.parent / "shrunk" / f"{run_folder.name}-{factor:g}.json"
    if not kept.is_file():
        from lily.recipes import evaluate, forgetting
        from lily.recipes.adapter import Adapter

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
    told = {"learning_rate": setting.rate, "scale": setting.scale, "factor": factor}
    return Outcome(f"{setting.contestant}, shrunk", values[metric], values["general_loss"] - before, told)


def table(found: Sequence[Outcome], metric: str) -> str:
    lines = [f"| | {' | '.join(f'within {limit:g}' for limit in LIMITS)} | best | its forgetting |"]
    lines.append("|" + " --- |" * (len(LIMITS) + 3))
    for name, own in by_contestant(found).items():
        cells = [f"{100 * one.quality:.1f}" if (one := best_within(own, limit)) else "-" for limit in LIMITS]
        best = frontier(own)[-1]
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * best.quality:.1f} | {best.forgetting:+.3f} |")
    return f"Best {metric} (%) of the settings that increase the loss on general text by no more:\n\n" + "\n".join(
        lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="chat")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="Changes of the recipe, for all.")
    parser.add_argument("--metric", default="exact_match", help="One of the recipe's, of which more is better.")
    parser.add_argument("--out", type=Path, default=Path("runs/forgetting"))
    parser.add_argument("--data", type=Path, help="Also write the outcomes to this JSON.")
    parser.add_argument("--plot", type=Path, help="Also draw them, to an svg or png.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time.")
    options = parser.parse_args()
    base = loader.load_recipe(options.recipe, [*CHANGES, *options.set])
    rank = lora_rank(base)
    done = train(base, rank, settings(), options.out, options.jobs)
    found = [o for s, at in done.items() for o in outcomes_of(s, at, options.metric)]
    if not found:
        raise SystemExit("no run is finished")
    for name in ("Lily", "LoRA"):
        own = [(s, at) for s, at in done.items() if s.contestant == name]
        best = max(own, key=lambda pair: max(o.quality for o in outcomes_of(*pair, options.metric)), default=None)
        for factor in FACTORS if best is not None else ():
            found.append(shrunk(*best, factor, options.metric))
    print(table(found, options.metric))
    groups = by_contestant(found)
    lily = groups.get("Lily", [])
    rules = {name: moved([*lily, *own], lily, LIMITS) for name, own in groups.items() if name.startswith("Lily,")}
    for name, gains in rules.items():
        said = ", ".join(f"{limit:g}: {'-' if gain is None else f'{100 * gain:+.1f}'}" for limit, gain in gains.items())
        print(f"\n{name} moves Lily's frontier by {said} points")
    if options.data is not None:
        told = {"recipe": base.name, "changes": CHANGES, "metric": options.metric, "rank": rank,
                "outcomes": [o.to_dict() for o in found]}  # fmt: skip
        write_text(options.data, json.dumps(told, indent=1))
    if options.plot is not None:
        percent = [Outcome(o.contestant, 100 * o.quality, o.forgetting) for o in found]
        forgetting_plot(percent, f"{options.metric} on the validation rows (%)").save(options.plot, overwrite=True)


if __name__ == "__main__":
    main()
