"""Where progress is shown: a bar in a terminal, plain lines elsewhere, a file for another process, or nowhere."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from lily.progress.estimate import clock_time

SELDOM = 60.0  # seconds between two plain lines about the share that is done
STEP = 0.1  # and the share between them
NOTED = 0.005  # share after which another process is told

Widths = tuple[int, int, int]  # of the columns: who, what, values


@dataclass(frozen=True)
class Line:
    """One evaluation.

    Attributes:
        who: the contestant.
        what: such as `epoch 1/3`.
        values: such as `accuracy 65.5`.
        best: whether it is the best so far.
    """

    who: str
    what: str
    values: tuple[str, ...]
    best: bool = False

    def text(self, widths: Widths, left: float | None = None) -> str:
        """The line, with its columns padded to widths."""
        time_left = [] if left is None else [f"{clock_time(left)} left"]
        columns = (self.who, self.what, "  ".join(self.values))
        padded = [text.ljust(width) for text, width in zip(columns, widths, strict=True)]
        return "  ".join([*padded, "best" if self.best else "    ", *time_left]).rstrip()


class Silent:
    """Shows warnings alone; the base of the others."""

    def warn(self, text: str) -> None:
        """Show a warning, whatever else is shown."""
        print(text, file=sys.stderr, flush=True)

    def tell(self, text: str) -> None:
        """Show text."""

    def line(self, line: Line, widths: Widths, left: float | None) -> None:
        """Show an evaluation."""
        self.tell(line.text(widths, left))

    def update(self, stage: str, share: float, left: float | None) -> None:
        """Show the stage, the share of the whole that is done and the seconds left."""

    def close(self) -> None:
        """Remove what does not stay."""


class Lines(Silent):
    """Plain lines on standard error."""

    def __init__(self) -> None:
        self.shown, self.at = 0.0, time.perf_counter()

    def tell(self, text: str) -> None:
        """Print it."""
        print(text, file=sys.stderr, flush=True)
        self.at = time.perf_counter()

    def update(self, stage: str, share: float, left: float | None) -> None:
        """Print it now and then, so that a log shows that hours without an evaluation are work."""
        if left is not None and round(share - self.shown, 6) >= STEP and time.perf_counter() > self.at + SELDOM:
            self.shown = share
            self.tell(f"{stage}  {share:.0%}  {clock_time(left)} left")


class Left(ProgressColumn):
    """The time left, which goes on falling between two updates."""

    def render(self, task: Task) -> Text:
        """Such as `02:10 left`."""
        until = task.fields.get("until")
        return Text("" if until is None else f"{clock_time(max(0.0, until - time.perf_counter()))} left")


class Bar(Silent):
    """One bar at the bottom of the terminal, with lines above it."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        percent = TextColumn("{task.percentage:>3.0f}%")
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(None), percent, Left())
        # what others print to standard error appears above the bar
        self.bar = Progress(
            *columns, console=self.console, transient=True, expand=True, redirect_stdout=False, refresh_per_second=5
        )
        self.task = self.bar.add_task("starting", total=1.0, until=None)
        self.bar.start()

    def warn(self, text: str) -> None:
        """Print it above the bar."""
        self.console.print(Text(text, style="yellow"), soft_wrap=True)

    def tell(self, text: str) -> None:
        """Print it above the bar."""
        self.console.print(Text(text), soft_wrap=True)

    def line(self, line: Line, widths: Widths, left: float | None) -> None:
        """Print it above the bar, the best so far in green."""
        text = Text(line.text(widths, left))
        text.highlight_regex(r"  best(?=  |$)", "green") if line.best else None
        self.console.print(text, soft_wrap=True)

    def update(self, stage: str, share: float, left: float | None) -> None:
        """Move the bar; it never goes back when speeds turn out lower than estimated."""
        until = None if left is None else time.perf_counter() + left
        done = max(share, self.bar.tasks[0].completed)
        self.bar.update(self.task, description=stage, completed=done, until=until)

    def close(self) -> None:
        """Remove the bar."""
        self.bar.stop()


class Events(Silent):
    """Lines of JSON in a file, which the process that started this one reads (`read_events`)."""

    def __init__(self, file: Path) -> None:
        self.file, self.noted = open(file, "w", encoding="utf-8"), 0.0  # noqa: SIM115

    def line(self, line: Line, widths: Widths, left: float | None) -> None:
        """Write it."""
        self._write({"what": line.what, "values": line.values, "best": line.best})

    def update(self, stage: str, share: float, left: float | None) -> None:
        """Write the share where it has grown enough."""
        if share >= self.noted + NOTED:
            self.noted = share
            self._write({"stage": stage, "share": round(share, 4)})

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _write(self, event: dict[str, Any]) -> None:
        self.file.write(json.dumps(event) + "\n")
        self.file.flush()


def read_events(file: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """The complete events from a position on, and the position after them; none while there is no file."""
    if not file.is_file():
        return [], start
    with open(file, "rb") as opened:
        opened.seek(start)
        whole = opened.read().rpartition(b"\n")[0]
    lines = whole.split(b"\n") if whole else []
    return [json.loads(line) for line in lines], start + len(whole) + bool(whole)


def standard(quiet: bool = False, plain: bool = False) -> Silent:
    """The display for standard error: a bar in a terminal, else plain lines; nothing if `quiet`."""
    if quiet:
        return Silent()
    terminal = sys.stderr.isatty() and not Console(stderr=True).is_dumb_terminal
    return Bar() if terminal and not plain else Lines()
