"""One job at a time writes to a run folder: a living one is never pushed aside unasked, a dead one is in nobody's way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from time import sleep

import pytest

from mae_core.flops import Work
from mae_core.stopping import TakenOverError
from pipelines import lease as lease_file
from pipelines.attempt import attempt
from pipelines.lease import LOCK, RECORD, Lease, LeaseError, confirm, hold, read
from pipelines.pretrain import main as pretrain
from pipelines.run_folder import Claim, claimed, finish
from tests.tiny_runs import ALONE, ROOT, arguments, environment, shared_store, tiny_recipe, tiny_run

BEAT_S, STALE_S = 0.05, 0.6
HOLDER = """
import sys, time
from pathlib import Path
from pipelines.lease import hold
with hold(Path(sys.argv[1]), print, beat_s=0.05) as lease:
    print("held", flush=True)
    while sys.stdin.readline():
        try:
            lease.confirm()
            print("mine", flush=True)
        except Exception as error:
            print(type(error).__name__, flush=True)
"""


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_file, "SETTLE_S", 0.1)


@contextmanager
def other_job(folder: Path, **more: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment() | more, stdin=pipe, stdout=pipe, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "held\n"
        try:
            yield job
        finally:
            job.kill()


def answer(job: subprocess.Popen[str]) -> str:
    assert job.stdin is not None
    assert job.stdout is not None
    job.stdin.write("?\n")
    job.stdin.flush()
    return job.stdout.readline().strip()


def take(folder: Path, *, take_over: bool = False, say: list[str] | None = None) -> int:
    """Number of the attempt that gets the folder."""
    with hold(folder, ([] if say is None else say).append, take_over=take_over, beat_s=BEAT_S, stale_s=STALE_S) as own:
        return own.attempt


def elsewhere(folder: Path, **changes: object) -> None:
    """Make the record one of another machine."""
    found = read(folder)
    assert found is not None
    aside = folder / "aside"
    aside.write_text(json.dumps({**vars(found), "kernel": "another", "ended": False, **changes}))
    aside.replace(folder / RECORD)


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_the_second_of_two_jobs_is_told_who_has_the_run_and_a_killed_one_blocks_nobody(tmp_path: Path) -> None:
    with other_job(tmp_path, SLURM_JOB_ID="77") as job:
        words = (
            rf"{tmp_path} is being written to by process {job.pid} on \S+, job 77 of the scheduler, attempt 1, since 20\S+, "
            r"last sign of life 0 s"
        )
        with pytest.raises(LeaseError, match=words + r" ago\..*take_over=true"):
            take(tmp_path)
        assert answer(job) == "mine"
        job.send_signal(signal.SIGKILL)
        job.wait()
        said: list[str] = []
        assert take(tmp_path, say=said) == 2
        assert said == [], "it had not to wait"
    assert take(tmp_path) == 3


def test_a_job_whose_run_is_taken_over_notices_and_the_heir_keeps_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    with other_job(tmp_path) as job, hold(tmp_path, said.append, take_over=True, beat_s=BEAT_S, stale_s=STALE_S) as own:
        assert len(said) == 1
        assert said[0].startswith(f"taking {tmp_path} over from process {job.pid} on ")
        assert answer(job) == "TakenOverError"
        own.confirm()
        job.kill()
        job.wait()
        while not own.beat() or not own.record.locked:
            sleep(BEAT_S)
        with pytest.raises(LeaseError, match=rf"process {os.getpid()} on .*, attempt 2,"):
            take_in_another_process(tmp_path)
        assert read(tmp_path) == own.record


def take_in_another_process(folder: Path) -> None:
    """Raises what another process is told."""
    code = HOLDER.replace("import sys, time", "import sys, pipelines.lease; pipelines.lease.SETTLE_S = 0")
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LeaseError(done.stderr.splitlines()[-1])


def test_an_heir_that_has_no_lock_yet_is_not_taken_for_dead(tmp_path: Path) -> None:
    take(tmp_path)
    elsewhere(tmp_path, kernel=lease_file._kernel(), locked=False, pid=os.getppid())
    with pytest.raises(LeaseError, match="which lives"):
        with_signs_of_life(tmp_path)
    elsewhere(tmp_path, kernel=lease_file._kernel(), locked=False, pid=ended_process())
    assert take(tmp_path) == 2


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as job:
        job.wait()
    return job.pid


def with_signs_of_life(folder: Path) -> int:
    """As `take`, while a job elsewhere renews the record's time stamp."""
    going = True

    def beat() -> None:
        while going:
            os.utime(folder / RECORD)
            sleep(BEAT_S)

    thread = Thread(target=beat)
    thread.start()
    try:
        return take(folder)
    finally:
        going = False
        thread.join()


@pytest.mark.parametrize("locks", [True, False])
def test_a_job_on_another_machine_is_judged_by_its_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool) -> None:
    if not locks:
        without_locks(monkeypatch)
    take(tmp_path)
    elsewhere(tmp_path, host="node7")
    with pytest.raises(LeaseError, match=r"on node7,.*, which lives"):
        with_signs_of_life(tmp_path)
    said: list[str] = []
    assert take(tmp_path, say=said) == 2, "no sign of life came"
    assert len(said) == 1
    assert "waiting up to" in said[0]
    elsewhere(tmp_path)
    os.utime(tmp_path / RECORD, (1, 1))
    said.clear()
    assert take(tmp_path, say=said) == 3, "the last sign of life is long ago"
    assert said == []


def test_machines_clocks_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take(tmp_path)
    monkeypatch.setattr("time.time", lambda: 0.0)
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    elsewhere(tmp_path)
    os.utime(tmp_path / RECORD, (2**33, 2**33))  # the file system's clock jumped back: as if just written
    with pytest.raises(LeaseError, match="which lives"):
        with_signs_of_life(tmp_path)
    os.utime(tmp_path / RECORD, (2**33, 2**33))
    assert take(tmp_path) == 2, "it waited without end"


def test_of_two_jobs_that_come_in_the_same_moment_without_locks_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch)
    other = replace(lease_file._own_record(None), token="of another")
    monkeypatch.setattr(lease_file, "sleep", lambda _: Lease(tmp_path, other, os.open(tmp_path / "x", os.O_CREAT), locked=False))
    with pytest.raises(TakenOverError, match="was taken over by process"):
        take(tmp_path)
    found = read(tmp_path)
    assert found is not None
    assert found.token == "of another"
    assert not found.ended


def test_who_leaves_says_so_and_who_was_taken_over_says_nothing(tmp_path: Path) -> None:
    with hold(tmp_path, print, beat_s=BEAT_S) as first:
        confirm(tmp_path / "pretrained-seed0")
        confirm(tmp_path.parent)
        elsewhere(tmp_path, token="of another")
        stamp = (tmp_path / RECORD).stat().st_mtime_ns
        with pytest.raises(TakenOverError, match="this job writes nothing more to it"):
            confirm(tmp_path / "pretrained-seed0")
        confirm(tmp_path.parent)
        assert not first.beat()
    found = read(tmp_path)
    assert found is not None
    assert not found.ended, "the heir has not ended"
    assert (tmp_path / RECORD).stat().st_mtime_ns == stamp, "a sign of life for another"
    confirm(tmp_path / "pretrained-seed0")


def test_a_sign_of_life_goes_to_the_own_record_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hold(tmp_path, print, beat_s=60) as own:
        os.utime(tmp_path / RECORD, (1, 1))
        assert own.beat()
        assert (tmp_path / RECORD).stat().st_mtime > 1
        elsewhere(tmp_path, token="of another")
        os.utime(tmp_path / RECORD, (1, 1))
        monkeypatch.setattr(lease_file, "read", lambda _: own.record)  # the other one came right behind the look
        own.beat()
        assert (tmp_path / RECORD).stat().st_mtime == 1
        monkeypatch.undo()


def test_a_child_that_outlives_the_job_does_not_keep_the_lock(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with hold(tmp_path, print, beat_s=60):
        with pytest.warns(DeprecationWarning, match="fork") if sys.version_info >= (3, 12) else nothing():
            child = os.fork()
        if not child:
            os.close(writer)
            os.read(reader, 1)  # lives on until the test is over
            os._exit(0)
    try:
        assert take(tmp_path) == 2
    finally:
        os.close(writer)
        os.waitpid(child, 0)
        os.close(reader)


@contextmanager
def nothing() -> Iterator[None]:
    yield


def test_a_record_that_somebody_removed_or_spoiled_is_written_anew(tmp_path: Path) -> None:
    with hold(tmp_path, print, beat_s=60) as own:
        (tmp_path / RECORD).unlink()
        own.confirm()
        assert own.beat()
        assert read(tmp_path) == own.record
    (tmp_path / RECORD).write_bytes(b'{"token": ')
    assert take(tmp_path) == 1


def test_the_record_names_no_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "jane.doe")
    monkeypatch.setenv("LOGNAME", "jane.doe")
    with hold(tmp_path, print, beat_s=60):
        text = (tmp_path / RECORD).read_text() + (tmp_path / LOCK).read_text()
        assert "jane" not in text
        assert json.loads((tmp_path / RECORD).read_text()).keys() == vars(lease_file._own_record(None)).keys()


def test_a_verb_leaves_a_run_alone_that_another_job_has(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[Path] = []
    monkeypatch.setattr("pipelines.pretrain._pretrain", lambda stream, out, *_: trained.append(out) or {})
    words = arguments(shared_store(tmp_path_factory), tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert pretrain(words) == 0
    with other_job(tmp_path) as job:
        before = sorted(tmp_path.iterdir())
        assert pretrain(words) == 1
        assert f"{tmp_path} is being written to by process {job.pid} on " in capsys.readouterr().err
        assert trained == [tmp_path]
        assert sorted(tmp_path.iterdir()) == before
        assert pretrain([*words, "take_over=true"]) == 0
        assert trained == [tmp_path] * 2
        assert answer(job) == "TakenOverError"


def test_a_run_that_was_finished_while_the_folder_was_another_jobs_is_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = Claim("pretrain", {"a": 1}, ())
    with claimed(tmp_path, claim, ALONE) as done:
        assert done is None

    @contextmanager
    def held_by_another_until_its_end(folder: Path, *_: object, **__: object) -> Iterator[Lease]:
        finish(folder, "pretrain", {"a": 1}, {"figures": {}})
        with hold(folder, print) as own:
            yield own

    monkeypatch.setattr("pipelines.run_folder.hold", held_by_another_until_its_end)
    with claimed(tmp_path, claim, ALONE) as done:
        assert done is not None
        assert done["figures"] == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "result.json"], "a finished run needs no lease"


def test_no_checkpoint_is_written_after_a_takeover(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tiny_run(shared_store(tmp_path_factory), tiny_recipe())
    folder = tmp_path / "scratch-seed0"
    with (
        hold(tmp_path, print, beat_s=60),
        attempt(Work("a run", 1, None), folder, run.state, run.stream, run.recipe.train, {}, None) as going,
    ):
        assert going.surroundings.checkpoints is not None
        run.state.step = 1
        going.surroundings.checkpoints.save(run.state)
        going.surroundings.checkpoints.wait()
        elsewhere(tmp_path, token="of another")
        run.state.step = 2
        with pytest.raises(TakenOverError):
            going.surroundings.checkpoints.save(run.state)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest", "step-00000001"]
