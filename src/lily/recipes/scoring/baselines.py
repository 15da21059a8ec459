"""Baselines without an adapter, on the same training and held-out rows as a recipe."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from lily.recipes import models
from lily.recipes.data.rows import Splits
from lily.recipes.data.tables import Row
from lily.recipes.models.load import heads_of
from lily.recipes.models.precision import precision_of
from lily.recipes.scoring.evaluate import head_outputs
from lily.recipes.scoring.inference import place
from lily.recipes.scoring.metrics import compute, metrics_of
from lily.recipes.spec.schema import Recipe

VALIDATION = "validation"


def run(name: str, recipe: Recipe, splits: Splits) -> dict[str, float]:
    """The metrics of `majority` (the mean, for regression), `tfidf` or `frozen` on held-out rows, and its seconds.

    Under `VALIDATION` the recipe's main metric on the validation rows, beside the curves of what trains in steps.
    """
    started = time.perf_counter()
    rows = [*splits.held_out, *(splits.validation if splits.test else ())]
    expected = _targets(rows, splits.labels)
    targets = _targets(splits.train, splits.labels)
    if name == "majority":
        predicted = _majority(rows, splits.labels, targets)
    elif name == "tfidf":
        predicted = _tfidf(rows, splits, targets)
    else:
        predicted = _frozen(rows, recipe, splits, targets)
    names, count = [metric for metric in metrics_of(recipe) if metric != "loss"], len(splits.held_out)
    figures = {**compute(names, predicted[:count], expected[:count]), "seconds": time.perf_counter() - started}
    main = metrics_of(recipe)[0]
    if splits.validation and main in figures:
        start = count if splits.test else 0
        figures[VALIDATION] = compute([main], predicted[start:], expected[start:])[main]
    return figures


def _targets(rows: Sequence[Row], labels: Sequence[str] | None) -> Any:
    if labels is None:
        return np.array([row["label"] for row in rows])
    ids = {name: i for i, name in enumerate(labels)}
    return np.array([ids[row["label"]] for row in rows])


def _majority(rows: Sequence[Row], labels: Sequence[str] | None, targets: Any) -> Any:
    guess = np.bincount(targets).argmax() if labels is not None else targets.mean()
    return np.full(len(rows), guess)


def _tfidf(rows: Sequence[Row], splits: Splits, targets: Any) -> Any:
    """A linear model on TF-IDF of words and word pairs, separately for each text of a pair.

    If the training texts have no word, it predicts the majority.
    """
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    parts: list[tuple[Any, Any]] = []
    for column in ("text", "text_pair"):
        if any(re.search(r"\w", row.get(column, "")) for row in splits.train):
            # the default pattern drops words of one character
            vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
            fitted = vectorizer.fit_transform(row[column] for row in splits.train)
            parts.append((fitted, vectorizer.transform(row[column] for row in rows)))
    if not parts:
        return _majority(rows, splits.labels, targets)
    train, judged = (hstack([part[i] for part in parts]).tocsr() for i in range(2))
    linear = _linear(splits.labels)
    return linear.fit(train, targets).predict(judged)


def _frozen(rows: Sequence[Row], recipe: Recipe, splits: Splits, targets: Any) -> Any:
    """A linear model on the frozen encoder's mean last hidden state; for images on the input of the model's head."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = place(models.load_model(recipe.model, recipe.task, ("0", "1"), precision=precision_of(recipe)))
    processor = models.load_processor(recipe, model.config)
    pooled = _head_input if recipe.task == "image-classification" else _mean_state
    features = head_outputs(model, [*splits.train, *rows], recipe, processor, pooled)
    count = len(splits.train)
    probe = make_pipeline(StandardScaler(), _linear(splits.labels, 0.01))
    return probe.fit(features[:count], targets).predict(features[count:])


def _linear(labels: Sequence[str] | None, strength: float = 1.0) -> Any:
    from sklearn.linear_model import LogisticRegression, Ridge

    return Ridge(1.0 / strength) if labels is None else LogisticRegression(C=strength, max_iter=2000)


def _mean_state(model: Any, inputs: dict[str, Any]) -> Any:
    """The mean of the last hidden states (batch, hidden), without padding."""
    states = model.base_model(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    return (states * mask).sum(1) / mask.sum(1)


def _head_input(model: Any, inputs: dict[str, Any]) -> Any:
    """The input of the model's head (batch, features), since models differ in how they pool."""
    inputs_of_head: list[Any] = []
    (name,) = heads_of(model)
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs_of_head.append(args[0]))
    try:
        model(**inputs)
    finally:
        hook.remove()
    return inputs_of_head[0].flatten(1)
