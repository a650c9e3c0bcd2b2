"""What hangs is ended with its stacks told, by its own clock and in its own process; two processes stop as one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import pytest

import mae_core.watchdog
from mae_core.pulse import Moment, Phase, Pulse
from mae_core.store import TileStore
from mae_core.watchdog import ENOUGH, HUNG, WatchdogSettings, budget_s, watchdog
from tests.tiny_runs import shared_store, two_processes

SETTINGS = WatchdogSettings(start_s=50, step_s=7, evaluation_s=30, save_s=20, factor=10)
PATIENCE_S = 20


def pulse_of(phase: Phase, *durations: float, lasted: float = 0.0) -> Pulse:
    made = Pulse()
    made.now = Moment(4, phase, monotonic() - lasted)
    made.durations = {phase: deque(durations)}
    return made


@pytest.mark.parametrize(
    ("phase", "durations", "budget"),
    [
        ("start", (), 50),
        ("step", (), 50),
        ("step", (40.0, 0.1), 50),
        ("step", (40.0, 0.1, 0.1), 7),
        ("step", (1.0, 2.0, 900.0), 20),
        ("evaluation", (), 30),
        ("evaluation", (6.0,) * ENOUGH, 60),
        ("save", (0.5,) * ENOUGH, 20),
        ("end", (), None),
    ],
)
def test_a_budget_is_what_is_set_or_a_multiple_of_what_is_usual(phase: Phase, durations: tuple[float, ...], budget: float | None) -> None:
    assert budget_s(SETTINGS, pulse_of(phase, *durations)) == budget


def watched(pulse: Pulse, folder: Path, monkeypatch: pytest.MonkeyPatch, patience_s: float, **changes: object) -> list[int]:
    """Codes by which the watchdog ends a process in which nothing happens, looked at up to so long, every hundredth of a second."""
    monkeypatch.setattr(mae_core.watchdog, "LOOK_S", 0.01)
    codes, over = list[int](), threading.Event()
    (folder / "ranks").mkdir()

    def end(code: int) -> None:
        codes.append(code)
        over.set()

    with watchdog(pulse, SETTINGS.model_copy(update=changes), folder, 3, end=end):
        over.wait(patience_s)
    return codes


def test_stacks_of_all_threads_and_a_name_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert watched(pulse_of("step", 0.1, 0.1, 0.1, lasted=1000), tmp_path, monkeypatch, PATIENCE_S) == [HUNG]
    for told in (capfd.readouterr().err, (tmp_path / "ranks" / "rank-00003.stacks.txt").read_text()):
        assert "rank 3 hangs: step after 4 updates has lasted 1000 s, its budget is 7 s (train.watchdog)" in told
        assert f"ended with exit code {HUNG}" in told
        assert "test_watchdog.py" in told
        assert "in watched" in told
        assert "in watch\n" in told


@pytest.mark.parametrize(
    ("phase", "lasted", "changes"), [("step", 5, {}), ("end", 10**6, {"step_s": 1}), ("step", 10**6, {"enabled": False})]
)
def test_what_is_within_its_budget_over_or_not_watched_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: Phase, lasted: float, changes: dict[str, object]
) -> None:
    """The wall clock is not looked at, so nothing happens either when it jumps."""
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert watched(pulse_of(phase, 0.1, 0.1, 0.1, lasted=lasted), tmp_path, monkeypatch, 0.2, **changes) == []
    assert not list((tmp_path / "ranks").iterdir())


SUSPENDED = """
import os, signal, sys, time
from pathlib import Path
import mae_core.watchdog
from mae_core.pulse import Pulse
from mae_core.watchdog import WatchdogSettings, watchdog

mae_core.watchdog.LOOK_S, mae_core.watchdog.SUSPENDED_S = 0.05, 0.3
with watchdog(Pulse(), WatchdogSettings(start_s=1.5), Path(sys.argv[1]), 0):
    time.sleep(0.3)
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.3)
    print("went on", flush=True)
    time.sleep(60)
"""


def test_time_in_which_the_process_was_suspended_does_not_count(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SUSPENDED, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        time.sleep(2)
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdout.readline() == b"went on\n"
        assert process.wait(PATIENCE_S) == HUNG, "what hangs later is seen all the same"


def test_the_place_is_the_innermost_of_ours() -> None:
    def below() -> str:
        return mae_core.watchdog._place(sys._getframe())

    assert below() == "a place outside of this package"


LOCKED = """
import ctypes, sys
from pathlib import Path
import mae_core.watchdog
from mae_core.pulse import Pulse
from mae_core.watchdog import WatchdogSettings, watchdog

mae_core.watchdog.LOOK_S, mae_core.watchdog.PATIENCE_S = 0.05, 0.1
with watchdog(Pulse(), WatchdogSettings(start_s=0.5), Path(sys.argv[1]), 0, timer=True):
    __import__("time").sleep(0.3)
    ctypes.PyDLL(None).sleep(60)
"""


def test_where_a_library_holds_the_lock_of_the_interpreter_a_timer_ends_the_process(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOCKED, str(tmp_path)], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert '<string>", line 11 in <module>' in done.stderr


TWO = """
import os, signal, sys, time
from pathlib import Path

sys.path.insert(0, os.getcwd())
from mae_core.checkpoint import peek, restore
from mae_core.parallel import processes
from mae_core.pulse import pulse, signs
from mae_core.stopping import Stopped, stop_requests
from mae_core.store import TileStore
from mae_core.watchdog import WatchdogSettings, watchdog
from tests.tiny_runs import one_thread, tiny_recipe, tiny_run

store, folder = TileStore.open(sys.argv[1]), Path(sys.argv[2])
recipe = tiny_recipe(loader__micro_batch_size=1)
with one_thread(), processes("cpu") as parallel:

    def interrupted(step, by):
        run = tiny_run(store, recipe, parallel)
        forward = run.task.loss

        def loss(*given):
            if parallel.rank == 1 and run.state.step == step:
                by()
            return forward(*given)

        object.__setattr__(run.task, "loss", loss)
        return run

    try:
        with stop_requests() as stop, stop.held():
            interrupted(2, lambda: os.kill(os.getpid(), signal.SIGTERM)).train(checkpoints=folder, stop=stop)
    except Stopped as stopped:
        parallel.barrier()
        print(f"rank {parallel.rank}: {stopped}; {peek(folder)['step']} on disk\\n", end="", flush=True)

    run = interrupted(7, lambda: time.sleep(600))
    restore(run.state, folder, print)
    settings = WatchdogSettings(start_s=60, step_s=4, factor=2)
    with pulse(folder, parallel.rank, 2, 0.1) as beats, watchdog(beats, settings, folder, parallel.rank):
        run.train(checkpoints=folder, pulse=beats)
"""


@dataclass(frozen=True)
class Two:
    """What two processes left, of which the second is asked to stop in step 3, and then hangs in step 8."""

    code: int
    out: str
    errors: str
    folder: Path


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    store: TileStore = shared_store(tmp_path_factory)
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(TWO)
    done = two_processes(folder / "script.py", str(store.path), str(folder / "run"))
    return Two(done.returncode, done.stdout, done.stderr, folder / "run")


def test_where_one_of_two_processes_is_asked_both_stop_at_the_same_step(two: Two) -> None:
    assert sorted(line for line in two.out.splitlines() if line) == [
        "rank 0: asked to stop (by another process); step 3 of 8 is saved; 3 on disk",
        "rank 1: asked to stop (SIGTERM); step 3 of 8 is saved; 3 on disk",
    ]


def test_a_hung_process_is_named_with_its_place_and_ends_the_job(two: Two) -> None:
    assert two.code != 0
    words = "rank 1 hangs: step after 7 updates has lasted"
    stacks = (two.folder / "ranks" / "rank-00001.stacks.txt").read_text()
    for told in (stacks, two.errors):
        assert words in told
        assert "the process is at mae_core/train.py" in told
        assert "train, in <lambda> and is ended with exit code 70" in told
    assert f"exitcode  : {HUNG}" in two.errors
    assert '"step": 7, "phase": "step"' in (two.folder / "ranks" / "rank-00001.json").read_text()
