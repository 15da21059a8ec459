"""`lily sweep`: the shapes that one budget buys, each trained, so that quality is seen against granularity.

The paper varies the number of A and of B at once and lets the rank follow (its Fig. 5); so does this by default.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lily.compare.runner import METRICS, Job, Outcome, run
from lily.distributed import world_size
from lily.errors import LilyError
from lily.io.atomic import write_text
from lily.recipes import methods, preflight
from lily.recipes.scoring import metrics as metric_tools
from lily.recipes.scoring.metrics import shown
from lily.recipes.spec.schema import Recipe
from lily.tune import folder, halving
from lily.tune.space import Shape, cadence, changed, shape_keys, shapes_of, steps_of

RESULT, RUNS, LORA = "granularity.json", "runs", "lora"
PICTURES = ("granularity.svg", "granularity.png")
OWN = (RESULT, RUNS, "recipes", "logs", *PICTURES)
Announce = Callable[[str], None]


@dataclass(frozen=True)
class Wish:
    """What a sweep is asked for.

    Attributes:
        budget: parameters that a shape may cost; None: what the recipe's own costs.
        grid: every num_A with every num_B; else equal ones.
        most: shapes; of more than that, those that are evenly spread over the ranks, and the recipe's own.
        seeds: of each shape, from the recipe's own on.
        halving: give up the worse half at every rung, by the validation rows.
        lora: also train LoRA of as many parameters.
        jobs: runs at the same time.
        threads: of each.
    """

    budget: str | int | None = None
    grid: bool = False
    most: int = 8
    seeds: int = 1
    halving: bool = False
    lora: bool = False
    jobs: int = 1
    threads: int = 1


@dataclass(frozen=True)
class Entry:
    """A shape, or LoRA, and what came of it.

    Attributes:
        name: of the shape, or `lora`.
        r: rank.
        num_A: A per group; None: LoRA, or said as `stride_A`.
        num_B: experts per group; None: LoRA.
        parameters: what it trains.
        validation: main metric on the validation rows, of the best adapter, for each seed.
        held_out: likewise on the held-out rows; empty: given up before the end.
        forgetting: likewise the increase of the loss on general text; empty: not measured.
        steps: optimiser steps done.
        failed: seeds whose runs failed.
    """

    name: str
    r: int
    num_A: int | None
    num_B: int | None
    parameters: int
    validation: tuple[float, ...]
    held_out: tuple[float, ...]
    forgetting: tuple[float, ...]
    steps: int
    failed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Granularity:
    """What a sweep found; `granularity.json` is this.

    Attributes:
        name: of the recipe.
        metric: its main metric.
        split: what `held_out` was measured on.
        rows: of that split.
        budget: parameters.
        seeds: of each entry.
        entries: by falling rank; LoRA last.
    """

    name: str
    metric: str
    split: str
    rows: int
    budget: int
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Sweep:
    """A sweep, ready to begin."""

    recipe: Recipe
    shapes: tuple[Shape, ...]
    lora: Shape | None
    rungs: tuple[halving.Rung, ...]
    seeds: tuple[int, ...]
    budget: int
    metric: str
    split: str
    rows: int

    def job(self, shape: Shape, seed: int, output: Path, rung: halving.Rung) -> Job:
        """One run, up to the end of a rung."""
        name = LORA if shape is self.lora else shape.name
        sections = {} if shape is self.lora else {"lily": shape_keys(shape)}
        method = "lora" if shape is self.lora else "lily"
        run_folder = output / RUNS / name / str(seed)
        recipe = folder.placed(changed(self.recipe, sections, method=method, seed=seed), run_folder)
        return Job(f"{name}/{seed}", recipe, run_folder, trial=rung.until is not None, until=rung.until)


def output_folder(recipe: Recipe) -> Path:
    """Where a sweep is kept if nobody says where."""
    return Path("runs") / f"{recipe.name}-granularity"


def prepare(recipe: Recipe, wish: Wish) -> Sweep:
    """Everything that can be found wrong before the first run.

    Raises:
        LilyError: for anything wrong with the recipe, its data or the wish.
    """
    if world_size() > 1:
        raise LilyError("a sweep starts its own processes; start it without torchrun or accelerate launch")
    if recipe.method != "lily":
        raise LilyError(f"method: {recipe.method} has no granularity; a sweep is of lily (--lora adds LoRA)")
    if recipe.lily.groups:
        raise LilyError("lily.groups gives some groups a shape of their own, which a sweep would replace; remove it")
    if wish.halving and recipe.train.packing:
        raise LilyError("--halving needs to know the number of steps, which train.packing leaves open; leave one away")
    if wish.most < 2 or wish.seeds < 1:
        raise LilyError("a sweep needs at least two shapes (--points) and one seed (--seeds)")
    prepared = preflight.prepare(recipe)
    decided = methods.decide(recipe, prepared.meta)
    shapes = spread(shapes_of(recipe, decided, wish.budget, grid=wish.grid), wish.most)
    if len(shapes) < 2:
        raise LilyError("the budget buys one shape only; give another with --params")
    rows = len(prepared.train)
    stages: tuple[halving.Rung, ...] = (halving.Rung(None, len(shapes)),)
    if wish.halving:
        stages = halving.rungs(len(shapes), steps_of(recipe, rows))
        # a run that stops by itself would not reach the rungs
        train = {"evaluate_every": cadence(recipe, rows, least=2 ** (len(stages) - 1)), "early_stopping": None}
        recipe = changed(recipe, {"train": train})
    lora = _lora(recipe, shapes, prepared.meta) if wish.lora else None
    splits, split = prepared.splits, "test" if prepared.splits.test else "validation"
    return Sweep(
        recipe,
        shapes,
        lora,
        stages,
        tuple(recipe.seed + i for i in range(wish.seeds)),
        max(shape.parameters for shape in shapes),
        metric_tools.metrics_of(recipe)[0],
        split,
        len(splits.held_out),
    )


def spread(shapes: Sequence[Shape], most: int) -> tuple[Shape, ...]:
    """At most so many shapes, by falling rank: the first one given, and others evenly spread over the ranks."""
    ordered = sorted(shapes, key=lambda s: (-s.r, s.num_A or 0, s.num_B))
    if len(ordered) <= most:
        return tuple(ordered)
    places = {round(i * (len(ordered) - 1) / (most - 1)) for i in range(most)}
    own = ordered.index(shapes[0])
    if own not in places:
        places.remove(min(places, key=lambda place: abs(place - own)))
        places.add(own)
    return tuple(ordered[place] for place in sorted(places))


def _lora(recipe: Recipe, shapes: Sequence[Shape], meta: Any) -> Shape:
    """LoRA of the largest rank with no more parameters than the largest shape."""
    largest = max(shapes, key=lambda shape: shape.parameters)
    like = changed(recipe, {"lily": shape_keys(largest)}, method="lora")
    config: Any = methods.peft_config(like, meta)
    return Shape(config.r, None, None, 0, 0)


def sweep(recipe: Recipe, output: Path, wish: Wish, *, overwrite: bool = False, announce: Announce) -> Granularity:
    """Train the shapes; killed and called again, it goes on.

    Args:
        recipe: all but the shape.
        output: the folder of the sweep.
        wish: which shapes, and how.
        overwrite: begin anew.
        announce: is told what happens, line by line.

    Returns:
        What was found, also written to `granularity.json`.

    Raises:
        LilyError: for anything wrong, before the first run where it can be known; or if all runs failed.
        KeyboardInterrupt: at Ctrl-C, and SystemExit at SIGTERM, when every run has written its checkpoint.
    """
    found = prepare(recipe, wish)
    listed = [*found.shapes, *([found.lora] if found.lora else [])]
    settings = {
        "recipe": found.recipe.model_dump(mode="json"),
        "shapes": [asdict(shape) for shape in found.shapes],
        "rungs": [asdict(rung) for rung in found.rungs],
        "seeds": list(found.seeds),
        "lora": wish.lora,
    }
    announce(f"{len(found.shapes)} shapes: {', '.join(shape.name for shape in found.shapes)}")
    with folder.opened(output, settings, OWN, overwrite) as lock:
        failed: dict[str, tuple[int, ...]] = {}
        going = list(found.shapes)
        for rung in found.rungs:
            last = rung.until is None
            entered = [*going, *([found.lora] if found.lora and last else [])]
            jobs = [found.job(shape, seed, output, rung) for seed in found.seeds for shape in entered]
            outcomes = run(jobs, output, wish.jobs, wish.threads, lock, _teller(jobs, found.metric, rung, announce))
            names = {shape.name: LORA if shape is found.lora else shape.name for shape in entered}
            failed |= {
                name: tuple(s for s in found.seeds if outcomes[f"{name}/{s}"].figures is None)
                for name in names.values()
            }
            if not last:
                reached = {shape: _reached(shape, found.seeds, outcomes) for shape in going}
                going = halving.survivors(reached, rung.keep, lambda a, b: metric_tools.better(found.metric, a, b))
                announce(f"after {rung.until} steps {', '.join(shape.name for shape in going)} go on")
            if not going:
                break
        told = read(found, listed, output, failed)
        write_text(output / RESULT, json.dumps(told.to_dict(), indent=2))
    if not any(entry.validation for entry in told.entries):
        raise LilyError(f"no run of {recipe.name} ended well; see {output / 'logs'}")
    return told


def read(found: Sweep, listed: Sequence[Shape], output: Path, failed: dict[str, tuple[int, ...]]) -> Granularity:
    """What the runs of a sweep have left in their folders."""
    entries = tuple(
        _entry(shape, LORA if shape is found.lora else shape.name, found, output, failed) for shape in listed
    )
    return Granularity(found.recipe.name, found.metric, found.split, found.rows, found.budget, found.seeds, entries)


def _entry(shape: Shape, name: str, found: Sweep, output: Path, failed: dict[str, tuple[int, ...]]) -> Entry:
    files = [output / RUNS / name / str(seed) / METRICS for seed in found.seeds if seed not in failed.get(name, ())]
    runs = [json.loads(file.read_text("utf-8")) for file in files if file.is_file()]
    is_lora = shape is found.lora
    complete = [r for r in runs if r["split"] == found.split and r["before"]]
    return Entry(
        name=name,
        r=shape.r,
        num_A=shape.num_A,
        num_B=None if is_lora else shape.num_B,
        parameters=int(runs[0]["parameters"]["adapter"]) if runs else shape.parameters,
        validation=tuple(float(r["best"]["value"]) for r in runs),
        held_out=tuple(float(r["final"][found.metric]) for r in complete),
        forgetting=tuple(float(r["forgetting"]["increase"]) for r in runs if r.get("forgetting")),
        steps=max((int(r["history"][-1]["step"]) for r in runs), default=0),
        failed=failed.get(name, ()),
    )


def _reached(shape: Shape, seeds: Sequence[int], outcomes: dict[str, Outcome]) -> float | None:
    """A shape's main metric on the validation rows, mean over its seeds; None: one of them failed."""
    values = [
        None if (figures := outcomes[f"{shape.name}/{seed}"].figures) is None else figures["best"]["value"]
        for seed in seeds
    ]
    numbers = [float(value) for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(numbers) if len(numbers) == len(values) else None


def _teller(jobs: Sequence[Job], metric: str, rung: halving.Rung, announce: Announce) -> Callable[[Job, Outcome], None]:
    ended: list[str] = []

    def told(job: Job, outcome: Outcome) -> None:
        ended.append(job.name)
        place = f"[{len(ended)}/{len(jobs)}] {job.name}"
        if outcome.figures is None:
            announce(f"{place} failed: {outcome.error}")
            return
        value = shown(metric, outcome.figures["best"]["value"])
        where = "" if rung.until is None else f" after {rung.until} steps"
        announce(f"{place}: {metric} {value} on the validation rows{where}")

    return told
