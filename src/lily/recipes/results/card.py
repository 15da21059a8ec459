"""The closing table of a run and the adapter's model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lily.io import tables
from lily.io.atomic import write_text
from lily.recipes import loader, methods, models
from lily.recipes.methods.configs import ratios_of
from lily.recipes.results import data_table
from lily.recipes.scoring import test_sets
from lily.recipes.scoring.metrics import metrics_of, shown
from lily.recipes.spec.base import CLASSIFYING
from lily.recipes.spec.data import Source
from lily.recipes.spec.schema import Recipe

if TYPE_CHECKING:
    from lily.recipes.results.result import Result
    from lily.recipes.results.run_files import RunFigures
    from lily.recipes.spec.dreambooth import DreamBooth

LABELS = "labels.json"


def adapter_summary(model: Any, recipe: Recipe | DreamBooth) -> dict[str, Any]:
    """Method, rank, sharing and learning rate of the adapter."""
    config = getattr(model, "peft_config", {}).get("default")
    if config is None or recipe.method == "none":
        return {"method": recipe.method, "learning_rate": methods.learning_rate(recipe)}
    names = ("r", "num_A", "stride_A", "num_B", "scaling", "routing", "lora_alpha", "alpha")
    values = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    if recipe.method == "peft":
        values = {"peft_type": str(recipe.peft.peft_type).upper(), **values}
    if recipe.method == "lily" and recipe.lily.settle is not None and getattr(config, "routing", None) == "static":
        values["routing"] = "static, settled"
    return {"method": recipe.method, **values, "learning_rate": methods.learning_rate(recipe), **ratios_of(recipe)}


def print_result(result: Result, recipe: Recipe, output: Path, console: Console) -> None:
    """Print baselines and adapter on the same held-out rows, then the files' locations."""
    names, final = _columns(result, recipe)
    rows = result.rows[result.split]
    table = Table(
        "",
        *names,
        "trained",
        "seconds",
        "file",
        title=escape(f"{result.name}: {rows:,} {result.split} rows, seed {result.seed}"),
    )
    for name, figures in result.baselines.items():
        table.add_row(_title(name, recipe), *values_of(names, figures), *costs_of(figures))
    table.add_row("untrained", *values_of(names, result.before), "", "", "")
    table.add_row(f"[bold]{method_title(result)}[/]", *values_of(names, final), *costs_of(adapter_costs(result)))
    console.print(table)
    if result.tests:
        console.print(tables.terminal(*_tests(result, recipe)))
    if result.forgetting:
        console.print(_forgetting(result))
    for sample in result.samples:
        console.print(f"[dim]{escape(sample['prompt'].strip()[-300:])}[/]")
        answers = ", ".join(f"{k}: {escape(repr(sample[k]))}" for k in ("expected", "before", "after") if k in sample)
        console.print(f"  {answers}")
    if result.best is not None:
        console.print(f"{_epochs(result)}; {result.seconds['total']:.0f} s in all", soft_wrap=True, highlight=False)
        console.print(escape(f"adapter: {output / 'best'}    figures: {output / 'metrics.json'}"), soft_wrap=True)


def _epochs(result: Result) -> str:
    """The main metric on the validation rows, after the best and after the last epoch."""
    if result.best is None or result.last is None:
        return ""
    best, last = (shown(result.metric, evaluation["value"]) for evaluation in (result.best, result.last))
    when = f"after epoch {result.best['epoch']:g}"
    return f"best {result.metric} on validation {best} {when}, after the last epoch {last}"


def _tests(result: Result, recipe: Recipe) -> tuple[list[str], list[list[str]]]:
    counts = {name.removeprefix("tests."): count for name, count in result.rows.items() if name.startswith("tests.")}
    header, *lines = test_sets.tabled(result.tests, metrics_of(recipe), counts)
    return header, lines


def _columns(result: Result, recipe: Recipe) -> tuple[list[str], dict[str, float]]:
    """Names of the tables' metric columns, and the values of the adapter."""
    names: list[str] = list(metrics_of(recipe))
    if not result.forgetting:
        return names, result.final
    return [*names, "forgetting"], {**result.final, "forgetting": result.forgetting["increase"]}


def _forgetting(result: Result) -> str:
    before, after = (result.forgetting[name] for name in ("before", "after"))
    return f"Forgetting: the loss per token of general text, {before:.4f} before training and {after:.4f} after."


def _title(name: str, recipe: Recipe) -> str:
    titles = {
        "majority": "majority" if recipe.task in CLASSIFYING else "mean",
        "tfidf": "TF-IDF",
        "frozen": "frozen encoder",
        "lora": "LoRA, equal parameters" if recipe.lora.r == "equal" else "LoRA",
    }
    return titles[name]


def values_of(names: Sequence[str], metrics: Mapping[str, float]) -> list[str]:
    """The named metrics, formatted for a table."""
    return [shown(name, metrics.get(name)) for name in names]


def adapter_costs(run: Result | RunFigures) -> dict[str, float]:
    """A run's `parameters`, `seconds` and `bytes`, as baselines have them among their figures."""
    parameters = run.parameters.get("adapter", 0) or run.parameters.get("head", 0)
    return {"parameters": parameters, "seconds": run.seconds.get("train", 0.0), "bytes": run.adapter_bytes}


def costs_of(figures: Mapping[str, float]) -> list[str]:
    """Trained parameters, seconds and file size, formatted for a table; empty where they are not known."""
    parameters, seconds, size = (figures.get(name) for name in ("parameters", "seconds", "bytes"))
    return [
        f"{parameters:,.0f}" if parameters else "",
        f"{seconds:.0f}" if seconds else "",
        f"{size / 1e6:.2f} MB" if size else "",
    ]


def method_title(result: Result) -> str:
    """The method for a table."""
    return lily_title(result.adapter) if result.method == "lily" else result.method


def lily_title(adapter: Mapping[str, Any]) -> str:
    """Lily with what it depends on: its routing, or that there is one B and so nothing to route."""
    return "Lily (one B)" if adapter.get("num_B") == 1 else f"Lily ({adapter.get('routing')})"


def card_head(recipe: Recipe | DreamBooth, library: str, tags: Sequence[str], *extra: str) -> list[str]:
    """The Hub's front matter, title and description of a model card; `extra`: further lines of front matter."""
    base = [f"base_model: {recipe.model.hub}"] if recipe.model.hub else []
    front = ["---", f"library_name: {library}", f"tags: [{', '.join(tags)}]", *base, *extra, "---"]
    return [*front, "", f"# {recipe.name}", "", recipe.description.strip(), ""]


def licenses(data: str) -> str:
    """The closing sentence of a model card."""
    return f"The base model's and the {data}'s licenses apply to this adapter as well; check them before you share it."


def finish_adapter(folder: Path, recipe: Recipe, result: Result) -> None:
    """Add the recipe, the classes and a model card to a PEFT folder."""
    write_text(folder / "recipe.yaml", loader.dump_recipe(recipe))
    if result.labels is not None:
        write_text(folder / LABELS, json.dumps(result.labels, ensure_ascii=False))
    write_text(folder / "README.md", card(recipe, result))


def card(recipe: Recipe, result: Result) -> str:
    """The model card, in Markdown with the Hub's front matter."""
    base, auto, quantization = _named(recipe.model), models.AUTO_CLASSES[recipe.task], recipe.model.quantization
    bits = "" if quantization == "none" else f" in {quantization}, which was frozen"
    if recipe.model.standin is not None:
        base = f"the stand-in `{recipe.model.standin}` (`lily.recipes.offline.standins`)"
    files = [recipe.data.train, *(recipe.data.mix or {}).values()]
    data = ", ".join(_named(file) for file in files)
    is_vim = (recipe.model.architecture or {}).get("model_type") == "vision_mamba"
    names, final = _columns(result, recipe)
    what, own, tags = "An adapter", "this adapter", [recipe.method, recipe.task]
    if recipe.method == "none":
        what, own, tags = "A new head, without an adapter", "this head", [recipe.task]
    scores = [*((_title(name, recipe), v) for name, v in result.baselines.items()), ("untrained", result.before)]
    lines = [
        *card_head(recipe, "peft", tags),
        f"{what} ({', '.join(f'{k} {v}' for k, v in result.adapter.items())}) for {base}{bits}, trained on {data}.",
        "",
        tables.markdown(["", *names], [[name, *values_of(names, v)] for name, v in [*scores, (own, final)]]),
        "",
        *([_forgetting(result), ""] if result.forgetting else []),
        *([tables.markdown(*_tests(result, recipe)), ""] if result.tests else []),
        f"On {result.rows[result.split]:,} {result.split} rows; seed {result.seed}; "
        f"trained: {_trained(result)}. "
        f"{f'{chosen[0].upper()}{chosen[1:]}. ' if (chosen := _epochs(result)) else ''}"
        f"Versions: {', '.join(f'{k} {v}' for k, v in result.versions.items())}.",
        "",
        *(["## Data", "", data_table.markdown(result.data), "", "## Use", ""] if result.data is not None else []),
        "```python",
        *(["import lily  # lets PEFT read this adapter"] if recipe.method == "lily" else []),
        "from peft import PeftModel",
        f"from transformers import {auto}{', BitsAndBytesConfig' if quantization != 'none' else ''}",
        *(["", "from lily.recipes.offline.standins import standin"] if recipe.model.standin else []),
        *(["", "import lily.recipes.offline.vision_mamba  # a model that is defined there"] if is_vim else []),
        "",
        f"base = {auto}.from_pretrained({_load(recipe, result)})",
        'model = PeftModel.from_pretrained(base, "path/of/this/folder")',
        "```",
        "",
        f"Or `lily predict path/of/this/folder --input rows.csv`. {licenses('data')}",
        "",
    ]
    return "\n".join(lines)


def _trained(result: Result) -> str:
    counts = ((result.parameters["adapter"], "the adapter"), (result.parameters["head"], "the new head"))
    return " and ".join(f"{count:,} parameters of {part}" for count, part in counts if count)


def _named(source: Source) -> str:
    if source.package is not None:
        return f"`{source.package.member}` of the package `{source.package.name}=={source.package.version}`"
    return f"`{source.hub or source.path}`"


def _load(recipe: Recipe, result: Result) -> str:
    where = repr(recipe.model.hub or recipe.model.path or "path/of/the/base/model")
    if recipe.model.standin is not None:
        where = f"standin({recipe.model.standin!r})"
    count = 1 if recipe.task == "text-regression" else len(result.labels or ())
    replaced = ", ignore_mismatched_sizes=True" if result.new_head else ""
    options = {
        "none": "",
        "int8": ", quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
        "nf4": ', quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
        "bnb_4bit_use_double_quant=True)",
    }[recipe.model.quantization]
    return f"{where}{options}" if recipe.task == "sft" else f"{where}, num_labels={count}{replaced}{options}"
