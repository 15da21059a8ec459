"""`lily eval`, `lily predict` and `lily generate`: using a trained adapter."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lily.cli.train import quieten
from lily.errors import LilyError

Folder = Annotated[str, typer.Argument(metavar="ADAPTER", help="A run's folder, or an adapter folder inside it.")]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="Default: the one kept beside the adapter.")]
SPLITS = ("train", "validation", "test")


def eval_command(
    adapter: Folder,
    recipe: RecipeOption = None,
    split: Annotated[str | None, typer.Option(help="train, validation or test. Default: the run's own.")] = None,
    file: Annotated[str | None, typer.Option(help="A file with the recipe's columns instead of a split.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the recipe's metrics on a split or a file."""
    if split is not None and file is not None:
        raise LilyError("--split and --file exclude each other; give one of them")
    if split is not None and split not in SPLITS:
        raise LilyError(f"--split {split}: choose one of {', '.join(SPLITS)}")
    found = _adapter(adapter, recipe).evaluate(split, file)
    if as_json:
        print(json.dumps(found))
        return
    from lily.recipes.scoring.metrics import shown

    table = Table("metric", "value", title=escape(file or split or "held-out rows"))
    for name, value in found.items():
        table.add_row(name, shown(name, value))
    Console().print(table)


def predict_command(
    adapter: Folder,
    input: Annotated[
        str, typer.Option("--input", help="csv, tsv, json, jsonl or parquet; - for jsonl on stdin; a folder of images.")
    ],
    output: Annotated[str, typer.Option("--output", help="A jsonl file; - for stdout.")] = "-",
    recipe: RecipeOption = None,
    prefix: Annotated[
        str, typer.Option(help="Put before the names prediction and score, should a row have them.")
    ] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
) -> None:
    """Add a prediction to every row, streaming: rows in, rows out."""
    from lily.recipes.data import sources

    target = Path(output).expanduser()
    if output != "-" and target.exists() and not overwrite:
        raise LilyError(f"--output {output} exists; name another file, or give --overwrite")
    if not target.parent.is_dir():
        raise LilyError(f"--output {output}: there is no folder {target.parent}; make it first")
    source: Path | str = input if input == "-" else sources.local_path(input)
    used = _adapter(adapter, recipe)
    rows, folder = _rows(used, source)
    rows = used.predict(rows, prefix, folder)
    if output == "-":
        _write(rows, sys.stdout)
        return
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            _write(rows, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def generate_command(
    adapter: Folder,
    prompt: Annotated[str, typer.Option("--prompt", help="What to answer.")],
    recipe: RecipeOption = None,
) -> None:
    """Answer one prompt, word by word. For many, use predict."""
    used = _adapter(adapter, recipe)
    from transformers import TextStreamer

    used.generate(prompt, TextStreamer(used.tokenizer, skip_prompt=True, skip_special_tokens=True))


def _rows(used: Any, source: Path | str) -> tuple[Iterable[dict[str, Any]], Path | None]:
    """The rows of what is to be predicted, and the folder that paths of images in them are relative to."""
    from lily.recipes.data import images, tables

    if isinstance(source, str):
        return tables.stream_rows(source), None
    if used.recipe.task == "image-classification" and images.holds_images(source):
        return images.rows_below(source, used.recipe.data.columns.image or "image"), None
    return tables.stream_rows(source, header=used.recipe.data.train.header), source.parent


def _adapter(folder: str, recipe: str | None) -> Any:
    quieten()
    from lily.recipes.results.adapter import Adapter

    return Adapter(folder, recipe)


def _write(rows: Iterable[dict[str, Any]], file: Any) -> None:
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
