"""A thread that tells a spool to a tracking store, in order, whenever the store can be reached; training neither waits nor fails."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from mae_core.spool import Entry, Gate, Progress, Spool, progress_of

INTERVAL_S, FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 5.0, 60.0
VALUES_PER_CALL = 1000
PATIENCE = 3
"""Failures in a row after which nobody waits any longer at the end of a run."""


class RefusedError(Exception):
    """The store will never take a line; the message says why in a few words."""


class UnusableError(Exception):
    """The store cannot be used as asked, which no waiting changes; the message says why and what to do."""


class BusyError(Exception):
    """Another process tells this spool."""


class Receiver(Protocol):
    """Takes the lines of a spool. Taking the same twice does no harm."""

    def send(self, entries: Sequence[Entry]) -> None:
        """Tell lines, all of metrics or a single one.

        Raises:
            RefusedError: It will never be taken.
            UnusableError: The store cannot be used as asked.
        """
        ...

    def forget(self, entry: Entry) -> None:
        """Drop what was kept for a line; it is noted as told."""
        ...

    def why(self, error: Exception) -> str:
        """What is wrong, in a few words without names, paths and passwords."""
        ...


class Publisher:
    """Tells a spool to a receiver.

    Args:
        spool: May be added to meanwhile.
        receiver: Made from the progress when it is first needed, in the thread.
        say: Told when the store is lost, is back or refuses something.
    """

    def __init__(self, spool: Spool, receiver: Callable[[Progress], Receiver], say: Callable[[str], None]) -> None:
        self.spool, self.progress = spool, progress_of(spool)
        self.lost = ""
        self.unusable: UnusableError | None = None
        self._make, self._say = receiver, say
        self._receiver: Receiver | None = None
        self._gate, self._read, self._told = Gate(), 0, 0
        self._decided: deque[Entry] = deque()
        self._lock = -1
        self._failures = 0
        self._change = threading.Condition()
        self._awake, self._hurry = threading.Event(), threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="tracking", daemon=True)

    def start(self) -> None:
        """Begin to tell."""
        self._thread.start()

    def wake(self) -> None:
        """There may be something to tell."""
        self._awake.set()

    @property
    def pending(self) -> bool:
        """Whether lines are left that the store has not got."""
        return self.progress.offset < self.spool.size()

    def begun(self, target: int, limit_s: float) -> None:
        """Come back when lines up to a byte are told, the store is lost or the time is up.

        Raises:
            UnusableError: The store cannot be used as asked.
        """
        self._awake.set()
        with self._change:
            self._change.wait_for(lambda: self._told >= target or self.lost or self.unusable, limit_s)
        if self.unusable is not None:
            raise self.unusable

    def drain(self, limit_s: float) -> bool:
        """Wait until all is told, the store has failed several times in a row or the time is up; whether all is told."""
        target, until = self.spool.size(), time.monotonic() + limit_s
        self._awake.set()
        self._hurry.set()
        with self._change:
            before, first, patience = self._told, self._failures, 1 if self.lost else PATIENCE
            while self._told < target and self._thread.is_alive() and (left := until - time.monotonic()) > 0:
                if self._told > before:
                    before, first, patience = self._told, self._failures, PATIENCE
                if self._failures - first >= patience:
                    break
                self._change.wait(min(left, 0.5))
            self._hurry.clear()
            return self._told >= target

    def stop(self) -> None:
        """End the thread; what it is in the middle of is told again by whoever goes on."""
        self._stopping = True
        self._awake.set()
        self._hurry.set()
        self._thread.join(1.0)

    def publish(self) -> None:
        """Tell all that may be told.

        Raises:
            BusyError: Another process does.
            Exception: Whatever the store has failed with; what was told before it is noted.
        """
        if self._lock < 0:
            self._lock = _locked(self.spool)
            self.progress = progress_of(self.spool)
        for record, end in self.spool.read(self._read):
            self._decided.extend(entry for entry in self._gate.feed(record, end) if entry.end > self.progress.offset)
            self._read = end
        if self._decided and self._receiver is None:
            self._receiver = self._make(self.progress)
        while self._decided and self._receiver is not None:
            group = _group(self._decided)
            if group[0].send:
                self._send(group)
            for _ in group:
                self._decided.popleft()
            self.progress.offset = group[-1].end
            self.progress.save()
            for entry in group:
                self._receiver.forget(entry)
            self._note()
        self._note()

    def why(self, error: Exception) -> str:
        """What is wrong, in a few words without names, paths and passwords."""
        if isinstance(error, BusyError):
            return str(error)
        return type(error).__name__ if self._receiver is None else self._receiver.why(error)

    def release(self) -> None:
        """Another process may tell the spool."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _send(self, group: list[Entry]) -> None:
        assert self._receiver is not None
        try:
            self._receiver.send(group)
        except RefusedError as refusal:
            if len(group) > 1:
                for entry in group:
                    self._send([entry])
                return
            words = f"{group[0].record['kind']}: {refusal}"
            self.progress.refused.append(words)
            self._say(f"[yellow]the tracking store refuses a record[/], which is left out: {words}")

    def _note(self) -> None:
        with self._change:
            self._told = self._decided[0].end - 1 if self._decided else self._read
            self._change.notify_all()

    def _loop(self) -> None:
        delay_s = 0.0
        while True:
            if delay_s:
                self._hurry.wait(delay_s)
                time.sleep(INTERVAL_S * self._hurry.is_set())
            else:
                self._awake.wait()
                self._hurry.wait(INTERVAL_S * (self._told > 0))  # lines that come together go together
            self._awake.clear()
            if self._stopping or self.unusable is not None:
                break
            delay_s = self._turn()
        self.release()

    def _turn(self) -> float:
        """Tell what there is; seconds until it is tried again, 0 if all was told."""
        try:
            self.publish()
        except UnusableError as error:
            with self._change:
                self.unusable = error
                self._change.notify_all()
            return 0.0
        except Exception as error:  # whatever the store or its library does, training goes on
            why = self.why(error)
            with self._change:
                self._failures += 1
                first, self.lost = not self.lost, why
                self._change.notify_all()
            if first:
                self._say(f"[yellow]tracking is lost[/] ({why}); all is kept in the run's folder and told when it is back")
            return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** (self._failures - 1))
        if self.lost:
            self._say("tracking is back")
        with self._change:
            self.lost, self._failures = "", 0
            self._change.notify_all()
        return 0.0


def _group(decided: Sequence[Entry]) -> list[Entry]:
    """The first line, with those of metrics behind it if it is one, as many as go into a call."""
    group, values = [decided[0]], len(decided[0].record.get("values", ()))
    if decided[0].record["kind"] != "metrics" or not decided[0].send:
        return group
    for number in range(1, len(decided)):
        entry = decided[number]
        values += len(entry.record.get("values", ()))
        if entry.record["kind"] != "metrics" or not entry.send or values > VALUES_PER_CALL:
            break
        group.append(entry)
    return group


def _locked(spool: Spool) -> int:
    """An open file whose lock says that this process tells the spool; it goes with the process."""
    handle = os.open(spool.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise BusyError("another process is telling this run") from error
    return handle
