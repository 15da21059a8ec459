"""What went wrong: confusion and scores by class, the worst mistakes with their inputs, and answers that were cut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lily.recipes.data.tables import Row
from lily.recipes.scoring.answer_lengths import AnswerLengths

WHOLE = 100  # classes; of more, the confusion is kept as its most frequent pairs alone
PAIRS = 20
MISTAKES = 20
TEXT = 2000  # characters of an input that are kept


@dataclass(frozen=True)
class ClassScore:
    """How a class fares, over rows whose expected class it is (`support`) or whose predicted class it is.

    Attributes:
        precision: share of its predictions that are right; None if it is never predicted.
        recall: share of its rows that are recognized; None if it has no rows.
        f1: harmonic mean of both; None if it has neither rows nor predictions.
    """

    name: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    predicted: int


@dataclass(frozen=True)
class Confused:
    """Rows of one class that are taken for another."""

    expected: str
    predicted: str
    rows: int


@dataclass(frozen=True)
class Classes:
    """A classifier's scores by class.

    Attributes:
        scores: of all classes, in their order.
        confusion: rows by expected class (outer) and predicted class (inner); None with more than `WHOLE` classes.
        confused: the most frequent pairs of different classes, most frequent first.
    """

    scores: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    confused: tuple[Confused, ...]

    @property
    def weakest(self) -> list[ClassScore]:
        """The classes with rows, by rising F1."""
        return sorted((score for score in self.scores if score.support), key=lambda score: score.f1 or 0.0)


def only_class(scores: Sequence[ClassScore]) -> str | None:
    """The class that is predicted for every row, though rows are of several."""
    predicted = [score.name for score in scores if score.predicted]
    return predicted[0] if len(predicted) == 1 < sum(score.support > 0 for score in scores) else None


@dataclass(frozen=True)
class Mistake:
    """A row that is wrong.

    Attributes:
        row: its number among the rows, from 1, as in `predictions.json`.
        input: its text (and second text), or the name of its image with the folder.
        expected: the class or number.
        predicted: the class or number.
        confidence: probability of the predicted class; None for numbers.
    """

    row: int
    input: str
    expected: str
    predicted: str
    confidence: float | None


@dataclass(frozen=True)
class Review:
    """What a model does wrong on rows, beside its metrics; a part is None where the task has none.

    Attributes:
        classes: of a classifier.
        mistakes: a classifier's most confident ones, or the largest errors of numbers; the worst is first.
        answers: lengths of generated answers.
    """

    classes: Classes | None = None
    mistakes: tuple[Mistake, ...] = ()
    answers: AnswerLengths | None = None

    def with_answers(self, lengths: AnswerLengths | None) -> Review:
        """The same with the lengths of a few answers, where all of them were not measured."""
        return self if self.answers is not None else replace(self, answers=lengths)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Review | None:
        """From the values of `to_dict`; None where an earlier version wrote none.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: if they are not of this form.
        """
        if not values:
            return None
        classes, answers = values["classes"], values["answers"]
        return cls(
            None if classes is None else _read_classes(classes),
            tuple(_read_mistake(mistake) for mistake in values["mistakes"]),
            None if answers is None else AnswerLengths(**{name: int(number) for name, number in answers.items()}),
        )


def of_classes(
    outputs: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], labels: Sequence[str], rows: Sequence[Row]
) -> Review:
    """The review of a classifier.

    Args:
        outputs: logits (rows, classes).
        expected: class ids (rows,).
        labels: names of the classes.
        rows: their inputs.
    """
    predicted = outputs.argmax(-1)
    powers = np.exp(outputs - outputs.max(-1, keepdims=True))
    confidence = powers.max(-1) / powers.sum(-1)
    wrong = np.flatnonzero(predicted != expected)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    mistakes = [
        Mistake(int(i) + 1, input_of(rows[i]), labels[expected[i]], labels[predicted[i]], _number(confidence[i]))
        for i in worst
    ]
    return Review(classes(predicted, expected, labels), tuple(mistakes))


def of_numbers(predicted: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], rows: Sequence[Row]) -> Review:
    """The review of a regression, from numbers (rows,): its largest errors."""
    size = np.abs(predicted - expected)
    worst = np.argsort(-size, kind="stable")[:MISTAKES]
    return Review(
        mistakes=tuple(
            Mistake(int(i) + 1, input_of(rows[i]), f"{expected[i]:.4g}", f"{predicted[i]:.4g}", None)
            for i in worst
            if size[i] > 0
        )
    )


def classes(predicted: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], labels: Sequence[str]) -> Classes:
    """Confusion and scores by class from class ids (rows,)."""
    from sklearn import metrics

    ids = range(len(labels))
    counts = metrics.confusion_matrix(expected, predicted, labels=ids)
    scores = metrics.precision_recall_fscore_support(expected, predicted, labels=ids, zero_division=np.nan)
    totals = counts.sum(0)
    apart = counts - np.diag(np.diag(counts))
    order = np.argsort(-apart, axis=None, kind="stable")[:PAIRS]
    pairs = [(*divmod(int(i), len(labels)), int(apart.flat[i])) for i in order if apart.flat[i]]
    return Classes(
        tuple(
            ClassScore(name, _number(precision), _number(recall), _number(f1), int(support), int(total))
            for name, precision, recall, f1, support, total in zip(labels, *scores, totals, strict=True)
        ),
        tuple(tuple(map(int, line)) for line in counts) if len(labels) <= WHOLE else None,
        tuple(Confused(labels[i], labels[j], count) for i, j, count in pairs),
    )


def input_of(row: Row) -> str:
    """A row's input for people: its texts, or its image's name with the folder."""
    if "image" in row:
        return "/".join(Path(row["image"]).parts[-2:]) if isinstance(row["image"], str) else "an image"
    text = "\n".join(str(row[name]).strip() for name in ("text", "text_pair") if row.get(name))
    return text if len(text) <= TEXT else f"{text[:TEXT]}..."


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _read_classes(values: Mapping[str, Any]) -> Classes:
    confusion = values["confusion"]
    scores = tuple(
        ClassScore(
            str(score["name"]),
            _read_share(score["precision"]),
            _read_share(score["recall"]),
            _read_share(score["f1"]),
            int(score["support"]),
            int(score["predicted"]),
        )
        for score in values["scores"]
    )
    if confusion is not None and [len(line) for line in confusion] != [len(scores)] * len(scores):
        raise ValueError("review.classes.confusion is not a square of the classes")
    return Classes(
        scores,
        None if confusion is None else tuple(tuple(map(int, line)) for line in confusion),
        tuple(Confused(str(p["expected"]), str(p["predicted"]), int(p["rows"])) for p in values["confused"]),
    )


def _read_mistake(values: Mapping[str, Any]) -> Mistake:
    return Mistake(
        int(values["row"]),
        str(values["input"]),
        str(values["expected"]),
        str(values["predicted"]),
        _read_share(values["confidence"]),
    )


def _read_share(value: Any) -> float | None:
    return None if value is None else float(value)
