"""Fixtures shared by the tests of searches and sweeps; what they are made of is in recipes_helpers.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes_helpers import chat_model, encoder, rows, table, write_jsonl

__all__ = ["chat_model", "encoder", "rows", "table", "write_jsonl"]


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes' files may only write below the working directory."""
    monkeypatch.chdir(tmp_path)
