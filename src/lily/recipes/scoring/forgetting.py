"""Forgetting: how much worse a causal language model reads text that training was not about.

Its measure is the mean loss per token of texts aside from the task, before and after training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lily.errors import LilyError
from lily.recipes import data
from lily.recipes.data import tables
from lily.recipes.spec.places import located
from lily.recipes.spec.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lily.recipes.data.tasks import Example

LOSS = "general_loss"  # what the evaluations of a run call it
SHORTEST = 2  # tokens: the first one is not predicted


def general_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The encoded texts of the recipe's `forgetting`, with a label on every token; none, where it has none.

    Raises:
        LilyError: if the file cannot be read, has no text in that column, or none of two tokens or more.
    """
    asked = recipe.forgetting
    if asked is None:
        return []
    with located(recipe, "forgetting", "file"):
        texts = data.texts_of(asked.file, asked.column, "forgetting.column", asked.max_rows, recipe.data.split.seed)
        encoded = [tokenizer(t, truncation=True, max_length=asked.max_length)["input_ids"] for t in texts]
        fitting = [list(ids) for ids in encoded if len(ids) >= SHORTEST]
        if not fitting:
            raise LilyError(
                f"no text of {tables.name_of(asked.file)} has {SHORTEST} tokens; there is nothing to predict"
            )
    return [{"input_ids": ids, "labels": ids} for ids in fitting]


def most(recipe: Recipe, found: dict[str, float]) -> float | None:
    """The largest loss on general text that the recipe allows its best adapter; None: any."""
    limit = None if recipe.forgetting is None else recipe.forgetting.limit
    return None if limit is None else found["before"] + limit


def of(before: float, last: float | None = None, after: float | None = None) -> dict[str, float]:
    """The figures of a run, as `metrics.json` has them.

    Args:
        before: mean loss per token of the untrained model.
        last: after training; None: nothing was trained.
        after: with the best adapter.
    """
    last = before if last is None else last
    after = last if after is None else after
    return {"before": before, "last": last, "after": after, "increase": after - before}
