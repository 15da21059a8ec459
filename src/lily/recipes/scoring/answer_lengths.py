"""How long generated answers are beside `generation.max_new_tokens`, which cuts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lily.recipes.scoring.answers import answer_in
from lily.recipes.spec.schema import Pattern, Recipe


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
            f"{self.count:,} answers have {self.median:,} tokens in the median and {self.longest:,} at most; the "
            f"longest expected one has {self.longest_expected:,}, and generation.max_new_tokens is {self.limit:,}."
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
