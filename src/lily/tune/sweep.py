"""`lily sweep`: trains the shapes within one budget, to measure quality against granularity.

By default the numbers of A and B vary together, and the rank follows from the budget, as in the paper's Fig. 5.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lily.distributed import world_size
from lily.errors import LilyError
from lily.io.atomic import write_text
from lily.progress.progress import current
from lily.recipes import methods, preflight
from lily.recipes.begun import as_begun
from lily.recipes.scoring import metrics as metric_tools
from lily.recipes.spec.schema import Recipe
from lily.recipes.work import steps_of
from lily.search import folder
from lily.search.engine import search
from lily.search.runner import METRICS, Announce, Job, run
from lily.tune import halving
from lily.tune.space import AdapterShape, cadence, changed, shape_keys, shapes_of

RESULT, RUNS, LORA = "granularity.json", "runs", "lora"
PICTURES = ("granularity.svg", "granularity.png")
WRITTEN = (RESULT, RUNS, "recipes", "logs", *PICTURES)
Run = tuple[int, AdapterShape]  # index of the rung, shape


@dataclass(frozen=True)
class SweepOptions:
    """Options of a sweep."""

    budget: str | int | None = None  # parameters that a shape may cost; None: what the recipe's own shape costs
    grid: bool = False  # combine every num_A with every num_B; otherwise num_A = num_B
    # largest number of shapes; of more, the recipe's own and others spread evenly over the ranks are taken
    most: int = 8
    seeds: int = 1  # number of seeds per shape, counted up from the recipe's
    halving: bool = False  # stop the worse half at every rung, by the validation rows
    lora: bool = False  # also train LoRA of equal size
    jobs: int = 1  # runs at the same time
    threads: int = 1  # CPU threads per run


@dataclass(frozen=True)
class ShapeResult:
    """The figures of a shape, or of LoRA."""

    name: str  # of the shape, or `lora`
    r: int  # rank
    num_A: int | None  # A per group; None: LoRA, or a shape with `stride_A`
    num_B: int | None  # experts per group; None: LoRA
    parameters: int  # number that train
    validation: tuple[float, ...]  # main metric on the validation rows, of the best adapter, per seed
    held_out: tuple[float, ...]  # main metric on the held-out rows, per seed; empty: stopped before the end
    forgetting: tuple[float, ...]  # increase of the loss on general text, per seed; empty: not measured
    steps: int  # optimizer steps
    failed: tuple[int, ...] = ()  # seeds whose runs failed


@dataclass(frozen=True)
class Granularity:
    """The result of a sweep; `granularity.json` is this."""

    name: str  # of the recipe
    metric: str  # its main metric
    split: str  # that `held_out` was measured on
    rows: int  # number in that split
    budget: int  # in parameters
    seeds: tuple[int, ...]  # of every entry
    entries: tuple[ShapeResult, ...] = ()  # by falling rank; LoRA last

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Sweep:
    """A sweep after all checks, and what the result says before the first run."""

    recipe: Recipe
    shapes: tuple[AdapterShape, ...]
    lora: AdapterShape | None
    rungs: tuple[halving.Rung, ...]
    result: Granularity

    def job(self, shape: AdapterShape, seed: int, output: Path, rung: halving.Rung) -> Job:
        """One run, up to the end of a rung."""
        name = self.name_of(shape)
        sections = {} if shape is self.lora else {"lily": shape_keys(shape)}
        method = "lora" if shape is self.lora else "lily"
        run_folder = output / RUNS / name / str(seed)
        recipe = folder.inside(changed(self.recipe, sections, method=method, seed=seed), run_folder)
        return Job(f"{name}/{seed}", recipe, run_folder, trial=rung.until is not None, until=rung.until)

    def name_of(self, shape: AdapterShape) -> str:
        """The name of its entry and of the folder of its runs."""
        return LORA if shape is self.lora else shape.name


def output_folder(recipe: Recipe) -> Path:
    """The default folder of a sweep."""
    return Path("runs") / f"{recipe.name}-granularity"


def prepare(recipe: Recipe, options: SweepOptions) -> Sweep:
    """Check everything that can be checked before the first run.

    Raises:
        LilyError: if the recipe, its data or the options are wrong.
    """
    if world_size() > 1:
        raise LilyError("a sweep starts its own processes; start it without torchrun or accelerate launch")
    if recipe.method != "lily":
        raise LilyError(f"method: {recipe.method} has no granularity; set method: lily (--lora adds LoRA)")
    if recipe.lily.groups:
        raise LilyError("lily.groups sets the shape of some groups, which a sweep would replace; remove it")
    if options.halving and recipe.train.packing:
        raise LilyError("--halving needs the number of steps, which train.packing makes unknown; remove one of them")
    if options.most < 2 or options.seeds < 1:
        raise LilyError("a sweep needs at least two shapes (--points) and one seed (--seeds)")
    prepared = preflight.prepare(recipe)
    decided = methods.decide(recipe, prepared.meta)
    shapes = thinned(shapes_of(recipe, decided, options.budget, grid=options.grid), options.most)
    if len(shapes) < 2:
        raise LilyError("only one shape is within the budget; give another budget with --params")
    rows = len(prepared.train)
    stages: tuple[halving.Rung, ...] = (halving.Rung(None, len(shapes)),)
    if options.halving:
        stages = halving.rungs(len(shapes), steps_of(recipe, rows))
        # a run with early stopping might not reach its rung
        train = {"evaluate_every": cadence(recipe, rows, least=2 ** (len(stages) - 1)), "early_stopping": None}
        recipe = changed(recipe, {"train": train})
    largest, lora = max(shapes, key=lambda shape: shape.parameters), None
    if options.lora:  # of the largest rank with no more parameters
        like = changed(recipe, {"lily": shape_keys(largest)}, method="lora")
        config: Any = methods.peft_config(like, prepared.meta)
        lora = AdapterShape(config.r, None, None, 0, 0)
    split, held_out = "test" if prepared.splits.test else "validation", len(prepared.splits.held_out)
    metric, seeds = metric_tools.metrics_of(recipe)[0], tuple(recipe.seed + i for i in range(options.seeds))
    result = Granularity(recipe.name, metric, split, held_out, largest.parameters, seeds)
    return Sweep(recipe, shapes, lora, stages, result)


def thinned(shapes: Sequence[AdapterShape], most: int) -> tuple[AdapterShape, ...]:
    """At most `most` shapes, by falling rank: the first of `shapes`, and others spread evenly over the ranks."""
    ordered = sorted(shapes, key=lambda s: (-s.r, s.num_A or 0, s.num_B))
    if len(ordered) <= most:
        return tuple(ordered)
    indices = {round(i * (len(ordered) - 1) / (most - 1)) for i in range(most)}
    own = ordered.index(shapes[0])
    if own not in indices:
        indices.remove(min(indices, key=lambda index: abs(index - own)))
        indices.add(own)
    return tuple(ordered[index] for index in sorted(indices))


def sweep(
    recipe: Recipe, output: Path, options: SweepOptions, *, overwrite: bool = False, announce: Announce
) -> Granularity:
    """Train the shapes; called again after an interruption, it continues.

    Args:
        recipe: everything but the shape.
        output: the folder of the sweep.
        options: of the sweep.
        overwrite: delete an earlier sweep first.
        announce: called with each line of progress.

    Returns:
        The result, also written to `granularity.json`.

    Raises:
        LilyError: if anything is wrong, before the first run where that can be checked; or if all runs failed.
        KeyboardInterrupt: at Ctrl-C, and SystemExit at SIGTERM, when every run has written its checkpoint.
    """
    recipe = recipe if overwrite else as_begun(recipe, output)
    prepared = prepare(recipe, options)
    shapes, stages, seeds = prepared.shapes, prepared.rungs, prepared.result.seeds
    settings = {
        "recipe": prepared.recipe.model_dump(mode="json"),
        "shapes": [asdict(shape) for shape in shapes],
        "rungs": [asdict(rung) for rung in stages],
        "seeds": list(seeds),
        "lora": options.lora,
    }
    announce(f"{len(shapes)} shapes: {', '.join(shape.name for shape in shapes)}")
    failed: dict[str, tuple[int, ...]] = {}

    def propose(values: Mapping[Run, float | None]) -> list[Run]:
        runs = halving.next_runs(values, stages, shapes, prepared.result.metric)
        last = runs and stages[runs[0][0]].until is None
        return [*runs, (runs[0][0], prepared.lora)] if last and prepared.lora else runs

    def run_rung(runs: Sequence[Run]) -> dict[Run, float | None]:
        index = runs[0][0]
        if index:
            names = ", ".join(shape.name for _, shape in runs if shape is not prepared.lora)
            announce(f"after {stages[index - 1].until} steps {names} continue")
        jobs = [prepared.job(shape, seed, output, stages[index]) for seed in seeds for _, shape in runs]
        outcomes = run(jobs, output, options.jobs, options.threads, lock, announce)
        values: dict[Run, float | None] = {}
        for one in runs:
            name = prepared.name_of(one[1])
            by_seed = {seed: outcomes[f"{name}/{seed}"] for seed in seeds}
            failed[name] = tuple(seed for seed, outcome in by_seed.items() if outcome.figures is None)
            reached = [value for outcome in by_seed.values() if (value := outcome.validation) is not None]
            values[one] = statistics.fmean(reached) if len(reached) == len(seeds) else None
        return values

    with folder.opened(output, "lily sweep", WRITTEN, overwrite, settings) as lock:
        (output / "logs").mkdir(exist_ok=True)
        current().log_to(output / "logs" / "sweep.log")
        folder.check_rows(output, recipe)
        search(propose, run_rung)
        listed = [*shapes, *([prepared.lora] if prepared.lora else [])]
        entries = tuple(_read(shape, prepared, output, failed.get(prepared.name_of(shape), ())) for shape in listed)
        result = replace(prepared.result, entries=entries)
        write_text(output / RESULT, json.dumps(result.to_dict(), indent=2))
    if not any(entry.validation for entry in entries):
        raise LilyError(f"all runs of {recipe.name} failed; see {output / 'logs'}")
    return result


def _read(shape: AdapterShape, sweep: Sweep, output: Path, failed: tuple[int, ...]) -> ShapeResult:
    """A shape's figures, from the files of its runs."""
    name, about = sweep.name_of(shape), sweep.result
    files = [output / RUNS / name / str(seed) / METRICS for seed in about.seeds if seed not in failed]
    runs = [json.loads(file.read_text("utf-8")) for file in files if file.is_file()]
    complete = [figures for figures in runs if figures["split"] == about.split and figures["before"]]
    return ShapeResult(
        name=name,
        r=shape.r,
        num_A=shape.num_A,
        num_B=shape.num_B or None,
        parameters=int(runs[0]["parameters"]["adapter"]) if runs else shape.parameters,
        validation=tuple(float(figures["best"]["value"]) for figures in runs),
        held_out=tuple(float(figures["final"][about.metric]) for figures in complete),
        forgetting=tuple(float(figures["forgetting"]["increase"]) for figures in runs if figures.get("forgetting")),
        steps=max((int(figures["history"][-1]["step"]) for figures in runs), default=0),
        failed=failed,
    )
