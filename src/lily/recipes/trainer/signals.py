"""Ctrl-C and SIGTERM during training: finish the step, write a checkpoint, then end the process."""

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
    """Context in which Ctrl-C and SIGTERM raise, so that cleanup runs; within `deferred`, the first one is recorded.

    A launcher sends the signal to several processes at different moments, to some of them twice; `agreed` makes them
    stop after the same step. Signal handlers need the main thread; in any other thread this context has no effect.
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
        """Context in which a signal is recorded and `agreed` reports it; not `wanted`: in which it ends the block.

        With several processes, which wait for each other, a deferred signal stays deferred.
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
        """The signal that any process has received: the same on all of them, and all of them must call this."""
        if not _several():
            return self.received
        number = torch.tensor(self.received or 0, device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number) or None

    def ending(self, number: int | None = None) -> BaseException:
        """The exception to raise: KeyboardInterrupt for Ctrl-C, exit code 143 for SIGTERM."""
        number = number or self.received
        return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + int(number or signal.SIGTERM))


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
