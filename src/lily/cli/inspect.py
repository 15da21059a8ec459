"""`lily inspect`: what a folder contains, which layers share what, the rank of the updates, what the routers do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer import Argument, Option

from lily.cli.deploy import Json, print_collapse, print_energies
from lily.cli.evaluate import RecipeOption
from lily.cli.progress import Verbose, progress
from lily.errors import LilyError
from lily.io.tables import fitting

if TYPE_CHECKING:
    from lily.analysis.rank import RankReport
    from lily.analysis.routing import RoutingReport
    from lily.insight.gather import Insight
    from lily.recipes.results.run_files import RunFigures

Folder = Annotated[str, Argument(metavar="ADAPTER", help="A run, adapter, exported LoRA, merged model or GGUF file.")]


def inspect_command(
    folder: Folder,
    data: Annotated[
        str | None,
        Option(
            help="File of rows to measure a data-dependent routing on, with the recipe's columns or, without a recipe, "
            "a column named text. Default: the held-out rows of a run."
        ),
    ] = None,
    rows: Annotated[int, Option(min=0, help="Maximum number of rows, a fixed random sample; 0 reads no data.")] = 256,
    report: Annotated[str | None, Option("--report", help="Write the analysis as an HTML page to this file.")] = None,
    threshold: Annotated[
        float, Option(help="The numerical rank counts singular values above this share of the largest.")
    ] = 0.01,
    recipe: RecipeOption = None,
    base: Annotated[
        str | None, Option(help="Folder of the base model. Default: as the recipe or adapter says.")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing page.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what a folder contains and where it came from; for an adapter also its sharing, rank and routing."""
    if not 0 < threshold < 1:
        raise LilyError(
            f"--threshold {threshold:g} must be a share of the largest singular value, between 0 and 1, such as 0.01"
        )
    if data is not None and rows == 0:
        raise LilyError("--rows 0 reads no data, so --data cannot be combined with it; drop one of them")
    with progress(verbose=verbose) as told, told.stage("", "analysis"), ExitStack() as stack:
        from lily.insight.gather import insight
        from lily.io.atomic import new_file

        page_file = stack.enter_context(new_file(report, overwrite)) if report is not None else None
        analysis = insight(folder, file=data, rows=rows, recipe=recipe, base=base, threshold=threshold)
        if page_file is not None:
            from lily.insight.page import page

            page_file.write_text(page(analysis), encoding="utf-8")
    if as_json:
        print(json.dumps(analysis.to_dict()))
        return
    _print(analysis, Console())
    if report is not None:
        Console().print(f"page: {escape(str(Path(report)))}", soft_wrap=True)


def _print(insight: Insight, console: Console) -> None:
    _print_facts(insight.facts, console)
    if insight.run is not None:
        _print_run(insight.run, console)
    if insight.plan is not None:
        _print_sharing(insight, console)
    if insight.rank is not None:
        _print_rank(insight, insight.rank, console)
    if insight.routing is not None:
        _print_routing(insight, insight.routing, console)
    for note in insight.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True, highlight=False)


def _print_facts(facts: Mapping[str, Any], console: Console) -> None:
    console.print(
        f"[bold]{escape(facts['folder'])}[/]: {escape(facts['kind'])}, {facts['bytes'] / 1e6:.2f} MB", soft_wrap=True
    )
    for name, value in facts.get("config", {}).items():
        console.print(f"  {escape(name)}: {escape(str(value))}", soft_wrap=True)
    for name, tensors in facts.get("tensors", {}).items():
        console.print(f"  {escape(name)}: {tensors['count']} tensors, {tensors['parameters']:,} parameters")
    if "static" in facts:
        console.print(f"  {escape(_ways(facts))}", soft_wrap=True, highlight=False)
    origin = facts.get("provenance", {})
    if origin:
        console.print("came from:")
        for name, value in origin.items():
            if name not in ("collapse", "plan", "energies"):
                console.print(f"  {escape(name)}: {escape(str(value))}", soft_wrap=True)
        for line in origin.get("plan", [])[:1]:
            console.print(f"  plan: {escape(line)}", soft_wrap=True)
        if origin.get("energies"):
            print_energies(origin["energies"], console)
    report = facts.get("collapse") or origin.get("collapse")
    if report:
        print_collapse(report, console)


def _ways(facts: Mapping[str, Any]) -> str:
    """How a Lily adapter can be used without further steps."""
    if "no_matrix" in facts:
        why = f"{facts['no_matrix']} adds what is no matrix, so it is not merged or exported"
        return why if facts["static"] else f"depends on the data; {why}, also as a static one"
    if 0 < (settled := facts["config"].get("settled", 0)) < 1:
        return f"depends on the data; its training is to end first, by which it becomes static (settled={settled:g})"
    if not facts["static"]:
        return "depends on the data; `lily collapse` makes it static"
    if facts["zero_routers"]:
        return "does not depend on the data: its routers are zero, as in an export for stock PEFT"
    return "merges and exports exactly"


def _print_run(run: RunFigures, console: Console) -> None:
    from lily.recipes.scoring.metrics import shown

    values = ", ".join(f"{name} {shown(name, value)}" for name, value in run.final.items())
    before = ", ".join(f"{name} {shown(name, value)}" for name, value in run.before.items())
    summary = f"recipe {run.name}, seed {run.seed}: {values} on the {run.split} rows ({before} before training)"
    console.print(escape(summary), soft_wrap=True, highlight=False)
    for name, metrics in run.baselines.items():
        values = ", ".join(f"{metric} {shown(metric, metrics[metric])}" for metric in run.final if metric in metrics)
        console.print(f"  {escape(name)}: {escape(values)}", highlight=False)


def _print_sharing(insight: Insight, console: Console) -> None:
    from lily.analysis.sentences import plan_words, short_names

    assert insight.plan is not None
    console.print(plan_words(insight.plan), highlight=False)
    table = Table("group", "layers that share an A", "experts", "r", title="who shares what", title_justify="left")
    for group in insight.plan.groups:
        names = dict(zip(group.members, short_names(group.members), strict=True))
        blocks = [names[b[0]] if len(b) == 1 else f"{names[b[0]]}-{names[b[-1]]}" for b in group.blocks]
        shown = blocks if len(blocks) <= 8 else [*blocks[:3], "...", blocks[-1]]
        shape = f"({group.out_features}, {group.in_features})"
        table.add_row(escape(f"{group.name} {shape}"), escape(" | ".join(shown)), str(group.num_B), str(group.r))
    console.print(table)


def _print_rank(insight: Insight, report: RankReport, console: Console) -> None:
    from lily.analysis.factored import grouped
    from lily.analysis.sentences import overlap_words, rank_words

    union = any(layer.union is not None for layer in report.layers)
    heads = [
        "group",
        "numerical",
        "effective",
        "stable",
        *(("union over tokens", "changes with data") if union else ()),
    ]
    rows = []
    for group, layers in grouped(report.layers).items():
        cells = [
            _span([v.expected.numerical_rank(report.threshold) for v in layers], "{:g}"),
            _span([v.expected.effective_rank for v in layers], "{:.1f}"),
            _span([v.expected.stable_rank for v in layers], "{:.1f}"),
        ]
        if union:
            cells.append(_span([v.union.numerical_rank(report.threshold) for v in layers if v.union], "{:g}"))
            cells.append("-" if report.assumed else _span([v.varying for v in layers], "{:.1%}"))
        rows.append([group, *cells])
    for table in fitting(heads, rows, console.width, title="rank of the updates, smallest to largest over layers"):
        console.print(table)
    console.print(rank_words(report, insight.lora, insight.equal_lora), highlight=False)
    if report.overlaps:
        console.print(overlap_words(report), highlight=False)
    if report.assumed:
        console.print(
            "The weights depend on the data, but no data were read: ranks are at equal weights, and the union covers "
            "everything the experts can span. Measure them with --data FILE.",
            highlight=False,
        )


def _span(values: list[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _print_routing(insight: Insight, report: RoutingReport, console: Console) -> None:
    from lily.analysis.sentences import most_by_label, routing_words

    over = f", over {insight.read}" if insight.read else ""
    console.print(escape(f"routing ({report.routing}){over}: {routing_words(report)}"), highlight=False)
    varying = [v for v in report.layers if v.variance is not None and v.variance.total > 0]
    chosen = most_by_label(varying)[:5] or sorted(varying, key=lambda v: -(v.variance.total if v.variance else 0))[:5]
    if not chosen:
        return
    parts = ["token", "sample", *(["class"] if report.compares_labels else [])]
    heads, rows = ["layer", "mean weights", "variance", *(f"share: {part}" for part in parts)], []
    for layer in chosen:
        v = layer.variance
        assert v is not None
        shares = [f"{v.share({'class': 'label'}.get(part, part)):.0%}" for part in parts]
        rows.append([layer.name, " ".join(f"{w:.2f}" for w in layer.mean), f"{v.total:.4f}", *shares])
    for table in fitting(heads, rows, console.width, title="routers that depend most on the data"):
        console.print(table)
