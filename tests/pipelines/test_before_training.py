"""`--check` of a verb that trains finds all that would fail, at once, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mae_core.checkpoint import TrainState, restore, steps
from mae_core.checkpoint_writer import CheckpointWriter
from pipelines import lease
from pipelines.before_training import checkpoint_bytes
from pipelines.finetune_segmentation import main as finetune
from pipelines.pretrain import main as pretrain
from pipelines.pretrain_mri import main as pretrain_mri
from tests.tiny_runs import ALONE, arguments, quick, shared_store, wide

__all__ = ["quick", "wide"]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def words(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*arguments(shared_store(tmp_path_factory), tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"), "--check"]


def complaints(capsys: pytest.CaptureFixture[str]) -> list[str]:
    first, *lines = capsys.readouterr().err.splitlines()
    assert f"{len(lines)} problem" in first
    return [line.strip() for line in lines]


def test_a_run_that_would_do_well_is_let_through_and_nothing_is_made(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(words) == 0
    assert pretrain([*words, f"out={tmp_path / 'a run' / 'Läufe ∅'}"]) == 0
    assert "warning" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_everything_that_would_fail_is_told_at_once(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1", "MLFLOW_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    changes = ["store=nowhere", "train.device=cuda", "tracking.uri=http://127.0.0.1:9"]
    assert pretrain([*words, *changes]) == 2
    out, err = capsys.readouterr()
    assert "warning: environment: MLFLOW_RUN_ID is set" in out
    for begin in (
        "nowhere is not a folder",
        f"out: {tmp_path} may not be written to",
        "tracking: http://127.0.0.1:9 cannot be reached: ",
        "GPU: none that torch can use, and device=cuda",
        "batches: loader.global_batch_size=4 cannot be divided among 3 processes",
    ):
        assert f"\n  {begin}" in err
    assert "5 problems" in err
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_for_the_checkpoints_is_told(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30, total=2**40))
    assert pretrain(words) == 0
    capsys.readouterr()
    assert pretrain([*words, "train.keep_checkpoints=100000"]) == 2
    assert [line.partition(",")[0] for line in complaints(capsys)] == ["out: room: 1.0 GiB free"]
    done = tmp_path / "run" / "checkpoints" / "step-00000001"
    done.mkdir(parents=True)
    with (done / "model.safetensors").open("wb") as file:
        file.truncate(2**41)  # what is there already needs no more room
    assert pretrain([*words, "train.keep_checkpoints=100000"]) == 0


@pytest.mark.parametrize("name", ["x" * 256, "ü" * 128])
def test_a_name_that_is_too_long_is_told_by_check_and_by_the_run(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    changed = [*words, f"out={tmp_path / name}"]
    assert pretrain(changed) == 2
    assert [line.partition(",")[0] for line in complaints(capsys)] == ["out: a name of 256 bytes"]
    assert pretrain([word for word in changed if word != "--check"]) == 1
    assert f"cannot be written: {os.strerror(errno.ENAMETOOLONG)}; choose another folder" in capsys.readouterr().err


def test_a_run_that_another_job_has_is_told(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with lease.hold(out, print, beat_s=60):
        before = (out / lease.RECORD).stat().st_mtime_ns
        assert pretrain(words) == 2
        assert complaints(capsys)[0].startswith(f"out: {out} is being written to by process {os.getpid()} on ")
        assert pretrain([*words, "take_over=true"]) == 0
        assert (out / lease.RECORD).stat().st_mtime_ns == before
    capsys.readouterr()
    assert pretrain(words) == 0, "it has left"
    record = (out / lease.RECORD).read_text()
    (out / lease.RECORD).write_text(record.replace('"ended": true', '"ended": false').replace('"kernel": "', '"kernel": "another'))
    assert pretrain(words) == 0
    assert "was last written to from another machine, by process" in capsys.readouterr().out


def test_the_other_verbs_that_train_look_too(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert pretrain_mri([f"data={tmp_path / 'data'}", f"out={tmp_path / 'run'}", "tracking.uri=http://127.0.0.1:9", "--check"]) == 2
    told = complaints(capsys)
    assert [line.partition(":")[0] for line in told] == ["out", "tracking"]
    given = [f"data={tmp_path / 'data'}", f"labels={tmp_path / 'data'}", f"out={tmp_path / 'run'}", "tracking.uri=http://127.0.0.1:9"]
    assert finetune([*given, f"encoder={tmp_path / 'none'}", "--check"]) == 2
    assert {"out", "tracking"} < {line.partition(":")[0] for line in complaints(capsys)}
    assert list(tmp_path.iterdir()) == [tmp_path / "data"]


def test_check_does_not_make_the_registry_that_it_looks_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    given = [f"data={tmp_path / 'data'}", f"labels={tmp_path / 'data'}", f"out={tmp_path / 'runs' / 'run'}", "encoder=models:/a@candidate"]
    assert finetune([*given, "--check"]) == 2
    assert f"models:/a@candidate: there is no registry at sqlite:///{tmp_path}/runs/mlflow.db" in "".join(complaints(capsys))
    assert list(tmp_path.iterdir()) == [tmp_path / "data"]


def test_a_checkpoint_is_weights_and_two_moments() -> None:
    assert checkpoint_bytes(nn.Linear(10, 10)) == 3 * 4 * 110


def test_steps_and_retention_do_not_mind_a_clock_that_jumps_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    state = TrainState(model, torch.optim.AdamW(model.parameters()))
    model(torch.ones(1, 2)).sum().backward()
    state.optimiser.step()
    with CheckpointWriter(tmp_path, {}, 2, ALONE) as writer:
        for state.step, (clock, zone) in enumerate([(2e9, "UTC"), (1e9, "Pacific/Kiritimati"), (5.0, "Pacific/Apia")], 1):
            monkeypatch.setattr("time.time", lambda clock=clock: clock)
            monkeypatch.setenv("TZ", zone)
            writer.save(state)
            writer.wait()
            os.utime(tmp_path / f"step-{state.step:08d}", (clock, clock))
    assert [path.name for path in steps(tmp_path)] == ["step-00000002", "step-00000003"]
    state.step = 0
    assert restore(state, tmp_path, print) is not None
    assert state.step == 3
