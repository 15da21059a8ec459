"""Tables of a comparison and sentences about it, for Markdown and the terminal; one table of several comparisons."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lily.analysis.seeds import spread
from lily.compare.result import Comparison, Entry
from lily.io import tables as text_tables
from lily.recipes.scoring.metrics import LOWER_IS_BETTER, shown
from lily.recipes.spec.schema import MEAN

UNTRAINED = "untrained"
SIGNIFICANT = 0.05
Table = list[list[str]]  # the first line is the header


def quality(comparison: Comparison) -> Table:
    """The metrics: a row for the untrained model, then a row per method; columns of tests where there are several."""
    forgot = any(entry.forgetting for entry in comparison.entries)
    tested = [f"against {comparison.entries[0].title}", "p"] if len(comparison.entries) > 1 else []
    lines = [["", *comparison.metrics, *tested, *["forgetting"] * forgot]]
    untrained = [with_spread(m, comparison.untrained[m]) for m in comparison.metrics]
    lines.append([UNTRAINED, *untrained, *[""] * len(tested), *[""] * forgot])
    for entry in comparison.entries:
        test = entry.test
        against = ["", ""] if entry is comparison.entries[0] else ["-", "-"]
        if test is not None:
            against = [
                f"{_difference(comparison.metric, test.difference)} ({_interval(comparison, entry)})",
                f"{test.p:.2g}",
            ]
        values = [with_spread(m, entry.values[m]) for m in comparison.metrics]
        forgetting = with_spread("loss", entry.forgetting) if entry.forgetting else ""
        lines.append([entry.title, *values, *against[: len(tested)], *[forgetting] * forgot])
    return lines


def costs(comparison: Comparison) -> Table:
    """Size, settings, time and memory of each method."""
    lines = [["", "rank", "trained", "rate", "scale", "s", "peak MB", "file MB"]]
    for entry in comparison.entries:
        lines.append(
            [
                entry.title,
                "" if entry.rank is None else str(entry.rank),
                f"{entry.parameters:,}" if entry.parameters else "",
                f"{entry.learning_rate:g}",
                "" if entry.factor is None else f"{entry.factor:.3g}",
                f"{entry.seconds:.0f}",
                f"{entry.peak_bytes / 1e6:,.0f}" if entry.peak_bytes else "",
                f"{entry.adapter_bytes / 1e6:.2f}" if entry.adapter_bytes else "",
            ]
        )
    return lines


def _interval(comparison: Comparison, entry: Entry) -> str:
    assert entry.test is not None
    return f"{_difference(comparison.metric, entry.test.low)} to {_difference(comparison.metric, entry.test.high)}"


def _difference(metric: str, value: float) -> str:
    return f"{value:+.4f}" if metric in LOWER_IS_BETTER else f"{100 * value:+.1f}"


def with_spread(metric: str, values: Sequence[float]) -> str:
    """`84.1 ± 0.6`: mean and standard deviation over the seeds."""
    mean, deviation = shown(metric, statistics.fmean(values)), spread(values)
    return mean if deviation is None else f"{mean} ± {shown(metric, deviation)}"


def verdict(comparison: Comparison, entry: Entry) -> str:
    """How a method compares with the first one, in a sentence."""
    first, test = comparison.entries[0].title, entry.test
    assert test is not None
    size = _difference(comparison.metric, abs(test.difference)).removeprefix("+")
    lower = comparison.metric in LOWER_IS_BETTER
    if test.p >= SIGNIFICANT:
        return f"{entry.title} and {first} do not differ by more than these rows can show (p {test.p:.2g})."
    ahead, behind = (entry.title, first) if (test.difference < 0) == lower else (first, entry.title)
    return f"{ahead} is better than {behind} by {size} {comparison.metric} (p {test.p:.2g})."


def scores(comparison: Comparison) -> str:
    """The main metric of every method, in the order of the comparison."""
    metric = comparison.metric
    listed = ", ".join(f"{entry.title} {with_spread(metric, entry.values[metric])}" for entry in comparison.entries)
    unit = metric if metric in LOWER_IS_BETTER else f"{metric} in percent"
    return f"{listed} ({unit})."


def verdicts(comparison: Comparison) -> list[str]:
    """How each method that was tested compares with the first; what there is not to compare."""
    entries = comparison.entries
    if len(entries) == 1:
        said = [f"Only {entries[0].title} has results: there is nothing to compare it with."]
    else:
        said = [verdict(comparison, entry) for entry in entries[1:] if entry.test is not None]
    return said + [_one_class(entry) for entry in entries if entry.one_class]


def _one_class(entry: Entry) -> str:
    of = "" if entry.one_class == len(entry.seeds) else f" with {entry.one_class} of {len(entry.seeds)} seeds"
    return f"{entry.title} predicts one class for every row{of}, so it tells no classes apart."


def words(comparison: Comparison) -> list[str]:
    """What the table compares, the result, and how to read it."""
    return [
        about(comparison),
        *verdicts(comparison),
        *reading(comparison),
        *(f"{run} failed: {why}" for run, why in comparison.failed.items()),
    ]


def about(comparison: Comparison) -> str:
    """What is compared, in a sentence."""
    seeds = sorted({seed for entry in comparison.entries for seed in entry.seeds})
    budget = {"params": "at equal parameters: each method has the largest rank with no more of them than Lily",
              "rank": "at equal rank"}.get(str(comparison.setting.get("equal")), "")  # fmt: skip
    if len(comparison.entries) == 1:
        budget = ""
    if any("/" in entry.name for entry in comparison.entries):
        budget += "; 1/N: an N-th of these parameters"
    text = f"{comparison.name} ({comparison.task}): {comparison.rows:,} {comparison.split} rows, "
    text += f"{comparison.trained_on:,} training rows, {_seeds(seeds)}, {comparison.device}, {comparison.precision}"
    return f"{text}; {budget}".rstrip("; ") + "."


def reading(comparison: Comparison) -> list[str]:
    """How to read the tables."""
    several = len({seed for entry in comparison.entries for seed in entry.seeds}) > 1
    sentences = []
    if several:
        sentences.append("Mean and standard deviation over seeds; seconds and sizes are of one run.")
    tests = sorted({entry.test.test for entry in comparison.entries if entry.test is not None})
    if tests:
        sentences.append(
            f"p: {' or '.join(tests)} on the same rows against {comparison.entries[0].title}, with the 95% interval "
            "of the difference over rows; another seed may differ by more"
            + (" (see the standard deviation)." if several else ".")
        )
    if any(entry.test is None for entry in comparison.entries[1:]):
        sentences.append("-: not tested (no common seed or rows, or a result that is not finite).")
    if any(entry.forgetting for entry in comparison.entries):
        sentences.append("Forgetting: increase of the loss on general text, in nats per token; less is better.")
    if comparison.setting.get("tune"):
        where = (
            "validation rows"
            if comparison.split != "validation"
            else "the rows of this table (the recipe has no others)"
        )
        sentences.append(
            f"Learning rate and scale of each method were chosen by the same search on {where}, with one seed."
        )
    return sentences


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"


def markdown(comparison: Comparison) -> str:
    """The comparison as Markdown."""
    lines = [f"# {comparison.name}: {' / '.join(entry.title for entry in comparison.entries)}", ""]
    lines += [line for sentence in words(comparison)[:1] for line in (sentence, "")]
    for header, *rows in (quality(comparison), costs(comparison)):
        lines += [text_tables.markdown(header, rows), ""]
    lines += [line for sentence in words(comparison)[1:] for line in (sentence, "")]
    return "\n".join(lines)


def summary(comparisons: Sequence[Comparison]) -> str:
    """Several comparisons as one Markdown table: a row for each task, a column for each method.

    Where a task has further test sets, their mean is shown instead of the held-out rows. p belongs to the paired test
    against the first method, on the held-out rows. `rate (scale)` has the learning rate and what multiplies the update
    of each method, in the order of the columns.
    """
    titles = list(dict.fromkeys(_column(entry) for comparison in comparisons for entry in comparison.entries))
    head = ["task", "metric", "rows", "seeds", UNTRAINED, *titles, "rate (scale)", "parameters (Lily)"]
    lines = []
    for comparison in comparisons:
        by_sets = MEAN in comparison.untrained_tests
        cells, terms = {}, {}
        for entry in comparison.entries:
            scale = "" if entry.factor is None else f" ({entry.factor:.3g})"
            terms[_column(entry)] = f"{entry.learning_rate:g}{scale}"
            values = entry.tests[MEAN] if by_sets else entry.values
            p = "" if entry.test is None or by_sets else f" (p {entry.test.p:.2g})"
            cells[_column(entry)] = with_spread(comparison.metric, values[comparison.metric]) + p
        seeds = max(len(entry.seeds) for entry in comparison.entries)
        lily = next(
            (e for e in comparison.entries if e.name.startswith("lily") and "/" not in e.name), comparison.entries[0]
        )
        untrained = comparison.untrained_tests[MEAN] if by_sets else comparison.untrained
        before = with_spread(comparison.metric, untrained[comparison.metric])
        rows = f"{len(comparison.untrained_tests) - 1} sets" if by_sets else f"{comparison.rows:,}"
        lines.append(
            [comparison.name, comparison.metric, rows, str(seeds), before, *(cells.get(t, "") for t in titles),
             ", ".join(terms[t] for t in titles if t in terms), f"{lily.parameters:,}"]
        )  # fmt: skip
    return text_tables.markdown(head, lines)


def _column(entry: Entry) -> str:
    """Lily at its default routing is one column, though the routing depends on the task."""
    return "Lily" if entry.name == "lily" else entry.title
