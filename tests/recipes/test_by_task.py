"""The table of functions by task: each exists, and the two of a verb can be called alike."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

from lily.recipes.by_task import FUNCTIONS


@pytest.mark.parametrize("verb", FUNCTIONS)
def test_both_tasks_have_the_verb_and_take_the_same_arguments(verb):
    signatures = []
    for path in FUNCTIONS[verb]:
        module, _, name = path.rpartition(".")
        signatures.append(inspect.signature(getattr(import_module(module), name)).parameters)
    text, drawing = signatures
    # what `lily.recipes.train.train` takes beyond that is for searches, which are over text and images
    assert list(drawing) == [name for name in text if name not in ("watch", "validation_only", "who")]
