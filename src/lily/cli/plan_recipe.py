"""`lily plan RECIPE`, for people: what they decide on comes first, with the recipe that each value comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lily.cli.plan_tables import as_bytes, as_count, render_plan, shorten

if TYPE_CHECKING:
    from lily.plan.sharing_plan import Group
    from lily.recipes.dry_run import RecipeReport
    from lily.recipes.pace import Pace
    from lily.recipes.spec.locations import Key

TRAINED = (">>>", "<<<")  # unlike brackets, these are not mistaken for special tokens such as [CLS] and <s>
MARGIN = 76  # columns of the recipe before a mark
SLOWER = 2  # a whole step over its linear layers: up to this
WIDE = 80  # columns of a line about sharing
WITHOUT_LOSS = ("exact_match", "accuracy", "accuracy_norm")  # of sft, generated or scored: not in the estimate

Row = tuple[str, str, Sequence["Key"]]  # what, its value, the keys that decide it


def render_recipe(report: RecipeReport, console: Console, *, everything: bool = False) -> None:
    """Print the dry run of a recipe; `everything` adds its keys with their origins, and the tables of the plan."""
    from lily.recipes.results.data_table import print_data

    origins = _origins(report)
    console.print(Text.assemble((report.name, "bold"), f": {_task(report)}{_bases(report, origins)}"))
    if report.data is not None or report.no_data:
        console.rule("data", align="left")
    if report.data is not None:
        print_data(report.data, console)
    elif report.no_data:
        console.print(Text(f"The data were not looked at: {report.no_data}"))
    console.rule("training", align="left")
    table = Table(box=None, pad_edge=False, show_header=True)
    table.add_column("", no_wrap=True)
    table.add_column("", ratio=1, overflow="fold")
    table.add_column("from", overflow="fold", max_width=20)
    for what, value, keys in _decisions(report):
        table.add_row(what, escape(value), escape(_from(keys, origins) if keys else ""))
    console.print(table)
    for warning in _warnings(report):
        console.print(Text(f"warning: {warning}", style="yellow"))
    console.rule("who shares what", align="left")
    for line in sharing(report):
        console.print(Text(line))
    if everything:
        console.rule("recipe", align="left")
        console.print(Text(marked(report.recipe.rstrip(), origins)))
        console.rule("plan", align="left")
        if report.method != "lily":
            console.print(f"The recipe trains with method {report.method}; this is the plan of its section lily.")
        render_plan(report.plan, console)
    if report.preview:
        console.rule("first example", align="left")
        shown = "in green" if console.is_terminal else f"between {TRAINED[0]} and {TRAINED[1]}"
        console.print(Text(f"The loss counts on the parts {shown} only."))
        console.print(preview_text(report.preview, terminal=console.is_terminal))
    if not everything:
        console.print(Text("\n--all shows every key of the recipe and where it comes from, the costs, and why."))


def preview_text(segments: Sequence[tuple[str, bool]], *, terminal: bool) -> Text:
    """The example with its label mask: trained parts in green on a terminal, else between markers."""
    text = Text()
    for segment, trained in segments:
        if terminal:
            text.append(segment, style="bold green" if trained else "dim")
        else:
            text.append(segment.join(TRAINED) if trained else segment)
    return text


# --- where values come from -----------------------------------------------------------------------------------------


def _origins(report: RecipeReport) -> Mapping[Key, str]:
    from lily.recipes import loader

    return {} if report.source is None else loader.origins(report.source)


def _bases(report: RecipeReport, origins: Mapping[Key, str]) -> str:
    own = origins.get(("name",), report.name).partition(":")[0]
    bases = [name for name in dict.fromkeys(origins.values()) if name not in (own, report.name, "command line")]
    bases = [name for name in bases if not name.startswith(f"{own}:")]
    return f"; inherits from {', '.join(bases)}" if bases else ""


def _from(keys: Sequence[Key], origins: Mapping[Key, str]) -> str:
    """The origins of these keys, or of what is written in them; `default` if none is written."""
    found = [
        origin for key in keys for written, origin in origins.items() if written == key or written[: len(key)] == key
    ]
    return ", ".join(dict.fromkeys(found)) or "default"


def marked(recipe: str, origins: Mapping[Key, str]) -> str:
    """A recipe in YAML, with the origin of each key as a comment; keys without one have their defaults."""
    import yaml

    lines = recipe.split("\n")

    def mark(node: yaml.Node | None, at: Key) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            here = (*at, key.value)
            if isinstance(value, yaml.MappingNode) and value.value:
                mark(value, here)
            elif here in origins:
                number, said = key.start_mark.line, f"# {origins[here]}"
                if isinstance(value, yaml.ScalarNode) and value.end_mark.line > number:
                    # within a text of several lines a comment would end it, or be a part of it
                    lines[number] = f"{' ' * key.start_mark.column}{said}\n{lines[number]}"
                else:
                    lines[number] = f"{lines[number]:<{MARGIN - len(origins[here])}}  {said}"

    mark(yaml.compose(recipe, Loader=yaml.SafeLoader), ())
    return "\n".join(lines)


# --- what a person decides on ---------------------------------------------------------------------------------------


def _task(report: RecipeReport) -> str:
    task = "" if report.source is None else f"{report.source.task} "
    return f"{task}by method {report.method}"


def _decisions(report: RecipeReport) -> Iterator[Row]:
    plan, source = report.plan, report.source
    model = re.sub(r"^(\S*/)(\S+)(?= of )", lambda found: found[2], plan.model)
    if len(model) > 60:
        model = PurePath(model).name
    yield "model", f"{model}, {as_count(plan.model_parameters)} parameters, {plan.dtype}", [("model",)]
    pace = None
    if report.work is not None and source is not None:
        from lily.recipes.pace import measure

        pace = measure(report.work, source.train.batch_size)
    if (schedule := report.schedule) is not None:
        epochs = ""
        if schedule.per_epoch is not None:
            number = f"{schedule.steps / schedule.per_epoch:.3g}"
            epochs = f" = {number} {'epoch' if number == '1' else 'epochs'} of {schedule.per_epoch:,}"
        keys = [("train", name) for name in ("epochs", "max_steps", "batch_size", "gradient_accumulation")]
        yield "steps", f"{schedule.steps:,}{epochs}, of {schedule.batch} rows each", keys
        yield "evaluations", _evaluations(report, schedule.evaluations), [("train", "evaluate_every"), ("metrics",)]
    yield "time", _time(report, pace), []
    memory = plan.costs.memory
    free = "" if pace is None else f"; {as_bytes(pace.free)} are free here"
    yield (
        "memory",
        f"about {as_bytes(memory.total)}, an estimate ({plan.batch} rows of {plan.tokens} tokens: weights "
        f"{as_bytes(memory.weights)}, adapter {as_bytes(memory.adapter)}, activations "
        f"{as_bytes(memory.activations)}){free}",
        [],
    )
    if source is None:
        return
    rates = ", ".join(f"{t.name} {t.rate:g}" for t in report.terms)
    decided = [*(t.rate_key for t in report.terms), ("train", "schedule")]
    yield "learning rate", f"{rates}{_parts(report)}; {_course(report)}".removeprefix(", "), decided
    scales = [t for t in report.terms if t.scale is not None]
    if scales:
        shown = ", ".join(f"{t.name} {t.scale:.3g}" + (f" (rank {t.rank})" if t.rank else "") for t in scales)
        yield "scale", f"{shown}: what multiplies the update", [t.scale_key for t in scales if t.scale_key]
    if source.baselines:
        yield "baselines", ", ".join(source.baselines), [("baselines",)]
    lora, total = plan.lora, plan.parameters["total"]
    yield (
        "parameters",
        f"{total:,} train ({plan.share_of_model:.2%} of the model), rank {plan.options['r']}; LoRA of rank {lora.r} "
        f"has {lora.parameters:,}",
        [("lily", name) for name in ("r", "num_A", "stride_A", "num_B", "params")],
    )


def _evaluations(report: RecipeReport, count: int) -> str:
    if report.data is None:
        return str(count)
    rows = {part.name: part.used for part in report.data.parts}
    text = f"{count:,} on {rows.get('validation', 0):,} validation rows"
    held_out = "test" if "test" in rows else "validation"
    return f"{text}, and the {rows.get(held_out, 0):,} {held_out} rows before and after training"


def _time(report: RecipeReport, pace: Pace | None) -> str:
    if report.schedule is None:
        return "not estimated: the rows were not read, so the number of steps is open"
    if pace is None or report.data is None:
        return "not estimated: this model's time is not in its linear layers, or its weights are not described here"
    schedule, rows = report.schedule, {part.name: part.used for part in report.data.parts}
    train = schedule.steps * schedule.batch * pace.step
    held_out = rows.get("test") or rows.get("validation", 0)
    judged = pace.forward * (schedule.evaluations * rows.get("validation", 0) + 2 * held_out)
    text = f"{duration(train)} to {duration(SLOWER * train)} of steps, {duration(judged)} to "
    text += f"{duration(SLOWER * judged)} of evaluations: an estimate from linear layers of this size, timed on "
    text += pace.device
    source = report.source
    metrics = () if source is None else getattr(source, "metrics", ())
    if source is not None and source.task == "sft" and set(metrics) & set(WITHOUT_LOSS):
        text += "; generated and scored answers come on top"
    if source is not None and "lora" in source.baselines and report.method != "lora":
        text += "; the baseline lora takes about as long again"
    return text


def duration(seconds: float) -> str:
    """Seconds in the unit that people use, in two digits: an estimate has no more."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{max(1, float(f'{seconds:.2g}')):g} s"


def _parts(report: RecipeReport) -> str:
    """Rates of single parts, where they differ from the adapter's."""
    from lily.recipes import methods

    assert report.source is not None
    parts = dict(report.learning_rates)
    head = methods.learning_rates(report.source)[methods.HEAD]
    if report.source.task not in ("sft", "dreambooth"):
        parts["head"] = head
    own = methods.learning_rate(report.source)
    return "".join(f", {part} {rate:g}" for part, rate in parts.items() if rate != own or report.learning_rates)


def _course(report: RecipeReport) -> str:
    assert report.source is not None
    train, schedule = report.source.train, report.schedule
    end = getattr(train, "min_learning_rate", None)
    course = train.schedule if train.schedule == "constant" else f"{train.schedule} to {end or 0:g}"
    return course if schedule is None or not schedule.warmup else f"{course}, {schedule.warmup:,} warm-up steps"


def _warnings(report: RecipeReport) -> Iterator[str]:
    from lily.recipes.methods.terms import unchosen

    if report.source is not None:
        yield from unchosen(report.source, report.terms)


# --- who shares what ------------------------------------------------------------------------------------------------


def sharing(report: RecipeReport) -> list[str]:
    """Who shares what, in three lines: A, B, and what each layer has for itself."""
    if report.decided is None:
        return [f"{report.plan.layers} layers in {len(report.plan.groups)} groups; --all shows the table"]
    plan, config = report.decided.plan, report.decided.config
    groups = list(plan.groups)
    runs = [shorten(group.sharing) for group in report.plan.groups]
    layers, usual = max(runs, key=runs.count), max(groups, key=lambda group: group.num_B)
    same = len(set(runs)) == 1 and len({group.num_B for group in groups}) == 1
    names = ", ".join(dict.fromkeys(group.name for group in groups))
    A = f"A: {'one each' if '|' in layers else 'one'} for layers {layers}, in {len(groups)} groups: {names}"
    B = f"B: {_experts(usual, plan.routing)}{'' if same else '; groups differ (--all)'}"
    own = f"Each layer alone: {_own(usual, str(config.distinct), plan.routing)}"
    return [line if len(line) <= WIDE else f"{line[: WIDE - 3]}..." for line in (A, B, own)]


def _experts(group: Group, routing: str) -> str:
    if group.num_B == 1:
        return "one for all layers of a group; nothing is routed, and it merges exactly"
    how = {"static": "static weights", "uniform": "equal weights"}.get(routing, f"routers per {routing}")
    return f"{group.num_B} experts per group, for all its layers, mixed by {how}"


def _own(group: Group, distinct: str, routing: str) -> str:
    parts = {"permute": "an order", "signs": "signs", "permute+signs": "an order and signs"}
    has = [f"{parts[distinct]} of ranks"] if distinct in parts else []
    if group.num_B > 1 and routing != "uniform":
        has.append("weights" if routing == "static" else f"a {group.num_B} x {group.r} router")
    if group.gain:
        has.append("a gain")
    if group.own_r:
        has.append(f"A and B of rank {group.own_r}")
    return ", ".join(has) or "nothing"
