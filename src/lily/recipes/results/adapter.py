"""A finished adapter with its recipe and its model: scoring and predicting with what a run has written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel

from lily.errors import LilyError
from lily.io.untrusted import blame, read_json
from lily.recipes import data, loader, models
from lily.recipes.data.tables import Row
from lily.recipes.data.tasks import Processor, asked, collate, encode, encode_inputs, prompt_ids, text_processor
from lily.recipes.models.precision import precision_of
from lily.recipes.results.card import LABELS
from lily.recipes.scoring.evaluate import Judge, answers, head_outputs
from lily.recipes.scoring.inference import by_length, device_of, inference, place, to_device
from lily.recipes.spec.schema import CLASSIFYING, File, Model, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Adapter:
    """A trained adapter with all that is needed to use it.

    Args:
        folder: an adapter folder that `lily train` wrote (`best` or `last`), or the run's folder (its `best`).
        recipe: another recipe, as a name or path; default: the one kept beside the adapter.
        base: folder of the base model; default: where the recipe says it is.

    Raises:
        LilyError: if the folder is not a run's, or the recipe is missing.
    """

    def __init__(self, folder: str, recipe: str | None = None, base: str | None = None) -> None:
        self.path = adapter_path(folder)
        self.recipe = recipe_of(self.path, recipe)
        if base is not None:
            self.recipe = self.recipe.model_copy(update={"model": elsewhere(self.recipe.model, base)})
        self._splits: data.Splits | None = None
        self._labels = kept_labels(self.path)
        precision = precision_of(self.recipe)
        plain = models.load_model(self.recipe.model, self.recipe.task, self.labels, precision=precision)
        self.processor = models.load_processor(self.recipe, plain.config)
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
        return self._splits

    @property
    def labels(self) -> Sequence[str] | None:
        """The classes, as kept with the adapter; older runs read them off the data again."""
        if self.recipe.task not in CLASSIFYING:
            return None
        return self._labels or self.splits.labels

    def evaluate(self, split: str | None = None, file: str | None = None) -> dict[str, float]:
        """The recipe's metrics on a split (default: what the run reported on) or on a file with the same columns.

        Raises:
            LilyError: if the split is empty or the file does not fit.
        """
        if file is not None:
            header = self.recipe.data.train.header
            rows = data.rows_of(File(path=file, header=header), self.recipe)
        else:
            rows = self.splits.held_out if split is None else getattr(self.splits, split)
        if not rows:
            raise LilyError(f"the recipe has no {split} rows; choose train or validation, or give --file")
        if self.labels is not None:
            data.check_labels(rows, self.labels, str(file or split))
        return Judge(self.recipe, self.processor, self.labels)(self.model, rows)

    def predict(self, rows: Iterable[Row], prefix: str = "", folder: Path | None = None) -> Iterator[Row]:
        """Rows with `prediction` (and `score`, the class's probability) added, read and given batch by batch.

        Args:
            rows: rows with the recipe's input columns.
            prefix: put before the names of what is added.
            folder: that paths of images are relative to; default: the working directory.

        Raises:
            LilyError: if a row lacks the recipe's input column, or has one that would be overwritten.
        """
        names = [f"{prefix}{name}" for name in (("prediction",) if self.labels is None else ("prediction", "score"))]
        rows = iter(rows)
        number = 0
        while batch := list(islice(rows, self.recipe.train.eval_batch_size)):
            for i, row in enumerate(batch, number + 1):
                if taken := [name for name in names if name in row]:
                    raise LilyError(
                        f"row {i} has a column {taken[0]!r} of its own, which would be overwritten; rename it, or give "
                        f"the results another name with --prefix, such as --prefix lily_"
                    )
            found = self._predict(batch, number, folder)
            yield from (
                {**row, **dict(zip(names, values, strict=True))} for row, values in zip(batch, found, strict=True)
            )
            number += len(batch)

    def _predict(self, batch: list[Row], number: int, folder: Path | None) -> list[tuple[Any, ...]]:
        """What is found for each row: the prediction, and its probability where there are classes."""
        recipe, columns = self.recipe, self.recipe.data.columns
        if recipe.task == "sft":
            prompts = [data.prompt_of(row, columns, f"row {number + i}") for i, row in enumerate(batch, 1)]
            turns = [asked(p, recipe, self.tokenizer) if isinstance(p, str) else p for p in prompts]
            given = answers(self.model, self.tokenizer, turns, recipe)
            return [(text,) for text in given]
        inputs = [data.inputs_of(row, recipe, f"row {number + i}", folder) for i, row in enumerate(batch, 1)]
        outputs = head_outputs(self.model, inputs, recipe, self.processor)
        if self.labels is None:
            return [(float(o[0]),) for o in outputs]
        chosen = []
        for o in outputs:
            p = np.exp(o - o.max()) / np.exp(o - o.max()).sum()
            chosen.append((self.labels[int(p.argmax())], round(float(p.max()), 6)))
        return chosen

    def generate(self, prompt: str, streamer: Any = None) -> str:
        """The answer to one prompt; `streamer` gets it token by token."""
        if self.recipe.task != "sft":
            raise LilyError(f"{self.path} is an adapter for {self.recipe.task}; `lily predict` uses it")
        turn = asked(prompt, self.recipe, self.tokenizer)
        ids = torch.tensor([prompt_ids(turn, self.tokenizer)], device=device_of(self.model))
        with inference(self.model, self.recipe):
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.recipe.generation.max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=streamer,
            )
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def elsewhere(model: Model, base: str) -> Model:
    """The recipe's base model, from another folder or repository."""
    where = "path" if Path(base).expanduser().exists() else "hub"
    nowhere = dict.fromkeys((*Model.kinds, "revision", "architecture"))
    return model.model_copy(update={**nowhere, where: base, "format": "transformers"})


def adapter_path(folder: str) -> Path:
    """The adapter's own folder: the one named, or the `best` of a run; the `last` of one that draws.

    Raises:
        LilyError: if it holds no adapter.
    """
    path = Path(folder).expanduser()
    for name in ("best", "last"):
        if (path / name).is_dir():
            path = path / name
            break
    if not (path / "adapter_config.json").is_file():
        raise LilyError(f"{folder} holds no adapter (adapter_config.json); name a run's folder or its best/")
    return path


def recipe_of(path: Path, recipe: str | None = None) -> Recipe:
    """The recipe named, or the one kept beside an adapter.

    Raises:
        LilyError: if there is none, or the kept one wants to run code from the model's repository.
    """
    kept = kept_recipe(path)
    if recipe is None and kept is None:
        raise LilyError(f"{path} holds no recipe.yaml; name the recipe with --recipe")
    found = loader.load_recipe(recipe or str(kept))
    if recipe is None and found.model.trust_remote_code:
        raise LilyError(
            f"{kept} wants to run code from the model's repository (trust_remote_code); "
            f"if you trust it, say so with --recipe {kept}"
        )
    return found


def kept_recipe(path: Path) -> Path | None:
    """The recipe's file beside an adapter, if there is one."""
    return next((p for p in (path / "recipe.yaml", path.parent / "recipe.yaml") if p.is_file()), None)


def kept_labels(path: Path) -> tuple[str, ...] | None:
    """The classes kept beside an adapter.

    Raises:
        LilyError: if the file is no list of names.
    """
    file = path / LABELS
    if not file.is_file():
        return None
    labels = read_json(file)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise blame(file, "expected a list of the classes' names")
    return tuple(labels)


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
