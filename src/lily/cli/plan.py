"""`lily plan`: what an adapter would share, train and cost, before a weight is read.

Three steps, each a function of the one before: a model on the meta device, a `PlanReport` (a value, made in
`lily.plan.report`), and its rendering as tables or JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lily.cli.meta_model import TASKS, model_from
from lily.errors import LilyError
from lily.plan.budget import parse_count
from lily.plan.report import GroupReport, PlanReport, Wish, plan_for
from lily.plan.specs import EXPERTS
from lily.recipes.dry_run import RecipeReport, is_recipe, recipe_report

TRAINED = (">>>", "<<<")  # no tokenizer's special tokens look like these, as [CLS] and <s> do like brackets
MOST_RUNS = 8  # blocks shown in a table; --json has them all


def render_plan(report: PlanReport, console: Console) -> None:
    """Print a report as tables."""
    console.print(
        f"[bold]{escape(report.model)}[/bold]: {as_count(report.model_parameters)} parameters ({report.dtype}), "
        f"{report.layers} layers adapted in {len(report.groups)} groups, routing {report.routing}"
    )
    console.print(_sharing_table(report))
    console.print(_cost_table(report))
    console.print(
        f"Training memory, estimated (batch {report.batch} x {report.tokens} tokens, Adam, no checkpointing): "
        f"{_memory(report)}",
        highlight=False,
    )
    options = ", ".join(f"{name}={value}" for name, value in report.options.items())
    console.print(f"\nWhy [bold]{options}[/bold]:")
    for sentence in report.reason:
        console.print(Text(f"- {sentence}"))


def _sharing_table(report: PlanReport) -> Table:
    table = Table(title="Who shares what", title_justify="left")
    table.add_column("group")
    table.add_column("shape (out, in)")  # of experts (experts, out, in), of an embedding (rows, out)
    table.add_column("layers", justify="right")
    table.add_column("layers that share an A", ratio=1)
    for name in ("experts", "r", "parameters"):
        table.add_column(name, justify="right")
    for name, alike in folded(report.groups).items():
        g, size = alike[0], sum(group.parameters for group in alike)
        layers = f"{len(alike)} x {g.layers}" if len(alike) > 1 else str(g.layers)
        table.add_row(escape(name), str(g.shape), layers, shorten(g.sharing), str(g.num_B), str(g.r), f"{size:,}")
    return table


def folded(groups: Sequence[GroupReport]) -> dict[str, list[GroupReport]]:
    """Groups by name; those of stacked experts, one for each layer, by their name with `*` for the layer's number."""
    rows: dict[str, list[GroupReport]] = {}
    for group in groups:
        name = group.name
        if group.kind == EXPERTS:
            name = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        kept = rows.setdefault(name, [])
        same = not kept or replace(group, name=kept[0].name, blocks=kept[0].blocks) == kept[0]
        if same and (not kept or group.kind == EXPERTS):
            kept.append(group)
        else:  # of another shape, in its own row
            rows[f"{group.name} {group.shape}"] = [group]
    return rows


def _cost_table(report: PlanReport) -> Table:
    compute, lora, parts = report.costs.compute, report.lora, report.parameters
    table = Table(title="What it costs", title_justify="left")
    table.add_column("")
    table.add_column("Lily", justify="right")
    table.add_column("LoRA, same budget", justify="right")
    table.add_row("rank", f"{report.options['r']} ({report.rank_advantage:.1f}x LoRA's)", str(lora.r))
    for part, label in (
        ("A", "A, shared by neighbours"),
        ("B", "B, shared by all"),
        ("router", "routers"),
    ):
        table.add_row(label, f"{parts[part]:,}", "")
    table.add_row("trainable parameters", f"{parts['total']:,}", f"{lora.parameters:,}")
    in_model = (report.share_of_model, lora.parameters / report.model_parameters)
    table.add_row("share of the model", *(f"{share:.3%}" for share in in_model))
    table.add_row(
        "multiply-adds, share of the adapted layers'",
        f"{compute.share:.1%} ({compute.form})",
        f"{lora.share_of_compute:.1%}",
    )
    sizes = (report.costs.checkpoint_bytes, lora.checkpoint_bytes)
    table.add_row("adapter file (float32)", *(as_bytes(size) for size in sizes))
    return table


def _memory(report: PlanReport) -> str:
    m = report.costs.memory
    return (
        f"about {as_bytes(m.total)} = frozen weights {as_bytes(m.weights)} + adapter with gradients and Adam "
        f"{as_bytes(m.adapter)} + activations {as_bytes(m.activations)}"
    )


def shorten(sharing: Sequence[str]) -> str:
    """`0-6 | 7-13`; of many blocks the first few and the last."""
    if len(sharing) <= MOST_RUNS:
        return " | ".join(sharing)
    return " | ".join([*sharing[:3], "...", sharing[-1]]) + f"  ({len(sharing)} A)"


def render_recipe(report: RecipeReport, console: Console) -> None:
    """Print the dry run of a recipe."""
    console.rule(escape(f"recipe {report.name}"), align="left")
    console.print(Text(report.recipe.rstrip()))
    console.rule("plan", align="left")
    if report.method != "lily":
        console.print(f"The recipe trains with method {report.method}; this is what its lily block would give.")
    render_plan(report.plan, console)
    if not report.preview:
        return
    console.rule("first example", align="left")
    marked = "in green" if console.is_terminal else f"between {TRAINED[0]} and {TRAINED[1]}"
    console.print(Text(f"The loss counts on the parts {marked} only."))
    console.print(preview_text(report.preview, terminal=console.is_terminal))


def preview_text(segments: Sequence[tuple[str, bool]], *, terminal: bool) -> Text:
    """The example with its label mask: trained parts green and the rest dim, or trained parts marked without colour."""
    text = Text()
    for segment, trained in segments:
        if terminal:
            text.append(segment, style="bold green" if trained else "dim")
        else:
            text.append(segment.join(TRAINED) if trained else segment)
    return text


def as_count(value: int) -> str:
    """`1234567` as `1.23M`."""
    return _scaled(value, ("", "k", "M", "B"), 2)


def as_bytes(value: int) -> str:
    """`1234567` as `1.2 MB`."""
    return _scaled(value, (" B", " KB", " MB", " GB"), 1)


def _scaled(value: int, units: Sequence[str], digits: int) -> str:
    power = min(int(math.log10(max(value, 1))) // 3, len(units) - 1)
    return f"{value / 1000**power:.{digits if power else 0}f}{units[power]}"


# --- the command ----------------------------------------------------------------------------------------------------


def names_or_regex(value: str | None) -> list[str] | str | None:
    """`q_proj,v_proj` as a list of names; `all-linear` and regular expressions as they are."""
    if value is None or value == "all-linear" or re.search(r"[][*+?^$()|\\{}]", value):
        return value
    return [name.strip() for name in value.split(",") if name.strip()]


def plan_command(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET", help="A recipe (name or YAML file), a model folder, a config.json or a hub id."
        ),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="For a recipe: key=value, such as lily.r=64.")] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="Modules to adapt: names with commas, a regular expression, or all-linear (default)."),
    ] = None,
    exclude: Annotated[
        str | None, typer.Option(help="Modules to leave out: names with commas, or an expression.")
    ] = None,
    target_parameters: Annotated[
        str | None,
        typer.Option(help="Parameters to adapt, such as experts.down_proj; alone, no modules. Names with commas."),
    ] = None,
    r: Annotated[int | None, typer.Option(help="Rank.")] = None,
    num_a: Annotated[int | None, typer.Option("--num-a", help="How many A per group.")] = None,
    stride_a: Annotated[int | None, typer.Option("--stride-a", help="Layers per A; instead of --num-a.")] = None,
    num_b: Annotated[int | None, typer.Option("--num-b", help="Experts per group.")] = None,
    params: Annotated[str | None, typer.Option(help="Budget such as 1.2M: chooses what is not given.")] = None,
    match_lora: Annotated[int | None, typer.Option(help="Budget: what LoRA of this rank has.")] = None,
    routing: Annotated[
        str | None, typer.Option(help="token, sequence, batch, static or uniform; default by model.")
    ] = None,
    task: Annotated[str | None, typer.Option(help=f"{', '.join(TASKS)}; default by the model's architecture.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sample, for the estimates. Default: 512, or the recipe's.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Samples of a step, for the estimates. Default: 8, or the recipe's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    recipe: Annotated[str | None, typer.Option("--recipe", hidden=True, help="The same as TARGET, a recipe.")] = None,
) -> None:
    """Show what an adapter shares, trains and costs, without loading weights; of a recipe, its dry run."""
    report: PlanReport | RecipeReport
    parameters = [name.strip() for name in (target_parameters or "").split(",") if name.strip()]
    asked: dict[str, Any] = {
        "targets": [] if targets is None and parameters else names_or_regex(targets),
        "target_parameters": parameters or None,
        "exclude": names_or_regex(exclude),
        "r": r,
        "num_A": num_a,
        "stride_A": stride_a,
        "num_B": num_b,
        "parameters": None if params is None else parse_count(params),
        "match_lora": match_lora,
        "routing": routing,
        "task": None if task is None else task.upper().replace("-", "_"),
    }
    given = {name: value for name, value in asked.items() if value is not None}
    target, overrides = _one_target(target, recipe, overrides or [])
    if recipe is not None or is_recipe(target):
        _no_options_with_recipe(given)
        report = recipe_report(target, overrides, batch=batch, tokens=tokens)
    else:
        if overrides:
            raise LilyError(f"{overrides[0]!r} changes a recipe, but {target} is a model; use options such as --r 64")
        given |= {name: value for name, value in (("batch", batch), ("tokens", tokens)) if value is not None}
        wish = Wish(**given)
        model, dtype = model_from(target, wish.task)
        report = plan_for(model, wish, name=target, dtype=dtype)
    _print(report, as_json)


def _one_target(target: str | None, recipe: str | None, overrides: list[str]) -> tuple[str, list[str]]:
    """What to plan, named in its place or by --recipe, and the changes to it."""
    if recipe is None:
        if target is None:
            raise LilyError("plan of what? Name a recipe (`lily recipes` lists them), a model folder or a hub id")
        return target, overrides
    if target is not None and not re.match(r"[\w.]+=", target):
        raise LilyError(f"--recipe {recipe} and {target} both say what to plan; give one of them")
    return recipe, [*([] if target is None else [target]), *overrides]


def _no_options_with_recipe(given: dict[str, Any]) -> None:
    if given:
        option = next(iter(given))
        flag = {"parameters": "params"}.get(option, option.lower().replace("_", "-"))
        raise LilyError(
            f"--{flag} is for models; change a recipe with key=value, such as lily.r=64 or targets=[q_proj]"
        )


def _print(report: PlanReport | RecipeReport, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    elif isinstance(report, RecipeReport):
        render_recipe(report, Console())
    else:
        render_plan(report, Console())
