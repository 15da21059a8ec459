"""The progress of a command: what is to come, what is done, what is shown, and what goes to the log."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import IO, TypeVar

from lily.progress.display import Line, Silent
from lily.progress.estimate import Estimate

Batch = TypeVar("Batch", bound=Sequence[object])
KEPT = 10_000  # lines that are kept until there is a log file


class Progress:
    """Told by whatever works; shows it and writes the log.

    Args:
        display: where it is shown.
        verbose: libraries may say what they like; see `lily.progress.libraries`.
        estimate: of the time left.

    Attributes:
        names: what contestants are called, in the order in which they are announced; sets the width of a line's name.
    """

    def __init__(
        self, display: Silent | None = None, *, verbose: bool = False, estimate: Estimate | None = None
    ) -> None:
        self.display, self.verbose = display or Silent(), verbose
        self.estimate = estimate or Estimate()
        self.names: dict[str, None] = {}
        self.log: Path | None = None
        self._file: IO[str] | None = None
        self._early: deque[str] = deque(maxlen=KEPT)
        self._at: tuple[str, str] = ("", "")
        self._widths = (0, 0, 0)  # of the columns of the lines so far

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.display.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within: `current` is this one."""
        token = CURRENT.set(self)
        try:
            yield
        finally:
            CURRENT.reset(token)

    # -- work

    def announce(self, names: Iterable[str]) -> None:
        """Say who will be named in lines."""
        self.names.update(dict.fromkeys(names))

    def expect(self, who: str, stage: str, units: Mapping[str, float]) -> None:
        """Say what a stage will do: kind of work -> units."""
        for kind, count in units.items():
            self.estimate.expect(who, stage, kind, count)

    @contextlib.contextmanager
    def stage(self, who: str, stage: str) -> Iterator[None]:
        """Within: `advance` counts for this stage, and the bar names it."""
        before, self._at = self._at, (who, stage)
        self.restart()
        self._show()
        try:
            yield
        finally:
            self._at = before

    def advance(self, units: float, kind: str) -> None:
        """Count work of the present stage."""
        self.estimate.advance(*self._at, kind, units)
        self._show()

    def count(self, who: str, stage: str, units: float, kind: str) -> None:
        """Count work of a given stage."""
        self.estimate.advance(who, stage, kind, units)
        self._show()

    def end(self, who: str, stage: str | None = None) -> None:
        """What is left of a stage (None: of all stages of a contestant) will not come."""
        self.estimate.end(who, stage)
        self._show()

    def _show(self) -> None:
        who, stage = self._at
        if not stage:  # between two stages the last one stays
            return
        self.display.update(f"{who}: {stage}" if who else stage, self.estimate.share(), self.estimate.left())

    def restart(self) -> None:
        """The time since the last report belongs to no work."""
        self.estimate.last = self.estimate.clock()

    # -- words

    def evaluated(self, who: str, what: str, values: Sequence[str], best: bool = False) -> None:
        """Show one evaluation."""
        line, named = Line(who, what, tuple(values), best), max(map(len, (*self.names, who)))
        before = self._widths
        self._widths = (named, max(before[1], len(what)), max(before[2], len("  ".join(values))))
        left = self.estimate.left()
        self.display.line(line, self._widths, left)
        self.keep(line.text(self._widths, left))

    def tell(self, text: str) -> None:
        """Show text, unless the command is quiet."""
        self.display.tell(text)
        self.keep(text)

    def warn(self, text: str) -> None:
        """Show text, even if the command is quiet."""
        self.display.warn(text)
        self.keep(text)

    # -- the log

    def log_to(self, path: Path) -> None:
        """Append to a log file from now on, with what was said before; the first log of a command stays."""
        if self.log is not None:
            return
        self.log = path
        try:
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            self.display.warn(f"warning: there will be no log: {path}: {error.strerror}")
        while self._early:
            self._write(self._early.popleft())

    def keep(self, text: str) -> None:
        """Write text to the log alone."""
        self._write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}")

    def _write(self, line: str) -> None:
        if self.log is None:
            self._early.append(line)
        elif self._file is not None:
            try:
                self._file.write(line.encode("utf-8", "backslashreplace").decode() + "\n")
                self._file.flush()
            except OSError as error:  # a full disk ends the run where it loses more than a log
                self._file = None
                self.display.warn(f"warning: the log ends here: {self.log}: {error.strerror}")


CURRENT: ContextVar[Progress | None] = ContextVar("CURRENT", default=None)


def current() -> Progress:
    """The progress of the running command; one that shows nothing where there is none."""
    return CURRENT.get() or Progress()


def counted(batches: Iterable[Batch], kind: str, told: Callable[[], Progress] = current) -> Iterator[Batch]:
    """The batches; each counts as work of the present stage once the next one is asked for."""
    progress = told()
    for batch in batches:
        yield batch
        progress.advance(len(batch), kind)
