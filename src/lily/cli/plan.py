"""`lily plan`: what an adapter would share, train and cost, before a weight is read.

A model on the meta device becomes a `PlanReport` (see `lily.plan.report`), which is printed as tables or JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from lily.cli.meta_model import TASKS, model_from
from lily.cli.train import Overrides
from lily.errors import LilyError

if TYPE_CHECKING:
    from lily.plan.report import GroupReport, PlanReport
    from lily.recipes.dry_run import RecipeReport

TRAINED = (">>>", "<<<")  # unlike brackets, these are not mistaken for special tokens such as [CLS] and <s>
MOST_RUNS = 8  # blocks shown in a table; --json has all of them


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
    table.add_column("shape (out, in)")  # experts: (experts, out, in); embedding: (rows, out)
    table.add_column("layers", justify="right")
    table.add_column("layers that share an A", ratio=1)
    for name in ("experts", "r", "parameters"):
        table.add_column(name, justify="right")
    for name, groups in folded(report.groups).items():
        g, size = groups[0], sum(group.parameters for group in groups)
        layers = f"{len(groups)} x {g.layers}" if len(groups) > 1 else str(g.layers)
        table.add_row(escape(name), str(g.shape), layers, shorten(g.sharing), str(g.num_B), str(g.r), f"{size:,}")
    return table


def folded(groups: Sequence[GroupReport]) -> dict[str, list[GroupReport]]:
    """Groups by name; stacked experts have a group per layer, so these share a row with `*` as the layer's number."""
    from lily.plan.specs import EXPERTS

    rows: dict[str, list[GroupReport]] = {}
    for group in groups:
        name = group.name
        if group.kind == EXPERTS:
            name = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        row = rows.setdefault(name, [])
        same = not row or replace(group, name=row[0].name, blocks=row[0].blocks) == row[0]
        if same and (not row or group.kind == EXPERTS):
            row.append(group)
        else:  # a different shape gets a separate row
            rows[f"{group.name} {group.shape}"] = [group]
    return rows


def _cost_table(report: PlanReport) -> Table:
    compute, lora, parts = report.costs.compute, report.lora, report.parameters
    table = Table(title="What it costs", title_justify="left")
    table.add_column("")
    table.add_column("Lily", justify="right")
    table.add_column("LoRA, same budget", justify="right")
    table.add_row("rank", f"{report.options['r']} ({report.rank_advantage:.1f}x LoRA's)", str(lora.r))
    table.add_row("scale of the update", f"{report.scaling:.3g}", f"{lora.scale:.3g}")
    for part, label in (("A", "A, shared by neighbors"), ("B", "B, shared by all"), ("router", "routers")):
        table.add_row(label, f"{parts[part]:,}", "")
    if parts["own"]:
        table.add_row("gains, and A and B of each layer's own", f"{parts['own']:,}", "")
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
    """Blocks as `0-6 | 7-13`; of many, the first three and the last."""
    if len(sharing) <= MOST_RUNS:
        return " | ".join(sharing)
    return " | ".join([*sharing[:3], "...", sharing[-1]]) + f"  ({len(sharing)} A)"


def render_recipe(report: RecipeReport, console: Console) -> None:
    """Print the dry run of a recipe."""
    from lily.recipes.results.data_table import print_data

    console.rule(escape(f"recipe {report.name}"), align="left")
    console.print(Text(report.recipe.rstrip()))
    console.rule("plan", align="left")
    if report.method != "lily":
        console.print(f"The recipe trains with method {report.method}; this is the plan of its section lily.")
    render_plan(report.plan, console)
    if report.learning_rates:
        rates = ", ".join(f"{part} {rate:g}" for part, rate in report.learning_rates.items())
        console.print(f"\nLearning rates of the parts: {rates}", highlight=False)
    if report.data is not None or report.no_data:
        console.rule("data", align="left")
    if report.data is not None:
        print_data(report.data, console)
    elif report.no_data:
        console.print(Text(f"The data were not looked at: {report.no_data}"))
    if not report.preview:
        return
    console.rule("first example", align="left")
    marked = "in green" if console.is_terminal else f"between {TRAINED[0]} and {TRAINED[1]}"
    console.print(Text(f"The loss counts on the parts {marked} only."))
    console.print(preview_text(report.preview, terminal=console.is_terminal))


def preview_text(segments: Sequence[tuple[str, bool]], *, terminal: bool) -> Text:
    """The example with its label mask: trained parts in green on a terminal, else between markers."""
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
    """Split `q_proj,v_proj` into names; `all-linear` and regular expressions stay text."""
    if value is None or value == "all-linear" or re.search(r"[][*+?^$()|\\{}]", value):
        return value
    return [name.strip() for name in value.split(",") if name.strip()]


def plan_command(
    target: Annotated[
        str | None,
        Argument(metavar="TARGET", help="A recipe (name or YAML file), a model folder, a config.json or a hub id."),
    ] = None,
    overrides: Overrides = None,
    targets: Annotated[
        str | None, Option(help="Modules to adapt: names with commas, a regular expression, or all-linear (default).")
    ] = None,
    exclude: Annotated[str | None, Option(help="Modules to leave out: names with commas, or a regex.")] = None,
    target_parameters: Annotated[
        str | None,
        Option(
            help="Parameters to adapt, such as experts.down_proj, separated by commas; without --targets, no modules."
        ),
    ] = None,
    r: Annotated[int | None, Option(help="Rank of the update.")] = None,
    num_a: Annotated[int | None, Option("--num-a", help="Number of A per group.")] = None,
    stride_a: Annotated[int | None, Option("--stride-a", help="Layers that share an A; instead of --num-a.")] = None,
    num_b: Annotated[int | None, Option("--num-b", help="Number of experts B per group.")] = None,
    params: Annotated[
        str | None, Option(help="Parameter budget such as 1.2M, from which r, num_A and num_B follow if not set.")
    ] = None,
    match_lora: Annotated[int | None, Option(help="Use the size of LoRA of this rank as the parameter budget.")] = None,
    routing: Annotated[
        str | None, Option(help="token, sequence, batch, static or uniform. Default: by the model.")
    ] = None,
    distinct: Annotated[
        str | None,
        Option(help="Fixed difference between layers: none, permute, signs or permute+signs. Default: permute."),
    ] = None,
    gain: Annotated[
        str | None,
        Option(help="Learned gain per layer and rank: starts at ones, signs or half-signs. Default: none."),
    ] = None,
    own_r: Annotated[int | None, Option(help="Rank of an A and B of each layer's own. Default: 0.")] = None,
    task: Annotated[str | None, Option(help=f"Task: {', '.join(TASKS)}. Default: by the model's architecture.")] = None,
    tokens: Annotated[
        int | None, Option(min=1, help="Tokens per sample, for the estimates. Default: 512, or the recipe's.")
    ] = None,
    batch: Annotated[
        int | None, Option(min=1, help="Samples per step, for the estimates. Default: 8, or the recipe's.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print the report as one JSON object.")] = False,
    recipe: Annotated[str | None, Option("--recipe", hidden=True, help="Recipe to plan; the same as TARGET.")] = None,
) -> None:
    """Show what an adapter shares, trains and costs without loading weights; for a recipe, do a dry run."""
    target, overrides = _one_target(target, recipe, overrides or [])
    from lily.recipes import loader

    for_recipe = recipe is not None or loader.is_recipe(target)
    if for_recipe:
        loader.load_any(target, overrides)  # its checks, before anything that takes seconds to import
    from lily.plan.budget import parse_count
    from lily.plan.report import PlanRequest, plan_for
    from lily.recipes.dry_run import RecipeReport, recipe_report

    report: PlanReport | RecipeReport
    parameters = [name.strip() for name in (target_parameters or "").split(",") if name.strip()]
    values: dict[str, Any] = {
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
        "distinct": distinct,
        "gain": gain,
        "own_r": own_r,
        "task": None if task is None else task.upper().replace("-", "_"),
    }
    options = {name: value for name, value in values.items() if value is not None}
    if for_recipe:
        if options:
            first = next(iter(options))
            flag = {"parameters": "params"}.get(first, first.lower().replace("_", "-"))
            raise LilyError(
                f"--{flag} is for models; change a recipe with key=value, such as lily.r=64 or targets=[q_proj]"
            )
        report = recipe_report(target, overrides, batch=batch, tokens=tokens)
    else:
        if overrides:
            raise LilyError(f"{overrides[0]!r} changes a recipe, but {target} is a model; use options such as --r 64")
        options |= {name: value for name, value in (("batch", batch), ("tokens", tokens)) if value is not None}
        request = PlanRequest(**options)
        model, dtype = model_from(target, request.task)
        report = plan_for(model, request, name=target, dtype=dtype)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    elif isinstance(report, RecipeReport):
        render_recipe(report, Console())
    else:
        render_plan(report, Console())


def _one_target(target: str | None, recipe: str | None, overrides: list[str]) -> tuple[str, list[str]]:
    """The target, which may also be the value of --recipe, and the overrides."""
    if recipe is None:
        if target is None:
            raise LilyError("no TARGET; name a recipe (`lily recipes` lists them), a model folder or a hub id")
        return target, overrides
    if target is not None and not re.match(r"[\w.]+=", target):
        raise LilyError(f"--recipe {recipe} and TARGET {target} both name what to plan; use one of them")
    return recipe, [*([] if target is None else [target]), *overrides]
