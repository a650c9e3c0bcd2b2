"""When checkpoints are written, which stay, and who is told that one is on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mae_core.checkpoint import TrainState, save
from mae_core.parallel import Parallel


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes checkpoints of a run into a folder; every process calls it alike, one of them writes.

    Attributes:
        folder: Where they go.
        record: Resolved settings that are stored in each.
        keep: Newest ones that stay.
        parallel: This process.
        covered: Told the step of a checkpoint once it is on disk for good, on the process that writes.
        permitted: Asked before each is written, on the process that writes; raises where another job has taken the run over.
    """

    folder: Path
    record: Mapping[str, Any]
    keep: int
    parallel: Parallel
    covered: Callable[[int], None] = lambda step: None
    permitted: Callable[[], None] = lambda: None

    def save(self, state: TrainState) -> None:
        """Write the state; comes back as soon as training may change it.

        Raises:
            CheckpointError: It, or one before it that was still on its way, could not be written; the message says why.
            TakenOverError: The run is another job's now.
        """
        if self.parallel.is_first:
            self.permitted()
            save(state, self.folder, self.record, self.keep)
            self.covered(state.step)
        self.parallel.barrier()

    def wait(self) -> None:
        """Come back when all that was saved is on disk for good.

        Raises:
            CheckpointError: It could not be written.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait for what is on its way; an error of it comes only where there is no other."""
