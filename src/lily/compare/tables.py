"""A comparison in rows and words, and several of them in one table: Markdown and terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lily.compare.result import Comparison, Entry, spread
from lily.recipes.scoring.metrics import LOWER_IS_BETTER, shown
from lily.recipes.spec.schema import MEAN

UNTRAINED = "untrained"


Table = list[list[str]]  # the first line is the header


def quality(found: Comparison) -> Table:
    """The metrics: a row for the untrained model, then one for each method."""
    forgot = any(entry.forgetting for entry in found.entries)
    lines = [["", *found.metrics, f"against {found.entries[0].title}", "p", *["forgetting"] * forgot]]
    untrained = [with_spread(m, found.untrained[m]) for m in found.metrics]
    lines.append([UNTRAINED, *untrained, "", "", *[""] * forgot])
    for entry in found.entries:
        test = entry.test
        against = ["", ""] if entry is found.entries[0] else ["-", "-"]
        if test is not None:
            against = [f"{_difference(found.metric, test.difference)} ({_interval(found, entry)})", f"{test.p:.2g}"]
        values = [with_spread(m, entry.values[m]) for m in found.metrics]
        forgetting = with_spread("loss", entry.forgetting) if entry.forgetting else ""
        lines.append([entry.title, *values, *against, *[forgetting] * forgot])
    return lines


def costs(found: Comparison) -> Table:
    """What each method is and takes."""
    lines = [["", "rank", "trained", "learning rate", "scale", "seconds", "peak MB", "file MB"]]
    for entry in found.entries:
        lines.append(
            [
                entry.title,
                "" if entry.rank is None else str(entry.rank),
                f"{entry.parameters:,}" if entry.parameters else "",
                f"{entry.learning_rate:g}",
                "" if entry.scale is None else f"{entry.scale[0].removeprefix('lora_')} {entry.scale[1]:g}",
                f"{entry.seconds:.0f}",
                f"{entry.peak_bytes / 1e6:,.0f}" if entry.peak_bytes else "",
                f"{entry.adapter_bytes / 1e6:.2f}" if entry.adapter_bytes else "",
            ]
        )
    return lines


def _interval(found: Comparison, entry: Entry) -> str:
    assert entry.test is not None
    return f"{_difference(found.metric, entry.test.low)} to {_difference(found.metric, entry.test.high)}"


def _difference(metric: str, value: float) -> str:
    return f"{value:+.4f}" if metric in LOWER_IS_BETTER else f"{100 * value:+.1f}"


def with_spread(metric: str, values: Sequence[float]) -> str:
    """`84.1 ± 0.6`: mean and standard deviation over the seeds."""
    said, deviation = shown(metric, statistics.fmean(values)), spread(values)
    return said if deviation is None else f"{said} ± {shown(metric, deviation)}"


def words(found: Comparison) -> list[str]:
    """What the table is about, and how to read it."""
    seeds = sorted({seed for entry in found.entries for seed in entry.seeds})
    setting = found.setting
    budget = {"params": "at equal parameters: for each method the largest rank with no more than Lily has",
              "rank": "at equal rank"}.get(str(setting.get("equal")), "")  # fmt: skip
    said = [
        f"{found.name} ({found.task}): {found.rows:,} {found.split} rows, {found.trained_on:,} training rows, "
        f"{_seeds(seeds)}, {found.device}, {found.precision}; {budget}".rstrip("; ")
        + "."
    ]
    if len(seeds) > 1:
        said.append("Mean and standard deviation over seeds; seconds and sizes are of one run.")
    tests = sorted({entry.test.test for entry in found.entries if entry.test is not None})
    if tests:
        said.append(
            f"p: {' or '.join(tests)} on the same rows against {found.entries[0].title}, with the 95% interval of the "
            "difference over rows; another seed may differ by more"
            + (", which the standard deviation tells." if len(seeds) > 1 else ".")
        )
    if any(entry.test is None for entry in found.entries[1:]):
        said.append("-: no test, for want of a seed or of rows in common, or because a result is not a finite number.")
    if any(entry.forgetting for entry in found.entries):
        said.append("Forgetting: by how much the loss on general text rose, in nats per token; less is better.")
    if setting.get("tune"):
        where = (
            "validation rows" if found.split != "validation" else "the rows that it is judged on, for want of others"
        )
        said.append(f"Learning rate and scale of each method chosen by the same search on {where}, with one seed.")
    said += [f"{run} failed: {why}" for run, why in found.failed.items()]
    return said


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"


def markdown(found: Comparison) -> str:
    """The comparison as Markdown."""
    lines = [f"# {found.name}: {' / '.join(entry.title for entry in found.entries)}", ""]
    lines += [line for said in words(found)[:1] for line in (said, "")]
    lines += [*as_markdown(quality(found)), "", *as_markdown(costs(found)), ""]
    lines += [line for said in words(found)[1:] for line in (said, "")]
    return "\n".join(lines)


def summary(comparisons: Sequence[Comparison]) -> str:
    """Several comparisons as one Markdown table: a row for each task, a column for each method.

    Where a task has test sets of its own, their mean is shown, not the held-out rows. p is of the paired test against
    the first method, on the held-out rows.
    """
    titles = list(dict.fromkeys(_column(entry) for found in comparisons for entry in found.entries))
    head = ["task", "metric", "rows", "seeds", UNTRAINED, *titles, "parameters (Lily)"]
    lines = [head]
    for found in comparisons:
        by_sets = MEAN in found.untrained_tests
        cells = {}
        for entry in found.entries:
            values = entry.tests[MEAN] if by_sets else entry.values
            p = "" if entry.test is None or by_sets else f" (p {entry.test.p:.2g})"
            cells[_column(entry)] = with_spread(found.metric, values[found.metric]) + p
        seeds = max(len(entry.seeds) for entry in found.entries)
        lily = next((e for e in found.entries if e.name.startswith("lily")), found.entries[0])
        untrained = found.untrained_tests[MEAN] if by_sets else found.untrained
        before = with_spread(found.metric, untrained[found.metric])
        rows = f"{len(found.untrained_tests) - 1} sets" if by_sets else f"{found.rows:,}"
        lines.append(
            [found.name, found.metric, rows, str(seeds), before, *(cells.get(t, "") for t in titles),
             f"{lily.parameters:,}"]
        )  # fmt: skip
    return "\n".join(as_markdown(lines))


def _column(entry: Entry) -> str:
    """Lily at its default routing is one column, whichever routing that is on a task."""
    return "Lily" if entry.name == "lily" else entry.title


def as_markdown(table: Table) -> list[str]:
    """The lines of a Markdown table."""
    made = [table[0], ["---"] * len(table[0]), *table[1:]]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in made]
