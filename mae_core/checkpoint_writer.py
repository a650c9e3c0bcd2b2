"""When checkpoints are written, which stay, and who is told that one is on disk; training goes on while one is on its way."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Thread
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import torch

from mae_core.checkpoint import FORMAT, POINTER, RECORD, CheckpointError, TrainState, state_tensors, step_of, steps
from mae_core.parallel import Parallel
from mae_core.sealed import advice, sync_folder, write_flushed, write_manifest
from mae_core.sharding import is_divided, whole
from mae_core.snapshot import Snapshot

LIBRARIES = ("terravox", "torch", "numpy", "safetensors")


@dataclass
class CheckpointWriter:
    """Writes checkpoints of a run into a folder; every process calls it alike, one of them writes.

    A checkpoint is written aside, each file flushed, its manifest last; then it is renamed, the pointer `latest` is moved to it, and
    only then older ones go. So whatever moment a process is killed at, the pointer names a checkpoint that is whole.

    Attributes:
        folder: Where they go.
        record: Resolved settings that are stored in each.
        keep: Newest ones that stay.
        parallel: This process.
        covered: Told the step of a checkpoint once it is on disk for good, on the process that writes, by the thread that writes.
        permitted: Asked before each is begun and before it gets its name, on the process that writes; raises where another job has taken
            the run over.
        keep_every: Those of multiples of this step stay for ever; None: none does.
        begun_at: Step that this attempt went on from. What lies behind it was damaged, so it goes with the first save and counts for
            none that is kept.
        metrics: Of the newest: `checkpoint/wait_s` that training stood still for it, of which `checkpoint/wait_before_s` for the one
            before it to be written; `checkpoint/save_s` from then until it was on disk, and `checkpoint/bytes`, once it is. Empty
            on processes that do not write.
    """

    folder: Path
    record: Mapping[str, Any]
    keep: int
    parallel: Parallel
    covered: Callable[[int], None] = lambda step: None
    permitted: Callable[[], None] = lambda: None
    keep_every: int | None = None
    begun_at: int | None = None
    metrics: dict[str, float] = field(default_factory=dict, init=False)
    _written: set[int] = field(default_factory=set, init=False, repr=False)
    _thread: Thread | None = field(default=None, init=False, repr=False)
    _error: Exception | None = field(default=None, init=False, repr=False)
    _snapshots: dict[str, Snapshot] = field(default_factory=dict, init=False, repr=False)

    def save(self, state: TrainState) -> None:
        """Write the state; comes back as soon as training may change it.

        Waits for the save before this one, since there is memory for one copy only.

        Raises:
            CheckpointError: It, or the one before it that was still on its way, could not be written; the message says why.
            TakenOverError: The run is another job's now.
        """
        began = perf_counter()
        self._agree(self._finished() or self._refused())
        waited = perf_counter() - began
        tensors = state_tensors(state)
        if not self.parallel.is_first:
            for part in tensors.values():
                for tensor in filter(is_divided, part.values()):
                    whole(tensor)
            return
        for name, part in tensors.items():
            snapshot = self._snapshots.setdefault(name, Snapshot(pinned=self.parallel.device.type == "cuda"))
            snapshot.take(part, whole)
        copied = None
        if self.parallel.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        record = json.dumps(self._record(state), indent=1, sort_keys=True).encode()
        self._thread = Thread(target=self._work, args=(state.step, record, copied), name=f"checkpoint of step {state.step}")
        self._thread.start()
        self.metrics |= {"checkpoint/wait_s": perf_counter() - began, "checkpoint/wait_before_s": waited}

    @property
    def is_busy(self) -> bool:
        """Whether one is on its way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Come back when all that was saved is on disk for good.

        Raises:
            CheckpointError: It could not be written.
        """
        self._agree(self._finished())

    def __enter__(self) -> Self:
        if self.parallel.is_first:
            sweep(self.folder)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait for what is on its way; an error of it comes only where there is no other, and is noted on the other.

        No other process is asked: they leave while the first still registers what all have trained, for longer than a collective waits.
        """
        own = self._finished()
        if own is not None and error is None:
            raise own
        if own is not None and error is not None:
            error.add_note(f"besides, {own}")

    def _agree(self, error: Exception | None) -> None:
        """Raise on every process what is wrong on one."""
        if self.parallel.any(error is not None):
            raise error or CheckpointError("the first process could not write a checkpoint; it says why")

    def _refused(self) -> Exception | None:
        """Why this process may write no more."""
        try:
            if self.parallel.is_first:
                self.permitted()
        except Exception as error:
            return error
        return None

    def _given_up(self, step: int) -> bool:
        """Whether a checkpoint is of an earlier attempt and was not sound enough to go on from."""
        return self.begun_at is not None and step > self.begun_at and step not in self._written

    def _finished(self) -> Exception | None:
        """What went wrong with the save that was on its way, now that it has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _work(self, step: int, record: bytes, copied: torch.cuda.Event | None) -> None:
        """In a thread of its own: everything that takes long."""
        began = perf_counter()
        try:
            if copied is not None:
                copied.synchronize()
            self._write(step, record)
            size = sum(snapshot.num_bytes for snapshot in self._snapshots.values())
            self.metrics |= {"checkpoint/save_s": perf_counter() - began, "checkpoint/bytes": float(size)}
            self.covered(step)
        except Exception as error:
            self._error = error

    def _write(self, step: int, record: bytes) -> None:
        final = self.folder / f"step-{step:08d}"
        aside = self.folder / f"{final.name}.tmp"
        try:
            if not self.folder.exists():
                self.folder.mkdir(parents=True)
                sync_folder(self.folder.parent)
            sweep(self.folder)
            aside.mkdir()
            entries = {name: snapshot.write(aside / name) for name, snapshot in self._snapshots.items()}
            entries[RECORD] = write_flushed(aside / RECORD, [record])
            write_manifest(aside, entries)
            self.permitted()
            if final.exists():
                final.rename(self.folder / f"{final.name}.old.tmp")
            aside.rename(final)
            sync_folder(self.folder)
            move_pointer(self.folder, final.name)
            self._written.add(step)
            drop(self.folder, step, self.keep, self.keep_every, self._given_up)
            sweep(self.folder)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint of step {step} could not be written to {self.folder}: {error}; "
                f"earlier checkpoints are intact, {advice(error)} and run again"
            ) from error

    def _record(self, state: TrainState) -> dict[str, Any]:
        settings = dict(self.record)
        text = json.dumps(settings, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        return {
            "format": FORMAT,
            "step": state.step,
            "run_id": state.run_id,
            "window": state.window,
            "skipped": state.skipped,
            "skipped_in_row": state.skipped_in_row,
            "settings": settings,
            "settings_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "store_digest": settings.get("store_digest"),
            "world_size": self.parallel.world,
            "versions": _versions(),
        }


def move_pointer(folder: Path, name: str) -> None:
    """Let the pointer name another checkpoint of the folder; at every moment it names the one or the other."""
    aside = folder / f"{POINTER}.tmp"
    write_flushed(aside, [f"{name}\n".encode()])
    aside.replace(folder / POINTER)
    sync_folder(folder)


def drop(folder: Path, step: int, keep: int, keep_every: int | None, given_up: Callable[[int], bool]) -> None:
    """Put away what is no longer kept, now that the checkpoint of `step` is the newest, for `sweep` to delete.

    Later ones and those that were given up go too: they were damaged or never vouched for, and the run went on from before them.
    """
    found = steps(folder)
    sound = [path for path in found if step_of(path) <= step and not given_up(step_of(path))]
    old = [path for path in sound[:-keep] if keep_every is None or step_of(path) % keep_every]
    for path in (*old, *(path for path in found if path not in sound)):
        path.rename(folder / f"{path.name}.old.tmp")


def sweep(folder: Path) -> None:
    """Delete what a kill left half written and what was put away. What cannot be deleted now is tried again with the next save."""
    for path in folder.glob("*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
