"""What would keep a training from starting or from ending well, found by `--check` without writing anything."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from mae_core.launch import launched
from mae_core.loader import LoaderError, LoaderSettings, share_of
from mae_core.tracking import TrackingError, TrackingSettings, tracking_uri
from mae_core.train import TrainSettings
from pipelines import lease
from pipelines.doctor_disk import folder_findings
from pipelines.doctor_machine import driver_version, gpu_findings
from pipelines.doctor_process import launch_findings, limit_findings, variable_findings
from pipelines.doctor_tracking import SUBJECT, tracking_findings
from pipelines.findings import Finding, problem, sentences, warning


class Training(Protocol):
    """What is asked of the settings of a verb that trains."""

    @property
    def out(self) -> Path:
        """Folder of the run."""

    @property
    def train(self) -> TrainSettings:
        """Length and intervals."""

    @property
    def loader(self) -> LoaderSettings:
        """Batches."""

    @property
    def tracking(self) -> TrackingSettings:
        """Where it is recorded."""

    @property
    def take_over(self) -> bool:
        """Whether a living job is pushed aside."""


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of a checkpoint: weights and the two moments of AdamW."""
    return 3 * sum(weight.numel() * weight.element_size() for weight in model.parameters())


def training_problems(settings: Training, state_bytes: int, say: Callable[[str], None], runs: int = 1) -> list[str]:
    """All that would go wrong, a line each; what is only worth knowing is said.

    Args:
        settings: Of the verb.
        state_bytes: Of a checkpoint; 0 where it is not known.
        say: Told the warnings.
        runs: Trainings of the verb, each of which keeps its checkpoints.
    """
    out, environment = settings.out, os.environ
    need = state_bytes * (settings.train.keep_checkpoints * runs + 1)
    found = folder_findings("out", out, max(0, need - present_bytes(out)) if state_bytes else 0)
    if not sentences(found, "problem"):
        found += lease_findings(out, take_over=settings.take_over)
    found += _tracking(settings.tracking, out)
    found += limit_findings(state_bytes * 2 // 3)
    found += variable_findings(environment)
    found += gpu_findings(settings.train.device, driver_version(), environment, torch)
    launch = launch_findings(environment)
    found += launch if sentences(launch, "problem") else _shares(settings.loader, launched(environment).world)
    for line in sentences(found, "warning"):
        say(f"warning: {line}")
    return sentences(found, "problem")


def present_bytes(out: Path) -> int:
    """Bytes of the checkpoints that a run has already."""
    total = 0
    for file in out.rglob("step-*/*") if os.path.isdir(out) else ():  # noqa: PTH112 - a name that is too long is no folder
        with suppress(FileNotFoundError):  # a job at work drops old ones
            total += file.stat().st_size
    return total


def lease_findings(out: Path, *, take_over: bool) -> list[Finding]:
    """Whether another job has the run."""
    words, sure = lease.look(out)
    if not words or take_over:
        return []
    if sure:
        return [problem("out", f"{out} is being written to by {words}", "wait for its end, stop it, or say take_over=true")]
    advice = f"a start waits up to {lease.STALE_S:.0f} s for a sign of life of it"
    return [warning("out", f"{out} was last written to from another machine, by {words}", advice)]


def _tracking(settings: TrackingSettings, out: Path) -> list[Finding]:
    try:
        return tracking_findings(tracking_uri(settings, out), os.environ)
    except TrackingError as error:
        return [problem(SUBJECT, str(error), "")]


def _shares(settings: LoaderSettings, world: int) -> list[Finding]:
    try:
        share_of(settings, world)
    except LoaderError as error:
        return [problem("batches", str(error), "change it, or the number of processes")]
    return []
