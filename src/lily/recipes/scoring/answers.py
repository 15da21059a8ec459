"""Extract answers from texts; `exact_match` compares those of the generated text and of the completion.

Sources: the last number and what follows `####` as in OpenAI's grade-school-math and lm-evaluation-harness' gsm8k; the
first match of a pattern as in LLM-Adapters' commonsense_evaluate.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from lily.errors import LilyError
from lily.recipes.data import chats
from lily.recipes.data.sft import completion_of
from lily.recipes.data.tables import Row
from lily.recipes.spec.locations import located
from lily.recipes.spec.schema import Pattern, Recipe

NUMBER = r"-?\$?(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)"
MARKED = re.compile(rf"####\s*({NUMBER})")
ANY = re.compile(NUMBER)

# Pattern and text may be untrusted, and a regular expression may backtrack without end (ReDoS).
MAX_PATTERN = 500
MAX_REPEATS = 1000  # counted repeats are expanded when a pattern is compiled, nested ones multiply
MAX_TEXT = 10_000
MAX_SECONDS = 1.0


def answer_in(text: str, recipe: Recipe) -> str:
    """The answer in a text by `generation.answer`, without white space at its ends; empty if there is none.

    Raises:
        LilyError: if the recipe's pattern exceeds the time limit.
    """
    mode = recipe.generation.answer
    if mode == "whole":
        return text.strip()
    if mode == "number":
        return number_in(text)
    import regex  # has a timeout; expressions that PEFT applies with re need lily.checkpoint.bounded_regex instead

    try:
        match = regex.compile(mode.pattern).search(text[:MAX_TEXT], timeout=MAX_SECONDS)
    except TimeoutError:
        with located(recipe, "generation", "answer"):
            raise LilyError(
                f"generation.answer: the pattern {mode.pattern!r} takes over {MAX_SECONDS:g} s on a text of "
                f"{min(len(text), MAX_TEXT)} characters; rewrite it without nested repeats"
            ) from None
    return "" if match is None else (match.group(1 if match.re.groups else 0) or "").strip()


def number_in(text: str) -> str:
    r"""The number after the first `####`, else the last number; without commas, dollar signs and a final dot.

    >>> number_in("So 1,200 + 34.\n#### 1,234")
    '1234'
    >>> number_in("It costs $18.")
    '18'
    """
    marked = MARKED.search(text)
    number = marked.group(1) if marked else next(iter(reversed(ANY.findall(text))), "")
    return number.replace("$", "").replace(",", "").rstrip(".")


def problem_of(pattern: Pattern) -> str | None:
    """What is wrong with a pattern; None if it is valid."""
    text = pattern.pattern
    if len(text) > MAX_PATTERN:
        return f"has {len(text)} characters; at most {MAX_PATTERN}"
    counts = re.findall(r"\{([0-9]*),?([0-9]*)\}", text)
    if math.prod(max(int(count or 0) for count in (*pair, "1")) for pair in counts) > MAX_REPEATS:
        return f"its counted repeats multiply to over {MAX_REPEATS}; write + or *, or smaller counts"
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is not a regular expression ({error})"
    return None


def expected_answers(rows: Sequence[Row], recipe: Recipe) -> list[str]:
    """The answers in the completions of sft rows.

    Raises:
        LilyError: for a completion without an answer.
    """
    out = []
    for row in rows:
        completion = completion_of(row)
        last = chats.answer(row["messages"]) if "messages" in row else {}
        if "tool_calls" in last or ("reasoning_content" in last and recipe.generation.answer == "whole"):
            what = "tool calls" if "tool_calls" in last else "reasoning"
            with located(recipe, "metrics"):
                raise LilyError(
                    f"{row['where']}: the last answer has {what}, which each template writes in another way, so "
                    "exact_match cannot compare; use the loss, or (for reasoning) a pattern in generation.answer"
                )
        answer = answer_in(completion, recipe)
        if not answer:
            shown = completion if len(completion) <= 80 else f"{completion[:77]}..."
            with located(recipe, "generation", "answer"):
                raise LilyError(
                    f"generation.answer finds no answer in the completion {shown!r}, so exact_match cannot compare; "
                    "change it, or the data"
                )
        out.append(answer)
    return out
