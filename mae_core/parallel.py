"""One process or many, on one machine or several: the rest of the code asks here for rank, sums and the wrapped model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mae_core.launch import Launch, launched
from mae_core.settings import Settings
from mae_core.stopping import Stopped


class ParallelSettings(Settings):
    """How several processes train one model."""

    shard: bool = Field(
        False, description="Divide weights, gradients and optimiser among the processes (FSDP2); for models that do not fit on one GPU"
    )
    timeout_s: int = Field(600, ge=5, le=86_400, description="Longest time that a process waits for the others before the run ends")


class DeviceError(ValueError):
    """The device that was asked for is not there."""


class RankError(RuntimeError):
    """Other processes of the run are gone or too late; the message says which, as far as it is known."""


@dataclass(frozen=True)
class Parallel:
    """This process among all: its rank, how many there are and the device that it computes on.

    Attributes:
        rank: Its number.
        world: How many there are.
        device: What it computes on.
        shard: Whether the model is divided among them (`sharding`).
        timeout_s: How long it waits for the others.
    """

    rank: int
    world: int
    device: torch.device
    shard: bool = False
    timeout_s: int = 600

    @property
    def is_first(self) -> bool:
        """Rank 0: the one that writes, tracks and talks."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are averaged over the processes; itself where there is one, or where it is divided among them."""
        if self.world == 1 or self.shard:
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

    def each(self, value: int) -> list[int]:
        """A whole number of every process, by rank; every process gets the same list."""
        table = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        table[self.rank] = value
        return [int(one) for one in self.sum(table).tolist()]

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
def processes(device: str, settings: ParallelSettings | None = None) -> Iterator[Parallel]:
    """Join the processes that were started with this one (see `launched`), leave them at the end.

    A collective that fails because another process is gone or late ends as a `RankError`. On CPU (gloo) it fails at once where a process
    died and after `timeout_s` where one hangs. On GPUs (NCCL) torch's watchdog is left as it is by default
    (`TORCH_NCCL_ASYNC_ERROR_HANDLING=3`, no blocking wait): after `timeout_s` it takes the process down.

    Args:
        device: `auto`, `cpu` or `cuda`. Several processes take one GPU each, by local rank.
        settings: How they work together; None for the defaults.

    Raises:
        LaunchError: The environment tells one half of a launch.
        DeviceError: The device is not there.
        RankError: The processes do not find each other, or one was lost.
    """
    settings = settings or ParallelSettings()
    launch = launched(os.environ)
    place = _place(device, launch)
    parallel = Parallel(launch.rank, launch.world, place, settings.shard and launch.world > 1, settings.timeout_s)
    if launch.world == 1:
        yield parallel
        return
    _join(parallel, launch)
    try:
        yield parallel
    except Stopped as stopped:
        if stopped.together:  # a launcher ends the others as soon as one leaves: the first has yet to tell the tracker
            with suppress(RuntimeError):  # another one is gone already, which changes nothing: what is to be kept is on disk
                parallel.barrier()
        _leave_in_haste(place)
        raise
    except BaseException as error:
        _leave_in_haste(place)
        if failed_together(error):
            raise RankError(
                f"rank {launch.rank} of {launch.world} lost another process ({_first_line(error)}); "
                "the message of that one tells why. Run the same command again to go on"
            ) from error
        raise
    dist.destroy_process_group()


def failed_together(error: BaseException) -> bool:
    """Whether an error comes from a collective itself, which fails where another process is gone or too late."""
    if isinstance(error, RankError):
        return False
    told = isinstance(error, RuntimeError) and any(word in str(error) for word in TOLD_BY_COLLECTIVES)
    return told or isinstance(error, dist.DistError)


TOLD_BY_COLLECTIVES = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")
"""What stands in the messages of collectives that failed: gloo's are plain `RuntimeError`s."""


def _place(device: str, launch: Launch) -> torch.device:
    """This process's device, made the current one where it is a GPU."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError("device cuda was asked for and torch sees no GPU; use device=auto or device=cpu")
    count = torch.cuda.device_count()
    local = 0 if launch.by == "Slurm" and count == 1 else launch.local  # Slurm can show each task its own GPU only
    if local >= count:
        raise DeviceError(
            f"process {launch.local} of this machine (rank {launch.rank}) has no GPU of its own, torch sees {count}; "
            f"start at most {count} processes on each machine, or use device=cpu"
        )
    place = torch.device("cuda", local)
    torch.cuda.set_device(place)
    return place


def _join(parallel: Parallel, launch: Launch) -> None:
    on_gpu = parallel.device.type == "cuda"
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=launch.address,
            rank=launch.rank,
            world_size=launch.world,
            timeout=timedelta(seconds=parallel.timeout_s),
            device_id=parallel.device if on_gpu else None,
        )
    except (dist.DistError, RuntimeError) as error:
        where = launch.address.removeprefix("tcp://") if launch.by == "Slurm" else "MASTER_ADDR"
        raise RankError(
            f"rank {launch.rank} of {launch.world} did not find the others at {where} within parallel.timeout_s={parallel.timeout_s} "
            f"({_first_line(error)}); look whether all were started, and whether that name can be reached from every machine"
        ) from error


def _leave_in_haste(place: torch.device) -> None:
    """Leave after an error without waiting for the others, so that they learn of it: NCCL's orderly end would wait for them."""
    if place.type == "cuda":
        dist.distributed_c10d._abort_process_group()  # noqa: SLF001 - the public call waits for the others
    else:
        dist.destroy_process_group()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
