"""How long generated answers are beside `generation.max_new_tokens`, which cuts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lily.io.words import counted
from lily.recipes.data.sft import completion_of
from lily.recipes.data.tables import Row
from lily.recipes.scoring.answers import answer_in
from lily.recipes.spec.schema import Pattern, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Answer(NamedTuple):
    """A generated answer."""

    text: str  # without white space at its ends
    tokens: int  # that were generated, without the end token
    cut: bool  # ended by `generation.max_new_tokens`, not by an end token


@dataclass(frozen=True)
class AnswerLengths:
    """Lengths in tokens of generated answers and of the expected ones.

    Attributes:
        count: answers.
        median: of the generated ones.
        longest: of the generated ones.
        longest_expected: of the completions.
        cut: answers that `limit` ended; with a pattern in `generation.answer`, those among them without a match.
        limit: `generation.max_new_tokens`.
    """

    count: int
    median: int
    longest: int
    longest_expected: int
    cut: int
    limit: int

    def words(self) -> str:
        """The lengths in a sentence."""
        return (
            f"{counted(self.count, 'answer has', 'answers have')} {self.median:,} tokens in the median and "
            f"{self.longest:,} at most; the longest expected one has {self.longest_expected:,}, and "
            f"generation.max_new_tokens is {self.limit:,}."
        )

    def warning(self) -> str | None:
        """What to change if answers were cut; None if none was."""
        if not self.cut:
            return None
        more = max(2 * self.limit, self.longest_expected + 8)
        return (
            f"{self.cut:,} of {self.count:,} answers ({self.cut / self.count:.0%}) were cut at "
            f"generation.max_new_tokens={self.limit}; raise it, such as generation.max_new_tokens={more}"
        )


def lengths_of(answers: Sequence[Answer], expected: Sequence[int], recipe: Recipe) -> AnswerLengths | None:
    """The lengths of answers, and of the expected ones in tokens; None without answers."""
    if not answers:
        return None
    sizes = sorted(answer.tokens for answer in answers)
    by_pattern = isinstance(recipe.generation.answer, Pattern)
    cut = [answer for answer in answers if answer.cut and not (by_pattern and answer_in(answer.text, recipe))]
    return AnswerLengths(
        len(answers),
        sizes[len(sizes) // 2],
        sizes[-1],
        max(expected, default=0),
        len(cut),
        recipe.generation.max_new_tokens,
    )


def expected_tokens(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The number of tokens of each row's last completion, without special ones."""
    return [len(tokenizer(completion_of(row), add_special_tokens=False)["input_ids"]) for row in rows]


def unreachable(rows: Sequence[Row], name: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A warning about expected answers that are too long to be generated, where exact_match compares whole texts."""
    if recipe.generation.answer != "whole":
        return []
    limit, sizes = recipe.generation.max_new_tokens, expected_tokens(rows, tokenizer)
    over = sum(size > limit for size in sizes)
    if not over:
        return []
    return [
        f"{name}: {over:,} of {len(sizes):,} expected answers ({over / len(sizes):.0%}) are longer than "
        f"generation.max_new_tokens={limit}, so exact_match cannot find them; raise it to {max(sizes) + 8}"
    ]
