"""The training loop: one function that reads top to bottom, for one process and for many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from mae_core.augment import RawBatch
from mae_core.black_box import BlackBox
from mae_core.checkpoint import TrainState
from mae_core.checkpoint_writer import CheckpointWriter
from mae_core.divergence import Guard, Judged, Taken, check_weights
from mae_core.exhaustion import within_memory
from mae_core.loader import Stream
from mae_core.masking import STREAM_STEP, counter_bits
from mae_core.optim import OptimSettings, learning_rate, lr_factor, set_lr, step_unless
from mae_core.pulse import Pulse
from mae_core.settings import Settings
from mae_core.sharding import clip_norm, own_parts, reduced, undivided
from mae_core.speed import Speedometer
from mae_core.stopping import Stopped, StopRequest
from mae_core.watchdog import WatchdogSettings


class TrainSettings(Settings):
    """Length of a run and what happens along it."""

    steps: int = Field(1000, ge=1, description="Updates of the weights")
    log_steps: int = Field(10, ge=1, description="Updates between two lines of the log")
    eval_steps: int = Field(200, ge=1, description="Updates between two evaluations on held-out tiles")
    eval_tiles: int = Field(64, ge=1, description="Held-out tiles that are evaluated, spread evenly over all of them")
    checkpoint_steps: int = Field(200, ge=1, description="Updates between two checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints that stay on disk")
    keep_every_steps: int | None = Field(
        None, ge=1, description="A checkpoint is written at multiples of this, too, and stays on disk for ever; null: none does"
    )
    max_skipped_in_row: int = Field(
        5, ge=1, description="Steps in a row whose loss or gradient is not finite, and that make no update, after which the run stops"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the hardware computes it, else fp32")
    compile: Literal["off", "whole", "parts"] = Field(
        "off", description="Compile the model first: whole as one graph or not at all (pretraining), or in parts; pays in long runs"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if torch sees one")
    seed: int = Field(0, ge=0, description="Of weights, order, crops and hidden sets")
    watchdog: WatchdogSettings = WatchdogSettings()


@dataclass(frozen=True)
class Loss:
    """Loss of a micro-batch as a sum and a count, so that any division of a batch gives the same gradient.

    Attributes:
        total: Scalar sum to go backward from.
        count: Scalar number of summed terms; the loss is `total / count` over all micro-batches and processes.
        per_sample: Detached sums `(batch,)`, to name a sample that is not finite.
        tile: Tile numbers `(batch,)`.
        nominal: A number of the size of `count` that does not depend on data; keeps the backward pass in range.
    """

    total: Tensor
    count: Tensor
    per_sample: Tensor
    tile: Tensor
    nominal: float


class Task(Protocol):
    """What is trained: turns raw batches into a loss, and looks at held-out tiles."""

    def loss(self, model: nn.Module, raw: RawBatch, progress: float) -> Loss:
        """Loss of a micro-batch at a share of the run, in [0, 1)."""
        ...

    def facts(self, model: nn.Module) -> dict[str, Any]:
        """What makes an equal task and an equal model without a store, as JSON's types; `mae_core.replay` reads it."""
        ...

    def evaluate(self, model: nn.Module, step: int) -> Iterator[tuple[str, float]]:
        """Names and values from held-out tiles; every process takes part and gets the same values."""
        ...


@dataclass(frozen=True)
class Report:
    """What the loop tells the outside after some steps.

    Attributes:
        step: Updates done.
        metrics: Names and values since the last report.
    """

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Surroundings:
    """What a loop stands in.

    Attributes:
        checkpoints: Writes them; None writes none.
        stop: Whether this process was asked to stop.
        pulse: Told where the process is.
        speed: Tells rates and memory.
        black_box: Keeps steps that were not finite; None keeps none.
    """

    checkpoints: CheckpointWriter | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    pulse: Pulse = field(default_factory=Pulse)
    speed: Speedometer = field(default_factory=Speedometer)
    black_box: BlackBox | None = None


def train(
    task: Task,
    state: TrainState,
    stream: Stream,
    settings: TrainSettings,
    optim: OptimSettings,
    around: Surroundings,
    report: Callable[[Report], None],
) -> None:
    """Train `state` in place from its step to the last.

    What a model draws for itself, such as dropped paths, is a function of seed, step and process. Gradients of all micro-batches and
    processes are summed and divided by the global count once, so neither the micro-batch size nor uneven numbers of valid voxels change
    the update. A step whose loss or gradient is not finite makes none: weights, optimiser and running statistics stay, bit for bit.

    Args:
        task: Gives loss and evaluation.
        state: Model, optimiser and step; continued from wherever it is.
        stream: Where samples come from.
        settings: Length, intervals, precision.
        optim: Rate, schedule and clipping.
        around: Where checkpoints go, who may stop the run and who watches it.
        report: Called on every process after `log_steps` updates and after an evaluation.

    Raises:
        TrainingError: Too many steps in a row were not finite, a weight is not, or memory ran out; no checkpoint is written after that.
        Stopped: One of the processes was asked to stop; all have saved the same step.
    """
    parallel = stream.parallel
    if settings.compile != "off":
        state.model.compile(fullgraph=settings.compile == "whole", dynamic=False)
    model = parallel.wrap(state.model).train()
    lr = learning_rate(optim, stream.settings.global_batch_size)
    guard, speed = Guard(state, settings.max_skipped_in_row, parallel, _keeper(task, state, around.black_box)), around.speed.start()
    for batches, waited in stream.steps(state.step, settings.steps):
        around.pulse.beat(state.step, "step")
        torch.manual_seed(int(counter_bits(settings.seed, STREAM_STEP, state.step, parallel.rank)))
        set_lr(state.optimiser, lr * lr_factor(state.step, settings.steps, optim))
        guard.statistics.remember()
        losses = []
        for number, raw in enumerate(batches):
            with within_memory(raw, stream, state):
                with reduced(model, last=number == len(batches) - 1), autocast(settings.precision, parallel.device):
                    loss = task.loss(model, raw, state.step / settings.steps)
                (loss.total / loss.nominal).backward()
            losses.append(loss)
        total, count, asked = parallel.sum(_own_sums(losses, around.stop))
        factor = losses[0].nominal * parallel.world / count.clamp(min=1)
        torch._foreach_mul_(own_parts(weight.grad for weight in state.model.parameters() if weight.grad is not None), factor)
        norm = clip_norm(state.model.parameters(), optim.clip_norm)
        taken = Taken(state.step + 1, total / count.clamp(min=1), norm, asked, [(loss.tile, loss.per_sample) for loss in losses], batches)
        guard.take(taken)
        step_unless(taken.skipped, state.optimiser)
        guard.statistics.put_back(taken.skipped)
        state.optimiser.zero_grad(set_to_none=True)
        state.step += 1
        speed.add(stream.settings.global_batch_size, waited)
        if _due(state.step, settings.log_steps, settings):
            guard.settle()
            report(Report(state.step, _losses(state) | speed.close(parallel) | stream.damage()))
        if _due(state.step, settings.eval_steps, settings):
            around.pulse.beat(state.step, "evaluation")
            guard.settle()
            with speed.paused(), undivided(state.model), _evaluating(model), autocast(settings.precision, parallel.device):
                report(Report(state.step, dict(task.evaluate(state.model, state.step))))
        stop = guard.asked and state.step < settings.steps
        if around.checkpoints is not None and (stop or _saves(state.step, settings)):
            around.pulse.beat(state.step, "save")
            guard.settle()
            check_weights(state, parallel)
            with speed.paused():
                around.checkpoints.save(state)
        if stop:
            break
    if around.checkpoints is not None:
        around.checkpoints.wait()
    if guard.asked and state.step < settings.steps:
        asker = around.stop.signal or "by another process"
        raise Stopped(f"asked to stop ({asker}); step {state.step} of {settings.steps} is saved", together=True)
    around.pulse.beat(state.step, "end")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 autocast where it is asked for, or with `auto` where the hardware computes it; else nothing."""
    dtype = product_dtype(precision, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def product_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What matrices are multiplied in at a precision of the settings."""
    wide = precision == "bf16" or (precision == "auto" and computes_bf16(device))
    return torch.bfloat16 if wide else torch.float32


def computes_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices faster than fp32 ones."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def _own_sums(losses: Sequence[Loss], stop: StopRequest) -> Tensor:
    """Loss and count of this process's samples, and 1 if it was asked to stop: what all processes add up."""
    own = torch.stack([torch.stack([loss.total.detach(), loss.count.float()]) for loss in losses]).sum(0)
    return torch.cat([own, own.new_full((1,), float(bool(stop)))])  # filled there: a copy would let the host wait for the whole step


def _losses(state: TrainState) -> dict[str, float]:
    """Means since the last report, without steps that were skipped; those of before a restart came along in the state."""
    losses, norms = (torch.tensor([pair[place] for pair in state.window]) for place in (0, 1))
    means = {"train/loss": float(losses.mean()), "train/grad_norm": float(norms.mean())} if state.window else {}
    state.window = []
    return {**means, "train/skipped_steps": float(state.skipped), "train/lr": state.optimiser.param_groups[-1]["lr"]}


def _keeper(task: Task, state: TrainState, box: BlackBox | None) -> Callable[[Judged], None] | None:
    """Keeps a skipped step with all that is needed to run it again; None where nothing is kept."""
    return None if box is None else lambda judged: box.write(task.facts(state.model), state, judged)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model is not trained meanwhile, nor compiled: held-out batches have shapes of their own."""
    model.eval()
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        yield
    model.train()


def _saves(step: int, settings: TrainSettings) -> bool:
    for_ever = settings.keep_every_steps
    return _due(step, settings.checkpoint_steps, settings) or (for_ever is not None and step % for_ever == 0)


def _due(step: int, every: int, settings: TrainSettings) -> bool:
    return step % every == 0 or step == settings.steps
