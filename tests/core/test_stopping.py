"""A signal in any part of a step ends in one whole checkpoint at the next boundary, from which the run goes on in the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mae_core.checkpoint import peek, restore
from mae_core.stopping import SIGNALS, Stopped, StopRequest, stop_requests
from mae_core.store import TileStore
from mae_core.train import Report
from tests.tiny_runs import TinyRun, curve, one_thread, quick, shared_store, tiny_recipe, tiny_run

__all__ = ["quick"]

RECIPE = tiny_recipe(train__log_steps=2)


def strike(number: int, times: int = 1) -> None:
    """Sends a signal to this process, whose handler runs before the next line does."""
    for _ in range(times):
        os.kill(os.getpid(), number)


@dataclass(frozen=True)
class Struck:
    """The task with something that happens in the middle of a part of it."""

    inner: Any
    place: str
    step: int
    happens: Callable[[], None]

    def loss(self, model: Any, raw: Any, progress: float) -> Any:
        loss = self.inner.loss(model, raw, progress)
        if round(progress * 8) == self.step:
            if self.place == "forward":
                self.happens()
            if self.place == "backward":
                loss.total.register_hook(lambda gradient: self.happens())
        return loss

    def evaluate(self, model: Any, step: int) -> Iterator[tuple[str, float]]:
        for number, found in enumerate(self.inner.evaluate(model, step)):
            if (self.place, step, number) == ("evaluation", self.step, 1):
                self.happens()
            yield found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return shared_store(tmp_path_factory)


@dataclass(frozen=True)
class Quiet:
    """What a run that nobody disturbs gives."""

    weights: dict[str, Tensor]
    moments: list[Tensor]
    reports: list[Report]


@pytest.fixture(scope="module")
def undisturbed(store: TileStore) -> Quiet:
    with one_thread():
        run = tiny_run(store, RECIPE)
        reports = run.train()
    return Quiet(run.state.model.state_dict(), moments(run), reports)


def moments(run: TinyRun) -> list[Tensor]:
    return [state[name] for _, state in sorted(run.state.optimiser.state_dict()["state"].items()) for name in sorted(state)]


def go_on(store: TileStore, folder: Path) -> tuple[TinyRun, list[Report]]:
    """The run as a new process takes it up and ends it."""
    run = tiny_run(store, RECIPE)
    damaged: list[str] = []
    restore(run.state, folder, damaged.append)
    assert not damaged
    return run, run.train(checkpoints=folder)


@pytest.mark.parametrize(
    ("where", "number", "saved"),
    [
        (("forward", 4), signal.SIGTERM, 5),
        (("backward", 1), signal.SIGUSR1, 2),
        (("evaluation", 4), signal.SIGUSR2, 5),
        (("save", 3), signal.SIGTERM, 5),
    ],
)
def test_a_signal_anywhere_in_a_step_stops_at_its_end_and_nothing_is_lost(
    store: TileStore, undisturbed: Quiet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[str, int], number: int, saved: int
) -> None:
    """Each is sent three times, since launchers repeat themselves; in an evaluation it is the step after it that is saved last."""
    (place, step), struck, flush = where, list[int](), os.fsync
    run = tiny_run(store, RECIPE)

    def happens() -> None:
        struck.append(run.state.step)
        strike(number, 3)

    def flushed(handle: int) -> None:
        if run.state.step >= step and not struck:
            happens()
        flush(handle)

    if place == "save":
        monkeypatch.setattr(os, "fsync", flushed)
    task = Struck(run.task, place, step, happens)
    reports: list[Report] = []
    with pytest.raises(Stopped) as stopped, stop_requests() as stop, stop.held():
        replace(run, task=task).train(checkpoints=tmp_path, stop=stop, told=reports)
    assert stopped.value.together
    assert len(struck) == 1
    own = saved if place != "save" else peek(tmp_path)["step"]  # which is written beside the next steps
    assert struck[0] < own <= max(saved, struck[0] + 2)
    assert peek(tmp_path)["step"] == own
    assert str(stopped.value) == f"asked to stop ({signal.Signals(number).name}); step {own} of 8 is saved"
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")]

    gone_on, later = go_on(store, tmp_path)
    for name, value in gone_on.state.model.state_dict().items():
        assert torch.equal(value, undisturbed.weights[name]), name
    assert all(torch.equal(*pair) for pair in zip(moments(gone_on), undisturbed.moments, strict=True))
    for key in ("train/loss", "val/skill"):
        assert curve(reports + later, key) == curve(undisturbed.reports, key)


def test_in_the_last_step_there_is_nothing_more_to_train_but_what_follows_is_not_begun(store: TileStore, tmp_path: Path) -> None:
    run = tiny_run(store, RECIPE)
    task = Struck(run.task, "forward", 7, lambda: strike(signal.SIGTERM))
    with pytest.raises(Stopped, match=r"asked to stop \(SIGTERM\); what is finished is kept"), stop_requests() as stop, stop.held():
        replace(run, task=task).train(checkpoints=tmp_path, stop=stop)
    assert peek(tmp_path)["step"] == 8
    assert go_on(store, tmp_path)[1] == []


def test_outside_of_the_loop_the_first_signal_ends_the_work_and_the_next_change_nothing() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    done: list[str] = []

    def work() -> None:
        try:
            strike(signal.SIGUSR1)
            done.append("went on")
        except Exception:
            done.append("taken for an error")
        finally:
            strike(signal.SIGTERM, 2)
            done.append("cleared up")

    with pytest.raises(Stopped, match=r"asked to stop \(SIGUSR1\); what is finished is kept") as stopped, stop_requests():
        work()
    assert done == ["cleared up"]
    assert not stopped.value.together
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_inside_another_context_it_is_the_same_request_and_it_is_held_only_while_the_loop_lasts() -> None:
    with stop_requests() as outer:
        with stop_requests() as inner:
            assert inner is outer
        with inner.held():
            pass
        with pytest.raises(Stopped), inner.held(), inner.held():
            strike(signal.SIGTERM)
        strike(signal.SIGUSR1)
        assert inner.signal == "SIGTERM"


def test_another_thread_neither_sets_handlers_nor_fails() -> None:
    found: list[StopRequest] = []

    def work() -> None:
        with stop_requests() as stop:
            found.append(stop)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert not found[0]


FORKS = """
import os, signal, sys, time
from mae_core.stopping import Stopped, stop_requests

def child(number):
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(tell, b".")
        time.sleep(0.2)
        os.kill(os.getpid(), number)
        os._exit(7)
    os.read(ready, 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

try:
    with stop_requests(ends_process=True):
        print(child(signal.SIGUSR1), child(signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)
except Stopped:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(os.getpid(), number)
    sys.exit(75)
"""


def test_forked_children_are_not_disturbed_and_the_exit_code_is_not_changed_by_later_signals() -> None:
    """A child ends on SIGTERM, by which its parent would end it, and is left alone by what a scheduler sends to a whole group."""
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("7 -15\n", "", 75)
