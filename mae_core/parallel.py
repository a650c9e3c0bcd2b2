"""One process or many under `torchrun`: the rest of the code asks here for rank, sums and the wrapped model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mae_core.stopping import Stopped


class DeviceError(ValueError):
    """The device that was asked for is not there."""


@dataclass(frozen=True)
class Parallel:
    """This process among all: its rank, how many there are and the device that it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Rank 0: the one that writes, tracks and talks."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are averaged over the processes; itself where there is one."""
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, value: bool) -> bool:
        """Whether it is so on one process at least; every process gets the same answer."""
        return bool(self.sum(torch.tensor(float(value), device=self.device)) > 0)

    def barrier(self) -> None:
        """Wait for the others."""
        if self.world > 1:
            dist.barrier()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a distributed wrapper."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(inner, nn.Module)
    return inner


@contextmanager
def processes(device: str, timeout_s: int = 600) -> Iterator[Parallel]:
    """Join the process group that `torchrun` describes in the environment, leave it at the end.

    Args:
        device: `auto`, `cpu` or `cuda`. Several processes take one GPU each, by local rank.
        timeout_s: How long a collective waits for a lost process before the job fails.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device cuda was asked for and torch sees no GPU; use device=auto or device=cpu")
    place = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    if world > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
    try:
        yield Parallel(rank, world, place)
    except Stopped as stopped:
        if world > 1 and stopped.together:  # a launcher ends the others as soon as one leaves: the first has yet to tell the tracker
            dist.barrier()
        raise
    finally:
        if world > 1:
            dist.destroy_process_group()
