"""What the run brought: its result beside baselines, learning curves, what it gets wrong, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence

from lily.html import charts
from lily.html.charts import Series
from lily.html.matrices import confusion
from lily.html.page import Block, Case, Cases, Details, Figure, Grid, Heading, Table, curve_figure
from lily.insight.gather import Insight
from lily.recipes.results.card import adapter_costs, costs_of, values_of
from lily.recipes.results.review_table import class_line, headline
from lily.recipes.results.standing import GUESS, title_of
from lily.recipes.scoring.baselines import VALIDATION
from lily.recipes.scoring.metrics import LOWER_IS_BETTER, shown
from lily.recipes.scoring.review import Classes, Confused, Mistake

ONE_SEED = (
    "One seed; shares and correlations in percent. Another seed gives other values: a small difference may be chance."
)
MOST_DRAWN = 30  # classes of a confusion matrix that is drawn
OPEN = 5  # mistakes that are not folded
UNNAMED = "this adapter"


def result(insight: Insight) -> list[Block]:
    """The run's metrics beside its baselines."""
    run = insight.run
    if run is None or not run.final:
        return []
    names = list(run.final)
    rows = [
        ["untrained", *values_of(names, run.before), "", "", ""],
        *(
            [title_of(n, run.metric), *values_of(names, values), *costs_of(values)]
            for n, values in run.baselines.items()
        ),
    ]
    own = f"{UNNAMED} ({title_of(run.method)})"
    rows.append([own, *values_of(names, run.final), *costs_of(adapter_costs(run))])
    count = run.rows.get(run.split)
    on = f"{count:,.0f} {run.split} rows" if count else f"the {run.split} rows"
    heads = ["method", *names, "trained parameters", "seconds", "on disk"]
    return [Table(f"On {on}, seed {run.seed}", heads, rows, last_bold=True), ONE_SEED]


def training(insight: Insight) -> list[Block]:
    """Metric and loss over training, of all that were trained side by side."""
    own = insight.run
    if own is None:
        return []
    runs = [(f"{UNNAMED} ({title_of(own.method)})", "lora" if own.method == "lora" else "lily", own)]
    if insight.lora_run is not None:
        runs.append(("LoRA trained beside it", "lora", insight.lora_run))
    unit, label = (1.0, own.metric) if own.metric in LOWER_IS_BETTER else (100.0, f"{own.metric} (%)")
    levels = [
        (unit * values[VALIDATION], title_of(name))
        for name, values in own.baselines.items()
        if VALIDATION in values and name != GUESS
    ]
    caption = "At each evaluation; the best adapter was kept."
    if levels:
        caption += " Dashed: baselines that do not train in steps, on the same rows."
    curves = [(name, style, [(step, unit * value) for step, value in run.evaluations]) for name, style, run in runs]
    losses = [(name, style, run.losses) for name, style, run in runs]
    figures = [
        *_curves(curves, f"{own.metric} on the validation rows", caption, label, levels),
        *_curves(losses, "Training loss", "Training loss, as the trainer logged it.", "loss"),
    ]
    return [Grid(figures)] if figures else []


def _curves(
    curves: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    title: str,
    caption: str,
    label: str,
    levels: Sequence[tuple[float, str]] = (),
) -> list[Figure]:
    """A figure of curves (name, style, points), if one has points."""
    series = [Series(name, style, tuple(points)) for name, style, points in curves if points]
    chart = charts.lines(series, title, caption, "optimizer step", label, levels=levels)
    return [] if chart is None else [curve_figure(chart, series, "step")]


def wrong(insight: Insight) -> list[Block]:
    """Confusion, scores by class, and the worst mistakes."""
    run = insight.run
    if run is None or run.review is None:
        return []
    out: list[Block] = []
    if run.review.classes is not None:
        beside = insight.lora_run.review if insight.lora_run is not None else None
        out += _classes(run.review.classes, None if beside is None else beside.classes, run.split)
    if run.review.mistakes:
        out += _mistakes(run.review.mistakes, run.review.classes is not None, run.split)
    return out


def _classes(classes: Classes, lora: Classes | None, split: str) -> list[Block]:
    names = [score.name for score in classes.scores]
    out: list[Block] = []
    if classes.confusion is not None and len(names) <= MOST_DRAWN:
        title, caption = f"Confusion on the {split} rows", (
            "Rows by expected class (down) and predicted class (across). The shade is the share of the expected class; "
            "on the diagonal the class is recognized, elsewhere it is taken for another."
        )  # fmt: skip
        lines = [[name, *map(str, line)] for name, line in zip(names, classes.confusion, strict=True)]
        numbers = Table(title, ["expected", *names], lines)
        chart = confusion(names, classes.confusion, title, caption)
        out.append(Figure(title, chart, caption, numbers, wide=True))
    f1 = {score.name: shown("f1", score.f1) for score in lora.scores} if lora is not None else {}
    heads = ["class", "precision", "recall", "F1", *(["F1 of LoRA"] if f1 else []), "rows", "predicted"]
    lines = [class_line(score) for score in classes.scores]
    rows = [[*line[:4], *([f1.get(line[0], "-")] if f1 else []), *line[4:]] for line in lines]
    table = Table("By class, in percent", heads, rows)
    out.append(table if len(rows) <= MOST_DRAWN else Details(f"All {len(rows)} classes", table))
    return [*out, *_confused(classes.confused if len(names) > 2 else ())]


def _confused(pairs: Sequence[Confused]) -> list[Block]:
    if not pairs:
        return []
    rows = [[pair.expected, pair.predicted, f"{pair.rows:,}"] for pair in pairs]
    heads = ["expected", "predicted", "rows"]
    return [Details("Classes that are confused most often", Table("Most frequent first", heads, rows, numbers_from=2))]


def _mistakes(mistakes: Sequence[Mistake], of_classes: bool, split: str) -> list[Block]:
    title = "The most confident mistakes" if of_classes else "The largest errors"
    which = "in which the model is surest of a wrong class" if of_classes else "with the largest difference"
    about = (
        f"The {split} rows {which}: wrong labels, and rows that say too little, are often among them. "
        "predictions.json has every row."
    )
    cases = [Case(headline(mistake), [("", mistake.input)]) for mistake in mistakes]
    out: list[Block] = [Heading(title), about, Cases(cases[:OPEN])]
    return [*out, Details(f"{len(cases) - OPEN} more", Cases(cases[OPEN:]))] if len(cases) > OPEN else out


def answers(insight: Insight) -> list[Block]:
    """The samples before and after training in full, and the lengths of answers."""
    run = insight.run
    if run is None:
        return []
    lengths = None if run.review is None else run.review.answers
    out: list[Block] = [] if lengths is None else [lengths.words()]
    if lengths is not None and (warning := lengths.warning()):
        out.append(f"Warning: {warning}.")
    names = {"prompt": "prompt", "expected": "expected", "before": "before training", "after": "after training"}
    cases = [
        Case(
            f"Sample {number}",
            [
                (f"{title}, cut at generation.max_new_tokens" if name in sample["cut"] else title, sample[name])
                for name, title in names.items()
                if name in sample
            ],
        )
        for number, sample in enumerate(run.samples, 1)
    ]
    return [*out, Cases(cases)] if cases else out
