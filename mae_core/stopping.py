"""A request to stop is a flag: the handler of a signal sets it, and the loop looks at it between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REQUEUE = 75
"""Exit code of a job that stopped because it was asked to and wants to be run again (`EX_TEMPFAIL` of sysexits)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):  # noqa: N818 - no error: the run did what it was asked
    """The run was asked to stop and has stopped between two steps; what it had is in a checkpoint."""


class StopRequest:
    """Whether this process was asked to stop, and by which signal; asking again changes nothing."""

    def __init__(self) -> None:
        self.signal = ""

    def ask(self, name: str) -> None:
        """Ask to stop."""
        self.signal = self.signal or name

    def __bool__(self) -> bool:
        return bool(self.signal)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """A request that SIGTERM, SIGUSR1 and SIGUSR2 set while the context lasts; handlers of before come back at its end.

    Outside of the main thread, where Python takes no handler, nothing sets it.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        request.ask(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
