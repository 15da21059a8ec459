"""Ctrl-C and SIGTERM during training: the step is finished, a checkpoint is written, and then the process ends."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

HANDLED = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Within: Ctrl-C and SIGTERM raise, so that everything is tidied up; where they are deferred, the first is noted.

    Several processes are given the signal by their launcher, not all at the same moment and some of them twice;
    `agreed` makes them stop after the same step. Handlers exist in a process's main thread only; elsewhere nothing is
    noted and nothing is changed.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in HANDLED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, again = self.received is None, self.received == number == signal.SIGINT
        self.received = self.received or number
        if not self._deferred or (again and not _several()):
            raise self.ending()
        if first:
            print("\nfinishing this step and writing a checkpoint; Ctrl-C again quits at once", file=sys.stderr)

    @contextlib.contextmanager
    def deferred(self, wanted: bool = True) -> Iterator[None]:
        """Within: a signal waits until somebody asks; not `wanted`: it ends the block.

        Among several processes, who wait for each other, one that waits goes on waiting.
        """
        before = self._deferred
        self._deferred = wanted or (before and _several())
        try:
            if self.received is not None and not self._deferred:
                raise self.ending()
            yield
        finally:
            self._deferred = before

    def agreed(self, device: torch.device) -> int | None:
        """The signal that any of the processes was sent, the same answer on all of them; every one of them must ask."""
        if not _several():
            return self.received
        number = torch.tensor(self.received or 0, device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number) or None

    def ending(self, number: int | None = None) -> BaseException:
        """What to raise: as if the signal had come without a handler, but for exit code 143 after SIGTERM."""
        number = number or self.received
        return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + int(number or signal.SIGTERM))


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
