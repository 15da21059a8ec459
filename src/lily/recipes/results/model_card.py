"""The model cards of adapters and of what is exported from them, with the Hub's metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lily.checkpoint.heads import LABELS
from lily.deploy.card import CARD, LIBRARIES, NAMES, front_matter
from lily.io import tables
from lily.io.atomic import write_text
from lily.recipes import loader
from lily.recipes.models.reference import on_hub, shown
from lily.recipes.results import data_table
from lily.recipes.results.card import columns, epochs, forgetting, tests, title, values_of
from lily.recipes.results.loading_lines import adapter_lines, merged_lines
from lily.recipes.scoring.metrics import metrics_of
from lily.recipes.spec.data import Source
from lily.recipes.spec.dreambooth import DreamBooth
from lily.recipes.spec.schema import Model, Recipe

if TYPE_CHECKING:
    from lily.recipes.results.result import Result

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe | DreamBooth)

PIPELINES = {"text-regression": "text-classification", "sft": "text-generation"}  # others are called as on the Hub
METRICS = {
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "accuracy_norm": "acc_norm",
}
LICENSE = "unknown"  # the Hub's word


def finish_adapter(folder: Path, recipe: Recipe, result: Result) -> None:
    """Add the recipe, the classes and a model card to a PEFT folder."""
    write_text(folder / "recipe.yaml", loader.dump_recipe(without_home(recipe)))
    if result.labels is not None:
        write_text(folder / LABELS, json.dumps(result.labels, ensure_ascii=False))
    write_text(folder / CARD, card(recipe, result))


def without_home(recipe: AnyRecipe) -> AnyRecipe:
    """The recipe, with `~` for the home folder: it means the same here, and does not name the user."""
    home = str(Path.home())

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: short(v) for name, v in value.items()}
        if isinstance(value, list):
            return [short(v) for v in value]
        return f"~{value.removeprefix(home)}" if isinstance(value, str) and value.startswith(f"{home}/") else value

    return cast(AnyRecipe, type(recipe).model_validate(short(recipe.model_dump())))


def card(recipe: Recipe, result: Result) -> str:
    """The model card of a run's adapter, in Markdown with the Hub's front matter."""
    quantization = recipe.model.quantization
    bits = "" if quantization == "none" else f" in {quantization}, which was frozen"
    files = [recipe.data.train, *(recipe.data.mix or {}).values()]
    names, final = columns(result, recipe)
    what, own = "An adapter", "this adapter"
    if recipe.method == "none":
        what, own = "A new head, without an adapter", "this head"
    scores = [*((title(name, recipe), v) for name, v in result.baselines.items()), ("untrained", result.before)]
    chosen = epochs(result)
    lines = [
        front_matter({**metadata(recipe), "eval_results": figures(recipe, result)}),
        "",
        f"# {recipe.name}",
        "",
        *([recipe.description.strip(), ""] if recipe.description.strip() else []),
        f"{what} ({', '.join(f'{k} {v}' for k, v in result.adapter.items())}) for {described(recipe.model)}{bits}, "
        f"trained on {', '.join(described(file) for file in files)}.",
        "",
        *_classes(result.labels),
        tables.markdown(["", *names], [[name, *values_of(names, v)] for name, v in [*scores, (own, final)]]),
        "",
        *([forgetting(result), ""] if result.forgetting else []),
        *([tables.markdown(*tests(result, recipe)), ""] if result.tests else []),
        f"On {result.rows[result.split]:,} {result.split} rows; seed {result.seed}; trained: {_trained(result)}. "
        f"{f'{chosen[0].upper()}{chosen[1:]}. ' if chosen else ''}"
        f"Versions: {', '.join(f'{k} {v}' for k, v in result.versions.items())}.",
        "",
        *(["## Data", "", data_table.markdown(result.data), ""] if result.data is not None else []),
        *use(adapter_lines(recipe, result.labels, method=recipe.method, new_head=bool(result.new_head))),
        f"Or `lily predict path/of/this/folder --input rows.csv`. {licenses('data')}",
        "",
    ]
    return "\n".join(lines)


def export_card(
    kind: str, recipe: Recipe, labels: Sequence[str] | None, adapter: Path, facts: Mapping[str, Any], lines: list[str]
) -> str:
    """The model card of an export: where it is from, how to load it, and the adapter's figures.

    Args:
        kind: of `lily.deploy.card.NAMES`.
        recipe: of the adapter.
        labels: its classes.
        adapter: its folder, of whose card the metadata are.
        facts: the export's provenance.
        lines: that use it.
    """
    from huggingface_hub import ModelCard

    kept: dict[str, Any] = {}
    if (adapter / CARD).is_file():
        try:
            kept = ModelCard.load(adapter / CARD).data.to_dict()
        except Exception:  # a card that somebody wrote need not have readable metadata
            kept = {}
    values = metadata(recipe)
    values |= {name: kept[name] for name in ("license", "datasets", "language") if name in kept}
    values |= {"library_name": LIBRARIES[kind], "tags": ["lily", *(["lora"] if kind != "merged" else []), recipe.task]}
    own = front_matter(values)
    if "model-index" in kept:
        own = own.removesuffix("---") + _yaml({"model-index": kept["model-index"]}) + "---"
    collapsed = "collapse" in facts
    return "\n".join(
        [
            own,
            "",
            f"# {recipe.name}",
            "",
            *([recipe.description.strip(), ""] if recipe.description.strip() else []),
            f"{NAMES[kind]} for {described(recipe.model)}, made of a Lily adapter that was trained on "
            f"{described(recipe.data.train)}; `lily inspect` says how.",
            "",
            *_classes(labels),
            *_indexed(kept, collapsed),
            *lines,
            licenses("data"),
            "",
        ]
    )


def export_lines(kind: str, recipe: Recipe, labels: Sequence[str] | None) -> list[str]:
    """The section of a card that loads an export which transformers or PEFT reads."""
    return use(merged_lines(recipe, labels) if kind == "merged" else adapter_lines(recipe, labels, method="lora"))


def use(lines: Sequence[str]) -> list[str]:
    """A section of a card with Python lines."""
    return ["## Use", "", "```python", *lines, "```", ""]


def use_gguf(base: str, adapter: str) -> list[str]:
    """A section of a card with llama.cpp's and Ollama's lines."""
    commands = [f"llama-server --model {base} --lora {adapter}", "ollama create mine -f Modelfile"]
    return ["## Use", "", "```sh", *commands, "```", ""]


def metadata(recipe: Recipe | DreamBooth) -> dict[str, Any]:
    """The Hub's metadata that a recipe decides: keyword arguments of `ModelCardData`."""
    model = recipe.model
    found = on_hub(model) if isinstance(model, Model) else (model.hub, None)
    hub, package = found[0] if found is not None else None, getattr(model, "package", None)
    values: dict[str, Any] = {
        "base_model": hub or (None if package is None else package.hub),
        "library_name": "peft",
        "license": getattr(recipe, "license", None) or license_of(model) or LICENSE,
        "model_name": recipe.name,
        "tags": [recipe.method, recipe.task],
    }
    if isinstance(recipe, DreamBooth):
        return {**values, "library_name": "diffusers", "pipeline_tag": "text-to-image"}
    files = [recipe.data.train, *(recipe.data.mix or {}).values()]
    ids = [file.hub or (file.package.hub if file.package is not None else None) for file in files]
    return {
        **values,
        "pipeline_tag": PIPELINES.get(recipe.task, recipe.task),
        "datasets": list(dict.fromkeys(name for name in ids if name)),
        "metrics": [METRICS.get(name, name) for name in metrics_of(recipe)],
        "tags": [*values["tags"], *(["regression"] if recipe.task == "text-regression" else [])],
    }


def license_of(model: Any) -> str | None:
    """The base model's license, from the recipe or the card beside the model; None: it is not known."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    if getattr(model, "package", None) is not None:
        return str(model.package.license) if model.package.license else None
    file: Any = None
    if model.hub is not None:
        file = try_to_load_from_cache(model.hub, CARD, revision=model.revision)
    elif model.path is not None:
        file = Path(model.path).expanduser() / CARD
    if not isinstance(file, (str, Path)) or not Path(file).is_file():
        return None
    try:
        found = ModelCard.load(file).data.license
    except Exception:  # a card that somebody wrote
        return None
    return found if isinstance(found, str) else None


def figures(recipe: Recipe, result: Result) -> list[Any]:
    """The `model-index`: the adapter's figures on the held-out rows and on further test sets."""
    from huggingface_hub import EvalResult

    task = PIPELINES.get(recipe.task, recipe.task)
    judged = {"test": recipe.data.test, "validation": recipe.data.validation}.get(result.split) or recipe.data.train
    sets: list[tuple[Source, str, Mapping[str, float]]] = [(judged, result.split, result.final)]
    sets += [(file, name, result.tests[name]["final"]) for name, file in (recipe.data.tests or {}).items()
             if "final" in result.tests.get(name, {})]  # fmt: skip
    return [
        EvalResult(
            task_type=task,
            dataset_type=source.hub or ("package" if source.package is not None else "local"),
            dataset_name=shown(source),
            dataset_split=split,
            metric_type=METRICS.get(name, name),
            metric_value=round(values[name], 6),
            metric_name=name,
        )
        for source, split, values in sets
        for name in metrics_of(recipe)
        if math.isfinite(values.get(name, math.nan))
    ]


def described(source: Source) -> str:
    """A model or a file in a sentence of a card, without folders of the training machine."""
    if source.package is not None:
        return f"`{source.package.member}` of the package `{source.package.name}=={source.package.version}`"
    if getattr(source, "standin", None) is not None:
        return f"the stand-in `{source.standin}` (`lily.recipes.offline.standins`)"  # type: ignore[attr-defined]
    hub = on_hub(source) if isinstance(source, Model) else None
    return f"`{hub[0] if hub is not None else shown(source)}`"


def licenses(data: str) -> str:
    """The closing sentence of a model card."""
    return f"The base model's and the {data}'s licenses apply to this adapter as well; check them before you share it."


def _classes(labels: Sequence[str] | None) -> list[str]:
    return [] if not labels else [f"Classes: {', '.join(f'`{name}`' for name in labels)}.", ""]


def _trained(result: Result) -> str:
    counts = ((result.parameters["adapter"], "the adapter"), (result.parameters["head"], "the new head"))
    return " and ".join(f"{count:,} parameters of {part}" for count, part in counts if count)


def _indexed(kept: Mapping[str, Any], collapsed: bool) -> list[str]:
    """The figures of a card's `model-index` as a table."""
    rows = [
        [
            str(entry.get("dataset", {}).get("name", "")),
            str(metric.get("name", metric.get("type"))),
            str(metric["value"]),
        ]
        for model in kept.get("model-index") or ()
        for entry in model.get("results") or ()
        for metric in entry.get("metrics") or ()
        if "value" in metric
    ]
    if not rows:
        return []
    before = (
        " before it was made static; `lily inspect` prints by how much that changed its outputs" if collapsed else ""
    )
    return [tables.markdown(["data", "metric", "value"], rows), "", f"Measured with the Lily adapter{before}.", ""]


def _yaml(values: Any) -> str:
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
