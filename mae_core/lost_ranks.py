"""Which processes of a run are gone, told by name where others wait for them in vain."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

from mae_core.parallel import Parallel, RankError, failed_together
from mae_core.pulse import INTERVAL_S, Pulse, Sign, signs

SILENT_S = 3 * INTERVAL_S
"""A process of another machine that gave no sign of life for so long is taken for gone."""

_STDERR = 2

LOOK_S = 0.1
"""Seconds between two looks: a process that dies closes its connections a little before it is gone."""

AGAIN = "Run the same command again to go on from the last checkpoint"
ADVICE = f"what it said itself tells why; if it said nothing it was killed, look for want of memory in the scheduler's log. {AGAIN}"


@contextmanager
def lost_ranks_named(parallel: Parallel, pulse: Pulse, folder: Path, end: Callable[[int], object] = os._exit) -> Iterator[None]:
    """While it lasts, a collective that fails because another process is gone or late ends as a `RankError` that names it.

    On CPU (gloo) the collective itself fails, at once where a process died and after `parallel.timeout_s` where one hangs. On GPUs (NCCL)
    a process that died can leave the others waiting on the device, where Python hears of nothing until torch's watchdog takes the
    process down without a name: there a thread looks at the signs of life and ends the process with exit code 1 before.

    Args:
        parallel: This process.
        pulse: What it does.
        folder: Of the run, where the signs of life of all processes are.
        end: Ends the process with an exit code.
    """
    if parallel.world == 1:
        yield
        return
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(parallel, pulse, folder, over, end), name="lost ranks", daemon=True)
    if parallel.device.type == "cuda":
        watch.start()
    try:
        yield
    except Exception as error:
        if not failed_together(error):
            raise
        over.set()  # what follows names them with the error
        raise RankError(_words(parallel, pulse, folder, str(error).strip().partition("\n")[0])) from error
    finally:
        over.set()
        if watch.is_alive():
            watch.join()


def gone(said: dict[int, Sign], own: int) -> list[Sign]:
    """The other processes that are no more, or left their training by an error of their own."""
    here = socket.gethostname()
    return [sign for rank, sign in said.items() if rank != own and sign.left != RankError.__name__ and (sign.left or _is_dead(sign, here))]


def _is_dead(sign: Sign, here: str) -> bool:
    return not _is_running(sign.pid) if sign.host == here else sign.age_s > SILENT_S


def _is_running(pid: int) -> bool:
    """Whether a process of this machine is there and has not ended: what ended stays in the list until its parent has asked for it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        if Path("/proc/self/stat").exists():
            return False
    else:
        return state not in "ZX"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _words(parallel: Parallel, pulse: Pulse, folder: Path, error: str) -> str:
    """What to tell when a collective has failed; waits for a process to be gone, or to have been silent for long."""
    here, at = socket.gethostname(), pulse.now
    began = monotonic()
    while True:
        said = signs(folder)
        lost = gone(said, parallel.rank)
        others = [sign for rank, sign in said.items() if rank != parallel.rank]
        patience = LOOK_S * 30 if all(sign.host == here for sign in others) else SILENT_S + INTERVAL_S
        if lost or monotonic() - began > min(patience, parallel.timeout_s):
            break
        sleep(LOOK_S)
    begin = f"rank {parallel.rank} of {parallel.world} lost"
    place = f"in {at.phase} after {at.step} updates ({error})"
    if lost:
        return f"{begin} {', '.join(_named(sign, here) for sign in lost)} {place}; {ADVICE}"
    unseen = sorted(set(range(parallel.world)) - said.keys() - {parallel.rank})
    if unseen:
        return f"{begin} {', '.join(f'rank {rank}' for rank in unseen)} {place}, which left no sign of life; {ADVICE}"
    lines = ", ".join(f"rank {sign.rank} in {sign.phase} after {sign.step} updates for {sign.phase_s:.0f} s" for sign in others)
    return (
        f"{begin} another process {place}, and all are there: {lines}. The one that is furthest behind hangs or is late; look at its "
        f"stacks in {folder / 'ranks'}, or raise parallel.timeout_s={parallel.timeout_s}. {AGAIN}"
    )


def _named(sign: Sign, here: str) -> str:
    where = "this machine" if sign.host == here else sign.host
    how = f"ended with {sign.left}" if sign.left else "gone"
    return f"rank {sign.rank} (process {sign.pid} on {where}, {how}; last seen in {sign.phase} after {sign.step} updates)"


def _watch(parallel: Parallel, pulse: Pulse, folder: Path, over: threading.Event, end: Callable[[int], object]) -> None:
    """End this process when another has been gone for long enough that a collective should have told."""
    began, since = monotonic(), None
    while not over.wait(INTERVAL_S):
        said = {rank: sign for rank, sign in signs(folder).items() if sign.age_s < monotonic() - began}  # older: of an earlier attempt
        if not gone(said, parallel.rank):
            since = None
        elif since is None:
            since = monotonic()
        elif monotonic() - since > SILENT_S:
            words = f"error: {_words(parallel, pulse, folder, 'it waits on the device')}\n"
            with suppress(OSError):
                os.write(_STDERR, words.encode())  # past Python's buffers: the main thread may hold them
            end(1)
            return
