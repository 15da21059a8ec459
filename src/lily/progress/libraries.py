"""What other libraries say: kept in the log instead of shown, except their errors."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from lily.progress.progress import Progress

OWN = "lily"  # whose warnings are shown
Taken = list[tuple[logging.Logger, logging.Handler, bool]]


class Keeper(logging.Handler):
    """Writes records to a command's log; errors are shown too."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self.progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        text = f"{record.name}: {self.format(record)}"
        if record.levelno >= logging.ERROR:
            self.progress.warn(text)
        else:
            self.progress.keep(text)


@contextlib.contextmanager
def kept(progress: Progress, imports: Sequence[str] = ()) -> Iterator[None]:
    """Within: warnings and log records of other libraries go to the log; of Lily's own, all are shown.

    Args:
        progress: whose log; if it is verbose, everything is shown as the libraries do.
        imports: modules to import here, since some speak when they are imported.
    """
    if progress.verbose:
        yield
        return
    keeper, taken = Keeper(progress), Taken()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if _warned_by_us():
            progress.warn(f"warning: {message}")
        else:
            progress.keep(warnings.formatwarning(message, category, *where[:2]).strip())

    logging.root.addHandler(keeper)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            for module in imports:
                import_module(module)
                _take(taken, keeper)
            yield
    finally:
        logging.root.removeHandler(keeper)
        for logger, handler, propagated in taken:
            logger.addHandler(handler)
            logger.propagate = propagated


def _take(taken: Taken, keeper: logging.Handler) -> None:
    """Send to the root logger what loggers write to the terminal themselves."""
    for logger in [found for found in logging.root.manager.loggerDict.values() if isinstance(found, logging.Logger)]:
        for handler in list(logger.handlers):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                taken.append((logger, handler, logger.propagate))
                logger.removeHandler(handler)
                logger.propagate = True


def _warned_by_us() -> bool:
    """Whether Lily called `warnings.warn`: the first caller that is not `warnings` itself or this module."""
    frame = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if name not in (__name__, "warnings", "_py_warnings"):
            return name.partition(".")[0] == OWN
        frame = frame.f_back  # type: ignore[assignment]
    return False
