"""Lines are only ever added, survive what kills a process, and which of them may be told depends on the lines alone."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_core.spool import Gate, Record, Spool, new_spool, progress_of, spools_in


def fresh(folder: Path) -> Spool:
    spool = new_spool(folder / "tracking")
    spool.open()
    return spool


def told(lines: list[Record]) -> list[Record]:
    """What a reader of all lines is given to tell."""
    gate = Gate()
    return [entry.record for number, line in enumerate(lines) for entry in gate.feed(line, number) if entry.send]


def row(step: int, attempt: int = 0, *, gated: bool = True) -> Record:
    return {"kind": "metrics", "values": {"loss": float(attempt)}, "step": step, "gated": gated}


def attempt(step: int) -> Record:
    return {"kind": "attempt", "from_step": step}


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Record], int]:
    """Lines of a run that is killed at random moments and goes on from its newest checkpoint; its last step."""
    lines, saved = [attempt(0)], 0
    last = draw(st.integers(3, 9))
    for number in range(draw(st.integers(0, 3))):
        until = draw(st.integers(saved, last))
        for step in range(saved + 1, until + 1):
            lines.append(row(step, number))
            if draw(st.booleans()):
                lines.append({"kind": "covered", "step": step})
                saved = step
        lines.append(attempt(saved))
    lines += [row(step, 9) for step in range(saved + 1, last + 1)]
    return [*lines, {"kind": "end", "status": "FINISHED"}], last


@given(histories())
def test_whatever_is_killed_every_step_is_told_once_and_in_order(history: tuple[list[Record], int]) -> None:
    lines, last = history
    assert [line["step"] for line in told(lines) if line["kind"] == "metrics"] == list(range(1, last + 1))


@given(histories(), st.integers(0, 40))
def test_what_is_told_early_is_told_in_the_end(history: tuple[list[Record], int], cut: int) -> None:
    """A reader never tells what a later line takes back, so that one who stops anywhere is only behind."""
    lines, _ = history
    early = told(lines[:cut])
    assert told(lines)[: len(early)] == early


def test_a_row_waits_for_its_checkpoint_and_others_wait_behind_it() -> None:
    lines = [attempt(0), row(1), row(0, gated=False), row(2), row(3)]
    assert told(lines) == [attempt(0)]
    assert told([*lines, {"kind": "covered", "step": 2}]) == [attempt(0), row(1), row(0, gated=False), row(2)]
    assert told([*lines, {"kind": "end"}])[-2:] == [row(3), {"kind": "end"}], "a run that failed tells all it knows"


def test_after_a_failure_the_first_telling_stays() -> None:
    lines = [
        attempt(0),
        row(1),
        {"kind": "covered", "step": 1},
        row(2),
        {"kind": "end"},
        attempt(1),
        row(3),
        {"kind": "covered", "step": 3},
    ]
    assert [line["step"] for line in told(lines) if "values" in line] == [1, 2, 3]


def test_from_an_older_checkpoint_later_steps_wait_anew() -> None:
    """The newest one was damaged: what it had covered is told, what comes after the older one waits for the next."""
    lines = [attempt(0), row(1), row(2), {"kind": "covered", "step": 2}, attempt(1), row(3)]
    assert [line["step"] for line in told(lines) if "values" in line] == [1, 2]


def test_a_line_that_was_cut_off_goes_and_the_rest_stays(tmp_path: Path) -> None:
    spool = fresh(tmp_path)
    spool.append("tags", values={"a": "ä\n"})
    whole = spool.path.read_bytes()
    spool.close()
    with spool.path.open("ab") as stream:
        stream.write(b'{"kind": "tags", "val')
    assert [record["values"] for record, _ in spool.read()] == [{"a": "ä\n"}], "a reader beside the writer waits for the rest"
    spool.open()
    spool.append("tags", values={"b": "2"})
    assert spool.path.read_bytes().startswith(whole)
    assert [record["values"] for record, _ in spool.read()] == [{"a": "ä\n"}, {"b": "2"}]
    assert [end for _, end in spool.read()][-1] == spool.size() == spool.path.stat().st_size


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool, write = fresh(tmp_path), os.write
    spool.append("tags", values={})
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    with pytest.raises(OSError, match="No space left") as error:
        spool.append("tags", values={"lost": "1"})
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    spool.append("tags", values={"kept": "1"})
    assert [record["values"] for record, _ in spool.read()] == [{}, {"kept": "1"}]


def test_lines_of_several_threads_are_whole_and_their_times_never_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    spool = fresh(tmp_path)
    threads = [threading.Thread(target=lambda: [spool.append("tags", values={}) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = [record["time_ms"] for record, _ in spool.read()]
    assert times == [10**9] * 200
    spool.close()
    spool.open()
    spool.append("tags", values={})
    assert [record["time_ms"] for record, _ in spool.read()][-1] == 10**9, "nor after a restart"


def test_numbers_come_back_bit_for_bit(tmp_path: Path) -> None:
    values = {"a": 0.1 + 0.2, "b": 5e-324, "c": float("inf"), "d": float("nan"), "e": -0.0}
    spool = fresh(tmp_path)
    spool.append("metrics", values=values, step=1)
    ((record, _),) = spool.read()
    assert {name: value.hex() for name, value in record["values"].items()} == {name: value.hex() for name, value in values.items()}


def test_a_run_is_known_again_from_its_lines(tmp_path: Path) -> None:
    spool = fresh(tmp_path)
    spool.append("begin", key="k", name="run", params={"a": "1"})
    spool.append("attempt", from_step=0)
    for step in (1, 2, 3):
        spool.append("metrics", values={"loss": step / 2}, step=step, gated=True)
    spool.append("image", key="panel", step=2, gated=True)
    spool.append("covered", step=2)
    spool.append("metrics", values={"system/cpu": 1.0}, step=0)
    known = spool.known()
    assert (known.key, known.name, known.params, known.attempts, known.status) == ("k", "run", {"a": "1"}, 1, "")
    assert (known.steps["loss"], known.values["loss"], known.pictures) == (2, 1.0, {("panel", 2)})
    spool.append("end", status="FAILED")
    assert (spool.known().steps, spool.known().status) == ({"loss": 3, "system/cpu": 0}, "FAILED")


def test_each_new_spool_has_a_folder_and_a_damaged_note_is_no_note(tmp_path: Path) -> None:
    first, second = fresh(tmp_path), fresh(tmp_path)
    first.append("tags", values={})
    assert [spool.folder.name for spool in spools_in(tmp_path / "tracking")] == ["run-0001"], "the other was not begun"
    assert second.folder.name == "run-0002"
    progress = progress_of(first)
    progress.offset, progress.run_id = 7, "abc"
    progress.save()
    assert progress_of(first) == progress
    (first.folder / "published.json").write_text(json.dumps({"offset": 7})[:-1])
    assert progress_of(first).offset == 0
