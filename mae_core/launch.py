"""Where a process stands among those that were started with it, as torchrun or Slurm tell it in the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

STEP = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS")
"""Set by `srun` alone: a batch script carries numbers of tasks of its own and is one process all the same."""


class LaunchError(ValueError):
    """The environment tells one half of a launch on several processes; the message names what is missing."""


@dataclass(frozen=True)
class Launch:
    """What a process was told when it was started.

    Attributes:
        rank: Its number.
        world: How many there are.
        local: Its number on its machine.
        address: Where they meet, as `torch.distributed` takes it; empty for one process.
        by: Who started them.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    address: str = ""
    by: str = ""


def launched(environment: Mapping[str, str]) -> Launch:
    """The launch that an environment describes; one process where it describes none.

    `torchrun` (also inside `srun` or a Kubernetes TrainJob) tells `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT`.
    `srun python …` with a task for each GPU tells `SLURM_PROCID` and its like; the first node of the step is where the processes meet, at
    a port that the job's number gives. `MASTER_ADDR` and `MASTER_PORT` win where they are set.

    Raises:
        LaunchError: Something of it is missing or no number.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _by_torchrun(environment)
    if any(name in environment for name in STEP):
        return _by_slurm(environment)
    return Launch()


def _by_torchrun(environment: Mapping[str, str]) -> Launch:
    rank, world = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    _check(rank, world, "RANK", "WORLD_SIZE")
    if world == 1:
        return Launch()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        _needed(environment, name)
    local = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else 0  # one process on each machine
    return Launch(rank, world, local, "env://", "torchrun")


def _by_slurm(environment: Mapping[str, str]) -> Launch:
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    world = _number(environment, tasks) if tasks in environment else 1
    if world == 1:
        return Launch()
    rank = _number(environment, "SLURM_PROCID")
    _check(rank, world, "SLURM_PROCID", tasks)
    nodes = environment.get("SLURM_STEP_NODELIST") or _needed(environment, "SLURM_JOB_NODELIST")
    node = environment.get("MASTER_ADDR") or first_node(nodes)
    step = next((environment[name] for name in STEP[:2] if environment.get(name, "").isdecimal()), "0")
    port = environment.get("MASTER_PORT") or str(20_000 + (_number(environment, "SLURM_JOB_ID") * 37 + int(step)) % 10_000)
    return Launch(rank, world, _number(environment, "SLURM_LOCALID"), f"tcp://{node}:{port}", "Slurm")


def first_node(nodes: str) -> str:
    """First name of a list as Slurm writes it: `gpu[03-05,9],cpu1` begins with `gpu03`."""
    found = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+", nodes.strip())
    if found is None:
        raise LaunchError(f"Slurm's list of nodes {nodes!r} begins with no name; set MASTER_ADDR to the first node's name")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", found[0])


def _needed(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name, "")
    if not value:
        known = ", ".join(key for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SLURM_PROCID", *STEP) if key in environment)
        raise LaunchError(
            f"this process was started as one of several ({known} set), and {name} is missing from the environment; "
            "start it with torchrun or srun, or unset the others to run one process"
        )
    return value


def _number(environment: Mapping[str, str], name: str) -> int:
    value = _needed(environment, name)
    if not value.isdecimal():
        raise LaunchError(f"{name}={value} in the environment is no number; start the processes with torchrun or srun")
    return int(value)


def _check(rank: int, world: int, own: str, every: str) -> None:
    if not rank < world:
        raise LaunchError(f"{own}={rank} and {every}={world} in the environment: a rank lies below the number of processes")
