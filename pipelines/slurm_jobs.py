"""Dask workers as jobs of a Slurm cluster: the job script, the keys, and another job for one that is over."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from mae_core.settings import Settings
from pipelines.tiling_plan import PreparationError

QUEUE_S = 30.0
"""How often Slurm is asked which jobs are over."""

FAILED_JOBS = 3
"""Jobs in a row that may end without a worker having come."""

WORKER_MEMORY_FRACTION = 0.9
"""Share of a job's memory that its workers may take; the rest is for the processes that watch them."""

LIFETIME_FRACTION, STAGGER_FRACTION = 0.85, 0.05
"""Workers take leave between 80 and 90 % of the walltime, one after another, so that Slurm need not kill them in the middle of a task."""

PLAIN = r"^[\w./~:@%+,=-]+$"
"""What is written into a job script as it is: nothing that a shell would take for more than a word."""


class SlurmCluster(Settings):
    """Jobs of a Slurm cluster, sent off from here; all machines see the files, the store's folder and this Python environment."""

    kind: Literal["slurm"] = "slurm"
    num_jobs: int = Field(1, ge=1, description="Jobs at a time; one that is over is followed by another while there is work")
    cores: int = Field(1, ge=1, description="Cores of a job; each has a worker process with one thread")
    memory: str = Field("4GiB", description="Memory of a job, shared by its workers; counted as 1024, as Slurm does")
    walltime: str = Field("01:00:00", description="Time limit of a job, [days-]hours:minutes:seconds; many times what a shard takes")
    queue: str | None = Field(None, pattern=PLAIN, description="Partition")
    account: str | None = Field(None, pattern=PLAIN, description="Who is charged")
    interface: str | None = Field(None, pattern=PLAIN, description="Network by which workers reach this machine, such as ib0")
    directives: tuple[str, ...] = Field((), description="More options of sbatch, such as --constraint=ssd")
    python: str | None = Field(None, pattern=PLAIN, description="Python of the workers; empty: the one that runs this")

    @field_validator("directives")
    @classmethod
    def _options(cls, directives: tuple[str, ...]) -> tuple[str, ...]:
        for directive in directives:
            if not re.fullmatch(r"-[^\n\r]*", directive):
                raise ValueError(f"{directive!r} is no option of sbatch; one line each, starting with -")
        return directives

    @field_validator("memory")
    @classmethod
    def _memory(cls, memory: str) -> str:
        if not re.fullmatch(r"\d+ ?[KMGT]i?B?", memory):
            raise ValueError(f"{memory!r} is no amount of memory; say it like 16GiB")
        return memory

    @field_validator("walltime")
    @classmethod
    def _walltime(cls, walltime: str) -> str:
        if not re.fullmatch(r"(\d+-)?\d{1,3}:\d\d:\d\d", walltime) or not _seconds(walltime):
            raise ValueError(f"{walltime!r} is no time limit; say it like 04:00:00 or 1-12:00:00")
        return walltime


def missing() -> list[str]:
    """What stands in the way of Slurm jobs on this machine, each with what to do; nothing is started."""
    problems = []
    try:
        import dask_jobqueue  # noqa: F401
    except ImportError:
        problems.append("prepare.cluster.kind=slurm needs dask-jobqueue; install it: pip install 'terravox[cluster]'")
    absent = [program for program in ("sbatch", "squeue", "scancel") if shutil.which(program) is None]
    if absent:
        problems.append(
            f"prepare.cluster.kind=slurm needs {', '.join(absent)} on PATH; run this on a login node of the cluster (module load slurm), "
            "or use prepare.cluster.kind=local"
        )
    return problems


@contextlib.contextmanager
def slurm_jobs(settings: SlurmCluster, num_tasks: int, shared: Path, environment: Mapping[str, str]) -> Iterator[SlurmJobs]:
    """A scheduler in this process, and the jobs that work for it: each has a worker process per core.

    What goes over the network is encrypted, and only who holds a key is answered; the keys lie in `shared` for the user alone.

    Args:
        settings: What to ask Slurm for.
        num_tasks: No more workers than these.
        shared: Folder that all machines see, for keys and logs.
        environment: Of the workers.

    Raises:
        PreparationError: Slurm refuses a job, or the folder's name cannot stand in a job script.
    """
    from dask_jobqueue import SLURMCluster
    from dask_jobqueue.slurm import SLURMJob
    from distributed import Client
    from distributed.deploy.spec import ProcessInterface

    class Job(SLURMJob):  # type: ignore[misc]
        """dask-jobqueue leaves the state of a closed job as it was, on which closing the cluster fails."""

        async def close(self) -> None:
            await super().close()
            await ProcessInterface.close(self)

    if not re.fullmatch(PLAIN, str(shared)):
        raise PreparationError(f"{shared} cannot stand in a job script: choose another --out, of letters, digits and . _ - / only")
    memory, lifetime = _bytes(settings.memory), _seconds(settings.walltime)
    quiet = {**environment, "DASK_DISTRIBUTED__WORKER__HTTP__ROUTES": "[]"}
    arguments = ["--lifetime", f"{lifetime * LIFETIME_FRACTION:.0f}s", "--lifetime-stagger", f"{lifetime * STAGGER_FRACTION:.0f}s"]
    with (
        tempfile.TemporaryDirectory(prefix="keys-", dir=shared) as keys,
        SLURMCluster(
            job_cls=Job,
            cores=settings.cores,
            processes=settings.cores,
            memory=f"{int(memory * WORKER_MEMORY_FRACTION)}B",
            job_mem=f"{-(-memory // 2**20)}M",
            walltime=settings.walltime,
            queue=settings.queue,
            account=settings.account,
            interface=settings.interface,
            python=settings.python,
            job_name="terravox-prepare",
            job_extra_directives=list(settings.directives),
            job_script_prologue=[f"export {name}='{value}'" for name, value in quiet.items()],
            worker_extra_args=[*arguments, "--no-dashboard"],
            log_directory=str(shared / "logs"),
            security=_security(Path(keys)),
            scheduler_options={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        jobs = SlurmJobs(client, cluster, settings, shared / "logs")
        jobs.send_off((), num_tasks)
        yield jobs


def _security(folder: Path) -> Any:
    """Keys made for this run, in files that the workers read; dask-jobqueue would leave its own for the garbage collector."""
    from distributed.security import Security

    made = Security.temporary()
    files = {}
    for name, content in (("ca_file", made.tls_ca_file), ("cert", made.tls_worker_cert), ("key", made.tls_worker_key)):
        files[name] = folder / f"{name}.pem"
        files[name].touch(mode=0o600)
        files[name].write_text(content)
    roles = {f"tls_{role}_{name}": str(files[name]) for role in ("scheduler", "worker", "client") for name in ("cert", "key")}
    return Security(require_encryption=True, tls_ca_file=str(files["ca_file"]), **roles)


class SlurmJobs:
    """The jobs of a Slurm cluster. dask-jobqueue sends no other for one that has reached its time limit, so this does."""

    def __init__(self, client: Any, cluster: Any, settings: SlurmCluster, logs: Path) -> None:
        self.client = client
        self._cluster = cluster
        self._settings = settings
        self._logs = logs
        self._asked = time.monotonic()
        self._came: set[str] = set()
        self._failed = 0

    def restock(self, num_tasks: int) -> None:
        """Asks Slurm, now and then, which jobs are over, and sends others off for the tasks that are not done.

        Raises:
            PreparationError: Several ended one after another before a worker came.
        """
        if time.monotonic() - self._asked < QUEUE_S:
            return
        self._asked = time.monotonic()
        names = self._cluster.sync(self._names)
        jobs = {name: job.job_id for name, job in self._cluster.workers.items()}
        self._came |= {job for job in jobs if any(name == job or name.startswith(f"{job}-") for name in names)}
        queue = _queue()
        over = [] if queue is None else [name for name, number in jobs.items() if number not in queue]
        for name in over:
            self._failed = 0 if name in self._came else self._failed + 1
        if self._failed >= FAILED_JOBS:
            raise PreparationError(
                f"{self._failed} jobs ended before a worker came: read {self._logs}; that machine needs the same Python environment and "
                "must reach this one (prepare.cluster.interface)"
            )
        if over or len(jobs) < self._num_jobs(num_tasks):
            self.send_off(over, num_tasks)

    def send_off(self, over: Sequence[str], num_tasks: int) -> None:
        """As many jobs as the tasks need, without those that are over.

        Raises:
            PreparationError: Slurm refuses a job.
        """
        wanted = self._num_jobs(num_tasks)

        async def refill() -> None:
            if over:
                await self._cluster.scale_down(over)
            if len(self._cluster.worker_spec) < wanted:
                self._cluster.scale(jobs=wanted)
            await self._cluster

        try:
            self._cluster.sync(refill)
        except RuntimeError as error:
            raise PreparationError(f"Slurm does not take the job; look at prepare.cluster. {error}") from error

    def _num_jobs(self, num_tasks: int) -> int:
        return min(self._settings.num_jobs, -(-num_tasks // self._settings.cores))

    async def _names(self) -> list[str]:
        """Names of the workers that are there: those of a job start with its name."""
        return [str(worker.name) for worker in self._cluster.scheduler.workers.values()]


def _queue() -> set[str] | None:
    """Numbers of our jobs that wait or run; None if Slurm does not answer just now."""
    command = ["squeue", "--noheader", "--format=%A", f"--user={os.getuid()}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the user's own Slurm
    return set(answer.stdout.split()) if answer.returncode == 0 else None


def _bytes(memory: str) -> int:
    number, unit = re.fullmatch(r"(\d+) ?([KMGT])i?B?", memory).groups()  # type: ignore[union-attr]
    return int(number) << 10 * ("KMGT".index(unit) + 1)


def _seconds(walltime: str) -> int:
    days, _, clock = walltime.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
