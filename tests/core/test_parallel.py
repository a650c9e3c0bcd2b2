"""Several processes see the same sums and the same answers; one process needs no process group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mae_core.parallel import DeviceError, Parallel, processes, unwrap
from tests.tiny_runs import two_processes

SCRIPT = """
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from mae_core.parallel import processes, unwrap

with processes("cpu") as parallel:
    assert parallel.world == 2 and parallel.is_first == (parallel.rank == 0)
    own = torch.tensor([1.0, parallel.rank])
    assert parallel.sum(own).tolist() == [2.0, 1.0] and own.tolist() == [1.0, parallel.rank]
    assert parallel.any(parallel.is_first) and parallel.any(True) and not parallel.any(False)
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
