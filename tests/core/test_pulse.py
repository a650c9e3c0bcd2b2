"""What a process last said can be read by others, grows old when it falls silent, and goes when it leaves in peace."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import mae_core.pulse
from mae_core.pulse import Pulse, pulse, sign_path, signs

QUICK_S = 0.01
PATIENCE_S = 20


def wait_for(there: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not there():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(QUICK_S)


def test_the_file_follows_the_process_while_the_loop_does_nothing_for_it(tmp_path: Path) -> None:
    with pulse(tmp_path, 3, 8, QUICK_S) as made:
        assert signs(tmp_path)[3].phase == "start"
        made.beat(17, "evaluation")
        wait_for(lambda: signs(tmp_path)[3].phase == "evaluation")
        sign = signs(tmp_path)[3]
        assert (sign.rank, sign.world, sign.pid, sign.step, sign.left) == (3, 8, os.getpid(), 17, "")
        wait_for(lambda: signs(tmp_path)[3].phase_s > sign.phase_s)
    assert not (tmp_path / "ranks").exists()
    assert signs(tmp_path) == {}


def test_a_process_that_fails_says_by_which_exception_and_one_that_is_silent_grows_old(tmp_path: Path) -> None:
    with pulse(tmp_path, 1, 2, 60):
        with suppress(ZeroDivisionError), pulse(tmp_path, 0, 2, 60) as made:
            made.beat(5, "step")
            raise ZeroDivisionError("not to be told: Jane Doe")
        before = sign_path(tmp_path, 1).stat().st_mtime
        os.utime(sign_path(tmp_path, 1), (before - 100, before - 100))
        found = signs(tmp_path)
        assert (found[0].left, found[0].step, found[1].left) == ("ZeroDivisionError", 5, "")
        assert found[0].age_s < 100 <= found[1].age_s
        assert "Jane" not in sign_path(tmp_path, 0).read_text()
    assert [path.name for path in (tmp_path / "ranks").iterdir()] == ["rank-00000.json"], "the first stays for who looks into it"


def test_files_of_an_attempt_with_more_processes_go_and_what_cannot_be_read_is_passed_by(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    for name in ("rank-00001.json", "rank-00002.json", "rank-00002.stacks.txt", "rank-00011.json", "notes"):
        (tmp_path / "ranks" / name).write_text("{")
    with pulse(tmp_path, 0, 2):
        assert sorted(path.name for path in (tmp_path / "ranks").iterdir()) == ["notes", "rank-00000.json", "rank-00001.json"]
        assert list(signs(tmp_path)) == [0]
        stranger = json.loads(sign_path(tmp_path, 0).read_text()) | {"rank": 1, "of another version": True}
        sign_path(tmp_path, 1).write_text(json.dumps(stranger))
        assert list(signs(tmp_path)) == [0]


def test_a_disk_that_takes_no_file_does_not_stop_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = threading.Event()

    def full(self: Path, text: str) -> int:
        tried.set()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mae_core.pulse.Path, "write_text", full)
    with pulse(tmp_path, 0, 1, QUICK_S) as made:
        assert tried.wait(PATIENCE_S)
        tried.clear()
        assert tried.wait(PATIENCE_S), "it goes on trying"
        made.beat(1, "step")


def test_what_parts_took_is_known_by_kind() -> None:
    made = Pulse()
    for step in range(300):
        made.beat(step, "step")
    made.beat(300, "save")
    assert {phase: len(known) for phase, known in made.durations.items()} == {"start": 1, "step": 100}
    assert made.now[:2] == (300, "save")
