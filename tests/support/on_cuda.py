"""Tests that need a GPU: skipped without one; `make gpu` runs all of them, in the files that import this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

Test = TypeVar("Test", bound=Callable[..., None])

MARKS = (pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
DEVICES = ["cpu", pytest.param("cuda", marks=MARKS)]  # of a test that is the same on both


def needs_gpu(test: Test) -> Test:
    """Mark a test that a CPU alone cannot run."""
    for mark in MARKS:
        test = mark(test)
    return test
