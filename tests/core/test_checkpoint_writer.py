"""Checkpoints are written while training goes on: what was copied counts, a failure comes out, and a kill at any moment loses nothing."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mae_core import checkpoint_writer, sealed
from mae_core.checkpoint import CheckpointError, TrainState, newest, problem, restore, step_of, steps
from mae_core.checkpoint_writer import CheckpointWriter
from mae_core.parallel import Parallel
from mae_core.sharding import whole
from mae_core.snapshot import DTYPES, Snapshot
from tests.tiny_runs import ROOT, environment, one_thread, two_processes
from tests.tiny_states import ALONE, FILES, bits, flip, fresh, go_on, same, save, three


def writer_for(folder: Path, keep: int = 9, **more: object) -> CheckpointWriter:
    return CheckpointWriter(folder, {}, keep, ALONE, **more)  # type: ignore[arg-type]


@contextmanager
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """A disk that writes nothing until it is told to."""
    ready, write = Event(), Snapshot.write

    def late(self: Snapshot, path: Path) -> sealed.Entry:
        assert ready.wait(60)
        return write(self, path)

    monkeypatch.setattr(Snapshot, "write", late)
    try:
        yield ready
    finally:
        ready.set()


def restored(folder: Path) -> TrainState:
    """A state that has come back from a folder, in which nothing is damaged."""
    state = fresh(seed=9)
    restore(state, folder, pytest.fail)
    return state


def test_what_was_copied_counts_whatever_training_does_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = fresh()
    go_on(state, 2)
    saved = bits(state)
    with writer_for(tmp_path) as writer, slow_disk(monkeypatch) as ready:
        writer.save(state)
        go_on(state, 3)
        state.window.append((9.0, 9.0))
        assert steps(tmp_path) == []
        ready.set()
        writer.wait()
        assert [path.name for path in steps(tmp_path)] == ["step-00000002"]
    later = restored(tmp_path)
    assert same(bits(later), saved)
    assert (later.step, later.window) == (2, [])
    go_on(later, 3)
    assert same(bits(later), bits(state))


def test_who_does_not_write_leaves_while_the_first_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective would wait no longer than `parallel.timeout_s`, and registering a model can take longer."""
    monkeypatch.setattr(Parallel, "sum", lambda *_: pytest.fail("it waits for the others"))
    with CheckpointWriter(tmp_path, {}, 1, Parallel(1, 2, ALONE.device)):
        pass


def test_saves_go_one_after_another_into_the_same_memory_and_are_told_once_they_are_on_disk(tmp_path: Path) -> None:
    told: list[tuple[int, str | None, list[str]]] = []

    def covered(step: int) -> None:
        pointer = newest(tmp_path)
        told.append((step, pointer and problem(pointer), [path.name for path in steps(tmp_path)]))

    state, known, memory = fresh(), [], set()
    with writer_for(tmp_path, keep=2, covered=covered) as writer:
        for _ in range(4):
            go_on(state)
            known.append(bits(state))
            writer.save(state)
            memory.add(tuple(snapshot._bytes.data_ptr() for snapshot in writer._snapshots.values()))
        writer.wait()
        assert writer.metrics.keys() == {f"checkpoint/{name}" for name in ("wait_s", "wait_before_s", "save_s", "bytes")}
        assert writer.metrics["checkpoint/wait_before_s"] <= writer.metrics["checkpoint/wait_s"]
        sizes = [(tmp_path / "step-00000004" / f"{name}.safetensors").stat().st_size for name in ("model", "optimiser")]
        assert writer.metrics["checkpoint/bytes"] == sum(sizes)
    names = [f"step-{step:08d}" for step in range(1, 5)]
    assert told == [(1, None, names[:1]), (2, None, names[:2]), (3, None, names[1:3]), (4, None, names[2:4])]
    assert len(memory) == 1
    assert same(bits(restored(tmp_path)), known[3])
    flip(tmp_path / names[3] / "state.json")
    later = fresh()
    restore(later, tmp_path, lambda _: None)
    assert same(bits(later), known[2])


def test_the_newest_stay_and_multiples_stay_for_ever(tmp_path: Path) -> None:
    state = fresh()
    with writer_for(tmp_path, keep=2, keep_every=3) as writer:
        for state.step in range(1, 10):
            writer.save(state)
    assert [path.name[-1] for path in steps(tmp_path)] == ["3", "6", "8", "9"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "latest") == [path.name for path in steps(tmp_path)]


def test_what_stays_does_not_depend_on_the_clock(tmp_path: Path) -> None:
    """Folders of the far future and of before 1980."""
    for number, path in enumerate(three(tmp_path)):
        os.utime(path, (4e9 - 4e9 * number / 2, 4e9 - 4e9 * number / 2))
    state = restored(tmp_path)
    assert state.step == 3
    state.step = 4
    save(state, tmp_path, keep=2)
    assert [path.name[-1] for path in steps(tmp_path)] == ["3", "4"]


def test_later_ones_do_not_push_out_what_is_written_now(tmp_path: Path) -> None:
    flip(three(tmp_path)[-1] / "model.safetensors")
    state = fresh()
    restore(state, tmp_path, lambda _: None)
    assert state.step == 2
    save(state, tmp_path, keep=1)
    assert [path.name for path in steps(tmp_path)] == ["step-00000002"]
    assert restored(tmp_path).step == 2


def test_a_damaged_one_that_was_gone_back_from_counts_for_none_that_is_kept(tmp_path: Path) -> None:
    flip(three(tmp_path)[-1] / "model.safetensors")
    state = fresh()
    restore(state, tmp_path, lambda _: None)
    with CheckpointWriter(tmp_path, {}, 2, ALONE, begun_at=state.step) as writer:
        state.step = 4
        writer.save(state)
        writer.wait()
        assert [step_of(path) for path in steps(tmp_path)] == [2, 4], "that of step 3 is damaged"
        state.step = 5
        writer.save(state)
    assert [step_of(path) for path in steps(tmp_path)] == [4, 5]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    paths = three(tmp_path)
    state = restored(tmp_path)
    state.run_id = "second"
    assert save(state, tmp_path) == paths[-1]
    assert json.loads((paths[-1] / "state.json").read_text())["run_id"] == "second"
    assert restored(tmp_path).run_id == "second"


def test_what_a_kill_left_is_gone_at_the_next_start(tmp_path: Path) -> None:
    path = three(tmp_path)[-1]
    for name in ("step-00000004.tmp", "step-00000001.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    (tmp_path / "latest.tmp").write_text("step-000")
    assert restored(tmp_path).step == 3
    with writer_for(tmp_path):
        assert sorted(found.name for found in tmp_path.iterdir()) == ["latest", *(f"step-0000000{step}" for step in (1, 2, 3))]
    assert newest(tmp_path) == path


def test_killed_at_every_stage_of_a_save_the_pointer_names_a_whole_one(tmp_path: Path) -> None:
    """SIGKILL before each file is made, each piece written, each flush, rename and deletion."""
    command = [sys.executable, "-m", "tests.core.killed_saves", str(tmp_path)]
    told = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert told.returncode == 0, told.stderr
    stages = told.stdout.split()
    assert {"os.mkdir", "open", "write", "flush", "os.rename", "os.remove", "os.rmdir"} == set(stages)
    state, known = fresh(), {}
    with one_thread():  # as the processes that were killed
        for step in (1, 2, 3):
            go_on(state)
            known[step] = bits(state)
    seen = []
    for number in range(len(stages)):
        folder = tmp_path / f"killed-{number:03d}"
        pointer = newest(folder)
        assert pointer is not None
        assert problem(pointer) is None
        assert [problem(path) for path in steps(folder)] == [None] * len(steps(folder))
        later = restored(folder)
        assert pointer.name == f"step-{later.step:08d}"
        assert same(bits(later), known[later.step]), stages[number]
        seen.append(later.step)
        with writer_for(folder):
            assert not list(folder.glob("*.tmp"))
    assert seen == sorted(seen), "once it is on disk it stays"
    assert set(seen) == {2, 3}, "at most one interval is lost"
    assert restored(tmp_path / "whole").step == 3


def failing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The n-th flush fails, as where space is given only when data reach the disk."""
    flushed: list[int] = []

    def full(handle: int) -> None:
        flushed.append(handle)
        if len(flushed) == number:
            raise OSError(errno.ENOSPC if number % 2 else errno.EDQUOT, "no space")

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("number", range(1, 8))
def test_a_full_disk_is_told_and_the_checkpoint_before_is_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    state = fresh()
    go_on(state)
    save(state, tmp_path, keep=1)
    saved = bits(state)
    go_on(state)
    words = rf"checkpoint of step 2 could not be written to {tmp_path}.*earlier checkpoints are intact, free some space and run again"
    writer = writer_for(tmp_path, keep=1, covered=pytest.fail)
    failing(monkeypatch, number)
    writer.save(state)
    with pytest.raises(CheckpointError, match=words):
        writer.save(state)
    monkeypatch.undo()
    assert newest(tmp_path) == tmp_path / "step-00000001"
    assert same(bits(restored(tmp_path)), saved)
    assert not [path for path in tmp_path.glob("*.tmp") if path.is_dir()]
    with writer_for(tmp_path, keep=1) as again:
        again.save(state)
    assert same(bits(restored(tmp_path)), bits(state))
    assert [path.name for path in steps(tmp_path)] == ["step-00000002"]


def test_a_limit_that_the_system_sets_leaves_the_one_before(tmp_path: Path) -> None:
    state = fresh(width=2000)
    save(state, tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    state.step = 1
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        with pytest.raises(CheckpointError, match=r"step 1 could not be written .*File too large.*earlier checkpoints are intact"):
            save(state, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000000"]
    assert problem(tmp_path / "step-00000000") is None


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"step 0 could not be written.*check the folder"):
        save(fresh(), tmp_path / "file" / "checkpoints")


def test_an_error_comes_out_where_training_waits_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    writer = writer_for(tmp_path / "file" / "checkpoints")
    writer.save(fresh())
    with pytest.raises(CheckpointError, match="step 0"):
        writer.wait()
    writer.wait()
    sick = writer_for(tmp_path / "well", covered=lambda step: [][step])
    sick.save(fresh())
    with pytest.raises(IndexError):
        sick.wait()
    assert restored(tmp_path / "well").step == 0


def test_the_end_waits_and_does_not_hide_what_ended_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")

    def fails(folder: Path) -> None:
        with slow_disk(monkeypatch) as ready, writer_for(folder) as writer:
            writer.save(fresh())
            ready.set()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as told:
        fails(tmp_path / "well")
    assert not hasattr(told.value, "__notes__")
    assert restored(tmp_path / "well").step == 0
    with pytest.raises(ZeroDivisionError) as told:
        fails(tmp_path / "file" / "checkpoints")
    assert told.value.__notes__[0].startswith("besides, checkpoint of step 0 could not be written")


def test_everything_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut could take is on disk before the next thing builds on it."""
    done: list[str] = []
    flush, rename, replace = os.fsync, Path.rename, Path.replace

    def flushed(handle: int) -> None:
        done.append(f"flush {Path(f'/proc/self/fd/{handle}').readlink().relative_to(tmp_path)}")
        flush(handle)

    def noted(kind: str, move: object) -> object:
        def moved(self: Path, target: Path) -> Path:
            done.append(f"{kind} {self.name} {target.name}")
            return move(self, target)  # type: ignore[operator,no-any-return]

        return moved

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", noted("rename", rename))
    monkeypatch.setattr(Path, "replace", noted("replace", replace))
    save(fresh(), tmp_path / "c")
    aside = "c/step-00000000.tmp"
    assert done == [
        "flush .",
        *(f"flush {aside}/{name}" for name in ("model.safetensors", "optimiser.safetensors", "state.json", "manifest.json")),
        f"flush {aside}",
        "rename step-00000000.tmp step-00000000",
        "flush c",
        "flush c/latest.tmp",
        "replace latest.tmp latest",
        "flush c",
    ]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_is_kept_to(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save(fresh(), tmp_path / "c")
    finally:
        os.umask(before)
    for path in (tmp_path / "c").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_folders_have_the_names_that_users_give(tmp_path: Path) -> None:
    place = tmp_path / "zwei Wörter" / "日本 ' \" %s" / ("x" * 255)
    save(fresh(), place)
    assert restored(place).step == 0
    assert steps(place) == [place / "step-00000000"]


def test_a_file_system_that_cannot_flush_folders_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fails)
    save(fresh(), tmp_path)
    assert restored(tmp_path).step == 0


def test_the_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    """Every dtype, scalars, empty and turned tensors: read by safetensors as it reads a file of its own."""
    torch.manual_seed(0)
    tensors = {f"{number}.of.{name}": (torch.randn(number, 3) * 9).to(dtype) for number, (dtype, name) in enumerate(DTYPES.items())}
    tensors |= {
        "scalar": torch.tensor(0.5),
        "empty": torch.zeros(0, 4),
        "turned/ü": torch.randn(5, 3).T,
        "odd": torch.ones(3, dtype=torch.uint8),
    }
    snapshot = Snapshot()
    snapshot.take(tensors, whole)
    entry = snapshot.write(tmp_path / "ours")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    ours = load_file(tmp_path / "ours")
    assert same(ours, load_file(tmp_path / "theirs"))
    assert same(ours, tensors)
    assert entry == {"bytes": snapshot.num_bytes, "sha256": sealed.sha256(tmp_path / "ours")}
    assert snapshot.num_bytes == (tmp_path / "ours").stat().st_size
    snapshot.take({"other": torch.ones(2)}, whole)
    snapshot.write(tmp_path / "ours")
    assert same(load_file(tmp_path / "ours"), {"other": torch.ones(2)})
    with pytest.raises(ValueError, match=r"x is of torch.complex64, which no checkpoint holds; it holds F64"):
        snapshot.take({"x": torch.zeros(1, dtype=torch.complex64)}, whole)


def test_nothing_here_pickles() -> None:
    for module in (checkpoint_writer, sealed, sys.modules["mae_core.checkpoint"], sys.modules["mae_core.snapshot"]):
        text = Path(str(module.__file__)).read_text()
        assert "torch.save" not in text
        assert "import pickle" not in text


def test_weights_that_the_optimiser_does_not_train_are_kept(tmp_path: Path) -> None:
    """Frozen weights, buffers and two names of one weight."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False))
    model[2].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    state = TrainState(model, torch.optim.SGD(trained, lr=0.1, momentum=0.9))
    go_on(state)
    save(state, tmp_path)
    known = bits(state)
    go_on(state)
    restore(state, tmp_path, pytest.fail)
    assert same(bits(state), known)


def test_a_model_whole_on_one_process_and_divided_among_two_have_one_format(tmp_path: Path) -> None:
    """Saved by one, restored and trained on by two that divide it (FSDP2), restored by one: the same bits, and the same next updates."""
    state = fresh(width=5)
    go_on(state, 2)
    save(state, tmp_path / "one")
    told = two_processes(ROOT / "tests" / "core" / "divided_saves.py", str(tmp_path / "one"), str(tmp_path / "two"))
    assert told.returncode == 0, told.stderr
    later = fresh(width=5, seed=8)
    restore(later, tmp_path / "two", pytest.fail)
    assert later.step == 4
    assert json.loads((tmp_path / "two" / "step-00000004" / "state.json").read_text())["world_size"] == 2
    for _ in range(2):
        torch.manual_seed(state.step)
        go_on(state)
    known = bits(state)
    for name, tensor in bits(later).items():
        torch.testing.assert_close(tensor, known[name], rtol=1e-5, atol=1e-7)
    files = [file.name for step in (3, 4) for file in (tmp_path / "two" / f"step-0000000{step}").iterdir()]
    assert sorted(files) == sorted(2 * FILES)
