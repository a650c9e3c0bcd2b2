"""Two processes train, one is killed: the other ends by itself and names it, and the same command goes on, also alone."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

import mae_core.train
from mae_core.checkpoint import steps
from mae_core.store import TileStore
from pipelines.pretrain import main
from tests.forked import started
from tests.tiny_runs import arguments, quick, shared_store, shared_tracking

__all__ = ["quick"]


def killed_at(step: int, argv: list[str]) -> int:
    """Exit code of `pretrain`; the second process is killed when it has made so many updates."""
    plain = mae_core.train.lr_factor

    def deadly(at: int, num_steps: int, settings: object) -> float:
        if at == step and os.environ["SLURM_PROCID"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(at, num_steps, settings)  # type: ignore[arg-type]

    mae_core.train.lr_factor = deadly
    return main(argv)


@pytest.mark.parametrize("divided", [False, True])
def test_the_survivor_names_the_dead_and_another_go_finishes(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], divided: bool
) -> None:
    store = shared_store(tmp_path_factory)
    argv = arguments(TileStore.open(store.path), tmp_path / "run", shared_tracking(tmp_path_factory), parallel__timeout_s=60)
    first, second = jobs = started(2, tmp_path, killed_at, 5, [*argv, f"parallel.shard={json.dumps(divided)}", "tracking.log_images=false"])
    for job in jobs:
        job.join(120)
    told = (tmp_path / "rank-0.txt").read_text()
    assert second.exitcode == -signal.SIGKILL
    assert first.exitcode == 1, told
    assert f"error: rank 0 of 2 lost rank 1 (process {second.pid} on this machine, gone; last seen in" in " ".join(told.split())
    assert "Traceback" not in told
    how = "divided among them (FSDP2)" if divided else "whole on each (DDP)"
    assert f"2 processes on cpu, the model {how}; an update from 4 samples = 2 processes · 2 at once · 1 in turn" in " ".join(told.split())
    assert [path.name for path in steps(tmp_path / "run" / "checkpoints")] == ["step-00000003"]
    assert main([*argv, "tracking.log_images=false"]) == 0
    assert "resuming at step 3 of 8" in capsys.readouterr().out
