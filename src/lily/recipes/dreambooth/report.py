"""The closing table of a DreamBooth run and the adapter's model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lily.deploy.card import front_matter
from lily.io import tables
from lily.recipes.results import card
from lily.recipes.results.model_card import licenses, metadata
from lily.recipes.spec.dreambooth import DreamBooth

if TYPE_CHECKING:
    from lily.recipes.results.result import Result


def print_result(result: Result, recipe: DreamBooth, output: Path, console: Console) -> None:
    """Print losses of baselines and adapter, then the files' locations."""
    names = list(result.final)
    title = f"{result.name}: {result.rows['train']} images, seed {result.seed}"
    table = Table("", *names, "trained", "seconds", "file", title=title)
    own = {**result.final, **card.adapter_costs(result)}
    table.add_row("untrained", *(f"{result.before[name]:.4f}" for name in names), "", "", "")
    for name, figures in [*result.baselines.items(), (f"[bold]{card.method_title(result)}[/]", own)]:
        table.add_row(name, *(f"{figures[n]:.4f}" for n in names), *card.costs_of(figures))
    console.print(table)
    console.print("loss: the same noise at the same levels of the training images, before and after", highlight=False)
    pipelines = f"    for pipelines: {output / 'diffusers'}" if (output / "diffusers").is_dir() else ""
    console.print(escape(f"adapter: {output / 'last'}{pipelines}    images: {output / 'samples'}"), soft_wrap=True)


def model_card(recipe: DreamBooth, result: Result) -> str:
    """The model card, in Markdown with the Hub's front matter."""
    base = recipe.model.hub or recipe.model.path or f"the small {recipe.model.standin} pipeline"
    base = base if recipe.model.path is None or recipe.model.hub else Path(base).name
    revision = f", revision={recipe.model.revision!r}" if recipe.model.revision else ""
    rows = [["untrained", f"{result.before['loss']:.4f}", ""]]
    rows += [[name, f"{v['loss']:.4f}", f"{v['parameters']:,.0f}"] for name, v in result.baselines.items()]
    rows += [["this adapter", f"{result.final['loss']:.4f}", f"{result.parameters['adapter']:,}"]]
    lines = [
        front_matter({**metadata(recipe), "instance_prompt": recipe.subject.prompt}),
        "",
        f"# {recipe.name}",
        "",
        recipe.description.strip(),
        "",
        f"An adapter ({', '.join(f'{k} {v}' for k, v in result.adapter.items())}) for `{base}`, trained on "
        f"{result.rows['train']} images of one subject. Prompt: `{recipe.subject.prompt}`.",
        "",
        tables.markdown(["", "loss", "parameters"], rows),
        "",
        "The loss is that of denoising the training images, with the same noise before and after; it measures how well "
        "the model learned them, not how well it draws.",
        "",
        "```python",
        *(["from diffusers import DiffusionPipeline", ""] if recipe.model.hub else []),
        "from lily.recipes.dreambooth.adapters import load",
        "",
        *([f"pipe = DiffusionPipeline.from_pretrained({recipe.model.hub!r}{revision})"] if recipe.model.hub else []),
        f'load(pipe.{result.adapter["component"]}, ".")  # this folder',
        "```",
        "",
        licenses("images"),
        "",
    ]
    return "\n".join(lines)
