"""What all tests share: no network, the two axes of the matrix, and the summary of what was withstood."""

from __future__ import annotations

import functools
import gc
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Generator
from pathlib import Path

# Set before torch is imported: on models 32 wide a second thread only costs, and every worker has a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Absolute, since many tests change the working directory. Tests that need what is absent skip.
os.environ.setdefault("LILY_DATA", str(Path(__file__).parents[2] / "shared" / "data"))

import pytest
import torchvision_cpu

gc.disable()  # what imports make stays: half a million objects, which collections need not look through each time
torchvision_cpu.declare()

from chat_templates import tools_model  # noqa: E402
from finished import chat_run, classifier_run  # noqa: E402
from helpers import BUILDERS  # noqa: E402
from jinja2 import Environment  # noqa: E402
from recipes_helpers import chat_model, chat_table, encoder, table  # noqa: E402
from stranger import stranger  # noqa: E402

gc.freeze()
gc.enable()
# A saved adapter has a card, whose template would be compiled again for each: a tenth of the time of a tiny run.
Environment.compile = functools.lru_cache(maxsize=16)(Environment.compile)  # type: ignore[method-assign]

__all__ = ["chat_model", "chat_run", "chat_table", "classifier_run", "encoder", "stranger", "table", "tools_model"]

ROUTINGS = ["token", "sequence", "batch", "static", "uniform"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`kind` and `routing`: every routing on one kind of model, and every kind of model with one routing.

    Layers decide the routing and injection decides the kind, so that the other pairs prove nothing more.
    """
    free = {name for name in ("kind", "routing") if name in metafunc.fixturenames and not _named(metafunc, name)}
    if free == {"kind", "routing"}:
        pairs = [("llama", routing) for routing in ROUTINGS]
        pairs += [(kind, ROUTINGS[i % 2]) for i, kind in enumerate(sorted(BUILDERS)) if kind != "llama"]
        metafunc.parametrize(("kind", "routing"), pairs)
    elif "kind" in free:
        metafunc.parametrize("kind", sorted(BUILDERS))
    elif "routing" in free:
        metafunc.parametrize("routing", ROUTINGS)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collected modules stay too."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def _named(metafunc: pytest.Metafunc, name: str) -> bool:
    """Whether a test says itself which values a name takes."""
    marks = metafunc.definition.iter_markers("parametrize")
    names = [mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0] for mark in marks]
    return name in [one.strip() for group in names for one in group]


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`sample(every)`: of a test's cases the first and about one of `every` run by default, the others are slow.

    Which ones follows from their names, so that they are spread over all parameters and stay the same.
    """
    seen: set[tuple[Path, str]] = set()
    for item in items:
        test = item.path, getattr(item, "originalname", item.name)
        mark = item.get_closest_marker("sample")
        if mark is not None and test in seen and zlib.crc32(item.name.encode()) % mark.kwargs["every"]:
            item.add_marker(pytest.mark.slow)
        seen.add(test)


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
