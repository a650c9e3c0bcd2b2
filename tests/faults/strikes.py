"""Runs of `pretrain` in processes of their own that are struck by a signal at a chosen moment, and what is left of them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mae_core.checkpoint import steps
from tests.tiny_runs import OF_THE_MACHINE, ROOT, environment

PATIENCE_S = 240.0
"""How long a process may take to end, or to come to the step at which it is struck."""


@dataclass(frozen=True)
class Strike:
    """When and how a run is struck.

    Attributes:
        how: The signal.
        step: It comes while this step is at work; -1: while the process still starts.
        delay_s: It comes so long after that has begun.
        rank: The process that is struck; -1: all of them, and the launcher with SIGKILL.
    """

    how: signal.Signals
    step: int
    delay_s: float
    rank: int = -1


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        code: Of the process, or of the launcher; negative for a signal.
        began: Step that it went on from; None where it did not come so far.
        step: Last step that was done; None where it did not come so far.
        phase: What it was doing.
        text: What it said.
    """

    code: int
    began: int | None
    step: int | None
    phase: str
    text: str


def run_verb(argv: Sequence[str], strike: Strike | None = None, *, ranks: int = 1, clock: str = "true", verb: str = "pretrain") -> Ended:
    """Run the verb on so many processes, strike it, and wait until all of them are gone."""
    told = Path(tempfile.mkdtemp(prefix="told-"))
    script = [str(ROOT / "tests" / "faults" / "told.py"), str(told), clock, verb, *argv]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else []), *script]
    with (told / "text").open("w") as text:
        job = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=text, stderr=subprocess.STDOUT)
    try:
        if strike is not None:
            _strike(job, told, strike, ranks)
        code = job.wait(PATIENCE_S)
    finally:
        job.kill()
        job.wait()
        for pid, _, _ in (_where(told, rank) for rank in range(ranks)):
            _kill(pid, signal.SIGKILL)
        said = (told / "text").read_text()
        _, step, phase = _where(told, 0)
        shutil.rmtree(told)
    resumed = re.search(r"resuming at step (\d+)", said)
    began = int(resumed[1]) if resumed else (0 if "training and" in said else None)
    return Ended(code, began, step, phase, said)


def _strike(job: subprocess.Popen[bytes], told: Path, strike: Strike, ranks: int) -> None:
    patience = time.monotonic() + PATIENCE_S
    while strike.step >= 0 and not all((_where(told, rank)[1] or -1) >= strike.step for rank in range(ranks)):
        if job.poll() is not None or time.monotonic() > patience:
            return
        time.sleep(0.002)
    time.sleep(strike.delay_s)
    chosen = range(ranks) if strike.rank < 0 else [strike.rank % ranks]
    pids = [_where(told, rank)[0] for rank in chosen]
    if ranks == 1 or (strike.rank < 0 and strike.how == signal.SIGKILL) or None in pids:
        with suppress(ProcessLookupError):
            job.send_signal(strike.how)
    for pid in pids if ranks > 1 else []:
        _kill(pid, strike.how)


def _kill(pid: int | None, how: signal.Signals) -> None:
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, how)


def _where(told: Path, rank: int) -> tuple[int | None, int | None, str]:
    """Process, step and phase of a rank, as far as it has told them."""
    with suppress(OSError, ValueError):
        pid, step, phase = (told / f"rank-{rank}").read_text().split()
        return int(pid), int(step), phase
    return None, None, "start"


def tensors_of(out: Path) -> dict[str, bytes]:
    """The encoder and the last checkpoint of a run, file by file: weights, optimiser, random state."""
    last = steps(out / "checkpoints")[-1]
    files = [out / "model" / "model.safetensors", *sorted(last.glob("*.safetensors"))]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def rows_of(uri: str, name: str) -> tuple[list[str], dict[str, list[tuple[int, float]]]]:
    """Status of every run of a name, and the steps and values of its metrics by step; what tells of the machine is left out."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.search_experiments()
    runs = [run for run in client.search_runs([each.experiment_id for each in found]) if run.info.run_name == name]
    keys = [key for key in runs[0].data.metrics if not key.startswith((*OF_THE_MACHINE, "system/"))]
    rows = {key: sorted((each.step, each.value) for each in client.get_metric_history(runs[0].info.run_id, key)) for key in sorted(keys)}
    return [run.info.status for run in runs], rows
