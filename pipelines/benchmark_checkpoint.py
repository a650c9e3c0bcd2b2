"""How long training stands still for a checkpoint, and how much slower its steps are while one is written."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from pydantic import Field
from torch import nn

from mae_core.checkpoint import CheckpointError, TrainState
from mae_core.checkpoint_writer import CheckpointWriter
from mae_core.parallel import Parallel
from mae_core.settings import Settings, to_plain
from mae_core.speed import synchronise
from pipelines.benchmark_machine import description
from pipelines.benchmark_report import busy_note
from pipelines.command_line import run
from pipelines.progress import console, table
from pipelines.run_folder import RunError, write_json

DESCRIPTION = (
    "checkpoint: what training waits for a save as a share of the save, and how much slower steps are while one is written, "
    "with a model of plain matrices and AdamW"
)


class CheckpointBenchSettings(Settings):
    """Settings of `benchmark checkpoint`."""

    megabytes: float = Field(200.0, gt=1, description="Of a checkpoint: weights and two moments each")
    saves: int = Field(5, ge=1, description="Saves that count; one before them, into memory that was never used, does not")
    steps: int = Field(20, ge=1, description="Steps of training between two saves, long enough for the save to end meanwhile or not")
    folder: Path | None = Field(None, description="Where checkpoints go, to measure its file system (default: a temporary folder)")
    device: str = Field("cpu", description="cpu or cuda")
    out: Path | None = Field(None, description="JSON file to write the figures to")


def make_state(settings: CheckpointBenchSettings) -> TrainState:
    """A stack of square matrices of the size that is asked for, as large as those of a ViT-B."""
    width = 768
    count = max(1, round(settings.megabytes * 1e6 / 3 / 4 / width**2))
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count))).to(settings.device)
    return TrainState(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))


def make_step(state: TrainState, device: torch.device) -> Callable[[], float]:
    """A step of training on one batch; its seconds."""
    batch = torch.randn(64, 768, device=device)

    def step() -> float:
        began = perf_counter()
        state.model(batch).square().mean().backward()
        state.optimiser.step()
        state.optimiser.zero_grad(set_to_none=True)
        state.step += 1
        synchronise(device)
        return perf_counter() - began

    return step


def measure(settings: CheckpointBenchSettings, folder: Path) -> dict[str, Any]:
    """Medians over the saves: what is waited, what a save takes while training goes on and alone, steps with and without one."""
    device = torch.device(settings.device)
    state = make_state(settings)
    step = make_step(state, device)
    quiet = [step() for _ in range(2 * settings.steps)][settings.steps :]
    waits, saves, alone, busy = [], [], [], []
    with CheckpointWriter(folder, {}, 2, Parallel(0, 1, device)) as writer:
        for number in range(settings.saves + 1):
            writer.save(state)
            during = []
            for _ in range(settings.steps):
                seconds = step()
                if not writer.is_busy:
                    break
                during.append(seconds)
            writer.wait()
            if number:
                waits.append(writer.metrics["checkpoint/wait_s"] - writer.metrics["checkpoint/wait_before_s"])
                saves.append(writer.metrics["checkpoint/save_s"])
                busy += during
            step()
            writer.save(state)
            writer.wait()
            alone.append(writer.metrics["checkpoint/save_s"])
        size = writer.metrics["checkpoint/bytes"]
    return {
        "checkpoint_bytes": size,
        "wait_s": median(waits),
        "save_s": median(saves),
        "save_alone_s": median(alone[1:]),
        "waited_fraction_of_save": median(waits) / median(saves),
        "waited_fraction_of_save_alone": median(waits) / median(alone[1:]),
        "step_s": median(quiet),
        "step_s_while_saving": median(busy) if busy else None,
    }


def work(settings: CheckpointBenchSettings) -> int:
    """Do it."""
    machine = description(torch.device(settings.device))
    folder = Path(tempfile.mkdtemp(prefix="terravox-checkpoint-", dir=settings.folder))
    try:
        found = measure(settings, folder / "checkpoints")
    finally:
        shutil.rmtree(folder)
    rows = [
        ("a checkpoint", f"{found['checkpoint_bytes'] / 1e6:.0f} MB"),
        ("training waits for it", f"{found['wait_s'] * 1e3:.1f} ms"),
        (
            "a save while training goes on",
            f"{found['save_s'] * 1e3:.0f} ms: it waits {found['waited_fraction_of_save']:.1%}",
        ),
        ("a save alone", f"{found['save_alone_s'] * 1e3:.0f} ms: {found['waited_fraction_of_save_alone']:.1%}"),
        ("a step", f"{found['step_s'] * 1e3:.1f} ms"),
    ]
    if found["step_s_while_saving"] is not None:
        slower = found["step_s_while_saving"] / found["step_s"]
        rows.append(("a step while one is written", f"{found['step_s_while_saving'] * 1e3:.1f} ms: {slower:.2f} times"))
    table("checkpoints", ("what", "measured"), rows)
    if note := busy_note(machine):
        console.print(note)
    if settings.out is not None:
        write_json(settings.out, {"verb": "benchmark", "subject": "checkpoint", "machine": machine, **found, "config": to_plain(settings)})
        console.print(f"written to {settings.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subject; its exit code."""
    return run("benchmark", CheckpointBenchSettings, work, description=DESCRIPTION, expected=(RunError, CheckpointError), argv=argv)
