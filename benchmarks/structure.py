"""The map: which structure learns what at which size, and one learning rate for every shape. Prints Markdown.

    LILY_DATA=../shared/data python benchmarks/structure.py --study transfer --jobs 2
    LILY_DATA=../shared/data python benchmarks/structure.py --study capacity easy --jobs 2
    python benchmarks/structure.py --jobs 0          # tables and plots of the committed rows

Every run has a row in benchmarks/results/structure.jsonl, so an interrupted study goes on where it stopped. All arms of
a task have the same rows in the same order, the same schedule, the same rate of the head; the scale of every arm is in
its row, LoRA's as `lora_alpha / r`. The rate of an arm is chosen on validation rows (of a probe: on its training rows);
an optimum at the end of the grid is marked, since a better one may lie outside.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import structure_tasks as tasks
from performance import put
from structure_run import Run, train

from lily.analysis.plots import curves_plot
from lily.functional import default_scaling

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "structure.jsonl"
FIGURES = ROOT / "docs" / "figures"
SCALE = 2.0  # of LoRA: lora_alpha = 2 r
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
FAILED = 4  # times the lowest loss
NEAR = 1.05  # times the lowest loss of seed 0

Row = dict[str, Any]
Rows = Mapping[Run, Row]
Study = Callable[[Rows], Iterable[Run]]  # of the rows that are there, the runs that are wanted
Panels = dict[str, dict[str, list[tuple[float, list[float]]]]]

# One A and one B for all layers of a group; and two of each, which each layer mixes.
PAIR = {"method": "lily", "num_A": 1, "num_B": 1, "routing": "static", "distinct": "none"}
ROUTED = {"method": "lily", "num_A": 2, "num_B": 2, "routing": "sequence", "distinct": "none"}
ARMS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "lora"},
    "rsLoRA": {"method": "lora", "use_rslora": True},
    "published": ROUTED | {"scaling": 1.0},
    "published, scaled": ROUTED,
    "static": ROUTED | {"routing": "static"},
    "pair": PAIR,
    "permuted": PAIR | {"distinct": "permute"},
    "signs": PAIR | {"distinct": "signs"},
    "gains": PAIR | {"gain": "signs"},
    "permuted, routed": ROUTED | {"distinct": "permute"},
    "permuted, three": ROUTED | {"num_A": 3, "num_B": 3, "distinct": "permute"},  # the planner's for 30 layers
    "permuted, own": PAIR | {"distinct": "permute", "own": 0.5},  # half of the parameters are each layer's own
    "own": PAIR | {"own": 0.5},
}


def key(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Options as a part of a run's key."""
    return tuple(sorted(options.items()))


@cache
def _specs(model: str) -> Any:
    from lily import LilyConfig
    from lily.plan import select_targets

    made, targets = tasks.load(model, 2)
    return select_targets(made, LilyConfig(target_modules=targets))


def options(model: str, arm: str, size: float) -> dict[str, Any] | None:
    """The options of an arm with no more parameters than LoRA of rank `size`; None if it does not go that low."""
    from lily.budget import choose, lora_parameters
    from lily.errors import LilyError

    made = dict(ARMS[arm])
    if model == "causal" and made.get("routing") == "sequence":
        made["routing"] = "token"  # a token's output must not depend on later ones
    if made["method"] == "lora":
        if size != int(size):
            return None
        r = int(size)
        scale = SCALE * math.sqrt(8) if made.get("use_rslora") else SCALE * r  # rsLoRA has scale 2 at rank 8 too
        return made | {"r": r, "lora_alpha": scale}
    own_r = round(made.pop("own", 0) * size)
    shape = {name: made[name] for name in ("num_A", "num_B")}
    budget = int(size * lora_parameters(_specs(model), 1))
    try:
        found = choose(
            _specs(model), parameters=budget, routing=made["routing"], gain="gain" in made, own_r=own_r, **shape
        )
    except LilyError:
        return None
    made |= {"r": found.r} | ({"own_r": own_r} if own_r else {})
    return made | {"scaling": made.get("scaling", round(default_scaling(found.r + own_r), 4))}


def tuned(name: str, arms: Sequence[str], sizes: Sequence[float], rates: Sequence[float], seeds: int) -> Study:
    """Arms of equal size: seed 0 chooses rates, in a grid that grows until the best is inside; others compare.

    Those compare at the best rate and at each that is as good by seed 0 (`NEAR`): one seed would choose by chance.

    Args:
        name: the task.
        arms: of `ARMS`; LoRA is there at whole sizes only.
        sizes: parameters, as the rank of the LoRA that has as many.
        rates: the grid before it grows, by a factor of 2.
        seeds: number of seeds that compare, from 1.
    """

    def study(rows: Rows) -> Iterator[Run]:
        for size in sizes:
            for arm in arms:
                found = options(tasks.TASKS[name].model, arm, size)
                if found is None:
                    continue
                first = Run(name, arm, size, key(found), rates[0], 0)
                more = list(widened(rows, first, rates))
                yield from more
                if not more:
                    curve = tried(rows, first)
                    good = [rate for rate, loss in curve.items() if loss <= NEAR * min(curve.values())]
                    yield from (replace(first, rate=rate, seed=seed) for rate in good for seed in range(1, seeds + 1))

    return study


def tried(rows: Rows, first: Run) -> dict[float, float]:
    """The scores of a run at the rates of `RATES`, where there are any."""
    return {rate: score(run, rows[run]) for rate in RATES if (run := replace(first, rate=rate)) in rows}


def widened(rows: Rows, first: Run, rates: Sequence[float]) -> Iterator[Run]:
    """A run at the rates of a grid that have no row; after them, at the neighbors of the best one."""
    curve = tried(rows, first)
    absent = [rate for rate in rates if rate not in curve]
    if not absent:
        best = min(curve, key=curve.__getitem__)
        absent = [rate for rate in (best / 2, best * 2) if rate not in curve and RATES[0] <= rate <= RATES[-1]]
    yield from (replace(first, rate=rate) for rate in absent)


def shapes(rows: Rows) -> Iterator[Run]:
    """One learning rate for every shape.

    A shape whose best rate is at the end of the grid gets the next one too; then other seeds train at LoRA's best rate.
    """
    for name, rates in TRANSFER.items():
        firsts = [Run(name, shape, 0, key(o), rates[0], 0) for shape, o in shapes_of(tasks.TASKS[name].model).items()]
        more = [run for first in firsts for run in widened(rows, first, rates)]
        yield from more
        if not more:
            curve = tried(rows, firsts[0])
            best = min(curve, key=curve.__getitem__)
            yield from (replace(first, rate=best, seed=seed) for seed in (1, 2) for first in firsts)


def shapes_of(model: str) -> dict[str, dict[str, Any]]:
    """LoRA of rank 8, and Lily of many shapes at the default scale, as options."""
    depth = {"encoder": 6, "vision": 12}[model]
    made: dict[str, dict[str, Any]] = {f"r={r}": PAIR | {"r": r} for r in (4, 16, 64, 256)}
    made["r=16, 8 experts"] = PAIR | {"r": 16, "num_B": 8, "routing": "sequence"}
    made["r=16, an A per layer"] = ROUTED | {"r": 16, "num_A": depth}
    for found in made.values():
        found |= {"distinct": "permute", "scaling": round(default_scaling(found["r"]), 4)}
    return {"LoRA, r=8": {"method": "lora", "r": 8, "lora_alpha": SCALE * 8}} | made


def powers() -> Iterator[Run]:
    """Why the square root of the rank: rank 48 at a fixed scale, by the square root, and by the rank."""
    for rate in (4e-3, 8e-3, 2e-3, 1e-3):
        for scale in (0.8, 0.33, SCALE):
            made = PAIR | {"r": 48, "distinct": "permute", "scaling": scale}
            yield Run("random-labels", f"r=48, scale {scale:g}", 0, key(made), rate, 0)


# Of one rate for every shape: where grids begin.
TRANSFER = {
    "headlines": (2e-3, 4e-3),
    "random-digits": (1e-3, 2e-3),
    "random-labels": (2e-3, 4e-3),
}
MAIN = ["LoRA", "permuted", "permuted, routed", "published, scaled"]
PROBE, TASK = (2e-3, 4e-3), (1e-3, 2e-3)  # where grids begin; they widen
STUDIES: dict[str, Study] = {
    "transfer": shapes,
    "powers": lambda _: powers(),
    "capacity": tuned("random-labels", MAIN, (1, 8), PROBE, 5),
    "below": tuned("random-labels", ["permuted"], (2, 0.5, 0.25), PROBE, 5),
    "easy": tuned("headlines", MAIN[:3], (8, 1), TASK, 5),
    "quarter": tuned("headlines", ["permuted", "permuted, routed"], (2,), TASK, 5),
    "ablations": tuned(
        "random-labels", ["LoRA", "pair", "permuted, own", "signs", "gains", "static", "published"], (2,), PROBE, 5
    ),
    "mixed": tuned("mixed", MAIN[:3], (1,), TASK, 5),
    "long": tuned("headlines-long", ["LoRA", "permuted"], (1, 2), TASK, 3),
    "vision": tuned("random-digits", MAIN[:3], (1,), PROBE, 5),
    "pairs": tuned("pairs", ["LoRA", "permuted, three", "permuted", "permuted, routed"], (1,), PROBE, 5),
}


def stored() -> dict[Run, dict[str, Any]]:
    """The committed rows."""
    found: dict[Run, dict[str, Any]] = {}
    for line in ROWS.read_text("utf-8").splitlines() if ROWS.is_file() else []:
        row = json.loads(line)
        options_ = key(row.pop("options"))
        run = Run(row.pop("task"), row.pop("arm"), row.pop("size"), options_, row.pop("rate"), row.pop("seed"))
        found[run] = row
    return found


def missing(studies: Sequence[str]) -> list[Run]:
    """Runs that the studies want next and that have no row; their choice of later ones depends on these."""
    rows = stored()
    return [run for run in dict.fromkeys(r for name in studies for r in STUDIES[name](rows)) if run not in rows]


def run_all(runs: Sequence[Run], jobs: int) -> None:
    """Train the runs, each in a process with one thread, and append their rows as they end."""
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    # Not ProcessPoolExecutor: with max_tasks_per_child it can stop for good (CPython issue 115634).
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=8) as pool:
        for number, (run, found) in enumerate(pool.imap_unordered(_trained, runs), 1):
            named = {"task": run.task, "arm": run.arm, "size": run.size, "options": dict(run.options)}
            with ROWS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(named | {"rate": run.rate, "seed": run.seed} | found) + "\n")
            print(f"{number}/{len(runs)} {run.task} {run.arm} {run.rate:g} seed {run.seed}: {found['validation']}",
                  file=sys.stderr, flush=True)  # fmt: skip


def _trained(run: Run) -> tuple[Run, Row]:
    return run, train(run)


def score(run: Run, row: Row) -> float:
    """What rates are chosen by: the loss on validation rows, at most that of chance."""
    loss, chance = row["validation"]["loss"], tasks.TASKS[run.task].chance
    return min(loss, chance) if math.isfinite(loss) else chance


def by_rate(rows: Rows, task: str, arm: str, size: float) -> dict[float, list[tuple[Run, Row]]]:
    found = defaultdict(list)
    for run, row in rows.items():
        if (run.task, run.arm, run.size) == (task, arm, size):
            found[run.rate].append((run, row))
    return dict(sorted(found.items()))


def optimum(curve: Mapping[float, float]) -> tuple[float, bool]:
    """The rate of the lowest loss, and whether it is inside the grid.

    By a parabola through the lowest point and its neighbors, unless the next rate is one at which training fails.
    """
    rates = sorted(curve)
    i = min(range(len(rates)), key=lambda j: curve[rates[j]])
    if i in (0, len(rates) - 1):
        return rates[i], False
    if curve[rates[i + 1]] > FAILED * curve[rates[i]]:
        return rates[i], True
    (a, b, c), (u, v, w) = (math.log(r) for r in rates[i - 1 : i + 2]), (curve[r] for r in rates[i - 1 : i + 2])
    top = (b - a) ** 2 * (v - w) - (b - c) ** 2 * (v - u)
    low = (b - a) * (v - w) - (b - c) * (v - u)
    return (math.exp(b - 0.5 * top / low) if low else rates[i]), True


def one_rate(rows: Rows) -> Rows:
    """The rows of one rate for every shape, of the tasks with all shapes."""
    wanted = {task: shapes_of(tasks.TASKS[task].model) for task in TRANSFER}
    own = {run: row for run, row in rows.items() if run.size == 0 and run.arm in wanted.get(run.task, {})}
    return {run: row for run, row in own.items() if {r.arm for r in own if r.task == run.task} == set(wanted[run.task])}


def transfer(rows: Rows) -> str:
    """One rate for every shape: where each shape's lowest loss is by seed 0, and its loss at LoRA's best rate."""
    own = one_rate(rows)
    lines = [
        "| task | shape | scale | best rate | of LoRA's | loss there | loss at LoRA's best rate | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task in dict.fromkeys(run.task for run in own):
        shapes = list(dict.fromkeys(run.arm for run in own if run.task == task))
        shapes.sort(key=lambda name: not name.startswith("LoRA"))
        usual = None
        for shape in shapes:
            points = by_rate(own, task, shape, 0)
            curve = {rate: score(run, row) for rate, found in points.items() for run, row in found if run.seed == 0}
            best, inside = optimum(curve)
            usual = usual or (best, min(curve, key=curve.__getitem__))
            chosen = dict(next(iter(points.values()))[0][0].options)
            scale = chosen.get("scaling", SCALE)
            there = [score(run, row) for run, row in points.get(usual[1], [])]
            at = _spread(there, 3) if there else "-"
            lines.append(
                f"| {task} | {shape} | {scale:g} | {best:.2g}{'' if inside else ' (end of the grid)'} "
                f"| {best / usual[0]:.2f} | {min(curve.values()):.3f} | {at} | {len(there)} |"
            )
    return "\n".join(lines)


def chosen(rows: Rows, task: str, arm: str, size: float) -> tuple[list[tuple[Run, Row]], bool] | None:
    """An arm's runs at its best rate, and whether that is inside the grid.

    The rate is that of the lowest mean loss on validation rows over the seeds without 0, among the rates that have
    them; of seed 0 alone if no rate has others.
    """
    points = by_rate(rows, task, arm, size)
    curve = {rate: score(run, row) for rate, found in points.items() for run, row in found if run.seed == 0}
    if not curve:
        return None
    compared = {rate: [pair for pair in found if pair[0].seed] for rate, found in points.items()}
    most = max(map(len, compared.values()))
    means = {
        r: statistics.fmean(score(run, row) for run, row in f) for r, f in compared.items() if most and len(f) == most
    }
    best = min(means or curve, key=(means or curve).__getitem__)
    runs = sorted(compared[best] or points[best], key=lambda pair: pair[0].seed)
    return runs, best not in (min(curve), max(curve))


def capacity(rows: Rows) -> str:
    """Every task, size and arm at its best rate, with a paired test over the seeds against LoRA of equal size."""
    from scipy.stats import ttest_rel

    own = {run: row for run, row in rows.items() if run.size}
    lines = [
        "| task | size | method | r | scale | parameters | rate | loss | accuracy | drift | seeds | p | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    arms = defaultdict(set)
    for run in own:
        arms[run.task, run.size].add(run.arm)
    for task, size in sorted(key for key, names in arms.items() if len(names) > 1 or key[1] < 1):
        lora = chosen(own, task, "LoRA", size)
        for arm in ARMS:
            found = chosen(own, task, arm, size)
            if found is None:
                continue
            runs, inside = found
            part = "validation" if tasks.TASKS[task].probe else "test"
            losses = [row[part]["loss"] for _, row in runs]
            accuracies = [row[part]["accuracy"] for _, row in runs]
            drifts = [row["drift"] for _, row in runs if "drift" in row]
            p = "-"
            if lora is not None and arm != "LoRA" and len(runs) > 1 and len(lora[0]) == len(runs):
                p = f"{ttest_rel(losses, [row[part]['loss'] for _, row in lora[0]]).pvalue:.2g}"
            options_ = dict(runs[0][0].options)
            scale = options_.get("scaling") or options_["lora_alpha"] / (
                math.sqrt(options_["r"]) if options_.get("use_rslora") else options_["r"]
            )
            size_of = runs[0][1]["parameters"]
            lines.append(
                f"| {task} | {size:g} | {arm} | {options_['r']} | {scale:.3g} | {size_of:,} "
                f"| {runs[0][0].rate:g}{'' if inside else ' (end)'} | {_spread(losses, 3)} | {_spread(accuracies, 1)} "
                f"| {_spread(drifts, 3) if drifts else '-'} | {len(runs)} | {p} "
                f"| {statistics.fmean(row['seconds'] for _, row in runs):.0f} |"
            )
    return "\n".join(lines)


def draw(rows: Rows) -> None:
    """The losses over the learning rate, at the best rates over the number of parameters, and of seed 0 over drift."""
    rates: Panels = {}
    sizes: Panels = {}
    drifts: Panels = {}
    for task, arm in dict.fromkeys((run.task, run.arm) for run in one_rate(rows)):
        points = by_rate(rows, task, arm, 0)
        curve = [(rate, [score(run, row) for run, row in found]) for rate, found in points.items()]
        rates.setdefault(task, {})[arm] = curve
    for task, arm, size in dict.fromkeys((run.task, run.arm, run.size) for run in rows if run.size):
        found = chosen(rows, task, arm, size)
        assert found is not None
        part = "validation" if tasks.TASKS[task].probe else "test"
        point = found[0][0][1]["parameters"], [row[part]["loss"] for _, row in found[0]]
        sizes.setdefault(task, {}).setdefault(arm, []).append(point)
        moved = [
            (row["drift"], [row[part]["loss"]])
            for points in by_rate(rows, task, arm, size).values()
            for run, row in points
            if run.seed == 0 and "drift" in row
        ]
        if len(moved) > 1:
            drifts.setdefault(f"{task}, size {size:g}", {})[arm] = moved
    drawn = ((rates, "learning rate", "rates"), (sizes, "trainable parameters", "map"), (drifts, "drift", "forgetting"))
    for every, x, name in drawn:
        panels = {title: arms for title, arms in sorted(every.items()) if len(arms) > 1}
        if panels:
            curves_plot(panels, x, "loss").save(FIGURES / f"structure-{name}.svg", overwrite=True)


def _spread(values: Sequence[float], digits: int) -> str:
    more = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{more}"


# Marker in a page -> the page, and the table of the committed rows.
TABLES = {"rates": (ROOT / "docs" / "tune.md", transfer), "structure": (ROOT / "docs" / "results.md", capacity)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", nargs="*", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time, each on one thread; 0: tables only.")
    parser.add_argument("--list", action="store_true", help="Print what would run.")
    given = parser.parse_args()
    if given.list:
        for run in missing(given.study):
            print(run)
        return
    while given.jobs and (runs := missing(given.study)):
        run_all(runs, given.jobs)
    draw(stored())
    for marker, (page, table) in TABLES.items():
        written = table(stored())
        put(page, marker, written)
        print(written)


if __name__ == "__main__":
    main()
