"""Signs of life of a process that trains: which step it is at, in which part of it and since when, in a file that others can read."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic, time
from typing import Literal, NamedTuple

Phase = Literal["start", "step", "evaluation", "save", "end"]

INTERVAL_S = 5.0
"""Seconds between two signs of life on disk."""


class Moment(NamedTuple):
    """Where a process is.

    Attributes:
        step: Updates done.
        phase: Part of the work.
        since: When it began, on the clock of `monotonic`.
    """

    step: int
    phase: Phase
    since: float


class Pulse:
    """Where a process is, and how long the latest parts of each kind took; without a folder it is only kept in memory."""

    def __init__(self) -> None:
        self.now = Moment(0, "start", monotonic())
        self.durations: dict[Phase, deque[float]] = {}

    def beat(self, step: int, phase: Phase) -> None:
        """Say where the process is now."""
        before, self.now = self.now, Moment(step, phase, monotonic())
        self.durations.setdefault(before.phase, deque(maxlen=100)).append(self.now.since - before.since)


@dataclass(frozen=True)
class Sign:
    """What the file of a process says.

    Attributes:
        rank: Of the process.
        world: Number of processes.
        pid: On its machine.
        host: Name of its machine.
        step: Updates done.
        phase: Part of the work.
        phase_s: How long it has lasted.
        written: Seconds since 1970 on its machine's clock; its file's age is told better by the file system.
        left: Name of the exception by which the process left the training; empty while it is there.
        age_s: Seconds since the file was written; 0 in the file itself.
    """

    rank: int
    world: int
    pid: int
    host: str
    step: int
    phase: Phase
    phase_s: float
    written: float
    left: str = ""
    age_s: float = field(default=0.0, compare=False)


def sign_path(folder: Path, rank: int) -> Path:
    """The file of a process below the folder of a run."""
    return folder / "ranks" / f"rank-{rank:05d}.json"


@contextmanager
def pulse(folder: Path, rank: int, world: int, interval_s: float = INTERVAL_S) -> Iterator[Pulse]:
    """A pulse whose state is on disk every few seconds, by a thread of its own, so that no step waits for it.

    A disk that takes no file does not stop the training: what others know of this process then grows old. A process that
    leaves in peace takes its files with it, one that fails writes down by which exception.
    """
    path, made, over = sign_path(folder, rank), Pulse(), threading.Event()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        for old in path.parent.glob("rank-*"):  # of an attempt with more processes
            if old.name[5:10].isdigit() and int(old.name[5:10]) >= world:
                old.unlink(missing_ok=True)

    def write(left: str = "") -> None:
        now = made.now
        sign = Sign(rank, world, os.getpid(), socket.gethostname(), now.step, now.phase, monotonic() - now.since, time(), left)
        aside = path.with_suffix(".tmp")
        with suppress(OSError):
            aside.write_text(json.dumps(asdict(sign)) + "\n")
            aside.replace(path)

    def keep_writing() -> None:
        while not over.wait(interval_s):
            write()

    write()
    thread = threading.Thread(target=keep_writing, name="pulse", daemon=True)
    thread.start()
    left = ""
    try:
        yield made
    except BaseException as error:
        left = type(error).__name__
        raise
    finally:
        over.set()
        thread.join(interval_s)
        if left:
            write(left)
        else:
            _take_away(path)


def signs(folder: Path) -> dict[int, Sign]:
    """What the processes of a run last said, by rank, those that finished left out; ages by the clock of the file system."""
    found = {}
    probe = folder / "ranks" / f"now-{socket.gethostname()}-{os.getpid()}"
    with suppress(OSError):  # no folder: no process has begun, or all have finished
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        for path in sorted((folder / "ranks").glob("rank-*.json")):
            with suppress(OSError, ValueError, TypeError):  # gone by now, or written by another version
                said = json.loads(path.read_text()) | {"age_s": max(0.0, now - path.stat().st_mtime)}
                found[int(said["rank"])] = Sign(**said)
    return found


def _take_away(path: Path) -> None:
    """Remove the files of a process, and with those of the last one the folder."""
    with suppress(OSError):
        for own in path.parent.glob(f"{path.stem}.*"):
            own.unlink(missing_ok=True)
        path.parent.rmdir()


@contextmanager
def no_pulse() -> Iterator[Pulse]:
    """A pulse that nobody watches."""
    yield Pulse()
