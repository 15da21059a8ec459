"""What all tests share: no network, and the two axes of the matrix."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from helpers import BUILDERS


@pytest.fixture(params=sorted(BUILDERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["token", "sequence", "batch", "static", "uniform"])
def routing(request: pytest.FixtureRequest) -> str:
    return request.param
