"""Workers in processes of their own, of a scheduler or of Slurm jobs: whoever dies when, the store is the same to the byte."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import pipelines.preparation_workers
import pipelines.slurm_jobs
from modalities.grid import Window
from pipelines.preparation import PreparationError, PrepareSettings, prepare
from pipelines.preparation_workers import missing
from pipelines.slurm_jobs import SlurmCluster
from tests.synthetic_scenes import Scenes, SyntheticScene, make_scene, tree

HERE = PrepareSettings(tile=(8, 8), tiles_per_shard=2, num_workers=0)
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60
PROGRAMS = {
    "sbatch": """
id=1
until mkdir "$JOBS/$id" 2>/dev/null; do id=$((id + 1)); done
cp "$1" "$JOBS/$id/job.sh"
grep -q "^#SBATCH -p closed$" "$1" && { echo "sbatch: error: invalid partition specified: closed" >&2; touch "$JOBS/$id/over"; exit 1; }
( cd "$JOBS/$id" && exec setsid bash -c 'echo $$ > pid; bash "$PWD/job.sh"; touch over' ) < /dev/null > "$JOBS/$id/log" 2>&1 &
echo "Submitted batch job $id"
""",
    "squeue": 'for job in "$JOBS"/*/; do [ -e "$job/over" ] || basename "$job"; done',
    "scancel": 'touch "$JOBS/$1/over"; kill -TERM -- "-$(cat "$JOBS/$1/pid")" 2>/dev/null || true',
}
"""What a Slurm cluster answers, with every job a process group of this machine."""


def changed(**values: Any) -> PrepareSettings:
    return PrepareSettings(**{**HERE.model_dump(), **values})


@dataclass(frozen=True)
class HeldScene(SyntheticScene):
    """The first that reads it writes its process number down and gets no further; who comes later reads."""

    def read(self, window: Window) -> Any:
        with contextlib.suppress(FileExistsError):
            pid = os.open(self.folder / "holder.tmp", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            os.write(pid, str(os.getpid()).encode())
            os.close(pid)
            os.link(self.folder / "holder.tmp", self.folder / "holder")
            time.sleep(PATIENCE_S)
            raise AssertionError("the holder was to be killed")
        return super().read(window)


def plain_scenes(folder: Path) -> Scenes:
    return Scenes(tuple(make_scene(folder, f"s{n}", (17, 9)) for n in range(3)))


def held_scenes(folder: Path) -> Scenes:
    """The same scenes; whoever gets at the one in the middle is held."""
    first, second, third = plain_scenes(folder).scenes
    return Scenes((first, HeldScene(**vars(second)), third))


@contextlib.contextmanager
def once_held(folder: Path, strike: Callable[[int], None]) -> Iterator[None]:
    """Strikes the process that is held, once there is one; fails if there never was."""
    struck: list[int] = []
    leave = threading.Event()

    def watch() -> None:
        while not (folder / "holder").exists():
            if leave.wait(0.02):
                return
        struck.append(int((folder / "holder").read_text()))
        strike(struck[0])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        leave.set()
        thread.join()
    assert struck, "no process was held, so none was struck in the middle of a task"


@dataclass(frozen=True)
class Outside:
    """A scheduler and its workers, each a process that this test started."""

    folder: Path
    processes: list[subprocess.Popen[bytes]]

    @property
    def address(self) -> str:
        found = re.search(r'"address": "([^"]+)"', (self.folder / "scheduler.json").read_text())
        assert found
        return found[1]

    @property
    def scheduler(self) -> subprocess.Popen[bytes]:
        return self.processes[0]

    @property
    def workers(self) -> list[subprocess.Popen[bytes]]:
        return self.processes[1:]

    def add(self, module: str, *arguments: str, path: Path = ROOT) -> None:
        """Starts a process of dask that finds our packages at `path`."""
        file = ("--scheduler-file", str(self.folder / "scheduler.json"))
        command = [sys.executable, "-m", f"distributed.cli.{module}", *arguments, *file, "--no-dashboard", "--host", "127.0.0.1"]
        environment = {**os.environ, "PYTHONPATH": str(path), "DASK_DISTRIBUTED__SCHEDULER__HTTP__ROUTES": "[]"}
        with (self.folder / f"{module}.log").open("ab") as log:
            self.processes.append(subprocess.Popen(command, env=environment, cwd=self.folder, stdout=log, stderr=log))

    def add_worker(self, path: Path = ROOT) -> None:
        """A worker without a nanny that would start it again."""
        self.add("dask_worker", "--no-nanny", "--nthreads", "1", "--local-directory", str(self.folder / "scratch"), path=path)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    """A scheduler of this machine only; the test adds the workers."""
    made = Outside(tmp_path, [])
    try:
        made.add("dask_scheduler", "--port", "0", "--dashboard-address", "127.0.0.1:0")
        wait_for((tmp_path / "scheduler.json").exists)
        yield made
    finally:
        for process in made.processes:
            process.kill()
            process.wait()


def wait_for(there: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not there():
        assert time.monotonic() < end, f"{there} did not come true"
        time.sleep(0.02)


def test_a_worker_killed_in_the_middle_of_a_task_leaves_no_trace_in_the_store(outside: Outside, tmp_path: Path) -> None:
    """Then the scheduler itself is killed, which is said."""
    outside.add_worker()
    outside.add_worker()
    whole = tree(prepare(plain_scenes(tmp_path), tmp_path / "whole", HERE).path)

    def kill(pid: int) -> None:
        assert pid in {worker.pid for worker in outside.workers}
        os.kill(pid, signal.SIGKILL)

    with once_held(tmp_path, kill):
        prepare(held_scenes(tmp_path), tmp_path / "out", changed(scheduler=outside.address))
    assert sorted(worker.poll() is None for worker in outside.workers) == [False, True]
    assert tree(tmp_path / "out") == whole

    (tmp_path / "holder").unlink()
    (tmp_path / "holder.tmp").unlink()
    with (
        once_held(tmp_path, lambda _: os.kill(outside.scheduler.pid, signal.SIGKILL)),
        pytest.raises(PreparationError, match=r"the dask scheduler at tcp://127.0.0.1:\d+ went away; what is finished is kept"),
    ):
        prepare(held_scenes(tmp_path), tmp_path / "other", changed(scheduler=outside.address))


def test_a_worker_without_the_code_is_said(outside: Outside, tmp_path: Path) -> None:
    """Left alone it would be lost with every task, and the run would wait for ever."""
    other = tmp_path / "other_version" / "pipelines"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    (other / "preparation.py").write_text("raise ImportError('made for another time')")
    outside.add_worker(other.parent)
    with pytest.raises(
        PreparationError, match=r"worker at tcp://127.0.0.1:\d+ cannot load pipelines.preparation \(ImportError: made for another time\)"
    ):
        prepare(plain_scenes(tmp_path), tmp_path / "out", changed(scheduler=outside.address))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the jobs of a cluster that is this machine: `JOB/job.sh`, and `JOB/over` once it is."""
    programs, jobs = tmp_path / "bin", tmp_path / "jobs"
    programs.mkdir()
    jobs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(jobs))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DASK_TEMPORARY_DIRECTORY", str(tmp_path / "scratch"))
    monkeypatch.setattr(pipelines.slurm_jobs, "QUEUE_S", 0.2)
    monkeypatch.setattr(pipelines.preparation_workers, "LOOK_AGAIN_S", 0.2)
    return jobs


def cluster(**values: Any) -> PrepareSettings:
    return changed(cluster={"kind": "slurm", "interface": "lo", "memory": "1GiB", "walltime": "00:20:00", **values})


def test_a_slurm_job_killed_in_the_middle_of_a_task_is_followed_by_another(slurm: Path, tmp_path: Path) -> None:
    """At its time limit Slurm kills a job whole: two workers, one of them at work."""
    whole = tree(prepare(plain_scenes(tmp_path), tmp_path / "whole", HERE).path)
    keys: list[int] = []

    def progress(done: int, total: int) -> None:
        keys.extend(stat.S_IMODE(key.stat().st_mode) for key in (tmp_path / "out" / "progress").rglob("key.pem"))

    def kill(pid: int) -> None:
        os.killpg(os.getpgid(pid), signal.SIGKILL)
        (slurm / "1" / "over").touch()
        (tmp_path / "out" / "pixels" / "c.b092c57e.tmp").touch()  # what it was writing, wherever the kill met it

    with once_held(tmp_path, kill):
        settings = cluster(cores=2, queue="short", account="p1", directives=["--constraint=ssd"])
        prepare(held_scenes(tmp_path), tmp_path / "out", settings, progress=progress)
    assert tree(tmp_path / "out") == whole, "neither keys, logs nor what was half written are left"
    assert {path.name for path in slurm.iterdir()} == {"1", "2"}
    assert all((job / "over").exists() for job in slurm.iterdir()), "no job is left behind"
    assert set(keys) == {0o600}, "the keys were there, for their owner alone"

    script = (slurm / "2" / "job.sh").read_text()
    directives = {"-p short", "-A p1", "--cpus-per-task=2", "--mem=1024M", "-t 00:20:00", "--constraint=ssd"}
    assert directives < {line.removeprefix("#SBATCH ") for line in script.splitlines()}
    assert "export GDAL_NUM_THREADS='1'\nexport GDAL_CACHEMAX='256'\n" in script
    words = script.splitlines()[-1].split()
    given = dict(pairwise(words))
    assert given[sys.executable] == "-m"
    assert given["distributed.cli.dask_worker"].startswith("tls://127.0.0.1:")
    assert (given["--nthreads"], given["--nworkers"], given["--memory-limit"]) == ("1", "2", "460.80MiB")
    assert (given["--lifetime"], given["--lifetime-stagger"]) == ("1020s", "60s")
    assert {"--nanny", "--no-dashboard", "--tls-key", "--tls-cert", "--tls-ca-file"} < set(words)


def test_slurm_jobs_that_end_before_a_worker_comes_are_not_sent_for_ever(slurm: Path, tmp_path: Path) -> None:
    false = shutil.which("false")
    with pytest.raises(PreparationError, match=r"3 jobs ended before a worker came: read .*out/progress/logs; that machine needs"):
        prepare(plain_scenes(tmp_path), tmp_path / "out", cluster(python=false))
    assert {path.name for path in slurm.iterdir()} == {"1", "2", "3"}


def test_a_job_that_slurm_refuses_is_said_in_its_words(slurm: Path, tmp_path: Path) -> None:
    with pytest.raises(PreparationError, match=r"Slurm does not take the job; look at prepare.cluster(?s:.*)specified: closed"):
        prepare(plain_scenes(tmp_path), tmp_path / "out", cluster(queue="closed"))


def test_what_slurm_needs_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    needed, absent = missing(cluster())
    assert needed == "prepare.cluster.kind=slurm needs dask-jobqueue; install it: pip install 'terravox[cluster]'"
    assert absent.startswith("prepare.cluster.kind=slurm needs sbatch, squeue, scancel on PATH; run this on a login node")
    with pytest.raises(PreparationError, match=r"pip install 'terravox\[cluster\]'; .* needs sbatch"):
        prepare(plain_scenes(tmp_path), tmp_path / "out", cluster())
    assert missing(HERE) == []
    both = PrepareSettings(scheduler="tls://10.0.0.1:8786", cluster=SlurmCluster())
    assert missing(both) == [
        "prepare.scheduler names a running scheduler and prepare.cluster.kind=slurm would start one; give one of the two"
    ]


def test_a_folder_that_a_job_script_cannot_name_is_refused(slurm: Path, tmp_path: Path) -> None:
    with pytest.raises(PreparationError, match=r"my store/progress cannot stand in a job script: choose another --out"):
        prepare(plain_scenes(tmp_path), tmp_path / "my store", cluster())
    assert not list(slurm.iterdir())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"walltime": "2h"}, "'2h' is no time limit; say it like 04:00:00 or 1-12:00:00"),
        ({"walltime": "00:00:00"}, "is no time limit"),
        ({"memory": "much"}, "'much' is no amount of memory; say it like 16GiB"),
        ({"directives": ["--x\nrm -r data"]}, "is no option of sbatch; one line each"),
        ({"directives": ["rm"]}, "'rm' is no option of sbatch"),
        ({"queue": "a; rm"}, "String should match pattern"),
        ({"python": "python $(rm)"}, "String should match pattern"),
    ],
)
def test_no_setting_of_slurm_is_more_than_a_word_to_the_shell(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        SlurmCluster(**values)


def test_memory_and_time_are_counted_as_slurm_does() -> None:
    assert [pipelines.slurm_jobs._bytes(text) for text in ("3M", "2GB", "2 GiB", "1TiB")] == [3 << 20, 2 << 30, 2 << 30, 1 << 40]
    assert [pipelines.slurm_jobs._seconds(text) for text in ("00:01:30", "100:00:00", "1-12:00:00")] == [90, 360_000, 129_600]
