"""Read texts for an adapter without a recipe, with fixed names of columns and a fixed maximum length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lily.errors import LilyError
from lily.recipes import data
from lily.recipes.data.tables import read_rows
from lily.recipes.data.tasks import collate
from lily.recipes.deploy import load_for_export
from lily.recipes.scoring.inference import by_length, device_of, place, to_device
from lily.recipes.spec.data import File
from lily.recipes.spec.values import SURROGATE

TEXT, PAIR, LABEL = "text", "text_pair", "label"
MAX_LENGTH = 512
BATCH = 32


@dataclass(frozen=True)
class Texts:
    """An adapter on its base model, in eval mode, and rows as its inputs."""

    model: Any
    batches: tuple[dict[str, Tensor], ...]
    rows: int
    labels: Sequence[object] | None  # in the batches' order; None unless every row has one


def load_texts(folder: str, file: str, base: str | None, most: int | None) -> Texts:
    """Load an adapter and the columns `text`, and optionally `text_pair` and `label`, of a table.

    Texts are truncated to the tokenizer's maximum length and to 512 tokens; `most` draws a fixed sample of the rows.

    Raises:
        LilyError: if the adapter or its base model cannot be loaded, there is no tokenizer, or a row has no text.
    """
    rows = data.drawn(list(enumerate(read_rows(File(path=file)), 1)), most)
    for number, row in rows:
        if wrong := next((name for name in (TEXT, PAIR) if SURROGATE.search(str(row.get(name)))), None):
            raise LilyError(f"{file}, row {number}: column {wrong!r} holds half of a surrogate pair; remove the row")
        if not isinstance(row.get(TEXT), str) or not row[TEXT].strip():
            raise LilyError(
                f"{file}, row {number}: no text in a column {TEXT!r}, which is required without a recipe; rename "
                f"the column, or name it in a recipe and give --recipe FILE (columns: {', '.join(map(str, row))})"
            )
    model, tokenizer, _ = load_for_export(folder, base=base, weights=True, dtype="float32")
    if tokenizer is None:
        raise LilyError(f"{folder}: its base model has no tokenizer for {file}; save one into the base model's folder")
    longest = min(MAX_LENGTH, tokenizer.model_max_length)
    encoded = [dict(tokenizer(row[TEXT], row.get(PAIR), truncation=True, max_length=longest)) for _, row in rows]
    order = list(by_length(encoded, BATCH))
    model = place(model).eval()
    device = device_of(model)
    inputs = tuple(to_device(collate([encoded[i] for i in chosen], tokenizer, "right"), device) for chosen in order)
    labeled = all(row.get(LABEL) is not None for _, row in rows)
    labels = [rows[i][1][LABEL] for chosen in order for i in chosen] if labeled else None
    return Texts(model, inputs, len(rows), labels)
