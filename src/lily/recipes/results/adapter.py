"""A finished adapter on its base model, with its recipe: evaluate, predict, generate."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel

from lily.checkpoint.beside import resize_to_file
from lily.errors import LilyError
from lily.recipes import data, models
from lily.recipes.data.sources import local_path
from lily.recipes.data.tables import Row
from lily.recipes.data.tasks import Processor, collate, encode, encode_inputs, format_prompt, text_processor
from lily.recipes.models.precision import precision_of
from lily.recipes.results.adapter_folder import AdapterFolder
from lily.recipes.results.run_files import changed_rows
from lily.recipes.scoring.evaluate import Judge, answers, head_outputs
from lily.recipes.scoring.inference import by_length, place, to_device
from lily.recipes.scoring.review import Review
from lily.recipes.spec.base import CLASSIFYING
from lily.recipes.spec.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Adapter:
    """A trained adapter, loaded with its base model.

    Args:
        folder: one that was found before, or a path; see `AdapterFolder.of`, as for `recipe` and `base`.

    Attributes:
        answered: answers that were generated so far.
        cut: those among them that `generation.max_new_tokens` ended.

    Raises:
        LilyError: if there is no adapter or no recipe, or the base model cannot be loaded.
    """

    def __init__(self, folder: str | AdapterFolder, recipe: str | None = None, base: str | None = None) -> None:
        location = AdapterFolder.of(folder, recipe, base)
        self.path, self.recipe = location.path, location.text_recipe()
        self._splits: data.Splits | None = None
        self.answered = self.cut = 0
        self._labels = location.labels()
        precision = precision_of(self.recipe)
        plain = models.load_model(self.recipe.model, self.recipe.task, self.labels, precision=precision)
        self.processor = models.load_processor(self.recipe, plain.config)
        resize_to_file(plain, self.path)
        self.model = place(PeftModel.from_pretrained(plain, str(self.path))).eval()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, for tasks of texts."""
        return text_processor(self.processor)

    @property
    def splits(self) -> data.Splits:
        """The recipe's data."""
        if self._splits is None:
            self._splits = data.load_splits(self.recipe)
            if other := changed_rows(self._splits, self.path.parent):
                warnings.warn(
                    f"the rows of {', '.join(other)} are not those of the run, so rows that it was trained on may be "
                    "among those that judge it; bring its files back, or judge it on a file of new rows",
                    stacklevel=2,
                )
        return self._splits

    @property
    def labels(self) -> Sequence[str] | None:
        """The classes, from labels.json or (runs of older versions) from the data; None: not a classifier."""
        if self.recipe.task not in CLASSIFYING:
            return None
        return self._labels or self.splits.labels

    def evaluate(self, split: str | None = None, file: str | None = None) -> dict[str, float]:
        """The metrics of `reviewed`."""
        return self.reviewed(split, file)[0]

    def reviewed(self, split: str | None = None, file: str | None = None) -> tuple[dict[str, float], Review]:
        """The recipe's metrics on a split (default: the one that the run reported) or on a file with the same columns.

        Also what was wrong there.

        Raises:
            LilyError: if the split is empty or the file does not fit.
        """
        return self.judge(self.rows(split, file))

    def judge(self, rows: Sequence[Row]) -> tuple[dict[str, float], Review]:
        """The recipe's metrics on rows, and what was wrong there."""
        judge = Judge(self.recipe, self.processor, self.labels)
        return judge(self.model, rows), judge.review

    def rows(self, split: str | None = None, file: str | None = None) -> Sequence[Row]:
        """The rows of a split or file; see `evaluate`."""
        if file is not None:
            if self._is_training_file(file):
                warnings.warn(
                    f"{file} is what the adapter was trained on, so results flatter; judge it without --file on the "
                    "rows that were held out, or on new rows",
                    stacklevel=2,
                )
            rows = data.rows_of(self.recipe.data.file_at(file), self.recipe)
        else:
            rows = self.splits.held_out if split is None else getattr(self.splits, split)
        if not rows:
            raise LilyError(f"the recipe has no {split} rows; choose train or validation, or give --file")
        if self.labels is not None:
            data.check_labels(rows, self.labels, str(file or split), self.recipe.data.similar_labels == "merge")
        return rows

    def _is_training_file(self, file: str) -> bool:
        with contextlib.suppress(LilyError):  # the training file is not here, or is no file
            path = self.recipe.data.train.path
            return path is not None and local_path(path).resolve() == local_path(file).resolve()
        return False

    def predict(
        self, rows: Iterable[Row], prefix: str = "", folder: Path | None = None, source: str = ""
    ) -> Iterator[Row]:
        """Add `prediction` (and `score`, the class's probability) to rows, reading and yielding batch by batch.

        Args:
            rows: rows with the recipe's input columns.
            prefix: prepended to the names of the added columns.
            folder: base of relative image paths; default: the working directory.
            source: name of the rows' file in messages.

        Raises:
            LilyError: if a row lacks the recipe's input column, or has one that would be overwritten.
        """
        names = [f"{prefix}{name}" for name in (("prediction",) if self.labels is None else ("prediction", "score"))]
        rows, at = iter(rows), f"{source}, row" if source else "row"
        number = 0
        while batch := list(islice(rows, self.recipe.train.eval_batch_size)):
            for i, row in enumerate(batch, number + 1):
                if taken := [name for name in names if name in row]:
                    raise LilyError(
                        f"{at} {i} already has a column {taken[0]!r}, which would be overwritten; rename it, or rename "
                        f"the added columns with --prefix, such as --prefix lily_"
                    )
            for row, values in zip(batch, self._predict(batch, number, folder, at), strict=True):
                yield {**row, **dict(zip(names, values, strict=True))}
            number += len(batch)

    def _predict(self, batch: list[Row], number: int, folder: Path | None, at: str) -> list[tuple[Any, ...]]:
        """For each row the prediction and, where there are classes, its probability.

        `number`: rows before these; `at`: what stands before a row's number in messages.
        """
        recipe, columns = self.recipe, self.recipe.data.columns
        if recipe.task == "sft":
            prompts = [data.prompt_of(row, columns, f"{at} {number + i}") for i, row in enumerate(batch, 1)]
            turns = [format_prompt(p, recipe, self.tokenizer) if isinstance(p, str) else p for p in prompts]
            generated = answers(self.model, self.tokenizer, turns, recipe)
            self.answered, self.cut = self.answered + len(generated), self.cut + sum(a.cut for a in generated)
            return [(answer.text,) for answer in generated]
        inputs = [data.inputs_of(row, recipe, f"{at} {number + i}", folder) for i, row in enumerate(batch, 1)]
        outputs = head_outputs(self.model, inputs, recipe, self.processor)
        if self.labels is None:
            return [(float(o[0]),) for o in outputs]
        chosen = []
        for o in outputs:
            p = np.exp(o - o.max()) / np.exp(o - o.max()).sum()
            chosen.append((self.labels[int(p.argmax())], round(float(p.max()), 6)))
        return chosen

    def generate(self, prompt: str, streamer: Any = None, system: str | None = None) -> str:
        """The answer to one prompt; `streamer` receives it token by token, `system` is the text of a system message.

        Raises:
            LilyError: if the adapter generates nothing, or the recipe has no chat template for a system message.
        """
        if self.recipe.task != "sft":
            raise LilyError(f"{self.path} is an adapter for {self.recipe.task}; `lily predict` uses it")
        turn = format_prompt(prompt, self.recipe, self.tokenizer)
        if system is not None:
            if isinstance(turn, str):
                raise LilyError("--system needs a chat template, and this recipe trains without one; drop --system")
            turn = replace(turn, messages=[{"role": "system", "content": system}, *turn.messages])
        (answer,) = answers(self.model, self.tokenizer, [turn], self.recipe, streamer)
        self.answered, self.cut = self.answered + 1, self.cut + answer.cut
        return answer.text


def batches(
    rows: Sequence[Row], recipe: Recipe, processor: Processor, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """Rows as a model's inputs, padded on the right and batched by length."""
    if recipe.task == "sft":
        encoded: list[Any] = [{"input_ids": e["input_ids"]} for e in encode(rows, recipe, processor, None)]
    else:
        encoded = [encode_inputs(row, recipe, processor) for row in rows]
    return [
        to_device(collate([encoded[i] for i in chosen], processor, "right"), device)
        for chosen in by_length(encoded, recipe.train.eval_batch_size)
    ]
