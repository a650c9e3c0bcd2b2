"""One job at a time writes to a run folder: who may, how others see that it lives, and how it learns that another has taken over.

The holder keeps a lock (`flock`) on `lease.lock` and its record in `lease.json`, whose time stamp it renews: a sign of life. Where
the lock is honoured and the kernel is the same, the lock alone decides, so a killed job blocks nobody. Between machines, which need not
see each other's locks, the time stamp decides, read against the stamp that the same file system gives to a new file: no machine's
clock counts. The record names no user; it and the machine's name stay in the run folder and on the console.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep
from uuid import uuid4

from mae_core.stopping import TakenOverError

RECORD, LOCK = "lease.json", "lease.lock"
BEAT_S, STALE_S = 10.0, 60.0
"""Seconds between two signs of life, and without one before a job on another machine counts as dead."""

SETTLE_S = 2.0
"""Seconds that a job which is just ending has for letting its lock go; and after which, of two jobs that came in the same moment where
there are no locks, the first sees that it was not the last."""

JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
"""Where schedulers say which job this is."""


class LeaseError(RuntimeError):
    """Another job writes to the run folder; the message says which one and what to do."""


TAKEN = (LeaseError, TakenOverError)
"""What a job ends with that may not, or no longer, write to its run."""

REFUSED = (
    "{} is being written to by {}. Two jobs would spoil each other's checkpoints: wait for its end, stop it, or take the run over with "
    "take_over=true (the other one then stops before its next checkpoint)"
)


@dataclass(frozen=True)
class Record:
    """What `lease.json` says of the job that holds a folder.

    Attributes:
        token: Of this attempt, drawn at random.
        attempt: Counts the jobs that have held the folder.
        host, pid, job: Machine, process and the scheduler's number of the job.
        kernel: Told apart from the kernel of every other machine, and of the same one before it was booted.
        pids: Which numbering of processes `pid` belongs to: containers have their own.
        since: When it began, by its clock; for people.
        locked: Whether it holds the lock too.
        ended: Whether it has left the folder.
    """

    token: str
    attempt: int
    host: str
    pid: int
    job: str
    kernel: str
    pids: str
    since: str
    locked: bool
    ended: bool = False

    def words(self) -> str:
        """Who it is, for a message."""
        job = f", job {self.job} of the scheduler" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, attempt {self.attempt}, since {self.since}"


class Lease:
    """A run folder that is held by this process; made by `hold`.

    Attributes:
        folder: Which one.
        record: What others read of this job.
        finished: Set where nobody will go on with the run, so that lock and record go at the end.
    """

    def __init__(self, folder: Path, record: Record, handle: int, *, locked: bool) -> None:
        self.folder, self.record, self.finished = folder, record, False
        self._handle, self._locked = handle, locked
        self._stamp: int | None = None
        self._stop = Event()
        self._beats: Thread | None = None
        self._write()

    @property
    def attempt(self) -> int:
        """Number of this job among all that have held the folder."""
        return self.record.attempt

    def confirm(self) -> None:
        """Come back if the folder is still this job's; what may not happen after a takeover asks this first.

        Raises:
            TakenOverError: Another job has it now.
        """
        now = read(self.folder)
        if now is not None and now.token != self.record.token:
            raise TakenOverError(f"{self.folder} was taken over by {now.words()}; this job writes nothing more to it")

    def beat(self) -> bool:
        """Give a sign of life, and take the lock as soon as a job that was taken over lets it go; False once the folder is lost."""
        with suppress(OSError):  # a file system that is away for a moment: the next sign of life may come through
            now = read(self.folder)
            if now is not None and now.token != self.record.token:
                return False
            if not self._locked and _lock(self._handle):
                self._locked = True
            if now is None or self.record.locked != self._locked:
                self._write()
            elif self._stamp is not None:
                os.utime(self._stamp)  # of our own file, even where another job has just put its own in its place
        return True

    def start(self, beat_s: float) -> None:
        """Give signs of life from a thread, until the end."""

        def run() -> None:
            while not self._stop.wait(beat_s) and self.beat():
                pass

        self._beats = Thread(target=run, name="lease", daemon=True)
        self._beats.start()

    def end(self) -> None:
        """Leave the folder to whoever comes."""
        self._stop.set()
        if self._beats is not None:
            self._beats.join()
        with suppress(OSError):
            now = read(self.folder)
            if now is not None and now.token == self.record.token:
                if self.finished:
                    (self.folder / RECORD).unlink()
                    (self.folder / LOCK).unlink()
                else:
                    self._write(ended=True)
        for handle in (self._stamp, self._handle):
            if handle is not None:
                os.close(handle)

    def _write(self, *, ended: bool = False) -> None:
        self.record = replace(self.record, locked=self._locked, ended=ended)
        aside = self.folder / f"{RECORD}.{self.record.token}.tmp"
        aside.write_text(json.dumps(asdict(self.record), indent=1) + "\n")
        if self._stamp is not None:
            os.close(self._stamp)
        self._stamp = os.open(aside, os.O_RDWR)
        aside.replace(self.folder / RECORD)


_HELD: list[Lease] = []


def _forget() -> None:
    """In a process that was forked: close the locks, which would outlive the job in it."""
    for lease in _HELD:
        os.close(lease._handle)  # noqa: SLF001 - of this file
    _HELD.clear()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def hold(
    folder: Path, say: Callable[[str], None], *, take_over: bool = False, beat_s: float = BEAT_S, stale_s: float = STALE_S
) -> Iterator[Lease]:
    """The folder for this process alone while the context lasts.

    Args:
        folder: Exists.
        say: Told that it waits, and whom it takes over from.
        take_over: Take it from a job that lives; that one stops before its next checkpoint.
        beat_s, stale_s: As `BEAT_S` and `STALE_S`.

    Raises:
        LeaseError: Another job has it.
        OSError: Nothing can be written there.
    """
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        locked = _lock(handle) if take_over else _lock_in_time(handle)
        before = read(folder)
        _refuse_or_tell(folder, _living(folder, before, locked, say, stale_s, wait=not take_over), say, take_over=take_over)
        lease = Lease(folder, _own_record(before), handle, locked=bool(locked))
    except BaseException:
        os.close(handle)
        raise
    _HELD.append(lease)
    try:
        if not locked:
            sleep(min(SETTLE_S, beat_s))
            lease.confirm()
        lease.start(beat_s)
        yield lease
    finally:
        if lease in _HELD:  # not in a process that was forked
            _HELD.remove(lease)
            lease.end()


def confirm(folder: Path) -> None:
    """Come back if no other job has taken over a folder, or one that it lies in, which this process holds.

    Raises:
        TakenOverError: One has.
    """
    for lease in _HELD:
        if folder.absolute().is_relative_to(lease.folder.absolute()):
            lease.confirm()


def read(folder: Path) -> Record | None:
    """The record of a run folder; None where there is none that can be read."""
    try:
        content = json.loads((folder / RECORD).read_bytes())
        return Record(**content)
    except (FileNotFoundError, ValueError, TypeError):
        return None


def look(folder: Path) -> tuple[str, bool]:
    """Words for the job that seems to have a folder, empty where there is none, and whether that is sure; nothing is written."""
    found = read(folder)
    if found is None or found.ended:
        return "", True
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return "", True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return found.words(), True
    except OSError:
        return found.words(), False
    finally:
        os.close(handle)
    dead = found.kernel == _kernel() and (found.locked or (found.pids == _pids() and not _runs(found.pid)))
    return ("", True) if dead else (found.words(), False)


def age_s(folder: Path) -> float | None:
    """Seconds since the holder's last sign of life by the clock of the file system; None where there is no record."""
    probe = folder / f"{RECORD}.{uuid4().hex}.tmp"
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now - (folder / RECORD).stat().st_mtime
    except FileNotFoundError:
        return None


def _refuse_or_tell(folder: Path, holder: str, say: Callable[[str], None], *, take_over: bool) -> None:
    if holder and not take_over:
        raise LeaseError(REFUSED.format(folder, holder))
    if holder:
        say(f"taking {folder} over from {holder}")


def _living(folder: Path, before: Record | None, locked: bool | None, say: Callable[[str], None], stale_s: float, *, wait: bool) -> str:
    """Words for the job that holds a folder; empty where there is none, or a dead one."""
    if locked is False:
        age = age_s(folder)
        sign = "" if age is None else f", last sign of life {max(0.0, age):.0f} s ago"
        if before is None or before.ended:
            return f"a job that has not said who it is, or that was taken over and has not stopped yet{sign}"
        return f"{before.words()}{sign}"
    if before is None or before.ended:
        return ""
    if before.kernel == _kernel():
        if before.locked and locked:
            return ""
        if before.pids == _pids() and not _runs(before.pid):
            return ""
    stamp, age = _stamp(folder), age_s(folder)
    if age is None or age >= stale_s:
        return ""
    if wait:
        left = min(stale_s, stale_s - age)
        say(f"{folder} was last written to by {before.words()}; waiting up to {left:.0f} s for a sign of life")
        until = monotonic() + left
        while monotonic() < until and _stamp(folder) == stamp:
            sleep(min(1.0, left / 10))
    now = read(folder)
    return "" if now is None or now.ended or (wait and _stamp(folder) == stamp) else f"{now.words()}, which lives"


def _lock(handle: int) -> bool | None:
    """True if the lock is ours now, False if another has it, None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _lock_in_time(handle: int) -> bool | None:
    """As `_lock`, after a moment for a job that is just ending."""
    until = monotonic() + SETTLE_S
    while (locked := _lock(handle)) is False and monotonic() < until:
        sleep(SETTLE_S / 20)
    return locked


def _own_record(before: Record | None) -> Record:
    return Record(
        token=uuid4().hex,
        attempt=1 if before is None else before.attempt + 1,
        host=platform.node(),
        pid=os.getpid(),
        job=next((os.environ[name] for name in JOB_VARIABLES if os.environ.get(name)), ""),
        kernel=_kernel(),
        pids=_pids(),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        locked=False,
    )


def _stamp(folder: Path) -> tuple[int, int] | None:
    try:
        with (folder / RECORD).open("rb") as file:  # opening is what makes a network file system look anew
            found = os.fstat(file.fileno())
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _kernel() -> str:
    """What tells this running kernel from others: drawn anew at each boot; the machine's name where there is no such thing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _pids() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
