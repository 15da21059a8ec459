"""Fixtures shared by the tests of pages; what they are made of is in recipes_helpers.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def working_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Recipes' files may only write below the working directory, so that is where temporary folders are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.getbasetemp())
        yield
