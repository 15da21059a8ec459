"""Forgetting: the increase of a language model's mean loss per token on general text by training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lily.errors import LilyError
from lily.recipes import data
from lily.recipes.data import tables
from lily.recipes.data.chat_template import ids_of, text_of
from lily.recipes.spec.data import GeneralText
from lily.recipes.spec.locations import located
from lily.recipes.spec.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lily.recipes.data.tasks import Example

LOSS = "general_loss"  # name in the evaluations of a run
SHORTEST = 2  # tokens; the first one is not predicted


def general_text(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, section: GeneralText | None, *key: str
) -> list[Example]:
    """The encoded texts of `forgetting` or `lily.null_space`, with a label on every token; none without the section.

    Args:
        recipe: for messages.
        tokenizer: of the model.
        section: of the recipe.
        key: its key.

    Raises:
        LilyError: if the file cannot be read, has no text in that column, or no text of two or more tokens.
    """
    if section is None:
        return []
    with located(recipe, *key, "file"):
        column = ".".join((*key, "column"))
        texts = data.texts_of(section.file, section.column, column, section.max_rows, recipe.data.split.seed)
        encoded = [
            tokenizer(t, truncation=True, max_length=section.max_length)["input_ids"]
            if isinstance(t, str)
            else ids_of(text_of(t, tokenizer), tokenizer)[: section.max_length]
            for t in texts
        ]
        fitting = [list(ids) for ids in encoded if len(ids) >= SHORTEST]
        if not fitting:
            raise LilyError(f"no text of {tables.name_of(section.file)} has {SHORTEST} tokens; use longer texts")
    return [{"input_ids": ids, "labels": ids} for ids in fitting]


def of(before: float, last: float | None = None, after: float | None = None) -> dict[str, float]:
    """The losses of a run, as in `metrics.json`; without `last`, nothing was trained."""
    last = before if last is None else last
    after = last if after is None else after
    return {"before": before, "last": last, "after": after, "increase": after - before}
