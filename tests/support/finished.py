"""Finished runs, trained once per test process; a test that writes into one gets a copy."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from recipes_helpers import classification, sft
from runs import make

from lily.recipes import train
from lily.recipes.results.result import Result


@dataclass(frozen=True)
class Finished:
    """A run's folder, which no test may change, and its result."""

    run: Path
    result: Result

    def copy(self, folder: Path) -> Path:
        """A copy of the run, `folder / "run"`."""
        return Path(shutil.copytree(self.run, folder / "run"))


def _train(folder: Path, kind: object, model: Path, *changes: str) -> Finished:
    # a folder outside the working directory must be named as an override
    recipe = make(kind, folder, model, [f"output={folder}/run", *changes])
    return Finished(folder / "run", train.train(recipe, quiet=True))


@pytest.fixture(scope="session")
def classifier_run(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Finished:
    """A classifier with routing by sequence that has learned its task."""
    return _train(tmp_path_factory.mktemp("classifier-run"), classification, encoder)


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Finished:
    """A chat model with routing by token, after three epochs."""
    return _train(tmp_path_factory.mktemp("chat-run"), sft, chat_model, "train.epochs=3")
