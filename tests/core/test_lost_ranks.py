"""A process that is gone is named to those that wait for it, whether it was killed, failed or lives on another machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from time import sleep

import pytest
import torch

from mae_core.lost_ranks import SILENT_S, gone, lost_ranks_named
from mae_core.parallel import Parallel, RankError, failed_together
from mae_core.pulse import Pulse, Sign, sign_path

CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"
TWO = Parallel(0, 2, torch.device("cpu"), timeout_s=5)


@pytest.fixture(scope="module")
def ended() -> int:
    """Number of a process that is no more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        pass
    return child.pid


def sign(rank: int, pid: int, host: str = "", left: str = "", age_s: float = 0.0) -> Sign:
    return Sign(rank, 4, pid, host or socket.gethostname(), 7, "step", 3.0, 0.0, left, age_s)


def test_the_dead_the_failed_and_the_silent_are_gone_and_no_one_else(ended: int) -> None:
    said = {
        0: sign(0, ended),
        1: sign(1, ended),
        2: sign(2, os.getpid()),
        3: sign(3, os.getpid(), left="StoreError"),
        4: sign(4, ended, left="RankError"),
        5: sign(5, ended, host="far", age_s=SILENT_S - 1),
        6: sign(6, os.getpid(), host="far", age_s=SILENT_S + 1),
    }
    assert [each.rank for each in gone(said, own=0)] == [1, 3, 6]


def test_a_process_that_ended_and_is_not_yet_waited_for_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert gone({1: sign(1, child.pid)}, own=0)


def put(folder: Path, said: Sign) -> None:
    path = sign_path(folder, said.rank)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(vars(said)))


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (
            "",
            r"rank 0 of 2 lost rank 1 \(process \d+ on this machine, gone; last seen in step after 7 updates\) in evaluation after 9 ",
        ),
        ("StoreError", r"lost rank 1 \(process \d+ on this machine, ended with StoreError; last seen"),
    ],
)
def test_the_lost_one_is_named_with_its_step_and_ours(tmp_path: Path, ended: int, left: str, words: str) -> None:
    put(tmp_path, sign(1, ended, left=left))
    pulse = Pulse()
    pulse.beat(9, "evaluation")
    with pytest.raises(RankError, match=words) as caught, lost_ranks_named(TWO, pulse, tmp_path):
        raise RuntimeError(CLOSED)
    assert "Connection closed by peer" in str(caught.value)
    assert "Run the same command again to go on" in str(caught.value)
    assert not failed_together(caught.value), "it is told once"


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (False, r"lost rank 1 in start after 0 updates .* left no sign of life"),
        (True, r"all are there: rank 1 in step after 7 updates for 3 s.*parallel\.timeout_s=5"),
    ],
)
def test_one_that_was_never_seen_and_one_that_is_late_are_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: bool, words: str
) -> None:
    monkeypatch.setattr("mae_core.lost_ranks.LOOK_S", 0.01)
    if seen:
        put(tmp_path, sign(1, os.getpid()))
    with pytest.raises(RankError, match=words), lost_ranks_named(TWO, Pulse(), tmp_path):
        raise RuntimeError("Timed out waiting 5000ms for recv operation to complete")


def test_other_errors_and_those_of_one_process_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), lost_ranks_named(TWO, Pulse(), tmp_path):
        raise ValueError("mine")
    with pytest.raises(RuntimeError, match="Connection closed") as caught, lost_ranks_named(Parallel(0, 1, TWO.device), Pulse(), tmp_path):
        raise RuntimeError(CLOSED)
    assert not isinstance(caught.value, RankError)


@pytest.mark.parametrize("earlier", [False, True])
def test_where_python_hears_of_nothing_a_thread_ends_the_process(
    tmp_path: Path, ended: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], earlier: bool
) -> None:
    """As on GPUs, where the main thread waits for the device; a process of an earlier attempt, which was killed, tells nothing."""
    monkeypatch.setattr("mae_core.lost_ranks.INTERVAL_S", 0.02)
    monkeypatch.setattr("mae_core.lost_ranks.SILENT_S", 0.06)
    looked = threading.Event()
    rounds: list[int] = []

    def counted(said: dict[int, Sign], own: int) -> list[Sign]:
        rounds.append(own)
        if len(rounds) == 20:
            looked.set()
        return gone(said, own)

    monkeypatch.setattr("mae_core.lost_ranks.gone", counted)
    code: list[int] = []
    waiting = threading.Event()

    def end(with_code: int) -> None:
        code.append(with_code)
        waiting.set()

    if earlier:
        put(tmp_path, sign(1, ended))
        sleep(0.05)  # a file's time is told by a coarser clock
    with lost_ranks_named(Parallel(0, 2, torch.device("cuda", 0)), Pulse(), tmp_path, end):
        if earlier:
            assert looked.wait(30)
        else:
            sleep(0.05)
            put(tmp_path, sign(1, ended))
            assert waiting.wait(30)
    assert code == ([] if earlier else [1])
    assert ("rank 0 of 2 lost rank 1 (process" in capfd.readouterr().err) is not earlier
