"""Tasks done by dask workers: processes on this machine, jobs of a Slurm cluster, or a scheduler that was named."""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from time import process_time
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import Field

from mae_core.settings import Settings, default_kind
from pipelines import slurm_jobs
from pipelines.slurm_jobs import SlurmCluster
from pipelines.tiling_plan import PreparationError

Task = TypeVar("Task")
Result = TypeVar("Result")

GDAL_LIMITS = {"GDAL_NUM_THREADS": "1", "GDAL_CACHEMAX": "256"}
"""One thread and 256 MiB of cache per worker: dask does not see the memory that GDAL holds."""

CONNECT_TIMEOUT_S = 30
"""How long a dask scheduler has to answer."""

LOOK_AGAIN_S = 2.0
"""How often workers are counted while no task is finished."""


class LocalCluster(Settings):
    """Worker processes on this machine: `prepare.num_workers` of them."""

    kind: Literal["local"] = "local"


ClusterSettings = Annotated[LocalCluster | SlurmCluster, Field(discriminator="kind"), default_kind("local")]


class WorkerSettings(Protocol):
    """The settings that decide who does the work, as against what is done."""

    @property
    def num_workers(self) -> int:
        """Worker processes on this machine."""
        ...

    @property
    def memory_limit(self) -> str:
        """Memory of a worker on this machine."""
        ...

    @property
    def scheduler(self) -> str | None:
        """Address of a running scheduler, instead of workers of our own."""
        ...

    @property
    def cluster(self) -> LocalCluster | SlurmCluster:
        """Where workers of our own run."""
        ...


@dataclass(frozen=True)
class _Workers:
    """A client of a scheduler and what keeps its workers in number.

    Attributes:
        client: Of dask.
        memory: How much a worker has, and what to do where that is too little.
        restock: Called now and then with the number of tasks that are not done.
    """

    client: Any
    memory: str
    restock: Callable[[int], None]

    def num_threads(self, module: str, known: set[str]) -> int:
        """Tasks that the workers can do at a time, those that are not yet known once they have loaded the module.

        One that cannot would be lost with every task, without a word.

        Raises:
            PreparationError: It cannot.
        """
        threads: Mapping[str, int] = self.client.nthreads()
        new = [address for address in threads if address not in known]
        answers = self.client.run(import_module, module, workers=new, on_error="return") if new else {}
        for address, answer in answers.items():
            if isinstance(answer, Exception) and not isinstance(answer, OSError):
                raise PreparationError(
                    f"the worker at {address} cannot load {module} ({type(answer).__name__}: {answer}); give it the Python environment "
                    "that this runs in, terravox of the same version included"
                )
        known |= {address for address, answer in answers.items() if not isinstance(answer, OSError)}
        return sum(number for address, number in threads.items() if address in known)


def works_here(settings: WorkerSettings, num_tasks: int) -> bool:
    """True where the tasks are done in this process, without dask: one is not worth a worker of this machine."""
    return settings.scheduler is None and isinstance(settings.cluster, LocalCluster) and (settings.num_workers == 0 or num_tasks == 1)


def missing(settings: WorkerSettings) -> list[str]:
    """What stands in the way of these settings on this machine, each with what to do; nothing is started."""
    if not isinstance(settings.cluster, SlurmCluster):
        return []
    if settings.scheduler is not None:
        return ["prepare.scheduler names a running scheduler and prepare.cluster.kind=slurm would start one; give one of the two"]
    return slurm_jobs.missing()


def run_tasks(
    work: Callable[[Task], Result],
    tasks: Sequence[Task],
    settings: WorkerSettings,
    shared: Path,
    describe: Callable[[Task], str] = str,
) -> Generator[Result]:
    """What `work` gives for each task, in the order in which they are finished.

    One task per worker thread is in flight, so that a worker that dies blames no other task; its task is then done again by another.

    Args:
        work: A function of a module, done by the workers; a `PreparationError` that it raises comes out here as it is.
        tasks: Sent to the workers one by one; doing one twice must do no harm.
        settings: Who works.
        shared: A folder that all machines see, for the keys and logs of jobs.
        describe: What a task does, for the error of a worker that dies of it: "the worker that writes …".

    Raises:
        PreparationError: No scheduler answers, it goes away, jobs do not start, or a task killed its worker again and again.
    """
    if problems := missing(settings):
        raise PreparationError("; ".join(problems))
    if not tasks:
        return
    from distributed import CancelledError, KilledWorker

    # Two runs may share a scheduler, and a key that it knows already is not done again.
    run = f"terravox-{uuid.uuid4().hex}"
    with _workers(settings, len(tasks), shared) as workers:
        try:
            yield from _results(workers, work, {f"{run}-{number}": task for number, task in enumerate(tasks)})
        except KilledWorker as error:
            task = tasks[int(str(error.task).rpartition("-")[2])]
            raise PreparationError(
                f"the worker that writes {describe(task)} died again and again, most likely for want of memory {workers.memory}"
            ) from error
        except CancelledError as error:
            where = f" at {settings.scheduler}" if settings.scheduler else ""
            raise PreparationError(f"the dask scheduler{where} went away; what is finished is kept: start it and run this again") from error


def _results(workers: _Workers, work: Callable[[Task], Result], tasks: Mapping[str, Task]) -> Generator[Result]:
    from distributed import wait

    waiting = iter(tasks.items())
    running: set[Any] = set()
    known: set[str] = set()
    num_left = len(tasks)
    while num_left:
        for key, task in islice(waiting, max(0, workers.num_threads(work.__module__, known) - len(running))):
            running.add(workers.client.submit(work, task, key=key, pure=False))
        # What any Python can do: schedulers that look for workers only where there is work then look for one.
        bait = None if running else workers.client.submit(str, pure=False)
        try:
            with workers.client.as_current():
                done = wait([bait] if bait else list(running), timeout=LOOK_AGAIN_S, return_when="FIRST_COMPLETED").done - {bait}
        except TimeoutError:
            done = set()
        running -= done
        num_left -= len(done)
        for future in done:
            yield future.result()
        workers.restock(num_left)


@contextlib.contextmanager
def _workers(settings: WorkerSettings, num_tasks: int, shared: Path) -> Iterator[_Workers]:
    """A scheduler's workers: those of the one that was named, or of one in this process, encrypted and without dashboard."""
    import dask
    from distributed import Client

    with contextlib.ExitStack() as stack:
        if settings.scheduler is not None:
            try:
                client = stack.enter_context(Client(settings.scheduler, timeout=CONNECT_TIMEOUT_S, set_as_default=False))
            except (OSError, TimeoutError) as error:
                raise PreparationError(
                    f"no dask scheduler answers at {settings.scheduler} ({error}); start it or check the address"
                ) from error
            memory = f"(as much as the workers of {settings.scheduler} were given): give them more, or lower prepare.tile"
            yield _Workers(client, memory, _nothing)
            return
        stack.enter_context(dask.config.set({"distributed.scheduler.http.routes": []}))
        if isinstance(settings.cluster, SlurmCluster):
            jobs = stack.enter_context(slurm_jobs.slurm_jobs(settings.cluster, num_tasks, shared, GDAL_LIMITS))
            each = f"({settings.cluster.memory} a job of {settings.cluster.cores} workers)"
            yield _Workers(jobs.client, f"{each}: raise prepare.cluster.memory, or lower prepare.tile", jobs.restock)
            return
        cluster = stack.enter_context(_local(settings, num_tasks))
        memory = f"({settings.memory_limit} each): raise prepare.memory_limit, or lower prepare.num_workers or prepare.tile"
        yield _Workers(stack.enter_context(Client(cluster, set_as_default=False)), memory, _nothing)


@contextlib.contextmanager
def _local(settings: WorkerSettings, num_tasks: int) -> Iterator[Any]:
    from distributed import LocalCluster as Cluster

    with (
        tempfile.TemporaryDirectory(prefix="terravox-") as scratch,
        Cluster(
            n_workers=min(settings.num_workers, num_tasks),
            threads_per_worker=1,
            processes=True,
            memory_limit=settings.memory_limit,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            security=True,
            local_directory=scratch,
            silence_logs=logging.CRITICAL,
            env=GDAL_LIMITS,
        ) as cluster,
    ):
        yield cluster


@dataclass(frozen=True)
class StandingWorkers:
    """Workers that are there before a preparation and after it; `prepare.scheduler` is their address, within the block only."""

    address: str
    client: Any

    def peak_bytes(self) -> list[int]:
        """Largest resident memory that each has had."""
        return sorted(self.client.run(peak_bytes).values())

    def processor_seconds(self) -> float:
        """Time that all together were at work since they were started."""
        return float(sum(self.client.run(process_time).values()))


@contextlib.contextmanager
def standing_workers(settings: WorkerSettings) -> Iterator[StandingWorkers]:
    """Workers of this machine, started and with all imported that a preparation needs."""
    import dask
    from distributed import Client

    with (
        dask.config.set({"distributed.scheduler.http.routes": []}),
        _local(settings, settings.num_workers) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        keys = cluster.security
        known = {"ca-file": keys.tls_ca_file, "client.cert": keys.tls_client_cert, "client.key": keys.tls_client_key}
        with dask.config.set({f"distributed.comm.tls.{name}": key for name, key in known.items()}):
            yield StandingWorkers(cluster.scheduler_address, client)


def peak_bytes() -> int:
    """Largest resident memory that this process has had; what it was forked from does not count."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _nothing(num_tasks: int) -> None:
    """For workers that dask, or somebody else, keeps in number."""
    del num_tasks
