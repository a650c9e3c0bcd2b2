"""A request to stop is a flag while the loop runs, which looks at it between two steps; elsewhere it ends the work at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REQUEUE = 75
"""Exit code of a job that stopped because it was asked to and wants to be run again (`EX_TEMPFAIL` of sysexits)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(BaseException):
    """The run was asked to stop and has stopped; what is finished is on disk. As an interruption, no `except Exception` swallows it.

    Attributes:
        together: All processes of the job stop here, so that they may wait for each other.
    """

    def __init__(self, words: str, *, together: bool = False) -> None:
        super().__init__(words)
        self.together = together


class TakenOverError(RuntimeError):
    """Another job goes on with this run; this one writes nothing more to it and leaves its tracked run as it is."""


class StopRequest:
    """Whether this process was asked to stop, and by which signal; asking again changes nothing.

    Attributes:
        signal: Name of the first signal; empty where there was none.
        process: Number of the process whose request it is.
    """

    def __init__(self) -> None:
        self.signal = ""
        self._held = 0
        self.process = os.getpid()

    def ask(self, name: str) -> None:
        """Ask to stop."""
        self.signal = self.signal or name

    def __bool__(self) -> bool:
        return bool(self.signal)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While it lasts a signal only sets the flag: whoever is inside looks at it and stops where nothing is lost.

        Raises:
            Stopped: Nobody looked at a flag that was set.
        """
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self and not self._held:
            raise self.stopped()

    def stopped(self, *, together: bool = False) -> Stopped:
        """What to raise where there is nothing to save."""
        return Stopped(f"asked to stop ({self.signal or 'by another process'}); what is finished is kept", together=together)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handler of a signal. Once asked, the process is on its way out and no further signal changes that way.

        Raises:
            Stopped: It is the first signal, and nobody holds it.
        """
        del frame
        if os.getpid() != self.process:
            self._in_a_fork(number)
            return
        first = not self
        self.ask(signal.Signals(number).name)
        if first and not self._held:
            raise self.stopped()

    @staticmethod
    def _in_a_fork(number: int) -> None:
        """A forked child can be ended by SIGTERM as if it had no handler; the other signals are for its parent."""
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def stop_requests(*, ends_process: bool = False) -> Iterator[StopRequest]:
    """A request that SIGTERM, SIGUSR1 and SIGUSR2 set while the context lasts; handlers of before come back at its end.

    Inside another such context it is the request of that one. Outside of the main thread, where Python takes no handler,
    nothing sets it.

    Args:
        ends_process: `Stopped` ends the process, whose exit code no later signal changes any more.
    """
    around = getattr(signal.getsignal(SIGNALS[0]), "__self__", None)
    if isinstance(around, StopRequest) and around.process == os.getpid():
        yield around
        return
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.handle) for number in SIGNALS}
    try:
        yield request
    except Stopped:
        before = dict.fromkeys(SIGNALS, signal.SIG_IGN) if ends_process else before
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
