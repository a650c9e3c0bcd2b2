"""Tasks done by dask workers: processes on this machine, or a scheduler that was named."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, TypeVar

from pipelines.tiling_plan import PreparationError

Task = TypeVar("Task")
Result = TypeVar("Result")

GDAL_LIMITS = {"GDAL_NUM_THREADS": "1", "GDAL_CACHEMAX": "256"}
"""One thread and 256 MiB of cache per worker: dask does not see the memory that GDAL holds."""

CONNECT_TIMEOUT_S = 30
"""How long a dask scheduler has to answer."""


class WorkerSettings(Protocol):
    """The settings that decide who does the work, as against what is done."""

    @property
    def num_workers(self) -> int:
        """Worker processes on this machine."""
        ...

    @property
    def memory_limit(self) -> str:
        """Memory of a worker."""
        ...

    @property
    def scheduler(self) -> str | None:
        """Address of a running scheduler, instead of workers of our own."""
        ...


def run_tasks(
    work: Callable[[Task], Result], tasks: Sequence[Task], settings: WorkerSettings, describe: Callable[[Task], str] = str
) -> Generator[Result]:
    """What `work` gives for each task, in the order in which they are finished.

    One task per worker thread is in flight, so that a worker that dies blames no other task; its task is then done again by another.

    Args:
        work: A function of a module, done by the workers; a `PreparationError` that it raises comes out here as it is.
        tasks: Sent to the workers one by one; doing one twice must do no harm.
        settings: Who works.
        describe: What a task does, for the error of a worker that dies of it: "the worker that writes …".

    Raises:
        PreparationError: No scheduler answers, or a task killed its worker again and again.
    """
    if not tasks:
        return
    from distributed import KilledWorker, as_completed

    # Two runs may share a scheduler, and a key that it knows already is not done again.
    run = f"terravox-{uuid.uuid4().hex}"
    with _client(settings, len(tasks)) as client:
        waiting = iter(enumerate(tasks))
        running: dict[str, Task] = {}

        def submit(in_flight: int) -> list[Any]:
            started = []
            for number, task in islice(waiting, max(1, sum(client.nthreads().values())) - in_flight):
                started.append(client.submit(work, task, key=f"{run}-{number}", pure=False))
                running[started[-1].key] = task
            return started

        futures = as_completed(submit(0), loop=client.loop)
        for future in futures:
            task = running.pop(future.key)
            try:
                yield future.result()
            except KilledWorker as error:
                raise PreparationError(
                    f"the worker that writes {describe(task)} died again and again, most likely for want of memory "
                    f"({settings.memory_limit} each): raise prepare.memory_limit, or lower prepare.num_workers or prepare.tile"
                ) from error
            futures.update(submit(futures.count()))


@contextlib.contextmanager
def _client(settings: WorkerSettings, num_tasks: int) -> Iterator[Any]:
    """A dask client of the scheduler that was named, or of a cluster of our own: on this machine only, encrypted, without dashboard."""
    import dask
    from distributed import Client, LocalCluster

    with contextlib.ExitStack() as stack:
        if settings.scheduler is not None:
            try:
                yield stack.enter_context(Client(settings.scheduler, timeout=CONNECT_TIMEOUT_S, set_as_default=False))
            except (OSError, TimeoutError) as error:
                raise PreparationError(
                    f"no dask scheduler answers at {settings.scheduler} ({error}); start it or check the address"
                ) from error
            return
        stack.enter_context(dask.config.set({"distributed.scheduler.http.routes": []}))
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="terravox-"))
        cluster = stack.enter_context(
            LocalCluster(
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
            )
        )
        yield stack.enter_context(Client(cluster, set_as_default=False))
