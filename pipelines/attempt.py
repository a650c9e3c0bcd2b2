"""What stands around a training: where its checkpoints go, who may stop it, who watches it and who is told of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_core.checkpoint import TrainState
from mae_core.checkpoint_writer import CheckpointWriter
from mae_core.loader import Stream
from mae_core.pulse import no_pulse
from mae_core.stopping import stop_requests
from mae_core.tracking import Tracker
from mae_core.train import Report, Surroundings, TrainSettings
from pipelines.progress import console, training


@dataclass(frozen=True)
class Attempt:
    """One go at a training.

    Attributes:
        surroundings: For the loop.
        report: For the loop.
        last: Newest value of every metric that was reported.
    """

    surroundings: Surroundings
    report: Callable[[Report], None]
    last: dict[str, float]


@contextmanager
def attempt(
    title: str, folder: Path, state: TrainState, stream: Stream, settings: TrainSettings, config: Mapping[str, Any], tracker: Tracker | None
) -> Iterator[Attempt]:
    """What a training needs around it, for as long as it lasts.

    Args:
        title: What the user reads in front of every line.
        folder: Of the run; checkpoints go into `checkpoints`.
        state: Model, optimiser and step that the training goes on from.
        stream: Of its samples.
        settings: Its length and intervals.
        config: Resolved settings that are stored in each checkpoint.
        tracker: Told of every report; None on all processes but the first.
    """
    parallel = stream.parallel
    last: dict[str, float] = {}
    told_damage: list[str] = []
    with ExitStack() as stack:
        display = stack.enter_context(training(title, state.step, settings.steps, quiet=not parallel.is_first))
        stop = stack.enter_context(stop_requests())
        pulse = stack.enter_context(no_pulse())
        covered: Callable[[int], None] = _nothing if tracker is None else tracker.covered
        writer = stack.enter_context(CheckpointWriter(folder / "checkpoints", config, settings.keep_checkpoints, parallel, covered))

        def report(what: Report) -> None:
            last.update(what.metrics)
            display.show(what)
            while len(told_damage) < len(stream.damaged):
                told_damage.append(list(stream.damaged.values())[len(told_damage)])
                console.print(f"[yellow]damaged tile {len(told_damage)}, fed as wholly invalid[/]: {told_damage[-1]}")
            if tracker is not None:
                tracker.metrics(what.metrics, what.step)

        yield Attempt(Surroundings(writer, stop, pulse), report, last)


def _nothing(_: object) -> None:
    """Nobody is to be told."""
