"""What stands around a training: where its checkpoints go, who may stop it, who watches it and who is told of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mae_core.black_box import BlackBox
from mae_core.checkpoint import CheckpointError, TrainState
from mae_core.checkpoint_writer import CheckpointWriter
from mae_core.flops import Work
from mae_core.loader import Stream
from mae_core.lost_ranks import lost_ranks_named
from mae_core.parallel import Parallel
from mae_core.pulse import pulse
from mae_core.speed import speedometer
from mae_core.stopping import StopRequest, stop_requests
from mae_core.tracking import Tracker
from mae_core.train import Report, Surroundings, TrainSettings, product_dtype
from mae_core.watchdog import watchdog
from pipelines.compute_time import ComputeTime
from pipelines.lease import confirm
from pipelines.progress import console, training


@dataclass(frozen=True)
class Attempt:
    """One go at a training.

    Attributes:
        surroundings: For the loop.
        report: For the loop.
        last: Newest value of every metric that was reported.
        loop: What the loop itself, and nothing after it, runs in: a signal waits there for the end of a step.
    """

    surroundings: Surroundings
    report: Callable[[Report], None]
    last: dict[str, float]
    loop: Callable[[], AbstractContextManager[None]]


@contextmanager
def attempt(
    work: Work, folder: Path, state: TrainState, stream: Stream, settings: TrainSettings, config: Mapping[str, Any], tracker: Tracker | None
) -> Iterator[Attempt]:
    """What a training needs around it, for as long as it lasts.

    Args:
        work: What is done with a sample, and the name that the user reads in front of every line.
        folder: Of the run; checkpoints go into `checkpoints`.
        state: Model, optimiser and step that the training goes on from.
        stream: Of its samples.
        settings: Its length and intervals.
        config: Resolved settings that are stored in each checkpoint.
        tracker: Told of every report; None on all processes but the first.

    Raises:
        CheckpointError: The processes would go on from different steps.
    """
    parallel = stream.parallel
    last: dict[str, float] = {}
    told_damage: list[str] = []
    with ExitStack() as stack:
        display = stack.enter_context(training(work.name, state.step, settings.steps, quiet=not parallel.is_first))
        stop = stack.enter_context(stop_requests())
        beats = stack.enter_context(pulse(folder, parallel.rank, parallel.world))
        stack.enter_context(watchdog(beats, settings.watchdog, folder, parallel.rank, timer=parallel.world > 1))
        clock = ComputeTime(folder, parallel)

        def covered(step: int) -> None:
            clock.note()
            if tracker is not None:
                tracker.covered(step)

        keep, permitted = settings.keep_checkpoints, partial(confirm, folder)
        for_ever = settings.keep_every_steps
        places = folder / "checkpoints"
        writer = stack.enter_context(CheckpointWriter(places, config, keep, parallel, covered, permitted, for_ever, state.step))

        stack.enter_context(lost_ranks_named(parallel, beats, folder))
        same_step(state, folder, parallel)

        def report(what: Report) -> None:
            saved = {name: value for name, value in dict(writer.metrics).items() if last.get(name) != value}  # told once each
            what = replace(what, metrics={**what.metrics, **saved})
            last.update(what.metrics)
            display.show(what)
            while len(told_damage) < len(stream.damaged):
                told_damage.append(list(stream.damaged.values())[len(told_damage)])
                console.print(f"[yellow]damaged tile {len(told_damage)}, fed as wholly invalid[/]: {told_damage[-1]}")
            if tracker is not None:
                confirm(folder)
                tracker.metrics(what.metrics, what.step)

        dtype = product_dtype(settings.precision, parallel.device)
        box = BlackBox(folder / "black_box", config, "fp32" if dtype == torch.float32 else "bf16", parallel, _say(parallel))
        around = Surroundings(writer, stop, beats, speedometer(work, dtype, parallel), box)
        yield Attempt(around, report, last, partial(_loop, stop, parallel, clock))


def same_step(state: TrainState, folder: Path, parallel: Parallel) -> None:
    """See that all processes go on from one checkpoint: each has looked for the newest sound one by itself.

    Raises:
        CheckpointError: They do not; all raise it.
    """
    found = parallel.each(state.step)
    if len(set(found)) > 1:
        raise CheckpointError(
            f"the processes found different checkpoints in {folder / 'checkpoints'}: ranks 0 to {parallel.world - 1} would go on from "
            f"steps {', '.join(map(str, found))}. Nothing was changed; put the folder on a disk that all machines see alike and run again"
        )


def _say(parallel: Parallel) -> Callable[[str], None]:
    """Speaks to the user on the first process."""

    def say(text: str) -> None:
        if parallel.is_first:
            console.print(text, style="yellow", markup=False)

    return say


@contextmanager
def _loop(stop: StopRequest, parallel: Parallel, clock: ComputeTime) -> Iterator[None]:
    with stop.held():
        try:
            yield
        finally:
            if parallel.is_first:
                clock.note()
        if parallel.any(bool(stop)):  # asked in the last step: what follows the training is for the next attempt
            raise stop.stopped(together=True)
