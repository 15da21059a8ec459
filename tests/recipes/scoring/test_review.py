"""The review of a model's predictions: scores by class against scikit-learn's, and the worst mistakes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score, precision_score, recall_score

from lily.recipes.scoring import review
from lily.recipes.scoring.review import Review

LABELS = ("cat", "dog", "owl")


def logits(predicted, confidence, classes=3):
    """Logits whose softmax gives the predicted class this probability."""
    out = np.zeros((len(predicted), classes))
    for line, at, p in zip(out, predicted, confidence, strict=True):
        line[at] = np.log(p / (1 - p) * (classes - 1))
    return out


def reviewed(predicted, expected, confidence=None, rows=None, labels=LABELS):
    confidence = confidence or [0.9] * len(predicted)
    rows = rows or [{"text": f"text {i}"} for i in range(len(predicted))]
    return review.of_classes(logits(predicted, confidence, len(labels)), np.array(expected), labels, rows)


def test_scores_by_class_are_scikit_learns():
    rng = np.random.default_rng(0)
    predicted, expected = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    found = reviewed(predicted, expected).classes
    assert np.array_equal(found.confusion, confusion_matrix(expected, predicted))
    for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert [getattr(s, name) for s in found.scores] == pytest.approx(
            score(expected, predicted, average=None), abs=1e-6
        )
    assert [s.support for s in found.scores] == np.bincount(expected).tolist()
    assert [s.predicted for s in found.scores] == np.bincount(predicted).tolist()
    counts = [pair.rows for pair in found.confused]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == int((predicted != expected).sum())


def test_a_class_without_predictions_has_no_precision_and_one_without_rows_no_recall():
    cat, dog, owl = reviewed([0, 0, 2], [0, 1, 0]).classes.scores
    assert (cat.precision, cat.recall) == (0.5, 0.5)
    assert (dog.precision, dog.recall, dog.f1, dog.support) == (None, 0.0, 0.0, 1)
    assert (owl.precision, owl.recall, owl.f1, owl.support) == (0.0, None, 0.0, 0)
    nobody = reviewed([0], [0]).classes.scores[2]
    assert (nobody.precision, nobody.recall, nobody.f1) == (None, None, None)


def test_the_most_confident_mistake_is_first_with_its_text_and_its_row():
    found = reviewed([0, 1, 2, 0], [0, 0, 1, 1], [0.99, 0.6, 0.95, 0.7]).mistakes
    assert [(m.row, m.expected, m.predicted) for m in found] == [
        (3, "dog", "owl"),
        (4, "dog", "cat"),
        (2, "cat", "dog"),
    ]
    assert [m.confidence for m in found] == pytest.approx([0.95, 0.7, 0.6])
    assert found[0].input == "text 2"
    assert len(reviewed([0] * 50, [1] * 50).mistakes) == review.MISTAKES


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"text": " a ", "text_pair": "b"}, "a\nb"),
        ({"image": "/home/me/photos/owl/12.png"}, "owl/12.png"),
        ({"image": object()}, "an image"),
        ({"text": "x" * 3000}, "x" * 2000 + "..."),
    ],
)
def test_an_input_is_its_texts_or_its_images_name(row, shown):
    assert review.input_of(row) == shown


def test_of_very_many_classes_the_confusion_is_kept_as_its_most_frequent_pairs():
    labels = tuple(f"c{i}" for i in range(review.WHOLE + 1))
    found = reviewed([0, 0, 1, 5], [7, 7, 1, 9], labels=labels).classes
    assert found.confusion is None
    assert [(p.expected, p.predicted, p.rows) for p in found.confused] == [("c7", "c0", 2), ("c9", "c5", 1)]
    assert len(found.scores) == len(labels)


def test_numbers_have_no_classes_and_their_largest_errors_are_first():
    rows = [{"text": name} for name in "abc"]
    found = review.of_numbers(np.array([1.0, 5.0, 2.5]), np.array([1.0, 2.0, 2.0]), rows)
    assert found.classes is None
    assert [(m.row, m.input, m.expected, m.predicted, m.confidence) for m in found.mistakes] == [
        (2, "b", "2", "5", None),
        (3, "c", "2", "2.5", None),
    ]


def test_a_review_is_read_back_from_its_json_and_a_damaged_one_is_refused():
    whole = reviewed([0, 1, 2, 0], [0, 0, 1, 1])
    values = json.loads(json.dumps(whole.to_dict()))
    assert Review.from_dict(values) == whole
    assert Review.from_dict(None) is None
    values["classes"]["confusion"].pop()
    with pytest.raises(ValueError, match="not a square"):
        Review.from_dict(values)
    for damaged in ({"classes": 3}, {"classes": None, "mistakes": [{}], "answers": None}, [1]):
        with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
            Review.from_dict(damaged)
