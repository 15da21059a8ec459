"""How much of a command's work is done, and how long the rest takes, from the speeds measured so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

# Cost of one unit of each kind of work, relative to judging one row: used for kinds that were not measured yet. Loading
# a model tells nothing about the others.
COSTS = {"judge": 1.0, "train": 3.0, "generate": 20.0, "fit": 0.05, "run": 1.0, "load": 0.0, "batch": 32.0, "draw": 1.0}
HALF_LIFE = 60.0  # seconds after which a measured speed counts half, since other programs come and go

Key = tuple[str, str, str]  # who, stage, kind


@dataclass
class Work:
    """Units of one kind of work."""

    expected: float = 0.0
    done: float = 0.0


@dataclass
class Speed:
    """Seconds and units of one kind of work, older ones counted less."""

    seconds: float = 0.0
    units: float = 0.0


class Estimate:
    """Work that is expected and done, by who does it, stage and kind; the time between two reports is the later one's.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.works: dict[Key, Work] = {}
        self.speeds: dict[str, Speed] = {}
        self.clock, self.began, self.last = clock, clock(), clock()

    def expect(self, who: str, stage: str, kind: str, units: float) -> None:
        """Set how many units there are in all; what is done already is part of them."""
        work = self.works.setdefault((who, stage, kind), Work())
        work.expected = max(units, work.done)

    def advance(self, who: str, stage: str, kind: str, units: float) -> None:
        """Count units that were done since the last report."""
        now = self.clock()
        elapsed, self.last = now - self.last, now
        work = self.works.setdefault((who, stage, kind), Work())
        work.done += units
        work.expected = max(work.expected, work.done)
        for speed in self.speeds.values():
            speed.seconds, speed.units = (
                value * 0.5 ** (elapsed / HALF_LIFE) for value in (speed.seconds, speed.units)
            )
        speed = self.speeds.setdefault(kind, Speed())
        speed.seconds, speed.units = speed.seconds + elapsed, speed.units + units

    def end(self, who: str, stage: str | None = None) -> None:
        """Drop what is not done of a stage (None: of all stages): it will not come, as after an early stop."""
        for (of, at, _), work in self.works.items():
            if of == who and stage in (None, at):
                work.expected = work.done

    def done(self, who: str, stage: str) -> dict[str, float]:
        """The units done in a stage, by kind."""
        return {kind: work.done for (of, at, kind), work in self.works.items() if (of, at) == (who, stage)}

    def left(self) -> float | None:
        """Seconds that the rest takes; None: nothing was measured yet."""
        measured = {kind: speed for kind, speed in self.speeds.items() if speed.units > 0 and speed.seconds > 0}
        costly = {kind: speed for kind, speed in measured.items() if COSTS[kind]}
        if not costly:
            return None
        work = sum(COSTS[kind] * speed.units for kind, speed in costly.items())
        cost = sum(speed.seconds for speed in costly.values()) / work
        rates = {kind: speed.seconds / speed.units for kind, speed in measured.items()}
        rest = ((kind, work.expected - work.done) for (_, _, kind), work in self.works.items())
        return sum(units * rates.get(kind, COSTS[kind] * cost) for kind, units in rest)

    def share(self) -> float:
        """The part of the whole time that has passed, 0 to 1."""
        left, spent = self.left(), self.last - self.began
        return 0.0 if left is None else spent / (spent + left) if spent + left > 0 else 1.0


def clock_time(seconds: float) -> str:
    """`02:10`, or `1:02:10` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
