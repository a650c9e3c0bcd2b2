"""Ends a process that hangs: a part of the work that outlasts its budget leaves the stacks of all threads and a non-zero exit code."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from time import monotonic
from types import FrameType

from pydantic import Field

from mae_core.pulse import Pulse, sign_path
from mae_core.settings import Settings

HUNG = 70
"""Exit code of a process that its watchdog ended (`EX_SOFTWARE` of sysexits)."""

ENOUGH = 3
"""Parts of a kind after which their median says how long one takes."""

LOOK_S = 1.0
"""Seconds between two looks at the pulse."""

SUSPENDED_S = 10.0
"""A gap between two looks that is that much too long is one in which the process did not run at all."""

PATIENCE_S = 5.0
"""How long a disk is waited for that may be what hangs."""


class WatchdogSettings(Settings):
    """How long a part of the work may last. A budget grows to `factor` times the median of the latest hundred where that is more."""

    enabled: bool = Field(
        True,
        description="End a process in which a part of the work lasts longer than its budget; not where a scheduler suspends jobs for long",
    )
    start_s: float = Field(1800, gt=0, description="Up to the first update, and each of the first three: compilation and first reads")
    step_s: float = Field(300, gt=0, description="An update, with the wait for its samples and for the other processes")
    evaluation_s: float = Field(3600, gt=0, description="An evaluation on held-out tiles")
    save_s: float = Field(1800, gt=0, description="What of a save the training waits for")
    factor: float = Field(20, gt=1, description="Times the median of a part by which it may outlast it, where that is more than its budget")


def budget_s(settings: WatchdogSettings, pulse: Pulse) -> float | None:
    """Seconds that what the process does now may last; None where the training is over."""
    phase = pulse.now.phase
    known = list(pulse.durations.get(phase, ()))
    typical = settings.factor * median(known) if len(known) >= ENOUGH else 0.0
    match phase:
        case "start":
            return settings.start_s
        case "step":
            return max(settings.step_s if len(known) >= ENOUGH else settings.start_s, settings.step_s, typical)
        case "evaluation":
            return max(settings.evaluation_s, typical)
        case "save":
            return max(settings.save_s, typical)
        case "end":
            return None


@contextmanager
def watchdog(
    pulse: Pulse, settings: WatchdogSettings, folder: Path, rank: int, *, timer: bool = False, end: Callable[[int], object] = os._exit
) -> Iterator[None]:
    """While it lasts, a process that hangs is ended by a thread of its own. Time in which the whole process was suspended does not count.

    Args:
        pulse: Says what the process does, and since when.
        settings: Budgets.
        folder: Of the run; stacks go to `ranks/rank-N.stacks.txt`, and to standard error.
        rank: Of this process.
        timer: Where a library holds the interpreter's lock, so that no thread of Python's runs, a timer outside of Python leaves the stacks
            on standard error and ends the process with exit code 1. It cannot tell a process that hangs from one that was suspended.
        end: Ends the process with an exit code.
    """
    if not settings.enabled:
        yield
        return
    over = threading.Event()
    watched = threading.get_ident()

    def watch() -> None:
        moment, looked, suspended = pulse.now, monotonic(), 0.0
        while not over.wait(LOOK_S):
            faulthandler.cancel_dump_traceback_later()
            before, looked = looked, monotonic()
            if pulse.now is not moment:
                moment, suspended = pulse.now, 0.0
            elif looked - before > LOOK_S + SUSPENDED_S:
                suspended += looked - before
            budget, lasted = budget_s(settings, pulse), looked - moment.since - suspended
            if budget is None:
                continue
            if lasted <= budget:
                if timer:
                    faulthandler.dump_traceback_later(budget - lasted + 2 * LOOK_S + PATIENCE_S, exit=True, file=_STDERR)
                continue
            place = _place(sys._current_frames().get(watched))  # noqa: SLF001 - the only way to another thread's stack
            words = (
                f"rank {rank} hangs: {moment.phase} after {moment.step} updates has lasted {lasted:.0f} s, its budget is {budget:.0f} s "
                f"(train.watchdog); the process is at {place} and is ended with exit code {HUNG}\n"
            )
            _leave_stacks(words, sign_path(folder, rank).with_suffix(".stacks.txt"))
            end(HUNG)
            return

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()


_STDERR = 2


def _leave_stacks(words: str, path: Path) -> None:
    """Stacks of all threads on standard error, then in a file, for which nobody waits long."""
    with suppress(OSError):
        os.write(_STDERR, words.encode())
        faulthandler.dump_traceback(_STDERR, all_threads=True)

    def write() -> None:
        with suppress(OSError), path.open("a") as file:
            file.write(words)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(PATIENCE_S)


def _place(frame: FrameType | None) -> str:
    """The innermost line of ours that a thread is at, and the function that it is in below it."""
    below = frame
    while frame is not None:
        folder = Path(frame.f_code.co_filename).parent.name
        if folder in ("mae_core", "pipelines"):
            inside = "" if frame is below or below is None else f", in {below.f_code.co_name}"
            return f"{folder}/{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}{inside}"
        frame = frame.f_back
    return "a place outside of this package"
