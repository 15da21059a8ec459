"""What all tests share: no network, the two axes of the matrix, and the summary of what was withstood."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torchvision_cpu

torchvision_cpu.declare()

from finished import chat_run, classifier_run  # noqa: E402
from helpers import BUILDERS  # noqa: E402
from recipes_helpers import chat_model, chat_table, encoder, table  # noqa: E402

__all__ = ["chat_model", "chat_run", "chat_table", "classifier_run", "encoder", "table"]


@pytest.fixture(params=sorted(BUILDERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["token", "sequence", "batch", "static", "uniform"])
def routing(request: pytest.FixtureRequest) -> str:
    return request.param


def pytest_configure(config: pytest.Config) -> None:
    if "LILY_TALLY" not in os.environ:  # set before xdist starts its workers, who count into the same file
        handle, os.environ["LILY_TALLY"] = tempfile.mkstemp(prefix="lily-tally-")
        os.close(handle)
        config.add_cleanup(lambda: Path(os.environ.pop("LILY_TALLY")).unlink())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    total: Counter[str] = Counter()
    for line in Path(os.environ["LILY_TALLY"]).read_text("utf-8").splitlines():
        count, _, what = line.partition(" ")
        total[what] += int(count)
    if total:
        terminalreporter.section("withstood")
        for what, count in sorted(total.items()):
            terminalreporter.write_line(f"{count:6,} {what}")
