"""What a DreamBooth run leaves for people: the closing table and the adapter's model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lily.recipes.results.card import costs_of
from lily.recipes.spec.dreambooth import DreamBooth

if TYPE_CHECKING:
    from lily.recipes.results.result import Result

LICENCES = "The base model's and the images' licences apply to this adapter as well; check them before you share it."


def print_result(result: Result, recipe: DreamBooth, output: Path, console: Console) -> None:
    """The closing table, then where things are."""
    names = list(result.final)
    table = Table("", *names, "trained", "seconds", "file", title=f"{result.name}: {result.rows['train']} images, "
                  f"seed {result.seed}")  # fmt: skip
    own = {
        "parameters": result.parameters["adapter"],
        "seconds": result.seconds["train"],
        "bytes": result.adapter_bytes,
    }
    table.add_row("untrained", *(f"{result.before[name]:.4f}" for name in names), "", "", "")
    for name, found in result.baselines.items():
        table.add_row(name, *(f"{found[n]:.4f}" for n in names), *costs_of(found))
    table.add_row(f"[bold]{_title(result)}[/]", *(f"{result.final[n]:.4f}" for n in names), *costs_of(own))
    console.print(table)
    console.print("loss: the same noise at the same levels of the training images, before and after", highlight=False)
    pipelines = f"    for pipelines: {output / 'diffusers'}" if (output / "diffusers").is_dir() else ""
    console.print(escape(f"adapter: {output / 'last'}{pipelines}    images: {output / 'samples'}"), soft_wrap=True)


def _title(result: Result) -> str:
    return result.method if result.method != "lily" else f"Lily ({result.adapter.get('routing')})"


def card(recipe: DreamBooth, result: Result) -> str:
    """The model card, in Markdown with the Hub's front matter."""
    base = recipe.model.hub or recipe.model.path or f"the small {recipe.model.standin} pipeline"
    lines = [
        "---",
        "library_name: diffusers",
        f"tags: [{result.method}, dreambooth, text-to-image]",
        *([f"base_model: {recipe.model.hub}"] if recipe.model.hub else []),
        f"instance_prompt: {recipe.subject.prompt!r}",
        "---",
        "",
        f"# {recipe.name}",
        "",
        recipe.description.strip(),
        "",
        f"An adapter ({', '.join(f'{k} {v}' for k, v in result.adapter.items())}) for `{base}`, trained on "
        f"{result.rows['train']} images of one subject. Prompt: `{recipe.subject.prompt}`.",
        "",
        "| | loss | parameters |",
        "| --- | --- | --- |",
        f"| untrained | {result.before['loss']:.4f} | |",
        *(f"| {name} | {found['loss']:.4f} | {found['parameters']:,.0f} |" for name, found in result.baselines.items()),
        f"| this adapter | {result.final['loss']:.4f} | {result.parameters['adapter']:,} |",
        "",
        "The loss is that of denoising the training images, with the same noise before and after; it says that the "
        "model learned them, not how well it draws.",
        "",
        "```python",
        "from lily.recipes.dreambooth.adapters import load",
        "",
        f'load(pipe.{result.adapter["component"]}, "path/of/this/folder")',
        "```",
        "",
        LICENCES,
        "",
    ]
    return "\n".join(lines)
