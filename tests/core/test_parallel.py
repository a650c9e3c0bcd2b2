"""Several processes see the same sums and the same answers; one process needs no process group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mae_core import parallel
from mae_core.launch import Launch
from mae_core.parallel import DeviceError, Parallel, ParallelSettings, RankError, processes, unwrap
from tests.forked import free_port, slurm
from tests.tiny_runs import two_processes

SCRIPT = """
from pathlib import Path
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from mae_core.checkpoint import CheckpointError, TrainState
from mae_core.parallel import processes, unwrap
from pipelines.attempt import same_step

with processes("cpu") as parallel:
    assert parallel.world == 2 and parallel.is_first == (parallel.rank == 0)
    own = torch.tensor([1.0, parallel.rank])
    assert parallel.sum(own).tolist() == [2.0, 1.0] and own.tolist() == [1.0, parallel.rank]
    assert parallel.any(parallel.is_first) and parallel.any(True) and not parallel.any(False)
    assert parallel.each(7 + 2 * parallel.rank) == [7, 9]
    try:
        same_step(TrainState(nn.Linear(1, 1), None, 7 + 2 * parallel.rank), Path("run"), parallel)
    except CheckpointError as error:
        assert "ranks 0 to 1 would go on from steps 7, 9" in str(error)
    else:
        raise AssertionError("they would train apart")
    same_step(TrainState(nn.Linear(1, 1), None, 7), Path("run"), parallel)
    inner = nn.Linear(2, 1)
    model = parallel.wrap(inner)
    assert isinstance(model, DistributedDataParallel) and unwrap(model) is inner
    model(torch.full((1, 2), float(parallel.rank))).sum().backward()
    assert inner.weight.grad.tolist() == [[0.5, 0.5]]
    parallel.barrier()
assert not torch.distributed.is_initialized()
print("all is well")
"""


def test_two_processes_sum_agree_and_average_gradients(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    result = two_processes(tmp_path / "script.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("all is well") == 2


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with processes("cpu") as parallel:
        assert parallel == Parallel(0, 1, torch.device("cpu"))
        model = nn.Linear(1, 1)
        assert parallel.wrap(model) is model
        assert unwrap(model) is model
        values = torch.ones(2)
        assert parallel.sum(values) is values
        assert parallel.any(True)
        assert not parallel.any(False)
        parallel.barrier()
        assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_told() -> None:
    with (
        pytest.raises(DeviceError, match=r"device cuda was asked for and torch sees no GPU; use device=auto or device=cpu"),
        processes("cuda"),
    ):
        pass
    with processes("auto") as parallel:
        assert parallel.device == torch.device("cpu")


def test_processes_that_never_come_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm(1, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(RankError, match=r"rank 1 of 2 did not find the others at 127\.0\.0\.1:\d+ within parallel\.timeout_s=1 "),
        processes("cpu", ParallelSettings.model_construct(timeout_s=1)),
    ):
        pass
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("count", "by", "place"),
    [(4, "torchrun", 1), (4, "Slurm", 1), (1, "Slurm", 0)],
    ids=["one each", "all shown to each task", "one shown to each task"],
)
def test_a_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch, count: int, by: str, place: int) -> None:
    chosen = as_with_gpus(monkeypatch, count)
    assert parallel._place("auto", Launch(3, 8, 1, "env://", by)) == torch.device("cuda", place)
    assert chosen == [torch.device("cuda", place)]


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    as_with_gpus(monkeypatch, 1)
    with pytest.raises(DeviceError, match=r"process 1 of this machine \(rank 1\) has no GPU of its own, torch sees 1; start at most 1"):
        parallel._place("cuda", Launch(1, 2, 1, "env://", "torchrun"))
    assert parallel._place("cpu", Launch(1, 2, 1, "env://", "torchrun")) == torch.device("cpu")


def as_with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> list[torch.device]:
    """Torch as it is on a machine with GPUs; the devices that are made current."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen
