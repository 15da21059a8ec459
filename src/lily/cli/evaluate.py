"""`lily eval`, `lily predict` and `lily generate`: use a trained adapter."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.markup import escape
from typer import Argument, Option

from lily.cli.progress import Verbose, progress
from lily.errors import LilyError
from lily.io.tables import terminal
from lily.io.words import counted
from lily.recipes.spec.values import SURROGATE

if TYPE_CHECKING:
    from lily.progress.progress import Progress
    from lily.recipes.results.adapter_folder import AdapterFolder

Folder = Annotated[str, Argument(metavar="ADAPTER", help="A run's folder, or an adapter folder inside it.")]
RecipeOption = Annotated[str | None, Option("--recipe", help="Recipe; default: the one beside the adapter.")]
SPLITS = ("train", "validation", "test")
UNSURE = 0.6  # probability below which a prediction is worth a look


def eval_command(
    adapter: Folder,
    recipe: RecipeOption = None,
    split: Annotated[
        str | None, Option(help="Split to evaluate: train, validation or test. Default: the one that the run reported.")
    ] = None,
    file: Annotated[str | None, Option(help="File with the recipe's columns, instead of a split.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object instead of a table.")] = False,
    verbose: Verbose = False,
) -> None:
    """Compute the recipe's metrics on a split or a file, with the scores by class and the worst mistakes."""
    if split is not None and file is not None:
        raise LilyError("--split and --file exclude each other; give one of them")
    if split is not None and split not in SPLITS:
        raise LilyError(f"--split {split}: choose one of {', '.join(SPLITS)}")
    location = located(adapter, recipe)
    with progress(verbose=verbose) as told:
        used = _adapter(location, told)
        with told.stage("", "evaluation"):
            rows = used.rows(split, file)
            told.expect("", "evaluation", {"judge": len(rows)})
            metrics, review = used.judge(rows)
    if as_json:
        print(json.dumps({**metrics, "review": review.to_dict()}))
        return
    from lily.recipes.results.review_table import print_review
    from lily.recipes.results.verdict import how_sure
    from lily.recipes.scoring.metrics import shown

    table, console = [[name, shown(name, value)] for name, value in metrics.items()], Console()
    console.print(terminal(["metric", "value"], table, title=escape(file or split or "held-out rows")))
    print_review(review, console)
    name, value = next(iter(metrics.items()))
    print(how_sure(name, value, len(rows)))


def predict_command(
    adapter: Folder,
    input: Annotated[
        str,
        Option(
            "--input",
            help="Rows to predict: a csv, tsv, json, jsonl or parquet file; - for jsonl on stdin; an image, or a "
            "folder of images.",
        ),
    ],
    output: Annotated[str, Option("--output", help="File to write: .csv, or jsonl; - for jsonl on stdout.")] = "-",
    recipe: RecipeOption = None,
    prefix: Annotated[str, Option(help="Prefix of the new columns prediction and score, if the rows have these.")] = "",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the output file if it exists.")] = False,
    verbose: Verbose = False,
) -> None:
    """Add a prediction to every row, streaming: rows in, rows out."""
    from lily.recipes.data import sources

    target = Path(output).expanduser()
    if target.suffix.lower() in (".json", ".tsv", ".parquet", ".xlsx"):
        raise LilyError(f"--output {output}: predictions are written as csv or jsonl; name a file {target.stem}.csv")
    if output != "-" and target.exists() and not overwrite:
        raise LilyError(f"--output {output} exists; name another file, or give --overwrite")
    if not target.parent.is_dir():
        raise LilyError(f"--output {output}: there is no folder {target.parent}; make it first")
    source: Path | str = input if input == "-" else sources.local_path(input)
    location = located(adapter, recipe)
    # rows that appear in the terminal are progress enough
    shown = output != "-" or not sys.stdout.isatty()
    with progress(verbose=verbose, quiet=not shown) as told:
        used = _adapter(location, told)
        rows, folder = _rows(used, source)
        if isinstance(source, Path) and output != "-":
            counted, _ = _rows(used, source)
            told.expect("", PREDICTING, {"generate" if used.recipe.task == "sft" else "judge": sum(1 for _ in counted)})
        seen = Predicted(f"{prefix}prediction", f"{prefix}score")
        with told.stage("", PREDICTING):
            rows = seen.watched(used.predict(rows, prefix, folder, "standard input" if input == "-" else input))
            if output == "-":
                _write(rows, sys.stdout)
            else:
                _write_file(rows, target)
    print(seen.sentence(), file=sys.stderr)
    _warn_of_cut(used)


PREDICTING = "predicting"


def _write_file(rows: Iterable[dict[str, Any]], target: Path) -> None:
    """Write rows to a file, which appears when it is complete."""
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            (_write_csv if target.suffix.lower() == ".csv" else _write)(rows, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


class Predicted:
    """What was predicted, in short; its size does not grow with the rows.

    Args:
        prediction: name of the column.
        score: name of the column of probabilities, which some tasks have.
    """

    def __init__(self, prediction: str, score: str) -> None:
        self.names = (prediction, score)
        self.rows, self.unsure, self.empty = 0, 0, 0
        self.classes: Counter[str] = Counter()
        self.lowest, self.highest, self.total = math.inf, -math.inf, 0.0

    def watched(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows, while they are counted."""
        for row in rows:
            value, score = (row.get(name) for name in self.names)
            self.rows += 1
            if score is not None:
                self.classes[str(value)] += 1
                self.unsure += score < UNSURE
            elif isinstance(value, float):
                self.lowest, self.highest = min(self.lowest, value), max(self.highest, value)
                self.total += value
            elif isinstance(value, str) and not value.strip():
                self.empty += 1
            yield row

    def sentence(self) -> str:
        """What the predictions are."""
        rows = f"{counted(self.rows, 'row')} predicted"
        if self.classes:
            most = ", ".join(
                f"{count:,} {'' if name[:1].isalpha() else 'of class '}{name}"
                for name, count in self.classes.most_common(5)
            )
            more = f", and {len(self.classes) - 5} more classes" if len(self.classes) > 5 else ""
            which = f"{counted(self.unsure, 'has', 'have')} a score below {UNSURE:g}: look at these first"
            return (
                f"{rows}: {most}{more}. {which if self.unsure else f'None has a score below {UNSURE:g}'}. The score is "
                "the model's own probability, not how often it is right."
            )
        if self.rows and math.isfinite(self.lowest):
            mean = self.total / self.rows
            return f"{rows}: from {self.lowest:.3g} to {self.highest:.3g}, mean {mean:.3g}."
        return f"{rows}; {self.empty:,} of the answers are empty." if self.empty else f"{rows}."


def generate_command(
    adapter: Folder,
    prompt: Annotated[str | None, Argument(metavar="PROMPT", help="Prompt to answer; - reads standard input.")] = None,
    option: Annotated[str | None, Option("--prompt", help="The same as PROMPT.")] = None,
    system: Annotated[
        str | None, Option(help="System message before the prompt, as in the chats that the adapter was trained on.")
    ] = None,
    recipe: RecipeOption = None,
    verbose: Verbose = False,
) -> None:
    """Answer one prompt, printed token by token. For many prompts, use predict."""
    if (prompt is None) == (option is None):
        wrong = "no prompt" if prompt is None else "PROMPT and --prompt both name a prompt"
        raise LilyError(f'{wrong}; write lily generate {adapter} "your question"')
    text = sys.stdin.read() if prompt == "-" else str(option if prompt is None else prompt)
    if not text.strip():
        raise LilyError(f'the prompt is empty; write lily generate {adapter} "your question"')
    if SURROGATE.search(text):
        raise LilyError("the prompt holds bytes that are not UTF-8 text, or half a surrogate pair; write it as UTF-8")
    location = located(adapter, recipe)
    with progress(verbose=verbose) as told:
        used = _adapter(location, told)
    from transformers import TextStreamer

    answer = used.generate(text, TextStreamer(used.tokenizer, skip_prompt=True, skip_special_tokens=True), system)
    if not answer.strip():
        print("warning: the answer is empty", file=sys.stderr)
    _warn_of_cut(used)


def _warn_of_cut(used: Any) -> None:
    """Say on standard error how many answers are not complete."""
    if not used.cut:
        return
    limit = used.recipe.generation.max_new_tokens
    which = "the answer was" if used.answered == 1 else f"{used.cut:,} of {used.answered:,} answers were"
    print(
        f"warning: {which} cut at generation.max_new_tokens={limit}; raise it in the recipe beside the adapter "
        f"({used.path / 'recipe.yaml'}), or in a copy given with --recipe",
        file=sys.stderr,
    )


def _rows(used: Any, source: Path | str) -> tuple[Iterable[dict[str, Any]], Path | None]:
    """The rows to predict, and the folder that image paths in them are relative to."""
    from lily.recipes.data import images, tables

    if isinstance(source, str):
        return tables.stream_rows(source), None
    if used.recipe.task == "image-classification" and (images.holds_images(source) or images.is_image(source)):
        return images.rows_below(source, used.recipe.data.columns.image or "image"), None
    like = used.recipe.data.file_at(str(source))
    # another program may have written these rows: with commas, or in UTF-8
    encoding = None if like.encoding is not None and tables.is_utf8(source) else like.encoding
    delimiter = like.delimiter
    if delimiter is not None and not like.header:
        first = next(iter(tables.stream_rows(source, "auto", None, delimiter, encoding)), {})
        delimiter = delimiter if len(first) > 1 else None
    return tables.stream_rows(source, "auto", like.header, delimiter, encoding), source.parent


def located(folder: str, recipe: str | None) -> AdapterFolder:
    """The folder of an adapter and its recipe, before anything that takes seconds to import.

    Raises:
        LilyError: if there is no adapter, or no recipe for text or images.
    """
    from lily.recipes.results.adapter_folder import AdapterFolder

    location = AdapterFolder.of(folder, recipe)
    location.text_recipe()
    return location


def _adapter(location: AdapterFolder, told: Progress) -> Any:
    from lily.recipes.results.adapter import Adapter

    with told.stage("", "loading"):
        return Adapter(location)


def _write_csv(rows: Iterable[dict[str, Any]], file: Any) -> None:
    """Rows as csv; lists and objects in them as JSON.

    Raises:
        LilyError: if a row has a column that the first has not.
    """
    writer: csv.DictWriter[str] | None = None
    for number, row in enumerate(rows, 1):
        if writer is None:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            writer.writeheader()
        if more := [name for name in row if name not in writer.fieldnames]:
            raise LilyError(f"row {number} has a column {more[0]!r} that the first row has not; write .jsonl instead")
        writer.writerow({key: json.dumps(v) if isinstance(v, (list, dict)) else v for key, v in row.items()})


def _write(rows: Iterable[dict[str, Any]], file: Any) -> None:
    for row in rows:
        text = json.dumps(row, ensure_ascii=False)
        # half a surrogate pair in a column that is not read cannot be written as UTF-8, only escaped
        file.write((json.dumps(row) if SURROGATE.search(text) else text) + "\n")
        file.flush()
