"""Several processes that work together in a test, forked from one that has torch already: starting it anew costs each of them seconds."""

from __future__ import annotations

import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.tiny_runs import environment

PRELOADED = ("torch", "torch.distributed.fsdp", "torch.distributed.tensor", "tests.tiny_runs", "pipelines.pretrain", "mae_core.sharding")


def together(world: int, work: Callable[..., Any], *words: Any, timeout_s: float = 120) -> list[Any]:
    """What `work(*words)` gives in each of `world` gloo processes, which find each other as under `srun`; by rank.

    Raises:
        AssertionError: One of them failed; the message holds its traceback.
    """
    forks = get_context("forkserver")
    forks.set_forkserver_preload(list(PRELOADED))
    port = free_port()
    pipes, children = [], []
    for rank in range(world):
        here, there = forks.Pipe(duplex=False)
        child = forks.Process(target=_child, args=(slurm(rank, world, port), there, work, words), daemon=True)
        child.start()
        there.close()
        pipes.append(here)
        children.append(child)
    found: dict[int, Any] = {}
    failed = ""
    while len(found) < world and not failed:
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in found], timeout_s)
        failed = "" if ready else f"nothing came within {timeout_s} s from ranks {sorted(set(range(world)) - found.keys())}"
        for rank in (rank for rank, pipe in enumerate(pipes) if pipe in ready and rank not in found):
            try:
                found[rank], told = pipes[rank].recv()
            except EOFError:
                told = "it ended without a word"
            failed += f"rank {rank}: {told}" if told else ""
    for child in children:
        if failed:
            child.kill()
        child.join()
    assert not failed, failed
    return [found[rank] for rank in range(world)]


def started(world: int, folder: Path, work: Callable[..., int], *words: Any) -> list[ForkServerProcess]:
    """Running processes that end with the exit code `work(*words)`; what each prints goes to `folder/rank-N.txt`."""
    forks = get_context("forkserver")
    forks.set_forkserver_preload(list(PRELOADED))
    port = free_port()
    jobs = [
        forks.Process(target=_job, args=(slurm(rank, world, port), folder / f"rank-{rank}.txt", work, words), daemon=True)
        for rank in range(world)
    ]
    for job in jobs:
        job.start()
    return jobs


def slurm(rank: int, world: int, port: int) -> dict[str, str]:
    """What `srun` tells a process, all on this machine."""
    return {
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NUM_TASKS": str(world),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_JOB_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _job(launch: dict[str, str], log: Path, work: Callable[..., int], words: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment() | launch)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(work(*words))


def _child(launch: dict[str, str], pipe: Connection, work: Callable[..., Any], words: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment() | launch)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)  # told by DDP of a class token
    try:
        pipe.send((work(*words), ""))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
        raise
