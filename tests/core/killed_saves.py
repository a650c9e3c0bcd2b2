"""Saves a third checkpoint again and again, killed at the first thing it does on the disk, then at the second, until it is not killed.

    python -m tests.core.killed_saves FOLDER

Every try begins with a copy of `FOLDER/before`, where steps 1 and 2 are saved, and ends in `FOLDER/killed-NNN`; the last, which ends by
itself, in `FOLDER/whole`. Prints what each was killed before. The tries are forks of a process that has one thread.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from mae_core.checkpoint import restore
from mae_core.checkpoint_writer import CheckpointWriter
from mae_core.snapshot import Snapshot
from tests.tiny_states import ALONE, fresh, go_on, save

STAGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"}
"""Audit events of what changes a disk; flushing and writing have none and are counted besides."""


class Axe:
    """Kills this process before the n-th thing that it does to a folder."""

    def __init__(self, number: int) -> None:
        self.left, self.about = number, ""
        flush, pieces = os.fsync, Snapshot._pieces

        def counted_flush(handle: int) -> None:
            self.fall("flush")
            flush(handle)

        def counted_pieces(snapshot: Snapshot) -> Iterator[bytes | memoryview]:
            for piece in pieces(snapshot):
                self.fall("write")
                yield piece

        os.fsync = counted_flush
        Snapshot._pieces = counted_pieces  # type: ignore[method-assign]
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if event in STAGES and (event != "open" or int(str(arguments[2])) & os.O_CREAT):
            self.fall(event)

    def fall(self, about: str) -> None:
        if self.left == 0:
            print(about, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1


def attempt(folder: Path, number: int | None) -> None:
    """Restore step 2 and save step 3, or steps 1 and 2 from nothing where there is no number."""
    state = fresh()
    if number is None:
        for _ in range(2):
            go_on(state)
            save(state, folder, keep=2)
        return
    restore(state, folder, print)
    go_on(state)
    Axe(number)
    with CheckpointWriter(folder, {}, 2, ALONE) as writer:
        writer.save(state)


def tried(folder: Path, number: int | None) -> int:
    """Exit status of a fork that does it."""
    process = os.fork()
    if process == 0:
        attempt(folder, number)
        os._exit(0)
    return os.waitpid(process, 0)[1]


def main(folder: Path) -> None:
    """Do it."""
    torch.set_num_threads(1)
    go_on(fresh())  # all that is imported with the first update, once for all forks
    assert tried(folder / "before", None) == 0
    number = 0
    while True:
        place = folder / f"killed-{number:03d}"
        shutil.copytree(folder / "before", place)
        status = tried(place, number)
        if status == 0:
            place.rename(folder / "whole")
            return
        assert status == signal.SIGKILL, status
        number += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
