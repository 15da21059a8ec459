"""`lily plan`: what an adapter would share, train and cost, before a weight is read.

A model on the meta device becomes a `PlanReport` (see `lily.plan.report`), a recipe a `RecipeReport` (see
`lily.recipes.dry_run`); both are printed as tables or JSON.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from typer import Argument, Option

from lily.cli.meta_model import TASKS, model_from
from lily.cli.plan_recipe import render_recipe
from lily.cli.plan_tables import render_plan
from lily.cli.progress import Verbose, progress
from lily.cli.train import Overrides
from lily.errors import LilyError

if TYPE_CHECKING:
    from lily.plan.report import PlanReport
    from lily.recipes.dry_run import RecipeReport


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
        int | None,
        Option(min=1, help="Tokens per sample, for the estimates. Default: 512, or a recipe's longest example."),
    ] = None,
    batch: Annotated[
        int | None, Option(min=1, help="Samples per step, for the estimates. Default: 8, or the recipe's.")
    ] = None,
    everything: Annotated[
        bool, Option("--all", help="Of a recipe: also every key with where it comes from, and all tables.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print the report as one JSON object.")] = False,
    recipe: Annotated[str | None, Option("--recipe", hidden=True, help="Recipe to plan; the same as TARGET.")] = None,
    verbose: Verbose = False,
) -> None:
    """Show what an adapter shares, trains and costs without loading weights; for a recipe, do a dry run."""
    target, overrides = _one_target(target, recipe, overrides or [])
    from lily.recipes import loader

    for_recipe = recipe is not None or loader.is_recipe(target)
    planned = loader.load_any(target, overrides) if for_recipe else None  # before what takes seconds to import
    report: PlanReport | RecipeReport
    with progress(verbose=verbose) as told, told.stage("", "planning"):
        from lily.plan.budget import parse_count
        from lily.plan.report import PlanRequest, plan_for
        from lily.recipes.dry_run import RecipeReport, recipe_report

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
        if planned is not None:
            if options:
                first = next(iter(options))
                flag = {"parameters": "params"}.get(first, first.lower().replace("_", "-"))
                raise LilyError(
                    f"--{flag} is for models; change a recipe with key=value, such as lily.r=64 or targets=[q_proj]"
                )
            report = recipe_report(planned, batch=batch, tokens=tokens)
        else:
            if overrides:
                raise LilyError(
                    f"{overrides[0]!r} changes a recipe, but {target} is a model; use options such as --r 64"
                )
            options |= {name: value for name, value in (("batch", batch), ("tokens", tokens)) if value is not None}
            request = PlanRequest(**options)
            model, dtype = model_from(target, request.task)
            report = plan_for(model, request, name=target, dtype=dtype)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    elif isinstance(report, RecipeReport):
        render_recipe(report, Console(), everything=everything)
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
