"""Tiny models and tables, and a comparison of a classifier."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes_helpers import chat_model, chat_table, classification, encoder, table, write_recipe

__all__ = ["chat_model", "chat_table", "encoder", "table"]


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes' files may only write below the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe(encoder: Path, table: Path, tmp_path: Path) -> str:
    values = classification(encoder, table, tmp_path)
    values["train"]["epochs"] = 4
    del values["output"]
    return write_recipe(tmp_path, values)
