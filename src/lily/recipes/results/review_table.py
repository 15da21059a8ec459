"""What went wrong, for the terminal: the scores of the classes, the worst mistakes, and answers that were cut."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from lily.io import tables
from lily.recipes.scoring.metrics import shown
from lily.recipes.scoring.review import ClassScore, Mistake, Review

FEW = 10  # classes that are all shown
WEAKEST = 5  # of more classes
WORST = 3  # mistakes


def print_review(review: Review | None, console: Console) -> None:
    """Print a review in a few lines; nothing where there is none."""
    if review is None:
        return
    if review.classes is not None:
        header, rows, caption = class_table(review)
        for table in tables.fitting(header, rows, console.width):
            console.print(table)
        if caption:
            console.print(caption, highlight=False)
    if review.mistakes:
        sort = "largest errors" if review.classes is None else "most confident mistakes"
        console.print(f"{sort}:", highlight=False)
        for line in _lines(review.mistakes[:WORST], console.width):
            console.print(Text(line), no_wrap=True, overflow="ellipsis")
    if review.answers is not None and (warning := review.answers.warning()):
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)


def class_table(review: Review) -> tuple[list[str], list[list[str]], str]:
    """Header and lines by class, and a caption where not all classes are in them."""
    assert review.classes is not None
    scores, caption = list(review.classes.scores), ""
    if len(scores) > FEW:
        scores = review.classes.weakest[:WEAKEST]
        caption = f"the {len(scores)} of {len(review.classes.scores)} classes with the lowest F1"
    return ["class", "precision", "recall", "F1", "rows", "predicted"], list(map(class_line, scores)), caption


def class_line(score: ClassScore) -> list[str]:
    """A class's line: shares in percent, and its rows."""
    shares = (shown("f1", value) for value in (score.precision, score.recall, score.f1))
    return [score.name, *shares, f"{score.support:,}", f"{score.predicted:,}"]


def headline(mistake: Mistake) -> str:
    """What was expected and predicted instead, in a few words."""
    sure = "" if mistake.confidence is None else f" ({100 * mistake.confidence:.1f}%)"
    return f"row {mistake.row:,}: {mistake.expected}, predicted {mistake.predicted}{sure}"


def _lines(mistakes: tuple[Mistake, ...], width: int) -> Iterator[str]:
    for mistake in mistakes:
        yield f"  {headline(mistake)}"
        text = " ".join(mistake.input.split())
        yield f"    {text if len(text) <= width - 4 else f'{text[: width - 7]}...'}"
