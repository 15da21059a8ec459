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

Runs that are there already are not repeated, so the same command goes on after anything that ended it; `--only-done`
trains nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lily.analysis.forgetting import Outcome, best_within, by_contestant, frontier, moved
from lily.analysis.plots import forgetting_plot
from lily.compare.runner import Job, opened, run, side_by_side
from lily.files import write_text
from lily.recipes import loader, methods, preflight
from lily.recipes.schema import Recipe
from lily.tune import folder
from lily.tune.space import changed, rounded

# What two cores do in some minutes a run. The last of two equal metrics is the one that is drawn.
CHANGES = ["data.max_train=640", "data.max_validation=200", "train.evaluate_every=10", "train.epochs=1",
           "metrics=[loss, exact_match]", "generation.samples=0"]  # fmt: skip
RATES = (3e-4, 1e-3, 3e-3)
SCALES = (0.5, 2.0, 8.0)
DECAYS = (1.0, 10.0)
DROPOUTS = (0.1,)
FACTORS = (0.25, 0.5, 0.75)
LIMITS = (0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Setting:
    """A contestant at one learning rate and scale."""

    contestant: str
    rate: float
    scale: float
    decay: float = 0.0
    dropout: float = 0.0

    @property
    def name(self) -> str:
        more = f"-decay{self.decay:g}" * bool(self.decay) + f"-dropout{self.dropout:g}" * bool(self.dropout)
        method = "lora" if self.contestant == "LoRA" else "lily"
        return f"{method}-rate{self.rate:g}-scale{self.scale:g}{more}"

    def recipe(self, base: Recipe, rank: int) -> Recipe:
        """The recipe with this setting. LoRA's scale is alpha over its rank."""
        train = {"weight_decay": self.decay}
        if self.contestant == "LoRA":
            lora = {"learning_rate": self.rate, "alpha": rounded(self.scale * rank)}
            return changed(base, {"lora": lora, "train": train}, method="lora")
        lily = {"learning_rate": self.rate, "scaling": self.scale, "dropout": self.dropout}
        return changed(base, {"lily": lily, "train": train}, method="lily")


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

        copy = kept.with_suffix("")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run_folder / "best", copy)
        config = json.loads((copy / "adapter_config.json").read_text())
        option = "lora_alpha" if setting.contestant == "LoRA" else "scaling"
        config[option] *= factor
        (copy / "adapter_config.json").write_text(json.dumps(config))
        used = evaluate.Adapter(str(copy), str(run_folder / "recipe.yaml"))
        values = used.evaluate("validation")
        general = forgetting.general_text(used.recipe, used.tokenizer)
        values["general_loss"] = evaluate.token_loss(used.model, general, used.recipe, used.tokenizer)
        write_text(kept, json.dumps(values))
        shutil.rmtree(copy)
    values = json.loads(kept.read_text())
    before = json.loads((run_folder / "metrics.json").read_text())["forgetting"]["before"]
    told = {"learning_rate": setting.rate, "scale": setting.scale, "factor": factor}
    return Outcome(f"{setting.contestant}, shrunk", values[metric], values["general_loss"] - before, told)


def train(base: Recipe, rank: int, out: Path, only_done: bool) -> list[tuple[Setting, Path]]:
    """The settings whose runs are finished, training those that are not."""
    listed = [(s, out / "runs" / s.name) for s in settings()]
    jobs = [Job(s.name, folder.placed(s.recipe(base, rank), at), at, trial=True) for s, at in listed]
    if not only_done:
        count, threads = side_by_side(None)
        with opened(out, overwrite=False) as lock:
            run(jobs, out, count, threads, lock, lambda job, o: print(job.name, o.error or "done", flush=True))
    return [pair for pair, job in zip(listed, jobs, strict=True) if job.done]


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
    parser.add_argument("--only-done", action="store_true", help="Use what is there, train nothing.")
    options = parser.parse_args()
    base = loader.load_recipe(options.recipe, [*CHANGES, *options.set])
    lora: Any = methods.peft_config(changed(base, {}, method="lora"), preflight.prepare(base).meta)
    done = train(base, lora.r, options.out, options.only_done)
    found = [o for s, at in done for o in outcomes_of(s, at, options.metric)]
    if not found:
        raise SystemExit("no run is finished")
    for name in ("Lily", "LoRA"):
        own = [(s, at) for s, at in done if s.contestant == name]
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
        told = {"recipe": base.name, "changes": CHANGES, "metric": options.metric, "rank": lora.r,
                "outcomes": [o.to_dict() for o in found]}  # fmt: skip
        write_text(options.data, json.dumps(told, indent=1))
    if options.plot is not None:
        percent = [Outcome(o.contestant, 100 * o.quality, o.forgetting) for o in found]
        forgetting_plot(percent, f"{options.metric} on the validation rows (%)").save(options.plot, overwrite=True)


if __name__ == "__main__":
    main()
