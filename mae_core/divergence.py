"""What becomes of a step whose loss or gradient is not finite: no update, a count, and an end of the run after many in a row."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from mae_core.augment import RawBatch
from mae_core.checkpoint import TrainState
from mae_core.parallel import Parallel

MOST_NAMED = 20
"""Tiles that a message names."""

MOST_RECENT = 100
"""Steps whose loss is remembered."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message names step, cause and samples."""


@dataclass(frozen=True, eq=False)
class Taken:
    """A step between its backward pass and its update. What is a tensor may still be on its way from the device.

    Attributes:
        step: Number of the update, from 1.
        loss, norm: Of the batch, over all processes: the same on each.
        asked: Number of processes that were asked to stop.
        samples: Tile numbers and summed losses of this process's samples, by micro-batch.
        batches: Its micro-batches.
    """

    step: int
    loss: Tensor
    norm: Tensor
    asked: Tensor
    samples: Sequence[tuple[Tensor, Tensor]]
    batches: Sequence[RawBatch]

    @cached_property
    def skipped(self) -> Tensor:
        """1 where loss or norm is not finite, else 0."""
        return (~(self.loss.isfinite() & self.norm.isfinite())).float()

    def everywhere(self, parallel: Parallel) -> list[tuple[int, float]]:
        """Tile and summed loss of every sample of the step; all processes ask together."""
        tile, value = (torch.cat([part[place].to(self.loss.device).double() for part in self.samples]) for place in (0, 1))
        own = torch.stack([tile, value], dim=1)
        whole = own.new_zeros(parallel.world, *own.shape)
        whole[parallel.rank] = own
        return [(int(tile), value) for tile, value in parallel.sum(whole).flatten(0, 1).tolist()]


@dataclass(frozen=True, eq=False)
class Judged:
    """A skipped step, as the host knows it.

    Attributes:
        taken: What it was.
        loss, norm: Not both are finite.
        recent: Number, loss and gradient norm of it and of steps before it, in this attempt.
        statistics: Running statistics of before the step, by `id` of the buffer.
    """

    taken: Taken
    loss: float
    norm: float
    recent: Sequence[tuple[int, float, float]]
    statistics: Mapping[int, Tensor]


class Guard:
    """Counts skipped steps, keeps the losses that a report is made of, and ends a run that skips too many in a row.

    What a GPU computes is told to the host one step later, so that no step waits for it: there a step is judged when the
    next has gone backward and has not yet moved a weight. All processes judge the same numbers, and so alike.

    Attributes:
        asked: Whether a process was asked to stop, as far as steps have been judged.
        statistics: Of the model.
        is_late: Whether a step is judged when the next is taken in.
    """

    is_late = False

    def __init__(self, state: TrainState, most_in_row: int, parallel: Parallel, keep: Callable[[Judged], None] | None = None) -> None:
        """`keep` is given the first skipped step of a run and the one that ends it, while the weights are those of before it."""
        self.asked = False
        self.is_late = self.is_late or parallel.device.type == "cuda"
        self.statistics = RunningStatistics(state.model)
        self._state, self._most, self._parallel, self._keep = state, most_in_row, parallel, keep
        self._row: deque[Taken] = deque(maxlen=MOST_NAMED)
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=MOST_RECENT)
        self._pending: tuple[Taken, Tensor, torch.cuda.Event | None] | None = None

    def take(self, taken: Taken) -> None:
        """Take in a step before its update.

        Raises:
            TrainingError: It, or on a GPU the one before it, was skipped and is one too many in a row.
        """
        before, self._pending = self._pending, (taken, *_on_its_way(torch.stack([taken.loss, taken.norm, taken.asked])))
        if not self.is_late:
            self.settle()
        elif before is not None:
            self._judge(*before)

    def settle(self) -> None:
        """Judge every step that was taken in, waiting for the device.

        Raises:
            TrainingError: As `take`.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._judge(*pending)

    def _judge(self, taken: Taken, numbers: Tensor, event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.synchronize()
        loss, norm, asked = numbers.tolist()
        self.asked = self.asked or asked > 0
        self._recent.append((taken.step, loss, norm))
        state = self._state
        if math.isfinite(loss) and math.isfinite(norm):
            state.window = [*state.window, (loss, norm)]  # a new list: a save that is still on its way holds the old one
            state.skipped_in_row = 0
            self._row.clear()
            return
        state.skipped += 1
        state.skipped_in_row += 1
        self._row.append(replace(taken, batches=()))
        is_last = state.skipped_in_row >= self._most
        if self._keep is not None and (is_last or state.skipped == 1):
            self._keep(Judged(taken, loss, norm, tuple(self._recent), self.statistics.before()))
        if is_last:
            raise TrainingError(self._words(taken.step, loss, norm))

    def _words(self, step: int, loss: float, norm: float) -> str:
        samples = [sample for taken in self._row for sample in taken.everywhere(self._parallel)]
        bad = list(dict.fromkeys(tile for tile, value in samples if not math.isfinite(value)))
        last = list(dict.fromkeys(tile for tile, _ in samples[-len(samples) // len(self._row) :]))
        names = f"tiles {_first(bad)}" if bad else f"none of its samples by itself; the batch holds tiles {_first(last)}"
        row = self._state.skipped_in_row
        steps = "1 step" if row == 1 else f"{row} steps in a row"
        box = "" if self._keep is None else f"; look into it with: terravox replay RUN/black_box/step-{step:08d}"
        return (
            f"step {step}: loss {loss}, gradient norm {norm}: not finite, in {names}. {steps} made no update, which is as many as "
            f"train.max_skipped_in_row allows; the weights are finite, those of step {step - row}. Look at these tiles and lower "
            f"optim.base_lr in a new run, or raise train.max_skipped_in_row to pass over them in this one{box}"
        )


def _on_its_way(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Numbers on the host, once the event has come to pass; nobody waits for it here."""
    if numbers.device.type != "cuda":
        return numbers, None
    event = torch.cuda.Event()
    copy = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
    event.record()
    return copy, event


def _first(tiles: list[int]) -> str:
    more = f" and {len(tiles) - MOST_NAMED} more" if len(tiles) > MOST_NAMED else ""
    return f"{tiles[:MOST_NAMED]}{more}"


class RunningStatistics:
    """Statistics that layers such as batch normalisation keep of what goes through them, put back where a step was skipped."""

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for layer in model.modules() if getattr(layer, "track_running_stats", False)]
        self._kept = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        self._before: list[Tensor] = []

    def remember(self) -> None:
        """Keep them as they are now."""
        self._before = [buffer.clone() for buffer in self._kept]

    def before(self) -> dict[int, Tensor]:
        """What was remembered, by `id` of the buffer."""
        return {id(buffer): before for buffer, before in zip(self._kept, self._before, strict=True)}

    def put_back(self, skipped: Tensor) -> None:
        """Make them what was remembered if `skipped` is 1; nobody waits to know."""
        for buffer, before in zip(self._kept, self._before, strict=True):
            buffer.copy_(torch.where(skipped > 0, before, buffer))


def check_weights(state: TrainState, parallel: Parallel) -> None:
    """See that a state may be saved.

    Raises:
        TrainingError: A weight or a running statistic is not finite; all processes raise it together.
    """
    named = {name: getattr(tensor, "to_local", tensor.detach)() for name, tensor in state.model.state_dict().items()}
    named = {name: tensor for name, tensor in named.items() if tensor.is_floating_point() and tensor.numel()}
    largest = torch.stack([tensor.abs().amax().float() for tensor in named.values()])
    if not parallel.any(not bool(largest.isfinite().all())):
        return
    bad = [name for name, size in zip(named, largest.tolist(), strict=True) if not math.isfinite(size)]
    raise TrainingError(
        f"step {state.step}: weights that are not finite after an update that was ({', '.join(bad[:3]) or 'on another process'}); they are "
        "not saved, the last checkpoint is from before. Lower optim.base_lr in a new run"
    )
