"""`lily eval`, `lily predict` and `lily generate`: use a trained adapter."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape
from typer import Argument, Option

from lily.cli.progress import quieten
from lily.errors import LilyError
from lily.io.tables import terminal
from lily.recipes.spec.values import SURROGATE

Folder = Annotated[str, Argument(metavar="ADAPTER", help="A run's folder, or an adapter folder inside it.")]
RecipeOption = Annotated[str | None, Option("--recipe", help="Recipe; default: the one beside the adapter.")]
SPLITS = ("train", "validation", "test")


def eval_command(
    adapter: Folder,
    recipe: RecipeOption = None,
    split: Annotated[
        str | None, Option(help="Split to evaluate: train, validation or test. Default: the one that the run reported.")
    ] = None,
    file: Annotated[str | None, Option(help="File with the recipe's columns, instead of a split.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Compute the recipe's metrics on a split or a file."""
    if split is not None and file is not None:
        raise LilyError("--split and --file exclude each other; give one of them")
    if split is not None and split not in SPLITS:
        raise LilyError(f"--split {split}: choose one of {', '.join(SPLITS)}")
    metrics = _adapter(adapter, recipe).evaluate(split, file)
    if as_json:
        print(json.dumps(metrics))
        return
    from lily.recipes.scoring.metrics import shown

    rows = [[name, shown(name, value)] for name, value in metrics.items()]
    Console().print(terminal(["metric", "value"], rows, title=escape(file or split or "held-out rows")))


def predict_command(
    adapter: Folder,
    input: Annotated[
        str,
        Option(
            "--input",
            help="Rows to predict: a csv, tsv, json, jsonl or parquet file; - for jsonl on stdin; a folder of images.",
        ),
    ],
    output: Annotated[str, Option("--output", help="File to write as jsonl; - for stdout.")] = "-",
    recipe: RecipeOption = None,
    prefix: Annotated[str, Option(help="Prefix of the new columns prediction and score, if the rows have these.")] = "",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the output file if it exists.")] = False,
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
    prompt: Annotated[str, Option("--prompt", help="Prompt to answer.")],
    recipe: RecipeOption = None,
) -> None:
    """Answer one prompt, printed token by token. For many prompts, use predict."""
    if SURROGATE.search(prompt):
        raise LilyError("--prompt holds bytes that are not UTF-8 text, or half a surrogate pair; write it as UTF-8")
    used = _adapter(adapter, recipe)
    from transformers import TextStreamer

    used.generate(prompt, TextStreamer(used.tokenizer, skip_prompt=True, skip_special_tokens=True))


def _rows(used: Any, source: Path | str) -> tuple[Iterable[dict[str, Any]], Path | None]:
    """The rows to predict, and the folder that image paths in them are relative to."""
    from lily.recipes.data import images, tables

    if isinstance(source, str):
        return tables.stream_rows(source), None
    if used.recipe.task == "image-classification" and images.holds_images(source):
        return images.rows_below(source, used.recipe.data.columns.image or "image"), None
    like = used.recipe.data.file_at(str(source))
    return tables.stream_rows(source, "auto", like.header, like.delimiter, like.encoding), source.parent


def check_adapter(folder: str, recipe: str | None) -> None:
    """Check that a folder holds an adapter and that a recipe can be read, before anything that takes seconds to import.

    Raises:
        LilyError: if one is not so.
    """
    from lily.recipes import loader
    from lily.recipes.results.run_files import adapter_path

    adapter_path(folder)
    if recipe is not None:
        loader.load_any(recipe)


def _adapter(folder: str, recipe: str | None) -> Any:
    check_adapter(folder, recipe)
    quieten()
    from lily.recipes.results.adapter import Adapter

    return Adapter(folder, recipe)


def _write(rows: Iterable[dict[str, Any]], file: Any) -> None:
    for row in rows:
        text = json.dumps(row, ensure_ascii=False)
        # half a surrogate pair in a column that is not read cannot be written as UTF-8, only escaped
        file.write((json.dumps(row) if SURROGATE.search(text) else text) + "\n")
        file.flush()
